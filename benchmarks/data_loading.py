"""How fast training data comes, and in how much memory.

A prepared folder of 20 hours is made up: recordings of 10 minutes, random codes, 2.5 words a second (1,000
hours go as fast: `entries(Options(), hours=1000)`). From it, batches of 16 clips of 100 s in random order,
and of 16 rows of chunks, are read by one thread, in a process of its own whose memory is looked at. For
comparison the same process decodes the sample's audio, and encodes it with the tiny Mimi and with one of
Kyutai's size (random weights: they do not change the time). Frames are of both speakers; a page cache that
holds the corpus is assumed, as after the first epoch.
"""

import hashlib
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.loaders import get_mimi

from benchmarks.harness import ROOT, Entry, Options, device_name
from finetune.data.audio import read_samples
from finetune.data.batches import Batches, chunk_batches, training_batches
from finetune.data.chunks import ChunkEncoder
from finetune.data.clips import ClipEncoder, PreparedClips
from finetune.data.codec import encode_whole
from finetune.data.interleaver import TextLayout, TextTokens
from finetune.data.join import join
from finetune.data.manifest import Word, read_manifest
from finetune.data.order import Sampling
from finetune.data.places import PLAN
from finetune.data.plan import Plan
from finetune.data.prepared import WHOLE, PreparedSet, shard_name
from finetune.data.shard import Encoded, shard_bytes
from moshi_ttt.loading import ModelConfig, find_base, load_mimi, load_tokenizer

HOURS, GOAL = 20, 500.0
RECORDING_SEC, CLIP_SEC, ROWS, FRAME_RATE = 600, 100.0, 16, 12.5
VOCABULARY = ("so", "then", "the captain", "wondered", "about", "a ship", "and", "never", "came", "back")


def make_corpus(folder: Path, hours: int) -> None:
    """A prepared folder of so many hours, a shard an hour."""
    folder.mkdir()
    per_shard = 3600 // RECORDING_SEC
    plan = Plan(WHOLE, None, 1.0, "made up", "cpu", per_shard * hours, hours, "made up", 125)
    (folder / PLAN).write_text(json.dumps(asdict(plan)))
    words = [
        Word(VOCABULARY[n % 10], 0.4 * n, 0.4 * n + 0.3, f"SPEAKER_{'MAIN' if n // 20 % 2 else 'USER'}")
        for n in range(round(RECORDING_SEC / 0.4))
    ]
    generator = torch.Generator().manual_seed(hours)
    frames = round(RECORDING_SEC * FRAME_RATE)
    for shard in range(hours):
        codes = torch.randint(0, 2048, (per_shard, 16, frames), generator=generator, dtype=torch.int16)
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        sources = [
            {"number": n, "path": f"{n}.flac", "sha256": hashlib.sha256(str(n).encode()).hexdigest()}
            | {"duration_sec": float(RECORDING_SEC)}
            for n in numbers
        ]
        about = {"plan_sha256": plan.sha256, "shard": shard, "sources": sources}
        content = shard_bytes([Encoded([one], words) for one in codes], about)
        (folder / shard_name(shard)).write_bytes(content)
    join(folder)


def memory_mib() -> dict[str, float]:
    """Memory of this process: its own, and pages of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: round(int(fields[name].split()[0]) / 1024, 1) for name in ("RssAnon", "RssFile")}


def rate_of(batches: Batches, count: int) -> float:
    """Frames per second of this process's CPU time; some batches are read before."""
    for _ in range(5):
        next(batches)
    started = time.process_time()
    frames = 0
    for _ in range(count):
        codes = next(batches).codes
        frames += codes.shape[0] * codes.shape[2]
    return frames / (time.process_time() - started)


def text_encoder(duration_sec: float) -> ClipEncoder:
    base = find_base(ModelConfig("tiny"))
    special = TextTokens(3, 0, -1)
    return ClipEncoder(load_mimi(base, "cpu"), load_tokenizer(base), special, duration_sec, TextLayout())


def read_corpus(folder: Path, batches: int) -> dict[str, Any]:
    """Rates and memory of reading a corpus."""
    torch.set_num_threads(1)
    encoder = ChunkEncoder(text_encoder(CLIP_SEC))
    before = memory_mib()
    started = time.perf_counter()
    clips = PreparedClips(PreparedSet(folder), CLIP_SEC)
    opened = time.perf_counter() - started
    result: dict[str, Any] = {
        "hours": clips.prepared.manifest["hours"],
        "open_sec": round(opened, 3),
        "clips_frames_per_s": round(rate_of(training_batches(encoder, clips, Sampling(ROWS, 0)), batches)),
        "chunks_frames_per_s": round(rate_of(chunk_batches(encoder, clips, 1, Sampling(ROWS, 0)), batches)),
    }
    after = memory_mib()
    grown = {name: round(after[name] - before[name], 1) for name in after}
    return result | {"frames_read": 2 * batches * ROWS * round(CLIP_SEC * FRAME_RATE), "grown_mib": grown}


def kyutai_sized_mimi() -> MimiModel:
    torch.manual_seed(0)
    mimi = get_mimi(None, device="cpu")
    return mimi.requires_grad_(False).eval()


def audio_rates() -> dict[str, float]:
    """Frames per second of CPU time of decoding the sample and of encoding it."""
    recordings = read_manifest(ROOT / "sample_data/train.jsonl")
    frames = sum(recording.duration_sec for recording in recordings) * FRAME_RATE

    def rate(work: Callable[[], Any]) -> float:
        started = time.process_time()
        work()
        return frames / (time.process_time() - started)

    audio = [read_samples(recording, 24000) for recording in recordings]
    rates = {"decoding": rate(lambda: [read_samples(recording, 24000) for recording in recordings])}
    mimis = {"tiny Mimi": load_mimi(find_base(ModelConfig("tiny")), "cpu"), "Mimi": kyutai_sized_mimi()}
    for name, mimi in mimis.items():
        rates[name] = rate(lambda mimi=mimi: [encode_whole(mimi, [one]) for one in audio])
    return {name: round(value, 1) for name, value in rates.items()}


def measure(folder: Path, batches: int, results: Any) -> None:
    """The work of a process."""
    results.put(read_corpus(folder, batches) | {"audio_frames_per_s": audio_rates()})


def entries(options: Options, hours: int = HOURS) -> list[Entry]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    folder = Path(tempfile.mkdtemp(prefix="data_loading_"))
    try:
        make_corpus(folder / "prepared", hours)
        process = context.Process(target=measure, args=(folder / "prepared", 100, results))
        process.start()
        found = results.get()
        process.join()
    finally:
        shutil.rmtree(folder)
    slowest = min(found["clips_frames_per_s"], found["chunks_frames_per_s"])
    audio = found["audio_frames_per_s"]
    encoded = 1 / (1 / audio["decoding"] + 1 / audio["Mimi"])
    name, what = "frames read from a prepared folder", "decoding and encoding with Mimi of Kyutai's size"
    ratio = round(slowest / encoded)
    return [Entry(name, ratio, GOAL, "frames/CPU s", slowest, round(encoded, 1), what, device_name(1), found)]
