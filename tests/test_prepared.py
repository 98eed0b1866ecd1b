"""Prepared folders: training from them is training from audio, whoever made them, and damage is refused."""

import itertools
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from prepared_data import CHUNK_SEC, LENGTHS, TINY_SHARDS, contents, run_prepare, write_recordings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data import SPECIAL
from training import SAMPLE, losses, run, run_python, start_python, tiny_config

from finetune.data.audio import read_samples
from finetune.data.bad_input import BadInput
from finetune.data.batches import chunk_batches, training_batches
from finetune.data.chunks import ChunkEncoder
from finetune.data.clips import ClipEncoder, PreparedClips, cut_clips
from finetune.data.codec import RECORDINGS_AT_ONCE, batches_of, encode_whole
from finetune.data.interleaver import TextLayout
from finetune.data.manifest import Word, read_manifest
from finetune.data.order import Sampling
from finetune.data.places import is_prepared
from finetune.data.prepared import PreparedSet
from finetune.data.shard import Encoded, Shard, shard_bytes
from finetune.train import read_clips
from moshi_ttt.atomic import write_atomically
from moshi_ttt.digest import sha256
from moshi_ttt.loading import ModelConfig, find_base, load_mimi, load_tokenizer
from moshi_ttt.tiny_model import tiny_model_folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def whole(recordings, tmp_path_factory, tiny_base) -> Path:
    return run_prepare(tmp_path_factory.mktemp("prepared") / "whole", f"data.train={recordings}")


@pytest.fixture(scope="module")
def crops(recordings, tmp_path_factory, tiny_base) -> Path:
    settings = ("data.encode=per_clip", f"duration_sec={CHUNK_SEC}")
    return run_prepare(tmp_path_factory.mktemp("prepared") / "crops", f"data.train={recordings}", *settings)


@pytest.fixture(scope="module")
def encoder(tiny_base):
    mimi, tokenizer = load_mimi(tiny_base, "cpu"), load_tokenizer(tiny_base)

    def encoder(duration_sec: float, layout: TextLayout = TextLayout()) -> ClipEncoder:  # noqa: B008
        return ClipEncoder(mimi, tokenizer, SPECIAL, duration_sec, layout)

    return encoder


def assert_same_batches(one, other, count: int) -> None:
    for a, b in itertools.islice(zip(one, other, strict=True), count):
        assert torch.equal(a.codes, b.codes)
        assert [clip.start_sec for clip in a.clips] == [clip.start_sec for clip in b.clips]


@pytest.mark.parametrize("layout", [TextLayout(), TextLayout(keep_main_only=False, keep_and_shift=True)])
@pytest.mark.parametrize("duration_sec", [0.64, 0.08, 1.28])
def test_chunks_from_shards_are_those_from_audio(recordings, whole, encoder, duration_sec, layout):
    chunks = ChunkEncoder(encoder(duration_sec, layout))
    audio = cut_clips(read_manifest(recordings), duration_sec)
    shards = PreparedClips(PreparedSet(whole), duration_sec)
    assert len(audio) == len(shards)
    for make in (
        lambda clips: chunk_batches(chunks, clips, 2, Sampling(2, 3)),
        lambda clips: training_batches(chunks, clips, Sampling(3, 3)),
    ):
        assert_same_batches(make(audio), make(shards), 40)


def test_clips_from_shards_are_those_from_audio(recordings, crops, encoder):
    clips = encoder(CHUNK_SEC)
    audio = cut_clips(read_manifest(recordings), CHUNK_SEC)
    shards = PreparedClips(PreparedSet(crops), CHUNK_SEC)
    assert len(audio) == len(shards) == 11
    one, other = (training_batches(clips, data, Sampling(3, 3)) for data in (audio, shards))
    assert_same_batches(one, other, 20)
    whole_codes = ChunkEncoder(clips).encode(audio).codes
    assert not torch.equal(clips.encode(audio).codes, whole_codes)  # they are two things indeed


