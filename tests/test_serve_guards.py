"""A live server among strangers: limits, tokens, foreign pages, garbage, and clients that vanish."""

import asyncio
import base64
import random
import time
from contextlib import suppress

import aiohttp
import numpy as np
import pytest
from live import FRAME, Client, first_conversation, in_loop, live, short_run, speech
from prometheus_client.parser import text_string_to_metric_families

from inference.live.access import Access, is_loopback, read_token
from inference.live.engine import Spoken
from inference.live.limits import RateLimit
from inference.live.protocol import AUDIO, PCM
from inference.live.sound import OpusSound
from inference.serve import ServeConfig, check_config

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("guards"))


def counts(metrics: str) -> dict[tuple[str, ...], float]:
    """Values of a Prometheus text, by name and labels."""
    families = text_string_to_metric_families(metrics)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


@in_loop
async def test_a_full_server_says_so_before_the_upgrade(checkpoint):
    started = time.monotonic()
    async with live(checkpoint, slots=2) as server:
        async with server.chat() as first, server.chat():
            assert counts(await server.metrics())["moshi_ttt_slots_active",] == 2
            assert await server.refused() == (503, "all places are taken; try again later\n")
            await Client(first).talk(speech(3))
        await server.until_free()
        assert counts(await server.metrics())["moshi_ttt_slots_active",] == 0
        async with server.chat() as ws:
            await Client(ws).talk(speech(2))
            found = counts(await server.metrics())
    assert 0 < found["moshi_ttt_step_seconds_sum",] < time.monotonic() - started
    assert found["moshi_ttt_slots",] == 2
    assert found["moshi_ttt_slots_active",] == 1
    assert found["moshi_ttt_rejected_total", "full"] == 1
    assert found["moshi_ttt_conversations_total", "left"] == 2
    assert found["moshi_ttt_step_seconds_count",] == found["moshi_ttt_frames_total",] == 5
    assert found["moshi_ttt_frames_dropped_total", "in"] == 0


@in_loop
async def test_only_who_knows_the_token_may_talk(checkpoint):
    async with live(checkpoint, Access(TOKEN)) as server:
        basic = base64.b64encode(f"any:{TOKEN}".encode()).decode()
        wrong = base64.b64encode(b"any:").decode()
        for path, headers in {
            "/api/chat": {},
            "/metrics": {},
            "/api/access": {"Authorization": f"Bearer {TOKEN}x"},
            "/api/chat?token=": {},
            "/api/chat?token=%ff%00": {"Authorization": "Bearer"},
            "/api/chat?": {"Authorization": f"Basic {wrong}"},
            "/nothing": {"Authorization": "Basic !"},
        }.items():
            assert await server.refused(path, **headers) == (401, "this server needs a token\n"), path
        for path in ("/", "/page.js", "/healthz"):  # nothing secret
            assert (await server.refused(path))[0] == 200
        for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"Basic {basic}"}):
            assert (await server.refused(**headers))[0] == 101
            await server.until_free()
        # As Moshi's own client can: python -m moshi.client --url http://any:TOKEN@host:port
        url = f"{server.url}/api/chat".replace("//", f"//any:{TOKEN}@")
        async with server.http.ws_connect(url) as ws:
            await Client(ws, opus=True).talk(speech(2))
        async with server.chat(f"token={TOKEN}") as ws:
            await Client(ws).talk(speech(2))


@in_loop
async def test_pages_of_other_sites_are_refused(checkpoint):
    friend = "https://friend.example"
    async with live(checkpoint, Access(None, [friend])) as server:
        port = server.url.rpartition(":")[2]
        for origin in (
            "https://evil.example",
            "null",
            "http://127.0.0.1:1",
            friend + ":1",
            "file://",
            f"http://x127.0.0.1:{port}",
        ):
            status, text = await server.refused(Origin=origin)
            assert (status, text[:23]) == (403, "pages of other sites ma"), origin
        # A name of the attacker's own that resolves to this machine.
        rebound = {"Origin": f"http://evil.example:{port}", "Host": f"evil.example:{port}"}
        status, text = await server.refused(**rebound)
        assert (status, text[:36]) == (403, "this server answers to loopback name")
        for headers in (
            {"Origin": server.url},
            {"Origin": friend},
            {"Origin": friend, "Host": "friend.example"},
            {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"},
        ):
            assert (await server.refused(**headers))[0] == 101, headers
            await server.until_free()
    with pytest.raises(ValueError, match=r"origins holds 'x.org'; expected something like https://"):
        Access(None, ["x.org"])


def test_other_machines_need_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("MOSHI_TTT_TOKEN", raising=False)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "", "10.0.0.1", "localhost.evil")] == [False] * 5
    assert read_token("127.0.0.1", None) is None
    with pytest.raises(ValueError, match=r"host=0.0.0.0 can be reached .* set MOSHI_TTT_TOKEN or token_file"):
        read_token("0.0.0.0", None)
    monkeypatch.setenv("MOSHI_TTT_TOKEN", TOKEN)
    assert read_token("0.0.0.0", None) == read_token("127.0.0.1", None) == TOKEN
    file = tmp_path / "token"
    with pytest.raises(ValueError, match="token_file .* does not exist; write a token into it"):
        read_token("0.0.0.0", str(file))
    file.write_text("short\n")
    with pytest.raises(ValueError, match="expected 16 or more printable ASCII characters") as error:
        read_token("0.0.0.0", str(file))
    assert "short\n" not in str(error.value)
    file.write_text(TOKEN[::-1] + "\n")
    assert read_token("0.0.0.0", str(file)) == TOKEN[::-1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"slots": 0}, "slots must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"memory_every": -1}, "must be 0 .never. or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_config(ServeConfig("-", **settings))


