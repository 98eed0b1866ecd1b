"""The arms: a model with its memory as it is, cut short, or switched off; in several attention contexts."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from moshi.models.lm import LMModel

from moshi_ttt.memory_arms import attention_contexts, gate_off, inner_lr_0

MEMORIES = ("base", "carried", "reset", "inner_lr_0", "gate_off")
OWN = "own"

MEANINGS = {
    "base": "the baseline, a model without TTT layers",
    "carried": "the checkpoint as it is: inner weights carried from the first frame to the last",
    "reset": "inner weights put back to the learned ones every N frames; attention goes on",
    "inner_lr_0": "inner learning rate 0: TTT layers answer with their learned weights and learn nothing",
    "gate_off": "TTT layers whose output weighs nothing",
}


@dataclass(frozen=True)
class Arm:
    """One way to run a model.

    Args:
        memory: one of `MEMORIES`.
        context: attention windows, as `parse_context` reads them.
    """

    memory: str
    context: str = OWN

    @property
    def name(self) -> str:
        """What tables, legends and folders call it."""
        return self.memory if self.context == OWN else f"{self.memory}@{self.context.replace('/', '-')}"


def parse_context(text: str) -> tuple[int | None, int | None]:
    """Windows of TTT and other layers in frames: `own` (as the model has them), `N`, or `TTT/OTHERS`.

    Raises:
        ValueError: it is none of these.
    """
    if text == OWN:
        return None, None
    first, slash, second = text.partition("/")
    parts = (first, second if slash else first)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"context {text!r} is none; expected own, N frames, or TTT/OTHERS such as 50/100")
    return int(parts[0]), int(parts[1])


@contextmanager
def running(model: LMModel, arm: Arm) -> Iterator[None]:
    """The model as the arm has it; afterwards it is what it was. `reset` is up to who scores."""
    ways = {"inner_lr_0": inner_lr_0, "gate_off": gate_off}
    with (
        attention_contexts(model, *parse_context(arm.context)),
        ways[arm.memory](model) if arm.memory in ways else nullcontext(),
    ):
        yield


def comparisons(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """Pairs (carried, other) in the same context; the first of a context is the one against `reset`."""
    order = ("reset", "inner_lr_0", "gate_off", "base")
    return [
        (arm, other)
        for arm in arms
        if arm.memory == "carried"
        for memory in order
        for other in arms
        if (other.memory, other.context) == (memory, arm.context)
    ]
