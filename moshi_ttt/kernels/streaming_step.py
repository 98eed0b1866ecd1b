"""One frame of a streaming TTT-MLP on a GPU in four launches, where torch's operations need some seventy.

Inside a captured graph a kernel costs 1 to 3 microseconds however little it does, and a frame of one stream is
little: its time would be that of its launches. Here one program has a net (a batch row's head) and a block of
its hidden units, and the launches end where all of a net's blocks must know each other's sums:

1. `_keys`: unit norm, rotary embedding, target and learning rate of the token; the hidden units for its key;
   what each block gives to Z2.
2. `_answers`: the gradients G2 and G1 of the inner loss; the hidden units for the query, under the weights
   that hold the mini-batch's updates; what each block gives to the answer.
3. `_finish`: the answer; where the mini-batch is over, its updates are added to the weights. Elsewhere the
   weights are not touched: a branch on the GPU, which no torch operation has inside a graph.
4. `_pull`: draws the weights back into the bound, where a mini-batch is over.

The naive twin is `inner_step` and `fold_finished` of `moshi_ttt.inner_loop`, whose names are used here. All
numbers are float32; a slot that the row has not filled is never read.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moshi_ttt.inner_weights import InnerBound
from moshi_ttt.ttt_state import TTTState


@dataclass
class StepRules:
    """What a layer's step needs besides its state.

    Args:
        rope: `[K, D / 2, 2]`, cosine and sine of each position in a mini-batch.
        lr_weight, lr_bias: `[H, C]` and `[H]`.
        lr_scale: the learning rate is this times a sigmoid.
        normalize_target: as `TTTConfig.normalize_target`.
        bound: of the inner weights, or None.
    """

    rope: torch.Tensor
    lr_weight: torch.Tensor
    lr_bias: torch.Tensor
    lr_scale: float
    normalize_target: bool
    bound: InnerBound | None


def fused_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, rules: StepRules, state: TTTState
) -> torch.Tensor:
    """Answer one token of every row and go on: `state` is changed in place, as by the naive twin.

    Args:
        q, k, v: what the projections gave, `[B, 1, H * D]`.
        x: their input, `[B, 1, C]`.
        rules: of the layer.
        state: of sizes that `kernels.choice` does not refuse.
    Returns:
        `[B, 1, H * D]` in the dtype of q.
    """
    (w1, w2), (b1, b2) = state.inner.weights, state.inner.biases
    pending, center = state.pending, state.initial
    nets, slots, width = pending.inputs[0].shape
    hidden = w1.shape[2]
    heads = nets // state.batch_size
    # Small blocks where there are few nets, so that they cover the GPU.
    block = min(hidden, 64 if nets * hidden >= 64 * 128 else 32)
    splits, padded = hidden // block, triton.next_power_of_2(slots)
    radii = (0.0, 0.0) if rules.bound is None else rules.bound.radii

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    places = empty(nets, dtype=torch.long)  # of the token; the state's are advanced while others still read
    query, target, z1 = empty(nets, width), empty(nets, width), empty(nets, hidden)
    sums, answers = empty(nets, splits, width), empty(nets, splits, width)
    dots, squares = empty(nets, splits, padded), empty(nets, 2, splits)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes = {"H": heads, "D": width, "F": hidden, "K": slots, "BLOCK": block}
    _keys[(nets, splits + 1)](
        *(q.contiguous(), k.contiguous(), v.contiguous(), x.contiguous()),
        *(rules.rope, rules.lr_weight, rules.lr_bias, rules.lr_scale),
        *(state.norm.weight, state.norm.bias, state.position, w1, b1, w2),
        *(pending.inputs[0], pending.inputs[1], pending.lr, places, query, target, z1, sums),
        **sizes,
        C=x.shape[-1],
        BLOCK_C=min(1024, triton.next_power_of_2(x.shape[-1])),
        NORMALIZE=rules.normalize_target,
    )
    _answers[(nets, splits)](
        *(state.norm.weight, state.norm.bias, state.step_scale, places, w1, b1, w2, b2),
        *(*pending.inputs, *pending.grads, pending.lr, query, target, z1, sums, answers, dots),
        **sizes,
        PADDED=padded,
    )
    _finish[(nets, splits)](
        *(state.norm.weight, state.norm.bias, state.step_scale, places, state.position, state.exec_mask),
        *(w1, b1, w2, b2, *center.weights, *center.biases, *pending.inputs, *pending.grads, pending.lr),
        *(query, answers, dots, squares, out),
        **sizes,
        PADDED=padded,
        BOUNDED=rules.bound is not None,
    )
    if rules.bound is not None:
        _pull[(nets, splits)](
            *(places, state.exec_mask, w1, b1, w2, b2, *center.weights, *center.biases, squares, *radii),
            **sizes,
        )
    return out


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _gelu(z):
    return 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))


@triton.jit
def _gelu_slope(z):
    t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * z * z)


@triton.jit
def _normalised(z, D: tl.constexpr):
    """z `[D]` without mean and with deviation 1, and the inverse of its deviation."""
    centred = z - tl.sum(z, 0) / D
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + 1e-6)
    return centred * inverse, inverse


@triton.jit
def _rotated(source, rope, place, d, D: tl.constexpr):
    """A head's vector `[D]` at norm 1, its adjacent pairs turned by the place in the mini-batch."""
    x = tl.load(source + d).to(tl.float32)
    partner = tl.load(source + (d ^ 1)).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)
    pair = rope + place * D + d // 2 * 2
    side = tl.where(d % 2 == 0, -1.0, 1.0)
    return (x * tl.load(pair) + side * partner * tl.load(pair + 1)) / norm


