"""The training loop."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from finetune.config import TrainConfig, to_plain
from finetune.data.batches import Batches
from finetune.data.chunks import ChunkEncoder
from finetune.data.clips import Batch, Clip, ClipEncoder, Encoder
from finetune.data.prepared import WHOLE
from finetune.distributed import Process, gather, sum_gradients, sum_over_processes, wait_for_all
from finetune.evaluations import Scheduled, Subject, run_evaluations
from finetune.loss import LossModel, LossWeights, WeightedTargets, weighted_step_targets
from finetune.optimizer import Optimizer
from finetune.persistence import CarriedRows
from finetune.pieces import Piece, PieceReader, piece_of
from finetune.random_state import random_pieces, restore_random
from finetune.resume import ResumePoint
from finetune.run_dir import Metrics
from finetune.saving import Consolidated, Saver
from finetune.sharded_build import ShardedModel, whole_copy
from finetune.sharding import reduce_gradients, reshard
from finetune.signals import StoppedBySignal, StopRequests
from finetune.speed import Phases, speed_of_step
from finetune.validation import answer_prompt, carried_validation_loss, validation_loss
from moshi_ttt.carried import CarriedState
from moshi_ttt.checkpoint import moshi_config, saved_checkpoints, weight_files
from moshi_ttt.diagnostics import Record, TTTDiagnostics, format_record
from moshi_ttt.integration import set_activation_checkpointing

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the run stops."""


@dataclass
class Parts:
    """What a run is made of, built and checked before its folder exists.

    Args:
        loss_model: the model with its loss, the trainable parameters chosen, sharded if it is to be.
        base: the base model's files.
        mimi, tokenizer, encoder: audio and text to codes and back.
        valid_clips: held-out clips; empty for none.
        prompt: a recording to answer at each evaluation `[n]`, or None.
        save_base: whether checkpoints need all base weights.
        sharded: `loss_model`, where it is split over processes.
        evaluations: what else is measured while training.
    """

    loss_model: LossModel
    base: CheckpointInfo
    mimi: MimiModel
    tokenizer: sentencepiece.SentencePieceProcessor
    encoder: ClipEncoder
    valid_clips: Sequence[Clip]
    prompt: torch.Tensor | None
    save_base: bool
    sharded: ShardedModel | None = None
    evaluations: Sequence[Scheduled] = ()

    @property
    def model(self) -> LMModel:
        return self.loss_model.lm


