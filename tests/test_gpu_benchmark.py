"""The parts of `benchmarks.gpu` that a CPU can run, on the tiny model."""

import json
import subprocess
import sys

import pytest
import torch
from training import ROOT

from benchmarks.gpu import inner_scan, streaming
from benchmarks.gpu.__main__ import SECTIONS, parse, run_section
from benchmarks.gpu.results import Results, line
from moshi_ttt.integration import temporal_attentions, ttt_layers
from moshi_ttt.loading import load_moshi


@pytest.fixture
def base(tiny_base):
    return load_moshi(tiny_base, "cpu", torch.float32).eval()


def test_models_share_moshis_weights_and_have_the_same_windows(base):
    plain, hybrid = streaming.with_short_windows(base), streaming.with_ttt(base, 2)
    ours = dict(hybrid.named_parameters())
    for (name, parameter), other in zip(plain.named_parameters(), base.parameters(), strict=True):
        assert parameter is other
        parts = name.split(".")
        if parts[:2] == ["transformer", "layers"] and parts[2] in "12":
            parts.insert(3, "original_layer")
        assert ours[".".join(parts)] is parameter
    windows = [[a.context for _, _, a in temporal_attentions(model)] for model in (plain, hybrid, base)]
    assert windows == [[100, 50, 50, 100], [100, 50, 50, 100], [250] * 4]
    assert [index for index, _ in ttt_layers(hybrid)] == [1, 2]
    assert ttt_layers(base) == []


def test_bytes_of_a_frame_are_those_of_the_layers_parameters_and_state(base):
    ttt = streaming.inner_layers(streaming.with_ttt(base, 2))
    one, four = (streaming.bytes_of_a_frame(streaming.with_ttt(base, 2), rows) for rows in (1, 4))
    weights = sum(p.nbytes for t in ttt for linear in (t.wq, t.wk, t.wv, t.wo) for p in linear.parameters())
    inner = sum(4 * t.inner_parameters for t in ttt)
    widths = 32 + 128 + 128 + 32
    assert one == weights + inner * 9 // 8 + 2 * 2 * 16 * widths * 4 // 2
    assert four - weights == 4 * (one - weights)


def test_a_stream_is_timed_and_its_state_stays(base):
    models = {"plain": streaming.with_short_windows(base), "2 heads": streaming.with_ttt(base, 2)}
    ms = streaming.times(models, 2, rounds=1)
    assert all(0 < value < 10_000 for value in ms.values())
    over = streaming.over_time(models["2 heads"], 1, frames=4)
    assert over["state_stays"]
    assert over["grown_bytes"] == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_the_inner_loop_is_compared_before_it_is_timed(monkeypatch, tmp_path, layers):
    for name, value in {"WIDTH": 16, "HIDDEN": 64, "FRAMES": 24}.items():
        monkeypatch.setattr(inner_scan, name, value)
    results = Results(tmp_path / "entries.json", "cpu")
    inner_scan.report(results, 2, 3, 8, torch.device("cpu"), layers)
    (entry,) = json.loads((tmp_path / "entries.json").read_text())["entries"]
    assert entry["largest_relative_difference"] < 1e-5
    assert entry["ratio"] == pytest.approx(entry["against"] / entry["ours"], abs=0.01)
    assert {"name", "ratio", "goal", "unit", "ours", "against", "against_what", "device"} <= entry.keys()
    monkeypatch.setattr(inner_scan.Problem, "eager", lambda self: 1.1 * self.ours())
    with pytest.raises(AssertionError):
        inner_scan.report(results, 2, 3, 8, torch.device("cpu"), layers)


def test_entries_of_one_name_are_replaced_and_shown_against_their_goal(tmp_path):
    results = Results(tmp_path / "entries.json", "cpu")
    results.add("a", 2.0, 1.0, "something", "ms", 1.0)
    results.add("b", 1.0, 5.0, "something", "ms", 5.0)
    results.add("a", 1.0, 1.5, "something", "ms", None)
    assert [(e["name"], e["ratio"]) for e in results.entries] == [("a", 1.5), ("b", 5.0)]
    assert [line(e).split()[0] for e in results.entries] == ["a:", "ok"]


def test_options_are_checked_and_a_failed_section_keeps_what_it_has(tmp_path):
    assert parse(["sections=inner", "seconds=30", "output=x.json"]).sections == ["inner"]
    assert "loading" not in parse([]).sections
    for wrong, message in {"sections=no": "unknown section 'no'", "--help": "unknown option"}.items():
        with pytest.raises(ValueError, match=message):
            parse([wrong])
    path = tmp_path / "inner.json"
    Results(path, "cpu").add("a", 2.0, 1.0, "something", "ms", 1.0)
    if not torch.cuda.is_available():
        entries, problem = run_section("inner", path, 60)
        assert [entry["section"] for entry in entries] == ["inner"]
        assert "failed with exit status 1" in problem
    assert sum(section.seconds for section in SECTIONS.values() if not section.asked) <= 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no GPU")
def test_without_a_gpu_the_command_says_that_it_needs_one():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr
