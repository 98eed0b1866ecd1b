"""The last step of preparing: the index and the manifest of shards that are all there."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from finetune.data.bad_input import BadInput
from finetune.data.places import MANIFEST, PLAN
from finetune.data.prepared import (
    FORMAT,
    INDEX,
    SOURCES,
    missing_shards,
    shard_name,
)
from finetune.data.shard import Shard
from moshi_ttt.atomic import write_atomically
from moshi_ttt.digest import sha256


def join(folder: Path, on_error: str = "raise", max_error_fraction: float = 0.0) -> Path:
    """Write sources, index and, last of all, the manifest; returns its path.

    Args:
        on_error, max_error_fraction: whether shards may lack what could not be read; see `BadInput`.
    Raises:
        ValueError: shards are missing, damaged or of another plan, or lack more recordings than they may.
    """
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder} holds no {PLAN}; prepare recordings with data.train=LIST first")
    plan = json.loads((folder / PLAN).read_text())
    missing = missing_shards(folder, plan["shards"])
    if missing:
        named = ", ".join(map(str, missing[:10]))
        raise ValueError(
            f"{folder} lacks shards {named} ({len(missing)} of {plan['shards']} are missing); run "
            "the tasks that did not finish again, then join"
        )
    gathered = _Gathered(folder, plan)
    for number in range(plan["shards"]):
        gathered.add(number)
    lost = _lost(folder, gathered.sources, BadInput(on_error, max_error_fraction))
    sources = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in gathered.sources)
    write_atomically(folder / SOURCES, sources.encode())
    write_atomically(folder / INDEX, gathered.index())
    manifest = {
        **plan,
        "format": FORMAT,
        "hours": sum(gathered.durations) / 3600,
        "frames": gathered.frames,
        "words": gathered.words,
        "lost": lost,
        "files": {name: sha256(folder / name) for name in (INDEX, SOURCES)},
    }
    # Of killed tasks: all shards are there, so nobody writes one. Another task may be joining, too.
    for left_over in folder.glob(".tmp.shard_*"):
        left_over.unlink(missing_ok=True)
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return folder / MANIFEST


def _lost(folder: Path, sources: list[dict[str, Any]], bad_input: BadInput) -> list[dict[str, Any]]:
    """The sources of which something could not be read; ValueError if there may be none, or not so many."""
    lost = [source for source in sources if "lost" in source]
    bad_input.expect(len(sources))
    for source in lost:
        problem = f"{source['path']} was left out of {folder / shard_name(source['shard'])}: {source['lost']}"
        remedy = (
            "repair it and prepare the recordings in another folder, or leave it out with data.on_error=skip"
        )
        bad_input.skip(source["path"], ValueError(f"{problem}; {remedy}"))
    bad_input.require_enough()
    return [{name: source[name] for name in ("number", "path", "lost")} for source in lost]


class _Gathered:
    """What the shards say, one after the other."""

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self.folder = folder
        self.plan = plan
        self.sources: list[dict[str, Any]] = []
        self.durations: list[float] = []
        self.places: list[tuple[int, int]] = []
        self.sizes: list[int] = []
        self.digests: list[str] = []
        self.headers: list[str] = []
        self.frames = 0
        self.words = 0

    def add(self, number: int) -> None:
        path = self.folder / shard_name(number)
        shard = Shard(path)
        about = shard.file.metadata
        expected = plan_digest(self.plan)
        if about.get("plan_sha256") != expected or about.get("shard") != number:
            raise ValueError(
                f"{path} is of another plan; remove it and prepare again with the same arguments"
            )
        for row, source in enumerate(about["sources"]):
            self.sources.append({**source, "shard": number})
            self.durations.append(source["duration_sec"])
            self.places.append((number, row))
        self.frames += shard.file["codes"].shape[0]
        self.words += len(shard.file["word_start"])
        self.sizes.append(path.stat().st_size)
        self.headers.append(shard.file.header_sha256)
        self.digests.append(sha256(path))

    def index(self) -> bytes:
        """The content of the index: recordings in the order of the list, and shards."""
        assert [source["number"] for source in self.sources] == list(range(self.plan["recordings"]))
        names = [source["path"].encode() for source in self.sources]
        arrays = {
            "shard": np.array([shard for shard, _ in self.places], np.int32),
            "row": np.array([row for _, row in self.places], np.int32),
            "duration_sec": np.array(self.durations, np.float64),
            "path": np.frombuffer(b"".join(names), np.uint8),
            "path_bytes": np.cumsum([0, *map(len, names)]).astype(np.int64),
            "shard_bytes": np.array(self.sizes, np.int64),
            "shard_sha256": _digests(self.digests),
            "shard_header_sha256": _digests(self.headers),
        }
        return save(arrays)


def plan_digest(plan: dict[str, Any]) -> str:
    """`Plan.sha256` of a plan that was read from its file."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _digests(hexadecimal: list[str]) -> np.ndarray:
    return np.array([list(bytes.fromhex(digest)) for digest in hexadecimal], np.uint8)
