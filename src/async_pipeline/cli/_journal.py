"""``async-pipeline journal``: what a journal knows of its runs."""

import argparse
import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import JournalError
from ._command import FAILED, OK, CommandError, add_command
from ._failures import SHOWN_ITEM, failure_of, one_line
from ._files import open_stdout
from ._lines import ReaderGoneError, Writer, json_line

__all__ = ["add_journal"]

_JOURNAL = """\
Show what a journal knows: for each run its run_id, its pipeline, how many items
have finished and failed, and when it last changed. A run may be using it.
"""

_JOURNAL_MORE = """\
examples:
  how far a run is

    async-pipeline journal crawl.db

  what has failed in it, as JSON Lines

    async-pipeline journal crawl.db --errors

  where a line looks like this

    {"run_id": "pages", "item": "http://x", "index": 3, "stage": "fetch",
    "message": "OSError: no"}

exit status:
  0    it was shown, or the reader of the output went away
  1    there is no such journal, or it can't be read, or the output not written
  2    wrong usage
  130  Ctrl-C
"""


def add_journal(commands: Any) -> None:
    journal = add_command(
        commands,
        "journal",
        _show_journal,
        summary="show what a journal knows of its runs, and what has failed",
        usage="FILE [--errors]",
        description=_JOURNAL,
        epilog=_JOURNAL_MORE,
    )
    journal.add_argument("file", metavar="FILE", help="what was given to 'async-pipeline run --journal'")
    journal.add_argument(
        "--errors",
        action="store_true",
        help="the items that have failed, as JSON lines with run_id, item, index (from 0), stage and message",
    )


def _show_journal(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        writer = Writer(open_stdout(stack), "output")
        lines = _failure_lines if options.errors else _run_lines
        try:
            asyncio.run(_write(lines(options.file), writer))
        except JournalError as error:
            raise CommandError(str(error), FAILED) from None
    return OK


async def _write(lines: Iterable[bytes], writer: Writer) -> None:
    with contextlib.suppress(ReaderGoneError):
        for line in lines:
            writer.add(line)
            if writer.is_full:
                await writer.flush()
        await writer.flush()


def _failure_lines(path: str) -> Iterator[bytes]:
    from ..journal import read_failures

    for run_id, position, item, error in read_failures(path):
        yield json_line({"run_id": run_id, **failure_of(item, position, error)})


def _run_lines(path: str) -> Iterator[bytes]:
    from ..journal import read_runs

    rows: list[tuple[str, ...]] = [("run_id", "pipeline", "finished", "failed", "last change")]
    for run in read_runs(path):
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.changed))
        names = [one_line(name, SHOWN_ITEM) for name in (run.run_id, run.pipeline)]
        rows.append((*names, f"{run.finished:,}", f"{run.failed:,}", changed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for run_id, pipeline, finished, failed, changed in rows:
        about = f"{run_id:{widths[0]}}  {pipeline:{widths[1]}}"
        yield f"{about}  {finished:>{widths[2]}}  {failed:>{widths[3]}}  {changed}\n".encode()
