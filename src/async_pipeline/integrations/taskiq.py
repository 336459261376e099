"""Batches over taskiq workers: RabbitMQ, Redis Streams, NATS JetStream, or in memory.

>>> # jobs.py, which the client and the workers import
>>> broker = AioPikaBroker(RABBITMQ_URL).with_result_backend(RedisAsyncResultBackend(REDIS_URL))
>>> engine = TaskiqEngine(broker)
>>> pages = engine.register(Pipeline([fetch, parse]), name="pages", version="1")

>>> # the workers:  taskiq worker jobs:broker
>>> # the client
>>> async with engine:
...     rows = await pages.map(urls, engine=engine)

Needs taskiq, and the package of a broker: ``pip install 'async-pipeline[taskiq]' taskiq-redis``.
"""

import asyncio
import contextlib
import inspect
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from secrets import token_hex
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, cast

from ..engine import Chunk, Completion, run_chunk
from ..errors import EngineError, WorkerLost
from ..pipeline import Pipeline
from ..retry import check_count, check_seconds

try:
    from taskiq import (
        AsyncBroker,
        AsyncResultBackend,
        InMemoryBroker,
        NoResultError,
        TaskiqEvents,
        TaskiqResult,
    )
    from taskiq.depends.progress_tracker import TaskProgress
    from taskiq.result_backends.dummy import DummyResultBackend
except ImportError as _missing:
    raise ImportError("taskiq support requires installing async-pipeline[taskiq]") from _missing

__all__ = ["TaskiqEngine"]

_TASK = "async_pipeline.run_chunk"
_DEATHS = 2  # of workers by one chunk, before it is given up
_BEATS = 4  # of a lease, while its chunk runs
_PATIENCE = 2.5  # leases without a beat, until the client sends a chunk again
_SHORTEST, _LONGEST = 0.01, 0.25  # seconds between two looks for results
_SWEEP = 0.1  # seconds between two looks for all of them; chunks end about in the order they were sent
_PAUSE = 0.1  # seconds between two attempts to reach the broker or the results
_ANSWER = 10.0  # seconds that a worker waits for the result backend
_GRACE = 1.0  # seconds for a call to end after it was cancelled
_CLOSING = 5.0  # seconds to tell the workers that a batch is cancelled, or to leave a broker

_logger = logging.getLogger("async_pipeline")
_T = TypeVar("_T")
_PipelineT = TypeVar("_PipelineT", bound=Pipeline[Any, Any])


