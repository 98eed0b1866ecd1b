"""Norms, gates and rotations with gradients written by hand are Moshi's, compiled or not."""

import pytest
import torch
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import RMSNorm, create_norm_fn
from torch.nn import functional as F
from training import ROOT, run_python

from moshi_ttt.pointwise import compiling, gate, norm, rotate


@pytest.fixture
def module():
    module = RMSNorm(24, eps=1e-8, dtype=torch.float)
    torch.nn.init.normal_(module.alpha, mean=1.0)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_moshis(module, dtype):
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 5, 24)
    inputs = [x, module.alpha]
    found, expected = norm(module, x), module(x)
    assert torch.equal(found, expected)
    pairs = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(*pairs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


def test_only_the_norm_that_is_known_is_replaced():
    x = torch.randn(2, 3, 8)
    for kind in ("layer_norm", "rms_norm", "layer_norm_f32"):
        other = create_norm_fn(kind, 8)
        assert torch.equal(norm(other, x), other(x))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_the_gate_is_moshis(activation, compiled):
    x = torch.randn(2, 5, 24, requires_grad=True)
    weight = torch.randn(2, 5, 12)
    expected = activation(x.view(2, 5, 2, 12)[..., 0, :]) * x.view(2, 5, 2, 12)[..., 1, :]
    with compiling(compiled):
        found = gate(x, activation)
    assert torch.equal(found, expected)
    (one,), (other,) = (torch.autograd.grad((out * weight).sum(), [x]) for out in (found, expected))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_rotation_is_moshis(interleave, dtype, compiled):
    rope = RotaryEmbedding(interleave)
    q, k = (torch.randn(3, 7, 2, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 7, 2, 8)
    position = torch.tensor([0, 5, 3000])
    expected = rope(q, k, position, time_before_heads=True)
    with compiling(compiled):
        found = rotate(rope, q, position), rotate(rope, k, position)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    pairs = [torch.autograd.grad(sum((o * weight).sum() for o in outs), [q, k]) for outs in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
    shared = rotate(rope, q, torch.zeros(1))
    assert torch.equal(shared, rotate(rope, q, torch.zeros(3)))


@pytest.mark.parametrize("which", ["norm", "gate"])
def test_norm_and_gate_keep_their_input_alone(module, which):
    kept = []
    x = torch.randn(2, 5, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(module, x) if which == "norm" else gate(x, F.silu)
    assert {t.data_ptr() for t in kept} <= {x.data_ptr(), module.alpha.data_ptr()}
    assert kept


def test_compiled_functions_give_the_same_gradients():
    """In a process of its own: the others run without a compiler. It needs a C++ compiler."""
    printed = run_python(str(ROOT / "tests/compiled_step.py"), NO_TORCH_COMPILE="").splitlines()
    without, with_compiler, difference = (
        line for line in printed if line.startswith(("compiled", "difference"))
    )
    assert without == "compiled []"
    for name in ("_norm", "_norm_backward", "_silu_gate", "_silu_gate_backward", "_rotate"):
        assert f"'{name}'" in with_compiler
    assert float(difference.split()[1]) < 1e-5
