"""Conversations on a live server that are left and gone on with, and a server that stops."""

import asyncio
import os
import re
import signal
import time

import aiohttp
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
    started,
)

from inference.live.sessions import SessionFolder, SessionsConfig
from inference.rows import Sampling


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("sessions"))


def kept(folder, **settings):
    return {"slots": 1, "sessions": {"folder": str(folder), **settings}}


@in_loop
async def test_a_conversation_goes_on_as_if_it_had_never_been_left(checkpoint, tmp_path):
    user, cut = speech(24), 11 * FRAME + 801
    async with live(checkpoint, slots=1) as server, server.chat("seed=5") as ws:
        whole = await Client(ws).talk(user)
    async with live(checkpoint, **kept(tmp_path / "s")) as server:
        async with server.chat("seed=5&session=new") as ws:
            first = Client(ws)
            session = ws._response.headers["Moshi-TTT-Session"]
            await first.talk(user[: 11 * FRAME])
            assert first.heard.metadata[0]["session"] == session
            await first.send(user[11 * FRAME : cut])  # a part of a frame
            await ws.send_bytes(b"\x06")
        await server.until_free()
    async with (
        live(checkpoint, **(kept(tmp_path / "s") | {"slots": 3})) as server,
        server.chat(),
        server.chat(f"seed=1&session={session}") as ws,
    ):
        again = Client(ws)
        await again.send(user[cut : 12 * FRAME])
        while not again.heard.frames:
            await again.receive()
        heard = await again.talk(user[12 * FRAME :])
        assert heard.metadata[0] | {"seed": 5, "frame": 11} == heard.metadata[0]
    both = np.concatenate((first.heard.pcm, heard.pcm)).astype(int)
    assert np.abs(both - whole.pcm).max() <= 1
    assert first.heard.text + heard.text == whole.text
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    names = [path.name for path in (tmp_path / "s").iterdir()]
    assert len(names) == 1
    assert session not in names[0]  # who lists the folder learns no id


@in_loop
async def test_only_a_known_free_fresh_session_is_opened(checkpoint, tmp_path):
    settings = kept(tmp_path / "s", keep_hours=1, most=2)
    async with live(checkpoint, **(settings | {"slots": 3})) as server:
        for bad in ("../../etc/passwd", "a" * 42, "a" * 44, "%00" * 43, "é" * 43, ""):
            status, text = await server.refused(f"/api/chat?session={bad}")
            assert (status, text) == (400, "this is no session id; session=new begins a session\n")
        assert (await server.refused(f"/api/chat?session={'a' * 43}"))[0] == 404
        async with server.chat("session=new") as ws:
            session = (await Client(ws).talk(speech(2))).metadata[0]["session"]
            assert re.fullmatch(r"[\w-]{43}", session)
            assert await server.refused(f"/api/chat?session={session}") == (409, "this session is in use\n")
            async with server.chat("session=new"):
                assert (await server.refused("/api/chat?session=new"))[0] == 503
        await server.until_free()
        async with server.chat(f"session={session}") as ws:
            assert (await Client(ws).talk(speech(2))).metadata[0]["frame"] == 2
        await server.until_free()
    async with live(checkpoint, **settings, sampling=Sampling(temp=0.5)) as server:
        status, text = await server.refused(f"/api/chat?session={session}")
        assert (status, text[:46]) == (409, "this session was held with another model or ot")
        assert str(tmp_path) not in text
        await server.until_free()
    (file,) = [path for path in (tmp_path / "s").iterdir() if path.stat().st_size > 10_000][:1]
    for path in (tmp_path / "s").iterdir():
        os.utime(path, (time.time() - 3700,) * 2)
    async with live(checkpoint, **settings) as server:
        assert not file.exists()
        assert (await server.refused(f"/api/chat?session={session}"))[0] == 404
    async with live(checkpoint) as server:
        assert await server.refused("/api/chat?session=new") == (400, "this server saves no sessions\n")


@in_loop
async def test_a_server_that_is_stopped_says_goodbye_saves_and_goes_on(checkpoint, tmp_path):
    user, heard, code = speech(16), [], []
    session, stops = "new", (signal.SIGTERM, signal.SIGINT)
    for part, stop in zip((user[: 8 * FRAME], user[8 * FRAME :]), stops, strict=True):
        settings = (f"sessions.folder={tmp_path / 's'}", "slots=1", "seed=4")
        async with started(checkpoint, *settings) as (process, url), aiohttp.ClientSession() as http:
            query = f"audio=pcm&metadata=1&session={session}"
            async with http.ws_connect(f"{url}/api/chat?{query}") as ws:
                client = Client(ws)
                heard.append(await client.talk(part))
                process.send_signal(stop)
                await client.closed()
                assert client.goodbye == (1001, "the server stops; goodbye")
            assert process.stdout is not None
            printed = (await process.stdout.read()).decode()
            code.append(await asyncio.wait_for(process.wait(), 20))
        session = heard[0].metadata[0]["session"]
        assert session not in printed
        assert "conversation 1 ends" in printed
        assert printed.endswith("stopped\n")
    assert code == [0, 0]
    async with live(checkpoint, slots=1) as server, server.chat("seed=4") as ws:
        whole = await Client(ws).talk(user)
    assert np.array_equal(np.concatenate([part.pcm for part in heard]), whole.pcm)
    assert heard[0].text + heard[1].text == whole.text


