"""Probe mode scores exactly what it says: true likelihoods of told values, and controls that forget them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from moshi.models.lm import LMModel

from configs.typed import typed_config
from evaluation.recall.__main__ import study_output
from evaluation.recall.arms import forgetting_at
from evaluation.recall.probe import read_speech
from evaluation.recall.probe import run as run_probe
from evaluation.recall.probe_report import Answers, interval, margin, right, summarize
from evaluation.recall.probe_scoring import likelihoods
from evaluation.recall.probe_settings import Probe
from evaluation.recall.probe_words import EpisodeMaker, Speech, question_frames
from evaluation.recall.settings import RecallConfig
from finetune.data.manifest import read_manifest
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import receptive_field, ttt_layers
from moshi_ttt.loading import load_mimi
from moshi_ttt.memory_arms import inner_lr_0, mini_batch_frames, without_inner_memory
from tests.training import SAMPLE, compose_config, dialogue, run

K = 4
PROBE = Probe(
    pairs=2, episodes=3, key_frames=3, value_frames=2, pause_frames=1, distances=[0.5, 3.0], batch_size=5
)
SILENCE = torch.arange(8)


def same(carried):
    return carried


@pytest.fixture
def speeches(random_codes):
    """Three recordings with a word every 3 frames."""
    codes = random_codes(3, 120)
    return [Speech(f"{index}.wav", row, tuple(range(2, 120, 3))) for index, row in enumerate(codes)]


@pytest.fixture
def hybrid(build, perturb) -> LMModel:
    """A tiny Moshi in float64 whose windows reach 18 frames, and whose TTT layers learn a lot."""
    model = perturb(build(ttt_layer_context=4, non_ttt_layer_context=7, base_lr=30.0)).double()
    for _, layer in ttt_layers(model):
        for parameter in layer.parameters():
            parameter.data = parameter.data.double()
        ttt = layer.seq_modeling_block.ttt_layer.ttt
        ttt.rope = ttt.rope.double()
    return model.eval()


def maker_of(model, speeches, probe=PROBE) -> EpisodeMaker:
    ends = question_frames(probe, receptive_field(model), mini_batch_frames(model), max(model.delays))
    return EpisodeMaker(probe, model, speeches, SILENCE, ends)


def score(model, episodes, past, *changes, batch_size=5, chunk_frames=8):
    """Likelihoods by change, `[distances, B, P, P, streams]`."""
    return likelihoods(model, episodes, past, batch_size, chunk_frames, changes or [same], lambda _: None)


def slow_nll(model, codes, frames) -> torch.Tensor:
    """Obvious twin: one whole pass over `[17, T]`, each code looked up in its own softmax, `[streams]`."""
    output = model(codes[None])
    logits = [output.text_logits[0, 0], *output.logits[0]]
    sums = torch.zeros(len(logits), dtype=torch.float64)
    for stream, of_stream in enumerate(logits):
        for frame in frames:
            row = of_stream[frame].double()
            sums[stream] -= row[codes[stream, frame]] - row.exp().sum().log()
    return sums


@torch.no_grad()
def slow_likelihoods(model, episodes, past) -> torch.Tensor:
    """`likelihoods` by whole passes."""
    found = []
    for end in episodes.ends:
        for row in range(past.shape[0]):
            for key in episodes.keys[row]:
                for value in episodes.values[row]:
                    codes = torch.cat((past[row, :, :end], key, value, past[row, :, end : end + 1]), dim=1)
                    first = end + key.shape[1]
                    found.append(slow_nll(model, codes, range(first, first + value.shape[1])))
    pairs = episodes.keys.shape[1]
    return torch.stack(found).unflatten(0, (len(episodes.ends), past.shape[0], pairs, pairs))


@pytest.mark.parametrize("condition", ["plain", "inner_lr_0", "state_reset"])
def test_likelihoods_are_those_of_whole_passes(hybrid, speeches, condition):
    episodes = maker_of(hybrid, speeches, replace(PROBE, distances=[0.5, 1.5])).code_words().rows(slice(2))
    if condition == "inner_lr_0":
        with inner_lr_0(hybrid):
            (found,) = score(hybrid, episodes, episodes.told)
            expected = slow_likelihoods(hybrid, episodes, episodes.told)
        assert [layer.seq_modeling_block.ttt_layer.ttt.base_lr for _, layer in ttt_layers(hybrid)] == [30, 30]
    elif condition == "plain":
        (found,) = score(hybrid, episodes, episodes.told)
        expected = slow_likelihoods(hybrid, episodes, episodes.told)
    else:
        found = score(
            hybrid, episodes, episodes.told, same, lambda state: without_inner_memory(hybrid, state)
        )[1]
        parts = []
        for end in episodes.ends:
            with forgetting_at(hybrid, end):
                parts.append(slow_likelihoods(hybrid, replace(episodes, ends=(end,)), episodes.told))
        expected = torch.cat(parts)
    assert found.shape == (2, 2, 2, 2, 9)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_numbers_do_not_depend_on_batches_and_chunks(hybrid, speeches):
    episodes = maker_of(hybrid, speeches).phrases()
    one = score(hybrid, episodes, episodes.told, batch_size=100, chunk_frames=100 * K)
    other = score(hybrid, episodes, episodes.told, batch_size=2, chunk_frames=K)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_planted_successor_is_found_with_the_likelihood_planted(build, speeches):
    """A model that knows one thing: which text token follows which. Its likelihoods are known by hand."""
    model = build(layers="none", enable=False, ttt_layer_context=4, non_ttt_layer_context=4)
    probe = replace(PROBE, key_frames=1, value_frames=1, pairs=4, episodes=1)
    episodes = maker_of(model, speeches, probe).code_words()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    logit = 20.0
    for pair in range(4):
        key, value = int(episodes.keys[0, pair, 0, 0]), int(episodes.values[0, pair, 0, 0])
        model.text_emb.weight[key, pair] = 1.0
        # RMS normalisation makes sqrt(128) of the one feature that is on.
        model.text_linear.weight[value, pair] = logit / math.sqrt(128)
    (nll,) = score(model, episodes, episodes.told)
    log_sum = math.log(math.exp(logit) + model.text_card - 1)
    expected = torch.full((4, 4), log_sum).fill_diagonal_(log_sum - logit)
    for distance in nll:
        torch.testing.assert_close(distance[0, :, :, 0].float(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            distance[0, :, :, 1:].float(), torch.full((4, 4, 8), math.log(256)), rtol=1e-5, atol=0
        )
    assert right(nll.sum(-1)).tolist() == [[1.0], [1.0]]
    assert margin(nll.sum(-1)).flatten().tolist() == pytest.approx([logit, logit], rel=1e-4)


@torch.no_grad()
def plant_memory(model, episodes) -> None:
    """Make one TTT-Linear layer an associative memory of the pairs of the first episode, and nothing else.

    An acoustic code is read one frame late. So the step that reads a value's text also reads its key's
    acoustic code, and the inner model learns that this code's feature (k) stands for that text's (v). The
    text of a key asks (q) for the feature of its acoustic code.
    """
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    ((_, layer),) = ttt_layers(model)
    layer.seq_modeling_block.gate.alpha.fill_(3.0)
    ttt = layer.seq_modeling_block.ttt_layer.ttt
    ttt.rope[..., 0], ttt.rope[..., 1] = 1.0, 0.0  # wherever in a mini-batch
    ttt.W1[:, :, 16:24], ttt.W1[:, :, 24:] = 1.0, -1.0  # something to normalise that prefers no answer
    for pair in range(episodes.keys.shape[1]):
        key, value = episodes.keys[0, pair, :, 0], episodes.values[0, pair, :, 0]
        asked, heard, said, answer = pair, 8 + pair, 16 + pair, 24 + pair
        model.text_emb.weight[key[0], asked] = 1.0
        model.emb[1].weight[key[2], heard] = 1.0
        model.text_emb.weight[value[0], said] = 1.0
        ttt.wq.weight[pair, asked] = 1.0
        ttt.wk.weight[pair, heard] = 1.0
        ttt.wv.weight[8 + pair, said] = 1.0
        ttt.wo.weight[answer, 8 + pair] = 1.0
        model.text_linear.weight[value[0], answer] = 5.0


def test_a_planted_memory_is_found_far_beyond_the_windows_and_gone_in_every_control(build, speeches):
    contexts = {"ttt_layer_context": 3, "non_ttt_layer_context": 3}
    model = build(layers="1", ssm_layer="ttt_linear", mini_batch_size=16, base_lr=32.0, **contexts)
    wordless = [replace(speech, codes=torch.full_like(speech.codes, 3)) for speech in speeches]
    probe = replace(PROBE, key_frames=1, value_frames=1, pairs=4, episodes=1, distances=[3.0, 10.0])
    episodes = maker_of(model, wordless, probe).code_words()
    assert len({*episodes.keys[0, :, 2, 0].tolist(), 3}) == 5  # or keys would be heard twice
    plant_memory(model, episodes)
    changes = same, lambda carried: without_inner_memory(model, carried)
    plain, reset = score(model, episodes, episodes.told, *changes, chunk_frames=16)
    (not_told,) = score(model, episodes, episodes.untold, chunk_frames=16)
    with inner_lr_0(model):
        (frozen,) = score(model, episodes, episodes.told, chunk_frames=16)
    assert right(plain.sum(-1)).flatten().tolist() == [1.0, 1.0]
    assert margin(plain.sum(-1)).min() > 10
    for control in (reset, not_told, frozen):
        assert margin(control.sum(-1)).abs().max() < 1e-9


def test_beyond_the_windows_only_inner_learning_knows_what_was_told(hybrid, speeches):
    episodes = maker_of(hybrid, speeches).code_words()
    (told,), (untold,) = score(hybrid, episodes, episodes.told), score(hybrid, episodes, episodes.untold)
    with inner_lr_0(hybrid):
        (frozen,) = score(hybrid, episodes, episodes.told)
        (frozen_untold,) = score(hybrid, episodes, episodes.untold)
    near, far = ((told - untold)[index].abs().amax(dim=(1, 2, 3)) for index in (0, 1))
    assert near.min() > 1e-5
    assert far.min() > 1e-5
    assert (frozen - frozen_untold)[0].abs().max() > 1e-5
    torch.testing.assert_close(frozen[1], frozen_untold[1], rtol=0, atol=1e-10)
    reset = score(hybrid, episodes, episodes.told, lambda state: without_inner_memory(hybrid, state))[0]
    assert (reset - told).abs().amax(dim=(2, 3, 4)).min() > 1e-5
    assert (frozen - told).abs().amax(dim=(2, 3, 4)).min() > 1e-5


def test_attention_alone_is_blind_at_its_receptive_field_and_sees_before(build, perturb, speeches):
    """The distance is what it says: the last frame told is read up to the receptive field, and no longer."""
    model = perturb(build(layers="none", enable=False, ttt_layer_context=4, non_ttt_layer_context=4)).double()
    reach = receptive_field(model)
    # The question's value is key_frames later, and the last code told is read a frame late, and one delayed.
    blind = reach - PROBE.key_frames + 2
    probe = replace(PROBE, distances=[(blind - 1) / reach, blind / reach])
    episodes = maker_of(model.eval(), speeches, probe).code_words()
    (told,), (untold,) = score(model, episodes, episodes.told), score(model, episodes, episodes.untold)
    assert [end - probe.told_frames for end in episodes.ends] == [blind - 1, blind]
    assert (told - untold)[0].abs().max() > 1e-12
    assert (told - untold)[1].abs().max() == 0


def test_code_words_are_told_once_and_only_on_moshis_side(hybrid, speeches):
    episodes = maker_of(hybrid, speeches).code_words()
    assert episodes.told.shape == (3, 17, episodes.ends[-1] + 1)
    assert all(end % K == 0 for end in episodes.ends)
    for told, untold, keys, values in zip(
        episodes.told, episodes.untold, episodes.keys, episodes.values, strict=True
    ):
        for pair in range(2):
            start = pair * 6
            torch.testing.assert_close(told[:, start : start + 3], keys[pair])
            torch.testing.assert_close(told[:, start + 3 : start + 5], values[pair])
        assert (told[:, 5] == untold[:, 5]).all()
        assert (told[:, 11:] == untold[:, 11:]).all()
        for words in (keys, values):
            assert (words[:, 9:] == SILENCE[None, :, None]).all()
            assert not {0, 3} & set(words[:, 0, 0].tolist())
            assert (words[:, 0, 1:] == 3).all()
        assert len({*keys[:, 0, 0].tolist(), *values[:, 0, 0].tolist()}) == 4
    others = maker_of(hybrid, speeches, replace(PROBE, seed=1)).code_words()
    assert (others.keys != episodes.keys).any()


def test_phrases_are_cut_where_a_word_begins_and_spoken_nowhere_else(hybrid, speeches):
    episodes = maker_of(hybrid, speeches, replace(PROBE, episodes=6, pairs=3)).phrases()
    by_name = {speech.name: speech for speech in speeches}
    assert sorted(set(episodes.clusters)) == ["0.wav", "1.wav", "2.wav"]
    for index, name in enumerate(episodes.clusters):
        runs = by_name[name].codes.unfold(1, 5, 1).transpose(0, 1)  # [starts, 17, 5]
        phrases = torch.cat((episodes.keys[index], episodes.values[index]), dim=-1)
        starts = [int((runs[:, :9] == phrase[:9]).flatten(1).all(1).nonzero().item()) for phrase in phrases]
        assert all(start + 3 in by_name[name].starts for start in starts)
        assert (phrases[:, 9:] == SILENCE[:, None]).all()
        assert min(abs(a - b) for a in starts for b in starts if a != b) >= 5
        own = {tuple(frame) for frame in by_name[name].codes.T.tolist()}
        assert not own & {tuple(frame) for frame in episodes.untold[index].T.tolist()}


def test_a_preference_for_some_values_is_chance_and_no_margin():
    nll = torch.randn(7, 4, 1).double() + 5 * torch.randn(7, 1, 4).double()
    assert right(nll).tolist() == [0.25] * 7
    torch.testing.assert_close(margin(nll), torch.zeros(7).double(), rtol=0, atol=1e-12)
    better = nll - 2 * torch.eye(4)
    torch.testing.assert_close(margin(better), torch.full((7,), 2.0).double())
    assert right(torch.zeros(4, 4)).item() == 0  # ties
    assert interval([1.0, 3.0, 8.0], ["a", "a", "b"])[0] == 5.0
    assert interval([1.0, 3.0], ["a", "a"]) == [2.0, None, None]


def test_the_gain_over_not_told_sees_what_preferences_hide():
    untold = 9 * torch.randn(2, 5, 1, 4, 1).double().expand(2, 5, 4, 4, 9)
    plain = untold - 0.1 * torch.eye(4)[:, :, None]
    clusters = tuple("abcde")
    answers = Answers({"plain": plain, "not_told": untold}, clusters, [10, 20], 8)
    summary = summarize(replace(PROBE, pairs=4), answers)
    assert summary["conditions"]["plain"]["3"]["accuracy"][0] < 0.5
    assert summary["plain_against"]["not_told"]["3"] == {"accuracy": [1, 1, 1], "margin_nats": [0.9] * 3}
    assert summary["conditions"]["plain"]["0.5"]["margin_nats_by_stream"]["acoustic"][0] == 0.7
    assert summary["distance_frames"] == {"0.5": 10, "3": 20}


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A checkpoint whose windows reach 24 frames."""
    contexts = ("ttt.ttt_layer_context=6", "ttt.non_ttt_layer_context=8")
    return run(tmp_path_factory.mktemp("runs") / "run", *contexts)


