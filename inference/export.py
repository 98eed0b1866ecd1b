"""`python -m inference.export checkpoint=RUN output=FOLDER [push=ORG/NAME]`: weights for others to use.

LoRA factors are merged into the base weights. Without TTT layers the folder is a plain Moshi, as the moshi
package reads it; with them it is a checkpoint of ours. Each has a model card. `fetch=ORG/NAME output=FOLDER`
brings one back from the hub, and checks it.
"""

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from huggingface_hub import HfApi, snapshot_download
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from inference.model_card import model_card
from moshi_ttt.checkpoint import (
    BASE_WEIGHTS,
    LoadedCheckpoint,
    find_checkpoint,
    load_checkpoint,
    moshi_config,
    verify_files,
    weight_files,
    write_consolidated,
)
from moshi_ttt.integration import ttt_layers
from moshi_ttt.lora import merge_lora
from moshi_ttt.tensor_file import write_tensors

logger = logging.getLogger(__name__)

# Sections of a training config that say nothing of the machine it ran on.
PUBLIC = (
    *("mode", "model", "ttt", "lora", "optim", "param_dtype", "duration_sec", "batch_size"),
    *("num_microbatches", "max_steps", "seed", "first_codebook_weight_multiplier", "text_padding_weight"),
)
PUBLIC_DATA = ("keep_main_only", "main_speaker", "use_bos_eos", "keep_and_shift", "audio_delay_sec")


@dataclass
class ExportConfig:
    """Weights for others to use."""

    output: str = MISSING
    """Folder to make."""

    checkpoint: str | None = None
    """A run, a step or a consolidated folder."""

    push: str | None = None
    """Hub repository to upload the folder to, as ORG/NAME; it is made where there is none. The token is that
    of `hf auth login`, or HF_TOKEN."""

    private: bool = True
    """Whether a repository that is made is private."""

    fetch: str | None = None
    """Hub repository to download into the folder instead."""

    revision: str | None = None
    """Of the repository to fetch."""

    base: str | None = None
    """Hub repository to name as the base model, where the checkpoint was trained on a local folder: the same
    files, by SHA-256."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def export(config: ExportConfig) -> Path:
    """Make the folder, and push it if asked to.

    Raises:
        ValueError: the settings cannot work together, or the folder exists.
    """
    if (config.checkpoint is None) == (config.fetch is None):
        raise ValueError("give either checkpoint=RUN to export or fetch=ORG/NAME to download")
    if config.fetch is not None and config.push is not None:
        raise ValueError("fetch and push exclude each other")
    output = Path(config.output).expanduser()
    if output.exists():
        raise ValueError(f"{output} exists; choose another output")
    if config.fetch is not None:
        return fetch(config.fetch, config.revision, output)
    assert config.checkpoint is not None
    loaded = load_checkpoint(config.checkpoint, "cpu", config.verify, config.base)
    _refuse_local_base(loaded, config)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    merged = merge_lora(loaded.model)
    logger.info("merged %d LoRA layers into the base weights", merged)
    training = public_config(loaded.config, config.base)
    if ttt_layers(loaded.model):
        _write_checkpoint(unfinished, loaded, training)
    else:
        _write_moshi(unfinished, loaded, training)
    card = model_card(training, loaded.manifest, config.push, bool(ttt_layers(loaded.model)))
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    unfinished.rename(output)
    logger.info("wrote %s: %s", output, ", ".join(sorted(p.name for p in output.rglob("*") if p.is_file())))
    if config.push is not None:
        push(output, config.push, config.private)
    return output


def _refuse_local_base(loaded: LoadedCheckpoint, config: ExportConfig) -> None:
    source = loaded.config["model"]["source"]
    local = source == "tiny" or Path(source).expanduser().is_dir()
    if config.push is not None and config.base is None and local and ttt_layers(loaded.model):
        raise ValueError(
            f"the checkpoint's base model is {source}, which nobody who downloads it has; name the hub "
            "repository with the same files as base=ORG/NAME"
        )


def public_config(training: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The training config without LoRA, which is merged, and without paths and names of its machine."""
    kept = {name: training[name] for name in PUBLIC if name in training}
    kept["data"] = {name: training["data"][name] for name in PUBLIC_DATA if name in training.get("data", {})}
    kept["lora"] = {**training["lora"], "enable": False}
    kept["trained_lora"] = training["lora"]
    if base is not None:
        kept["model"] = {"source": base, "revision": None}
    return kept


def _write_checkpoint(folder: Path, loaded: LoadedCheckpoint, training: dict[str, Any]) -> None:
    config = moshi_config(loaded.model, training, loaded.base)
    weights = weight_files(loaded.model, save_base=True)
    step = loaded.manifest["step"]
    write_consolidated(folder / "consolidated", step, config, training, loaded.base, weights)


def _write_moshi(folder: Path, loaded: LoadedCheckpoint, training: dict[str, Any]) -> None:
    """A folder with everything that the moshi package asks for."""
    config, base = moshi_config(loaded.model, training, loaded.base), loaded.base
    for key in ("lora_rank", "lora_scaling", "lora_name"):
        config.pop(key, None)
    config |= {"lora": False, "moshi_name": "model.safetensors"}
    config |= {"mimi_name": base.mimi_weights.name, "tokenizer_name": base.tokenizer.name}
    if base.mimi_config is not None:
        config["mimi_config_name"] = "mimi_config.json"
        (folder / "mimi_config.json").write_text(json.dumps(base.mimi_config, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / "model.safetensors", weight_files(loaded.model, save_base=True)[BASE_WEIGHTS])
    for file in (base.mimi_weights, base.tokenizer):
        shutil.copyfile(file, folder / file.name)


def push(folder: Path, repo: str, private: bool) -> None:
    """Upload a folder to a hub repository."""
    hub = HfApi()
    hub.create_repo(repo, private=private, exist_ok=True)
    commit = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of moshi-ttt")
    logger.info("pushed to %s", commit.commit_url)


def fetch(repo: str, revision: str | None, output: Path) -> Path:
    """Download a repository that `push` filled.

    Raises:
        ValueError: a checkpoint in it is not as it was written.
    """
    snapshot_download(repo, revision=revision, local_dir=output)
    if (output / "consolidated").is_dir():
        verify_files(find_checkpoint(output))
        logger.info("%s holds a checkpoint, and every file is as it was written", output)
    else:
        logger.info("%s holds a plain Moshi: use it as model.source, or with the moshi package", output)
    return output


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="export")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    export(typed_config(config, ExportConfig))


if __name__ == "__main__":
    main()
