"""`python -m finetune.train experiment=demo run_dir=runs/demo`, the same under torchrun."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from finetune.config import TrainConfig, register, to_typed
from finetune.data.bad_input import BadInput
from finetune.data.batches import Batches, chunk_batches, training_batches
from finetune.data.chunks import ChunkEncoder
from finetune.data.clip_sources import ClipSource, joined, mixed, read_clip_sources, recordings_in
from finetune.data.clips import Clip, ClipEncoder, Encoder, PreparedClips
from finetune.data.interleaver import TextTokens
from finetune.data.order import Sampling
from finetune.data.prepared import WHOLE, PreparedSet
from finetune.distributed import Process, share, start, stop, tell_lost, wait_for_all
from finetune.evaluations import Subject, make_evaluations
from finetune.loss import LossModel
from finetune.persistence import GIB, available_bytes, refuse_oversized
from finetune.plot import plot_losses
from finetune.resume import find_resume_point
from finetune.run_dir import Metrics, RunLog, create_run_dir, go_back, start_logging
from finetune.sharded_build import build_sharded
from finetune.sharding import make_mesh
from finetune.signals import STOPPED, StoppedBySignal, StopRequests, ask_for_requeue, refuse_restart
from finetune.trainer import Parts, Trainer
from inference.stream import read_recording
from moshi_ttt.building import WeightFiles, build_model
from moshi_ttt.digest import cached_sha256
from moshi_ttt.integration import context_line, describe, verify_contexts, verify_ttt_layers
from moshi_ttt.loading import find_base, load_mimi, load_tokenizer
from moshi_ttt.parameters import set_trainable
from moshi_ttt.warm_start import find_warm_start

logger = logging.getLogger(__name__)


def read_clips(config: TrainConfig, bad_input: BadInput) -> tuple[list[ClipSource], Sequence[Clip]]:
    """Training and validation clips; every file is checked before anything is built or written."""

    def require(prepared: PreparedSet) -> None:
        mimi = find_base(config.settings.model).mimi_weights
        prepared.require(config.encode, config.duration_sec, cached_sha256(Path(mimi)))

    def read(spec: str) -> list[ClipSource]:
        return read_clip_sources(spec, config.data.sources, bad_input, config.duration_sec, require)

    train = read(config.data.train)
    valid = [] if config.data.valid is None else joined(read(config.data.valid))
    return train, valid if config.eval.max_clips is None else valid[: config.eval.max_clips]


def build_parts(
    config: TrainConfig, valid_clips: Sequence[Clip], process: Process, bad_input: BadInput | None = None
) -> Parts:
    """Load or make everything that a run needs, and choose what trains."""
    settings = config.settings
    base = find_base(settings.model)
    weights = WeightFiles()
    if config.init_from is not None:
        warm = find_warm_start(config.init_from, settings)
        logger.info("initial weights: %s", warm.description)
        weights = warm.weights
    torch.manual_seed(config.seed)  # new LoRA and TTT weights are the same in every process
    mesh = make_mesh(config.fsdp, process)
    sharded = None
    if mesh is None:
        loss_model = LossModel(build_model(settings, base, process.device, weights), config.running)
        counts = set_trainable(loss_model.lm, config.mode)
    else:
        sharded = build_sharded(settings, base, weights, config.mode, process, mesh, config.fsdp)
        loss_model, counts = sharded.root, sharded.trained
        loss_model.running = config.running
    model = loss_model.lm
    verify_ttt_layers(model, settings.ttt)
    verify_contexts(model, settings.ttt)
    logger.info("%s", context_line(model))
    total = sum(p.numel() for p in model.parameters())
    trained = ", ".join(f"{group} {count:,}" for group, count in counts.items()) or "nothing"
    logger.info("mode %s trains %s of %s parameters", config.mode, trained, f"{total:,}")
    if config.ttt.persistent_states:
        limit = available_bytes(process.device)
        if config.max_carried_gib is not None:
            limit = int(config.max_carried_gib * GIB)
        refuse_oversized(model, config.batch_size, config.num_microbatches, limit)
    mimi = load_mimi(base, process.device)
    tokenizer = load_tokenizer(base)
    encoder = ClipEncoder(
        mimi,
        tokenizer,
        TextTokens.of(model),
        config.duration_sec,
        config.data.layout,
        bad_input,
    )
    prompt = None
    if config.eval.prompt is not None:
        prompt = read_recording(config.eval.prompt, mimi.sample_rate)
    save_base = config.mode == "full" or weights.base is not None
    evaluations = make_evaluations(config.evaluations)
    subject = Subject(model, base, mimi, tokenizer, 0, Path(config.run_dir))
    for scheduled in evaluations:
        scheduled.evaluation.check(subject)
    return Parts(
        loss_model, base, mimi, tokenizer, encoder, valid_clips, prompt, save_base, sharded, evaluations
    )


def make_batches(
    config: TrainConfig, encoder: ClipEncoder, sources: Sequence[ClipSource], process: Process
) -> Batches:
    """This process's batches without end: clips in any order, or recordings chunk by chunk."""
    clips, carried = joined(sources), config.ttt.persistent_states
    mix = mixed(sources, config.seed, config.data.shuffle, by_recording=carried)
    order = (config.seed, config.data.shuffle, process.rank, process.world_size, mix)
    sampling = Sampling(config.batch_size, *order)
    # A step takes all its micro-batches at once; those of the next are read while it computes.
    workers = config.data.workers if all(isinstance(s.clips, PreparedClips) for s in sources) else 0
    ahead = config.num_microbatches + 1
    if carried:
        chunks = ChunkEncoder(encoder)
        logger.info(
            "persistent states: %d recordings in %d chunks of %d frames",
            sum(recordings_in(source.clips) for source in sources),
            len(clips),
            chunks.num_frames,
        )
        return chunk_batches(chunks, clips, config.num_microbatches, sampling, workers, ahead)
    source: Encoder = ChunkEncoder(encoder) if config.encode == WHOLE else encoder
    return training_batches(source, clips, sampling, workers, ahead)


