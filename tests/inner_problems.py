"""Random problems of the inner loop, and what a form of it makes of them: for the tests of its kernels."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moshi_ttt.inner_loop import step_scale
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.mini_batches import Rules, Tokens

SHARED = ["q", "k", "target", "lr", "norm weight", "norm bias", "scale"]


@dataclass
class Problem:
    """Sizes of a problem.

    Args:
        widths: of the inner network, its input first.
        size: tokens of a mini-batch.
        radii: of the bound.
        group: mini-batches of a group; 0: all.
        factors: of the step sizes of each layer.
    """

    rows: int
    heads: int
    length: int
    widths: tuple[int, ...]
    size: int
    radii: tuple[float, ...] | None = None
    group: int = 0
    factors: tuple[float, ...] | None = None

    @property
    def names(self) -> list[str]:
        """Of all arguments: those that are shared, weights, biases, and with a bound its center's."""
        layers = range(1, len(self.widths))
        state = [f"{kind}{number}" for kind in ("W", "b") for number in layers]
        return SHARED + state + ([] if self.radii is None else [f"center {name}" for name in state])

    def arguments(self) -> list[torch.Tensor]:
        """As a layer has them, in float64, in the order of `names`."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        nets, width = self.rows * self.heads, self.widths[0]
        q, k = (F.normalize(draw(nets, self.length, width), dim=-1) for _ in range(2))
        lr = 8.0 / width * torch.rand(nets, self.length, generator=generator, dtype=torch.float64)
        sizes = list(zip(self.widths[:-1], self.widths[1:], strict=True))
        # Keys have length 1, hidden units one each: all outputs are of order 1.
        state = [draw(nets, *size, scale=1.0 if i == 0 else size[0] ** -0.5) for i, size in enumerate(sizes)]
        state += [draw(nets, 1, out, scale=0.1) for _, out in sizes]
        centers = [x[: self.heads] + draw(*x[: self.heads].shape, scale=0.02) for x in state]
        norm = 1 + draw(nets, 1, width, scale=0.1), draw(nets, 1, width, scale=0.1)
        scale = 1 / torch.arange(1, self.size + 1, dtype=torch.float64)
        all_of = [q, k, draw(nets, self.length, width), lr, *norm, scale, *state, *centers]
        return all_of[: len(self.names)]

    def form_arguments(self, tensors):
        """(tokens, state, rules, group) of `arguments`, as the forms of the inner loop take them."""
        *tokens, weight, bias, scale = tensors[: len(SHARED)]
        depth = len(self.widths) - 1
        layers = [tuple(tensors[i : i + depth]) for i in range(len(SHARED), len(tensors), depth)]
        bound = None if self.radii is None else InnerBound(InnerWeights(layers[2], layers[3]), self.radii)
        rules = Rules(InnerNorm(weight, bias, self.factors), step_scale(scale), bound)
        return Tokens(*tokens), InnerWeights(layers[0], layers[1]), rules, self.group

    def run(self, form, tensors):
        """Outputs and last weights, and the gradients of a loss of all of them."""
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, end = form(*self.form_arguments(leaves))
        results = [out, *end.weights, *end.biases]
        generator = torch.Generator().manual_seed(1)
        mixed = [torch.randn(*x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
        loss = sum((x * m).sum() for x, m in zip(results, mixed, strict=True))
        return results, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def differences(found, expected):
    """Of each tensor, relative to the expected one."""
    return [
        ((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    ]


def wrong(names, found, expected, tolerance):
    """Those that differ by more than the tolerance, and by how much."""
    pairs = zip(names, differences(found, expected), strict=True)
    return {name: difference for name, difference in pairs if not difference < tolerance}
