"""A live server: what its clients hear is what the model says to each alone."""

import asyncio

import numpy as np
import pytest
import torch
from live import FRAME, Client, live, speech
from training import run

from inference.rows import Sampling
from inference.stream import open_stream
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.loading import load_mimi, load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    settings = ("ttt.mini_batch_size=5", "ttt.ttt_layer_context=7", "ttt.non_ttt_layer_context=9")
    return run(tmp_path_factory.mktemp("serve") / "run", *settings)


def alone(checkpoint, pcm, seed):
    """What the same recording gets from `open_stream`: 16-bit samples, and text."""
    loaded = load_checkpoint(checkpoint, torch.device("cpu"))
    mimi, tokenizer = load_mimi(loaded.base, "cpu"), load_tokenizer(loaded.base)
    samples = torch.from_numpy(pcm.astype(np.float32) / 32768)
    with open_stream(loaded.model, mimi, Sampling(seed=seed)) as stream:
        frames = list(stream.hear(samples))
    audio = torch.cat([frame.audio for frame in frames]).numpy()
    pieces = [tokenizer.id_to_piece(int(frame.tokens[0, 0, 0])) for frame in frames]
    return (audio * 32768).round().clip(-32768, 32767), pieces


def test_one(checkpoint):
    async def talk():
        async with live(checkpoint) as server:
            async with server.chat("audio=pcm&metadata=1&seed=7") as ws:
                client = Client(ws)
                await client.talk(speech(30))
            print(client.heard.text, client.heard.metadata[:3])
            print(await server.metrics())
            return client.heard

    heard = asyncio.run(talk())
    audio, pieces = alone(checkpoint, speech(30), 7)
    print(pieces)
    assert np.abs(heard.pcm - audio).max() <= 1
