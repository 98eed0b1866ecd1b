"""Which recordings there are, and who speaks in each: Libri-Light's layout, folders, lists and patterns."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.audio import check_audio, read_header
from finetune.data.entries import AUDIO_ENDINGS, LIST_ENDINGS, BadEntry, Source, list_sources

LAYOUT = "SPEAKER/BOOK/CHAPTER.flac"


@dataclass(frozen=True)
class LongRecording:
    """A recording of one voice on Moshi's stream.

    Args:
        name: for people, unique in its run.
        path: the audio.
        speaker: whose voice; recordings of one speaker are no independent measurements.
        duration_sec, channels: of the file; a second channel is the user.
    """

    name: str
    path: Path
    speaker: str
    duration_sec: float
    channels: int


def find_recordings(spec: str) -> list[LongRecording]:
    """All recordings that a config names, every file opened.

    Raises:
        ValueError: nothing there, a folder a level too high or too low, or a file that cannot be used.
    """
    parts = [spec] if Path(spec).expanduser().exists() else [part.strip() for part in spec.split(",")]
    found = [one for part in parts if part for one in _find(part)]
    if not found:
        raise ValueError(f"recordings={spec!r} names nothing; expected a folder, a jsonl or a pattern")
    paths = [path for path, _ in found]
    by_stem: dict[Path, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.with_suffix(""), path)
        if other is path:
            continue
        if other == path:
            raise ValueError(f"recordings={spec} names {path} twice; name it once")
        raise ValueError(
            f"{other} and {path.name} have one stem: they would be scored as one, twice. Remove one of "
            "them, or rename it if it is another recording"
        )
    return [_opened(name, *one) for name, one in zip(_names(paths), found, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of the same depth, that tell them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [Path(*path.parts[-depth:]).with_suffix("").as_posix() for path in paths]


def _opened(name: str, path: Path, speaker: str) -> LongRecording:
    channels = read_header(path).channels
    if channels > 2:
        raise ValueError(f"{path} has {channels} channels; expected one voice, or left it and right the user")
    return LongRecording(name, path, speaker, check_audio(path, channels), channels)


def _find(part: str) -> list[tuple[Path, str]]:
    """(audio, speaker) of one folder, list, file or pattern."""
    place = Path(part).expanduser()
    if place.is_dir() and not any(path.name.endswith(LIST_ENDINGS) for path in place.iterdir()):
        return _in_folder(place.resolve(), [source.path for source in _sources(place)])
    if place.name.endswith(LIST_ENDINGS) or place.is_dir():
        return [(s.path, s.speaker or _beside(s.path).get("speaker") or s.path.stem) for s in _sources(place)]
    if place.is_file():
        files = [place]
    else:
        fixed = next((parent for parent in place.parents if parent.is_dir()), Path())
        fitting = sorted(fixed.glob(str(place.relative_to(fixed))))
        files = [path for path in fitting if path.suffix.lower() in AUDIO_ENDINGS]
        if not files:
            raise ValueError(f"recordings={part} does not exist, and as a pattern it fits no audio file")
    return [(path.resolve(), _beside(path).get("speaker") or path.stem) for path in files]


def _sources(place: Path) -> list[Source]:
    sources = []
    for entry in list_sources(place):
        if isinstance(entry, BadEntry):
            raise ValueError(f"{entry.where}: {entry.reason}")
        if not entry.path.is_file():
            raise ValueError(f"{entry.where}: audio file {entry.path} does not exist")
        sources.append(entry)
    return sources


def _in_folder(root: Path, files: Sequence[Path]) -> list[tuple[Path, str]]:
    """Recordings of a folder by how deep they lie.

    Raises:
        ValueError: they lie at different depths, or it is Libri-Light's layout a level too high or too low.
    """
    by_depth = {len(path.relative_to(root).parts): path for path in reversed(files)}
    if len(by_depth) > 1:
        shown = " and ".join(str(path) for _, path in sorted(by_depth.items())[:2])
        raise ValueError(
            f"recordings of {root} lie at different depths, such as {shown}; expected {LAYOUT} throughout. "
            "Name the folders one by one, with commas between, or make a jsonl with a speaker for each"
        )
    ((depth, first),) = by_depth.items()
    about = _beside(first)
    levels = 3 - depth if "book_meta" in about else 0
    if levels > 0:
        guess = root.parents[levels - 1]
        raise ValueError(
            f"{root} is {levels} level{'s' * (levels > 1)} too deep for Libri-Light's {LAYOUT}: it holds "
            f"{first.relative_to(root)}, of speaker {about.get('speaker')}; use recordings={guess}"
        )
    if depth > 3:
        guesses = sorted({str(Path(root, *path.relative_to(root).parts[: depth - 3])) for path in files})
        raise ValueError(
            f"{root} is {depth - 3} level{'s' * (depth > 4)} too high for {LAYOUT}: it holds "
            f"{first.relative_to(root)}; use recordings={','.join(guesses[:3])}"
        )
    # SPEAKER/BOOK/CHAPTER or SPEAKER/RECORDING; in a flat folder every recording is taken for another voice.
    return [(path, _speaker(path, path.relative_to(root).parts[0] if depth > 1 else None)) for path in files]


def _speaker(path: Path, folder: str | None) -> str:
    written = _beside(path).get("speaker")
    if folder is not None and written is not None and written != folder:
        raise ValueError(
            f"{path.with_suffix('.json')} says speaker {written}, its folder says {folder}; expected {LAYOUT}"
        )
    return folder or written or path.stem


def _beside(path: Path) -> dict[str, Any]:
    """What Libri-Light says of a recording, if it does; of a transcript, nothing."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        return {}
    return content | ({"speaker": str(content["speaker"])} if "speaker" in content else {})


def drawn(recordings: Sequence[LongRecording], limit: int | None, seed: int) -> list[LongRecording]:
    """At most `limit` recordings, one of each speaker before a second of any; all without a limit."""
    if limit is None or limit >= len(recordings):
        return list(recordings)
    shuffled = random.Random(seed).sample(list(recordings), len(recordings))
    earlier: dict[str, int] = {}
    turns = []
    for recording in shuffled:
        turns.append(earlier.get(recording.speaker, 0))
        earlier[recording.speaker] = turns[-1] + 1
    chosen = sorted(range(len(shuffled)), key=lambda i: turns[i])[:limit]
    kept = {shuffled[i].path for i in chosen}
    return [recording for recording in recordings if recording.path in kept]


def speakers_of(recordings: Sequence[LongRecording]) -> list[str]:
    """Who speaks, each once."""
    return sorted({recording.speaker for recording in recordings})
