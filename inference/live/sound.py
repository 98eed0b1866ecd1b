"""Sound on the wire: Opus in Ogg, as Moshi's clients speak it, or plain samples."""

from typing import Protocol

import numpy as np
import sphn

from inference.live.protocol import AUDIO, PCM, Malformed

SOUNDS = ("opus", "pcm")

# Ogg reads any split of a stream. A page is the least that is decoded at once: at most 255 packets.
_SLICE_BYTES = 512


class Sound(Protocol):
    """One conversation's sound in both directions."""

    kind: int
    """Of its messages."""

    def decode(self, payload: bytes, most: int) -> np.ndarray:
        """Samples `[n]` of a message, finite.

        Raises:
            Malformed: it is no such sound, or holds more than `most` samples.
        """
        ...

    def encode(self, samples: np.ndarray) -> bytes:
        """A frame's samples `[frame_size]` for a message."""
        ...


class OpusSound:
    """Opus in Ogg.

    Args:
        sample_rate: of the samples, Hz.
    """

    kind = AUDIO

    def __init__(self, sample_rate: int):
        self._sample_rate = sample_rate
        self._reader = sphn.OpusStreamReader(sample_rate)
        self._writer = sphn.OpusStreamWriter(sample_rate)

    def decode(self, payload: bytes, most: int) -> np.ndarray:
        parts, count = [np.zeros(0, np.float32)], 0
        for start in range(0, len(payload), _SLICE_BYTES):
            try:
                parts.append(self._reader.append_bytes(payload[start : start + _SLICE_BYTES]))
            except ValueError as error:
                self._start_anew()
                raise Malformed(f"no Opus in Ogg: {error}") from error
            count += parts[-1].shape[0]
            if count > most:
                self._start_anew()
                raise Malformed(f"more than {most} samples in one message")
        samples = np.concatenate(parts)
        if not np.isfinite(samples).all():
            raise Malformed("NaN or infinite samples")
        return samples

    def _start_anew(self) -> None:
        """A reader that failed, or stopped in a page, reads no other. A new one starts with the next page."""
        self._reader = sphn.OpusStreamReader(self._sample_rate)

    def encode(self, samples: np.ndarray) -> bytes:
        return self._writer.append_pcm(samples)


class PcmSound:
    """16-bit little-endian samples; 32768 is 1."""

    kind = PCM

    def decode(self, payload: bytes, most: int) -> np.ndarray:
        if len(payload) % 2:
            raise Malformed(f"{len(payload)} bytes are no 16-bit samples")
        if len(payload) // 2 > most:
            raise Malformed(f"more than {most} samples in one message")
        return np.frombuffer(payload, "<i2").astype(np.float32) / 32768

    def encode(self, samples: np.ndarray) -> bytes:
        return (samples * 32768).round().clip(-32768, 32767).astype("<i2").tobytes()


def sound_of(name: str, sample_rate: int) -> Sound:
    """Sound of one of `SOUNDS`."""
    return OpusSound(sample_rate) if name == "opus" else PcmSound()
