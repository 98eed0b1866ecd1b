"""A recording in chunks with carried state is the recording in one pass."""

import math

import pytest
import torch

from moshi_ttt.carried import CarriedState, carried_bytes, chunk_steps, forward_chunk, fresh_state
from moshi_ttt.delays import scored_in_clip
from moshi_ttt.integration import set_activation_checkpointing, set_attention_context
from moshi_ttt.lora import LoRAConfig

CHUNK = 12

VARIANTS = {
    "context shorter than the chunk": {"ttt_layer_context": 5, "non_ttt_layer_context": 9},
    "context longer than the chunk": {"ttt_layer_context": 17, "non_ttt_layer_context": 40},
    "no look back at all": {"ttt_layer_context": 1, "non_ttt_layer_context": 1},
    "one inner layer": {"ssm_layer": "ttt_linear", "ttt_layer_context": 6, "non_ttt_layer_context": 14},
    "plain layers": {"enable": False, "layers": "none", "non_ttt_layer_context": 9},
    "on the bound": {"max_inner_change": 0.01, "ttt_layer_context": 5, "non_ttt_layer_context": 9},
    "convex gate": {"gate": "convex", "ttt_layer_context": 5, "learned_token_scale": True},
}


def in_chunks(model, codes, length=CHUNK, carried=None):
    """Outputs of all chunks and the state after each."""
    outputs, states = [], []
    for chunk in codes.split(length, dim=-1):
        output, carried = forward_chunk(model, chunk, carried)
        outputs.append(output)
        states.append(carried)
    return outputs, states


def in_order_of_codes(model, outputs):
    """Text and audio logits, masks and targets of chunks, as `LMModel.forward` orders those of a clip."""
    names = ("text_logits", "text_mask", "text_targets", "logits", "mask", "targets")
    joined = {name: torch.cat([getattr(output, name) for output in outputs], dim=2) for name in names}
    for group, delays in (("text_", model.delays[:1]), ("", model.delays[1 : 1 + model.dep_q])):
        for name in ("logits", "mask", "targets"):
            lines = joined[group + name]
            joined[group + name] = [lines[:, k, d:] for k, d in enumerate(delays)]
            for k, d in enumerate(delays):
                if name == "mask":
                    assert not lines[:, k, :d].any()  # what comes before the first frame is no target
    return joined


@pytest.fixture
def with_gaps(random_codes):
    """Codes `[B, 17, T]` with some missing text and some missing audio, also at an edge of chunks."""

    def with_gaps(batch_size, frames):
        codes = random_codes(batch_size, frames)
        codes[:, 0, 3:6] = -1
        codes[:, :9, CHUNK - 1] = -1
        codes[:, 4, CHUNK + 3] = -1
        return codes

    return with_gaps


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_two_chunks_are_one_pass_of_double_length(build, perturb, with_gaps, variant, lora):
    model = perturb(build(lora=LoRAConfig(enable=lora, rank=4), **variant))
    codes = with_gaps(2, 2 * CHUNK)
    whole = model(codes)
    outputs, _ = in_chunks(model, codes)
    joined = in_order_of_codes(model, outputs)
    scored = 0
    for group, first in (("text_", 0), ("", 1)):
        logits, mask = getattr(whole, group + "logits"), getattr(whole, group + "mask")
        for k, line in enumerate(joined[group + "logits"]):
            length = line.shape[1]
            assert torch.equal(joined[group + "mask"][k], mask[:, k, :length])  # each target once
            assert not mask[:, k, length:].any()
            counted = mask[:, k, :length]
            torch.testing.assert_close(line[counted], logits[:, k, :length][counted], rtol=0, atol=1e-5)
            assert torch.equal(joined[group + "targets"][k][counted], codes[:, first + k, :length][counted])
            scored += int(counted.sum())
    assert scored == int(whole.mask.sum() + whole.text_mask.sum())
    # What is carried decides: without it the second chunk is another.
    alone, _ = forward_chunk(model, codes[..., CHUNK:])
    assert (alone.text_logits - outputs[1].text_logits).abs().max() > 1e-3


def test_the_targets_of_whole_clips_are_moshis(build, with_gaps):
    model = build()
    codes = with_gaps(2, 2 * CHUNK)
    with torch.no_grad():
        output = model(codes)
    scored = scored_in_clip(model, codes)
    assert torch.equal(scored[:, :1], output.text_mask)
    assert torch.equal(scored[:, 1:9], output.mask)


