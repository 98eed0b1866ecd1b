"""What a live server answers where: Moshi's own page in place of ours (`static=`), and https (`tls=`)."""

import asyncio
import base64
import signal
import ssl
import subprocess
import sys

import aiohttp
import numpy as np
import pytest
from live import Client, alone, as_float, as_pcm, certificate, in_loop, live, short_run, speech, started
from training import ROOT

from inference.live.access import Access
from inference.serve import ServeConfig, check_config

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("addresses"))


@pytest.fixture
def page(tmp_path):
    """A folder like Moshi's unpacked dist.tgz, and secrets beside it."""
    folder = tmp_path / "dist"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<title>moshi</title>")
    (folder / "assets/app.js").write_text("go()")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return folder


async def got(server, path: str, **options) -> tuple[int, str]:
    url = aiohttp.client.URL(server.url + path, encoded=True)  # "..", as it stands
    async with server.http.get(url, **options) as answer:
        return answer.status, await answer.text()


@in_loop
async def test_moshis_page_is_served_in_place_of_ours(checkpoint, page):
    async with live(checkpoint, static=page) as server:
        for path in ("/", "/index.html"):
            assert await got(server, path) == (200, "<title>moshi</title>")
        assert await got(server, "/assets/app.js") == (200, "go()")
        for path in ("/page.js", "/assets/", "/assets", "/nothing"):
            status, text = await got(server, path)
            assert status in (403, 404), path
            assert "Talk" not in text
        for path in ("/../secret.txt", "/assets/..%2f..%2fsecret.txt", "/%2e%2e/secret.txt", "/link.txt"):
            status, text = await got(server, path)
            assert (status in (403, 404), "secret" in text) == (True, False), path
        async with server.http.get(server.url) as answer:
            headers = answer.headers
            # Its own scripts are no concern of ours, but nobody may frame it.
            assert "Content-Security-Policy" not in headers
            assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == ("DENY", "nosniff")
        assert (await got(server, "/healthz"))[0] == (await got(server, "/metrics"))[0] == 200
        async with server.chat() as ws:
            await Client(ws).talk(speech(2))


@in_loop
async def test_moshis_page_asks_for_the_token_as_a_password(checkpoint, page):
    """It has no field for one."""
    async with live(checkpoint, Access(TOKEN), page) as server:
        for path in ("/", "/assets/app.js", "/api/chat"):
            async with server.http.get(server.url + path) as answer:
                assert answer.status == 401, path
                assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
        password = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
        headers = {"Authorization": f"Basic {password}"}
        assert await got(server, "/", headers=headers) == (200, "<title>moshi</title>")
        assert (await server.refused(**headers))[0] == 101
        assert (await got(server, "/healthz"))[0] == 200


@in_loop
async def test_our_page_is_served_where_none_is_given(checkpoint):
    async with live(checkpoint) as server, server.http.get(server.url) as answer:
        assert "<title>Moshi-TTT</title>" in await answer.text()
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert (await got(server, "/page.js"))[1].startswith("// The page")
        for path in ("/routes.py", "/../routes.py", "/page", "/%2e%2e/routes.py"):
            assert (await got(server, path))[0] == 404, path


def test_a_folder_without_a_page_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"static=.*/empty holds no index.html; give the folder of Moshi's"):
        check_config(ServeConfig("-", static=str(tmp_path / "empty")))


@in_loop
async def test_https_is_spoken_and_nothing_else(checkpoint, tmp_path):
    tls = certificate(tmp_path / "tls")
    trusting = ssl.create_default_context(cafile=tls / "cert.pem")
    settings = (f"tls={tls}", "slots=1", "seed=4")
    async with started(checkpoint, *settings) as (process, url), aiohttp.ClientSession() as http:
        assert url.startswith("https://127.0.0.1:")
        async with http.get(f"{url}/healthz", ssl=trusting) as answer:
            assert (await answer.json())["status"] == "ok"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.get(f"{url}/healthz")
        plain = url.replace("https", "http")
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await http.get(f"{plain}/healthz")
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await http.ws_connect(f"{plain}/api/chat")
        # A page of ours there has https in its origin; the same name over http is another site.
        for origin, status in ((url, 101), (plain, 403)):
            headers = {"Origin": origin, "Upgrade": "websocket", "Connection": "Upgrade"}
            headers |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
            async with http.get(f"{url}/api/chat", headers=headers, ssl=trusting) as answer:
                assert answer.status == status, origin
        async with asyncio.timeout(20):
            while (await (await http.get(f"{url}/healthz", ssl=trusting)).json())["active"]:
                await asyncio.sleep(0.05)
        async with http.ws_connect(f"wss{url[5:]}/api/chat?audio=pcm", ssl=trusting) as ws:
            client = Client(ws)
            heard = await client.talk(speech(8))
            process.send_signal(signal.SIGTERM)
            assert await client.closed() == 1001
        assert process.stdout is not None
        printed = (await process.stdout.read()).decode()
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert printed.endswith("stopped\n")
        assert "can be read on the way" not in printed
    audio, _ = alone(checkpoint, as_float(speech(8)), 4)
    assert np.array_equal(heard.pcm, as_pcm(audio))


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_is_loaded(tmp_path):
    first, second = certificate(tmp_path / "first"), certificate(tmp_path / "second")
    check_config(ServeConfig("-", tls=str(first)))
    (second / "key.pem").write_bytes((first / "key.pem").read_bytes())
    (tmp_path / "empty").mkdir()
    for folder in (second, tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match=f"tls={folder} must hold cert.pem and key.pem that belong"):
            check_config(ServeConfig("-", tls=str(folder)))


def test_a_server_that_others_reach_needs_a_token_and_warns_without_https(checkpoint, monkeypatch):
    monkeypatch.delenv("MOSHI_TTT_TOKEN", raising=False)
    command = [sys.executable, "-m", "inference.serve", f"checkpoint={checkpoint}", "host=0.0.0.0", "port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "host=0.0.0.0 can be reached from other machines, which needs a token" in done.stderr
    assert "checkpoint:" not in done.stdout
