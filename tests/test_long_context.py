"""Long recordings: arms are what they say, scores are a stream's, controls and means are as by hand."""

import json
import math
import re

import numpy as np
import pytest
import soundfile
import torch
from long_recordings import RATE, chapter, libri_light

from benchmarks.long_context import GOAL
from benchmarks.long_context import measure as measure_rates
from evaluation.long_context.arms import OWN as OWN_CONTEXT
from evaluation.long_context.arms import Arm, comparisons, parse_context, running
from evaluation.long_context.codes import CodeReader
from evaluation.long_context.measures import bucket_edges, bucket_means, mean_beyond, measure, stream_weights
from evaluation.long_context.models import Opened
from evaluation.long_context.pieces import FAR, OTHER, OWN, WHOLE, foreign, make_plan, prefix_lengths
from evaluation.long_context.recordings import LongRecording, drawn, find_recordings, speakers_of
from evaluation.long_context.scoring import score, whole_chunks
from evaluation.long_context.summary import headline
from evaluation.statistics import FEWEST_ROWS, cluster_intervals
from finetune.data.interleaver import TextTokens
from inference.likelihood import nll_by_frame, nll_streamed, reset_frames
from moshi_ttt.integration import receptive_field
from moshi_ttt.loading import load_mimi

CONTEXTS = {"ttt_layer_context": 3, "non_ttt_layer_context": 3}  # a receptive field of 8 frames
ARMS = [Arm(memory) for memory in ("carried", "inner_lr_0", "gate_off")] + [Arm("carried", "2/6")]


@pytest.fixture
def model(build, perturb):
    return perturb(build(**CONTEXTS)).eval()


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_chunks_are_a_stream(model, random_codes, arm):
    codes = random_codes(2, 41)
    codes[:, 0] = -1
    with running(model, arm):
        stream, chunks = nll_streamed(model, codes), nll_by_frame(model, codes, 16)
    torch.testing.assert_close(chunks, stream, rtol=0, atol=1e-5, equal_nan=True)
    assert chunks[:, 1:].isfinite().all()
    plain = nll_by_frame(model, codes, 16)
    assert (arm == ARMS[0]) == torch.equal(plain[:, 1:], chunks[:, 1:])


def test_chunks_are_20_times_as_fast_as_a_stream():
    found = measure_rates(rounds=3, frames=1536, streamed=48)
    assert found["chunked"] / found["streamed"] >= GOAL
    assert found["apart"] <= 1e-5


@pytest.mark.parametrize("gate", ["residual", "convex"])
def test_gate_off_is_the_model_without_ttt(build, perturb, random_codes, gate):
    model = perturb(build(**CONTEXTS, gate=gate)).eval()
    plain = build(**CONTEXTS, enable=False, layers="none").eval()
    names = {name: name.replace(".layers.1.", ".layers.1.original_layer.") for name in plain.state_dict()}
    names = {name: new.replace(".layers.2.", ".layers.2.original_layer.") for name, new in names.items()}
    own = model.state_dict()
    plain.load_state_dict({name: own[new if new in own else name] for name, new in names.items()})
    before = {name: value.clone() for name, value in own.items()}
    codes = random_codes(1, 24)
    with running(model, Arm("gate_off")):
        off = nll_by_frame(model, codes, 12)
    torch.testing.assert_close(off, nll_by_frame(plain, codes, 12), rtol=0, atol=1e-5)
    assert (off - nll_by_frame(model, codes, 12)).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_contexts_are_those_of_a_model_built_with_them(build, perturb, random_codes):
    model = perturb(build(**CONTEXTS)).eval()
    other = build(ttt_layer_context=2, non_ttt_layer_context=6).eval()
    other.load_state_dict(model.state_dict())
    codes = random_codes(1, 24)
    with running(model, Arm("carried", "2/6")):
        assert receptive_field(model) == 2 * 1 + 2 * 5
        found = nll_by_frame(model, codes, 12)
    assert torch.equal(found, nll_by_frame(other, codes, 12))
    assert receptive_field(model) == 4 * 2
    assert (parse_context("own"), parse_context("7"), parse_context("50/100")) == (
        (None, None),
        (7, 7),
        (50, 100),
    )
    for wrong in ("", "0", "1/", "3/0", "a", "1/2/3", "-4"):
        with pytest.raises(ValueError, match="expected own, N frames"):
            parse_context(wrong)


