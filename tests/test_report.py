"""Many checkpoints on one page: real runs and evaluations, in rows and columns, and seen in a browser."""

import asyncio
import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from chromium import CHROMIUM, browsing
from long_recordings import libri_light
from matplotlib.image import imread
from paper_data import write_storycloze, write_swuggy
from spoken_answers import turn, write_spoken
from test_long_context_run import config_of
from test_paper_metrics import evaluate, results
from training import compose_config, records, run

from configs.typed import typed_config
from evaluation.long_context.__main__ import run as long_context
from evaluation.report.__main__ import main, read_all
from evaluation.report.content import assemble
from evaluation.report.training import MOST_RECORDS, read_run
from evaluation.speech_quality.__main__ import run as speech_quality
from evaluation.speech_quality.settings import SpeechQualityConfig

SHORT = (
    "ttt.ttt_layer_context=5",
    "ttt.non_ttt_layer_context=5",
    "ttt.mini_batch_size=4",
    "lora=none",
    "mode=ttt",
    "diagnostics.every_steps=0",
    "checkpoint.every_steps=1",
    "eval.every_steps=1",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, private_cache):
    """runs/a with two checkpoints, runs/b with one, and evaluations of all but b's in several folders."""
    root = tmp_path_factory.mktemp("place")
    data = tmp_path_factory.mktemp("data")
    write_swuggy(data, ids=8)
    write_storycloze(data / "tSC", stories=6)
    runs, step_1 = root / "runs", root / "runs/a/checkpoints/checkpoint_000001"
    run(runs / "a", *SHORT)
    run(runs / "b", *SHORT, "seed=1", "checkpoint.every_steps=0")
    tasks = (f"data.slm21={data}", f"data.tsc={data}/tSC", "tasks=[swuggy,tsc]")
    evaluate(root / "paper/early", f"checkpoint={step_1}", "baseline=null", *tasks)
    evaluate(root / "paper/late", f"checkpoint={runs}/a", "baseline=null", *tasks)
    evaluate(root / "paper/base", *tasks)
    evaluate(root / "paper/few", f"checkpoint={runs}/b", "baseline=null", *tasks, "limit=5")
    recordings = libri_light(data, speakers=6, seconds=2.6)
    for name, checkpoint in (("early", step_1), ("late", runs / "a")):
        arms = ("arms=[carried,reset,inner_lr_0]", "controls=[]", f"checkpoint={checkpoint}")
        long_context(config_of(recordings, root / "long" / name, *arms))
    judge_answers(root, runs / "a/checkpoints/checkpoint_000002/consolidated", "limit=1")
    return root


def judge_answers(root, checkpoint, *settings):
    """Speech quality of a checkpoint, by answers that say they are its."""
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    meta = {
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "files_sha256": {name: file["sha256"] for name, file in manifest["files"].items()},
        "base_sha256": manifest["base"]["sha256"],
    }
    for name in ("one", "two"):
        voice = np.concatenate([turn(1), turn(2)])
        write_spoken(root / "answers", name, np.zeros_like(voice), voice, "he might", **meta)
    given = (f"answers={root / 'answers'}", f"output={root / 'quality'}", "tasks=[voice,turns]", "device=cpu")
    config = compose_config(*given, "bucket_sec=5", *settings, name="speech_quality")
    speech_quality(typed_config(config, SpeechQualityConfig))


@pytest.fixture(scope="module")
def content(place):
    return read_all([str(place)])


def row(content, name):
    (found,) = [row for row in content["rows"] if row["name"] == name]
    return found


def number(content, name, task, metric="acc"):
    keys = [c["key"] for c in content["columns"] if (c["task"], c["metric"]) == (task, metric)]
    (found,) = [row(content, name)["numbers"][key] for key in keys if key in row(content, name)["numbers"]]
    return found


def test_what_was_measured_of_one_checkpoint_stands_in_one_row(content, place):
    assert [r["name"] for r in content["rows"]] == ["tiny", "a, step 1", "a, step 2", "b, step 2"]
    assert len(row(content, "a, step 1")["sources"]) == 2
    assert len(row(content, "a, step 2")["sources"]) == 3  # spoken answers too
    written = results(place / "paper/early")["results"]["swuggy_dev"]
    shown = number(content, "a, step 1", "swuggy_dev")
    assert shown["value"] == pytest.approx(100 * written["acc,none"])
    assert [shown["low"], shown["high"]] == pytest.approx([100 * x for x in written["acc_ci95,none"]])
    long = json.loads(next((place / "long/late").glob("results_*.json")).read_text())
    pair = "carried - reset"
    mean, low, high, _ = long["differences"][pair]["beyond"]["w100"]
    shown = number(content, "a, step 2", pair, "difference, beyond attention")
    assert (shown["value"], shown["low"], shown["high"]) == (mean, low, high)
    assert row(content, "a, step 2")["curves"]["lines"]["carried"]["w100"] == [
        r[:3] for r in long["arms"]["carried"]["curve"]["w100"]
    ]
    (loss,) = [r["loss"] for r in records(place / "runs/a", "valid") if r["step"] == 1]
    assert number(content, "a, step 1", "held out", "loss")["value"] == loss


