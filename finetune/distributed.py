"""Processes of one training run: their ranks, and sums over them. One process needs no group."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Process:
    """This process among those of the run.

    Args:
        rank: global index.
        world_size: number of processes.
        device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


def start(device: str) -> Process:
    """Find this process's place (torchrun sets RANK, WORLD_SIZE, LOCAL_RANK) and join the others.

    Raises:
        ValueError: an unknown device, or cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=cpu or install a driver")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(target)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    return Process(int(os.environ.get("RANK", "0")), world_size, target)


def stop(process: Process) -> None:
    """Leave the group."""
    if process.world_size > 1:
        dist.destroy_process_group()


def sum_over_processes(tensor: torch.Tensor, process: Process) -> torch.Tensor:
    """The sum of `tensor` over all processes."""
    if process.world_size == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def wait_for_all(process: Process) -> None:
    """Return when every process has come here."""
    if process.world_size > 1:
        dist.barrier()


def sum_gradients(parameters: Sequence[nn.Parameter], process: Process) -> None:
    """Replace every gradient by its sum over all processes, added up in float32."""
    if process.world_size == 1:
        return
    with_grad = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.float().flatten() for p in with_grad])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    sums = flat.split([p.numel() for p in with_grad])
    for parameter, total in zip(with_grad, sums, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(total.view_as(parameter.grad))
