"""NLL by position and distance: every code once, at its frame, and the bookkeeping of what came before."""

import json

import numpy as np
import pytest
import soundfile
import torch
from training import SAMPLE, compose_config, dialogue, run, write_recording

from configs.typed import typed_config
from evaluation.nll_by_distance.__main__ import run as evaluate
from evaluation.nll_by_distance.arms import Arm, comparisons, reset_every
from evaluation.nll_by_distance.measures import Bins, Measures, frequent_words
from evaluation.nll_by_distance.recurrence import (
    PlacedWord,
    Turn,
    occurrences,
    placed_words,
    refuse_misplaced,
    turns,
    word_key,
)
from evaluation.nll_by_distance.settings import NllConfig
from evaluation.nll_by_distance.sides import Side, SideReader
from evaluation.statistics import FEWEST_ROWS, ratio_intervals
from finetune.data.interleaver import TextLayout, TextTokens, text_stream
from finetune.data.manifest import Word, read_manifest
from inference.likelihood import nll_by_frame
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.loading import load_mimi, load_tokenizer
from moshi_ttt.memory_arms import inner_lr_0

CHUNK = 12
CONTEXTS = {"ttt_layer_context": 5, "non_ttt_layer_context": 3}
SPECIAL = TextTokens(3, 0, -1)


@pytest.fixture
def model(build, perturb):
    return perturb(build(**CONTEXTS)).eval()


@pytest.fixture
def codes(random_codes):
    """`[17, T]`, T no multiple of the chunk, with missing codes."""
    codes = random_codes(1, 53)[0]
    codes[0, 20:24] = -1
    codes[3, CHUNK - 1 : CHUNK + 1] = -1
    return codes


def nll_of(model, codes, chunk_frames, reset=False):
    return nll_by_frame(model, codes[None], chunk_frames, chunk_frames if reset else None)[0]


@torch.no_grad()
def slow_nll(model, codes):
    """One pass over the whole recording, one code at a time."""
    silence = torch.full((17, max(model.delays)), -1)  # Moshi has no step for the last delayed codes
    output = model(torch.cat((codes, silence), dim=1)[None])
    logits = [output.text_logits[0, 0], *output.logits[0]]
    nll = torch.full((9, codes.shape[1]), torch.nan)
    for k, t in np.ndindex(*nll.shape):
        if codes[k, t] != -1:
            nll[k, t] = -logits[k][t].log_softmax(-1)[codes[k, t]]
    return nll


@pytest.mark.parametrize("chunk, frames", [(4, 52), (CHUNK, 53), (96, 53)])  # whole chunks, or not
def test_every_code_is_scored_once_and_as_in_one_pass(model, codes, chunk, frames):
    codes = codes[:, :frames]
    nll = nll_of(model, codes, chunk)
    assert int((~nll.isnan()).sum()) == int((codes[:9] != -1).sum())
    torch.testing.assert_close(nll, slow_nll(model, codes), rtol=0, atol=2e-5, equal_nan=True)


def test_rows_of_unequal_length_are_scored_as_each_alone(model, codes):
    lengths = (53, 7, 30)
    batch = torch.full((len(lengths), 17, max(lengths)), -1)
    for row, length in zip(batch, lengths, strict=True):
        row[:, :length] = codes[:, -length:]
    together = nll_by_frame(model, batch, CHUNK)
    for nll, length in zip(together, lengths, strict=True):
        alone = nll_of(model, codes[:, -length:], CHUNK)
        torch.testing.assert_close(nll[:, :length], alone, rtol=0, atol=2e-5, equal_nan=True)
        assert nll[:, length:].isnan().all()


def test_inner_learning_rate_0_is_that_of_a_model_built_with_it(build, perturb, codes):
    torch.manual_seed(1)
    model = perturb(build(**CONTEXTS)).eval()
    still = build(**CONTEXTS, base_lr=0.0).eval()
    still.load_state_dict(model.state_dict())
    before = nll_of(model, codes, CHUNK)
    with inner_lr_0(model):
        frozen = nll_of(model, codes, CHUNK)
    assert torch.equal(frozen.nan_to_num(), nll_of(still, codes, CHUNK).nan_to_num())
    assert (frozen - before).nan_to_num().abs().max() > 1e-4
    assert torch.equal(nll_of(model, codes, CHUNK).nan_to_num(), before.nan_to_num())


