"""Saving checkpoints while training goes on.

Training waits only until the tensors are copied to the host; a thread of each process writes them. The
threads have a process group of their own, since a group is not to be used by two threads.
"""

import logging
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moshi.models.loaders import CheckpointInfo

from finetune.distributed import Process, gather, share, sum_over_processes
from finetune.pieces import Piece, staged, write_pieces
from moshi_ttt.checkpoint import (
    begin_checkpoint,
    checkpoint_step_folder,
    file_entry,
    finish_checkpoint,
    sync,
    write_consolidated,
    write_manifest,
)

logger = logging.getLogger(__name__)

RESUME = "resume"
RESUME_MANIFEST = "resume.json"
# Of JSON files and of the file system's own, beside the tensors.
_MARGIN_BYTES = 4 << 20


def piece_file(rank: int) -> str:
    """Name of the file of one process's pieces."""
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Consolidated:
    """What the main process writes of a checkpoint's consolidated folder.

    Args:
        model_config, training_config: plain values.
        base: the base model.
        weights: tensors of each file, on the CPU.
        keep: how many checkpoints to keep; None keeps all.
    """

    model_config: dict[str, Any]
    training_config: dict[str, Any]
    base: CheckpointInfo
    weights: dict[str, dict[str, torch.Tensor]]
    keep: int | None


class Saver:
    """Writes the checkpoints of a run. Every process has one, and calls it at the same steps.

    A checkpoint that cannot be written is said in the log; training goes on, and older ones stay.

    Args:
        run_dir: the run's folder.
        process: this process.
    """

    def __init__(self, run_dir: Path, process: Process):
        self.run_dir, self.process = run_dir, process
        self._group = dist.new_group(backend="gloo") if process.world_size > 1 else None
        self._pool = ThreadPoolExecutor(1, "saving")
        self._pending: Future[str | None] | None = None
        self._problem: str | None = None

    def save(
        self, step: int, pieces: Iterable[Piece], state: dict[str, Any], consolidated: Consolidated
    ) -> None:
        """Copy what the checkpoint of a step needs, and write it behind the back of training.

        Args:
            pieces: this process's part of the resume checkpoint's tensors.
            state: plain values of the resume checkpoint, of the main process.
            consolidated: of the main process; others give one without weights.
        """
        self.wait()  # for the one before: its copies would fill the memory of the host
        mine = [piece for piece in pieces if piece.is_first]
        tensors = [tensor for of in consolidated.weights.values() for tensor in of.values()]
        tensors += [piece.tensor for piece in mine]
        needed = torch.tensor(sum(t.nbytes for t in tensors), dtype=torch.float64, device=self.process.device)
        self._problem = self._lack_of_disk(int(sum_over_processes(needed, self.process)))
        if self._problem is None:
            arguments = (step, staged(mine), state, consolidated)
            self._pending = self._pool.submit(self._write, *arguments)
        elif self.process.is_main:
            logger.error("checkpoint of step %d not saved: %s; training goes on", step, self._problem)

    def wait(self) -> None:
        """Return when the last checkpoint is written, or could not be."""
        if self._pending is not None:
            self._problem, self._pending = self._pending.result(), None

    def require_saved(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            OSError: it could not be written, so that what was trained since the one before is lost.
        """
        self.wait()
        if self._problem is not None:
            raise OSError(f"the last checkpoint of {self.run_dir} is not saved: {self._problem}")

    def close(self) -> None:
        """Wait, and end the thread."""
        self._pool.shutdown()

    def _lack_of_disk(self, tensor_bytes: int) -> str | None:
        """What is wrong where a checkpoint does not fit on the disk; the same in every process."""
        problem = None
        if self.process.is_main:
            free = shutil.disk_usage(self.run_dir).free
            needed = tensor_bytes + _MARGIN_BYTES
            if free < needed:
                problem = (
                    f"not enough free disk at {self.run_dir}: a checkpoint needs {needed / 1e9:.3g} GB, "
                    f"{free / 1e9:.3g} GB are free; make room, or lower checkpoint.keep"
                )
        return share(problem, self.process)

    def _write(
        self, step: int, pieces: list[Piece], state: dict[str, Any], consolidated: Consolidated
    ) -> str | None:
        """Write a checkpoint together with the threads of the other processes; returns what went wrong."""
        final = checkpoint_step_folder(self.run_dir, step)
        temporary = final.with_name(f"tmp.{final.name}")
        folder = temporary / RESUME
        files: dict[str, dict[str, Any]] = {}
        is_main = self.process.is_main

        def begin() -> None:
            begin_checkpoint(self.run_dir, step)
            folder.mkdir()

        def write_mine() -> None:
            path = folder / piece_file(self.process.rank)
            write_pieces(path, pieces)
            sync([path])
            files[path.name] = file_entry(path)

        def finish() -> None:
            c = consolidated
            write_consolidated(
                temporary / "consolidated", step, c.model_config, c.training_config, c.base, c.weights
            )
            write_manifest(folder / RESUME_MANIFEST, {"step": step, **state}, files)
            finish_checkpoint(temporary, c.keep)

        def everyone(action: Callable[[], None]) -> str | None:
            problems = gather((_attempt(action), files), self.process, self._group)
            for _, theirs in problems:
                files.update(theirs)
            return next((problem for problem, _ in problems if problem is not None), None)

        def nothing() -> None:
            pass

        problem = None
        for action in (begin if is_main else nothing, write_mine, finish if is_main else nothing):
            problem = everyone(action)
            if problem is not None:
                break
        if is_main and problem is None:
            logger.info("saved %s", final)
        elif is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            logger.error("checkpoint of step %d not saved: %s; training goes on", step, problem)
        return problem


def _attempt(action: Callable[[], None]) -> str | None:
    """Do something on the disk; returns what went wrong, so that no process waits for one that gave up."""
    try:
        action()
    except OSError as error:
        return str(error)
    return None
