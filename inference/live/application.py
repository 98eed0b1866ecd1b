"""The live server as an aiohttp application: conversations, page, health and metrics."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import sentencepiece
from aiohttp import web

from inference.live.access import Access
from inference.live.conversation import Conversation
from inference.live.engine import Engine
from inference.live.limits import LimitsConfig
from inference.live.metrics import Metrics
from inference.live.protocol import HANDSHAKE, STOPPED, TextPieces, message, metadata
from inference.live.sessions import SessionError, SessionFolder
from inference.live.sound import SOUNDS, sound_of
from inference.session import read_session, write_session

logger = logging.getLogger(__name__)

SESSION_HEADER = "Moshi-TTT-Session"
_MOST_SEED = 2**53  # what a number in JavaScript holds


@dataclass
class Wish:
    """What a client asks for in its query. All else that it holds is for other servers, and ignored.

    Args:
        sound: one of `SOUNDS`.
        metadata: messages of kind 4 are welcome.
        session: an id, "new", or None.
        seed: of the noise, where the client wants one.
    """

    sound: str
    metadata: bool
    session: str | None
    seed: int | None


def read_wish(query: Any) -> Wish:
    """The wish in a query. Raises ValueError where it makes no sense."""
    sound, session, seed = query.get("audio", "opus"), query.get("session"), query.get("seed")
    if sound not in SOUNDS:
        raise ValueError("audio must be opus or pcm")
    if seed is not None and not (seed.isascii() and seed.isdigit() and int(seed[:20]) < _MOST_SEED):
        raise ValueError("seed must be a number from 0 to 2^53 - 1")
    return Wish(sound, query.get("metadata") == "1", session, None if seed is None else int(seed))


@dataclass
class Settings:
    """What a server is told besides its engine.

    Args:
        limits: of each client.
        identity: what sessions are held with, see `inference.session.session_identity`.
        seed: of all conversations; None draws one for each.
        memory_every: frames between looks at the memory, for clients that ask.
        save_always: sessions of all clients are saved.
        slots: conversations at once.
    """

    limits: LimitsConfig
    identity: dict[str, str]
    seed: int | None
    memory_every: int
    save_always: bool
    slots: int


class Server:
    """Conversations of many clients.

    Args:
        engine: started before the first request.
        tokenizer: for the text.
        access: judges requests.
        sessions: where conversations are saved; None for nowhere.
        settings: the rest.
        metrics: what is counted.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: sentencepiece.SentencePieceProcessor,
        access: Access,
        sessions: SessionFolder | None,
        settings: Settings,
        metrics: Metrics,
    ):
        self.engine = engine
        self.access = access
        self.metrics = metrics
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._settings = settings
        self._free = list(range(settings.slots))
        self._talking: set[Conversation] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._count = 0
        self.stopping = False
        self.failed = False

    async def health(self, request: web.Request) -> web.Response:
        """`/healthz`: 200 while conversations can begin or go on."""
        status = "failed" if self.failed else "stopping" if self.stopping else "ok"
        content = {"status": status, "slots": self._settings.slots, "active": self._active()}
        return web.json_response(content, status=200 if status == "ok" else 503)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """`/metrics`."""
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self.metrics.text(), headers=headers)

    async def may_talk(self, request: web.Request) -> web.Response:
        """`/api/access`: for the page, what there is for those who may talk."""
        return web.json_response({"sessions": self._sessions is not None})

    def _active(self) -> int:
        return self._settings.slots - len(self._free)

    def refuse(self, status: int, reason: str, why: str) -> web.Response:
        """An answer that says no, counted."""
        self.metrics.rejected.labels(reason).inc()
        headers = {"Retry-After": "10"} if status == 503 else None
        return web.Response(status=status, text=f"{why}\n", headers=headers)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`/api/chat`: one conversation."""
        ws = self._websocket()
        if not ws.can_prepare(request).ok:
            return self.refuse(426, "no_websocket", "this address speaks WebSocket")
        try:
            wish = read_wish(request.query)
        except ValueError as error:
            return self.refuse(400, "query", str(error))
        if self.stopping or self.failed:
            return self.refuse(503, "stopping", "this server is stopping")
        try:
            with self._place() as slot, self._session(wish) as session:
                if slot is None:
                    return self.refuse(503, "full", "all places are taken; try again later")
                return await self._hold(request, ws, wish, slot, session)
        except SessionError as error:
            return self.refuse(error.status, "session", error.why)

    def _websocket(self) -> web.WebSocketResponse:
        limits = self._settings.limits
        # A few bytes of a compressed message can stand for gigabytes.
        return web.WebSocketResponse(
            max_msg_size=limits.message_bytes,
            heartbeat=limits.heartbeat_sec,
            timeout=limits.leave_sec,
            compress=False,
        )

    @contextmanager
    def _place(self) -> Iterator[int | None]:
        if not self._free:
            yield None
            return
        slot = self._free.pop()
        self.metrics.active.set(self._active())
        self._none_left.clear()
        try:
            yield slot
        finally:
            self._free.append(slot)
            self.metrics.active.set(self._active())
            if self._active() == 0:
                self._none_left.set()

    @contextmanager
    def _session(self, wish: Wish) -> Iterator[str | None]:
        """The id that the conversation will be saved under, in use meanwhile; None if it will not be."""
        if self._sessions is None:
            if wish.session is not None:
                raise SessionError(400, "this server saves no sessions")
            yield None
            return
        if wish.session is None and not self._settings.save_always:
            yield None
            return
        new = wish.session in (None, "new")
        session = self._sessions.take_new() if new else self._sessions.take(wish.session or "")
        try:
            yield session
        finally:
            self._sessions.give_back(session)

    async def _hold(
        self, request: web.Request, ws: web.WebSocketResponse, wish: Wish, slot: int, session: str | None
    ) -> web.StreamResponse:
        self._count += 1
        number, started = self._count, time.monotonic()
        async with self._conversation(wish, slot, session) as conversation:
            heard = conversation.stream.frames
            logger.info("conversation %d begins in slot %d at frame %d", number, slot, heard)
            if session is not None:
                ws.headers[SESSION_HEADER] = session
            try:
                await ws.prepare(request)
                await ws.send_bytes(message(HANDSHAKE))
                if wish.metadata:
                    await ws.send_bytes(metadata(self._about(conversation, session)))
                ending = await conversation.talk(ws)
                # Who reads nothing takes no goodbye either, and may not keep its place for that.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.limits.leave_sec):
                        await ws.close(code=ending.code, message=ending.why.encode())
                how, why = ending.kind, ending.why
            except ConnectionResetError:
                how, why = "vanished", "the client is gone"
            if request.transport is not None and how != "left":
                # What is still to be sent stays in memory for as long as a client does not read it.
                patience = self._settings.limits.leave_sec
                asyncio.get_running_loop().call_later(patience, request.transport.abort)
        self.metrics.conversations.labels(how).inc()
        seconds, frames = time.monotonic() - started, conversation.stream.frames - heard
        logger.info(
            *("conversation %d ends after %.1f s: %s; %d frames heard, %d dropped", number, seconds, why),
            *(frames, conversation.dropped),
        )
        return ws

    def _about(self, conversation: Conversation, session: str | None) -> dict[str, Any]:
        stream, mimi = conversation.stream, self.engine.mimi
        return {
            "seed": stream.seed,
            "session": session,
            "frame": stream.answered,
            "frame_rate": mimi.frame_rate,
            "sample_rate": mimi.sample_rate,
        }

    @asynccontextmanager
    async def _conversation(self, wish: Wish, slot: int, session: str | None) -> AsyncIterator[Conversation]:
        settings, model, mimi = self._settings, self.engine.model, self.engine.mimi
        saved = None if wish.session in (None, "new") else await self._saved(session)
        seed = wish.seed if wish.seed is not None else settings.seed
        seed = secrets.randbelow(_MOST_SEED) if seed is None else seed
        stream = await self.engine.open(slot, seed, saved)
        silent = (model.text_padding_token_id, model.end_of_text_padding_id)
        conversation = Conversation(
            stream,
            self.engine,
            sound_of(wish.sound, int(mimi.sample_rate)),
            TextPieces(self._tokenizer, silent),
            settings.limits,
            settings.memory_every if wish.metadata else 0,
        )
        self.engine.join(conversation)
        self._talking.add(conversation)
        if self.stopping:
            conversation.end(STOPPED)
        try:
            yield conversation
        finally:
            self._talking.discard(conversation)
            rest = None if session is None else conversation.rest()
            await self._save(session, await self.engine.leave(conversation, rest))

    async def _saved(self, session: str | None) -> Any:
        assert self._sessions is not None
        assert session is not None
        try:
            tensors = await asyncio.to_thread(
                read_session, self._sessions.path(session), self._settings.identity
            )
        except ValueError as error:
            logger.warning("a session was not restored: %s", error)
            why = "this session was held with another model or other settings; session=new begins one"
            raise SessionError(409, why) from error
        self.metrics.sessions.labels("restored").inc()
        return tensors

    async def _save(self, session: str | None, tensors: Any) -> None:
        if session is None:
            return
        assert self._sessions is not None
        if tensors is None:
            logger.warning("a session was not saved: its state is broken")
            return
        path = self._sessions.path(session)
        try:
            await asyncio.to_thread(write_session, path, tensors, self._settings.identity)
        except OSError as error:
            self.metrics.errors.labels("session").inc()
            logger.error("a session was not saved: %s", error)
        else:
            self.metrics.sessions.labels("saved").inc()

    async def say_goodbye(self) -> None:
        """Take no more clients, say goodbye to those who are here, and wait until they are saved."""
        self.stopping = True
        for conversation in self._talking:
            conversation.end(STOPPED)
        await self._none_left.wait()
