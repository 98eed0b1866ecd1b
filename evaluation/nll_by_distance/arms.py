"""The arms of a comparison: a checkpoint with its memory as it is, cut short, or switched off."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.nll_by_distance.sides import Side
from inference.likelihood import nll_by_frame
from inference.likelihood import reset_frames as reset_frames_of
from moshi_ttt.checkpoint import LoadedCheckpoint, find_checkpoint, read_training_config, verify_files
from moshi_ttt.integration import live_contexts, receptive_field, ttt_layers
from moshi_ttt.memory_arms import inner_lr_0


@dataclass(frozen=True)
class Arm:
    """One way to run a checkpoint.

    Args:
        label: the checkpoint's name.
        memory: "carried" over the whole recording, "reset" every so many frames, or "off" (inner learning
            rate 0); None for a checkpoint without TTT.
    """

    label: str
    memory: str | None

    @property
    def name(self) -> str:
        """What tables and legends call it."""
        added = {"reset": ", state reset", "off": ", inner learning rate 0"}
        return self.label + added.get(self.memory or "", "")


def arms_of(label: str, has_ttt: bool) -> list[Arm]:
    """The arms of one checkpoint."""
    return [Arm(label, memory) for memory in (("carried", "reset", "off") if has_ttt else (None,))]


def comparisons(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Pairs of arms (a, b) whose difference a - b says something about memory, by name.

    Each checkpoint with TTT against itself without its memory, and against each other checkpoint.
    """
    whole = [arm for arm in arms if arm.memory in ("carried", None)]
    pairs = []
    for index, arm in enumerate(whole):
        if arm.memory is None:
            continue
        pairs += [(arm, other) for other in arms if other.label == arm.label and other != arm]
        pairs += [(arm, other) for other in whole[:index] if other.memory is None]
        pairs += [(arm, other) for other in whole[index + 1 :]]
    return [(arm.name, other.name) for arm, other in pairs]


def labels_of(paths: Sequence[str], labels: Sequence[str] | None) -> list[str]:
    """A name for each checkpoint: those given, or the run folders'.

    Raises:
        ValueError: two run folders have one name.
    """
    if labels is not None:
        return list(labels)
    folders = [find_checkpoint(path).resolve() for path in paths]
    names = [folder.parents[2].name if len(folder.parents) > 2 else folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"the checkpoints' runs are called {', '.join(names)}; tell them apart with labels=")
    return names


def refuse_different_streams(paths: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Raise ValueError unless all checkpoints read the same codes; returns the first one's data section."""
    streams = []
    for path in paths:
        folder = find_checkpoint(path)
        digests, data = verify_files(folder)["base"]["sha256"], read_training_config(folder)["data"]
        kept = {name: data[name] for name in ("main_speaker", "keep_main_only")}
        streams.append(({name: digests[name] for name in ("mimi", "tokenizer")} | kept, data))
    first = streams[0][0]
    for label, (stream, _) in zip(labels, streams, strict=True):
        different = [name for name in first if stream[name] != first[name]]
        if different:
            raise ValueError(
                f"{labels[0]} and {label} differ in {', '.join(different)}, so they do not predict the same "
                "codes; compare checkpoints of one codec, tokenizer and text setting"
            )
    return streams[0][1]


def reset_every(loaded: LoadedCheckpoint, reset_frames: int | None) -> int | None:
    """Frames after which the arm with reset forgets; None for a checkpoint without TTT.

    Raises:
        ValueError: `reset_frames` is no whole number of mini-batches.
    """
    if not ttt_layers(loaded.model):
        return None
    return reset_frames_of(loaded.model, reset_frames)


def score_arms(
    loaded: LoadedCheckpoint, label: str, sides: Sequence[Side], chunk_frames: int, reset_frames: int | None
) -> list[dict[str, torch.Tensor]]:
    """For each side of a recording the NLLs `[1 + dep_q, T]` of every arm of a checkpoint, by name."""
    every = reset_every(loaded, reset_frames)
    scored: list[dict[str, torch.Tensor]] = [{} for _ in sides]
    for arm in arms_of(label, every is not None):
        forgets = every if arm.memory == "reset" else None
        bar = tqdm(sides, desc=arm.name, unit="side", disable=None)
        with inner_lr_0(loaded.model) if arm.memory == "off" else nullcontext():
            for side, found in zip(bar, scored, strict=True):
                nll = nll_by_frame(loaded.model, side.codes[None], chunk_frames, forgets)
                found[arm.name] = nll[0]
    return scored


def about(loaded: LoadedCheckpoint, reset_frames: int | None) -> dict[str, Any]:
    """What a checkpoint is, for the report."""
    contexts = live_contexts(loaded.model)
    return {
        "checkpoint": Path(loaded.folder).as_posix(),
        "step": loaded.manifest["step"],
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "ttt_layers": [index for index, _ in ttt_layers(loaded.model)],
        "windows_frames": {"ttt": contexts[True], "others": contexts[False]},
        "receptive_field_frames": receptive_field(loaded.model),
        "reset_every_frames": reset_every(loaded, reset_frames),
    }
