"""The inner learner in every form equals the reference by autograd, and is float32 whatever the model is."""

import pytest
import torch

from moshi_ttt.inner_loop import (
    effective_weights,
    fold_finished,
    inner_loop,
    inner_step,
    step_scale,
)
from moshi_ttt.inner_network import InnerNorm
from moshi_ttt.inner_weights import InnerWeights
from moshi_ttt.integration import ttt_layers
from moshi_ttt.pending import PendingUpdates
from moshi_ttt.reference import reference_inner_loop

pytestmark = pytest.mark.usefixtures("each_cpu_kernel")

NETS = 2
K = 4
FRAMES = 11  # two mini-batches and three tokens of a third
WIDTH = 6
DEPTHS = [1, 2, 3]
FACTORS = [0.5, 2.0, 0.25]
TOLERANCE = 1e-9


def problem(depth, frames=FRAMES):
    """Random arguments of the inner loop in float64, all of them leaves that need gradients."""

    def draw(*shape, around=0.0):
        return (around + torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    dims = [WIDTH, *[2 * WIDTH] * (depth - 1), WIDTH]
    sizes = list(zip(dims[:-1], dims[1:], strict=True))
    return {
        "q": draw(NETS, frames, WIDTH),
        "k": draw(NETS, frames, WIDTH),
        "target": draw(NETS, frames, WIDTH),
        "lr": (0.1 * torch.rand(NETS, frames, dtype=torch.float64)).requires_grad_(),
        "weights": [draw(NETS, *size) for size in sizes],
        "biases": [draw(NETS, 1, width) for _, width in sizes],
        "norm_weight": draw(NETS, 1, WIDTH, around=1.0),
        "norm_bias": draw(NETS, 1, WIDTH),
        "token_scale": torch.rand(K, dtype=torch.float64).requires_grad_(),
    }


def leaves(p):
    return [tensor for value in p.values() for tensor in (value if isinstance(value, list) else [value])]


def reference(p, factors=None):
    """Outputs, final weights and final biases `[NETS, ...]` of the reference, one net at a time."""
    nets = [
        reference_inner_loop(
            p["q"][n],
            p["k"][n],
            p["target"][n],
            p["lr"][n],
            [w[n] for w in p["weights"]],
            [b[n, 0] for b in p["biases"]],
            p["norm_weight"][n, 0],
            p["norm_bias"][n, 0],
            p["token_scale"],
            factors,
        )
        for n in range(NETS)
    ]
    outs, weights, biases = zip(*nets, strict=True)
    return [
        torch.stack(outs),
        *(torch.stack(layer) for layer in zip(*weights, strict=True)),
        *(torch.stack(layer)[:, None] for layer in zip(*biases, strict=True)),
    ]


def dual(p, group_size=0, factors=None):
    out, state = inner_loop(
        p["q"],
        p["k"],
        p["target"],
        p["lr"],
        InnerWeights(tuple(p["weights"]), tuple(p["biases"])),
        InnerNorm(p["norm_weight"], p["norm_bias"], None if factors is None else tuple(factors)),
        step_scale(p["token_scale"]),
        group_size,
    )
    return [out, *state.weights, *state.biases]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("has_factors", [False, True])
@pytest.mark.parametrize("group_size", [0, 1, 2])
@pytest.mark.parametrize("depth", DEPTHS)
def test_inner_loop_equals_the_reference_in_outputs_final_state_and_gradients(depth, group_size, has_factors):
    p = problem(depth)
    factors = FACTORS[:depth] if has_factors else None
    found, expected = dual(p, group_size, factors), reference(p, factors)
    assert_close(found, expected)
    # The loss reads the final state too: gradients through it must be right where a sequence goes on.
    mix = [torch.randn_like(tensor) for tensor in expected]
    gradients = [
        torch.autograd.grad(sum((t * m).sum() for t, m in zip(tensors, mix, strict=True)), leaves(p))
        for tensors in (found, expected)
    ]
    assert all(gradient.abs().max() > 0 for gradient in gradients[1])
    assert_close(*gradients)


@pytest.mark.parametrize("group_size", [0, 2])
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(group_size):
    p = problem(2)
    total = sum(tensor.square().sum() for tensor in dual(p, group_size))
    first = torch.autograd.grad(total, leaves(p), retain_graph=True)
    assert_close(torch.autograd.grad(total, leaves(p)), first)


def test_outputs_alone_give_the_gradients_of_the_reference():
    p = problem(2)
    gradients = [torch.autograd.grad(form(p)[0].square().sum(), leaves(p)) for form in (dual, reference)]
    assert_close(*gradients)


@pytest.mark.parametrize("depth", DEPTHS)
def test_inner_loop_continued_at_a_mini_batch_edge_equals_one_whole(depth):
    p = problem(depth)
    first = {k: v[:, : 2 * K] if k in ("q", "k", "target", "lr") else v for k, v in p.items()}
    rest = {k: v[:, 2 * K :] if k in ("q", "k", "target", "lr") else v for k, v in p.items()}
    out, *state = dual(first)
    rest_out, *final = dual(rest | {"weights": state[:depth], "biases": state[depth:]})
    assert_close([torch.cat((out, rest_out), dim=1), *final], dual(p))


@pytest.mark.parametrize("has_factors", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
@torch.no_grad()
def test_inner_step_equals_the_reference_in_outputs_and_effective_weights_after_every_token(
    depth, has_factors
):
    p = problem(depth)
    factors = tuple(FACTORS[:depth]) if has_factors else None
    state = InnerWeights(tuple(w.clone() for w in p["weights"]), tuple(b.clone() for b in p["biases"]))
    widths = [WIDTH, *(w.shape[2] for w in p["weights"])]
    pending = PendingUpdates.empty(NETS, K, widths, p["q"])
    norm, scale = InnerNorm(p["norm_weight"], p["norm_bias"], factors), step_scale(p["token_scale"])
    position = torch.zeros(NETS, dtype=torch.long)
    for t in range(FRAMES):
        tokens = [p[name][:, t : t + 1] for name in ("q", "k", "target", "lr")]
        out = inner_step(*tokens, position, state, pending, norm, scale)
        position += 1
        fold_finished(position == K, state, pending, scale)
        position %= K
        seen = {k: v[:, : t + 1] if k in ("q", "k", "target", "lr") else v for k, v in p.items()}
        with torch.enable_grad():
            expected = reference(seen, factors)
        now = effective_weights(position, state, pending, scale)
        assert_close([out[:, 0], *now.weights, *now.biases], [expected[0][:, t], *expected[1:]])


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 8, 11])
@torch.no_grad()
def test_effective_weights_of_a_streaming_layer_are_those_of_the_offline_pass(ttt_layer, frames):
    ttt = ttt_layer(mini_batch_size=K, learned_token_scale=True).ttt
    x = torch.randn(3, frames, 32)
    norm = ttt.norm(3)
    tokens = ttt.project(x, torch.arange(frames)[None] % K, norm)
    _, offline = inner_loop(*tokens, ttt.initial_weights(3), norm, ttt.step_scale())
    with ttt.streaming(3):
        ttt(x)
        state = ttt._streaming_state
        nets = state.position.repeat_interleave(2)  # 2 heads
        live = effective_weights(nets, state.inner, state.pending, state.step_scale)
    for a, b in zip((*live.weights, *live.biases), (*offline.weights, *offline.biases), strict=True):
        assert (a - b).abs().max() <= 1e-5


