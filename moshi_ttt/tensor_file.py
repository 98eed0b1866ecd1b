"""Writing safetensors files while other threads go on.

The library's own `save_file` keeps every other thread of Python waiting until the file is written, a training
loop among them. The format is a short header before the bytes, which are written here as they lie in memory.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write CPU tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written whole.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    # The widest first, as the library does: every tensor is then aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for _, tensor in ordered:
            assert tensor.device.type == "cpu"
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
