"""Reads data sets in a process of its own, which their files may kill or stop.

`nobody LIST` reads as a user without rights. Otherwise each line of stdin is a list or a prepared folder; the
answer is a line: ok, or what the ValueError says.
"""

import codecs
import os
import sys
from functools import partial
from pathlib import Path

from finetune.data.audio import read_samples
from finetune.data.bad_input import BadInput
from finetune.data.manifest import Rules, read_list, read_manifest
from finetune.data.prepared import PreparedRecordings, PreparedSet

NOBODY = 65534


def read_all(jsonl: Path, check_files: bool) -> None:
    for recording in read_list(jsonl, Rules(jsonl.parent, check_files), BadInput()):
        assert all(word.text is not None for word in recording.words or ())
        whole = read_samples(recording, 24000)
        crop = read_samples(recording, 24000, 0.16, 0.16)
        assert whole.shape[0] == crop.shape[0] == 2


def read_prepared(folder: Path) -> None:
    prepared = PreparedSet(folder)
    for recording in PreparedRecordings(prepared):
        assert recording.codes(0, 10**6).shape[0] == 16
        assert all(word.text is not None for word in recording.words or ())
        assert recording.path.name
    prepared.require("whole", 1.0, prepared.manifest["mimi_sha256"])


def answer(jsonl: Path) -> str:
    said = []
    ways = [partial(read_all, jsonl, check_files) for check_files in (True, False)]
    if jsonl.is_dir():
        ways = [partial(read_prepared, jsonl), lambda: PreparedSet(jsonl).verify()]
    for way in ways:
        try:
            way()
            said.append("ok")
        except ValueError as error:
            said.append(f"ValueError: {error!r}")
    return " | ".join(said)


if __name__ == "__main__":
    if sys.argv[1:2] == ["nobody"]:
        codecs.lookup("utf-8-sig")  # may lie where nobody can read
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        try:
            read_manifest(sys.argv[2])
        except ValueError as error:
            print(f"ValueError: {error}")
    else:
        for line in sys.stdin:
            print(answer(Path(line.strip())), flush=True)
