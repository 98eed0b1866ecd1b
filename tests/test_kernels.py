"""The Triton kernels of the inner loop equal their naive twin: outputs, last weights and every gradient.

Without a GPU they run in Triton's interpreter, in float32.
"""

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt.dual_form import dual_form
from moshi_ttt.inner_loop import step_scale
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.kernels import triton_form as kernels
from moshi_ttt.kernels.choice import forced, use_triton, use_triton_scan
from moshi_ttt.kernels.scan import fitting
from moshi_ttt.kernels.triton_form import triton_form
from moshi_ttt.mini_batches import Rules, Tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-6
REACHED = (0.5, 0.5)
# rows, heads, tokens, width, hidden, mini-batch, radii of the bound, mini-batches of a group
PROBLEMS = {
    "one mini-batch and a part": (1, 2, 7, 16, 64, 4, None, 0),
    "rows that fill the products": (2, 1, 37, 16, 64, 16, None, 0),
    "two blocks of hidden units": (1, 1, 23, 32, 128, 8, None, 0),
    "groups run again": (1, 2, 37, 16, 64, 8, None, 2),
    "a bound that is reached": (2, 2, 29, 16, 128, 8, REACHED, 2),
    "a bound that is reached, all kept": (1, 2, 21, 16, 64, 8, REACHED, 0),
    "a bound that is not reached": (1, 2, 9, 16, 64, 8, (50.0, 50.0), 1),
    "a mini-batch of 32": (1, 1, 50, 16, 64, 32, None, 1),
}
NAMES = ["q", "k", "target", "lr", "norm weight", "norm bias", "scale", "W1", "W2", "b1", "b2"]
CENTER = ["center W1", "center W2", "center b1", "center b2"]


