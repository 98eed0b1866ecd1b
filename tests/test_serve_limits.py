"""Each limit of a live server by itself: where it begins, and that it ends what is beyond it in time."""

import asyncio
import base64
import re
import socket
import time
from contextlib import suppress

import numpy as np
import pytest
from live import (
    FRAME,
    Client,
    alone,
    as_float,
    as_pcm,
    busy,
    first_conversation,
    in_loop,
    live,
    short_run,
    speech,
)
from prometheus_client.parser import text_string_to_metric_families
from training import ROOT

from inference.live.engine import Spoken
from inference.live.limits import LimitsConfig
from inference.live.protocol import AUDIO, PCM, Ending

PING = b"\x06"


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("limits"))


async def endings(server) -> dict[str, float]:
    """Conversations that ended, by how."""
    families = text_string_to_metric_families(await server.metrics())
    samples = (sample for family in families for sample in family.samples)
    return {s.labels["ending"]: s.value for s in samples if s.name == "moshi_ttt_conversations_total"}


def test_the_documented_limits_are_those_of_the_program():
    table = (ROOT / "docs/serve.md").read_text().partition("## Limits")[2].partition("## ")[0]
    told: dict[str, float] = {}
    for names, values in re.findall(r"^\| (`.*?) \| ([\d., ]+)", table, re.M):
        found = re.findall(r"`(\w+)`", names)
        told |= zip(found, [float(v) for v in re.findall(r"[\d.]+", values)][: len(found)], strict=True)
    assert len(told) >= 8
    assert {name: getattr(LimitsConfig(), name) for name in told} == told


@pytest.mark.parametrize("message", [PING, b"\x03\x01", "words", bytes([PCM, 1])])
@in_loop
async def test_what_is_no_audio_keeps_no_conversation_alive(checkpoint, message):
    async with (
        live(checkpoint, limits={"idle_sec": 1.0, "malformed": 10000}) as server,
        server.chat() as ws,
    ):
        started = time.monotonic()

        async def insist():
            with suppress(ConnectionResetError):
                while time.monotonic() < started + 15:
                    await (ws.send_str(message) if isinstance(message, str) else ws.send_bytes(message))
                    await asyncio.sleep(0.1)

        insisting = asyncio.create_task(insist())
        client = Client(ws)
        assert await client.closed() == 1000
        assert client.goodbye == (1000, "no audio for 1 s")
        assert 0.9 < time.monotonic() - started < 10
        insisting.cancel()
        assert await endings(server) == {"idle": 1}


@in_loop
async def test_audio_keeps_a_conversation_alive(checkpoint):
    async with live(checkpoint, limits={"idle_sec": 2.0}) as server, server.chat() as ws:
        for _ in range(8):
            await ws.send_bytes(bytes([PCM]) + speech(1).tobytes())
            await asyncio.sleep(0.5)
        assert server.server._active() == 1


@in_loop
async def test_as_many_messages_without_sense_as_allowed_and_no_more(checkpoint):
    async with live(checkpoint, limits={"malformed": 3}) as server, server.chat() as ws:
        client = Client(ws)
        for _ in range(3):
            await ws.send_str("words")
        await client.talk(speech(2))
        await ws.send_str("words")
        assert await client.closed() == 1007
        assert await endings(server) == {"malformed": 1}


@in_loop
async def test_a_message_with_too_much_sound_is_not_heard(checkpoint):
    async with (
        live(checkpoint, limits={"message_sec": 1.0, "late_sec": 60.0}) as server,
        server.http.ws_connect(f"{server.url}/api/chat") as ws,
    ):
        client = Client(ws, opus=True)
        writer = client._writer
        for frames in (25, 5):  # 2 s and 0.4 s
            pages = b"".join(writer.append_pcm(np.zeros(FRAME, np.float32)) for _ in range(frames))
            await ws.send_bytes(bytes([AUDIO]) + pages)
        conversation = await first_conversation(server)
        async with asyncio.timeout(20):
            while conversation.stream.frames < 5:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        assert conversation.stream.frames == 5
        assert conversation._malformed == 1


