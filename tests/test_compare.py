"""Two models on the same pairs: differences, intervals and tests as computed by hand and by scipy."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluation.compare import compare, comparison_table, main, read_results, verdict
from evaluation.paper_metrics.accuracy import estimates
from evaluation.paper_metrics.pairs import Pair, TaskData
from evaluation.paper_metrics.results import score_task, write_results
from evaluation.statistics import macro_intervals, mcnemar, ratio_intervals, standard_errors

VOICES = 2


def plan(limit: int | None = None, **identity: str) -> dict:
    protocol = {"seed": 0, "limit": limit, "user_filler": "silence"} | {
        k: v for k, v in identity.items() if k in ("user_filler",)
    }
    data = {
        name: {"gold_sha256": identity.get("gold", "g"), "clips_sha256": "c"}
        for name in ("swuggy_dev", "salmon_bg_alignment", "salmon_rir_consistency")
    }
    about = {
        "model": {"baseline": identity.get("model", "m")},
        "git_hash": None,
        "date": "2026-01-01T00-00-00",
    }
    return {"identity": {"model": {}, "protocol": protocol, "data": data}, "about": about}


def write(folder: Path, outcomes: dict[str, np.ndarray], **identity) -> Path:
    """Results whose outcomes are those given, `[ids, voices]`, under every scoring; 0.5 is a tie."""
    tasks = []
    for name, wanted in outcomes.items():
        pairs, nll = [], {}
        for (number, voice), value in np.ndenumerate(wanted):
            stem = f"{number:03d}_{voice}"
            word = name == "swuggy_dev"
            pairs.append(
                Pair(
                    f"{number:03d}",
                    f"v{voice}",
                    f"{stem}+",
                    f"{stem}-",
                    "",
                    number % 2 == 0 if word else None,
                )
            )
            nll[f"{stem}+"] = np.full((2, 8), 2.0, np.float32)
            nll[f"{stem}-"] = np.full((2, 8), 1.0 + value * 2, np.float32)
        clips = {clip: folder / clip for clip in nll}
        data = TaskData(name, "id", pairs, clips, "c", "g", None, len(wanted))
        tasks.append(score_task(data, nll))
    folder.mkdir()
    write_results(folder, plan(**identity), tasks, draws=20)
    return folder


@pytest.fixture
def drawn():
    """Outcomes of A and B, `[ids, voices]`: B is right more often, and its voices agree with each other."""
    random = np.random.default_rng(3)
    a = random.choice([0, 0.5, 1], p=[0.5, 0.1, 0.4], size=(60, VOICES))
    b = np.where(random.random((60, 1)) < 0.4, 1.0, a)
    return a, b


def test_differences_intervals_and_mcnemar(drawn, tmp_path):
    a, b = drawn
    folders = [write(tmp_path / name, {"swuggy_dev": values}) for name, values in (("a", a), ("b", b))]
    found = {(c.metric, c.scoring): c for c in compare(*map(read_results, map(str, folders)))}
    c = found["acc", "w100_mean"]
    assert (c.first, c.second) == pytest.approx((a.mean(), b.mean()))
    assert c.difference == pytest.approx(b.mean() - a.mean())
    assert c.ids == 60
    # Ids are drawn, not pairs: voices of one id say much the same.
    by_id = (b - a).mean(1)
    half = 1.96 * stats.sem(by_id)
    assert c.low == pytest.approx(by_id.mean() - half, abs=0.2 * half)
    assert c.high == pytest.approx(by_id.mean() + half, abs=0.2 * half)
    scipys = stats.bootstrap(
        (by_id,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    )
    assert (c.low, c.high) == pytest.approx(tuple(scipys.confidence_interval), abs=0.05 * half)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    assert (c.only_first, c.only_second) == (only_a, only_b)
    assert c.p_mcnemar == pytest.approx(stats.binomtest(only_b, only_a + only_b).pvalue)
    assert c.verdict == "B is better"
    known = found["acc_in_vocab", "w100_mean"]
    assert known.ids == 30
    assert known.difference == pytest.approx((b - a)[::2].mean())
    other_way = compare(*map(read_results, map(str, folders[::-1])))[0]
    assert other_way.verdict == "A is better"
    assert other_way.difference == pytest.approx(-c.difference)


def test_an_interval_over_0_is_no_difference_shown(tmp_path, capsys):
    random = np.random.default_rng(0)
    a, b = random.integers(0, 2, (2, 40, 1)).astype(float)
    folders = [write(tmp_path / name, {"swuggy_dev": values}) for name, values in (("a", a), ("b", b))]
    main([*map(str, folders), "--output", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("| swuggy_dev |")]
    assert row.endswith("| no difference shown |")
    content = json.loads((tmp_path / "c.json").read_text())["comparisons"][0]
    assert content["low"] < 0 < content["high"]
    assert content["verdict"] == "no difference shown"
    assert [verdict(0.0, 0.1), verdict(0.01, 0.1), verdict(-0.2, -0.1)] == [
        "no difference shown",
        "B is better",
        "A is better",
    ]
    assert verdict(float("nan"), float("nan")).startswith("no difference shown (too few")


def test_parts_of_salmon_count_the_same(tmp_path):
    parts = {"salmon_bg_alignment": np.zeros((10, 1)), "salmon_rir_consistency": np.zeros((30, 1))}
    better = {**parts, "salmon_bg_alignment": np.ones((10, 1))}
    folders = [write(tmp_path / "a", parts), write(tmp_path / "b", better)]
    found = compare(*map(read_results, map(str, folders)))
    (whole,) = [c for c in found if (c.task, c.scoring) == ("salmon", "w100_mean")]
    assert (whole.first, whole.second, whole.difference) == (0, 0.5, 0.5)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"gold": "h"}, r'swuggy_dev\.gold_sha256 "g" there, "h" here'),
        ({"user_filler": "-1"}, r'protocol\.user_filler "silence" there, "-1" here'),
        ({"limit": 3}, r"protocol\.limit null there, 3 here"),
    ],
)
def test_results_of_other_data_or_protocol_are_refused_with_what_differs(tmp_path, other, message):
    outcomes = {"swuggy_dev": np.ones((6, 1))}
    folders = [write(tmp_path / "a", outcomes), write(tmp_path / "b", outcomes, **other)]
    with pytest.raises(ValueError, match=f"not results of the same data and protocol: .*{message}"):
        compare(*map(read_results, map(str, folders)))


def test_tasks_of_one_alone_are_named_and_none_in_common_is_refused(tmp_path):
    ones = np.ones((6, 1))
    both = write(tmp_path / "both", {"swuggy_dev": ones, "salmon_bg_alignment": ones})
    one, other = (write(tmp_path / name, {name: ones}) for name in ("swuggy_dev", "salmon_bg_alignment"))
    pair = [read_results(str(folder)) for folder in (both, one)]
    table = comparison_table(*pair, compare(*pair))
    assert "Only in A, not compared: salmon_bg_alignment" in table
    with pytest.raises(ValueError, match="no task in common"):
        compare(read_results(str(one)), read_results(str(other)))


def test_partial_results_say_so_wherever_they_appear(tmp_path):
    ones = {"swuggy_dev": np.ones((6, 1))}
    pair = [read_results(str(write(tmp_path / name, ones, limit=6))) for name in "ab"]
    table = comparison_table(*pair, compare(*pair))
    assert "PARTIAL RESULTS: 6 ids of each task" in table
    assert "| swuggy_dev (partial) |" in table
    assert "- swuggy_dev (partial):" in table


def test_a_folder_without_results_is_told_apart_from_one_that_is_not_finished(tmp_path):
    write(tmp_path / "runs", {"swuggy_dev": np.ones((6, 1))}).rename(tmp_path / "inner")
    (tmp_path / "outer").mkdir()
    (tmp_path / "inner").rename(tmp_path / "outer" / "inner")
    with pytest.raises(SystemExit, match=f"did you mean {tmp_path}/outer/inner"):
        main([str(tmp_path / "outer"), str(tmp_path / "outer")])
    (tmp_path / "outer" / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="was not finished, start it again"):
        read_results(str(tmp_path / "outer"))


def test_mcnemar_by_hand():
    assert mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(0, 0) == 1


def test_standard_errors_by_hand():
    values = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 1.0], [0.5, 1.0]])
    assert standard_errors(values) == pytest.approx([np.sqrt((0.25 + 0.25) / 3 / 4), 0])
    assert np.isnan(standard_errors(values[:1])).all()


def test_many_draws_in_blocks_are_those_of_one(monkeypatch):
    values = np.random.default_rng(0).random((50, 2))
    once = ratio_intervals(values, np.ones_like(values), 200)
    monkeypatch.setattr("evaluation.statistics._BLOCK", 50 * 7)
    blocks = ratio_intervals(values, np.ones_like(values), 200)
    # The last bit of a product depends on its size.
    assert [astuple(one) for one in blocks] == [pytest.approx(astuple(one), rel=1e-12) for one in once]


def test_the_mean_over_types_and_its_interval():
    random = np.random.default_rng(0)
    groups = [random.integers(0, 2, (size, 1)).astype(float) for size in (400, 40)]
    (interval,) = macro_intervals(groups, 4000)
    assert interval.mean == pytest.approx((groups[0].mean() + groups[1].mean()) / 2)
    half = 1.96 * np.sqrt(stats.sem(groups[0])[0] ** 2 + stats.sem(groups[1])[0] ** 2) / 2
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    pairs = [
        Pair(f"{t}{n:03d}", "", "a", "b", t)
        for t, group in zip("xy", groups, strict=True)
        for n in range(len(group))
    ]
    found = estimates(pairs, np.concatenate(groups), 4000, 0)
    assert found["acc_macro"][0].interval == interval
    assert found["acc_macro"][0].stderr == pytest.approx(half / 1.96)
    assert found["acc"][0].interval.mean == pytest.approx(np.concatenate(groups).mean())
    assert np.isnan(macro_intervals([groups[0], groups[1][:4]], 10)[0].low)
