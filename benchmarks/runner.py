"""Which benchmarks there are, and running them."""

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness import Entry, Options

BENCHMARKS = (
    "startup",
    "loading",
    "inner_loop",
    "training_step",
    "streaming_step",
    "diagnostics_overhead",
    "data_loading",
    "long_context",
)
"""Modules of this package whose `entries(options)` are run by `make bench`."""


def arguments(given: Sequence[str]) -> tuple[list[str], Options]:
    """Names and options of a command line.

    Raises:
        ValueError: there is no such benchmark, or no such folder.
    """
    options, names = Options(), []
    for argument in given:
        key, equals, value = argument.partition("=")
        if key == "peers" and equals:
            options.peers = Path(value).expanduser().resolve()
            if not options.peers.is_dir():
                raise ValueError(f"peers={value}: no such folder; expected one with checkouts of the peers")
        elif argument in BENCHMARKS:
            names.append(argument)
        else:
            raise ValueError(f"no benchmark {argument!r}; expected {', '.join(BENCHMARKS)}, or peers=FOLDER")
    return names or list(BENCHMARKS), options


def run(names: Sequence[str], options: Options) -> list[Entry]:
    """The entries of these benchmarks, on one thread."""
    torch.set_num_threads(1)
    entries = []
    for name in names:
        started = time.perf_counter()
        torch.manual_seed(0)
        found = import_module(f"benchmarks.{name}").entries(options)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        entries += found
    return entries
