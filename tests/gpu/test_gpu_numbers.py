"""How far the numbers of a GPU are from those of the CPU: a layer of Moshi's size, the tiny model."""

import copy

import pytest
import torch
from device_under_test import DEVICE, ON_GPU
from moshi.modules.transformer import _rms_norm
from test_captured_graphs import SHORT

from moshi_ttt.config import TTTConfig
from moshi_ttt.kernels.residual import gated_sum, normed_sum
from moshi_ttt.ttt_layer import TTTWrapper


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected; NaN never passes a bound."""
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def seven_b_layer(dtype: torch.dtype) -> TTTWrapper:
    """A TTT layer of Moshi 7B's size with 8 heads, off its initial values."""
    layer = TTTWrapper(4096, 32, TTTConfig(num_heads=8))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter) + 1e-3)
    return layer.to(dtype)


def float64_twin(layer: TTTWrapper) -> TTTWrapper:
    """The same parameters, everything computed in float64 on the CPU."""
    twin = copy.deepcopy(layer).cpu()
    for parameter in twin.parameters():
        parameter.data = parameter.data.double()
    twin.ttt.rope = twin.ttt.rope.double()
    return twin


# Relative errors of outputs and inner weights (their change since the learned start). In bfloat16 q, k and v
# are rounded to 3 digits on their way out of the projections; the inner state is float32 all the same.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@torch.no_grad()
def test_a_layer_of_moshis_size_is_its_float64_twin_within_bounds(dtype):
    layer = seven_b_layer(dtype)
    twin, x = float64_twin(layer), torch.randn(1, 72, 4096).to(dtype)
    learned = twin.ttt.initial_weights(1)
    expected, end = twin.ttt.forward_from(x.double(), learned)
    layer.to(DEVICE)
    assert all(p.dtype == torch.float32 for p in layer.ttt.inner_weights)
    with layer.ttt.streaming(1):
        steps = [layer(frame) for frame in x.to(DEVICE).split(1, dim=1)[:40]]
        assert all(w.dtype == torch.float32 for w in layer.ttt._streaming_state.inner.weights)
    offline, found = layer.ttt.forward_from(x.to(DEVICE), layer.ttt.initial_weights(1))
    outputs, weights = BOUNDS[dtype]
    assert distance(offline, expected) <= outputs
    assert distance(torch.cat(steps, dim=1), expected[:, :40]) <= outputs
    for now, truth, start in zip(
        (*found.weights, *found.biases), (*end.weights, *end.biases), (*learned.weights, *learned.biases),
        strict=True,
    ):  # fmt: skip
        assert distance(now.double().cpu() - start, truth - start) <= weights


@torch.no_grad()
def test_the_tiny_model_is_that_of_the_cpu(build_there, build, random_codes):
    model, codes = build_there(**SHORT), random_codes(2, 40)
    found = model.forward_text(codes.to(DEVICE))[1]
    assert (found.cpu() - model.cpu().forward_text(codes)[1]).abs().max() <= 1e-4


@pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter rounds otherwise")
@torch.no_grad()
def test_the_sums_around_a_layer_are_rounded_as_those_of_the_modules():
    x, update, out = torch.randn(3, 2, 1, 4096, device=DEVICE).bfloat16()
    alpha, weight = torch.randn(4096, device=DEVICE), torch.rand(1, 1, 4096, device=DEVICE).bfloat16()
    assert torch.equal(gated_sum(x, update, out, torch.zeros_like(alpha)), x + update)
    expected = x + update + torch.tanh(alpha).bfloat16() * out
    # The last bit of tanh may turn a rounding.
    assert (gated_sum(x, update, out, alpha) != expected).float().mean() < 0.01
    expected = _rms_norm(x + update, weight, torch.float, 1e-8)
    assert (normed_sum(x, update, weight, 1e-8) != expected).float().mean() < 0.01


@pytest.mark.parametrize("ttt", [{}, {"ssm_layer": "ttt_linear"}, {"ttt_mlp_layers": 3}, {"head_dim": 128}])
@torch.no_grad()
def test_streaming_is_offline(build_there, random_codes, ttt):
    model, codes = build_there(**(SHORT | ttt)), random_codes(2, 41).to(DEVICE)
    whole = model.forward_text(codes)[1]
    with model.streaming(2):
        steps = [model.forward_text(frame)[1] for frame in codes.split(1, dim=2)]
    assert (torch.cat(steps, dim=2) - whole).abs().max() <= 1e-4
