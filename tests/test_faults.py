"""What befalls a run: signals, kills, a full disk, no network. None of it costs more than it must."""

import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from test_distributed import free_port
from training import ROOT, TINY, losses, own_logging, records, run, run_python, start_python

from finetune.distributed import Process
from finetune.saving import RESUME, RESUME_MANIFEST
from finetune.signals import REQUEUE, StoppedBySignal, ask_for_requeue
from moshi_ttt.checkpoint import saved_checkpoints, verify_files
from moshi_ttt.tiny_model import tiny_model_folder

MANY = ("max_steps=60", "checkpoint.every_steps=50", "mode=ttt", "lora.enable=false", "resume.mode=auto")


def wait_for_step(run_dir, step, is_alive=lambda: True):
    deadline = time.monotonic() + 120
    path = run_dir / "metrics.jsonl"
    while not path.is_file() or f'"step": {step}, "split": "train"' not in path.read_text():
        assert is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def signal_at(run_dir, step, number):
    """Send this process a signal when a step is done."""

    def send():
        wait_for_step(run_dir, step)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_after_a_checkpoint_of_its_step(tmp_path, number):
    thread = signal_at(tmp_path / "run", 3, number)
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal, match=f"{number.name}: asked to stop after step .* of 60"):
        run(tmp_path / "run", *MANY)
    thread.join()
    assert signal.getsignal(number) == before
    (saved,) = saved_checkpoints(tmp_path / "run")
    assert saved.name == f"checkpoint_{len(losses(tmp_path / 'run')):06d}"
    verify_files(saved / RESUME, RESUME_MANIFEST)
    assert "stopped: " in (tmp_path / "run/train.log").read_text()
    assert (tmp_path / "run/stopped").is_file()


def test_torchrun_does_not_go_on_with_what_was_asked_to_stop(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    thread = signal_at(run_dir, 1, signal.SIGUSR1)
    with pytest.raises(StoppedBySignal):
        run(run_dir, *MANY)
    thread.join()
    done = len(losses(run_dir))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(StoppedBySignal, match="this launch was asked to stop before"):
        run(run_dir, *MANY)
    assert len(losses(run_dir)) == done
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # the job, requeued
    run(run_dir, *MANY)
    assert len(losses(run_dir)) == 60
    assert not (run_dir / "stopped").exists()


def test_an_evaluation_that_a_signal_put_off_is_made_up_for(tmp_path):
    settings = (*MANY[2:], "max_steps=4", "eval.every_steps=2", "eval.max_clips=1")
    run_dir = tmp_path / "run"
    thread = signal_at(run_dir, 2, signal.SIGUSR1)
    thread_is_first = ("batch_size=8",)  # the step after the signal lasts longer than sending it
    try:
        run(run_dir, *settings, *thread_is_first)
    except StoppedBySignal:
        run(run_dir, *settings, *thread_is_first)
    thread.join()
    assert [record["step"] for record in records(run_dir, "valid")] == [2, 4]
    assert [record["step"] for record in records(run_dir, "train")] == [1, 2, 3, 4]


@pytest.fixture
def two(private_cache, tmp_path):
    """Two processes of one run, not under torchrun, so that each one's own end is seen."""
    settings = dict(o.split("=", 1) for o in (*TINY, *MANY, "batch_size=1", f"run_dir={tmp_path / 'run'}"))
    arguments = [f"{key}={value}" for key, value in settings.items()]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start_python("-m", "finetune.train", *arguments, **place, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in (0, 1)
    ]
    wait_for_step(tmp_path / "run", 3, lambda: all(process.poll() is None for process in processes))
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_signal_to_one_process_stops_all_at_one_step(two, tmp_path):
    two[1].send_signal(signal.SIGUSR1)
    printed = [process.communicate(timeout=60)[0] for process in two]
    assert [process.returncode for process in two] == [REQUEUE, REQUEUE] == [75, 75], printed
    (saved,) = saved_checkpoints(tmp_path / "run")
    state = verify_files(saved / RESUME, RESUME_MANIFEST)
    assert state["step"] == len(losses(tmp_path / "run")) < 60
    assert len(state["files"]) == state["world_size"] == 2
    assert "another process was asked to stop after step" in printed[0]


def test_who_is_told_of_a_launcher_leaves_it_a_word_instead_of_a_code(tmp_path, monkeypatch):
    word = tmp_path / "requeue"
    main, other = (Process(rank, 2, torch.device("cpu")) for rank in (0, 1))
    assert [ask_for_requeue(process) for process in (main, other)] == [75, 75]
    monkeypatch.setenv("MOSHI_TTT_REQUEUE_FILE", str(word))
    assert ask_for_requeue(other) == 0
    assert not word.exists()
    assert ask_for_requeue(main) == 0
    assert word.exists()


def test_a_process_that_loses_another_ends_within_a_minute_and_says_so(two):
    two[1].kill()
    killed = time.monotonic()
    printed, _ = two[0].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert two[0].returncode not in (0, REQUEUE)
    assert "another process of this run has ended, so process 0 of 2 ends too" in printed


def test_a_run_killed_at_random_moments_is_the_uninterrupted_one(tmp_path):
    printed = run_python(
        *("-m", "killed_while_training", str(tmp_path), "4"), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"
    )
    assert "4 kills (" in printed
    assert "0 unreadable checkpoints" in printed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting a small file system needs root: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Ballast:
    """An evaluation that fills the disk after step 4, and makes room again after step 10."""

    def __init__(self, disk: str):
        self.disk = Path(disk)

    def check(self, subject):
        pass

    def __call__(self, subject):
        if subject.step == 4:
            free = os.statvfs(self.disk).f_bavail * os.statvfs(self.disk).f_frsize
            (self.disk / "ballast").write_bytes(bytes(free - (1 << 20)))
        if subject.step == 10:
            (self.disk / "ballast").unlink()
        return {}


def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(small_disk):
    run_dir = small_disk / "run"
    ballast = f"evaluations=[{{_target_:{__name__}.Ballast,every_steps:2,name:ballast,disk:{small_disk}}}]"
    run(run_dir, *MANY[2:], "max_steps=14", "checkpoint.every_steps=2", "checkpoint.keep=1", ballast)
    assert len(losses(run_dir)) == 14
    log = (run_dir / "train.log").read_text()
    assert "not saved: not enough free disk at" in log
    assert "training goes on" in log
    assert [folder.name for folder in saved_checkpoints(run_dir)] == ["checkpoint_000014"]


def test_a_checkpoint_cut_short_by_the_disk_leaves_the_one_before(tmp_path):
    """Writing fails in the middle of a file: the limit of a file's size stands for that of the disk."""
    run_dir = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        wait_for_step(run_dir, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))

    thread = threading.Thread(target=limit)
    thread.start()
    try:
        with own_logging(), pytest.raises(OSError, match=r"last checkpoint of .* is not saved: .*too large"):
            run(run_dir, *MANY[2:], "max_steps=30", "checkpoint.every_steps=2", "checkpoint.keep=1")
    finally:
        thread.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(losses(run_dir)) == 30
    assert "not saved: [Errno 27] File too large; training goes on" in (run_dir / "train.log").read_text()
    (saved,) = saved_checkpoints(run_dir)
    verify_files(saved / "consolidated")
    verify_files(saved / RESUME, RESUME_MANIFEST)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [saved.name]


