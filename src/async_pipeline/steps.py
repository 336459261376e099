"""Steps made of steps: side by side, once for each element, one or the other.

Each of them takes stages, pipelines, callables, or any object with a ``name`` and a ``run``, is a step
itself, hands the run's context to the steps inside, and lets their :class:`~async_pipeline.Finish` end the
run. Whatever a step inside raises leaves as one :class:`~async_pipeline.StageExecutionError`, named by its
path: ``enrich/price``. Hooks and middlewares of the pipeline around it see it as one stage.
"""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import chain
from keyword import iskeyword
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar, cast, overload

from .advice import FALLBACK, STEP, advised
from .errors import (
    Finish,
    MissingFieldsError,
    StageExecutionError,
    cancelled_in,
    finish_of,
    is_finish,
    mark_cancelled,
)
from .fanout import Batch, check_concurrency, check_items
from .retry import check_kinds, matches
from .stage import (
    Call,
    Joinable,
    RunState,
    as_step,
    call_of,
    cancel_requests,
    is_watched,
    was_cancelled,
    watched,
)
from .types import In, Out, Part, Step, Structure

__all__ = [
    "Branch",
    "Each",
    "Fallback",
    "Keep",
    "Parallel",
    "Require",
    "branch",
    "each",
    "fallback",
    "keep",
    "parallel",
    "require",
]

_A = TypeVar("_A")
_B = TypeVar("_B")

# a callable's Out is tried as that of an awaitable first, or type checkers would stop at the awaitable
_Async = Callable[[_A], Awaitable[_B]] | Callable[[_A, Any], Awaitable[_B]]
_Sync = Callable[[_A], Awaitable[_B] | _B] | Callable[[_A, Any], Awaitable[_B] | _B]
_Any = Step[_A, _B] | _Sync[_A, _B]
_Predicate = Step[_A, Any] | Callable[[_A], Any] | Callable[[_A, Any], Any]
_Elements = Iterable[_A] | AsyncIterable[_A]
_Errors = type[Exception] | tuple[type[Exception], ...]


