"""``python -m benchmarks [--quick] [--only TEXT] [--write FILE] [--page FILE]``; see ``--help``."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .comparison import compare
from .page import lines, unexplained, write_page
from .tables import FULL, QUICK, Effort, write_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and print Markdown.")
    parser.add_argument("--quick", action="store_true", help="less than a minute, to see that it works")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the rows whose name contains TEXT: map, hooks, neighbours"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables to FILE as well")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="measure the neighbours only, and put them into FILE and its .svg: docs/comparison.md",
    )
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    if arguments.page is not None:
        _write_page(effort, arguments.page)
        return
    text = list(_shown(write_tables(effort, arguments.only)))
    if arguments.write is not None:
        arguments.write.write_text("\n".join(text) + "\n", encoding="utf-8")


def _shown(text: Iterable[str]) -> Iterator[str]:
    for line in text:
        print(line, flush=True)
        yield line


def _write_page(effort: Effort, page: Path) -> None:
    comparison = compare(effort.comparison, lambda step: print(f"measuring {step}", file=sys.stderr))
    write_page(comparison, page)
    for _ in _shown(lines(comparison)):
        pass
    for row in unexplained(comparison):
        print(f"lost without a reason in benchmarks/page.py: {row.row}, {row.who} {row.by}", file=sys.stderr)


if __name__ == "__main__":
    main()
