"""`python -m benchmarks [check] [NAME ...] [peers=FOLDER]`: all benchmarks, or some.

All together write the results file of this machine and day; some only print their table. `check` compares
with the newest results file of this machine instead: see `benchmarks.check`.
"""

import sys

from benchmarks.check import check
from benchmarks.harness import newest, read, table, write
from benchmarks.runner import BENCHMARKS, arguments, run


def main() -> None:
    checks = sys.argv[1:2] == ["check"]
    names, options = arguments(sys.argv[2 if checks else 1 :])
    if checks:
        path = newest()
        print(f"against {path}")
        sys.exit(check(read(path), names, options))
    entries = run(names, options)
    print(table(entries))
    if names == list(BENCHMARKS):
        print(f"wrote {write(entries)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
