"""Several sequences as one."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar, overload

Item = TypeVar("Item", covariant=True)


class Joined(Sequence[Item]):
    """The items of several sequences, one sequence after the other, asked of them when they are needed."""

    def __init__(self, parts: Sequence[Sequence[Item]]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        part = bisect_right(self.ends, position)
        return self.parts[part][position - (self.ends[part - 1] if part else 0)]
