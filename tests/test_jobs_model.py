"""JobRunner against every order of events: random programs, and a cancellation at each point."""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_pipeline import DuplicateJob, JobNotFound, JobQueueFull, JobRunnerClosed, Pipeline, Stage
from async_pipeline.events import logger
from async_pipeline.jobs import Job, JobRunner, MemoryJobStore, report_progress
from async_pipeline.testing import VirtualClockLoop

RANKS = {"accepted": 0, "running": 1, "successful": 2, "failed": 2, "dismissed": 2}


class EagerLoop(VirtualClockLoop):
    def __init__(self) -> None:
        super().__init__()
        if sys.version_info >= (3, 12):
            self.set_task_factory(asyncio.eager_task_factory)


LOOPS = [VirtualClockLoop, EagerLoop] if sys.version_info >= (3, 12) else [VirtualClockLoop]


@pytest.fixture(autouse=True, scope="module")
def silence() -> Iterator[None]:
    """Let nobody format the many tracebacks of failures that are wanted."""
    logger.disabled = True
    yield
    logger.disabled = False


def run_on(loop: type[VirtualClockLoop], main: Coroutine[Any, Any, None]) -> None:
    complaints: list[Any] = []
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.get_loop().set_exception_handler(lambda loop, complaint: complaints.append(complaint))
        runner.run(main)
    assert not complaints


async def pause(amount: float) -> None:
    """Wait so many seconds; of a negative number, turns of the event loop."""
    if amount >= 0:
        await asyncio.sleep(amount)
    else:
        for _ in range(int(-amount)):
            await asyncio.sleep(0)


class WildStore(MemoryJobStore):
    """Takes its time before and after each call, and fails now and then."""

    def __init__(self, pauses: Iterator[float | None], faults: Iterator[bool], *, is_shared: bool) -> None:
        super().__init__()
        self.pauses = pauses
        self.faults = faults
        self.is_shared = is_shared
        self.is_open = False
        self.has_failed = False
        self.asked: set[str] = set()

    async def _wait(self, *, may_fail: bool = False, is_write: bool = False) -> None:
        assert self.is_open or not is_write
        if not self.is_open:
            raise OSError("closed")  # who asks when the runner was left
        amount = next(self.pauses)
        if amount is not None:
            await pause(amount)
        if may_fail and next(self.faults):
            self.has_failed = True
            raise OSError("disk full")

    async def open(self) -> None:
        self.is_open = True
        await self._wait(is_write=True)

    async def aclose(self) -> None:
        await self._wait(is_write=True)
        self.is_open = False

    async def add(self, job: Job) -> None:
        await self._wait(may_fail=True, is_write=True)
        await super().add(job)
        await self._wait(is_write=True)

    async def save(self, job: Job) -> None:
        await self._wait(may_fail=True, is_write=True)
        if job.id in self._jobs:
            assert RANKS[job.status] >= RANKS[self._jobs[job.id].status]
            assert job.pipeline == self._jobs[job.id].pipeline
        await super().save(job)
        await self._wait(is_write=True)

    async def get(self, job_id: str) -> Job | None:
        await self._wait()
        job = await super().get(job_id)
        await self._wait()
        return job

    async def remove(self, job_id: str) -> None:
        await self._wait()
        await super().remove(job_id)
        await self._wait()

    async def evict(self, *, before: datetime, keep: int) -> None:
        await self._wait(may_fail=True)
        await super().evict(before=before, keep=keep)
        await self._wait()

    async def ask_to_dismiss(self, job_id: str) -> None:
        await self._wait()
        self.asked.add(job_id)

    async def asked_to_dismiss(self) -> list[str]:
        await self._wait(may_fail=True)
        return [job_id for job_id in self.asked if job_id in self._jobs]

    async def list(
        self, *, limit: int, offset: int, status: Collection[str] | None, pipeline: Collection[str] | None
    ) -> list[Job]:
        await self._wait()
        jobs = await super().list(limit=limit, offset=offset, status=status, pipeline=pipeline)
        await self._wait()
        return jobs


@dataclass
class Work:
    """What became of one submission, as its handler and its submitter know it."""

    name: str
    seconds: float
    fails: bool = False
    cleanup: float | None = None
    swallows: bool = False
    is_run: bool = False
    begun: int = 0
    ended: int = 0
    accepted: int | None = None  # in which order
    is_refused: bool = False  # or its submission was cancelled
    may_be_dismissed: bool = False


