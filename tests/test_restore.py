"""A checkpoint is the model that was trained: a new process computes and says the same, bit for bit."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torchaudio.functional import resample
from training import CPU, dialogue, run, run_python, start_python, tiny_config, trained_parts

import inference.stream as stream
from finetune.train import build_parts
from inference.generate import GenerateConfig, generate
from inference.stream import Sampling, answer, read_recording, timed_words
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import describe, live_settings
from moshi_ttt.loading import load_mimi, load_tokenizer

TTT = (
    "ttt.layers='1,3'",
    "ttt.num_heads=2",
    "ttt.head_dim=16",
    "ttt.mini_batch_size=5",
    "ttt.base_lr=3",
    "ttt.gate=convex",
    "ttt.gate_init=0.2",
    "ttt.ttt_layer_context=7",
    "ttt.non_ttt_layer_context=9",
    "ttt.normalize_target=false",
    "ttt.learned_token_scale=true",
    "ttt.max_inner_change=0.05",
    "ttt.inner_init=published",
    "ttt.rope_theta=500",
    "ttt.scan_checkpoint_group_size=0",
)
RUNS = {
    "lora+ttt": ("ttt.ssm_layer=ttt_linear", "lora.scaling=1.5"),
    "full": ("ttt.ttt_mlp_layers=3", "lora=none", "param_dtype=bfloat16"),
}
LIVE = {
    "num_heads": 2,
    "head_dim": 16,
    "mini_batch_size": 5,
    "base_lr": 3.0,
    "normalize_target": False,
    "max_inner_change": 0.05,
    "learned_token_scale": True,
    "scan_checkpoint_group_size": 0,
    "gate": "ConvexGate",
}

# What a new process makes of a checkpoint: its settings, logits and an answer.
RESTORE = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from inference.stream import Sampling, answer
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import live_settings
from moshi_ttt.loading import load_mimi, load_tokenizer

run, given, made = sys.argv[1:]
loaded = load_checkpoint(run)
inputs = load_file(given)
with torch.no_grad():
    output = loaded.model(inputs["codes"])
mimi, tokenizer = load_mimi(loaded.base, "cpu"), load_tokenizer(loaded.base)
result = answer(loaded.model, mimi, tokenizer, inputs["recording"], Sampling(seed=3))
tensors = {"logits": output.logits, "text_logits": output.text_logits, "answer": result.audio}
metadata = {"text": result.text, "settings": json.dumps(live_settings(loaded.model))}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made, metadata)
"""


@pytest.fixture(scope="module", params=RUNS)
def trained(request, private_cache, tmp_path_factory):
    """A run of two steps, and its live model."""
    run_dir = tmp_path_factory.mktemp("restore") / "run"
    parts = trained_parts(run_dir, f"mode={request.param}", *TTT, *RUNS[request.param])
    return SimpleNamespace(mode=request.param, run_dir=run_dir, parts=parts)


@pytest.fixture(scope="module")
def run_dir(private_cache, tmp_path_factory):
    """A run of two steps to generate from."""
    return run(tmp_path_factory.mktemp("generate") / "run", *TTT)


def bits(tensor):
    """For comparison: NaN marks logits that do not exist, and equals nothing."""
    return tensor.contiguous().view(torch.uint8)


@torch.no_grad()
def test_a_new_process_restores_settings_logits_and_speech(trained, random_codes, tmp_path):
    codes, recording = random_codes(2, 20), torch.from_numpy(dialogue(4)[14400:44401, 1].copy())
    given, made = tmp_path / "given.safetensors", tmp_path / "made.safetensors"
    save_file({"codes": codes, "recording": recording}, given)
    run_python("-c", RESTORE, str(trained.run_dir), str(given), str(made))
    restored = load_file(made)
    with made.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]

    parts = trained.parts
    # torch multiplies matrices another way where the weight is frozen; a restored model has nothing frozen.
    parts.model.requires_grad_(True)
    live = live_settings(parts.model)
    assert json.loads(header["settings"]) == json.loads(json.dumps(live))
    output = parts.model(codes)
    assert torch.equal(bits(output.logits), bits(restored["logits"]))
    assert torch.equal(bits(output.text_logits), bits(restored["text_logits"]))
    assert output.text_logits.isfinite().all()
    said = answer(parts.model, parts.mimi, parts.tokenizer, recording, Sampling(seed=3))
    assert torch.equal(said.audio, restored["answer"])
    assert said.text == header["text"]


