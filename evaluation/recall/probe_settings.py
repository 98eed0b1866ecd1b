"""Settings of probe mode."""

from dataclasses import dataclass, field

TASKS = ("code_words", "phrases")


@dataclass
class Probe:
    """What a checkpoint is told and asked for. Defaults fit the sample; a real measurement wants longer
    recordings, more episodes and distances of 10 receptive fields and more."""

    recordings: str = "sample_data/train.jsonl"
    """jsonl of recordings in the format of training: the speech between, and what phrases are cut from."""

    max_recordings: int | None = None
    """Use only the first recordings. None uses all."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """code_words: pairs of random codes. phrases: words that are spoken in the recordings."""

    distances: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 1.5])
    """Frames between what is told last and the question, in receptive fields of the checkpoint's attention
    windows; rounded up so that the question begins a mini-batch."""

    pairs: int = 4
    """Pairs told in an episode. Each is asked for, and the values of all are the candidates: chance is one in
    so many."""

    episodes: int = 16
    """Of each task. Those of phrases are dealt out to the recordings in turn."""

    key_frames: int = 6
    """Length of a key. 12.5 frames are one second."""

    value_frames: int = 6
    """Length of a value."""

    pause_frames: int = 2
    """Frames of speech between two pairs that are told."""

    key_words: int = 1
    """Words that must begin in the key of a phrase."""

    value_words: int = 1
    """Words that must begin in its value; the first begins with it."""

    seed: int = 0
    """Of the code words, the choice of phrases and the speech between."""

    batch_size: int = 8
    """Episodes, and questions with an answer, that are passed side by side. Lower it if memory runs out."""

    chunk_frames: int = 256
    """Longest piece of an episode passed at once, rounded up to whole mini-batches. Numbers do not depend on
    it, but memory does."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    overwrite: bool = False
    """Replace outputs that exist."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work with any checkpoint or recordings."""
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"probe.tasks must be some of {', '.join(TASKS)}, each once; got "
                f"{', '.join(self.tasks) or 'none'}"
            )
        if not self.distances or not all(distance > 0 for distance in self.distances):
            raise ValueError(
                "probe.distances must be receptive fields above 0, at least one; got "
                f"{', '.join(f'{distance:g}' for distance in self.distances) or 'none'}"
            )
        if self.pairs < 2:
            raise ValueError(
                f"probe.pairs must be at least 2: one alone cannot be confused; got {self.pairs}"
            )
        least = {"pause_frames": 0, "max_recordings": 1}
        for name in (
            *("episodes", "key_frames", "value_frames", "pause_frames", "key_words", "value_words"),
            *("batch_size", "chunk_frames", "max_recordings"),
        ):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"probe.{name} must be at least {least.get(name, 1)}, got {value}")

    @property
    def told_frames(self) -> int:
        """Frames from the first pair's begin to the last one's end."""
        return self.pairs * (self.key_frames + self.value_frames + self.pause_frames) - self.pause_frames