@dataclass
class World:
    """A runner, those who use it, and all that they have seen."""

    runner: JobRunner
    store: WildStore
    concurrency: int
    max_pending: int
    is_left: bool = False
    in_flight: int = 0
    works: dict[str, Work] = field(default_factory=dict)
    seen: dict[str, list[tuple[int, int, Job]]] = field(default_factory=lambda: defaultdict(list))
    removed: set[str] = field(default_factory=set)
    tick: Iterator[int] = field(default_factory=count)

    def see(self, began: int, job: Job) -> None:
        self.seen[job.pipeline].append((began, next(self.tick), job))
        assert (job.finished is not None) == (RANKS[job.status] == 2)
        assert (job.error is not None) == (job.status == "failed")
        assert job.result is None or job.status == "successful"
        assert 0 <= job.progress <= 100

    def pipeline(self, work: Work) -> Pipeline[Any, Any]:
        async def handler(value: Any) -> Any:
            work.begun += 1
            self.in_flight += not work.is_run
            assert self.in_flight <= self.concurrency
            try:
                for part in range(3):
                    await pause(work.seconds)
                    report_progress(part / 3, f"part {part}")
                if work.fails:
                    raise ValueError(work.name)
                return work.name
            except asyncio.CancelledError:
                if work.cleanup is not None:
                    await pause(work.cleanup)
                if work.swallows:
                    return "swallowed"
                raise
            finally:
                work.ended += 1
                self.in_flight -= not work.is_run

        self.works[work.name] = work
        return Pipeline([Stage("work", handler)], name=work.name)

    async def submit(self, work: Work, job_id: str) -> None:
        pipeline, began = self.pipeline(work), next(self.tick)
        # what was asked of one that had this id before may be heard as late as this
        work.may_be_dismissed = job_id in self.removed
        try:
            job = await self.runner.submit(pipeline, 1, job_id=job_id)
        except (DuplicateJob, JobQueueFull, JobRunnerClosed, OSError, asyncio.CancelledError):
            work.is_refused = True
            raise
        work.accepted = next(self.tick)
        # one of run() that has become a job meanwhile may have taken the place that was free
        beside = sum(other.is_run for other in self.works.values())
        assert len(self.runner._pending) <= self.max_pending + beside
        self.see(began, job)

    async def run(self, work: Work, wait: float) -> None:
        work.is_run = True
        began = next(self.tick)
        try:
            job = await self.runner.run(self.pipeline(work), 1, wait=wait)
        except (JobRunnerClosed, OSError, asyncio.CancelledError):
            work.is_refused = True
            assert work.begun == work.ended
            raise
        self.see(began, job)
        if job.finished is None:
            work.accepted = next(self.tick)

    async def dismiss(self, job_id: str) -> None:
        began = next(self.tick)
        self.expect_dismissal()
        try:
            job = await self.runner.dismiss(job_id)
        finally:
            self.removed.add(job_id)
            self.expect_dismissal()
        assert job.finished is not None
        if job.status == "dismissed":
            work = self.works[job.pipeline]
            assert work.begun == work.ended
        self.see(began, job)

    def expect_dismissal(self) -> None:
        for work in self.works.values():  # whoever has the id by the time that it is heard
            work.may_be_dismissed = True

    async def get(self, job_id: str) -> None:
        began = next(self.tick)
        self.see(began, await self.runner.get(job_id))

    async def list(self, status: Any) -> None:
        began = next(self.tick)
        jobs = await self.runner.list(status=status)
        assert len({job.id for job in jobs}) == len(jobs)
        for job in jobs:
            assert status is None or job.status == status
            self.see(began, job)

    async def watch(self, job_id: str) -> None:
        was_running = job_id in self.runner._runs
        seen: list[Job] = []
        began = next(self.tick)
        try:
            async for job in self.runner.watch(job_id):
                self.see(began, job)
                assert not seen or job != seen[-1]
                seen.append(job)
                began = next(self.tick)
        except (JobNotFound, JobRunnerClosed):
            assert not was_running
        else:
            assert seen[-1].finished is not None
            assert all(job.finished is None for job in seen[:-1])

    def check_seen(self) -> None:
        for observations in self.seen.values():
            for _, seen, earlier in observations:
                for began, _, later in observations:
                    if seen < began:
                        if later.finished is None and self.store.has_failed and self.is_left:
                            continue  # its end could not be saved as the runner was left
                        assert RANKS[earlier.status] <= RANKS[later.status]
                        assert earlier.progress <= later.progress
                        assert earlier.updated <= later.updated
                        assert earlier.finished is None or earlier == later

    def check_end(self) -> None:
        runner, store = self.runner, self.store
        assert asyncio.all_tasks() == {asyncio.current_task()}
        left = (runner._runs, runner._pending, runner._running, runner._adding, runner._errands)
        assert not any(left)
        assert runner._jobs_running == self.in_flight == 0
        assert not store.is_open
        for work in self.works.values():
            assert work.begun == work.ended <= 1
            assert not (work.is_refused and work.begun and not work.is_run)
        if not store.has_failed:
            for job in store._jobs.values():
                assert job.finished is not None
                assert not self.works[job.pipeline].is_refused or job.error is not None
            assert len(store._finished) <= runner._keep
        for job in store._jobs.values():
            self.check_job(job)
        for observations in self.seen.values():
            self.check_job(observations[-1][2])

    def check_job(self, job: Job) -> None:
        work = self.works[job.pipeline]
        if job.status == "successful":
            assert work.begun
            assert job.progress == 100
            assert job.result == work.name or (work.swallows and self.is_left and job.result == "swallowed")
        elif job.status == "dismissed":
            assert work.may_be_dismissed
        elif job.error is not None:
            assert (job.error.type == "JobRunnerClosed" and self.is_left) or (
                (job.error.type, work.fails) == ("ValueError", True)
            )
        if job.finished is not None:
            assert (job.started is not None) >= bool(work.begun)

    def check_order(self) -> None:
        """Those that were submitted began in the order in which they were accepted."""
        started = [
            (work.accepted, max(job.started for _, _, job in self.seen[name] if job.started))
            for name, work in self.works.items()
            if work.accepted is not None and not work.is_run
            if any(job.started for _, _, job in self.seen[name])
        ]
        times = [moment for _, moment in sorted(started)]
        assert times == sorted(times)


