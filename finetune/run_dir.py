"""The folder of a run, its log and its metrics."""

import json
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml

from finetune.config import TrainConfig, to_plain
from moshi_ttt.atomic import write_atomically
from moshi_ttt.checkpoint import remove_unfinished

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def refuse_existing(run_dir: Path) -> None:
    """Raise ValueError if the run directory exists: a run never writes into another."""
    if run_dir.exists():
        raise ValueError(f"run_dir {run_dir} exists; choose a new one, or remove it if nobody needs it")


def create_run_dir(config: TrainConfig) -> Path:
    """Make the folder where it is not there yet, and write config.yaml."""
    run_dir = Path(config.run_dir).expanduser()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG, yaml.safe_dump(to_plain(config), sort_keys=False))
    return run_dir


def go_back(run_dir: Path, step: int, damaged: Sequence[Path]) -> None:
    """Make a run directory that of a run which has just done `step`: later metrics are cut.

    Args:
        damaged: checkpoints that cannot be used; they are renamed, to be looked at.
    """
    remove_unfinished(run_dir)
    for folder in damaged:
        renamed = folder.with_name(f"damaged.{time.time_ns()}.{folder.name}")
        folder.rename(renamed)
        logger.warning("%s is renamed to %s", folder, renamed.name)
    path = run_dir / METRICS
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    # A process that is killed may leave a part of a line, which is the last.
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_atomically(path, "".join(kept))
        logger.info("%d lines of %s later than step %d are cut", len(lines) - len(kept), path, step)


def start_logging(is_main: bool) -> None:
    """Log to the terminal: everything from the main process, warnings from the others."""
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING, format=LOG_FORMAT, stream=sys.stdout, force=True
    )


class RunLog:
    """The log file of a run, with what was logged before its folder existed. Used as a context manager."""

    def __init__(self):
        self._memory = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> "RunLog":
        logging.getLogger().addHandler(self._memory)
        return self

    def open(self, path: Path) -> None:
        """Write what has been logged so far to `path`, and all that follows."""
        self._file = logging.FileHandler(path)
        self._file.setFormatter(logging.Formatter(LOG_FORMAT))
        self._memory.setTarget(self._file)
        self._memory.flush()
        logging.getLogger().removeHandler(self._memory)
        logging.getLogger().addHandler(self._file)

    def __exit__(self, *error: object) -> None:
        logging.getLogger().removeHandler(self._memory)
        if self._file is not None:
            logging.getLogger().removeHandler(self._file)
            self._file.close()


class Metrics:
    """metrics.jsonl, one object a line, and wandb where it is on.

    Args:
        run_dir: the run's folder.
        config: for wandb's settings, and for wandb to show.
        wandb_id: of the wandb run to go on with; None starts one.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, wandb_id: str | None = None):
        self.path = run_dir / METRICS
        self.path.touch()
        self.wandb = None
        self.wandb_id = wandb_id
        if config.wandb.mode != "disabled":
            self._start_wandb(run_dir, config)

    def _start_wandb(self, run_dir: Path, config: TrainConfig) -> None:
        import wandb
        from wandb.errors import CommError

        self.wandb_id = self.wandb_id or secrets.token_hex(4)

        def start(mode: str) -> None:
            wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                name=config.wandb.name or run_dir.name,
                mode=cast(Literal["online", "offline"], mode),
                dir=run_dir,
                config=to_plain(config),
                id=self.wandb_id,
                resume="allow",
            )

        try:
            start(config.wandb.mode)
        except (CommError, OSError) as error:
            logger.error("wandb cannot be reached: %s; it is used offline: send it with `wandb sync`", error)
            self.wandb_id = secrets.token_hex(4)  # the other stays taken until this process ends
            start("offline")
        self.wandb = wandb

    def log(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Record values of a step under "train" or "valid"."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        if self.wandb is not None:
            self.wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def log_answer(self, step: int, audio: torch.Tensor, sample_rate: int, text: str) -> None:
        """Show a generated answer in wandb; its files are in the run directory anyway."""
        if self.wandb is not None:
            sound = self.wandb.Audio(audio.numpy(), sample_rate=sample_rate, caption=text)
            self.wandb.log({"answer": sound}, step=step)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
