"""Moshi's linear layers as training runs them: LoRA in the product, and the layers of all steps at once.

A layer whose parameters are split over processes is called as the module it is: they are whole only inside.
"""

from collections.abc import Sequence

import torch
from moshi.modules.lora import LoRALinear
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` of a linear layer with or without LoRA, `[..., C]` to `[..., D]`.

    The base product is added to LoRA's update where it is computed: Moshi's own takes two more passes over
    the outputs. It comes last, so that activation checkpointing need not run it again.
    """
    if not isinstance(module, LoRALinear) or isinstance(module, FSDPModule):
        return module(x)
    flat = x.reshape(-1, x.shape[-1])
    update = F.linear(F.linear(flat, module.lora_A.weight) * module.scaling, module.lora_B.weight)
    return update.addmm_(flat, module.frozen_W.weight.t()).view(*x.shape[:-1], -1)


def linear_per_step(
    modules: Sequence[nn.Module] | nn.ModuleList, schedule: list[int] | None, x: torch.Tensor
) -> torch.Tensor:
    """A linear layer for each step, `[K, N, C]` to `[K, N, D]`, as one product.

    Args:
        modules: one for each step, or one for all.
        schedule: which of `modules` each step has; None: its own.
        x: inputs of the K steps.
    """
    if len(modules) == 1:
        return linear(modules[0], x)
    picked = [modules[index] for index in schedule or range(x.shape[0])]
    if not isinstance(picked[0], LoRALinear):
        out = torch.bmm(x, _stacked(picked).transpose(1, 2))
        biases = [module.bias for module in picked]
        return out if biases[0] is None else out + torch.stack(biases)[:, None]  # type: ignore[arg-type]
    down, up, base = (
        _stacked([module.get_submodule(name) for module in picked])
        for name in ("lora_A", "lora_B", "frozen_W")
    )
    small = torch.bmm(x, down.transpose(1, 2)) * picked[0].scaling
    return torch.bmm(small, up.transpose(1, 2)).baddbmm_(x, base.transpose(1, 2))


def _stacked(modules: Sequence[nn.Module]) -> torch.Tensor:
    return torch.stack([module.get_parameter("weight") for module in modules])