EXPECTED = (DuplicateJob, JobNotFound, JobQueueFull, JobRunnerClosed, OSError, asyncio.CancelledError)


async def cut_off(operation: Coroutine[Any, Any, None], after: float | None) -> None:
    """Run an operation in a task of its own, and cancel it after a while."""
    task = asyncio.ensure_future(operation)
    if after is not None:
        await pause(after)
        task.cancel()
    with suppress(*EXPECTED):
        await task


pauses = st.one_of(st.none(), st.integers(-4, -1), st.sampled_from([0.0, 0.3, 1.0]))
amounts = st.one_of(st.integers(-30, -1), st.sampled_from([0.0, 0.3, 1.0, 2.5, 20.0]))
ids = st.sampled_from("abc")
works = st.fixed_dictionaries(
    {
        "seconds": st.one_of(st.integers(-3, -1), st.sampled_from([0.0, 0.4, 1.0, 7.0])),
        "fails": st.booleans(),
        "cleanup": st.one_of(st.none(), st.sampled_from([-3, 0.5, 5.0])),
        "swallows": st.booleans(),
    }
)
operations = st.one_of(
    st.tuples(st.just("submit"), works, ids),
    st.tuples(st.just("submit"), works, ids),
    st.tuples(st.just("run"), works, st.sampled_from([0.0, 0.4, 1.5, 100.0])),
    st.tuples(st.just("dismiss"), ids),
    st.tuples(st.just("get"), ids),
    st.tuples(st.just("list"), st.sampled_from([None, *RANKS])),
    st.tuples(st.just("watch"), ids),
)
programs = st.lists(
    st.tuples(operations, st.one_of(st.none(), amounts), st.one_of(st.none(), amounts)), max_size=14
)


def forever(values: list[Any], default: Any) -> Iterator[Any]:
    while True:
        yield from values or [default]


async def play(
    program: list[Any], leave: tuple[float | None, float | None], store: WildStore, options: dict[str, Any]
) -> None:
    world = World(JobRunner(**options, store=store), store, options["concurrency"], options["max_pending"])
    names = count()
    await world.runner.__aenter__()
    users = []
    for (kind, *arguments), cancel_after, then_wait in program:
        if isinstance(arguments[0], dict):
            arguments[0] = Work(f"work {next(names)}", **arguments[0])
        users.append(asyncio.ensure_future(cut_off(getattr(world, kind)(*arguments), cancel_after)))
        if then_wait is not None:
            await pause(then_wait)
    await leave_after(world, *leave)
    # what is left waits for what another process might say
    done, _ = await asyncio.wait(users, timeout=1000) if users else (set(), None)
    assert len(done) == len(users)
    for user in users:
        user.result()
    world.check_seen()
    world.check_order()
    world.check_end()


