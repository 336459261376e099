"""Every error that the library raises on purpose.

Each is a :class:`PipelineError` or a :class:`TimeoutError`, builds its own message, and survives
``pickle`` and ``copy`` with its attributes and its ``__cause__``.
"""

import copy
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["BatchError", "DeadlockError", "PipelineError", "StageExecutionError", "StageTimeoutError"]


class PipelineError(Exception):
    """The base class of the library's own errors; catch it to catch them all but the timeouts."""


class StageExecutionError(PipelineError):
    """A stage failed, and no attempt was left.

    Look at ``original_error`` (also the ``__cause__``) for what went wrong in the handler.

    Attributes:
        stage_name: the stage's name; ``outer/inner`` for a stage of a nested pipeline.
        original_error: the handler's last error; a :class:`StageTimeoutError` when its time ran out;
            in a batch also a :class:`asyncio.CancelledError` that nobody asked for.
        attempts: how many attempts were made, the first included.
        item_index: in a batch, the item's index, counted from 0; else ``None``.
        item: in a batch, the item; else ``None``.
    """

    def __init__(self, stage_name: str, original_error: BaseException, *, attempts: int = 1) -> None:
        super().__init__(_stage_message(stage_name, original_error))
        self.stage_name = stage_name
        self.original_error = original_error
        self.attempts = attempts
        self.item_index: int | None = None
        self.item: Any = None

    def within(self, outer: str) -> "StageExecutionError":
        """Return a copy that names the stage as part of ``outer``, the pipeline around it."""
        error = copy.copy(self)
        error.stage_name = f"{outer}/{self.stage_name}"
        error.args = (_stage_message(error.stage_name, self.original_error),)
        return error

    def of_item(self, index: int, item: object) -> "StageExecutionError":
        """Return the error with the batch's ``item_index`` and ``item``; a copy if it had others already."""
        # one error raised for two items (kept by a middleware, say) must not name the second one twice
        error = self if self.item_index is None else copy.copy(self).with_traceback(self.__traceback__)
        error.item_index, error.item = index, item
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _stage_message(stage_name: str, original_error: BaseException) -> str:
    try:
        return f"Stage {stage_name!r} failed: {original_error!r}"
    except Exception:  # an error that can't be shown must not hide that it happened
        return f"Stage {stage_name!r} failed: {type(original_error).__name__}"


def _rebuild(
    cls: type[StageExecutionError], args: tuple[Any, ...], state: dict[str, Any]
) -> StageExecutionError:
    # neither pickle nor copy keeps __cause__, and a subclass may have another __init__
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    error.__cause__ = error.original_error
    return error


def _state(error: BaseException) -> dict[str, Any]:
    """What pickle and copy set after the constructor ran: all attributes, the notes and the cause."""
    return error.__dict__ | {"__cause__": error.__cause__}


class StageTimeoutError(TimeoutError):
    """An attempt took longer than its stage's ``timeout``; give the stage more time, or retry it.

    Only the library raises it, so a :class:`TimeoutError` of the handler's own stays distinguishable.

    Attributes:
        timeout: the stage's timeout in seconds.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(f"no result within the stage's timeout of {timeout} s")
        self.timeout = timeout

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.timeout,), _state(self)


class BatchError(ExceptionGroup[Exception], PipelineError):
    """Items of a ``map`` failed; the first failure cancelled those that were still running.

    Works with ``except*``. Each error in the group is an item's :class:`StageExecutionError`, or what a
    middleware raised. Pass ``return_exceptions=True`` to ``map`` to have every item run instead.

    Attributes:
        results: the results of the items that had finished, by item index.
        failures: the errors, by item index. A part of the group that ``except*`` or ``split`` takes out
            keeps the ``results`` and ``failures`` of the whole batch.
    """

    failures: dict[int, Exception]
    results: dict[int, Any]

    def __new__(
        cls,
        failures: Mapping[int, Exception],
        results: Mapping[int, Any],
        exceptions: Sequence[Exception] | None = None,
    ) -> "BatchError":
        error = super().__new__(cls, _batch_message(failures), exceptions or list(failures.values()))
        error.failures = dict(failures)
        error.results = dict(results)
        return error

    def __init__(
        self,
        failures: Mapping[int, Exception],
        results: Mapping[int, Any],
        exceptions: Sequence[Exception] | None = None,
    ) -> None:
        super().__init__(_batch_message(failures), exceptions or list(failures.values()))

    def derive(self, excs: Sequence[Exception], /) -> "BatchError":  # type: ignore[override]
        return BatchError(self.failures, self.results, excs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failures, self.results, list(self.exceptions)), _state(self)


def _batch_message(failures: Mapping[int, Exception]) -> str:
    shown = ", ".join(map(str, sorted(failures)[:5])) + (", …" if len(failures) > 5 else "")
    return f"item {shown} failed" if len(failures) == 1 else f"{len(failures)} items failed: {shown}"


class DeadlockError(PipelineError):
    """Under a :class:`~async_pipeline.testing.VirtualClockLoop`, every task waits for ever.

    Nothing is ready, no timer is set, and no executor call or socket could wake a task: on a real loop
    this program would hang. The message lists the tasks and where they wait.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__("every task waits, and nothing is left that could wake one:\n" + "\n".join(tasks))
        self.tasks: tuple[str, ...] = tuple(tasks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tasks,), _state(self)


_WHERE = "_async_pipeline_stage"


def mark_cancelled(error: CancelledError, stage_name: str, *, nested: bool) -> None:
    """Note on a cancellation which stage it left, for the case that a batch has to report it as a failure."""
    inner = getattr(error, _WHERE, None) if nested else None
    setattr(error, _WHERE, f"{stage_name}/{inner}" if inner else stage_name)


def cancelled_in(error: CancelledError, default: str) -> str:
    """Return the stage that the cancellation left; ``default`` when it left none."""
    return str(getattr(error, _WHERE, default))
