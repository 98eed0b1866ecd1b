"""One mini-batch of TTT-MLP (two inner layers) in two kernels.

The weights of an inner network (512 KB at Moshi's head width) fit neither into the registers nor into the
shared memory of one multiprocessor, so each is split over the hidden width: a program has one block of
hidden units of one net. All blocks of a net are needed for its second layer's output, so a mini-batch takes
two launches: `learn` passes the keys up to there, `answer` goes on from the sum of the blocks, answers the
queries and folds the updates into the weights. What blocks give to a sum they write side by side and the
reader adds up in a fixed order: results are the same every time.

A hidden unit has a row of W1^T and a row of W2, both of the head's width, so that a block of units is a
block of rows of either: the side of 64 or more rows that Hopper's tensor cores ask for, where tokens are the
other, of 16. Hence hidden values are `[units, tokens]`, in names that end in _t.

Layout of a net's state: W1^T `[F, D]`, b1 `[F]`, W2 `[F, D]`, b2 `[D]`. Layout of a mini-batch's trace, for
rows of K tokens (padded to at least 16): Z1, Z1 of the queries, U = G2 W2^T `[F, K]` each, then Z2 and G2
`[K, D]`. The maths is in `moshi_ttt/inner_loop.py`; the naive twin is `moshi_ttt/dual_form.py`.
"""

import triton
import triton.language as tl

from moshi_ttt.kernels.parts import (
    bound_factor,
    gelu,
    gelu_first,
    load_again,
    load_block,
    loss_gradient,
    over_units,
    product,
    store_block,
    sum_of_parts,
)


@triton.jit
def _factor(squares, radius, J: tl.constexpr):
    """By how much a layer is drawn back to its center."""
    square = 0.0
    for part in tl.static_range(J):  # pyright: ignore[reportGeneralTypeIssues]
        square += tl.load(squares + 2 * part)
    return bound_factor(square, radius)


@triton.jit
def _drawn_back(now, at, center, factor):
    """Read what `now + at` points to, draw it back, write it, and return it."""
    start = tl.load(center + at)
    value = start + factor * (tl.load(now + at) - start)
    tl.store(now + at, value)
    return value


@triton.jit
def _pull_back(
    w, center, squares, factors, radius1, radius2, f, d, block,
    D: tl.constexpr, F: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Draw this block's weights back into the bound, where the mini-batch before led out of it."""
    rows = f[:, None] * D + d[None, :]
    factor1, factor2 = _factor(squares, radius1, J), _factor(squares + 1, radius2, J)
    if factor1 < 1:
        _drawn_back(w, rows, center, factor1)
        _drawn_back(w, D * F + f, center, factor1)
    if factor2 < 1:
        _drawn_back(w, D * F + F + rows, center, factor2)
        if block == 0:
            _drawn_back(w, 2 * D * F + F + d, center, factor2)
    if block == 0:
        tl.store(factors, factor1)
        tl.store(factors + 1, factor2)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "H", "slot", "mini_batch", "has_changed"])
