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


class LinearPerStep:
    """The linear layers of K steps as one product, their weights stacked once for many calls.

    Args:
        modules: one for each step, or one for all.
        schedule: which of `modules` each step has.
    Attributes:
        parameters: of the modules, those that are in stacks.
        stacks: the weights `[K, D, C]`, then biases `[K, D]` or LoRA's factors `[K, rank, C]` and
            `[K, D, rank]`; or the weights with LoRA's updates. Empty if one module is for all.
    """

    def __init__(self, modules: Sequence[nn.Module] | nn.ModuleList, schedule: Sequence[int]):
        self.first = modules[0]
        self.parameters: list[torch.Tensor] = []
        self.stacks: list[torch.Tensor] = []
        if len(modules) == 1:
            return
        kinds = _weights(modules)
        self.parameters = [weight for kind in kinds for weight in kind]
        picked = [[kind[index] for index in schedule] for kind in kinds]
        if isinstance(self.first, LoRALinear) and _is_less_merged(*(kind[0] for kind in kinds)):
            merged = _Merged.apply(self.first.scaling, *(x for kind in picked for x in kind))
            self.stacks = [merged]  # type: ignore[list-item]
        else:
            self.stacks = [torch.stack(kind) for kind in picked]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[K, N, C]` to `[K, N, D]`."""
        if not self.stacks:
            return linear(self.first, x)
        if len(self.stacks) == 3:
            return _StackedLoRA.apply(x, *self.stacks, self.first.scaling)  # type: ignore[no-any-return]
        out = torch.bmm(x, self.stacks[0].transpose(1, 2))
        return out if len(self.stacks) == 1 else out + self.stacks[1][:, None]


def _weights(modules: Sequence[nn.Module] | nn.ModuleList) -> list[list[torch.Tensor]]:
    """Weights of linear layers, then their biases, if any, or LoRA's factors A and B."""
    loras = [module for module in modules if isinstance(module, LoRALinear)]
    if loras:
        rows = [(lora.frozen_W.weight, lora.lora_A.weight, lora.lora_B.weight) for lora in loras]
    else:
        linears = [module for module in modules if isinstance(module, nn.Linear)]
        rows = [(x.weight,) if x.bias is None else (x.weight, x.bias) for x in linears]
    return [list(kind) for kind in zip(*rows, strict=True)]


def _is_less_merged(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> bool:
    """Whether a merged weight takes fewer FLOPs: of narrow layers with a high rank.

    LoRA has three products a frame with each factor, forward and backward; a merged weight has one more with
    the weight's size, its gradient. Only in float32: in bfloat16 a merged weight would round the update off.
    """
    return weight.dtype == torch.float32 and weight.numel() < 3 * (lora_a.numel() + lora_b.numel())


class _Merged(torch.autograd.Function):
    """Weights of the steps with LoRA's updates, `[K, D, C]`, of K weights, K factors A and K factors B."""

    @staticmethod
    def forward(ctx, scaling, *weights):
        steps = len(weights) // 3
        bases, *factors = (weights[start : start + steps] for start in range(0, 3 * steps, steps))
        merged = torch.empty(steps, *bases[0].shape, dtype=bases[0].dtype, device=bases[0].device)
        for out, base, lora_a, lora_b in zip(merged, bases, *factors, strict=True):
            torch.addmm(base, lora_b, lora_a, alpha=scaling, out=out)
        ctx.save_for_backward(*weights[steps:])
        ctx.scaling = scaling
        return merged

    @staticmethod
    def backward(ctx, grad):
        steps = len(grad)
        lora_a, lora_b = ctx.saved_tensors[:steps], ctx.saved_tensors[steps:]
        a_grads = [torch.mm(b.t(), g).mul_(ctx.scaling) for b, g in zip(lora_b, grad, strict=True)]
        b_grads = [torch.mm(g, a.t()).mul_(ctx.scaling) for a, g in zip(lora_a, grad, strict=True)]
        return None, *grad, *a_grads, *b_grads


class _StackedLoRA(torch.autograd.Function):
    """Products alone: the sums and the scaling are part of them."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling):
        small = torch.bmm(x, lora_a.transpose(1, 2))
        ctx.save_for_backward(x, small, weight, lora_a, lora_b)
        ctx.scaling = scaling
        update = torch.bmm(small, lora_b.transpose(1, 2))
        return update.baddbmm_(x, weight.transpose(1, 2), beta=scaling)

    @staticmethod
    def backward(ctx, grad):
        x, small, weight, lora_a, lora_b = ctx.saved_tensors
        wants_x, wants_weight, wants_a, wants_b, _ = ctx.needs_input_grad
        transposed, unscaled = grad.transpose(1, 2), torch.bmm(grad, lora_b)
        x_grad = weight_grad = a_grad = b_grad = None
        if wants_x:
            x_grad = torch.bmm(grad, weight).baddbmm_(unscaled, lora_a, alpha=ctx.scaling)
        if wants_weight:
            weight_grad = torch.bmm(transposed, x)
        if wants_a:
            a_grad = torch.bmm(unscaled.transpose(1, 2), x).mul_(ctx.scaling)
        if wants_b:
            b_grad = torch.bmm(transposed, small).mul_(ctx.scaling)
        return x_grad, weight_grad, a_grad, b_grad, None
