"""The command line: ``async-pipeline run MODULE:PIPELINE`` runs a pipeline over lines of a file or a pipe.

``async-pipeline show MODULE:PIPELINE`` draws one instead, and runs nothing of it;
``async-pipeline journal FILE`` tells what the journal of a run knows.

Nothing here waits for a file in a thread, or blocks the event loop while a pipe is slow: input is read
when it is there, output is written when there is room, so Ctrl-C is heard at once.
"""

import argparse
import asyncio
import codecs
import contextlib
import importlib
import json
import os
import re
import select
import stat
import sys
import time
import traceback
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from io import FileIO
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, cast

from . import __version__
from .errors import JournalError, RecordedError, StageExecutionError
from .fanout import Stream
from .outcome import Outcome
from .pipeline import Pipeline
from .stage import Joinable

if TYPE_CHECKING:
    from .journal import Journal

__all__ = ["main"]

_OK, _FAILED, _USAGE, _INTERRUPTED = 0, 1, 2, 130

_CHUNK = 64 * 1024  # bytes read at once, and bytes of output that are held back at most
_PIPE_BUF = getattr(select, "PIPE_BUF", 512)  # what a pipe that is ready takes without blocking
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows tools begin a file with it
_TICK = 0.1  # seconds between two flushes of the output, and two drawings of the progress line
_PATIENCE = 1.0  # seconds for a reader to take the last lines of a run that was stopped
_SHOWN_FAILURES = 10
_SHOWN_ITEM, _SHOWN_MESSAGE = 60, 160  # characters of each in the summary


class _CommandError(Exception):
    """The command ends here, with one line on stderr and this exit code."""

    def __init__(self, message: str, code: int = _USAGE) -> None:
        super().__init__(message)
        self.code = code


class _LineError(Exception):
    """A line that can't be read as an item, or a result that can't be written; the message says it all."""


class _ReaderGoneError(Exception):
    """Whoever read the output has read enough: ``async-pipeline run ... | head``."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 when items failed, 2 on wrong usage, 130 on Ctrl-C.

    Args:
        argv: the arguments; by default those of the process.
    """
    try:
        options = _parser().parse_args(argv)
        code = options.command(options)
    except _CommandError as error:
        _say(f"async-pipeline: {error}")
        code = error.code
    except KeyboardInterrupt:  # before the event loop runs, or a second one while it stops
        _say("async-pipeline: interrupted")
        code = _INTERRUPTED
    sys.exit(code)


def _say(text: str, end: str = "\n") -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # nobody listens: no reason to stop
            sys.stderr.write(text + end)
            sys.stderr.flush()


# -- the arguments


class _Parser(argparse.ArgumentParser):
    """A parser that answers wrong usage with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="async-pipeline",
        description="Run an async_pipeline Pipeline from the shell, or look at it.",
        epilog="'async-pipeline COMMAND --help' says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_show(commands)
    _add_journal(commands)
    return parser


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


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run a pipeline over lines of JSON or text",
        usage="%(prog)s MODULE:PIPELINE [options]",
        description=_RUN,
        epilog=_RUN_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.set_defaults(command=_run)
    _add_target(run)
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


_SHOW = """\
Show what a pipeline is made of. The module is imported, and nothing is run.

The formats: a tree for the terminal; a Mermaid flowchart, which GitHub, GitLab
and many editors draw; JSON.
"""

_SHOW_MORE = """\
examples:
  the pipeline that crawl.py calls pages, as a tree

    async-pipeline show crawl:pages

  as a picture for a README, inside a code block of the language mermaid

    async-pipeline show crawl:pages --format mermaid

exit status:
  0    it was shown, or the reader of the output went away
  1    the output can't be written
  2    wrong usage
  130  Ctrl-C
