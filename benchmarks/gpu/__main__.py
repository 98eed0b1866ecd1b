"""Everything that is measured on a GPU, in one command: `python -m benchmarks.gpu`

Options: `output=FILE` where entries go (benchmarks/results/DEVICE-DATE.json), `sections=a,b` to run only
those, `seconds=N` for all together (520). Each section runs in a process of its own with its own limit, so
that one that fails or hangs costs no other, and what it has measured until then is kept. No network and no
weights are needed. The exit status is 1 if a section failed; a missed goal is only shown.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.results import line
from benchmarks.harness import RESULTS

TOTAL_SECONDS = 520.0


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: `run(results)` of benchmarks.gpu.MODULE.

    Args:
        seconds: when it is stopped.
        compiled: with the parts compiled that Moshi compiles by default.
        asked: runs only when it is named.
    """

    module: str
    seconds: float
    compiled: bool = True
    asked: bool = False


SECTIONS = {
    "streaming": Section("streaming", 150),
    "inner": Section("inner_scan", 120, compiled=False),
    "training": Section("training", 180),
    "kernels": Section("kernels", 60),
    "loading": Section("loading", 120, compiled=False, asked=True),
    "launches": Section("launches", 200, compiled=False, asked=True),
    "streaming_uncompiled": Section("streaming", 100, compiled=False, asked=True),
}


@dataclass
class Options:
    """What the command line asks for."""

    sections: list[str] = field(default_factory=lambda: [n for n, s in SECTIONS.items() if not s.asked])
    seconds: float = TOTAL_SECONDS
    output: Path | None = None


def parse(arguments: list[str]) -> Options:
    """Options from NAME=VALUE words.

    Raises:
        ValueError: an unknown option or section.
    """
    options = Options()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "sections":
            options.sections = value.split(",")
        elif name == "seconds":
            options.seconds = float(value)
        elif name == "output":
            options.output = Path(value)
        else:
            raise ValueError(f"unknown option {argument!r}; expected sections=a,b seconds=N output=FILE")
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return options


def run_section(name: str, path: Path, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Entries of a section, and how it ended: "" if well."""
    section = SECTIONS[name]
    environment = {k: v for k, v in os.environ.items() if k != "NO_TORCH_COMPILE"}
    if not section.compiled:
        environment["NO_TORCH_COMPILE"] = "1"
    command = [sys.executable, "-m", "benchmarks.gpu.section", section.module, str(path)]
    problem = ""
    try:
        done = subprocess.run(command, env=environment, timeout=min(section.seconds, seconds), check=False)
        if done.returncode:
            problem = f"failed with exit status {done.returncode}, see above"
    except subprocess.TimeoutExpired as expired:
        problem = f"stopped after {expired.timeout:.0f} s"
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    for entry in entries:
        entry["section"] = name
    return entries, problem


def main() -> None:
    options = parse(sys.argv[1:])
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA GPU, and torch sees none; `make bench` is for the CPU")
    device = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name()).lower()
    output = options.output or RESULTS / f"{device}-{datetime.now(UTC):%Y-%m-%d}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections:
            left = options.seconds - (time.monotonic() - started)
            if left < 10:
                problems[name] = "not run: the time was used up"
                continue
            print(f"== {name}", flush=True)
            found, problem = run_section(name, Path(folder) / f"{name}.json", left)
            entries += found
            if problem:
                problems[name] = problem
            output.write_text(json.dumps({"entries": entries, "problems": problems}, indent=2) + "\n")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for entry in entries:
        print(line(entry))
    for name, problem in problems.items():
        print(f"FAIL section {name}: {problem}")
    print(f"wrote {output} after {time.monotonic() - started:.0f} s")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
