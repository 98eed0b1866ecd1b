"""Published accuracies to read a result beside, in per cent."""

from dataclasses import dataclass

COLUMNS = ("swuggy", "sblimp", "tsc", "ssc")


@dataclass(frozen=True)
class Anchor:
    """A row of published numbers.

    Args:
        model: what was scored.
        numbers: in the order of COLUMNS.
        mark: how far the numbers can be trusted; empty where they were read.
    """

    model: str
    numbers: tuple[str, str, str, str]
    mark: str = ""


ANCHORS = (
    Anchor("GSLM", ("64.8", "54.2", "66.6", "53.3")),
    Anchor("TWIST-13B", ("74.5 (84.1 in-vocab)", "59.2", "76.4", "55.4")),
    Anchor("Spirit-LM", ("69.0", "58.3", "82.9", "61.0")),
    Anchor("Moshi, single stream, pretrained", ("72.6", "58.8", "83.0", "60.8")),
    Anchor("Moshi, multistream instruct", ("63.0", "55.2", "83.6", "62.7"), "[mem]"),
    Anchor("released moshiko", ("63.35", "54.5", "80.1", "60.9"), "[unaudited third-party run]"),
)


def anchor_table() -> str:
    """Markdown; [mem] marks what is remembered from a paper and was not checked."""
    lines = [
        "Published accuracies (%). [mem]: remembered from the paper, not checked. How clips were scored "
        "differs between papers:",
        "",
        "| model | sWUGGY | sBLIMP | tSC | sSC |",
        "| --- | --- | --- | --- | --- |",
    ]
    for anchor in ANCHORS:
        name = f"{anchor.model} {anchor.mark}".strip()
        lines.append(f"| {name} | " + " | ".join(anchor.numbers) + " |")
    return "\n".join(lines)
