"""Finding a data set's folder, and guessing which one was meant."""

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

# Folders that are looked at for a guess, so that a wrong `/` ends soon.
_LOOKED_AT = 500


def find_folder(
    setting: str, given: str | None, is_it: Callable[[Path], bool], expected: str, usual_name: str
) -> Path:
    """The folder of a data set.

    Args:
        setting: such as data.slm21.
        given: its value.
        is_it: whether a folder has the data set's layout.
        expected: the layout in words.
        usual_name: what the folder is called as published, to choose among guesses.
    Raises:
        ValueError: not given, not there, or of another layout; with a guess where the data may be.
    """
    if given is None:
        raise ValueError(
            f"missing {setting}: give the folder with {expected}, or leave its task out of tasks"
        )
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{setting}={folder} is no folder{_spelt_otherwise(setting, folder)}")
    if is_it(folder):
        return folder
    guesses = [near for near in _nearby(folder) if is_it(near)]
    guess = max(guesses, key=lambda near: _likeness(near.name, usual_name), default=None)
    hint = f"did you mean {setting}={guess}?" if guess else f"it holds {_content(folder)}"
    raise ValueError(f"{setting}={folder} does not hold {expected}; {hint}")


def _spelt_otherwise(setting: str, folder: Path) -> str:
    existing = next((parent for parent in folder.parents if parent.is_dir()), None)
    if existing is None:
        return ""
    wanted = folder.relative_to(existing).parts[0]
    there = {path.name.lower(): path.name for path in existing.iterdir() if path.is_dir()}
    close = difflib.get_close_matches(wanted.lower(), there, n=1)
    if not close:
        return f"; {existing} exists and holds {_content(existing)}"
    guess = existing.joinpath(there[close[0]], *folder.relative_to(existing).parts[1:])
    return f"; did you mean {setting}={guess}?"


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()


def _nearby(folder: Path) -> Iterator[Path]:
    """Folders up to two levels above and below."""
    parents = folder.resolve().parents[:2]
    looked_at = 0
    for root in (folder, *parents):
        yield root
        for child in _subfolders(root):
            yield child
            looked_at += 1
            if looked_at > _LOOKED_AT:
                return
            if root == folder:
                yield from _subfolders(child)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:  # only a guess is at stake
        return []


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + more) or "nothing"
