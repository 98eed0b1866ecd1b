"""Rows of a batch are streams of their own: masks change their rows alone."""

import pytest
import torch
from moshi.models.lm import LMGen

from moshi_ttt.streaming import streaming

K = 4
CONTEXTS = {"ttt_layer_context": 6, "non_ttt_layer_context": 9}
# Shared by all rows: what a stream reads and never writes.
CONSTANT = (".initial.", ".step_scale", ".norm.")


@pytest.fixture
def row_of(streaming_tensors):
    """Reads the streaming state of one row of a batch, copied."""

    def row_of(model, row, batch_size):
        rows = {}
        for name, tensor in streaming_tensors(model).items():
            if any(part in name for part in CONSTANT):
                continue
            if name.endswith("kv_cache.cache"):  # keys and values come first
                tensor = tensor.transpose(0, 1)
            if ".inner." in name or ".pending." in name:  # rows and heads are joined
                tensor = tensor.unflatten(0, (batch_size, -1))
            assert tensor.shape[0] == batch_size, name
            rows[name] = tensor[row].clone()
        return rows

    return row_of


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 40
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


@pytest.mark.parametrize("steps", [3, 4, 9, 14])
@torch.no_grad()
def test_a_reset_puts_its_row_at_the_start_and_touches_no_other(build, random_codes, row_of, steps):
    model = build(mini_batch_size=K, **CONTEXTS)
    codes = random_codes(2, steps + 11)
    with model.streaming(2):
        for t in range(steps):
            model.forward_text(codes[:, :, t : t + 1])
        untouched = row_of(model, 0, 2)
        model.reset_streaming(torch.tensor([False, True]))
        assert_equal(row_of(model, 0, 2), untouched)
        after = [model.forward_text(codes[:, :, t : t + 1])[0] for t in range(steps, steps + 11)]
    fresh = model.forward_text(codes[1:, :, steps:])[0]
    continued = model.forward_text(codes[:1])[0][:, steps:]
    assert (torch.cat(after, dim=1) - torch.cat((continued, fresh))).abs().max() <= 1e-5


@torch.no_grad()
def test_a_reset_row_has_the_inner_state_of_a_new_stream(build, random_codes, row_of):
    model = build(mini_batch_size=K)
    with model.streaming(2):
        new = row_of(model, 1, 2)
        for _ in range(6):
            model.forward_text(random_codes(2, 1))
        used = row_of(model, 1, 2)
        model.reset_streaming(torch.tensor([False, True]))
        reset = row_of(model, 1, 2)
    ttt = {name for name in new if ".seq_modeling_block." in name}
    assert [name for name in ttt if not torch.equal(reset[name], new[name])] == []
    assert not all(torch.equal(used[name], new[name]) for name in ttt)


def stream(model, codes, executes):
    """Outputs of every step `[T, 2, 1, C]`; row 1 executes where `executes` is true."""
    outs = []
    for t, execute in enumerate(executes):
        model.set_exec_mask(torch.tensor([True, execute]))
        outs.append(model.forward_text(codes[:, :, t : t + 1])[0])
    return torch.stack(outs)


# Row 1 rests at the start, across mini-batch edges of its neighbour, in single steps, after its ring is full.
REST = {
    "from the start": [False] * 6 + [True] * 14,
    "in the middle": [True] * 6 + [False] * 5 + [True] * 9,
    "now and then": [t % 3 != 1 for t in range(20)],
    "late": [True] * 13 + [False] * 3 + [True] * 4,
}


@pytest.mark.parametrize("executes", REST.values(), ids=REST.keys())
@torch.no_grad()
def test_a_resting_row_goes_on_as_if_the_frames_had_never_come(build, random_codes, row_of, executes):
    model = build(mini_batch_size=K, **CONTEXTS)
    codes = random_codes(2, 20)
    awake = [t for t, execute in enumerate(executes) if execute]
    with model.streaming(2):
        rested = stream(model, codes, executes)[awake, 1]
    with model.streaming(2):
        never = stream(model, codes[:, :, awake], [True] * len(awake))[:, 1]
    assert torch.equal(rested, never)


