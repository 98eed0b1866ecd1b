"""The other end of `benchmarks.harness.Contestant`: a round of work for each line on standard input."""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def settings() -> dict[str, Any]:
    """What this process was started with. One thread, and the same random numbers for all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return json.loads(sys.argv[1])


def memory_mib(field: str) -> float:
    """VmRSS, or its highest value VmHWM, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def give_memory_back() -> None:
    """What is freed goes back to the system (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def serve(
    work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, fresh_memory: bool = True
) -> None:
    """Work once for each line, and answer with its time and by how much memory grew at its peak.

    Args:
        prepare: called before each round, not timed.
        fresh_memory: freed memory is given back before each round, without which its growth would not show.
            False for rounds that follow each other as steps of a run do, in memory that is there already.
    """
    for _ in sys.stdin:
        prepare()
        if fresh_memory:
            give_memory_back()
        Path("/proc/self/clear_refs").write_text("5")  # start anew to look for the highest use
        before, started, began = memory_mib("VmRSS"), time.process_time(), time.perf_counter()
        result = work()
        seconds, wall = time.process_time() - started, time.perf_counter() - began
        found = {"cpu_sec": seconds, "wall_sec": wall, "peak_mib": memory_mib("VmHWM") - before}
        del result
        print(json.dumps(found), flush=True)
