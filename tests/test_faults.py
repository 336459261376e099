"""Pipelines under random faults: what holds for every item, whatever goes wrong, and whenever.

A schedule is a random pipeline, one or two calls of it, and what each handler, hook, middleware and source
does at each of its awaits: it sleeps, fails, is cancelled and answers that in its own way. All times are on a
coarse grid, so that much happens at the same moment. What happens is logged, and the log is checked.

A schedule depends on its seed alone. To run one again, with its log:

    PYTHONPATH=src:. python -c 'from tests.test_faults import check_seed; check_seed(1234)'
"""

import asyncio
import gc
import inspect
import itertools
import logging
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    DeadlineExceeded,
    Finish,
    Outcome,
    Pipeline,
    RetryBudget,
    Stage,
    StageExecutionError,
    StageTimeoutError,
)
from async_pipeline.testing import VirtualClockLoop

SECONDS = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 2.0]
TIMEOUTS = [0.5, 1.0, 1.5, 2.0]
ENDINGS = ["error", "error", "group", "timeout", "stray", "cancels itself", "finish"]
REACTIONS = ["error", "timeout", "value", "go on", "finish", "clean up", "clean up, then fail"]
KINDS = ["async", "async", "sync", "lazy"]
CALLS = ["run", "run", "try_run", "map", "map", "return_exceptions", "stream", "outcomes"]
BEGINNINGS = ["start", "before", "middleware", "gate", "attempt", "on_error"]
# here a TaskGroup leaves a request to end behind (CPython gh-116720), as if its group had swallowed one
LEAVES_REQUESTS = sys.version_info < (3, 13)
# in early releases of 3.11 an asyncio.timeout is none in a task that has been asked to end before
TIMES_OUT_ALWAYS = "self._cancelling" in inspect.getsource(asyncio.Timeout)
TOLERANCE = 1e-9  # not all schedules are on the grid; timers so close are due together


class HandlerError(Exception):
    """A handler's own."""


class HookError(Exception):
    """A hook's own: it is logged and nothing else."""


class MiddlewareError(Exception):
    """A middleware's own, which leaves the pipeline as it is."""


class SourceError(Exception):
    """A source's own."""


class Left(Exception):  # noqa: N818 - it is no failure
    """How the body of a stream ends early."""


class Value(NamedTuple):
    """What goes from stage to stage: the item, and what has made it what it is."""

    item: int
    trail: tuple[str, ...] = ()

    def then(self, mark: str) -> "Value":
        return Value(self.item, (*self.trail, mark))


@dataclass
class Event:
    """Something that happened to an item; ``requests`` is how often it had been asked to end by then."""

    kind: str
    path: str
    number: int
    time: float
    requests: int
    what: Any

    def __str__(self) -> str:
        asked = f" (asked to end {self.requests} times)" if self.requests else ""
        return f"{self.number:5} {self.time:6} {self.path:6} {self.kind:10} {self.what!r}{asked}"


@dataclass
class Run:
    """One item on its way through the pipeline, from the call of ``run`` to its end."""

    item: int
    deadline: float | None
    task: Any
    start: Event = field(init=False)
    end: Event | None = None
    events: list[Event] = field(default_factory=list)
    own_cancels: int = 0
    has_gone_on: bool = False  # in spite of a cancellation
    overtime: float = 0.0  # what its own code slept after the deadline, by its own will

    def __post_init__(self) -> None:
        self.asked_before = self.task.cancelling()

    @property
    def result(self) -> Any:
        assert self.end is not None
        return self.end.what

    @property
    def end_number(self) -> int:
        assert self.end is not None
        return self.end.number

    @property
    def times(self) -> list[tuple[int, str, str, float]]:
        return [(event.number, event.kind, event.path, event.time) for event in self.events]

    def attempts_at(self, path: str) -> int:
        """How many were begun, those included that only waited for the limiter."""
        return max(1, len(self.of("gate", path) or self.of("attempt", path)))

    def of(self, kind: str, path: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind and event.path == path]

    def is_late(self, time: float) -> bool:
        return self.deadline is not None and time >= self.start.time + self.deadline - TOLERANCE

    def is_cancelled(self) -> bool:
        """Whether it ended because it was asked to, in one of the two forms that this has."""
        is_deadline = isinstance(getattr(self.result, "original_error", None), DeadlineExceeded)
        return isinstance(self.result, asyncio.CancelledError) or is_deadline


@dataclass
class Call:
    """One call of the pipeline, and what became of it."""

    how: str
    first: int  # its items are first, first + 1, ...
    count: int
    deadline: float | None
    source: str
    source_delay: float
    source_fails: bool
    ordered: bool
    buffer: int | None
    pause: float
    leaves_after: int | None
    cancelled_at: tuple[float, int] | None  # seconds, and turns of the event loop after them
    cancels: int = 0
    asked: int = 0
    is_open: bool = False
    is_left_open: bool = False
    taken: list[Any] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None

    @property
    def is_single(self) -> bool:
        return self.how in ("run", "try_run")

    @property
    def items(self) -> range:
        return range(self.first, self.first + self.count)


class NumberedTask(asyncio.Task[Any]):
    """A task whose place in a set is the same in each run: that is the order in which tasks are cancelled."""

    def __init__(self, *args: Any, loop: "NumberedTasksLoop", **options: Any) -> None:
        self.number = next(loop.numbers)
        super().__init__(*args, loop=loop, **options)

    def __hash__(self) -> int:
        return self.number


