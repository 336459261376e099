"""A batch that survives kill -9: a file keeps what has finished, and the same call again runs the rest.

>>> results = await pipeline.map(items, 100, journal=Journal("batch.db"))
"""

import asyncio
import json
import os
import pickle
import sqlite3
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from secrets import token_hex
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote

from ._sqlite import create_file, lock_file, remove_locked, use_write_ahead_log
from .context import current_item_key
from .errors import EngineError, JournalBusy, JournalError, JournalMismatch
from .events import check_callback
from .records import digest_of, dump_error, load_error, read_json, stage_names, write_canonical, write_json

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["Codec", "FailedItem", "Journal", "Run", "read_failures", "read_runs"]

T = TypeVar("T")
_Key = int | str
_Data = str | bytes

_PATIENCE = 10.0  # seconds to wait for another process that writes to the file
_ROWS = 128  # in one statement at most: with 7 values each they are less than the 999 of old SQLites
_LARGEST = 900_000_000  # bytes or characters of a result; SQLite takes a billion bytes in a row
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
_Row = tuple[_Key, int, bytes, int, _Data, str | None, int]  # the values of _SAVED
_Found = tuple[bytes, int, _Data]  # digest, ok, value


class Codec(NamedTuple):
    """How results become bytes or text in a journal, and results again.

    Attributes:
        name: is kept with the results; only a codec of this name reads them.
        encode: makes bytes or a str of a result.
        decode: makes a result of these again.
    """

    name: str
    encode: Callable[[Any], bytes | str]
    decode: Callable[[Any], Any]


_CODECS = {
    "json": Codec("json", partial(write_json, what="the result"), read_json),
    "pickle": Codec("pickle", partial(pickle.dumps, protocol=5), pickle.loads),
}


