"""The workers' half of the engine on taskiq, and what both halves say to each other."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from secrets import token_hex
from typing import Any, NamedTuple, TypeVar, cast

from taskiq import AsyncBroker, AsyncResultBackend, NoResultError, TaskiqEvents
from taskiq.depends.progress_tracker import TaskProgress

from ..engine import run_chunk
from ..events import logger
from ..pipeline import Pipeline

__all__ = [
    "BEATS",
    "PAUSE",
    "Beat",
    "Registered",
    "apart",
    "beat_of",
    "loop_time",
    "mark_of",
    "worker_of",
]

_TASK = "async_pipeline.run_chunk"
_DEATHS = 2  # of workers by one chunk, before it is given up
BEATS = 4  # of a lease, while its chunk runs
PAUSE = 0.1  # seconds between two attempts to reach the broker or the results
_ANSWER = 10.0  # seconds that a worker waits for the result backend
_GRACE = 1.0  # seconds for a call to end after it was cancelled
_T = TypeVar("_T")


class Registered(NamedTuple):
    """A pipeline that both halves know, by its name and version."""

    pipeline: Pipeline[Any, Any]
    name: str
    version: str


class Beat(NamedTuple):
    """A sign of life of a worker, or its last word, for a chunk."""

    state: (
        str  # "claimed", "running", "ended" (its result follows), "released" (it was stopped), or "refused"
    )
    owner: str
    number: int = 0
    deaths: int = 0  # of workers before this one
    refusal: str | None = None

    @property
    def is_alive(self) -> bool:
        return self.state in ("claimed", "running", "ended")


def beat_of(progress: "TaskProgress[Any] | None") -> Beat | None:
    return None if progress is None else Beat(str(progress.state), *(progress.meta or ()))


class _RefusedError(Exception):
    """The client is to know why a chunk can't run here."""


class Worker:
    """What runs the chunks of one broker in this process."""

    def __init__(self, broker: AsyncBroker) -> None:
        self.broker = broker
        self.registered: dict[str, Registered] = {}
        self.task: Any = broker.register_task(self._function(), task_name=_TASK)
        self._running: dict[str, tuple[str, asyncio.Task[Any]]] = {}
        broker.add_event_handler(TaskiqEvents.WORKER_SHUTDOWN, self._shutdown)

    def _function(self) -> Callable[..., Any]:
        async def run_chunk(
            task_id: str,
            batch: str,
            name: str,
            version: str,
            lease: float,
            outage_timeout: float,
            is_copy: bool,
            payload: str,
        ) -> list[str]:
            backend = self.broker.result_backend
            delivery = _Delivery(backend, task_id, batch, lease, outage_timeout, is_copy)
            return await self.run(delivery, name, version, payload)

        run_chunk.worker = self  # type: ignore[attr-defined]
        return run_chunk

    async def run(self, delivery: "_Delivery", name: str, version: str, payload: str) -> list[str]:
        """Run a chunk, unless it has ended, runs elsewhere or is not wanted any more."""
        task_id = delivery.task_id
        if task_id in self._running:
            raise NoResultError  # the broker has grown impatient
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._running[task_id] = delivery.batch, task
        try:
            return await self._run(delivery, name, version, payload)
        except NoResultError:
            raise
        except asyncio.CancelledError:  # the worker is being stopped, or the batch was cancelled
            task.uncancel()
            raise NoResultError from None
        except Exception as error:
            # the client misses it, and sends it again
            logger.warning("a worker could not run %s", task_id, exc_info=error)
            raise NoResultError from None
        finally:
            del self._running[task_id]

    async def _run(self, delivery: "_Delivery", name: str, version: str, payload: str) -> list[str]:
        if not await delivery.is_wanted():
            raise NoResultError
        if delivery.deaths >= _DEATHS:
            return ["lost", f"{delivery.deaths} workers that ran it have died"]
        try:
            pipeline = self._find(name, version)
            async with delivery.leased():
                reply = await run_chunk(pipeline, payload)
        except _RefusedError as error:
            await delivery.say("refused", str(error))
            raise NoResultError from None
        await delivery.say_ended()
        return ["reply", reply]

    def _find(self, name: str, version: str) -> Pipeline[Any, Any]:
        known = self.registered.get(name)
        if known is None:
            names = ", ".join(map(repr, self.registered)) or "none"
            raise _RefusedError(
                f"a worker does not know the pipeline {name!r} (it knows: {names}); let the module that "
                "'taskiq worker' is given register it, or give each application a queue of its own"
            )
        if known.version != version:
            raise _RefusedError(
                f"a worker has version {known.version!r} of the pipeline {name!r}, not {version!r}; "
                "restart the workers with the code of the client, or give each application a queue of its own"
            )
        return known.pipeline

    async def cancel(self, batch: str) -> None:
        """Cancel what runs in this process of a batch: with a broker in memory, that is all."""
        await _cancelled(task for known, task in self._running.values() if known == batch)

    async def _shutdown(self, _: object) -> None:
        """Cancel what taskiq does not wait for any longer, so that others can take it up at once."""
        await _cancelled(task for _, task in self._running.values())