class NumberedTasksLoop(VirtualClockLoop):
    """A loop whose order of events depends on nothing but the schedule."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        super().__init__()

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        if self.get_task_factory() is None:
            return NumberedTask(coro, loop=self, **options)
        return super().create_task(coro, **options)


class Watched(Pipeline[Value, Value]):
    """A pipeline that tells its schedule when the run of an item begins and how it ends."""

    schedule: "Schedule"

    async def run(self, initial_value: Value, *, context: Any = None, timeout: float | None = None) -> Value:
        run = self.schedule.begin(initial_value.item)
        try:
            result = await super().run(initial_value, context=context, timeout=timeout)
        except BaseException as error:
            run.end = self.schedule.log("end", initial_value.item, "", error)
            raise
        run.end = self.schedule.log("end", initial_value.item, "", result)
        return result


class Gate:
    """A limiter that knows whose it is: every attempt begins here."""

    def __init__(self, schedule: "Schedule", path: str) -> None:
        self.schedule = schedule
        self.path = path

    async def __aenter__(self) -> None:
        self.schedule.log("gate", self.schedule.current_item(), self.path)
        await self.schedule.limiter.acquire()

    async def __aexit__(self, *args: object) -> None:
        self.schedule.limiter.release()


class WatchedBudget(RetryBudget):
    """A budget that logs its answers."""

    schedule: "Schedule"

    def record_failure(self) -> bool:
        answer = super().record_failure()
        self.schedule.log(
            "budget", self.schedule.current_item(), "", (answer, self.tokens > self.max_tokens / 2)
        )
        return answer


class Schedule:
    """A random pipeline, random calls of it, and the log of what happens."""

    def __init__(self, source: random.Random) -> None:
        self.random = source
        self.trouble = source.choice([0.0, 0.2, 0.2, 0.5])
        self.is_eager = self.chance(0.3)
        self.begins_at = source.choice([0.0, 0.0, 0.0, source.random()])  # sums are rounded, off the grid
        self.numbers = itertools.count()
        self.runs: dict[int, Run] = {}
        self.items: dict[Any, int] = {}  # by task
        self.stages: dict[str, Stage[Value, Value]] = {}
        self.hooked: dict[str, bool] = {}  # by path: whether its stage has hooks
        self.inside = self.most_inside = 0
        self.permits = source.randint(1, 3)
        self.limiter = asyncio.Semaphore(self.permits)
        self.budget = WatchedBudget(source.choice([2, 4, 10]), 0.5)
        self.budget.schedule = self
        self.pipeline = self._make_pipeline("", Watched)
        self.last_path = list(self.stages)[-1]
        self.pipeline.schedule = self
        self.bound = source.randint(1, 4)
        self.shared = asyncio.Semaphore(self.bound) if self.chance(0.3) else None
        self.calls = [self._make_call(100 * number) for number in range(source.choice([1, 1, 2]))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # -- the pipeline

    def _make_pipeline(self, prefix: str, kind: Any) -> Any:
        names = "abcd"[: self.random.randint(1, 2 if prefix else 4)]
        hooks = self.random.choice([None, None, "sync", "async"])
        stages = [self._make_step(prefix, name) for name in names]
        self.hooked |= {prefix + name: hooks is not None for name in names}
        return kind(
            stages,
            name=prefix.rstrip("/"),
            before_stage=hooks and self._make_before(prefix, hooks),
            after_stage=hooks and self._make_after(prefix, hooks),
            middlewares=[self._make_middleware(prefix) for _ in range(self.random.choice([0, 0, 0, 1, 2]))],
        )

    def _make_step(self, prefix: str, name: str) -> Any:
        if not prefix and self.chance(0.2):
            return self._make_pipeline(f"{name}/", Pipeline)
        path = prefix + name
        handler = self._make_handler(path, self.random.choice(KINDS))
        self.stages[path] = Stage(name, handler, **self._make_options(path))
        return self.stages[path]

    def _make_options(self, path: str) -> dict[str, Any]:
        pick = self.random.choice
        options: dict[str, Any] = {"timeout": pick([None, None, *TIMEOUTS])}
        if self.chance(0.5):
            options |= {
                "retries": pick([1, 2, 3]),
                "retry_delay": pick([0, 0, 0.5, 1]),
                "backoff": pick(["fixed", "exponential"]),
                "max_delay": pick([None, None, 0.5, 1.5]),
                "jitter": pick([0, 0, 0, 0.5, 1]),
                "retry_on": pick([Exception, Exception, HandlerError, its_own_delay, not_a_timeout]),
                "retry_budget": pick([None, None, self.budget]),
            }
        if self.chance(0.3):
            options["limiter"] = Gate(self, path)
        if self.chance(0.2):
            options["on_error"] = self._make_on_error(path, pick(["sync", "async"]))
        return options

    def _make_handler(self, path: str, kind: str) -> Callable[[Value], Any]:
        async def handle(value: Value) -> Value:
            with self._attempt(path, value) as attempt:
                return attempt.ended(await self._play(value.item, value.then(path)))

        def handle_at_once(value: Value) -> Value:
            with self._attempt(path, value) as attempt:
                return attempt.ended(self._finish_playing(self._ending(), value.then(path)))

        return {"async": handle, "sync": handle_at_once, "lazy": lambda value: handle(value)}[kind]

    def _attempt(self, path: str, value: Value) -> "Attempt":
        return Attempt(self, path, value.item, self.stages[path].limiter is not None)

    def _make_on_error(self, path: str, kind: str) -> Callable[..., Any]:
        async def stand_in(value: Value, error: Exception) -> Value:
            self.log("on_error", value.item, path, error)
            try:
                output = await self._play(value.item, value.then(f"{path}?"))
            except BaseException as second:
                self.log("stood in", value.item, path, second)
                raise
            self.log("stood in", value.item, path, output)
            return output

        def stand_in_at_once(value: Value, error: Exception) -> Value:
            self.log("on_error", value.item, path, error)
            output = value.then(f"{path}?")
            self.log("stood in", value.item, path, output)
            return output

        return stand_in if kind == "async" else stand_in_at_once

    def _make_before(self, prefix: str, kind: str) -> Callable[..., Any]:
        async def before(name: str, value: Value) -> None:
            self.log("before", value.item, prefix + name, value)
            await self._hook(value.item, prefix + name)

        def before_at_once(name: str, value: Value) -> None:
            self.log("before", value.item, prefix + name, value)
            self._maybe_raise(HookError)

        return before if kind == "async" else before_at_once

    def _make_after(self, prefix: str, kind: str) -> Callable[..., Any]:
        async def after(name: str, value: Value, output: Any, error: Any) -> None:
            self.log("after", value.item, prefix + name, (output, error))
            await self._hook(value.item, prefix + name)

        def after_at_once(name: str, value: Value, output: Any, error: Any) -> None:
            self.log("after", value.item, prefix + name, (output, error))
            self._maybe_raise(HookError)

        return after if kind == "async" else after_at_once

    def _make_middleware(self, prefix: str) -> Callable[..., Any]:
        async def middleware(next_stage: Any, name: str, value: Value, context: Any) -> Value:
            self.log("middleware", value.item, prefix + name)
            await self._hesitate(value.item)
            self._maybe_raise(MiddlewareError)
            output: Value = await next_stage(value)
            await self._hesitate(value.item)
            self._maybe_raise(MiddlewareError)
            return output

        def middleware_at_once(next_stage: Any, name: str, value: Value, context: Any) -> Any:
            self.log("middleware", value.item, prefix + name)
            return next_stage(value)

        return self.random.choice([middleware, middleware_at_once])

    # -- what they do

    def _maybe_raise(self, kind: type[Exception]) -> None:
        if self.chance(self.trouble / 5):
            raise kind

    async def _hook(self, item: int, path: str) -> None:
        try:
            await self._hesitate(item)
        except asyncio.CancelledError:
            if self.chance(self.trouble / 2):
                self.log("swallowed", item, path)
                raise HookError from None
            raise
        self._maybe_raise(HookError)

    async def _hesitate(self, item: int) -> None:
        if self.chance(0.5):
            await self._sleep(item, self.random.choice(SECONDS))

    async def _sleep(self, item: int, seconds: float) -> None:
        clock, run = asyncio.get_running_loop().time, self.runs[item]
        started = clock()
        try:
            await asyncio.sleep(seconds)
        finally:
            # one that is under way at the deadline has no excuse
            if run.is_late(started):
                run.overtime += clock() - started

    def _ending(self) -> str:
        return self.random.choice(ENDINGS) if self.chance(self.trouble) else "value"

    async def _play(self, item: int, output: Value) -> Value:
        """Wait a few times, and end in some way; when cancelled, answer in some way."""
        own_timeout = self.random.choice(TIMEOUTS) if self.chance(0.1) else None
        ending = ""
        async with asyncio.timeout(own_timeout):
            for _ in range(self.random.choice([0, 1, 1, 2, 3])):
                try:
                    await self._sleep(item, self.random.choice(SECONDS))
                except asyncio.CancelledError:
                    reaction = self.random.choice(REACTIONS) if self.chance(self.trouble) else "raise"
                    if reaction.startswith("clean up"):
                        await self._sleep(item, self.random.choice(SECONDS))
                    if reaction in ("raise", "clean up"):
                        raise
                    if reaction != "go on":
                        return self._finish_playing(reaction, output)
                    self.runs[item].has_gone_on = True
            ending = ending or self._ending()
            if ending == "group" and self.runs[item].has_gone_on and LEAVES_REQUESTS:
                ending = "error"
            if ending == "stray":
                stray: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                stray.cancel()
                await stray
            if ending == "cancels itself":
                self.runs[item].own_cancels += asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
        return self._finish_playing(ending, output)

    def _finish_playing(self, ending: str, output: Value) -> Value:
        errors: dict[str, BaseException] = {
            "error": HandlerError(output),
            "clean up, then fail": HandlerError(output),
            "group": ExceptionGroup("several", [HandlerError(output), ExceptionGroup("", [TimeoutError()])]),
            "timeout": TimeoutError("the handler's own"),
            "stray": asyncio.CancelledError(),
            "finish": Finish(output.then("!")),
        }
        if ending in errors:
            raise errors[ending]
        return output

    # -- the calls

    def _make_call(self, first: int) -> Call:
        pick = self.random.choice
        how = pick(CALLS)
        count = 1 if how in ("run", "try_run") else self.random.randint(0, 6)
        return Call(
            how,
            first,
            count,
            deadline=pick([None, 0.5, 1.0, 2.0, 2.0, 3.0]),
            source=pick(["list", "generator", "async"]),
            source_delay=pick(SECONDS),
            source_fails=self.chance(self.trouble / 3),
            ordered=self.chance(0.6),
            buffer=pick([None, None, 1, 3]),
            pause=pick(SECONDS),
            leaves_after=pick([None, None, None, 1, 2]),
            cancelled_at=(pick([*SECONDS, 3.0]), pick([1, 1, 2, 3, 4, 6, 9])) if self.chance(0.3) else None,
        )

    @property
    def limit(self) -> int | asyncio.Semaphore:
        return self.bound if self.shared is None else self.shared

    def _source(self, call: Call) -> Any:
        values = [Value(item) for item in call.items]
        if call.source == "list":
            call.source_fails = False
            return values
        return self._generate(call, values) if call.source == "generator" else self._produce(call, values)

    def _generate(self, call: Call, values: list[Value]) -> Iterator[Value]:
        call.is_open = True
        try:
            yield from values
            if call.source_fails:
                raise SourceError
        finally:
            call.is_open = False

    async def _produce(self, call: Call, values: list[Value]) -> AsyncIterator[Value]:
        call.is_open = True
        try:
            for value in values:
                await asyncio.sleep(call.source_delay)
                yield value
            if call.source_fails:
                raise SourceError
        finally:
            call.is_open = False

    async def _perform(self, call: Call) -> Any:
        if call.is_single:
            method = self.pipeline.run if call.how == "run" else self.pipeline.try_run
            return await method(Value(call.first), timeout=call.deadline)
        options: dict[str, Any] = {"timeout": call.deadline}
        if call.how in ("map", "return_exceptions"):
            options["return_exceptions"] = call.how == "return_exceptions"
            return await self.pipeline.map(self._source(call), self.limit, **options)
        options |= {"ordered": call.ordered, "buffer": call.buffer}
        async with self.pipeline.stream(self._source(call), self.limit, **options) as results:
            async for result in results if call.how == "stream" else results.outcomes():
                call.taken.append(result)
                await asyncio.sleep(call.pause)
                if len(call.taken) == call.leaves_after:
                    raise Left
        return call.taken

    async def _call(self, call: Call) -> None:
        try:
            call.result = await self._perform(call)
        except BaseException as error:
            call.error = error
        call.is_left_open = call.is_open
        call.asked = asyncio.current_task().cancelling()  # type: ignore[union-attr]

    async def _cancel(self, call: Call, task: "asyncio.Task[None]") -> None:
        if call.cancelled_at is not None:
            seconds, turns = call.cancelled_at
            await asyncio.sleep(seconds)
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancels += task.cancel()

    async def main(self) -> None:
        loop = asyncio.get_running_loop()
        complaints: list[Any] = []
        loop.set_exception_handler(lambda loop, complaint: complaints.append(complaint))
        if sys.version_info >= (3, 12) and self.is_eager:
            loop.set_task_factory(asyncio.create_eager_task_factory(NumberedTask))
        await asyncio.sleep(self.begins_at)
        tasks = [asyncio.create_task(self._call(call)) for call in self.calls]
        await asyncio.gather(*tasks, *map(self._cancel, self.calls, tasks))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not complaints
        for semaphore, permits in ((self.limiter, self.permits), (self.shared, self.bound)):
            for _ in range(permits if semaphore is not None else 0):
                assert semaphore is not None
                assert not semaphore.locked()
                await semaphore.acquire()

    # -- the log

    def current_item(self) -> int:
        return self.items[asyncio.current_task()]

    def begin(self, item: int) -> Run:
        task = asyncio.current_task()
        deadline = next(call.deadline for call in self.calls if item in call.items)
        assert item not in self.runs, "an item is run once"
        run = self.runs[item] = Run(item, deadline, task)
        self.items[task] = item
        run.start = self.log("start", item, "")
        return run

    def log(self, kind: str, item: int, path: str, what: Any = None) -> Event:
        run = self.runs[item]
        assert run.end is None, f"{kind} after the end of item {item}"
        task = asyncio.current_task()
        assert task is not None
        assert task is run.task
        requests = task.cancelling() - run.asked_before
        event = Event(kind, path, next(self.numbers), clock(), requests, what)
        run.events.append(event)
        return event

    def __str__(self) -> str:
        lines = [f"{self.pipeline!r}", f"limit {self.limit}, eager {self.is_eager}", *map(str, self.calls)]
        for run in self.runs.values():
            lines += [f"item {run.item}, deadline {run.deadline}:", *map(str, run.events)]
        return "\n".join(lines)


class Attempt:
    """One call of a handler: logs its start and its end, and counts who is inside the limiter."""

    def __init__(self, schedule: Schedule, path: str, item: int, is_limited: bool) -> None:
        self.schedule = schedule
        self.path = path
        self.item = item
        self.is_limited = is_limited
        self.output: Any = None

    def __enter__(self) -> "Attempt":
        self.schedule.log("attempt", self.item, self.path)
        self.schedule.inside += self.is_limited
        self.schedule.most_inside = max(self.schedule.most_inside, self.schedule.inside)
        return self

    def ended(self, output: Value) -> Value:
        self.output = output
        return output

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.schedule.inside -= self.is_limited
        self.schedule.log("ended", self.item, self.path, self.output if error is None else error)


def its_own_delay(error: Exception) -> float:
    return 1.0 if isinstance(error, TimeoutError) else 0.5


def not_a_timeout(error: Exception) -> bool:
    return not isinstance(error, TimeoutError)


# -- what the log has to show


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


@dataclass
class Tried:
    """One attempt as the log shows it."""

    number: int
    start: Event
    end: Event
    is_timed_out: bool  # its stage's timeout ended it, or would have
    asked_before: int  # how often an earlier stage had been asked to end, and had swallowed it
    requests: int  # those since then that were none of the stage's timeout

    @property
    def is_swallowed(self) -> bool:
        return self.requests > 0 and isinstance(self.end.what, Value)

    @property
    def error(self) -> BaseException | None:
        """What the stage has to take for the attempt's error; None for a value, a Finish, a cancellation."""
        if isinstance(self.end.what, asyncio.CancelledError) and self.is_timed_out and not self.requests:
            return StageTimeoutError(0) if TIMES_OUT_ALWAYS or not self.asked_before else None
        return self.end.what if isinstance(self.end.what, Exception) else None


