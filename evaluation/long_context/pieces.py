"""What is scored of a recording: all of it, and the targets of the controls behind their prefixes.

A control's target is the same frames of a recording each time. What comes before them changes:

prefix N           the N frames of the recording before the target
foreign own        as many frames of the recording as the next two have
foreign other      as many frames of another speaker's recording
foreign far        the same, but for the last `near` frames, which are the recording's own: attention cannot
                   reach what is foreign, only the inner state can have kept it
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.long_context.recordings import LongRecording

WHOLE = "whole"
PREFIX = "prefix "
OWN, OTHER, FAR = "foreign own", "foreign other", "foreign far"


@dataclass(frozen=True)
class Piece:
    """Frames that are scored in one go, from a fresh state.

    Args:
        name: what it is.
        spans: (recording, first frame, behind the last) in order.
        kept: frames at the end whose NLLs are kept.
    """

    name: str
    spans: tuple[tuple[int, int, int], ...]
    kept: int

    @property
    def frames(self) -> int:
        return sum(stop - start for _, start, stop in self.spans)


@dataclass(frozen=True)
class Plan:
    """The controls of a run.

    Args:
        lengths: frames of each recording.
        starts: first frame of each recording's target; 0 where it is too short for one.
        target_frames: of a target.
        near_frames: frames of the recording itself in the piece `foreign far`.
        size: frames of a mini-batch: prefixes are whole ones, so that targets begin with one.
        others: who gives each recording a foreign prefix, None for nobody.
        controls: which there are.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    target_frames: int
    near_frames: int
    size: int
    others: tuple[int | None, ...]
    controls: tuple[str, ...]

    def pieces(self, recording: int, with_controls: bool) -> list[Piece]:
        """All that is scored of one recording."""
        length, start = self.lengths[recording], self.starts[recording]
        found = [Piece(WHOLE, ((recording, 0, length),), length)]
        if not with_controls or start == 0:
            return found
        end = start + self.target_frames

        def piece(name: str, *spans: tuple[int, int, int]) -> Piece:
            return Piece(name, spans, self.target_frames)

        if "prefix" in self.controls:
            found += [
                piece(f"{PREFIX}{frames}", (recording, start - frames, end))
                for frames in prefix_lengths(start, self.size)
            ]
        other = self.others[recording]
        if "foreign" in self.controls and other is not None:
            stop = self.starts[other]
            frames, near = min(start, stop), self.near_frames
            found.append(piece(OWN, (recording, start - frames, end)))
            found.append(piece(OTHER, (other, stop - frames, stop), (recording, start, end)))
            if frames > near:
                far = (other, stop - frames, stop - near)
                found.append(piece(FAR, far, (recording, start - near, end)))
        return found


def make_plan(
    recordings: Sequence[LongRecording],
    lengths: Sequence[int],
    target_frames: int,
    target_end: float,
    near_frames: int,
    size: int,
    controls: Sequence[str],
    seed: int,
) -> Plan:
    """Place the targets and choose who gives whom a foreign prefix.

    Raises:
        ValueError: foreign prefixes are asked for and there is one speaker alone.
    """
    starts = [max(0, int(length * target_end) - target_frames) // size * size for length in lengths]
    near = -(-near_frames // size) * size
    others: list[int | None] = [None] * len(recordings)
    if "foreign" in controls:
        if len({recording.speaker for recording in recordings}) < 2:
            raise ValueError(
                f"controls=[foreign] needs recordings of two speakers, got those of {recordings[0].speaker} "
                "alone; add some, or use controls=[prefix]"
            )
        others = foreign(recordings, starts, seed)
    return Plan(tuple(lengths), tuple(starts), target_frames, near, size, tuple(others), tuple(controls))


def prefix_lengths(longest: int, size: int) -> list[int]:
    """Whole mini-batches: one, and its doubles up to `longest`."""
    return [size * 2**power for power in range(max(longest // size, 0).bit_length())]


def foreign(recordings: Sequence[LongRecording], starts: Sequence[int], seed: int) -> list[int | None]:
    """For each recording one of another speaker that has as much before its target, or the most there is."""
    order = random.Random(seed).sample(range(len(recordings)), len(recordings))
    chosen: list[int | None] = []
    for index, recording in enumerate(recordings):
        place = order.index(index)
        rotated = order[place + 1 :] + order[:place]
        others = [i for i in rotated if recordings[i].speaker != recording.speaker and starts[i] > 0]
        enough = [i for i in others if starts[i] >= starts[index]]
        chosen.append(enough[0] if enough else max(others, key=lambda i: starts[i], default=None))
    return chosen
