"""A stage: its arguments, attempts, delays and timeouts, each at the edges."""

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import gc
import inspect
import itertools
import logging
import math
import operator
import pickle
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from fractions import Fraction
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest
from aiolimiter import AsyncLimiter
from hypothesis import given
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    Finish,
    Pipeline,
    PipelineError,
    RetryBudget,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    each,
    staged,
)
from async_pipeline import stage as stage_module
from async_pipeline.stage import StageOptions, callable_name
from tests.helpers import Meter, run_virtually


def same(value: Any) -> Any:
    return value


def with_context(value: Any, context: Any) -> Any:
    return value, context


async def async_same(value: Any) -> Any:
    return value


async def forever(value: Any) -> None:
    await asyncio.Event().wait()


def now() -> float:
    return asyncio.get_running_loop().time()


class Flaky:
    """A handler that fails a few times, and knows when it was called."""

    def __init__(self, *errors: BaseException | None, seconds: float = 0.0) -> None:
        self.errors = iter(errors)
        self.seconds = seconds
        self.times: list[float] = []

    async def __call__(self, value: Any) -> Any:
        self.times.append(now())
        await asyncio.sleep(self.seconds)
        error = next(self.errors, None)
        if error is not None:
            raise error
        return value


def failing(times: int) -> Flaky:
    return Flaky(*(ValueError(n) for n in range(1, times + 1)))


async def failure_of(stage: Stage[Any, Any], value: Any = 1) -> StageExecutionError:
    with pytest.raises(StageExecutionError) as caught:
        await stage.run(value)
    return caught.value


