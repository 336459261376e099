"""Pipelines: the chain, the context, hooks, middlewares, nesting, and what may be a step."""

import asyncio
import contextlib
import functools
import gc
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import Mock
from uuid import UUID

import pytest

from async_pipeline import (
    BatchError,
    DeadlineExceeded,
    Event,
    Finish,
    Outcome,
    Pipeline,
    Stage,
    StageExecutionError,
    StageTimeoutError,
)
from async_pipeline.errors import mark_cancelled
from async_pipeline.middlewares import CircuitBreakerMiddleware, RetryMiddleware
from tests.helpers import run_virtually

HOOKS: list[dict[str, Any]] = [{}, {"before_stage": lambda name, value: None}]


async def add_one(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


def double(value: int) -> int:
    return value * 2


def fail(value: Any) -> Any:
    raise ValueError(value)


async def wait_for_ever(value: Any) -> None:
    await asyncio.get_running_loop().create_future()


async def cancelled_run(pipeline: Pipeline[Any, Any]) -> None:
    """Start a run, let it wait, cancel it."""
    task = asyncio.create_task(pipeline.run(1))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Log:
    """Hooks and middlewares that remember what they saw."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def before(self, name: str, value: Any) -> None:
        self.events.append(("before", name, value))

    def after(self, name: str, value: Any, output: Any, error: BaseException | None) -> None:
        self.events.append(("after", name, value, output, error))

    async def before_async(self, name: str, value: Any, context: Any) -> None:
        await asyncio.sleep(0)
        self.events.append(("before", name, value))

    async def after_async(self, name: str, value: Any, output: Any, error: Any, context: Any) -> None:
        await asyncio.sleep(0)
        self.events.append(("after", name, value, output, error))

    def middleware(self, label: str) -> Callable[..., Any]:
        async def middleware(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            self.events.append((f"{label} in", stage_name))
            try:
                return await next_stage(value)
            finally:
                self.events.append((f"{label} out", stage_name))

        return middleware


class TestChain:
    async def test_each_stage_receives_what_the_one_before_returned(self) -> None:
        pipeline = Pipeline([Stage("add", add_one), double, str])
        assert await pipeline.run(3) == "8"

    async def test_a_sync_handler_may_return_an_awaitable(self) -> None:
        def later(value: int) -> "asyncio.Future[int]":
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            future.set_result(value + 1)
            return future

        for hooks in HOOKS:
            assert await Pipeline([later, later, add_one], **hooks).run(1) == 4

    async def test_plain_callables_are_named_after_themselves(self) -> None:
        class Scale:
            def __call__(self, value: int) -> int:
                return value

        stages: list[Any] = [
            add_one,
            functools.partial(functools.partial(pow, 2), 3),
            Scale(),
            str.split,
            UUID,
            round,
        ]
        names = [stage.name for stage in Pipeline(stages).stages]
        assert names == ["add_one", "pow", "Scale", "split", "UUID", "round"]

    async def test_any_object_with_a_name_and_a_run_is_a_step(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: int, *, context: Any = None) -> int:
                context["own"] = True
                return value + 100

        context: dict[str, Any] = {}
        assert await Pipeline([add_one, Own()]).run(1, context=context) == 102
        assert context == {"own": True}

    async def test_errors_of_an_own_step_leave_as_they_are(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: int, *, context: Any = None) -> int:
                raise KeyError(value)

        for hooks in HOOKS:
            with pytest.raises(KeyError):
                await Pipeline([Own()], **hooks).run(1)

    async def test_a_subclass_of_stage_goes_through_its_own_run(self) -> None:
        class Twice(Stage[int, int]):
            async def run(self, value: int, *, context: Any = None) -> int:
                return await super().run(await super().run(value, context=context), context=context)

        assert await Pipeline([Twice("twice", add_one)]).run(1) == 3
        assert await Pipeline([Twice("twice", add_one)]).map([1, 2]) == [3, 4]

    async def test_the_same_stage_may_stand_twice(self) -> None:
        stage = Stage("add", add_one)
        assert await Pipeline([stage, stage, stage]).run(0) == 3


class TestFailure:
    @pytest.mark.parametrize(
        "options", [{}, {"timeout": 5}, {"retries": 2}], ids=["plain", "timeout", "retries"]
    )
    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize("wrapped", [False, True])
    async def test_a_failed_stage_is_named_and_wrapped_once(
        self, options: dict[str, Any], hooked: bool, wrapped: bool
    ) -> None:
        log = Log()
        pipeline: Pipeline[Any, Any] = Pipeline(
            [add_one, Stage("broken", fail, **options)],
            after_stage=log.after if hooked else None,
            middlewares=[log.middleware("m")] if wrapped else None,
        )
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run(1)
        error = caught.value
        assert str(error) == "Stage 'broken' failed: ValueError(2)"
        assert error.__cause__ is error.original_error
        assert isinstance(error.original_error, ValueError)
        assert error.attempts == options.get("retries", 0) + 1
        assert (error.item_index, error.item) == (None, None)
        if hooked:
            assert log.events[-1] == ("after", "broken", 2, None, error)

    @pytest.mark.parametrize("hooked", [False, True])
    async def test_a_nested_stage_is_named_by_its_path_and_wrapped_once(self, hooked: bool) -> None:
        hooks: dict[str, Any] = {"before_stage": lambda name, value: None} if hooked else {}
        deepest = Pipeline([add_one, Stage("broken", fail)], name="c", **hooks)
        outer = Pipeline([Pipeline([Pipeline([deepest], name="b", **hooks)], name="a")], name="outermost")
        with pytest.raises(StageExecutionError) as caught:
            await outer.run(1)
        assert caught.value.stage_name == "a/b/c/broken"
        assert isinstance(caught.value.original_error, ValueError)
        assert caught.value.__cause__ is caught.value.original_error

    async def test_a_pipeline_run_inside_a_handler_is_that_handlers_error(self) -> None:
        inner = Pipeline([Stage("broken", fail)], name="inner")

        async def call_inner(value: int) -> Any:
            return await inner.run(value)

        with pytest.raises(StageExecutionError) as caught:
            await Pipeline([call_inner]).run(1)
        assert caught.value.stage_name == "call_inner"
        assert isinstance(caught.value.original_error, StageExecutionError)

    async def test_in_run_a_cancellation_propagates(self) -> None:
        async def cancelled(value: int) -> None:
            raise asyncio.CancelledError

        for hooks in HOOKS:
            with pytest.raises(asyncio.CancelledError):
                await Pipeline([cancelled], **hooks).run(1)

    async def test_a_cancellation_is_named_by_the_step_that_it_left(self) -> None:
        async def cancelled(value: Any) -> None:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

        class Asking:
            def __init__(self, name: str) -> None:
                self.name = name

            async def run(self, value: Any, *, context: Any = None) -> Any:
                return await Stage("fetch", cancelled, retries=3).run(value)

        async def ask(value: Any) -> Any:
            error = asyncio.CancelledError()
            mark_cancelled(error, "ask", 3)  # of another stage of that name, elsewhere
            raise error

        for step, name in (Asking("fet"), "fet"), (Asking("other"), "other"), (ask, "ask"):
            (failure,) = await Pipeline([step]).map([7], return_exceptions=True)
            assert isinstance(failure, StageExecutionError)
            assert (failure.stage_name, failure.attempts) == (name, 1)

    async def test_a_cancellation_in_a_pipeline_with_a_run_of_its_own_is_that_pipelines(self) -> None:
        class Own(Pipeline[Any, Any]):
            async def run(self, initial_value: Any, **options: Any) -> Any:
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future

        pipeline = Pipeline([Pipeline([Own([abs], name="own")], name="outer")])
        (error,) = await pipeline.map([7], return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert error.stage_name == "outer/own"

    @pytest.mark.virtual
    async def test_a_stage_with_a_timeout_names_its_timeout(self) -> None:
        pipeline: Pipeline[int, None] = Pipeline([Stage("slow", wait_for_ever, timeout=2)])
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run(1)
        assert isinstance(caught.value.original_error, StageTimeoutError)
        assert caught.value.original_error.timeout == 2
        assert asyncio.get_running_loop().time() == 2


class TestContext:
    async def test_one_object_for_stages_hooks_and_middlewares(self) -> None:
        seen: list[Any] = []

        def handler(value: int, context: Any) -> int:
            seen.append(context)
            return value

        def middleware(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            seen.append(context)
            return next_stage(value)

        pipeline: Pipeline[int, int] = Pipeline(
            [handler, Pipeline([handler])],
            before_stage=lambda name, value, context: seen.append(context),
            after_stage=lambda name, value, output, error, context: seen.append(context),
            middlewares=[middleware],
        )
        own: dict[str, Any] = {}
        await pipeline.run(1, context=own)
        assert len(seen) == 8
        assert all(context is own for context in seen)

    async def test_a_new_dict_when_none_is_given(self) -> None:
        def write(value: int, context: dict[str, int]) -> int:
            context["value"] = value
            return value

        def read(value: int, context: dict[str, int]) -> dict[str, int]:
            return context

        pipeline: Pipeline[int, dict[str, int]] = Pipeline([write, read])
        assert await pipeline.run(1) == {"value": 1}
        assert await pipeline.run(2) == {"value": 2}

    async def test_an_empty_context_of_the_callers_is_still_the_callers(self) -> None:
        class Falsy(dict[str, Any]):
            pass

        own = Falsy()

        def write(value: int, context: Any) -> None:
            assert context is own

        await Pipeline([write]).run(1, context=own)
        await Pipeline([write], before_stage=lambda name, value: None).run(1, context=own)
        assert (await Pipeline([write]).try_run(1, context=own)).context is own

    async def test_any_object_will_do(self) -> None:
        @dataclass
        class Request:
            user: str
            seen: int = 0

        def count(value: int, context: Request) -> str:
            context.seen += 1
            return f"{context.user}: {context.seen}"

        pipeline: Pipeline[int, str, Request] = Pipeline([count, lambda value: value])
        request = Request("ann")
        assert await pipeline.run(1, context=request) == "ann: 1"
        assert await pipeline.map([1, 2], context=request) == ["ann: 2", "ann: 2"]
        assert request.seen == 1


class TestHooks:
    @pytest.mark.parametrize("is_async", [False, True])
    async def test_they_see_each_stage_around_its_middlewares(self, is_async: bool) -> None:
        log = Log()
        pipeline: Pipeline[int, int] = Pipeline(
            [add_one, double],
            before_stage=log.before_async if is_async else log.before,
            after_stage=log.after_async if is_async else log.after,
            middlewares=[log.middleware("m")],
        )
        assert await pipeline.run(1) == 4
        assert log.events == [
            ("before", "add_one", 1),
            ("m in", "add_one"),
            ("m out", "add_one"),
            ("after", "add_one", 1, 2, None),
            ("before", "double", 2),
            ("m in", "double"),
            ("m out", "double"),
            ("after", "double", 2, 4, None),
        ]

    async def test_only_one_of_them_will_do(self) -> None:
        log = Log()
        await Pipeline([double], before_stage=log.before).run(1)
        await Pipeline([double], after_stage=log.after).run(1)
        assert log.events == [("before", "double", 1), ("after", "double", 1, 2, None)]

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_an_exception_in_a_hook_is_logged_and_the_run_goes_on(
        self, is_async: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*args: Any) -> None:
            raise LookupError("hook")

        async def broken_async(*args: Any) -> None:
            raise LookupError("hook")

        hook = broken_async if is_async else broken
        pipeline: Pipeline[int, int] = Pipeline([double], before_stage=hook, after_stage=hook)
        assert await pipeline.run(1) == 2
        failing: Pipeline[int, int] = Pipeline([Stage("broken", fail)], after_stage=hook)
        with pytest.raises(StageExecutionError):
            await failing.run(1)
        assert [(record.name, record.levelno) for record in caplog.records] == [
            ("async_pipeline", logging.ERROR)
        ] * 3
        assert all(record.exc_info and record.exc_info[0] is LookupError for record in caplog.records)
        assert "double" in caplog.records[0].getMessage()

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_exactly_one_after_for_each_before_on_cancellation_too(self, is_async: bool) -> None:
        log = Log()
        pipeline: Pipeline[int, None] = Pipeline(
            [wait_for_ever],
            before_stage=log.before,
            after_stage=log.after_async if is_async else log.after,
        )
        await cancelled_run(pipeline)
        [before, after] = log.events
        assert before == ("before", "wait_for_ever", 1)
        assert after[:4] == ("after", "wait_for_ever", 1, None)
        assert isinstance(after[4], asyncio.CancelledError)

    async def test_a_before_that_is_cancelled_has_its_after(self) -> None:
        log = Log()

        async def before(name: str, value: Any) -> None:
            await wait_for_ever(value)

        pipeline: Pipeline[int, int] = Pipeline([double], before_stage=before, after_stage=log.after)
        await cancelled_run(pipeline)
        [after] = log.events
        assert isinstance(after[4], asyncio.CancelledError)

    @pytest.mark.parametrize("failing", [False, True])
    async def test_an_after_that_is_cancelled_is_not_called_again(self, failing: bool) -> None:
        calls = []

        async def after(name: str, value: Any, output: Any, error: Any) -> None:
            calls.append(name)
            await wait_for_ever(value)

        stage = Stage("broken", fail) if failing else Stage("double", double)
        await cancelled_run(Pipeline([stage], after_stage=after))
        assert calls == [stage.name]

    async def test_a_hook_that_returns_something_else_is_fine(self) -> None:
        pipeline: Pipeline[int, int] = Pipeline(
            [double], before_stage=lambda name, value: 5, after_stage=lambda name, value, output, error: "x"
        )
        assert await pipeline.run(1) == 2

    async def test_the_outer_hooks_see_a_nested_pipeline_as_one_stage(self) -> None:
        log = Log()
        inner = Pipeline([add_one, double], name="inner", before_stage=log.before)
        outer = Pipeline([inner, double], before_stage=log.before)
        assert await outer.run(1) == 8
        assert [event[1] for event in log.events] == ["inner", "add_one", "double", "double"]

    @pytest.mark.parametrize(
        ("parameter", "hook"),
        [
            ("before_stage", lambda name: None),
            ("before_stage", lambda a, b, c, d: None),
            ("after_stage", lambda name, value: None),
            ("after_stage", lambda a, b, c, d, e, f: None),
            ("before_stage", "not callable"),
            ("after_stage", 5),
        ],
    )
    def test_a_wrong_hook_is_refused_at_construction(self, parameter: str, hook: Any) -> None:
        with pytest.raises(TypeError, match=parameter):
            Pipeline([double], **{parameter: hook})


async def hurt(name: str, value: Any, *_: Any) -> None:
    """A hook that makes an error of its own of a cancellation."""
    if name == "wait":
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise ConnectionError("metrics") from None


@pytest.mark.virtual
@pytest.mark.parametrize("hook", ["before_stage", "after_stage"])
async def test_a_hook_that_swallows_a_cancellation_does_not_hide_it(
    hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hooks: dict[str, Any] = {hook: hurt}
    task = asyncio.create_task(Pipeline([Stage("wait", double), never], **hooks).run(1))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "ConnectionError: metrics" in caplog.text


@pytest.mark.virtual
async def test_a_hooks_own_timeout_does_not_end_a_run_while_cleaning_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def before(name: str, value: Any) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        try:
            await future
        except asyncio.CancelledError as error:
            raise TimeoutError from error

    async def clean_up() -> Any:
        try:
            await asyncio.sleep(3600)
        finally:
            saved.append(await Pipeline([double], before_stage=before).run(1))

    saved: list[Any] = []
    task = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert saved == [2]
    assert "TimeoutError" in caplog.text


async def test_a_hook_that_fails_after_a_cancellation_of_something_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def before(name: str, value: Any) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        try:
            await future
        except asyncio.CancelledError:
            raise ConnectionError("metrics") from None

    assert await Pipeline([double], before_stage=before).run(1) == 2
    assert "ConnectionError: metrics" in caplog.text


class TestMiddlewares:
    async def test_a_finish_of_a_task_group_reaches_it_as_a_finish(self) -> None:
        seen = []

        async def finish_in_group(value: Any) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(raise_finish(value))

        async def raise_finish(value: Any) -> None:
            await asyncio.sleep(0)
            raise Finish(value)

        async def remember(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            try:
                return await next_stage(value)
            except BaseException as ended:
                seen.append(type(ended))
                raise

        for stage in Stage("x", finish_in_group), Stage("x", finish_in_group, retries=1):
            # in a task of its own: before Python 3.13 such a TaskGroup leaves a cancel request behind
            assert await asyncio.create_task(Pipeline([stage], middlewares=[remember]).run(7)) == 7
        assert seen == [Finish, Finish]

    async def test_a_class_with_a_name_and_a_run_is_a_callable(self) -> None:
        class Step:
            name = "step"

            def __init__(self, value: Any) -> None:
                self.value = value

            async def run(self, value: Any, *, context: Any = None) -> Any: ...

        assert (await Pipeline([Step]).run(7)).value == 7

    async def test_the_first_in_the_list_is_outermost(self) -> None:
        log = Log()
        pipeline: Pipeline[int, int] = Pipeline(
            [double], middlewares=[log.middleware("outer"), log.middleware("inner")]
        )
        assert await pipeline.run(1) == 2
        assert [event[0] for event in log.events] == ["outer in", "inner in", "inner out", "outer out"]

    async def test_it_may_change_input_and_output(self) -> None:
        async def shift(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            return await next_stage(value + 10) + 100

        assert await Pipeline([double], middlewares=[shift]).run(1) == 122

    async def test_a_sync_one_returns_a_value_or_an_awaitable(self) -> None:
        def pass_on(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            return next_stage(value)

        def skip(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            return "skipped"

        assert await Pipeline([add_one], middlewares=[pass_on]).run(1) == 2
        assert await Pipeline([add_one], middlewares=[skip]).run(1) == "skipped"

    async def test_it_may_call_the_stage_again(self) -> None:
        calls = []

        def count(value: int) -> int:
            calls.append(value)
            return value

        async def thrice(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            return [await next_stage(value) for _ in range(3)]

        assert await Pipeline([count], middlewares=[thrice]).run(1) == [1, 1, 1]

    async def test_it_is_around_all_attempts_of_a_stage(self) -> None:
        log = Log()
        pipeline: Pipeline[int, int] = Pipeline(
            [Stage("broken", fail, retries=3)], middlewares=[log.middleware("m")]
        )
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run(1)
        assert caught.value.attempts == 4
        assert len(log.events) == 2

    async def test_around_a_nested_pipeline_and_an_own_step(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: int, *, context: Any = None) -> int:
                return value + 100

        log = Log()
        inner = Pipeline([add_one], name="inner")
        assert await Pipeline([inner, Own()], middlewares=[log.middleware("m")]).run(1) == 102
        assert [event[1] for event in log.events] == ["inner", "inner", "own", "own"]

    @pytest.mark.parametrize("middleware", [5, "no", type("Middleware", (), {"__call__": fail})])
    def test_a_wrong_one_is_refused_at_construction(self, middleware: Any) -> None:
        with pytest.raises(TypeError, match="middlewares must hold"):
            Pipeline([double], middlewares=[middleware])


def now() -> float:
    return asyncio.get_running_loop().time()


class Sleep:
    """A handler that takes its time, and counts its calls."""

    def __init__(self, seconds: float, error: BaseException | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.calls = 0

    async def __call__(self, value: Any) -> Any:
        self.calls += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return value


async def stubborn(value: Any) -> Any:
    """Answer a cancellation, five seconds later, with a value."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        await asyncio.sleep(5)
    return value


async def failure_of(pipeline: Pipeline[Any, Any], **options: Any) -> StageExecutionError:
    with pytest.raises(StageExecutionError) as caught:
        await pipeline.run(1, **options)
    assert caught.value.__cause__ is caught.value.original_error
    return caught.value


async def exceeded(pipeline: Pipeline[Any, Any], timeout: float) -> tuple[str, int, float]:
    """The stage that the deadline names, its attempts, and the time of the end."""
    error = await failure_of(pipeline, timeout=timeout)
    assert isinstance(error.original_error, DeadlineExceeded)
    assert error.original_error.timeout == timeout
    task: Any = asyncio.current_task()
    assert task.cancelling() == 0
    return error.stage_name, error.attempts, now()


async def failure_at(pipeline: Pipeline[Any, Any], timeout: float) -> tuple[str, float]:
    """The stage that the deadline names, and how long it took; some Pythons leave a request to end behind."""
    started = now()
    error = await failure_of(pipeline, timeout=timeout)
    assert isinstance(error.original_error, DeadlineExceeded)
    return error.stage_name, now() - started


@pytest.mark.virtual
class TestTimeout:
    """A run's ``timeout``: one budget over all stages, attempts, sleeps and hooks."""

    async def test_ends_the_run_exactly_then_and_names_the_stage(self) -> None:
        first, second, third = Sleep(2), Sleep(2), Sleep(2)
        pipeline = Pipeline([Stage("a", first), Stage("b", second), Stage("c", third)])
        assert await exceeded(pipeline, 3) == ("b", 1, 3)
        assert (first.calls, second.calls, third.calls) == (1, 1, 0)

    async def test_leaves_a_faster_run_alone(self) -> None:
        assert await Pipeline([Sleep(1), Sleep(1)]).run(7, timeout=2.5) == 7
        assert now() == 2

    async def test_is_one_for_all_attempts_and_sleeps(self) -> None:
        down = Sleep(1, ConnectionError())
        pipeline = Pipeline([Stage("a", down, retries=9, retry_delay=1)])
        assert await exceeded(pipeline, 4.5) == ("a", 3, 4.5)
        assert down.calls == 3

    async def test_a_sleep_that_does_not_fit_is_not_begun(self) -> None:
        down = ConnectionError("down")
        stage = Stage("a", Sleep(1, down), retries=9, retry_delay=2, backoff="exponential")
        error = await failure_of(Pipeline([stage]), timeout=8)
        assert (error.original_error, error.attempts) == (down, 2)
        assert now() == 4, (
            "attempts from 0 to 1 and from 3 to 4, and then a sleep of 4 would last till the end"
        )

    async def test_a_sleep_counts_what_earlier_stages_took(self) -> None:
        stage = Stage("b", Sleep(0, ConnectionError()), retries=9, retry_delay=2)
        assert (await failure_of(Pipeline([Sleep(5), stage]), timeout=8)).attempts == 2
        assert now() == 7

    async def test_an_exact_delay_is_bounded_by_it(self) -> None:
        stage = Stage("a", Sleep(1, ConnectionError()), retries=9, retry_on=lambda error: 60)
        assert (await failure_of(Pipeline([stage]), timeout=60)).attempts == 1
        assert now() == 1

    async def test_on_error_gets_the_last_error_when_no_sleep_fits(self) -> None:
        down = ConnectionError("down")
        stage = Stage("a", Sleep(1, down), retries=9, retry_delay=60, on_error=lambda value, error: error)
        assert await Pipeline([stage]).run(1, timeout=10) is down
        assert now() == 1

    async def test_on_error_is_not_asked_when_the_time_is_up(self) -> None:
        stage = Stage("a", Sleep(60), on_error=lambda value, error: 1 / 0)
        assert await exceeded(Pipeline([stage]), 2) == ("a", 1, 2)

    async def test_covers_on_error(self) -> None:
        async def slow(value: Any, error: Exception) -> None:
            await asyncio.sleep(60)

        stage = Stage("a", Sleep(1, ValueError()), retries=1, on_error=slow)
        assert await exceeded(Pipeline([stage]), 5) == ("a", 2, 5)

    async def test_covers_waiting_for_a_limiter(self) -> None:
        limiter = asyncio.Semaphore(1)
        async with limiter:
            assert await exceeded(Pipeline([Stage("a", Sleep(1), limiter=limiter)]), 5) == ("a", 1, 5)

    @pytest.mark.parametrize("hook", ["before_stage", "after_stage"])
    async def test_covers_hooks(self, hook: Any) -> None:
        async def slow(name: str, *_: Any) -> None:
            if name == "b":
                await asyncio.sleep(60)

        stages = [Stage("a", Sleep(1)), Stage("b", Sleep(1)), Stage("c", Sleep(1))]
        hooks: dict[str, Any] = {hook: slow}
        assert await exceeded(Pipeline(stages, **hooks), 5) == ("b", 1, 5)

    async def test_covers_middlewares(self) -> None:
        async def slow(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            await asyncio.sleep(2)
            return await next_stage(value)

        stages = [Stage("a", double), Stage("b", double), Stage("c", double)]
        assert await exceeded(Pipeline(stages, middlewares=[slow]), 3) == ("b", 1, 3)

    async def test_reaches_retries_below_a_middleware(self) -> None:
        async def bare(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            return await next_stage(value)

        stage = Stage("a", Sleep(1, ConnectionError()), retries=9, retry_delay=3)
        error = await failure_of(Pipeline([stage], middlewares=[bare]), timeout=6)
        assert (error.attempts, now()) == (2, 5)

    async def test_counts_the_attempts_however_it_ends(self) -> None:
        async def late(value: Any) -> Any:
            if now() < 1:
                await asyncio.sleep(1)
                raise ConnectionError
            return await stubborn(value)

        async def slow(name: str, value: Any, output: Any, error: Any) -> None:
            await asyncio.sleep(60)

        twice: Stage[Any, Any] = Stage("twice", late, retries=3)
        assert await exceeded(Pipeline([twice, double]), 3) == ("twice", 2, 8)
        flaky = twice.replace(handler=Mock(side_effect=[ValueError(), 1]), pass_context=False)
        assert await exceeded(Pipeline([flaky, double], after_stage=slow), 3) == ("twice", 2, 11)

    async def test_a_before_hook_that_swallows_its_cancellation_is_the_last_one(self) -> None:
        seen: list[Any] = []

        async def slow(name: str, value: Any) -> None:
            await stubborn(value)

        def after(name: str, value: Any, output: Any, error: BaseException | None) -> None:
            seen.append(type(error))

        pipeline = Pipeline([Stage("a", never)], before_stage=slow, after_stage=after)
        assert await exceeded(pipeline, 3) == ("a", 1, 8)
        assert seen == [asyncio.CancelledError]

    async def test_counts_the_attempts_of_its_own_stage(self) -> None:
        flaky: Stage[Any, Any] = Stage(
            "flaky", Mock(side_effect=[ValueError(), ValueError(), 1]), retries=2, pass_context=False
        )
        assert await exceeded(Pipeline([flaky, Stage("slow", Sleep(60))]), 3) == ("slow", 1, 3)

    async def test_no_stage_begins_at_its_very_moment(self) -> None:
        async def swallow(value: Any) -> Any:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            return value

        assert await exceeded(Pipeline([swallow, never]), 3) == ("swallow", 1, 3)

    async def test_counts_the_attempts_of_a_nested_stage(self) -> None:
        async def slow(value: Any) -> None:
            await asyncio.sleep(100)

        pipeline = Pipeline([Pipeline([Stage("slow", slow, timeout=2, retries=5)], name="inner")])
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run(1, timeout=5)
        assert (caught.value.stage_name, caught.value.attempts) == ("inner/slow", 3)

    async def test_names_a_nested_stage_by_its_path(self) -> None:
        inner = Pipeline([Sleep(1), Stage("slow", Sleep(60), retries=1)], name="inner")
        outer = Pipeline([Pipeline([inner], name="middle")])
        assert await exceeded(outer, 5) == ("middle/inner/slow", 1, 5)

    async def test_reaches_retries_of_a_nested_pipeline(self) -> None:
        inner = Pipeline([Stage("a", Sleep(1, ConnectionError()), retries=9, retry_delay=3)], name="inner")
        error = await failure_of(Pipeline([inner]), timeout=6)
        assert (error.stage_name, error.attempts, now()) == ("inner/a", 2, 5)

    async def test_reaches_retries_of_a_subclass_without_a_run_of_its_own(self) -> None:
        class Named(Stage[Any, Any]):
            pass

        error = await failure_of(
            Pipeline([Named("a", Sleep(1, ConnectionError()), retries=9, retry_delay=3)]), timeout=6
        )
        assert (error.attempts, now()) == (2, 5)

    async def test_looks_like_a_cancellation_inside(self) -> None:
        seen: list[Any] = []

        async def handler(value: Any) -> None:
            try:
                await asyncio.sleep(60)
            except BaseException as error:
                seen.append(type(error))
                raise

        def after(name: str, value: Any, output: Any, error: BaseException | None) -> None:
            seen.append((name, output, type(error)))

        await failure_of(Pipeline([Stage("a", handler, retries=3)], after_stage=after), timeout=5)
        assert seen == [asyncio.CancelledError, ("a", None, asyncio.CancelledError)]

    async def test_the_three_kinds_of_timeout_are_told_apart(self) -> None:
        slow: Stage[Any, Any] = Stage("slow", Sleep(60))
        texts = []
        for pipeline, kind in [
            (Pipeline([slow]), DeadlineExceeded),
            (Pipeline([slow.replace(timeout=2)]), StageTimeoutError),
            (Pipeline([slow.replace(handler=Sleep(1, TimeoutError("socket")))]), TimeoutError),
        ]:
            error = await failure_of(pipeline, timeout=5)
            assert type(error.original_error) is kind
            texts.append(str(error))
        assert texts == [
            "Stage 'slow' failed: DeadlineExceeded(\"no result within the run's timeout of 5 s\")",
            "Stage 'slow' failed: StageTimeoutError(\"no result within the stage's timeout of 2 s\")",
            "Stage 'slow' failed: TimeoutError('socket')",
        ]

    async def test_at_the_same_moment_as_a_stages_timeout_the_deadline_wins_or_its_last_attempt_failed(
        self,
    ) -> None:
        error = await failure_of(Pipeline([Stage("a", Sleep(60), timeout=5, retries=3)]), timeout=5)
        assert isinstance(error.original_error, (DeadlineExceeded, StageTimeoutError))
        assert (error.attempts, now()) == (1, 5)

    async def test_an_error_that_a_cancelled_handler_raises_is_its_own_and_not_tried_again(self) -> None:
        async def handler(value: Any) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise ConnectionError("closed") from None

        error = await failure_of(Pipeline([Stage("a", handler, retries=3)]), timeout=5)
        assert (repr(error.original_error), error.attempts) == ("ConnectionError('closed')", 1)
        task: Any = asyncio.current_task()
        assert (now(), task.cancelling()) == (5, 0)

    async def test_a_late_value_of_the_last_stage_is_a_value(self) -> None:
        assert await Pipeline([stubborn]).run(7, timeout=3) == 7
        assert now() == 8

    async def test_no_stage_begins_after_it(self) -> None:
        last = Sleep(0)
        assert await exceeded(Pipeline([double, stubborn, last]), 3) == ("stubborn", 1, 8)
        assert await exceeded(Pipeline([Pipeline([stubborn, last], name="in"), last]), 3) == (
            "in/stubborn",
            1,
            16,
        )
        assert await exceeded(Pipeline([Pipeline([last, stubborn], name="in"), last]), 3) == ("in", 1, 24)
        assert last.calls == 1

    async def test_a_stage_that_blocks_the_loop_is_the_last_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop: Any = asyncio.get_running_loop()

        def block(value: Any) -> Any:
            loop._set_time(loop.time() + 10)
            return value

        last = Sleep(0)
        assert await exceeded(Pipeline([Stage("block", block), last]), 3) == ("block", 1, 10)
        assert await Pipeline([block]).run(7, timeout=3) == 7
        assert last.calls == 0

    async def test_no_middleware_calls_a_stage_after_it(self) -> None:
        calls = 0

        def blocking(value: Any) -> Any:
            nonlocal calls
            calls += 1
            loop: Any = asyncio.get_running_loop()
            loop._set_time(loop.time() + 10)
            raise ValueError

        async def persistent(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            while True:
                try:
                    return await next_stage(value)
                except Exception:
                    continue

        for middleware in (RetryMiddleware(3), persistent):
            assert (await exceeded(Pipeline([Stage("a", blocking)], middlewares=[middleware]), 3))[:2] == (
                "a",
                1,
            )
            nested = Pipeline([Pipeline([blocking, never], name="in")], middlewares=[middleware])
            assert (await exceeded(nested, 3))[:2] == ("in", 1)
        assert calls == 4

    async def test_a_nested_one_is_no_failure_to_a_breaker(self) -> None:
        breaker = CircuitBreakerMiddleware(failures=1)
        pipeline = Pipeline([Pipeline([stubborn, never], name="in")], middlewares=[breaker])
        assert await exceeded(pipeline, 3) == ("in/stubborn", 1, 8)
        assert breaker.state("in") == "closed"

    async def test_on_error_does_not_outlive_it(self) -> None:
        def blocking(value: Any) -> Any:
            loop: Any = asyncio.get_running_loop()
            loop._set_time(loop.time() + 10)
            raise ValueError("mine")

        error = await failure_of(
            Pipeline([Stage("a", blocking, on_error=lambda value, error: "late")]), timeout=3
        )
        assert repr(error.original_error) == "ValueError('mine')"

    async def test_a_rounding_error_does_not_prolong_it(self) -> None:
        await asyncio.sleep(0.7)  # 0.7 + 0.1 - 0.7 is less than 0.1
        error = await failure_of(Pipeline([stubborn, Sleep(3600)]), timeout=0.1)
        assert isinstance(error.original_error, DeadlineExceeded)
        assert now() < 6

    async def test_after_a_task_group_that_failed(self) -> None:
        async def handler(value: Any) -> Any:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(Sleep(1, ValueError())(value))
                    group.create_task(Sleep(9)(value))
            except* ValueError:
                pass
            return value

        async def and_block(value: Any) -> Any:
            await handler(value)
            loop: Any = asyncio.get_running_loop()
            loop._set_time(loop.time() + 10)

        assert (await failure_at(Pipeline([handler, Stage("late", Sleep(60))]), 5)) == ("late", 5)
        assert (await failure_at(Pipeline([Stage("late", and_block), never]), 5)) == ("late", 11)

    async def test_and_a_cancellation_after_a_task_group_that_failed(self) -> None:
        async def handler(value: Any) -> Any:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(Sleep(1, ValueError())(value))
            except* ValueError:
                pass
            await asyncio.sleep(60)

        for moment in (3, 5):  # before it, and at the same time
            task = asyncio.create_task(Pipeline([handler]).run(1, timeout=5))
            asyncio.get_running_loop().call_later(moment, task.cancel)
            with pytest.raises((asyncio.CancelledError, StageExecutionError)) as caught:
                await task
            assert moment == 5 or caught.type is asyncio.CancelledError

    async def test_a_timeout_error_of_a_middleware_stays_what_it_is(self) -> None:
        mine = TimeoutError("mine")

        async def stubborn_middleware(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            try:
                return await next_stage(value)
            except asyncio.CancelledError:
                raise mine from None

        with pytest.raises(TimeoutError) as caught:
            await Pipeline([Sleep(60)], middlewares=[stubborn_middleware]).run(1, timeout=3)
        assert caught.value is mine

    async def test_a_cancellation_from_outside_is_a_cancellation(self) -> None:
        task = asyncio.create_task(Pipeline([Sleep(60)]).run(1, timeout=30))
        await asyncio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_an_outer_timeout_is_the_callers(self) -> None:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(2):
                await Pipeline([Sleep(60)]).run(1, timeout=5)
        assert type(caught.value) is TimeoutError

    async def test_a_run_inside_a_handler_has_its_own(self) -> None:
        inner = Pipeline([Stage("deep", Sleep(60))])

        async def handler(value: Any) -> Any:
            return await inner.run(value, timeout=2)

        error = await failure_of(Pipeline([handler]), timeout=5)
        assert error.stage_name == "handler"
        assert isinstance(error.original_error, StageExecutionError)
        assert isinstance(error.original_error.original_error, DeadlineExceeded)
        assert now() == 2
        assert await exceeded(Pipeline([Stage("outer", lambda value: inner.run(value, timeout=9))]), 3) == (
            "outer",
            1,
            5,
        )

    async def test_a_step_with_a_run_of_its_own_is_cut_short_as_well(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: Any, *, context: Any = None) -> Any:
                await asyncio.sleep(60)

        assert await exceeded(Pipeline([Own()]), 5) == ("own", 1, 5)

    async def test_try_run_has_one(self) -> None:
        outcome = await Pipeline([Sleep(60)]).try_run(1, timeout=5)
        assert isinstance(outcome.error, StageExecutionError)
        assert isinstance(outcome.error.original_error, DeadlineExceeded)
        assert outcome.duration == 5

    async def test_in_a_map_each_item_has_its_own(self) -> None:
        async def work(seconds: float) -> float:
            await asyncio.sleep(seconds)
            return seconds

        results = await Pipeline([work]).map([2, 9, 4, 9], 1, timeout=5, return_exceptions=True)
        assert now() == 2 + 5 + 4 + 5
        assert (results[0], results[2]) == (2, 4)
        for index in (1, 3):
            error: Any = results[index]
            assert (error.item_index, error.item, error.stage_name) == (index, 9, "work")
            assert isinstance(error.original_error, DeadlineExceeded)
        with pytest.raises(BatchError) as caught:
            await Pipeline([work]).map([2, 9, 4, 9], 4, timeout=5)
        assert caught.value.results == {0: 2, 2: 4}
        assert set(caught.value.failures) <= {1, 3}

    async def test_in_a_stream_each_item_has_its_own(self) -> None:
        async def work(seconds: float) -> float:
            await asyncio.sleep(seconds)
            return seconds

        async with Pipeline([work]).stream([2, 9, 4], 1, timeout=5) as results:
            outcomes = [outcome async for outcome in results.outcomes()]
        assert [outcome.value for outcome in outcomes] == [2, None, 4]
        assert [outcome.duration for outcome in outcomes] == [2, 5, 4]
        assert isinstance(cast(Any, outcomes[1].error).original_error, DeadlineExceeded)

    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True])
    async def test_a_wrong_value(self, value: Any) -> None:
        pipeline = Pipeline([double])
        with pytest.raises(ValueError, match=r"^timeout must be "):
            await pipeline.run(1, timeout=value)
        with pytest.raises(ValueError, match=r"^timeout must be "):
            await pipeline.map([1], timeout=value)
        with pytest.raises(ValueError, match=r"^timeout must be "):
            pipeline.stream([1], timeout=value)

    async def test_a_wrong_type(self) -> None:
        with pytest.raises(TypeError, match=r"^timeout must be a number of seconds, not '5' \(str\)$"):
            await Pipeline([double]).run(1, timeout=cast(Any, "5"))

    def test_a_failure_keeps_nothing_alive(self) -> None:
        class Large:
            pass

        async def main() -> None:
            large = Large()
            reference = weakref.ref(large)
            for pipeline in (Pipeline([Sleep(60)]), Pipeline([stubborn, double])):
                await pipeline.try_run(large, timeout=1)
            del large
            assert reference() is None

        gc.collect()
        gc.disable()
        try:
            run_virtually(main())
        finally:
            gc.enable()


def finish(value: Any) -> Any:
    raise Finish(("finished", value))


async def finish_later(value: Any) -> Any:
    await asyncio.sleep(0)
    raise Finish(("finished", value))


def never(value: Any) -> Any:
    raise AssertionError(value)


class TestFinish:
    @pytest.mark.parametrize("hooks", HOOKS)
    @pytest.mark.parametrize("handler", [finish, finish_later])
    @pytest.mark.parametrize("options", [{}, {"retries": 3}, {"timeout": 5}])
    async def test_ends_the_run_with_its_value(self, handler: Any, options: Any, hooks: Any) -> None:
        pipeline = Pipeline([double, Stage("finish", handler, **options), never], **hooks)
        assert await pipeline.run(1) == ("finished", 2)
        assert await pipeline.run(1, timeout=60) == ("finished", 2)
        outcome = await pipeline.try_run(1)
        assert (outcome.ok, outcome.value) == (True, ("finished", 2))

    @pytest.mark.parametrize("hooks", HOOKS)
    async def test_ends_the_run_from_any_depth(self, hooks: Any) -> None:
        class Named(Stage[Any, Any]):
            pass

        for step in (finish, Named("finish", finish)):
            inner = Pipeline([Pipeline([step, never], name="deep"), never], **hooks)
            assert await Pipeline([inner, never], **hooks).run(1) == ("finished", 1)
            assert await Pipeline([inner, never], middlewares=[passing]).run(1) == ("finished", 1)

    async def test_is_an_items_result(self) -> None:
        def odd(value: int) -> int:
            if value % 2:
                raise Finish(-value)
            return value

        pipeline = Pipeline([odd, double])
        assert await pipeline.map(range(5)) == [0, -1, 4, -3, 8]
        async with pipeline.stream(range(5)) as results:
            assert [(outcome.value, outcome.ok) async for outcome in results.outcomes()] == [
                (0, True),
                (-1, True),
                (4, True),
                (-3, True),
                (8, True),
            ]

    async def test_hooks_see_its_value_as_output(self) -> None:
        log = Log()
        inner = Pipeline([finish, never], name="inner", after_stage=log.after)
        await Pipeline([inner, never], before_stage=log.before, after_stage=log.after).run(1)
        output = ("finished", 1)
        assert log.events == [
            ("before", "inner", 1),
            ("after", "finish", 1, output, None),
            ("after", "inner", 1, output, None),
        ]

    @pytest.mark.parametrize("hooks", HOOKS)
    @pytest.mark.parametrize("options", [{}, {"retries": 3}, {"timeout": 5}])
    async def test_in_a_task_group_of_the_handlers(self, options: Any, hooks: Any) -> None:
        async def handler(value: Any) -> None:
            async with asyncio.TaskGroup() as outer:
                outer.create_task(asyncio.sleep(3600))
                async with asyncio.TaskGroup() as inner:
                    inner.create_task(finish_later(value))

        pipeline = Pipeline([Stage("group", handler, **options), never], **hooks)
        assert await pipeline.run(1) == ("finished", 1)
        assert await pipeline.map([1, 2]) == [("finished", 1), ("finished", 2)]
        stage: Stage[Any, Any] = Stage("group", handler, **options)
        assert await stage.run(1) == ("finished", 1)

    @pytest.mark.parametrize("hooks", HOOKS)
    async def test_another_group_of_base_exceptions_leaves_as_it_is(self, hooks: Any) -> None:
        group = BaseExceptionGroup("both", [Finish(1), GeneratorExit()])

        def handler(value: Any) -> None:
            raise group

        for options in ({}, {"retries": 1}):
            with pytest.raises(BaseExceptionGroup) as caught:
                await Pipeline([Stage("group", handler, **cast(Any, options))], **hooks).run(1)
            assert caught.value is group

    async def test_a_hook_and_a_middleware_may_raise_it(self) -> None:
        async def middleware(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            raise Finish("early")

        def before(name: str, value: Any) -> None:
            raise Finish("early")

        assert await Pipeline([never], middlewares=[middleware]).run(1) == "early"
        assert await Pipeline([never], before_stage=before).run(1) == "early"

    async def test_no_except_exception_on_its_way_stops_it(self) -> None:
        async def careless(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            try:
                return await next_stage(value)
            except Exception:
                return "swallowed"

        assert await Pipeline([finish, never], middlewares=[careless]).run(1) == ("finished", 1)

    async def test_a_run_inside_a_handler_ends_alone(self) -> None:
        inner = Pipeline([finish, never])

        async def handler(value: Any) -> Any:
            return await inner.run(value)

        assert await Pipeline([handler, lambda value: [value]]).run(1) == [("finished", 1)]

    async def test_a_step_with_a_run_of_its_own_returns_what_that_returns(self) -> None:
        class Loud(Stage[Any, Any]):
            async def run(self, value: Any, *, context: Any = None) -> Any:
                return await super().run(value, context=context)

        assert await Pipeline([Loud("finish", finish), lambda value: [value]]).run(1) == [("finished", 1)]


async def passing(next_stage: Any, name: str, value: Any, context: Any) -> Any:
    return await next_stage(value)


class Plain:
    """A type that is not known to be never awaitable."""


class TestOutputs:
    async def test_of_any_type_from_a_sync_handler(self) -> None:
        plain = Plain()
        pipeline = Pipeline([lambda value: plain])
        assert await pipeline.run(1) is plain
        assert await pipeline.run(1, timeout=5) is plain

    async def test_of_a_sync_hook_are_ignored_without_a_word(self, caplog: pytest.LogCaptureFixture) -> None:
        pipeline = Pipeline([str], before_stage=lambda name, value: Plain(), after_stage=lambda *_: True)
        assert await pipeline.run(1) == "1"
        assert not caplog.records


class TestStrayCancellations:
    async def test_count_the_attempts(self) -> None:
        handler = Mock(side_effect=[ValueError(), asyncio.CancelledError()])
        stage: Stage[Any, Any] = Stage("stray", handler, retries=2, pass_context=False)
        results: list[Any] = await Pipeline([stage]).map([1], return_exceptions=True)
        (error,) = results
        assert (error.stage_name, error.attempts) == ("stray", 2)

    async def test_of_a_plain_stage_are_one_attempt(self) -> None:
        stray: Stage[Any, Any] = Stage(
            "stray", Mock(side_effect=asyncio.CancelledError()), pass_context=False
        )
        pipeline = Pipeline([stray], before_stage=lambda *_: None)
        results: list[Any] = await pipeline.map([1], return_exceptions=True)
        (error,) = results
        assert (error.stage_name, error.attempts) == ("stray", 1)


class TestTryRun:
    @pytest.mark.virtual
    async def test_its_duration_is_that_of_the_run(self) -> None:
        await asyncio.sleep(100)
        assert (await Pipeline([Sleep(10)]).try_run(1)).duration == 10
        assert (await Pipeline([Sleep(10)]).try_run(1, timeout=3)).duration == 3

    async def test_a_subclass_may_have_a_run_without_a_timeout(self) -> None:
        class Old(Pipeline[Any, Any]):
            async def run(self, initial_value: Any, *, context: Any = None) -> Any:  # type: ignore[override]
                return await super().run(initial_value, context=context)

        assert (await Old([double]).try_run(1)).value == 2
        assert await Old([double]).map([1, 2]) == [2, 4]
        assert await Pipeline([Old([double])]).run(1, timeout=5) == 2

    @pytest.mark.virtual
    async def test_a_value_becomes_an_outcome(self) -> None:
        async def sleep(value: int, context: Any) -> int:
            await asyncio.sleep(value)
            return value

        own = {"a": 1}
        outcome = await Pipeline([sleep]).try_run(3, context=own)
        assert outcome == Outcome(None, 3, 3, None, own, 3.0)
        assert outcome.ok
        assert outcome.unwrap() == 3

    async def test_an_exception_becomes_an_outcome(self) -> None:
        pipeline: Pipeline[int, int] = Pipeline([Stage("broken", fail)])
        outcome = await pipeline.try_run(1)
        assert not outcome.ok
        assert outcome.context == {}
        assert isinstance(outcome.error, StageExecutionError)
        assert outcome.value is None
        with pytest.raises(StageExecutionError):
            outcome.unwrap()

    async def test_cancellation_and_the_like_propagate(self) -> None:
        class Alarm(BaseException):
            pass

        async def alarm(value: Any) -> None:
            raise value

        for error in (Alarm(), asyncio.CancelledError()):
            with pytest.raises(type(error)):
                await Pipeline([alarm]).try_run(error)


class TestConstruction:
    @pytest.mark.parametrize("stages", [[], (), iter([])])
    def test_no_stage(self, stages: Any) -> None:
        with pytest.raises(ValueError, match=r"^Pipeline requires at least one stage$"):
            Pipeline(stages)

    @pytest.mark.parametrize("stages", [Stage("a", double), Pipeline([double]), "abc", 5, None, double])
    def test_something_else_than_a_list(self, stages: Any) -> None:
        with pytest.raises(TypeError, match=r"stages must be a list.*Pipeline\(\[fetch, parse\]\)"):
            Pipeline(stages)

    def test_something_that_is_no_step(self) -> None:
        with pytest.raises(TypeError, match="stages must hold"):
            Pipeline([double, 5])  # type: ignore[list-item]

    def test_a_coroutine_instead_of_a_function_is_closed_and_explained(self) -> None:
        wrong: Any = add_one(1)
        with pytest.raises(TypeError, match=r"Stage\('add_one', add_one\), without \(\)"):
            Pipeline([wrong])

    @pytest.mark.parametrize("name", [5, None, b"x"])
    def test_a_name_that_is_no_str(self, name: Any) -> None:
        with pytest.raises(TypeError, match="name must be a str"):
            Pipeline([double], name=name)

    def test_it_is_immutable(self) -> None:
        pipeline: Pipeline[int, int] = Pipeline([double])
        for attribute in ("name", "stages"):
            with pytest.raises(AttributeError, match="immutable"):
                setattr(pipeline, attribute, "other")

    def test_a_subclass_may_have_attributes_of_its_own(self) -> None:
        class Labelled(Pipeline[int, int]):
            def __init__(self, label: str) -> None:
                super().__init__([double], name=label)
                self.label = label

        labelled = Labelled("x")
        labelled.label = "y"
        assert (labelled.name, labelled.label) == ("x", "y")

    def test_a_subclass_may_have_a_name_and_stages_of_its_own(self) -> None:
        class Own(Pipeline[int, int]):
            def __init__(self) -> None:
                self.name = "first"
                super().__init__([double])
                self.name = "own"

        assert Own().name == "own"

    def test_a_mock_is_a_handler(self) -> None:
        mock = Mock(return_value=5)
        assert run_virtually(Pipeline([mock]).run(1)) == 5

    def test_its_repr_reads_as_its_structure(self) -> None:
        pipeline: Pipeline[int, int] = Pipeline(
            [Stage("a", double, timeout=2), Pipeline([double], name="in")]
        )
        assert repr(pipeline) == (
            "Pipeline([Stage('a', timeout=2), Pipeline([Stage('double')], name='in')], name='pipeline')"
        )

    def test_it_subscripts_with_and_without_the_context(self) -> None:
        assert Pipeline[int, str]([double]).name == "pipeline"
        assert Pipeline[int, str, dict[str, int]]([double]).name == "pipeline"

        class Own(Pipeline[int, str]):
            pass

        assert Own([double]).name == "pipeline"
        with pytest.raises(TypeError):
            Pipeline[int]


class TestReplace:
    @staticmethod
    def full() -> Pipeline[int, int]:
        return Pipeline(
            [double],
            name="full",
            before_stage=lambda name, value: None,
            after_stage=lambda name, value, output, error: None,
            middlewares=[lambda call, name, value, context: call(value + 1)],
            observers=[print],
            on_hook_error=print,
        )

    def test_other_options_stand_in_for_the_old_ones(self) -> None:
        seen: list[Event] = []
        pipeline: Pipeline[int, int] = Pipeline([double], name="a")
        other = pipeline.replace(name="b", stages=[add_one, double], observers=[seen.append])
        assert run_virtually(other.run(1)) == 4
        assert (other.name, [stage.name for stage in other.stages]) == ("b", ["add_one", "double"])
        assert {event.pipeline for event in seen} == {"b"}
        assert (pipeline.name, pipeline.observers, len(pipeline.stages)) == ("a", (), 1)

    def test_the_rest_is_kept(self) -> None:
        full = self.full()
        same = full.replace()
        assert same is not full
        assert (same.stages, same.name, same._options()) == (full.stages, full.name, full._options())
        assert set(same._options()) == {
            "before_stage",
            "after_stage",
            "middlewares",
            "observers",
            "on_hook_error",
        }
        quiet = full.replace(before_stage=None, after_stage=None, middlewares=None, observers=())
        assert set(quiet._options()) == {"on_hook_error"}
        assert run_virtually(quiet.run(1)) == 2

    def test_a_subclass_keeps_what_it_has_set(self) -> None:
        class Labelled(Pipeline[int, int]):
            def __init__(self, label: str) -> None:
                super().__init__([double], name=label)
                self.label = label

        labelled = Labelled("x").replace(middlewares=[lambda call, name, value, context: call(value + 1)])
        assert type(labelled) is Labelled
        assert (labelled.label, labelled.name) == ("x", "x")
        assert run_virtually(labelled.run(1)) == 4

    def test_what_is_wrong_is_refused_as_by_the_constructor(self) -> None:
        pipeline: Pipeline[int, int] = Pipeline([double])
        with pytest.raises(TypeError, match="unexpected keyword argument 'timeout'"):
            pipeline.replace(timeout=1)
        with pytest.raises(ValueError, match="at least one stage"):
            pipeline.replace(stages=[])

    def test_what_it_was_given_can_be_read(self) -> None:
        full = self.full()
        assert (full.observers, full.on_hook_error, len(full.middlewares)) == ((print,), print, 1)
        plain: Pipeline[int, int] = Pipeline([double])
        assert (plain.observers, plain.on_hook_error, plain.middlewares) == ((), None, ())


async def test_the_item_is_known_to_the_error_that_ends_its_run_but_not_inside() -> None:
    outer: list[Event] = []
    inner: list[Event] = []
    failing = Pipeline([lambda text: int(text)], name="in", observers=[inner.append])
    pipeline = Pipeline([str, failing], observers=[outer.append])
    (failure,) = await pipeline.map([None], return_exceptions=True)
    assert isinstance(failure, StageExecutionError)
    assert outer[-1].error is failure
    assert (failure.item_index, failure.item) == (0, None)
    told = inner[-1].error
    assert isinstance(told, StageExecutionError)
    assert (inner[-1].item_index, told.item_index) == (0, None)
