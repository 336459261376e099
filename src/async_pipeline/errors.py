"""Every error that the library raises on purpose, and :class:`Finish`, which is none.

Each is a :class:`PipelineError` or a :class:`TimeoutError`, builds its own message, and survives
``pickle`` and ``copy`` with its attributes and its ``__cause__``.
"""

from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

__all__ = [
    "BatchError",
    "CircuitOpenError",
    "DeadlineExceeded",
    "DeadlockError",
    "DuplicateJob",
    "EngineError",
    "Finish",
    "JobNotFound",
    "JobQueueFull",
    "JobRunnerClosed",
    "JournalBusy",
    "JournalError",
    "JournalMismatch",
    "MissingFieldsError",
    "PipelineError",
    "RecordedError",
    "StageExecutionError",
    "StageTimeoutError",
    "WorkerLost",
]


class PipelineError(Exception):
    """The base class of the library's own errors; catch it to catch them all but the timeouts."""


class StageExecutionError(PipelineError):
    """A stage failed, and no attempt was left.

    Look at ``original_error`` (also the ``__cause__``) for what went wrong in the handler.

    Attributes:
        stage_name: the stage's name; ``outer/inner`` for a stage of a nested pipeline.
        original_error: the handler's last error; a :class:`StageTimeoutError` when an attempt's time ran
            out, a :class:`DeadlineExceeded` when the run's did; in a batch also an
            :class:`asyncio.CancelledError` that nobody asked for.
        attempts: how many attempts were made, the first included; more than one are noted below the
            message in a traceback.
        item_index: in a batch, the item's index, counted from 0; else ``None``.
        item: in a batch, the item; else ``None``.
        element: inside ``each`` and ``keep``, the element's index, counted from 0, in a tuple: inside two
            of them there are two; else ``()``.
        earlier: from ``fallback``, the errors of the steps that were tried before; else ``()``.
    """

    def __init__(self, stage_name: str, original_error: BaseException, *, attempts: int = 1) -> None:
        super().__init__(_stage_message(stage_name, original_error))
        self.stage_name = stage_name
        self.original_error = original_error
        self.attempts = attempts
        self.item_index: int | None = None
        self.item: Any = None
        self.element: tuple[int, ...] = ()
        self.earlier: tuple[StageExecutionError, ...] = ()
        self._is_joint = False  # the original error is a group of errors of steps inside this one
        if attempts > 1:
            self.add_note(f"after {attempts} attempts")

    @classmethod
    def joint(cls, stage_name: str, failures: "Sequence[StageExecutionError]") -> "StageExecutionError":
        """Return the failure of the step ``stage_name`` in which several others failed at the same time.

        Its ``original_error`` is an :class:`ExceptionGroup` of these ``failures``.
        """
        error = cls(stage_name, ExceptionGroup(f"{len(failures)} failed", failures))
        error.__cause__ = error.original_error
        error._is_joint = True
        return error

    def after(self, earlier: "Sequence[StageExecutionError]", outer: str) -> "StageExecutionError":
        """Return the error, which now carries those of the steps tried ``earlier`` in the step ``outer``."""
        self.earlier = (*earlier, *self.earlier)
        for failure in earlier:
            # by the names inside that step: those around it are not known yet
            tried = failure.stage_name[len(outer) + 1 :]
            self.add_note(f"after {_stage_message(tried, failure.original_error)}")
        return self

    def within(
        self, outer: str, rename: Callable[[str], str] = str, element: tuple[int, ...] = ()
    ) -> "StageExecutionError":
        """Return a copy that names the stage as part of ``outer``, the step around it.

        Args:
            outer: the name of the step around it.
            rename: what the path so far becomes there; it stays what it is by default.
            element: the index of the element that it ran for there.
        """

        def moved(error: StageExecutionError) -> StageExecutionError:
            return error.within(outer, rename, element)

        return self._copy(f"{outer}/{rename(self.stage_name)}", (*element, *self.element), moved)

    def is_of_item(self, index: int, item: object) -> bool:
        """Tell whether it has this ``index`` as its ``item_index``, and this ``item``, already."""
        return self.item_index == index and self.item is item

    def of_item(self, index: int, item: object) -> "StageExecutionError":
        """Return the error with this ``index`` and ``item`` of the batch; a copy if it had others already."""
        # one error raised for two items (kept by a middleware, say) must not name the second one twice
        error = self if self.item_index is None else self._twin().with_traceback(self.__traceback__)
        error._set_item(index, item)
        return error

    def _set_item(self, index: int, item: object) -> None:
        self.item_index, self.item = index, item
        joined = cast(Any, self.original_error).exceptions if self._is_joint else ()
        for part in (*joined, *self.earlier):
            part._set_item(index, item)

    def _twin(self) -> "StageExecutionError":
        return self._copy(self.stage_name, self.element, StageExecutionError._twin)

    def _copy(
        self,
        stage_name: str,
        element: tuple[int, ...],
        copy_part: "Callable[[StageExecutionError], StageExecutionError]",
    ) -> "StageExecutionError":
        # not by copy.copy(), of which tblib, which Dask loads, makes one that shares the notes
        error = _rebuild(type(self), self.args, self.__dict__)
        error.stage_name, error.element = stage_name, element
        error.earlier = tuple(map(copy_part, self.earlier))
        if self._is_joint:
            group = cast("ExceptionGroup[StageExecutionError]", self.original_error)
            error.original_error = group.derive([*map(copy_part, group.exceptions)])  # type: ignore[arg-type]
            error.__cause__ = error.original_error
        error.args = (_stage_message(stage_name, error.original_error),)
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
    if "__notes__" in state:
        error.__notes__ = list(state["__notes__"])  # or a note on a copy would be one on the original
    error.__cause__ = error.original_error
    return error


