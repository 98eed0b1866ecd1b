"""Base models: Moshi, Mimi and the text tokenizer, from a hub repository or a folder in the hub's layout."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import MIMI_NAME, MOSHI_NAME, TEXT_TOKENIZER_NAME, CheckpointInfo

from moshi_ttt.digest import cached_sha256
from moshi_ttt.tiny_model import tiny_model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ModelConfig:
    """Which base model. Field names are those of the configuration group `model`."""

    source: str = "kyutai/moshiko-pytorch-bf16"
    """A hub repository id, a folder with the same files, or "tiny": a deterministic small Moshi, Mimi and
    tokenizer made on this machine, with random weights, to try and test things with."""

    revision: str | None = None
    """Branch, tag or commit of the hub repository. None is its main branch."""


def find_base(config: ModelConfig) -> CheckpointInfo:
    """Locate (and for a repository, download) the files of a base model.

    Raises:
        ValueError: the source is none of the three, or its folder lacks a file.
    """
    if config.source == "tiny":
        return _from_folder(tiny_model_folder())
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        if config.revision is not None:
            raise ValueError(f"model.revision={config.revision!r} has no meaning for the folder {folder}")
        return _from_folder(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.source):
        return CheckpointInfo.from_hf_repo(config.source, revision=config.revision)
    raise ValueError(
        f'model.source={config.source!r} is no folder here and no hub repository id; expected "tiny", a '
        "folder with config.json and model.safetensors, or an id like kyutai/moshiko-pytorch-bf16"
    )


def find_lm_config(config: ModelConfig) -> dict[str, Any] | None:
    """Sizes of a base model's LM, without fetching weights. None means Moshi 7B's.

    A repository without config.json, or one that cannot be reached, is taken for a Moshi 7B, with a warning.
    """
    if config.source == "tiny" or Path(config.source).expanduser().is_dir():
        return find_base(config).lm_config
    unused = Path("not-fetched")
    info = CheckpointInfo.from_hf_repo(
        config.source, unused, unused, unused, lora_weights=unused, revision=config.revision
    )
    return info.lm_config


def _from_folder(folder: Path) -> CheckpointInfo:
    config_path = folder / "config.json"
    if not config_path.is_file():  # the oldest repository has none: it is Moshi 7B
        names = {"moshi": MOSHI_NAME, "mimi": MIMI_NAME, "tokenizer": TEXT_TOKENIZER_NAME}
        paths = {key: _inside(folder, name) for key, name in names.items()}
        return CheckpointInfo(paths["moshi"], paths["mimi"], paths["tokenizer"])
    raw = json.loads(config_path.read_text())
    mimi_config_name = raw.get("mimi_config_name")
    lora_name = raw.get("lora_name")
    return CheckpointInfo.from_hf_repo(
        str(folder),
        moshi_weights=_inside(folder, raw.get("moshi_name", MOSHI_NAME)),
        mimi_weights=_inside(folder, raw.get("mimi_name", MIMI_NAME)),
        tokenizer=_inside(folder, raw.get("tokenizer_name", TEXT_TOKENIZER_NAME)),
        config_path=config_path,
        mimi_config_path=_inside(folder, mimi_config_name) if mimi_config_name else None,
        lora_weights=_inside(folder, lora_name) if lora_name else None,
    )


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"the model folder {folder} lacks the file {name}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder / 'config.json'} names {name!r}, which is outside the model's folder")
    return path


def load_moshi(base: CheckpointInfo, device: torch.device | str, dtype: torch.dtype) -> LMModel:
    """The plain Moshi of a base model.

    Raises:
        ValueError: a model that is not a dialogue model (it needs conditions, or makes no audio), or whose
            weights could run code when loaded.
    """
    if base.moshi_weights.suffix != ".safetensors":
        raise ValueError(f"{base.moshi_weights} is not safetensors; pickled weights are not loaded")
    model = base.get_moshi(device=device, dtype=dtype)
    refuse_other_models(model)
    return model


def refuse_other_models(model: LMModel) -> None:
    """Raise ValueError for a model that is not a Moshi dialogue model."""
    if model.fuser is not None or model.depformer is None:
        raise ValueError(
            "this base model is not a Moshi dialogue model (it needs conditions or has no audio output); "
            "expected something like kyutai/moshiko-pytorch-bf16"
        )


def load_mimi(base: CheckpointInfo, device: torch.device | str) -> MimiModel:
    """The audio codec of a base model, frozen, in float32."""
    if base.mimi_weights.suffix != ".safetensors":
        raise ValueError(f"{base.mimi_weights} is not safetensors; pickled weights are not loaded")
    mimi = base.get_mimi(device=device)
    mimi.requires_grad_(False)
    return mimi.eval()


def load_tokenizer(base: CheckpointInfo) -> sentencepiece.SentencePieceProcessor:
    """The text tokenizer of a base model."""
    return base.get_text_tokenizer()


def base_fingerprint(base: CheckpointInfo, force: bool = False) -> dict[str, str]:
    """SHA-256 of each file that makes a base model what it is.

    Args:
        force: read every file even if its digest is remembered on this host.
    """
    files = {"moshi": base.moshi_weights, "mimi": base.mimi_weights, "tokenizer": base.tokenizer}
    return {name: cached_sha256(Path(path), force) for name, path in files.items()}