class TaskiqEngine:
    """Runs batches on the workers of a taskiq broker.

    >>> engine = TaskiqEngine(broker)
    >>> pages = engine.register(Pipeline([fetch, parse]), name="pages", version="1")
    >>> async with engine:                               # starts the broker up, and shuts it down
    ...     rows = await pages.map(urls, engine=engine)

    Workers are started by taskiq's own command, ``taskiq worker MODULE:BROKER``, with the module that
    registers the pipelines. Each chunk is one task. It is acknowledged when its result is saved, so the
    broker delivers it again if its worker dies: an item may run twice, and handlers that must not repeat an
    effect use :func:`~async_pipeline.item_key`.

    While a chunk runs, its worker renews a lease through the result backend, by which everybody sees that it
    is alive: delivered again meanwhile, it is dropped. When it is silent, the next delivery runs it. If none
    comes (a stream broker looks for what was left only when something new arrives), the client sends it
    again. A handler that blocks the event loop for longer than the lease looks dead: give such a one an
    ``executor``. Two workers that die of a chunk are enough: its items are then run one by one.

    With a ``run_id`` of its own, or of a journal, a client that was killed and started again finds what has
    finished without it, as long as the result backend keeps it.

    What matters of the set-up:

    - ``RedisAsyncResultBackend(url, result_ex_time=86400)`` for each broker: results and leases are deleted a
      day later, not never; so long a client can come back. ``keep_results=False`` is refused.
    - ``taskiq worker ... --max-async-tasks 2 --max-prefetch 0``: how many chunks a process runs at a time; by
      default one takes up to 100, and leaves none to the others. Of two, one runs while the other is saved.
    - ``--wait-tasks-timeout 20``: a worker that is stopped gives its chunks back after so many seconds, and
      others take them up at once; by default it ends them first, however long that takes.
    - ``AioPikaBroker(url, qos=2)``: as many as ``--max-async-tasks``; what is fetched beyond waits in one
      process while others are idle. RabbitMQ takes a chunk back after its ``consumer_timeout`` of 30 minutes,
      which is dropped while it runs.
    - ``RedisStreamBroker(url, xread_count=1)``: by default one process fetches 100 chunks at once.
      ``consumer_id="0"``: what was sent before the first worker came, or before Redis was restarted, counts.
      ``unacknowledged_lock_timeout=10``: without it, as taskiq says, a worker that is killed while it looks
      for what was left may keep all others from that. ``maxlen=10_000``: by default the stream grows for
      ever; a chunk that is cut off is sent again. ``idle_timeout`` need not be longer than a chunk takes.
    - ``PullBasedJetStreamBroker(url)``: ``pull_consume_batch`` stays 1; ``ack_wait`` of its consumer, 30 s by
      default, need not be longer than a chunk takes.

    Args:
        broker: a broker that acknowledges messages, with a result backend that keeps progress.
        chunk_size: how many items travel together; 100 by default.
        window: how many chunks are in flight at most; 16 by default.
        run_id: by which a later call finds what this one has left; ``None`` (the default) for a new one each
            time.
        lease: seconds without a sign of life after which a worker counts as dead; 10 by default.
        start_timeout: seconds without a sign of life of any worker, after which the batch fails; 300 by
            default.
        outage_timeout: seconds to try again while the broker or the result backend can't be reached; 30 by
            default.
        allow_lossy: True accepts a broker without acknowledgements, which loses chunks with their workers.
            The client sends them again when it misses them.

    Raises:
        TypeError, ValueError: an argument is wrong, or the broker loses messages.
    """

    def __init__(
        self,
        broker: AsyncBroker,
        *,
        chunk_size: int = 100,
        window: int = 16,
        run_id: str | None = None,
        lease: float = 10.0,
        start_timeout: float = 300.0,
        outage_timeout: float = 30.0,
        allow_lossy: bool = False,
    ) -> None:
        if not isinstance(broker, AsyncBroker):
            raise TypeError(f"broker must be a taskiq broker, not {broker!r}")
        if not allow_lossy and _is_lossy(broker):
            raise ValueError(
                f"a {type(broker).__name__} does not wait for acknowledgements, so a chunk is lost with its "
                "worker: take RedisStreamBroker, AioPikaBroker or PullBasedJetStreamBroker, or write "
                "TaskiqEngine(broker, allow_lossy=True)"
            )
        if getattr(broker, "await_inplace", False):
            raise ValueError(
                "with await_inplace=True a chunk would run while it is being sent; write InMemoryBroker()"
            )
        check_count("chunk_size", chunk_size, least=1, message="chunk_size must be at least 1")
        check_count("window", window, least=1, message="window must be at least 1")
        if run_id is not None and not (isinstance(run_id, str) and run_id):
            raise TypeError(f"run_id must be a str that is not empty, not {run_id!r}")
        for name, seconds in (("lease", lease), ("start_timeout", start_timeout)):
            check_seconds(name, seconds, zero=False)
        check_seconds("outage_timeout", outage_timeout, zero=False)
        self.broker = broker
        self.chunk_size = chunk_size
        self.window = window
        self.run_id = run_id
        self._lease = lease
        self._start_timeout = start_timeout
        self._outage_timeout = outage_timeout
        self._worker = _worker_of(broker)
        self._batches: dict[str, _Batch] = {}
        self._entered = 0

    def register(self, pipeline: _PipelineT, *, name: str | None = None, version: str = "") -> _PipelineT:
        """Make a pipeline known, in a module that the client and the workers import.

        Args:
            pipeline: the pipeline.
            name: what it is called between them; by default its own name.
            version: which one it is; a worker refuses chunks of another version.

        Returns:
            The pipeline.

        Raises:
            TypeError: it is no pipeline.
            ValueError: the name is taken by another one.
        """
        if not isinstance(pipeline, Pipeline):
            raise TypeError(f"register takes a Pipeline, not {pipeline!r}; write Pipeline([...])")
        name = pipeline.name if name is None else name
        if not isinstance(name, str) or not isinstance(version, str):
            raise TypeError(f"name and version must be texts, not {name!r} and {version!r}")
        known = self._worker.registered.get(name)
        if known is not None and not _is_same(known.pipeline, pipeline):
            raise ValueError(f"another pipeline is registered as {name!r}; give this one another name")
        self._worker.registered[name] = _Registered(pipeline, name, version)
        return pipeline

    async def __aenter__(self) -> Self:
        self._entered += 1
        if self._entered > 1:  # the outermost one starts the broker up, and shuts it down
            return self
        try:
            async with asyncio.timeout(self._outage_timeout):
                await self.broker.startup()
        except Exception as error:
            await self._leave()
            raise EngineError(f"the broker can't be reached: {_text(error)}; is it running?") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        self._entered -= 1
        if self._entered:
            return
        try:
            async with asyncio.timeout(_CLOSING):
                await self.broker.shutdown()
        except Exception as error:  # it must not hide how the block has ended
            _logger.warning("%r could not leave its broker", self, exc_info=error)

    # -- for the pipeline: see the protocol Engine

    async def submit(self, chunk: Chunk) -> None:
        """Ask the result backend for a chunk, and send it unless it has finished, or runs, already.

        Raises:
            EngineError: the pipeline is not registered, or the broker or the result backend can't be reached.
        """
        sent = _Sent(chunk, self._registered(chunk.pipeline))
        self._check_backend()
        batch = self._batch(chunk.batch)
        batch.left += 1
        sent.is_earlier, sent.beat = await self._ask(sent.look_back)
        if not sent.is_earlier and (sent.beat is None or not sent.beat.is_alive):
            await self._send(sent)
        sent.since = batch.sign = _now()
        batch.waiting[sent.task_id] = sent
        batch.more.set()

    async def completed(self, batch: str) -> AsyncIterator[Completion]:
        """Yield what became of each chunk of a batch.

        Raises:
            EngineError: the result backend can't be reached, a worker refuses a chunk, or there is no worker.
        """
        state = self._batch(batch)
        pause = _SHORTEST
        while True:
            if not state.waiting:
                state.more.clear()
                await state.more.wait()
                pause = _SHORTEST
            found, is_all = await self._collect(state)
            for completion in found:
                yield completion
            if is_all:  # others may have ended as well
                continue
            await self._supervise(state)
            pause = _SHORTEST if found else min(pause * 1.5, _LONGEST)
            await asyncio.sleep(pause)

    async def aclose(self, batch: str) -> None:
        """Forget a batch, and let the workers stop what is left of it: they look a few times a lease."""
        state = self._batches.pop(batch, None)
        if state is None or not state.left:
            return
        mark: Any = TaskiqResult(is_err=False, return_value=None, execution_time=0.0)
        try:
            await _apart(self.broker.result_backend.set_result(_mark_of(batch), mark), _CLOSING)
        finally:
            await self._worker.cancel(batch)

    # -- the client's half

    def _batch(self, batch: str) -> "_Batch":
        return self._batches.setdefault(batch, _Batch(_now()))

    def _registered(self, pipeline: Pipeline[Any, Any]) -> "_Registered":
        for registered in self._worker.registered.values():
            if _is_same(registered.pipeline, pipeline):
                return registered
        if pipeline.name in self._worker.registered:
            raise EngineError(
                f"another pipeline is registered as {pipeline.name!r}; use the one that register() has "
                "returned (its hooks and observers can be replaced), or register this one by another name"
            )
        raise EngineError(
            f"the pipeline {pipeline.name!r} is not registered; write engine.register(pipeline, name=...) "
            "in a module that the workers import as well"
        )

    def _check_backend(self) -> None:
        backend = self.broker.result_backend
        if isinstance(backend, DummyResultBackend):
            raise EngineError(
                "the broker has no result backend; write "
                "broker.with_result_backend(RedisAsyncResultBackend(url))"
            )
        if not getattr(backend, "keep_results", True):
            raise EngineError(
                "the result backend forgets a result when it is read, so that a chunk could run again; "
                "write keep_results=True, and result_ex_time=86400 to forget it a day later"
            )
        if type(backend).set_progress is AsyncResultBackend.set_progress:
            raise EngineError(
                f"a {type(backend).__name__} keeps no progress, by which workers show that they live; take "
                "another one, like RedisAsyncResultBackend"
            )

    async def _ask(self, question: Callable[[AsyncResultBackend[Any]], Coroutine[Any, Any, _T]]) -> _T:
        return await self._insist(lambda: question(self.broker.result_backend), "the result backend")

    async def _insist(self, call: Callable[[], Coroutine[Any, Any, _T]], whom: str) -> _T:
        """Call again and again while it fails, for as long as an outage may take."""
        give_up = _now() + self._outage_timeout
        while True:
            try:
                return await _apart(call(), give_up - _now())
            except Exception as error:
                cause = error if isinstance(error, TimeoutError) else error.__cause__ or error
                if _now() + _PAUSE >= give_up or _is_mistake(cause):
                    hint = "; write 'async with engine:' around it" if _is_mistake(cause) else ""
                    raise EngineError(f"{whom} can't be reached: {_text(cause)}{hint}") from error
            await asyncio.sleep(_PAUSE)

    async def _send(self, sent: "_Sent", *, is_copy: bool = False) -> None:
        async def kick() -> None:
            await (
                self._worker.task.kicker()
                .with_task_id(sent.task_id)
                .with_labels(ack_type="when_saved")
                .kiq(
                    task_id=sent.task_id,
                    batch=sent.chunk.batch,
                    name=sent.registered.name,
                    version=sent.registered.version,
                    lease=self._lease,
                    outage_timeout=self._outage_timeout,
                    is_copy=is_copy,
                    payload=sent.chunk.payload,
                )
            )

        await self._insist(kick, "the broker")

    async def _collect(self, state: "_Batch") -> tuple[list[Completion], bool]:
        """Return what has ended since the last look, and whether that is all that was looked for."""
        asked = state.to_ask()
        results = await self._ask(lambda backend: _all(sent.result(backend) for sent in asked))
        completions = []
        for sent, result in zip(asked, results, strict=True):
            if result is not None:
                completions.append(_completion(sent, result))
                del state.waiting[sent.task_id]
                state.left -= 1
                state.sign = _now()
        return completions, len(completions) == len(asked)

    async def _supervise(self, state: "_Batch") -> None:
        """See now and then who lives, and send again what nobody seems to be at."""
        now = _now()
        if now < state.next_look or not state.waiting:
            return
        state.next_look = now + self._lease / _BEATS
        waiting = list(state.waiting.values())
        beats = await self._ask(lambda backend: _all(sent.record(backend) for sent in waiting))
        for sent, beat in zip(waiting, beats, strict=True):
            if beat is not None and beat != sent.beat:
                sent.beat, sent.since, sent.copies, state.sign = beat, now, 0, now
                if beat.refusal is not None:
                    raise EngineError(beat.refusal)
                if not beat.is_alive:
                    await self._send(sent)
            # nobody is at it, as far as one can see; where it waits its turn, the others' beats show that
            elif now - (state.sign if sent.beat is None else sent.since) > self._patience(sent):
                sent.copies += 1
                await self._send(sent, is_copy=True)
        if now - state.sign > self._lease and not state.is_warned:
            state.is_warned = True
            _logger.warning(
                "no worker has given a sign of life for %g s; is 'taskiq worker MODULE:BROKER' running? "
                "(The batch fails after %g s without one.)",
                self._lease,
                self._start_timeout,
            )
        if now - state.sign > self._start_timeout:
            raise EngineError(
                f"no worker has given a sign of life for {self._start_timeout:g} s; start one by "
                "'taskiq worker MODULE:BROKER', with the module that registers the pipelines"
            )

    def _patience(self, sent: "_Sent") -> float:
        return self._lease * _PATIENCE * cast(float, 2**sent.copies)

    def __repr__(self) -> str:
        return f"<TaskiqEngine on {type(self.broker).__name__}>"


