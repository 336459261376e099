"""Log each stage's start and end."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import Finish

__all__ = ["LoggingMiddleware"]


class LoggingMiddleware:
    """Log when a stage starts, finishes and fails; its errors pass unchanged.

    A failure is logged at ERROR with its traceback, the other two at ``level``. A stage that raises
    :class:`~async_pipeline.Finish` has finished, with its value as output.

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
        self._logger.log(self._level, *self._record("Starting stage: %s", stage_name, " input=%r", value))
        try:
            output = await next_stage(value)
        except Finish as finish:
            self._log_end(stage_name, finish.value)
            raise
        except Exception:
            self._logger.exception(*self._record("Stage failed: %s", stage_name, " input=%r", value))
            raise
        self._log_end(stage_name, output)
        return output

    def _log_end(self, stage_name: str, output: Any) -> None:
        self._logger.log(self._level, *self._record("Finished stage: %s", stage_name, " output=%r", output))

    def _record(self, text: str, stage_name: str, value_text: str, value: Any) -> tuple[Any, ...]:
        return (text + value_text, stage_name, value) if self._include_value else (text, stage_name)