def _state(error: BaseException) -> dict[str, Any]:
    """What pickle and copy set after the constructor ran: all attributes, the notes and the cause."""
    return error.__dict__ | {"__cause__": error.__cause__}


class _TimeoutError(TimeoutError):
    _whose = ""

    def __init__(self, timeout: float) -> None:
        super().__init__(f"no result within the {self._whose} timeout of {timeout} s")
        self.timeout = timeout

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.timeout,), _state(self)


class StageTimeoutError(_TimeoutError):
    """An attempt took longer than its stage's ``timeout``; give the stage more time, or retry it.

    Only the library raises it, so a :class:`TimeoutError` of the handler's own stays distinguishable.

    Attributes:
        timeout: the stage's timeout in seconds.
    """

    _whose = "stage's"


class DeadlineExceeded(_TimeoutError):  # noqa: N818 - the name it has in gRPC
    """A run took longer than the ``timeout`` it was given, over all its stages, attempts and sleeps.

    It is the ``original_error`` of a :class:`StageExecutionError` that names the stage in which the time
    ran out. Inside the run it looks like a cancellation, so no retry and no ``on_error`` outlives it.

    Attributes:
        timeout: the run's timeout in seconds.
    """

    _whose = "run's"


class CircuitOpenError(PipelineError):
    """A stage was not called, because it has failed too often; try again later.

    From :class:`~async_pipeline.middlewares.CircuitBreakerMiddleware`.

    Attributes:
        stage_name: the stage.
        retry_after: seconds until the circuit lets a call through; 0 while another call is trying it.
    """

    def __init__(self, stage_name: str, retry_after: float) -> None:
        wait = f"for another {retry_after:.3g} s" if retry_after > 0 else "until the call that tries it ends"
        super().__init__(f"the circuit of stage {stage_name!r} is open {wait}")
        self.stage_name = stage_name
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stage_name, self.retry_after), _state(self)


class MissingFieldsError(PipelineError):
    """A value lacks fields that a step after it needs; from :func:`~async_pipeline.require`.

    Attributes:
        fields: the names of all that are missing.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        super().__init__(f"missing {', '.join(map(repr, fields))}")
        self.fields: tuple[str, ...] = tuple(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fields,), _state(self)


class BatchError(ExceptionGroup[Exception], PipelineError):
    """Items of a ``map`` failed; the first failure cancelled those that were still running.

    Works with ``except*``. Each error in the group is an item's :class:`StageExecutionError`, or what a
    middleware raised. Pass ``return_exceptions=True`` to ``map`` to have every item run instead.

    Attributes:
        results: the results of the items that had finished, by item index.
        failures: the errors, by item index. A part of the group that ``except*`` or ``split`` takes out
            keeps the ``results`` and ``failures`` of the whole batch.
        exceptions: the same errors, in a tuple, as any :class:`ExceptionGroup` has them.
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

    Attributes:
        tasks: the ``repr`` of each task that waits.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__("every task waits, and nothing is left that could wake one:\n" + "\n".join(tasks))
        self.tasks: tuple[str, ...] = tuple(tasks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tasks,), _state(self)


class DuplicateJob(PipelineError):  # noqa: N818 - like the names of the other errors of jobs
    """There is a job of this id already; submit with another ``job_id``, or without one.

    Attributes:
        job_id: the id.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is a job {job_id!r} already")
        self.job_id = job_id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.job_id,), _state(self)


class JobNotFound(PipelineError):  # noqa: N818
    """There is no job of this id: there never was, or it was removed a while after it had finished.

    Attributes:
        job_id: the id.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}, or no longer")
        self.job_id = job_id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.job_id,), _state(self)


class JobQueueFull(PipelineError):  # noqa: N818
    """As many jobs wait as may; submit again later.

    Attributes:
        max_pending: how many jobs of the runner may wait.
    """

    def __init__(self, max_pending: int) -> None:
        super().__init__(f"{max_pending} jobs wait already, which is max_pending; submit again later")
        self.max_pending = max_pending

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_pending,), _state(self)


