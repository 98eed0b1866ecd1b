"""The report as one HTML file that needs nothing else: table, bars, curves, overlays; light or dark."""

import html
import json
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from finetune.data.check_page import STYLE

_FILES = Path(__file__).with_name("page")
# What the page may do: run what is in it, and nothing from anywhere else.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(title: str, content: dict[str, Any]) -> str:
    """The page."""
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    style, script, body = ((_FILES / name).read_text() for name in ("report.css", "report.js", "report.html"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{body}"
        f'<script type="application/json" id="content">{data}</script>'
        f"<script>{get_plotlyjs()}</script><script>{script}</script></body></html>\n"
    )
