"""The check of a data set: a good one has no problem, and each planted problem is found where it is."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import (
    MAIN,
    SAMPLE,
    USER,
    copy_sample,
    samples_of,
    set_samples,
    set_words,
    words_of,
    write_list,
)
from training import compose_config

from configs.typed import typed_config
from finetune.data.check import CheckConfig, check
from finetune.data.findings import Problem
from finetune.data.summary import Summary
from finetune.data.voice import VoiceConfig, frame_power, voiced


def checked(data: Path, *overrides: str) -> Summary:
    output = data.parent / "page.html"
    config = compose_config(f"data.train='{data}'", f"output={output}", "workers=1", *overrides, name="check")
    return check(typed_config(config, CheckConfig))


@pytest.fixture
def one(tmp_path: Path) -> tuple[Path, Path]:
    """A list of the first dialogue alone, and its audio: the user at 0.6-7.2 s, then Moshi to 13 s."""
    data = copy_sample(tmp_path / "data", (1,))
    return data, data.parent / "dialogue_1.flac"


def found(summary: Summary) -> list[tuple[str, str, float]]:
    return [(p.kind, Path(p.file).name, p.second) for p in summary.problems]


def the_only(summary: Summary, kind: str) -> Problem:
    assert [problem.kind for problem in summary.problems] == [kind]
    return summary.problems[0]


def rows(summary: Summary) -> dict[str, str]:
    return dict(summary.rows)


def test_a_good_data_set_has_no_problem_and_its_numbers_are_those_of_the_files(tmp_path):
    data = copy_sample(tmp_path / "data")
    summary = checked(data)
    assert summary.problems == []
    table = rows(summary)
    assert table["recordings"] == "4, 4 readable"
    assert summary.hours * 3600 == pytest.approx(13.8 + 12.75 + 14.55 + 7.68, abs=0.01)
    words = [word for number in range(1, 5) for word in words_of(data.parent / f"dialogue_{number}.flac")]
    for speaker in (MAIN, USER):
        mine = [word for word in words if word[2] == speaker]
        assert table[f"{speaker}: words"].startswith(f"{len(mine)}, ")
        # The sample's silence is exact zeros, so voice by energy is where the words are.
        spoken = sum(end - start for _, (start, end), _ in mine)
        voice = sum(c.voice_sec for r in summary.recordings for c in r.channels if c.speaker == speaker)
        assert voice == pytest.approx(spoken, rel=0.15)
    assert table["silence, overlap"].endswith("0.0% of the time")
    shares = [recording.silence_share for recording in summary.recordings]
    assert all(0.08 < share < 0.3 for share in shares), shares  # 1.4 s around and between the turns


def test_levels_are_those_of_a_known_tone(tmp_path):
    tone = 0.1 * np.sin(np.arange(96000) * 2 * np.pi * 440 / 24000)
    gate = np.arange(96000) % 24000 < 12000  # half a second in each
    path = tmp_path / "tone.wav"
    set_samples(path, np.stack((tone * gate, 0.5 * tone * ~gate), axis=1), subtype="FLOAT")
    (left, right) = checked(write_list(tmp_path, [path])).recordings[0].channels
    assert left.voice_dbfs == pytest.approx(-23.01, abs=0.1)  # a sine of amplitude 0.1
    assert left.peak_dbfs == pytest.approx(-20, abs=0.01)
    assert right.voice_dbfs == pytest.approx(-29.03, abs=0.1)
    assert left.voice_sec == pytest.approx(2, abs=0.05)


def test_overlap_is_where_both_speak(tmp_path):
    data = copy_sample(tmp_path / "data", (4,))
    path = data.parent / "dialogue_4.flac"
    samples = samples_of(path)
    set_samples(path, np.stack((samples[:, 0], np.roll(samples[:, 1], 48000)), axis=1))
    words = [[w, [s + 2 * (who == USER), e + 2 * (who == USER)], who] for w, (s, e), who in words_of(path)]
    set_words(path, sorted(words, key=lambda word: word[1][0]))
    recording = checked(data).recordings[0]
    # The user's 0.6-3.1 s have moved to 2.6-5.1 s, and Moshi speaks from 4.0 s.
    assert recording.overlap_share * 7.68 == pytest.approx(1.1, abs=0.3)
    assert recording.problems == []


def test_swapped_channels(one):
    data, path = one
    set_samples(path, samples_of(path)[:, ::-1])
    problem = the_only(checked(data), "swap")
    assert problem.file == str(path)
    assert problem.second == pytest.approx(words_of(path)[0][1][0])


def test_leaking_channels_are_not_swapped_and_not_the_same(one):
    data, path = one
    samples = samples_of(path)
    set_samples(path, samples + 0.05 * samples[:, ::-1])
    assert found(checked(data)) == []


def test_a_mono_recording_saved_as_stereo(one):
    data, path = one
    mono = samples_of(path).sum(axis=1, keepdims=True)
    set_samples(path, np.concatenate((mono, mono), axis=1))
    assert "same_channels" in [p.kind for p in checked(data).problems]


def test_words_out_of_order(one):
    data, path = one
    words = words_of(path)
    words[3], words[5] = words[5], words[3]
    set_words(path, words)
    summary = checked(data)
    assert {p.kind for p in summary.problems} == {"order"}
    assert [p.second for p in summary.problems] == [words[5][1][0], words[4][1][0]]


@pytest.mark.parametrize(
    "times, second", [([13.7, 14.5], 13.7), ([-1.0, 0.5], 0.0), ([13.0, 13.0], 13.0), ([13.0, 12.9], 13.0)]
)
def test_words_outside_the_audio_or_without_a_length(one, times, second):
    data, path = one
    words = [["lost", times, MAIN], *words_of(path)]
    set_words(path, sorted(words, key=lambda word: word[1][0]))
    problem = the_only(checked(data), "outside")
    assert (problem.file, problem.second) == (str(path), second)
    assert "'lost'" in problem.message


def test_the_transcript_of_something_else(tmp_path):
    data = copy_sample(tmp_path / "data")
    set_words(data.parent / "dialogue_1.flac", words_of(data.parent / "dialogue_4.flac") * 2)
    kinds = {kind for kind, name, _ in found(checked(data)) if name == "dialogue_1.flac"}
    assert "mismatch" in kinds


def test_words_that_lie_late(one):
    data, path = one
    words = [[w, [s + 6, e + 6], who] for w, (s, e), who in words_of(path) if who == USER]
    kept = [word for word in words_of(path) if word[2] == MAIN]
    set_words(path, sorted([*words, *kept], key=lambda word: word[1][0]))
    assert "mismatch" in {p.kind for p in checked(data).problems if p.speaker == USER}


def test_words_where_there_is_silence(one):
    data, path = one
    words = [["thank", [13.4, 13.5], MAIN], ["you", [13.5, 13.7], MAIN]]  # behind the last voice, at 13.1 s
    set_words(path, words_of(path) + words)
    problem = the_only(checked(data), "silent_words")
    assert problem.second == 13.4
    assert "thank you" in problem.message
    set_words(path, words_of(path)[:-1])  # one word in silence is a matter of timing
    assert checked(data).problems == []


def test_long_voice_without_words(one):
    data, path = one
    words = [word for word in words_of(path) if not (word[2] == USER and 1.5 < word[1][0] < 6.8)]
    set_words(path, words)
    problem = the_only(checked(data), "unworded_voice")
    assert problem.second == pytest.approx(2.18, abs=0.1)  # 0.2 s behind the end of "dashwood"
    assert problem.speaker == USER


def test_a_data_set_without_the_users_words_is_fine(tmp_path):
    """moshi-finetune's own annotation transcribes the left channel alone."""
    data = copy_sample(tmp_path / "data")
    for path in data.parent.glob("*.flac"):
        set_words(path, [word for word in words_of(path) if word[2] == MAIN])
    assert checked(data).problems == []
    set_words(data.parent / "dialogue_1.flac", words_of(SAMPLE / "audio" / "dialogue_1.flac"))
    assert {p.kind for p in checked(data).problems} == {"unworded_voice"}


