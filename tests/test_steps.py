"""Steps made of steps, each rule by itself; what they do together is in test_composition.py."""

import asyncio
import contextlib
import contextvars
import copy
import pickle
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from async_pipeline import (
    BatchError,
    DeadlineExceeded,
    Event,
    Finish,
    MissingFieldsError,
    Pipeline,
    Stage,
    StageExecutionError,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
)
from async_pipeline.errors import behind
from async_pipeline.middlewares import RetryMiddleware
from async_pipeline.stage import Joinable
from async_pipeline.steps import Branch, Each, Fallback, Keep, Parallel, Require
from tests.helpers import Meter, Source


def same(value: Any) -> Any:
    return value


def increment(value: int) -> int:
    return value + 1


def is_even(value: int) -> bool:
    return value % 2 == 0


def fail(value: Any) -> Any:
    raise ValueError(value)


def finish(value: Any) -> Any:
    raise Finish(value)


def now() -> float:
    return asyncio.get_running_loop().time()


async def forever(value: Any) -> None:
    await asyncio.Event().wait()


async def stray(value: Any) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


def after(seconds: float, then: Callable[[Any], Any] = same) -> Callable[[Any], Coroutine[Any, Any, Any]]:
    """A handler that calls another one after a while."""

    async def handler(value: Any) -> Any:
        await asyncio.sleep(seconds)
        return then(value)

    return handler


def closing(closed: list[float]) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """A handler that needs 2 seconds to clean up, and notes when it has."""

    async def handler(value: Any) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(2)
            closed.append(now())

    return handler


async def untidy(value: Any) -> None:
    try:
        await asyncio.sleep(100)
    finally:
        raise KeyError


async def stubborn(value: Any) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(100)


async def failure(run: Awaitable[Any]) -> StageExecutionError:
    """The error of a run that must fail, which has the cause that it names."""
    with pytest.raises(StageExecutionError) as caught:
        await run
    assert caught.value.__cause__ is caught.value.original_error
    return caught.value


any_parallel: Any = parallel
any_branch: Any = branch
any_require: Any = require


class Fatal(BaseException):
    pass


class Duck:
    """A step that is only known by the protocol."""

    def __init__(self, handler: Callable[[Any], Any] = same, name: str = "duck") -> None:
        self.name = name
        self.handler = handler

    async def run(self, value: Any, *, context: Any = None) -> Any:
        return self.handler(value)


WRAPPERS: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    # how it is built around a step, and how a value gets to that step
    ("parallel", lambda step: parallel({"x": step}), lambda value: value),
    ("each", each, lambda value: [value]),
    ("keep", keep, lambda value: [value]),
    ("branch", lambda step: branch((lambda value: True, step)), lambda value: value),
    ("otherwise", lambda step: branch((lambda value: False, same), otherwise=step), lambda value: value),
    ("predicate", lambda step: branch((step, same), otherwise=same), lambda value: value),
    ("fallback", lambda step: fallback(step), lambda value: value),
    ("alternative", lambda step: fallback(fail, step), lambda value: value),
]
around = pytest.mark.parametrize(
    ("wrap", "lift"), [(wrap, lift) for _, wrap, lift in WRAPPERS], ids=[name for name, *_ in WRAPPERS]
)


