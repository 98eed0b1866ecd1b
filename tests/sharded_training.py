"""What `test_sharding.py` runs in 1, 2 and 4 processes: the same training steps on the same global batches.

`python -m sharded_training FOLDER` joins the others of its launch, and each writes to FOLDER what came out:
gradients, parameters and losses, so that those of several processes can be compared with those of one.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from training import SAMPLE, tiny_config

from finetune.config import TrainConfig, to_plain
from finetune.data.clips import Batch, Clip, cut_clips
from finetune.data.manifest import read_manifest
from finetune.distributed import Process, start, stop, wait_for_all
from finetune.optimizer import Optimizer
from finetune.run_dir import Metrics
from finetune.train import build_parts
from finetune.trainer import Trainer
from moshi_ttt.building import build_model
from moshi_ttt.checkpoint import save_checkpoint
from moshi_ttt.integration import set_activation_checkpointing
from moshi_ttt.whole import whole_parameters

ROWS, FRAMES, STEPS = 4, 16, 5


@dataclass(frozen=True)
class Case:
    """One training of a few steps.

    Args:
        overrides: of the tiny config.
        uneven: rows have different numbers of targets, some have none at all.
        worlds: numbers of processes that run it.
        like: the case whose results in one process these must equal; None for its own.
    """

    overrides: tuple[str, ...]
    uneven: bool = False
    worlds: tuple[int, ...] = (1, 2, 4)
    like: str | None = None


FULL = ("mode=full", "lora.enable=false")
BOTH = ("mode=lora+ttt",)
CARRIED = ("mode=ttt", "lora.enable=false", "ttt.persistent_states=true")
CASES = {
    "lora": Case(("mode=lora",)),
    "ttt": Case(("mode=ttt", "ttt.ttt_mlp_layers=3", "ttt.learned_token_scale=true"), worlds=(1, 2)),
    "both": Case(BOTH),
    "full": Case(FULL),
    "uneven": Case(BOTH, uneven=True),
    "carried": Case(CARRIED),
    "carried_recomputed": Case((*CARRIED, "gradient_checkpointing=true"), worlds=(2,), like="carried"),
    "recomputed": Case((*FULL, "gradient_checkpointing=true"), worlds=(2,), like="full"),
    "kept": Case((*FULL, "fsdp.reshard_after_forward=false"), worlds=(2,), like="full"),
    "replicated": Case((*FULL, "fsdp.shard=none"), worlds=(2,), like="full"),
    "hybrid": Case((*FULL, "fsdp.shard=hybrid", "fsdp.replicate=2"), worlds=(4,), like="full"),
    "added": Case((*BOTH, "num_microbatches=2"), worlds=(1, 2)),
    "added_early": Case(
        (*BOTH, "num_microbatches=2", "fsdp.reduce_every_microbatch=true"), worlds=(2,), like="added"
    ),
    "bfloat16": Case((*BOTH, "param_dtype=bfloat16"), worlds=(1, 2)),
}


def config_of(folder: Path, process: Process, *overrides: str) -> TrainConfig:
    rows = f"batch_size={ROWS // process.world_size}"
    return tiny_config(
        folder / "run", "eval.max_clips=3", f"eval.prompt={folder.parent / 'prompt.wav'}", rows, *overrides
    )


def trainer_of(config: TrainConfig, process: Process, valid: bool = False) -> Trainer:
    clips = cut_clips(read_manifest(config.data.valid), config.duration_sec)[:3] if valid else []
    parts = build_parts(config, clips, process)
    run_dir = Path(config.run_dir)
    if process.is_main:
        run_dir.mkdir(exist_ok=True)
    metrics = Metrics(run_dir, config) if process.is_main else None
    trainer = Trainer(config, parts, global_batches(config, process), process, run_dir, metrics)
    trainer.optimizer = Optimizer(parts.model, config.optim, STEPS + 1)
    set_activation_checkpointing(parts.model, config.gradient_checkpointing)
    parts.loss_model.train()
    return trainer


def global_batches(config: TrainConfig, process: Process, uneven: bool = False) -> Iterator[Batch]:
    """This process's rows of batches that are the same for any number of processes."""
    generator = torch.Generator().manual_seed(7)
    opening, later = cut_clips(read_manifest(SAMPLE / "train.jsonl"), 1.28)[:2]
    assert (opening.is_first, later.is_first) == (True, False)
    mine = slice(process.rank * config.batch_size, (process.rank + 1) * config.batch_size)
    for step in range(100):
        codes = torch.randint(0, 256, (ROWS, 17, FRAMES), generator=generator)
        clips: list[Clip] = [opening if step == 0 or (step, row) == (2, 1) else later for row in range(ROWS)]
        if uneven:
            codes[1, :, FRAMES // 2 :] = -1
            codes[3 - step % 2 :] = -1  # a process of four without a target, then one of two
        yield Batch(codes[mine], clips[mine])


def run_case(case: Case, folder: Path, process: Process) -> dict[str, Any]:
    config = config_of(folder, process, *case.overrides)
    trainer = trainer_of(config, process)
    trainer.batches = global_batches(config, process, case.uneven)
    optimizer = trainer.optimizer
    result: dict[str, Any] = {"start": parts_of(trainer.parts.model.named_parameters()), "losses": []}
    result["trainable"] = list(optimizer.names.values())
    sgd = torch.optim.SGD(optimizer.parameters, lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [next(trainer.batches) for _ in range(config.num_microbatches)]
        result["losses"].append(trainer.forward_backward(batches))
        if step == 0:
            grads = [(name, p.grad) for p, name in optimizer.names.items() if p.grad is not None]
            result["gradients"] = parts_of(grads)
            result["norm"] = optimizer.clip()
        sgd.step()
    result["end"] = parts_of(trainer.parts.model.named_parameters())
    return result


# Of a tensor: a copy of this process's part, the dimension it is split along (None: it is not), and into how
# many. Plain values, so that they are loaded without running code.
Part = tuple[torch.Tensor, int | None, int]


def part_of(tensor: torch.Tensor) -> Part:
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone(), None, 1
    mesh = tensor.device_mesh
    return tensor.detach().to_local().clone(), tensor.placements[-1].dim, mesh.size(mesh.ndim - 1)


def parts_of(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Part]:
    return {name: part_of(tensor) for name, tensor in named}


def joined(ranks: list[dict[str, Part]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the parts of all processes; replicas must be the same."""
    tensors = {}
    for name, (_, dim, shards) in ranks[0].items():
        locals_ = [rank[name][0] for rank in ranks]
        groups = [locals_[start : start + shards] for start in range(0, len(ranks), shards)]
        replicas = [group[0] if dim is None else torch.cat(group, dim) for group in groups]
        assert all(torch.equal(replica, replicas[0]) for replica in replicas), name
        tensors[name] = replicas[0]
    return tensors


def run_adamw(folder: Path, process: Process) -> dict[str, Any]:
    """Evaluate, train, save in every form, evaluate again: all by the trainer itself."""
    rates = ("optim.lr=1e-3", "optim.ttt_lr=1e-3", "optim.gate_lr=1e-3")
    config = config_of(folder, process, *BOTH, *rates)
    trainer = trainer_of(config, process, valid=True)
    parts = trainer.parts
    result = {"valid": [trainer.evaluate()], "losses": []}
    for _ in range(STEPS):
        result["losses"].append(trainer.train_step()["loss"])
    result["valid"].append(trainer.evaluate())
    trainer.save()
    trainer.saver.require_saved()
    parameters = dict(whole_parameters(parts.model))
    tensors = trainer.optimizer.tensors()
    dcp.save(tensors, checkpoint_id=folder / "sharded", no_dist=process.world_size == 1)
    result["tensors"] = {kind: parts_of(of.items()) for kind, of in tensors.items()}
    if process.is_main:
        plain = build_model(config.settings, parts.base)
        plain.load_state_dict(parameters)
        save_checkpoint(folder / "plain", trainer.step, plain, to_plain(config), parts.base, parts.save_base)
    return result


def run_large(folder: Path, process: Process) -> dict[str, int]:
    """Memory of a full training step of a model of 30 million parameters."""
    config = config_of(folder, process, *FULL, "ttt.enable=false", f"model.source={folder.parent / 'large'}")
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    trainer = trainer_of(config, process)
    trainer.train_step()
    held = [t for of in trainer.optimizer.tensors().values() for t in of.values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in held]
    return {"peak": memory("VmHWM") - before, "held": sum(t.nbytes for t in local)}


def memory(name: str) -> int:
    """Bytes of a line of this process's status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:"))


def main(folder: Path) -> None:
    process = start("cpu")
    folder = folder / str(process.world_size)
    if process.is_main:
        folder.mkdir()
    wait_for_all(process)
    (folder / f"memory_{process.rank}.json").write_text(json.dumps(run_large(folder, process)))
    results = {"adamw": run_adamw(folder, process)}
    for name, case in CASES.items():
        if process.world_size in case.worlds:
            results[name] = run_case(case, folder, process)
    torch.save(results, folder / f"results_{process.rank}.pt")
    stop(process)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert os.environ["NO_TORCH_COMPILE"] == "1"
    main(Path(sys.argv[1]))
