"""The file of a journal: its format, what is written and looked up, and what is said when that fails."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from secrets import token_hex
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from ._sqlite import create_file, lock_file, read_format, remove_locked, use_write_ahead_log
from .errors import JournalBusy, JournalError, JournalMismatch
from .records import read_json

__all__ = [
    "Answer",
    "BatchRow",
    "Data",
    "Found",
    "JournalFile",
    "Key",
    "Row",
    "explained",
    "now",
    "read_rows",
]

T = TypeVar("T")
Key = int | str
Data = str | bytes

_PATIENCE = 10.0  # seconds to wait for another process that writes to the file
_ROWS = 128  # in one statement at most: with 7 values each they are less than the 999 of old SQLites
_STATEMENTS = 2 * _ROWS + 20  # one for each number of rows to write, and of rows to find

_APPLICATION, _VERSION = 0x6A726E6C, 1  # "jrnl"
_SCHEMA = (
    """CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL UNIQUE,
    pipeline TEXT NOT NULL,
    fingerprint TEXT NOT NULL,           -- JSON
    codec TEXT NOT NULL,
    token TEXT NOT NULL,                 -- what no other batch has
    created INTEGER NOT NULL             -- microseconds since 1970, as is the other time
)""",
    """CREATE TABLE items (
    run INTEGER NOT NULL REFERENCES runs (id),
    key NOT NULL,                        -- the position, or what key= has made of the item, as text
    position INTEGER NOT NULL,
    digest BLOB NOT NULL,                -- empty if the item is not JSON
    ok INTEGER NOT NULL,
    value NOT NULL,                      -- the result as the codec has written it, or the error as JSON
    item TEXT,                           -- of a failed one, as JSON
    finished INTEGER NOT NULL,
    PRIMARY KEY (run, key)
) WITHOUT ROWID""",
    f"PRAGMA application_id = {_APPLICATION}",
)
_SAVED = "key, position, digest, ok, value, item, finished"
_ROW = f"({', '.join('?' * len(_SAVED.split(', ')))})"
# a success stays what it is: it may have been reported
_REPLACE = (
    "ON CONFLICT (run, key) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _SAVED.split(", ")[1:])
    + " WHERE items.ok = 0"
)
Row = tuple[Key, int, bytes, int, Data, str | None, int]  # the values of _SAVED
Found = tuple[bytes, int, Data]  # digest, ok, value


def now() -> int:
    return time.time_ns() // 1000


class BatchRow(NamedTuple):
    """What a batch must have in common with the one that the file knows under its run_id."""

    run_id: str
    pipeline: str
    fingerprint: Mapping[str, Any]
    codec: str


class Answer(NamedTuple):
    """What became of a group."""

    found: Mapping[Key, Found]
    find_error: JournalError | None
    save_error: JournalError | None


class JournalFile:
    """The file; but for ``unmet``, it is used by the one thread.

    Attributes:
        path: its name.
        batch: what it is opened for.
        unmet: how many items it knew when it was opened that have not been looked up since.
        own_name: what only this batch of this file is called, once it is open.
    """

    _db: sqlite3.Connection
    _number: int  # of the batch
    _status: os.stat_result

    def __init__(self, path: str, batch: BatchRow, synchronous: str) -> None:
        self.path = path
        self.batch = batch
        self.unmet = 0
        self.own_name = ""
        self._synchronous = synchronous
        self._stack = ExitStack()  # what is open

    def open(self) -> None:
        # by its real name, so that the lock lies beside it also for who comes by a link
        try:
            self.path = os.path.realpath(self.path)
            with ExitStack() as stack:
                self._open(stack)
                self._stack = stack.pop_all()
        except (sqlite3.Error, OSError, ValueError) as error:
            raise explained(error, self.path, "opened") from error

    def _open(self, stack: ExitStack) -> None:
        lock_path = f"{self.path}-lock"
        lock = lock_file(lock_path)
        if lock is None:
            raise JournalBusy(self.path)
        stack.callback(remove_locked, lock_path, lock)
        create_file(self.path)
        self._db = sqlite3.connect(
            self.path,
            timeout=_PATIENCE,
            isolation_level=None,
            cached_statements=_STATEMENTS,
            check_same_thread=False,
        )
        stack.callback(self._db.close)
        self._status = os.stat(self.path)
        self._prepare()
        use_write_ahead_log(self._db, _PATIENCE)
        self._db.execute(f"PRAGMA synchronous = {self._synchronous}")

    def _prepare(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        if _is_new(self._db, self.path):
            for statement in _SCHEMA:
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {_VERSION}")  # fails at once where nothing may be written
        self._number = self._find_batch()
        self.unmet = self._db.execute("SELECT count(*) FROM items WHERE run = ?", (self._number,)).fetchone()[
            0
        ]
        self._db.execute("COMMIT")

    def _find_batch(self) -> int:
        run_id, pipeline, fingerprint, codec = self.batch
        row = self._db.execute(
            "SELECT id, fingerprint, codec, token FROM runs WHERE run_id = ?", (run_id,)
        ).fetchone()
        token = token_hex(8) if row is None else row[3]
        self.own_name = f"{run_id}-{token}"
        if row is None:
            values = (run_id, pipeline, json.dumps(fingerprint), codec, token, now())
            added = self._db.execute(
                "INSERT INTO runs (run_id, pipeline, fingerprint, codec, token, created) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
            return added.lastrowid or 0
        known, ours = {**read_json(row[1]), "codec": row[2]}, {**fingerprint, "codec": codec}
        if known != ours:
            raise _mismatch(self.path, run_id, known, ours)
        return int(row[0])

    def close(self) -> None:
        self._stack.close()

    def run(self, keys: Sequence[Key], rows: Sequence[Row]) -> Answer:
        """Write, and then look up what was asked for at the same time."""
        found, find_error, save_error = {}, None, None
        try:
            self._save(rows)
        except JournalError as error:
            save_error = error
        except Exception as error:
            save_error = explained(error, self.path, "written")
        try:
            found = self._find(keys)
        except Exception as error:
            find_error = explained(error, self.path, "read")
        return Answer(found, find_error, save_error)

    # As few statements as can be, since sqlite3 gives the GIL away in each, and waits up to 5 ms to get it
    # back from a busy event loop. A statement alone is a transaction of its own.

    def _save(self, rows: Sequence[Row]) -> None:
        if rows:
            self._check_that_it_is_there()
        parts = list(_parts(rows))
        if len(parts) <= 1:
            for part in parts:
                self._save_part(part)
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for part in parts:
                self._save_part(part)
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _check_that_it_is_there(self) -> None:
        # what is written to a file that was removed is gone, and SQLite does not mind
        try:
            is_there = os.path.samestat(os.stat(self.path), self._status)
        except OSError:
            is_there = False
        if not is_there:
            raise JournalError(
                f"the journal {self.path!r} was removed or replaced while it was in use; nothing can be kept"
            )

    def _save_part(self, rows: Sequence[Row]) -> None:
        places = ", ".join([_ROW.replace("(", f"({self._number}, ", 1)] * len(rows))
        values = [value for row in rows for value in row]
        self._db.execute(f"INSERT INTO items (run, {_SAVED}) VALUES {places} {_REPLACE}", values)

    def _find(self, keys: Sequence[Key]) -> dict[Key, Found]:
        found: dict[Key, Found] = {}
        for part in _parts(keys):
            places = ", ".join("?" * len(part))
            rows = self._db.execute(
                f"SELECT key, digest, ok, value FROM items WHERE run = {self._number} AND key IN ({places})",
                part,
            )
            found.update((row[0], row[1:]) for row in rows.fetchall())
        return found


def _parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), _ROWS):
        yield values[start : start + _ROWS]


def _is_new(db: sqlite3.Connection, path: str) -> bool:
    """Tell whether nothing is in the file yet; raise if it is no journal."""
    found = read_format(db)  # before any change: it may be damaged
    if found is None:
        return True
    application, version = found
    if application != _APPLICATION:
        raise JournalError(f"{path!r} is no journal but belongs to another application; choose another path")
    if version != _VERSION:
        raise JournalError(
            f"the journal {path!r} was written by another version of async_pipeline (its format is "
            f"{version}, not {_VERSION}); use that one, or choose another path"
        )
    return False


def _mismatch(path: str, run_id: str, known: Mapping[str, Any], ours: Mapping[str, Any]) -> JournalMismatch:
    differing = [name for name in ours if known.get(name) != ours[name]]
    was, now = (", ".join(f"{name}: {each.get(name)!r}" for name in differing) for each in (known, ours))
    return JournalMismatch(
        f"what the journal {path!r} knows under run_id={run_id!r} is of another pipeline: it had {was}; "
        f"now it has {now}; take another run_id to begin anew"
    )


_HINTS = {
    sqlite3.SQLITE_BUSY: "end the process that keeps it locked",
    sqlite3.SQLITE_CANTOPEN: "give it a file, not a folder, that may be read and written",
    sqlite3.SQLITE_FULL: "make some room on the disk",
    sqlite3.SQLITE_READONLY: "give it a file that may be written",
}


def explained(error: Exception, path: str, what: str) -> JournalError:
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    is_damaged = kind in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
    if is_damaged or isinstance(error, json.JSONDecodeError):
        hint = "it is no journal, or damaged: choose another path, or move it away"
    elif isinstance(error, ValueError) and what == "opened":
        hint = "its path and its run_id must be text, without a zero byte or half a surrogate pair"
    elif what == "shown" and kind == sqlite3.SQLITE_READONLY:
        hint = "copy it to a folder that may be written"
    elif what == "shown":
        hint = "give it the file of a journal"
    elif isinstance(error, OSError):
        hint = "give it a file in a folder that exists and may be written, on a local disk"
    else:
        hint = _HINTS.get(kind, "look at the disk, and at limits of a file's size")
    text = error.strerror if isinstance(error, OSError) else error
    resumed = (
        "; what has finished stays there, and the same call goes on from it" if what == "written" else ""
    )
    explained = JournalError(f"the journal {path!r} can't be {what}: {text}; {hint}{resumed}")
    explained.__cause__ = error
    return explained


def read_rows(path: str, query: str) -> Iterator[Any]:
    try:
        os.stat(path)  # SQLite does not say that there is none
        address = "file:" + quote(os.fsencode(os.path.abspath(path))) + "?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE)) as db:
            if not _is_new(db, path):
                yield from db.execute(query)
    except (sqlite3.Error, OSError, ValueError) as error:
        raise explained(error, path, "shown") from error
