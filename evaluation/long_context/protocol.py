"""How the numbers of a run were got, for people."""

from collections.abc import Sequence
from typing import Any

from evaluation.long_context.measures import FEWEST_FRAMES
from evaluation.long_context.pieces import Plan
from evaluation.long_context.recordings import LongRecording, speakers_of
from evaluation.long_context.settings import LongContextConfig


def protocol(
    config: LongContextConfig,
    plan: Plan,
    recordings: Sequence[LongRecording],
    models: dict[str, dict[str, Any]],
    frame_rate: float,
) -> dict[str, Any]:
    """What was done, in rows."""
    seconds = sum(plan.lengths) / frame_rate
    used = f"{config.recordings}: {len(recordings)} of {len(speakers_of(recordings))} speakers, "
    used += f"{seconds / 3600:.2f} h; "
    if config.max_sec is None:
        used += "whole, silences included; the state is carried from the first frame to the last"
    else:
        used += f"only the first {config.max_sec:g} s of each, the state carried through them"
    stereo = sum(recording.channels == 2 for recording in recordings)
    facts: dict[str, Any] = {
        "recordings": used,
        "streams": f"the voice is on Moshi's own stream, which alone is scored; text: {config.text} "
        f"(never what is said); user: {config.user}, and the second channel of {stereo} recordings that "
        "have one",
        "score": "teacher-forced NLL in nats of each codebook and frame, float32; w100 = (100 x semantic "
        "+ the sum of the acoustic ones) / (99 + codebooks), as Moshi is trained, is the primary number",
        "statistics": "mean of each recording, then over recordings; bootstrap over speakers, "
        f"{config.bootstrap_draws} draws, percentiles, seed {config.seed}. A recording counts in a bucket "
        "if it fills half of it, and beyond a receptive field with at least "
        f"{FEWEST_FRAMES} frames there",
        "controls": "none",
        "frames": f"{frame_rate:g} a second",
    }
    if plan.controls:
        facts["controls"] = (
            f"{', '.join(plan.controls)}; targets of {plan.target_frames} frames that end at "
            f"{config.target_end:.0%} of the recording, prefixes of whole mini-batches of {plan.size} frames"
        )
    for role, about in models.items():
        facts[role] = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())
    return facts
