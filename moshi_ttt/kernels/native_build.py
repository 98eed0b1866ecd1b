"""The inner loop in C++, compiled for this machine's CPU when it is first needed.

The library is kept in the cache folder under a name made of its source, its compiler and the CPU, so
that machines that share a home each have their own.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from moshi_ttt.digest import cache_folder

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "native"
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp-simd -shared -fPIC -pthread"


@cache
def compiler() -> str | None:
    """Path of the C++ compiler, GCC's; None where there is none. `CXX` names another."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _name(path: str) -> str:
    parts = [source.read_bytes() for source in sorted(_SOURCE.iterdir())]
    version = subprocess.run([path, "--version"], capture_output=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))]
    parts += [FLAGS.encode(), version, platform.machine().encode(), *(line.encode() for line in flags[:1])]
    return f"inner_loop-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def _compile(path: str, library: Path) -> None:
    started = time.perf_counter()
    logger.info("compiling the inner loop for this CPU into %s (once, some ten seconds)", library)
    partial = library.with_name(f"{library.name}.{os.getpid()}")
    command = [path, *FLAGS.split(), str(_SOURCE / "inner_loop.cpp"), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"the inner loop could not be compiled; use ttt.kernel=eager, or name a GCC in the environment "
            f"variable CXX. {' '.join(command)} said:\n{done.stderr[-2000:]}"
        )
    partial.replace(library)
    logger.info("compiled the inner loop in %.0f s", time.perf_counter() - started)


@cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    path = compiler()
    if path is None:
        raise RuntimeError(
            "the inner loop in C++ needs a compiler: install g++, name one in the environment variable CXX, "
            "or use ttt.kernel=eager"
        )
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / _name(path)
    with (folder / "lock").open("w") as lock:  # one process compiles, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            _compile(path, found)
    return ctypes.CDLL(str(found))
