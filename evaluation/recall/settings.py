"""Everything that decides a result of the benchmark."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from evaluation.recall.arms import ARMS, Arm, Size
from evaluation.recall.probe_settings import Probe
from evaluation.recall.scoring import Scoring
from evaluation.recall.task import Vocabulary
from evaluation.recall.training import Training
from moshi_ttt.config import TTTConfig

# Raised when a change of the code changes results: stored ones of another version are not used.
VERSION = 1


@dataclass
class RecallConfig:
    """The recall benchmark."""

    mode: str = "train"
    """train: teach and ask small Moshis. report: table and figure from what is stored. probe: ask
    `checkpoint`, as `probe` says; the other groups are then unused."""

    checkpoint: str | None = None
    """mode=probe: a run, a step or a consolidated folder."""

    study: str = "table"
    """table: the arms. ablation: one setting of the TTT layers changed at a time. width: Moshis of 64 to
    512 channels with the layer's defaults. capacity: how many pairs fit. leak: what the non-causal update
    gains in training. What the studies vary is in evaluation/recall/studies.py."""

    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """Which memories to compare, of those that a study has; see evaluation/recall/arms.py."""

    seeds: int = 5
    """Repetitions: initial weights and episodes are drawn from 0 ... seeds - 1."""

    workers: int = 2
    """Jobs side by side, one CPU thread each."""

    device: str = "cpu"
    """cpu or cuda. The models are so small that a GPU pays off with several workers on it."""

    max_minutes: float | None = None
    """Stop after these: jobs that are not done by then are not stored. None: run them all."""

    variants: list[str] | None = None
    """Variants of a study, by name, in the order they are to be run. None: all."""

    speech: str = "sample_data/audio"
    """Folder of recordings; the tiny Mimi's codes of them are the distractors."""

    store: str = "benchmarks/results/recall"
    """Folder of finished jobs, one file each. A job that is there is not run again."""

    output: str = "benchmarks/results/recall.json"
    """The report; NAME.md (table) and NAME.png (figure) are written beside it. Studies have their name
    added, NAME_ablation.json, and so has a probe, NAME_probe.json."""

    ttt: dict[str, Any] = field(
        default_factory=lambda: {"mini_batch_size": 8, "base_lr": 8.0, "gate_init": 1.0}
    )
    """Settings of the TTT layers that differ from the defaults of the group `ttt`."""

    size: Size = field(default_factory=Size)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    training: Training = field(default_factory=Training)
    scoring: Scoring = field(default_factory=Scoring)
    probe: Probe = field(default_factory=Probe)

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"arms must be some of {', '.join(ARMS)}; got {', '.join(self.arms) or 'none'}")
        if self.mode not in ("train", "report", "probe"):
            raise ValueError(f"mode must be train, report or probe; got {self.mode!r}")
        if (self.mode == "probe") != (self.checkpoint is not None):
            raise ValueError(
                "mode=probe and checkpoint=RUN go together; got "
                f"mode={self.mode} and checkpoint={self.checkpoint or 'null'}"
            )
        self.probe.validate()
        if self.study not in ("table", "ablation", "width", "capacity", "leak"):
            raise ValueError(f"study must be table, ablation, width, capacity or leak; got {self.study!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda; got {self.device!r}")
        if self.variants is not None and self.study == "table":
            raise ValueError(f"the table has no variants; got variants={self.variants}: name arms instead")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be above 0, or null; got {self.max_minutes}")
        if self.seeds < 1 or self.workers < 1:
            raise ValueError(f"seeds and workers must be at least 1; got {self.seeds} and {self.workers}")
        most = max(self.training.max_pairs, self.scoring.pairs, *self.scoring.capacity_pairs)
        if most > self.vocabulary.keys:
            raise ValueError(f"{most} pairs need as many keys; got vocabulary.keys={self.vocabulary.keys}")
        k = self.ttt.get("mini_batch_size", TTTConfig().mini_batch_size)
        if any(ARMS[arm].carry is not None for arm in self.arms) and self.training.chunk_frames % k:
            raise ValueError(
                f"training.chunk_frames must be a whole number of mini-batches of {k}; got "
                f"{self.training.chunk_frames}"
            )
        if self.training.max_steps <= self.training.cooldown_steps:
            raise ValueError(
                f"training.max_steps must be above training.cooldown_steps={self.training.cooldown_steps}; "
                f"got {self.training.max_steps}"
            )


@dataclass
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    speech_sha256: str
    ttt: dict[str, Any]
    size: Size
    vocabulary: Vocabulary
    training: Training
    scoring: Scoring
    version: int = VERSION

    @property
    def asked_as(self) -> list[str]:
        """Arms that are this one's trained model: itself, and those that only ask it in another way."""
        return [self.arm] + [name for name, arm in ARMS.items() if arm.trained_as == self.arm]

    @property
    def file_name(self) -> str:
        """Name of its result: the same for the same settings only."""
        definition = asdict(self) | {"definitions": [_differences(ARMS[name]) for name in self.asked_as]}
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
        return f"{self.arm}-seed{self.seed}-{digest[:12]}.json"


def _differences(arm: Arm) -> dict[str, Any]:
    """What an arm is, in the fields that are not at their defaults: a new field changes no stored result."""
    plain = asdict(Arm())
    return {name: value for name, value in asdict(arm).items() if value != plain[name]}


def jobs_of(config: RecallConfig, speech_sha256: str) -> list[Job]:
    """All jobs, seed by seed."""
    trained = dict.fromkeys(ARMS[arm].trained_as or arm for arm in config.arms)
    return [
        Job(
            arm,
            seed,
            speech_sha256,
            config.ttt,
            config.size,
            config.vocabulary,
            config.training,
            config.scoring,
        )
        for seed in range(config.seeds)
        for arm in trained
    ]