def test_ids_cannot_be_guessed(tmp_path):
    """Each of an id's characters takes many values, in every place, also in a server that starts anew."""
    ids = []
    for _ in range(2):
        folder = SessionFolder(SessionsConfig(str(tmp_path), most=1000))
        ids += [folder.take_new() for _ in range(100)]
    assert len(set(ids)) == 200
    places = [set(characters) for characters in zip(*ids, strict=True)]
    assert len(places) == 43  # 42 of 6 bits and one of 4
    assert all(len(place) > 40 for place in places[:-1])
    assert len(places[-1]) > 10


def test_a_session_expires_when_its_time_is_over_and_not_while_it_is_used(tmp_path):
    folder = SessionFolder(SessionsConfig(str(tmp_path), keep_hours=1))
    young, old, used = (folder.take_new() for _ in range(3))
    for session, age in ((young, 3500), (old, 3700), (used, 3700)):
        folder.path(session).write_bytes(b"-")
        os.utime(folder.path(session), (time.time() - age,) * 2)
    for session in (young, old):
        folder.give_back(session)
    folder.sweep()
    assert [folder.path(session).exists() for session in (young, old, used)] == [True, False, True]
    folder.give_back(used)
    folder.sweep()
    assert not folder.path(used).exists()


@in_loop
async def test_all_conversations_are_saved_where_that_is_the_setting(checkpoint, tmp_path):
    user = speech(12)
    async with live(checkpoint, **kept(tmp_path / "s", save="always"), seed=6) as server:
        async with server.http.ws_connect(f"{server.url}/api/chat?audio=pcm") as ws:
            session = ws._response.headers["Moshi-TTT-Session"]
            first = await Client(ws).talk(user[: 6 * FRAME])
        await server.until_free()
        async with server.chat(f"session={session}") as ws:
            second = await Client(ws).talk(user[6 * FRAME :])
        await server.until_free()
    async with live(checkpoint, slots=1, seed=6) as server, server.chat() as ws:
        whole = await Client(ws).talk(user)
    assert np.array_equal(np.concatenate((first.pcm, second.pcm)), whole.pcm)


@in_loop
async def test_a_client_that_vanished_finds_its_conversation(checkpoint, tmp_path):
    user = speech(12)
    async with live(checkpoint, **kept(tmp_path / "s"), seed=6) as server:
        ws = await server.chat("session=new")
        first = await Client(ws).talk(user[: 6 * FRAME])
        ws._conn.transport.abort()
        await server.until_free()
        assert 'conversations_total{ending="vanished"} 1.0' in await server.metrics()
        async with server.chat(f"session={first.metadata[0]['session']}") as again:
            second = await Client(again).talk(user[6 * FRAME :])
        await ws.close()
    audio, _ = alone(checkpoint, as_float(user), 6)
    assert np.array_equal(np.concatenate((first.pcm, second.pcm)), as_pcm(audio))


@in_loop
async def test_frames_that_waited_when_the_client_left_are_heard_when_it_comes_back(checkpoint, tmp_path):
    user = speech(16)
    async with live(checkpoint, **kept(tmp_path / "s"), seed=6) as server:
        async with server.chat("session=new") as ws:
            client = Client(ws)
            session = (await client.talk(user[: 4 * FRAME])).metadata[0]["session"]
            release = busy(server)
            conversation = await first_conversation(server)
            for frame in user[4 * FRAME : 10 * FRAME].reshape(6, FRAME):
                await client.send(frame)
            async with asyncio.timeout(20):
                while len(conversation.inbox) < 5:  # one is on its way to the model
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            while not conversation.ended.done():
                await asyncio.sleep(0.01)
        release.set()
        await server.until_free()
        async with server.chat(f"session={session}") as ws:
            again = Client(ws)
            await again.send(user[10 * FRAME :][:FRAME])
            while again.heard.frames < 6:
                assert await again.receive()
            heard = await again.talk(user[11 * FRAME :])
    # What was answered while nobody listened is lost.
    assert heard.metadata[0]["frame"] in (4, 5)
    audio, _ = alone(checkpoint, as_float(user), 6)
    assert np.array_equal(heard.pcm, as_pcm(audio)[-len(heard.pcm) :])
    assert len(heard.pcm) >= 11 * FRAME
