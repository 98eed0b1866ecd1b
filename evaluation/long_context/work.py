"""The work of a run: which models, arms and recordings, what is done of it, and what it came to."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.long_context.arms import Arm
from evaluation.long_context.codes import CodeReader
from evaluation.long_context.measures import FEWEST_FRAMES
from evaluation.long_context.models import Opened, models_of, open_model, refuse_other_codec
from evaluation.long_context.pieces import Plan, make_plan
from evaluation.long_context.protocol import protocol
from evaluation.long_context.recordings import LongRecording
from evaluation.long_context.scoring import ArmFacts, Job, facts_of, jobs_of, read_scores, run_jobs
from evaluation.long_context.settings import LongContextConfig
from evaluation.long_context.summary import Bootstrap, summarize
from finetune.data.interleaver import TextTokens
from moshi_ttt.integration import context_line
from moshi_ttt.loading import load_mimi
from moshi_ttt.memory_arms import mini_batch_frames

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """What there is to do, and what it is about.

    Args:
        reader: of codes.
        plan: of the controls.
        arms: in the order of tables.
        facts: of each arm, by name.
        jobs: of all processes, in the order of arms.
        models: what each model is, by role.
        card: entries of a codebook.
        tolerance: rounding of an NLL, in nats.
    """

    reader: CodeReader
    plan: Plan
    arms: list[Arm]
    facts: dict[str, ArmFacts]
    jobs: list[Job]
    models: dict[str, dict[str, Any]]
    card: int
    tolerance: float


def do(
    config: LongContextConfig,
    recordings: Sequence[LongRecording],
    device: torch.device,
    index: int,
    count: int,
) -> Work:
    """Score this process's share, part `index` of `count`, one model in memory at a time."""
    work = None
    parts: dict[str, str] = {}
    for wanted in models_of(config):
        opened = open_model(wanted, device)
        logger.info("%s: %s", ", ".join(wanted.memories), context_line(opened.model, inference=True))
        if work is None:
            reader = make_reader(opened, config, device)
            plan = plan_of(opened, config, recordings, reader)
            tolerance = 1e-4 if opened.model.dtype == torch.float32 else 0.25
            work = Work(reader, plan, [], {}, [], {}, opened.model.card, tolerance)
            parts = opened.identity["base"]
        else:
            refuse_other_codec(parts, opened.identity["base"])
        arms = config.crossed(wanted.memories)
        work.facts |= {arm.name: facts_of(opened, arm, config.reset_frames) for arm in arms}
        if work.arms == [] and not config.allow_short:
            refuse_short(arms, work.facts, recordings, work.plan, reader.mimi.frame_rate)
        jobs = [
            job
            for arm in arms
            for job in jobs_of(
                opened,
                arm,
                work.facts[arm.name],
                recordings,
                work.plan,
                work.reader,
                arm.memory in config.control_arms and arm.context == config.contexts[0],
                config.folder / "raw",
            )
        ]
        mine = [job for job in jobs if job.recording % count == index]
        role = "base" if wanted.memories == ["base"] else "checkpoint"
        run_jobs(opened, mine, work.facts, recordings, work.reader, config.chunk_frames, role)
        work.arms += arms
        work.jobs += jobs
        work.models[role] = opened.about
        del opened  # before the next is loaded
    assert work is not None
    ordered = [arm.name for arm in config.crossed(config.memories(True, True))]
    work.arms.sort(key=lambda arm: ordered.index(arm.name))
    work.jobs.sort(key=lambda job: (ordered.index(job.arm.name), job.recording))
    return work


def make_reader(opened: Opened, config: LongContextConfig, device: torch.device) -> CodeReader:
    """Reads recordings for a model."""
    special = TextTokens.of(opened.model)
    return CodeReader(load_mimi(opened.base, device), special, config.text, config.user, config.max_sec)


