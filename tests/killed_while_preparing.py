"""Prepares a list in a process that SIGKILL ends again and again, at a random line of writing a file.

Usage: killed_while_preparing.py LIST FOLDER. Prints how many times it was killed before it was done, and how
many of these left a part of a shard.
"""

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from prepared_data import run_prepare

from moshi_ttt.atomic import write_atomically


def die_at(line: int) -> None:
    """Kill this process at the n-th line that it executes of `write_atomically`: before, between, behind."""
    left = line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code is not write_atomically.__code__:
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def main() -> None:
    recordings, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)  # a fork takes one thread along
    drawn = random.Random(0)
    half_written: set[Path] = set()
    for kills in range(200):
        # A file takes about 10 lines; the last step writes three in a row.
        line = drawn.randint(1, 12 + 2 * max(0, kills - 12))
        child = os.fork()
        if child == 0:
            die_at(line)
            run_prepare(folder, f"data.train={recordings}")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        half_written.update(folder.glob(".tmp.shard_*"))
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            print(f"kills: {kills} while a shard was written: {len(half_written)}")
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("200 runs were not enough")


main()
