"""Attention in training is Moshi's, for every window, and never has a T x T mask or T x T scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.attention import forced_kernel, kernel_for, windowed_attention
from moshi_ttt.carried import forward_chunk
from moshi_ttt.integration import set_attention_context
from moshi_ttt.temporal import Running, _attend, temporal_clips

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTH = 150


def tensors(length, carried=0, rows=3, device="cpu", dtype=torch.float32, width=16):
    shapes = (length, carried + length, carried + length)
    made = [torch.randn(rows, n, 2, width, device=device, dtype=dtype) for n in shapes]
    return [tensor.requires_grad_() for tensor in made]


def with_gradients(kernel, inputs, *arguments):
    """Output and gradients of the inputs."""
    with forced_kernel(kernel):
        out = windowed_attention(*inputs, *arguments)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out, *torch.autograd.grad((out * weight.to(out)).sum(), inputs)


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("context", [1, 2, 63, 64, 65, 100, LENGTH - 1, LENGTH, 10 * LENGTH, None])
def test_blocks_are_the_mask(context):
    inputs = tensors(LENGTH)
    assert_same(
        with_gradients("blocks", inputs, context), with_gradients("mask", inputs, context), tolerance=1e-5
    )


@pytest.mark.parametrize("context", [2, 40, 64, 100, 400])
def test_blocks_are_the_mask_with_carried_frames(context):
    # Rows at the start of a recording, inside the window, at its end and far behind it.
    position = torch.tensor([0, context // 2, context - 1, 5000])
    inputs = tensors(LENGTH, context - 1, rows=4)
    found, expected = (with_gradients(kernel, inputs, context, position) for kernel in ("blocks", "mask"))
    assert_same(found, expected, tolerance=1e-5)
    # What lies before a recording is not seen.
    unseen = context - 1 - min(int(position[1]), context - 1)
    assert not found[2][1, :unseen].any()
    assert found[2][1, unseen:].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_frame_sees_its_window_and_nothing_else(rows):
    context, frame = 20, 90
    q, keys, values = tensors(LENGTH, rows=rows)
    out = windowed_attention(q, keys, values, context)
    (gradient,) = torch.autograd.grad(out[:, frame].square().sum(), values)
    seen = gradient.abs().sum((0, 2, 3)) > 0
    assert seen.nonzero().flatten().tolist() == list(range(frame - context + 1, frame + 1))


@pytest.mark.parametrize("context", [8, 50, None])
def test_a_plain_layers_attention_is_moshis(build, random_codes, context):
    model = build()
    set_attention_context(model, context or 250, context or 250)
    layer = model.transformer.layers[0]
    attention = layer.self_attn
    attention.context = context
    x = torch.randn(2, LENGTH, model.dim, requires_grad=True)
    weight = torch.randn_like(x)
    normed = layer.norm1(x)
    expected = attention(normed, normed, normed)
    found, _, _ = _attend(layer, x, None, None)
    assert_same([found], [expected], tolerance=1e-5)
    gradients = [
        torch.autograd.grad((out * weight).sum(), [x, *attention.parameters()]) for out in (found, expected)
    ]
    assert_same(*gradients, tolerance=1e-5)


@torch.no_grad()
def test_whole_clips_and_chunks_are_moshis_own_forward_pass(build, perturb, random_codes):
    model = perturb(build(ttt_layer_context=9, non_ttt_layer_context=25))
    codes = random_codes(2, 80)
    expected = model(codes)
    output, _ = forward_chunk(model, codes)
    # Moshi's logits are in the order of the codes: the first stream has no delay.
    assert_same([output.logits[:, 0]], [expected.logits[:, 0]], tolerance=1e-5)
    assert_same([output.text_logits], [expected.text_logits], tolerance=1e-5)


class LargestTensor(TorchDispatchMode):
    """The most elements that a tensor made while active has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_nothing_is_as_large_as_a_mask(build, random_codes):
    model = build(ttt_layer_context=16, non_ttt_layer_context=16, layers="1")
    length = 1024
    codes = random_codes(1, length)
    largest = {}
    for kernel in ("blocks", "mask"):
        with forced_kernel(kernel), LargestTensor() as made:
            temporal_clips(model, codes.clamp(max=255), Running()).sum().backward()
        largest[kernel] = made.most
    assert largest["mask"] >= length * length
    # What is left is of the feed-forward block, 5.5 times as wide as the model.
    assert largest["blocks"] <= 6 * model.dim * length < length * length


def test_the_kernel_is_chosen_by_device_and_dtype():
    assert kernel_for(torch.zeros(1)) == "blocks"
    assert kernel_for(torch.zeros(1, dtype=torch.bfloat16)) == "blocks"
    # A plan on meta tensors is one for a GPU.
    assert kernel_for(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == "flash"
    assert kernel_for(torch.zeros(1, device="meta")) == "blocks"
    with forced_kernel("mask"):
        assert kernel_for(torch.zeros(1)) == "mask"
    with pytest.raises(ValueError, match="no attention kernel 'fast'; use one of blocks, flash, mask"):
        forced_kernel("fast").__enter__()


@needs_gpu
@pytest.mark.parametrize("context", [1, 2, 50, 100, LENGTH, 3000, None])
def test_flash_is_the_mask_on_a_gpu(context):
    inputs = tensors(LENGTH, device="cuda", dtype=torch.bfloat16, width=128)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = with_gradients("mask", exact, context)
    assert_same(with_gradients("flash", inputs, context), expected, tolerance=2e-2)


@needs_gpu
@pytest.mark.parametrize("context", [2, 50, 100, 400])
def test_flash_is_the_mask_with_carried_frames_on_a_gpu(context):
    position = torch.tensor([0, context // 2, context - 1, 5000], device="cuda")
    inputs = tensors(LENGTH, context - 1, rows=4, device="cuda", dtype=torch.bfloat16, width=128)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = with_gradients("mask", exact, context, position)
    found = with_gradients("flash", inputs, context, position)
    assert_same(found, expected, tolerance=2e-2)
