"""The bound of the inner state: it holds, both forms have it alike, and inside it nothing changes."""

import pytest
import torch

from moshi_ttt.config import TTTConfig
from moshi_ttt.inner_loop import inner_loop
from moshi_ttt.reference import reference_inner_loop
from moshi_ttt.ttt_layer import TTTWrapper

pytestmark = pytest.mark.usefixtures("each_cpu_kernel")

K, BOUND = 5, 0.05
KINDS = [{"ssm_layer": "ttt_linear"}, {"ssm_layer": "ttt_mlp"}, {"ttt_mlp_layers": 3}]


def distances(ttt, weights):
    """Distance of each inner layer from the learned one in units of the bound's, `[layers, N]`."""
    learned = ttt.initial_weights(weights.weights[0].shape[0] // ttt.num_heads)
    both = zip(weights.weights, weights.biases, learned.weights, learned.biases, strict=True)
    squares = [(w - w0).square().sum((1, 2)) + (b - b0).square().sum((1, 2)) for w, b, w0, b0 in both]
    return torch.stack([square.sqrt() / ttt.unit_norm(i) for i, square in enumerate(squares)])


def stream(layer, x):
    """Outputs frame by frame, and the inner weights at the end."""
    with layer.ttt.streaming(x.shape[0]):
        outputs = torch.cat([layer(frame) for frame in x.split(1, dim=1)], dim=1)
        return outputs, layer.ttt._streaming_state.inner


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_the_bound_holds_and_streaming_has_it_as_offline(ttt_layer, kind):
    layer = ttt_layer(mini_batch_size=K, max_inner_change=BOUND, **kind)
    x = torch.randn(2, 60, 32)
    streamed, inner = stream(layer, x)
    assert (streamed - layer(x)).abs().max() <= 1e-5
    assert (distances(layer.ttt, inner) <= BOUND * (1 + 1e-5)).all()
    layer.ttt.max_inner_change = None
    free, unbounded = stream(layer, x)
    assert (distances(layer.ttt, unbounded).amax(1) > 2 * BOUND).any(), "the bound of this test is not idle"
    assert (free - streamed).abs().max() > 1e-3
    assert (layer(x) - streamed).abs().max() > 1e-3


@torch.no_grad()
def test_inside_the_bound_not_a_bit_changes(ttt_layer):
    layer = ttt_layer(mini_batch_size=K)
    x = torch.randn(2, 4 * K, 32)
    assert layer.ttt.max_inner_change is not None, "bounded by default"
    (bounded, _), offline = stream(layer, x), layer(x)
    layer.ttt.max_inner_change = None
    assert torch.equal(bounded, stream(layer, x)[0])
    assert torch.equal(offline, layer(x))


@torch.no_grad()
def test_resting_rows_on_the_surface_do_not_move(ttt_layer):
    layer = ttt_layer(mini_batch_size=K, max_inner_change=BOUND)
    with layer.ttt.streaming(2):
        for frame in torch.randn(2, 4 * K, 32).split(1, dim=1):
            layer(frame)
        state = layer.ttt._streaming_state
        before = [w.clone() for w in (*state.inner.weights, *state.inner.biases)]
        layer.ttt.set_exec_mask(torch.tensor([True, False]))
        for frame in torch.randn(2, 4 * K, 32).split(1, dim=1):
            layer(frame)
        for old, new in zip(before, (*state.inner.weights, *state.inner.biases), strict=True):
            rows = torch.equal(old[:2], new[:2]), torch.equal(old[2:], new[2:])
            assert rows == (False, True)


@pytest.mark.parametrize("group", [0, 2])
def test_outputs_and_gradients_are_those_of_the_obvious_form(ttt_layer, group):
    ttt = ttt_layer(mini_batch_size=K, max_inner_change=BOUND).ttt.double()
    for parameter in ttt.parameters():  # the layer keeps its own in float32
        parameter.data = parameter.data.double()
    tokens = [torch.randn(2, 4 * K, 16, dtype=torch.double) for _ in range(3)]
    lr = torch.rand(2, 4 * K, dtype=torch.double)
    names = ["W1", "W2", "b1", "b2"]
    learned = [ttt.get_parameter(name) for name in names]
    scale, bound = ttt.step_scale(), ttt.bound(ttt.initial_weights(1))
    out, _ = inner_loop(*tokens, lr, ttt.initial_weights(1), ttt.norm(1), scale, group, bound)
    gradients = torch.autograd.grad(out.square().sum(), learned)

    expected = torch.stack([by_mini_batches(ttt, tokens, lr, learned, head) for head in range(2)])
    assert (out - expected).abs().max() <= 1e-9
    for one, other in zip(gradients, torch.autograd.grad(expected.square().sum(), learned), strict=True):
        assert (one - other).abs().max() <= 1e-8 * other.abs().max()


def by_mini_batches(ttt, tokens, lr, learned, head):
    """The reference for one mini-batch after the other, drawn back in between."""
    start = [learned[0][head], learned[1][head], learned[2][head, 0], learned[3][head, 0]]
    now, outs = start, []
    for first in range(0, 4 * K, K):
        part = [x[head, first : first + K] for x in (*tokens, lr)]
        norm = ttt.ttt_norm_weight[head], ttt.ttt_norm_bias[head]
        out, weights, biases = reference_inner_loop(
            *part, now[:2], now[2:], *norm, ttt.step_scale().diagonal()
        )
        outs.append(out)
        pairs = []
        for layer in range(2):
            weight, bias = weights[layer] - start[layer], biases[layer] - start[2 + layer]
            distance = torch.sqrt(weight.square().sum() + bias.square().sum())
            factor = torch.clamp(BOUND * ttt.unit_norm(layer) / distance, max=1)
            pairs.append((start[layer] + factor * weight, start[2 + layer] + factor * bias))
        now = [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]
    return torch.cat(outs)


@pytest.mark.parametrize("kind", [*KINDS, {"ssm_layer": "ttt_linear", "head_dim": 16}], ids=str)
@torch.no_grad()
def test_ordinary_learning_stays_inside_whatever_the_start(kind):
    ttt = TTTWrapper(32, 1, TTTConfig(**kind)).ttt
    units = [ttt.unit_norm(layer) for layer in range(len(ttt.inner_weights))]
    x = torch.randn(1, 2000, 32)
    bounded, end = ttt.forward_from(x, ttt.initial_weights(1))
    assert distances(ttt, end).amax() > 0.1, "something is learned"
    ttt.max_inner_change = None
    assert torch.equal(bounded, ttt.forward_from(x, ttt.initial_weights(1))[0])
    for weight in ttt.inner_weights:
        weight.mul_(0.01)
    assert units == [ttt.unit_norm(layer) for layer in range(len(units))]


def test_unit_norm_is_that_of_the_scaled_start():
    ttt = TTTWrapper(256, 2, TTTConfig(ttt_mlp_layers=3)).ttt
    for layer, weight in enumerate(ttt.inner_weights):
        norms = torch.linalg.vector_norm(weight, dim=(1, 2))
        assert norms.tolist() == pytest.approx([ttt.unit_norm(layer)] * 2, rel=0.02)


def test_a_bound_of_nothing_is_refused():
    for value in (0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            TTTConfig(max_inner_change=value).validate()
