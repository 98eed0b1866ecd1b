"""What `init_from` may name, and that every weight found there is used: ours, or moshi-finetune's."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from lora_models import LORA, PLAIN, TTT, logits, settings_of
from safetensors.torch import load_file, save_file

from moshi_ttt.building import build_model
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.integration import live_settings
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.warm_start import find_warm_start


def test_a_run_starts_from_a_checkpoint_with_another_context(tiny_base, trained, tmp_path):
    settings = settings_of(ttt=TTT)
    model = trained(settings)
    save_checkpoint(tmp_path, 7, model, asdict(settings), tiny_base, save_base=False)
    other = settings_of(ttt=replace(TTT, ttt_layer_context=20, non_ttt_layer_context=30))
    start = find_warm_start(str(tmp_path), other)
    assert start.description.startswith("step 7 of ")
    warm = build_model(other, tiny_base, weights=start.weights)
    assert live_settings(warm)["contexts"] == [30, 20, 20, 30]
    assert live_settings(model)["contexts"] == [250] * 4
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in warm.state_dict().items())
    assert torch.equal(logits(warm), logits(model))  # 9 frames fit in either context


def test_a_run_starts_from_all_weights_of_a_checkpoint(tiny_base, perturb, tmp_path):
    settings = settings_of(LoRAConfig(), TTT)
    model = perturb(build_model(settings, tiny_base))
    save_checkpoint(tmp_path, 1, model, asdict(settings), tiny_base, save_base=True)
    start = find_warm_start(str(tmp_path / "checkpoints/checkpoint_000001"), settings)
    assert torch.equal(logits(build_model(settings, tiny_base, weights=start.weights)), logits(model))


def test_a_warm_start_verifies_the_checkpoint_first(tiny_base, trained, tmp_path):
    settings = settings_of(ttt=TTT)
    folder = save_checkpoint(tmp_path, 1, trained(settings), asdict(settings), tiny_base, save_base=False)
    (folder / "extra").touch()
    with pytest.raises(ValueError, match=r"extra files \['extra'\]"):
        find_warm_start(str(tmp_path), settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            settings_of(replace(LORA, rank=8), TTT),
            "LoRA weights of rank 4 and scaling 3; set lora.enable=true",
        ),
        (settings_of(replace(LORA, scaling=2.0), TTT), "LoRA weights of rank 4 and scaling 3"),
        (settings_of(LoRAConfig(), TTT), "LoRA weights of rank 4 .* lora.rank=4 lora.scaling=3"),
        (settings_of(LORA, PLAIN), "holds TTT layers; set ttt.enable=true"),
    ],
)
def test_weights_that_would_not_be_used_are_an_error(tiny_base, trained, tmp_path, settings, message):
    saved = settings_of(ttt=TTT)
    save_checkpoint(tmp_path, 1, trained(saved), asdict(saved), tiny_base, save_base=False)
    with pytest.raises(ValueError, match=message):
        find_warm_start(str(tmp_path), settings)


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="init_from=.* is no folder"):
        find_warm_start(str(tmp_path / "nowhere"), settings_of())
    with pytest.raises(ValueError, match="no checkpoint at"):
        find_warm_start(str(tmp_path), settings_of())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds neither lora.safetensors nor consolidated.safetensors"):
        find_warm_start(str(tmp_path), settings_of())


def old_names(state):
    """LoRA factors under the key names of older Moshi releases: one stacked tensor for all steps."""
    stacked = {}
    for name, tensor in state.items():
        for new, old in ((".in_projs.", ".in_proj."), (".out_projs.", ".out_proj.")):
            if new in name:
                prefix, rest = name.split(new)
                stacked.setdefault(prefix + old + rest.split(".", 1)[1], []).append(tensor)
                break
        else:
            stacked[name] = [tensor]
    return {name: torch.cat(tensors) for name, tensors in stacked.items()}


@pytest.fixture
def of_moshi_finetune(trained, tmp_path):
    """A checkpoint as moshi-finetune writes it: lora.safetensors and config.json, nothing else of ours."""

    def of_moshi_finetune(rename):
        model = trained(settings_of())
        factors = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
        folder = tmp_path / "checkpoint_000100/consolidated"
        folder.mkdir(parents=True)
        save_file(rename(factors), folder / "lora.safetensors")
        (folder / "config.json").write_text(json.dumps({"lora_rank": 4, "lora_scaling": 3.0}))
        return model, folder

    return of_moshi_finetune


@pytest.mark.parametrize("rename, style", [(dict, "in_projs.0.lora_A"), (old_names, "in_proj.lora_A")])
def test_a_run_starts_from_a_lora_checkpoint_of_moshi_finetune(tiny_base, of_moshi_finetune, rename, style):
    model, folder = of_moshi_finetune(rename)
    assert any(style in name for name in load_file(folder / "lora.safetensors"))
    for path in (folder, folder.parent):
        start = find_warm_start(str(path), settings_of())
        assert start.description.startswith("moshi-finetune LoRA checkpoint")
        warm = build_model(settings_of(), tiny_base, weights=start.weights)
        assert torch.equal(logits(warm), logits(model))
    hybrid = build_model(settings_of(ttt=replace(TTT, gate_init=0.0)), tiny_base, weights=start.weights)
    assert torch.equal(logits(hybrid), logits(model))


@pytest.mark.parametrize("rename", [dict, old_names])
def test_a_wrong_rank_is_an_error_whatever_the_config_beside_it_says(tiny_base, of_moshi_finetune, rename):
    _, folder = of_moshi_finetune(rename)
    other_rank = settings_of(replace(LORA, rank=8))
    with pytest.raises(ValueError, match="LoRA weights of rank 4 and scaling 3; set .* lora.rank=4"):
        find_warm_start(str(folder), other_rank)
    (folder / "config.json").write_text(json.dumps({"lora_rank": 8, "lora_scaling": 3.0}))
    start = find_warm_start(str(folder), other_rank)
    with pytest.raises(ValueError, match="lora.safetensors: .* has shape .*, the settings make it"):
        build_model(other_rank, tiny_base, weights=start.weights)


def test_a_lora_checkpoint_of_moshi_finetune_must_say_its_rank_and_be_whole(tiny_base, of_moshi_finetune):
    _, folder = of_moshi_finetune(dict)
    factors = load_file(folder / "lora.safetensors")
    lost = factors.popitem()[0]
    save_file(factors, folder / "lora.safetensors")
    start = find_warm_start(str(folder), settings_of())
    with pytest.raises(ValueError, match=rf"1 tensors missing \['{lost}'\]"):
        build_model(settings_of(), tiny_base, weights=start.weights)
    (folder / "config.json").write_text(json.dumps({"lora_scaling": 3.0}))
    with pytest.raises(ValueError, match="has no lora_rank"):
        find_warm_start(str(folder), settings_of())
