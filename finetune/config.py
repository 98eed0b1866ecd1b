"""The typed config of a training run: every field, what it means, what it must be."""

import math
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from configs.typed import typed_config
from finetune.data.config import DataConfig
from finetune.data.prepared import PER_CLIP, WHOLE
from finetune.evaluations import validate_evaluations
from finetune.persistence import refuse_broken_mini_batches
from moshi_ttt.building import ModelSettings
from moshi_ttt.config import TTTConfig
from moshi_ttt.integration import FRAME_RATE
from moshi_ttt.loading import DTYPES, ModelConfig
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.parameters import TRAINABLE_GROUPS
from moshi_ttt.temporal import Running


@dataclass
class OptimConfig:
    """AdamW and its OneCycle schedule. Rates are the peaks of the schedule."""

    lr: float = 2e-6
    """Base weights and LoRA factors."""

    ttt_lr: float = 1e-4
    """TTT branches: projections, norms, and the learned start of the inner weights."""

    gate_lr: float = 1e-3
    """Gates: a few numbers that decide how much memory is used at all."""

    weight_decay: float = 0.1
    """Of base weights and LoRA factors."""

    ttt_weight_decay: float = 0.0
    """Of the TTT branches. Gates never decay."""

    pct_start: float = 0.05
    """Share of the steps in which the rates rise."""

    max_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass
class EvalConfig:
    """What is measured while training."""

    every_steps: int = 100
    """Steps between evaluations; 0 means never. There is also one after the last step."""

    max_clips: int | None = None
    """Use only the first clips of the validation set. None uses all."""

    prompt: str | None = None
    """A recording (one channel: the user) that Moshi answers at each evaluation. None generates nothing."""

    seed: int = 0
    """Seed of the answers."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written."""

    every_steps: int = 100
    """Steps between checkpoints; 0 means only after the last step."""

    keep: int | None = 3
    """How many to keep. None keeps all."""


@dataclass
class DiagnosticsConfig:
    """Records of what TTT does in each layer; their numbers are defined in moshi_ttt/diagnostics.py."""

    every_steps: int = 100
    """Steps between records, which go to the log, metrics.jsonl and wandb: the first step and every multiple.
    0 means never. They are of the first micro-batch of the main process."""


@dataclass
class FSDPConfig:
    """How the model is split over processes (FSDP2). One process splits nothing."""

    shard: str = "auto"
    """full: parameters, gradients and optimiser state are split over all processes. hybrid: over the
    processes of each of `replicate` groups, which hold the same. none: every process holds the whole model.
    auto: full with several processes."""

    replicate: int | None = None
    """Groups of hybrid; usually the number of nodes, so that only gradients pass between them."""

    reduce_dtype: str = "float32"
    """Gradients are added up over processes in this: float32 or bfloat16."""

    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass, and gather them again in the backward pass."""

    reduce_every_microbatch: bool = False
    """Reduce gradients after each micro-batch: more traffic, but no process holds a gradient of the whole
    model between micro-batches."""

    def validate(self) -> None:
        """Raise ValueError for settings that no number of processes can have."""
        if self.shard not in ("auto", "full", "hybrid", "none"):
            raise ValueError(f"fsdp.shard must be auto, full, hybrid or none; got {self.shard!r}")
        if (self.shard == "hybrid") != (self.replicate is not None):
            raise ValueError(
                f"fsdp.replicate={self.replicate} with fsdp.shard={self.shard}: the number of replicas "
                "belongs to fsdp.shard=hybrid; give both or neither"
            )
        if self.replicate is not None and self.replicate < 2:
            raise ValueError(
                f"fsdp.replicate must be at least 2, got {self.replicate}; or use fsdp.shard=full"
            )
        if self.reduce_dtype not in DTYPES:
            raise ValueError(
                f"fsdp.reduce_dtype must be one of {', '.join(DTYPES)}; got {self.reduce_dtype!r}"
            )


@dataclass
class ResumeConfig:
    """Going on from a checkpoint of a run, as if it had never stopped."""

    mode: str | None = None
    """auto: from the last valid checkpoint in run_dir, or from the start where there is none. never: run_dir
    must be new. A path of a run or of one of its checkpoints: from that, in its own run_dir or in a new one.
    None: auto in a SLURM job, else never."""

    allow: list[str] = field(default_factory=list)
    """Settings (or groups of them) that may differ from those of the checkpoint, as [batch_size,eval]."""


@dataclass
class WandbConfig:
    """Weights & Biases. The API key comes from `wandb login` or WANDB_API_KEY, never from a config."""

    mode: str = "disabled"
    """online, offline or disabled."""

    project: str | None = None
    """Needed unless disabled."""

    entity: str | None = None
    """Team or user. None is your default."""

    name: str | None = None
    """Name of the run. None is the run directory's."""


