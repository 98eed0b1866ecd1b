"""Random numbers of a stream that depend on nothing but its seed, the step and the codebook.

A generator that is shared by the rows of a batch would make what one conversation says depend on its
neighbours. Here each number is a function of (seed, step, codebook): Philox-4x32-10, the counter-based
generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in torch's integers, so
that it gives the same bits on every device and can be captured in a GPU graph.
"""

import torch

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF  # of 64 bits


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four random words from four words of counter and two of key; each int64 in [0, 2^32), broadcastable."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap around at 64 bits, as unsigned ones do; what the shift drags in is masked away.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seeds: torch.Tensor, steps: torch.Tensor, streams: int) -> torch.Tensor:
    """Numbers in [0, 1) with 53 random bits, `[B, streams]` float64.

    Args:
        seeds: of each row, `[B]` int64.
        steps: of each row, `[B]` int64, from 0.
        streams: numbers a step: one for the text and one for each codebook.
    """
    zero = torch.zeros_like(steps)[:, None]
    stream = torch.arange(streams, device=steps.device)[None]
    key = ((seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None])
    counter = ((steps & _LOW)[:, None], stream, ((steps >> 32) & _LOW)[:, None], zero)
    high, low, _, _ = philox(counter, key)
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2**-53


def draw(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """Tokens `[B]` from logits `[B, card]`: the distribution of Moshi's `sample_token`, with given noise.

    The noise is looked up in the cumulative distribution over the candidates in the order of their ids: a
    rounding error in the logits moves its borders a little, but does not shuffle them.

    Args:
        noise: uniform, `[B]`.
        temperature: 0 takes the likeliest token.
        top_k: candidates; 0 means all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    tokens, order = tokens.sort(-1)
    steps = torch.softmax(values.gather(-1, order) / temperature, -1).double().cumsum(-1)
    rank = (steps <= noise[:, None] * steps[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, rank.clamp(max=tokens.shape[-1] - 1))[:, 0]
