"""One run over all lines of the input: its counts, its output, and what it tells people."""

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from io import FileIO
from typing import Any, cast

from ..fanout import Stream
from ..outcome import Outcome
from ._command import FAILED, INTERRUPTED, OK, say
from ._failures import Summary, failure_of
from ._files import is_regular
from ._lines import ENCODER, Line, LineError, ReaderGoneError, Splitter, Writer, json_line, read_lines
from ._progress import Progress, clock

__all__ = ["Batch"]

_TICK = 0.1  # seconds between two flushes of the output, and two drawings of the progress line
_PATIENCE = 1.0  # seconds for a reader to take the last lines of a run that was stopped


class _LineStep:
    """The user's pipeline as a step from a line of input to a line of output."""

    def __init__(self, step: Any, *, is_json: bool) -> None:
        self.name: str = step.name
        self._run = step.run
        self._read: Callable[[Line], Any] = Line.json if is_json else Line.text
        self._run_numbered = step._run_item
        self._scope = getattr(step, "_scope", None)
        self._run_item = None if self._run_numbered is None else self._run_line

    def _parse(self, line: Line) -> Any:
        item = self._read(line)
        if self._scope is not None:
            try:
                ENCODER.encode(item)
            except Exception as error:  # 1e999, which is read as infinity; it would end the whole batch
                raise LineError(f"line {line.number} can't be kept in a journal: {error}") from error
        return item

    async def run(self, line: Line, /, *, context: Any = None) -> bytes:
        return self._written(await self._run(self._parse(line), context=context))

    async def _run_line(self, line: Line, context: Any, index: int, timeout: float | None) -> bytes:
        numbered = cast(Callable[..., Any], self._run_numbered)
        return self._written(await numbered(self._parse(line), context, index, timeout))

    def _written(self, result: object) -> bytes:
        try:
            return json_line(result)
        except Exception as error:
            raise LineError(f"the result is not JSON: {error}") from error

    def failure(self, outcome: Outcome[bytes]) -> dict[str, Any]:
        """Return what the errors file says of a failed item."""
        # read again: the pipeline may have changed the item it was given
        try:
            item = self._parse(outcome.item)
            json_line(item)
        except Exception:  # no item at all; or 1e999, which is read as infinity
            item = outcome.item.escaped()
        return failure_of(item, outcome.index, outcome.error)


class Batch:
    """One run: its counts, and the way from the input to the output."""

    def __init__(
        self,
        options: argparse.Namespace,
        step: Any,
        source: FileIO,
        output: FileIO,
        errors: FileIO | None,
    ) -> None:
        self._step = _LineStep(step, is_json=not options.lines)
        to_empty = (errors, None if options.output == "-" else output)
        self._to_empty = [file for file in to_empty if file is not None and is_regular(file)]
        self._output = Writer(output, "output")
        self._errors = None if errors is None else Writer(errors, "errors")
        self._summary = Summary()
        self._progress = Progress(is_wanted=not source.isatty())
        self._done = self._failed = self._bytes = 0
        self._size = os.fstat(source.fileno()).st_size - source.tell() if is_regular(source) else 0
        self._started = time.monotonic()
        self._stream = Stream[bytes](
            self._step,
            read_lines(source, Splitter(skip_blank=not options.lines)),
            options.concurrency,
            None,
            ordered=not options.unordered,
            buffer=None,
        )

    async def run(self) -> int:
        try:
            await self._process()
            await self._flush()
        except ReaderGoneError:
            await self._flush_rest()
            self._progress.clear()
            return OK
        except BaseException as error:
            await self._flush_rest()
            self._finish()
            if isinstance(error, asyncio.CancelledError):  # what asyncio.run makes of the first Ctrl-C
                say(f"async-pipeline: interrupted after {self._done:,} items; {self._kept()}")
                return INTERRUPTED
            raise
        self._finish()
        return FAILED if self._failed else OK

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
            self._errors.add(json_line(failure))

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
            parts.append(f"{clock(max(left, 0.0))} left")
        return ", ".join(parts)

    def _finish(self) -> None:
        self._progress.finish(self._status(0))
        if self._failed and self._errors is None:
            self._summary.say(self._failed, self._done)
