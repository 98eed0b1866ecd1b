"""Where the material of a report lies: runs have a metrics.jsonl, evaluations a results_DATE.json."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_METRICS = "metrics.jsonl"
_NAMED = 5  # how many empty places an error names
# Folders of many files with nothing to find in them.
_PASSED_BY = {"checkpoints", "wandb", "raw", "nll", "figures", "submission", "submission_partial", "answers"}


@dataclass(frozen=True)
class Sources:
    """What there is to read.

    Args:
        runs: folders; results: files. Each once, in the order given.
        empty: what was given and holds neither, in words.
    """

    runs: list[Path]
    results: list[Path]
    empty: list[str]


def find_sources(given: Sequence[str]) -> Sources:
    """Run folders, and results files, in and under what is given.

    A shell makes `runs/*` of whatever lies there, so one thing that holds nothing is told and not refused.

    Args:
        given: folders, results files, or patterns.
    Raises:
        ValueError: something given is not there, or all of it holds nothing.
    """
    runs: dict[Path, None] = {}
    results: dict[Path, None] = {}
    empty: list[str] = []
    for place in dict.fromkeys(place for name in given for place in _expanded(name)):
        found_runs, found_results = _search(place)
        if not found_runs and not found_results:
            empty.append(_nothing_in(place))
        runs.update(dict.fromkeys(found_runs))
        results.update(dict.fromkeys(found_results))
    if not runs and not results:
        raise ValueError("; ".join(empty[:_NAMED]))
    return Sources(list(runs), list(results), empty)


def _expanded(name: str) -> list[Path]:
    place = Path(name).expanduser()
    if place.exists():
        return [place.resolve()]
    found = sorted(glob.glob(str(place)))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not found:
        near = place.parent
        there = ", ".join(sorted(entry.name for entry in near.iterdir())[:10]) if near.is_dir() else ""
        hint = f"; {near} holds {there}" if there else f"; there is no {near} either"
        raise ValueError(f"{name} matches nothing{hint}")
    return [Path(match).resolve() for match in found]


def _is_results(path: Path) -> bool:
    return path.suffix == ".json" and path.name.removeprefix("partial_").startswith("results_")


def _search(place: Path) -> tuple[list[Path], list[Path]]:
    if place.is_file():
        return [], [place] if _is_results(place) else []
    runs, results = [], []
    for folder, inside, files in os.walk(place):
        inside[:] = sorted(d for d in inside if d not in _PASSED_BY and not d.startswith("."))
        if _METRICS in files:
            runs.append(Path(folder))
        results += [Path(folder) / file for file in sorted(files) if _is_results(Path(file))]
    return runs, results


def _nothing_in(place: Path) -> str:
    verb = "holds" if place.is_dir() else "is"
    wanted = (
        f"{place} {verb} no run ({_METRICS}) and no results (results_DATE.json of "
        "evaluation.paper_metrics, evaluation.long_context or evaluation.speech_quality)"
    )
    if (place / "plan.json").is_file():
        return f"{wanted}: its scoring was not finished, start it again"
    return wanted
