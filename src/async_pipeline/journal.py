"""A batch that survives kill -9: a file keeps what has finished, and the same call again runs the rest.

>>> results = await pipeline.map(items, 100, journal=Journal("batch.db"))
"""

import os
import pickle
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ._journal_file import BatchRow, Data, Found, JournalFile, Key, explained, now, read_rows
from ._journal_thread import JournalThread
from .context import current_item_key
from .errors import EngineError, JournalError, JournalMismatch
from .events import check_callback
from .records import digest_of, dump_error, load_error, read_json, stage_names, write_canonical, write_json

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["Codec", "FailedItem", "Journal", "Run", "read_failures", "read_runs"]

_LARGEST = 900_000_000  # bytes or characters of a result; SQLite takes a billion bytes in a row


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
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or an os.PathLike, not {path!r}; write Journal('batch.db')")
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
        batch = BatchRow(run_id, pipeline.name, fingerprint, self._codec.name)
        file = JournalFile(self._path, batch, self._synchronous)
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
        file: JournalFile,
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
        self._running: dict[Key, bytes] = {}  # the digests of the items that run, with a key= of one's own
        self._stack = AsyncExitStack()  # what is open

    async def __aenter__(self) -> "_JournalStep":
        async with AsyncExitStack() as stack:
            self._thread = thread = JournalThread(self._file)
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
        key: Key,
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
            await self._thread.save((key, index, digest, 0, failure, text, now()))
            raise
        await self._thread.save((key, index, digest, 1, data, None, now()))
        return result

    async def _run_as(self, key: Key, value: Any, context: Any, index: int, timeout: float | None) -> Any:
        token = current_item_key.set(f"{self._prefix}/{key}")
        try:
            return await self._run(value, context, index, timeout)
        finally:
            current_item_key.reset(token)

    def _known(self, found: Found, index: int) -> Any:
        if self._skip is not None:
            self._skip(index)
        _, ok, data = found
        if ok:
            return self._decode(data)
        raise load_error(read_json(data))

    def _compare(self, known: bytes, digest: bytes, key: Key, index: int) -> None:
        if known and digest and known != digest:
            which = f"item {index}" if self._key is None else f"item {index}, with the key {key!r},"
            hint = "for items whose order changes a key= that tells them apart"
            if self._key is not None:
                hint = "for content that changes a key= that tells it apart, or leave it out of the items"
            raise JournalMismatch(
                f"{which} is not the one that the journal {self._file.path!r} knows under run_id="
                f"{self._file.batch.run_id!r}; for other items take another run_id, {hint}"
            )

    def _encode(self, result: Any) -> tuple[Data, Any]:
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

    def _decode(self, data: Data) -> Any:
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


# -- for people


class Run(NamedTuple):
    """What a journal knows of one batch.

    Attributes:
        run_id: which one it is.
        pipeline: the name of its pipeline.
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

    Args:
        path: the file's.

    Raises:
        JournalError: there is no such file, or it is no journal, or it can't be read.
    """
    query = (
        "SELECT run_id, pipeline, coalesce(sum(ok), 0), coalesce(sum(1 - ok), 0), max(created, "
        "coalesce(max(finished), 0)) / 1e6 FROM runs LEFT JOIN items ON run = id GROUP BY id ORDER BY id"
    )
    return [Run(*row) for row in read_rows(path, query)]


def read_failures(path: str) -> Iterator[FailedItem]:
    """Yield the items that have failed, batch by batch in their order.

    Args:
        path: the file's.

    Raises:
        JournalError: as for :func:`read_runs`.
    """
    query = (
        "SELECT run_id, position, item, value FROM runs JOIN items ON run = id "
        "WHERE ok = 0 ORDER BY id, position"
    )
    for run_id, position, item, value in read_rows(path, query):
        try:
            failed = FailedItem(run_id, position, item and read_json(item), load_error(read_json(value)))
        except (ValueError, TypeError, LookupError) as error:
            raise explained(error, path, "shown") from error
        yield failed
