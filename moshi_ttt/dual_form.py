"""The dual form of the inner loop with its gradients written out.

Autograd would keep a graph of some fifty operations for each mini-batch, differentiate LayerNorm and GELU
twice by their general formulas, and go over every gradient of the inner weights several times. Here a
mini-batch's backward pass is one function: the chain rule through the equations of `moshi_ttt/inner_loop.py`,
with one pass over each inner weight's gradient. The tests hold it against autograd of the reference.

In the comments `dX` is the gradient of the outer loss at X; names without d are those of the forward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moshi_ttt.inner_network import (
    LAYER_NORM_EPS,
    InnerNorm,
    KeyPass,
    fold,
    gelu_backward,
    gelu_second,
    key_pass,
    layer_norm,
    query_pass,
)
from moshi_ttt.inner_weights import InnerBound, InnerWeights, within


@dataclass
class Tokens:
    """Queries, keys, targets `[N, T, D]` and learning rates `[N, T]`: all of a sequence or a part of it."""

    q: torch.Tensor
    k: torch.Tensor
    target: torch.Tensor
    lr: torch.Tensor

    def split(self, size: int) -> "list[Tokens]":
        """Parts of `size` tokens; the last may be shorter."""
        parts = zip(*(x.split(size, 1) for x in self.tensors()), strict=True)
        return [Tokens(*part) for part in parts]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the fields."""
        return self.q, self.k, self.target, self.lr


@dataclass
class Trace:
    """What the backward pass of a mini-batch needs of its forward pass.

    Args:
        start: the weights at its start.
        outside: the weights after its updates where the bound drew some of them back; None where it did not.
        queries, answers: inputs and outputs of every layer for the queries.
    """

    tokens: Tokens
    start: InnerWeights
    outside: InnerWeights | None
    keys: KeyPass
    queries: list[torch.Tensor]
    answers: list[torch.Tensor]


@dataclass
class Rules:
    """What all mini-batches of a sequence share: LayerNorm, step scales `[K, K]`, and the bound."""

    norm: InnerNorm
    scale: torch.Tensor
    bound: InnerBound | None

    def eta(self, tokens: Tokens) -> torch.Tensor:
        """Step sizes `[N, T, T]`: of token s (column) in the weights of token t (row)."""
        length = tokens.lr.shape[1]
        return self.scale[:length, :length] * tokens.lr[:, None, :]


def _mini_batch(
    tokens: Tokens, start: InnerWeights, rules: Rules
) -> tuple[torch.Tensor, InnerWeights, Trace]:
    """At most K tokens: outputs `[N, T, D]`, the weights to go on with, and the trace."""
    keys = key_pass(tokens.k, tokens.target, start, rules.norm)
    eta = rules.eta(tokens)
    queries, answers = query_pass(tokens.q, eta, keys.inputs, keys.grads, start)
    folded = fold(keys.inputs, keys.grads, eta[:, -1], start)
    end = within(folded, rules.bound)
    out = tokens.q + layer_norm(answers[-1], rules.norm)
    return out, end, Trace(tokens, start, None if end is folded else folded, keys, queries, answers)


def _scan(
    tokens: Tokens, state: InnerWeights, rules: Rules, traces: list[Trace] | None
) -> tuple[torch.Tensor, InnerWeights]:
    """Mini-batches one after the other; their traces are put into `traces`, if given."""
    outs = []
    for part in tokens.split(rules.scale.shape[0]):
        out, state, trace = _mini_batch(part, state, rules)
        outs.append(out)
        if traces is not None:
            traces.append(trace)
    return torch.cat(outs, dim=1), state


