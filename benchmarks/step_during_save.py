"""What saving a checkpoint costs the steps beside it: `python -m benchmarks.step_during_save [OVERRIDES ...]`

Runs `finetune.train` with the overrides (by default the demo) for 60 steps with a checkpoint every 15, and
reads its log: the time of steps while nothing is saved, of the step that waits for the staging copy, and of
those that run while a thread writes; their goal is a ratio of at most 1.1. On one H100: `python -m
benchmarks.step_during_save experiment=moshi_7b_ttt data.train=...`. The demo's checkpoints are written within
a step, so on a CPU it shows nothing but that the command works.
"""

import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.harness import RESULTS

STEPS, EVERY, WARM_UP = 60, 15, 5
STAMP = r"^(\S+ \S+) INFO "


def times_of(log: str) -> dict[str, list[float]]:
    """Seconds of the steps of a run by what was saved meanwhile: nothing, staging, writing."""
    done: dict[int, datetime] = {}
    saved: list[datetime] = []
    for line in log.splitlines():
        if found := re.match(STAMP + r"finetune\.trainer: step (\d+)/", line):
            done[int(found[2])] = _moment(found[1])
        elif found := re.match(STAMP + r"finetune\.saving: saved ", line):
            saved.append(_moment(found[1]))
    times: dict[str, list[float]] = {"nothing": [], "staging": [], "writing": []}
    for step in range(WARM_UP, max(done) + 1):
        start, end = done[step - 1], done[step]
        last_save = (step - 1) // EVERY * EVERY
        if step - 1 == last_save and last_save:
            kind = "staging"
        else:
            finished = [moment for moment in saved if last_save and moment > done[last_save]]
            kind = "writing" if last_save and (not finished or start < finished[0]) else "nothing"
        times[kind].append((end - start).total_seconds())
    return times


def _moment(stamp: str) -> datetime:
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f")


def measure(overrides: list[str]) -> str:
    """The log of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        own = [f"run_dir={run_dir}", f"max_steps={STEPS}", "log_every=1", f"checkpoint.every_steps={EVERY}"]
        own += ["eval.every_steps=0", "diagnostics.every_steps=0", "checkpoint.keep=1", "resume=never"]
        command = [sys.executable, "-m", "finetune.train", *(overrides or ["experiment=demo"]), *own]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return (run_dir / "train.log").read_text(encoding="utf-8")


def main() -> None:
    times = times_of(measure(sys.argv[1:]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    medians = {kind: statistics.median(values) for kind, values in times.items() if values}
    result = {
        "overrides": sys.argv[1:],
        "device": device,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "steps": {kind: len(values) for kind, values in times.items()},
        "median_sec": medians,
        "ratio": {kind: medians[kind] / medians["nothing"] for kind in medians if kind != "nothing"},
    }
    name = "".join(c if c.isalnum() else "_" for c in device)
    path = RESULTS / f"step-during-save-{name}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for kind, seconds in medians.items():
        ratio = seconds / medians["nothing"]
        print(f"{kind:8} {len(times[kind]):3} steps, median {seconds:.3f} s, {ratio:.2f} x")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
