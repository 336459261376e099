"""What the files of SQLite have in common here: made for their user only, locked, several at a time."""

import errno
import os
import sqlite3
import sys
import threading
import time
from contextlib import suppress

__all__ = ["create_file", "lock_file", "open_locked", "read_format", "remove_locked", "use_write_ahead_log"]


def create_file(path: str) -> None:
    """Create a file that only its user can read, unless there is one."""
    # by hand, because SQLite lets everybody read it. A file that is there is not touched: closing it
    # would take away the locks that a connection of this process has on it
    with suppress(FileExistsError), _files:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def read_format(db: sqlite3.Connection) -> tuple[int, int] | None:
    """Return the application and the version that the file is of; ``None`` if it is new."""
    queries = ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
    tables, application, version = (db.execute(query).fetchone()[0] for query in queries)
    return (application, version) if tables or application or version else None


def use_write_ahead_log(db: sqlite3.Connection, patience: float) -> None:
    """Let readers and a writer use the file at the same time.

    Args:
        patience: seconds to wait for another process that does the same at this moment.

    Raises:
        OSError: it can't be done there, on a network file system for example.
        sqlite3.Error: the file can't be written.
    """
    give_up = time.monotonic() + patience
    while True:
        try:
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as error:
            # SQLite itself does not wait for another process that does the same at this moment
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up:
                raise
        time.sleep(0.01)
    if mode != "wal":
        raise OSError(errno.ENOTSUP, "SQLite can't share a file there")


# -- locks, which the system takes from a process that dies


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _lock(file: int) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
else:
    import fcntl

    def _lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


_files = threading.Lock()  # nobody forks while it is held
_locked: set[int] = set()


def _close_in_child() -> None:
    """Close what is locked, which a lock would outlive its process by otherwise."""
    for file in _locked:
        os.close(file)
    _locked.clear()
    _files.release()


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(before=_files.acquire, after_in_parent=_files.release, after_in_child=_close_in_child)


def open_locked(path: str, flags: int) -> int | None:
    """Open a file and lock it; ``None`` if somebody else has the lock."""
    with _files:
        file = os.open(path, flags | os.O_RDWR, 0o600)
        try:
            is_ours = _lock(file)
        except OSError:
            os.close(file)
            raise
        if not is_ours:
            os.close(file)
            return None
        _locked.add(file)
        return file


def remove_locked(path: str, file: int) -> None:
    """Remove a lock file while it is locked, or it might be another's that has found it free."""
    with suppress(OSError):
        if _is_at(path, file):  # or else somebody has removed ours, and this one is another's
            os.unlink(path)
    _close_locked(file)
    if sys.platform == "win32":  # pragma: no cover - where an open file can't be removed
        with suppress(OSError):
            os.unlink(path)


def _close_locked(file: int) -> None:
    with _files:
        _locked.discard(file)
        os.close(file)


def lock_file(path: str) -> int | None:
    """Create and lock a file that is there while somebody has the lock; ``None`` if somebody else has it.

    It is given back by :func:`remove_locked`.

    Raises:
        OSError: it can't be created, or there is a file of that name with something in it.
    """
    while True:
        file = open_locked(path, os.O_CREAT)
        if file is not None and os.fstat(file).st_size:
            _close_locked(file)
            raise OSError(errno.EEXIST, f"{path!r} is there already, and is no lock file")
        if file is None or _is_at(path, file):
            return file
        _close_locked(file)  # who had it has removed it meanwhile


def _is_at(path: str, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