def small_probe(**settings) -> Probe:
    """A probe of the sample by default settings, but for its length."""
    return replace(
        Probe(recordings=str(SAMPLE / "train.jsonl"), episodes=3, distances=[0.5, 4.0], device="cpu"),
        **settings,
    )


def test_the_command_asks_a_checkpoint(trained_run, tmp_path, caplog):
    caplog.set_level("INFO", "evaluation.recall.probe")
    overrides = ("mode=probe", f"checkpoint={trained_run}", f"output={tmp_path / 'new' / 'asked.json'}")
    config = typed_config(compose_config(*overrides, name="recall"), RecallConfig)
    config.probe = small_probe()
    config.validate()
    output = study_output(config)
    text = run_probe(config.probe, config.checkpoint, output)
    assert output.name == "asked_probe.json"
    assert "Set context: 250 → TTT layers: 6 (2 layers), Non-TTT: 8 (2 layers)" in caplog.text
    assert output.with_suffix(".md").read_text() == text + "\n"
    assert output.with_suffix(".png").stat().st_size > 20_000
    found = json.loads(output.read_text())
    assert (found["receptive_field_frames"], found["chance"], found["step"]) == (24, 0.25, 2)
    assert found["ttt_layers"] == [1, 2]
    assert found["speech_frames"] == 173 + 160 + 182
    for task in ("code_words", "phrases"):
        asked = found["tasks"][task]
        assert asked["episodes"] == asked["clusters"] == 3
        # Told for 54 frames; asked at the first multiple of 16 that is 12 and 96 frames later.
        assert asked["distance_frames"] == {"0.5": 80 - 54, "4": 160 - 54}
        assert list(asked["conditions"]) == ["plain", "not_told", "state_reset", "inner_lr_0"]
        assert len({rows["4"]["true_value_nats"][0] for rows in asked["conditions"].values()}) == 4
        nats = asked["conditions"]["plain"]["4"]["true_value_nats"][0]
        assert 0.5 < nats / (6 * (math.log(352) + 8 * math.log(256))) < 1.5
    with pytest.raises(ValueError, match=r"asked_probe\.json, .* exists; .*probe\.overwrite"):
        run_probe(config.probe, config.checkpoint, output)


