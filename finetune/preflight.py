"""`python -m finetune.preflight ARGUMENTS`, those of finetune.train: can this run start, here and now?

Started as the training will be, on every node. Looks at the GPUs, a sum over all processes, the data, the
base model and the run directory, and prints a line for each; exit code 1 where something is wrong. Nothing
waits for ever: who waits for another process, or for a file system, says so when the time is up.
"""

import hashlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from finetune.config import TrainConfig, register, to_typed
from finetune.data.audio import check_audio
from finetune.data.bad_input import BadInput
from finetune.data.clip_sources import expect_prepared
from finetune.data.places import is_prepared, parse_places
from finetune.data.prepared import PreparedSet
from finetune.data.sources import read_places
from finetune.data.transcript import read_words
from finetune.plan import build_on_meta, checkpoint_bytes, kept_checkpoints
from moshi_ttt.digest import cached_sha256
from moshi_ttt.loading import find_base

TIMEOUT_SEC = 300
# What a GPU may hold before the run: contexts of a display or a monitor, not another job.
USED_BYTES = 2 << 30
GIB = 1 << 30
# Recordings that are opened on every node; training checks all of them.
SAMPLE_SIZE = 8


@dataclass(frozen=True)
class Place:
    """This process, as torchrun started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = "localhost"

    @staticmethod
    def find() -> "Place":
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        numbers = [int(os.environ.get(name, alone)) for name, alone in names.items()]
        return Place(numbers[0], numbers[1], numbers[2], numbers[3], socket.gethostname())


@dataclass(frozen=True)
class Finding:
    """What a check found on a process: a problem, or something worth telling.

    Args:
        same: for checks of what all nodes must see alike: the digest of it.
    """

    host: str
    problem: str | None = None
    detail: str = ""
    same: str = ""


@contextmanager
def time_limit(place: Place, what: str) -> Iterator[None]:
    """End the process with a message when the body takes longer than the preflight waits."""

    def give_up() -> None:
        print(
            f"preflight: FAILED  {what}: rank {place.rank} on {place.host} has waited for {TIMEOUT_SEC:g} s; "
            "look for a node that is missing or hangs in the other logs, at its network and file systems",
            flush=True,
        )
        os._exit(1)  # the thread that hangs would not let the interpreter end

    timer = threading.Timer(TIMEOUT_SEC, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def gpu_finding(config: TrainConfig, place: Place) -> Finding:
    """Whether this process has a GPU that works and that nobody else uses."""
    host, seen = place.host, torch.cuda.device_count()
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if config.device == "cpu":
        return Finding(host, detail="device=cpu uses none")
    if seen == 0 and config.device == "auto" and given == 0:
        return Finding(host, detail="none here, training runs on the CPU", same="cpu")
    if seen < place.local_world_size:
        return Finding(
            host,
            f"torch sees {seen} GPUs for {place.local_world_size} processes of this node, SLURM gave "
            f"{given}; see nvidia-smi there, and launch.gpus_per_node",
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    if total - free > USED_BYTES:
        used = (total - free) / GIB
        return Finding(
            host,
            f"GPU {place.local_rank} ({name}) holds {used:.1f} GiB of another process; see nvidia-smi there",
        )
    ones = torch.ones(1024, 1024, dtype=torch.bfloat16, device=device)
    if not bool((ones @ ones == 1024).all()):
        return Finding(host, f"GPU {place.local_rank} ({name}) multiplies wrongly; have it replaced")
    return Finding(host, detail=f"{name}, {free / GIB:.1f} GiB free", same=name)


def all_reduce_finding(place: Place, use_cuda: bool) -> Finding:
    """Whether all processes add up numbers rightly, by NCCL on GPUs, and how fast."""
    if place.world_size == 1:
        return Finding(place.host, detail="one process needs none")
    device = torch.device("cuda", place.local_rank) if use_cuda else torch.device("cpu")
    group = dist.new_group(backend="nccl" if use_cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_SEC))
    numbers = torch.empty((64 if use_cuda else 4) << 18, device=device)  # 64 or 4 MiB
    elapsed = []
    for _ in range(4):
        numbers.fill_(place.rank + 1)
        started = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        expected = place.world_size * (place.world_size + 1) / 2
        right = bool((numbers == expected).all())  # waits for the GPU
        elapsed.append(time.perf_counter() - started)
        if not right:
            return Finding(
                place.host,
                f"rank {place.rank} got {numbers.unique().tolist()[:3]} as the sum over all processes, not "
                f"{expected:g}; take this node out",
            )
    sent = 2 * (place.world_size - 1) / place.world_size * numbers.nbytes
    backend = "NCCL" if use_cuda else "gloo"
    return Finding(
        place.host, detail=f"{backend}, {numbers.nbytes >> 20} MiB at {sent / min(elapsed) / 1e9:.2f} GB/s"
    )


def data_finding(config: TrainConfig, place: Place) -> Finding:
    """Whether this node sees what it will learn from: lists and some recordings of each, prepared folders."""
    counts, digest = [], hashlib.sha256()
    for name, spec in (("train", config.data.train), ("valid", config.data.valid)):
        if spec is not None:
            counts.append(f"{_look_at(spec, config, digest):,} recordings in data.{name}")
    for name, path in (("eval.prompt", config.eval.prompt), ("init_from", config.init_from)):
        if path is not None and not Path(path).expanduser().exists():
            return Finding(place.host, f"{name}={path} does not exist")
    return Finding(place.host, detail=", ".join(counts), same=digest.hexdigest())


def _look_at(spec: str, config: TrainConfig, digest: Any) -> int:
    """The number of recordings of a data set, whose names go into the digest.

    Raises:
        ValueError: something is missing or broken.
    """
    count = 0
    bad_input = BadInput(config.data.on_error, config.data.max_error_fraction)
    places = parse_places(spec)
    for path in (p.path for p in places if is_prepared(p.path)):
        prepared = PreparedSet(path)
        mimi = Path(find_base(config.model).mimi_weights)
        prepared.require(config.encode, config.duration_sec, cached_sha256(mimi))
        expect_prepared(prepared, bad_input)
        digest.update(repr(prepared.manifest).encode())
        count += len(prepared)
    listed = replace(config.data.sources, check_files=False)
    for source in read_places([p for p in places if not is_prepared(p.path)], listed, bad_input):
        count += len(source.recordings)
        for recording in source.recordings:
            digest.update(f"{recording.path} {recording.duration_sec}\n".encode())
        for recording in source.recordings[:: max(1, len(source.recordings) // SAMPLE_SIZE)]:
            try:
                check_audio(recording.path, recording.num_channels)
                if recording.words is not None:
                    read_words(recording.path, recording.duration_sec)
            except ValueError as error:
                bad_input.skip(str(recording.path), error)
    bad_input.require_enough()
    return count


def model_finding(config: TrainConfig, place: Place) -> Finding:
    """Whether this node finds the base model."""
    find_base(config.model)
    return Finding(place.host, detail=f"{config.model.source} is there")


def disk_finding(config: TrainConfig, place: Place) -> Finding:
    """Whether the main process may write to where the run goes, and there is space for its checkpoints."""
    folder = existing_folder(config)
    mark(folder).write_text(place.host)
    free = shutil.disk_usage(folder).free
    needed = (kept_checkpoints(config) + 1) * checkpoint_bytes(
        config, build_on_meta(config), place.world_size
    )
    if free < needed:
        return Finding(
            place.host,
            f"{folder} has {free / GIB:.2f} GiB free, and the run's checkpoints need {needed / GIB:.2f}: "
            "make space, choose another run_dir, or keep fewer with checkpoint.keep",
        )
    return Finding(
        place.host,
        detail=f"{needed / GIB:.2f} GiB for checkpoints in {folder}, {free / GIB:,.0f} GiB are free",
    )


def shared_finding(config: TrainConfig, place: Place, writer: str) -> Finding:
    """Whether this node sees what the main process wrote to where the run goes."""
    folder = existing_folder(config)
    path = mark(folder)
    if path.is_file() and path.read_text() == writer:
        return Finding(place.host, detail="all nodes see the same run_dir")
    return Finding(
        place.host,
        f"a file that {writer} wrote to {folder} is not seen here; give a run_dir on a file system that all "
        "nodes share",
    )


def existing_folder(config: TrainConfig) -> Path:
    """The run directory, or the folder above it that exists."""
    folder = Path(config.run_dir).expanduser().resolve()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def mark(folder: Path) -> Path:
    """A file that only this preflight writes."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    return folder / f".preflight-{hashlib.sha256(run.encode()).hexdigest()[:12]}"


