"""Which recordings: from globs, folders and lists to items with a place for each one's answer."""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import Any

import soundfile

LISTS = (".txt", ".jsonl", ".jsonl.gz")
AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".caf", ".w64", ".rf64", ".au")


@dataclass(frozen=True)
class Item:
    """A recording to answer.

    Args:
        id: folder of its answer, below the output's.
        path: the recording.
        channel: that is the user's; None expects mono.
        seed: of the noise that its answer is drawn with.
        seconds: of audio to be heard.
        channels: of the recording.
    """

    id: str
    path: Path
    channel: int | None
    seed: int
    seconds: float
    channels: int


@dataclass(frozen=True)
class _Entry:
    """A recording as it was named: where, and what a list says of it."""

    path: Path
    says: dict[str, Any]
    source: str


def find_items(
    inputs: Sequence[str], channel: int | None, seed: int, max_sec: float | None = None
) -> list[Item]:
    """All recordings that are named, longest first: the last ones to be done are then short.

    Args:
        inputs: files, globs, folders and lists, see `BatchConfig.inputs`.
        channel, seed: where a list does not say.
        max_sec: what is heard of each at most.
    Raises:
        ValueError: something named is not there, is no audio, or two recordings would share a folder.
    """
    entries = [entry for name in inputs for entry in _named(name)]
    if not entries:
        raise ValueError("inputs names no recording; give files, globs, folders, .txt or .jsonl lists")
    names = _ids([entry for entry in entries if "id" not in entry.says])
    items: dict[str, Item] = {}
    for entry in entries:
        says = {"channel": channel, "seed": seed} | entry.says
        item_id = says["id"] if "id" in says else names[entry.path]
        info = _info(entry)
        seconds = info.frames / info.samplerate
        heard = seconds if max_sec is None else min(seconds, max_sec)
        item = Item(item_id, entry.path, says["channel"], says["seed"], heard, info.channels)
        if item_id in items:
            raise ValueError(
                f"{items[item_id].path} and {entry.path} would both be answered in {item_id}; give each an "
                "`id` in a .jsonl list"
            )
        items[item_id] = item
    for item_id in items:
        for parent in PurePosixPath(item_id).parents:
            if str(parent) in items:
                raise ValueError(
                    f"{items[item_id].path} would be answered in {item_id}, inside the answer of "
                    f"{items[str(parent)].path}; give each an `id` in a .jsonl list"
                )
    return sorted(items.values(), key=lambda item: (-item.seconds, item.id))


def _info(entry: _Entry) -> Any:
    if not entry.path.is_file():
        raise ValueError(f"{entry.path} ({entry.source}) does not exist")
    try:
        return soundfile.info(entry.path)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{entry.path} ({entry.source}) is no audio file that can be read ({error})"
        ) from error


def _named(name: str) -> Iterator[_Entry]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO)
        if not files:
            raise ValueError(f"inputs: folder {name} holds no audio")
        yield from (_Entry(file, {}, name) for file in files)
    elif path.name.endswith(LISTS):
        yield from _listed(path)
    else:
        # A file whose name has brackets is a file, and not a pattern that does not match it.
        files = [str(path)] if path.is_file() else sorted(glob(str(path), recursive=True))  # noqa: PTH207
        if not files:
            raise ValueError(f"inputs: {name} names no file")
        yield from (_Entry(Path(file), {}, name) for file in files)


def _listed(path: Path) -> Iterator[_Entry]:
    if not path.is_file():
        raise ValueError(f"inputs: list {path} does not exist")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line := line.strip():
                source = f"{path}:{number}"
                says = _line(line, source) if path.suffix != ".txt" else {"path": line}
                yield _Entry(path.parent / says.pop("path"), says, source)


def _line(line: str, source: str) -> dict[str, Any]:
    """What a line of a .jsonl says that is ours to read; other keys, such as `duration`, are left."""
    try:
        says = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f'{source}: no JSON ({error}); expected {{"path": "..."}}') from error
    if not isinstance(says, dict) or not isinstance(says.get("path"), str):
        raise ValueError(f'{source}: expected an object such as {{"path": "..."}}, got {line[:80]}')
    for key, kind in (("id", str), ("channel", int), ("seed", int)):
        if key in says and (not isinstance(says[key], kind) or isinstance(says[key], bool)):
            raise ValueError(f"{source}: {key} must be a {kind.__name__}, got {says[key]!r}")
    if "id" in says:
        parts = PurePosixPath(says["id"])
        if parts.is_absolute() or not parts.parts or any(part.startswith(".") for part in parts.parts):
            raise ValueError(f"{source}: id {says['id']!r} is no plain folder name, such as task/12")
    return {key: says[key] for key in ("path", "id", "channel", "seed") if key in says}


def _ids(entries: Sequence[_Entry]) -> dict[Path, str]:
    """A name for each file: its place below the folder that all share. A file `12/input.wav` is `12`."""
    if not entries:
        return {}
    named = {}
    for entry in entries:
        whole = entry.path.absolute()
        named[entry.path] = whole.parent if whole.stem == "input" else whole.with_suffix("")
    shared = commonpath([path.parent for path in named.values()])
    return {path: name.relative_to(shared).as_posix() for path, name in named.items()}
