"""Samples of recordings: the one place where audio is read."""

import numpy as np
import sphn

from finetune.data.manifest import Recording


def read_samples(
    recording: Recording, rate: int, start_sec: float = 0.0, duration_sec: float | None = None
) -> np.ndarray:
    """Samples of a recording or of a crop of it, `[2, n]` float32: Moshi's channel and the user's.

    Args:
        rate: samples/s of the result; sphn resamples, as in moshi-finetune's loader.
        start_sec: where the crop starts.
        duration_sec: its length; None reads to the end of the recording.
    """
    path = str(recording.path)
    if duration_sec is None:
        assert start_sec == 0
        return sphn.read(path, sample_rate=rate)[0]
    return sphn.read(path, start_sec=start_sec, duration_sec=duration_sec, sample_rate=rate)[0]
