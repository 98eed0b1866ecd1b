"""Settings of the evaluation of NLL by position and distance."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING


@dataclass
class NllConfig:
    """How well checkpoints predict recordings, by position and by distance since a word or speaker."""

    checkpoints: list[str] = MISSING
    """Runs, steps or consolidated folders, to be compared on the same recordings. They need the same codec,
    tokenizer and text settings."""

    labels: list[str] | None = None
    """A name for each checkpoint. None takes the run folders' names."""

    recordings: str = MISSING
    """jsonl of recordings in the format of training."""

    output: str = MISSING
    """Where the numbers go, NAME.json; NAME.md (table) and NAME.png (figure) are written beside it."""

    both_sides: bool = False
    """Score each recording a second time with its channels exchanged, if its other speaker has words: Moshi
    predicts only the stream that it speaks on. For models that were trained on both sides."""

    reset_frames: int | None = None
    """The arms with reset put the inner weights back to the learned ones at every multiple of this. None: the
    receptive field of the attention windows, rounded up to whole mini-batches."""

    chunk_frames: int = 256
    """Frames in one forward pass, a multiple of the mini-batch. It decides memory, not results."""

    position_bin_sec: float = 30.0
    """Width of the bins over positions in a recording."""

    turn_sec: float = 2.0
    """How much of a turn counts, from its first word."""

    frequent_words: int = 50
    """The most frequent words of the data are left out of the measures called "rarer words"."""

    max_recordings: int | None = None
    """Use only the first recordings. None uses all."""

    bootstrap_draws: int = 2000
    """Sets of recordings drawn with replacement for the 95 % intervals."""

    overwrite: bool = False
    """Replace outputs that exist."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    @property
    def outputs(self) -> tuple[Path, Path, Path]:
        """The files that are written: numbers, table, figure."""
        output = Path(self.output).expanduser()
        return output, output.with_suffix(".md"), output.with_suffix(".png")

    def validate(self) -> None:
        """Raise ValueError for what cannot work, before anything is loaded."""
        if not self.checkpoints:
            raise ValueError("checkpoints is empty; give checkpoints=[RUN,...]")
        if self.labels is not None and len(self.labels) != len(self.checkpoints):
            raise ValueError(
                f"labels names {len(self.labels)} checkpoints, checkpoints has {len(self.checkpoints)}; give "
                "one label for each"
            )
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must differ, got {', '.join(self.labels)}")
        if Path(self.output).suffix != ".json":
            raise ValueError(f"output must be named .json, got {self.output}")
        existing = [str(path) for path in self.outputs if path.exists()]
        if existing and not self.overwrite:
            raise ValueError(f"{', '.join(existing)} exists; choose another output or set overwrite=true")
        for name in ("chunk_frames", "position_bin_sec", "turn_sec", "bootstrap_draws"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("reset_frames", "max_recordings"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or null; got {value}")
        if self.frequent_words < 0:
            raise ValueError(f"frequent_words must be 0 (none) or more, got {self.frequent_words}")
