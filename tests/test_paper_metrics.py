"""The paper metrics: a known likelihood gives the known accuracy, and batches are each clip alone."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from paper_data import (
    LEXICAL,
    RATE,
    SYNTACTIC,
    cut,
    write_gold,
    write_sblimp,
    write_swuggy,
)
from planted import known_nll, known_score, load, write_planted
from safetensors import safe_open
from training import compose_config
from training import run as train

from configs.typed import typed_config
from evaluation.paper_metrics.__main__ import run
from evaluation.paper_metrics.likelihood import ClipEncoder, batches_by_length, clip_nll
from evaluation.paper_metrics.salmon import PARTS
from evaluation.paper_metrics.scoring import SCORINGS, clip_scores, outcome
from evaluation.paper_metrics.settings import PaperMetricsConfig
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import ttt_layers
from moshi_ttt.loading import ModelConfig, find_base, load_mimi


@pytest.fixture(scope="module")
def planted(tmp_path_factory, private_cache):
    return write_planted(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def planted_model(planted):
    return load(planted)


@pytest.fixture(scope="module")
def mimi(private_cache):
    return load_mimi(find_base(ModelConfig("tiny")), "cpu")


@pytest.fixture(scope="module")
def slm21(tmp_path_factory):
    return write_sblimp(write_swuggy(tmp_path_factory.mktemp("data")))


def evaluate(output: Path, *overrides: str) -> Path:
    """What `python -m evaluation.paper_metrics output=OUTPUT OVERRIDES` does."""
    settings = ("baseline=tiny", "device=cpu", "bootstrap_draws=50", f"output={output}")
    return run(typed_config(compose_config(*settings, *overrides, name="paper_metrics"), PaperMetricsConfig))


def results(output: Path) -> dict:
    (path,) = output.glob("*results_*.json")
    return json.loads(path.read_text())


def accuracy(output: Path, task: str, metric: str = "acc", scoring: str = "none") -> float:
    return results(output)["results"][task][f"{metric},{scoring}"]


def encoder_of(mimi, model, text="-1", user="silence"):
    return ClipEncoder(mimi, model, text, user)


def clips_of(mimi, model, tmp_path, lengths=(9.2, 3, 14.6, 3)) -> list[torch.Tensor]:
    """Codes of clips of so many frames."""
    found = []
    for number, frames in enumerate(lengths):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, cut(number, frames), RATE)
        found.append(encoder_of(mimi, model).encode(path, frames * 0.08))
    return found


def assert_as_planted(model, clips) -> None:
    for codes, nll in zip(clips, clip_nll(model, clips), strict=True):
        assert nll.dtype == np.float32
        np.testing.assert_allclose(nll, known_nll(model, codes), rtol=0, atol=2e-5)


def test_the_nll_of_every_frame_and_codebook_is_the_known_one(planted_model, mimi, tmp_path):
    clips = clips_of(mimi, planted_model, tmp_path)
    assert [codes.shape[1] for codes in clips] == [10, 3, 15, 3]
    assert_as_planted(planted_model, clips)


@pytest.mark.parametrize(
    "shift, dim", [(1, 2), (-1, 2), (1, 1)]
)  # a frame late, a frame early, a codebook off
def test_logits_that_are_off_by_one_are_noticed(planted_model, mimi, tmp_path, shift, dim):
    def off_by_one(module, inputs, output):
        rolled = output.logits.roll(shift, dims=dim)
        output.logits = torch.where(rolled.isnan(), 0.0, rolled)
        return output

    clips = clips_of(mimi, planted_model, tmp_path)
    with planted_model.register_forward_hook(off_by_one), pytest.raises(AssertionError, match="Mismatched"):
        assert_as_planted(planted_model, clips)


def test_a_batch_of_unequal_clips_is_each_clip_alone_in_one_forward_pass(build, perturb, mimi, tmp_path):
    torch.manual_seed(1)
    model = perturb(build(ttt_layer_context=5, non_ttt_layer_context=3)).eval()
    clips = clips_of(mimi, model, tmp_path)
    together = clip_nll(model, clips)
    for codes, nll in zip(clips, together, strict=True):
        (alone,) = clip_nll(model, [codes])
        np.testing.assert_allclose(nll, alone, rtol=0, atol=1e-5)
        with torch.no_grad():
            output = model(codes[None])
        for (k, t), there in np.ndenumerate(output.mask[0].numpy()):
            assert np.isnan(nll[t, k]) == (not there)
            if there:
                expected = -output.logits[0, k, t].log_softmax(-1)[codes[1 + k, t]].item()
                assert nll[t, k] == pytest.approx(expected, abs=1e-5)
    assert all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(together, clip_nll(model, clips), strict=True)
    )


def test_streams_hold_the_clip_and_the_fillers(planted_model, mimi, tmp_path):
    soundfile.write(tmp_path / "a.wav", cut(3, 5), RATE)

    def encode(*fillers):
        return encoder_of(mimi, planted_model, *fillers).encode(tmp_path / "a.wav", 0.4)

    codes = encode("-1", "silence")
    assert (codes[0] == -1).all()
    assert torch.equal(codes[9:], mimi.encode(torch.zeros(1, 1, 5 * 1920))[0])
    assert not torch.equal(codes[1:9], codes[9:])
    padded = encode("pad", "-1")
    assert (padded[0] == planted_model.text_padding_token_id).all()
    assert torch.equal(padded[1:9], codes[1:9])
    assert (padded[9:] == -1).all()


def test_batches_hold_clips_of_like_length_and_no_more_frames_than_allowed():
    assert batches_by_length([5, 9, 3, 9, 40], 20) == [[4], [1, 3], [0, 2]]


def test_scores_by_hand():
    nll = np.array([[1.0, 2.0, 4.0], [3.0, np.nan, np.nan]], np.float32)
    assert clip_scores(nll) == pytest.approx(
        {
            "w100_mean": -406 / 202,
            "w100_sum": -406,
            "semantic_mean": -2,
            "semantic_sum": -4,
            "acoustic_mean": -3,
            "acoustic_sum": -6,
            "uniform_mean": -10 / 4,
            "uniform_sum": -10,
        }
    )
    assert set(clip_scores(nll)) == set(SCORINGS)
    assert [outcome(-1, -2), outcome(-2, -1), outcome(-2, -2), outcome(-5.0, -5.000001)] == [1, 0, 0.5, 0.5]
    assert outcome(-5.0, -5.00002) == 1


def test_a_checkpoint_is_scored_with_its_own_settings_in_float32(slm21, mimi, tmp_path):
    run_dir = train(tmp_path / "run", "param_dtype=bfloat16", "ttt.gate_init=0.5")
    output = evaluate(
        tmp_path / "out", "baseline=null", f"checkpoint={run_dir}", f"data.slm21={slm21}", "tasks=[sblimp]"
    )
    loaded = load_checkpoint(run_dir)
    assert loaded.model.dtype == torch.bfloat16
    assert ttt_layers(loaded.model)
    path = slm21 / "syntactic" / "dev" / "binding1a.wav"
    codes = encoder_of(mimi, loaded.model).encode(path, soundfile.info(path).duration)
    (known,) = clip_nll(loaded.model.float(), [codes])
    np.testing.assert_allclose(kept_nll(output, "sblimp_dev")["binding1a"], known, rtol=0, atol=1e-5)
    config = results(output)["config"]
    assert (config["step"], config["param_dtype"]) == (2, "bfloat16")
    assert config["checkpoint"].endswith("run/checkpoints/checkpoint_000002/consolidated")


def kept_nll(output: Path, task: str) -> dict[str, np.ndarray]:
    """NLL `[T, dep_q]` by clip, from the files."""
    found = {}
    for path in sorted((output / "nll" / task).iterdir()):
        with safe_open(path, "numpy") as file:
            ends = np.cumsum(file.get_tensor("frames"))[:-1]
            names = json.loads(file.metadata()["about"])["clips"]
            found |= dict(zip(names, np.split(file.get_tensor("nll"), ends), strict=True))
    return found


class Planner:
    """Writes pairs of clips whose outcome under the planted model is known, by asking its tables."""

    def __init__(self, model, mimi):
        self.model, self.encoder, self.number = model, encoder_of(mimi, model), 0

    def write(self, right: Path, wrong: Path, wanted: float) -> None:
        right.parent.mkdir(parents=True, exist_ok=True)
        self.number += 2
        lengths = (4 + self.number % 5, 4.5 + self.number % 3)
        for path, number, frames in zip((right, wrong), (0, 1), lengths, strict=True):
            soundfile.write(path, cut(self.number + number, frames), RATE)
        if wanted == 0.5:
            shutil.copy(right, wrong)
            return
        scores = [self.score(path) for path in (right, wrong)]
        assert abs(scores[0] - scores[1]) > 1e-3
        if (scores[0] > scores[1]) != (wanted == 1):
            held = right.with_suffix(".held")
            right.rename(held), wrong.rename(right), held.rename(wrong)

    def score(self, path: Path) -> float:
        codes = self.encoder.encode(path, soundfile.info(path).duration)
        return known_score(known_nll(self.model, codes))


# Outcomes of an id's voices, and the frequency of its word.
WORDS = {
    "1": ((1, 1), "17"),
    "2": ((1, 0, 0), ""),
    "30": ((0, 0), "0.5"),
    "4": ((0.5, 0.5), "3"),
    "5": ((0.5, 1), "0"),
    "06": ((1, 0.5), ""),
}
# Outcomes by type and id: ids are used in every type.
SENTENCES = {"agreement": {"1": 1, "2": 1, "3": 0.5, "4": 1}, "binding": {"1": 0, "2": 1}}


def plan_slm21(planner: Planner, root: Path) -> None:
    rows = []
    folder = root / "lexical" / "dev"
    for word, (outcomes, frequency) in WORDS.items():
        for voice, wanted in enumerate(outcomes):
            stems = [f"{word}-{voice}-{kind}" for kind in ("word", "non")]
            planner.write(*(folder / f"{stem}.wav" for stem in stems), wanted)
            for stem, correct, known in zip(stems, "10", (frequency, ""), strict=True):
                values = (stem, word, f"voice{voice}", known, "w" * int(correct), "", "3", correct)
                rows.append(dict(zip(LEXICAL, values, strict=True)))
    random.Random(0).shuffle(rows)
    write_gold(folder, tuple(reversed(LEXICAL)), rows)
    rows = []
    folder = root / "syntactic" / "dev"
    for kind, outcomes in SENTENCES.items():
        for number, wanted in outcomes.items():
            stems = [f"{kind}_{number}_{ending}" for ending in ("good", "bad")]
            planner.write(*(folder / f"{stem}.wav" for stem in stems), wanted)
            for stem, correct in zip(stems, "10", strict=True):
                rows.append(dict(zip(SYNTACTIC, (stem, number, "v", kind, "s", "", correct), strict=True)))
    random.Random(1).shuffle(rows)
    write_gold(folder, SYNTACTIC, rows)


def plan_others(planner: Planner, root: Path) -> None:
    for story, wanted in enumerate((1, 0, 1, 1)):
        names = [
            f"{2 * story + n}_aa-{story}_{label}.wav" for n, label in enumerate(("correct", "incorrect"))
        ]
        planner.write(*(root / "tSC" / name for name in names), wanted)
    for speaker, outcomes in {"anna": (1, 0.5), "bob": (1, 0)}.items():
        for story, wanted in enumerate(outcomes):
            names = [f"{story}_{label}.wav" for label in ("correct", "incorrect")]
            planner.write(*(root / "sSC" / speaker / name for name in names), wanted)
    for n, part in enumerate(PARTS):
        for sample in range(2):
            names = [f"sample_{sample}_{label}.wav" for label in (0, 1)]
            planner.write(*(root / "salmon" / part / name for name in names), float(n < 3 or sample == 1))


def test_a_known_likelihood_gives_exactly_the_known_accuracy(planted, planted_model, mimi, tmp_path):
    planner, data = Planner(planted_model, mimi), tmp_path / "data"
    plan_slm21(planner, data)
    plan_others(planner, data)
    folders = (
        f"data.slm21={data}",
        f"data.tsc={data}/tSC",
        f"data.ssc={data}/sSC",
        f"data.salmon={data}/salmon",
    )
    output = evaluate(tmp_path / "out", f"baseline={planted}", *folders, "batch_frames=40", "shard_clips=7")
    assert accuracy(output, "swuggy_dev") == round((1 + 1 / 3 + 0 + 0.5 + 0.75 + 0.75) / 6, 6)
    assert accuracy(output, "swuggy_dev", "acc_in_vocab") == 0.5  # ids 1, 30, 4
    assert accuracy(output, "sblimp_dev") == round(4.5 / 6, 6)
    assert accuracy(output, "sblimp_dev", "acc_macro") == round((3.5 / 4 + 1 / 2) / 2, 6)
    assert accuracy(output, "tsc") == 0.75
    assert accuracy(output, "ssc") == (1 + 0.25) / 2
    found = [accuracy(output, f"salmon_{part}") for part in PARTS]
    assert found == [1] * 3 + [0.5] * 5
    assert accuracy(output, "salmon") == round((3 + 2.5) / 8, 6)
    known = {p.stem: planner.score(p) for p in (data / "lexical" / "dev").glob("*.wav")}
    lines = (output / "submission" / "lexical" / "dev.txt").read_text().splitlines()
    assert {stem: float(score) for stem, score in map(str.split, lines)} == pytest.approx(known, abs=1e-5)
    assert len(lines) == len(known)


def test_accuracies_are_all_that_the_kept_likelihoods_say(slm21, tmp_path):
    """Every scoring from the files of likelihoods, by the official score's definition written down again."""
    output = evaluate(tmp_path / "out", f"data.slm21={slm21}", "tasks=[swuggy]", "shard_clips=5")
    scores = {name: clip_scores(nll) for name, nll in kept_nll(output, "swuggy_dev").items()}
    with (slm21 / "lexical" / "dev" / "gold.csv").open() as file:
        gold = list(csv.DictReader(file))
    assert {row["filename"] for row in gold} == set(scores)
    for scoring in SCORINGS:
        by_id = {}
        for word in {row["id"] for row in gold}:
            wins = []
            for voice in ("v1", "v2"):
                pair = {
                    r["correct"]: scores[r["filename"]][scoring]
                    for r in gold
                    if (r["id"], r["voice"]) == (word, voice)
                }
                wins.append(float(pair["1"] > pair["0"]))
            by_id[word] = np.mean(wins)
        assert accuracy(output, "swuggy_dev", "acc", scoring) == round(
            float(np.mean(list(by_id.values()))), 6
        )
        known = [by_id[word] for word in ("1", "3")]
        assert accuracy(output, "swuggy_dev", "acc_in_vocab", scoring) == np.mean(known)
