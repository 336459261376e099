"""``python -m benchmarks [--quick] [--only TEXT] [--write FILE]``; all of it takes some minutes."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from .tables import FULL, QUICK, write_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and print Markdown.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the rows whose name contains TEXT: map, hooks"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables to FILE as well")
    arguments = parser.parse_args()
    lines = list(_shown(write_tables(QUICK if arguments.quick else FULL, arguments.only)))
    if arguments.write is not None:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _shown(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, flush=True)
        yield line


if __name__ == "__main__":
    main()
