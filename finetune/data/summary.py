"""A data set in numbers: what all its recordings together have, and the problems that count."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.findings import ChannelMeasures, Checked, Problem


@dataclass
class Summary:
    """A checked data set.

    Args:
        recordings: those that could be read.
        problems: errors first, then by file and second.
        counts: problems by severity and kind.
        rows: the table.
    """

    recordings: list[Checked]
    hours: float
    problems: list[Problem]
    counts: Counter[tuple[str, str]]
    rows: list[tuple[str, str]]


def summarize(
    checked: Sequence[Checked],
    list_problems: Sequence[Problem],
    severity: dict[str, str],
    speakers: tuple[str, str],
) -> Summary:
    """Put the recordings together.

    Args:
        checked: all recordings.
        list_problems: what is wrong with the lists.
        severity: error, warning or off for each kind of problem.
        speakers: labels of the left and the right channel.
    """
    readable = [recording for recording in checked if recording.channels]
    problems = [*list_problems, *(problem for recording in checked for problem in recording.problems)]
    if not any(speakers[1] in recording.speakers for recording in checked):
        # As moshi-finetune's own annotation has it: the user's words are left out, and nothing is missing.
        problems = [p for p in problems if not (p.kind == "unworded_voice" and p.speaker == speakers[1])]
    problems = [p for p in problems if severity[p.kind] != "off"]
    problems.sort(key=lambda p: (severity[p.kind], p.file, p.second))
    counts = Counter((severity[p.kind], p.kind) for p in problems)
    hours = sum(recording.duration_sec for recording in readable) / 3600
    rows = [
        ("recordings", f"{len(checked):,}, {len(readable):,} readable"),
        *_set_rows(readable),
        *(row for speaker in speakers for row in _speaker_rows(readable, speaker)),
        ("errors", f"{sum(n for (level, _), n in counts.items() if level == 'error'):,}"),
        ("warnings", f"{sum(n for (level, _), n in counts.items() if level == 'warning'):,}"),
    ]
    return Summary(readable, hours, problems, counts, rows)


def _set_rows(recordings: Sequence[Checked]) -> list[tuple[str, str]]:
    durations = np.array([recording.duration_sec for recording in recordings])
    total = durations.sum()
    labels = Counter(speaker for recording in recordings for speaker in recording.speakers)
    silence = sum(recording.silence_share * recording.duration_sec for recording in recordings) / total
    overlap = sum(recording.overlap_share * recording.duration_sec for recording in recordings) / total
    mono = sum(len(recording.channels) == 1 for recording in recordings)
    return [
        ("hours", f"{total / 3600:.2f}, recordings of {_spread(durations / 60)} min"),
        ("stereo and mono", f"{len(recordings) - mono:,} and {mono:,}"),
        ("speakers", ", ".join(f"{name} (in {n:,})" for name, n in labels.most_common()) or "no words"),
        ("silence, overlap", f"{silence:.1%}, {overlap:.1%} of the time"),
    ]


def _speaker_rows(recordings: Sequence[Checked], speaker: str) -> list[tuple[str, str]]:
    channels = channels_of(recordings, speaker)
    if not channels:
        return []
    voice, words = sum(c.voice_sec for c in channels), sum(c.words for c in channels)
    heard = np.array([c.voice_dbfs for c in channels if c.voice_dbfs is not None])
    peaks = np.array([c.peak_dbfs for c in channels])
    clipped = sum(c.clipped_share * c.voice_sec for c in channels)
    rate = f"{words / voice:.2f} a second of voice" if voice else "no voice"
    level = f"{_spread(heard)} dBFS" if len(heard) else "no voice"
    return [
        (f"{speaker}: voice", f"{voice / 3600:.2f} h"),
        (f"{speaker}: words", f"{words:,}, {rate}"),
        (f"{speaker}: level", f"{level} (RMS of the voice), highest peak {peaks.max():.1f} dBFS"),
        (f"{speaker}: clipped", f"{clipped / voice if voice else 0:.3%} of the voice"),
    ]


def channels_of(recordings: Sequence[Checked], speaker: str) -> list[ChannelMeasures]:
    """All channels of a speaker."""
    return [c for recording in recordings for c in recording.channels if c.speaker == speaker]


def _spread(values: np.ndarray) -> str:
    """Least, median and greatest value."""
    return f"{values.min():.1f} to {values.max():.1f} (median {np.median(values):.1f})"
