"""Spoken and Topic StoryCloze (TWIST): stories with their own ending and with another one.

tSC/NUMBER_UUID_correct.wav, NUMBER+1_UUID_incorrect.wav      1,871 pairs
tSC/SPEAKER/..._{correct,incorrect}.wav                       the variant of several speakers
"""

import re
from collections import defaultdict
from pathlib import Path

from evaluation.paper_metrics.folders import find_folder
from evaluation.paper_metrics.pairs import Pair, TaskData, make_task, raise_problems, wav_stems

OFFICIAL_PAIRS = 1871
LABELS = ("correct", "incorrect")
_STEM = re.compile(r"(?:\d+_)?(?P<id>.+)_(?P<label>correct|incorrect)")
# Of folders that hold a data set each, not a speaker.
_DATA_SET = re.compile(r"[st]_?sc|.*story.?cloze.*", re.IGNORECASE)


def read_storycloze(task: str, given: str | None) -> TaskData:
    """tSC or sSC.

    Args:
        task: tsc or ssc.
        given: the setting data.tsc or data.ssc.
    Raises:
        ValueError: what is wrong, in which file, and what to do.
    """
    expected = "NUMBER_UUID_{correct,incorrect}.wav, or folders of speakers with such files"
    folder = find_folder(f"data.{task}", given, _is_storycloze, expected, task)
    speakers = [""] if _has_clips(folder) else [path.name for path in _speakers(folder)]
    pairs, clips, problems = [], {}, []
    for speaker in speakers:
        found = _read_speaker(folder / speaker, speaker, problems)
        pairs += found
        for pair in found:
            for name in (pair.positive, pair.negative):
                clips[name] = folder / f"{name}.wav"
    problems += _uneven_speakers(pairs, speakers)
    raise_problems(
        problems, str(folder), "Copy these files again from the published data set, or remove them"
    )
    unit = "story" if speakers == [""] else "story with all its speakers"
    return make_task(task, unit, pairs, clips, official_pairs=OFFICIAL_PAIRS * len(speakers))


def _has_clips(folder: Path) -> bool:
    return any(_STEM.fullmatch(stem) for stem in wav_stems(folder))


def _speakers(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and _has_clips(path))


def _is_storycloze(folder: Path) -> bool:
    """Whether clips lie in the folder, or in folders of several speakers and not of several data sets."""
    if _has_clips(folder):
        return True
    speakers = _speakers(folder)
    return len(speakers) > 1 and not any(_DATA_SET.fullmatch(path.name) for path in speakers)


def _read_speaker(folder: Path, speaker: str, problems: list[str]) -> list[Pair]:
    """Pairs of one folder; what is wrong is added to `problems`."""
    stories: dict[str, dict[str, list[str]]] = defaultdict(lambda: {label: [] for label in LABELS})
    for stem in wav_stems(folder):
        found = _STEM.fullmatch(stem)
        if found is None:
            problems.append(f"{folder / stem}.wav is labelled neither _correct nor _incorrect")
        else:
            stories[found["id"]][found["label"]].append(stem)
    pairs = []
    prefix = f"{speaker}/" if speaker else ""
    for story, stems in stories.items():
        if all(len(stems[label]) == 1 for label in LABELS):
            right, wrong = (prefix + stems[label][0] for label in LABELS)
            pairs.append(Pair(story, speaker, right, wrong))
        for label in LABELS:
            if not stems[label]:
                other = stems[LABELS[1 - LABELS.index(label)]][0]
                problems.append(f"{folder / other}.wav has no partner ..._{story}_{label}.wav")
            elif len(stems[label]) > 1:
                names = ", ".join(f"{stem}.wav" for stem in stems[label])
                problems.append(f"story {story} has several clips that are {label} in {folder}: {names}")
    return pairs


def _uneven_speakers(pairs: list[Pair], speakers: list[str]) -> list[str]:
    told = defaultdict(set)
    for pair in pairs:
        told[pair.cluster].add(pair.voice)
    return [
        f"story {story} is told by {', '.join(sorted(voices))} but not by "
        f"{', '.join(sorted(set(speakers) - voices))}"
        for story, voices in sorted(told.items())
        if len(voices) < len(speakers)
    ]
