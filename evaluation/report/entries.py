"""What a report is made of: models, and numbers of models that were got in some way."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model that was measured.

    Args:
        sha256: of its files; results of one model are put in one row by it. None where only a run and a step
            are known, which is so for records of training.
        name: for people.
        run: folder of the run it is from, absolute; None for a baseline or a copy.
        step: steps it was trained for; None for a baseline.
        about: where it is from.
    """

    sha256: str | None
    name: str
    run: str | None
    step: int | None
    about: str


@dataclass(frozen=True)
class Number:
    """A value of one metric, with its 95 % interval where it has one.

    Args:
        group: kind of evaluation, such as paper metrics.
        task, metric: what was measured.
        main: one of the few that a table begins with.
        better: higher or lower; "" where neither is.
        unit: of the value, such as "%"; chance: what guessing gets.
        n: how many independent things were averaged.
    """

    group: str
    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    main: bool = False
    better: str = ""
    unit: str = ""
    chance: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Result:
    """One results file.

    Args:
        path: the file.
        date: of the evaluation.
        model: what was measured.
        numbers: what came out.
        protocol: all but the model that decides the numbers, by task; numbers of different protocols are
            never put in one column.
        partial: "" or what is missing.
        curves: NLL over positions, of long context.
        voice: similarity of a voice to its beginning over seconds, of speech quality.
    """

    path: Path
    date: str
    model: Model
    numbers: list[Number]
    protocol: dict[str, dict[str, Any]]
    partial: str = ""
    curves: dict[str, Any] = field(default_factory=dict)
    voice: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        folder: absolute.
        records: of metrics.jsonl: by split and metric, steps and values.
        thinned: every how many records one is kept; 1 keeps all.
        held_out: what its config says that decides held-out losses.
    """

    folder: Path
    records: dict[str, tuple[list[int], list[float]]]
    thinned: int = 1
    held_out: dict[str, Any] = field(default_factory=dict)
