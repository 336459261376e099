"""The file of a job store: its format, what is asked of it, and whose the jobs in it are."""

import asyncio
import builtins
import copy
import errno
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

from ._sqlite import create_file, open_locked, read_format, remove_locked, use_write_ahead_log
from .jobs import Job, JobFailure

__all__ = ["ADD", "ASK", "REMOVE", "SAVE", "Call", "Database"]

_PATIENCE = 10.0  # seconds to wait for another process that writes
_LOOK_EVERY = 0.2  # seconds between two looks at whether the other processes live
_LOST = JobFailure("WorkerLost", "the process that ran the job is gone")

_APPLICATION, _VERSION = 0x6A6F6273, 1  # "jobs"
_SCHEMA = (
    """CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,                 -- has a lock file of this name while it lives
    asked INTEGER NOT NULL DEFAULT 0,    -- whether the owner is to dismiss it
    pipeline TEXT NOT NULL,
    status TEXT NOT NULL,
    progress INTEGER NOT NULL,
    message BLOB,                        -- UTF-8; a str may hold what TEXT can't, like half a surrogate pair
    created INTEGER NOT NULL,            -- microseconds since 1970, as are the other times
    updated INTEGER NOT NULL,
    started INTEGER,
    finished INTEGER,
    error BLOB,                          -- JSON in UTF-8
    result BLOB                          -- the same
)""",
    "CREATE INDEX jobs_created ON jobs (created)",
    "CREATE INDEX jobs_unfinished ON jobs (owner, asked) WHERE finished IS NULL",
    "CREATE INDEX jobs_finished ON jobs (finished) WHERE finished IS NOT NULL",
    f"PRAGMA application_id = {_APPLICATION}",
)
_SHOWN = "id, pipeline, status, progress, message, created, updated, started, finished, error, result"
_NAMES = (*_SHOWN.split(", "), "owner")
# by name: Python 3.12 takes a numbered placeholder for a named one
ADD = f"INSERT INTO jobs ({_SHOWN}, owner) VALUES ({', '.join(f':{name}' for name in _NAMES)})"
SAVE = (
    f"UPDATE jobs SET ({_SHOWN}) = ({', '.join(f':{name}' for name in _NAMES[:-1])}) "
    "WHERE id = :id AND owner = :owner"
)
ASK = "UPDATE jobs SET asked = 1 WHERE id = ? AND finished IS NULL"
REMOVE = "DELETE FROM jobs WHERE id = ?"


class Call:
    """What one caller wants.

    Attributes:
        future: the caller waits for it.
        function: does it; or returns the values of the statement.
        statement: what changes a job; ``None`` for all that reads, or does more than that.
    """

    __slots__ = ("error", "function", "future", "outcome", "statement", "values")

    def __init__(
        self, future: asyncio.Future[Any], function: Callable[[], Any], statement: str | None
    ) -> None:
        self.future = future
        self.function = function
        self.statement = statement
        self.values: Sequence[Any] | Mapping[str, Any] = ()
        self.outcome: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.outcome = self.function()
        except Exception as error:
            self.error = error

    def prepare(self) -> bool:
        try:
            self.values = self.function()
        except Exception as error:
            self.error = error
        return self.error is None

    def write(self, db: sqlite3.Connection) -> None:
        """Change the job; raise only what may have undone all that was changed before in the transaction."""
        self.error = None  # it may be the second time
        try:
            db.execute(self.statement or "", self.values)
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.IntegrityError):
                raise
            self.error = error
        except Exception as error:  # a value that SQLite has no place for
            self.error = error

    def tell(self) -> None:
        error, self.error = self.error, None  # its traceback holds this object
        if self.future.done():  # the caller was cancelled
            return
        if error is None:
            self.future.set_result(self.outcome)
        else:
            self.future.set_exception(error)


