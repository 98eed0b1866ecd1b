"""A live server: what each client hears is what the model says to it alone."""

import asyncio

import numpy as np
import pytest
import torch
from live import FRAME, Client, alone, as_float, as_pcm, busy, in_loop, live, short_run, speech, through_opus

from inference.live.protocol import TextPieces
from moshi_ttt.integration import ttt_layers
from moshi_ttt.loading import load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("serve"))


def assert_heard(heard, expected):
    """To rounding: with other rows beside it, a row's audio differs by 1e-5."""
    audio, text = expected
    assert np.abs(heard.pcm.astype(int) - as_pcm(audio)).max() <= 1
    assert heard.text == text


@in_loop
async def test_samples_are_answered_as_by_open_stream_bit_for_bit(checkpoint):
    async with live(checkpoint, slots=1) as server, server.chat("seed=7") as ws:
        heard = await Client(ws).talk(speech(30))
        async with server.http.get(f"{server.url}/healthz") as health:
            assert await health.json() == {"status": "ok", "slots": 1, "active": 1}
    audio, text = alone(checkpoint, as_float(speech(30)), 7)
    assert np.array_equal(heard.pcm, as_pcm(audio))  # so all tokens are the same
    assert heard.text == text
    assert len(text) > 20
    assert np.abs(audio).max() > 0.01


@in_loop
async def test_moshis_own_protocol_with_opus(checkpoint):
    user = speech(30)
    async with (
        live(checkpoint, slots=1, seed=3) as server,
        server.http.ws_connect(f"{server.url}/api/chat?text_temperature=0.7") as ws,
    ):
        heard = await Client(ws, opus=True).talk(user)
    assert heard.metadata == []  # only for those who ask
    audio, text = alone(checkpoint, through_opus(as_float(user)), 3)
    assert text.startswith(heard.text)  # that of the last frame comes after its sound
    assert len(text) - len(heard.text) < 5
    assert np.array_equal(heard.pcm, (through_opus(audio) * 32768).astype("<i2"))


@in_loop
async def test_several_at_once_are_each_what_they_are_alone(checkpoint):
    users = {0: speech(24), 1: speech(16, 60), 2: speech(20, 40), 3: speech(12, 8)}

    async def visit(server, seed, wait, most_ahead):
        await asyncio.sleep(wait)
        async with server.chat(f"seed={seed}") as ws:
            return await Client(ws).talk(users[seed], most_ahead)

    async with live(checkpoint, slots=3) as server:
        heard = await asyncio.gather(
            visit(server, 0, 0, 2), visit(server, 1, 0.1, 9), visit(server, 2, 0.2, 1)
        )
        heard.append(await visit(server, 3, 0, 4))  # in the place of another
    for seed, user in users.items():
        assert_heard(heard[seed], alone(checkpoint, as_float(user), seed))


@in_loop
async def test_clients_that_send_opus_at_once_do_not_hear_each_other(checkpoint):
    users = {1: speech(14), 2: speech(14, 40)}

    async def visit(server, seed):
        async with server.http.ws_connect(f"{server.url}/api/chat?seed={seed}") as ws:
            return await Client(ws, opus=True).talk(users[seed])

    async with live(checkpoint, slots=2) as server:
        heard = await asyncio.gather(*(visit(server, seed) for seed in users))
        assert "malformed_messages_total 0.0" in await server.metrics()
    for (seed, user), found in zip(users.items(), heard, strict=True):
        audio, text = alone(checkpoint, through_opus(as_float(user)), seed)
        assert text.startswith(found.text)
        assert len(text) - len(found.text) < 5
        assert len(text) > 5
        # The last bits of a row's audio differ with others beside it, and Opus makes more of them.
        assert np.corrcoef(found.pcm, through_opus(audio))[0, 1] > 0.9


