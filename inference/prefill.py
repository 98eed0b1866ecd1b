"""A past for a conversation: what was said before goes through the model many frames at a time."""

import torch
from moshi.models.lm import LMModel, _LMGenState

from inference.rows import Rows
from moshi_ttt.delays import frames_before, shift_codes


@torch.no_grad()
def prefill(rows: Rows, row: int, codes: torch.Tensor, chunk_frames: int) -> None:
    """Give the new conversation of a row a past of T frames, of which both sides are known.

    It goes on as one that has heard and said them frame by frame: same attention, same inner weights, same
    noise of the steps that follow. Only Moshi's delayed codes of the last frame are drawn, as they are not
    complete before the next one is heard. The other rows stand still.

    Args:
        rows: opened with `max_chunk` of at least `chunk_frames`.
        row: in which nothing has been heard.
        codes: `[17, T]`, text and both sides' codebooks.
        chunk_frames: in each call of the model.
    Raises:
        ValueError: the conversation has begun, or codes are missing in the past.
    """
    model, length = rows.lm_gen.lm_model, codes.shape[1]
    if rows.heard[row]:
        raise ValueError(f"row {row} has heard {rows.heard[row]} frames: a past is for a new conversation")
    if length == 0 or (codes < 0).any():
        raise ValueError(
            "a past needs at least one frame, and a code for each of the 17 streams in all of them"
        )
    user = codes[None, 1 + model.dep_q :, -1:].repeat(len(rows.heard), 1, 1)
    if length > 1:
        # Steps 0 ... T - 1 read what lies before their frame; step T, the next one, hears the last frame.
        rows.lm_gen.set_exec_mask(rows.mask([row]))
        for inputs in _step_inputs(model, codes).split(chunk_frames, dim=-1):
            model.forward_text(inputs.repeat(len(rows.heard), 1, 1))
        state = rows.lm_gen._streaming_state
        assert isinstance(state, _LMGenState)
        _fill_cache(state, row, codes, model.delays)
        rows.heard[row] = length - 1
    rows.hear(user, [row])


def _step_inputs(model: LMModel, codes: torch.Tensor) -> torch.Tensor:
    """What the steps of the past read, `[1, 17, T]`."""
    start = torch.zeros(1, dtype=torch.long, device=codes.device)
    return shift_codes(model, codes[None], frames_before(model, 1), start).inputs


def _fill_cache(state: _LMGenState, row: int, codes: torch.Tensor, delays: list[int]) -> None:
    """LMGen's cache before step T: what later steps read, and what completes frames that are to come out."""
    length, size = codes.shape[1], state.cache.shape[2]
    for k, delay in enumerate(delays):
        for frame in range(max(0, length - size + 1), length):
            state.cache[row, k, (frame + 1 + delay) % size] = codes[k, frame]
    state.offsets[row] = length
