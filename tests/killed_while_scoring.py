"""Scores in a process that SIGKILL ends again and again, at a random moment.

Usage: killed_while_scoring.py OUTPUT OVERRIDES... Prints how many times it was killed before it was done, and
how many files of likelihoods were made in how many of these lives.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from test_paper_metrics import evaluate


def files(output: Path) -> dict[Path, int]:
    """When each file of likelihoods was written."""
    return {path: path.stat().st_mtime_ns for path in output.glob("nll/*/shard_*")}


def main() -> None:
    output, overrides = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)  # a fork takes one thread along
    drawn = random.Random(0)
    made_in = []
    for kills in range(100):
        before = files(output)
        child = os.fork()
        if child == 0:
            evaluate(output, *overrides)
            os._exit(0)
        # The first lives end before anything is scored, the others some time after their first file.
        delay, waits_for_file = drawn.uniform(0, 0.4), kills >= 2
        status, deadline = None, None
        while status is None and (deadline is None or time.monotonic() < deadline):
            if deadline is None and (not waits_for_file or len(files(output)) > len(before)):
                deadline = time.monotonic() + delay
            pid, code = os.waitpid(child, os.WNOHANG)
            status = code if pid else None
            time.sleep(0.005)
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        after = files(output)
        assert before.items() <= after.items(), "what was finished was scored again"
        made_in.append(len(after) - len(before))
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            print(f"kills: {kills} lives that made files: {sum(count > 0 for count in made_in)}")
            return
    raise AssertionError("100 lives were not enough")


if __name__ == "__main__":
    main()