def test_nested_settings_that_cannot_work_are_refused():
    config = ServeConfig("-")
    config.limits.idle_sec = 0
    with pytest.raises(ValueError, match="limits.idle_sec must be more than 0, got 0"):
        check_config(config)
    config = ServeConfig("-")
    config.sampling.seed = 4
    with pytest.raises(ValueError, match="sampling.seed=4 is not read here; use seed=4"):
        check_config(config)
    config = ServeConfig("-")
    config.sessions.save = "always"
    with pytest.raises(ValueError, match="sessions.save=always needs sessions.folder"):
        check_config(config)


def test_the_rate_is_held_over_any_time():
    now = 0.0
    rate = RateLimit(10, lambda: now)
    assert sum(rate.allows_one() for _ in range(100)) == 20
    now = 0.55
    assert sum(rate.allows_one() for _ in range(100)) == 5
    now = 1000.0
    assert sum(rate.allows_one() for _ in range(100)) == 20


@in_loop
async def test_too_much_ends_the_conversation(checkpoint):
    limits = {"message_bytes": 5000, "messages_per_sec": 20, "idle_sec": 1, "session_sec": 3}
    async with live(checkpoint, limits=limits) as server:
        async with server.chat() as ws:  # too big
            client = Client(ws)
            await client.send(speech(1))
            await client.send(speech(2))
            assert await client.closed() == 1009
        async with server.chat() as ws:  # too many
            for _ in range(50):
                await ws.send_bytes(bytes([PCM]) + bytes(2))
            assert await Client(ws).closed() == 1008
        async with server.chat() as ws:  # pings are no audio
            ticks = [asyncio.create_task(ws.ping()) for _ in range(3)]
            assert await Client(ws).closed() == 1000
            await asyncio.gather(*ticks)
        async with server.chat() as ws:  # too long
            client = Client(ws)
            with suppress(ConnectionResetError):
                for _ in range(50):
                    await client.send(speech(1))
                    await asyncio.sleep(0.2)
                    if ws._reader.exception() or ws.closed or server.server._active() == 0:
                        break
            assert await client.closed() == 1000
        await server.until_free()
        found = counts(await server.metrics())
    endings = {name[1]: n for name, n in found.items() if name[0] == "moshi_ttt_conversations_total"}
    assert endings == {"protocol": 1, "flood": 1, "idle": 1, "time": 1}


@in_loop
async def test_late_frames_are_dropped_and_counted(checkpoint):
    async with live(checkpoint, limits={"late_sec": 0.4}) as server, server.chat() as ws:
        client = Client(ws)
        for part in speech(40).reshape(10, -1):  # 4 frames a message, faster than any model
            await client.send(part)
        conversation = await first_conversation(server)
        async with asyncio.timeout(20):
            while not (conversation.dropped and conversation.stream.frames and not conversation.inbox):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        heard, dropped = conversation.stream.frames, conversation.dropped
        assert heard + dropped == 40
        assert heard < 20
        for number in range(30):  # without a moment for the sender
            conversation.say(Spoken(number, 3, np.zeros(FRAME, np.float32)))
        found = counts(await server.metrics())
    assert found["moshi_ttt_frames_dropped_total", "in"] == dropped
    assert found["moshi_ttt_frames_dropped_total", "out"] == 25


def garbage(chance: random.Random) -> bytes | str:
    """A message without sense, of many kinds."""
    opus = OpusSound(24000)
    page = opus.encode(np.zeros(FRAME, np.float32))
    broken = bytearray(page)
    broken[chance.randrange(4)] ^= 255
    return chance.choice(
        [
            b"",
            "words",
            bytes([PCM]) + bytes(1 + 2 * chance.randrange(50)),  # half a sample
            bytes([AUDIO]) + chance.randbytes(chance.randrange(4, 900)),
            bytes([chance.choice([2, 5, 7, 15, 17, 255])]) + chance.randbytes(9),
            bytes([AUDIO]) + bytes(broken),
        ]
    )


def test_little_opus_that_stands_for_much_sound_is_refused():
    writer, reader = OpusSound(24000), OpusSound(24000)
    pages = b"".join(writer.encode(np.zeros(FRAME, np.float32)) for _ in range(300))
    with pytest.raises(ValueError, match="more than 24000 samples in one message"):
        reader.decode(pages, 24000)
    assert OpusSound(24000).decode(pages, 300 * FRAME).shape == (300 * FRAME,)


