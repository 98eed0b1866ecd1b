"""`python -m evaluation.report runs/* --output report.html`: many checkpoints on one page.

Finds runs (metrics.jsonl) and results (results_DATE.json of evaluation.paper_metrics, evaluation.long_context
and evaluation.speech_quality) in and under the folders given, and puts the results of one model into one row,
whatever the folders are called. The page needs no network: a table to sort, filter and export, the suites,
curves over training steps, and long context of all models on top of each other.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.report.content import assemble
from evaluation.report.page import page
from evaluation.report.results import read_result
from evaluation.report.sources import find_sources
from evaluation.report.training import read_run
from moshi_ttt.atomic import write_atomically


def read_all(given: Sequence[str]) -> dict[str, Any]:
    """The content of the report on what is given.

    Raises:
        ValueError: nothing is there, or something is damaged.
    """
    sources = find_sources(given)
    places = [*sources.runs, *sources.results]
    runs, results = [], []
    for place in tqdm(places, desc="reading", unit="file", disable=None, leave=False):
        if place.is_dir():
            runs.append(read_run(place))
        else:
            results.append(read_result(place))
    content = assemble(runs, results)
    content["remarks"] = [*sources.empty, *content["remarks"]]
    partial = sum(bool(result.partial) for result in results)
    content["summary"] = (
        f"{len(content['rows'])} models, {len(results)} results{f' ({partial} PARTIAL)' if partial else ''}, "
        f"{len(runs)} runs; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", metavar="FOLDER", help="runs, outputs of evaluations, or folders of them"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--title", default="Moshi-TTT: checkpoints", help="of the page")
    given = parser.parse_args(arguments)
    try:
        if given.output.suffix != ".html":
            raise ValueError(f"--output must end with .html, got {given.output}")
        content = read_all(given.sources)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_atomically(given.output, page(given.title, content))
    for remark in content["remarks"]:
        print(f"remark: {remark}")
    print(f"{content['summary']}\nwrote {given.output}")


if __name__ == "__main__":
    main()
