"""The ready-made middlewares, alone and around the stages of a pipeline."""

import asyncio
import copy
import inspect
import itertools
import logging
import math
import types
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unittest.mock import AsyncMock

import pytest

from async_pipeline import Finish, Pipeline, Stage, StageExecutionError, StageTimeoutError, middlewares
from async_pipeline.middlewares import (
    CacheMiddleware,
    CircuitBreakerMiddleware,
    LoggingMiddleware,
    RetryMiddleware,
    TimeoutMiddleware,
    TimingMiddleware,
)
from async_pipeline.middlewares import timing as timing_module

Next = Callable[[Any], Awaitable[Any]]


async def double(value: int) -> int:
    return value * 2


async def broken(value: Any) -> Any:
    raise LookupError(value)


def now() -> float:
    return asyncio.get_running_loop().time()


def pipeline_of(*handlers: Any, with_: list[Any]) -> Pipeline[Any, Any]:
    return Pipeline(list(handlers), middlewares=with_)


def test_the_package_offers_them_all() -> None:
    assert middlewares.__all__ == sorted(middlewares.__all__)
    assert set(middlewares.__all__) == {
        "Cache",
        "CacheMiddleware",
        "CircuitBreakerMiddleware",
        "LoggingMiddleware",
        "MemoryCache",
        "RetryMiddleware",
        "TimeoutMiddleware",
        "TimingMiddleware",
    }


@pytest.mark.parametrize(
    "middleware",
    [
        CacheMiddleware(),
        CircuitBreakerMiddleware(99),
        LoggingMiddleware(),
        RetryMiddleware(),
        TimeoutMiddleware(5),
        TimingMiddleware(),
    ],
    ids=lambda middleware: type(middleware).__name__,
)
class TestAll:
    async def test_pass_the_value_and_the_output(self, middleware: Any) -> None:
        assert await pipeline_of(double, double, with_=[middleware]).run(3) == 12

    async def test_pass_the_error_unchanged(self, middleware: Any) -> None:
        error = StageExecutionError("fetch", LookupError())

        async def next_stage(value: Any) -> Any:
            raise error

        with pytest.raises(StageExecutionError) as caught:
            await middleware(next_stage, "fetch", 1, {})
        assert caught.value is error

    async def test_pass_a_cancellation_after_one_call(self, middleware: Any) -> None:
        calls: list[Any] = []

        async def next_stage(value: Any) -> Any:
            calls.append(value)
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await middleware(next_stage, "fetch", 1, {})
        assert calls == [1]

    async def test_pass_finish_after_one_call(self, middleware: Any) -> None:
        calls: list[Any] = []
        finish = Finish("done")

        async def next_stage(value: Any) -> Any:
            calls.append(value)
            raise finish

        with pytest.raises(Finish) as caught:
            await middleware(next_stage, "fetch", 1, {})
        assert caught.value is finish
        assert calls == [1]

    async def test_serve_many_runs_at_once(self, middleware: Any) -> None:
        async def suspend(value: int) -> int:
            await asyncio.sleep(0)
            return value

        pipeline = pipeline_of(suspend, double, with_=[middleware])
        assert await pipeline.map(range(20), 7) == [value * 2 for value in range(20)]


