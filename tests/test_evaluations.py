"""Evaluations that a training config names: they are run when due, and leave the training as it was."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from long_recordings import libri_light
from paper_data import write_storycloze, write_swuggy
from test_paper_metrics import evaluate, results
from training import checkpoint_names, losses, records, run

from finetune.evaluations import left_as_it_was, make_evaluations, validate_evaluations

TARGET = "evaluation.long_context.during_training.LongContext"
PAPER = "evaluation.paper_metrics.during_training.PaperMetrics"
SETTINGS = (
    "max_steps=4",
    "checkpoint.every_steps=2",
    "ttt.ttt_layer_context=4",
    "ttt.non_ttt_layer_context=4",
    "ttt.gate_init=0.5",
    "ttt.persistent_states=true",
    "diagnostics.every_steps=2",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return libri_light(tmp_path_factory.mktemp("data"), speakers=3, seconds=4.0)


def entry(small, *more):
    text = ",".join((f"_target_:{TARGET}", "every_steps:2", f"recordings:{small}", "limit:2", *more))
    return f"evaluations=[{{{text}}}]"


class Greedy:
    """Draws every kind of random number, and leaves the model in training mode."""

    def check(self, subject):
        pass

    def __call__(self, subject):
        subject.model.train()
        return {"drawn": torch.rand(()).item() + np.random.rand() + random.random()}


def files_of(run_dir):
    """Content of every file of the checkpoints, but for what names the run or its config."""
    found = {}
    for path in sorted((run_dir / "checkpoints").rglob("*")):
        if path.is_file() and path.suffix == ".safetensors":
            found[str(path.relative_to(run_dir))] = path.read_bytes()
        elif path.name == "resume.json":
            content = json.loads(path.read_text())
            found[str(path.relative_to(run_dir))] = {key: content[key] for key in ("schedule", "data")}
    return found


def test_a_run_with_evaluations_is_the_same_bit_for_bit(small, tmp_path):
    plain = run(tmp_path / "plain", *SETTINGS)
    measured = run(tmp_path / "measured", *SETTINGS, entry(small))
    assert checkpoint_names(plain) == checkpoint_names(measured) == ["checkpoint_000002", "checkpoint_000004"]
    before, after = files_of(plain), files_of(measured)
    assert sum(name.endswith(".safetensors") for name in before) >= 4
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert losses(plain) == losses(measured)
    shown = [records(d, "diagnostics/layer_1") for d in (plain, measured)]
    assert shown[0] == shown[1] != []
    found = records(measured, "long_context")
    assert [record["step"] for record in found] == [2, 4]
    for record in found:
        assert (record["recordings"], record["partial"]) == (2, 1.0)
        apart = record["carried/w100_beyond"] - record["reset/w100_beyond"]
        assert record["carried - reset/w100_beyond"] == pytest.approx(apart, abs=1e-9)
        assert apart != 0
    assert found[0]["carried/w100"] != found[1]["carried/w100"]
    assert "long_context: " in (measured / "train.log").read_text()


def test_paper_metrics_while_training_are_those_of_its_checkpoint(tmp_path):
    write_swuggy(tmp_path / "data", ids=6)
    write_storycloze(tmp_path / "data" / "tSC")
    data = {"slm21": tmp_path / "data", "tsc": tmp_path / "data" / "tSC"}
    folders = ",".join(f"{name}:{path}" for name, path in data.items())
    settings = f"{PAPER},every_steps:2,tasks:[swuggy,tsc],data:{{{folders}}},limit:4,seed:1"
    settings_4 = SETTINGS[:5]
    plain = run(tmp_path / "plain", *settings_4)
    measured = run(tmp_path / "measured", *settings_4, f"evaluations=[{{_target_:{settings}}}]")
    assert files_of(plain) == files_of(measured) != {}
    assert losses(plain) == losses(measured)
    found = records(measured, "paper_metrics")
    assert [record["step"] for record in found] == [2, 4]
    output = evaluate(
        *(
            tmp_path / "out",
            "baseline=null",
            f"checkpoint={measured}",
            "tasks=[swuggy,tsc]",
            "limit=4",
            "seed=1",
        ),
        *(f"data.{name}={path}" for name, path in data.items()),
    )
    expected = results(output)["results"]
    for task in ("swuggy_dev", "tsc"):
        assert found[1][f"{task}/acc"] == pytest.approx(expected[task]["acc,none"], abs=1e-6)
        assert found[1][f"{task}/nll"] > 0
    assert found[1]["partial"] == 1.0
    assert found[0]["tsc/nll"] != found[1]["tsc/nll"]


def test_an_evaluation_may_draw_random_numbers(build):
    model = build().train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with left_as_it_was(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        drawn = Greedy()(type("Subject", (), {"model": model}))
    assert drawn["drawn"] > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_what_cannot_be_evaluated_stops_the_run_before_it_starts(small, tmp_path):
    wrong = {
        ("evaluations=[{every_steps:2}]",): "evaluations[0] needs _target_",
        (f"evaluations=[{{_target_:{TARGET}}}]",): "needs every_steps",
        (entry(small, "name:valid"),): "give each a name= of its own",
        (entry(tmp_path / "gone"),): "gone does not exist",
        (entry(small, "depth:3"),): "unexpected keyword argument 'depth'",
        (entry(small, "max_sec:1"),): "attention reaches",
        (entry(small, "reset_frames:20"),): "use 16 or 32 frames",
        (entry(small, "arms:[carried,sideways]"),): "must name some of",
    }
    for overrides, message in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            run(tmp_path / "run", *SETTINGS, *overrides)
    assert not (tmp_path / "run").exists()


def test_names_tell_evaluations_apart():
    one = {"_target_": TARGET, "every_steps": 5, "recordings": "x"}
    with pytest.raises(ValueError, match="long_context, long_context"):
        validate_evaluations([one, one])
    validate_evaluations([one, one | {"name": "long_context_noise"}])
    made = make_evaluations([{"_target_": f"{__name__}.Greedy", "every_steps": 3, "name": "greedy"}])
    assert [(m.name, m.every_steps, type(m.evaluation).__name__) for m in made] == [("greedy", 3, "Greedy")]


def test_a_frozen_run_evaluates_once(small, tmp_path):
    run_dir = run(tmp_path / "run", "mode=frozen", entry(small), *SETTINGS[2:5])
    assert [record["step"] for record in records(Path(run_dir), "long_context")] == [0]
