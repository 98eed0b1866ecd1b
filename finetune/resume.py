"""Going on from a run's last checkpoint: which one, and whether this run may."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.config import TrainConfig, flat, to_plain
from finetune.distributed import Process, gather, share
from finetune.run_dir import CONFIG, refuse_existing
from finetune.saving import RESUME, RESUME_MANIFEST
from moshi_ttt.checkpoint import read_training_config, saved_checkpoints, verify_files

logger = logging.getLogger(__name__)

# What a run may always change: where it lies, and how it is resumed.
_FREE = ("run_dir", "resume")


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to go on from.

    Args:
        folder: of its step.
        state: plain values that were saved with it.
        same_run: whether it is this run's own, so that log and metrics go on; else this run branches off.
    """

    folder: Path
    state: dict[str, Any]
    same_run: bool

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def weights(self) -> Path:
        """What the model is built from: of frozen weights, too, what the run started with."""
        return self.folder / "consolidated"

    @property
    def piece_files(self) -> list[Path]:
        return [self.folder / RESUME / name for name in sorted(self.state["files"])]


def resume_mode(config: TrainConfig) -> str:
    """`resume.mode`, or what it stands for."""
    return config.resume.mode or ("auto" if "SLURM_JOB_ID" in os.environ else "never")


def find_resume_point(config: TrainConfig, process: Process) -> tuple[ResumePoint | None, list[Path]]:
    """Where this run goes on, None where it starts; and newer checkpoints in its folder that are no good.

    The newest checkpoint whose every sum is right is taken. Every process must call this: they divide the
    files among them.

    Raises:
        ValueError: the run directory holds something else than this run, a setting has changed that may not,
            or there is no valid checkpoint where one was named; in every process.
    """
    problem: str | None = None
    candidates: list[Path] = []
    if process.is_main:
        try:
            candidates = _candidates(config)
        except ValueError as error:
            problem = str(error)
    _raise(share(problem, process))
    run_dir = Path(config.run_dir).expanduser()
    damaged: list[Path] = []
    for folder in share(candidates, process):
        state, problem = _verified(folder, process)
        if problem is None:
            _raise(share(_changed(config, folder) if process.is_main else None, process))
            return ResumePoint(folder, state, _is_in(folder, run_dir)), damaged
        if _is_in(folder, run_dir):
            damaged.append(folder)
        if process.is_main:
            logger.warning("checkpoint %s is skipped: %s", folder, problem)
    if process.is_main:
        problem = _start_afresh(config, run_dir)
    _raise(share(problem, process))
    return None, damaged


def _is_in(folder: Path, run_dir: Path) -> bool:
    return folder.resolve().parents[1] == run_dir.resolve()


def _raise(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


def _candidates(config: TrainConfig) -> list[Path]:
    """Step folders to try, the newest first."""
    mode, run_dir = resume_mode(config), Path(config.run_dir).expanduser()
    if mode == "never":
        refuse_existing(run_dir)
        return []
    if mode == "auto":
        return saved_checkpoints(run_dir)[::-1]
    named = Path(mode).expanduser()
    if (named / RESUME / RESUME_MANIFEST).is_file():
        found, run = [named], named.resolve().parents[1]
    else:
        found, run = saved_checkpoints(named)[::-1], named.resolve()
    if not found:
        raise ValueError(
            f"resume.mode={mode} names no checkpoint; expected auto, never, a run directory or a folder "
            f"checkpoint_NNNNNN with {RESUME}/"
        )
    if run_dir.exists() and (run_dir.resolve() != run or found[0].name != saved_checkpoints(run)[-1].name):
        raise ValueError(
            f"run_dir {run_dir} exists and resume.mode={mode} is not its last checkpoint; choose a new "
            "run_dir"
        )
    return found


def _verified(folder: Path, process: Process) -> tuple[dict[str, Any], str | None]:
    """The state of a checkpoint, and what is wrong with it."""
    share_of_files = slice(process.rank, None, process.world_size)
    state: dict[str, Any] = {}
    problem = None
    try:
        verify_files(folder / "consolidated", share=share_of_files)
        if not (folder / RESUME / RESUME_MANIFEST).is_file():
            raise ValueError(f"{folder} has no {RESUME}/{RESUME_MANIFEST}; it can be used with init_from")
        state = verify_files(folder / RESUME, RESUME_MANIFEST, share_of_files)
    except (ValueError, OSError) as error:
        problem = str(error)
    return state, next((p for p in gather(problem, process) if p is not None), None)


def changes(before: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """(before, now) of every setting that differs from those saved as plain values."""
    # A setting that an older release did not know had the value that is the default now.
    old = flat(to_plain(TrainConfig(run_dir=""))) | flat(before)
    new = flat(json.loads(json.dumps(to_plain(config))))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _named(key, _FREE)
    }


def _named(key: str, names: tuple[str, ...] | list[str]) -> bool:
    """Whether a key, or a group that it is in, is among the names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _refusal(before: dict[str, Any], config: TrainConfig, where: Path) -> str | None:
    differing = changes(before, config)
    refused = {k: v for k, v in differing.items() if not _named(k, config.resume.allow)}
    if refused:
        told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in refused.items())
        return (
            f"{where} was trained with other settings: {told}. Restore them, or name them in "
            f"resume.allow=[{','.join(refused)}] if the change is meant, or choose a new run_dir"
        )
    for key, (old, new) in differing.items():
        logger.warning("resuming with a changed setting: %s was %r, is %r", key, old, new)
    return None


def _changed(config: TrainConfig, folder: Path) -> str | None:
    return _refusal(read_training_config(folder / "consolidated"), config, folder)


def _start_afresh(config: TrainConfig, run_dir: Path) -> str | None:
    """What is wrong with starting from step 0 where there is no valid checkpoint."""
    mode = resume_mode(config)
    if mode not in ("auto", "never"):
        return f"resume.mode={mode}: none of its checkpoints is valid; see the warnings above"
    if not run_dir.exists() or all(path.name.startswith(".tmp.") for path in run_dir.iterdir()):
        return None
    if not (run_dir / CONFIG).is_file():
        return f"run_dir {run_dir} exists and is no run (no {CONFIG}); choose a new one, or remove it"
    problem = _refusal(yaml.safe_load((run_dir / CONFIG).read_text()), config, run_dir)
    if problem is None:
        logger.warning("%s has no valid checkpoint: starting afresh in it", run_dir)
    return problem
