"""What is told of items that have failed, to programs and to people."""

import re
from typing import Any

from ..errors import RecordedError, StageExecutionError
from ..records import text_of
from ._command import say
from ._lines import Line, LineError

__all__ = ["SHOWN_ITEM", "SHOWN_MESSAGE", "Summary", "describe_error", "failure_of", "one_line"]

_SHOWN_FAILURES = 10
SHOWN_ITEM, SHOWN_MESSAGE = 60, 160  # characters of each in the summary


def failure_of(item: Any, index: int | None, error: BaseException | None) -> dict[str, Any]:
    stage = None
    if isinstance(error, StageExecutionError):
        stage, error = error.stage_name, error.original_error
    return {"item": item, "index": index, "stage": stage, "message": describe_error(error)}


def describe_error(error: BaseException | None) -> str:
    if isinstance(error, RecordedError):  # as it was described when it was raised
        name = re.split("[.:]", error.type)[-1]
        return f"{name}: {error.message}" if error.message else name
    name, text = type(error).__name__, text_of(error)
    if isinstance(error, LineError):
        return text
    return f"{name}: {text}" if text else name


def one_line(text: str, limit: int) -> str:
    """Shorten, and show what could move the cursor as an escape."""
    shown = text if len(text) <= limit else text[:limit] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


class Summary:
    """The first failures, for people."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def add(self, failure: dict[str, Any], line: Line) -> None:
        if len(self._shown) < _SHOWN_FAILURES:
            where = "" if failure["stage"] is None else f"stage {failure['stage']!r}: "
            what = one_line(where + failure["message"], SHOWN_MESSAGE)
            item = one_line(line.escaped(), SHOWN_ITEM)
            self._shown.append(f"  item {failure['index']}: {what} (item: {item})\n")

    def say(self, failed: int, done: int) -> None:
        left = failed - len(self._shown)
        more = f"  and {left:,} more; --errors FILE keeps them all\n" if left else ""
        items = "item" if done == 1 else "items"
        say(f"async-pipeline: {failed:,} of {done:,} {items} failed\n{''.join(self._shown)}{more}", end="")
