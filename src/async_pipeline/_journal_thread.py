"""The thread of a journal: the event loop asks, and it reads and writes the file."""

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ._journal_file import Answer, Found, JournalFile, Key, Row
from .errors import JournalError
from .waiting import until_ended

__all__ = ["JournalThread"]

T = TypeVar("T")


class JournalThread:
    """The one thread that uses the file, and what it is to do.

    What is asked for while it works is done together afterwards, and told by one wake-up of the event loop.
    """

    def __init__(self, file: JournalFile) -> None:
        self._file = file
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="Journal")
        self._finds: list[tuple[Key, asyncio.Future[Found | None]]] = []
        self._saves: list[tuple[Row, asyncio.Future[None]]] = []
        self._is_called = False  # whether _start is on its way, or the thread works
        self._group: asyncio.Future[Answer] | None = None  # what the thread does

    async def begin(self) -> None:
        """Open the file; a cancellation waits until that has ended."""
        await _to_its_end(self._do(self._file.open))

    async def end(self) -> None:
        """Do what was asked for, and close the file; a cancellation waits until the thread is gone."""
        try:
            # not by waiting for _start: a KeyboardInterrupt may have broken the chain of calls
            if self._group is not None:
                await _to_its_end(self._group)
            if self._saves:
                saves, self._saves = self._saves, []
                await _to_its_end(self._do(self._file.run, [], [row for row, _ in saves]))
        finally:
            try:
                await _to_its_end(self._do(self._file.close))
            finally:
                self._executor.shutdown()  # at once: it has nothing to do

    def find(self, key: Key) -> "asyncio.Future[Found | None]":
        future: asyncio.Future[Found | None] = self._loop.create_future()
        self._finds.append((key, future))
        self._call()
        return future

    def save(self, row: Row) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = self._loop.create_future()
        self._saves.append((row, future))
        self._call()
        return future

    def _do(self, function: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        try:
            return self._loop.run_in_executor(self._executor, function, *arguments)
        except RuntimeError:  # the main thread has ended, and with it all executors
            done: asyncio.Future[T] = self._loop.create_future()
            done.set_result(function(*arguments))
            return done

    def _call(self) -> None:
        # after all that is to run in this turn of the event loop: one group of a hundred, and not of one and
        # ninety-nine, which would wait for the disk twice
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        finds, self._finds = self._finds, []
        saves, self._saves = self._saves, []
        if finds or saves:
            keys, rows = [key for key, _ in finds], [row for row, _ in saves]
            self._group = self._do(self._file.run, keys, rows)
            self._group.add_done_callback(partial(self._finish, finds, saves))
            return
        self._is_called = False

    def _finish(
        self,
        finds: Collection[tuple[Key, "asyncio.Future[Found | None]"]],
        saves: Collection[tuple[Row, "asyncio.Future[None]"]],
        group: "asyncio.Future[Answer]",
    ) -> None:
        found, find_error, save_error = group.result()
        for key, finder in finds:
            _tell(finder, find_error, found.get(key))
        for _, saver in saves:
            _tell(saver, save_error, None)
        self._loop.call_soon(self._start)  # after those that were woken have asked for more


def _tell(future: "asyncio.Future[T]", error: JournalError | None, value: T) -> None:
    if future.done():  # the item was cancelled
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(_twin(error))  # each is raised by itself


def _twin(error: JournalError) -> JournalError:
    twin = JournalError(*error.args)
    twin.__cause__ = error.__cause__
    return twin


async def _to_its_end(future: "asyncio.Future[T]") -> T:
    """Wait for what can't be stopped; a cancellation is raised afterwards."""
    try:
        await until_ended(future)
    except asyncio.CancelledError:
        future.exception()  # seen
        raise
    return future.result()
