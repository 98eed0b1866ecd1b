"""Sound in MP4 and Matroska containers (m4a, mka, webm), which only ffmpeg's libraries open, through PyAV.

finetune/data/audio.py alone calls this, and turns what goes wrong into errors that name the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer

# Content decides, and ffmpeg would also take playlists, which name other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
# A frame of AAC or Opus sounds as in the whole stream when those in front of it were decoded: 80 ms for Opus.
_PREROLL_SEC = 0.2
# Times of packets are rounded, in Matroska to 1 ms. The shortest packet that may be lost has 2.5 ms.
_ROUNDING_SEC = 0.002


@dataclass(frozen=True)
class ContainerHeader:
    """What the container says of its first audio track."""

    channels: int
    rate: int
    duration_sec: float


def read_container_header(path: Path) -> ContainerHeader:
    """The header of a container; raises ValueError or what PyAV raises where it has none."""
    with _opened(path) as (container, stream):
        if stream.duration is not None and stream.time_base is not None:
            duration_sec = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            duration_sec = container.duration / av.time_base
        else:
            raise ValueError("its header does not say how long it is")
        return ContainerHeader(stream.channels, stream.rate, duration_sec)


def container_samples(path: Path, start_sec: float = 0.0) -> Iterator[np.ndarray]:
    """Samples `[C, n]` float32 at the file's rate from `start_sec` on, packet by packet.

    Raises:
        ValueError, av.FFmpegError: a packet cannot be decoded, or is missing.
    """
    with _opened(path) as (container, stream):
        rate, channels, origin = stream.rate, stream.channels, stream.start_time or 0
        assert stream.time_base is not None
        if start_sec > _PREROLL_SEC:
            container.seek(origin + int((start_sec - _PREROLL_SEC) / stream.time_base), stream=stream)
        as_floats = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        wanted, position = int(start_sec * rate), None
        for frame in container.decode(stream):
            if frame.sample_rate != rate or len(frame.layout.channels) != channels or frame.pts is None:
                raise ValueError("its rate or channels change, or its packets have no times")
            at = round((frame.pts - origin) * stream.time_base * rate)
            if position is None:
                position = at
                if position > wanted + _ROUNDING_SEC * rate:
                    raise ValueError(f"its first {position / rate:.3f} s are not there")
            if abs(at - position) > _ROUNDING_SEC * rate:
                raise ValueError(f"packets are missing between {position / rate:.3f} and {at / rate:.3f} s")
            samples = np.concatenate([part.to_ndarray() for part in as_floats.resample(frame)], axis=1)
            skipped = max(0, wanted - position)
            position += samples.shape[1]
            if skipped < samples.shape[1]:
                yield samples[:, skipped:]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, AudioStream]]:
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    with av.open(str(path), options=options) as container:
        if not container.streams.audio:
            raise ValueError("it has no audio track")
        stream = container.streams.audio[0]
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # damage is an error, not a guess
        yield container, stream
