"""Runs that outlive the call that asked for them.

>>> async with JobRunner(concurrency=10) as jobs:          # in the lifespan of a web application, say
...     job = await jobs.submit(pipeline, value)           # accepted; it runs in the background
...     async for job in jobs.watch(job.id):               # or: job = await jobs.get(job.id)
...         print(job.status, job.progress, job.message)
"""

import asyncio
import builtins
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from inspect import iscoroutine
from typing import Any, Literal, Protocol, Self, get_args
from uuid import uuid4

from ._jobs_progress import observed
from ._jobs_run import JobRun, check_job_context, current
from .errors import (
    DuplicateJob,
    JobNotFound,
    JobQueueFull,
    JobRunnerClosed,
    StageExecutionError,
)
from .events import logger
from .retry import check_count, check_seconds
from .stage import as_step
from .types import Step
from .waiting import until_ended

__all__ = [
    "Job",
    "JobContext",
    "JobFailure",
    "JobRunner",
    "JobStatus",
    "JobStore",
    "MemoryJobStore",
    "report_progress",
    "with_progress",
]

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
"""What has become of a job; the last three are ends."""

JobContext = Callable[[Any], AbstractAsyncContextManager[Any]]
"""``(context)``, returning an async context manager that yields the context of the job's run."""


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job failed, as data, so that it can be stored; the exception itself is logged.

    Attributes:
        type: the class name of what the handler raised, like ``"ValueError"``; ``"JobRunnerClosed"`` if
            the runner was closed before the job had ended, ``"WorkerLost"`` if its process has died.
        message: its text.
        stage: the path of the stage, like ``"enrich/price"``; ``None`` if it was in none.
        attempts: how many attempts were made there.
    """

    type: str
    message: str
    stage: str | None = None
    attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is known of a job at one moment; ask the runner again for a later one.

    Attributes:
        id: what the job is called.
        pipeline: the name of its pipeline.
        status: ``"accepted"`` (it waits for its turn), ``"running"``, ``"successful"``, ``"failed"`` or
            ``"dismissed"``.
        progress: 0 to 100; it never goes back.
        message: the last message of :func:`report_progress`.
        created: when it was accepted; like all times aware, in UTC.
        updated: when anything of this has changed last.
        started: when it began to run.
        finished: when it ended, in whatever way; ``None`` until then, and only until then.
        result: what the pipeline has returned.
        error: why it failed.
    """

    id: str
    pipeline: str
    status: JobStatus = "accepted"
    progress: int = 0
    message: str | None = None
    created: datetime
    updated: datetime
    started: datetime | None = None
    finished: datetime | None = None
    result: Any = None
    error: JobFailure | None = None


class JobStore(Protocol):
    """Where a runner keeps its jobs; one store belongs to one runner at a time."""

    is_shared: bool
    """Whether the jobs of other processes can be met in it, and they can meet ours."""

    async def open(self) -> None:
        """Begin; called before anything else, and again after an :meth:`aclose`."""

    async def aclose(self) -> None:
        """Finish what was asked for, and let everything go but the jobs."""

    async def add(self, job: Job) -> None:
        """Add a new job of this process; raise :class:`DuplicateJob` if its id is taken."""

    async def save(self, job: Job) -> None:
        """Replace a job that this process has added, unless it was removed meanwhile.

        Raises:
            TypeError, ValueError: its result can't be stored; then nothing is changed.
        """

    async def get(self, job_id: str) -> Job | None:
        """Return the job of this ``job_id``, whoever has added it; ``None`` if there is none."""

    async def remove(self, job_id: str) -> None:
        """Remove the job of this ``job_id``, if there is one."""

    async def evict(self, *, before: datetime, keep: int) -> None:
        """Remove what has finished before, and all finished ones but the ``keep`` that finished last."""

    async def ask_to_dismiss(self, job_id: str) -> None:
        """Note that the process that runs the job of this ``job_id`` is to dismiss it."""

    async def asked_to_dismiss(self) -> builtins.list[str]:
        """Return the ids of the unfinished jobs of this process of which that was noted."""

    async def list(
        self, *, limit: int, offset: int, status: Collection[str] | None, pipeline: Collection[str] | None
    ) -> builtins.list[Job]:
        """Return at most ``limit`` jobs, the newest first, without the first ``offset`` of them.

        ``None`` stands for every ``status``, and for every ``pipeline``.
        """