@in_loop
async def test_5000_malformed_messages_harm_nobody(checkpoint):
    chance = random.Random(0)
    messages = [garbage(chance) for _ in range(5000)]
    limits = {"malformed": 249, "messages_per_sec": 10000}
    user = speech(60)
    async with live(checkpoint, slots=3, limits=limits) as server:
        async with server.chat("seed=1") as ws:
            expected = await Client(ws).talk(user)
        async with server.chat("seed=1") as good:
            talking = asyncio.create_task(Client(good).talk(user))
            for start in range(0, 5000, 250):
                async with server.chat("audio=opus" if start % 500 else "") as ws:
                    for message in messages[start : start + 250]:
                        sent = ws.send_str(message) if isinstance(message, str) else ws.send_bytes(message)
                        await sent
                    code = await Client(ws).closed()
                    assert code == 1007 or start % 500, code
            heard = await talking
        found = counts(await server.metrics())
    assert np.array_equal(heard.pcm, expected.pcm)
    assert heard.text == expected.text
    assert found["moshi_ttt_malformed_messages_total",] >= 4000


@in_loop
async def test_sense_after_nonsense_is_heard(checkpoint):
    async with live(checkpoint, slots=1) as server:
        async with server.chat("seed=1&audio=pcm") as ws:
            await ws.send_str("hello")
            for kind in (0, 3, 4, 6):  # of Moshi's page; they mean nothing here
                await ws.send_bytes(bytes([kind, 1]))
            client = Client(ws)
            await client.send(speech(1))
            await ws.send_bytes(bytes([PCM, 1]))
            pcm = (await client.talk(speech(10)[FRAME:])).pcm  # the first nine are answered
        async with server.chat("seed=1") as ws:
            assert np.array_equal((await Client(ws).talk(speech(9))).pcm, pcm)
        async with server.http.ws_connect(f"{server.url}/api/chat") as ws:
            await ws.send_bytes(bytes([AUDIO]) + b"no Opus")
            client = Client(ws, opus=True)
            nan = client._writer.append_pcm(np.full(FRAME, np.nan, np.float32))
            await ws.send_bytes(bytes([AUDIO]) + nan)
            await client.talk(speech(10))
        found = counts(await server.metrics())
    assert 3 <= found["moshi_ttt_malformed_messages_total",] <= 4  # NaN may be decoded as silence


async def vanish(server, chance: random.Random) -> None:
    """A client that comes and is gone at some moment, in some way."""
    host, port = server.url.removeprefix("http://").split(":")
    if chance.random() < 0.2:  # before, in or after the handshake
        key = base64.b64encode(bytes(16)).decode()
        request = (
            f"GET /api/chat HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        ).encode()
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write((request + b"\x82\xff\x00\x00\x00")[: chance.randrange(len(request) + 6)])
        await asyncio.sleep(chance.random() * 0.02)
        writer.transport.abort()
        return
    query = chance.choice(["", "session=new", "audio=opus"])
    try:
        ws = await server.chat(query)
    except aiohttp.WSServerHandshakeError:  # full: others are still being seen off
        return
    client = Client(ws, opus=query == "audio=opus")
    for _ in range(chance.randrange(8)):
        await client.send(speech(chance.randrange(1, 4) if not client.opus else 1))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.03)
    if chance.random() < 0.6:
        assert ws._conn is not None
        ws._conn.transport.abort()
    await ws.close()


@in_loop
async def test_200_disconnects_at_random_moments_harm_nobody(checkpoint, tmp_path):
    chance = random.Random(1)
    sessions = {"folder": str(tmp_path / "sessions"), "most": 1000}
    user = np.tile(speech(80), 10)
    async with live(checkpoint, slots=4, sessions=sessions) as server:
        async with server.chat("seed=1") as good:
            client = Client(good)
            for _ in range(50):
                await asyncio.gather(
                    *(vanish(server, chance) for _ in range(4)),
                    client.talk(user[client.heard.frames * FRAME :][: 3 * FRAME]),
                )
            await server.until_free(1)
            heard = await client.talk(user[client.heard.frames * FRAME :][: 3 * FRAME])
            found = counts(await server.metrics())
        await server.until_free()
        assert sorted(server.server._free) == [0, 1, 2, 3]
        assert not server.server._talking
        assert not server.server._sessions._used
        async with server.chat("seed=1") as ws:  # the same, with nobody beside it
            expected = await Client(ws).talk(user[: heard.frames * FRAME])
    assert np.array_equal(heard.pcm, expected.pcm)
    assert heard.text == expected.text
    endings = {name[1]: n for name, n in found.items() if name[0] == "moshi_ttt_conversations_total"}
    assert endings["vanished"] > 20
    assert sum(endings.values()) > 100
    assert any((tmp_path / "sessions").iterdir())
