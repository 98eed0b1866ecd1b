"""Runs of the paper metrics: killed, shared, partial, of other settings; and the script that SLURM runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paper_data import write_storycloze, write_swuggy
from planted import write_planted
from test_paper_metrics import evaluate, results
from training import ROOT, run_python


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Overrides that name the data, and its folder."""
    folder = tmp_path_factory.mktemp("data")
    write_swuggy(folder, ids=8)
    write_storycloze(folder / "tSC")
    return [f"data.slm21={folder}", f"data.tsc={folder}/tSC", "tasks=[swuggy,tsc]", "shard_clips=6"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, private_cache):
    """The output of an uninterrupted run of one process."""
    return evaluate(tmp_path_factory.mktemp("whole") / "out", *data)


def contents(output: Path) -> dict[str, bytes]:
    """Every file, the date of the run taken out of names and contents."""
    date = json.loads((output / "plan.json").read_text())["about"]["date"]
    return {
        str(path.relative_to(output)).replace(date, "DATE"): path.read_bytes().replace(date.encode(), b"DATE")
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith(".tmp.")
    }


def test_a_run_that_is_killed_again_and_again_leaves_the_same_files(data, whole, tmp_path):
    printed = run_python("tests/killed_while_scoring.py", str(tmp_path / "out"), *data)
    kills, lives = map(int, re.findall(r"kills: (\d+) lives that made files: (\d+)", printed)[0])
    assert kills >= 3
    assert lives >= 2
    assert contents(tmp_path / "out") == contents(whole)


def test_processes_that_share_the_work_leave_the_same_files(data, whole, tmp_path):
    output = tmp_path / "out"
    evaluate(output, *data, "shard_index=1", "num_shards=3")
    evaluate(output, *data, "shard_index=0", "num_shards=3")
    assert not list(output.glob("results_*"))
    assert 0 < len(list(output.glob("nll/*/*"))) < len(list(whole.glob("nll/*/*")))
    evaluate(output, *data, "shard_index=2", "num_shards=3")
    assert contents(output) == contents(whole)


