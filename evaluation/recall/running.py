"""Running jobs side by side, each result stored when it is there."""

import json
import logging
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
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluation.recall.arms import ARMS, build_arm, parameters
from evaluation.recall.scoring import capacity, score_arm
from evaluation.recall.settings import Job
from evaluation.recall.training import train_arm

logger = logging.getLogger(__name__)

_REPORT_EVERY = 10


def run_jobs(jobs: list[Job], speech: torch.Tensor, store: Path, workers: int) -> None:
    """Run the jobs that are not in the store, with a progress bar in optimiser steps.

    Args:
        speech: codes of speech `[2, N]`.
    """
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
        futures = {pool.submit(_run, job, speech, store, steps): job for job in todo}
        for future in _finished(futures, steps, bar):
            job = futures[future]
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


def _run(job: Job, speech: torch.Tensor, store: Path, steps: Queue) -> dict[str, Any]:
    """Teach and ask one arm; the result is stored and returned."""
    started = time.perf_counter()
    arm = ARMS[job.arm]

    starter = multiprocessing.parent_process()
    assert starter is not None

    def on_step(step: int, _: float) -> None:
        if step % _REPORT_EVERY == 0:
            if not starter.is_alive():
                raise RuntimeError("the benchmark was stopped; its worker stops too")
            steps.put(_REPORT_EVERY)

    model = build_arm(arm, job.size, job.vocabulary, job.ttt, job.seed)
    learned = train_arm(model, arm, job.training, job.vocabulary, speech, job.seed, on_step)
    reach = job.size.receptive_field
    result = {
        "job": asdict(job),
        "parameters": parameters(model),
        "learned": asdict(learned),
        "scores": {
            name: dict(score_arm(model, ARMS[name], job.scoring, job.vocabulary, speech, reach))
            for name in job.asked_as
        },
        "capacity": dict(capacity(model, job.scoring, job.vocabulary, speech, reach)),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }
    path = store / job.file_name
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return result


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
