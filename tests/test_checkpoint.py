"""What is saved is what is loaded, whole and unchanged, or an error that names what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.checkpoint import (
    FORMAT_VERSION,
    _self_digest,
    find_checkpoint,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    saved_checkpoints,
    verify_files,
)
from moshi_ttt.config import TTTConfig
from moshi_ttt.integration import live_settings
from moshi_ttt.loading import ModelConfig, find_base
from moshi_ttt.lora import LoRAConfig

# The groups of parameters that each kind of training changes.
KINDS = {
    "lora+ttt": ("lora", "ttt", "gate"),
    "ttt": ("ttt", "gate"),
    "lora": ("lora",),
    "full": ("base", "ttt", "gate"),
    "full without TTT": ("base",),
}
EXPECTED_FILES = {
    "lora+ttt": {"lora.safetensors", "ttt.safetensors"},
    "ttt": {"ttt.safetensors"},
    "lora": {"lora.safetensors"},
    "full": {"ttt.safetensors", "consolidated.safetensors"},
    "full without TTT": {"consolidated.safetensors"},
}
COMMON_FILES = {"training_config.json", "config.json", "checkpoint.json"}


def settings_of(kind, dtype="float32", source="tiny"):
    return ModelSettings(
        ModelConfig(source),
        dtype,
        LoRAConfig(enable="lora" in kind, rank=4),
        TTTConfig(
            enable="ttt" in KINDS[kind],
            layers="1-2",
            mini_batch_size=4,
            gate="convex",
            gate_init=0.3,
            base_lr=2.0,
            ttt_layer_context=20,
            non_ttt_layer_context=30,
            learned_token_scale=True,
            scan_checkpoint_group_size=2,
        ),
    )


@pytest.fixture
def trained_model(perturb):
    """Builds a model whose parameters that `kind` trains are not the initial ones."""

    def trained_model(settings, kind):
        return perturb(build_model(settings, find_base(settings.model)), *KINDS[kind])

    return trained_model


def save(run, model, settings, step=1, kind="lora+ttt", **options):
    config = asdict(settings) | {"duration_sec": 10}  # the run's config holds more than the model's
    base = find_base(settings.model)
    return save_checkpoint(run, step, model, config, base, save_base="base" in KINDS[kind], **options)


@pytest.fixture
def saved(tmp_path, trained_model):
    """A run with one checkpoint: its model and consolidated folder."""
    settings = settings_of("lora+ttt")
    model = trained_model(settings, "lora+ttt")
    return model, save(tmp_path / "run", model, settings)


@torch.no_grad()
def assert_same_outputs(a, b):
    codes = torch.randint(0, 256, (1, 17, 9))
    out, expected = a(codes), b(codes)
    for name in ("logits", "text_logits"):
        torch.testing.assert_close(
            getattr(out, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_the_saved_one_to_the_last_bit(tmp_path, trained_model, kind, dtype):
    settings = settings_of(kind, dtype)
    model = trained_model(settings, kind)
    folder = save(tmp_path, model, settings, kind=kind)
    assert {path.name for path in folder.iterdir()} == COMMON_FILES | EXPECTED_FILES[kind]
    torch.manual_seed(1)  # what a load leaves fresh must not come out the same by chance
    loaded = load_checkpoint(folder)
    assert_same_outputs(loaded.model, model)
    assert live_settings(loaded.model) == live_settings(model)
    state, expected = loaded.model.state_dict(), model.state_dict()
    assert [(k, v.dtype) for k, v in state.items()] == [(k, v.dtype) for k, v in expected.items()]
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not loaded.model.training
    assert loaded.config == asdict(settings) | {"duration_sec": 10}
    assert ModelSettings.from_config(loaded.config) == settings


def test_what_was_trained_shows_in_the_outputs(trained_model):
    for kind in KINDS:
        torch.manual_seed(0)
        fresh = build_model(settings_of(kind), find_base(ModelConfig("tiny")))
        torch.manual_seed(0)
        trained = trained_model(settings_of(kind), kind)
        with pytest.raises(AssertionError):
            assert_same_outputs(fresh, trained)


def test_run_step_and_consolidated_folder_all_mean_the_checkpoint(tmp_path, saved):
    model, folder = saved
    run = tmp_path / "run"
    assert folder == run / "checkpoints/checkpoint_000001/consolidated"
    for path in (run, folder.parent, folder, str(run), f"{run}/"):
        assert find_checkpoint(path) == folder
        assert load_checkpoint(path).folder == folder


def test_a_run_means_its_last_step(tmp_path, saved):
    model, _ = saved
    for step in (20, 3, 1_000_000):
        save(tmp_path / "run", model, settings_of("lora+ttt"), step)
    assert find_checkpoint(tmp_path / "run").parent.name == "checkpoint_1000000"
    assert [path.name for path in saved_checkpoints(tmp_path / "run")] == [
        "checkpoint_000001",
        "checkpoint_000003",
        "checkpoint_000020",
        "checkpoint_1000000",
    ]


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path, saved, monkeypatch):
    model, _ = saved
    real = shutil.rmtree

    def killed_while_deleting(folder, **how):
        if how:  # what an earlier process left
            return real(folder, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moshi_ttt.checkpoint.shutil.rmtree", killed_while_deleting)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "run", model, settings_of("lora+ttt"), 2, keep=1)
    assert [path.name for path in saved_checkpoints(tmp_path / "run")] == ["checkpoint_000002"]
    remove_unfinished(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint_000002"]


def test_the_oldest_checkpoints_but_keep_are_deleted(tmp_path, saved):
    model, _ = saved
    for step in (2, 3, 4):
        save(tmp_path / "run", model, settings_of("lora+ttt"), step, keep=2)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "checkpoint_000003",
        "checkpoint_000004",
    ]
    load_checkpoint(tmp_path / "run")


def test_a_step_is_saved_once(tmp_path, saved):
    model, folder = saved
    with pytest.raises(ValueError, match="checkpoint_000001 exists; a step is saved once"):
        save(tmp_path / "run", model, settings_of("lora+ttt"))
    verify_files(folder)


@pytest.mark.parametrize("path", ["", "checkpoints", "nowhere"])
def test_a_path_without_a_checkpoint_is_an_error(tmp_path, path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint at .*expected a run"):
        load_checkpoint(tmp_path / path)


FILES = sorted(COMMON_FILES | EXPECTED_FILES["lora+ttt"])
LISTED = [name for name in FILES if name != "checkpoint.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error_that_names_it(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_checkpoint(folder)


def test_an_extra_file_is_an_error_that_names_it(saved):
    _, folder = saved
    (folder / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"extra files \['consolidated.safetensors'\]"):
        load_checkpoint(folder)


@pytest.mark.parametrize("bytes_lost", [1, 500])
@pytest.mark.parametrize("name", LISTED)
def test_a_truncated_file_is_an_error_that_names_it(saved, name, bytes_lost):
    _, folder = saved
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - bytes_lost)
    message = f"{name} has {size - bytes_lost} bytes, expected {size}: "
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("part_left", [0, 0.5, 0.99])
def test_a_truncated_manifest_is_an_error_that_names_it(saved, part_left):
    _, folder = saved
    manifest = folder / "checkpoint.json"
    os.truncate(manifest, int(part_left * manifest.stat().st_size))
    with pytest.raises(ValueError, match="checkpoint.json is damaged"):
        load_checkpoint(folder)


def flip(path, byte, bit):
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", LISTED)
def test_a_flipped_bit_is_an_error_that_names_the_file(saved, name, place):
    _, folder = saved
    flip(folder / name, int(place * (folder / name).stat().st_size), 2)
    with pytest.raises(ValueError, match=f"{name} was changed after it was saved"):
        load_checkpoint(folder)


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_an_error(saved):
    _, folder = saved
    path = folder / "checkpoint.json"
    content = path.read_bytes()
    assert len(content) > 1000
    for byte in range(len(content)):
        changed = bytearray(content)
        changed[byte] ^= 1 << byte * 3 % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{folder}"):
            verify_files(folder)
    path.write_bytes(content)
    verify_files(folder)


def test_a_newer_format_is_an_error_that_says_to_update(saved):
    _, folder = saved
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["self_sha256"]
    manifest["format_version"] = FORMAT_VERSION + 1
    manifest["self_sha256"] = _self_digest(manifest)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has checkpoint format 2, this release reads format 1"):
        load_checkpoint(folder)


@pytest.fixture
def on_a_folder(tiny_base, tmp_path, trained_model):
    """A checkpoint whose base model is a copy of the tiny model that can be changed."""
    folder = shutil.copytree(tiny_base.moshi_weights.parent, tmp_path / "base")
    settings = settings_of("ttt", source=str(folder))
    return folder, save(tmp_path / "run", trained_model(settings, "ttt"), settings)


def test_another_base_model_is_an_error_that_names_it(on_a_folder):
    base, checkpoint = on_a_folder
    load_checkpoint(checkpoint)
    state = load_file(base / "model.safetensors")
    state["text_emb.weight"][7, 7] += 1
    save_file(state, base / "model.safetensors")
    with pytest.raises(ValueError, match=f"trained on another base model: the moshi file of {base}"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name, part",
    [
        ("tokenizer-e351c8d8-checkpoint125.safetensors", "mimi"),
        ("tokenizer_spm_32k_3.model", "tokenizer"),
    ],
)
def test_another_mimi_or_tokenizer_is_an_error_that_names_it(on_a_folder, name, part):
    base, checkpoint = on_a_folder
    flip(base / name, (base / name).stat().st_size - 1, 0)
    with pytest.raises(ValueError, match=f"trained on another base model: the {part} file"):
        load_checkpoint(checkpoint)


def test_full_verification_reads_a_base_model_that_looks_unchanged(on_a_folder):
    base, checkpoint = on_a_folder
    weights = base / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    flip(weights, weights.stat().st_size - 1, 0)
    os.utime(weights, ns=times)
    load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="trained on another base model"):
        load_checkpoint(checkpoint, verify="full")
    with pytest.raises(ValueError, match="verify must be cached or full, got 'no'"):
        load_checkpoint(checkpoint, verify="no")


def change_training_config(folder, change):
    """Edit training_config.json and vouch for it anew, as a careless person with a script may."""
    config = json.loads((folder / "training_config.json").read_text())
    change(config)
    text = json.dumps(config)
    (folder / "training_config.json").write_text(text)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["self_sha256"]
    manifest["files"]["training_config.json"] = {
        "bytes": len(text),
        "sha256": sha256(text.encode()).hexdigest(),
    }
    manifest["self_sha256"] = _self_digest(manifest)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("ttt", "layers", "1", "does not fit the settings: 0 tensors missing .*unexpected .*layers.2"),
        ("ttt", "layers", "1-3", "does not fit the settings: .* tensors missing .*layers.3"),
        ("ttt", "ttt_mlp_layers", 3, "W2 has shape"),
        ("ttt", "num_heads", 2, "has shape"),
        ("ttt", "learned_token_scale", False, "unexpected .*token_scale_offset"),
        ("lora", "rank", 8, "lora_A.weight has shape"),
        ("lora", "enable", False, "holds LoRA weights; set lora.enable=true"),
        ("ttt", "speed", 3, r"unknown \['speed'\]"),
    ],
)
def test_weights_that_do_not_fit_the_settings_are_an_error(saved, section, key, value, message):
    _, folder = saved
    change_training_config(folder, lambda config: config[section].__setitem__(key, value))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("key", ["model", "param_dtype", "lora", "ttt"])
def test_a_training_config_without_a_section_is_an_error_that_names_it(saved, key):
    _, folder = saved
    change_training_config(folder, lambda config: config.pop(key))
    with pytest.raises(ValueError, match=f"the training config has no '{key}'"):
        load_checkpoint(folder)


def test_a_process_killed_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path, saved):
    model, folder = saved
    (tmp_path / "settings.json").write_text(json.dumps(asdict(settings_of("lora+ttt"))))
    shutil.move(tmp_path / "run", tmp_path / "run_000")
    script = Path(__file__).with_name("killed_while_saving.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=60)
    *killed, finished = sorted(tmp_path.glob("run_*"))[1:]
    assert len(killed) >= 15
    steps = [verify_files(find_checkpoint(run))["step"] for run in killed]
    # The new checkpoint counts from one moment on; until then the old one does.
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    assert any((run / "checkpoints/tmp.checkpoint_000002").is_dir() for run in killed)
    last_before = killed[steps.index(2) - 1]
    assert [path.name for path in saved_checkpoints(last_before)] == ["checkpoint_000001"]
    assert_same_outputs(load_checkpoint(last_before).model, model)
    assert load_checkpoint(killed[steps.index(2)]).manifest["step"] == 2
    # A run that goes on after it was killed saves the step again.
    save(last_before, model, settings_of("lora+ttt"), step=2, keep=1)
    assert [path.name for path in (last_before / "checkpoints").iterdir()] == ["checkpoint_000002"]
    assert [path.name for path in saved_checkpoints(finished)] == ["checkpoint_000002"]
