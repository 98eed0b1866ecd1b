"""SHA-256 of files. Those of big base models are computed once per host and remembered."""

import hashlib
import json
import os
from pathlib import Path

from moshi_ttt.atomic import write_atomically

_BLOCK_BYTES = 1 << 22


def cache_folder() -> Path:
    """Where this project keeps what it can compute again: $MOSHI_TTT_CACHE, else ~/.cache/moshi-ttt."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moshi-ttt"
    return Path(os.environ.get("MOSHI_TTT_CACHE", default))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def cached_sha256(path: Path, force: bool = False) -> str:
    """`sha256`, remembered by real path, inode, size and modification time.

    Args:
        path: a file, which may be a link.
        force: read the file even if its digest is remembered.
    """
    real = path.resolve()
    stat = real.stat()
    key = f"{real}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
    store = cache_folder() / "sha256" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if not force and store.is_file():
        return json.loads(store.read_text())["sha256"]
    digest = sha256(real)
    write_atomically(store, json.dumps({"file": key, "sha256": digest}))
    return digest
