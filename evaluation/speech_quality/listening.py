"""Listening to answers, one after the other."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import scipy.signal

from evaluation.speech_quality import turns, voice, words
from evaluation.speech_quality.activity import VoiceActivity
from evaluation.speech_quality.answers import OUTPUT, STEREO, Answer
from evaluation.speech_quality.measures import Ratios
from evaluation.speech_quality.settings import TURNS, VOICE, WORDS, SpeechQualityConfig
from finetune.data.audio import read_whole
from finetune.data.voice import FRAME_SEC, runs
from finetune.data.whisper import RATE, Transcriber
from inference.generate import choose_device


@dataclass
class Heard:
    """What was heard in one answer.

    Args:
        ratios: by task and metric.
        details: by task: what the numbers come from.
        similarity: of Moshi's later windows to its first, by second.
    """

    ratios: dict[str, Ratios] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    similarity: list[tuple[float, float]] = field(default_factory=list)


class Listener:
    """The models that hear.

    Raises:
        ValueError: one is missing, with what to install.
    """

    def __init__(self, config: SpeechQualityConfig):
        self.config = config
        tasks = config.tasks
        self.activity = VoiceActivity() if VOICE in tasks or TURNS in tasks else None
        device = choose_device(config.device)
        self.encoder = voice.VoiceEncoder(config.speaker_weights, device) if VOICE in tasks else None
        self.transcriber = None
        if WORDS in tasks:
            assert config.whisper_model is not None
            self.transcriber = Transcriber(config.whisper_model, config.whisper, device.type, config.threads)

    @property
    def encoder_sha256(self) -> str | None:
        return None if self.encoder is None else self.encoder.sha256

    def hearing(self) -> dict[str, Any]:
        """Which Whisper, and its settings."""
        if self.transcriber is None:
            return {}
        return {"whisper": self.transcriber.model_id, "settings": asdict(self.config.whisper)}

    def listen(self, answer: Answer) -> Heard:
        """One answer."""
        heard, config = Heard(), self.config
        if self.transcriber is not None:
            (samples,) = _samples(answer.folder / OUTPUT)
            found = words.measure(answer.text, samples, self.transcriber)
            heard.ratios[WORDS], heard.details[WORDS] = found
        if self.activity is None:
            return heard
        user, moshi = _samples(answer.folder / STEREO)
        user_voice, moshi_voice = self.activity(user), self.activity(moshi)
        if self.encoder is not None:
            own = voice.windows(moshi, moshi_voice, config.window_sec)
            others = voice.windows(user, user_voice, config.window_sec)
            heard.ratios[VOICE], heard.similarity = voice.measure(own, others, self.encoder)
            similar = [[round(second, 2), round(like, 6)] for second, like in heard.similarity]
            heard.details[VOICE] = {"windows": len(own), "similarity": similar}
        if TURNS in config.tasks:
            heard.ratios[TURNS] = turns.measure(
                user_voice, moshi_voice, config.answer_sec, config.backchannel_sec
            )
            heard.details[TURNS] = {"user": _stretches(user_voice), "moshi": _stretches(moshi_voice)}
        return heard


def _samples(path: Any) -> np.ndarray:
    """Channels `[C, n]` at 16 kHz."""
    samples, rate = read_whole(path)
    divisor = np.gcd(RATE, rate)
    return scipy.signal.resample_poly(samples, RATE // divisor, rate // divisor, axis=1).astype(np.float32)


def _stretches(mask: np.ndarray) -> list[list[float]]:
    """Start and end in seconds."""
    return [[round(start * FRAME_SEC, 2), round(end * FRAME_SEC, 2)] for start, end in runs(mask).tolist()]
