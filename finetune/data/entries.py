"""Which audio files a data set has, without opening them: for commands that report on bad data.

A data set is a list (`.jsonl`, `.jsonl.gz`) of lines `{"path": ..., "duration": seconds}`, a folder of such
lists, a folder of audio, or several of these, as training has them: `a.jsonl:0.7,b.jsonl:0.3`, `mono:FOLDER`.
"""

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")
LIST_ENDINGS = (".jsonl", ".jsonl.gz")
WEIGHT = re.compile(r":[0-9.]+$")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    found = [entry for part in _parts(str(data)) for entry in _list_part(part, root)]
    if not found:
        raise ValueError(f"data list {data} is empty; expected a line for each recording")
    return found


def _parts(data: str) -> list[Path]:
    """The lists and folders of a mix, without weights."""
    if Path(data).expanduser().exists():
        return [Path(data).expanduser()]
    names = [WEIGHT.sub("", part.strip()).removeprefix("mono:") for part in data.split(",")]
    return [Path(name).expanduser() for name in names]


def _list_part(data: Path, root: str | Path | None) -> list[Source | BadEntry]:
    if data.is_dir():
        lists = _files(data, LIST_ENDINGS)
        audio = [] if lists else _files(data, AUDIO_ENDINGS)
        if not lists and not audio:
            raise ValueError(f"folder {data} holds no lists ({', '.join(LIST_ENDINGS)}) and no audio files")
        listed = [entry for path in lists for entry in _read_list(path, root)]
        return [*listed, *(Source(path.resolve(), str(data), None) for path in audio)]
    if not data.is_file():
        raise ValueError(f"data {data} does not exist; expected a jsonl file or a folder")
    return list(_read_list(data, root))


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files below a folder with one of these endings, sorted; hidden ones are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, n) for n in names if n.lower().endswith(endings) and not n.startswith(".")]
    return sorted(found)


def _read_list(path: Path, root: str | Path | None) -> Iterator[Source | BadEntry]:
    base = path.parent.resolve()
    inside = base if root is None else Path(root).expanduser().resolve()
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"data list {path} cannot be read ({error}); expected UTF-8 lines of JSON"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _read_line(f"{path}:{number}", line, base, inside)


def _read_line(where: str, line: str, base: Path, inside: Path) -> Source | BadEntry:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return BadEntry(where, f"not JSON ({error})")
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or "\0" in entry["path"]:
        return BadEntry(where, f'expected {{"path": ..., "duration": seconds}}, got {line[:80]}')
    path = (base / entry["path"]).resolve()
    if not path.is_relative_to(inside):
        return BadEntry(where, f"{entry['path']} lies outside {inside}; move it there or set the root folder")
    duration = entry.get("duration")
    if duration is not None and not is_seconds(duration):
        return BadEntry(where, f"duration must be a number of seconds, got {duration!r}")
    speaker = entry.get("speaker")
    return Source(path, where, duration, None if speaker is None else str(speaker))


def is_seconds(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
