"""A stage: a handler with its own timeout and retries; and the deadline of a whole run."""

import asyncio
import functools
import math
import sys
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import BrokenExecutor, Executor
from contextlib import AbstractAsyncContextManager, _AsyncGeneratorContextManager
from inspect import iscoroutinefunction
from itertools import chain
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack, cast, overload

from .advice import STAGE, advised
from .context import check_own_arguments, wants_context
from .errors import (
    DeadlineExceeded,
    Finish,
    StageExecutionError,
    StageTimeoutError,
    behind,
    cancelled_in,
    finish_of,
    is_finish,
    mark_cancelled,
)
from .events import CountedStart, EndEvent, Event, FailedAttempt, OutcomeName, Watch, check_hook, logger
from .executor import check_executor, shares_memory, submit
from .retry import (
    BackoffMode,
    RetryBudget,
    RetryOn,
    RetryPolicy,
    check_backoff,
    check_count,
    check_fraction,
    check_retry_on,
    check_seconds,
)
from .types import NEVER_AWAITABLE, Handler, In, OnError, Out, Step, Structure, is_awaitable, structure_of

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .steps import Require

__all__ = [
    "BackoffMode",
    "Call",
    "Joinable",
    "RunState",
    "Stage",
    "StageOptions",
    "WatchedStep",
    "as_step",
    "call_of",
    "cancel_requests",
    "is_step",
    "is_watched",
    "outcome_of",
    "raise_cancellation",
    "staged",
    "was_cancelled",
    "watched",
]


# The async form is tried first; an async handler fits the other one too, with the same Out. If it were
# another one there, mypy would call every handler with an Any in its signature a Stage[Any, Any].
_Async = Callable[[In], Awaitable[Out]] | Callable[[In, Any], Awaitable[Out]]
_Sync = Callable[[In], Awaitable[Out] | Out] | Callable[[In, Any], Awaitable[Out] | Out]

Call = Callable[..., Coroutine[Any, Any, Any]]
"""``(value, context, state=None)``; how a step is run inside a run, whose ``Finish`` passes through it."""

_First = TypeVar("_First")
_Last = TypeVar("_Last")


class Joinable(Generic[In, Out]):
    """What stages, pipelines and the steps of :mod:`async_pipeline.steps` share: they join with ``|``.

    >>> fetch | parse                              # Pipeline([fetch, parse])
    >>> fetch | len, str.split | fetch             # a plain callable on one side becomes a Stage
    """

    __slots__ = ()

    @overload
    def __or__(self, after: "Require", /) -> "Pipeline[In, Out]": ...
    @overload
    def __or__(self, after: Step[Out, _Last], /) -> "Pipeline[In, _Last]": ...
    @overload
    def __or__(self, after: _Async[Out, _Last], /) -> "Pipeline[In, _Last]": ...
    @overload
    def __or__(self, after: _Sync[Out, _Last], /) -> "Pipeline[In, _Last]": ...
    def __or__(self, after: Any, /) -> Any:
        """Return a :class:`~async_pipeline.Pipeline` of this step and the one after it."""
        return _join(self, after)

    @overload
    def __ror__(self, before: Step[_First, In], /) -> "Pipeline[_First, Out]": ...
    @overload
    def __ror__(
        self, before: Callable[[_First], Awaitable[In]] | Callable[[_First, Any], Awaitable[In]], /
    ) -> "Pipeline[_First, Out]": ...
    @overload
    def __ror__(
        self, before: Callable[[_First], In] | Callable[[_First, Any], In], /
    ) -> "Pipeline[_First, Out]": ...
    def __ror__(self, before: Any, /) -> Any:
        """Return a :class:`~async_pipeline.Pipeline` of the step before this one, and this one."""
        return _join(before, self)

    def _call(self) -> Call:
        """How to run it inside a run, see :func:`call_of`."""
        return _own_run(self)


def _join(before: Any, after: Any) -> Any:
    from .pipeline import Pipeline

    if not (_may_be_step(before) and _may_be_step(after)):
        return NotImplemented
    # what has hooks, middlewares or observers of its own keeps them, as a step
    flat = (step.stages if type(step) is Pipeline and step._is_plain else (step,) for step in (before, after))
    return Pipeline([*chain.from_iterable(flat)])


