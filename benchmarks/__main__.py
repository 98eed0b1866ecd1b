"""`python -m benchmarks [check] [NAME ...] [peers=FOLDER]`: all benchmarks, or some.

Their entries go into the results file of this machine and day, and replace those of their names. `check`
compares with the newest such file instead: see `benchmarks.check`.
"""

import sys

from benchmarks.check import check
from benchmarks.harness import newest, read, table, write
from benchmarks.runner import arguments, run


def main() -> None:
    checks = sys.argv[1:2] == ["check"]
    names, options = arguments(sys.argv[2 if checks else 1 :])
    if checks:
        path = newest()
        print(f"against {path}")
        sys.exit(check(read(path), names, options))
    entries = run(names, options)
    print(table(entries))
    print(f"wrote {write(entries)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