def test_clipping(one):
    data, path = one
    samples = samples_of(path)
    samples[24000:48000, 1] = np.clip(20 * samples[24000:48000, 1], -1, 1)
    set_samples(path, samples)
    problem = the_only(checked(data), "clipping")
    assert problem.speaker == USER
    assert problem.second == pytest.approx(1, abs=0.1)


def test_a_single_peak_at_full_scale_is_no_clipping(one):
    data, path = one
    samples = samples_of(path)
    samples[24000::2400, 1] = 1
    set_samples(path, samples)
    assert checked(data).problems == []


def test_a_faint_voice(one):
    data, path = one
    set_samples(path, samples_of(path) * np.array([1, 0.05]))
    assert the_only(checked(data, "voice.silence_dbfs=-80"), "quiet").speaker == USER


def test_a_channel_without_voice(one):
    data, path = one
    set_samples(path, samples_of(path) * np.array([1, 0]))
    set_words(path, [word for word in words_of(path) if word[2] == MAIN])
    assert the_only(checked(data), "silent_channel").speaker == USER


def test_steady_noise_is_no_voice_and_a_voice_in_it_is():
    noise = 0.01 * np.random.default_rng(0).standard_normal(24000 * 20).astype(np.float32)
    power = frame_power(noise[None], 480)[:, 0]
    assert voiced(power, VoiceConfig()).sum() == 0
    voice = samples_of(SAMPLE / "audio" / "dialogue_1.flac")[:, 1]
    noise[: len(voice)] += voice
    share = voiced(frame_power(noise[None], 480)[:, 0], VoiceConfig())[: len(voice) // 480]
    assert share[35:350].mean() > 0.8  # 0.7 to 7 s
    assert share[375:].sum() == 0


def test_very_slow_words(one):
    data, path = one
    set_words(path, words_of(path)[::4])
    kinds = {p.kind for p in checked(data, "limits.slowest=2", "limits.rate_voice_sec=3").problems}
    assert kinds == {"rate"}


def test_words_of_somebody_who_has_no_channel(one):
    data, path = one
    words = words_of(path)
    words[4][2] = "SPEAKER_03"
    set_words(path, words)
    assert the_only(checked(data), "speaker").second == words[4][1][0]


@pytest.mark.parametrize(
    "spoil, second",
    [
        (lambda path: path.write_bytes(b"no audio"), 0),
        (lambda path: path.unlink(), 0),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), 7),
        (lambda path: set_samples(path, np.zeros((24000, 6), np.float32)), 0),
    ],
    ids=["no audio", "vanished", "truncated", "six channels"],
)
def test_what_cannot_be_read(tmp_path, spoil: Callable[[Path], object], second):
    data = copy_sample(tmp_path / "data")
    spoil(data.parent / "dialogue_2.flac")
    summary = checked(data)
    problem = next(p for p in summary.problems if p.kind == "unreadable")
    assert problem.file.endswith("dialogue_2.flac")
    assert problem.second == pytest.approx(second, abs=2)
    assert {Path(p.file).name for p in summary.problems} == {"dialogue_2.flac"}


