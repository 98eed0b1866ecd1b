"""Audio to Mimi's codes, `[16, T]` in 16 bits: Moshi's 8 codebooks, then the user's.

Whoever encodes, training from audio or the command that prepares shards, encodes here, several recordings at
once where that is faster. Kernels are chosen by the shape of their input and round accordingly, so batches
always have the same number of rows: the codes of a recording do not depend on what is encoded beside it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from moshi.models.compression import MimiModel

from moshi_ttt.streaming import encoding

# Audio given to the codec at once, 10 s. Not the length of a chunk: codes must not depend on it.
BLOCK_FRAMES = 125
# Recordings in a batch. A CPU core is no faster with more than one.
RECORDINGS_AT_ONCE = {"cpu": 1, "cuda": 16}
# Samples `[2, n]` of a batch held in memory: 2 hours, 1.4 GB. A longer recording goes alone.
BATCH_SAMPLES = 2 * 3600 * 24000


def recordings_at_once(device: torch.device) -> int:
    """How many recordings are encoded together on a device."""
    return RECORDINGS_AT_ONCE[device.type]


def batches_of(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Indices of recordings that are encoded together: of like length, and no more than fit into memory.

    Args:
        lengths: samples of each.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = batches and len(batches[-1]) < recordings_at_once(device)
        if fits and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= BATCH_SAMPLES:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.no_grad()
def encode_whole(mimi: MimiModel, audio: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Codes `[16, T]` of whole recordings as a stream has them, in blocks of 10 s.

    Args:
        audio: samples `[2, n]` of at most `recordings_at_once` recordings.
    """
    device, rows = next(mimi.parameters()).device, _rows(mimi)
    assert 2 * len(audio) <= rows
    frames = [math.ceil(samples.shape[1] / mimi.frame_size) for samples in audio]
    block = BLOCK_FRAMES * mimi.frame_size
    parts = []
    with encoding(mimi, rows, BLOCK_FRAMES):
        for start in range(0, max(frames) * mimi.frame_size, block):
            samples = _stacked([one[:, start : start + block] for one in audio], rows, block)
            parts.append(mimi.encode(samples.to(device)).cpu())
    codes = torch.cat(parts, dim=-1).unflatten(0, (-1, 2))
    return [_streams(codes[index], count) for index, count in enumerate(frames)]


@torch.no_grad()
def encode_crop(mimi: MimiModel, samples: np.ndarray) -> torch.Tensor:
    """Codes `[16, T]` of a crop by itself, as moshi-finetune encodes it; samples are `[2, n]`."""
    device = next(mimi.parameters()).device
    codes = mimi.encode(torch.from_numpy(samples).to(device)[:, None])
    return _streams(codes, codes.shape[-1])


def _rows(mimi: MimiModel) -> int:
    return 2 * recordings_at_once(next(mimi.parameters()).device)


def _stacked(parts: Sequence[np.ndarray], rows: int, length: int) -> torch.Tensor:
    """Parts of recordings `[2, n]` as rows `[rows, 1, length]`, with silence where there is nothing."""
    stacked = torch.zeros(rows, 1, length)
    for index, part in enumerate(parts):
        stacked[2 * index : 2 * index + 2, 0, : part.shape[1]] = torch.from_numpy(part)
    return stacked


def _streams(codes: torch.Tensor, frames: int) -> torch.Tensor:
    """`[2, 8, T]` to `[16, frames]` in 16 bits: vocabularies have at most 32,000 entries."""
    return codes[..., :frames].flatten(0, 1).to("cpu", torch.int16)
