"""Bound the time of a whole stage, its retries included."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ..retry import check_seconds

__all__ = ["TimeoutMiddleware"]


class TimeoutMiddleware:
    """Bound the time of each stage with :func:`asyncio.timeout`: all its attempts and sleeps together.

    A stage's own ``timeout`` bounds one attempt. When the time is up, ``TimeoutError`` leaves the
    pipeline as it is, like every error of a middleware.

    Args:
        timeout: seconds, greater than 0.

    Raises:
        TypeError, ValueError: at construction, for a wrong argument.
    """

    def __init__(self, timeout: float) -> None:
        check_seconds("timeout", timeout, zero=False)
        self._timeout = timeout

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        async with asyncio.timeout(self._timeout):
            return await next_stage(value)
