"""One process's share of the recordings, and what it makes of them."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.share import shard_of
from inference.batch.answering import Conversation, answer_all, conversation
from inference.batch.items import Item, find_items
from inference.batch.outputs import ItemFolder, write_answer, write_json
from inference.batch.perplexity import perplexity
from inference.batch.settings import BatchConfig
from inference.codec import decode_codes
from inference.enable_ttt_diagnostics import DiagnosticsFile, enable_ttt_diagnostics
from inference.generate import choose_device
from inference.rows import StepWatch, open_rows
from inference.session import session_identity
from inference.stream import read_recording, timed_words
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.finite_state import FiniteStateCheck
from moshi_ttt.integration import context_line, describe, ttt_layers
from moshi_ttt.loading import load_mimi, load_tokenizer

logger = logging.getLogger(__name__)


class Batch:
    """The recordings of one task among those that share them.

    Args:
        config (BatchConfig): what to do.
    Attributes:
        items: this task's, longest first.
        failures: what could not be done, and why.
        seconds: of audio that were answered.
    Raises:
        ValueError: the settings, the inputs or the checkpoint are not as they should be.
    """

    def __init__(self, config: BatchConfig):
        config.validate()
        self.config = config
        self.output = Path(config.output).expanduser()
        device = choose_device(config.device)
        named = find_items(config.inputs, config.channel, config.sampling.seed, config.max_sec)
        self.index, self.count = shard_of(config.shard_index, config.num_shards)
        # Longest first, dealt out in turn: shares of like length.
        self.items = named[self.index :: self.count]
        logger.info("%d of %d recordings are this task's", len(self.items), len(named))
        self.loaded = load_checkpoint(config.checkpoint, device, config.verify, config.base)
        if config.base is not None:
            logger.info("override: base model from %s", config.base)
        logger.info("checkpoint: %s, step %d", self.loaded.folder, self.loaded.manifest["step"])
        logger.info("%s", context_line(self.loaded.model, inference=True))
        logger.info("live layers:\n%s", describe(self.loaded.model))
        self.mimi = load_mimi(self.loaded.base, device)
        self.tokenizer = load_tokenizer(self.loaded.base)
        identity = session_identity(self.loaded, config.sampling)
        del identity["sampling.seed"]  # each item's own
        self.model_sha256 = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.failures: list[dict[str, str]] = []
        self.seconds = 0.0

    def run(self) -> None:
        """Do all that is not done yet; what fails is in `failures`."""
        started, left = time.perf_counter(), self._left()
        logger.info("%d finished before, %d to do", len(self.items) - len(left), len(left))
        for item in left:
            ItemFolder(self.output, item.id).abandon()  # what a killed task left
        scores = self._score_all(left) if self.config.perplexity.enable else {}
        failed = {failure["id"] for failure in self.failures}
        left = [item for item in left if item.id not in failed]
        if not self.config.generate:
            for item in left:
                self._end(item, {"perplexity": scores[item.id]}, {})
        elif self.config.diagnostics.every_frames:
            for item in left:  # records of several conversations would be one heap
                self._answer([item], 1, scores)
        elif left:
            self._answer(left, min(self.config.slots, len(left)), scores)
        self._summarize(time.perf_counter() - started, len(left))

    def _settings(self, item: Item) -> dict[str, Any]:
        """All that decides what an item's folder holds: with other settings it would be another answer."""
        config = self.config
        return {
            "model_and_sampling_sha256": self.model_sha256,
            "input_sha256": hashlib.sha256(item.path.read_bytes()).hexdigest(),
            "channel": item.channel,
            "seed": item.seed,
            "max_sec": config.max_sec,
            "generate": config.generate,
            "perplexity": asdict(config.perplexity) if config.perplexity.enable else None,
            "diagnostics_every_frames": config.diagnostics.every_frames,
        }

    def _left(self) -> list[Item]:
        """Items that are not finished yet.

        Raises:
            ValueError: one was finished with other settings.
        """
        left = []
        for item in tqdm(self.items, desc="looking for answers", unit="file", disable=None, leave=False):
            made = ItemFolder(self.output, item.id).finished_with()
            if made is None or self.config.overwrite:
                left.append(item)
                continue
            wanted = self._settings(item)
            other = [name for name in (wanted | made) if wanted.get(name) != made.get(name)]
            if other:
                changes = ", ".join(f"{name} ({made.get(name)}, now {wanted.get(name)})" for name in other)
                raise ValueError(
                    f"{self.output / item.id} was made with another {changes}; choose another output, or set "
                    "overwrite=true"
                )
        return left

    def _read(self, item: Item, channel: int | None) -> torch.Tensor:
        """Samples of a channel, as far as they are wanted."""
        samples = read_recording(item.path, self.mimi.sample_rate, channel)
        limit = self.config.max_sec
        return samples if limit is None else samples[: max(1, round(limit * self.mimi.sample_rate))]

    def _fail(self, item: Item, error: Exception) -> None:
        """An item that cannot be done. The others are."""
        logger.error("%s: %s", item.id, error)
        ItemFolder(self.output, item.id).abandon()
        self.failures.append({"id": item.id, "path": str(item.path), "error": str(error)})

    def _score_all(self, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
        scores = {}
        for item in tqdm(items, desc="perplexity", unit="file", disable=None):
            try:
                scores[item.id] = self._score(item)
            except ValueError as error:
                self._fail(item, error)
        return scores

    def _score(self, item: Item) -> dict[str, Any]:
        config, channel = self.config.perplexity, self.config.perplexity.channel
        if channel is None and item.channels > 2:
            raise ValueError(
                f"{item.path} has {item.channels} channels; say which is scored: perplexity.channel"
            )
        if channel is None and item.channels == 2:
            channel = 1 - (item.channel or 0)
        scored, other = self._read(item, channel), torch.zeros(1)
        alone = item.channel is None or item.channel == channel or item.channels == 1
        if not alone:
            other = self._read(item, item.channel)
        found = perplexity(self.loaded.model, self.mimi, scored, other, config)
        return found | {"channel": channel, "user": "silence" if alone else f"channel {item.channel}"}

    def _answer(self, items: Sequence[Item], slots: int, scores: dict[str, dict[str, Any]]) -> None:
        """Let Moshi answer items, `slots` at a time, and write what it says."""
        model, inner_state, check = self.loaded.model, self.config.inner_state, None
        watches: list[StepWatch] = []
        if inner_state.check_every_frames and ttt_layers(model):
            action = "restart" if inner_state.restart else "tell"
            check = FiniteStateCheck(model, inner_state.check_every_frames, action)
            watches.append(check)
        total = sum(item.seconds for item in items)
        with ExitStack() as stack:
            if self.config.diagnostics.every_frames:
                watches.append(self._diagnostics(items, stack))
            rows = stack.enter_context(open_rows(model, self.config.sampling, slots, watches))
            layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}, {rate_fmt} real time]"
            bar = tqdm(total=total, desc="answering", unit="x", disable=None, bar_format=layout)
            stack.enter_context(bar)
            waiting = self._conversations(items, rows.lm_gen.max_delay)
            for one, broken in answer_all(rows, waiting, check, lambda: bar.update(1 / self.mimi.frame_rate)):
                if broken is None:
                    self._write(one, slots, scores.get(one.item.id))
                else:
                    self._fail(one.item, broken)

    def _diagnostics(self, items: Sequence[Item], stack: ExitStack) -> StepWatch:
        """Diagnostics of the one conversation that is to come, into its folder."""
        (item,) = items
        about = {
            "checkpoint": str(self.loaded.folder),
            "step": self.loaded.manifest["step"],
            "input": str(item.path),
            "frame_rate": self.mimi.frame_rate,
        }
        file = DiagnosticsFile(ItemFolder(self.output, item.id).open() / "diagnostics.jsonl", about)
        every = self.config.diagnostics.every_frames
        diagnostics = enable_ttt_diagnostics(self.loaded.model, every, file=file)
        stack.callback(diagnostics.close)
        return diagnostics

    def _conversations(self, items: Sequence[Item], max_delay: int) -> Iterator[Conversation]:
        for item in items:
            try:
                yield conversation(item, self._read(item, item.channel), self.mimi, max_delay)
            except ValueError as error:
                self._fail(item, error)

    def _write(self, one: Conversation, slots: int, scores: dict[str, Any] | None) -> None:
        tokens, model = one.said(), self.loaded.model
        wall_sec = time.perf_counter() - one.started
        audio = decode_codes(self.mimi, tokens[1:])[: one.user.shape[0]].clamp(-1, 1)
        padding = {model.text_padding_token_id, model.end_of_text_padding_id}
        words = timed_words(tokens[0].tolist(), self.tokenizer, padding, self.mimi.frame_rate)
        folder = ItemFolder(self.output, one.item.id).open()
        write_answer(folder, one.user, audio, words, self.mimi.sample_rate)
        seconds = one.user.shape[0] / self.mimi.sample_rate
        self.seconds += seconds
        speed = {
            "frames": one.frames,
            "seconds": seconds,
            "wall_sec": round(wall_sec, 3),
            "real_time_factor": round(seconds / wall_sec, 3),
            "conversations_at_a_time": slots,
        }
        self._end(one.item, {"perplexity": scores} if scores else {}, speed)

    def _end(self, item: Item, files: dict[str, Any], speed: dict[str, Any]) -> None:
        """Put an item's folder in its place."""
        folder = ItemFolder(self.output, item.id)
        for name, content in files.items():
            write_json(folder.open() / f"{name}.json", content)
        meta = {
            "input": str(item.path),
            "checkpoint": str(self.loaded.folder),
            "step": self.loaded.manifest["step"],
            "files_sha256": {name: f["sha256"] for name, f in self.loaded.manifest["files"].items()},
            "base_sha256": self.loaded.manifest["base"]["sha256"],
            "device": str(self.loaded.model.device),
            "sampling": asdict(self.config.sampling) | {"seed": item.seed},
            **speed,
            "settings": self._settings(item),
        }
        folder.end(meta)

    def _summarize(self, wall_sec: float, done: int) -> None:
        """The last words: to the log, and to a file of this task."""
        summary = {
            "recordings": len(self.items),
            "done_now": done - len(self.failures),
            "failed": self.failures,
            "seconds_of_audio": round(self.seconds, 3),
            "wall_sec": round(wall_sec, 3),
            "real_time_factor": round(self.seconds / wall_sec, 3),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        name = f"summary-{self.index + 1:05d}-of-{self.count:05d}.json"
        write_json(self.output / name, summary)
        logger.info(
            "answered %.1f s of audio in %.1f s (%.2f x real time); %d failed; see %s",
            *(self.seconds, wall_sec, self.seconds / wall_sec, len(self.failures), self.output / name),
        )
