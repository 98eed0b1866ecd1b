"""LoRA starts as the identity, leaves TTT alone, and its checkpoints open in plain Moshi."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from lora_models import LORA, PLAIN, TTT, logits, settings_of
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from moshi.modules.lora import LoRALinear
from torch import nn

from moshi_ttt.building import build_model
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.integration import ttt_layers
from moshi_ttt.lora import LoRAConfig, apply_lora_to_model, lora_modules
from moshi_ttt.projection import Projection


def test_lora_starts_as_the_identity(tiny_base):
    plain = build_model(settings_of(LoRAConfig()), tiny_base)
    model = build_model(settings_of(), tiny_base)
    assert len(lora_modules(model)) > 50
    for _, module in lora_modules(model):
        assert torch.all(module.lora_B.weight == 0)
        assert torch.all(module.lora_A.weight.std() > 0)
        assert module.scaling == 3.0
    assert torch.equal(logits(model), logits(plain))


def test_lora_wraps_every_linear_layer_of_moshi_and_none_of_ttt(tiny_base):
    model = build_model(settings_of(ttt=TTT), tiny_base)
    for _, layer in ttt_layers(model):
        block = layer.seq_modeling_block
        assert lora_modules(block) == []
        assert type(block.ttt_layer.ttt.wq) is Projection
        assert isinstance(layer.original_layer.self_attn.in_projs[0], LoRALinear)
    ours = {id(m) for _, layer in ttt_layers(model) for m in layer.seq_modeling_block.modules()}
    ours |= {id(m) for _, lora in lora_modules(model) for m in (lora.lora_A, lora.lora_B, lora.frozen_W)}
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in ours] == []


def test_lora_comes_before_ttt_and_once(build):
    with pytest.raises(ValueError, match="apply LoRA before TTT"):
        apply_lora_to_model(build(), LORA)
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora_to_model(build(lora=LORA, enable=False), LORA)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoRAConfig(True, rank=0), "lora.rank must be at least 1, got 0"),
        (LoRAConfig(True, scaling=0.0), "lora.scaling must be above 0"),
        (LoRAConfig(True, scaling=float("nan")), "lora.scaling must be above 0, got nan"),
    ],
)
def test_settings_of_lora_that_cannot_work_are_refused(build, config, message):
    with pytest.raises(ValueError, match=message):
        build(lora=config)


def test_moshis_own_loader_opens_a_lora_checkpoint(tiny_base, trained, tmp_path):
    settings = settings_of()
    model = trained(settings)
    folder = save_checkpoint(tmp_path, 1, model, asdict(settings), tiny_base, save_base=False)
    info = CheckpointInfo.from_hf_repo(
        "unused/because-every-path-is-given",
        moshi_weights=tiny_base.moshi_weights,
        mimi_weights=tiny_base.mimi_weights,
        tokenizer=tiny_base.tokenizer,
        config_path=folder / "config.json",
        mimi_config_path=tiny_base.moshi_weights.parent / "mimi_config.json",
    )
    theirs = get_moshi_lm(
        info.moshi_weights,
        info.lm_config,
        dtype=torch.float32,
        lora_weights=folder / "lora.safetensors",
    )
    assert len(lora_modules(theirs)) == len(lora_modules(model))
    assert torch.equal(logits(theirs), logits(model))
    assert not torch.equal(logits(theirs), logits(build_model(settings_of(LoRAConfig()), tiny_base)))


def test_moshis_own_loader_takes_the_trained_context_from_a_lora_checkpoint(tiny_base, trained, tmp_path):
    settings = settings_of(ttt=replace(PLAIN, non_ttt_layer_context=3))
    folder = save_checkpoint(tmp_path, 1, trained(settings), asdict(settings), tiny_base, save_base=False)
    assert json.loads((folder / "config.json").read_text())["context"] == 3
