"""The inner loop by Triton kernels: one differentiable function, in the place of `DualForm`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moshi_ttt.dual_form import differentiable, unpacked
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.kernels.linear_scan import LinearGroup
from moshi_ttt.kernels.mlp_scan import MLPGroup
from moshi_ttt.kernels.packing import MiniBatches, by_mini_batch, in_sequence, packed, unpacked_layers
from moshi_ttt.kernels.scan import Group, Launch, Sizes, Sums, fitting
from moshi_ttt.mini_batches import Rules, Tokens

launch: Launch | None = None  # to try another than the one that fits the device
_GROUP = 16  # mini-batches that are worked on together where nothing is kept


class Sequence:
    """A problem cut into groups of mini-batches."""

    def __init__(self, tokens: Tokens, state: InnerWeights, rules: Rules, group: int):
        nets, length, width = tokens.q.shape
        bound = rules.bound
        heads = nets if bound is None else bound.center.weights[0].shape[0]
        self.rules = rules
        self.kind = LinearGroup if len(state.weights) == 1 else MLPGroup
        self.launch = launch or fitting(tokens.q.device)
        size, hidden = rules.scale.shape[0], state.weights[0].shape[2]
        rows = max(self.launch.rows, 1 << (size - 1).bit_length())
        self.sizes = Sizes(nets, heads, length, size, rows, width, hidden)
        self.tokens = MiniBatches.of(tokens, self.sizes.size, self.sizes.rows)
        count = self.sizes.mini_batches
        self.runs = [(first, min(group or count, count - first)) for first in range(0, count, group or count)]

    def group(self, index: int) -> Group:
        first, count = self.runs[index]
        last = min(self.sizes.size, self.sizes.length - (first + count - 1) * self.sizes.size)
        return self.kind(self.sizes, self.tokens.part(first, count), self.rules, last, self.launch)

    def in_sequence(self, x: torch.Tensor) -> torch.Tensor:
        return in_sequence(x, self.sizes.size, self.sizes.length)


class TritonForm(torch.autograd.Function):
    """The scan over mini-batches by kernels; arguments and results are those of
    `moshi_ttt.dual_form.DualForm`.

    Groups of mini-batches are run again in the backward pass, which needs the weights at the start of each
    mini-batch and what was computed on the way; with one group all of it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, group_size: int, radii: tuple[float, ...] | None, factors: None, *tensors: torch.Tensor
    ) -> Any:
        assert factors is None, "the kernels take no step factors"
        tensors = tuple(x.contiguous() for x in tensors)
        tokens, state, rules = unpacked(tensors, radii, None)
        sequence = Sequence(tokens, state, rules, group_size)
        start, outs = packed(state.weights, state.biases), []
        single = len(sequence.runs) == 1
        if single:
            part = sequence.group(0)
            ctx.kept = part.forward(_slots(start, part.count), keep=True)
            outs.append(part.outputs(ctx.kept))
            ctx.starts, end = [start], ctx.kept.states[-1]
        else:
            ctx.kept, ctx.starts = None, []
            end = start
            for index in range(len(sequence.runs)):
                ctx.starts.append(end)
                end = end.clone()
                part = sequence.group(index)
                outs.append(part.outputs(part.forward(end[None], keep=False)))
        ctx.save_for_backward(*tensors)
        ctx.radii, ctx.group_size, ctx.end = radii, group_size, None if radii is None else end
        weights, biases = unpacked_layers(end, state)
        return sequence.in_sequence(torch.cat(outs)), *weights, *biases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, *d_state: torch.Tensor) -> Any:
        tokens, state, rules = unpacked(ctx.saved_tensors, ctx.radii, None)
        sequence = Sequence(tokens, state, rules, ctx.group_size)
        d_outs = by_mini_batch(d_out, sequence.sizes.size, sequence.sizes.rows)
        depth = len(state.weights)
        d = sequence.group(len(sequence.runs) - 1).sums(packed(d_state[:depth], d_state[depth:]), ctx.end)
        found = []
        for index, (first, count) in reversed(list(enumerate(sequence.runs))):
            part = sequence.group(index)
            kept, ctx.kept = ctx.kept, None
            if kept is None:
                kept = part.forward(_slots(ctx.starts[index], count), keep=True)
            found.append(part.backward(kept, d_outs[first : first + count], d))
        found.reverse()
        d_tokens = [
            sequence.in_sequence(torch.cat(parts))
            for parts in zip(*((x.q, x.k, x.target, x.lr) for x in found), strict=True)
        ]
        d_weights, d_biases = unpacked_layers(d.state, state)
        size = sequence.sizes.size
        rest = d.norm_weight, d.norm_bias, d.scale[:size, :size], *d_weights, *d_biases
        return None, None, None, *d_tokens, *rest, *_of_center(sequence, d, state)


def _slots(start: torch.Tensor, count: int) -> torch.Tensor:
    """Room for the states before, between and after `count` mini-batches, the first of them filled."""
    states = start.new_empty(count + 1, *start.shape)
    states[0] = start
    return states


def _of_center(sequence: Sequence, d: Sums, like: InnerWeights) -> list[torch.Tensor]:
    """Gradients of the bound's center, summed over rows; none without a bound."""
    if sequence.rules.bound is None:
        return []
    weights, biases = unpacked_layers(d.center.unflatten(0, (-1, sequence.sizes.heads)).sum(0), like)
    return [*weights, *biases]


def triton_form(
    tokens: Tokens, state: InnerWeights, rules: Rules, checkpoint_group_size: int
) -> tuple[torch.Tensor, InnerWeights]:
    """Outputs `[N, T, D]` and last weights of a sequence; see `moshi_ttt.inner_loop.inner_loop`."""
    if torch.is_grad_enabled():
        return differentiable(TritonForm, tokens, state, rules, checkpoint_group_size)
    sequence = Sequence(tokens, state, rules, _GROUP)
    now, outs = packed(state.weights, state.biases), []
    for index in range(len(sequence.runs)):
        part = sequence.group(index)
        outs.append(part.outputs(part.forward(now[None], keep=False)))
    weights, biases = unpacked_layers(now, state)
    return sequence.in_sequence(torch.cat(outs)), InnerWeights(tuple(weights), tuple(biases))
