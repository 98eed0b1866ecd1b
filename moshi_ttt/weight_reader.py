"""Weights of a model one tensor at a time, from the files that `build_model` would load whole."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.transformer import StreamingMultiheadAttention
from safetensors import safe_open

from moshi_ttt.building import WeightFiles
from moshi_ttt.parameters import named_groups

_PROJECTION = re.compile(r"(.*\.)(in|out)_projs\.(\d+)\.weight")
# Names of the joined weights of all steps in Kyutai's published checkpoints, as Moshi's load hook knows them.
_JOINED = {"in": ("in_proj_weight", "in_proj.weight"), "out": ("out_proj.weight",)}


def plain_name(name: str) -> str:
    """A parameter's name in plain Moshi: hybrid layers hold the original, LoRALinears the linear, deeper."""
    return name.replace(".original_layer.", ".").replace(".frozen_W.", ".")


class WeightReader:
    """Reads single tensors of a model from safetensors files.

    Args:
        model: the model to be filled; its parameters may be on meta.
        files: open files by group: base, and lora and ttt where there are any.
    """

    def __init__(self, model: LMModel, files: dict[str, safe_open]):
        self._files = files
        self._keys = {group: set(file.keys()) for group, file in files.items()}
        self._steps = {
            f"{plain_name(name)}.": module.mult
            for name, module in model.named_modules()
            if isinstance(module, StreamingMultiheadAttention)
        }
        self._group = {name: "ttt" if group == "gate" else group for group, name, _ in named_groups(model)}

    def has(self, name: str) -> bool:
        """Whether a file holds this parameter; buffers, and parameters that are new, are in none."""
        return self._group.get(name) in self._files

    def read(self, name: str) -> torch.Tensor:
        """The parameter of this name, on the CPU, in the file's dtype."""
        group = self._group[name]
        key, part, parts = self._place(name, self._keys[group])
        if parts == 1:
            return self._files[group].get_tensor(key)
        view = self._files[group].get_slice(key)
        rows = view.get_shape()[0] // parts
        return view[part * rows : (part + 1) * rows]

    def _place(self, name: str, keys: set[str]) -> tuple[str, int, int]:
        """Key of a parameter in its file, and which of how many parts of that tensor it is."""
        if self._group[name] == "ttt":
            return name, 0, 1
        plain = plain_name(name)
        found = _PROJECTION.fullmatch(plain)
        if plain not in keys and found is not None:
            prefix, kind, step = found.groups()
            for joined in _JOINED[kind]:
                if prefix + joined in keys:
                    return prefix + joined, int(step), self._steps[prefix]
        return plain, 0, 1

    def check(self, model: LMModel) -> None:
        """Raise ValueError unless each file holds exactly its parameters of `model`, in their shapes."""
        for group, keys in self._keys.items():
            used, missing = set(), []
            for name, parameter in model.named_parameters():
                if self._group[name] != group:
                    continue
                key, _, parts = self._place(name, keys)
                used.add(key)
                if key not in keys:
                    missing.append(key)
                    continue
                rows, *rest = self._files[group].get_slice(key).get_shape()
                if (shape := [rows // parts, *rest]) != list(parameter.shape):
                    raise ValueError(
                        f"{group} weights: {key} has shape {shape}, the settings make it "
                        f"{list(parameter.shape)}; load it with the settings it was trained with"
                    )
            extra = sorted(keys - used)
            if missing or extra:
                raise ValueError(
                    f"the {group} weights do not fit the settings: {len(missing)} tensors missing "
                    f"{missing[:3]}, {len(extra)} unexpected {extra[:3]}; load them with the settings they "
                    "were trained with"
                )


@contextmanager
def open_weights(model: LMModel, base: CheckpointInfo, weights: WeightFiles) -> Iterator[WeightReader]:
    """Open the files that `model` takes its weights from.

    Raises:
        ValueError: weights that are not safetensors.
    """
    paths: dict[str, Path | None] = {
        "base": weights.base or base.moshi_weights,
        "lora": weights.lora,
        "ttt": weights.ttt,
    }
    with ExitStack() as stack:
        files = {}
        for group, path in paths.items():
            if path is None:
                continue
            if path.suffix != ".safetensors":
                raise ValueError(f"{path} is not safetensors; pickled weights are not loaded")
            files[group] = stack.enter_context(safe_open(path, framework="pt"))
        yield WeightReader(model, files)