def is_step(step: object) -> bool:
    """Tell whether it has what a pipeline needs of a step: a name, and a way to run it."""
    has_both = isinstance(getattr(step, "name", None), str) and callable(getattr(step, "run", None))
    return has_both and not isinstance(step, type)


def _may_be_step(step: object) -> bool:
    # a coroutine is none, but a Stage says why
    return is_step(step) or callable(step) or isinstance(step, Coroutine)


def as_step(step: Any, message: str, name: str | None = None) -> Step[Any, Any]:
    """Return a step as it is, or a :class:`Stage` of a callable, named after it unless ``name`` is given.

    Raises:
        TypeError: it is neither; ``message`` says what is expected.
    """
    if is_step(step):
        return cast("Step[Any, Any]", step)
    if _may_be_step(step):
        return Stage(callable_name(step) if name is None else name, step)
    is_named = isinstance(step, tuple) and len(step) == 2 and isinstance(step[0], str)
    raise TypeError(f"{message}, not {step!r}" + (f"; write Stage({step[0]!r}, ...)" if is_named else ""))


def call_of(step: Any) -> Call:
    """Return how to run a step inside a run: errors begin with its name, a ``Finish`` passes through."""
    if type(step) is Stage:
        return step._once if step._is_plain else step._run
    return step._call() if isinstance(step, Joinable) else _own_run(step)


def is_watched(*steps: Any) -> bool:
    """Tell whether one of the steps is a pipeline with observers, or has one inside."""
    return any(getattr(step, "_is_watched", False) is True for step in steps)


def _own_run(step: Any) -> Call:
    def call(value: Any, context: Any, state: "RunState | None" = None) -> Any:
        run = step.run
        if getattr(run, "__func__", None) is Stage.run:  # of a subclass that has none of its own
            return step._run(value, context, state)
        return run(value, context=context)

    return call


class StageOptions(TypedDict, total=False):
    """The keyword arguments of a :class:`Stage`."""

    timeout: float | None
    retries: int
    retry_delay: float
    backoff: BackoffMode | str
    max_delay: float | None
    jitter: float
    retry_on: RetryOn
    executor: Executor | Literal["thread"] | None
    limiter: AbstractAsyncContextManager[Any, Any] | None
    on_error: OnError | None
    pass_context: bool | None
    retry_budget: RetryBudget | None


