"""How far a run is, in one line of the terminal."""

import os
import sys

from ._command import say

__all__ = ["Progress", "clock"]


class Progress:
    """A line at the bottom of a terminal; anywhere else, nothing."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_shown = is_wanted and sys.stderr is not None and sys.stderr.isatty()
        self._width = 0

    def draw(self, text: str) -> None:
        if self._is_shown:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            text = text[: columns - 1]  # a line that wraps can't be drawn over
            say("\r" + text.ljust(self._width), end="")
            self._width = len(text)

    def clear(self) -> None:
        if self._width:
            say("\r" + " " * self._width + "\r", end="")
            self._width = 0

    def finish(self, text: str) -> None:
        if self._is_shown:
            self.clear()
            say(text)


def clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
