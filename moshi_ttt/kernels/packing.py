"""The layout that the kernels read and write: states of nets in one piece, tokens by mini-batch."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.mini_batches import Tokens


def packed(weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """W and b of one layer, or W1^T, b1, W2, b2, of every net, one after the other, `[N, SIZE]`."""
    if len(weights) == 2:
        weights = weights[0].transpose(1, 2), weights[1]
    pairs = zip(weights, biases, strict=True)
    return torch.cat([part.flatten(1) for pair in pairs for part in pair], dim=1)


def unpacked_layers(state: torch.Tensor, like: InnerWeights) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases of `packed`, contiguous."""
    width, hidden = like.weights[0].shape[1:]
    if len(like.weights) == 1:
        weight, bias = state.split([width * width, width], dim=1)
        return [weight.unflatten(1, (width, width)).contiguous()], [bias[:, None].contiguous()]
    first, bias1, second, bias2 = state.split([width * hidden, hidden, hidden * width, width], dim=1)
    weights = [
        first.unflatten(1, (hidden, width)).transpose(1, 2).contiguous(),
        second.unflatten(1, (hidden, width)).contiguous(),
    ]
    return weights, [bias1[:, None].contiguous(), bias2[:, None].contiguous()]


@dataclass
class MiniBatches:
    """Tokens by mini-batch, filled up with zeros to whole mini-batches of at least 16 rows.

    A token that is not there has learning rate 0: it changes nothing.

    Args:
        q, k, target: `[M, N, R, D]`, R rows.
        lr: `[M, N, R]`.
    """

    q: torch.Tensor
    k: torch.Tensor
    target: torch.Tensor
    lr: torch.Tensor

    @staticmethod
    def of(tokens: Tokens, size: int, rows: int) -> "MiniBatches":
        """Mini-batches of `size` tokens in `rows` rows."""
        return MiniBatches(*(by_mini_batch(x, size, rows) for x in tokens.tensors()))

    def part(self, first: int, count: int) -> "MiniBatches":
        """Mini-batches [first, first + count)."""
        return MiniBatches(*(x[first : first + count] for x in (self.q, self.k, self.target, self.lr)))


def by_mini_batch(x: torch.Tensor, size: int, rows: int) -> torch.Tensor:
    """`[N, T, ...]` to `[M, N, rows, ...]`, zeros where there is no token."""
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    whole = F.pad(flat, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
    found = F.pad(whole, (0, 0, 0, rows - size)).transpose(0, 1).contiguous()
    return found if x.dim() > 2 else found[..., 0]


def in_sequence(x: torch.Tensor, size: int, length: int) -> torch.Tensor:
    """`by_mini_batch` back: `[M, N, rows, ...]` to `[N, length, ...]`."""
    return x[:, :, :size].transpose(0, 1).flatten(1, 2)[:, :length].contiguous()
