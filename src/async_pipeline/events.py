"""What is observable of a run, and how hooks are called."""

import logging
from collections.abc import Callable
from typing import Any

from .context import wants_context
from .types import is_awaitable

__all__ = ["Hook", "logger"]

logger = logging.getLogger("async_pipeline")


class Hook:
    """A ``before_stage`` or ``after_stage`` function, with its arity decided once.

    Raises:
        TypeError: at construction, when it is not callable or can't be called as ``shape`` says.
    """

    __slots__ = ("_call", "_wants_context")

    def __init__(self, shape: str, function: Callable[..., object]) -> None:
        parameter = shape.partition("(")[0]
        if not callable(function):
            raise TypeError(f"{parameter} must be a callable, not {function!r}")
        try:
            self._wants_context = wants_context(function, shape)
        except TypeError as error:
            raise TypeError(f"{parameter}={function!r} can't be used: {error}") from None
        self._call = function

    def start(self, context: object, *args: Any) -> Any:
        """Call the hook; return an awaitable that the caller has to :meth:`finish`, or None."""
        try:
            result = self._call(*args, context) if self._wants_context else self._call(*args)
        except Exception as error:
            self._report(args[0], error)
            return None
        return result if result is not None and is_awaitable(result) else None

    async def finish(self, stage_name: str, result: Any) -> None:
        """Await what :meth:`start` returned."""
        try:
            await result
        except Exception as error:
            self._report(stage_name, error)

    def _report(self, stage_name: str, error: Exception) -> None:
        logger.error("Hook %r failed at stage %r; the run goes on", self._call, stage_name, exc_info=error)
