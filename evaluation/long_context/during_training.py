"""Long context as training goes on: a few recordings, fewer arms, no controls. Cheap, and partial."""

import logging
import math
from typing import Any, Protocol

import numpy as np
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from evaluation.long_context.arms import OWN, Arm, comparisons
from evaluation.long_context.codes import CodeReader
from evaluation.long_context.measures import FEWEST_FRAMES, PRIMARY, Measured, measure
from evaluation.long_context.models import Opened
from evaluation.long_context.pieces import WHOLE, Piece
from evaluation.long_context.recordings import drawn, find_recordings
from evaluation.long_context.scoring import ArmFacts, facts_of, score, whole_chunks
from evaluation.long_context.settings import LongContextConfig
from finetune.data.interleaver import TextTokens
from moshi_ttt.integration import ttt_layers
from moshi_ttt.memory_arms import mini_batch_frames

logger = logging.getLogger(__name__)

STREAMS = (PRIMARY, "semantic")


class Subject(Protocol):
    """What it needs of `finetune.evaluations.Subject`."""

    @property
    def model(self) -> LMModel: ...

    @property
    def base(self) -> CheckpointInfo: ...

    @property
    def mimi(self) -> MimiModel: ...


class LongContext:
    """An entry of `evaluations` of a training config.

    Numbers: mean NLL of each arm (`carried/w100`), the same beyond the receptive field
    (`carried/w100_beyond`), and paired differences (`carried - reset/w100_beyond`). Intervals need the whole
    evaluation.

    Args:
        recordings: as in `python -m evaluation.long_context`.
        limit: how many of them, of as many speakers; None is all.
        max_sec: how much of each; None is all.
        arms: of carried, reset, inner_lr_0, gate_off. A model without TTT has one, `base`.
        reset_frames, chunk_frames, text, user, seed: as there.
    """

    def __init__(
        self,
        recordings: str,
        limit: int | None = 4,
        max_sec: float | None = None,
        arms: tuple[str, ...] | list[str] = ("carried", "reset", "inner_lr_0"),
        reset_frames: int | None = None,
        chunk_frames: int = 512,
        text: str = "none",
        user: str = "silence",
        seed: int = 0,
    ):
        # No files are written, so there is no output.
        self.config = LongContextConfig(
            checkpoint="in training",
            recordings=recordings,
            output="",
            arms=list(arms),
            contexts=[OWN],
            controls=[],
            control_arms=[],
            reset_frames=reset_frames,
            chunk_frames=chunk_frames,
            text=text,
            user=user,
            max_sec=max_sec,
            limit=limit,
            seed=seed,
        )
        self.config.validate()
        found = find_recordings(recordings)
        self.recordings = drawn(found, limit, seed)
        self.partial = len(self.recordings) < len(found) or max_sec is not None
        self.reader: CodeReader | None = None

    def check(self, subject: Subject) -> None:
        """Raise ValueError if no recording reaches beyond attention, or a reset splits a mini-batch."""
        opened, reader = self._opened(subject), self._reader(subject)
        facts = {arm: facts_of(opened, arm, self.config.reset_frames) for arm in self._arms(subject.model)}
        longest = max(map(reader.frames, self.recordings))
        reach = max(one.receptive_field_frames for one in facts.values())
        if ttt_layers(subject.model) and longest < reach + FEWEST_FRAMES:
            raise ValueError(
                f"the longest of the {len(self.recordings)} recordings for long_context (of "
                f"{self.config.recordings}) has {longest:,} frames, but attention reaches {reach:,} back; "
                "give longer ones, or a larger max_sec or limit"
            )

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Mean NLLs by arm and stream."""
        opened, reader = self._opened(subject), self._reader(subject)
        arms = self._arms(subject.model)
        facts = {arm: facts_of(opened, arm, self.config.reset_frames) for arm in arms}
        reach = next(iter(facts.values())).receptive_field_frames
        found = {arm: measure(self._nlls(opened, reader, arm, facts), [0, 1], [reach]) for arm in arms}
        numbers: dict[str, float] = {"recordings": len(self.recordings), "partial": float(self.partial)}
        for arm, streams in found.items():
            numbers |= _means(arm.name, streams, reach)
        for arm, other in comparisons(arms):
            pair = {stream: found[arm][stream] - found[other][stream] for stream in STREAMS}
            numbers |= _means(f"{arm.name} - {other.name}", pair, reach)
        return numbers

    def _nlls(
        self, opened: Opened, reader: CodeReader, arm: Arm, facts: dict[Arm, ArmFacts]
    ) -> list[np.ndarray]:
        forgetting = facts.get(Arm("reset"))
        size = mini_batch_frames(opened.model)
        chunk = whole_chunks(self.config.chunk_frames, size, forgetting and forgetting.reset_frames)
        nlls = []
        for index, recording in enumerate(self.recordings):
            length = reader.frames(recording)
            piece = Piece(WHOLE, ((index, 0, length),), length)
            nlls.append(
                score(opened, arm, [piece], self.recordings, reader, chunk, facts[arm].reset_frames)[WHOLE]
            )
        return nlls

    def _arms(self, model: LMModel) -> list[Arm]:
        if not ttt_layers(model):
            return [Arm("base")]
        return [Arm(memory) for memory in self.config.memories(True, False)]

    def _opened(self, subject: Subject) -> Opened:
        return Opened(subject.model, subject.base, {}, {})

    def _reader(self, subject: Subject) -> CodeReader:
        if self.reader is None:
            special = TextTokens.of(subject.model)
            config = self.config
            self.reader = CodeReader(subject.mimi, special, config.text, config.user, config.max_sec)
        return self.reader


def _means(name: str, streams: dict[str, Measured], reach: int) -> dict[str, Any]:
    numbers = {}
    for stream in STREAMS:
        beyond = [value for value in streams[stream].beyond[reach] if not math.isnan(value)]
        numbers[f"{name}/{stream}"] = float(streams[stream].all.mean())
        if beyond:
            numbers[f"{name}/{stream}_beyond"] = float(np.mean(beyond))
    return numbers
