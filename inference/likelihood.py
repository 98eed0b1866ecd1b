"""The NLL of every code of recordings on Moshi's stream, teacher-forced, in chunks that carry their state."""

from collections.abc import Callable

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F

from moshi_ttt.carried import ChunkOutput, forward_chunk
from moshi_ttt.delays import frames_before, shift_codes
from moshi_ttt.integration import receptive_field
from moshi_ttt.memory_arms import mini_batch_frames, without_inner_memory


@torch.no_grad()
def nll_by_frame(
    model: LMModel,
    codes: torch.Tensor,
    chunk_frames: int,
    reset_every: int | None = None,
    on_frames: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """NLL in nats of the text and of Moshi's codebooks, by frame of the recording, not by step of the model.

    Equal to scoring frame by frame while streaming, whatever the chunk; rows do not see each other, so those
    of unequal length are filled up with -1 at their ends.

    Args:
        model: in evaluation mode, not streaming.
        codes: whole recordings, `[B, 17, T]`; -1 is no code.
        chunk_frames: frames of a forward pass, whole mini-batches. It bounds memory.
        reset_every: start again from the learned inner weights at every multiple of this, whole mini-batches.
        on_frames: told how many frames each forward pass has taken on.
    Returns:
        `[B, 1 + dep_q, T]` float32 on the CPU; NaN where there is no code.
    Raises:
        ValueError: `chunk_frames` or `reset_every` is no whole number of mini-batches.
    """
    size = mini_batch_frames(model)
    _refuse_broken_mini_batches("chunk_frames", chunk_frames, size)
    if reset_every is not None:
        _refuse_broken_mini_batches("reset_frames", reset_every, size)
    result = _ByFrame(model, codes)
    steps = -(-result.steps // size) * size
    padded = F.pad(codes, (0, steps - codes.shape[-1]), value=model.zero_token_id)
    carried = None
    first = 0
    while first < steps:
        stop = min(first + chunk_frames, steps)
        if reset_every is not None:
            stop = min(stop, (first // reset_every + 1) * reset_every)
            if carried is not None and first % reset_every == 0:
                carried = without_inner_memory(model, carried)
        output, carried = forward_chunk(model, padded[..., first:stop], carried)
        result.add(first, output)
        if on_frames is not None:
            on_frames(min(stop, codes.shape[-1]) - min(first, codes.shape[-1]))
        first = stop
    return result.whole()


@torch.no_grad()
def nll_streamed(model: LMModel, codes: torch.Tensor) -> torch.Tensor:
    """What `nll_by_frame` gives, by Moshi's own streaming, one frame a call: slow and obvious."""
    result = _ByFrame(model, codes)
    rows, _, length = codes.shape
    padded = F.pad(codes, (0, result.steps - length), value=model.zero_token_id)
    position = torch.zeros(rows, dtype=torch.long, device=codes.device)
    steps = shift_codes(model, padded, frames_before(model, rows), position)
    first, last = model.audio_offset, model.audio_offset + model.dep_q
    with model.streaming(rows):
        for step in range(result.steps):
            now = slice(step, step + 1)
            targets, scored = steps.targets[..., now], steps.scored[..., now]
            out, text_logits = model.forward_text(steps.inputs[..., now])
            logits = model.forward_depformer_training(targets, out)
            output = ChunkOutput(
                logits,
                scored[:, first:last],
                text_logits,
                scored[:, :first],
                targets=targets[:, first:last],
                text_targets=targets[:, :first],
            )
            result.add(step, output)
    return result.whole()


class _ByFrame:
    """Collects NLLs by frame of the recording from outputs by step of the model.

    Args:
        codes: whole recordings, `[B, 17, T]`.
    """

    def __init__(self, model: LMModel, codes: torch.Tensor):
        rows, _, length = codes.shape
        self.delays = model.delays[: 1 + model.dep_q]
        self.there = codes[:, : len(self.delays)].cpu() != model.zero_token_id
        self.nll = torch.full((rows, len(self.delays), length), torch.nan)
        # A code delayed by d is predicted d steps after its frame: steps behind the end, that read nothing.
        self.steps = length + max(self.delays)

    def add(self, first: int, output: ChunkOutput) -> None:
        """The outputs of consecutive steps from step `first`."""
        for stream, (delay, values) in enumerate(zip(self.delays, _chunk_nll(output), strict=True)):
            start = first - delay
            into = self.nll[:, stream, max(start, 0) : max(start + values.shape[1], 0)]
            assert into.isnan().all(), "a code was scored twice"
            into.copy_(values[:, max(-start, 0) :][:, : into.shape[1]])

    def whole(self) -> torch.Tensor:
        """All NLLs, when all steps were added."""
        assert torch.equal(~self.nll.isnan(), self.there), "a code was not scored, or its logits are NaN"
        return self.nll


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


def _refuse_broken_mini_batches(name: str, frames: int, size: int) -> None:
    """Raise ValueError unless a number of frames is one of whole mini-batches."""
    if frames < 1 or frames % size:
        proposed = " or ".join(str(n) for n in (frames // size * size, (frames // size + 1) * size) if n > 0)
        raise ValueError(
            f"{name}={frames} is no whole number of mini-batches of {size} frames; use {proposed} frames"
        )


def reset_frames(model: LMModel, wanted: int | None) -> int:
    """Frames after which an arm forgets: those wanted, or the receptive field in whole mini-batches.

    Raises:
        ValueError: `wanted` is no whole number of mini-batches.
    """
    size = mini_batch_frames(model)
    if wanted is None:
        return -(-max(receptive_field(model), 1) // size) * size
    _refuse_broken_mini_batches("reset_frames", wanted, size)
    return wanted


def default_chunk_frames(model: LMModel, wanted: int = 512) -> int:
    """About `wanted` frames, in whole mini-batches."""
    size = mini_batch_frames(model)
    return -(-wanted // size) * size
