"""Streaming gives what one offline pass gives, for every way to cut a sequence into calls."""

import pytest
import torch
from moshi.models.lm import LMGen
from moshi.models.lm_utils import _delay_sequence

from moshi_ttt.integration import temporal_attentions
from moshi_ttt.streaming import streaming

pytestmark = pytest.mark.usefixtures("each_cpu_kernel")

K = 5
FRAMES = 23  # no multiple of K


def cut(length, pattern):
    """Chunk sizes that repeat `pattern` until `length` frames are used up."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(pattern[len(sizes) % len(pattern)], length - sum(sizes)))
    return sizes


SPLITS = [[1], [3], [K], [K - 1], [K + 1], [7, 1], [FRAMES]]
KINDS = [
    {"ssm_layer": "ttt_linear"},
    {"ssm_layer": "ttt_mlp"},
    {"ssm_layer": "ttt_mlp", "ttt_mlp_layers": 3},
    {"ssm_layer": "ttt_mlp", "inner_lr_factors": [0.5, 2.0]},
]
# Offsets of the step scales are drawn by the fixture, some below 0.
OPTIONS = [{}, {"learned_token_scale": True}, {"normalize_target": False}]


@pytest.mark.parametrize("pattern", SPLITS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ttt_layer_streams_what_it_computes_offline(ttt_layer, kind, options, pattern):
    layer = ttt_layer(mini_batch_size=K, **kind, **options)
    x = torch.randn(2, FRAMES, 32)
    offline = layer(x)
    with layer.ttt.streaming(2):
        streamed = torch.cat([layer(chunk) for chunk in x.split(cut(FRAMES, pattern), dim=1)], dim=1)
    assert (streamed - offline).abs().max() <= 1e-5


@torch.no_grad()
def test_the_tested_options_are_not_idle(ttt_layer):
    x = torch.randn(1, FRAMES, 32)
    layer = ttt_layer(mini_batch_size=K, learned_token_scale=True)
    offset, with_offset = layer.ttt.token_scale_offset, layer(x)
    assert torch.all(offset != 0)
    offset.zero_()
    without_offset = layer(x)
    layer.ttt.normalize_target = False
    assert not torch.allclose(with_offset, without_offset, atol=1e-3)
    assert not torch.allclose(layer(x), without_offset, atol=1e-3)


@torch.no_grad()
def test_an_inner_layer_whose_step_factor_is_0_stays_as_it_is_and_the_other_learns(ttt_layer):
    ttt = ttt_layer(mini_batch_size=K, inner_lr_factors=[0.0, 1.0]).ttt
    x, start = torch.randn(1, FRAMES, 32), ttt.initial_weights(1)
    out, end = ttt.forward_from(x, start)
    assert torch.equal(end.weights[0], start.weights[0])
    assert torch.equal(end.biases[0], start.biases[0])
    assert (end.weights[1] - start.weights[1]).abs().max() > 1e-3
    assert ttt.kernel == "eager"  # the kernels know no factors
    ttt.inner_lr_factors = None
    assert not torch.allclose(ttt(x), out, atol=1e-4)


MAX_CHUNK = 7
CONTEXTS = {"ttt_layer_context": 6, "non_ttt_layer_context": 9}


def delayed(model, codes):
    """The codes as the temporal transformer gets them in training."""
    initial = model._get_initial_token().expand(codes.shape[0], -1, -1)
    return torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)[:, :, :-1]


@pytest.mark.parametrize(
    "pattern", [[1], [2], [3], [4], [5], [6], [7], [7, 1], [1, 7], [2, 5, 7, 1, 6]], ids=str
)
@torch.no_grad()
def test_hybrid_model_streams_what_it_computes_offline(build, random_codes, pattern):
    model = build(mini_batch_size=K, **CONTEXTS)
    sequence = delayed(model, random_codes(2, 40))
    offline = model.forward_text(sequence)
    with streaming(model, 2, max_chunk=MAX_CHUNK):
        calls = [model.forward_text(chunk) for chunk in sequence.split(cut(40, pattern), dim=2)]
    for whole, parts in zip(offline, zip(*calls, strict=True), strict=True):
        assert (torch.cat(parts, dim=whole.dim() - 2) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("gate", ["residual", "convex"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_hybrid_model_streams_what_it_computes_offline(build, random_codes, kind, gate):
    model = build(mini_batch_size=K, gate=gate, **kind, **CONTEXTS)
    sequence = delayed(model, random_codes(1, FRAMES))
    offline, _ = model.forward_text(sequence)
    with streaming(model, 1, max_chunk=3):
        parts = [model.forward_text(chunk)[0] for chunk in sequence.split(3, dim=2)]
    assert (torch.cat(parts, dim=1) - offline).abs().max() <= 1e-5


@torch.no_grad()
def test_the_tested_contexts_are_shorter_than_what_matters(build, random_codes):
    codes = random_codes(1, 40)
    outs = []
    for contexts in (CONTEXTS, {}):
        torch.manual_seed(0)
        model = build(mini_batch_size=K, **contexts)
        outs.append(model.forward_text(delayed(model, codes))[0])
    assert (outs[0] - outs[1]).abs().max() > 0.01


def test_every_temporal_layer_keeps_the_keys_that_a_chunk_needs(build):
    model = build(**CONTEXTS)
    with streaming(model, 2, max_chunk=MAX_CHUNK):
        attentions = [attention for _, _, attention in temporal_attentions(model)]
        capacities = [attention._streaming_state.kv_cache.capacity for attention in attentions]
        sizes = [attention._streaming_state.kv_cache.cache.shape[3] for attention in attentions]
    assert capacities == sizes == [9 + 6, 6 + 6, 6 + 6, 9 + 6]


@torch.no_grad()
def test_a_larger_chunk_than_declared_is_an_error(build, random_codes):
    model = build(**CONTEXTS)
    with streaming(model, 1, max_chunk=3):
        model.forward_text(random_codes(1, 3))
        with pytest.raises(ValueError, match=r"got 4 frames, but 3 were declared.*max_chunk=4"):
            model.forward_text(random_codes(1, 4))
    with model.streaming(1):
        model.forward_text(random_codes(1, 1))
        with pytest.raises(ValueError, match=r"got 2 frames, but 1 were declared.*max_chunk=2"):
            model.forward_text(random_codes(1, 2))
    with pytest.raises(ValueError, match="max_chunk must be at least 1"), streaming(model, 1, max_chunk=0):
        pass


def greedy(model, user_codes):
    """Greedy LMGen's output frames `[1, 9, T - 1]` for user codes `[1, 8, T]`."""
    generator = LMGen(model, use_sampling=False)
    with generator.streaming(1):
        frames = [generator.step(user_codes[:, :, t : t + 1]) for t in range(user_codes.shape[2])]
    assert frames[0] is None
    return torch.cat(frames[1:], dim=2)


