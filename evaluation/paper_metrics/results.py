"""What a run leaves: results, samples and the table, laid out as lm-evaluation-harness does.

    results_DATE.json             accuracies, intervals, protocol
    samples_TASK_DATE.jsonl       each pair with its scores
    results_DATE.md               the table
    submission/lexical/dev.txt    and so on: what the official tool of sLM21 reads

With `limit` the names have `partial` in them: partial_results_DATE.json, submission_partial.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.paper_metrics.accuracy import METRICS, Estimate, estimates, joined
from evaluation.paper_metrics.anchors import anchor_table
from evaluation.paper_metrics.pairs import Pair, TaskData
from evaluation.paper_metrics.scoring import PRIMARY, SCORINGS, clip_scores, outcome
from evaluation.paper_metrics.slm21 import PARTS
from moshi_ttt.atomic import write_atomically

VERSION = 1
GROUP = "salmon"
NOTES = (
    "Accuracy: how often the right one of two clips is likelier; 50 is chance. These are tests that nothing "
    "was lost. A word of sWUGGY is about 12 frames, shorter than a mini-batch of TTT: none of these numbers "
    "shows what a memory is worth, long recordings do."
)


@dataclass(frozen=True)
class ScoredTask:
    """A task's pairs under every scoring.

    Args:
        data: the task.
        clips: scores by clip and scoring.
        outcomes: 1, 0.5 or 0, `[pairs, scorings]`.
    """

    data: TaskData
    clips: dict[str, dict[str, float]]
    outcomes: np.ndarray


def score_task(data: TaskData, nll: dict[str, np.ndarray]) -> ScoredTask:
    """Scores and outcomes from the NLL `[T, codebooks]` of each clip."""
    clips = {name: clip_scores(values) for name, values in nll.items()}
    outcomes = [
        [outcome(clips[pair.positive][s], clips[pair.negative][s]) for s in SCORINGS] for pair in data.pairs
    ]
    return ScoredTask(data, clips, np.array(outcomes))


def write_results(folder: Path, plan: dict[str, Any], tasks: Sequence[ScoredTask], draws: int) -> str:
    """Write all files; the same plan and likelihoods give the same bytes. Returns the table."""
    protocol, date = plan["identity"]["protocol"], plan["about"]["date"]
    partial = protocol["limit"] is not None
    prefix = "partial_" if partial else ""
    found: dict[str, dict[str, list[Estimate]]] = {}
    for task in tasks:
        found[task.data.name] = estimates(task.data.pairs, task.outcomes, draws, protocol["seed"])
    parts = {t.data.name: (t.data.pairs, t.outcomes) for t in tasks if t.data.name.startswith(f"{GROUP}_")}
    if parts:
        macro = estimates(*joined(parts), draws, protocol["seed"])["acc_macro"]
        found[GROUP] = {"acc": macro}
    content = _content(plan, tasks, found, draws)
    table = result_table(content)
    for task in tasks:
        rows = "".join(json.dumps(row) + "\n" for row in _samples(task, partial))
        write_atomically(folder / f"{prefix}samples_{task.data.name}_{date}.jsonl", rows)
        _write_submission(folder / ("submission_partial" if partial else "submission"), task)
    write_atomically(folder / f"{prefix}results_{date}.md", f"{table}\n\n{anchor_table()}\n\n{NOTES}\n")
    # The last: where it is, all are.
    write_atomically(folder / f"{prefix}results_{date}.json", json.dumps(content, indent=1) + "\n")
    return table


def _content(
    plan: dict[str, Any],
    tasks: Sequence[ScoredTask],
    found: dict[str, dict[str, list[Estimate]]],
    draws: int,
) -> dict[str, Any]:
    identity, about = plan["identity"], plan["about"]
    protocol = identity["protocol"]
    partial = protocol["limit"] is not None
    results = {name: {"alias": name, **_numbers(metrics)} for name, metrics in found.items()}
    if partial:
        for entry in results.values():
            entry["partial"] = True
    names = [task.data.name for task in tasks]
    higher = {name: dict.fromkeys(metrics, True) for name, metrics in found.items()}
    return {
        "results": results,
        "group_subtasks": {GROUP: [n for n in names if n.startswith(f"{GROUP}_")]} if GROUP in found else {},
        "configs": {task.data.name: _task_config(task.data, partial) for task in tasks},
        "versions": dict.fromkeys(found, VERSION),
        "n-shot": dict.fromkeys(found, 0),
        "higher_is_better": higher,
        "n-samples": {t.data.name: {"original": t.data.total, "effective": t.data.clusters} for t in tasks},
        "n_failed": dict.fromkeys(names, 0),  # a clip that cannot be scored ends the run
        "partial": partial,
        "config": {**about["model"], "limit": protocol["limit"], "bootstrap_iters": draws},
        "protocol": protocol,
        "identity": identity,
        "metrics": METRICS,
        "git_hash": about["git_hash"],
        "date": about["date"],
    }


def _task_config(data: TaskData, partial: bool) -> dict[str, Any]:
    return {
        "task": data.name,
        "cluster_unit": data.unit,
        "pairs": len(data.pairs),
        "official_pairs": data.official_pairs,
        "clips": len(data.clips),
        "gold_sha256": data.gold_sha256,
        "clips_sha256": data.digest,
        "partial": partial,
    }


def _numbers(metrics: dict[str, list[Estimate]]) -> dict[str, Any]:
    """Keys as in lm-evaluation-harness: METRIC,FILTER; ours are the scorings, "none" is the primary one."""
    entry: dict[str, Any] = {}
    for metric, columns in metrics.items():
        by_scoring = dict(zip(SCORINGS, columns, strict=True))
        for name, estimate in {"none": by_scoring[PRIMARY], **by_scoring}.items():
            interval = estimate.interval
            entry[f"{metric},{name}"] = _rounded(interval.mean)
            entry[f"{metric}_stderr,{name}"] = _rounded(estimate.stderr)
            entry[f"{metric}_ci95,{name}"] = [_rounded(interval.low), _rounded(interval.high)]
        entry[f"{metric}_n"] = columns[0].clusters
    return entry


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _samples(task: ScoredTask, partial: bool) -> list[dict[str, Any]]:
    rows = []
    for number, (pair, outcomes) in enumerate(zip(task.data.pairs, task.outcomes, strict=True)):
        scores = {s: [task.clips[name][s] for name in (pair.positive, pair.negative)] for s in SCORINGS}
        rows.append(
            {
                "doc_id": number,
                "doc": _document(pair),
                "target": pair.positive,
                "resps": scores,
                "acc": outcomes[SCORINGS.index(PRIMARY)],
                "outcomes": dict(zip(SCORINGS, outcomes.tolist(), strict=True)),
                **({"partial": True} if partial else {}),
            }
        )
    return rows


def _document(pair: Pair) -> dict[str, Any]:
    return {
        "cluster": pair.cluster,
        "voice": pair.voice,
        "positive": pair.positive,
        "negative": pair.negative,
        "stratum": pair.stratum,
        "in_vocab": pair.in_vocab,
        "about": dict(pair.about),
    }


def _write_submission(folder: Path, task: ScoredTask) -> None:
    """Lines `stem score`, as the official tool of sLM21 takes them; nothing for other tasks."""
    name, _, split = task.data.name.partition("_")
    if name not in PARTS:
        return
    lines = [f"{stem} {scores[PRIMARY]:.9g}\n" for stem, scores in sorted(task.clips.items())]
    write_atomically(folder / PARTS[name].folder / f"{split}.txt", "".join(lines))


def result_table(content: dict[str, Any]) -> str:
    """Markdown: a task's metric a row, a scoring a column; intervals for the primary one."""
    others = [scoring for scoring in SCORINGS if scoring != PRIMARY]
    title = f"Accuracy (%), 95 % intervals over ids. Primary scoring: {PRIMARY}."
    if content["partial"]:
        title = f"PARTIAL RESULTS: {content['protocol']['limit']} ids of each task, drawn at random. {title}"
    configs = content["configs"].values()
    fewer = [c for c in configs if c["official_pairs"] not in (None, c["pairs"]) and not content["partial"]]
    lines = [
        title,
        *(
            f"Not the published set: {c['task']} has {c['pairs']} of {c['official_pairs']} pairs."
            for c in fewer
        ),
        "",
        f"| task | ids | {PRIMARY} | " + " | ".join(others) + " |",
        "| --- | --- | --- |" + " --- |" * len(others),
    ]
    for name, entry in content["results"].items():
        for metric in METRICS:
            if f"{metric},none" not in entry:
                continue
            label = name if metric == "acc" else f"{name}, {metric.removeprefix('acc_').replace('_', '-')}"
            label += " (partial)" if content["partial"] else ""
            low, high = entry[f"{metric}_ci95,none"]
            cell = _percent(entry[f"{metric},none"])
            cell += "" if low is None else f" ({_percent(low)}–{_percent(high)})"
            cells = [_percent(entry[f"{metric},{scoring}"]) for scoring in others]
            lines.append(f"| {label} | {entry[f'{metric}_n']} | {cell} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
