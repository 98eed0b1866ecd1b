"""Moshi answering a recording, frame by frame through Mimi and LMGen."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import soundfile
import torch
import torchaudio
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from tqdm import tqdm


@dataclass
class Sampling:
    """How tokens are drawn. Defaults are Moshi's. Field names are those of the configuration."""

    use_sampling: bool = True
    """False takes the likeliest token."""

    temp: float = 0.8
    """Temperature of audio tokens."""

    temp_text: float = 0.7
    """Temperature of text tokens."""

    top_k: int = 250
    """Audio tokens are drawn among the k likeliest."""

    top_k_text: int = 25
    """Text tokens likewise."""

    seed: int = 0
    """Same seed, settings and input: same answer."""


class StepWatch(Protocol):
    """Something that looks on while a model streams, such as `TTTDiagnostics` and `FiniteStateCheck`."""

    def step(self) -> AbstractContextManager[None]:
        """Context for each step of the model."""
        ...

    def finish(self) -> None:
        """Called after the last step, while the streaming state still lives."""
        ...


@dataclass
class TimedWord:
    """A word of Moshi's inner monologue; times in seconds from the start of the recording."""

    text: str
    start: float
    end: float


@dataclass
class Answer:
    """What Moshi said.

    Args:
        audio: samples at Mimi's rate, as many as the recording has, in [-1, 1].
        words: the inner monologue.
        frames: frames streamed.
    """

    audio: torch.Tensor
    words: list[TimedWord] = field(default_factory=list)
    frames: int = 0

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def read_recording(path: str | Path, sample_rate: int, channel: int | None = None) -> torch.Tensor:
    """One channel of an audio file, `[n]`, resampled.

    Args:
        path: any format that libsndfile reads.
        sample_rate: wanted rate in Hz.
        channel: which channel, from 0. None asks for a mono file.
    Raises:
        ValueError: the file is missing, empty, unreadable, holds NaN, or has other channels.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"input {path} does not exist")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"input {path} is no audio file that can be read ({error})") from error
    if samples.shape[0] == 0:
        raise ValueError(f"input {path} holds no audio")
    if not np.isfinite(samples).all():
        raise ValueError(f"input {path} holds NaN or infinite samples")
    channels = samples.shape[1]
    if channel is None and channels != 1:
        raise ValueError(f"input {path} has {channels} channels; say which is the user with channel=0 or 1")
    if channel is not None and not 0 <= channel < channels:
        raise ValueError(f"channel={channel}, but {path} has channels 0 to {channels - 1}")
    audio = torch.from_numpy(samples[:, channel or 0].copy())
    return torchaudio.functional.resample(audio, rate, sample_rate)


def write_wav(path: Path, channels: list[torch.Tensor], sample_rate: int) -> None:
    """Write channels `[n]` of equal length as 16-bit wav."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, torch.stack(channels, dim=1).numpy(), sample_rate, subtype="PCM_16")


def answer(
    model: LMModel,
    mimi: MimiModel,
    tokenizer: sentencepiece.SentencePieceProcessor,
    recording: torch.Tensor,
    sampling: Sampling,
    progress: bool = False,
    watches: Sequence[StepWatch] = (),
) -> Answer:
    """Stream a recording of the user through Moshi and collect its answer.

    Global random state is left as it was.

    Args:
        model: in evaluation mode, not streaming.
        mimi: the codec, not streaming, on the same device.
        tokenizer: for the text.
        recording: the user's samples `[n]` at Mimi's rate.
        sampling: how tokens are drawn.
        progress: show a bar with the real-time factor.
        watches: what looks on.
    """
    frame_size = mimi.frame_size
    num_frames = -(-recording.shape[0] // frame_size)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        lm_gen = LMGen(
            model,
            use_sampling=sampling.use_sampling,
            temp=sampling.temp,
            temp_text=sampling.temp_text,
            top_k=sampling.top_k,
            top_k_text=sampling.top_k_text,
        )
        audio, text_tokens = [], []
        with mimi.streaming(1), lm_gen.streaming(1):
            steps = _steps(lm_gen, mimi, recording.to(model.device), num_frames, watches)
            for tokens in tqdm(
                steps, total=num_frames, desc="answering", unit="frame", disable=None if progress else True
            ):
                text_tokens.append(int(tokens[0, 0, 0]))
                audio.append(mimi.decode(tokens[:, 1:])[0, 0].cpu())
            for watch in watches:
                watch.finish()
    assert len(audio) == num_frames
    samples = torch.cat(audio)[: recording.shape[0]].clamp(-1, 1)
    padding = {model.text_padding_token_id, model.end_of_text_padding_id}
    return Answer(samples, timed_words(text_tokens, tokenizer, padding, mimi.frame_rate), num_frames)


def _steps(
    lm_gen: LMGen,
    mimi: MimiModel,
    recording: torch.Tensor,
    num_frames: int,
    watches: Sequence[StepWatch] = (),
) -> Iterator[torch.Tensor]:
    """Moshi's tokens `[1, 1 + dep_q, 1]` of each frame of the recording.

    LMGen's first step sees initial tokens in place of the user's, so the first frame is given twice: from
    then on frame t of the user meets frame t of Moshi, as in training. Moshi's codebooks of one frame are
    complete `max_delay` steps later.
    """
    frame_size = mimi.frame_size
    for step in range(num_frames + lm_gen.max_delay):
        frame = step - 1
        if frame != 0:
            samples = recording[max(frame, 0) * frame_size : (max(frame, 0) + 1) * frame_size]
            samples = torch.nn.functional.pad(samples, (0, frame_size - samples.shape[0]))
            codes = mimi.encode(samples[None, None])
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.step())
            tokens = lm_gen.step(codes)
        if tokens is not None:
            yield tokens


def timed_words(
    tokens: list[int],
    tokenizer: sentencepiece.SentencePieceProcessor,
    padding: set[int],
    frame_rate: float,
) -> list[TimedWord]:
    """Words of a text stream with one token a frame. A piece that begins a word begins a TimedWord."""
    words: list[TimedWord] = []
    ids: list[int] = []
    for frame, token in enumerate(tokens):
        if token in padding or token in (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()):
            continue
        start, end = round(frame / frame_rate, 3), round((frame + 1) / frame_rate, 3)
        if not words or tokenizer.id_to_piece(token).startswith("▁"):
            words.append(TimedWord("", start, end))
            ids = []
        ids.append(token)
        words[-1].text = tokenizer.decode(ids).strip()
        words[-1].end = end
    return [word for word in words if word.text]
