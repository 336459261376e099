"""What every command has: its exit codes, its error, its arguments, and a voice on stderr."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["FAILED", "INTERRUPTED", "OK", "CommandError", "Parser", "add_command", "say"]

OK, FAILED, _USAGE, INTERRUPTED = 0, 1, 2, 130


class CommandError(Exception):
    """The command ends here, with one line on stderr and this exit code."""

    def __init__(self, message: str, code: int = _USAGE) -> None:
        super().__init__(message)
        self.code = code


def say(text: str, end: str = "\n") -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # nobody listens: no reason to stop
            sys.stderr.write(text + end)
            sys.stderr.flush()


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong usage with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(
    commands: Any,
    name: str,
    do: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    usage: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """Add a command, for ``do``, which takes its options and returns the exit code."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        usage=f"%(prog)s {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(command=do)
    return command
