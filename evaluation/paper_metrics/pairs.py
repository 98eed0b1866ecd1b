"""What all data sets are in the end: clips, and pairs of which one clip is the right one."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.audio import read_header, require_channels

logger = logging.getLogger(__name__)

# How many problems an error names.
_NAMED = 5
# Headers are read at once: on a network's disk each waits for an answer.
_READERS = 16


@dataclass(frozen=True)
class Pair:
    """Two clips; the likelier one should be `positive`.

    Args:
        cluster: what is drawn as one in the bootstrap, and what outcomes are averaged over first: an id with
            all its voices.
        voice: of both clips; empty where there is one alone.
        positive, negative: names of clips.
        stratum: the type, for averages over types; empty where there are none.
        in_vocab: whether the word is in the vocabulary; None where that is not asked.
        about: what else the data set says of the pair.
    """

    cluster: str
    voice: str
    positive: str
    negative: str
    stratum: str = ""
    in_vocab: bool | None = None
    about: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TaskData:
    """The clips and pairs of one task.

    Args:
        name: such as swuggy_dev.
        unit: what a cluster is, in words.
        pairs: in an order that does not depend on the order of files or rows.
        clips: files by name.
        digest: SHA-256 of the clips' names and sizes.
        gold_sha256: of the file that says what is right; None where the clips' names do.
        official_pairs: how many pairs the published data set has; None where it is not known here.
        total: clusters before sub-sampling.
    """

    name: str
    unit: str
    pairs: list[Pair]
    clips: dict[str, Path]
    digest: str
    gold_sha256: str | None
    official_pairs: int | None
    total: int

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return len({pair.cluster for pair in self.pairs})

    def sampled(self, limit: int | None, seed: int) -> "TaskData":
        """The same with at most `limit` clusters, drawn at random, whole."""
        names = sorted({pair.cluster for pair in self.pairs})
        if limit is None or limit >= len(names):
            return self
        drawn = np.random.default_rng(seed).choice(len(names), limit, replace=False)
        kept = {names[i] for i in drawn}
        pairs = [pair for pair in self.pairs if pair.cluster in kept]
        clips = {name: self.clips[name] for pair in pairs for name in (pair.positive, pair.negative)}
        return replace(self, pairs=pairs, clips=clips)


def make_task(
    name: str,
    unit: str,
    pairs: Iterable[Pair],
    clips: dict[str, Path],
    gold_sha256: str | None = None,
    official_pairs: int | None = None,
) -> TaskData:
    """A task's data from its pairs, in a fixed order; tells where they are not as many as published."""
    ordered = sorted(pairs, key=lambda pair: (pair.cluster, pair.voice))
    if official_pairs is not None and len(ordered) != official_pairs:
        logger.warning(
            "%s has %d pairs, the published data set has %d: its results are not those of the whole set",
            *(name, len(ordered), official_pairs),
        )
    total = len({pair.cluster for pair in ordered})
    return TaskData(name, unit, ordered, clips, clips_digest(clips), gold_sha256, official_pairs, total)


def clips_digest(clips: dict[str, Path]) -> str:
    """SHA-256 of the clips' names and sizes in bytes."""
    about = [[name, path.stat().st_size] for name, path in sorted(clips.items())]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def wav_stems(folder: Path) -> list[str]:
    """Stems of the wav files of a folder. Hidden files (such as `._a.wav` of a Mac's archive) are none."""
    return sorted(path.stem for path in folder.glob("*.wav") if not path.name.startswith("."))


def raise_problems(problems: Sequence[str], what: str, remedy: str) -> None:
    """Raise ValueError that names the first of what is wrong, if anything is.

    Args:
        what: of which file or folder.
        remedy: what to do.
    """
    if not problems:
        return
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    raise ValueError(f"{what}: {'; '.join(problems[:_NAMED])}{more}. {remedy}")


def clip_seconds(task: TaskData) -> dict[str, float]:
    """Duration of each clip by its header.

    Raises:
        ValueError: names the clips that are empty, stereo or no audio.
    """

    def read(path: Path) -> float | str:
        try:
            header = read_header(path)
            require_channels(path, header.channels, 1)
        except ValueError as error:
            return str(error)
        return header.duration_sec

    with ThreadPoolExecutor(_READERS) as pool:
        found: list[Any] = list(pool.map(read, task.clips.values()))
    problems = [entry for entry in found if isinstance(entry, str)]
    raise_problems(problems, task.name, "Copy these files again from the published data set")
    return dict(zip(task.clips, found, strict=True))
