"""The inner loop of TTT-MLP at Moshi's size, forward and backward, against naive code and published code.

32 heads of 128, mini-batches of 16 and 64, on the CPU in float32; 1,250 frames are rounded up to whole
mini-batches, as the peers need. Each contestant is a process with one thread, and they work in turns. Against
ttt-video-dit both recompute by groups of 16 mini-batches, its default and ours; ttt-lm-pytorch keeps
everything, its default, while ours goes on recomputing. Memory is how much a process grows in a round. The
naive code is `moshi_ttt/reference.py`, one head for some tokens: its time is in proportion to both.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.harness import (
    Contestant,
    Entry,
    Options,
    cpu_sec,
    lower_is_better,
    medians,
    not_measured,
    rounds_of,
)
from moshi_ttt.reference import reference_inner_loop

GROUP = 16
PEERS = {"inner_video_dit": "ttt-video-dit", "inner_ttt_lm": "ttt-lm-pytorch"}
SIZES = [(1, 1264, 16), (1, 1280, 64), (16, 32, 16)]
"""Batch, frames, mini-batch."""


@contextmanager
def contestants(
    options: Options, batch: int, frames: int, mini_batch: int
) -> Iterator[dict[str, Contestant]]:
    """Ours and the peers that are at hand, started."""
    given = {"batch": batch, "frames": frames, "mini_batch": mini_batch, "group": GROUP, "groups": 0}
    given["other_length_first"] = True
    with ExitStack() as stack:
        found = {"ours": Contestant("inner_ours", given)}
        for module, repository in PEERS.items():
            if options.peers is not None:
                before = [options.peers / repository, options.peers / "site"]
                found[module] = Contestant(module, given, before)
        for contestant in found.values():
            stack.callback(contestant.close)
        yield found


def naive_sec(mini_batch: int, frames: int) -> float:
    """Seconds that the naive code takes for one head."""
    q, k, target = (torch.randn(frames, 128) / 128**0.5 for _ in range(3))
    weights = [torch.randn(128, 512), torch.randn(512, 128) / 512**0.5]
    biases = [torch.zeros(512), torch.zeros(128)]
    leaves = [q, k, target, *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()
    lr, scale = torch.full((frames,), 0.03), 1 / torch.arange(1, mini_batch + 1)
    norm = torch.ones(128), torch.zeros(128)

    def work() -> None:
        out, _, _ = reference_inner_loop(q, k, target, lr, weights, biases, *norm, scale)
        torch.autograd.grad(out.square().sum(), leaves)

    return cpu_sec(work)


def size_entries(options: Options, batch: int, frames: int, mini_batch: int, rounds: int) -> list[Entry]:
    """Entries of one size."""
    what = f"inner loop, batch {batch}, {frames} frames, mini-batch {mini_batch}"
    of_peers = {
        module: [f"{what}, {kind} against {repository}" for kind in ("time", "memory")]
        for module, repository in PEERS.items()
    }
    if options.peers is None:
        why = "give peers=FOLDER with its checkout"
        return [not_measured(name, 2.0, why) for names in of_peers.values() for name in names]
    with contestants(options, batch, frames, mini_batch) as found:
        every = rounds_of(found, rounds)
        seconds = medians(every)
        peaks = {name: max(contestant.peak_mib[1:]) for name, contestant in found.items()}
    entries = []
    for module, names in of_peers.items():
        times = {name: [round(t, 3) for t in every[name]] for name in ("ours", module)}
        pairs = [(seconds, "CPU s", {"rounds": times}), (peaks, "MiB", {})]
        against = f"{PEERS[module]}, its defaults"
        entries += [
            lower_is_better(name, values["ours"], values[module], 2.0, unit, against, **more)
            for name, (values, unit, more) in zip(names, pairs, strict=True)
        ]
    return entries


def naive_entry() -> Entry:
    """Ours against the naive code, by token and head."""
    frames, mini_batch = 32, 16
    with contestants(Options(), 1, 320, mini_batch) as found:
        works = {"ours": found["ours"], "naive": lambda: naive_sec(mini_batch, frames)}
        seconds = medians(rounds_of(works, 3))
    ours, naive = seconds["ours"] / (320 * 32), seconds["naive"] / frames
    name = f"inner loop, mini-batch {mini_batch}, time against naive autograd"
    return lower_is_better(
        name, 1e6 * ours, 1e6 * naive, 10.0, "us a token and head", "moshi_ttt/reference.py"
    )


def memory_entry() -> Entry:
    """Memory grows in proportion to the frames, and by how much."""
    peaks = {}
    for frames in (320, 640, 1280):
        with contestants(Options(), 1, frames, 16) as found:
            rounds_of(found, 1, warm_up=0)
            peaks[frames] = found["ours"].peak_mib[-1]
    first, second = (peaks[b] - peaks[a] for a, b in ((320, 640), (640, 1280)))
    slope = (peaks[1280] - peaks[320]) / 960
    return lower_is_better(
        "inner loop, batch 1, mini-batch 16, growth of memory with length",
        second / 640,
        first / 320,
        0.8,
        "MiB a frame",
        "its growth from 320 to 640 frames; ours: from 640 to 1,280",
        slope_bytes_per_frame=round(slope * 2**20),
        peak_mib=peaks,
    )


def entries(options: Options) -> list[Entry]:
    found = [naive_entry(), memory_entry()]
    for batch, frames, mini_batch in SIZES:
        found += size_entries(options, batch, frames, mini_batch, rounds=2)
    return found