class MemoryJobStore:
    """Keeps the jobs in this process; the default of :class:`JobRunner`."""

    is_shared = False

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._finished: dict[str, Job] = {}  # in the order in which they finished

    async def open(self) -> None:
        """Begin."""

    async def aclose(self) -> None:
        """End; the jobs stay."""

    async def add(self, job: Job) -> None:
        """Add a new job; raise :class:`DuplicateJob` if its id is taken."""
        if job.id in self._jobs:
            raise DuplicateJob(job.id)
        self._jobs[job.id] = job

    async def save(self, job: Job) -> None:
        """Replace a job, unless it was removed meanwhile."""
        if job.id in self._jobs:
            self._jobs[job.id] = job
            if job.finished is not None:
                self._finished[job.id] = job

    async def get(self, job_id: str) -> Job | None:
        """Return a job."""
        return self._jobs.get(job_id)

    async def remove(self, job_id: str) -> None:
        """Remove a job, if there is one."""
        self._jobs.pop(job_id, None)
        self._finished.pop(job_id, None)

    async def evict(self, *, before: datetime, keep: int) -> None:
        """Remove what has finished before, and all finished ones but the ``keep`` that finished last."""
        while self._finished:
            oldest = next(iter(self._finished.values()))
            if len(self._finished) <= keep and (oldest.finished is None or oldest.finished >= before):
                return
            await self.remove(oldest.id)

    async def ask_to_dismiss(self, job_id: str) -> None:
        """Do nothing: there is no other process."""

    async def asked_to_dismiss(self) -> builtins.list[str]:
        """Return nothing: there is no other process."""
        return []

    async def list(
        self, *, limit: int, offset: int, status: Collection[str] | None, pipeline: Collection[str] | None
    ) -> builtins.list[Job]:
        """Return jobs, the newest first."""
        wanted = (
            job
            for job in reversed(self._jobs.values())
            if (status is None or job.status in status) and (pipeline is None or job.pipeline in pipeline)
        )
        return [job for number, job in zip(range(offset + limit), wanted, strict=False) if number >= offset]


# -- how far a job is