class Journal:
    """A file that keeps what has finished of a batch; for ``map`` and ``stream``.

    >>> results = await pipeline.map(items, 100, journal=Journal("batch.db"))

    Run the same again after a crash, a kill -9 or a Ctrl-C, and the items that have finished are not run
    again: their results come out of the file, in their places. A result is returned or yielded only after it
    is in the file. What ran at the moment of the crash runs again, so at most ``concurrency`` items may run
    twice; :func:`~async_pipeline.item_key` is what makes the effect of a handler happen once.

    An item is known by its position, and its JSON is compared: another item at that place is a
    :class:`JournalMismatch`. A source whose order changes, and items that are not JSON, need a ``key``. What
    ``map`` returns is what the file holds, also of an item that has just run: with JSON a tuple is a list.

    A power failure may take the last moments with it, but what is there is whole; ``synchronous="FULL"``
    makes each result wait for the disk. The file is created for its user only. It needs a local disk, and
    one batch at a time may use it: ``FILE-lock`` beside it is how others see that. A Journal may be used
    again, for the next batch.

    Args:
        path: the file, created when it does not exist; its folder must.
        run_id: which of the batches in the file this is; the pipeline's name by default. One that is new
            begins from the start. What :func:`~async_pipeline.item_key` returns begins with it, or by
            default with a name that no other file has.
        key: a sync ``(item)`` that returns a str or an int (which counts as its decimal digits), the item's
            own for ever: an id, a URL. By default it is the item's position. Of two items with one key, the
            later one gets the result of the first one, if that has finished by then, or with
            ``retry_failed=False`` its failure.
        version: of what the handlers do, a str or an int; raise it when they change in a way that makes old
            results wrong. It is compared, as are the names of the stages.
        codec: how results are kept. ``"json"``; ``"pickle"``, for whatever can be pickled, but reading such
            a file runs the code that its writer has put there, so only where nobody else can write to it; or
            a :class:`Codec`. Encoding takes place in the event loop.
        retry_failed: whether items that have failed run again (the default), or fail as they did before.
        synchronous: ``"NORMAL"``, or ``"FULL"`` to survive a power failure, too.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        run_id: str | None = None,
        key: Callable[[Any], str | int] | None = None,
        version: str | int | None = None,
        codec: Literal["json", "pickle"] | Codec = "json",
        retry_failed: bool = True,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
    ) -> None:
        name = os.fsdecode(path)
        if name in ("", ":memory:"):
            raise ValueError(
                f"path must be that of a file, not {name!r}: memory does not survive the process"
            )
        if run_id is not None and not (isinstance(run_id, str) and run_id):
            raise TypeError(f"run_id must be a str that is not empty, not {run_id!r}")
        if key is not None and not isinstance(key, type):  # str, for example
            check_callback("key", "key(item)", key)
        if not isinstance(version, (str, int, type(None))):
            raise TypeError(f"version must be a str or an int, not {version!r}")
        if synchronous not in ("NORMAL", "FULL"):
            raise ValueError(f"synchronous must be 'NORMAL' or 'FULL', not {synchronous!r}")
        self._path = os.path.abspath(name)
        self._run_id = run_id
        self._key = key
        self._version = version
        self._codec = _codec_of(codec)
        self._retry_failed = retry_failed
        self._synchronous = synchronous

    def run_id_for(self, pipeline: "Pipeline[Any, Any]") -> str:
        """Return the ``run_id``, which by default is the pipeline's name."""
        return pipeline.name if self._run_id is None else self._run_id

    def around(self, step: Any, pipeline: "Pipeline[Any, Any]") -> Any:
        """Return the step that runs only those items of a batch that the file does not know.

        Args:
            step: what runs the others, the pipeline itself for example.
            pipeline: the one that the batch is of.
        """
        run_id = self.run_id_for(pipeline)
        fingerprint = {
            "stages": stage_names(pipeline),
            "version": self._version,
            "items by": "position" if self._key is None else "key",
        }
        batch = _BatchRow(run_id, pipeline.name, fingerprint, self._codec.name)
        file = _File(self._path, batch, self._synchronous)
        own = None if self._run_id is None else run_id
        return _JournalStep(step, file, own, self._key, self._codec, retry_failed=self._retry_failed)

    def __repr__(self) -> str:
        run_id = "" if self._run_id is None else f", run_id={self._run_id!r}"
        return f"Journal({self._path!r}{run_id})"


def _codec_of(codec: object) -> Codec:
    if isinstance(codec, Codec):
        if not (callable(codec.encode) and callable(codec.decode)):
            raise TypeError(f"codec must have functions to encode and decode, not {codec!r}")
        if codec.name in _CODECS and codec is not _CODECS[codec.name]:
            raise ValueError(f"codec: {codec.name!r} is the name of a built-in one, choose another")
        return codec
    if not isinstance(codec, str) or codec not in _CODECS:
        raise ValueError(f"codec must be 'json', 'pickle' or a Codec, not {codec!r}")
    return _CODECS[codec]


# -- one batch, in the event loop


