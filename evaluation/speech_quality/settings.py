"""Settings of the quality of spoken answers."""

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from finetune.data.whisper import WhisperConfig

WORDS, VOICE, TURNS = TASKS = ("words", "voice", "turns")


@dataclass
class SpeechQualityConfig:
    """How well spoken answers are spoken: by what is on the disk, no Moshi is loaded."""

    answers: str = MISSING
    """A folder that inference.batch wrote: one folder an item, with output.wav, stereo.wav and text.json."""

    output: str = MISSING
    """Folder for the results."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Of words (is what is heard what was meant?), voice (is it one voice throughout?) and turns (who speaks
    when?)."""

    whisper_model: str | None = None
    """For words: name that faster-whisper knows (large-v3, ...), or folder of a model for CTranslate2."""

    whisper: WhisperConfig = field(default_factory=WhisperConfig)
    """How Whisper listens; `language` is the answers'."""

    speaker_weights: str | None = None
    """For voice: weights of Resemblyzer's encoder. None is what its package brings."""

    window_sec: float = 4.0
    """Speech in a window whose voice is compared with the first window's."""

    bucket_sec: float = 30.0
    """Length of the steps in which similarity is drawn over time."""

    answer_sec: float = 1.0
    """The user has ended a turn where it is silent at least so long; a shorter silence is a pause."""

    backchannel_sec: float = 1.0
    """A stretch of Moshi's voice up to this length that lies within the user's is a backchannel."""

    limit: int | None = None
    """Use only so many answers, drawn at random. The results are marked as partial."""

    seed: int = 0
    """Of `limit` and of the bootstrap."""

    bootstrap_draws: int = 2000
    """Sets of answers drawn with replacement for the 95 % intervals."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    threads: int = 0
    """CPU threads of Whisper; 0 leaves it to CTranslate2."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work, before anything is read."""
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"tasks must be some of {', '.join(TASKS)}, each once; got {', '.join(self.tasks) or 'none'}"
            )
        if WORDS in self.tasks and self.whisper_model is None:
            raise ValueError(
                "words needs whisper_model=NAME, such as large-v3, or a folder with a model for CTranslate2; "
                "or leave words out of tasks"
            )
        if self.window_sec < SHORTEST_WINDOW_SEC:
            raise ValueError(f"window_sec must be at least {SHORTEST_WINDOW_SEC}, got {self.window_sec}")
        for name in ("bucket_sec", "answer_sec", "backchannel_sec", "bootstrap_draws"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null; got {self.limit}")

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()


SHORTEST_WINDOW_SEC = 1.6
"""What the encoder of voices hears at once."""

ConfigStore.instance().store(name="speech_quality_schema", node=SpeechQualityConfig)
