"""The plan of a run counts what the run really holds and does."""

import dataclasses
from functools import cache

import huggingface_hub.constants
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import TINY, compose_config, own_logging, tiny_config, trained_parts

from finetune import scoring
from finetune.config import to_typed
from finetune.loss import LossModel, LossWeights
from finetune.optimizer import Optimizer
from finetune.plan import (
    GIB,
    LiveBytes,
    Plan,
    PlanConfig,
    build_on_meta,
    main,
    make_plan,
    measure_step,
    plan_text,
)
from moshi_ttt.checkpoint import find_checkpoint
from moshi_ttt.integration import set_activation_checkpointing
from moshi_ttt.kernels.choice import forced
from moshi_ttt.parameters import named_groups, set_trainable

WEIGHTS = LossWeights(100.0, 0.5)
PLAIN = ("ttt=none", "mode=lora")
# Clips long enough for activations to outweigh gradients.
LONGER = ("duration_sec=3.2",)


@cache
def plan(*overrides, gpus=1):
    """The plan of the tiny config; several tests compare with the same ones."""
    return make_plan(tiny_config("-", *overrides), gpus)


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "mode, dtype",
    [("lora+ttt", "float32"), ("lora+ttt", "bfloat16"), ("ttt", "bfloat16"), ("full", "bfloat16")],
)
def test_weights_and_optimizer_are_as_big_as_planned(tmp_path, mode, dtype):
    settings = (f"mode={mode}", f"param_dtype={dtype}", *["lora=none"] * (mode == "full"))
    planned = plan(*settings)
    parts = trained_parts(tmp_path / "run", *settings)
    model = parts.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.trainable == sum(p.numel() for p in trainable)
    assert planned.weights == size(model.parameters())
    files = [path for path in find_checkpoint(tmp_path / "run").parent.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"consolidated", "resume"}
    # Names and shapes of the tensors, settings, sums: little even beside the tiny model.
    assert sum(path.stat().st_size for path in files) == pytest.approx(planned.checkpoint, rel=0.05)

    optimizer = Optimizer(model, tiny_config(tmp_path / "x", *settings).optim, 2)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [
        value for state in optimizer.adamw.state.values() for name, value in state.items() if name != "step"
    ]
    masters = list(optimizer.masters.values())
    # Gradients of the masters are wanted during the update only: kept, they would lie beside the activations.
    gradients = [master.grad for master in masters if master.grad is not None]
    assert planned.optimizer == size(moments) + size(masters) + size(gradients)


