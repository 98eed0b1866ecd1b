"""A conversation that was saved goes on, in another process, as if it had never stopped: to the last bit."""

import json
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from training import dialogue, run, run_python

from inference import session
from inference.generate import GenerateConfig, generate
from inference.rows import Sampling
from inference.session import restore_stream, save_session, session_identity
from inference.stream import converse, open_stream
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.loading import load_mimi, load_tokenizer
from moshi_ttt.session import restore_session, session_tensors
from moshi_ttt.streaming import streaming

FRAME = 1920
LENGTH = 26 * FRAME - 700
CUT = 11 * FRAME + 801
SAMPLING = Sampling(seed=5)
SHORT = {"ttt_layer_context": 5, "non_ttt_layer_context": 7, "max_inner_change": 0.05}  # the rings wrap


@pytest.fixture(scope="module")
def run_dir(private_cache, tmp_path_factory):
    settings = ("ttt.mini_batch_size=5", "ttt.ttt_layer_context=7", "ttt.non_ttt_layer_context=9")
    return run(tmp_path_factory.mktemp("session") / "run", *settings)


@pytest.fixture
def parts(build, tiny_base):
    return SimpleNamespace(
        model=build(mini_batch_size=5, **SHORT),
        mimi=load_mimi(tiny_base, "cpu"),
        tokenizer=load_tokenizer(tiny_base),
        recording=torch.from_numpy(dialogue(4)[14400 : 14400 + LENGTH, 1].copy()),
    )


def started(parts, sampling=SAMPLING):
    return open_stream(parts.model, parts.mimi, sampling)


def heard(frames):
    """Tokens `[17, T]` and audio `[n]` of Moshi's frames."""
    frames = list(frames)
    return torch.cat([f.tokens[0] for f in frames], dim=1), torch.cat([f.audio for f in frames])


def wav(path, samples):
    soundfile.write(path, samples, 24000, subtype="FLOAT")
    return path


def test_a_recording_in_two_parts_and_two_processes_is_the_recording(run_dir, tmp_path):
    user = dialogue(4)[14400 : 14400 + LENGTH, 1]
    whole, first, second = (tmp_path / f"{name}.wav" for name in ("whole", "first", "second"))
    wav(tmp_path / "user.wav", user)
    wav(tmp_path / "user1.wav", user[:CUT])
    wav(tmp_path / "user2.wav", user[CUT:])

    def config(source, output, **settings):
        return GenerateConfig(
            str(run_dir), str(tmp_path / source), str(output), sampling=SAMPLING, device="cpu", **settings
        )

    uninterrupted = generate(config("user.wav", whole))
    generate(config("user1.wav", first, session_out=str(tmp_path / "a.session")))
    run_python(
        *("-m", "inference.generate", f"checkpoint={run_dir}", f"input={tmp_path / 'user2.wav'}"),
        *(f"output={second}", "sampling.seed=5", "device=cpu", f"session_in={tmp_path / 'a.session'}"),
    )
    for suffix in (".wav", "_stereo.wav"):
        parts = [
            soundfile.read(path.with_name(path.stem + suffix), dtype="int16")[0]
            for path in (first, second, whole)
        ]
        assert parts[0].shape[0] == 11 * FRAME
        assert (parts[1] == parts[2][11 * FRAME :]).all()
        assert (parts[0] == parts[2][: 11 * FRAME]).all()
        assert len(parts[0]) + len(parts[1]) == len(parts[2]) == LENGTH
    assert uninterrupted.audio.std() > 0.001
    content = json.loads(second.with_suffix(".json").read_text())
    assert (content["start_sec"], content["frames"]) == (11 * 0.08, 15)


@pytest.mark.parametrize("cut", [0, 1, 3 * FRAME, 4 * FRAME + 5, 13 * FRAME - 1])
@pytest.mark.parametrize("max_delay", [1, 3])
def test_tokens_audio_and_state_go_on_bit_for_bit(parts, tmp_path, cut, max_delay):
    parts.model.delays = [min(d, 1) * max_delay for d in parts.model.delays]
    with started(parts) as stream:
        tokens, audio = heard(stream.hear(parts.recording))
        final = session_tensors(stream.slots.rows.lm_gen.lm_model) | session_tensors(parts.mimi)
        ending = heard(stream.finish())
    assert tokens.shape == (9, 25 - (max_delay - 1))
    assert tokens.unique().numel() > 50
    with started(parts) as stream:
        before = list(stream.hear(parts.recording[:cut]))
        save_session(tmp_path / "s.safetensors", stream, {"model": "m"})
    with started(parts, Sampling(seed=99)) as stream:
        restore_stream(tmp_path / "s.safetensors", stream, {"model": "m"})
        after = list(stream.hear(parts.recording[cut:]))
        again = session_tensors(stream.slots.rows.lm_gen.lm_model) | session_tensors(parts.mimi)
        ending_again = heard(stream.finish())
    assert torch.equal(heard(before + after)[0], tokens)
    assert torch.equal(heard(before + after)[1], audio)
    assert final.keys() == again.keys()
    assert [name for name in final if not torch.equal(final[name], again[name])] == []
    assert all(torch.equal(one, two) for one, two in zip(ending, ending_again, strict=True))


