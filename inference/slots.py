"""Conversations in sound, side by side on one model and one codec."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from inference.rows import Rows, Sampling, StepWatch, open_rows
from moshi_ttt.finite_state import restart_rows


@dataclass
class Frame:
    """One frame of Moshi's side of a conversation.

    Args:
        tokens: text and Moshi's codebooks, `[1, 1 + dep_q, 1]`.
        audio: samples `[frame_size]`, on the CPU.
    """

    tokens: torch.Tensor
    audio: torch.Tensor


class Slots:
    """Places for conversations: a row of the model and one of Mimi each. `open_slots` makes it.

    Args:
        rows (Rows): of the model.
        mimi (MimiModel): streaming, with as many rows, on the same device.
    """

    def __init__(self, rows: Rows, mimi: MimiModel):
        self.rows = rows
        self.mimi = mimi

    def __len__(self) -> int:
        return len(self.rows.heard)

    @torch.no_grad()
    def start(self, slot: int, seed: int) -> None:
        """A new conversation in a slot: nothing of what was there before is left.

        Raises:
            ValueError: the seed is negative or has more than 63 bits.
        """
        self.rows.start(slot, seed)
        restart_rows(self.mimi, self.rows.mask([slot]))

    @torch.no_grad()
    def hear(self, samples: Mapping[int, torch.Tensor]) -> dict[int, Frame]:
        """One frame of the user in some slots, and Moshi's next frame in those where one is complete.

        The other slots stand still.

        Args:
            samples: `[frame_size]` at Mimi's rate for each slot that hears, finite.
        """
        slots = sorted(samples)
        audio = torch.zeros(len(self), 1, self.mimi.frame_size)
        for slot in slots:
            audio[slot, 0] = samples[slot]
        self.mimi.set_exec_mask(self.rows.mask(slots))
        tokens, speaking = self.rows.hear(self.mimi.encode(audio.to(self.rows.device)), slots)
        if not speaking:
            return {}
        self.mimi.set_exec_mask(self.rows.mask(speaking))
        # Rows without a frame hold the mark of what is not generated, which is no code.
        spoken = self.mimi.decode(tokens[:, 1:].clamp(min=0))[:, 0].cpu()
        return {slot: Frame(tokens[slot : slot + 1], spoken[slot]) for slot in speaking}


@contextmanager
def open_slots(
    model: LMModel, mimi: MimiModel, sampling: Sampling, slots: int, watches: Sequence[StepWatch] = ()
) -> Iterator[Slots]:
    """Slots for conversations; each begins with `start`. Without gradients.

    Args:
        model: in evaluation mode, not streaming.
        mimi: the codec, not streaming, on the same device.
        sampling: how tokens are drawn; seeds are the conversations' own.
        slots: how many.
        watches: what looks on, to the end.
    """
    with mimi.streaming(slots), open_rows(model, sampling, slots, watches) as rows:
        yield Slots(rows, mimi)