def test_a_finished_run_writes_its_results_again_without_the_model(data, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for path in output.glob("*samples_*"):
        path.unlink()
    made = {path: path.stat().st_mtime_ns for path in output.glob("nll/*/*")}
    evaluate(output, *data)
    assert contents(output) == contents(whole)
    assert made == {path: path.stat().st_mtime_ns for path in output.glob("nll/*/*")}


@pytest.mark.parametrize(
    "override, message",
    [
        ("user_filler=-1", "protocol.user_filler"),
        ("text_filler=pad", "protocol.text_filler"),
        ("dtype=bfloat16", "protocol.dtype"),
        ("limit=2", "protocol.limit"),
        ("tasks=[swuggy]", "data.tsc"),
    ],
)
def test_a_folder_of_other_settings_is_refused(data, whole, override, message):
    with pytest.raises(
        ValueError, match=f"was begun with other settings or data: .*{message}.*another output"
    ):
        evaluate(whole, *data, override)


def test_a_folder_of_another_model_or_other_audio_is_refused(data, whole, tmp_path, planted_folder):
    with pytest.raises(ValueError, match=r"was begun with other.*model\.base_sha256\.moshi"):
        evaluate(whole, *data, f"baseline={planted_folder}")
    changed = tmp_path / "data"
    shutil.copytree(data[0].removeprefix("data.slm21="), changed)
    clip = next((changed / "lexical" / "dev").glob("*.wav"))
    clip.write_bytes(clip.read_bytes() + b"\0\0")
    with pytest.raises(ValueError, match=r"data\.swuggy_dev\.clips_sha256"):
        evaluate(whole, *data, f"data.slm21={changed}")


@pytest.fixture
def planted_folder(tmp_path, private_cache):
    """A base model with other weights."""
    return write_planted(tmp_path / "planted")


def test_likelihoods_that_are_not_this_runs_are_refused(data, whole, tmp_path):
    other = evaluate(tmp_path / "other", *data, "user_filler=-1")
    mixed = tmp_path / "mixed"
    shutil.copytree(whole, mixed)
    file = mixed / "nll" / "tsc" / "shard_00000.safetensors"
    shutil.copy(other / "nll" / "tsc" / file.name, file)
    with pytest.raises(ValueError, match=f"{file} is of another model, protocol or audio .* delete {file}"):
        evaluate(mixed, *data)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        evaluate(mixed, *data)


def test_a_sub_sample_has_whole_ids_and_says_that_it_is_partial(data, whole, tmp_path, capsys):
    outputs = [evaluate(tmp_path / name, *data, "limit=3", "seed=5") for name in ("a", "b")]
    other = evaluate(tmp_path / "c", *data, "limit=3", "seed=6")
    rows = {}
    for output in (*outputs, other):
        (path,) = output.glob("partial_samples_swuggy_dev_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(row["partial"] for row in samples)
        rows[output.name] = [(row["doc"]["cluster"], row["doc"]["voice"]) for row in samples]
    assert rows["a"] == rows["b"] != rows["c"]
    ids = {cluster for cluster, _ in rows["a"]}
    assert len(ids) == 3
    assert rows["a"] == [(cluster, voice) for cluster in sorted(ids) for voice in ("v1", "v2")]
    found = results(outputs[0])
    assert found["partial"]
    assert all(entry["partial"] for entry in (*found["results"].values(), *found["configs"].values()))
    assert found["n-samples"]["swuggy_dev"] == {"original": 8, "effective": 3}
    names = [path.name for path in outputs[0].iterdir()]
    assert {"plan.json", "nll"} == {name for name in names if "partial" not in name}
    (table,) = outputs[0].glob("partial_results_*.md")
    assert table.read_text().startswith("PARTIAL RESULTS: 3 ids of each task")
    assert table.read_text().count("(partial)") == 3
    assert "partial" not in str(results(whole)["results"])


def test_results_are_laid_out_as_by_lm_evaluation_harness(whole):
    found = results(whole)
    assert {
        "results",
        "configs",
        "versions",
        "n-shot",
        "n-samples",
        "higher_is_better",
        "git_hash",
        "date",
    } < set(found)
    entry = found["results"]["swuggy_dev"]
    assert entry["acc,none"] == entry["acc,w100_mean"]
    low, high = entry["acc_ci95,none"]
    assert low <= entry["acc,none"] <= high
    assert entry["acc_stderr,none"] > 0
    assert found["higher_is_better"]["tsc"] == {"acc": True}
    assert found["n_failed"] == {"swuggy_dev": 0, "tsc": 0}
    assert found["configs"]["swuggy_dev"]["gold_sha256"]
    assert found["configs"]["tsc"]["official_pairs"] == 1871
    protocol = found["protocol"]
    assert protocol["weights"]["w100"] == [100, 1]
    assert (protocol["text_filler"], protocol["user_filler"], protocol["seed"]) == ("-1", "silence", 0)
    (table,) = whole.glob("results_*.md")
    assert "Not the published set: tsc has 3 of 1871 pairs." in table.read_text()
    assert "| Moshi, multistream instruct [mem] | 63.0 |" in table.read_text()


def test_checking_scores_nothing(data, tmp_path):
    output = evaluate(tmp_path / "out", *data, "mode=check")
    assert not output.exists()


def test_the_script_checks_the_data_and_scores(tmp_path, data):
    environment = {"HF_HUB_OFFLINE": "1", "NO_TORCH_COMPILE": "1", "MOSHI_TTT_PROCESSES": "2"}
    common = [*data, f"output={tmp_path}/out", "device=cpu"]
    script = "scripts/slurm/run_paper_metrics.sh"
    printed = run_script(script, "baseline=tiny", *common, **environment)
    assert "process 0 of 2" in printed
    assert "process 1 of 2" in printed
    assert results(tmp_path / "out")["results"]["tsc"]["acc_n"] == 3


def run_script(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MOSHI_TTT_PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
