"""LoRA on Moshi's linear layers, with Moshi's own `LoRALinear` so that checkpoints stay interchangeable."""

import math
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch import nn

from moshi_ttt.integration import ttt_layers


@dataclass
class LoRAConfig:
    """Settings of the low-rank adapters. Field names are those of the configuration group `lora`."""

    enable: bool = False
    """Wrap every linear layer of Moshi (never those of TTT layers) in a LoRALinear."""

    rank: int = 128
    """Rank of the update. moshi-finetune recommends up to 128."""

    scaling: float = 2.0
    """Factor on the update. Keep it at 2 and sweep the learning rate instead."""

    def validate(self) -> None:
        """Raise ValueError for a rank or scaling that cannot work."""
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if not self.scaling > 0:
            raise ValueError(f"lora.scaling must be above 0, got {self.scaling}")


def lora_modules(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """The LoRALinear modules of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


@torch.no_grad()
def apply_lora_to_model(model: LMModel, config: LoRAConfig, device: torch.device | None = None) -> LMModel:
    """Wrap the linear layers of a plain Moshi, in place. The update starts as 0 (B = 0).

    Args:
        model (LMModel): a Moshi without TTT layers: LoRA comes first, so that it can never wrap them.
        config (LoRAConfig): rank and scaling.
        device: where to put the factors, if not where the model's weights are. On meta they get no numbers.
    Raises:
        ValueError: settings that cannot work, or a model that has TTT or LoRA already.
    """
    config.validate()
    if ttt_layers(model):
        raise ValueError("apply LoRA before TTT: it must not wrap the layers of TTT")
    if lora_modules(model):
        raise ValueError("this model has LoRA already")
    replace_all_linear_with_lora(model, config.rank, config.scaling, device=device)
    for _, module in lora_modules(model):
        nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(module.lora_B.weight)
    return model


@torch.no_grad()
def merge_lora(model: LMModel) -> int:
    """Put plain linear layers with the merged weights in the place of all LoRALinear ones.

    Sums are taken in float32 and rounded once, and biases stay: Moshi's merge rounds twice and drops them.

    Returns:
        How many there were.
    """
    found = lora_modules(model)
    for name, lora in found:
        base = lora.frozen_W
        update = lora.lora_B.weight.float() @ lora.lora_A.weight.float()
        base.weight.copy_(base.weight.float() + lora.scaling * update)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, base)
    return len(found)
