"""A checkpoint trained on a GPU answers there: one recording, many at once, and live."""

import json

import numpy as np
import pytest
import torch
from device_under_test import DEVICE
from live import Client, in_loop, live, speech
from test_batch import FRAME, LENGTHS, batch, read, recordings  # noqa: F401
from test_serve import alone, as_float, as_pcm
from training import SAMPLE, TINY, run_python

SHORT = ("ttt.mini_batch_size=5", "ttt.ttt_layer_context=7", "ttt.non_ttt_layer_context=9")


@pytest.fixture(scope="module")
def run_dir(private_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers") / "run"
    settings = dict(o.split("=", 1) for o in (*TINY, *SHORT))
    settings |= {"device": DEVICE.type, "run_dir": str(folder), "param_dtype": "float32"}
    run_python("-m", "finetune.train", *(f"{key}={value}" for key, value in settings.items()))
    return folder


@pytest.fixture(autouse=True)
def same_codes_in_every_batch():
    """No TF32, with which cuDNN rounds the codec's convolutions as the batch happens to be laid out."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def generate(run_dir, output):
    return run_python(
        *("-m", "inference.generate", f"checkpoint={run_dir}", f"output={output}", "sampling.seed=3"),
        *(f"input={SAMPLE / 'audio/dialogue_1.flac'}", "channel=1", f"device={DEVICE.type}"),
    )


def test_a_recording_is_answered_from_the_command_line_the_same_each_time(run_dir, tmp_path):
    printed = [generate(run_dir, tmp_path / f"{name}.wav") for name in "ab"]
    assert all("x real time" in text for text in printed)
    first, again = (read(tmp_path / f"{name}.wav") for name in "ab")
    assert np.array_equal(first, again)
    assert first.std() > 10
    words = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert words[0]["text"] == words[1]["text"] != ""


def test_recordings_answered_in_a_batch_are_those_answered_alone(run_dir, recordings, tmp_path):  # noqa: F811
    together = tmp_path / "together"
    assert batch(run_dir, [recordings], together, "slots=3", f"device={DEVICE.type}").failures == []
    for name in LENGTHS:
        one = tmp_path / name
        batch(run_dir, [recordings / name / "input.wav"], one, "slots=1", f"device={DEVICE.type}")
        (folder,) = (path.parent for path in one.rglob("meta.json"))
        assert json.loads((folder / "meta.json").read_text())["device"].startswith(DEVICE.type)
        for file in ("output.json", "text.json"):
            assert (folder / file).read_text() == (together / name / file).read_text()
        ours, other = read(together / name / "output.wav"), read(folder / "output.wav")
        assert np.abs(ours.astype(int) - other).max() <= 2
        assert ours.std() > 10


@in_loop
async def test_a_live_conversation_hears_what_the_model_says(run_dir):
    user = speech(30)
    async with (
        live(run_dir, slots=2, device=DEVICE.type) as server,
        server.chat("seed=7") as ws,
    ):
        heard = await Client(ws).talk(user)
    audio, text = alone(run_dir, as_float(user), 7, DEVICE)
    assert heard.text == text
    assert len(text) > 20
    assert np.abs(heard.pcm.astype(int) - as_pcm(audio)).max() <= 2
    assert heard.pcm.shape[0] == 30 * FRAME
    assert all(np.isfinite(list(flat(content))).all() for content in heard.metadata if "memory" in content)


def flat(value):
    """All numbers in nested mappings and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, (int, float)):
        yield value