def test_words_and_samples_of_the_parts_add_up(parts):
    with started(parts) as stream:
        whole = converse(stream, parts.tokenizer, parts.recording)
    with started(parts) as stream:
        first = converse(stream, parts.tokenizer, parts.recording[:CUT], last=False)
        assert (first.frames, stream.answered, stream.unanswered.shape[0]) == (11, 11, 801)
        second = converse(stream, parts.tokenizer, parts.recording[CUT:])
    assert torch.equal(torch.cat((first.audio, second.audio)), whole.audio)
    assert torch.equal(torch.cat((first.user, second.user)), parts.recording)
    assert first.frames + second.frames == whole.frames == 26
    assert "".join(first.text.split() + second.text.split()) == "".join(whole.text.split())


@torch.no_grad()
def test_rows_at_different_places_are_restored(build, random_codes, streaming_tensors):
    model, other = build(**SHORT), build(**SHORT)
    other.load_state_dict(model.state_dict())
    codes = random_codes(2, 20)
    with streaming(model, 2, max_chunk=3), streaming(other, 2, max_chunk=3):
        model.forward_text(codes[:, :, :3])
        model.set_exec_mask(torch.tensor([True, False]))
        model.forward_text(codes[:, :, 3:5])
        model.reset_streaming(torch.tensor([False, True]))
        model.forward_text(codes[:, :, 5:8])
        saved = [session_tensors(model, row) for row in (0, 1)]
        addresses = {name: tensor.data_ptr() for name, tensor in streaming_tensors(other).items()}
        for row in (0, 1):
            restore_session(other, saved[row], row)
        assert {name: t.data_ptr() for name, t in streaming_tensors(other).items()} == addresses
        assert len(addresses) > 40
        for start in (8, 11, 14):
            frames = codes[:, :, start : start + 3]
            assert torch.equal(model.forward_text(frames)[0], other.forward_text(frames)[0])


@torch.no_grad()
def test_a_session_holds_copies_of_all_that_is_not_learned(build, random_codes, streaming_tensors):
    model = build(**SHORT)
    with model.streaming(1):
        model.forward_text(random_codes(1, 1))
        saved = session_tensors(model)
        left = []
        for name, tensor in streaming_tensors(model).items():
            if (key := name if name[0] != "." else f"self{name}") in saved:
                assert torch.equal(saved[key], tensor), name
            else:
                left.append(name.split("ttt_layer.ttt.")[1].split(".")[0])
        assert set(left) == {"initial", "norm", "step_scale"}
        kept = {name: tensor.clone() for name, tensor in saved.items()}
        model.forward_text(random_codes(1, 1))
        assert all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.fixture
def saved(parts, tmp_path):
    path = tmp_path / "s.safetensors"
    with started(parts) as stream:
        list(stream.hear(parts.recording[: 2 * FRAME]))
        save_session(path, stream, {"model.contexts": "[7, 5]", "step": "2"})
    return path


def refused(parts, path, identity=None):
    """The error of restoring a session, which leaves the stream as it was."""
    identity = identity or {"model.contexts": "[7, 5]", "step": "2"}
    with started(parts) as stream:
        with pytest.raises(ValueError) as error:
            restore_stream(path, stream, identity)
        assert stream.frames == 0
        assert all(t.sum() == 0 for name, t in session_tensors(parts.mimi).items() if "previous" in name)
    return str(error.value)


def test_a_damaged_file_is_refused(parts, saved, tmp_path):
    content = saved.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for length in (0, 5, 2000, len(content) - 1):
        bad.write_bytes(content[:length])
        assert "bad.safetensors is damaged or no session" in refused(parts, bad)
    bad.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "bad.safetensors was changed after it was saved" in refused(parts, bad)
    bad.unlink()
    assert "bad.safetensors does not exist; a session_out=FILE" in refused(parts, bad)
    save_file(load_file(saved), bad)
    assert "bad.safetensors is no session, but other safetensors" in refused(parts, bad)
    with session.safe_open(saved, "pt") as file:
        save_file(load_file(saved), bad, file.metadata() | {"format_version": "1"})
    assert "has format 1, this release reads 2" in refused(parts, bad)


