"""Whole recordings through Mimi, in blocks, as a stream has them: one at a time, so nothing else decides."""

import torch
from moshi.models.compression import MimiModel

from moshi_ttt.streaming import decoding, encoding

# Frames given to the codec at once, 10 s; the codes are those of a stream, whatever the block.
BLOCK_FRAMES = 125


@torch.no_grad()
def encode_recording(mimi: MimiModel, samples: torch.Tensor, frames: int) -> torch.Tensor:
    """Codes `[K, frames]` of samples `[n]`; silence follows where they end earlier. On Mimi's device."""
    device, size = next(mimi.parameters()).device, mimi.frame_size
    padded = torch.zeros(-(-frames // BLOCK_FRAMES) * BLOCK_FRAMES * size)
    count = min(samples.shape[0], frames * size)
    padded[:count] = samples[:count]
    with encoding(mimi, 1, BLOCK_FRAMES):
        blocks = padded.split(BLOCK_FRAMES * size)
        parts = [mimi.encode(block.to(device)[None, None])[0] for block in blocks]
    return torch.cat(parts, dim=-1)[:, :frames]


@torch.no_grad()
def decode_codes(mimi: MimiModel, codes: torch.Tensor) -> torch.Tensor:
    """Samples `[T * frame_size]` on the CPU of codes `[K, T]`."""
    with decoding(mimi, 1, BLOCK_FRAMES):
        parts = [mimi.decode(block[None])[0, 0].cpu() for block in codes.split(BLOCK_FRAMES, dim=-1)]
    return torch.cat(parts)


def frames_of(mimi: MimiModel, samples: torch.Tensor) -> int:
    """Frames that hold samples `[n]`; the last may be filled up with silence."""
    return -(-samples.shape[0] // mimi.frame_size)
