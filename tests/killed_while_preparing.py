"""Prepares a list in a process that SIGKILL ends again and again, each time some file operations later.

Usage: killed_while_preparing.py LIST FOLDER. Prints how many times it was killed before it was done.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch
from prepared_data import run_prepare


def die_at(operation: int, folder: Path) -> None:
    """Kill this process at its n-th file operation inside `folder`, as Python's audit events count them."""
    left = operation

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        inside = any(isinstance(arg, str | os.PathLike) and str(folder) in os.fspath(arg) for arg in args)
        if inside or event == "os.fsync":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    recordings, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)  # a fork takes one thread along
    drawn = random.Random(0)
    for kills in range(200):
        child = os.fork()
        if child == 0:
            # The first operations are reading what is there; later runs find more of it.
            die_at(drawn.randint(3, 16) + kills // 2, folder)
            run_prepare(folder, f"data.train={recordings}")
            os._exit(0)
        drawn.random()  # the next child draws another number
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            print(f"kills: {kills} left over: {len(list(folder.glob('.tmp.*')))}")
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("200 runs were not enough")


main()