@dataclass
class Gradients:
    """Gradients that a backward pass over mini-batches, last to first, adds up.

    Args:
        weights, biases: of the inner weights at the mini-batch that is being worked on; changed in place.
        norm_weight, norm_bias: of the LayerNorm `[N, 1, D]`.
        scale: of the step scales `[K, K]`.
        center: of the bound's center, weights then biases; None where nothing was outside.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    scale: torch.Tensor
    center: list[torch.Tensor] | None = None


def _backward(trace: Trace, d_out: torch.Tensor, rules: Rules, d: Gradients) -> Tokens:
    """Backward pass of `_mini_batch`: gradients of its tokens; those of the rest are added to `d`.

    On entry `d.weights` and `d.biases` are the gradients of the weights that it ended with, on return those
    of the weights that it started from.
    """
    if trace.outside is not None:
        _backward_bound(trace.outside, rules, d)
    keys, start, eta = trace.keys, trace.start, rules.eta(trace.tokens)
    d_eta = torch.zeros_like(eta)
    d_inputs, d_grads = _backward_fold(keys, eta, d_eta, d)

    d_z = _backward_layer_norm(trace.answers[-1], d_out, rules.norm, d)
    d_answers = [d_z]
    for layer in reversed(range(len(start.weights))):
        x, key, grad = trace.queries[layer], keys.inputs[layer], keys.grads[layer]
        ones = torch.baddbmm(torch.ones_like(eta), x, key.transpose(1, 2))
        d_steps = torch.bmm(d_z, grad.transpose(1, 2)).neg_()
        d_eta.addcmul_(d_steps, ones)
        d_products = d_steps.mul_(eta)
        d_grads[layer].baddbmm_(ones.mul_(eta).transpose(1, 2), d_z, alpha=-1)
        d_inputs[layer].baddbmm_(d_products.transpose(1, 2), x)
        d_x = torch.bmm(d_z, start.weights[layer].transpose(1, 2)).baddbmm_(d_products, key)
        if layer > 0:
            d_z = gelu_backward(d_x, trace.answers[layer - 1])
            d_answers.append(d_z)
    d_q = d_out + d_x
    d_answers.reverse()

    d_outputs, d_throughs, d_target = _backward_grads(trace, d_grads, rules, d)
    for layer in reversed(range(len(start.weights))):
        d_z = d_outputs[layer]
        d_x = d_inputs[layer].baddbmm_(d_z, start.weights[layer].transpose(1, 2))
        if layer > 0:
            d_outputs[layer - 1] = d_outputs[layer - 1] + gelu_backward(d_x, keys.outputs[layer - 1])
        # One pass over the weight's gradient for all that read the weight.
        left, right = [trace.queries[layer], keys.inputs[layer]], [d_answers[layer], d_z]
        if layer > 0:
            left.append(d_throughs[layer - 1])
            right.append(keys.grads[layer])
        d.weights[layer].baddbmm_(torch.cat(left, 1).transpose(1, 2), torch.cat(right, 1))
        d.biases[layer].add_(d_answers[layer].sum(1, keepdim=True)).add_(d_z.sum(1, keepdim=True))

    length = eta.shape[1]
    d.scale[:length, :length] += torch.einsum("nts,ns->ts", d_eta, trace.tokens.lr)
    d_lr = torch.einsum("nts,ts->ns", d_eta, rules.scale[:length, :length])
    return Tokens(d_q, d_inputs[0], d_target, d_lr)


def _backward_bound(folded: InnerWeights, rules: Rules, d: Gradients) -> None:
    """Through the bound, which rarely acts: by autograd."""
    assert rules.bound is not None
    center = rules.bound.center
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (*folded.weights, *folded.biases)]
        centers = [x.detach().requires_grad_() for x in (*center.weights, *center.biases)]
        depth = len(folded.weights)
        state = InnerWeights(tuple(leaves[:depth]), tuple(leaves[depth:]))
        bound = InnerBound(InnerWeights(tuple(centers[:depth]), tuple(centers[depth:])), rules.bound.radii)
        end = within(state, bound)
    grads = torch.autograd.grad(
        [*end.weights, *end.biases],
        [*leaves, *centers],
        [*d.weights, *d.biases],
        allow_unused=True,
        materialize_grads=True,
    )
    d.weights, d.biases = [g.clone() for g in grads[:depth]], [g.clone() for g in grads[depth : 2 * depth]]
    of_center = list(grads[2 * depth :])
    d.center = of_center if d.center is None else [a + b for a, b in zip(d.center, of_center, strict=True)]


def _backward_fold(
    keys: KeyPass, eta: torch.Tensor, d_eta: torch.Tensor, d: Gradients
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Through W' = W - X^T (step G), b' = b - sum(step G): dX and dG of every layer."""
    step = eta[:, -1, :, None]
    d_inputs, d_grads = [], []
    for x, g, d_weight, d_bias in zip(keys.inputs, keys.grads, d.weights, d.biases, strict=True):
        d_scaled = torch.baddbmm(d_bias, x, d_weight).neg_()
        d_inputs.append(torch.bmm(step * g, d_weight.transpose(1, 2)).neg_())
        d_eta[:, -1] += (d_scaled * g).sum(-1)
        d_grads.append(d_scaled.mul_(step))
    return d_inputs, d_grads


