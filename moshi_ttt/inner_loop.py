"""The inner learner of a TTT layer: a small network trained by gradient descent while it is used.

Sources: Sun et al., "Learning to (Learn at Test Time)", arXiv 2407.04620; Dalal et al., "One-Minute Video
Generation with Test-Time Training", arXiv 2504.05298. Written for any number of inner linear layers: one is
TTT-Linear, two TTT-MLP, more the multi-layer TTT-MLP.

For each head, `f(x) = W_n gelu(... gelu(x W_1 + b_1) ...) + b_n`. The inner loss of token s is
`1/2 || LN(f(k_s)) - target_s ||^2`. With `X_l,s` the input of layer l for key `k_s` and `G_l,s` the loss
gradient at its output, both at the weights at the start of the mini-batch, token t is answered with

    W_l(t) = W_l - c_t sum_{s <= t} lr_s X_l,s^T G_l,s        b_l(t) likewise with G_l,s alone
    out_t  = q_t + LN(f(q_t; W(t), b(t)))

Only tokens 0 .. t of the mini-batch enter, so the output is strictly causal. The next mini-batch starts from
the weights of its last token.

* `inner_loop` is the dual form: whole mini-batches at once, no W(t) is ever formed. Training uses it.
* `inner_step` is the primal form for one token, for streaming. It keeps the sums over s as their factors
  X, G and lr: less memory to move than the sums themselves, as a mini-batch has fewer tokens than a head is
  wide. `fold_finished` adds them to the weights at the end of a mini-batch.

Everything here is float32 (or float64 in tests): see `InnerWeights`.
"""

import torch

from moshi_ttt.dual_form import dual_form
from moshi_ttt.inner_network import InnerNorm, answer, fold, key_pass
from moshi_ttt.inner_weights import InnerBound, InnerWeights, pulled_back
from moshi_ttt.kernels.choice import scan_kernel, use_native
from moshi_ttt.kernels.native_form import native_form
from moshi_ttt.kernels.native_step import native_fold, native_step
from moshi_ttt.mini_batches import Rules, Tokens
from moshi_ttt.pending import PendingUpdates


def step_scale(token_scale: torch.Tensor) -> torch.Tensor:
    """`[K, K]`: how much of token s's step (column) the weights of token t (row) hold: c_t, or 0 for s > t.

    Args:
        token_scale: c of each position in a mini-batch, `[K]`.
    """
    return torch.tril(token_scale[:, None].expand(-1, token_scale.shape[0]))


def inner_loop(
    q: torch.Tensor,
    k: torch.Tensor,
    target: torch.Tensor,
    lr: torch.Tensor,
    state: InnerWeights,
    norm: InnerNorm,
    step_scale: torch.Tensor,
    checkpoint_group_size: int = 0,
    bound: InnerBound | None = None,
    kernel: str = "auto",
) -> tuple[torch.Tensor, InnerWeights]:
    """Run the inner learner over a sequence that starts at a mini-batch edge (dual form).

    Args:
        q, k, target: queries, keys and targets `[N, T, D]`, float32; N = B * H.
        lr: inner learning rate of each token `[N, T]`.
        state: weights at the start.
        norm: LayerNorm of the inner loss.
        step_scale: see `step_scale`, `[K, K]`; its size is the mini-batch size.
        checkpoint_group_size: mini-batches whose activations the backward pass makes again together; 0: all.
        bound: the weights are drawn back into it after each mini-batch; None lets them go anywhere.
        kernel: which implementation runs, see `moshi_ttt.kernels.choice`.
    Returns:
        Outputs `[N, T, D]` and the weights W(T - 1). T need not be a multiple of K, but only a
        sequence cut at a mini-batch edge can be continued from the returned weights.
    """
    tokens, rules = Tokens(q, k, target, lr), Rules(norm, step_scale, bound)
    chosen = scan_kernel(kernel, state, step_scale.shape[0])
    if chosen == "eager":
        return dual_form(tokens, state, rules, checkpoint_group_size)
    if chosen == "native":
        return native_form(tokens, state, rules, checkpoint_group_size)
    from moshi_ttt.kernels.triton_form import triton_form  # here, because Triton takes long to import

    return triton_form(tokens, state, rules, checkpoint_group_size)


