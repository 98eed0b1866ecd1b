"""From NLLs to means by position: one number for each recording, then means over recordings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIMARY = "w100"
# Where fewer frames of a recording lie beyond the receptive field, they are no measurement: 2 s.
FEWEST_FRAMES = 25
FIRST_EDGE = 16


def stream_weights(codebooks: int) -> dict[str, np.ndarray]:
    """Weights of the codebooks in each number that is reported, `[codebooks]`, sum 1.

    w100 is Moshi's training loss: the semantic codebook weighs 100, each acoustic one 1.
    """
    semantic = np.eye(codebooks)[0]
    acoustic = 1 - semantic
    named = {
        PRIMARY: (100 * semantic + acoustic) / (99 + codebooks),
        "semantic": semantic,
        "acoustic": acoustic / max(codebooks - 1, 1),
        "uniform": np.full(codebooks, 1 / codebooks),
    }
    return named | {f"codebook {k + 1}": np.eye(codebooks)[k] for k in range(codebooks)}


def bucket_edges(longest: int, per_octave: int) -> list[int]:
    """Edges of buckets of positions in frames: 0, 16, then steps of equal ratio, up to `longest`."""
    edges = [0]
    step = 0
    while edges[-1] < longest:
        edge = min(round(FIRST_EDGE * 2 ** (step / per_octave)), longest)
        step += 1
        if edge > edges[-1]:
            edges.append(edge)
    return edges


def bucket_means(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Mean of each bucket of a recording's frames `[T]`; NaN where it has less than half of a bucket."""
    means = np.full(len(edges) - 1, np.nan)
    for index, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        here = values[start:stop]
        if 2 * len(here) >= stop - start:
            means[index] = here.mean()
    return means


def mean_beyond(values: np.ndarray, frames: int) -> float:
    """Mean of a recording's frames `[T]` from position `frames` on; NaN where they are too few."""
    here = values[frames:]
    return float(here.mean()) if len(here) >= FEWEST_FRAMES else float("nan")


@dataclass
class Measured:
    """Numbers of one arm and stream.

    Args:
        buckets: mean NLL of each recording by position, `[R, buckets]`.
        all: over the whole recording, `[R]`.
        beyond: beyond each receptive field that is asked about, `[R]`.
    """

    buckets: np.ndarray
    all: np.ndarray
    beyond: dict[int, np.ndarray]

    def __sub__(self, other: "Measured") -> "Measured":
        return Measured(
            self.buckets - other.buckets,
            self.all - other.all,
            {reach: values - other.beyond[reach] for reach, values in self.beyond.items()},
        )


def measure(nlls: Sequence[np.ndarray], edges: Sequence[int], reaches: Sequence[int]) -> dict[str, Measured]:
    """Numbers of one arm by stream.

    Args:
        nlls: of each recording, `[codebooks, T]`.
        edges: of the buckets.
        reaches: receptive fields, in frames.
    """
    found = {}
    for stream, weights in stream_weights(nlls[0].shape[0]).items():
        values = [weights @ nll.astype(np.float64) for nll in nlls]
        found[stream] = Measured(
            np.stack([bucket_means(one, edges) for one in values]),
            np.array([one.mean() for one in values]),
            {reach: np.array([mean_beyond(one, reach) for one in values]) for reach in reaches},
        )
    return found


def target_means(nlls: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    """Mean NLL of each recording's target by stream, `[R]`; NaN where there is none."""
    there = next(nll for nll in nlls if nll is not None)
    return {
        stream: np.array(
            [np.nan if nll is None else (weights @ nll.astype(np.float64)).mean() for nll in nlls]
        )
        for stream, weights in stream_weights(there.shape[0]).items()
    }
