"""Starting a run from the weights of another: a checkpoint of ours, or one of moshi-finetune."""

import json
from dataclasses import dataclass
from pathlib import Path

from moshi_ttt.building import ModelSettings, WeightFiles
from moshi_ttt.checkpoint import (
    BASE_WEIGHTS,
    LORA_WEIGHTS,
    MOSHI_CONFIG,
    find_checkpoint,
    read_training_config,
    saved_checkpoints,
    verify_files,
    weight_paths,
)
from moshi_ttt.loading import base_fingerprint, find_base


@dataclass
class WarmStart:
    """Where initial weights come from.

    Args:
        weights: files to load over the base model.
        description: what was found, for the log.
    """

    weights: WeightFiles
    description: str


def find_warm_start(path: str, settings: ModelSettings) -> WarmStart:
    """Weights at `path` for a run with `settings`; contexts, optimiser and data may differ from theirs.

    Raises:
        ValueError: there are no weights, or they would not all be used.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"init_from={path} is no folder")
    for candidate in (folder, folder / "consolidated"):
        if (candidate / MOSHI_CONFIG).is_file() and not (candidate / "checkpoint.json").is_file():
            return _from_moshi_finetune(candidate, settings)
    return _from_checkpoint(find_checkpoint(folder), settings)


def holds_base_weights(path: str) -> bool:
    """Whether a run that starts from `path` has base weights of its own, to save with every checkpoint."""
    folder = Path(path).expanduser()
    if not (folder / BASE_WEIGHTS).is_file() and not (folder / "consolidated" / BASE_WEIGHTS).is_file():
        saved = saved_checkpoints(folder)
        return bool(saved) and (saved[-1] / "consolidated" / BASE_WEIGHTS).is_file()
    return True


def _from_checkpoint(folder: Path, settings: ModelSettings) -> WarmStart:
    manifest = verify_files(folder)
    weights = weight_paths(folder)
    trained = ModelSettings.from_config(read_training_config(folder))
    if weights.base is None:
        found = base_fingerprint(find_base(settings.model))["moshi"]
        if found != manifest["base"]["sha256"]["moshi"]:
            raise ValueError(
                f"init_from={folder} was trained on {trained.model.source}, this run's base model "
                f"{settings.model.source} is another; set model to the one it was trained on"
            )
    if weights.lora is not None:
        _check_lora(folder, trained.lora.rank, trained.lora.scaling, settings)
    if weights.ttt is not None and not settings.ttt.enable:
        raise ValueError(f"init_from={folder} holds TTT layers; set ttt.enable=true to use them")
    parts = ", ".join(p.name for p in (weights.base, weights.lora, weights.ttt) if p is not None)
    return WarmStart(weights, f"step {manifest['step']} of {folder} ({parts})")


def _from_moshi_finetune(folder: Path, settings: ModelSettings) -> WarmStart:
    config = json.loads((folder / MOSHI_CONFIG).read_text())
    lora, full = folder / LORA_WEIGHTS, folder / BASE_WEIGHTS
    if lora.is_file():
        for key in ("lora_rank", "lora_scaling"):
            if key not in config:
                raise ValueError(f"{folder / MOSHI_CONFIG} has no {key}; is it a moshi-finetune checkpoint?")
        _check_lora(folder, config["lora_rank"], config["lora_scaling"], settings)
        return WarmStart(WeightFiles(lora=lora), f"moshi-finetune LoRA checkpoint {folder}")
    if full.is_file():
        return WarmStart(WeightFiles(base=full), f"moshi-finetune checkpoint {folder}")
    raise ValueError(f"init_from={folder} holds neither {LORA_WEIGHTS} nor {BASE_WEIGHTS}")


def _check_lora(folder: Path, rank: int, scaling: float, settings: ModelSettings) -> None:
    if not settings.lora.enable or (settings.lora.rank, settings.lora.scaling) != (rank, scaling):
        raise ValueError(
            f"init_from={folder} holds LoRA weights of rank {rank} and scaling {scaling:g}; set "
            f"lora.enable=true lora.rank={rank} lora.scaling={scaling:g} to use them"
        )
