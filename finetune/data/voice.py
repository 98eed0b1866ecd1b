"""Levels of audio in short frames, and which frames hold a voice: energy alone, no model.

A channel's frame is voiced when its level is above all of
* `silence_dbfs`,
* the channel's loud frames (95th percentile) less `range_db`: breaths and reverberation are quieter,
* the channel's quiet frames (10th percentile) plus `above_noise_db`: steady noise is no voice.
Pauses up to `fill_sec` between voiced frames are voice, then what is shorter than `shortest_sec` is none.
"""

import math
from dataclasses import dataclass

import numpy as np

FRAME_SEC = 0.02
_LOUD_PERCENTILE = 95
_QUIET_PERCENTILE = 10


@dataclass
class VoiceConfig:
    """When a frame of 20 ms holds a voice; finetune/data/voice.py has the definition."""

    silence_dbfs: float = -55.0
    """Quieter frames (RMS, dB of full scale) never do."""

    range_db: float = 35.0
    """Nor do frames quieter than the channel's loud ones by this."""

    above_noise_db: float = 6.0
    """A voice is louder than the channel's quiet frames by this."""

    fill_sec: float = 0.2
    """Pauses in a voice up to this length belong to it."""

    shortest_sec: float = 0.06
    """What is shorter is a click."""


def dbfs(power: np.ndarray | float) -> np.ndarray:
    """dB of full scale of a mean square; digital silence is -120."""
    return 10 * np.log10(np.maximum(power, 1e-12))


def frame_samples(rate: int) -> int:
    """Samples in a frame: 20 ms, rounded."""
    return max(1, round(rate * FRAME_SEC))


def frame_power(samples: np.ndarray, size: int) -> np.ndarray:
    """Mean square of each frame, `[C, n]` to `[frames, C]`; the last frame is filled with silence."""
    missing = -samples.shape[1] % size
    if missing:
        samples = np.pad(samples, ((0, 0), (0, missing)))
    blocks = samples.reshape(len(samples), -1, size)
    return np.einsum("cfs,cfs->fc", blocks, blocks) / size


def voiced(power: np.ndarray, config: VoiceConfig) -> np.ndarray:
    """Which frames of one channel, `[frames]`, hold a voice."""
    if len(power) == 0:
        return np.zeros(0, bool)
    level = dbfs(power)
    quiet, loud = np.percentile(level, (_QUIET_PERCENTILE, _LOUD_PERCENTILE))
    threshold = max(config.silence_dbfs, loud - config.range_db, quiet + config.above_noise_db)
    voice = level > threshold
    voice = ~_without_short(~voice, math.floor(config.fill_sec / FRAME_SEC), edges=False)
    return _without_short(voice, math.ceil(config.shortest_sec / FRAME_SEC) - 1, edges=True)


def runs(mask: np.ndarray) -> np.ndarray:
    """Stretches of true values, `[runs, 2]`: first index, and the index behind the last."""
    steps = np.diff(np.concatenate(([0], mask.astype(np.int8), [0])))
    return np.stack((np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)), axis=1)


def _without_short(mask: np.ndarray, longest: int, edges: bool) -> np.ndarray:
    """The mask without stretches of at most `longest`; those at its ends stay unless `edges`."""
    kept = mask.copy()
    for start, end in runs(mask):
        if end - start <= longest and (edges or (start > 0 and end < len(mask))):
            kept[start:end] = False
    return kept
