"""Moshi's own server, `python -m moshi.server`, opens a LoRA checkpoint of ours and refuses one with TTT."""

import asyncio
import os
import re
import socket
import sys
from contextlib import asynccontextmanager
from dataclasses import asdict

import aiohttp
import pytest
from hub import local_hub
from live import Client, in_loop, speech
from lora_models import PLAIN, TTT, settings_of
from training import ROOT

from moshi_ttt.checkpoint import save_checkpoint

# Without a GPU it has nothing to wait for, which torch would call an error.
COMMAND = """
import runpy, sys, torch
if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda: None
runpy.run_module("moshi.server", run_name="__main__", alter_sys=True)
"""


@asynccontextmanager
async def moshi_server(base, folder):
    """The process, as `moshi.server --lora-weight … --config-path …` starts it, and its port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with local_hub() as hub:
        hub.files = {path.name: path.read_bytes() for path in base.moshi_weights.parent.iterdir()}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", COMMAND, "--hf-repo", "org/base", "--static", "none", "--device", "cpu"),
            *("--lora-weight", folder / "lora.safetensors", "--config-path", folder / "config.json"),
            *("--host", "127.0.0.1", "--port", str(port)),
            cwd=ROOT,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_TORCH_COMPILE": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield process, port
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@pytest.fixture
def saved(tiny_base, trained, tmp_path):
    def saved(ttt):
        settings = settings_of(ttt=ttt)
        return save_checkpoint(tmp_path, 1, trained(settings), asdict(settings), tiny_base, save_base=False)

    return saved


@in_loop
async def test_it_talks_with_a_lora_checkpoint(saved, tiny_base):
    async with moshi_server(tiny_base, saved(PLAIN)) as (process, port):
        assert process.stdout is not None
        printed = ""
        while "Access the Web UI directly" not in printed:
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            assert line, printed
            printed += line.decode()
        assert not re.search("missing|unexpected", printed, re.I)
        async with aiohttp.ClientSession() as http, asyncio.timeout(30):
            while True:
                try:
                    ws = await http.ws_connect(f"http://127.0.0.1:{port}/api/chat")
                    break
                except aiohttp.ClientConnectorError:  # it says so a little before it listens
                    await asyncio.sleep(0.1)
            client = Client(ws, opus=True)
            for frame in speech(12).reshape(12, -1):
                await client.send(frame)
            while client.heard.frames < 8:
                assert await client.receive()
            await ws.close()
        assert client.heard.pcm.std() > 10


@in_loop
async def test_it_says_what_a_ttt_checkpoint_needs(saved, tiny_base):
    async with moshi_server(tiny_base, saved(TTT)) as (process, _):
        assert process.stdout is not None
        printed = (await asyncio.wait_for(process.stdout.read(), 60)).decode()
        assert await process.wait() != 0
    assert "this model has TTT layers: run it with moshi-ttt, python -m inference" in printed
