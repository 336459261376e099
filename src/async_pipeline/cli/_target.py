"""MODULE:PIPELINE, the argument that says which pipeline is meant."""

import argparse
import importlib
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from ..pipeline import Pipeline
from ..stage import Joinable
from ._command import CommandError, say
from ._failures import SHOWN_MESSAGE, describe_error, one_line

__all__ = ["add_target", "load"]


def add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target",
        metavar="MODULE:PIPELINE",
        help="where the Pipeline is, for example shop.jobs:pipeline; the current folder is importable",
    )


def load(target: str) -> Pipeline[Any, Any]:
    """Import the module and return its pipeline."""
    module_name, _, attribute = target.partition(":")
    if not (all(module_name.split(".")) and all(attribute.split("."))):
        raise CommandError(f"{target!r} must be MODULE:PIPELINE, for example shop.jobs:pipeline")
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    try:
        found = _find(importlib.import_module(module_name), attribute)
    except CommandError:
        raise
    except (Exception, SystemExit) as error:  # a module that ends the process would end it in silence
        raise _import_failure(module_name, attribute, error) from None
    if not isinstance(found, Pipeline):
        raise CommandError(_no_pipeline(target, attribute, found))
    return found


def _find(module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            pipelines = [key for key, value in vars(module).items() if isinstance(value, Pipeline)]
            hint = f"; its pipelines: {', '.join(pipelines)}" if pipelines else ""
            raise CommandError(f"module {module.__name__!r} has no {attribute!r}{hint}") from None
    return found


def _import_failure(module_name: str, attribute: str, error: BaseException) -> CommandError:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{module_name}.".startswith(f"{missing}."):
        hint = ""
        if module_name.endswith(".py"):
            hint = f"; write {module_name.removesuffix('.py').replace('/', '.')}:{attribute}"
        return CommandError(f"there is no module {module_name!r} here or installed{hint}")
    say("".join(traceback.format_exception(error.with_traceback(_own_part(error)))), end="")
    reason = one_line(describe_error(error), SHOWN_MESSAGE)
    return CommandError(f"{module_name!r} can't be imported: {reason}")


_MACHINERY = {"importlib", "_frozen_importlib", "_frozen_importlib_external", "async_pipeline"}


def _own_part(error: BaseException) -> Any:
    """The traceback from the first frame of the user's own code."""
    found = error.__traceback__
    while found and str(found.tb_frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        found = found.tb_next
    return found


def _no_pipeline(target: str, attribute: str, found: object) -> str:
    kind = type(found).__name__
    what = f"{target!r} is {'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}, not a Pipeline"
    name = attribute.rpartition(".")[2]
    if isinstance(found, (list, tuple)):
        return f"{what}: write Pipeline({name})"
    if isinstance(found, Joinable) or (callable(found) and not isinstance(found, type)):
        return f"{what}: write Pipeline([{name}])"
    return what
