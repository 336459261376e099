"""A job that this process runs: what only its runner and its handlers need to know."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import replace
from datetime import datetime
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import TYPE_CHECKING, Any

from .context import check_arguments
from .errors import Finish
from .pipeline import Pipeline
from .types import Step

if TYPE_CHECKING:
    from ._jobs_progress import Measure
    from .jobs import Job, JobContext

__all__ = ["JobRun", "check_job_context", "current"]

current: ContextVar["JobRun"] = ContextVar("async_pipeline_job")


class JobRun:
    """A job of this process, until its end is known to everybody."""

    def __init__(
        self,
        job: "Job",
        step: Step[Any, Any],
        value: Any,
        context: Any,
        timeout: float | None,
        clock: Callable[[], datetime],
    ) -> None:
        self.job = job
        self.step = step
        self.value = value
        self.context = context
        self.timeout = timeout
        self.variables: Context = copy_context()
        self.task: asyncio.Task[None] | None = None
        self.is_job = True  # to others; not yet, while the caller of JobRunner.run waits for it
        self.is_counted = False  # among those of which only so many may run
        self.is_dismissed = False
        self.is_ending = False  # its handlers are done, so there is nothing left to cancel
        self.is_unsaved = False
        self.lock = asyncio.Lock()  # who writes to the store
        self.measure: Measure | None = None
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._changed: asyncio.Event | None = None
        self._reports: deque[tuple[float, str | None]] = deque()  # of threads

    async def run_in(self, job_context: "JobContext | None") -> Any:
        """Run the step, in what ``job_context`` makes of the context."""
        if job_context is None:
            return await self._run_step(self.context)
        result = None  # of a run whose error the context manager swallows
        async with _entered(job_context, self.context) as context:
            result = await self._run_step(context)
        return result  # noqa: RET504 - reached with None as well

    async def _run_step(self, context: Any) -> Any:
        step: Any = self.step
        try:
            if self.timeout is None:
                return await step.run(self.value, context=context)
            if type(step).run is not Pipeline.run:
                step = Pipeline([step], name=step.name)
            return await step.run(self.value, context=context, timeout=self.timeout)
        except Finish as finish:
            return finish.value

    def update(self, **changes: Any) -> None:
        self.publish(self.changed(**changes))

    def changed(self, **changes: Any) -> "Job":
        return replace(self.job, **{"updated": self._clock()} | changes)

    def publish(self, job: "Job") -> None:
        self.job = job
        self.is_unsaved = True
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def change(self) -> None:
        """Wait for the next one."""
        if self._changed is None:
            self._changed = asyncio.Event()
        await self._changed.wait()

    async def end(self) -> "Job":
        while self.job.finished is None:
            await self.change()
        return self.job

    def report(self, fraction: float, message: str | None) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is self._loop:
            self._report(fraction, message)
            return
        self._reports.append((fraction, message))
        with suppress(RuntimeError):  # a thread that outlives the loop is not heard
            self._loop.call_soon_threadsafe(self.hear)

    def hear(self) -> None:
        """Take into account what threads have reported; before their result is, which can be faster."""
        while self._reports:
            self._report(*self._reports.popleft())

    def _report(self, fraction: float, message: str | None) -> None:
        if self.is_ending:
            return
        if self.measure is not None:
            self.measure.report(fraction)
            fraction = self.measure.fraction
        if message is not None and message != self.job.message:
            self.update(message=message, progress=self._percent(fraction))
        else:
            self.advance_to(fraction)

    def advance_to(self, fraction: float) -> None:
        progress = self._percent(fraction)
        if progress > self.job.progress and not self.is_ending:
            self.update(progress=progress)

    def _percent(self, fraction: float) -> int:
        return max(self.job.progress, min(100, int(100 * fraction + 1e-9)))


# -- the context of a run


_WRITE_SO = (
    "decorate an async function that yields the context of the run with @contextlib.asynccontextmanager"
)


def check_job_context(job_context: Any) -> None:
    if isasyncgenfunction(job_context) or iscoroutinefunction(job_context) or not callable(job_context):
        raise TypeError(
            f"job_context must be a callable (context) that returns an async context manager, not "
            f"{job_context!r}; {_WRITE_SO}"
        )
    try:
        check_arguments(job_context, "job_context(context)")
    except TypeError as error:
        raise TypeError(f"job_context {job_context!r} can't be used: {error}") from None


def _entered(job_context: "JobContext", context: Any) -> AbstractAsyncContextManager[Any]:
    manager = job_context(context)
    if not hasattr(type(manager), "__aenter__"):
        raise TypeError(
            f"job_context {job_context!r} must return an async context manager, not {manager!r}; {_WRITE_SO}"
        )
    return manager