class Stage(Joinable[In, Out]):
    """A named handler with its own timeout and retries; one link of a :class:`~async_pipeline.Pipeline`.

    >>> fetch = Stage("fetch", download, timeout=2.0, retries=3, retry_delay=0.5, backoff="exponential")
    >>> page = await fetch.run("https://example.org")

    A stage is immutable, holds no state of a run, and may be used by any number of pipelines and event
    loops at once. Its arguments can be read as attributes. With ``|`` it joins others into a pipeline. A
    subclass may have a ``run`` of its own; pipelines then call that.

    Args:
        name: what errors, hooks and middlewares call the stage.
        handler: a sync or async callable ``(value)`` or ``(value, context)``; what it returns is awaited
            if it can be. Its second positional parameter receives the context when it has no default or
            is named ``context`` or ``ctx``; ``*args`` receives it too. Classes and C callables get the
            value only.
        timeout: seconds for each attempt; ``None`` (the default) for no limit. It covers waiting for the
            handler's awaitable, so it has no effect on a handler that blocks the event loop, unless that
            one has an ``executor``. A handler that returns a value in spite of it has returned a value.
        retries: attempts after the first one; 0 by default.
        retry_delay: seconds before a retry; 0 (the default) retries at once.
        backoff: ``"fixed"`` (the default): each delay is ``retry_delay``; ``"exponential"``: the n-th is
            ``retry_delay * 2 ** (n - 1)``.
        max_delay: the most seconds that a delay grows to; ``None`` (the default) for no cap.
        jitter: the part of each delay that is random, from 0 (the default) for exact delays to 1: a delay
            ``d`` becomes ``d * (1 - jitter * U)``, ``U`` uniform in [0, 1). 1 is the AWS Architecture
            Blog's full jitter, 0.5 its equal jitter.
        retry_on: which errors are tried again: an exception type (``Exception`` by default), a tuple of
            them, or a predicate ``error -> bool | float``. A number that it answers is the exact delay in
            seconds, a server's ``Retry-After`` for example; neither ``max_delay`` nor ``jitter`` changes
            it. Of an ``ExceptionGroup`` every leaf has to match, and the longest delay counts. A
            predicate that raises is logged, and there is no retry. What is no ``Exception``, a
            cancellation first of all, is never retried, nor is a broken ``executor``.
        executor: where a sync handler runs: ``None`` (the default) on the event loop, ``"thread"`` in the
            loop's default pool of threads, or in any :class:`concurrent.futures.Executor`. Threads get a
            copy of the context variables; processes and interpreters get none, and no context. Waiting
            for a free worker counts towards ``timeout``. A call whose time is up, or that is cancelled, is
            abandoned, not killed: it goes on in its worker, its result is dropped, and ``asyncio.run`` waits
            for its thread before it returns.
        limiter: an async context manager entered around each attempt and shared by whoever is given it: an
            ``asyncio.Semaphore``, an ``aiolimiter.AsyncLimiter``, one of your own. Waiting to enter it does
            not count towards ``timeout``. One semaphore as ``limiter`` and as ``concurrency`` of a batch, or
            as ``limiter`` of a stage that a handler runs under it, can deadlock.
        on_error: a sync or async ``(value, error)`` or ``(value, error, context)``, called on the event
            loop after the last attempt with the handler's own last error. What it returns stands in for the
            stage's output; what it raises becomes the stage's error, chained to the first.
        pass_context: decide by hand whether the handler gets the context: ``True`` or ``False``.
        retry_budget: a :class:`~async_pipeline.RetryBudget`, which bounds the retries of all who share it.

    Raises:
        TypeError: an argument of the wrong type, a handler that takes neither form, or one that can't run
            in the ``executor``: an async one, or one that wants the context in another process.
        ValueError: an argument that is negative, not a number, infinite, or a bool.
    """

    __slots__ = (
        "_is_async",
        "_on_error_wants_context",
        "_wants_context",
        "backoff",
        "executor",
        "handler",
        "jitter",
        "limiter",
        "max_delay",
        "name",
        "on_error",
        "pass_context",
        "retries",
        "retry_budget",
        "retry_delay",
        "retry_on",
        "timeout",
    )

    name: str
    handler: Callable[..., Any]
    timeout: float | None
    retries: int
    retry_delay: float
    backoff: BackoffMode | str
    max_delay: float | None
    jitter: float
    retry_on: RetryOn
    executor: Executor | Literal["thread"] | None
    limiter: AbstractAsyncContextManager[Any, Any] | None
    on_error: OnError | None
    pass_context: bool | None
    retry_budget: RetryBudget | None

    @overload
    def __init__(self, name: str, handler: _Async[In, Out], **options: Unpack[StageOptions]) -> None: ...
    @overload
    def __init__(self, name: str, handler: _Sync[In, Out], **options: Unpack[StageOptions]) -> None: ...
    @advised("Stage('fetch', fetch, timeout=2.0)", STAGE)
    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        timeout: float | None = None,
        retries: int = 0,
        retry_delay: float = 0.0,
        backoff: BackoffMode | str = "fixed",
        max_delay: float | None = None,
        jitter: float = 0.0,
        retry_on: RetryOn = Exception,
        executor: Executor | Literal["thread"] | None = None,
        limiter: AbstractAsyncContextManager[Any, Any] | None = None,
        on_error: OnError | None = None,
        pass_context: bool | None = None,
        retry_budget: RetryBudget | None = None,
    ) -> None:
        _check_name(name)
        _check_handler(name, handler)
        self.name = name
        self.handler = handler
        self.timeout = timeout
        self.retries = retries
        self.retry_delay = retry_delay
        self.backoff = backoff
        self.max_delay = max_delay
        self.jitter = jitter
        self.retry_on = retry_on
        self.executor = executor
        self.limiter = limiter
        self.on_error = on_error
        self.pass_context = pass_context
        self.retry_budget = retry_budget
        _check_times(self)
        _check_surroundings(self)
        _, self._on_error_wants_context = check_hook("on_error(value, error)", on_error)
        self._wants_context = _decide_context(handler, pass_context)
        self._is_async = iscoroutinefunction(handler)
        if executor is not None:
            _check_off_loop(self)

    def __setattr__(self, attribute: str, value: object) -> None:
        # a subclass may set what it likes, as in 1.x; its run goes by what the attributes say then (only how
        # a handler and an on_error are called stays decided)
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
            What the handler returned, or the value of its :class:`~async_pipeline.Finish`, or what
            ``on_error`` returned.

        Raises:
            StageExecutionError: no attempt succeeded; ``original_error`` is the last one's error, a
                :class:`~async_pipeline.StageTimeoutError` when its time ran out.
        """
        try:
            return cast(Out, await self._run(value, {} if context is None else context))
        except Finish as finish:
            return cast(Out, finish.value)

    @property
    def _is_plain(self) -> bool:
        """Whether to call the handler once is all that there is to it."""
        return self._is_once and self.limiter is None and self.timeout is None and self.executor is None

    @property
    def _is_once(self) -> bool:
        """Whether one attempt is all that there is to it."""
        return self.retries == 0 and self.retry_budget is None and self.on_error is None

    async def _once(self, value: Any, context: Any, state: "RunState | None" = None) -> Any:
        """What ``_run`` does, for a plain stage: measured, 0.35 µs instead of 1.35."""
        try:
            result = self.handler(value, context) if self._wants_context else self.handler(value)
            return await result if self._is_async or is_awaitable(result) else result
        except Exception as error:
            if state is not None:
                state.tell_failure(state.path, 1, error, None)
            raise StageExecutionError(self.name, error) from error
        except asyncio.CancelledError as error:
            mark_cancelled(error, self.name)
            raise
        except BaseExceptionGroup as group:
            if not is_finish(group):
                raise
            raise finish_of(group) from None

    async def _run(self, value: Any, context: Any, state: "RunState | None" = None) -> Any:
        attempt, budget, requests = 1, self.retry_budget, cancel_requests()
        if state is not None:
            state.handled = None
        try:
            while True:
                try:
                    output = await (self._attempt if self.limiter is None else self._limited)(value, context)
                except Exception as error:
                    # try: ... except asyncio.CancelledError: raise MyError - nothing is begun after that
                    is_over = (state is not None and state.is_over()) or was_cancelled(error, requests)
                    delay = None if is_over else self._delay_after(attempt, error, state)
                    if state is not None:
                        state.tell_failure(state.path, attempt, error, delay)
                    if delay is None and (is_over or self.on_error is None):
                        raise StageExecutionError(self.name, error, attempts=attempt) from error
                    if delay is None:
                        return await self._stand_in(value, context, error, attempt, state)
                except (Finish, BaseExceptionGroup) as ended:
                    if not is_finish(ended):
                        raise
                    if budget is not None:
                        budget.record_success()
                    raise finish_of(ended) from None
                else:
                    if budget is not None:
                        budget.record_success()
                    return output
                # outside the except, so that a cancelled sleep does not carry the failure as its context
                logger.debug("Attempt %d of stage %r failed; the next in %g s", attempt, self.name, delay)
                if delay > 0:
                    await asyncio.sleep(delay)
                attempt += 1
        except asyncio.CancelledError as error:
            mark_cancelled(error, self.name, attempt)
            raise
        finally:
            if state is not None:
                state.attempts = attempt

    def _delay_after(self, attempt: int, error: Exception, state: "RunState | None") -> float | None:
        """Seconds until the next attempt, or None if there is none."""
        if self.executor is not None and isinstance(error, BrokenExecutor):
            return None  # it stays broken
        policy = RetryPolicy(
            self.retries,
            self.retry_delay,
            self.backoff,
            self.max_delay,
            self.jitter,
            self.retry_on,
            self.retry_budget,
        )
        elapsed, timeout = 0.0, math.inf
        if state is not None:
            elapsed, timeout = state.deadline.elapsed(), state.deadline.timeout
        try:
            return policy.next_delay(attempt, error, elapsed, timeout)
        except Exception as broken:
            logger.error(
                "retry_on=%r failed at stage %r; no retry", self.retry_on, self.name, exc_info=broken
            )
            return None

    async def _stand_in(
        self, value: Any, context: Any, error: Exception, attempts: int, state: "RunState | None"
    ) -> Any:
        """What ``on_error`` makes of the last error, which is being handled: so what it raises is chained."""
        rest = (context,) if self._on_error_wants_context else ()
        try:
            result = cast(Any, self.on_error)(value, error, *rest)
            output = await result if is_awaitable(result) else result
            if state is not None and state.watches:
                state.handled = error
            return output
        except Exception as second:
            raise StageExecutionError(self.name, second, attempts=attempts) from second
        finally:
            del error  # its traceback may hold this frame

    async def _limited(self, value: Any, context: Any) -> Any:
        async with cast(Any, self.limiter):
            return await self._attempt(value, context)
        raise RuntimeError(f"the limiter {self.limiter!r} suppressed an error of stage {self.name!r}")

    async def _attempt(self, value: Any, context: Any) -> Any:
        if self.executor is not None:
            result: Any = self._off_loop(value, context)
        else:
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

    async def _off_loop(self, value: Any, context: Any) -> Any:
        arguments = (value, context) if self._wants_context else (value,)
        result = await submit(self.executor, self.handler, *arguments)
        return await result if is_awaitable(result) else result

    def replace(self, **options: Any) -> Self:
        """Return a stage like this one with other options, ``name`` or ``handler``.

        >>> quick = fetch.replace(retry_delay=0)  # in tests

        A subclass whose constructor takes other arguments overrides this.
        """
        own = {option: getattr(self, option) for option in ("name", "handler", *StageOptions.__annotations__)}
        constructor: Any = type(self)
        return cast(Self, constructor(**own | options))

    def _structure(self) -> Structure:
        options = {
            option: value
            for option, default in _DEFAULTS.items()
            if (value := getattr(self, option, default)) != default
        }
        return Structure("stage", options, ())

    def __repr__(self) -> str:
        options = "".join(f", {option}={value!r}" for option, value in self._structure().options.items())
        return f"{type(self).__name__}({getattr(self, 'name', None)!r}{options})"


_DEFAULTS: dict[str, Any] = cast(Any, Stage.__init__).__wrapped__.__kwdefaults__


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
    if isinstance(handler, _Staged):
        raise TypeError(
            f"handler must be a callable, not the decorator {handler!r}; write {handler!r}(fetch)"
        )
    if isinstance(handler, FunctionType) and handler.__module__ == "async_pipeline.steps":
        makes = callable_name(handler)
        raise TypeError(f"handler must be a callable, but {makes} makes a step: write {makes}(...)")
    if not callable(handler):
        raise TypeError(
            f"handler must be a callable (value) or (value, context), not {handler!r}{_hint(handler)}"
        )


def _hint(handler: object) -> str:
    if isinstance(handler, Stage):
        return ", which is a stage already; for one that differs write stage.replace(name='fetch', retries=3)"
    if is_step(handler):
        return ", which is a step already, and goes where a stage does"
    return "; write Stage('fetch', fetch), with the function itself"


def _check_times(stage: Stage[Any, Any]) -> None:
    if stage.timeout is not None:
        check_seconds("timeout", stage.timeout, zero=False)
    check_count("retries", stage.retries, least=0, message="retries must be greater than or equal to 0")
    check_seconds("retry_delay", stage.retry_delay, zero=True)
    check_backoff(stage.backoff)
    if stage.max_delay is not None:
        check_seconds("max_delay", stage.max_delay, zero=True)
    check_fraction("jitter", stage.jitter)


def _check_surroundings(stage: Stage[Any, Any]) -> None:
    check_retry_on(stage.retry_on)
    if not isinstance(stage.retry_on, (type, tuple)):
        _check_predicate(stage.retry_on)
    check_executor(stage.executor)
    _check_limiter(stage.limiter)
    budget: object = stage.retry_budget
    if not (budget is None or isinstance(budget, RetryBudget)):
        raise TypeError(f"retry_budget must be a RetryBudget, not {budget!r}; write RetryBudget()")


def _check_predicate(retry_on: Callable[..., Any]) -> None:
    try:
        check_own_arguments(retry_on, "retry_on(error)")
    except TypeError as error:
        raise TypeError(f"retry_on {retry_on!r} can't be used: {error}") from None


def _check_limiter(limiter: object) -> None:
    kind = type(limiter)
    if limiter is not None and not (hasattr(kind, "__aenter__") and hasattr(kind, "__aexit__")):
        raise TypeError(
            f"limiter must be an async context manager, not {limiter!r}; write limiter=asyncio.Semaphore(10)"
        )
    if isinstance(limiter, _AsyncGeneratorContextManager):
        raise TypeError(
            "limiter is entered for each attempt, but what @asynccontextmanager makes can be entered once; "
            "write a class with __aenter__ and __aexit__"
        )


def _check_off_loop(stage: Stage[Any, Any]) -> None:
    if stage._is_async:
        raise TypeError(
            f"executor= is for sync handlers, but {stage.handler!r} is async: it runs on the event loop"
        )
    if stage._wants_context and not shares_memory(stage.executor):
        raise TypeError(
            f"handler {stage.handler!r} wants the context, of which executor={stage.executor!r} would change "
            'only a copy: let the handler take (value), or write executor="thread"'
        )


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
@advised("@staged(name='fetch', timeout=2.0)")
def staged(handler: Any = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a function a :class:`Stage` of the same name; with or without options.

    >>> @staged(timeout=2.0, retries=3, backoff="exponential")
    ... async def fetch(url: str) -> bytes: ...

    ``fetch`` is then a ``Stage[str, bytes]``, which is run, not called: ``await fetch.run(url)``. The
    function is ``fetch.handler``.

    Args:
        name: the stage's name; by default the function's.
        options: those of :class:`Stage`.

    Raises:
        TypeError, ValueError: as :class:`Stage` does.
    """
    if isinstance(handler, (str, int, float)):
        raise TypeError(
            f"staged takes a callable, or its options by name, not {handler!r}; "
            "write @staged(name='fetch', timeout=2.0)"
        )
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

    def __repr__(self) -> str:
        named = {} if self._name is None else {"name": self._name}
        options = ", ".join(f"{option}={value!r}" for option, value in (named | self._options).items())
        return f"staged({options})"


