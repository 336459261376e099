"""What is observable of a run, and how hooks are called."""

import logging
from collections.abc import Callable
from typing import Any

from .context import wants_context
from .types import is_awaitable

__all__ = ["Hook", "check_hook", "fire", "logger", "report"]

logger: logging.Logger = logging.getLogger("async_pipeline")

Hook = tuple[Callable[..., Any] | None, bool]
"""A hook, or None, and whether it wants the context."""


def check_hook(shape: str, function: Callable[..., Any] | None) -> Hook:
    """Decide once whether a hook gets the context; ``shape`` is how it is called without.

    Raises:
        TypeError: it is not callable, or can't be called as ``shape`` says, with or without the context.
    """
    parameter = shape.partition("(")[0]
    if function is None:
        return None, False
    if not callable(function):
        raise TypeError(f"{parameter} must be a callable, not {function!r}")
    try:
        return function, wants_context(function, shape)
    except TypeError as error:
        raise TypeError(f"{parameter}={function!r} can't be used: {error}") from None


async def fire(hook: Hook, context: object, stage_name: str, *args: Any) -> None:
    """Call a hook if there is one, await what it returns if that is awaitable, and log its exception."""
    function, wants = hook
    if function is None:
        return
    try:
        result = function(stage_name, *args, *((context,) if wants else ()))
        if result is not None and is_awaitable(result):
            await result
    except Exception as error:
        report(function, stage_name, error)


def report(hook: Callable[..., Any], stage_name: str, error: Exception) -> None:
    """Log an exception of a hook, with its traceback."""
    logger.error("Hook %r failed at stage %r; the run goes on", hook, stage_name, exc_info=error)
