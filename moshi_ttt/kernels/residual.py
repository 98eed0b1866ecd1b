"""The residual stream around a streaming TTT layer on a GPU, in one launch before it and one after.

Roundings are those of the operations that they replace: `RMSNorm(x + update)` of Moshi and `ResidualGate`.
"""

import torch
import triton
import triton.language as tl


def normed_sum(x: torch.Tensor, update: torch.Tensor, alpha: torch.Tensor, eps: float) -> torch.Tensor:
    """Moshi's float32 RMSNorm of x + update.

    Args:
        x, update: `[B, T, C]`.
        alpha: the norm's weight, `[1, 1, C]`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    sizes = {"C": width, "BLOCK": triton.next_power_of_2(width)}
    _normed_sum[(out.numel() // width,)](x.contiguous(), update.contiguous(), alpha, out, eps, **sizes)
    return out


def gated_sum(
    x: torch.Tensor, update: torch.Tensor, ttt_out: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """x + update + tanh(alpha) ttt_out, for `[B, T, C]` and alpha `[C]`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    width, block = x.shape[-1], 1024
    _gated_sum[(out.numel() // width, triton.cdiv(width, block))](
        x.contiguous(), update.contiguous(), ttt_out.contiguous(), alpha, out, width, block
    )
    return out


@triton.jit
def _normed_sum(x, update, alpha, out, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * C + c
    inside = c < C
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty).to(tl.float32)
    scale = 1.0 / tl.sqrt(eps + tl.sum(total * total, 0) / C)
    weight = tl.load(alpha + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (total * (weight * scale)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_sum(x, update, ttt_out, alpha, out, C: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * C + c
    inside = c < C
    kind = out.dtype.element_ty
    weight = (2 * tl.sigmoid(2 * tl.load(alpha + c, mask=inside, other=0.0)) - 1).to(kind).to(tl.float32)
    ttt = (weight * tl.load(ttt_out + at, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    total = total.to(kind).to(tl.float32)
    tl.store(out + at, (total + ttt).to(kind), mask=inside)