@dataclass
class TrainConfig:
    """A training run."""

    run_dir: str = MISSING
    """Folder for config, log, metrics, answers and checkpoints; new, unless resume.mode says otherwise."""

    mode: str = "lora+ttt"
    """What trains: frozen (nothing: evaluate only), lora, ttt, lora+ttt, full."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """What else is measured while training, such as {_target_:
    evaluation.long_context.during_training.LongContext, every_steps: 500, recordings: FOLDER}; see
    finetune/evaluations.py."""

    init_from: str | None = None
    """Start from the weights of a checkpoint (ours or moshi-finetune's); all settings are this run's."""

    duration_sec: float = 100.0
    """Length of a training clip; with ttt.persistent_states=true of a chunk of a recording, which must be a
    whole number of TTT mini-batches."""

    batch_size: int = 16
    """Clips on each process in one forward pass."""

    num_microbatches: int = 1
    """Forward passes whose gradients are added up to one step."""

    max_carried_gib: float | None = None
    """With ttt.persistent_states=true: most memory on each process for what rows carry from chunk to chunk.
    More is an error before the run starts. None is what is free on the device once the model is there."""

    max_steps: int = 2000
    """Optimiser steps."""

    first_codebook_weight_multiplier: float = 100.0
    """Weight of the semantic codebook in the audio loss; the acoustic ones weigh 1."""

    text_padding_weight: float = 0.5
    """Weight of padding in the text loss."""

    param_dtype: str = "bfloat16"
    """bfloat16 or float32. Inner weights, gates and optimiser state are float32 with either."""

    gradient_checkpointing: bool = True
    """Recompute each layer's activations in the backward pass."""

    checkpoint_layers: int | None = None
    """With gradient_checkpointing: how many layers of the temporal transformer, from the first on, recompute
    all of their activations; the others keep the results of their products and recompute norms and gates. As
    few as fit in memory are fastest. None is all."""

    compile: bool | None = None
    """Compile norms, rotations and gates to single kernels, in the first step. None: on a GPU.
    NO_TORCH_COMPILE=1 in the environment turns it off."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    seed: int = 0
    """Of new weights and of the order of clips."""

    log_every: int = 1
    """Steps between lines in metrics.jsonl and the log."""

    @property
    def encode(self) -> str:
        """How audio becomes codes: `data.encode`, or what it stands for."""
        return self.data.encode or (WHOLE if self.ttt.persistent_states else PER_CLIP)

    @property
    def running(self) -> Running:
        """How the layers are run."""
        return Running(self.checkpoint_layers, self.compile)

    @property
    def settings(self) -> ModelSettings:
        """The part that decides what the model is."""
        return ModelSettings(self.model, self.param_dtype, self.lora, self.ttt)

    def validate(self) -> None:
        """Raise ValueError for settings that cannot work together, before anything is loaded or written."""
        if self.mode not in TRAINABLE_GROUPS:
            raise ValueError(f"mode must be one of {', '.join(TRAINABLE_GROUPS)}; got {self.mode!r}")
        _ = self.settings.dtype
        self.data.validate()
        if self.ttt.enable:
            self.ttt.validate()
        if self.lora.enable:
            self.lora.validate()
        self.fsdp.validate()
        trained = self.mode.split("+")
        for group, section in (("lora", self.lora), ("ttt", self.ttt)):
            if group in trained and not section.enable:
                raise ValueError(f"mode={self.mode} trains {group}; set {group}.enable=true or another mode")
        if self.mode == "full" and self.lora.enable:
            raise ValueError("mode=full trains the weights under LoRA; set lora.enable=false or another mode")
        for name in ("duration_sec", "batch_size", "num_microbatches", "max_steps", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.ttt.persistent_states:
            refuse_broken_mini_batches(self.duration_sec, self.ttt.mini_batch_size if self.ttt.enable else 1)
        self._validate_data()
        self._validate_running()
        validate_evaluations(self.evaluations)
        if self.max_carried_gib is not None and not self.max_carried_gib > 0:
            raise ValueError(f"max_carried_gib must be above 0, or null; got {self.max_carried_gib}")
        for name in ("lr", "ttt_lr", "gate_lr", "max_norm"):
            if not getattr(self.optim, name) > 0:
                raise ValueError(f"optim.{name} must be above 0, got {getattr(self.optim, name)}")
        if not 0 < self.optim.pct_start < 1:
            raise ValueError(f"optim.pct_start must lie between 0 and 1, got {self.optim.pct_start}")
        if self.eval.max_clips is not None and self.eval.max_clips < 1:
            raise ValueError(f"eval.max_clips must be at least 1, or null for all; got {self.eval.max_clips}")
        for name, value in (
            ("eval.every_steps", self.eval.every_steps),
            ("checkpoint.every_steps", self.checkpoint.every_steps),
            ("diagnostics.every_steps", self.diagnostics.every_steps),
        ):
            if value < 0:
                raise ValueError(f"{name} must be 0 (never) or more, got {value}")
        if self.checkpoint.keep is not None and self.checkpoint.keep < 1:
            raise ValueError(
                f"checkpoint.keep must be at least 1, or null for all; got {self.checkpoint.keep}"
            )
        if self.wandb.mode not in ("online", "offline", "disabled"):
            raise ValueError(f"wandb.mode must be online, offline or disabled; got {self.wandb.mode!r}")
        if self.wandb.mode != "disabled" and not self.wandb.project:
            raise ValueError(f"wandb.mode={self.wandb.mode} needs wandb.project=NAME")
        self._validate_resume()

    def _validate_running(self) -> None:
        if self.checkpoint_layers is None:
            return
        if self.checkpoint_layers < 1:
            raise ValueError(
                f"checkpoint_layers must be at least 1, or null for all; got {self.checkpoint_layers}. To "
                "keep all activations set gradient_checkpointing=false"
            )
        if not self.gradient_checkpointing:
            raise ValueError(
                f"checkpoint_layers={self.checkpoint_layers} with gradient_checkpointing=false: nothing is "
                "recomputed; set gradient_checkpointing=true or checkpoint_layers=null"
            )

    def _validate_resume(self) -> None:
        known = flat(to_plain(TrainConfig(run_dir="")))
        for name in self.resume.allow:
            if not any(key == name or key.startswith(f"{name}.") for key in known):
                raise ValueError(
                    f"resume.allow names {name!r}, which is no setting; see --help for those there are"
                )

    def _validate_data(self) -> None:
        if self.data.encode not in (None, WHOLE, PER_CLIP):
            raise ValueError(f"data.encode must be {WHOLE}, {PER_CLIP} or null; got {self.data.encode!r}")
        if self.data.workers < 0:
            raise ValueError(f"data.workers must be 0 (none) or more, got {self.data.workers}")
        if self.ttt.persistent_states and self.encode != WHOLE:
            raise ValueError(
                "ttt.persistent_states=true carries state through a recording, whose codes must be those of "
                f"a stream: set data.encode={WHOLE} or leave it out; got {self.data.encode}"
            )
        frames = self.duration_sec * FRAME_RATE
        if self.encode == WHOLE and abs(frames - round(frames)) > 1e-6:
            proposed = sorted({max(1, math.floor(frames)), math.ceil(frames)})
            raise ValueError(
                f"duration_sec={self.duration_sec:g} is {frames:g} frames; with data.encode={WHOLE} clips "
                "are cut between frames: use duration_sec="
                + " or ".join(f"{number / FRAME_RATE:g}" for number in proposed)
            )


def register() -> None:
    """Tell Hydra the types, so that an unknown key or a wrong type is an error."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)


def to_typed(config: DictConfig) -> TrainConfig:
    """The composed config of a run as dataclasses, checked.

    Raises:
        ValueError: a value that the user must give is missing, or settings cannot work.
    """
    typed = typed_config(config, TrainConfig)
    typed.validate()
    return typed


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values, for files."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
