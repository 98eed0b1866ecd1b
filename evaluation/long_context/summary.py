"""What a run found: curves, paired differences, controls, checks, and the headline in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.long_context.arms import MEANINGS, Arm, comparisons
from evaluation.long_context.measures import (
    FEWEST_FRAMES,
    PRIMARY,
    Measured,
    bucket_edges,
    measure,
    target_means,
)
from evaluation.long_context.pieces import FAR, OTHER, OWN, PREFIX, WHOLE
from evaluation.long_context.scoring import ArmFacts, shown
from evaluation.statistics import FEWEST_ROWS, Interval, cluster_intervals

LONGEST_DELAY = 3  # of a codebook, in frames; Moshi's is 1
Scores = dict[str, list[dict[str, np.ndarray]]]
Row = list[float | None]


@dataclass(frozen=True)
class Bootstrap:
    """Who is drawn, how often: clusters are the recordings' speakers."""

    speakers: list[str]
    draws: int
    seed: int

    def rows(self, values: np.ndarray) -> list[Row]:
        """[mean, low, high, standard error] of each column of `[R, columns]`."""
        return [_row(one) for one in cluster_intervals(values, self.speakers, self.draws, self.seed)]

    def row(self, values: np.ndarray) -> Row:
        """The same of one column `[R]`."""
        return self.rows(values[:, None])[0]


def _row(interval: Interval) -> Row:
    values = (interval.mean, interval.low, interval.high, interval.stderr)
    return [None if math.isnan(value) else round(value, 6) for value in values]


