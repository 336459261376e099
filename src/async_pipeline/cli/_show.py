"""``async-pipeline show``: a picture of a pipeline."""

import argparse
import asyncio
import codecs
import contextlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from ..pipeline import Pipeline
from ._command import OK, add_command
from ._files import open_stdout
from ._lines import ReaderGoneError, Writer
from ._target import add_target, load

__all__ = ["add_show"]

_SHOW = """\
Show what a pipeline is made of. The module is imported, and nothing is run.

The formats: a tree for the terminal; a Mermaid flowchart, which GitHub, GitLab
and many editors draw; JSON.
"""

_SHOW_MORE = """\
examples:
  the pipeline that crawl.py calls pages, as a tree

    async-pipeline show crawl:pages

  as a picture for a README, inside a code block of the language mermaid

    async-pipeline show crawl:pages --format mermaid

exit status:
  0    it was shown, or the reader of the output went away
  1    the output can't be written
  2    wrong usage
  130  Ctrl-C
"""


def add_show(commands: Any) -> None:
    show = add_command(
        commands,
        "show",
        _show,
        summary="show a pipeline as a tree, a Mermaid flowchart or JSON",
        usage="MODULE:PIPELINE [options]",
        description=_SHOW,
        epilog=_SHOW_MORE,
    )
    add_target(show)
    show.add_argument("--format", choices=_FORMATS, default="tree", help="tree is the default")


def _show(options: argparse.Namespace) -> int:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    make, encode = _FORMATS[options.format]
    with contextlib.ExitStack() as stack:
        writer = Writer(open_stdout(stack), "output")
        writer.add(encode(make(load(options.target)) + "\n", encoding))
        with contextlib.suppress(ReaderGoneError):
            asyncio.run(writer.flush())
    return OK


def _json(pipeline: Pipeline[Any, Any]) -> str:
    from ..text import describe

    return describe(pipeline)


_PLAIN_LINES = str.maketrans("\u251c\u2500\u2502\u2514", "|-|`")


def _encode_tree(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN_LINES).encode(encoding, "backslashreplace")


def _encoder(escape: Callable[[str], str]) -> Callable[[str, str], bytes]:
    # others read it as UTF-8, so what is written in another encoding must be ASCII
    def encode(text: str, encoding: str) -> bytes:
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        unfit = r"[\ud800-\udfff]" if is_utf8 else r"[^\x00-\x7f]"
        return re.sub(unfit, lambda match: escape(match[0]), text).encode(encoding)

    return encode


_Format = tuple[Callable[[Pipeline[Any, Any]], str], Callable[[str, str], bytes]]
_FORMATS: dict[str, _Format] = {
    "tree": (str, _encode_tree),
    "mermaid": (Pipeline.to_mermaid, _encoder(lambda char: f"#{ord(char)};")),
    "json": (_json, _encoder(lambda char: json.dumps(char)[1:-1])),
}
