"""A group of mini-batches of the inner loop's dual form, forward. The maths is in `moshi_ttt/inner_loop.py`.

Two walks over the same mini-batches: `answer_group` answers queries and changes the weights in place;
`trace_group` walks again in the backward pass, and keeps what that needs. It is spared the last layer, whose
outputs were kept. Tensors of a group are `[M, N, K, ...]`, M mini-batches of K tokens for N nets.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moshi_ttt.inner_network import InnerNorm, fold, gelu, gelu_slope, key_pass, query_pass
from moshi_ttt.inner_weights import (
    InnerBound,
    InnerWeights,
    UpdateLengths,
    can_ask,
    stays_within,
    within,
)
from moshi_ttt.loss_gradient import LossGradient


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
        """`[M, N, K, ...]`, each of it contiguous: views where there is one net."""
        return Tokens(*(in_mini_batches(x, size).contiguous() for x in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the fields."""
        return self.q, self.k, self.target, self.lr


def in_mini_batches(x: torch.Tensor, size: int) -> torch.Tensor:
    """`[N, T, ...]` as a view `[M, N, K, ...]`."""
    return x.unflatten(1, (-1, size)).transpose(0, 1)


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

    def step_sizes(self, lr: torch.Tensor) -> torch.Tensor:
        """`[M, N, K, K]` from rates `[M, N, K]`: of token s (column) in the weights of token t (row)."""
        size = lr.shape[-1]
        return self.scale[:size, :size] * lr[:, :, None, :]


