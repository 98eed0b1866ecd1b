"""Probe mode: does a checkpoint remember what it was told, beyond its attention windows?

`python -m evaluation.recall mode=probe checkpoint=RUN`. Nothing is trained. In an episode pairs of a key and
a value are told on Moshi's own stream, other speech follows for D frames, and a key is replayed. The value
that belongs to it and the values of the other pairs are then scored by likelihood: text and all of Moshi's
codebooks, given what came before. Right is where the true value is the likeliest. Every pair of an episode is
asked for, with the same candidates, so that a model that only prefers some values is right for exactly one in
P, and its mean margin is exactly 0. What is told and asked: evaluation/recall/probe_words.py.

The same episodes are scored under these conditions:

    plain        the checkpoint as it is
    not_told     recorded speech in place of the pairs: what can be guessed without having heard them
    state_reset  the inner weights are put back to the learned ones when the question comes; attention keeps
                 its windows. What is lost by it was in the inner weights
    inner_lr_0   inner learning rate 0 throughout: the network that was trained, but no memory

not_told matters for phrases, where grammar and sound can favour the true value. A value that is likely or
unlikely by itself can hide a weak memory from the accuracy, but not from the margin, nor from the gain over
not_told: which value became likeliest by being told. The last two conditions exist for
checkpoints with TTT layers alone.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluation.recall.probe_report import Answers, draw, summarize, table
from evaluation.recall.probe_scoring import likelihoods
from evaluation.recall.probe_settings import Probe
from evaluation.recall.probe_words import EpisodeMaker, Episodes, Speech, question_frames
from finetune.data.chunks import ChunkEncoder
from finetune.data.clips import ClipEncoder, cut_clips
from finetune.data.interleaver import TextLayout, TextTokens
from finetune.data.manifest import Recording, read_manifest
from inference.generate import choose_device
from moshi_ttt.checkpoint import LoadedCheckpoint, load_checkpoint
from moshi_ttt.integration import context_line, receptive_field, ttt_layers
from moshi_ttt.loading import load_mimi, load_tokenizer
from moshi_ttt.memory_arms import inner_lr_0, mini_batch_frames, without_inner_memory

logger = logging.getLogger(__name__)

_ENCODED_AT_ONCE_SEC = 10.24
_SILENCE_SEC = 4.0  # Mimi's codes of silence settle in a fraction of it


def run(probe: Probe, checkpoint: str, output: Path) -> str:
    """Ask a checkpoint, and write NAME.json, NAME.md and NAME.png; returns the table."""
    written = [output, output.with_suffix(".md"), output.with_suffix(".png")]
    existing = [str(path) for path in written if path.exists()]
    if existing and not probe.overwrite:
        raise ValueError(f"{', '.join(existing)} exists; choose another output or set probe.overwrite=true")
    device = choose_device(probe.device)
    recordings = read_manifest(probe.recordings)[: probe.max_recordings]
    loaded = load_checkpoint(checkpoint, device)
    model = loaded.model
    logger.info("%s", context_line(model, inference=True))
    logger.info("stacked attention windows reach %d frames", receptive_field(model))
    if not ttt_layers(model):
        logger.info("no TTT layers: no state to reset and no inner learning rate; plain and not_told alone")
    speeches, silence = read_speech(loaded, recordings, device)
    answers = dict(ask(model, probe, speeches, silence))
    about = about_run(loaded, probe, speeches)
    summary = about | {"tasks": {task: summarize(probe, asked) for task, asked in answers.items()}}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(summary, indent=1) + "\n")
    text = table(summary)
    output.with_suffix(".md").write_text(text + "\n")
    draw(summary, output.with_suffix(".png"))
    return text


def about_run(loaded: LoadedCheckpoint, probe: Probe, speeches: list[Speech]) -> dict[str, Any]:
    """What was asked how, for the report."""
    model = loaded.model
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest["step"],
        "contexts": context_line(model, inference=True),
        "ttt_layers": [index for index, _ in ttt_layers(model)],
        "receptive_field_frames": receptive_field(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "recordings": probe.recordings,
        "speech_frames": sum(speech.codes.shape[1] for speech in speeches),
        "chance": 1 / probe.pairs,
        "pairs": probe.pairs,
        "key_frames": probe.key_frames,
        "value_frames": probe.value_frames,
        "seed": probe.seed,
    }


def read_speech(
    loaded: LoadedCheckpoint, recordings: list[Recording], device: torch.device
) -> tuple[list[Speech], torch.Tensor]:
    """Recordings as the model hears them, and the codes of silence `[8]`."""
    data = loaded.config["data"]
    mimi, tokenizer = load_mimi(loaded.base, device), load_tokenizer(loaded.base)
    special = TextTokens.of(loaded.model)
    layout = TextLayout.of(data)
    encoder = ChunkEncoder(ClipEncoder(mimi, tokenizer, special, _ENCODED_AT_ONCE_SEC, layout))
    speeches = []
    for recording in tqdm(recordings, desc="encoding", unit="file", disable=None, leave=False):
        chunks = encoder.encode(cut_clips([recording], _ENCODED_AT_ONCE_SEC)).codes
        codes = chunks.transpose(0, 1).flatten(1).cpu()
        codes = codes[:, (codes[1:] != special.zero).all(0)]
        # Only the main speaker is on Moshi's stream, whoever's words are in its text.
        words = [w for w in recording.words or () if w.speaker == data["main_speaker"] and w.end > w.start]
        starts = tuple(sorted({int(word.start * mimi.frame_rate) for word in words}))
        speeches.append(Speech(str(recording.path), codes, starts))
    return speeches, silent_codes(mimi)


@torch.no_grad()
def silent_codes(mimi: MimiModel) -> torch.Tensor:
    """Mimi's codes of a frame of digital silence amid silence, `[8]`."""
    device = next(mimi.parameters()).device
    samples = torch.zeros(1, 1, int(_SILENCE_SEC * mimi.sample_rate), device=device)
    return mimi.encode(samples)[0, :, -1].cpu()


