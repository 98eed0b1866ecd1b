"""Many recordings at once: each answer is what it is alone, in the files that benchmarks read."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from training import ROOT, compose_config, dialogue, run

from configs.typed import typed_config
from inference.batch.items import find_items
from inference.batch.settings import BatchConfig
from inference.batch.work import Batch
from inference.codec import decode_codes, encode_recording
from inference.likelihood import nll_by_frame
from inference.rows import Rows
from inference.stream import read_recording
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import ttt_layers
from moshi_ttt.loading import load_mimi

RATE, FRAME = 24000, 1920
LENGTHS = {"task/a": 23000, "task/b": 9000, "task/c": 48000, "other/d": 15361}
FILES = {"input.wav", "output.wav", "output_16k.wav", "stereo.wav", "text.json", "output.json", "meta.json"}


@pytest.fixture(scope="module")
def run_dir(private_cache, tmp_path_factory):
    settings = ("ttt.mini_batch_size=5", "ttt.ttt_layer_context=7", "ttt.non_ttt_layer_context=9")
    return run(tmp_path_factory.mktemp("batch") / "run", *settings)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Recordings as Full-Duplex-Bench lays them out."""
    folder = tmp_path_factory.mktemp("recordings")
    samples = dialogue(4)[:, 1]
    for number, (name, length) in enumerate(LENGTHS.items()):
        (folder / name).mkdir(parents=True)
        start = 14400 + 9000 * number
        soundfile.write(folder / name / "input.wav", samples[start : start + length], RATE)
    return folder


def batch(run_dir, inputs, output, *settings):
    config = compose_config(
        *(f"checkpoint={run_dir}", f"output={output}", "device=cpu", "sampling.seed=5", *settings),
        name="batch",
    )
    config.inputs = [str(path) for path in inputs]
    done = Batch(typed_config(config, BatchConfig))
    done.run()
    return done


@pytest.fixture(scope="module")
def answered(run_dir, recordings, tmp_path_factory):
    """All recordings, two at a time."""
    output = tmp_path_factory.mktemp("answers")
    assert batch(run_dir, [recordings], output, "slots=2").failures == []
    return output


def read(path):
    return soundfile.read(path, dtype="int16")[0]


def test_each_answer_is_that_of_the_recording_alone(run_dir, recordings, answered, tmp_path):
    for name in LENGTHS:
        batch(run_dir, [recordings / name / "input.wav"], tmp_path / name, "slots=1")
        (alone,) = (path.parent for path in (tmp_path / name).rglob("meta.json"))
        for file in ("output.json", "text.json"):
            assert (alone / file).read_text() == (answered / name / file).read_text()
        ours, other = read(answered / name / "output.wav"), read(alone / "output.wav")
        assert np.abs(ours.astype(int) - other).max() <= 1
        assert ours.std() > 10


