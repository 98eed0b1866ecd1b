"""A damaged block of FLAC in the middle of a file is an error, never sound that is early for its words."""

import numpy as np
import pytest
import soundfile
import sphn
from data_sets import SAMPLE, copy_sample
from prepared_data import run_prepare

from finetune.data.audio import read_samples
from finetune.data.levels import measure
from finetune.data.prepared import PreparedSet
from finetune.data.recording import Recording

FLAC = SAMPLE / "audio" / "dialogue_4.flac"  # 7.68 s
CROP_SEC = 1.28
STARTS = [float(np.float32(number * CROP_SEC)) for number in range(6)]
PER_CLIP = ("data.encode=per_clip", f"duration_sec={CROP_SEC}")


def damaged(at: int, kind: str) -> bytes:
    content = bytearray(FLAC.read_bytes())
    match kind:
        case "flipped":
            content[at] ^= 4
        case "zeros":
            content[at : at + 600] = bytes(600)
        case "missing":
            del content[at : at + 40]
        case "inserted":
            content[at:at] = b"x" * 40
    return bytes(content)


@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_of_sound_files_crops_are_those_of_moshi_finetunes_reader(tmp_path, rate, subtype):
    path = tmp_path / "a.flac"
    rng = np.random.default_rng(0)
    soundfile.write(path, rng.uniform(-1, 1, (rate * 5 + 77, 2)), rate, subtype=subtype)
    recording = Recording(path, 5 + 77 / rate, ())
    for start in [0.0, *rng.uniform(0, 4.8, 20), *np.arange(0, 4.8, 0.37, np.float32)]:
        length = float(rng.choice([0.16, 0.1234567, 100.0]))
        padded, count = sphn.FileReader(str(path)).decode_with_padding(float(start), length)
        assert np.array_equal(read_samples(recording, rate, float(start), length), padded[:, :count])


@pytest.mark.parametrize("kind", ["flipped", "zeros", "missing", "inserted"])
def test_no_crop_is_silently_another(tmp_path, kind):
    path = tmp_path / "a.flac"
    good = Recording(FLAC, 7.68, ())
    crops = {start: read_samples(good, 24000, start, CROP_SEC) for start in STARTS}
    size = FLAC.stat().st_size
    for at in np.random.default_rng(0).integers(size // 5, size * 4 // 5, 12).tolist():
        path.write_bytes(damaged(at, kind))
        refused = 0
        for start, expected in crops.items():
            try:
                found = read_samples(Recording(path, 7.68, ()), 24000, start, CROP_SEC)
            except ValueError:
                refused += 1
            else:
                assert np.array_equal(found, expected)
        assert refused >= 1
        padded, count = sphn.FileReader(str(path)).decode_with_padding(0, 7.68)
        assert not np.array_equal(padded[:, :count], read_samples(good, 24000))  # what moshi-finetune reads
        levels = measure(path)
        assert levels.error is not None
        assert levels.duration_sec == pytest.approx(7.68 * at / size, abs=1.5)


def test_clips_of_a_damaged_file_are_not_prepared(tmp_path, tiny_base):
    data = copy_sample(tmp_path / "data", (3, 4))
    sound = PreparedSet(run_prepare(tmp_path / "sound", f"data.train={data}", *PER_CLIP)).recording(1)
    (data.parent / FLAC.name).write_bytes(damaged(FLAC.stat().st_size // 2, "zeros"))
    with pytest.raises(ValueError, match=f"{FLAC.name} cannot be read .*lost sync"):
        run_prepare(tmp_path / "out", f"data.train={data}", *PER_CLIP)
    skip = ("data.on_error=skip", "data.max_error_fraction=0.6")
    prepared = PreparedSet(run_prepare(tmp_path / "skipped", f"data.train={data}", *PER_CLIP, *skip))
    assert [lost.rpartition("/")[2] for lost in prepared.lost] == [FLAC.name]
    kept = 0
    for number in range(len(STARTS)):
        try:
            codes = prepared.recording(1).crop(number)
        except ValueError:
            continue
        kept += 1
        assert codes.equal(sound.crop(number))
    assert 3 <= kept < len(STARTS)
