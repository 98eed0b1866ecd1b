"""The harness of the benchmarks: its file, its comparison, its contestants."""

import json

import pytest

from benchmarks import harness
from benchmarks.check import check, lost
from benchmarks.harness import Contestant, Entry, Options, lower_is_better, newest, not_measured, read, table
from benchmarks.harness import write as write_results
from benchmarks.runner import BENCHMARKS, arguments


def entry(name, ratio):
    return Entry(name, ratio, 1.0, "s", 1.0, ratio, "made up", "cpu")


def test_a_results_file_holds_the_entries_and_is_found_again(tmp_path):
    entries = [entry("one", 1.5), not_measured("two", 2.0, "give peers=FOLDER")]
    path = write_results(entries, tmp_path)
    content = json.loads(path.read_text())
    keys = {"name", "ratio", "goal", "unit", "ours", "against", "against_what", "device"}
    assert [keys <= set(found) for found in content["entries"]] == [True, True]
    assert content["entries"][1]["ratio"] is None
    assert newest(tmp_path) == path
    assert read(path) == entries
    again = [entry("one", 2.5), entry("three", 3.0)]
    assert write_results(again, tmp_path) == path
    without_peers = [not_measured(found.name, 2.0, "give peers=FOLDER") for found in again]
    assert write_results(without_peers, tmp_path) == path
    assert [(found.name, found.ratio) for found in read(path)] == [
        ("one", 2.5),
        ("two", None),
        ("three", 3.0),
    ]


def test_the_newest_file_of_this_machine_counts_and_no_other_machine_s(tmp_path):
    here = harness.machine_name()
    for name in (f"{here}-2026-01-02", f"{here}-2026-01-10", "other-2027-01-01"):
        (tmp_path / f"{name}.json").write_text('{"entries": []}')
    assert newest(tmp_path).stem.endswith("-2026-01-10")


def test_without_results_the_remedy_is_named(tmp_path):
    with pytest.raises(ValueError, match="make bench"):
        newest(tmp_path)
    (tmp_path / "old.json").write_text('{"entries": [{"name": "x", "cost": 1}]}')
    with pytest.raises(ValueError, match=r"old\.json is no results file"):
        read(tmp_path / "old.json")


def test_a_lower_time_has_a_ratio_above_1():
    assert lower_is_better("x", 2.0, 5.0, 2.0, "s", "y").ratio == 2.5


def test_the_table_has_a_line_for_every_entry_and_says_why_one_was_not_measured():
    lines = table([entry("one", 1.5), not_measured("two", 2.0, "give peers=FOLDER")]).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["one", "1.5", "1"]
    assert lines[2].endswith("not measured: give peers=FOLDER")


@pytest.mark.parametrize("now, names", [(0.86, []), (0.84, ["x"]), (None, [])])
def test_a_loss_of_more_than_15_percent_is_one(now, names):
    assert lost([entry("x", 1.0), entry("gone", 1.0)], [entry("x", now), entry("new", 0.1)]) == names


def runs(*rounds):
    """A stand-in for measuring, that counts."""
    left = list(rounds)

    def measure(names, options):
        return [entry(name, ratio) for name, ratio in left.pop(0).items()]

    return measure, left


def test_check_names_what_was_lost_twice(capsys):
    stored = [entry("a", 2.0), entry("b", 1.0)]
    measure, left = runs({"a": 1.0, "b": 1.0}, {"a": 1.5, "b": 1.0})
    found = check(stored, ["made up"], Options(), measure)
    assert isinstance(found, str)
    assert "a: 2.0 -> 1.5" in found
    assert "b:" not in found
    assert left == []
    assert "a" in capsys.readouterr().out


def test_check_measures_a_loss_once_more_before_it_fails():
    measure, left = runs({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 0.1})
    assert check([entry("a", 2.0), entry("b", 2.0)], ["made up"], Options(), measure) == 0
    assert left == []
    measure, left = runs({"a": 2.0}, {})
    assert check([entry("a", 2.0)], ["made up"], Options(), measure) == 0
    assert left == [{}]


def test_the_command_line_knows_its_benchmarks_and_its_peers(tmp_path):
    assert arguments([]) == (list(BENCHMARKS), Options())
    assert arguments(["startup", f"peers={tmp_path}"]) == (["startup"], Options(tmp_path))
    with pytest.raises(ValueError, match="no benchmark 'startup2'; expected startup, "):
        arguments(["startup2"])
    with pytest.raises(ValueError, match="no such folder"):
        arguments(["peers=/nowhere/at/all"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_contestant_works_when_told_and_says_how_much_memory_it_took():
    given = {"batch": 1, "frames": 32, "mini_batch": 16, "group": 1}
    contestant = Contestant("inner_ours", given)
    assert [contestant() > 0 for _ in range(2)] == [True, True]
    assert len(contestant.peak_mib) == 2
    # What it must hold: a gradient of the weights, 16.8 MB.
    assert contestant.peak_mib[0] > 16
    contestant.close()
    assert contestant.process.returncode == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_contestant_that_falls_over_is_an_error():
    contestant = Contestant("inner_ours", {"batch": 1})
    with pytest.raises(RuntimeError, match="ended with code 1"):
        contestant()
