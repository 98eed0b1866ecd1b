"""Lists and prepared folders are drawn together by weight, as if all were lists."""

import itertools

import pytest
from prepared_data import run_prepare, write_recordings
from training import CPU, tiny_config

from finetune.data.bad_input import BadInput
from finetune.train import build_parts, make_batches, read_clips


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return [write_recordings(tmp_path_factory.mktemp(name), lengths) for name, lengths in LISTS.items()]


LISTS = {"a": [20, 9, 33], "b": [17, 40]}


@pytest.mark.parametrize("carried", [False, True])
def test_a_mix_of_a_list_and_a_prepared_folder_has_the_batches_of_two_lists(lists, tmp_path, carried):
    folder = run_prepare(tmp_path / "prepared", f"data.train={lists[1]}")
    settings = ("data.encode=whole", f"ttt.persistent_states={str(carried).lower()}", "ttt.mini_batch_size=8")
    drawn = []
    for other in (lists[1], folder):
        config = tiny_config(tmp_path / "run", f"data.train='{lists[0]}:1,{other}:3'", *settings)
        sources, valid = read_clips(config, BadInput())
        assert [source.weight for source in sources] == [1, 3]
        parts = build_parts(config, valid, CPU)
        batches = make_batches(config, parts.encoder, sources, CPU)
        drawn.append([batch.codes.tolist() for batch in itertools.islice(batches, 6)])
    assert drawn[0] == drawn[1]
    assert len({str(codes) for codes in drawn[0]}) > 3


def test_a_prepared_folder_is_not_mono(lists, tmp_path):
    folder = run_prepare(tmp_path / "prepared", f"data.train={lists[1]}")
    config = tiny_config(tmp_path / "run", f"data.train=mono:{folder}")
    with pytest.raises(ValueError, match="holds both streams"):
        read_clips(config, BadInput())


def test_a_mix_by_weight_is_not_prepared_as_one(lists, tmp_path):
    with pytest.raises(ValueError, match="prepare each source by itself"):
        run_prepare(tmp_path / "prepared", f"data.train='{lists[0]}:1,{lists[1]}:3'")
