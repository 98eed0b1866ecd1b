"""Who speaks when: pauses, gaps, overlaps, and how Moshi takes its turns. All from two masks of frames.

A stretch is voice of one speaker without a silence of more than 0.2 s. Silence between two stretches is a
pause if they are of one speaker and a gap if they are not; silence before the first and after the last is
neither. An overlap is where both speak.
"""

import numpy as np

from evaluation.speech_quality.measures import Metric, Ratios
from finetune.data.voice import FRAME_SEC, runs

METRICS = {
    "answered": Metric(
        "%", "higher", True,
        "of the user's turns (voice, then silence of answer_sec or more), those after which Moshi speaks "
        "before the user does again",
    ),
    "latency": Metric(
        "s", "", True,
        "from the end of a user's stretch to the start of Moshi's that takes over; below 0 where it started "
        "before and went on",
    ),
    "pauses_taken": Metric(
        "%", "lower", True,
        "of the user's own silences shorter than answer_sec, those in which Moshi starts to speak",
    ),
    "cut_in": Metric("%", "lower", False, "of Moshi's stretches, those that start while the user speaks, but "
                     "for backchannels"),
    "backchannels": Metric("per min", "", False, "Moshi's stretches up to backchannel_sec in the user's"),
    "moshi_speaks": Metric("%", "", False, "of the time"),
    "user_speaks": Metric("%", "", False, "of the time"),
    "both_speak": Metric("%", "", True, "of the time"),
    "nobody_speaks": Metric("%", "", False, "of the time"),
    "overlaps": Metric("per min", "", False, "stretches in which both speak"),
    "overlap_length": Metric("s", "", False, "mean length of these"),
    "gaps": Metric("per min", "", False, "silences between two speakers"),
    "gap_length": Metric("s", "", False, "mean length of these"),
    "moshi_pauses": Metric("per min", "", False, "silences between two stretches of Moshi"),
    "moshi_pause_length": Metric("s", "", False, "mean length of these"),
    "moshi_stretches": Metric("per min", "", False, "stretches of Moshi"),
    "moshi_stretch_length": Metric("s", "", False, "mean length of these"),
}  # fmt: skip


def measure(user: np.ndarray, moshi: np.ndarray, answer_sec: float, backchannel_sec: float) -> Ratios:
    """All numbers of one conversation.

    Args:
        user, moshi: frames of 20 ms with their voice, `[frames]` bool.
    """
    assert user.shape == moshi.shape
    frames = len(user)
    minutes = frames * FRAME_SEC / 60
    both, stretches = runs(user & moshi), runs(moshi)
    pauses, gaps = silences(user, moshi)
    backchannels, cuts = _starts_in_voice(user, moshi, backchannel_sec)
    return {
        "answered": _answered(user, moshi, answer_sec),
        "latency": _mean(latencies(user, moshi)),
        "pauses_taken": _pauses_taken(user, moshi, answer_sec),
        "cut_in": (100.0 * cuts, float(len(stretches))),
        "backchannels": (float(backchannels), minutes),
        "moshi_speaks": (100.0 * moshi.sum(), float(frames)),
        "user_speaks": (100.0 * user.sum(), float(frames)),
        "both_speak": (100.0 * (user & moshi).sum(), float(frames)),
        "nobody_speaks": (100.0 * (~user & ~moshi).sum(), float(frames)),
        "overlaps": (float(len(both)), minutes),
        "overlap_length": _mean(_lengths(both)),
        "gaps": (float(len(gaps)), minutes),
        "gap_length": _mean(_lengths(gaps)),
        "moshi_pauses": (float(len(pauses)), minutes),
        "moshi_pause_length": _mean(_lengths(pauses)),
        "moshi_stretches": (float(len(stretches)), minutes),
        "moshi_stretch_length": _mean(_lengths(stretches)),
    }


def _lengths(stretches: np.ndarray) -> np.ndarray:
    """Seconds of stretches `[n, 2]` of frames."""
    return (stretches[:, 1] - stretches[:, 0]) * FRAME_SEC


def _mean(seconds: np.ndarray) -> tuple[float, float]:
    return float(seconds.sum()), float(len(seconds))


def silences(user: np.ndarray, moshi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moshi's pauses and the gaps, each `[n, 2]` of frames. The user's own pauses are neither."""
    pauses, gaps = [], []
    for start, end in runs(~user & ~moshi):
        if start == 0 or end == len(user):
            continue
        before = (bool(user[start - 1]), bool(moshi[start - 1]))
        after = (bool(user[end]), bool(moshi[end]))
        if before == after == (False, True):
            pauses.append((start, end))
        elif before != after:
            gaps.append((start, end))
    return np.array(pauses, int).reshape(-1, 2), np.array(gaps, int).reshape(-1, 2)


def latencies(user: np.ndarray, moshi: np.ndarray) -> np.ndarray:
    """Seconds from the end of the user's voice to the start of Moshi's, wherever Moshi takes over."""
    users, found = runs(user), []
    for start, end in runs(moshi):
        earlier = users[users[:, 0] <= start]
        if len(earlier) == 0:
            continue
        stopped = earlier[-1, 1]
        alone_between = not moshi[stopped:start].any()  # else Moshi speaks again and the user has not
        if stopped < end and alone_between:
            found.append((start - stopped) * FRAME_SEC)
    return np.array(found)


def _answered(user: np.ndarray, moshi: np.ndarray, answer_sec: float) -> tuple[float, float]:
    turns = answered = 0
    for start, end in _user_silences(user):
        if (end - start) * FRAME_SEC >= answer_sec:
            turns += 1
            answered += bool(moshi[start:end].any())
    return 100.0 * answered, float(turns)


def _pauses_taken(user: np.ndarray, moshi: np.ndarray, answer_sec: float) -> tuple[float, float]:
    pauses = taken = 0
    for start, end in _user_silences(user):
        if end < len(user) and (end - start) * FRAME_SEC < answer_sec:
            pauses += 1
            taken += bool((moshi[start:end] & ~moshi[start - 1 : end - 1]).any())
    return 100.0 * taken, float(pauses)


def _user_silences(user: np.ndarray) -> np.ndarray:
    """Where the user is silent after it has spoken, `[n, 2]`; the last goes to the end."""
    return np.array([(start, end) for start, end in runs(~user) if start > 0], int).reshape(-1, 2)


def _starts_in_voice(user: np.ndarray, moshi: np.ndarray, backchannel_sec: float) -> tuple[int, int]:
    """How often Moshi starts while the user speaks: backchannels, and others."""
    backchannels = others = 0
    for start, end in runs(moshi):
        if start > 0 and user[start] and user[start - 1]:
            short = (end - start) * FRAME_SEC <= backchannel_sec
            within = bool(user[start:end].all()) and end < len(user) and bool(user[end])
            backchannels += short and within
            others += not (short and within)
    return backchannels, others
