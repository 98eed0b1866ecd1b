"""What is done to a live stream on a GPU: diagnostics, sessions, the check for NaN, checkpoints."""

from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import pytest
import torch
from device_under_test import DEVICE, ON_GPU, graphs
from moshi.models.lm import LMGen
from test_captured_graphs import SHORT, user_codes
from test_finite_state import plant
from training import dialogue

from inference.enable_ttt_diagnostics import enable_ttt_diagnostics
from inference.rows import Sampling
from inference.session import continue_stream, stream_tensors
from inference.stream import open_stream
from moshi_ttt.building import ModelSettings, build_model
from moshi_ttt.checkpoint import load_checkpoint, save_checkpoint
from moshi_ttt.config import TTTConfig
from moshi_ttt.finite_state import FiniteStateCheck, NonFiniteStateError
from moshi_ttt.integration import ttt_layers
from moshi_ttt.loading import ModelConfig, find_base, load_mimi
from moshi_ttt.lora import LoRAConfig

FRAME = 1920


@contextmanager
def generator_of(model, rows, captured=True):
    """A greedy LMGen that streams, and the text logits of its steps."""
    logits = []
    generator = LMGen(
        model,
        use_sampling=False,
        support_out_of_sync=True,
        on_text_logits_hook=lambda x: logits.append(x[:, 0, 0].clone()),
    )
    with torch.no_grad(), graphs(captured), generator.streaming(rows):
        yield generator, logits


def say(generator, user, *watches):
    for codes in user.split(1, dim=2):
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.step())
            generator.step(codes)


def test_diagnostics_between_captured_steps_record_what_eager_ones_do(build_there):
    model, user = build_there(**SHORT), user_codes(2, 31)
    with generator_of(model, 2) as (generator, plain):
        say(generator, user)
    records = {}
    for captured in (True, False):
        diagnostics = enable_ttt_diagnostics(model, 5, track_history=True)
        with generator_of(model, 2, captured) as (generator, logits):
            say(generator, user, diagnostics)
        diagnostics.close()
        assert (torch.stack(logits) - torch.stack(plain)).abs().max() <= 1e-5
        records[captured] = [r for _, layer in ttt_layers(model) for r in layer.get_diagnostic_history()]
    assert [r["frame"] for r in records[True]] == 2 * list(range(0, 31, 5))
    for ours, eager in zip(records[True], records[False], strict=True):
        assert ours == pytest.approx(eager, rel=1e-3, abs=1e-5)
    assert len({r["inner_norm_1"] for r in records[True]}) == len(records[True])


@pytest.mark.skipif(not ON_GPU, reason="no graphs on a CPU")
def test_diagnostics_outside_of_their_step_are_refused_under_capture(build_there):
    model = build_there(**SHORT)
    diagnostics = enable_ttt_diagnostics(model, 5)
    with generator_of(model, 1) as (generator, _), pytest.raises(ValueError, match="diagnostics.step"):
        say(generator, user_codes(1, 3))
    diagnostics.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_state_is_found_without_waiting_and_its_layer_and_frame_named(build_there, value):
    model = build_there(**SHORT)
    with generator_of(model, 3) as (generator, _):
        check = FiniteStateCheck(model, 5)
        say(generator, user_codes(3, 12), check)
        plant(model, 1, 2, value)
        with pytest.raises(NonFiniteStateError, match=r"TTT layer 1 .* row 2 at frame 15 .* frame 10"):
            say(generator, user_codes(3, 40), check)


def test_a_row_that_broke_starts_anew_and_the_others_go_on(build_there):
    model, user = build_there(**SHORT), user_codes(3, 40)
    with generator_of(model, 3) as (generator, plain):
        say(generator, user)
    with generator_of(model, 3) as (generator, logits):
        check = FiniteStateCheck(model, 5, "restart")
        say(generator, user[:, :, :12], check)
        plant(model, 1, 1, float("nan"))
        say(generator, user[:, :, 12:], check)
        check.finish()
        layers = [layer for layer, row, _ in check.restarts if row == 1]
    assert layers == [1, 2]  # layer 2 reads what layer 1 made of it
    assert logits[-1].isfinite().all()
    for row in (0, 2):
        other = torch.stack([step[row] for step in logits])
        assert (other - torch.stack([step[row] for step in plain])).abs().max() <= 1e-5


def frames_of(frames):
    frames = list(frames)
    return torch.cat([f.tokens[0] for f in frames], dim=1), torch.cat([f.audio for f in frames])


def test_a_session_that_is_saved_and_restored_goes_on_as_if_it_had_never_stopped(build_there, tiny_base):
    model, mimi, sampling = build_there(**SHORT), load_mimi(tiny_base, DEVICE), Sampling(seed=5)
    user = torch.from_numpy(dialogue(4)[14400 : 14400 + 30 * FRAME, 1].copy())
    with open_stream(model, mimi, sampling) as stream:
        whole_tokens, whole_audio = frames_of(stream.hear(user))
    with open_stream(model, mimi, sampling) as stream:
        first = frames_of(stream.hear(user[: 13 * FRAME + 700]))
        saved = stream_tensors(stream)
    with open_stream(model, mimi, sampling) as stream:
        # Another conversation comes first, so that the graphs are captured when the state is put in.
        list(stream.hear(user.flip(0)[: 9 * FRAME]))
        continue_stream(stream, saved)
        second = frames_of(stream.hear(user[13 * FRAME + 700 :]))
    assert torch.equal(torch.cat((first[0], second[0]), dim=1), whole_tokens)
    assert (torch.cat((first[1], second[1])) - whole_audio).abs().max() <= 1e-5
    assert whole_tokens.shape[1] == 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_saved_from_the_gpu_is_loaded_there_bit_for_bit(perturb, tmp_path, dtype):
    config = TTTConfig(layers="1,2", gate_init=0.5, **SHORT)
    settings = ModelSettings(ModelConfig("tiny"), dtype, LoRAConfig(rank=4), config)
    base = find_base(settings.model)
    model = perturb(build_model(settings, base), "lora", "ttt", "gate").to(DEVICE)
    saved = save_checkpoint(tmp_path / "run", 1, model, asdict(settings) | {"duration_sec": 10}, base, False)
    loaded = load_checkpoint(saved, DEVICE).model
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].device.type == DEVICE.type
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
    user, heard = user_codes(2, 20), []
    for each in (model, loaded):
        with generator_of(each, 2) as (generator, logits):
            say(generator, user)
        heard.append(torch.stack(logits))
    assert torch.equal(*heard)