@around
class TestEverySteps:
    """What holds for a step inside any of them."""

    async def test_context_is_shared(self, wrap: Any, lift: Any) -> None:
        seen = []

        def remember(value: Any, context: Any) -> bool:
            seen.append(context)
            return True

        context: dict[str, Any] = {}
        await Pipeline([wrap(remember)]).run(lift(1), context=context)
        await wrap(remember).run(lift(1), context=context)
        assert [one is context for one in seen] == [True, True]
        await wrap(remember).run(lift(1))
        assert seen[2] == {}

    @pytest.mark.parametrize("alone", [True, False])
    async def test_errors_are_named_by_the_path_and_wrapped_once(
        self, wrap: Any, lift: Any, alone: bool
    ) -> None:
        step = wrap(Stage("x", fail))
        error = await failure((step if alone else Pipeline([step])).run(lift(7)))
        assert error.stage_name == f"{step.name}/x"
        assert type(error.original_error) is ValueError
        assert str(error) == f"Stage '{step.name}/x' failed: ValueError(7)"
        assert (error.attempts, error.item_index) == (1, None)

    async def test_of_a_pipeline_inside_all_names_are_there(self, wrap: Any, lift: Any) -> None:
        step = wrap(Pipeline([same, Pipeline([fail], name="inner")], name="x"))
        error = await failure(Pipeline([Pipeline([step], name="outer")]).run(lift(7)))
        assert error.stage_name == f"outer/{step.name}/x/inner/fail"
        assert type(error.original_error) is ValueError

    @pytest.mark.parametrize("inside", [Duck(fail, "x"), Pipeline([same], name="x", middlewares=[
        lambda next_stage, name, value, context: fail(value)])], ids=["own run", "middleware"])  # fmt: skip
    async def test_errors_of_own_steps_and_middlewares_are_wrapped_too(
        self, wrap: Any, lift: Any, inside: Any
    ) -> None:
        step = wrap(inside)
        error = await failure(Pipeline([step]).run(lift(7)))
        assert (error.stage_name, type(error.original_error)) == (f"{step.name}/x", ValueError)

    async def test_an_own_step_that_runs_a_stage_keeps_its_name_before_the_stages(
        self, wrap: Any, lift: Any
    ) -> None:
        class Client(Duck):
            async def run(self, value: Any, *, context: Any = None) -> Any:
                return await Stage("fetch", fail).run(value)

        step = wrap(Client(name="x"))
        error = await failure(Pipeline([step]).run(lift(7)))
        assert error.stage_name == f"{step.name}/x/fetch"
        if step.name != "parallel":  # "fet" begins the stage's own name, but is not it
            step = wrap(Client(name="fet"))
            error = await failure(Pipeline([step]).run(lift(7)))
            assert error.stage_name == f"{step.name}/fet/fetch"

    async def test_attempts_are_kept(self, wrap: Any, lift: Any) -> None:
        error = await failure(Pipeline([wrap(Stage("x", fail, retries=2))]).run(lift(7)))
        assert error.attempts == 3

    async def test_a_batch_adds_the_item(self, wrap: Any, lift: Any) -> None:
        step = wrap(Stage("x", fail))
        _, error = await Pipeline([step]).map([lift(1), lift(7)], return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert (error.stage_name, error.item_index, error.item) == (f"{step.name}/x", 1, lift(7))

    async def test_finish_ends_the_run(self, wrap: Any, lift: Any) -> None:
        pipeline = Pipeline([Pipeline([wrap(finish), fail]), fail])
        assert await pipeline.run(lift(7)) == 7
        assert await pipeline.map([lift(7), lift(8)]) == [7, 8]
        assert await wrap(finish).run(lift(7)) == 7

    @pytest.mark.virtual
    async def test_a_group_of_finish_is_a_finish(self, wrap: Any, lift: Any) -> None:
        async def finish_in_group(value: Any) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(after(1, finish)(value))

        assert await Pipeline([wrap(finish_in_group), fail]).run(lift(7)) == 7
        assert await Pipeline([wrap(Stage("x", finish_in_group, retries=1)), fail]).run(lift(7)) == 7

        class Grouped(Duck):
            async def run(self, value: Any, *, context: Any = None) -> Any:
                raise BaseExceptionGroup("", [Finish(value)])

        assert await Pipeline([wrap(Grouped()), fail]).run(lift(7)) == 7
        assert await wrap(Grouped()).run(lift(7)) == 7

    @pytest.mark.virtual
    @pytest.mark.parametrize("error", [Fatal(), BaseExceptionGroup("x", [SystemExit(1)])], ids=repr)
    async def test_what_is_no_exception_leaves_as_it_is(
        self, wrap: Any, lift: Any, error: BaseException
    ) -> None:
        async def end(value: Any) -> None:
            await asyncio.sleep(1)
            raise error

        class Own(Duck):
            async def run(self, value: Any, *, context: Any = None) -> Any:
                raise error

        for step in end, Stage("x", end, retries=1), Own():
            with pytest.raises(type(error)) as caught:
                await Pipeline([wrap(step)]).run(lift(7))
            assert caught.value is error

    @pytest.mark.virtual
    async def test_a_cancellation_reaches_the_handler_and_leaves(self, wrap: Any, lift: Any) -> None:
        meter = Meter(seconds=100)
        task = asyncio.create_task(Pipeline([wrap(meter), fail]).run(lift(7)))
        await asyncio.sleep(1)
        task.cancel("who")
        with pytest.raises(asyncio.CancelledError, match="who"):
            await task
        assert meter.cancelled == [7]
        assert task.cancelled()

    async def test_a_stray_cancellation_is_not_lost(self, wrap: Any, lift: Any) -> None:
        pipeline = Pipeline([wrap(Stage("x", stray)), same])
        with pytest.raises(asyncio.CancelledError):
            await pipeline.run(lift(7))
        (error,) = await pipeline.map([lift(7)], return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert error.stage_name == f"{pipeline.stages[0].name}/x"
        assert isinstance(error.original_error, asyncio.CancelledError)

    @pytest.mark.virtual
    async def test_a_deadline_names_what_it_interrupted(self, wrap: Any, lift: Any) -> None:
        inner = Pipeline([same, Stage("slow", forever, retries=1)], name="x")
        step = wrap(inner)
        pipeline = Pipeline([Pipeline([step, fail], name="outer"), fail])
        error = await failure(pipeline.run(lift(7), timeout=3))
        assert now() == pytest.approx(3)
        assert isinstance(error.original_error, DeadlineExceeded)
        assert error.stage_name == f"outer/{step.name}/x/slow"

    @pytest.mark.virtual
    async def test_a_deadline_names_the_attempts(self, wrap: Any, lift: Any) -> None:
        step = wrap(Stage("x", forever, timeout=2, retries=5))
        error = await failure(Pipeline([step]).run(lift(7), timeout=5))
        assert (error.stage_name, error.attempts) == (f"{step.name}/x", 3)

    @pytest.mark.virtual
    async def test_attempts_that_a_handler_made_elsewhere_do_not_count(self, wrap: Any, lift: Any) -> None:
        async def ask(value: Any) -> Any:
            return await Stage("x", forever, timeout=2, retries=5).run(value)

        step = wrap(Stage("x", ask))
        error = await failure(Pipeline([step]).run(lift(7), timeout=5))
        assert (error.stage_name, error.attempts) == (f"{step.name}/x", 1)

    @pytest.mark.virtual
    async def test_nothing_inside_begins_after_the_deadline(self, wrap: Any, lift: Any) -> None:
        calls = []

        async def stubborn(value: Any) -> bool:
            calls.append(value)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)
            return True

        step = wrap(Pipeline([stubborn, fail], name="x"))
        error = await failure(Pipeline([step, fail]).run(lift(7), timeout=3))
        assert isinstance(error.original_error, DeadlineExceeded)
        assert calls == [7]

    @pytest.mark.virtual
    async def test_retries_inside_know_the_deadline(self, wrap: Any, lift: Any) -> None:
        step = wrap(Stage("x", fail, retries=5, retry_delay=2))
        error = await failure(Pipeline([step]).run(lift(7), timeout=5))
        assert (type(error.original_error), error.attempts) == (ValueError, 3)
        assert now() == pytest.approx(4)

    async def test_a_subclass_goes_through_its_own_run(self, wrap: Any, lift: Any) -> None:
        seen = []

        class Loud(Pipeline[Any, Any]):
            async def run(self, initial_value: Any, **options: Any) -> Any:
                seen.append("pipeline")
                return await super().run(initial_value, **options)

        class LoudStage(Stage[Any, Any]):
            async def run(self, value: Any, *, context: Any = None) -> Any:
                seen.append("stage")
                return await super().run(value, context=context)

        await wrap(Loud([LoudStage("x", same)])).run(lift(7))
        assert seen == ["pipeline", "stage"]

    async def test_a_limiter_of_a_stage_is_used(self, wrap: Any, lift: Any) -> None:
        entered = []

        class Limiter:
            async def __aenter__(self) -> None:
                entered.append("limiter")

            async def __aexit__(self, *error: object) -> None: ...

        await wrap(Stage("x", same, limiter=Limiter())).run(lift(7))
        assert entered == ["limiter"]

    @pytest.mark.threads
    async def test_an_executor_of_a_stage_is_used(self, wrap: Any, lift: Any) -> None:
        threads = []

        def work(value: Any) -> Any:
            threads.append(threading.get_ident())
            return value

        await wrap(Stage("x", work, executor="thread")).run(lift(7))
        assert threads
        assert threads != [threading.get_ident()]

    async def test_outer_hooks_and_middlewares_see_one_stage(self, wrap: Any, lift: Any) -> None:
        seen = []

        async def middleware(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            seen.append(("middleware", name))
            return await next_stage(value)

        step = wrap(same)
        await Pipeline(
            [step],
            before_stage=lambda name, value: seen.append(("before", name)),
            after_stage=lambda name, value, output, error: seen.append(("after", name)),
            middlewares=[middleware],
        ).run(lift(7))
        assert seen == [("before", step.name), ("middleware", step.name), ("after", step.name)]

    @pytest.mark.virtual
    async def test_hooks_of_a_pipeline_inside_are_called(self, wrap: Any, lift: Any) -> None:
        seen = []

        def remember(name: str, value: Any, output: Any, error: Any) -> None:
            seen.append((name, type(error)))

        inner = Pipeline([same, Stage("slow", forever)], after_stage=remember)
        await failure(Pipeline([wrap(inner)]).run(lift(7), timeout=3))
        assert seen == [("same", type(None)), ("slow", asyncio.CancelledError)]

    @pytest.mark.virtual
    async def test_it_runs_often_and_in_several_event_loops(self, wrap: Any, lift: Any) -> None:
        pipeline = Pipeline([wrap(after(1))])
        expected = await pipeline.run(lift(7))
        assert await asyncio.gather(*(pipeline.run(lift(7)) for _ in range(3))) == [expected] * 3
        assert await asyncio.to_thread(lambda: asyncio.run(Pipeline([wrap(same)]).run(lift(7)))) == expected

    @pytest.mark.virtual
    async def test_cancel_requests_of_the_task_stay_what_they_were(self, wrap: Any, lift: Any) -> None:
        with pytest.raises(StageExecutionError):
            await wrap(after(1, fail)).run(lift(7))
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    def test_is_immutable_and_has_a_name(self, wrap: Any, lift: Any) -> None:
        step = wrap(same)
        with pytest.raises(AttributeError, match=r"is immutable; make another for another 'name'"):
            step.name = "other"
        assert isinstance(step.name, str)
        assert not hasattr(step, "__dict__")


class TestParallel:
    @pytest.mark.virtual
    async def test_one_input_to_all_and_a_dict_by_name(self) -> None:
        step = parallel(slow=after(2, increment), quick=increment, stage=Stage("other", after(1)))
        assert await step.run(1) == {"slow": 2, "quick": 2, "stage": 1}
        assert [*(await step.run(1))] == ["slow", "quick", "stage"]
        assert now() == pytest.approx(4)  # 2 seconds each time: they ran at the same time
        assert isinstance(step, Parallel)
        assert step.name == "parallel"

    async def test_takes_a_mapping_for_names_that_are_no_identifiers(self) -> None:
        step = parallel({"list price": increment, "name": same}, name="enrich", more=same)
        assert await step.run(1) == {"list price": 2, "name": 1, "more": 1}
        assert step.name == "enrich"
        assert [*step.steps] == ["list price", "name", "more"]

    async def test_a_step_is_known_by_its_name_here(self) -> None:
        step = parallel(
            {
                "price": Stage("find_price", fail),
                "stock": Pipeline([Stage("count", fail)], name="counting"),
                "own": Duck(fail),
            },
            name="enrich",
        )
        error: Any = await failure(step.run(7))
        assert [part.stage_name for part in error.original_error.exceptions] == [
            "enrich/price",
            "enrich/stock/count",
            "enrich/own",
        ]

    async def test_the_name_of_a_pipeline_is_replaced_as_a_whole(self) -> None:
        error = await failure(parallel(a=Pipeline([Stage("pipelines", fail)])).run(7))
        assert error.stage_name == "parallel/a/pipelines"
        error = await failure(parallel(a=Duck(lambda value: fail(value), name="d/u")).run(7))
        assert error.stage_name == "parallel/a"

    @pytest.mark.virtual
    async def test_one_failure_cancels_the_others(self) -> None:
        meter = Meter(seconds=100)
        error = await failure(parallel(slow=meter, bad=after(1, fail)).run(7))
        assert error.stage_name == "parallel/bad"
        assert meter.cancelled == [7]
        assert now() == pytest.approx(1)

    @pytest.mark.virtual
    @pytest.mark.parametrize("handler", [fail, after(1, fail)], ids=["at once", "later"])
    async def test_several_simultaneous_failures_are_one_group(self, handler: Any) -> None:
        pipeline = Pipeline([Pipeline([parallel(a=handler, b=after(1), c=handler)], name="outer")])
        error = await failure(pipeline.run(7))
        assert error.stage_name == "outer/parallel"
        assert isinstance(error.original_error, ExceptionGroup)
        assert str(error.original_error) == "2 failed (2 sub-exceptions)"
        parts: Any = error.original_error.exceptions
        assert [part.stage_name for part in parts] == ["outer/parallel/a", "outer/parallel/c"]
        assert [type(part.original_error) for part in parts] == [ValueError, ValueError]
        assert str(parts[0]) == "Stage 'outer/parallel/a' failed: ValueError(7)"

    async def test_in_a_batch_each_error_of_the_group_has_the_item(self) -> None:
        pipeline = Pipeline([each(parallel(a=fail, b=fail))])
        with pytest.raises(BatchError) as caught:
            await pipeline.map([[], [7]])
        error: Any = caught.value.failures[1]
        parts = error.original_error.exceptions
        assert [(part.item_index, part.item, part.element) for part in (error, *parts)] == [
            (1, [7], (0,))
        ] * 3
        assert [part.stage_name for part in parts] == ["each/parallel/a", "each/parallel/b"]
        for twin in pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error):
            assert repr(twin) == repr(error)
            assert twin.__cause__ is twin.original_error
            assert [part.element for part in twin.original_error.exceptions] == [(0,), (0,)]
        second = error.of_item(5, "other")
        assert [part.item_index for part in second.original_error.exceptions] == [5, 5]
        assert [part.item_index for part in parts] == [1, 1]

    @pytest.mark.virtual
    async def test_a_failure_during_cleaning_up_comes_with_the_first(self) -> None:
        async def untidy(value: Any) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                raise OSError("while cleaning up")

        error: Any = await failure(parallel(untidy=untidy, bad=after(1, fail)).run(7))
        assert isinstance(error.original_error, ExceptionGroup)
        parts: Any = error.original_error.exceptions
        assert [part.stage_name for part in parts] == ["parallel/bad", "parallel/untidy"]

    async def test_a_failure_wins_over_a_finish(self) -> None:
        for step in parallel(a=finish, b=fail), parallel(a=fail, b=finish):
            assert (await failure(step.run(7))).stage_name in ("parallel/a", "parallel/b")

    async def test_a_finish_wins_over_a_stray_cancellation(self) -> None:
        assert await Pipeline([parallel(a=stray, b=finish)]).run(7) == 7
        assert await Pipeline([parallel(a=finish, b=stray)]).run(7) == 7

    async def test_the_first_finish_wins(self) -> None:
        def finish_a(value: Any) -> None:
            raise Finish("a")

        def finish_b(value: Any) -> None:
            raise Finish("b")

        assert await Pipeline([parallel(a=finish_a, b=finish_b)]).run(7) == "a"

    @pytest.mark.virtual
    async def test_a_finish_cancels_the_others(self) -> None:
        meter = Meter(seconds=100)
        assert await Pipeline([parallel(a=meter, b=after(1, finish))]).run(7) == 7
        assert meter.cancelled == [7]
        assert now() == pytest.approx(1)

    @pytest.mark.virtual
    async def test_a_stray_cancellation_cancels_the_others(self) -> None:
        meter = Meter(seconds=100)
        with pytest.raises(asyncio.CancelledError):
            await parallel(a=meter, b=stray).run(7)
        assert meter.cancelled == [7]

    @pytest.mark.virtual
    async def test_a_result_of_one_that_is_being_cancelled_does_not_count(self) -> None:
        async def stubborn(value: Any) -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)
            return "late"

        assert (await failure(parallel(a=stubborn, b=after(1, fail)).run(7))).stage_name == "parallel/b"

    @pytest.mark.virtual
    async def test_who_cleans_up_is_cancelled_once(self) -> None:
        closed: list[float] = []
        tidy = closing(closed)

        task = asyncio.create_task(parallel(a=forever, b=tidy, c=tidy).run(7))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [3, 3]
        await failure(Pipeline([parallel(a=forever, b=tidy)]).run(7, timeout=1))
        assert closed[2:] == [6]
        await failure(parallel(bad=after(1, fail), untidy=untidy, b=tidy).run(7))
        assert closed[3:] == [9]

    @pytest.mark.virtual
    async def test_who_cleans_up_is_cancelled_once_after_a_handler_that_cancels_its_own_run(self) -> None:
        closed: list[float] = []

        def give_up(value: Any) -> Any:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return value

        tidy = closing(closed)

        task = asyncio.create_task(Pipeline([give_up, parallel(a=forever, b=tidy)]).run(7))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [2]

    @pytest.mark.virtual
    async def test_who_cleans_up_is_cancelled_once_whatever_the_others_do(self) -> None:
        closed: list[float] = []
        tidy = closing(closed)

        task = asyncio.create_task(parallel(a=untidy, b=tidy, c=untidy).run(7))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [3]

    async def test_what_is_no_exception_goes_before_failures(self) -> None:
        def fatal(value: Any) -> None:
            raise Fatal(value)

        def fatal_too(value: Any) -> None:
            raise BaseExceptionGroup("second", [SystemExit()])

        for step in parallel(a=fail, b=fatal, c=finish), parallel(a=fatal, b=fatal_too, c=fail):
            with pytest.raises(Fatal):
                await step.run(7)

    @pytest.mark.virtual
    async def test_each_has_attempts_of_its_own(self) -> None:
        def often(value: Any) -> Any:
            raise OSError

        saved = Stage("often", often, retries=4, retry_delay=0.1, on_error=lambda value, error: value)
        slow = Pipeline([stubborn, same], name="slow")
        error = await failure(Pipeline([parallel(slow=slow, saved=saved)]).run(7, timeout=3))
        assert (error.stage_name, error.attempts) == ("parallel/slow/stubborn", 1)
        one_of_both = branch((lambda value: value == 0, slow), otherwise=saved)
        error = await failure(Pipeline([each(one_of_both)]).run([0, 1], timeout=3))
        assert (error.stage_name, error.attempts) == ("each/branch/slow/stubborn", 1)

    @pytest.mark.virtual
    async def test_a_failure_at_the_moment_of_a_cancellation_cancels_once(self) -> None:
        closed: list[float] = []
        tidy = closing(closed)

        task = asyncio.create_task(parallel(bad=after(1, fail), b=tidy).run(7))
        asyncio.get_running_loop().call_later(1, task.cancel)
        with pytest.raises((asyncio.CancelledError, StageExecutionError)):
            await task
        assert closed == [3]

    @pytest.mark.virtual
    async def test_a_failure_before_the_deadline_stands_behind_it(self) -> None:
        async def tidy(value: Any) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(2)

        async def source() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(2)

        for step in parallel(bad=after(1, fail), b=tidy), each(after(1, fail)):
            error = await failure(Pipeline([lambda value: source(), step]).run(7, timeout=2))
            assert isinstance(error.original_error, DeadlineExceeded)
            hidden = behind(error.original_error, StageExecutionError)
            assert isinstance(hidden, StageExecutionError)
            assert type(hidden.original_error) is ValueError

    @pytest.mark.virtual
    async def test_what_is_no_exception_goes_before_a_cancellation(self) -> None:
        async def fatal(value: Any) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                raise Fatal

        for step in parallel(a=fatal, b=forever), each(fatal), keep(fatal):
            for pipeline in Pipeline([step]), Pipeline([step], name="hooked", before_stage=print):
                task = asyncio.create_task(pipeline.run([7]))
                await asyncio.sleep(1)
                task.cancel()
                with pytest.raises(Fatal):
                    await task

    @pytest.mark.virtual
    async def test_a_branch_that_blocks_the_loop_past_the_deadline_is_the_last(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = asyncio.get_running_loop()
        real, blocked = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + blocked)
        calls: list[Any] = []

        def block(value: Any) -> None:
            nonlocal blocked
            blocked += 5

        error = await failure(Pipeline([parallel(a=block, b=calls.append)]).run(7, timeout=3))
        assert isinstance(error.original_error, DeadlineExceeded)
        assert calls == []

    async def test_a_branch_that_is_cancelled_before_it_began(self) -> None:
        def cancel_others(value: Any) -> None:
            for task in asyncio.all_tasks():
                if "_Branches" in repr(task.get_coro()) and task is not asyncio.current_task():
                    task.cancel()

        if asyncio.get_running_loop().get_task_factory() is not None:
            pytest.skip("eager tasks begin at once")
        (error,) = await Pipeline([parallel(a=cancel_others, b=same)]).map([7], return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, asyncio.CancelledError)
        assert error.stage_name == "parallel/b"

    @pytest.mark.virtual
    async def test_context_variables_of_one_reach_no_other(self) -> None:
        variable = contextvars.ContextVar("variable", default=0)

        async def set_it(value: int) -> int:
            variable.set(variable.get() + value)
            await asyncio.sleep(1)
            return variable.get()

        variable.set(10)
        pipeline = Pipeline([parallel(a=set_it, b=set_it), lambda results: (results, variable.get())])
        assert await pipeline.run(1) == ({"a": 11, "b": 11}, 10)

    @pytest.mark.virtual
    async def test_a_deadline_names_what_is_common_to_all_that_ran(self) -> None:
        step = parallel({"a": Pipeline([forever]), "b": forever, "c": same}, name="enrich")
        error = await failure(Pipeline([step]).run(7, timeout=1))
        assert error.stage_name == "enrich"
        deep = parallel(a=Pipeline([parallel(b=Pipeline([forever, same]), c=forever)], name="p"))
        error = await failure(Pipeline([deep]).run(7, timeout=1))
        assert error.stage_name == "parallel/a/parallel"

    async def test_a_cancellation_before_it_began(self) -> None:
        if asyncio.get_running_loop().get_task_factory() is not None:
            pytest.skip("eager tasks begin at once")
        calls: list[Any] = []
        task = asyncio.create_task(parallel(a=calls.append).run(7))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert calls == []

    @pytest.mark.virtual  # uvloop and eager tasks do not go together on every Python
    @pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has eager tasks since 3.12")
    async def test_under_eager_tasks_all_begin_before_one_is_cancelled(self) -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
        seen: list[Any] = []
        error = await failure(parallel(bad=fail, other=seen.append).run(7))
        assert (error.stage_name, seen) == ("parallel/bad", [7])

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: any_parallel(), ValueError, "parallel requires at least one step"),
            (lambda: any_parallel({}), ValueError, "parallel requires at least one step"),
            (lambda: any_parallel({"a": same}, a=same), ValueError, "step 'a' of parallel is given twice"),
            (lambda: any_parallel({1: same}), TypeError, "the names of parallel's steps must be str, not 1"),
            (
                lambda: any_parallel([same]),
                TypeError,
                "steps must be a mapping of names to steps, not .*write",
            ),
            (
                lambda: any_parallel(price=5),
                TypeError,
                "step 'price' of parallel must be a stage, a pipeline, a callable, or an object with name "
                "and run, not 5",
            ),
            (
                lambda: any_parallel(name=same),
                TypeError,
                r'name must be a str, not .*; for a step of this name write parallel\(\{"name": step\}\)',
            ),
        ],
    )
    def test_misuse(self, build: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            build()


class TestEach:
    @pytest.mark.virtual
    @pytest.mark.parametrize(
        "elements",
        [list, tuple, iter, dict.fromkeys, Source],
        ids=["list", "tuple", "iterator", "dict", "async"],
    )
    async def test_in_order_of_any_iterable(self, elements: Any) -> None:
        async def wait(value: int) -> int:
            await asyncio.sleep(value)
            return -value

        assert await each(wait).run(elements([3, 1, 2])) == [-3, -1, -2]
        assert now() == pytest.approx(3)

    async def test_of_nothing(self) -> None:
        assert await each(fail).run([]) == []
        assert await each(fail).run("") == []
        assert await each(fail).run(Source([])) == []

    async def test_split_each_merge(self) -> None:
        pipeline = Stage("split", str.split) | each(len, concurrency=2) | (lambda sizes: sum(sizes))
        assert await pipeline.run("a bcd ef") == 6
        assert await pipeline.map(["a b", "", "abc"]) == [2, 0, 3]

    @pytest.mark.virtual
    async def test_concurrency_bounds_what_is_in_flight(self) -> None:
        for concurrency, expected in ((1, 1), (7, 7), (asyncio.Semaphore(3), 3)):
            meter = Meter()
            assert await each(meter, concurrency).run(range(30)) == [*range(30)]
            assert meter.most == expected
        meter = Meter()
        await each(meter).run(range(30))
        assert meter.most == 5

    @pytest.mark.virtual
    async def test_one_semaphore_bounds_several_runs(self) -> None:
        meter = Meter()
        step = each(meter, asyncio.Semaphore(4))
        await Pipeline([step]).map([range(10)] * 3)
        assert meter.most == 4

    @pytest.mark.virtual
    async def test_elements_are_pulled_as_they_are_needed_and_generators_closed(self) -> None:
        source = Source(range(1000))
        meter = Meter(seconds=1)
        task = asyncio.create_task(each(meter, 3).run(source))
        await asyncio.sleep(2.5)
        assert 9 <= source.pulled <= 10
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert source.closed

    @pytest.mark.parametrize("value", [7, None, 2.5, object()], ids=repr)
    async def test_a_value_that_is_not_iterable(self, value: Any) -> None:
        error = await failure(Pipeline([Pipeline([each(fail, name="rows")], name="outer")]).run(value))
        assert error.stage_name == "outer/rows"
        assert isinstance(error.original_error, TypeError)
        assert str(error.original_error) == (
            f"the value that 'rows' gets must be an iterable or an async iterable, not {type(value).__name__}"
        )

    async def test_a_value_whose_length_can_not_be_had(self) -> None:
        class Broken(list[int]):
            def __len__(self) -> int:
                raise OSError("no length")

        error = await failure(Pipeline([each(same)]).run(Broken()))
        assert (error.stage_name, type(error.original_error)) == ("each", OSError)

    async def test_a_coroutine_has_to_be_awaited_first(self) -> None:
        error = await failure(each(same).run(forever(1)))  # type: ignore[arg-type]
        assert str(error.original_error).startswith("the value that 'each' gets must be an iterable, not")
        assert str(error.original_error).endswith("await it first")

    @pytest.mark.virtual
    async def test_a_failing_element_is_the_failure_of_each(self) -> None:
        meter = Meter(seconds=1)

        async def work(value: int) -> Any:
            return fail(value) if value == 3 else await meter(value)

        error = await failure(Pipeline([each(work, 2)]).run(range(10)))
        assert (error.stage_name, error.element) == ("each/work", (3,))
        assert type(error.original_error) is ValueError
        assert not isinstance(error, BatchError)
        assert (meter.finished, meter.cancelled) == ([0, 1], [2])

    async def test_elements_in_elements(self) -> None:
        pipeline = Pipeline([each(each(Stage("work", lambda value: 1 / value)))])
        error = await failure(pipeline.run([[1], [], [1, 0, 1]]))
        assert (error.stage_name, error.element) == ("each/each/work", (2, 1))
        assert await pipeline.run([[1], [2, 4]]) == [[1], [0.5, 0.25]]

    @pytest.mark.virtual
    async def test_failures_while_cleaning_up_come_with_the_first(self) -> None:
        async def untidy(value: int) -> None:
            try:
                await asyncio.sleep(value)
            except asyncio.CancelledError:
                raise OSError(value) from None
            fail(value)

        error = await failure(Pipeline([each(untidy)]).run([2, 1, 3]))
        assert (error.stage_name, error.element) == ("each", ())
        assert isinstance(error.original_error, ExceptionGroup)
        parts: Any = error.original_error.exceptions
        assert [(part.stage_name, part.element) for part in parts] == [
            ("each/untidy", (1,)),
            ("each/untidy", (0,)),
            ("each/untidy", (2,)),
        ]

    @pytest.mark.virtual
    async def test_a_failure_wins_over_a_finish_of_a_cancelled_element(self) -> None:
        async def late_finish(value: int) -> None:
            try:
                await asyncio.sleep(value)
            except asyncio.CancelledError:
                raise Finish(value) from None
            fail(value)

        error = await failure(Pipeline([each(late_finish)]).run([2, 1]))
        assert (error.stage_name, error.element) == ("each/late_finish", (1,))

    @pytest.mark.virtual
    async def test_a_finish_ends_the_run_and_cancels_the_rest(self) -> None:
        meter = Meter(seconds=100)

        async def work(value: int) -> Any:
            return finish("enough") if value == 1 else await meter(value)

        assert await Pipeline([each(work), fail]).run(range(5)) == "enough"
        assert meter.started == meter.cancelled

    async def test_an_error_of_the_iterable_is_the_failure_of_each(self) -> None:
        def broken() -> Iterator[int]:
            yield 1
            raise OSError("gone")

        async def broken_later() -> AsyncIterator[int]:
            yield 1
            raise OSError("gone")

        for elements in broken(), broken_later():
            error = await failure(Pipeline([each(same, name="rows")]).run(elements))
            assert (error.stage_name, error.element) == ("rows", ())
            assert isinstance(error.original_error, OSError)

    @pytest.mark.virtual
    async def test_an_error_of_the_iterable_does_not_hide_one_of_an_element(self) -> None:
        async def untidy(value: int) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                raise ValueError("untidy")

        async def broken() -> AsyncIterator[int]:
            yield 1
            await asyncio.sleep(1)
            raise OSError("gone")

        error: Any = await failure(Pipeline([each(untidy)]).run(broken()))
        assert sorted(part.stage_name for part in error.original_error.exceptions) == ["each", "each/untidy"]

    @pytest.mark.parametrize("ended", [Finish(7), asyncio.CancelledError("source"), Fatal()])
    async def test_what_else_an_iterable_may_raise(self, ended: BaseException) -> None:
        def source() -> Iterator[int]:
            yield 1
            raise ended

        run = Pipeline([each(same), fail]).run(source())
        if isinstance(ended, Finish):
            assert await run == 7
        else:
            with pytest.raises(type(ended)) as caught:
                await run
            assert caught.value is ended

    @pytest.mark.virtual
    async def test_context_variables_of_one_reach_no_other(self) -> None:
        variable = contextvars.ContextVar("variable", default=0)

        async def set_it(value: int) -> int:
            variable.set(variable.get() + value)
            await asyncio.sleep(1)
            return variable.get()

        variable.set(10)
        assert await each(set_it, 2).run([1, 2, 3]) == [11, 12, 13]
        assert variable.get() == 10

    async def test_all_elements_share_one_context_object(self) -> None:
        def count(value: int, context: dict[str, int]) -> None:
            context["count"] = context.get("count", 0) + value

        context: dict[str, int] = {}
        await Pipeline([each(count)]).run([1, 2, 3], context=context)
        assert context == {"count": 6}

    @pytest.mark.virtual
    async def test_elements_that_block_the_loop_end_with_the_deadline(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = asyncio.get_running_loop()
        real, blocked = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + blocked)
        seen = []

        def block(value: int) -> None:
            nonlocal blocked
            seen.append(value)
            blocked += 1

        error = await failure(Pipeline([each(block, 1), fail]).run(range(10), timeout=2.5))
        assert isinstance(error.original_error, DeadlineExceeded)
        assert (error.stage_name, seen) == ("each/block", [0, 1, 2])

    @pytest.mark.virtual
    async def test_a_deadline_names_the_attempts_when_one_element_ran(self) -> None:
        step = each(Stage("slow", forever, timeout=2, retries=9))
        error = await failure(Pipeline([step]).run([7], timeout=5))
        assert (error.stage_name, error.attempts) == ("each/slow", 3)
        error = await failure(Pipeline([step]).run([7, 8], timeout=5))
        assert (error.stage_name, error.attempts) == ("each/slow", 1)

    @pytest.mark.parametrize("make", [each, keep])
    def test_misuse(self, make: Any) -> None:
        with pytest.raises(
            TypeError, match=r"^(step|predicate) must be a stage, a pipeline, a callable, .*, not 5"
        ):
            make(5)
        with pytest.raises(ValueError, match=r"^concurrency must be at least 1$"):
            make(same, 0)
        with pytest.raises(TypeError, match=r"^concurrency must be an int"):
            make(same, "many")
        with pytest.raises(TypeError, match=r"^name must be a str, not 5$"):
            make(same, name=5)


class TestKeep:
    @pytest.mark.virtual
    async def test_the_elements_for_which_the_predicate_holds_in_order(self) -> None:
        async def is_even_later(value: int) -> bool:
            await asyncio.sleep(10 - value)
            return value % 2 == 0

        assert await keep(is_even).run(range(6)) == [0, 2, 4]
        assert await keep(is_even_later).run(range(6)) == [0, 2, 4]
        assert await keep(is_even_later, concurrency=1).run(Source(range(6))) == [0, 2, 4]
        assert await keep(Stage("even", is_even)).run(iter(range(6))) == [0, 2, 4]
        assert await keep(bool).run([0, None, "x", [], [0]]) == ["x", [0]]
        assert await keep(same).run([]) == []

    async def test_elements_that_are_false_or_none_are_kept_as_well(self) -> None:
        assert await keep(lambda value: True).run([0, None, False]) == [0, None, False]

    async def test_what_the_predicate_returns_has_to_be_true_or_false(self) -> None:
        class Undecided:
            def __init__(self, error: BaseException) -> None:
                self.error = error

            def __bool__(self) -> bool:
                raise self.error

        error = await failure(Pipeline([keep(Stage("undecided", Undecided))]).run([ValueError("ambiguous")]))
        assert (error.stage_name, error.element) == ("keep/undecided", (0,))
        assert str(error.original_error) == "ambiguous"
        assert await Pipeline([keep(Undecided), fail]).run([Finish(7), Finish(8)]) == 7
        with pytest.raises(Fatal):
            await keep(Undecided).run([Fatal()])

    async def test_a_failing_predicate_is_the_failure_of_keep(self) -> None:
        error = await failure(Pipeline([keep(fail)]).run([7]))
        assert (error.stage_name, error.element) == ("keep/fail", (0,))

    async def test_a_value_that_is_not_iterable(self) -> None:
        error = await failure(keep(same).run(7))  # type: ignore[arg-type]
        assert (error.stage_name, type(error.original_error)) == ("keep", TypeError)


class TestBranch:
    @pytest.mark.virtual
    async def test_the_first_predicate_that_holds(self) -> None:
        async def is_big(value: int) -> bool:
            await asyncio.sleep(1)
            return value > 9

        asked = []

        def is_odd(value: int, context: Any) -> int:
            asked.append(value)
            return value % 2

        step = branch((is_big, lambda value: "big"), (is_odd, lambda value: "odd"), otherwise=same)
        assert [await step.run(value) for value in (11, 3, 4)] == ["big", "odd", 4]
        assert asked == [3, 4]

    async def test_no_match_and_no_otherwise(self) -> None:
        pipeline = Pipeline([Pipeline([branch((is_even, same), name="kind")], name="outer")])
        assert await pipeline.run(2) == 2
        assert (await failure(pipeline.run(1))).stage_name == "outer/kind"

    async def test_no_match_says_what_to_write(self) -> None:
        error = await failure(branch((is_even, same), (Stage("is_huge", lambda v: v > 9), same)).run(7))
        assert error.stage_name == "branch"
        assert isinstance(error.original_error, ValueError)
        assert str(error.original_error) == (
            "none of is_even, is_huge holds for this value (int), and there is no otherwise=; "
            "write branch(..., otherwise=step)"
        )

    async def test_no_other_step_is_run(self) -> None:
        assert await branch((is_even, same), (fail, fail), otherwise=fail).run(2) == 2

    async def test_context_variables_stay_set(self) -> None:
        variable = contextvars.ContextVar("variable", default=0)
        step = branch((lambda value: variable.set(value), same))
        assert await Pipeline([step, lambda value: variable.get()]).run(7) == 7

    @pytest.mark.virtual
    async def test_after_a_predicate_that_outlived_the_deadline_no_step_begins(self) -> None:
        async def stubborn(value: Any) -> bool:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)
            return True

        calls: list[Any] = []
        error = await failure(Pipeline([branch((stubborn, calls.append))]).run(7, timeout=3))
        assert isinstance(error.original_error, DeadlineExceeded)
        assert (error.stage_name, calls) == ("branch", [])

    @pytest.mark.virtual
    async def test_the_attempts_are_those_of_the_step_that_runs(self) -> None:
        answers = [OSError(), True]

        def flaky(value: Any) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        step = branch((Stage("flaky", flaky, retries=1), stubborn))
        error = await failure(Pipeline([step, same]).run(7, timeout=3))
        assert (error.stage_name, error.attempts) == ("branch", 1)

    async def test_what_the_predicate_returns_has_to_be_true_or_false(self) -> None:
        class Undecided:
            def __bool__(self) -> bool:
                raise ValueError("ambiguous")

        error = await failure(branch((Stage("undecided", lambda value: Undecided()), same)).run(7))
        assert (error.stage_name, type(error.original_error)) == ("branch/undecided", ValueError)

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: any_branch(), ValueError, r"branch requires at least one \(predicate, step\)"),
            (lambda: any_branch(otherwise=same), ValueError, "branch requires at least one"),
            (
                lambda: any_branch(is_even, same),
                TypeError,
                r"must be a pair \(predicate, step\), not .*write branch",
            ),
            (
                lambda: any_branch((is_even, same, same)),
                TypeError,
                r"must be a pair \(predicate, step\), not",
            ),
            (lambda: any_branch((5, same)), TypeError, "a case's predicate must be a stage, .* not 5"),
            (lambda: any_branch((is_even, 5)), TypeError, "a case's step must be a stage, .* not 5"),
            (
                lambda: any_branch((is_even, same), otherwise=5),
                TypeError,
                "otherwise must be a stage, .* not 5",
            ),
        ],
    )
    def test_misuse(self, build: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            build()


class Busy(Exception):  # noqa: N818
    pass


class TestFallback:
    async def test_the_next_one_gets_the_same_input(self) -> None:
        seen = []

        def refuse(value: Any) -> None:
            seen.append(value)
            raise Busy

        value = object()
        assert await fallback(refuse, refuse, same, fail).run(value) is value
        assert seen == [value, value]

    async def test_the_last_error_carries_the_earlier_ones(self) -> None:
        def broken(value: Any) -> None:
            raise OSError("down")

        step = fallback(Stage("a", broken, retries=1), Pipeline([fail], name="b"), Stage("c", broken))
        error = await failure(Pipeline([Pipeline([step], name="outer")]).run(7))
        assert error.stage_name == "outer/fallback/c"
        assert [(e.stage_name, e.attempts) for e in error.earlier] == [
            ("outer/fallback/a", 2),
            ("outer/fallback/b/fail", 1),
        ]
        assert [type(e.original_error) for e in error.earlier] == [OSError, ValueError]
        assert error.__notes__ == [
            "after Stage 'a' failed: OSError('down')",
            "after Stage 'b/fail' failed: ValueError(7)",
        ]
        for twin in pickle.loads(pickle.dumps(error)), copy.copy(error):
            assert [e.stage_name for e in twin.earlier] == [e.stage_name for e in error.earlier]

    async def test_in_a_batch_the_earlier_ones_have_the_item_and_element(self) -> None:
        (error,) = await Pipeline([each(fallback(fail, fail))]).map([[7]], return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert [(e.item_index, e.item, e.element) for e in (error, *error.earlier)] == [(0, [7], (0,))] * 2

    async def test_of_one_inside_another_all_are_there_in_order(self) -> None:
        names = Pipeline(
            [fallback(Stage("a", fail), fallback(Stage("b", fail), Stage("c", fail), name="in"))]
        )
        error = await failure(names.run(7))
        assert error.stage_name == "fallback/in/c"
        assert [e.stage_name for e in error.earlier] == ["fallback/a", "fallback/in/b"]
        other = fallback(fallback(Stage("a", fail), Stage("b", fail), name="in"), same, on=OSError)
        error = await failure(other.run(7))
        assert [e.stage_name for e in error.earlier] == ["fallback/in/a"]

    async def test_a_name_may_have_a_slash(self) -> None:
        error = await failure(fallback(Stage("a/b", fail), Stage("c", fail), name="http/get").run(7))
        assert error.stage_name == "http/get/c"
        assert error.__notes__ == ["after Stage 'a/b' failed: ValueError(7)"]

    async def test_of_groups_in_a_batch_all_have_the_item(self) -> None:
        both = parallel(a=fail, b=fail)
        step = parallel(x=both, y=both)
        (error,) = await Pipeline([fallback(step, step)]).map(["item"], return_exceptions=True)
        seen = []

        def walk(one: Any) -> None:
            seen.append((one.item_index, one.item))
            for part in (*getattr(one.original_error, "exceptions", ()), *one.earlier):
                walk(part)

        walk(error)
        assert seen == [(0, "item")] * 14

    async def test_the_first_error_carries_none(self) -> None:
        error = await failure(fallback(fail).run(7))
        assert (error.earlier, hasattr(error, "__notes__")) == ((), False)

    @pytest.mark.parametrize(
        ("on", "is_tried"),
        [
            (Exception, True),
            (ValueError, True),
            (OSError, False),
            ((OSError, ValueError), True),
            ((), False),
            (StageExecutionError, True),
        ],
    )
    async def test_on_which_errors(self, on: Any, is_tried: bool) -> None:
        step = fallback(Pipeline([fail]), same, on=on)
        if is_tried:
            assert await step.run(7) == 7
        else:
            assert (await failure(step.run(7))).stage_name == "fallback/pipeline/fail"

    async def test_of_a_group_all_have_to_match(self) -> None:
        def broken(value: Any) -> None:
            raise OSError

        mixed, both = parallel(a=fail, b=broken), parallel(a=broken, b=broken)
        assert await fallback(both, same, on=OSError).run(7) == 7
        assert await fallback(mixed, same, on=(OSError, ValueError)).run(7) == 7
        assert await fallback(mixed, same, on=ExceptionGroup).run(7) == 7
        assert (await failure(fallback(mixed, same, on=OSError).run(7))).stage_name == "fallback/parallel"

        def group(value: Any) -> None:
            raise ExceptionGroup("", [OSError(), ExceptionGroup("", [ValueError()])])

        assert await fallback(group, same, on=(OSError, ValueError)).run(7) == 7
        assert (await failure(fallback(group, same, on=OSError).run(7))).stage_name == "fallback/group"

    @pytest.mark.virtual
    async def test_a_timeout_of_a_stage_is_an_error_like_others(self) -> None:
        assert await fallback(Stage("slow", forever, timeout=1), same, on=TimeoutError).run(7) == 7

    @pytest.mark.virtual
    async def test_no_alternative_begins_after_a_cancellation_that_became_an_error(self) -> None:
        async def convert(value: Any) -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                raise Busy from None

        calls: list[Any] = []
        task = asyncio.create_task(fallback(convert, calls.append).run(7))
        await asyncio.sleep(1)
        task.cancel()
        error = await failure(task)
        assert (type(error.original_error), calls) == (Busy, [])
        error = await failure(Pipeline([fallback(convert, calls.append)]).run(7, timeout=3))
        assert (type(error.original_error), calls) == (Busy, [])

    @pytest.mark.virtual
    async def test_no_alternative_begins_when_the_deadline_has_passed_unnoticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = asyncio.get_running_loop()
        real, blocked = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + blocked)
        calls: list[Any] = []

        def block(value: Any) -> None:
            nonlocal blocked
            blocked += 5
            raise Busy

        error = await failure(Pipeline([fallback(block, calls.append)]).run(7, timeout=3))
        assert (error.stage_name, type(error.original_error), calls) == ("fallback/block", Busy, [])

    @pytest.mark.virtual
    async def test_a_task_group_that_failed_is_no_cancellation(self) -> None:
        async def group(value: Any) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(after(1, fail)(value))
                tasks.create_task(forever(value))

        assert await fallback(group, after(1)).run(7) == 7
        assert await Pipeline([fallback(group, after(1))]).run(7, timeout=100) == 7

    @pytest.mark.virtual
    async def test_the_attempts_are_those_of_the_step_that_runs(self) -> None:
        step = fallback(Stage("flaky", fail, retries=4), stubborn)
        error = await failure(Pipeline([step, same]).run(7, timeout=3))
        assert (error.stage_name, error.attempts) == ("fallback", 1)

    async def test_it_runs_with_one_step_alone(self) -> None:
        assert await fallback(same).run(7) == 7

    def test_misuse(self) -> None:
        with pytest.raises(TypeError, match=r"^on must hold subclasses of Exception, not 'OSError'$"):
            fallback(same, on="OSError")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"^on must be an exception type or a tuple of them, not .*write"):
            fallback(same, on=[OSError])  # type: ignore[call-overload]
        with pytest.raises(
            TypeError, match=r"^on must hold subclasses of Exception, not .*KeyboardInterrupt"
        ):
            fallback(same, on=(OSError, KeyboardInterrupt))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^a step of fallback must be a stage, .* not 5$"):
            fallback(same, 5)  # type: ignore[call-overload]


