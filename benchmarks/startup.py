"""How long our imports take beside torch's own, in fresh processes that take turns."""

import resource
import subprocess
import sys

from benchmarks.harness import ROOT, Entry, Options, lower_is_better, medians, rounds_of

GOAL_SEC = 1.5
PACKAGES = {
    "moshi_ttt": "import moshi_ttt.building, moshi_ttt.checkpoint, moshi_ttt.integration",
    "finetune.train": "import finetune.train",
    "inference.generate": "import inference.generate",
}


def child_cpu_sec(code: str) -> float:
    """Seconds of CPU of a Python process that runs this."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return used() - before


def entries(options: Options) -> list[Entry]:
    works = {"torch": "import torch"} | PACKAGES
    timed = {name: lambda code=code: child_cpu_sec(code) for name, code in works.items()}
    seconds = medians(rounds_of(timed, 3))
    return [
        lower_is_better(
            f"import of {name}",
            seconds[name] - seconds["torch"],
            GOAL_SEC,
            1.0,
            "CPU s",
            "1.5 s beyond torch's own import",
            torch_sec=round(seconds["torch"], 3),
        )
        for name in PACKAGES
    ]
