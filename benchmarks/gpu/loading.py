"""Loading a checkpoint of Moshi 7B's size to the GPU, against reading its file once."""

import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from moshi.models.loaders import MOSHI_NAME, _lm_kwargs
from safetensors.torch import save_file

from benchmarks.gpu.clock import synchronize
from benchmarks.gpu.results import Results
from benchmarks.gpu.streaming import moshi_7b
from moshi_ttt.loading import ModelConfig, find_base, load_moshi
from moshi_ttt.tiny_model import hub_key_names, tiny_model_folder

NEEDED_BYTES = 20 << 30


def write_base(folder: Path, device: torch.device) -> Path:
    """A Moshi 7B with random weights in the hub's layout, with the tiny model's codec and tokenizer."""
    tiny = tiny_model_folder()
    for path in tiny.iterdir():
        if path.name not in (MOSHI_NAME, "config.json"):
            shutil.copy(path, folder)
    config = json.loads((tiny / "config.json").read_text()) | _lm_kwargs
    (folder / "config.json").write_text(json.dumps(config))
    state = hub_key_names(moshi_7b(device).state_dict())
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / MOSHI_NAME)
    return folder / MOSHI_NAME


def read_once(path: Path) -> int:
    """Read a file into memory that is used again and again; returns its size."""
    buffer, total = bytearray(64 << 20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def run(results: Results) -> None:
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        free = shutil.disk_usage(folder).free
        if free < NEEDED_BYTES:
            raise ValueError(
                f"{folder} has {free / 2**30:.1f} GiB free, the checkpoint needs {NEEDED_BYTES >> 30}; set "
                "TMPDIR to a folder on a larger disk"
            )
        path = write_base(folder, device)
        torch.cuda.empty_cache()
        started = time.perf_counter()
        size = read_once(path)
        read = time.perf_counter() - started
        started = time.perf_counter()
        model = load_moshi(find_base(ModelConfig(str(folder))), device, torch.bfloat16)
        synchronize(device)
        loaded = time.perf_counter() - started
        assert model.device.type == device.type
    name = f"loading {size / 1e9:.1f} GB of Moshi 7B to the GPU"
    results.add(name, loaded, 60.0, "a minute", "s", 1.0)
    results.add(name, loaded, read, "reading its file once, from the page cache", "s", 0.5)