def test_reset_forgets_the_inner_state_and_nothing_else(build, perturb, model, codes):
    changed = codes.clone()
    changed[1:, :4] = (changed[1:, :4] + 1) % 256

    def effect(model, reset):
        """What a change of the first frames does to the NLL of the chunks after the first."""
        nlls = (nll_of(model, given, CHUNK, reset) for given in (codes, changed))
        difference = torch.sub(*nlls)[:, CHUNK + max(model.delays) + 1 :]
        return float(difference.nan_to_num().abs().max())

    blind = perturb(build(ttt_layer_context=1, non_ttt_layer_context=1)).eval()
    assert effect(blind, reset=False) > 1e-4
    assert effect(blind, reset=True) == 0
    assert effect(model, reset=True) > 1e-4  # attention goes on over the edge of a chunk
    whole, reset = nll_of(model, codes, CHUNK), nll_of(model, codes, CHUNK, reset=True)
    before = slice(CHUNK - max(model.delays))  # the last delayed codes are predicted in the next chunk
    assert torch.equal(whole[:, before].nan_to_num(), reset[:, before].nan_to_num())


def w(text, start, end, speaker="A"):
    return Word(text, start, end, speaker)


@pytest.fixture
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def test_words_lie_where_the_text_stream_has_them(tokenizer):
    words = [
        w("Good", 0.0, 0.2),
        w("morning,", 0.5, 0.9),
        w("nothing", 0.9, 0.9),  # without duration: not on the stream
        w("Schifffahrtsgesellschaft", 1.0, 1.3),  # no room for all its bytes
        w("the", 1.5, 1.6),
        w("sea", 1.51, 1.7),  # begins in the frame of the word before, which finds no room
        w("good", 2.5, 2.6),
    ]
    stream = text_stream(words, 32, 12.5, tokenizer, SPECIAL, TextLayout(keep_main_only=False))
    placed = placed_words(words, 32, 12.5, tokenizer)
    assert [(p.key, p.frame) for p in placed] == [
        ("good", 0),
        ("morning", 6),
        ("schifffahrtsgesellschaft", 12),
        ("sea", 18),
        ("good", 31),
    ]
    assert len(placed[2].tokens) == 6
    refuse_misplaced(stream, placed, SPECIAL)
    for shifted in (stream.roll(1), stream.roll(-1)):
        with pytest.raises(ValueError, match="or is it shifted"):
            refuse_misplaced(shifted, placed, SPECIAL)
    with pytest.raises(ValueError, match="1 frames differ"):
        refuse_misplaced(stream, [*placed[:-1], PlacedWord("good", 31, (99,))], SPECIAL)


def test_distances_since_the_same_word():
    frames = {"yes": 3, "King": 5, "king,": 9, "KING": 30, "no": 31}
    placed = [PlacedWord(word_key(text), frame, (1,)) for text, frame in frames.items()]
    found = occurrences([*placed, PlacedWord(word_key("..."), 40, (1,))])
    assert [(o.word.frame, o.distance_frames, o.first and o.first.frame) for o in found] == [
        (3, None, None),
        (5, None, None),
        (9, 4, 5),
        (30, 21, 5),
        (31, None, None),
    ]
    assert word_key("I'm") == "i'm"
    assert word_key("--") == ""


def test_turns_and_the_gaps_between_a_speakers_own():
    words = [
        w("a", 0.0, 1.0),
        w("b", 1.5, 2.0),  # a pause is no end of a turn
        w("x", 2.0, 2.4, "B"),
        w("y", 2.5, 3.0, "B"),
        w("c", 2.9, 3.5),  # begins before the other has ended
        w("z", 3.4, 3.6, "B"),
        w("d", 3.7, 4.0),  # no whole word of the other's before it: the same turn
        w("v", 5.0, 5.1, "B"),
        w("e", 10.0, 11.0),
    ]
    assert turns(words, "A") == [
        Turn(0.0, 2.0, None),
        Turn(2.9, 4.0, pytest.approx(0.9)),
        Turn(10.0, 11.0, 6.0),
    ]
    assert [turn.start_sec for turn in turns(words, "B")] == [2.0, 5.0]
    assert turns(words, "nobody") == []


