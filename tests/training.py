"""Training runs for the tests: tiny configs of the demo, and what a run leaves behind."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from finetune.config import TrainConfig, to_typed
from finetune.data.batches import training_batches
from finetune.data.clips import Batch, cut_clips
from finetune.data.manifest import read_manifest
from finetune.data.order import Sampling
from finetune.distributed import Process
from finetune.run_dir import Metrics, create_run_dir
from finetune.train import build_parts, train
from finetune.trainer import Parts, Trainer

# As the processes that are started here have: the last bits of a product depend on the number of threads.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "sample_data"
CPU = Process(0, 1, torch.device("cpu"))

# The demo, much shorter. Paths are absolute so that tests run from any folder.
TINY = (
    "experiment=demo",
    f"data.train={SAMPLE / 'train.jsonl'}",
    f"data.valid={SAMPLE / 'valid.jsonl'}",
    "duration_sec=1.28",
    "batch_size=2",
    "max_steps=2",
    "log_every=1",
    "first_codebook_weight_multiplier=100",
    "ttt.ttt_layer_context=25",
    "ttt.non_ttt_layer_context=50",
    "lora.rank=4",
    "eval.every_steps=0",
    "eval.prompt=null",
    "checkpoint.every_steps=0",
    "device=cpu",
)


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    """The config that `python -m finetune.train OVERRIDES` composes. Later overrides win."""
    merged = {override.split("=", 1)[0]: override for override in overrides}
    with initialize_config_module("configs", version_base="1.3"):
        return compose(name, list(merged.values()))


def tiny_config(run_dir: Path, *overrides: str) -> TrainConfig:
    return to_typed(compose_config(*TINY, f"run_dir={run_dir}", *overrides))


def run(run_dir: Path, *overrides: str) -> Path:
    """Train the tiny config in this process."""
    return train_here(tiny_config(run_dir, *overrides))


def train_here(config: TrainConfig) -> Path:
    with own_logging():
        return train(config, CPU)


def one_step(
    run_dir: Path, codes: Sequence[torch.Tensor], *overrides: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train one step on micro-batches of codes `[B, 17, T]`: what was logged, and the gradients by name."""
    config = tiny_config(
        run_dir, "max_steps=1", "optim.max_norm=1e9", f"num_microbatches={len(codes)}", *overrides
    )
    parts = build_parts(config, [], CPU)
    run_dir.mkdir()
    batches = iter([Batch(part, []) for part in codes])
    Trainer(config, parts, batches, CPU, run_dir, Metrics(run_dir, config)).train()
    gradients = {name: p.grad for name, p in parts.model.named_parameters() if p.grad is not None}
    return records(run_dir, "train")[0], gradients


def trained_parts(run_dir: Path, *overrides: str) -> Parts:
    """Train the tiny config and keep the live model, in evaluation mode, beside its run directory."""
    config = tiny_config(run_dir, *overrides)
    parts = build_parts(config, [], CPU)
    create_run_dir(config)
    clips = cut_clips(read_manifest(config.data.train), config.duration_sec)
    batches = training_batches(parts.encoder, clips, Sampling(config.batch_size, config.seed))
    Trainer(config, parts, batches, CPU, run_dir, Metrics(run_dir, config)).train()
    parts.model.eval()
    return parts


@contextmanager
def own_logging() -> Iterator[None]:
    """A run replaces the handlers of the root logger; pytest needs its own afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = handlers
        root.setLevel(level)


def records(run_dir: Path, split: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one split."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def dialogue(number: int = 4) -> np.ndarray:
    """Samples `[n, 2]` of a sample dialogue, 24 kHz."""
    samples, _ = soundfile.read(SAMPLE / f"audio/dialogue_{number}.flac", dtype="float32")
    return samples


def write_recording(
    folder: Path, samples: np.ndarray, rate: int = 24000, words: tuple = (), **wav: Any
) -> Path:
    """Write a data set of one recording in Kyutai's format; returns its jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "a.wav", samples, rate, **wav)
    (folder / "a.json").write_text(json.dumps({"alignments": words}))
    jsonl = folder / "list.jsonl"
    jsonl.write_text(json.dumps({"path": "a.wav", "duration": len(samples) / rate}) + "\n")
    return jsonl


def write_prompt(path: Path, samples: int = 30001) -> Path:
    """A short question of the user, 24 kHz: by default 15 frames and a part of one."""
    soundfile.write(path, dialogue(4)[14400 : 14400 + samples, 1], 24000)
    return path


def start_python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a new Python in the repository's folder, stderr in stdout.

    It has one thread: tests share the cores with other processes. What is found on PYTHONPATH here is found
    there too.
    """
    paths = (environment.pop("PYTHONPATH", str(ROOT)), os.environ.get("PYTHONPATH", ""))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, paths))} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


def run_python(*arguments: str, **environment: str) -> str:
    """Run a new Python to its end, which must be a good one; returns what it printed."""
    process = start_python(*arguments, **environment)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed
