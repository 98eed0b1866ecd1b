"""Recordings become Moshi's 17 streams as in moshi-finetune; every clip is seen once an epoch."""

import itertools
import math

import numpy as np
import pytest
import sphn
import torch
from training import SAMPLE, dialogue, write_recording

from finetune.data.batches import training_batches
from finetune.data.clips import Clip, ClipEncoder, cut_clips
from finetune.data.interleaver import (
    TextLayout,
    TextTokens,
    clip_text_stream,
    text_stream,
    tokenize,
    words_in_clip,
)
from finetune.data.manifest import Recording, Word, read_manifest
from finetune.data.order import Sampling, clip_order
from moshi_ttt.loading import load_mimi, load_tokenizer

P, E, Z = 3, 0, -1  # padding, end of padding, no target
SPECIAL = TextTokens(P, E, Z)
MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"
# The tiny tokenizer's pieces, looked up once by hand.
NOT, YOU, THE = [316], [271], [265]
WAS = [304, 264]
AMIABLE = [266, 294, 301, 277, 314, 270, 263]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def mimi(tiny_base):
    return load_mimi(tiny_base, "cpu")


@pytest.fixture
def encoder(mimi, tokenizer):
    def encoder(duration_sec):
        return ClipEncoder(mimi, tokenizer, SPECIAL, duration_sec, TextLayout())

    return encoder


def test_the_tokens_in_these_tests_are_the_tokenizers(tokenizer):
    words = {"not": NOT, "you": YOU, "the": THE, "was": WAS, "amiable": AMIABLE}
    assert {word: tokenize(tokenizer, word) for word in words} == words


def test_spaces_around_a_word_say_nothing_and_lines_are_joined(tokenizer):
    assert tokenize(tokenizer, " not\n") == NOT
    assert tokenize(tokenizer, "not\nwas") == [*NOT, tokenizer.piece_to_id("\n"), *WAS]


# A frame is 0.08 s: a word at 0.40 s starts in frame 5.
GOLDEN = {
    "a word starts in its frame, after the end of padding": (
        [("not", 0.40, 0.50, MAIN)],
        [P, P, P, P, E, *NOT, P, P, P, P],
    ),
    "pieces follow each other, one a frame": (
        [("was", 0.24, 0.50, MAIN)],
        [P, P, E, *WAS, P, P, P, P, P],
    ),
    "any moment of a frame is that frame": (
        [("not", 0.4799, 0.50, MAIN), ("you", 0.4801, 0.60, MAIN)],
        [P, P, P, P, E, *NOT, *YOU, P, P, P],
    ),
    "there is no end of padding before the first frame": (
        [("not", 0.0, 0.1, MAIN)],
        [*NOT, P, P, P, P, P, P, P, P, P],
    ),
    "a frame of padding between words ends the padding": (
        [("not", 0.0, 0.1, MAIN), ("you", 0.16, 0.3, MAIN)],
        [*NOT, E, *YOU, P, P, P, P, P, P, P],
    ),
    "what is not placed when the next word starts is dropped": (
        [("amiable", 0.08, 0.6, MAIN), ("you", 0.32, 0.5, MAIN)],
        [E, *AMIABLE[:3], *YOU, P, P, P, P, P],
    ),
    "a word may last longer than its time if nothing follows": (
        [("amiable", 0.08, 0.16, MAIN)],
        [E, *AMIABLE, P, P],
    ),
    "a word is cut at the end of the clip": (
        [("amiable", 0.56, 0.8, MAIN)],
        [P, P, P, P, P, P, E, *AMIABLE[:3]],
    ),
    "of words that start in one frame the last remains": (
        [("amiable", 0.24, 0.26, MAIN), ("was", 0.27, 0.28, MAIN), ("the", 0.29, 0.31, MAIN)],
        [P, P, E, *THE, P, P, P, P, P, P],
    ),
    "words without duration are dropped": (
        [("not", 0.24, 0.24, MAIN), ("was", 0.4, 0.3, MAIN), ("you", 0.56, 0.6, MAIN)],
        [P, P, P, P, P, P, E, *YOU, P, P],
    ),
    "a word without duration does not cut the one before": (
        [("amiable", 0.0, 0.6, MAIN), ("not", 0.16, 0.16, MAIN)],
        [*AMIABLE, P, P, P],
    ),
    "the user's words are not Moshi's, and do not cut Moshi's": (
        [("was", 0.16, 0.3, MAIN), ("not", 0.24, 0.5, USER), ("you", 0.56, 0.6, USER)],
        [P, E, *WAS, P, P, P, P, P, P],
    ),
    "words after the clip leave no trace": (
        [("you", 0.8, 0.9, MAIN)],
        [P] * 10,
    ),
}


