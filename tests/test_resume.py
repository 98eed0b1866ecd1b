"""A run that goes on from a checkpoint is the run that never stopped, with any number of processes."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from resumed_training import CASES, DRAWS, STEPS, clips_drawn, config_of, joined, restored
from test_distributed import free_port
from training import CPU, ROOT, TINY, losses, own_logging, records, start_python, train_here

from finetune.plan import build_on_meta, checkpoint_bytes
from finetune.saving import RESUME_MANIFEST
from moshi_ttt.checkpoint import saved_checkpoints

FILES = ("consolidated/ttt.safetensors", "resume/rank_00000.safetensors")


def start_two(case, run_dir, *options):
    """Start the run of a case in two processes."""
    settings = dict(o.split("=", 1) for o in (*TINY, *STEPS, *CASES[case], "batch_size=1"))
    arguments = [f"{key}={value}" for key, value in settings.items()]
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", *options)
    return start_python(
        *torchrun, "-m", "finetune.train", *arguments, f"run_dir={run_dir}", "resume.mode=auto"
    )


def kill_one(launcher, run_dir, step):
    """Kill the second process when a step is done and the first checkpoint is written."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    deadline = time.monotonic() + 120
    while not saved_checkpoints(run_dir) or len(losses(run_dir)) < step:
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pids = [int(pid) for pid in children.read_text().split()]
    ranks = {environment(pid).get("RANK"): pid for pid in pids}
    os.kill(ranks["1"], signal.SIGKILL)


def environment(pid):
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.fixture(scope="module")
def runs(private_cache, tmp_path_factory):
    """Each case whole in one process and in two, and what two went through of which one was killed."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        train_here(config_of(case, folder / case, 1, "resume.mode=auto"))
    two = start_two("carried", folder / "two")
    printed, _ = two.communicate(timeout=300)
    assert two.returncode == 0, printed
    return folder


def load_with(world, folder, cases):
    """Let so many processes write to `folder` what they find in checkpoints."""
    folder.mkdir()
    points = [f"{case}={run}/checkpoints/checkpoint_000007" for case, run in cases.items()]
    script = ("-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={free_port()}")
    process = start_python(
        *script, "-m", "resumed_training", str(folder), *points, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"
    )
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return folder


@pytest.fixture(scope="module")
def loaded(runs):
    """What two processes find in the checkpoints of one."""
    return load_with(2, runs / "loaded", {case: runs / case for case in CASES})


def comparable(run_dir):
    """All metrics but times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_sec", "_per_s"))} for line in lines]


@pytest.mark.parametrize("name, world", [("clips", 1), ("carried", 1), ("two", 2)])
def test_a_checkpoint_is_as_large_as_planned(runs, name, world):
    config = config_of("clips" if name == "clips" else "carried", runs / name, world)
    folder = runs / name / "checkpoints/checkpoint_000014"
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert written == pytest.approx(checkpoint_bytes(config, build_on_meta(config), world), rel=0.05)


