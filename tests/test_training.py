"""Training learns, repeats itself exactly, leaves alone what it should, and stops at NaN."""

import json
import math

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn
from training import (
    CPU,
    SAMPLE,
    checkpoint_names,
    compose_config,
    dialogue,
    losses,
    one_step,
    own_logging,
    records,
    run,
    tiny_config,
    train_here,
    trained_parts,
    write_prompt,
    write_recording,
)

from finetune.config import OptimConfig, to_typed
from finetune.data.clips import cut_clips
from finetune.data.manifest import read_manifest
from finetune.loss import LossWeights, loss_sums, weighted_targets
from finetune.optimizer import Optimizer
from finetune.run_dir import Metrics
from finetune.train import build_parts, train
from finetune.trainer import NonFiniteLossError, Trainer
from finetune.validation import validation_loss
from moshi_ttt.lora import LoRAConfig
from moshi_ttt.parameters import named_groups, set_trainable

TIMING = {"frames_per_s", "tokens_per_s", "step_sec", "data_sec"} | {
    f"{phase}_sec" for phase in ("forward", "backward", "optimizer")
}


def without_timing(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def test_the_demo_learns_the_sample_by_heart(tmp_path):
    few_steps = (
        "log_every=1",
        "max_steps=16",
        "checkpoint.every_steps=0",
        "eval.prompt=null",
        "data.valid=null",
    )
    paths = (f"run_dir={tmp_path / 'run'}", f"data.train={SAMPLE / 'train.jsonl'}")
    learned = losses(
        train_here(to_typed(compose_config("experiment=demo", *paths, *few_steps, "device=cpu")))
    )
    assert learned[0] > 11  # near chance, which is log(352) + log(256)
    assert max(learned[-3:]) < learned[0] / 2


@pytest.mark.parametrize(
    "mode, lora, lr", [("lora", "rank128", 3e-2), ("ttt", "none", 3e-3), ("full", "none", 3e-3)]
)
def test_every_mode_learns(tmp_path, mode, lora, lr):
    # Two clips over and over: enough to see that the loss falls, mode by mode.
    data = write_recording(tmp_path / "data", dialogue(1)[144000:205440])
    settings = [f"mode={mode}", f"lora={lora}", f"optim.lr={lr}", "max_steps=24", f"data.train={data}"]
    if mode == "lora":
        settings += ["ttt=none"]
    learned = losses(run(tmp_path / "run", *settings, "data.valid=null"))
    assert learned[-1] < 0.8 * learned[0]


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(tmp_path):
    settings = ("max_steps=5", "eval.every_steps=2", "eval.max_clips=2")
    runs = [run(tmp_path / name, *settings, f"seed={seed}") for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, second, other = map(without_timing, runs)
    assert len(first) == 5 + 3 + 2  # steps, evaluations, diagnostics of two layers in the first step
    assert first == second
    assert losses(runs[0]) != losses(runs[2])
    assert first[0].keys() == other[0].keys()
    weights = [load_file(r / "checkpoints/checkpoint_000005/consolidated/ttt.safetensors") for r in runs[:2]]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("gradient_checkpointing", ["false", "true"])
def test_evaluating_changes_nothing_in_training(tmp_path, gradient_checkpointing):
    prompt = write_prompt(tmp_path / "prompt.wav", 19200)
    common = ("max_steps=4", "eval.max_clips=2", f"gradient_checkpointing={gradient_checkpointing}")
    never = run(tmp_path / "never", *common, "eval.every_steps=0", f"eval.prompt={prompt}")
    always = run(tmp_path / "always", *common, "eval.every_steps=1", f"eval.prompt={prompt}")
    assert losses(never) == losses(always)
    assert [record["step"] for record in records(always, "valid")] == [1, 2, 3, 4]
    assert records(never, "valid") == []
    assert not (never / "answers").exists()


def test_the_validation_loss_is_a_function_of_the_weights(tmp_path):
    config = tiny_config(tmp_path / "run", "batch_size=4")
    clips = cut_clips(read_manifest(config.data.valid), 1.28)
    parts = build_parts(config, clips, CPU)
    weights = LossWeights(100.0, 0.5)
    parts.model.train()
    arguments = (parts.loss_model, parts.encoder, clips)
    first = validation_loss(*arguments, 4, weights, CPU)
    assert parts.model.training  # as it was before
    assert validation_loss(*arguments, 4, weights, CPU) == first
    # The weighted mean over all targets, so the batch size does not enter.
    assert validation_loss(*arguments, 1, weights, CPU) == pytest.approx(first, rel=1e-5)
    with torch.no_grad():
        codes = parts.encoder.encode(clips).codes
        targets = weighted_targets(parts.model, codes, weights)
        expected = loss_sums(parts.model(codes), targets).double() / targets.totals()
    assert [first["text_loss"], first["audio_loss"]] == pytest.approx(expected.tolist(), rel=1e-5)
    assert first["loss"] == first["text_loss"] + first["audio_loss"]
    assert first["perplexity"] == math.exp(first["loss"])
    with torch.no_grad():
        parts.model.text_linear.frozen_W.weight.mul_(1.1)
    changed = validation_loss(*arguments, 4, weights, CPU)
    assert changed["text_loss"] != first["text_loss"]
    assert changed["audio_loss"] == first["audio_loss"]


def test_mode_frozen_measures_and_leaves_the_model_alone(tmp_path):
    prompt = write_prompt(tmp_path / "prompt.wav")
    config = tiny_config(tmp_path / "run", "mode=frozen", "lora=none", f"eval.prompt={prompt}")
    with own_logging():
        train(config, CPU)
    run_dir = tmp_path / "run"
    (measured,) = records(run_dir, "valid")
    assert measured["step"] == 0
    assert math.isfinite(measured["loss"])
    assert records(run_dir, "train") == []
    assert not (run_dir / "checkpoints").exists()
    assert (run_dir / "answers/step_000000.wav").is_file()
    # The same loss as the untouched model's, built afresh from the same seed.
    clips = cut_clips(read_manifest(config.data.valid), 1.28)
    parts = build_parts(config, clips, CPU)
    assert not any(p.requires_grad for p in parts.model.parameters())
    before = {name: p.clone() for name, p in parts.model.named_parameters()}
    fresh = Trainer(config, parts, iter(()), CPU, tmp_path, None).evaluate()
    assert fresh == {name: measured[name] for name in fresh}
    assert all(torch.equal(p, before[name]) for name, p in parts.model.named_parameters())


def test_a_run_that_measures_nothing_is_a_run(tmp_path):
    run_dir = run(tmp_path / "run", "mode=frozen", "data.valid=null")
    assert (run_dir / "metrics.jsonl").read_text() == ""


def test_metrics_say_what_a_step_did(tmp_path):
    run_dir = run(tmp_path / "run", "max_steps=4", "log_every=3", "eval.every_steps=4", "optim.lr=2e-3")
    steps = records(run_dir, "train")
    assert [record["step"] for record in steps] == [1, 3, 4]  # and always the first and the last
    for record in steps:
        groups = {"lr_lora", "lr_ttt", "lr_gate"}
        values = {"loss", "text_loss", "audio_loss", "grad_norm"}
        assert record.keys() == {"step", "split"} | values | groups | TIMING
        assert record["loss"] == record["text_loss"] + record["audio_loss"]
        assert record["frames_per_s"] == pytest.approx(2 * 16 / record["step_sec"])
        assert record["tokens_per_s"] == pytest.approx(9 * record["frames_per_s"])
        assert record["data_sec"] + record["forward_sec"] + record["backward_sec"] <= record["step_sec"]
        assert min(record["forward_sec"], record["backward_sec"]) > 0
    (valid,) = records(run_dir, "valid")
    assert valid.keys() == {"step", "split", "loss", "text_loss", "audio_loss", "perplexity"}
    log = (run_dir / "train.log").read_text()
    assert "Set attention context: TTT layers=25 (2 layers), Non-TTT=50 (2 layers)" in log
    assert "step 4/4 loss" in log
    assert (run_dir / "config.yaml").is_file()


def test_answers_are_as_long_as_the_prompt(tmp_path):
    prompt = write_prompt(tmp_path / "prompt.wav", 30001)
    run_dir = run(tmp_path / "run", "eval.every_steps=1", f"eval.prompt={prompt}", "data.valid=null")
    for step in (1, 2):
        info = soundfile.info(run_dir / f"answers/step_{step:06d}.wav")
        assert (info.frames, info.samplerate, info.channels) == (30001, 24000, 1)
        content = json.loads((run_dir / f"answers/step_{step:06d}.json").read_text())
        assert content["text"] == " ".join(word["text"] for word in content["words"])


def test_old_checkpoints_make_room_for_new_ones(tmp_path):
    run_dir = run(tmp_path / "run", "max_steps=5", "checkpoint.every_steps=1", "checkpoint.keep=2")
    assert checkpoint_names(run_dir) == ["checkpoint_000004", "checkpoint_000005"]


def test_all_checkpoints_stay_where_keep_is_null(tmp_path):
    run_dir = run(tmp_path / "run", "max_steps=5", "checkpoint.every_steps=2", "checkpoint.keep=null")
    assert checkpoint_names(run_dir) == [f"checkpoint_{step:06d}" for step in (2, 4, 5)]


@pytest.mark.parametrize("mode", ["lora+ttt", "full"])
def test_gradient_checkpointing_changes_no_gradient(random_codes, tmp_path, mode):
    codes = [random_codes(2, 20)]
    lora = ["lora=none"] if mode == "full" else []
    (kept, kept_gradients), (again, again_gradients) = [
        one_step(tmp_path / on, codes, f"mode={mode}", f"gradient_checkpointing={on}", *lora)
        for on in ("false", "true")
    ]
    assert kept["loss"] == again["loss"]
    assert kept_gradients.keys() == again_gradients.keys()
    assert all(torch.equal(kept_gradients[name], gradient) for name, gradient in again_gradients.items())


@pytest.mark.parametrize("on", [True, False])
def test_gradient_checkpointing_is_what_the_config_says(tmp_path, on):
    model = trained_parts(tmp_path / "run", f"gradient_checkpointing={str(on).lower()}", "max_steps=1").model
    assert (model.transformer.checkpointing, model.depformer.checkpointing) == (on, on)


def test_bfloat16_trains_with_float32_inner_weights(tmp_path):
    run_dir = run(tmp_path / "run", "param_dtype=bfloat16", "max_steps=4", "gradient_checkpointing=true")
    learned = losses(run_dir)
    assert learned[-1] < learned[0]
    folder = run_dir / "checkpoints/checkpoint_000004/consolidated"
    dtypes = {name: tensor.dtype for name, tensor in load_file(folder / "ttt.safetensors").items()}
    assert dtypes["transformer.layers.1.seq_modeling_block.ttt_layer.ttt.W1"] == torch.float32
    assert dtypes["transformer.layers.1.seq_modeling_block.gate.alpha"] == torch.float32
    assert dtypes["transformer.layers.1.seq_modeling_block.ttt_layer.ttt.wq.weight"] == torch.bfloat16


def test_bfloat16_parameters_keep_updates_smaller_than_their_rounding(build):
    model = build("bfloat16", lora=LoRAConfig(enable=True, rank=4))
    set_trainable(model, "lora")
    lr, steps = 1e-5, 100
    optimizer = Optimizer(model, OptimConfig(lr=lr, weight_decay=0.0, pct_start=0.5), steps)
    factors = [p for group, name, p in named_groups(model) if name.endswith("lora_A.weight")]
    assert all(p.dtype == torch.bfloat16 for p in factors)
    alone = [p.detach().clone() for p in factors]
    before = torch.cat([p.detach().float().flatten() for p in factors])
    walked = 0.0
    for _ in range(steps):
        rate = optimizer.learning_rates()["lora"]
        walked += rate
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        for parameter in alone:
            parameter.sub_(rate)  # Adam's update for a constant gradient, added to bfloat16 itself
        optimizer.step()
    moved, lost = (
        float((before - torch.cat([p.detach().float().flatten() for p in after])).mean())
        for after in (factors, alone)
    )
    assert moved == pytest.approx(walked, rel=0.05)
    assert lost < 0.5 * walked


def test_each_group_has_its_rates_and_decay(build):
    rates = OptimConfig(
        lr=1e-3, ttt_lr=2e-3, gate_lr=4e-3, weight_decay=0.1, ttt_weight_decay=0.01, pct_start=0.5
    )
    model = build(lora=LoRAConfig(enable=True, rank=4))
    set_trainable(model, "lora+ttt")
    optimizer = Optimizer(model, rates, 10)
    peaks = dict.fromkeys(("lora", "ttt", "gate"), 0.0)
    for _ in range(10):
        for name, rate in optimizer.learning_rates().items():
            peaks[name] = max(peaks[name], rate)
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert peaks == pytest.approx({"lora": 1e-3, "ttt": 2e-3, "gate": 4e-3})
    decays = {
        name: group["weight_decay"]
        for name, group in zip(optimizer.groups, optimizer.adamw.param_groups, strict=True)
    }
    assert decays == {"lora": 0.1, "ttt": 0.01, "gate": 0.0}


def test_the_rates_of_the_config_reach_the_metrics(tmp_path):
    rates = ("optim.lr=1e-3", "optim.ttt_lr=2e-3", "optim.gate_lr=4e-3", "optim.pct_start=0.4")
    steps = records(run(tmp_path / "run", "max_steps=5", *rates), "train")
    # The first 40 % of the steps rise: OneCycle's peak is the step before its end.
    peak = max(steps, key=lambda record: record["lr_lora"])
    assert peak["step"] == 2
    assert [peak[f"lr_{group}"] for group in ("lora", "ttt", "gate")] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert steps[-1]["lr_lora"] < 1e-6


@pytest.mark.parametrize("max_steps, pct_start", [(1, 0.05), (10, 0.1), (20, 0.05), (3, 0.0)])
def test_any_number_of_steps_has_a_schedule(build, max_steps, pct_start):
    # OneCycle divides by the length of its first phase, which is 0 where max_steps x pct_start is 1.
    model = build()
    set_trainable(model, "ttt")
    optimizer = Optimizer(model, OptimConfig(pct_start=pct_start), max_steps)
    for _ in range(max_steps):
        assert all(math.isfinite(rate) for rate in optimizer.learning_rates().values())
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def test_gradients_are_scaled_down_to_the_norm(build):
    model = build()
    set_trainable(model, "ttt")
    optimizer = Optimizer(model, OptimConfig(max_norm=2.0), 2)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in optimizer.parameters)
    assert float(optimizer.clip()) == pytest.approx(math.sqrt(count), rel=1e-5)
    after = nn.utils.get_total_norm([p.grad for p in optimizer.parameters])
    assert float(after) == pytest.approx(2.0, rel=1e-4)


def test_a_nan_stops_the_run_and_says_where(tmp_path):
    config = tiny_config(tmp_path / "run", "max_steps=4", "checkpoint.every_steps=1")
    parts = build_parts(config, [], CPU)
    clips = cut_clips(read_manifest(config.data.train), 1.28)
    config_dir = tmp_path / "run"
    config_dir.mkdir()

    def batches():
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    parts.model.text_linear.frozen_W.weight[5, 5] = float("nan")
            yield parts.encoder.encode(clips[2 * step : 2 * step + 2])

    trainer = Trainer(config, parts, batches(), CPU, config_dir, Metrics(config_dir, config))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 3: loss [nan, ")
    for clip in clips[4:6]:
        assert f"{clip.recording.path} at {clip.start_sec:g} s" in message
    assert f"Last good checkpoint: {config_dir / 'checkpoints/checkpoint_000002'}" in message
    assert "lower the learning rates" in message
    assert checkpoint_names(config_dir) == ["checkpoint_000001", "checkpoint_000002"]
    assert [record["step"] for record in records(config_dir, "train")] == [1, 2]
    finite = [p.isfinite().all() for p in parts.model.parameters() if p.requires_grad]
    assert all(finite)  # the step was not taken


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    config = tiny_config(tmp_path / "run")
    parts = build_parts(config, [], CPU)
    (tmp_path / "run").mkdir()
    clips = cut_clips(read_manifest(config.data.train), 1.28)
    parts.model.text_linear.lora_B.weight.register_hook(lambda gradient: gradient * float("inf"))
    batches = iter([parts.encoder.encode(clips[:2])])
    trainer = Trainer(config, parts, batches, CPU, tmp_path / "run", Metrics(tmp_path / "run", config))
    with pytest.raises(NonFiniteLossError, match=r"step 1: loss \[\d.*gradient norm (inf|nan).*none yet"):
        trainer.train()
