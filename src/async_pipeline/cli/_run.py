"""``async-pipeline run``: a pipeline over lines of a file or a pipe."""

import argparse
import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import JournalError, JournalMismatch
from ..pipeline import Pipeline
from ._batch import Batch
from ._command import FAILED, CommandError, add_command, say
from ._files import check_distinct, open_input, open_output, open_stdout
from ._target import add_target, load

if TYPE_CHECKING:
    from ..journal import Journal

__all__ = ["add_run"]

_RUN = """\
Run every item of the input through a pipeline, several at a time, and write one
JSON line per result.

A failed item writes no result, and the others go on. What the pipeline prints
goes to stderr while the results go to stdout. When stderr is a terminal, a line
there shows how far the run is.
"""

_RUN_MORE = """\
examples:
  with this in crawl.py

    from async_pipeline import Pipeline

    async def fetch(url): ...
    def parse(page): ...

    pages = Pipeline([fetch, parse])

  one URL a line, 50 at a time, the first ten results

    async-pipeline run crawl:pages --lines --concurrency 50 < urls.txt | head

  JSON Lines in, JSON Lines out, and the failures in a file of their own

    async-pipeline run crawl:pages --input in.jsonl --output out.jsonl \\
        --errors failed.jsonl

  where a line of failed.jsonl looks like this

    {"item": "http://x", "index": 3, "stage": "fetch", "message": "OSError: no"}

  what took so long, and what went wrong: a page for the browser, and a trace
  for https://ui.perfetto.dev; they are written after Ctrl-C, too

    async-pipeline run crawl:pages --input in.jsonl --output out.jsonl \\
        --report run.html --trace run.json

  a run that goes on where it was stopped, by kill -9, too: give the same
  command again, and only what has not finished is run; the results of the rest
  come out of the journal, so that the output is complete

    async-pipeline run crawl:pages --input in.jsonl --output out.jsonl \\
        --journal crawl.db

exit status:
  0    every item succeeded, or the reader of the output went away
  1    items failed, or the input, the output or the journal did
  2    wrong usage
  130  Ctrl-C; what was finished by then is written
"""


def add_run(commands: Any) -> None:
    run = add_command(
        commands,
        "run",
        _run,
        summary="run a pipeline over lines of JSON or text",
        usage="MODULE:PIPELINE [options]",
        description=_RUN,
        epilog=_RUN_MORE,
    )
    add_target(run)
    _add_files(run)
    _add_pace(run)
    _add_journal(run)


def _add_files(run: argparse.ArgumentParser) -> None:
    run.add_argument("--input", default="-", metavar="FILE", help="what to read; - (the default) is stdin")
    run.add_argument("--lines", action="store_true", help="each line is an item, a str, instead of JSON")
    run.add_argument(
        "--output", default="-", metavar="FILE", help="where to write; - (the default) is stdout"
    )
    run.add_argument(
        "--errors",
        metavar="FILE",
        help="where to write the failures, as JSON lines with item, index (from 0), stage and message; "
        "by default, the end of the run sums them up on stderr",
    )
    run.add_argument(
        "--report",
        metavar="FILE",
        help="where to write an HTML page about the run: throughput, latencies, errors, the slowest items",
    )
    run.add_argument(
        "--trace", metavar="FILE", help="where to write each stage of each item as a trace for Perfetto"
    )


def _add_pace(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--concurrency",
        type=_concurrency,
        default=5,
        metavar="N",
        help="how many items are in flight at most; 5 by default",
    )
    run.add_argument(
        "--unordered",
        action="store_true",
        help="write results as they finish, not in input order, so that a slow item holds nothing up",
    )


def _add_journal(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--journal",
        metavar="FILE",
        help="keep what has finished in FILE, so that the same command after a crash runs the rest only",
    )
    run.add_argument(
        "--run-id",
        metavar="ID",
        help="which run of the journal this is, by default the pipeline's name; a new one begins anew",
    )
    run.add_argument(
        "--retry-failed",
        action=argparse.BooleanOptionalAction,
        help="whether items that have failed in the journal run again (yes, by default) or fail as they did",
    )


def _concurrency(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"concurrency must be a whole number, not {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError("concurrency must be at least 1")
    return number


def _run(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        source = open_input(stack, options.input)
        stdout = open_stdout(stack) if options.output == "-" else None
        pipeline = load(options.target)
        output = stdout or open_output(stack, options.output, "output")
        errors = None if options.errors is None else open_output(stack, options.errors, "errors")
        recordings = _recordings(options)
        journal = _journal(options)
        check_distinct(
            ("--input", source),
            ("--output", output),
            ("--errors", errors),
            ("--journal", options.journal),
            *((each.option, each.path) for each in recordings),
        )
        recorders = [recording.recorder for recording in recordings]
        watched = pipeline.replace(observers=[*pipeline.observers, *recorders])
        step = watched if journal is None else journal.around(watched, watched)
        try:
            code = asyncio.run(Batch(options, step, source, output, errors).run())
        except JournalError as error:
            hint = " (--run-id)" if isinstance(error, JournalMismatch) else ""
            raise CommandError(f"{error}{hint}", FAILED) from None
        finally:
            are_written = [recording.write(pipeline) for recording in recordings]
        return code if all(are_written) else code or FAILED


class _Recording:
    """A recorder of the run, and the file that it fills in the end."""

    def __init__(self, option: str, path: str, recorder: Any, write: Callable[..., None]) -> None:
        self.option = option
        self.path = path
        self.recorder = recorder
        self._write = write
        if path == "-":
            raise CommandError(f"{option} takes a file")
        folder = os.path.dirname(os.path.realpath(path))
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            reason = "it is a folder" if os.path.isdir(path) else "there is no folder to write to"
            raise CommandError(f"the {option[2:]} {path!r} can't be written: {reason}")

    def write(self, pipeline: Pipeline[Any, Any]) -> bool:
        try:
            self._write(self.path, pipeline)
        except OSError as error:
            say(f"async-pipeline: the {self.option[2:]} {self.path!r} can't be written: {error.strerror}")
            return False
        return True


def _recordings(options: argparse.Namespace) -> list[_Recording]:
    recordings = []
    if options.report is not None:
        from ..telemetry.report import ReportRecorder

        report = ReportRecorder()
        recordings.append(_Recording("--report", options.report, report, report.write))
    if options.trace is not None:
        from ..telemetry.trace import TraceRecorder

        trace = TraceRecorder()
        recordings.append(_Recording("--trace", options.trace, trace, lambda path, _: trace.write(path)))
    return recordings


def _journal(options: argparse.Namespace) -> "Journal | None":
    if options.journal is None:
        for option, value in (("--run-id", options.run_id), ("--retry-failed", options.retry_failed)):
            if value is not None:
                raise CommandError(f"{option} is of a journal: add --journal FILE")
        return None
    from ..journal import Journal

    if options.journal == "-":
        raise CommandError("--journal takes a file")
    try:
        return Journal(options.journal, run_id=options.run_id, retry_failed=options.retry_failed is not False)
    except (TypeError, ValueError) as error:
        raise CommandError(f"the journal can't be used: {error}") from None
