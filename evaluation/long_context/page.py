"""The report of a run: one HTML file that needs nothing else, light or dark as its reader's system is."""

import html
from typing import Any

from evaluation.long_context.measures import PRIMARY
from evaluation.long_context.pictures import TITLES
from finetune.data.check_page import STYLE

OWN_STYLE = """
body { max-width: 90rem; } figure { margin: 1rem 0 1.6rem; }
figcaption { color: var(--faint); font-size: .9rem; } svg text { fill: currentColor; font-size: inherit; }
.headline { border-left: 4px solid var(--series0); padding: .5rem 1rem; font-size: 1.1rem; }
.partial { border-left: 4px solid var(--error); padding: .5rem 1rem; }
.clear { font-weight: 700; } li { margin: .3rem 0; } td, th { white-space: nowrap; }
td:first-child { white-space: normal; min-width: 11rem; }
table.facts td { white-space: normal; }
"""

SHOWS = (
    "The headline, carried - reset beyond the receptive field, compares a model with itself. All that "
    "differs is whether the inner state may hold what is older than the last reset; attention cannot "
    "reach that in "
    "either.",
    "A reset does two things: it takes what was remembered, and it puts the model into a state that it may "
    "never have met in the middle of speech. So a carried arm that is better than reset and not better than "
    "inner_lr_0 shows a cost of resetting, not a memory. Read the two differences together.",
    "carried - inner_lr_0 is what learning while listening is worth at all, near memory included.",
    "carried - gate_off and carried - base mix memory with a changed network: training changed weights "
    "around "
    "the TTT layers, and a TTT layer is more than its memory. They do not show memory.",
    "NLL by position mixes memory with what is said where: chapters begin and end with formulas. Compare "
    "arms "
    "at one position; do not read one curve from left to right. The growing prefix holds the target fixed.",
    "A foreign prefix that is all foreign also changes the voice right before the target. In the one whose "
    "last frames are the recording's own, attention cannot tell the difference: what is left is what the "
    "inner "
    "state kept of the far past. For an arm without such memory it is 0.",
    "Intervals are over speakers, who are drawn with all their recordings; frames are never drawn. With few "
    "speakers they are too narrow. There are many numbers on this page: one in twenty intervals leaves out 0 "
    "by chance. Only the headline was chosen before looking.",
    "A lower NLL of real speech is no proof that a model answers better, nor that it remembers facts.",
)
CAPTIONS = {
    "nll_by_position": "Mean NLL of each recording in each bucket, then over recordings. Dashed: attention "
    "windows; dash-dotted: receptive fields.",
    "paired_differences": "The same recordings and frames in both arms.",
    "controls": "Left: the same target behind more and more of its own recording. Right: behind another "
    "speaker's recording; above 0 the own past helps.",
}


