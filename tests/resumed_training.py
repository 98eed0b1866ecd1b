"""What `test_resume.py` runs in several processes: go on from a checkpoint, and write what was found there.

`python -m resumed_training FOLDER CASE=RUN ...` writes FOLDER/CASE/rank_NNNNN.safetensors and clips_N.json.
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open
from training import tiny_config

from finetune.config import TrainConfig
from finetune.data.bad_input import BadInput
from finetune.data.batches import Batches
from finetune.distributed import Process, start, stop, wait_for_all
from finetune.optimizer import Optimizer
from finetune.pieces import staged, write_pieces
from finetune.resume import find_resume_point
from finetune.saving import piece_file
from finetune.train import build_parts, make_batches, read_clips
from finetune.trainer import Trainer

STEPS = (
    "max_steps=20",
    "checkpoint.every_steps=7",
    "checkpoint.keep=null",
    "num_microbatches=2",
    "diagnostics.every_steps=5",
    "optim.lr=1e-3",
    "optim.ttt_lr=1e-3",
    "optim.gate_lr=1e-3",
)
CASES = {
    "clips": ("mode=lora+ttt", "param_dtype=bfloat16"),
    "carried": ("mode=ttt", "lora.enable=false", "ttt.persistent_states=true"),
}
DRAWS = 12


def config_of(case: str, run_dir: Path, world: int, *overrides: str) -> TrainConfig:
    """Four rows a step with any number of processes: in two micro-batches, or one with four processes."""
    rows = ("batch_size=1", "num_microbatches=1") if world == 4 else (f"batch_size={2 // world}",)
    return tiny_config(run_dir, *STEPS, *CASES[case], *rows, *overrides)


def restored(config: TrainConfig, process: Process) -> Trainer:
    """A trainer that would go on where `config` says."""
    point, _ = find_resume_point(config, process)
    assert point is not None
    sources, _ = read_clips(config, BadInput())
    parts = build_parts(config, [], process)
    batches = make_batches(config, parts.encoder, sources, process)
    trainer = Trainer(config, parts, batches, process, Path(config.run_dir), None)
    trainer.optimizer = Optimizer(parts.model, config.optim, config.max_steps)
    trainer.restore(point)
    return trainer


def clips_drawn(trainer: Trainer) -> list[list[str]]:
    """Names of the clips of this process's next steps."""
    assert isinstance(trainer.batches, Batches)
    draw, number = trainer.batches.drawing.draw, trainer.config.num_microbatches
    steps = [[clip for _ in range(number) for clip in draw()] for _ in range(DRAWS)]
    return [[str(clip) for clip in step] for step in steps]


def joined(folder: Path):
    """Whole tensors from the pieces of all processes, but random numbers: {name: tensor}."""
    found, numbers = {}, {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            for key in file.keys():  # noqa: SIM118
                name, _, offset = key.rpartition("@")
                if name.startswith("random/"):
                    continue
                piece = file.get_tensor(key)
                whole = found.setdefault(name, piece.new_empty(shapes[name]))
                place = [int(o) for o in offset.split(",") if o]
                box = tuple(slice(o, o + size) for o, size in zip(place, piece.shape, strict=True))
                whole[box] = piece
                numbers[name] = numbers.get(name, 0) + piece.numel()
    assert all(numbers[name] == tensor.numel() for name, tensor in found.items())
    return found


def main(folder: Path, cases: dict[str, str]) -> None:
    process = start("cpu")
    for case, run in cases.items():
        allow = ("resume.allow=[batch_size,num_microbatches]", f"resume.mode={run}")
        trainer = restored(config_of(case, folder / "run", process.world_size, *allow), process)
        out = folder / case
        out.mkdir(exist_ok=True)
        write_pieces(out / piece_file(process.rank), staged(trainer._pieces()))
        (out / f"clips_{process.rank}.json").write_text(json.dumps(clips_drawn(trainer)))
        trainer.saver.close()
    wait_for_all(process)
    stop(process)


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:]))
