"""Data sets of the paper metrics are read as published; what is wrong with one is told with the remedy."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import soundfile
from paper_data import (
    LEXICAL,
    RATE,
    SYNTACTIC,
    cut,
    write_gold,
    write_salmon,
    write_sblimp,
    write_storycloze,
    write_swuggy,
)

from evaluation.paper_metrics.data import read_tasks
from evaluation.paper_metrics.pairs import TaskData, clip_seconds
from evaluation.paper_metrics.salmon import PARTS, read_salmon
from evaluation.paper_metrics.settings import DataFolders, PaperMetricsConfig
from evaluation.paper_metrics.slm21 import read_slm21
from evaluation.paper_metrics.storycloze import read_storycloze


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """All data sets, to be copied and spoilt."""
    root = tmp_path_factory.mktemp("published")
    write_sblimp(write_swuggy(root / "sLM21-dataset"))
    write_swuggy(root / "sLM21-dataset", ids=2, split="test")
    write_storycloze(root / "tSC")
    write_storycloze(root / "sSC", 2, ("anna", "bob"))
    write_salmon(root / "salmon_benchmark")
    return root


@pytest.fixture
def data(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "data"))


def read(task: str, root: Path) -> list[TaskData]:
    if task == "salmon":
        return read_salmon(str(root / "salmon_benchmark"))
    if task in ("tsc", "ssc"):
        return [read_storycloze(task, str(root / {"tsc": "tSC", "ssc": "sSC"}[task]))]
    return [read_slm21(task, "dev", str(root / "sLM21-dataset"))]


def test_published_layouts_are_read(published):
    (swuggy,) = read("swuggy", published)
    assert [(p.cluster, p.voice, p.in_vocab) for p in swuggy.pairs] == [
        (str(word), voice, word in (1, 3)) for word in range(4) for voice in ("v1", "v2")
    ]
    pair = swuggy.pairs[2]
    assert (pair.positive, pair.negative) == ("Stem_1_v1_rw", "Stem_1_v1_nw")
    assert dict(pair.about) == {"word": "word1", "frequency": "12"}
    assert swuggy.gold_sha256 is not None
    assert len(swuggy.clips) == 16
    assert read_slm21("swuggy", "test", str(published / "sLM21-dataset")).clusters == 2
    (sblimp,) = read("sblimp", published)
    assert [p.cluster for p in sblimp.pairs] == [
        *(f"agreement/plain/{n}" for n in range(3)),
        *(f"binding/far/{n}" for n in range(2)),
    ]
    assert [p.stratum for p in sblimp.pairs] == ["agreement"] * 3 + ["binding"] * 2
    assert sblimp.pairs[0].positive == "agreement0b"
    (tsc,) = read("tsc", published)
    assert [(p.positive, p.negative) for p in tsc.pairs][1] == (
        "2_0a1b1-77-cd_correct",
        "3_0a1b1-77-cd_incorrect",
    )
    (ssc,) = read("ssc", published)
    assert [(p.cluster, p.voice) for p in ssc.pairs] == [
        (f"0a1b{story}-77-cd", speaker) for story in range(2) for speaker in ("anna", "bob")
    ]
    assert ssc.clusters == 2
    salmon = read("salmon", published)
    assert [task.name for task in salmon] == [f"salmon_{part}" for part in PARTS]
    assert [(p.positive, p.negative) for p in salmon[0].pairs] == [("sample_0_0", "sample_0_1")]
    seconds = clip_seconds(tsc)
    assert seconds["2_0a1b1-77-cd_correct"] == pytest.approx(13 * 0.08)


def test_the_order_of_files_and_rows_changes_nothing(data):
    before = read("sblimp", data)[0]
    gold = data / "sLM21-dataset/syntactic/dev/gold.csv"
    rows = rows_of(gold)
    write_gold(gold.parent, tuple(sorted(SYNTACTIC)), rows[::-1])
    after = read("sblimp", data)[0]
    assert after.pairs == before.pairs
    assert after.digest == before.digest
    assert after.gold_sha256 != before.gold_sha256


def rows_of(gold: Path) -> list[dict[str, str]]:
    with gold.open() as file:
        return list(csv.DictReader(file))


LEX = "sLM21-dataset/lexical/dev"


def change_gold(root: Path, **changes: str) -> None:
    """Change fields of the first row."""
    gold = root / LEX / "gold.csv"
    rows = rows_of(gold)
    rows[0] |= changes
    write_gold(gold.parent, LEXICAL, rows)


def edit(root: Path, old: str, new: str) -> None:
    gold = root / LEX / "gold.csv"
    text = gold.read_text()
    assert old in text
    gold.write_text(text.replace(old, new))


def remove_gold(root: Path) -> None:
    (root / LEX / "gold.csv").rename(root / "sLM21-dataset/lexical/gold.csv")


def repeat_row(root: Path) -> None:
    gold = root / LEX / "gold.csv"
    rows = rows_of(gold)
    write_gold(gold.parent, LEXICAL, [*rows, rows[0]])


def syntactic_gold(root: Path) -> None:
    shutil.copy(root / "sLM21-dataset/syntactic/dev/gold.csv", root / LEX)


def lower_case(root: Path) -> None:
    path = root / LEX / "Stem_1_v2_nw.wav"
    path.rename(path.with_name("stem_1_v2_nw.wav"))


def move_wavs(root: Path) -> None:
    folder = root / LEX / "wav"
    folder.mkdir()
    for path in (root / LEX).glob("*.wav"):
        path.rename(folder / path.name)


def rename(pattern: str, new: str):
    def change(root: Path) -> None:
        (path,) = root.glob(pattern)
        path.rename(path.with_name(new))

    return change


def copy(pattern: str, new: str):
    def change(root: Path) -> None:
        (path,) = root.glob(pattern)
        shutil.copy(path, path.with_name(new))

    return change


def remove(*patterns: str):
    def change(root: Path) -> None:
        for pattern in patterns:
            paths = list(root.glob(pattern))
            assert paths
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


STORY = "tSC/2_*_correct.wav"
FAULTS = [
    ("swuggy", remove_gold, r"dev/gold\.csv is missing; did you mean .*lexical/gold\.csv\? Copy it there"),
    ("swuggy", remove(f"{LEX}/gold.csv"), r"gold\.csv is missing; did you mean"),
    ("swuggy", remove(LEX), r"swuggy needs .*lexical/dev, which does not exist"),
    (
        "swuggy",
        remove(f"{LEX}/Stem_1_v2_nw.wav"),
        r"gold.csv names 1 clips that are missing: .*/Stem_1_v2_nw\.wav; copy",
    ),
    ("swuggy", lower_case, r"there is stem_1_v2_nw\.wav: upper and lower case must be those of gold\.csv"),
    (
        "swuggy",
        move_wavs,
        r"names 16 clips that are missing: .* and 11 more; they seem to be in .*dev/wav: move them",
    ),
    ("swuggy", lambda r: change_gold(r, filename="Stem_0_v1_rw.wav"), r"filename is the stem, without \.wav"),
    ("swuggy", repeat_row, r"rows 2 and 18 both name the clip Stem_0_v1_rw"),
    (
        "swuggy",
        lambda r: edit(r, "filename,", "file,"),
        r"unknown \['file'\], missing \['filename'\]; is 'file' the column",
    ),
    (
        "swuggy",
        lambda r: edit(r, ",correct", ",correct,score"),
        r"unknown \['score'\], missing \[\]; .*expected filename,id",
    ),
    ("swuggy", lambda r: edit(r, ",", "|"), r"its fields are not separated by commas"),
    ("swuggy", syntactic_gold, r"these are the columns of sblimp: .* belongs into syntactic"),
    ("swuggy", lambda r: change_gold(r, correct="yes"), r"row 2: correct must be 1 or 0, got 'yes'"),
    (
        "swuggy",
        lambda r: change_gold(r, frequency="often"),
        r"row 2: frequency must be a number or empty, got 'often'",
    ),
    (
        "swuggy",
        lambda r: change_gold(r, correct="0"),
        r"id 0, voice v1 should have one clip with correct 1 and one with 0, has",
    ),
    ("swuggy", lambda r: change_gold(r, voice="v9"), r"id 0, voice v9 should have one clip"),
    (
        "swuggy",
        lambda r: change_gold(r, frequency="7"),
        r"id 0 has frequency 0 with one voice and not with another",
    ),
    (
        "swuggy",
        lambda r: edit(r, "Stem_0_v1_nw,0,v1,,", "Stem_0_v1_nw,0,v1,"),
        r"row 3 has not as many fields as there",
    ),
    (
        "tsc",
        rename(STORY, "2_0a1b1-77-cd_right.wav"),
        r"2_0a1b1-77-cd_right\.wav is labelled neither _correct nor",
    ),
    ("tsc", remove(STORY), r"3_0a1b1-77-cd_incorrect\.wav has no partner \.\.\._0a1b1-77-cd_correct\.wav"),
    (
        "tsc",
        copy(STORY, "9_0a1b1-77-cd_correct.wav"),
        r"story 0a1b1-77-cd has several clips that are correct in .*: 2_.*, 9_",
    ),
    ("ssc", remove("sSC/bob/*0a1b1*"), r"story 0a1b1-77-cd is told by anna but not by bob"),
    ("salmon", remove("salmon_benchmark/rir_consistency"), r"lacks the folders rir_consistency; unpack"),
    (
        "salmon",
        remove("salmon_benchmark/bg_alignment/*_1.wav"),
        r"sample_0_1\.wav is missing, its partner is there",
    ),
    (
        "salmon",
        rename("*/bg_alignment/*_1.wav", "sample_0_2.wav"),
        r"sample_0_2\.wav is not named sample_NUMBER_0\.wav",
    ),
    (
        "salmon",
        copy("*/bg_alignment/*_1.wav", "sample_00_1.wav"),
        r"sample_0_1\.wav and sample_00_1\.wav are the same sample",
    ),
]


@pytest.mark.parametrize("task, spoil, message", FAULTS)
def test_what_is_wrong_is_told_with_the_remedy(data, task, spoil, message):
    spoil(data)
    with pytest.raises(ValueError, match=message):
        read(task, data)


@pytest.mark.parametrize(
    "task, given, meant",
    [
        ("swuggy", "sLM21-dataset/lexical", "sLM21-dataset"),
        ("swuggy", "sLM21-dataset/lexical/dev", "sLM21-dataset"),
        ("sblimp", ".", "sLM21-dataset"),
        ("swuggy", "sLM21-datset", "sLM21-dataset"),
        ("tsc", ".", "tSC"),
        ("tsc", "tsc", "tSC"),
        ("ssc", "sSC/../salmon_benchmark", "sSC"),
        ("salmon", "salmon_benchmark/rir_consistency", "salmon_benchmark"),
        ("salmon", ".", "salmon_benchmark"),
    ],
)
def test_a_folder_one_level_off_is_guessed(published, task, given, meant):
    folder = str(published / given)
    setting = "slm21" if task in ("swuggy", "sblimp") else task
    guess = rf"did you mean data\.{setting}={re.escape(str(published / meant))}\?"
    config = PaperMetricsConfig(tasks=[task], data=DataFolders(**{setting: folder}))
    with pytest.raises(ValueError, match=guess) as told:
        read_tasks(config)
    assert f"data.{setting}={folder}" in str(told.value)


def test_two_data_sets_are_not_taken_for_two_speakers(tmp_path):
    for name in ("sSC", "tSC"):
        write_storycloze(tmp_path / name, 1)
    with pytest.raises(ValueError, match=r"did you mean data\.ssc="):
        read_storycloze("ssc", str(tmp_path))


def test_clips_that_are_empty_stereo_or_no_audio_are_told_at_once(data):
    folder = data / "tSC"
    first, second, third = sorted(folder.glob("*.wav"))[:3]
    soundfile.write(first, cut(0, 0), RATE)
    second.write_bytes(b"")
    soundfile.write(third, cut(0, 4).repeat(2).reshape(-1, 2), RATE)
    (task,) = read("tsc", data)
    with pytest.raises(ValueError) as told:
        clip_seconds(task)
    message = str(told.value)
    assert message.startswith("tsc: ")
    assert f"{first} holds no audio" in message
    assert f"{second} is no audio file" in message
    assert f"{third} has 2 channel(s); expected mono" in message
    assert message.endswith("Copy these files again from the published data set")


def test_hidden_files_of_archives_are_no_clips(data):
    for folder in (data / "tSC", data / "salmon_benchmark" / PARTS[0]):
        (folder / "._0_aa_correct.wav").write_bytes(b"Mac")
    assert len(read("tsc", data)[0].pairs) == 3
    assert len(read("salmon", data)[0].pairs) == 1


def test_a_data_set_that_is_asked_for_must_be_given():
    with pytest.raises(
        ValueError, match=r"missing data\.tsc: give the folder with .*, or leave its task out"
    ):
        read_storycloze("tsc", None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give checkpoint=RUN or baseline=REPOSITORY"),
        ({"checkpoint": "a", "baseline": "b"}, "and not both"),
        (
            {"baseline": "tiny", "tasks": ["swuggy", "wuggy"]},
            "tasks must be some of swuggy, sblimp.*got swuggy, wuggy",
        ),
        ({"baseline": "tiny", "tasks": []}, "tasks must be some of .*got none"),
        ({"baseline": "tiny", "splits": ["train"]}, "splits must be some of dev, test"),
        ({"baseline": "tiny", "user_filler": "noise"}, "user_filler must be one of silence, -1; got 'noise'"),
        ({"baseline": "tiny", "dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"baseline": "tiny", "limit": 0}, "limit must be at least 1, got 0"),
        ({"checkpoint": "a", "revision": "main"}, "revision is the baseline's"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PaperMetricsConfig(**settings).validate()