class _Delivery:
    """One message about a chunk, in a worker: whether it is to run here, and the signs of life meanwhile."""

    def __init__(
        self,
        backend: AsyncResultBackend[Any],
        task_id: str,
        batch: str,
        lease: float,
        outage_timeout: float,
        is_copy: bool,
    ) -> None:
        self.task_id = task_id
        self.batch = batch
        self.deaths = 0
        self._backend = backend
        self._lease = lease
        self._outage_timeout = outage_timeout
        self._is_copy = is_copy
        self._owner = f"{os.getpid()}-{token_hex(4)}"
        self._number = 0

    async def is_wanted(self) -> bool:
        """Tell whether a chunk is to run here, and count the workers that have died of it."""
        if await self._is_ready(self.task_id) or await self._is_ready(mark_of(self.batch)):
            return False
        beat = await self._record()
        if beat is not None:
            self.deaths = beat.deaths
            if beat.is_alive:
                if await self._lives(beat):
                    return False
                self.deaths += beat.state == "running"
                return await self._claimed()
        return not self._is_copy or await self._claimed()

    async def _lives(self, beat: Beat) -> bool:
        """Tell whether the worker that has begun a chunk is still at it, or has ended it."""
        give_up = loop_time() + self._lease
        while loop_time() < give_up:
            await asyncio.sleep(self._lease / (2 * BEATS))
            if await self._is_ready(self.task_id) or await self._record() != beat:
                return True
        return False

    async def _claimed(self) -> bool:
        """Tell whether nobody else wants to run a chunk of which several messages are under way.

        Who runs it overwrites a claim by its next beat, and so does who claims it later.
        """
        claim = await self.say("claimed")
        await asyncio.sleep(2 * self._lease / BEATS)
        return not await self._is_ready(self.task_id) and await self._record() == claim

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator[None]:
        """Show that a chunk runs here, for as long as it does."""
        await self.say("running")
        beating = asyncio.create_task(self._keep_beating(cast(Any, asyncio.current_task())))
        try:
            yield
        except asyncio.CancelledError:
            await _stopped(beating)
            await self.say("released")
            raise
        except Exception as error:  # the chunk was written by another version of this library, say
            raise _RefusedError(f"a worker could not run a chunk: {error!r}") from error
        finally:
            await _stopped(beating)

    async def _keep_beating(self, task: "asyncio.Task[Any]") -> None:
        while True:
            await asyncio.sleep(self._lease / BEATS)
            try:
                await self.say("running")
                is_cancelled = await self._is_ready(mark_of(self.batch))
            except Exception as error:
                logger.warning("a worker could not renew its lease of %s", self.task_id, exc_info=error)
                continue
            if is_cancelled:
                task.cancel()
                return

    async def say_ended(self) -> None:
        """Announce the result as soon as the backend can be reached: taskiq tries only once to save it."""
        give_up = loop_time() + self._outage_timeout
        while True:
            try:
                await self.say("ended")
                return
            except Exception:
                if loop_time() + PAUSE >= give_up:
                    raise
            await asyncio.sleep(PAUSE)

    async def say(self, state: str, refusal: str | None = None) -> Beat:
        self._number += 1
        beat = Beat(state, self._owner, self._number, self.deaths, refusal)
        progress: Any = TaskProgress(state=state, meta=list(beat[1:]))
        await apart(self._backend.set_progress(self.task_id, progress), _ANSWER)
        return beat

    async def _record(self) -> Beat | None:
        return beat_of(await apart(self._backend.get_progress(self.task_id), _ANSWER))

    async def _is_ready(self, task_id: str) -> bool:
        return await apart(self._backend.is_result_ready(task_id), _ANSWER)


async def _stopped(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def _cancelled(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def worker_of(broker: AsyncBroker) -> Worker:
    task = broker.find_task(_TASK)
    if task is None:
        return Worker(broker)
    worker = getattr(task.original_func, "worker", None)
    if not isinstance(worker, Worker):
        raise ValueError(f"the broker has another task of the name {_TASK!r}; give that one another name")
    return worker


def mark_of(batch: str) -> str:
    return f"async_pipeline.cancelled:{batch}"


async def apart(call: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """Await a call of a broker or a result backend in a task of its own, and not for longer than that.

    Some let a cancellation get lost that comes while they wait for an answer: those of redis-py do.
    """
    task = asyncio.create_task(call)
    task.add_done_callback(_noted)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError(f"no answer for {seconds:g} s")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_GRACE)


def _noted(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # nobody may be left who asks for it


def loop_time() -> float:
    return asyncio.get_running_loop().time()
