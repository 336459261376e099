"""What is observable of a run, and how hooks and observers are called."""

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterable
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any, Literal, NamedTuple, TypeAlias

from .context import check_arguments, wants_context
from .types import is_awaitable

__all__ = [
    "CountedStart",
    "EndEvent",
    "Event",
    "FailedAttempt",
    "Hook",
    "Observer",
    "OnHookError",
    "OutcomeName",
    "Watch",
    "check_callback",
    "check_hook",
    "check_observers",
    "fire",
    "logger",
    "new_run_id",
    "report",
]

logger: logging.Logger = logging.getLogger("async_pipeline")

_Kind = Literal["run_start", "run_end", "stage_start", "stage_end", "attempt_failed"]
OutcomeName = Literal["ok", "error", "timeout", "cancelled", "finished"]
"""How a run or a stage has ended; see :class:`~async_pipeline.Event`."""


class Event:
    """What has just happened in a run; each observer of the pipeline gets it.

    A run is one call of ``run`` or ``try_run``, or one item of ``map`` or ``stream``. Each start has
    exactly one end, whatever happens: a ``run_end`` has the ``run_id`` of its ``run_start``, a
    ``stage_end`` also the ``stage`` and the ``element``. Both are told in the task in which the run or the
    stage runs, so that what an observer sets in a context variable at a start is seen by the handler, and
    can be taken back at the end: of an end, the observers are told in reverse order.

    Attributes:
        kind: ``"run_start"``, ``"run_end"``, ``"stage_start"``, ``"stage_end"``, or ``"attempt_failed"``: the
            handler of a stage has raised, or its time was up.
        time: seconds, on the event loop's clock.
        run_id: 16 hexadecimal digits of the run's own.
        pipeline: the name of the pipeline whose observer this is.
        stage: the path of the stage from there, like ``"enrich/price"``; ``None`` for the run itself. Steps
            with others inside are stages, too.
        item_index: in ``map`` and ``stream`` the index, counted from 0, of the item of the outermost batch;
            else ``None``, also where a subclass has a ``run`` of its own.
        element: inside ``each`` and ``keep`` the element's index, in a tuple; inside two of them there are
            two; else ``()``.
        outcome: of an end: ``"ok"``; ``"finished"`` early, by a :class:`~async_pipeline.Finish`;
            ``"timeout"``, of an attempt or of the run; ``"cancelled"``; or ``"error"``. Else ``None``.
        attempts: of an end, how many attempts were made; 1 for a run and for a step with others inside. Else
            ``None``.
        duration: of an end, the seconds since the start. Else ``None``.
        error: of an end, what the run or the stage has raised: the
            :class:`~async_pipeline.StageExecutionError`, or the cancellation; or else the error that its
            ``on_error`` has handled. Of a failed attempt, the handler's, or a
            :class:`~async_pipeline.StageTimeoutError`. Else ``None``.
        attempt: of a failed attempt, its number, counted from 1. Else ``None``.
        will_retry: of a failed attempt, whether there will be another one. Else ``None``.
        delay: of a failed attempt that will be retried, in how many seconds. Else ``None``.
        elements: of the start of an ``each`` or a ``keep``, how many elements its value has, if it has a
            length. Else ``None``.
    """

    __slots__ = ("element", "item_index", "kind", "pipeline", "run_id", "stage", "time")

    # what most events do not carry is not even stored
    outcome: OutcomeName | None = None
    attempts: int | None = None
    duration: float | None = None
    error: BaseException | None = None
    attempt: int | None = None
    will_retry: bool | None = None
    delay: float | None = None
    elements: int | None = None

    def __init__(
        self,
        kind: _Kind,
        time: float,
        run_id: str,
        pipeline: str,
        stage: str | None,
        item_index: int | None,
        element: tuple[int, ...],
    ) -> None:
        self.kind: _Kind = kind
        self.time: float = time
        self.run_id: str = run_id
        self.pipeline: str = pipeline
        self.stage: str | None = stage
        self.item_index: int | None = item_index
        self.element: tuple[int, ...] = element

    def __repr__(self) -> str:
        fields = {name: getattr(self, name) for name in _FIELDS}
        shown = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value not in (None, ()))
        return f"Event({shown})"


_COMMON = ("kind", "time", "run_id", "pipeline", "stage", "item_index", "element")
_FIELDS = (*_COMMON, "outcome", "attempts", "duration", "error", "attempt", "will_retry", "delay", "elements")


class CountedStart(Event):
    """A ``stage_start`` of an ``each`` or a ``keep``; it has ``elements``, how many its value has."""

    __slots__ = ("elements",)

    def __init__(self, elements: int | None, *common: Any) -> None:
        super().__init__(*common)
        self.elements: int | None = elements


class EndEvent(Event):
    """A ``run_end`` or a ``stage_end``; it has ``outcome``, ``attempts``, ``duration`` and ``error``."""

    __slots__ = ("attempts", "duration", "error", "outcome")

    def __init__(
        self,
        kind: _Kind,
        time: float,
        run_id: str,
        pipeline: str,
        stage: str | None,
        item_index: int | None,
        element: tuple[int, ...],
        outcome: OutcomeName,
        attempts: int,
        duration: float,
        error: BaseException | None,
    ) -> None:
        # not by super().__init__(): two events of a stage would take 10 % longer
        self.kind: _Kind = kind
        self.time = time
        self.run_id = run_id
        self.pipeline = pipeline
        self.stage = stage
        self.item_index = item_index
        self.element = element
        self.outcome: OutcomeName | None = outcome
        self.attempts: int | None = attempts
        self.duration: float | None = duration
        self.error: BaseException | None = error


