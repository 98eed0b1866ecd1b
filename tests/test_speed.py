"""What a run logs about its speed, and the settings of speed."""

import time
from types import SimpleNamespace

import pytest
import torch
from training import CPU, tiny_config

from finetune import speed
from finetune.speed import PEAK_TFLOPS, Phases, flops_per_frame, peak_flops, speed_of_step
from moshi_ttt.integration import set_attention_context
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.parameters import set_trainable
from moshi_ttt.temporal import Running

GPU = torch.device("cuda", 0)


def test_phases_are_added_up_and_the_last_counts_to_the_next_step():
    phases = Phases(torch.device("cpu"))
    for name in ("forward", "backward", "forward", "backward", "optimizer"):
        phases.begin(name)
        time.sleep(0.01)
    first = phases.read()
    assert first["optimizer"] == 0
    assert min(first["forward"], first["backward"]) >= 0.02
    phases.begin("between steps")
    time.sleep(0.05)
    phases.begin("forward")
    second = phases.read()
    assert second["optimizer"] >= 0.01
    assert second["forward"] == second["backward"] == 0
    assert sum(phases.read().values()) == 0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_by_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(GPU, torch.bfloat16)
    assert peak == (None if expected is None else 1e12 * PEAK_TFLOPS[expected])
    assert peak_flops(GPU, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_rates_are_of_all_processes_and_mfu_of_one(build, monkeypatch):
    model = build()
    shapes = [torch.Size((2, 17, 50)), torch.Size((2, 17, 50))]
    assert speed_of_step(model, shapes, 4.0, CPU) == {
        "frames_per_s": 50.0,
        "tokens_per_s": 450.0,
        "step_sec": 4.0,
    }
    monkeypatch.setattr(speed, "peak_flops", lambda device, dtype: 1e12)
    two = SimpleNamespace(device=GPU, world_size=2)
    found = speed_of_step(model, shapes, 4.0, two)
    assert found["frames_per_s"] == 100.0
    assert found["mfu"] == pytest.approx(50 * flops_per_frame(model, 50) / 1e12)


def test_what_does_not_train_has_no_gradients_to_compute(build):
    model = build(lora=LoRAConfig(enable=True, rank=4), layers="3")
    counted = {}
    for mode in ("frozen", "ttt", "lora+ttt"):
        set_trainable(model, mode)
        counted[mode] = flops_per_frame(model, 100)
    assert counted["frozen"] < counted["ttt"] < counted["lora+ttt"]
    set_attention_context(model, 5, 5)
    assert flops_per_frame(model, 100) < counted["lora+ttt"]


def test_settings_reach_the_layers(tmp_path):
    settings = ("gradient_checkpointing=true", "checkpoint_layers=2", "compile=false")
    assert tiny_config(tmp_path, *settings).running == Running(recomputed=2, compiled=False)
    assert tiny_config(tmp_path).running == Running(recomputed=None, compiled=None)
    assert tiny_config(tmp_path, "compile=true").running.compiled is True


@pytest.mark.parametrize(
    "settings, message",
    [
        (("gradient_checkpointing=true", "checkpoint_layers=0"), "checkpoint_layers must be at least 1"),
        (("gradient_checkpointing=false", "checkpoint_layers=2"), "nothing is recomputed"),
    ],
)
def test_settings_that_cannot_work_are_errors(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, *settings)