def callable_name(function: Any) -> str:
    """Return a callable's ``__name__``; of a partial the function's, of an object its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


# when a child fails while its TaskGroup waits, the parent task keeps a request to end (CPython gh-116720)
_LEAVES_REQUESTS = sys.version_info < (3, 13)


class Deadline:
    """When a run has to be over, in seconds of the event loop's clock."""

    __slots__ = ("clock", "scope", "started", "timeout")

    def __init__(self, timeout: float | None) -> None:
        self.clock: Callable[[], float] = asyncio.get_running_loop().time
        self.started: float = self.clock()
        self.timeout: float = math.inf if timeout is None else timeout
        self.scope: asyncio.Timeout | None = (
            None if timeout is None else asyncio.timeout_at(self.started + timeout)
        )

    def elapsed(self) -> float:
        return self.clock() - self.started

    def is_over(self) -> bool:
        # the timer may fire a little early, and has not fired yet when a handler has blocked the event loop
        return self.scope is not None and (self.scope.expired() or self.elapsed() >= self.timeout)


class RunState:
    """What a run hands from step to step: how long all of it may take, who watches it, and where it is."""

    __slots__ = ("_requests", "attempts", "deadline", "element", "handled", "item_index", "path", "watches")

    def __init__(self, timeout: float | None = None, item_index: int | None = None) -> None:
        if timeout is not None:
            check_seconds("timeout", timeout, zero=False)
        self.deadline: Deadline = Deadline(timeout)
        # a list, because the states of one task share it
        self._requests = [0 if timeout is None else cancel_requests()]
        self.watches: tuple[Watch, ...] = ()
        self.item_index: int | None = item_index
        self.path: str | None = None  # of the step that runs, from the outermost pipeline that is watched
        self.element: tuple[int, ...] = ()
        self.attempts: int = 1  # at the stage that runs, as far as it is known
        self.handled: Exception | None = None  # by its on_error, if somebody watches

    def begin_stage(self) -> None:
        self.attempts = 1
        if self.deadline.scope is not None:
            self._forget_requests()

    def _forget_requests(self) -> None:
        """Between two stages: what has not ended the run has been left behind, or swallowed."""
        if _LEAVES_REQUESTS:
            self._requests[0] = cancel_requests()

    def fork(self, *element: int) -> "RunState":
        """Return the state for another task of the same run, and for an element there."""
        state = self.inside(self.path)
        state._requests = [self._requests[0]]
        if element:
            state.element = (*self.element, *element)
        return state

    def inside(self, path: str | None) -> "RunState":
        """Return the state for the step of this path, in the same task."""
        state = _new(RunState)
        state.deadline, state._requests = self.deadline, self._requests
        state.watches, state.path = self.watches, path
        state.item_index, state.element = self.item_index, self.element
        state.attempts, state.handled = 1, None
        return state

    def watched_by(self, watch: Watch) -> "RunState":
        """Return the state for the same step, which somebody more watches."""
        state = self.inside(self.path)
        state.watches = (*self.watches, watch)
        return state

    # the observers are called here, and not by a method of Watch: each call would be 5 % of two events

    def tell_start(self, path: str, now: float, make: Callable[..., Event] = Event) -> None:
        raised: BaseException | None = None
        for watch in self.watches:
            observers, _, pipeline, run_id, skip, _ = watch
            stage = path[skip:] if skip else path
            event = make("stage_start", now, run_id, pipeline, stage, self.item_index, self.element)
            for observer in observers:
                try:
                    observer(event)
                except BaseException as broken:
                    raised = watch.report(observer, event, broken) or raised
        try:
            if raised is not None:
                self.tell_end(path, now, outcome_of(raised), 1, raised)
                raise raised
        finally:
            del raised  # its traceback holds this frame, so this must not hold it

    def tell_end(
        self, path: str, started: float, outcome: OutcomeName, attempts: int, error: BaseException | None
    ) -> None:
        now = self.deadline.clock()
        duration, item_index, element = now - started, self.item_index, self.element
        raised: BaseException | None = None
        for watch in reversed(self.watches):
            _, observers, pipeline, run_id, skip, _ = watch
            stage = path[skip:] if skip else path
            event = EndEvent(
                "stage_end",
                now,
                run_id,
                pipeline,
                stage,
                item_index,
                element,
                outcome,
                attempts,
                duration,
                error,
            )
            for observer in observers:
                try:
                    observer(event)
                except BaseException as broken:
                    raised = watch.report(observer, event, broken) or raised
        try:
            if raised is not None:
                raise raised
        finally:
            del raised, event, error  # nor may they be held by it

    def tell_failure(self, path: str | None, attempt: int, error: Exception, delay: float | None) -> None:
        now = self.deadline.clock()
        for watch in self.watches:
            stage = cast(str, path)[watch.skip :]
            about = now, watch.run_id, watch.pipeline, stage, self.item_index, self.element
            watch.tell(FailedAttempt(*about, attempt=attempt, error=error, delay=delay))

    def is_over(self) -> bool:
        return self.deadline.is_over()

    def check(self) -> None:
        """Cancel the run if its time is up and nobody has noticed, or cared."""
        if self.deadline.is_over():
            self._forget_requests()
            raise asyncio.CancelledError("the run's timeout is up")

    async def bound(self, run: Coroutine[Any, Any, Any], name: str) -> Any:
        """Await ``run``, the whole of it, and cancel it when the time is up."""
        cancellation = None
        try:
            async with cast(asyncio.Timeout, self.deadline.scope):
                try:
                    return await run
                except asyncio.CancelledError as error:
                    cancellation = error
                    raise
        except (TimeoutError, asyncio.CancelledError) as error:
            # a request that came meanwhile and was not taken back is somebody else's; asyncio.timeout counts
            # those as well that a TaskGroup has left behind in an earlier stage
            if cancellation is None or not self.is_over() or cancel_requests() > self._requests[0]:
                raise
            # not made here: this frame would hold what holds the traceback that holds this frame
            raise self._exceeded(cancelled_in(cancellation) or (name, 1), error)  # noqa: B904
        finally:
            del cancellation

    def _exceeded(self, where: tuple[str, int], cause: BaseException) -> StageExecutionError:
        exceeded = DeadlineExceeded(self.deadline.timeout)
        exceeded.__cause__ = cause
        error = StageExecutionError(where[0], exceeded, attempts=where[1])
        error.__cause__ = exceeded
        return error


