"""Jobs in one SQLite file, for several processes of one machine, and for the time after a restart.

>>> store = SqliteJobStore("jobs.db")
>>> async with JobRunner(store=store) as jobs:             # in each worker of a web server, say
...     job = await jobs.submit(pipeline, value)           # every worker answers for it
"""

import asyncio
import builtins
import os
import sqlite3
from collections.abc import Collection
from datetime import datetime
from functools import partial
from typing import Any

from ._jobs_file import ADD, ASK, REMOVE, SAVE, Database
from ._jobs_thread import StoreThread
from .errors import DuplicateJob
from .jobs import Job

__all__ = ["SqliteJobStore"]


class SqliteJobStore:
    """Keeps the jobs in a file, which the processes of one machine share; for :class:`JobRunner`.

    >>> JobRunner(store=SqliteJobStore("/var/lib/shop/jobs.db"))

    Each process has its own store of the same path. Jobs that have finished survive a restart; one whose
    process has died, by kill -9 too, becomes ``"failed"`` with the type ``"WorkerLost"`` as soon as another
    process looks at it, or a store of the file is opened.

    A result must be JSON, and comes back as JSON has it: a tuple as a list, the keys of a dict as strings.
    Encoding and decoding it take ten milliseconds per megabyte or more, in which the event loop waits too, so
    keep results small; :meth:`list` decodes each that it returns. All else is done by a thread of the store's
    own, what is asked for at the same time in one transaction. A call that is cancelled may happen
    nevertheless. What was saved survives a crash of the process; after a power failure the last changes may
    be missing.

    The file and those beside it (``-wal``, ``-shm``, and a lock file for each open store; leave them alone
    while a process uses them) can be read by their user only. They need a local disk: a network file
    system has no locks to rely on.

    Args:
        path: the file, created when it does not exist; its folder must. ``":memory:"`` is refused: without a
            store, a runner keeps its jobs in memory.

    Raises:
        TypeError: it is no path.
        ValueError: it is no path of a file.
    """

    is_shared = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = os.fsdecode(path)
        if name in ("", ":memory:"):
            raise ValueError(
                f"path must be that of a file, not {name!r}; "
                "to keep jobs in memory, write JobRunner() without a store"
            )
        self._path = os.path.abspath(name)
        self._thread: StoreThread | None = None

    async def open(self) -> None:
        """Open the file, or create it, and see to the jobs of processes that have died.

        Raises:
            OSError: the file can't be read, written or created, or another process does not let go of it.
            ValueError: it is not a job store's, or it is damaged; it is left as it is.
            RuntimeError: the store is open already.
        """
        if self._thread is not None and self._thread.is_ending:
            await self.aclose()
        if self._thread is not None:
            raise RuntimeError(
                "the SqliteJobStore is open already; give each JobRunner its own: SqliteJobStore(path)"
            )
        self._thread = thread = StoreThread(Database(self._path))
        try:
            await thread.begin()
        except asyncio.CancelledError:
            thread.ask_to_end()
            raise
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Do what was asked for, and close the file; the jobs stay. Nothing happens if it is not open.

        Jobs of this store that have not finished become ``"failed"`` with the type ``"WorkerLost"``.
        """
        thread = self._thread
        if thread is not None:
            await thread.end()
            if self._thread is thread:  # it was not opened again meanwhile
                self._thread = None

    async def add(self, job: Job) -> None:
        """Add a new job of this process.

        Raises:
            DuplicateJob: its id is taken.
            TypeError, ValueError: it can't be stored.
            sqlite3.Error: the file can't be written, as with all methods.
        """
        thread = self._opened
        try:
            await thread.put(partial(thread.database.values_of, job), ADD)
        except sqlite3.IntegrityError:
            raise DuplicateJob(job.id) from None

    async def save(self, job: Job) -> None:
        """Replace a job that this store has added since it was opened, unless it was removed meanwhile.

        Raises:
            TypeError, ValueError: its result is not JSON; then nothing is changed.
        """
        thread = self._opened
        await thread.put(partial(thread.database.values_of, job), SAVE)

    async def get(self, job_id: str) -> Job | None:
        """Return a job, whoever has added it; ``None`` if there is none."""
        thread = self._opened
        job: Job | None = await thread.put(partial(thread.database.get, job_id))
        return job

    async def remove(self, job_id: str) -> None:
        """Remove a job, if there is one."""
        await self._opened.put(lambda: (job_id,), REMOVE)

    async def evict(self, *, before: datetime, keep: int) -> None:
        """Remove what has finished before, and all finished ones but the ``keep`` that finished last."""
        thread = self._opened
        await thread.put(partial(thread.database.evict, before, keep))

    async def ask_to_dismiss(self, job_id: str) -> None:
        """Note that the process that runs the job is to dismiss it; nothing happens if it has finished."""
        await self._opened.put(lambda: (job_id,), ASK)

    async def asked_to_dismiss(self) -> builtins.list[str]:
        """Return the unfinished jobs of this store of which that was noted."""
        thread = self._opened
        job_ids: list[str] = await thread.put(thread.database.asked_to_dismiss)
        return job_ids

    @property
    def _opened(self) -> StoreThread:
        thread = self._thread
        if thread is None or not thread.is_open:
            raise RuntimeError(
                "the SqliteJobStore is not open; write 'async with JobRunner(store=store):', "
                "or 'await store.open()' before and 'await store.aclose()' after"
            )
        return thread

    def __repr__(self) -> str:
        state = "open" if self._thread is not None and self._thread.is_open else "closed"
        return f"<SqliteJobStore {self._path!r} {state}>"

    async def list(
        self, *, limit: int, offset: int, status: Collection[str] | None, pipeline: Collection[str] | None
    ) -> builtins.list[Job]:
        """Return jobs, the newest first; ``None`` stands for every status, and for every pipeline."""
        thread = self._opened
        jobs: Any = await thread.put(partial(thread.database.list, limit, offset, status, pipeline))
        return jobs  # type: ignore[no-any-return]
