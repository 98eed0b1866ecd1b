"""Settings of the evaluation on long recordings."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from evaluation.long_context.arms import MEMORIES, Arm, parse_context
from finetune.data.sources import USER_CHANNELS
from moshi_ttt.loading import DTYPES

CONTROLS = ("prefix", "foreign")
TEXTS = ("none", "pad")


@dataclass
class LongContextConfig:
    """What a memory is worth over whole chapters: NLL by position in several arms, and two controls."""

    checkpoint: str | None = None
    """A run, a step or a consolidated folder. Without TTT it is the arm `base`."""

    baseline: str | None = None
    """What the arm `base` is: a hub repository or folder of a Moshi, or a checkpoint without TTT. None is the
    model that the checkpoint was trained from."""

    recordings: str = MISSING
    """A folder in Libri-Light's layout (speaker/book/chapter.flac), a flat folder or speaker/recording.wav, a
    jsonl of {"path", "speaker"}, a pattern such as "small/*/*/*.flac", or several with commas between. One
    channel is the voice that is scored; of two, the left."""

    output: str = MISSING
    """Folder for the report, the numbers, the figures and the raw values. One that holds a part of the same
    work is gone on with."""

    arms: list[str] | None = None
    """Of base, carried, reset, inner_lr_0, gate_off. None is all that the models have."""

    contexts: list[str] = MISSING
    """Attention windows that the arms are crossed with: own (each model's), N frames in all layers, or
    TTT/OTHERS frames."""

    reset_frames: int | None = None
    """The arm reset puts the inner weights back to the learned ones at every multiple of this. None: the
    receptive field of the attention windows, rounded up to whole mini-batches."""

    controls: list[str] = MISSING
    """Of prefix (a fixed target, its prefix grows) and foreign (a prefix from another speaker)."""

    control_arms: list[str] = MISSING
    """Arms of the controls, in their own contexts; those that the run has not are left out."""

    target_sec: float = 20.0
    """Length of the controls' targets."""

    target_end: float = 0.9
    """Where targets end, as a share of the recording: what is said at the end of every chapter of an audio
    book is known beforehand."""

    text: str = "none"
    """What the text stream holds: none (no code) or pad (padding throughout). Never what is said."""

    user: str = "silence"
    """What the user of a recording with one channel is: silence, noise, or none (no codes). A second channel
    is the user itself."""

    max_sec: float | None = None
    """Use only the start of each recording. None uses all of it."""

    limit: int | None = None
    """Use only so many recordings, of as many speakers as there are, drawn with `seed`. The results are then
    marked as partial."""

    allow_short: bool = False
    """Go on though no recording is longer than the receptive field, so that the headline is not measured."""

    buckets_per_octave: int = 2
    """Buckets of positions between a position and its double."""

    bootstrap_draws: int = 2000
    """Sets of speakers drawn with replacement for the 95 % intervals."""

    seed: int = 0
    """Of `limit`, of who gives whom a foreign prefix, and of the bootstrap."""

    chunk_frames: int = 512
    """About how many frames a forward pass takes; whole mini-batches. It decides memory, not results."""

    param_dtype: str | None = None
    """bfloat16 or float32, of a Moshi that is no checkpoint. None: as the checkpoint, else bfloat16."""

    shard_index: int | None = None
    """Which part of the work this process does, from 0. None: by RANK and WORLD_SIZE or SLURM's array."""

    num_shards: int | None = None
    """Parts of the work. The process that finds all of it done writes the report."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work, before anything is loaded."""
        if self.checkpoint is None and self.baseline is None:
            raise ValueError("nothing to score; give checkpoint=RUN, or baseline=REPOSITORY or both")
        known = {
            "arms": (self.arms, MEMORIES),
            "controls": (self.controls, CONTROLS),
            "control_arms": (self.control_arms, MEMORIES),
        }
        for name, (values, allowed) in known.items():
            wrong = [value for value in values or () if value not in allowed]
            if wrong or len(set(values or ())) < len(values or ()):
                raise ValueError(f"{name}={values} must name some of {', '.join(allowed)}, each once")
        if self.arms == []:
            raise ValueError(f"arms is empty; name some of {', '.join(MEMORIES)}, or leave it out")
        if "reset" in self.control_arms:
            raise ValueError(
                "control_arms names reset, whose resets would lie elsewhere in each prefix; leave it out"
            )
        if not self.contexts or len(set(self.contexts)) < len(self.contexts):
            raise ValueError(f"contexts={self.contexts} must name at least one, each once; or [own]")
        for context in self.contexts:
            parse_context(context)
        choices = (("text", self.text, TEXTS), ("user", self.user, (*USER_CHANNELS, "none")))
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if self.param_dtype is not None and self.param_dtype not in DTYPES:
            raise ValueError(f"param_dtype must be one of {', '.join(DTYPES)}; got {self.param_dtype!r}")
        if not 0 < self.target_end <= 1:
            raise ValueError(f"target_end must lie above 0 and at most at 1, got {self.target_end}")
        for name in ("target_sec", "buckets_per_octave", "bootstrap_draws", "chunk_frames"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_sec", "limit", "reset_frames"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, or null; got {value}")

    def memories(self, has_ttt: bool, has_base: bool) -> list[str]:
        """The arms of a run.

        Raises:
            ValueError: one is asked for that the models do not have.
        """
        there = [m for m in MEMORIES if (has_base if m == "base" else has_ttt)]
        if self.arms is None:
            return there
        wanted = [memory for memory in MEMORIES if memory in self.arms]
        missing = [memory for memory in wanted if memory not in there]
        if missing:
            what = self.checkpoint or self.baseline
            raise ValueError(
                f"{what} has no TTT layers, which arms {', '.join(missing)} need; use "
                "arms=[base], or another checkpoint"
            )
        return wanted

    def crossed(self, memories: list[str]) -> list[Arm]:
        """Arms in all contexts."""
        return [Arm(memory, context) for context in self.contexts for memory in memories]

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()
