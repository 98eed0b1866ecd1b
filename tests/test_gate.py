"""A closed gate is plain Moshi; an inner learner that does not learn is a fixed network."""

import math

import pytest
import torch
from moshi.models.lm import LMGen

from moshi_ttt.integration import ttt_layers

GATES = ["residual", "convex"]


def generate(model, user_codes):
    """Greedy tokens `[1, 9, T - 1]` and the text logits of every step `[T, card]`."""
    logits = []
    generator = LMGen(model, use_sampling=False, on_text_logits_hook=lambda x: logits.append(x.flatten()))
    with generator.streaming(1):
        frames = [generator.step(user_codes[:, :, t : t + 1]) for t in range(user_codes.shape[2])]
    return torch.cat(frames[1:], dim=2), torch.stack(logits)


def assert_same_logits(a, b):
    """Equal to the last bit; invalid logits are NaN."""
    for name in ("logits", "text_logits"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_a_closed_gate_gives_the_offline_logits_of_plain_moshi_bit_for_bit(build, random_codes, gate, dtype):
    plain, closed = build(dtype, enable=False), build(dtype, gate=gate, gate_init=0.0)
    opened = build(dtype, gate=gate, gate_init=0.5)
    codes = random_codes(2, 20)
    assert_same_logits(closed(codes), plain(codes))
    assert not torch.equal(opened(codes).text_logits, plain(codes).text_logits)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_a_closed_gate_generates_what_plain_moshi_generates_bit_for_bit(build, random_codes, gate):
    user = random_codes(1, 20)[:, :8]
    tokens, logits = generate(build(enable=False), user)
    closed_tokens, closed_logits = generate(build(gate=gate, gate_init=0.0), user)
    opened_tokens, _ = generate(build(gate=gate), user)
    assert torch.equal(closed_tokens, tokens)
    assert torch.equal(closed_logits, logits)
    assert not torch.equal(opened_tokens, tokens)


@pytest.mark.parametrize(
    "gate, gate_init, weight",
    [("residual", 0.1, math.tanh(0.1)), ("convex", 0.1, 0.1), ("residual", 0.0, 0), ("convex", 0.0, 0)],
)
def test_the_gate_reports_the_weight_that_it_gives_to_ttt(build, gate, gate_init, weight):
    for _, layer in ttt_layers(build(gate=gate, gate_init=gate_init)):
        live = layer.seq_modeling_block.gate.ttt_weight()
        assert live.shape == (128,)
        assert (live - weight).abs().max() <= (1e-6 if weight else 0)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_closes_with_the_whole_number_0(build, gate):
    module = build(gate=gate, gate_init=0).transformer.layers[1].seq_modeling_block.gate
    assert module.alpha.dtype == torch.float32
    assert torch.all(module.ttt_weight() == 0)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_the_reported_weight_is_the_weight_in_use(build, gate):
    module = build(gate=gate, gate_init=0.3).transformer.layers[1].seq_modeling_block.gate
    x, update, m = torch.randn(3, 1, 5, 128).unbind(0)
    slope = module(x, update, m + 1) - module(x, update, m)
    assert (slope - module.ttt_weight()).abs().max() <= 1e-5
    attention_weight = module(x, update + 1, m) - module(x, update, m)
    expected = 1 if gate == "residual" else 1 - module.ttt_weight()
    assert (attention_weight - expected).abs().max() <= 1e-5


K = 4


@pytest.mark.parametrize("kind", [{"ssm_layer": "ttt_linear"}, {"ttt_mlp_layers": 2}, {"ttt_mlp_layers": 3}])
@torch.no_grad()
def test_without_inner_learning_an_output_depends_on_its_token_and_place_alone(ttt_layer, kind):
    fixed = ttt_layer(mini_batch_size=K, base_lr=0, **kind)
    x = torch.randn(1, K, 32).repeat(1, 3, 1)
    out = fixed(x)
    assert torch.equal(out[:, :K], out[:, K : 2 * K])
    assert torch.equal(out[:, :K], out[:, 2 * K :])
    changed = x.clone()
    changed[:, 5] += 1
    same = [t for t in range(3 * K) if t != 5]
    assert torch.equal(fixed(changed)[:, same], out[:, same])
    assert not torch.equal(fixed(changed)[:, 5], out[:, 5])


@torch.no_grad()
def test_without_inner_learning_streaming_keeps_the_learned_weights(ttt_layer):
    layer = ttt_layer(mini_batch_size=K, base_lr=0)
    with layer.ttt.streaming(1):
        layer(torch.randn(1, 3 * K + 1, 32))
        state = layer.ttt._streaming_state
        assert torch.equal(state.inner.weights[0], state.initial.weights[0])


@torch.no_grad()
def test_with_inner_learning_repeated_tokens_are_answered_differently(ttt_layer):
    x = torch.randn(1, K, 32).repeat(1, 3, 1)
    out = ttt_layer(mini_batch_size=K)(x)
    assert (out[:, :K] - out[:, K : 2 * K]).abs().max() > 1e-3
