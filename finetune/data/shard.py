"""A shard: a safetensors file with the codes and words of some recordings, read through a memory map.

Tensors, for recordings r, pieces p (a whole recording, or each of its clips), frames and words w:
`codes` int16 [frames, 16]; `piece_frames` int64 [P + 1] and `recording_pieces` int64 [R + 1], where each
starts; `word_start`, `word_end` float64 [W] in seconds, `word_speaker` int32 [W], `word_text` uint8 [bytes],
`word_bytes` int64 [W + 1], `recording_words` int64 [R + 1]; `has_words` uint8 [R], 0 where nobody wrote down
what is said. The header's metadata is one JSON text.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors.numpy import save

from finetune.data.manifest import Word

CODEBOOKS = 16
# One key: the library writes several in no fixed order.
METADATA_KEY = "moshi_ttt"
_DTYPES = {"I16": np.int16, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "F64": np.float64}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Encoded:
    """What a shard keeps of a recording.

    Args:
        pieces: codes `[16, T]` of the whole recording, or of each of its clips.
        words: in order; None where nobody wrote down what is said.
    """

    pieces: list[torch.Tensor]
    words: Sequence[Word] | None


def shard_bytes(recordings: Sequence[Encoded], metadata: dict[str, Any]) -> bytes:
    """The file's content; the same for the same recordings."""
    pieces = [piece for recording in recordings for piece in recording.pieces]
    words = [word for recording in recordings for word in recording.words or ()]
    speakers = sorted({word.speaker for word in words})
    texts = [word.text.encode("utf-8") for word in words]
    arrays = {
        "codes": np.concatenate([piece.to(torch.int16).numpy().T for piece in pieces]),
        "piece_frames": _starts([piece.shape[1] for piece in pieces]),
        "recording_pieces": _starts([len(recording.pieces) for recording in recordings]),
        "word_start": np.array([word.start for word in words], np.float64),
        "word_end": np.array([word.end for word in words], np.float64),
        "word_speaker": np.array([speakers.index(word.speaker) for word in words], np.int32),
        "word_text": np.frombuffer(b"".join(texts), np.uint8),
        "word_bytes": _starts([len(text) for text in texts]),
        "recording_words": _starts([len(recording.words or ()) for recording in recordings]),
        "has_words": np.array([recording.words is not None for recording in recordings], np.uint8),
    }
    content = json.dumps({**metadata, "speakers": speakers}, sort_keys=True)
    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, {METADATA_KEY: content})


def _starts(sizes: Sequence[int]) -> np.ndarray:
    return np.array(list(accumulate(sizes, initial=0)), np.int64)


class TensorFile:
    """The arrays of a safetensors file, mapped into memory.

    Raises:
        ValueError: the file's size is not what its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ValueError(f"{path} is damaged: it has {size} bytes")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._map[:8], "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is damaged: a header of {length} bytes in a file of {size}")
        self.header_sha256 = hashlib.sha256(self._map[: 8 + length]).hexdigest()
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: its header is not JSON ({error})") from error
        metadata = header.pop("__metadata__", {})
        self.arrays: dict[str, np.ndarray] = {}
        end = 0
        for name, entry in header.items():
            first, stop = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            end = max(end, stop)
            if 8 + length + stop <= size:
                count, offset = (stop - first) // dtype.itemsize, 8 + length + first
                self.arrays[name] = np.frombuffer(self._map, dtype, count, offset).reshape(entry["shape"])
        if 8 + length + end != size:
            raise ValueError(f"{path} is damaged: it has {size} bytes, its header says {8 + length + end}")
        self.metadata: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


class Words(Sequence[Word]):
    """Words of a recording in a shard, in order; each is made when it is asked for.

    Args:
        shard: where they are.
        first, stop: which.
    """

    def __init__(self, shard: "Shard", first: int, stop: int):
        self.shard, self.first, self.stop = shard, first, stop

    def __len__(self) -> int:
        return self.stop - self.first

    @overload
    def __getitem__(self, index: int) -> Word: ...

    @overload
    def __getitem__(self, index: slice) -> "Words": ...

    def __getitem__(self, index: int | slice) -> "Word | Words":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return Words(self.shard, self.first + start, self.first + max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.shard.word(self.first + index % len(self))


class Shard:
    """A shard that is open for reading."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        self.speakers: list[str] = self.file.metadata["speakers"]
        self._text = self.file["word_text"]

    def num_pieces(self, row: int) -> int:
        """How many pieces a recording has."""
        first, stop = self.file["recording_pieces"][row : row + 2].tolist()
        return stop - first

    def num_frames(self, row: int) -> int:
        """Frames of all pieces of a recording."""
        first, stop = self.file["recording_pieces"][[row, row + 1]].tolist()
        return int(self.file["piece_frames"][stop] - self.file["piece_frames"][first])

    def piece(self, row: int, number: int, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Codes `[16, T]` in 16 bits of frames `first` to `stop` of a piece; T ends with the piece."""
        index = int(self.file["recording_pieces"][row]) + number
        assert index < self.file["recording_pieces"][row + 1]
        start, end = self.file["piece_frames"][index : index + 2].tolist()
        stop = end if stop is None else min(end, start + stop)
        return torch.from_numpy(self.file["codes"][start + first : stop].T.copy())

    def words(self, row: int) -> Words | None:
        """Words of a recording."""
        if not self.file["has_words"][row]:
            return None
        first, stop = self.file["recording_words"][row : row + 2].tolist()
        return Words(self, first, stop)

    def word(self, index: int) -> Word:
        """A word by its place in the shard."""
        file = self.file
        first, stop = file["word_bytes"][index : index + 2].tolist()
        text = self._text[first:stop].tobytes().decode("utf-8")
        speaker = self.speakers[file["word_speaker"][index]]
        return Word(text, float(file["word_start"][index]), float(file["word_end"][index]), speaker)
