"""Retry a whole stage, with everything that is inside this middleware."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ..retry import BackoffMode, RetryPolicy, check_backoff, check_count, check_seconds
from ..stage import cancel_requests, was_cancelled

__all__ = ["RetryMiddleware"]


class RetryMiddleware:
    """Run a stage again when it fails, with every middleware that stands after this one in the list.

    It multiplies with the stage's own ``retries``, which is the better place for a single stage: four
    attempts here around four there are sixteen. Only an ``Exception`` is retried, never a cancellation.

    Args:
        retries: attempts after the first one; 3 by default.
        delay: seconds before a retry; 0 (the default) retries at once.
        backoff: ``"fixed"`` (the default), or ``"exponential"``: the n-th delay is ``delay * 2 ** (n - 1)``.

    Raises:
        TypeError, ValueError: at construction, for a wrong argument.
    """

    def __init__(self, retries: int = 3, delay: float = 0.0, backoff: BackoffMode | str = "fixed") -> None:
        check_count("retries", retries, least=0, message="retries must be greater than or equal to 0")
        check_seconds("delay", delay, zero=True)
        check_backoff(backoff)
        self._policy = RetryPolicy(retries, delay, backoff)

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        attempt, requests = 1, cancel_requests()
        while True:
            try:
                return await next_stage(value)
            except Exception as error:
                delay = self._policy.next_delay(attempt, error)
                # a handler may have turned its cancellation into an error of its own
                if delay is None or was_cancelled(error, requests):
                    raise
            if delay > 0:
                await asyncio.sleep(delay)
            attempt += 1
