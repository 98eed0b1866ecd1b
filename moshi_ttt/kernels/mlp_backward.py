"""The backward pass of a mini-batch of TTT-MLP in two kernels, split over hidden units as the forward pass.

They read the states and traces that the forward pass kept, and change the gradient of the state in place:
before `through_answers` it is that of the weights which the mini-batch ended with, after `into_weights` that
of those which it started from. `through_answers` goes back through the bound, the fold and the answers,
`into_weights`, which needs dG2 in whole, through the gradient of the inner loss and the keys. The equations
are those of `moshi_ttt/dual_form.py`, the naive twin; `dX` is the gradient of the outer loss at X. See
`moshi_ttt/kernels/mlp_forward.py` for layouts.
"""

import triton
import triton.language as tl

from moshi_ttt.kernels.parts import (
    gelu,
    gelu_first,
    gelu_second,
    load_block,
    over_units,
    product,
    store_block,
    sum_of_parts,
    through_loss_gradient,
)


@triton.jit
def _through_pull(d_w, d_center, end, center, at, pull, factor):
    """Through W' = center + factor (W - center), factor = radius / |W - center|, in place of `d_w`.

    `pull` is the part of dW along the change, (W' - center) . dW / radius^2: the distance is fixed, so that
    part goes nowhere.
    """
    d = tl.load(d_w + at)
    through = factor * (d - pull * (tl.load(end + at) - tl.load(center + at)))
    tl.store(d_w + at, through)
    tl.store(d_center + at, tl.load(d_center + at) + d - through)


@triton.jit
def _pull_of(alongs, radius, J: tl.constexpr):
    total = 0.0
    for part in tl.static_range(J):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(alongs + 2 * part)
    return total / (radius * radius)