def test_words_are_those_of_the_main_speaker_and_codes_those_of_a_stream(trained_run):
    loaded = load_checkpoint(trained_run)
    recordings = read_manifest(SAMPLE / "train.jsonl")
    speeches, silence = read_speech(loaded, recordings, torch.device("cpu"))
    mimi = load_mimi(loaded.base, torch.device("cpu"))
    for speech, recording, number in zip(speeches, recordings, (1, 2, 3), strict=True):
        main = [word for word in recording.words if word.speaker == "SPEAKER_MAIN"]
        assert speech.starts[0] == int(main[0].start * 12.5)
        assert len(main) - 3 <= len(speech.starts) <= len(main) < len(recording.words)
        padding = {loaded.model.text_padding_token_id, loaded.model.end_of_text_padding_id}
        assert not padding & set(speech.codes[0, list(speech.starts)].tolist())
        audio = torch.from_numpy(dialogue(number).T.copy())[:, None]
        with torch.no_grad():
            whole = mimi.encode(audio).flatten(0, 1)
        assert (speech.codes[1:, : whole.shape[1]] == whole).float().mean() > 0.99
    # The user is exactly silent while Moshi speaks, long before the end.
    # (The other codes of the tiny codec drift with what it heard up to 20 s before.)
    assert (speeches[0].codes[9, -20:-5] == silence[0]).all()


