"""What cannot be trained on or with is a ValueError that names it and the remedy, before a run exists."""

import gzip
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra.errors import HydraException
from training import (
    CPU,
    SAMPLE,
    TINY,
    compose_config,
    dialogue,
    one_step,
    own_logging,
    run,
    run_python,
    tiny_config,
    write_recording,
)

from finetune.data.bad_input import BadInput
from finetune.data.batches import training_batches
from finetune.data.chunks import ChunkEncoder
from finetune.data.clips import ClipEncoder, cut_clips
from finetune.data.manifest import read_manifest
from finetune.data.order import Sampling
from finetune.data.sources import SourceSettings, read_sources
from finetune.train import build_parts, main

AUDIO = dialogue(4)[96000:134400]  # 1.6 s of speech


def refused(tmp_path: Path, match: str, *overrides: str) -> str:
    """Start a run as the command line does; expect a ValueError and no trace of a run."""
    run_dir = tmp_path / "run"
    config = compose_config(*TINY, f"run_dir={run_dir}", *overrides)
    with own_logging(), pytest.raises(ValueError, match=match) as caught:
        main(config)
    assert not run_dir.exists()
    return str(caught.value)


@pytest.fixture
def data(tmp_path):
    """A good data set of one recording, to spoil."""
    return write_recording(tmp_path / "data", AUDIO, words=[["he", [0.1, 0.3], "SPEAKER_MAIN"]])


def replace_line(jsonl, **changes):
    """Spoil the list: an empty line and a good one come first, so the bad line is number 3."""
    good = jsonl.read_text().strip()
    bad = {name: value for name, value in (json.loads(good) | changes).items() if value is not ...}
    jsonl.write_text(f"\n{good}\n{json.dumps(bad)}\n")


def test_the_data_set_that_is_spoilt_here_is_good(data, tmp_path):
    replace_line(data)
    run_dir = run(tmp_path / "run", f"data.train={data}", f"data.valid={data}", "max_steps=1")
    assert (run_dir / "metrics.jsonl").read_text()


@pytest.mark.parametrize("role", ["train", "valid"])
def test_a_missing_list(tmp_path, role):
    missing = tmp_path / "nowhere.jsonl"
    refused(tmp_path, f"data list {missing} does not exist; expected a jsonl file", f"data.{role}={missing}")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_list(tmp_path, content):
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text(content)
    refused(tmp_path, f"{jsonl} is empty; expected a line for each recording", f"data.train={jsonl}")


def test_a_list_that_is_no_text(data, tmp_path):
    data.write_bytes('{"path": "größe.wav", "duration": 1.6}\n'.encode("latin-1"))
    refused(tmp_path, f"{data}", f"data.train={data}")


@pytest.mark.parametrize(
    "line, match",
    [
        ('{"path": "a.wav", ', "not JSON"),
        ("a.wav 1.6", "not JSON"),
        ('["a.wav", 1.6]', 'expected {"path": ..., "duration": seconds}, got'),
        ('{"duration": 1.6}', 'expected {"path": ..., "duration": seconds}, got'),
        ('{"path": 3, "duration": 1.6}', 'expected {"path": ..., "duration": seconds}, got'),
        ('{"path": "a.wav"}', "duration must be a number of seconds above 0, got None"),
        ('{"path": "a.wav", "duration": "1.6"}', "duration must be a number of seconds above 0, got '1.6'"),
        ('{"path": "a.wav", "duration": 0}', "duration must be a number of seconds above 0, got 0"),
        ('{"path": "a.wav", "duration": -2}', "duration must be a number of seconds above 0, got -2"),
        ('{"path": "a.wav", "duration": NaN}', "duration must be a number of seconds above 0, got nan"),
    ],
)
def test_a_line_that_is_no_recording(data, tmp_path, line, match):
    data.write_text(data.read_text() + "\n" + line + "\n")
    message = refused(tmp_path, ":3: ", f"data.train={data}")
    assert message.startswith(f"{data}:3: {match}")


@pytest.mark.parametrize("role", ["train", "valid"])
def test_a_recording_that_is_missing(data, tmp_path, role):
    replace_line(data, path="b.wav")
    refused(tmp_path, f"{data}:3: audio file .*data/b.wav does not exist", f"data.{role}={data}")


@pytest.mark.parametrize("duration", [1.2, 2.0, 16.0])
def test_a_wrong_duration(data, tmp_path, duration):
    replace_line(data, duration=duration)
    match = f"{data}:3: duration says {duration} s, .*a.wav has 1.600 s; correct the list"
    refused(tmp_path, match, f"data.train={data}")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_recording_that_is_not_stereo(tmp_path, channels):
    data = write_recording(tmp_path / "data", np.repeat(AUDIO[:, :1], channels, axis=1))
    match = rf"{data}:1: .*a.wav has {channels} channel\(s\); expected stereo, left Moshi and right the user"
    refused(tmp_path, match, f"data.train={data}")


