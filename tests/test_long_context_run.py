"""The command on long recordings: files, numbers, going on after a kill, sharing the work, the page."""

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from chromium import CHROMIUM
from long_recordings import RATE, chapter, libri_light
from matplotlib.image import imread
from training import compose_config, run, start_python

from configs.share import shard_of
from configs.typed import typed_config
from evaluation.long_context.__main__ import run as evaluate
from evaluation.long_context.codes import CodeReader
from evaluation.long_context.recordings import find_recordings
from evaluation.long_context.settings import LongContextConfig
from finetune.data.interleaver import TextTokens
from inference.likelihood import nll_by_frame
from moshi_ttt.checkpoint import load_checkpoint
from moshi_ttt.loading import load_mimi

SHORT = (
    "max_steps=1",
    "ttt.ttt_layer_context=5",
    "ttt.non_ttt_layer_context=5",
    "ttt.mini_batch_size=4",
    "diagnostics.every_steps=0",
)
COMMON = ("device=cpu", "target_sec=0.8", "bootstrap_draws=200", "contexts=[own,3/9]")
ARMS = ["base", "carried", "reset", "inner_lr_0", "gate_off"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return libri_light(tmp_path_factory.mktemp("data"), speakers=6, seconds=4.4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, private_cache):
    folder = tmp_path_factory.mktemp("runs")
    gates = ("optim.ttt_lr=1e-2", "optim.gate_lr=1e-1", "ttt.gate_init=1")
    return {
        "ttt": run(folder / "ttt", *SHORT, *gates, "lora=none", "mode=ttt"),
        "plain": run(folder / "plain", *SHORT, "ttt=none", "mode=full", "lora=none"),
    }


def config_of(small, output, *overrides):
    needed = (
        f"recordings={small}",
        f"output={output}",
        "device=cpu",
        "target_sec=0.8",
        "bootstrap_draws=200",
    )
    return typed_config(compose_config(*needed, *overrides, name="long_context"), LongContextConfig)


@pytest.fixture(scope="module")
def done(runs, small, tmp_path_factory):
    """The output of a whole run, and its results."""
    output = tmp_path_factory.mktemp("done") / "out"
    evaluate(config_of(small, output, f"checkpoint={runs['ttt']}", "contexts=[own,3/9]"))
    return output, results_of(output)


def results_of(output):
    (path,) = output.glob("results_*.json")
    return json.loads(path.read_text())


def raw(output, arm):
    """Whole recordings' NLLs of an arm, `[8, T]` each."""
    return [np.load(path)["whole"] for path in sorted((output / "raw" / arm).iterdir())]


def test_numbers_are_those_of_the_raw_values(done, small):
    output, found = done
    assert list(found["arms"]) == [*ARMS, *(f"{arm}@3-9" for arm in ARMS)]
    lengths = [recording["frames"] for recording in found["recordings"]]
    carried, reset = raw(output, "carried"), raw(output, "reset")
    assert [nll.shape for nll in carried] == [(8, length) for length in lengths]
    assert carried[0].dtype == np.float32
    w100 = np.array([100, *[1] * 7]) / 107
    arm, reach = found["arms"]["carried"], 16
    assert (arm["windows_frames"], arm["receptive_field_frames"]) == ([5], reach)
    assert found["arms"]["reset"]["reset_frames"] == 16
    assert found["arms"]["base"]["windows_frames"] == [250]
    assert found["arms"]["base@3-9"]["receptive_field_frames"] == 4 * 8
    assert found["arms"]["carried@3-9"]["receptive_field_frames"] == 2 * 2 + 2 * 8
    each = [float((w100 @ (a - b))[reach:].mean()) for a, b in zip(carried, reset, strict=True)]
    pair = found["differences"]["carried - reset"]
    assert pair["beyond"]["w100"][0] == pytest.approx(np.mean(each), abs=2e-6)
    assert each[0] != 0
    low, high = pair["beyond"]["w100"][1:3]
    assert min(each) < low < np.mean(each) < high < max(each)
    bucket = found["buckets"][1]
    assert (bucket["from_frame"], bucket["to_frame"], bucket["to_sec"]) == (16, 23, 1.84)
    semantic = np.mean([nll[0, 16:23].mean() for nll in carried])
    assert arm["curve"]["semantic"][1][0] == pytest.approx(semantic, abs=2e-6)
    assert arm["all"]["codebook 4"][0] == pytest.approx(np.mean([nll[3].mean() for nll in carried]), abs=2e-6)
    flat = found["results"]["long_context"]
    assert flat["carried - reset, beyond,none"] == pair["beyond"]["w100"][0]
    assert flat["carried - reset, beyond, semantic_ci95,none"] == pair["beyond"]["semantic"][1:3]
    assert flat["carried, all_stderr,none"] == arm["all"]["w100"][3]
    assert found["n-samples"]["long_context"] == {"original": 6, "effective": 6}
    assert found["partial"] == ""
    assert all(check["holds"] for check in found["checks"])
    assert {check["found"] for check in found["checks"]} == {"largest difference 0 nats"}
    assert len(found["headlines"]) == 2


def test_raw_values_are_a_pass_over_the_model(done, runs, small):
    output, _ = done
    model = load_checkpoint(runs["ttt"]).model
    lines = [json.loads(line) for path in output.glob("samples_*") for line in path.read_text().splitlines()]
    assert len(lines) == 6 * 10
    line = next(one for one in lines if one["arm"] == "carried" and one["doc_id"] == 2)
    assert (line["speaker"], line["partial"]) == ("102", False)
    file = np.load(output / line["raw"])
    assert {"whole", "prefix 4", "prefix 32", "foreign own", "foreign other", "foreign far"} <= set(file)
    assert file["prefix 4"].shape == (8, 10)
    assert line["w100"]["all"] == pytest.approx(
        (np.array([100, *[1] * 7]) / 107 @ file["whole"]).mean(), abs=1e-5
    )
    reader = CodeReader(
        load_mimi(load_checkpoint(runs["ttt"]).base, "cpu"), TextTokens.of(model), "none", "silence", None
    )
    codes = reader.codes(find_recordings(str(small))[2])[None]
    nll = nll_by_frame(model, codes, 8)[0, 1:].numpy()
    assert np.abs(nll - file["whole"]).max() < 1e-5


CHEAP = ("arms=[carried,reset]", "controls=[foreign]")


@pytest.fixture(scope="module")
def shared(runs, small, tmp_path_factory):
    """A run that two processes shared, and what the first of them returned."""
    output = tmp_path_factory.mktemp("shared") / "out"
    overrides = (f"checkpoint={runs['ttt']}", *CHEAP)
    first = evaluate(config_of(small, output, *overrides, "shard_index=0", "num_shards=2"))
    files = len(list(output.glob("raw/*/*.npz")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        last = evaluate(config_of(small, output, *overrides))
    return output, first, files, last


def test_processes_share_the_work(shared, done):
    output, first, files, last = shared
    assert (first, files, last) == (None, 6, output / "report.html")
    whole = done[1]["differences"]["carried - reset"]
    assert results_of(output)["differences"] == {"carried - reset": whole}


def test_processes_of_the_tasks_of_an_array(monkeypatch):
    assert shard_of(None, None) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shard_of(None, None) == (1, 2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert shard_of(None, None) == (3, 8)
    assert shard_of(1, 5) == (3, 10)


def test_a_killed_run_goes_on_to_the_same_files(shared, runs, small, tmp_path):
    output = tmp_path / "out"
    arguments = (f"checkpoint={runs['ttt']}", f"recordings={small}", f"output={output}", *COMMON[:3], *CHEAP)
    process = start_python("-m", "evaluation.long_context", *arguments, NO_TORCH_COMPILE="1")
    while len(list(output.glob("raw/*/*.npz"))) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    early = {path: path.stat().st_mtime_ns for path in output.glob("raw/*/*.npz")}
    assert 2 <= len(early) < 12
    assert not (output / "report.html").exists()
    evaluate(config_of(small, output, f"checkpoint={runs['ttt']}", *CHEAP))
    assert all(path.stat().st_mtime_ns == when for path, when in early.items())
    both = (shared[0], output)
    names = [{str(path.relative_to(folder)) for path in folder.glob("raw/*/*.npz")} for folder in both]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = (np.load(folder / name) for folder in both)
        assert one.files == other.files
        assert all(np.array_equal(one[key], other[key]) for key in one)
    changing = ("date", "configs", "protocol")
    found = [{k: v for k, v in results_of(folder).items() if k not in changing} for folder in both]
    assert found[0] == found[1]


def test_another_checkpoint_or_setting_uses_no_old_file(done, runs, small, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(done[0] / "raw", output / "raw")
    before = set(output.glob("raw/*/*.npz"))
    few = ("limit=2", "controls=[]", "arms=[carried]")

    def new(*overrides):
        count = len(set(output.glob("raw/*/*.npz")))
        evaluate(config_of(small, output, f"checkpoint={runs['ttt']}", *few, *overrides))
        return len(set(output.glob("raw/*/*.npz"))) - count

    assert new() == 2  # other pieces
    assert new() == 0
    assert new("text=pad") == new("user=noise") == new("max_sec=4") == new("contexts=[7]") == 2
    other = runs["ttt"].with_name("other")
    shutil.copytree(runs["ttt"], other)
    evaluate(config_of(small, output, f"checkpoint={other}", *few))  # the same weights in another place
    assert len(set(output.glob("raw/*/*.npz"))) == len(before) + 10
    partial = (output / "report.html").read_text()
    assert "Partial: limit=2: 2 of 6 recordings" in partial
    assert "PARTIAL: limit=2: 2 of 6 recordings" in partial[partial.index("<svg") :]  # each figure
    results = [json.loads(path.read_text()) for path in output.glob("results_*.json")]
    assert all(found["results"]["long_context"]["partial"].startswith("limit=2") for found in results)
    samples = [json.loads(line) for path in output.glob("samples*") for line in path.read_text().splitlines()]
    assert all(line["partial"] for line in samples)


def test_a_model_without_ttt_is_the_base_arm(runs, small, tmp_path):
    base = config_of(
        small, tmp_path / "b", "baseline=tiny", "param_dtype=float32", "controls=[prefix]", "limit=2"
    )
    evaluate(base)
    found = results_of(tmp_path / "b")
    assert list(found["arms"]) == ["base"]
    assert found["headlines"] == []
    assert list(found["prefix"]["minus_shortest"]) == ["base"]
    evaluate(config_of(small, tmp_path / "p", f"checkpoint={runs['plain']}", "controls=[]", "limit=2"))
    plain = results_of(tmp_path / "p")
    assert plain["models"]["base"]["step"] == 1
    assert plain["arms"]["base"]["all"]["w100"] != found["arms"]["base"]["all"]["w100"]
    both = (f"checkpoint={runs['ttt']}", f"baseline={runs['plain']}", "arms=[base,carried]")
    evaluate(config_of(small, tmp_path / "both", *both, "controls=[]", "limit=2"))
    found = results_of(tmp_path / "both")
    assert found["arms"]["base"]["all"] == plain["arms"]["base"]["all"]
    assert list(found["differences"]) == ["carried - base"]


def test_what_cannot_be_is_refused(runs, small, tmp_path):
    ttt, plain = (f"checkpoint={runs[name]}" for name in ("ttt", "plain"))
    alone = tmp_path / "alone"
    libri_light(alone, speakers=1, seconds=4)
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    soundfile.write(tiny / "click.wav", chapter(0, 0.05, 0), RATE)
    wrong = {
        (): "nothing to score",
        (plain, "arms=[base,carried,reset]"): "has no TTT layers, which arms carried, reset need",
        ("baseline=tiny", "arms=[carried]"): "tiny has no TTT layers",
        (plain, "baseline=tiny"): "is the baseline itself",
        (ttt, f"baseline={runs['ttt']}"): "has TTT layers; expected a Moshi",
        (ttt, "arms=[carried,sideways]"): "must name some of base, carried",
        (ttt, "arms=[]"): "arms is empty",
        (ttt, "control_arms=[reset]"): "would lie elsewhere",
        (ttt, "contexts=[]"): "must name at least one",
        (ttt, "contexts=[a]"): "expected own, N frames",
        (ttt, "reset_frames=6"): "use 4 or 8 frames",
        (ttt, "target_end=1.5"): "target_end must lie",
        (ttt, "limit=0"): "limit must be above 0",
        (ttt, "user=music"): "user must be one of",
        (ttt, "contexts=[200]"): "too short: the longest, emma_3.* has 77 frames.* reaches 796 frames",
        (ttt, "max_sec=3"): "has 37 frames .* reaches 16 frames .* 25 more",
        (ttt, f"recordings={alone / 'small'}"): "those of 100 alone",
        (ttt, f"recordings={tiny}"): "click.wav has 0.050 s, less than a frame",
        (ttt, f"recordings={small.parent}"): "1 level too high",
        (f"checkpoint={tmp_path}",): "no checkpoint at",
    }
    for overrides, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            evaluate(config_of(small, tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()
    evaluate(
        config_of(
            small, tmp_path / "out", ttt, "contexts=[200]", "allow_short=true", "limit=2", "controls=[]"
        )
    )
    assert results_of(tmp_path / "out")["headlines"][0]["verdict"] == "not measured"


class Loaded(HTMLParser):
    """What a page would load, and the elements that it has."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "data", "srcset") and not v.startswith("#")
        ]


def test_the_page_needs_nothing_else(done):
    page = (done[0] / "report.html").read_text()
    parser = Loaded()
    parser.feed(page)
    assert parser.loads == []
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert parser.tags.count("svg") == 3
    assert not {"script", "link", "iframe", "img"} & set(parser.tags)
    for text in (
        done[1]["headlines"][0]["text"],
        "What the numbers show, and what not",
        "Protocol",
        "emma_05",
    ):
        assert text.replace("emma_05", "emma_5/emma_00") in page
    assert "currentColor" in page
    assert "receptive field 16" in page
    assert "window 5" in page
    assert {path.name for path in (done[0] / "figures").iterdir()} == {
        "nll_by_position.png",
        "paired_differences.png",
        "controls.png",
    }


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian package: chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_drawn_light_and_dark(done, tmp_path, dark):
    picture = tmp_path / "page.png"
    theme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    subprocess.run(
        (CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *theme,
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1800", f"--screenshot={picture}",
         (done[0] / "report.html").as_uri()),
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = imread(picture)[..., :3].mean(-1)
    background, ink = np.median(pixels), pixels.min() if not dark else pixels.max()
    assert background < 0.2 if dark else background > 0.9
    assert abs(background - ink) > 0.6
    assert pixels.std(1).max() > 0.05  # there is something on it