class Checker:
    """Checks the log of one item."""

    def __init__(self, schedule: Schedule, run: Run) -> None:
        self.schedule = schedule
        self.run = run
        assert run.end is not None, "an item that was begun has an end"
        self.end = run.end
        self.tried = {path: self._tried(path, stage) for path, stage in schedule.stages.items()}

    def _tried(self, path: str, stage: Any) -> list[Tried]:
        attempts, ends = self.run.of("attempt", path), self.run.of("ended", path)
        assert len(attempts) == len(ends)
        begun = [*self.run.of("gate", path), *attempts]
        before = begun[0].requests if begun else 0  # swallowed by the stages before
        tried = []
        for number, (start, end) in enumerate(zip(attempts, ends, strict=True), 1):
            is_sync = stage.handler.__name__ == "handle_at_once"
            has_time = stage.timeout is not None and not is_sync
            is_timed_out = has_time and end.time >= start.time + stage.timeout - TOLERANCE
            requests = end.requests - before - is_timed_out
            tried.append(Tried(number, start, end, is_timed_out, before, requests))
        return tried

    def check(self) -> None:
        assert self.run.asked_before == 0
        for path, stage in self.schedule.stages.items():
            self.check_attempts(path, stage)
        self.check_nothing_begins_after_a_cancellation()
        self.check_deadline()
        for path, is_hooked in self.schedule.hooked.items():
            if is_hooked:
                self.check_hooks(path)
        self.check_end()

    # -- retries

    def check_attempts(self, path: str, stage: Stage[Any, Any]) -> None:
        tried = self.tried[path]
        assert len(tried) <= 1 + stage.retries
        for this in tried:
            assert this.requests >= 0
            assert this.requests == 0 or self.next_event(this.end).kind != "budget"
            if this.is_timed_out and isinstance(this.end.what, asyncio.CancelledError):
                assert this.end.requests > 0
            following = tried[this.number] if this.number < len(tried) else None
            delay = self.delay_after(path, stage, this)
            if following is not None:
                assert delay is not None, f"{path}: no retry after attempt {this.number}"
                self.check_delay(stage, this, following, delay)
            elif delay is None and isinstance(this.end.what, Exception):
                upcoming = self.next_event(this.end)
                upcoming = self.next_event(upcoming) if upcoming.kind == "budget" else upcoming
                # off the grid, rounding decides whether a sleep that ends with the deadline fits
                is_exact = all((2 * time).is_integer() for time in (self.run.start.time, this.end.time))
                assert upcoming.time == this.end.time or not is_exact, "it waits for nothing"
            elif delay is not None and not stage.jitter:
                assert self.run.is_cancelled(), f"{path}: a retry after attempt {this.number}"
        if stage.on_error is not None:
            self.check_on_error(path, stage)

    def next_event(self, event: Event) -> Event:
        return next(other for other in self.run.events if other.number > event.number)

    def delay_after(self, path: str, stage: Stage[Any, Any], this: Tried) -> float | None:
        """How long the pause after this attempt has to be, with jitter at most; None for no retry."""
        if this.error is None or this.requests > 0:
            return None
        answers = [self.answer(stage, this, leaf) for leaf in leaves(this.error)]
        if None in answers:
            return None
        if stage.retry_budget is not None and not self.budgeted(this):
            return None
        delay = max(answer for answer in answers if answer is not None)
        is_in_time = not self.run.is_late(this.end.time + delay)
        is_random = stage.jitter and stage.retry_on is not its_own_delay
        return delay if this.number <= stage.retries and (is_in_time or is_random) else None

    def answer(self, stage: Stage[Any, Any], this: Tried, error: Any) -> float | None:
        retry_on: Any = stage.retry_on
        if retry_on is its_own_delay:
            exact: float = its_own_delay(error)
            return exact
        if isinstance(retry_on, type):
            is_retried = isinstance(error, retry_on)
        else:
            is_retried = not isinstance(error, TimeoutError)
        if not is_retried:
            return None
        factor = 2 ** (this.number - 1) if stage.backoff == "exponential" else 1
        delay: float = stage.retry_delay * factor
        return delay if stage.max_delay is None else min(delay, stage.max_delay)

    def budgeted(self, this: Tried) -> bool:
        event = self.next_event(this.end)
        assert event.kind == "budget", "a failure that is worth a retry is counted"
        answer, has_tokens = event.what
        assert answer == has_tokens
        return bool(answer)

    def check_delay(self, stage: Stage[Any, Any], this: Tried, following: Tried, delay: float) -> None:
        begin = following.start
        if stage.limiter is not None:
            begin = [event for event in self.run.events if event.number < begin.number][-1]
            assert begin.kind == "gate"
        least = delay if stage.retry_on is its_own_delay else delay * (1 - stage.jitter)
        assert this.end.time + least - TOLERANCE <= begin.time <= this.end.time + delay + TOLERANCE

    def check_on_error(self, path: str, stage: Stage[Any, Any]) -> None:
        called = self.run.of("on_error", path)
        assert len(called) <= 1
        if not self.tried[path]:
            assert not called
            return
        last = self.tried[path][-1]
        if called:
            assert called[0].number > last.end.number
            assert last.error is not None
            assert last.requests == 0, "no on_error after a cancellation"
            assert type(called[0].what) is type(last.error)
        elif last.error is not None and last.requests == 0:
            assert self.run.is_cancelled(), f"{path}: on_error was not called"

    # -- cancellation and deadline

    def check_nothing_begins_after_a_cancellation(self) -> None:
        swallows = [
            this.end.number for all_tried in self.tried.values() for this in all_tried if this.is_swallowed
        ]
        swallows += [
            event.number
            for event in self.run.events
            if event.kind == "swallowed" or (event.kind == "stood in" and isinstance(event.what, Value))
        ]
        for event in self.run.events:
            if event.kind in BEGINNINGS:
                assert not self.run.is_late(event.time), f"{event} begins after the deadline"
                is_excused = any(number < event.number for number in swallows)
                assert event.requests == 0 or is_excused, f"{event} begins after a cancellation"

    def check_deadline(self) -> None:
        if self.run.deadline is not None:
            most = self.run.start.time + self.run.deadline + self.run.overtime
            assert self.end.time <= most + TOLERANCE, "it goes on after the deadline"

    # -- hooks

    def check_hooks(self, path: str) -> None:
        befores, afters = self.run.of("before", path), self.run.of("after", path)
        assert len(befores) == len(afters) <= 1, f"{path}: an after for each before"
        for before, after in zip(befores, afters, strict=True):
            assert before.number < after.number
            output, error = after.what
            assert output is None or error is None
            if error is None:
                assert output == self.output_before(after)
            elif isinstance(error, StageExecutionError):
                prefix = path[: path.rfind("/") + 1]  # a nested pipeline's hooks know nothing of it
                self.check_error(error, after, prefix + error.stage_name)
            else:
                assert isinstance(error, (asyncio.CancelledError, MiddlewareError))

    def output_before(self, event: Event) -> Any:
        """The last output of a handler or an on_error, that of a Finish included."""
        for earlier in reversed(self.run.events):
            if earlier.number < event.number and earlier.kind in ("ended", "stood in"):
                if isinstance(earlier.what, Finish):
                    return earlier.what.value
                if isinstance(earlier.what, Value):
                    return earlier.what
        return None

    # -- the end

    def check_end(self) -> None:
        end = self.end.what
        if isinstance(end, Value):
            assert end == self.output_before(self.end)
        elif isinstance(end, StageExecutionError):
            self.check_error(end, self.end, end.stage_name)
            self.check_count(end)
        elif isinstance(end, asyncio.CancelledError):
            is_stray = any(
                isinstance(event.what, asyncio.CancelledError) and event.requests == 0
                for event in self.run.events
                if event.kind in ("ended", "stood in")
            )
            assert self.end.requests > 0 or is_stray, "a cancellation from nowhere"
        else:
            assert isinstance(end, MiddlewareError)
        self.check_a_cancellation_is_told()
        self.check_what_is_returned_is_kept()

    def check_error(self, error: StageExecutionError, event: Event, path: str) -> None:
        original = error.original_error
        assert error.__cause__ is original
        if isinstance(original, DeadlineExceeded):
            assert self.run.is_late(event.time), "the deadline was not reached"
            assert original.timeout == self.run.deadline
            last = [e for e in self.run.events if e.number < event.number][-1]
            one, other = sorted([f"{last.path}/", f"{path}/"], key=len)
            assert other.startswith(one), "it names the stage in which the time ran out"
            return
        this = self.tried[path][-1]
        stood_in = self.run.of("stood in", path)
        if stood_in:
            assert original is stood_in[0].what
        elif isinstance(original, StageTimeoutError):
            assert this.is_timed_out
            assert isinstance(this.end.what, asyncio.CancelledError)
            assert original.timeout == self.schedule.stages[path].timeout
        else:
            assert original is this.end.what

    def check_count(self, error: StageExecutionError) -> None:
        path = error.stage_name
        if path not in self.schedule.stages:  # a nested pipeline, whose stages had all returned
            return
        assert error.attempts == self.run.attempts_at(path)
        assert bool(getattr(error, "__notes__", [])) == (error.attempts > 1)

    def check_a_cancellation_is_told(self) -> None:
        """A handler that let its cancellation through ends the run as what the cancellation was."""
        last = max(
            (this for tried in self.tried.values() for this in tried),
            key=lambda t: t.end.number,
            default=None,
        )
        if last is None or last.requests == 0 or not isinstance(last.end.what, asyncio.CancelledError):
            return
        if self.end.requests > last.asked_before or isinstance(self.end.what, asyncio.CancelledError):
            assert self.end.requests > 0
            assert isinstance(self.end.what, asyncio.CancelledError)
        else:
            assert isinstance(self.end.what.original_error, DeadlineExceeded)
            assert self.end.what.stage_name == last.start.path

    def check_what_is_returned_is_kept(self) -> None:
        last = self.run.events[-2]
        is_wrapped = any(
            last.path.startswith(event.path) for event in self.run.events if event.kind == "middleware"
        )
        if last.kind in ("ended", "stood in") and last.path == self.schedule.last_path and not is_wrapped:
            assert not isinstance(last.what, Value) or self.end.what is last.what, "late or not"
        for event in self.run.events:
            if isinstance(event.what, Finish) and event.kind in ("ended", "stood in"):
                assert self.end.what is event.what.value or self.run.is_cancelled()


