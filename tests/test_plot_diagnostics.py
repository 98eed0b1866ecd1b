"""Pictures of diagnostics: from what generation and training write to PNG files and one page."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from omegaconf import OmegaConf
from training import SAMPLE, compose_config, records, run, write_prompt

from evaluation.diagnostics_pictures import PICTURES, History
from evaluation.inner_loss import InnerLossConfig, inner_loss_curves
from evaluation.inner_loss import run as run_inner_loss
from evaluation.plot_diagnostics import InnerLossCurves, PlotConfig, plot, read_history
from inference.generate import GenerateConfig, generate
from moshi_ttt.inner_losses import LOSSES, recorded_inner_losses
from moshi_ttt.streaming import streaming

CONTEXTS = {"ttt_layer_context": 6, "non_ttt_layer_context": 9}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    overrides = ("diagnostics.every_steps=2", "max_steps=4", "gradient_checkpointing=true")
    return run(folder, *overrides)


@pytest.fixture(scope="module")
def generated(trained_run, tmp_path_factory):
    """The file of diagnostics of an answer."""
    folder = tmp_path_factory.mktemp("answer")
    config = GenerateConfig(
        checkpoint=str(trained_run),
        input=str(write_prompt(folder / "prompt.wav")),
        output=str(folder / "answer.wav"),
        device="cpu",
    )
    config.diagnostics.every_frames = 3
    config.diagnostics.file = str(folder / "diagnostics.jsonl")
    generate(config)
    with pytest.raises(ValueError, match=r"diagnostics\.jsonl exists"):
        generate(config)
    return folder / "diagnostics.jsonl"


def pictures_on(page):
    """Names and contents of the images of a page."""
    found = re.findall(r'<img alt="(\w+)" src="data:image/png;base64,([^"]+)">', page)
    return {name: base64.b64decode(content) for name, content in found}


def test_training_writes_diagnostics_of_the_first_step_and_every_second(trained_run):
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    found = [(r["step"], r["split"]) for r in map(json.loads, lines) if r["split"].startswith("diag")]
    assert found == [(step, f"diagnostics/layer_{layer}") for step in (1, 2, 4) for layer in (1, 2)]
    assert "TTT Diagnostics - Layer 2 - Step 4" in (trained_run / "train.log").read_text()


def test_diagnostics_change_nothing_of_the_training(trained_run, tmp_path):
    same = ("max_steps=4", "gradient_checkpointing=true", "diagnostics.every_steps=0")
    plain = run(tmp_path / "run", *same)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(plain, "train")] == [r[key] for r in records(trained_run, "train")]
    assert "diagnostics" not in (plain / "metrics.jsonl").read_text()


def test_generation_writes_a_history_that_can_be_drawn(generated, trained_run):
    history = read_history(generated)
    assert history.about["checkpoint"].startswith(str(trained_run))
    assert history.about["frame_rate"] == 12.5
    frames = [record["frame"] for record in history.records[1]]
    assert frames == list(range(0, 18, 3))  # 16 frames, the first heard twice, the last one delayed
    time, label = history.time
    assert time.tolist() == pytest.approx([frame / 12.5 for frame in frames])
    assert label == "time in the stream (s)"


def test_the_page_holds_every_picture_and_needs_no_network(generated, trained_run):
    index = plot(PlotConfig(history=str(generated)))
    page = index.read_text()
    shown = pictures_on(page)
    assert set(shown) == set(PICTURES)
    for name, content in shown.items():
        assert (index.parent / f"{name}.png").read_bytes() == content
        pixels = imread(index.parent / f"{name}.png")[..., :3]
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, f"{name} is empty"
    outside = re.sub(r'src="data:[^"]+"', "", page)
    assert not re.search(r"https?:|src=|href=|@import|<script", outside)
    assert "first, step 4, listening to prompt.wav" in page
    with pytest.raises(ValueError, match="overwrite=true"):
        plot(PlotConfig(history=str(generated)))


def test_curves_show_what_was_recorded(generated):
    history = read_history(generated)
    for name, (draw, _) in PICTURES.items():
        figure = draw(history)
        for axes in figure.axes:
            if axes.get_label() != "<colorbar>" and axes.axison:
                assert axes.get_xlabel(), name
                assert axes.get_ylabel(), name
        assert any(axes.get_legend() for axes in figure.axes), name
    lines = PICTURES["magnitudes"][0](history).axes[3].lines
    for layer, line in zip(history.layers, lines, strict=True):
        assert line.get_label() == f"layer {layer}"
        assert line.get_ydata().tolist() == [record["ratio"] for record in history.records[layer]]


def test_many_layers_and_training_steps_can_be_drawn(trained_run, tmp_path):
    history = read_history(trained_run / "metrics.jsonl")
    assert history.unit == "step"
    assert history.time[0].tolist() == [1, 2, 4]
    many = History({}, dict.fromkeys(range(16), history.records[1]), "step")
    for name, (draw, _) in PICTURES.items():
        draw(many).savefig(tmp_path / f"{name}.png")
    assert PICTURES["cosines"][0](many).axes[0].get_legend() is None, "colours, not a legend of 16"
    assert "training first" in plot(PlotConfig(str(trained_run / "metrics.jsonl"))).read_text()


@torch.no_grad()
def test_inner_losses_of_a_stream_are_those_of_a_whole_pass(build, perturb, random_codes):
    model = perturb(build(**CONTEXTS, max_inner_change=0.05))
    codes = random_codes(2, 11)
    with recorded_inner_losses(model) as offline:
        model.forward_text(codes)
    with streaming(model, 2), recorded_inner_losses(model) as streamed:
        for frame in codes.split(1, dim=2):
            model.forward_text(frame)
    for layer, (whole,) in offline.items():
        parts = torch.cat(streamed[layer], dim=-1)
        assert parts.shape == (3, 2, 4, 11)
        assert (parts - whole).abs().max() <= 1e-4
        # The first token has nothing before it; its own step helps it.
        at_start, before, after = whole[..., 0]
        assert torch.allclose(at_start, before, rtol=1e-5)
        assert after.mean() < before.mean()


def test_losses_are_averaged_over_the_recordings_that_reach_a_position(build, random_codes):
    model = build(**CONTEXTS)
    long, short = random_codes(1, 9)[0], random_codes(1, 5)[0]
    both = inner_loss_curves(model, [long, short])
    first, second = inner_loss_curves(model, [long]), inner_loss_curves(model, [short])
    assert both.counts == [2] * 5 + [1] * 4
    for layer in (1, 2):
        for name in LOSSES:
            one, other = np.array(first.layers[layer][name]), np.array(second.layers[layer][name])
            assert both.layers[layer][name][:5] == pytest.approx((one[:5] + other) / 2)
            assert both.layers[layer][name][5:] == pytest.approx(one[5:])


def test_inner_losses_of_a_checkpoint(trained_run, generated, tmp_path, caplog):
    caplog.set_level("INFO", "evaluation.inner_loss")
    output = tmp_path / "inner_loss.json"
    config = InnerLossConfig(
        str(trained_run), str(SAMPLE / "train.jsonl"), str(output), duration_sec=1.6, device="cpu"
    )
    run_inner_loss(config)
    assert "Set context: 250 → TTT layers: 25 (2 layers), Non-TTT: 50 (2 layers)" in caplog.text
    curves, about = InnerLossCurves.read(output)
    assert curves.counts == [3] * 20
    assert about["recordings"] == 3
    assert output.with_suffix(".png").is_file()
    settings = PlotConfig(str(generated), str(tmp_path / "plots"), str(output), title="a title")
    page = plot(settings).read_text()
    assert "inner_loss_over_positions" in pictures_on(page)
    assert "a title" in page


def test_what_cannot_be_drawn_is_refused(trained_run, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_history(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"diagnostics\.every_steps above 0"):
        read_history(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"layer": 1, "frame": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        read_history(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=r"evaluation\.inner_loss"):
        InnerLossCurves.read(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["plot_diagnostics", "inner_loss"])
def test_commands_have_a_config(name):
    required = {"plot_diagnostics": {"history"}, "inner_loss": {"checkpoint", "recordings", "output"}}
    assert OmegaConf.missing_keys(compose_config(name=name)) == required[name]


def test_a_file_without_records_is_refused(trained_run, tmp_path):
    config = GenerateConfig(str(trained_run), str(write_prompt(tmp_path / "p.wav")), str(tmp_path / "a.wav"))
    config.diagnostics.file = str(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match=r"diagnostics\.every_frames=100"):
        generate(config)
