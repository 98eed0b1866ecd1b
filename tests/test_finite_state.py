"""A non-finite inner state is reported with layer and frame; streams restart only when told to."""

import logging

import pytest
import torch
from training import write_prompt

from inference.session import save_session
from inference.stream import Sampling, answer, open_stream, read_recording
from moshi_ttt.finite_state import FiniteStateCheck, NonFiniteStateError
from moshi_ttt.integration import ttt_layers
from moshi_ttt.loading import load_mimi, load_tokenizer
from moshi_ttt.streaming import streaming

CONTEXTS = {"ttt_layer_context": 6, "non_ttt_layer_context": 9, "mini_batch_size": 4}
BAD = (float("nan"), float("inf"))


def plant(model, layer, row, value, part="inner"):
    """Break one number of a row's inner state."""
    ttt = model.transformer.layers[layer].seq_modeling_block.ttt_layer.ttt
    state = ttt._streaming_state
    tensor = state.inner.weights[1] if part == "inner" else state.pending.grads[0]
    tensor[row * ttt.num_heads + 1, 0, 2] = value


def run(model, codes, check, faults=()):
    """Stream codes frame by frame; `faults` are (frame, layer, row, value), planted before the frame."""
    outputs = []
    for frame, fed in enumerate(codes.split(1, dim=2)):
        for when, *fault in faults:
            if when == frame:
                plant(model, *fault)
        with check.step():
            outputs.append(model.forward_text(fed)[0])
    check.finish()
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("part", ["inner", "pending"])
@torch.no_grad()
def test_layer_row_and_frame_are_named(build, random_codes, value, part):
    model = build(**CONTEXTS)
    with streaming(model, 3):
        check = FiniteStateCheck(model, 5)
        fault = (9, 2, 1, value, part)  # its mini-batch is not yet over when it is looked for
        with pytest.raises(NonFiniteStateError, match=r"TTT layer 2 .* row 1 at frame 10 .* frame 5"):
            run(model, random_codes(3, 20), check, [fault])
        assert check.restarts == []


@torch.no_grad()
def test_the_last_frames_are_looked_at_too(build, random_codes):
    model = build(**CONTEXTS)
    with streaming(model, 1):
        check = FiniteStateCheck(model, 50)
        with pytest.raises(NonFiniteStateError, match="at frame 3 "):
            run(model, random_codes(1, 3), check, [(1, 1, 0, BAD[0])])


@torch.no_grad()
def test_a_restarted_row_is_a_new_stream_and_others_go_on(build, random_codes, caplog):
    model, codes = build(**CONTEXTS), random_codes(3, 25)
    with streaming(model, 3):
        plain = run(model, codes, FiniteStateCheck(model, 5))
    with streaming(model, 3):
        fresh = run(model, codes[:, :, 10:], FiniteStateCheck(model, 5))
    with streaming(model, 3), caplog.at_level(logging.WARNING):
        check = FiniteStateCheck(model, 5, "restart")
        outputs = run(model, codes, check, [(7, 1, 1, BAD[0])])
    assert outputs[1, 7:10].isnan().any(), "the fault is seen in the outputs until it is found"
    assert torch.equal(outputs[1, 10:], fresh[1])
    for row in (0, 2):
        assert torch.equal(outputs[row], plain[row])
    # Layer 2 reads what layer 1 made of it.
    assert check.restarts == [(1, 1, 10), (2, 1, 10)]
    assert "layer 1 is not finite in row 1 at frame 10" in caplog.text


@torch.no_grad()
def test_what_a_resting_row_is_fed_is_no_fault(build, random_codes):
    model = build(**CONTEXTS)
    with streaming(model, 2):
        model.set_exec_mask(torch.tensor([True, False]))
        check = FiniteStateCheck(model, 4)
        for _ in range(6):
            with check.step():
                model.forward_text(random_codes(2, 1))
            plant(model, 1, 1, BAD[0], "pending")  # into a slot that no token of the row has filled
        check.finish()


def test_a_generated_answer_is_checked(build, tiny_base, tmp_path):
    model = build(**CONTEXTS)
    mimi, tokenizer = load_mimi(tiny_base, "cpu"), load_tokenizer(tiny_base)
    recording = read_recording(write_prompt(tmp_path / "prompt.wav"), mimi.sample_rate)
    # The fault lies in the learned weights, where streams start.
    with torch.no_grad():
        ttt_layers(model)[1][1].seq_modeling_block.ttt_layer.ttt.W1[0, 0, 0] = BAD[1]
    with pytest.raises(NonFiniteStateError, match="TTT layer 2"):
        answer(model, mimi, tokenizer, recording, Sampling(), watches=[FiniteStateCheck(model, 1000)])
    assert not model.is_streaming


def test_a_broken_state_is_not_saved_as_a_session(build, tiny_base, tmp_path):
    model, mimi = build(**CONTEXTS), load_mimi(tiny_base, "cpu")
    recording = read_recording(write_prompt(tmp_path / "prompt.wav"), mimi.sample_rate)

    def save(name, fault):
        with open_stream(model, mimi, Sampling(), [FiniteStateCheck(model, 1000)]) as stream:
            assert len(list(stream.hear(recording))) > 4
            if fault:
                plant(model, 1, 0, BAD[0])
            save_session(tmp_path / name, stream, {})

    save("good.session", fault=False)
    with pytest.raises(NonFiniteStateError, match="TTT layer 1"):
        save("bad.session", fault=True)
    assert sorted(path.name for path in tmp_path.glob("*.session")) == ["good.session"]


def test_looking_never_is_no_check(build):
    with pytest.raises(ValueError, match="at least 1"):
        FiniteStateCheck(build(), 0)
