"""A stage: a handler with its own timeout and retries."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from inspect import iscoroutinefunction
from typing import Any, Generic, Self, TypedDict, Unpack, cast, overload

from .context import wants_context
from .errors import StageExecutionError, StageTimeoutError
from .retry import BackoffMode, RetryPolicy, check_backoff, check_count, check_seconds
from .types import Handler, In, Out, is_awaitable

__all__ = ["BackoffMode", "Stage", "StageOptions", "staged"]


# The async form is tried first; an async handler fits the other one too, with the same Out. If it were
# another one there, mypy would call every handler with an Any in its signature a Stage[Any, Any].
_Async = Callable[[In], Awaitable[Out]] | Callable[[In, Any], Awaitable[Out]]
_Sync = Callable[[In], Awaitable[Out] | Out] | Callable[[In, Any], Awaitable[Out] | Out]


class StageOptions(TypedDict, total=False):
    """The keyword arguments of a :class:`Stage`."""

    timeout: float | None
    retries: int
    retry_delay: float
    backoff: BackoffMode | str
    pass_context: bool | None


class Stage(Generic[In, Out]):
    """A named handler with its own timeout and retries; one link of a :class:`~async_pipeline.Pipeline`.

    >>> fetch = Stage("fetch", download, timeout=2.0, retries=3, retry_delay=0.5, backoff="exponential")
    >>> page = await fetch.run("https://example.org")

    A stage is immutable, holds no state of a run, and may be used by any number of pipelines and event
    loops at once. A subclass may have a ``run`` of its own; pipelines then call that.

    Args:
        name: what errors, hooks and middlewares call the stage.
        handler: a sync or async callable ``(value)`` or ``(value, context)``; what it returns is awaited
            if it can be. Its second positional parameter receives the context when it has no default or
            is named ``context`` or ``ctx``; ``*args`` receives it too. Classes and C callables get the
            value only.
        timeout: seconds for each attempt; ``None`` (the default) for no limit. It covers waiting for the
            handler's awaitable, so it has no effect on a handler that blocks the event loop. A handler
            that returns a value in spite of it has returned a value.
        retries: attempts after the first one; 0 by default. ``CancelledError`` is never retried.
        retry_delay: seconds before a retry; 0 (the default) retries at once.
        backoff: ``"fixed"`` (the default): each delay is ``retry_delay``; ``"exponential"``: the n-th is
            ``retry_delay * 2 ** (n - 1)``.
        pass_context: decide by hand whether the handler gets the context: ``True`` or ``False``.

    Raises:
        TypeError: an argument of the wrong type, or a handler that takes neither form.
        ValueError: an argument that is negative, not a number, infinite, or a bool.
    """

    __slots__ = (
        "_is_async",
        "_wants_context",
        "backoff",
        "handler",
        "name",
        "pass_context",
        "retries",
        "retry_delay",
        "timeout",
    )

    name: str
    handler: Callable[..., Any]
    timeout: float | None
    retries: int
    retry_delay: float
    backoff: BackoffMode | str
    pass_context: bool | None

    @overload
    def __init__(self, name: str, handler: _Async[In, Out], **options: Unpack[StageOptions]) -> None: ...
    @overload
    def __init__(self, name: str, handler: _Sync[In, Out], **options: Unpack[StageOptions]) -> None: ...
    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        timeout: float | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        backoff: BackoffMode | str = "fixed",
        pass_context: bool | None = None,
    ) -> None:
        _check_name(name)
        _check_handler(name, handler)
        if timeout is not None:
            check_seconds("timeout", timeout, zero=False)
        check_count("retries", retries, least=0, message="retries must be greater than or equal to 0")
        check_seconds("retry_delay", retry_delay, zero=True)
        check_backoff(backoff)
        self.name = name
        self.handler = handler
        self.timeout = timeout
        self.retries = retries
        self.retry_delay = retry_delay
        self.backoff = backoff
        self.pass_context = pass_context
        self._wants_context = _decide_context(handler, pass_context)
        self._is_async = iscoroutinefunction(handler)

    def __setattr__(self, attribute: str, value: object) -> None:
        # a subclass may set what it likes, as in 1.x; its run goes by what the attributes say then
        if type(self) is Stage and hasattr(self, attribute):
            raise AttributeError(
                f"a Stage is immutable; for another one write stage.replace({attribute}={value!r})"
            )
        super().__setattr__(attribute, value)

    def __delattr__(self, attribute: str) -> None:
        if type(self) is Stage:
            raise AttributeError(f"a Stage is immutable; {attribute!r} can't be deleted")
        super().__delattr__(attribute)

    async def run(self, value: In, *, context: Any = None) -> Out:
        """Run the handler on one value, with the stage's timeout and retries.

        Args:
            value: the input.
            context: the object that a handler ``(value, context)`` receives; a new dict by default.

        Returns:
            What the handler returned.

        Raises:
            StageExecutionError: no attempt succeeded; ``original_error`` is the last one's error, a
                :class:`~async_pipeline.StageTimeoutError` when its time ran out.
        """
        return cast(Out, await self._run(value, {} if context is None else context))

    async def _run(self, value: Any, context: Any) -> Any:
        attempt = 1
        while True:
            try:
                return await self._attempt(value, context)
            except Exception as error:
                failure = error
            # outside the except, so that a cancelled sleep does not carry the failure as its context
            delay = RetryPolicy(self.retries, self.retry_delay, self.backoff).next_delay(attempt)
            if delay is None:
                break
            if delay > 0:
                await asyncio.sleep(delay)
            attempt += 1
        try:
            raise StageExecutionError(self.name, failure, attempts=attempt) from failure
        finally:
            del failure  # its traceback holds this frame

    async def _attempt(self, value: Any, context: Any) -> Any:
        result = self.handler(value, context) if self._wants_context else self.handler(value)
        if not self._is_async and not is_awaitable(result):
            return result
        if self.timeout is None:
            return await result
        was_cancelled = False
        try:
            async with asyncio.timeout(self.timeout) as scope:
                try:
                    return await result
                except asyncio.CancelledError:
                    was_cancelled = True  # early releases of 3.11 give their TimeoutError no cause
                    raise
        except TimeoutError as error:
            # async with asyncio.timeout(1): ... inside the handler raises TimeoutError too, but not ours
            if scope.expired() and (was_cancelled or isinstance(error.__cause__, asyncio.CancelledError)):
                raise StageTimeoutError(self.timeout) from error
            raise

    def replace(self, **options: Any) -> Self:
        """Return a stage like this one with other options, ``name`` or ``handler``.

        >>> quick = fetch.replace(retry_delay=0)  # in tests

        A subclass whose constructor takes other arguments overrides this.
        """
        own = {option: getattr(self, option) for option in ("name", "handler", *StageOptions.__annotations__)}
        constructor: Any = type(self)
        return cast(Self, constructor(**own | options))

    def __repr__(self) -> str:
        options = "".join(
            f", {option}={value!r}"
            for option, default in _DEFAULTS.items()
            if (value := getattr(self, option, default)) != default
        )
        return f"{type(self).__name__}({getattr(self, 'name', None)!r}{options})"


_DEFAULTS: dict[str, Any] = Stage.__init__.__kwdefaults__ or {}


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {name!r}; write Stage('fetch', fetch)")


def _check_handler(name: str, handler: object) -> None:
    if isinstance(handler, Coroutine):
        handler.close()  # or Python would also warn that it was never awaited
        raise TypeError(
            f"handler must be a callable, not the coroutine object that calling it gave: "
            f"write Stage({name!r}, {callable_name(handler)}), without ()"
        )
    if not callable(handler):
        raise TypeError(f"handler must be a callable (value) or (value, context), not {handler!r}")


def _decide_context(handler: Handler, pass_context: bool | None) -> bool:
    if pass_context is None:
        try:
            return wants_context(handler, "handler(value)")
        except TypeError as error:
            raise TypeError(f"handler {handler!r} can't be used: {error}") from None
    if not isinstance(pass_context, bool):
        raise TypeError(f"pass_context must be True, False or None, not {pass_context!r}")
    return pass_context


@overload
def staged(handler: _Async[In, Out], /) -> Stage[In, Out]: ...
@overload
def staged(handler: _Sync[In, Out], /) -> Stage[In, Out]: ...
@overload
def staged(*, name: str | None = None, **options: Unpack[StageOptions]) -> "_Staged": ...
def staged(handler: Any = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a function a :class:`Stage` of the same name; with or without options.

    >>> @staged(timeout=2.0, retries=3, backoff="exponential")
    ... async def fetch(url: str) -> bytes: ...

    ``fetch`` is then a ``Stage[str, bytes]``, and the function is ``fetch.handler``.

    Args:
        name: the stage's name; by default the function's.
        options: those of :class:`Stage`.

    Raises:
        TypeError, ValueError: as :class:`Stage` does.
    """
    decorate = _Staged(name, options)
    return decorate if handler is None else decorate(handler)


class _Staged:
    """The decorator that :func:`staged` returns when it is given options."""

    def __init__(self, name: str | None, options: Any) -> None:
        self._name = name
        self._options = options

    @overload
    def __call__(self, handler: _Async[In, Out], /) -> Stage[In, Out]: ...
    @overload
    def __call__(self, handler: _Sync[In, Out], /) -> Stage[In, Out]: ...
    def __call__(self, handler: Any, /) -> Any:
        return Stage(callable_name(handler) if self._name is None else self._name, handler, **self._options)


def callable_name(function: Any) -> str:
    """Return a callable's ``__name__``; of a partial the function's, of an object its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
