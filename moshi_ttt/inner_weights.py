"""Weights of the inner network, and the ball around the learned ones that they are kept in."""

from dataclasses import dataclass

import torch


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


@dataclass
class InnerBound:
    """A ball around the learned weights that inner weights are kept in.

    Args:
        center: the learned weights, `[H, ...]`: one row's.
        radii: largest distance of each layer's weight and bias together in one head, above 0.
    """

    center: InnerWeights
    radii: tuple[float, ...]


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


def within(state: InnerWeights, bound: InnerBound | None) -> InnerWeights:
    """The weights, in the ball of `bound`: `state` itself where it is known to be inside."""
    if bound is None:
        return state
    # Working on all costs a GPU more than the wait: some hundred operations in the backward pass.
    ask = not (state.weights[0].is_cuda and torch.cuda.is_current_stream_capturing())
    layers = [
        pulled_back(weight, bias, layer, bound, ask)
        for layer, (weight, bias) in enumerate(zip(state.weights, state.biases, strict=True))
    ]
    weights, biases = tuple(w for w, _ in layers), tuple(b for _, b in layers)
    unchanged = all(new is now for new, now in zip(weights, state.weights, strict=True))
    return state if unchanged else InnerWeights(weights, biases)