class TestLogging:
    @pytest.fixture(autouse=True)
    def _capture(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)

    async def test_start_and_end_of_each_stage(self, caplog: pytest.LogCaptureFixture) -> None:
        await pipeline_of(double, Stage("again", double), with_=[LoggingMiddleware()]).run(3)
        assert caplog.record_tuples == [
            ("async_pipeline", logging.INFO, "Starting stage: double"),
            ("async_pipeline", logging.INFO, "Finished stage: double"),
            ("async_pipeline", logging.INFO, "Starting stage: again"),
            ("async_pipeline", logging.INFO, "Finished stage: again"),
        ]
        assert not any(record.exc_info for record in caplog.records)

    async def test_a_failure_with_its_traceback(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(StageExecutionError) as caught:
            await pipeline_of(broken, with_=[LoggingMiddleware()]).run(3)
        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (logging.INFO, "Starting stage: broken"),
            (logging.ERROR, "Stage failed: broken"),
        ]
        info = caplog.records[1].exc_info
        assert info is not None
        assert info[1] is caught.value
        assert "LookupError: 3" in caplog.text
        assert "in broken" in caplog.text

    async def test_values_when_asked(self, caplog: pytest.LogCaptureFixture) -> None:
        middleware = LoggingMiddleware(include_value=True)
        await pipeline_of(lambda value: value.upper(), with_=[middleware]).run("a")
        with pytest.raises(StageExecutionError):
            await pipeline_of(broken, with_=[middleware]).run("b")
        assert [record.getMessage() for record in caplog.records] == [
            "Starting stage: <lambda> input='a'",
            "Finished stage: <lambda> output='A'",
            "Starting stage: broken input='b'",
            "Stage failed: broken input='b'",
        ]

    @pytest.mark.parametrize(("include_value", "output"), [(False, ""), (True, " output='done'")])
    async def test_finish_is_an_end(
        self, caplog: pytest.LogCaptureFixture, include_value: bool, output: str
    ) -> None:
        async def next_stage(value: Any) -> Any:
            raise Finish("done")

        middleware = LoggingMiddleware(level=logging.DEBUG, include_value=include_value)
        with pytest.raises(Finish):
            await middleware(next_stage, "fetch", 1, {})
        assert caplog.record_tuples[1:] == [
            ("async_pipeline", logging.DEBUG, f"Finished stage: fetch{output}")
        ]
        assert caplog.records[1].exc_info is None

    async def test_percent_signs_are_no_formats(self, caplog: pytest.LogCaptureFixture) -> None:
        middleware = LoggingMiddleware(include_value=True)
        await Pipeline([Stage("100%s", str)], middlewares=[middleware]).run("%d")
        assert caplog.messages[0] == "Starting stage: 100%s input='%d'"

    async def test_a_logger_and_a_level_of_ones_own(self, caplog: pytest.LogCaptureFixture) -> None:
        middleware = LoggingMiddleware(logging.getLogger("mine"), logging.DEBUG)
        with pytest.raises(StageExecutionError):
            await pipeline_of(double, broken, with_=[middleware]).run(1)
        assert {record.name for record in caplog.records} == {"mine"}
        assert [record.levelno for record in caplog.records] == [
            logging.DEBUG,
            logging.DEBUG,
            logging.DEBUG,
            logging.ERROR,
        ]

    async def test_an_adapter_is_a_logger_too(self, caplog: pytest.LogCaptureFixture) -> None:
        adapter: Any = logging.LoggerAdapter(logging.getLogger("mine"), {"request": 7})
        await pipeline_of(double, with_=[LoggingMiddleware(logger=adapter, level=logging.WARNING)]).run(1)
        assert caplog.messages == ["Starting stage: double", "Finished stage: double"]
        assert getattr(caplog.records[0], "request") == 7  # noqa: B009 - a LogRecord declares no extras

    async def test_values_are_not_formatted_for_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        class Secret:
            def __repr__(self) -> str:
                raise AssertionError("nobody asked")

        caplog.set_level(logging.WARNING)
        value = Secret()
        assert (
            await pipeline_of(lambda given: given, with_=[LoggingMiddleware(include_value=True)]).run(value)
            is value
        )
        caplog.set_level(logging.DEBUG)
        assert await pipeline_of(lambda given: given, with_=[LoggingMiddleware()]).run(value) is value

    async def test_a_cancellation_is_no_failure(self, caplog: pytest.LogCaptureFixture) -> None:
        async def gone(value: Any) -> Any:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await pipeline_of(gone, with_=[LoggingMiddleware()]).run(1)
        assert caplog.messages == ["Starting stage: gone"]

    def test_include_value_is_a_keyword(self) -> None:
        with pytest.raises(TypeError):
            LoggingMiddleware(None, logging.INFO, True)  # type: ignore[call-arg]