def made_up_side():
    """Ten frames at 2 a second: "a" at frames 1-2, 6 and 9, "b" at 4; turns from 0.5 s and from 3 s."""
    stream = torch.tensor([0, 40, 41, 0, 50, 0, 40, 3, 0, 40])
    codes = torch.cat((stream[None], torch.zeros(16, 10, dtype=torch.long)))
    a, a2, a3 = (PlacedWord("a", frame, tokens) for frame, tokens in ((1, (40, 41)), (6, (40,)), (9, (40,))))
    words = occurrences([a, PlacedWord("b", 4, (50,)), a2, a3])
    return Side(0, codes, words, [Turn(0.5, 2.5, None), Turn(3.0, 3.4, 0.5)])


def test_values_are_those_of_the_frames_of_words_and_turns():
    nll = torch.arange(90.0).reshape(9, 10) ** 1.5  # no two frames, and no two steps, alike
    nll[0, 3] = torch.nan
    other = nll / 3
    bins = Bins([0.0, 2.0, 4.0, 6.0], [-1.0, 0.0, 2.0, np.inf], [-1.0, 0.0, np.inf])
    measures = Measures(bins, 1, ["x", "third"], 2.0, 1.0, SPECIAL, {"b"})
    measures.add(made_up_side(), {"x": nll, "third": other})
    text, semantic, acoustic = nll[0].double(), nll[1].double(), nll[2:].double().mean(0)

    def means(name):
        found = measures.found[name]
        values = [interval.mean for interval in found.means("x", 10)]
        differences = [interval.mean for interval in found.differences("x", "third", 10)]
        assert differences == pytest.approx([2 / 3 * value for value in values], rel=1e-5, nan_ok=True)
        return pytest.approx(values, rel=1e-5, nan_ok=True)

    first_a = float(text[1:3].mean())
    assert [(first_a + text[4]) / 2, text[9], text[6]] == means("distance/words")
    assert [first_a, text[9], text[6]] == means("distance/rarer words")
    assert [first_a, (text[9] + text[6]) / 2] == means("reach/rarer words")
    gains = [np.nan, text[9] - text[1], text[6] - text[1]]
    assert gains == means("distance/words, minus their first")
    assert [semantic[1:3].mean(), semantic[6], np.nan] == means("distance/turns, semantic")
    assert [acoustic[1:3].mean(), acoustic[6], np.nan] == means("distance/turns, acoustic")
    assert [semantic[:4].mean(), semantic[4:8].mean(), semantic[8:].mean()] == means("position/semantic")
    assert [text[[1, 2, 4, 6, 9]].mean()] == means("all/words")
    assert [text[[0, 1, 2, 4, 5, 6, 7, 8, 9]].mean()] == means("all/text")


def test_frequent_words_are_counted_over_all_recordings():
    side = made_up_side()
    assert frequent_words([side], 1) == {"a"}
    assert frequent_words([side, side], 5) == {"a", "b"}
    assert frequent_words([side], 0) == set()


def test_bins_are_the_window_and_multiples_of_the_receptive_field():
    bins = Bins.of(75.0, 30.0, [16], 60, 12.5)
    assert bins.position_sec == [0, 30, 60, 90]
    assert bins.distance_sec == [-1, 0, 1.28, 4.8, 9.6, 19.2, 38.4, 76.8, np.inf]
    assert bins.reach_sec == [-1, 0, 4.8, np.inf]