@torch.no_grad()
def test_keys_and_inner_weights_go_through_several_chunks(build, perturb, random_codes):
    # Contexts that reach over more than two chunks, and chunks of two mini-batches.
    model = perturb(build(ttt_layer_context=21, non_ttt_layer_context=30))
    codes = random_codes(2, 48)
    outputs, states = in_chunks(model, codes, 8)
    whole = model(codes)
    text = torch.cat([output.text_logits for output in outputs], dim=2)
    torch.testing.assert_close(text, whole.text_logits, rtol=0, atol=1e-5)
    assert states[-1].position.tolist() == [48, 48]
    assert all(state.codes.shape == (2, 17, 2) for state in states)


def rows_of(state: CarriedState, row: int) -> list[torch.Tensor]:
    """A row's part of every tensor."""
    rows = state.position.shape[0]
    return [t.unflatten(0, (rows, -1))[row] for t in state.tensors()]


def gradients(model, codes, checkpointing):
    """Summed gradients of three carried chunks, each with a backward pass of its own."""
    set_activation_checkpointing(model, checkpointing)
    model.zero_grad()
    carried = None
    for chunk in codes.split(CHUNK, dim=-1):
        output, after = forward_chunk(model, chunk, carried)
        text = torch.where(output.text_mask[..., None], output.text_logits, 0)
        (text.square().sum() + output.logits.square().sum()).backward()
        carried = after
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, carried


@pytest.mark.parametrize("group", [0, 2])
def test_activation_checkpointing_changes_no_gradient(build, perturb, random_codes, group):
    model = perturb(build(ttt_layer_context=7, non_ttt_layer_context=20, scan_checkpoint_group_size=group))
    model.train()
    codes = random_codes(2, 3 * CHUNK)
    kept, state = gradients(model, codes, False)
    recomputed, other_state = gradients(model, codes, True)
    assert kept.keys() == recomputed.keys()
    assert len(kept) == len(list(model.parameters()))
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0
    assert all(map(torch.equal, state.tensors(), other_state.tensors()))


def test_the_state_is_only_read_and_has_no_history(build, perturb, random_codes):
    model = perturb(build(ttt_layer_context=7, non_ttt_layer_context=20))
    _, carried = forward_chunk(model, random_codes(2, CHUNK))
    before = [tensor.clone() for tensor in carried.tensors()]
    codes = random_codes(2, CHUNK)
    first, after = forward_chunk(model, codes, carried)
    first.text_logits.sum().backward()
    second, again = forward_chunk(model, codes, carried)
    assert torch.equal(first.text_logits, second.text_logits)
    assert all(map(torch.equal, after.tensors(), again.tensors()))
    assert all(map(torch.equal, carried.tensors(), before))
    assert not any(tensor.requires_grad for tensor in after.tensors())
    assert all(layer.inner is None or layer.inner.weights[0].dtype == torch.float32 for layer in after.layers)


def test_inner_weights_are_float32_in_a_bfloat16_model(build, random_codes):
    model = build("bfloat16", ttt_layer_context=7, non_ttt_layer_context=20)
    _, carried = forward_chunk(model, random_codes(2, CHUNK))
    for layer, hybrid in zip(carried.layers, (False, True, True, False), strict=True):
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
        assert (layer.inner is not None) == hybrid
        if layer.inner is not None:
            assert {t.dtype for t in (*layer.inner.weights, *layer.inner.biases)} == {torch.float32}