def test_the_settings_that_were_trained_with_are_live(trained):
    # What the test above compares with must itself be what the config says.
    live = live_settings(load_checkpoint(trained.run_dir).model)
    assert live["contexts"] == [9, 7, 9, 7]
    assert {name for name in live if name.startswith("ttt.")} == {"ttt.1", "ttt.3"}
    for index in (1, 3):
        assert live[f"ttt.{index}"].items() >= LIVE.items()
    kind = {"lora+ttt": "TTTLinear", "full": "TTTMLPMultiLayer"}[trained.mode]
    dims = {"lora+ttt": [16, 16], "full": [16, 64, 64, 16]}[trained.mode]
    assert (live["ttt.1"]["kind"], live["ttt.1"]["inner_dims"]) == (kind, dims)
    dtype = {"lora+ttt": "torch.float32", "full": "torch.bfloat16"}[trained.mode]
    assert live["dtype"] == live["ttt.1"]["projection_dtype"] == dtype


def test_the_restored_parameters_are_the_trained_ones_all_of_them(trained):
    live = dict(trained.parts.model.named_parameters())
    restored = dict(load_checkpoint(trained.run_dir).model.named_parameters())
    assert live.keys() == restored.keys()
    assert all(torch.equal(parameter, restored[name]) for name, parameter in live.items())


def test_training_moved_what_it_should_have_saved(trained):
    # Two steps must show, or equality with a restored model would say little.
    config = tiny_config(trained.run_dir, f"mode={trained.mode}", *TTT, *RUNS[trained.mode])
    fresh = dict(build_parts(config, [], CPU).model.named_parameters())
    moved = {name for name, p in trained.parts.model.named_parameters() if not torch.equal(p, fresh[name])}
    assert any("seq_modeling_block.ttt_layer" in name for name in moved)
    assert any("gate.alpha" in name for name in moved)
    assert any(".lora_B." in name if trained.mode == "lora+ttt" else "text_emb" in name for name in moved)


def wav_of_16khz(path, samples=16001):
    """The user's voice at 16 kHz, with a length that is no multiple of anything."""
    audio = torch.from_numpy(dialogue(4)[14400:, 1].copy())
    soundfile.write(path, resample(audio, 24000, 16000)[:samples].numpy(), 16000)
    return path


def config_for(run_dir, output, **settings):
    source = settings.pop("input", None) or wav_of_16khz(output.with_name("input.wav"))
    sampling = Sampling(seed=settings.pop("seed", 0))
    return GenerateConfig(str(run_dir), str(source), str(output), sampling=sampling, device="cpu", **settings)


def test_the_command_line_answers_the_same_twice_and_another_seed_otherwise(run_dir, tmp_path):
    source = wav_of_16khz(tmp_path / "input.wav")
    common = ["-m", "inference.generate", f"checkpoint={run_dir}", f"input={source}", "sampling.seed=5"]
    outputs = [tmp_path / name for name in ("one.wav", "two.wav")]
    both = [start_python(*common, "device=cpu", f"output={output}") for output in outputs]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    for suffix in (".wav", "_stereo.wav"):
        one, two = (output.with_name(output.stem + suffix) for output in outputs)
        assert one.read_bytes() == two.read_bytes()
    words = [json.loads(output.with_suffix(".json").read_text()) for output in outputs]
    assert words[0] == words[1]
    assert words[0]["sampling"] == asdict(Sampling(seed=5))

    assert "Set context: 250 → TTT layers: 7 (2 layers), Non-TTT: 9 (2 layers)" in printed[0]
    for line in describe(load_checkpoint(run_dir).model).splitlines():
        assert line in printed[0]

    generate(config_for(run_dir, tmp_path / "same.wav", input=source, seed=5))
    generate(config_for(run_dir, tmp_path / "other.wav", input=source, seed=6))
    assert (tmp_path / "same.wav").read_bytes() == outputs[0].read_bytes()
    assert (tmp_path / "other.wav").read_bytes() != outputs[0].read_bytes()