class _JournalStep:
    """The step that the batch runs: looks an item up, or runs it and writes down what became of it.

    It is its own ``_scope``, in which the file is open.
    """

    def __init__(
        self,
        step: Any,
        file: "_File",
        run_id: str | None,
        key: Callable[[Any], str | int] | None,
        codec: Codec,
        *,
        retry_failed: bool,
    ) -> None:
        self.name: str = step.name
        self.run = step.run  # of an item that belongs to no batch
        self.on_hook_error = getattr(step, "on_hook_error", None)
        self._scope = self
        self._run_id = run_id
        self._prefix = ""  # of the keys that handlers see
        self._run = _numbered(step)
        self._name_run: Callable[[str], object] | None = getattr(step, "_name_run", None)
        self._skip: Callable[[int], object] | None = getattr(step, "skip", None)
        self._inner = getattr(step, "_scope", None)
        if hasattr(step, "_source_ended"):  # an engine waits for that
            self._source_ended: Callable[[int], object] = step._source_ended
        self._file = file
        self._key = key
        self._codec = codec
        self._retry_failed = retry_failed
        self._running: dict[_Key, bytes] = {}  # the digests of the items that run, with a key= of one's own
        self._stack = AsyncExitStack()  # what is open

    async def __aenter__(self) -> "_JournalStep":
        async with AsyncExitStack() as stack:
            self._thread = thread = _Thread(self._file)
            stack.push_async_callback(thread.end)
            await thread.begin()
            self._prefix = self._run_id or self._file.own_name
            if self._name_run is not None:
                self._name_run(self._prefix)
            if self._inner is not None:
                await stack.enter_async_context(self._inner)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    async def _run_item(self, value: Any, context: Any, index: int, timeout: float | None) -> Any:
        if self._key is None:
            text = _canonical(value, index)
            return await self._resume(value, context, index, timeout, index, digest_of(text), text)
        key, own = _own_key(self._key, value, index), _canonical_if_any(value)
        digest = b"" if own is None else digest_of(own)
        self._compare(self._running.setdefault(key, digest), digest, key, index)
        try:
            return await self._resume(value, context, index, timeout, key, digest, own)
        finally:
            self._running.pop(key, None)

    async def _resume(
        self,
        value: Any,
        context: Any,
        index: int,
        timeout: float | None,
        key: _Key,
        digest: bytes,
        text: str | None,
    ) -> Any:
        # with a key of one's own, an item of this very batch may have had it before
        if self._file.unmet or self._key is not None:
            found = await self._thread.find(key)
            if found is not None:
                self._file.unmet -= self._key is None
                self._compare(found[0], digest, key, index)
                if found[1] or not self._retry_failed:
                    return self._known(found, index)
        try:
            data, result = self._encode(await self._run_as(key, value, context, index, timeout))
        except (JournalError, EngineError):
            raise  # no item's own
        except Exception as error:
            failure = write_json(dump_error(error), "the error")
            await self._thread.save((key, index, digest, 0, failure, text, _now()))
            raise
        await self._thread.save((key, index, digest, 1, data, None, _now()))
        return result

    async def _run_as(self, key: _Key, value: Any, context: Any, index: int, timeout: float | None) -> Any:
        token = current_item_key.set(f"{self._prefix}/{key}")
        try:
            return await self._run(value, context, index, timeout)
        finally:
            current_item_key.reset(token)

    def _known(self, found: _Found, index: int) -> Any:
        if self._skip is not None:
            self._skip(index)
        _, ok, data = found
        if ok:
            return self._decode(data)
        raise load_error(read_json(data))

    def _compare(self, known: bytes, digest: bytes, key: _Key, index: int) -> None:
        if known and digest and known != digest:
            which = f"item {index}" if self._key is None else f"item {index}, with the key {key!r},"
            hint = "for items whose order changes a key= that tells them apart"
            if self._key is not None:
                hint = "for content that changes a key= that tells it apart, or leave it out of the items"
            raise JournalMismatch(
                f"{which} is not the one that the journal {self._file.path!r} knows under run_id="
                f"{self._file.batch.run_id!r}; for other items take another run_id, {hint}"
            )

    def _encode(self, result: Any) -> tuple[_Data, Any]:
        """Return what is to be written, and what will be read from it."""
        try:
            data = self._codec.encode(result)
            size = 0
            if isinstance(data, str) and not data.isascii():
                size = len(data.encode())  # half a surrogate pair can't be written
        except Exception as error:
            raise self._unfit("kept", error) from error
        if not isinstance(data, (str, bytes)):
            raise TypeError(
                f"encode of the codec {self._codec.name!r} must return bytes or a str, "
                f"not {type(data).__name__}"
            )
        if max(size, len(data)) > _LARGEST:
            raise self._unfit("kept", ValueError(f"it is larger than {_LARGEST:,} bytes"))
        return data, self._decode(data)

    def _decode(self, data: _Data) -> Any:
        try:
            return self._codec.decode(data)
        except Exception as error:
            raise self._unfit("read again", error) from error

    def _unfit(self, what: str, error: Exception) -> TypeError:
        name = self._codec.name
        return TypeError(
            f"the result can't be {what} by the journal's codec {name!r}: {type(error).__name__}: {error}; "
            "return JSON, or choose another codec"
        )


