"""Samples of recordings: the one place where audio files are opened.

sphn reads and resamples, as in moshi-finetune's loader, so that codes are the same; what it cannot read,
libsndfile does. Both are native code that meets files of any kind here: whatever goes wrong in a file is a
ValueError that names it.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile
import sphn

from finetune.data.recording import Recording, UserChannel

DURATION_TOLERANCE_SEC = 0.1
# A header that says more is broken; resampling from it would take memory without bound.
MAX_SAMPLE_RATE = 768_000
MAX_CHANNELS = 64
# What sphn decodes and seeks in as it should. It cannot read Opus, and loses its place in ADPCM.
_SPHN_FORMATS = {
    "WAV": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    "WAVEX": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"),
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
    "MP3": ("MPEG_LAYER_III",),
    "OGG": ("VORBIS",),
    "AIFF": ("PCM_S8", "PCM_16", "PCM_24", "PCM_32"),
    "CAF": ("PCM_16", "PCM_24", "PCM_32"),
}
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")


@dataclass(frozen=True)
class AudioHeader:
    """What the header of a file says.

    Args:
        channels, rate, duration_sec: as the decoder that will read the file sees them.
        subtype: libsndfile's name of the encoding; None for containers that only sphn knows.
        by_sphn: whether sphn reads the samples, or libsndfile.
    """

    channels: int
    rate: int
    duration_sec: float
    subtype: str | None
    by_sphn: bool


class _NativeErrors:
    """Turns what the decoders raise about a file into a ValueError that names it.

    A panic of sphn's Rust code is no Exception and has no name to catch it by.
    """

    def __init__(self, path: Path, what: str):
        self.message = f"{path} {what}"

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            return
        known = (ValueError, TypeError, ArithmeticError, OSError, MemoryError, soundfile.SoundFileError)
        if issubclass(kind, known) or kind.__name__ == "PanicException":
            raise ValueError(
                f"{self.message} ({error}); repair it, convert it to wav, or remove it"
            ) from error


def read_header(path: Path) -> AudioHeader:
    """The header of an audio file; its ending says nothing.

    Raises:
        ValueError: it is no audio, or cannot be opened.
    """
    subtype = None
    duration_sec = None
    try:
        with _NativeErrors(path, "is no audio file that can be read"):
            info = soundfile.info(str(path))
    except ValueError:
        # Containers such as m4a are sphn's alone. What neither can open is told with sphn's reason.
        by_sphn = True
    else:
        if info.frames == 0:
            raise ValueError(f"{path} holds no audio")
        subtype = info.subtype
        by_sphn = subtype in _SPHN_FORMATS.get(info.format, ())
        header = AudioHeader(info.channels, info.samplerate, info.duration, subtype, False)
        if info.format == "OGG":  # sphn counts what encoders put behind the end
            duration_sec = info.duration
    if by_sphn:
        with _NativeErrors(path, "is no audio file that can be read"):
            reader = sphn.FileReader(str(path))
            duration_sec = duration_sec or reader.duration_sec
            header = AudioHeader(reader.channels, reader.sample_rate, duration_sec, subtype, True)
    if not 0 < header.rate <= MAX_SAMPLE_RATE or not 0 < header.channels <= MAX_CHANNELS:
        raise ValueError(
            f"{path} says that it has {header.channels} channels of {header.rate} samples/s, which cannot be "
            "so; repair or remove it"
        )
    return header


def check_audio(path: Path, num_channels: int) -> float:
    """Duration in seconds of a file that can be trained on. Reads its header and its last second.

    Raises:
        ValueError: says what is wrong with the file.
    """
    header = read_header(path)
    require_channels(path, header.channels, num_channels)
    if not header.duration_sec > 0:
        raise ValueError(f"{path} holds no audio")
    start = max(0.0, header.duration_sec - 1.0)
    samples, _ = _decode(path, header, start, 1.0)
    _require_whole(path, header, start, header.duration_sec - start, samples)
    finite = bool(np.isfinite(samples).all())
    if header.subtype in _FLOAT_SUBTYPES:  # integer formats cannot hold NaN
        with _NativeErrors(path, "cannot be read"):
            finite = all(np.isfinite(part).all() for part in soundfile.blocks(str(path), blocksize=1 << 20))
    _require_finite(path, finite)
    return header.duration_sec


def read_samples(
    recording: Recording, rate: int, start_sec: float = 0.0, duration_sec: float | None = None
) -> np.ndarray:
    """Samples of a recording or of a crop of it, `[2, n]` float32: Moshi's channel and the user's.

    A crop may be a little longer than asked for where it is resampled, and ends with the recording. Crops are
    resampled each by itself, as in moshi-finetune's loader.

    Args:
        rate: samples/s of the result.
        start_sec: where the crop starts.
        duration_sec: its length; None reads to the end of the recording.
    Raises:
        ValueError: the file is gone, broken, shorter than it was, holds NaN, or has other channels.
    """
    path = recording.path
    header = read_header(path)
    require_channels(path, header.channels, recording.num_channels)
    if abs(header.duration_sec - recording.duration_sec) > DURATION_TOLERANCE_SEC:
        raise ValueError(
            f"{path} has {header.duration_sec:.3f} s, but {recording.duration_sec:.3f} s when it was listed; "
            "correct the list, or do not change recordings while they are used"
        )
    rest_sec = header.duration_sec - start_sec
    # Room is made for what is asked for, and nothing lies behind the end.
    wanted_sec = rest_sec + 1.0 if duration_sec is None else min(duration_sec, rest_sec + 1.0)
    samples, requested = _decode(path, header, start_sec, wanted_sec)
    _require_whole(path, header, start_sec, min(wanted_sec, rest_sec), samples)
    _require_finite(path, bool(np.isfinite(samples).all()))  # sphn panics when it resamples NaN
    with _NativeErrors(path, "cannot be resampled"):
        samples = _resample(samples, requested, header.rate, rate)
    if recording.user is None:
        return samples
    first = round(start_sec * rate)
    return np.concatenate((samples, user_samples(recording.user, rate, first, samples.shape[1])[None]))


def user_samples(user: UserChannel, rate: int, first: int, count: int) -> np.ndarray:
    """Samples `[count]` of what stands in for a user, from sample `first`: the same in whatever crop."""
    if user.noise_dbfs is None:
        return np.zeros(count, np.float32)
    seconds = range(first // rate, (first + count - 1) // rate + 1)
    noise = np.concatenate(
        [np.random.default_rng((user.seed, s)).standard_normal(rate, np.float32) for s in seconds]
    )
    offset = first - seconds[0] * rate
    return noise[offset : offset + count] * np.float32(10 ** (user.noise_dbfs / 20))


def _decode(path: Path, header: AudioHeader, start_sec: float, duration_sec: float) -> tuple[np.ndarray, int]:
    """Samples `[C, n]` at the file's rate, and how many had been asked for."""
    with _NativeErrors(path, "cannot be read"):
        if header.by_sphn:
            reader = sphn.FileReader(str(path))
            padded, count = reader.decode_with_padding(start_sec, duration_sec)
            return padded[:, :count], padded.shape[1]
        with soundfile.SoundFile(str(path)) as file:
            requested = int(duration_sec * header.rate)
            file.seek(min(round(start_sec * header.rate), file.frames))
            block = file.read(min(requested, file.frames - file.tell()), dtype="float32", always_2d=True)
            return np.ascontiguousarray(block.T), requested


