"""Requests to stop, as schedulers send them: SIGTERM and SIGUSR1."""

import os
import signal
from pathlib import Path
from types import FrameType

import torch

from finetune.distributed import Process, sum_over_processes

REQUEUE = 75
"""Exit code of a run that was asked to stop and can go on: EX_TEMPFAIL, "try again later"."""

STOPPED = "stopped"
"""File in the run directory of a run that stopped on request, until it is launched again."""

REQUEUE_FILE = "MOSHI_TTT_REQUEUE_FILE"
"""Variable with the path of a file by which a run tells its launcher that it wants to be started again. Where
it is set all processes end with 0: torchrun passes no code on, and starts again what ends with another."""

_ASKING = (signal.SIGTERM, signal.SIGUSR1)


class StoppedBySignal(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop, and has saved what it needs to go on."""


def refuse_restart(run_dir: Path) -> str | None:
    """Why this process is not to go on: torchrun starts what ends with any code but 0 again, and it was asked
    to stop. None in a new launch."""
    stopped = run_dir / STOPPED
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        stopped.unlink(missing_ok=True)
    return "this launch was asked to stop before" if stopped.is_file() else None


def ask_for_requeue(process: Process) -> int:
    """Tell the launcher that this run was asked to stop and can go on; returns the exit code."""
    path = os.environ.get(REQUEUE_FILE)
    if path is None:
        return REQUEUE
    if process.is_main:
        Path(path).touch()
    return 0


class StopRequests:
    """Notes the signals that ask the run to stop. Used as a context manager, in the main thread."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No more than this: a handler runs between any two instructions, in the middle of a log line too.
        self.received = signal.Signals(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, process: Process) -> bool:
        """Whether any process was asked to stop; the same in all, which must call this at the same step."""
        asked = torch.tensor(float(self.received is not None), device=process.device)
        return bool(sum_over_processes(asked, process) > 0)
