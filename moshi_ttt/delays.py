"""Moshi's delays and shifts: which code each step of the model reads, and which it predicts.

Codebook k is delayed by d_k frames. Step s of a recording reads frame s - 1 - d_k of codebook k and predicts
frame s - d_k; frames before the first read as the model's initial tokens and are no targets. A step therefore
looks back at most max(d) + 1 frames, which is what one chunk of a recording leaves to the next.
"""

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F


@dataclass(frozen=True)
class Steps:
    """Codes of T consecutive steps, `[B, 17, T]` each.

    Args:
        inputs: what each step reads.
        targets: what it predicts, and what the depformer reads while it does; initial tokens before frame 0.
        scored: where `targets` is a frame of the recording and holds a code.
        earlier: the last max(d) + 1 frames, `[B, 17, max(d) + 1]`, to continue from.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    scored: torch.Tensor
    earlier: torch.Tensor


def frames_before(model: LMModel, batch_size: int) -> torch.Tensor:
    """The max(d) + 1 frames before the start of a recording: initial tokens, `[B, 17, max(d) + 1]`."""
    return model._get_initial_token().repeat(batch_size, 1, max(model.delays) + 1)


def shift_codes(model: LMModel, codes: torch.Tensor, earlier: torch.Tensor, position: torch.Tensor) -> Steps:
    """Steps of the next T frames of each row's recording. Chunk after chunk, every target is scored once.

    Args:
        model: for its delays and special tokens.
        codes: frames `[B, 17, T]`; -1 is no code.
        earlier: the frames before them, `[B, 17, max(d) + 1]`.
        position: index of the first frame in its recording, `[B]`.
    """
    longest, length = max(model.delays), codes.shape[-1]
    window = torch.cat((earlier, codes), dim=-1)  # starts longest + 1 frames before `codes`

    def delayed(shift: int) -> torch.Tensor:
        starts = (longest + shift - delay for delay in model.delays)
        return torch.stack([window[:, k, start : start + length] for k, start in enumerate(starts)], dim=1)

    targets = delayed(1)
    delays = torch.tensor(model.delays, device=codes.device)[:, None]
    frames = position[:, None, None] + torch.arange(length, device=codes.device) - delays
    scored = (frames >= 0) & (targets != model.zero_token_id)
    return Steps(delayed(0), targets, scored, window[..., length:].clone())


def clip_steps(model: LMModel, codes: torch.Tensor) -> Steps:
    """Steps of whole clips `[B, 17, T]`, each a recording of its own."""
    batch_size = codes.shape[0]
    position = torch.zeros(batch_size, device=codes.device, dtype=torch.long)
    return shift_codes(model, codes, frames_before(model, batch_size).to(codes.device), position)


def scored_in_clip(model: LMModel, codes: torch.Tensor) -> torch.Tensor:
    """Which codes of whole clips `[B, 17, T]` are targets, in the order of the codes (as Moshi's logits).

    A codebook delayed by d has no target in the last d frames: they would need steps beyond the clip.
    """
    scored = clip_steps(model, codes).scored
    length = codes.shape[-1]
    aligned = [F.pad(scored[:, k, d:], (0, min(d, length))) for k, d in enumerate(model.delays)]
    return torch.stack(aligned, dim=1)
