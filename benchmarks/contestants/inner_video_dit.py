"""Forward and backward pass of ttt-video-dit's `ttt_mlp`, which compiles its mini-batch."""

import torch
from ttt.models.ssm.ops.ttt_mlp import ttt_mlp  # type: ignore[import-not-found]

from benchmarks.contestants.inner_inputs import draw
from benchmarks.contestants.rounds import serve, settings


def main() -> None:
    given = settings()
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

    serve(work)


if __name__ == "__main__":
    main()
