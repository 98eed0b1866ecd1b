"""Samples of recordings: the one place where audio files are opened.

Samples are those of sphn, with which moshi-finetune's loader reads and resamples: codes are the same. What
sphn cannot read libsndfile does, and PyAV opens the containers (m4a, mka, webm) that neither reads. All are
native code that meets files of any kind here: whatever goes wrong in a file is a ValueError that names it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import av.error
import numpy as np
import soundfile
import sphn

from finetune.data.containers import container_samples, read_container_header
from finetune.data.recording import Recording, UserChannel

DURATION_TOLERANCE_SEC = 0.1
# A header that says more is broken; resampling from it would take memory without bound.
MAX_SAMPLE_RATE = 768_000
MAX_CHANNELS = 64
# Who decodes a file.
SPHN, LIBSNDFILE, PYAV = "sphn", "libsndfile", "PyAV"
# What sphn decodes and seeks in as it should. It cannot read Opus, loses its place in ADPCM, and leaves out
# damaged blocks of FLAC without a word: what follows is early. libsndfile gives the same samples of FLAC.
_SPHN_FORMATS = {
    "WAV": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    "WAVEX": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"),
    "MP3": ("MPEG_LAYER_III",),
    "OGG": ("VORBIS",),
    "AIFF": ("PCM_S8", "PCM_16", "PCM_24", "PCM_32"),
    "CAF": ("PCM_16", "PCM_24", "PCM_32"),
}
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")
# What libsndfile says of FLAC that was streamed and has no length in its header.
_UNKNOWN_FRAMES = 1 << 62


@dataclass(frozen=True)
class AudioHeader:
    """What the header of a file says.

    Args:
        channels, rate, duration_sec: as the decoder that `read_samples` uses sees them.
        promised_sec: length of what `read_blocks` gives of a sound file.
        subtype: libsndfile's name of the encoding; None for containers.
        decoder: of `read_samples`.
    """

    channels: int
    rate: int
    duration_sec: float
    promised_sec: float
    subtype: str | None
    decoder: str


class BrokenAudioError(ValueError):
    """A file that can be decoded up to a second.

    Args:
        second: to a tenth.
        reason: what the decoder says.
    """

    def __init__(self, path: Path, second: float, reason: str):
        super().__init__(f"{path} cannot be decoded from {second:.1f} s on ({reason}); repair or remove it")
        self.second = second
        self.reason = reason


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
        known = (ValueError, TypeError, ArithmeticError, OSError, MemoryError)
        known += (soundfile.SoundFileError, av.error.FFmpegError)
        if issubclass(kind, known) or kind.__name__ == "PanicException":
            raise ValueError(
                f"{self.message} ({error}); repair it, convert it to wav, or remove it"
            ) from error


def read_header(path: Path) -> AudioHeader:
    """The header of an audio file; its ending says nothing.

    Raises:
        ValueError: it is no audio, or cannot be opened.
    """
    what = "is no audio file that can be read"
    try:
        with _NativeErrors(path, what):
            info = soundfile.info(str(path))
    except ValueError:
        # What neither opens is told with PyAV's reason.
        with _NativeErrors(path, what):
            found = read_container_header(path)
        length = found.duration_sec
        header = AudioHeader(found.channels, found.rate, length, length, None, PYAV)
    else:
        if info.frames == 0:
            raise ValueError(f"{path} holds no audio")
        if info.frames >= _UNKNOWN_FRAMES:
            raise ValueError(f"{path} has a header that does not say how long it is; convert it to wav")
        channels, rate, length = info.channels, info.samplerate, info.duration
        header = AudioHeader(channels, rate, length, length, info.subtype, LIBSNDFILE)
        if info.subtype in _SPHN_FORMATS.get(info.format, ()):
            with _NativeErrors(path, what):
                reader = sphn.FileReader(str(path))
            # sphn counts what Ogg's encoders put behind the end.
            seen = length if info.format == "OGG" else reader.duration_sec
            header = AudioHeader(reader.channels, reader.sample_rate, seen, length, info.subtype, SPHN)
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
        finite = all(np.isfinite(block).all() for block in read_blocks(path, header, 1 << 20))
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


def read_blocks(path: Path, header: AudioHeader, size: int) -> Iterator[np.ndarray]:
    """All samples of a file at its own rate, in blocks `[C, size]` float32 of which the last is shorter.

    One block is held at a time. libsndfile reads what it can open: it notices what sphn passes over.

    Raises:
        BrokenAudioError: the file cannot be decoded from somewhere on.
    """
    try:
        with _NativeErrors(path, "cannot be read"):
            yield from _blocks(path, header, size)
    except ValueError as error:
        reason = str(error.__cause__ or error)
        raise BrokenAudioError(path, _readable_samples(path, header) / header.rate, reason) from error


def read_whole(path: Path) -> tuple[np.ndarray, int]:
    """All samples of a file, `[C, n]` float32, and its rate.

    Raises:
        ValueError: it cannot be read to its end, holds nothing, or NaN.
    """
    header = read_header(path)
    blocks = list(read_blocks(path, header, 10 * header.rate))
    samples = np.concatenate(blocks, axis=1) if blocks else np.zeros((header.channels, 0), np.float32)
    _require_whole(path, header, 0.0, header.promised_sec, samples)
    _require_finite(path, bool(np.isfinite(samples).all()))
    return samples, header.rate


def _blocks(path: Path, header: AudioHeader, size: int) -> Iterator[np.ndarray]:
    if header.decoder == PYAV:
        yield from _regrouped(container_samples(path), size)
        return
    with soundfile.SoundFile(str(path)) as file:
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            # Several times faster to work on than every other sample.
            yield np.ascontiguousarray(block.T)


def _regrouped(parts: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Samples `[C, n]` in pieces of any length, in blocks of one length."""
    waiting: list[np.ndarray] = []
    for part in parts:
        waiting.append(part)
        if sum(piece.shape[1] for piece in waiting) < size:
            continue
        joined = np.concatenate(waiting, axis=1)
        whole = joined.shape[1] // size * size
        yield from (joined[:, first : first + size] for first in range(0, whole, size))
        waiting = [joined[:, whole:]]
    rest = np.concatenate(waiting, axis=1) if waiting else np.zeros((1, 0), np.float32)
    if rest.shape[1]:
        yield rest