class _Registered(NamedTuple):
    pipeline: Pipeline[Any, Any]
    name: str
    version: str


class _Beat(NamedTuple):
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


def _beat_of(progress: "TaskProgress[Any] | None") -> _Beat | None:
    return None if progress is None else _Beat(str(progress.state), *(progress.meta or ()))


@dataclass(slots=True)
class _Sent:
    """A chunk that is in flight."""

    chunk: Chunk
    registered: _Registered
    is_earlier: bool = False
    beat: _Beat | None = None
    since: float = 0.0  # when it was sent, or when its beat has changed
    copies: int = 0  # sent since then

    @property
    def task_id(self) -> str:
        return f"{self.registered.name}@{self.registered.version}:{self.chunk.id}"

    async def look_back(self, backend: AsyncResultBackend[Any]) -> tuple[bool, _Beat | None]:
        """Return whether it has ended already, and else who was at it."""
        if await backend.is_result_ready(self.task_id):
            return True, None
        return False, await self.record(backend)

    async def record(self, backend: AsyncResultBackend[Any]) -> _Beat | None:
        return _beat_of(await backend.get_progress(self.task_id))

    async def result(self, backend: AsyncResultBackend[Any]) -> TaskiqResult[Any] | None:
        return await backend.get_result(self.task_id) if await backend.is_result_ready(self.task_id) else None


def _completion(sent: _Sent, result: TaskiqResult[Any]) -> Completion:
    name = sent.chunk.id
    if result.is_err:
        failure = EngineError(f"a worker could not run a chunk: {result.error!r}")
        return Completion(name, None, failure, sent.is_earlier)
    kind, text = result.return_value
    if kind == "lost":
        return Completion(name, None, WorkerLost(text), sent.is_earlier)
    return Completion(name, text, None, sent.is_earlier)


@dataclass(slots=True)
class _Batch:
    """The chunks of one batch that are in flight."""

    sign: float  # when a worker has last given a sign of life
    next_look: float = 0.0
    next_sweep: float = 0.0
    is_warned: bool = False  # that nobody seems to be there
    left: int = 0  # submitted, and not yet completed
    waiting: dict[str, _Sent] = field(default_factory=dict)
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def to_ask(self) -> list[_Sent]:
        """Return the chunks whose results are to be looked for: the oldest ones, now and then all."""
        waiting = list(self.waiting.values())
        if _now() < self.next_sweep:
            return waiting[: max(4, len(waiting) // 4)]
        self.next_sweep = _now() + _SWEEP
        return waiting


# -- the workers' half


class _RefusedError(Exception):
    """The client is to know why a chunk can't run here."""


class _Worker:
    """What runs the chunks of one broker in this process."""

    def __init__(self, broker: AsyncBroker) -> None:
        self.broker = broker
        self.registered: dict[str, _Registered] = {}
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
            _logger.warning("a worker could not run %s", task_id, exc_info=error)
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
        if await self._is_ready(self.task_id) or await self._is_ready(_mark_of(self.batch)):
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

    async def _lives(self, beat: _Beat) -> bool:
        """Tell whether the worker that has begun a chunk is still at it, or has ended it."""
        give_up = _now() + self._lease
        while _now() < give_up:
            await asyncio.sleep(self._lease / (2 * _BEATS))
            if await self._is_ready(self.task_id) or await self._record() != beat:
                return True
        return False

    async def _claimed(self) -> bool:
        """Tell whether nobody else wants to run a chunk of which several messages are under way.

        Who runs it overwrites a claim by its next beat, and so does who claims it later.
        """
        claim = await self.say("claimed")
        await asyncio.sleep(2 * self._lease / _BEATS)
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
            await asyncio.sleep(self._lease / _BEATS)
            try:
                await self.say("running")
                is_cancelled = await self._is_ready(_mark_of(self.batch))
            except Exception as error:
                _logger.warning("a worker could not renew its lease of %s", self.task_id, exc_info=error)
                continue
            if is_cancelled:
                task.cancel()
                return

    async def say_ended(self) -> None:
        """Announce the result as soon as the backend can be reached: taskiq tries only once to save it."""
        give_up = _now() + self._outage_timeout
        while True:
            try:
                await self.say("ended")
                return
            except Exception:
                if _now() + _PAUSE >= give_up:
                    raise
            await asyncio.sleep(_PAUSE)

    async def say(self, state: str, refusal: str | None = None) -> _Beat:
        self._number += 1
        beat = _Beat(state, self._owner, self._number, self.deaths, refusal)
        progress: Any = TaskProgress(state=state, meta=list(beat[1:]))
        await _apart(self._backend.set_progress(self.task_id, progress), _ANSWER)
        return beat

    async def _record(self) -> _Beat | None:
        return _beat_of(await _apart(self._backend.get_progress(self.task_id), _ANSWER))

    async def _is_ready(self, task_id: str) -> bool:
        return await _apart(self._backend.is_result_ready(task_id), _ANSWER)


async def _stopped(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


async def _cancelled(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _worker_of(broker: AsyncBroker) -> _Worker:
    task = broker.find_task(_TASK)
    if task is None:
        return _Worker(broker)
    worker = getattr(task.original_func, "worker", None)
    if not isinstance(worker, _Worker):
        raise ValueError(f"the broker has another task of the name {_TASK!r}; give that one another name")
    return worker


def _mark_of(batch: str) -> str:
    return f"async_pipeline.cancelled:{batch}"


def _is_lossy(broker: AsyncBroker) -> bool:
    """Tell whether a broker yields messages that nobody acknowledges: bare bytes."""
    if isinstance(broker, InMemoryBroker):  # it has no workers that could die apart
        return False
    yielded = str(inspect.get_annotations(type(broker).listen).get("return", ""))
    return "bytes" in yielded and "AckableMessage" not in yielded


def _is_same(one: Pipeline[Any, Any], other: Pipeline[Any, Any]) -> bool:
    # pipeline.replace(observers=...) at the client is the same one for the workers
    return one is other or (one.stages == other.stages and one.middlewares == other.middlewares)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"  # its repr may hide what it says, as those of redis-py do


def _is_mistake(error: BaseException) -> bool:
    """Tell whether it will not get better: the broker was not started up."""
    is_early = type(error).__name__ == "NoStartupError"
    return is_early or isinstance(error, (AttributeError, TypeError, ValueError))


async def _all(calls: Iterable[Awaitable[_T]]) -> list[_T]:
    """Await all side by side; when one fails, none goes on."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(cast(Any, call)) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _apart(call: Coroutine[Any, Any, _T], seconds: float) -> _T:
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


def _now() -> float:
    return asyncio.get_running_loop().time()