@dataclass
class Answers:
    """What a group's queries are answered with, and what makes it needless to do the last layer again.

    Args:
        keys, queries: outputs of the last layer, before its LayerNorm, `[M, N, K, D]`.
        bounded: the bound was looked at after each mini-batch, because it could have been passed.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    bounded: bool


def answer_group(tokens: Tokens, now: InnerWeights, rules: Rules) -> Answers:
    """Answer a group's queries; `now` becomes the weights after it.

    Args:
        tokens: in mini-batches.
    """
    bound = rules.bound
    if bound is None or not can_ask(now) or not bound.holds(now, 0.5):
        return _answers(tokens, now, rules, bound)
    # Weights are looked at after each mini-batch only where the lengths of the updates say that they must be.
    start, lengths = now.clone(), UpdateLengths()
    answers = _answers(tokens, now, rules, None, lengths)
    if stays_within(start, bound, lengths):
        return answers
    now.copy_(start)
    return _answers(tokens, now, rules, bound)


def _answers(
    tokens: Tokens,
    now: InnerWeights,
    rules: Rules,
    bound: InnerBound | None,
    lengths: UpdateLengths | None = None,
) -> Answers:
    eta = rules.step_sizes(tokens.lr)
    answers = Answers(torch.empty_like(tokens.k), torch.empty_like(tokens.q), bound is not None)
    for index in range(tokens.k.shape[0]):
        keys = key_pass(tokens.k[index], tokens.target[index], now, rules.norm)
        _, outputs = query_pass(tokens.q[index], eta[index], keys.inputs, keys.grads, now)
        answers.keys[index], answers.queries[index] = keys.outputs[-1], outputs[-1]
        step = eta[index, :, -1]
        if lengths is not None:
            lengths.add(keys.inputs, keys.grads, step)
        fold(keys.inputs, keys.grads, step, now, out=now)
        inside = within(now, bound)
        if inside is not now:
            now.copy_(inside)
    return answers


@dataclass
class Trace:
    """What the backward pass of a group needs of its forward pass.

    Lists have an entry for each layer; hidden ones for all but the last.

    Args:
        starts: the weights at the start of each mini-batch, `[M, N, ...]`.
        factors: of the step sizes of each layer.
        etas: step sizes of each layer `[M, N, K, K]`, see `Rules.step_sizes`.
        loss: the last layer's G, and the way back through it.
        inputs: X of the keys.
        grads: G of the keys: `slopes * throughs`, and for the last layer `loss.grad`.
        scaled: G times the step sizes that the weights after the mini-batch are made with.
        outputs: Z of the keys, before GELU, hidden.
        slopes: derivatives of GELU at Z, hidden.
        throughs: loss gradients after GELU, hidden.
        queries: X of the queries.
        products: `x X^T + 1` of queries and keys, `[M, N, K, K]`, hidden.
        reads: Z of the queries.
        outside: the weights after a mini-batch's updates, where the bound drew some of them back.
    """

    tokens: Tokens
    starts: InnerWeights
    factors: tuple[float, ...]
    etas: list[torch.Tensor]
    loss: LossGradient
    inputs: list[torch.Tensor]
    grads: list[torch.Tensor]
    scaled: list[torch.Tensor]
    outputs: list[torch.Tensor]
    slopes: list[torch.Tensor]
    throughs: list[torch.Tensor]
    queries: list[torch.Tensor]
    products: list[torch.Tensor]
    reads: list[torch.Tensor]
    outside: dict[int, InnerWeights]

    @staticmethod
    def begin(tokens: Tokens, start: InnerWeights, rules: Rules, answers: Answers) -> "Trace":
        """Room for a group, in which only what needs no inner weights is there yet."""
        shape = tokens.k.shape[:-1]
        widths = [weight.shape[-1] for weight in start.weights[:-1]]

        def hidden() -> list[torch.Tensor]:
            return [tokens.k.new_empty(*shape, width) for width in widths]

        def starts(xs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(x.new_empty(shape[0], *x.shape) for x in xs)

        factors = rules.norm.factors or (1.0,) * len(start.weights)
        eta = rules.step_sizes(tokens.lr)
        etas = [eta if factor == 1 else factor * eta for factor in factors]
        loss = LossGradient(answers.keys, tokens.target, rules.norm)
        return Trace(
            tokens=tokens,
            starts=InnerWeights(starts(start.weights), starts(start.biases)),
            factors=factors,
            etas=etas,
            loss=loss,
            inputs=[tokens.k, *hidden()],
            grads=[*hidden(), loss.grad],
            scaled=[*hidden(), etas[-1][:, :, -1, :, None] * loss.grad],
            outputs=hidden(),
            slopes=hidden(),
            throughs=hidden(),
            queries=[tokens.q],
            products=[],
            reads=[],
            outside={},
        )


def trace_group(tokens: Tokens, start: InnerWeights, rules: Rules, answers: Answers) -> Trace:
    """The trace of a group that starts with the weights `start`.

    Args:
        tokens: in mini-batches.
    """
    trace = Trace.begin(tokens, start, rules, answers)
    trace.starts.at(0).copy_(start)
    for index in range(tokens.k.shape[0]):
        _trace_keys(trace, index)
        _trace_update(trace, index, rules.bound if answers.bounded else None)
    _trace_queries(trace)
    trace.reads.append(answers.queries)
    return trace


def _trace_keys(trace: Trace, index: int) -> None:
    """Of one mini-batch: what its keys made, and, scaled, what it adds to the weights."""
    now = trace.starts.at(index)
    for layer, outputs in enumerate(trace.outputs):
        z = outputs[index]
        torch.baddbmm(now.biases[layer], trace.inputs[layer][index], now.weights[layer], out=z)
        gelu(z, out=trace.inputs[layer + 1][index])
    for layer in reversed(range(len(trace.outputs))):
        through, slope, grad = (x[layer][index] for x in (trace.throughs, trace.slopes, trace.grads))
        torch.bmm(trace.grads[layer + 1][index], now.weights[layer + 1].mT, out=through)
        torch.mul(gelu_slope(trace.outputs[layer][index], out=slope), through, out=grad)
        torch.mul(trace.etas[layer][index, :, -1, :, None], grad, out=trace.scaled[layer][index])


def _trace_update(trace: Trace, index: int, bound: InnerBound | None) -> None:
    """The weights after a mini-batch; those after the last one only for what the bound did to them."""
    is_last = index + 1 == trace.tokens.k.shape[0]
    if is_last and bound is None:
        return
    now = trace.starts.at(index)
    end = now.clone() if is_last else trace.starts.at(index + 1)
    inputs, scaled = ([x[index] for x in xs] for xs in (trace.inputs, trace.scaled))
    for x, change, before, after in zip(inputs, scaled, now.weights, end.weights, strict=True):
        torch.baddbmm(before, x.mT, change, alpha=-1, out=after)
    updates = zip(trace.etas, trace.grads, now.biases, end.biases, strict=True)
    for eta, grad, before, after in updates:
        torch.baddbmm(before, eta[index, :, -1:], grad[index], alpha=-1, out=after)
    inside = within(end, bound)
    if inside is not end:
        trace.outside[index] = end.clone()
        end.copy_(inside)


def _trace_queries(trace: Trace) -> None:
    """Hidden layers of all the group's queries at once."""
    for layer, key in enumerate(trace.inputs[:-1]):
        x = trace.queries[-1]
        weight, bias = (xs[layer].flatten(0, 1) for xs in (trace.starts.weights, trace.starts.biases))
        product = torch.bmm(x.flatten(0, 1), key.flatten(0, 1).mT).add_(1)
        z = torch.baddbmm(bias, x.flatten(0, 1), weight)
        z.baddbmm_(trace.etas[layer].flatten(0, 1) * product, trace.grads[layer].flatten(0, 1), alpha=-1)
        trace.products.append(product.view_as(trace.etas[layer]))
        trace.reads.append(z.unflatten(0, x.shape[:2]))
        trace.queries.append(gelu(trace.reads[-1]))
