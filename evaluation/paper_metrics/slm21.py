"""sLM21 (ZeroSpeech 2021): sWUGGY, words against non-words, and sBLIMP, sentences with and without a mistake.

    sLM21-dataset/{lexical,syntactic}/{dev,test}/STEM.wav and gold.csv beside them

Rows of gold.csv are found by the names of its columns and paired by keys, in whatever order they come.
"""

import csv
import difflib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from evaluation.paper_metrics.folders import find_folder
from evaluation.paper_metrics.pairs import Pair, TaskData, make_task, raise_problems, wav_stems
from moshi_ttt.digest import sha256

GOLD = "gold.csv"
_REMEDY = "Correct {gold}, or copy it again from the published data set"


@dataclass(frozen=True)
class Part:
    """One half of sLM21.

    Args:
        folder: its name.
        columns: what gold.csv may hold.
        needed: what it must hold.
        key: columns of a pair; the first of a cluster are `cluster`.
        cluster: columns of what is averaged over first.
    """

    folder: str
    columns: tuple[str, ...]
    needed: tuple[str, ...]
    key: tuple[str, ...]
    cluster: tuple[str, ...]


PARTS = {
    "swuggy": Part(
        "lexical",
        ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct"),
        ("filename", "id", "voice", "frequency", "correct"),
        ("id", "voice"),
        ("id",),
    ),
    "sblimp": Part(
        "syntactic",
        ("filename", "id", "voice", "type", "subtype", "transcription", "correct"),
        ("filename", "id", "voice", "type", "subtype", "correct"),
        ("type", "subtype", "id", "voice"),
        ("type", "subtype", "id"),
    ),
}

Row = dict[str, str]


def read_slm21(task: str, split: str, given: str | None) -> TaskData:
    """sWUGGY or sBLIMP, one split.

    Args:
        task: swuggy or sblimp.
        split: dev or test.
        given: the setting data.slm21.
    Raises:
        ValueError: what is wrong, in which file, and what to do.
    """
    part = PARTS[task]
    root = find_folder(
        "data.slm21",
        given,
        lambda folder: any((folder / p.folder).is_dir() for p in PARTS.values()),
        "sLM21-dataset's folders lexical and syntactic",
        "sLM21-dataset",
    )
    folder = root / part.folder / split
    if not folder.is_dir():
        raise ValueError(
            f"{task} needs {folder}, which does not exist; unpack it, or leave {task} out of tasks"
        )
    gold = folder / GOLD
    rows = read_gold(gold, part)
    stems = set(wav_stems(folder))
    _refuse_missing(gold, rows, stems)
    name = f"{task}_{split}"
    clips = {row["filename"]: folder / f"{row['filename']}.wav" for row in rows}
    unit = f"{part.cluster[-1]} with all its voices"
    return make_task(name, unit, pair_rows(gold, part, rows), clips, gold_sha256=sha256(gold))


def read_gold(gold: Path, part: Part) -> list[Row]:
    """Rows of gold.csv, their columns and values checked."""
    if not gold.is_file():
        near = sorted(path for path in gold.parent.parent.rglob("*.csv") if not path.name.startswith("."))
        hint = f"did you mean {near[0]}? Copy it there" if near else "copy it from the published data set"
        raise ValueError(f"{gold} is missing; {hint}: it says which clips are right")
    with gold.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        _check_columns(gold, part, list(reader.fieldnames or []))
        rows = list(reader)
    problems = []
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            problems.append(f"row {number} has not as many fields as there are columns")
        elif row["correct"] not in ("0", "1"):
            problems.append(f"row {number}: correct must be 1 or 0, got {row['correct']!r}")
        elif "frequency" in row and _frequency(row) is None:
            problems.append(f"row {number}: frequency must be a number or empty, got {row['frequency']!r}")
    if not rows:
        problems.append("it has no rows")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        first = seen.setdefault(row["filename"], number)
        if first != number:
            problems.append(f"rows {first} and {number} both name the clip {row['filename']}")
    raise_problems(problems, str(gold), _REMEDY.format(gold=gold.name))
    return rows


