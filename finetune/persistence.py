"""Rows that carry their state through a recording: what it must fit, and whose turn it is to be kept."""

import logging
import math
import os
from collections.abc import Iterator, Sequence

import torch
from moshi.models.lm import LMModel

from finetune.data.clips import Clip
from finetune.distributed import Process
from finetune.pieces import Piece
from moshi_ttt.carried import CarriedState, carried_bytes, fresh_state
from moshi_ttt.integration import FRAME_RATE, live_contexts

logger = logging.getLogger(__name__)

GIB = 1 << 30


def refuse_broken_mini_batches(duration_sec: float, mini_batch_size: int) -> None:
    """Raise ValueError unless chunks of this length are a whole number of mini-batches.

    Rows start their recordings at different steps; with whole mini-batches all are at a mini-batch's start at
    the start of a chunk.
    """
    frames = duration_sec * FRAME_RATE
    below = math.floor(frames / mini_batch_size + 1e-6) * mini_batch_size
    if below > 0 and abs(frames - below) < 1e-6:
        return
    proposed = [n / FRAME_RATE for n in (below, below + mini_batch_size) if n > 0]
    raise ValueError(
        f"duration_sec={duration_sec:g} is {frames:g} frames; with ttt.persistent_states=true a chunk must "
        f"be a whole number of mini-batches of {mini_batch_size} frames: use duration_sec="
        + " or ".join(f"{seconds:g}" for seconds in proposed)
    )


def available_bytes(device: torch.device) -> int:
    """Free memory where the state will lie."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_oversized(model: LMModel, batch_size: int, num_microbatches: int, limit: int) -> None:
    """Raise ValueError if what the rows of this process carry takes more than `limit` bytes.

    Beside the state of every micro-batch there are at most two more: one that is being made, and the one of
    an evaluation.
    """
    rows = batch_size * (num_microbatches + 2)
    sizes = carried_bytes(model, rows)
    needed = sum(sizes.values())
    contexts = sorted({context for kind in live_contexts(model).values() for context in kind})
    what = (
        f"attention keys and values {sizes['attention'] / GIB:.3g} GiB (contexts of "
        f"{', '.join(map(str, contexts))} frames), inner weights {sizes['inner'] / GIB:.3g} GiB"
    )
    if needed > limit:
        raise ValueError(
            f"ttt.persistent_states=true would carry {needed / GIB:.3g} GiB for {rows} rows, but "
            f"{limit / GIB:.3g} GiB are available: {what}. Shorten ttt.ttt_layer_context and "
            "ttt.non_ttt_layer_context, or lower batch_size or num_microbatches; max_carried_gib sets the "
            "limit"
        )
    logger.info("carried state: at most %.3g GiB; %s", needed / GIB, what)


class CarriedRows:
    """The carried state of each micro-batch of a step: micro-batch i of every step has the same rows.

    Args:
        model: the model in training.
        batch_size: rows of a micro-batch.
        num_microbatches: micro-batches of a step.
    """

    def __init__(self, model: LMModel, batch_size: int, num_microbatches: int):
        self.model = model
        self.states = [fresh_state(model, batch_size) for _ in range(num_microbatches)]

    def before(self, slot: int, clips: Sequence[Clip]) -> CarriedState:
        """The state that the next chunks of micro-batch `slot` start from; new recordings start afresh."""
        state = self.states[slot]
        starts = [clip.is_first for clip in clips]
        assert len(starts) == state.position.shape[0], "a chunk for each row"
        if not any(starts):
            return state
        return state.restarted(self.model, torch.tensor(starts, device=state.position.device))

    def pieces(self, process: Process) -> Iterator[Piece]:
        """All tensors as this process's rows of those of all: row r of micro-batch s on process k is row
        (s * processes + k) * batch_size + r. So another number of processes finds its own."""
        for slot, state in enumerate(self.states):
            first = slot * process.world_size + process.rank
            for index, tensor in enumerate(state.tensors()):
                # A row of codes is one of `[B, ...]`, one of inner weights is H of `[B * H, ...]`.
                length = tensor.shape[0] * len(self.states) * process.world_size
                offset = (first * tensor.shape[0], *[0] * (tensor.dim() - 1))
                yield Piece(f"carried/{index:03d}", (length, *tensor.shape[1:]), offset, tensor)

    def keep(self, slot: int, state: CarriedState) -> None:
        """Go on from `state` in the next step. To be called when the backward pass is done."""
        self.states[slot] = state
