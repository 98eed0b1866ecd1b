"""Which implementation a streaming step of a TTT layer uses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moshi_ttt.ttt_state import TTTState

_MOST_SLOTS = 64
_WIDTHS = (16, 32, 64, 128, 256)
_forced: str | None = None


def use_fused_step(state: TTTState) -> bool:
    """Whether a stream's next step is `kernels.streaming_step.fused_step`: on a GPU, where it fits."""
    if _forced is not None:
        return _forced == "fused"
    return state.position.device.type == "cuda" and fits(state)


def fits(state: TTTState) -> bool:
    """Whether the kernels are made for a stream of these sizes: a TTT-MLP of two layers, 4 times as wide inside."""
    weights = state.inner.weights
    if len(weights) != 2 or weights[0].dtype != torch.float32:
        return False
    _, width, hidden = weights[0].shape
    return width in _WIDTHS and hidden == 4 * width and state.pending.lr.shape[1] <= _MOST_SLOTS


@contextmanager
def forced_step(implementation: str) -> Iterator[None]:
    """Use "fused" or "naive" wherever a step is run, or captured, while this lasts.

    Raises:
        ValueError: another name.
    """
    global _forced
    if implementation not in ("fused", "naive"):
        raise ValueError(f"a streaming step is fused or naive; got {implementation!r}")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before
