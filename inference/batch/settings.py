"""Settings of answering many recordings."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from inference.generate import InnerStateConfig
from inference.rows import Sampling


@dataclass
class PerplexityConfig:
    """How likely a recording is, on Moshi's stream, given all that came before: teacher-forced NLL."""

    enable: bool = False

    channel: int | None = None
    """Channel on Moshi's stream. None is the one that is not the user's; of a mono recording, its one."""

    text: str = "none"
    """What is on the text stream, as there is no transcript: none (no token, and no NLL) or padding."""

    chunk_frames: int = 512
    """Frames of a forward pass; rounded up to whole mini-batches."""


@dataclass
class BatchDiagnosticsConfig:
    """Records of what TTT does in each layer, in each item's folder. One conversation runs at a time then."""

    every_frames: int = 0
    """Frames between records. 0 means never."""


@dataclass
class BatchConfig:
    """Answers to many recordings."""

    checkpoint: str = MISSING
    """A run, a step or a consolidated folder. The model's settings come from it and from nowhere else."""

    inputs: list[str] = MISSING
    """Recordings: files, globs, folders, lists (.txt, one path a line) and .jsonl with a `path` and, if
    wanted, `id`, `channel` and `seed` in each line. Paths in lists are relative to the list's folder."""

    output: str = MISSING
    """Folder; each recording gets one of its own in it. What is finished there is not done again."""

    channel: int | None = None
    """Channel that is the user, from 0, where a list does not say. None expects mono files."""

    slots: int = 8
    """Conversations at a time, on one GPU or CPU."""

    max_sec: float | None = None
    """Only the first so many seconds of each recording. None is all."""

    generate: bool = True
    """Let Moshi answer. False computes what else is asked for."""

    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    sampling: Sampling = field(default_factory=Sampling)
    diagnostics: BatchDiagnosticsConfig = field(default_factory=BatchDiagnosticsConfig)
    inner_state: InnerStateConfig = field(default_factory=InnerStateConfig)

    base: str | None = None
    """Another place with the checkpoint's base model, a hub repo or folder: the same files, by SHA-256. None
    is where it was when the checkpoint was trained."""

    overwrite: bool = False
    """Do finished recordings again, and replace those made with other settings."""

    shard_index: int | None = None
    """This task among num_shards that share the recordings. None is SLURM_ARRAY_TASK_ID, or a task alone."""

    num_shards: int | None = None
    """Tasks that share the recordings. None is SLURM_ARRAY_TASK_COUNT, or 1."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, got {self.slots}")
        if self.max_sec is not None and self.max_sec <= 0:
            raise ValueError(f"max_sec must be above 0, or null for all; got {self.max_sec}")
        if self.diagnostics.every_frames < 0:
            raise ValueError(
                f"diagnostics.every_frames must be 0 (never) or more, got {self.diagnostics.every_frames}"
            )
        if self.perplexity.text not in ("none", "padding"):
            raise ValueError(f"perplexity.text must be none or padding, got {self.perplexity.text!r}")
        if self.perplexity.chunk_frames < 1:
            raise ValueError(
                f"perplexity.chunk_frames must be at least 1, got {self.perplexity.chunk_frames}"
            )
        if not self.generate and not self.perplexity.enable:
            raise ValueError("generate=false leaves nothing to do; set perplexity.enable=true")
        if not self.generate and self.diagnostics.every_frames:
            raise ValueError("diagnostics are of a conversation: set generate=true")


ConfigStore.instance().store(name="batch_schema", node=BatchConfig)
