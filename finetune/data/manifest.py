"""Lists of recordings in Kyutai's format, read and checked before anything else happens.

A jsonl file has a line `{"path": "audio/a.wav", "duration": 12.5}` for each recording: stereo, left Moshi,
right the user. `audio/a.json` beside the audio holds `{"alignments": [[word, [start, end], speaker], ...]}`
with times in seconds.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import sphn
from tqdm import tqdm

DURATION_TOLERANCE_SEC = 0.1
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")


@dataclass(frozen=True)
class Word:
    """A word of the transcript; times in seconds from the start of the recording."""

    text: str
    start: float
    end: float
    speaker: str


@dataclass(frozen=True)
class Recording:
    """A stereo recording and its words in the order of their starts."""

    path: Path
    duration_sec: float
    words: tuple[Word, ...]


def read_manifest(jsonl: str | Path, root: str | Path | None = None) -> list[Recording]:
    """Read and check every recording of a jsonl file.

    Args:
        jsonl: the list.
        root: folder that all audio must lie in; None is the folder of the list.
    Raises:
        ValueError: names the file and line of the first thing that is wrong, and what was expected.
    """
    jsonl = Path(jsonl).expanduser()
    if not jsonl.is_file():
        raise ValueError(f"data list {jsonl} does not exist; expected a jsonl file")
    base = jsonl.parent.resolve()
    inside = base if root is None else Path(root).expanduser().resolve()
    try:
        lines = jsonl.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"data list {jsonl} is not UTF-8 text ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"data list {jsonl} is empty; expected a line for each recording")
    bar = tqdm(numbered, desc=f"checking {jsonl.name}", unit="file", disable=None, leave=False)
    return [_read_entry(f"{jsonl}:{number}", line, base, inside) for number, line in bar]


def _read_entry(where: str, line: str, base: Path, inside: Path) -> Recording:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f'{where}: expected {{"path": ..., "duration": seconds}}, got {line[:80]}')
    duration = entry.get("duration")
    if duration is None or not _is_time(duration) or duration <= 0:
        raise ValueError(f"{where}: duration must be a number of seconds above 0, got {duration!r}")
    path = (base / entry["path"]).resolve()
    if not path.is_relative_to(inside):
        raise ValueError(
            f"{where}: {entry['path']} lies outside {inside}; move it there or set data.root to a folder "
            "that holds all audio"
        )
    if not path.is_file():
        raise ValueError(f"{where}: audio file {path} does not exist")
    actual = _check_audio(where, path)
    if abs(actual - duration) > DURATION_TOLERANCE_SEC:
        raise ValueError(f"{where}: duration says {duration} s, {path} has {actual:.3f} s; correct the list")
    return Recording(path, actual, _read_words(path, actual))


def _check_audio(where: str, path: Path) -> float:
    """Duration of a stereo file in seconds, read from its header."""
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{where}: {path} is no audio file that can be read ({error})") from error
    if info.frames == 0:
        raise ValueError(f"{where}: {path} holds no audio")
    if info.channels != 2:
        raise ValueError(
            f"{where}: {path} has {info.channels} channel(s); expected stereo, left Moshi and right the user"
        )
    if info.subtype in _FLOAT_SUBTYPES:  # integer formats cannot hold NaN
        for block in soundfile.blocks(path, blocksize=1 << 20):
            if not np.isfinite(block).all():
                raise ValueError(f"{where}: {path} holds NaN or infinite samples; repair or remove it")
    duration_sec = info.frames / info.samplerate
    _check_last_second(where, path, duration_sec)
    return duration_sec


def _check_last_second(where: str, path: Path, duration_sec: float) -> None:
    """Read the end of a file as clips are read: shows a file cut short, and formats unknown to sphn."""
    start = max(0.0, duration_sec - 1.0)
    try:
        samples, rate = sphn.read(str(path), start_sec=start, duration_sec=1.0)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{where}: {path} cannot be read ({error}); repair it or convert it to wav"
        ) from error
    if samples.shape[0] != 2 or samples.shape[1] == 0:
        raise ValueError(f"{where}: {path} cannot be decoded to stereo samples; convert it to wav or flac")
    if samples.shape[1] / rate < duration_sec - start - DURATION_TOLERANCE_SEC:
        raise ValueError(f"{where}: {path} ends before the {duration_sec:.3f} s that its header promises")


def _read_words(audio: Path, duration_sec: float) -> tuple[Word, ...]:
    path = audio.with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the transcript of {audio.name} with timed words")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("alignments"), list):
        raise ValueError(f'{path}: expected {{"alignments": [[word, [start, end], speaker], ...]}}')
    words = [_read_word(path, index, item, duration_sec) for index, item in enumerate(content["alignments"])]
    return tuple(sorted(words, key=lambda word: word.start))


def _read_word(path: Path, index: int, item: Any, duration_sec: float) -> Word:
    where = f"{path}: alignment {index}"
    match item:
        case [str(text), [start, end], str(speaker)] if _is_time(start) and _is_time(end):
            pass
        case _:
            raise ValueError(f"{where}: expected [word, [start, end], speaker], got {str(item)[:80]}")
    if end > duration_sec + DURATION_TOLERANCE_SEC or start < 0:
        raise ValueError(
            f"{where}: {text!r} at {start}-{end} s is outside the audio, which lasts {duration_sec:.3f} s"
        )
    return Word(text, float(start), float(end), speaker)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
