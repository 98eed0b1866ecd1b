"""Whatever stands in a data set's files, it is read, or refused by an error that names the file.

Files are read in a process of its own: a crash or a hang of the native decoders is a failure, not the end.
"""

import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from containers import write_container
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prepared_data import run_prepare, write_recordings
from training import ROOT, dialogue

from finetune.data.places import MANIFEST, PLAN

LIMIT_SEC = 30  # for a file that is read in 2 ms, on a machine with other work
GOOD_LINE = b'{"path": "%s", "duration": 0.5}'
GOOD_WORDS = b'{"alignments": [["he", [0.1, 0.3], "SPEAKER_MAIN"], ["was", [0.2, 0.4], "SPEAKER_USER"]]}'
FORMATS = {
    "a.wav": {},
    "b.wav": {"subtype": "FLOAT"},
    "c.wav": {"subtype": "PCM_U8"},
    "d.flac": {},
    "e.mp3": {"format": "MP3"},
    "f.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "g.opus": {"format": "OGG", "subtype": "OPUS"},
}
CONTAINERS = {"h.m4a": "aac", "i.mka": "flac"}
NAMES = sorted({**FORMATS, **CONTAINERS})


class Reader:
    """A process that reads data sets; a new one where the last has died."""

    def __init__(self):
        self.process = None

    def read(self, jsonl: Path) -> str:
        """What it answers. Unbuffered: select knows nothing of lines that wait in a buffer here."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "tests/read_recordings.py"],
                cwd=ROOT,
                # Where panics come from takes longer to print than all the rest.
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
            )
        self.process.stdin.write(f"{jsonl}\n".encode())
        printed = b""
        while not (found := re.search(rb"^(ok|ValueError).*\n", printed, re.MULTILINE)):
            ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_SEC)
            part = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                self.close()
                raise AssertionError(f"{'died' if ready else 'hangs'}: {printed[-2000:].decode()}")
            printed += part
        return found[0].decode()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """Bytes of half a second of speech in each format."""
    folder = tmp_path_factory.mktemp("good")
    for name, options in FORMATS.items():
        soundfile.write(folder / name, dialogue(4)[96000:108000], 24000, **options)
    for name, codec in CONTAINERS.items():
        write_container(folder / name, dialogue(4)[96000:108000], codec)
    return {name: (folder / name).read_bytes() for name in NAMES}


def spoilt(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes with some overwritten, taken out, put in or cut off, mostly near the start, where headers are."""
    place = st.one_of(st.integers(0, 60), st.integers(0, 400), st.integers(0, 50_000))
    numbers = st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\1\0\0\0"])
    data = st.one_of(st.binary(min_size=1, max_size=8), numbers)
    change = st.tuples(st.sampled_from(["write", "insert", "delete", "cut"]), place, data)

    def apply(original: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
        content = bytearray(original)
        for kind, at, data in changes:
            at %= len(content) + 1
            match kind:
                case "write":
                    content[at : at + len(data)] = data
                case "insert":
                    content[at:at] = data
                case "delete":
                    del content[at : at + 4 * len(data)]
                case "cut" if len(changes) == 1:
                    del content[at:]
        return bytes(content)

    return st.builds(apply, content, st.lists(change, min_size=1, max_size=6))


def fuzz(count: int):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # to make a file smaller that hangs takes hours
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def require_read_or_refused(reader: Reader, folder: Path, *files: tuple[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files:
        (folder / name).write_bytes(content)
    answers = reader.read(folder / "list.jsonl").strip().split(" | ")
    shutil.rmtree(folder)
    assert len(answers) >= 2
    for said in answers:
        assert said == "ok" or str(folder) in said, said


@fuzz(1100)
@given(data=st.data())
def test_audio(reader, good, tmp_path, data):
    name = data.draw(st.sampled_from(NAMES))
    audio = data.draw(spoilt(st.just(good[name])))
    line = GOOD_LINE % name.encode()
    files = ((name, audio), ("list.jsonl", line), (f"{name[0]}.json", GOOD_WORDS))
    require_read_or_refused(reader, tmp_path / "data", *files)


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just(10**400), st.just("a.wav")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
lines = st.one_of(
    spoilt(st.just(GOOD_LINE % b"a.wav")),
    st.builds(
        lambda path, duration: json.dumps({"path": path, "duration": duration}).encode(),
        st.one_of(json_values, st.just("a.wav")),
        st.one_of(json_values, st.just(0.5)),
    ),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    st.just(b"[" * 100_000),
)


@fuzz(550)
@given(lines=st.lists(lines, min_size=1, max_size=3))
def test_lines(reader, good, tmp_path, lines):
    files = (("a.wav", good["a.wav"]), ("a.json", GOOD_WORDS), ("list.jsonl", b"\n".join(lines)))
    require_read_or_refused(reader, tmp_path / "data", *files)


entries = st.one_of(
    json_values,
    st.builds(
        lambda word, start, end, speaker: [word, [start, end], speaker],
        *(st.one_of(st.text(), json_values), st.one_of(st.floats(-1, 1), json_values)),
        *(st.one_of(st.floats(-1, 1), json_values), st.one_of(st.text(), json_values)),
    ),
)
transcripts = st.one_of(
    spoilt(st.just(GOOD_WORDS)),
    st.lists(entries, max_size=4).map(lambda words: json.dumps({"alignments": words}).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
)


@fuzz(450)
@given(transcript=transcripts)
def test_transcripts(reader, good, tmp_path, transcript):
    files = (("a.wav", good["a.wav"]), ("a.json", transcript), ("list.jsonl", GOOD_LINE % b"a.wav"))
    require_read_or_refused(reader, tmp_path / "data", *files)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_base) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return run_prepare(folder / "whole", f"data.train={write_recordings(folder / 'audio')}")


PREPARED_FILES = ("shard_000001.safetensors", "index.safetensors", "sources.jsonl", MANIFEST, PLAN)


@fuzz(400)
@given(data=st.data())
def test_prepared_folders(reader, prepared, tmp_path, data):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(PREPARED_FILES))
    spoilt_file = data.draw(spoilt(st.just((folder / name).read_bytes())))
    if name in (MANIFEST, PLAN) and data.draw(st.booleans()):
        spoilt_file = json.dumps(spoilt_json(json.loads((folder / name).read_bytes()), data)).encode()
    (folder / name).write_bytes(spoilt_file)
    if name == PLAN:
        (folder / MANIFEST).unlink()  # with it the plan is not read
    answers = reader.read(folder).strip().split(" | ")
    shutil.rmtree(folder)
    assert len(answers) >= 2
    for said in answers:
        assert said == "ok" or str(folder) in said, said


def spoilt_json(content: dict, data: st.DataObject) -> dict:
    """With another value at one of its keys, or without that key."""
    name = data.draw(st.sampled_from(sorted(content)))
    if data.draw(st.booleans()):
        del content[name]
    else:
        content[name] = data.draw(json_values)
    return content


def test_the_prepared_folder_that_is_spoilt_here_is_good(reader, prepared):
    assert reader.read(prepared) == "ok | ok\n"


def test_the_files_that_are_spoilt_here_are_good(reader, good, tmp_path):
    for name, audio in good.items():
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(audio)
        (folder / f"{name[0]}.json").write_bytes(GOOD_WORDS)
        (folder / "list.jsonl").write_bytes(GOOD_LINE % name.encode())
        assert reader.read(folder / "list.jsonl") == "ok | ok\n"
