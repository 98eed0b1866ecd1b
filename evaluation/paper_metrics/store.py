"""The folder of a run: its plan, and its clips' likelihoods in files that are written whole or not at all.

    plan.json                              what is scored, with what, how: the folder belongs to it
    nll/TASK/shard_00000.safetensors       nll [sum of T, codebooks] float32, frames [clips], names of clips

Whoever is killed starts again with the same arguments and scores what is missing. Files made from another
plan or other audio are refused, not used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evaluation.paper_metrics.pairs import TaskData
from moshi_ttt.atomic import write_atomically

PLAN = "plan.json"
_ABOUT = "about"


@dataclass(frozen=True)
class Shard:
    """Clips whose likelihoods lie in one file.

    Args:
        task: its data.
        path: the file.
        clips: names, of like length.
        key: digest of all that decides what is in it.
    """

    task: TaskData
    path: Path
    clips: tuple[str, ...]
    key: str


def claim(folder: Path, identity: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Make the folder this plan's, or see that it is.

    Args:
        identity: what must be the same for results to be the same.
        about: what is written beside it by whoever comes first, such as the date.
    Returns:
        The plan as it is written: identity and about.
    Raises:
        ValueError: the folder is another plan's, or holds something else.
    """
    path = folder / PLAN
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".tmp.") for entry in folder.iterdir()):
            raise ValueError(f"output {folder} holds something else; give an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp.{PLAN}.{os.uname().nodename}.{os.getpid()}"
        write_atomically(temporary, _json({"identity": identity, "about": about}))
        with suppress(FileExistsError):  # another process was first; its date counts
            os.link(temporary, path)
        temporary.unlink()
    plan = json.loads(path.read_text())
    differing = differences(plan["identity"], json.loads(_json(identity)))
    if differing:
        raise ValueError(
            f"{folder} was begun with other settings or data: {'; '.join(differing)}. Give the same again, "
            "or another output: likelihoods of different settings do not mix"
        )
    return plan


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two structures of dicts differ, in words; other values are compared whole."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return [] if there == here else [f"{name} {_short(there)} there, {_short(here)} here"]
    found = []
    for key in sorted(there.keys() | here.keys()):
        found += differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}..."


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def make_shards(
    folder: Path, identity: dict[str, Any], task: TaskData, seconds: dict[str, float], clips_each: int
) -> list[Shard]:
    """All files of a task: clips by length, the longest first."""
    about = {key: identity[key] for key in ("model", "protocol")} | {"clips": task.digest}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    ordered = sorted(task.clips, key=lambda name: (-seconds[name], name))
    return [
        Shard(
            task,
            folder / "nll" / task.name / f"shard_{number:05d}.safetensors",
            tuple(ordered[first : first + clips_each]),
            key,
        )
        for number, first in enumerate(range(0, len(ordered), clips_each))
    ]


def write_shard(shard: Shard, nll: Sequence[np.ndarray]) -> None:
    """Write the NLL `[T, codebooks]` of each clip."""
    assert len(nll) == len(shard.clips)
    tensors = {
        "nll": np.concatenate(nll).astype(np.float32),
        "frames": np.array([len(values) for values in nll], np.int64),
    }
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    # One entry: safetensors writes several in any order, and equal files should be equal.
    about = json.dumps({"key": shard.key, "clips": shard.clips})
    write_atomically(shard.path, save(tensors, {_ABOUT: about}))


def read_shard(shard: Shard) -> dict[str, np.ndarray]:
    """NLL `[T, codebooks]` by clip.

    Raises:
        ValueError: the file is damaged, or of another model, protocol or audio.
    """
    remedy = f"delete {shard.path} and start again"
    try:
        with safe_open(shard.path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            nll, frames = file.get_tensor("nll"), file.get_tensor("frames")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard.path} is damaged ({error}); {remedy}") from error
    if about != {"key": shard.key, "clips": list(shard.clips)}:
        raise ValueError(f"{shard.path} is of another model, protocol or audio than {PLAN} says; {remedy}")
    if frames.sum() != len(nll):
        raise ValueError(f"{shard.path} is damaged: its clips have not as many frames as it holds; {remedy}")
    return dict(zip(shard.clips, np.split(nll, np.cumsum(frames)[:-1]), strict=True))
