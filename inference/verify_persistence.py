"""`python -m inference.verify_persistence checkpoint=RUN`: do a checkpoint's TTT layers remember?

Exit codes: 0 all TTT layers persist; 2 at least one does not; 1 an error, so that nothing was verified.
"""

import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.utils.compile import no_cuda_graph
from omegaconf import MISSING, DictConfig

from configs.typed import typed_config
from inference.generate import choose_device
from inference.rows import Sampling
from inference.stream import open_stream, read_recording
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.integration import context_line
from moshi_ttt.loading import load_mimi
from moshi_ttt.persistence import enable_ttt_persistence_logging
from moshi_ttt.verdict import LayerVerdict, PersistenceProbe, Verdict, verdict_table

logger = logging.getLogger(__name__)

MAX_SECONDS = 30.0
NOT_ALL_PERSIST = 2

_SAMPLE = Path(__file__).parents[1] / "sample_data/audio/dialogue_1.flac"


@dataclass
class VerifyPersistenceConfig:
    """Which checkpoint, on which recording."""

    checkpoint: str = MISSING
    """A run, a step or a consolidated folder."""

    input: str | None = None
    """A recording of the user, of any format and rate that libsndfile reads. None takes a dialogue of
    sample_data/, where this runs in a checkout."""

    channel: int | None = None
    """Channel of the input that is the user, from 0. None expects a mono file."""

    seconds: float = MAX_SECONDS
    """Length of the beginning of the recording that is heard, 30 at most."""

    log_every_frames: int = 0
    """Also log hashes and changes of the effective weights every so many frames; 0 means never."""

    sampling: Sampling = field(default_factory=Sampling)

    device: str = "auto"
    """cuda, cpu, or auto: cuda where there is one."""

    verify: str = "cached"
    """full reads the base model's files again to check their SHA-256; cached trusts what is remembered."""


ConfigStore.instance().store(name="verify_persistence_schema", node=VerifyPersistenceConfig)


def find_recording(config: VerifyPersistenceConfig) -> tuple[Path, int | None]:
    """File and channel to listen to.

    Raises:
        ValueError: none is given and there is no checkout, or the length is out of range.
    """
    if not 0 < config.seconds <= MAX_SECONDS:
        raise ValueError(f"seconds must be above 0 and at most {MAX_SECONDS:g}, got {config.seconds:g}")
    if config.log_every_frames < 0:
        raise ValueError(f"log_every_frames must be 0 (never) or more, got {config.log_every_frames}")
    if config.input is not None:
        return Path(config.input), config.channel
    if not _SAMPLE.is_file():
        raise ValueError(f"missing input: {_SAMPLE} does not exist here; give a recording as input=FILE.wav")
    return _SAMPLE, 1


def stream_verdicts(
    model: LMModel, mimi: MimiModel, recording: torch.Tensor, sampling: Sampling, log_every_frames: int = 0
) -> list[LayerVerdict]:
    """Let the model hear a recording `[n]` at Mimi's rate, and judge each of its TTT layers."""
    logs = enable_ttt_persistence_logging(model, log_every_frames) if log_every_frames else nullcontext()
    # Hooks do not run in captured graphs.
    with (
        no_cuda_graph(),
        logs,
        PersistenceProbe(model) as probe,
        open_stream(model, mimi, sampling) as stream,
    ):
        for _ in stream.hear(recording):
            pass
        return probe.verdicts()


def verify_persistence(config: VerifyPersistenceConfig) -> list[LayerVerdict]:
    """Restore the checkpoint, let it hear the recording, and print a verdict for each TTT layer."""
    path, channel = find_recording(config)
    device = choose_device(config.device)
    loaded = load_checkpoint(config.checkpoint, device, config.verify)
    mimi = load_mimi(loaded.base, device)
    recording = read_recording(path, mimi.sample_rate, channel)[: int(config.seconds * mimi.sample_rate)]
    logger.info("checkpoint: %s, step %d", loaded.folder, loaded.manifest["step"])
    logger.info("%s", context_line(loaded.model, inference=True))
    logger.info("hearing %.2f s of %s", recording.shape[0] / mimi.sample_rate, path)
    verdicts = stream_verdicts(loaded.model, mimi, recording, config.sampling, config.log_every_frames)
    print(verdict_table(verdicts))
    return verdicts


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="verify_persistence")
def main(config: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    verdicts = verify_persistence(typed_config(config, VerifyPersistenceConfig))
    if any(v.verdict is not Verdict.PERSISTS for v in verdicts):
        sys.exit(NOT_ALL_PERSIST)


if __name__ == "__main__":
    main()