@pytest.mark.parametrize(
    "checkpointing, overrides",
    [
        ("false", PLAIN),
        ("true", PLAIN),
        ("false", ("ttt.ttt_mlp_layers=3", "ttt.scan_checkpoint_group_size=0")),
        ("true", ()),
    ],
)
def test_the_peak_on_meta_is_the_peak_of_real_tensors(checkpointing, overrides, tmp_path):
    # A CPU keeps nothing for the bound where nothing is outside; a GPU does not ask, nor does the plan.
    settings = (*overrides, "ttt.max_inner_change=null", f"gradient_checkpointing={checkpointing}")
    meta = build_on_meta(tiny_config(tmp_path / "run", *settings))
    codes = torch.randint(0, 256, (2, 17, 16))
    planned, planned_flops = measure_step(LossModel(meta), codes.to("meta"), WEIGHTS)
    real = meta.to_empty(device="cpu")
    for tensor in (*real.parameters(), *real.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    # Meta tensors take the plain attention and inner loop, where a CPU would take the fused ones.
    with sdpa_kernel(SDPBackend.MATH), forced("eager"):
        peak, flops = measure_step(LossModel(real), codes, WEIGHTS)
    assert peak == planned
    assert flops == planned_flops


def test_live_bytes_are_counted_as_worked_out_by_hand():
    memory = LiveBytes()
    given = torch.zeros(1000)
    memory.ignore([given])
    with memory:
        a = given + 1  # 4000
        b = a * 2  # 8000
        view = b[:10]  # the same storage
        del a, b  # 4000: the view keeps it
        assert memory.live == 4000
        c = view.exp()  # 4040
        given.add_(1)
        assert memory.live == 4040
        del view, c
    assert memory.live == 0
    assert memory.peak == 8000


def test_activation_checkpointing_lowers_the_peak_and_costs_compute(monkeypatch):
    # Of the tiny model the depformer is the larger part: small parts of it leave the peak to the layers.
    monkeypatch.setattr(scoring, "DEPFORMER_FRAMES", 8)
    longest = "duration_sec=12.8"
    configs = (tiny_config("-", f"gradient_checkpointing={on}", longest, *PLAIN) for on in ("false", "true"))
    keep, recompute = (make_plan(config, 1) for config in configs)
    assert recompute.step_peak < 0.7 * keep.step_peak
    assert recompute.flops_per_step > 1.1 * keep.flops_per_step


def test_layers_that_keep_their_products_cost_memory_and_save_compute():
    # Two clips of 160 frames: activations outweigh all else.
    overrides = ("gradient_checkpointing=true", "duration_sec=12.8", *PLAIN)
    all_layers, one, none = (
        plan(*overrides),
        plan(*overrides, "checkpoint_layers=1"),
        plan("gradient_checkpointing=false", "duration_sec=12.8", *PLAIN),
    )
    assert all_layers.flops_per_step > one.flops_per_step > none.flops_per_step
    assert all_layers.step_peak < one.step_peak < none.step_peak
    assert plan(*overrides, "checkpoint_layers=4") == all_layers


@pytest.mark.parametrize("enable", [True, False])
def test_activation_checkpointing_is_of_both_transformers(build, enable):
    model = build()
    set_activation_checkpointing(model, enable)
    assert (model.transformer.checkpointing, model.depformer.checkpointing) == (enable, enable)


def test_twice_the_clips_need_twice_the_activations():
    one, two, four = (plan(f"batch_size={clips}", *LONGER, *PLAIN) for clips in (1, 2, 4))
    assert 1.7 < (four.step_peak - two.step_peak) / (two.step_peak - one.step_peak) < 2.3
    assert two.step_peak > 1.5 * one.step_peak
    assert two.flops_per_step == pytest.approx(2 * one.flops_per_step, rel=0.01)
    assert two.weights == one.weights


def test_ttt_costs_compute_and_memory():
    without, hybrid = plan(*PLAIN), plan()
    assert hybrid.flops_per_step > without.flops_per_step
    assert hybrid.step_peak > without.step_peak
    assert hybrid.parameters > without.parameters


def test_micro_batches_cost_compute_and_at_most_the_gradients():
    one, two, four = plan(), plan("num_microbatches=2"), plan("num_microbatches=4")
    assert four.flops_per_step == 4 * one.flops_per_step
    assert four.frames_per_step == 4 * one.frames_per_step == 4 * 2 * 16
    # The gradients of the first micro-batch lie beside the activations of the others.
    assert one.step_peak < two.step_peak == four.step_peak <= one.step_peak + 4 * one.trainable


def test_gpus_share_the_data_and_the_model():
    one, whole, eight, hybrid = (
        plan(gpus=1),
        plan("fsdp.shard=none", gpus=8),
        plan(gpus=8),
        plan("fsdp.shard=hybrid", "fsdp.replicate=4", gpus=8),
    )
    random_numbers = 7 * torch.get_rng_state().nbytes
    assert whole == dataclasses.replace(
        one, frames_per_step=8 * one.frames_per_step, checkpoint=one.checkpoint + random_numbers
    )
    for shards, split in ((8, eight), (2, hybrid)):
        assert 0 <= shards * split.weights - one.weights < shards
        assert 0 <= shards * split.optimizer - one.optimizer < shards
        # A layer of the tiny model and its embeddings are the largest of 15 units.
        assert one.weights / 15 < split.gathered < one.weights
        # Heads that are split run their modules once: no parts, and Moshi's own order of steps.
        assert split.step_peak != whole.step_peak
        rest = {"weights": 0, "optimizer": 0, "gathered": 0, "step_peak": 0, "flops_per_step": 0}
        assert dataclasses.replace(split, **rest) == dataclasses.replace(whole, **rest)


def test_what_does_not_train_needs_no_optimizer():
    frozen = plan("mode=frozen")
    assert (frozen.trainable, frozen.optimizer, frozen.step_peak) == (0, 0, 0)
    assert frozen.memory == frozen.weights > 0


def made_up(gib):
    return Plan(10**9, 10**6, weights=gib * GIB, optimizer=0, step_peak=0, flops_per_step=10**15, **REST)


REST = {"checkpoint": GIB, "frames_per_step": 1250}


def plan_config(*overrides):
    tiny = (*TINY, "run_dir=-", *overrides)
    return to_typed(compose_config(*tiny, name="plan"))


def test_a_plan_says_whether_it_fits():
    config = plan_config("gpu=l4", "gpus=2")
    assert isinstance(config, PlanConfig)
    too_big = plan_text(made_up(30), config)
    assert "memory per GPU     30.0 GiB of 24: DOES NOT FIT" in too_big
    assert "DOES NOT FIT" not in plan_text(made_up(10), config)
    assert "10.0 GiB of 24: fits" in plan_text(made_up(10), config)
    # A GPU is full before its last byte: fragments and the context take some.
    assert "DOES NOT FIT" in plan_text(made_up(23), config)


def test_a_plan_says_what_it_assumes():
    text = plan_text(
        made_up(10),
        plan_config("gpu=l4", "gpus=2", "mfu=0.5", "max_steps=3600", "checkpoint.every_steps=100"),
    )
    assert text.startswith("Plan for 2 x l4, 1.28 s x 2 clips")
    # 1000 TFLOP at half of 121 TFLOP/s are 16.53 s.
    assert "16.53 s at an assumed 50% of 121 TFLOP/s" in text
    assert "16.5 h for 3,600 steps" in text
    assert "100 h of audio" in text
    assert "4.00 GiB: 3 kept checkpoints and one being written" in text
    assert "The model is split over 2 GPUs." in text
    assert "Every GPU holds the whole model." in plan_text(made_up(10), plan_config())


def test_the_disk_is_that_of_the_checkpoints_there_will_be():
    one = plan_text(made_up(10), plan_config("gpu=l4", "checkpoint.every_steps=0", "checkpoint.keep=3"))
    assert "disk               2.00 GiB" in one
    every = ("checkpoint.keep=null", "checkpoint.every_steps=2")
    all_of_them = plan_text(made_up(10), plan_config("gpu=l4", "max_steps=5", *every))
    assert "disk               4.00 GiB" in all_of_them


def test_a_warm_start_from_all_weights_is_planned_with_them(tmp_path):
    first = ("mode=full", "lora=none", "ttt=none")
    trained_parts(tmp_path / "full", *first)
    planned = plan(f"init_from={tmp_path / 'full'}")
    assert planned.checkpoint > planned.weights / 2


def test_an_unknown_gpu_is_an_error_that_lists_the_known():
    with own_logging(), pytest.raises(ValueError, match="gpu must be one of h100, h200, .*; got 'tpu'"):
        main(compose_config(*TINY, "gpu=tpu", name="plan"))


def test_the_command_plans_without_data_or_a_run_directory(capsys):
    with own_logging():
        main(compose_config(*TINY, "data.train=-", "gpu=l4", name="plan"))
    printed = capsys.readouterr().out
    assert "Plan for 1 x l4" in printed
    assert "fits" in printed


def test_moshi_7b_is_planned_without_its_weights(tmp_path, monkeypatch):
    # A repository that cannot be reached is taken for Moshi 7B, whose size is known: 7.687 B parameters.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = to_typed(compose_config("experiment=moshi_7b_ttt", "data.train=-", "run_dir=-"))
    with pytest.warns(UserWarning, match="Assuming this is a Moshi 7B"):
        model = build_on_meta(config)
    sizes = dict.fromkeys(("base", "lora", "ttt", "gate"), 0)
    for group, _, parameter in named_groups(model):
        assert parameter.is_meta
        sizes[group] += parameter.numel()
    assert sizes["base"] == pytest.approx(7.687e9, rel=1e-4)
    # TTT-MLP of 8 heads in 16 layers: four projections of 4096 x 1024 each, and inner weights.
    projections = 16 * 4 * 4096 * 1024
    assert projections < sizes["ttt"] < 1.1 * projections
    assert sizes["gate"] == 16 * 4096


def test_measuring_leaves_the_gradients_of_a_step(build, random_codes):
    model = build()
    set_trainable(model, "ttt")
    set_activation_checkpointing(model, False)
    peak, flops = measure_step(LossModel(model.train()), random_codes(1, 8), WEIGHTS)
    assert peak > 0
    assert flops > 0
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