def test_intervals_draw_whole_recordings():
    generator = np.random.default_rng(3)
    counts = generator.integers(0, 5, (9, 2)).astype(float)
    sums = counts * generator.normal(size=(9, 1))
    found = ratio_intervals(sums, counts, 4000)
    slow = []
    for _ in range(4000):
        rows = generator.integers(0, 9, 9)
        slow.append(sums[rows].sum(0) / counts[rows].sum(0))
    for column, interval in enumerate(found):
        expected = np.percentile([ratios[column] for ratios in slow], (2.5, 97.5))
        assert interval.mean == pytest.approx(sums[:, column].sum() / counts[:, column].sum())
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=0.1)
    few = np.zeros((9, 2))
    few[: FEWEST_ROWS - 1, 0] = 4
    alone, nothing = ratio_intervals(few / 2, few, 10)
    assert alone.mean == 0.5
    assert np.isnan([alone.low, alone.high, nothing.mean, nothing.low]).all()


def reader_of(base, both_sides, main="SPEAKER_MAIN"):
    mimi = load_mimi(base, "cpu")
    return SideReader(mimi, load_tokenizer(base), SPECIAL, main, True, both_sides)


def test_the_other_side_is_the_recording_with_its_channels_exchanged(tiny_base, tmp_path):
    (recording,) = read_manifest(SAMPLE / "valid.jsonl")
    main, other = reader_of(tiny_base, True).read(0, recording)
    soundfile.write(tmp_path / "a.flac", dialogue(4)[:, ::-1], 24000)
    names = {"SPEAKER_MAIN": "SPEAKER_USER", "SPEAKER_USER": "SPEAKER_MAIN"}
    words = [[word.text, [word.start, word.end], names[word.speaker]] for word in recording.words]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": words}))
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a.flac", "duration": recording.duration_sec}))
    (exchanged,) = read_manifest(tmp_path / "list.jsonl")
    (expected,) = reader_of(tiny_base, False).read(0, exchanged)
    assert torch.equal(other.codes, expected.codes)
    assert not torch.equal(main.codes, other.codes)
    assert main.codes.shape == (17, 96)
    assert (other.words, other.turns, other.recording) == (expected.words, expected.turns, 0)
    assert len(main.words) + len(other.words) == len(recording.words)
    third = [Word("hm", 1.0, 1.2, "SPEAKER_3"), *recording.words]
    crowd = type(recording)(recording.path, recording.duration_sec, tuple(third))
    with pytest.raises(ValueError, match="SPEAKER_3, SPEAKER_USER"):
        reader_of(tiny_base, True).read(0, crowd)
    silent = type(recording)(recording.path, recording.duration_sec, ())
    (only,) = reader_of(tiny_base, True).read(0, silent)
    assert only.words == only.turns == []


def test_comparisons_are_with_itself_and_with_the_others():
    arms = [Arm("t", "carried"), Arm("t", "reset"), Arm("t", "off"), Arm("plain", None)]
    expected = [("t", "t, state reset"), ("t", "t, inner learning rate 0"), ("t", "plain")]
    assert comparisons(arms) == expected
    assert comparisons([arms[3], *arms[:3]]) == expected
    assert comparisons(arms[3:]) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory, private_cache):
    """A run with TTT, one without, and one that was trained on another text stream."""
    folder = tmp_path_factory.mktemp("runs")
    short = (
        "max_steps=1",
        "ttt.ttt_layer_context=9",
        "ttt.non_ttt_layer_context=9",
        "diagnostics.every_steps=0",
    )
    plain = (*short, "ttt=none", "mode=full", "lora=none")
    return {
        "ttt": run(folder / "ttt", *short, "lora=none", "mode=full", "ttt.gate_init=1"),
        "plain": run(folder / "plain", *plain),
        "other": run(folder / "other", *plain, "data.keep_main_only=false"),
    }


def config_of(tmp_path, *overrides):
    needed = (f"recordings={SAMPLE / 'train.jsonl'}", f"output={tmp_path / 'nll.json'}", "device=cpu")
    return typed_config(
        compose_config(*needed, "chunk_frames=64", *overrides, name="nll_by_distance"), NllConfig
    )


