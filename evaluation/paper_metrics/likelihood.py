"""The likelihood of a clip under Moshi: the clip on Moshi's own stream, fillers on the others, one pass."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch.nn import functional as F

from finetune.data.audio import read_samples
from finetune.data.codec import encode_crop
from finetune.data.recording import Recording, UserChannel
from moshi_ttt.delays import scored_in_clip

_SILENCE = UserChannel(noise_dbfs=None, seed=0)


class ClipEncoder:
    """Reads clips as codes `[17, T]`.

    Each is encoded by itself, so that its codes do not depend on what is scored beside it.

    Args:
        mimi: the model's codec.
        model: for its special tokens and numbers of codebooks.
        text_filler: -1, or pad: the padding token.
        user_filler: -1, or silence: what Mimi makes of silence as long as the clip.
    """

    def __init__(self, mimi: MimiModel, model: LMModel, text_filler: str, user_filler: str):
        self.mimi = mimi
        self.zero = model.zero_token_id
        self.text = model.text_padding_token_id if text_filler == "pad" else self.zero
        self.user_codebooks = model.n_q - model.dep_q
        self.user_is_silent = user_filler == "silence"
        self._silence: dict[int, torch.Tensor] = {}  # by frames: thousands of clips have few lengths

    def encode(self, path: Path, duration_sec: float) -> torch.Tensor:
        """Codes of a mono clip: text filler, the clip, user filler.

        Raises:
            ValueError: the clip cannot be read, or is too short to be scored.
        """
        recording = Recording(path, duration_sec, None, _SILENCE)
        clip = read_samples(recording, self.mimi.sample_rate)[:1]
        codes = encode_crop(self.mimi, clip).long()
        frames = codes.shape[1]
        if frames < 2:
            raise ValueError(
                f"{path} has {duration_sec:.3f} s, one frame of the codec: its acoustic codes have no target "
                "in one forward pass; remove the clip and its partner"
            )
        text = torch.full((1, frames), self.text)
        return torch.cat((text, codes, self._user(frames)))

    def _user(self, frames: int) -> torch.Tensor:
        """The user's stream, `[8, frames]`."""
        if not self.user_is_silent:
            return torch.full((self.user_codebooks, frames), self.zero)
        if frames not in self._silence:
            silence = np.zeros((1, frames * self.mimi.frame_size), np.float32)
            self._silence[frames] = encode_crop(self.mimi, silence).long()
        return self._silence[frames]


@torch.no_grad()
def clip_nll(model: LMModel, clips: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """NLL in nats of Moshi's codebooks, of whole clips in one forward pass.

    Clips do not see each other: shorter ones are filled up with -1 at their ends, where nothing is scored. A
    codebook delayed by d has no target in the last d frames of its clip, as in a pass over the clip alone.
    TTT layers start from their learned weights.

    Args:
        model: in evaluation mode, not streaming.
        clips: codes `[17, T]` each.
    Returns:
        For each clip `[T, dep_q]` float32; NaN where there is no target.
    Raises:
        ValueError: the likelihood of a target is not finite.
    """
    longest = max(codes.shape[1] for codes in clips)
    padded = [F.pad(codes, (0, longest - codes.shape[1]), value=model.zero_token_id) for codes in clips]
    batch = torch.stack(padded).to(model.device)
    output = model(batch)
    own = slice(model.audio_offset, model.audio_offset + model.dep_q)
    assert output.logits is not None
    nll = []
    for k, targets in enumerate(batch[:, own].unbind(1)):
        logits = output.logits[:, k].transpose(1, 2).float()
        nll.append(F.cross_entropy(logits, targets.clamp(min=0), reduction="none"))
    together = torch.stack(nll, dim=-1).cpu()
    found = []
    for codes, values in zip(clips, together, strict=True):
        scored = scored_in_clip(model, codes[None].to(model.device))[0, own].T.cpu()
        alone = values[: codes.shape[1]].masked_fill(~scored, torch.nan)
        if not torch.equal(alone.isfinite(), scored):
            raise ValueError(
                f"the model's likelihood of a clip of {codes.shape[1]} frames is not finite; its weights are "
                "broken, or too large for its dtype: try dtype=float32"
            )
        found.append(alone.numpy())
    return found


def batches_by_length(frames: Sequence[int], batch_frames: int) -> list[list[int]]:
    """Indices of clips that are scored together: of like length, longest first.

    Args:
        frames: length of each clip.
        batch_frames: at most so many in a batch, filling included; a longer clip goes alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(frames)), key=lambda i: (-frames[i], i)):
        if batches and frames[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_frames:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
