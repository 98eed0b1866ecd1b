"""Moshi's own client, `python -m moshi.client`, talks to a live server through a sound card of software."""

import asyncio
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from live import (
    FRAME,
    alone,
    as_float,
    certificate,
    each_alone,
    in_loop,
    live,
    short_run,
    speech,
    started,
    through_opus,
)
from sound_card import MISSING, SoundCard, sound_card

from inference.live.access import Access

TOKEN = "correct-horse-battery"

pytestmark = pytest.mark.skipif(
    MISSING != [], reason=f"no sound card of software here (Debian packages: {' '.join(MISSING)})"
)


@pytest.fixture(scope="module")
def checkpoint(private_cache, tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("client"))


def hear_sigint() -> None:
    """A script that starts the tests in the background lets all that they start ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@asynccontextmanager
async def moshi_client(card: SoundCard, url: str, **environment: str):
    """`python -m moshi.client`, whose stdout is Moshi's text and whose stderr what it tells besides."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moshi.client", "--url", url),
        env=card.environment | {"PYTHONIOENCODING": "utf-8"} | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=hear_sigint,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: asyncio.subprocess.Process, printed: bytes = b"") -> tuple[str, str]:
    """All that a client printed and told, which has ended in order."""
    rest, errors = await asyncio.wait_for(process.communicate(), 120)
    told = errors.decode()
    assert process.returncode == 0, told
    assert told.endswith("Info: All done!\n")
    # Its microphone goes on for a moment after it has left.
    return (printed + rest).decode().replace("Cannot write to closing transport\n", ""), told


async def frames_of(server) -> float:
    """Frames that a server has heard."""
    for line in (await server.metrics()).splitlines():
        if line.startswith("moshi_ttt_frames_total"):
            return float(line.split()[1])
    raise AssertionError("no frames are counted")


def blocks_of(samples: np.ndarray) -> np.ndarray:
    """Whole blocks `[n, 1920]` that are not silence, which the client plays whenever it waits."""
    blocks = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    return blocks[np.abs(blocks).max(1) > 0]


def assert_answered(checkpoint: Path, user: np.ndarray, text: str, played: np.ndarray) -> None:
    """Text and loudspeaker are those of the model alone that hears the user, to the bit."""
    blocks = blocks_of(played.reshape(-1))
    assert len(blocks) > 30
    # The user was plugged in a little before or after the client listened.
    starts = sorted(range(-20, 61), key=abs)
    silence = np.zeros(60 * FRAME, np.float32)
    samples = [np.concatenate((silence, user))[(60 - start) * FRAME :] for start in starts]
    begun = each_alone(checkpoint, (through_opus(heard[: 20 * FRAME]) for heard in samples), 3)
    for heard, (audio, _) in zip(samples, begun, strict=True):
        expected = blocks_of(through_opus(audio))
        if np.array_equal(blocks[: len(expected)], expected):
            audio, said = alone(checkpoint, through_opus(heard), 3)
            break
    else:
        raise AssertionError("what was played is no answer to what was said")
    assert np.array_equal(blocks, blocks_of(through_opus(audio))[: len(blocks)])
    assert said.startswith(text)
    assert len(text) > 10


@in_loop
async def test_moshis_client_talks_through_a_sound_card_and_leaves(checkpoint, tmp_path):
    user = as_float(speech(60))
    # A busy machine is late, and loses nothing.
    patient = {"limits": {"late_sec": 60.0, "messages_per_sec": 1000.0}}
    async with (
        sound_card(tmp_path) as card,
        live(checkpoint, Access(TOKEN), slots=1, seed=3, **patient) as server,
    ):
        server.http.headers["Authorization"] = f"Bearer {TOKEN}"
        await card.plug_in(user)
        url = server.url.replace("//", f"//any:{TOKEN}@")
        async with moshi_client(card, url) as process:
            async with asyncio.timeout(180):
                while await frames_of(server) < 45:
                    await asyncio.sleep(0.1)
            process.send_signal(signal.SIGINT)
            text, told = await ended(process)
        await server.until_free()
        played = await card.unplug()
        metrics = await server.metrics()
    assert "Info: connected!" in told
    assert "unknown message kind 0" in told  # the handshake, which this client does not know
    assert "unknown message kind 4" not in told
    assert "Interrupting, exiting connection." in told
    assert 'frames_dropped_total{direction="in"} 0.0' in metrics
    assert "malformed_messages_total 0.0" in metrics
    assert_answered(checkpoint, user, text, played)


@in_loop
async def test_moshis_client_ends_in_order_when_a_server_with_a_certificate_stops(checkpoint, tmp_path):
    tls = certificate(tmp_path / "tls")
    (tmp_path / "token").write_text(TOKEN)
    settings = (f"tls={tls}", f"token_file={tmp_path / 'token'}", "slots=1", "limits.late_sec=60")
    trust = {"SSL_CERT_FILE": str(tls / "cert.pem")}
    async with sound_card(tmp_path) as card, started(checkpoint, *settings) as (server, url):
        await card.plug_in(as_float(speech(20)))
        async with moshi_client(card, url.replace("//", f"//any:{TOKEN}@"), **trust) as process:
            assert process.stdout is not None
            first = await asyncio.wait_for(process.stdout.read(1), 180)
            server.send_signal(signal.SIGTERM)
            text, told = await ended(process, first)
        assert server.stdout is not None
        printed = (await server.stdout.read()).decode()
        assert await asyncio.wait_for(server.wait(), 60) == 0
    assert text
    assert "Interrupting" not in told
    assert "the server stops; goodbye" in printed
    assert TOKEN not in printed