def _resample(samples: np.ndarray, requested: int, rate: int, new_rate: int) -> np.ndarray:
    """Samples `[C, n]` at another rate.

    sphn's filter delays by a few hundred samples and fills its last block: the loader of moshi-finetune keeps
    what that gives of a crop that is whole, and cuts one that the end of the file has cut.
    """
    count = samples.shape[1]
    if rate == new_rate:
        return samples
    resampled = sphn.resample(np.ascontiguousarray(samples), rate, new_rate)
    return resampled if count == requested else resampled[:, : count * new_rate // rate]


def require_channels(path: Path, found: int, expected: int) -> None:
    """Raise ValueError that says what the channels should be."""
    if found != expected:
        meaning = "stereo, left Moshi and right the user"
        if expected == 1:
            meaning = "mono, the voice that Moshi learns"
        raise ValueError(f"{path} has {found} channel(s); expected {meaning}")


def _require_whole(
    path: Path, header: AudioHeader, start_sec: float, expected_sec: float, samples: np.ndarray
) -> None:
    if samples.shape[0] != header.channels or samples.shape[1] == 0:
        raise ValueError(f"{path} holds no audio at {start_sec:.3f} s that can be decoded; convert it to wav")
    if samples.shape[1] / header.rate < expected_sec - DURATION_TOLERANCE_SEC:
        raise ValueError(f"{path} ends before the {header.duration_sec:.3f} s that its header promises")


def _require_finite(path: Path, finite: bool) -> None:
    if not finite:
        raise ValueError(f"{path} holds NaN or infinite samples; repair or remove it")
