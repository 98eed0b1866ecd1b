"""A transcript as it lies in its file, with everything that is wrong in it: for the check, which goes on."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.transcript import is_time


@dataclass(frozen=True)
class TimedWord:
    """A word; times in seconds from the start of the recording."""

    text: str
    start: float
    end: float
    speaker: str


@dataclass
class Transcript:
    """The words of a recording in the order of the file.

    Args:
        faults: what else is in the file, or why there are no words.
    """

    words: list[TimedWord] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_transcript(path: Path) -> Transcript | None:
    """The transcript in a JSON file; None where there is no file, or one with other things in it."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        return Transcript(faults=[f"{path.name} cannot be read as JSON ({error})"])
    if isinstance(content, dict) and "alignments" not in content:
        return None
    if not isinstance(content, dict) or not isinstance(content["alignments"], list):
        return Transcript(
            faults=[f'{path.name}: expected {{"alignments": [[word, [start, end], speaker], ...]}}']
        )
    transcript = Transcript()
    for index, item in enumerate(content["alignments"]):
        match item:
            case [str(text), [start, end], str(speaker)] if is_time(start) and is_time(end):
                transcript.words.append(TimedWord(text, float(start), float(end), speaker))
            case _:
                transcript.faults.append(
                    f"{path.name}: expected [word, [start, end], speaker] as alignment {index}, "
                    f"got {str(item)[:80]}"
                )
    return transcript