class Trainer:
    """Trains a model and keeps the record of it.

    Args:
        config: the run's config.
        parts: what was built from it.
        batches: training batches of this process, without end.
        process: this process.
        run_dir: the run's folder, which exists.
        metrics: where numbers go; None on all processes but the main one.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        batches: Iterator[Batch],
        process: Process,
        run_dir: Path,
        metrics: Metrics | None,
    ):
        self.config = config
        self.parts = parts
        self.batches = batches
        self.process = process
        self.run_dir = run_dir
        self.metrics = metrics
        self.weights = LossWeights(config.first_codebook_weight_multiplier, config.text_padding_weight)
        self.step = 0
        self.phases = Phases(process.device)
        self.carried: CarriedRows | None = None
        self.encoder: Encoder = parts.encoder
        self.valid_chunks: ChunkEncoder | None = None
        if config.ttt.persistent_states:
            self.valid_chunks = ChunkEncoder(parts.encoder)
            self.carried = CarriedRows(parts.model, config.batch_size, config.num_microbatches)
        elif config.encode == WHOLE:
            self.encoder = ChunkEncoder(parts.encoder)
        self.saver = Saver(run_dir, process)
        self.saved_step = self.evaluated_step = 0
        self.diagnostics: TTTDiagnostics | None = None
        if metrics is not None and config.ttt.enable and config.diagnostics.every_steps > 0:
            self.diagnostics = TTTDiagnostics(parts.model, every=0, sink=self.log_diagnostics)

    def train(self, start: ResumePoint | None = None, stop: StopRequests | None = None) -> None:
        """Run all steps, with the evaluations and checkpoints that the config asks for.

        Args:
            start: where to go on; None starts from step 0.
            stop: requests to stop, looked at between steps.
        Raises:
            StoppedBySignal: stopped on request, after a checkpoint.
            OSError: the last checkpoint could not be written.
        """
        config, model = self.config, self.parts.model
        self.optimizer = Optimizer(model, config.optim, config.max_steps)
        set_activation_checkpointing(model, config.gradient_checkpointing)
        model.train()
        if start is not None:
            self.restore(start)
        hidden = True if not self.process.is_main else None
        bar = tqdm(total=config.max_steps, initial=self.step, desc="training", unit="step", disable=hidden)
        with bar, logging_redirect_tqdm():
            if self.step and self.evaluated_step != self.step:
                self.evaluate_due()  # what a request to stop has put off
            while self.step < config.max_steps:
                self._stop_if_asked(stop)
                values = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.3f}", frames_s=f"{values['frames_per_s']:.0f}")
                if self.step % config.log_every == 0 or self.step in (1, config.max_steps):
                    self.log_step(values)
                self.evaluate_due(stop)
                if self._is_due(config.checkpoint.every_steps) or self.step == config.max_steps:
                    self.save()
        self.saver.require_saved()

    def _stop_if_asked(self, stop: StopRequests | None) -> None:
        """Save and raise StoppedBySignal if any process was asked to stop."""
        if stop is None or not stop.agreed(self.process):
            return
        if self.step > self.saved_step:
            self.save()
        self.saver.wait()
        name = "another process was" if stop.received is None else f"{stop.received.name}:"
        raise StoppedBySignal(f"{name} asked to stop after step {self.step} of {self.config.max_steps}")

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and (self.step % every_steps == 0 or self.step == self.config.max_steps)

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what is worth logging.

        The process waits for the device once, before the update: a step with a NaN is not taken. The heads'
        backward pass is in the forward phase; the optimiser's time is that of the step before.
        """
        started = time.perf_counter()
        batches = [next(self.batches) for _ in range(self.config.num_microbatches)]
        fetched = time.perf_counter()
        self.optimizer.zero_grad()
        self._diagnose_if_due()
        losses = self.forward_backward(batches)
        self.phases.begin("optimizer")
        grad_norm = self.optimizer.clip()
        text_loss, audio_loss, norm = torch.stack((*losses, grad_norm.to(losses))).tolist()
        self._require_finite((text_loss, audio_loss), norm, batches)
        seconds = self.phases.read()
        rates = self.optimizer.learning_rates()
        self.optimizer.step()
        self.phases.begin("between steps")
        self.step += 1
        elapsed = time.perf_counter() - started
        return {
            "loss": text_loss + audio_loss,
            "text_loss": text_loss,
            "audio_loss": audio_loss,
            "grad_norm": norm,
            **{f"lr_{name}": rate for name, rate in rates.items()},
            **speed_of_step(self.parts.model, [b.codes.shape for b in batches], elapsed, self.process),
            "data_sec": fetched - started,
            **{f"{name}_sec": length for name, length in seconds.items()},
        }

    def _diagnose_if_due(self) -> None:
        step, every = self.step + 1, self.config.diagnostics.every_steps
        if self.diagnostics is not None and (step == 1 or step % every == 0):
            self.diagnostics.record_next(step)

    def log_diagnostics(self, records: list[Record]) -> None:
        """Write what diagnostics recorded of a step to metrics.jsonl, wandb and the log."""
        assert self.metrics is not None
        for record in records:
            values = {key: value for key, value in record.items() if key not in ("step", "layer")}
            self.metrics.log(record["step"], f"diagnostics/layer_{record['layer']}", values)
            logger.info("%s", format_record(record))

    def forward_backward(self, batches: list[Batch]) -> torch.Tensor:
        """Gradients of the loss over all micro-batches of all processes; returns text and audio loss, `[2]`.

        Each loss is a weighted mean over all targets of the step, wherever they are computed.
        """
        starts = [self._start_of(slot, batch) for slot, batch in enumerate(batches)]
        targets = [
            weighted_step_targets(self.parts.model, batch.codes, start, self.weights)
            for batch, start in zip(batches, starts, strict=True)
        ]
        totals = torch.stack([t.totals() for t in targets]).sum(0)
        totals = sum_over_processes(totals, self.process).clamp(min=1e-9)
        losses = torch.zeros(2, device=self.process.device)
        root = self.parts.loss_model
        for slot, (batch, start, target) in enumerate(zip(batches, starts, targets, strict=True)):
            reduce_gradients(root, self.config.fsdp.reduce_every_microbatch or slot == len(batches) - 1)
            losses += self._backward_one(slot, batch, start, target, totals)
        if self.parts.sharded is None:
            sum_gradients(self.optimizer.parameters, self.process)
        return sum_over_processes(losses, self.process)

    def _start_of(self, slot: int, batch: Batch) -> CarriedState | None:
        """What the rows of a micro-batch carry; None where every clip stands alone."""
        return None if self.carried is None else self.carried.before(slot, batch.clips)

    def _backward_one(
        self,
        slot: int,
        batch: Batch,
        start: CarriedState | None,
        targets: WeightedTargets,
        totals: torch.Tensor,
    ) -> torch.Tensor:
        self.phases.begin("forward")
        sums, after = self.parts.loss_model(batch.codes, targets, start)
        losses = sums / totals.float()
        self.phases.begin("backward")
        losses.sum().backward()
        if self.carried is not None:
            assert after is not None
            self.carried.keep(slot, after)
        return losses.detach()

    def _require_finite(self, losses: tuple[float, ...], grad_norm: float, batches: list[Batch]) -> None:
        if all(map(math.isfinite, (*losses, grad_norm))):
            return
        self.saver.wait()
        saved = saved_checkpoints(self.run_dir)
        clips = "; ".join(str(clip) for batch in batches for clip in batch.clips)
        raise NonFiniteLossError(
            f"step {self.step + 1}: loss {list(losses)} (text, audio), gradient norm {grad_norm}. "
            f"Clips of this process: {clips}. Last good checkpoint: {saved[-1] if saved else 'none yet'}. "
            "Look at these clips, or lower the learning rates, and start again with init_from=CHECKPOINT"
        )

    def log_step(self, values: dict[str, float]) -> None:
        """Write a training step to metrics.jsonl, wandb and the log."""
        if self.metrics is None:
            return
        self.metrics.log(self.step, "train", values)
        logger.info(
            "step %d/%d loss %.4f (text %.4f, audio %.4f) grad norm %.3f, %.0f frames/s, %.0f tokens/s",
            self.step,
            self.config.max_steps,
            values["loss"],
            values["text_loss"],
            values["audio_loss"],
            values["grad_norm"],
            values["frames_per_s"],
            values["tokens_per_s"],
        )

    def evaluate_due(self, stop: StopRequests | None = None) -> None:
        """The evaluations that are due after this step."""
        validate = self._is_due(self.config.eval.every_steps)
        due = [scheduled for scheduled in self.parts.evaluations if self._is_due(scheduled.every_steps)]
        if validate or due:
            self._stop_if_asked(stop)  # the time to save may not last for an evaluation
        if validate:
            self.evaluate()
        if due:
            self.measure(due)

    def measure(self, scheduled: Sequence[Scheduled]) -> None:
        """Run evaluations that the config names, on the main process."""
        parts, model = self.parts, self._whole_model()
        if self.metrics is not None:
            assert model is not None
            subject = Subject(model, parts.base, parts.mimi, parts.tokenizer, self.step, self.run_dir)
            for name, values in run_evaluations(scheduled, subject):
                self.metrics.log(self.step, name, values)
        wait_for_all(self.process)
        self.evaluated_step = self.step

    def _whole_model(self) -> LMModel | None:
        """The model, or a whole copy of a sharded one: on the main process. All must call this."""
        if self.parts.sharded is None:
            return self.parts.model
        return whole_copy(self.parts.sharded, self.process)

    def evaluate(self) -> dict[str, float]:
        """Validation loss and an answer to the prompt, where the config has them."""
        parts, config = self.parts, self.config
        values: dict[str, float] = {}
        if parts.valid_clips:
            rest = (parts.valid_clips, config.batch_size, self.weights, self.process)
            if self.valid_chunks is None:
                values = validation_loss(parts.loss_model, self.encoder, *rest)
            else:
                values = carried_validation_loss(parts.loss_model, self.valid_chunks, *rest)
        if self.metrics is not None and values:
            self.metrics.log(self.step, "valid", values)
            logger.info(
                "step %d validation loss %.4f over %d clips",
                self.step,
                values["loss"],
                len(parts.valid_clips),
            )
        reshard(parts.loss_model)
        if parts.prompt is not None:
            self._answer(parts.prompt)
        wait_for_all(self.process)
        self.evaluated_step = self.step
        return values

    def _answer(self, prompt: torch.Tensor) -> None:
        """Let the model answer the prompt, on the main process."""
        parts, model = self.parts, self._whole_model()
        if self.metrics is None:
            return
        assert model is not None
        stem = self.run_dir / "answers" / f"step_{self.step:06d}"
        result = answer_prompt(model, parts.mimi, parts.tokenizer, prompt, self.config.eval.seed, stem)
        self.metrics.log_answer(self.step, result.audio, parts.mimi.sample_rate, result.text)
        logger.info("step %d answer: %s (%s.wav)", self.step, result.text or "(no words)", stem)

    def save(self) -> None:
        """Write a checkpoint; training goes on when its tensors are copied."""
        parts, config = self.parts, to_plain(self.config)
        weights = weight_files(parts.model, parts.save_base, collect=self.process.is_main)
        consolidated = Consolidated(
            moshi_config(parts.model, config, parts.base),
            config,
            parts.base,
            weights,
            self.config.checkpoint.keep,
        )
        skipped = gather(parts.encoder.bad_input.reasons, self.process)
        state = {
            "world_size": self.process.world_size,
            "schedule": self.optimizer.progress(),
            "evaluated_step": self.evaluated_step,
            # Batches of another kind can be trained on, but not gone on from.
            "data": self.batches.state_dict() if isinstance(self.batches, Batches) else None,
            "skipped": {name: reason for reasons in skipped for name, reason in reasons.items()},
            "wandb_id": None if self.metrics is None else self.metrics.wandb_id,
        }
        pieces = [*self._pieces(), *random_pieces(self.process)]
        self.saver.save(self.step, pieces, state, consolidated)
        self.saved_step = self.step

    def _pieces(self) -> Iterator[Piece]:
        """All tensors that a step changes."""
        for kind, tensors in self.optimizer.tensors().items():
            for name, tensor in tensors.items():
                yield piece_of(f"{kind}/{name}", tensor, self.process.is_main)
        if self.carried is not None:
            yield from self.carried.pieces(self.process)

    def restore(self, start: ResumePoint) -> None:
        """Go on behind a saved step."""
        assert isinstance(self.batches, Batches)
        state, reader = start.state, PieceReader(start.piece_files)
        reader.read(list(self._pieces()))
        self.optimizer.set_progress(state["schedule"])
        self.batches.load_state_dict(state["data"])
        self.parts.encoder.bad_input.reasons |= state["skipped"]
        self.step = self.saved_step = start.step
        self.evaluated_step = state["evaluated_step"]
        restore_random(reader, self.process, self.config.seed + self.step)
        logger.info("resumed from %s, saved by %d processes", start.folder, state["world_size"])
