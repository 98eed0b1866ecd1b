"""The models of a run: a checkpoint, and the Moshi that is its baseline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from evaluation.long_context.settings import LongContextConfig
from evaluation.model_identity import baseline_identity, checkpoint_identity, digest_of
from moshi_ttt.checkpoint import find_checkpoint, load_checkpoint, read_training_config, saved_checkpoints
from moshi_ttt.integration import live_contexts, receptive_field, ttt_layers
from moshi_ttt.loading import DTYPES, ModelConfig, base_fingerprint, find_base, load_moshi


@dataclass(frozen=True)
class Wanted:
    """A model to be scored.

    Args:
        memories: its arms.
        checkpoint: of ours; None for a Moshi from a repository or folder.
        source: of a Moshi.
        dtype: of a Moshi.
    """

    memories: list[str]
    checkpoint: str | None
    source: ModelConfig | None = None
    dtype: str = "bfloat16"


@dataclass
class Opened:
    """A model in memory.

    Args:
        base: files of the base model: the codec's and the tokenizer's.
        identity: all that decides its outputs.
        about: what it is, for people.
    """

    model: LMModel
    base: CheckpointInfo
    identity: dict[str, Any]
    about: dict[str, Any]


def models_of(config: LongContextConfig) -> list[Wanted]:
    """The models of a run and their arms; the one with TTT first.

    Raises:
        ValueError: arms that the models do not have, or a baseline that cannot be one.
    """
    dtype = config.param_dtype or "bfloat16"
    if config.checkpoint is None:
        assert config.baseline is not None
        return [_baseline(config, config.baseline, dtype)]
    trained = read_training_config(find_checkpoint(config.checkpoint))
    has_ttt = trained["ttt"]["enable"]
    memories = config.memories(has_ttt, True)
    if not has_ttt:
        if config.baseline is not None:
            raise ValueError(
                f"{config.checkpoint} has no TTT layers, so it is the baseline itself; drop baseline="
            )
        return [Wanted(memories, config.checkpoint)]
    wanted = [Wanted([m for m in memories if m != "base"], config.checkpoint)]
    if "base" in memories:
        dtype = config.param_dtype or trained["param_dtype"]
        if config.baseline is None:
            wanted.append(Wanted(["base"], None, ModelConfig(**trained["model"]), dtype))
        else:
            wanted.append(_baseline(config, config.baseline, dtype))
    return [model for model in wanted if model.memories]


def _baseline(config: LongContextConfig, path: str, dtype: str) -> Wanted:
    memories = ["base"] if config.checkpoint is not None else config.memories(False, True)
    if not _is_checkpoint(path):
        return Wanted(memories, None, ModelConfig(path), dtype)
    if read_training_config(find_checkpoint(path))["ttt"]["enable"]:
        raise ValueError(
            f"baseline={path} has TTT layers; expected a Moshi or a checkpoint without TTT (one with TTT "
            "goes to checkpoint=)"
        )
    return Wanted(memories, path)


def _is_checkpoint(path: str) -> bool:
    place = Path(path).expanduser()
    held = (place / "checkpoint.json", place / "consolidated" / "checkpoint.json")
    return any(file.is_file() for file in held) or bool(saved_checkpoints(place))


def open_model(wanted: Wanted, device: torch.device) -> Opened:
    """Load a model."""
    if wanted.checkpoint is None:
        assert wanted.source is not None
        base = find_base(wanted.source)
        model = load_moshi(base, device, DTYPES[wanted.dtype]).eval()
        fingerprint = base_fingerprint(base)
        about: dict[str, Any] = {"model": wanted.source.source}
        about["sha256"] = digest_of(baseline_identity(fingerprint))
        identity: dict[str, Any] = {"base": fingerprint, "dtype": wanted.dtype}
    else:
        loaded = load_checkpoint(wanted.checkpoint, device)
        model, base = loaded.model, loaded.base
        about = {"checkpoint": Path(loaded.folder).as_posix(), "step": loaded.manifest["step"]}
        about["sha256"] = digest_of(checkpoint_identity(loaded.manifest))
        identity = {"base": loaded.manifest["base"]["sha256"], "files": loaded.manifest["files"]}
    about |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "param_dtype": str(model.dtype).removeprefix("torch."),
        "ttt_layers": [index for index, _ in ttt_layers(model)],
        **reach_of(model),
    }
    return Opened(model, base, identity, about)


def reach_of(model: LMModel) -> dict[str, Any]:
    """How far attention sees as the model is now, in frames."""
    live = live_contexts(model)
    return {
        "windows_frames": sorted({*live[True], *live[False]}),
        "receptive_field_frames": receptive_field(model),
    }


def refuse_other_codec(checkpoint: dict[str, str], baseline: dict[str, str]) -> None:
    """Raise ValueError unless both base models have one codec and text vocabulary.

    Args:
        checkpoint, baseline: sums of their files.
    """
    for part in ("mimi", "tokenizer"):
        if checkpoint[part] != baseline[part]:
            raise ValueError(
                f"checkpoint and baseline have another {part}, so they do not predict the same codes; give a "
                f"baseline with the checkpoint's {part}"
            )
