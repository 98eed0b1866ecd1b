"""A group of mini-batches of the inner loop's dual form, forward. The maths is in `moshi_ttt/inner_loop.py`.

What one mini-batch has to wait for is the keys' pass of the one before, which makes its weights. Queries only
read those: all of a group are answered together. Tensors of a group are `[M, N, K, ...]`, M mini-batches of K
tokens for N nets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moshi_ttt.inner_network import InnerNorm, KeyPass, fold, key_pass, layer_norm, query_pass
from moshi_ttt.inner_weights import InnerBound, InnerWeights, stays_within, within


@dataclass
class Tokens:
    """Queries, keys, targets `[N, T, D]` and learning rates `[N, T]`: all of a sequence or a part of it."""

    q: torch.Tensor
    k: torch.Tensor
    target: torch.Tensor
    lr: torch.Tensor

    def part(self, nets: slice, tokens: slice) -> "Tokens":
        """Views of some nets' tokens."""
        return Tokens(*(x[nets, tokens] for x in self.tensors()))

    def in_mini_batches(self, size: int) -> "Tokens":
        """Views `[M, N, K, ...]`."""
        return Tokens(*(x.unflatten(1, (-1, size)).transpose(0, 1) for x in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the fields."""
        return self.q, self.k, self.target, self.lr


@dataclass
class Rules:
    """What all mini-batches of a sequence share: LayerNorm, step scales `[K, K]`, and the bound."""

    norm: InnerNorm
    scale: torch.Tensor
    bound: InnerBound | None

    def of_nets(self, nets: slice) -> "Rules":
        """The rules of some nets."""
        bound = None if self.bound is None else self.bound.of_nets(nets)
        return Rules(self.norm.of_nets(nets), self.scale, bound)

    def groups(self, tokens: int, most: int) -> Iterator[tuple[slice, int]]:
        """Tokens in groups of at most `most` whole mini-batches, and their size; what is left over is one."""
        size = self.scale.shape[0]
        whole = tokens // size * size
        for first in range(0, whole, most * size):
            yield slice(first, min(first + most * size, whole)), size
        if whole < tokens:
            yield slice(whole, tokens), tokens - whole


@dataclass
class Trace:
    """What the backward pass of a group needs of its forward pass.

    Args:
        starts: the weights at the start of each mini-batch and, last, after the group: `[M + 1, N, ...]`.
        eta: step sizes `[M, N, K, K]`: of token s (column) in the weights of token t (row).
        keys: what the keys made, `[M, N, K, ...]`.
        outside: the weights after a mini-batch's updates, where the bound drew some of them back.
        queries, answers: inputs and outputs of every layer for the queries, `[M, N, K, ...]`.
    """

    tokens: Tokens
    starts: InnerWeights
    eta: torch.Tensor
    keys: KeyPass
    outside: dict[int, InnerWeights]
    queries: list[torch.Tensor] = field(default_factory=list)
    answers: list[torch.Tensor] = field(default_factory=list)


def forward_group(tokens: Tokens, start: InnerWeights, rules: Rules, size: int) -> tuple[torch.Tensor, Trace]:
    """Outputs `[M, N, K, D]` and the trace of a group that starts with the weights `start`."""
    parts = Tokens(*(x.contiguous() for x in tokens.in_mini_batches(size).tensors()))
    trace = _keys(parts, start, rules)
    count, q, eta = parts.q.shape[0], parts.q.flatten(0, 1), trace.eta.flatten(0, 1)
    inputs, grads = ([x.flatten(0, 1) for x in xs] for xs in (trace.keys.inputs, trace.keys.grads))
    weights, biases = (
        [x[:-1].flatten(0, 1) for x in xs] for xs in (trace.starts.weights, trace.starts.biases)
    )
    found = query_pass(q, eta, inputs, grads, InnerWeights(tuple(weights), tuple(biases)))
    trace.queries, trace.answers = ([x.unflatten(0, (count, -1)) for x in xs] for xs in found)
    return parts.q + layer_norm(trace.answers[-1], rules.norm), trace


def _keys(parts: Tokens, start: InnerWeights, rules: Rules) -> Trace:
    """The trace of a group without its queries."""
    size = parts.lr.shape[2]
    eta = rules.scale[:size, :size] * parts.lr[:, :, None, :]
    bound, is_cpu = rules.bound, parts.k.device.type == "cpu"
    if bound is not None and is_cpu and bound.holds(start, 0.5):
        trace = _pass(parts, start, rules.norm, None, eta)
        if stays_within(start, bound, trace.keys.inputs, trace.keys.grads, eta[:, :, -1]):
            return trace
    return _pass(parts, start, rules.norm, bound, eta)


def _pass(
    parts: Tokens, start: InnerWeights, norm: InnerNorm, bound: InnerBound | None, eta: torch.Tensor
) -> Trace:
    """The keys' passes one after the other; `bound` is looked at after each."""
    count = parts.k.shape[0]
    weights, biases = ([x.new_empty(count + 1, *x.shape) for x in xs] for xs in (start.weights, start.biases))
    starts, outside, passes = InnerWeights(tuple(weights), tuple(biases)), {}, []
    starts.at(0).copy_(start)
    for index in range(count):
        now, end = starts.at(index), starts.at(index + 1)
        passes.append(key_pass(parts.k[index], parts.target[index], now, norm))
        fold(passes[-1].inputs, passes[-1].grads, eta[index, :, -1], now, out=end)
        inside = within(end, bound)
        if inside is not end:
            outside[index] = end.clone()
            end.copy_(inside)
    return Trace(parts, starts, eta, KeyPass.stack(passes, parts.k), outside)
