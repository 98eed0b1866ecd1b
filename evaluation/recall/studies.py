"""Variations of the benchmark: which settings recall rests on, and how much fits into a memory."""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from evaluation.recall.settings import RecallConfig

_CAPACITY_PAIRS = [1, 2, 4, 8, 12, 16, 24, 32]


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
    """The defaults of the TTT layers, and each setting that could stand in the way, changed alone."""
    changes: list[dict[str, Any]] = [
        *({"base_lr": value} for value in (0.1, 1.0, 32.0)),
        *({"mini_batch_size": value} for value in (4, 16, 32, 64)),
        *({"gate_init": value} for value in (0.01, 0.1)),
        {"inner_init": "published"},
        {"normalize_target": False},
        {"rope_theta": 1e30},
        {"learned_token_scale": True},
        {"max_inner_change": None},
        {"num_heads": 4, "head_dim": 16},
        {"num_heads": 1, "head_dim": 64},
        {"num_heads": 1, "head_dim": 128},
    ]
    variants = [Variant("as in the table")]
    for change in changes:
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        variants.append(Variant(name, {f"ttt.{key}": value for key, value in change.items()}))
    return variants


def _widths() -> list[Variant]:
    """Memories of three widths, taught and asked up to as many pairs as there are keys."""
    asked = {
        "training.max_pairs": _CAPACITY_PAIRS[-1],
        "training.questions": 8,
        "scoring.distances": [10.0],
        "scoring.capacity_pairs": _CAPACITY_PAIRS,
    }
    arms = ("ttt_linear", "ttt_mlp", "ttt_mlp_3")
    return [
        Variant(f"heads of {width}", asked | {"ttt.head_dim": width, "ttt.num_heads": 2}, arms)
        for width in (16, 32, 64)
    ]


STUDIES = {
    "ablation": _one_at_a_time,
    "capacity": _widths,
}


def varied(config: RecallConfig, variant: Variant) -> RecallConfig:
    """`config` with a variant's settings."""
    other = deepcopy(config)
    other.arms = list(variant.arms)
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
