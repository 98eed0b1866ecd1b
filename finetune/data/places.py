"""Where data lies: the parts of a data set as the config names them, files in folders, lines of lists.

`dialogues.jsonl`, `folder`, `a.jsonl:0.7,b.jsonl.gz:0.3` as in moshi-finetune; `mono:FOLDER` or
`mono:LIST.jsonl` for recordings of one voice. Nothing here opens audio.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIST_ENDINGS = (".jsonl", ".jsonl.gz")
# In folders of audio; what has another ending is not looked at. Lists may name any file.
AUDIO_ENDINGS = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".webm", ".mka"),
    *(".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
)
# A line holds a path and a number. More is no list, and would be read into memory whole.
MAX_LINE_BYTES = 1 << 20
# Of folders that `finetune.data.prepare` writes.
MANIFEST, PLAN = "prepared.json", "plan.json"


@dataclass(frozen=True)
class Place:
    """One part of a mix: where it lies, its weight, and whether it is mono."""

    path: Path
    weight: float
    mono: bool


def parse_places(spec: str) -> list[Place]:
    """`path`, `path:weight`, `mono:path:weight`, with commas between; or a path that is there as it is."""
    whole = Path(spec).expanduser()
    if spec.strip() and os.path.exists(whole):  # noqa: PTH110 (Path.exists fails on what can be no path)
        return [Place(whole, 1.0, False)]
    places: list[Place] = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        rest = part.removeprefix("mono:")
        name, *weights = rest.split(":")
        if not name or len(weights) > 1:
            raise ValueError(f"{part!r} is no source; expected PATH or PATH:WEIGHT, for one voice mono:PATH")
        weight = _parse_weight(part, weights[0]) if weights else 1.0
        path = Path(name).expanduser()
        if path in [place.path for place in places]:
            raise ValueError(f"{name} is named twice; name it once, with the sum of its weights")
        places.append(Place(path, weight, rest != part))
    if not places:
        raise ValueError(f"{spec!r} names no source; expected PATH, or PATH:WEIGHT with commas between")
    return places


def _parse_weight(part: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{part!r}: the weight must be a number above 0, got {text!r}")
    return weight


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a folder that `finetune.data.prepare` wrote, whole or not."""
    folder = Path(path).expanduser()
    return (folder / MANIFEST).is_file() or (folder / PLAN).is_file()


def files_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files of a folder and those in it, in the order of their names; hidden ones are not looked at."""
    found = []
    for place, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if not name.startswith("."))
        found += [Path(place, name) for name in names if name.lower().endswith(endings)]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"folder {error.filename} cannot be read ({error.strerror})") from error


def numbered_lines(jsonl: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a list that are not blank, with their numbers from 1, read one by one.

    Raises:
        ValueError: the list cannot be read, or has a line that is none of a list.
    """
    number = 0
    try:
        with gzip.open(jsonl) if jsonl.suffix == ".gz" else jsonl.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{jsonl}:{number}: a line of more than {MAX_LINE_BYTES} bytes; no list")
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise ValueError(f"data list {jsonl} does not exist; expected a jsonl file or a folder") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data list {jsonl} cannot be read after line {number} ({error})") from error