def test_the_command_compares_checkpoints_on_the_same_codes(runs, tmp_path):
    config = config_of(tmp_path, f"checkpoints=[{runs['ttt']},{runs['plain']}]", "both_sides=true")
    content = json.loads(evaluate(config).read_text())
    about, measures = content["about"], content["measures"]
    arms = ["ttt", "ttt, state reset", "ttt, inner learning rate 0", "plain"]
    assert about["receptive_field_frames"] == 32
    assert about["checkpoints"]["ttt"]["reset_every_frames"] == 32
    assert about["checkpoints"]["plain"]["reset_every_frames"] is None
    assert (about["number"], about["sides"]) == (3, 6)
    assert all(list(measure["arms"]) == arms for measure in measures.values())
    frames = 2 * sum(int(np.ceil(r.duration_sec * 12.5)) for r in read_manifest(config.recordings))
    for stream in ("text", "semantic", "acoustic"):
        (only,) = measures[f"all/{stream}"]["bins"]
        assert only["observations"] == frames
        assert sum(b["observations"] for b in measures[f"position/{stream}"]["bins"]) == frames
        for pair, rows in measures[f"all/{stream}"]["differences"].items():
            a, b = (measures[f"all/{stream}"]["arms"][name][0][0] for name in pair.split(" - "))
            assert rows[0][0] == pytest.approx(a - b, abs=2e-5)
            assert rows[0][1:] == [None, None]  # three recordings are too few
            assert rows[0][0] != 0
    loaded = load_checkpoint(runs["plain"])
    reader = reader_of(loaded.base, True)
    sides = [side for i, r in enumerate(read_manifest(config.recordings)) for side in reader.read(i, r)]
    nll = torch.cat([slow_nll(loaded.model, side.codes)[1] for side in sides])
    assert measures["all/semantic"]["arms"]["plain"][0][0] == pytest.approx(float(nll.mean()), abs=1e-4)
    words = measures["distance/words"]["bins"]
    assert words[0]["first"]
    assert sum(b["observations"] for b in words) == sum(len(side.words) for side in sides)
    assert (tmp_path / "nll.png").stat().st_size > 10_000
    assert "| words, first |" in (tmp_path / "nll.md").read_text()


def test_recordings_without_words_have_audio_alone(runs, tmp_path):
    samples = np.stack((dialogue(4)[:, 0], np.zeros(len(dialogue(4)), np.float32)), axis=1)
    mono = write_recording(tmp_path / "mono", samples)
    evaluate(config_of(tmp_path, f"checkpoints=[{runs['plain']}]", f"recordings={mono}", "both_sides=true"))
    content = json.loads((tmp_path / "nll.json").read_text())
    streams = ("all/semantic", "position/semantic", "all/acoustic", "position/acoustic")
    assert sorted(content["measures"]) == sorted(streams)
    assert content["about"]["sides"] == 1
    assert (tmp_path / "nll.md").read_text().splitlines()[2] == "| arm | semantic | acoustic |"


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    both = f"checkpoints=[{runs['ttt']},{runs['plain']}]"
    (tmp_path / "old.md").touch()
    wrong = {
        (both, "labels=[a]"): "one label for each",
        (both, "labels=[a,a]"): "must differ",
        (f"checkpoints=[{runs['ttt']},{runs['ttt']}]", ""): "apart with labels=",
        (both, "reset_frames=40"): "use 32 or 48",
        (both, "chunk_frames=40"): "use 32 or 48 frames",
        (both, f"output={tmp_path / 'old.json'}"): "old.md exists",
        (both, "output=nll.txt"): "named .json",
        (both, "turn_sec=0"): "turn_sec must be above 0",
        (f"checkpoints=[{runs['plain']},{runs['other']}]", ""): "plain and other differ in keep_main_only",
        ("checkpoints=[]", ""): "checkpoints is empty",
    }
    for overrides, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            evaluate(config_of(tmp_path, *filter(None, overrides)))
    assert [path.name for path in tmp_path.iterdir()] == ["old.md"]


def test_reset_is_every_receptive_field_in_whole_mini_batches(runs):
    assert reset_every(load_checkpoint(runs["ttt"]), 48) == 48
    assert reset_every(load_checkpoint(runs["plain"]), None) is None
