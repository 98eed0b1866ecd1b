"""The kernels of the inner loop equal their naive twin: outputs, last weights and every gradient.

Without a GPU those in Triton run in its interpreter, in float32. More of those in C++ is in `test_native.py`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from inner_problems import Problem, differences, wrong
from training import ROOT

from moshi_ttt.dual_form import dual_form
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.kernels import choice
from moshi_ttt.kernels import triton_form as kernels
from moshi_ttt.kernels.choice import forced, scan_kernel, steps_in_triton, use_triton
from moshi_ttt.kernels.native_form import native_form
from moshi_ttt.kernels.scan import fitting
from moshi_ttt.kernels.triton_form import triton_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-6
REACHED = (0.5, 0.5)
PROBLEMS = {
    "one mini-batch and a part": Problem(1, 2, 7, (16, 64, 16), 4),
    "rows that fill the products": Problem(2, 1, 37, (16, 64, 16), 16),
    "two blocks of hidden units": Problem(1, 1, 23, (32, 128, 32), 8),
    "groups run again": Problem(1, 2, 37, (16, 64, 16), 8, group=2),
    "a bound that is reached": Problem(2, 2, 29, (16, 128, 16), 8, REACHED, group=2),
    "a bound that is reached, all kept": Problem(1, 2, 21, (16, 64, 16), 8, REACHED),
    "a bound that is not reached": Problem(1, 2, 9, (16, 64, 16), 8, (50.0, 50.0), group=1),
    "a mini-batch of 32": Problem(1, 1, 50, (16, 64, 16), 32, group=1),
    "one layer, one mini-batch and a part": Problem(1, 2, 7, (16, 16), 4),
    "one layer, rows that fill the products": Problem(2, 1, 37, (32, 32), 16),
    "one layer, two blocks of rows": Problem(1, 1, 23, (128, 128), 8, (2.0,), group=2),
    "one layer, groups run again": Problem(1, 2, 37, (16, 16), 8, group=2),
    "one layer, a bound that is reached": Problem(2, 2, 29, (16, 16), 8, (1.0,), group=2),
    "one layer, a bound that is reached, all kept": Problem(2, 2, 29, (16, 16), 8, (1.0,)),
    "one layer, a bound that is not reached": Problem(1, 2, 9, (16, 16), 8, (50.0,), group=1),
    "one layer, a mini-batch of 32": Problem(1, 1, 50, (16, 16), 32, group=1),
}
AGAIN, BOUNDED = (
    [f"{layers}{name}" for layers in ("", "one layer, ")]
    for name in ("groups run again", "a bound that is reached")
)


FORMS = {"triton": (triton_form, DEVICE), "native": (native_form, "cpu")}
each_form = pytest.mark.parametrize("form", FORMS)


def given(form, problem):
    """The form, and the problem's arguments in float32 where it runs."""
    function, device = FORMS[form]
    return function, [x.to(device, torch.float32) for x in problem.arguments()]


@pytest.mark.parametrize("name", PROBLEMS)
@each_form
def test_kernels_equal_the_twin_in_outputs_state_and_gradients(form, name):
    problem = PROBLEMS[name]
    expected, expected_grads = problem.run(dual_form, problem.arguments())
    found, grads = problem.run(*given(form, problem))
    assert differences(found, expected) == pytest.approx([0] * len(expected), abs=TOLERANCE)
    assert wrong(problem.names, grads, expected_grads, TOLERANCE) == {}


@pytest.mark.parametrize("name", [*AGAIN, *BOUNDED])
def test_mini_batches_filled_up_to_the_rows_of_a_gpu_are_the_same(monkeypatch, name):
    problem = PROBLEMS[name]
    expected = problem.run(dual_form, problem.arguments())
    gpu = fitting(torch.device("cuda"))
    assert gpu.rows > problem.size
    monkeypatch.setattr(kernels, "launch", gpu)
    found = problem.run(*given("triton", problem))
    for a, b in zip(found, expected, strict=True):
        assert max(differences(a, b)) < TOLERANCE


@pytest.mark.parametrize("name", BOUNDED)
def test_the_bound_of_the_problems_is_reached(name):
    problem = PROBLEMS[name]
    bounded, _ = problem.run(dual_form, problem.arguments())
    free = replace(problem, radii=None)
    unbounded, _ = free.run(dual_form, free.arguments())
    assert all((a - b).norm() > 1e-3 for a, b in zip(bounded, unbounded, strict=True))


