"""Loading Moshi: how long, and in how much memory, beside a plain read of the same file.

A file of Moshi 7B's layout with one of its 32 layers and its whole depformer (random bfloat16) is
written to a temporary folder, and read from its disk, and from the page cache, which is what the processor
does. Memory is how much the loading process grows, file pages included.
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
OURS, BARE = "load_moshi", "bare read"


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
        cached, peak = _seconds(given | {"from": "page cache"}, "cpu_sec")
        cold, _ = _seconds(given | {"from": "disk"}, "wall_sec")
        size = path.stat().st_size / 2**20
    finally:
        shutil.rmtree(folder)
    what = f"reading {size / 1024:.1f} GiB from the"
    return [
        lower_is_better(
            "loading Moshi, time from disk", cold[OURS], cold[BARE], 1.0, "s", f"{what} same disk, unused"
        ),
        lower_is_better(
            "loading Moshi, time", cached[OURS], cached[BARE], 1.0, "CPU s", f"{what} page cache, unused"
        ),
        lower_is_better("loading Moshi, memory", peak, size, 0.95, "MiB", "the file: no second copy"),
    ]


def _seconds(given: dict[str, str], clock: str) -> tuple[dict[str, float], float]:
    """Median seconds of loading and of a bare read; and MiB that loading grew by at most.

    The first round of a process, which loads libraries too, is not counted.
    """
    with ExitStack() as stack:
        found = {how: Contestant("load", given | {"how": how}, clock=clock) for how in (OURS, BARE)}
        for contestant in found.values():
            stack.callback(contestant.close)
        return medians(rounds_of(found, 3)), max(found[OURS].peak_mib[1:])
