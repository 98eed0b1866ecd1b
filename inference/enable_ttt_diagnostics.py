"""TTT diagnostics of a model in use: to the log, to a history, to a file."""

import json
import logging
from pathlib import Path
from typing import Any

from moshi.models.lm import LMModel

from moshi_ttt.diagnostics import Record, TTTDiagnostics, format_record

logger = logging.getLogger(__name__)


class DiagnosticsFile:
    """A JSON-lines file: first `{"about": ...}`, then one record a line, for `evaluation.plot_diagnostics`.

    Args:
        path: replaced if it exists.
        about: what is being run: checkpoint, input, frame rate.
    """

    def __init__(self, path: str | Path, about: dict[str, Any]):
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"about": about}) + "\n")

    def write(self, records: list[Record]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def enable_ttt_diagnostics(
    model: LMModel,
    log_frequency: int = 100,
    track_history: bool = False,
    file: DiagnosticsFile | None = None,
) -> TTTDiagnostics:
    """Log what attention and TTT do in every hybrid layer, every `log_frequency` frames.

    Where an `LMGen` runs on a GPU, each of its steps goes into `with diagnostics.step():` (an error says so).
    `moshi_ttt.diagnostics` defines every number.

    Args:
        model: with TTT layers.
        log_frequency: frames (in streaming) or forward passes between records; 0 never records.
        track_history: keep records for `model.transformer.layers[i].get_diagnostic_history()`.
        file: where records go besides the log.
    Returns:
        The diagnostics; `close()` ends them.
    Raises:
        ValueError: the model has no TTT layers.
    """

    def sink(records: list[Record]) -> None:
        for record in records:
            logger.info("%s", format_record(record))
        if file is not None:
            file.write(records)

    diagnostics = TTTDiagnostics(model, log_frequency, track_history, sink)
    logger.info("TTT diagnostics of %d layers every %d frames", len(diagnostics.layers), log_frequency)
    return diagnostics
