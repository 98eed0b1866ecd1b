"""What a prepared folder will hold: which recordings are in which shard. Decided before anything is encoded.

The plan depends on the list and the settings alone, not on who does how much of it, so the shards of any
number of tasks and workers are those of one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.data.bad_input import BadInput
from finetune.data.codec import BLOCK_FRAMES
from finetune.data.manifest import Recording
from finetune.data.places import PLAN
from finetune.data.prepared import FORMAT, PER_CLIP, WHOLE
from moshi_ttt.atomic import write_atomically

MAX_SHARD_HOURS = 1000.0


@dataclass(frozen=True)
class Plan:
    """What decides the content of a prepared folder.

    Args:
        encode: "whole" or "per_clip".
        duration_sec: length of a clip; None for whole.
        shard_hours: audio after which a shard is full.
        mimi_sha256: of Mimi's weights.
        device: cpu or cuda, which round differently.
        recordings, shards: how many.
        list_sha256: of the recordings: names, sizes, times of change, words.
        block_frames: frames that Mimi gets at once; None for per_clip.
        format: of the folder.
    """

    encode: str
    duration_sec: float | None
    shard_hours: float
    mimi_sha256: str
    device: str
    recordings: int
    shards: int
    list_sha256: str
    block_frames: int | None
    format: int = FORMAT

    @property
    def sha256(self) -> str:
        """By which a shard knows its plan."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def make_plan(
    recordings: Sequence[Recording],
    encode: str,
    duration_sec: float,
    shard_hours: float,
    mimi_sha256: str,
    device: str,
    bad_input: BadInput,
) -> tuple[Plan, list[list[int]]]:
    """The plan, and which recordings are in each shard: those that follow each other until it is full."""
    if encode not in (WHOLE, PER_CLIP):
        raise ValueError(f"data.encode must be {WHOLE} or {PER_CLIP}; got {encode!r}")
    if not 0 < shard_hours <= MAX_SHARD_HOURS:
        raise ValueError(f"shard_hours must be above 0 and at most {MAX_SHARD_HOURS:g}, got {shard_hours}")
    if not duration_sec > 0:
        raise ValueError(f"duration_sec must be above 0, got {duration_sec}")
    shards: list[list[int]] = []
    room = 0.0
    for index, recording in enumerate(recordings):
        if room <= 0:
            shards.append([])
            room = shard_hours * 3600
        shards[-1].append(index)
        room -= recording.duration_sec
    whole = encode == WHOLE
    plan = Plan(
        encode,
        None if whole else duration_sec,
        shard_hours,
        mimi_sha256,
        device,
        len(recordings),
        len(shards),
        list_digest(recordings, bad_input),
        BLOCK_FRAMES if whole else None,
    )
    return plan, shards


def list_digest(recordings: Sequence[Recording], bad_input: BadInput) -> str:
    """SHA-256 of what is known of recordings without reading their audio.

    Raises:
        ValueError: a transcript cannot be read or a file has vanished, and `bad_input` lets none pass.
    """
    digest = hashlib.sha256()
    for recording in recordings:
        try:
            stat = recording.path.stat()
            about = [recording.path.name, recording.duration_sec, stat.st_size, stat.st_mtime_ns]
            digest.update(json.dumps(about).encode() + words_digest(recording).encode())
        except (OSError, ValueError) as error:
            bad_input.lose(str(recording.path), ValueError(str(error)))
            digest.update(f"{recording.path.name} cannot be read".encode())
    return digest.hexdigest()


def words_digest(recording: Recording) -> str:
    """SHA-256 of a recording's words, and of all else that it says beside its audio."""
    words = None if recording.words is None else tuple(recording.words)
    about = {"words": words, "user": recording.user}
    return hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()


def claim(folder: Path, plan: Plan) -> None:
    """Make the folder this plan's, or see that it is.

    Raises:
        ValueError: it holds, or is being filled with, something else.
    """
    path = folder / PLAN
    if path.is_file():
        refuse_other(path, plan)
        return
    if folder.exists() and any(not entry.name.startswith(".tmp.") for entry in folder.iterdir()):
        raise ValueError(f"output {folder} holds something else; give an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(plan), indent=1) + "\n").encode())
    refuse_other(path, plan)  # another task with other settings may have come in between


def refuse_other(path: Path, plan: Plan) -> None:
    """Raise ValueError if a plan that was written is not this one."""
    written: dict[str, Any] = json.loads(path.read_text())
    ours = asdict(plan)
    names = sorted(name for name in ours.keys() | written.keys() if ours.get(name) != written.get(name))
    if not names:
        return
    differing = "; ".join(f"{name} {written.get(name)} there, {ours.get(name)} here" for name in names)
    raise ValueError(
        f"{path.parent} was begun with other settings or recordings: {differing}. Give the same again, or "
        "another output: codes of different settings do not mix"
    )
