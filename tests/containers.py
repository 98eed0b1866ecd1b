"""Sound files that soundfile does not write, made with PyAV as phones and browsers make them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_container(path: Path, samples: np.ndarray, codec: str = "aac", rate: int = 24000) -> None:
    """Write samples `[n, C]` in the container that the ending names."""
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        whole = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples.T, np.float32), format="fltp", layout=layout
        )
        whole.sample_rate, whole.pts, whole.time_base = rate, 0, Fraction(1, rate)
        fitting = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for frame in [*fitting.resample(whole), None]:
            container.mux(stream.encode(frame))
