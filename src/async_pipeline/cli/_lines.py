"""Lines of input and of output: read when they are there, written when there is room."""

import asyncio
import contextlib
import json
import os
import select
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from io import FileIO
from typing import Any, NamedTuple, NoReturn

from ._command import FAILED, CommandError
from ._files import is_regular

__all__ = [
    "ENCODER",
    "Line",
    "LineError",
    "ReaderGoneError",
    "Splitter",
    "Writer",
    "json_line",
    "read_lines",
    "until_ready",
]

_CHUNK = 64 * 1024  # bytes read at once, and bytes of output that are held back at most
_PIPE_BUF = getattr(select, "PIPE_BUF", 512)  # what a pipe that is ready takes without blocking
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows tools begin a file with it


class LineError(Exception):
    """A line that can't be read as an item, or a result that can't be written; the message says it all."""


class ReaderGoneError(Exception):
    """Whoever read the output has read enough: ``async-pipeline run ... | head``."""


# -- reading


class Line(NamedTuple):
    """A line as it was read, and its number, counted from 1."""

    number: int
    raw: bytes

    def text(self) -> str:
        try:
            return self.raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise LineError(
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
        raise LineError(f"line {self.number} is not JSON: {reason}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class Splitter:
    """Cuts chunks of input into numbered lines, at line feeds only."""

    def __init__(self, *, skip_blank: bool) -> None:
        self._skip_blank = skip_blank
        self._number = 0
        self._begun: list[bytes] = []  # the parts of a line whose end was not read yet

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """Return the lines that end in this chunk."""
        *ended, begun = chunk.split(b"\n")
        if ended:
            ended[0] = b"".join((*self._begun, ended[0]))
            self._begun = []
        self._begun.append(begun)
        return self._numbered(ended)

    def end(self) -> Iterator[Line]:
        """Return the last line, when no line feed ended it."""
        last = b"".join(self._begun)
        return self._numbered([last] if last else [])

    def _numbered(self, lines: list[bytes]) -> Iterator[Line]:
        for raw in lines:
            self._number += 1
            if self._number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip() or not self._skip_blank:
                yield Line(self._number, raw)


def read_lines(source: FileIO, splitter: Splitter) -> Iterable[Line] | AsyncIterable[Line]:
    read = _lines_of_file if is_regular(source) else _lines_of_pipe
    return read(source.fileno(), splitter)


def _lines_of_file(fd: int, splitter: Splitter) -> Iterator[Line]:
    while chunk := _read(fd):
        yield from splitter.feed(chunk)
    yield from splitter.end()


async def _lines_of_pipe(fd: int, splitter: Splitter) -> AsyncIterator[Line]:
    while chunk := await _read_when_ready(fd):
        for line in splitter.feed(chunk):
            yield line
    for line in splitter.end():
        yield line


async def _read_when_ready(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    while True:
        await until_ready(fd, loop.add_reader, loop.remove_reader)
        with contextlib.suppress(BlockingIOError):  # another process that shares the pipe was faster
            return _read(fd)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except BlockingIOError:
        raise
    except OSError as error:
        raise CommandError(f"the input can't be read: {error.strerror}", FAILED) from None


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def until_ready(fd: int, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
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


class Writer:
    """Lines on their way to a file, a pipe or a terminal; they leave with the next :meth:`flush`."""

    def __init__(self, file: FileIO, name: str) -> None:
        self._fd = file.fileno()
        self._name = name
        self._is_file = is_regular(file)
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
            await until_ready(self._fd, loop.add_writer, loop.remove_writer)
            size = _PIPE_BUF
        try:
            written = os.write(self._fd, self._held[:size])
        except BlockingIOError:  # another process that shares the pipe filled it
            return
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self._name == "output":
                raise ReaderGoneError from None
            raise CommandError(f"the {self._name} can't be written: {error.strerror}", FAILED) from None
        del self._held[:written]


ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_LINE_ENDS = ("\x85", "\u2028", "\u2029")  # allowed in JSON, but some readers take them for the end of a line


def json_line(value: object) -> bytes:
    text = ENCODER.encode(value)
    if not text.isascii():
        for char in _LINE_ENDS:
            text = text.replace(char, f"\\u{ord(char):04x}")
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 can't
        return (json.dumps(value, allow_nan=False) + "\n").encode()
