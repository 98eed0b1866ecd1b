"""The projection of a few tokens on the CPU is `nn.Linear`'s, by another route."""

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt.projection import Projection


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 7), (1, 32), (1, 33)])
@pytest.mark.parametrize("sizes", [(64, 96), (40, 64), (48, 7)])
def test_equals_linear_with_gradients(shape, sizes):
    torch.manual_seed(0)
    projection = Projection(*sizes)
    x = torch.randn(*shape, sizes[0], requires_grad=True)
    twin = F.linear(x.double(), projection.weight.double(), projection.bias.double())
    out = projection(x)
    assert out.shape == twin.shape
    assert (out - twin).abs().max() <= 1e-6
    wanted = torch.autograd.grad(twin.square().sum(), (x, projection.weight, projection.bias))
    given = torch.autograd.grad(out.square().sum(), (x, projection.weight, projection.bias))
    for a, b in zip(given, wanted, strict=True):
        assert (a - b).abs().max() <= 2e-5


@torch.no_grad()
def test_takes_inputs_that_are_views():
    projection = Projection(16, 32)
    x = torch.randn(5, 2, 16).transpose(0, 1)
    assert (projection(x) - F.linear(x, projection.weight, projection.bias)).abs().max() <= 1e-6
    x = torch.randn(16).expand(1, 3, 16)
    assert (projection(x) - F.linear(x, projection.weight, projection.bias)).abs().max() <= 1e-6
