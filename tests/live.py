"""A live server for tests, in this process, and clients for it."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import sphn
from aiohttp.test_utils import TestServer
from training import dialogue

from inference.live.access import Access
from inference.live.application import Server
from inference.live.limits import LimitsConfig
from inference.live.protocol import AUDIO, HANDSHAKE, METADATA, PCM, TEXT
from inference.live.routes import application
from inference.live.sessions import SessionsConfig
from inference.serve import ServeConfig, build_server, check_config

FRAME = 1920


def speech(frames: int, start: int = 0) -> np.ndarray:
    """16-bit samples `[n]` of a user."""
    clip = dialogue(4)[14400 + start * FRAME :, 1][: frames * FRAME]
    return (clip * 32768).round().astype("<i2")


@dataclass
class Live:
    """A server that answers at `url`."""

    server: Server
    url: str
    http: aiohttp.ClientSession
    driver: asyncio.Task[None]

    def chat(self, query: str = "audio=pcm&metadata=1", **options):
        return self.http.ws_connect(f"{self.url}/api/chat?{query}", **options)

    async def metrics(self) -> str:
        async with self.http.get(f"{self.url}/metrics") as answer:
            return await answer.text()

    async def until_free(self, active: int = 0) -> None:
        """Wait until no more than `active` conversations hold a slot."""
        async with asyncio.timeout(20):
            while self.server._active() > active:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def live(checkpoint: Path, access: Access | None = None, static: Path | None = None, **settings):
    """A server in this event loop. Settings are fields of ServeConfig; `limits` and `sessions` are mappings."""
    groups = {"limits": LimitsConfig, "sessions": SessionsConfig}
    settings |= {name: kind(**settings.get(name, {})) for name, kind in groups.items()}
    config = ServeConfig(str(checkpoint), device="cpu", **({"slots": 2} | settings))
    check_config(config)
    server = build_server(config, access or Access(None))
    await server.engine.start()
    driver = asyncio.create_task(server.engine.run())
    async with TestServer(application(server, static)) as site, aiohttp.ClientSession() as http:
        yield Live(server, str(site.make_url("")).rstrip("/"), http, driver)
        assert not driver.done()
        await server.say_goodbye()
    driver.cancel()
    with suppress(asyncio.CancelledError):
        await driver
    await server.engine.close()


@dataclass
class Heard:
    """What a client got."""

    pcm: np.ndarray = field(default_factory=lambda: np.zeros(0, "<i2"))
    text: str = ""
    metadata: list[dict] = field(default_factory=list)

    @property
    def frames(self) -> int:
        return self.pcm.shape[0] // FRAME


class Client:
    """Speaks our PCM kind, or Opus, over an open WebSocket."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, opus: bool = False):
        self.ws = ws
        self.heard = Heard()
        self.opus = opus
        self._writer = sphn.OpusStreamWriter(24000)
        self._reader = sphn.OpusStreamReader(24000)

    async def send(self, pcm: np.ndarray) -> None:
        if self.opus:
            encoded = self._writer.append_pcm(pcm.astype(np.float32) / 32768)
            await self.ws.send_bytes(bytes([AUDIO]) + encoded)
        else:
            await self.ws.send_bytes(bytes([PCM]) + pcm.tobytes())

    async def receive(self) -> bool:
        """One message; false if the server has closed."""
        message = await asyncio.wait_for(self.ws.receive(), 20)
        if message.type != aiohttp.WSMsgType.BINARY:
            return False
        kind, payload = message.data[0], message.data[1:]
        if kind == TEXT:
            self.heard.text += payload.decode()
        elif kind == METADATA:
            self.heard.metadata.append(json.loads(payload))
        elif kind in (PCM, AUDIO):
            assert kind == (AUDIO if self.opus else PCM)
            samples = np.frombuffer(payload, "<i2")
            if self.opus:
                samples = (self._reader.append_bytes(payload) * 32768).astype("<i2")
            self.heard.pcm = np.concatenate((self.heard.pcm, samples))
        else:
            assert kind == HANDSHAKE
            assert not payload
        return True

    async def talk(self, pcm: np.ndarray, most_ahead: int = 4) -> Heard:
        """Say all whole frames of `pcm` and hear the answers, never far ahead of them."""
        frames = list(pcm.reshape(-1, FRAME))
        wanted = self.heard.frames + len(frames)
        while self.heard.frames < wanted:
            while frames and wanted - len(frames) - self.heard.frames < most_ahead:
                await self.send(frames.pop(0))
            assert await self.receive(), self.ws.close_code
        return self.heard

    async def closed(self) -> int | None:
        """Wait for the server's goodbye: its code."""
        while await self.receive():
            pass
        return self.ws.close_code


def resident_kib() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024