def test_resets_do_not_depend_on_chunks(model, random_codes):
    codes = random_codes(1, 61)
    found = [nll_by_frame(model, codes, chunk, 24) for chunk in (4, 12, 24, 64)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
    carried = nll_by_frame(model, codes, 12)
    assert torch.equal(found[1][..., :23], carried[..., :23])
    assert (found[1][..., 24:] - carried[..., 24:]).abs().max() > 1e-4
    assert reset_frames(model, None) == 8
    assert reset_frames(model, 12) == 12
    told = []
    nll_by_frame(model, codes, 16, 24, told.append)
    assert told == [16, 8, 16, 8, 13]
    for wrong in ({"chunk_frames": 6}, {"chunk_frames": 4, "reset_every": 10}):
        with pytest.raises(ValueError, match="use 4 or 8 frames|use 8 or 12 frames"):
            nll_by_frame(model, codes, **wrong)


def test_chunks_go_into_resets_without_a_rest():
    assert whole_chunks(512, 16, None) == 512
    assert whole_chunks(512, 16, 3024) == 432
    assert whole_chunks(512, 16, 64) == 64
    assert whole_chunks(512, 16, 16 * 37) == 512  # only one mini-batch would fit: too slow
    assert whole_chunks(10, 16, 64) == 16


def test_a_model_that_knows_nothing_sits_at_ln_card(model, random_codes):
    with torch.no_grad():
        for linear in model.linears:
            linear.weight.zero_()
    nll = nll_by_frame(model, random_codes(1, 40), 20)[0, 1:]
    assert nll.numpy() == pytest.approx(math.log(model.card), abs=1e-6)
    found = measure([nll.numpy()], [0, 16, 40], [8])
    for one in found.values():
        assert [*one.buckets[0], *one.all, *one.beyond[8]] == pytest.approx([math.log(256)] * 4, abs=1e-6)


class FixedCodes:
    """Stands where a reader stands, with codes that are given."""

    def __init__(self, codes):
        self.given = codes

    def codes(self, recording):
        return self.given[int(recording.name)]


def recordings_of(speakers, seconds=10.0):
    return [LongRecording(str(i), None, s, seconds, 1) for i, s in enumerate(speakers)]


def test_memory_reaches_as_far_as_it_does(build, perturb, random_codes):
    """Attention windows alone: nothing beyond the receptive field matters. A carried state: it does."""
    model = perturb(build(**CONTEXTS, gate_init=1.0)).eval()
    codes = random_codes(2, 80)
    codes[:, 0] = -1
    people = recordings_of("AB")
    plan = make_plan(people, [80, 80], 8, 1.0, receptive_field(model) + 3, 4, ("prefix", "foreign"), 0)
    assert (plan.starts, plan.near_frames, plan.others) == ((72, 72), 12, (1, 0))
    pieces = plan.pieces(0, True)
    found = {}
    for memory in ("carried", "inner_lr_0", "gate_off"):
        opened = Opened(model, None, {}, {})
        found[memory] = score(opened, Arm(memory), pieces, people, FixedCodes(codes), 12, None)
    assert list(found["carried"]) == [p.name for p in pieces]
    for memory, scores in found.items():
        short, *rest = (scores[f"prefix {n}"] for n in (4, 16, 32, 64))
        assert np.abs(short - rest[0]).max() > 1e-4  # within reach of attention
        beyond = max(np.abs(rest[0] - one).max() for one in rest[1:])
        far = np.abs(scores[FAR] - scores[OWN]).max()
        other = np.abs(scores[OTHER] - scores[OWN]).max()
        assert other > 1e-3
        if memory == "carried":
            assert min(beyond, far) > 1e-4
        else:
            assert max(beyond, far) < 1e-5
        # The piece with the whole past is the end of the whole recording.
        assert np.abs(scores[WHOLE][:, 72:] - scores[OWN]).max() < 1e-5


def test_targets_and_prefixes_by_hand():
    people = recordings_of("AABC")
    plan = make_plan(people, [1000, 500, 700, 30], 50, 0.9, 100, 16, ("prefix", "foreign"), 0)
    assert plan.starts == (848, 400, 576, 0)  # the last is too short for a target
    assert plan.near_frames == 112
    assert plan.pieces(0, False) == plan.pieces(0, True)[:1]
    assert plan.pieces(0, True)[0].spans == ((0, 0, 1000),)
    assert [p.name for p in plan.pieces(3, True)] == [WHOLE]
    by_name = {p.name: p for p in plan.pieces(1, True)}
    assert [name for name in by_name if name.startswith("prefix")] == [
        f"prefix {n}" for n in (16, 32, 64, 128, 256)
    ]
    assert by_name["prefix 64"].spans == ((1, 336, 450),)
    assert plan.others[:3] == (2, 2, 0)  # none has as much as recording 0: the other speaker's longest
    assert by_name[OWN].spans == ((1, 0, 450),)
    assert by_name[OTHER].spans == ((2, 176, 576), (1, 400, 450))
    assert by_name[FAR].spans == ((2, 176, 464), (1, 288, 450))
    assert {p.frames for name, p in by_name.items() if name.startswith("foreign")} == {450}
    assert {p.kept for name, p in by_name.items() if name != WHOLE} == {50}
    assert prefix_lengths(15, 16) == []
    assert prefix_lengths(64, 16) == [16, 32, 64]


def test_a_foreign_prefix_is_another_speakers():
    draw = np.random.default_rng(0)
    for seed in range(20):
        people = recordings_of([f"{draw.integers(4)}" for _ in range(9)] + ["x"])
        starts = [int(n) for n in draw.integers(0, 5, 10) * 16]
        for index, other in enumerate(foreign(people, starts, seed)):
            theirs = [s for p, s in zip(people, starts, strict=True) if p.speaker != people[index].speaker]
            assert other is not None
            assert people[other].speaker != people[index].speaker
            assert starts[other] >= starts[index] or starts[other] == max(theirs)
    with pytest.raises(ValueError, match="those of A alone"):
        make_plan(recordings_of("AA"), [100, 100], 5, 0.9, 0, 4, ("foreign",), 0)


def test_buckets_and_weights_by_hand():
    assert bucket_edges(100, 1) == [0, 16, 32, 64, 100]
    assert bucket_edges(70, 2) == [0, 16, 23, 32, 45, 64, 70]
    assert bucket_edges(5, 2) == [0, 5]
    values = np.arange(48.0)
    means = bucket_means(values, [0, 16, 32, 64, 128])
    assert means.tolist()[:3] == [7.5, 23.5, 39.5]  # half of the third is enough
    assert np.isnan(means[3])
    assert np.isnan(bucket_means(values[:47], [0, 16, 32, 64])[2])
    assert mean_beyond(values, 20) == 33.5
    assert mean_beyond(values, 23) == 35.0
    assert math.isnan(mean_beyond(values, 24))  # 24 frames
    nll = np.arange(1.0, 9.0)
    weighted = {name: float(w @ nll) for name, w in stream_weights(8).items()}
    assert weighted["w100"] == pytest.approx((100 * 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8) / 107)
    assert (weighted["semantic"], weighted["acoustic"], weighted["uniform"]) == (1, 5, 4.5)
    assert weighted["codebook 3"] == 3


def test_intervals_draw_speakers_and_not_recordings():
    draw = np.random.default_rng(1)
    speakers = [f"s{i % 6}" for i in range(30)]
    level = {name: draw.normal() for name in set(speakers)}
    values = np.array([[level[s] + 0.01 * draw.normal(), draw.normal()] for s in speakers])
    values[3, 1] = np.nan
    found = cluster_intervals(values, speakers, 4000)
    names = sorted(set(speakers))
    rows = {name: [i for i, s in enumerate(speakers) if s == name] for name in names}
    slow = []
    for _ in range(4000):
        chosen = [i for name in draw.choice(names, len(names)) for i in rows[name]]
        slow.append(np.nanmean(values[chosen], axis=0))
    for column, interval in enumerate(found):
        expected = np.percentile([one[column] for one in slow], (2.5, 97.5))
        assert interval.mean == pytest.approx(np.nanmean(values[:, column]))
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=0.06)
        assert interval.stderr == pytest.approx(np.std([one[column] for one in slow]), rel=0.1)
    alike = cluster_intervals(values, [f"{i}" for i in range(30)], 4000)
    assert found[0].high - found[0].low > 1.5 * (alike[0].high - alike[0].low)
    few = cluster_intervals(values[: FEWEST_ROWS - 1], speakers[: FEWEST_ROWS - 1], 50)
    assert np.isnan(few[0].low)


