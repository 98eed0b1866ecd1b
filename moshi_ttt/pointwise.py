"""Norms, gates and rotations of training: single kernels where compiled, which keep nothing but their input.

Written out, Moshi's norm keeps three float32 copies of its input for the backward pass, and its gate a second
activation. Here the gradients are written by hand and computed from the input alone; a rotation needs none.
"""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import RMSNorm
from moshi.utils import compile as moshi_compile
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F


def compiling(enable: bool) -> AbstractContextManager[None]:
    """Context in which functions are compiled as ever, or not at all."""
    return nullcontext() if enable else moshi_compile.no_compile()


def is_compiling() -> bool:
    """Whether functions that run now are compiled: what the backward pass must do as well."""
    return not moshi_compile._compile_disabled


def compiled_lazily(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As Moshi's `torch_compile_lazy`, with its switches, but a kernel for each shape.

    Moshi's takes the second shape that comes for a sign that all sizes vary, widths too.
    """
    if os.environ.get("NO_TORCH_COMPILE"):
        return function
    compiled: list[Callable[..., torch.Tensor]] = []

    @wraps(function)
    def call(*args: Any) -> torch.Tensor:
        if not is_compiling():
            return function(*args)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=False))
        return compiled[0](*args)

    return call


def norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)` of one of Moshi's norms, `[A, B, C]` to `[A, B, C]`."""
    if not isinstance(module, RMSNorm) or module.dtype != torch.float32 or isinstance(module, FSDPModule):
        return module(x)
    return _RMSNorm.apply(x, module.alpha, module.eps)  # type: ignore[no-any-return]


def gate(x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The first half of the channels, activated, times the second."""
    if activation is F.silu:
        return _SiLUGate.apply(x)  # type: ignore[no-any-return]
    left, right = x.chunk(2, dim=-1)
    return activation(left) * right


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, eps):
        ctx.save_for_backward(x, alpha)
        ctx.eps, ctx.compiled = eps, is_compiling()
        return _norm(x, alpha, eps)

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        wants_x, wants_alpha, _ = ctx.needs_input_grad
        with compiling(ctx.compiled):
            x_grad = _norm_backward(x, alpha, grad, ctx.eps) if wants_x else None
        alpha_grad = None
        if wants_alpha:
            wide = x.float()
            scale = torch.rsqrt(ctx.eps + wide.square().mean(-1, keepdim=True))
            alpha_grad = (grad * (wide * scale)).sum((0, 1), keepdim=True).to(alpha.dtype)
        return x_grad, alpha_grad, None


class _SiLUGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.compiled = is_compiling()
        return _silu_gate(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if not ctx.compiled:
            return _silu_gate_backward_in_place(x, grad)
        with compiling(True):
            return _silu_gate_backward(x, grad)


@compiled_lazily
def _norm(x: torch.Tensor, alpha: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean = eps + torch.mean(wide * wide, dim=-1, keepdim=True)
    return (wide * (alpha.float() * torch.rsqrt(mean))).to(x.dtype)


@compiled_lazily
def _norm_backward(x: torch.Tensor, alpha: torch.Tensor, grad: torch.Tensor, eps: float) -> torch.Tensor:
    wide, scaled = x.float(), grad.float() * alpha.float()
    inverse = torch.rsqrt(eps + torch.mean(wide * wide, dim=-1, keepdim=True))
    along = torch.mean(scaled * wide, dim=-1, keepdim=True)
    return torch.addcmul(scaled, wide, inverse**2 * along, value=-1).mul_(inverse).to(x.dtype)


@compiled_lazily
def _silu_gate(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return F.silu(left).mul_(right)


@compiled_lazily
def _silu_gate_backward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * right, left), grad * F.silu(left)), dim=-1)


def _silu_gate_backward_in_place(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`_silu_gate_backward` operation by operation, in place: what is not compiled waits for memory."""
    left, right = x.chunk(2, dim=-1)
    left = left.contiguous()
    found = torch.empty_like(x)
    left_grad, right_grad = found.chunk(2, dim=-1)
    part = F.silu(left)
    torch.mul(part, grad, out=right_grad)
    torch.mul(grad, right, out=part)
    left_grad.copy_(torch.ops.aten.silu_backward.grad_input(part, left, grad_input=part))
    return found


def rotate(rope: RotaryEmbedding, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys `[B, T, H, D]`, the first frame at `position` `[B]` or `[1]`."""
    half = x.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=x.device) * (-math.log(rope.max_period) / half))
    frames = position[:, None].float() + torch.arange(x.shape[1], device=x.device)
    angles = (frames[..., None] * rates)[:, :, None]
    return _Rotate.apply(x, angles.cos(), angles.sin(), rope.interleave)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cosine, sine, interleave):
        ctx.save_for_backward(cosine, sine)
        ctx.interleave, ctx.compiled = interleave, is_compiling()
        return _turn(x, cosine, sine, interleave)

    @staticmethod
    def backward(ctx, grad):
        cosine, sine = ctx.saved_tensors
        with compiling(ctx.compiled):
            return _turn(grad, cosine, -sine, ctx.interleave), None, None, None


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleave: bool) -> torch.Tensor:
    """`_rotate`; where it is not compiled as one complex product, of neighbours without steps over memory."""
    if is_compiling() or not interleave:
        return _rotate(x, cosine, sine, interleave)
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cosine, sine)).flatten(-2).to(x.dtype)


@compiled_lazily
def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleave: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2) if interleave else (2, half)).float()
    dim = -1 if interleave else -2
    left, right = pairs.unbind(dim)
    turned = torch.stack((left * cosine - right * sine, left * sine + right * cosine), dim)
    return turned.flatten(-2).to(x.dtype)
