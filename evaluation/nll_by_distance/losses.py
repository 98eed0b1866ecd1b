"""The NLL of every code of a recording, its state carried from the first frame to the last."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F

from moshi_ttt.carried import CarriedLayer, CarriedState, forward_chunk
from moshi_ttt.integration import ttt_layers
from moshi_ttt.ttt_layer import TTTBase


def _inner_learners(model: LMModel) -> dict[int, TTTBase]:
    return {index: layer.seq_modeling_block.ttt_layer.ttt for index, layer in ttt_layers(model)}


@contextmanager
def frozen_inner_weights(model: LMModel) -> Iterator[None]:
    """Inner learning rate 0: the TTT layers answer with their learned weights, always."""
    learners = _inner_learners(model).values()
    rates = [ttt.base_lr for ttt in learners]
    for ttt in learners:
        ttt.base_lr = 0.0
    try:
        yield
    finally:
        for ttt, rate in zip(learners, rates, strict=True):
            ttt.base_lr = rate


def without_inner_memory(model: LMModel, carried: CarriedState) -> CarriedState:
    """The state with the learned inner weights; attention's keys and values, codes and positions stay."""
    rows = carried.position.shape[0]
    learners = _inner_learners(model)

    def reset(index: int, layer: CarriedLayer) -> CarriedLayer:
        if index not in learners:
            return layer
        return replace(layer, inner=learners[index].initial_weights(rows).detach())

    return replace(carried, layers=tuple(reset(i, layer) for i, layer in enumerate(carried.layers)))


@torch.no_grad()
def score_recording(
    model: LMModel, codes: torch.Tensor, chunk_frames: int, reset: bool = False
) -> torch.Tensor:
    """NLL in nats of the text and of Moshi's codebooks, by frame of the recording.

    Args:
        model: in evaluation mode, not streaming.
        codes: a whole recording, `[17, T]`; -1 is no code.
        chunk_frames: frames of a forward pass, whole mini-batches.
        reset: start each chunk from the learned inner weights.
    Returns:
        `[1 + dep_q, T]` float32 on the CPU; NaN where there is no code.
    """
    length, scored = codes.shape[-1], 1 + model.dep_q
    delays = model.delays[:scored]
    # A code delayed by d is predicted d steps after its frame: steps behind the end, that read nothing.
    steps = -(-(length + max(delays)) // chunk_frames) * chunk_frames
    padded = F.pad(codes, (0, steps - length), value=model.zero_token_id)[None]
    nll = torch.full((scored, length), torch.nan)
    carried = None
    for first in range(0, steps, chunk_frames):
        if reset and carried is not None:
            carried = without_inner_memory(model, carried)
        output, carried = forward_chunk(model, padded[..., first : first + chunk_frames], carried)
        parts = (
            (output.text_logits[0], output.text_targets[0], output.text_mask[0]),
            (output.logits[0], output.targets[0], output.mask[0]),
        )
        streams = [stream for part in parts for stream in zip(*part, strict=True)]
        for row, delay, (logits, targets, mask) in zip(nll, delays, streams, strict=True):
            frames = (first + mask.nonzero()[:, 0] - delay).cpu()
            assert row[frames].isnan().all(), "a code was scored twice"
            row[frames] = F.cross_entropy(logits[mask].float(), targets[mask], reduction="none").cpu()
    there = codes[:scored].cpu() != model.zero_token_id
    assert torch.equal(~nll.isnan(), there), "a code was not scored, or its logits are NaN"
    return nll
