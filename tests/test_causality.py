"""No output knows a later frame, whatever the layer, the gate and the place in a mini-batch."""

import pytest
import torch
from moshi.models.lm_utils import _delay_sequence

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid_layer import HybridSeqModelingBlock

pytestmark = pytest.mark.usefixtures("each_cpu_kernel")

KINDS = [
    {"ssm_layer": "ttt_linear"},
    {"ssm_layer": "ttt_mlp"},
    {"ssm_layer": "ttt_mlp", "ttt_mlp_layers": 3},
]
GATES = ["residual", "convex"]
K = 4
FRAMES = 11
# First, inside and last of a mini-batch; the whole of the last, unfinished one.
EDGES = [0, 1, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_ttt_layer_outputs_before_a_changed_frame_stay_to_the_last_bit(ttt_layer, kind):
    layer = ttt_layer(mini_batch_size=K, **kind)
    x = torch.randn(2, FRAMES, 32)
    before = layer(x)
    for t in EDGES:
        changed = x.clone()
        changed[:, t] += torch.randn(2, 32)
        after = layer(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_branch_outputs_before_a_changed_frame_stay_to_the_last_bit(kind, gate):
    block = HybridSeqModelingBlock(32, 2, TTTConfig(mini_batch_size=K, gate=gate, gate_init=0.5, **kind))
    x, update = torch.randn(2, 2, FRAMES, 32).unbind(0)
    before = block(x, update)
    for t in EDGES:
        changed = x.clone()
        changed[:, t] += torch.randn(2, 32)
        after = block(changed, update)
        assert torch.equal(after[:, :t], before[:, :t])
        # Later frames hear of it through the TTT layer alone.
        assert t == FRAMES - 1 or not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hybrid_model_outputs_before_a_changed_frame_stay_to_the_last_bit(build, random_codes, kind, gate):
    model = build(mini_batch_size=K, gate=gate, **kind)
    codes = random_codes(2, FRAMES)
    delayed = _delay_sequence(model.delays, codes, model._get_initial_token().expand(2, -1, -1))
    before = model.forward_text(delayed)
    for t in EDGES:
        changed = delayed.clone()
        changed[:, :, t] = (changed[:, :, t] + 1) % 256
        for old, new in zip(before, model.forward_text(changed), strict=True):
            frame_axis = old.dim() - 2
            assert torch.equal(new.narrow(frame_axis, 0, t), old.narrow(frame_axis, 0, t))
            assert not torch.equal(new.select(frame_axis, t), old.select(frame_axis, t))


@pytest.mark.parametrize("group_size", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_an_output_by_later_inputs_is_exactly_zero(ttt_layer, kind, group_size):
    layer = ttt_layer(mini_batch_size=K, scan_checkpoint_group_size=group_size, **kind)
    x = torch.randn(2, FRAMES, 32, requires_grad=True)
    for t in EDGES:
        weights = torch.randn(2, 32)
        (gradient,) = torch.autograd.grad((layer(x)[:, t] * weights).sum(), x)
        assert torch.all(gradient[:, t + 1 :] == 0)
        assert torch.all(gradient[:, : t + 1].abs().amax(dim=(0, 2)) > 0)


@pytest.mark.parametrize("gate", GATES)
def test_gradient_of_a_hybrid_transformers_output_by_later_inputs_is_exactly_zero(build, gate):
    model = build(mini_batch_size=K, gate=gate)
    x = torch.randn(1, FRAMES, 128, requires_grad=True)
    out = model.transformer(x)
    for t in EDGES:
        (gradient,) = torch.autograd.grad((out[:, t] * torch.randn(128)).sum(), x, retain_graph=True)
        assert torch.all(gradient[:, t + 1 :] == 0)
        assert torch.all(gradient[:, : t + 1].abs().amax(dim=(0, 2)) > 0)
