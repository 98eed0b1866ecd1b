"""`python -m evaluation.compare A B`: do two models differ on the paper metrics?

A and B are output folders of evaluation.paper_metrics. Pairs of clips are matched item by item. Each metric's
difference B - A has a 95 % interval by bootstrap over ids, each with all its voices; McNemar's exact test
counts the pairs that only one of the two gets right.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.paper_metrics.accuracy import estimates, joined
from evaluation.paper_metrics.pairs import Pair
from evaluation.paper_metrics.results import GROUP
from evaluation.paper_metrics.scoring import PRIMARY, SCORINGS
from evaluation.paper_metrics.store import differences
from evaluation.statistics import mcnemar


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Args:
        folder: of the results.
        content: of results_DATE.json.
        tasks: pairs and outcomes `[pairs, scorings]` of each task.
    """

    folder: Path
    content: dict[str, Any]
    tasks: dict[str, tuple[list[Pair], np.ndarray]]


@dataclass(frozen=True)
class Comparison:
    """One metric of one task.

    Args:
        task, metric, scoring: what.
        ids: clusters.
        first, second: accuracies of A and B.
        difference, low, high: B - A and its 95 % interval; the interval is None for too few ids.
        only_first, only_second: pairs with a higher outcome in one of the two; None but for the metric acc.
        p_mcnemar: of McNemar's exact test on these; None likewise.
        verdict: in words.
    """

    task: str
    metric: str
    scoring: str
    ids: int
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    only_first: int | None
    only_second: int | None
    p_mcnemar: float | None
    verdict: str


def read_results(given: str) -> Results:
    """The results in a folder.

    Raises:
        ValueError: there are none, or their samples are missing.
    """
    folder = Path(given).expanduser()
    found = sorted(folder.glob("*results_*.json")) if folder.is_dir() else []
    if len(found) != 1:
        inside = [path.parent for path in sorted(folder.glob("*/*results_*.json"))] if folder.is_dir() else []
        hint = f"; did you mean {inside[0]}?" if inside else ""
        unfinished = (
            "; its scoring was not finished, start it again" if (folder / "plan.json").exists() else ""
        )
        raise ValueError(
            f"{folder} holds {len(found)} results_DATE.json, expected 1: the output of one run of "
            f"evaluation.paper_metrics{hint}{unfinished}"
        )
    content = json.loads(found[0].read_text())
    prefix, date = found[0].name.split("results_")[0], content["date"]
    tasks = {}
    for name in content["configs"]:
        path = folder / f"{prefix}samples_{name}_{date}.jsonl"
        if not path.is_file():
            raise ValueError(f"{path} is missing; start evaluation.paper_metrics again to write it")
        tasks[name] = _read_samples(path)
    return Results(folder, content, tasks)


def _read_samples(path: Path) -> tuple[list[Pair], np.ndarray]:
    pairs, outcomes = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        document = {key: value for key, value in row["doc"].items() if key != "about"}
        pairs.append(Pair(**document))
        outcomes.append([row["outcomes"][scoring] for scoring in SCORINGS])
    return pairs, np.array(outcomes)


def refuse_different(first: Results, second: Results) -> list[str]:
    """The tasks that both have.

    Raises:
        ValueError: there are none, or data or protocol differ: then accuracies differ for other reasons.
    """
    a, b = first.content["identity"], second.content["identity"]
    common = [name for name in first.tasks if name in second.tasks]
    if not common:
        raise ValueError(
            f"no task in common: {first.folder} has {', '.join(first.tasks)}, {second.folder} has "
            f"{', '.join(second.tasks)}"
        )
    found = differences(a["protocol"], b["protocol"], "protocol")
    for name in common:
        found += differences(a["data"][name], b["data"][name], name)
        if not found and first.tasks[name][0] != second.tasks[name][0]:
            found.append(f"{name} has other pairs")
    if found:
        raise ValueError(
            f"{first.folder} (there) and {second.folder} (here) are not results of the same data and "
            f"protocol: {'; '.join(found)}. Score both with the same"
        )
    return common


def compare(first: Results, second: Results, draws: int = 10_000, seed: int = 0) -> list[Comparison]:
    """Every metric of every task that both have.

    Raises:
        ValueError: their data or protocols differ.
    """
    common = refuse_different(first, second)
    found = []
    for task in common:
        pairs, outcomes = first.tasks[task]
        found += _compare_task(task, pairs, (outcomes, second.tasks[task][1]), draws, seed)
    parts = [name for name in common if name.startswith(f"{GROUP}_")]
    if len(parts) > 1:
        pairs, outcomes = joined({name: first.tasks[name] for name in parts})
        _, others = joined({name: second.tasks[name] for name in parts})
        whole = _compare_task(GROUP, pairs, (outcomes, others), draws, seed)
        found += [comparison for comparison in whole if comparison.metric == "acc_macro"]
    return found


