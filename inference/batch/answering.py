"""Many recordings through one model: rows of a batch out of step, so that none waits for a longer one."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from moshi.models.compression import MimiModel

from inference.batch.items import Item
from inference.codec import encode_recording, frames_of
from inference.rows import Rows
from moshi_ttt.finite_state import FiniteStateCheck


@dataclass
class Conversation:
    """A recording that is being answered.

    Args:
        item: which.
        user: its samples at Mimi's rate, `[n]`.
        codes: of them, and of the silence after which Moshi's last frame is complete, `[K, T]`.
        frames: of the recording, which are as many as Moshi's.
    """

    item: Item
    user: torch.Tensor
    codes: torch.Tensor
    frames: int
    started: float = field(default_factory=time.perf_counter)
    heard: int = 0
    tokens: list[torch.Tensor] = field(default_factory=list)

    def said(self) -> torch.Tensor:
        """Text and Moshi's codebooks so far, `[1 + dep_q, T]`."""
        return torch.cat(self.tokens, dim=-1)


class BrokenStateError(RuntimeError):
    """The inner state of an item's conversation became NaN or infinite."""


def conversation(item: Item, user: torch.Tensor, mimi: MimiModel, max_delay: int) -> Conversation:
    """Encode a recording. Mimi must not be streaming."""
    frames = frames_of(mimi, user)
    return Conversation(item, user, encode_recording(mimi, user, frames + max_delay - 1), frames)


def answer_all(
    rows: Rows,
    waiting: Iterator[Conversation],
    check: FiniteStateCheck | None = None,
    on_frame: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Conversation, BrokenStateError | None]]:
    """Conversations as they end, each what it would be alone; with the error of one that broke.

    Args:
        rows: free.
        waiting: recordings; one is taken whenever a row is free.
        check: among the watches of `rows`, with the action "tell"; breaks end only the row where they are.
        on_frame: called for each frame that Moshi has spoken.
    """
    device = rows.device
    codes: torch.Tensor | None = None
    active: dict[int, Conversation] = {}
    free = list(range(len(rows.heard)))[::-1]
    while True:
        while free and (following := next(waiting, None)) is not None:
            following.started = time.perf_counter()
            active[free[-1]] = following
            rows.start(free.pop(), following.item.seed)
        if not active:
            return
        if codes is None:
            count = next(iter(active.values())).codes.shape[0]
            codes = torch.zeros(len(rows.heard), count, 1, dtype=torch.long, device=device)
        for row, one in active.items():
            codes[row, :, 0] = one.codes[:, one.heard]
            one.heard += 1
        tokens, speaking = rows.hear(codes, list(active))
        for row in speaking:
            active[row].tokens.append(tokens[row])
            on_frame()
        done = [row for row, one in active.items() if one.heard == one.codes.shape[1]]
        if check is not None and done:
            check.finish()  # before anything is made of what they said
        broken = {} if check is None else {row: check.broken.pop(row) for row in list(check.broken)}
        for row in dict.fromkeys((*done, *(row for row in broken if row in active))):
            free.append(row)
            yield active.pop(row), BrokenStateError(broken[row]) if row in broken else None
