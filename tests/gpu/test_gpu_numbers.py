"""How far the numbers of a GPU are from float64 on the CPU: inner loop, layer of Moshi's size, model."""

import copy
from dataclasses import dataclass

import pytest
import torch
from device_under_test import DEVICE, ON_GPU
from moshi.modules.transformer import _rms_norm
from test_captured_graphs import SHORT

from moshi_ttt.config import TTTConfig
from moshi_ttt.dual_form import Rules, Tokens, dual_form
from moshi_ttt.inner_loop import inner_loop, step_scale
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.kernels.residual import gated_sum, normed_sum
from moshi_ttt.reference import reference_inner_loop
from moshi_ttt.ttt_layer import TTTWrapper


@dataclass(frozen=True)
class Size:
    """Sizes of an inner loop: nets, tokens, head width, inner layers, mini-batch, recomputed group."""

    nets: int
    frames: int
    width: int
    depth: int = 2
    mini_batch: int = 16
    group: int = 16
    bounded: bool = False


SIZES = [
    Size(2, 37, 32, mini_batch=4, group=2),
    Size(3, 53, 64),
    Size(4, 200, 128),
    Size(4, 150, 128, mini_batch=64, group=1),
    Size(4, 100, 128, bounded=True),
    Size(2, 70, 64, depth=1, mini_batch=8),
    Size(2, 70, 64, depth=3, group=0),
    Size(64, 96, 128, group=2),
]


def problem(size: Size) -> dict[str, list[torch.Tensor]]:
    """Arguments of the inner loop in float64 on the CPU, at the scales that a layer gives them."""

    def draw(*shape, scale=1.0, around=0.0):
        return (around + scale * torch.randn(*shape, dtype=torch.float64)).float().double()

    n, t, d, k = size.nets, size.frames, size.width, size.mini_batch
    dims = [d, *[4 * d] * (size.depth - 1), d]
    unit = torch.nn.functional.normalize
    stds = [1.0 if layer == 0 else dims[layer] ** -0.5 for layer in range(size.depth)]
    pairs = list(zip(dims[:-1], dims[1:], stds, strict=True))
    values = {
        "q": [unit(draw(n, t, d), dim=-1)],
        "k": [unit(draw(n, t, d), dim=-1)],
        "target": [draw(n, t, d)],
        "lr": [8.0 / d * torch.rand(n, t, dtype=torch.float64)],
        "weights": [draw(n, i, o, scale=s) for i, o, s in pairs],
        "biases": [draw(n, 1, o, scale=0.1) for _, o, _ in pairs],
        "norm": [draw(n, 1, d, scale=0.1, around=1.0), draw(n, 1, d, scale=0.1)],
        "scale": [1.0 / torch.arange(1, k + 1, dtype=torch.float64)],
    }
    if size.bounded:
        values["center"] = [draw(n, i, o, scale=s) for i, o, s in pairs]
        values["center"] += [draw(n, 1, o, scale=0.1) for _, o, _ in pairs]
        values["center"] = [
            0.5 * (c + now)  # near enough that some heads are outside and some are not
            for c, now in zip(values["center"], values["weights"] + values["biases"], strict=True)
        ]
    return values


def on(values, device, dtype):
    return {
        name: [t.to(device, dtype).detach().requires_grad_() for t in tensors]
        for name, tensors in values.items()
    }


def leaves(values):
    return [tensor for tensors in values.values() for tensor in tensors]


def arguments(v, size: Size):
    depth = len(v["weights"])
    bound = None
    if size.bounded:
        center = InnerWeights(tuple(v["center"][:depth]), tuple(v["center"][depth:]))
        radius = 0.6 * size.width
        bound = InnerBound(center, (radius * 2, size.width**0.5 * 0.75))
    state = InnerWeights(tuple(v["weights"]), tuple(v["biases"]))
    return state, InnerNorm(*v["norm"]), step_scale(v["scale"][0]), bound


def run_inner_loop(v, size: Size):
    """As layers call it."""
    state, norm, scale, bound = arguments(v, size)
    out, end = inner_loop(
        v["q"][0], v["k"][0], v["target"][0], v["lr"][0], state, norm, scale, size.group, bound
    )
    return [out, *end.weights, *end.biases]


def run_dual_form(v, size: Size):
    """The naive twin, which the tests of the CPU hold against the reference."""
    state, norm, scale, bound = arguments(v, size)
    tokens = Tokens(v["q"][0], v["k"][0], v["target"][0], v["lr"][0])
    out, end = dual_form(tokens, state, Rules(norm, scale, bound), 0)
    return [out, *end.weights, *end.biases]


def run_reference(v, size: Size):
    nets = [
        reference_inner_loop(
            v["q"][0][n],
            v["k"][0][n],
            v["target"][0][n],
            v["lr"][0][n],
            [w[n] for w in v["weights"]],
            [b[n, 0] for b in v["biases"]],
            v["norm"][0][n, 0],
            v["norm"][1][n, 0],
            v["scale"][0],
        )
        for n in range(size.nets)
    ]
    outs, weights, biases = zip(*nets, strict=True)
    return [
        torch.stack(outs),
        *(torch.stack(layer) for layer in zip(*weights, strict=True)),
        *(torch.stack(layer)[:, None] for layer in zip(*biases, strict=True)),
    ]


def results_and_gradients(run, values, size, device, dtype, mixes):
    v = on(values, device, dtype)
    found = run(v, size)
    loss = sum((t * m.to(t)).sum() for t, m in zip(found, mixes, strict=True))
    return [t.detach() for t in found], torch.autograd.grad(loss, leaves(v))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected; NaN never passes a bound."""
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def names_of(values, found):
    depth = (len(found) - 1) // 2
    results = ["out", *(f"W{i}" for i in range(depth)), *(f"b{i}" for i in range(depth))]
    return results, [f"d {name} {i}" for name, tensors in values.items() for i in range(len(tensors))]


def compare(size: Size, truth, bound: float) -> None:
    values = problem(size)
    shapes = [t.shape for t in run_dual_form(on(values, "cpu", torch.float64), size)]
    mixes = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = results_and_gradients(truth, values, size, "cpu", torch.float64, mixes)
    found = results_and_gradients(run_inner_loop, values, size, DEVICE, torch.float32, mixes)
    for names, ours, theirs in zip(names_of(values, found[0]), found, expected, strict=True):
        errors = {n: distance(a, b) for n, a, b in zip(names, ours, theirs, strict=True)}
        assert all(error <= bound for error in errors.values()), errors


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_weights_and_gradients_of_the_inner_loop_are_those_of_the_naive_twin(size):
    compare(size, run_dual_form, 2e-5)


@pytest.mark.parametrize("size", [SIZES[0], Size(2, 39, 64)], ids=str)
def test_outputs_weights_and_gradients_of_the_inner_loop_are_those_of_the_reference(size):
    compare(size, run_reference, 2e-5)


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