def summarize(
    scores: Scores,
    arms: Sequence[Arm],
    facts: dict[str, ArmFacts],
    bootstrap: Bootstrap,
    per_octave: int,
    frame_rate: float,
    card: int,
    near_frames: int,
    tolerance: float,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """All numbers of a run, and those of each recording by arm.

    Args:
        scores: by arm, for each recording its NLLs by piece.
        arms, facts: what they are.
        bootstrap: the recordings' speakers.
        per_octave: buckets.
        card: entries of a codebook: a model that knows nothing has an NLL of ln(card).
        near_frames: see pieces.py.
        tolerance: rounding of an NLL, in nats.
    """
    wholes = {name: [one[WHOLE] for one in found] for name, found in scores.items()}
    lengths = [nll.shape[1] for nll in next(iter(wholes.values()))]
    edges = bucket_edges(max(lengths), per_octave)
    reaches = sorted({one.receptive_field_frames for one in facts.values()})
    measured = {name: measure(nlls, edges, reaches) for name, nlls in wholes.items()}
    first = next(iter(measured.values()))[PRIMARY]
    content: dict[str, Any] = {
        "buckets": _buckets(edges, first.buckets, bootstrap.speakers, frame_rate),
        "ln_card": round(math.log(card), 6),
        "arms": {},
    }
    for arm in arms:
        content["arms"][arm.name] = {
            "meaning": MEANINGS[arm.memory],
            **shown(facts[arm.name], frame_rate),
            **_numbers(measured[arm.name], facts[arm.name].receptive_field_frames, bootstrap),
        }
    content["differences"] = _differences(measured, arms, facts, bootstrap)
    content["headlines"] = _headlines(content["differences"], arms, facts, max(lengths), frame_rate)
    content["prefix"] = _prefix(scores, bootstrap, frame_rate)
    content["foreign"] = _foreign(scores, bootstrap, facts, near_frames)
    content["checks"] = [
        *checks(wholes, arms, facts, tolerance),
        *_blind(scores, arms, facts, near_frames, tolerance),
    ]
    samples = {
        name: _samples(streams, facts[name].receptive_field_frames, len(lengths))
        for name, streams in measured.items()
    }
    return content, samples


def _differences(
    measured: dict[str, dict[str, Measured]],
    arms: Sequence[Arm],
    facts: dict[str, ArmFacts],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Paired differences, by name."""
    found = {}
    for arm, other in comparisons(list(arms)):
        reach = facts[arm.name].receptive_field_frames
        pair = {s: measured[arm.name][s] - measured[other.name][s] for s in measured[arm.name]}
        numbers = _numbers(pair, reach, bootstrap) | {"of": [arm.name, other.name], "from_frame": reach}
        found[f"{arm.name} - {other.name}"] = numbers
    return found


def _headlines(
    differences: dict[str, Any],
    arms: Sequence[Arm],
    facts: dict[str, ArmFacts],
    longest: int,
    frame_rate: float,
) -> list[dict[str, Any]]:
    """One for each context that has both arms."""
    found = []
    for arm, other in comparisons(list(arms)):
        forgets = facts[other.name].reset_frames
        if forgets is not None:
            numbers = differences[f"{arm.name} - {other.name}"]
            still = differences.get(f"{arm.name} - {Arm('inner_lr_0', arm.context).name}")
            found.append(headline(numbers, still, numbers["from_frame"], forgets, longest, frame_rate))
    return found


def _samples(streams: dict[str, Measured], reach: int, count: int) -> list[dict[str, Any]]:
    """The means of each recording in one arm."""

    def plain(value: float) -> float | None:
        return None if math.isnan(value) else round(float(value), 6)

    return [
        {
            stream: {
                "all": plain(one.all[i]),
                "beyond": plain(one.beyond[reach][i]),
                "curve": [plain(value) for value in one.buckets[i]],
            }
            for stream, one in streams.items()
        }
        for i in range(count)
    ]


def _numbers(measured: dict[str, Measured], reach: int, bootstrap: Bootstrap) -> dict[str, Any]:
    beyond = measured[PRIMARY].beyond[reach]
    there = [speaker for speaker, value in zip(bootstrap.speakers, beyond, strict=True) if value == value]
    return {
        "all": {stream: bootstrap.row(one.all) for stream, one in measured.items()},
        "beyond": {stream: bootstrap.row(one.beyond[reach]) for stream, one in measured.items()},
        "beyond_recordings": len(there),
        "beyond_speakers": len(set(there)),
        "curve": {stream: bootstrap.rows(one.buckets) for stream, one in measured.items()},
    }


def _buckets(
    edges: Sequence[int], means: np.ndarray, speakers: Sequence[str], frame_rate: float
) -> list[dict[str, Any]]:
    buckets = []
    for index, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        there = ~np.isnan(means[:, index])
        buckets.append(
            {
                "from_frame": start,
                "to_frame": stop,
                "from_sec": round(start / frame_rate, 3),
                "to_sec": round(stop / frame_rate, 3),
                "recordings": int(there.sum()),
                "speakers": len({s for s, here in zip(speakers, there, strict=True) if here}),
            }
        )
    return buckets


def headline(
    numbers: dict[str, Any],
    beside: dict[str, Any] | None,
    reach: int,
    forgets: int,
    longest: int,
    frame_rate: float,
) -> dict[str, Any]:
    """The difference carried - reset beyond the receptive field, and what it says.

    Args:
        numbers: of the pair.
        beside: of carried - inner_lr_0, where there is that arm: without it, a cost of resetting looks like a
            memory.
        reach: the receptive field.
        forgets: the reset's period.
        longest: recording. All in frames.
    """
    mean, low, high, stderr = numbers["beyond"][PRIMARY]
    recordings, speakers = numbers["beyond_recordings"], numbers["beyond_speakers"]
    where = f"beyond the receptive field of {reach:,} frames ({reach / frame_rate:,.0f} s)"
    counted = f"{recordings} recordings of {speakers} speakers"
    if mean is None:
        verdict = "not measured"
        text = (
            f"Not measured: no recording goes on for {FEWEST_FRAMES} frames {where}; the longest has "
            f"{longest:,} frames."
        )
    elif forgets >= longest:
        verdict = "not measured"
        text = f"Not measured: with a reset every {forgets:,} frames none happens in {longest:,} frames."
    elif low is None or high is None:
        verdict = "cannot be told"
        text = (
            f"It cannot be told: {counted} reach {where}, and an interval needs at least {FEWEST_ROWS} "
            "speakers. "
            f"The mean difference carried - reset is {mean:+.4f} nats."
        )
    else:
        interval = f"{mean:+.4f} nats, 95 % interval {low:+.4f} to {high:+.4f}, {counted}"
        if low <= 0 <= high:
            verdict = "no difference shown"
            text = (
                f"No difference shown between carrying the inner state and resetting it {where}: {interval}."
            )
        else:
            verdict = "lower" if high < 0 else "higher"
            text = f"Carrying the inner state makes the NLL {verdict} {where}: {interval}."
        if beside is not None:
            text += _against_still(beside["beyond"][PRIMARY])
    return {
        "of": numbers["of"],
        "verdict": verdict,
        "text": text,
        "row": [mean, low, high, stderr],
        "recordings": recordings,
        "speakers": speakers,
    }


def _against_still(row: Row) -> str:
    """The difference carried - inner_lr_0 in words."""
    mean, low, high = row[:3]
    assert mean is not None
    assert low is not None
    assert high is not None
    told = "no difference shown"
    if low > 0 or high < 0:
        told = "carrying predicts better" if high < 0 else "carrying predicts WORSE than learning nothing"
    return f" Against inner learning rate 0: {mean:+.4f} ({low:+.4f} to {high:+.4f}), {told}."


def checks(
    wholes: dict[str, list[np.ndarray]],
    arms: Sequence[Arm],
    facts: dict[str, ArmFacts],
    tolerance: float,
) -> list[dict[str, Any]]:
    """What must be so if the arms are what they say they are."""
    found = []
    for arm, other in comparisons(list(arms)):
        if other.memory != "reset":
            continue
        forgets = facts[other.name].reset_frames
        assert forgets is not None
        # The last codes before a reset are delayed, and are predicted behind it.
        before = slice(0, max(forgets - LONGEST_DELAY, 1))
        pairs = zip(wholes[arm.name], wholes[other.name], strict=True)
        apart = max(float(np.abs(a[:, before] - b[:, before]).max()) for a, b in pairs)
        found.append(_same(f"{arm.name} and {other.name} before the first reset", apart, tolerance))
    return found


def _blind(
    scores: Scores, arms: Sequence[Arm], facts: dict[str, ArmFacts], near_frames: int, tolerance: float
) -> list[dict[str, Any]]:
    """What learns nothing cannot tell a foreign prefix that attention does not reach."""
    found = []
    for arm in arms:
        both = [(one[OWN], one[FAR]) for one in scores[arm.name] if FAR in one]
        if arm.memory != "carried" and both and facts[arm.name].receptive_field_frames <= near_frames:
            apart = max(float(np.abs(own - far).max()) for own, far in both)
            what = f"{arm.name} behind its own prefix and behind one whose far part is foreign"
            found.append(_same(what, apart, tolerance))
    return found


def _same(what: str, apart: float, tolerance: float) -> dict[str, Any]:
    return {
        "what": f"{what}: the same NLLs",
        "expected": "0",
        "found": f"largest difference {apart:.2g} nats",
        "holds": apart <= tolerance,
    }


def _prefix(scores: Scores, bootstrap: Bootstrap, frame_rate: float) -> dict[str, Any] | None:
    """How the NLL of the same target falls as its prefix grows: differences to the shortest prefix."""
    names = {name for found in scores.values() for one in found for name in one if name.startswith(PREFIX)}
    if not names:
        return None
    lengths = sorted(int(name.removeprefix(PREFIX)) for name in names)
    arms = {}
    for arm, found in scores.items():
        if not any(name in one for one in found for name in names):
            continue
        means = {n: target_means([one.get(f"{PREFIX}{n}") for one in found]) for n in lengths}
        shortest = means[lengths[0]]
        arms[arm] = {
            stream: bootstrap.rows(np.stack([means[n][stream] - shortest[stream] for n in lengths], axis=1))
            for stream in shortest
        }
    counts = [max(sum(f"{PREFIX}{n}" in one for one in found) for found in scores.values()) for n in lengths]
    return {
        "frames": lengths,
        "sec": [round(n / frame_rate, 2) for n in lengths],
        "recordings": counts,
        "minus_shortest": arms,
    }


def _foreign(
    scores: Scores, bootstrap: Bootstrap, facts: dict[str, ArmFacts], near_frames: int
) -> dict[str, Any] | None:
    """How much worse a target is predicted behind another speaker's recording than behind its own."""
    arms = {}
    for arm, found in scores.items():
        if not any(OTHER in one for one in found):
            continue
        own = target_means([one.get(OWN) for one in found])
        arms[arm] = {"attention_reaches_far": facts[arm].receptive_field_frames > near_frames}
        for key, name in (("other", OTHER), ("far", FAR)):
            if any(name in one for one in found):
                changed = target_means([one.get(name) for one in found])
                arms[arm][key] = {stream: bootstrap.row(changed[stream] - own[stream]) for stream in own}
    return {"near_frames": near_frames, "minus_own": arms} if arms else None
