"""The files of a run: results and samples in the layout of lm-evaluation-harness, figures, and the page."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evaluation.long_context.measures import PRIMARY
from evaluation.long_context.page import page
from evaluation.long_context.pictures import TITLES, draw_all
from evaluation.long_context.scoring import VERSION
from evaluation.long_context.settings import LongContextConfig
from evaluation.model_identity import run_of
from moshi_ttt.atomic import write_atomically

TASK = "long_context"
REPORT = "report.html"


def git_hash() -> str | None:
    """The commit that this program is of; None outside of a repository."""
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


def write_results(
    config: LongContextConfig, content: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> list[Path]:
    """Write everything; returns the files, the page first."""
    folder = config.folder
    date = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}"
    results = {
        "results": {TASK: {"alias": TASK} | _flat(content)},
        "configs": {TASK: asdict(config)},
        "versions": {TASK: VERSION},
        "n-samples": {TASK: {"original": content["found"], "effective": len(content["recordings"])}},
        "higher_is_better": {TASK: {"nll": False, "difference": False}},
        "git_hash": git_hash(),
        "date": date,
        "n_failed": 0,  # what cannot be scored is an error
        "ci": {"level": 0.95, "method": "bootstrap, percentiles", "cluster": "speaker"},
        **content,
    }
    pictures = draw_all(content, folder / "figures")
    numbers = folder / f"results_{date}.json"
    each = folder / f"samples_{TASK}_{date}.jsonl"
    write_atomically(numbers, json.dumps(results, indent=1) + "\n")
    write_atomically(each, "".join(json.dumps(sample) + "\n" for sample in samples))
    write_atomically(folder / REPORT, page(title_of(content), content, pictures))
    return [folder / REPORT, numbers, each, *(folder / "figures" / f"{name}.png" for name in pictures)]


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Numbers by name, as tables over many runs read them."""
    flat: dict[str, Any] = {}
    if content["partial"]:
        flat["partial"] = content["partial"]
    if content["headlines"]:
        flat["headline"] = content["headlines"][0]["text"]
        flat["verdict"] = content["headlines"][0]["verdict"]
    rows = {
        f"{name}, {where}": found[where]
        for name, found in content["arms"].items()
        for where in ("all", "beyond")
    }
    for name, pair in content["differences"].items():
        rows |= {f"{name}, {where}": pair[where] for where in ("all", "beyond")}
    for name, streams in rows.items():
        for stream in TITLES:
            mean, low, high, stderr = streams[stream]
            label = name if stream == PRIMARY else f"{name}, {stream}"
            flat |= {f"{label},none": mean, f"{label}_stderr,none": stderr, f"{label}_ci95,none": [low, high]}
    return flat


def title_of(content: dict[str, Any]) -> str:
    """What was run, in one line."""
    about = content["models"].get("checkpoint") or content["models"]["base"]
    if "checkpoint" not in about:
        return f"Long context: {about['model']}"
    folder = Path(about["checkpoint"])
    return f"Long context: {(run_of(folder) or folder).name}, step {about['step']}"


def console(content: dict[str, Any]) -> str:
    """The numbers for a terminal: arms, differences, headline."""
    rows = [("NLL (nats a code)", list(TITLES))]
    rows += [(name, [_text(arm["all"][s]) for s in TITLES]) for name, arm in content["arms"].items()]
    for name, pair in content["differences"].items():
        for key, where in (("all", "all"), ("beyond", f"from frame {pair['from_frame']:,}")):
            rows.append((f"{name}, {where}", [_text(pair[key][s], "+") for s in TITLES]))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:{width}s}" + "".join(f"{cell:>26s}" for cell in cells) for label, cells in rows]
    lines += [
        f"check: {c['what']}: {'holds' if c['holds'] else 'DOES NOT HOLD'}, {c['found']}"
        for c in content["checks"]
    ]
    if content["partial"]:
        lines.append(f"PARTIAL: {content['partial']}")
    return "\n".join([*lines, *(one["text"] for one in content["headlines"])])


def _text(row: Sequence[float | None], sign: str = "") -> str:
    mean, low, high = row[:3]
    if mean is None:
        return "-"
    if low is None or high is None:
        return f"{mean:{sign}.4f}"
    return f"{mean:{sign}.4f} [{low:{sign}.4f} {high:{sign}.4f}]"
