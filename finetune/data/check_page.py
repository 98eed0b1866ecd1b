"""The page of a check: one HTML file that needs nothing else, light or dark as its reader's system is."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.findings import Problem
from finetune.data.histogram import Series, histogram
from finetune.data.summary import Summary, channels_of

if TYPE_CHECKING:
    from finetune.data.check import CheckConfig

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --text: #1b1b1a; --faint: #5f5e5a; --line: #dddcd8;
  --series0: #2a78d6; --series1: #d95926; --error: #b3261e; --warning: #8a5a00; --fine: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --page: #1a1a19; --text: #ecebe7; --faint: #a9a8a2;
  --line: #3a3a38; --series0: #3987e5; --series1: #e0703f; --error: #ff8a80; --warning: #e5b567;
  --fine: #6fce8a; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: .95rem; margin: 0 0 .2rem; }
p.about, .what { color: var(--faint); font-weight: 400; margin: .2rem 0; font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } .number { text-align: right; } td { overflow-wrap: anywhere; }
table.facts, table.each { width: 100%; }
table.facts th { width: 14rem; font-weight: 400; color: var(--faint); }
.error, .warning, .fine { font-weight: 600; } .error { color: var(--error); }
.warning { color: var(--warning); } .fine { color: var(--fine); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1.6rem 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
.grid { stroke: var(--line); } .base { stroke: var(--faint); }
.series0 { fill: var(--series0); } .series1 { fill: var(--series1); }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin: 0 .35rem 0 .1rem; }
.key0 { background: var(--series0); } .key1 { background: var(--series1); }
.legend { font-size: .85rem; min-height: 1.5em; }
.legend span { margin-right: .8rem; white-space: nowrap; } .scroll { overflow-x: auto; }
"""


def write_page(path: Path, title: str, summary: Summary, config: "CheckConfig") -> None:
    """Write the page.

    Args:
        path: where to.
        title: names of the lists.
    """
    facts = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in summary.rows
    )
    voice = config.voice
    definition = (
        f"A channel has voice where 20 ms of it are louder than {voice.silence_dbfs:g} dBFS, than its loud "
        f"moments less {voice.range_db:g} dB, and than its quiet moments plus {voice.above_noise_db:g} dB. "
        "Silence: no channel has voice. Overlap: both have."
    )
    content = (
        f"<h1>{html.escape(title)}</h1>{_verdict(summary)}"
        f'<h2>What there is</h2><table class="facts">{facts}</table><p class="about">{definition}</p>'
        f'<h2>Recordings</h2><div class="pictures">{"".join(_pictures(summary, config))}</div>'
        f"{_problem_tables(summary, config)}"
    )
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Check of {html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{content}</body></html>\n",
        encoding="utf-8",
    )


def _verdict(summary: Summary) -> str:
    parts = []
    for level in ("error", "warning"):
        count = sum(n for (severity, _), n in summary.counts.items() if severity == level)
        if count:
            parts.append(f'<span class="{level}">{count:,} {level}{"s" if count > 1 else ""}</span>')
    what = " and ".join(parts) or '<span class="fine">no problems</span>'
    return f"<p>{what} in {len(summary.recordings):,} recordings, {summary.hours:.2f} hours</p>"


def _pictures(summary: Summary, config: "CheckConfig") -> list[str]:
    recordings = summary.recordings
    speakers = (config.data.main_speaker, config.data.user_speaker)
    both = [(speaker, channels_of(recordings, speaker)) for speaker in speakers]
    levels = [Series(s, [c.voice_dbfs for c in cs if c.voice_dbfs is not None]) for s, cs in both]
    rates = [Series(s, [c.words / c.voice_sec for c in cs if c.voice_sec > 0]) for s, cs in both]
    shares = [
        Series("silence", [r.silence_share for r in recordings]),
        Series("overlap", [r.overlap_share for r in recordings]),
    ]
    durations = [Series("recordings", [r.duration_sec / 60 for r in recordings])]
    return [
        _figure("Duration", durations, histogram("minutes", durations, "min")),
        _figure("Level of the voice", levels, histogram("dBFS, RMS of the voiced frames", levels, "dBFS")),
        _figure(
            "Silence and overlap", shares, histogram("percent of the recording", shares, "%", percent=True)
        ),
        _figure("Words per second of voice", rates, histogram("words a second", rates, "words/s")),
    ]


def _figure(title: str, series: Sequence[Series], svg: str) -> str:
    keys = "".join(
        f'<span><i class="key key{n}"></i>{html.escape(one.name)}</span>' for n, one in enumerate(series)
    )
    return (
        f'<figure><h3>{title} <span class="what">(number of recordings)</span></h3>'
        f'<div class="legend">{keys}</div>{svg}</figure>'
    )


def _problem_tables(summary: Summary, config: "CheckConfig") -> str:
    if not summary.problems:
        return ""
    counts = "".join(
        f'<tr><td class="{level}">{level}</td><td>{kind}</td><td class="number">{count:,}</td></tr>'
        for (level, kind), count in sorted(summary.counts.items())
    )
    shown = summary.problems[: config.listed]
    rows = "".join(_problem_row(problem, config) for problem in shown)
    rest = len(summary.problems) - len(shown)
    more = f"<p>... and {rest:,} more in the .jsonl file beside this page</p>" if rest else ""
    return (
        '<h2>Problems</h2><table><tr><th>severity</th><th>kind</th><th class="number">number</th></tr>'
        f'{counts}</table><h2>Each problem</h2><div class="scroll"><table class="each"><tr><th>severity</th>'
        '<th>kind</th><th>file</th><th class="number">second</th><th>what</th></tr>'
        f"{rows}</table></div>{more}"
    )


def _problem_row(problem: Problem, config: "CheckConfig") -> str:
    level = getattr(config.severity, problem.kind)
    name = html.escape(Path(problem.file).name)
    return (
        f'<tr><td class="{level}">{level}</td><td>{problem.kind}</td>'
        f'<td title="{html.escape(problem.file)}">{name}</td><td class="number">{problem.second:.2f}</td>'
        f"<td>{html.escape(problem.message)}</td></tr>"
    )
