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
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from ..engine import Chunk, Completion
from ..errors import EngineError, WorkerLost
from ..events import logger
from ..pipeline import Pipeline
from ..retry import check_count, check_seconds

try:
    from taskiq import AsyncBroker, AsyncResultBackend, InMemoryBroker, TaskiqResult
    from taskiq.result_backends.dummy import DummyResultBackend
except ImportError as _missing:
    raise ImportError(
        "taskiq support requires installing async-pipeline[taskiq]: pip install 'async-pipeline[taskiq]'"
    ) from _missing

from ._taskiq_worker import BEATS, PAUSE, Beat, Registered, apart, beat_of, loop_time, mark_of, worker_of

__all__ = ["TaskiqEngine"]

_PATIENCE = 2.5  # leases without a beat, until the client sends a chunk again
_SHORTEST, _LONGEST = 0.01, 0.25  # seconds between two looks for results
_SWEEP = 0.1  # seconds between two looks for all of them; chunks end about in the order they were sent
_CLOSING = 5.0  # seconds to tell the workers that a batch is cancelled, or to leave a broker

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
        _check_broker(broker, allow_lossy)
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
        self._worker = worker_of(broker)
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
        self._worker.registered[name] = Registered(pipeline, name, version)
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
            logger.warning("%r could not leave its broker", self, exc_info=error)

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
        sent.since = batch.sign = loop_time()
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
            await apart(self.broker.result_backend.set_result(mark_of(batch), mark), _CLOSING)
        finally:
            await self._worker.cancel(batch)

    # -- the client's half

    def _batch(self, batch: str) -> "_Batch":
        return self._batches.setdefault(batch, _Batch(loop_time()))

    def _registered(self, pipeline: Pipeline[Any, Any]) -> Registered:
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
        give_up = loop_time() + self._outage_timeout
        while True:
            try:
                return await apart(call(), give_up - loop_time())
            except Exception as error:
                cause = error if isinstance(error, TimeoutError) else error.__cause__ or error
                if loop_time() + PAUSE >= give_up or _is_mistake(cause):
                    hint = "; write 'async with engine:' around it" if _is_mistake(cause) else ""
                    raise EngineError(f"{whom} can't be reached: {_text(cause)}{hint}") from error
            await asyncio.sleep(PAUSE)

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
                state.sign = loop_time()
        return completions, len(completions) == len(asked)

    async def _supervise(self, state: "_Batch") -> None:
        """See now and then who lives, and send again what nobody seems to be at."""
        now = loop_time()
        if now < state.next_look or not state.waiting:
            return
        state.next_look = now + self._lease / BEATS
        waiting = list(state.waiting.values())
        beats = await self._ask(lambda backend: _all(sent.record(backend) for sent in waiting))
        for sent, beat in zip(waiting, beats, strict=True):
            await self._look_after(sent, beat, state, now)
        self._check_signs(state, now)

    async def _look_after(self, sent: "_Sent", beat: Beat | None, state: "_Batch", now: float) -> None:
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

    def _check_signs(self, state: "_Batch", now: float) -> None:
        if now - state.sign > self._lease and not state.is_warned:
            state.is_warned = True
            logger.warning(
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


@dataclass(slots=True)
class _Sent:
    """A chunk that is in flight."""

    chunk: Chunk
    registered: Registered
    is_earlier: bool = False
    beat: Beat | None = None
    since: float = 0.0  # when it was sent, or when its beat has changed
    copies: int = 0  # sent since then

    @property
    def task_id(self) -> str:
        return f"{self.registered.name}@{self.registered.version}:{self.chunk.id}"

    async def look_back(self, backend: AsyncResultBackend[Any]) -> tuple[bool, Beat | None]:
        """Return whether it has ended already, and else who was at it."""
        if await backend.is_result_ready(self.task_id):
            return True, None
        return False, await self.record(backend)

    async def record(self, backend: AsyncResultBackend[Any]) -> Beat | None:
        return beat_of(await backend.get_progress(self.task_id))

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
        if loop_time() < self.next_sweep:
            return waiting[: max(4, len(waiting) // 4)]
        self.next_sweep = loop_time() + _SWEEP
        return waiting


def _check_broker(broker: object, allow_lossy: bool) -> None:
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
