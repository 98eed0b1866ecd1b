"""Training steps of `finetune.train` on the same clips as `benchmarks.contestants.step_peer`."""

import itertools
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_module

from benchmarks.contestants.rounds import serve, settings
from finetune.config import to_typed
from finetune.data.clips import cut_clips
from finetune.data.manifest import read_manifest
from finetune.distributed import Process
from finetune.optimizer import Optimizer
from finetune.train import build_parts
from finetune.trainer import Trainer
from moshi_ttt.integration import set_activation_checkpointing


def main() -> None:
    given = settings()
    overrides = [
        "experiment=demo",
        f"run_dir={tempfile.gettempdir()}",
        f"data.train={given['manifest']}",
        "device=cpu",
        "eval.every_steps=0",
        "eval.prompt=null",
        "first_codebook_weight_multiplier=100",
        f"batch_size={len(given['paths'])}",
        f"duration_sec={given['duration_sec']}",
        f"lora.rank={given['rank']}",
        f"gradient_checkpointing={given['checkpointing']}",
        "ttt.enable=false",
        "mode=lora",
        "max_steps=1000",
        "diagnostics.every_steps=0",
    ]
    with initialize_config_module("configs", version_base="1.3"):
        config = to_typed(compose("train", overrides))
    process = Process(0, 1, torch.device("cpu"))
    parts = build_parts(config, [], process)
    wanted = {Path(path).name for path in given["paths"]}
    recordings = [r for r in read_manifest(given["manifest"]) if Path(r.path).name in wanted]
    clips = cut_clips(recordings, config.duration_sec)
    firsts = [clip for clip in clips if clip.is_first]
    batches = (parts.encoder.encode(firsts) for _ in itertools.count())
    if not given["data"]:
        batches = itertools.repeat(next(batches))
    trainer = Trainer(config, parts, iter(batches), process, Path(config.run_dir), None)
    trainer.optimizer = Optimizer(parts.model, config.optim, config.max_steps)
    set_activation_checkpointing(parts.model, config.gradient_checkpointing)
    parts.model.train()
    serve(trainer.train_step, fresh_memory=False)


if __name__ == "__main__":
    main()