@pytest.mark.parametrize("gate", ["residual", "convex"])
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_forward(build, random_codes, gate):
    model = build(gate=gate, **CONTEXTS)
    user = random_codes(1, 25)[:, :8]
    generated = greedy(model, user)
    # The output of step t is frame t - 1, which Moshi made before it heard the user's frame of step t: in
    # `forward` that frame is t - 1, too. The user's frame of step 0 is never used.
    codes = torch.cat((generated, user[:, :, 1:]), dim=1)
    out = model(codes)
    assert torch.equal(out.text_logits.argmax(-1), codes[:, :1])
    assert torch.equal(out.logits.argmax(-1)[out.mask], codes[:, 1:9][out.mask])
    assert out.text_mask.all()
    assert out.mask.sum() == 8 * 24 - 7  # 7 codebooks are delayed by a frame
    assert generated.unique().numel() > 30


@torch.no_grad()
def test_generation_ignores_the_users_first_frame_alone(build, random_codes):
    model = build()
    user = random_codes(1, 12)[:, :8]
    first, second = user.clone(), user.clone()
    first[:, :, 0] = (first[:, :, 0] + 1) % 256
    second[:, :, 1] = (second[:, :, 1] + 1) % 256
    assert torch.equal(greedy(model, first), greedy(model, user))
    assert not torch.equal(greedy(model, second), greedy(model, user))


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_streaming_changes_no_parameter(build, random_codes, batch_size):
    model = build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with streaming(model, batch_size, max_chunk=3):
        for _ in range(5):
            model.forward_text(random_codes(batch_size, 3))
        state = model.transformer.layers[1].seq_modeling_block.ttt_layer.ttt._streaming_state
        learned = state.initial.weights[0].repeat(batch_size, 1, 1)
        assert not torch.allclose(state.inner.weights[0], learned, atol=1e-3)  # it did learn
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_streaming_state_stays_where_it_is(build, random_codes, streaming_tensors):
    # A captured GPU graph keeps the addresses.
    model = build(**CONTEXTS)
    with model.streaming(2):
        before = {name: tensor.data_ptr() for name, tensor in streaming_tensors(model).items()}
        kept = streaming_tensors(model)  # holds the memory, so that no new tensor can get its address
        for step in range(40):
            if step == 20:
                model.reset_streaming(torch.tensor([True, False]))
            if step == 30:
                model.set_exec_mask(torch.tensor([False, True]))
            model.forward_text(random_codes(2, 1))
        assert {name: tensor.data_ptr() for name, tensor in streaming_tensors(model).items()} == before
    assert sum(".seq_modeling_block." in name for name in kept) >= 20


@torch.no_grad()
def test_a_new_stream_starts_from_the_learned_weights(build, random_codes):
    model = build()
    sequence = delayed(model, random_codes(1, 9))
    runs = []
    for _ in range(2):
        with streaming(model, 1, max_chunk=3):
            runs.append(torch.cat([model.forward_text(c)[0] for c in sequence.split(3, dim=2)], dim=1))
    assert torch.equal(*runs)
