"""Entries of a section, written as they come, so that one that is stopped loses none that it has."""

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Results:
    """A section's entries in a JSON file.

    Args:
        path (Path): replaced after each entry.
        device (str): what measured.
    """

    def __init__(self, path: Path, device: str):
        self.path = path
        self.device = device
        self.entries: list[Entry] = []

    def add(
        self,
        name: str,
        ours: float,
        against: float,
        against_what: str,
        unit: str,
        goal: float | None,
        **more: Any,
    ) -> None:
        """One comparison; its ratio is `against / ours`, so above 1 ours is better.

        Args:
            goal: smallest ratio that is wanted; None for a number that is only reported.
            more: further numbers of the entry.
        """
        entry = {
            "name": name,
            "ratio": round(against / ours, 3),
            "goal": goal,
            "unit": unit,
            "ours": round(ours, 4),
            "against": round(against, 4),
            "against_what": against_what,
            **more,
            "device": self.device,
        }
        self.put([entry])
        print(line(entry), flush=True)

    def put(self, entries: list[Entry]) -> None:
        """Entries that were made elsewhere; those of the same names are replaced."""
        named = {entry["name"]: entry for entry in (*self.entries, *entries)}
        self.entries = list(named.values())
        self.path.write_text(json.dumps({"entries": self.entries}, indent=2) + "\n")


def line(entry: Entry) -> str:
    """An entry in one line."""
    wanted = "" if entry["goal"] is None else f" (goal {entry['goal']:g})"
    met = "    " if entry["goal"] is None else "ok  " if entry["ratio"] >= entry["goal"] else "MISS"
    return (
        f"{met} {entry['name']}: {entry['ours']:.3f} {entry['unit']} against {entry['against']:.3f} "
        f"({entry['against_what']}), ratio {entry['ratio']:.2f}{wanted}"
    )
