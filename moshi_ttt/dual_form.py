"""The dual form of the inner loop with its gradients written out.

Autograd would keep a graph of some fifty operations for each mini-batch, differentiate LayerNorm and GELU
twice by their general formulas, and go over every gradient of the inner weights several times. Here a
group of mini-batches has its backward pass written out, `moshi_ttt/mini_batches_backward.py`.

Nets do not know of each other. On the CPU few of them go through all mini-batches before the next ones do, so
that their weights stay in a core's cache: products with them are then three times as fast, and what the
backward pass needs of a group of mini-batches is held for a few nets at a time.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.mini_batches import Rules, Tokens, Trace, forward_group
from moshi_ttt.mini_batches_backward import Gradients, backward_group

CACHE_BYTES = 2**21
"""Inner weights that are worked on at once, for each thread; with fewer, Python would take over."""


GROUP_SIZE = 16
"""Mini-batches worked on together where nothing is kept for a backward pass."""


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

    `dual_form` puts its tensors in order. Traces of groups of mini-batches are made again in the backward
    pass; where all are one group they are kept until then.
    """

    @staticmethod
    def forward(ctx: Any, group_size: int, radii: tuple[float, ...] | None, *tensors: torch.Tensor) -> Any:
        tokens, state, rules = unpacked(tensors, radii)
        kept = [] if group_size == 0 or tokens.q.shape[1] <= group_size * rules.scale.shape[0] else None
        out, ends, starts = _scan(tokens, state, rules, group_size or tokens.q.shape[1], kept)
        ctx.save_for_backward(*tensors)
        ctx.radii, ctx.starts, ctx.kept, ctx.group_size = radii, starts, kept, group_size
        return out, *ends.weights, *ends.biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, *d_state: torch.Tensor) -> Any:
        tokens, state, rules = unpacked(ctx.saved_tensors, ctx.radii)
        d = Gradients.begin([g.clone() for g in d_state], rules)
        d_tokens = Tokens(*(torch.empty_like(x) for x in tokens.tensors()))
        kept, ctx.kept = ctx.kept or [], None
        length = tokens.q.shape[1]
        groups = list(enumerate(rules.groups(length, ctx.group_size or length)))
        for number, nets in reversed(list(enumerate(nets_at_once(state, rules)))):
            of_nets, d_nets = rules.of_nets(nets), d.of_nets(nets, rules)
            for index, (part, size) in reversed(groups):
                if kept:
                    trace = kept.pop()  # each is let go of as soon as it is done
                else:
                    start = ctx.starts[number][index - 1] if index else state.of_nets(nets)
                    _, trace = forward_group(tokens.part(nets, part), start, of_nets, size)
                d_parts = d_out[nets, part].unflatten(1, (-1, size)).transpose(0, 1)
                found = backward_group(trace, d_parts.contiguous(), of_nets, d_nets)
                whole = d_tokens.part(nets, part).in_mini_batches(size)
                for into, gradient in zip(whole.tensors(), found.tensors(), strict=True):
                    into.copy_(gradient)
        return None, None, *d_tokens.tensors(), d.norm_weight, d.norm_bias, d.scale, *d.state, *d.center


def _scan(
    tokens: Tokens, state: InnerWeights, rules: Rules, group_size: int, traces: list[Trace] | None
) -> tuple[torch.Tensor, InnerWeights, list[list[InnerWeights]]]:
    """All groups of all nets.

    Args:
        traces: theirs are put here, if given.
    Returns:
        Outputs `[N, T, D]`, the last weights, and for each part of the nets the weights that its groups but
        the first start with.
    """
    out, ends, starts = torch.empty_like(tokens.q), state.clone(), []
    for nets in nets_at_once(state, rules):
        of_nets, now = rules.of_nets(nets), ends.of_nets(nets)
        starts.append([])
        for part, size in rules.groups(tokens.q.shape[1], group_size):
            if part.start > 0:
                starts[-1].append(now.clone())
            answers, trace = forward_group(tokens.part(nets, part), now, of_nets, size)
            out[nets, part].unflatten(1, (-1, size)).transpose(0, 1).copy_(answers)
            now.copy_(trace.starts.at(-1))
            if traces is not None:
                traces.append(trace)
    return out, ends, starts


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
        return _scan(tokens, state, rules, GROUP_SIZE, None)[:2]
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
    center = () if bound is None else (*bound.center.weights, *bound.center.biases)
    out, *end = function.apply(
        checkpoint_group_size,
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