def page(title: str, content: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page.

    Args:
        content: what `summarize` gave, with the facts of the run.
        pictures: figures as SVG by name.
    """
    figures = "".join(
        f"<figure>{pictures[name]}<figcaption>{caption}</figcaption></figure>"
        for name, caption in CAPTIONS.items()
        if name in pictures
    )
    shows = "".join(f"<li>{html.escape(text)}</li>" for text in SHOWS)
    body = (
        f"<h1>{html.escape(title)}</h1>{_partial(content)}{_headlines(content)}"
        f"{_differences(content)}{_arms(content)}<h2>Curves</h2>{figures}{_buckets(content)}"
        f"{_controls(content)}<h2>What the numbers show, and what "
        f"not</h2><ul>{shows}</ul>{_checks(content)}{_protocol(content)}{_recordings(content)}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{OWN_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _partial(content: dict[str, Any]) -> str:
    if not content["partial"]:
        return ""
    return f'<p class="partial error">Partial: {html.escape(content["partial"])}</p>'


def _headlines(content: dict[str, Any]) -> str:
    texts = [one["text"] for one in content["headlines"]]
    if not texts:
        texts = ["No headline: it is the difference of the arms carried and reset, which this run has not."]
    return "".join(f'<p class="headline">{html.escape(text)}</p>' for text in texts)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others numbers. Cells may hold HTML."""
    cells = "".join(f'<th class="{"number" if i else ""}">{name}</th>' for i, name in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f'<td class="{"number" if i else ""}">{c}</td>' for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{lines}</table></div>'


def cell(row: list[float | None], signed: bool = False) -> str:
    """A mean with its interval; bold if that leaves out 0."""
    mean, low, high = row[:3]
    if mean is None:
        return "-"
    form = "{:+.4f}" if signed else "{:.4f}"
    if low is None or high is None:
        return form.format(mean)
    text = f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"
    return f'<span class="clear">{text}</span>' if signed and (low > 0 or high < 0) else text


def _differences(content: dict[str, Any]) -> str:
    if not content["differences"]:
        return ""
    rows = [
        [html.escape(f"{name}, {where}"), *(cell(pair[key][stream], True) for stream in TITLES),
         str(pair["beyond_recordings"] if key == "beyond" else len(content["recordings"]))]
        for name, pair in content["differences"].items()
        for key, where in (("beyond", f"from frame {pair['from_frame']:,}"), ("all", "all frames"))
    ]  # fmt: skip
    return (
        '<h2>Paired differences</h2><p class="about">nats a code, mean over recordings (95 % interval over '
        "speakers); below 0 the first of the two predicts better; bold: the interval leaves out 0. w100: all "
        "codebooks, the semantic one 100 times</p>" + table(["", *TITLES, "recordings"], rows)
    )


def _arms(content: dict[str, Any]) -> str:
    rows, meanings = [], {}
    for name, arm in content["arms"].items():
        meanings[name.partition("@")[0]] = arm["meaning"]
        rows.append(
            [
                html.escape(name),
                "/".join(f"{w:,}" for w in arm["windows_frames"]),
                f"{arm['receptive_field_frames']:,}",
                f"{arm['reset_frames']:,}" if arm["reset_frames"] else "",
                *(cell(arm["all"][stream]) for stream in TITLES),
                cell(arm["beyond"][PRIMARY]),
            ]
        )
    head = ["arm", "windows", "receptive field", "reset every", *TITLES, "w100 beyond"]
    told = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in meanings.items())
    return (
        "<h2>Arms</h2><p class='about'>NLL in nats a code over whole recordings, and (last column) beyond "
        "the arm's receptive field; windows, fields and resets in frames; a model that knows nothing: "
        f"{content['ln_card']:.4f}</p>{table(head, rows)}<table class='facts'>{told}</table>"
    )


def _buckets(content: dict[str, Any]) -> str:
    rows = [
        [f"{b['from_frame']:,} to {b['to_frame']:,} ({b['from_sec']:g} to {b['to_sec']:g} s)",
         f"{b['recordings']} ({b['speakers']})",
         *(cell(arm["curve"][PRIMARY][i]) for arm in content["arms"].values()),
         *(cell(pair["curve"][PRIMARY][i], True) for pair in content["differences"].values())]
        for i, b in enumerate(content["buckets"])
    ]  # fmt: skip
    head = ["frames", "recordings (speakers)", *map(html.escape, (*content["arms"], *content["differences"]))]
    return f"<details><summary>The numbers of the curves (w100)</summary>{table(head, rows)}</details>"


def _controls(content: dict[str, Any]) -> str:
    text = ""
    prefix, foreign = content["prefix"], content["foreign"]
    if prefix:
        arms = prefix["minus_shortest"]
        rows = [
            [f"{frames:,} ({seconds:g} s)", str(n), *(cell(arms[arm][PRIMARY][i], True) for arm in arms)]
            for i, (frames, seconds, n) in enumerate(
                zip(prefix["frames"], prefix["sec"], prefix["recordings"], strict=True)
            )
        ]
        text += (
            "<h2>Control: fixed target, growing prefix</h2><p class='about'>NLL of the target (w100) minus "
            "that behind the shortest prefix; below 0 more past helps</p>"
            + table(["prefix, frames", "recordings", *map(html.escape, arms)], rows)
        )
    if foreign:
        rows = [
            [html.escape(arm),
             *(cell(found[key][PRIMARY], True) if key in found else "-" for key in ("other", "far")),
             "yes" if found["attention_reaches_far"] else "no"]
            for arm, found in foreign["minus_own"].items()
        ]  # fmt: skip
        near = f"all but the last {foreign['near_frames']:,} frames foreign"
        head = ["arm", "all of the prefix foreign", near, "attention reaches the foreign part of the latter"]
        text += (
            "<h2>Control: foreign prefix</h2><p class='about'>NLL of the target (w100) behind another "
            "speaker's recording minus that behind its own; above 0 the own past helps</p>"
            + table(head, rows)
        )
    return text


def _checks(content: dict[str, Any]) -> str:
    if not content["checks"]:
        return ""
    rows = [
        [html.escape(c["what"]), c["expected"], c["found"],
         '<span class="fine">holds</span>' if c["holds"] else '<span class="error">DOES NOT HOLD</span>']
        for c in content["checks"]
    ]  # fmt: skip
    return "<h2>Checks</h2>" + table(["what", "expected", "found", ""], rows)


def _protocol(content: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in content["protocol"].items()
    )
    return f'<h2>Protocol</h2><table class="facts">{rows}</table>'


def _recordings(content: dict[str, Any]) -> str:
    rows = [
        [
            html.escape(r["name"]),
            html.escape(r["speaker"]),
            f"{r['frames']:,}",
            f"{r['sec']:,.1f}",
            r["sha256"][:12],
        ]
        for r in content["recordings"]
    ]
    inner = table(["recording", "speaker", "frames", "seconds", "sha256"], rows)
    return f"<details><summary>{len(rows)} recordings</summary>{inner}</details>"
