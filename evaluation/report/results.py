"""Results files of the evaluations, read into numbers of models."""

import json
import math
from pathlib import Path
from typing import Any

from evaluation.long_context.measures import PRIMARY
from evaluation.long_context.results import TASK as LONG_CONTEXT
from evaluation.model_identity import digest_of, run_of
from evaluation.report.entries import Model, Number, Result

PAPER = "paper metrics"
LONG = "long context"
SPEECH = "speech quality"
_METRIC = ",none"  # keys of lm-evaluation-harness: METRIC,FILTER


def read_result(path: Path) -> Result:
    """The numbers of a results file.

    Raises:
        ValueError: it is not one of ours, or of a version that did not record which model it measured.
    """
    try:
        content = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except ValueError as error:  # no JSON, no text, or a number that is none
        raise ValueError(f"{path} is damaged ({error}); evaluate again, or take it away") from error
    if not isinstance(content, dict) or not {"results", "configs", "date"} <= content.keys():
        raise ValueError(
            f"{path} is not a results file: it lacks results, configs or date. Expected what "
            "evaluation.paper_metrics, evaluation.long_context or evaluation.speech_quality write"
        )
    if LONG_CONTEXT in content["results"]:
        read = _long_context
    elif "identity" in content:
        read = _paper_metrics
    elif "models" in content:
        read = _speech_quality
    else:
        raise ValueError(f"{path} does not say which model it measured; evaluate it again with this version")
    try:
        return read(path, content)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has not all that this version writes ({error!r}); evaluate again, or take it away"
        ) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def model_of(about: dict[str, Any], sha256: str | None) -> Model:
    """A model from what a result says of it: a checkpoint and its step, or the source of a baseline."""
    if "checkpoint" not in about:
        source = str(about.get("baseline") or about.get("model"))
        name = Path(source).name if Path(source).is_dir() else source
        return Model(sha256, name, None, None, source)
    run = run_of(about["checkpoint"])
    named = run or Path(about["checkpoint"])
    step = int(about["step"])
    return Model(sha256, f"{named.name}, step {step:,}", str(run) if run else None, step, str(named))


def _paper_metrics(path: Path, content: dict[str, Any]) -> Result:
    numbers = []
    parts = set(content["group_subtasks"].get("salmon", ()))
    for task, entry in content["results"].items():
        for metric in content["metrics"]:
            key = f"{metric}{_METRIC}"
            if key in entry:
                low, high = entry[f"{metric}_ci95{_METRIC}"]
                main = metric == "acc" and task not in parts
                percents = [None if x is None else 100 * x for x in (entry[key], low, high)]
                n = entry[f"{metric}_n"]
                numbers.append(Number(PAPER, task, metric, *_known(percents), main, "higher", "%", 50.0, n))
    identity, shared = content["identity"], content["protocol"]
    protocol = {
        task: {
            **shared,
            "data": identity["data"].get(task) or {p: identity["data"][p] for p in sorted(parts)},
        }
        for task in content["results"]
    }
    limit = shared["limit"]
    partial = f"limit={limit}: {limit} ids of each task" if content["partial"] else ""
    model = model_of(content["config"], digest_of(identity["model"]))
    return Result(path, content["date"], model, numbers, protocol, partial)


def _long_context(path: Path, content: dict[str, Any]) -> Result:
    about = content["models"].get("checkpoint") or content["models"]["base"]
    if "sha256" not in about:
        raise ValueError(
            f"{path} does not say which files its model had; start evaluation.long_context again with the "
            "same output: what is scored is kept, and the results are written anew"
        )
    numbers = []
    for kind, found in (("NLL", content["arms"]), ("difference", content["differences"])):
        for name, entry in found.items():
            for where in ("all", "beyond"):
                mean, low, high, _ = entry[where][PRIMARY]
                if mean is not None:
                    metric = f"{kind}, {_WHERE[where]}"
                    main = (name, where) == (content_headline(content), "beyond")
                    n = entry["beyond_speakers"] if where == "beyond" else None
                    row = (mean, low, high)
                    numbers.append(Number(LONG, name, metric, *row, main, "lower", "nats", None, n))
    config = content["configs"][LONG_CONTEXT]
    rows = {name: content["protocol"][name] for name in ("streams", "score", "statistics", "frames")}
    shared = {
        **rows,
        "recordings": sorted(recording["sha256"] for recording in content["recordings"]),
        **{name: config[name] for name in ("limit", "max_sec", "reset_frames")},
    }
    protocol = {number.task: shared for number in numbers}
    model = model_of(about, about["sha256"])
    return Result(path, content["date"], model, numbers, protocol, content["partial"], _curves(content))


_WHERE = {"all": "all frames", "beyond": "beyond attention"}


def content_headline(content: dict[str, Any]) -> str | None:
    """The pair of arms that the headline is about."""
    return " - ".join(content["headlines"][0]["of"]) if content["headlines"] else None


def _curves(content: dict[str, Any]) -> dict[str, Any]:
    """NLL of arms and their differences over positions, as a page draws them."""
    reaches = {name: arm["receptive_field_frames"] for name, arm in content["arms"].items()}
    lines = {name: arm["curve"] for name, arm in content["arms"].items()}
    lines |= {name: pair["curve"] for name, pair in content["differences"].items()}
    buckets = content["buckets"]
    return {
        "frames": [math.sqrt(max(b["from_frame"], 1) * b["to_frame"]) for b in buckets],
        "frame_rate": content["frame_rate"],
        "lines": {
            name: {s: [row[:3] for row in rows] for s, rows in streams.items()}
            for name, streams in lines.items()
        },
        "reaches": {name: reaches[name.split(" - ")[0]] for name in lines},
        "headline": content_headline(content),
        "verdict": content["headlines"][0]["text"] if content["headlines"] else "",
    }


def _speech_quality(path: Path, content: dict[str, Any]) -> Result:
    numbers = []
    for task, entry in content["results"].items():
        for metric, about in content["metrics"][task].items():
            mean, (low, high) = entry[f"{metric}{_METRIC}"], entry[f"{metric}_ci95{_METRIC}"]
            if mean is not None:
                kind = (about["main"], about["better"], about["unit"], None)
                numbers.append(Number(SPEECH, task, metric, mean, low, high, *kind, entry[f"{metric}_n"]))
    about = content["models"]["checkpoint"]
    model = model_of(about, about["sha256"])
    over_time = content["similarity_over_time"]
    voice = {
        "seconds": [(b["from_sec"] + b["to_sec"]) / 2 for b in over_time],
        "rows": [b["row"] for b in over_time],
    }
    return Result(
        path,
        content["date"],
        model,
        numbers,
        content["protocol"],
        content["partial"],
        voice=voice if over_time else {},
    )


def _known(values: list[float | None]) -> tuple[float, float | None, float | None]:
    mean, low, high = values
    assert mean is not None
    return mean, low, high
