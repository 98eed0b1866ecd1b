"""The dual form of the inner loop with its gradients written out.

Autograd would keep a graph of some fifty operations for each mini-batch, differentiate LayerNorm and GELU
twice by their general formulas, and go over every gradient of the inner weights several times. Here a
group of mini-batches has its backward pass written out, `moshi_ttt/mini_batches_backward.py`.

Nets do not know of each other. On the CPU few of them go through all mini-batches before the next ones do, so
that their weights stay in a core's cache: products with them are then three times as fast, and what the
backward pass needs of a group of mini-batches is held for a few nets at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moshi_ttt.inner_network import InnerNorm, layer_norm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.mini_batches import Answers, Rules, Tokens, answer_group, in_mini_batches, trace_group
from moshi_ttt.mini_batches_backward import Gradients, backward_group

CACHE_BYTES = 2**21
"""Inner weights that are worked on at once, for each thread; with fewer, Python would take over."""

GROUP_SIZE = 16
"""Mini-batches worked on together where there is no backward pass."""


def nets_at_once(state: InnerWeights, rules: Rules) -> list[slice]:
    """The nets in parts that are worked on one after the other."""
    nets = state.weights[0].shape[0]
    if state.weights[0].device.type != "cpu":
        return [slice(0, nets)]
    size = sum(w[0].numel() * w.element_size() for w in state.weights)
    most = max(1, CACHE_BYTES * torch.get_num_threads() // size)
    if rules.bound is not None:  # which is one row's: whole rows, or an even part of one
        heads = rules.bound.center.weights[0].shape[0]
        fitting = (part for part in range(min(most, heads), 0, -1) if heads % part == 0)
        most = most // heads * heads if most >= heads else next(fitting)
    return [slice(first, min(first + most, nets)) for first in range(0, nets, most)]


class DualForm(torch.autograd.Function):
    """The scan over mini-batches.

    `dual_form` puts its tensors in order. Of the forward pass only the outputs of the last inner layer are
    kept, and the weights that groups of mini-batches start with; the backward pass makes the rest again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group_size: int,
        radii: tuple[float, ...] | None,
        factors: tuple[float, ...] | None,
        *tensors: torch.Tensor,
    ) -> Any:
        tokens, state, rules = unpacked(tensors, radii, factors)
        group_size = group_size or tokens.q.shape[1]
        kept: list[_Kept] = []
        out, end = _scan(tokens, state, rules, group_size, kept)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.radii, ctx.factors, ctx.kept = radii, factors, kept
        return out, *end.weights, *end.biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, *d_state: torch.Tensor | None) -> Any:
        tokens, state, rules = unpacked(ctx.saved_tensors, ctx.radii, ctx.factors)
        ends = zip(d_state, (*state.weights, *state.biases), strict=True)
        d = Gradients.begin([torch.zeros_like(x) if g is None else g.clone() for g, x in ends], rules)
        d_tokens = Tokens(*(torch.empty_like(x) for x in tokens.tensors()))
        d_out = torch.zeros_like(tokens.q) if d_out is None else d_out
        for kept in reversed(ctx.kept):
            nets, part, size = kept.nets, kept.part, kept.size
            of_nets = rules.of_nets(nets)
            start = state.of_nets(nets) if kept.start is None else kept.start
            parts = tokens.part(nets, part).in_mini_batches(size)
            trace = trace_group(parts, start, of_nets, kept.answers)
            d_parts = in_mini_batches(d_out[nets, part], size).contiguous()
            found = backward_group(trace, d_parts, of_nets, d.of_nets(nets, rules))
            for into, gradient in zip(d_tokens.part(nets, part).tensors(), found.tensors(), strict=True):
                in_mini_batches(into, size).copy_(gradient)
        return None, None, None, *d_tokens.tensors(), d.norm_weight, d.norm_bias, d.scale, *d.state, *d.center


@dataclass
class _Kept:
    """What is kept of a group of mini-batches until the backward pass.

    Args:
        start: its first weights; None: those of the sequence.
    """

    nets: slice
    part: slice
    size: int
    start: InnerWeights | None
    answers: Answers


def _scan(
    tokens: Tokens, state: InnerWeights, rules: Rules, group_size: int, kept: list[_Kept] | None
) -> tuple[torch.Tensor, InnerWeights]:
    """Outputs `[N, T, D]` and last weights; what is kept of the groups of all nets is put in `kept`."""
    out, end = torch.empty_like(tokens.q), state.clone()
    for nets in nets_at_once(state, rules):
        of_nets, now = rules.of_nets(nets), end.of_nets(nets)
        for part, size in rules.groups(tokens.q.shape[1], group_size):
            parts = tokens.part(nets, part).in_mini_batches(size)
            start = None if kept is None or part.start == 0 else now.clone()
            answers = answer_group(parts, now, of_nets)
            outputs = parts.q + layer_norm(answers.queries, of_nets.norm)
            in_mini_batches(out[nets, part], size).copy_(outputs)
            if kept is not None:
                kept.append(_Kept(nets, part, size, start, answers))
    return out, end


def unpacked(
    tensors: tuple[torch.Tensor, ...],
    radii: tuple[float, ...] | None,
    factors: tuple[float, ...] | None,
) -> tuple[Tokens, InnerWeights, Rules]:
    """Tokens, first weights and rules of the tensors of `DualForm`."""
    q, k, target, lr, norm_weight, norm_bias, scale, *rest = tensors
    depth = len(rest) // (2 if radii is None else 4)
    layers = [tuple(rest[i : i + depth]) for i in range(0, len(rest), depth)]
    bound = None if radii is None else InnerBound(InnerWeights(layers[2], layers[3]), radii)
    rules = Rules(InnerNorm(norm_weight, norm_bias, factors), scale, bound)
    return Tokens(q, k, target, lr), InnerWeights(layers[0], layers[1]), rules


def dual_form(
    tokens: Tokens, state: InnerWeights, rules: Rules, checkpoint_group_size: int
) -> tuple[torch.Tensor, InnerWeights]:
    """Outputs `[N, T, D]` and last weights of a sequence; see `moshi_ttt.inner_loop.inner_loop`."""
    if not torch.is_grad_enabled():
        return _scan(tokens, state, rules, GROUP_SIZE, None)
    return differentiable(DualForm, tokens, state, rules, checkpoint_group_size)


def differentiable(
    function: type[torch.autograd.Function],
    tokens: Tokens,
    state: InnerWeights,
    rules: Rules,
    checkpoint_group_size: int,
) -> tuple[torch.Tensor, InnerWeights]:
    """The scan by `function`, which takes its arguments in the order of `DualForm`."""
    bound = rules.bound
    out, *end = function.apply(
        checkpoint_group_size,
        None if bound is None else bound.radii,
        rules.norm.factors,
        *flat(tokens, state, rules),
    )  # type: ignore[misc]
    depth = len(state.weights)
    return out, InnerWeights(tuple(end[:depth]), tuple(end[depth:]))


def flat(tokens: Tokens, state: InnerWeights, rules: Rules) -> list[torch.Tensor]:
    """All tensors in the order of `DualForm`; `unpacked` undoes it."""
    bound = rules.bound
    center = () if bound is None else (*bound.center.weights, *bound.center.biases)
    of_rules = rules.norm.weight, rules.norm.bias, rules.scale
    return [*tokens.tensors(), *of_rules, *state.weights, *state.biases, *center]