def test_the_sample_from_shards_is_the_sample_from_audio(encoder, tmp_path):
    folder = run_prepare(tmp_path / "sample", f"data.train={SAMPLE / 'train.jsonl'}", "shard_hours=0.005")
    chunks = ChunkEncoder(encoder(2.56))
    audio = cut_clips(read_manifest(SAMPLE / "train.jsonl"), 2.56)
    assert torch.equal(
        chunks.encode(audio).codes, chunks.encode(PreparedClips(PreparedSet(folder), 2.56)[:]).codes
    )


def test_a_recording_in_a_shard_is_what_was_listed(recordings, whole):
    prepared = PreparedSet(whole)
    listed = read_manifest(recordings)
    assert len(prepared) == len(listed) == len(LENGTHS)
    for index, recording in enumerate(listed):
        found = prepared.recording(index)
        assert tuple(found.words) == recording.words
        assert found.duration_sec == recording.duration_sec
        assert found.path.name == recording.path.name
    assert {shard.name for shard in whole.glob("shard_*")} == {
        f"shard_{number:06d}.safetensors" for number in range(3)
    }


def test_the_manifest_names_mimi_and_every_source(recordings, whole, tiny_base):
    manifest = json.loads((whole / "prepared.json").read_text())
    assert manifest["mimi_sha256"] == sha256(Path(tiny_base.mimi_weights))
    assert (manifest["encode"], manifest["recordings"]) == ("whole", 5)
    assert manifest["files"]["sources.jsonl"] == sha256(whole / "sources.jsonl")
    sources = [json.loads(line) for line in (whole / "sources.jsonl").read_text().splitlines()]
    assert [source["path"] for source in sources] == [f"{index}.wav" for index in range(5)]
    assert [source["sha256"] for source in sources] == [
        sha256(recordings.parent / f"{index}.wav") for index in range(5)
    ]


def test_codes_are_16_bits_and_nothing_is_pickled(whole):
    with safe_open(whole / "shard_000000.safetensors", "pt") as shard:
        assert shard.get_tensor("codes").dtype == torch.int16
        assert shard.get_tensor("codes").shape[1] == 16
    assert {path.suffix for path in whole.iterdir()} == {".safetensors", ".json", ".jsonl"}


