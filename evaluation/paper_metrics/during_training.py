"""Paper metrics as training goes on: a few ids of each task, the primary scoring. Cheap, and partial."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from evaluation.paper_metrics.accuracy import joined, over_voices
from evaluation.paper_metrics.data import read_tasks
from evaluation.paper_metrics.likelihood import ClipEncoder, batches_by_length, clip_nll
from evaluation.paper_metrics.pairs import Pair, TaskData, clip_seconds
from evaluation.paper_metrics.results import GROUP, score_task
from evaluation.paper_metrics.scoring import PRIMARY, SCORINGS
from evaluation.paper_metrics.settings import DataFolders, PaperMetricsConfig


class Subject(Protocol):
    """What it needs of `finetune.evaluations.Subject`."""

    @property
    def model(self) -> LMModel: ...

    @property
    def mimi(self) -> MimiModel: ...


class PaperMetrics:
    """An entry of `evaluations` of a training config.

    Numbers: accuracy of each task under the primary scoring, from 0 to 1 (`swuggy_dev/acc`), and the mean NLL
    of its right clips (`swuggy_dev/nll`). The model computes in the dtype it trains in. Intervals need the
    whole evaluation.

    Args:
        tasks, splits, limit, text_filler, user_filler, batch_frames, seed: as in `python -m
            evaluation.paper_metrics`. The same ids are asked every time.
        data: folders by name.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        data: dict[str, str],
        splits: Sequence[str] = ("dev",),
        limit: int | None = 50,
        text_filler: str = "-1",
        user_filler: str = "silence",
        batch_frames: int = 4096,
        seed: int = 0,
    ):
        self.config = PaperMetricsConfig(
            baseline="in training",
            tasks=list(tasks),
            splits=list(splits),
            data=DataFolders(**data),
            text_filler=text_filler,
            user_filler=user_filler,
            limit=limit,
            batch_frames=batch_frames,
            seed=seed,
        )
        self.config.validate()
        self.tasks = read_tasks(self.config)
        self.codes: dict[str, dict[str, torch.Tensor]] = {}

    def check(self, subject: Subject) -> None:
        """The data was read when this was made, and any Moshi can be asked."""

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Accuracies and likelihoods by task."""
        partial = any(task.clusters < task.total for task in self.tasks)
        numbers: dict[str, float] = {"partial": float(partial)}
        parts: dict[str, tuple[list[Pair], Any]] = {}
        column = SCORINGS.index(PRIMARY)
        for task in self.tasks:
            scored = score_task(task, self._likelihoods(subject, task))
            outcomes = scored.outcomes[:, column : column + 1]
            right = [scored.clips[pair.positive][PRIMARY] for pair in task.pairs]
            numbers[f"{task.name}/acc"] = float(over_voices(task.pairs, outcomes).values.mean())
            numbers[f"{task.name}/nll"] = -float(np.mean(right))
            if task.name.startswith(f"{GROUP}_"):
                parts[task.name] = (task.pairs, outcomes)
        if parts:
            pairs, outcomes = joined(parts)
            clusters = over_voices(pairs, outcomes)
            means = [
                clusters.values[[stratum == name for stratum in clusters.strata]].mean() for name in parts
            ]
            numbers[f"{GROUP}/acc"] = float(np.mean(means))
        return numbers

    def _likelihoods(self, subject: Subject, task: TaskData) -> dict[str, np.ndarray]:
        codes = self._encoded(subject, task)
        names = list(codes)
        frames = [codes[name].shape[1] for name in names]
        found: dict[str, np.ndarray] = {}
        for batch in batches_by_length(frames, self.config.batch_frames):
            nll = clip_nll(subject.model, [codes[names[i]] for i in batch])
            found |= {names[i]: values for i, values in zip(batch, nll, strict=True)}
        return found

    def _encoded(self, subject: Subject, task: TaskData) -> dict[str, torch.Tensor]:
        """Codes of a task's clips, encoded the first time."""
        if task.name not in self.codes:
            config = self.config
            encoder = ClipEncoder(subject.mimi, subject.model, config.text_filler, config.user_filler)
            seconds = clip_seconds(task)
            self.codes[task.name] = {
                name: encoder.encode(path, seconds[name]) for name, path in task.clips.items()
            }
        return self.codes[task.name]