class Database:
    """The file; all methods are called by the one thread."""

    _db: sqlite3.Connection
    _owner: "_Owner"

    def __init__(self, path: str) -> None:
        self._path = path
        self._look_again = 0.0
        self._stack = ExitStack()  # what is open

    def run(self, calls: Iterable[Call]) -> None:
        """Do what was asked for at the same time: first what writes, together, then the rest in its order."""
        # encoding comes before the transaction, in which other processes would wait for it
        self._write([call for call in calls if call.statement is not None and call.prepare()])
        for call in calls:
            if call.statement is None:
                call.run()

    def _write(self, calls: Sequence[Call]) -> None:
        if not calls:
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            for call in calls:
                call.error = copy.copy(error)
            return
        try:
            for call in calls:
                call.write(self._db)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if len(calls) == 1:
                calls[0].error = error
                return
            for call in calls:  # alone, so that the others do not fail with the one
                self._write([call])

    # -- opening and closing

    def open(self) -> None:
        # by its real name, so that the lock files lie beside it also for who comes by a link
        self._path = os.path.realpath(self._path)
        try:
            with ExitStack() as stack:
                self._open(stack)
                self._stack = stack.pop_all()
        except sqlite3.Error as error:
            raise _explained(error, self._path) from error
        except OSError as error:
            hint = "give it a file in a folder that exists and may be written, on a local disk"
            message = f"the job store can't be opened: {error.strerror}; {hint}"
            raise OSError(error.errno, message, error.filename or self._path) from error

    def _open(self, stack: ExitStack) -> None:
        create_file(self._path)
        self._db = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)
        stack.callback(self._db.close)
        self._prepare()
        self._owner = _Owner(self._path)
        stack.callback(self._owner.close)
        stack.callback(self._fail_own_jobs)
        self._find_lost()
        _remove_left_locks(self._path)

    def _prepare(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        found = read_format(self._db)  # before any change: it may be damaged
        if found is None:
            for statement in _SCHEMA:
                self._db.execute(statement)
        elif found[0] != _APPLICATION:
            raise ValueError(f"{self._path!r} belongs to another application; choose another path")
        elif found[1] != _VERSION:
            raise ValueError(
                f"{self._path!r} was written by another version of async_pipeline (its format is {found[1]}, "
                f"not {_VERSION}); use that one, or choose another path"
            )
        self._db.execute(f"PRAGMA user_version = {_VERSION}")  # fails at once where nothing may be written
        self._db.execute("COMMIT")
        use_write_ahead_log(self._db, _PATIENCE)
        self._db.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        self._stack.close()

    def _single(self, query: str, *values: Any) -> Any:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]

    # -- the owners

    def _find_lost(self) -> bool:
        """Fail the jobs of processes that have died; tell whether there were some."""
        now = time.monotonic()
        if now < self._look_again:
            return False
        self._look_again = now + _LOOK_EVERY
        others = self._db.execute(
            "SELECT DISTINCT owner FROM jobs WHERE finished IS NULL AND owner <> ?", (self._owner.name,)
        )
        lost = [owner for (owner,) in others.fetchall() if _is_lost(_lock_path(self._path, owner))]
        for owner in lost:
            self._fail_jobs_of(owner)
        return bool(lost)

    def _fail_jobs_of(self, owner: str) -> None:
        # look first: an UPDATE waits for those who write even if there is nothing to do
        if self._single("SELECT 1 FROM jobs WHERE finished IS NULL AND owner = ?", owner):
            self._db.execute(
                "UPDATE jobs SET status = 'failed', error = :error, updated = max(updated, :now), "
                "finished = max(updated, :now) WHERE finished IS NULL AND owner = :owner",
                {"error": _encode_failure(_LOST), "now": _microseconds(datetime.now(UTC)), "owner": owner},
            )

    def _fail_own_jobs(self) -> None:
        # if it fails, it is done by who looks next and finds the lock file gone
        with suppress(sqlite3.Error):
            self._fail_jobs_of(self._owner.name)

    # -- what a caller asks for

    def values_of(self, job: Job) -> Mapping[str, Any]:
        values = (
            job.id,
            job.pipeline,
            job.status,
            job.progress,
            None if job.message is None else _encode(job.message),
            _microseconds(job.created),
            _microseconds(job.updated),
            None if job.started is None else _microseconds(job.started),
            None if job.finished is None else _microseconds(job.finished),
            None if job.error is None else _encode_failure(job.error),
            None if job.result is None else _encode_result(job),
            self._owner.name,
        )
        return dict(zip(_NAMES, values, strict=True))

    def get(self, job_id: str) -> Job | None:
        row = self._db.execute(f"SELECT owner, {_SHOWN} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            return None
        job = _decode_job(row[1:])
        if job.finished is None and row[0] != self._owner.name and self._find_lost():
            return self.get(job_id)
        return job

    def evict(self, before: datetime, keep: int) -> None:
        last = (_microseconds(before) - 1, _MOST)
        surplus = self._db.execute(
            "SELECT finished, number FROM jobs WHERE finished IS NOT NULL "
            "ORDER BY finished DESC, number DESC LIMIT 1 OFFSET ?",
            (_bounded(keep),),
        ).fetchone()
        if surplus is not None:
            last = max(last, surplus)
        elif not self._single("SELECT 1 FROM jobs WHERE finished <= ?", last[0]):
            return  # a DELETE waits for those who write even if there is nothing to do
        self._db.execute(
            "DELETE FROM jobs WHERE finished <= :finished AND (finished < :finished OR number <= :number)",
            {"finished": last[0], "number": last[1]},
        )

    def asked_to_dismiss(self) -> builtins.list[str]:
        # as cheap as PRAGMA data_version, thanks to its index
        rows = self._db.execute(
            "SELECT id FROM jobs WHERE finished IS NULL AND owner = ? AND asked = 1", (self._owner.name,)
        )
        return [job_id for (job_id,) in rows.fetchall()]

    def list(
        self, limit: int, offset: int, status: Collection[str] | None, pipeline: Collection[str] | None
    ) -> builtins.list[Job]:
        self._find_lost()
        where = "1"
        values: Any = []
        for column, wanted in (("status", status), ("pipeline", pipeline)):
            if wanted is not None:
                where += f" AND {column} IN ({', '.join('?' * len(wanted))})"
                values += wanted
        rows = self._db.execute(
            f"SELECT {_SHOWN} FROM jobs WHERE {where} ORDER BY created DESC, number DESC LIMIT ? OFFSET ?",
            (*values, _bounded(limit), _bounded(offset)),
        )
        return [_decode_job(row) for row in rows.fetchall()]


_MOST = 2**63 - 1  # the greatest integer of SQLite


def _bounded(number: int) -> int:
    return min(number, _MOST)


_HINTS = {
    sqlite3.SQLITE_BUSY: (errno.EBUSY, "end the process that keeps it locked"),
    sqlite3.SQLITE_CANTOPEN: (errno.EACCES, "give it a file, not a folder, that may be read and written"),
    sqlite3.SQLITE_FULL: (errno.ENOSPC, "make some room on the disk"),
    sqlite3.SQLITE_READONLY: (errno.EACCES, "give it a file that may be written"),
}


def _explained(error: sqlite3.Error, path: str) -> Exception:
    kind = error.sqlite_errorcode & 0xFF
    if kind in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return ValueError(
            f"{path!r} is no job store, or damaged ({error}); choose another path, or move it away"
        )
    number, hint = _HINTS.get(kind, (errno.EIO, "look at the disk"))
    return OSError(number, f"the job store can't be opened: {error}; {hint}", path)


# -- jobs as values of SQLite


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _moment(microseconds: int | None) -> Any:
    return None if microseconds is None else _EPOCH + timedelta(microseconds=microseconds)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _encode_failure(failure: JobFailure) -> bytes:
    return json.dumps(asdict(failure)).encode()


def _encode_result(job: Job) -> bytes:
    try:
        return _encode(json.dumps(job.result, allow_nan=False, ensure_ascii=False))
    except TypeError as error:
        raise TypeError(f"the result of job {job.id!r} is not JSON: {error}") from error
    except Exception as error:  # too deep, in a circle, NaN, changed meanwhile
        raise ValueError(f"the result of job {job.id!r} is not JSON: {error}") from error


def _decode_job(row: Sequence[Any]) -> Job:
    job_id, pipeline, status, progress, message, created, updated, started, finished, error, result = row
    return Job(
        id=job_id,
        pipeline=pipeline,
        status=status,
        progress=progress,
        message=None if message is None else message.decode("utf-8", "surrogatepass"),
        created=_moment(created),
        updated=_moment(updated),
        started=_moment(started),
        finished=_moment(finished),
        error=None if error is None else JobFailure(**json.loads(error)),
        result=None if result is None else json.loads(result),
    )


# -- locks, which the system takes from a process that dies


def _lock_path(path: str, owner: str) -> str:
    return f"{path}-{owner}.lock"


def _is_lost(path: str) -> bool:
    """Tell whether nobody has this lock any more, and remove its file then."""
    try:
        file = open_locked(path, 0)
    except FileNotFoundError:
        return True
    except OSError:  # it can't be known
        return False
    if file is None:
        return False
    remove_locked(path, file)
    return True


def _remove_left_locks(path: str) -> None:
    """Remove the lock files of processes that have died without a job."""
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"-[0-9a-f]{16}\.lock")
    for entry in os.listdir(folder):
        if pattern.fullmatch(entry):
            _is_lost(os.path.join(folder, entry))


class _Owner:
    """A name for the time that a store is open, and the lock by which others see that it is."""

    def __init__(self, path: str) -> None:
        while True:
            self.name = token_hex(8)
            self._path = _lock_path(path, self.name)
            file = open_locked(self._path, os.O_CREAT | os.O_EXCL)
            if file is None:  # somebody who looks for files that were left was faster
                continue
            self._file = file
            if os.path.exists(self._path):
                return
            self.close()

    def close(self) -> None:
        remove_locked(self._path, self._file)
