"""Other launches of the training kernels: which are right, and which are fastest.

A launch that reads where it must not ends the process, so each is tried in one of its own:
`python -m benchmarks.gpu.launches LAYERS MINI_BATCH ROWS BLOCK WARPS PRECISION`. They are compiled side by
side and timed one after the other.
"""

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.clock import interleaved
from benchmarks.gpu.inner_scan import FRAMES, Problem
from benchmarks.gpu.results import Results
from moshi_ttt.kernels import triton_form
from moshi_ttt.kernels.scan import Launch

LAUNCHES = [
    (2, 16, 64, 64, 8, "highest"),
    (2, 16, 64, 64, 8, "high"),
    (2, 16, 16, 64, 4, "highest"),
    (2, 16, 16, 64, 4, "high"),
    (2, 16, 16, 128, 8, "highest"),
    (2, 16, 16, 32, 4, "highest"),
    (2, 16, 32, 64, 4, "highest"),
    (2, 64, 64, 64, 8, "high"),
    (2, 64, 64, 128, 8, "highest"),
    (1, 16, 64, 64, 8, "highest"),
    (1, 16, 64, 32, 8, "highest"),
    (1, 16, 16, 64, 8, "highest"),
    (1, 16, 16, 64, 4, "highest"),
    (1, 64, 64, 64, 8, "high"),
]
NETS, HEADS = 128, 8


def try_out(layers: int, mini_batch: int, launch: Launch, precision: str, lock: Path) -> str:
    """One line: how far gradients are from the eager scan's, and milliseconds."""
    device = torch.device("cuda", 0)
    triton_form.launch = launch
    small = Problem(HEADS, HEADS, 2 * mini_batch + 5, mini_batch, device, layers)
    eager = small.gradients(small.eager)
    torch.set_float32_matmul_precision(precision)
    pairs = zip(small.gradients(small.ours), eager, strict=True)
    error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        problem = Problem(NETS, HEADS, FRAMES, mini_batch, device, layers)
        works = {"both": lambda: problem.gradients(problem.ours)}
        both = 1e3 * interleaved(works, device, 5, warm_up=1)["both"]
        with torch.no_grad():
            forward = 1e3 * interleaved({"forward": problem.ours}, device, 5, warm_up=1)["forward"]
    return f"error {error:.1e}, forward {forward:.1f} ms, forward and backward {both:.1f} ms"


def run(results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu.launches"]
        running = [
            subprocess.Popen(
                [*command, *map(str, launch), f"{folder}/lock"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for launch in LAUNCHES
        ]
        for launch, process in zip(LAUNCHES, running, strict=True):
            output, _ = process.communicate()
            said = output.strip().splitlines() or ["nothing"]
            print(f"layers, mini-batch, rows, block, warps, precision {launch}: {said[-1]}", flush=True)
    assert results.entries == []  # lines to read; the launch that runs is chosen by hand


if __name__ == "__main__":
    numbers, (chosen_precision, lock_path) = map(int, sys.argv[1:6]), sys.argv[6:8]
    depth, size, *cut = numbers
    print(try_out(depth, size, Launch(*cut), chosen_precision, Path(lock_path)))