def _compare_task(
    task: str, pairs: Sequence[Pair], outcomes: tuple[np.ndarray, np.ndarray], draws: int, seed: int
) -> list[Comparison]:
    """All metrics under all scorings from outcomes `[pairs, scorings]` of A and B."""
    a, b = outcomes
    means = [estimates(pairs, values, 1, seed) for values in outcomes]
    found = []
    for metric, columns in estimates(pairs, b - a, draws, seed).items():
        for index, (scoring, difference) in enumerate(zip(SCORINGS, columns, strict=True)):
            first, second = (m[metric][index].interval.mean for m in means)
            interval = difference.interval
            known = not math.isnan(interval.low)
            only_first = only_second = p = None
            if metric == "acc":
                only_first, only_second = (int((x > y)[:, index].sum()) for x, y in ((a, b), (b, a)))
                p = mcnemar(only_first, only_second)
            found.append(
                Comparison(
                    task=task,
                    metric=metric,
                    scoring=scoring,
                    ids=difference.clusters,
                    first=first,
                    second=second,
                    difference=interval.mean,
                    low=interval.low if known else None,
                    high=interval.high if known else None,
                    only_first=only_first,
                    only_second=only_second,
                    p_mcnemar=p,
                    verdict=verdict(interval.low, interval.high),
                )
            )
    return found


def verdict(low: float, high: float) -> str:
    """What an interval of B - A says, in words."""
    if math.isnan(low):
        return "no difference shown (too few ids for an interval)"
    if low > 0:
        return "B is better"
    if high < 0:
        return "A is better"
    return "no difference shown"


def comparison_table(first: Results, second: Results, found: Sequence[Comparison]) -> str:
    """Markdown: the primary scoring, a metric a row; then which verdicts other scorings give."""
    lines = [f"A: {first.folder} ({_model(first)})", f"B: {second.folder} ({_model(second)})"]
    for results, name in ((first, "A"), (second, "B")):
        left_out = [task for task in results.tasks if task not in {c.task for c in found}]
        if left_out:
            lines.append(f"Only in {name}, not compared: {', '.join(left_out)}")
    if first.content["partial"]:
        lines.append(
            f"PARTIAL RESULTS: {first.content['protocol']['limit']} ids of each task, drawn at random."
        )
    lines += [
        "",
        f"Accuracy (%) under {PRIMARY}; difference B - A in points with its 95 % interval (bootstrap over "
        "ids). McNemar's test takes pairs as independent, which voices of one id are not: where an id has "
        "several, go by the interval.",
        "",
        "| task | ids | A | B | B - A | only A right | only B right | McNemar p | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    partial = " (partial)" if first.content["partial"] else ""
    lines += [_row(c, partial) for c in found if c.scoring == PRIMARY]
    lines += ["", "Verdicts under the other scorings:", ""]
    for task, metric in dict.fromkeys((c.task, c.metric) for c in found):
        others = [c for c in found if (c.task, c.metric) == (task, metric) and c.scoring != PRIMARY]
        said = "; ".join(f"{c.scoring} {100 * c.difference:+.1f}, {c.verdict}" for c in others)
        lines.append(f"- {_label(task, metric)}{partial}: {said}")
    return "\n".join(lines)


def _model(results: Results) -> str:
    config = results.content["config"]
    if "baseline" in config:
        return f"baseline {config['baseline']}"
    return f"checkpoint {config['checkpoint']}"


def _label(task: str, metric: str) -> str:
    return (
        task
        if metric == "acc" or task == GROUP
        else f"{task}, {metric.removeprefix('acc_').replace('_', '-')}"
    )


def _row(c: Comparison, partial: str) -> str:
    interval = "" if c.low is None or c.high is None else f" ({100 * c.low:+.1f} to {100 * c.high:+.1f})"
    counts = ["" if n is None else str(n) for n in (c.only_first, c.only_second)]
    p = "" if c.p_mcnemar is None else f"{c.p_mcnemar:.2g}"
    cells = [
        *(
            f"{_label(c.task, c.metric)}{partial}",
            str(c.ids),
            f"{100 * c.first:.1f}",
            f"{100 * c.second:.1f}",
        ),
        *(f"{100 * c.difference:+.1f}{interval}", *counts, p, c.verdict),
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="output folder of evaluation.paper_metrics")
    parser.add_argument("second", metavar="B", help="another one, of the same data and protocol")
    parser.add_argument("--output", type=Path, help="also write the numbers, NAME.json")
    parser.add_argument("--draws", type=int, default=10_000, help="sets of ids drawn for the intervals")
    given = parser.parse_args(arguments)
    try:
        if given.draws < 1:
            raise ValueError(f"--draws must be at least 1, got {given.draws}")
        first, second = read_results(given.first), read_results(given.second)
        found = compare(first, second, given.draws)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(comparison_table(first, second, found))
    if given.output is not None:
        content = {
            "A": str(first.folder),
            "B": str(second.folder),
            "partial": first.content["partial"],
            "draws": given.draws,
            "comparisons": [asdict(comparison) for comparison in found],
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