def test_two_array_tasks_make_what_one_makes(recordings, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    two = run_prepare(tmp_path / "two", f"data.train={recordings}")
    assert sorted(path.name for path in two.iterdir()) == ["plan.json", "shard_000001.safetensors"]
    with pytest.raises(ValueError, match=r"not whole: shards 0, 2 \(2 of 3\) are missing. Run `python -m"):
        PreparedSet(two)
    with pytest.raises(ValueError, match="lacks shards 0, 2"):
        run_prepare(two, "mode=join")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    run_prepare(two, f"data.train={recordings}")
    assert contents(two) == contents(whole)
    for name in ("prepared.json", "index.safetensors", "sources.jsonl"):
        (two / name).unlink()
    assert is_prepared(two)
    with pytest.raises(ValueError, match="has all 3 shards but no prepared.json; join them with `python -m"):
        PreparedSet(two)
    run_prepare(two, "mode=join")
    assert contents(two) == contents(whole)


def test_processes_end_with_their_command_and_make_what_one_makes(recordings, whole, tmp_path):
    output = tmp_path / "workers"
    settings = (f"data.train={recordings}", "model=tiny", "device=cpu", f"shard_hours={TINY_SHARDS}")
    command = start_python(
        "-m", "finetune.data.prepare", *settings, f"output={output}", "workers=2", NO_TORCH_COMPILE="1"
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("shard_*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.kill()
    command.communicate(timeout=60)  # until no process holds its output any more
    (output / "shard_000001.safetensors").unlink(missing_ok=True)
    run_prepare(output, f"data.train={recordings}", "workers=2")
    assert contents(output) == contents(whole)


def test_codes_of_recordings_encoded_together_are_those_of_each_alone(recordings, tiny_base, monkeypatch):
    mimi = load_mimi(tiny_base, "cpu")
    monkeypatch.setitem(RECORDINGS_AT_ONCE, "cpu", 3)
    audio = [read_samples(recording, 24000) for recording in read_manifest(recordings)]
    alone = [encode_whole(mimi, [samples])[0] for samples in audio]
    together = encode_whole(mimi, audio[:3]) + encode_whole(mimi, audio[3:])
    assert [codes.shape for codes in alone] == [(16, math.ceil(frames)) for frames in LENGTHS]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_recordings_are_encoded_together_with_others_of_their_length(monkeypatch):
    monkeypatch.setitem(RECORDINGS_AT_ONCE, "cpu", 2)
    hour = 3600 * 24000
    assert batches_of([5, hour // 2, 7, 6 * hour, hour, hour], torch.device("cpu")) == [
        [3],
        [4, 5],
        [1, 2],
        [0],
    ]


def test_a_killed_command_goes_on_where_it_was(recordings, whole, tmp_path):
    printed = run_python("tests/killed_while_preparing.py", str(recordings), str(tmp_path / "killed"))
    kills, in_shards = (int(part.split()[0]) for part in printed.split(": ")[-2:])
    assert kills >= 8
    assert in_shards >= 2
    assert contents(tmp_path / "killed") == contents(whole)


def test_other_settings_or_recordings_do_not_go_into_a_folder(recordings, whole, crops, tmp_path):
    here = f"data.train={recordings}"
    with pytest.raises(ValueError, match="encode whole there, per_clip here"):
        run_prepare(whole, here, "data.encode=per_clip", f"duration_sec={CHUNK_SEC}")
    with pytest.raises(ValueError, match="duration_sec 0.64 there, 1.28 here"):
        run_prepare(crops, here, "data.encode=per_clip", "duration_sec=1.28")
    with pytest.raises(ValueError, match="list_sha256"):
        run_prepare(whole, f"data.train={write_recordings(tmp_path / 'other', LENGTHS[::-1])}")
    with pytest.raises(ValueError, match="holds something else; give an empty or a new folder"):
        run_prepare(recordings.parent, here)


def test_a_run_refuses_codes_it_would_not_make(recordings, whole, crops, tmp_path, tiny_base):
    def refused(folder, match, *settings):
        config = tiny_config(tmp_path / "run", f"data.train={folder}", *settings)
        with pytest.raises(ValueError, match=match):
            read_clips(config, BadInput())

    refused(whole, "encode=whole, and this run wants per_clip; set data.encode=whole")
    refused(crops, "encode=per_clip, and this run wants whole", "data.encode=whole")
    refused(crops, "clips of 0.64 s, each encoded by itself, and this run has duration_sec=1.28")
    other = tmp_path / "other_model"
    shutil.copytree(tiny_model_folder(), other)
    weights = next(path for path in other.glob("*.safetensors") if path.name == tiny_base.mimi_weights.name)
    tensors = load_file(weights)
    next(iter(tensors.values())).add_(0.01)
    save_file(tensors, weights)
    made = run_prepare(tmp_path / "made", f"data.train={recordings}", f"model.source={other}")
    sums = [sha256(Path(find_base(ModelConfig(str(source))).mimi_weights)) for source in (other, "tiny")]
    refused(
        made, rf"another Mimi \(sha256 {sums[0]}\) than this run's \(sha256 {sums[1]}\)", "data.encode=whole"
    )


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_damage_is_refused(whole, tmp_path):
    def damaged(name: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "copy")
        return tmp_path / "copy" / name

    run_prepare(damaged("").parent / "copy", "mode=verify")
    shard = damaged("shard_000001.safetensors")
    flip(shard, -200)
    with pytest.raises(ValueError, match="shard_000001.safetensors is damaged: its sha256 is"):
        run_prepare(shard.parent, "mode=verify")
    shard = damaged("shard_000001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard_000001.safetensors is damaged: it has \d+ bytes"):
        PreparedSet(shard.parent)
    shard = damaged("shard_000000.safetensors")
    flip(shard, shard.read_bytes().index(b"sources") + 1)
    with pytest.raises(ValueError, match="shard_000000.safetensors is damaged: its sha256 is"):
        PreparedSet(shard.parent).recording(0).codes(0, 1)
    shard = damaged("shard_000000.safetensors")
    flip(shard, -200)  # among the words: no code and no word of it is believed
    with pytest.raises(ValueError, match="shard_000000.safetensors is damaged: its sha256 is"):
        PreparedSet(shard.parent).recording(0).codes(0, 1)
    index = damaged("index.safetensors")
    flip(index, -1)
    with pytest.raises(ValueError, match="index.safetensors is damaged"):
        PreparedSet(index.parent)
    damaged("shard_000002.safetensors").unlink()
    with pytest.raises(ValueError, match="shard_000002.safetensors is missing"):
        PreparedSet(tmp_path / "copy")


@pytest.mark.parametrize(
    "settings",
    [
        ("ttt.persistent_states=true", "ttt.mini_batch_size=4"),
        ("data.encode=whole",),
        ("data.encode=per_clip",),
    ],
    ids=" ".join,
)
def test_a_run_on_a_moved_folder_is_the_run_on_its_audio(whole, crops, recordings, tmp_path, settings):
    moved = tmp_path / "moved"
    shutil.copytree(crops if "per_clip" in settings[0] else whole, moved)
    runs = []
    for name, data in (("audio", recordings), ("shards", moved)):
        lists = (f"data.train={data}", f"data.valid={data}", f"duration_sec={CHUNK_SEC}")
        runs.append(run(tmp_path / name, *lists, *settings, "max_steps=3", "eval.every_steps=3"))
    assert losses(runs[0]) == losses(runs[1])
    valid = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in runs]
    pair = [next(record["loss"] for record in records if record["split"] == "valid") for records in valid]
    assert pair[0] == pair[1]


@pytest.mark.parametrize(
    "settings, match",
    [
        (("data.encode=both",), "data.encode must be whole, per_clip or null; got 'both'"),
        (("data.workers=-1",), "data.workers must be 0"),
        (("data.encode=whole", "duration_sec=1.3"), "use duration_sec=1.28 or 1.36"),
        (("ttt.persistent_states=true", "data.encode=per_clip"), "set data.encode=whole or leave it out"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_settings_that_cannot_work(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        tiny_config(tmp_path / "run", *settings)


def test_no_words_and_nobody_knowing_are_two_things(tmp_path):
    codes = torch.arange(32).reshape(16, 2)
    said = (Word("naïve\nline", 0.1, 0.2, "A"), Word("", 0.1, 0.1, "B"))
    recordings = [Encoded([codes, codes[:, :1]], said), Encoded([codes + 1], ()), Encoded([codes], None)]
    path = tmp_path / "shard.safetensors"
    write_atomically(path, shard_bytes(recordings, {}))
    shard = Shard(path)
    assert [shard.num_pieces(row) for row in range(3)] == [2, 1, 1]
    assert [shard.num_frames(row) for row in range(3)] == [3, 2, 2]
    assert torch.equal(shard.piece(0, 1), codes[:, :1].to(torch.int16))
    assert torch.equal(shard.piece(1, 0, 1, 5), codes[:, 1:].to(torch.int16) + 1)
    words = [shard.words(row) for row in range(3)]
    assert [None if found is None else tuple(found) for found in words] == [said, (), None]
    assert tuple(words[0][1:]) == said[1:]
    assert words[0][-1] == said[1]
    write_atomically(path, shard_bytes([Encoded([codes], None)], {}))
    assert Shard(path).words(0) is None
