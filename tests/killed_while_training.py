"""Trains one run that is killed by SIGKILL at random moments, many times, and looks at what each leaves.

`python -m killed_while_training FOLDER KILLS [SEED]` prints a line for each kill and fails at the first
unreadable checkpoint, the first step lost that was done before the last checkpoint but one, or an end that
is not that of the same run uninterrupted. Evaluations and checkpoints take turns with steps.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from training import CPU, losses, records, tiny_config

from finetune.config import TrainConfig
from finetune.saving import RESUME, RESUME_MANIFEST
from finetune.train import train
from moshi_ttt.checkpoint import saved_checkpoints, verify_files

EVERY = 1


def settings(run_dir: Path, steps: int) -> TrainConfig:
    rates = ("optim.lr=1e-3", "optim.ttt_lr=1e-3", "optim.gate_lr=1e-3", f"max_steps={steps}")
    often = (f"checkpoint.every_steps={EVERY}", "eval.every_steps=1", "eval.max_clips=4", "batch_size=1")
    return tiny_config(run_dir, *rates, *often, "resume.mode=auto", "wandb.mode=disabled")


def started(config: TrainConfig) -> int:
    """Train in a process of its own; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        train(config, CPU)
        os._exit(0)
    return child


def steps_done(run_dir: Path) -> int:
    """Of the last whole line of metrics."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return 0
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
    return max((record["step"] for record in records(run_dir, "train")), default=0)


def look(run_dir: Path) -> int:
    """Verify every checkpoint; returns the last step that is saved."""
    saved = saved_checkpoints(run_dir)
    for folder in saved:
        verify_files(folder / "consolidated")
        verify_files(folder / RESUME, RESUME_MANIFEST)
    return int(saved[-1].name.removeprefix("checkpoint_")) if saved else 0


def main(folder: Path, kills: int, seed: int = 0) -> None:
    torch.set_num_threads(1)  # a fork takes one thread along
    draw = random.Random(seed)
    whole, killed = (settings(folder / name, 5 * kills) for name in ("whole", "killed"))
    assert os.waitpid(started(whole), 0)[1] == 0
    run_dir = folder / "killed"
    most, moments = 0, Counter()
    while moments.total() < kills:
        before, told = look(run_dir), len(log_lines(run_dir))
        child = started(killed)
        # A step at least, so that the run comes to its end.
        while not any("finetune.trainer: step" in line for line in log_lines(run_dir)[told:]):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.8)
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break  # it was done
        done, saved, moment = steps_done(run_dir), look(run_dir), moment_of(run_dir)
        moments[moment] += 1
        most = max(most, done - saved)
        print(f"kill {moments.total()} in {moment}: step {done} done, step {saved} saved")
        assert saved >= before
        # While the checkpoint of a step is being written, the one before it is the last.
        assert done - saved < 2 * EVERY, "more is lost than the steps since the last checkpoint"
    assert os.waitpid(started(killed), 0)[1] == 0
    assert losses(run_dir) == losses(folder / "whole")
    evaluated = [[r["loss"] for r in records(run, "valid")] for run in (run_dir, folder / "whole")]
    assert evaluated[0] == evaluated[1]
    print(
        f"{moments.total()} kills ({', '.join(f'{number} in {of}' for of, number in moments.items())}): "
        f"at most {most} steps lost, 0 unreadable checkpoints"
    )


def log_lines(run_dir: Path) -> list[str]:
    path = run_dir / "train.log"
    return path.read_text().splitlines() if path.is_file() else []


def moment_of(run_dir: Path) -> str:
    """What the run was doing when it was killed."""
    if any((run_dir / "checkpoints").glob("tmp.*")):
        return "saves"
    last = next(line for line in log_lines(run_dir)[::-1] if "finetune.trainer" in line)
    # Each step is followed by an evaluation.
    return "evaluations" if " loss " in last and "validation" not in last else "steps"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
