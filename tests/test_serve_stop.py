"""A live server that stops, or whose model fails: who is told, what is saved, what is answered meanwhile."""

import asyncio
import logging
import re
import threading

import aiohttp
import pytest
from live import Client, busy, first_conversation, in_loop, live, short_run, speech

from inference.live.access import Access
from inference.serve import ServeConfig, build_server, serve


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("stop"))


@in_loop
async def test_a_server_that_stops_waits_until_all_are_saved_and_takes_no_others(checkpoint, tmp_path):
    sessions = {"sessions": {"folder": str(tmp_path / "s")}}
    async with live(checkpoint, slots=3, **sessions) as server, server.chat("session=new") as ws:
        client = Client(ws)
        session = (await client.talk(speech(3))).metadata[0]["session"]
        release = busy(server)
        opening = asyncio.create_task(server.http.ws_connect(f"{server.url}/api/chat"))
        async with asyncio.timeout(20):
            while server.server._active() < 2:
                await asyncio.sleep(0.01)
        stopping = asyncio.create_task(server.server.say_goodbye())
        assert await client.closed() == 1001
        async with server.http.get(f"{server.url}/healthz") as answer:
            assert answer.status == 503
            assert (await answer.json())["status"] == "stopping"
        assert await server.refused() == (503, "this server is stopping\n")
        await asyncio.sleep(0.5)
        assert not stopping.done()
        assert not server.server._sessions.path(session).exists()
        release.set()
        late = Client(await opening)  # it was on its way in
        assert await late.closed() == 1001
        await asyncio.wait_for(stopping, 20)
        assert server.server._sessions.path(session).exists()
        assert server.server._active() == 0


@in_loop
async def test_a_server_whose_model_fails_tells_its_clients_and_ends_with_the_error(checkpoint, caplog):
    caplog.set_level(logging.INFO)
    config = ServeConfig(str(checkpoint), device="cpu", port=0, slots=2)
    server = build_server(config, Access(None))
    serving = asyncio.create_task(serve(config, server))
    async with asyncio.timeout(30):
        while (found := re.search(r"listening on (http\S+),", caplog.text)) is None:
            await asyncio.sleep(0.05)
    url = f"{found.group(1)}/api/chat?audio=pcm"
    async with aiohttp.ClientSession() as http, http.ws_connect(url) as one, http.ws_connect(url) as two:
        await Client(one).talk(speech(3))
        # Weights of a wrong shape: the next step fails in torch.
        assert server.engine.model.out_norm is not None
        weight = server.engine.model.out_norm.alpha
        weight.data = weight.data[..., :3]
        await Client(one).send(speech(1))
        assert await Client(one).closed() == 1001
        assert await Client(two).closed() == 1001
    with pytest.raises(RuntimeError, match="size of tensor"):
        await asyncio.wait_for(serving, 20)
    assert server.failed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("model")]


@in_loop
async def test_health_tells_of_a_model_that_failed(checkpoint):
    async with live(checkpoint) as server:
        server.server.failed = True
        async with server.http.get(f"{server.url}/healthz") as answer:
            assert (answer.status, (await answer.json())["status"]) == (503, "failed")
        assert (await server.refused())[0] == 503


@in_loop
async def test_the_model_is_not_waited_for_by_the_doors(checkpoint):
    """While a step runs, others are answered."""
    async with live(checkpoint, slots=1) as server, server.chat() as ws:
        release = busy(server)
        await Client(ws).send(speech(1))
        await first_conversation(server)
        async with asyncio.timeout(5):
            assert (await server.refused("/healthz"))[0] == 200
            assert "moshi_ttt_slots_active 1.0" in await server.metrics()
            assert (await server.refused())[0] == 503
        release.set()
        await Client(ws).talk(speech(1))
