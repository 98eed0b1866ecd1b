"""Saves a checkpoint many times, each time killed by SIGKILL one file operation later than before.

Usage: killed_while_saving.py FOLDER. Every FOLDER/run_NNN must hold a finished checkpoint of step 1 of the
model of FOLDER/settings.json; step 2 is saved beside it.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.loading import find_base


def die_at(operation: int, run: Path) -> None:
    """Kill this process at its n-th file operation inside `run`, as Python's audit events count them."""
    left = operation

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if any(isinstance(arg, str | os.PathLike) and str(run) in os.fspath(arg) for arg in args):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)  # a fork takes one thread along
    config = json.loads((folder / "settings.json").read_text())
    settings = ModelSettings.from_config(config)
    base = find_base(settings.model)
    model = build_model(settings, base)
    for operation in range(1, 200):
        run = folder / f"run_{operation:03d}"
        shutil.copytree(folder / "run_000", run)
        child = os.fork()
        if child == 0:
            die_at(operation, run)
            save_checkpoint(run, 2, model, config, base, save_base=False, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("200 file operations were not enough")


main()