class _Inner:
    """A step inside another one: how it is run, and how it is called from there."""

    __slots__ = ("_call", "_outer", "_own", "_watched", "name")

    def __init__(
        self, outer: str, step: Step[Any, Any], name: str | None = None, *, is_predicate: bool = False
    ) -> None:
        self.name = step.name if name is None else name
        self._call = call_of(step)
        # what has no truth, a NumPy array for example, is a failure of the predicate; who watches is told so
        self._watched = watched(step, self.name, _truth_of(self._call) if is_predicate else self._call)
        self._own = step.name
        self._outer = outer

    def call(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        """Return the coroutine of one call; its errors do not know the step around it yet."""
        if state is None or not state.watches:
            return self._call(value, context, state)
        return self._watched.run(value, context, state)

    def _rename(self, path: str) -> str:
        own = self._own
        return self.name + path[len(own) :] if self._is_own(path) else f"{self.name}/{path}"

    def _is_own(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self._own}/")

    def failure(self, error: Exception, element: tuple[int, ...] = ()) -> StageExecutionError:
        """The error of the step around it that ``error`` of this one is."""
        if isinstance(error, StageExecutionError):
            return error.within(self._outer, self._rename, element)
        failure = StageExecutionError(f"{self._outer}/{self.name}", error)
        failure.element = element
        failure.__cause__ = error
        return failure

    def where(self, error: asyncio.CancelledError) -> tuple[str, int]:
        """The path of the stage that a cancellation left, and the attempts made there."""
        path, attempts = cancelled_in(error) or ("", 1)
        if not self._is_own(path):  # what it was before it came to this step is of no interest
            path, attempts = self._own, 1
        return f"{self._outer}/{self._rename(path)}", attempts

    async def run(self, value: Any, context: Any, state: RunState | None, convert: Any = None) -> Any:
        """Run it in the task of the step around it."""
        try:
            output = await self.call(value, context, state)
            return output if convert is None else convert(output)
        except Exception as error:
            raise self.failure(error)  # noqa: B904 - it has its cause already
        except asyncio.CancelledError as error:
            mark_cancelled(error, *self.where(error))
            raise
        except BaseExceptionGroup as group:
            if not is_finish(group):
                raise
            raise finish_of(group) from None


def _truth_of(call: Call) -> Call:
    async def truth(value: Any, context: Any, state: RunState | None = None) -> bool:
        return bool(await call(value, context, state))

    return truth


class _Ends:
    """How steps that ran side by side have ended without a result, and which of it leaves the outer step.

    Failures come before a Finish: who ends a run early must not hide that something went wrong in it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures: list[StageExecutionError] = []
        self._left: BaseException | None = None  # a Finish, or a cancellation that nobody asked for
        self._fatal: BaseException | None = None
        self.cancelled: list[tuple[str, int]] = []

    def add(self, inner: _Inner, error: BaseException, element: tuple[int, ...] = ()) -> None:
        if isinstance(error, Exception):
            self._failures.append(inner.failure(error, element))
        elif isinstance(error, asyncio.CancelledError):
            mark_cancelled(error, *inner.where(error))
            self._left = self._left or error
        elif is_finish(error):
            self._left = self._left if isinstance(self._left, Finish) else finish_of(error)
        else:
            self._fatal = self._fatal or error

    def add_failure(self, error: Exception) -> None:
        """Add a failure of the outer step itself."""
        failure = StageExecutionError(self._name, error)
        failure.__cause__ = error
        self._failures.append(failure)

    def raise_any(self) -> None:
        # taken out of self, which the tracebacks of the errors hold: a cycle would keep them all alive
        failures, left, fatal = self._failures, self._left, self._fatal
        self._failures, self._left, self._fatal = [], None, None
        try:
            if fatal is not None:
                raise fatal
            if failures:
                raise self._joined(failures)
            if left is not None:
                raise left
        finally:
            del failures, left, fatal

    def _joined(self, failures: list[StageExecutionError]) -> StageExecutionError:
        if len(failures) == 1:
            return failures[0]
        first, *others = failures
        others.sort(key=attrgetter("element"))  # who is cancelled first is left to chance
        return StageExecutionError.joint(self._name, [first, *others])

    def leave_by(self, error: asyncio.CancelledError) -> None:
        """Note on a cancellation that came from outside what it has interrupted: the path that all share."""
        if self._fatal is not None:
            self._failures = []
            self.raise_any()
        if self._failures and error.__context__ is None:  # it interrupted the others, which were cleaning up
            error.__context__ = self._joined(self._failures)
        self._failures, self._left = [], None
        mark_cancelled(error, *self._interrupted())

    def _interrupted(self) -> tuple[str, int]:
        if len(self.cancelled) == 1:
            return self.cancelled[0]
        shared: list[str] = []
        for names in zip(*(path.split("/") for path, _ in self.cancelled), strict=False):
            if len(set(names)) > 1:
                break
            shared.append(names[0])
        return "/".join(shared) or self._name, 1


class _Composite(Joinable[In, Out]):
    """What the steps of this module share."""

    __slots__ = ("_is_watched", "name")
    _HINT = ""
    _is_watched: bool  # by the observers of a pipeline inside

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}{self._HINT}")
        self.name: str = name

    def _call(self) -> Call:
        return self._run if type(self).run is _Composite.run else super()._call()

    def __setattr__(self, attribute: str, value: object) -> None:
        if hasattr(self, attribute):
            kind = type(self).__name__.lower()
            raise AttributeError(f"what {kind}() makes is immutable; make another for another {attribute!r}")
        super().__setattr__(attribute, value)

    async def run(self, value: In, *, context: Any = None) -> Out:
        """Run the step alone on one value.

        Args:
            value: the input.
            context: the object that all handlers inside share; a new dict by default.

        Returns:
            The step's output, or the value of a :class:`~async_pipeline.Finish`.

        Raises:
            StageExecutionError: a step inside failed, or this one did; ``stage_name`` is the path.
        """
        state = RunState() if self._is_watched else None
        try:
            return cast(Out, await self._run(value, {} if context is None else context, state))
        except Finish as finish:
            return cast(Out, finish.value)

    @abstractmethod
    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        """Run the step inside a run."""

    @abstractmethod
    def _structure(self) -> Structure: ...

    def _repr(self, *arguments: str) -> str:
        kind = type(self).__name__.lower()
        named = () if self.name == kind else (f"name={self.name!r}",)
        return f"{kind}({', '.join((*arguments, *named))})"


def _inner_step(parameter: str, step: Any, name: str | None = None) -> Step[Any, Any]:
    message = f"{parameter} must be a stage, a pipeline, a callable, or an object with name and run"
    return as_step(step, message, name)


# -- side by side


class Parallel(_Composite[In, Out]):
    """What :func:`parallel` makes.

    Attributes:
        steps: the steps, by name.
        name: what errors, hooks and pictures call it.
    """

    __slots__ = ("_inner", "steps")
    _HINT = '; for a step of this name write parallel({"name": step})'

    def __init__(self, steps: Mapping[str, Any], name: str) -> None:
        super().__init__(name)
        if not steps:
            raise ValueError("parallel requires at least one step")
        for key in steps:
            if not isinstance(key, str):
                raise TypeError(f"the names of parallel's steps must be str, not {key!r}")
        self.steps: Mapping[str, Step[Any, Any]] = MappingProxyType(
            {key: _inner_step(f"step {key!r} of parallel", step, key) for key, step in steps.items()}
        )
        self._inner = tuple(_Inner(name, step, key) for key, step in self.steps.items())
        self._is_watched = is_watched(*self.steps.values())

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        return await _Branches(self.name, self._inner).run(value, context, state)

    def _structure(self) -> Structure:
        return Structure("parallel", {}, [Part("step", key, step) for key, step in self.steps.items()])

    def __repr__(self) -> str:
        if all(key.isidentifier() and not iskeyword(key) and key != "name" for key in self.steps):
            return self._repr(*(f"{key}={step!r}" for key, step in self.steps.items()))
        return self._repr(repr(dict(self.steps)))


class _Branches:
    """One run of ``parallel``: a task for each step, of which none fails, so the TaskGroup only waits."""

    def __init__(self, name: str, inner: Sequence[_Inner]) -> None:
        self._inner = inner
        self._running = len(inner)
        self._results: dict[str, Any] = {}
        self._ends = _Ends(name)
        self._tasks: list[asyncio.Task[None]] = []
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_ended = False  # one of them, without a result
        self._is_cancelled = False  # from outside; the TaskGroup cancels all then

    async def run(self, value: Any, context: Any, state: RunState | None) -> dict[str, Any]:
        try:
            async with asyncio.TaskGroup() as group:
                for inner in self._inner:
                    task = group.create_task(self._branch(inner, value, context, state))
                    self._tasks.append(task)
                    task.add_done_callback(self._count)
                try:
                    await self._over
                except asyncio.CancelledError:
                    self._is_cancelled = True
                    raise
        except asyncio.CancelledError as error:
            self._ends.leave_by(error)
            raise
        finally:
            self._tasks = []
        self._ends.raise_any()
        return {inner.name: self._result(inner) for inner in self._inner}

    def _count(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        if not self._running and not self._over.done():
            self._over.set_result(None)

    def _result(self, inner: _Inner) -> Any:
        if inner.name not in self._results:  # somebody cancelled its task before it began
            error = asyncio.CancelledError()
            mark_cancelled(error, *inner.where(error))
            raise error
        return self._results[inner.name]

    async def _branch(self, inner: _Inner, value: Any, context: Any, state: RunState | None) -> None:
        try:
            own = None if state is None else state.fork()
            if own is not None:
                own.check()  # a sibling may have blocked the event loop
            self._results[inner.name] = await inner.call(value, context, own)
        except asyncio.CancelledError as error:
            if self._is_cancelled:
                self._ends.cancelled.append(inner.where(error))
            else:
                self._end(inner, error)
        except BaseException as error:
            self._end(inner, error)

    def _end(self, inner: _Inner, error: BaseException) -> None:
        self._ends.add(inner, error)
        if not self._has_ended:
            self._has_ended = True
            # not at once: a sibling that is ready to run, too, may be about to fail for a reason of its own
            asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        if not self._is_cancelled:  # a second cancellation would interrupt who cleans up after the first
            for task in self._tasks:
                task.cancel()


@overload
def parallel(*, name: str = "parallel", **named: _Any[_A, Any]) -> Parallel[_A, dict[str, Any]]: ...
@overload
def parallel(
    steps: Mapping[str, Step[Any, Any] | Callable[..., Any]],
    /,
    *,
    name: str = "parallel",
    **named: Step[Any, Any] | Callable[..., Any],
) -> Parallel[Any, dict[str, Any]]: ...
@advised("parallel(price=find_price, stock=count_stock)")
def parallel(
    steps: Mapping[str, Any] | None = None, /, *, name: str = "parallel", **named: Any
) -> Parallel[Any, dict[str, Any]]:
    """Make a step that hands its input to several others at the same time, and returns a dict of results.

    >>> fetch | parallel(price=find_price, stock=count_stock) | merge
    >>> parallel({"list price": find_price}, name="enrich")

    All of them share the run's context, and get the same value, not copies of it. What one of them sets
    in a context variable reaches neither the others nor what comes after. The results are in the order of
    the steps. The first failure cancels the rest.

    Args:
        steps: the steps by name, where a name is no Python identifier.
        name: what errors, hooks and pictures call the whole; ``"parallel"`` by default.
        named: the steps by name. A step is known here by this name, whatever it is called itself.

    Raises:
        TypeError: what is given is no step.
        ValueError: no step, or two of the same name.
        StageExecutionError: by the run, ``name/step`` for a step that failed. When several fail at the same
            time, or while they are being cancelled, it is that of ``name``, and ``original_error`` is an
            ``ExceptionGroup`` of theirs.
    """
    if not (steps is None or isinstance(steps, Mapping)):
        raise TypeError(f"steps must be a mapping of names to steps, not {steps!r}; write parallel(a=…, b=…)")
    for twice in (steps or {}).keys() & named:
        raise ValueError(f"step {twice!r} of parallel is given twice")
    return Parallel({**(steps or {}), **named}, name)


# -- for each element


class Each(_Composite[In, Out]):
    """What :func:`each` makes.

    Attributes:
        step: what is done with each element.
        concurrency: how many elements are in flight at most, or the semaphore that says so.
        name: what errors, hooks and pictures call it.
    """

    __slots__ = ("_inner", "concurrency", "step")

    def __init__(self, step: Any, concurrency: int | asyncio.Semaphore, name: str) -> None:
        super().__init__(name)
        check_concurrency(concurrency)
        self.step: Step[Any, Any] = _inner_step("step", step)
        self.concurrency: int | asyncio.Semaphore = concurrency
        self._inner = _Inner(name, self.step)
        self._is_watched = is_watched(self.step)

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        return await _open(_OfEach, self, value, context, state).run_as_step()

    def _structure(self) -> Structure:
        return Structure("each", _concurrency(self), [Part("step", self.step.name, self.step)])

    def __repr__(self) -> str:
        return self._repr(repr(self.step), *(f"concurrency={n!r}" for n in _concurrency(self).values()))


class Keep(_Composite[In, Out]):
    """What :func:`keep` makes.

    Attributes:
        predicate: the step that decides.
        concurrency: how many elements are in flight at most, or the semaphore that says so.
        name: what errors, hooks and pictures call it.
    """

    __slots__ = ("_inner", "concurrency", "predicate")

    def __init__(self, predicate: Any, concurrency: int | asyncio.Semaphore, name: str) -> None:
        super().__init__(name)
        check_concurrency(concurrency)
        self.predicate: Step[Any, Any] = _inner_step("predicate", predicate)
        self.concurrency: int | asyncio.Semaphore = concurrency
        self._inner = _Inner(name, self.predicate, is_predicate=True)
        self._is_watched = is_watched(self.predicate)

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        kept = await _open(_Kept, self, value, context, state).run_as_step()
        return [element for element in kept if element is not _DROPPED]

    def _structure(self) -> Structure:
        return Structure("keep", _concurrency(self), [Part("predicate", self.predicate.name, self.predicate)])

    def __repr__(self) -> str:
        return self._repr(repr(self.predicate), *(f"concurrency={n!r}" for n in _concurrency(self).values()))


_DROPPED: Any = object()
_CONCURRENCY = 5


def _concurrency(step: Each[Any, Any] | Keep[Any, Any]) -> dict[str, Any]:
    return {} if step.concurrency == _CONCURRENCY else {"concurrency": step.concurrency}


class _OfEach(Batch):
    """One run of ``each``: a batch whose items share the context, and whose end is that of the step."""

    def __init__(
        self,
        name: str,
        inner: _Inner,
        concurrency: int | asyncio.Semaphore,
        elements: Any,
        context: Any,
        state: RunState | None,
    ) -> None:
        super().__init__(inner, elements, concurrency, None, return_exceptions=False)
        self._inner = inner
        self._make_context = lambda: context
        self._ends = _Ends(name)
        # without a state, the step's own coroutine: a layer more is paid for at each suspension
        if state is None:
            self._run = inner.call
        else:
            self._run_numbered = _with_state(inner, state, self._ends.cancelled)

    async def run_as_step(self) -> list[Any]:
        try:
            return await self.run()
        except asyncio.CancelledError as error:
            if cancelled_in(error) is None:
                self._ends.leave_by(error)
            raise

    def _fail(self, job: Any, context: Any, started: float, error: BaseException) -> None:
        self._ends.add(self._inner, error, (job[0],))
        self._stop()

    def _raise(self, error: BaseException | None, failures: dict[int, Exception], results: list[Any]) -> None:
        try:
            if isinstance(error, Exception):  # of the iterable
                self._ends.add_failure(error)
            elif error is not None:
                raise error
            self._ends.raise_any()
        finally:
            del error


def _with_state(inner: _Inner, state: RunState, cancelled: list[tuple[str, int]]) -> Callable[..., Any]:
    async def run(element: Any, context: Any, index: int) -> Any:
        own = state.fork(index)
        try:
            own.check()  # of elements that block the event loop, none begins after the deadline
            return await inner.call(element, context, own)
        except asyncio.CancelledError as error:
            cancelled.append(inner.where(error))
            raise

    return run


def _open(
    kind: type[_OfEach], step: Each[Any, Any] | Keep[Any, Any], value: Any, context: Any, state: Any
) -> _OfEach:
    try:
        check_items(f"the value that {step.name!r} gets", value)
        return kind(step.name, step._inner, step.concurrency, value, context, state)
    except Exception as error:
        raise StageExecutionError(step.name, error) from error


class _Kept(_OfEach):
    """One run of ``keep``: the elements themselves are the results, or ``_DROPPED``."""

    def _settle(
        self, job: Any, context: Any, started: float, value: Any, error: Exception | None = None
    ) -> None:
        try:
            kept = job[1] if value else _DROPPED
        except BaseException as undecided:
            return self._fail(job, context, started, undecided)
        return super()._settle(job, context, started, kept)


@overload
def each(
    step: Step[_A, _B], concurrency: int | asyncio.Semaphore = 5, *, name: str = "each"
) -> Each[_Elements[_A], list[_B]]: ...
@overload
def each(
    step: _Async[_A, _B], concurrency: int | asyncio.Semaphore = 5, *, name: str = "each"
) -> Each[_Elements[_A], list[_B]]: ...
@overload
def each(
    step: _Sync[_A, _B], concurrency: int | asyncio.Semaphore = 5, *, name: str = "each"
) -> Each[_Elements[_A], list[_B]]: ...
@advised("each(fetch, concurrency=20)", STEP)
def each(step: Any, concurrency: int | asyncio.Semaphore = 5, *, name: str = "each") -> Each[Any, Any]:
    """Make a step that runs another one on every element of its input, side by side, in order.

    >>> pages = find_links | each(fetch, concurrency=20) | merge

    The elements share the run's context, where the items of :meth:`Pipeline.map` have copies; what one
    sets in a context variable reaches no other. An async iterable's elements are pulled as they are
    needed. The first failure cancels the rest.

    Args:
        step: what is done with each element.
        concurrency: how many elements are in flight at most; 5 by default. An :class:`asyncio.Semaphore` may
            be given instead, and shared; an element that waits for one which a batch around it holds for
            its item can deadlock.
        name: what errors, hooks and pictures call the whole; ``"each"`` by default.

    Returns:
        A step from an iterable or async iterable to a list.

    Raises:
        TypeError, ValueError: an argument is wrong.
        StageExecutionError: by the run, ``each/step`` for an element that failed, with its index in
            ``element`` and its own error as ``original_error``; ``each`` for a value that can't be
            iterated, or whose iteration fails. Errors that other elements raise while they are being
            cancelled come with the first, in an ``ExceptionGroup``.
    """
    return Each(step, concurrency, name)


@overload
def keep(
    predicate: Step[_A, object], concurrency: int | asyncio.Semaphore = 5, *, name: str = "keep"
) -> Keep[_Elements[_A], list[_A]]: ...
@overload
def keep(
    predicate: Callable[[_A], object] | Callable[[_A, Any], object],
    concurrency: int | asyncio.Semaphore = 5,
    *,
    name: str = "keep",
) -> Keep[_Elements[_A], list[_A]]: ...
@advised("keep(is_open, concurrency=20)", STEP)
def keep(predicate: Any, concurrency: int | asyncio.Semaphore = 5, *, name: str = "keep") -> Keep[Any, Any]:
    """Make a step that keeps those elements of its input for which a predicate holds, in order.

    >>> find_links | keep(is_allowed) | each(fetch)

    Args:
        predicate: a sync or async callable, or a step; what it returns counts as ``bool()`` has it.
        concurrency, name: as for :func:`each`.

    Returns:
        A step from an iterable or async iterable to a list.

    Raises:
        TypeError, ValueError, StageExecutionError: as for :func:`each`.
    """
    return Keep(predicate, concurrency, name)


# -- one or the other


class Branch(_Composite[In, Out]):
    """What :func:`branch` makes.

    Attributes:
        cases: pairs of a predicate and a step.
        otherwise: the step for the rest, or None.
        name: what errors, hooks and pictures call it.
    """

    __slots__ = ("_inner", "_otherwise", "cases", "otherwise")

    def __init__(self, cases: Sequence[Any], otherwise: Any, name: str) -> None:
        super().__init__(name)
        if not cases:
            raise ValueError("branch requires at least one (predicate, step)")
        self.cases: tuple[tuple[Step[Any, Any], Step[Any, Any]], ...] = tuple(map(_case, cases))
        self._inner = tuple(
            (_Inner(name, predicate, is_predicate=True), _Inner(name, step)) for predicate, step in self.cases
        )
        self.otherwise: Step[Any, Any] | None = (
            None if otherwise is None else _inner_step("otherwise", otherwise)
        )
        self._otherwise = None if self.otherwise is None else _Inner(name, self.otherwise)
        self._is_watched = is_watched(self.otherwise, *chain.from_iterable(self.cases))

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        for predicate, step in self._inner:
            holds = await predicate.run(value, context, state, bool)
            if state is not None:
                state.check()
                state.begin_stage()
            if holds:
                return await step.run(value, context, state)
        if self._otherwise is None:
            raise self._unmatched(value)
        return await self._otherwise.run(value, context, state)

    def _unmatched(self, value: object) -> StageExecutionError:
        predicates = ", ".join(predicate.name for predicate, _ in self.cases)
        error = ValueError(
            f"none of {predicates} holds for this value ({type(value).__name__}), "
            "and there is no otherwise=; write branch(..., otherwise=step)"
        )
        failure = StageExecutionError(self.name, error)
        failure.__cause__ = error
        return failure

    def _structure(self) -> Structure:
        parts = [
            Part(role, step.name, step)
            for case in self.cases
            for role, step in zip(("predicate", "step"), case, strict=True)
        ]
        if self.otherwise is not None:
            parts.append(Part("otherwise", self.otherwise.name, self.otherwise))
        return Structure("branch", {}, parts)

    def __repr__(self) -> str:
        otherwise = () if self.otherwise is None else (f"otherwise={self.otherwise!r}",)
        return self._repr(*map(repr, self.cases), *otherwise)


def _case(case: Any) -> tuple[Step[Any, Any], Step[Any, Any]]:
    if not (isinstance(case, (tuple, list)) and len(case) == 2):
        raise TypeError(
            f"a case of branch must be a pair (predicate, step), not {case!r}; "
            "write branch((is_big, split), otherwise=keep_whole)"
        )
    return _inner_step("a case's predicate", case[0]), _inner_step("a case's step", case[1])


@overload
def branch(
    *cases: tuple[_Predicate[_A], Step[_A, _B] | _Async[_A, _B]],
    otherwise: Step[_A, _B] | _Async[_A, _B] | None = None,
    name: str = "branch",
) -> Branch[_A, _B]: ...
@overload
def branch(
    *cases: tuple[_Predicate[_A], _Any[_A, _B]],
    otherwise: _Any[_A, _B] | None = None,
    name: str = "branch",
) -> Branch[_A, _B]: ...
@advised("branch((is_big, split), otherwise=keep_whole)", STEP)
def branch(*cases: Any, otherwise: Any = None, name: str = "branch") -> Branch[Any, Any]:
    """Make a step that is one of several: the first whose predicate holds for the input.

    >>> branch((is_image, resize), (is_video, transcode), otherwise=copy)

    Args:
        cases: pairs of a predicate, a sync or async callable or a step, and a step. The predicates are
            asked in their order, each only if none before it held.
        otherwise: the step where none holds. Without one, that is an error; ``lambda value: value`` lets
            the value through.
        name: what errors, hooks and pictures call the whole; ``"branch"`` by default.

    Raises:
        TypeError: a case is no pair, or something in it no step.
        ValueError: no case.
        StageExecutionError: by the run, ``branch/name`` for the predicate or step that failed, ``branch``
            when none of the predicates holds and there is no ``otherwise``.
    """
    return Branch(cases, otherwise, name)


class Fallback(_Composite[In, Out]):
    """What :func:`fallback` makes.

    Attributes:
        steps: the step, and its alternatives.
        on: after which errors the next one is tried.
        name: what errors, hooks and pictures call it.
    """

    __slots__ = ("_inner", "on", "steps")

    def __init__(self, steps: Sequence[Any], on: Any, name: str) -> None:
        super().__init__(name)
        check_kinds("on", on, Exception)
        self.on: _Errors = on
        self.steps: tuple[Step[Any, Any], ...] = tuple(_inner_step("a step of fallback", s) for s in steps)
        self._inner = tuple(_Inner(name, step) for step in self.steps)
        self._is_watched = is_watched(*self.steps)

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        requests = cancel_requests()
        earlier: list[StageExecutionError] = []
        untried = [*self._inner]
        try:
            while True:
                if earlier and state is not None:
                    state.begin_stage()
                try:
                    return await untried.pop(0).run(value, context, state)
                except StageExecutionError as error:
                    # try: ... except asyncio.CancelledError: raise MyError - nothing is begun after that
                    is_over = (state is not None and state.is_over()) or was_cancelled(error, requests)
                    if is_over or not untried or not _is_caught(error, self.on):
                        error.after(earlier, self.name)
                        raise
                    earlier.append(error)
        finally:
            del earlier  # the tracebacks of its errors hold this frame

    def _structure(self) -> Structure:
        options = {} if self.on is Exception else {"on": self.on}
        return Structure("fallback", options, [Part("step", step.name, step) for step in self.steps])

    def __repr__(self) -> str:
        on = () if self.on is Exception else (f"on={_names_of(self.on)}",)
        return self._repr(*map(repr, self.steps), *on)


def _names_of(kinds: Any) -> str:
    if isinstance(kinds, tuple):
        return f"({', '.join(kind.__name__ for kind in kinds)}{',' * (len(kinds) == 1)})"
    return str(kinds.__name__)


def _is_caught(error: BaseException, kinds: Any) -> bool:
    """Whether it is of these kinds itself, or what stands behind it is: of several, each."""
    if not isinstance(error, StageExecutionError) or isinstance(error, kinds):
        return matches(error, kinds)
    original = error.original_error
    if error._is_joint and not isinstance(original, kinds):
        return all(_is_caught(part, kinds) for part in cast(Any, original).exceptions)
    return matches(original, kinds)


@overload
def fallback(
    step: Step[_A, _B] | _Async[_A, _B],
    *alternatives: Step[_A, _B] | _Async[_A, _B],
    on: _Errors = Exception,
    name: str = "fallback",
) -> Fallback[_A, _B]: ...
@overload
def fallback(
    step: _Any[_A, _B], *alternatives: _Any[_A, _B], on: _Errors = Exception, name: str = "fallback"
) -> Fallback[_A, _B]: ...
@advised("fallback(ask_primary, ask_replica)", FALLBACK)
def fallback(
    step: Any, *alternatives: Any, on: _Errors = Exception, name: str = "fallback"
) -> Fallback[Any, Any]:
    """Make a step that tries another one with the same input when one has failed for good.

    >>> fallback(ask_primary, ask_replica, use_default, on=(OSError, TimeoutError))

    A step is tried with all the retries that it has before the next one is. A :class:`~async_pipeline.Finish`
    and a cancellation are no failures, and after a run's ``timeout`` no step is begun.

    Args:
        step: what is tried first.
        alternatives: what is tried after it, in order.
        on: the exception type, or a tuple of them, after which the next one is tried: of the handler's own
            error, of an ``ExceptionGroup`` all; ``Exception`` by default.
        name: what errors, hooks and pictures call the whole; ``"fallback"`` by default.

    Raises:
        TypeError: an argument is wrong.
        StageExecutionError: by the run, ``fallback/step`` for the last step that was tried; its ``earlier``
            holds the errors of those before, and its traceback names them.
    """
    return Fallback((step, *alternatives), on, name)


# -- a check


class Require(_Composite[Any, Any]):
    """What :func:`require` makes.

    Attributes:
        fields: the names of the fields.
        name: what errors, hooks and pictures call it.
    """

    __slots__ = ("fields",)

    def __init__(self, fields: tuple[str, ...], name: str) -> None:
        super().__init__(name)
        if not fields:
            raise ValueError("require requires at least one field")
        self._is_watched = False
        for field in fields:
            if not isinstance(field, str):
                raise TypeError(f"a field must be a str, not {field!r}; write require('id', 'email')")
        self.fields: tuple[str, ...] = fields

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        try:
            missing = _missing(value, self.fields)
            if missing:
                raise MissingFieldsError(missing)
        except Exception as error:  # of a property, too, that raises what is no AttributeError
            raise StageExecutionError(self.name, error) from error
        return value

    def _structure(self) -> Structure:
        return Structure("require", {"fields": self.fields}, ())

    def __repr__(self) -> str:
        return self._repr(*map(repr, self.fields))


def _missing(value: Any, fields: Sequence[str]) -> list[str]:
    if isinstance(value, Mapping) or callable(
        getattr(type(value), "keys", None)
    ):  # sqlite3.Row is no Mapping
        keys = set(value.keys())
        return [field for field in fields if field not in keys]
    return [field for field in fields if not hasattr(value, field)]


def require(*fields: str, name: str = "require") -> Require:
    """Make a step that lets a mapping or an object through if it has all of these fields.

    >>> parse | require("id", "email") | save

    Of a mapping, or what has ``keys()`` like a database row, the keys are looked at; of any other object, the
    attributes. A field whose value is ``None`` is there.

    Args:
        fields: the names of the fields.
        name: what errors, hooks and pictures call it; ``"require"`` by default.

    Raises:
        TypeError: a field's name is no str.
        ValueError: no field.
        StageExecutionError: by the run, with a :class:`~async_pipeline.MissingFieldsError` that lists all
            fields that are missing.
    """
    return Require(fields, name)
