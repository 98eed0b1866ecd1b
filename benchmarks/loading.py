"""Loading Moshi: how long, and in how much memory, beside a plain read of the same file.

A file of Moshi 7B's layout with one of its 32 layers and its whole depformer (random bfloat16) is
written to a temporary folder. It is in the page cache when it is read, so the figures are what the processor
does; a disk is slower than either. Memory is how much the loading process grows, file pages included.
"""

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import _lm_kwargs, get_moshi_lm
from safetensors.torch import save_file

from benchmarks.harness import Contestant, Entry, Options, lower_is_better, medians, rounds_of
from moshi_ttt.tiny_model import hub_key_names

LAYERS = 1


def write_weights(path: Path, lm_config: dict[str, Any]) -> None:
    """Random bfloat16 weights of a Moshi of these sizes."""
    with torch.device("meta"):
        model = get_moshi_lm(None, lm_config, device="meta", dtype=torch.bfloat16)
    pool = torch.randn(2**24).bfloat16()

    def filled(like: torch.Tensor) -> torch.Tensor:
        times = -(-like.numel() // pool.numel())
        return pool.repeat(times)[: like.numel()].view(like.shape)

    state = {name: filled(value) for name, value in model.state_dict().items()}
    save_file(hub_key_names(state), path)


def entries(options: Options) -> list[Entry]:
    folder = Path(tempfile.mkdtemp(prefix="loading_"))
    try:
        lm_config = _lm_kwargs | {"num_layers": LAYERS}
        path = folder / "model.safetensors"
        write_weights(path, lm_config)
        given = {"weights": str(path), "lm_config": json.dumps(lm_config)}
        with ExitStack() as stack:
            found = {how: Contestant("load", given | {"how": how}) for how in ("load_moshi", "bare read")}
            for contestant in found.values():
                stack.callback(contestant.close)
            seconds = medians(rounds_of(found, 3))
            peak = max(found["load_moshi"].peak_mib)
        size = path.stat().st_size / 2**20
    finally:
        shutil.rmtree(folder)
    what = f"reading {size / 1024:.1f} GiB from the page cache, unused"
    return [
        lower_is_better(
            "loading Moshi, time", seconds["load_moshi"], seconds["bare read"], 1.0, "CPU s", what
        ),
        lower_is_better("loading Moshi, memory", peak, size, 0.95, "MiB", "the file: no second copy"),
    ]
