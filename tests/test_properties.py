"""What holds for every schedule: random items, delays, bounds and sources, cancelled at any moment."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    Finish,
    Outcome,
    Pipeline,
    RetryBudget,
    Stage,
    StageExecutionError,
)
from tests.helpers import run_virtually

settings.register_profile("default", deadline=None)
settings.load_profile("default")

seconds = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0])


@dataclass
class Item:
    """What one item's handler does."""

    number: int
    delays: list[float]
    fails: bool


@dataclass
class Schedule:
    """A batch: its items, how the source gives them, and how many may run."""

    items: list[Item]
    concurrency: int
    semaphore: bool
    source_delay: float | None  # None: a sync source
    in_flight: int = 0
    most: int = 0
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    closed: bool = False

    @property
    def limit(self) -> int | asyncio.Semaphore:
        return asyncio.Semaphore(self.concurrency) if self.semaphore else self.concurrency

    @property
    def pipeline(self) -> Pipeline[Item, int]:
        return Pipeline([Stage("enter", self.enter), Stage("work", self.work)])

    def enter(self, item: Item) -> Item:
        return item

    async def work(self, item: Item) -> int:
        self.starts.append(item.number)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            for delay in item.delays:
                await asyncio.sleep(delay)
            if item.fails:
                raise ValueError(item.number)
        finally:
            self.in_flight -= 1
            self.ends.append(item.number)
        return item.number

    def source(self) -> Any:
        return self.sync_source() if self.source_delay is None else self.async_source()

    def sync_source(self) -> Iterator[Item]:
        try:
            yield from self.items
        finally:
            self.closed = True

    async def async_source(self) -> AsyncIterator[Item]:
        try:
            for item in self.items:
                await asyncio.sleep(self.source_delay or 0)
                yield item
        finally:
            self.closed = True

    def check(self) -> None:
        """What holds however the call ended."""
        assert self.most <= self.concurrency
        assert self.in_flight == 0
        assert len(set(self.starts)) == len(self.starts)
        assert sorted(self.starts) == sorted(self.ends)
        assert self.closed or not self.starts
        assert asyncio.all_tasks() == {asyncio.current_task()}


@st.composite
def schedules(draw: st.DrawFn, *, failures: bool = True) -> Schedule:
    count = draw(st.integers(0, 12))
    items = [
        Item(number, draw(st.lists(seconds, max_size=3)), failures and draw(st.integers(0, 4)) == 0)
        for number in range(count)
    ]
    source_delay = draw(st.sampled_from([None, 0.0, 1.0]))
    return Schedule(items, draw(st.integers(1, 5)), draw(st.booleans()), source_delay)


def check_outcome(item: Item, result: Any) -> None:
    if not item.fails:
        assert result == item.number
        return
    assert isinstance(result, StageExecutionError)
    assert (result.stage_name, result.item_index, result.item) == ("work", item.number, item)
    assert isinstance(result.original_error, ValueError)


@given(schedules())
def test_every_item_ends_once_as_its_own_result_or_error(schedule: Schedule) -> None:
    async def main() -> None:
        results = await schedule.pipeline.map(schedule.source(), schedule.limit, return_exceptions=True)
        assert len(results) == len(schedule.items)
        for item, result in zip(schedule.items, results, strict=True):
            check_outcome(item, result)
        schedule.check()

    run_virtually(main())


@given(schedules())
def test_a_failed_map_accounts_for_what_it_started(schedule: Schedule) -> None:
    async def main() -> None:
        try:
            results = await schedule.pipeline.map(schedule.source(), schedule.limit)
        except BatchError as error:
            assert not error.results.keys() & error.failures.keys()
            assert error.results.keys() | error.failures.keys() <= set(schedule.starts)
            for index, failure in error.failures.items():
                check_outcome(schedule.items[index], failure)
            for index, result in error.results.items():
                check_outcome(schedule.items[index], result)
        else:
            assert results == [item.number for item in schedule.items]
        schedule.check()

    run_virtually(main())


@given(schedules(), st.booleans(), st.integers(1, 8), seconds)
def test_every_item_has_one_outcome_in_a_stream(
    schedule: Schedule, ordered: bool, buffer: int, pause: float
) -> None:
    async def main() -> None:
        outcomes: list[Outcome[int]] = []
        options: dict[str, Any] = {"ordered": ordered, "buffer": buffer}
        async with schedule.pipeline.stream(schedule.source(), schedule.limit, **options) as results:
            async for outcome in results.outcomes():
                await asyncio.sleep(pause)
                outcomes.append(outcome)
                assert len(schedule.starts) <= len(outcomes) + buffer
        indexes: list[Any] = [outcome.index for outcome in outcomes]
        assert (indexes if ordered else sorted(indexes)) == list(range(len(schedule.items)))
        for outcome in outcomes:
            check_outcome(outcome.item, outcome.error or outcome.value)
            if outcome.ok:
                assert outcome.duration == sum(outcome.item.delays)
        schedule.check()

    run_virtually(main())


