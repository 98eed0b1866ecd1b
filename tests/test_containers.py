"""m4a, mka and webm are read like any sound file: in training, by the check and by annotate alike."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sphn
from containers import write_container
from data_sets import MAIN, SAMPLE, USER, samples_of
from test_annotate import annotate, config, plain_words, words_of
from test_check import checked, found
from training import run

from finetune.data.audio import PYAV, check_audio, read_blocks, read_header, read_samples, read_whole
from finetune.data.levels import measure
from finetune.data.recording import Recording

AUDIO = samples_of(SAMPLE / "audio" / "dialogue_4.flac")
# (file, codec, how far a crop may lie from where it was asked for: Matroska's times are in milliseconds)
KINDS = [
    ("a.m4a", "aac", 0),
    ("a.m4a", "alac", 0),
    ("a.mka", "aac", 24),
    ("a.mka", "flac", 24),
    ("a.mka", "pcm_s16le", 24),
]


def data_set(folder: Path, name: str = "a.m4a", with_words: bool = True) -> Path:
    folder.mkdir()
    write_container(folder / name, AUDIO)
    if with_words:
        words = (SAMPLE / "audio" / "dialogue_4.json").read_text()
        (folder / name).with_suffix(".json").write_text(words)
    (folder / "list.jsonl").write_text(json.dumps({"path": name, "duration": len(AUDIO) / 24000}) + "\n")
    return folder / "list.jsonl"


def overwrite(path: Path, share: float, count: int = 2000) -> None:
    """Put noise over bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    at = int(share * len(content))
    content[at : at + count] = np.random.default_rng(0).bytes(count)
    path.write_bytes(content)


@pytest.mark.parametrize("name, codec, off", KINDS)
def test_samples_are_where_they_were(tmp_path, name, codec, off):
    path = tmp_path / name
    write_container(path, AUDIO, codec)
    assert read_header(path).decoder == PYAV
    recording = Recording(path, check_audio(path, 2), ())
    assert recording.duration_sec == pytest.approx(len(AUDIO) / 24000, abs=0.05)
    whole = read_samples(recording, 24000)
    assert whole.shape == AUDIO.T.shape
    error = np.abs(whole - AUDIO.T).max()
    assert error < (0.1 if codec == "aac" else 4e-5)
    blocks = list(read_blocks(path, read_header(path), 10_000))
    assert {block.shape[1] for block in blocks[:-1]} == {10_000}
    assert np.array_equal(np.concatenate(blocks, axis=1), whole)
    for start in (0.0, 0.1, 0.64, 3.3333, 6.9):
        crop, first = read_samples(recording, 24000, start, 0.64), int(start * 24000)
        assert crop.shape == (2, 15360)
        nearest = range(max(0, first - off), first + off + 1)
        assert any(np.array_equal(crop, whole[:, at : at + 15360]) for at in nearest)
    last = read_samples(recording, 24000, 7.04, 0.64)
    assert last.shape[1] == pytest.approx(15360, abs=off)


def test_another_rate_and_one_voice(tmp_path):
    path = tmp_path / "a.m4a"
    write_container(path, sphn.resample(np.ascontiguousarray(AUDIO.T), 24000, 48000).T, rate=48000)
    recording = Recording(path, check_audio(path, 2), ())
    assert read_samples(recording, 24000).shape == AUDIO.T.shape
    assert read_whole(path)[1] == 48000
    write_container(path, AUDIO[:, :1])
    assert check_audio(path, 1) == pytest.approx(7.68)
    with pytest.raises(ValueError, match=r"a.m4a has 1 channel\(s\); expected stereo"):
        check_audio(path, 2)


def test_training_reads_m4a(tmp_path):
    data = data_set(tmp_path / "data")
    run(tmp_path / "run", f"data.train={data}", "data.valid=null", "max_steps=2", "duration_sec=1.28")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "6 training clips" in log
    assert "step 2/2 loss" in log


def test_the_check_reads_m4a(tmp_path):
    data = data_set(tmp_path / "data")
    summary = checked(data)
    assert summary.problems == []
    assert summary.recordings[0].duration_sec == pytest.approx(7.68)
    assert [channel.speaker for channel in summary.recordings[0].channels] == [MAIN, USER]


def test_annotate_reads_m4a(tmp_path):
    data = data_set(tmp_path / "data", with_words=False)
    assert annotate(config(data)) == 0
    words = words_of(data.parent / "a.m4a")
    assert [text for text, _, _ in plain_words(words, MAIN)][:3] == ["he", "might", "even"]
    assert {who for _, _, who in words} == {MAIN, USER}


def test_a_damaged_m4a_is_told_by_all_three(tmp_path):
    data = data_set(tmp_path / "data")
    path = data.parent / "a.m4a"
    overwrite(path, 0.5)
    with pytest.raises(ValueError, match="a.m4a cannot be read"):
        read_samples(Recording(path, 7.68, ()), 24000)
    assert annotate(config(data, "foreign=redo")) == 1
    reason = (data.parent / "list.annotate-0-of-1.ndjson").read_text()
    second = measure(path).duration_sec
    assert 2 < second < 5  # the first half of the bytes is about the first half of the time
    assert f"cannot be decoded from {second:.1f} s on" in reason
    with pytest.raises(ValueError, match="no recording .* can be read"):
        checked(data)
    good = data_set(tmp_path / "good").parent / "a.m4a"
    data.write_text(json.dumps({"path": "a.m4a"}) + "\n" + json.dumps({"path": str(good)}) + "\n")
    (problem,) = found(checked(data, f"data.root={tmp_path}"))
    assert problem == ("unreadable", "a.m4a", round(second, 2))


def test_packets_that_are_missing_are_no_silent_shift(tmp_path):
    """Where the container is damaged, ffmpeg goes on at the next packet that it finds."""
    path = tmp_path / "a.webm"
    write_container(path, sphn.resample(np.ascontiguousarray(AUDIO.T), 24000, 48000).T, "libopus", 48000)
    whole = read_whole(path)[0]
    good = path.read_bytes()
    told = 0
    for at in range(len(good) // 3, len(good) * 2 // 3, len(good) // 60):
        path.write_bytes(good[:at] + b"\0" * 600 + good[at + 600 :])
        try:
            assert read_whole(path)[0].shape == whole.shape
        except ValueError as error:
            told += "packets are missing between" in str(error)
    assert told > 3


def test_a_playlist_is_no_recording(tmp_path):
    """ffmpeg would open what it names, in whatever folder or network."""
    write_container(tmp_path / "a.m4a", AUDIO[:24000])
    path = tmp_path / "list.m4a"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.m4a\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="list.m4a is no audio file that can be read"):
        read_header(path)
    path.write_text("ffconcat version 1.0\nfile a.m4a\n")
    with pytest.raises(ValueError, match="list.m4a is no audio file that can be read"):
        read_header(path)


def test_memory_does_not_grow_with_the_length(tmp_path):
    def peak(seconds: int) -> int:
        path = tmp_path / f"{seconds}.m4a"
        write_container(path, np.zeros((seconds * 24000, 2), np.float32))
        tracemalloc.start()
        blocks = sum(1 for _ in read_blocks(path, read_header(path), 24000))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert blocks >= seconds
        return most

    short, long = peak(10), peak(300)
    assert long < short + 200_000
