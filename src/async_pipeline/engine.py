"""Batches over the workers of an engine: items travel in chunks, as JSON text, and so do the answers.

>>> results = await pipeline.map(items, engine=engine)      # where the items run is all that changes

The client's half cuts the items into chunks, hands them to the engine, and takes the answers apart; the
workers' half is :func:`run_chunk`. What lies between them is an :class:`Engine`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, MutableMapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any, NamedTuple, Protocol, cast

from ._engine_worker import WorkerStep
from .context import item_key
from .errors import EngineError, PipelineError, StageExecutionError, WorkerLost
from .events import CountedStart, EndEvent, Event, FailedAttempt, Watch, fire, logger
from .fanout import Batch, check_concurrency
from .records import digest_of, load_error, read_json, stage_names, write_canonical, write_json
from .retry import check_count
from .waiting import until_ended

__all__ = ["Chunk", "Completion", "Engine", "EngineStep", "run_chunk"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Items that travel together.

    Attributes:
        batch: the call of ``map`` or ``stream`` that it belongs to; another one for each call.
        id: what it is called, ASCII; the same when another call has the same ``run_id``, names of pipeline
            and stages, context and items.
        pipeline: the pipeline, as the client has it.
        payload: JSON text for :func:`run_chunk`.
        size: how many items it has.
    """

    batch: str
    id: str
    pipeline: Any
    payload: str
    size: int


class Completion(NamedTuple):
    """What became of a chunk.

    Attributes:
        chunk_id: its id.
        reply: what :func:`run_chunk` has returned, or else ``None``.
        error: why there is no reply: :class:`WorkerLost` when workers have died of it (its items are then
            run one by one), or an :class:`EngineError`, which ends the batch.
        is_earlier: True when it had ended before it was submitted, for a client that has died since; its
            failed items are then run again.
    """

    chunk_id: str
    reply: str | None = None
    error: WorkerLost | EngineError | None = None
    is_earlier: bool = False