def _readable_samples(path: Path, header: AudioHeader) -> int:
    """Samples of a channel before a file's broken place, to a tenth of a second."""
    count = 0
    try:
        with _NativeErrors(path, "cannot be read"):
            for block in _blocks(path, header, max(1, header.rate // 10)):
                count += block.shape[1]
    except ValueError:
        return count
    return count


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
        if header.decoder == SPHN:
            reader = sphn.FileReader(str(path))
            padded, count = reader.decode_with_padding(start_sec, duration_sec)
            return padded[:, :count], padded.shape[1]
        requested = _sample_at(duration_sec, header.rate)
        if header.decoder == PYAV:
            return _container_crop(path, header, start_sec, requested), requested
        with soundfile.SoundFile(str(path)) as file:
            file.seek(min(_sample_at(start_sec, header.rate), file.frames))
            block = file.read(min(requested, file.frames - file.tell()), dtype="float32", always_2d=True)
            return np.ascontiguousarray(block.T), requested


def _container_crop(path: Path, header: AudioHeader, start_sec: float, count: int) -> np.ndarray:
    parts: list[np.ndarray] = [np.zeros((header.channels, 0), np.float32)]
    missing = count
    for part in container_samples(path, start_sec):
        parts.append(part[:, :missing])
        missing -= parts[-1].shape[1]
        if missing == 0:
            break
    return np.concatenate(parts, axis=1)


def _sample_at(second: float, rate: int) -> int:
    """The sample at a second as sphn counts: one sample off, and codes are others."""
    return int(second) * rate + int(second % 1 * rate)


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
