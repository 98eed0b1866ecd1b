"""A run can start from the weights of another, all of them or none, with settings of its own."""

import json

import pytest
import torch
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import load_file, save_file
from training import CPU, checkpoint_names, losses, own_logging, run, tiny_config, trained_parts

from finetune.train import build_parts, train
from moshi_ttt.checkpoint import find_checkpoint, load_checkpoint
from moshi_ttt.integration import live_contexts
from moshi_ttt.loading import load_moshi

RANK_3 = ("lora.rank=3", "lora.scaling=1.5")


@pytest.fixture(scope="module")
def ours(private_cache, tmp_path_factory):
    """A run that trained LoRA of rank 4 and TTT-MLP."""
    return run(tmp_path_factory.mktemp("warm") / "run")


@pytest.fixture(scope="module")
def full(private_cache, tmp_path_factory):
    """A run that trained all weights, without TTT."""
    return run(tmp_path_factory.mktemp("warm") / "run", "mode=full", "lora=none", "ttt=none")


@pytest.fixture(scope="module")
def plain_lora(private_cache, tiny_base):
    """Plain Moshi with random LoRA factors of rank 3, as moshi-finetune trains it."""
    model = load_moshi(tiny_base, "cpu", torch.float32)
    replace_all_linear_with_lora(model, 3, 1.5)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def theirs(plain_lora, tmp_path_factory):
    """The folder that moshi-finetune writes for it: lora.safetensors in its names, and its config.json."""
    folder = tmp_path_factory.mktemp("theirs") / "checkpoint_000010/consolidated"
    folder.mkdir(parents=True)
    state = {name: p.detach() for name, p in plain_lora.named_parameters() if ".lora_" in name}
    save_file(state, folder / "lora.safetensors")
    (folder / "config.json").write_text(json.dumps({"lora": True, "lora_rank": 3, "lora_scaling": 1.5}))
    return folder


def parameters(model):
    return dict(model.named_parameters())


def build(tmp_path, *overrides):
    """The model as a run would start to train it."""
    return build_parts(tiny_config(tmp_path / "run", *overrides), [], CPU).model


def refused(tmp_path, match, *overrides):
    run_dir = tmp_path / "run"
    with own_logging(), pytest.raises(ValueError, match=match):
        train(tiny_config(run_dir, *overrides), CPU)
    assert not run_dir.exists()


def test_a_run_of_ours_gives_its_weights_and_not_its_settings(ours, tmp_path):
    contexts = ("ttt.ttt_layer_context=6", "ttt.non_ttt_layer_context=8")
    model = build(tmp_path, f"init_from={ours}", *contexts, "seed=7", "optim.lr=1e-5", "ttt.base_lr=2")
    saved = parameters(load_checkpoint(ours).model)
    assert parameters(model).keys() == saved.keys()
    assert all(torch.equal(p, saved[name]) for name, p in parameters(model).items())
    assert live_contexts(model) == {True: [6, 6], False: [8, 8]}
    assert model.transformer.layers[1].seq_modeling_block.ttt_layer.ttt.base_lr == 2
    fresh = parameters(build(tmp_path, *contexts, "seed=7"))
    different = {name for name, p in fresh.items() if not torch.equal(p, saved[name])}
    assert any(".lora_B." in name for name in different)
    assert any(".gate.alpha" in name for name in different)


@pytest.mark.parametrize(
    "place", ["", "checkpoints/checkpoint_000002", "checkpoints/checkpoint_000002/consolidated"]
)
def test_a_run_a_step_or_a_folder_may_be_named(ours, tmp_path, place):
    model = build(tmp_path, f"init_from={ours / place}")
    saved = parameters(load_checkpoint(ours).model)
    assert all(torch.equal(p, saved[name]) for name, p in parameters(model).items())


def test_training_goes_on_where_the_other_run_stopped(ours, tmp_path):
    settings = (f"init_from={ours}", "optim.lr=1e-9", "optim.ttt_lr=1e-9", "optim.gate_lr=1e-9")
    still = run(tmp_path / "still", *settings, "data.shuffle=false", "max_steps=1")
    cold = run(tmp_path / "cold", "data.shuffle=false", "max_steps=1")
    assert losses(still)[0] < losses(cold)[0]
    log = (still / "train.log").read_text()
    assert f"step 2 of {find_checkpoint(ours)} (lora.safetensors, ttt.safetensors)" in log
    restored = load_checkpoint(still)
    assert restored.manifest["step"] == 1
    assert restored.config["init_from"] == str(ours)


def test_lora_of_another_run_may_get_new_ttt_layers(tmp_path):
    lora = run(tmp_path / "lora", "mode=lora", "ttt=none")
    model = build(tmp_path, f"init_from={lora}")
    saved = {name: p for name, p in parameters(load_checkpoint(lora).model).items() if ".lora_" in name}
    live = {name.replace(".original_layer.", "."): p for name, p in parameters(model).items()}
    assert saved
    assert all(torch.equal(live[name], p) for name, p in saved.items())


