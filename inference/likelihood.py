"""The NLL of every code of recordings on Moshi's stream, teacher-forced, in chunks that carry their state."""

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F

from moshi_ttt.carried import ChunkOutput, forward_chunk
from moshi_ttt.memory_arms import mini_batch_frames, without_inner_memory


@torch.no_grad()
def nll_by_frame(model: LMModel, codes: torch.Tensor, chunk_frames: int, reset: bool = False) -> torch.Tensor:
    """NLL in nats of the text and of Moshi's codebooks, by frame of the recording, not by step of the model.

    Equal to scoring frame by frame while streaming, whatever the chunk; rows do not see each other, so those
    of unequal length are filled up with -1 at their ends.

    Args:
        model: in evaluation mode, not streaming.
        codes: whole recordings, `[B, 17, T]`; -1 is no code.
        chunk_frames: frames of a forward pass, whole mini-batches. It bounds memory.
        reset: start each chunk from the learned inner weights.
    Returns:
        `[B, 1 + dep_q, T]` float32 on the CPU; NaN where there is no code.
    Raises:
        ValueError: `chunk_frames` is no whole number of mini-batches.
    """
    rows, _, length = codes.shape
    delays = model.delays[: 1 + model.dep_q]
    # A code delayed by d is predicted d steps after its frame: steps behind the end, that read nothing.
    steps = -(-(length + max(delays)) // chunk_frames) * chunk_frames
    padded = F.pad(codes, (0, steps - length), value=model.zero_token_id)
    nll = torch.full((rows, len(delays), length), torch.nan)
    carried = None
    for first in range(0, steps, chunk_frames):
        if reset and carried is not None:
            carried = without_inner_memory(model, carried)
        output, carried = forward_chunk(model, padded[..., first : first + chunk_frames], carried)
        for stream, (delay, values) in enumerate(zip(delays, _chunk_nll(output), strict=True)):
            start = first - delay
            into = nll[:, stream, max(start, 0) : start + chunk_frames]
            assert into.isnan().all(), "a code was scored twice"
            into.copy_(values[:, max(-start, 0) :][:, : into.shape[1]])
    there = codes[:, : len(delays)].cpu() != model.zero_token_id
    assert torch.equal(~nll.isnan(), there), "a code was not scored, or its logits are NaN"
    return nll


def _chunk_nll(output: ChunkOutput) -> list[torch.Tensor]:
    """For text and each of Moshi's codebooks the NLL of each step `[B, T]`, on the CPU; NaN: no target."""
    parts = (
        (output.text_logits, output.text_targets, output.text_mask),
        (output.logits, output.targets, output.mask),
    )
    found = []
    for logits, targets, mask in parts:
        for k in range(targets.shape[1]):
            wanted = torch.where(mask[:, k], targets[:, k], 0)
            nll = F.cross_entropy(logits[:, k].transpose(1, 2).float(), wanted, reduction="none")
            found.append(nll.masked_fill(~mask[:, k], torch.nan).cpu())
    return found


def default_chunk_frames(model: LMModel, wanted: int = 512) -> int:
    """About `wanted` frames, in whole mini-batches."""
    size = mini_batch_frames(model)
    return -(-wanted // size) * size
