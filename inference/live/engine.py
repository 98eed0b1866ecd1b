"""The model's own thread: a step for all conversations that have a frame waiting, again and again."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from inference.live.memory import memory_of
from inference.live.metrics import Metrics
from inference.rows import Sampling
from inference.session import continue_stream, stream_tensors
from inference.slots import open_slots
from inference.stream import Stream, hear_next
from moshi_ttt.finite_state import FiniteStateCheck
from moshi_ttt.integration import ttt_layers

Result = TypeVar("Result")

WARM_UP_FRAMES = 4


@dataclass
class Spoken:
    """A frame of Moshi's, ready to send.

    Args:
        frame: its number in the conversation, from 1.
        token: the text token.
        audio: samples `[frame_size]`, float32.
        memory: `memory_of` the conversation after this frame, where it is due.
    """

    frame: int
    token: int
    audio: np.ndarray
    memory: list[dict[str, Any]] | None = None


class Caller(Protocol):
    """One end of a conversation, as the engine knows it. Called in the event loop."""

    stream: Stream
    inbox: deque[np.ndarray]
    """Whole frames of the user `[frame_size]` that are to be heard."""

    memory_every: int
    """Frames between looks at the memory; 0 means never."""

    def say(self, spoken: Spoken) -> None:
        """Moshi has spoken a frame."""
        ...

    def fail(self, why: str) -> None:
        """The conversation cannot go on."""
        ...


class Engine:
    """Conversations side by side on one model. All that touches the model runs in one thread.

    `hear` and the callers belong to the event loop, which never waits for the model.

    Args:
        model: in evaluation mode, not streaming.
        mimi: the codec, not streaming, on the same device.
        sampling: how tokens are drawn; seeds are the conversations' own.
        slots: how many conversations.
        check_every: steps between looks for NaN in the inner states; 0 means never.
        metrics: what is counted.
    """

    def __init__(
        self,
        model: LMModel,
        mimi: MimiModel,
        sampling: Sampling,
        slots: int,
        check_every: int,
        metrics: Metrics,
    ):
        self.model = model
        self.mimi = mimi
        self.metrics = metrics
        self._thread = ThreadPoolExecutor(1, "model")
        self._stack = ExitStack()
        self._callers: dict[int, Caller] = {}
        self._wake = asyncio.Event()
        watched = check_every > 0 and bool(ttt_layers(model))
        self._check = FiniteStateCheck(model, check_every, "tell") if watched else None
        watches = [self._check] if self._check else []
        self._opening = open_slots(model, mimi, sampling, slots, watches)

    async def _call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run something in the model's thread, after what runs there now."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def start(self) -> None:
        """Begin to stream, and warm up: the first steps of a GPU capture graphs."""
        await self._call(self._begin)

    def _begin(self) -> None:
        self._slots = self._stack.enter_context(self._opening)
        stream = Stream(self._slots, 0, 0)
        for _ in stream.hear(torch.zeros(WARM_UP_FRAMES * self.mimi.frame_size)):
            pass

    async def close(self) -> None:
        """End the streams and the thread."""
        await self._call(self._stack.close)
        self._thread.shutdown()

    async def open(self, slot: int, seed: int, saved: dict[str, torch.Tensor] | None = None) -> Stream:
        """A new conversation in a slot, or one that goes on.

        Raises:
            ValueError: what was saved does not fit this model.
        """
        return await self._call(self._open, slot, seed, saved)

    def _open(self, slot: int, seed: int, saved: dict[str, torch.Tensor] | None) -> Stream:
        # What was seen in the slot before is not this conversation's.
        self._slots.rows.finish_watches()
        stream = Stream(self._slots, slot, seed)
        self._take_broken([slot])
        if saved is not None:
            continue_stream(stream, saved)
        return stream

    def join(self, caller: Caller) -> None:
        """From now on the caller's frames are heard."""
        assert caller.stream.slot not in self._callers
        self._callers[caller.stream.slot] = caller
        self.notice()

    async def leave(self, caller: Caller, rest: np.ndarray | None) -> dict[str, torch.Tensor] | None:
        """The caller's frames are not heard any more.

        Args:
            rest: samples `[n]` that were not heard yet, to save the conversation; None forgets it.
        Returns:
            What is to be saved; None where that is nothing, or is broken.
        """
        self._callers.pop(caller.stream.slot, None)
        if rest is None:
            return None
        return await self._call(self._snapshot, caller.stream, rest)

    def _snapshot(self, stream: Stream, rest: np.ndarray) -> dict[str, torch.Tensor] | None:
        stream.add(torch.from_numpy(rest))
        tensors = stream_tensors(stream)
        return None if self._take_broken([stream.slot]) else tensors

    def notice(self) -> None:
        """There may be something to hear."""
        self._wake.set()

    async def run(self) -> None:
        """Let conversations hear and speak, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while ready := self._ready():
                callers = [caller for caller, _ in ready]
                spoken, broken = await self._call(self._step, ready)
                for caller in callers:
                    if caller in spoken:
                        caller.say(spoken[caller])
                    if caller.stream.slot in broken:
                        caller.fail(broken[caller.stream.slot])

    def _ready(self) -> list[tuple[Caller, np.ndarray]]:
        """Callers with a frame to hear, the next of their inbox."""
        return [(caller, caller.inbox.popleft()) for caller in self._callers.values() if caller.inbox]

    def _step(
        self, ready: Sequence[tuple[Caller, np.ndarray]]
    ) -> tuple[dict[Caller, Spoken], dict[int, str]]:
        """A frame of each, and what was found broken, by slot. In the model's thread."""
        started = time.perf_counter()
        for caller, frame in ready:
            caller.stream.add(torch.from_numpy(frame))
        frames = hear_next([caller.stream for caller, _ in ready])
        spoken = {}
        for caller, _ in ready:
            frame = frames.get(caller.stream)
            if frame is not None:
                number, every = caller.stream.answered, caller.memory_every
                due = every > 0 and number % every == 0
                memory = memory_of(self.model, caller.stream.slot) if due else None
                spoken[caller] = Spoken(number, int(frame.tokens[0, 0, 0]), frame.audio.numpy(), memory)
        self.metrics.steps.observe(time.perf_counter() - started)
        self.metrics.heard.inc(len(ready))
        return spoken, self._take_broken([caller.stream.slot for caller, _ in ready])

    def _take_broken(self, slots: Sequence[int]) -> dict[int, str]:
        if self._check is None:
            return {}
        broken = self._check.broken
        return {slot: broken.pop(slot) for slot in slots if slot in broken}