@in_loop
async def test_messages_are_not_compressed(checkpoint):
    """A few bytes of a compressed message can stand for gigabytes."""
    async with live(checkpoint) as server, server.chat(compress=15) as ws:
        assert "Sec-WebSocket-Extensions" not in ws._response.headers
        assert ws.compress == 0
        await Client(ws).talk(speech(2))


@in_loop
async def test_a_client_that_answers_no_ping_is_gone(checkpoint):
    async with (
        live(checkpoint, limits={"heartbeat_sec": 1.0}) as server,
        server.chat(autoping=False),
        server.chat() as ws,
    ):
        client = Client(ws)
        async with asyncio.timeout(20):
            while server.server._active() == 2:
                await client.talk(speech(1))
                await asyncio.sleep(0.05)
        assert await endings(server) == {"vanished": 1}
        await client.talk(speech(2))


@in_loop
async def test_a_client_that_answers_no_goodbye_keeps_no_place(checkpoint):
    limits = {"session_sec": 1.0, "leave_sec": 0.5, "heartbeat_sec": 1000.0}
    async with live(checkpoint, limits=limits) as server, server.chat():
        started = time.monotonic()
        await server.until_free()
        assert time.monotonic() - started < 10
        assert await endings(server) == {"time": 1}


async def unread(server) -> socket.socket:
    """A client that talks the protocol and reads nothing after the handshake."""
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, int(port)))
    key = base64.b64encode(bytes(16)).decode()
    await loop.sock_sendall(
        client,
        f"GET /api/chat?audio=pcm HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode(),
    )
    return client


@in_loop
async def test_a_client_that_reads_nothing_keeps_neither_a_place_nor_memory(checkpoint):
    limits = {"leave_sec": 0.5, "heartbeat_sec": 1000.0, "late_sec": 0.4}
    async with live(checkpoint, slots=1, limits=limits) as server:
        client = await unread(server)
        conversation = await first_conversation(server)
        dropped = 0
        async with asyncio.timeout(30):
            while dropped < 100:  # until all buffers on the way are full
                conversation.say(Spoken(1, 3, np.zeros(FRAME, np.float32)))
                await asyncio.sleep(0)
                dropped = len(conversation._outbox) // 5 + dropped if len(conversation._outbox) == 5 else 0
        conversation.end(Ending(1000, "enough", "time"))
        started = time.monotonic()
        await server.until_free()
        assert time.monotonic() - started < 5
        async with asyncio.timeout(10):
            while len(server.connections()) > 0:
                await asyncio.sleep(0.05)
        async with server.chat() as ws:  # the place is another's
            await Client(ws).talk(speech(2))
        client.close()


@in_loop
async def test_of_frames_that_are_late_the_oldest_are_dropped(checkpoint):
    async with live(checkpoint, slots=1, limits={"late_sec": 0.4}) as server, server.chat("seed=5") as ws:
        client = Client(ws)
        conversation = await first_conversation(server)
        go_on = busy(server)
        user = speech(20).reshape(20, FRAME)
        await client.send(user[0])
        async with asyncio.timeout(20):
            while server.server.engine._thread._work_queue.empty():  # until it is on its way to the model
                await asyncio.sleep(0.01)
        for frame in user[1:]:
            await client.send(frame)
        async with asyncio.timeout(20):
            while conversation.dropped < 14:
                await asyncio.sleep(0.01)
        go_on.set()
        # Of those behind it five may wait.
        heard = np.concatenate((user[:1], user[15:])).reshape(-1)
        while client.heard.frames < 6:
            assert await client.receive()
    audio, text = alone(checkpoint, as_float(heard), 5)
    assert np.array_equal(client.heard.pcm, as_pcm(audio))
    assert client.heard.text == text
    assert conversation.dropped == 14


def test_limits_are_positive_numbers():
    for name in vars(LimitsConfig()):
        for value in (-1, 0) if name != "malformed" else (-1,):
            with pytest.raises(ValueError, match=f"limits.{name} must be more than 0, got {value}"):
                LimitsConfig(**{name: value}).check()
    LimitsConfig(malformed=0).check()
