"""What `test_gpu_training.py` runs in one process under torchrun: the same steps with FSDP2 and without.

`python -m one_rank DEVICE FOLDER` joins a process group of one (NCCL on a GPU), trains each case both ways on
the same batches, and writes losses, gradients and parameters to FOLDER.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_training import CASES, ROWS, STEPS, global_batches, parts_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from training import tiny_config

from finetune.config import FSDPConfig, TrainConfig
from finetune.distributed import Process
from finetune.optimizer import Optimizer
from finetune.sharded_build import build_sharded
from finetune.train import build_parts
from finetune.trainer import Parts, Trainer
from moshi_ttt.building import WeightFiles

COMPARED = ("both", "full", "carried_recomputed", "bfloat16")


def sharded(parts: Parts, config: TrainConfig, process: Process) -> Parts:
    """The same run with its model split over a mesh of one process, which a run of one would not do."""
    torch.manual_seed(config.seed)
    mesh = init_device_mesh(process.device.type, (1,), mesh_dim_names=("shard",))
    model = build_sharded(
        config.settings, parts.base, WeightFiles(), config.mode, process, mesh, FSDPConfig(shard="full")
    )
    assert all(isinstance(p, DTensor) for p in model.root.parameters())
    return replace(parts, loss_model=model.root, sharded=model)


def on_cpu(named) -> dict[str, torch.Tensor]:
    return {name: part.cpu() for name, (part, *_) in parts_of(named).items()}


def train(case: str, split: bool, folder: Path, process: Process) -> dict:
    config = tiny_config(folder / "run", f"batch_size={ROWS}", *CASES[case].overrides)
    parts = build_parts(config, [], process)
    if split:
        parts = sharded(parts, config, process)
    trainer = Trainer(config, parts, global_batches(config, process), process, folder, None)
    trainer.optimizer = optimizer = Optimizer(parts.model, config.optim, STEPS)
    parts.loss_model.train()
    result: dict = {"start": on_cpu(parts.model.named_parameters()), "losses": []}
    sgd = torch.optim.SGD(optimizer.parameters, lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        result["losses"] += trainer.forward_backward([next(trainer.batches)]).tolist()
        if step == 0:
            grads = [(name, p.grad) for p, name in optimizer.names.items() if p.grad is not None]
            result["gradients"] = on_cpu(grads)
        sgd.step()
    result["end"] = on_cpu(parts.model.named_parameters())
    return result


def main(device: torch.device, folder: Path) -> None:
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    process = Process(0, 1, device)
    results = {
        case: {split: train(case, split == "split", folder, process) for split in ("split", "whole")}
        for case in COMPARED
    }
    torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), Path(sys.argv[2]))