def inner_step(
    q: torch.Tensor,
    k: torch.Tensor,
    target: torch.Tensor,
    lr: torch.Tensor,
    position: torch.Tensor,
    state: InnerWeights,
    pending: PendingUpdates,
    norm: InnerNorm,
    step_scale: torch.Tensor,
    kernel: str = "auto",
) -> torch.Tensor:
    """Answer one token and put its update into slot `position` (primal form). Writes `pending` in place.

    Args:
        q, k, target: `[N, 1, D]`.
        lr: `[N, 1]`.
        position: the token's position in its mini-batch, `[N]`. A caller that does not advance it has the
            slot overwritten by the next token: the token never counted.
        state: weights at the start of the mini-batch.
        step_scale: see `step_scale`, `[K, K]`.
        kernel: which implementation runs, see `moshi_ttt.kernels.choice`.
    Returns:
        `[N, 1, D]`. The caller advances the positions and calls `fold_finished`.
    """
    if use_native(kernel, state):
        rules = Rules(norm, step_scale, None)
        return native_step(Tokens(q, k, target, lr), position, state, pending, rules)
    keys = key_pass(k, target, state, norm)
    pending.write(position, keys.inputs, keys.grads, lr)
    eta = step_scale[position] * pending.lr
    return answer(q, eta[:, None], pending.inputs, pending.grads, state, norm)


def fold_finished(
    finished: torch.Tensor | None,
    state: InnerWeights,
    pending: PendingUpdates,
    step_scale: torch.Tensor,
    bound: InnerBound | None = None,
    kernel: str = "auto",
) -> None:
    """Add the pending updates to the weights where a mini-batch is complete, in place.

    Args:
        finished: where the last token of a mini-batch has just been done, `[N]`; None: everywhere.
        bound: the weights are drawn back into it; None lets them go anywhere.
        kernel: which implementation runs, see `moshi_ttt.kernels.choice`.
    """
    if use_native(kernel, state):
        native_fold(finished, state, pending, step_scale, bound)
        return

    def counted(x: torch.Tensor) -> torch.Tensor:
        # Masked on both sides: what a resting row was fed may be NaN, which a product with 0 would keep.
        return x if finished is None else torch.where(finished[:, None, None], x, 0)

    step = (step_scale[-1] * pending.lr)[..., None]
    for x, g, weight, bias in zip(pending.inputs, pending.grads, state.weights, state.biases, strict=True):
        scaled = counted(step * g)
        # One fused pass over the weights: they are the largest thing that streaming moves.
        weight.baddbmm_(counted(x).transpose(1, 2), scaled, alpha=-1)
        bias.sub_(scaled.sum(dim=1, keepdim=True))
    if bound is None:
        return
    for layer, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True)):
        pulled = pulled_back(weight, bias, layer, bound, ask=weight.device.type == "cpu")
        for now, new in zip((weight, bias), pulled, strict=True):
            if new is not now:
                # Where no mini-batch has ended, rounding could move what lies on the surface.
                now.copy_(new if finished is None else torch.where(finished[:, None, None], new, now))


def effective_weights(
    position: torch.Tensor, state: InnerWeights, pending: PendingUpdates, step_scale: torch.Tensor
) -> InnerWeights:
    """Weights that the last token was answered with, the pending updates included.

    Args:
        position: tokens that the current mini-batch has seen, `[N]`.
    """
    step = (position > 0)[:, None] * step_scale[position - 1] * pending.lr
    return fold(pending.inputs, pending.grads, step, state)
