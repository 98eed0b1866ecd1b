"""Where the tests of this folder compute: the first CUDA device.

With GPU_TESTS_DEVICE=cpu they run without a GPU, where captured graphs are plain calls: this tries the tests
themselves, and holds nothing of what they are for.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from moshi.utils.compile import no_cuda_graph

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"


def missing() -> str | None:
    """What these tests need and this machine lacks."""
    if ON_GPU and not torch.cuda.is_available():
        return "needs a CUDA GPU; torch sees none here"
    return None


@contextmanager
def graphs(captured: bool) -> Iterator[None]:
    """Run Moshi's steps as captured CUDA graphs, or eagerly."""
    if captured:
        yield
    else:
        with no_cuda_graph():
            yield