@pytest.mark.parametrize("words, expected", GOLDEN.values(), ids=GOLDEN.keys())
def test_the_text_stream_is_as_worked_out_by_hand(tokenizer, words, expected):
    stream = text_stream([Word(*word) for word in words], 10, 12.5, tokenizer, SPECIAL, TextLayout())
    assert stream.tolist() == expected


def test_without_a_main_speaker_everybodys_words_are_placed(tokenizer):
    words = [Word("was", 0.16, 0.3, MAIN), Word("not", 0.24, 0.5, USER)]
    stream = text_stream(words, 6, 12.5, tokenizer, SPECIAL, TextLayout(keep_main_only=False))
    assert stream.tolist() == [P, E, WAS[0], *NOT, P, P]


B, S, W = 1, 2, 9  # BOS, EOS, padding within words
EVERYBODY = TextLayout(keep_main_only=False)
OPTIONS = {
    "turns begin with BOS and EOS, those of other users do not": (
        TextLayout(keep_main_only=False, use_bos_eos=True),
        [
            ("not", 0.0, 0.1, MAIN),
            ("you", 0.32, 0.4, USER),
            ("the", 0.56, 0.6, "C"),
            ("not", 0.72, 0.8, MAIN),
        ],
        [B, *NOT, P, E, S, *YOU, E, *THE, E, B],
    ),
    "the user begins without EOS": (
        TextLayout(keep_main_only=False, use_bos_eos=True),
        [("you", 0.16, 0.3, USER), ("not", 0.4, 0.5, MAIN)],
        [P, E, *YOU, P, E, B, *NOT, P, P, P],
    ),
    "a word without duration takes the turn": (
        TextLayout(keep_main_only=False, use_bos_eos=True),
        [
            ("the", 0.08, 0.08, USER),
            ("you", 0.32, 0.4, USER),
            ("not", 0.64, 0.64, MAIN),
            ("not", 0.72, 0.8, MAIN),
        ],
        [P, P, P, E, *YOU, P, P, P, E, *NOT],
    ),
    "words are said to their ends": (
        TextLayout(keep_and_shift=True),
        [("amiable", 0.08, 0.6, MAIN), ("you", 0.16, 0.5, MAIN)],
        [E, *AMIABLE, *YOU, P],
    ),
    "the text is ahead of late audio; words that end before it starts are lost": (
        TextLayout(audio_delay_sec=0.16),
        [("the", 0.0, 0.1, MAIN), ("not", 0.08, 0.4, MAIN), ("you", 0.56, 0.6, MAIN)],
        [*NOT, P, P, P, E, *YOU, P, P, P, P][:10],
    ),
    "the text is behind early audio, and no target before it": (
        TextLayout(audio_delay_sec=-0.2),
        [("not", 0.16, 0.3, MAIN)],
        [Z, Z, P, E, *NOT, P, P, P, P, P],
    ),
    "a word lasts behind its tokens": (
        TextLayout(in_word_padding=W),
        [("not", 0.08, 0.33, MAIN), ("you", 0.56, 0.6, MAIN)],
        [E, *NOT, W, W, W, P, E, *YOU, P, P],
    ),
    "the end of padding may be within a word": (
        TextLayout(in_word_padding=W),
        [("not", 0.0, 0.6, MAIN), ("you", 0.24, 0.3, MAIN)],
        [*NOT, W, E, *YOU, P, P, P, P, P, P],
    ),
}


