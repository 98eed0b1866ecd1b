"""Which audio files a data set has, without opening them: for commands that report on bad data.

A data set is named as training has it (finetune/data/places.py), or is a folder of audio. Whatever a line of
a list lacks is told beside the recordings of the others.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.data.places import (
    AUDIO_ENDINGS,
    LIST_ENDINGS,
    Place,
    files_in,
    is_prepared,
    numbered_lines,
    parse_places,
)
from finetune.data.transcript import is_time, parse_json


@dataclass(frozen=True, slots=True)
class Source:
    """An audio file of a data set.

    Args:
        path: resolved.
        where: the list and line that names it, or its folder.
        duration_sec, speaker: as the list has them; None where it has none.
    """

    path: Path
    where: str
    duration_sec: float | None
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class BadEntry:
    """A line of a list that names no recording, and why."""

    where: str
    reason: str


def list_sources(data: str | Path, root: str | Path | None = None) -> list[Source | BadEntry]:
    """All recordings of a data set in the order of its lists, or sorted by path.

    Args:
        data: lists and folders; weights change nothing here.
        root: folder that all audio must lie in; None is the folder of each list.
    Raises:
        ValueError: there is no such list or folder, a list is no text, or there is nothing in it.
    """
    found = [entry for place in parse_places(str(data)) for entry in _entries_of(place, root)]
    if not found:
        raise ValueError(f"data list {data} is empty; expected a line for each recording")
    return found


def _entries_of(place: Place, root: str | Path | None) -> Iterator[Source | BadEntry]:
    data = place.path
    if is_prepared(data):
        raise ValueError(f"{data} is a prepared folder, which holds no audio; give the list it was made from")
    if not data.is_dir():
        if not data.is_file():
            raise ValueError(f"data {data} does not exist; expected a jsonl file or a folder")
        yield from _read_list(data, root)
        return
    lists = [] if place.mono else files_in(data, LIST_ENDINGS)
    audio = [] if lists else files_in(data, AUDIO_ENDINGS)
    if not lists and not audio:
        raise ValueError(f"folder {data} holds no lists ({', '.join(LIST_ENDINGS)}) and no audio files")
    for path in lists:
        yield from _read_list(path, root)
    yield from (Source(path.resolve(), str(data), None) for path in audio)


def _read_list(path: Path, root: str | Path | None) -> Iterator[Source | BadEntry]:
    base = path.parent.resolve()
    inside = base if root is None else Path(root).expanduser().resolve()
    for number, line in numbered_lines(path):
        yield _read_line(f"{path}:{number}", line, base, inside)


def _read_line(where: str, line: bytes, base: Path, inside: Path) -> Source | BadEntry:
    try:
        entry = parse_json(line)
    except ValueError as error:
        return BadEntry(where, f"not JSON ({error})")
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or "\0" in entry["path"]:
        shown = line[:80].decode("utf-8", "replace").strip()
        return BadEntry(where, f'expected {{"path": ..., "duration": seconds}}, got {shown}')
    path = Path(os.path.realpath(base / entry["path"]))
    if not path.is_relative_to(inside):
        return BadEntry(where, f"{entry['path']} lies outside {inside}; move it there or set the root folder")
    duration = entry.get("duration")
    if duration is not None and not is_time(duration):
        return BadEntry(where, f"duration must be a number of seconds, got {duration!r}")
    speaker = entry.get("speaker")
    return Source(path, where, duration, None if speaker is None else str(speaker))
