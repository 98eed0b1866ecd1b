"""`python -m inference.describe checkpoint=RUN`: what a checkpoint is, read from the live model."""

import logging
import sys
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from inference.generate import choose_device
from moshi_ttt.checkpoint import TRAINING_CONFIG, LoadedCheckpoint, load_checkpoint
from moshi_ttt.integration import context_line, describe


@dataclass
class DescribeConfig:
    """Which checkpoint to describe."""

    checkpoint: str = MISSING
    """A run, a step or a consolidated folder."""

    device: str = "cpu"
    """cuda, cpu, or auto: cuda where there is one."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""


ConfigStore.instance().store(name="describe_schema", node=DescribeConfig)


def description(loaded: LoadedCheckpoint) -> str:
    """Where the settings come from, the context line, and the table of the live layers."""
    base = loaded.manifest["base"]
    revision = "" if base["revision"] is None else f" at {base['revision']}"
    return "\n".join(
        [
            f"checkpoint  {loaded.folder}, step {loaded.manifest['step']}",
            f"settings    {loaded.folder / TRAINING_CONFIG}, nothing overridden",
            f"base model  {base['source']}{revision}, weights with SHA-256 {base['sha256']['moshi'][:12]}",
            f"weights     {loaded.model.dtype}".replace("torch.", ""),
            context_line(loaded.model, inference=True),
            describe(loaded.model),
        ]
    )


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="describe")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    typed = typed_config(config, DescribeConfig)
    print(description(load_checkpoint(typed.checkpoint, choose_device(typed.device), typed.verify)))


if __name__ == "__main__":
    main()