def test_the_folder_holds_what_benchmarks_read(answered, recordings):
    for name, length in LENGTHS.items():
        folder = answered / name
        assert {path.name for path in folder.iterdir()} == FILES
        user, said, both = (read(folder / f"{file}.wav") for file in ("input", "output", "stereo"))
        assert len(user) == len(said) == length
        assert (both[:, 0] == user).all()
        assert (both[:, 1] == said).all()
        assert np.abs(user - read(recordings / name / "input.wav")).max() <= 1
        info = soundfile.info(folder / "output_16k.wav")
        assert (info.samplerate, info.channels) == (16000, 1)
        assert abs(info.duration - length / RATE) < 1e-3
        text, output, meta = (
            json.loads((folder / f"{file}.json").read_text()) for file in ("text", "output", "meta")
        )
        assert output["text"] == text["text"] == " ".join(word["text"] for word in text["words"])
        assert output["chunks"] == [
            {"text": w["text"], "timestamp": [w["start"], w["end"]]} for w in text["words"]
        ]
        times = [time for word in text["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times)
        assert text["words"], "the tiny model says something in each of these"
        assert meta["frames"] == -(-length // FRAME)
        assert meta["sampling"]["seed"] == 5
        assert meta["real_time_factor"] == pytest.approx(meta["seconds"] / meta["wall_sec"], rel=0.02)
        assert "ttt.safetensors" in meta["files_sha256"]
    (summary,) = answered.glob("summary-00001-of-00001.json")
    assert json.loads(summary.read_text())["recordings"] == len(LENGTHS)
    assert not list(answered.rglob(".*.unfinished"))


def test_the_shares_of_tasks_are_all_recordings_once(run_dir, recordings, answered, tmp_path):
    for index in (0, 1):
        batch(run_dir, [recordings], tmp_path, f"shard_index={index}", "num_shards=2", "slots=2")
    made = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("meta.json"))
    assert made == sorted(LENGTHS)
    for name in LENGTHS:
        assert (tmp_path / name / "text.json").read_text() == (answered / name / "text.json").read_text()
    for number in (1, 2):
        summary = json.loads((tmp_path / f"summary-0000{number}-of-00002.json").read_text())
        assert summary["recordings"] == 2


def test_a_killed_task_goes_on_and_finishes_nothing_twice(run_dir, recordings, answered, tmp_path):
    command = [sys.executable, "-m", "inference.batch", f"checkpoint={run_dir}", f"inputs=[{recordings}]"]
    command += [f"output={tmp_path}", "device=cpu", "sampling.seed=5", "slots=1"]
    task = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.rglob("meta.json")):
        assert time.monotonic() < deadline
        assert task.poll() is None
        time.sleep(0.01)
    os.kill(task.pid, signal.SIGKILL)
    task.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("meta.json")}
    assert 1 <= len(done) < len(LENGTHS)
    (tmp_path / "task" / ".b.unfinished").mkdir(exist_ok=True)
    (tmp_path / "task" / ".b.unfinished" / "old.wav").touch()
    batch(run_dir, [recordings], tmp_path, "slots=1")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for name in LENGTHS:
        assert {path.name for path in (tmp_path / name).iterdir()} == FILES
        assert (tmp_path / name / "text.json").read_text() == (answered / name / "text.json").read_text()


def test_answers_of_other_settings_are_not_taken_for_these(run_dir, recordings, tmp_path):
    inputs = [recordings / "task" / "b" / "input.wav"]
    batch(run_dir, inputs, tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob("meta.json"))
    with pytest.raises(ValueError, match=r"was made with another seed \(5, now 6\); choose another output"):
        batch(run_dir, inputs, tmp_path, "sampling.seed=6")
    with pytest.raises(ValueError, match="was made with another model_and_sampling_sha256"):
        batch(run_dir, inputs, tmp_path, "sampling.temp=0.5")
    before = read(folder / "output.wav")
    batch(run_dir, inputs, tmp_path, "sampling.seed=6", "overwrite=true")
    assert (read(folder / "output.wav") != before).any()
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="holds no meta.json: it is not of this command"):
        batch(run_dir, inputs, tmp_path)