@pytest.mark.parametrize("layout, words, expected", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_interleavers_options_are_as_worked_out_by_hand(tokenizer, layout, words, expected):
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (B, S)
    stream = text_stream([Word(*word) for word in words], 10, 12.5, tokenizer, SPECIAL, layout)
    assert stream.tolist() == expected


def test_a_word_that_a_delay_puts_right_behind_a_clip_ends_its_padding(tokenizer):
    # moshi-finetune lays out more frames than the clip has, and cuts.
    words = [Word("not", 0.56, 0.6, MAIN)]
    layout = TextLayout(audio_delay_sec=-0.08)
    assert clip_text_stream(words, 8, 8, 12.5, tokenizer, SPECIAL, layout).tolist() == [Z, *[P] * 6, E]


def test_without_a_transcript_no_frame_has_a_text_target(tokenizer):
    assert words_in_clip(None, 0.0, 1.0) is None
    assert clip_text_stream(None, 8, 8, 12.5, tokenizer, SPECIAL, EVERYBODY).tolist() == [Z] * 8


def test_settings_of_a_config_are_the_layout_and_older_ones_have_defaults():
    settings = {"keep_main_only": False, "main_speaker": "A", "train": "x"}
    assert TextLayout.of(settings) == TextLayout(keep_main_only=False, main_speaker="A")
    assert TextLayout.of({}) == TextLayout()


def test_a_clip_has_the_words_that_start_in_it_in_its_own_time():
    words = [Word("a", 1.27, 2.0, MAIN), Word("b", 1.28, 1.5, USER), Word("c", 2.55, 2.7, MAIN)]
    words.append(Word("d", 2.56, 2.8, MAIN))
    inside = words_in_clip(words, 1.28, 1.28)
    assert [(word.text, word.speaker) for word in inside] == [("b", USER), ("c", MAIN)]
    assert [time for word in inside for time in (word.start, word.end)] == pytest.approx(
        [0.0, 0.22, 1.27, 1.42]
    )


def test_a_short_last_clip_has_padding_targets_behind_its_audio(tokenizer):
    # moshi-finetune multiplies frames by the frame rate: 2 frames of audio have 25 frames of text.
    stream = clip_text_stream([Word("not", 0.16, 0.3, MAIN)], 30, 2, 12.5, tokenizer, SPECIAL, TextLayout())
    assert stream.tolist() == [P, E, *NOT, *[P] * 22, *[Z] * 5]


def test_a_full_clip_has_text_to_its_end(tokenizer):
    assert clip_text_stream([], 8, 8, 12.5, tokenizer, SPECIAL, TextLayout()).tolist() == [P] * 8


@torch.no_grad()
def test_codes_of_a_clip_are_mimis_of_that_crop(encoder, mimi):
    (recording,) = read_manifest(SAMPLE / "valid.jsonl")
    codes = encoder(3.2).encode([Clip(recording, 3.2)]).codes
    assert codes.shape == (1, 17, 40)
    assert codes.dtype == torch.long
    crop = torch.from_numpy(dialogue(4)[76800:153600].T.copy())  # 3.2 s to 6.4 s
    left, right = mimi.encode(crop[:, None])
    assert torch.equal(codes[0, 1:9], left)
    assert torch.equal(codes[0, 9:17], right)
    assert not torch.equal(left, right)


@torch.no_grad()
@pytest.mark.parametrize("duration_sec", [1.28, 2.5, 6.4, 100.0])
def test_clips_and_their_audio_are_those_of_moshi_finetunes_loader(encoder, mimi, duration_sec):
    clips = cut_clips(read_manifest(SAMPLE / "valid.jsonl"), duration_sec)
    loader = sphn.dataset_jsonl(
        str(SAMPLE / "valid.jsonl"),
        duration_sec=duration_sec,
        num_threads=1,
        sample_rate=24000,
        pad_last_segment=True,
    )
    theirs = list(loader.seq(skip=0, step_by=1))
    assert [clip.start_sec for clip in clips] == [item["start_time_sec"] for item in theirs]
    codes = encoder(duration_sec).encode(clips).codes
    assert codes.shape == (len(clips), 17, math.ceil(duration_sec * 12.5))
    for row, item in zip(codes, theirs, strict=True):
        audio = torch.from_numpy(item["data"][:, : item["unpadded_len"]])
        expected = mimi.encode(audio[:, None]).flatten(0, 1)[:, : row.shape[1]]
        assert torch.equal(row[1:, : expected.shape[1]], expected)
        assert (row[1:, expected.shape[1] :] == Z).all()


def test_the_last_clip_has_no_audio_after_its_end(encoder):
    (recording,) = read_manifest(SAMPLE / "valid.jsonl")
    last = cut_clips([recording], 6.4)[-1]  # 1.28 s of 6.4: 16 frames of 80
    codes = encoder(6.4).encode([last]).codes[0]
    assert codes.shape == (17, 80)
    assert (codes[1:, :16] >= 0).all()
    assert (codes[1:, 16:] == Z).all()
    assert (codes[0] >= 0).all()  # 16 x 12.5 frames of text, cut to the clip
    assert (codes[0, 16:] == P).all()


def test_clips_are_one_batch_in_their_order(encoder):
    clips = cut_clips(read_manifest(SAMPLE / "train.jsonl"), 6.4)
    one_by_one = [encoder(6.4).encode([clip]).codes for clip in clips[:3]]
    batch = encoder(6.4).encode(clips[:3])
    assert batch.clips == clips[:3]
    assert torch.equal(batch.codes, torch.cat(one_by_one))


def test_remembered_clips_are_the_fresh_ones(encoder):
    clips = cut_clips(read_manifest(SAMPLE / "valid.jsonl"), 2.56)
    remembering = encoder(2.56)
    first = remembering.encode(clips).codes.clone()
    remembering.encode(clips).codes.fill_(7)  # what a caller does to a batch stays there
    assert torch.equal(remembering.encode(clips).codes, first)
    assert torch.equal(encoder(2.56).encode(clips).codes, first)


def test_a_recording_at_another_rate_is_resampled(encoder, tmp_path):
    rate = 48000
    stretched = np.repeat(dialogue(4)[96000:134400], 2, axis=0)  # 1.6 s
    (recording,) = read_manifest(write_recording(tmp_path, stretched, rate))
    codes = encoder(1.6).encode([Clip(recording, 0.0)]).codes
    assert recording.duration_sec == 1.6
    assert codes.shape == (1, 17, 20)
    assert (codes >= 0).all()


@pytest.mark.parametrize("recorded, clip, count", [(13.8, 6.4, 3), (12.8, 6.4, 2), (1.0, 100.0, 1)])
def test_a_recording_is_cut_to_as_many_clips_as_cover_it(recorded, clip, count):
    clips = cut_clips([Recording(SAMPLE, recorded, ())], clip)
    assert [c.start_sec for c in clips] == pytest.approx([clip * i for i in range(count)], abs=1e-6)


@pytest.mark.parametrize("clip, count", [(1.28, 7), (0.4, 7), (2.4, 9), (6.4, 30)])
def test_a_recording_of_whole_clips_has_no_empty_one_behind(clip, count):
    # 7 x 1.28 s = 8.96 s, but 8.96 / 1.28 is a little above 7 in floating point.
    assert len(cut_clips([Recording(SAMPLE, round(clip * count, 3), ())], clip)) == count


def test_every_clip_of_a_recording_of_whole_clips_can_be_encoded(encoder, tmp_path):
    jsonl = write_recording(tmp_path, dialogue(1)[: 24 * 8960])
    clips = cut_clips(read_manifest(jsonl), 1.28)
    assert (encoder(1.28).encode(clips).codes[:, 1:] >= 0).all()


@pytest.mark.parametrize("rate, extra", [(24000, 1), (44100, 1), (48000, 1), (48000, 2)])
def test_a_recording_a_sample_longer_than_whole_clips_can_be_encoded(encoder, tmp_path, rate, extra):
    # The rest may be less than a sample at Mimi's rate.
    samples = np.tile(dialogue(1), (3, 1))[: round(8.96 * rate) + extra]
    clips = cut_clips(read_manifest(write_recording(tmp_path, samples, rate)), 1.28)
    codes = encoder(1.28).encode(clips).codes
    assert codes.shape[0] in (7, 8)
    assert (codes[:, 1:, 0] >= 0).all()


def test_a_list_that_rounds_a_duration_up_gives_no_clip_without_audio(encoder, tmp_path):
    # Lists with rounded durations are accepted (0.1 s), here 12.8 s of audio called 12.85 s.
    jsonl = write_recording(tmp_path, dialogue(1)[: 24 * 12800])
    jsonl.write_text(jsonl.read_text().replace("12.8", "12.85"))
    codes = encoder(6.4).encode(cut_clips(read_manifest(jsonl), 6.4)).codes
    assert (codes[:, 1:, 0] >= 0).all()


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_each_epoch_has_every_clip_once_in_its_own_order():
    drawn = take(clip_order(7, seed=3, shuffle=True), 28)
    epochs = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_the_seeds():
    orders = [take(clip_order(20, seed, shuffle=True), 40) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_does_not_touch_the_global_generator():
    before = torch.random.get_rng_state()
    take(clip_order(20, 0, shuffle=True), 40)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_shuffling_the_order_is_the_lists():
    assert take(clip_order(3, seed=5, shuffle=False), 8) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("start", [1, 6, 7, 20])
def test_the_order_continues_exactly_from_any_position(start):
    whole = take(clip_order(7, seed=3, shuffle=True), 40)
    assert take(clip_order(7, seed=3, shuffle=True, start=start), 40 - start) == whole[start:]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_global_order(encoder, world):
    clips = cut_clips(read_manifest(SAMPLE / "train.jsonl"), 2.56)
    one = encoder(2.56)
    alone = take(training_batches(one, clips, Sampling(4, 5)), 12)
    ranks = [
        take(training_batches(one, clips, Sampling(4 // world, 5, True, rank, world)), 12)
        for rank in range(world)
    ]
    for whole, *shares in zip(alone, *ranks, strict=True):
        # Process r holds positions r, r + world, ... of the batch that one process has.
        assert whole.clips == [clip for row in zip(*(s.clips for s in shares), strict=True) for clip in row]
        for rank, share in enumerate(shares):
            assert torch.equal(share.codes, whole.codes[rank::world])
    assert len({clip for batch in alone for clip in batch.clips}) == len(clips)


def test_training_without_clips_is_an_error(encoder):
    with pytest.raises(ValueError, match="there are no clips to train on"):
        next(training_batches(encoder(2.56), [], Sampling(2, 0)))