@given(schedules(), st.booleans(), st.floats(0, 12), st.integers(0, 30))
def test_cancelled_at_any_moment_nothing_is_left(
    schedule: Schedule, streaming: bool, moment: float, turns: int
) -> None:
    async def call() -> None:
        if not streaming:
            await schedule.pipeline.map(schedule.source(), schedule.limit)
            return
        async with schedule.pipeline.stream(schedule.source(), schedule.limit) as results:
            async for _ in results:
                await asyncio.sleep(0.5)

    async def main() -> None:
        task = asyncio.create_task(call())
        await asyncio.sleep(moment)
        for _ in range(turns):
            await asyncio.sleep(0)
        was_running = task.cancel()
        with contextlib.suppress(BatchError, StageExecutionError, asyncio.CancelledError):
            await task
        assert task.cancelled() or not was_running or task.exception() is not None
        schedule.check()

    run_virtually(main())


@given(schedules(failures=False), st.integers(0, 12))
def test_a_stream_may_be_left_after_any_item(schedule: Schedule, taken: int) -> None:
    async def main() -> None:
        seen = []
        async with schedule.pipeline.stream(schedule.source(), schedule.limit) as results:
            async for value in results:
                seen.append(value)
                if len(seen) > taken:
                    break
        assert seen == list(range(min(taken + 1, len(schedule.items))))
        schedule.check()

    run_virtually(main())


@given(st.lists(schedules(), min_size=2, max_size=4), st.integers(1, 3))
def test_one_semaphore_bounds_several_calls(several: list[Schedule], permits: int) -> None:
    in_flight = most = 0

    async def main() -> None:
        semaphore = asyncio.Semaphore(permits)

        async def watch(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            nonlocal in_flight, most
            in_flight += 1
            most = max(most, in_flight)
            try:
                return await next_stage(value)
            finally:
                in_flight -= 1

        async def call(schedule: Schedule) -> None:
            pipeline: Pipeline[Item, int] = Pipeline([Pipeline([schedule.work])], middlewares=[watch])
            results = await pipeline.map(schedule.source(), semaphore, return_exceptions=True)
            assert len(results) == len(schedule.items)

        await asyncio.gather(*map(call, several))
        assert most <= permits
        assert not semaphore.locked()

    run_virtually(main())


class Large:
    """Something that nobody wants to keep."""


async def fail(value: Any) -> None:
    await asyncio.sleep(0)
    raise ValueError


async def finish(value: Any) -> None:
    await asyncio.sleep(0)
    raise Finish


async def fail_as_a_group(value: Any) -> None:
    raise ExceptionGroup("", [ValueError(), ExceptionGroup("", [KeyError()])])


async def finish_as_a_group(value: Any) -> None:
    raise BaseExceptionGroup("", [BaseExceptionGroup("", [Finish()])])


async def wait_for_ever(value: Any) -> None:
    await asyncio.sleep(3600)


async def fail_again(value: Any, error: Exception) -> None:
    raise KeyError


OPTIONS: list[dict[str, Any]] = [
    {},
    {"retries": 1},
    {"timeout": 5},
    {"limiter": asyncio.Semaphore(1)},
    {"on_error": fail_again},
    {"retry_budget": RetryBudget()},
]


@pytest.mark.parametrize("hooks", [{}, {"before_stage": lambda name, value: None}], ids=["plain", "hooked"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "".join(options) or "plain")
@pytest.mark.parametrize("how", ["run", "try_run", "map", "return_exceptions", "stream", "outcomes"])
@pytest.mark.parametrize("end", [fail, fail_as_a_group, finish, finish_as_a_group, wait_for_ever])
def test_an_end_keeps_nothing_alive(hooks: Any, options: Any, how: str, end: Any) -> None:
    """No reference cycle runs through an error, its traceback and our frames."""

    async def call(pipeline: Pipeline[Any, Any], items: list[Large]) -> None:
        if how == "run":
            await pipeline.run(items[0], timeout=60)
        elif how == "try_run":
            await pipeline.try_run(items[0], timeout=60)
        elif how in ("map", "return_exceptions"):
            await pipeline.map(items, return_exceptions=how == "return_exceptions", timeout=60)
        else:
            async with pipeline.stream(items, timeout=60) as results:
                async for _ in results if how == "stream" else results.outcomes():
                    pass

    async def main() -> None:
        item = Large()
        reference = weakref.ref(item)
        with contextlib.suppress(StageExecutionError, BatchError):
            await call(Pipeline([Stage("end", end, **options)], **hooks), [item])
        del item
        await asyncio.sleep(0)  # until then the loop holds the future that woke this task
        assert reference() is None

    gc.disable()
    try:
        run_virtually(main())
    finally:
        gc.enable()