def _backward_layer_norm(z: torch.Tensor, d_out: torch.Tensor, norm: InnerNorm, d: Gradients) -> torch.Tensor:
    """Through LN(z): dz."""
    width = z.shape[-1:]
    normed, mean, inv_std = torch.native_layer_norm(z, width, None, None, LAYER_NORM_EPS)
    d.norm_weight += (d_out * normed).sum(1, keepdim=True)
    d.norm_bias += d_out.sum(1, keepdim=True)
    return torch.ops.aten.native_layer_norm_backward(
        d_out * norm.weight, z, width, mean, inv_std, None, None, [True, False, False]
    )[0]


def _backward_grads(
    trace: Trace, d_grads: list[torch.Tensor], rules: Rules, d: Gradients
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Through G of every layer, first to last: what they give to Z, to G W^T of the layers below, to targets.

    With U_l = G_(l+1) W_(l+1)^T, G_l is gelu'(Z_l) U_l.
    """
    keys, weights = trace.keys, trace.start.weights
    d_outputs, d_throughs = [], []
    for layer in range(len(weights) - 1):
        z, weight = keys.outputs[layer], weights[layer + 1]
        through = torch.bmm(keys.grads[layer + 1], weight.transpose(1, 2))
        d_outputs.append(through.mul_(d_grads[layer]).mul_(gelu_second(z)))
        d_throughs.append(gelu_backward(d_grads[layer], z))
        d_grads[layer + 1].baddbmm_(d_throughs[-1], weight)
    d_z, d_target = _backward_loss_grad(keys.outputs[-1], trace.tokens.target, d_grads[-1], rules.norm, d)
    return [*d_outputs, d_z], d_throughs, d_target


def _backward_loss_grad(
    z: torch.Tensor, target: torch.Tensor, d_grad: torch.Tensor, norm: InnerNorm, d: Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through G = J a with a = weight (weight n + bias - target): dz and dtarget.

    n is z normalised, r its inverse deviation, and J = r (1 - mean - n mean(n .)) the Jacobian of n(z), which
    is symmetric and depends on z itself through n and r.
    """
    width = z.shape[-1:]
    normed, mean, inv_std = torch.native_layer_norm(z, width, None, None, LAYER_NORM_EPS)

    def through_normed(grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            grad, z, width, mean, inv_std, None, None, [True, False, False]
        )[0]

    error = torch.addcmul(norm.bias - target, normed, norm.weight)
    a = error * norm.weight
    d_a = through_normed(d_grad)
    d_error = d_a * norm.weight
    d.norm_weight += (d_a * error + d_error * normed).sum(1, keepdim=True)
    d.norm_bias += d_error.sum(1, keepdim=True)
    d_normed = d_error * norm.weight
    a_n, g_n = (a * normed).mean(-1, keepdim=True), (d_grad * normed).mean(-1, keepdim=True)
    d_normed -= inv_std * (d_grad * a_n + a * g_n)
    # r has the derivative -r^2 n / D, and dr = (d_grad . G) / r.
    d_r_by_r = (d_grad * (a - a.mean(-1, keepdim=True) - normed * a_n)).mean(-1, keepdim=True)
    return through_normed(d_normed) - inv_std**2 * d_r_by_r * normed, -d_error


class DualForm(torch.autograd.Function):
    """The scan over mini-batches.

    `dual_form` puts its tensors in order. Traces of groups of mini-batches are made again in the backward
    pass; with one group they are kept until then.
    """

    @staticmethod
    def forward(ctx: Any, group_tokens: int, radii: tuple[float, ...] | None, *tensors: torch.Tensor) -> Any:
        tokens, state, rules = unpacked(tensors, radii)
        groups = tokens.split(group_tokens)
        outs, starts = [], []
        traces: list[Trace] = []
        for group in groups:
            starts.append(state)
            out, state = _scan(group, state, rules, traces if len(groups) == 1 else None)
            outs.append(out)
        ctx.save_for_backward(*tensors)
        ctx.radii, ctx.starts, ctx.traces, ctx.group_tokens = radii, starts, traces, group_tokens
        return torch.cat(outs, dim=1), *state.weights, *state.biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, *d_state: torch.Tensor) -> Any:
        tokens, state, rules = unpacked(ctx.saved_tensors, ctx.radii)
        depth, size = len(state.weights), rules.scale.shape[0]
        d = Gradients(
            [g.clone() for g in d_state[:depth]],
            [g.clone() for g in d_state[depth:]],
            torch.zeros_like(rules.norm.weight),
            torch.zeros_like(rules.norm.bias),
            torch.zeros_like(rules.scale),
        )
        parts: list[Tokens] = []
        groups, d_groups = tokens.split(ctx.group_tokens), d_out.split(ctx.group_tokens, 1)
        for group, d_group, start in reversed(list(zip(groups, d_groups, ctx.starts, strict=True))):
            traces, ctx.traces = ctx.traces, []
            if not traces:
                _scan(group, start, rules, traces)
            d_outs = d_group.split(size, 1)
            while traces:  # each is let go of as soon as it is done
                trace = traces.pop()
                parts.append(_backward(trace, d_outs[len(traces)], rules, d))
        parts.reverse()
        d_tokens = [torch.cat(pieces, 1) for pieces in zip(*(part.tensors() for part in parts), strict=True)]
        d_center = [] if rules.bound is None else d.center or [None] * (2 * depth)
        return None, None, *d_tokens, d.norm_weight, d.norm_bias, d.scale, *d.weights, *d.biases, *d_center


