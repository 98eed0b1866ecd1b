"""Orders are permutations, the same for every number of processes and threads, and go on where they were."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared_data import CHUNK_SEC, run_prepare, write_recordings
from test_data import SPECIAL
from training import SAMPLE

from finetune.data.batches import Batches, chunk_batches, training_batches
from finetune.data.chunks import ChunkEncoder, by_recording
from finetune.data.clips import Clip, ClipEncoder, PreparedClips, cut_clips
from finetune.data.interleaver import TextLayout, text_slice, text_stream
from finetune.data.manifest import Recording, Word
from finetune.data.order import ClipDraw, EndlessOrder, Permutation, RowDraw, Sampling
from finetune.data.prepared import PreparedSet
from moshi_ttt.loading import load_mimi, load_tokenizer


def examples(count: int):
    """Settings of a property: always the same examples, however slow the machine is."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow, derandomize=True)


few = examples(60)
SEEDS = st.integers(-(1 << 70), 1 << 70)


@few
@given(size=st.integers(1, 300), seed=SEEDS, epoch=st.integers(0, 1 << 40))
def test_every_number_comes_once(size, seed, epoch):
    order = Permutation(size, seed, epoch)
    assert sorted(order[position] for position in range(size)) == list(range(size))


def test_orders_are_spread_evenly():
    """Chi-square of where numbers come over many orders: no worse than chance at 1 in 10,000."""
    size, orders = 12, 3000
    counts = [[0] * size for _ in range(size)]
    for epoch in range(orders):
        order = Permutation(size, 7, epoch)
        for position in range(size):
            counts[position][order[position]] += 1
    expected = orders / size
    statistic = sum((count - expected) ** 2 / expected for row in counts for count in row)
    assert statistic < 185  # the 0.9999 quantile for 11 x 11 degrees of freedom
    neighbours = sum(
        abs(order[p + 1] - order[p]) == 1
        for order in (Permutation(1000, seed, 0) for seed in range(5))
        for p in range(999)
    )
    assert neighbours < 30  # 2 of 1000 by chance: about 10


def test_an_order_of_a_billion_takes_no_memory():
    order = EndlessOrder(1_000_000_000, 0, shuffle=True)
    drawn = [order[position] for position in range(3_000_000_000, 3_000_000_500)]
    assert len(set(drawn)) == 500
    assert max(drawn) > 900_000_000
    assert min(drawn) < 100_000_000


def recordings_of(lengths: list[int]) -> list[Clip]:
    """Chunks of recordings of so many chunks each."""
    listed = [
        Recording(SAMPLE / f"{index}.wav", length * CHUNK_SEC, ()) for index, length in enumerate(lengths)
    ]
    return cut_clips(listed, CHUNK_SEC)


ROWS = st.sampled_from(
    [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 3), (1, 3, 2), (3, 2, 2)]
)


@few
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    layout=ROWS,
    seed=SEEDS,
    shuffle=st.booleans(),
)
def test_no_chunk_is_dropped_or_doubled(lengths, layout, seed, shuffle):
    batch_size, slots, world = layout
    chunks = recordings_of(lengths)
    recordings = by_recording(chunks)
    draws = [
        RowDraw(recordings, slots, Sampling(batch_size, seed, shuffle, rank, world)) for rank in range(world)
    ]
    epochs = 3
    num_rows = batch_size * slots * world
    rows: list[list[Clip]] = [[] for _ in range(num_rows)]
    while draws[0].following < epochs * len(lengths) + num_rows:
        step = [clip for _ in range(slots) for draw in draws for clip in draw.draw()]
        for row, clip in zip(rows, step, strict=True):
            row.append(clip)
    begun: list[Recording] = []
    seen: dict[int, list[Clip]] = {}
    for step in zip(*rows, strict=True):
        begun += [clip.recording for clip in step if clip.is_first]
    for row in rows:
        for before, clip in itertools.pairwise(row):
            whole = recordings[int(before.recording.path.stem)]
            # A row goes through a recording without a gap, and on to the start of another at its end alone.
            assert clip == whole[whole.index(before) + 1] if before != whole[-1] else clip.is_first
            seen.setdefault(id(clip), []).append(clip)
    # Recordings are begun in one order, in which each epoch has every one once.
    order = EndlessOrder(len(lengths), seed, shuffle)
    assert [int(r.path.stem) for r in begun] == [order[p] for p in range(len(begun))]
    for epoch in range(epochs):
        names = [r.path.stem for r in begun[epoch * len(lengths) : (epoch + 1) * len(lengths)]]
        assert sorted(names) == sorted(str(index) for index in range(len(lengths)))


@few
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    layouts=st.tuples(st.sampled_from([(4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]), ROWS),
    seed=SEEDS,
    steps=st.integers(0, 20),
)
def test_a_position_goes_on_with_any_number_of_processes(lengths, layouts, seed, steps):
    chunks = recordings_of(lengths)
    recordings = by_recording(chunks)

    def rows_of(layout):
        batch, slots, world = layout
        return [
            RowDraw(recordings, slots, Sampling(batch, seed, True, rank, world)) for rank in range(world)
        ], slots

    def clips_of(layout):
        batch, slots, world = layout
        return [
            ClipDraw(chunks, Sampling(batch * slots, seed, True, rank, world)) for rank in range(world)
        ], 1

    def step(draws, slots, interleaved):
        drawn = [[draw.draw() for draw in draws] for _ in range(slots)]
        if interleaved:  # process r has positions r, r + world, ...
            return [clip for slot in drawn for row in zip(*slot, strict=True) for clip in row]
        return [clip for slot in drawn for part in slot for clip in part]

    for make, interleaved in ((rows_of, False), (clips_of, True)):
        saving, slots = make((4, 1, 1))
        for _ in range(steps):
            step(saving, slots, interleaved)
        states = [draw.state_dict() for draw in saving]
        expected = [step(saving, slots, interleaved) for _ in range(6)]
        going_on, slots = make(layouts[0])
        for draw in going_on:
            draw.load_state_dict(states[0])
        assert [step(going_on, slots, interleaved) for _ in range(6)] == expected
        assert len({str(draw.state_dict()) for draw in going_on}) == 1


