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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moshi_ttt.inner_weights import InnerBound, InnerWeights, pulled_back, within

LAYER_NORM_EPS = 1e-6


@dataclass
class InnerNorm:
    """The LayerNorm of the inner loss: `weight` and `bias` `[N, 1, D]`, one for each row and head."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class PendingUpdates:
    """Factors of the weight updates that the current mini-batch has gathered, one slot a token.

    Args:
        inputs: X of each layer, `[N, K, d_in]`.
        grads: G of each layer, `[N, K, d_out]`.
        lr: `[N, K]`.
    """

    inputs: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor, ...]
    lr: torch.Tensor

    @staticmethod
    def empty(nets: int, size: int, widths: list[int], like: torch.Tensor) -> "PendingUpdates":
        """Empty slots for N nets, mini-batches of K and an inner network of these widths."""
        return PendingUpdates(
            tuple(like.new_zeros(nets, size, width) for width in widths[:-1]),
            tuple(like.new_zeros(nets, size, width) for width in widths[1:]),
            like.new_zeros(nets, size),
        )

    def clear(self, nets: torch.Tensor) -> None:
        """Zero the slots where `nets` `[N]` is true."""
        for buffer in (*self.inputs, *self.grads):
            buffer.masked_fill_(nets[:, None, None], 0)
        self.lr.masked_fill_(nets[:, None], 0)

    def write(
        self, position: torch.Tensor, inputs: list[torch.Tensor], grads: list[torch.Tensor], lr: torch.Tensor
    ) -> None:
        """Put one token, `[N, 1, ...]` each, into slot `position` `[N]`."""
        nets = torch.arange(position.shape[0], device=position.device)
        for buffer, new in zip((*self.inputs, *self.grads, self.lr), (*inputs, *grads, lr), strict=True):
            buffer[nets, position] = new[:, 0]


def step_scale(token_scale: torch.Tensor) -> torch.Tensor:
    """`[K, K]`: how much of token s's step (column) the weights of token t (row) hold: c_t, or 0 for s > t.

    Args:
        token_scale: c of each position in a mini-batch, `[K]`.
    """
    return torch.tril(token_scale[:, None].expand(-1, token_scale.shape[0]))


def layer_norm(x: torch.Tensor, norm: InnerNorm) -> torch.Tensor:
    """LayerNorm over the last axis with one weight and bias for each row and head, `[N, T, D]`."""
    return torch.addcmul(norm.bias, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), norm.weight)


def layer_norm_l2_grad(z: torch.Tensor, target: torch.Tensor, norm: InnerNorm) -> torch.Tensor:
    """Gradient of `1/2 || LN(z) - target ||^2` with respect to z, `[N, T, D]`."""
    width = z.shape[-1:]
    normed, mean, inv_std = torch.native_layer_norm(z, width, None, None, LAYER_NORM_EPS)
    grad = torch.addcmul(norm.bias - target, normed, norm.weight) * norm.weight
    # Torch's own backward kernels: fused, and differentiable for the outer loss.
    return torch.ops.aten.native_layer_norm_backward(
        grad, z, width, mean, inv_std, None, None, [True, False, False]
    )[0]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`grad` times the derivative of `gelu` at x."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _back_through(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`grad W^T`, `[N, T, d_in]`: the gradient `[N, T, d_out]` at a layer's input."""
    if grad.shape[1] == 1:
        # The same product, with the weight read in its own order: less than half the time for one token.
        return torch.bmm(weight, grad.transpose(1, 2)).view(grad.shape[0], 1, -1)
    return torch.bmm(grad, weight.transpose(1, 2))


def inputs_and_grads(
    k: torch.Tensor, target: torch.Tensor, state: InnerWeights, norm: InnerNorm
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """X and G of every layer for keys `[N, T, D]`, at the weights of `state`."""
    inputs, outputs = [k], []
    for index, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True)):
        outputs.append(torch.baddbmm(bias, inputs[-1], weight))
        if index + 1 < len(state.weights):
            inputs.append(gelu(outputs[-1]))
    grads = [layer_norm_l2_grad(outputs[-1], target, norm)]
    for weight, hidden in zip(reversed(state.weights[1:]), reversed(outputs[:-1]), strict=True):
        grads.append(gelu_backward(_back_through(weight, grads[-1]), hidden))
    return inputs, grads[::-1]


def answer(
    q: torch.Tensor,
    eta: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: InnerWeights,
    norm: InnerNorm,
) -> torch.Tensor:
    """Outputs for queries `[N, T, D]`, each with its own weights W(t), without forming them.

    Args:
        eta: `[N, T, S]`, step size that token s contributes to the weights of token t; 0 hides it.
        inputs, grads: X and G of the S tokens, for every layer.
    """
    x = q
    for index, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True)):
        if index > 0:
            x = gelu(x)
        # eta (x X^T + 1): the 1 is the input of the bias.
        steps = torch.addcmul(eta, torch.bmm(x, inputs[index].transpose(1, 2)), eta)
        x = torch.baddbmm(torch.baddbmm(bias, x, weight), steps, grads[index], alpha=-1)
    return q + layer_norm(x, norm)