def test_the_answer_lies_beside_the_question(run_dir, tmp_path):
    output = tmp_path / "deep/answer.wav"
    source = wav_of_16khz(tmp_path / "input.wav", 16001)
    result = generate(config_for(run_dir, output, input=source))
    samples = math.ceil(16001 * 24000 / 16000)
    mono, rate = soundfile.read(output, dtype="int16")
    stereo, stereo_rate = soundfile.read(tmp_path / "deep/answer_stereo.wav", dtype="int16")
    assert (mono.shape, rate) == ((samples,), 24000)
    assert (stereo.shape, stereo_rate) == ((samples, 2), 24000)
    assert np.array_equal(stereo[:, 0], mono)
    user = (read_recording(source, 24000) * 32768).numpy()
    assert np.abs(stereo[:, 1] - user).max() <= 1
    assert np.abs(user).max() > 1000
    assert np.abs(mono).max() > 0

    content = json.loads(output.with_suffix(".json").read_text())
    assert content["text"] == result.text
    assert content["step"] == 2
    assert content["frames"] == math.ceil(samples / 1920)
    assert content["words"]
    ends = [0.0]
    for word in content["words"]:
        assert ends[-1] <= word["start"] < word["end"] <= content["frames"] * 0.08 + 1e-9
        ends.append(word["end"])


def test_outputs_that_exist_are_kept_unless_told(run_dir, tmp_path):
    for existing in ("answer.wav", "answer_stereo.wav", "answer.json"):
        folder = tmp_path / existing
        folder.mkdir()
        (folder / existing).write_text("mine")
        with pytest.raises(
            ValueError, match=f"{existing} exists; choose another output or set overwrite=true"
        ):
            generate(config_for(run_dir, folder / "answer.wav"))
        assert (folder / existing).read_text() == "mine"
        assert sorted(path.name for path in folder.iterdir()) == sorted([existing, "input.wav"])
    generate(config_for(run_dir, folder / "answer.wav", overwrite=True))
    assert json.loads((folder / "answer.json").read_text())["frames"] == 13


def test_one_channel_of_a_stereo_recording_is_the_user(run_dir, tmp_path):
    both = tmp_path / "both.wav"
    soundfile.write(both, dialogue(4)[14400:33600], 24000)
    with pytest.raises(
        ValueError, match="both.wav has 2 channels; say which is the user with channel=0 or 1"
    ):
        generate(config_for(run_dir, tmp_path / "answer.wav", input=both))
    with pytest.raises(ValueError, match="channel=2, but .*both.wav has channels 0 to 1"):
        generate(config_for(run_dir, tmp_path / "answer.wav", input=both, channel=2))
    assert not (tmp_path / "answer.wav").exists()
    for channel in (0, 1):
        alone = tmp_path / f"alone_{channel}.wav"
        soundfile.write(alone, dialogue(4)[14400:33600, channel], 24000)
        generate(config_for(run_dir, tmp_path / f"a{channel}.wav", input=alone))
        generate(config_for(run_dir, tmp_path / f"b{channel}.wav", input=both, channel=channel))
        assert (tmp_path / f"a{channel}.wav").read_bytes() == (tmp_path / f"b{channel}.wav").read_bytes()
    assert (tmp_path / "a0.wav").read_bytes() != (tmp_path / "a1.wav").read_bytes()


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"checkpoint": "nowhere"}, r"no checkpoint at nowhere: expected a run \(with checkpoints/"),
        ({"input": "nowhere.wav"}, "input nowhere.wav does not exist"),
        ({"output": "answer.mp3"}, "output must be named .wav, got answer.mp3"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda; got 'tpu'"),
        ({"verify": "never"}, "verify must be cached or full, got 'never'"),
    ],
)
def test_what_cannot_be_answered_is_an_error_that_says_what_to_give(run_dir, tmp_path, settings, match):
    config = config_for(run_dir, tmp_path / "answer.wav")
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=match):
        generate(config)
    assert [path.name for path in tmp_path.iterdir()] == ["input.wav"]


@pytest.mark.parametrize("samples", [np.zeros(0), np.array([0.1, np.nan, 0.1])])
def test_a_recording_that_cannot_be_heard_is_an_error(tmp_path, samples):
    path = tmp_path / "input.wav"
    soundfile.write(path, samples, 24000, subtype="FLOAT")
    with pytest.raises(ValueError, match="input.wav holds (no audio|NaN or infinite samples)"):
        read_recording(path, 24000)


@pytest.fixture
def hybrid(build):
    """A model whose windows are shorter than the recordings here, with TTT that shows."""
    return build(ttt_layer_context=5, non_ttt_layer_context=11)