class Preflight:
    """Runs checks on the processes that they concern, and tells what all of them found."""

    def __init__(self, config: TrainConfig, place: Place):
        self.config = config
        self.place = place
        self.failed = False

    def run(self) -> bool:
        """Returns whether all is well."""
        config, place = self.config, self.place
        with time_limit(place, "processes"):
            if place.world_size > 1:
                # Not NCCL: that a GPU is missing must be told, too.
                dist.init_process_group("gloo", timeout=timedelta(seconds=2 * TIMEOUT_SEC))
        one_of_node = place.local_rank == 0
        self.check("processes", lambda: Finding(place.host, detail="met"))
        gpus = self.check("GPUs", lambda: gpu_finding(config, place))
        if not self.failed:
            use_cuda = bool(gpus[0].same) and gpus[0].same != "cpu"
            self.check("all-reduce", lambda: all_reduce_finding(place, use_cuda))
        self.check("base model", lambda: model_finding(config, place), one_of_node)
        self.check("data", lambda: data_finding(config, place), one_of_node)
        disk = self.check("disk", lambda: disk_finding(config, place), place.rank == 0)
        if disk[0].problem is None:
            self.check("run_dir", lambda: shared_finding(config, place, disk[0].host), one_of_node)
        if place.rank == 0:
            mark(existing_folder(config)).unlink(missing_ok=True)
        if place.world_size > 1:
            dist.destroy_process_group()
        return not self.failed

    def check(self, name: str, find: Callable[[], Finding], concerned: bool = True) -> list[Finding]:
        """Run a check where it concerns, and print what was found once in the log of each node."""
        mine = None
        with time_limit(self.place, name):
            if concerned:
                try:
                    mine = find()
                except (
                    ValueError,
                    OSError,
                    RuntimeError,
                ) as error:  # of torch, too: it is what is looked for
                    mine = Finding(self.place.host, f"{type(error).__name__}: {error}")
            everyone: list[Finding | None] = [mine]
            if self.place.world_size > 1:
                everyone = [None] * self.place.world_size
                dist.all_gather_object(everyone, mine)
        found = [finding for finding in everyone if finding is not None]
        problems = [f"{f.host}: {f.problem}" for f in found if f.problem is not None]
        first = found[0]
        other = next((f for f in found if f.same != first.same), None)
        if not problems and other is not None:
            problems.append(f"{other.host} and {first.host} differ ({other.detail}; {first.detail})")
        self.failed |= bool(problems)
        if self.place.local_rank == 0:
            for problem in dict.fromkeys(problems):
                print(f"preflight: FAILED  {name}: {problem}", flush=True)
            if not problems:
                hosts = sorted({f.host for f in found})
                told = f"{len(found)} on {', '.join(hosts)}" if name == "processes" else first.detail
                print(f"preflight: ok      {name}: {told}", flush=True)
        return found


register()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(config: DictConfig) -> None:
    try:
        typed = to_typed(config)
    except ValueError as error:
        sys.exit(f"preflight: FAILED  config: {error}")
    if not Preflight(typed, Place.find()).run():
        sys.exit(1)


if __name__ == "__main__":
    main()