def test_the_headline_says_what_the_interval_says():
    def told(row, recordings=9, speakers=7, forgets=64, beside=None):
        numbers = {
            "of": ["carried", "reset"],
            "beyond": {"w100": row},
            "beyond_recordings": recordings,
            "beyond_speakers": speakers,
        }
        return headline(numbers, beside and {"beyond": {"w100": beside}}, 50, forgets, 400, 12.5)

    assert told([-0.2, -0.3, -0.1, 0.05])["verdict"] == "lower"
    assert (
        "-0.2000 nats, 95 % interval -0.3000 to -0.1000, 9 recordings of 7"
        in told([-0.2, -0.3, -0.1, 0])["text"]
    )
    assert told([0.2, 0.1, 0.3, 0.05])["verdict"] == "higher"
    for row in ([-0.1, -0.3, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.2, 0.1]):
        assert told(row)["verdict"] == "no difference shown"
        assert told(row)["text"].startswith("No difference shown")
    assert "beyond the receptive field of 50 frames (4 s)" in told([-0.1, -0.3, 0.1, 0.1])["text"]
    assert told([-0.2, None, None, None], 4, 3)["verdict"] == "cannot be told"
    assert told([None, None, None, None], 0, 0)["text"].endswith("the longest has 400 frames.")
    assert told([0.0, 0.0, 0.0, 0.0], forgets=400)["verdict"] == "not measured"
    beside = told([-0.2, -0.3, -0.1, 0.05], beside=[0.01, -0.1, 0.1, 0])["text"]
    assert beside.endswith(
        "Against inner learning rate 0: +0.0100 (-0.1000 to +0.1000), no difference shown."
    )
    worse = told([-0.2, -0.3, -0.1, 0.05], beside=[0.2, 0.1, 0.3, 0])["text"]
    assert worse.endswith("carrying predicts WORSE than learning nothing.")


