"""The circuit breaker: closed, open and half-open, on the event loop's clock."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import CircuitOpenError, Finish, Pipeline, Stage, StageExecutionError
from async_pipeline.middlewares import CacheMiddleware, CircuitBreakerMiddleware, RetryMiddleware
from tests.helpers import run_virtually

settings.register_profile("default", deadline=None)
settings.load_profile("default")

pytestmark = pytest.mark.virtual


def now() -> float:
    return asyncio.get_running_loop().time()


async def ok(value: Any) -> Any:
    return value


async def broken(value: Any) -> Any:
    raise LookupError(value)


async def gone(value: Any) -> Any:
    raise asyncio.CancelledError


async def finished(value: Any) -> Any:
    raise Finish(value)


def after(seconds: float, then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def next_stage(value: Any) -> Any:
        await asyncio.sleep(seconds)
        return await then(value)

    return next_stage


async def call(
    breaker: CircuitBreakerMiddleware, *handlers: Callable[[Any], Any], name: str = "fetch"
) -> None:
    """Call the stage with each handler in turn, and don't mind what becomes of it."""
    for handler in handlers:
        with contextlib.suppress(Exception, Finish, asyncio.CancelledError):
            await breaker(handler, name, 1, {})


async def refusal(breaker: CircuitBreakerMiddleware, name: str = "fetch") -> CircuitOpenError:
    calls: list[Any] = []

    async def next_stage(value: Any) -> None:
        calls.append(value)

    with pytest.raises(CircuitOpenError) as caught:
        await breaker(next_stage, name, 1, {})
    assert not calls
    return caught.value


async def opened(failures: int = 2, reset_after: float = 30) -> CircuitBreakerMiddleware:
    breaker = CircuitBreakerMiddleware(failures, reset_after)
    await call(breaker, *[broken] * failures)
    assert breaker.state("fetch") == "open"
    return breaker


async def half_open() -> CircuitBreakerMiddleware:
    breaker = await opened()
    await asyncio.sleep(30)
    assert breaker.state("fetch") == "half-open"
    return breaker


class TestClosed:
    async def test_is_a_stage_that_was_never_called(self) -> None:
        breaker = CircuitBreakerMiddleware()
        assert breaker.state("fetch") == "closed"
        assert repr(breaker) == "<CircuitBreakerMiddleware>"

    async def test_opens_after_five_failures_by_default_for_thirty_seconds(self) -> None:
        breaker = CircuitBreakerMiddleware()
        await call(breaker, *[broken] * 4)
        assert breaker.state("fetch") == "closed"
        await call(breaker, broken)
        assert breaker.state("fetch") == "open"
        assert (await refusal(breaker)).retry_after == 30

    @pytest.mark.parametrize("success", [ok, finished])
    async def test_a_success_sets_the_count_to_zero(self, success: Any) -> None:
        breaker = CircuitBreakerMiddleware(3)
        await call(breaker, broken, broken, success, broken, broken)
        assert breaker.state("fetch") == "closed"
        await call(breaker, broken)
        assert breaker.state("fetch") == "open"

    async def test_a_cancellation_counts_as_neither(self) -> None:
        breaker = CircuitBreakerMiddleware(3)
        await call(breaker, broken, gone, broken, gone, gone)
        assert breaker.state("fetch") == "closed"
        await call(breaker, broken)
        assert breaker.state("fetch") == "open"

    async def test_a_cancellation_that_a_handler_made_an_error_of_counts_as_neither(self) -> None:
        async def convert(value: Any) -> None:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                raise ConnectionError from None

        breaker = CircuitBreakerMiddleware(1)
        task = asyncio.ensure_future(breaker(convert, "fetch", 1, {}))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(ConnectionError):
            await task
        assert breaker.state("fetch") == "closed"

    async def test_a_timeout_of_the_handlers_own_is_a_failure(self) -> None:
        async def slow(value: Any) -> None:
            async with asyncio.timeout(1):
                await asyncio.sleep(10)

        breaker = CircuitBreakerMiddleware(1)
        await call(breaker, slow)
        assert breaker.state("fetch") == "open"

    async def test_errors_and_finish_leave_as_they_are(self) -> None:
        breaker = CircuitBreakerMiddleware()
        for error in (LookupError(), Finish(1), asyncio.CancelledError()):

            async def next_stage(value: Any, error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)) as caught:
                await breaker(next_stage, "fetch", 1, {})
            assert caught.value is error


