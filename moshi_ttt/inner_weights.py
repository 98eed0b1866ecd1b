"""Weights of the inner network, and the ball around the learned ones that they are kept in."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch

_ROUNDING = 1e-3
"""What a sum of many norms may be off by, relatively, to be safe."""


@dataclass
class InnerWeights:
    """Weights of the inner network, one set for each batch row and head: N = B * H, heads innermost.

    Kept in float32 whatever the model's dtype: over 4,000 tokens a bfloat16 state is off by 1e-2.

    Args:
        weights: n tensors `[N, d_in, d_out]`.
        biases: n tensors `[N, 1, d_out]`.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        assert len(self.weights) == len(self.biases) >= 1
        assert all(w.dtype in (torch.float32, torch.float64) for w in self.weights), "inner state is float32"

    def detach(self) -> "InnerWeights":
        """The same values without their history."""
        return InnerWeights(tuple(w.detach() for w in self.weights), tuple(b.detach() for b in self.biases))

    def clone(self) -> "InnerWeights":
        """A copy."""
        return InnerWeights(tuple(w.clone() for w in self.weights), tuple(b.clone() for b in self.biases))

    def copy_(self, other: "InnerWeights") -> None:
        """Take the values of `other`."""
        for now, new in zip((*self.weights, *self.biases), (*other.weights, *other.biases), strict=True):
            now.copy_(new)

    def at(self, index: int) -> "InnerWeights":
        """Views of one entry of the first axis."""
        return InnerWeights(tuple(w[index] for w in self.weights), tuple(b[index] for b in self.biases))

    def of_nets(self, nets: slice) -> "InnerWeights":
        """Views of some nets' weights."""
        return InnerWeights(tuple(w[nets] for w in self.weights), tuple(b[nets] for b in self.biases))


@dataclass
class InnerBound:
    """A ball around the learned weights that inner weights are kept in.

    Args:
        center: the learned weights, `[H, ...]`: one row's.
        radii: largest distance of each layer's weight and bias together in one head, above 0.
    """

    center: InnerWeights
    radii: tuple[float, ...]

    def heads_of(self, nets: slice) -> slice:
        """The heads of some nets: whole rows, or some heads of one row."""
        heads = self.center.weights[0].shape[0]
        if (nets.stop - nets.start) % heads == 0:
            return slice(0, heads)
        first = nets.start % heads
        assert first + nets.stop - nets.start <= heads, "nets of two rows, and not all of them"
        return slice(first, first + nets.stop - nets.start)

    def holds(self, state: InnerWeights, share: float) -> bool:
        """Whether all weights are within this share of the radii."""
        distances = (_distance(*of_layer, self)[1] for of_layer in zip(state.weights, state.biases, count()))
        radii = zip(distances, self.radii, strict=False)
        return all(bool((square <= (share * radius) ** 2).all()) for square, radius in radii)

    def of_nets(self, nets: slice) -> "InnerBound":
        """The bound of some nets; see `heads_of`."""
        return InnerBound(self.center.of_nets(self.heads_of(nets)), self.radii)


def pulled_back(
    weight: torch.Tensor, bias: torch.Tensor, layer: int, bound: InnerBound, ask: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of one layer, drawn back to the surface of the ball where they are outside it.

    Inside, they are what they were, bit for bit.

    Args:
        ask: look whether any is outside before working on all: less work, but the host waits for the answer.
    """
    radius = bound.radii[layer]
    if ask:
        with torch.no_grad():  # no graph of what changes nothing
            _, square = _distance(weight, bias, layer, bound)
        if not (square > radius**2).any():
            return weight, bias
    changes, square = _distance(weight, bias, layer, bound)
    outside = (square > radius**2).flatten(0, 1)  # NaN is not: it stays to be seen
    # The clamp keeps the root's gradient finite where nothing has changed.
    shrink = radius * square.clamp(min=radius**2).rsqrt()

    def pulled(now: torch.Tensor, change: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return torch.where(outside, (start + shrink * change).flatten(0, 1), now)

    return (
        pulled(weight, changes[0], bound.center.weights[layer]),
        pulled(bias, changes[1], bound.center.biases[layer]),
    )


def _distance(
    weight: torch.Tensor, bias: torch.Tensor, layer: int, bound: InnerBound
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Changes of weight and bias since the center, `[B, H, ...]`, and their square norm, `[B, H, 1, 1]`."""
    heads = bound.center.weights[layer].shape[0]
    changes = [
        now.unflatten(0, (-1, heads)) - start
        for now, start in ((weight, bound.center.weights[layer]), (bias, bound.center.biases[layer]))
    ]
    square = changes[0].square().sum(dim=(-2, -1), keepdim=True)
    return changes, square + changes[1].square().sum(dim=(-2, -1), keepdim=True)


def can_ask(state: InnerWeights) -> bool:
    """Whether the host can look at the numbers: not of meta tensors, nor in a stream being captured."""
    first = state.weights[0]
    return not first.is_meta and not (first.is_cuda and torch.cuda.is_current_stream_capturing())


def within(state: InnerWeights, bound: InnerBound | None) -> InnerWeights:
    """The weights, in the ball of `bound`: `state` itself where it is known to be inside."""
    if bound is None:
        return state
    ask = can_ask(state)  # else all are worked on: some hundred operations in the backward pass
    layers = [
        pulled_back(weight, bias, layer, bound, ask)
        for layer, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True))
    ]
    weights, biases = tuple(w for w, _ in layers), tuple(b for _, b in layers)
    unchanged = all(new is now for new, now in zip(weights, state.weights, strict=True))
    return state if unchanged else InnerWeights(weights, biases)


class UpdateLengths:
    """How far the updates of some mini-batches can have taken the weights, from the lengths of their factors.

    The norm of an update by one token is the product of its factors' norms: far less work than looking at
    the weights.
    """

    def __init__(self) -> None:
        self._factors: list[list[torch.Tensor]] = []
        self._steps: list[torch.Tensor] = []

    def add(self, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], step: torch.Tensor) -> None:
        """A mini-batch's update: X and G of each layer `[N, K, ...]`, and step sizes `[N, K]`."""
        self._factors.append([torch.linalg.vector_norm(x, dim=-1) for x in (*inputs, *grads)])
        self._steps.append(step)

    def of_layers(self) -> list[torch.Tensor]:
        """The sum of the updates' norms of each layer, `[N]`."""
        steps = torch.stack(self._steps).abs()
        norms = [torch.stack(of_factor) for of_factor in zip(*self._factors, strict=True)]
        depth = len(norms) // 2
        # The bias is a weight whose input is 1.
        pairs = zip(norms[:depth], norms[depth:], strict=True)
        return [(x.square().add(1).sqrt() * grad * steps).sum((0, 2)) for x, grad in pairs]


def stays_within(state: InnerWeights, bound: InnerBound, lengths: UpdateLengths) -> bool:
    """Whether weights that start at `state` surely were in the ball after each of these updates.

    None of them is further than the first plus the lengths of the updates in between.
    """
    for layer, length in enumerate(lengths.of_layers()):
        _, square = _distance(state.weights[layer], state.biases[layer], layer, bound)
        if not (square.sqrt().flatten() + length < (1 - _ROUNDING) * bound.radii[layer]).all():
            return False
    return True
