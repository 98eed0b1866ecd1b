"""The inner loop's outputs, last weights and gradients on a GPU are those of float64 on the CPU.

Last of these files by its name: a kernel that reads where it must not ends all CUDA work of its process.
"""

from dataclasses import dataclass

import pytest
import torch
from device_under_test import DEVICE
from test_gpu_numbers import distance

from moshi_ttt.dual_form import dual_form
from moshi_ttt.inner_loop import inner_loop, step_scale
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.mini_batches import Rules, Tokens
from moshi_ttt.reference import reference_inner_loop


@dataclass(frozen=True)
class Size:
    """Sizes of an inner loop: nets, tokens, head width, inner layers, mini-batch, recomputed group.

    Args:
        kernel: is asked for.
    """

    nets: int
    frames: int
    width: int
    depth: int = 2
    mini_batch: int = 16
    group: int = 16
    bounded: bool = False
    kernel: str = "auto"


SIZES = [
    Size(2, 37, 32, mini_batch=4, group=2),
    Size(3, 53, 64),
    Size(4, 200, 128),
    Size(4, 150, 128, mini_batch=64, group=1),
    Size(4, 100, 128, bounded=True),
    Size(2, 70, 64, depth=1, mini_batch=8),
    Size(2, 70, 64, depth=3, group=0),
    Size(64, 96, 128, group=2),
    Size(2, 37, 16, depth=1, mini_batch=4, group=2, kernel="triton"),
    Size(3, 53, 32, depth=1, kernel="triton"),
    Size(2, 70, 64, depth=1, mini_batch=8, bounded=True, kernel="triton"),
    Size(4, 200, 128, depth=1, kernel="triton"),
    Size(4, 150, 128, depth=1, mini_batch=64, group=1, kernel="triton"),
    Size(4, 100, 128, depth=1, group=0, bounded=True, kernel="triton"),
    Size(200, 96, 128, depth=1, group=2, kernel="triton"),
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
        radii = (radius,) if depth == 1 else (radius * 2, size.width**0.5 * 0.75)
        bound = InnerBound(center, radii)
    state = InnerWeights(tuple(v["weights"]), tuple(v["biases"]))
    return state, InnerNorm(*v["norm"]), step_scale(v["scale"][0]), bound


def run_inner_loop(v, size: Size):
    """As layers call it."""
    state, norm, scale, bound = arguments(v, size)
    tokens = v["q"][0], v["k"][0], v["target"][0], v["lr"][0]
    out, end = inner_loop(*tokens, state, norm, scale, size.group, bound, size.kernel)
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


@pytest.mark.parametrize(
    "size", [SIZES[0], Size(2, 39, 64), Size(2, 39, 64, depth=1, kernel="triton")], ids=str
)
def test_outputs_weights_and_gradients_of_the_inner_loop_are_those_of_the_reference(size):
    compare(size, run_reference, 2e-5)