def test_comparisons_stay_within_a_context():
    arms = [Arm(m, c) for c in (OWN_CONTEXT, "4") for m in ("base", "carried", "reset", "gate_off")]
    assert [(a.name, b.name) for a, b in comparisons(arms)] == [
        ("carried", "reset"),
        ("carried", "gate_off"),
        ("carried", "base"),
        ("carried@4", "reset@4"),
        ("carried@4", "gate_off@4"),
        ("carried@4", "base@4"),
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return libri_light(tmp_path_factory.mktemp("libri"), speakers=2, seconds=1.0, chapters=2)


def test_librilight_is_read_and_its_levels_are_kept_apart(small):
    found = find_recordings(str(small))
    assert [(r.name, r.speaker) for r in found] == [
        (f"emma_{s}/emma_{n:02d}_austen_64kb", f"10{s}") for s in (0, 1) for n in (0, 1)
    ]
    assert found[1].duration_sec == pytest.approx(1.1)
    assert speakers_of(find_recordings(f"{small}/*/*/*.flac")) == ["100", "101"]
    both = find_recordings(f"{small}/100/emma_0/*.flac, {small}/101/emma_1/*_00_*")
    assert [r.speaker for r in both] == ["100", "100", "101"]
    wrong = {
        small.parent: f"1 level too high .* use recordings={small}$",
        small / "100": f"1 level too deep .*of speaker 100; use recordings={small}$",
        small / "101/emma_1": f"2 levels too deep .* use recordings={small}$",
    }
    for place, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            find_recordings(str(place))


def test_two_files_of_one_stem_and_an_empty_file_are_refused(tmp_path):
    small = libri_light(tmp_path, speakers=2, seconds=0.5)
    path = sorted(small.rglob("*.flac"))[0]
    copy = path.with_suffix(".wav")
    soundfile.write(copy, chapter(0, 0.5, 0), RATE)
    with pytest.raises(ValueError, match=f"{path} and {copy.name} have one stem: .* Remove one"):
        find_recordings(str(small))
    path.unlink()
    assert len(find_recordings(str(small))) == 2
    soundfile.write(copy, np.zeros(0), RATE)
    with pytest.raises(ValueError, match=f"{copy} holds no audio"):
        find_recordings(str(small))


def test_other_recordings_are_read(tmp_path):
    for name, speaker in (("a/x", 0), ("a/y", 0), ("b/x", 1)):
        (tmp_path / "people" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "people" / f"{name}.wav", chapter(speaker, 0.5, 0), RATE)
    two = find_recordings(str(tmp_path / "people"))
    assert [(r.name, r.speaker, r.channels) for r in two] == [
        ("a/x", "a", 1),
        ("a/y", "a", 1),
        ("b/x", "b", 1),
    ]
    flat = find_recordings(str(tmp_path / "people/a"))
    assert [r.speaker for r in flat] == ["x", "y"]
    listed = tmp_path / "list.jsonl"
    listed.write_text(
        '{"path": "people/a/x.wav", "speaker": 7}\n{"path": "people/b/x.wav", "duration": 0.5}\n'
    )
    assert [r.speaker for r in find_recordings(str(listed))] == ["7", "x"]
    assert [r.name for r in find_recordings(str(tmp_path / "people/b/x.wav"))] == ["x"]
    (tmp_path / "people/c.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="different depths, such as .*c.wav and .*a/x.wav"):
        find_recordings(str(tmp_path / "people"))
    (tmp_path / "empty").mkdir()
    listed.with_name("gone.jsonl").write_text('{"path": "nobody.wav"}\n')
    wrong = {
        str(tmp_path / "empty"): "holds no lists .* and no audio",
        str(tmp_path / "*.flac"): "fits no audio file",
        str(tmp_path / "people/c.wav"): "c.wav is no audio file",
        str(tmp_path / "gone.jsonl"): "gone.jsonl:1: audio file .*nobody.wav does not exist",
        f"{tmp_path}/people/a/x.wav,{tmp_path}/people/a": "x.wav twice",
    }
    for spec, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            find_recordings(spec)


def test_a_limit_draws_speakers_before_recordings(small, tmp_path):
    people = [LongRecording(f"{s}{n}", tmp_path / f"{s}{n}", s, 1.0, 1) for s in "abcd" for n in range(5)]
    for seed in range(5):
        four = drawn(people, 4, seed)
        assert speakers_of(four) == ["a", "b", "c", "d"]
        assert len(drawn(people, 7, seed)) == 7
        assert four == drawn(people, 4, seed)
    assert drawn(people, 4, 0) != drawn(people, 4, 1)
    assert drawn(people, None, 0) == drawn(people, 99, 0) == people
    assert json.loads((small / "100/emma_0/emma_00_austen_64kb.json").read_text())["speaker"] == "100"
    odd = tmp_path / "odd"
    libri_light(odd, speakers=1, seconds=0.5)
    (odd / "small/100").rename(odd / "small/999")
    with pytest.raises(ValueError, match=re.escape("says speaker 100, its folder says 999")):
        find_recordings(str(odd / "small"))


def test_codes_are_the_voice_and_fillers(tiny_base, small, tmp_path):
    mimi, special = load_mimi(tiny_base, "cpu"), TextTokens(3, 0, -1)
    one = find_recordings(str(small))[1]

    def codes(recording=one, text="none", user="silence", max_sec=None):
        return CodeReader(mimi, special, text, user, max_sec).codes(recording)

    plain = codes()
    assert plain.shape == (17, 13)  # 1.1 s; the rest of a frame is left out
    assert (plain[0] == -1).all()
    assert plain[1].unique().numel() > 3
    silence = mimi.encode(torch.zeros(1, 1, 24000))[0, :, :12]
    assert torch.equal(plain[9:, :12], silence)
    assert torch.equal(codes(text="pad")[1:], plain[1:])
    assert (codes(text="pad")[0] == 3).all()
    without = codes(user="none")
    assert torch.equal(without[:9], plain[:9])
    assert (without[9:] == -1).all()
    noise = codes(user="noise")
    assert torch.equal(noise[:9], plain[:9])
    assert not torch.equal(noise[9:], plain[9:])
    assert torch.equal(codes(max_sec=0.6), plain[:, :7])
    stereo = np.stack((chapter(0, 1.1, 1), chapter(1, 1.1, 1)), axis=1)
    soundfile.write(tmp_path / "two.flac", stereo, RATE)
    (both,) = find_recordings(str(tmp_path / "two.flac"))
    found = codes(both, user="none")
    assert torch.equal(found[:9], plain[:9])
    assert (found[9:] >= 0).all()
    reader = CodeReader(mimi, special, "none", "silence", None)
    assert reader.identity(both)["user"] == "recorded"
    assert reader.identity(one) != CodeReader(mimi, special, "pad", "silence", None).identity(one)