def plan_of(
    opened: Opened, config: LongContextConfig, recordings: Sequence[LongRecording], reader: CodeReader
) -> Plan:
    """Where the controls' targets lie, for the model whose memory is asked about.

    Raises:
        ValueError: a recording without a whole frame, or controls that cannot be.
    """
    lengths = [reader.frames(recording) for recording in recordings]
    for recording, length in zip(recordings, lengths, strict=True):
        if length < 1:
            raise ValueError(
                f"{recording.path} has {recording.duration_sec:.3f} s, less than a frame; remove it"
            )
    model = opened.model
    # Predictions of a frame read codes of the frames before it, delayed ones later.
    reach = facts_of(opened, Arm("base", config.contexts[0]), None).receptive_field_frames
    near = reach + max(model.delays) + 2
    target_frames = max(round(config.target_sec * reader.mimi.frame_rate), 1)
    return make_plan(
        recordings,
        lengths,
        target_frames,
        config.target_end,
        near,
        mini_batch_frames(model),
        config.controls if set(config.control_arms) else (),
        config.seed,
    )


def refuse_short(
    arms: Sequence[Arm],
    facts: dict[str, ArmFacts],
    recordings: Sequence[LongRecording],
    plan: Plan,
    frame_rate: float,
) -> None:
    """Raise ValueError if no recording can show what lies beyond the receptive field."""
    carried = [facts[arm.name].receptive_field_frames for arm in arms if arm.memory == "carried"]
    if not carried or max(plan.lengths) >= min(carried) + FEWEST_FRAMES:
        return
    longest = max(range(len(recordings)), key=lambda i: plan.lengths[i])
    reach = min(carried)
    raise ValueError(
        f"all recordings are too short: the longest, {recordings[longest].name}, has "
        f"{plan.lengths[longest]:,} frames ({plan.lengths[longest] / frame_rate:.0f} s), but attention "
        f"reaches {reach:,} frames ({reach / frame_rate:.0f} s) back and {FEWEST_FRAMES} more are needed to "
        "see what lies beyond. Give whole chapters (of one voice, not cut by voice activity), narrower "
        "windows such as contexts=[100], or set allow_short=true for curves without a headline"
    )


def missing_jobs(work: Work) -> list[Job]:
    """What other processes have not done yet."""
    return [job for job in work.jobs if not job.path.is_file()]


def conclude(
    config: LongContextConfig, work: Work, recordings: Sequence[LongRecording], found: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All numbers of a run whose jobs are done, and a line for each job."""
    scores: dict[str, list[dict[str, Any]]] = {}
    for job in work.jobs:
        scores.setdefault(job.arm.name, []).append(read_scores(job))
    rate = work.reader.mimi.frame_rate
    content, samples = summarize(
        scores,
        work.arms,
        work.facts,
        Bootstrap([r.speaker for r in recordings], config.bootstrap_draws, config.seed),
        config.buckets_per_octave,
        rate,
        work.card,
        work.plan.near_frames,
        work.tolerance,
    )
    partial = "" if config.limit is None else f"limit={config.limit}: {len(recordings)} of {found} recordings"
    if config.max_sec is not None:
        partial += f"{'; ' if partial else ''}max_sec={config.max_sec:g}: only the starts of recordings"
    if partial:
        for headline in content["headlines"]:
            headline["text"] = f"PARTIAL ({partial}). {headline['text']}"
    listed = [
        {
            "name": recording.name,
            "speaker": recording.speaker,
            "frames": length,
            "sec": round(length / rate, 2),
            "sha256": work.reader.identity(recording)["sha256"],
        }
        for recording, length in zip(recordings, work.plan.lengths, strict=True)
    ]
    about = {
        "partial": partial,
        "found": found,
        "frame_rate": rate,
        "models": work.models,
        "protocol": protocol(config, work.plan, recordings, work.models, rate),
        "recordings": listed,
    }
    lines = [
        {
            "doc_id": job.recording,
            **{key: listed[job.recording][key] for key in ("name", "speaker", "frames")},
            "arm": job.arm.name,
            "partial": bool(partial),
            **samples[job.arm.name][job.recording],
            "raw": job.path.relative_to(config.folder).as_posix(),
        }
        for job in work.jobs
    ]
    return about | content, lines
