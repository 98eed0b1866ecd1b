"""Causal attention within a window of the past, for training: no T x T mask, no T x T scores.

The kernels give the same values. `blocks` goes through the queries block by block, each with the keys that
it can see, on any device and in any dtype. `flash` is the FlashAttention that torch brings, which needs a GPU
and 16-bit numbers. `mask` is the slow and obvious one, with a T x T mask as Moshi has it: what the others are
measured against. Streaming has its own attention, Moshi's, which this file does not touch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

KERNELS = ("blocks", "flash", "mask")

# Small windows are taken together to blocks of this many queries.
_LEAST_BLOCK = 64

_forced: str | None = None


@contextmanager
def forced_kernel(name: str) -> Iterator[None]:
    """Compute attention with this kernel, one of KERNELS, whatever the tensors are.

    Raises:
        ValueError: another name.
    """
    global _forced
    if name not in KERNELS:
        raise ValueError(f"there is no attention kernel {name!r}; use one of {', '.join(KERNELS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def kernel_for(q: torch.Tensor) -> str:
    """The kernel that attends from queries like these: the one place where it is chosen."""
    if _forced is not None:
        return _forced
    # Tensors on meta stand for those on a GPU.
    on_gpu = q.device.type in ("cuda", "meta") and q.dtype in (torch.bfloat16, torch.float16)
    return "flash" if on_gpu else "blocks"


def windowed_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: int | None,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query over its own frame and the context - 1 frames before it.

    Args:
        q: `[B, T, H, D]`.
        keys, values: `[B, S, H, D]`: the last is that of the last query; S is T, or T and the frames carried
            from before.
        context: frames that a query sees; None for all.
        position: frames of the recording before the first query, `[B]`: of carried frames that lie before
            the recording nothing is seen. None where S is T.
    Returns:
        `[B, T, H, D]`.
    """
    assert keys.shape[1] >= q.shape[1]
    assert position is not None or keys.shape[1] == q.shape[1], "carried frames need a position"
    kernel = kernel_for(q)
    if kernel != "flash":
        attend = _blocks if kernel == "blocks" else _masked
        return attend(q, keys, values, context, position)
    if position is None:
        return _flash(q, keys, values, context)
    return _flash_carried(q, keys, values, context, position)


def _blocks(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: int | None,
    position: torch.Tensor | None,
) -> torch.Tensor:
    length, before = q.shape[1], keys.shape[1] - q.shape[1]
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    window = keys.shape[2] if context is None else context
    if position is None and window >= length:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(1, 2)
    size = max(window, _LEAST_BLOCK)
    starts = range(0, length, size)
    seen = [(max(0, before + s - window + 1), before + min(s + size, length)) for s in starts]
    blocks = q.split(size, dim=2), _windows(keys, seen), _windows(values, seen)
    parts = []
    for start, (first, last), block in zip(starts, seen, zip(*blocks, strict=True), strict=True):
        stop = last - before
        key = torch.arange(first - before, stop, device=q.device)
        delta = torch.arange(start, stop, device=q.device)[:, None] - key
        visible = (delta >= 0) & (delta < window)
        if position is not None and first < before:
            visible = visible & (position[:, None] + key >= 0)[:, None, None]
        parts.append(F.scaled_dot_product_attention(*block, visible).transpose(1, 2))
    return torch.cat(parts, dim=1)


def _windows(x: torch.Tensor, ranges: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    return _Windows.apply(x, ranges)  # type: ignore[no-any-return]


class _Windows(torch.autograd.Function):
    """The frames in each of the ranges, of `[B, H, S, D]`.

    As slices, but the gradient of a slice is as long as S: their sum would take the square of the length.
    """

    @staticmethod
    def forward(ctx, x, ranges):
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[:, :, first:last] for first, last in ranges)

    @staticmethod
    def backward(ctx, *grads):
        total = grads[0].new_zeros(ctx.shape)
        for (first, last), grad in zip(ctx.ranges, grads, strict=True):
            total[:, :, first:last] += grad
        return total, None


def _masked(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: int | None,
    position: torch.Tensor | None,
) -> torch.Tensor:
    length, before = q.shape[1], keys.shape[1] - q.shape[1]
    key = torch.arange(keys.shape[1], device=q.device) - before
    delta = torch.arange(length, device=q.device)[:, None] - key
    visible = (delta >= 0)[None, None]
    if context is not None:
        visible = visible & (delta < context)
    if position is not None:
        visible = visible & (position[:, None] + key >= 0)[:, None, None]
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, visible).transpose(1, 2)


def _flash(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: int | None) -> torch.Tensor:
    return torch.ops.aten._flash_attention_forward(
        q, keys, values, None, None, q.shape[1], keys.shape[1], 0.0, True, False, **_window(context)
    )[0]


def _flash_carried(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: int | None,
    position: torch.Tensor,
) -> torch.Tensor:
    """Each row is two sequences: the frames before its recording, with no query, and the rest."""
    rows, length = q.shape[:2]
    size = keys.shape[1]
    unseen = (size - length - position).clamp(min=0)
    ends = torch.arange(1, rows + 1, device=q.device)
    zero = ends.new_zeros(1)
    key_ends = torch.stack(((ends - 1) * size + unseen, ends * size), dim=1).flatten()
    query_ends = torch.stack(((ends - 1) * length, ends * length), dim=1).flatten()
    out = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q, keys, values)),
        torch.cat((zero, query_ends)).int(),
        torch.cat((zero, key_ends)).int(),
        length,
        size,
        0.0,
        True,
        False,
        **_window(context),
    )[0]
    return out.unflatten(0, (rows, length))


def _window(context: int | None) -> dict[str, int | None]:
    """Torch's flash aligns the last query with the last key, as here."""
    return {"window_size_left": None if context is None else context - 1, "window_size_right": 0}