def unpacked(
    tensors: tuple[torch.Tensor, ...], radii: tuple[float, ...] | None
) -> tuple[Tokens, InnerWeights, Rules]:
    """Tokens, first weights and rules of the tensors of `DualForm`."""
    q, k, target, lr, norm_weight, norm_bias, scale, *rest = tensors
    depth = len(rest) // (2 if radii is None else 4)
    layers = [tuple(rest[i : i + depth]) for i in range(0, len(rest), depth)]
    bound = None if radii is None else InnerBound(InnerWeights(layers[2], layers[3]), radii)
    rules = Rules(InnerNorm(norm_weight, norm_bias), scale, bound)
    return Tokens(q, k, target, lr), InnerWeights(layers[0], layers[1]), rules


def dual_form(
    tokens: Tokens, state: InnerWeights, rules: Rules, checkpoint_group_size: int
) -> tuple[torch.Tensor, InnerWeights]:
    """Outputs `[N, T, D]` and last weights of a sequence; see `moshi_ttt.inner_loop.inner_loop`."""
    if not torch.is_grad_enabled():
        return _scan(tokens, state, rules, None)
    return differentiable(DualForm, tokens, state, rules, checkpoint_group_size)


def differentiable(
    function: type[torch.autograd.Function],
    tokens: Tokens,
    state: InnerWeights,
    rules: Rules,
    checkpoint_group_size: int,
) -> tuple[torch.Tensor, InnerWeights]:
    """The scan by `function`, which takes its tensors in the order of `DualForm`."""
    group_tokens = checkpoint_group_size * rules.scale.shape[0] or tokens.q.shape[1]
    bound = rules.bound
    center = () if bound is None else (*bound.center.weights, *bound.center.biases)
    out, *end = function.apply(
        group_tokens,
        None if bound is None else bound.radii,
        *tokens.tensors(),
        rules.norm.weight,
        rules.norm.bias,
        rules.scale,
        *state.weights,
        *state.biases,
        *center,
    )  # type: ignore[misc]
    depth = len(state.weights)
    return out, InnerWeights(tuple(end[:depth]), tuple(end[depth:]))