def _numbered(step: Any) -> Callable[[Any, Any, int, float | None], Coroutine[Any, Any, Any]]:
    """How a step runs an item of a batch: with its index, if it wants that."""
    run_item = getattr(step, "_run_item", None)
    if run_item is not None:
        return run_item  # type: ignore[no-any-return]
    run = step.run

    def run_plain(value: Any, context: Any, index: int, timeout: float | None) -> Any:
        return (
            run(value, context=context) if timeout is None else run(value, context=context, timeout=timeout)
        )

    return run_plain


def _canonical(item: object, index: int) -> str:
    try:
        return write_canonical(item, f"item {index}")
    except TypeError as error:
        raise JournalError(
            f"{error}; a journal knows such items by a key=: Journal(path, key=lambda item: item.id)"
        ) from error


def _canonical_if_any(item: object) -> str | None:
    try:
        return write_canonical(item, "the item")
    except TypeError:
        return None


def _own_key(make: Callable[[Any], object], item: object, index: int) -> str:
    try:
        key = make(item)
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise TypeError(f"it is of the type {type(key).__name__}")
        text = str(key)
        text.encode()
    except Exception as error:
        raise JournalError(
            f"key= must return a str or an int that lasts, not so for item {index}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return text


def _now() -> int:
    return time.time_ns() // 1000


class _Thread:
    """The one thread that uses the file, and what it is to do.

    What is asked for while it works is done together afterwards, and told by one wake-up of the event loop.
    """

    def __init__(self, file: "_File") -> None:
        self._file = file
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="Journal")
        self._finds: list[tuple[_Key, asyncio.Future[_Found | None]]] = []
        self._saves: list[tuple[_Row, asyncio.Future[None]]] = []
        self._is_called = False  # whether _start is on its way, or the thread works
        self._group: asyncio.Future[_Answer] | None = None  # what the thread does

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

    def find(self, key: _Key) -> "asyncio.Future[_Found | None]":
        future: asyncio.Future[_Found | None] = self._loop.create_future()
        self._finds.append((key, future))
        self._call()
        return future

    def save(self, row: _Row) -> "asyncio.Future[None]":
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
        finds: Collection[tuple[_Key, "asyncio.Future[_Found | None]"]],
        saves: Collection[tuple[_Row, "asyncio.Future[None]"]],
        group: "asyncio.Future[_Answer]",
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
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    try:
        if cancelled is not None:
            future.exception()  # seen
            raise cancelled
        return future.result()
    finally:
        del cancelled  # its traceback holds this frame


# -- the file, in the thread


class _BatchRow(NamedTuple):
    """What a batch must have in common with the one that the file knows under its run_id."""

    run_id: str
    pipeline: str
    fingerprint: Mapping[str, Any]
    codec: str


class _Answer(NamedTuple):
    """What became of a group."""

    found: Mapping[_Key, _Found]
    find_error: JournalError | None
    save_error: JournalError | None