def ask(
    model: LMModel, probe: Probe, speeches: list[Speech], silence: torch.Tensor
) -> Iterator[tuple[str, Answers]]:
    """(task, likelihoods under each condition) of every task of the probe."""
    mini_batch = mini_batch_frames(model)
    reach = receptive_field(model)
    ends = question_frames(probe, reach, mini_batch, max(model.delays))
    maker = EpisodeMaker(probe, model, speeches, silence, ends)
    makers = {"code_words": maker.code_words, "phrases": maker.phrases}
    episodes = {task: makers[task]() for task in probe.tasks}
    for task, asked in episodes.items():
        logger.info(
            "%s: %d episodes of %d pairs, asked %s frames later; %d questions at each distance",
            task,
            probe.episodes,
            probe.pairs,
            ", ".join(str(end - probe.told_frames) for end in ends),
            probe.episodes * probe.pairs,
        )
        if len(set(asked.clusters)) == 1:
            logger.info("%s: all of one recording or episode, so there are no intervals", task)
    chunk_frames = -(-probe.chunk_frames // mini_batch) * mini_batch
    total = sum(_frames(asked, bool(ttt_layers(model))) for asked in episodes.values())
    with tqdm(total=total, desc="probe", unit="frame", disable=None) as bar, logging_redirect_tqdm():
        for task, asked in episodes.items():
            nll = _conditions(model, asked, probe.batch_size, chunk_frames, bar)
            distances = [end - probe.told_frames for end in ends]
            yield task, Answers(nll, asked.clusters, distances, reach)


def _frames(episodes: Episodes, ttt: bool) -> int:
    """Frames that are passed for a task, over all conditions."""
    past, distances = episodes.told.shape[0] * episodes.ends[-1], len(episodes.ends)
    passes, questions = (3, 4) if ttt else (2, 2)
    return passes * past + questions * distances * episodes.questions_frames


def _conditions(
    model: LMModel, episodes: Episodes, batch_size: int, chunk_frames: int, bar: tqdm
) -> dict[str, torch.Tensor]:
    """Likelihoods `[distances, B, questions, candidates, streams]` by condition."""
    limits = (batch_size, chunk_frames)
    same = [lambda carried: carried]
    if not ttt_layers(model):
        (plain,) = likelihoods(model, episodes, episodes.told, *limits, same, bar.update)
        (not_told,) = likelihoods(model, episodes, episodes.untold, *limits, same, bar.update)
        return {"plain": plain, "not_told": not_told}
    both = [*same, lambda carried: without_inner_memory(model, carried)]
    plain, reset = likelihoods(model, episodes, episodes.told, *limits, both, bar.update)
    (not_told,) = likelihoods(model, episodes, episodes.untold, *limits, same, bar.update)
    with inner_lr_0(model):
        (frozen,) = likelihoods(model, episodes, episodes.told, *limits, same, bar.update)
    return {"plain": plain, "not_told": not_told, "state_reset": reset, "inner_lr_0": frozen}