def check_calls(schedule: Schedule) -> None:
    for call in schedule.calls:
        own_cancels = schedule.runs[call.first].own_cancels if call.is_single else 0
        assert call.asked == call.cancels + own_cancels
        assert not call.is_left_open, "the source is closed"
        check_call(
            call, {item - call.first: run for item, run in schedule.runs.items() if item in call.items}
        )
    check_bounds(schedule)


def check_call(call: Call, runs: dict[int, Run]) -> None:
    if call.cancels and not call.is_single:
        assert isinstance(call.error, asyncio.CancelledError)
        return
    {
        "run": check_run,
        "try_run": check_try_run,
        "map": check_map,
        "return_exceptions": check_return_exceptions,
        "stream": check_stream,
        "outcomes": check_outcomes,
    }[call.how](call, runs)


def check_run(call: Call, runs: dict[int, Run]) -> None:
    assert (call.result if call.error is None else call.error) is runs[0].result


def check_try_run(call: Call, runs: dict[int, Run]) -> None:
    if call.error is not None:
        assert isinstance(call.error, asyncio.CancelledError)
        assert call.error is runs[0].result
    else:
        assert (call.result.value if call.result.ok else call.result.error) is runs[0].result
        assert not isinstance(call.result.error, asyncio.CancelledError)


