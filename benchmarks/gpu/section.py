"""One section of `benchmarks.gpu` in a process of its own: `python -m benchmarks.gpu.section MODULE FILE`"""

import importlib
import logging
import sys
from pathlib import Path

import torch

from benchmarks.gpu.results import Results


def main(module: str, path: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    importlib.import_module(f"benchmarks.gpu.{module}").run(Results(Path(path), device))


if __name__ == "__main__":
    main(*sys.argv[1:])
