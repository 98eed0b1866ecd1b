"""Lists of recordings in Kyutai's format, read and checked before anything else happens.

A jsonl file, or one packed as .jsonl.gz, has a line `{"path": "audio/a.wav", "duration": 12.5}` for each
recording: stereo, left Moshi, right the user. Paths are relative to the list. `audio/a.json` beside the audio
holds its words (finetune/data/transcript.py).
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from finetune.data.audio import DURATION_TOLERANCE_SEC, check_audio, read_header, require_channels
from finetune.data.bad_input import BadInput
from finetune.data.places import numbered_lines
from finetune.data.recording import Recording as Recording
from finetune.data.recording import UserChannel
from finetune.data.recording import Word as Word
from finetune.data.transcript import WordsOnDemand, is_time, parse_json, read_words

# 11 days. Clips of what a list calls longer would fill the memory before anything is read.
MAX_DURATION_SEC = 1e6


@dataclass(frozen=True)
class Rules:
    """How recordings are to be read.

    Args:
        inside: folder that all audio must lie in.
        check_files: open every file now; otherwise lists are believed until a file is used.
        mono: recordings have one channel, the voice that Moshi learns, and no transcript.
        noise_dbfs: level of the noise that is the user of mono recordings; None is silence.
    """

    inside: Path
    check_files: bool = True
    mono: bool = False
    noise_dbfs: float | None = None


def read_manifest(jsonl: str | Path, root: str | Path | None = None) -> list[Recording]:
    """Read and check every stereo recording of a jsonl file.

    Args:
        jsonl: the list.
        root: folder that all audio must lie in; None is the folder of the list.
    Raises:
        ValueError: names the file and line of the first thing that is wrong, and what was expected.
    """
    jsonl = Path(jsonl).expanduser()
    inside = jsonl.resolve().parent if root is None else Path(root).expanduser().resolve()
    return read_list(jsonl, Rules(inside), BadInput())


def read_list(jsonl: Path, rules: Rules, bad_input: BadInput) -> list[Recording]:
    """Read the recordings of a jsonl file.

    Raises:
        ValueError: the list itself cannot be read; or a recording, as `bad_input` decides.
    """
    lines = list(numbered_lines(jsonl))
    if not lines:
        raise ValueError(f"data list {jsonl} is empty; expected a line for each recording")
    base = str(jsonl.resolve().parent)
    recordings = []
    bad_input.expect(len(lines))
    hidden = None if rules.check_files else True
    for number, line in tqdm(lines, f"checking {jsonl.name}", unit="file", disable=hidden, leave=False):
        where = f"{jsonl}:{number}"
        try:
            recordings.append(_read_entry(line, base, rules))
        except ValueError as error:
            bad_input.skip(where, ValueError(f"{where}: {error}"))
    return recordings


def _read_entry(line: bytes, base: str, rules: Rules) -> Recording:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        shown = line[:80].decode("utf-8", "replace").strip()
        raise ValueError(f'expected {{"path": ..., "duration": seconds}}, got {shown}')
    duration = entry.get("duration")
    if not is_time(duration) or duration <= 0:
        raise ValueError(f"duration must be a number of seconds above 0, got {duration!r}")
    if duration > MAX_DURATION_SEC:
        raise ValueError(f"duration must be at most {MAX_DURATION_SEC:g} s, got {duration!r}")
    return read_recording(locate(entry["path"], base, str(rules.inside)), rules, float(duration))


def read_recording(path: Path, rules: Rules, listed_sec: float | None = None) -> Recording:
    """A recording as the rules want it read.

    Args:
        path: where `locate` found it.
        listed_sec: its duration as a list has it, if it is in one.
    """
    user = None
    if rules.mono:
        name = path.relative_to(rules.inside).as_posix()
        user = UserChannel(rules.noise_dbfs, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
    num_channels = 1 if rules.mono else 2
    if rules.check_files:
        duration = check_audio(path, num_channels)
        if listed_sec is not None and abs(duration - listed_sec) > DURATION_TOLERANCE_SEC:
            raise ValueError(f"duration says {listed_sec} s, {path} has {duration:.3f} s; correct the list")
    elif listed_sec is not None:
        duration = listed_sec
    else:
        header = read_header(path)
        require_channels(path, header.channels, num_channels)
        duration = header.duration_sec
    if rules.mono:
        return Recording(path, duration, None, user)
    words = read_words(path, duration) if rules.check_files else WordsOnDemand(path, duration)
    return Recording(path, duration, words)


def locate(name: str, base: str, inside: str) -> Path:
    """The file that `name`, relative to `base`, leads to: every link followed, and in no other folder.

    Strings, and folders that are remembered: lists have a million lines.
    """
    try:
        folder, last = os.path.split(os.path.join(base, name))
        path = os.path.join(_real_folder(folder), last)
        if last in ("", ".", ".."):
            path = os.path.realpath(path)
        mode = _mode(path)
        if stat.S_ISLNK(mode):
            path = os.path.realpath(path)
            mode = _mode(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"audio file {name!r} cannot be looked at ({error})") from error
    if not path.startswith(inside.rstrip("/") + "/"):
        raise ValueError(
            f"{name} lies outside {inside}; move it there or set data.root to a folder that holds all audio"
        )
    if not stat.S_ISREG(mode):
        raise ValueError(f"audio file {path} does not exist" + (", or is no file" if mode else ""))
    return Path(path)


def _mode(path: str) -> int:
    """What is there, not following a link; 0 is nothing."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


@lru_cache(maxsize=65_536)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
