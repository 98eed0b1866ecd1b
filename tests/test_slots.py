"""Conversations side by side: each is what it would be alone, whenever it starts, rests, ends or breaks."""

import pytest
import torch
from moshi.models.lm import LMGen
from training import dialogue

from inference.rows import Sampling
from inference.session import restore_stream, save_session
from inference.slots import open_slots
from inference.stream import Stream, hear_next, open_stream
from moshi_ttt.finite_state import FiniteStateCheck
from moshi_ttt.integration import ttt_layers
from moshi_ttt.loading import load_mimi

FRAME = 1920
SHORT = {"mini_batch_size": 5, "ttt_layer_context": 5, "non_ttt_layer_context": 7}  # the rings wrap
SAMPLING = Sampling()


@pytest.fixture
def model(build):
    return build(**SHORT)


@pytest.fixture
def mimi(tiny_base):
    return load_mimi(tiny_base, "cpu")


@pytest.fixture(scope="module")
def users():
    """Clips in which no latent lies so near the border of two codes that rounding decides."""
    samples = torch.from_numpy(dialogue(4)[14400:, 1].copy())
    places = ((0, 17), (99, 9), (500, 23))
    return [samples[start : start + length * FRAME + start] for start, length in places]


def alone(model, mimi, user, seed):
    """Tokens `[9, T]` and audio of a conversation that has the model for itself."""
    with open_stream(model, mimi, Sampling(seed=seed)) as stream:
        return joined([*stream.hear(user), *stream.finish()])


def joined(frames):
    return torch.cat([f.tokens[0] for f in frames], dim=1), torch.cat([f.audio for f in frames])


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


def talk(streams, frames, rounds):
    """Let streams hear together, and keep what Moshi says in `frames`."""
    for _ in range(rounds):
        for stream, frame in hear_next(streams).items():
            frames.setdefault(stream, []).append(frame)


@pytest.mark.parametrize("max_delay", [1, 2])
def test_each_is_what_it_is_alone(model, mimi, users, max_delay):
    model.delays = [min(d, 1) * max_delay for d in model.delays]
    expected = [alone(model, mimi, user, seed) for seed, user in enumerate(users)]
    assert expected[0][0].unique().numel() > 50
    frames = {}
    with open_slots(model, mimi, SAMPLING, 3) as slots:
        first = Stream(slots, 1, seed=0)
        first.add(users[0])
        talk([first], frames, 4)
        second = Stream(slots, 2, seed=1)  # joins later
        second.add(users[1])
        talk([first, second], frames, 3)
        talk([second], frames, 4)  # the first rests
        talk([first, second], frames, 5)
        second.add(second.silence_left())
        talk([first, second], frames, 3)
        third = Stream(slots, 2, seed=2)  # takes over the place of one that is done
        third.add(users[2])
        for stream in (first, third):
            talk([first, third], frames, 2)
            stream.add(stream.silence_left())
        talk([first, third], frames, 40)
    for stream, alone_ in zip((first, second, third), expected, strict=True):
        assert_same(joined(frames[stream]), alone_)


def test_noise_is_the_seeds_and_not_the_slots(model, mimi, users):
    frames = {}
    with open_slots(model, mimi, SAMPLING, 3) as slots:
        streams = [Stream(slots, slot, seed) for slot, seed in enumerate((4, 5, 4))]
        for stream in streams:
            stream.add(users[0])
        talk(streams, frames, 10)
    one, two, three = (joined(frames[stream])[0] for stream in streams)
    assert torch.equal(one, three)
    assert (one != two).float().mean() > 0.5


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_moshis_own_lmgen(model, mimi, users):
    with open_stream(model, mimi, Sampling(use_sampling=False)) as stream:
        tokens, audio = joined(list(stream.hear(users[0])))
    lm_gen = LMGen(model, use_sampling=False)
    with mimi.streaming(1), lm_gen.streaming(1):
        codes = [mimi.encode(frame[None, None]) for frame in users[0].split(FRAME)[: tokens.shape[1]]]
        drawn = [lm_gen.step(code) for code in (codes[0], *codes)]
        spoken = [mimi.decode(frame[:, 1:])[0, 0] for frame in drawn[1:]]
    assert drawn[0] is None
    assert torch.equal(torch.cat(drawn[1:], dim=2)[0], tokens)
    torch.testing.assert_close(torch.cat(spoken), audio, rtol=0, atol=1e-6)


def test_random_generators_are_neither_read_nor_changed(model, mimi, users):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = alone(model, mimi, users[1], 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(alone(model, mimi, users[1], 3)[0], first[0])


def test_a_broken_conversation_is_told_and_harms_nobody(model, mimi, users):
    expected = [alone(model, mimi, user, seed) for seed, user in enumerate(users)]
    frames = {}
    check = FiniteStateCheck(model, 1, "tell")
    with open_slots(model, mimi, SAMPLING, 2, [check]) as slots:
        good, bad = Stream(slots, 0, 0), Stream(slots, 1, 1)
        for stream, user in ((good, users[0]), (bad, users[1])):
            stream.add(user)
        talk([good, bad], frames, 4)
        assert not check.broken
        ttt = ttt_layers(model)[0][1].seq_modeling_block.ttt_layer.ttt
        ttt._streaming_state.inner.weights[0][ttt.num_heads :] = torch.nan
        talk([good, bad], frames, 1)
        assert list(check.broken) == [1]
        assert "TTT layer 1 is not finite in row 1" in check.broken.pop(1)
        after = Stream(slots, 1, 2)
        after.add(users[2])
        good.add(good.silence_left())
        after.add(after.silence_left())
        talk([good, after], frames, 40)
        assert not check.broken
    assert_same(joined(frames[good]), expected[0])
    assert_same(joined(frames[after]), expected[2])


@pytest.mark.parametrize("cut", [0, 8])
def test_a_session_goes_on_in_another_slot_among_others(model, mimi, users, tmp_path, cut):
    expected, frames = alone(model, mimi, users[0], 0), {}
    with open_slots(model, mimi, SAMPLING, 3) as slots:
        stream, other = Stream(slots, 2, 0), Stream(slots, 0, 9)
        stream.add(users[0][: cut * FRAME + 100])
        other.add(users[1])
        talk([other], frames, 2)
        talk([stream, other], frames, 9)
        save_session(tmp_path / "s", stream, {"a": "b"})
    with open_slots(model, mimi, SAMPLING, 2) as slots:
        again, other = Stream(slots, 1, 77), Stream(slots, 0, 9)
        other.add(users[2])
        talk([other], frames, 3)
        restore_stream(tmp_path / "s", again, {"a": "b"})
        again.add(users[0][cut * FRAME + 100 :])
        again.add(again.silence_left())
        talk([other, again], frames, 40)
    assert_same(joined(frames.get(stream, []) + frames[again]), expected)


def test_memory_stays_where_it_is(model, mimi, users, streaming_tensors):
    with open_slots(model, mimi, SAMPLING, 2) as slots:
        stream = Stream(slots, 0, 0)
        addresses = {name: t.data_ptr() for name, t in streaming_tensors(model).items()}
        stream.add(users[0])
        talk([stream], {}, 30)
        Stream(slots, 0, 1)
        assert {name: t.data_ptr() for name, t in streaming_tensors(model).items()} == addresses


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_is_no_63_bit_number_is_refused(model, mimi, seed):
    with (
        pytest.raises(ValueError, match=r"sampling.seed must be from 0 to 2\^63 - 1"),
        open_stream(model, mimi, Sampling(seed=seed)),
    ):
        pass
