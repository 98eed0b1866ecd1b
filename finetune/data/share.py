"""Which part of a command's work is this process's: as configured, or among the processes of a launcher and
the tasks of a SLURM array."""

import os


def shard_of(index: int | None, count: int | None) -> tuple[int, int]:
    """Which part of the work is this process's: (index, count).

    Args:
        index, count: as configured. None takes torchrun's processes (RANK, WORLD_SIZE) in each task of
            SLURM's array, or all the work outside of both.
    Raises:
        ValueError: only one is given, or they name no part.
    """
    if (index is None) != (count is None):
        raise ValueError(f"give both shard_index and num_shards, or none; got {index} and {count}")
    if index is None or count is None:
        rank, processes = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if "SLURM_ARRAY_TASK_ID" not in os.environ:
            return _existing(rank, processes)
        task, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT"))
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        # An array such as 3,5,9 has other gaps than its step, and is refused below.
        index = (task - first) // int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        index, count = index * processes + rank, count * processes
    return _existing(index, count)


def _existing(index: int, count: int) -> tuple[int, int]:
    if not 0 <= index < count:
        raise ValueError(
            f"shard {index} of {count} does not exist; expected 0 to {count - 1}. For arrays with gaps give "
            "shard_index and num_shards"
        )
    return index, count
