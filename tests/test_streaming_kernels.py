"""The streaming step in Triton kernels, interpreted on the CPU, is the one in torch's operations."""

import pytest
import torch
from moshi.modules.transformer import _rms_norm

from moshi_ttt.kernels.choice import forced
from moshi_ttt.kernels.residual import gated_sum, normed_sum

SETTINGS = {
    "bound on the last layer": {"max_inner_change": 0.05, "mini_batch_size": 3, "learned_token_scale": True},
    "bound on both layers": {"max_inner_change": 0.01, "mini_batch_size": 3},
    "no bound": {"max_inner_change": None, "mini_batch_size": 4, "normalize_target": False},
    "many slots": {"mini_batch_size": 20},
}
ROWS, FRAMES = 3, 9


def stream(layer, x, kernel):
    """Outputs `[T, B, 1, C]` of rows that rest and start anew, and their last state."""
    outs = []
    with torch.no_grad(), layer.ttt.streaming(ROWS), forced(kernel):
        state = layer.ttt._streaming_state
        for frame in range(FRAMES):
            if frame == 5:
                layer.ttt.reset_streaming(torch.tensor([False, True, False]))
            layer.ttt.set_exec_mask(torch.tensor([True, frame % 4 != 1, frame > 1]))
            outs.append(layer(x[:, frame : frame + 1]))
        return torch.stack(outs), state


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_kernels_give_outputs_and_state_of_the_naive_twin(ttt_layer, settings):
    layer, x = ttt_layer(base_lr=2.0, **settings), torch.randn(ROWS, FRAMES, 32)
    expected, truth = stream(layer, x, "eager")
    found, state = stream(layer, x, "triton")
    assert (found - expected).abs().max() <= 1e-5
    assert torch.equal(state.position, truth.position)
    learned = truth.initial
    pairs = zip(
        (*state.inner.weights, *state.inner.biases),
        (*truth.inner.weights, *truth.inner.biases),
        (*learned.weights, *learned.biases),
        strict=True,
    )
    for now, wanted, start in pairs:
        assert (now - wanted).abs().max() <= 1e-5
        moved = (wanted.unflatten(0, (ROWS, -1)) - start).abs().amax(dim=(2, 3))
        assert (moved[0] > 1e-3).all() == (settings["mini_batch_size"] < FRAMES)


@torch.no_grad()
def test_nothing_that_a_resting_row_is_fed_reaches_its_state(ttt_layer):
    layer, x = ttt_layer(mini_batch_size=4), torch.randn(2, 7, 32)
    fed = x[:, :2].clone()
    fed[1] = torch.nan
    with layer.ttt.streaming(2), forced("triton"):
        layer.ttt.set_exec_mask(torch.tensor([True, False]))
        for frame in fed.split(1, dim=1):
            layer(frame)
        layer.ttt.set_exec_mask(torch.tensor([True, True]))
        rested = torch.cat([layer(frame) for frame in x[:, 2:].split(1, dim=1)], dim=1)[1]
    assert (rested - layer(x[1:, 2:])[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_a_broken_state_stays_to_be_seen(ttt_layer):
    layer, x = ttt_layer(mini_batch_size=2), torch.randn(1, 4, 32)
    with layer.ttt.streaming(1), forced("triton"):
        layer.ttt._streaming_state.inner.weights[1][1, 0, 0] = torch.nan
        out = [layer(frame) for frame in x.split(1, dim=1)]
        assert out[-1].isnan().all()  # all heads meet in the output projection
        weights = layer.ttt._streaming_state.inner.weights[1]
        assert weights[1].isnan().any()
        assert weights[0].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_model_that_streams_in_kernels_is_the_one_in_torchs_operations(build, perturb, random_codes, dtype):
    model = perturb(build(param_dtype=dtype, ttt_layer_context=6, layers="1,2"), "ttt", "gate")
    logits = {}
    for kernel in ("eager", "triton"):
        torch.manual_seed(1)
        with model.streaming(2), forced(kernel):
            logits[kernel] = torch.cat([model.forward_text(random_codes(2, 1))[1] for _ in range(6)], dim=2)
    difference = (logits["triton"] - logits["eager"]).abs().max()
    assert difference <= (1e-5 if dtype == "float32" else 0.1)
    assert logits["eager"].abs().max() > 1


# Triton's interpreter does not round to bfloat16 as a GPU does (tests/gpu).
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_the_sums_around_a_layer_are_those_of_the_modules(dtype, near):
    x, update, out = torch.randn(3, 2, 1, 48).to(dtype)
    alpha, weight = torch.randn(48), torch.rand(1, 1, 48).to(dtype)
    sums = gated_sum(x, update, out, alpha), normed_sum(x, update, weight, 1e-8)
    expected = (
        x + update + torch.tanh(alpha).to(dtype) * out,
        _rms_norm(x + update, weight, torch.float, 1e-8),
    )
    for found, wanted in zip(sums, expected, strict=True):
        assert found.dtype == dtype
        assert (found - wanted).abs().max() <= near
    if dtype == torch.float32:  # a closed gate leaves the stream as it is
        assert torch.equal(gated_sum(x, update, out, torch.zeros(48)), x + update)