class TestTiming:
    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock of which every reading is twice as much as the one before: 1, 2, 4, 8, ..."""
        readings = (2.0**n for n in itertools.count())
        clock = types.SimpleNamespace(perf_counter=readings.__next__)
        monkeypatch.setattr(timing_module, "time", clock)

    async def test_seconds_by_stage(self) -> None:
        context: dict[str, Any] = {"other": 1}
        await pipeline_of(double, Stage("again", double), with_=[TimingMiddleware()]).run(1, context=context)
        assert context == {"other": 1, "timings": {"double": [1.0], "again": [4.0]}}

    async def test_a_stage_of_the_same_name_is_appended(self) -> None:
        context: dict[str, Any] = {}
        pipeline = pipeline_of(double, double, with_=[TimingMiddleware()])
        await pipeline.run(1, context=context)
        await pipeline.run(1, context=context)
        assert context == {"timings": {"double": [1.0, 4.0, 16.0, 64.0]}}

    async def test_an_entry_of_ones_own(self) -> None:
        mine: dict[str, list[float]] = {"double": [0.0]}
        context = {"seconds": mine, "timings": "not this one"}
        await pipeline_of(double, with_=[TimingMiddleware(context_key="seconds")]).run(1, context=context)
        assert context["seconds"] is mine
        assert mine == {"double": [0.0, 1.0]}
        assert context["timings"] == "not this one"

    async def test_the_key_may_be_positional(self) -> None:
        context: dict[str, Any] = {}
        await pipeline_of(double, with_=[TimingMiddleware("seconds")]).run(1, context=context)
        assert context == {"seconds": {"double": [1.0]}}

    @pytest.mark.parametrize("entry", [None, 5, "text", {"double": "text"}, {"double": None}, {"double": ()}])
    async def test_what_is_in_the_way_is_replaced(self, entry: Any) -> None:
        context = {"timings": copy.copy(entry)}
        await pipeline_of(double, with_=[TimingMiddleware()]).run(1, context=context)
        assert context == {"timings": {"double": [1.0]}}

    @pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError, KeyboardInterrupt])
    async def test_failed_and_cancelled_stages_too(self, error: type[BaseException]) -> None:
        async def next_stage(value: Any) -> Any:
            raise error

        context: dict[str, Any] = {}
        coroutine = TimingMiddleware()(next_stage, "gone", 1, context)
        with pytest.raises(error):
            coroutine.send(None)
        assert context == {"timings": {"gone": [1.0]}}

    async def test_an_attribute_of_any_other_object(self) -> None:
        @dataclass
        class Request:
            timings: dict[str, list[float]] | None = None

        contexts: list[Any] = [Request(), types.SimpleNamespace(), Request({"double": [9.0]})]
        for context in contexts:
            before = getattr(context, "timings", None) or {}
            await pipeline_of(double, with_=[TimingMiddleware()]).run(1, context=context)
            assert len(context.timings["double"]) == 1 + len(before)

    async def test_a_context_that_refuses_is_left_alone(self) -> None:
        @dataclass(frozen=True)
        class Frozen:
            number: int = 1

        for context in (Frozen(), object(), (), types.MappingProxyType({"a": 1})):
            assert await pipeline_of(double, with_=[TimingMiddleware()]).run(1, context=context) == 2
            assert not hasattr(context, "timings")

    async def test_a_read_only_mapping_may_hold_the_dict(self) -> None:
        timings: dict[str, Any] = {}
        context = types.MappingProxyType({"timings": timings})
        await pipeline_of(double, with_=[TimingMiddleware()]).run(1, context=context)
        assert timings == {"double": [1.0]}

    async def test_each_item_of_a_batch_has_its_own(self) -> None:
        seen: list[Any] = []

        def look(value: int, context: Any) -> int:
            seen.append(context["timings"])
            return value

        template: dict[str, Any] = {}
        await pipeline_of(double, look, with_=[TimingMiddleware()]).map([1, 2], context=template)
        assert template == {}
        assert [list(timings) for timings in seen] == [["double", "look"]] * 2
        assert [len(timings["double"]) for timings in seen] == [1, 1]


class Flaky:
    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.times: list[float] = []

    async def __call__(self, value: Any) -> Any:
        self.times.append(now())
        if len(self.times) <= self.failures:
            raise LookupError(len(self.times))
        return value


class TestRetry:
    async def test_three_retries_by_default(self) -> None:
        flaky = Flaky(99)
        with pytest.raises(StageExecutionError) as caught:
            await pipeline_of(flaky, with_=[RetryMiddleware()]).run(1)
        assert len(flaky.times) == 4
        assert str(caught.value.original_error) == "4"

    async def test_until_it_succeeds(self) -> None:
        flaky = Flaky(2)
        assert await pipeline_of(flaky, with_=[RetryMiddleware(retries=5)]).run("value") == "value"
        assert len(flaky.times) == 3

    async def test_none(self) -> None:
        flaky = Flaky(99)
        with pytest.raises(StageExecutionError):
            await pipeline_of(flaky, with_=[RetryMiddleware(0)]).run(1)
        assert len(flaky.times) == 1

    async def test_the_last_error_leaves_as_it_is(self) -> None:
        errors = [OSError(n) for n in range(3)]
        remaining = iter(errors)

        async def next_stage(value: Any) -> Any:
            raise next(remaining)

        with pytest.raises(OSError) as caught:  # noqa: PT011 - compared below
            await RetryMiddleware(2)(next_stage, "fetch", 1, {})
        assert caught.value is errors[-1]
        assert caught.value.__context__ is None

    @pytest.mark.virtual
    @pytest.mark.parametrize(
        ("options", "times"),
        [
            ({"delay": 1.5}, [0, 1.5, 3, 4.5]),
            ({"delay": 1.5, "backoff": "fixed"}, [0, 1.5, 3, 4.5]),
            ({"delay": 1.5, "backoff": "exponential"}, [0, 1.5, 4.5, 10.5]),
            ({"delay": Fraction(1, 2)}, [0, 0.5, 1, 1.5]),
            ({}, [0, 0, 0, 0]),
        ],
    )
    async def test_the_delays_are_exact(self, options: Any, times: list[float]) -> None:
        flaky = Flaky(99)
        with pytest.raises(StageExecutionError):
            await pipeline_of(flaky, with_=[RetryMiddleware(3, **options)]).run(1)
        assert flaky.times == times
        assert now() == times[-1]

    async def test_sleeps_through_the_module_with_one_argument(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sleep = AsyncMock()
        monkeypatch.setattr("async_pipeline.middlewares.retry.asyncio.sleep", sleep)
        with pytest.raises(StageExecutionError):
            await pipeline_of(broken, with_=[RetryMiddleware(3, 0.5, "exponential")]).run(1)
        monkeypatch.undo()
        assert [(call.args, call.kwargs) for call in sleep.await_args_list] == [
            ((d,), {}) for d in (0.5, 1.0, 2.0)
        ]

    async def test_a_zero_delay_does_not_sleep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sleep = AsyncMock()
        monkeypatch.setattr("async_pipeline.middlewares.retry.asyncio.sleep", sleep)
        with pytest.raises(StageExecutionError):
            await pipeline_of(broken, with_=[RetryMiddleware(3)]).run(1)
        monkeypatch.undo()
        sleep.assert_not_awaited()

    @pytest.mark.virtual
    async def test_a_cancelled_delay_is_a_cancellation_and_nothing_else(self) -> None:
        task = asyncio.ensure_future(pipeline_of(Flaky(9), with_=[RetryMiddleware(3, 3600)]).run(1))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        seen: BaseException | None = caught.value
        while seen is not None:
            assert not isinstance(seen, StageExecutionError)
            seen = seen.__context__

    async def test_multiplies_with_the_stages_own(self) -> None:
        flaky = Flaky(99)
        pipeline: Pipeline[Any, Any] = Pipeline(
            [Stage("flaky", flaky, retries=3)], middlewares=[RetryMiddleware(3)]
        )
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run(1)
        assert len(flaky.times) == 16
        assert caught.value.attempts == 4

    async def test_retries_every_middleware_inside_and_none_outside(self) -> None:
        calls: list[str] = []

        def noting(name: str) -> Any:
            async def middleware(next_stage: Next, stage_name: str, value: Any, context: Any) -> Any:
                calls.append(name)
                return await next_stage(value)

            return middleware

        await pipeline_of(Flaky(1), with_=[noting("outer"), RetryMiddleware(), noting("inner")]).run(1)
        assert calls == ["outer", "inner", "inner"]

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_other_base_exceptions_are_not_retried(self, kind: type[BaseException]) -> None:
        calls: list[Any] = []

        async def next_stage(value: Any) -> Any:
            calls.append(value)
            raise kind

        coroutine = RetryMiddleware(3)(next_stage, "fetch", 1, {})
        with pytest.raises(kind):
            coroutine.send(None)
        assert calls == [1]

    @pytest.mark.parametrize("value", [-1, True, math.nan])
    def test_wrong_retries(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^retries must be greater than or equal to 0"):
            RetryMiddleware(value)
        with pytest.raises(TypeError, match=r"^retries must be an int"):
            RetryMiddleware(1.5)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**400, True])
    def test_a_wrong_delay(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^delay must be "):
            RetryMiddleware(1, value)
        with pytest.raises(TypeError, match=r"^delay must be a number of seconds"):
            RetryMiddleware(1, "1")  # type: ignore[arg-type]

    def test_a_wrong_backoff(self) -> None:
        with pytest.raises(ValueError, match=r'^backoff must be "fixed" or "exponential"$'):
            RetryMiddleware(1, 1, "linear")


@pytest.mark.virtual
class TestTimeout:
    async def test_bounds_all_attempts_and_delays_together(self) -> None:
        flaky = Flaky(99)
        pipeline: Pipeline[Any, Any] = Pipeline(
            [Stage("flaky", flaky, retries=99, retry_delay=1)], middlewares=[TimeoutMiddleware(2.5)]
        )
        with pytest.raises(TimeoutError) as caught:
            await pipeline.run(1)
        assert type(caught.value) is TimeoutError
        assert now() == 2.5
        assert flaky.times == [0, 1, 2]

    async def test_is_for_each_stage(self) -> None:
        async def slow(value: Any) -> Any:
            await asyncio.sleep(2)
            return value

        assert await pipeline_of(slow, slow, slow, with_=[TimeoutMiddleware(timeout=2.5)]).run(1) == 1
        assert now() == 6

    async def test_the_stages_own_comes_first_when_it_is_shorter(self) -> None:
        async def slow(value: Any) -> Any:
            await asyncio.sleep(10)

        pipeline: Pipeline[Any, Any] = Pipeline(
            [Stage("slow", slow, timeout=1)], middlewares=[TimeoutMiddleware(5)]
        )
        with pytest.raises(StageExecutionError) as caught:
            await pipeline.run(1)
        assert isinstance(caught.value.original_error, StageTimeoutError)
        assert now() == 1

    async def test_inside_a_retry_is_for_each_try(self) -> None:
        calls: list[float] = []

        async def slow(value: Any) -> Any:
            calls.append(now())
            await asyncio.sleep(10 if len(calls) < 3 else 1)
            return value

        assert await pipeline_of(slow, with_=[RetryMiddleware(5), TimeoutMiddleware(2)]).run(1) == 1
        assert calls == [0, 2, 4]

    def test_is_written_with_the_timeout_of_asyncio(self) -> None:
        source = inspect.getsource(TimeoutMiddleware)
        assert "asyncio.timeout" in source
        assert "wait_for" not in source

    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 10**400, True])
    def test_a_wrong_value(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^timeout must be "):
            TimeoutMiddleware(value)

    @pytest.mark.parametrize("value", [None, "1", [1]])
    def test_a_wrong_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^timeout must be a number of seconds"):
            TimeoutMiddleware(value)


async def test_all_four_around_one_stage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    context: dict[str, Any] = {}
    pipeline = pipeline_of(
        Flaky(2), with_=[LoggingMiddleware(), TimingMiddleware(), RetryMiddleware(3), TimeoutMiddleware(5)]
    )
    assert await pipeline.run("value", context=context) == "value"
    assert caplog.messages == ["Starting stage: Flaky", "Finished stage: Flaky"]
    assert len(context["timings"]["Flaky"]) == 1