def test_a_recording_without_audio(data, tmp_path):
    soundfile.write(data.with_name("a.wav"), AUDIO[:0], 24000)
    refused(tmp_path, f"{data}:1: .*a.wav holds no audio", f"data.train={data}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_a_recording_with_nan(tmp_path, value, subtype):
    audio = AUDIO.copy()
    audio[20000, 1] = value
    data = write_recording(tmp_path / "data", audio, subtype=subtype)
    match = f"{data}:1: .*a.wav holds NaN or infinite samples; repair or remove it"
    refused(tmp_path, match, f"data.train={data}")


@pytest.mark.parametrize("content", [b"", b"not audio at all", b"RIFF\x00\x00\x00\x00WAVEfmt "])
def test_a_file_that_is_no_audio(data, tmp_path, content):
    data.with_name("a.wav").write_bytes(content)
    refused(tmp_path, f"{data}:1: .*a.wav is no audio file that can be read", f"data.train={data}")


def test_a_file_that_is_cut_short(data, tmp_path):
    flac = data.with_name("a.flac")
    soundfile.write(flac, AUDIO, 24000)
    flac.write_bytes(flac.read_bytes()[: flac.stat().st_size // 2])
    data.with_name("a.wav").unlink()
    data.write_text('{"path": "a.flac", "duration": 1.6}')
    refused(tmp_path, f"{data}:1: .*a.flac", f"data.train={data}")


@pytest.mark.parametrize("path", ["../outside.wav", "{root}/outside.wav", "link.wav", "linked/outside.wav"])
def test_a_path_that_leaves_the_folder(data, tmp_path, path):
    outside = tmp_path / "outside.wav"
    soundfile.write(outside, AUDIO, 24000)
    outside.with_suffix(".json").write_text('{"alignments": []}')
    data.with_name("link.wav").symlink_to(outside)
    data.with_name("linked").symlink_to(tmp_path)
    path = path.format(root=tmp_path)
    replace_line(data, path=path)
    match = f"{data}:3: {path} lies outside {data.parent}; move it there or set data.root to a folder"
    refused(tmp_path, match, f"data.train={data}")


def test_a_root_allows_audio_elsewhere(data, tmp_path):
    (tmp_path / "lists").mkdir()
    jsonl = data.rename(tmp_path / "lists/list.jsonl")
    jsonl.write_text(jsonl.read_text().replace("a.wav", "../data/a.wav"))
    common = (f"data.train={jsonl}", f"data.valid={jsonl}")
    refused(tmp_path, "lies outside", *common)
    assert run(tmp_path / "run", *common, f"data.root={tmp_path}", "max_steps=1").is_dir()


def test_a_transcript_that_is_missing(data, tmp_path):
    data.with_name("a.json").unlink()
    match = "data/a.json does not exist; expected the transcript of a.wav with timed words"
    refused(tmp_path, match, f"data.train={data}")


@pytest.mark.parametrize(
    "content, match",
    [
        ("{", "a.json: not JSON"),
        ("\xff\xfe", "a.json: not JSON"),
        ("[]", r'a.json: expected {"alignments": \[\[word, \[start, end\], speaker\], ...\]}'),
        ("{}", 'a.json: expected {"alignments"'),
        ('{"alignments": {"he": [0, 1]}}', 'a.json: expected {"alignments"'),
        ('{"alignments": ["he"]}', r"a.json: alignment 0: expected \[word, .*, got he"),
        ('{"alignments": [["he", 0.1, 0.3, "A"]]}', r"a.json: alignment 0: expected \[word"),
        ('{"alignments": [["he", [0.1, 0.3]]]}', r"a.json: alignment 0: expected \[word"),
        ('{"alignments": [["he", [0.1, "0.3"], "A"]]}', r"a.json: alignment 0: expected \[word"),
        ('{"alignments": [["he", [0.1, NaN], "A"]]}', r"a.json: alignment 0: expected \[word"),
        ('{"alignments": [["he", [0, 1], "A"], [3, [0, 1], "A"]]}', r"a.json: alignment 1: expected \[word"),
    ],
)
def test_a_transcript_of_another_shape(data, tmp_path, content, match):
    data.with_name("a.json").write_bytes(content.encode("latin-1"))
    refused(tmp_path, match, f"data.train={data}")


@pytest.mark.parametrize("start, end", [(1.5, 1.8), (2.0, 2.2), (-0.2, 0.1)])
def test_a_word_outside_the_audio(data, tmp_path, start, end):
    words = [["he", [0.1, 0.3], "SPEAKER_MAIN"], ["was", [start, end], "SPEAKER_MAIN"]]
    data.with_name("a.json").write_text(json.dumps({"alignments": words}))
    match = f"a.json: alignment 1: 'was' at {start}-{end} s is outside the audio, which lasts 1.600 s"
    refused(tmp_path, match, f"data.train={data}")


def test_a_run_directory_that_exists_is_left_alone(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    with own_logging(), pytest.raises(ValueError, match="run exists; choose a new one, or remove it"):
        main(compose_config(*TINY, f"run_dir={run_dir}"))
    assert [(path.name, path.read_text()) for path in run_dir.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize("override", ["optim.learning_rate=1", "steps=3", "ttt.heads=3", "wandb.key=x"])
def test_a_key_that_no_config_has(override):
    key = override.split("=")[0].split(".")[-1]
    with pytest.raises(HydraException, match=key):
        compose_config(*TINY, "run_dir=x", override)


@pytest.mark.parametrize("override", ["+steps=3", "+optim.learning_rate=1", "+wandb.key=x"])
def test_a_plus_does_not_let_an_unknown_key_in(tmp_path, override):
    refused(tmp_path, override.split("=")[0].removeprefix("+").split(".")[-1], override)


@pytest.mark.parametrize(
    "override", ["max_steps=many", "batch_size=1.5", "ttt.enable=perhaps", "lora.rank=null"]
)
def test_a_value_of_another_type(override):
    with pytest.raises(HydraException, match=override.split("=")[0].split(".")[-1]):
        compose_config(*TINY, "run_dir=x", override)


def test_what_must_be_given(tmp_path):
    refused(tmp_path, "the config lacks data.train; give them as data.train=VALUE", "data.train=???")
    with pytest.raises(ValueError, match="the config lacks run_dir; give them as run_dir=VALUE"):
        main(compose_config(*TINY))


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["mode=all"], "mode must be one of frozen, lora, ttt, lora.ttt, full; got 'all'"),
        (["mode=lora", "lora=none"], "mode=lora trains lora; set lora.enable=true or another mode"),
        (["mode=lora+ttt", "lora=none"], "trains lora; set lora.enable=true or another mode"),
        (["mode=ttt", "ttt=none"], "mode=ttt trains ttt; set ttt.enable=true or another mode"),
        (["mode=lora+ttt", "ttt=none"], "trains ttt; set ttt.enable=true or another mode"),
        (["mode=full"], "mode=full trains the weights under LoRA; set lora.enable=false or another mode"),
        (
            ["ttt.persistent_states=true", "duration_sec=80"],
            "duration_sec=80 is 1000 frames.*mini-batches of 16 frames: use duration_sec=79.36 or 80.64",
        ),
        (["ttt.persistent_states=true", "duration_sec=1"], "12.5 frames.*: use duration_sec=1.28$"),
        (
            ["ttt.persistent_states=true", "max_carried_gib=0.001"],
            "would carry .* GiB for 6 rows, but 0.001 GiB are available: attention keys .*25, 50 frames",
        ),
        (["ttt.layers=none"], "ttt.layers='none' names none of the 4 layers; name layers such as"),
        (["ttt.layers='3,4'"], "names layer 4, but the model has 4 layers: 0 to 3"),
        (["ttt.mini_batch_size=0"], "ttt.mini_batch_size must be at least 1; got 0"),
        (["lora.rank=0"], "lora.rank must be at least 1, got 0"),
        (["param_dtype=float16"], "param_dtype must be one of float32, bfloat16; got 'float16'"),
        (["device=tpu"], "device must be auto, cpu or cuda; got 'tpu'"),
        (["max_steps=0"], "max_steps must be above 0, got 0"),
        (["duration_sec=-1"], "duration_sec must be above 0, got -1"),
        (["batch_size=0"], "batch_size must be above 0, got 0"),
        (["eval.every_steps=-1"], r"eval.every_steps must be 0 \(never\) or more, got -1"),
        (["eval.max_clips=-1"], "eval.max_clips"),
        (["checkpoint.keep=0"], "checkpoint.keep must be at least 1, or null for all; got 0"),
        (["optim.pct_start=1.5"], "pct_start"),
        (["optim.lr=-1"], "lr"),
        (["wandb.mode=online"], "wandb.mode=online needs wandb.project=NAME"),
        (["wandb.mode=on", "wandb.project=x"], "wandb.mode must be online, offline or disabled; got 'on'"),
        (["model.source=nowhere"], "model.source='nowhere' is no folder here and no hub repository id"),
        (["init_from=nowhere"], "init_from=nowhere is no folder"),
    ],
)
def test_settings_that_cannot_work(tmp_path, overrides, match):
    refused(tmp_path, match, *overrides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(tmp_path):
    refused(tmp_path, "device=cuda, but torch sees no CUDA device; use device=cpu", "device=cuda")


def test_a_prompt_that_is_missing(tmp_path):
    refused(tmp_path, "input .*nowhere.wav does not exist", f"eval.prompt={tmp_path / 'nowhere.wav'}")


def test_a_prompt_that_is_stereo(tmp_path):
    prompt = SAMPLE / "audio/dialogue_4.flac"
    refused(tmp_path, f"{prompt} has 2 channels", f"eval.prompt={prompt}")


def bad_files(folder: Path, total: int, *bad: int) -> Path:
    """A data set of recordings of 0.64 s of which some are no audio; the list's lines begin with 1."""
    lines = []
    for number in range(1, total + 1):
        data = write_recording(folder, AUDIO[:15360])
        for ending in (".wav", ".json"):
            data.with_name(f"a{ending}").rename(folder / f"{number}{ending}")
        lines.append(data.read_text().replace("a.wav", f"{number}.wav"))
        if number in bad:
            (folder / f"{number}.wav").write_bytes(b"no audio")
    data.write_text("".join(lines))
    return data


SKIP = ("data.valid=null", "data.on_error=skip", "duration_sec=0.64", "max_steps=2")


def test_bad_recordings_are_skipped_counted_and_logged(tmp_path):
    data = bad_files(tmp_path / "data", 5, 2, 4)
    run_dir = run(tmp_path / "run", f"data.train={data}", "data.max_error_fraction=0.4", *SKIP)
    log = (run_dir / "train.log").read_text()
    for line in (2, 4):
        assert f"skipped {data}:{line}: {data.parent}/{line}.wav is no audio file that can be read" in log
    assert "2 of 5 recordings cannot be used (40.00%); going on without them" in log
    assert "3 training clips" in log
    assert log.count("skipped") == 2


def test_more_bad_recordings_than_allowed_stop_the_run(tmp_path):
    data = bad_files(tmp_path / "data", 5, 2, 4)
    match = (
        r"2 of 5 recordings cannot be used \(40.00%\), more than data.max_error_fraction=0.39 allows; "
        rf"repair them .* The first: {data}:2: .*; {data}:4: "
    )
    refused(tmp_path, match, f"data.train={data}", "data.max_error_fraction=0.39", *SKIP)
    refused(tmp_path, f"{data}:2: ", f"data.train={data}", *SKIP, "data.on_error=raise")
    everything = bad_files(tmp_path / "none", 1, 1)
    refused(tmp_path, "1 of 1 recordings", f"data.train={everything}", *SKIP)


def test_without_checks_a_broken_file_shows_when_it_is_used(tmp_path):
    data = bad_files(tmp_path / "data", 4, 2)
    (data.parent / "3.json").write_text("{")
    late = (f"data.train={data}", *SKIP, "data.check_files=false", "max_steps=4")
    run_dir = run(tmp_path / "run", *late, "data.max_error_fraction=0.5")
    log = (run_dir / "train.log").read_text()
    assert f"skipped {data.parent}/2.wav is no audio file" in log
    assert f"skipped {data.parent}/3.json: not JSON" in log
    assert "2 of 4 recordings cannot be used (50.00%)" in log
    with pytest.raises(ValueError, match=r"more than data.max_error_fraction=0.3 allows"):
        run(tmp_path / "other", *late, "data.max_error_fraction=0.3")


def encoder_of(tmp_path, *overrides):
    config = tiny_config(tmp_path / "run", "duration_sec=0.64", *overrides)
    bad_input = BadInput("skip", 0.5)
    return build_parts(config, [], CPU, bad_input).encoder, bad_input


def test_a_file_that_vanishes_leaves_its_place_without_targets_and_the_rest_as_it_was(tmp_path):
    data = bad_files(tmp_path / "data", 4)
    clips = cut_clips(read_manifest(data), 0.64)
    encoder, bad_input = encoder_of(tmp_path)
    bad_input.expect(4)
    draws = [lambda r=rank: training_batches(encoder, clips, Sampling(2, 0, True, r, 2)) for rank in (0, 1)]
    before = [[next(batches) for _ in range(2)] for batches in (draw() for draw in draws)]
    (data.parent / "3.wav").unlink()
    encoder, _ = encoder_of(tmp_path)
    encoder.bad_input = bad_input
    after = [[next(batches) for _ in range(2)] for batches in (draw() for draw in draws)]
    lost = 0
    for old, new in zip(sum(before, []), sum(after, []), strict=True):
        assert new.clips == old.clips
        for clip, was, codes in zip(old.clips, old.codes, new.codes, strict=True):
            gone = clip.recording.path.name == "3.wav"
            lost += gone
            assert torch.equal(codes, torch.full_like(was, -1) if gone else was)
    assert lost == 2
    assert list(bad_input.reasons) == [str(data.parent / "3.wav")]
    (chunk,) = [clip for clip in clips if clip.recording.path.name == "3.wav"]
    assert (ChunkEncoder(encoder).encode([chunk]).codes == -1).all()
    encoder.bad_input = BadInput()
    with pytest.raises(ValueError, match="3.wav is no audio file that can be read .*No such file"):
        ClipEncoder.encode(fresh(encoder), [chunk])


def fresh(encoder: ClipEncoder) -> ClipEncoder:
    """The same encoder without what it remembers."""
    return ClipEncoder(encoder.mimi, encoder.tokenizer, encoder.special, encoder.duration_sec, encoder.layout)


def test_nothing_is_learnt_from_a_place_without_targets(tmp_path, random_codes):
    codes = random_codes(1, 16)
    both = torch.cat((codes, torch.full_like(codes, -1)))
    logged, gradients = one_step(tmp_path / "alone", [codes])
    with_lost, same = one_step(tmp_path / "both", [both])
    assert with_lost["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_file_that_may_not_be_read(tmp_path):
    # Root may read everything, so another user tries.
    folder = Path(tempfile.mkdtemp())
    try:
        data = write_recording(folder / "data", AUDIO)
        folder.chmod(0o755)
        data.with_name("a.wav").chmod(0)
        printed = run_python("tests/read_recordings.py", "nobody", str(data))
        assert f"ValueError: {data}:1: {data.parent}/a.wav is no audio file that can be read" in printed
        assert "Permission denied" in printed
        data.parent.chmod(0)
        printed = run_python("tests/read_recordings.py", "nobody", str(data))
        assert f"ValueError: data list {data} cannot be read after line 0" in printed
    finally:
        data.parent.chmod(0o755)
        shutil.rmtree(folder)


def test_a_million_lines_and_one_that_is_bad(tmp_path):
    data = write_recording(tmp_path / "data", AUDIO[:2400])
    good = data.read_bytes()
    data.write_bytes(good * 59_999 + b'{"path": "a.wav"\n' + good * 10_000)
    started = time.process_time()
    with pytest.raises(ValueError, match=f"{data}:60000: not JSON"):
        read_sources(str(data), SourceSettings(check_files=False), BadInput())
    assert time.process_time() - started < 6  # a million lines take 16 s of one core


def test_a_packed_list_that_is_cut_short_and_a_line_without_end(data, tmp_path):
    packed = data.with_name("list.jsonl.gz")
    packed.write_bytes(gzip.compress(data.read_bytes() * 50)[:-12])
    refused(tmp_path, f"data list {packed} cannot be read after line", f"data.train={packed}")
    packed.write_bytes(gzip.compress(b"x" * 3_000_000))
    refused(tmp_path, f"{packed}:1: a line of more than 1048576 bytes", f"data.train={packed}")


@pytest.mark.parametrize(
    "path", ["a\0b.wav", "\ud800.wav", "x" * 5000, "loop/a.wav", ".", "..", "", "a.wav/b"]
)
def test_a_path_that_cannot_be_followed(data, tmp_path, path):
    data.with_name("loop").symlink_to("loop")
    replace_line(data, path=path)
    refused(tmp_path, f"^{data}:3: ", f"data.train={data}")


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["data.on_error=ignore"], "data.on_error must be raise or skip; got 'ignore'"),
        (["data.max_error_fraction=1"], "data.max_error_fraction must be at least 0 and below 1, got 1"),
        (["data.user_channel=music"], "data.user_channel must be silence or noise; got 'music'"),
        (["data.user_noise_dbfs=3"], "data.user_noise_dbfs is in dB of full scale: at most 0; got 3"),
        (["data.use_bos_eos=true"], "data.keep_main_only leaves one of them; set one of both to false"),
        (["data.audio_delay_sec=nan"], "data.audio_delay_sec must be a number of seconds, got nan"),
        (["data.in_word_padding=-1"], "data.in_word_padding must be a token, or null for padding; got -1"),
    ],
)
def test_data_settings_that_cannot_work(tmp_path, overrides, match):
    refused(tmp_path, match, *overrides)
