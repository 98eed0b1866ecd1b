"""No ratio may be lost: this run against a stored one."""

from collections.abc import Callable, Sequence

from benchmarks.harness import Entry, Options, table
from benchmarks.runner import BENCHMARKS, run

MOST_LOSS = 0.15


def lost(stored: Sequence[Entry], now: Sequence[Entry]) -> list[str]:
    """Names of entries of `now` whose ratio is more than 15 % below the stored one."""
    before = {entry.name: entry.ratio for entry in stored}
    return [
        entry.name
        for entry in now
        if entry.ratio is not None
        and (then := before.get(entry.name)) is not None
        and entry.ratio < (1 - MOST_LOSS) * then
    ]


def better(first: Sequence[Entry], second: Sequence[Entry]) -> list[Entry]:
    """Of two runs, the better of each entry."""
    again = {entry.name: entry for entry in second}
    pairs = [(entry, again.get(entry.name, entry)) for entry in first]
    return [max(pair, key=lambda entry: -1.0 if entry.ratio is None else entry.ratio) for pair in pairs]


def check(
    stored: Sequence[Entry],
    names: Sequence[str],
    options: Options,
    measure: Callable[[Sequence[str], Options], list[Entry]] = run,
) -> str | int:
    """What to exit with: 0, or a text that names the entries that lost more than 15 %.

    A benchmark with such an entry is run once more first, and the better figure counts: a busy machine is not
    a slow program.
    """
    failed, entries = [], []
    for name in names:
        found = measure([name], options)
        if lost(stored, found):
            found = better(found, measure([name], options))
        entries += found
        failed += lost(stored, found)
    print(table(entries))
    measured = {entry.name for entry in entries if entry.ratio is not None}
    gone = [e.name for e in stored if e.ratio is not None and e.name not in measured]
    if gone and list(names) == list(BENCHMARKS):
        print(f"stored, but not measured now: {', '.join(gone)}")
    if not failed:
        return 0
    before, now = ({e.name: e.ratio for e in these} for these in (stored, entries))
    return "more than 15 % lost:\n" + "\n".join(f"  {name}: {before[name]} -> {now[name]}" for name in failed)
