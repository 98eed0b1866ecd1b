"""One recording, read once: its measures, and what is wrong with it."""

from pathlib import Path

import numpy as np

from finetune.data.findings import ChannelMeasures, Checked, Job
from finetune.data.levels import Levels, measure
from finetune.data.text_check import check_text
from finetune.data.transcript_faults import TimedWord, Transcript, read_transcript
from finetune.data.voice import dbfs, voiced

SIDES = ("left", "right")


def check_recording(job: Job) -> Checked:
    """All about one recording. Whatever is wrong with it is in the result."""
    path = job.source.path
    result = Checked(str(path))
    try:
        levels = measure(path)
    except ValueError as error:
        result.add("unreadable", 0.0, str(error))
        return result
    result.duration_sec = levels.duration_sec
    channels = levels.power.shape[1]
    if not _usable(result, levels, channels):
        return result
    listed = job.source.duration_sec
    if listed is not None and abs(listed - levels.duration_sec) > job.limits.duration_sec:
        result.add(
            "duration",
            min(listed, levels.duration_sec),
            f"{job.source.where} says {listed} s, the file has {levels.duration_sec:.3f} s",
        )
    voice = np.stack([voiced(levels.power[:, c], job.voice) for c in range(channels)], axis=1)
    own = _without_leaks(voice, levels.power, job.limits.swap_db)
    result.silence_share = float((~voice.any(axis=1)).mean())
    result.overlap_share = float((own.sum(axis=1) > 1).mean())
    transcript = _read_words(result, path, channels)
    words = [] if transcript is None else transcript.words
    for channel, speaker in zip(range(channels), job.speakers, strict=False):
        mine = [word for word in words if word.speaker == speaker]
        result.channels.append(_measure_channel(levels, own[:, channel], channel, speaker, len(mine)))
    result.speakers = sorted({word.speaker for word in words})
    _check_channels(result, levels, job)
    _check_alignment(result, words, levels.duration_sec, job)
    if transcript is not None:
        check_text(result, words, levels, voice, own, job)
    return result


def _usable(result: Checked, levels: Levels, channels: int) -> bool:
    """Whether there are samples to look at; what is wrong with them is noted."""
    if levels.error is not None:
        result.add("unreadable", levels.duration_sec, f"cannot be read from here on ({levels.error})")
    elif levels.promised_sec - levels.duration_sec > 0.1:
        result.add(
            "unreadable", levels.duration_sec, f"ends here; its header promises {levels.promised_sec:.3f} s"
        )
    elif levels.duration_sec == 0:
        result.add("unreadable", 0.0, "holds no audio")
    if channels > 2:
        result.add("unreadable", 0.0, f"has {channels} channels; expected stereo or mono")
    if levels.bad_sec is not None:
        result.add("not_finite", levels.bad_sec, "NaN or infinite samples from here on")
    whole = levels.error is None and levels.bad_sec is None
    return whole and len(levels.power) > 0 and channels <= 2


def _without_leaks(voice: np.ndarray, power: np.ndarray, margin_db: float) -> np.ndarray:
    """Voiced frames `[frames, C]` that are the channel's own: not where the other voice is louder by this."""
    if voice.shape[1] == 1:
        return voice
    louder = dbfs(power[:, ::-1]) - dbfs(power) > 3 * margin_db
    return voice & ~(louder & voice[:, ::-1])


def _read_words(result: Checked, path: Path, channels: int) -> Transcript | None:
    transcript = read_transcript(path.with_suffix(".json"))
    if transcript is None:
        if channels == 2:  # mono recordings may have none: then they train the voice alone
            result.add(
                "transcript", 0.0, f"{path.with_suffix('.json').name} does not exist or has no alignments"
            )
        return None
    for fault in transcript.faults:
        result.add("transcript", 0.0, fault)
    return transcript


def _measure_channel(
    levels: Levels, voice: np.ndarray, channel: int, speaker: str, words: int
) -> ChannelMeasures:
    power = levels.power[voice, channel]
    return ChannelMeasures(
        speaker=speaker,
        voice_sec=float(voice.sum() * levels.frame_sec),
        voice_dbfs=float(dbfs(power.mean(dtype=np.float64))) if len(power) else None,
        peak_dbfs=float(dbfs(levels.peak[channel] ** 2)),
        clipped_share=float(levels.clipped[voice, channel].mean()) if len(power) else 0.0,
        words=words,
    )


def _check_channels(result: Checked, levels: Levels, job: Job) -> None:
    """Levels, clipping, and channels that are silent or the same."""
    limits = job.limits
    if len(result.channels) == 2:
        across, left, right = levels.products[0, 1], levels.products[0, 0], levels.products[1, 1]
        if left > 0 and right > 0 and across / np.sqrt(left * right) > limits.same_channels:
            result.add("same_channels", 0.0, "left and right hold the same: a mono recording saved as stereo")
    for index, channel in enumerate(result.channels):
        side = SIDES[index] if len(result.channels) == 2 else "mono"
        if channel.voice_dbfs is None:
            result.add("silent_channel", 0.0, f"no voice on the {side} channel", channel.speaker)
        elif channel.voice_dbfs < limits.quiet_dbfs:
            result.add(
                "quiet",
                0.0,
                f"the voice on the {side} channel has {channel.voice_dbfs:.0f} dBFS",
                channel.speaker,
            )
        if channel.clipped_share > limits.clipped_share:
            first = float(np.flatnonzero(levels.clipped[:, index])[0] * levels.frame_sec)
            share = f"{channel.clipped_share:.2%} of the voice on the {side} channel"
            result.add("clipping", first, f"clipped, first here: {share}", channel.speaker)


def _check_alignment(result: Checked, words: list[TimedWord], duration_sec: float, job: Job) -> None:
    """Order and range of the words' times, and their speakers."""
    unknown: dict[str, float] = {}
    last = -np.inf
    for word in words:
        text = f"{word.text!r} at {word.start:g}-{word.end:g} s"
        if word.start < last - job.limits.order_sec:
            result.add(
                "order", word.start, f"{text} stands behind a word that starts at {last:g} s", word.speaker
            )
        last = max(last, word.start)
        if word.start < 0 or word.end > duration_sec + job.limits.duration_sec:
            result.add("outside", word.start, f"{text}; the audio has {duration_sec:.2f} s", word.speaker)
        elif word.end <= word.start:
            result.add(
                "outside", word.start, f"{text} has no length and never reaches the text", word.speaker
            )
        if word.speaker not in job.speakers[: len(result.channels)]:
            unknown.setdefault(word.speaker, word.start)
    for speaker, start in unknown.items():
        expected = " and ".join(job.speakers[: len(result.channels)])
        result.add("speaker", start, f"words of {speaker!r}; expected {expected}", speaker)