class JobRunnerClosed(PipelineError):  # noqa: N818
    """The runner accepts no jobs: it was not entered, or it is being closed.

    It also is the ``type`` of the failure of a job that was cut short because its runner was closed.
    """

    def __init__(self) -> None:
        super().__init__(
            "the JobRunner is not running; use it inside 'async with runner:', "
            "or in the lifespan of the application (that of a mounted one is not run)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), _state(self)


class JournalError(PipelineError):
    """A journal can't be used: its file is damaged, foreign or can't be written, or the disk is full.

    It ends the whole batch: what the journal holds stays there, and the same call resumes it when the reason
    is gone. The message says what to do.
    """


class JournalBusy(JournalError):  # noqa: N818 - like the names of the other errors that tell a state
    """Another batch uses the journal's file, in this process or in another one; only one may at a time.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(
            f"another batch uses the journal {path!r} at this moment; wait until it has ended, "
            "or give each batch a file of its own"
        )
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,), _state(self)


class JournalMismatch(JournalError):  # noqa: N818
    """What a journal holds under this ``run_id`` belongs to other items, or to another pipeline."""


class EngineError(PipelineError):
    """An engine can't run the batch: its broker or its results can't be reached, or no worker answers.

    It ends the whole batch. The message says what to do.
    """


class WorkerLost(PipelineError):  # noqa: N818
    """The worker that ran an item died, and so did the next one.

    It is the ``original_error`` of the item's :class:`StageExecutionError`. Which stage it was can't be
    known, so that names the pipeline.

    Args:
        message: what to say; by default that each worker that ran it has died.
    """

    def __init__(self, message: str = "each worker that ran it has died") -> None:
        super().__init__(message)


class RecordedError(PipelineError):
    """An error that was raised in another process, or in an earlier run, and came here as text.

    It stands in for one of a class that is neither Python's own nor this library's: nothing is imported
    because a text says so.

    Attributes:
        type: the class that it was of, like ``"shop.api:NotFound"``.
        message: its text.
    """

    def __init__(self, type: str, message: str) -> None:
        super().__init__(f"{type}: {message}" if message else type)
        self.type = type
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedError, (self.type, self.message), _state(self)


class Finish(BaseException):
    """Raise it in a handler to end the run now, with ``value`` as its result.

    >>> def known(user):
    ...     if user["id"] in seen:
    ...         raise Finish(user)                   # no further stage runs, and nothing has failed

    It ends the whole run of the item from any depth, cancels what runs beside it, and is neither retried
    nor cached nor seen by ``on_error``; hooks see ``value`` as the stage's output. It is a
    ``BaseException``, so that no ``except Exception`` on its way takes it for an error. A task of a
    ``TaskGroup`` in the handler may raise it, too; together with errors of others it is a group as any
    other. ``Stage.run``, ``Pipeline.run`` and a step with a ``run`` of its own that calls one of these
    return the value.

    Attributes:
        value: the result of the run, or in ``map`` and ``stream`` of the item; ``None`` by default.
    """

    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.value = value


def is_finish(ended: BaseException) -> bool:
    """Tell whether it is a :class:`Finish`, or a group of nothing else, as a TaskGroup makes one."""
    return isinstance(ended, Finish) or (
        isinstance(ended, BaseExceptionGroup) and ended.split(Finish)[1] is None
    )


def finish_of(ended: BaseException) -> Finish:
    """Return what :func:`is_finish` has seen; of a group, one like the first."""
    leaf = ended
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    # not the leaf itself: it would be raised while the group is handled, so each would hold the other
    return cast(Finish, ended) if leaf is ended else Finish(cast(Finish, leaf).value)


def behind(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """Return the error itself, or the first one in the chain behind it, that is of a kind."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop()
        if isinstance(current, kind):
            return current
        seen.add(id(current))
        links = (current.__context__, current.__cause__)
        waiting += [link for link in links if link is not None and id(link) not in seen]
    return None


_WHERE = "_async_pipeline_stage"


def mark_cancelled(error: CancelledError, stage_name: str, attempts: int = 1) -> None:
    """Note on a cancellation which stage it left, in case that it has to be reported as a failure."""
    setattr(error, _WHERE, (stage_name, attempts))


def cancelled_in(error: CancelledError) -> tuple[str, int] | None:
    """Return the path of the stage that the cancellation left, and the attempts made there, if noted."""
    where: tuple[str, int] | None = getattr(error, _WHERE, None)
    return where


def mark_within(error: CancelledError, outer: str) -> None:
    """Let the mark of a cancellation, if it has one, name the stage as part of ``outer``."""
    path, attempts = cancelled_in(error) or ("", 1)
    if path:
        mark_cancelled(error, f"{outer}/{path}", attempts)