def train(config: TrainConfig, process: Process) -> Path:
    """Run a config from start, or from where it was stopped, to end; returns the run directory.

    Raises:
        StoppedBySignal: SIGTERM or SIGUSR1 asked for it; a checkpoint to go on from is saved.
    """
    start_logging(process.is_main)
    run_dir = Path(config.run_dir).expanduser()
    with RunLog() as log, StopRequests() as stop:
        refusal = share(refuse_restart(run_dir) if process.is_main else None, process)
        if refusal is not None:
            raise StoppedBySignal(refusal)
        point, damaged = find_resume_point(config, process)
        bad_input = BadInput(config.data.on_error, config.data.max_error_fraction)
        train_sources, valid_clips = read_clips(config, bad_input)
        built = config if point is None else replace(config, init_from=str(point.weights))
        parts = build_parts(built, valid_clips, process, bad_input)
        metrics = None
        layers = describe(parts.model)
        wait_for_all(process)  # nobody still looks whether the run directory exists
        if process.is_main:
            if run_dir.exists():
                go_back(run_dir, 0 if point is None else point.step, damaged)
            create_run_dir(config)
            log.open(run_dir / "train.log")
            num_clips = sum(len(source.clips) for source in train_sources)
            logger.info("%d training clips, %d validation clips", num_clips, len(valid_clips))
            logger.info("layers:\n%s", layers)
            wandb_id = point.state["wandb_id"] if point is not None and point.same_run else None
            metrics = Metrics(run_dir, config, wandb_id)
        batches = make_batches(config, parts.encoder, train_sources, process)
        trainer = Trainer(config, parts, batches, process, run_dir, metrics)
        try:
            if config.mode == "frozen":
                trainer.evaluate()
                trainer.measure(parts.evaluations)
            else:
                trainer.train(point, stop)
        except StoppedBySignal as reason:
            logger.warning("stopped: %s; start again with resume.mode=auto", reason)
            if process.is_main:
                (run_dir / STOPPED).touch()
            raise
        finally:
            trainer.saver.close()
            batches.close()
            if metrics is not None:
                metrics.close()
        if metrics is not None:
            title = f"{run_dir.name}: {config.mode} on {config.model.source}"
            logger.info("losses: %s", plot_losses(run_dir, title))
            if bad_input.reasons:
                logger.warning("%s", bad_input.summary())
            logger.info("done: %s", run_dir)
    return run_dir


register()


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(config: DictConfig) -> None:
    typed = to_typed(config)
    process = start(typed.device)
    try:
        train(typed, process)
    except StoppedBySignal:
        sys.exit(ask_for_requeue(process))
    except RuntimeError as error:
        tell_lost(error, process)
        raise
    finally:
        stop(process)


if __name__ == "__main__":
    main()
