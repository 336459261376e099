"""Delays, which never overflow; which errors are tried again; the checks, which name the parameter."""

import asyncio
import itertools
import math
import pickle
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, cast, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_pipeline import RetryBudget
from async_pipeline.retry import (
    BackoffMode,
    RetryPolicy,
    check_backoff,
    check_count,
    check_fraction,
    check_retry_on,
    check_seconds,
)

LARGEST = sys.float_info.max
ERROR = ValueError("no")
seconds = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
modes = st.sampled_from(get_args(BackoffMode))


class Float64(float):
    """A float that has a type of its own, like numpy's float64."""


class Number:
    """A number that is no float and no int but registered as one, like numpy's float32 and int64."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < other)

    def __le__(self, other: Any) -> bool:
        return bool(self.value <= other)

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > other)

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other)

    __hash__ = None  # type: ignore[assignment]

    def __float__(self) -> float:
        return float(self.value)


class Float32(Number):
    pass


class Int64(Number):
    pass


Real.register(Float32)
Integral.register(Int64)


class TestRetryPolicy:
    def test_by_default_does_not_retry(self) -> None:
        assert RetryPolicy().next_delay(1, ERROR) is None

    @given(st.integers(0, 50), seconds, modes)
    def test_gives_up_after_the_retries(self, retries: int, delay: float, backoff: str) -> None:
        policy = RetryPolicy(retries, delay, backoff)
        delays = [policy.next_delay(attempt, ERROR) for attempt in range(1, retries + 3)]
        assert None not in delays[:retries]
        assert delays[retries:] == [None, None]

    @given(seconds, st.integers(1, 10**6))
    def test_fixed_is_the_delay_itself(self, delay: float, attempt: int) -> None:
        assert RetryPolicy(10**6, delay).next_delay(attempt, ERROR) == delay
        assert RetryPolicy(10**6, delay, "fixed").next_delay(attempt, ERROR) == delay

    def test_exponential_doubles(self) -> None:
        policy = RetryPolicy(5, 0.5, "exponential")
        assert [policy.next_delay(attempt, ERROR) for attempt in range(1, 7)] == [
            0.5,
            1.0,
            2.0,
            4.0,
            8.0,
            None,
        ]

    @given(seconds, st.integers(1, 900))
    def test_exponential_is_the_formula_as_long_as_that_fits(self, delay: float, attempt: int) -> None:
        exact = Fraction(delay) * 2 ** (attempt - 1)
        expected = float(exact) if exact <= LARGEST else LARGEST
        assert RetryPolicy(900, delay, "exponential").next_delay(attempt, ERROR) == expected

    @given(seconds, st.lists(st.integers(1, 10**30), min_size=2).map(sorted))
    def test_exponential_never_shrinks_and_never_overflows(self, delay: float, attempts: list[int]) -> None:
        policy = RetryPolicy(10**30, delay, "exponential")
        delays = [policy.next_delay(attempt, ERROR) or 0.0 for attempt in attempts]
        assert all(math.isfinite(each) and each >= delay for each in delays)
        assert all(earlier <= later for earlier, later in itertools.pairwise(delays))

    def test_exponential_stops_at_the_largest_float(self) -> None:
        policy = RetryPolicy(10**400, 1.0, "exponential")
        assert policy.next_delay(1024, ERROR) == 2.0**1023
        for attempt in (1025, 10**6, 10**20, 10**400):
            assert policy.next_delay(attempt, ERROR) == LARGEST

    @given(st.integers(1, 10**30), modes)
    def test_zero_stays_zero(self, attempt: int, backoff: str) -> None:
        assert RetryPolicy(10**30, 0.0, backoff).next_delay(attempt, ERROR) == 0

    @pytest.mark.parametrize(
        "delay", [2, Fraction(2), Float64(2), Float32(2)], ids=lambda v: type(v).__name__
    )
    def test_any_number_is_a_delay(self, delay: Any) -> None:
        assert RetryPolicy(3, delay).next_delay(2, ERROR) == 2.0
        assert RetryPolicy(3, delay, "exponential").next_delay(2, ERROR) == 4.0

    def test_a_number_that_is_close_to_overflowing(self) -> None:
        assert RetryPolicy(3, int(LARGEST), "exponential").next_delay(1, ERROR) == LARGEST
        assert RetryPolicy(3, int(LARGEST), "exponential").next_delay(2, ERROR) == LARGEST

    def test_is_immutable_comparable_and_pickles(self) -> None:
        policy = RetryPolicy(3, 0.5, "exponential")
        with pytest.raises(AttributeError):
            policy.retries = 4  # type: ignore[misc]
        assert policy == RetryPolicy(3, 0.5, "exponential") != RetryPolicy(3, 0.5)
        assert pickle.loads(pickle.dumps(policy)) == policy


def drawn(*numbers: float) -> Callable[[], float]:
    """A random source that has been looked into."""
    return iter(numbers).__next__


class TestMaxDelay:
    def test_caps_what_the_backoff_grows_to(self) -> None:
        policy = RetryPolicy(9, 1.0, "exponential", max_delay=5.0)
        assert [policy.next_delay(attempt, ERROR) for attempt in range(1, 6)] == [1.0, 2.0, 4.0, 5.0, 5.0]

    def test_caps_a_fixed_delay(self) -> None:
        assert RetryPolicy(9, 8.0, max_delay=5.0).next_delay(1, ERROR) == 5.0
        assert RetryPolicy(9, 8.0, max_delay=0).next_delay(1, ERROR) == 0

    def test_no_cap_by_default(self) -> None:
        assert RetryPolicy(99, 1.0, "exponential").next_delay(64, ERROR) == 2.0**63

    @given(seconds, seconds, st.floats(0, 1), st.floats(0, 1, exclude_max=True), modes, st.integers(1, 10**6))
    def test_no_delay_is_above_the_cap_or_below_zero(
        self, delay: float, cap: float, jitter: float, number: float, backoff: str, attempt: int
    ) -> None:
        policy = RetryPolicy(10**6, delay, backoff, cap, jitter, random=drawn(number))
        next_delay = policy.next_delay(attempt, ERROR)
        assert next_delay is not None
        assert 0 <= next_delay <= cap


class TestJitter:
    def test_zero_stays_exact_and_draws_nothing(self) -> None:
        assert RetryPolicy(3, 0.3, jitter=0, random=drawn()).next_delay(1, ERROR) == 0.3

    @pytest.mark.parametrize(
        ("jitter", "number", "delay"),
        [(1, 0.0, 8.0), (1, 0.25, 6.0), (1, 0.75, 2.0), (0.5, 0.0, 8.0), (0.5, 0.5, 6.0), (0.25, 0.5, 7.0)],
    )
    def test_shortens_by_its_part_of_the_delay(self, jitter: float, number: float, delay: float) -> None:
        assert RetryPolicy(3, 8.0, jitter=jitter, random=drawn(number)).next_delay(1, ERROR) == delay

    def test_draws_anew_for_each_delay_and_after_the_cap(self) -> None:
        policy = RetryPolicy(9, 4.0, "exponential", 8.0, 1, random=drawn(0.5, 0.25, 0.5))
        assert [policy.next_delay(attempt, ERROR) for attempt in (1, 2, 3)] == [2.0, 6.0, 4.0]

    @given(seconds, st.floats(0, 1), st.floats(0, 1, exclude_max=True))
    def test_keeps_the_rest_of_the_delay(self, delay: float, jitter: float, number: float) -> None:
        next_delay = RetryPolicy(1, delay, jitter=jitter, random=drawn(number)).next_delay(1, ERROR)
        assert next_delay is not None
        assert delay * (1 - jitter) * (1 - 1e-12) <= next_delay <= delay

    def test_is_random_by_default(self) -> None:
        policy = RetryPolicy(1, 1.0, jitter=1)
        assert len({policy.next_delay(1, ERROR) for _ in range(20)}) > 10


class TestTimeout:
    @pytest.mark.parametrize(("elapsed", "delay"), [(0, 2.0), (7.5, 2.0), (8.0, None), (9, None), (99, None)])
    def test_a_delay_that_does_not_fit_is_none(self, elapsed: float, delay: float | None) -> None:
        assert RetryPolicy(3, 2.0).next_delay(1, ERROR, elapsed, 10) == delay

    def test_nor_is_there_a_retry_at_once_when_the_time_is_up(self) -> None:
        assert RetryPolicy(3).next_delay(1, ERROR, 9.9, 10) == 0
        assert RetryPolicy(3).next_delay(1, ERROR, 10, 10) is None

    def test_bounds_what_a_predicate_answers(self) -> None:
        policy = RetryPolicy(3, retry_on=lambda error: 5.0)
        assert policy.next_delay(1, ERROR, 4, 10) == 5.0
        assert policy.next_delay(1, ERROR, 5, 10) is None


class HttpError(Exception):
    def __init__(self, status: int, retry_after: float | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.retry_after = retry_after


def group(*errors: Exception) -> Exception:
    return ExceptionGroup("several", list(errors))


class TestRetryOn:
    @pytest.mark.parametrize(
        ("retry_on", "error", "matches"),
        [
            (Exception, ValueError(), True),
            (BaseException, ValueError(), True),
            (ValueError, ValueError(), True),
            (ValueError, KeyError(), False),
            (LookupError, KeyError(), True),
            ((ValueError, KeyError), KeyError(), True),
            ((ValueError, KeyError), IndexError(), False),
            ((), ValueError(), False),
        ],
    )
    def test_types(self, retry_on: Any, error: Exception, matches: bool) -> None:
        assert RetryPolicy(1, 2.0, retry_on=retry_on).next_delay(1, error) == (2.0 if matches else None)

    @pytest.mark.parametrize(
        ("answer", "delay"),
        [
            (True, 2.0),
            (False, None),
            (None, None),
            (0, 0),
            (0.0, 0),
            (1, 1.0),
            (7.5, 7.5),
            (Fraction(1, 2), 0.5),
        ],
    )
    def test_what_a_predicate_answers(self, answer: Any, delay: float | None) -> None:
        asked: list[object] = []

        def predicate(error: Exception) -> Any:
            asked.append(error)
            return answer

        assert RetryPolicy(1, 2.0, retry_on=predicate).next_delay(1, ERROR) == delay
        assert asked == [ERROR]

    def test_an_exact_delay_is_neither_capped_nor_shortened_nor_multiplied(self) -> None:
        policy = RetryPolicy(9, 2.0, "exponential", 3.0, 1.0, lambda error: 60, random=drawn())
        assert policy.next_delay(5, ERROR) == 60

    def test_an_exact_delay_comes_from_the_error(self) -> None:
        policy = RetryPolicy(9, 1.0, retry_on=lambda error: error.retry_after or error.status == 503)
        assert policy.next_delay(1, HttpError(429, 12)) == 12
        assert policy.next_delay(1, HttpError(503)) == 1.0
        assert policy.next_delay(1, HttpError(404)) is None

    def test_an_exact_delay_does_not_give_more_retries(self) -> None:
        asked: list[object] = []

        def predicate(error: Exception) -> int:
            asked.append(error)
            return 1

        policy = RetryPolicy(2, retry_on=predicate)
        assert [policy.next_delay(attempt, ERROR) for attempt in (1, 2, 3)] == [1, 1, None]
        assert len(asked) == 2, "after the last attempt there is nothing to ask"

    @pytest.mark.parametrize("answer", [-1, -0.5, math.nan, math.inf, 10**400])
    def test_a_predicate_that_answers_no_delay(self, answer: Any) -> None:
        with pytest.raises(ValueError, match=r"^what retry_on returns must be greater than or equal to 0"):
            RetryPolicy(1, retry_on=lambda error: answer).next_delay(1, ERROR)

    @pytest.mark.parametrize("answer", ["5", object(), [1], Decimal(1)], ids=repr)
    def test_a_predicate_that_answers_something_else(self, answer: Any) -> None:
        with pytest.raises(TypeError, match=r"^what retry_on returns must be a number of seconds, not "):
            RetryPolicy(1, retry_on=lambda error: answer).next_delay(1, ERROR)

    def test_a_predicate_that_raises(self) -> None:
        with pytest.raises(ZeroDivisionError):
            RetryPolicy(1, retry_on=lambda error: 1 / 0).next_delay(1, ERROR)

    @pytest.mark.parametrize(
        ("retry_on", "error", "matches"),
        [
            (ValueError, group(ValueError(), ValueError()), True),
            (ValueError, group(ValueError(), KeyError()), False),
            (ValueError, group(KeyError(), ValueError()), False),
            ((ValueError, KeyError), group(ValueError(), KeyError()), True),
            (ValueError, group(ValueError(), group(ValueError())), True),
            (ValueError, group(ValueError(), group(KeyError())), False),
            (Exception, group(ValueError(), group(KeyError())), True),
            (ExceptionGroup, group(ValueError()), True),
            (ExceptionGroup, ValueError(), False),
            ((ExceptionGroup, KeyError), group(ValueError()), True),
            (BaseExceptionGroup, group(ValueError()), True),
        ],
    )
    def test_all_leaves_of_a_group_have_to_match(
        self, retry_on: Any, error: Exception, matches: bool
    ) -> None:
        assert RetryPolicy(1, 2.0, retry_on=retry_on).next_delay(1, error) == (2.0 if matches else None)

    @pytest.mark.parametrize(
        ("answers", "delay"),
        [
            ((True, True), 2.0),
            ((True, 5), 5),
            ((5, True, 1), 5),
            ((0, True), 2.0),
            ((0, 0), 0),
            ((5, False), None),
        ],
    )
    def test_of_the_leaves_delays_the_longest_counts(self, answers: Any, delay: float | None) -> None:
        of = {HttpError(number): answer for number, answer in enumerate(answers)}
        policy = RetryPolicy(1, 2.0, retry_on=of.__getitem__)
        assert policy.next_delay(1, group(*of)) == delay
        assert policy.next_delay(1, group(group(*of))) == delay


class TestRetryBudget:
    def test_has_half_of_its_tokens_to_spend(self) -> None:
        budget = RetryBudget(10)
        assert [budget.record_failure() for _ in range(7)] == [True] * 4 + [False] * 3
        assert budget.tokens == 3

    def test_is_never_overdrawn(self) -> None:
        budget = RetryBudget(2, 1)
        for _ in range(9):
            budget.record_failure()
        assert budget.tokens == 0
        budget.record_success()
        assert budget.tokens == 1

    def test_successes_fill_it_up_to_where_it_began(self) -> None:
        budget = RetryBudget(10, 0.5)
        for _ in range(6):
            budget.record_failure()
        budget.record_success()
        assert budget.tokens == 4.5
        for _ in range(99):
            budget.record_success()
        assert budget.tokens == 10

    def test_the_defaults_are_those_of_the_signature(self) -> None:
        budget = RetryBudget()
        assert (budget.max_tokens, budget.token_ratio, budget.tokens) == (10, 0.1, 10)

    def test_shows_what_is_left(self) -> None:
        budget = RetryBudget(4, 0.1)
        budget.record_failure()
        budget.record_success()
        assert repr(budget) == "RetryBudget(max_tokens=4, token_ratio=0.1, tokens=3.1)"

    @given(st.lists(st.booleans(), max_size=200), st.floats(0.5, 100), st.floats(0.01, 2))
    def test_follows_the_rule(self, successes: list[bool], most: float, ratio: float) -> None:
        budget, tokens = RetryBudget(most, ratio), most
        for success in successes:
            if success:
                budget.record_success()
                tokens = min(most, tokens + ratio)
            else:
                tokens = max(0, tokens - 1)
                assert budget.record_failure() is (tokens > most / 2)
            assert budget.tokens == tokens

    @pytest.mark.parametrize("argument", ["max_tokens", "token_ratio"])
    def test_arguments(self, argument: str) -> None:
        for wrong in (0, -1, math.nan, math.inf, 10**400):
            with pytest.raises(ValueError, match=rf"^{argument} must be greater than 0 and finite$"):
                RetryBudget(**{argument: wrong})
        with pytest.raises(ValueError, match=rf"^{argument} must be a number, not True$"):
            RetryBudget(**{argument: True})
        with pytest.raises(TypeError, match=rf"^{argument} must be a number, not '5' \(str\)$"):
            RetryBudget(**{argument: cast(Any, "5")})

    def test_a_policy_counts_each_failure_and_the_last_one_too(self) -> None:
        budget = RetryBudget(10)
        policy = RetryPolicy(1, 2.0, budget=budget)
        assert [policy.next_delay(attempt, ERROR) for attempt in (1, 2)] == [2.0, None]
        assert budget.tokens == 8

    def test_a_policy_without_retries_counts(self) -> None:
        budget = RetryBudget(10)
        assert RetryPolicy(budget=budget).next_delay(1, ERROR) is None
        assert budget.tokens == 9

    def test_a_failure_that_is_not_worth_a_retry_takes_nothing(self) -> None:
        budget = RetryBudget(10)
        assert RetryPolicy(3, retry_on=KeyError, budget=budget).next_delay(1, ERROR) is None
        assert RetryPolicy(3, retry_on=lambda error: False, budget=budget).next_delay(1, ERROR) is None
        assert budget.tokens == 10

    def test_an_empty_one_stops_a_policy(self) -> None:
        budget = RetryBudget(2)
        policy = RetryPolicy(3, 2.0, budget=budget)
        assert policy.next_delay(1, ERROR) is None
        budget.record_success()
        assert budget.tokens == 1.1


class TestCheckRetryOn:
    @pytest.mark.parametrize(
        "retry_on",
        [
            Exception,
            BaseException,
            ValueError,
            asyncio.CancelledError,
            (),
            (ValueError, OSError),
            bool,
            lambda e: True,
        ],
    )
    def test_types_and_predicates(self, retry_on: Any) -> None:
        if retry_on is bool:
            with pytest.raises(TypeError, match=r"^retry_on must hold exception types, not <class 'bool'>$"):
                check_retry_on(retry_on)
        else:
            check_retry_on(retry_on)

    @pytest.mark.parametrize("retry_on", [(ValueError, 1), ((ValueError,),), (ValueError(),), int])
    def test_a_tuple_of_something_else(self, retry_on: Any) -> None:
        with pytest.raises(TypeError, match=r"^retry_on must hold exception types, not "):
            check_retry_on(retry_on)

    @pytest.mark.parametrize("retry_on", [None, 3, "ValueError", ValueError(), [ValueError]], ids=repr)
    def test_something_else(self, retry_on: Any) -> None:
        with pytest.raises(
            TypeError, match=r"^retry_on must be an exception type, a tuple of them, or a predic"
        ):
            check_retry_on(retry_on)

    def test_an_async_predicate(self) -> None:
        async def ask(error: Exception) -> bool:
            return True

        class Ask:
            async def __call__(self, error: Exception) -> bool:
                return True

        for predicate in (ask, Ask()):
            with pytest.raises(TypeError, match=r"^retry_on must be a sync predicate"):
                check_retry_on(predicate)


class TestCheckFraction:
    @pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, 0.5, Fraction(1, 3), Float32(0.5)], ids=repr)
    def test_numbers_from_0_to_1(self, value: Any) -> None:
        check_fraction("jitter", value)

    @pytest.mark.parametrize("value", [-0.1, 1.1, 2, -1, math.nan, math.inf, Float32(math.nan), 10**400])
    def test_other_numbers(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^jitter must be between 0 and 1$"):
            check_fraction("jitter", value)

    def test_a_bool_is_a_wrong_value(self) -> None:
        with pytest.raises(ValueError, match=r"^jitter must be between 0 and 1, not True; write 1.0$"):
            check_fraction("jitter", True)

    @pytest.mark.parametrize("value", [None, "full", Decimal("0.5")], ids=repr)
    def test_another_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^jitter must be between 0 and 1, not "):
            check_fraction("jitter", value)


class TestCheckBackoff:
    @pytest.mark.parametrize("mode", get_args(BackoffMode))
    def test_knows_every_mode(self, mode: str) -> None:
        check_backoff(mode)
        assert RetryPolicy(1, 1.0, mode).next_delay(1, ERROR) == 1.0

    def test_the_modes(self) -> None:
        assert get_args(BackoffMode) == ("fixed", "exponential")

    @pytest.mark.parametrize("mode", ["", "linear", "Fixed", "exponential "])
    def test_another_name(self, mode: str) -> None:
        with pytest.raises(ValueError, match=r'^backoff must be "fixed" or "exponential"$'):
            check_backoff(mode)

    @pytest.mark.parametrize("mode", [None, 2, True, [], {}, b"fixed", len])
    def test_another_type(self, mode: object) -> None:
        with pytest.raises(TypeError, match=r'^backoff must be "fixed" or "exponential", not '):
            check_backoff(mode)


class TestCheckSeconds:
    @pytest.mark.parametrize(
        "value",
        [
            1,
            0.5,
            5e-324,
            LARGEST,
            int(LARGEST),
            Fraction(1, 3),
            Fraction(LARGEST),
            Float64(1.5),
            Float32(1.5),
            Int64(2),
        ],
        ids=lambda value: type(value).__name__,
    )
    @pytest.mark.parametrize("zero", [False, True])
    def test_numbers_above_zero(self, value: Any, zero: bool) -> None:
        check_seconds("timeout", value, zero=zero)

    @pytest.mark.parametrize("value", [0, 0.0, -0.0, Fraction(0), Float32(0.0)], ids=repr)
    def test_zero(self, value: Any) -> None:
        check_seconds("retry_delay", value, zero=True)
        with pytest.raises(ValueError, match=r"^timeout must be greater than 0$"):
            check_seconds("timeout", value, zero=False)

    @pytest.mark.parametrize(
        "value",
        [-1, -0.5, -5e-324, -math.inf, Fraction(-1, 3), Float32(-1.0), -(10**400)],
        ids=lambda v: type(v).__name__,
    )
    def test_negative(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^timeout must be greater than 0$"):
            check_seconds("timeout", value, zero=False)
        with pytest.raises(ValueError, match=r"^retry_delay must be greater than or equal to 0$"):
            check_seconds("retry_delay", value, zero=True)

    @pytest.mark.parametrize(
        "value",
        [
            math.nan,
            math.inf,
            Float64("nan"),
            Float64("inf"),
            Float32(math.nan),
            Float32(math.inf),
            10**400,
            10**5000,  # too long for str()
            Fraction(10**400),
            int(LARGEST) + 1,
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_neither_a_number_nor_finite(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^timeout must be greater than 0 and finite"):
            check_seconds("timeout", value, zero=False)
        with pytest.raises(ValueError, match=r"^delay must be greater than or equal to 0 and finite"):
            check_seconds("delay", value, zero=True)

    @pytest.mark.parametrize("value", [True, False])
    def test_a_bool_is_a_wrong_value(self, value: bool) -> None:
        with pytest.raises(ValueError, match=rf"^timeout must be a number of seconds, not {value}$"):
            check_seconds("timeout", value, zero=True)

    @pytest.mark.parametrize("value", [None, "1", b"1", 1j, [1], Decimal(1), object(), len], ids=repr)
    def test_another_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^timeout must be a number of seconds, not "):
            check_seconds("timeout", value, zero=True)

    def test_says_what_it_was_given(self) -> None:
        with pytest.raises(TypeError, match=r"not '5' \(str\)$"):
            check_seconds("timeout", "5", zero=True)
        with pytest.raises(TypeError, match=r"not None$"):
            check_seconds("timeout", None, zero=True)

    @given(st.floats() | st.integers() | st.fractions())
    def test_accepts_what_can_be_slept(self, value: Any) -> None:
        try:
            check_seconds("delay", value, zero=True)
        except ValueError:
            assert not 0 <= value <= LARGEST
        else:
            assert 0 <= float(value) < math.inf


class TestCheckCount:
    def check(self, value: Any, least: int = 0) -> None:
        check_count("retries", value, least=least, message=f"retries must be at least {least}")

    @pytest.mark.parametrize(
        "value", [0, 1, 10**400, 10**5000, Int64(3)], ids=lambda value: type(value).__name__
    )
    def test_whole_numbers(self, value: Any) -> None:
        self.check(value)

    @given(st.integers(), st.integers())
    def test_the_least(self, value: int, least: int) -> None:
        if value >= least:
            self.check(value, least)
        else:
            with pytest.raises(ValueError, match=rf"^retries must be at least {least}$"):
                self.check(value, least)

    @pytest.mark.parametrize("value", [True, False, math.nan, math.inf, -math.inf, Float64("nan")], ids=repr)
    def test_a_bool_and_what_is_not_finite_are_wrong_values(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^retries must be at least 0, not "):
            self.check(value)

    @pytest.mark.parametrize(
        "value",
        [None, "1", 1.0, 1.5, 1j, Fraction(1), Decimal(1), Float32(1), [1], Decimal("nan")],
        ids=lambda value: type(value).__name__,
    )
    def test_another_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"^retries must be an int, not "):
            self.check(value)

    def test_an_int_of_ones_own(self) -> None:
        self.check(Int64(1), 1)
        with pytest.raises(ValueError, match=r"at least 2"):
            self.check(Int64(1), 2)