@in_loop
async def test_seeds_are_random_and_told(checkpoint):
    async with live(checkpoint) as server:
        seeds = []
        for _ in range(2):
            async with server.chat() as ws:
                client = Client(ws)
                first = await client.talk(speech(12))
                seeds.append(first.metadata[0]["seed"])
        async with server.chat(f"seed={seeds[1]}") as ws:
            again = await Client(ws).talk(speech(12))
        assert await server.refused("/api/chat?seed=-1") == (
            400,
            "seed must be a number from 0 to 2^53 - 1\n",
        )
    assert seeds[0] != seeds[1]
    assert np.array_equal(again.pcm, first.pcm)


@in_loop
async def test_the_memory_of_the_conversation_itself_is_told(checkpoint):
    """Of two that have moved their own inner weights, each hears of its own."""
    async with live(checkpoint) as server, server.chat() as one, server.chat() as other:
        layers = ttt_layers(server.server.engine.model)
        for ws, frames in ((one, 20), (other, 10)):
            told = [m for m in (await Client(ws).talk(speech(frames))).metadata if "memory" in m]
            assert [m["frame"] for m in told] == list(range(1, frames + 1))
            assert [layer["layer"] for layer in told[4]["memory"]] == [index for index, _ in layers]
            slot = next(c.stream.slot for c in server.server._talking if c.stream.frames == frames)
            for (_, layer), numbers in zip(layers, told[-1]["memory"], strict=True):
                ttt = layer.seq_modeling_block.ttt_layer.ttt
                for index, learned in enumerate(ttt.inner_weights):
                    state = ttt._streaming_state.inner.weights[index].unflatten(0, (-1, ttt.num_heads))[slot]
                    assert numbers["norm"][index] == pytest.approx(state.norm().item())
                    assert numbers["change"][index] == pytest.approx((state - learned).norm().item())
                    assert numbers["change"][index] > 0.01
                weight = layer.seq_modeling_block.gate.ttt_weight().abs().mean().item()
                assert numbers["gate"] == pytest.approx(weight)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@in_loop
async def test_a_conversation_whose_state_breaks_is_ended_alone(checkpoint):
    user = speech(20)
    async with live(checkpoint, check_every=1) as server, server.chat("seed=1") as good:
        well = Client(good)
        await well.talk(user[: 8 * FRAME])
        async with server.chat("seed=2") as ws:
            ill = Client(ws)
            await ill.talk(speech(4))
            talking = {c.stream.frames: c for c in server.server._talking}
            ttt = ttt_layers(server.server.engine.model)[0][1].seq_modeling_block.ttt_layer.ttt
            slot = talking[4].stream.slot
            heads = slice(slot * ttt.num_heads, (slot + 1) * ttt.num_heads)
            # Both wait for the same step, in which the one is found broken.
            release = busy(server)
            ttt._streaming_state.inner.weights[0][heads] = torch.nan
            await well.send(user[8 * FRAME :][:FRAME])
            await until(lambda: not server.server.engine._thread._work_queue.empty())
            await well.send(user[9 * FRAME :][:FRAME])
            await ill.send(speech(1))
            await until(lambda: all(c.inbox for c in talking.values()))
            release.set()
            assert await ill.closed() == 1011
        await server.until_free(1)
        async with server.chat("seed=2") as ws:
            after = await Client(ws).talk(speech(6))
        while well.heard.frames < 10:
            assert await well.receive()
        heard = await well.talk(user[10 * FRAME :])
        assert 'moshi_ttt_errors_total{kind="inner_state"} 1.0' in await server.metrics()
    assert_heard(heard, alone(checkpoint, as_float(user), 1))
    assert_heard(after, alone(checkpoint, as_float(speech(6)), 2))


def test_text_is_whole_characters(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    pieces = TextPieces(tokenizer, (0, 3))
    tokens = tokenizer.encode("you há€ and")
    assert any(tokenizer.is_byte(token) for token in tokens)
    shown = [pieces.text(token) for token in [0, *tokens, 3]]
    assert "".join(shown) == " you há€ and"
    euro = tokenizer.encode("€")[-3:]
    assert [pieces.text(token) for token in euro] == ["", "", "€"]
    assert pieces.text(euro[0]) + pieces.text(tokens[0]) == "\ufffd you"
