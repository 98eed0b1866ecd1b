"""Data sets are found as the config names them, and drawn from by weight in an order of the seed alone."""

import gzip
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import SAMPLE, dialogue, records, run, write_recording

from finetune.data.audio import read_samples, user_samples
from finetune.data.bad_input import BadInput
from finetune.data.mixing import MixedOrder, mixed_order, per_recording
from finetune.data.order import clip_order
from finetune.data.places import parse_places
from finetune.data.recording import UserChannel
from finetune.data.sources import SourceSettings, read_sources

AUDIO = dialogue(4)[96000:134400]  # 1.6 s of speech


def read(spec, **options):
    return read_sources(str(spec), SourceSettings(**options), BadInput())


def test_a_packed_list_is_the_list(tmp_path):
    jsonl = write_recording(tmp_path, AUDIO, words=[["he", [0.1, 0.3], "SPEAKER_MAIN"]])
    (plain,) = read(jsonl)
    packed = jsonl.with_name("list.jsonl.gz")
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    assert read(packed)[0].recordings == plain.recordings
    assert [word.text for word in plain.recordings[0].words or ()] == ["he"]


def test_a_folder_is_all_lists_in_it_each_beside_its_audio(tmp_path):
    for name in ("b", "a/deep"):
        write_recording(tmp_path / name, AUDIO)
    (tmp_path / "b/list.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b/list.jsonl").read_bytes()))
    (tmp_path / "b/list.jsonl").unlink()
    (source,) = read(tmp_path)
    paths = [recording.path.relative_to(tmp_path) for recording in source.recordings]
    assert list(map(str, paths)) == ["a/deep/a.wav", "b/a.wav"]


def test_a_mix_has_weights(tmp_path):
    one, other = (write_recording(tmp_path / name, AUDIO) for name in "ab")
    assert [(s.name, s.weight, len(s.recordings)) for s in read(f"{one}:0.7, {other.parent}:2")] == [
        (str(one), 0.7, 1),
        (str(other.parent), 2.0, 1),
    ]
    assert [place.weight for place in parse_places("a,b:3")] == [1.0, 3.0]


@pytest.mark.parametrize(
    "spec, match",
    [
        ("", "'' names no source; expected PATH"),
        (" , ", "names no source"),
        ("a:0.5:b", "'a:0.5:b' is no source; expected PATH or PATH:WEIGHT"),
        ("a:0", "'a:0': the weight must be a number above 0, got '0'"),
        ("a:-1,b:2", "the weight must be a number above 0, got '-1'"),
        ("a:much", "the weight must be a number above 0, got 'much'"),
        ("a:nan", "the weight must be a number above 0"),
        ("a:inf", "the weight must be a number above 0"),
        ("a:1,a:2", "a is named twice; name it once, with the sum of its weights"),
        ("mono:", "'mono:' is no source"),
    ],
)
def test_a_mix_that_makes_no_sense(spec, match):
    with pytest.raises(ValueError, match=match):
        parse_places(spec)


