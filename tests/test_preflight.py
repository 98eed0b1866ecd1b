"""What the preflight finds before a job of many GPUs starts."""

import shutil
import time

import pytest
import torch
from data_sets import copy_sample
from test_distributed import free_port
from training import TINY, start_python, tiny_config

from finetune.preflight import (
    Finding,
    Place,
    Preflight,
    data_finding,
    disk_finding,
    gpu_finding,
    model_finding,
    shared_finding,
)

HERE = Place(host="here")


def arguments(*overrides: str) -> list[str]:
    merged = {override.split("=", 1)[0]: override for override in (*TINY, *overrides)}
    return list(merged.values())


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was printed: "ok" or "FAILED" and the rest, by check."""
    printed = [line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()]
    return {rest.split(":")[0]: f"{verdict} {rest.split(': ', 1)[1]}" for verdict, rest in printed}


def test_a_run_that_can_start_is_told_what_it_has_and_leaves_nothing(tmp_path, capsys):
    assert Preflight(tiny_config(tmp_path / "runs" / "a"), HERE).run()
    found = lines(capsys)
    assert found["data"] == "ok 3 recordings in data.train, 1 recordings in data.valid"
    assert f"GiB for checkpoints in {tmp_path}, " in found["disk"]
    assert all(verdict.startswith("ok ") for verdict in found.values())
    assert list(found) == ["processes", "GPUs", "all-reduce", "base model", "data", "disk", "run_dir"]
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_wrong_is_told_at_once(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", "data.train=nowhere.jsonl", "model.source=/nowhere")
    assert not Preflight(config, HERE).run()
    found = lines(capsys)
    assert found["data"].startswith("FAILED here: ValueError: data list nowhere.jsonl does not exist")
    assert found["base model"].startswith(
        "FAILED here: ValueError: model.source='/nowhere' is no folder here"
    )
    assert found["all-reduce"].startswith("ok ")


def test_recordings_are_opened_and_not_only_listed(tmp_path):
    data = copy_sample(tmp_path / "data", (2, 4))
    config = tiny_config(tmp_path / "run", f"data.train={data}")
    assert data_finding(config, HERE).problem is None
    (data.parent / "dialogue_4.flac").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="dialogue_4.flac"):
        data_finding(config, HERE)
    shutil.copy(data.parent / "dialogue_2.flac", data.parent / "dialogue_4.flac")
    (data.parent / "dialogue_4.json").unlink()
    with pytest.raises(ValueError, match="dialogue_4.json"):
        data_finding(config, HERE)


def test_a_prompt_that_is_not_there_is_a_problem(tmp_path):
    config = tiny_config(tmp_path / "run", f"eval.prompt={tmp_path}/question.wav")
    assert data_finding(config, HERE).problem == f"eval.prompt={tmp_path}/question.wav does not exist"


def test_nodes_that_see_other_recordings_differ(tmp_path, capsys):
    data = copy_sample(tmp_path / "data", (2, 4))
    config = tiny_config(tmp_path / "run", f"data.train={data}")
    first = data_finding(config, HERE)
    data.write_text(data.read_text().splitlines()[0] + "\n")
    assert data_finding(config, HERE).same != first.same


def test_space_is_asked_for_all_checkpoints_that_are_kept(tmp_path):
    def needed(*overrides: str) -> float:
        finding = disk_finding(tiny_config(tmp_path / "run", "max_steps=9", *overrides), HERE)
        assert finding.problem is None
        return float(finding.detail.split()[0])

    few = needed("checkpoint.every_steps=1", "checkpoint.keep=9", "lora.rank=64")
    assert few == pytest.approx(10 / 2 * needed("lora.rank=64"), abs=0.03)
    # No disk holds this: every one of as many steps as there are is kept.
    many = ("max_steps=1000000000", "checkpoint.every_steps=1", "checkpoint.keep=null")
    problem = disk_finding(tiny_config(tmp_path / "run", *many), HERE).problem
    assert problem is not None
    assert "GiB free, and the run's checkpoints need" in problem
    assert "choose another run_dir" in problem


def test_a_run_dir_that_another_node_does_not_see_is_a_problem(tmp_path):
    config = tiny_config(tmp_path / "run")
    problem = shared_finding(config, HERE, "node1").problem
    assert problem is not None
    assert "a file that node1 wrote to" in problem
    disk_finding(config, Place(host="node1"))
    assert shared_finding(config, HERE, "node1").problem is None


def test_a_base_model_that_is_not_there_is_a_problem(tmp_path):
    with pytest.raises(ValueError, match="/nowhere"):
        model_finding(tiny_config(tmp_path / "run", "model.source=/nowhere"), HERE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_gpus_that_are_not_there_are_a_problem(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", "device=auto")
    finding = gpu_finding(config, HERE)
    assert finding == Finding("here", detail="none here, training runs on the CPU", same="cpu")
    # Training with device=auto would take the CPU, and nobody would notice.
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    problem = gpu_finding(config, Place(local_world_size=8, host="here")).problem
    assert problem is not None
    assert problem.startswith("torch sees 0 GPUs for 8 processes of this node, SLURM gave 8; see nvidia-smi")


def test_settings_that_cannot_work_are_told_by_every_process(tmp_path):
    process = start_python("-m", "finetune.preflight", *arguments(f"run_dir={tmp_path}/run", "mode=half"))
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "preflight: FAILED  config: mode must be one of frozen, lora, ttt" in printed
    assert "Traceback" not in printed


def test_a_process_that_never_comes_is_waited_for_no_longer_than_said(tmp_path):
    code = "import finetune.preflight as p; p.TIMEOUT_SEC = 3; p.main()"
    started = time.monotonic()
    process = start_python(
        *("-c", code, *arguments(f"run_dir={tmp_path}/run")),
        **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "preflight: FAILED  processes: rank 0 on" in printed
    assert "has waited for 3 s; look for a node that is missing" in printed
    assert time.monotonic() - started < 100