class TestOpen:
    async def test_refuses_at_once_and_says_for_how_long(self) -> None:
        breaker = await opened(reset_after=30)
        await asyncio.sleep(12.5)
        error = await refusal(breaker)
        assert error.stage_name == "fetch"
        assert error.retry_after == 17.5
        assert now() == 12.5

    async def test_refusals_do_not_prolong_it(self) -> None:
        breaker = await opened(reset_after=30)
        for _ in range(10):
            await asyncio.sleep(2.5)
            await refusal(breaker)
        await asyncio.sleep(5)
        assert breaker.state("fetch") == "half-open"

    async def test_a_late_failure_neither_counts_nor_prolongs(self) -> None:
        breaker = CircuitBreakerMiddleware(2, 30)
        late = asyncio.gather(call(breaker, after(10, broken)), call(breaker, after(40, broken)))
        await asyncio.sleep(1)
        await call(breaker, broken, broken)
        await asyncio.sleep(20)
        assert (await refusal(breaker)).retry_after == 10
        await asyncio.sleep(10)
        assert breaker.state("fetch") == "half-open"
        await late
        assert breaker.state("fetch") == "half-open"

    async def test_a_late_success_does_not_close_it(self) -> None:
        breaker = CircuitBreakerMiddleware(2, 30)
        late = asyncio.gather(
            *(call(breaker, after(seconds, then)) for seconds in (10, 40) for then in (ok, finished, gone))
        )
        await asyncio.sleep(1)
        await call(breaker, broken, broken)
        await asyncio.sleep(20)
        assert breaker.state("fetch") == "open"
        await late
        assert breaker.state("fetch") == "half-open"

    @pytest.mark.parametrize("start", [0.1, 0.7, 3.3, 1e6 + 0.1])
    @pytest.mark.parametrize("wait", [0.1, 0.6, 7.7])
    async def test_who_sleeps_retry_after_gets_through(self, start: float, wait: float) -> None:
        await asyncio.sleep(start)
        breaker = await opened(reset_after=29.9)
        await asyncio.sleep(wait)
        await asyncio.sleep((await refusal(breaker)).retry_after)
        assert await breaker(ok, "fetch", 5, {}) == 5


