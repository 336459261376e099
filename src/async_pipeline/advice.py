"""Answers to calls that Python refuses: which option was meant, or how the call is written."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

__all__ = ["FALLBACK", "MAP", "PIPELINE", "STAGE", "STEP", "STREAM", "advised"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_RETRIES = "retry max_retries num_retries"
_ATTEMPTS = "attempts max_attempts tries max_tries"
_WORKERS = "workers max_workers num_workers limit max_concurrency max_concurrent n jobs n_jobs semaphore"
_OF_A_STAGE = "that is for each stage to say: Stage('fetch', fetch, retries=3, timeout=2.0)"

# what other libraries call an option: what it is called here, or where it belongs
STAGE = {
    _RETRIES: "retries",
    _ATTEMPTS: "write retries=, the number of attempts after the first",
    "func function fn callback": "handler",
    "delay wait sleep interval base_delay retry_interval backoff_factor": "retry_delay",
    "max_wait max_backoff": "max_delay",
    "retry_if retry_for exceptions": "retry_on",
    "limit rate_limit semaphore throttle": "limiter",
    "on_failure on_exception fallback default": "on_error",
    "pool thread threads process": "executor",
    "concurrency workers max_workers max_concurrency": (
        "that is for map, stream or each to say: pipeline.map(items, concurrency=20); "
        "what bounds one stage in all of them is limiter=asyncio.Semaphore(10)"
    ),
    "before_stage after_stage middlewares observers": (
        "that is for a pipeline to say: Pipeline([fetch], before_stage=print)"
    ),
}
PIPELINE = {
    "steps handlers functions tasks": "stages",
    "before on_start": "before_stage",
    "hooks callbacks": "write before_stage=, after_stage= or observers=[...]",
    "after on_end": "after_stage",
    f"{_RETRIES} {_ATTEMPTS} retries retry_delay backoff retry_on limiter executor": _OF_A_STAGE,
    "on_error": "that is a stage's; for all of them write fallback(pipeline, other)",
    "timeout context": "that is for each run to say: pipeline.run(value, timeout=10, context={})",
    f"{_WORKERS} concurrency": "that is for map or stream to say: pipeline.map(items, concurrency=20)",
}
MAP = {
    _WORKERS: "concurrency",
    f"{_RETRIES} {_ATTEMPTS} retries": _OF_A_STAGE,
    "raise_exceptions raise_on_error": "write return_exceptions=True for errors in place of results",
    "ordered": "map always returns the results in the order of the items; stream can do without",
    "buffer": "that is for stream to say; map returns a list of all results",
}
STREAM = {
    _WORKERS: "concurrency",
    f"{_RETRIES} {_ATTEMPTS} retries": _OF_A_STAGE,
    "buffer_size maxsize prefetch": "buffer",
    "return_exceptions": "iterate results.outcomes() instead: they are values and errors",
    "unordered": "write ordered=False",
}
STEP = {
    _WORKERS: "concurrency",
    f"{_RETRIES} {_ATTEMPTS} retries timeout": _OF_A_STAGE,
    "default else_": "otherwise",
}
FALLBACK = {
    "exceptions errors retry_on": "on",
    "default": "a default is one more step: fallback(fetch, lambda value: None)",
}


def advised(right: str, meant: Mapping[str, str] | None = None) -> Callable[[_Function], _Function]:
    """Let a function add to Python's message what to write, where its arguments are not what it takes.

    A misspelt option is answered by the most similar one. Nothing else about the function changes.

    Args:
        right: a call that is right, which is shown when arguments are missing or too many.
        meant: what the option of one of these names (several are parted by blanks) is called here, or a
            sentence about it.
    """

    def decorate(function: Any) -> Any:
        code = function.__code__
        options = code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount]
        takes_any = bool(code.co_flags & inspect.CO_VARKEYWORDS)

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            try:
                return function(*args, **given)
            except TypeError as error:
                # of the call itself; an error of the function's own has passed through a frame of its
                if cast(Any, error.__traceback__).tb_next is None:
                    wrong = next((option for option in given if option not in options), None)
                    if wrong is None or takes_any:
                        raise TypeError(f"{_said(error)}; write {right}") from None
                    raise TypeError(_said(error) + _about(wrong, options, meant or {})) from None
                raise

        return _as_async(function, call) if inspect.iscoroutinefunction(function) else call

    return decorate


def _as_async(function: Any, call: Any) -> Any:
    """Let who asks whether it is async, like ``create_autospec``, get the same answer as of ``function``."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(call)  # which raises when it is called, not when it is awaited

    @functools.wraps(function)
    async def call_and_wait(*args: Any, **given: Any) -> Any:
        return await call(*args, **given)

    return call_and_wait


def _said(error: TypeError) -> str:
    return str(error).partition(". Did you mean")[0]  # newer Pythons guess, too, but by the spelling alone


def _about(wrong: str, options: Sequence[str], meant: Mapping[str, str]) -> str:
    from difflib import get_close_matches

    known = next((answer for names, answer in meant.items() if wrong in names.split()), None)
    if known is not None and known.isidentifier() and known not in options:
        known = None  # of another function that the table is for
    guess = known or next(iter(get_close_matches(wrong, options, 1)), None)
    if guess is None:
        return f"; it takes {', '.join(option for option in options if option != 'self')}"
    return f"; did you mean {guess!r}?" if guess in options else f"; {guess}"
