"""Forward and backward pass of ttt-video-dit's `ttt_mlp`, which compiles its mini-batch.

A kernel compiled for the only length that was ever seen can be four times slower here than one compiled after
a second length has come: `other_length_first` lets one come, so that the peer is measured at its better.
"""

from collections.abc import Callable
from typing import Any

import torch
from ttt.models.ssm.ops.ttt_mlp import ttt_mlp  # type: ignore[import-not-found]

from benchmarks.contestants.inner_inputs import draw
from benchmarks.contestants.rounds import serve, settings


def rounds_with(given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A round of work at some length."""
    x, size = draw(given), given["mini_batch"]
    batch, heads, frames, width = x.q.shape
    count = frames // size

    def parts(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(batch, heads, count, size, width)

    def work() -> torch.Tensor:
        x.clear()
        eta = x.lr.reshape(batch, heads, count, 1, size).repeat(1, 1, 1, size, 1) / size
        start = [w.unsqueeze(0).tile(batch, 1, 1, 1) for w in x.weights]
        out = ttt_mlp(parts(x.k), parts(x.q), parts(x.v), eta, *x.norm, *start, given["group"])
        out.backward(parts(x.d_out).permute(0, 2, 3, 1, 4))
        return out

    return work


def main() -> None:
    given = settings()
    if given["other_length_first"]:
        rounds_with(given | {"frames": 4 * given["mini_batch"]})()
    serve(rounds_with(given))


if __name__ == "__main__":
    main()