def report_progress(fraction: float, message: str | None = None) -> None:
    """Tell the job in which this is called how far it is; outside a job, do nothing.

    >>> async def download(urls):
    ...     for done, url in enumerate(urls):
    ...         report_progress(done / len(urls), f"fetching {url}")
    ...         ...

    May be called from a handler with ``executor=`` in a thread as well; in another process it does nothing.

    Args:
        fraction: from 0 to 1, of the stage in which it is called: halfway through the second of two
            stages, the job is at 75. In :func:`~async_pipeline.each` and ``keep`` the elements that are
            done count instead.
        message: what to show; ``None`` leaves the last one.

    Raises:
        TypeError: the fraction is no number, or the message no text.
        ValueError: the fraction is not from 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, not {fraction!r}; write done / total")
    if not (message is None or isinstance(message, str)):
        raise TypeError(f"message must be a str, not {message!r}")
    run = current.get(None)
    if run is not None:
        run.report(float(fraction), message)


def with_progress(step: Step[Any, Any]) -> Step[Any, Any]:
    """Return a pipeline like this one, which tells the job that runs it how many of its stages are done.

    :meth:`JobRunner.submit` does so itself; this is for a step of your own around a pipeline:

    >>> class Imported:
    ...     name = "import"
    ...     pipeline = with_progress(parse | save)
    ...     async def run(self, value, *, context=None):
    ...         async with transaction():
    ...             return await self.pipeline.run(value, context=context)

    An ``each`` or a ``keep`` becomes a pipeline of it. Any other step is returned as it is, and so is a
    pipeline of a subclass with a ``run`` of its own.
    """
    return observed(step)


# -- the runner

_POLL = 0.2  # seconds between two looks at what other processes have written
_RETRY = 1.0  # seconds until a store that has failed is tried again
_STATUSES: tuple[str, ...] = get_args(JobStatus)


class JobRunner:
    """Runs pipelines in the background, and knows what has become of them.

    >>> async with JobRunner() as jobs:
    ...     job = await jobs.submit(pipeline, value)

    It is an async context manager, for a lifespan: entered, it accepts jobs; left, it accepts no more, waits
    ``drain`` seconds, and cancels those that run or wait still, which then are ``"failed"`` with the type
    ``"JobRunnerClosed"``. Left by an exception or a cancellation, it does not wait. It may be entered again
    afterwards. An exception of a job is logged with its traceback to the logger ``async_pipeline``.

    Times are those of the event loop's clock, from the wall clock's time at which the runner was entered.

    Args:
        concurrency: how many jobs run at the same time at most; 10 by default.
        max_pending: how many may wait for their turn; 1000 by default.
        ttl: seconds for which a job is kept after its end; 3600 by default.
        keep: how many that have ended are kept at most, the latest; 1000 by default.
        drain: seconds that leaving waits for the jobs; 10 by default.
        store: where the jobs are kept: a :class:`JobStore`; in memory by default.
        job_context: a callable ``(context)`` that returns an async context manager, for what a job needs as
            long as it runs, like a session: what belongs to the request that has submitted it is closed by
            then. It is called with the ``context`` of :meth:`submit` and entered in the job before the first
            stage; what it yields is the context of the run. It sees the exception or the cancellation with
            which the run ends. ``None`` by default.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        concurrency: int = 10,
        max_pending: int = 1000,
        ttl: float = 3600,
        keep: int = 1000,
        drain: float = 10,
        *,
        store: JobStore | None = None,
        job_context: JobContext | None = None,
    ) -> None:
        check_count("concurrency", concurrency, least=1, message="concurrency must be at least 1")
        for parameter, count in (("max_pending", max_pending), ("keep", keep)):
            message = f"{parameter} must be greater than or equal to 0"
            check_count(parameter, count, least=0, message=message)
        check_seconds("ttl", ttl, zero=True)
        check_seconds("drain", drain, zero=True)
        if job_context is not None:
            check_job_context(job_context)
        self._concurrency = concurrency
        self._max_pending = max_pending
        self._ttl = ttl
        self._keep = keep
        self._drain = drain
        self._store: JobStore = MemoryJobStore() if store is None else _checked_store(store)
        self._job_context = job_context
        self._is_open = self._is_entered = self._was_entered = False
        self._runs: dict[str, JobRun] = {}  # the jobs that have not ended
        self._pending: dict[str, JobRun] = {}  # those of them that wait, in order
        self._running: set[JobRun] = set()  # with those that are no jobs for others yet
        self._jobs_running = 0  # without them
        self._adding: set[str] = set()  # the ids of jobs that the store is being given
        self._errands: set[asyncio.Task[None]] = set()
        self._eviction: asyncio.TimerHandle | None = None
        self._poller: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise RuntimeError("the JobRunner is entered already; share the one, or make another")
        self._is_entered = True
        self._loop = asyncio.get_running_loop()
        try:
            await self._store.open()
        except BaseException:
            self._is_entered = False
            raise
        self._epoch = datetime.now(UTC) - timedelta(seconds=self._loop.time())
        self._is_open = self._was_entered = True
        self._idle, self._cut = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._last_end = self._loop.time()
        if self._store.is_shared:
            self._poller = self._loop.create_task(self._poll(), name="JobRunner's polling")
        return self

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        self._is_open = False
        try:
            if kind is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._drain):
                        await self._idle.wait()
        finally:
            try:
                await self._cut_short()
            finally:
                self._is_entered = False

    async def submit(
        self,
        pipeline: Step[Any, Any] | Callable[..., Any],
        value: Any,
        *,
        context: Any = None,
        job_id: str | None = None,
        timeout: float | None = None,
    ) -> Job:
        """Accept a job, and return it at once; it runs when its turn comes, in the order of acceptance.

        It sees the caller's context variables as they are now.

        Args:
            pipeline: the pipeline, or any other step. A handler that is a plain ``def`` runs on the event
                loop; ``Stage("save", save, executor="thread")`` keeps a slow one off it.
            value: its input.
            context: the object that its handlers share; a new dict by default. It must live as long as the
                job; see ``job_context`` for what does not.
            job_id: what to call it; a UUID by default.
            timeout: seconds for the run once it has begun, as in
                :meth:`Pipeline.run <async_pipeline.Pipeline.run>`; ``None`` for no limit.

        Raises:
            DuplicateJob: there is a job of this id already.
            JobQueueFull: as many as ``max_pending`` wait already.
            JobRunnerClosed: the runner was not entered, or is being left.
            TypeError, ValueError: an argument that can't be used.
        """
        run = self._new_run(pipeline, value, context, job_id, timeout)
        waiting = len(self._pending) + len(self._adding) - max(0, self._concurrency - self._jobs_running)
        if waiting >= self._max_pending:
            raise JobQueueFull(self._max_pending)
        await self._add(run)
        if self._cut.is_set():
            self._run_errand(self._end(run, _closed(run.job)))
            self._look_whether_idle()
            raise JobRunnerClosed
        self._pending[run.job.id] = run
        self._start_pending()
        return run.job

    async def run(
        self,
        pipeline: Step[Any, Any] | Callable[..., Any],
        value: Any,
        *,
        context: Any = None,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> Job:
        """Run at once, beside the queue, and return the job when it has ended, or after ``wait`` seconds.

        What ends in time is nobody else's: it is not in the store, and does not count as running. What
        takes longer goes on as a job like those of :meth:`submit`, and is returned as it is then. If the
        caller is cancelled before that, so is the run.

        Args:
            pipeline: the pipeline, or any other step.
            value: its input.
            context: the object that its handlers share; a new dict by default.
            timeout: seconds for the run, as in :meth:`Pipeline.run <async_pipeline.Pipeline.run>`; ``None``
                for no limit.
            wait: seconds; ``None``, the default, for as long as it takes.

        Raises:
            JobRunnerClosed: the runner was not entered, or is being left.
            TypeError, ValueError: an argument that can't be used.
        """
        if wait is not None:
            check_seconds("wait", wait, zero=True)
        run = self._new_run(pipeline, value, context, None, timeout)
        run.is_job = False
        task = self._start(run)
        try:
            await asyncio.wait((task,), timeout=wait)
            if not run.is_ending and not task.done():
                run.is_job = True
                self._count(run, True)
                await self._add(run)
                self._look_whether_idle()
                return run.job
            return await run.end()
        except BaseException:
            run.is_job = False  # for the store has it not, or not for long
            self._dismiss(run)
            await until_ended(task)
            raise

    async def get(self, job_id: str) -> Job:
        """Return a job as it is now.

        Args:
            job_id: what the job is called.

        Raises:
            JobNotFound: there is none, or no longer.
            JobRunnerClosed: the runner was never entered; or it was left, and its store is shared.
        """
        _check_job_id(job_id)
        self._check_entered()
        run = self._runs.get(job_id)
        job = await self._store.get(job_id) if run is None else run.job
        if job is None or (job.finished is not None and job.finished < self._oldest()):
            raise JobNotFound(job_id)
        return job

    async def dismiss(self, job_id: str) -> Job:
        """Cancel a job, wait until its handler has seen that, and return it; remove one that has ended.

        A job that has ended in another way meanwhile is returned as it is. One of another process is
        cancelled by that one, within a few tenths of a second.

        Args:
            job_id: what the job is called.

        Returns:
            The job, ``"dismissed"``; or, as it was, the one that was removed.

        Raises:
            JobNotFound: there is none, or no longer.
            JobRunnerClosed: the runner was left, or never entered, and the job is one of another process.
        """
        _check_job_id(job_id)
        self._check_loop()
        is_asked = False
        while True:
            # looked for each time: one that is being submitted may come to the store first
            run = self._runs.get(job_id)
            if run is not None:
                self._dismiss(run)
                return await run.end()
            job = await self.get(job_id)
            if job.finished is not None:
                break
            self._check_open()
            if not is_asked:
                is_asked = True
                await self._store.ask_to_dismiss(job_id)
            await asyncio.sleep(_POLL / 4)
        if not is_asked:
            await self._store.remove(job_id)
        return job

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """Yield a job as it is now, and then again after each change, until it has ended.

        Who is slow misses what has changed twice meanwhile, never the end. A job of another process is
        looked at several times a second.

        Args:
            job_id: what the job is called.

        Raises:
            JobNotFound: there is none, or no longer.
            JobRunnerClosed: the runner was left, or never entered, and the job is one of another process.
        """
        job = await self.get(job_id)
        run = self._runs.get(job_id)
        yield job
        while job.finished is None:
            run = run or self._runs.get(job_id)  # one that is being submitted may come to the store first
            if run is None:
                await asyncio.sleep(_POLL)
                self._check_open()
                latest = await self.get(job_id)
            else:
                if run.job is job:
                    await run.change()
                latest = run.job
            if latest != job:
                yield latest
            job = latest

    async def list(
        self,
        *,
        limit: int = 100,
        offset: int = 0,
        status: JobStatus | Collection[JobStatus] | None = None,
        pipeline: str | Collection[str] | None = None,
    ) -> builtins.list[Job]:
        """Return jobs, the newest first.

        Args:
            limit: how many at most.
            offset: how many to leave out before them.
            status: only those of this status, or of one of these.
            pipeline: only those of this name of a pipeline, or of one of these.

        Raises:
            JobRunnerClosed: the runner was never entered; or it was left, and its store is shared.
            TypeError, ValueError: an argument that can't be used.
        """
        self._check_entered()
        check_count("limit", limit, least=0, message="limit must be greater than or equal to 0")
        check_count("offset", offset, least=0, message="offset must be greater than or equal to 0")
        statuses = _collection(status)
        for wanted in statuses or ():
            if wanted not in _STATUSES:
                raise ValueError(f"status must be one of {', '.join(_STATUSES)}, not {wanted!r}")
        await self._store.evict(before=self._oldest(), keep=self._keep)
        runs = self._runs.copy()  # of one that ends meanwhile, the store's answer is older
        jobs = await self._store.list(
            limit=limit, offset=offset, status=statuses, pipeline=_collection(pipeline)
        )
        runs.update(self._runs)
        latest = (runs[job.id].job if job.id in runs else job for job in jobs)
        return [job for job in latest if statuses is None or job.status in statuses]

    def __repr__(self) -> str:
        state = "open" if self._is_open else "closed"
        return f"<JobRunner {state} running={len(self._running)} pending={len(self._pending)}>"

    # -- accepting

    def _check_open(self) -> None:
        self._check_loop()
        if not self._is_open:
            raise JobRunnerClosed

    def _check_entered(self) -> None:
        self._check_loop()
        if not self._was_entered or (self._store.is_shared and not self._is_entered):
            raise JobRunnerClosed

    def _check_loop(self) -> None:
        # def handler(): return asyncio.run(jobs.submit(...)), in a thread, would wait for ever
        if self._is_entered and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "the JobRunner belongs to another event loop; call it from there, in an async def, or from a "
                "thread by asyncio.run_coroutine_threadsafe(runner.submit(...), loop)"
            )

    def _new_run(
        self, pipeline: Any, value: Any, context: Any, job_id: str | None, timeout: float | None
    ) -> JobRun:
        self._check_open()
        if job_id is None:
            job_id = str(uuid4())
        elif not isinstance(job_id, str):
            raise TypeError(f"job_id must be a str, not {job_id!r}")
        elif not job_id:
            raise ValueError("job_id must not be empty")
        if timeout is not None:
            check_seconds("timeout", timeout, zero=False)
        if iscoroutine(pipeline):
            pipeline.close()
            raise TypeError(
                f"pipeline must not be called yet, but this is the coroutine {pipeline.__qualname__}(...); "
                "write submit(pipeline, value), or submit(function, value)"
            )
        step = as_step(pipeline, "pipeline must be a pipeline, or any other step")
        now = self._now()
        job = Job(id=job_id, pipeline=step.name, created=now, updated=now)
        return JobRun(job, with_progress(step), value, {} if context is None else context, timeout, self._now)

    async def _add(self, run: JobRun) -> None:
        job = run.job
        if job.id in self._runs or job.id in self._adding:
            raise DuplicateJob(job.id)
        self._adding.add(job.id)
        self._idle.clear()
        async with run.lock:
            try:
                await self._store.add(job)
            except asyncio.CancelledError:
                self._run_errand(self._take_back(job))
                raise
            except BaseException:
                self._added(job)
                raise
            self._runs[job.id] = run
            self._adding.discard(job.id)

    def _added(self, job: Job) -> None:
        self._adding.discard(job.id)
        self._look_whether_idle()

    async def _take_back(self, job: Job) -> None:
        """Remove a job that was being added, if it is there; if it is not, another one of its id may be."""
        try:
            if await self._store.get(job.id) == job:
                await self._store.remove(job.id)
        except Exception as error:
            logger.error("job %s, whose submission was cancelled, is in the store", job.id, exc_info=error)
        finally:
            self._added(job)

    def _start_pending(self) -> None:
        while self._pending and self._jobs_running < self._concurrency:
            self._start(self._pending.pop(next(iter(self._pending))))

    def _start(self, run: JobRun) -> asyncio.Task[None]:
        self._running.add(run)
        self._count(run, run.is_job)
        self._idle.clear()
        work = self._work(run)
        try:
            task = self._loop.create_task(work, name=f"job {run.job.id}", context=run.variables)
        except (KeyboardInterrupt, SystemExit):  # an eager task raises them here
            self._release(run, run.task)
            raise
        run.task = task
        task.add_done_callback(lambda task: self._release(run, task))
        return task

    def _count(self, run: JobRun, is_counted: bool) -> None:
        self._jobs_running += is_counted - run.is_counted
        run.is_counted = is_counted

    def _release(self, run: JobRun, task: asyncio.Task[None] | None) -> None:
        self._running.discard(run)
        self._count(run, False)
        if not run.is_ending:  # cancelled before it began
            self._run_errand(self._end(run, self._end_of_cancelled(run, asyncio.CancelledError())))
        if task is not None and not task.cancelled():
            task.exception()  # KeyboardInterrupt and the like: the loop has raised it already
        if not self._cut.is_set():
            self._start_pending()
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if not self._running and not self._adding:
            self._idle.set()

    # -- running

    async def _work(self, run: JobRun) -> None:
        current.set(run)
        run.task = asyncio.current_task()  # an eager one is not known to who has made it yet
        fatal: BaseException | None = None
        try:
            now = self._now()
            run.update(status="running", started=now, updated=now)
            await self._save(run)
            result = await run.run_in(self._job_context)
            end = {"status": "successful", "progress": 100, "result": result}
        except asyncio.CancelledError as error:
            end = self._end_of_cancelled(run, error)
        except GeneratorExit:  # the loop is gone
            raise
        except BaseException as error:
            end = _failure(run.job, error)
            fatal = None if isinstance(error, Exception) else error
        if run.is_dismissed:
            end = {"status": "dismissed"}
        try:
            await self._end_in_any_case(run, end)
            if fatal is not None:
                raise fatal
        finally:
            del fatal  # its traceback holds this frame

    async def _end_in_any_case(self, run: JobRun, end: Mapping[str, Any]) -> None:
        try:
            await self._end(run, end)
        except asyncio.CancelledError:  # a request that a handler has left behind
            self._run_errand(self._end(run, end) if run.job.finished is None else self._evict())

    def _end_of_cancelled(self, run: JobRun, error: asyncio.CancelledError) -> dict[str, Any]:
        if run.is_dismissed:
            return {"status": "dismissed"}
        return _closed(run.job) if self._cut.is_set() else _failure(run.job, error)

    def _dismiss(self, run: JobRun) -> None:
        if run.is_ending or run.is_dismissed:  # a second cancellation would interrupt who cleans up
            return
        run.is_dismissed = True
        if run.task is not None:
            if not self._cut.is_set():  # which has cancelled it
                run.task.cancel()
        elif self._pending.pop(run.job.id, None) is not None:
            self._run_errand(self._end(run, {"status": "dismissed"}))

    async def _end(self, run: JobRun, end: Mapping[str, Any]) -> None:
        """Let everybody know the end of a job, when the store knows it."""
        run.hear()
        run.is_ending = True
        now = self._now()
        job = run.changed(finished=now, updated=now, **end)
        if not run.is_job:
            run.publish(job)
            return
        job = await self._save_end(run, job)
        self._count(run, False)  # who is told the end may expect that there is room for another
        run.publish(job)
        self._runs.pop(job.id, None)
        self._last_end = self._loop.time()
        await self._evict()

    # -- the store

    async def _save(self, run: JobRun) -> None:
        if not run.is_job:
            return
        async with run.lock:
            if run.is_ending:
                return
            run.is_unsaved = False
            try:
                await self._store.save(run.job)
            except Exception as error:
                run.is_unsaved = True
                logger.error("job %s could not be saved; it goes on", run.job.id, exc_info=error)

    async def _save_end(self, run: JobRun, job: Job) -> Job:
        async with run.lock:
            while run.is_job:
                try:
                    await self._store.save(job)
                    return job
                except Exception as error:
                    if job.status == "successful" and isinstance(error, (TypeError, ValueError)):
                        job = replace(job, **_failure(job, error), result=None)
                        continue
                    logger.error("the end of job %s could not be saved", job.id, exc_info=error)
                    if self._cut.is_set():
                        return job
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY):
                        await self._cut.wait()
        return job

    async def _evict(self) -> None:
        try:
            await self._store.evict(before=self._oldest(), keep=self._keep)
        except Exception as error:
            logger.error("jobs could not be removed from the store", exc_info=error)
        when = self._last_end + self._ttl + 0.001  # not before it is older than that by a microsecond
        if self._eviction is None and when > self._loop.time() and not self._cut.is_set():
            self._eviction = self._loop.call_at(when, self._evict_later)

    def _evict_later(self) -> None:
        self._eviction = None
        self._run_errand(self._evict())

    async def _poll(self) -> None:
        """Save what has changed for other processes, and do what they have asked for."""
        while True:
            await asyncio.sleep(_POLL)
            if self._runs:
                await self._exchange()

    async def _exchange(self) -> None:
        for run in list(self._runs.values()):
            if run.is_unsaved:
                await self._save(run)
        try:
            asked = await self._store.asked_to_dismiss()
        except Exception as error:
            logger.error("the store can't tell which jobs to dismiss", exc_info=error)
            return
        for job_id in asked:
            if job_id in self._runs:
                self._dismiss(self._runs[job_id])

    # -- time, and the end

    def _now(self) -> datetime:
        return self._epoch + timedelta(seconds=self._loop.time())

    def _oldest(self) -> datetime:
        """What has finished before this is to be forgotten."""
        try:
            return self._now() - timedelta(seconds=self._ttl)
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)

    def _run_errand(self, errand: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _cut_short(self) -> None:
        """Cancel what is left, wait for it, and close the store."""
        self._cut.set()
        for run in list(self._pending.values()):
            self._run_errand(self._end(run, _closed(run.job)))
        self._pending.clear()
        for run in self._running:
            if run.task is not None and not run.is_ending and not run.is_dismissed:
                run.task.cancel()
        closing = self._loop.create_task(self._close())
        try:
            await until_ended(closing)
        except asyncio.CancelledError:
            if (error := closing.exception()) is not None:
                logger.error("the store could not be closed", exc_info=error)
            raise
        closing.result()

    async def _close(self) -> None:
        await self._idle.wait()
        while self._errands:
            await asyncio.wait(list(self._errands))
        for timer in (self._poller, self._eviction):
            if timer is not None:
                timer.cancel()
        if self._poller is not None:
            await asyncio.wait((self._poller,))
        self._poller = self._eviction = None
        await self._store.aclose()


def _check_job_id(job_id: object) -> None:
    if not isinstance(job_id, str):
        hint = "; write job.id" if isinstance(job_id, Job) else ""
        raise TypeError(f"job_id must be a str, not {job_id!r}{hint}")


def _closed(job: Job) -> dict[str, Any]:
    message = "the runner was closed before the job had ended"
    logger.warning("job %s of %r was cut short: %s", job.id, job.pipeline, message)
    return {"status": "failed", "error": JobFailure("JobRunnerClosed", message)}


def _failure(job: Job, error: BaseException) -> dict[str, Any]:
    logger.error("job %s of %r failed", job.id, job.pipeline, exc_info=error)
    stage, attempts, original = None, 1, error
    if isinstance(error, StageExecutionError):
        stage, attempts, original = error.stage_name, error.attempts, error.original_error
    try:
        message = str(original)
    except Exception:  # an error that can't be shown must not hide that it happened
        message = ""
    return {"status": "failed", "error": JobFailure(type(original).__name__, message, stage, attempts)}


def _collection(wanted: Any) -> Collection[Any] | None:
    return (wanted,) if isinstance(wanted, str) else wanted


def _checked_store(store: Any) -> JobStore:
    if isinstance(store, type) or not callable(getattr(store, "asked_to_dismiss", None)):
        raise TypeError(f'store must be a JobStore, not {store!r}; write store=SqliteJobStore("jobs.db")')
    checked: JobStore = store
    return checked