def check_map(call: Call, runs: dict[int, Run]) -> None:
    if isinstance(call.error, BatchError):
        assert call.error.failures
        for index, result in call.error.results.items():
            assert result is runs[index].result
        for index, failure in call.error.failures.items():
            check_failure(call, index, failure, runs[index])
        told = call.error.results.keys() | call.error.failures.keys()
        assert all(
            isinstance(run.result, asyncio.CancelledError) for index, run in runs.items() if index not in told
        )
        assert not call.error.results.keys() & call.error.failures.keys()
        first = min(runs[index].end_number for index in call.error.failures)
        for event in itertools.chain(*(run.events for run in runs.values())):
            assert event.number < first or event.kind not in BEGINNINGS or event.requests > 0, "it goes on"
    elif call.error is not None:
        assert isinstance(call.error, SourceError)
        assert call.source_fails
    else:
        assert not call.source_fails
        assert call.result == [runs[index].result for index in range(call.count)]


def check_return_exceptions(call: Call, runs: dict[int, Run]) -> None:
    if call.error is not None:
        assert isinstance(call.error, SourceError)
        assert call.source_fails
        return
    assert not call.source_fails
    assert len(call.result) == len(runs) == call.count
    for index, result in enumerate(call.result):
        check_told(call, index, result, runs[index])


def check_stream(call: Call, runs: dict[int, Run]) -> None:
    items = [value.item - call.first for value in call.taken]
    assert all(value is runs[index].result for index, value in zip(items, call.taken, strict=True))
    check_order(call, items)
    error: Any = call.error
    if error is None:
        assert not call.source_fails
        assert len(items) == call.count
    elif isinstance(error, SourceError):
        assert call.source_fails
        assert len(items) == call.count
    elif not isinstance(error, Left):
        failed = len(items) if call.ordered else next(i for i, run in runs.items() if is_told_as(error, run))
        assert failed not in items
        check_failure(call, failed, error, runs[failed])