def test_a_session_of_something_else_is_refused_with_what_differs(parts, saved, build):
    message = refused(parts, saved, {"model.contexts": "[7, 6]", "step": "2", "device": '"cuda"'})
    assert 'model.contexts was [7, 5], is [7, 6]; device was -, is "cuda". Continue' in message
    assert "step" not in message
    # Where the identity says nothing, sizes and kinds of the state do.
    parts.model = build(mini_batch_size=5, **(SHORT | {"non_ttt_layer_context": 8}))
    assert "kv_cache.capacity is torch.int64 [] = 7, this model's is torch.int64 [] = 8" in refused(
        parts, saved
    )
    parts.model = build(mini_batch_size=6, **SHORT)
    assert "is torch.float32 [4, 5, 32], this model's is torch.float32 [4, 6, 32]" in refused(parts, saved)
    parts.model = build(mini_batch_size=5, layers="1", **SHORT)
    assert "7 parts missing ['transformer.layers.2.exec_mask'" in refused(parts, saved)


def test_a_session_of_another_checkpoint_or_sampling_is_refused(run_dir, tmp_path):
    other = run(tmp_path / "other", "ttt.base_lr=3", "ttt.mini_batch_size=5")
    source = wav(tmp_path / "user.wav", dialogue(4)[14400:24000, 1])
    file = tmp_path / "a.session"
    common = {"sampling": Sampling(temp=0.5), "device": "cpu"}
    generate(
        GenerateConfig(str(run_dir), str(source), str(tmp_path / "a.wav"), session_out=str(file), **common)
    )
    again = GenerateConfig(str(other), str(source), str(tmp_path / "b.wav"), session_in=str(file), **common)
    with pytest.raises(ValueError, match=r"model.ttt.1.base_lr was 8.0, is 3.0; .*Continue it with"):
        generate(again)
    again.checkpoint, again.sampling = str(run_dir), Sampling(temp=0.6, seed=1)
    with pytest.raises(
        ValueError, match=r"else: sampling.temp was 0.5, is 0.6; sampling.seed was 0, is 1. Cont"
    ):
        generate(again)
    again.sampling, again.session_out = Sampling(temp=0.5), str(file)
    with pytest.raises(ValueError, match="a.session exists; choose another output or set overwrite=true"):
        generate(again)
    again.session_out, again.input = (
        str(tmp_path / "b.session"),
        str(wav(tmp_path / "short.wav", [0.1] * 100)),
    )
    with pytest.raises(ValueError, match="short.wav is shorter than a frame"):
        generate(again)
    assert not (tmp_path / "b.wav").exists()
    assert not (tmp_path / "b.session").exists()


def test_the_identity_knows_weights_settings_sampling_and_device(run_dir):
    loaded = load_checkpoint(run_dir)
    identity = session_identity(loaded, Sampling(top_k=7))
    assert identity["sampling.top_k"] == "7"
    assert identity["device"] == '"cpu"'
    assert identity["model.contexts"] == "[9, 7, 7, 9]"
    assert identity["model.ttt.2.mini_batch_size"] == "5"
    digest = loaded.manifest["files"]["ttt.safetensors"]["sha256"]
    assert identity["weights.ttt.safetensors"] == f'"{digest}"'
    assert set(loaded.manifest["base"]["sha256"]) == {"moshi", "mimi", "tokenizer"}
    assert all(f"base.{name}" in identity for name in ("moshi", "mimi", "tokenizer"))
    assert identity["model.ttt.1.rope"].startswith("sha256 ")


def test_a_session_that_cannot_be_written_leaves_the_old_one(parts, saved, monkeypatch):
    before = saved.read_bytes()

    def full(paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(session, "sync", full)
    with started(parts) as stream:
        list(stream.hear(parts.recording[: 3 * FRAME]))
        with pytest.raises(OSError, match="no space"):
            save_session(saved, stream, {})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("oddity", [0.5, "text", [1], (1, 2), {"a": 1}], ids=str)
def test_a_state_of_an_unknown_kind_is_an_error_and_not_forgotten(build, oddity):
    model = build()
    with model.streaming(1):
        model.transformer.layers[0]._streaming_state.oddity = oddity
        with pytest.raises(TypeError, match=r"transformer.layers.0.oddity.* of the streaming state"):
            session_tensors(model)


def test_what_does_not_stream_has_no_session(build):
    with pytest.raises(ValueError, match="LMModel is not streaming, so it has no session"):
        session_tensors(build())
