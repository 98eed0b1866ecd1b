"""A conversation in a file: save it, and go on with it in another process as if it had never stopped.

A session file is safetensors: the streaming states of LMGen, of Moshi and of Mimi, the seed of its noise, and
the user's samples that are still to be answered; in its metadata the format, the digest of the tensors, and
what the conversation was held with. It goes on in any slot of any server.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from inference.rows import Sampling
from inference.stream import Stream
from moshi_ttt.checkpoint import LoadedCheckpoint, sync
from moshi_ttt.integration import live_settings
from moshi_ttt.session import restore_session, session_tensors

logger = logging.getLogger(__name__)

FORMAT = "moshi-ttt session"
FORMAT_VERSION = 2


def session_identity(loaded: LoadedCheckpoint, sampling: Sampling) -> dict[str, str]:
    """All that decides how a conversation goes on but its state: weights, live settings, sampling, device.

    Long values are replaced by their digest.
    """
    weights = {name: entry["sha256"] for name, entry in loaded.manifest["files"].items()}
    known: dict[str, Any] = {
        "sampling": asdict(sampling),
        "device": loaded.model.device.type,
        "model": live_settings(loaded.model),
        "step": loaded.manifest["step"],
        "weights": {name: digest for name, digest in weights.items() if name.endswith(".safetensors")},
        "base": loaded.manifest["base"]["sha256"],
    }
    return dict(_flat("", known))


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        start = f"{prefix}." if prefix else ""
        return [pair for key, item in value.items() for pair in _flat(start + key, item)]
    text = json.dumps(value)
    if len(text) > 200:
        text = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return [(prefix, text)]


def save_session(path: Path, stream: Stream, identity: dict[str, str]) -> None:
    """Write the state of a stream between two frames, under a temporary name first.

    Args:
        path: where; an existing file is replaced.
        stream: the conversation.
        identity: what it was held with, see `session_identity`.
    """
    write_session(path, stream_tensors(stream), identity)


def stream_tensors(stream: Stream) -> dict[str, torch.Tensor]:
    """Copies on the CPU of all that a stream needs to go on, taken between two frames."""
    stream.slots.rows.finish_watches()  # what they refuse is not worth a file
    tensors = {"seed": torch.tensor(stream.seed), "frames": torch.tensor(stream.frames)}
    tensors |= {"unanswered": stream.unanswered.clone()}
    for part, module in _streaming_parts(stream).items():
        state = session_tensors(module, stream.slot)
        tensors |= {f"{part}/{name}": tensor for name, tensor in state.items()}
    return tensors


def write_session(path: Path, tensors: dict[str, torch.Tensor], identity: dict[str, str]) -> None:
    """Write what `stream_tensors` gave as `save_session` does."""
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "identity": json.dumps(identity),
        "sha256": _digest(tensors),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        sync([temporary])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync([path.parent])


def restore_stream(path: str | Path, stream: Stream, identity: dict[str, str]) -> None:
    """Make a new stream the one that a file holds.

    Args:
        path: a file of `save_session`.
        stream: a new conversation; what is in its slot is replaced.
        identity: what the conversation goes on with, see `session_identity`.
    Raises:
        ValueError: the file is missing, damaged, of another format, or was saved with something else.
    """
    continue_stream(stream, read_session(Path(path).expanduser(), identity))


def continue_stream(stream: Stream, tensors: dict[str, torch.Tensor]) -> None:
    """Make a new stream the one whose tensors `read_session` gave. Raises ValueError if they do not fit."""
    parts = _streaming_parts(stream)
    states = {
        part: {key.removeprefix(f"{part}/"): t for key, t in tensors.items() if key.startswith(f"{part}/")}
        for part in parts
    }
    for part, module in parts.items():
        restore_session(module, states[part], stream.slot)
    stream.go_on(int(tensors["frames"]), int(tensors["seed"]), tensors["unanswered"])


def read_session(path: Path, identity: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a session file, checked. Raises ValueError as `restore_stream` does."""
    if not path.is_file():
        raise ValueError(f"session {path} does not exist; a session_out=FILE of an earlier run makes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"session {path} is damaged or no session ({error}); use another") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no session, but other safetensors; give a file that session_out wrote")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise ValueError(
            f"session {path} has format {metadata['format_version']}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    if metadata["sha256"] != _digest(tensors):
        raise ValueError(f"session {path} was changed after it was saved: its SHA-256 differs; use another")
    _refuse_others(path, json.loads(metadata["identity"]), identity)
    if metadata["torch"] != torch.__version__:
        logger.warning(
            "session saved with torch %s, continued with %s: the last bits may differ from an uninterrupted "
            "stream's",
            metadata["torch"],
            torch.__version__,
        )
    return tensors


def _refuse_others(path: Path, saved: dict[str, str], here: dict[str, str]) -> None:
    names = [name for name in (saved | here) if saved.get(name) != here.get(name)]
    if names:
        shown = [f"{name} was {saved.get(name, '-')}, is {here.get(name, '-')}" for name in names[:8]]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(
            f"session {path} was held with something else: {'; '.join(shown)}{more}. Continue it with the "
            "checkpoint, sampling and kind of device that it was saved with"
        )


def _streaming_parts(stream: Stream) -> dict[str, Any]:
    lm_gen = stream.slots.rows.lm_gen
    return {"lm_gen": lm_gen, "lm": lm_gen.lm_model, "mimi": stream.slots.mimi}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
