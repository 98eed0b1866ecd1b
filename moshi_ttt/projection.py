"""A linear layer that uses every CPU thread for a single frame."""

import math

import torch
from torch import nn
from torch.nn import functional as F

_FEW_TOKENS = 32
_BLOCKS = 32


class Projection(nn.Linear):
    """`nn.Linear`, faster for a few tokens in float32 on the CPU, as streaming has them.

    Torch's matrix-vector product runs on one thread there and reaches half of the memory's bandwidth. The
    same product in blocks of output rows is a batched one, which runs on all threads: 1.6 to 2.8 times as
    fast for 1 to 32 tokens of width 4096 on two cores.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        tokens = x.shape[:-1].numel()
        blocks = math.gcd(self.out_features, _BLOCKS)
        if x.device.type != "cpu" or x.dtype != torch.float32 or tokens > _FEW_TOKENS or blocks == 1:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(1, tokens, -1).expand(blocks, -1, -1)
        weight = self.weight.view(blocks, -1, self.in_features)
        out = torch.bmm(rows, weight.transpose(1, 2))  # [blocks, tokens, out / blocks]
        return (out.transpose(0, 1).flatten(1) + self.bias).view(*x.shape[:-1], -1)