"""


def _add_show(commands: Any) -> None:
    show = commands.add_parser(
        "show",
        help="show a pipeline as a tree, a Mermaid flowchart or JSON",
        usage="%(prog)s MODULE:PIPELINE [options]",
        description=_SHOW,
        epilog=_SHOW_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    show.set_defaults(command=_show)
    _add_target(show)
    show.add_argument("--format", choices=_FORMATS, default="tree", help="tree is the default")


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


def _add_journal(commands: Any) -> None:
    journal = commands.add_parser(
        "journal",
        help="show what a journal knows of its runs, and what has failed",
        usage="%(prog)s FILE [--errors]",
        description=_JOURNAL,
        epilog=_JOURNAL_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    journal.set_defaults(command=_show_journal)
    journal.add_argument("file", metavar="FILE", help="what was given to 'async-pipeline run --journal'")
    journal.add_argument(
        "--errors",
        action="store_true",
        help="the items that have failed, as JSON lines with run_id, item, index (from 0), stage and message",
    )


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target",
        metavar="MODULE:PIPELINE",
        help="where the Pipeline is, for example shop.jobs:pipeline; the current folder is importable",
    )


def _concurrency(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"concurrency must be a whole number, not {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError("concurrency must be at least 1")
    return number


# -- the pipeline


def _load(target: str) -> Pipeline[Any, Any]:
    """Import the module and return its pipeline."""
    module_name, _, attribute = target.partition(":")
    if not (all(module_name.split(".")) and all(attribute.split("."))):
        raise _CommandError(f"{target!r} must be MODULE:PIPELINE, for example shop.jobs:pipeline")
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    try:
        found = _find(importlib.import_module(module_name), attribute)
    except _CommandError:
        raise
    except (Exception, SystemExit) as error:  # a module that ends the process would end it in silence
        raise _import_failure(module_name, attribute, error) from None
    if not isinstance(found, Pipeline):
        raise _CommandError(_no_pipeline(target, attribute, found))
    return found


def _find(module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            pipelines = [key for key, value in vars(module).items() if isinstance(value, Pipeline)]
            hint = f"; its pipelines: {', '.join(pipelines)}" if pipelines else ""
            raise _CommandError(f"module {module.__name__!r} has no {attribute!r}{hint}") from None
    return found


def _import_failure(module_name: str, attribute: str, error: BaseException) -> _CommandError:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{module_name}.".startswith(f"{missing}."):
        hint = ""
        if module_name.endswith(".py"):
            hint = f"; write {module_name.removesuffix('.py').replace('/', '.')}:{attribute}"
        return _CommandError(f"there is no module {module_name!r} here or installed{hint}")
    _say("".join(traceback.format_exception(error.with_traceback(_own_part(error)))), end="")
    return _CommandError(f"{module_name!r} can't be imported: {_one_line(_describe(error), _SHOWN_MESSAGE)}")


_MACHINERY = {"importlib", "_frozen_importlib", "_frozen_importlib_external", "async_pipeline"}


def _own_part(error: BaseException) -> Any:
    """The traceback from the first frame of the user's own code."""
    found = error.__traceback__
    while found and str(found.tb_frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        found = found.tb_next
    return found


def _no_pipeline(target: str, attribute: str, found: object) -> str:
    kind = type(found).__name__
    what = f"{target!r} is {'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}, not a Pipeline"
    name = attribute.rpartition(".")[2]
    if isinstance(found, (list, tuple)):
        return f"{what}: write Pipeline({name})"
    if isinstance(found, Joinable) or (callable(found) and not isinstance(found, type)):
        return f"{what}: write Pipeline([{name}])"
    return what


# -- reading


class _Line(NamedTuple):
    """A line as it was read, and its number, counted from 1."""

    number: int
    raw: bytes

    def text(self) -> str:
        try:
            return self.raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise _LineError(
                f"line {self.number} is not UTF-8: {error.reason} at byte {error.start + 1}"
            ) from None

    def escaped(self) -> str:
        return self.raw.removesuffix(b"\r").decode(errors="backslashreplace")

    def json(self) -> Any:
        text = self.text()
        try:
            return _DECODER.decode(text)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # a number that is too long; brackets too deep
            reason = str(error)
        raise _LineError(f"line {self.number} is not JSON: {reason}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class _Splitter:
    """Cuts chunks of input into numbered lines, at line feeds only."""

    def __init__(self, *, skip_blank: bool) -> None:
        self._skip_blank = skip_blank
        self._number = 0
        self._begun: list[bytes] = []  # the parts of a line whose end was not read yet

    def feed(self, chunk: bytes) -> Iterator[_Line]:
        """Return the lines that end in this chunk."""
        *ended, begun = chunk.split(b"\n")
        if ended:
            ended[0] = b"".join((*self._begun, ended[0]))
            self._begun = []
        self._begun.append(begun)
        return self._numbered(ended)

    def end(self) -> Iterator[_Line]:
        """Return the last line, when no line feed ended it."""
        last = b"".join(self._begun)
        return self._numbered([last] if last else [])

    def _numbered(self, lines: list[bytes]) -> Iterator[_Line]:
        for raw in lines:
            self._number += 1
            if self._number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip() or not self._skip_blank:
                yield _Line(self._number, raw)


def _lines(source: FileIO, splitter: _Splitter) -> Iterable[_Line] | AsyncIterable[_Line]:
    read = _lines_of_file if _is_regular(source) else _lines_of_pipe
    return read(source.fileno(), splitter)


def _lines_of_file(fd: int, splitter: _Splitter) -> Iterator[_Line]:
    while chunk := _read(fd):
        yield from splitter.feed(chunk)
    yield from splitter.end()


async def _lines_of_pipe(fd: int, splitter: _Splitter) -> AsyncIterator[_Line]:
    while chunk := await _read_when_ready(fd):
        for line in splitter.feed(chunk):
            yield line
    for line in splitter.end():
        yield line


async def _read_when_ready(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    while True:
        await _until_ready(fd, loop.add_reader, loop.remove_reader)
        with contextlib.suppress(BlockingIOError):  # another process that shares the pipe was faster
            return _read(fd)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        raise
    except OSError as error:
        raise _CommandError(f"the input can't be read: {error.strerror}", _FAILED) from None


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _until_ready(fd: int, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
    """Wait until the file can be read or written without blocking, where the event loop can tell."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        watch(fd, _wake, ready)
    except (OSError, NotImplementedError):  # /dev/null; Windows, where the read itself has to wait
        return
    try:
        await ready
    finally:
        unwatch(fd)


# -- writing


class _Writer:
    """Lines on their way to a file, a pipe or a terminal; they leave with the next :meth:`flush`."""

    def __init__(self, file: FileIO, name: str) -> None:
        self._fd = file.fileno()
        self._name = name
        self._is_file = _is_regular(file)
        self._held = bytearray()
        self._lock = asyncio.Lock()
        self.is_terminal = file.isatty()

    def add(self, line: bytes) -> None:
        self._held += line

    @property
    def is_full(self) -> bool:
        return len(self._held) >= _CHUNK

    @property
    def lines_held(self) -> int:
        return self._held.count(b"\n")

    async def flush(self) -> None:
        async with self._lock:
            while self._held:
                await self._write_some()

    async def _write_some(self) -> None:
        size = len(self._held)
        if not self._is_file:
            loop = asyncio.get_running_loop()
            await _until_ready(self._fd, loop.add_writer, loop.remove_writer)
            size = _PIPE_BUF
        try:
            written = os.write(self._fd, self._held[:size])
        except BlockingIOError:  # another process that shares the pipe filled it
            return
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self._name == "output":
                raise _ReaderGoneError from None
            raise _CommandError(f"the {self._name} can't be written: {error.strerror}", _FAILED) from None
        del self._held[:written]


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_LINE_ENDS = ("\x85", "\u2028", "\u2029")  # allowed in JSON, but some readers take them for the end of a line


def _json_line(value: object) -> bytes:
    text = _ENCODER.encode(value)
    if not text.isascii():
        for char in _LINE_ENDS:
            text = text.replace(char, f"\\u{ord(char):04x}")
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 can't
        return (json.dumps(value, allow_nan=False) + "\n").encode()


# -- one item


class _LineStep:
    """The user's pipeline as a step from a line of input to a line of output."""

    def __init__(self, step: Any, *, is_json: bool) -> None:
        self.name: str = step.name
        self._run = step.run
        self._read: Callable[[_Line], Any] = _Line.json if is_json else _Line.text
        self._run_numbered = step._run_item
        self._scope = getattr(step, "_scope", None)
        self._run_item = None if self._run_numbered is None else self._run_line

    def _parse(self, line: _Line) -> Any:
        item = self._read(line)
        if self._scope is not None:
            try:
                _ENCODER.encode(item)
            except Exception as error:  # 1e999, which is read as infinity; it would end the whole batch
                raise _LineError(f"line {line.number} can't be kept in a journal: {error}") from error
        return item

    async def run(self, line: _Line, /, *, context: Any = None) -> bytes:
        return self._written(await self._run(self._parse(line), context=context))

    async def _run_line(self, line: _Line, context: Any, index: int, timeout: float | None) -> bytes:
        numbered = cast(Callable[..., Any], self._run_numbered)
        return self._written(await numbered(self._parse(line), context, index, timeout))

    def _written(self, result: object) -> bytes:
        try:
            return _json_line(result)
        except Exception as error:
            raise _LineError(f"the result is not JSON: {error}") from error

    def failure(self, outcome: Outcome[bytes]) -> dict[str, Any]:
        """Return what the errors file says of a failed item."""
        # read again: the pipeline may have changed the item it was given
        try:
            item = self._parse(outcome.item)
            _json_line(item)
        except Exception:  # no item at all; or 1e999, which is read as infinity
            item = outcome.item.escaped()
        return _failure(item, outcome.index, outcome.error)


def _failure(item: Any, index: int | None, error: BaseException | None) -> dict[str, Any]:
    stage = None
    if isinstance(error, StageExecutionError):
        stage, error = error.stage_name, error.original_error
    return {"item": item, "index": index, "stage": stage, "message": _describe(error)}


def _describe(error: BaseException | None) -> str:
    if isinstance(error, RecordedError):  # as it was described when it was raised
        name = re.split("[.:]", error.type)[-1]
        return f"{name}: {error.message}" if error.message else name
    name = type(error).__name__
    try:
        text = str(error)
    except Exception as broken:
        text = f"<its text can't be had: {type(broken).__name__}>"
    if isinstance(error, _LineError):
        return text
    return f"{name}: {text}" if text else name


def _one_line(text: str, limit: int) -> str:
    """Shorten, and show what could move the cursor as an escape."""
    shown = text if len(text) <= limit else text[:limit] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


class _Summary:
    """The first failures, for people."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def add(self, failure: dict[str, Any], line: _Line) -> None:
        if len(self._shown) < _SHOWN_FAILURES:
            where = "" if failure["stage"] is None else f"stage {failure['stage']!r}: "
            what = _one_line(where + failure["message"], _SHOWN_MESSAGE)
            item = _one_line(line.escaped(), _SHOWN_ITEM)
            self._shown.append(f"  item {failure['index']}: {what} (item: {item})\n")

    def say(self, failed: int, done: int) -> None:
        left = failed - len(self._shown)
        more = f"  and {left:,} more; --errors FILE keeps them all\n" if left else ""
        items = "item" if done == 1 else "items"
        _say(f"async-pipeline: {failed:,} of {done:,} {items} failed\n{''.join(self._shown)}{more}", end="")


# -- progress


class _Progress:
    """A line at the bottom of a terminal; anywhere else, nothing."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_shown = is_wanted and sys.stderr is not None and sys.stderr.isatty()
        self._width = 0

    def draw(self, text: str) -> None:
        if self._is_shown:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            text = text[: columns - 1]  # a line that wraps can't be drawn over
            _say("\r" + text.ljust(self._width), end="")
            self._width = len(text)

    def clear(self) -> None:
        if self._width:
            _say("\r" + " " * self._width + "\r", end="")
            self._width = 0

    def finish(self, text: str) -> None:
        if self._is_shown:
            self.clear()
            _say(text)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# -- a picture


def _show(options: argparse.Namespace) -> int:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    make, encode = _FORMATS[options.format]
    with contextlib.ExitStack() as stack:
        writer = _Writer(_open_stdout(stack), "output")
        writer.add(encode(make(_load(options.target)) + "\n", encoding))
        with contextlib.suppress(_ReaderGoneError):
            asyncio.run(writer.flush())
    return _OK


def _json(pipeline: Pipeline[Any, Any]) -> str:
    from .text import describe

    return describe(pipeline)


_PLAIN_LINES = str.maketrans("\u251c\u2500\u2502\u2514", "|-|`")


def _encode_tree(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN_LINES).encode(encoding, "backslashreplace")


def _encoder(escape: Callable[[str], str]) -> Callable[[str, str], bytes]:
    # others read it as UTF-8, so what is written in another encoding must be ASCII
    def encode(text: str, encoding: str) -> bytes:
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        unfit = r"[\ud800-\udfff]" if is_utf8 else r"[^\x00-\x7f]"
        return re.sub(unfit, lambda match: escape(match[0]), text).encode(encoding)

    return encode


_Format = tuple[Callable[[Pipeline[Any, Any]], str], Callable[[str, str], bytes]]
_FORMATS: dict[str, _Format] = {
    "tree": (str, _encode_tree),
    "mermaid": (Pipeline.to_mermaid, _encoder(lambda char: f"#{ord(char)};")),
    "json": (_json, _encoder(lambda char: json.dumps(char)[1:-1])),
}


# -- a journal


def _show_journal(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        writer = _Writer(_open_stdout(stack), "output")
        lines = _failure_lines if options.errors else _run_lines
        try:
            asyncio.run(_write(lines(options.file), writer))
        except JournalError as error:
            raise _CommandError(str(error), _FAILED) from None
    return _OK


async def _write(lines: Iterable[bytes], writer: _Writer) -> None:
    with contextlib.suppress(_ReaderGoneError):
        for line in lines:
            writer.add(line)
            if writer.is_full:
                await writer.flush()
        await writer.flush()


def _failure_lines(path: str) -> Iterator[bytes]:
    from .journal import read_failures

    for run_id, position, item, error in read_failures(path):
        yield _json_line({"run_id": run_id, **_failure(item, position, error)})


def _run_lines(path: str) -> Iterator[bytes]:
    from .journal import read_runs

    rows: list[tuple[str, ...]] = [("run_id", "pipeline", "finished", "failed", "last change")]
    for run in read_runs(path):
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.changed))
        names = [_one_line(name, _SHOWN_ITEM) for name in (run.run_id, run.pipeline)]
        rows.append((*names, f"{run.finished:,}", f"{run.failed:,}", changed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for run_id, pipeline, finished, failed, changed in rows:
        about = f"{run_id:{widths[0]}}  {pipeline:{widths[1]}}"
        yield f"{about}  {finished:>{widths[2]}}  {failed:>{widths[3]}}  {changed}\n".encode()


# -- the run


def _run(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open_input(options.input))
        target = _open_stdout(stack) if options.output == "-" else None
        pipeline = _load(options.target)
        output = target or stack.enter_context(_open_output(options.output, "output"))
        errors = None
        if options.errors is not None:
            errors = stack.enter_context(_open_output(options.errors, "errors"))
        pictures = _pictures(options)
        journal = _journal(options)
        _check_distinct(
            ("--input", source),
            ("--output", output),
            ("--errors", errors),
            ("--journal", options.journal),
            *((picture.option, picture.path) for picture in pictures),
        )
        shown = pipeline.replace(observers=[*pipeline.observers, *(p.recorder for p in pictures)])
        step = shown if journal is None else journal.around(shown, shown)
        to_empty = [file for file in (errors, None if target else output) if file and _is_regular(file)]
        try:
            code = asyncio.run(_Run(options, step, source, output, errors, to_empty).run())
        except JournalError as error:
            raise _CommandError(str(error), _FAILED) from None
        finally:
            are_written = [picture.write(pipeline) for picture in pictures]
        return code if all(are_written) else code or _FAILED


class _Picture:
    """A recorder of the run, and the file that it fills in the end."""

    def __init__(self, option: str, path: str, recorder: Any, write: Callable[..., None]) -> None:
        self.option = option
        self.path = path
        self.recorder = recorder
        self._write = write
        if path == "-":
            raise _CommandError(f"{option} takes a file")
        folder = os.path.dirname(os.path.realpath(path))
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            reason = "it is a folder" if os.path.isdir(path) else "there is no folder to write to"
            raise _CommandError(f"the {option[2:]} {path!r} can't be written: {reason}")

    def write(self, pipeline: Pipeline[Any, Any]) -> bool:
        try:
            self._write(self.path, pipeline)
        except OSError as error:
            _say(f"async-pipeline: the {self.option[2:]} {self.path!r} can't be written: {error.strerror}")
            return False
        return True


def _pictures(options: argparse.Namespace) -> list[_Picture]:
    pictures = []
    if options.report is not None:
        from .telemetry.report import ReportRecorder

        report = ReportRecorder()
        pictures.append(_Picture("--report", options.report, report, report.write))
    if options.trace is not None:
        from .telemetry.trace import TraceRecorder

        trace = TraceRecorder()
        pictures.append(_Picture("--trace", options.trace, trace, lambda path, _: trace.write(path)))
    return pictures


def _journal(options: argparse.Namespace) -> "Journal | None":
    if options.journal is None:
        for option, value in (("--run-id", options.run_id), ("--retry-failed", options.retry_failed)):
            if value is not None:
                raise _CommandError(f"{option} is of a journal: add --journal FILE")
        return None
    from .journal import Journal

    if options.journal == "-":
        raise _CommandError("--journal takes a file")
    try:
        return Journal(options.journal, run_id=options.run_id, retry_failed=options.retry_failed is not False)
    except (TypeError, ValueError) as error:
        raise _CommandError(f"the journal can't be used: {error}") from None


def _open_input(path: str) -> FileIO:
    try:
        if path != "-":
            return FileIO(path, "r")
        return FileIO(_fileno(sys.stdin), "r", closefd=False)
    except OSError as error:
        raise _CommandError(f"the input {path!r} can't be read: {error.strerror or error}") from None


def _open_stdout(stack: contextlib.ExitStack) -> FileIO:
    """Open stdout, and lead what is printed to stderr, lest it mix with the results."""
    try:
        file = stack.enter_context(FileIO(_fileno(sys.stdout), "w", closefd=False))
    except OSError as error:
        raise _CommandError(f"the output '-' can't be written: {error.strerror or error}") from None
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
    return file


def _fileno(standard: TextIO | None) -> int:
    if standard is None:  # closed by the shell: <&- or >&-
        raise OSError("it is closed")
    return standard.fileno()


def _open_output(path: str, name: str) -> FileIO:
    """Open a file to write, as it is: it is emptied when everything is known to be right."""
    if path == "-":
        raise _CommandError(
            "--errors takes a file; without it, the end of the run sums the failures up on stderr"
        )
    try:
        return FileIO(path, "a")
    except OSError as error:
        raise _CommandError(f"the {name} {path!r} can't be written: {error.strerror}") from None


def _check_distinct(*files: tuple[str, FileIO | str | None]) -> None:
    seen: dict[object, str] = {}
    for option, file in files:
        if file is not None:
            other = seen.setdefault(_identity(file), option)
            if other != option:
                raise _CommandError(f"{other} and {option} are the same file")


def _identity(file: FileIO | str) -> object:
    """What is equal for two that are the same file; pipes and terminals may be shared."""
    try:
        status = os.stat(file if isinstance(file, str) else file.fileno())
    except OSError:  # there is none yet
        return os.path.realpath(str(file))
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else object()


def _is_regular(file: FileIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


class _Run:
    """One run: its counts, and the way from the input to the output."""

    def __init__(
        self,
        options: argparse.Namespace,
        step: Any,
        source: FileIO,
        output: FileIO,
        errors: FileIO | None,
        to_empty: Sequence[FileIO],
    ) -> None:
        self._step = _LineStep(step, is_json=not options.lines)
        self._to_empty = to_empty
        self._output = _Writer(output, "output")
        self._errors = None if errors is None else _Writer(errors, "errors")
        self._summary = _Summary()
        self._progress = _Progress(is_wanted=not source.isatty())
        self._done = self._failed = self._bytes = 0
        self._size = os.fstat(source.fileno()).st_size - source.tell() if _is_regular(source) else 0
        self._started = time.monotonic()
        self._stream = Stream[bytes](
            self._step,
            _lines(source, _Splitter(skip_blank=not options.lines)),
            options.concurrency,
            None,
            ordered=not options.unordered,
            buffer=None,
        )

    async def run(self) -> int:
        try:
            await self._process()
            await self._flush()
        except _ReaderGoneError:
            await self._flush_rest()
            self._progress.clear()
            return _OK
        except BaseException as error:
            await self._flush_rest()
            self._finish()
            if isinstance(error, asyncio.CancelledError):  # what asyncio.run makes of the first Ctrl-C
                _say(f"async-pipeline: interrupted after {self._done:,} items; {self._kept()}")
                return _INTERRUPTED
            raise
        self._finish()
        return _FAILED if self._failed else _OK

    async def _process(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                ticker = group.create_task(self._tick())
                try:
                    await self._consume()
                finally:
                    ticker.cancel()
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def _consume(self) -> None:
        async with self._stream as results:
            for file in self._to_empty:  # now that the journal is ours: another run may write to them
                file.truncate(0)
            try:
                async for outcome in results.outcomes():
                    self._take(outcome)
                    if self._output.is_full or (self._errors is not None and self._errors.is_full):
                        await self._flush()
            except asyncio.CancelledError:
                for outcome in results.drain():  # what has finished behind an item that has not
                    self._take(outcome)
                raise

    def _take(self, outcome: Outcome[bytes]) -> None:
        self._done += 1
        self._bytes += len(outcome.item.raw) + 1
        if outcome.error is None:
            self._output.add(outcome.unwrap())
            return
        self._failed += 1
        failure = self._step.failure(outcome)
        if self._errors is None:
            self._summary.add(failure, outcome.item)
        else:
            self._errors.add(_json_line(failure))

    async def _tick(self) -> None:
        """See that a live reader gets each line soon, without a system call for each."""
        while True:
            await asyncio.sleep(_TICK)
            await self._flush()
            self._progress.draw(self._status(self._stream.in_flight))

    async def _flush(self) -> None:
        if self._errors is not None:  # first, lest a reader of the output that leaves takes them along
            await self._errors.flush()
        if self._output.is_terminal:
            self._progress.clear()
        await self._output.flush()

    async def _flush_rest(self) -> None:
        # a run that is stopped keeps what it has, but a reader that stands still must not hold it
        # (not asyncio.timeout: early releases of 3.11 raise no TimeoutError in a task that was cancelled)
        flushing = asyncio.create_task(self._flush())
        await asyncio.wait({flushing}, timeout=_PATIENCE)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)

    def _kept(self) -> str:
        left = self._output.lines_held
        return f"the last {left:,} results were not taken" if left else "their results are written"

    def _status(self, in_flight: int) -> str:
        elapsed = time.monotonic() - self._started or 0.001  # a coarse clock may not have moved yet
        rate = self._done / elapsed
        parts = [f"{self._done:,} done", f"{rate:,.{0 if rate >= 10 else 1}f}/s", f"{self._failed:,} failed"]
        parts.append(f"{in_flight:,} in flight")
        if self._size and self._bytes:
            left = elapsed * (self._size - self._bytes) / self._bytes
            parts.append(f"{_clock(max(left, 0.0))} left")
        return ", ".join(parts)

    def _finish(self) -> None:
        self._progress.finish(self._status(0))
        if self._failed and self._errors is None:
            self._summary.say(self._failed, self._done)
