"""How many GPU kernels a frame launches, and what they take: where the time of a small step goes.

Inside a captured graph a kernel costs 1 to 3 microseconds however little it does, so a step of many small
ones is bound by their number. One eager frame is profiled; a captured one runs the same kernels.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.utils.compile import no_cuda_graph
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import synchronize
from benchmarks.gpu.results import Results
from benchmarks.gpu.streaming import Conversation, moshi_7b, with_short_windows, with_ttt
from moshi_ttt.kernels.choice import forced


def kernels(work: Callable[[], Any], device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """Launches, and microseconds on the GPU, of each kernel that work runs."""
    work()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        synchronize(device)
    launches: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            launches[event.name] += 1
            micros[event.name] += round(event.time_range.elapsed_us())
    return launches, micros


def frame_kernels(model: LMModel, device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """Those of one frame of one stream."""
    conversation = Conversation(model, 1)
    with torch.no_grad(), no_cuda_graph(), conversation.generator.streaming(1):
        for _ in range(3):
            conversation.frame()
        return kernels(conversation.frame, device)


def run(results: Results) -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    base = moshi_7b(device)
    models = {"plain": with_short_windows(base), "8 heads": with_ttt(base, 8)}
    plain, plain_us = frame_kernels(models["plain"], device)
    found, micros = frame_kernels(models["8 heads"], device)
    with forced("eager"):
        eager, eager_us = frame_kernels(models["8 heads"], device)
    extra = found.copy()
    extra.subtract(plain)
    print("kernels that 16 TTT layers add to a frame (launches, microseconds on the GPU):")
    for name, count in sorted(extra.items(), key=lambda item: -item[1]):
        if count:
            print(f"  {count:6d} {micros[name] - plain_us[name]:8d}  {name[:150]}")
    before, layers = plain.total(), 16
    results.add(
        "streaming: kernels that a TTT layer launches a frame",
        max(1e-6, (found.total() - before) / layers),
        (eager.total() - before) / layers,
        "torch's operations",
        "kernels",
        5.0,
        frame_kernels={"plain": before, "8 heads": found.total(), "8 heads, eager": eager.total()},
        gpu_us={"plain": plain_us.total(), "8 heads": micros.total(), "8 heads, eager": eager_us.total()},
    )
