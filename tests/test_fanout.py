"""The rules of fan-out, which ``map`` and ``stream`` share; those of each alone are further down."""

import asyncio
import contextlib
import gc
import io
import itertools
import logging
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from async_pipeline import BatchError, Finish, Outcome, Pipeline, StageExecutionError
from async_pipeline.fanout import Stream
from tests.helpers import Meter, Source, run_virtually

variable: ContextVar[Any] = ContextVar("variable")


def pipeline_of(*handlers: Callable[..., Any]) -> Pipeline[Any, Any]:
    return Pipeline(list(handlers))


async def collect(stream: Stream[Any]) -> list[Any]:
    async with stream as results:
        return [value async for value in results]


async def by_map(pipeline: Pipeline[Any, Any], items: Any, *args: Any, **options: Any) -> list[Any]:
    results: list[Any] = await pipeline.map(items, *args, **options)
    return results


async def by_stream(pipeline: Pipeline[Any, Any], items: Any, *args: Any, **options: Any) -> list[Any]:
    return await collect(pipeline.stream(items, *args, **options))


both = pytest.mark.parametrize("call", [by_map, by_stream], ids=["map", "stream"])


async def suspend(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


class TestOrderAndBounds:
    @both
    async def test_results_stand_in_input_order(self, call: Any) -> None:
        async def later_items_are_faster(value: int) -> int:
            await asyncio.sleep(0.01 * (5 - value))
            return value * 10

        assert await call(pipeline_of(later_items_are_faster), range(5), 5) == [0, 10, 20, 30, 40]

    @both
    @pytest.mark.parametrize(
        "items", [[], (), iter([]), range(0)], ids=["list", "tuple", "iterator", "range"]
    )
    async def test_no_items_give_no_results(self, call: Any, items: Any) -> None:
        assert await call(pipeline_of(suspend), items) == []

    @both
    async def test_any_iterable_is_a_source(self, call: Any) -> None:
        pipeline = pipeline_of(suspend)
        assert await call(pipeline, {"a": 1, "b": 2}) == ["a", "b"]
        assert await call(pipeline, (c for c in "xyz")) == ["x", "y", "z"]
        assert await call(pipeline, Source("xyz")) == ["x", "y", "z"]
        assert await call(pipeline, io.StringIO("one\ntwo\n")) == ["one\n", "two\n"]

    @both
    @pytest.mark.virtual
    @pytest.mark.parametrize("make", [range, lambda n: Source(range(n))], ids=["sync", "async"])
    async def test_never_more_than_concurrency_in_flight(self, call: Any, make: Any) -> None:
        meter = Meter()
        await call(meter.pipeline, make(20), 4)
        assert meter.most == 4
        assert asyncio.get_running_loop().time() == 5.0

    @pytest.mark.virtual
    @pytest.mark.parametrize("is_async", [False, True])
    @pytest.mark.parametrize(("semaphore", "most"), [(False, 3), (True, 4)], ids=["int", "semaphore"])
    async def test_map_never_pulls_further_ahead_than_concurrency(
        self, is_async: bool, semaphore: bool, most: int
    ) -> None:
        """With a semaphore, one item more: it waits for its permit."""
        meter = Meter()
        ahead = []

        def generate() -> Iterator[int]:
            for item in range(30):
                ahead.append(item + 1 - len(meter.finished))
                yield item

        source: Any = Source(generate()) if is_async else generate()
        await meter.pipeline.map(source, asyncio.Semaphore(3) if semaphore else 3)
        assert max(ahead) == most

    @both
    @pytest.mark.virtual
    async def test_a_shared_semaphore_bounds_all_calls_together(self, call: Any) -> None:
        meter, semaphore = Meter(), asyncio.Semaphore(3)
        calls = [call(meter.pipeline, range(10), semaphore) for _ in range(4)]
        assert await asyncio.gather(*calls) == [list(range(10))] * 4
        assert meter.most == 3
        assert not semaphore.locked()

    @pytest.mark.virtual
    async def test_a_semaphore_is_not_held_while_the_source_is_awaited(self) -> None:
        semaphore = asyncio.Semaphore(1)
        slow = asyncio.create_task(by_map(pipeline_of(suspend), Source([1, 2], seconds=100), semaphore))
        await asyncio.sleep(50)
        assert not semaphore.locked()
        assert await by_map(pipeline_of(suspend), [1, 2, 3], semaphore) == [1, 2, 3]
        assert asyncio.get_running_loop().time() == 50
        assert await slow == [1, 2]

    @pytest.mark.virtual
    async def test_a_semaphore_is_not_held_while_the_consumer_works(self) -> None:
        semaphore = asyncio.Semaphore(2)
        async with pipeline_of(suspend).stream(range(10), semaphore, buffer=3) as results:
            async for _ in results:
                await asyncio.sleep(1)
                assert not semaphore.locked()

    async def test_workers_start_as_items_arrive(self) -> None:
        names = set()

        async def remember(value: int) -> None:
            names.add(asyncio.current_task())
            await asyncio.sleep(0)

        await pipeline_of(remember).map([1, 2, 3], 10_000)
        assert len(names) <= 3

    @pytest.mark.virtual
    async def test_workers_that_wait_for_their_turn_end_with_the_source(self) -> None:
        meter = Meter(seconds=0.01)
        assert await meter.pipeline.map(iter(range(20_000)), 1000) == list(range(20_000))
        assert meter.most == 1000
        assert asyncio.get_running_loop().time() == pytest.approx(0.2)

    @pytest.mark.virtual
    async def test_their_number_doubles_with_each_turn(self) -> None:
        meter = Meter()
        turns = 0
        batch = asyncio.create_task(meter.pipeline.map(itertools.count(), 500))
        while meter.most < 500:
            turns += 1
            await asyncio.sleep(0)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert turns < 60

    async def test_handlers_that_never_suspend_need_few_workers(self) -> None:
        tasks = set()

        def remember(value: int) -> None:
            tasks.add(asyncio.current_task())

        await pipeline_of(remember).map(range(10_000), 10_000)
        assert len(tasks) < 500

    async def test_a_hundred_thousand_lazy_items(self) -> None:
        total = 0
        async with pipeline_of(lambda value: value + 1).stream(iter(range(100_000)), 10) as results:
            async for value in results:
                total += value
        assert total == 100_000 * 100_001 // 2


class TestContexts:
    async def test_each_item_gets_a_copy_of_the_context(self) -> None:
        template = {"seen": 0}

        async def count(value: int, context: dict[str, int]) -> int:
            context["seen"] += value
            await asyncio.sleep(0)
            return context["seen"]

        assert await pipeline_of(count).map([1, 2, 3], context=template) == [1, 2, 3]
        assert template == {"seen": 0}

    async def test_without_a_context_each_item_gets_a_dict_of_its_own(self) -> None:
        async def fill(value: int, context: dict[int, int]) -> list[int]:
            context[value] = value
            await asyncio.sleep(0)
            return list(context)

        assert await pipeline_of(fill).map([1, 2, 3]) == [[1], [2], [3]]

    async def test_an_async_generator_keeps_its_own_variables(self) -> None:
        variable.set("the caller's")

        async def generate() -> AsyncIterator[int]:
            variable.set("the generator's")
            for number in range(5):
                yield number

        async def see(value: int) -> Any:
            await asyncio.sleep(0)
            return variable.get()

        assert await pipeline_of(see).map(generate(), 2) == ["the caller's"] * 5
        assert variable.get() == "the caller's"

    @both
    async def test_a_context_that_cannot_be_copied_fails_the_item(self, call: Any) -> None:
        generator: Any = (x for x in "")
        with pytest.raises((TypeError, BatchError)) as caught:
            await call(pipeline_of(suspend), [1], context=generator)
        error = caught.value.exceptions[0] if isinstance(caught.value, BatchError) else caught.value
        assert isinstance(error, TypeError)

    @both
    @pytest.mark.parametrize("concurrency", [1, 3])
    @pytest.mark.parametrize("semaphore", [False, True])
    async def test_items_see_the_callers_variables_and_not_each_others(
        self, call: Any, concurrency: int, semaphore: bool
    ) -> None:
        async def replace(value: int) -> Any:
            before = variable.get()
            variable.set(value)
            await asyncio.sleep(0)
            assert variable.get() == value
            return before

        variable.set("the caller's")
        limit = asyncio.Semaphore(concurrency) if semaphore else concurrency
        assert await call(pipeline_of(replace), range(10), limit) == ["the caller's"] * 10
        assert variable.get() == "the caller's"

    async def test_a_new_variable_reaches_no_other_item(self) -> None:
        fresh: ContextVar[int] = ContextVar("fresh")

        def use(value: int) -> Any:
            before = fresh.get(None)
            fresh.set(value)
            return before

        assert await pipeline_of(use).map(range(5), 1) == [None] * 5

    async def test_an_equal_value_is_still_another_items_value(self) -> None:
        own: list[int] = []
        variable.set(own)

        def replace(value: int) -> bool:
            mine = variable.get() is own
            variable.set([])  # equal to the caller's list, but not it
            return mine

        assert await pipeline_of(replace).map(range(3), 1) == [True] * 3

    async def test_a_variable_put_back_costs_no_new_task(self) -> None:
        variable.set("outer")
        tasks = set()

        def visit(value: int) -> None:
            tasks.add(asyncio.current_task())
            token = variable.set(value)
            variable.reset(token)

        await pipeline_of(visit).map(range(50), 1)
        assert len(tasks) == 1

    async def test_a_sync_generator_keeps_its_own_variables(self) -> None:
        variable.set("the caller's")

        def generate() -> Iterator[Any]:
            for number in range(5):
                before = variable.get()
                variable.set(f"the generator's {number}")
                yield before

        async def see(value: Any) -> tuple[Any, Any]:
            await asyncio.sleep(0)
            return value, variable.get()

        pairs = await pipeline_of(see).map(generate(), 2)
        assert [value for value, _ in pairs] == ["the caller's"] + [f"the generator's {n}" for n in range(4)]
        assert {seen for _, seen in pairs} == {"the caller's"}

    async def test_an_async_source_is_iterated_and_closed_by_one_task(self) -> None:
        source = Source(range(20))
        assert await pipeline_of(suspend).map(source, 4) == list(range(20))
        assert len(source.tasks) == 1
        assert source.closed


class TestCancellation:
    @both
    @pytest.mark.virtual
    @pytest.mark.parametrize("is_async", [False, True])
    @pytest.mark.parametrize("semaphore", [False, True])
    async def test_cancelling_the_call_cancels_the_items_and_closes_the_source(
        self, call: Any, is_async: bool, semaphore: bool
    ) -> None:
        meter = Meter(seconds=10)
        closed = []

        def generate() -> Iterator[int]:
            try:
                yield from itertools.count()
            finally:
                closed.append(True)

        source = Source(itertools.count()) if is_async else generate()
        limit = asyncio.Semaphore(3) if semaphore else 3
        task = asyncio.create_task(call(meter.pipeline, source, limit))
        await asyncio.sleep(15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(meter.cancelled) == [3, 4, 5]
        assert source.closed if isinstance(source, Source) else closed

    @pytest.mark.virtual
    async def test_a_timeout_around_the_call_is_a_timeout(self) -> None:
        meter = Meter(seconds=10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(15):
                await meter.pipeline.map(itertools.count(), 2)
        assert meter.in_flight == 0

    @pytest.mark.virtual
    async def test_a_timeout_ends_handlers_that_never_suspend(self) -> None:
        async def never_suspends(value: int) -> int:
            return value

        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        starts: list[int] = []

        async def mark(value: int) -> None:
            starts.append(turns)
            if len(starts) == 5000:
                scope.reschedule(0)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as scope:
                await pipeline_of(mark, never_suspends).map(itertools.count(), 7)
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
        most = max(len(list(group)) for _, group in itertools.groupby(starts))
        assert most <= 128
        assert len(starts) < 5000 + 256

    @pytest.mark.virtual
    async def test_sync_handlers_under_a_semaphore_leave_the_loop_its_turns(self) -> None:
        starts: list[int] = []

        def mark(value: int) -> None:
            starts.append(value)
            if value == 1000:
                scope.reschedule(0)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as scope:
                await pipeline_of(mark).map(itertools.count(), asyncio.Semaphore(5))
        assert len(starts) < 1000 + 256

    @both
    async def test_awaiting_something_cancelled_is_that_items_failure(self, call: Any) -> None:
        async def await_cancelled(value: int) -> int:
            if value == 1:
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            return value

        pipeline = pipeline_of(await_cancelled)
        with pytest.raises((BatchError, StageExecutionError)) as caught:
            await call(pipeline, range(3), 1)
        error = caught.value.failures[1] if isinstance(caught.value, BatchError) else caught.value
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, asyncio.CancelledError)
        assert error.__cause__ is error.original_error
        assert (error.stage_name, error.item_index, error.item) == ("await_cancelled", 1, 1)

    async def test_a_stray_cancellation_is_named_by_its_path(self) -> None:
        async def await_cancelled(value: int) -> None:
            raise asyncio.CancelledError

        inner = Pipeline([suspend, await_cancelled], name="inner")
        for outer in (Pipeline([inner]), Pipeline([inner], before_stage=lambda name, value: None)):
            [error] = await outer.map([1], return_exceptions=True)
            assert str(error) == "Stage 'inner/await_cancelled' failed: CancelledError()"

    @pytest.mark.parametrize("hook", ["before_stage", "after_stage"])
    async def test_a_stray_cancellation_of_a_hook_is_named_by_its_stage(self, hook: str) -> None:
        async def cancelled(*args: Any) -> None:
            raise asyncio.CancelledError

        pipeline: Pipeline[int, int] = Pipeline([suspend], **{hook: cancelled})  # type: ignore[arg-type]
        [error] = await pipeline.map([1], return_exceptions=True)
        assert str(error) == "Stage 'suspend' failed: CancelledError()"

    async def test_a_handler_that_cancels_itself_fails_alone(self) -> None:
        tasks = {}

        async def cancel_self(value: int) -> int:
            tasks[value] = asyncio.current_task()
            if value == 2:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
            return value

        results = await pipeline_of(cancel_self).map(range(5), 1, return_exceptions=True)
        assert isinstance(results[2], StageExecutionError)
        assert [*results[:2], *results[3:]] == [0, 1, 3, 4]
        assert tasks[2] is not tasks[3], "the worker was replaced: its task stays cancelled"

    async def test_a_handler_that_cancels_itself_and_returns_has_returned(self) -> None:
        async def cancel_self(value: int) -> int:
            if value == 2:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
            return value

        assert await pipeline_of(cancel_self).map(range(5), 1) == [0, 1, 2, 3, 4]

    async def test_a_handler_that_swallows_its_own_cancellation_soils_no_other_item(self) -> None:
        async def swallow(value: int) -> int:
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            return value

        assert await pipeline_of(swallow).map(range(5), 2) == [0, 1, 2, 3, 4]

    @both
    @pytest.mark.parametrize("make", [range, lambda n: Source(range(n))], ids=["sync", "async"])
    @pytest.mark.parametrize("semaphore", [False, True])
    async def test_cancelling_idle_workers_loses_no_item(self, call: Any, make: Any, semaphore: bool) -> None:
        """Someone cancels every task that is not his own, which some test tools and servers do."""
        own = {asyncio.current_task()}
        source = make(12)
        limit = asyncio.Semaphore(2) if semaphore else 3

        async def cancel_the_others(value: int) -> int:
            await asyncio.sleep(0)
            if value == 3:
                pump = source.tasks if isinstance(source, Source) else set()
                for task in asyncio.all_tasks() - own - pump - {asyncio.current_task(), caller}:
                    task.cancel()
            return value

        options = {"return_exceptions": True} if call is by_map else {}
        caller = asyncio.create_task(call(pipeline_of(cancel_the_others), source, limit, **options))
        if call is by_stream:
            with contextlib.suppress(StageExecutionError):
                results = await caller
                assert results == list(range(12))
        else:
            results = await caller
            assert len(results) == 12
            for index, result in enumerate(results):
                assert result == index or isinstance(result.original_error, asyncio.CancelledError)

    @both
    @pytest.mark.virtual
    @pytest.mark.parametrize("concurrency", [1, 3])
    async def test_cancelling_workers_that_wait_for_the_source_loses_no_item(
        self, call: Any, concurrency: int
    ) -> None:
        source = Source(range(6), seconds=10)
        caller = asyncio.create_task(call(pipeline_of(suspend), source, concurrency))
        await asyncio.sleep(5)
        for _ in range(5):
            idle = asyncio.all_tasks() - source.tasks - {asyncio.current_task(), caller}
            assert idle
            for task in idle:
                task.cancel()
            await asyncio.sleep(10)
        assert await caller == list(range(6))
        assert asyncio.get_running_loop().time() == 60, "each item started when it came"

    @both
    @pytest.mark.virtual
    async def test_cancelling_a_worker_that_waits_for_a_permit_loses_no_item(self, call: Any) -> None:
        running = set()

        async def handler(value: int) -> int:
            running.add(asyncio.current_task())
            await asyncio.sleep(10)
            running.discard(asyncio.current_task())
            return value

        caller = asyncio.create_task(call(pipeline_of(handler), range(6), asyncio.Semaphore(2)))
        for _ in range(2):
            await asyncio.sleep(5)
            [waiting] = asyncio.all_tasks() - running - {asyncio.current_task(), caller}
            waiting.cancel()
            await asyncio.sleep(5)
        assert await caller == list(range(6))

    @pytest.mark.virtual
    async def test_a_handler_that_swallows_our_cancellation_ends_the_call_all_the_same(self) -> None:
        async def stubborn(value: int) -> int:
            if value == 0:
                await asyncio.sleep(1)
                raise ValueError
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(5)
            return value

        with pytest.raises(BatchError) as caught:
            await pipeline_of(stubborn).map(range(100), 3)
        assert caught.value.results == {1: 1, 2: 2}
        assert list(caught.value.failures) == [0]
        assert asyncio.get_running_loop().time() == 6


class Alarm(BaseException):
    """No Exception, like KeyboardInterrupt."""


class TestOtherBaseExceptions:
    @both
    @pytest.mark.virtual
    @pytest.mark.parametrize("kind", [Alarm, KeyboardInterrupt, SystemExit, GeneratorExit])
    @pytest.mark.parametrize("return_exceptions", [False, True])
    async def test_they_cancel_everything_and_propagate(
        self, call: Any, kind: type[BaseException], return_exceptions: bool
    ) -> None:
        meter = Meter(seconds=10)
        alarm = kind()

        async def handler(value: int) -> Any:
            if value == 1:
                await asyncio.sleep(5)
                raise alarm
            return await meter(value)

        options = {"return_exceptions": return_exceptions} if call is by_map else {}
        with pytest.raises(kind) as caught:
            await call(pipeline_of(handler), itertools.count(), 3, **options)
        assert caught.value is alarm
        assert sorted(meter.cancelled) == [0, 2]

    @both
    @pytest.mark.parametrize("is_async", [False, True])
    async def test_out_of_a_source_too(self, call: Any, is_async: bool) -> None:
        def generate() -> Iterator[int]:
            yield 1
            raise Alarm

        with pytest.raises(Alarm):
            await call(pipeline_of(suspend), Source(generate()) if is_async else generate(), 2)

    @both
    @pytest.mark.virtual
    async def test_no_cancellation_hides_them(self, call: Any) -> None:
        async def handler(value: int) -> None:
            try:
                await asyncio.sleep(10)
            finally:
                raise Alarm if value == 1 else ValueError

        task = asyncio.create_task(call(pipeline_of(handler), range(3), 3))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(Alarm):
            await task

    @pytest.mark.virtual
    async def test_a_finish_of_a_source_does_not_hide_a_cancellation(self) -> None:
        async def source() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.sleep(100)
            finally:
                raise Finish(7)

        task = asyncio.create_task(pipeline_of(suspend).map(source()))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @both
    async def test_the_first_of_several_is_raised(self, call: Any) -> None:
        async def handler(value: int) -> None:
            if value == 0:
                await asyncio.sleep(0)
                raise Alarm("first")
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                raise Alarm("second")

        with pytest.raises(Alarm, match="first"):
            await call(pipeline_of(handler), range(3), 3)

    async def test_in_a_stream_no_result_comes_after_it(self) -> None:
        async def handler(value: int) -> int:
            if value == 2:
                await asyncio.sleep(0)
                raise Alarm
            return value

        async with pipeline_of(handler).stream(range(3), 3) as results:
            await asyncio.sleep(0.01)
            with pytest.raises(Alarm):
                await anext(results)

    @pytest.mark.parametrize("closing", [False, True])
    async def test_no_error_of_the_body_hides_it(self, closing: bool) -> None:
        def generate() -> Iterator[int]:
            try:
                yield from range(100)
            finally:
                if closing:
                    raise Alarm

        async def handler(value: int) -> int:
            if not closing:
                raise Alarm
            return value

        error = KeyError("the body's")
        with pytest.raises(Alarm) as caught:
            async with pipeline_of(handler).stream(generate(), 2):
                await asyncio.sleep(0.01)
                raise error
        assert caught.value.__context__ is error

    @pytest.mark.virtual
    async def test_an_item_that_fails_in_its_cleanup_does_not_hide_it(self) -> None:
        async def handler(value: int) -> None:
            try:
                await asyncio.sleep(10)
            finally:
                raise ValueError

        def generate() -> Iterator[int]:
            yield from range(3)
            raise Alarm

        with pytest.raises(Alarm):
            await pipeline_of(handler).map(generate(), 5)

    async def test_an_iterable_may_raise_it_at_once(self) -> None:
        class Broken:
            def __iter__(self) -> Iterator[int]:
                raise Alarm

        for call in (by_map, by_stream):
            with pytest.raises(Alarm):
                await call(pipeline_of(suspend), Broken())

    async def test_a_stream_left_before_it_was_seen_raises_it(self) -> None:
        async def handler(value: int) -> int:
            if value == 3:
                raise Alarm
            return value

        async def take_one() -> None:
            async with pipeline_of(handler).stream(range(10), 10) as results:
                async for _ in results:
                    await asyncio.sleep(0.01)
                    break

        with pytest.raises(Alarm):
            await take_one()


class TestSources:
    @both
    @pytest.mark.parametrize("is_async", [False, True])
    async def test_an_error_of_the_source_is_raised_as_itself(self, call: Any, is_async: bool) -> None:
        error = OSError("disk")

        def generate() -> Iterator[int]:
            yield from range(5)
            raise error

        with pytest.raises(OSError, match="disk") as caught:
            await call(pipeline_of(suspend), Source(generate()) if is_async else generate(), 2)
        assert caught.value is error

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("is_async", [False, True])
    async def test_a_stream_raises_it_where_the_item_would_have_been(
        self, ordered: bool, is_async: bool
    ) -> None:
        def generate() -> Iterator[int]:
            yield from range(5)
            raise OSError

        source: Any = Source(generate()) if is_async else generate()
        seen = []
        with pytest.raises(OSError):  # noqa: PT011
            async with pipeline_of(suspend).stream(source, 3, ordered=ordered) as results:
                async for value in results:
                    seen.append(value)
        assert sorted(seen) == list(range(5))

    async def test_a_stream_left_before_its_turn_does_not_raise_it(self) -> None:
        def generate() -> Iterator[int]:
            yield from range(5)
            raise OSError

        async with pipeline_of(suspend).stream(generate(), 10) as results:
            assert await anext(results) == 0
            await asyncio.sleep(0.01)

    async def test_an_error_of_closing_after_an_error_is_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken:
            def __aiter__(self) -> "Broken":
                return self

            async def __anext__(self) -> int:
                raise OSError("reading")

            async def aclose(self) -> None:
                raise OSError("closing")

        for call in (by_map, by_stream):
            with pytest.raises(OSError, match="reading"):
                await call(pipeline_of(suspend), Broken())
        errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
        assert [str(error) for error in errors] == ["closing"] * 2

    @pytest.mark.virtual
    async def test_it_cancels_the_rest_of_a_map(self) -> None:
        meter = Meter(seconds=10)

        async def source() -> AsyncIterator[int]:
            yield 0
            yield 1
            await asyncio.sleep(1)
            raise OSError

        with pytest.raises(OSError):  # noqa: PT011
            await meter.pipeline.map(source(), 5, return_exceptions=True)
        assert sorted(meter.cancelled) == [0, 1]
        assert asyncio.get_running_loop().time() == 1

    @both
    async def test_an_iterable_that_cannot_start_raises_as_itself(self, call: Any) -> None:
        class Broken:
            def __iter__(self) -> Iterator[int]:
                raise OSError("no file")

        class BrokenAsync:
            def __aiter__(self) -> AsyncIterator[int]:
                raise OSError("no socket")

        with pytest.raises(OSError, match="no file"):
            await call(pipeline_of(suspend), Broken())
        with pytest.raises(OSError, match="no socket"):
            await call(pipeline_of(suspend), BrokenAsync())

    async def test_a_source_that_raises_cancelled_error(self) -> None:
        async def source() -> AsyncIterator[int]:
            yield 1
            yield 2
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await pipeline_of(suspend).map(source())
        async with pipeline_of(suspend).stream(source()) as results:
            await asyncio.sleep(0.01)
            assert [await anext(results), await anext(results)] == [1, 2]
            with pytest.raises(asyncio.CancelledError):
                await anext(results)

    @both
    async def test_a_source_that_raises_stop_async_iteration_does_not_end_in_silence(self, call: Any) -> None:
        class Wrong:
            def __iter__(self) -> "Wrong":
                return self

            def __next__(self) -> int:
                raise StopAsyncIteration

        with pytest.raises(RuntimeError, match="the source raised StopAsyncIteration"):
            await call(pipeline_of(suspend), Wrong())

    @both
    async def test_a_sequence_that_has_only_getitem(self, call: Any) -> None:
        class Dataset:
            def __getitem__(self, index: int) -> int:
                if index == 3:
                    raise IndexError
                return index

        assert await call(pipeline_of(suspend), Dataset()) == [0, 1, 2]

    @both
    async def test_a_bounded_semaphore_that_a_handler_releases_too(self, call: Any) -> None:
        semaphore = asyncio.BoundedSemaphore(1)

        def release(value: int) -> None:
            semaphore.release()

        with pytest.raises(ValueError, match="released too many times"):
            await call(pipeline_of(release), [1, 2], semaphore)

    async def test_generators_are_closed_and_files_are_not(self, tmp_path: Any) -> None:
        closed = []

        def generate() -> Iterator[int]:
            try:
                yield from range(100)
            finally:
                closed.append(True)

        async with pipeline_of(suspend).stream(generate(), 2) as results:
            async for _ in results:
                break
        assert closed == [True]

        path = tmp_path / "lines"
        path.write_text("one\ntwo\nthree\n")
        with path.open() as file:
            async with pipeline_of(suspend).stream(file, 1, buffer=1) as results:
                async for line in results:
                    assert line == "one\n"
                    break
            assert not file.closed

    async def test_an_iterable_whose_iter_is_a_generator_is_closed(self) -> None:
        closed = []

        class Items:
            def __iter__(self) -> Iterator[int]:
                try:
                    yield from range(100)
                finally:
                    closed.append(True)

        with pytest.raises(BatchError):
            await pipeline_of(lambda value: 1 // 0).map(Items())
        assert closed == [True]

    async def test_an_async_iterator_without_aclose_will_do(self) -> None:
        class Numbers:
            def __init__(self) -> None:
                self.number = 0

            def __aiter__(self) -> "Numbers":
                return self

            async def __anext__(self) -> int:
                self.number += 1
                if self.number > 3:
                    raise StopAsyncIteration
                return self.number

        assert await pipeline_of(suspend).map(Numbers()) == [1, 2, 3]

    @pytest.mark.virtual
    async def test_an_async_source_is_closed_before_the_call_returns(self) -> None:
        closed_at = []

        async def source() -> AsyncIterator[int]:
            try:
                for number in itertools.count():
                    yield number
            finally:
                await asyncio.sleep(5)
                closed_at.append(asyncio.get_running_loop().time())

        async with pipeline_of(suspend).stream(source()) as results:
            async for _ in results:
                break
        assert closed_at == [5]

    async def test_an_async_source_may_ignore_the_cancellation_once(self) -> None:
        pulled = []

        async def source() -> AsyncIterator[int]:
            for number in itertools.count():
                pulled.append(number)
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    yield -1
                yield number

        async def fail_late(value: int) -> int:
            if value == 3:
                raise ValueError
            return value

        with pytest.raises(BatchError):
            await pipeline_of(fail_late).map(source(), 2)
        assert len(pulled) < 10

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_an_error_while_closing_is_raised_when_nothing_else_is(self, is_async: bool) -> None:
        def generate() -> Iterator[int]:
            try:
                yield from range(100)
            finally:
                raise OSError("closing")

        async def generate_async() -> AsyncIterator[int]:
            try:
                for number in range(100):
                    yield number
            finally:
                raise OSError("closing")

        source: Any = generate_async() if is_async else generate()
        with pytest.raises(OSError, match="closing"):
            async with pipeline_of(suspend).stream(source, 2) as results:
                async for _ in results:
                    break

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_an_error_while_closing_hides_no_other(
        self, is_async: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        def generate() -> Iterator[int]:
            try:
                yield from range(100)
            finally:
                raise OSError("closing")

        async def generate_async() -> AsyncIterator[int]:
            try:
                for number in range(100):
                    yield number
            finally:
                raise OSError("closing")

        make: Any = generate_async if is_async else generate
        with pytest.raises(KeyError):
            async with pipeline_of(suspend).stream(make(), 2) as results:
                async for _ in results:
                    raise KeyError
        with pytest.raises(BatchError):
            await pipeline_of(lambda value: 1 // 0).map(make(), 2)
        records = [record for record in caplog.records if record.name == "async_pipeline"]
        assert [record.levelno for record in records] == [logging.ERROR] * 2
        assert all(record.exc_info and str(record.exc_info[1]) == "closing" for record in records)


class TestMap:
    async def test_a_failure_carries_results_and_failures_by_index(self) -> None:
        async def halve(value: int) -> float:
            await asyncio.sleep(0)
            if value % 2:
                raise ValueError(value)
            return value / 2

        with pytest.raises(BatchError) as caught:
            await pipeline_of(halve).map([0, 2, 4, 5, 6], 1)
        error = caught.value
        assert error.results == {0: 0.0, 1: 1.0, 2: 2.0}
        assert list(error.failures) == [3]
        assert error.exceptions == (error.failures[3],)
        failure = error.failures[3]
        assert isinstance(failure, StageExecutionError)
        assert (failure.item_index, failure.item, failure.attempts) == (3, 5, 1)

    @pytest.mark.virtual
    async def test_the_first_failure_cancels_the_rest(self) -> None:
        meter = Meter(seconds=10)

        async def fail_second(value: int) -> Any:
            if value == 1:
                await asyncio.sleep(1)
                raise ValueError
            return await meter(value)

        with pytest.raises(BatchError):
            await pipeline_of(fail_second).map(itertools.count(), 4)
        assert sorted(meter.cancelled) == [0, 2, 3]
        assert asyncio.get_running_loop().time() == 1

    @pytest.mark.virtual
    async def test_an_item_that_fails_while_it_is_cancelled_is_a_failure_too(self) -> None:
        async def fail_in_cleanup(value: int) -> None:
            if value == 0:
                await asyncio.sleep(1)
                raise ValueError("first")
            try:
                await asyncio.sleep(10)
            finally:
                raise KeyError("cleanup")

        with pytest.raises(BatchError) as caught:
            await pipeline_of(suspend, fail_in_cleanup).map([0, 1], 2)
        assert sorted(caught.value.failures) == [0, 1]

    async def test_failures_stand_in_their_items_place(self) -> None:
        def fail_odd(value: int) -> int:
            if value % 2:
                raise ValueError(value)
            return value

        results: list[Any] = await pipeline_of(fail_odd).map(range(6), 2, return_exceptions=True)
        assert results[::2] == [0, 2, 4]
        assert [error.item_index for error in results[1::2]] == [1, 3, 5]

    async def test_except_star_works(self) -> None:
        caught: list[Exception] = []
        try:
            await pipeline_of(lambda value: 1 // value).map([1, 0], 1)
        except* StageExecutionError as group:
            caught.extend(group.exceptions)
        [error] = caught
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, ZeroDivisionError)

    @both
    async def test_a_stop_async_iteration_does_not_end_the_items_in_silence(self, call: Any) -> None:
        def stop(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            raise StopAsyncIteration

        pipeline: Pipeline[int, int] = Pipeline([suspend], middlewares=[stop])
        with pytest.raises((BatchError, StageExecutionError)) as caught:
            await call(pipeline, [1, 2], 1)
        error = caught.value.failures[0] if isinstance(caught.value, BatchError) else caught.value
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.__cause__, StopAsyncIteration)

    async def test_one_error_raised_for_two_items_names_each(self) -> None:
        error = StageExecutionError("cached", ValueError())

        def same_error(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            raise error

        pipeline: Pipeline[str, int] = Pipeline([suspend], middlewares=[same_error])
        first, second = await pipeline.map("ab", return_exceptions=True)
        assert isinstance(first, StageExecutionError)
        assert isinstance(second, StageExecutionError)
        assert [(first.item_index, first.item), (second.item_index, second.item)] == [(0, "a"), (1, "b")]

    async def test_an_error_of_a_middleware_stays_what_it_is(self) -> None:
        def refuse(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            raise PermissionError

        pipeline: Pipeline[int, int] = Pipeline([suspend], middlewares=[refuse])
        with pytest.raises(BatchError) as caught:
            await pipeline.map([1])
        assert isinstance(caught.value.failures[0], PermissionError)

    async def test_from_inside_itself(self) -> None:
        async def total(value: Any) -> int:
            if isinstance(value, int):
                return value
            return sum(await pipeline.map(value, 2))

        pipeline = pipeline_of(total)
        assert await pipeline.map([1, [2, 3], [4, [5, [6]]]], 2) == [1, 5, 15]

    async def test_a_run_of_a_subclass_is_what_map_calls(self) -> None:
        class Doubled(Pipeline[int, int]):
            async def run(self, initial_value: int, *, context: Any = None, **options: Any) -> int:
                return 2 * await super().run(initial_value, context=context)

        assert await Doubled([suspend]).map([1, 2]) == [2, 4]

    @pytest.mark.parametrize("call", [by_map, by_stream])
    def test_a_semaphore_of_another_event_loop_is_an_error_and_not_a_hang(self, call: Any) -> None:
        semaphore = asyncio.Semaphore(1)
        pipeline = Meter().pipeline
        assert run_virtually(call(pipeline, range(3), semaphore)) == [0, 1, 2]
        with pytest.raises(RuntimeError, match="different event loop"):
            run_virtually(call(pipeline, range(3), semaphore))

    def test_one_pipeline_on_several_event_loops(self) -> None:
        pipeline = Meter().pipeline
        for _ in range(3):
            assert run_virtually(by_map(pipeline, range(5), 2)) == list(range(5))
            assert run_virtually(by_stream(pipeline, Source(range(5)), 2)) == list(range(5))


class TestStream:
    @pytest.mark.virtual
    async def test_the_head_is_yielded_as_soon_as_it_is_ready(self) -> None:
        async with Meter(seconds=1).pipeline.stream(itertools.count(), 3) as results:
            async for value in results:
                if value == 2:
                    break
        assert asyncio.get_running_loop().time() == 1

    @pytest.mark.virtual
    async def test_a_slow_source_holds_no_result_back(self) -> None:
        seen = []
        loop = asyncio.get_running_loop()
        async with pipeline_of(suspend).stream(Source(range(3), seconds=10), 5) as results:
            async for value in results:
                seen.append((value, loop.time()))
        assert seen == [(0, 10), (1, 20), (2, 30)]

    @pytest.mark.virtual
    async def test_unordered_results_come_as_they_finish(self) -> None:
        async def sleep(value: int) -> int:
            await asyncio.sleep(value)
            return value

        assert await by_stream(pipeline_of(sleep), [3, 1, 2], 3, ordered=False) == [1, 2, 3]
        assert await by_stream(pipeline_of(sleep), [3, 1, 2], 3, ordered=True) == [3, 1, 2]

    @pytest.mark.virtual
    @pytest.mark.parametrize("is_async", [False, True])
    @pytest.mark.parametrize(
        ("concurrency", "buffer", "bound"),
        [(3, None, 6), (3, 4, 4), (3, 2, 2), (3, 1, 1), ("semaphore", None, 64), ("semaphore", 5, 5)],
    )
    async def test_the_buffer_bounds_what_is_not_yet_taken(
        self, is_async: bool, concurrency: Any, buffer: int | None, bound: int
    ) -> None:
        pulled = 0

        def generate() -> Iterator[int]:
            nonlocal pulled
            for number in itertools.count():
                pulled += 1
                yield number

        limit = asyncio.Semaphore(3) if concurrency == "semaphore" else concurrency
        source: Any = Source(generate()) if is_async else generate()
        async with Meter().pipeline.stream(source, limit, buffer=buffer) as results:
            for taken in range(1, 6):
                await anext(results)
                await asyncio.sleep(100)  # all that may be pulled is pulled and finished
                assert pulled == taken + bound
                assert f"{bound} ready" in repr(results)

    @pytest.mark.virtual
    async def test_a_slow_head_does_not_let_the_others_run_away(self) -> None:
        meter = Meter()

        async def slow_head(value: int) -> Any:
            if value == 0:
                await asyncio.sleep(100)
            return await meter(value)

        async with pipeline_of(slow_head).stream(itertools.count(), 3, buffer=10) as results:
            assert await anext(results) == 0
            assert len(meter.started) <= 11

    async def test_errors_of_the_body_leave_as_they_are(self) -> None:
        error = KeyError("mine")
        with pytest.raises(KeyError) as caught:
            async with pipeline_of(suspend).stream(itertools.count()) as results:
                async for _ in results:
                    raise error
        assert caught.value is error

    @pytest.mark.virtual
    async def test_a_failed_item_is_raised_in_its_turn_and_ends_the_stream(self) -> None:
        meter = Meter(seconds=5)

        async def fail_third(value: int) -> Any:
            if value == 2:
                raise ValueError
            return await meter(value)

        seen = []
        async with pipeline_of(fail_third).stream(itertools.count(), 4) as results:
            with pytest.raises(StageExecutionError) as caught:
                async for value in results:
                    seen.append(value)
            assert seen == [0, 1]
            assert (caught.value.item_index, caught.value.item) == (2, 2)
            assert [value async for value in results] == []
        assert meter.in_flight == 0

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_nothing_comes_after_the_failed_item(self, ordered: bool) -> None:
        async def stubborn(value: int) -> int:
            if value == 0:
                raise ValueError
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
            return value

        async with pipeline_of(stubborn).stream(range(4), 4, ordered=ordered) as results:
            with pytest.raises(StageExecutionError):
                await anext(results)
            await asyncio.sleep(0.02)
            assert [value async for value in results] == []

    @pytest.mark.virtual
    async def test_outcomes_go_on_after_a_failure(self) -> None:
        async def invert(value: int, context: dict[str, Any]) -> float:
            await asyncio.sleep(value)
            context["value"] = value
            return 1 / value

        pipeline = pipeline_of(invert)
        async with pipeline.stream([2, 0, 1], 3, context={"run": 7}) as results:
            outcomes = [outcome async for outcome in results.outcomes()]
        assert [outcome.ok for outcome in outcomes] == [True, False, True]
        assert outcomes[0] == Outcome(0, 2, 0.5, None, {"run": 7, "value": 2}, 2.0)
        assert outcomes[2].unwrap() == 1.0
        assert outcomes[1].index == 1
        assert isinstance(outcomes[1].error, StageExecutionError)
        with pytest.raises(StageExecutionError):
            outcomes[1].unwrap()

    async def test_iterating_without_entering_shows_the_right_form(self) -> None:
        stream = pipeline_of(suspend).stream([1])
        for misuse in (aiter, aiter_outcomes):
            with pytest.raises(RuntimeError, match=r"async with pipeline\.stream\(items\) as results"):
                misuse(stream)
        with pytest.raises(RuntimeError, match="not entered"):
            await anext(stream)
        assert "not entered" in repr(stream)

    async def test_iterating_after_leaving_is_an_error_too(self) -> None:
        async with pipeline_of(suspend).stream([1, 2]) as results:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            await anext(results)
        with pytest.raises(RuntimeError, match="closed"):
            aiter(results.outcomes())

    async def test_a_stream_is_entered_once(self) -> None:
        stream = pipeline_of(suspend).stream([1, 2])
        assert await collect(stream) == [1, 2]
        with pytest.raises(RuntimeError, match="entered once"):
            await stream.__aenter__()

    @pytest.mark.virtual
    async def test_one_task_at_a_time_may_wait(self) -> None:
        async with Meter().pipeline.stream(range(4), 1) as results:
            waiting = asyncio.create_task(anext(results))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task"):
                await anext(results)
            assert await waiting == 0
            assert await anext(results) == 1

    @pytest.mark.virtual
    async def test_a_consumer_that_gives_up_waiting_loses_nothing(self) -> None:
        async with Meter(seconds=10).pipeline.stream(range(3), 3) as results:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await anext(results)
            assert [value async for value in results] == [0, 1, 2]

    @pytest.mark.virtual
    async def test_in_flight_is_how_many_items_run(self) -> None:
        async with Meter().pipeline.stream(range(10), 3) as results:
            await asyncio.sleep(0.5)
            assert results.in_flight == 3
            assert "3 in flight" in repr(results)
            await asyncio.sleep(100)
            assert results.in_flight == 0
        async with Meter().pipeline.stream(range(10), 3) as results:
            await asyncio.sleep(0.5)
        assert results.in_flight == 0

    async def test_nothing_is_opened_before_it_is_entered(self) -> None:
        source = Source(range(3))
        pipeline_of(suspend).stream(source)
        await asyncio.sleep(0)
        assert source.pulled == 0

    async def test_leaving_at_once_is_fine(self) -> None:
        source = Source(range(3))
        async with pipeline_of(suspend).stream(source) as results:
            pass
        assert (source.pulled, results.in_flight) == (0, 0)
        async with pipeline_of(suspend).stream(range(3)) as results:
            pass
        assert results.in_flight == 0


def aiter_outcomes(stream: Stream[Any]) -> Any:
    return aiter(stream.outcomes())


class TestArguments:
    @pytest.mark.parametrize(
        ("concurrency", "kind", "message"),
        [
            (0, ValueError, "^concurrency must be at least 1$"),
            (-1, ValueError, "^concurrency must be at least 1$"),
            (True, ValueError, "concurrency must be at least 1"),
            (float("nan"), ValueError, "concurrency must be at least 1"),
            (float("inf"), ValueError, "concurrency must be at least 1"),
            (2.0, TypeError, "concurrency must be an int"),
            ("5", TypeError, "concurrency must be an int"),
            (None, TypeError, "concurrency must be an int"),
        ],
    )
    async def test_concurrency(self, concurrency: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            await pipeline_of(suspend).map([1], concurrency)
        with pytest.raises(kind, match=message):
            pipeline_of(suspend).stream([1], concurrency)

    @pytest.mark.parametrize(
        ("buffer", "kind"),
        [(0, ValueError), (True, ValueError), (float("nan"), ValueError), (1.5, TypeError), ("5", TypeError)],
    )
    async def test_buffer(self, buffer: Any, kind: type[Exception]) -> None:
        with pytest.raises(kind, match="buffer must be"):
            pipeline_of(suspend).stream([1], buffer=buffer)

    @pytest.mark.parametrize("items", [5, None, object(), suspend])
    async def test_items(self, items: Any) -> None:
        with pytest.raises(TypeError, match="items must be an iterable or an async iterable, not"):
            await pipeline_of(suspend).map(items)
        with pytest.raises(TypeError, match="items must be an iterable or an async iterable, not"):
            pipeline_of(suspend).stream(items)

    async def test_a_coroutine_instead_of_items_is_closed_and_explained(self) -> None:
        async def fetch_all() -> list[int]:
            return [1]

        coroutine: Any = fetch_all()
        with pytest.raises(TypeError, match=r"fetch_all.*await it first"):
            await pipeline_of(suspend).map(coroutine)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del coroutine
            gc.collect()


@pytest.mark.virtual
async def test_what_has_finished_behind_another_item_can_be_had_before_its_turn() -> None:
    async with pipeline_of(asyncio.sleep).stream([0, 9, 1, 2, 9], 5) as results:
        assert await anext(results) is None
        await asyncio.sleep(5)
        drained = results.drain()
        assert [(outcome.index, outcome.item, outcome.ok) for outcome in drained] == [
            (2, 1, True),
            (3, 2, True),
        ]
        assert results.drain() == []


class TestProgress:
    """Virtual time, so that what is called when is exact."""

    @staticmethod
    def recorder() -> tuple[list[tuple[float, int, int, int | None]], Callable[[int, int, int | None], None]]:
        calls: list[tuple[float, int, int, int | None]] = []
        clock = asyncio.get_running_loop().time
        began = clock()
        return calls, lambda *counts: calls.append((round(clock() - began, 6), *counts))

    @both
    @pytest.mark.virtual
    async def test_is_told_ten_times_a_second_and_at_the_end(self, call: Any) -> None:
        async def work(value: int) -> int:
            await asyncio.sleep(0.03)
            return value

        calls, progress = self.recorder()
        await call(pipeline_of(work), range(8), 1, progress=progress)
        assert calls == [(0.03, 1, 0, 8), (0.13, 4, 0, 8), (0.23, 7, 0, 8), (0.24, 8, 0, 8)]

    @both
    @pytest.mark.virtual
    async def test_is_told_of_the_last_ones_even_if_no_other_ends(self, call: Any) -> None:
        async def work(value: float) -> None:
            await asyncio.sleep(value)

        calls, progress = self.recorder()
        await call(pipeline_of(work), [0.01, 0.02, 9.0], 3, progress=progress)
        assert calls == [(0.01, 1, 0, 3), (0.11, 2, 0, 3), (9.0, 3, 0, 3), (9.0, 3, 0, 3)]

    @both
    async def test_of_nothing_it_is_told_once(self, call: Any) -> None:
        calls, progress = self.recorder()
        await call(pipeline_of(suspend), [], progress=progress)
        assert [counts for _, *counts in calls] == [[0, 0, 0]]

    @both
    @pytest.mark.parametrize(
        ("kind", "total"),
        [(list, 2), (set, 2), (lambda items: dict(enumerate(items)).values(), 2), (iter, None)],
        ids=["list", "set", "view", "iterator"],
    )
    async def test_the_total_is_known_of_what_has_a_length(self, call: Any, kind: Any, total: Any) -> None:
        calls, progress = self.recorder()
        await call(pipeline_of(suspend), kind([1, 2]), progress=progress)
        assert calls[-1][1:] == (2, 0, total)
        assert {known for *_, known in calls} == {total}

    @both
    async def test_an_async_source_has_no_total(self, call: Any) -> None:
        calls, progress = self.recorder()
        await call(pipeline_of(suspend), Source([1, 2]), progress=progress)
        assert calls[-1][1:] == (2, 0, None)

    async def test_failed_items_have_ended_too(self) -> None:
        calls, progress = self.recorder()
        inverted = pipeline_of(lambda x: 1 / x)
        await inverted.map([1, 0, 2, 0], return_exceptions=True, progress=progress)
        assert calls[-1][1:] == (4, 2, 4)
        async with inverted.stream([1, 0, 2, 0], progress=progress) as results:
            assert [outcome.ok async for outcome in results.outcomes()] == [True, False, True, False]
        assert calls[-1][1:] == (4, 2, 4)

    async def test_a_batch_that_fails_tells_how_far_it_came(self) -> None:
        calls, progress = self.recorder()
        with pytest.raises(BatchError):
            await pipeline_of(lambda x: 1 / x).map([1, 0, 2], 1, progress=progress)
        assert calls[-1][1:] == (2, 1, 3)

    async def test_so_does_a_stream_that_is_left(self) -> None:
        calls, progress = self.recorder()
        async with pipeline_of(suspend).stream(itertools.count(), 1, buffer=1, progress=progress) as results:
            async for value in results:
                if value == 3:
                    break
        assert calls[-1][1] >= 4
        assert calls[-1][2:] == (0, None)

    @pytest.mark.virtual
    async def test_so_does_a_batch_that_is_cancelled(self) -> None:
        calls, progress = self.recorder()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pipeline_of(asyncio.sleep).map([0.01, 0.02, 9.0], progress=progress)
        assert calls == [(0.01, 1, 0, 3), (0.05, 2, 0, 3)]

    @both
    async def test_what_it_raises_is_logged(self, call: Any, caplog: pytest.LogCaptureFixture) -> None:
        def broken(done: int, failed: int, total: int | None) -> None:
            raise LookupError(f"at {done}")

        assert await call(pipeline_of(suspend), [1, 2], progress=broken) == [1, 2]
        assert "broken" in caplog.text
        assert "LookupError: at 2" in caplog.text
        assert {record.levelno for record in caplog.records} == {logging.ERROR}

    @both
    @pytest.mark.virtual
    @pytest.mark.parametrize("at", [1, 2, 3])
    async def test_or_handed_to_on_hook_error_whose_error_ends_it(
        self, call: Any, at: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(done: int, failed: int, total: int | None) -> None:
            if done >= at:
                raise LookupError(f"at {done}")

        def on_hook_error(error: Exception) -> None:
            raise error

        pipeline = Pipeline([asyncio.sleep], on_hook_error=on_hook_error)
        with pytest.raises(LookupError, match=f"at {at}"):
            await call(
                pipeline, [0.01, 0.02, 9.0], 3, progress=broken
            )  # called from an item, a timer, at the end
        assert not caplog.records

    async def test_an_on_hook_error_that_raises_nothing_lets_it_go_on(self) -> None:
        errors: list[Exception] = []
        pipeline = Pipeline([suspend], on_hook_error=errors.append)
        assert await pipeline.map([1], progress=lambda done, failed, total: 1 / 0) == [1]
        assert {type(error) for error in errors} == {ZeroDivisionError}

    async def test_what_is_no_exception_ends_it(self) -> None:
        def stop(done: int, failed: int, total: int | None) -> None:
            raise Alarm

        with pytest.raises(Alarm):
            await pipeline_of(suspend).map([1, 2], progress=stop)

    @both
    @pytest.mark.parametrize("progress", [lambda done: None, "print", Meter().__call__])
    async def test_a_wrong_one_is_refused(self, call: Any, progress: Any) -> None:
        with pytest.raises(TypeError, match=r"^progress "):
            await call(pipeline_of(suspend), [1], progress=progress)

    async def test_nothing_is_kept_alive_by_it(self) -> None:
        class Items(list[int]): ...

        items = Items([1, 2])
        gone = weakref.ref(items)
        gc.disable()
        try:
            await pipeline_of(suspend).map(items, progress=lambda done, failed, total: None)
            del items
            assert gone() is None
        finally:
            gc.enable()
