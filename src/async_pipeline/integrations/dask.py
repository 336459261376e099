"""Batches over the workers of a Dask cluster; needs the extra ``async-pipeline[dask]``.

>>> async with Client("tcp://scheduler:8786", asynchronous=True) as client:
...     results = await pipeline.map(items, 50, engine=DaskEngine(client))
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import CancelledError as FutureCancelled
from contextlib import suppress
from functools import lru_cache
from typing import Any

from ..engine import Chunk, Completion, run_chunk
from ..errors import EngineError, WorkerLost
from ..events import logger
from ..retry import check_count

try:
    import cloudpickle  # type: ignore[import-untyped]
    from distributed import Client
    from distributed.scheduler import KilledWorker
except ImportError as _missing:
    raise ImportError(
        "Dask support requires installing async-pipeline[dask]: pip install 'async-pipeline[dask]'"
    ) from _missing

__all__ = ["DaskEngine"]

_PIPELINES = 8  # that an engine keeps pickled, and a worker loaded
_PATIENCE = 5.0  # seconds for workers to stop what they run of a batch that has ended
_USABLE = ("running", "connecting")  # states of a client; one that connects again may succeed


class DaskEngine:
    """Run the chunks of ``map`` and ``stream`` on the workers of a Dask cluster, a task for each.

    >>> async with Client("tcp://scheduler:8786", asynchronous=True) as client:
    ...     results = await pipeline.map(items, 50, engine=DaskEngine(client))

    A chunk runs on the event loop of its worker, ``concurrency`` of its items at a time. The same loop talks
    to the scheduler, so a sync handler that computes for long needs ``executor="thread"``, or a
    ``ProcessPoolExecutor`` that it makes there. A worker runs as many chunks at a time as it has threads.

    The pipeline is sent as cloudpickle has written it, once, when it is first used: pickled code runs on the
    workers, as always with Dask, and they need this package and whatever the handlers import. Hooks and
    observers stay here and need not be picklable, but those of pipelines inside it go along. A worker keeps
    what it has loaded, so that what a handler keeps in a variable lasts there, and differs between workers.

    Dask starts the chunk of a dead worker again on another one, so an item may run more than once: see
    :func:`~async_pipeline.item_key`. A chunk that has killed more workers than Dask's setting
    ``distributed.scheduler.allowed-failures`` is run again item by item, and the one that does it fails with
    :class:`~async_pipeline.WorkerLost`. While a cluster has no worker at all, a batch waits for one.

    Args:
        client: a ``distributed.Client`` with ``asynchronous=True`` that has been awaited, of this event loop.
        chunk_size: how many items travel together; 100 by default.
        window: how many chunks are in flight at most; 16 by default. More than there are threads in all
            workers, or these have to wait for the next one.
        run_id: what :func:`~async_pipeline.item_key` begins with, so that it is the same in a later call; by
            default a new one for each call, or that of a journal.

    Raises:
        TypeError: the client is no ``distributed.Client``, or not an asynchronous one; an argument is wrong.
        ValueError: the client was not awaited, or is closed; an argument is wrong.
    """

    def __init__(
        self, client: Client, *, chunk_size: int = 100, window: int = 16, run_id: str | None = None
    ) -> None:
        _check_client(client)
        check_count("chunk_size", chunk_size, least=1, message="chunk_size must be at least 1")
        check_count("window", window, least=1, message="window must be at least 1")
        if run_id is not None and not (isinstance(run_id, str) and run_id):
            raise TypeError(f"run_id must be a str that is not empty, not {run_id!r}")
        self.client = client
        self.chunk_size = chunk_size
        self.window = window
        self.run_id = run_id
        self._pickled = lru_cache(_PIPELINES)(_pickled)
        self._batches: dict[str, _Batch] = {}

    async def submit(self, chunk: Chunk) -> None:
        """Hand a chunk to the scheduler.

        Raises:
            EngineError: the client is closed or of another event loop, or the pipeline can't be pickled.
        """
        if self.client.status not in _USABLE:
            raise EngineError(f"the Dask client is {self.client.status}; open another one and run this again")
        if not self.client.asynchronous:
            raise EngineError(
                "the Dask client belongs to another event loop; make one in the loop that uses it"
            )
        pickled = self._pickled(chunk.pipeline)
        key = f"{chunk.pipeline.name}-{chunk.batch}-{chunk.id}"
        try:
            future = self.client.submit(
                _run_pickled, chunk.batch, pickled, chunk.payload, key=key, pure=False
            )
        except Exception as error:
            raise EngineError(f"Dask's scheduler can't be given a chunk: {error}") from error
        self._batch(chunk.batch).follow(chunk.id, future)

    async def completed(self, batch: str) -> AsyncGenerator[Completion, None]:
        """Yield what became of each chunk of a batch, as Dask tells it."""
        completions = self._batch(batch).completions
        while True:
            yield await completions.get()

    async def aclose(self, batch: str) -> None:
        """Cancel what is left of a batch: what waits at the scheduler, and what runs on the workers.

        Returns when the handlers there have ended. Workers that take longer than 5 seconds are left to
        themselves, and a warning says so; all are when the client is closed.
        """
        known = self._batches.pop(batch, _Batch())
        futures = await known.end()
        if (futures or known.is_torn) and self.client.status in _USABLE:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self.client.cancel(futures)  # type: ignore[no-untyped-call]
                    # Dask lets run on what has begun
                    await self.client.run(_cancel_running, batch, on_error="ignore")
            except Exception as error:
                logger.warning("Dask's workers may go on with a batch that has ended: %r", error)

    def _batch(self, batch: str) -> "_Batch":
        return self._batches.setdefault(batch, _Batch())

    def __repr__(self) -> str:
        return f"<DaskEngine on {self.client!r}>"


def _check_client(client: object) -> None:
    advice = "write client = await Client(..., asynchronous=True)"
    if not isinstance(client, Client):
        raise TypeError(f"client must be a distributed.Client, not {client!r}; {advice}")
    if not client.asynchronous:
        raise TypeError(f"client must be an asynchronous one of this event loop; {advice}")
    if client.status not in _USABLE:
        raise ValueError(f"client must be connected, but it is {client.status}; {advice}")


def _pickled(pipeline: Any) -> bytes:
    """Return the pipeline as it travels, without what is called at the client."""
    alone = pipeline.replace(before_stage=None, after_stage=None, observers=(), on_hook_error=None)
    try:
        pickled: bytes = cloudpickle.dumps(alone)
    except Exception as error:
        raise EngineError(
            f"the pipeline {pipeline.name!r} can't be pickled, so it can't go to Dask's workers: {error}; "
            "open files and connections in the handler, where it runs"
        ) from error
    return pickled


class _Batch:
    """What is in flight of one batch, and what has come back."""

    def __init__(self) -> None:
        self.completions: asyncio.Queue[Completion] = asyncio.Queue()
        self.is_torn = False  # whether somebody else has cancelled a chunk, which may run all the same
        self._followers: dict[asyncio.Task[None], Any] = {}  # each with its future

    def follow(self, chunk_id: str, future: Any) -> None:
        follower = asyncio.create_task(self._follow(chunk_id, future))
        self._followers[follower] = future
        follower.add_done_callback(self._followers.pop)

    async def _follow(self, chunk_id: str, future: Any) -> None:
        reply: str | None = None
        error: WorkerLost | EngineError | None = None
        try:
            reply = await future
        except KilledWorker as lost:
            error = WorkerLost(f"each of the {lost.allowed_failures + 1} workers that ran it has died")
            error.__cause__ = lost
        except (asyncio.CancelledError, FutureCancelled) as cancelled:
            if not future.cancelled():  # it is this task that is cancelled
                raise
            self.is_torn = True
            error = _engine_error("a chunk was cancelled, or the scheduler is gone", cancelled)
        except Exception as failure:
            error = _engine_error("a worker could not run a chunk", failure)
        future.release()  # the scheduler and the worker forget it
        self.completions.put_nowait(Completion(chunk_id, reply, error))

    async def end(self) -> list[Any]:
        """Follow no longer, and return the futures of what is in flight."""
        followers = dict(self._followers)
        for follower in followers:
            follower.cancel()
        if followers:
            await asyncio.wait(followers)
        return list(followers.values())


def _engine_error(what: str, cause: BaseException) -> EngineError:
    error = EngineError(f"Dask: {what}: {cause!r}")
    error.__cause__ = cause
    return error


# -- in the worker

_running: dict[str, set["asyncio.Task[str]"]] = {}  # by batch
_ended: deque[str] = deque(
    maxlen=64
)  # batches; a chunk that was queued here may begin before Dask takes it away


async def _run_pickled(batch: str, pickled: bytes, payload: str) -> str:
    """Run a chunk; the task that Dask runs."""
    if batch in _ended:
        return ""
    task = asyncio.create_task(run_chunk(_loaded(pickled), payload))
    _running.setdefault(batch, set()).add(task)
    try:
        with suppress(asyncio.CancelledError):
            return await task
        return ""  # the batch has ended, and nobody reads it
    finally:
        _running[batch].discard(task)
        if not _running[batch]:
            del _running[batch]


@lru_cache(_PIPELINES)
def _loaded(pickled: bytes) -> Any:
    return cloudpickle.loads(pickled)


async def _cancel_running(batch: str) -> None:
    """Cancel what runs of a batch, and wait for its end."""
    _ended.append(batch)
    tasks = list(_running.get(batch, ()))
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
