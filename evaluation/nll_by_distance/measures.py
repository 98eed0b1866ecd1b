"""Means over bins of positions or distances, kept apart by recording so that recordings can be redrawn."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evaluation.nll_by_distance.recurrence import Occurrence, holds_word
from evaluation.nll_by_distance.sides import Side
from evaluation.statistics import Interval, ratio_intervals
from finetune.data.interleaver import TextTokens

STREAMS = ("text", "words", "semantic", "acoustic")
FIRST = -1.0  # the place of what was not there before


@dataclass
class Measure:
    """Observations of one kind, by recording and bin.

    Args:
        edges: bins are edges[i] <= x < edges[i + 1]; the last edge may be infinite.
        counts: observations, `[R, bins]`.
        places: sum of their x, `[R, bins]`.
        sums: sum of their values for each arm, `[R, bins]`.
    """

    edges: list[float]
    counts: np.ndarray
    places: np.ndarray
    sums: dict[str, np.ndarray]

    @staticmethod
    def empty(edges: Sequence[float], recordings: int, arms: Sequence[str]) -> "Measure":
        def zeros() -> np.ndarray:
            return np.zeros((recordings, len(edges) - 1))

        return Measure(list(edges), zeros(), zeros(), {arm: zeros() for arm in arms})

    def add(self, recording: int, x: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Observations `[n]` at places x `[n]`, all of one recording; NaN is no observation."""
        there = ~np.isnan(next(iter(values.values())))
        bins = np.digitize(x[there], self.edges) - 1
        assert ((bins >= 0) & (bins < self.counts.shape[1])).all(), "an observation outside all bins"
        np.add.at(self.counts[recording], bins, 1)
        np.add.at(self.places[recording], bins, x[there])
        for arm, value in values.items():
            assert (np.isnan(value) == ~there).all(), "arms are compared on the same observations"
            np.add.at(self.sums[arm][recording], bins, value[there])

    def means(self, arm: str, draws: int) -> list[Interval]:
        """Mean of each bin with its interval over recordings."""
        return ratio_intervals(self.sums[arm], self.counts, draws)

    def differences(self, arm: str, other: str, draws: int) -> list[Interval]:
        """Mean of arm - other on the same observations; the same recordings are drawn for both."""
        return ratio_intervals(self.sums[arm] - self.sums[other], self.counts, draws)


@dataclass
class Bins:
    """Edges of the measures.

    Args:
        position_sec: over the recording.
        distance_sec: since a word began, or a speaker ended; the first bin is what was not there before.
        reach_sec: the same in two: within the receptive field of attention, and beyond it.
    """

    position_sec: list[float]
    distance_sec: list[float]
    reach_sec: list[float]

    @staticmethod
    def of(
        longest_sec: float, position_bin_sec: float, windows: Sequence[int], reach: int, frame_rate: float
    ) -> "Bins":
        """Distances within an attention window, within the receptive field `reach`, and multiples of it."""
        positions = np.arange(0, longest_sec + position_bin_sec, position_bin_sec)
        distances = {*windows, *(reach * 2**power for power in range(5))} - {0}
        edges = [FIRST, 0.0, *(frames / frame_rate for frames in sorted(distances)), np.inf]
        reach_sec = [FIRST, 0.0, *([reach / frame_rate] if reach else []), np.inf]
        return Bins([float(edge) for edge in positions], edges, reach_sec)