def test_nan(one):
    data, path = one
    samples = samples_of(path)
    samples[36000, 1] = np.nan
    wav = path.with_suffix(".wav")
    set_samples(wav, samples, subtype="FLOAT")
    good = copy_sample(data.parent / "good", (4,)).parent / "dialogue_4.flac"
    lines = [{"path": str(wav)}, {"path": str(good)}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert the_only(checked(data), "not_finite").second == 1.5


def test_what_is_wrong_in_a_list(tmp_path):
    data = copy_sample(tmp_path / "data")
    lines = data.read_text().splitlines()
    wrong = json.dumps({"path": "dialogue_2.flac", "duration": 11.0})
    data.write_text("\n".join([lines[0], wrong, lines[0], "{", '{"path": "../x.wav"}', lines[2]]))
    summary = checked(data)
    assert sorted(found(summary)) == [
        ("duration", "dialogue_2.flac", 11),
        ("list", "list.jsonl:4", 0),
        ("list", "list.jsonl:5", 0),
        ("repeated", "dialogue_1.flac", 0),
    ]


def test_what_training_reads_is_checked(tmp_path):
    """Mixes by weight, folders of lists, compressed lists, and mono recordings as in Libri-Light."""
    first, second = copy_sample(tmp_path / "a", (1,)), copy_sample(tmp_path / "b", (2,))
    mixed = checked(Path(f"{first}:0.7,{second.parent}:0.3"), f"output={tmp_path / 'page.html'}")
    assert [Path(r.file).name for r in mixed.recordings] == ["dialogue_1.flac", "dialogue_2.flac"]
    packed = second.with_name("packed.jsonl.gz")
    packed.write_bytes(gzip.compress(second.read_bytes()))
    assert len(checked(packed).recordings) == 1
    chapter = tmp_path / "libri" / "12" / "book" / "chapter.flac"
    chapter.parent.mkdir(parents=True)
    set_samples(chapter, samples_of(SAMPLE / "audio" / "dialogue_1.flac")[:, 0])
    chapter.with_suffix(".json").write_text('{"speaker": "12", "snr": 7.5}')
    mono = checked(Path(f"mono:{tmp_path / 'libri'}"), f"output={tmp_path / 'page.html'}")
    assert mono.problems == []
    assert rows(mono)["stereo and mono"] == "0 and 1"
    with pytest.raises(ValueError, match=f"data {tmp_path / 'c.jsonl'} does not exist"):
        checked(Path(f"{first}:0.7,{tmp_path / 'c.jsonl'}:0.3"), f"output={tmp_path / 'page.html'}")


def test_a_recording_that_is_in_train_and_valid(tmp_path):
    data = copy_sample(tmp_path / "data")
    valid = data.with_name("valid.jsonl")
    valid.write_text(data.read_text().splitlines()[3] + "\n")
    problem = the_only(checked(data, f"data.valid={valid}"), "repeated")
    assert str(valid) in problem.message
    assert problem.file.endswith("dialogue_4.flac")


@pytest.mark.parametrize(
    "content", [None, "{", '{"alignments": 3}', '{"alignments": [["a", [0, "x"], "S"]]}']
)
def test_a_transcript_that_is_missing_or_none(one, content):
    data, path = one
    path.with_suffix(".json").unlink()
    if content is not None:
        path.with_suffix(".json").write_text(content)
    assert "transcript" in {p.kind for p in checked(data).problems}


def test_severities_decide_what_counts(one):
    data, path = one
    words = words_of(path)
    words[3], words[5] = words[5], words[3]
    set_words(path, words)
    assert checked(data, "severity.order=warning").counts == {("warning", "order"): 2}
    assert checked(data, "severity.order=off").problems == []
    with pytest.raises(ValueError, match="severity.order must be one of error, warning, off; got 'fatal'"):
        checked(data, "severity.order=fatal")


def test_the_page_holds_everything_and_needs_nothing(one):
    data, path = one
    set_words(path, [["<b>late</b>", [20.0, 21.0], MAIN], *words_of(path)])
    checked(data)
    page = (data.parent / "page.html").read_text()
    assert "&lt;b&gt;late&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "dialogue_1.flac" in page
    assert page.count("<svg") == 4
    assert "prefers-color-scheme: dark" in page
    for reference in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert reference not in page
    lines = [json.loads(line) for line in (data.parent / "page.jsonl").read_text().splitlines()]
    assert {"error"} == {line["severity"] for line in lines if line["kind"] == "outside"}
    assert lines[0]["file"] == str(path)


def run(*arguments: str) -> tuple[int, str]:
    """The command as continuous integration runs it: exit code and what it says."""
    command = [sys.executable, "-m", "finetune.data.check", "workers=2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SAMPLE.parent, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_exit_codes(tmp_path):
    data = copy_sample(tmp_path / "data")
    output = f"output={tmp_path / 'page.html'}"
    code, said = run(f"data.train={data}", output)
    assert code == 0, said
    assert "hours" in said
    path = data.parent / "dialogue_2.flac"
    set_samples(path, samples_of(path)[:, ::-1])
    code, said = run(f"data.train={data}", output)
    assert code == 1, said
    assert f"error swap {path} 0.67 s: 33 of 33 words lie in the other speaker's channel" in said
    code, said = run(f"data.train={tmp_path / 'nowhere.jsonl'}", output)
    assert code == 2, said
    assert "does not exist; expected a jsonl file or a folder" in said
