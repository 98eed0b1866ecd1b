"""Running jobs side by side, each result stored when it is there."""

import json
import logging
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
from moshi.utils.compile import no_compile, no_cuda_graph
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluation.recall.arms import ARMS, build_arm, parameters
from evaluation.recall.scoring import capacity, score_arm
from evaluation.recall.settings import Job
from evaluation.recall.training import train_arm

logger = logging.getLogger(__name__)

_REPORT_EVERY = 10


class OutOfTimeError(Exception):
    """A job was not begun, or not finished, in the time that was given."""


def run_jobs(
    jobs: list[Job],
    speech: torch.Tensor,
    store: Path,
    workers: int,
    device: torch.device | None = None,
    max_minutes: float | None = None,
) -> None:
    """Run the jobs that are not in the store, in their order, with a progress bar in optimiser steps.

    Args:
        speech: codes of speech `[2, N]`.
        device: where the models are; None is the CPU.
        max_minutes: no job trains on after these; one that only answers then is waited for.
    """
    device = device or torch.device("cpu")
    until = math.inf if max_minutes is None else time.time() + 60 * max_minutes
    store.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not (store / job.file_name).is_file()]
    logger.info("%d jobs: %d are in %s, %d to run", len(jobs), len(jobs) - len(todo), store, len(todo))
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    total = sum(job.training.max_steps for job in todo)
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool,
        tqdm(total=total, desc="recall", unit="step") as bar,
        logging_redirect_tqdm(),
    ):
        steps = manager.Queue()
        futures = {pool.submit(_run, job, speech, store, steps, device, until): job for job in todo}
        errors = []
        for future in _finished(futures, steps, bar):
            job, error = futures[future], future.exception()
            if error is not None:
                errors.append(error)
                logger.info("%s, seed %d: not done: %s", job.arm, job.seed, error)
                continue
            result = future.result()
            bar.update(job.training.max_steps - result["learned"]["steps"])  # what it did not need
            logger.info(
                "%s, seed %d: %d steps in %.0f s, right answers in training %.3f, streaming %s",
                job.arm,
                job.seed,
                result["learned"]["steps"],
                result["seconds"],
                result["learned"]["accuracy"],
                ", ".join(f"{d}x {s['streaming']:.2f}" for d, s in result["scores"][job.arm].items()),
            )
    for error in errors:
        if not isinstance(error, OutOfTimeError):
            raise error


def _one_thread() -> None:
    torch.set_num_threads(1)


def _finished(futures: dict[Future, Job], steps: Queue, bar: tqdm) -> Iterator[Future]:
    """Futures as they finish, the bar moved on meanwhile."""
    waiting = set(futures)
    while waiting:
        with suppress(Empty):
            bar.update(steps.get(timeout=1.0))
        done = {future for future in waiting if future.done()}
        yield from done
        waiting -= done


def _run(
    job: Job, speech: torch.Tensor, store: Path, steps: Queue, device: torch.device, until: float
) -> dict[str, Any]:
    """Teach and ask one arm; the result is stored and returned."""
    _check_time(until)
    started = time.perf_counter()
    arm = ARMS[job.arm]

    starter = multiprocessing.parent_process()
    assert starter is not None

    def on_step(step: int, _: float) -> None:
        if step % _REPORT_EVERY == 0:
            if not starter.is_alive():
                raise RuntimeError("the benchmark was stopped; its worker stops too")
            steps.put(_REPORT_EVERY)
            _check_time(until)

    model = build_arm(arm, job.size, job.vocabulary, job.ttt, job.seed).to(device)
    reach = job.size.receptive_field
    # Episodes differ in length: each would be compiled anew. Without graphs a GPU does what the CPU does.
    with no_compile(), no_cuda_graph():
        learned = train_arm(model, arm, job.training, job.vocabulary, speech, job.seed, on_step)
        scores = {
            name: dict(score_arm(model, ARMS[name], job.scoring, job.vocabulary, speech, reach))
            for name in job.asked_as
        }
        held = dict(capacity(model, job.scoring, job.vocabulary, speech, reach))
    result = {
        "job": asdict(job),
        "parameters": parameters(model),
        "learned": asdict(learned),
        "scores": scores,
        "capacity": held,
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "device": device.type,
    }
    path = store / job.file_name
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return result


def _check_time(until: float) -> None:
    if time.time() >= until:
        raise OutOfTimeError("max_minutes are over")


def stored_results(jobs: list[Job], store: Path) -> dict[str, list[dict[str, Any]]]:
    """Results that are there, by arm as it was asked, in the order of seeds."""
    results: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        path = store / job.file_name
        if path.is_file():
            result = json.loads(path.read_text())
            for arm, scores in result["scores"].items():
                results.setdefault(arm, []).append(result | {"scores": scores})
    return results
