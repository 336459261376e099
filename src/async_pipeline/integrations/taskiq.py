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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from secrets import token_hex
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, cast

from ..engine import Chunk, Completion, run_chunk
from ..errors import EngineError, WorkerLost
from ..pipeline import Pipeline
from ..retry import check_count, check_seconds

try:
    from taskiq import AsyncBroker, AsyncResultBackend, InMemoryBroker, NoResultError, TaskiqResult
    from taskiq.depends.progress_tracker import TaskProgress
    from taskiq.result_backends.dummy import DummyResultBackend
except ImportError as error:
    raise ImportError("taskiq support requires installing async-pipeline[taskiq]") from error

__all__ = ["TaskiqEngine"]

_TASK = "async_pipeline.run_chunk"
_DEATHS = 2  # of workers by one chunk, before it is given up
_BEATS = 4  # of a lease, while its chunk runs
_PATIENCE = 2.5  # leases without a beat, until the client sends a chunk again
_SHORTEST, _LONGEST = 0.01, 0.25  # seconds between two looks for results
_PAUSE = 0.1  # seconds between two attempts to reach the broker or the results
_CLOSING = 5.0  # seconds to tell the workers that a batch is cancelled

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
    ``executor``.

    With a ``run_id`` of its own, or of a journal, a client that was killed and started again finds what has
    finished without it, as long as the result backend keeps it (``keep_results``, ``result_ex_time``).

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
        check_count("chunk_size", chunk_size, least=1, message="chunk_size must be at least 1")
        check_count("window", window, least=1, message="window must be at least 1")
        if run_id is not None and not isinstance(run_id, str):
            raise TypeError(f"run_id must be a str, not {run_id!r}")
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
        try:
            async with asyncio.timeout(self._outage_timeout):
                await self.broker.startup()
        except Exception as error:
            raise EngineError(f"the broker can't be reached: {error!r}; is it running?") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.broker.shutdown()

    # -- for the pipeline: see the protocol Engine

    async def submit(self, chunk: Chunk) -> None:
        """Ask the result backend for a chunk, and send it unless it has finished, or runs, already.

        Raises:
            EngineError: the pipeline is not registered, or the broker or the result backend can't be reached.
        """
        sent = _Sent(chunk, self._registered(chunk.pipeline))
        self._check_backend()
        batch = self._batch(chunk.batch)
        if await self._is_ready(sent):
            sent.is_earlier = True
        else:
            sent.beat = await self._record(sent)
            if sent.beat is None or not sent.beat.is_running:
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
            found = await self._collect(state)
            for completion in found:
                yield completion
            pause = _SHORTEST if found or state.more.is_set() else min(pause * 1.5, _LONGEST)
            state.more.clear()
            await self._supervise(state)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause if state.waiting else None):
                    await state.more.wait()

    async def aclose(self, batch: str) -> None:
        """Forget a batch, and let the workers stop what is left of it: they look a few times a lease."""
        state = self._batches.pop(batch, None)
        if state is None or not state.waiting:
            return
        await self._worker.cancel(batch, state.waiting)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING):
                result: Any = TaskiqResult(is_err=False, return_value=None, execution_time=0.0)
                await self.broker.result_backend.set_result(_mark_of(batch), result)

    # -- the client's half

    def _batch(self, batch: str) -> "_Batch":
        return self._batches.setdefault(batch, _Batch(_now()))

    def _registered(self, pipeline: Pipeline[Any, Any]) -> "_Registered":
        for registered in self._worker.registered.values():
            if _is_same(registered.pipeline, pipeline):
                return registered
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
        if type(backend).set_progress is AsyncResultBackend.set_progress:
            raise EngineError(
                f"a {type(backend).__name__} keeps no progress, by which workers show that they live; take "
                "another one, like RedisAsyncResultBackend"
            )

    async def _ask(self, question: Callable[[AsyncResultBackend[Any]], Awaitable[_T]]) -> _T:
        async def ask() -> _T:
            return await question(self.broker.result_backend)

        return await self._insist(ask, "the result backend")

    async def _insist(self, call: Callable[[], Awaitable[_T]], whom: str) -> _T:
        """Call again and again while it fails, for as long as an outage may take."""
        give_up = _now() + self._outage_timeout
        while True:
            try:
                async with asyncio.timeout_at(give_up):
                    return await call()
            except Exception as error:
                cause = error if isinstance(error, TimeoutError) else error.__cause__ or error
                if _now() + _PAUSE >= give_up or _is_mistake(cause):
                    hint = "; write 'async with engine:' around it" if _is_mistake(cause) else ""
                    raise EngineError(f"{whom} can't be reached: {cause!r}{hint}") from error
            await asyncio.sleep(_PAUSE)

    async def _send(self, sent: "_Sent") -> None:
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
                    payload=sent.chunk.payload,
                )
            )

        sent.times += 1
        await self._insist(kick, "the broker")

    async def _is_ready(self, sent: "_Sent") -> bool:
        return await self._ask(lambda backend: backend.is_result_ready(sent.task_id))

    async def _record(self, sent: "_Sent") -> "_Beat | None":
        return _beat_of(await self._ask(lambda backend: backend.get_progress(sent.task_id)))

    async def _collect(self, state: "_Batch") -> list[Completion]:
        """Return what has ended since the last look."""
        waiting = list(state.waiting.values())
        ready = await _all(map(self._is_ready, waiting))
        ended = [sent for sent, is_ready in zip(waiting, ready, strict=True) if is_ready]
        completions = await _all(map(self._completion, ended))
        for sent in ended:
            del state.waiting[sent.task_id]
        if ended:
            state.sign = _now()
        return completions

    async def _completion(self, sent: "_Sent") -> Completion:
        result = await self._ask(lambda backend: backend.get_result(sent.task_id))
        name = sent.chunk.id
        if result.is_err:
            failure = EngineError(f"a worker could not run a chunk: {result.error!r}")
            return Completion(name, None, failure, sent.is_earlier)
        kind, text = result.return_value
        if kind == "lost":
            return Completion(name, None, WorkerLost(text), sent.is_earlier)
        return Completion(name, text, None, sent.is_earlier)

    async def _supervise(self, state: "_Batch") -> None:
        """See now and then who lives, and send again what nobody seems to be at."""
        now = _now()
        if now < state.next_look or not state.waiting:
            return
        state.next_look = now + self._lease / _BEATS
        waiting = list(state.waiting.values())
        beats = await _all(map(self._record, waiting))
        for sent, beat in zip(waiting, beats, strict=True):
            if beat is not None and beat != sent.beat:
                sent.beat, sent.since, state.sign = beat, now, now
                if beat.refusal is not None:
                    raise EngineError(beat.refusal)
                if not beat.is_running:
                    await self._send(sent)
            # nobody is at it, as far as one can see; where it waits its turn, the others' beats show that
            elif now - (state.sign if sent.beat is None else sent.since) > self._patience(sent):
                await self._send(sent)
        if now - state.sign > self._start_timeout:
            raise EngineError(
                f"no worker has given a sign of life for {self._start_timeout:g} s; start one by "
                "'taskiq worker MODULE:BROKER', with the module that registers the pipelines"
            )

    def _patience(self, sent: "_Sent") -> float:
        return self._lease * _PATIENCE * cast(float, 2 ** max(0, sent.times - 1))

    def __repr__(self) -> str:
        return f"<TaskiqEngine on {type(self.broker).__name__}>"