def check_outcomes(call: Call, runs: dict[int, Run]) -> None:
    outcomes: list[Outcome[Value]] = call.taken
    items: list[Any] = [outcome.index for outcome in outcomes]
    check_order(call, items)
    for outcome in outcomes:
        assert outcome.index is not None
        assert outcome.item == Value(call.first + outcome.index)
        told = outcome.value if outcome.ok else outcome.error
        check_told(call, outcome.index, told, runs[outcome.index])
    if not isinstance(call.error, Left):
        assert len(items) == call.count
        assert isinstance(call.error, SourceError) == call.source_fails


def check_order(call: Call, items: list[int]) -> None:
    assert len(set(items)) == len(items)
    assert not call.ordered or items == list(range(len(items)))


def check_told(call: Call, index: int, told: Any, run: Run) -> None:
    if isinstance(told, Exception):
        check_failure(call, index, told, run)
    else:
        assert told is run.result


def is_told_as(told: Exception, run: Run) -> bool:
    return told is run.result or (
        isinstance(run.result, asyncio.CancelledError) and told.__cause__ is run.result
    )


def check_failure(call: Call, index: int, told: Exception, run: Run) -> None:
    """A failed item is told as its own error; a stray cancellation as the failure of its stage."""
    assert is_told_as(told, run)
    if isinstance(run.result, asyncio.CancelledError):
        last = [event for event in run.events if event.kind in ("ended", "stood in")][-1]
        assert isinstance(told, StageExecutionError)
        assert told.original_error is run.result
        is_nested = not run.of("attempt", told.stage_name)
        assert is_nested or told.attempts == run.attempts_at(told.stage_name)
        assert told.stage_name in (
            last.path,
            run.events[-2].path,
        )  # or an after_stage's that was cancelled, too
    if isinstance(told, StageExecutionError):
        assert (told.item_index, told.item) == (index, Value(call.first + index))
    else:
        assert isinstance(told, MiddlewareError)


def check_bounds(schedule: Schedule) -> None:
    assert schedule.inside == 0
    assert schedule.most_inside <= schedule.permits
    batches = [[call] for call in schedule.calls] if schedule.shared is None else [schedule.calls]
    for calls in batches:
        firsts = [call.first for call in calls if not call.is_single]
        runs = [run for run in schedule.runs.values() if run.item - run.item % 100 in firsts]
        assert most_at_once(runs) <= schedule.bound


def most_at_once(runs: list[Run]) -> int:
    changes = sorted(
        [(run.start.number, 1) for run in runs]
        + [(run.end.number, -1) for run in runs if run.end is not None]
    )
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def check_schedule(source: random.Random) -> Schedule:
    schedule = Schedule(source)
    state = random.getstate()
    random.seed(source.getrandbits(32))  # the jitter
    try:
        with asyncio.Runner(loop_factory=NumberedTasksLoop) as runner:
            runner.run(schedule.main())
        for run in schedule.runs.values():
            Checker(schedule, run).check()
        check_calls(schedule)
    except BaseException as error:
        error.add_note(str(schedule))
        raise
    finally:
        random.setstate(state)
    return schedule


def check_seed(seed: int) -> Schedule:
    try:
        return check_schedule(random.Random(seed))
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


BATCH = 250


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="async_pipeline")


@pytest.mark.parametrize("first", range(0, 20 * BATCH, BATCH))
def test_whatever_goes_wrong_and_whenever(first: int) -> None:
    for seed in range(first, first + BATCH):
        check_seed(seed)
    gc.collect()  # what is in a cycle complains now, of a coroutine that was never awaited, for example


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_one_schedule(seed: int) -> None:
    first, second = (check_seed(seed).runs for _ in range(2))
    assert {item: run.times for item, run in first.items()} == {
        item: run.times for item, run in second.items()
    }