def test_folders_with_nothing_to_read_or_one_list_twice(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no .jsonl or .jsonl.gz file; .* say mono:"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty holds no audio; expected files such as .wav, .flac"):
        read(f"mono:{tmp_path / 'empty'}")
    jsonl = write_recording(tmp_path / "twice", AUDIO)
    jsonl.with_name("list.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    with pytest.raises(ValueError, match="list.jsonl lies beside the same packed as .gz"):
        read(jsonl.parent)


@pytest.fixture
def libri_light(tmp_path):
    """Two chapters as Libri-Light has them: 16 kHz, one channel, what is known of the chapter beside it."""
    folder = tmp_path / "small"
    for name in ("19/a_book/02", "100/another/01"):
        path = folder / f"{name}.flac"
        path.parent.mkdir(parents=True)
        soundfile.write(path, dialogue(4)[96000:134400:2, 0], 12000)
        about = {"speaker": name.split("/")[0], "snr": 12.5, "voice_activity": [[0.1, 0.9]]}
        path.with_suffix(".json").write_text(json.dumps(about))
    return folder


def test_mono_recordings_are_moshis_voice_without_words(libri_light):
    (source,) = read(f"mono:{libri_light}:2.5")
    assert source.weight == 2.5
    names = [str(r.path.relative_to(libri_light)) for r in source.recordings]
    assert names == ["100/another/01.flac", "19/a_book/02.flac"]
    for recording in source.recordings:
        assert recording.words is None
        voice, user = read_samples(recording, 12000)
        assert np.array_equal(voice, soundfile.read(recording.path, dtype="float32")[0])
        assert voice.any()
        assert not user.any()


def test_a_list_of_mono_recordings_needs_no_transcripts(libri_light):
    jsonl = libri_light / "list.jsonl"
    jsonl.write_text('{"path": "19/a_book/02.flac", "duration": 1.6}\n')
    (source,) = read(f"mono:{jsonl}")
    assert [r.words for r in source.recordings] == [None]
    with pytest.raises(ValueError, match=r"list.jsonl:1: .*02.flac has 1 channel\(s\); expected stereo"):
        read(jsonl)
    with pytest.raises(ValueError, match=r"a.wav has 2 channel\(s\); expected mono, the voice that Moshi"):
        read(f"mono:{write_recording(libri_light / 'stereo', AUDIO).parent}")


def test_noise_for_a_user_is_as_loud_as_said_and_each_files_own(libri_light):
    (source,) = read(f"mono:{libri_light}", user_channel="noise", user_noise_dbfs=-40.0)
    one, other = (read_samples(recording, 12000)[1] for recording in source.recordings)
    assert 20 * np.log10(np.sqrt(np.mean(one**2))) == pytest.approx(-40, abs=0.5)
    assert not np.array_equal(one, other)
    moved = libri_light.rename(libri_light.with_name("elsewhere"))
    (again,) = read(f"mono:{moved}", user_channel="noise", user_noise_dbfs=-40.0)
    assert np.array_equal(read_samples(again.recordings[0], 12000)[1], one)


@pytest.mark.parametrize("first, count", [(0, 5), (23_999, 2), (24_000, 24_000), (30_000, 50_000)])
def test_noise_is_the_same_in_whatever_crop(first, count):
    user = UserChannel(-30.0, seed=5)
    whole = user_samples(user, 24_000, 0, 100_000)
    assert np.array_equal(user_samples(user, 24_000, first, count), whole[first : first + count])


def test_training_on_mono_recordings_and_dialogues(libri_light, tmp_path):
    spec = f'"{SAMPLE / "train.jsonl"}:0.5,mono:{libri_light}:0.5"'
    run_dir = run(tmp_path / "run", f"data.train={spec}", "data.user_channel=noise", "max_steps=2")
    steps = records(run_dir, "train")
    assert all(np.isfinite(step["loss"]) for step in steps)


lengths_and_weights = st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 20)), min_size=1, max_size=4).map(
    lambda pairs: tuple(zip(*pairs, strict=True))
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(lengths_and_weights, st.integers(-5, 10**9), st.integers(0, 200), st.booleans())
def test_a_mixed_order_goes_on_from_anywhere_and_each_source_has_its_epochs(mix, seed, start, shuffle):
    lengths, weights = mix
    whole = list(itertools.islice(mixed_order(lengths, weights, seed, 0, shuffle), 300))
    later = itertools.islice(mixed_order(lengths, weights, seed, start, shuffle), 300 - start)
    assert list(later) == whole[start:]
    for source, length in enumerate(lengths):
        drawn = [index for s, index in whole if s == source]
        for first in range(0, len(drawn) - length + 1, length):
            epoch = drawn[first : first + length]
            assert sorted(epoch) == list(range(length))
            assert shuffle or epoch == sorted(epoch)


def test_a_mixed_order_goes_on_behind_many_positions():
    far = 3 * 65_536 + 17
    order = MixedOrder((5, 7), (1, 2), seed=3)
    whole = list(itertools.islice(order, far + 20))
    assert [i for s, i in itertools.islice(mixed_order((5, 7), (1, 2), 3, far), 20) if s == 0] == [
        i for i in whole[far:] if i < 5
    ]
    assert [MixedOrder((5, 7), (1, 2), seed=3)[p] for p in range(far, far + 20)] == whole[far:]


def test_sources_are_drawn_by_weight():
    counts = Counter(s for s, _ in itertools.islice(mixed_order((3, 50, 8), (0.2, 3, 0.8), 1), 40_000))
    assert [counts[s] / 40_000 for s in range(3)] == pytest.approx([0.05, 0.75, 0.2], abs=0.01)


def test_sources_of_one_length_have_orders_of_their_own_and_seeds_too():
    draws = {seed: list(itertools.islice(mixed_order((9, 9), (1, 1), seed), 200)) for seed in (0, 1)}
    one, other = ([i for s, i in draws[0] if s == source] for source in (0, 1))
    assert one[:27] != other[:27]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_one_source_alone_has_the_order_it_always_had(shuffle):
    mixed = [i for _, i in itertools.islice(mixed_order((7,), (0.3,), 5, 10, shuffle), 30)]
    assert mixed == list(itertools.islice(clip_order(7, 5, shuffle, 10), 30))


def test_the_mixed_order_does_not_touch_the_global_generators():
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    list(itertools.islice(mixed_order((5, 7), (1, 2), 3), 100))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)


def test_weights_of_recordings_give_shares_of_chunks():
    # 2 recordings of 10 chunks and 30 of one, to come equally often as chunks.
    weights = per_recording((1, 1), chunks=(20, 30), recordings=(2, 30))
    drawn = Counter(s for s, _ in itertools.islice(mixed_order((2, 30), weights, 0), 60_000))
    assert drawn[0] * 10 / (drawn[0] * 10 + drawn[1]) == pytest.approx(0.5, abs=0.02)


def test_epochs_go_on_where_sources_are_drawn_anew():
    drawn = [i for s, i in itertools.islice(mixed_order((5, 7), (1, 2), seed=3), 65_536 + 200) if s == 1]
    epochs = [drawn[first : first + 7] for first in range(0, len(drawn) - 6, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