class _Registered(NamedTuple):
    pipeline: Pipeline[Any, Any]
    name: str
    version: str


class _Beat(NamedTuple):
    """A sign of life of a worker, or its last word, for a chunk."""

    state: str  # "running", "released" (it was stopped), or "refused"
    owner: str
    number: int
    deaths: int  # of workers before this one
    refusal: str | None = None

    @property
    def is_running(self) -> bool:
        return self.state == "running"


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
    times: int = 0  # it was sent

    @property
    def task_id(self) -> str:
        return f"{self.registered.name}@{self.registered.version}:{self.chunk.id}"


@dataclass(slots=True)
class _Batch:
    """The chunks of one batch that are in flight."""

    sign: float  # when a worker has last given a sign of life
    next_look: float = 0.0
    waiting: dict[str, _Sent] = field(default_factory=dict)
    more: asyncio.Event = field(default_factory=asyncio.Event)


# -- the workers' half


class _RefusedError(Exception):
    """The client is to know why a chunk can't run here."""


class _Worker:
    """What runs the chunks of one broker in this process."""

    def __init__(self, broker: AsyncBroker) -> None:
        self.broker = broker
        self.registered: dict[str, _Registered] = {}
        self.task: Any = broker.register_task(self._function(), task_name=_TASK)
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._cancelled: set[str] = set()  # batches of clients in this process

    def _function(self) -> Callable[..., Any]:
        async def run_chunk(
            task_id: str, batch: str, name: str, version: str, lease: float, payload: str
        ) -> list[str]:
            return await self.run(task_id, batch, name, version, lease, payload)

        run_chunk.worker = self  # type: ignore[attr-defined]
        return run_chunk

    async def run(
        self, task_id: str, batch: str, name: str, version: str, lease: float, payload: str
    ) -> list[str]:
        """Run a chunk, unless it has ended, runs elsewhere or is not wanted any more."""
        if task_id in self._running:
            raise NoResultError  # the broker has grown impatient
        with self._noted(task_id) as task:
            try:
                deaths = await self._deaths(task_id, batch, lease)
                if deaths >= _DEATHS:
                    return ["lost", f"{deaths} workers that ran it have died"]
                pipeline = self._find(name, version)
                async with self._leased(task_id, batch, lease, deaths, task):
                    return ["reply", await run_chunk(pipeline, payload)]
            except NoResultError:
                raise
            except _RefusedError as error:
                await self._say(task_id, _Beat("refused", token_hex(4), 0, 0, str(error)))
                raise NoResultError from None
            except Exception as error:
                # the client misses it, and sends it again
                _logger.warning("a worker could not begin %s", task_id, exc_info=error)
                raise NoResultError from None

    @contextlib.contextmanager
    def _noted(self, task_id: str) -> Iterator["asyncio.Task[Any]"]:
        task = self._running[task_id] = cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            yield task
        finally:
            del self._running[task_id]

    def _find(self, name: str, version: str) -> Pipeline[Any, Any]:
        known = self.registered.get(name)
        if known is None:
            names = ", ".join(map(repr, self.registered)) or "none"
            raise _RefusedError(
                f"a worker does not know the pipeline {name!r} (it knows: {names}); let the module that "
                "'taskiq worker' is given register it"
            )
        if known.version != version:
            raise _RefusedError(
                f"a worker has version {known.version!r} of the pipeline {name!r}, not {version!r}; "
                "restart the workers with the code of the client"
            )
        return known.pipeline

    async def _deaths(self, task_id: str, batch: str, lease: float) -> int:
        """Return how many workers have died of a chunk; stop if it need not run here."""
        backend = self.broker.result_backend
        if batch in self._cancelled or await backend.is_result_ready(task_id):
            raise NoResultError
        if await backend.is_result_ready(_mark_of(batch)):
            raise NoResultError
        beat = _beat_of(await backend.get_progress(task_id))
        if beat is None or not beat.is_running:
            return 0 if beat is None else beat.deaths
        if await self._lives(task_id, beat, lease):
            raise NoResultError
        return beat.deaths + 1

    async def _lives(self, task_id: str, beat: _Beat, lease: float) -> bool:
        """Tell whether the worker that has begun a chunk is still at it, or has ended it."""
        backend = self.broker.result_backend
        give_up = _now() + lease
        while _now() < give_up:
            await asyncio.sleep(lease / (2 * _BEATS))
            if (
                await backend.is_result_ready(task_id)
                or _beat_of(await backend.get_progress(task_id)) != beat
            ):
                return True
        return False

    @contextlib.asynccontextmanager
    async def _leased(
        self, task_id: str, batch: str, lease: float, deaths: int, task: "asyncio.Task[Any]"
    ) -> AsyncIterator[None]:
        """Show that a chunk runs here, for as long as it does."""
        beat = _Beat("running", f"{os.getpid()}-{token_hex(4)}", 0, deaths)
        await self._say(task_id, beat)
        beating = asyncio.create_task(self._keep_beating(task_id, batch, lease, beat, task))
        try:
            yield
        except asyncio.CancelledError:  # the worker is being stopped, or the batch was cancelled
            await self._say(task_id, beat._replace(state="released"))
            raise NoResultError from None
        except Exception as error:  # the chunk was written by another version of this library, say
            raise _RefusedError(f"a worker could not run a chunk: {error!r}") from error
        finally:
            beating.cancel()
            await asyncio.wait([beating])

    async def _keep_beating(
        self, task_id: str, batch: str, lease: float, beat: _Beat, task: "asyncio.Task[Any]"
    ) -> None:
        while True:
            await asyncio.sleep(lease / _BEATS)
            beat = beat._replace(number=beat.number + 1)
            try:
                await self._say(task_id, beat)
                if await self.broker.result_backend.is_result_ready(_mark_of(batch)):
                    task.cancel()
                    return
            except Exception as error:
                _logger.warning("a worker could not renew its lease of %s", task_id, exc_info=error)

    async def _say(self, task_id: str, beat: _Beat) -> None:
        progress: Any = TaskProgress(state=beat.state, meta=list(beat[1:]))
        await self.broker.result_backend.set_progress(task_id, progress)

    async def cancel(self, batch: str, task_ids: Iterable[str]) -> None:
        """Cancel what runs in this process: with a broker in memory, that is all."""
        if isinstance(self.broker, InMemoryBroker):
            self._cancelled.add(batch)
        running = [self._running[task_id] for task_id in task_ids if task_id in self._running]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


def _worker_of(broker: AsyncBroker) -> _Worker:
    task = broker.find_task(_TASK)
    return _Worker(broker) if task is None else cast(_Worker, cast(Any, task.original_func).worker)


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


def _now() -> float:
    return asyncio.get_running_loop().time()
