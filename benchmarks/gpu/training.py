"""A training step of Moshi 7B: LoRA of rank 128, 16 clips of 100 s, then with TTT-MLP of 8 heads.

`benchmarks.train_step` says what is measured; its entries are written after each arm.
"""

import logging

import torch

from benchmarks import train_step
from benchmarks.gpu.results import Results
from benchmarks.train_step import Arm, Measured, Setting

HEADS = 8
MOST_GB = 60.0


def run(results: Results) -> None:
    logging.getLogger("benchmarks.train_step").setLevel(logging.INFO)
    setting = Setting(torch.device("cuda", 0), ttt_heads=HEADS)
    model, found = train_step.build(setting), list[Measured]()

    def take(arm: Arm, steps: int) -> None:
        found.append(train_step.run_arm(model, setting, arm, steps))
        print(train_step.line_of(found[-1]), flush=True)
        results.put(train_step.entries(found, setting))

    take(Arm("ours", checkpoint=setting.checkpoint), 5)
    peak = found[0].peak_gb
    assert peak is not None
    take(Arm("plain Moshi", plain=True), 3)
    train_step.add_ttt(model, HEADS)
    take(Arm(f"ours, TTT-MLP of {HEADS} heads", checkpoint=setting.checkpoint), 5)
    results.add("train step, memory", peak, MOST_GB, "the goal of 60 GB", "GB", 1.0)
