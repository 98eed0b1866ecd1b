"""faster-whisper behind one call: samples of one speaker in, timed words out."""

import math
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.signal

from finetune.data.voice import FRAME_SEC, VoiceConfig, frame_power, frame_samples, voiced
from moshi_ttt.digest import sha256

if TYPE_CHECKING:
    from faster_whisper import BatchedInferencePipeline, WhisperModel

RATE = 16_000  # Whisper's
SHORTEST_WORD_SEC = 0.02  # Whisper's own precision; a word without a length would never reach the text stream
# A device that has failed fails for every file that follows.
DEVICE_ERROR = re.compile(r"cuda|cublas|cudnn|out of memory", re.IGNORECASE)


@dataclass
class WhisperConfig:
    """The speech recogniser, and all that decides what it hears."""

    language: str | None = "en"
    """Language code. None detects it in each channel."""

    beam_size: int = 5
    """Hypotheses followed at once; 1 is greedy and the fastest."""

    batch_size: int = 1
    """Stretches of speech recognised at once, for GPUs. Above 1 needs vad_filter=true."""

    compute_type: str = "default"
    """CTranslate2's: default, float32, float16, bfloat16, int8, int8_float16, ..."""

    vad_filter: bool = True
    """Leave out what Silero's voice activity detector (part of faster-whisper) takes for no speech: in the
    long pauses of a two-channel dialogue Whisper makes words up."""

    min_silence_sec: float = 0.5
    """Pauses from this length on are left out, with vad_filter."""

    condition_on_previous_text: bool = False
    """Show Whisper its previous words. Better at names, and more prone to repeat itself for minutes."""

    snap_to_voice: bool = True
    """Move edges of words that lie in silence to the voice inside the word: Whisper starts the first word
    after a pause too early, by 0.3 s and more. Voice as in finetune/data/voice.py."""


class Transcriber:
    """A Whisper model.

    Args:
        model: name that faster-whisper knows, or a folder with a converted model.
        config: its settings.
        device: cpu, cuda or auto.
        threads: CPU threads; 0 leaves it to CTranslate2.
    Raises:
        ValueError: faster-whisper or the model is missing, or a setting does not fit it.
    """

    def __init__(self, model: str, config: WhisperConfig, device: str, threads: int):
        if config.batch_size > 1 and not config.vad_filter:
            raise ValueError("batch_size above 1 cuts at pauses; set vad_filter=true or batch_size=1")
        for name in ("beam_size", "batch_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        try:
            import faster_whisper
        except ImportError as error:
            raise ValueError(
                f"faster-whisper cannot be imported ({error}); install it with "
                "pip install 'moshi-ttt[annotate]'"
            ) from error
        self.config = config
        folder = _find_model(model)
        try:
            self.model: WhisperModel = faster_whisper.WhisperModel(
                str(folder), device=device, compute_type=config.compute_type, cpu_threads=threads
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"model={model} does not load on device={device} ({error})") from error
        languages = self.model.supported_languages
        if config.language is not None and config.language not in languages:
            raise ValueError(
                f"model={model} does not know language={config.language}; it knows {', '.join(languages)}"
            )
        self.batched: BatchedInferencePipeline | None = None
        if config.batch_size > 1:
            self.batched = faster_whisper.BatchedInferencePipeline(self.model)
        # By content: the same model may lie anywhere, and a name may come to mean another.
        self.model_id = {"name": Path(model).name, "sha256": sha256(folder / "model.bin")}
        self.versions = {
            "faster-whisper": metadata.version("faster-whisper"),
            "device": self.model.model.device,
            "compute_type": self.model.model.compute_type,
        }

    def words(self, samples: np.ndarray, rate: int) -> list[tuple[str, float, float]]:
        """Words of one channel `[n]` with start and end in seconds, in order."""
        divisor = math.gcd(RATE, rate)
        audio = scipy.signal.resample_poly(samples, RATE // divisor, rate // divisor).astype(np.float32)
        common: dict[str, Any] = {
            "language": self.config.language,
            "beam_size": self.config.beam_size,
            "word_timestamps": True,
            "vad_filter": self.config.vad_filter,
            "condition_on_previous_text": self.config.condition_on_previous_text,
        }
        if self.config.vad_filter:
            silence = round(1000 * self.config.min_silence_sec)
            common["vad_parameters"] = {"min_silence_duration_ms": silence}
        if self.batched is not None:
            segments, _ = self.batched.transcribe(audio, batch_size=self.config.batch_size, **common)
        else:
            segments, _ = self.model.transcribe(audio, **common)
        heard = [
            (word.word, float(word.start), float(word.end)) for part in segments for word in part.words or ()
        ]
        words = join_hyphens(heard)
        if self.config.snap_to_voice:
            words = snap_to_voice(words, audio)
        return keep_inside(words, len(samples) / rate)


def _find_model(model: str) -> Path:
    """Folder of a model's files, fetched from the hub where it is a name."""
    import faster_whisper
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folder = Path(model).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(faster_whisper.download_model(model))
        except (ValueError, OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(
                f"model={model} is no folder, and cannot be fetched ({error}); give a folder with a model "
                f"converted for CTranslate2, or one of {', '.join(faster_whisper.available_models())}"
            ) from error
    if not (folder / "model.bin").is_file():
        raise ValueError(f"model={model}: {folder} holds no model.bin; expected a model for CTranslate2")
    return folder


def join_hyphens(words: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Words without the spaces around them; `cold`, `-hearted` are one."""
    joined: list[tuple[str, float, float]] = []
    for text, start, end in words:
        if joined and text.startswith("-") and text.strip() != "-":
            before, first, _ = joined.pop()
            joined.append((before + text.strip(), first, end))
        elif text.strip():
            joined.append((text.strip(), start, end))
    return joined


def snap_to_voice(words: list[tuple[str, float, float]], audio: np.ndarray) -> list[tuple[str, float, float]]:
    """The words with edges that lie in silence moved to the voice inside the word.

    Args:
        audio: `[n]` at Whisper's rate.
    """
    # Pauses are not filled: where a word begins is asked for.
    voice = voiced(frame_power(audio[None], frame_samples(RATE))[:, 0], VoiceConfig(fill_sec=0.0))
    snapped = []
    for text, start, end in words:
        first, last = round(start / FRAME_SEC), round(end / FRAME_SEC)
        inside = np.flatnonzero(voice[first:last])
        if len(inside):
            start = max(start, float(first + inside[0]) * FRAME_SEC)
            end = min(end, float(first + inside[-1] + 1) * FRAME_SEC)
        snapped.append((text, start, end))
    return snapped


def keep_inside(words: list[tuple[str, float, float]], duration_sec: float) -> list[tuple[str, float, float]]:
    """The words within the audio, none shorter than 20 ms."""
    kept = []
    for text, start, end in words:
        start = max(0.0, min(start, duration_sec - SHORTEST_WORD_SEC))
        kept.append((text, round(start, 3), round(min(max(end, start + SHORTEST_WORD_SEC), duration_sec), 3)))
    return kept
