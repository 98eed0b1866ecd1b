"""The content of a report: a row for each model, columns of numbers that may be compared, curves."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.model_identity import digest_of
from evaluation.paper_metrics.anchors import ANCHORS, COLUMNS
from evaluation.paper_metrics.store import differences
from evaluation.report.entries import Model, Number, Result, Run
from evaluation.report.training import TRAINING, held_out

Row = dict[str, Any]


def assemble(runs: Sequence[Run], results: Sequence[Result]) -> dict[str, Any]:
    """Everything that the page shows, in plain types.

    Where one model was measured twice in the same way, the newest counts, which a remark says.
    """
    remarks = [
        f"{run.folder.name}: every {run.thinned}th record of training is drawn"
        for run in runs
        if run.thinned > 1
    ]
    remarks += [f"{run.folder.name}: nothing is recorded yet" for run in runs if not run.records]
    columns = _Columns()
    rows = _Rows()
    for result in sorted(results, key=lambda one: one.date):
        row = rows.of(result.model)
        for number in result.numbers:
            protocol = result.protocol[number.task]
            # Of another sub-sample, or of none: not to be compared, whatever else is the same.
            key = columns.of(number, protocol | {"partial": result.partial or None}, result.partial)
            if key in row["numbers"]:
                earlier = row["numbers"][key]["source"]
                remarks.append(
                    f"{row['name']}: {number.task} was measured twice; {result.path} is shown, {earlier} not"
                )
            row["numbers"][key] = _cell(number, str(result.path), result.partial)
        row["sources"].append({"path": str(result.path), "date": result.date, "partial": result.partial})
        if result.curves:
            row["curves"] = result.curves | {"partial": result.partial}
        if result.voice:
            row["voice"] = result.voice | {"partial": result.partial}
    _add_held_out(rows, columns, runs)
    return {
        "rows": rows.named(),
        "columns": columns.listed(),
        "runs": _records(runs),
        "anchors": [asdict(anchor) for anchor in ANCHORS],
        "anchor_columns": list(COLUMNS),
        "remarks": [*dict.fromkeys(remarks), *columns.remarks()],
    }


def _cell(number: Number, source: str, partial: str) -> dict[str, Any]:
    return {
        "value": number.value,
        "low": number.low,
        "high": number.high,
        "n": number.n,
        "source": source,
        "partial": partial,
    }


def _add_held_out(rows: "_Rows", columns: "_Columns", runs: Sequence[Run]) -> None:
    """Held-out losses, for the steps that were evaluated; a run without any has a row of its last step."""
    for run in runs:
        steps = rows.steps_of(str(run.folder)) or [None]
        for step in steps:
            found = held_out(run, step)
            if found is None and step is None and run.records:
                last = max(steps[-1] for steps, _ in run.records.values())
                rows.of(
                    Model(None, f"{run.folder.name}, step {last:,}", str(run.folder), last, str(run.folder))
                )
            if found is not None:
                model, numbers = found
                row = rows.of(model)
                for number in numbers:
                    key = columns.of(number, run.held_out, "")
                    row["numbers"][key] = _cell(number, f"{run.folder}/metrics.jsonl", "")


def _records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    names = _distinct([run.folder for run in runs])
    return [
        {
            "run": str(run.folder),
            "name": name,
            "records": {
                metric: [x, [float(f"{v:.6g}") for v in y]] for metric, (x, y) in run.records.items()
            },
        }
        for run, name in zip(runs, names, strict=True)
    ]


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as much of the path before them as it takes to tell them apart."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)) or depth > max(len(f.parts) for f in folders):
            return names
        depth += 1


class _Rows:
    """Models, each once: by its files, or by its run and step."""

    def __init__(self):
        self._rows: list[Row] = []
        self._models: list[Model] = []

    def of(self, model: Model) -> Row:
        for known, row in zip(self._models, self._rows, strict=True):
            same_files = known.sha256 is not None and known.sha256 == model.sha256
            same_step = model.run is not None and (known.run, known.step) == (model.run, model.step)
            # Training went on under another seed in the same folder: the same step, other files.
            if same_files or (same_step and None in (known.sha256, model.sha256)):
                return row
        row: Row = {"numbers": {}, "sources": [], "curves": None, "voice": None}
        self._models.append(model)
        self._rows.append(row)
        row |= {"name": model.name}
        return row

    def steps_of(self, run: str) -> list[int | None]:
        return [model.step for model in self._models if model.run == run]

    def named(self) -> list[Row]:
        """All rows, in the order of runs and steps, with names that tell them apart."""
        runs = [Path(model.run) if model.run else Path(model.about) for model in self._models]
        found = []
        for model, row, name in zip(self._models, self._rows, _distinct(runs) if runs else [], strict=True):
            step = "" if model.step is None else f", step {model.step:,}"
            label = f"{name}{step}" if model.step is not None else model.name
            about = {"run": model.run, "step": model.step, "sha256": model.sha256, "about": model.about}
            found.append(row | about | {"name": label})
        found.sort(key=lambda row: (row["run"] or "", row["step"] or 0))
        names = [row["name"] for row in found]
        for number, row in enumerate(found):
            if names.count(names[number]) > 1:
                row["name"] += f" ({(row['sha256'] or 'training')[:8]})"
            row["id"] = f"m{number}"
        return found


class _Columns:
    """Columns: one for each metric, task and protocol."""

    def __init__(self):
        self._columns: dict[str, dict[str, Any]] = {}

    def of(self, number: Number, protocol: dict[str, Any], partial: str) -> str:
        key = f"{number.group}|{number.task}|{number.metric}|{digest_of(protocol)[:12]}"
        if key not in self._columns:
            self._columns[key] = {
                "key": key,
                "protocol": protocol,
                "partial": partial,
                **{
                    name: getattr(number, name)
                    for name in ("group", "task", "metric", "main", "better", "unit", "chance")
                },
            }
        return key

    def listed(self) -> list[dict[str, Any]]:
        """In the order of groups; columns of one metric under several protocols are numbered."""
        counts: dict[tuple[str, str, str], int] = {}
        listed = []
        for column in self._columns.values():
            metric = (column["group"], column["task"], column["metric"])
            counts[metric] = counts.get(metric, 0) + 1
            listed.append(column | {"protocol_number": counts[metric]})
        for column in listed:
            metric = (column["group"], column["task"], column["metric"])
            column["protocols"] = counts[metric]
        return sorted(listed, key=lambda column: column["group"] != TRAINING)

    def remarks(self) -> list[str]:
        """Where numbers may not be compared, and why."""
        by_task: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for column in self._columns.values():
            known = by_task.setdefault((column["group"], column["task"]), [])
            if column["protocol"] not in known:
                known.append(column["protocol"])
        said = []
        for (_, task), protocols in by_task.items():
            for number, other in enumerate(protocols[1:], 2):
                what = "; ".join(_short(text) for text in differences(protocols[0], other, ""))
                said.append(
                    f"{task} was measured in {len(protocols)} ways, whose numbers stand in columns of their "
                    f"own. Way {number} (here) differs from way 1 (there): {what}"
                )
        return said


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
