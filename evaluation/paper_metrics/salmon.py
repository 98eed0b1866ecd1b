"""SALMon: recordings against ones whose speaker, mood, room or background changes or does not fit.

salmon_benchmark/PART/sample_NUMBER_{0,1}.wav      0 is the right one; eight parts of 200 pairs
"""

import re
from collections import defaultdict
from pathlib import Path

from evaluation.paper_metrics.folders import find_folder
from evaluation.paper_metrics.pairs import Pair, TaskData, make_task, raise_problems, wav_stems

PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)
OFFICIAL_PAIRS = 200
POSITIVE, NEGATIVE = "0", "1"
_STEM = re.compile(r"sample_(?P<number>\d+)_(?P<label>[01])")


def read_salmon(given: str | None) -> list[TaskData]:
    """The eight parts.

    Args:
        given: the setting data.salmon.
    Raises:
        ValueError: what is wrong, in which file, and what to do.
    """
    folder = find_folder(
        "data.salmon",
        given,
        lambda path: any((path / part).is_dir() for part in PARTS),
        f"salmon_benchmark's folders {', '.join(PARTS)}",
        "salmon_benchmark",
    )
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"{folder} lacks the folders {', '.join(missing)}; unpack the archive again")
    return [_read_part(folder / part) for part in PARTS]


def _read_part(folder: Path) -> TaskData:
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    problems = []
    for stem in wav_stems(folder):
        found = _STEM.fullmatch(stem)
        if found is None:
            problems.append(f"{stem}.wav is not named sample_NUMBER_0.wav or sample_NUMBER_1.wav")
            continue
        number = str(int(found["number"]))
        if found["label"] in samples[number]:
            problems.append(f"{stem}.wav and {samples[number][found['label']]}.wav are the same sample")
        samples[number][found["label"]] = stem
    for number, stems in samples.items():
        for label in {POSITIVE, NEGATIVE} - stems.keys():
            problems.append(f"sample_{number}_{label}.wav is missing, its partner is there")
    if not samples:
        problems.append("it holds no sample_NUMBER_{0,1}.wav")
    raise_problems(sorted(problems), str(folder), "Copy this folder again from the published data set")
    pairs = [Pair(number, "", stems[POSITIVE], stems[NEGATIVE]) for number, stems in samples.items()]
    clips = {name: folder / f"{name}.wav" for pair in pairs for name in (pair.positive, pair.negative)}
    name = f"salmon_{folder.name}"
    return make_task(name, "sample", pairs, clips, official_pairs=OFFICIAL_PAIRS)