@triton.jit
def _keys(
    q_in,
    k_in,
    v_in,
    x_in,
    rope,
    lr_weight,
    lr_bias,
    lr_scale,
    norm_weight,
    norm_bias,
    position,
    w1,
    b1,
    w2,
    keys,
    hiddens,
    lrs,
    places,
    query,
    target,
    z1_out,
    sums,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D)
    place = tl.load(position + n // H)
    k = _rotated(k_in + n * D, rope, place, d, D)
    if split < F // BLOCK:
        f = split * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(w1 + n * D * F + d[:, None] * F + f[None, :])
        second = tl.load(w2 + n * D * F + f[:, None] * D + d[None, :])
        z1 = tl.sum(k[:, None] * first, 0) + tl.load(b1 + n * F + f)
        hidden = _gelu(z1)
        tl.store(z1_out + n * F + f, z1)
        tl.store(hiddens + (n * K + place) * F + f, hidden)
        tl.store(sums + (n * (F // BLOCK) + split) * D + d, tl.sum(hidden[:, None] * second, 0))
    else:  # the program that a net has besides those of its blocks
        tl.store(places + n, place)
        tl.store(keys + (n * K + place) * D + d, k)
        tl.store(query + n * D + d, _rotated(q_in + n * D, rope, place, d, D))
        wanted = tl.load(v_in + n * D + d).to(tl.float32) - k
        if NORMALIZE:
            normed, _ = _normalised(wanted, D)
            wanted = normed * tl.load(norm_weight + n * D + d) + tl.load(norm_bias + n * D + d)
        tl.store(target + n * D + d, wanted)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = tl.load(x_in + n // H * C + c, mask=c < C, other=0.0).to(tl.float32)
            total += x * tl.load(lr_weight + n % H * C + c, mask=c < C, other=0.0)
        logit = tl.sum(total, 0) + tl.load(lr_bias + n % H)
        tl.store(lrs + n * K + place, lr_scale * tl.sigmoid(logit))


@triton.jit
def _answers(
    norm_weight,
    norm_bias,
    scale,
    places,
    w1,
    b1,
    w2,
    b2,
    keys,
    hiddens,
    grads1,
    grads2,
    lrs,
    query,
    target,
    z1_in,
    sums,
    answers,
    dots,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f, t = tl.arange(0, D), split * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    s = tl.arange(0, F // BLOCK)
    place = tl.load(places + n)
    z2 = tl.sum(tl.load(sums + (n * (F // BLOCK) + s[:, None]) * D + d[None, :]), 0) + tl.load(b2 + n * D + d)
    normed, inverse = _normalised(z2, D)
    weight = tl.load(norm_weight + n * D + d)
    error = tl.load(norm_bias + n * D + d) - tl.load(target + n * D + d) + normed * weight
    a = error * weight
    g2 = inverse * (a - tl.sum(a, 0) / D - normed * (tl.sum(a * normed, 0) / D))
    second = tl.load(w2 + n * D * F + f[:, None] * D + d[None, :])
    g1 = _gelu_slope(tl.load(z1_in + n * F + f)) * tl.sum(second * g2[None, :], 1)
    tl.store(grads1 + (n * K + place) * F + f, g1)
    if split == 0:
        tl.store(grads2 + (n * K + place) * D + d, g2)

    q = tl.load(query + n * D + d)
    seen = t <= place
    eta = tl.load(scale + place * K + t, mask=seen, other=0.0)
    eta *= tl.load(lrs + n * K + t, mask=seen, other=0.0)
    key = tl.load(keys + (n * K + t[:, None]) * D + d[None, :], mask=seen[:, None], other=0.0)
    steps = eta * (tl.sum(key * q[None, :], 1) + 1)
    earlier = (t < place)[:, None]
    grad = tl.load(grads1 + (n * K + t[:, None]) * F + f[None, :], mask=earlier, other=0.0)
    grad = tl.where((t == place)[:, None], g1[None, :], grad)
    first = tl.load(w1 + n * D * F + d[:, None] * F + f[None, :])
    z1 = tl.sum(q[:, None] * first, 0) + tl.load(b1 + n * F + f) - tl.sum(steps[:, None] * grad, 0)
    hidden = _gelu(z1)
    tl.store(answers + (n * (F // BLOCK) + split) * D + d, tl.sum(hidden[:, None] * second, 0))
    other = tl.load(hiddens + (n * K + t[:, None]) * F + f[None, :], mask=seen[:, None], other=0.0)
    tl.store(dots + (n * (F // BLOCK) + split) * PADDED + t, tl.sum(other * hidden[None, :], 1))


@triton.jit
def _finish(
    norm_weight,
    norm_bias,
    scale,
    places,
    position,
    exec_mask,
    w1,
    b1,
    w2,
    b2,
    center1,
    center2,
    center_b1,
    center_b2,
    keys,
    hiddens,
    grads1,
    grads2,
    lrs,
    query,
    answers,
    dots,
    squares,
    out,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f, t = tl.arange(0, D), split * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    s = tl.arange(0, F // BLOCK)
    place = tl.load(places + n)
    after = place + tl.load(exec_mask + n // H).to(tl.int64)
    if split == 0:
        seen = t <= place
        eta = tl.load(scale + place * K + t, mask=seen, other=0.0)
        eta *= tl.load(lrs + n * K + t, mask=seen, other=0.0)
        dot = tl.sum(tl.load(dots + (n * (F // BLOCK) + s[:, None]) * PADDED + t[None, :]), 0)
        grad = tl.load(grads2 + (n * K + t[:, None]) * D + d[None, :], mask=seen[:, None], other=0.0)
        z2 = tl.sum(tl.load(answers + (n * (F // BLOCK) + s[:, None]) * D + d[None, :]), 0)
        z2 += tl.load(b2 + n * D + d) - tl.sum((eta * (dot + 1))[:, None] * grad, 0)
        normed, _ = _normalised(z2, D)
        answer = normed * tl.load(norm_weight + n * D + d) + tl.load(norm_bias + n * D + d)
        tl.store(out + n * D + d, (tl.load(query + n * D + d) + answer).to(out.dtype.element_ty))
        if n % H == 0:
            tl.store(position + n // H, tl.where(after == K, 0, after))
    if after == K:
        at1, at2 = n * D * F + d[:, None] * F + f[None, :], n * D * F + f[:, None] * D + d[None, :]
        first, bias1 = tl.load(w1 + at1), tl.load(b1 + n * F + f)
        second, bias2 = tl.load(w2 + at2), tl.load(b2 + n * D + d)
        for slot in range(K):
            step = tl.load(scale + (K - 1) * K + slot) * tl.load(lrs + n * K + slot)
            g1 = step * tl.load(grads1 + (n * K + slot) * F + f)
            g2 = step * tl.load(grads2 + (n * K + slot) * D + d)
            first -= tl.load(keys + (n * K + slot) * D + d)[:, None] * g1[None, :]
            second -= tl.load(hiddens + (n * K + slot) * F + f)[:, None] * g2[None, :]
            bias1 -= g1
            bias2 -= g2
        tl.store(w1 + at1, first)
        tl.store(b1 + n * F + f, bias1)
        tl.store(w2 + at2, second)
        if split == 0:
            tl.store(b2 + n * D + d, bias2)
        if BOUNDED:
            start = n % H * D * F
            away = first - tl.load(center1 + start + d[:, None] * F + f[None, :])
            away_b = bias1 - tl.load(center_b1 + n % H * F + f)
            square = tl.sum(tl.sum(away * away, 1), 0) + tl.sum(away_b * away_b, 0)
            tl.store(squares + (2 * n) * (F // BLOCK) + split, square)
            away = second - tl.load(center2 + start + f[:, None] * D + d[None, :])
            square = tl.sum(tl.sum(away * away, 1), 0)
            away_b = bias2 - tl.load(center_b2 + n % H * D + d)
            square += tl.where(split == 0, tl.sum(away_b * away_b, 0), 0.0)
            tl.store(squares + (2 * n + 1) * (F // BLOCK) + split, square)


@triton.jit
def _pull(
    places,
    exec_mask,
    w1,
    b1,
    w2,
    b2,
    center1,
    center2,
    center_b1,
    center_b2,
    squares,
    radius1,
    radius2,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f, s = tl.arange(0, D), split * BLOCK + tl.arange(0, BLOCK), tl.arange(0, F // BLOCK)
    after = tl.load(places + n) + tl.load(exec_mask + n // H).to(tl.int64)
    if after == K:
        square = tl.sum(tl.load(squares + (2 * n) * (F // BLOCK) + s), 0)
        if square > radius1 * radius1:  # NaN is not: it stays to be seen
            shrink = radius1 / tl.sqrt(square)
            at = d[:, None] * F + f[None, :]
            start = tl.load(center1 + n % H * D * F + at)
            tl.store(w1 + n * D * F + at, start + shrink * (tl.load(w1 + n * D * F + at) - start))
            start_b = tl.load(center_b1 + n % H * F + f)
            tl.store(b1 + n * F + f, start_b + shrink * (tl.load(b1 + n * F + f) - start_b))
        square = tl.sum(tl.load(squares + (2 * n + 1) * (F // BLOCK) + s), 0)
        if square > radius2 * radius2:
            shrink = radius2 / tl.sqrt(square)
            at = f[:, None] * D + d[None, :]
            start = tl.load(center2 + n % H * D * F + at)
            tl.store(w2 + n * D * F + at, start + shrink * (tl.load(w2 + n * D * F + at) - start))
            if split == 0:
                start_b = tl.load(center_b2 + n % H * D + d)
                tl.store(b2 + n * D + d, start_b + shrink * (tl.load(b2 + n * D + d) - start_b))