_new = object.__new__


class WatchedStep:
    """A step inside a run that somebody watches: it tells of its start and its end."""

    __slots__ = ("_call", "_has_elements", "_is_leaf", "_name")

    def __init__(self, step: Any, name: str, call: Call) -> None:
        structure = structure_of(step)
        self._name = name
        self._call = call
        self._is_leaf = not structure.parts  # and so makes attempts of its own
        self._has_elements = structure.kind in ("each", "keep")

    async def run(self, value: Any, context: Any, state: RunState) -> Any:
        path = self._name if state.path is None else f"{state.path}/{self._name}"
        own = state.inside(path)
        started = own.deadline.clock()
        if self._has_elements:
            own.tell_start(path, started, functools.partial(CountedStart, _count(value)))
        else:
            own.tell_start(path, started)
        try:
            output = await self._call(value, context, own)
        except BaseException as error:
            _tell_end(own, path, started, error, self._is_leaf)
            raise
        else:
            own.tell_end(path, started, "ok", own.attempts if self._is_leaf else 1, own.handled)
            return output
        finally:
            state.attempts = own.attempts
            own.handled = None  # its traceback holds what holds the state


def _count(value: Any) -> int | None:
    """How many elements a value has, if it can tell without being iterated."""
    try:
        return len(value)
    except Exception:  # a generator, or a length of the user's own that fails
        return None


