"""The messages of Moshi's WebSocket protocol: a byte for the kind, then the payload."""

import codecs
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sentencepiece
from aiohttp import WSCloseCode

HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)

PCM = 16
"""16-bit little-endian samples at the codec's rate: ours, spoken only where `audio=pcm` asked for it."""

IGNORED = (HANDSHAKE, CONTROL, METADATA, PING)
"""Kinds that Moshi's web page may send and that mean nothing here."""


class Malformed(ValueError):  # noqa: N818 - it is what a client sent, not what went wrong
    """A message that makes no sense."""


@dataclass
class Ending:
    """How a conversation ends.

    Args:
        code: of the WebSocket's closing.
        why: for the client and the log.
        kind: for the metrics.
    """

    code: int
    why: str
    kind: str


LEFT = Ending(WSCloseCode.OK, "the client left", "left")
VANISHED = Ending(WSCloseCode.ABNORMAL_CLOSURE, "the client is gone", "vanished")
STOPPED = Ending(WSCloseCode.GOING_AWAY, "the server stops; goodbye", "stopped")


def message(kind: int, payload: bytes = b"") -> bytes:
    """A message as it goes over the wire."""
    return bytes([kind]) + payload


def metadata(content: dict[str, Any]) -> bytes:
    """A message with JSON, for clients that asked for it."""
    return message(METADATA, json.dumps(content, allow_nan=False).encode())


class TextPieces:
    """Text tokens to the text that a client shows, as they come.

    Args:
        tokenizer: of the model.
        silent: tokens that stand for no text.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, silent: Collection[int]):
        self._tokenizer = tokenizer
        self._silent = {*silent, tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()}
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(self, token: int) -> str:
        """What a token adds: a piece of a word with a space before a word's first, or nothing."""
        if token in self._silent:
            return ""
        piece = self._tokenizer.id_to_piece(token)
        if self._tokenizer.is_byte(token):  # "<0xE2>": a character may take several
            return self._characters.decode(bytes([int(piece[3:5], 16)]))
        return self._characters.decode(b"", final=True) + piece.replace("▁", " ")
