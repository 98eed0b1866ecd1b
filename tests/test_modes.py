"""Each mode trains the parameters it names, all of them and no others, in the right precision."""

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt.integration import live_settings, set_activation_checkpointing
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.parameters import TRAINABLE_GROUPS, named_groups, set_trainable

LORA = LoRAConfig(enable=True, rank=4)
GROUPS = {
    "frozen": set(),
    "lora": {"lora"},
    "ttt": {"ttt", "gate"},
    "lora+ttt": {"lora", "ttt", "gate"},
    "full": {"base", "ttt", "gate"},
}


def loss(model, codes):
    """Mean cross-entropy of all valid audio targets and of all valid text targets."""
    out, audio, text = model(codes), codes[:, 1:9], codes[:, :1]
    audio_loss = F.cross_entropy(out.logits[out.mask], audio[out.mask])
    return audio_loss + F.cross_entropy(out.text_logits[out.text_mask], text[out.text_mask])


def train(model, codes, steps=2):
    """Plain AdamW steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, codes).backward()
        optimizer.step()


def test_the_modes_are_those_tested_here():
    assert {mode: set(groups) for mode, groups in TRAINABLE_GROUPS.items()} == GROUPS


@pytest.mark.parametrize(
    "mode, gate",
    [("lora", "residual"), ("lora+ttt", "residual"), ("full", "residual"), ("ttt", "residual")]
    + [("ttt", "convex")],
)
def test_a_mode_moves_every_parameter_of_its_groups_and_no_other(build, random_codes, mode, gate):
    lora = LORA if "lora" in mode else None
    model = build(lora=lora, gate=gate, gate_init=0.1, learned_token_scale=True, enable=mode != "lora")
    counts = set_trainable(model, mode)
    parameters = list(named_groups(model))
    before = {name: parameter.detach().clone() for _, name, parameter in parameters}
    train(model, random_codes(2, 12))
    moved = {name for _, name, parameter in parameters if not torch.equal(parameter, before[name])}
    assert moved == {name for group, name, _ in parameters if group in GROUPS[mode]}
    assert set(counts) == GROUPS[mode]
    assert sum(counts.values()) == sum(before[name].numel() for name in moved)


def test_lora_beside_ttt_trains_lora_alone(build):
    model = build(lora=LORA)
    set_trainable(model, "lora")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in trainable)


def test_frozen_trains_nothing(build):
    model = build(lora=LORA)
    assert set_trainable(model, "frozen") == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_groups_are_all_parameters_once(build):
    model = build(lora=LORA)
    parameters = list(named_groups(model))
    assert [name for _, name, _ in parameters] == [name for name, _ in model.named_parameters()]
    of_group = {
        group: [n for g, n, _ in parameters if g == group] for group in ("base", "lora", "ttt", "gate")
    }
    assert of_group["gate"] == [f"transformer.layers.{i}.seq_modeling_block.gate.alpha" for i in (1, 2)]
    assert all(".seq_modeling_block." in name for name in of_group["ttt"])
    assert all(".lora_" in name for name in of_group["lora"])
    assert not any(".lora_" in name or ".seq_modeling_block." in name for name in of_group["base"])


def test_the_last_mode_set_counts(build):
    model = build()
    set_trainable(model, "full")
    set_trainable(model, "ttt")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".seq_modeling_block." in name for name in trainable)


@pytest.mark.parametrize(
    "mode, lora, ttt, message",
    [
        ("everything", True, True, "mode must be one of frozen, lora, ttt, lora.ttt, full; got 'everything'"),
        ("", True, True, "mode must be one of"),
        ("lora", False, True, "mode=lora trains lora parameters, .* none; set lora.enable=true"),
        ("lora+ttt", False, True, "trains lora parameters, .* none; set lora.enable=true"),
        ("ttt", True, False, "mode=ttt trains ttt parameters, .* none; set ttt.enable=true"),
        ("lora+ttt", True, False, "trains ttt parameters, .* none; set ttt.enable=true"),
        ("full", True, True, "mode=full trains the weights under LoRA; set lora.enable=false"),
    ],
)
def test_a_mode_that_cannot_be_is_an_error_that_says_what_to_set(build, mode, lora, ttt, message):
    model = build(lora=LORA if lora else None, enable=ttt)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        set_trainable(model, mode)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_bfloat16_model_keeps_what_learns_in_small_steps_in_float32(build):
    model = build("bfloat16", ttt_mlp_layers=3, learned_token_scale=True)
    block = "transformer.layers.1.seq_modeling_block"
    dtypes = {
        name.removeprefix(f"{block}."): parameter.dtype
        for name, parameter in model.named_parameters()
        if name.startswith(block)
    }
    inner = {"W1", "W2", "W3", "b1", "b2", "b3", "ttt_norm_weight", "ttt_norm_bias", "token_scale_offset"}
    inner |= {"learnable_ttt_lr_weight", "learnable_ttt_lr_bias"}
    float32 = {"gate.alpha"} | {f"ttt_layer.ttt.{name}" for name in inner}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == float32
    bfloat16 = {f"ttt_layer.ttt.{w}.{part}" for w in ("wq", "wk", "wv", "wo") for part in ("weight", "bias")}
    assert bfloat16 <= {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    others = {p.dtype for name, p in model.named_parameters() if ".seq_modeling_block." not in name}
    assert others == {torch.bfloat16}


@pytest.mark.parametrize("param_dtype", ["float16", "int8", ""])
def test_other_parameter_types_are_refused(build, param_dtype):
    with pytest.raises(ValueError, match="param_dtype must be one of float32, bfloat16"):
        build(param_dtype)


def test_checkpointed_layers_give_the_same_gradients(build, random_codes):
    codes = random_codes(1, 12)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build(scan_checkpoint_group_size=1)  # of another size, gradients differ by rounding
        set_activation_checkpointing(model, checkpointing)
        assert live_settings(model)["checkpointing"] == checkpointing
        set_trainable(model, "full")
        loss(model, codes).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 100
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
