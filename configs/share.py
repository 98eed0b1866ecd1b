"""Which part of a command's work is this process's: among a launcher's, in each task of a SLURM array."""

import os


def shard_of(index: int | None, count: int | None) -> tuple[int, int]:
    """Which part of the work is this process's: (index, count).

    torchrun's processes (RANK, WORLD_SIZE) share the part of their task.

    Args:
        index, count: of this task, as configured. None takes SLURM's array, or one task outside of one.
    Raises:
        ValueError: only one is given, or they name no part.
    """
    if (index is None) != (count is None):
        raise ValueError(f"give both shard_index and num_shards, or none; got {index} and {count}")
    if index is None or count is None:
        index, count = _array_task()
    if not 0 <= index < count:
        raise ValueError(
            f"shard {index} of {count} does not exist; expected 0 to {count - 1}. For arrays with gaps give "
            "shard_index and num_shards"
        )
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return index * processes + rank, count * processes


def _array_task() -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    task, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT"))
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    # An array such as 3,5,9 has other gaps than its step, and is refused.
    return (task - first) // int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")), count
