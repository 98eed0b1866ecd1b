"""The order in which clips of several sources are drawn: by weight, the same for any number of processes."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from operator import add

import numpy as np

from finetune.data.order import EndlessOrder

# Sources are drawn for so many positions at once.
_BLOCK = 1 << 16


class MixedOrder:
    """What is drawn at any position: sources by weight, each going through its own epochs.

    Each position draws its source by weight, by itself, as moshi-finetune does. One source alone has the
    order of `EndlessOrder`.

    Args:
        lengths: how many there are in each source.
        weights: above 0; how often each source is drawn, relative to the others.
        seed: of all draws.
        shuffle: draw each source in a new order every epoch. Sources are drawn at random even without.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True):
        assert len(lengths) == len(weights)
        assert min(lengths) > 0
        assert min(weights) > 0
        self.lengths, self.weights, self.seed, self.shuffle = tuple(lengths), tuple(weights), seed, shuffle
        self.size = sum(lengths)
        self._firsts = [0, *accumulate(lengths)]
        # Sources take seeds far apart: seed + 1 is another run's.
        self._orders = [EndlessOrder(n, seed + 7_919 * i, shuffle) for i, n in enumerate(lengths)]
        self._drawn = [[0] * len(lengths)]  # from each source before each block
        self._block = -1

    def pick(self, position: int) -> tuple[int, int]:
        """The source, and which index of it."""
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            self._enter(block)
        source = int(self._sources[offset])
        return source, self._orders[source][int(self._turns[offset])]

    def __getitem__(self, position: int) -> int:
        """The index in all sources, one after the other."""
        source, index = self.pick(position)
        return self._firsts[source] + index

    def __iter__(self) -> Iterator[int]:
        """What is drawn from the start, without end."""
        return (self[position] for position in count())

    def _enter(self, block: int) -> None:
        """Draw a block: the source of each position, and the how-manieth of its source it is."""
        while len(self._drawn) <= block:
            here = np.bincount(self._draw_sources(len(self._drawn) - 1), minlength=len(self.lengths))
            self._drawn.append([*map(add, self._drawn[-1], here.tolist())])
        self._block, self._sources = block, self._draw_sources(block)
        self._turns = np.empty(_BLOCK, np.int64)
        for source, drawn in enumerate(self._drawn[block]):
            here = self._sources == source
            self._turns[here] = drawn + np.arange(np.count_nonzero(here))

    def _draw_sources(self, block: int) -> np.ndarray:
        shares = np.cumsum(self.weights)
        drawn = np.random.default_rng((self.seed % (1 << 63), block)).random(_BLOCK) * shares[-1]
        return np.searchsorted(shares[:-1], drawn, side="right")


def mixed_order(
    lengths: Sequence[int], weights: Sequence[float], seed: int, start: int = 0, shuffle: bool = True
) -> Iterator[tuple[int, int]]:
    """(source, index in the source) without end, of `MixedOrder`.

    Args:
        start: how many have been drawn before; going on from there gives what would have followed.
    """
    order = MixedOrder(lengths, weights, seed, shuffle)
    return (order.pick(position) for position in count(start))


def per_recording(weights: Sequence[float], chunks: Sequence[int], recordings: Sequence[int]) -> list[float]:
    """Weights of drawing whole recordings with which chunks come as often as `weights` say.

    Args:
        chunks, recordings: how many each source has.
    """
    return [w * r / c for w, c, r in zip(weights, chunks, recordings, strict=True)]