class FailedAttempt(Event):
    """An ``attempt_failed``; it has ``attempt``, ``error``, ``will_retry`` and ``delay``."""

    __slots__ = ("attempt", "delay", "error", "will_retry")

    def __init__(self, *common: Any, attempt: int, error: Exception, delay: float | None) -> None:
        super().__init__("attempt_failed", *common)
        self.attempt: int | None = attempt
        self.error: BaseException | None = error
        self.will_retry: bool | None = delay is not None
        self.delay: float | None = delay


Observer: TypeAlias = Callable[[Event], object]
"""``(event)``, sync; what it returns does not matter."""

OnHookError: TypeAlias = Callable[[Exception], object]
"""``(error)``, sync; what to do with an exception of a hook or an observer, instead of logging it."""


class Watch(NamedTuple):
    """The observers of one pipeline in one run of it.

    The ``observers`` are told of a start in their order, and of an end the other way round, like nested
    context managers. ``skip`` is where its own paths begin, in those that begin at the outermost pipeline.
    """

    observers: tuple[Observer, ...]
    last_first: tuple[Observer, ...]
    pipeline: str
    run_id: str
    skip: int
    on_hook_error: OnHookError | None

    def tell(self, event: Event) -> None:
        """Hand an event to each observer, and raise what ``on_hook_error`` has raised when all were told."""
        raised: BaseException | None = None
        for observer in self.observers if event.outcome is None else self.last_first:
            try:
                observer(event)
            except BaseException as error:
                raised = self.report(observer, event, error) or raised
        try:
            if raised is not None:
                raise raised
        finally:
            del raised  # its traceback holds this frame

    def report(self, observer: Observer, event: Event, error: BaseException) -> BaseException | None:
        """Report an observer's exception, and return what has to be raised when all have been told."""
        if not isinstance(error, Exception):
            return error
        what = event.pipeline if event.stage is None else event.stage
        try:
            report(observer, f"{event.kind} of {what!r}", error, self.on_hook_error, "Observer")
        except BaseException as raised:
            return raised
        return None


_ids = random.Random()
with contextlib.suppress(AttributeError):  # where there is a fork: its runs would have the same names
    os.register_at_fork(after_in_child=_ids.seed)


def new_run_id() -> str:
    """Return a name for a run; not from ``random`` itself, which programs seed to repeat themselves."""
    return f"{_ids.getrandbits(64):016x}"


Hook = tuple[Callable[..., Any] | None, bool]
"""A hook, or None, and whether it wants the context."""


def check_hook(shape: str, function: Callable[..., Any] | None) -> Hook:
    """Decide once whether a hook gets the context; ``shape`` is how it is called without.

    Raises:
        TypeError: it is not callable, or can't be called as ``shape`` says, with or without the context.
    """
    parameter = shape.partition("(")[0]
    if function is None:
        return None, False
    if not callable(function):
        raise TypeError(f"{parameter} must be a callable, not {function!r}")
    try:
        return function, wants_context(function, shape)
    except TypeError as error:
        raise TypeError(f"{parameter}={function!r} can't be used: {error}") from None


_ASYNC = (iscoroutinefunction, isasyncgenfunction)


def check_callback(parameter: str, shape: str, function: Any) -> None:
    """Raise unless it is a sync callable that can be called as ``shape`` says.

    Raises:
        TypeError: it is not; ``parameter`` begins the message.
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(
            f"{parameter} must be a sync callable {shape}, not {function!r}; of a class, an instance"
        )
    if any(is_async(part) for part in (function, type(function).__call__) for is_async in _ASYNC):
        raise TypeError(f"{parameter} must be sync, but {function!r} is async, and nobody would await it")
    try:
        check_arguments(function, shape)
    except TypeError as error:
        raise TypeError(f"{parameter} {function!r} can't be used: {error}") from None


def check_observers(observers: Any) -> tuple[Observer, ...]:
    """Return the observers of a pipeline as a tuple.

    Raises:
        TypeError: they are no list of sync callables ``(event)``.
    """
    if callable(observers) or isinstance(observers, str) or not isinstance(observers, Iterable):
        raise TypeError(
            f"observers must be a list of callables, not {observers!r}; write observers=[observer]"
        )
    checked = tuple(observers)
    for observer in checked:
        check_callback("an observer", "observer(event)", observer)
    return checked


async def fire(
    hook: Hook, context: object, stage_name: str, *args: Any, on_hook_error: OnHookError | None = None
) -> None:
    """Call a hook if there is one, await what it returns if that is awaitable, and report its exception."""
    function, wants = hook
    if function is None:
        return
    try:
        result = function(stage_name, *args, *((context,) if wants else ()))
        if result is not None and is_awaitable(result):
            await result
    except Exception as error:
        report(function, f"stage {stage_name!r}", error, on_hook_error)


def report(
    hook: Callable[..., Any],
    where: str,
    error: Exception,
    on_hook_error: OnHookError | None = None,
    what: str = "Hook",
) -> None:
    """Log an exception of a hook or an observer with its traceback, or hand it to ``on_hook_error``."""
    if on_hook_error is None:
        logger.error("%s %r failed at %s; the run goes on", what, hook, where, exc_info=error)
    else:
        on_hook_error(error)
