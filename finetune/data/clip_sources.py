"""Data sets as the config names them, as clips: of recordings, and of prepared folders."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.data.bad_input import BadInput
from finetune.data.clips import Clip, PreparedClips, cut_clips
from finetune.data.joined import Joined
from finetune.data.mixing import MixedOrder, per_recording
from finetune.data.places import is_prepared, parse_places
from finetune.data.prepared import PreparedSet, lost_message
from finetune.data.sources import SourceSettings, read_places

logger = logging.getLogger(__name__)


@dataclass
class ClipSource:
    """Clips of one source and how often it is drawn, relative to the others."""

    weight: float
    clips: Sequence[Clip]


def joined(sources: Sequence[ClipSource]) -> Sequence[Clip]:
    """The clips of all sources, in order."""
    parts = [source.clips for source in sources]
    return parts[0] if len(parts) == 1 else Joined(parts)


def read_clip_sources(
    spec: str,
    settings: SourceSettings,
    bad_input: BadInput,
    duration_sec: float,
    require: Callable[[PreparedSet], None],
) -> list[ClipSource]:
    """The clips of all sources that a config names.

    Args:
        duration_sec: length of a clip.
        require: raises ValueError for a prepared folder that is not of this run's settings.
    Raises:
        ValueError: a source cannot be read, or more recordings are bad than `bad_input` lets pass.
    """
    places = parse_places(spec)
    recorded = iter(read_places([p for p in places if not is_prepared(p.path)], settings, bad_input))
    sources = []
    for place in places:
        if not is_prepared(place.path):
            sources.append(ClipSource(place.weight, cut_clips(next(recorded).recordings, duration_sec)))
            continue
        if place.mono:
            raise ValueError(f"mono:{place.path} is a prepared folder, which holds both streams; drop mono:")
        prepared = PreparedSet(place.path)
        require(prepared)
        expect_prepared(prepared, bad_input)
        logger.info("%s: %d recordings, %.1f h", place.path, len(prepared), prepared.manifest["hours"])
        sources.append(ClipSource(place.weight, PreparedClips(prepared, duration_sec)))
    return sources


def expect_prepared(prepared: PreparedSet, bad_input: BadInput) -> None:
    """Count the recordings of a prepared folder, and those that could not be read when it was made.

    Raises:
        ValueError: there may be none of these, or not so many.
    """
    bad_input.expect(len(prepared))
    for name in prepared.lost:
        bad_input.skip(name, ValueError(lost_message(name, prepared)))
    bad_input.require_enough()


def mixed(sources: Sequence[ClipSource], seed: int, shuffle: bool, by_recording: bool) -> MixedOrder | None:
    """The order of the clips of several sources, or of their recordings; None for one source alone.

    Weights are shares of clips in either.
    """
    if len(sources) == 1:
        return None
    lengths, weights = [len(source.clips) for source in sources], [source.weight for source in sources]
    if by_recording:
        recordings = [recordings_in(source.clips) for source in sources]
        weights, lengths = per_recording(weights, lengths, recordings), recordings
    return MixedOrder(lengths, weights, seed, shuffle)


def recordings_in(clips: Sequence[Clip]) -> int:
    """How many recordings the clips are of."""
    return len(clips.prepared) if isinstance(clips, PreparedClips) else sum(clip.is_first for clip in clips)
