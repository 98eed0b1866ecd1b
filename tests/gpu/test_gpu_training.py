"""Training on a GPU by command: a stopped run goes on bit for bit; FSDP2 over NCCL changes nothing."""

import json
import shutil

import pytest
import torch
from device_under_test import DEVICE
from one_rank import COMPARED
from test_distributed import free_port
from training import ROOT, TINY, losses, records, run_python

from moshi_ttt.checkpoint import saved_checkpoints

STEPS = ("max_steps=6", "checkpoint.every_steps=3", "checkpoint.keep=null", "num_microbatches=2")
CASES = {
    "clips": ("mode=lora+ttt", "param_dtype=bfloat16"),
    "chunks": ("mode=ttt", "lora.enable=false", "ttt.persistent_states=true"),
}
FILES = ("consolidated/ttt.safetensors", "resume/rank_00000.safetensors")


def train(run_dir, case):
    settings = dict(o.split("=", 1) for o in (*TINY, *STEPS, *CASES[case]))
    settings |= {"device": DEVICE.type, "run_dir": str(run_dir), "resume.mode": "auto"}
    return run_python("-m", "finetune.train", *(f"{key}={value}" for key, value in settings.items()))


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, case):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(whole, case)
    assert len(losses(whole)) == 6
    assert len(set(losses(whole))) == 6
    shutil.copytree(whole, again)
    shutil.rmtree(saved_checkpoints(again)[-1])
    assert "resumed from" in train(again, case)
    for name in FILES:
        path = f"checkpoints/checkpoint_000006/{name}"
        assert (again / path).read_bytes() == (whole / path).read_bytes(), name
    assert losses(again) == losses(whole)
    assert records(again, "train")[-1]["grad_norm"] == records(whole, "train")[-1]["grad_norm"]
    folder = again / "checkpoints/checkpoint_000006/consolidated"
    settings = json.loads((folder / "training_config.json").read_text())
    assert settings["device"] == DEVICE.type


@pytest.fixture(scope="module")
def one_rank(private_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    paths = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/gpu'}"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=1", f"--master-port={free_port()}")
    run_python(*torchrun, "-m", "one_rank", str(DEVICE), str(folder), PYTHONPATH=paths)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("case", COMPARED)
def test_one_process_with_fsdp_trains_as_one_without(one_rank, case):
    split, whole = one_rank[case]["split"], one_rank[case]["whole"]
    near = 2e-2 if case == "bfloat16" else 1e-5
    assert split["losses"] == pytest.approx(whole["losses"], abs=0.05 if case == "bfloat16" else 1e-4)
    assert len(set(split["losses"])) > 1
    assert all(torch.equal(tensor, whole["start"][name]) for name, tensor in split["start"].items())
    for part in ("start", "gradients", "end"):
        assert split[part].keys() == whole[part].keys()
        for name, tensor in split[part].items():
            assert (tensor - whole[part][name]).abs().max() <= near, (part, name)
    moved = [name for name, tensor in split["end"].items() if not torch.equal(tensor, split["start"][name])]
    assert len(moved) > 20
