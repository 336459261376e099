"""When to try again: a policy answers a delay or None, and someone else sleeps.

Nothing here waits, reads a clock or knows about asyncio. A new backoff mode is one more name in
``BackoffMode`` and one more line in ``_BACKOFFS``.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import iscoroutinefunction
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

__all__ = [
    "BackoffMode",
    "RetryBudget",
    "RetryOn",
    "RetryPolicy",
    "check_backoff",
    "check_count",
    "check_fraction",
    "check_retry_on",
    "check_seconds",
]

BackoffMode = Literal["fixed", "exponential"]
"""How the delay grows from retry to retry."""

RetryOn: TypeAlias = (
    type[BaseException] | tuple[type[BaseException], ...] | Callable[[Any], bool | float | None]
)
"""Which errors are worth another attempt; an exception type, a tuple of them, or a predicate.

A predicate gets the error and answers ``False`` or ``None``: no further attempt; ``True``: one after the
policy's delay; any other number: one after exactly so many seconds, 0 for at once.
"""


def _fixed(delay: float, _retry: int) -> float:
    return float(delay)


def _exponential(delay: float, retry: int) -> float:
    """``delay * 2 ** (retry - 1)``, which stops growing at the largest float instead of overflowing."""
    try:
        return math.ldexp(delay, retry - 1)
    except OverflowError:
        return sys.float_info.max


_BACKOFFS: dict[str, Callable[[float, int], float]] = {"fixed": _fixed, "exponential": _exponential}


class RetryBudget:
    """A bound on retries that stages and pipelines share, so that they do not bury what is down already.

    >>> budget = RetryBudget()
    >>> fetch = Stage("fetch", download, retries=3, retry_budget=budget)

    The rule is gRPC's retry throttling (proposal A6): the budget starts with ``max_tokens``. Each failed
    attempt that ``retry_on`` calls worth a retry takes 1, each successful one gives ``token_ratio`` back,
    and there are no retries while half of the tokens or less are left. First attempts are always made.

    One budget belongs to one dependency. It is not locked: threads that share one may miscount a little.

    Args:
        max_tokens: where the budget starts, and the most that it holds; greater than 0, 10 by default.
        token_ratio: what a success gives back; greater than 0, 0.1 by default.

    Attributes:
        tokens: how many there are now.

    Raises:
        TypeError, ValueError: an argument is no number, or is not greater than 0 and finite.
    """

    __slots__ = ("max_tokens", "token_ratio", "tokens")

    def __init__(self, max_tokens: float = 10, token_ratio: float = 0.1) -> None:
        _check_positive("max_tokens", max_tokens)
        _check_positive("token_ratio", token_ratio)
        self.max_tokens: float = max_tokens
        self.token_ratio: float = token_ratio
        self.tokens: float = max_tokens

    def record_success(self) -> None:
        """Count a successful attempt."""
        self.tokens = min(self.max_tokens, self.tokens + self.token_ratio)

    def record_failure(self) -> bool:
        """Count a failed attempt, and tell whether it may be retried."""
        self.tokens = max(0, self.tokens - 1)
        return self.tokens > self.max_tokens / 2

    def __repr__(self) -> str:
        return (
            f"RetryBudget(max_tokens={self.max_tokens}, token_ratio={self.token_ratio}, "
            f"tokens={round(self.tokens, 3)})"
        )


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often an operation is tried again, after which errors, and how long to wait before it.

    Args:
        retries: attempts after the first one; 0 for none.
        delay: seconds before a retry; 0 retries at once.
        backoff: ``"fixed"``: each delay is ``delay``; ``"exponential"``: the n-th is
            ``delay * 2 ** (n - 1)``.
        max_delay: the most that a delay grows to; ``None`` for no cap.
        jitter: the part of each delay that is random, 0 to 1: ``d * (1 - jitter * U)`` with ``U`` uniform
            in [0, 1). 1 is the full jitter and 0.5 the equal jitter of the AWS Architecture Blog's
            "Exponential Backoff And Jitter".
        retry_on: which errors are tried again. Of an exception group all leaves have to match, unless
            the group's own type is named; a predicate is asked about each leaf, and the longest delay
            that it answers counts.
        budget: counts all failures and may refuse a retry.
        random: a source of numbers in [0, 1), for the jitter.
    """

    retries: int = 0
    delay: float = 0.0
    backoff: BackoffMode | str = "fixed"
    max_delay: float | None = None
    jitter: float = 0.0
    retry_on: RetryOn = Exception
    budget: RetryBudget | None = None
    random: Callable[[], float] = field(default=random.random, repr=False, compare=False)

    def next_delay(
        self, attempt: int, error: BaseException, elapsed: float = 0.0, timeout: float = math.inf
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        Args:
            attempt: the number of the attempt that failed, counted from 1.
            error: what it failed with.
            elapsed: seconds since the whole began.
            timeout: seconds that the whole may take; a delay that does not fit is None.

        Raises:
            TypeError, ValueError: ``retry_on`` is a predicate and answered something else.
            Exception: what the predicate raised.
        """
        if attempt > self.retries and self.budget is None:
            return None
        delay = self._delay_for(error, attempt)
        if delay is None or not (self.budget is None or self.budget.record_failure()):
            return None
        return delay if attempt <= self.retries and elapsed + delay < timeout else None

    def _delay_for(self, error: BaseException, attempt: int) -> float | None:
        if isinstance(self.retry_on, (type, tuple)):
            return self._scheduled(attempt) if matches(error, self.retry_on) else None
        longest = 0.0
        for leaf in _leaves(error):
            answer = self.retry_on(leaf)
            if answer is None or answer is False:
                return None
            longest = max(longest, self._scheduled(attempt) if answer is True else _exact(answer))
        return longest

    def _scheduled(self, attempt: int) -> float:
        delay = _BACKOFFS[self.backoff](self.delay, attempt)
        if self.max_delay is not None:
            delay = min(delay, float(self.max_delay))
        return delay * (1 - float(self.jitter) * self.random()) if self.jitter else delay


def matches(error: BaseException, kinds: Any) -> bool:
    """Tell whether an error is of these kinds; of a group, all leaves, unless a type of group is named."""
    if not isinstance(error, BaseExceptionGroup) or isinstance(error, _groups_among(kinds)):
        return isinstance(error, kinds)
    return all(matches(part, kinds) for part in error.exceptions)


def _groups_among(kinds: Any) -> tuple[type[BaseException], ...]:
    named = kinds if isinstance(kinds, tuple) else (kinds,)
    return tuple(kind for kind in named if issubclass(kind, BaseExceptionGroup))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
    else:
        for part in error.exceptions:
            yield from _leaves(part)


def _exact(answer: Any) -> float:
    check_seconds("what retry_on returns", answer, zero=True)
    return float(answer)


def check_backoff(backoff: object) -> None:
    """Raise for anything that is not the name of a backoff mode."""
    message = "backoff must be " + " or ".join(f'"{mode}"' for mode in get_args(BackoffMode))
    if not isinstance(backoff, str):
        raise TypeError(f"{message}, not {backoff!r}")
    if backoff not in _BACKOFFS:
        raise ValueError(message)


def check_retry_on(retry_on: object) -> None:
    """Raise for anything that is neither an exception type, nor a tuple of them, nor a sync predicate."""
    if isinstance(retry_on, (type, tuple)):
        check_kinds("retry_on", retry_on)
    elif not callable(retry_on):
        hint = f"; write {type(retry_on).__name__}" if isinstance(retry_on, BaseException) else ""
        hint = "; write a tuple, (...)" if isinstance(retry_on, (list, set, frozenset)) else hint
        raise TypeError(
            "retry_on must be an exception type, a tuple of them, "
            f"or a predicate exc -> bool | float, not {retry_on!r}{hint}"
        )
    elif iscoroutinefunction(retry_on) or iscoroutinefunction(getattr(retry_on, "__call__", None)):  # noqa: B004
        raise TypeError(f"retry_on must be a sync predicate; it can't await: {retry_on!r}")


def check_kinds(parameter: str, kinds: object, base: type[BaseException] = BaseException) -> None:
    """Raise for anything that is neither a type of exception, derived from ``base``, nor a tuple of them."""
    if isinstance(kinds, (list, set, frozenset)):
        raise TypeError(
            f"{parameter} must be an exception type or a tuple of them, not {kinds!r}; write (...)"
        )
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        if not (isinstance(kind, type) and issubclass(kind, base)):
            what = "exception types" if base is BaseException else f"subclasses of {base.__name__}"
            raise TypeError(f"{parameter} must hold {what}, not {kind!r}")


def check_fraction(parameter: str, value: Any) -> None:
    """Raise unless ``value`` is a number from 0 to 1."""
    message = f"{parameter} must be between 0 and 1"
    if isinstance(value, bool):
        raise ValueError(f"{message}, not {value}; write {float(value)}")
    if not isinstance(value, Real):
        raise TypeError(f"{message}, not {_kind(value)}")
    if value < 0 or not value <= 1:  # not a number is neither
        raise ValueError(message)


def check_seconds(parameter: str, value: Any, *, zero: bool) -> None:
    """Raise unless ``value`` is a finite number of seconds, greater than 0, or 0 where ``zero`` allows it."""
    bound = "greater than or equal to 0" if zero else "greater than 0"
    _check_number(parameter, value, "a number of seconds")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{parameter} must be {bound}")
    if not value <= sys.float_info.max:  # infinite, not a number, or too long an int
        raise ValueError(f"{parameter} must be {bound} and finite")


def check_count(parameter: str, value: Any, *, least: int, message: str) -> None:
    """Raise unless ``value`` is an int of at least ``least``; ``message`` says so to the user."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{message}, not {value}")
    if not isinstance(value, Integral):
        raise TypeError(f"{parameter} must be an int, not {_kind(value)}")
    if value < least:
        raise ValueError(message)


def _check_number(parameter: str, value: Any, what: str) -> None:
    if isinstance(value, bool):
        raise ValueError(f"{parameter} must be {what}, not {value}")
    if not isinstance(value, Real):
        hint = "; give its .total_seconds()" if hasattr(value, "total_seconds") else ""
        raise TypeError(f"{parameter} must be {what}, not {_kind(value)}{hint}")


def _check_positive(parameter: str, value: Any) -> None:
    _check_number(parameter, value, "a number")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{parameter} must be greater than 0 and finite")


def _kind(value: object) -> str:
    return "None" if value is None else f"{value!r} ({type(value).__name__})"
