"""What is observable of a run, and how hooks are called."""

import logging
from collections.abc import Callable
from typing import Any

from .context import wants_context
from .types import is_awaitable

__all__ = ["Hook", "logger"]

logger: logging.Logger = logging.getLogger("async_pipeline")


class Hook:
    """A ``before_stage`` or ``after_stage`` function, with its arity decided once.

    Raises:
        TypeError: at construction, when it is not callable or can't be called as ``shape`` says.
    """

    __slots__ = ("call", "wants_context")

    call: Callable[..., Any]
    wants_context: bool

    def __init__(self, shape: str, function: Callable[..., Any]) -> None:
        parameter = shape.partition("(")[0]
        if not callable(function):
            raise TypeError(f"{parameter} must be a callable, not {function!r}")
        try:
            self.wants_context = wants_context(function, shape)
        except TypeError as error:
            raise TypeError(f"{parameter}={function!r} can't be used: {error}") from None
        self.call = function

    async def fire(self, context: object, stage_name: str, *args: Any) -> None:
        """Call the hook, and await what it returns if that is awaitable; log an exception."""
        try:
            result = self.call(stage_name, *args, *((context,) if self.wants_context else ()))
            if result is not None and is_awaitable(result):
                await result
        except Exception as error:
            self.report(stage_name, error)

    def report(self, stage_name: str, error: Exception) -> None:
        """Log an exception of the hook, with its traceback."""
        logger.error("Hook %r failed at stage %r; the run goes on", self.call, stage_name, exc_info=error)
