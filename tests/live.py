"""A live server for tests, in this process, and clients for it."""

import asyncio
import base64
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import sphn
import torch
from aiohttp import web
from training import ROOT, dialogue, run

from inference.live.access import Access
from inference.live.application import Server
from inference.live.conversation import Conversation
from inference.live.limits import LimitsConfig
from inference.live.protocol import AUDIO, HANDSHAKE, METADATA, PCM, TEXT, TextPieces
from inference.live.sessions import SessionsConfig
from inference.rows import Sampling
from inference.serve import ServeConfig, app_runner, build_server, check_config
from inference.stream import open_stream
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.loading import load_mimi, load_tokenizer

FRAME = 1920


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that runs in an event loop of its own."""

    @functools.wraps(test)
    def run_test(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 120))

    return run_test


def short_run(folder: Path) -> Path:
    """A tiny run whose attention windows and mini-batches are over soon."""
    settings = ("ttt.mini_batch_size=5", "ttt.ttt_layer_context=7", "ttt.non_ttt_layer_context=9")
    return run(folder / "run", *settings)


def speech(frames: int, start: int = 0) -> np.ndarray:
    """16-bit samples `[n]` of a user."""
    clip = dialogue(4)[14400 + start * FRAME :, 1][: frames * FRAME]
    assert clip.shape[0] == frames * FRAME
    return (clip * 32768).round().astype("<i2")


CPU = torch.device("cpu")


def alone(
    checkpoint: Path, samples: np.ndarray, seed: int, device: torch.device = CPU
) -> tuple[np.ndarray, str]:
    """What `open_stream` answers to samples: audio `[n]`, and text."""
    return next(each_alone(checkpoint, [samples], seed, device))


def each_alone(
    checkpoint: Path, several: Iterable[np.ndarray], seed: int, device: torch.device = CPU
) -> Iterator[tuple[np.ndarray, str]]:
    """What `open_stream` answers to each of several recordings, in a conversation of its own."""
    loaded = load_checkpoint(checkpoint, device)
    mimi, tokenizer = load_mimi(loaded.base, device), load_tokenizer(loaded.base)
    for samples in several:
        pieces = TextPieces(tokenizer, (0, 3))
        with open_stream(loaded.model, mimi, Sampling(seed=seed)) as stream:
            frames = list(stream.hear(torch.from_numpy(samples)))
        text = "".join(pieces.text(int(frame.tokens[0, 0, 0])) for frame in frames)
        yield torch.cat([frame.audio for frame in frames]).numpy(), text


def as_float(pcm: np.ndarray) -> np.ndarray:
    return pcm.astype(np.float32) / 32768


def as_pcm(audio: np.ndarray) -> np.ndarray:
    return (audio * 32768).round().clip(-32768, 32767).astype("<i2")


def through_opus(samples: np.ndarray) -> np.ndarray:
    """What arrives of samples that are sent frame by frame."""
    writer, reader = sphn.OpusStreamWriter(24000), sphn.OpusStreamReader(24000)
    sent = (writer.append_pcm(frame) for frame in samples.reshape(-1, FRAME))
    return np.concatenate([reader.append_bytes(page) for page in sent])


def certificate(folder: Path) -> Path:
    """A folder with a certificate for 127.0.0.1 that nobody has signed but its own key."""
    folder.mkdir()
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"), "-days", "2"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@dataclass
class Live:
    """A server that answers at `url`."""

    server: Server
    url: str
    http: aiohttp.ClientSession
    runner: web.AppRunner
    kept_busy: list[threading.Event] = field(default_factory=list)

    def chat(self, query: str = "", **options):
        """An open WebSocket of a client that speaks PCM and wants metadata."""
        return self.http.ws_connect(f"{self.url}/api/chat?audio=pcm&metadata=1&{query}", **options)

    async def refused(self, path: str = "/api/chat", **headers: str) -> tuple[int, str]:
        """Status and text of the answer to a client that wants to open a WebSocket."""
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = base64.b64encode(bytes(16)).decode()
        async with self.http.get(f"{self.url}{path}", headers=upgrade | headers) as answer:
            return answer.status, "" if answer.status == 101 else await answer.text()

    async def metrics(self) -> str:
        async with self.http.get(f"{self.url}/metrics") as answer:
            return await answer.text()

    def connections(self) -> list[object]:
        """That are open."""
        assert self.runner.server is not None
        return list(self.runner.server.connections)

    async def until_free(self, active: int = 0) -> None:
        """Wait until no more than `active` conversations hold a slot."""
        async with asyncio.timeout(20):
            while self.server._active() > active:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def live(checkpoint: Path, access: Access | None = None, static: Path | None = None, **settings):
    """A server in this event loop. Settings are fields of ServeConfig; its groups are given as mappings."""
    groups = {"limits": LimitsConfig, "sessions": SessionsConfig}
    settings |= {name: kind(**settings.get(name, {})) for name, kind in groups.items()}
    config = ServeConfig(str(checkpoint), **({"device": "cpu", "slots": 2, "memory_every": 1} | settings))
    check_config(config)
    server = build_server(config, access or Access(None))
    await server.engine.start()
    driver = asyncio.create_task(server.engine.run())
    runner = app_runner(server, static)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as http:
            found = Live(server, url, http, runner)
            try:
                yield found
            finally:
                for event in found.kept_busy:  # of a test that failed
                    event.set()
            assert not driver.done()  # the model's thread is well
    finally:
        await server.say_goodbye()
        await runner.cleanup()
        driver.cancel()
        with suppress(asyncio.CancelledError):
            await driver
        await server.engine.close()


async def first_conversation(server: Live) -> Conversation:
    async with asyncio.timeout(10):
        while not server.server._talking:
            await asyncio.sleep(0.01)
    return next(iter(server.server._talking))


def busy(server: Live) -> threading.Event:
    """Keep the model's thread from its work until the event is set."""
    begun, release = threading.Event(), threading.Event()
    server.kept_busy.append(release)
    server.server.engine._thread.submit(lambda: (begun.set(), release.wait()))
    assert begun.wait(20)
    return release


