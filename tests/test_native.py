"""The inner loop in C++: right at every depth and size, in any number of threads, and compiled with care."""

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inner_problems import Problem, differences, wrong
from torch.nn import functional as F

from moshi_ttt.dual_form import dual_form
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.kernels import choice, native_build
from moshi_ttt.kernels.native_form import native_form

if native_build.compiler() is None:
    pytest.skip("no C++ compiler: g++ is missing", allow_module_level=True)

REACHED, FAR = (0.3, 0.3, 0.3), (50.0, 50.0, 50.0)
PROBLEMS = {
    "one layer": Problem(2, 2, 45, (16, 16), 16),
    "one layer, a bound that is reached": Problem(2, 2, 45, (16, 16), 8, REACHED[:1], group=2),
    "two layers, odd widths": Problem(1, 3, 29, (6, 23, 6), 5, group=2, factors=(0.5, 2.0)),
    "two layers as wide as Moshi's": Problem(1, 1, 80, (128, 512, 128), 64, group=1),
    "three layers": Problem(2, 1, 33, (16, 64, 64, 16), 16, FAR, group=1, factors=(1.0, 0.25, 3.0)),
    "three layers, a bound that is reached": Problem(2, 2, 61, (8, 32, 32, 8), 4, REACHED, group=3),
    "a head narrower than a vector": Problem(1, 2, 19, (4, 12, 4), 16),
    "mini-batches of one token": Problem(1, 2, 5, (16, 64, 16), 1),
    "no whole mini-batch": Problem(1, 2, 5, (16, 64, 16), 16, FAR[:2]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_weights_and_gradients_are_the_twins(name):
    problem = PROBLEMS[name]
    expected, expected_grads = problem.run(dual_form, problem.arguments())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        found, grads = problem.run(native_form, [x.to(dtype) for x in problem.arguments()])
        assert max(differences(found, expected)) < tolerance
        assert wrong(problem.names, grads, expected_grads, tolerance) == {}


@pytest.mark.parametrize("radii", [None, (0.5, 0.5)], ids=["free", "bounded"])
def test_undone_updates_of_a_long_sequence_lose_no_precision(radii):
    # 250 mini-batches in one group: all updates are undone, or there are copies where the bound acted.
    problem = Problem(1, 1, 1000, (16, 64, 16), 4, radii)
    expected, expected_grads = problem.run(dual_form, problem.arguments())
    in_float32 = [x.float() for x in problem.arguments()]
    _, twin = problem.run(dual_form, in_float32)
    _, grads = problem.run(native_form, in_float32)
    rounding = max(differences(twin, expected_grads))
    assert max(differences(grads, expected_grads)) < 5 * rounding


def test_threads_and_other_rows_change_no_bit():
    problem = replace(
        PROBLEMS["three layers, a bound that is reached"], rows=3, length=601
    )  # work for threads
    tensors = [x.float() for x in problem.arguments()]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = problem.run(native_form, tensors)
        torch.set_num_threads(4)
        found = problem.run(native_form, tensors)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    shared, per_row = ("scale", "center"), problem.heads
    named = zip(problem.names, tensors, strict=True)
    first = [x if name.startswith(shared) else x[:per_row] for name, x in named]
    alone, _ = replace(problem, rows=1).run(native_form, first)
    assert all(torch.equal(x, y[:per_row]) for x, y in zip(alone, expected[0], strict=True))


GELU = """
#include "pointwise.h"
extern "C" void gelu(long count, const float* x, float* value, float* slope, float* second) {
    ttt::each<float>(count, x, [&](long i, long many, const ttt::Gelu<float>& at) {
        ttt::put<float>(value + i, many, at.value());
        ttt::put<float>(slope + i, many, at.slope());
        ttt::put<float>(second + i, many, at.second());
    });
}
"""


def test_gelu_and_its_derivatives_are_exact_to_rounding_over_all_numbers(tmp_path):
    source, compiled = tmp_path / "gelu.cpp", tmp_path / "gelu.so"
    source.write_text(GELU)
    headers = Path(native_build.__file__).parent / "native"
    command = [native_build.compiler(), *native_build.FLAGS.split(), f"-I{headers}", source, "-o", compiled]
    subprocess.run(command, check=True)
    far = [-1e12, -1e4, -100.0, -12.5, 12.5, 100.0, 1e4, 1e12, float("nan")]
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor(far)])
    found = [torch.empty_like(x) for _ in range(3)]
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, *found)]
    ctypes.CDLL(str(compiled)).gelu(ctypes.c_long(x.numel()), *addresses)
    exact = x.double().requires_grad_()
    value = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(value.sum(), exact, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), exact)
    for ours, right in zip(found, (value, slope, second), strict=True):
        assert ours[-1].isnan()
        error = ((ours - right).abs() / right.abs().clamp(min=1))[:-1]
        assert error.max() < 4e-7, x[error.argmax()]


def test_tensors_that_are_not_in_order_are_read_right():
    problem = PROBLEMS["one layer"]
    tensors = problem.arguments()
    expected, expected_grads = problem.run(native_form, tensors)
    strided = [x.mT.contiguous().mT if x.ndim > 1 else x for x in tensors]
    assert not strided[0].is_contiguous()
    found, grads = problem.run(native_form, strided)
    assert all(torch.equal(a, b) for a, b in zip((*found, *grads), (*expected, *expected_grads), strict=True))
    with torch.no_grad():
        out, _ = native_form(*problem.form_arguments(strided))
    assert torch.equal(out, expected[0])


def on_cpu():
    return InnerWeights((torch.zeros(1, 16, 16),), (torch.zeros(1, 1, 16),))


@pytest.fixture
def fresh_choice():
    """The compiler is looked for anew, before and after."""
    caches = native_build.compiler, native_build.library, choice._has_compiler
    for found in caches:
        found.cache_clear()
    yield
    for found in caches:
        found.cache_clear()


def test_without_a_compiler_it_says_what_runs_in_its_place(fresh_choice, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choice.scan_kernel("auto", on_cpu(), 16) == "eager"
    assert choice.scan_kernel("auto", on_cpu(), 16) == "eager"
    assert caplog.text.count("no C++ compiler found") == 1
    assert "install g++, or set ttt.kernel=eager" in caplog.text
    with pytest.raises(RuntimeError, match="install g\\+\\+, name one in the environment variable CXX"):
        native_build.library()


def test_a_compiler_that_fails_is_quoted(fresh_choice, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "out of ideas" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MOSHI_TTT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="(?s)use ttt.kernel=eager.*out of ideas"):
        native_build.library()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_processes_that_start_together_compile_once(tmp_path):
    counting = tmp_path / "c++"
    counting.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> {tmp_path}/runs\nexec g++ "$@"\n'
    )
    counting.chmod(0o755)
    code = "from moshi_ttt.kernels.native_build import library; library().forward_float32"
    environment = os.environ | {"CXX": str(counting), "MOSHI_TTT_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1])
        for _ in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "runs").read_text() == "compiled\n"
    kept = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kept == ["", ".so"]  # the lock, and nothing half done
