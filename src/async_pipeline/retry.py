"""When to try again: a policy answers a delay or None, and someone else sleeps.

Nothing here waits, reads a clock or knows about asyncio. A new backoff mode is one more name in
``BackoffMode`` and one more line in ``_BACKOFFS``.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

__all__ = ["BackoffMode", "RetryPolicy", "check_backoff", "check_count", "check_seconds"]

BackoffMode = Literal["fixed", "exponential"]
"""How the delay grows from retry to retry."""


def _fixed(delay: float, _retry: int) -> float:
    return delay


def _exponential(delay: float, retry: int) -> float:
    """``delay * 2 ** (retry - 1)``, which stops growing at the largest float instead of overflowing."""
    try:
        return math.ldexp(delay, retry - 1)
    except OverflowError:
        return sys.float_info.max


_BACKOFFS: dict[str, Callable[[float, int], float]] = {"fixed": _fixed, "exponential": _exponential}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often an operation is tried again, and how long to wait before it.

    Args:
        retries: attempts after the first one; 0 for none.
        delay: seconds before a retry; 0 retries at once.
        backoff: ``"fixed"``: each delay is ``delay``; ``"exponential"``: the n-th is
            ``delay * 2 ** (n - 1)``.
    """

    retries: int = 0
    delay: float = 0.0
    backoff: BackoffMode | str = "fixed"

    def next_delay(self, attempt: int) -> float | None:
        """Return the seconds to wait after the failed ``attempt`` (counted from 1), or None to give up."""
        if attempt > self.retries:
            return None
        return _BACKOFFS[self.backoff](self.delay, attempt)


def check_backoff(backoff: object) -> None:
    """Raise for anything that is not the name of a backoff mode."""
    message = "backoff must be " + " or ".join(f'"{mode}"' for mode in get_args(BackoffMode))
    if not isinstance(backoff, str):
        raise TypeError(f"{message}, not {backoff!r}")
    if backoff not in _BACKOFFS:
        raise ValueError(message)


def check_seconds(parameter: str, value: Any, *, zero: bool) -> None:
    """Raise unless ``value`` is a finite number of seconds, greater than 0, or 0 where ``zero`` allows it."""
    bound = "greater than or equal to 0" if zero else "greater than 0"
    if isinstance(value, bool):
        raise ValueError(f"{parameter} must be a number of seconds, not {value}")
    if not isinstance(value, Real):
        raise TypeError(f"{parameter} must be a number of seconds, not {_kind(value)}")
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


def _kind(value: object) -> str:
    return "None" if value is None else f"{value!r} ({type(value).__name__})"
