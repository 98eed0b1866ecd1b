"""Whose turn it is: orders of clips and of recordings, the same for every number of processes.

Orders take no memory that grows with the data, and their positions are plain numbers to save and go on from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.data.clips import Clip

_ROUNDS = 6
_MASK = (1 << 64) - 1


def _mixed(value: int) -> int:
    """A 64-bit integer whose every bit depends on every bit of `value` (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A shuffled order of 0 ... size - 1 that is computed where it is asked for, not stored.

    A Feistel network permutes the numbers of an even number of bits; what falls outside is sent through it
    again until it lies inside.

    Args:
        size: how many.
        seed, epoch: which order.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        key = _mixed(_mixed(seed & _MASK) ^ epoch)
        self.keys = [_mixed(key + index) for index in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """What comes at a position."""
        assert 0 <= position < self.size
        mask = (1 << self.half_bits) - 1
        value = position
        while True:
            left, right = value >> self.half_bits, value & mask
            for key in self.keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
            value = left << self.half_bits | right
            if value < self.size:
                return value


class Order(Protocol):
    """Indices at any position of an order without end, drawn from sources by weight."""

    @property
    def weights(self) -> tuple[float, ...]: ...

    def __getitem__(self, position: int) -> int: ...


class EndlessOrder:
    """Indices at any position of an order without end, in which each epoch has every index once.

    Args:
        size: number of indices.
        seed: of the orders of all epochs.
        shuffle: False is 0, 1, 2, ... in every epoch.
    """

    def __init__(self, size: int, seed: int, shuffle: bool):
        assert size > 0
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.weights = (1.0,)
        self._epoch = -1

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if not self.shuffle:
            return offset
        if epoch != self._epoch:
            self._epoch, self._order = epoch, Permutation(self.size, self.seed, epoch)
        return self._order[offset]


def clip_order(num_clips: int, seed: int, shuffle: bool, start: int = 0) -> Iterator[int]:
    """Indices of clips without end: each epoch has every clip once, in an order drawn from seed and epoch.

    Args:
        start: how many indices have been drawn before.
    """
    order = EndlessOrder(num_clips, seed, shuffle)
    position = start
    while True:
        yield order[position]
        position += 1


class Draw(Protocol):
    """The clips of this process's batches, one after the other, from a position that can be saved."""

    def draw(self) -> list[Clip]:
        """Clips of the next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the order is, in plain numbers, the same in every process."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, with whatever number of processes."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Which clips of a global order this process draws.

    Args:
        batch_size: clips of a batch, or rows of a micro-batch, of one process.
        seed, shuffle: the order.
        rank, world: this process.
        mix: the order where there are several sources; None draws from all alike.
    """

    batch_size: int
    seed: int
    shuffle: bool = True
    rank: int = 0
    world: int = 1
    mix: Order | None = None

    def order(self, size: int) -> Order:
        """The order of so many indices."""
        return EndlessOrder(size, self.seed, self.shuffle) if self.mix is None else self.mix

    def identity(self, kind: str, data: str, **sizes: int) -> dict[str, Any]:
        """What a saved position must agree with, beside where it is."""
        weights = list(self.order(1).weights)
        return {
            "kind": kind,
            "data": data,
            **sizes,
            "weights": weights,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def _require_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError if a saved position is that of another order."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise ValueError(
                f"the saved position in the data is of {name}={state.get(name)!r}, this run has {value!r}; "
                "resume with the data and settings that the position was saved with"
            )


class ClipDraw:
    """Clips that stand alone. Process r of w gets positions r, r + w, ... of one global order.

    Args:
        clips: all of them.
        sampling: which this process draws.
        data: what the clips are, by which a saved position is known to be of these.
    """

    def __init__(self, clips: Sequence[Clip], sampling: Sampling, data: str = ""):
        if not len(clips):
            raise ValueError("there are no clips to train on")
        self.clips, self.sampling, self.order = clips, sampling, sampling.order(len(clips))
        self.identity = sampling.identity("clips", data, clips=len(clips))
        self.position = 0

    def draw(self) -> list[Clip]:
        first = self.position + self.sampling.rank
        self.position += self.sampling.batch_size * self.sampling.world
        return [self.clips[self.order[p]] for p in range(first, self.position, self.sampling.world)]

    def state_dict(self) -> dict[str, Any]:
        return {**self.identity, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _require_same(state, self.identity)
        self.position = int(state["position"])


class RowDraw:
    """Chunks of recordings: each row goes through one from first to last, then takes the next of one order.

    Every process works out the rows of all of them, so none has to tell another where it is, and draws its
    own: micro-batch i of every step continues the rows of the i-th of the step before.

    Args:
        recordings: the chunks of each recording.
        num_microbatches: micro-batches of a step.
        sampling: which rows are this process's, and the order of recordings.
        data: what the recordings are, by which a saved position is known to be of these.
    """

    def __init__(
        self,
        recordings: Sequence[Sequence[Clip]],
        num_microbatches: int,
        sampling: Sampling,
        data: str = "",
    ):
        if not len(recordings):
            raise ValueError("there are no recordings to train on")
        self.recordings, self.num_microbatches, self.sampling = recordings, num_microbatches, sampling
        self.order = sampling.order(len(recordings))
        self.slot_rows = sampling.world * sampling.batch_size  # of one micro-batch on all processes
        num_rows = num_microbatches * self.slot_rows
        self.identity = sampling.identity("rows", data, recordings=len(recordings), rows=num_rows)
        self.rows = [(row, 0) for row in range(num_rows)]  # position of its recording in the order, chunk
        self.following = num_rows
        self.slot = 0

    def draw(self) -> list[Clip]:
        size = self.sampling.batch_size
        first = self.slot * self.slot_rows + self.sampling.rank * size
        clips = [self._chunk(row) for row in range(first, first + size)]
        self.slot += 1
        if self.slot == self.num_microbatches:
            self.advance()
        return clips

    def advance(self) -> None:
        """Move every row to its next chunk."""
        self.slot = 0
        for row, (position, chunk) in enumerate(self.rows):
            if chunk + 1 < len(self.recordings[self.order[position]]):
                self.rows[row] = (position, chunk + 1)
            else:
                self.rows[row] = (self.following, 0)
                self.following += 1

    def _chunk(self, row: int) -> Clip:
        position, chunk = self.rows[row]
        return self.recordings[self.order[position]][chunk]

    def state_dict(self) -> dict[str, Any]:
        rows = [list(row) for row in self.rows]
        drawn = self.slot * self.slot_rows
        return {**self.identity, "at": rows, "following": self.following, "drawn": drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: it is of other data or settings, or within a micro-batch of this run.
        """
        _require_same(state, self.identity)
        self.slot, rest = divmod(int(state["drawn"]), self.slot_rows)
        if rest:
            raise ValueError(
                f"the saved position is {state['drawn']} rows into a step, which is within a micro-batch of "
                f"this run ({self.slot_rows} rows on all processes); save between steps, or "
                "resume with the same batch_size"
            )
        self.rows = [(int(position), int(chunk)) for position, chunk in state["at"]]
        self.following = int(state["following"])


def chunk_order(
    recordings: Sequence[Sequence[Clip]], num_rows: int, seed: int, shuffle: bool
) -> Iterator[list[Clip]]:
    """The chunks of all rows, step by step without end."""
    rows = RowDraw(recordings, 1, Sampling(num_rows, seed, shuffle))
    while True:
        yield rows.draw()
