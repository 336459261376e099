"""Delays, which never overflow, and the checks of numbers, which name the parameter."""

import itertools
import math
import pickle
import sys
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_pipeline.retry import BackoffMode, RetryPolicy, check_backoff, check_count, check_seconds

LARGEST = sys.float_info.max
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
        assert RetryPolicy().next_delay(1) is None

    @given(st.integers(0, 50), seconds, modes)
    def test_gives_up_after_the_retries(self, retries: int, delay: float, backoff: str) -> None:
        policy = RetryPolicy(retries, delay, backoff)
        delays = [policy.next_delay(attempt) for attempt in range(1, retries + 3)]
        assert None not in delays[:retries]
        assert delays[retries:] == [None, None]

    @given(seconds, st.integers(1, 10**6))
    def test_fixed_is_the_delay_itself(self, delay: float, attempt: int) -> None:
        assert RetryPolicy(10**6, delay).next_delay(attempt) == delay
        assert RetryPolicy(10**6, delay, "fixed").next_delay(attempt) == delay

    def test_exponential_doubles(self) -> None:
        policy = RetryPolicy(5, 0.5, "exponential")
        assert [policy.next_delay(attempt) for attempt in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 8.0, None]

    @given(seconds, st.integers(1, 900))
    def test_exponential_is_the_formula_as_long_as_that_fits(self, delay: float, attempt: int) -> None:
        exact = Fraction(delay) * 2 ** (attempt - 1)
        expected = float(exact) if exact <= LARGEST else LARGEST
        assert RetryPolicy(900, delay, "exponential").next_delay(attempt) == expected

    @given(seconds, st.lists(st.integers(1, 10**30), min_size=2).map(sorted))
    def test_exponential_never_shrinks_and_never_overflows(self, delay: float, attempts: list[int]) -> None:
        policy = RetryPolicy(10**30, delay, "exponential")
        delays = [policy.next_delay(attempt) or 0.0 for attempt in attempts]
        assert all(math.isfinite(each) and each >= delay for each in delays)
        assert all(earlier <= later for earlier, later in itertools.pairwise(delays))

    def test_exponential_stops_at_the_largest_float(self) -> None:
        policy = RetryPolicy(10**400, 1.0, "exponential")
        assert policy.next_delay(1024) == 2.0**1023
        for attempt in (1025, 10**6, 10**20, 10**400):
            assert policy.next_delay(attempt) == LARGEST

    @given(st.integers(1, 10**30), modes)
    def test_zero_stays_zero(self, attempt: int, backoff: str) -> None:
        assert RetryPolicy(10**30, 0.0, backoff).next_delay(attempt) == 0

    @pytest.mark.parametrize(
        "delay", [2, Fraction(2), Float64(2), Float32(2)], ids=lambda v: type(v).__name__
    )
    def test_any_number_is_a_delay(self, delay: Any) -> None:
        assert RetryPolicy(3, delay).next_delay(2) == 2.0
        assert RetryPolicy(3, delay, "exponential").next_delay(2) == 4.0

    def test_a_number_that_is_close_to_overflowing(self) -> None:
        assert RetryPolicy(3, int(LARGEST), "exponential").next_delay(1) == LARGEST
        assert RetryPolicy(3, int(LARGEST), "exponential").next_delay(2) == LARGEST

    def test_is_immutable_comparable_and_pickles(self) -> None:
        policy = RetryPolicy(3, 0.5, "exponential")
        with pytest.raises(AttributeError):
            policy.retries = 4  # type: ignore[misc]
        assert policy == RetryPolicy(3, 0.5, "exponential") != RetryPolicy(3, 0.5)
        assert pickle.loads(pickle.dumps(policy)) == policy


class TestCheckBackoff:
    @pytest.mark.parametrize("mode", get_args(BackoffMode))
    def test_knows_every_mode(self, mode: str) -> None:
        check_backoff(mode)
        assert RetryPolicy(1, 1.0, mode).next_delay(1) == 1.0

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
