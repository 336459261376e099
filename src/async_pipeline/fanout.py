"""The engine under ``map`` and ``stream``: pulls items, bounds them, orders results, closes the source.

A fixed set of workers inside one TaskGroup runs the items; a pool was measured nearly twice as fast as a task
per item. The rules that shape the code:

- Workers never fail: whatever an item raises is recorded, so the TaskGroup only waits and cancels.
- ``_left`` replaces each worker that ends before the source does. So a worker may simply return when an
  item has soiled its task, and a stray cancellation of an idle worker needs no handling.
- An item that is pulled is in ``_handed`` or in a worker's hands, and leaves only with an outcome.
"""

import asyncio
import math
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Sized
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import Context, copy_context
from functools import partial
from inspect import isasyncgenfunction, isgeneratorfunction
from numbers import Real
from types import AsyncGeneratorType, FunctionType, GeneratorType, MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, cast
from weakref import WeakSet

from .context import copier
from .errors import BatchError, EngineError, Finish, JournalError, StageExecutionError, cancelled_in
from .events import OnHookError, check_callback, logger, report
from .outcome import Outcome
from .retry import check_count, check_seconds
from .types import Out, Step

__all__ = ["Batch", "Progress", "Stream", "check_concurrency", "check_items"]

Progress: TypeAlias = Callable[[int, int, int | None], object]
"""``(done, failed, total)``, sync: how many items have ended, failed, and will be, if that is known."""

_Job = tuple[int, Any]
_Record = tuple[int, Any, Any, Exception | None, Any, float]  # the fields of an Outcome
_END: Any = object()  # of a sync source
_LATER = object()  # instead of a job: there is none yet
_UNSET: Any = object()

# how many items may start in one turn of the event loop: handlers that never suspend must not starve it
_ITEMS_PER_TURN = 128
_HALF_TURN = 64
_BUFFER_WITH_SEMAPHORE = 64
_FATAL = (JournalError, EngineError)  # no item's own
_GROWTH = 256  # of a batch's list of results
_PROGRESS_INTERVAL = 0.1  # seconds between two calls of a progress
_HOW_TO_ITERATE = "async with pipeline.stream(items) as results: async for value in results: ..."
_closed: WeakSet[Any] = WeakSet()  # the generators that batches have iterated and closed


def _wake(waiters: deque[asyncio.Future[None]], most: int) -> None:
    while waiters and most > 0:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            most -= 1


class _Counter:
    """Counts the items that have ended, and tells a ``progress`` of it now and then, and at the end."""

    def __init__(
        self,
        progress: Progress,
        items: object,
        on_hook_error: OnHookError | None,
        die: Callable[[BaseException], None],
    ) -> None:
        self._progress = progress
        self._total = len(items) if isinstance(items, Sized) else None
        self._on_hook_error = on_hook_error
        self._die = die
        self._done = 0
        self._failed = 0
        self._next = -math.inf  # when it may be called again
        self._timer: asyncio.TimerHandle | None = None

    def add(self, *, failed: bool) -> None:
        self._done += 1
        self._failed += failed
        if self._timer is None:  # or it will be told with those to come
            loop = asyncio.get_running_loop()
            if loop.time() >= self._next:
                self._tell()
            else:
                self._timer = loop.call_at(self._next, self._tell)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tell()

    def _tell(self) -> None:
        self._timer = None
        self._next = asyncio.get_running_loop().time() + _PROGRESS_INTERVAL
        try:
            try:
                self._progress(self._done, self._failed, self._total)
            except Exception as error:
                report(self._progress, "its call", error, self._on_hook_error, "Progress")
        except BaseException as error:  # there may be nobody here who could let it through
            self._die(error)