def test_a_position_within_a_step_goes_on_with_the_same_micro_batches():
    recordings = by_recording(recordings_of([2, 3, 1]))
    one = RowDraw(recordings, 4, Sampling(1, 0))
    one.draw()
    state = one.state_dict()
    other = RowDraw(recordings, 4, Sampling(1, 0))
    other.load_state_dict(state)
    assert [one.draw() for _ in range(9)] == [other.draw() for _ in range(9)]
    with pytest.raises(ValueError, match="is 1 rows into a step, which is within a micro-batch of this run"):
        RowDraw(recordings, 2, Sampling(2, 0)).load_state_dict(state)


@pytest.mark.parametrize(
    "sampling, data, name",
    [(Sampling(2, 1), "this", "seed"), (Sampling(2, 0), "other", "data"), (Sampling(3, 0), "this", "rows")],
)
def test_a_position_of_something_else_is_refused(sampling, data, name):
    recordings = by_recording(recordings_of([2, 3, 1]))
    state = RowDraw(recordings, 1, Sampling(2, 0), "this").state_dict()
    with pytest.raises(ValueError, match=f"the saved position in the data is of {name}="):
        RowDraw(recordings, 1, sampling, data).load_state_dict(state)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("prepared")
    data = write_recordings(folder / "recordings")
    return PreparedClips(PreparedSet(run_prepare(folder / "whole", f"data.train={data}")), CHUNK_SEC)


@pytest.fixture(scope="module")
def encoder(tiny_base):
    clips = ClipEncoder(
        load_mimi(tiny_base, "cpu"), load_tokenizer(tiny_base), SPECIAL, CHUNK_SEC, TextLayout()
    )
    return ChunkEncoder(clips)


def drawn(batches: list[Batches], count: int) -> list:
    """Codes of all processes, step by step."""
    return [[next(one).codes.tolist() for one in batches] for _ in range(count)]


@examples(25)
@given(
    world=st.sampled_from([1, 2, 4]),
    workers=st.integers(0, 3),
    slots=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
    steps=st.integers(0, 9),
)
def test_threads_and_processes_change_nothing(prepared, encoder, world, workers, slots, seed, steps):
    """8 rows a step, spread over processes, micro-batches and threads; then saved and gone on from alone."""
    batch = 8 // (world * slots)

    def make(batch, slots, world, workers):
        ranks = range(world)
        clips = [
            training_batches(encoder, prepared, Sampling(batch * slots, seed, True, r, world), workers)
            for r in ranks
        ]
        rows = [
            chunk_batches(encoder, prepared, slots, Sampling(batch, seed, True, r, world), workers)
            for r in ranks
        ]
        return clips, rows

    alone_clips, alone_rows = make(8, 1, 1, 0)
    spread_clips, spread_rows = make(batch, slots, world, workers)
    for _ in range(steps):
        expected = next(alone_clips[0]).codes.tolist()
        found = [next(one).codes.tolist() for one in spread_clips]
        assert [row for rows in zip(*found, strict=True) for row in rows] == expected
        expected = next(alone_rows[0]).codes.tolist()
        found = [row for _ in range(slots) for one in spread_rows for row in next(one).codes.tolist()]
        assert found == expected
    going_on = make(8, 1, 1, 2)
    for one, saved in zip(going_on, (spread_clips, spread_rows), strict=True):
        one[0].load_state_dict(saved[-1].state_dict())
    assert drawn(going_on[0], 3) == drawn(alone_clips, 3)
    assert drawn(going_on[1], 3) == drawn(alone_rows, 3)
    for batches in (*spread_clips, *spread_rows, *going_on[0], *going_on[1]):
        batches.close()


WORDS = st.lists(
    st.tuples(
        st.sampled_from(["not", "amiable", "was", "a\nlong amiable line"]),
        st.integers(0, 90).map(lambda n: n * 0.04),
        st.sampled_from([0.0, 0.1]),
        st.sampled_from(["SPEAKER_MAIN", "SPEAKER_USER"]),
    ),
    max_size=14,
)


LAYOUTS = [
    TextLayout(),
    TextLayout(keep_main_only=False),
    TextLayout(keep_main_only=False, use_bos_eos=True),
    TextLayout(keep_and_shift=True),
    TextLayout(audio_delay_sec=0.2),
    TextLayout(audio_delay_sec=-0.2),
    TextLayout(in_word_padding=5),
]


@examples(400)
@given(
    words=WORDS,
    num_frames=st.integers(1, 45),
    edges=st.tuples(st.integers(0, 45), st.integers(0, 45)),
    layout=st.sampled_from(LAYOUTS),
)
def test_a_slice_of_the_text_is_that_of_the_whole(tiny_base, words, num_frames, edges, layout):
    tokenizer = load_tokenizer(tiny_base)
    said = sorted((Word(t, s, s + length, who) for t, s, length, who in words), key=lambda word: word.start)
    first, stop = sorted(min(edge, num_frames) for edge in edges)
    whole = text_stream(said, num_frames, 12.5, tokenizer, SPECIAL, layout)
    part = text_slice(said, first, stop, num_frames, 12.5, tokenizer, SPECIAL, layout)
    assert part.tolist() == whole[first:stop].tolist()
