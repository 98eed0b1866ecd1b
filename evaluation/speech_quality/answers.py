"""The answers in a folder of inference.batch: all of one model and whole, before anything is heard."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.model_identity import digest_of
from finetune.data.audio import check_audio, read_header
from inference.batch.outputs import META

OUTPUT, STEREO, TEXT = "output.wav", "stereo.wav", "text.json"
_NAMED = 5  # how many problems an error names


@dataclass(frozen=True)
class Answer:
    """One item.

    Args:
        id: its folder below the output's.
        folder: the files.
        meta: of meta.json.
        text: Moshi's inner monologue.
        seconds: of audio.
    """

    id: str
    folder: Path
    meta: dict[str, Any]
    text: str
    seconds: float


@dataclass(frozen=True)
class Answers:
    """What a folder holds.

    Args:
        items: in the order of their ids.
        model: what all of them are by: checkpoint, step, and `sha256` of its files.
        sampling: what all of them were drawn with.
        inputs_sha256: of the recordings that were answered, one for all.
        failed: ids of recordings that inference.batch could not answer.
        found: items before sub-sampling.
    """

    items: list[Answer]
    model: dict[str, Any]
    sampling: dict[str, Any]
    inputs_sha256: str
    failed: list[str]
    found: int

    @property
    def partial(self) -> str:
        """ "" or how much is missing."""
        short = self.sampling["max_sec"]
        parts = [] if len(self.items) == self.found else [f"limit: {len(self.items)} of {self.found} answers"]
        return "; ".join(parts + ([] if short is None else [f"max_sec={short:g}: only starts were answered"]))


def find_answers(given: str, limit: int | None, seed: int) -> Answers:
    """The answers in a folder, or `limit` of them drawn at random.

    Raises:
        ValueError: there are none, something of one is missing, empty or damaged, or two models made them.
    """
    root = Path(given).expanduser()
    if not root.is_dir():
        raise ValueError(f"answers={root} is no folder; give one that inference.batch wrote (its output=)")
    if (root / META).is_file():
        raise ValueError(f"answers={root} is one answer; did you mean answers={_above(root)}?")
    folders = _item_folders(root)
    if not folders:
        raise ValueError(_none(root))
    items, problems = [], []
    for folder in folders:
        try:
            items.append(_read(folder, folder.relative_to(root).as_posix()))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError("; ".join(problems[:_NAMED]) + more)
    found = _all_of_one(items)
    kept = items
    if limit is not None and limit < len(items):
        drawn = np.random.default_rng(seed).choice(len(items), limit, replace=False)
        kept = [items[i] for i in sorted(drawn)]
    inputs = [item.meta["settings"]["input_sha256"] for item in kept]
    done = {item.id for item in items}
    failed = [name for name in _failed(root) if name not in done]
    return replace(found, items=kept, inputs_sha256=digest_of({"inputs": sorted(inputs)}), failed=failed)


def _item_folders(root: Path) -> list[Path]:
    """Folders that hold a finished answer."""
    found = []
    for place, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if META in files:
            found.append(Path(place))
            inside.clear()
    return sorted(found)


def _above(item: Path) -> Path:
    """The folder whose item it is: the highest above that holds summaries of inference.batch, or the next."""
    return next((folder for folder in item.resolve().parents if _summaries(folder)), item.resolve().parent)


def _none(root: Path) -> str:
    near = [folder for folder in sorted(root.resolve().parent.iterdir()) if folder.is_dir()]
    guess = next((folder for folder in near if _summaries(folder)), None)
    holds = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
    hint = f"did you mean answers={guess}?" if guess else "give the output= of inference.batch"
    return f"answers={root} holds no finished answer (ITEM/{META}), but {holds}; {hint}"


def _summaries(folder: Path) -> list[Path]:
    return sorted(folder.glob("summary-*-of-*.json"))


def _failed(root: Path) -> list[str]:
    failed = [
        failure["id"] for path in _summaries(root) for failure in json.loads(path.read_text())["failed"]
    ]
    return list(dict.fromkeys(failed))


def _read(folder: Path, item_id: str) -> Answer:
    meta = json.loads((folder / META).read_text())
    missing = [name for name in (OUTPUT, STEREO, TEXT) if not (folder / name).is_file()]
    if missing:
        why = "it was made with generate=false" if not meta["settings"]["generate"] else "answer it again"
        raise ValueError(f"{folder} lacks {', '.join(missing)}: {why}")
    seconds = {name: _seconds(folder / name, channels) for name, channels in ((OUTPUT, 1), (STEREO, 2))}
    if abs(seconds[OUTPUT] - seconds[STEREO]) > 1e-6:
        raise ValueError(
            f"{folder / OUTPUT} has {seconds[OUTPUT]:.3f} s and {STEREO} {seconds[STEREO]:.3f} s; answer it "
            "again"
        )
    try:
        text = json.loads((folder / TEXT).read_text())["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / TEXT} is damaged ({error!r}); answer it again") from error
    return Answer(item_id, folder, meta, text, seconds[STEREO])


def _seconds(path: Path, channels: int) -> float:
    found = read_header(path).channels
    if found != channels:
        wanted = {1: "1, Moshi", 2: "2, left the user and right Moshi"}[channels]
        raise ValueError(f"{path} has {found} channel(s), expected {wanted}; answer it again")
    return check_audio(path, channels)


def _all_of_one(items: Sequence[Answer]) -> Answers:
    """What all items share.

    Raises:
        ValueError: two differ.
    """
    shared = [_shared(item) for item in items]
    for item, other in zip(items, shared, strict=True):
        different = [name for name in other if other[name] != shared[0][name]]
        if different:
            raise ValueError(
                f"{items[0].folder} and {item.folder} differ in {', '.join(different)}; numbers are of one "
                "model and one way to sample: give each its own folder"
            )
    meta = items[0].meta
    identity = {"kind": "checkpoint", **{name: meta[name] for name in ("files_sha256", "base_sha256")}}
    model = {"checkpoint": meta["checkpoint"], "step": meta["step"], "sha256": digest_of(identity)}
    sampling = shared[0]["sampling"] | {"max_sec": shared[0]["max_sec"]}
    return Answers(list(items), model, sampling, "", [], len(items))


def _shared(item: Answer) -> dict[str, Any]:
    meta = item.meta
    return {
        **{name: meta[name] for name in ("files_sha256", "base_sha256")},
        "sampling": {name: value for name, value in meta["sampling"].items() if name != "seed"},
        "max_sec": meta["settings"]["max_sec"],
    }
