"""Conversations that last: `python -m benchmarks.serve_soak [MINUTES] [CONVERSATIONS]`

Four conversations of 30 minutes of speech each on a live server with the tiny model, faster than real time:
each client, two with Opus and two with plain samples, says its next frame when the answer to an earlier one
has come. Server and clients are one process, whose memory is looked at. Written are the median step time and
the memory of every minute of audio, and what was dropped.
"""

import asyncio
import json
import logging
import platform
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import sphn
import torch
from aiohttp import web
from prometheus_client import Histogram
from tqdm import tqdm

from benchmarks.long_stream import resident_mib, speech, tiny_parts
from inference.live.access import Access
from inference.live.application import Server, Settings
from inference.live.engine import Engine
from inference.live.limits import LimitsConfig
from inference.live.metrics import Metrics
from inference.live.protocol import AUDIO, PCM
from inference.live.routes import application
from inference.rows import Sampling

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).with_name("results")
FRAMES_PER_MINUTE = 750
AHEAD = 3
"""Frames that a client is ahead of its answers."""


@dataclass
class Steps:
    """Stands where the server's histogram of step times is, and keeps them all.

    Args:
        histogram: which goes on.
        wall: seconds of each step.
        cpu: of the model's thread, from one step's end to the next.
    """

    histogram: Histogram
    wall: array = field(default_factory=lambda: array("d"))
    cpu: array = field(default_factory=lambda: array("d"))
    before: float = 0.0

    def observe(self, seconds: float) -> None:
        self.histogram.observe(seconds)
        now = time.thread_time()
        self.wall.append(seconds)
        self.cpu.append(now - self.before)
        self.before = now


@dataclass
class Minute:
    """A minute of audio: median step in ms of wall clock and of the thread's CPU, and memory at its end."""

    step_ms: float
    step_cpu_ms: float
    memory_mib: float


def build(conversations: int) -> tuple[Server, Steps]:
    """A server around the tiny model."""
    model, mimi, tokenizer = tiny_parts()
    metrics = Metrics(conversations)
    steps = Steps(metrics.steps)
    metrics.steps = steps  # type: ignore[assignment]
    engine = Engine(model, mimi, Sampling(), conversations, 100, metrics)
    limits = LimitsConfig(messages_per_sec=1e6, session_sec=1e6)
    settings = Settings(limits, {}, None, 6, False, conversations)
    return Server(engine, tokenizer, Access(None), None, settings, metrics), steps


async def client(http: aiohttp.ClientSession, url: str, number: int, frames: int, bar: tqdm) -> None:
    """One conversation to its end."""
    opus = number % 2 == 0
    kind, writer, reader = AUDIO if opus else PCM, sphn.OpusStreamWriter(24000), sphn.OpusStreamReader(24000)
    said, heard, source = 0, 0.0, speech(number)
    async with http.ws_connect(f"{url}/api/chat?metadata=1&audio={'opus' if opus else 'pcm'}") as ws:
        while heard < frames:
            while said < frames and said - heard < AHEAD:
                samples, said = next(source), said + 1
                payload = writer.append_pcm(samples) if opus else (samples * 32768).astype("<i2").tobytes()
                await ws.send_bytes(bytes([kind]) + payload)
            message = await ws.receive(timeout=60)
            assert message.type == aiohttp.WSMsgType.BINARY, message
            if message.data[0] == kind:
                payload = message.data[1:]
                heard += (reader.append_bytes(payload).shape[0] if opus else len(payload) / 2) / 1920
                bar.update()


async def minutes(steps: Steps, count: int) -> list[Minute]:
    """Look at each minute of audio as it ends."""
    found: list[Minute] = []
    while len(found) < count:
        await asyncio.sleep(0.2)
        start, end = len(found) * FRAMES_PER_MINUTE, (len(found) + 1) * FRAMES_PER_MINUTE
        # The conversations begin one after the other, so that their steps are a few more than their frames.
        if len(steps.wall) >= end:
            wall, cpu = (1000 * median(times[start:end]) for times in (steps.wall, steps.cpu))
            found.append(Minute(round(wall, 3), round(cpu, 3), round(resident_mib(), 2)))
    return found


async def soak(count: int, conversations: int) -> dict[str, Any]:
    """Run it all."""
    server, steps = build(conversations)
    await server.engine.start()
    steps.before = 0.0
    driver = asyncio.create_task(server.engine.run())
    runner = web.AppRunner(application(server), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    frames, started = count * FRAMES_PER_MINUTE, time.perf_counter()
    async with aiohttp.ClientSession() as http:
        with tqdm(total=frames * conversations, unit="frame", disable=None) as bar:
            looking = asyncio.create_task(minutes(steps, count))
            await asyncio.gather(*(client(http, url, number, frames, bar) for number in range(conversations)))
            found = await looking
    elapsed = time.perf_counter() - started
    await server.say_goodbye()
    await runner.cleanup()
    driver.cancel()
    with suppress(asyncio.CancelledError):
        await driver
    await server.engine.close()
    return {"minutes": [vars(minute) for minute in found]} | verdict(found, server, elapsed, frames)


def verdict(found: list[Minute], server: Server, elapsed: float, frames: int) -> dict[str, Any]:
    """First minute against last, and what was lost."""
    dropped = sum(
        sample.value
        for metric in server.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "moshi_ttt_frames_dropped_total"
    )
    # The first minute fills caches; from its end on memory must stand still.
    memory = [minute.memory_mib for minute in found]
    return {
        "real_time_factor": round(frames * 0.08 / elapsed, 2),
        "dropped_frames": dropped,
        "memory_last_over_first": round(memory[-1] / memory[0], 4),
        "memory_most_over_first": round(max(memory) / memory[0], 4),
        "step_last_over_first": round(found[-1].step_ms / found[0].step_ms, 3),
        "step_cpu_last_over_first": round(found[-1].step_cpu_ms / found[0].step_cpu_ms, 3),
    }


def main(arguments: Iterator[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    count, conversations = int(next(arguments, "30")), int(next(arguments, "4"))
    found = {"minutes_of_audio": count, "conversations": conversations}
    found |= {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    found |= asyncio.run(soak(count, conversations))
    path = RESULTS / f"serve_soak_{conversations}x{count}min.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    shown = {key: value for key, value in found.items() if key != "minutes"}
    logger.info("%s\nwrote %s", json.dumps(shown, indent=1), path)


if __name__ == "__main__":
    main(iter(sys.argv[1:]))