@pytest.fixture
def unreachable_hub(tmp_path, monkeypatch):
    """A hub that hangs up on whoever calls, whose cache has the tiny model from before; the calls it got."""
    repo, commit = tmp_path / "hub/models--some--moshi", "0123456789abcdef" * 2 + "01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(tiny_model_folder())
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            with suppress(OSError):  # the test is done
                while True:
                    connection, caller = server.accept()
                    calls.append(caller)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        url = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repo.parent))
        # It waits for 23 s in all between its calls for a file.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        huggingface_hub.utils.reset_sessions()
        yield calls
        server.shutdown(socket.SHUT_RDWR)
    huggingface_hub.utils.reset_sessions()


def test_the_hub_out_of_reach_stops_no_training_and_no_resumption(unreachable_hub, tmp_path):
    for steps in (2, 3):
        before = len(unreachable_hub)
        settings = ("model.source=some/moshi", f"max_steps={steps}", "resume.allow=[max_steps]")
        run(tmp_path / "run", *MANY[2:], *settings)
        assert len(unreachable_hub) > before
    assert len(losses(tmp_path / "run")) == 3
    assert "resumed from" in (tmp_path / "run/train.log").read_text()
    assert [path.name[-1] for path in saved_checkpoints(tmp_path / "run")] == ["2", "3"]


def test_wandb_out_of_reach_stops_no_training(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    run_dir = tmp_path / "run"
    run(run_dir, *MANY[2:], "max_steps=2", "wandb.mode=online", "wandb.project=x")
    assert len(losses(run_dir)) == 2
    log = (run_dir / "train.log").read_text()
    assert "wandb cannot be reached" in log
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    (saved,) = saved_checkpoints(run_dir)
    state = json.loads((saved / RESUME / RESUME_MANIFEST).read_text())
    assert state["wandb_id"] == offline.name.rsplit("-", 1)[1]
    assert Path(offline).is_dir()