@pytest.mark.parametrize("name", [*AGAIN, *BOUNDED])
@each_form
def test_without_gradients_the_same_is_computed(form, name):
    problem = PROBLEMS[name]
    function, tensors = given(form, problem)
    expected, _ = problem.run(function, tensors)
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        out, end = function(*problem.form_arguments(tensors))
    for a, b in zip([out, *end.weights, *end.biases], expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(tensors, before, strict=True):
        assert torch.equal(a, b)  # what it was given is only read


@pytest.mark.parametrize("name", AGAIN)
@each_form
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(form, name):
    function, tensors = given(form, PROBLEMS[name])
    leaves = [x.requires_grad_() for x in tensors]
    for group in (0, 2):
        out, _ = function(*replace(PROBLEMS[name], group=group).form_arguments(leaves))
        total = out.square().sum()
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        for a, b in zip(torch.autograd.grad(total, leaves), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", BOUNDED)
@each_form
def test_a_weight_that_is_no_number_stays_to_be_seen(form, name):
    problem = replace(PROBLEMS[name], group=0)
    function, tensors = given(form, problem)
    tensors[problem.names.index("W1")][1, 0, 0] = float("nan")
    results, _ = problem.run(function, tensors)
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
        ({"depth": 3}, "one or two inner layers, not for 3"),
        ({"depth": 1, "width": 24}, "64, 128; got 24 and outputs of 24"),
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


def test_of_one_layer_the_scan_is_asked_for_and_single_tokens_are_torchs(monkeypatch):
    one, two = (weights(128, 512, depth, device="cpu") for depth in (1, 2))
    assert [scan_kernel("triton", x, 16) for x in (one, two)] == ["triton"] * 2
    assert [steps_in_triton("triton", x, 16) for x in (one, two)] == [False, True]
    with pytest.raises(ValueError, match="ttt.kernel=triton.*not for 3"):
        steps_in_triton("triton", weights(depth=3), 16)
    # As on a GPU, where the kernels of one layer have not been tried yet.
    monkeypatch.setattr(choice, "use_native", lambda *_: False)
    monkeypatch.setattr(choice, "use_triton", lambda *_: True)
    assert [scan_kernel("auto", x, 16) for x in (one, two)] == ["eager", "triton"]


def test_who_chooses():
    on_cpu = weights(128, 512, device="cpu")
    assert not use_triton("auto", on_cpu, 16)
    assert use_triton("triton", on_cpu, 16)
    assert not use_triton("eager", on_cpu, 16)
    with forced("triton"):
        assert use_triton("eager", on_cpu, 16)
        with forced("eager"):
            assert scan_kernel("triton", on_cpu, 16) == "eager"
        assert scan_kernel("native", on_cpu, 16) == "triton"
    assert not use_triton("native", on_cpu, 16)
    for kernel in ("eager", "native", "triton"):
        assert scan_kernel(kernel, on_cpu, 16) == kernel
    assert scan_kernel("auto", on_cpu, 16) == "native"
    assert scan_kernel("auto", weights(device="meta"), 16) == "eager"
    with pytest.raises(ValueError, match="ttt.kernel=native runs on the CPU, not on meta"):
        scan_kernel("native", weights(device="meta"), 16)
    with pytest.raises(ValueError, match="eager, native or triton; got 'fast'"), forced("fast"):
        pass


@pytest.mark.parametrize("ssm_layer, bound", [("ttt_mlp", 0.5), ("ttt_linear", 0.1)])
def test_a_layer_that_asks_for_the_kernels_trains_and_streams_as_one_of_torchs_operations(
    ttt_layer, ssm_layer, bound
):
    settings = {"ssm_layer": ssm_layer, "mini_batch_size": 4, "max_inner_change": bound}
    settings["scan_checkpoint_group_size"] = 1
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


def test_the_kernels_of_one_layer_compile_for_an_h100_and_fit_its_shared_memory(tmp_path):
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/compiled_for_hopper.py"],
        cwd=ROOT,
        env=without | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert len(sizes) == 3
    assert max(sizes.values()) <= 227 * 1024  # of a program on an H100
