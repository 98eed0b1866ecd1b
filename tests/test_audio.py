"""Audio of any format and rate becomes the samples of two channels; what cannot is an error that names it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import sphn
from training import dialogue

from finetune.data.audio import SPHN, check_audio, read_header, read_samples
from finetune.data.recording import Recording

AUDIO = dialogue(4)[96000:134400]  # 1.6 s of speech

# (file, options of soundfile.write, largest error of a sample), by who decodes them.
BY_SPHN = [
    ("a.wav", {"subtype": "PCM_U8"}, 8e-3),
    ("a.wav", {"subtype": "PCM_16"}, 4e-5),
    ("a.wav", {"subtype": "PCM_24"}, 2e-7),
    ("a.wav", {"subtype": "PCM_32"}, 2e-7),
    ("a.wav", {"subtype": "FLOAT"}, 0),
    ("a.wav", {"subtype": "DOUBLE"}, 0),
    ("a.wav", {"subtype": "ULAW"}, 2e-2),
    ("a.wav", {"format": "WAVEX"}, 4e-5),
    ("a.mp3", {"format": "MP3"}, None),
    ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, None),
    ("a.aiff", {}, 4e-5),
    ("a.caf", {"subtype": "PCM_16"}, 4e-5),
]
BY_LIBSNDFILE = [
    ("a.flac", {"subtype": "PCM_S8"}, 8e-3),
    ("a.flac", {"subtype": "PCM_24"}, 2e-7),
    ("wrong.mp3", {"format": "FLAC"}, 4e-5),
    ("a.opus", {"format": "OGG", "subtype": "OPUS"}, None),
    ("a.au", {}, 4e-5),
    ("a.w64", {}, 4e-5),
    ("a.wav", {"format": "RF64"}, 4e-5),
    ("a.wav", {"subtype": "IMA_ADPCM"}, 6e-2),
    ("wrong.wav", {"format": "OGG", "subtype": "OPUS"}, None),
]


@pytest.mark.parametrize("name, options, error", BY_SPHN + BY_LIBSNDFILE)
def test_formats(tmp_path, name, options, error):
    path = tmp_path / name
    soundfile.write(path, AUDIO, 24000, **options)
    assert (read_header(path).decoder == SPHN) == ((name, options, error) in BY_SPHN)
    recording = Recording(path, check_audio(path, 2), ())
    assert recording.duration_sec == pytest.approx(1.6, abs=0.1)
    whole = read_samples(recording, 24000)
    crop = read_samples(recording, 24000, start_sec=0.64, duration_sec=0.32)
    assert whole.dtype == crop.dtype == np.float32
    assert crop.shape == (2, 7680)
    end = read_samples(recording, 24000, start_sec=1.28, duration_sec=0.64)
    assert end.shape[0] == 2
    if error is None:  # codecs with loss: the same sound, less alike
        # MP3 has 1105 samples of its own in front, which sphn leaves there as moshi-finetune does.
        late = whole[:, 1105:] if options["format"] == "MP3" else whole
        errors = late[:, 3000:35000] - AUDIO.T[:, 3000:35000]
        assert np.sqrt(np.mean(errors**2)) < 0.5 * np.sqrt(np.mean(AUDIO**2))
        return
    assert np.abs(whole[:, :38400] - AUDIO.T).max() <= error
    assert np.abs(crop - AUDIO.T[:, 15360:23040]).max() <= error
    assert np.abs(end[:, :7680] - AUDIO.T[:, 30720:]).max() <= error


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 96000, 192000])
def test_rates(tmp_path, rate):
    samples = sphn.resample(np.ascontiguousarray(AUDIO.T), 24000, rate).T
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    recording = Recording(path, check_audio(path, 2), ())
    whole = read_samples(recording, 24000)
    assert whole.shape == (2, len(samples) * 24000 // rate)
    crop = read_samples(recording, 24000, 0.64, 0.64)
    assert np.array_equal(crop, sphn.read(str(path), 0.64, 0.64, 24000)[0])  # moshi-finetune's loader
    band = np.abs(np.fft.rfft(whole[0], 38400))[: min(rate, 24000) * 38400 // 60000]
    expected = np.abs(np.fft.rfft(AUDIO[:, 0], 38400))[: len(band)]
    assert np.linalg.norm(band - expected) < 0.2 * np.linalg.norm(expected)


def test_the_end_of_a_recording_at_another_rate_is_that_of_moshi_finetunes_loader(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.repeat(AUDIO, 2, axis=0)[:70001], 48000)
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text(f'{{"path": "a.wav", "duration": {70001 / 48000}}}\n')
    loader = sphn.dataset_jsonl(
        str(jsonl), duration_sec=0.5, num_threads=1, sample_rate=24000, pad_last_segment=True
    )
    recording = Recording(path, 70001 / 48000, ())
    theirs = list(loader.seq(skip=0, step_by=1))
    assert [item["start_time_sec"] for item in theirs] == [0.0, 0.5, 1.0]
    for item in theirs:
        ours = read_samples(recording, 24000, item["start_time_sec"], 0.5)
        assert np.array_equal(ours, item["data"][:, : item["unpadded_len"]])


def spoil_channels(path):
    soundfile.write(path, np.repeat(AUDIO, 3, axis=1), 24000)


def spoil_nan(path):
    audio = AUDIO.copy()
    audio[18000] = np.nan
    soundfile.write(path, audio, 24000, subtype="FLOAT")


def spoil_nan_at_another_rate(path):
    audio = AUDIO.copy()
    audio[:] = np.inf  # resampled, sphn panics
    soundfile.write(path, audio, 24000, subtype="FLOAT")
    data = bytearray(path.read_bytes())
    data[24:28] = (48000).to_bytes(4, "little")
    path.write_bytes(data)


def spoil_rate(path):
    data = bytearray(path.read_bytes())
    data[24:28] = (3_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)


def spoil_length(path):
    path.write_bytes(path.read_bytes()[:60_000])


def spoil_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda path: path.unlink(), "is no audio file that can be read .*No such file"),
        (spoil_folder, "is no audio file that can be read"),
        (lambda path: path.write_bytes(b""), "is no audio file that can be read"),
        (spoil_length, "holds no audio at 0.640 s that can be decoded|ends before the 1.600 s"),
        (spoil_channels, r"has 6 channel\(s\); expected stereo, left Moshi and right the user"),
        (spoil_nan, "holds NaN or infinite samples; repair or remove it"),
        (spoil_rate, "which cannot be so; repair or remove it|is no audio file"),
    ],
)
def test_a_file_that_breaks_after_it_was_listed(tmp_path, spoil, match):
    path = tmp_path / "a.wav"
    soundfile.write(path, AUDIO, 24000)
    recording = Recording(path, check_audio(path, 2), ())
    spoil(path)
    with pytest.raises(ValueError, match=match) as caught:
        read_samples(recording, 24000, 0.64, 0.64)
    assert str(path) in str(caught.value)


def test_infinite_samples_are_found_before_they_are_resampled(tmp_path):
    path = tmp_path / "a.wav"
    spoil_nan_at_another_rate(path)
    with pytest.raises(ValueError, match="a.wav holds NaN or infinite samples"):
        read_samples(Recording(path, 0.8, ()), 24000)


def test_what_a_panic_of_the_reader_says_is_an_error_that_names_the_file():
    # Rust's strings cannot hold this name; sphn panics, which is no Exception.
    path = Path("\ud800.wav")
    with pytest.raises(ValueError, match="is no audio file that can be read"):
        read_header(path)