class _File:
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

    def __init__(self, path: str, batch: _BatchRow, synchronous: str) -> None:
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
            raise _explained(error, self.path, "opened") from error

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
            values = (run_id, pipeline, json.dumps(fingerprint), codec, token, _now())
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

    def run(self, keys: Sequence[_Key], rows: Sequence[_Row]) -> _Answer:
        """Write, and then look up what was asked for at the same time."""
        found, find_error, save_error = {}, None, None
        try:
            self._save(rows)
        except JournalError as error:
            save_error = error
        except Exception as error:
            save_error = _explained(error, self.path, "written")
        try:
            found = self._find(keys)
        except Exception as error:
            find_error = _explained(error, self.path, "read")
        return _Answer(found, find_error, save_error)

    # As few statements as can be, since sqlite3 gives the GIL away in each, and waits up to 5 ms to get it
    # back from a busy event loop. A statement alone is a transaction of its own.

    def _save(self, rows: Sequence[_Row]) -> None:
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

    def _save_part(self, rows: Sequence[_Row]) -> None:
        places = ", ".join([_ROW.replace("(", f"({self._number}, ", 1)] * len(rows))
        values = [value for row in rows for value in row]
        self._db.execute(f"INSERT INTO items (run, {_SAVED}) VALUES {places} {_REPLACE}", values)

    def _find(self, keys: Sequence[_Key]) -> dict[_Key, _Found]:
        found: dict[_Key, _Found] = {}
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
    tables = _single(db, "SELECT count(*) FROM sqlite_master")  # before any change: it may be damaged
    application, version = _single(db, "PRAGMA application_id"), _single(db, "PRAGMA user_version")
    if (application, version, tables) == (0, 0, 0):
        return True
    if application != _APPLICATION:
        raise JournalError(f"{path!r} is no journal but belongs to another application; choose another path")
    if version != _VERSION:
        raise JournalError(
            f"the journal {path!r} was written by another version of async_pipeline (its format is "
            f"{version}, not {_VERSION}); use that one, or choose another path"
        )
    return False


def _single(db: sqlite3.Connection, query: str) -> Any:
    return db.execute(query).fetchone()[0]


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


def _explained(error: Exception, path: str, what: str) -> JournalError:
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


# -- for people


class Run(NamedTuple):
    """What a journal knows of one batch.

    Attributes:
        run_id, pipeline: the names of it.
        finished: how many items have a result.
        failed: how many have failed, and not succeeded since.
        changed: when it last changed, in seconds since 1970.
    """

    run_id: str
    pipeline: str
    finished: int
    failed: int
    changed: float


class FailedItem(NamedTuple):
    """An item that has failed.

    Attributes:
        run_id: its batch.
        position: where it was in the source, from 0.
        item: the item, or ``None`` if it is not JSON.
        error: what it failed with, as far as it can be made again.
    """

    run_id: str
    position: int
    item: Any
    error: BaseException


def read_runs(path: str) -> list[Run]:
    """Return what a journal knows of each batch, the oldest first, also while one uses it.

    Raises:
        JournalError: there is no such file, or it is no journal, or it can't be read.
    """
    query = (
        "SELECT run_id, pipeline, coalesce(sum(ok), 0), coalesce(sum(1 - ok), 0), max(created, "
        "coalesce(max(finished), 0)) / 1e6 FROM runs LEFT JOIN items ON run = id GROUP BY id ORDER BY id"
    )
    return [Run(*row) for row in _read(path, query)]


def read_failures(path: str) -> Iterator[FailedItem]:
    """Yield the items that have failed, batch by batch in their order.

    Raises:
        JournalError: as for :func:`read_runs`.
    """
    query = (
        "SELECT run_id, position, item, value FROM runs JOIN items ON run = id "
        "WHERE ok = 0 ORDER BY id, position"
    )
    for run_id, position, item, value in _read(path, query):
        try:
            failed = FailedItem(run_id, position, item and read_json(item), load_error(read_json(value)))
        except (ValueError, TypeError, LookupError) as error:
            raise _explained(error, path, "shown") from error
        yield failed


def _read(path: str, query: str) -> Iterator[Any]:
    try:
        os.stat(path)  # SQLite does not say that there is none
        address = "file:" + quote(os.fsencode(os.path.abspath(path))) + "?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE)) as db:
            if not _is_new(db, path):
                yield from db.execute(query)
    except (sqlite3.Error, OSError, ValueError) as error:
        raise _explained(error, path, "shown") from error
