"""A sound card of software: a JACK server without a device, and a wire between it and a program's sound.

`python sound_card.py USER.npy HEARD.npy` is the wire: what it says is that program's microphone, what it
hears its loudspeaker. The card turns at 24 kHz in blocks of one frame, so nothing is resampled or cut
differently, and it waits for its programs (-S), so a busy machine loses nothing.
"""

import asyncio
import os
import shutil
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ctypes.util import find_library
from pathlib import Path

import numpy as np

RATE, BLOCK = 24000, 1920
_FOUND = {"jackd2": shutil.which("jackd"), "libportaudio2": find_library("portaudio")}
MISSING = [package for package, found in _FOUND.items() if found is None]
"""Debian packages of a sound card of software that are not on this machine."""


class SoundCard:
    """A card that turns.

    Args:
        environment: of programs that are to use it.
        folder: where the sound lies.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment = environment
        self._folder = folder
        self._wire: asyncio.subprocess.Process | None = None

    async def plug_in(self, user: np.ndarray) -> None:
        """From now on, a program that opens the card hears `user`, float32 `[n]`, and silence after it."""
        np.save(self._folder / "user.npy", user)
        self._wire = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, self._folder / "user.npy", self._folder / "heard.npy"),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._wire.stdout is not None
        assert await asyncio.wait_for(self._wire.stdout.readline(), 120) == b"ready\n"

    async def unplug(self) -> np.ndarray:
        """What the program played, in blocks `[n, 1920]`."""
        assert self._wire is not None
        if self._wire.returncode is None:
            self._wire.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(self._wire.wait(), 60) == 0
        return np.load(self._folder / "heard.npy")


@asynccontextmanager
async def sound_card(folder: Path) -> AsyncIterator[SoundCard]:
    """Turn a card, with its files in `folder`."""
    name = f"moshi-ttt-{uuid.uuid4().hex[:8]}"  # of shared memory and sockets: one machine may run many
    environment = os.environ | {"JACK_DEFAULT_SERVER": name, "JACK_NO_START_SERVER": "1"}
    with (folder / "jackd.log").open("wb") as log:
        jackd = await asyncio.create_subprocess_exec(
            *(
                "jackd",
                "-n",
                name,
                "-S",
                "-t",
                "10000",
                "-r",
                "-d",
                "dummy",
                "-r",
                str(RATE),
                "-p",
                str(BLOCK),
            ),
            env=environment | {"JACK_NO_AUDIO_RESERVATION": "1"},
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
        )
    card = SoundCard(environment, folder)
    try:
        yield card
    finally:
        for process in (card._wire, jackd):
            if process is not None and process.returncode is None:
                process.terminate()
                await process.wait()


def open_client():
    """The wire's end at the card, as soon as the card turns."""
    import jack  # loads the card's library, which not every machine has

    jack.set_error_function(lambda _: None)
    end = time.monotonic() + 20
    while True:
        try:
            return jack.Client("wire", no_start_server=True)
        except jack.JackOpenError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def wire(user: Path, heard: Path) -> None:
    """Be the wire until SIGTERM."""
    import jack

    client = open_client()
    mouth, ear = client.outports.register("mouth"), client.inports.register("ear")
    samples = np.load(user)
    blocks = deque(np.pad(samples, (0, -samples.shape[0] % BLOCK)).reshape(-1, BLOCK))
    played: list[np.ndarray] = []

    @client.set_process_callback
    def process(count: int) -> None:
        mouth.get_array()[:] = blocks.popleft() if blocks and mouth.connections else 0
        if ear.connections:
            played.append(ear.get_array().copy())

    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    with client:
        print("ready", flush=True)
        while not stop:
            # The name that PortAudio gives to its ends. They are there a little before they can be connected.
            with suppress(jack.JackErrorCode):
                for port in client.get_ports("PortAudio", is_input=True):
                    if not mouth.connections:
                        client.connect(mouth, port)
                for port in client.get_ports("PortAudio", is_output=True):
                    if not ear.connections:
                        client.connect(port, ear)
            time.sleep(0.01)
    np.save(heard, np.stack(played) if played else np.zeros((0, BLOCK), np.float32))


if __name__ == "__main__":
    wire(Path(sys.argv[1]), Path(sys.argv[2]))