def fold(
    inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], step: torch.Tensor, state: InnerWeights
) -> InnerWeights:
    """Weights after the updates of S tokens with step sizes `[N, S]` (c times lr)."""
    weights, biases = [], []
    for x, g, weight, bias in zip(inputs, grads, state.weights, state.biases, strict=True):
        scaled = step[..., None] * g
        weights.append(torch.baddbmm(weight, x.transpose(1, 2), scaled, alpha=-1))
        biases.append(bias - scaled.sum(dim=1, keepdim=True))
    return InnerWeights(tuple(weights), tuple(biases))


def _dual_mini_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    target: torch.Tensor,
    lr: torch.Tensor,
    state: InnerWeights,
    norm: InnerNorm,
    step_scale: torch.Tensor,
    bound: InnerBound | None,
) -> tuple[torch.Tensor, InnerWeights]:
    """One mini-batch of at most K tokens: outputs `[N, T, D]` and the weights to go on with."""
    length = q.shape[1]
    inputs, grads = inputs_and_grads(k, target, state, norm)
    eta = step_scale[:length, :length] * lr[:, None, :]
    out = answer(q, eta, inputs, grads, state, norm)
    return out, within(fold(inputs, grads, eta[:, -1], state), bound)


def _scan(
    q: torch.Tensor,
    k: torch.Tensor,
    target: torch.Tensor,
    lr: torch.Tensor,
    state: InnerWeights,
    norm: InnerNorm,
    step_scale: torch.Tensor,
    bound: InnerBound | None,
) -> tuple[torch.Tensor, InnerWeights]:
    size = step_scale.shape[0]
    outs = []
    for tokens in zip(
        q.split(size, 1), k.split(size, 1), target.split(size, 1), lr.split(size, 1), strict=True
    ):
        out, state = _dual_mini_batch(*tokens, state, norm, step_scale, bound)
        outs.append(out)
    return torch.cat(outs, dim=1), state


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
) -> tuple[torch.Tensor, InnerWeights]:
    """Run the inner learner over a sequence that starts at a mini-batch edge (dual form).

    Args:
        q, k, target: queries, keys and targets `[N, T, D]`, float32; N = B * H.
        lr: inner learning rate of each token `[N, T]`.
        state: weights at the start.
        norm: LayerNorm of the inner loss.
        step_scale: see `step_scale`, `[K, K]`; its size is the mini-batch size.
        checkpoint_group_size: mini-batches recomputed together in backward; 0 keeps all activations.
        bound: the weights are drawn back into it after each mini-batch; None lets them go anywhere.
    Returns:
        Outputs `[N, T, D]` and the weights W(T - 1). T need not be a multiple of K, but only a
        sequence cut at a mini-batch edge can be continued from the returned weights.
    """
    group = checkpoint_group_size * step_scale.shape[0]
    if group == 0 or not torch.is_grad_enabled() or q.shape[1] <= group:
        return _scan(q, k, target, lr, state, norm, step_scale, bound)
    outs = []
    for tokens in zip(
        q.split(group, 1), k.split(group, 1), target.split(group, 1), lr.split(group, 1), strict=True
    ):
        out, state = checkpoint(
            _scan, *tokens, state, norm, step_scale, bound, use_reentrant=False, preserve_rng_state=False
        )  # type: ignore[misc]
        outs.append(out)
    return torch.cat(outs, dim=1), state


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
) -> torch.Tensor:
    """Answer one token and put its update into slot `position` (primal form). Writes `pending` in place.

    Args:
        q, k, target: `[N, 1, D]`.
        lr: `[N, 1]`.
        position: the token's position in its mini-batch, `[N]`. A caller that does not advance it has the
            slot overwritten by the next token: the token never counted.
        state: weights at the start of the mini-batch.
        step_scale: see `step_scale`, `[K, K]`.
    Returns:
        `[N, 1, D]`. The caller advances the positions and calls `fold_finished`.
    """
    inputs, grads = inputs_and_grads(k, target, state, norm)
    pending.write(position, inputs, grads, lr)
    eta = step_scale[position] * pending.lr
    return answer(q, eta[:, None], pending.inputs, pending.grads, state, norm)


def fold_finished(
    finished: torch.Tensor | None,
    state: InnerWeights,
    pending: PendingUpdates,
    step_scale: torch.Tensor,
    bound: InnerBound | None = None,
) -> None:
    """Add the pending updates to the weights where a mini-batch is complete, in place.

    Args:
        finished: where the last token of a mini-batch has just been done, `[N]`; None: everywhere.
        bound: the weights are drawn back into it; None lets them go anywhere.
    """

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