class Engine(Protocol):
    """What spreads chunks over workers; implement it for a third one.

    One engine may serve several batches at the same time, and has no state of its own but theirs.

    Attributes:
        chunk_size: how many items a chunk has; the last one may have fewer.
        window: how many chunks are in flight at most.
        run_id: by which a later call finds what this one has left; ``None`` for a new one each time. That
            of a journal goes before.
    """

    @property
    def chunk_size(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def run_id(self) -> str | None: ...

    async def submit(self, chunk: Chunk) -> None:
        """Hand a chunk to the workers, and return as soon as it can't get lost.

        Raises:
            EngineError: it can't be handed over, now or within a bounded time.
        """

    def completed(self, batch: str) -> AsyncIterator[Completion]:
        """Yield what became of each submitted chunk of a batch, in any order, until it is closed.

        Raises:
            EngineError: no answer can be expected any more.
        """
        ...

    async def aclose(self, batch: str) -> None:
        """Forget a batch, and cancel what is left of it as far as that can be done."""


class _Entry(NamedTuple):
    """An item on its way."""

    number: int
    key: str
    text: str
    answer: "asyncio.Future[_Answer]"


class _Answer(NamedTuple):
    """What a worker says of an item."""

    value: Any
    error: BaseException | None
    context: Mapping[str, Any] | None
    seen: "list[Any]"  # what hooks and observers are to be told
    shift: float  # from the worker's clock to this one's


@dataclass(slots=True)
class _Bucket:
    """A chunk that is being filled."""

    entries: list[_Entry] = field(default_factory=list)
    count: int = 0  # with the items that need not run


class EngineStep:
    """A pipeline as it looks when an engine runs it: one step for the items of one batch.

    Args:
        pipeline: the pipeline.
        engine: who runs it.
        concurrency: how many items of a chunk run at a time.
        context: for each item; a dict of JSON values, or ``None``.
        timeout: seconds for each item.

    Raises:
        TypeError: an argument can't be used with an engine.
    """

    def __init__(
        self,
        pipeline: Any,
        engine: Engine,
        concurrency: int | asyncio.Semaphore,
        context: object,
        timeout: float | None,
    ) -> None:
        _check_arguments(engine, concurrency, context)
        self.name: str = pipeline.name
        self.in_flight: int = engine.chunk_size * engine.window
        self._pipeline = pipeline
        self._engine = engine
        self._run_id = engine.run_id or token_hex(8)
        self._is_keyed = False  # by a journal; else a key may be that of a batch around this one
        self._shared = write_canonical(
            {
                "context": context,
                "hooks": pipeline._is_hooked,
                "observers": bool(pipeline.observers),
                "timeout": timeout,
                "concurrency": concurrency,
            },
            "with an engine, the context",
        )
        self._about = write_canonical([pipeline.name, stage_names(pipeline), context], "the context")
        self._total: int | None = None  # how many items there are, once that is known
        self._buckets: dict[int, _Bucket] = {}
        self._waiting: dict[str, asyncio.Future[Completion]] = {}
        self._carriers: set[asyncio.Task[None]] = set()
        self._fatal: EngineError | None = None
        self._is_over = False

    def _name_run(self, run_id: str) -> None:
        """Take the ``run_id``, and the keys of the items, from a journal around this."""
        self._run_id = run_id
        self._is_keyed = True

    # -- the life of a batch

    @property
    def _scope(self) -> Any:
        return self._opened()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        self._batch = token_hex(8)
        self._window = asyncio.Semaphore(self._engine.window)
        self._trial = asyncio.Lock()
        listener = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            self._is_over = True
            tasks = {listener, *self._carriers}
            for task in tasks:
                task.cancel()
            await until_ended(*tasks, asyncio.create_task(self._close()))

    async def _close(self) -> None:
        try:
            await self._engine.aclose(self._batch)
        except Exception as error:  # it must not hide how the batch has ended
            logger.error("%r could not forget a batch", self._engine, exc_info=error)

    async def _listen(self) -> None:
        """Hand each completion to who waits for it."""
        try:
            completions: Any = self._engine.completed(self._batch)
            async with aclosing(completions):
                async for completion in completions:
                    waiter = self._waiting.get(completion.chunk_id)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(completion)
            raise EngineError(f"{self._engine!r} yields nothing more, but the batch has not ended")
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Let the whole batch fail: one item is enough for that."""
        if self._is_over and isinstance(error, asyncio.CancelledError):
            raise error  # our own; any other one would leave the batch waiting
        self._fatal = _engine_error(error)
        for bucket in self._buckets.values():
            _refuse(bucket.entries, self._fatal)
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(self._fatal)
                waiter.exception()  # nobody may be left who asks for it

    # -- one item

    async def run(self, value: Any, /, *, context: Any = None) -> Any:
        """Refuse: an engine runs the items of a batch, each with its index."""
        raise PipelineError("an engine runs the items of a batch; write pipeline.map(items, engine=engine)")

    async def _run_item(self, value: Any, context: Any, index: int, timeout: float | None) -> Any:
        try:
            text = write_json(value, f"item {index}, which is to travel to a worker,")
        except TypeError:
            self.skip(index)
            raise
        if self._fatal is not None:
            raise self._fatal
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        key = (item_key() if self._is_keyed else None) or f"{self._run_id}/{index}"
        self._add(index, _Entry(index, key, text, answer))
        return await self._told(await answer, value, context, index)

    async def _told(self, answer: _Answer, value: Any, context: Any, index: int) -> Any:
        """Do here what the worker could not do there, and return or raise what came of the item."""
        if answer.context is not None and isinstance(context, MutableMapping):
            context.clear()
            context.update(answer.context)
        if answer.seen:
            await self._tell(answer, value, context, index)
        if answer.error is not None:
            raise answer.error
        return answer.value

    def skip(self, index: int) -> None:
        """Note that an item need not run, because its result is known."""
        self._add(index, None)

    def _source_ended(self, total: int) -> None:
        """Note how many items there are in all, so that the last chunk need not wait for more."""
        self._total = total
        for number in list(self._buckets):
            self._send_if_full(number)

    def _add(self, index: int, entry: _Entry | None) -> None:
        number = index // self._engine.chunk_size
        bucket = self._buckets.setdefault(number, _Bucket())
        bucket.count += 1
        if entry is not None:
            bucket.entries.append(entry)
        self._send_if_full(number)

    def _send_if_full(self, number: int) -> None:
        size = self._engine.chunk_size
        expected = size if self._total is None else min(size, self._total - number * size)
        if self._buckets[number].count >= expected:
            entries = self._buckets.pop(number).entries
            if entries:
                self._start(self._carry(sorted(entries)))

    def _start(self, carrying: Any) -> None:
        carrier = asyncio.create_task(carrying)
        self._carriers.add(carrier)
        carrier.add_done_callback(self._carriers.discard)

    # -- one chunk

    async def _carry(self, entries: list[_Entry], attempt: int = 0) -> None:
        """See a chunk through, until each of its items has its answer."""
        try:
            async with self._window:
                completion = await self._once(entries, attempt)
            await self._take(entries, completion, attempt)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
            _refuse(entries, cast(EngineError, self._fatal))

    async def _take(self, entries: list[_Entry], completion: Completion, attempt: int) -> None:
        if isinstance(completion.error, WorkerLost):
            if len(entries) == 1:
                await self._try_alone(entries[0], attempt)
            else:
                for entry in entries:  # one of them does it
                    self._start(self._carry([entry]))
        elif completion.error is not None:
            if not completion.is_earlier:
                raise completion.error
            await self._carry(entries, attempt + 1)
        else:
            failed = self._deliver(entries, completion)
            if failed:
                await self._carry(failed, attempt + 1)

    async def _try_alone(self, entry: _Entry, attempt: int) -> None:
        """Run an item whose worker has died while no other runs, so that it alone can be the cause."""
        async with self._trial:
            for _ in range(self._engine.window):
                await self._window.acquire()
            try:
                completion = await self._once([entry], attempt, "alone")
                while (
                    completion.is_earlier and completion.error is not None
                ):  # what an earlier client has seen
                    attempt += 1
                    completion = await self._once([entry], attempt, "alone")
            finally:
                for _ in range(self._engine.window):
                    self._window.release()
        if isinstance(completion.error, WorkerLost):
            error = StageExecutionError(self.name, completion.error)
            error.__cause__ = completion.error
            _answer(entry, _Answer(None, error, None, [], 0.0))
        else:
            await self._take([entry], completion, attempt)

    async def _once(self, entries: list[_Entry], attempt: int, how: str = "") -> Completion:
        if self._fatal is not None:
            raise self._fatal
        chunk = self._chunk(entries, attempt, how)
        waiter: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[chunk.id] = waiter
        try:
            await self._engine.submit(chunk)
            return await waiter
        finally:
            del self._waiting[chunk.id]

    def _chunk(self, entries: list[_Entry], attempt: int, how: str) -> Chunk:
        items = ",".join([entry.text for entry in entries])
        keys = write_json([entry.key for entry in entries], "the keys")
        digest = digest_of(f"{self._about}{keys}[{items}]").hex()
        suffix = "".join(f".{part}" for part in (how, attempt) if part)
        name = f"{_ascii(self._run_id)}.{entries[0].number}.{digest}{suffix}"
        payload = f'{{"shared":{self._shared},"keys":{keys},"items":[{items}]}}'
        return Chunk(self._batch, name, self._pipeline, payload, len(entries))

    def _deliver(self, entries: list[_Entry], completion: Completion) -> list[_Entry]:
        """Give each item its answer, and return those that are to run again."""
        try:
            reply = read_json(completion.reply or "")
            if len(reply["values"]) != len(entries):
                raise ValueError(f"it has {len(reply['values'])} results of {len(entries)}")
            answers = [_parsed(reply, position) for position in range(len(entries))]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise EngineError(f"{self._engine!r} gave an answer that can't be read: {error!r}") from error
        again = []
        for entry, answer in zip(entries, answers, strict=True):
            if answer.error is not None and completion.is_earlier:
                again.append(entry)
            else:
                _answer(entry, answer)
        return again

    # -- hooks and observers

    async def _tell(self, answer: _Answer, value: Any, context: Any, index: int) -> None:
        """Call the hooks and the observers of the pipeline as if the item had run here."""
        pipeline = self._pipeline
        observers = pipeline.observers, pipeline.observers[::-1]
        for kind, *about in answer.seen:
            if kind == "event":
                event = _load_event(about[0], pipeline.name, index, value, answer.shift)
                Watch(*observers, pipeline.name, event.run_id, 0, pipeline.on_hook_error).tell(event)
                continue
            hook = pipeline._before if kind == "before" else pipeline._after
            if kind == "after":
                about[-1] = None if about[-1] is None else load_error(about[-1])
            await fire(hook, context, *about, on_hook_error=pipeline.on_hook_error)

    def __repr__(self) -> str:
        return f"<EngineStep {self.name!r} on {self._engine!r}>"


def _check_arguments(engine: Engine, concurrency: int | asyncio.Semaphore, context: object) -> None:
    for method in ("submit", "completed", "aclose"):
        if isinstance(engine, type) or not callable(getattr(engine, method, None)):
            raise TypeError(
                f"engine must be an Engine with submit, completed and aclose, not {engine!r}; "
                "write engine=TaskiqEngine(broker), or engine=DaskEngine(client)"
            )
    check_concurrency(concurrency)
    if isinstance(concurrency, asyncio.Semaphore):
        raise TypeError(
            "concurrency must be a number with an engine; other processes can't share a Semaphore"
        )
    check_count("chunk_size", engine.chunk_size, least=1, message="chunk_size must be at least 1")
    check_count("window", engine.window, least=1, message="window must be at least 1")
    is_fit = context is None or (type(context) is dict and all(type(key) is str for key in context))
    if not is_fit:
        raise TypeError(f"context must be a dict of JSON values with an engine, not {context!r}")


def _ascii(text: str) -> str:
    return "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "_" for char in text)


def _engine_error(error: BaseException) -> EngineError:
    if isinstance(error, EngineError):
        return error
    failure = EngineError(f"the engine has failed: {error!r}")
    failure.__cause__ = error
    return failure


def _answer(entry: _Entry, answer: _Answer) -> None:
    if not entry.answer.done():  # the batch has ended meanwhile
        entry.answer.set_result(answer)


def _refuse(entries: Iterable[_Entry], error: EngineError) -> None:
    for entry in entries:
        if not entry.answer.done():
            entry.answer.set_exception(error)
            entry.answer.exception()


def _parsed(reply: Mapping[str, Any], position: int) -> _Answer:
    place = str(position)
    failure = reply.get("errors", {}).get(place)
    return _Answer(
        None if failure is not None else reply["values"][position],
        None if failure is None else load_error(failure),
        reply.get("contexts", {}).get(place),
        reply.get("seen", {}).get(place, []),
        asyncio.get_running_loop().time() - reply["time"],
    )


# -- in the worker


async def run_chunk(pipeline: Any, payload: str) -> str:
    """Run the items of a chunk through a pipeline, in a worker, and return what became of them.

    The middlewares of the pipeline run here, and so do hooks and observers of the pipelines inside it; its
    own hooks and observers run at the client. Handlers find :func:`~async_pipeline.item_key` set.

    Args:
        pipeline: the pipeline, as the worker has it.
        payload: that of a :class:`Chunk`.

    Returns:
        JSON text for the client, which is the reply of a :class:`Completion`.

    Raises:
        ValueError: the payload is none.
    """
    try:
        data = read_json(payload)
        shared, keys, items = data["shared"], data["keys"], data["items"]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"the payload is not that of a chunk: {error!r}") from error
    step = WorkerStep(pipeline, shared, keys)
    context, timeout = shared["context"], shared["timeout"]
    batch = Batch(step, items, shared["concurrency"], context, timeout, None, return_exceptions=True)
    return step.reply(await batch.run())


def _load_event(data: Mapping[str, Any], pipeline: str, index: int, item: Any, shift: float) -> Event:
    """Return the event that a worker has seen, on the clock of this event loop."""
    error = load_error(data["error"]) if "error" in data else None
    if isinstance(error, StageExecutionError):
        error = error.of_item(index, item)
    kind, time = data["kind"], data["time"] + shift
    common = time, data["run_id"], pipeline, data.get("stage"), index, tuple(data["element"])
    if kind == "attempt_failed":
        delay = data.get("delay")
        return FailedAttempt(*common, attempt=data["attempt"], error=cast(Exception, error), delay=delay)
    if "outcome" in data:
        return EndEvent(kind, *common, data["outcome"], data["attempts"], data["duration"], error)
    make: Any = partial(CountedStart, data["elements"]) if "elements" in data else Event
    return cast(Event, make(kind, *common))