class TestHalfOpen:
    async def test_exactly_one_call_goes_through(self) -> None:
        breaker = await half_open()
        trial = asyncio.ensure_future(call(breaker, after(60, ok)))
        await asyncio.sleep(0)
        assert [(await refusal(breaker)).retry_after for _ in range(3)] == [0, 0, 0]
        await asyncio.sleep(45)
        assert (await refusal(breaker)).retry_after == 0
        assert breaker.state("fetch") == "half-open"
        await trial
        assert await asyncio.gather(*(breaker(ok, "fetch", n, {}) for n in range(3))) == [0, 1, 2]

    @pytest.mark.parametrize("success", [ok, finished])
    async def test_the_trials_success_closes_it_and_the_count_starts_anew(self, success: Any) -> None:
        breaker = await half_open()
        await call(breaker, success)
        assert breaker.state("fetch") == "closed"
        await call(breaker, broken)
        assert breaker.state("fetch") == "closed"
        await call(breaker, broken)
        assert breaker.state("fetch") == "open"

    async def test_the_trials_failure_opens_it_for_the_whole_time(self) -> None:
        breaker = await half_open()
        await call(breaker, after(5, broken))
        assert (await refusal(breaker)).retry_after == 30
        await asyncio.sleep(29)
        assert breaker.state("fetch") == "open"
        await asyncio.sleep(1)
        await call(breaker, ok)
        assert breaker.state("fetch") == "closed"

    async def test_after_a_cancelled_trial_the_next_call_is_the_trial(self) -> None:
        breaker = await half_open()
        task = asyncio.ensure_future(breaker(after(5, ok), "fetch", 1, {}))
        await asyncio.sleep(1)
        await refusal(breaker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert breaker.state("fetch") == "half-open"
        assert await breaker(ok, "fetch", 1, {}) == 1
        assert breaker.state("fetch") == "closed"

    async def test_a_late_cancellation_lets_no_second_trial_through(self) -> None:
        breaker = CircuitBreakerMiddleware(2, 30)
        late = asyncio.ensure_future(call(breaker, after(40, gone)))
        await asyncio.sleep(1)
        await call(breaker, broken, broken)
        await asyncio.sleep(30)
        trial = asyncio.ensure_future(call(breaker, after(60, ok)))
        await late
        assert (await refusal(breaker)).retry_after == 0
        await trial

    async def test_calls_from_before_do_not_count_after_it_has_closed(self) -> None:
        breaker = CircuitBreakerMiddleware(2, 30)
        late = asyncio.gather(*(call(breaker, after(50, broken)) for _ in range(5)))
        await asyncio.sleep(1)
        await call(breaker, broken, broken)
        await asyncio.sleep(30)
        await call(breaker, ok)
        await late
        assert breaker.state("fetch") == "closed"
        await call(breaker, broken)
        assert breaker.state("fetch") == "closed"


class TestCircuits:
    async def test_one_for_each_stage_name(self) -> None:
        breaker = await opened()
        assert await breaker(ok, "save", 5, {}) == 5
        assert (breaker.state("fetch"), breaker.state("save")) == ("open", "closed")

    async def test_asking_for_a_state_makes_none(self) -> None:
        breaker = CircuitBreakerMiddleware()
        breaker.state("fetch")
        assert repr(breaker) == "<CircuitBreakerMiddleware>"

    async def test_are_not_shared_between_breakers(self) -> None:
        await opened()
        other = CircuitBreakerMiddleware(2)
        assert await other(ok, "fetch", 5, {}) == 5

    async def test_are_shared_by_the_pipelines_that_share_a_breaker(self) -> None:
        breaker = CircuitBreakerMiddleware(2)
        first = Pipeline([Stage("fetch", broken)], middlewares=[breaker])
        second = Pipeline([Stage("fetch", ok)], middlewares=[breaker])
        for _ in range(2):
            with pytest.raises(StageExecutionError):
                await first.run(1)
        with pytest.raises(CircuitOpenError):
            await second.run(1)

    async def test_the_repr_shows_their_states(self) -> None:
        breaker = await half_open()
        await call(breaker, *[broken] * 2, name="save")
        await call(breaker, ok, name="it's")
        assert (
            repr(breaker) == "<CircuitBreakerMiddleware 'fetch': half-open, 'save': open, \"it's\": closed>"
        )

    def test_state_and_repr_need_no_running_loop(self) -> None:
        breaker = run_virtually(opened())
        assert breaker.state("fetch") == "open"
        assert repr(breaker) == "<CircuitBreakerMiddleware 'fetch': open>"
        assert run_virtually(half_open()).state("fetch") == "half-open"

    async def test_a_state_can_be_asked_from_a_thread(self) -> None:
        breaker = await half_open()
        assert await asyncio.to_thread(breaker.state, "fetch") == "half-open"


class TestInAPipeline:
    async def test_one_failure_is_a_stage_that_failed_after_all_its_attempts(self) -> None:
        calls: list[Any] = []

        async def failing(value: Any) -> None:
            calls.append(value)
            raise LookupError

        breaker = CircuitBreakerMiddleware(2)
        pipeline = Pipeline([Stage("fetch", failing, retries=3)], middlewares=[breaker])
        for _ in range(2):
            with pytest.raises(StageExecutionError):
                await pipeline.run(1)
        with pytest.raises(CircuitOpenError):
            await pipeline.run(1)
        assert len(calls) == 8

    async def test_before_a_retry_the_refusals_are_not_retried(self) -> None:
        breaker = await opened()
        refused: list[float] = []

        async def noting(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            try:
                return await next_stage(value)
            except CircuitOpenError as error:
                refused.append(error.retry_after)
                raise

        retrying: Any = RetryMiddleware(3, 1)
        for middlewares, times in (
            ([retrying, noting, breaker], [30.0, 29.0, 28.0, 27.0]),
            ([noting, breaker, retrying], [27.0]),
        ):
            with pytest.raises(CircuitOpenError):
                await Pipeline([Stage("fetch", ok)], middlewares=middlewares).run(1)
            assert refused == times
            refused.clear()

    async def test_after_a_cache_a_hit_needs_no_closed_circuit(self) -> None:
        breaker = CircuitBreakerMiddleware(2)
        pipeline = Pipeline([Stage("fetch", ok)], middlewares=[CacheMiddleware(), breaker])
        assert await pipeline.run("known") == "known"
        await call(breaker, broken, broken)
        assert await pipeline.run("known") == "known"
        with pytest.raises(CircuitOpenError):
            await pipeline.run("unknown")

    async def test_a_stages_timeout_counts_and_a_deadline_does_not(self) -> None:
        breaker = CircuitBreakerMiddleware(1)
        pipeline = Pipeline([Stage("fetch", after(9, ok), timeout=5)], middlewares=[breaker])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await pipeline.run(1)
        assert breaker.state("fetch") == "closed"
        with pytest.raises(StageExecutionError):
            await pipeline.run(1)
        assert breaker.state("fetch") == "open"


async def test_opening_is_logged_as_a_warning_and_closing_as_information(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    breaker = await opened(reset_after=0.5)
    await asyncio.sleep(0.5)
    await call(breaker, broken)
    await asyncio.sleep(0.5)
    await call(breaker, ok, ok)
    assert caplog.record_tuples == [
        ("async_pipeline", logging.WARNING, "The circuit of stage 'fetch' is open for 0.5 s"),
        ("async_pipeline", logging.WARNING, "The circuit of stage 'fetch' is open for 0.5 s"),
        ("async_pipeline", logging.INFO, "The circuit of stage 'fetch' is closed again"),
    ]


class TestArguments:
    async def test_any_number_will_do(self) -> None:
        breaker = CircuitBreakerMiddleware(failures=1, reset_after=Fraction(1, 2))  # type: ignore[arg-type]
        await call(breaker, broken)
        assert (await refusal(breaker)).retry_after == 0.5

    @pytest.mark.parametrize("value", [0, -1, True, math.nan])
    def test_too_few_failures(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^failures must be at least 1"):
            CircuitBreakerMiddleware(value)

    @pytest.mark.parametrize("value", [1.5, "5", None])
    def test_failures_that_are_no_int(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^failures must be an int"):
            CircuitBreakerMiddleware(value)

    @pytest.mark.parametrize("value", [0, -1, True, math.nan, math.inf])
    def test_a_wrong_time(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^reset_after must be "):
            CircuitBreakerMiddleware(5, value)

    @pytest.mark.parametrize("value", ["30", None])
    def test_a_time_that_is_no_number(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^reset_after must be a number of seconds"):
            CircuitBreakerMiddleware(5, value)


Ending = Literal["ok", "finish", "fail", "cancel"]
HANDLERS = {"ok": ok, "finish": finished, "fail": broken, "cancel": gone}


@dataclass
class Model:
    """The rules once more: a list of periods, the last of which is the present one."""

    failures: int
    reset_after: int
    periods: list[str] = field(default_factory=lambda: ["closed"])
    in_a_row: int = 0
    opened_at: int = 0

    def begin(self, time: int) -> int | None:
        """The index of the period to which a call at this time belongs, or None if it is refused."""
        if self.periods[-1] == "open" and time - self.opened_at >= self.reset_after:
            self.periods.append("trial wanted")
        if self.periods[-1] == "trial wanted":
            self.periods.append("trial")
        elif self.periods[-1] != "closed":
            return None
        return len(self.periods) - 1

    def end(self, period: int, ending: Ending, time: int) -> None:
        if period != len(self.periods) - 1:
            return
        is_trial = self.periods[-1] == "trial"
        if ending == "fail":
            self.in_a_row += 1
            if is_trial or self.in_a_row == self.failures:
                self.periods.append("open")
                self.opened_at = time
        elif ending != "cancel":
            self.in_a_row = 0
            if is_trial:
                self.periods.append("closed")
        elif is_trial:
            self.periods.append("trial wanted")
        if self.periods[-1] == "open":
            self.in_a_row = 0

    def state(self, time: int) -> str:
        if self.periods[-1] == "open":
            return "open" if time - self.opened_at < self.reset_after else "half-open"
        return "closed" if self.periods[-1] == "closed" else "half-open"


calls = st.tuples(
    st.integers(0, 4), st.integers(0, 9), st.sampled_from(["ok", "finish", "fail", "fail", "cancel"])
)


@settings(max_examples=300)
@given(st.lists(calls, max_size=40), st.integers(1, 3), st.integers(1, 8))
def test_any_sequence_of_calls_does_what_the_model_says(
    sequence: list[tuple[int, int, Ending]], failures: int, reset_after: int
) -> None:
    """Calls that begin so many seconds after the one before, take so many seconds, and end so."""

    async def main() -> None:
        breaker, model = CircuitBreakerMiddleware(failures, reset_after), Model(failures, reset_after)

        async def one(seconds: int, ending: Ending) -> None:
            expected = model.begin(round(now()))
            entered = False

            async def next_stage(value: Any) -> Any:
                nonlocal entered
                entered = True
                await asyncio.sleep(seconds)
                assert expected is not None
                model.end(expected, ending, round(now()))
                return await HANDLERS[ending](value)

            is_open = model.state(round(now())) == "open"
            left = model.opened_at + reset_after - now() if is_open else 0
            try:
                await breaker(next_stage, "fetch", 1, {})
            except CircuitOpenError as error:
                assert error.retry_after == left
            except (LookupError, Finish, asyncio.CancelledError):
                assert entered
            assert entered == (expected is not None)

        async with asyncio.TaskGroup() as group:
            for wait, seconds, ending in sequence:
                await asyncio.sleep(wait)
                assert breaker.state("fetch") == model.state(round(now()))
                group.create_task(one(seconds, ending))

    logging.disable(logging.WARNING)  # or a failure shows every opening of every example
    try:
        run_virtually(main())
    finally:
        logging.disable(logging.NOTSET)
