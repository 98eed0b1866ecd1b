"""A past given in chunks is a past that was heard frame by frame; many frames at a time are faster."""

import statistics
import time

import pytest
import torch

from inference.prefill import prefill
from inference.rows import Sampling, open_rows
from moshi_ttt.integration import ttt_layers
from moshi_ttt.streaming import streaming

SHORT = {"mini_batch_size": 5, "ttt_layer_context": 5, "non_ttt_layer_context": 7}  # the rings wrap
PAST, AFTER = 33, 12


def conversation(rows, row, user):
    """Moshi's tokens `[9, T]` of a conversation that hears codes of the user `[8, T]`."""
    said = []
    for frame in user.split(1, dim=1):
        tokens, speaking = rows.hear(frame.expand(len(rows.heard), -1, -1), [row])
        said += [tokens[row]] if speaking else []
    return torch.cat(said, dim=1)


@pytest.mark.parametrize("max_delay", [1, 3])
@pytest.mark.parametrize("past", [1, 2, PAST])
@pytest.mark.parametrize("chunk", [8, 64])
def test_a_conversation_goes_on_from_a_past_as_if_it_had_had_it(build, random_codes, chunk, past, max_delay):
    model = build(**SHORT)
    model.delays = [min(d, 1) * max_delay for d in model.delays]
    user = random_codes(1, past + AFTER)[0, 9:]
    with open_rows(model, Sampling(), 1) as rows:
        rows.start(0, seed=4)
        said = conversation(rows, 0, torch.nn.functional.pad(user, (0, max_delay), value=3))
    assert said.unique().numel() > 40
    codes = torch.cat((said[:, :past], user[:, :past]))
    with open_rows(model, Sampling(), 3, max_chunk=chunk) as rows:
        rows.start(1, seed=9)  # a neighbour, in the middle of something
        before = conversation(rows, 1, user[:, :6])
        rows.start(2, seed=4)
        prefill(rows, 2, codes, chunk)
        assert rows.heard == [0, 6, past]
        after = conversation(rows, 2, user[:, past:])
        neighbour = conversation(rows, 1, user[:, 6:])
    new = said[:, max(0, past - max_delay + 1) :][:, : after.shape[1]]
    assert after.shape[1] >= AFTER - max_delay + 1
    assert torch.equal(after, new)
    with open_rows(model, Sampling(), 1) as rows:
        rows.start(0, seed=9)
        alone = conversation(rows, 0, user)
    assert torch.equal(torch.cat((before, neighbour), dim=1), alone)


def test_a_past_that_cannot_be_is_refused(build, random_codes):
    codes = random_codes(1, 9)[0]
    with open_rows(build(**SHORT), Sampling(), 1, max_chunk=4) as rows:
        rows.start(0, 0)
        with pytest.raises(ValueError, match="a code for each of the 17 streams"):
            prefill(rows, 0, torch.where(codes == codes[2, 3], -1, codes), 4)
        with pytest.raises(ValueError, match="a streaming call got 5 frames, but 4 were declared"):
            prefill(rows, 0, codes, 5)
        rows.start(0, 0)
        prefill(rows, 0, codes, 4)
        with pytest.raises(ValueError, match="row 0 has heard 9 frames"):
            prefill(rows, 0, codes, 4)


@torch.no_grad()
def test_64_frames_at_a_time_are_exact_and_at_least_5_times_faster(build, random_codes):
    model = build(ttt_layer_context=25, non_ttt_layer_context=50, mini_batch_size=16)
    assert len(ttt_layers(model)) == 2
    codes = random_codes(1, 256)

    def run(chunk):
        with streaming(model, 1, max_chunk=chunk):
            start = time.perf_counter()
            outputs = [model.forward_text(part)[0] for part in codes.split(chunk, dim=2)]
            return time.perf_counter() - start, torch.cat(outputs, dim=1)

    run(64)
    times = {chunk: [] for chunk in (1, 64)}
    for _ in range(3):  # side by side: the machine may be busy
        for chunk, taken in times.items():
            taken.append(run(chunk)[0])
    torch.testing.assert_close(run(64)[1], run(1)[1], rtol=0, atol=1e-5)
    ratio = statistics.median(one / many for one, many in zip(*times.values(), strict=True))
    assert ratio >= 5, f"{ratio:.1f} x"
    print(f"{ratio:.1f} x")
