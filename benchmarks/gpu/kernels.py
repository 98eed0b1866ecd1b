"""How many GPU kernels a frame launches, and what they take: where the time of a small step goes.

Inside a captured graph a kernel costs 1 to 3 microseconds however little it does, so a step of many small
ones is bound by their number. One eager frame is profiled; a captured one runs the same kernels.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from moshi.utils.compile import no_cuda_graph
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import synchronize
from benchmarks.gpu.results import Results
from benchmarks.gpu.streaming import Conversation, moshi_7b, with_short_windows, with_ttt


def kernels(work: Callable[[], Any], device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """Launches, and microseconds on the GPU, of each kernel that work runs."""
    work()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        synchronize(device)
    launches: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches[event.name] += 1
            micros[event.name] += round(event.time_range.elapsed_us())
    return launches, micros


def run(results: Results) -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    base = moshi_7b(device)
    models = {"plain": with_short_windows(base), "8 heads": with_ttt(base, 8)}
    found = {}
    for name, model in models.items():
        conversation = Conversation(model, 1)
        with torch.no_grad(), no_cuda_graph(), conversation.generator.streaming(1):
            for _ in range(3):
                conversation.frame()
            found[name] = kernels(conversation.frame, device)
    (before, before_us), (after, after_us) = found["plain"], found["8 heads"]
    extra = after.copy()
    extra.subtract(before)
    print("kernels that 16 TTT layers add to a frame (launches, microseconds on the GPU):")
    for name, count in sorted(extra.items(), key=lambda item: -item[1]):
        if count:
            print(f"  {count:6d} {after_us[name] - before_us[name]:8d}  {name[:150]}")
    total, plain = sum(after.values()), sum(before.values())
    results.add(
        "streaming: kernels that a TTT layer launches a frame",
        max(1e-6, (total - plain) / 16),
        20.0,
        "20 kernels",
        "kernels",
        1.0,
        frame_kernels={"plain": plain, "8 heads": total},
        gpu_ms={"plain": sum(before_us.values()) / 1e3, "8 heads": sum(after_us.values()) / 1e3},
    )