def cut_back(whole, run_dir):
    """The run as it was when it was killed after step 20, before the checkpoint of step 14 was written."""
    shutil.copytree(whole, run_dir)
    for later in saved_checkpoints(run_dir)[1:]:
        shutil.rmtree(later)
    return run_dir


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(runs, tmp_path, case):
    run_dir = cut_back(runs / case, tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "spl')
    torch.rand(3)  # another state than that after building
    train_here(config_of(case, run_dir, 1, "resume.mode=auto"))
    assert len(losses(run_dir)) == 20
    assert comparable(run_dir) == comparable(runs / case)
    for name in FILES:
        path = f"checkpoints/checkpoint_000020/{name}"
        assert (run_dir / path).read_bytes() == (runs / case / path).read_bytes()


def test_one_of_two_processes_killed_restarts_both_from_the_last_checkpoint(runs, tmp_path):
    launcher = start_two("carried", tmp_path / "run", "--max-restarts=1")
    kill_one(launcher, tmp_path / "run", 8)
    killed = time.monotonic()
    try:
        printed, _ = launcher.communicate(timeout=120)
    finally:
        launcher.terminate()
    assert launcher.returncode == 0, printed
    assert "resumed from" in printed
    assert time.monotonic() - killed < 120
    assert "another process of this run has ended, so process 0 of 2 ends too" in printed
    assert comparable(tmp_path / "run") == comparable(runs / "two")
    for name in (*FILES, "resume/rank_00001.safetensors"):
        path = f"checkpoints/checkpoint_000020/{name}"
        assert (tmp_path / "run" / path).read_bytes() == (runs / "two" / path).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_load_what_one_has_saved(runs, loaded, case):
    saved = joined(runs / case / "checkpoints/checkpoint_000007/resume")
    found = joined(loaded / case)
    assert found.keys() == saved.keys()
    assert any(name.startswith("carried/") for name in saved) == (case == "carried")
    assert all(torch.equal(tensor, found[name]) for name, tensor in saved.items())


def drawn_by_one(case, run, tmp_path):
    config = config_of(case, tmp_path / "run", 1, f"resume.mode={run}", "resume.allow=[batch_size]")
    trainer = restored(config, CPU)
    trainer.saver.close()
    return trainer, clips_drawn(trainer)


@pytest.mark.parametrize("case", CASES)
def test_no_clip_is_seen_twice_or_skipped_with_another_number_of_processes(runs, loaded, tmp_path, case):
    _, expected = drawn_by_one(case, runs / case / "checkpoints/checkpoint_000007", tmp_path)
    ranks = [json.loads((loaded / case / f"clips_{rank}.json").read_text()) for rank in (0, 1)]
    assert len(expected) == DRAWS
    for step, one, other in zip(expected, *ranks, strict=True):
        assert Counter(step) == Counter(one + other)


def test_four_processes_load_and_go_on_with_what_two_have_saved(runs, tmp_path):
    found = load_with(4, tmp_path / "four", {"carried": runs / "two"}) / "carried"
    point = runs / "two/checkpoints/checkpoint_000007"
    saved, loaded = joined(point / "resume"), joined(found)
    assert loaded.keys() == saved.keys()
    assert any(name.startswith("carried/") for name in saved)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
    _, expected = drawn_by_one("carried", point, tmp_path)
    ranks = [json.loads((found / f"clips_{rank}.json").read_text()) for rank in range(4)]
    assert {len(clips) for rank in ranks for clips in rank} == {1}
    for step, *parts in zip(expected, *ranks, strict=True):
        assert Counter(step) == Counter(sum(parts, []))


def test_one_process_loads_and_goes_on_with_what_two_have_saved(runs, tmp_path):
    point = runs / "two/checkpoints/checkpoint_000007"
    trainer, _ = drawn_by_one("carried", point, tmp_path)
    saved = joined(point / "resume")
    found = {piece.name: piece for piece in trainer._pieces() if not piece.name.startswith("carried/")}
    assert all(torch.equal(piece.tensor, saved[name]) for name, piece in found.items())
    allow = ("resume.allow=[batch_size]", f"resume.mode={point}")
    train_here(config_of("carried", tmp_path / "on", 1, *allow))
    expected = losses(runs / "two")[7:]
    assert [r["step"] for r in records(tmp_path / "on", "train")] == list(range(8, 21))
    assert losses(tmp_path / "on") == pytest.approx(expected, abs=1e-4)


def test_damaged_checkpoints_are_skipped_with_a_warning(runs, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "clips", run_dir)
    checkpoints = run_dir / "checkpoints"
    with (checkpoints / f"checkpoint_000020/{FILES[1]}").open("r+b") as file:
        file.truncate(1000)
    with (checkpoints / f"checkpoint_000014/{FILES[1]}").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3\4\5\6\7")
    (checkpoints / "tmp.checkpoint_000021").mkdir()
    train_here(config_of("clips", run_dir, 1, "resume.mode=auto"))
    log = (run_dir / "train.log").read_text()
    assert "checkpoint_000020 is skipped" in log
    assert "has 1000 bytes, expected" in log
    assert "checkpoint_000014 is skipped" in log
    assert "its SHA-256 differs" in log
    assert f"resumed from {checkpoints / 'checkpoint_000007'}" in log
    assert comparable(run_dir) == comparable(runs / "clips")
    names = sorted(path.name for path in checkpoints.iterdir())
    assert [name.split(".")[0] for name in names] == [
        *["checkpoint_0000" + s for s in ("07", "14", "20")],
        *["damaged"] * 2,
    ]


def test_without_a_valid_checkpoint_the_same_run_starts_afresh(runs, tmp_path):
    run_dir = cut_back(runs / "clips", tmp_path / "run")
    (run_dir / "checkpoints/checkpoint_000007/resume" / RESUME_MANIFEST).write_text("{")
    with own_logging(), pytest.raises(ValueError, match="batch_size was 2, is 1"):
        train_here(config_of("clips", run_dir, 2, "resume.mode=auto"))
    assert len(losses(run_dir)) == 20
    train_here(config_of("clips", run_dir, 1, "resume.mode=auto"))
    assert "has no valid checkpoint: starting afresh" in (run_dir / "train.log").read_text()
    assert comparable(run_dir) == comparable(runs / "clips")


def test_a_changed_setting_is_refused_unless_named(runs, tmp_path):
    run_dir = cut_back(runs / "clips", tmp_path / "run")
    changed = ("optim.lr=1e-4", "eval.seed=3", "max_steps=9", "resume.mode=auto")
    with own_logging(), pytest.raises(ValueError, match=r"optim.lr was 0.001, is 0.0001.*resume.allow=\["):
        train_here(config_of("clips", run_dir, 1, *changed))
    train_here(config_of("clips", run_dir, 1, *changed, "resume.allow=[optim,eval.seed,max_steps]"))
    rates = [record["lr_lora"] for record in records(run_dir, "train")]
    assert len(rates) == 9
    # The schedule is that of the new settings: one of 9 steps that ends near 0.
    assert rates[6] > 1e-4 > rates[7] > rates[8] > 0
    with pytest.raises(ValueError, match="resume.allow names 'optim.rate'"):
        config_of("clips", run_dir, 1, "resume.allow=[optim.rate]")


def test_by_default_a_run_is_resumed_under_slurm_alone(runs, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(runs / "clips", run_dir)
    with own_logging(), pytest.raises(ValueError, match="exists; choose a new one"):
        train_here(config_of("clips", run_dir, 1))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    train_here(config_of("clips", run_dir, 1))
    assert "resumed from" in (run_dir / "train.log").read_text()
    assert comparable(run_dir) == comparable(runs / "clips")
