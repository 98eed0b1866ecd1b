"""Forward and backward pass of our inner loop."""

import torch

from benchmarks.contestants.inner_inputs import draw
from benchmarks.contestants.rounds import serve, settings
from moshi_ttt.config import TTTConfig
from moshi_ttt.inner_loop import inner_loop, step_scale
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerBound, InnerWeights
from moshi_ttt.ttt_layer import TTTMLP


def main() -> None:
    given = settings()
    x, batch, size = draw(given), given["batch"], given["mini_batch"]
    layer = TTTMLP(8, x.q.shape[1], x.q.shape[-1], TTTConfig())  # for its bound
    bound = layer.bound(layer.initial_weights(1))
    assert bound is not None
    scale = step_scale(1 / torch.arange(1, size + 1))

    def work() -> torch.Tensor:
        x.clear()
        w1, b1, w2, b2 = x.weights
        start = InnerWeights(
            tuple(w.repeat(batch, 1, 1) for w in (w1, w2)), tuple(b.repeat(batch, 1, 1) for b in (b1, b2))
        )
        norm_weight, norm_bias = (n[:, None].repeat(batch, 1, 1) for n in x.norm)
        norm = InnerNorm(norm_weight, norm_bias)
        center = InnerBound(InnerWeights((w1, w2), (b1, b2)), bound.radii)
        q, k, target, lr = (t.flatten(0, 1) for t in (x.q, x.k, x.v - x.k, x.lr))
        out, _ = inner_loop(q, k, target, lr, start, norm, scale, given["group"], center)
        out.backward(x.d_out.flatten(0, 1))
        return out

    serve(work)


if __name__ == "__main__":
    main()