def learn(
    k, state, center, squares, factors, trace, outputs,
    N, H, slot, mini_batch, has_changed, radius1, radius2,
    KP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BOUND: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Z1 of the keys, and what this block gives to Z2 `[N, J, K, D]`, b2 by the first, at `slot`'s weights.

    First the bound is kept to, if a mini-batch before has changed the weights; with no mini-batch left
    (`mini_batch` below 0) that is all.
    """
    SIZE: tl.constexpr = 2 * D * F + F + D
    TRACE: tl.constexpr = KP * (3 * F + 2 * D)
    J: tl.constexpr = F // BF
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, rows, f = tl.arange(0, D), tl.arange(0, KP), block * BF + tl.arange(0, BF)
    w = state + (slot * N + n) * SIZE
    if BOUND and has_changed > 0:
        _pull_back(
            w, center + (n % H) * SIZE, squares + n * 2 * J, factors + (slot * N + n) * 2,
            radius1, radius2, f, d, block, D, F, J,
        )  # fmt: skip
    if mini_batch >= 0:
        at = mini_batch * N + n
        keys = load_block(k + at * KP * D, rows, d, D)
        z1_t = product(load_block(w, f, d, D), tl.trans(keys), P) + tl.load(w + D * F + f)[:, None]
        store_block(trace + at * TRACE, f, rows, KP, z1_t)
        z2 = over_units(gelu(z1_t), load_block(w + D * F + F, f, d, D), P)
        b2 = tl.load(w + 2 * D * F + F + d, mask=(d >= 0) & (block == 0), other=0.0)
        store_block(outputs + (n * J + block) * KP * D, rows, d, D, z2 + b2[None, :])


@triton.jit
def _squared_change(new, base, at):
    change = new - tl.load(base + at)
    return tl.sum(change * change)


@triton.jit(do_not_specialize=["N", "H", "slot", "next_slot", "mini_batch"])
def answer(
    q, k, target, seen, step, gamma, beta, state, center, squares, trace, outputs, answers, overlaps,
    N, H, slot, next_slot, mini_batch,
    KP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BOUND: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What this block gives to the queries' Z2 (`answers`) and to X2 of queries times keys (`overlaps`).

    The weights after the mini-batch go to `next_slot`, their squared distance from the center to `squares`.
    """
    SIZE: tl.constexpr = 2 * D * F + F + D
    TRACE: tl.constexpr = KP * (3 * F + 2 * D)
    J: tl.constexpr = F // BF
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, rows, f = tl.arange(0, D), tl.arange(0, KP), block * BF + tl.arange(0, BF)
    at = mini_batch * N + n
    w, new, note = state + (slot * N + n) * SIZE, state + (next_slot * N + n) * SIZE, trace + at * TRACE
    tokens, second = at * KP * D, D * F + F
    z2 = sum_of_parts(outputs + n * J * KP * D, rows, d, D, KP * D, J)
    weight, shift = tl.load(gamma + n * D + d)[None, :], tl.load(beta + n * D + d)[None, :]
    g2 = loss_gradient(z2, load_block(target + tokens, rows, d, D), weight, shift)

    z1_t, w2 = load_block(note, f, rows, KP), load_block(w + second, f, d, D)
    u_t = product(w2, tl.trans(g2), P)
    g1_t, x2_t = u_t * gelu_first(z1_t), gelu(z1_t)
    w1_t, b1 = load_block(w, f, d, D), tl.load(w + D * F + f)
    answer1_t = product(w1_t, tl.trans(load_block(q + tokens, rows, d, D)), P) + b1[:, None]
    answer1_t -= product(g1_t, tl.trans(load_block(seen + at * KP * KP, rows, rows, KP)), P)
    xq2_t = gelu(answer1_t)
    part = at * J + block
    # Only the first block reads the bias: it is the one that writes it, in place perhaps.
    b2 = tl.load(w + second + F * D + d, mask=(d >= 0) & (block == 0), other=0.0)
    store_block(answers + part * KP * D, rows, d, D, over_units(xq2_t, w2, P) + b2[None, :])
    store_block(overlaps + part * KP * KP, rows, rows, KP, product(tl.trans(xq2_t), x2_t, P))

    steps = tl.load(step + at * KP + rows)
    step_g1_t, step_g2 = steps[None, :] * g1_t, steps[:, None] * g2
    store_block(note + KP * F, f, rows, KP, answer1_t)
    store_block(note + 2 * KP * F, f, rows, KP, u_t)
    # Read once more, from the cache: to keep them in registers would push others out.
    w1_t = load_again(w, f, d, D) - product(step_g1_t, load_block(k + tokens, rows, d, D), P)
    store_block(new, f, d, D, w1_t)
    w2 = load_again(w + second, f, d, D) - product(x2_t, step_g2, P)
    store_block(new + second, f, d, D, w2)
    b1, b2 = b1 - tl.sum(step_g1_t, 1), b2 - tl.sum(step_g2, 0)
    tl.store(new + D * F + f, b1)
    if BOUND:
        middle, own = center + (n % H) * SIZE, f[:, None] * D + d[None, :]
        change1 = _squared_change(w1_t, middle, own) + _squared_change(b1, middle, D * F + f)
        change2 = _squared_change(w2, middle + second, own)
        change2 += tl.where(block == 0, _squared_change(b2, middle + second + F * D, d), 0.0)
        tl.store(squares + (n * J + block) * 2, change1)
        tl.store(squares + (n * J + block) * 2 + 1, change2)
    if block == 0:
        store_block(note + 3 * KP * F, rows, d, D, z2)
        store_block(note + 3 * KP * F + KP * D, rows, d, D, g2)
        tl.store(new + second + F * D + d, b2)
