"""Data sets as the config names them: lists, folders of lists, mono recordings, and mixes of these by weight.

`dialogues.jsonl`, `folder`, `a.jsonl:0.7,b.jsonl.gz:0.3` as in moshi-finetune; `mono:FOLDER` or
`mono:LIST.jsonl` for recordings of one voice, in the layout of Libri-Light or any other.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from finetune.data.bad_input import BadInput
from finetune.data.manifest import Rules, locate, read_list, read_recording
from finetune.data.places import AUDIO_ENDINGS, LIST_ENDINGS, Place, files_in, parse_places
from finetune.data.recording import Recording

logger = logging.getLogger(__name__)

USER_CHANNELS = ("silence", "noise")


@dataclass(frozen=True)
class SourceSettings:
    """What the config says of all sources.

    Args:
        root: folder that all audio must lie in; None is the folder of each list, or the folder named.
        check_files: open every file before the run.
        user_channel: silence or noise: the user of mono recordings.
        user_noise_dbfs: level of that noise.
    """

    root: str | None = None
    check_files: bool = True
    user_channel: str = "silence"
    user_noise_dbfs: float = -60.0


@dataclass(frozen=True)
class Source:
    """Recordings that are drawn from one order.

    Args:
        name: as the config has it.
        weight: how often it is drawn, relative to the others.
    """

    name: str
    weight: float
    recordings: list[Recording]


def read_sources(spec: str, settings: SourceSettings, bad_input: BadInput) -> list[Source]:
    """Read all recordings that a config names.

    Raises:
        ValueError: a source cannot be read, nothing is left of one, or more recordings are bad than
            `bad_input` lets pass.
    """
    return read_places(parse_places(spec), settings, bad_input)


def read_places(places: Sequence[Place], settings: SourceSettings, bad_input: BadInput) -> list[Source]:
    """Read the recordings of some sources; see `read_sources`."""
    sources = []
    for place in places:
        recordings = _read_place(place, settings, bad_input)
        sources.append(Source(str(place.path), place.weight, recordings))
    bad_input.require_enough()
    for source in sources:
        if not source.recordings:
            raise ValueError(f"no recording of {source.name} can be used; see the log for each")
    if bad_input.reasons:
        logger.warning("%s; going on without them", bad_input.summary())
    return sources


def all_recordings(sources: Sequence[Source]) -> list[Recording]:
    """The recordings of all sources, in order."""
    return [recording for source in sources for recording in source.recordings]


def _read_place(place: Place, settings: SourceSettings, bad_input: BadInput) -> list[Recording]:
    path = place.path
    inside = path.resolve() if path.is_dir() else path.resolve().parent
    if settings.root is not None:
        inside = Path(settings.root).expanduser().resolve()
    noise_dbfs = settings.user_noise_dbfs if settings.user_channel == "noise" else None
    rules = Rules(inside, settings.check_files, place.mono, noise_dbfs)
    if not path.is_dir():
        return read_list(path, rules, bad_input)
    if place.mono:
        return _read_folder(path, rules, bad_input)
    lists = files_in(path, LIST_ENDINGS)
    if not lists:
        raise ValueError(
            f"{path} holds no .jsonl or .jsonl.gz file; for a folder of one voice say mono:{path}"
        )
    packed_twice = [str(p) for p in lists if p.with_name(p.name + ".gz") in lists]
    if packed_twice:
        raise ValueError(f"{packed_twice[0]} lies beside the same packed as .gz; remove one of them")
    return [recording for each in lists for recording in read_list(each, rules, bad_input)]


def _read_folder(folder: Path, rules: Rules, bad_input: BadInput) -> list[Recording]:
    """All mono recordings in a folder and those in it, in the order of their names."""
    files = files_in(folder, AUDIO_ENDINGS)
    if not files:
        raise ValueError(f"{folder} holds no audio; expected files such as {', '.join(AUDIO_ENDINGS[:4])}")
    recordings = []
    bad_input.expect(len(files))
    for file in tqdm(files, f"checking {folder.name}", unit="file", disable=None, leave=False):
        try:
            path = locate(file.name, str(file.parent.resolve()), str(rules.inside))
            recordings.append(read_recording(path, rules))
        except ValueError as error:
            bad_input.skip(str(file), error)
    return recordings
