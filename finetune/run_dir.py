"""The folder of a run, its log and its metrics."""

import json
import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml

from finetune.config import TrainConfig, to_plain

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def refuse_existing(run_dir: Path) -> None:
    """Raise ValueError if the run directory exists: a run never writes into another."""
    if run_dir.exists():
        raise ValueError(f"run_dir {run_dir} exists; choose a new one, or remove it if nobody needs it")


def create_run_dir(config: TrainConfig) -> Path:
    """Make the folder and write config.yaml."""
    run_dir = Path(config.run_dir).expanduser()
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    return run_dir


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
    """

    def __init__(self, run_dir: Path, config: TrainConfig):
        self.path = run_dir / "metrics.jsonl"
        self.path.touch()
        self.wandb = None
        if config.wandb.mode != "disabled":
            import wandb

            self.wandb = wandb
            wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                name=config.wandb.name or run_dir.name,
                mode=cast(Literal["online", "offline"], config.wandb.mode),
                dir=run_dir,
                config=to_plain(config),
            )

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
