"""The command line: ``async-pipeline run MODULE:PIPELINE`` runs a pipeline over lines of a file or a pipe.

``async-pipeline show MODULE:PIPELINE`` draws one instead, and runs nothing of it;
``async-pipeline journal FILE`` tells what the journal of a run knows.

Nothing here waits for a file in a thread, or blocks the event loop while a pipe is slow: input is read
when it is there, output is written when there is room, so Ctrl-C is heard at once.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ._command import INTERRUPTED, CommandError, Parser, say
from ._journal import add_journal
from ._run import add_run
from ._show import add_show

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 when items failed, 2 on wrong usage, 130 on Ctrl-C.

    Args:
        argv: the arguments; by default those of the process.
    """
    try:
        options = _parser().parse_args(argv)
        code = options.command(options)
    except CommandError as error:
        say(f"async-pipeline: {error}")
        code = error.code
    except KeyboardInterrupt:  # before the event loop runs, or a second one while it stops
        say("async-pipeline: interrupted")
        code = INTERRUPTED
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="async-pipeline",
        description="Run an async_pipeline Pipeline from the shell, or look at it.",
        epilog="'async-pipeline COMMAND --help' says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_run(commands)
    add_show(commands)
    add_journal(commands)
    return parser
