"""Moshi answering a recording, frame by frame through Mimi and LMGen."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
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
        """Called after the last step, or before the state is saved, while the streaming state lives."""
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
        user: the user's samples at the same times.
        words: the inner monologue; times in seconds from the start of `audio`.
        frames: frames that Moshi spoke.
    """

    audio: torch.Tensor
    user: torch.Tensor
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


@dataclass
class Frame:
    """One frame of Moshi's side of a conversation.

    Args:
        tokens: text and Moshi's codebooks, `[1, 1 + dep_q, 1]`.
        audio: samples `[frame_size]`, on the CPU.
    """

    tokens: torch.Tensor
    audio: torch.Tensor


class Stream:
    """A conversation under way: the user's samples in, Moshi's frames out. `open_stream` makes it.

    What is needed to go on with it later is its attributes and the streaming states of `lm_gen`, its model
    and `mimi`.

    Args:
        lm_gen (LMGen): streaming.
        mimi (MimiModel): streaming, on the same device.
        seed (int): of the noise that tokens are drawn with.
        watches (Sequence[StepWatch]): what looks on.
    Attributes:
        frames (int): frames of the user that Moshi has heard.
        unanswered (torch.Tensor): the user's samples `[n]` from the first that no frame of Moshi's has
            answered yet, on the CPU: less than one frame, and `max_delay - 1` that it has heard already.
        noise (dict[str, torch.Tensor]): states of the random generators by type of device. They are the
            stream's own: what else draws random numbers in the process neither disturbs it nor is disturbed.
    """

    def __init__(self, lm_gen: LMGen, mimi: MimiModel, seed: int, watches: Sequence[StepWatch] = ()):
        # As in all of Moshi's models; what follows the first step relies on it.
        assert lm_gen.max_delay >= 1, f"max_delay {lm_gen.max_delay}"
        self.lm_gen = lm_gen
        self.mimi = mimi
        self.watches = watches
        self.frames = 0
        self.unanswered = torch.zeros(0)
        with self._fork_noise():
            torch.manual_seed(seed)
            self.noise = self._global_noise()

    @property
    def device(self) -> torch.device:
        return self.lm_gen.lm_model.device

    @property
    def answered(self) -> int:
        """Frames that Moshi has spoken."""
        return max(0, self.frames - (self.lm_gen.max_delay - 1))

    def hear(self, samples: torch.Tensor) -> Iterator[Frame]:
        """Take samples of the user `[n]`, any number, and give the frames of Moshi that they complete.

        What is left of a frame waits for more. Samples are heard as the frames are taken.
        """
        self.unanswered = torch.cat((self.unanswered, samples.cpu()))
        size = self.mimi.frame_size
        while True:
            waiting = self.frames - self.answered
            if self.unanswered.shape[0] < (waiting + 1) * size:
                return
            tokens = self._hear_frame(self.unanswered[waiting * size : (waiting + 1) * size])
            if tokens is not None:
                self.unanswered = self.unanswered[size:]
                yield Frame(tokens, self.mimi.decode(tokens[:, 1:])[0, 0].cpu())

    def finish(self) -> Iterator[Frame]:
        """Moshi's frames for all that is unanswered: silence follows. Nothing can be heard after it."""
        left, size = self.unanswered.shape[0], self.mimi.frame_size
        frames = -(-left // size) + self.lm_gen.max_delay - 1 if left else 0
        yield from self.hear(torch.zeros(max(0, frames * size - left)))

    def _hear_frame(self, samples: torch.Tensor) -> torch.Tensor | None:
        """Tokens of Moshi's next complete frame, after a frame of the user `[frame_size]`.

        LMGen's first step sees initial tokens in place of the user's, so the first frame is given twice: from
        then on frame t of the user meets frame t of Moshi, as in training. Moshi's codebooks of one frame are
        complete `max_delay` steps later.
        """
        codes = self.mimi.encode(samples.to(self.device)[None, None])
        if self.frames == 0:
            first = self._step(codes)
            assert first is None
        self.frames += 1
        return self._step(codes)

    def _step(self, codes: torch.Tensor) -> torch.Tensor | None:
        with self._fork_noise(), ExitStack() as stack:
            torch.set_rng_state(self.noise["cpu"])
            if "cuda" in self.noise:
                torch.cuda.set_rng_state(self.noise["cuda"], self.device)
            for watch in self.watches:
                stack.enter_context(watch.step())
            tokens = self.lm_gen.step(codes)
            self.noise = self._global_noise()
        return tokens

    def finish_watches(self) -> None:
        """Let what looks on judge all steps so far."""
        for watch in self.watches:
            watch.finish()

    def _global_noise(self) -> dict[str, torch.Tensor]:
        noise = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            noise["cuda"] = torch.cuda.get_rng_state(self.device)
        return noise

    def _fork_noise(self) -> AbstractContextManager[None]:
        """Leave the process's random generators as they were."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])


@contextmanager
def open_stream(
    model: LMModel, mimi: MimiModel, sampling: Sampling, watches: Sequence[StepWatch] = ()
) -> Iterator[Stream]:
    """A new conversation. Without gradients; the process's random generators are left as they were.

    Args:
        model: in evaluation mode, not streaming.
        mimi: the codec, not streaming, on the same device.
        sampling: how tokens are drawn.
        watches: what looks on, to the end.
    """
    lm_gen = LMGen(
        model,
        use_sampling=sampling.use_sampling,
        temp=sampling.temp,
        temp_text=sampling.temp_text,
        top_k=sampling.top_k,
        top_k_text=sampling.top_k_text,
    )
    with torch.no_grad(), mimi.streaming(1), lm_gen.streaming(1):
        stream = Stream(lm_gen, mimi, sampling.seed, watches)
        yield stream
        stream.finish_watches()


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
    with open_stream(model, mimi, sampling, watches) as stream:
        return converse(stream, tokenizer, recording, progress=progress)


def converse(
    stream: Stream,
    tokenizer: sentencepiece.SentencePieceProcessor,
    recording: torch.Tensor,
    last: bool = True,
    progress: bool = False,
) -> Answer:
    """Let Moshi hear a recording, or the next part of one, and collect what it answers.

    Args:
        stream: the conversation.
        tokenizer: for the text.
        recording: the user's samples `[n]` at Mimi's rate.
        last: nothing follows, so the answer is as long as the recording. False answers what frames are
            complete; the rest is answered with the part that follows.
        progress: show a bar with the real-time factor.
    """
    user = torch.cat((stream.unanswered, recording))
    mimi, model = stream.mimi, stream.lm_gen.lm_model
    frames = chain(stream.hear(recording), stream.finish() if last else ())
    total = -(-user.shape[0] // mimi.frame_size)
    audio, text_tokens = [torch.zeros(0)], []
    for frame in tqdm(
        frames, total=total, desc="answering", unit="frame", disable=None if progress else True
    ):
        text_tokens.append(int(frame.tokens[0, 0, 0]))
        audio.append(frame.audio)
    assert len(text_tokens) == total or not last
    samples = torch.cat(audio)[: user.shape[0]].clamp(-1, 1)
    padding = {model.text_padding_token_id, model.end_of_text_padding_id}
    words = timed_words(text_tokens, tokenizer, padding, mimi.frame_rate)
    return Answer(samples, user[: samples.shape[0]], words, len(text_tokens))


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
