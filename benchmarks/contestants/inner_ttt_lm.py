"""Forward and backward pass of the inner loop of ttt-lm-pytorch's TTTMLP."""

import torch
from ttt import TTTMLP, TTTConfig  # type: ignore[import-not-found]

from benchmarks.contestants.inner_inputs import draw
from benchmarks.contestants.rounds import serve, settings


def main() -> None:
    given = settings()
    x, size = draw(given), given["mini_batch"]
    batch, heads, frames, width = x.q.shape
    count = frames // size
    config = TTTConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        mini_batch_size=size,
        scan_checkpoint_group_size=given["groups"],
    )
    layer = TTTMLP(config, layer_idx=0).train()
    for name, value in zip(("W1", "b1", "W2", "b2"), x.weights, strict=True):
        layer.get_parameter(name).data.copy_(value.detach())
    token_scale = (1 / torch.arange(1, size + 1))[:, None].expand(batch, heads, count, size, 1)
    d_out = x.d_out.transpose(1, 2).reshape(batch, frames, -1)

    def parts(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(batch, heads, count, size, width)

    def work() -> torch.Tensor:
        x.clear()
        layer.zero_grad()
        lr = x.lr.reshape(batch, heads, count, 1, size)
        steps = {"eta": token_scale * lr, "token_eta": token_scale, "ttt_lr_eta": lr}
        out, _ = layer.ttt({"XQ": parts(x.q), "XK": parts(x.k), "XV": parts(x.v)} | steps, size, None)
        out.backward(d_out)
        return out

    serve(work)


if __name__ == "__main__":
    main()
