"""Trains runs that are killed by SIGKILL at random moments, and looks at what each kill leaves.

`python -m killed_while_training FOLDER KILLS [RUNS [SEED]]` kills each of RUNS (1) so often and prints a line
for each kill. It fails at the first unreadable checkpoint, the first step lost that was done before the last
checkpoint was begun, or an end that is not that of the same run uninterrupted. Evaluations and checkpoints
take turns with steps.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
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


@dataclass
class Toll:
    """What kills have cost: how many came in which moment, and the most steps that one lost."""

    moments: Counter[str] = field(default_factory=Counter)
    most: int = 0


def kill_once(config: TrainConfig, delay_sec: float, toll: Toll) -> bool:
    """Start a run or go on with it, and kill it so long after a step; False where it ended before."""
    run_dir = Path(config.run_dir)
    before, told = look(run_dir), len(log_lines(run_dir))
    child = started(config)
    # A step at least, so that the run comes to its end.
    while not any("finetune.trainer: step" in line for line in log_lines(run_dir)[told:]):
        time.sleep(0.005)
    time.sleep(delay_sec)
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        return False
    done, saved, moment = steps_done(run_dir), look(run_dir), moment_of(run_dir)
    toll.moments[moment] += 1
    toll.most = max(toll.most, done - saved)
    print(f"kill {toll.moments.total()} in {moment}: step {done} done, step {saved} saved", flush=True)
    assert saved >= before
    # While a checkpoint is being written, training goes on until the next one is due, and the one before is
    # the last.
    assert done - saved <= 2 * EVERY, "more is lost than the steps since the last checkpoint"
    return True


def main(folder: Path, kills: int, runs: int = 1, seed: int = 0) -> None:
    torch.set_num_threads(1)  # a fork takes one thread along
    draw, toll = random.Random(seed), Toll()
    assert os.waitpid(started(settings(folder / "whole", 5 * kills)), 0)[1] == 0
    # Whatever the machine's speed, a run of 5 steps a kill does not end before its last kill.
    longest = 3 * step_sec(folder / "whole")
    for number in range(runs):
        config = settings(folder / f"killed_{number}", 5 * kills)
        left = kills
        while left and kill_once(config, draw.random() * longest, toll):
            left -= 1
        assert os.waitpid(started(config), 0)[1] == 0
        killed, whole = Path(config.run_dir), folder / "whole"
        assert losses(killed) == losses(whole)
        evaluated = [[r["loss"] for r in records(run, "valid")] for run in (killed, whole)]
        assert evaluated[0] == evaluated[1]
        shutil.rmtree(killed)
    found = ", ".join(f"{number} in {of}" for of, number in toll.moments.items())
    print(
        f"{toll.moments.total()} kills ({found}) of {runs} runs: at most {toll.most} steps lost, "
        "0 unreadable checkpoints"
    )


def log_lines(run_dir: Path) -> list[str]:
    path = run_dir / "train.log"
    return path.read_text().splitlines() if path.is_file() else []


def step_sec(run_dir: Path) -> float:
    """Mean time of a step with its save and evaluation, by the log."""
    steps = [line for line in log_lines(run_dir) if re.search(r"finetune\.trainer: step \d+/", line)]
    first, last = (datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in (steps[0], steps[-1]))
    return (last - first).total_seconds() / (len(steps) - 1)


def moment_of(run_dir: Path) -> str:
    """What the run was doing when it was killed."""
    if any((run_dir / "checkpoints").glob("tmp.*")):
        return "saves"
    last = next(line for line in log_lines(run_dir)[::-1] if "finetune.trainer" in line)
    # Each step is followed by an evaluation.
    return "evaluations" if " loss " in last and "validation" not in last else "steps"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
