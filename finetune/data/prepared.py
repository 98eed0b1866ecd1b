"""A prepared folder: shards of codes, an index of all recordings, and the manifest that pins them.

`prepared.json` is the manifest, written last: a folder that has it is whole. `index.safetensors` maps
recordings to shards, `sources.jsonl` names every source with its SHA-256. All paths are relative: the folder
can be moved, and the sources are not needed to train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from finetune.data.places import MANIFEST, PLAN
from finetune.data.shard import Shard, TensorFile, Words
from finetune.data.transcript import is_time, parse_json
from moshi_ttt.digest import sha256

FORMAT = 1
INDEX, SOURCES = "index.safetensors", "sources.jsonl"
PER_CLIP, WHOLE = "per_clip", "whole"
# Shards that are mapped at once. What has been read of a shard counts as this process's memory until then.
OPEN_SHARDS = 32


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"shard_{number:06d}.safetensors"


def missing_shards(folder: Path, number: int) -> list[int]:
    """Shards that are not there."""
    there = {path.name for path in folder.glob("shard_*.safetensors")}
    return [shard for shard in range(number) if shard_name(shard) not in there]


class PreparedSet:
    """The recordings of a prepared folder. Opening it reads the manifest and the index, and no codes.

    Args:
        folder: where it is.
    Raises:
        ValueError: the folder is not whole, or a file is missing or has another size or content than the
            manifest says. The content of a shard is compared when it is first read, of all by `verify`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.manifest = _read_manifest(self.folder)
        self.encode: str = self.manifest["encode"]
        self.duration_sec: float | None = self.manifest["duration_sec"]
        index = self.folder / INDEX
        _require_sha256(index, self.manifest["files"][INDEX])
        self.index = TensorFile(index)
        self.durations = self.index["duration_sec"]
        self._require_shards()
        # Recordings of which something could not be read when they were prepared, and why.
        lost = self.manifest.get("lost") or []
        self.lost: dict[str, str] = {str(self.folder / one["path"]): one["lost"] for one in lost}
        self.shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._compared: set[int] = set()

    def __len__(self) -> int:
        return len(self.durations)

    def recording(self, index: int) -> "PreparedRecording":
        """A recording by its place in the list that was prepared."""
        return PreparedRecording(self, index, float(self.durations[index]))

    def source(self, index: int) -> Path:
        """Path of a recording's audio when it was prepared, relative to its list."""
        first, stop = self.index["path_bytes"][index : index + 2].tolist()
        return Path(bytes(self.index["path"][first:stop]).decode("utf-8"))

    def _open_shard(self, number: int) -> Shard:
        path = self.folder / shard_name(number)
        if number not in self._compared:  # once: what is read through the map afterwards is believed
            _require_sha256(path, self.index["shard_sha256"][number].tobytes().hex())
            self._compared.add(number)
        shard = Shard(path)
        expected = self.index["shard_header_sha256"][number].tobytes().hex()
        if shard.file.header_sha256 != expected:
            raise ValueError(
                f"{path} is damaged or of another set: its header is not the manifest's. {_AGAIN}"
            )
        return shard

    def _require_shards(self) -> None:
        for number, size in enumerate(self.index["shard_bytes"].tolist()):
            path = self.folder / shard_name(number)
            if not path.is_file():
                raise ValueError(f"{path} is missing. {_AGAIN}")
            found = path.stat().st_size
            if found != size:
                raise ValueError(
                    f"{path} is damaged: it has {found} bytes, the manifest says {size}. {_AGAIN}"
                )

    def verify(self) -> None:
        """Read all files and compare their SHA-256 with the manifest's.

        Raises:
            ValueError: names the first file that differs.
        """
        _require_sha256(self.folder / SOURCES, self.manifest["files"][SOURCES])
        for number, digest in enumerate(self.index["shard_sha256"]):
            _require_sha256(self.folder / shard_name(number), digest.tobytes().hex())

    def require(self, encode: str, duration_sec: float, mimi_sha256: str) -> None:
        """Raise ValueError unless these are codes that a run would make itself.

        Args:
            encode: "whole" or "per_clip".
            duration_sec: length of the run's clips.
            mimi_sha256: of the weights of the run's Mimi.
        """
        if self.manifest["mimi_sha256"] != mimi_sha256:
            raise ValueError(
                f"{self.folder} was prepared with another Mimi (sha256 {self.manifest['mimi_sha256']}) than "
                f"this run's (sha256 {mimi_sha256}); train with the model it was prepared for, or prepare "
                "the recordings with this one: python -m finetune.data.prepare model.source=..."
            )
        if self.encode != encode:
            raise ValueError(
                f"{self.folder} holds codes of encode={self.encode}, and this run wants {encode}; set "
                f"data.encode={self.encode} (ttt.persistent_states=true needs whole), or prepare the "
                f"recordings again with data.encode={encode}"
            )
        if encode == PER_CLIP and self.duration_sec != duration_sec:
            raise ValueError(
                f"{self.folder} holds clips of {self.duration_sec:g} s, each encoded by itself, and this run "
                f"has duration_sec={duration_sec:g}; set duration_sec={self.duration_sec:g}, or prepare with "
                "data.encode=whole, which can be cut to any length"
            )