def test_a_checkpoint_without_ttt_has_no_memory_to_take_away(tmp_path, caplog):
    caplog.set_level("INFO", "evaluation.recall.probe")
    overrides = ("ttt.enable=false", "mode=lora", "ttt.non_ttt_layer_context=6", "max_steps=1")
    checkpoint = run(tmp_path / "run", *overrides)
    output = tmp_path / "probe.json"
    run_probe(small_probe(tasks=["code_words"], episodes=1), str(checkpoint), output)
    assert "no TTT layers: no state to reset" in caplog.text
    assert "so there are no intervals" in caplog.text
    found = json.loads(output.read_text())["tasks"]["code_words"]["conditions"]
    assert list(found) == ["plain", "not_told"]
    assert found["plain"]["4"] == found["not_told"]["4"]
    assert found["plain"]["0.5"] != found["not_told"]["0.5"]
    assert found["plain"]["0.5"]["accuracy"][1:] == [None, None]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "probe"}, "mode=probe and checkpoint=RUN go together"),
        ({"checkpoint": "runs/a"}, "mode=probe and checkpoint=RUN go together; got mode=train"),
        ({"probe": Probe(tasks=["phrase"])}, "tasks must be some of code_words, phrases"),
        ({"probe": Probe(tasks=[])}, "got none"),
        ({"probe": Probe(distances=[])}, "at least one; got none"),
        ({"probe": Probe(distances=[1.0, 0.0])}, "above 0"),
        ({"probe": Probe(pairs=1)}, "pairs must be at least 2"),
        ({"probe": Probe(value_words=0)}, "value_words must be at least 1, got 0"),
        ({"probe": Probe(max_recordings=0)}, "max_recordings must be at least 1"),
        ({"probe": Probe(pause_frames=-1)}, "pause_frames must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**change).validate()


@pytest.mark.parametrize(
    "change, task, message",
    [
        ({"distances": [0.5, 9.0]}, "code_words", r"has \d+ frames, 3 recording.* 360 without repeating"),
        ({"distances": [0.5, 7.0]}, "phrases", r"2 recording.* 240 without repeating"),
        ({"distances": [0.5, 0.51]}, "phrases", "must rise, by at least a mini-batch of 4 frames"),
        ({"pairs": 30}, "phrases", r"probe\.pairs=30 phrases .* best recording, 0\.wav, has 19 \(120 timed"),
        ({"value_words": 3}, "phrases", "with 1 and 3 words of the main speaker"),
    ],
)
def test_recordings_that_are_too_short_or_silent_are_refused(build, speeches, change, task, message):
    model = build(ttt_layer_context=12, non_ttt_layer_context=12)
    with pytest.raises(ValueError, match=message):
        getattr(maker_of(model, speeches, replace(PROBE, **change)), task)()


def test_phrases_need_words_and_a_second_recording(build, speeches):
    model = build(ttt_layer_context=4, non_ttt_layer_context=4)
    wordless = [replace(speech, starts=()) for speech in speeches]
    with pytest.raises(ValueError, match=r"has 0 \(0 timed words .*probe\.tasks=\[code_words\]"):
        maker_of(model, wordless).phrases()
    with pytest.raises(ValueError, match=r"at least two recordings"):
        maker_of(model, speeches[:1]).phrases()