class _WatchedHandler(WatchedStep):
    """A plain stage there; without the state and the coroutine that it needs not, 0.5 µs of 1.9 are saved."""

    __slots__ = ("_handler", "_is_async", "_own_name", "_wants_context")

    def __init__(self, stage: Stage[Any, Any], name: str) -> None:
        super().__init__(stage, name, stage._once)
        self._own_name = stage.name  # by which a parallel does not know it
        self._handler = stage.handler
        self._wants_context = stage._wants_context
        self._is_async = stage._is_async

    async def run(self, value: Any, context: Any, state: RunState) -> Any:
        path = self._name if state.path is None else f"{state.path}/{self._name}"
        started = state.deadline.clock()
        state.tell_start(path, started)
        try:
            output = self._handler(value, context) if self._wants_context else self._handler(value)
            if self._is_async or (type(output) not in NEVER_AWAITABLE and is_awaitable(output)):
                output = await output
        except Exception as error:
            raise self._failure(state, path, started, error) from error
        except BaseException as error:
            _tell_end(state, path, started, error)
            raise
        state.tell_end(path, started, "ok", 1, None)
        return output

    def _failure(self, state: RunState, path: str, started: float, error: Exception) -> StageExecutionError:
        failure = StageExecutionError(self._own_name, error)
        failure.__cause__ = error
        try:
            state.tell_failure(path, 1, error, None)
        finally:
            state.tell_end(path, started, outcome_of(failure), 1, failure)
        return failure


