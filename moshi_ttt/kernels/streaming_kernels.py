"""The Triton kernels of `moshi_ttt.kernels.streaming_step`, which says what each is for.

Sizes: H heads, D width of a head, F hidden width, K slots of a mini-batch, C width of the model. A program
has net `n` and the hidden units of block `split`. Pointers are to tensors as `moshi_ttt.inner_loop` lays them
out: weights `[N, D, F]` and `[N, F, D]`, slots `[N, K, ...]`, centers of the bound `[H, ...]`.
"""

# Signatures one argument a line would be longer than their kernels.
# fmt: off

import triton
import triton.language as tl


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
def _steps(scale, lrs, n, place, t, K: tl.constexpr):
    """Step sizes of the slots that a token at `place` sees; 0 elsewhere."""
    seen = t <= place
    row = tl.load(scale + place * K + t, mask=seen, other=0.0)
    return row * tl.load(lrs + n * K + t, mask=seen, other=0.0)


@triton.jit
def keys(
    q_in, k_in, v_in, x_in, rope, lr_weight, lr_bias, lr_scale, norm_weight, norm_bias, position,
    w1, b1, w2, keys, hiddens, lrs, places, query, target, z1_out, sums,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, NORMALIZE: tl.constexpr,
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
def answers(
    norm_weight, norm_bias, scale, places, w1, b1, w2, b2,
    keys, hiddens, grads1, grads2, lrs, query, target, z1_in, sums, answers, dots,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f, t = tl.arange(0, D), split * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    s = tl.arange(0, F // BLOCK)
    place = tl.load(places + n)
    z2 = tl.sum(tl.load(sums + (n * (F // BLOCK) + s[:, None]) * D + d[None, :]), 0) + tl.load(b2 + n * D + d)
    normed, inverse = _normalised(z2, D)
    weight = tl.load(norm_weight + n * D + d)
    a = (tl.load(norm_bias + n * D + d) - tl.load(target + n * D + d) + normed * weight) * weight
    g2 = inverse * (a - tl.sum(a, 0) / D - normed * (tl.sum(a * normed, 0) / D))
    second = tl.load(w2 + n * D * F + f[:, None] * D + d[None, :])
    g1 = _gelu_slope(tl.load(z1_in + n * F + f)) * tl.sum(second * g2[None, :], 1)
    tl.store(grads1 + (n * K + place) * F + f, g1)
    if split == 0:
        tl.store(grads2 + (n * K + place) * D + d, g2)

    q = tl.load(query + n * D + d)
    seen = (t <= place)[:, None]
    key = tl.load(keys + (n * K + t[:, None]) * D + d[None, :], mask=seen, other=0.0)
    steps = _steps(scale, lrs, n, place, t, K) * (tl.sum(key * q[None, :], 1) + 1)
    grad = tl.load(grads1 + (n * K + t[:, None]) * F + f[None, :], mask=(t < place)[:, None], other=0.0)
    grad = tl.where((t == place)[:, None], g1[None, :], grad)
    first = tl.load(w1 + n * D * F + d[:, None] * F + f[None, :])
    z1 = tl.sum(q[:, None] * first, 0) + tl.load(b1 + n * F + f) - tl.sum(steps[:, None] * grad, 0)
    hidden = _gelu(z1)
    tl.store(answers + (n * (F // BLOCK) + split) * D + d, tl.sum(hidden[:, None] * second, 0))
    other = tl.load(hiddens + (n * K + t[:, None]) * F + f[None, :], mask=seen, other=0.0)
    tl.store(dots + (n * (F // BLOCK) + split) * PADDED + t, tl.sum(other * hidden[None, :], 1))


@triton.jit
def _fold(
    n, split, d, f, scale, w1, b1, w2, b2, keys, hiddens, grads1, grads2, lrs,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
):
    """Add a mini-batch's updates to a block of the weights; returns them."""
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
    if split == 0:  # the only one that reads it for more than this
        tl.store(b2 + n * D + d, bias2)
    return first, bias1, second, bias2


@triton.jit
def finish(
    norm_weight, norm_bias, scale, places, position, exec_mask,
    w1, b1, w2, b2, center1, center2, center_b1, center_b2,
    keys, hiddens, grads1, grads2, lrs, query, answers, dots, squares, out,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, BOUNDED: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f, t = tl.arange(0, D), split * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    s = tl.arange(0, F // BLOCK)
    place = tl.load(places + n)
    after = place + tl.load(exec_mask + n // H).to(tl.int64)
    if split == 0:
        dot = tl.sum(tl.load(dots + (n * (F // BLOCK) + s[:, None]) * PADDED + t[None, :]), 0)
        steps = _steps(scale, lrs, n, place, t, K) * (dot + 1)
        seen = (t <= place)[:, None]
        grad = tl.load(grads2 + (n * K + t[:, None]) * D + d[None, :], mask=seen, other=0.0)
        z2 = tl.sum(tl.load(answers + (n * (F // BLOCK) + s[:, None]) * D + d[None, :]), 0)
        z2 += tl.load(b2 + n * D + d) - tl.sum(steps[:, None] * grad, 0)
        normed, _ = _normalised(z2, D)
        answer = normed * tl.load(norm_weight + n * D + d) + tl.load(norm_bias + n * D + d)
        tl.store(out + n * D + d, (tl.load(query + n * D + d) + answer).to(out.dtype.element_ty))
        if n % H == 0:
            tl.store(position + n // H, tl.where(after == K, 0, after))
    if after == K:
        first, bias1, second, bias2 = _fold(
            n, split, d, f, scale, w1, b1, w2, b2, keys, hiddens, grads1, grads2, lrs, D, F, K
        )
        if BOUNDED:
            start = n % H * D * F
            away1 = first - tl.load(center1 + start + d[:, None] * F + f[None, :])
            away_b1 = bias1 - tl.load(center_b1 + n % H * F + f)
            square = tl.sum(tl.sum(away1 * away1, 1), 0) + tl.sum(away_b1 * away_b1, 0)
            tl.store(squares + (2 * n) * (F // BLOCK) + split, square)
            away2 = second - tl.load(center2 + start + f[:, None] * D + d[None, :])
            away_b2 = tl.where(split == 0, bias2 - tl.load(center_b2 + n % H * D + d), 0.0)
            square = tl.sum(tl.sum(away2 * away2, 1), 0) + tl.sum(away_b2 * away_b2, 0)
            tl.store(squares + (2 * n + 1) * (F // BLOCK) + split, square)


@triton.jit
def _draw(weights, center, at, at_center, shrink):
    start = tl.load(center + at_center)
    tl.store(weights + at, start + shrink * (tl.load(weights + at) - start))


@triton.jit
def pull(
    places, exec_mask, w1, b1, w2, b2, center1, center2, center_b1, center_b2, squares, radius1, radius2,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f, s = tl.arange(0, D), split * BLOCK + tl.arange(0, BLOCK), tl.arange(0, F // BLOCK)
    head = n % H
    if tl.load(places + n) + tl.load(exec_mask + n // H).to(tl.int64) == K:
        square1 = tl.sum(tl.load(squares + (2 * n) * (F // BLOCK) + s), 0)
        if square1 > radius1 * radius1:  # NaN is not: it stays to be seen
            shrink1 = radius1 / tl.sqrt(square1)
            at1 = d[:, None] * F + f[None, :]
            _draw(w1, center1, n * D * F + at1, head * D * F + at1, shrink1)
            _draw(b1, center_b1, n * F + f, head * F + f, shrink1)
        square2 = tl.sum(tl.load(squares + (2 * n + 1) * (F // BLOCK) + s), 0)
        if square2 > radius2 * radius2:
            shrink2 = radius2 / tl.sqrt(square2)
            at2 = f[:, None] * D + d[None, :]
            _draw(w2, center2, n * D * F + at2, head * D * F + at2, shrink2)
            if split == 0:
                _draw(b2, center_b2, n * D + d, head * D + d, shrink2)
