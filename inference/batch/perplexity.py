"""How likely a recording is on Moshi's own stream: teacher-forced NLL, in one exact pass by chunks."""

from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel

from inference.batch.settings import PerplexityConfig
from inference.codec import encode_recording, frames_of
from inference.likelihood import default_chunk_frames, nll_by_frame


def recording_codes(
    model: LMModel, mimi: MimiModel, scored: torch.Tensor, user: torch.Tensor, text: str
) -> torch.Tensor:
    """Codes `[17, T]` with `scored` on Moshi's stream and `user` on the user's, samples `[n]` each."""
    frames = frames_of(mimi, scored)
    filler = model.text_padding_token_id if text == "padding" else model.zero_token_id
    line = torch.full((1, frames), filler, device=model.device)
    sides = [encode_recording(mimi, samples, frames) for samples in (scored, user)]
    return torch.cat((line, sides[0][: model.dep_q], sides[1][: model.num_audio_codebooks - model.dep_q]))


def perplexity(
    model: LMModel, mimi: MimiModel, scored: torch.Tensor, user: torch.Tensor, config: PerplexityConfig
) -> dict[str, Any]:
    """Mean NLL in nats of the text and each of Moshi's codebooks, and its exponential.

    Args:
        model: in evaluation mode, not streaming.
        mimi: not streaming.
        scored: samples `[n]` that are put on Moshi's stream.
        user: the user's, likewise; silence where they end earlier.
    """
    codes = recording_codes(model, mimi, scored, user, config.text)
    nll = nll_by_frame(model, codes[None], default_chunk_frames(model, config.chunk_frames))[0]
    names = ["text", *(f"codebook_{k}" for k in range(1, 1 + model.dep_q))]
    means = {
        name: None if row.isnan().all() else float(row.nanmean(dtype=torch.float64))
        for name, row in zip(names, nll, strict=True)
    }
    return {
        "nats": means,
        "perplexity": {
            name: None if mean is None else float(torch.tensor(mean).exp()) for name, mean in means.items()
        },
        "frames": codes.shape[1],
        "text_stream": config.text,
        "note": "teacher-forced, nats per token; text is null where there is none",
    }