_AGAIN = (
    "Remove it if it is there, run `python -m finetune.data.prepare` with the same arguments again, which "
    "makes what is missing"
)


@dataclass(frozen=True)
class PreparedRecording:
    """A recording of a prepared folder; stands where a `Recording` does.

    Args:
        prepared: the folder.
        index: place in it.
        duration_sec: length of its audio.
    """

    prepared: PreparedSet
    index: int
    duration_sec: float

    @property
    def path(self) -> Path:
        """What errors and logs call it."""
        return self.prepared.folder / self.prepared.source(self.index)

    @property
    def words(self) -> Words | None:
        """Its words in order; None where nobody wrote down what is said."""
        shard, row = self._place
        return shard.words(row)

    @property
    def num_frames(self) -> int:
        """Frames of all its codes."""
        shard, row = self._place
        return shard.num_frames(row)

    def codes(self, first: int, stop: int) -> torch.Tensor:
        """Codes `[16, T]` of some frames of the whole recording; T ends with it.

        Raises:
            ValueError: it could not be read when it was prepared.
        """
        assert self.prepared.encode == WHOLE
        shard, row = self._place
        self._require_frames(shard.num_frames(row))
        return shard.piece(row, 0, first, stop)

    def crop(self, number: int) -> torch.Tensor:
        """Codes `[16, T]` of a clip that was encoded by itself.

        Raises:
            ValueError: it could not be read when it was prepared.
        """
        assert self.prepared.encode == PER_CLIP
        shard, row = self._place
        codes = shard.piece(row, number)
        self._require_frames(codes.shape[1])
        return codes

    def _require_frames(self, frames: int) -> None:
        """Raise ValueError for what has none: nothing else has no frames."""
        if not frames:
            raise ValueError(lost_message(str(self.path), self.prepared))

    @property
    def _place(self) -> tuple[Shard, int]:
        index = self.prepared.index
        return self.prepared.shard(int(index["shard"][self.index])), int(index["row"][self.index])


def lost_message(name: str, prepared: PreparedSet) -> str:
    """What to do about a recording that a folder lacks."""
    reason = prepared.lost.get(name, "the manifest does not say why")
    return (
        f"{name} could not be read when {prepared.folder} was prepared: {reason}. Repair it and "
        "prepare the recordings in another folder, or train without it with data.on_error=skip"
    )


class PreparedRecordings(Sequence[PreparedRecording]):
    """All recordings of a prepared folder, made when they are asked for."""

    def __init__(self, prepared: PreparedSet):
        self.prepared = prepared

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.prepared.recording(range(len(self))[index])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if not (folder / PLAN).is_file():
            raise ValueError(f"{folder} is no prepared folder: it has no {MANIFEST}")
        number = _read_object(folder / PLAN).get("shards")
        if not isinstance(number, int):
            raise ValueError(f"{folder / PLAN} is damaged: it does not say how many shards there are")
        missing = missing_shards(folder, number)
        if missing:
            named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise ValueError(
                f"{folder} is not whole: shards {named} ({len(missing)} of {number}) are missing. Run "
                "`python -m finetune.data.prepare` with the same arguments again, or wait for its other tasks"
            )
        raise ValueError(
            f"{folder} has all {number} shards but no {MANIFEST}; join them with "
            f"`python -m finetune.data.prepare mode=join output={folder}`"
        )
    manifest = _read_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {manifest.get('format')!r}; this version reads {FORMAT}")
    for name, is_so in _MANIFEST_RULES.items():
        if not is_so(manifest.get(name)):
            shown = str(manifest.get(name))[:80]
            raise ValueError(f"{path} is damaged: {name} is {shown}. Remove it and join the shards again")
    if (manifest["encode"] == PER_CLIP) != (manifest.setdefault("duration_sec") is not None):
        raise ValueError(
            f"{path} is damaged: encode is {manifest['encode']}, duration_sec {manifest['duration_sec']}. "
            "Remove it and join the shards again"
        )
    return manifest


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: not JSON ({error}). Remove it and join the shards again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: no JSON object. Remove it and join the shards again")
    return content


def _holds_texts(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


# What a manifest must hold for the folder to be read.
_MANIFEST_RULES: dict[str, Callable[[Any], bool]] = {
    "encode": lambda value: value in (WHOLE, PER_CLIP),
    "duration_sec": lambda value: value is None or is_time(value),
    "mimi_sha256": lambda value: isinstance(value, str),
    "files": lambda value: _holds_texts(value, INDEX, SOURCES),
    "lost": lambda value: (
        value is None or isinstance(value, list) and all(_holds_texts(one, "path", "lost") for one in value)
    ),
}


def _require_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing. {_AGAIN}")
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path} is damaged: its sha256 is {found}, the manifest says {expected}. {_AGAIN}")
