"""One client's conversation: what it sends becomes frames to hear, what Moshi speaks becomes messages."""

import asyncio
from collections import deque

import aiohttp
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from inference.live.engine import Engine, Spoken
from inference.live.limits import LimitsConfig, RateLimit
from inference.live.protocol import (
    IGNORED,
    LEFT,
    TEXT,
    VANISHED,
    Ending,
    Malformed,
    TextPieces,
    message,
    metadata,
)
from inference.live.sound import Sound
from inference.stream import Stream


class Conversation:
    """A caller of the engine.

    Args:
        stream (Stream): in a slot of the engine.
        engine (Engine): which hears.
        sound (Sound): of the client's messages.
        text (TextPieces): for Moshi's words.
        limits (LimitsConfig): for this client.
        memory_every (int): frames between looks at the memory; 0 for clients that did not ask.
    Attributes:
        inbox: whole frames of the user that wait.
        dropped: frames of the user that came too late, and so were never heard.
        ended: how the conversation ends, once it does.
    """

    def __init__(
        self,
        stream: Stream,
        engine: Engine,
        sound: Sound,
        text: TextPieces,
        limits: LimitsConfig,
        memory_every: int,
    ):
        self.stream = stream
        self.inbox: deque[np.ndarray] = deque()
        self.memory_every = memory_every
        self.dropped = 0
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._sound = sound
        self._text = text
        self._limits = limits
        self._rate = RateLimit(limits.messages_per_sec)
        self._malformed = 0
        self._outbox: deque[Spoken] = deque()
        self._outgoing = asyncio.Event()
        mimi = engine.mimi
        self._frame_size = mimi.frame_size
        self._most_waiting = max(1, round(limits.late_sec * mimi.frame_rate))
        self._most_samples = round(limits.message_sec * mimi.sample_rate)
        self._begun = np.zeros(0, np.float32)  # less than a frame
        self._add(stream.take_back().numpy())  # of a conversation that goes on

    def say(self, spoken: Spoken) -> None:
        """Moshi has spoken: send it as soon as the client takes it."""
        self._outbox.append(spoken)
        if len(self._outbox) > self._most_waiting:
            self._outbox.popleft()
            self._engine.metrics.dropped.labels("out").inc()
        self._outgoing.set()

    def fail(self, why: str) -> None:
        """The model's side cannot go on."""
        self._engine.metrics.errors.labels("inner_state").inc()
        self.end(Ending(WSCloseCode.INTERNAL_ERROR, "the model's state broke; start anew", "broken"))

    def end(self, ending: Ending) -> None:
        """Say goodbye, unless that is under way."""
        if not self.ended.done():
            self.ended.set_result(ending)

    def rest(self) -> np.ndarray:
        """Samples `[n]` of the user that were not heard."""
        return np.concatenate([*self.inbox, self._begun])

    async def talk(self, ws: web.WebSocketResponse) -> Ending:
        """Listen and speak until one side has enough."""
        tasks = [asyncio.create_task(self._listen(ws)), asyncio.create_task(self._speak(ws))]
        try:
            await asyncio.wait([*tasks, self.ended], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    self.end(task.result())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.ended.result()

    async def _listen(self, ws: web.WebSocketResponse) -> Ending:
        now = asyncio.get_running_loop().time
        over, idle = now() + self._limits.session_sec, now() + self._limits.idle_sec
        while True:
            try:
                async with asyncio.timeout_at(min(over, idle)):
                    received = await ws.receive()
            except TimeoutError:
                if now() >= over:
                    return Ending(WSCloseCode.OK, "the time of this conversation is over", "time")
                return Ending(WSCloseCode.OK, f"no audio for {self._limits.idle_sec:g} s", "idle")
            if received.type == WSMsgType.ERROR:
                return _protocol_error(received.data)
            if received.type == WSMsgType.CLOSE:
                return LEFT
            if received.type in (WSMsgType.CLOSING, WSMsgType.CLOSED):
                return VANISHED
            if not self._rate.allows_one():
                return Ending(WSCloseCode.POLICY_VIOLATION, "too many messages a second", "flood")
            try:
                heard = self._take(received)
            except Malformed:
                self._malformed += 1
                self._engine.metrics.malformed.inc()
                if self._malformed > self._limits.malformed:
                    return Ending(WSCloseCode.INVALID_TEXT, "too many messages without sense", "malformed")
            else:
                idle = now() + self._limits.idle_sec if heard else idle

    def _take(self, received: aiohttp.WSMessage) -> bool:
        """A message of the client: whether it was sound.

        Raises:
            Malformed: it makes no sense.
        """
        if received.type != WSMsgType.BINARY or not received.data:
            raise Malformed(f"a message of type {received.type}")
        kind, payload = received.data[0], received.data[1:]
        if kind in IGNORED:
            return False
        if kind != self._sound.kind:
            raise Malformed(f"a message of kind {kind}")
        self._add(self._sound.decode(payload, self._most_samples))
        while len(self.inbox) > self._most_waiting:
            self.inbox.popleft()
            self.dropped += 1
            self._engine.metrics.dropped.labels("in").inc()
        self._engine.notice()
        return True

    def _add(self, samples: np.ndarray) -> None:
        """More of the user's samples `[n]`: whole frames of them wait to be heard."""
        samples = np.concatenate((self._begun, samples))
        whole = samples.shape[0] // self._frame_size * self._frame_size
        self._begun = samples[whole:]
        self.inbox.extend(samples[:whole].reshape(-1, self._frame_size))

    async def _speak(self, ws: web.WebSocketResponse) -> Ending:
        try:
            while True:
                await self._outgoing.wait()
                self._outgoing.clear()
                while self._outbox:
                    for outgoing in self._messages(self._outbox.popleft()):
                        await ws.send_bytes(outgoing)
        except ConnectionResetError:
            return VANISHED

    def _messages(self, spoken: Spoken) -> list[bytes]:
        found = []
        if encoded := self._sound.encode(spoken.audio):
            found.append(message(self._sound.kind, encoded))
        if text := self._text.text(spoken.token):
            found.append(message(TEXT, text.encode()))
        if spoken.memory is not None:
            found.append(metadata({"frame": spoken.frame, "memory": spoken.memory}))
        return found


def _protocol_error(error: BaseException | None) -> Ending:
    """What aiohttp refuses of itself: messages that are too big, broken frames, dead connections."""
    if isinstance(error, aiohttp.WebSocketError):
        return Ending(error.code, "refused by the WebSocket layer", "protocol")
    return VANISHED
