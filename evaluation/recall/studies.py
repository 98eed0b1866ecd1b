"""Variations of the benchmark: which settings recall rests on, and how much fits into a memory."""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from evaluation.recall.settings import RecallConfig
from moshi_ttt.config import TTTConfig

_CAPACITY_PAIRS = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
_AT_TWO_DISTANCES = {"scoring.distances": [10.0, 50.0]}

# Taught for few steps with more pairs and questions than in the table: memories learn so faster, and what
# stands in the way shows in minutes.
_FEW = {
    "training.max_pairs": 16,
    "training.questions": 8,
    "training.max_distance_frames": 32,
    "training.batch_size": 32,
    "training.max_steps": 500,
    "training.cooldown_steps": 100,
    "scoring.distances": [10.0],
}


@dataclass
class Variant:
    """The benchmark with other settings.

    Args:
        name: for tables.
        overrides: `group.setting` of `RecallConfig` to its value.
        arms: which memories are compared under them.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("ttt_linear", "ttt_mlp")


def _one_at_a_time() -> list[Variant]:
    """The benchmark's settings of the TTT layers, and each that could stand in the way, changed alone."""
    changes: list[dict[str, Any]] = [
        *({"base_lr": value} for value in (0.1, 1.0, 32.0)),
        {"inner_init": "published"},
        *({"inner_lr_factors": value} for value in ([1.0, 0.1], [0.1, 1.0], [0.0, 1.0])),
        *({"gate_init": value} for value in (0.01, 0.1)),
        *({"mini_batch_size": value} for value in (16, 32, 64)),
        {"normalize_target": False},
        {"rope_theta": 1e30},
        {"num_heads": 1, "head_dim": 128},
        {"num_heads": 1, "head_dim": 64},
        {"num_heads": 4, "head_dim": 16},
        {"learned_token_scale": True},
        {"max_inner_change": None},
    ]
    variants = [Variant("as in the table", _FEW)]
    for change in changes:
        name = " and ".join(f"{key} {value}" for key, value in change.items())
        overrides = {f"ttt.{key}": value for key, value in change.items()}
        variant = Variant(name, _FEW | overrides)
        if "inner_init" in change or "inner_lr_factors" in change:
            variant.arms = ("ttt_mlp",)  # TTT-Linear has one layer, which starts the same either way
        variants.append(variant)
    return variants


def _model_widths() -> list[Variant]:
    """Moshis of several widths with the layer's defaults, their TTT heads 32, 64 and 128 wide.

    The learning rate falls with the width, as is usual with Adam. The widest takes smaller batches, for time.
    """
    defaults = {
        f"ttt.{key}": getattr(TTTConfig(), key) for key in ("mini_batch_size", "base_lr", "gate_init")
    }

    def width(dim: int, **more: Any) -> Variant:
        settings = {
            "size.dim": dim,
            "training.learning_rate": 3e-3 * 64 / dim,
            "training.max_steps": 1500,
        }
        return Variant(f"dim {dim} with the defaults", _FEW | settings | defaults | more)

    wide = {"ttt.num_heads": 4, "ttt.head_dim": 128, "training.batch_size": 8}
    return [width(64), width(128), width(256), width(512, **wide)]


def _inner_widths() -> list[Variant]:
    """Memories of several widths and depths, in three lessons.

    One narrow head a layer that is told up to 32 of 64 keys, more than it can hold; two heads that are told
    up to 16 of 32 keys, which most memories learn; and two heads that are told all of 32 keys.
    """
    hard = {
        "vocabulary.keys": 64,
        "training.max_pairs": 32,
        "training.questions": 16,
        "training.max_distance_frames": 32,
        "training.batch_size": 32,
        "training.max_steps": 1500,
        "training.cooldown_steps": 200,
        "training.give_up_steps": 1500,
        "scoring.distances": [10.0],
        "scoring.capacity_pairs": _CAPACITY_PAIRS,
        "ttt.mini_batch_size": 16,
        "ttt.num_heads": 1,
    }
    easy = _FEW | {
        "training.max_steps": 1000,
        "scoring.capacity_pairs": _CAPACITY_PAIRS[:8],
        "ttt.mini_batch_size": 16,
        "ttt.num_heads": 2,
    }
    long = {
        "training.max_pairs": 32,
        "training.questions": 8,
        "training.max_steps": 3000,
        "training.cooldown_steps": 600,
        "training.give_up_steps": 1500,
        "scoring.distances": [10.0],
        "scoring.capacity_pairs": _CAPACITY_PAIRS[:8],
        "ttt.num_heads": 2,
    }
    memories = ("ttt_linear", "ttt_mlp", "ttt_mlp_3")

    def of_width(name: str, lesson: dict[str, Any], width: int, *arms: str) -> Variant:
        return Variant(f"{name} of {width}", lesson | {"ttt.head_dim": width}, arms)

    return [
        *(of_width("told 32: one head", hard, width, *memories) for width in (4, 8, 16, 32)),
        *(of_width("told 16: two heads", easy, width, *memories) for width in (8, 16, 32)),
        *(of_width("told 32 for longer: two heads", long, width, "ttt_mlp") for width in (16, 32)),
    ]


def _leak() -> list[Variant]:
    """A causal and a non-causal memory after the same few steps of training."""
    few = {"training.max_steps": 600, "training.cooldown_steps": 100}
    return [Variant("600 steps", _AT_TWO_DISTANCES | few, ("ttt_mlp", "non_causal"))]


STUDIES = {
    "ablation": _one_at_a_time,
    "width": _model_widths,
    "capacity": _inner_widths,
    "leak": _leak,
}


def chosen(config: RecallConfig) -> list[Variant]:
    """Variants of the study that have any of the arms: those that are named, in that order, or all.

    Raises:
        ValueError: the study has no variant of a name, or none with these arms.
    """
    variants = {variant.name: variant for variant in STUDIES[config.study]()}
    unknown = [name for name in config.variants or [] if name not in variants]
    if unknown:
        raise ValueError(
            f"study={config.study} has the variants {'; '.join(variants)}; got {'; '.join(unknown)}"
        )
    named = [variants[name] for name in config.variants or variants]
    found = [variant for variant in named if set(variant.arms) & set(config.arms)]
    if not found:
        raise ValueError(f"study={config.study} has no variant with the arms {', '.join(config.arms)}")
    return found


def varied(config: RecallConfig, variant: Variant) -> RecallConfig:
    """`config` with a variant's settings."""
    other = deepcopy(config)
    other.arms = [arm for arm in variant.arms if arm in config.arms]
    for key, value in variant.overrides.items():
        group, name = key.split(".")
        settings = getattr(other, group)
        if isinstance(settings, dict):
            settings[name] = value
        else:
            assert name in {f.name for f in fields(settings)}, key
            setattr(settings, name, value)
    other.validate()
    return other