@triton.jit
def _through_bound(
    d_w, d_center, end, center, factors, alongs, radius1, radius2, f, d, block,
    D: tl.constexpr, F: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Through the bound, in the layers that it drew back after the mini-batch."""
    factor1, factor2 = tl.load(factors), tl.load(factors + 1)
    rows = f[:, None] * D + d[None, :]
    if factor1 < 1:
        pull1 = _pull_of(alongs, radius1, J)
        _through_pull(d_w, d_center, end, center, rows, pull1, factor1)
        _through_pull(d_w, d_center, end, center, D * F + f, pull1, factor1)
    if factor2 < 1:
        pull2 = _pull_of(alongs + 1, radius2, J)
        _through_pull(d_w, d_center, end, center, D * F + F + rows, pull2, factor2)
        if block == 0:
            _through_pull(d_w, d_center, end, center, 2 * D * F + F + d, pull2, factor2)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "H", "mini_batch"])
def through_answers(
    q, k, seen, step, state, center, trace, factors, alongs, d_answer2, d_products2,
    d_state, d_center, d_q, d_k, d_steps1, d_last, d_g2, scratch,
    N, H, mini_batch, radius1, radius2,
    KP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BOUND: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What this block gives to dq, dk, dG2 `[K, D]`, to dsteps of the first layer `[K, K]` and, through the
    fold, to the last row of deta `[K]`. To scratch go dX2, dZ1, dZ1 of the queries and dU `[F, K]`, the
    first two in part.
    """
    SIZE: tl.constexpr = 2 * D * F + F + D
    TRACE: tl.constexpr = KP * (3 * F + 2 * D)
    J: tl.constexpr = F // BF
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, rows, f = tl.arange(0, D), tl.arange(0, KP), block * BF + tl.arange(0, BF)
    at = mini_batch * N + n
    w, note, d_w = state + at * SIZE, trace + at * TRACE, d_state + n * SIZE
    tokens, second, part = at * KP * D, D * F + F, at * J + block
    if BOUND:
        _through_bound(
            d_w, d_center + n * SIZE, w + N.to(tl.int64) * SIZE, center + (n % H) * SIZE,
            factors + (at + N) * 2, alongs + n * 2 * J, radius1, radius2, f, d, block, D, F, J,
        )  # fmt: skip
    steps = tl.load(step + at * KP + rows)
    z1_t, u_t = load_block(note, f, rows, KP), load_block(note + 2 * KP * F, f, rows, KP)
    slope, x2_t = gelu_first(z1_t), gelu(z1_t)
    g1_t = u_t * slope

    d_w1_t = load_block(d_w, f, d, D)
    keys = load_block(k + tokens, rows, d, D)
    d_s1_t = -product(d_w1_t, tl.trans(keys), P) - tl.load(d_w + D * F + f)[:, None]
    from_fold = tl.sum(d_s1_t * g1_t, 0)
    d_g1_t = d_s1_t * steps[None, :]
    store_block(d_k + part * KP * D, rows, d, D, -over_units(steps[None, :] * g1_t, d_w1_t, P))

    g2, d_w2 = load_block(note + 3 * KP * F + KP * D, rows, d, D), load_block(d_w + second, f, d, D)
    d_s2 = -over_units(x2_t, d_w2, P)
    # Only the first block reads the bias: it is the one that writes it.
    d_s2 -= tl.load(d_w + second + F * D + d, mask=(d >= 0) & (block == 0), other=0.0)[None, :]
    tl.store(d_last + part * KP + rows, from_fold + tl.sum(d_s2 * g2, 1))

    answer1_t, d_out2 = load_block(note + KP * F, f, rows, KP), load_block(d_answer2 + tokens, rows, d, D)
    products2 = load_block(d_products2 + at * KP * KP, rows, rows, KP)
    d_x2_t = product(gelu(answer1_t), products2, P) - product(d_w2, tl.trans(steps[:, None] * g2), P)
    store_block(scratch + n * 4 * KP * F, f, rows, KP, d_x2_t)
    w2 = load_block(w + second, f, d, D)
    d_xq2_t = product(w2, tl.trans(d_out2), P) + product(x2_t, tl.trans(products2), P)
    d_answer1_t = d_xq2_t * gelu_first(answer1_t)
    store_block(d_steps1 + part * KP * KP, rows, rows, KP, -product(tl.trans(d_answer1_t), g1_t, P))
    store_block(d_q + part * KP * D, rows, d, D, over_units(d_answer1_t, load_block(w, f, d, D), P))
    d_g1_t -= product(d_answer1_t, load_block(seen + at * KP * KP, rows, rows, KP), P)
    d_u_t = d_g1_t * slope
    d_g2_part = d_s2 * steps[:, None] + over_units(d_u_t, w2, P)
    store_block(d_g2 + (n * J + block) * KP * D, rows, d, D, d_g2_part)
    store_block(scratch + (n * 4 + 1) * KP * F, f, rows, KP, u_t * d_g1_t * gelu_second(z1_t))
    store_block(scratch + (n * 4 + 2) * KP * F, f, rows, KP, d_answer1_t)
    store_block(scratch + (n * 4 + 3) * KP * F, f, rows, KP, d_u_t)


@triton.jit
def _change_along(d_w, now, center, at):
    return tl.sum(d_w * (now - tl.load(center + at)))


@triton.jit
def _measure_along(
    d_w1_t, d_b1, d_w2, d_b2, w1_t, w2, w, center, alongs, f, d, block, D: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """(W - center) . dW of either layer, for the bound of the mini-batch before; b2 counts once."""
    own, second, last = f[:, None] * D + d[None, :], D * F + F, 2 * D * F + F + d
    along1 = _change_along(d_w1_t, w1_t, center, own)
    along1 += _change_along(d_b1, tl.load(w + D * F + f), center, D * F + f)
    along2 = _change_along(d_w2, w2, center + second, own)
    of_bias = _change_along(d_b2, tl.load(w + last), center, last)
    tl.store(alongs, along1)
    tl.store(alongs + 1, along2 + tl.where(block == 0, of_bias, 0.0))


@triton.jit(do_not_specialize=["N", "H", "mini_batch"])
def into_weights(
    q, k, target, gamma, beta, state, center, trace, alongs, d_answer2, d_g2_base, d_g2, scratch,
    d_state, d_k, d_target, d_gamma, d_beta,
    N, H, mini_batch,
    KP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BOUND: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Through the gradient of the inner loss and the key pass into the gradient of the state.

    Adds to this block's part of dk; dtarget, dgamma and dbeta of the mini-batch are whole.
    """
    SIZE: tl.constexpr = 2 * D * F + F + D
    TRACE: tl.constexpr = KP * (3 * F + 2 * D)
    J: tl.constexpr = F // BF
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, rows, f = tl.arange(0, D), tl.arange(0, KP), block * BF + tl.arange(0, BF)
    at = mini_batch * N + n
    w, note, d_w = state + at * SIZE, trace + at * TRACE, d_state + n * SIZE
    tokens, second, part = at * KP * D, D * F + F, at * J + block
    d_whole = sum_of_parts(d_g2 + n * J * KP * D, rows, d, D, KP * D, J)
    d_whole += load_block(d_g2_base + tokens, rows, d, D)
    weight, shift = tl.load(gamma + n * D + d)[None, :], tl.load(beta + n * D + d)[None, :]
    z2, wanted = load_block(note + 3 * KP * F, rows, d, D), load_block(target + tokens, rows, d, D)
    d_z2, d_wanted, d_weight, d_shift = through_loss_gradient(z2, wanted, d_whole, weight, shift)

    z1_t, w1_t = load_block(note, f, rows, KP), load_block(w, f, d, D)
    w2 = load_block(w + second, f, d, D)
    d_x2_t = load_block(scratch + n * 4 * KP * F, f, rows, KP) + product(w2, tl.trans(d_z2), P)
    d_z1_t = load_block(scratch + (n * 4 + 1) * KP * F, f, rows, KP) + d_x2_t * gelu_first(z1_t)
    d_keys = load_block(d_k + part * KP * D, rows, d, D) + over_units(d_z1_t, w1_t, P)
    store_block(d_k + part * KP * D, rows, d, D, d_keys)

    d_answer1_t = load_block(scratch + (n * 4 + 2) * KP * F, f, rows, KP)
    d_w1_t = load_block(d_w, f, d, D) + product(d_answer1_t, load_block(q + tokens, rows, d, D), P)
    d_w1_t += product(d_z1_t, load_block(k + tokens, rows, d, D), P)
    d_b1 = tl.load(d_w + D * F + f) + tl.sum(d_answer1_t + d_z1_t, 1)
    store_block(d_w, f, d, D, d_w1_t)
    tl.store(d_w + D * F + f, d_b1)
    d_out2 = load_block(d_answer2 + tokens, rows, d, D)
    xq2_t = gelu(load_block(note + KP * F, f, rows, KP))
    d_w2 = load_block(d_w + second, f, d, D) + product(xq2_t, d_out2, P)
    d_w2 += product(gelu(z1_t), d_z2, P)
    d_u_t = load_block(scratch + (n * 4 + 3) * KP * F, f, rows, KP)
    d_w2 += product(d_u_t, load_block(note + 3 * KP * F + KP * D, rows, d, D), P)
    store_block(d_w + second, f, d, D, d_w2)
    d_b2 = tl.load(d_w + second + F * D + d, mask=(d >= 0) & (block == 0), other=0.0)
    d_b2 += tl.sum(d_out2 + d_z2, 0)
    if BOUND:
        _measure_along(
            d_w1_t, d_b1, d_w2, d_b2, w1_t, w2, w, center + (n % H) * SIZE, alongs + (n * J + block) * 2,
            f, d, block, D, F,
        )  # fmt: skip
    if block == 0:
        tl.store(d_w + second + F * D + d, d_b2)
        store_block(d_target + tokens, rows, d, D, d_wanted)
        tl.store(d_gamma + at * D + d, d_weight)
        tl.store(d_beta + at * D + d, d_shift)
