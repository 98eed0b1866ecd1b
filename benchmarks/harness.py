"""What benchmarks have in common: entries, the clock, rounds, the table, the results file, contestants.

Every figure is a ratio against something run beside it. A contestant that needs code from elsewhere, or
whose memory is measured, runs in a process of its own and works when it is told to.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass
class Options:
    """What a user asks of the benchmarks.

    Args:
        peers: folder with checkouts of ttt-video-dit, ttt-lm-pytorch and moshi-finetune, or None. A folder
            `site` in it, if there is one, holds Python packages that they need and this project does not.
    """

    peers: Path | None = None


@dataclass
class Entry:
    """One figure.

    Args:
        name: unique, and the same in every run: results are compared by it.
        ratio: above 1 ours is better; None: not measured.
        goal: what the ratio shall be.
        unit: of `ours` and `against`.
        against_what: what ours is compared with; or why it was not measured.
        device: which ran both.
        more: other measurements, for who wants to know.
    """

    name: str
    ratio: float | None
    goal: float
    unit: str
    ours: float | None
    against: float | None
    against_what: str
    device: str
    more: dict[str, Any] = field(default_factory=dict)


Benchmark = Callable[[Options], list[Entry]]


def device_name(threads: int) -> str:
    """Of this machine's CPU: "cpu-x86_64-1thread"."""
    return f"cpu-{platform.machine()}-{threads}thread{'s' if threads > 1 else ''}"


def lower_is_better(
    name: str, ours: float, against: float, goal: float, unit: str, against_what: str, **more: Any
) -> Entry:
    """An entry for times or bytes on one thread."""
    rounded = {key: float(f"{value:.5g}") for key, value in (("ours", ours), ("against", against))}
    ratio = round(against / ours, 3)
    return Entry(
        name, ratio, goal, unit, **rounded, against_what=against_what, device=device_name(1), more=more
    )


def not_measured(name: str, goal: float, why: str) -> Entry:
    """An entry in the place of one that could not be measured."""
    return Entry(name, None, goal, "", None, None, f"not measured: {why}", device_name(1))


def cpu_sec(work: Callable[[], Any]) -> float:
    """Seconds of CPU that some work takes: what else the machine does hardly counts."""
    started = time.process_time()
    work()
    return time.process_time() - started


def rounds_of(
    works: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """What each work returns, turn and turn about; the first rounds are not kept."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            value = work()
            if number >= warm_up:
                found[name].append(value)
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


class Contestant:
    """A process that does its work once whenever it is told to; see `benchmarks.contestants.rounds`.

    Args:
        module: in `benchmarks.contestants`, what the process runs.
        settings: handed to it.
        before: folders that its imports come from, before this repository.
        clock: what a round's time is: "cpu_sec", or "wall_sec" for what waits for a disk.
    """

    def __init__(
        self,
        module: str,
        settings: Mapping[str, Any],
        before: Sequence[Path] = (),
        clock: str = "cpu_sec",
    ):
        command = [sys.executable, "-P", "-m", f"benchmarks.contestants.{module}", json.dumps(settings)]
        paths = os.pathsep.join(map(str, (*before, ROOT)))
        # The last keeps Moshi from compiling its parts, for minutes; a peer's own torch.compile stays on.
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.clock = clock
        self.peak_mib: list[float] = []

    def __call__(self) -> float:
        """Seconds of one round."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended with code {self.process.wait()}; see above")
        found = json.loads(answer)
        self.peak_mib.append(found["peak_mib"])
        return found[self.clock]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def table(entries: Sequence[Entry]) -> str:
    """Entries for the eye."""
    rows: list[tuple[str, ...]] = [("", "ratio", "goal", "ours", "against", "unit", "against what")]
    for entry in entries:
        numbers = (entry.ratio, entry.goal, entry.ours, entry.against)
        shown = ["-" if number is None else f"{number:.4g}" for number in numbers]
        rows.append((entry.name, *shown, entry.unit, entry.against_what))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:5], widths[1:5], strict=True))
        + f"  {row[5]:<{widths[5]}}  {row[6]}"
        for row in rows
    ]
    return "\n".join(lines)


def machine_name() -> str:
    """What results of this machine are filed under: its accelerator, or its CPU and its cores."""
    if torch.cuda.is_available():
        return "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name()).lower()
    return f"cpu-{platform.machine()}-{os.cpu_count()}cores"


def write(entries: Sequence[Entry], folder: Path = RESULTS) -> Path:
    """Put entries into the results file of this machine and this day.

    They replace those of their names; but what was not measured now replaces nothing that was.
    """
    path = folder / f"{machine_name()}-{datetime.now(UTC):%Y-%m-%d}.json"
    whole = {entry.name: entry for entry in read(path)} if path.exists() else {}
    whole |= {entry.name: entry for entry in entries if entry.ratio is not None or entry.name not in whole}
    path.write_text(json.dumps({"entries": [asdict(entry) for entry in whole.values()]}, indent=1) + "\n")
    return path


def read(path: Path) -> list[Entry]:
    """The entries of a results file.

    Raises:
        ValueError: the file is not one.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return [Entry(**entry) for entry in content["entries"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file of `make bench`: {error}; delete it") from error


def newest(folder: Path = RESULTS) -> Path:
    """The newest results file of this machine.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.glob(f"{machine_name()}-????-??-??.json"))
    if not found:
        raise ValueError(f"{folder} has no results of {machine_name()}; make them with: make bench")
    return found[-1]