@given(st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_in_the_smallest_schedule_that_shows_it(source: random.Random) -> None:
    check_schedule(source)


def test_the_schedules_meet_every_kind_of_end() -> None:
    met: Counter[str] = Counter()
    for seed in range(2 * BATCH):
        for run in check_seed(seed).runs.values():
            met.update(what_happened(run))
    rare = {name: met[name] for name in MET if met[name] < 5}
    assert not rare


MET = [
    "Value",
    "CancelledError",
    "MiddlewareError",
    "DeadlineExceeded",
    "StageTimeoutError",
    "HandlerError",
    "TimeoutError",
    "ExceptionGroup",
    "Finish",
    "swallowed by a value",
    "swallowed by an error",
    "swallowed by a hook",
    "retried",
    "stood in",
    "overtime",
]


def what_happened(run: Run) -> Iterator[str]:
    yield type(getattr(run.result, "original_error", run.result)).__name__
    if run.overtime:
        yield "overtime"
    for event in run.events:
        if event.kind == "ended" and isinstance(event.what, Finish):
            yield "Finish"
        elif event.kind == "ended" and event.requests and not isinstance(event.what, asyncio.CancelledError):
            yield f"swallowed by {'a value' if isinstance(event.what, Value) else 'an error'}"
        elif event.kind == "swallowed":
            yield "swallowed by a hook"
        elif event.kind == "stood in":
            yield "stood in"
        elif event.kind == "attempt" and event is not run.of("attempt", event.path)[0]:
            yield "retried"


# -- each edge by its name


def clock() -> float:
    return asyncio.get_running_loop().time()


async def sleep(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def stubborn_error(seconds: float) -> None:
    """Turn a cancellation into an error of its own."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        raise HandlerError(clock()) from None


async def stubborn_value(seconds: float) -> float:
    """Turn a cancellation into a value."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(seconds)
    return clock()


async def stubborn_finish(seconds: float) -> None:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        raise Finish(clock()) from None


async def clean_up(seconds: float) -> None:
    """Take three more seconds when cancelled."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        await asyncio.sleep(3)
        raise


async def stray(value: Any) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


def stage(handler: Callable[..., Any], **options: Any) -> Stage[Any, Any]:
    return Stage("stage", handler, **options)


class Counted:
    """A handler that knows when its calls began."""

    def __init__(self, handler: Callable[..., Any] = sleep) -> None:
        self.handler = handler
        self.times: list[float] = []

    async def __call__(self, value: Any) -> Any:
        self.times.append(clock())
        return await self.handler(value)


async def failure_of(call: Any) -> StageExecutionError:
    with pytest.raises(StageExecutionError) as caught:
        await call
    return caught.value


def cancel_at(seconds: float, call: Any) -> "asyncio.Task[Any]":
    task: asyncio.Task[Any] = asyncio.create_task(call)
    asyncio.get_running_loop().call_later(seconds, task.cancel)
    return task


@pytest.mark.virtual
class TestEdgesOfTheStageTimeout:
    async def test_a_cleanup_takes_the_time_it_takes_and_the_delay_begins_after_it(self) -> None:
        handler = Counted(clean_up)
        error = await failure_of(stage(handler, timeout=1, retries=1, retry_delay=2).run(60))
        assert isinstance(error.original_error, StageTimeoutError)
        assert handler.times == [0, 6]
        assert clock() == 10

    async def test_a_timeout_of_the_handlers_own_at_the_same_moment_is_the_stages(self) -> None:
        async def handler(value: Any) -> None:
            async with asyncio.timeout(1):
                await asyncio.sleep(60)

        assert isinstance(
            (await failure_of(stage(handler, timeout=1).run(0))).original_error, StageTimeoutError
        )

    async def test_a_timeout_of_the_handlers_own_during_its_cleanup_is_still_the_stages(self) -> None:
        async def handler(value: Any) -> None:
            async with asyncio.timeout(2):
                await clean_up(60)

        error = await failure_of(stage(handler, timeout=1).run(0))
        assert isinstance(error.original_error, StageTimeoutError)
        assert clock() == 2

    async def test_a_stray_cancellation_before_it_is_none(self) -> None:
        with pytest.raises(asyncio.CancelledError):
            await stage(stray, timeout=1).run(0)

    async def test_a_finish_in_answer_to_it_is_a_finish(self) -> None:
        assert await stage(stubborn_finish, timeout=1, retries=3).run(60) == 1

    async def test_an_error_in_answer_to_it_is_tried_again(self) -> None:
        handler = Counted(stubborn_error)
        error = await failure_of(stage(handler, timeout=1, retries=2).run(60))
        assert isinstance(error.original_error, HandlerError)
        assert handler.times == [0, 1, 2]

    async def test_two_attempts_that_run_out_and_one_that_does_not(self) -> None:
        async def handler(value: Any) -> str:
            await asyncio.sleep(60 if clock() < 2 else 0.5)
            return "in time"

        assert await stage(handler, timeout=1, retries=2).run(0) == "in time"
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


@pytest.mark.virtual
class TestEdgesOfTheDeadline:
    async def test_a_sleep_that_would_end_exactly_then_is_not_begun(self) -> None:
        handler = Counted(stubborn_error)
        handler.handler = fail_at_once
        error = await failure_of(Pipeline([stage(handler, retries=9, retry_delay=2)]).run(0, timeout=4))
        assert isinstance(error.original_error, HandlerError)
        assert handler.times == [0, 2]
        assert clock() == 2

    async def test_an_attempt_that_ends_exactly_then_is_too_late(self) -> None:
        error = await failure_of(Pipeline([sleep, sleep]).run(2, timeout=2))
        assert (error.stage_name, type(error.original_error)) == ("sleep", DeadlineExceeded)

    async def test_it_cuts_the_cleanup_of_an_attempt_whose_time_was_up(self) -> None:
        handler = Counted(clean_up)
        error = await failure_of(Pipeline([stage(handler, timeout=1, retries=9)]).run(60, timeout=2))
        assert isinstance(error.original_error, DeadlineExceeded)
        assert handler.times == [0]
        assert clock() == 2

    async def test_a_cleanup_after_it_takes_the_time_it_takes_and_is_told_afterwards(self) -> None:
        error = await failure_of(Pipeline([clean_up, sleep]).run(60, timeout=2))
        assert (error.stage_name, type(error.original_error)) == ("clean_up", DeadlineExceeded)
        assert clock() == 5

    async def test_a_timeout_of_the_handlers_own_at_the_same_moment_is_the_runs(self) -> None:
        async def handler(value: Any) -> None:
            async with asyncio.timeout(1):
                await asyncio.sleep(60)

        error = await failure_of(Pipeline([stage(handler, timeout=1)]).run(0, timeout=1))
        assert isinstance(error.original_error, DeadlineExceeded)

    async def test_an_attempts_timeout_before_it_stays_that(self) -> None:
        error = await failure_of(Pipeline([stage(sleep, timeout=1)]).run(60, timeout=1.5))
        assert isinstance(error.original_error, StageTimeoutError)

    async def test_a_finish_in_answer_to_it_is_the_result(self) -> None:
        last = Counted()
        assert await Pipeline([stubborn_finish, last]).run(60, timeout=2) == 2
        assert not last.times

    async def test_a_stray_cancellation_before_it_stays_a_cancellation(self) -> None:
        with pytest.raises(asyncio.CancelledError):
            await Pipeline([stray]).run(0, timeout=2)
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    async def test_an_error_in_answer_to_it_reaches_neither_retry_nor_on_error_nor_the_next_stage(
        self,
    ) -> None:
        first, last, stood_in = Counted(stubborn_error), Counted(), Counted()
        broken = stage(first, retries=9, on_error=lambda value, error: stood_in(0))
        error = await failure_of(Pipeline([broken, last]).run(60, timeout=2))
        assert isinstance(error.original_error, HandlerError)
        assert (first.times, stood_in.times, last.times) == ([0], [], [])
        assert error.attempts == 1

    async def test_an_after_hook_that_swallows_it_is_the_last_thing_that_runs(self) -> None:
        async def after(name: str, value: Any, output: Any, error: Any) -> None:
            await stubborn_error(60)

        last = Counted()
        error = await failure_of(Pipeline([sleep, last], after_stage=after).run(1, timeout=2))
        assert (error.stage_name, type(error.original_error)) == ("sleep", DeadlineExceeded)
        assert not last.times

    async def test_a_late_value_at_the_end_of_a_nested_pipeline_begins_no_stage_after_it(self) -> None:
        last = Counted()
        nested = Pipeline([sleep, stubborn_value], name="nested")
        error = await failure_of(Pipeline([nested, last]).run(1.5, timeout=2))
        assert (error.stage_name, type(error.original_error)) == ("nested", DeadlineExceeded)
        assert not last.times

    async def test_a_late_value_begins_no_stage_where_times_are_rounded(self) -> None:
        await asyncio.sleep(0.7)
        assert (clock() + 0.1) - clock() < 0.1
        last = Counted()
        error = await failure_of(Pipeline([stubborn_value, last]).run(60, timeout=0.1))
        assert (error.stage_name, type(error.original_error)) == ("stubborn_value", DeadlineExceeded)
        assert not last.times

    async def test_waiting_for_the_batchs_semaphore_does_not_count(self) -> None:
        semaphore = asyncio.Semaphore(1)
        assert await Pipeline([sleep]).map([1, 1, 1], semaphore, timeout=1.5) == [1, 1, 1]
        assert clock() == 3

    async def test_waiting_for_a_limiter_ends_with_it_and_takes_no_permit(self) -> None:
        limiter = asyncio.Semaphore(1)
        limited = Pipeline([stage(clean_up, limiter=limiter, retries=1)])
        first, second = await limited.map([1, 60], timeout=2, return_exceptions=True)
        assert first is None
        assert isinstance(second, StageExecutionError)
        assert isinstance(second.original_error, DeadlineExceeded)
        async with limiter:
            assert clock() == 5

    async def test_one_items_does_not_touch_another(self) -> None:
        results = await Pipeline([sleep]).map([1, 60, 2.5, 60], 1, timeout=3, return_exceptions=True)
        assert [isinstance(result, StageExecutionError) for result in results] == [False, True, False, True]
        assert clock() == 1 + 3 + 2.5 + 3


def fail_at_once(value: Any) -> Any:
    raise HandlerError(value)


@pytest.mark.virtual
class TestEdgesOfCancellation:
    @pytest.mark.parametrize("options", [{}, {"timeout": 2}], ids=["plain", "with a deadline"])
    async def test_from_outside_at_the_end_of_a_delay_no_attempt_begins(self, options: Any) -> None:
        handler = Counted(fail_at_once)
        task = cancel_at(1, Pipeline([stage(handler, retries=9, retry_delay=1)]).run(0, **options))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handler.times == [0]

    @pytest.mark.parametrize("method", ["run", "try_run"])
    async def test_from_outside_at_the_moment_of_the_deadline_it_is_a_cancellation(self, method: str) -> None:
        task = cancel_at(2, getattr(Pipeline([sleep]), method)(60, timeout=2))
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_from_outside_and_turned_into_an_error_it_reaches_neither_retry_nor_on_error(self) -> None:
        handler, last = Counted(stubborn_error), Counted()
        broken = stage(handler, retries=9, on_error=lambda value, error: "stood in")
        error = await failure_of(cancel_at(1, Pipeline([broken, last]).run(60)))
        assert isinstance(error.original_error, HandlerError)
        assert (handler.times, last.times) == ([0], [])

    async def test_from_outside_and_swallowed_by_a_value_the_run_goes_on_as_asyncio_has_it(self) -> None:
        assert await cancel_at(1, Pipeline([stubborn_value, sleep]).run(60)) == 1
        assert clock() == 2

    async def test_a_deadline_cuts_the_cleanup_after_one_from_outside(self) -> None:
        task = cancel_at(1, Pipeline([clean_up]).run(60, timeout=2))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert clock() == 2

    async def test_a_stray_one_is_neither_tried_again_nor_given_to_on_error(self) -> None:
        handler = Counted(stray)
        limiter = asyncio.Semaphore(1)
        broken = stage(handler, retries=9, limiter=limiter, on_error=lambda value, error: "stood in")
        with pytest.raises(asyncio.CancelledError):
            await Pipeline([broken]).run(0)
        assert handler.times == [0]
        assert not limiter.locked()

    async def test_a_stray_one_in_a_batch_says_where_and_after_how_many_attempts(self) -> None:
        async def second_is_stray(value: Any) -> None:
            if clock() < 1:
                raise HandlerError
            await stray(value)

        inner = Pipeline([stage(second_is_stray, retries=9, retry_delay=1)], name="inner")
        (error,) = await Pipeline([inner]).map([0], timeout=5, return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, asyncio.CancelledError)
        assert (error.stage_name, error.attempts) == ("inner/stage", 2)

    async def test_through_a_pipeline_that_a_handler_runs_it_is_named_by_the_handlers_stage(self) -> None:
        async def handler(value: Any) -> Any:
            return await Pipeline([Stage("hidden", sleep, retries=1)], name="hidden too").run(value)

        error = await failure_of(Pipeline([Pipeline([handler], name="outer")]).run(60, timeout=1))
        assert (error.stage_name, type(error.original_error)) == ("outer/handler", DeadlineExceeded)

    async def test_a_batch_that_stops_leaves_no_retry_behind(self) -> None:
        async def handler(value: int) -> None:
            if value == 0:
                await asyncio.sleep(1)
                raise HandlerError("first")
            await stubborn_error(60)

        handlers = Counted(handler)
        with pytest.raises(BatchError) as caught:
            await Pipeline([stage(handlers, retries=9, retry_on=lambda error: error.args != ("first",))]).map(
                [0, 1]
            )
        assert caught.value.failures.keys() == {0, 1}
        assert handlers.times == [0, 0]

    async def test_a_batch_that_stops_ends_the_delay_of_another_item(self) -> None:
        async def handler(value: int) -> None:
            await asyncio.sleep(value)
            raise HandlerError(value)

        handlers = Counted(handler)
        with pytest.raises(BatchError) as caught:
            await Pipeline(
                [stage(handlers, retries=1, retry_delay=2, retry_on=lambda error: error.args == (0,))]
            ).map([0, 2])
        assert caught.value.failures.keys() == {1}
        assert handlers.times == [0, 0]

    async def test_a_deadline_in_the_cleanup_of_an_item_of_a_batch_that_stops_is_no_failure(self) -> None:
        async def handler(value: int) -> None:
            if value:
                await clean_up(60)
            await asyncio.sleep(1)
            raise HandlerError

        with pytest.raises(BatchError) as caught:
            await Pipeline([handler]).map([0, 1], timeout=2)
        assert caught.value.failures.keys() == {0}
        assert clock() == 2

    async def test_a_value_in_spite_of_a_batch_that_stops_is_a_result(self) -> None:
        async def handler(value: int) -> Any:
            await asyncio.sleep(1)
            raise HandlerError

        pick = Pipeline([lambda value: stubborn_value(60) if value else handler(0)])
        with pytest.raises(BatchError) as caught:
            await pick.map([0, 1])
        assert caught.value.failures.keys() == {0}
        assert caught.value.results == {1: 1}

    async def test_a_stream_that_is_left_begins_no_attempt_of_what_waits(self) -> None:
        async def handler(value: int) -> int:
            if value:
                raise HandlerError
            await asyncio.sleep(1)
            return value

        handlers = Counted(handler)
        async with Pipeline([stage(handlers, retries=9, retry_delay=2)]).stream([0, 1]) as results:
            async for _ in results:
                break
        await asyncio.sleep(5)
        assert handlers.times == [0, 0]


@pytest.mark.virtual
class TestEdgesOfOnErrorAndFinish:
    async def test_on_error_is_cut_by_the_deadline_and_the_stage_is_named(self) -> None:
        broken = stage(fail_at_once, retries=1, on_error=lambda value, error: sleep(60))
        error = await failure_of(Pipeline([broken, sleep]).run(0, timeout=2))
        assert (error.stage_name, error.attempts, clock()) == ("stage", 2, 2)
        assert isinstance(error.original_error, DeadlineExceeded)

    async def test_on_error_is_cut_by_a_batch_that_stops(self) -> None:
        async def stand_in(value: int, error: Exception) -> None:
            await asyncio.sleep(60 if value else 1)
            raise HandlerError

        with pytest.raises(BatchError) as caught:
            await Pipeline([stage(fail_at_once, on_error=stand_in)]).map([0, 1])
        assert caught.value.failures.keys() == {0}
        assert clock() == 1

    async def test_on_error_that_answers_late_is_the_last_that_runs(self) -> None:
        async def stand_in(value: Any, error: Exception) -> Any:
            return await stubborn_value(60)

        last = Counted()
        error = await failure_of(Pipeline([stage(fail_at_once, on_error=stand_in), last]).run(0, timeout=2))
        assert (error.stage_name, type(error.original_error)) == ("stage", DeadlineExceeded)
        assert not last.times

    async def test_a_finish_of_one_item_leaves_the_others_alone(self) -> None:
        async def handler(value: int) -> int:
            await asyncio.sleep(value)
            if value == 1:
                raise Finish("early")
            return value

        outcomes = []
        async with Pipeline([handler, lambda value: value * 10]).stream([2, 1, 3]) as results:
            async for outcome in results.outcomes():
                outcomes.append(outcome.unwrap())
        assert outcomes == [20, "early", 30]

    async def test_a_finish_after_a_failed_attempt_leaves_its_limiter(self) -> None:
        async def handler(value: Any) -> None:
            if clock() < 1:
                raise HandlerError
            raise Finish("enough")

        limiter = asyncio.Semaphore(1)
        limited = stage(handler, retries=1, retry_delay=1, limiter=limiter, timeout=1)
        assert await Pipeline([limited]).run(0, timeout=5) == "enough"
        assert not limiter.locked()

    async def test_a_finish_at_the_moment_of_a_cancellation_from_outside_is_the_result(self) -> None:
        assert await cancel_at(1, Pipeline([stubborn_finish, sleep]).run(60)) == 1