def test_a_moved_checkpoint_is_known_by_its_files(place, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(place / "runs/a/checkpoints/checkpoint_000002/consolidated", copy)
    task = json.loads((place / "paper/late/plan.json").read_text())["identity"]
    assert list(task["data"]) == ["swuggy_dev", "tsc"]
    arms = ("arms=[carried,reset]", "controls=[]", "allow_short=true", f"checkpoint={copy}")
    recordings = libri_light(tmp_path, speakers=1, seconds=0.9)
    long_context(config_of(recordings, tmp_path / "long", *arms))
    together = read_all([str(place / "paper/late"), str(tmp_path / "long")])
    assert len(together["rows"]) == 1
    assert len(together["rows"][0]["sources"]) == 2


def test_numbers_of_another_protocol_have_columns_of_their_own(content):
    columns = [c for c in content["columns"] if (c["task"], c["metric"]) == ("swuggy_dev", "acc")]
    assert [c["protocols"] for c in columns] == [2, 2]
    assert sorted(c["partial"] for c in columns) == ["", "limit=5: 5 ids of each task"]
    partial = next(c["key"] for c in columns if c["partial"])
    assert [r["name"] for r in content["rows"] if partial in r["numbers"]] == ["b, step 2"]
    assert any("swuggy_dev was measured in 2 ways" in r and "limit" in r for r in content["remarks"])


def test_held_out_losses_of_other_data_are_not_compared(tmp_path):
    for name, data in (("a", "one.jsonl"), ("b", "two.jsonl"), ("c", "one.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "split": "valid", "loss": 2.0}\n')
        config = {"duration_sec": 10, "first_codebook_weight_multiplier": 100, "text_padding_weight": 0.5}
        config |= {"data": {"valid": data}, "eval": {"max_clips": None}}
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
    content = read_all([str(tmp_path)])
    first, second = [column["key"] for column in content["columns"]]
    assert [list(r["numbers"]) for r in content["rows"]] == [[first], [second], [first]]
    assert any('data "one.jsonl" there, "two.jsonl" here' in r for r in content["remarks"])
    (tmp_path / "a/config.yaml").write_text("[]")
    with pytest.raises(ValueError, match="a/config.yaml is not the config of a run"):
        read_all([str(tmp_path)])


def test_a_second_measurement_in_the_same_way_is_said_and_the_newest_counts(place, tmp_path):
    for date, accuracy in (("2020-01-01T00-00-00", 0.25), ("2030-01-01T00-00-00", 0.75)):
        changed = results(place / "paper/base")
        changed["date"] = date
        changed["results"]["tsc"]["acc,none"] = accuracy
        (tmp_path / f"results_{date}.json").write_text(json.dumps(changed))
    content = read_all([str(tmp_path)])
    assert number(content, "tiny", "tsc")["value"] == 75
    (said,) = [remark for remark in content["remarks"] if remark.startswith("tiny: tsc was measured twice")]
    assert "results_2030" in said.split(" is shown")[0]


def test_long_records_are_thinned_and_that_is_said(tmp_path):
    lines = [{"step": s, "split": "train", "loss": 1 / s} for s in range(1, 2 * MOST_RECORDS + 2)]
    lines += [{"step": s, "split": "valid", "loss": float(s)} for s in (100, 200)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    run = read_run(tmp_path)
    assert run.records["train/loss"][0][:2] == [1, 4]
    assert run.records["valid/loss"] == ([100, 200], [100.0, 200.0])
    assert "every 3th record" in assemble([run], [])["remarks"][0]


@pytest.mark.parametrize(
    "given, told",
    [
        ("nowhere*", "matches nothing; .* holds .*runs"),
        ("runs/a/checkpoints", "holds no run .* and no results"),
        ("paper/cut", "holds no run .*: its scoring was not finished"),
    ],
)
def test_what_is_not_there_is_said(place, given, told):
    (place / "paper/cut").mkdir(exist_ok=True)
    (place / "paper/cut/plan.json").write_text("{}")
    with pytest.raises(ValueError, match=told):
        read_all([str(place / given)])


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "is damaged"),
        ('{"results": {}}', "lacks results, configs or date"),
        ('{"results": {}, "configs": {}, "date": "x"}', "does not say which model"),
        ('{"results": {}, "configs": {}, "date": "x", "models": {}}', "has not all .*'checkpoint'"),
        ('{"results": {"a": NaN}, "configs": {}, "date": "x"}', "is damaged .it holds NaN"),
    ],
)
def test_a_results_file_of_something_else_is_refused(tmp_path, text, told):
    (tmp_path / "results_1.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_all([str(tmp_path)])


def test_what_a_shell_makes_of_a_star_may_hold_nothing_and_that_is_said(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("of mine")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/plan.json").write_text("{}")
    given = [str(path) for path in (*tmp_path.iterdir(), place / "runs/a")]
    content = read_all([*given, *given])
    assert [r["name"] for r in content["rows"]] == ["a, step 2"]
    said = sorted(content["remarks"])
    assert len(said) == 3
    assert "begun holds no run" in said[0]
    assert said[0].endswith("its scoring was not finished, start it again")
    assert "empty holds no run" in said[1]
    assert "notes.txt is no run" in said[2]


def test_a_damaged_line_of_training_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2 is not a record"):
        read_all([str(tmp_path)])


def test_the_command_writes_a_page_that_others_may_read(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    output = tmp_path / "out/report.html"
    before = os.umask(0o022)
    try:
        main(["runs/*", "paper", "--output", str(output), "--title", "A <b> & c"])
    finally:
        os.umask(before)
    assert output.stat().st_mode & 0o777 == 0o644
    assert "4 models, 4 results (1 PARTIAL), 2 runs" in capsys.readouterr().out
    text = output.read_text()
    assert "<h1>A &lt;b&gt; &amp; c</h1>" in text
    assert not re.search(r"<(script|img|link)[^>]* (src|href)=", text)
    with pytest.raises(SystemExit, match="must end with .html"):
        main(["runs/*", "--output", "report.pdf"])


TABLE = "[...document.querySelectorAll('#models tbody tr')].map((r) => r.cells[0].textContent)"
SORT = (
    "[...document.querySelectorAll('#models th')].find((th) => th.textContent.startsWith(NAME))"
    ".querySelector('button').click()"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian package: chromium)")
def test_the_page_in_a_browser(place, content, tmp_path):
    main(
        [
            *(str(place / name) for name in ("runs", "paper", "long", "quality")),
            "--output",
            str(tmp_path / "r.html"),
        ]
    )

    async def visit():
        async with browsing((tmp_path / "r.html").as_uri(), tmp_path / "profile") as page:
            await page.until("document.querySelectorAll('#overlay .scatterlayer .trace').length > 0")
            assert await page.value(TABLE) == ["tiny", "a, step 1", "a, step 2", "b, step 2"]
            await sorts(page, content)
            await filters(page)
            await exports(page, content)
            await draws(page)
            await marks(page)
            await page.picture(tmp_path / "light.png")
            await page.picture(tmp_path / "dark.png", "dark")
            await page.until(
                "getComputedStyle(document.querySelector('#curves .xtick text')).fill.includes('236')"
            )
            await page.picture(tmp_path / "dark.png", "dark")
            buttons = await page.value(
                "[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
            )
            assert "Download plot as a PNG" in buttons
            assert not any("hare" in button for button in buttons)  # it would send results to a server
            assert page.complaints == []

    asyncio.run(visit())
    light, dark = (imread(tmp_path / f"{name}.png")[..., :3].mean(-1) for name in ("light", "dark"))
    assert np.median(light) > 0.9
    assert np.median(dark) < 0.2


async def sorts(page, content):
    """The best is on top at the first click, the worst at the second; who has no number is last."""
    values = {r["name"]: number(content, r["name"], "held out", "loss")["value"] for r in content["rows"][1:]}
    await page.value(SORT.replace("NAME", "'held out loss'"))
    assert await page.value(TABLE) == [*sorted(values, key=values.__getitem__), "tiny"]
    await page.value(SORT.replace("NAME", "'held out loss'"))
    assert await page.value(TABLE) == [*sorted(values, key=values.__getitem__, reverse=True), "tiny"]
    assert await page.value("document.querySelectorAll('#models th[aria-sort=descending]').length") == 1


async def filters(page):
    """Words choose rows, and the charts draw these alone."""
    await enter(page, "filter", "/RUNS/a", "input")
    assert await page.value(TABLE) == ["a, step 1", "a, step 2"]
    assert await names(page, "overlay") == ["a, step 1", "a, step 2"]
    await enter(page, "filter", "/runs/ b,", "input")  # both words, in the path and in the name
    assert await page.value(TABLE) == ["b, step 2"]
    assert await names(page, "overlay") == []
    assert await names(page, "suites") == ["b, step 2"]
    await enter(page, "filter", "", "input")
    assert len(await page.value(TABLE)) == 4


async def enter(page, field, value, event="change"):
    """What someone types or chooses."""
    await page.value(
        f"(() => {{ const field = document.getElementById({json.dumps(field)}); field.value = "
        f"{json.dumps(value)}; field.dispatchEvent(new Event('{event}')); }})()"
    )


async def names(page, chart):
    """Whose lines and bars a chart shows."""
    return await page.value(f"document.getElementById('{chart}').data.map((t) => t.name).filter(Boolean)")


async def exports(page, content):
    """The CSV is the table as it is shown."""
    rows = list(csv.reader(io.StringIO(await page.value("csv()"))))
    assert [row[0] for row in rows[1:]] == await page.value(TABLE)
    where = rows[0].index("tsc acc (way 1) [%]")
    shown = {row[0]: row[where] for row in rows[1:]}
    assert float(shown["a, step 1"]) == number(content, "a, step 1", "tsc")["value"]
    assert shown["b, step 2"] == ""
    assert any("partial: limit=5" in name for name in rows[0])
    assert await page.value("quoted('=1+1')") == "'=1+1"
    assert await page.value("""quoted('a "b", c')""") == '"a ""b"", c"'


async def draws(page):
    """Bars, radar, curves over steps, an overlay of long context: of the ticked models."""
    assert await page.value("document.getElementById('suites').data.every((t) => t.type === 'bar')")
    await page.value("document.querySelector('input[value=radar]').click()")
    await page.until("document.querySelectorAll('#suites .polarlayer .trace').length > 0")
    await page.value("document.querySelector('input[value=bars]').click()")
    options = "[...document.querySelectorAll('#curve option')]"
    await enter(page, "curve", await page.value(f"{options}.find((o) => o.text.startsWith('tsc acc')).value"))
    drawn = await page.value("document.getElementById('curves').data.map((t) => [t.name, t.x])")
    assert drawn == [["a", [1, 2]]]
    await enter(page, "curve", "valid/loss")
    assert sorted(await names(page, "curves")) == ["a", "b"]
    await enter(page, "line", "carried")
    assert await names(page, "overlay") == ["a, step 1", "a, step 2"]
    assert await page.value("document.querySelectorAll('#overlay .shapelayer path').length") > 0
    tick = "[...document.querySelectorAll('#models input')].find((t) => t.ariaLabel === 'draw a, step 1')"
    await page.value(f"{tick}.click()")
    assert await names(page, "overlay") == ["a, step 2"]
    assert "a, step 1" not in await names(page, "suites")
    await page.value(f"{tick}.click()")
    await enter(page, "line", "carried - reset")
    assert "receptive field of" in await page.value("document.getElementById('verdicts').textContent")
    await page.value("document.getElementById('none').click()")
    assert [await names(page, chart) for chart in ("suites", "overlay", "voice")] == [[], [], []]
    await page.value("document.getElementById('all').click()")
    assert len(await names(page, "suites")) == 4


async def marks(page):
    """What is partial is marked wherever it is: summary, table, charts, list of choices, sources."""
    assert "(2 PARTIAL)" in await page.value("document.getElementById('summary').textContent")
    cells = (
        "[...document.querySelectorAll('#models tbody tr')].map((r) => r.querySelectorAll('.partial').length)"
    )
    marked = dict(zip(await page.value(TABLE), await page.value(cells), strict=True))
    # Two suites of b; similarity and overlap of a.
    assert marked == {"tiny": 0, "a, step 1": 0, "a, step 2": 2, "b, step 2": 2}
    assert await names(page, "voice") == ["a, step 2 (partial)"]
    texts = "[...document.querySelectorAll('#columns label')].map((l) => l.textContent)"
    assert sum("partial: limit: 1 of 2 answers" in text for text in await page.value(texts)) > 10
    options = await page.value("[...document.querySelectorAll('#curve option')].map((o) => o.text)")
    assert "turns user_speaks, of checkpoints (partial)" in options
    ticks = await page.value("document.getElementById('suites').data.flatMap((t) => t.x)")
    assert "tsc (way 2) (partial)" in ticks
    sources = await page.value("document.querySelectorAll('#sources td.partial:not(:empty)').length")
    assert sources == 2