def _check_columns(gold: Path, part: Part, columns: list[str]) -> None:
    missing = [column for column in part.needed if column not in columns]
    unknown = [column for column in columns if column not in part.columns]
    if not missing and not unknown and len(set(columns)) == len(columns):
        return
    hint = f"correct its first line; expected {','.join(part.columns)}"
    for name, other in PARTS.items():
        if other != part and set(other.needed) <= set(columns):
            hint = f"these are the columns of {name}: {gold} belongs into {other.folder}"
    if len(columns) == 1:
        hint = f"its fields are not separated by commas; expected {','.join(part.columns)}"
    if not missing:
        hint = f"remove what is not of the published file; expected {','.join(part.columns)}"
    for column in unknown:
        close = difflib.get_close_matches(column.strip().lower(), missing, n=1)
        if close:
            hint = f"is {column!r} the column {close[0]!r}? Rename it"
    raise ValueError(
        f"{gold} has not the columns of {part.folder}: unknown {unknown}, missing {missing}; {hint}"
    )


def _frequency(row: Row) -> float | None:
    """The word's frequency, 0 where it is empty; None if that is no number."""
    try:
        return float(row["frequency"] or 0)
    except ValueError:
        return None


def _refuse_missing(gold: Path, rows: list[Row], stems: set[str]) -> None:
    missing = [row["filename"] for row in rows if row["filename"] not in stems]
    if not missing:
        return
    first = missing[0]
    lower = {stem.lower(): stem for stem in stems}
    remedy = "copy the missing files from the published data set"
    if first.removesuffix(".wav") in stems:
        remedy = f"filename is the stem, without .wav: correct {gold.name}"
    elif first.lower() in lower:
        remedy = f"there is {lower[first.lower()]}.wav: upper and lower case must be those of {gold.name}"
    elif len(missing) == len(rows):
        elsewhere = next(gold.parent.parent.rglob(f"{first}.wav"), None)
        if elsewhere is not None:
            remedy = f"they seem to be in {elsewhere.parent}: move them beside {gold.name}"
    listed = ", ".join(f"{gold.parent / name}.wav" for name in missing[:5])
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise ValueError(f"{gold} names {len(missing)} clips that are missing: {listed}{more}; {remedy}")


def pair_rows(gold: Path, part: Part, rows: list[Row]) -> list[Pair]:
    """Pairs of rows with the same key."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in part.key)].append(row)
    pairs, problems = [], []
    for key, members in groups.items():
        by_label = {row["correct"]: row for row in members}
        named = ", ".join(f"{column} {value}" for column, value in zip(part.key, key, strict=True))
        if len(members) != 2 or len(by_label) != 2:
            labels = ", ".join(f"{row['filename']} ({row['correct']})" for row in members)
            problems.append(f"{named} should have one clip with correct 1 and one with 0, has {labels}")
            continue
        pairs.append(_pair(part, by_label["1"], by_label["0"]))
    vocabulary: dict[str, set[bool | None]] = defaultdict(set)
    for pair in pairs:
        vocabulary[pair.cluster].add(pair.in_vocab)
    problems += [
        f"id {cluster} has frequency 0 with one voice and not with another"
        for cluster, known in vocabulary.items()
        if len(known) > 1
    ]
    raise_problems(problems, str(gold), _REMEDY.format(gold=gold.name))
    return pairs


def _pair(part: Part, right: Row, wrong: Row) -> Pair:
    about = [
        (column, right[column]) for column in ("type", "subtype", "word", "frequency") if column in right
    ]
    return Pair(
        cluster="/".join(right[column] for column in part.cluster),
        voice=right["voice"],
        positive=right["filename"],
        negative=wrong["filename"],
        stratum=right.get("type", ""),
        in_vocab=bool(_frequency(right)) if "frequency" in right else None,
        about=tuple(about),
    )