@pytest.mark.parametrize("executes", REST.values(), ids=REST.keys())
@torch.no_grad()
def test_a_resting_row_leaves_its_neighbour_alone(build, random_codes, row_of, executes):
    model = build(mini_batch_size=K, **CONTEXTS)
    codes = random_codes(2, 20)
    with model.streaming(2):
        beside_rest = stream(model, codes, executes)[:, 0]
        state = row_of(model, 0, 2)
    with model.streaming(2):
        beside_work = stream(model, codes, [True] * 20)[:, 0]
        assert_equal(state, row_of(model, 0, 2))
    assert torch.equal(beside_rest, beside_work)


@torch.no_grad()
def test_a_resting_row_keeps_its_weights_and_positions(build, random_codes, row_of):
    model = build(mini_batch_size=K)
    with model.streaming(2):
        stream(model, random_codes(2, 6), [True] * 6)
        before = row_of(model, 1, 2)
        stream(model, random_codes(2, 5), [False] * 5)
        after = row_of(model, 1, 2)
    # What was not counted may lie in the slot of the next token and the next key, which overwrite it.
    scratch = {name for name in before if ".pending." in name or name.endswith(("cache.cache", "exec_mask"))}
    assert [n for n in before.keys() - scratch if not torch.equal(after[n], before[n])] == []
    assert any(name.endswith(".inner.weights.0") for name in before.keys() - scratch)


@torch.no_grad()
def test_nothing_that_a_resting_row_is_fed_reaches_its_state(ttt_layer):
    # Attention over no key at all, as a row has that rests from the start, may give NaN.
    layer = ttt_layer(mini_batch_size=K)
    x = torch.randn(2, 12, 32)
    resting = x[:, :5].clone()
    resting[1] = torch.nan
    with layer.ttt.streaming(2):
        layer.ttt.set_exec_mask(torch.tensor([True, False]))
        layer(resting)
        layer.ttt.set_exec_mask(torch.tensor([True, True]))
        rested = layer(x[:, 5:])[1]
    assert (rested - layer(x[1:, 5:])[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_a_row_rests_through_chunks_of_several_frames(build, random_codes):
    model = build(mini_batch_size=K, **CONTEXTS)
    codes = random_codes(2, 30)
    chunks = list(codes.split(3, dim=2))
    rest = (2, 5, 6)
    outs = []
    with streaming(model, 2, max_chunk=3):
        for index, chunk in enumerate(chunks):
            model.set_exec_mask(torch.tensor([True, index not in rest]))
            outs.append(model.forward_text(chunk)[0])
    awake = [index for index in range(10) if index not in rest]
    rested = torch.cat([outs[index][1] for index in awake])
    never = model.forward_text(torch.cat([chunks[index][1:] for index in awake], dim=2))[0][0]
    assert (rested - never).abs().max() <= 1e-5
    assert (torch.cat([out[0] for out in outs]) - model.forward_text(codes[:1])[0][0]).abs().max() <= 1e-5


@torch.no_grad()
def test_two_streams_in_one_batch_are_the_two_alone(build, random_codes):
    model = build(mini_batch_size=K, **CONTEXTS)
    codes = random_codes(2, 22)

    def alone_or_together(rows):
        with model.streaming(rows.shape[0]):
            return torch.cat([model.forward_text(frame)[0] for frame in rows.split(1, dim=2)], dim=1)

    together = alone_or_together(codes)
    alone = torch.cat([alone_or_together(codes[:1]), alone_or_together(codes[1:])])
    assert (together - alone).abs().max() <= 1e-5
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
def test_two_dialogues_in_one_batch_are_the_two_alone(build, random_codes):
    model = build(mini_batch_size=K, **CONTEXTS)
    user = random_codes(2, 15)[:, :8]

    def dialogue(rows):
        generator = LMGen(model, use_sampling=False)
        with generator.streaming(rows.shape[0]):
            return torch.cat([generator.step(frame) for frame in rows.split(1, dim=2)][1:], dim=2)

    assert torch.equal(dialogue(user), torch.cat((dialogue(user[:1]), dialogue(user[1:]))))