FLOAT32 = {"W1", "W2", "b1", "b2", "ttt_norm_weight", "ttt_norm_bias", "token_scale_offset"}
FLOAT32 |= {"learnable_ttt_lr_weight", "learnable_ttt_lr_bias"}


def always_float32(model):
    """Parameters of the TTT branches that no cast of the model may touch, by name."""
    return {
        f"{index}.{name}": parameter
        for index, layer in ttt_layers(model)
        for name, parameter in layer.seq_modeling_block.named_parameters()
        if name == "gate.alpha" or name.split(".")[-1] in FLOAT32
    }


def test_casting_a_model_to_bfloat16_leaves_the_inner_learner_and_the_gate_as_they_were(build):
    model = build(learned_token_scale=True)
    with torch.no_grad():
        for parameter in always_float32(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing that bfloat16 could hold
    before = {name: parameter.detach().clone() for name, parameter in always_float32(model).items()}
    assert len(before) == 2 * 10
    model.to(torch.bfloat16)
    after = always_float32(model)
    assert all(parameter.dtype == torch.float32 for parameter in after.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in after.items())
    ttt = model.transformer.layers[1].seq_modeling_block.ttt_layer.ttt
    assert ttt.wq.weight.dtype == ttt.wo.bias.dtype == ttt.post_norm.weight.dtype == torch.bfloat16
    assert ttt.rope.dtype == torch.float32


@torch.no_grad()
def test_inner_state_of_a_bfloat16_model_is_float32(build, random_codes, streaming_tensors):
    model = build("bfloat16")
    inner = (".inner.", ".pending.", ".initial.", ".norm.", ".step_scale")
    with model.streaming(1):
        for _ in range(6):
            model.forward_text(random_codes(1, 1))
        tensors = streaming_tensors(model)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if any(part in name for part in inner)}
    assert len(dtypes) == 2 * 16
    assert set(dtypes.values()) == {torch.float32}
    assert tensors["transformer.layers.0.self_attn.kv_cache.cache"].dtype == torch.bfloat16


def test_inner_weights_in_bfloat16_are_refused():
    half = torch.zeros(1, 2, 2, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="inner state is float32"):
        InnerWeights((half,), (half[:, :1],))
