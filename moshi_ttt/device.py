"""Where a process computes."""

import torch


def device_of_process(device: str, local_rank: int, gpus: int) -> torch.device:
    """Where the process computes that is `local_rank` on a node where it sees `gpus` GPUs.

    A process that sees one GPU takes that: schedulers may show each of its tasks its own.

    Raises:
        ValueError: an unknown device, cuda where there is none, or more processes than GPUs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda" and not gpus:
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=cpu or install a driver")
    if device == "cpu" or not gpus:
        return torch.device("cpu")
    if gpus > 1 and local_rank >= gpus:
        raise ValueError(
            f"process {local_rank} of this node has no GPU: torch sees {gpus}; start as many processes on "
            "each node as it has GPUs"
        )
    return torch.device("cuda", local_rank if gpus > 1 else 0)
