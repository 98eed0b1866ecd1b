"""Settings of the paper metrics."""

from dataclasses import dataclass, field

from moshi_ttt.loading import DTYPES

TASKS = ("swuggy", "sblimp", "tsc", "ssc", "salmon")
SPLITS = ("dev", "test")
TEXT_FILLERS = ("-1", "pad")
USER_FILLERS = ("silence", "-1")
MODES = ("score", "check")


@dataclass
class DataFolders:
    """Where the data sets are. Only those of the tasks that are asked for are needed."""

    slm21: str | None = None
    """sLM21-dataset, with lexical/{dev,test} (sWUGGY) and syntactic/{dev,test} (sBLIMP)."""

    tsc: str | None = None
    """Topic StoryCloze: NUMBER_UUID_{correct,incorrect}.wav, or SPEAKER/*_{correct,incorrect}.wav."""

    ssc: str | None = None
    """Spoken StoryCloze, in the same layouts."""

    salmon: str | None = None
    """salmon_benchmark, with eight folders of sample_NUMBER_{0,1}.wav."""


@dataclass
class PaperMetricsConfig:
    """How often a model finds the right one of two clips likelier."""

    checkpoint: str | None = None
    """A run, a step or a consolidated folder; its settings come from it. Or give `baseline`."""

    baseline: str | None = None
    """A base model instead: a hub repository, a folder in its layout, or "tiny"."""

    revision: str | None = None
    """Branch, tag or commit of the baseline's repository."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Any of swuggy, sblimp, tsc, ssc, salmon."""

    splits: list[str] = field(default_factory=lambda: ["dev"])
    """Of sLM21: dev, test or both."""

    data: DataFolders = field(default_factory=DataFolders)

    output: str | None = None
    """Folder of likelihoods and results: a new one, or one that the same settings began. None is
    paper_metrics/NAME, after the run and its step or the baseline, and the limit."""

    mode: str = "score"
    """score, or check: look at the model's and the data's files, and stop."""

    text_filler: str = "-1"
    """What the text stream holds: -1 (nothing) or pad (the padding token)."""

    user_filler: str = "silence"
    """What the user's stream holds: silence, encoded by Mimi, or -1 (nothing)."""

    dtype: str = "float32"
    """float32 or bfloat16, whatever the weights were saved in. In bfloat16 a clip's likelihood depends a
    little on what is scored beside it."""

    limit: int | None = None
    """Score only so many ids of each task, drawn at random, with all their voices. The results are marked as
    partial."""

    seed: int = 0
    """Of `limit` and of the bootstrap."""

    bootstrap_draws: int = 2000
    """Sets of ids drawn with replacement for the 95 % intervals."""

    batch_frames: int = 8192
    """Frames in a forward pass, filling included. It decides memory and speed."""

    shard_clips: int = 512
    """Clips in a file of likelihoods. A kill loses at most so many in each process."""

    shard_index: int | None = None
    """This task among num_shards that share the work. None is SLURM_ARRAY_TASK_ID, or a task alone.
    Processes of torchrun share a task's work further."""

    num_shards: int | None = None
    """Tasks that share the work. None is SLURM_ARRAY_TASK_COUNT, or 1."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work, before anything is read."""
        if (self.checkpoint is None) == (self.baseline is None):
            raise ValueError(
                "give checkpoint=RUN or baseline=REPOSITORY, and not both; got "
                f"checkpoint={self.checkpoint} and baseline={self.baseline}"
            )
        if self.revision is not None and self.baseline is None:
            raise ValueError("revision is the baseline's; a checkpoint names its own base model")
        _choose("tasks", self.tasks, TASKS)
        _choose("splits", self.splits, SPLITS)
        for name, allowed in (
            ("mode", MODES),
            ("text_filler", TEXT_FILLERS),
            ("user_filler", USER_FILLERS),
            ("dtype", tuple(DTYPES)),
            ("verify", ("cached", "full")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("limit", "bootstrap_draws", "batch_frames", "shard_clips"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def _choose(name: str, given: list[str], allowed: tuple[str, ...]) -> None:
    unknown = [value for value in given if value not in allowed]
    if unknown or not given or len(set(given)) < len(given):
        raise ValueError(
            f"{name} must be some of {', '.join(allowed)}, each once; got {', '.join(given) or 'none'}"
        )