@torch.no_grad()
def test_streaming_meets_the_user_in_the_frames_that_training_does(hybrid, tiny_base, monkeypatch):
    mimi, tokenizer = load_mimi(tiny_base, "cpu"), load_tokenizer(tiny_base)
    recording = torch.from_numpy(dialogue(4)[14400 : 14400 + 40 * 1920 - 700, 1].copy())
    tokens = []
    hear = stream.Stream.hear

    def listening(*arguments):
        for frame in hear(*arguments):
            tokens.append(frame.tokens.clone())
            yield frame

    monkeypatch.setattr(stream.Stream, "hear", listening)
    result = answer(hybrid, mimi, tokenizer, recording, Sampling(use_sampling=False))
    assert result.frames == len(tokens) == 40
    moshi = torch.cat(tokens, dim=2)  # [1, 9, 40]
    padded = torch.nn.functional.pad(recording, (0, 700))
    user = mimi.encode(padded[None, None])  # [1, 8, 40]

    def greedy(user_codes):
        """What the training forward finds likeliest in each frame, with its validity."""
        output = hybrid(torch.cat((moshi, user_codes), dim=1))
        likeliest = torch.cat((output.text_logits.argmax(-1), output.logits.argmax(-1)), dim=1)
        return likeliest, torch.cat((output.text_mask, output.mask), dim=1)

    likeliest, valid = greedy(user)
    assert torch.equal(likeliest[valid], moshi[valid])
    assert valid.sum() == 9 * 40 - 7
    # The check is sharp: one frame earlier or later, the model would have said something else.
    for shift in (-1, 1):
        shifted, _ = greedy(user.roll(shift, dims=2))
        assert (shifted != moshi)[valid].float().mean() > 0.1


@torch.no_grad()
def test_an_answer_leaves_the_random_numbers_and_the_model_as_they_were(hybrid, tiny_base):
    mimi, tokenizer = load_mimi(tiny_base, "cpu"), load_tokenizer(tiny_base)
    recording = torch.from_numpy(dialogue(4)[14400:24000, 1].copy())
    before = torch.random.get_rng_state()
    first = answer(hybrid, mimi, tokenizer, recording, Sampling(seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not hybrid.is_streaming
    assert not mimi.is_streaming
    again = answer(hybrid, mimi, tokenizer, recording, Sampling(seed=1))
    assert torch.equal(first.audio, again.audio)
    assert first.words == again.words


def test_sampling_settings_reach_the_sampler(hybrid, tiny_base):
    mimi, tokenizer = load_mimi(tiny_base, "cpu"), load_tokenizer(tiny_base)
    recording = torch.from_numpy(dialogue(4)[14400:24000, 1].copy())

    def said(**settings):
        return answer(hybrid, mimi, tokenizer, recording, Sampling(**settings))

    greedy = said(use_sampling=False)
    # Each of these leaves one choice, whatever the seed.
    one = said(top_k=1, top_k_text=1, seed=4)
    assert torch.equal(one.audio, greedy.audio)
    assert one.words == greedy.words
    assert said(top_k=1, seed=4).words != greedy.words
    assert not torch.equal(said(top_k_text=1, seed=4).audio, greedy.audio)
    assert torch.equal(said(temp=1e-4, temp_text=1e-4, seed=4).audio, greedy.audio)


def test_timed_words_are_those_worked_out_by_hand(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    tokens = {"was": [304, 264], "not": [316], "disposed": [322, 301, 264, 350, 278, 313, 269]}
    assert all(tokenizer.encode(word) == ids for word, ids in tokens.items())

    def words(stream):
        return [(w.text, w.start, w.end) for w in timed_words(stream, tokenizer, {0, 3}, 12.5)]

    assert words([]) == []
    assert words([3, 3, 0, 3]) == []
    assert words([3, 0, *tokens["was"], 3]) == [("was", 0.16, 0.32)]
    assert words([*tokens["was"], *tokens["not"]]) == [("was", 0.0, 0.16), ("not", 0.16, 0.24)]
    # Padding inside a word does not end it; the beginning of the next one does.
    split = [*tokens["disposed"][:2], 3, 3, *tokens["disposed"][2:], 0, *tokens["not"]]
    assert words(split) == [("disposed", 0.0, 0.72), ("not", 0.8, 0.88)]
    # A stream may begin inside a word; tokens of no word are passed over.
    assert words([264, 1, 2, *tokens["not"]]) == [("s", 0.0, 0.08), ("not", 0.24, 0.32)]
    assert words([261, 3]) == []  # a lone space
