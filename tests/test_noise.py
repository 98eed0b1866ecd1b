"""Noise that is a function of seed, step and codebook, and tokens with the distribution of Moshi's."""

import numpy as np
import pytest
import torch
from moshi.utils.sampling import sample_token
from scipy import stats

from inference.noise import draw, philox, uniform


def words(*values):
    return tuple(torch.tensor(value) for value in values)


# Known answers of Random123's own test suite for philox4x32, 10 rounds.
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == expected


def test_numbers_are_uniform_and_of_their_seed_step_and_stream_alone():
    seeds, steps = torch.arange(500), torch.arange(500) * 7 + 2**33
    numbers = uniform(seeds, steps, 9)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 0.01
    assert numbers.unique().numel() == numbers.numel()
    row = uniform(seeds[3:4], steps[3:4], 9)
    assert torch.equal(row, numbers[3:4])
    assert torch.equal(uniform(seeds[3:4], steps[3:4], 4), row[:, :4])
    for changed in (uniform(seeds[3:4] + 2**32, steps[3:4], 9), uniform(seeds[3:4], steps[3:4] + 2**32, 9)):
        assert (changed != row).all()


@pytest.mark.parametrize("top_k", [0, 7, 50])
def test_tokens_have_the_distribution_of_moshis_sampling(top_k):
    draws = 20000
    logits = (2 * torch.randn(1, 20)).expand(draws, 20)
    noise = uniform(torch.full((draws,), 5), torch.arange(draws), 3)[:, 2]
    ours = np.bincount(draw(logits, noise, 0.8, top_k), minlength=20)
    theirs = np.bincount(sample_token(logits, True, 0.8, min(top_k, 20)), minlength=20)
    assert ((ours > 0) == (theirs > 0)).all() or top_k != 7
    kept = logits[0].topk(min(top_k or 20, 20)).indices
    expected = torch.zeros(20, dtype=torch.float64)
    expected[kept] = torch.softmax(logits[0][kept].double() / 0.8, -1)
    assert (ours[expected == 0] == 0).all()
    expected = expected[kept].numpy() * draws
    assert stats.chisquare(ours[kept], expected).pvalue > 0.01


def test_no_temperature_takes_the_likeliest():
    logits = torch.randn(50, 30)
    assert torch.equal(draw(logits, torch.rand(50).double(), 0.0, 5), logits.argmax(-1))


def test_the_ends_of_the_noise_are_tokens():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]]).expand(2, 3)
    assert draw(logits, torch.tensor([0.0, 1.0 - 2**-53]).double(), 1.0, 3).tolist() == [0, 2]
