"""Recordings that break while they are prepared: refused, or left out, counted and named everywhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from prepared_data import CHUNK_SEC, LENGTHS, contents, run_prepare, write_recordings
from training import losses, own_logging, run, tiny_config

from finetune.data.audio import check_audio
from finetune.data.bad_input import BadInput
from finetune.data.prepared import PreparedSet
from finetune.train import read_clips

LOST = 2
SKIP = ("data.on_error=skip", "data.max_error_fraction=0.3")
CROPS = ("data.encode=per_clip", f"duration_sec={CHUNK_SEC}")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """A list of which one recording has a damaged middle, which no look at its header and its end shows."""
    data = write_recordings(tmp_path_factory.mktemp("recordings"), (*LENGTHS[:LOST], 60, *LENGTHS[LOST:]))
    path = data.parent / f"{LOST}.flac"
    samples = np.random.default_rng(0).normal(0, 0.1, (60 * 1920, 2))
    soundfile.write(path, samples, 24000)
    path.with_suffix(".wav").unlink()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    assert check_audio(path, 2) == 4.8
    data.write_text(data.read_text().replace(f"{LOST}.wav", path.name))
    return data


@pytest.fixture(scope="module")
def whole(recordings, tmp_path_factory, tiny_base) -> Path:
    return run_prepare(tmp_path_factory.mktemp("prepared") / "whole", f"data.train={recordings}", *SKIP)


@pytest.mark.parametrize("workers", [1, 2])
def test_by_default_it_is_an_error_and_no_shard_lacks_it(recordings, tmp_path, workers):
    with pytest.raises(ValueError, match=rf"{LOST}.flac cannot be read .*lost sync"):
        run_prepare(tmp_path / "out", f"data.train={recordings}", f"workers={workers}")
    assert not (tmp_path / "out/shard_000001.safetensors").exists()


def test_what_is_skipped_is_named_in_manifest_and_sources(recordings, whole):
    (lost,) = json.loads((whole / "prepared.json").read_text())["lost"]
    assert (lost["number"], lost["path"]) == (LOST, f"{LOST}.flac")
    assert f"{LOST}.flac" in lost["lost"]
    lines = [json.loads(line) for line in (whole / "sources.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines if "lost" in line] == [LOST]
    prepared = PreparedSet(whole)
    assert len(prepared) == len(lines) == len(LENGTHS) + 1
    for index in range(len(prepared)):
        if index != LOST:
            assert prepared.recording(index).codes(0, 1).shape == (16, 1)
    with pytest.raises(ValueError, match=rf"{LOST}.flac could not be read when .* was prepared: "):
        prepared.recording(LOST).codes(0, 1)


def test_who_prepares_with_several_processes_skips_the_same(recordings, whole, tmp_path):
    two = run_prepare(tmp_path / "two", f"data.train={recordings}", "workers=2", *SKIP)
    assert contents(two) == contents(whole)


def test_no_more_is_skipped_than_may_be(recordings, tmp_path, capfd):
    few = ("data.on_error=skip", "data.max_error_fraction=0.1")
    here = f"data.train={recordings}"
    with pytest.raises(ValueError, match=r"1 of 6 recordings cannot be used \(16.67%\), more than data.max"):
        run_prepare(tmp_path / "out", here, *few)
    assert not (tmp_path / "out/shard_000001.safetensors").exists()
    run_prepare(tmp_path / "out", here, *SKIP)
    assert f"{LOST}.flac" in capfd.readouterr().err
    # Shards that are there are counted again when they are joined.
    (tmp_path / "out/prepared.json").unlink()
    with pytest.raises(ValueError, match="1 of 6 recordings cannot be used"):
        run_prepare(tmp_path / "out", "mode=join", *few)
    with pytest.raises(ValueError, match=rf"{LOST}.flac was left out of .*shard_000001.*data.on_error=skip"):
        run_prepare(tmp_path / "out", "mode=join")
    assert not (tmp_path / "out/prepared.json").exists()


def test_a_run_refuses_what_lacks_something_or_names_it(whole, tmp_path, caplog):
    settings = (f"data.train={whole}", "data.valid=null", "data.encode=whole", f"duration_sec={CHUNK_SEC}")
    with pytest.raises(ValueError, match=rf"{LOST}.flac could not be read .* data.on_error=skip"):
        read_clips(tiny_config(tmp_path / "run", *settings), BadInput())
    bad_input = BadInput("skip", 0.3)
    read_clips(tiny_config(tmp_path / "run", *settings, *SKIP), bad_input)
    assert bad_input.summary() == "1 of 6 recordings cannot be used (16.67%)"
    assert f"skipped {whole / f'{LOST}.flac'} could not be read" in caplog.text
    with pytest.raises(ValueError, match="1 of 6 recordings cannot be used"):
        read_clips(tiny_config(tmp_path / "run", *settings), BadInput("skip", 0.1))


@pytest.mark.parametrize(
    "settings", [("ttt.persistent_states=true", "ttt.mini_batch_size=4"), CROPS], ids=" ".join
)
def test_training_from_such_shards_is_training_from_the_audio(tmp_path, settings):
    data = write_recordings(tmp_path / "data", (20, 40, 13))
    samples = np.random.default_rng(0).normal(0, 0.1, (40 * 1920, 2))
    samples[20 * 1920] = np.nan
    soundfile.write(data.parent / "1.wav", samples, 24000, subtype="FLOAT")
    believed = ("data.check_files=false", *SKIP[:1], "data.max_error_fraction=0.4")
    encode = CROPS if settings is CROPS else ()
    folder = run_prepare(tmp_path / "prepared", f"data.train={data}", *encode, *believed)
    shard, row = PreparedSet(folder).recording(1)._place
    kept = [shard.piece(row, number).shape[1] > 0 for number in range(shard.num_pieces(row))]
    # Of clips that are encoded by themselves, only the one that holds it is lost.
    assert kept == ([True, True, False, True, True] if settings is CROPS else [False])
    runs = []
    for name, source in (("audio", data), ("shards", folder)):
        lists = (f"data.train={source}", "data.valid=null", f"duration_sec={CHUNK_SEC}")
        steps = ("batch_size=3", "max_steps=5", "data.shuffle=false")
        with own_logging():
            runs.append(run(tmp_path / name, *lists, *settings, *steps, *believed))
        assert (
            f"skipped {source.parent if name == 'audio' else source}" in (runs[-1] / "train.log").read_text()
        )
    assert losses(runs[0]) == losses(runs[1])


def test_a_transcript_that_breaks_costs_its_recording(tmp_path):
    data = write_recordings(tmp_path / "data")
    (data.parent / "1.json").write_text("{")
    believed = (f"data.train={data}", "data.check_files=false")
    with pytest.raises(ValueError, match=r"1.json: not JSON"):
        run_prepare(tmp_path / "raised", *believed)
    prepared = PreparedSet(run_prepare(tmp_path / "skipped", *believed, *SKIP))
    assert [Path(name).name for name in prepared.lost] == ["1.wav"]
    with pytest.raises(ValueError, match="1.json: not JSON"):
        prepared.recording(1).codes(0, 1)