async def leave_after(world: World, first: float | None, second: float | None) -> None:
    """Leave the runner, cancelled once, twice or not at all."""
    world.is_left = True
    leaving = asyncio.ensure_future(world.runner.__aexit__(None, None, None))
    for amount in (first, second):
        if amount is not None:
            await pause(amount)
            leaving.cancel()
    with suppress(asyncio.CancelledError):
        await leaving


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    program=programs,
    leave=st.tuples(st.one_of(st.none(), amounts), st.one_of(st.none(), amounts)),
    waits=st.lists(pauses, max_size=12),
    faults=st.lists(st.sampled_from([False, False, False, True]), max_size=12),
    is_shared=st.booleans(),
    concurrency=st.integers(1, 3),
    max_pending=st.integers(0, 3),
    keep=st.sampled_from([0, 1, 1000]),
    ttl=st.sampled_from([0, 2, 3600]),
    drain=st.sampled_from([0, 1, 30]),
)
def test_random_programs(
    loop: type[VirtualClockLoop],
    program: list[Any],
    leave: tuple[float | None, float | None],
    waits: list[float | None],
    faults: list[bool],
    is_shared: bool,
    **options: Any,
) -> None:
    store = WildStore(forever(waits, None), forever([*faults, False], False), is_shared=is_shared)
    run_on(loop, play(program, leave, store, options))


WORK = {"seconds": 1.0, "fails": False, "cleanup": 2.0, "swallows": False}
QUICK = {"seconds": -1, "fails": False, "cleanup": None, "swallows": False}
SWEPT: dict[str, list[Any]] = {
    "submit": [(("submit", QUICK, "a"), "here", None)],
    "submit when it is taken": [(("submit", QUICK, "a"), None, 20.0), (("submit", QUICK, "a"), "here", None)],
    "submit when it waits": [
        (("submit", WORK, "a"), None, 1.0),
        (("submit", QUICK, "b"), "here", 20.0),
        (("submit", QUICK, "b"), None, None),
    ],
    "run": [(("run", QUICK, 100.0), "here", None)],
    "run that becomes a job": [(("run", WORK, 0.0), "here", None)],
    "run that ends then": [(("run", {**QUICK, "seconds": -2}, 0.0), "here", None)],
    "dismiss": [(("submit", WORK, "a"), None, 1.0), (("dismiss", "a"), "here", None)],
    "dismiss what waits": [
        (("submit", WORK, "a"), None, 1.0),
        (("submit", WORK, "b"), None, 0.5),
        (("dismiss", "b"), "here", None),
    ],
    "dismiss what has ended": [(("submit", QUICK, "a"), None, 20.0), (("dismiss", "a"), "here", None)],
    "dismiss what is submitted": [(("submit", WORK, "a"), None, None), (("dismiss", "a"), "here", None)],
    "watch": [(("submit", WORK, "a"), None, 1.0), (("watch", "a"), "here", None)],
    "watch what is submitted": [(("submit", QUICK, "a"), None, None), (("watch", "a"), "here", None)],
    "leave": [(("submit", WORK, "a"), None, 0.5), (("submit", QUICK, "b"), None, None)],
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("drain", [0, 30])
@pytest.mark.parametrize("swept", SWEPT)
def test_a_cancellation_at_each_point(loop: type[VirtualClockLoop], drain: int, swept: str) -> None:
    options = {"concurrency": 1, "max_pending": 2, "keep": 1000, "ttl": 3600, "drain": drain}
    for turns in range(45):
        for waits in ([-3], [-1, None]):
            program = [
                (operation, -turns if cancel == "here" else cancel, then)
                for operation, cancel, then in SWEPT[swept]
            ]
            leave = (-turns, None) if swept == "leave" else (None, None)
            store = WildStore(forever(waits, None), forever([], False), is_shared=False)
            run_on(loop, play(program, leave, store, options))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("make", [lambda: [True, False], lambda: [False, True], lambda: [True] * 3 + [False]])
def test_a_fault_at_each_point(loop: type[VirtualClockLoop], make: Callable[[], list[bool]]) -> None:
    options = {"concurrency": 1, "max_pending": 2, "keep": 0, "ttl": 0, "drain": 30}
    for skipped in range(12):
        faults = forever([False] * skipped + make() + [False] * 100, False)
        program = [entry for operation in ("submit", "run that becomes a job") for entry in SWEPT[operation]]
        program = [(operation, None, 2.0) for operation, _, _ in program + SWEPT["watch"]]
        run_on(
            loop, play(program, (None, None), WildStore(forever([], None), faults, is_shared=True), options)
        )
