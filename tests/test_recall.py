"""The recall benchmark asks what it says, of models of one size, and leaks nothing."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from moshi.utils.compile import no_compile, no_cuda_graph

from evaluation.recall.arms import (
    ARMS,
    Arm,
    Size,
    build_arm,
    forgetting_at,
    non_causal_update,
    parameters,
)
from evaluation.recall.report import write_report
from evaluation.recall.running import run_jobs, stored_results
from evaluation.recall.scoring import Scoring, answer_stream, capacity, score_arm
from evaluation.recall.settings import RecallConfig, jobs_of
from evaluation.recall.speech import speech_codes, speech_digest
from evaluation.recall.studies import STUDIES, Variant, chosen, varied
from evaluation.recall.study_report import draw_study, study_table, write_study
from evaluation.recall.task import (
    MOSHI_SEMANTIC,
    PADDING,
    TEXT,
    USER_ACOUSTIC,
    USER_SEMANTIC,
    Vocabulary,
    draw_episodes,
    told_until,
)
from evaluation.recall.training import Training, _backward_in_chunks, text_predictions, train_arm
from evaluation.statistics import mean_interval
from finetune.loss import LossWeights, loss_sums, weighted_targets

VOCABULARY = Vocabulary(speech=32, keys=8, values=4)
SIZE = Size(dim=32, num_layers=2, num_heads=2, window_frames=5)
SETTINGS = {"mini_batch_size": 8, "gate_init": 1.0}
K = 8
SAMPLES = Path(__file__).parents[1] / "sample_data" / "audio"
STORE = Path(__file__).parents[1] / "benchmarks" / "results" / "recall"


@pytest.fixture
def speech():
    return torch.randint(0, VOCABULARY.speech, (2, 400), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def episodes(speech):
    return draw_episodes(VOCABULARY, speech, 6, 4, 20, 2, torch.Generator().manual_seed(1))


def model_of(arm):
    return build_arm(arm, SIZE, VOCABULARY, SETTINGS, seed=0).eval()


def test_an_episode_tells_pairs_then_speaks_then_asks(episodes, speech):
    first_key, first_value = VOCABULARY.speech, VOCABULARY.speech + VOCABULARY.keys
    for row, answers in zip(episodes.codes, episodes.answers, strict=True):
        told = {int(row[USER_SEMANTIC, 3 * p]): int(row[USER_ACOUSTIC, 3 * p]) for p in range(4)}
        assert len(told) == 4
        assert all(first_key <= key < first_value <= value < VOCABULARY.ask for key, value in told.items())
        between = row[USER_SEMANTIC:, told_until(4) : told_until(4) + 20]
        assert between.max() < VOCABULARY.speech
        for frame, answer in zip(episodes.answer_frames, answers, strict=True):
            assert row[USER_ACOUSTIC, frame - 2] == row[USER_ACOUSTIC, frame - 1] == VOCABULARY.ask
            assert told[int(row[USER_SEMANTIC, frame - 2])] == first_value + answer
            assert row[MOSHI_SEMANTIC, frame] == first_value + answer
            assert row[TEXT, frame] == PADDING + 1 + answer
        assert (row[TEXT] != PADDING).sum() == 2
    runs = {tuple(run) for run in speech.repeat(1, 2).unfold(1, 20, 1).flatten(0, 1).tolist()}
    assert tuple(episodes.codes[0, USER_SEMANTIC, told_until(4) : told_until(4) + 20].tolist()) in runs


def test_accuracy_counts_the_asked_frames_alone(episodes):
    right = episodes.codes[:, TEXT].clone()
    assert episodes.accuracy(right) == 1.0
    right[:, 0] += 1
    assert episodes.accuracy(right) == 1.0
    right[:3, episodes.answer_frames[0]] = PADDING
    assert episodes.accuracy(right) == 0.75


def test_all_arms_have_the_same_size():
    for size, settings in ((SIZE, SETTINGS), (Size(), {"mini_batch_size": 16, "num_heads": 1})):
        counts = {
            name: parameters(build_arm(arm, size, VOCABULARY, settings, 0)) for name, arm in ARMS.items()
        }
        assert max(counts.values()) / min(counts.values()) < 1.02, counts


def test_the_non_causal_update_shows_later_frames_of_the_mini_batch_and_no_others(episodes):
    model = model_of(Arm("ttt_linear"))
    codes, frame = episodes.codes, 2 * K + 3
    changed = codes.clone()
    changed[:, USER_SEMANTIC, frame] = (changed[:, USER_SEMANTIC, frame] + 1) % VOCABULARY.speech

    @torch.no_grad()
    def first_difference():
        differs = (model(codes).text_logits != model(changed).text_logits).any(-1).any(0).any(0)
        return int(differs.nonzero()[0])

    assert first_difference() == frame + 1  # step s hears frame s - 1
    with non_causal_update(model):
        assert first_difference() == 2 * K
    assert first_difference() == frame + 1


@pytest.mark.parametrize("name", ["attention_window", "ttt_linear", "ttt_mlp_3", "state_reset"])
def test_streamed_answers_are_those_of_whole_passes(name, speech):
    model = model_of(ARMS[name])
    scoring = Scoring(pairs=4, distances=[0.5, 4], episodes=6)
    for _, score in score_arm(model, ARMS[name], scoring, VOCABULARY, speech, SIZE.receptive_field):
        assert score["same"] == 1.0


@torch.no_grad()
def test_forgetting_is_the_same_in_a_stream_and_in_a_whole_pass(episodes):
    model = model_of(Arm("ttt_mlp"))
    user, at = episodes.codes[:, USER_SEMANTIC:], 13
    said = answer_stream(model, user, forget_at=at)
    heard = torch.cat((said, user), dim=1)
    plain = model(heard).text_logits
    with forgetting_at(model, at):
        forgot = model(heard).text_logits
        assert torch.equal(forgot[:, 0].argmax(-1), said[:, TEXT])
    assert torch.equal(plain[:, 0].argmax(-1), text_predictions(model, heard))
    assert (plain - forgot)[:, :, :at].abs().max() <= 1e-5
    assert (plain - forgot)[:, :, at:].abs().max() > 1e-4


def test_a_memory_learns_what_a_window_cannot(speech):
    training = Training(
        max_pairs=2, max_distance_frames=16, questions=1, max_steps=500, cooldown_steps=100, learned=0.98
    )
    scoring = Scoring(pairs=2, distances=[10], episodes=64)
    accuracy = {}
    for name in ("ttt_linear", "attention_window"):
        model = model_of(ARMS[name])
        train_arm(model, ARMS[name], training, VOCABULARY, speech, 0, lambda step, loss: None)
        scores = dict(score_arm(model, ARMS[name], scoring, VOCABULARY, speech, SIZE.receptive_field))
        accuracy[name] = scores["10"]["streaming"]
    assert accuracy["ttt_linear"] >= 0.9
    assert accuracy["attention_window"] <= 0.5  # chance is 0.25


@pytest.mark.parametrize("carry", [True, False])
def test_training_on_chunks_adds_up_to_the_episode_where_nothing_is_cut(episodes, carry):
    model = model_of(Arm("ttt_linear"))
    targets = weighted_targets(model, episodes.codes, LossWeights(1.0, 0.01))
    totals = targets.totals().float()
    whole = loss_sums(model(episodes.codes), targets) / totals
    one_chunk = _backward_in_chunks(model, episodes.codes, totals, 40, carry)
    # Of audio, the frame that fills up the chunk lets the last frame's delayed code be scored as well.
    assert (one_chunk - whole)[TEXT].abs() <= 1e-5
    two_chunks = _backward_in_chunks(model, episodes.codes, totals, 24, carry)
    assert ((two_chunks - whole)[TEXT].abs() <= 1e-5) == carry


def test_jobs_are_run_once_and_reported(tmp_path, speech, capsys):
    config = RecallConfig(
        arms=["attention_window", "ttt_mlp", "state_reset"],
        seeds=2,
        store=str(tmp_path / "store"),
        output=str(tmp_path / "recall.json"),
        ttt=SETTINGS,
        size=SIZE,
        vocabulary=VOCABULARY,
        training=Training(max_steps=4, cooldown_steps=2, batch_size=4),
        scoring=Scoring(pairs=2, distances=[0.5, 2], episodes=4),
    )
    jobs = jobs_of(config, "of this speech")
    assert [(job.arm, job.seed) for job in jobs] == [
        ("attention_window", 0),
        ("ttt_mlp", 0),
        ("attention_window", 1),
        ("ttt_mlp", 1),
    ]
    store = tmp_path / "store"
    run_jobs(jobs[:2], speech, store, workers=1)
    first = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert len(first) == 2
    run_jobs(jobs, speech, store, workers=2)
    assert len(list(store.iterdir())) == 4
    assert all((store / name).stat().st_mtime_ns == when for name, when in first.items())
    table = write_report(stored_results(jobs, store), config)
    report = json.loads((tmp_path / "recall.json").read_text())
    assert report["window_frames"] == 5
    assert report["receptive_field_frames"] == 8
    assert report["chance"] == 0.25
    assert set(report["arms"]) == set(report["seeds"]) == {"attention_window", "ttt_mlp", "state_reset"}
    assert set(report["arms"]["ttt_mlp"]["streaming"]) == {"0.5", "2"}
    mean, low, high = report["arms"]["ttt_mlp"]["offline"]["2"]
    assert 0 <= low <= mean <= high <= 1
    assert table.count("\n") == 4
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    other = jobs_of(RecallConfig(arms=["ttt_mlp"], seeds=1), "of this speech")[0]
    assert other.file_name not in {job.file_name for job in jobs}


def test_a_study_varies_what_it_names_and_nothing_else(tmp_path, speech):
    config = RecallConfig(
        study="capacity",
        seeds=1,
        ttt=dict(SETTINGS),
        size=SIZE,
        vocabulary=VOCABULARY,
        training=Training(max_steps=4, cooldown_steps=2, batch_size=4),
        scoring=Scoring(pairs=2, distances=[10], episodes=4),
    )
    before = asdict(config)
    variant = Variant("narrow", {"ttt.num_heads": 1, "scoring.capacity_pairs": [1, 3]}, ("ttt_linear",))
    narrow = varied(config, variant)
    assert asdict(config) == before
    assert narrow.ttt == SETTINGS | {"num_heads": 1}
    assert narrow.scoring.capacity_pairs == [1, 3]
    jobs = jobs_of(narrow, "of this speech")
    run_jobs(jobs, speech, tmp_path / "store", workers=1)
    results = {"narrow": stored_results(jobs, tmp_path / "store")}
    table = write_study(results, narrow, tmp_path / "study.json")
    entry = json.loads((tmp_path / "study.json").read_text())["narrow"]["ttt_linear"]
    assert set(entry["capacity"]) == {"1", "3"}
    assert "| narrow | TTT-Linear | 1 | 4 |" in table
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_memories_asked_for_other_numbers_of_pairs_share_a_table(tmp_path):
    def entry(right):
        return {
            "capacity": {count: [share, None, None] for count, share in right.items()},
            "streaming": {"10": [1.0, None, None]},
            "seeds": 1,
            "training_steps": [8],
            "training_loss": [0.5],
        }

    study = {
        "few": {"ttt_mlp": entry({"1": 1.0, "16": 0.9})},
        "many": {"ttt_linear": entry({"1": 1.0, "2": 0.95, "16": 0.89, "48": 0.95})},
    }
    first, _, few, many = study_table(study, "10").splitlines()
    assert first.endswith("| 1 pairs | 2 pairs | 16 pairs | 48 pairs | pairs held |")
    assert few == "| few | TTT-MLP | 1 | 8 | 0.500 | 100.0 |  | 90.0 |  | 16 |"
    # What is right again behind a number that is not is no capacity.
    assert many == "| many | TTT-Linear | 1 | 8 | 0.500 | 100.0 | 95.0 | 89.0 | 95.0 | 2 |"
    draw_study(study, "two", "10", 1 / 16, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


@pytest.mark.parametrize("study", list(STUDIES))
def test_every_variant_of_a_study_is_a_model_that_can_be_built(study):
    variants = [(v.name, varied(RecallConfig(), v)) for v in STUDIES[study]()]
    assert len({name for name, _ in variants}) == len(variants)
    assert len({repr(asdict(config)) for _, config in variants}) == len(variants)
    for _, config in variants:
        for arm in config.arms:
            with torch.device("meta"):
                build_arm(ARMS[arm], config.size, config.vocabulary, config.ttt, 0)


def test_variants_are_chosen_by_name_and_by_arm():
    def names(**settings):
        return [variant.name for variant in chosen(RecallConfig(study="ablation", **settings))]

    assert names(variants=["base_lr 32.0", "as in the table"]) == ["base_lr 32.0", "as in the table"]
    for_mlps = {name for name in names() if name.startswith(("inner_init", "inner_lr_factors"))}
    assert len(for_mlps) == 4
    assert set(names()) - set(names(arms=["ttt_linear"])) == for_mlps
    with pytest.raises(ValueError, match="has the variants as in the table; base_lr 0.1; "):
        names(variants=["base_lr 2"])
    with pytest.raises(ValueError, match="no variant with the arms attention_full"):
        names(arms=["attention_full"])
    one = Variant("x", arms=("ttt_mlp", "non_causal"))
    assert varied(RecallConfig(arms=["ttt_linear", "ttt_mlp"]), one).arms == ["ttt_mlp"]


def test_no_job_goes_on_when_the_time_is_over(tmp_path, speech, caplog):
    config = RecallConfig(
        arms=["attention_window", "ttt_linear"],
        seeds=1,
        size=SIZE,
        vocabulary=VOCABULARY,
        training=Training(max_steps=100_000, batch_size=4, give_up_steps=100_000),
        scoring=Scoring(pairs=2, distances=[1], episodes=4),
    )
    store = tmp_path / "store"
    with caplog.at_level("INFO"):
        run_jobs(jobs_of(config, "of this speech"), speech, store, workers=1, max_minutes=0.15)
    assert list(store.iterdir()) == []
    # Two jobs that end at once are told of in any order.
    assert {r.message for r in caplog.records if "not done" in r.message} == {
        "attention_window, seed 0: not done: max_minutes are over",
        "ttt_linear, seed 0: not done: max_minutes are over",
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_learns_and_answers_as_the_cpu_does(speech):
    training = Training(max_pairs=2, max_distance_frames=8, max_steps=20, cooldown_steps=10, batch_size=8)
    scoring = Scoring(pairs=2, distances=[1], episodes=8, capacity_pairs=[1], capacity_distance=1)
    learned = {}
    for device in ("cpu", "cuda"):
        model = model_of(ARMS["ttt_mlp"]).to(device)
        with no_compile(), no_cuda_graph():
            learned[device] = train_arm(
                model, Arm("ttt_mlp"), training, VOCABULARY, speech, 0, lambda *_: None
            )
            for _, score in score_arm(model, Arm("ttt_mlp"), scoring, VOCABULARY, speech, 8):
                assert score["same"] == 1.0
            assert set(dict(capacity(model, scoring, VOCABULARY, speech, 8))) == {"1"}
    assert learned["cuda"].loss == pytest.approx(learned["cpu"].loss, abs=1e-2)


def test_the_interval_is_students():
    interval = mean_interval([0.1, 0.2, 0.3, 0.4], 0.0, 1.0)
    half = 3.182446 * math.sqrt(0.05 / 3) / 2  # t of 3 degrees of freedom
    assert interval.mean == pytest.approx(0.25)
    assert (interval.low, interval.high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-6)
    assert mean_interval([1.0, 0.9], 0.0, 1.0).high == 1.0
    assert math.isnan(mean_interval([0.5], 0.0, 1.0).low)


def test_speech_is_real_and_varied():
    codes = speech_codes(SAMPLES, 256)
    assert codes.shape[0] == 2
    assert codes.shape[1] > 400
    assert len(codes[0].unique()) > 20
    with pytest.raises(ValueError, match=r"holds no recording"):
        speech_codes(Path(__file__).parent, 256)
    with pytest.raises(ValueError, match=r"at least"):
        speech_codes(SAMPLES, 64)


def test_speech_is_known_by_its_recordings(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "notes.json").write_text("{}")
    first = speech_digest(tmp_path)
    (tmp_path / "notes.json").unlink()
    assert speech_digest(tmp_path) == first
    (tmp_path / "b.wav").write_bytes(b"other")
    assert speech_digest(tmp_path) != first
    # The stored results, by which this folder's digest is the one they were made with.
    stored = {json.loads(path.read_text())["job"]["speech_sha256"] for path in STORE.glob("*.json")}
    assert stored == {speech_digest(SAMPLES)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arms": ["memory"]}, "arms must be some of"),
        ({"mode": "learn"}, "mode must be"),
        ({"seeds": 0}, "at least 1"),
        ({"study": "depth"}, "study must be"),
        ({"device": "tpu"}, "device must be"),
        ({"max_minutes": 0}, "max_minutes must be above 0"),
        ({"variants": ["base_lr 32.0"]}, "the table has no variants"),
        ({"scoring": Scoring(pairs=40)}, "as many keys"),
        ({"training": Training(max_steps=100, cooldown_steps=100)}, "above"),
        ({"training": Training(chunk_frames=50)}, "whole number of mini-batches of 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**change).validate()


def test_the_stored_table_shows_what_the_readme_says():
    report = json.loads((STORE.parent / "recall.json").read_text())
    arms, chance = report["arms"], report["chance"]
    assert report["seeds"] == dict.fromkeys(ARMS, 5)
    sizes = [arm["parameters"] for arm in arms.values()]
    assert max(sizes) / min(sizes) < 1.02
    for memory in ("ttt_linear", "ttt_mlp", "ttt_mlp_3", "persistent_on", "persistent_off"):
        right = arms[memory]["streaming"]
        assert all(right[distance][0] >= 0.99 for distance in ("1", "2", "5", "10", "20", "50", "200")), (
            memory
        )
        assert right == arms[memory]["offline"]
    for memory in ("attention_window", "inner_lr_0", "state_reset"):
        for distance in ("1", "2", "5", "10", "20", "50", "200"):
            assert abs(arms[memory]["streaming"][distance][0] - chance) <= 0.03, (memory, distance)
    for arm in arms.values():
        assert arm["stream_equals_offline"] == 1.0
    leak = arms["non_causal"]
    assert leak["offline"]["10"][0] == 1.0
    assert leak["streaming"]["10"][2] <= 0.5


def test_a_stored_memory_holds_24_pairs():
    study = json.loads((STORE.parent / "recall_capacity.json").read_text())
    held = [arm["capacity"]["24"][0] for arms in study.values() for arm in arms.values()]
    assert max(held) >= 0.9