class TestArguments:
    def test_defaults(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", same)
        assert (stage.name, stage.handler) == ("fetch", same)
        assert (stage.timeout, stage.retries, stage.retry_delay) == (None, 0, 0.0)
        assert (stage.max_delay, stage.jitter, stage.retry_on) == (None, 0.0, Exception)
        assert (stage.executor, stage.limiter, stage.on_error, stage.retry_budget) == (None,) * 4
        assert (stage.backoff, stage.pass_context) == ("fixed", None)

    def test_every_option_is_readable(self) -> None:
        options: Any = {
            "timeout": 2,
            "retries": 3,
            "retry_delay": 0.5,
            "backoff": "exponential",
            "max_delay": 8,
            "jitter": 0.5,
            "retry_on": (OSError, ValueError),
            "executor": "thread",
            "limiter": asyncio.Semaphore(2),
            "on_error": with_context,
            "pass_context": True,
            "retry_budget": RetryBudget(),
        }
        stage: Any = Stage("fetch", same, **options)
        assert options == {option: getattr(stage, option) for option in options}
        assert set(options) == set(StageOptions.__annotations__)

    def test_options_are_keywords(self) -> None:
        with pytest.raises(TypeError):
            Stage("fetch", same, 2.0)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"retrys"):
            Stage("fetch", same, retrys=2)  # type: ignore[call-overload]

    @pytest.mark.parametrize("name", [None, 1, b"fetch", same])
    def test_a_name_that_is_no_string(self, name: Any) -> None:
        with pytest.raises(TypeError, match=r"^name must be a str"):
            Stage(name, same)

    @pytest.mark.parametrize("name", ["", "a/b", "{}%s'\"\n", "käse"])
    async def test_any_string_is_a_name(self, name: str) -> None:
        error = await failure_of(Stage(name, failing(1)))
        assert error.stage_name == name
        assert str(error) == f"Stage {name!r} failed: ValueError(1)"

    @pytest.mark.parametrize("handler", [None, 1, "fetch", [same], {}])
    def test_a_handler_that_is_no_callable(self, handler: Any) -> None:
        with pytest.raises(TypeError, match=r"^handler must be a callable"):
            Stage("fetch", handler)

    def test_a_coroutine_instead_of_its_function_is_answered_with_the_right_call(self) -> None:
        coroutine: Any = async_same(1)
        with pytest.raises(TypeError, match=r"write Stage\('fetch', async_same\), without \(\)"):
            Stage("fetch", coroutine)
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED

    @pytest.mark.parametrize("handler", [lambda: 1, lambda value, context, more: 1, lambda *, value: 1])
    def test_a_handler_that_takes_neither_form(self, handler: Any) -> None:
        with pytest.raises(
            TypeError, match=r"^handler <function .* can't be used: it must take handler\(value\)"
        ):
            Stage("fetch", handler)

    @pytest.mark.parametrize("parameter", ["timeout", "retry_delay"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, True, False, 10**400, -(10**400)])
    def test_wrong_seconds(self, parameter: Any, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"^{parameter} must be "):
            Stage("fetch", same, **{parameter: value})

    @pytest.mark.parametrize("parameter", ["timeout", "retry_delay"])
    @pytest.mark.parametrize("value", ["1", 1j, [1], object()], ids=lambda value: type(value).__name__)
    def test_seconds_of_a_wrong_type(self, parameter: Any, value: Any) -> None:
        with pytest.raises(TypeError, match=rf"^{parameter} must be a number of seconds"):
            Stage("fetch", same, **{parameter: value})

    def test_no_timeout_is_none_and_no_delay_is_zero(self) -> None:
        assert Stage("fetch", same, timeout=None).timeout is None
        with pytest.raises(ValueError, match=r"^timeout must be greater than 0$"):
            Stage("fetch", same, timeout=0)
        assert Stage("fetch", same, retry_delay=0).retry_delay == 0
        with pytest.raises(TypeError, match=r"^retry_delay must be a number of seconds, not None"):
            Stage("fetch", same, retry_delay=None)  # type: ignore[call-overload]

    @pytest.mark.parametrize("value", [-1, True, False, math.nan, math.inf])
    def test_wrong_retries(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^retries must be greater than or equal to 0"):
            Stage("fetch", same, retries=value)

    @pytest.mark.parametrize("value", [None, 1.0, "1", Fraction(1)], ids=repr)
    def test_retries_of_a_wrong_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^retries must be an int"):
            Stage("fetch", same, retries=value)

    def test_wrong_backoff(self) -> None:
        with pytest.raises(ValueError, match=r'^backoff must be "fixed" or "exponential"$'):
            Stage("fetch", same, backoff="linear")
        with pytest.raises(TypeError, match=r'^backoff must be "fixed" or "exponential"'):
            Stage("fetch", same, backoff=None)  # type: ignore[call-overload]

    @pytest.mark.parametrize("value", [0, 1, "yes"])
    def test_wrong_pass_context(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^pass_context must be True, False or None"):
            Stage("fetch", same, pass_context=value)

    def test_a_wrong_max_delay_or_jitter(self) -> None:
        assert Stage("fetch", same, max_delay=0, jitter=1).max_delay == 0
        with pytest.raises(ValueError, match=r"^max_delay must be greater than or equal to 0$"):
            Stage("fetch", same, max_delay=-1)
        with pytest.raises(ValueError, match=r"^jitter must be between 0 and 1$"):
            Stage("fetch", same, jitter=1.5)

    def test_a_wrong_retry_on_or_retry_budget(self) -> None:
        with pytest.raises(TypeError, match=r"^retry_on must be an exception type, a tuple of them"):
            Stage("fetch", same, retry_on=cast(Any, "ValueError"))
        with pytest.raises(
            TypeError, match=r"^retry_budget must be a RetryBudget, not 10; write RetryBudget"
        ):
            Stage("fetch", same, retry_budget=cast(Any, 10))

    @pytest.mark.parametrize("limiter", [5, "5", threading.Lock(), contextlib.nullcontext, asyncio.Semaphore])
    def test_a_limiter_that_is_no_async_context_manager(self, limiter: Any) -> None:
        with pytest.raises(
            TypeError, match=r"^limiter must be .*, not .*; write limiter=asyncio.Semaphore\("
        ):
            Stage("fetch", same, limiter=limiter)

    @pytest.mark.parametrize("half", ["__aenter__", "__aexit__"])
    def test_half_a_limiter(self, half: str) -> None:
        limiter: Any = type("Half", (), {half: async_same})()
        with pytest.raises(TypeError, match=r"^limiter must be an async context manager"):
            Stage("fetch", same, limiter=limiter)

    def test_a_limiter_that_can_be_entered_only_once(self) -> None:
        @contextlib.asynccontextmanager
        async def slot() -> AsyncIterator[None]:
            yield

        with pytest.raises(TypeError, match=r"^limiter is entered for each attempt, .*; write a class with"):
            Stage("fetch", same, limiter=slot())

    def test_an_on_error_that_can_not_be_called_so(self) -> None:
        with pytest.raises(TypeError, match=r"^on_error must be a callable, not 'skip'$"):
            Stage("fetch", same, on_error=cast(Any, "skip"))
        with pytest.raises(TypeError, match=r"^on_error=.* must take on_error\(value, error\) or on_error\("):
            Stage("fetch", same, on_error=cast(Any, lambda error: None))


class TestContext:
    async def test_is_the_same_object_that_was_given(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", with_context)
        for context in ({}, {"a": 1}, [], 0, types.SimpleNamespace(), object()):
            assert (await stage.run(1, context=context))[1] is context

    async def test_is_a_new_dict_when_none_is_given(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", with_context)
        _, first = await stage.run(1)
        _, second = await stage.run(1, context=None)
        assert first == second == {}
        assert first is not second

    async def test_is_the_same_for_every_attempt(self) -> None:
        seen: list[Any] = []

        def handler(value: Any, context: Any) -> Any:
            seen.append(context)
            raise ValueError

        await failure_of(Stage("fetch", handler, retries=2))
        assert seen[0] is seen[1] is seen[2]

    async def test_passed_by_hand(self) -> None:
        split: Stage[Any, Any] = Stage("split", str.split, pass_context=True)
        assert await split.run("a-b", context="-") == ["a", "b"]
        box: Stage[Any, Any] = Stage("range", range, pass_context=True)
        assert await box.run(1, context=3) == range(1, 3)

        def add(value: int, more: int = 0) -> int:
            return value + more

        optional: Stage[Any, Any] = Stage("add", add, pass_context=True)
        assert await optional.run(1, context=2) == 3

    async def test_kept_back_by_hand(self) -> None:
        stage: Stage[Any, Any] = Stage("args", lambda *args: args, pass_context=False)
        assert await stage.run(1) == (1,)
        mock = Mock(return_value=5)
        quiet: Stage[Any, Any] = Stage("mock", mock, pass_context=False)
        assert await quiet.run(1) == 5
        mock.assert_called_once_with(1)

    async def test_mocks_receive_it(self) -> None:
        mock, async_mock, context = Mock(return_value=5), AsyncMock(return_value=6), object()
        sync: Stage[Any, Any] = Stage("mock", mock)
        asynchronous: Stage[Any, Any] = Stage("mock", async_mock)
        assert await sync.run(1, context=context) == 5
        assert await asynchronous.run(1, context=context) == 6
        mock.assert_called_once_with(1, context)
        async_mock.assert_awaited_once_with(1, context)

    def test_is_keyword_only(self) -> None:
        stage: Any = Stage("fetch", with_context)
        with pytest.raises(TypeError):
            stage.run(1, {})

    def test_is_decided_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stage: Stage[Any, Any] = Stage("fetch", with_context)
        monkeypatch.setattr(inspect, "signature", Mock(side_effect=AssertionError))
        assert run_virtually(stage.run(1, context=2)) == (1, 2)


class Custom:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[None, None, Any]:
        yield
        return self.value


@types.coroutine
def old_style(value: Any) -> Generator[None, None, Any]:
    yield
    return value


def future_of(value: Any) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, value)
    return future


class TestResults:
    @pytest.mark.parametrize("seconds", [None, 5.0])
    @pytest.mark.parametrize(
        "handler",
        [
            same,
            async_same,
            future_of,
            Custom,
            old_style,
            lambda value: asyncio.ensure_future(async_same(value)),
            lambda value: asyncio.gather(async_same(value), async_same(value)),
            lambda value: asyncio.shield(async_same(value)),
            lambda value: async_same(value),
            functools.partial(async_same),
            staged(async_same).handler,
        ],
        ids=callable_name,
    )
    async def test_awaitables_of_every_kind_are_awaited(
        self, handler: Callable[..., Any], seconds: float | None
    ) -> None:
        stage: Stage[Any, Any] = Stage("any", handler, timeout=seconds)
        assert await stage.run("value") in ("value", ["value", "value"])

    @pytest.mark.parametrize("seconds", [None, 5.0])
    async def test_values_of_every_kind_are_values(self, seconds: float | None) -> None:
        async def agen() -> AsyncIterator[int]:
            yield 1

        def gen() -> Iterator[int]:
            yield 1

        stage: Stage[Any, Any] = Stage("any", same, timeout=seconds)
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        values: list[Any] = [None, 0, "", [], gen(), agen(), same, Custom, future, ValueError("no"), Mock()]
        for value in values:
            assert await stage.run(value) is value

    async def test_what_is_awaited_is_not_awaited_again(self) -> None:
        async def handler(value: Any) -> Any:
            return Custom(value)

        stage: Stage[Any, Any] = Stage("any", handler)
        assert isinstance(await stage.run(1), Custom)

    async def test_an_awaitable_input_reaches_the_handler_unawaited(self) -> None:
        value = Custom(1)
        stage: Stage[Any, Any] = Stage("any", lambda given: given is value)
        assert await stage.run(value) is True

    async def test_an_awaitable_that_is_none_fails_as_its_stage(self) -> None:
        class Broken:
            def __await__(self) -> Any:
                return 1

        error = await failure_of(Stage("broken", lambda value: Broken()))
        assert isinstance(error.original_error, TypeError)


class TestFailure:
    async def test_is_wrapped_with_its_cause(self) -> None:
        original = ValueError("no")
        error = await failure_of(Stage("fetch", Flaky(original)))
        assert str(error) == "Stage 'fetch' failed: ValueError('no')"
        assert error.original_error is error.__cause__ is original
        assert error.attempts == 1
        assert isinstance(error, PipelineError)

    async def test_of_a_sync_handler(self) -> None:
        error = await failure_of(Stage("divide", lambda value: 1 / value), 0)
        assert isinstance(error.original_error, ZeroDivisionError)

    async def test_shows_where_the_handler_raised(self) -> None:
        def deep(value: Any) -> Any:
            raise ValueError

        error = await failure_of(Stage("deep", deep))
        frames = inspect.getinnerframes(error.original_error.__traceback__)  # type: ignore[arg-type]
        assert frames[-1].function == "deep"

    async def test_of_a_stage_within_a_handler_is_that_handlers(self) -> None:
        inner: Stage[Any, Any] = Stage("inner", failing(1))
        error = await failure_of(Stage("outer", inner.run))
        assert error.stage_name == "outer"
        assert isinstance(error.original_error, StageExecutionError)
        assert error.original_error.stage_name == "inner"

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
    def test_other_base_exceptions_leave_as_they_are_after_one_attempt(
        self, kind: type[BaseException]
    ) -> None:
        calls: list[int] = []

        def handler(value: int) -> int:
            calls.append(value)
            raise kind

        stage = Stage("fetch", handler, retries=3, timeout=5)
        coroutine = stage.run(1)
        with pytest.raises(kind):
            coroutine.send(None)
        assert calls == [1]

    async def test_leaves_no_reference_cycle(self) -> None:
        class Marker:
            pass

        async def handler(value: Any) -> Any:
            raise ValueError(value)

        marker = Marker()
        gone = weakref.ref(marker)
        stage: Stage[Any, Any] = Stage("fetch", handler, retries=1)
        gc.disable()
        try:
            with contextlib.suppress(StageExecutionError):
                await stage.run(marker)
            del marker
            assert gone() is None
        finally:
            gc.enable()


class TestRetries:
    async def test_until_it_succeeds(self) -> None:
        handler = failing(2)
        stage: Stage[Any, Any] = Stage("fetch", handler, retries=5)
        assert await stage.run("value") == "value"
        assert len(handler.times) == 3

    @pytest.mark.parametrize("retries", [0, 1, 4])
    async def test_one_attempt_more_than_retries(self, retries: int) -> None:
        handler = failing(100)
        error = await failure_of(Stage("fetch", handler, retries=retries))
        assert error.attempts == len(handler.times) == retries + 1
        assert str(error.original_error) == str(retries + 1)

    async def test_of_a_sync_handler(self) -> None:
        attempts = iter([ZeroDivisionError, ValueError])

        def handler(value: Any) -> Any:
            for error in attempts:
                raise error
            return value

        stage: Stage[Any, Any] = Stage("fetch", handler, retries=2)
        assert await stage.run(1) == 1

    async def test_each_run_has_all_its_attempts(self) -> None:
        handler = failing(3)
        stage: Stage[Any, Any] = Stage("fetch", handler, retries=1)
        assert (await failure_of(stage)).attempts == 2
        assert await stage.run(1) == 1

    @pytest.mark.virtual
    @pytest.mark.parametrize(
        ("backoff", "times"),
        [("fixed", [0, 1.5, 3.0, 4.5, 6.0]), ("exponential", [0, 1.5, 4.5, 10.5, 22.5])],
    )
    async def test_the_delays_are_exact(self, backoff: str, times: list[float]) -> None:
        handler = failing(100)
        await failure_of(Stage("fetch", handler, retries=4, retry_delay=1.5, backoff=backoff))
        assert handler.times == times
        assert now() == times[-1]  # none after the last attempt

    @pytest.mark.virtual
    async def test_a_delay_begins_when_the_attempt_has_ended(self) -> None:
        handler = Flaky(ValueError(), seconds=10)
        stage: Stage[Any, Any] = Stage("fetch", handler, retries=1, retry_delay=1)
        await stage.run(1)
        assert handler.times == [0, 11]

    @given(
        st.integers(0, 6),
        st.floats(0, 1000) | st.integers(0, 1000) | st.fractions(0, 1000),
        st.sampled_from(["fixed", "exponential"]),
    )
    def test_the_sum_of_the_delays(self, retries: int, delay: Any, backoff: str) -> None:
        async def main() -> float:
            await failure_of(
                Stage("fetch", failing(100), retries=retries, retry_delay=delay, backoff=backoff)
            )
            return now()

        factors = [1 if backoff == "fixed" else 2**n for n in range(retries)]
        assert run_virtually(main()) == pytest.approx(sum(float(delay) * factor for factor in factors))

    async def test_exponential_backoff_never_overflows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sleep = AsyncMock()
        monkeypatch.setattr("async_pipeline.stage.asyncio.sleep", sleep)
        await failure_of(
            Stage("fetch", lambda value: 1 / 0, retries=1100, retry_delay=1, backoff="exponential")
        )
        monkeypatch.undo()
        delays = [call.args[0] for call in sleep.await_args_list]
        assert delays[:1024] == [2.0**n for n in range(1024)]
        assert delays[1024:] == [sys.float_info.max] * 76

    async def test_sleeps_through_the_module_with_one_argument(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sleep = AsyncMock()
        stage: Stage[Any, Any] = Stage(
            "fetch", lambda value: 1 / 0, retries=3, retry_delay=0.5, backoff="exponential"
        )
        monkeypatch.setattr("async_pipeline.stage.asyncio.sleep", sleep)
        await failure_of(stage)
        monkeypatch.undo()
        assert [(call.args, call.kwargs) for call in sleep.await_args_list] == [
            ((d,), {}) for d in (0.5, 1.0, 2.0)
        ]

    @pytest.mark.parametrize("backoff", ["fixed", "exponential"])
    async def test_a_zero_delay_does_not_sleep(self, backoff: str, monkeypatch: pytest.MonkeyPatch) -> None:
        sleep = AsyncMock()
        monkeypatch.setattr("async_pipeline.stage.asyncio.sleep", sleep)
        await failure_of(Stage("fetch", lambda value: 1 / 0, retries=3, backoff=backoff))
        monkeypatch.undo()
        sleep.assert_not_awaited()

    async def test_a_cancelled_delay_is_a_cancellation_and_nothing_else(self) -> None:
        handler = failing(100)
        stage: Stage[Any, Any] = Stage("fetch", handler, retries=3, retry_delay=3600)
        task = asyncio.ensure_future(stage.run(1))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert len(handler.times) == 1
        seen: BaseException | None = caught.value
        while seen is not None:  # the attempt's error is not what the cancellation was raised for
            assert not isinstance(seen, ValueError)
            seen = seen.__context__

    async def test_a_handler_that_cancels_itself(self) -> None:
        calls: list[int] = []

        async def handler(value: int) -> int:
            calls.append(value)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
            return value

        task = asyncio.ensure_future(Stage("fetch", handler, retries=3, timeout=5).run(1))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert calls == [1]
        assert task.cancelled()


class TestLogging:
    async def test_a_retry_is_a_record_for_who_debugs(self, caplog: pytest.LogCaptureFixture) -> None:
        flaky = Flaky(ValueError())
        with caplog.at_level(logging.DEBUG, "async_pipeline"):
            await Stage("flaky", flaky, retries=1).run(1)
            await Stage("fine", str).run(1)
        (record,) = caplog.records
        assert record.levelno == logging.DEBUG
        assert record.getMessage() == "Attempt 1 of stage 'flaky' failed; the next in 0 s"


class TestRetryOn:
    async def test_errors_that_match_are_tried_again(self) -> None:
        handler = Flaky(KeyError(), OSError(), KeyError())
        assert await Stage("fetch", handler, retries=3, retry_on=(KeyError, OSError)).run(1) == 1
        assert len(handler.times) == 4

    async def test_an_error_that_does_not_match_is_final(self) -> None:
        handler = Flaky(KeyError(), ValueError("no"), KeyError())
        error = await failure_of(Stage("fetch", handler, retries=3, retry_on=KeyError))
        assert isinstance(error.original_error, ValueError)
        assert error.attempts == len(handler.times) == 2

    async def test_a_predicate_is_asked_about_the_handlers_own_error(self) -> None:
        first, second = ValueError(1), ValueError(2)
        asked: list[object] = []

        def predicate(error: Exception) -> bool:
            asked.append(error)
            return error is first

        error = await failure_of(Stage("fetch", Flaky(first, second), retries=5, retry_on=predicate))
        assert asked == [first, second]
        assert (error.original_error, error.attempts) == (second, 2)

    @pytest.mark.virtual
    async def test_a_number_is_the_exact_delay(self) -> None:
        handler = Flaky(OSError(7), OSError(0), OSError(0.5))
        stage = Stage(
            "fetch",
            handler,
            retries=9,
            retry_delay=100,
            backoff="exponential",
            max_delay=1,
            jitter=1,
            retry_on=lambda error: error.args[0],
        )
        await stage.run(1)
        assert handler.times == [0, 7, 7, 7.5]

    @pytest.mark.parametrize("broken", [lambda error: 1 / 0, lambda error: -1, lambda error: "soon"])
    async def test_a_predicate_that_fails_is_logged_and_stops(
        self, broken: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        error = await failure_of(Stage("fetch", failing(9), retries=3, retry_on=broken))
        assert repr(error.original_error) == "ValueError(1)"
        assert error.attempts == 1
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("async_pipeline", "ERROR")
        assert "retry_on=" in record.message
        assert "stage 'fetch'" in record.message
        assert record.exc_info is not None

    async def test_a_predicate_may_finish_the_run(self) -> None:
        def known(error: Exception) -> bool:
            raise Finish("known")

        assert await Stage("fetch", failing(1), retries=1, retry_on=known).run(1) == "known"

    def test_a_predicate_may_be_interrupted(self) -> None:
        def interrupted(error: Exception) -> bool:
            raise KeyboardInterrupt

        def fail(value: Any) -> None:
            raise ValueError

        with pytest.raises(KeyboardInterrupt):
            Stage("fetch", fail, retries=1, retry_on=interrupted).run(1).send(None)

    async def test_our_own_timeout_is_one_of_the_errors(self) -> None:
        stage = Stage("fetch", forever, timeout=0.01, retries=2, retry_on=StageTimeoutError)
        assert (await failure_of(stage)).attempts == 3
        assert (await failure_of(stage.replace(retry_on=OSError))).attempts == 3, "a TimeoutError is one"
        assert (await failure_of(stage.replace(retry_on=ValueError))).attempts == 1

    @pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, Finish])
    @pytest.mark.parametrize("retry_on", [BaseException, None, lambda error: True])
    def test_what_is_no_exception_is_never_retried(self, kind: Any, retry_on: Any) -> None:
        calls = []

        def handler(value: Any) -> None:
            calls.append(value)
            raise kind

        stage = Stage("fetch", handler, retries=3, retry_on=retry_on or kind)
        with pytest.raises(StopIteration if kind is Finish else kind):
            stage.run(1).send(None)
        assert calls == [1]

    async def test_a_group_needs_all_its_leaves(self) -> None:
        group = ExceptionGroup("two", [OSError(), KeyError()])
        assert (await failure_of(Stage("fetch", Flaky(group), retries=1, retry_on=OSError))).attempts == 1
        assert await Stage("fetch", Flaky(group), retries=1, retry_on=(OSError, KeyError)).run(1) == 1


class TestDelays:
    @pytest.mark.virtual
    async def test_max_delay_caps_them(self) -> None:
        handler = failing(5)
        stage = Stage("fetch", handler, retries=5, retry_delay=1, backoff="exponential", max_delay=3)
        await stage.run(1)
        assert handler.times == [0, 1, 3, 6, 9, 12]

    @pytest.mark.virtual
    async def test_jitter_shortens_them(self) -> None:
        handler = failing(50)
        await Stage("fetch", handler, retries=50, retry_delay=8, jitter=0.5).run(1)
        delays = [later - earlier for earlier, later in itertools.pairwise(handler.times)]
        assert all(4 < delay <= 8 for delay in delays)
        assert len(set(delays)) > 40

    async def test_never_sleeps_on_infinity(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []

        async def sleep(delay: float) -> None:
            slept.append(delay)

        monkeypatch.setattr(asyncio, "sleep", sleep)
        handler = Mock(side_effect=[ValueError()] * 1100 + ["done"])
        stage = Stage("fetch", handler, retries=1100, retry_delay=1e300, backoff="exponential", jitter=1)
        assert await stage.run(1) == "done"
        assert len(slept) == 1100
        assert all(map(math.isfinite, slept))


class TestRetryBudget:
    async def test_a_dead_dependency_is_hardly_called_more_often(self) -> None:
        calls = 0

        async def dead(value: int) -> None:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            raise ConnectionError

        stage = Stage("dead", dead, retries=3, retry_budget=RetryBudget(max_tokens=10, token_ratio=0.1))
        results = await Pipeline([stage]).map(range(1000), 50, return_exceptions=True)
        assert all(isinstance(result, StageExecutionError) for result in results)
        assert calls == 1004

    async def test_is_shared_between_stages(self) -> None:
        budget = RetryBudget(4)
        first = Stage("first", failing(9), retries=9, retry_budget=budget)
        second = Stage("second", failing(9), retries=9, retry_budget=budget)
        assert (await failure_of(first)).attempts == 2
        assert (await failure_of(second)).attempts == 1

    async def test_successes_allow_retries_again(self) -> None:
        budget = RetryBudget(4, token_ratio=1)
        stage = Stage(
            "fetch", Flaky(OSError(), OSError(), None, None, OSError(), None), retries=1, retry_budget=budget
        )
        assert (await failure_of(stage)).attempts == 2
        assert [await stage.run(1) for _ in range(3)] == [1, 1, 1]
        assert budget.tokens == 4

    async def test_finish_is_a_success(self) -> None:
        budget = RetryBudget(4)
        budget.record_failure()
        stage = Stage("fetch", Flaky(Finish("done")), retry_budget=budget)
        assert await stage.run(1) == "done"
        assert budget.tokens == 3.1

    async def test_counts_without_retries_and_in_a_pipeline(self) -> None:
        budget = RetryBudget(10)
        stage = Stage("fetch", Flaky(OSError(), None), retry_budget=budget)
        await Pipeline([stage]).try_run(1)
        assert budget.tokens == 9
        await Pipeline([stage]).run(1)
        assert budget.tokens == 9.1

    async def test_a_cancellation_counts_for_nothing(self) -> None:
        budget = RetryBudget(10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Stage("fetch", forever, retries=3, retry_budget=budget).run(1)
        assert budget.tokens == 10


class TestNoAttemptAfterACancellation:
    async def test_that_the_handler_turned_into_an_error(self) -> None:
        attempts = 0

        async def stubborn(value: Any) -> None:
            nonlocal attempts
            attempts += 1
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                raise ConnectionError("closed") from None

        task = asyncio.create_task(Stage("fetch", stubborn, retries=3).run(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(StageExecutionError) as caught:
            await task
        assert isinstance(caught.value.original_error, ConnectionError)
        assert caught.value.attempts == attempts == 1

    async def test_nor_is_on_error_asked(self) -> None:
        async def stubborn(value: Any) -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                raise ConnectionError("closed") from None

        def wrong(value: Any, error: Exception) -> None:
            raise AssertionError

        task = asyncio.create_task(Stage("fetch", stubborn, on_error=wrong).run(1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(StageExecutionError) as caught:
            await task
        assert repr(caught.value.original_error) == "ConnectionError('closed')"

    async def test_but_a_run_while_cleaning_up_has_all_its_attempts(self) -> None:
        handler = failing(2)

        async def clean_up() -> Any:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                return await Stage("save", handler, retries=3).run("rest")

        task = asyncio.create_task(clean_up())
        await asyncio.sleep(0)
        task.cancel()
        assert await task == "rest"
        assert len(handler.times) == 3

    @pytest.mark.virtual
    async def test_a_failed_task_group_is_none(self) -> None:
        # before CPython 3.13 it leaves a request to end behind in the task (gh-116720)
        attempts: list[float] = []

        async def fail_later() -> None:
            await asyncio.sleep(1)
            raise ConnectionError

        async def handler(value: Any) -> None:
            attempts.append(now())
            if len(attempts) == 4:
                raise ValueError
            async with asyncio.TaskGroup() as group:
                group.create_task(fail_later())
                group.create_task(asyncio.sleep(9))

        stage: Stage[Any, Any] = Stage("fetch", handler, retries=4)
        error = await failure_of(stage)
        assert error.attempts == 5
        assert attempts == [0, 1, 2, 3, 3]
        attempts.clear()
        assert await stage.replace(on_error=lambda value, error: "default").run(1) == "default"

    @pytest.mark.virtual
    async def test_that_follows_a_timeout(self) -> None:
        attempts = 0

        async def handler(value: Any) -> None:
            nonlocal attempts
            attempts += 1
            try:
                async with asyncio.timeout(1):
                    await asyncio.sleep(9)
            except TimeoutError:
                try:
                    await asyncio.sleep(9)
                except asyncio.CancelledError:
                    raise ValueError from None

        task = asyncio.create_task(Stage("fetch", handler, retries=3).run(1))
        await asyncio.sleep(2)
        task.cancel()
        with pytest.raises(StageExecutionError):
            await task
        assert attempts == 1

    @pytest.mark.virtual
    async def test_by_a_batch_that_the_handler_turned_into_a_timeout(self) -> None:
        attempts: list[int] = []

        async def handler(value: int) -> None:
            attempts.append(value)
            try:
                await asyncio.sleep(value)
            except asyncio.CancelledError:
                raise TimeoutError from None
            raise ValueError

        stage: Stage[int, None] = Stage("fetch", handler, retries=3, retry_on=TimeoutError)
        with pytest.raises(BatchError):
            await Pipeline([stage]).map([1, 9])
        assert attempts == [1, 9]

    @pytest.mark.virtual
    async def test_nor_one_that_was_cancelled(self) -> None:
        attempts = 0

        async def fail_on_the_way_out() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                raise ConnectionError

        async def handler(value: Any) -> None:
            nonlocal attempts
            attempts += 1
            async with asyncio.TaskGroup() as group:
                group.create_task(fail_on_the_way_out())
                await asyncio.sleep(3600)

        task = asyncio.create_task(Stage("fetch", handler, retries=3).run(1))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(StageExecutionError):
            await task
        assert attempts == 1

    async def test_that_the_handler_made_and_took_back_is_none(self) -> None:
        task: Any = asyncio.current_task()

        async def handler(value: int) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                task.cancel()
                await asyncio.sleep(0)
            task.uncancel()
            raise ValueError

        assert (await failure_of(Stage("fetch", handler, retries=3))).attempts == 4


class Slots:
    """A limiter written by hand, that keeps a diary."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = iter(errors)
        self.diary: list[str] = []
        self.held = 0

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)
        error = next(self.errors, None)
        if error is not None:
            raise error
        self.held += 1
        self.diary.append("enter")

    async def __aexit__(self, *error: object) -> None:
        self.held -= 1
        self.diary.append("exit")


PAIR = ["enter", "exit"]


class TestLimiter:
    async def test_is_entered_around_each_attempt(self) -> None:
        slots = Slots()
        await Stage("fetch", failing(2), limiter=slots, retries=2).run(1)
        assert slots.diary == PAIR * 3

    @pytest.mark.virtual
    async def test_is_free_while_a_retry_waits(self) -> None:
        slots = Slots()
        task = asyncio.create_task(
            Stage("fetch", failing(1), limiter=slots, retries=1, retry_delay=10).run(1)
        )
        await asyncio.sleep(5)
        assert slots.diary == PAIR
        assert await task == 1

    async def test_is_left_by_a_timeout_and_by_a_cancellation(self) -> None:
        slots = Slots()
        await failure_of(Stage("fetch", forever, limiter=slots, timeout=0.01))
        task = asyncio.create_task(Stage("fetch", forever, limiter=slots).run(1))
        for _ in range(4):
            await asyncio.sleep(0)
        assert slots.held == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slots.diary == PAIR * 2

    @pytest.mark.virtual
    async def test_waiting_for_it_does_not_count_towards_the_timeout(self) -> None:
        semaphore = asyncio.Semaphore(1)
        stage = Stage("fetch", Flaky(seconds=3), limiter=semaphore, timeout=4)
        assert await asyncio.gather(*(stage.run(n) for n in range(5))) == [0, 1, 2, 3, 4]
        assert now() == 15

    async def test_bounds_stages_and_pipelines_and_runs_together(self) -> None:
        semaphore, meter = asyncio.Semaphore(3), Meter(0.001)
        stages: list[Stage[Any, Any]] = [
            Stage("one", meter, limiter=semaphore),
            Stage("two", meter, limiter=semaphore, retries=1),
            Stage("three", meter, limiter=semaphore, timeout=60),
        ]
        pipelines = [Pipeline(stages), Pipeline(stages[::-1], before_stage=lambda name, value: None)]
        await asyncio.gather(*(pipeline.map(range(10), 10) for pipeline in pipelines))
        assert meter.most == 3
        assert len(meter.finished) == 60
        assert not semaphore.locked()

    async def test_wraps_a_sync_handler(self) -> None:
        slots = Slots()
        assert await Pipeline([Stage("same", lambda value: (value, slots.held), limiter=slots)]).run(1) == (
            1,
            1,
        )
        assert slots.diary == PAIR

    async def test_its_own_error_is_the_attempts(self) -> None:
        slots = Slots(ConnectionError("no limiter"), None)
        assert await Stage("fetch", async_same, limiter=slots, retries=1).run(1) == 1
        error = await failure_of(Stage("fetch", async_same, limiter=Slots(ConnectionError("no limiter"))))
        assert repr(error.original_error) == "ConnectionError('no limiter')"

    async def test_can_not_swallow_an_error(self) -> None:
        class Swallows(Slots):
            async def __aexit__(self, *error: object) -> bool:  # type: ignore[override]
                return True

        error = await failure_of(Stage("fetch", failing(1), limiter=Swallows()))
        assert isinstance(error.original_error, RuntimeError)
        assert "suppressed an error of stage 'fetch'" in str(error)

    @pytest.mark.virtual
    async def test_aiolimiter_spaces_100_calls_at_50_a_second_over_2_seconds(self) -> None:
        handler = Flaky(seconds=1 / 50)
        stage = Stage("call", handler, limiter=AsyncLimiter(1, 1 / 50))
        await Pipeline([stage]).map(range(100), 100)
        assert now() == pytest.approx(2)
        gaps = [later - earlier for earlier, later in itertools.pairwise(handler.times)]
        assert gaps == pytest.approx([0.02] * 99)

    @pytest.mark.virtual
    async def test_aiolimiter_with_a_burst(self) -> None:
        handler = Flaky()
        stage = Stage("call", handler, limiter=AsyncLimiter(50, 1))
        await asyncio.gather(Pipeline([stage]).map(range(75), 100), Pipeline([stage]).map(range(75), 100))
        assert sum(time < 1e-6 for time in handler.times) == 50
        assert now() == pytest.approx(2, abs=0.03)


class TestOnError:
    async def test_stands_in_for_the_output(self) -> None:
        first, second = ValueError(1), ValueError(2)
        seen: list[Any] = []

        def stand_in(value: Any, error: Exception) -> str:
            seen.append((value, error))
            return "default"

        stage = Stage("fetch", Flaky(first, second), retries=1, on_error=stand_in)
        assert await stage.run(5) == "default"
        assert seen == [(5, second)], "once, after the last attempt, with the handler's own error"

    async def test_may_be_async_and_want_the_context(self) -> None:
        async def stand_in(value: Any, error: Exception, context: Any) -> Any:
            await asyncio.sleep(0)
            return value, error.args, context

        stage = Stage("fetch", failing(1), on_error=stand_in)
        context: dict[str, Any] = {}
        output = await stage.run(5, context=context)
        assert output == (5, (1,), {})
        assert output[2] is context

    async def test_what_it_returns_may_be_anything(self) -> None:
        outputs: list[Any] = [None, False, [], ValueError("as a value")]
        for output in outputs:
            stage = Stage("fetch", failing(1), on_error=lambda value, error, output=output: output)
            assert await stage.run(1) is output

    async def test_the_next_stage_gets_what_it_returns(self) -> None:
        stage = Stage("fetch", failing(1), on_error=lambda value, error: 10)
        assert await Pipeline([stage, lambda value: value + 1]).run(1) == 11

    async def test_is_not_asked_about_a_success(self) -> None:
        def wrong(value: Any, error: Exception) -> None:
            raise AssertionError

        assert await Stage("fetch", failing(1), retries=1, on_error=wrong).run(1) == 1

    async def test_sees_our_timeout(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", forever, timeout=0.01, on_error=lambda value, error: error)
        assert isinstance(await stage.run(1), StageTimeoutError)

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_what_it_raises_is_the_stages_error_chained_to_the_first(self, is_async: bool) -> None:
        first, second = ValueError("first"), KeyError("second")

        def sync(value: Any, error: Exception) -> None:
            raise second

        async def suspending(value: Any, error: Exception) -> None:
            await asyncio.sleep(0)
            raise second

        stage = Stage("fetch", Flaky(first), on_error=suspending if is_async else sync)
        error = await failure_of(stage)
        assert error.original_error is error.__cause__ is second
        assert second.__context__ is first
        assert (error.stage_name, error.attempts) == ("fetch", 1)

    async def test_may_raise_the_error_again(self) -> None:
        first = ValueError("first")

        def not_mine(value: Any, error: Exception) -> None:
            raise error

        error = await failure_of(Stage("fetch", Flaky(ValueError(), first), retries=1, on_error=not_mine))
        assert error.original_error is error.__cause__ is first
        assert error.attempts == 2

    async def test_may_finish_the_run(self) -> None:
        def give_up(value: Any, error: Exception) -> None:
            raise Finish("nothing")

        stage = Stage("fetch", failing(9), on_error=give_up)
        assert await stage.run(1) == "nothing"
        assert await Pipeline([stage, lambda value: 1 / 0]).run(1) == "nothing"

    async def test_is_passed_by_by_a_cancellation_and_by_finish(self) -> None:
        handler = Mock(side_effect=AssertionError)
        stage: Stage[Any, Any] = Stage("fetch", Flaky(asyncio.CancelledError()), on_error=handler)
        with pytest.raises(asyncio.CancelledError):
            await stage.run(1)
        assert await stage.replace(handler=Flaky(Finish("done"))).run(1) == "done"

    async def test_can_be_cancelled(self) -> None:
        async def slow(value: Any, error: Exception) -> None:
            await asyncio.sleep(3600)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Stage("fetch", failing(1), on_error=slow).run(1)

    async def test_a_subclass_may_set_it_later(self) -> None:
        class Defaulted(Stage[Any, Any]):
            def __init__(self, name: str, handler: Any) -> None:
                super().__init__(name, handler)
                self.on_error = lambda value, error: "default"

        assert await Defaulted("fetch", failing(1)).run(1) == "default"

    async def test_leaves_no_reference_cycle(self) -> None:
        class LargeError(Exception):
            pass

        async def fail(value: Any) -> None:
            raise LargeError

        async def not_mine(value: Any, error: Exception) -> None:
            seen.append(weakref.ref(error))
            raise KeyError

        seen: list[Any] = []
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(StageExecutionError):
                await Stage("fetch", fail, on_error=not_mine).run(1)
            assert seen[0]() is None
        finally:
            gc.enable()


class TestFinish:
    @pytest.mark.parametrize(
        "options",
        [{}, {"retries": 3}, {"timeout": 5}, {"limiter": Slots()}, {"on_error": lambda value, error: 1 / 0}],
    )
    async def test_run_returns_its_value(self, options: Any) -> None:
        for handler in (Flaky(Finish([1])), Mock(side_effect=Finish([1]))):
            assert await Stage("fetch", handler, **options, pass_context=False).run(1) == [1]


@pytest.mark.virtual
class TestTimeout:
    async def test_ends_an_attempt_exactly_then(self) -> None:
        error = await failure_of(Stage("slow", forever, timeout=2.5))
        assert now() == 2.5
        timeout = error.original_error
        assert isinstance(timeout, StageTimeoutError)
        assert timeout.timeout == 2.5
        assert isinstance(timeout.__cause__, TimeoutError)
        assert isinstance(timeout.__cause__.__context__, asyncio.CancelledError)
        assert str(error) == (
            "Stage 'slow' failed: StageTimeoutError(\"no result within the stage's timeout of 2.5 s\")"
        )

    async def test_is_per_attempt(self) -> None:
        calls: list[float] = []

        async def handler(value: Any) -> Any:
            calls.append(now())
            await asyncio.sleep(10 if len(calls) < 3 else 1.5)
            return value

        stage: Stage[Any, Any] = Stage("slow", handler, timeout=2, retries=5, retry_delay=1)
        assert await stage.run("value") == "value"
        assert calls == [0, 3, 6]
        assert now() == 7.5

    async def test_does_not_count_the_delays(self) -> None:
        stage: Stage[Any, Any] = Stage("slow", failing(2), timeout=1, retries=2, retry_delay=100)
        assert await stage.run(1) == 1
        assert now() == 200

    async def test_leaves_a_faster_handler_alone(self) -> None:
        stage: Stage[Any, Any] = Stage("fast", Flaky(seconds=2), timeout=2.5)
        assert await stage.run(1) == 1
        assert now() == 2
        await asyncio.sleep(5)  # no timer is left that could fire

    @pytest.mark.parametrize("make", [future_of, old_style, Custom], ids=["future", "generator", "custom"])
    async def test_covers_awaitables_of_every_kind(self, make: Callable[..., Any]) -> None:
        stage: Stage[Any, Any] = Stage("any", make, timeout=1)
        assert await stage.run(1) == 1
        never = asyncio.get_running_loop().create_future()
        error = await failure_of(Stage("future", lambda value: never, timeout=1))
        assert isinstance(error.original_error, StageTimeoutError)
        assert never.cancelled()

    async def test_does_not_touch_a_sync_handler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asyncio, "timeout", Mock(side_effect=AssertionError("not needed")))
        stage: Stage[Any, Any] = Stage("sync", same, timeout=1e-9)
        assert await stage.run(1) == 1

    async def test_none_costs_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asyncio, "timeout", Mock(side_effect=AssertionError("not needed")))
        stage: Stage[Any, Any] = Stage("plain", async_same)
        assert await stage.run(1) == 1

    @pytest.mark.parametrize("error", [TimeoutError("mine"), TimeoutError(), StageTimeoutError(9)], ids=repr)
    async def test_a_timeout_error_of_the_handlers_own_stays_what_it_is(self, error: TimeoutError) -> None:
        failure = await failure_of(Stage("fetch", Flaky(error), timeout=5))
        assert failure.original_error is error

    async def test_an_inner_timeout_is_the_handlers_own(self) -> None:
        async def handler(value: Any) -> None:
            async with asyncio.timeout(1):
                await asyncio.sleep(10)

        error = await failure_of(Stage("fetch", handler, timeout=5))
        assert now() == 1
        assert type(error.original_error) is TimeoutError

    async def test_an_inner_timeout_that_is_longer_does_not_matter(self) -> None:
        async def handler(value: Any) -> None:
            async with asyncio.timeout(5):
                await asyncio.sleep(10)

        error = await failure_of(Stage("fetch", handler, timeout=1))
        assert now() == 1
        assert isinstance(error.original_error, StageTimeoutError)

    async def test_wait_for_inside_is_the_handlers_own(self) -> None:
        async def handler(value: Any) -> None:
            await asyncio.wait_for(asyncio.sleep(10), 1)

        error = await failure_of(Stage("fetch", handler, timeout=5))
        assert type(error.original_error) is TimeoutError

    async def test_an_own_timeout_error_after_ours_is_its_own(self) -> None:
        mine = TimeoutError("while tidying up")

        async def handler(value: Any) -> None:
            try:
                await asyncio.sleep(10)
            finally:
                raise mine

        error = await failure_of(Stage("fetch", handler, timeout=1))
        assert now() == 1
        assert error.original_error is mine

    async def test_another_error_after_ours_is_that_error(self) -> None:
        async def handler(value: Any) -> None:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                raise LookupError("while tidying up") from None

        error = await failure_of(Stage("fetch", handler, timeout=1))
        assert isinstance(error.original_error, LookupError)

    async def test_a_value_that_is_returned_late_is_a_value(self) -> None:
        async def handler(value: Any) -> Any:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                await asyncio.sleep(3)
            return value

        stage: Stage[Any, Any] = Stage("late", handler, timeout=1)
        assert await stage.run("value") == "value"
        assert now() == 4
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0  # nothing is left of it
        await asyncio.sleep(1)

    async def test_a_cancellation_from_outside_is_none_of_ours(self) -> None:
        task = asyncio.ensure_future(Stage("slow", forever, timeout=5, retries=3).run(1))
        await asyncio.sleep(1)
        task.cancel("the caller's")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert now() == 1

    async def test_a_cancellation_at_the_same_moment_wins(self) -> None:
        task = asyncio.ensure_future(Stage("slow", forever, timeout=1, retries=3).run(1))
        asyncio.get_running_loop().call_later(1, task.cancel)
        await asyncio.sleep(0.5)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert now() == 1

    async def test_an_outer_timeout_is_the_callers(self) -> None:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1):
                await Stage("slow", forever, timeout=5).run(1)
        assert type(caught.value) is TimeoutError

    async def test_the_longest_timeout(self) -> None:
        stage: Stage[Any, Any] = Stage("fast", Flaky(seconds=1), timeout=sys.float_info.max)
        assert await stage.run(1) == 1

    async def test_other_kinds_of_numbers(self) -> None:
        error = await failure_of(Stage("slow", forever, timeout=Fraction(1, 2)))  # type: ignore[call-overload]
        assert now() == 0.5
        assert isinstance(error.original_error, StageTimeoutError)


async def test_a_timeout_in_real_time() -> None:
    error = await failure_of(Stage("slow", forever, timeout=0.001))
    assert isinstance(error.original_error, StageTimeoutError)


class TestImmutability:
    @pytest.mark.parametrize("attribute", ["name", "handler", *StageOptions.__annotations__])
    def test_no_attribute_can_be_set(self, attribute: str) -> None:
        stage: Any = Stage("fetch", same)
        before = getattr(stage, attribute)
        with pytest.raises(
            AttributeError, match=rf"immutable; for another one write stage\.replace\({attribute}="
        ):
            setattr(stage, attribute, before)
        assert getattr(stage, attribute) is before

    def test_nor_taken_away(self) -> None:
        stage: Any = Stage("fetch", same)
        with pytest.raises(AttributeError):
            del stage.timeout
        assert stage.timeout is None

    def test_nor_a_new_one(self) -> None:
        stage: Any = Stage("fetch", same)
        with pytest.raises(AttributeError):
            stage.retires = 3

    def test_a_subclass_may_have_its_own(self) -> None:
        class Counting(Stage[Any, Any]):
            count = 0

        stage = Counting("fetch", same)
        stage.count += 1
        assert stage.count == 1
        del stage.count
        assert stage.count == 0

    async def test_what_a_subclass_sets_counts(self) -> None:
        calls = []

        class Stubborn(Stage[Any, Any]):
            def __init__(self, name: str) -> None:
                super().__init__(name, self.fail)
                self.name = f"stubborn {name}"
                self.retries = 2

            def fail(self, value: Any) -> None:
                calls.append(value)
                raise ValueError

        with pytest.raises(StageExecutionError, match="stubborn x") as caught:
            await Stubborn("x").run(1)
        assert calls == [1, 1, 1]
        assert caught.value.attempts == 3

    def test_many_runs_at_once_share_nothing(self) -> None:
        async def handler(value: int, context: Any) -> int:
            context.append(value)
            await asyncio.sleep(1)
            if len(context) < value:
                raise ValueError
            return len(context)

        stage = Stage("fetch", handler, retries=9)

        async def main() -> list[int]:
            return await asyncio.gather(*(stage.run(n, context=[]) for n in range(1, 8)))

        assert run_virtually(main()) == run_virtually(main()) == [1, 2, 3, 4, 5, 6, 7]

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
    async def test_can_be_copied_and_pickled_when_the_handler_can(self, duplicate: Any) -> None:
        stage: Stage[Any, Any] = Stage("fetch", with_context, retries=3, retry_delay=0.5, timeout=2)
        twin = duplicate(stage)
        assert repr(twin) == repr(stage)
        assert await twin.run(1, context=2) == (1, 2)


class TestReplace:
    async def test_changes_what_is_named_only(self) -> None:
        stage: Stage[Any, Any] = Stage(
            "fetch", failing(9), timeout=2, retries=2, retry_delay=3600, backoff="exponential"
        )
        quick = stage.replace(retry_delay=0)
        assert quick is not stage
        assert (quick.name, quick.handler, quick.timeout, quick.retries) == ("fetch", stage.handler, 2, 2)
        assert (quick.retry_delay, quick.backoff, stage.retry_delay) == (0, "exponential", 3600)
        started = now()
        assert (await failure_of(quick)).attempts == 3
        assert now() - started < 60

    async def test_name_and_handler(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", same, retries=2)
        other = stage.replace(name="other", handler=with_context)
        assert (other.name, other.retries) == ("other", 2)
        assert await other.run(1, context=2) == (1, 2)
        assert await stage.run(1, context=2) == 1

    async def test_keeps_what_was_decided_by_hand(self) -> None:
        stage: Stage[Any, Any] = Stage("split", str.split, pass_context=True)
        assert await stage.replace(name="other").run("a-b", context="-") == ["a", "b"]
        assert await stage.replace(pass_context=None).run("a-b", context="-") == ["a-b"]

    def test_checks_its_options(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", same)
        with pytest.raises(ValueError, match=r"retries must be"):
            stage.replace(retries=-1)
        with pytest.raises(TypeError, match=r"retrys"):
            stage.replace(retrys=1)

    def test_with_nothing_is_a_twin(self) -> None:
        stage: Stage[Any, Any] = Stage("fetch", same, retries=2)
        assert repr(stage.replace()) == repr(stage)

    def test_keeps_the_class(self) -> None:
        class Own(Stage[Any, Any]):
            pass

        assert type(Own("fetch", same).replace(retries=1)) is Own


class TestRepr:
    def test_shows_what_is_not_the_default(self) -> None:
        assert repr(Stage("fetch", same)) == "Stage('fetch')"
        stage: Stage[Any, Any] = Stage(
            "fetch", same, timeout=2, retries=3, retry_delay=0.5, backoff="exponential", pass_context=False
        )
        assert repr(stage) == (
            "Stage('fetch', timeout=2, retries=3, retry_delay=0.5, backoff='exponential', pass_context=False)"
        )

    def test_of_a_subclass_even_if_half_built(self) -> None:
        class Own(Stage[Any, Any]):
            def __init__(self) -> None:
                self.seen = repr(self)
                super().__init__("own", same)

        assert Own().seen == "Own(None)"
        assert repr(Own()) == "Own('own')"


class TestStaged:
    async def test_bare(self) -> None:
        @staged
        async def fetch(url: str) -> str:
            return url + "!"

        assert isinstance(fetch, Stage)
        assert (fetch.name, fetch.retries) == ("fetch", 0)
        assert await fetch.run("a") == "a!"
        assert await fetch.handler("b") == "b!"

    async def test_with_options(self) -> None:
        @staged(timeout=2.0, retries=3, retry_delay=0.5, backoff="exponential", pass_context=True)
        def fetch(url: str, extra: Any = None) -> Any:
            return extra

        assert repr(fetch) == (
            "Stage('fetch', timeout=2.0, retries=3, retry_delay=0.5, backoff='exponential',"
            " pass_context=True)"
        )
        assert await fetch.run("a", context=5) == 5

    def test_with_a_name(self) -> None:
        @staged(name="download")
        def fetch(url: str) -> str:
            return url

        @staged(name="")
        def unnamed(url: str) -> str:
            return url

        assert (fetch.name, unnamed.name) == ("download", "")

    def test_without_options_in_parentheses(self) -> None:
        @staged()
        def fetch(url: str) -> str:
            return url

        assert fetch.name == "fetch"

    async def test_one_decorator_for_several_functions(self) -> None:
        patient = staged(retries=3)
        first, second = patient(same), patient(async_same)
        assert (first.name, second.name) == ("same", "async_same")
        assert first.retries == second.retries == 3

    def test_checks_like_a_stage(self) -> None:
        with pytest.raises(ValueError, match=r"retries"):
            staged(retries=-1)(same)
        with pytest.raises(TypeError, match=r"callable"):
            staged("fetch")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"retrys"):
            staged(retrys=1)(same)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"name must be a str"):
            staged(name=1)(same)  # type: ignore[call-overload]

    def test_of_a_coroutine_is_answered_with_the_right_call(self) -> None:
        coroutine: Any = async_same(1)
        with pytest.raises(TypeError, match=r"async_same"):
            staged(coroutine)


class TestCallableName:
    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (same, "same"),
            (lambda value: value, "<lambda>"),
            (functools.partial(same), "same"),
            (functools.partial(functools.partial(with_context, 1), 2), "with_context"),
            (functools.partial(Flaky()), "Flaky"),
            (functools.cache(same), "same"),
            (functools.wraps(same)(lambda *args: args), "same"),
            (Flaky(), "Flaky"),
            (Flaky, "Flaky"),
            (len, "len"),
            (str.split, "split"),
            ([].append, "append"),
            (TestReplace().test_with_nothing_is_a_twin, "test_with_nothing_is_a_twin"),
            (operator.itemgetter(0), "itemgetter"),
        ],
    )
    def test_of_every_kind(self, function: Any, name: str) -> None:
        assert callable_name(function) == name

    def test_an_object_may_have_a_func_of_its_own(self) -> None:
        class Job:
            def __init__(self) -> None:
                self.func = self

            def __call__(self, value: Any) -> Any:
                return value

        assert callable_name(Job()) == "Job"

    @pytest.mark.parametrize("kind", [Mock, AsyncMock])
    def test_of_a_mock(self, kind: Any) -> None:
        assert staged(kind()).name == kind.__name__


class TestSubclasses:
    async def test_a_run_of_its_own(self) -> None:
        class Twice(Stage[int, int]):
            async def run(self, value: int, *, context: Any = None) -> int:
                return await super().run(await super().run(value, context=context), context=context)

        assert await Twice("add", lambda value: value + 1).run(1) == 3

    def test_subscripts_at_run_time(self) -> None:
        stage = Stage[int, int]("fetch", same)
        assert type(stage) is Stage

        class Own(Stage[int, str]):
            pass

        assert isinstance(Own("fetch", str), Stage)


def test_asyncio_is_a_module_of_stage() -> None:
    assert vars(stage_module)["asyncio"] is asyncio


def test_run_is_a_coroutine_function() -> None:
    stage: Stage[Any, Any] = Stage("fetch", same)
    assert inspect.iscoroutinefunction(stage.run)
    coroutine: Coroutine[Any, Any, Any] = stage.run(1)
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    assert finished.value.value == 1


class TestJoin:
    """``|``, which every step has."""

    async def test_joins_stages_steps_pipelines_and_callables_on_either_side(self) -> None:
        stage = Stage("same", async_same)
        duck = Duck()
        for joined in (
            stage | same,
            same | stage,
            stage | stage,
            duck | stage,
            stage | duck,
            Pipeline([same]) | stage,
            same | Pipeline([stage]),
            each(same) | stage,
            same | each(same),
            stage | async_same | duck | Pipeline([same]),
        ):
            assert type(joined) is Pipeline
            assert await joined.run([7]) == [7]

    def test_is_flat(self) -> None:
        joined = (Stage("a", same) | same) | (Pipeline([Stage("b", same), same], name="named") | same)
        assert [step.name for step in joined.stages] == ["a", "same", "b", "same", "same"]
        assert joined.name == "pipeline"
        joined |= same
        assert len(joined.stages) == 6

    @pytest.mark.parametrize(
        "options",
        [{"before_stage": print}, {"after_stage": print}, {"middlewares": [print]}],
        ids=["before", "after", "middleware"],
    )
    def test_a_pipeline_with_something_of_its_own_keeps_it_as_a_step(self, options: Any) -> None:
        own: Pipeline[Any, Any] = Pipeline([same, same], name="own", **options)
        for joined in own | same, same | own, own | own:
            assert own in joined.stages
            assert len(joined.stages) == 2
            assert joined._is_plain

    async def test_a_subclass_of_pipeline_stays_a_step(self) -> None:
        class Mine(Pipeline[Any, Any]):
            async def run(self, initial_value: Any, **options: Any) -> Any:
                return "mine", await super().run(initial_value, **options)

        joined = Mine([same]) | same
        assert len(joined.stages) == 2
        assert await joined.run(7) == ("mine", 7)

    def test_makes_a_new_pipeline_and_leaves_its_parts_alone(self) -> None:
        first, second = Pipeline([same]), Pipeline([same, same])
        assert first | second is not first
        assert (len(first.stages), len(second.stages)) == (1, 2)

    async def test_flat_joined_and_nested_agree_on_errors_and_finish(self) -> None:
        def fail(value: Any) -> Any:
            raise Finish(value) if value == "finish" else ValueError(value)

        def never(value: Any) -> Any:
            raise AssertionError

        flat = Pipeline([same, fail, never])
        joined = Stage("same", same) | fail | never
        nested = Pipeline([Pipeline([same, fail], name="inner"), never])
        for pipeline, path in (flat, "fail"), (joined, "fail"), (nested, "inner/fail"):
            assert await pipeline.run("finish") == "finish"
            with pytest.raises(StageExecutionError) as caught:
                await pipeline.run(7)
            assert caught.value.stage_name == path
            assert type(caught.value.original_error) is ValueError
        assert [step.name for step in joined.stages] == [step.name for step in flat.stages]

    def test_a_class_joins_from_the_right(self) -> None:
        assert [step.name for step in (Stage("same", same) | int | str).stages] == ["same", "int", "str"]
        kind: Any = int  # type checkers take this for a union of types
        assert [step.name for step in (kind | Stage("same", same)).stages] == ["int", "same"]

    @pytest.mark.parametrize("other", [5, "same", None, [same], {"same": same}], ids=repr)
    def test_refuses_what_is_no_step(self, other: Any) -> None:
        for left, right in ((Stage("same", same), other), (other, Pipeline([same]))):
            with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \|: "):
                left | right

    def test_a_coroutine_object_is_told_from_its_function(self) -> None:
        with pytest.raises(TypeError, match=r"write Stage\('async_same', async_same\), without \(\)"):
            Stage("same", same) | async_same(7)  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"without \(\)"):
            async_same(7) | Stage("same", same)  # type: ignore[operator]

    def test_leaves_others_their_own_way_to_join(self) -> None:
        class Other:
            def __ror__(self, other: Any) -> str:
                return f"joined to {other.name}"

        assert Stage("same", same) | Other() == "joined to same"


class Duck:
    name = "duck"

    async def run(self, value: Any, *, context: Any = None) -> Any:
        return value