def test_what_fails_is_listed_and_the_others_are_done(run_dir, recordings, tmp_path, caplog):
    soundfile.write(tmp_path / "nan.wav", np.full(5000, np.nan), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "two.wav", np.zeros((5000, 2)), RATE)
    inputs = [tmp_path / "nan.wav", tmp_path / "two.wav", recordings / "task" / "b" / "input.wav"]
    lines = [{"path": str(path), "id": f"i{n}"} for n, path in enumerate(inputs)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "inference.batch", f"checkpoint={run_dir}", "device=cpu"]
    command += [f"inputs=[{tmp_path / 'list.jsonl'}]", f"output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["i2"]
    summary = json.loads((tmp_path / "out" / "summary-00001-of-00001.json").read_text())
    errors = {failure["id"]: failure["error"] for failure in summary["failed"]}
    assert "holds NaN" in errors["i0"]
    assert "has 2 channels" in errors["i1"]
    assert (summary["done_now"], len(errors)) == (1, 2)


def test_a_state_that_breaks_ends_its_own_conversation_only(
    run_dir, recordings, answered, tmp_path, monkeypatch
):

    hear, steps = Rows.hear, []

    def broken_hear(self, codes, rows):
        """The row of the shorter recording meets a cosmic ray."""
        steps.append(rows)
        if len(steps) == 4:
            ttt = ttt_layers(self.lm_gen.lm_model)[0][1].seq_modeling_block.ttt_layer.ttt
            ttt._streaming_state.inner.weights[0][ttt.num_heads :] = torch.nan
        return hear(self, codes, rows)

    monkeypatch.setattr(Rows, "hear", broken_hear)
    inputs = [recordings / name / "input.wav" for name in ("task/c", "task/b")]
    done = batch(run_dir, inputs, tmp_path, "slots=2", "inner_state.check_every_frames=2")
    assert [failure["id"] for failure in done.failures] == ["b"]
    assert "inner state of TTT layer" in done.failures[0]["error"]
    assert (tmp_path / "c" / "text.json").read_text() == (answered / "task/c" / "text.json").read_text()
    assert not (tmp_path / "b").exists()


def test_perplexity_is_the_nll_of_the_recording_on_moshis_stream(run_dir, recordings, tmp_path):
    stereo = dialogue(4)[20000:60000]
    soundfile.write(tmp_path / "s.wav", stereo, RATE, subtype="FLOAT")
    settings = ("perplexity.enable=true", "generate=false", "channel=1")
    batch(run_dir, [tmp_path / "s.wav"], tmp_path / "out", *settings, "perplexity.text=padding")
    found = json.loads((tmp_path / "out" / "s" / "perplexity.json").read_text())
    loaded = load_checkpoint(run_dir)
    mimi, frames = load_mimi(loaded.base, "cpu"), -(-len(stereo) // FRAME)
    model = loaded.model
    sides = [encode_recording(mimi, torch.from_numpy(stereo[:, side].copy()), frames) for side in (0, 1)]
    text = torch.full((1, frames), model.text_padding_token_id)
    nll = nll_by_frame(model, torch.cat((text, *sides))[None], 5)[0]
    expected = nll.nanmean(1)
    assert list(found["nats"]) == ["text", *(f"codebook_{k}" for k in range(1, 9))]
    assert list(found["nats"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert found["perplexity"]["codebook_1"] == pytest.approx(float(expected[1].exp()), rel=1e-3)
    assert (found["channel"], found["user"], found["frames"]) == (0, "channel 1", frames)
    assert {path.name for path in (tmp_path / "out" / "s").iterdir()} == {"perplexity.json", "meta.json"}
    batch(run_dir, [recordings / "task" / "b" / "input.wav"], tmp_path / "mono", "perplexity.enable=true")
    mono = json.loads(next((tmp_path / "mono").rglob("perplexity.json")).read_text())
    assert mono["nats"]["text"] is None
    assert (mono["user"], mono["text_stream"]) == ("silence", "none")


def test_only_the_first_seconds(run_dir, recordings, tmp_path):
    batch(run_dir, [recordings / "task" / "c" / "input.wav"], tmp_path, "max_sec=0.5")
    assert len(read(next(tmp_path.rglob("output.wav")))) == 12000


def test_diagnostics_of_each_conversation_lie_with_it(run_dir, recordings, answered, tmp_path):
    batch(run_dir, [recordings / "task"], tmp_path, "diagnostics.every_frames=3", "slots=4")
    for name, length in (("a", 23000), ("b", 9000), ("c", 48000)):
        about, *records = map(json.loads, (tmp_path / name / "diagnostics.jsonl").read_text().splitlines())
        assert about["about"]["input"].endswith(f"{name}/input.wav")
        # The first frame takes a step of its own before it.
        steps = -(-length // FRAME) + 1
        assert len(records) == len(range(0, steps, 3)) * 2
        assert (tmp_path / name / "text.json").read_text() == (
            answered / "task" / name / "text.json"
        ).read_text()


def named(*inputs, channel=None, **settings):
    return {item.id: item for item in find_items([str(name) for name in inputs], channel, 5, **settings)}


def test_recordings_are_named_by_files_globs_folders_and_lists(recordings, tmp_path):
    assert set(named(recordings)) == set(LENGTHS)
    assert set(named(f"{recordings}/task/*/input.wav")) == {"a", "b", "c"}
    assert set(named(f"{recordings}/**/*.wav")) == set(LENGTHS)
    assert [item.seconds for item in named(recordings, max_sec=0.5).values()] == [0.5, 0.5, 0.5, 0.375]
    inside = recordings / "list.txt"
    inside.write_text("task/a/input.wav\n\ntask/b/input.wav\n")
    assert set(named(inside)) == {"a", "b"}
    inside.unlink()
    lines = [{"path": str(recordings / "task/a/input.wav"), "id": f"x/{n}", "seed": n} for n in (1, 2)]
    lines[1]["channel"] = 0
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = named(tmp_path / "l.jsonl")
    assert [(items[key].seed, items[key].channel) for key in ("x/1", "x/2")] == [(1, None), (2, 0)]
    odd = tmp_path / "a[1].wav"
    soundfile.write(odd, np.zeros(1000), RATE)
    assert set(named(odd)) == {"a[1]"}


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"path": "gone.wav"}', r"gone.wav \(.*l.jsonl:2\) does not exist"),
        ('{"path": 3}', r'l.jsonl:2: expected an object such as \{"path"'),
        ("{path", "l.jsonl:2: no JSON"),
        ('{"path": "a.wav", "id": "../x"}', r"l.jsonl:2: id '../x' is no plain folder name"),
        ('{"path": "a.wav", "id": "/x"}', "is no plain folder name"),
        ('{"path": "a.wav", "seed": "1"}', "l.jsonl:2: seed must be a int, got '1'"),
        ('{"path": "a.wav", "id": "x"}', "would both be answered in x; give each an `id`"),
        ('{"path": "a.wav", "id": "x/y"}', "would be answered in x/y, inside the answer of"),
        ('{"path": "l.jsonl"}', "l.jsonl .* is no audio file that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, error):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), RATE)
    (tmp_path / "l.jsonl").write_text(f'{{"path": "a.wav", "id": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=error):
        named(tmp_path / "l.jsonl")


@pytest.mark.parametrize(
    "name, error",
    [("none*.wav", "names no file"), ("", "folder .* holds no audio"), ("l.txt", "list .* does not exist")],
)
def test_an_input_that_names_nothing_is_an_error(tmp_path, name, error):
    with pytest.raises(ValueError, match=error):
        named(tmp_path / name)


@pytest.mark.parametrize(
    "setting, error",
    [
        ("slots=0", "slots must be at least 1"),
        ("max_sec=0", "max_sec must be above 0"),
        ("generate=false", "generate=false leaves nothing to do"),
        ("diagnostics.every_frames=-1", "diagnostics.every_frames must be 0"),
        ("perplexity.text=words", "perplexity.text must be none or padding"),
        ("perplexity.chunk_frames=0", "perplexity.chunk_frames must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, setting, error):
    with pytest.raises(ValueError, match=error):
        batch("none", [tmp_path], tmp_path, setting)


def test_another_base_model_is_refused_and_the_same_elsewhere_is_taken(
    run_dir, recordings, tmp_path, tiny_base
):
    folder = tiny_base.moshi_weights.parent
    (tmp_path / "base").mkdir()
    for file in folder.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    inputs = [recordings / "task" / "b" / "input.wav"]
    batch(run_dir, inputs, tmp_path / "out", f"base={tmp_path / 'base'}")
    with (tmp_path / "base" / tiny_base.moshi_weights.name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ValueError, match="was trained on another base model"):
        batch(run_dir, inputs, tmp_path / "out2", f"base={tmp_path / 'base'}")


def test_blocks_of_the_codec_are_the_stream(tiny_base, recordings):
    mimi = load_mimi(tiny_base, "cpu")
    samples = torch.from_numpy(
        np.concatenate([dialogue(n)[:, side] for n in (1, 2, 3, 4) for side in (0, 1)])
    )
    samples = samples[: 300 * FRAME - 5]
    assert samples.shape[0] == 300 * FRAME - 5
    codes = encode_recording(mimi, samples, 303)
    padded = torch.nn.functional.pad(samples, (0, 3 * FRAME + 5))
    with torch.no_grad(), mimi.streaming(1):
        frames = [mimi.encode(frame[None, None]) for frame in padded.split(FRAME)]
        audio = torch.cat([mimi.decode(codes[None, :, t : t + 1])[0, 0] for t in range(codes.shape[1])])
    # A latent on the border of two codes can fall either way: all but a few are equal.
    assert (torch.cat(frames, -1)[0] == codes).float().mean() > 0.99
    torch.testing.assert_close(decode_codes(mimi, codes), audio, rtol=0, atol=1e-5)


def test_read_recording_is_what_is_heard(recordings):
    samples = read_recording(recordings / "task" / "a" / "input.wav", RATE)
    assert samples.shape[0] == LENGTHS["task/a"]
