"""Training that carries state through recordings: whose chunk is whose, and what a run makes of it."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import soundfile
import torch
from test_distributed import free_port
from training import (
    CPU,
    TINY,
    dialogue,
    losses,
    records,
    run,
    start_python,
    tiny_config,
    train_here,
    write_prompt,
)

from finetune.data.batches import chunk_batches
from finetune.data.chunks import ChunkEncoder, by_recording
from finetune.data.clips import cut_clips
from finetune.data.interleaver import text_stream
from finetune.data.manifest import read_manifest
from finetune.data.order import Sampling, chunk_order
from finetune.loss import LossWeights, loss_sums, weighted_targets
from finetune.run_dir import Metrics
from finetune.train import ClipSource, build_parts, make_batches
from finetune.trainer import Trainer
from finetune.validation import carried_validation_loss, evaluation_mode
from moshi_ttt.carried import CarriedState, forward_chunk, fresh_state
from moshi_ttt.loading import load_mimi
from moshi_ttt.streaming import encoding

PERSISTENT = ("ttt.persistent_states=true", "duration_sec=0.64", "ttt.mini_batch_size=4", "optim.lr=1e-3")
FRAME = 1920  # samples
CHUNK = 8  # frames
LENGTHS = (20, 5, 27.5, 8, 13)  # frames of the recordings: whole, partial and single chunks
CHUNKS = (3, 1, 4, 1, 2)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A jsonl of recordings of different lengths, with words."""
    folder = tmp_path_factory.mktemp("recordings")
    lines = []
    for index, frames in enumerate(LENGTHS):
        samples = dialogue(index % 4 + 1)[24000 * 2 :][: int(frames * FRAME)]
        soundfile.write(folder / f"{index}.wav", samples, 24000)
        words = [
            ["yes", [start, start + 0.1], "SPEAKER_MAIN"] for start in np.arange(0.1, frames / 12.6, 0.3)
        ]
        (folder / f"{index}.json").write_text(json.dumps({"alignments": words}))
        lines.append(json.dumps({"path": f"{index}.wav", "duration": len(samples) / 24000}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def trainer_of(run_dir, recordings, *overrides: str) -> Trainer:
    config = tiny_config(run_dir, *PERSISTENT, f"data.train={recordings}", "data.valid=null", *overrides)
    chunks = cut_clips(read_manifest(config.data.train), config.duration_sec)
    parts = build_parts(config, chunks, CPU)
    run_dir.mkdir()
    batches = make_batches(config, parts.encoder, [ClipSource(1.0, chunks)], CPU)
    return Trainer(config, parts, batches, CPU, run_dir, Metrics(run_dir, config))


def row_of(state: CarriedState, row: int) -> list[torch.Tensor]:
    return [t.unflatten(0, (state.position.shape[0], -1))[row] for t in state.tensors()]


def assert_close(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rows_follow_their_recordings(recordings):
    chunks = cut_clips(read_manifest(recordings), CHUNK / 12.5)
    grouped = by_recording(chunks)
    assert [len(group) for group in grouped] == list(CHUNKS)
    order = chunk_order(grouped, 3, seed=0, shuffle=True)
    steps = [next(order) for _ in range(44)]
    for row in range(3):
        last = None
        for step in steps:
            chunk = step[row]
            if chunk.is_first:
                assert (
                    last is None
                    or last == grouped[[g[0].recording for g in grouped].index(last.recording)][-1]
                )
            else:
                assert last is not None
                assert last.recording == chunk.recording
                assert chunk.start_sec - last.start_sec == pytest.approx(0.64, abs=1e-6)
            last = chunk
    # 132 chunks are 12 epochs of 11; rows are in the middle of something, so all were drawn 11 times or more.
    drawn = [chunk.recording.path.name for step in steps for chunk in step if chunk.is_first]
    assert all(drawn.count(f"{index}.wav") >= 11 for index in range(len(LENGTHS)))
    again = chunk_order(grouped, 3, seed=0, shuffle=True)
    assert [next(again) for _ in range(44)] == steps
    other = chunk_order(grouped, 3, seed=1, shuffle=True)
    assert [next(other) for _ in range(44)] != steps


def test_rows_are_the_same_however_they_are_spread(tmp_path, recordings):
    config = tiny_config(tmp_path, *PERSISTENT)
    parts = build_parts(config, [], CPU)
    encoder = ChunkEncoder(parts.encoder)
    chunks = cut_clips(read_manifest(recordings), config.duration_sec)

    def drawn(batch_size, num_microbatches, world, steps=5):
        ranks = [
            chunk_batches(encoder, chunks, num_microbatches, Sampling(batch_size, 3, True, rank, world))
            for rank in range(world)
        ]
        return [
            [clip for _ in range(num_microbatches) for rank in ranks for clip in next(rank).clips]
            for _ in range(steps)
        ]

    assert drawn(4, 1, 1) == drawn(2, 2, 1) == drawn(2, 1, 2) == drawn(1, 2, 2) == drawn(1, 1, 4)


def test_chunks_are_slices_of_the_whole_recording(tmp_path, recordings):
    config = tiny_config(tmp_path, *PERSISTENT)
    clips = build_parts(config, [], CPU).encoder
    encoder = ChunkEncoder(clips)
    for recording, frames in zip(read_manifest(recordings), np.ceil(LENGTHS).astype(int), strict=True):
        batch = encoder.encode(cut_clips([recording], config.duration_sec))
        codes = torch.cat(list(batch.codes), dim=-1)
        samples, _ = soundfile.read(recording.path, dtype="float32")
        with torch.no_grad():
            audio = clips.mimi.encode(torch.from_numpy(samples.T)[:, None].contiguous())
        assert audio.shape[-1] == frames
        assert torch.equal(codes[1:, :frames], audio.flatten(0, 1))
        text = text_stream(recording.words, frames, 12.5, clips.tokenizer, clips.special, clips.layout)
        assert torch.equal(codes[0, :frames], text)
        assert len(set(text.tolist())) > 2
        assert (codes[:, frames:] == -1).all()
        assert codes.shape[-1] % CHUNK == 0


def test_a_long_recording_has_the_codes_of_one_call(tmp_path):
    # 13.8 s: more than is given to the codec at once, and more than its attention reaches.
    config = tiny_config(tmp_path, *PERSISTENT)
    clips = build_parts(config, [], CPU).encoder
    recording = read_manifest(config.data.train)[0]
    codes = torch.cat(list(ChunkEncoder(clips).encode(cut_clips([recording], 0.64)).codes), dim=-1)
    with torch.no_grad():
        whole = clips.mimi.encode(torch.from_numpy(dialogue(1).T)[:, None].contiguous()).flatten(0, 1)
    assert whole.shape[-1] == 173
    # A tie that rounding decides may differ; with Mimi's own cache one in a hundred does.
    assert (codes[1:, :173] != whole).float().mean() < 1e-3


@torch.no_grad()
def test_audio_encoded_in_blocks_is_audio_encoded_at_once(tiny_base):
    mimi = load_mimi(tiny_base, "cpu")
    samples = np.concatenate([dialogue(1), dialogue(2)])[: 320 * FRAME]
    audio = torch.from_numpy(samples.T)[:, None].contiguous()
    whole = mimi.encode(audio)
    with encoding(mimi, 2, 16):
        blocks = torch.cat([mimi.encode(block) for block in audio.split(16 * FRAME, -1)], dim=-1)
    # A code in some thousands is a tie that rounding decides. With Mimi's own cache it is one in 170.
    assert (blocks != whole).float().mean() < 1e-3


@pytest.mark.parametrize("rows, micro", [(3, 1), (1, 3)])
def test_every_row_carries_its_own_recording(tmp_path, recordings, rows, micro):
    # Rates so small that no weight moves, so that each row can be followed by itself.
    rates = ("optim.lr=1e-30", "optim.ttt_lr=1e-30", "optim.gate_lr=1e-30")
    sizes = (f"batch_size={rows}", f"num_microbatches={micro}", "max_steps=6")
    trainer = trainer_of(tmp_path / "run", recordings, *rates, *sizes)
    model, encoder = trainer.parts.model, ChunkEncoder(trainer.parts.encoder)
    trainer.train()
    order = chunk_order(by_recording(trainer.parts.valid_clips), 3, 0, True)
    steps = [next(order) for _ in range(6)]
    assert trainer.carried is not None
    ended = set()
    with torch.no_grad():
        for row in range(3):
            alone = fresh_state(model, 1)
            for step in steps:
                if step[row].is_first:
                    alone = fresh_state(model, 1)
                _, alone = forward_chunk(model, encoder.encode([step[row]]).codes, alone)
            slot, place = divmod(row, rows)
            assert_close(row_of(trainer.carried.states[slot], place), row_of(alone, 0))
            ended.add(int(alone.position))
    assert len(ended) > 1  # rows are at different places


def test_a_run_repeats_itself_and_evaluating_leaves_it_alone(tmp_path, recordings):
    data = (f"data.train={recordings}", f"data.valid={recordings}", "max_steps=5", "checkpoint.every_steps=0")
    never = run(tmp_path / "never", *PERSISTENT, *data)
    prompt = write_prompt(tmp_path / "prompt.wav", 19200)
    always = run(tmp_path / "always", *PERSISTENT, *data, "eval.every_steps=1", f"eval.prompt={prompt}")
    other = run(tmp_path / "other", *PERSISTENT, *data, "seed=1")
    assert losses(never) == losses(always)
    assert len(losses(never)) == 5
    assert losses(never) != losses(other)
    assert [record["step"] for record in records(always, "valid")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("setting", ["gradient_checkpointing=true", "batch_size=1 num_microbatches=2"])
def test_how_a_step_is_computed_changes_no_loss(tmp_path, recordings, setting):
    data = (f"data.train={recordings}", "data.valid=null", "max_steps=5")
    plain = run(tmp_path / "plain", *PERSISTENT, *data)
    other = run(tmp_path / "other", *PERSISTENT, *data, *setting.split())
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)
    norms = [[record["grad_norm"] for record in records(path, "train")] for path in (plain, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_loss_of_a_step_is_that_of_its_part_of_the_whole_recording(tmp_path, recordings):
    rates = ("optim.lr=1e-30", "optim.ttt_lr=1e-30", "optim.gate_lr=1e-30")
    sizes = ("data.shuffle=false", "batch_size=1", "max_steps=3")
    trainer = trainer_of(tmp_path / "run", recordings, *rates, *sizes)
    model, weights = trainer.parts.model, trainer.weights
    trainer.train()
    chunks = by_recording(trainer.parts.valid_clips)[0]
    codes = torch.cat(list(ChunkEncoder(trainer.parts.encoder).encode(chunks).codes), dim=-1)[None]
    targets = weighted_targets(model, codes, weights)
    everything = targets.text_weight, targets.audio_weight
    # A codebook delayed by d is predicted d frames later.
    late = [torch.arange(24) + torch.tensor(model.delays[a:b])[:, None] for a, b in ((0, 1), (1, 9))]
    with torch.no_grad():
        output = model(codes)
        for step, record in enumerate(records(tmp_path / "run", "train")):
            targets.text_weight, targets.audio_weight = (
                torch.where(frames // CHUNK == step, weight, 0)
                for frames, weight in zip(late, everything, strict=True)
            )
            expected = (loss_sums(output, targets) / targets.totals()).tolist()
            assert [record["text_loss"], record["audio_loss"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ("mode=ttt", "lora=none", "param_dtype=bfloat16", "gradient_checkpointing=true"),
        ("mode=lora",),
        ("mode=full", "lora=none", "ttt.ssm_layer=ttt_linear"),
        ("mode=lora", "ttt=none", "ttt.persistent_states=true"),
    ],
    ids=" ".join,
)
def test_every_mode_trains(tmp_path, recordings, settings):
    done = run(
        tmp_path / "run", *PERSISTENT, f"data.train={recordings}", "data.valid=null", "max_steps=3", *settings
    )
    assert len(losses(done)) == 3
    assert np.isfinite(losses(done)).all()


def test_mode_frozen_measures(tmp_path, recordings):
    settings = ("mode=frozen", "lora=none", f"data.train={recordings}", f"data.valid={recordings}")
    done = train_here(tiny_config(tmp_path / "run", *PERSISTENT, *settings))
    assert [record["step"] for record in records(done, "valid")] == [0]


def test_the_validation_loss_is_that_of_whole_recordings(tmp_path, recordings):
    trainer = trainer_of(tmp_path / "run", recordings)
    parts, weights = trainer.parts, LossWeights(1.0, 0.5)
    encoder = ChunkEncoder(parts.encoder)
    sums = torch.zeros(4, dtype=torch.float64)
    with evaluation_mode(parts.model):
        for chunks in by_recording(parts.valid_clips):
            codes = torch.cat(list(encoder.encode(chunks).codes), dim=-1)[None]
            targets = weighted_targets(parts.model, codes, weights)
            sums[:2] += loss_sums(parts.model(codes), targets)
            sums[2:] += targets.totals()
    expected = (sums[:2] / sums[2:]).tolist()
    for batch_size in (1, 3):
        measured = carried_validation_loss(
            parts.loss_model, encoder, parts.valid_clips, batch_size, weights, CPU
        )
        assert [measured["text_loss"], measured["audio_loss"]] == pytest.approx(expected, abs=1e-5)


def test_two_processes_train_what_one_does(tmp_path, recordings):
    overrides = dict(item.split("=", 1) for item in (*TINY, *PERSISTENT)) | {
        "data.train": str(recordings),
        "data.valid": str(recordings),
        "max_steps": "4",
        "eval.every_steps": "4",
        "optim.ttt_lr": "1e-3",
        "optim.gate_lr": "1e-3",
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    process = start_python(
        *("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"),
        *("-m", "finetune.train", *arguments, f"run_dir={tmp_path / 'two'}", "batch_size=1"),
    )
    run(tmp_path / "one", *arguments, "batch_size=2")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, two = (records(tmp_path / name, "valid")[0]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)
