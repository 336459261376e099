"""Opening what a command reads and writes."""

import contextlib
import os
import stat
import sys
from io import FileIO
from typing import TextIO

from ._command import CommandError

__all__ = ["check_distinct", "is_regular", "open_input", "open_output", "open_stdout"]


def open_input(stack: contextlib.ExitStack, path: str) -> FileIO:
    try:
        file = FileIO(_fileno(sys.stdin), "r", closefd=False) if path == "-" else FileIO(path, "r")
    except OSError as error:
        raise CommandError(f"the input {path!r} can't be read: {error.strerror or error}") from None
    return stack.enter_context(file)


def open_stdout(stack: contextlib.ExitStack) -> FileIO:
    """Open stdout, and lead what is printed to stderr, lest it mix with the results."""
    try:
        file = stack.enter_context(FileIO(_fileno(sys.stdout), "w", closefd=False))
    except OSError as error:
        raise CommandError(f"the output '-' can't be written: {error.strerror or error}") from None
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
    return file


def _fileno(standard: TextIO | None) -> int:
    if standard is None:  # closed by the shell: <&- or >&-
        raise OSError("it is closed")
    return standard.fileno()


def open_output(stack: contextlib.ExitStack, path: str, name: str) -> FileIO:
    """Open a file to write, as it is: it is emptied when everything is known to be right."""
    if path == "-":
        raise CommandError(
            "--errors takes a file; without it, the end of the run sums the failures up on stderr"
        )
    try:
        return stack.enter_context(FileIO(path, "a"))
    except OSError as error:
        raise CommandError(f"the {name} {path!r} can't be written: {error.strerror}") from None


def check_distinct(*files: tuple[str, FileIO | str | None]) -> None:
    seen: dict[object, str] = {}
    for option, file in files:
        if file is not None:
            other = seen.setdefault(_identity(file), option)
            if other != option:
                raise CommandError(f"{other} and {option} are the same file")


def _identity(file: FileIO | str) -> object:
    """What is equal for two that are the same file; pipes and terminals may be shared."""
    try:
        status = os.stat(file if isinstance(file, str) else file.fileno())
    except OSError:  # there is none yet
        return os.path.realpath(str(file))
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else object()


def is_regular(file: FileIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