@dataclass
class Measures:
    """All that is measured over some recordings.

    Args:
        bins: edges.
        recordings: how many.
        arms: names of what is compared.
        frame_rate: frames a second.
        turn_sec: how much of a turn counts.
        special: tokens of the text stream that are no words.
        frequent: words that "rarer words" leave out.
    """

    bins: Bins
    recordings: int
    arms: list[str]
    frame_rate: float
    turn_sec: float
    special: TextTokens
    frequent: set[str]
    found: dict[str, Measure] = field(default_factory=dict)

    def add(self, side: Side, nll: dict[str, torch.Tensor]) -> None:
        """The NLLs `[1 + dep_q, T]` of one side of a recording, by arm."""
        streams = {arm: self._streams(side, values) for arm, values in nll.items()}
        frames = np.arange(side.codes.shape[-1])
        for stream in STREAMS:
            if not side.words and stream in ("text", "words"):
                continue  # a transcript without words says nothing about text
            values = {arm: found[stream] for arm, found in streams.items()}
            seconds = frames / self.frame_rate
            self._measure(f"all/{stream}", [0.0, np.inf]).add(side.recording, seconds, values)
            self._measure(f"position/{stream}", self.bins.position_sec).add(side.recording, seconds, values)
            if stream != "text":
                self._add_turns(side, stream, values)
        for name, words in (
            ("words", side.words),
            ("rarer words", [w for w in side.words if w.word.key not in self.frequent]),
        ):
            self._add_words(side, name, words, {arm: found["text"] for arm, found in streams.items()})

    def _measure(self, name: str, edges: Sequence[float]) -> Measure:
        if name not in self.found:
            self.found[name] = Measure.empty(edges, self.recordings, self.arms)
        return self.found[name]

    def _streams(self, side: Side, nll: torch.Tensor) -> dict[str, np.ndarray]:
        """NLL of each frame by stream, `[T]`: acoustic codebooks averaged, words without padding."""
        text, semantic, acoustic = nll[0], nll[1], nll[2:].mean(0)
        is_word = holds_word(side.codes[0].cpu(), self.special)
        words = torch.where(is_word, text, torch.nan)
        parts = zip(STREAMS, (text, words, semantic, acoustic), strict=True)
        return {name: part.double().numpy() for name, part in parts}

    def _add_words(
        self, side: Side, name: str, words: Sequence[Occurrence], text: dict[str, np.ndarray]
    ) -> None:
        """A word's NLL by distance, and the same minus that of its first occurrence in the recording."""
        places = [FIRST if w.distance_frames is None else w.distance_frames / self.frame_rate for w in words]
        values = {arm: np.array([_word_nll(w, nll) for w in words]) for arm, nll in text.items()}
        repeats = [w for w in words if w.first is not None]
        gains = {arm: np.array([_gain(w, nll) for w in repeats]) for arm, nll in text.items()}
        again = [place for place in places if place != FIRST]
        self._add_by_distance(name, side, np.array(places), values)
        self._add_by_distance(f"{name}, minus their first", side, np.array(again), gains)

    def _add_by_distance(
        self, name: str, side: Side, places: np.ndarray, values: dict[str, np.ndarray]
    ) -> None:
        """Observations to a measure by distance, and to one by reach."""
        for kind, edges in (("reach", self.bins.reach_sec), ("distance", self.bins.distance_sec)):
            self._measure(f"{kind}/{name}", edges).add(side.recording, places, values)

    def _add_turns(self, side: Side, stream: str, nll: dict[str, np.ndarray]) -> None:
        """The first seconds of each turn by the gap since the speaker's last one, one value a turn."""
        spans = [self._span(turn.start_sec, turn.end_sec) for turn in side.turns]
        places = np.array([FIRST if turn.gap_sec is None else turn.gap_sec for turn in side.turns])
        values = {arm: np.array([_mean(value[span]) for span in spans]) for arm, value in nll.items()}
        self._add_by_distance(f"turns, {stream}", side, places, values)

    def _span(self, start_sec: float, end_sec: float) -> slice:
        """Frames of the first `turn_sec` seconds of a turn; at least one."""
        first = int(start_sec * self.frame_rate)
        last = int(min(end_sec, start_sec + self.turn_sec) * self.frame_rate)
        return slice(first, max(last, first + 1))


def _mean(values: np.ndarray) -> float:
    """Mean of those that are there; NaN for none."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


def _word_nll(occurrence: Occurrence, text: np.ndarray) -> float:
    """Mean NLL of a word's tokens, in nats a token."""
    word = occurrence.word
    return float(text[word.frame : word.frame + len(word.tokens)].mean())


def _gain(occurrence: Occurrence, text: np.ndarray) -> float:
    """NLL of a repeated word minus that of its first occurrence, over the tokens that both have."""
    first, word = occurrence.first, occurrence.word
    assert first is not None
    length = min(len(first.tokens), len(word.tokens))
    here, there = (text[w.frame : w.frame + length].mean() for w in (word, first))
    return float(here - there)


def frequent_words(sides: Sequence[Side], count: int) -> set[str]:
    """The most frequent words of the recordings; ties by the alphabet."""
    counts = Counter(occurrence.word.key for side in sides for occurrence in side.words)
    return set(sorted(counts, key=lambda key: (-counts[key], key))[:count])
