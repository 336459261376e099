"""The thread of a job store: the event loop asks, and it reads and writes the file."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ._jobs_file import Call, Database

__all__ = ["StoreThread"]


class StoreThread:
    """The one thread that uses the file, and what it is to do.

    What is asked for while it works is done together afterwards, and told by one wake-up of the event loop.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.is_open = False
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="SqliteJobStore")
        self._waiting: list[Call] = []
        self._is_busy = False
        self._end: asyncio.Future[Any] | None = None

    @property
    def is_ending(self) -> bool:
        return self._end is not None

    async def begin(self) -> None:
        await self.put(self.database.open)
        self.is_open = True

    def ask_to_end(self) -> asyncio.Future[Any]:
        self.is_open = False
        if self._end is None:
            self._end = self.put(self.database.close)
        return self._end

    async def end(self) -> None:
        """Wait until all is done and the thread is gone; a cancellation ends the waiting only."""
        end = self.ask_to_end()
        await asyncio.wait((end,))
        end.result()

    def put(self, function: Callable[[], Any], statement: str | None = None) -> asyncio.Future[Any]:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "the SqliteJobStore was opened in another event loop; open one in each: SqliteJobStore(path)"
            )
        call = Call(self._loop.create_future(), function, statement)
        self._waiting.append(call)
        if not self._is_busy:
            self._start()
        return call.future

    def _start(self) -> None:
        calls, self._waiting = self._waiting, []
        self._is_busy = True
        batch = self._loop.run_in_executor(self._executor, self.database.run, calls)
        batch.add_done_callback(partial(self._finish, calls))

    def _finish(self, calls: Iterable[Call], batch: asyncio.Future[None]) -> None:
        self._is_busy = False
        fatal = batch.exception()
        if self._waiting:
            self._start()
        elif self._end is not None:
            self._executor.shutdown()  # at once: it has nothing to do
        for call in calls:
            call.error = call.error or fatal
            call.tell()
