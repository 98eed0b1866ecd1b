"""Time and memory of work on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of work, the device's part included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def interleaved(
    works: dict[str, Callable[[], Any]], device: torch.device, rounds: int, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each work over rounds in which all take their turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            spent = seconds(work, device)
            if number >= warm_up:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second of a copy on the device, read and written both counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, device, 20, 3)["copy"]


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most memory that work holds at a time beyond what is held before it."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
