"""Which part of the work is this process's, and where it computes."""

from collections.abc import Mapping

import torch

from configs.share import shard_of
from inference.generate import choose_device


def share_of_work(environment: Mapping[str, str], index: int | None, count: int | None) -> tuple[int, int]:
    """(index, count) of this process among all processes of all tasks.

    Args:
        environment: with RANK and WORLD_SIZE where torchrun has started several processes.
        index, count: of this task among several, as configured; None takes SLURM's array.
    """
    task, tasks = shard_of(index, count)
    rank, world_size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    return task * world_size + rank, tasks * world_size


def own_device(device: str, environment: Mapping[str, str]) -> torch.device:
    """This process's device: the GPU of its index on its node, or the one that it is shown.

    Raises:
        ValueError: an unknown device, cuda where there is none, or more processes than GPUs.
    """
    chosen = choose_device(device)
    if chosen.type == "cpu":
        return chosen
    local_rank, gpus = int(environment.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus == 1:
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise ValueError(
            f"process {local_rank} of this node has no GPU: torch sees {gpus}; start as many processes on "
            "each node as it has GPUs"
        )
    return torch.device("cuda", local_rank)
