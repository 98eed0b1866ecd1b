"""One pass over the samples of a file, block by block: levels, clipping, likeness of the channels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.data.audio import BrokenAudioError, read_blocks, read_header
from finetune.data.voice import frame_power, frame_samples, runs

# Of 20 ms: memory does not grow with the recording but by its levels, a few bytes a frame.
BLOCK_FRAMES = 500
FULL_SCALE = 0.999
CLIPPED_RUN = 3  # samples in a row at full scale: a peak that just reaches it has one


@dataclass
class Levels:
    """What one pass over the samples gives.

    Args:
        power: mean square of each frame, `[frames, C]`.
        clipped: frames with samples at full scale in a row, `[frames, C]`.
        peak: of each channel.
        products: sums of products of channels, `[C, C]`.
        frame_sec: length of a frame.
        duration_sec: of what could be read.
        promised_sec: what the header says.
        bad_sec: where NaN or infinite samples begin.
        error: why reading stopped.
    """

    power: np.ndarray
    clipped: np.ndarray
    peak: np.ndarray
    products: np.ndarray
    frame_sec: float
    duration_sec: float
    promised_sec: float
    bad_sec: float | None
    error: str | None


def measure(path: Path) -> Levels:
    """Read a file once, block by block.

    Raises:
        ValueError: it cannot be opened as audio.
    """
    header = read_header(path)
    channels, rate = header.channels, header.rate
    size = frame_samples(rate)
    power, clipped = [np.zeros((0, channels))], [np.zeros((0, channels), bool)]
    peak, products = np.zeros(channels), np.zeros((channels, channels))
    read, bad_sec, error = 0, None, None
    try:
        for sound in read_blocks(path, header, size * BLOCK_FRAMES):
            block_peak = np.maximum(sound.max(axis=1), -sound.min(axis=1))
            peak = np.maximum(peak, block_peak)
            with np.errstate(invalid="ignore", over="ignore"):  # NaN is looked for below
                power.append(frame_power(sound, size))
                products += sound @ sound.T
            clipped.append(clipped_frames(sound, block_peak, size))
            if bad_sec is None and not np.isfinite(products).all():
                bad = np.flatnonzero(~np.isfinite(sound).all(axis=0))
                bad_sec = None if len(bad) == 0 else (read + int(bad[0])) / rate
            read += sound.shape[1]
    except BrokenAudioError as failure:
        error, read = failure.reason, round(failure.second * rate)
    return Levels(
        np.concatenate(power).astype(np.float32),
        np.concatenate(clipped),
        peak,
        products,
        size / rate,
        read / rate,
        header.promised_sec,
        bad_sec,
        error,
    )


def clipped_frames(sound: np.ndarray, peak: np.ndarray, size: int) -> np.ndarray:
    """Frames of a block, `[C, n]` to `[frames, C]`, with a few samples in a row at full scale."""
    frames = -(-sound.shape[1] // size)
    found = np.zeros((frames, len(sound)), bool)
    for channel in np.flatnonzero(peak >= FULL_SCALE):
        full = runs(np.abs(sound[channel]) >= FULL_SCALE)
        found[full[full[:, 1] - full[:, 0] >= CLIPPED_RUN, 0] // size, channel] = True
    return found