def watched(step: Any, name: str, call: Call) -> WatchedStep:
    """Return how to run a step where somebody watches; ``call`` is how to run it where nobody does."""
    if type(step) is Stage and call == step._once:
        return _WatchedHandler(step, name)
    return WatchedStep(step, name, call)


def _tell_end(state: RunState, path: str, started: float, error: BaseException, is_leaf: bool = True) -> None:
    attempts = error.attempts if isinstance(error, StageExecutionError) else state.attempts
    cause = None if is_finish(error) else error
    state.tell_end(path, started, outcome_of(error, state.is_over()), attempts if is_leaf else 1, cause)


def outcome_of(error: BaseException, is_over: bool = False) -> OutcomeName:
    """Return what an event calls the end that ``error`` is; ``is_over``, whether the run's time is up."""
    if is_finish(error):
        return "finished"
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "timeout" if is_over else "cancelled"
    original = error.original_error if isinstance(error, StageExecutionError) else error
    return "timeout" if isinstance(original, (StageTimeoutError, DeadlineExceeded)) else "error"


def cancel_requests() -> int:
    """Return how often the current task has been asked to end, and has not taken it back."""
    try:
        return asyncio.current_task().cancelling()  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # no task, or not even an event loop: driven by hand
        return 0


def was_cancelled(error: BaseException, requests: int) -> bool:
    """Tell whether ``error`` is what became of a cancellation of the task, which had ``requests`` before.

    A request that a TaskGroup has left behind is none, and is taken back.
    """
    made = cancel_requests() - requests
    if _LEAVES_REQUESTS and made == 1 and _is_of_a_group(error):
        cast("asyncio.Task[Any]", asyncio.current_task()).uncancel()
        return False
    return made > 0


def _is_of_a_group(error: BaseException) -> bool:
    return behind(error, BaseExceptionGroup) is not None and behind(error, asyncio.CancelledError) is None


def raise_cancellation(error: Exception) -> None:
    """Raise the cancellation that a hook or a cache has made ``error`` of, if there is one."""
    cancellation = behind(error, asyncio.CancelledError)
    if cancellation is None or cancel_requests() == 0:
        return
    # async with asyncio.timeout(1): ... in a hook, while the task of the run is being cancelled anyway
    timeout = behind(error, TimeoutError)
    if timeout is None or behind(timeout, asyncio.CancelledError) is not cancellation:
        raise cancellation
