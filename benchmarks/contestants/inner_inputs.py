"""The same inner loop for all: queries, keys, values, rates and weights of TTT-MLP, of Moshi's width."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

HEADS, WIDTH = 32, 128


@dataclass
class Inputs:
    """Leaves that need gradients; `d_out` is the gradient of the outputs.

    Args:
        q, k, v: `[B, H, T, D]`.
        lr: `[B, H, T]`.
        weights: W1, b1, W2, b2 `[H, ...]`.
        norm: weight and bias `[H, D]`.
        d_out: `[B, H, T, D]`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lr: torch.Tensor
    weights: list[torch.Tensor]
    norm: list[torch.Tensor]
    d_out: torch.Tensor

    def clear(self) -> None:
        """Let go of the gradients."""
        for leaf in (self.q, self.k, self.v, self.lr, *self.weights, *self.norm):
            leaf.grad = None


def draw(settings: dict[str, Any]) -> Inputs:
    """Inputs with the batch and frames of `settings`."""
    shape = (settings["batch"], HEADS, settings["frames"])
    q, k, v = (F.normalize(torch.randn(*shape, WIDTH), dim=-1) for _ in range(3))
    lr = 8.0 / WIDTH * torch.sigmoid(torch.randn(shape))
    first, last = torch.randn(HEADS, WIDTH, 4 * WIDTH), torch.randn(HEADS, 4 * WIDTH, WIDTH)
    biases = [torch.zeros(HEADS, 1, width) for width in (4 * WIDTH, WIDTH)]
    weights = [first, biases[0], last * (4 * WIDTH) ** -0.5, biases[1]]
    norm = [torch.ones(HEADS, WIDTH), torch.zeros(HEADS, WIDTH)]
    for leaf in (q, k, v, lr, *weights, *norm):
        leaf.requires_grad_()
    return Inputs(q, k, v, lr, weights, norm, torch.randn(*shape, WIDTH))
