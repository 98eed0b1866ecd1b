"""What training recorded of itself: metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from evaluation.report.entries import Model, Number, Run

MOST_RECORDS = 2000  # of a curve: more points than a screen has
TRAINING = "training"
# Statistics of every layer; `python -m evaluation.plot_diagnostics` draws them.
_NOT_CURVES = "diagnostics/"
_DECIDE = ("duration_sec", "first_codebook_weight_multiplier", "text_padding_weight")


def read_run(folder: Path) -> Run:
    """A run's records.

    Raises:
        ValueError: a line that is not a record, or a config that is none.
    """
    records: dict[str, tuple[list[int], list[float]]] = {}
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, split = record.pop("step"), record.pop("split")
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # a run that is being written, or was killed
            raise ValueError(f"{path}:{number} is not a record of training ({error!r})") from error
        if split.startswith(_NOT_CURVES):
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                steps, values = records.setdefault(f"{split}/{name}", ([], []))
                steps.append(step)
                values.append(value)
    longest = max((len(steps) for steps, _ in records.values()), default=0)
    every = math.ceil(longest / MOST_RECORDS) or 1
    # Validation is rare, and every number of it counts.
    thinned = {
        name: (steps[::every], values[::every]) if len(steps) > MOST_RECORDS else (steps, values)
        for name, (steps, values) in records.items()
    }
    return Run(folder, thinned, every, _decides_held_out(folder))


def _decides_held_out(folder: Path) -> dict[str, Any]:
    """Settings without which held-out losses may not be compared; empty for a run without config.yaml."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
        found = {name: config[name] for name in _DECIDE}
        return found | {"data": config["data"]["valid"], "max_clips": config["eval"]["max_clips"]}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a run ({error!r})") from error


def held_out(run: Run, step: int | None = None) -> tuple[Model, list[Number]] | None:
    """Held-out losses at a step of a run, or at the last that has any; None where there are none."""
    found = {name: series for name, series in run.records.items() if name.startswith("valid/")}
    losses = {name: series for name, series in found.items() if name.endswith("loss")}
    steps = sorted({s for series in losses.values() for s in series[0]})
    if not steps or (step is not None and step not in steps):
        return None
    step = steps[-1] if step is None else step
    numbers = [
        Number(TRAINING, "held out", metric, series[1][series[0].index(step)],
               main=metric == "loss", better="lower", unit="nats")
        for name, series in losses.items()
        if step in series[0] and (metric := name.removeprefix("valid/"))
    ]  # fmt: skip
    model = Model(None, f"{run.folder.name}, step {step:,}", str(run.folder), step, str(run.folder))
    return model, numbers
