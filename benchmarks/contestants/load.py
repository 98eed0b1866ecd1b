"""Moshi's weights into memory: as `load_moshi` does it, or the bare file."""

import json
import os
from pathlib import Path

import torch
from moshi.models.loaders import CheckpointInfo

from benchmarks.contestants.rounds import serve, settings
from moshi_ttt.loading import load_moshi

PIECE = 2**24


def bare_read(path: Path) -> int:
    """Read a file a piece at a time; returns its size."""
    piece, size = bytearray(PIECE), 0
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(piece):
            size += read
    return size


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that it comes from the disk (Linux)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet stay
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    given = settings()
    path = Path(given["weights"])
    unused = Path("not-needed")
    base = CheckpointInfo(path, unused, unused, lm_config=json.loads(given["lm_config"]))

    def load() -> torch.nn.Module:
        model = load_moshi(base, "cpu", torch.bfloat16)
        for parameter in model.parameters():  # weights come from the file when they are first looked at
            parameter.data.view(torch.uint8).flatten()[::4096].sum()
        return model

    serve(
        load if given["how"] == "load_moshi" else lambda: bare_read(path),
        prepare=lambda: forget(path) if given["from"] == "disk" else None,
    )


if __name__ == "__main__":
    main()
