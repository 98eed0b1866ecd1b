"""Exported weights compute what the checkpoint does, in the moshi package or here; TTT is refused there."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import soundfile
import torch
import yaml
from hub import local_hub
from lora_models import PLAIN, TTT, logits, settings_of
from moshi.models.loaders import CheckpointInfo
from training import ROOT, dialogue

from inference.export import ExportConfig, export, public_config
from moshi_ttt.checkpoint import load_checkpoint, save_checkpoint
from moshi_ttt.lora import lora_modules, merge_lora

TRAINING = {
    "mode": "lora",
    "run_dir": "/home/somebody/runs/1",
    "optim": {"lr": 1e-3},
    "data": {"train": "/data/secret.jsonl", "keep_main_only": True},
    "wandb": {"entity": "somebody"},
    "max_steps": 3,
}


@pytest.fixture
def saved(tiny_base, trained, tmp_path):
    """Saves a checkpoint that is not at its initial values; returns its model and folder."""

    def saved(ttt):
        settings = settings_of(ttt=ttt)
        model = trained(settings)
        folder = save_checkpoint(
            tmp_path / "run", 3, model, TRAINING | asdict(settings), tiny_base, save_base=False
        )
        return model, folder

    return saved


def plain_moshi(folder):
    """What the moshi package makes of an exported folder."""
    config = json.loads((folder / "config.json").read_text())
    info = CheckpointInfo.from_hf_repo(
        "unused/because-every-path-is-given",
        moshi_weights=folder / config["moshi_name"],
        mimi_weights=folder / config["mimi_name"],
        tokenizer=folder / config["tokenizer_name"],
        config_path=folder / "config.json",
        mimi_config_path=folder / "mimi_config.json",
    )
    return info, info.get_moshi(dtype=torch.float32)


def test_merging_changes_no_function_and_rounds_once(tiny_base, trained):
    model = trained(settings_of(ttt=TTT))
    before, count = logits(model), len(lora_modules(model))
    weights = {name: lora.merge_weight() for name, lora in lora_modules(model)}
    assert merge_lora(model) == count > 50
    assert lora_modules(model) == []
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=0, atol=1e-6)
    half = trained(replace(settings_of(), param_dtype="bfloat16"))
    name, lora = lora_modules(half)[0]
    exact = lora.frozen_W.weight.double() + 3 * lora.lora_B.weight.double() @ lora.lora_A.weight.double()
    merge_lora(half)
    assert torch.equal(half.get_submodule(name).weight, exact.bfloat16())


def test_without_ttt_it_is_a_plain_moshi(saved, tmp_path):
    model, folder = saved(PLAIN)
    output = export(ExportConfig(str(tmp_path / "out"), checkpoint=str(folder)))
    info, theirs = plain_moshi(output)
    assert lora_modules(theirs) == []
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=2e-5)
    assert info.get_mimi().frame_rate == 12.5
    assert info.get_text_tokenizer().get_piece_size() > 10
    # And a base model for us.
    names = {path.name for path in output.iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} < names


def command(hub, *arguments):
    """Run a command of Python that reaches `hub` as the hub."""
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_abc"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_moshis_own_command_answers_with_an_export(saved, tmp_path):
    _, folder = saved(PLAIN)
    output = export(ExportConfig(str(tmp_path / "out"), checkpoint=str(folder)))
    soundfile.write(tmp_path / "in.wav", dialogue(4)[14400:38400, 1], 24000)
    with local_hub() as hub:
        hub.files = {path.name: path.read_bytes() for path in output.iterdir()}
        paths = (tmp_path / "in.wav", tmp_path / "a.wav")
        done = command(hub, "-m", "moshi.run_inference", "--device", "cpu", "--hf-repo", "org/ours", *paths)
    assert done.returncode == 0, done.stderr
    # It writes an answer for each row of its batch of eight.
    assert len(soundfile.read(tmp_path / "a-0.wav")[0]) == 12 * 1920


def test_the_moshi_package_says_that_a_ttt_checkpoint_is_none_of_its_own(saved, tiny_base):
    _, folder = saved(TTT)
    info = CheckpointInfo.from_hf_repo(
        "unused/because-every-path-is-given",
        moshi_weights=tiny_base.moshi_weights,
        mimi_weights=tiny_base.mimi_weights,
        tokenizer=tiny_base.tokenizer,
        config_path=folder / "config.json",
        mimi_config_path=tiny_base.moshi_weights.parent / "mimi_config.json",
        lora_weights=folder / "lora.safetensors",
    )
    with pytest.raises(
        TypeError, match="this model has TTT layers: run it with moshi-ttt, python -m inference"
    ):
        info.get_moshi()


def test_with_ttt_it_is_a_checkpoint_of_ours(saved, tmp_path):
    model, folder = saved(TTT)
    output = export(ExportConfig(str(tmp_path / "out"), checkpoint=str(folder)))
    loaded = load_checkpoint(output)
    assert lora_modules(loaded.model) == []
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=2e-5)
    assert loaded.manifest["step"] == 3
    assert asdict(TTT) == loaded.config["ttt"]


@pytest.mark.parametrize("ttt", [PLAIN, TTT], ids=["plain", "ttt"])
def test_the_card_says_what_it_is_and_nothing_of_the_machine(saved, tmp_path, ttt):
    _, folder = saved(ttt)
    output = export(ExportConfig(str(tmp_path / "out"), checkpoint=str(folder)))
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert ("test-time-training" in front["tags"]) == ttt.enable
    assert "| trained_lora.rank | 4 |" in card
    assert "(3 steps)" in card
    published = "".join(path.read_text() for path in output.rglob("*") if path.suffix in (".md", ".json"))
    assert not [word for word in ("somebody", "secret", str(tmp_path)) if word in published]


def test_what_is_published_is_chosen_by_name():
    assert set(public_config(TRAINING | {"lora": {}, "unheard": "/of"}, None)) == {
        *("mode", "optim", "data", "max_steps", "lora", "trained_lora"),
    }


def test_pushed_and_fetched_it_is_the_same(saved, tmp_path):
    model, folder = saved(TTT)
    with local_hub() as hub:
        there = f"output={tmp_path / 'out'}"
        refused = command(hub, "-m", "inference.export", f"checkpoint={folder}", there, "push=org/name")
        assert "name the hub repository with the same files as base=ORG/NAME" in refused.stderr
        assert not hub.created
        export(ExportConfig(str(tmp_path / "out"), checkpoint=str(folder)))
        code = (
            "import sys, inference.export as e, pathlib as p; e.push(p.Path(sys.argv[1]), 'org/name', True)"
        )
        pushed = command(hub, "-c", code, tmp_path / "out")
        assert pushed.returncode == 0, pushed.stderr
        assert hub.created[0]["private"]
        assert hub.tokens == {"Bearer hf_abc"}
        assert "hf_abc" not in pushed.stdout + pushed.stderr
        assert set(hub.files) == {
            "README.md",
            *(f"consolidated/{name}" for name in ("training_config.json", "config.json", "checkpoint.json")),
            *("consolidated/consolidated.safetensors", "consolidated/ttt.safetensors"),
        }
        fetched = command(hub, "-m", "inference.export", "fetch=org/name", f"output={tmp_path / 'back'}")
        assert fetched.returncode == 0, fetched.stderr
        assert torch.equal(
            logits(load_checkpoint(tmp_path / "back").model), logits(load_checkpoint(tmp_path / "out").model)
        )
        hub.files["consolidated/ttt.safetensors"] = hub.files["consolidated/ttt.safetensors"][:-1] + b"\x07"
        spoilt = command(hub, "-m", "inference.export", "fetch=org/name", f"output={tmp_path / 'spoilt'}")
        assert "ttt.safetensors was changed after it was saved" in spoilt.stderr


@pytest.mark.parametrize(
    "config, error",
    [
        (ExportConfig("o"), "give either checkpoint=RUN to export or fetch=ORG/NAME"),
        (ExportConfig("o", checkpoint="a", fetch="b"), "give either checkpoint=RUN"),
        (ExportConfig("o", fetch="b", push="c"), "fetch and push exclude each other"),
        (ExportConfig(str(ROOT), checkpoint="a"), "exists; choose another output"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, error):
    with pytest.raises(ValueError, match=error):
        export(config)
