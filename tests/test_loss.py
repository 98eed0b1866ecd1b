"""The loss is Moshi's, written out token by token, however the batch is split."""

import math

import pytest
import torch
from moshi.models.lm import LMOutput
from torch.nn import functional as F
from training import one_step

from finetune.loss import LossWeights, loss_sums, weighted_nll_sum, weighted_targets

WEIGHTS = LossWeights(first_codebook=100.0, text_padding=0.5)
PADDING, END_OF_PADDING = 3, 0


@pytest.fixture
def codes(random_codes):
    """Codes with padding, with clips that end early, and with holes."""
    codes = random_codes(4, 12)
    codes[:, 0, ::3] = PADDING
    codes[:, 0, 1::6] = END_OF_PADDING
    codes[1, :, 9:] = -1
    codes[2, 1:, 4:] = -1  # the quirk of short clips: text goes on behind the audio
    codes[3, 5, 6] = -1
    codes[3, 0, 2] = -1
    return codes


def written_out(model, codes, output, weights):
    """Text and audio loss sums and their weights' sums, one target after the other, in float64."""
    sums, totals = [0.0, 0.0], [0.0, 0.0]
    batch, _, frames = codes.shape
    for row in range(batch):
        for stream in range(1 + model.dep_q):
            for frame in range(frames):
                target = int(codes[row, stream, frame])
                if target == -1 or frame >= frames - model.delays[stream]:
                    continue
                if stream == 0:
                    logits, weight = output.text_logits[row, 0, frame], 1.0
                    if target in (PADDING, END_OF_PADDING):
                        weight = weights.text_padding
                else:
                    logits, weight = output.logits[row, stream - 1, frame], 1.0
                    if stream == 1:
                        weight = weights.first_codebook
                logits = logits.double()
                peak = float(logits.max())
                log_sum = peak + math.log(sum(math.exp(float(x) - peak) for x in logits))
                kind = min(stream, 1)
                sums[kind] += weight * (log_sum - float(logits[target]))
                totals[kind] += weight
    return sums, totals


@torch.no_grad()
@pytest.mark.parametrize("weights", [WEIGHTS, LossWeights(1.0, 1.0), LossWeights(7.0, 0.0)])
def test_the_loss_is_the_one_written_out_token_by_token(build, codes, weights):
    model = build()
    output = model(codes)
    sums, totals = written_out(model, codes, output, weights)
    targets = weighted_targets(model, codes, weights)
    assert loss_sums(output, targets).tolist() == pytest.approx(sums, rel=1e-5)
    assert targets.totals().tolist() == pytest.approx(totals, rel=1e-12)


@torch.no_grad()
def test_the_one_batch_loss_is_moshi_finetunes(build, codes):
    model = build()
    output = model(codes)
    losses = []
    for logits, mask, target in (
        (output.text_logits, output.text_mask, codes[:, :1]),
        (output.logits, output.mask, codes[:, 1:9]),
    ):
        # finetune/loss.py of moshi-finetune, with its default weights
        target = torch.where(mask, target, torch.zeros_like(target))
        weight = mask.float()
        if logits is output.logits:
            weight[:, 0] *= 100.0
        else:
            for token in (PADDING, END_OF_PADDING):
                weight[target == token] *= 0.5
        nll = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), target.flatten(), reduction="none"
        )
        nll = torch.where(weight.flatten() > 0, nll * weight.flatten(), torch.zeros_like(nll))
        losses.append(float(nll.sum() / weight.sum()))
    targets = weighted_targets(model, codes, WEIGHTS)
    means = loss_sums(output, targets).double() / targets.totals()
    assert means.tolist() == pytest.approx(losses, rel=1e-6)


@torch.no_grad()
def test_targets_are_valid_where_moshi_says_so(build, codes):
    model = build()
    output = model(codes)
    targets = weighted_targets(model, codes, WEIGHTS)
    assert torch.equal(targets.text_weight > 0, output.text_mask)
    assert torch.equal(targets.audio_weight > 0, output.mask)
    assert not output.mask.all()
    assert not output.text_mask.all()
    assert output.logits[:, 1:, -1].isnan().all()  # the delay: the last frame of delayed codebooks


def test_the_users_codes_are_no_targets(build, codes):
    model = build()
    targets = weighted_targets(model, codes, WEIGHTS)
    changed = codes.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    after = weighted_targets(model, changed, WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(vars(targets).values(), vars(after).values(), strict=True))


def test_nan_logits_without_a_target_do_no_harm(build, codes):
    model = build()
    output = model(codes)
    clean, targets = [], weighted_targets(model, codes, WEIGHTS)
    for spoil in (False, True):
        text, audio = (x.detach().clone() for x in (output.text_logits, output.logits))
        for logits, weight in ((text, targets.text_weight), (audio, targets.audio_weight)):
            logits[weight == 0] = float("nan") if spoil else 0.0
            logits.requires_grad_()
        sums = loss_sums(LMOutput(audio, output.mask, text, output.text_mask), targets)
        sums.sum().backward()
        clean.append((sums, text.grad, audio.grad))
    for without, with_nan in zip(*clean, strict=True):
        assert with_nan.isfinite().all()
        assert torch.equal(without, with_nan)
    assert (clean[1][2][targets.audio_weight == 0] == 0).all()


def test_nan_where_there_is_a_target_is_not_hidden(build, codes):
    model = build()
    output = model(codes)
    output.logits[0, 0, 5] = float("nan")
    text, audio = loss_sums(output, weighted_targets(model, codes, WEIGHTS)).tolist()
    assert math.isfinite(text)
    assert math.isnan(audio)


def test_no_targets_at_all_cost_nothing(build):
    logits = torch.randn(1, 8, 3, 256, requires_grad=True)
    loss = weighted_nll_sum(logits, torch.full((1, 8, 3), -1), torch.zeros(1, 8, 3))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(4, 8, 50, 256, dtype=torch.bfloat16)
    targets, weight = torch.randint(0, 256, (4, 8, 50)), torch.ones(4, 8, 50)
    total = weighted_nll_sum(logits, targets, weight)
    exact = F.cross_entropy(logits.double().flatten(0, 2), targets.flatten(), reduction="sum")
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_micro_batches_are_one_batch(codes, tmp_path, batch_size):
    # The rows have unlike numbers of targets, so that a mean of means would differ.
    splits = [codes.split(4), codes.split(batch_size)]
    steps = [one_step(tmp_path / str(len(split)), split, "mode=full", "lora=none") for split in splits]
    (whole, gradients), (parts, split_gradients) = steps
    for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6)
    assert gradients.keys() == split_gradients.keys()
    assert len(gradients) > 100
    for name, gradient in gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, rtol=0, atol=1e-6)
        assert gradient.abs().max() > 0