class FanOut(ABC):
    """What ``map`` and ``stream`` share: from a source to a call of ``_settle`` for each item."""

    _is_timed = True

    def __init__(
        self,
        step: Step[Any, Any],
        items: Iterable[Any] | AsyncIterable[Any],
        concurrency: int | asyncio.Semaphore,
        context: object,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_items("items", items)
        check_concurrency(concurrency)
        if progress is not None:
            check_callback("progress", "progress(done, failed, total)", progress)
        if timeout is not None:
            check_seconds("timeout", timeout, zero=False)
        self._step = step
        run: Callable[..., Any] = step.run
        self._run = run if timeout is None else partial(run, timeout=timeout)
        # of a pipeline that is watched: with the item's index
        run_item: Callable[..., Any] | None = getattr(step, "_run_item", None)
        self._run_numbered: Callable[..., Any] | None = (
            None if run_item is None else partial(run_item, timeout=timeout)
        )
        # of a step that needs something open around the batch: a journal, or an engine
        self._scope: AbstractAsyncContextManager[object] = getattr(step, "_scope", None) or nullcontext()
        self._tell_end: Callable[[int], object] | None = getattr(step, "_source_ended", None)
        self._items = items
        self._semaphore = concurrency if isinstance(concurrency, asyncio.Semaphore) else None
        self._limit = math.inf if isinstance(concurrency, asyncio.Semaphore) else concurrency
        if self._semaphore is None and isinstance(items, (list, tuple, range, dict, set, frozenset)):
            # one worker sees the end even while all others wait for an engine, which waits for it
            self._limit = min(self._limit, max(1, len(items)) + (self._tell_end is not None))
        self._make_context = copier(context)
        self._until = sys.maxsize  # how many items may be pulled; a stream moves it on as they are taken
        self._turn = _ITEMS_PER_TURN  # how many more items may start in this turn of the loop
        self._pulled = 0
        self._settled = 0
        self._handed: deque[_Job] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()  # workers that wait for an item or for room
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked: deque[asyncio.Future[None]] = deque()  # workers that wait for the next turn
        self._workers = 0
        self._starting = 0  # how many of the workers have yet to take their first item
        self._permits: set[asyncio.Task[None] | None] = set()  # the workers that hold the semaphore
        self._pull: Callable[[], Any] | None = None  # of a sync source: the next item or _END
        self._close: Callable[[], None] | None = None
        self._pump_waiter: asyncio.Future[None] | None = None
        self._ended = False  # no further item will be pulled
        self._stopping = False  # whatever runs is cancelled
        self._error: BaseException | None = None  # of the source, or what is no Exception
        self._counter: _Counter | None = None
        if progress is not None:
            self._counter = _Counter(progress, items, getattr(step, "on_hook_error", None), self._die)

    # -- the life of the whole

    def _begin(self, group: asyncio.TaskGroup) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._group = group
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._context = copy_context()
        self._variables = tuple(self._context.items())
        if isinstance(self._items, AsyncIterable):
            self._start(self._pump_source(self._items), self._context.copy())
        else:
            self._open(self._items)
        self._spawn()

    def _open(self, items: Iterable[Any]) -> None:
        # a sync source is advanced and closed in one Context, so that a generator's variables stay its own
        context = self._context.copy()
        try:
            iterator = context.run(iter, items)
        except BaseException as error:
            return self._fail_source(error)
        self._pull = partial(context.run, next, iterator, _END)
        if isinstance(iterator, Generator):
            self._close = partial(context.run, iterator.close)
        return None

    def _stop(self) -> None:
        """Cancel whatever runs; who calls it waits for the TaskGroup."""
        if not self._stopping:
            self._stopping = True
            self._end()
            self._handed.clear()
            current = asyncio.current_task()
            for task in self._tasks:
                if task is not current:
                    task.cancel()

    def _end(self) -> None:
        self._ended = True
        if self._tell_end is not None and not self._stopping:
            self._tell_end(self._pulled)
        _wake(self._idle, len(self._idle))
        _wake(self._parked, len(self._parked))

    def _die(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._stop()

    def _end_count(self) -> None:
        # its last words, and let go of: it holds what holds it
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.end()

    def _close_source(self) -> None:
        if self._close is not None:
            if type(self._items) is GeneratorType:  # and not what makes one each time
                _closed.add(self._items)
            try:
                self._close()
            except BaseException as error:
                self._fail_source(error)

    def _fail_source(self, error: BaseException) -> None:
        """Keep the source's error for its turn, which is the end of the source."""
        if self._stopping and isinstance(error, asyncio.CancelledError):
            return  # our own
        if not isinstance(error, (Exception, asyncio.CancelledError)):
            self._die(error)
        elif self._stopping or self._error is not None:
            self._fail_closing(error)
        else:
            self._error = error
        self._end()

    def _fail_closing(self, error: BaseException) -> None:
        """An error of a source that is closed early must not hide why it is closed."""
        logger.error("The source %r failed while it was being closed", self._items, exc_info=error)

    # -- workers

    def _spawn(self) -> None:
        self._workers += 1
        self._starting += 1
        if self._loop.get_task_factory() is None:
            self._start_worker()
        else:  # an eager task would run its items inside this one's, which runs others, and so on, too deep
            self._loop.call_soon(self._start_worker)

    def _grow(self) -> None:
        # two for one that took an item: in a busy loop, where each turn is long, one by one would take long
        for _ in range(2 if self._semaphore is None else 1):
            if self._starting <= self._workers // 2 and self._workers < self._limit:
                self._spawn()

    def _start_worker(self) -> None:
        if self._ended and not self._handed:
            return self._leave()
        context = self._context.copy()
        task = self._start(self._work(context), context)
        task.add_done_callback(self._left)
        return None

    def _start(self, body: Any, context: Context) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._group.create_task(body, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _left(self, task: asyncio.Task[None]) -> None:
        self._permits.discard(task)
        self._starting = 0  # it may have been cancelled before it started
        self._leave()
        is_over = self._ended and not self._handed
        # with a semaphore one worker is without a permit: it looks for the next item and waits for one
        if not is_over and (self._semaphore is None or self._workers == len(self._permits)):
            self._spawn()

    def _leave(self) -> None:
        self._workers -= 1
        if self._workers == 0 and self._ended and not self._handed and not self._finished.done():
            self._finished.set_result(None)

    async def _work(self, context: Context) -> None:
        # one coroutine with the item's run in it: a layer more is paid for at each suspension
        task = cast("asyncio.Task[None]", asyncio.current_task())
        run, make_context, clock, semaphore = self._run, self._make_context, self._clock, self._semaphore
        run_numbered, counter = self._run_numbered, self._counter
        is_timed, variables, size = self._is_timed, self._variables, len(self._variables)
        self._starting = max(0, self._starting - 1)
        while (job := self._take()) is not None:
            if job is _LATER:
                await self._wait()
                continue
            if semaphore is not None:
                if not await self._acquire(semaphore, job):
                    return
                self._permits.add(task)
            if self._workers < self._limit and not self._ended:
                self._grow()
            own = None
            started = clock() if is_timed else 0.0
            try:
                own = make_context()
                if run_numbered is None:
                    value = await run(job[1], context=own)
                else:
                    value = await run_numbered(job[1], own, job[0])
            except BaseException as error:
                if self._stopping and isinstance(error, asyncio.CancelledError):
                    return  # our own; raised, it would hold this frame, that the task, and that the error
                self._fail(job, own, started, error)
            else:
                self._settle(job, own, started, value)
                if counter is not None:
                    counter.add(failed=False)
            finally:
                if semaphore is not None:
                    self._release(semaphore)
            is_clean = len(context) == size and not (variables and self._is_soiled())
            if semaphore is not None or task.cancelling() or not is_clean:
                return

    async def _acquire(self, semaphore: asyncio.Semaphore, job: _Job) -> bool:
        try:
            return await semaphore.acquire()
        except asyncio.CancelledError:
            if not self._stopping:
                self._handed.appendleft(job)
            raise
        except RuntimeError as error:  # it belongs to another event loop
            self._die(error)
            return False

    def _release(self, semaphore: asyncio.Semaphore) -> None:
        try:
            semaphore.release()
        except ValueError as error:  # a BoundedSemaphore that a handler released as well
            self._die(error)

    def _is_soiled(self) -> bool:
        """Tell whether the item changed a context variable, in which case its worker is replaced.

        Measured: 0.25 µs an item with five suspensions; stepping it inside a Context of its own costs 1 µs.
        """
        for variable, value in self._variables:  # noqa: SIM110 - any() takes twice as long
            if variable.get(_UNSET) is not value:
                return True
        return False

    # -- items

    def _take(self) -> _Job | None:
        """The next job, None at the end, or _LATER when it has to be waited for."""
        if self._turn <= 0:
            return cast(_Job, _LATER)
        if self._handed:
            job = self._handed.popleft()
        elif self._ended:
            return None
        elif self._pulled >= self._until or self._pull is None:
            return cast(_Job, _LATER)
        else:
            try:
                item = self._pull()
            except (
                StopAsyncIteration
            ) as error:  # raised by the iteration of a stream, it would end it in silence
                self._fail_source(_runtime_error("the source raised StopAsyncIteration", error))
                return None
            except BaseException as error:
                self._fail_source(error)
                return None
            if item is _END:
                self._end()
                return None
            job = self._pulled, item  # as _number does, without the call
            self._pulled += 1
        self._turn -= 1
        # at half time, so that items which do suspend never have to wait for the next turn
        if self._turn == _HALF_TURN:
            self._loop.call_soon(self._begin_turn)
        return job

    def _number(self, item: object) -> _Job:
        job = self._pulled, item
        self._pulled += 1
        return job

    async def _wait(self) -> None:
        queue = self._parked if self._turn <= 0 else self._idle
        waiter = self._loop.create_future()
        queue.append(waiter)
        self._wake_pump()
        try:
            await waiter
        finally:
            if waiter.cancelled() and waiter in queue:
                queue.remove(waiter)

    def _begin_turn(self) -> None:
        self._turn = _ITEMS_PER_TURN
        _wake(self._parked, _ITEMS_PER_TURN)

    def _fail(self, job: _Job, context: Any, started: float, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            # nobody asked for it: the handler awaited something that was cancelled, or cancelled itself
            stage_name, attempts = cancelled_in(error) or (self._step.name, 1)
            failure: Exception = StageExecutionError(stage_name, error, attempts=attempts)
            failure.__cause__ = error
        elif isinstance(error, StopAsyncIteration):
            # a middleware's: raised by the iteration of a stream as it is, it would end it in silence
            failure = StageExecutionError(self._step.name, error)
            failure.__cause__ = error
        elif isinstance(error, Exception) and not isinstance(error, _FATAL):
            failure = error
        else:
            return self._die(error)
        if isinstance(failure, StageExecutionError) and not failure.is_of_item(*job):
            failure = failure.of_item(*job)
        self._settle(job, context, started, None, failure)
        if self._counter is not None:
            self._counter.add(failed=True)
        return None

    @abstractmethod
    def _settle(
        self, job: _Job, context: Any, started: float, value: Any, error: Exception | None = None
    ) -> None:
        """Keep what became of an item."""

    # -- an async source: one task iterates and closes it

    async def _pump_source(self, items: AsyncIterable[Any]) -> None:
        iterator = None
        try:
            iterator = aiter(items)
            while True:
                await self._until_wanted()
                item = await anext(iterator)
                if self._stopping:  # the source answered its cancellation with one more item
                    break
                self._handed.append(self._number(item))
                _wake(self._idle, 1)
        except StopAsyncIteration:
            pass
        except BaseException as error:
            self._fail_source(error)
        finally:
            await self._aclose(iterator)
            self._end()

    async def _until_wanted(self) -> None:
        """Wait until a worker is idle and there is room for one more item."""
        while not (self._idle and self._pulled < self._until):
            self._pump_waiter = self._loop.create_future()
            await self._pump_waiter

    def _wake_pump(self) -> None:
        if self._pump_waiter is not None and not self._pump_waiter.done():
            self._pump_waiter.set_result(None)

    async def _aclose(self, iterator: AsyncIterator[Any] | None) -> None:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None:
            if type(iterator) is AsyncGeneratorType:
                _closed.add(iterator)
            try:
                await aclose()
            except BaseException as error:
                self._fail_source(error)


class Batch(FanOut):
    """One ``map``: all results in a list."""

    _is_timed = False

    def __init__(self, *args: Any, return_exceptions: bool) -> None:
        super().__init__(*args)
        self._return_exceptions = return_exceptions
        self._results: list[Any] = []
        self._failures: dict[int, Exception] = {}

    async def run(self) -> list[Any]:
        async with self._scope:
            return await self._run_all()

    async def _run_all(self) -> list[Any]:
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    self._begin(group)
                    await self._finished
                except BaseException:
                    self._stop()
                    raise
        except asyncio.CancelledError:
            self._raise_fatal()
            self._failures = {}  # their tracebacks hold self
            raise
        finally:
            self._close_source()
            self._end_count()
        # taken out of self, which the tracebacks of the errors hold: a cycle would keep them all alive
        error, results, failures = self._error, self._results, self._failures
        self._error, self._results, self._failures = None, [], {}
        try:
            self._raise(error, failures, results)
        finally:
            del error, failures
        del results[self._pulled :]
        return results

    def _raise(self, error: BaseException | None, failures: dict[int, Exception], results: list[Any]) -> None:
        """Raise what the batch ended with, if it did not end well."""
        try:
            if error is not None:
                raise error
            if failures:
                finished = {index: value for index, value in enumerate(results) if value is not _UNSET}
                raise BatchError(failures, finished)
        finally:
            del error, failures  # the traceback holds this frame

    def _raise_fatal(self) -> None:
        """Raise what goes even before a cancellation, if it has come from an item meanwhile."""
        if self._error is not None and not isinstance(
            self._error, (Exception, asyncio.CancelledError, Finish)
        ):
            self._raise(self._error, {}, [])

    def _fail_source(self, error: BaseException) -> None:
        super()._fail_source(error)
        self._stop()

    def _settle(
        self, job: _Job, context: Any, started: float, value: Any, error: Exception | None = None
    ) -> None:
        index = job[0]
        if error is not None:
            if not self._return_exceptions:
                self._failures[index] = error
                return self._stop()
            value = error
        try:
            self._results[index] = value
        except IndexError:
            self._results.extend([_UNSET] * (index - len(self._results) + _GROWTH))
            self._results[index] = value
        return None


class Stream(FanOut, Generic[Out]):
    """What :meth:`Pipeline.stream <async_pipeline.Pipeline.stream>` returns: the results, as they come.

    >>> async with pipeline.stream(items) as results:
    ...     async for value in results: ...

    One task at a time may iterate. Iterating raises a failed item's error and ends there;
    :meth:`outcomes` yields an :class:`~async_pipeline.Outcome` for each item instead.
    """

    def __init__(
        self,
        step: Step[Any, Any],
        items: Iterable[Any] | AsyncIterable[Any],
        concurrency: int | asyncio.Semaphore,
        context: object,
        timeout: float | None = None,
        progress: Progress | None = None,
        *,
        ordered: bool,
        buffer: int | None,
    ) -> None:
        super().__init__(step, items, concurrency, context, timeout, progress)
        if buffer is None:
            has_permits = isinstance(concurrency, asyncio.Semaphore)
            buffer = _BUFFER_WITH_SEMAPHORE if has_permits else 2 * cast(int, concurrency)
        check_count("buffer", buffer, least=1, message="buffer must be at least 1")
        self._until = int(buffer)
        self._limit = min(self._limit, buffer)
        self._ordered = ordered
        self._ready: dict[int, _Record] = {}
        self._head = 0  # the key of the record that is due
        self._waiter: asyncio.Future[None] | None = None
        self._state = "not entered"
        self._closing_error: BaseException | None = None

    async def __aenter__(self) -> "Stream[Out]":
        if self._state != "not entered":
            raise RuntimeError("a stream is entered once; call pipeline.stream(...) again")
        await self._scope.__aenter__()
        group = asyncio.TaskGroup()
        await group.__aenter__()
        self._state = "open"
        self._begin(group)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = "closed"
        self._finish()
        # without the body's error, which the TaskGroup would wrap; it leaves as it is
        try:
            await self._group.__aexit__(None, None, None)
        finally:
            self._close_source()
            if self._closing_error is not None and error is not None:
                super()._fail_closing(self._closing_error)
            await self._scope.__aexit__(None, None, None)
        if isinstance(self._error, (Exception, asyncio.CancelledError)):
            self._error = None  # its turn has not come
        self._end_count()
        if error is None and self._error is None:
            self._error = self._closing_error
        # a KeyboardInterrupt goes before the body's error
        if error is None or isinstance(error, (Exception, asyncio.CancelledError)):
            self._raise_source_error()

    def _raise_source_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame

    def _fail_closing(self, error: BaseException) -> None:
        self._closing_error = error

    def _finish(self) -> None:
        """Yield nothing more, and cancel whatever runs."""
        self._stop()
        self._ready.clear()
        self._head = -1

    def _die(self, error: BaseException) -> None:
        super()._die(error)
        self._finish()

    def __aiter__(self) -> AsyncIterator[Out]:
        self._check_open()
        return self

    def _check_open(self) -> None:
        if self._state != "open":
            raise RuntimeError(f"the stream is {self._state}; iterate inside its block: {_HOW_TO_ITERATE}")

    if not TYPE_CHECKING:  # which has its own answers

        def __enter__(self) -> None:
            raise TypeError(f"a stream is entered with async with: {_HOW_TO_ITERATE}")

        def __exit__(self, *error: object) -> None: ...

    async def __anext__(self) -> Out:
        _, _, value, error, _, _ = self._pop() or await self._wait_for_record()
        if error is not None:
            self._finish()
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        result: Out = value
        return result

    def outcomes(self) -> "OutcomeIterator[Out]":
        """Iterate over an :class:`~async_pipeline.Outcome` for each item; a failed one does not end it."""
        return OutcomeIterator(self)

    def drain(self) -> "list[Outcome[Out]]":
        """Return what has finished but was not taken yet, in order, with gaps where items still run."""
        ready, self._ready = self._ready, {}
        return [Outcome(*ready[key]) for key in sorted(ready)]

    @property
    def in_flight(self) -> int:
        """How many items were pulled and have not ended yet; 0 once the stream is left."""
        return 0 if self._state == "closed" else self._pulled - self._settled

    def _pop(self) -> _Record | None:
        record = self._ready.pop(self._head, None)
        if record is not None:
            self._head += 1
            self._until += 1
            if self._idle:
                self._use_room()
        return record

    def _use_room(self) -> None:
        if self._pull is None:
            self._wake_pump()
        else:
            _wake(self._idle, 1)

    async def _wait_for_record(self) -> _Record:
        self._check_open()
        if self._waiter is not None:
            raise RuntimeError("another task is already waiting for this stream's next result")
        while (record := self._pop()) is None:
            if self._is_over():
                self._raise_source_error()
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return record

    def _is_over(self) -> bool:
        return self._stopping or (self._ended and self._head == self._pulled)

    def _settle(
        self, job: _Job, context: Any, started: float, value: Any, error: Exception | None = None
    ) -> None:
        index, item = job
        key = index if self._ordered else self._settled
        self._settled += 1
        self._ready[key] = index, item, value, error, context, self._clock() - started
        if key == self._head and self._waiter is not None:
            self._wake_consumer()

    def _end(self) -> None:
        super()._end()
        self._wake_consumer()

    def _wake_consumer(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __repr__(self) -> str:
        counts = f"{self._pulled} pulled, {self.in_flight} in flight, {len(self._ready)} ready"
        return f"<Stream {self._state}: {counts}>"


class OutcomeIterator(Generic[Out]):
    """What :meth:`Stream.outcomes` returns: an async iterator of :class:`~async_pipeline.Outcome`."""

    def __init__(self, stream: Stream[Out]) -> None:
        self._stream = stream

    def __aiter__(self) -> "OutcomeIterator[Out]":
        self._stream._check_open()
        return self

    async def __anext__(self) -> Outcome[Out]:
        stream = self._stream
        record = stream._pop() or await stream._wait_for_record()
        return Outcome(*record)

    def __repr__(self) -> str:
        return f"<outcomes of {self._stream!r}>"


def _runtime_error(text: str, cause: BaseException) -> RuntimeError:
    error = RuntimeError(text)
    error.__cause__ = cause
    return error


def check_items(what: str, items: object) -> None:
    """Raise for anything that can't be iterated; ``what`` begins the message."""
    if type(items) in (GeneratorType, AsyncGeneratorType) and items in _closed and _has_ended(items):
        raise ValueError(
            f"{what} must not be a generator that was in a map, stream or each before, and has nothing left; "
            "call its function again, or make a list of it first"
        )
    if asyncio.isfuture(items):
        raise TypeError(f"{what} must be an iterable, not {items!r}: await it first")
    # iter() takes a class with __getitem__ alone, too, though Iterable does not know it
    if isinstance(items, (AsyncIterable, Iterable)) or hasattr(type(items), "__getitem__"):
        return
    if asyncio.iscoroutine(items):
        items.close()  # or Python would also warn that it was never awaited
        raise TypeError(f"{what} must be an iterable, not {items!r}: await it first")
    kind = type(items).__name__
    if isinstance(items, (FunctionType, MethodType)) and (
        isgeneratorfunction(items) or isasyncgenfunction(items)
    ):
        kind = f"a function that makes one: write {items.__name__}()"
    raise TypeError(f"{what} must be an iterable or an async iterable, not {kind}")


def _has_ended(generator: Any) -> bool:
    # one that ignores the GeneratorExit of its close() goes on
    return getattr(generator, "gi_frame", getattr(generator, "ag_frame", None)) is None


def check_concurrency(concurrency: object) -> None:
    """Raise for anything that is neither a number of workers nor a semaphore."""
    if not isinstance(concurrency, (asyncio.Semaphore, Real)):
        raise TypeError(f"concurrency must be an int or an asyncio.Semaphore, not {concurrency!r}")
    if not isinstance(concurrency, asyncio.Semaphore):
        check_count("concurrency", concurrency, least=1, message="concurrency must be at least 1")
