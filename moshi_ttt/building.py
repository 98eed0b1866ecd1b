"""A model from its settings: base Moshi, then LoRA, then TTT, each with weights of a checkpoint or fresh."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import load_file

from moshi_ttt.config import TTTConfig
from moshi_ttt.integration import apply_ttt_to_model, ttt_layers
from moshi_ttt.loading import DTYPES, ModelConfig, load_moshi
from moshi_ttt.lora import LoRAConfig, apply_lora_to_model, lora_modules


@dataclass
class ModelSettings:
    """Everything that decides what a model is, apart from its weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    param_dtype: str = "bfloat16"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)

    @staticmethod
    def from_config(config: dict[str, Any]) -> "ModelSettings":
        """The settings in a resolved training config, as `training_config.json` holds it.

        Raises:
            ValueError: a section or a key is missing or unknown.
        """
        for key in ("model", "param_dtype", "lora", "ttt"):
            if key not in config:
                raise ValueError(
                    f"the training config has no {key!r}; expected model, param_dtype, lora, ttt"
                )
        return ModelSettings(
            _section("model", ModelConfig, config["model"]),
            config["param_dtype"],
            _section("lora", LoRAConfig, config["lora"]),
            _section("ttt", TTTConfig, config["ttt"]),
        )

    @property
    def dtype(self) -> torch.dtype:
        if self.param_dtype not in DTYPES:
            raise ValueError(f"param_dtype must be one of {', '.join(DTYPES)}; got {self.param_dtype!r}")
        return DTYPES[self.param_dtype]


def _section(name: str, kind: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    if set(values) != known:
        raise ValueError(
            f"section {name!r} of the training config does not fit this release: missing "
            f"{sorted(known - set(values))}, unknown {sorted(set(values) - known)}"
        )
    return kind(**values)


@dataclass
class WeightFiles:
    """safetensors files to load over the base model; None leaves a part as the base has it, or fresh."""

    base: Path | None = None
    lora: Path | None = None
    ttt: Path | None = None


def build_model(
    settings: ModelSettings,
    base: CheckpointInfo,
    device: torch.device | str = "cpu",
    weights: WeightFiles | None = None,
) -> LMModel:
    """Build the model that `settings` describe.

    Args:
        settings: what to build.
        base: the located base model.
        device: where to put it.
        weights: files of a checkpoint. Names in base and LoRA files are plain Moshi's.
    Returns:
        The model in evaluation mode; all parameters as their groups start, nothing frozen yet.
    Raises:
        ValueError: settings that cannot work, or a file whose tensors are not exactly those expected.
    """
    weights = weights or WeightFiles()
    if weights.base is not None:
        base = replace(base, moshi_weights=weights.base)
    model = load_moshi(base, device, settings.dtype)
    if settings.lora.enable:
        apply_lora_to_model(model, settings.lora)
        names = {
            f"{name}.{factor}.weight" for name, _ in lora_modules(model) for factor in ("lora_A", "lora_B")
        }
        if weights.lora is not None:
            _load_part(model, names, weights.lora)
    elif weights.lora is not None:
        raise ValueError(f"{weights.lora} holds LoRA weights; set lora.enable=true to use them")
    apply_ttt_to_model(model, settings.ttt)
    if weights.ttt is not None:
        _load_part(model, set(ttt_parameter_names(model)), weights.ttt)
    return model.eval()


def ttt_parameter_names(model: LMModel) -> list[str]:
    """Names of the parameters of all TTT branches."""
    names = []
    for index, layer in ttt_layers(model):
        prefix = f"transformer.layers.{index}.seq_modeling_block."
        names += [prefix + name for name, _ in layer.seq_modeling_block.named_parameters()]
    return names


def _load_part(model: LMModel, expected: set[str], path: Path) -> None:
    """Load the tensors of `path`, which must be exactly the parameters `expected`, with their shapes."""
    state = load_file(path, device=str(model.device))
    live = dict(model.named_parameters())
    for name, tensor in state.items():
        if name in live and live[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, the settings make it "
                f"{list(live[name].shape)}; load it with the settings it was trained with"
            )
    before = set(live)
    result = model.load_state_dict(state, strict=False)
    missing = sorted(set(result.missing_keys) & expected)
    extra = sorted(set(result.unexpected_keys) | ((before - set(result.missing_keys)) - expected))
    if missing or extra:
        raise ValueError(
            f"{path} does not fit the settings: {len(missing)} tensors missing {missing[:3]}, {len(extra)} "
            f"unexpected {extra[:3]}; load it with the settings it was trained with"
        )
