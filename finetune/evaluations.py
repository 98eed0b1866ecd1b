"""What else is measured while training: evaluations that the config names, which training does not know.

    evaluations:
      - _target_: evaluation.long_context.during_training.LongContext
        every_steps: 500
        recordings: librilight/small

Hydra makes an object of each entry; all keys but `name` and `every_steps` are its arguments. It must be an
`Evaluation`. Its numbers go to metrics.jsonl and wandb under its name; training goes on as if it had not
been.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from finetune.validation import evaluation_mode

logger = logging.getLogger(__name__)

RESERVED = ("train", "valid")


@dataclass(frozen=True)
class Subject:
    """The model in training, as an evaluation sees it.

    Args:
        model: whole, in evaluation mode, not streaming. It must be left as it was.
        base: the base model's files.
        mimi, tokenizer: the run's codec and text.
        step: steps done.
        run_dir: the run's folder, for files of the evaluation's own.
    """

    model: LMModel
    base: CheckpointInfo
    mimi: MimiModel
    tokenizer: sentencepiece.SentencePieceProcessor
    step: int
    run_dir: Path


class Evaluation(Protocol):
    """What an entry of `evaluations` must make."""

    def check(self, subject: Subject) -> None:
        """Raise ValueError if this cannot work on such a model.

        Called before the first step, on every process. The model's parameters may be split over processes and
        must not be used.
        """
        ...

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Numbers by name. Called on the main process alone, while the others wait: it should be quick."""
        ...


@dataclass(frozen=True)
class Scheduled:
    """An evaluation, the name of its numbers, and after how many steps it is due."""

    name: str
    every_steps: int
    evaluation: Evaluation


def validate_evaluations(entries: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for entries that cannot be ones."""
    for place, entry in enumerate(entries):
        target, every = entry.get("_target_"), entry.get("every_steps")
        if not isinstance(target, str) or "." not in target:
            raise ValueError(
                f"evaluations[{place}] needs _target_, the dotted path of a class such as "
                f"evaluation.long_context.during_training.LongContext; got {target!r}"
            )
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"evaluations[{place}] needs every_steps, 1 or more; got {every!r}")
    names = [_name(entry) for entry in entries]
    wrong = [name for name in names if names.count(name) > 1 or name in RESERVED or "/" in name]
    if wrong:
        raise ValueError(
            f"evaluations have the names {', '.join(names)}; give each a name= of its own, other than "
            f"{' and '.join(RESERVED)}"
        )


def _name(entry: dict[str, Any]) -> str:
    """The name that is given, or the package of the target: long_context."""
    return str(entry.get("name") or entry["_target_"].split(".")[:-1][-2:][0])


def make_evaluations(entries: Sequence[dict[str, Any]]) -> list[Scheduled]:
    """The evaluations that a config names.

    Raises:
        ValueError: one cannot be made of its arguments.
    """
    made = []
    for entry in entries:
        arguments = {key: value for key, value in entry.items() if key not in ("name", "every_steps")}
        try:
            evaluation = instantiate(arguments, _convert_="all")
        except InstantiationException as error:
            raise ValueError(f"evaluation {_name(entry)}: {error.__cause__ or error}") from error
        made.append(Scheduled(_name(entry), entry["every_steps"], evaluation))
    return made


@contextmanager
def left_as_it_was(model: LMModel) -> Iterator[None]:
    """Evaluation mode, without gradients; random numbers go on as if nobody had drawn any."""
    states = (random.getstate(), np.random.get_state())  # noqa: NPY002
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluation_mode(model):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


def run_evaluations(
    scheduled: Sequence[Scheduled], subject: Subject
) -> Iterator[tuple[str, dict[str, float]]]:
    """The name and the numbers of each evaluation, as it is done; they are logged."""
    for one in scheduled:
        with left_as_it_was(subject.model):
            values = one.evaluation(subject)
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("step %d %s: %s", subject.step, one.name, told)
        yield one.name, values