@asynccontextmanager
async def started(checkpoint: Path, *overrides: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A server in a process of its own, and its address. It is ended if the test does not end it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "inference.serve", f"checkpoint={checkpoint}", "port=0", "device=cpu"),
        *("memory_every=1", *overrides),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    try:
        printed = ""
        while (found := re.search(r"listening on (\S+),", printed)) is None:
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            assert line, printed
            printed += line.decode()
        yield process, found.group(1)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass
class Heard:
    """What a client got."""

    pcm: np.ndarray = field(default_factory=lambda: np.zeros(0, "<i2"))
    text: str = ""
    metadata: list[dict] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """Whole frames, with all that is said of them: metadata comes last."""
        told = sum("memory" in content for content in self.metadata)
        return told or self.pcm.shape[0] // FRAME


class Client:
    """Speaks our PCM kind, or Opus, over an open WebSocket."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, opus: bool = False):
        self.ws = ws
        self.heard = Heard()
        self.goodbye: tuple[int, str] | None = None  # code and reason
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
            if message.type == aiohttp.WSMsgType.CLOSE:
                self.goodbye = message.data, message.extra
            return False
        kind, payload = message.data[0], message.data[1:]
        if kind == TEXT:
            self.heard.text += payload.decode()
        elif kind == METADATA:
            self.heard.metadata.append(json.loads(payload))
        elif kind in (PCM, AUDIO):
            assert kind == (AUDIO if self.opus else PCM)
            if self.opus:
                samples = (self._reader.append_bytes(payload) * 32768).astype("<i2")
            else:
                samples = np.frombuffer(payload, "<i2")
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
        """Wait for the server's goodbye: its code; None where the connection broke."""
        while await self.receive():
            pass
        return None if self.goodbye is None else self.goodbye[0]
