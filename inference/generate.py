"""`python -m inference.generate checkpoint=RUN input=question.wav output=answer.wav`"""

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from inference.enable_ttt_diagnostics import DiagnosticsFile, enable_ttt_diagnostics
from inference.rows import Sampling, StepWatch
from inference.session import restore_stream, save_session, session_identity
from inference.stream import (
    Answer,
    converse,
    open_stream,
    read_recording,
    write_wav,
)
from moshi_ttt.checkpoint import LoadedCheckpoint, load_checkpoint
from moshi_ttt.device import device_of_process
from moshi_ttt.finite_state import FiniteStateCheck
from moshi_ttt.integration import context_line, describe, ttt_layers
from moshi_ttt.loading import load_mimi, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class DiagnosticsConfig:
    """Records of what TTT does in each layer; their numbers are defined in moshi_ttt/diagnostics.py."""

    every_frames: int = 0
    """Frames between records, which go to the log. 0 means never; 100 costs less than 1 % of the time."""

    file: str | None = None
    """JSON-lines file for the records too, which `python -m evaluation.plot_diagnostics` draws."""


@dataclass
class InnerStateConfig:
    """What happens when the inner state of a TTT layer becomes NaN or infinite."""

    check_every_frames: int = 100
    """Frames between looks. 0 means never."""

    restart: bool = False
    """Go on from the learned inner weights, with empty attention windows. False stops with an error that
    names layer and frame."""


@dataclass
class GenerateConfig:
    """One answer to one recording."""

    checkpoint: str = MISSING
    """A run, a step or a consolidated folder. The model's settings come from it and from nowhere else."""

    input: str = MISSING
    """The user's recording: any format and rate that libsndfile reads."""

    output: str = MISSING
    """Moshi's answer, NAME.wav. NAME_stereo.wav (left Moshi, right user) and NAME.json (timed words)
    are written beside it."""

    channel: int | None = None
    """Channel of the input that is the user, from 0. None expects a mono file."""

    overwrite: bool = False
    """Replace outputs that exist."""

    sampling: Sampling = field(default_factory=Sampling)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    inner_state: InnerStateConfig = field(default_factory=InnerStateConfig)

    session_in: str | None = None
    """Go on with the conversation of this session file; `input` is what the user says next. Checkpoint,
    sampling and device are those that the session was saved with."""

    session_out: str | None = None
    """Do not end the conversation, but save it in this session file. The answer then ends with the last
    frame that is complete; the rest comes with the part that follows."""

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""


ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


def output_files(output: str) -> tuple[Path, Path, Path]:
    """Paths of the answer, the stereo recording and the words.

    Raises:
        ValueError: the output is not named .wav.
    """
    path = Path(output).expanduser()
    if path.suffix != ".wav":
        raise ValueError(f"output must be named .wav, got {output}")
    return path, path.with_name(f"{path.stem}_stereo.wav"), path.with_suffix(".json")


def choose_device(device: str) -> torch.device:
    """The device that a config's word means: of several GPUs that of this process on its node (LOCAL_RANK).

    Raises:
        ValueError: an unknown device, cuda where there is none, or more processes than GPUs.
    """
    return device_of_process(device, int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())


def diagnostics_file(config: DiagnosticsConfig) -> tuple[Path, ...]:
    """The file that records go to, if any.

    Raises:
        ValueError: settings that cannot work together.
    """
    if config.every_frames < 0:
        raise ValueError(f"diagnostics.every_frames must be 0 (never) or more, got {config.every_frames}")
    if config.file is None:
        return ()
    if config.every_frames == 0:
        raise ValueError(
            f"diagnostics.file={config.file}, but diagnostics.every_frames=0 records nothing; set "
            "diagnostics.every_frames=100"
        )
    return (Path(config.file).expanduser(),)


def step_watches(config: GenerateConfig, loaded: LoadedCheckpoint, frame_rate: float) -> list[StepWatch]:
    """Diagnostics and the check of the inner state, as the config asks for."""
    watches: list[StepWatch] = []
    if config.diagnostics.every_frames > 0:
        about = {
            "checkpoint": str(loaded.folder),
            "step": loaded.manifest["step"],
            "input": config.input,
            "frame_rate": frame_rate,
        }
        files = [DiagnosticsFile(path, about) for path in diagnostics_file(config.diagnostics)]
        every = config.diagnostics.every_frames
        watches.append(enable_ttt_diagnostics(loaded.model, every, file=files[0] if files else None))
    if config.inner_state.check_every_frames != 0 and ttt_layers(loaded.model):
        check = config.inner_state
        action = "restart" if check.restart else "stop"
        watches.append(FiniteStateCheck(loaded.model, check.check_every_frames, action))
    return watches


def generate(config: GenerateConfig) -> Answer:
    """Restore the checkpoint, answer the input, write the files."""
    files = output_files(config.output)
    session_out = None if config.session_out is None else Path(config.session_out).expanduser()
    written = files if session_out is None else (*files, session_out)
    written += diagnostics_file(config.diagnostics)
    existing = [str(path) for path in written if path.exists()]
    if existing and not config.overwrite:
        raise ValueError(f"{', '.join(existing)} exists; choose another output or set overwrite=true")
    device = choose_device(config.device)
    loaded = load_checkpoint(config.checkpoint, device, config.verify)
    mimi = load_mimi(loaded.base, device)
    recording = read_recording(config.input, mimi.sample_rate, config.channel)
    logger.info("checkpoint: %s, step %d", loaded.folder, loaded.manifest["step"])
    logger.info("%s", context_line(loaded.model, inference=True))
    logger.info("live layers:\n%s", describe(loaded.model))
    tokenizer = load_tokenizer(loaded.base)
    identity = session_identity(loaded, config.sampling)
    started = time.perf_counter()
    watches = step_watches(config, loaded, mimi.frame_rate)
    with open_stream(loaded.model, mimi, config.sampling, watches) as stream:
        if config.session_in is not None:
            restore_stream(config.session_in, stream, identity)
        start_sec = stream.answered / mimi.frame_rate
        result = converse(stream, tokenizer, recording, session_out is None, progress=True)
        if result.frames == 0:
            raise ValueError(f"input {config.input} is shorter than a frame; give more of it at once")
        if session_out is not None:
            save_session(session_out, stream, identity)
    elapsed = time.perf_counter() - started
    _write(files, result, start_sec, mimi.sample_rate, config, loaded)
    seconds = recording.shape[0] / mimi.sample_rate
    logger.info("answered %.2f s in %.2f s (%.2f x real time)", seconds, elapsed, seconds / elapsed)
    logger.info("Moshi: %s", result.text or "(no words)")
    logger.info("wrote %s", ", ".join(map(str, written)))
    return result


def _write(
    files: tuple[Path, Path, Path],
    result: Answer,
    start_sec: float,
    sample_rate: int,
    config: GenerateConfig,
    loaded: LoadedCheckpoint,
) -> None:
    mono, stereo, words = files
    write_wav(mono, [result.audio], sample_rate)
    write_wav(stereo, [result.audio, result.user], sample_rate)
    content = {
        "text": result.text,
        "words": [asdict(word) for word in result.words],
        "frames": result.frames,
        "start_sec": start_sec,
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest["step"],
        "sampling": asdict(config.sampling),
    }
    words.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="generate")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    generate(typed_config(config, GenerateConfig))


if __name__ == "__main__":
    main()