@torch.no_grad()
def test_a_batch_of_four_is_four_alone(build, perturb, random_codes):
    model = perturb(build(ttt_layer_context=7, non_ttt_layer_context=20))
    codes = random_codes(4, 3 * CHUNK)
    # Recordings of different lengths: rows 1 and 3 go on to another after one and two chunks.
    restarts = [[], [1], [3]]
    carried = fresh_state(model, 4)
    alone = [fresh_state(model, 1) for _ in range(4)]
    for rows, chunk in zip(restarts, codes.split(CHUNK, dim=-1), strict=True):
        carried = carried.restarted(model, torch.tensor([row in rows for row in range(4)]))
        alone = [fresh_state(model, 1) if row in rows else state for row, state in enumerate(alone)]
        output, carried = forward_chunk(model, chunk, carried)
        for row in range(4):
            single, alone[row] = forward_chunk(model, chunk[row : row + 1], alone[row])
            torch.testing.assert_close(output.text_logits[row], single.text_logits[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(output.logits[row], single.logits[0], rtol=0, atol=1e-5)
            assert torch.equal(output.mask[row], single.mask[0])
            for shared, own in zip(rows_of(carried, row), rows_of(alone[row], 0), strict=True):
                torch.testing.assert_close(shared, own, rtol=0, atol=1e-5)
    assert carried.position.tolist() == [3 * CHUNK, 2 * CHUNK, 3 * CHUNK, CHUNK]


@torch.no_grad()
def test_the_state_after_a_change_of_recording_is_a_fresh_state(build, perturb, random_codes):
    model = perturb(build(ttt_layer_context=7, non_ttt_layer_context=20))
    _, carried = in_chunks(model, random_codes(3, 2 * CHUNK))
    restarted = carried[-1].restarted(model, torch.tensor([True, False, True]))
    fresh = fresh_state(model, 3)
    for row, is_fresh in enumerate((True, False, True)):
        expected = rows_of(fresh if is_fresh else carried[-1], row)
        assert all(map(torch.equal, rows_of(restarted, row), expected))
        assert is_fresh or any(t.any() for t in rows_of(restarted, row))
    # And what follows is what follows a fresh state, to the last bit, whoever sits in the row beside.
    codes = random_codes(3, CHUNK)
    after, state = forward_chunk(model, codes, restarted)
    first, first_state = forward_chunk(model, codes)
    for row in (0, 2):
        assert torch.equal(after.text_logits[row], first.text_logits[row])
        assert torch.equal(after.logits[row], first.logits[row])
        assert all(map(torch.equal, rows_of(state, row), rows_of(first_state, row)))
    assert not torch.equal(after.text_logits[1], first.text_logits[1])


def test_a_fresh_row_starts_from_the_weights_as_they_are_and_trains_them(build, perturb, random_codes):
    model = perturb(build(ttt_layer_context=7, non_ttt_layer_context=20))
    learned = dict(model.named_parameters())["transformer.layers.1.seq_modeling_block.ttt_layer.ttt.W1"]
    codes = random_codes(2, CHUNK)
    carried = fresh_state(model, 2)
    before, after = forward_chunk(model, codes, carried)
    before.text_logits.square().mean().backward()
    assert learned.grad is not None
    assert learned.grad.abs().max() > 0
    with torch.no_grad():
        learned.add_(torch.randn_like(learned))
    changed, _ = forward_chunk(model, codes, carried)
    assert (changed.text_logits - before.text_logits).abs().max() > 1e-3
    # Rows in the middle of a recording have their own weights: theirs is a gradient of exactly 0.
    model.zero_grad()
    forward_chunk(model, codes, after)[0].text_logits.square().mean().backward()
    assert learned.grad is not None
    assert not learned.grad.any()


def test_chunks_are_whole_mini_batches_of_the_same_rows(build, random_codes):
    model = build(ttt_layer_context=7, non_ttt_layer_context=20)
    with pytest.raises(ValueError, match="10 frames is no whole number of mini-batches of 4; use 8 or 12"):
        forward_chunk(model, random_codes(1, 10))
    _, carried = forward_chunk(model, random_codes(2, 8))
    with pytest.raises(ValueError, match="carried state has 2 rows, the chunk 3"):
        forward_chunk(model, random_codes(3, 8), carried)
    with model.streaming(1), pytest.raises(ValueError, match="the model is streaming"):
        forward_chunk(model, random_codes(1, 8))
    set_attention_context(model, None, None)
    model.transformer.layers[0].self_attn.context = None
    with pytest.raises(ValueError, match="layer 0 has no attention context"):
        forward_chunk(model, random_codes(1, 8))


def test_the_bytes_are_those_of_the_state(build):
    model = build(ttt_layer_context=7, non_ttt_layer_context=20)
    state = fresh_state(model, 3)
    attention = sum(t.nbytes for layer in state.layers for t in (layer.keys, layer.values))
    inner = sum(
        t.nbytes
        for layer in state.layers
        if layer.inner is not None
        for t in (*layer.inner.weights, *layer.inner.biases)
    )
    assert carried_bytes(model, 3) == {"attention": attention, "inner": inner}
    assert math.prod(state.layers[1].keys.shape) == 3 * 6 * 128


def test_targets_are_known_before_the_forward_pass(build, random_codes):
    model = build(ttt_layer_context=7, non_ttt_layer_context=20)
    _, carried = forward_chunk(model, random_codes(2, CHUNK))
    codes = random_codes(2, CHUNK)
    steps = chunk_steps(model, codes, carried)
    output, _ = forward_chunk(model, codes, carried)
    assert torch.equal(steps.targets[:, 1:9], output.targets)
    assert torch.equal(steps.scored[:, :1], output.text_mask)
