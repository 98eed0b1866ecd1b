"""The heads in parts give Moshi's loss and gradients, with LoRA inside the product and steps as one batch."""

import pytest
import torch
from moshi.models.lm import LMModel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from finetune import scoring
from finetune.loss import LossModel, LossWeights, loss_sums, weighted_step_targets, weighted_targets
from finetune.plan import _IN_PLACE_FLOPS
from finetune.scoring import loss_of_logits, weighted_nll_sum
from finetune.speed import flops_per_frame
from moshi_ttt.depformer import Depformer
from moshi_ttt.integration import set_activation_checkpointing
from moshi_ttt.linear import LinearPerStep, linear
from moshi_ttt.lora import LoRAConfig, apply_lora_to_model, lora_modules
from moshi_ttt.parameters import set_trainable
from moshi_ttt.temporal import Running
from moshi_ttt.tiny_model import LM_CONFIG

WEIGHTS = LossWeights(100.0, 0.5)
LORA = LoRAConfig(enable=True, rank=4)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts that do not divide the frames."""
    monkeypatch.setattr(scoring, "TEXT_FRAMES", 7)
    monkeypatch.setattr(scoring, "DEPFORMER_FRAMES", 11)


def gradients(model, losses, totals):
    model.zero_grad()
    (losses / totals).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm()
        assert error <= tolerance * max(tensor.norm(), 1e-7), name


@pytest.mark.parametrize("mode", ["lora+ttt", "lora", "ttt", "full"])
@pytest.mark.parametrize("running", [None, Running(recomputed=2), Running()])
def test_the_loss_and_its_gradients_are_moshis(build, perturb, random_codes, small_parts, mode, running):
    lora = LoRAConfig() if mode == "full" else LORA
    model = perturb(build(lora=lora, ttt_layer_context=5, non_ttt_layer_context=9)).train()
    set_trainable(model, mode)
    codes = random_codes(2, 24)
    codes[0, :, 15:] = -1
    expected_losses = loss_sums(model(codes), weighted_targets(model, codes, WEIGHTS))
    totals = weighted_targets(model, codes, WEIGHTS).totals().float()
    expected = gradients(model, expected_losses, totals)
    set_activation_checkpointing(model, running is not None)
    targets = weighted_step_targets(model, codes, None, WEIGHTS)
    assert torch.equal(targets.totals().float(), totals)
    losses, _ = LossModel(model, running)(codes, targets)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    assert_close(gradients(model, losses, totals), expected)
    with torch.no_grad():
        unrecorded, _ = LossModel(model, running)(codes, targets)
    torch.testing.assert_close(unrecorded, expected_losses.detach(), rtol=1e-6, atol=0)


def test_heads_of_a_split_model_are_the_same(build, perturb, random_codes, small_parts):
    model = perturb(build(lora=LORA)).train()
    set_trainable(model, "lora+ttt")
    codes = random_codes(2, 24)
    targets = weighted_step_targets(model, codes, None, WEIGHTS)
    root = LossModel(model)
    found = {}
    for root.split in (False, True):
        losses, _ = root(codes, targets)
        found[root.split] = losses.detach(), gradients(model, losses, torch.ones(2))
    torch.testing.assert_close(*(losses for losses, _ in found.values()), rtol=1e-6, atol=0)
    assert_close(found[False][1], found[True][1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"depformer_weights_per_step_schedule": [0, 1, 2, 2, 2, 3, 3, 3]},
        {"depformer_multi_linear": False},
        {"depformer_norm": "layer_norm", "depformer_low_rank_embeddings": 16},
        {"depformer_pos_emb": "rope", "depformer_weights_per_step": False},
        {"depformer_layer_scale": 0.1, "bias_proj": True},
    ],
)
@pytest.mark.parametrize("rank", [0, 4, 32])  # of 32, LoRA is merged
def test_the_depformer_at_once_is_moshis_step_by_step(random_codes, settings, rank):
    model = LMModel(**(LM_CONFIG | settings), device="cpu", dtype=torch.float32)
    if rank and not settings.get("bias_proj"):  # Moshi's LoRA has no bias
        apply_lora_to_model(model, LoRAConfig(enable=True, rank=rank))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    codes = random_codes(2, 9)
    codes[0, 3, 4] = -1
    hidden = torch.randn(2, 9, model.dim, requires_grad=True)
    expected = model.forward_depformer_training(codes, hidden).transpose(0, 1).flatten(1, 2)
    frames = codes.transpose(1, 2).flatten(0, 1)
    found = Depformer(model).logits(frames, hidden.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    weight = torch.randn_like(expected)
    inputs = [hidden, *model.depformer.parameters(), *model.depformer_in.parameters()]
    pairs = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        assert (one - other).norm() <= 2e-5 * max(other.norm(), 1e-6)


def test_lora_inside_the_product_is_moshis(build, perturb):
    _, module = lora_modules(perturb(build(lora=LORA)))[0]
    x = torch.randn(2, 5, module.in_features, requires_grad=True)
    weight = torch.randn(2, 5, module.out_features)
    inputs = [x, module.lora_A.weight, module.lora_B.weight]
    pairs = []
    for out in (linear(module, x), module(x)):
        pairs.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for one, other in zip(*pairs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_base_product_is_not_run_again(build):
    """It comes last in a layer, so that recomputation stops before it."""
    model = build(lora=LORA, enable=False)
    module = model.transformer.layers[0].gating.linear_out
    set_trainable(model, "lora")
    x = torch.randn(3, module.in_features, requires_grad=True)
    runs = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.addmm_:
                runs.append(func)
            return func(*args, **(kwargs or {}))

    def block(inputs):
        with Counted():
            return linear(module, inputs)

    out = checkpoint(block, x, use_reentrant=False)
    out.sum().backward()
    assert len(runs) == 2  # asked for twice, and stopped before its product
    assert LinearPerStep([module], range(3))(x).shape == out.shape


def test_logits_become_float32_in_parts(monkeypatch):
    monkeypatch.setattr(scoring, "TEXT_FRAMES", 5)
    logits = torch.randn(17, 30, dtype=torch.bfloat16, requires_grad=True)
    targets, weight = torch.randint(0, 30, (17,)), torch.rand(17)
    weight[3] = 0
    found = loss_of_logits(logits, targets, weight)
    expected = (F.cross_entropy(logits.float(), targets, reduction="none") * weight).sum()
    torch.testing.assert_close(found, expected)
    (one,), (other,) = (torch.autograd.grad(loss, [logits]) for loss in (found, expected))
    assert torch.equal(one, other)
    torch.testing.assert_close(weighted_nll_sum(logits, targets, weight), expected)


def test_the_flops_of_a_frame_are_those_that_torch_counts(build, random_codes):
    frames = 64
    model = build(lora=LORA, enable=False).train()
    set_trainable(model, "lora")
    set_activation_checkpointing(model, False)
    codes = random_codes(1, frames)
    targets = weighted_step_targets(model, codes, None, WEIGHTS)
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE_FLOPS) as counted:
        LossModel(model)(codes, targets)[0].sum().backward()
    assert flops_per_frame(model, frames) == pytest.approx(counted.get_total_flops() / frames, rel=0.05)
