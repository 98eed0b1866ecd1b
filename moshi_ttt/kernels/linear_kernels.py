"""The mini-batches of TTT-Linear (one inner layer) in one kernel forward and one back.

A program has a net and goes through all mini-batches of a group. The net's weights (64 KB at Moshi's head
width) would fit into registers, but what products in three parts of tf32 make of them would not: they stay in
memory, which is to say in the caches, and blocks of their rows are worked on one after the other. What does
not wait for the mini-batch before, or going back for the one after, is left to the operations of torch around
(`moshi_ttt/kernels/linear_scan.py`).

Layout of a net's state: W `[D, D]`, b `[D]`. Mini-batches have KP rows, of which those without a token have
step size 0. The maths is in `moshi_ttt/inner_loop.py`; the naive twin is `moshi_ttt/dual_form.py`; `dX` is
the gradient of the outer loss at X.
"""

import triton
import triton.language as tl

from moshi_ttt.kernels.parts import (
    bound_factor,
    load_block,
    loss_gradient,
    product,
    store_block,
    through_loss_gradient,
)


@triton.jit
def _square_distance(w, b, center, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """|W - center|^2, of W that `w` points to and b as it is."""
    change = b - tl.load(center + D * D + d)
    square = tl.sum(change * change)
    for row in range(0, D, BLOCK):
        own = row + tl.arange(0, BLOCK)
        change_w = load_block(w, own, d, D) - load_block(center, own, d, D)
        square += tl.sum(change_w * change_w)
    return square


@triton.jit
def _drawn_back(w, b, center, factor, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Draw W that `w` points to back to its center, and return b that was."""
    for row in range(0, D, BLOCK):
        own = row + tl.arange(0, BLOCK)
        start = load_block(center, own, d, D)
        store_block(w, own, d, D, start + factor * (load_block(w, own, d, D) - start))
    start_b = tl.load(center + D * D + d)
    return start_b + factor * (b - start_b)


@triton.jit(do_not_specialize=["N", "H", "M"])
def forward(
    q, k, target, step, gamma, beta, state, center, factors, outputs, grads, answers,
    N, H, M, radius,
    KP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    KEEP: tl.constexpr, BOUND: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Z (`outputs`) and G (`grads`) of the keys, and what the first weights of each mini-batch answer.

    The queries' answers lack the updates of their own mini-batch. With KEEP the weights after mini-batch i go
    to slot i + 1 of the states, else they are changed in place.
    """
    SIZE: tl.constexpr = D * D + D
    n, d, rows = tl.program_id(0).to(tl.int64), tl.arange(0, D), tl.arange(0, KP)
    weight, shift = tl.load(gamma + n * D + d)[None, :], tl.load(beta + n * D + d)[None, :]
    middle = center + (n % H) * SIZE
    w = state + n * SIZE
    b = tl.load(w + D * D + d)
    i = 0
    while i < M:  # Triton's interpreter makes no range of an argument without a warning of NumPy's
        at = i * N + n
        tokens = at * KP * D
        z, answer = tl.zeros((KP, D), tl.float32) + b[None, :], tl.zeros((KP, D), tl.float32) + b[None, :]
        for row in range(0, D, BLOCK):
            own = row + tl.arange(0, BLOCK)
            part = load_block(w, own, d, D)
            z += product(load_block(k + tokens, rows, own, D), part, P)
            answer += product(load_block(q + tokens, rows, own, D), part, P)
        store_block(answers + tokens, rows, d, D, answer)
        store_block(outputs + tokens, rows, d, D, z)
        g = loss_gradient(z, load_block(target + tokens, rows, d, D), weight, shift)
        store_block(grads + tokens, rows, d, D, g)
        scaled = tl.load(step + at * KP + rows)[:, None] * g
        # In place, no thread may write what another has not read yet.
        tl.debug_barrier()
        new = w + N * SIZE if KEEP else w
        for row in range(0, D, BLOCK):
            own = row + tl.arange(0, BLOCK)
            change = product(tl.trans(load_block(k + tokens, rows, own, D)), scaled, P)
            store_block(new, own, d, D, load_block(w, own, d, D) - change)
        b -= tl.sum(scaled, 0)
        tl.debug_barrier()
        w = new
        if BOUND:
            factor = bound_factor(_square_distance(w, b, middle, d, D, BLOCK), radius)
            tl.store(factors + at, factor)
            if factor < 1:
                b = _drawn_back(w, b, middle, factor, d, D, BLOCK)
                tl.debug_barrier()
        tl.store(w + D * D + d, b)
        i += 1


@triton.jit
def _through_bound(d_w, d_b, d_center, end, center, radius, factor, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Through W' = center + factor (W - center), factor = radius / |W - center|: in place of `d_w`, and db.

    The distance is fixed, so the part of dW along the change goes nowhere.
    """
    last = D * D + d
    change_b = tl.load(end + last) - tl.load(center + last)
    along = tl.sum(d_b * change_b)
    for row in range(0, D, BLOCK):
        own = row + tl.arange(0, BLOCK)
        change = load_block(end, own, d, D) - load_block(center, own, d, D)
        along += tl.sum(load_block(d_w, own, d, D) * change)
    pull = along / (radius * radius)
    for row in range(0, D, BLOCK):
        own = row + tl.arange(0, BLOCK)
        change = load_block(end, own, d, D) - load_block(center, own, d, D)
        whole = load_block(d_w, own, d, D)
        through = factor * (whole - pull * change)
        store_block(d_w, own, d, D, through)
        store_block(d_center, own, d, D, load_block(d_center, own, d, D) + whole - through)
    through_b = factor * (d_b - pull * change_b)
    tl.store(d_center + last, tl.load(d_center + last) + d_b - through_b)
    return through_b


@triton.jit(do_not_specialize=["N", "H", "M"])
def backward(
    q, k, target, step, gamma, beta, state, center, factors, outputs, grads, d_answers, d_grads,
    d_state, d_center, d_outputs, d_k, d_last, d_target, d_gamma, d_beta,
    N, H, M, radius,
    KP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dZ (`d_outputs`), dtarget, what the updates of the weights give to dk and to the last row of deta.

    `d_grads` is dG as far as the answers read it. `d_state`, the gradient of the last weights, becomes that
    of the first; dgamma, dbeta and dcenter are added to what is there.
    """
    SIZE: tl.constexpr = D * D + D
    n, d, rows = tl.program_id(0).to(tl.int64), tl.arange(0, D), tl.arange(0, KP)
    weight, shift = tl.load(gamma + n * D + d)[None, :], tl.load(beta + n * D + d)[None, :]
    d_weight, d_shift = tl.load(d_gamma + n * D + d), tl.load(d_beta + n * D + d)
    d_w = d_state + n * SIZE
    d_b = tl.load(d_w + D * D + d)
    i = M - 1
    while i >= 0:
        at = i * N + n
        tokens = at * KP * D
        if BOUND:
            factor = tl.load(factors + at)
            if factor < 1:
                d_b = _through_bound(
                    d_w, d_b, d_center + n * SIZE, state + (at + N) * SIZE, center + (n % H) * SIZE,
                    radius, factor, d, D, BLOCK,
                )  # fmt: skip
                tl.debug_barrier()
        # W' = W - X^T (step G), b' = b - sum(step G)
        g, steps = load_block(grads + tokens, rows, d, D), tl.load(step + at * KP + rows)
        scaled, d_scaled = steps[:, None] * g, tl.zeros((KP, D), tl.float32) - d_b[None, :]
        for row in range(0, D, BLOCK):
            own = row + tl.arange(0, BLOCK)
            part = load_block(d_w, own, d, D)
            d_scaled -= product(load_block(k + tokens, rows, own, D), part, P)
            store_block(d_k + tokens, rows, own, D, -product(scaled, tl.trans(part), P))
        tl.store(d_last + at * KP + rows, tl.sum(d_scaled * g, 1))
        d_g = d_scaled * steps[:, None] + load_block(d_grads + tokens, rows, d, D)
        z, wanted = load_block(outputs + tokens, rows, d, D), load_block(target + tokens, rows, d, D)
        d_z, d_wanted, more_weight, more_shift = through_loss_gradient(z, wanted, d_g, weight, shift)
        store_block(d_outputs + tokens, rows, d, D, d_z)
        store_block(d_target + tokens, rows, d, D, d_wanted)
        d_weight += more_weight
        d_shift += more_shift
        d_answer = load_block(d_answers + tokens, rows, d, D)
        d_b += tl.sum(d_z + d_answer, 0)
        # No thread may write what another has not read yet.
        tl.debug_barrier()
        for row in range(0, D, BLOCK):
            own = row + tl.arange(0, BLOCK)
            change = product(tl.trans(load_block(k + tokens, rows, own, D)), d_z, P)
            change += product(tl.trans(load_block(q + tokens, rows, own, D)), d_answer, P)
            store_block(d_w, own, d, D, load_block(d_w, own, d, D) + change)
        tl.debug_barrier()
        i -= 1
    tl.store(d_w + D * D + d, d_b)
    tl.store(d_gamma + n * D + d, d_weight)
    tl.store(d_beta + n * D + d, d_shift)
