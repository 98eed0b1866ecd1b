"""Moshi answering a recording, frame by frame."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
import torchaudio
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from tqdm import tqdm

from inference.rows import Sampling, StepWatch
from inference.slots import Frame, Slots, open_slots


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


class Stream:
    """A conversation under way: the user's samples in, any number at a time, and Moshi's frames out.

    What is needed to go on with it later is its attributes and the state of its slot.

    Args:
        slots (Slots): of which one is this conversation's.
        slot (int): which.
        seed (int): of the noise that tokens are drawn with.
    Attributes:
        unanswered (torch.Tensor): the user's samples `[n]` from the first that no frame of Moshi's has
            answered yet, on the CPU: less than one frame, and `max_delay - 1` that it has heard already.
    """

    def __init__(self, slots: Slots, slot: int, seed: int):
        self.slots = slots
        self.slot = slot
        self.seed = seed
        self.unanswered = torch.zeros(0)
        slots.start(slot, seed)

    @property
    def frames(self) -> int:
        """Frames of the user that Moshi has heard."""
        return self.slots.rows.heard[self.slot]

    @property
    def answered(self) -> int:
        """Frames that Moshi has spoken."""
        return self.slots.rows.spoken(self.slot)

    def add(self, samples: torch.Tensor) -> None:
        """More of the user's samples, `[n]`, any number. They are heard when `hear_next` is called."""
        self.unanswered = torch.cat((self.unanswered, samples.cpu()))

    def waiting(self) -> torch.Tensor | None:
        """The first whole frame `[frame_size]` that was added and not heard; None where more is needed."""
        heard, size = (self.frames - self.answered) * self.slots.mimi.frame_size, self.slots.mimi.frame_size
        frame = self.unanswered[heard : heard + size]
        return frame if frame.shape[0] == size else None

    def take_back(self) -> torch.Tensor:
        """Samples `[n]` that were added and not heard. The stream forgets them."""
        heard = (self.frames - self.answered) * self.slots.mimi.frame_size
        rest, self.unanswered = self.unanswered[heard:], self.unanswered[:heard]
        return rest

    def hear(self, samples: torch.Tensor) -> Iterator[Frame]:
        """Take samples of the user `[n]`, any number, and give the frames of Moshi that they complete.

        What is left of a frame waits for more. Samples are heard as the frames are taken; other slots stand
        still.
        """
        self.add(samples)
        while self.waiting() is not None:
            yield from hear_next([self]).values()

    def go_on(self, frames: int, seed: int, unanswered: torch.Tensor) -> None:
        """Be the conversation whose state was put into the slot."""
        self.seed, self.unanswered = seed, unanswered
        self.slots.rows.go_on(self.slot, seed, frames)

    def silence_left(self) -> torch.Tensor:
        """Silence `[n]` after which all that was heard is answered. Nothing can be heard after it."""
        left, size = self.unanswered.shape[0], self.slots.mimi.frame_size
        frames = -(-left // size) + self.slots.rows.lm_gen.max_delay - 1 if left else 0
        return torch.zeros(max(0, frames * size - left))

    def finish(self) -> Iterator[Frame]:
        """Moshi's frames for all that is unanswered: silence follows."""
        yield from self.hear(self.silence_left())


def hear_next(streams: Sequence[Stream]) -> dict[Stream, Frame]:
    """Let conversations on the same slots hear a frame each, together, and give the frames Moshi spoke.

    Conversations without a whole frame waiting stand still.
    """
    ready = [(stream, frame) for stream in streams if (frame := stream.waiting()) is not None]
    if not ready:
        return {}
    slots = ready[0][0].slots
    spoken = slots.hear({stream.slot: frame for stream, frame in ready})
    found = {stream: spoken[stream.slot] for stream, _ in ready if stream.slot in spoken}
    for stream in found:
        stream.unanswered = stream.unanswered[slots.mimi.frame_size :]
    return found


@contextmanager
def open_stream(
    model: LMModel, mimi: MimiModel, sampling: Sampling, watches: Sequence[StepWatch] = ()
) -> Iterator[Stream]:
    """A new conversation alone on a model. Without gradients; random generators are neither read nor changed.

    Args:
        model: in evaluation mode, not streaming.
        mimi: the codec, not streaming, on the same device.
        sampling: how tokens are drawn.
        watches: what looks on, to the end.
    """
    with open_slots(model, mimi, sampling, 1, watches) as slots:
        yield Stream(slots, 0, sampling.seed)


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
    mimi, model = stream.slots.mimi, stream.slots.rows.lm_gen.lm_model
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