def problem(rows, heads, length, width, hidden, size, *_):
    """Arguments of the inner loop as a layer has them, in float64, in the order of NAMES and CENTER."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    nets = rows * heads
    q, k = (F.normalize(draw(nets, length, width), dim=-1) for _ in range(2))
    lr = 8.0 / width * torch.rand(nets, length, generator=generator, dtype=torch.float64)
    layers = [draw(nets, width, hidden), draw(nets, hidden, width, scale=hidden**-0.5)]
    layers += [draw(nets, 1, hidden, scale=0.1), draw(nets, 1, width, scale=0.1)]
    centers = [x[:heads] + draw(*x[:heads].shape, scale=0.02) for x in layers]
    norm = 1 + draw(nets, 1, width, scale=0.1), draw(nets, 1, width, scale=0.1)
    scale = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    return [q, k, draw(nets, length, width), lr, *norm, scale, *layers, *centers]


def run(form, tensors, radii, group):
    """Outputs and last weights, and the gradients of a loss of all of them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    q, k, target, lr, weight, bias, scale, w1, w2, b1, b2, c1, c2, cb1, cb2 = leaves
    bound = None if radii is None else InnerBound(InnerWeights((c1, c2), (cb1, cb2)), radii)
    rules = Rules(InnerNorm(weight, bias), step_scale(scale), bound)
    out, end = form(Tokens(q, k, target, lr), InnerWeights((w1, w2), (b1, b2)), rules, group)
    results = [out, *end.weights, *end.biases]
    generator = torch.Generator().manual_seed(1)
    mixed = [torch.randn(*x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    loss = sum((x * m).sum() for x, m in zip(results, mixed, strict=True))
    used = leaves if radii is not None else leaves[: len(NAMES)]
    return results, torch.autograd.grad(loss, used, allow_unused=True, materialize_grads=True)


def differences(found, expected):
    return [
        ((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_the_twin_in_outputs_state_and_gradients(name):
    *_, radii, group = PROBLEMS[name]
    tensors = problem(*PROBLEMS[name])
    expected, expected_grads = run(dual_form, tensors, radii, group)
    found, grads = run(triton_form, [x.to(DEVICE, torch.float32) for x in tensors], radii, group)
    assert differences(found, expected) == pytest.approx([0] * 5, abs=TOLERANCE)
    names = NAMES if radii is None else NAMES + CENTER
    wrong = {
        n: d for n, d in zip(names, differences(grads, expected_grads), strict=True) if not d < TOLERANCE
    }
    assert wrong == {}


@pytest.mark.parametrize("name", ["groups run again", "a bound that is reached"])
def test_mini_batches_filled_up_to_the_rows_of_a_gpu_are_the_same(monkeypatch, name):
    *_, radii, group = PROBLEMS[name]
    tensors = problem(*PROBLEMS[name])
    expected = run(dual_form, tensors, radii, group)
    gpu = fitting(torch.device("cuda"))
    assert gpu.rows > PROBLEMS[name][5]
    monkeypatch.setattr(kernels, "launch", gpu)
    found = run(triton_form, [x.to(DEVICE, torch.float32) for x in tensors], radii, group)
    for a, b in zip(found, expected, strict=True):
        assert max(differences(a, b)) < TOLERANCE


def test_the_bound_of_the_problems_is_reached():
    name = "a bound that is reached"
    tensors = problem(*PROBLEMS[name])
    bounded, _ = run(dual_form, tensors, REACHED, 0)
    free, _ = run(dual_form, tensors, None, 0)
    assert all((a - b).norm() > 1e-3 for a, b in zip(bounded, free, strict=True))


@pytest.mark.parametrize("name", ["groups run again", "a bound that is reached"])
def test_without_gradients_the_same_is_computed(name):
    *_, radii, group = PROBLEMS[name]
    tensors = [x.to(DEVICE, torch.float32) for x in problem(*PROBLEMS[name])]
    expected, _ = run(triton_form, tensors, radii, group)
    q, k, target, lr, weight, bias, scale, w1, w2, b1, b2, c1, c2, cb1, cb2 = tensors
    bound = None if radii is None else InnerBound(InnerWeights((c1, c2), (cb1, cb2)), radii)
    rules = Rules(InnerNorm(weight, bias), step_scale(scale), bound)
    before = w1.clone()
    with torch.no_grad():
        out, end = triton_form(Tokens(q, k, target, lr), InnerWeights((w1, w2), (b1, b2)), rules, group)
    for a, b in zip([out, *end.weights, *end.biases], expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(w1, before)  # what it was given is only read


def test_a_graph_that_is_kept_gives_the_same_gradients_twice():
    tensors = [x.to(DEVICE, torch.float32) for x in problem(*PROBLEMS["groups run again"])]
    leaves = [x.requires_grad_() for x in tensors[: len(NAMES)]]
    q, k, target, lr, weight, bias, scale, w1, w2, b1, b2 = leaves
    for group in (0, 2):
        rules = Rules(InnerNorm(weight, bias), step_scale(scale), None)
        out, _ = triton_form(Tokens(q, k, target, lr), InnerWeights((w1, w2), (b1, b2)), rules, group)
        total = out.square().sum()
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        for a, b in zip(torch.autograd.grad(total, leaves), first, strict=True):
            assert torch.equal(a, b)


def test_a_weight_that_is_no_number_stays_to_be_seen():
    tensors = [x.to(DEVICE, torch.float32) for x in problem(*PROBLEMS["a bound that is reached"])]
    tensors[NAMES.index("W1")][1, 0, 0] = float("nan")
    results, _ = run(triton_form, tensors, REACHED, 0)
    broken = [~torch.isfinite(x).flatten(1).all(1) for x in results[:3]]
    assert all(rows.tolist() == [False, True, False, False] for rows in broken)


def weights(width=32, hidden=128, depth=2, dtype=torch.float32, device="meta"):
    dims = [width, *[hidden] * (depth - 1), width]
    sizes = list(zip(dims[:-1], dims[1:], strict=True))
    return InnerWeights(
        tuple(torch.empty(1, *size, dtype=dtype, device=device) for size in sizes),
        tuple(torch.empty(1, 1, size[1], dtype=dtype, device=device) for size in sizes),
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"depth": 3}, "two layers, not for 3"),
        ({"depth": 1}, "two layers, not for 1"),
        ({"dtype": torch.float64}, "float32, not torch.float64"),
        ({"width": 24, "hidden": 96}, "got 24 and 96"),
        ({"hidden": 64}, "got 32 and 64"),
        ({"size": 65}, "at most 64 tokens, not 65"),
    ],
)
def test_what_the_kernels_cannot_run_is_named_where_they_were_asked_for(change, words):
    size = change.pop("size", 16)
    with pytest.raises(ValueError, match=f"ttt.kernel=triton.*{words}.*use ttt.kernel=auto"):
        use_triton("triton", weights(**change), size)
    assert not use_triton("auto", weights(**change), size)


def test_who_chooses():
    on_cpu = weights(128, 512, device="cpu")
    assert not use_triton("auto", on_cpu, 16)
    assert use_triton("triton", on_cpu, 16)
    assert not use_triton("eager", on_cpu, 16)
    with forced("triton"):
        assert use_triton("eager", on_cpu, 16)
        with forced("eager"):
            assert not use_triton_scan("triton", on_cpu, 16)
    assert not use_triton_scan("auto", on_cpu, 16)
    with pytest.raises(ValueError, match="eager or triton; got 'fast'"), forced("fast"):
        pass


def test_a_layer_that_asks_for_the_kernels_trains_and_streams_as_one_of_torchs_operations(ttt_layer):
    settings = {"mini_batch_size": 4, "max_inner_change": 0.5, "scan_checkpoint_group_size": 1}
    torch.manual_seed(1)
    eager = ttt_layer(**settings, kernel="eager")
    layer = ttt_layer(**settings, kernel="triton")
    layer.load_state_dict(eager.state_dict())
    x = torch.randn(2, 11, 32)
    outputs, gradients = [], []
    for module in (eager, layer):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()]))
    assert torch.allclose(*outputs, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1)
    with torch.no_grad(), layer.ttt.streaming(2):
        streamed = torch.cat([layer(part) for part in x.split([1, 3, 7], dim=1)], dim=1)
    assert torch.allclose(streamed, outputs[0], atol=1e-5)