@dataclass
class User:
    id: int
    email: str | None = None


class TestRequire:
    async def test_passes_what_has_all_fields(self) -> None:
        step = require("id", "email")
        for value in {"id": 1, "email": None}, User(1):
            assert await step.run(value) is value
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.row_factory = sqlite3.Row
            row = connection.execute("select 1 as id, 'a@b' as email, 2 as other").fetchone()
        assert await step.run(row) is row
        assert (await failure(require("nothing").run(row))).stage_name == "require"

    @pytest.mark.parametrize("value", [{"id": 1, "name": "x"}, User, object(), None, 5], ids=repr)
    async def test_lists_all_that_are_missing(self, value: Any) -> None:
        error = await failure(Pipeline([require("phone", "id", "fax", name="complete")]).run(value))
        assert error.stage_name == "complete"
        assert isinstance(error.original_error, MissingFieldsError)
        missing = ("phone", "fax") if isinstance(value, dict) else ("phone", "id", "fax")
        assert error.original_error.fields == missing
        assert str(error.original_error) == "missing " + ", ".join(map(repr, missing))

    async def test_a_property_that_fails_is_the_failure(self) -> None:
        class Detached:
            @property
            def id(self) -> int:
                raise OSError("detached")

        error = await failure(Pipeline([require("id")]).run(Detached()))
        assert (error.stage_name, type(error.original_error)) == ("require", OSError)

    async def test_the_keys_of_a_mapping_count_and_not_its_methods(self) -> None:
        assert (await failure(require("keys", "get").run({}))).stage_name == "require"

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: any_require(), ValueError, "require requires at least one field"),
            (lambda: any_require(["id"]), TypeError, r"a field must be a str, not \['id'\]; write require"),
        ],
    )
    def test_misuse(self, build: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            build()


class TestRepr:
    @pytest.mark.parametrize(
        ("step", "text"),
        [
            (parallel(a=same, b=Stage("c", same, retries=1)),
             "parallel(a=Stage('a'), b=Stage('c', retries=1))"),
            (parallel({"a b": same}, name="x"), "parallel({'a b': Stage('a b')}, name='x')"),
            (parallel({"name": same}), "parallel({'name': Stage('name')})"),
            (parallel({"class": same}), "parallel({'class': Stage('class')})"),
            (each(same), "each(Stage('same'))"),
            (each(Pipeline([same]), 20, name="rows"),
             "each(Pipeline([Stage('same')], name='pipeline'), concurrency=20, name='rows')"),
            (keep(is_even), "keep(Stage('is_even'))"),
            (keep(is_even, 1, name="even"), "keep(Stage('is_even'), concurrency=1, name='even')"),
            (branch((is_even, same)), "branch((Stage('is_even'), Stage('same')))"),
            (branch((is_even, same), (bool, each(same)), otherwise=fail, name="x"),
             "branch((Stage('is_even'), Stage('same')), (Stage('bool'), each(Stage('same'))), "
             "otherwise=Stage('fail'), name='x')"),
            (fallback(same, fail), "fallback(Stage('same'), Stage('fail'))"),
            (fallback(same, on=OSError), "fallback(Stage('same'), on=OSError)"),
            (fallback(same, on=(OSError,), name="x"), "fallback(Stage('same'), on=(OSError,), name='x')"),
            (fallback(same, on=(OSError, KeyError)), "fallback(Stage('same'), on=(OSError, KeyError))"),
            (require("id", "email"), "require('id', 'email')"),
            (require("id", name="complete"), "require('id', name='complete')"),
        ],
    )  # fmt: skip
    def test_reads_as_the_structure(self, step: Any, text: str) -> None:
        assert repr(step) == text
        assert repr(Pipeline([step])) == f"Pipeline([{text}], name='pipeline')"


async def test_a_subclass_with_a_run_of_its_own_goes_through_it() -> None:
    class Own(Each[Any, Any]):
        async def run(self, value: Any, *, context: Any = None) -> Any:
            return "own", await super().run(value, context=context)

    class NotOwn(Each[Any, Any]):
        pass

    assert await Pipeline([Own(increment, 5, "own")]).run([1]) == ("own", [2])
    assert await Pipeline([NotOwn(finish, 5, "other"), fail]).run([7]) == 7


async def test_a_step_of_the_users_may_inherit_the_joins() -> None:
    class Mine(Joinable[Any, Any]):
        name = "mine"

        async def run(self, value: Any, *, context: Any = None) -> Any:
            return value, context

    assert await (Mine() | increment_first).run(1, context={"a": 1}) == (2, {"a": 1})


def increment_first(pair: tuple[int, Any]) -> tuple[int, Any]:
    return pair[0] + 1, pair[1]


def test_kinds_are_told_apart() -> None:
    made: list[Any] = [
        parallel(a=same), each(same), keep(same), branch((same, same)), fallback(same), require("id"),
    ]  # fmt: skip
    assert [type(step) for step in made] == [Parallel, Each, Keep, Branch, Fallback, Require]


async def test_a_middleware_may_retry_a_whole_step() -> None:
    answers: list[Any] = [OSError(), 1]

    def flaky(value: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    pipeline = Pipeline([parallel(a=flaky)], middlewares=[RetryMiddleware(retries=1)])
    assert await pipeline.run(7) == {"a": 1}


SEEN: list[Event] = []
OBSERVED: Pipeline[Any, Any] = Pipeline(
    [Stage("fine", lambda value: True)], name="in", observers=[SEEN.append]
)


@pytest.mark.parametrize(
    "step",
    [
        parallel(a=str, b=OBSERVED),
        each(OBSERVED),
        keep(OBSERVED),
        branch((OBSERVED, str)),
        branch((Stage("yes", bool), OBSERVED)),
        branch((Stage("no", lambda value: False), str), otherwise=OBSERVED),
        fallback(OBSERVED, str),
        fallback(Stage("fail", lambda value: 1 / 0), OBSERVED),
        Pipeline([each(fallback(OBSERVED))]),
    ],
    ids=lambda step: repr(step)[:40],
)
async def test_an_observed_pipeline_inside_is_told_the_index_of_the_item(step: Any) -> None:
    SEEN.clear()
    await Pipeline([step]).map([[1], [1]])
    assert {event.item_index for event in SEEN} == {0, 1}
    assert {event.stage for event in SEEN} == {None, "fine"}
    has_elements = "each" in repr(step) or "keep" in repr(step)
    assert {event.element for event in SEEN} == {(0,) if has_elements else ()}


@pytest.mark.virtual
async def test_what_a_branch_has_left_behind_does_not_hide_a_cancellation_of_the_run() -> None:
    async def fail() -> None:
        raise ValueError

    async def leaves_a_request(
        value: int,
    ) -> int:  # until Python 3.13, its task counts as cancelled after this
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await asyncio.sleep(1)
        return value

    async def sleep(value: int) -> None:
        await asyncio.sleep(10)

    pipeline = Pipeline([parallel(a=Pipeline([leaves_a_request, sleep]), b=sleep)])
    run = asyncio.create_task(pipeline.run(1, timeout=2))
    asyncio.get_running_loop().call_later(2, run.cancel)
    with pytest.raises(asyncio.CancelledError):
        await run
