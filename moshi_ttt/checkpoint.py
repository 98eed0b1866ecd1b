"""What a checkpoint is: saving, finding, verifying and loading it.

A checkpoint is the folder `RUN/checkpoints/checkpoint_000500/consolidated/` with

    training_config.json       the run's whole resolved config
    config.json                Moshi's own model config, as the moshi package reads it
    ttt.safetensors            parameters of the TTT branches, where there are any
    lora.safetensors           LoRA factors under plain Moshi's names, where there are any
    consolidated.safetensors   all base weights under plain Moshi's names, where they are not the base model's
    checkpoint.json            format version, step, the base model's and every file's SHA-256

It is written under a temporary name, synced and renamed, so that it exists whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from moshi_ttt.building import ModelSettings, WeightFiles, build_model
from moshi_ttt.digest import sha256
from moshi_ttt.integration import live_contexts, ttt_layers, verify_contexts, verify_ttt_layers
from moshi_ttt.loading import ModelConfig, base_fingerprint, find_base
from moshi_ttt.parameters import named_groups
from moshi_ttt.tensor_file import write_tensors
from moshi_ttt.whole import whole

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
TRAINING_CONFIG = "training_config.json"
MOSHI_CONFIG = "config.json"
TTT_WEIGHTS = "ttt.safetensors"
LORA_WEIGHTS = "lora.safetensors"
NOT_PLAIN = "this model has TTT layers: run it with moshi-ttt, python -m inference.generate or serve"
BASE_WEIGHTS = "consolidated.safetensors"
_TEMPORARY = "tmp."


@dataclass
class LoadedCheckpoint:
    """A model restored from a checkpoint.

    Args:
        model: in evaluation mode.
        base: the located files of its base model, for Mimi and the tokenizer.
        config: the run's resolved config.
        manifest: content of checkpoint.json.
        folder: the consolidated folder.
    """

    model: LMModel
    base: CheckpointInfo
    config: dict[str, Any]
    manifest: dict[str, Any]
    folder: Path


def checkpoint_step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"checkpoint_{step:06d}"


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """Step folders of the finished checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"checkpoint_\d{6,}", p.name)]
    return sorted((p for p in found if (p / "consolidated" / MANIFEST).is_file()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint_"))


def find_checkpoint(path: str | Path) -> Path:
    """The consolidated folder that a run, a step or a consolidated folder means. A run means its last step.

    Raises:
        ValueError: there is no checkpoint at that path.
    """
    path = Path(path).expanduser()
    for folder in (path, path / "consolidated"):
        if (folder / MANIFEST).is_file():
            return folder
    saved = saved_checkpoints(path)
    if saved:
        return saved[-1] / "consolidated"
    raise ValueError(
        f"no checkpoint at {path}: expected a run (with checkpoints/checkpoint_NNNNNN), a step "
        f"(with consolidated/) or a folder with {MANIFEST}"
    )


def moshi_name(name: str) -> str:
    """A parameter's name in plain Moshi: hybrid layers hold the original one level deeper."""
    return name.replace(".original_layer.", ".")


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: LMModel,
    training_config: dict[str, Any],
    base: CheckpointInfo,
    save_base: bool,
    keep: int | None = None,
    weights: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a checkpoint, then delete the oldest but `keep`.

    Args:
        run_dir: the run's folder.
        step: training steps done.
        model: the model.
        training_config: the run's resolved config, plain values; it must describe `model`.
        base: the base model that `model` was built on.
        save_base: also write all base weights, because they differ from the base model's.
        keep: how many checkpoints to keep; None keeps all.
        weights: what `weight_files` gathered of a model whose parameters are split over processes.
    Returns:
        The consolidated folder.
    """
    temporary = begin_checkpoint(run_dir, step)
    files = weight_files(model, save_base) if weights is None else weights
    write_consolidated(
        temporary / "consolidated",
        step,
        moshi_config(model, training_config, base),
        training_config,
        base,
        files,
    )
    return finish_checkpoint(temporary, keep) / "consolidated"


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make the folder, under its temporary name, that a checkpoint is written in."""
    final = checkpoint_step_folder(run_dir, step)
    if final.exists():
        raise ValueError(f"checkpoint {final} exists; a step is saved once")
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def write_consolidated(
    folder: Path,
    step: int,
    model_config: dict[str, Any],
    training_config: dict[str, Any],
    base: CheckpointInfo,
    weights: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Write a consolidated folder.

    Args:
        model_config: what `moshi_config` made of the model.
        weights: what `weight_files` gathered of it.
    """
    folder.mkdir()
    _write_json(folder / TRAINING_CONFIG, training_config)
    _write_json(folder / MOSHI_CONFIG, model_config)
    for name, tensors in weights.items():
        write_tensors(folder / name, tensors)
    source = training_config["model"]
    manifest = {
        "step": step,
        "base": {
            "source": source["source"],
            "revision": source["revision"],
            "sha256": base_fingerprint(base),
        },
        "torch": torch.__version__,
    }
    write_manifest(folder / MANIFEST, manifest, {p.name: file_entry(p) for p in sorted(folder.iterdir())})


def finish_checkpoint(temporary: Path, keep: int | None = None) -> Path:
    """Give a checkpoint that is written its name, then delete the oldest but `keep`; returns its folder."""
    assert keep is None or keep >= 1
    folders = [temporary, *(p for p in temporary.iterdir() if p.is_dir())]
    sync([path for folder in folders for path in folder.iterdir() if path.is_file()])
    sync(folders)
    final = temporary.with_name(temporary.name.removeprefix(_TEMPORARY))
    temporary.rename(final)
    sync([final.parent])
    if keep is not None:
        for old in saved_checkpoints(final.parents[1])[:-keep]:
            # Under a temporary name first: what is half deleted must not look like a checkpoint.
            leaving = old.rename(old.with_name(f"{_TEMPORARY}{old.name}"))
            shutil.rmtree(leaving)
    return final


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a process that was killed while saving, or while deleting, has left."""
    for folder in (run_dir / "checkpoints").glob(f"{_TEMPORARY}checkpoint_*"):
        shutil.rmtree(folder)


def weight_files(model: LMModel, save_base: bool, collect: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of each weight file of a checkpoint of `model`, on the CPU.

    Args:
        save_base: also the base weights.
        collect: false in processes that only take part in gathering parameters split over processes, which
            goes tensor by tensor: they get no files.
    """
    files: dict[str, dict[str, torch.Tensor]] = {TTT_WEIGHTS: {}, LORA_WEIGHTS: {}, BASE_WEIGHTS: {}}
    for group, name, parameter in named_groups(model):
        if group in ("ttt", "gate"):
            file = TTT_WEIGHTS
        elif group == "lora":
            file, name = LORA_WEIGHTS, moshi_name(name)
        elif save_base:
            # A LoRALinear keeps the base weight as frozen_W; Moshi knows it as the linear's own.
            file, name = BASE_WEIGHTS, moshi_name(name).replace(".frozen_W.", ".")
        else:
            continue
        tensor = whole(parameter.detach())
        if collect:
            files[file][name] = tensor.cpu().clone().contiguous()
    return {file: tensors for file, tensors in files.items() if tensors}


def moshi_config(model: LMModel, training_config: dict[str, Any], base: CheckpointInfo) -> dict[str, Any]:
    """Moshi's own config of the model, which `python -m moshi.server --config-path` reads."""
    config = dict(base.raw_config if base.raw_config is not None else loaders._lm_kwargs)
    lora = training_config["lora"]
    config |= {"lora": lora["enable"], "lora_rank": lora["rank"], "lora_scaling": lora["scaling"]}
    if ttt_layers(model):
        # The moshi package refuses a key that it does not know, and prints it.
        config[NOT_PLAIN] = True
    else:
        config["context"] = live_contexts(model)[False][0]
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(path: Path, content: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write what `verify_files` reads: `content`, and what its folder holds beside it."""
    manifest = {"format_version": FORMAT_VERSION, **content, "files": files}
    _write_json(path, manifest | {"self_sha256": _self_digest(manifest)})


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def verify_files(folder: Path, manifest_name: str = MANIFEST, share: slice = slice(None)) -> dict[str, Any]:
    """Check that a folder is whole and unchanged, and return its manifest.

    Args:
        manifest_name: the file in it that lists the others.
        share: which files' sums this process checks, where several divide them.
    Raises:
        ValueError: names the file that is missing, extra, truncated or changed, or the newer format.
    """
    manifest = _read_manifest(folder / manifest_name)
    present = {p.name for p in folder.iterdir()} - {manifest_name}
    missing, extra = sorted(manifest["files"].keys() - present), sorted(present - manifest["files"].keys())
    if missing or extra:
        raise ValueError(
            f"{folder} is not the checkpoint that was saved: missing files {missing}, extra files {extra}"
        )
    for name, expected in sorted(manifest["files"].items())[share]:
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(
                f"{folder / name} has {size} bytes, expected {expected['bytes']}: cut short or replaced"
            )
        if sha256(folder / name) != expected["sha256"]:
            raise ValueError(f"{folder / name} was changed after it was saved: its SHA-256 differs")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another checkpoint") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged (no object); use another checkpoint")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path.parent} has checkpoint format {version}, this release reads format {FORMAT_VERSION}; "
            "use the release that wrote it, or a newer one"
        )
    recorded = manifest.pop("self_sha256", None)
    if recorded != _self_digest(manifest):
        raise ValueError(f"{path} was changed after it was written; use another checkpoint")
    return manifest


def read_training_config(folder: Path) -> dict[str, Any]:
    """The resolved config that a checkpoint was trained with."""
    return json.loads((folder / TRAINING_CONFIG).read_text())


def weight_paths(folder: Path) -> WeightFiles:
    """Weight files that a consolidated folder holds."""

    def existing(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return WeightFiles(existing(BASE_WEIGHTS), existing(LORA_WEIGHTS), existing(TTT_WEIGHTS))


def load_checkpoint(
    path: str | Path,
    device: torch.device | str = "cpu",
    verify: str = "cached",
    base_source: str | None = None,
) -> LoadedCheckpoint:
    """Restore the model of a checkpoint with the settings it was trained with.

    Args:
        path: a run, a step or a consolidated folder.
        device: where to put the model.
        verify: "cached" trusts remembered digests of unchanged base model files; "full" reads them again.
        base_source: another place with the same base model files, a hub repo or folder.
    Raises:
        ValueError: anything about the checkpoint or its base model is not as it was saved.
    """
    if verify not in ("cached", "full"):
        raise ValueError(f"verify must be cached or full, got {verify!r}")
    folder = find_checkpoint(path)
    manifest = verify_files(folder)
    config = read_training_config(folder)
    settings = ModelSettings.from_config(config)
    base = find_base(settings.model if base_source is None else ModelConfig(base_source))
    _verify_base(folder, manifest, base, verify == "full")
    weights = weight_paths(folder)
    if settings.ttt.enable and weights.ttt is None:
        raise ValueError(f"{folder} was trained with TTT but holds no {TTT_WEIGHTS}")
    model = build_model(settings, base, device, weights)
    verify_ttt_layers(model, settings.ttt)
    verify_contexts(model, settings.ttt)
    return LoadedCheckpoint(model, base, config, manifest, folder)


def _verify_base(folder: Path, manifest: dict[str, Any], base: CheckpointInfo, force: bool) -> None:
    found, expected = base_fingerprint(base, force), manifest["base"]["sha256"]
    for name, digest in expected.items():
        if found[name] != digest:
            raise ValueError(
                f"{folder} was trained on another base model: the {name} file of "
                f"{manifest['base']['source']} has SHA-256 {found[name][:12]}, expected {digest[:12]}. Set "
                "model.revision to the one it was trained on, or restore the original files"
            )
