"""Calling a sync handler off the event loop: in a thread, a process, or an interpreter of its own."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["check_executor", "shares_memory", "submit"]


def check_executor(executor: object) -> None:
    """Raise for anything that is neither None nor ``"thread"`` nor an Executor."""
    expected = 'executor must be "thread" or a concurrent.futures.Executor'
    if isinstance(executor, str):
        if executor != "thread":
            raise ValueError(f"{expected}, not {executor!r}")
    elif isinstance(executor, type) and issubclass(executor, Executor):
        raise TypeError(f"{expected}, not the class: write {executor.__name__}()")
    elif not (executor is None or isinstance(executor, Executor)):
        raise TypeError(f"{expected}, not {executor!r}")


def shares_memory(executor: object) -> bool:
    """Tell whether calls run in this process and interpreter; an Executor that is not known may."""
    for module, name in (("process", "ProcessPoolExecutor"), ("interpreter", "InterpreterPoolExecutor")):
        # it can't be one of these if nobody has imported them yet, which is slow
        loaded = sys.modules.get(f"concurrent.futures.{module}")
        if loaded is not None and isinstance(executor, getattr(loaded, name)):
            return False
    return True


def submit(executor: Any, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """Call ``function`` in the executor; into a thread go the context variables, too."""
    loop = asyncio.get_running_loop()
    if executor == "thread":
        return loop.run_in_executor(None, copy_context().run, _call, function, *args)
    if isinstance(executor, ThreadPoolExecutor) and shares_memory(executor):
        return loop.run_in_executor(executor, copy_context().run, _call, function, *args)
    return loop.run_in_executor(executor, _call, _portable(function), *args)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    try:
        result = function(*args)
    except (StopIteration, CancelledError) as error:
        # a future does not take the first, and who awaits it would wait for ever; it takes the other, which
        # concurrent.futures raises and which is an Exception, for a cancellation
        raise RuntimeError(f"{function!r} raised {type(error).__name__}") from error
    if isinstance(result, Coroutine):
        result.close()  # nobody would await it if the call has been abandoned
        raise TypeError(f"executor= is for sync handlers, but {function!r} returned a coroutine")
    return result


def _portable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or where it pickles by name and ``@staged`` has put the Stage there, a way to find it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    stage = _find(sys.modules.get(module or ""), name or "")
    return _HandlerOf(module, name) if getattr(stage, "handler", None) is function else function


@dataclass(frozen=True)
class _HandlerOf:
    module: Any
    stage: Any

    def __call__(self, *args: Any) -> Any:
        return _find(import_module(self.module), self.stage).handler(*args)


def _find(module: object, name: str) -> Any:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
