"""Log each stage's start and end."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["LoggingMiddleware"]


class LoggingMiddleware:
    """Log when a stage starts, finishes and fails; its errors pass unchanged.

    A failure is logged at ERROR with its traceback, the other two at ``level``.

    Args:
        logger: where to log; by default the logger ``async_pipeline``.
        level: the level of the routine records; by default ``logging.INFO``.
        include_value: append the stage's input and output, as their ``repr``. Off by default, because
            values may be large or private.
    """

    def __init__(
        self, logger: logging.Logger | None = None, level: int = logging.INFO, *, include_value: bool = False
    ) -> None:
        self._logger = logging.getLogger("async_pipeline") if logger is None else logger
        self._level = level
        self._include_value = include_value

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        self._log(self._level, "Starting stage: %s", stage_name, " input=%r", value)
        try:
            output = await next_stage(value)
        except Exception:
            self._log(logging.ERROR, "Stage failed: %s", stage_name, " input=%r", value, exc_info=True)
            raise
        self._log(self._level, "Finished stage: %s", stage_name, " output=%r", output)
        return output

    def _log(
        self, level: int, text: str, stage_name: str, value_text: str, value: Any, *, exc_info: bool = False
    ) -> None:
        if self._include_value:
            self._logger.log(level, text + value_text, stage_name, value, exc_info=exc_info)
        else:
            self._logger.log(level, text, stage_name, exc_info=exc_info)