@pytest.mark.parametrize("place", ["..", "."])
def test_a_moshi_finetune_checkpoint_gives_its_lora(theirs, plain_lora, tmp_path, place):
    model = build(tmp_path, f"init_from={theirs / place}", *RANK_3)
    live = {name.replace(".original_layer.", "."): p for name, p in parameters(model).items()}
    for name, parameter in parameters(plain_lora).items():
        assert torch.equal(live[name], parameter)


def test_a_moshi_finetune_checkpoint_means_the_same_model(theirs, plain_lora, random_codes, tmp_path):
    plain = ("mode=lora", "ttt=none")
    model = build(tmp_path, f"init_from={theirs}", *RANK_3, *plain).requires_grad_(True)
    codes = random_codes(1, 12)
    with torch.no_grad():
        assert torch.equal(model(codes).text_logits, plain_lora.eval()(codes).text_logits)
        assert not torch.equal(model(codes).text_logits, build(tmp_path, *plain)(codes).text_logits)


def test_a_full_moshi_finetune_checkpoint_gives_all_weights(tiny_base, tmp_path):
    model = load_moshi(tiny_base, "cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    folder = tmp_path / "consolidated"
    folder.mkdir()
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "consolidated.safetensors")
    (folder / "config.json").write_text("{}")
    live = {
        name.replace(".original_layer.", ".").replace(".frozen_W.", "."): p
        for name, p in parameters(build(tmp_path, f"init_from={folder}")).items()
    }
    assert all(torch.equal(live[name], p) for name, p in model.named_parameters())


def test_lora_and_ttt_over_a_fully_trained_model_restore_bit_for_bit(full, random_codes, tmp_path):
    parts = trained_parts(tmp_path / "run", f"init_from={full}")
    assert checkpoint_names(tmp_path / "run") == ["checkpoint_000002"]
    folder = find_checkpoint(tmp_path / "run")
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "consolidated.safetensors",
        "lora.safetensors",
        "ttt.safetensors",
    }
    trained = load_file(find_checkpoint(full) / "consolidated.safetensors")
    kept = load_file(folder / "consolidated.safetensors")
    assert kept.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in kept.items())

    restored = load_checkpoint(tmp_path / "run").model
    live = parameters(parts.model.requires_grad_(True))
    assert parameters(restored).keys() == live.keys()
    assert all(torch.equal(p, live[name]) for name, p in parameters(restored).items())
    codes = random_codes(1, 12)
    with torch.no_grad():
        assert torch.equal(restored(codes).text_logits, parts.model(codes).text_logits)


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["lora.rank=8"], "holds LoRA weights of rank 4 and scaling 2; set lora.enable=true lora.rank=4"),
        (["lora.scaling=1"], "holds LoRA weights of rank 4 and scaling 2; set lora.enable=true"),
        (["mode=ttt", "lora=none"], "holds LoRA weights of rank 4 .* set lora.enable=true"),
        (["mode=lora", "ttt=none"], "holds TTT layers; set ttt.enable=true to use them"),
        (["ttt.num_heads=2"], "the settings make it .* load it with the settings it was trained with"),
        (["ttt.ssm_layer=ttt_linear"], "ttt.safetensors.*load it with the settings it was trained with"),
        (["ttt.ttt_mlp_layers=3"], "ttt.safetensors.*load it with the settings it was trained with"),
        (["ttt.learned_token_scale=true"], "ttt.safetensors does not fit the settings: 2 tensors missing"),
        (["ttt.layers=all"], "ttt.safetensors does not fit the settings"),
        (["ttt.layers='1'"], "ttt.safetensors does not fit the settings"),
        (["ttt.layers='0,3'"], "ttt.safetensors does not fit the settings"),
    ],
)
def test_weights_that_would_not_all_be_used_are_refused(ours, tmp_path, overrides, match):
    refused(tmp_path, match, f"init_from={ours}", *overrides)


def test_moshi_finetunes_lora_of_another_rank_is_refused(theirs, tmp_path):
    match = "holds LoRA weights of rank 3 and scaling 1.5; set lora.enable=true lora.rank=3 lora.scaling=1.5"
    refused(tmp_path, match, f"init_from={theirs}", "lora.rank=4")


def test_moshi_finetunes_lora_that_lacks_a_factor_is_refused(theirs, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    state = load_file(theirs / "lora.safetensors")
    state.pop(next(iter(state)))
    save_file(state, folder / "lora.safetensors")
    (folder / "config.json").write_bytes((theirs / "config.json").read_bytes())
    refused(
        tmp_path,
        "lora.safetensors does not fit the settings: 1 tensors missing",
        f"init_from={folder}",
        *RANK_3,
    )


def test_places_without_weights_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, f"no checkpoint at {tmp_path}/empty", f"init_from={tmp_path}/empty")
    refused(tmp_path, f"init_from={tmp_path}/none is no folder", f"init_from={tmp_path}/none")
    (tmp_path / "empty/config.json").write_text("{}")
    refused(tmp_path, "holds neither lora.safetensors nor consolidated", f"init_from={tmp_path}/empty")


def test_a_checkpoint_that_was_changed_is_refused(tmp_path):
    weights = find_checkpoint(run(tmp_path / "other")) / "ttt.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    refused(tmp_path, "ttt.safetensors was changed after it was saved", f"init_from={tmp_path / 'other'}")
