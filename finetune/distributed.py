"""Processes of one training run: their ranks, and sums over them. One process needs no group."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moshi_ttt.device import device_of_process

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


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


@dataclass(frozen=True)
class Place:
    """A process among those that a launcher started.

    Args:
        rank, world_size: global.
        local_rank: index among the processes of its node.
        rendezvous: where the processes meet, as torch takes it.
    """

    rank: int
    world_size: int
    local_rank: int
    rendezvous: str = "env://"


def find_place(environment: Mapping[str, str]) -> Place:
    """This process's place, as torchrun or SLURM's srun tell it; alone without either.

    torchrun under srun is torchrun: it sets all that it starts, srun only starts the agents.

    Raises:
        ValueError: a launcher has set only a part of what it should.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size, local_rank = _numbers(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        return Place(rank, world_size, local_rank)
    # Of a step of srun. SLURM_NTASKS alone is also there in a batch script and in an salloc shell, where a
    # plain `python` is one process.
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return Place(0, 1, 0)
    rank, world_size, local_rank = _numbers(
        environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    )
    job, step = _numbers(environment, "SLURM_JOB_ID", "SLURM_STEP_ID")
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    # Below the ports that systems hand out by themselves; other jobs and steps get others.
    port = environment.get("MASTER_PORT") or 15000 + (16 * job + step) % 15000
    return Place(rank, world_size, local_rank, f"tcp://{host}:{port}")


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    for name in names:
        if not environment.get(name, "").isdecimal():
            raise ValueError(
                f"the launcher set {names[0]} or {names[1]}, but {name} is {environment.get(name)!r}, not a "
                "number; start with torchrun or srun, or unset what is left of another launch"
            )
    return [int(environment[name]) for name in names]


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list such as "login,gpu[003-007,12]"."""
    found = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR to that of rank 0")
    return "".join(part or "" for part in found.groups())


def start(device: str) -> Process:
    """Find this process's place and join the others.

    Raises:
        ValueError: an impossible device or place.
    """
    place = find_place(os.environ)
    target = device_of_process(device, place.local_rank, torch.cuda.device_count())
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if place.world_size > 1:
        dist.init_process_group(
            "nccl" if target.type == "cuda" else "gloo",
            store=_meeting_store(place, os.environ),
            rank=place.rank,
            world_size=place.world_size,
            device_id=target if target.type == "cuda" else None,
        )
    return Process(place.rank, place.world_size, target)


def _meeting_store(place: Place, environment: Mapping[str, str]) -> Store:
    """Where the processes leave their addresses for each other."""
    store, _, _ = next(rendezvous(place.rendezvous, place.rank, place.world_size))
    # torchrun keeps one store over all restarts, so the addresses of those that were killed would be found
    # there. Only on one node do all count the same restarts; with more, the launch must set
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives each restart a store of its own.
    if environment.get("GROUP_WORLD_SIZE") == "1":
        store = PrefixStore(f"restart_{environment['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "remote process exited",
)
"""What torch says when another process of the run has ended."""


def tell_lost(error: RuntimeError, process: Process) -> None:
    """Say what to make of an error, if it is that another process is gone."""
    if process.world_size > 1 and any(message in str(error) for message in LOST):
        logger.error(
            "another process of this run has ended, so process %d of %d ends too; look for the first error "
            "in the others' logs. Started again with resume.mode=auto, the run goes on from its last "
            "checkpoint (torchrun --max-restarts=N does so by itself)",
            process.rank,
            process.world_size,
        )


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


def share(value: Value, process: Process) -> Value:
    """What the main process has, in every process."""
    values = [value]
    if process.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Value, process: Process, group: dist.ProcessGroup | None = None) -> list[Value]:
    """What each process has, in every process.

    Args:
        group: of all processes, for a thread beside the one that trains: the two must not share a group.
    """
    if process.world_size == 1:
        return [value]
    values: list[Value] = [value] * process.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def agree(problem: str | None, process: Process) -> None:
    """Let every process know what the main process has found wrong, or that all is well.

    Raises:
        ValueError: the problem of the main process, in every process.
    """
    message = share(problem, process)
    if message is not None:
        raise ValueError(message)
