"""JobRunner: every way in which a job can come, run, be looked at, and end."""

import asyncio
import copy
import dataclasses
import gc
import inspect
import logging
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from async_pipeline import (
    DuplicateJob,
    Finish,
    JobNotFound,
    JobQueueFull,
    JobRunnerClosed,
    Pipeline,
    Stage,
    StageExecutionError,
    branch,
    each,
    fallback,
    keep,
    parallel,
)
from async_pipeline.events import Event
from async_pipeline.jobs import (
    Job,
    JobFailure,
    JobRunner,
    JobStatus,
    JobStore,
    MemoryJobStore,
    report_progress,
    with_progress,
)
from async_pipeline.jobs_sqlite import SqliteJobStore
from async_pipeline.testing import VirtualClockLoop
from tests.helpers import Meter, run_alone, run_virtually

CLOSED = JobFailure("JobRunnerClosed", "the runner was closed before the job had ended")


async def same(value: Any) -> Any:
    return value


async def nap(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def fail(value: Any) -> Any:
    raise ValueError(f"no {value}")


SAME: Pipeline[Any, Any] = Pipeline([same], name="same")
NAP: Pipeline[float, float] = Pipeline([nap], name="nap")
FAIL: Pipeline[Any, Any] = Pipeline([fail], name="fail")


async def end_of(runner: JobRunner, job_id: str) -> Job:
    return (await history(runner, job_id))[-1]


async def history(runner: JobRunner, job_id: str) -> list[Job]:
    return [job async for job in runner.watch(job_id)]


async def progress_at(runner: JobRunner, job_id: str) -> int:
    return (await runner.get(job_id)).progress


def now() -> float:
    return asyncio.get_running_loop().time()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Gate:
    """A handler that waits until it is let through."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.began: list[Any] = []
        self.cancelled: list[Any] = []

    async def __call__(self, value: Any) -> Any:
        self.began.append(value)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.append(value)
            raise
        return value

    @property
    def pipeline(self) -> Pipeline[Any, Any]:
        return Pipeline([Stage("gate", self)], name="gated")


class Cleaner:
    """A handler that takes 5 s to clean up."""

    def __init__(self) -> None:
        self.is_clean = False

    async def __call__(self, value: Any) -> Any:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(5)
            self.is_clean = True

    @property
    def pipeline(self) -> Pipeline[Any, Any]:
        return Pipeline([Stage("cleaner", self)])


class SlowStore(MemoryJobStore):
    """Each call takes a second, before, after and while it is done."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.is_open = False
        self.calls: list[str] = []

    async def _wait(self, call: str) -> None:
        assert self.is_open, f"{call} of a store that is not open"
        self.calls.append(call)
        await asyncio.sleep(self.seconds / 2)

    async def open(self) -> None:
        self.is_open = True
        await self._wait("open")

    async def aclose(self) -> None:
        await self._wait("aclose")
        self.is_open = False

    async def add(self, job: Job) -> None:
        await self._wait("add")
        await super().add(job)
        await self._wait("add")

    async def save(self, job: Job) -> None:
        await self._wait("save")
        await super().save(job)
        await self._wait("save")

    async def get(self, job_id: str) -> Job | None:
        await self._wait("get")
        job = await super().get(job_id)
        await self._wait("get")
        return job

    async def remove(self, job_id: str) -> None:
        await self._wait("remove")
        await super().remove(job_id)

    async def evict(self, *, before: datetime, keep: int) -> None:
        await self._wait("evict")
        await super().evict(before=before, keep=keep)

    async def list(
        self, *, limit: int, offset: int, status: Collection[str] | None, pipeline: Collection[str] | None
    ) -> list[Job]:
        jobs = await super().list(limit=limit, offset=offset, status=status, pipeline=pipeline)
        await self._wait("list")
        return jobs


class BrokenStore(MemoryJobStore):
    """Raises where it is told to, as often as it is told to."""

    def __init__(self, **faults: int) -> None:
        super().__init__()
        self.faults = faults
        self.error: Exception = OSError("disk full")

    def _fail(self, call: str) -> None:
        if self.faults.get(call, 0):
            self.faults[call] -= 1
            raise self.error

    async def open(self) -> None:
        self._fail("open")

    async def aclose(self) -> None:
        self._fail("aclose")

    async def add(self, job: Job) -> None:
        self._fail("add")
        await super().add(job)

    async def save(self, job: Job) -> None:
        self._fail("save")
        if job.finished is not None:
            self._fail("save_end")
        await super().save(job)

    async def evict(self, *, before: datetime, keep: int) -> None:
        self._fail("evict")
        await super().evict(before=before, keep=keep)


class SharedStore(MemoryJobStore):
    """Two runners on it stand for two processes."""

    is_shared = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()
        self.saves = 0

    async def save(self, job: Job) -> None:
        self.saves += 1
        await super().save(job)

    async def ask_to_dismiss(self, job_id: str) -> None:
        self.asked.add(job_id)

    async def asked_to_dismiss(self) -> list[str]:
        return [job_id for job_id in self.asked if job_id in self._jobs]


class TestJob:
    def test_is_a_snapshot(self) -> None:
        moment = datetime.now(UTC)
        job = Job(id="a", pipeline="p", created=moment, updated=moment)
        assert (job.status, job.progress, job.message, job.started) == ("accepted", 0, None, None)
        assert (job.finished, job.result, job.error) == (None, None, None)
        for frozen, name in ((job, "status"), (JobFailure("ValueError", "no"), "type")):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(frozen, name, "b")
            assert not hasattr(frozen, "__dict__")
            assert pickle.loads(pickle.dumps(frozen)) == copy.deepcopy(frozen) == frozen

    def test_a_failure_is_of_no_stage_and_one_attempt_by_default(self) -> None:
        assert JobFailure("ValueError", "no") == JobFailure("ValueError", "no", None, 1)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"concurrency": 0}, ValueError, "^concurrency must be at least 1"),
            ({"concurrency": 1.5}, TypeError, "^concurrency "),
            ({"concurrency": True}, (TypeError, ValueError), "^concurrency "),
            ({"max_pending": -1}, ValueError, "^max_pending must be greater than or equal to 0"),
            ({"max_pending": "1"}, TypeError, "^max_pending "),
            ({"keep": -1}, ValueError, "^keep must be greater than or equal to 0"),
            ({"keep": None}, TypeError, "^keep "),
            ({"ttl": -1}, ValueError, "^ttl must be greater than or equal to 0"),
            ({"ttl": float("nan")}, ValueError, "^ttl "),
            ({"ttl": "1"}, TypeError, "^ttl "),
            ({"drain": -0.1}, ValueError, "^drain must be greater than or equal to 0"),
            ({"drain": float("inf")}, ValueError, "^drain "),
            ({"job_context": 1}, TypeError, r"^job_context must be a callable \(context\) .*, not 1"),
        ],
    )
    def test_that_are_wrong_are_refused(self, options: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            JobRunner(**options)

    def test_a_job_context_needs_its_decorator(self) -> None:
        async def session(context: Any) -> AsyncIterator[Any]:
            yield context

        async def plain(context: Any) -> Any:
            return context

        for wrong in (session, plain):
            with pytest.raises(TypeError, match=r"^job_context must be .* @contextlib\.asynccontextmanager$"):
                JobRunner(job_context=wrong)  # type: ignore[arg-type]
        JobRunner(job_context=asynccontextmanager(session))

    def test_a_job_context_takes_the_context(self) -> None:
        @asynccontextmanager
        async def session() -> AsyncIterator[Any]:
            yield {}

        with pytest.raises(TypeError, match=r"^job_context <function .* can't be used: it must take "):
            JobRunner(job_context=session)  # type: ignore[arg-type]

    @pytest.mark.parametrize("store", ["jobs.db", {}, MemoryJobStore])
    def test_a_store_is_a_store(self, store: Any) -> None:
        with pytest.raises(TypeError, match=r"^store must be a JobStore, not .*; write store=Sqlite"):
            JobRunner(store=store)

    def test_have_the_defaults_that_the_docstring_says(self) -> None:
        runner = JobRunner()
        assert (runner._concurrency, runner._max_pending, runner._ttl) == (10, 1000, 3600)
        assert (runner._keep, runner._drain) == (1000, 10)
        assert type(runner._store) is MemoryJobStore

    def test_numbers_may_be_zero(self) -> None:
        JobRunner(1, 0, 0, 0, 0)

    async def test_of_submit_are_checked(self) -> None:
        async with JobRunner() as runner:
            with pytest.raises(TypeError, match=r"^pipeline must be a pipeline, or any other step, not 1"):
                await runner.submit(1, 1)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"^job_id must be a str, not 1"):
                await runner.submit(SAME, 1, job_id=1)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"^job_id must not be empty"):
                await runner.submit(SAME, 1, job_id="")
            with pytest.raises(ValueError, match=r"^timeout must be greater than 0"):
                await runner.submit(SAME, 1, timeout=0)
            with pytest.raises(ValueError, match=r"^wait must be greater than or equal to 0"):
                await runner.run(SAME, 1, wait=-1)
            with pytest.raises(TypeError, match=r"^timeout "):
                await runner.run(SAME, 1, timeout="1")  # type: ignore[arg-type]
            assert await runner.list() == []

    async def test_of_list_are_checked(self) -> None:
        async with JobRunner() as runner:
            with pytest.raises(ValueError, match=r"^limit must be greater than or equal to 0"):
                await runner.list(limit=-1)
            with pytest.raises(ValueError, match=r"^offset must be greater than or equal to 0"):
                await runner.list(offset=-1)
            with pytest.raises(TypeError, match=r"^limit "):
                await runner.list(limit=1.5)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"^status must be one of accepted, running, .*, not 'done'"):
                await runner.list(status="done")  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"not 'done'$"):
                await runner.list(status=["running", "done"])  # type: ignore[list-item]


class TestSubmit:
    async def test_returns_at_once_and_the_job_runs_in_the_background(self) -> None:
        async with JobRunner() as runner:
            gate = Gate()
            job = await runner.submit(gate.pipeline, "value")
            assert job.status in ("accepted", "running")  # with eager tasks it has begun
            assert (job.pipeline, job.progress, job.finished, job.result) == ("gated", 0, None, None)
            await turns()
            job = await runner.get(job.id)
            assert job.status == "running"
            assert job.created <= job.started == job.updated  # type: ignore[operator]
            gate.open.set()
            job = await end_of(runner, job.id)
            assert (job.status, job.progress, job.result, job.error) == ("successful", 100, "value", None)
            assert await runner.get(job.id) == job

    async def test_takes_any_step(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: Any, *, context: Any = None) -> Any:
                return value + 1

        stage: Any = Stage("s", lambda x: x + 1)
        steps: list[Any] = [Own(), stage, stage.handler, parallel(a=same), Pipeline([Own()])]
        async with JobRunner() as runner:
            jobs = [await end_of(runner, (await runner.submit(step, 1)).id) for step in steps]
            assert [job.result for job in jobs] == [2, 2, 2, {"a": 1}, 2]
            assert [job.pipeline for job in jobs] == ["own", "s", "<lambda>", "parallel", "pipeline"]

    async def test_hands_the_value_and_the_context_on(self) -> None:
        context = {"a": 1}
        async with JobRunner() as runner:
            pipeline: Any = Pipeline([lambda value, context: (value, context)])
            job = await end_of(runner, (await runner.submit(pipeline, [1], context=context)).id)
            assert job.result == ([1], context)
            assert job.result[1] is context
            job = await end_of(runner, (await runner.submit(pipeline, 1)).id)
            assert job.result == (1, {})

    async def test_ids_are_uuids_or_those_given(self) -> None:
        async with JobRunner() as runner:
            first, second = await runner.submit(SAME, 1), await runner.submit(SAME, 1)
            assert len({first.id, second.id}) == 2
            assert len(first.id) == 36
            assert (await runner.submit(SAME, 1, job_id="mine")).id == "mine"

    async def test_an_id_is_refused_twice_as_long_as_the_job_is_known(self) -> None:
        async with JobRunner() as runner:
            gate = Gate()
            await runner.submit(gate.pipeline, 1, job_id="a")
            with pytest.raises(DuplicateJob, match="there is a job 'a' already") as raised:
                await runner.submit(SAME, 2, job_id="a")
            assert raised.value.job_id == "a"
            gate.open.set()
            assert (await end_of(runner, "a")).result == 1
            with pytest.raises(DuplicateJob):
                await runner.submit(SAME, 2, job_id="a")
            await runner.dismiss("a")  # removes it
            await runner.submit(SAME, 3, job_id="a")
            assert (await end_of(runner, "a")).result == 3

    @pytest.mark.virtual
    async def test_of_two_at_the_same_time_one_gets_the_id(self) -> None:
        async with JobRunner(store=SlowStore()) as runner:
            submits = (runner.submit(SAME, value, job_id="a") for value in (1, 2))
            first, second = await asyncio.gather(*submits, return_exceptions=True)
            assert isinstance(first, Job)
            assert isinstance(second, DuplicateJob)
            assert (await end_of(runner, "a")).result == 1

    async def test_the_times_are_aware_and_in_order(self) -> None:
        before = datetime.now(UTC)
        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(SAME, 1)).id)
        assert job.started is not None
        assert job.finished is not None
        assert job.created.tzinfo is UTC
        assert before <= job.created <= job.started <= job.finished == job.updated
        assert job.finished - before < timedelta(seconds=60)

    async def test_the_times_of_one_change_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate, begun = Gate(), datetime.now(UTC)
        clock = (begun + timedelta(milliseconds=number) for number in range(10**6))
        async with JobRunner() as runner:
            monkeypatch.setattr(runner, "_now", lambda: next(clock))  # no two readings are the same
            job = await runner.submit(gate.pipeline, 1)
            await turns()
            job = await runner.get(job.id)
            assert (job.status, job.updated) == ("running", job.started)
            gate.open.set()
            job = await end_of(runner, job.id)
            assert (job.status, job.updated) == ("successful", job.finished)

    @pytest.mark.virtual
    async def test_the_times_follow_the_clock_of_the_loop(self) -> None:
        async with JobRunner(1) as runner:
            first, second = await runner.submit(NAP, 100), await runner.submit(NAP, 10)
            first, second = await end_of(runner, first.id), await end_of(runner, second.id)
            second_started: Any = second.started
            assert second.created == first.created == first.started
            assert first.finished == first.created + timedelta(seconds=100) == second_started
            assert second.finished == second_started + timedelta(seconds=10)

    async def test_sees_the_context_variables_of_its_submitter(self) -> None:
        variable: ContextVar[str] = ContextVar("variable")
        gate = Gate()

        async def look(value: Any) -> str:
            found = variable.get("none")
            variable.set("the job's")
            return found

        async with JobRunner(1) as runner:
            await runner.submit(gate.pipeline, 1)
            variable.set("the first's")
            first = await runner.submit(look, 1)
            variable.set("the second's")
            second = await runner.submit(look, 1)
            gate.open.set()
            assert (await end_of(runner, first.id)).result == "the first's"
            assert (await end_of(runner, second.id)).result == "the second's"
            assert variable.get() == "the second's"
            assert (await runner.run(look, 1)).result == "the second's"

    @pytest.mark.virtual
    async def test_a_timeout_counts_from_the_beginning_of_the_run(self) -> None:
        class Own(Pipeline[Any, Any]):
            async def run(self, value: Any, **options: Any) -> Any:  # type: ignore[override]
                assert options.keys() == {"context"}
                await asyncio.sleep(value)

        async with JobRunner(1) as runner:
            steps: list[Any] = [Pipeline([nap], name="p"), Stage("p", nap), Own([nap], name="p")]
            ids = [(await runner.submit(step, 10, timeout=5)).id for step in steps]
            jobs = [await end_of(runner, job_id) for job_id in ids]
            assert now() == 15
            for job in jobs:
                assert (job.status, job.pipeline) == ("failed", "p")
                assert job.error is not None
                assert job.error.type == "DeadlineExceeded"
                assert job.error.message == "no result within the run's timeout of 5 s"
            for step in steps:
                assert (
                    await end_of(runner, (await runner.submit(step, 4, timeout=5)).id)
                ).status == "successful"

    async def test_a_finish_ends_the_job_early(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: Any, *, context: Any = None) -> Any:
                raise Finish(value)

        def finish(value: Any) -> Any:
            raise Finish(value)

        async with JobRunner() as runner:
            for step in (
                Own(),
                Pipeline([finish, fail]),
                Stage("s", finish),
                Pipeline([Pipeline([finish]), fail]),
            ):
                job = await end_of(runner, (await runner.submit(step, 7)).id)
                assert (job.status, job.result, job.progress) == ("successful", 7, 100)


class TestFailure:
    async def test_says_what_where_and_after_how_many_attempts(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        inner: Any = Pipeline([Stage("price", fail, retries=2)], name="enrich")
        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(Pipeline([same, inner], name="p"), "way")).id)
        assert (job.status, job.result) == ("failed", None)
        assert job.error == JobFailure("ValueError", "no way", "enrich/price", 3)
        assert job.finished is not None
        (record,) = [record for record in caplog.records if "job" in record.getMessage()]
        assert record.name == "async_pipeline"
        assert record.levelno == logging.ERROR
        assert record.getMessage() == f"job {job.id} of 'p' failed"
        assert record.exc_info is not None
        assert record.exc_info[1].__cause__.args == ("no way",)  # type: ignore[union-attr]

    async def test_of_another_step_has_no_stage(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: Any, *, context: Any = None) -> Any:
                raise LookupError("nothing")

        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(Own(), 1)).id)
        assert job.error == JobFailure("LookupError", "nothing", None, 1)

    async def test_progress_stays_where_it_was(self) -> None:
        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(Pipeline([same, fail]), 1)).id)
        assert (job.status, job.progress) == ("failed", 50)

    async def test_an_error_that_cannot_be_shown_is_a_failure_all_the_same(self) -> None:
        class Unspeakable(Exception):  # noqa: N818
            def __str__(self) -> str:
                raise RuntimeError

        async def broken(value: Any) -> Any:
            raise Unspeakable

        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(broken, 1)).id)
        assert job.error == JobFailure("Unspeakable", "", "broken", 1)

    async def test_a_cancellation_that_nobody_asked_for_is_one(self) -> None:
        async def stray(value: Any) -> Any:
            raise asyncio.CancelledError("stray")

        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(stray, 1)).id)
            assert job.status == "failed"
            assert job.error == JobFailure("CancelledError", "stray", None, 1)

    async def test_of_one_job_is_none_of_the_others(self) -> None:
        async with JobRunner(2) as runner:
            ids = [(await runner.submit(FAIL if n % 2 else SAME, n)).id for n in range(10)]
            statuses = [(await end_of(runner, job_id)).status for job_id in ids]
        assert statuses == ["successful", "failed"] * 5

    @pytest.mark.parametrize("kind", [GeneratorExit, BaseExceptionGroup])
    async def test_other_base_exceptions_are_failures_too(self, kind: Any) -> None:
        async def broken(value: Any) -> Any:
            raise kind("x", [SystemExit()]) if kind is BaseExceptionGroup else kind("x")

        async with JobRunner(1) as runner:
            job = await end_of(runner, (await runner.submit(broken, 1)).id)
            assert job.status == "failed"
            assert job.finished is not None
            assert (await runner.run(SAME, 1)).status == "successful"

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("is_late", [False, True])
    @pytest.mark.parametrize("way", ["submit", "pending", "run"])
    @pytest.mark.parametrize("factory", ["eager", "lazy"])
    def test_what_ends_the_loop_ends_the_job(
        self,
        kind: type[BaseException],
        is_late: bool,
        way: str,
        factory: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if factory == "eager" and not hasattr(asyncio, "eager_task_factory"):
            pytest.skip("there are no eager tasks yet")
        complaints: list[Any] = []
        # a record that pytest keeps would keep the task, so that it could not complain
        monkeypatch.setattr(logging.getLogger("async_pipeline"), "disabled", True)

        async def broken(value: Any) -> Any:
            if is_late:
                await asyncio.sleep(1)
            raise kind("stop")

        async def main() -> None:
            if way == "run":
                await runner.run(broken, 1)
            else:
                await runner.submit(SAME if way == "submit" else NAP, 1)
                await runner.submit(broken, 1, job_id="a")
            await asyncio.sleep(10)

        async def rest() -> None:
            if way != "run":
                error = (await end_of(runner, "a")).error
                assert error == JobFailure(kind.__name__, "stop")
            await turns()
            assert repr(runner) == "<JobRunner open running=0 pending=0>"
            assert (await runner.run(SAME, 1)).status == "successful"
            assert (await end_of(runner, (await runner.submit(SAME, 1)).id)).status == "successful"
            await runner.__aexit__(None, None, None)

        loop = VirtualClockLoop()
        loop.set_exception_handler(lambda loop, complaint: complaints.append(complaint))
        runner = JobRunner(1)
        loop.run_until_complete(runner.__aenter__())
        if factory == "eager":
            loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
        first = loop.create_task(main())
        with pytest.raises(kind, match="stop"):
            loop.run_until_complete(first)
        loop.run_until_complete(rest())
        assert asyncio.all_tasks(loop) <= {first}
        if first.cancel():
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(first)
        loop.close()
        del first
        gc.collect()
        assert not complaints


@pytest.mark.virtual
class TestDismiss:
    async def test_before_its_turn_it_never_runs(self) -> None:
        gate = Gate()
        async with JobRunner(1) as runner:
            await runner.submit(gate.pipeline, "first")
            job = await runner.submit(gate.pipeline, "second")
            job = await runner.dismiss(job.id)
            assert (job.status, job.started, job.progress) == ("dismissed", None, 0)
            assert job.finished is not None
            assert await runner.get(job.id) == job
            await runner.submit(gate.pipeline, "third")
            gate.open.set()
        assert gate.began == ["first", "third"]

    async def test_before_it_began_to_run(self) -> None:
        gate = Gate()
        async with JobRunner() as runner:
            job = await runner.submit(gate.pipeline, 1)  # its task has had no turn yet, unless it is eager
            assert (await runner.dismiss(job.id)).status == "dismissed"
            assert gate.began == gate.cancelled

    async def test_before_it_began_to_run_the_next_has_its_turn(self) -> None:
        async with JobRunner(1, drain=100) as runner:
            first = await runner.submit(NAP, 50)
            second = await runner.submit(NAP, 1)
            await runner.dismiss(first.id)
        assert now() == 1
        assert (await runner.get(second.id)).status == "successful"

    async def test_while_it_runs_waits_until_the_handler_has_seen_it(self) -> None:
        cleaner = Cleaner()
        async with JobRunner() as runner:
            job = await runner.submit(cleaner.pipeline, 1)
            await asyncio.sleep(3)
            started = (await runner.get(job.id)).started
            job = await runner.dismiss(job.id)
            assert cleaner.is_clean
            assert now() == 8
            assert (job.status, job.started, job.result, job.error) == ("dismissed", started, None, None)
            assert job.finished == job.created + timedelta(seconds=8)

    async def test_by_several_at_once_cancels_once(self) -> None:
        cleaner = Cleaner()
        async with JobRunner() as runner:
            job = await runner.submit(cleaner.pipeline, 1)
            await asyncio.sleep(1)
            dismissals = [asyncio.create_task(runner.dismiss(job.id)) for _ in range(3)]
            await asyncio.sleep(1)
            dismissals.append(asyncio.create_task(runner.dismiss(job.id)))
            ends = await asyncio.gather(*dismissals)
            assert cleaner.is_clean
            assert now() == 6
            assert [job.status for job in ends] == ["dismissed"] * 4
            assert await runner.get(job.id) == ends[0] == ends[3]

    async def test_that_is_cancelled_leaves_the_job_dismissed(self) -> None:
        cleaner = Cleaner()
        async with JobRunner() as runner:
            job = await runner.submit(cleaner.pipeline, 1)
            await asyncio.sleep(1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await runner.dismiss(job.id)
            assert (await runner.get(job.id)).status == "running"
            assert (await end_of(runner, job.id)).status == "dismissed"
            assert now() == 6

    async def test_a_handler_that_swallows_it_or_raises_on_it_was_dismissed(self) -> None:
        async def swallow(value: Any) -> str:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)
            await asyncio.sleep(1)
            return "a result"

        async def stumble(value: Any) -> str:
            try:
                await asyncio.sleep(10)
            finally:
                raise LookupError("lost")

        async with JobRunner() as runner:
            for handler in (swallow, stumble):
                job = await runner.submit(handler, 1)
                await asyncio.sleep(1)
                job = await runner.dismiss(job.id)
                assert (job.status, job.result, job.error) == ("dismissed", None, None)
            assert now() == 3

    async def test_of_one_that_has_ended_removes_it(self) -> None:
        async with JobRunner() as runner:
            for pipeline in (SAME, FAIL):
                job = await end_of(runner, (await runner.submit(pipeline, 1)).id)
                assert await runner.dismiss(job.id) == job
                with pytest.raises(JobNotFound, match=f"there is no job '{job.id}', or no longer") as raised:
                    await runner.get(job.id)
                assert raised.value.job_id == job.id
                with pytest.raises(JobNotFound):
                    await runner.dismiss(job.id)
            assert await runner.list() == []

    async def test_of_one_that_is_being_saved_returns_how_it_has_ended(self) -> None:
        async with JobRunner(store=SlowStore()) as runner:
            job = await runner.submit(SAME, 1)
            await asyncio.sleep(0.5)  # a second to save that it runs, another one to save its end
            assert (await runner.dismiss(job.id)).status == "dismissed"
            job = await runner.submit(SAME, 1)
            await asyncio.sleep(1.5)
            job = await runner.dismiss(job.id)
            assert (job.status, job.result) == ("successful", 1)
            assert job.finished == job.started + timedelta(seconds=1)  # type: ignore[operator]

    async def test_of_one_that_is_being_submitted(self) -> None:
        async with JobRunner(store=SlowStore()) as runner:
            submitting = asyncio.create_task(runner.submit(NAP, 100, job_id="a"))
            await asyncio.sleep(0.75)  # it is in the store already
            assert (await runner.dismiss("a")).status == "dismissed"
            await submitting
            assert now() < 10

    async def test_a_job_may_dismiss_itself(self) -> None:
        async def suicidal(value: Any) -> Any:
            await runner.dismiss("a")

        async with JobRunner() as runner:
            await runner.submit(suicidal, 1, job_id="a")
            assert (await end_of(runner, "a")).status == "dismissed"
            await runner.submit(NAP, 1, job_id="b")

    async def test_an_unknown_one_is_not_found(self) -> None:
        async with JobRunner() as runner:
            for call in (runner.get, runner.dismiss, lambda job_id: history(runner, job_id)):
                with pytest.raises(JobNotFound, match="'nobody'"):
                    await call("nobody")

    async def test_frees_a_place_in_the_queue_at_once(self) -> None:
        gate = Gate()
        async with JobRunner(1, 1, drain=0) as runner:
            ids = [(await runner.submit(gate.pipeline, n)).id for n in range(2)]
            for job_id in ids:
                with pytest.raises(JobQueueFull):
                    await runner.submit(gate.pipeline, 9)
                await runner.dismiss(job_id)
                await runner.submit(gate.pipeline, 2)


@pytest.mark.virtual
class TestConcurrency:
    @pytest.mark.parametrize("concurrency", [1, 3, 7])
    @pytest.mark.parametrize("store", [MemoryJobStore, lambda: SlowStore(0.01)])
    async def test_so_many_run_at_the_same_time(
        self, concurrency: int, store: Callable[[], JobStore]
    ) -> None:
        meter = Meter()
        async with JobRunner(concurrency, store=store(), drain=100) as runner:
            for value in range(20):
                await runner.submit(meter.pipeline, value)
            running = await runner.list(status="running")
            assert len(running) <= concurrency
        assert meter.most == concurrency
        assert meter.started == sorted(meter.finished) == list(range(20))

    async def test_they_start_in_the_order_of_acceptance(self) -> None:
        meter = Meter()
        async with JobRunner(1, drain=100) as runner:
            ids = [(await runner.submit(meter.pipeline, value)).id for value in range(5)]
            await runner.dismiss(ids[2])
            jobs = [await end_of(runner, job_id) for job_id in ids]
        assert meter.started == [0, 1, 3, 4]
        begun: Any = [job.started for job in jobs if job.started]
        assert begun == sorted(begun)

    @pytest.mark.parametrize("max_pending", [0, 1, 4])
    async def test_so_many_wait(self, max_pending: int) -> None:
        async with JobRunner(2, max_pending) as runner:
            for _ in range(2 + max_pending):
                await runner.submit(NAP, 1)
            with pytest.raises(
                JobQueueFull, match=f"^{max_pending} jobs wait already, .* submit again"
            ) as raised:
                await runner.submit(NAP, 1)
            assert raised.value.max_pending == max_pending
            assert len(await runner.list(status="accepted")) in (max_pending, max_pending + 2)
            assert len(await runner.list()) == 2 + max_pending
            assert repr(runner) == f"<JobRunner open running=2 pending={max_pending}>"
            await asyncio.sleep(1.5)
            await runner.submit(NAP, 1)

    async def test_those_that_are_being_added_count_as_waiting(self) -> None:
        async with JobRunner(2, 1, store=SlowStore()) as runner:
            submits = (runner.submit(SAME, value) for value in range(5))
            results = await asyncio.gather(*submits, return_exceptions=True)
            assert [type(result) for result in results] == [Job] * 3 + [JobQueueFull] * 2

    async def test_who_knows_the_end_of_a_job_may_submit_the_next(self) -> None:
        async with JobRunner(1, 0, store=SlowStore()) as runner:
            for end in (end_of, JobRunner.dismiss, end_of):
                job = await runner.submit(NAP, 1)
                await end(runner, job.id)

    async def test_jobs_may_submit_jobs(self) -> None:
        depth = 30

        async def countdown(value: int) -> int:
            if value:
                await runner.submit(countdown, value - 1, job_id=str(value - 1))
            return value

        async with JobRunner(depth, 0) as runner:
            await runner.submit(countdown, depth - 1, job_id=str(depth - 1))
            for value in range(depth):
                while True:
                    with suppress(JobNotFound):
                        assert (await end_of(runner, str(value))).result == value
                        break
                    await asyncio.sleep(0)

    async def test_of_jobs_that_never_suspend_any_number_ends(self) -> None:
        async with JobRunner(1, 3000) as runner:
            done: list[int] = []
            for value in range(3000):
                await runner.submit(done.append, value)
        assert done == list(range(3000))


@pytest.mark.virtual
class TestEviction:
    @pytest.mark.parametrize("ttl", [0, 10])
    async def test_a_job_is_gone_some_time_after_its_end(self, ttl: int) -> None:
        store = MemoryJobStore()
        async with JobRunner(ttl=ttl, store=store) as runner:
            await runner.submit(NAP, 100, job_id="a")
            await asyncio.sleep(100)
            assert (await end_of(runner, "a")).status == "successful"
            await asyncio.sleep(ttl - 0.1)
            if ttl:
                assert (await runner.get("a")).result == 100
            await asyncio.sleep(0.2)
            with pytest.raises(JobNotFound):
                await runner.get("a")
            with pytest.raises(JobNotFound):
                await runner.dismiss("a")
            with pytest.raises(JobNotFound):
                await history(runner, "a")
            assert not store._jobs  # without anybody asking
            assert not store._finished

    async def test_at_that_moment_all_agree(self) -> None:
        async with JobRunner(ttl=60) as runner:
            job = await runner.submit(NAP, 5)
            await asyncio.sleep(65)
            assert await runner.list() == [await runner.get(job.id)]

    async def test_each_in_its_turn(self) -> None:
        store = MemoryJobStore()
        async with JobRunner(ttl=10, store=store) as runner:
            for seconds in (1, 2, 3, 25):
                await runner.submit(NAP, seconds, job_id=str(seconds))
            left = {}
            for moment in (10, 12, 14, 34, 36):
                await asyncio.sleep(moment - now())
                left[moment] = sorted(store._jobs, key=int)
        assert left == {10: ["1", "2", "3", "25"], 12: ["2", "3", "25"], 14: ["25"], 34: ["25"], 36: []}

    async def test_what_is_too_old_is_gone_even_if_the_store_has_it(self) -> None:
        store = BrokenStore(evict=1000)
        async with JobRunner(ttl=10, store=store) as runner:
            await runner.submit(SAME, 1, job_id="a")
            await asyncio.sleep(9)
            assert (await runner.get("a")).result == 1
            await asyncio.sleep(2)
            assert store._jobs
            with pytest.raises(JobNotFound):
                await runner.get("a")

    async def test_list_leaves_out_what_is_too_old(self) -> None:
        async with JobRunner(ttl=10) as runner:
            await runner.submit(NAP, 1, job_id="a")
            await runner.submit(NAP, 5, job_id="b")
            await asyncio.sleep(12)
            assert [job.id for job in await runner.list()] == ["b"]

    async def test_running_and_waiting_ones_stay(self) -> None:
        gate = Gate()
        async with JobRunner(1, ttl=0, keep=0) as runner:
            await runner.submit(gate.pipeline, 1, job_id="a")
            await runner.submit(gate.pipeline, 2, job_id="b")
            await asyncio.sleep(1_000_000)
            assert [job.status for job in await runner.list()] == ["accepted", "running"]
            gate.open.set()

    @pytest.mark.parametrize("keep", [0, 1, 7])
    async def test_so_many_that_have_ended_are_kept(self, keep: int) -> None:
        async with JobRunner(20, keep=keep) as runner:
            for number in reversed(range(20)):
                await runner.submit(NAP, number, job_id=str(number))
            await asyncio.sleep(500)
            left = {job.id for job in await runner.list()}
            assert left == {str(number) for number in range(20 - keep, 20)}
            for number in range(20):
                if str(number) not in left:
                    with pytest.raises(JobNotFound):
                        await runner.get(str(number))

    async def test_who_watches_or_dismisses_sees_the_end_of_one_that_is_not_kept(self) -> None:
        async with JobRunner(keep=0) as runner:
            first, second = await runner.submit(NAP, 1), await runner.submit(NAP, 10)
            assert (await end_of(runner, first.id)).result == 1
            assert (await runner.dismiss(second.id)).status == "dismissed"
            assert await runner.list() == []

    async def test_ten_thousand_jobs_all_end_and_not_more_than_keep_stay(self) -> None:
        store, ends = MemoryJobStore(), 0

        async def count(value: int) -> None:
            nonlocal ends
            await asyncio.sleep(value % 7)
            ends += 1

        async with JobRunner(100, 10_000, keep=50, store=store, drain=10_000) as runner:
            for number in range(10_000):
                await runner.submit(count, number)
            while await runner.list(status=["accepted", "running"], limit=1):
                assert len(await runner.list(status="successful", limit=100)) <= 50
                await asyncio.sleep(10)
            assert len(store._jobs) == 50
        assert ends == 10_000
        assert not runner._runs

    async def test_a_time_to_live_beyond_all_times_is_for_ever(self) -> None:
        async with JobRunner(ttl=1e300) as runner:
            job = await runner.submit(SAME, 1)
            await asyncio.sleep(1e6)
            assert (await runner.get(job.id)).status == "successful"
            assert len(await runner.list()) == 1

    async def test_leaves_no_timer_behind(self) -> None:
        async with JobRunner(ttl=10) as runner:
            await runner.submit(SAME, 1)
            await asyncio.sleep(1)
        loop: Any = asyncio.get_running_loop()
        assert all(timer.cancelled() for timer in loop._scheduled)


@pytest.mark.virtual
class TestWatch:
    async def test_yields_the_present_and_then_each_change(self) -> None:
        async def work(value: Any) -> Any:
            for number in range(1, 4):
                await asyncio.sleep(1)
                report_progress(number / 4, f"step {number}")
            await asyncio.sleep(1)

        async with JobRunner(1) as runner:
            await runner.submit(NAP, 5)
            job = await runner.submit(work, 1)
            seen = await history(runner, job.id)
        assert [(job.status, job.progress, job.message) for job in seen] == [
            ("accepted", 0, None),
            ("running", 0, None),
            ("running", 25, "step 1"),
            ("running", 50, "step 2"),
            ("running", 75, "step 3"),
            ("successful", 100, "step 3"),
        ]
        assert [(job.updated - seen[0].created).seconds for job in seen] == [0, 5, 6, 7, 8, 9]
        assert [job.finished is not None for job in seen] == [False] * 5 + [True]

    async def test_of_one_that_has_ended_yields_it_once(self) -> None:
        async with JobRunner() as runner:
            job = await runner.submit(SAME, 1)
            await asyncio.sleep(1)
            assert await history(runner, job.id) == [await runner.get(job.id)]

    async def test_who_is_slow_misses_changes_but_not_the_end(self) -> None:
        async def work(value: Any) -> Any:
            for number in range(10):
                await asyncio.sleep(1)
                report_progress(number / 10)

        async with JobRunner() as runner:
            job = await runner.submit(work, 1)
            seen = []
            async for latest in runner.watch(job.id):
                seen.append(latest)
                await asyncio.sleep(4.5)
            assert seen[-1].status == "successful"
            assert [job.progress for job in seen] == [0, 30, 70, 100]

    @pytest.mark.parametrize("keep", [0, 1000])
    async def test_who_is_slow_sees_the_end_of_what_is_gone_by_then(self, keep: int) -> None:
        store = SharedStore()
        async with JobRunner(keep=keep, store=store) as runner:
            job = await runner.submit(NAP, 5)
            watching = runner.watch(job.id)
            assert (await anext(watching)).finished is None
            await asyncio.sleep(10)
            assert bool(store._jobs) == bool(keep)
        assert [job.status async for job in watching] == ["successful"]

    async def test_any_number_may_watch_and_go(self) -> None:
        async with JobRunner() as runner:
            job = await runner.submit(NAP, 10)
            watchers = [asyncio.create_task(end_of(runner, job.id)) for _ in range(5)]
            await asyncio.sleep(1)
            for watcher in watchers[:2]:
                watcher.cancel()
            async for _ in runner.watch(job.id):
                break
            ends = await asyncio.gather(*watchers[2:])
            assert [end.status for end in ends] == ["successful"] * 3
            assert now() == 10

    async def test_of_one_that_is_being_submitted(self) -> None:
        async with JobRunner(store=SlowStore(4), drain=100) as runner:
            submitting = asyncio.create_task(runner.submit(NAP, 1, job_id="a"))
            await asyncio.sleep(2.5)
            watching = asyncio.create_task(history(runner, "a"))
            await asyncio.sleep(0)
        assert (await submitting).id == "a"
        seen = await watching
        assert [job.status for job in seen] == ["accepted", "running", "running", "successful"]
        assert [job.progress for job in seen] == [0, 0, 100, 100]  # its end has yet to be saved

    async def test_sees_the_end_when_the_runner_is_left(self) -> None:
        async with JobRunner(1, drain=0) as runner:
            jobs = [await runner.submit(NAP, 10), await runner.submit(NAP, 10)]
            watching = [asyncio.create_task(end_of(runner, job.id)) for job in jobs]
            await asyncio.sleep(1)
        for job in await asyncio.gather(*watching):
            assert (job.status, job.error) == ("failed", CLOSED)


class TestList:
    @pytest.mark.virtual
    async def test_the_newest_first_with_limit_and_offset(self) -> None:
        async with JobRunner(2) as runner:
            for number in range(10):
                await runner.submit(NAP, 10 - number, job_id=str(number))
            await asyncio.sleep(15)
            numbers = "".join([job.id for job in await runner.list()])
            assert numbers == "9876543210"
            for limit, offset, expected in [
                (3, 0, "987"),
                (3, 3, "654"),
                (3, 9, "0"),
                (3, 10, ""),
                (0, 0, ""),
                (100, 8, "10"),
                (2**70, 2**70, ""),
            ]:
                jobs = await runner.list(limit=limit, offset=offset)
                assert "".join(job.id for job in jobs) == expected

    async def test_a_hundred_by_default(self) -> None:
        async with JobRunner() as runner:
            for _ in range(101):
                await runner.submit(SAME, 1)
            assert len(await runner.list()) == 100
            assert len(await runner.list(limit=200)) == 101

    async def test_of_a_status_or_several(self) -> None:
        gate = Gate()
        async with JobRunner(1) as runner:
            await runner.submit(SAME, 1, job_id="successful")
            await runner.submit(FAIL, 1, job_id="failed")
            await runner.submit(gate.pipeline, 1, job_id="dismissed")
            await end_of(runner, "failed")
            await runner.dismiss("dismissed")
            await runner.submit(gate.pipeline, 1, job_id="running")
            await turns()
            await runner.submit(gate.pipeline, 1, job_id="accepted")
            statuses: list[JobStatus] = ["accepted", "running", "dismissed", "failed", "successful"]
            for status in statuses:
                (job,) = await runner.list(status=status)
                assert job.id == job.status == status
            assert [job.id for job in await runner.list()] == statuses
            assert [job.id for job in await runner.list(status=("failed", "running"))] == [
                "running",
                "failed",
            ]
            assert [job.id for job in await runner.list(status=statuses, limit=2, offset=1)] == statuses[1:3]
            assert await runner.list(status=[]) == []
            gate.open.set()

    async def test_of_a_pipeline_or_several(self) -> None:
        async with JobRunner() as runner:
            for name in ("a", "b", "c", "a"):
                await runner.submit(SAME.replace(name=name), 1)
            names = [job.pipeline for job in await runner.list(pipeline={"a", "c"})]
            assert names == ["a", "c", "a"]
            assert [job.pipeline for job in await runner.list(pipeline="b")] == ["b"]
            assert await runner.list(pipeline="d") == []
            await asyncio.sleep(0.01)
            assert len(await runner.list(pipeline="a", status="successful")) == 2
            assert await runner.list(pipeline="a", status="failed") == []

    @pytest.mark.virtual
    async def test_knows_no_less_than_get(self) -> None:
        async def work(value: Any) -> Any:
            await asyncio.sleep(1)
            report_progress(0.5, "half")
            await asyncio.sleep(4)

        async with JobRunner(store=SlowStore(2)) as runner:
            job = await runner.submit(work, 1)
            await asyncio.sleep(3.5)
            before = await runner.get(job.id)
            assert (before.progress, before.message) == (50, "half")
            (listed,) = await runner.list()
            assert listed == before
            await asyncio.sleep(2.9)  # its end is about to be saved
            listing = asyncio.create_task(runner.list())
            await end_of(runner, job.id)
            (listed,) = await listing
            assert listed.progress >= before.progress

    @pytest.mark.virtual
    async def test_a_job_that_ends_meanwhile_is_not_older_than_it_was(self) -> None:
        async def work(value: Any) -> Any:
            report_progress(0.5)
            await asyncio.sleep(0.5)

        class Store(SlowStore):
            async def list(self, **options: Any) -> list[Job]:
                jobs = await MemoryJobStore.list(self, **options)
                await asyncio.sleep(10)
                return jobs

        async with JobRunner(store=Store(0)) as runner:
            job = await runner.submit(work, 1)
            await asyncio.sleep(0.1)
            assert await progress_at(runner, job.id) == 50
            assert [job.progress for job in await runner.list()] == [100]
            later = asyncio.create_task(runner.list())
            await asyncio.sleep(0)
            await runner.submit(work, 1)
            await later
            listing = asyncio.create_task(runner.list(status="running"))
            await asyncio.sleep(0)
            assert await listing == []

    @pytest.mark.virtual
    async def test_a_job_that_comes_meanwhile_is_not_older_than_it_was(self) -> None:
        async def work(value: Any) -> Any:
            report_progress(0.5)
            await asyncio.sleep(100)

        class Store(MemoryJobStore):
            async def list(self, **options: Any) -> list[Job]:
                await asyncio.sleep(2)
                return await super().list(**options)

        async with JobRunner(store=Store(), drain=0) as runner:
            listing = asyncio.create_task(runner.list())
            await asyncio.sleep(1)
            job = await runner.submit(work, 1)
            await turns()
            assert await progress_at(runner, job.id) == 50
            assert [job.progress for job in await listing] == [50]

    @pytest.mark.virtual
    async def test_each_has_the_status_that_was_asked_for(self) -> None:
        async with JobRunner(store=SlowStore()) as runner:
            job = await runner.submit(NAP, 10)
            await asyncio.sleep(0.1)
            assert (await runner.get(job.id)).status == "running"  # and not saved yet
            assert await runner.list(status="accepted") == []
            await runner.dismiss(job.id)


@pytest.mark.virtual
class TestRun:
    async def test_what_ends_in_time_is_nobody_elses(self) -> None:
        store = SlowStore()
        async with JobRunner(store=store) as runner:
            calls = len(store.calls)
            job = await runner.run(NAP, 3, wait=4)
            assert now() == 0.5 + 3  # to open the store, and to run
            assert (job.status, job.result, job.progress, job.pipeline) == ("successful", 3, 100, "nap")
            assert job.finished == job.started + timedelta(seconds=3)  # type: ignore[operator]
            assert len(store.calls) == calls
            with pytest.raises(JobNotFound):
                await runner.get(job.id)

    async def test_failures_are_jobs_as_well(self) -> None:
        async with JobRunner() as runner:
            job = await runner.run(FAIL, "way", context=None)
            assert (job.status, job.error) == ("failed", JobFailure("ValueError", "no way", "fail", 1))
            job = await runner.run(NAP, 10, timeout=5, wait=20)
            assert job.error is not None
            assert job.error.type == "DeadlineExceeded"
            assert now() == 5

    async def test_hands_the_context_on(self) -> None:
        async with JobRunner() as runner:
            assert (await runner.run(lambda value, context: (value, context), 1, context={2: 3})).result == (
                1,
                {2: 3},
            )

    async def test_what_takes_longer_goes_on_as_a_job(self) -> None:
        async def work(value: Any) -> Any:
            await asyncio.sleep(1)
            report_progress(0.25, "a quarter")
            await asyncio.sleep(9)
            return value

        async with JobRunner() as runner:
            job = await runner.run(work, "value", wait=2)
            assert now() == 2
            assert (job.status, job.progress, job.message) == ("running", 25, "a quarter")
            assert await runner.get(job.id) == job
            assert await runner.list(status="running") == [job]
            job = await end_of(runner, job.id)
            assert (job.status, job.result) == ("successful", "value")
            assert now() == 10
            assert await runner.list() == [job]

    async def test_without_waiting_it_is_a_job_at_once(self) -> None:
        async with JobRunner() as runner:
            job = await runner.run(NAP, 5, wait=0)
            assert now() == 0
            assert (await end_of(runner, job.id)).result == 5

    async def test_neither_waits_for_its_turn_nor_counts_until_it_is_a_job(self) -> None:
        async with JobRunner(1, 0) as runner:
            running = asyncio.create_task(runner.run(NAP, 100, wait=2))
            await asyncio.sleep(1)
            first = await runner.submit(NAP, 10)
            assert (await runner.run(NAP, 0.5)).status == "successful"
            assert (await runner.get(first.id)).status == "running"
            second = await running
            assert now() == 2
            await runner.dismiss(first.id)
            with pytest.raises(JobQueueFull):  # it counts now
                await runner.submit(NAP, 1)
            await runner.dismiss(second.id)
            await runner.submit(NAP, 1)

    async def test_more_of_them_than_may_run_delay_the_others(self) -> None:
        async with JobRunner(1, 1) as runner:
            for _ in range(3):
                await runner.run(NAP, 10, wait=1)
            job = await runner.submit(NAP, 1)
            assert repr(runner) == "<JobRunner open running=3 pending=1>"
            await end_of(runner, job.id)
            assert now() == 13

    @pytest.mark.parametrize("seconds", [None, 5.0, 20.0])
    async def test_is_cancelled_with_its_caller(self, seconds: float | None) -> None:
        cleaner = Cleaner()
        async with JobRunner() as runner:
            running = asyncio.create_task(runner.run(cleaner.pipeline, 1, wait=seconds))
            await asyncio.sleep(4)
            running.cancel()
            await asyncio.sleep(1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert cleaner.is_clean
            assert now() == 9
            assert await runner.list() == []

    async def test_cancelled_before_it_began(self) -> None:
        gate = Gate()
        async with JobRunner() as runner:
            running = asyncio.create_task(runner.run(gate.pipeline, 1))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert gate.began == gate.cancelled

    @pytest.mark.parametrize("moment", [0.25, 0.5, 0.75, 1.0])
    @pytest.mark.parametrize("seconds", [0.3, 0.9, 100])
    async def test_cancelled_while_it_becomes_a_job(self, moment: float, seconds: float) -> None:
        store = SlowStore()
        async with JobRunner(1, 0, store=store) as runner:
            running = asyncio.create_task(runner.run(NAP, seconds + 0.1, wait=0.1))
            await asyncio.sleep(0.1 + moment)
            is_done = not running.cancel()
            await asyncio.wait((running,))
            await asyncio.sleep(20 if not running.cancelled() else 5)
            if running.cancelled():
                assert not is_done
                assert not store._jobs
                assert not runner._runs
                assert (await runner.submit(SAME, 1)).status in ("accepted", "running")
        assert all(job.finished for job in store._jobs.values())

    @pytest.mark.parametrize("seconds", [0.2, 0.6, 2])
    async def test_that_ends_while_it_becomes_a_job(self, seconds: float) -> None:
        store = SlowStore()
        async with JobRunner(store=store) as runner:
            job = await runner.run(NAP, seconds, wait=0.1)
            assert job.status == "running"
            job = await end_of(runner, job.id)
            assert (job.status, job.result) == ("successful", seconds)
            assert store._jobs[job.id] == job

    async def test_left_before_it_began(self) -> None:
        gate = Gate()
        runner = JobRunner()
        with pytest.raises(LookupError):
            async with runner:
                running = asyncio.create_task(runner.run(gate.pipeline, 1, wait=0))
                await asyncio.sleep(0)
                raise LookupError
        assert (await running).error == CLOSED
        assert await runner.list() == []
        assert gate.began == gate.cancelled

    async def test_that_ends_while_a_store_fails_to_add_it(self) -> None:
        class Store(BrokenStore):
            async def add(self, job: Job) -> None:
                await asyncio.sleep(5)
                await super().add(job)

        async with JobRunner(store=Store(add=1, save_end=100)) as runner:
            with pytest.raises(OSError, match="disk full"):
                await runner.run(NAP, 3, wait=1)
            assert now() == 6  # it is no job, so its end is not saved

    async def test_that_leaves_a_cancellation_behind_while_it_becomes_a_job(self) -> None:
        async def work(value: Any) -> Any:
            await asyncio.sleep(2)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return value

        async with JobRunner(drain=1000, store=SlowStore(10)) as runner:
            job = await runner.run(work, 1, wait=1)
            assert (await end_of(runner, job.id)).status == "successful"
            left = now()
        assert now() - left < 100

    async def test_a_store_that_fails_then_ends_it(self) -> None:
        cleaner = Cleaner()
        async with JobRunner(1, 0, store=BrokenStore(add=1)) as runner:
            with pytest.raises(OSError, match="disk full"):
                await runner.run(cleaner.pipeline, 1, wait=1)
            assert cleaner.is_clean
            assert await runner.list() == []
            job = await runner.run(NAP, 5, wait=1)
            assert (await end_of(runner, job.id)).status == "successful"
            await runner.submit(SAME, 1)


@pytest.mark.virtual
class TestLifespan:
    async def test_a_runner_that_was_never_entered_accepts_and_knows_nothing(self) -> None:
        runner = JobRunner()
        assert repr(runner) == "<JobRunner closed running=0 pending=0>"
        calls: list[Coroutine[Any, Any, Any]] = [
            runner.submit(SAME, 1),
            runner.run(SAME, 1),
            runner.get("a"),
            runner.dismiss("a"),
            runner.list(),
            history(runner, "a"),
        ]
        for call in calls:
            with pytest.raises(
                JobRunnerClosed, match="use it inside 'async with runner:', or in the lifespan"
            ):
                await call

    async def test_is_entered_once_at_a_time_and_again_afterwards(self) -> None:
        runner = JobRunner(drain=0)
        for number in range(3):
            async with runner as entered:
                assert entered is runner
                with pytest.raises(RuntimeError, match="is entered already; share the one, or make another"):
                    await runner.__aenter__()
                assert repr(runner) == "<JobRunner open running=0 pending=0>"
                job = await runner.submit(SAME, number, job_id=str(number))
                assert (await end_of(runner, job.id)).result == number
                await runner.submit(NAP, 10)
            assert repr(runner) == "<JobRunner closed running=0 pending=0>"
            for submit in (runner.submit, runner.run):
                with pytest.raises(JobRunnerClosed):
                    await submit(SAME, 1)
        assert (await runner.get("0")).result == 0  # the store in memory still knows
        assert len(await runner.list()) == 6

    def test_is_entered_again_on_another_loop(self) -> None:
        runner = JobRunner(1, drain=0)

        async def main(number: int) -> str:
            async with runner:
                job = await runner.submit(NAP, 10)
                await runner.submit(NAP, 10)
                assert (await end_of(runner, job.id)).result == 10
                if number:
                    assert (await runner.get(ids[-1])).status == "successful"
                return job.id

        ids: list[str] = []
        for number in range(3):
            ids.append(run_virtually(main(number)))
        assert len(set(ids)) == 3

    async def test_a_store_that_cannot_be_opened_leaves_it_closed(self) -> None:
        runner = JobRunner(store=BrokenStore(open=1))
        with pytest.raises(OSError, match="disk full"):
            await runner.__aenter__()
        with pytest.raises(JobRunnerClosed):
            await runner.submit(SAME, 1)
        async with runner:
            assert (await runner.run(SAME, 1)).result == 1

    async def test_while_it_is_entered_it_accepts_nothing_yet(self) -> None:
        runner = JobRunner(store=SlowStore())
        entering = asyncio.create_task(runner.__aenter__())
        await asyncio.sleep(0.1)
        for call in (runner.submit(SAME, 1), runner.run(SAME, 1), runner.get("a"), runner.dismiss("a")):
            with pytest.raises(JobRunnerClosed):
                await call
        await entering
        await runner.submit(SAME, 1)
        await runner.__aexit__(None, None, None)

    async def test_entering_may_be_cancelled(self) -> None:
        runner = JobRunner(store=SlowStore(10))
        entering = asyncio.create_task(runner.__aenter__())
        await asyncio.sleep(1)
        with pytest.raises(RuntimeError):
            await runner.__aenter__()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        async with runner:
            await runner.submit(SAME, 1)

    async def test_a_store_that_cannot_be_closed_says_so(self) -> None:
        runner = JobRunner(store=BrokenStore(aclose=1))
        with pytest.raises(OSError, match="disk full"):
            async with runner:
                await runner.submit(SAME, 1)
        async with runner:
            pass


@pytest.mark.virtual
class TestDrain:
    async def test_what_ends_in_time_ends_as_it_would(self) -> None:
        async with JobRunner(1, drain=10) as runner:
            ids = [(await runner.submit(NAP, seconds)).id for seconds in (3, 3, 3, 3, 3)]
        assert now() == 10
        jobs = [await runner.get(job_id) for job_id in ids]
        assert [job.status for job in jobs] == ["successful"] * 3 + ["failed"] * 2
        assert [job.error for job in jobs] == [None] * 3 + [CLOSED] * 2
        assert [job.started is not None for job in jobs] == [True] * 4 + [False]
        assert all(job.finished is not None for job in jobs)

    async def test_does_not_wait_longer_than_it_must(self) -> None:
        async with JobRunner(drain=1000) as runner:
            await runner.submit(NAP, 3)
        assert now() == 3
        async with runner:
            pass
        assert now() == 3

    async def test_waits_for_those_that_clean_up(self) -> None:
        cleaner = Cleaner()
        async with JobRunner(drain=2) as runner:
            job = await runner.submit(cleaner.pipeline, 1)
            running = asyncio.create_task(runner.run(Cleaner().pipeline, 1))
            await asyncio.sleep(1)
        assert now() == 8
        assert cleaner.is_clean
        assert (await runner.get(job.id)).error == CLOSED
        assert (await running).error == CLOSED

    @pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError, KeyboardInterrupt])
    async def test_left_by_an_error_it_does_not_wait(self, error: type[BaseException]) -> None:
        runner = JobRunner(1)
        with pytest.raises(error, match="mine"):
            async with runner:
                for number in range(3):
                    await runner.submit(NAP, 5, job_id=str(number))
                await asyncio.sleep(1)
                raise error("mine")
        assert now() == 1
        assert [job.error for job in await runner.list()] == [CLOSED] * 3

    @pytest.mark.parametrize("times", [1, 2, 3])
    async def test_cancelled_while_it_waits_it_waits_no_longer(self, times: int) -> None:
        cleaner, store = Cleaner(), SlowStore()
        runner = JobRunner(1, store=store)

        async def main() -> None:
            async with runner:
                await runner.submit(cleaner.pipeline, 1, job_id="a")
                await runner.submit(NAP, 1, job_id="b")

        task = asyncio.create_task(main())
        await asyncio.sleep(7)  # it drains
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(1)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaner.is_clean
        assert not store.is_open
        assert [job.error for job in store._jobs.values()] == [CLOSED, CLOSED]
        assert [job.status for job in store._jobs.values()] == ["failed", "failed"]

    @pytest.mark.parametrize("is_cancelled", [False, True])
    async def test_cancelled_while_a_broken_store_is_closed(
        self, is_cancelled: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Store(MemoryJobStore):
            async def aclose(self) -> None:
                await asyncio.sleep(1)
                if is_cancelled:
                    raise OSError("disk gone")

        runner = JobRunner(store=Store())
        await runner.__aenter__()
        leaving = asyncio.create_task(runner.__aexit__(None, None, None))
        await asyncio.sleep(0.5)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert now() == 1
        assert ("the store could not be closed" in caplog.text) == is_cancelled
        del leaving
        gc.collect()

    async def test_nothing_is_accepted_meanwhile(self) -> None:
        async def late(value: Any) -> Any:
            await asyncio.sleep(1)
            for submit in (runner.submit, runner.run):
                with pytest.raises(JobRunnerClosed):
                    await submit(SAME, 1)

        async with JobRunner() as runner:
            job = await runner.submit(late, 1)
        assert (await runner.get(job.id)).status == "successful"

    async def test_what_was_being_accepted_has_its_time(self) -> None:
        store = SlowStore(2)
        async with JobRunner(store=store, drain=30) as runner:
            submitting = asyncio.create_task(runner.submit(NAP, 5, job_id="a"))
            await asyncio.sleep(0.1)
        assert (await submitting).id == "a"
        assert store._jobs["a"].status == "successful"

    @pytest.mark.parametrize("is_cancelled", [False, True])
    async def test_what_was_accepted_too_late_is_told_so(self, is_cancelled: bool) -> None:
        store = SlowStore(2)
        gate = Gate()
        async with JobRunner(store=store, drain=0.5) as runner:
            submitting = asyncio.create_task(runner.submit(gate.pipeline, 5, job_id="a"))
            await asyncio.sleep(0.1)
            if is_cancelled:
                asyncio.get_running_loop().call_later(1, submitting.cancel)
        assert not store.is_open
        with pytest.raises(asyncio.CancelledError if is_cancelled else JobRunnerClosed):
            await submitting
        assert [job.error for job in store._jobs.values()] == [] if is_cancelled else [CLOSED]
        assert not gate.began

    async def test_a_run_that_becomes_a_job_meanwhile(self) -> None:
        store = SlowStore()
        async with JobRunner(store=store, drain=20) as runner:
            running = asyncio.create_task(runner.run(NAP, 10, wait=2))
            await asyncio.sleep(1)
        job = await running
        assert job.status == "running"
        assert store._jobs[job.id].status == "successful"

    async def test_a_dismissed_one_stays_dismissed_and_is_not_cancelled_again(self) -> None:
        cleaner = Cleaner()
        async with JobRunner(drain=1) as runner:
            job = await runner.submit(cleaner.pipeline, 1)
            await asyncio.sleep(1)
            dismissing = asyncio.create_task(runner.dismiss(job.id))
        assert (await dismissing).status == "dismissed"
        assert cleaner.is_clean
        assert now() == 6

    async def test_one_that_is_dismissed_afterwards_is_not_cancelled_again(self) -> None:
        cleaner = Cleaner()
        runner = JobRunner(drain=1)
        await runner.__aenter__()
        job = await runner.submit(cleaner.pipeline, 1)
        leaving = asyncio.create_task(runner.__aexit__(None, None, None))
        await asyncio.sleep(2)
        assert (await runner.dismiss(job.id)).status == "dismissed"
        await leaving
        assert cleaner.is_clean
        assert now() == 6

    async def test_one_that_waits_can_be_dismissed_meanwhile(self) -> None:
        async with JobRunner(1, drain=10) as runner:
            first, second = await runner.submit(NAP, 5), await runner.submit(NAP, 5)
            dismissing = asyncio.create_task(runner.dismiss(second.id))
        assert (await dismissing).status == "dismissed"
        assert (await runner.get(first.id)).status == "successful"
        assert now() == 5

    async def test_one_that_is_dismissed_right_afterwards_was_cut_short(self) -> None:
        runner = JobRunner(1)
        await runner.__aenter__()
        await runner.submit(NAP, 5)
        job = await runner.submit(NAP, 5)
        leaving = asyncio.create_task(runner.__aexit__(KeyError, KeyError(), None))
        dismissing = asyncio.create_task(runner.dismiss(job.id))  # its end is on its way, and has not begun
        await leaving
        with suppress(JobNotFound):
            assert (await dismissing).error == CLOSED
        assert now() == 0

    async def test_an_end_that_is_being_saved_is_not_disturbed(self) -> None:
        store = SlowStore(4)
        async with JobRunner(drain=0, store=store) as runner:
            await runner.submit(NAP, 5, job_id="a")
            await asyncio.sleep(4 + 5 + 1)  # to save that it runs, to run, and a part of saving the end
        job = store._jobs["a"]
        assert job.started is not None
        assert (job.status, job.finished) == ("successful", job.started + timedelta(seconds=4 + 5))

    async def test_the_store_is_closed_after_all_else(self) -> None:
        class Store(MemoryJobStore):
            closed: float | None = None

            async def save(self, job: Job) -> None:
                await asyncio.sleep(5 if job.id == "c" else 0)
                await super().save(job)

            async def evict(self, *, before: datetime, keep: int) -> None:
                await asyncio.sleep(next(seconds))
                await super().evict(before=before, keep=keep)

            async def aclose(self) -> None:
                self.closed = now()

        store, seconds = Store(), iter([0, 0, 20, 0])
        async with JobRunner(1, ttl=14, drain=0, store=store) as runner:
            await runner.submit(SAME, 1, job_id="a")  # to be removed at 14
            await asyncio.sleep(12)
            for job_id in ("b", "c"):
                await runner.submit(NAP, 100, job_id=job_id)
        assert store.closed == pytest.approx(14 + 20, abs=0.1)

    async def test_what_was_cut_short_does_not_begin_when_it_is_entered_again(self) -> None:
        gate, runner = Gate(), JobRunner(1, drain=0)
        async with runner:
            for value in ("a", "b"):
                await runner.submit(gate.pipeline, value)
            await turns()
        async with runner:
            assert repr(runner) == "<JobRunner open running=0 pending=0>"
            assert (await end_of(runner, (await runner.submit(SAME, 1)).id)).result == 1
        assert gate.began == ["a"]

    async def test_a_task_that_had_no_turn_yet_is_ended_all_the_same(self) -> None:
        gate = Gate()
        runner = JobRunner()
        with pytest.raises(LookupError):
            async with runner:
                await runner.submit(gate.pipeline, 1, job_id="a")
                raise LookupError
        assert (await runner.get("a")).error == CLOSED
        assert gate.began == gate.cancelled


@pytest.mark.virtual
class TestJobContext:
    @pytest.fixture
    def log(self) -> list[Any]:
        return []

    async def test_is_entered_in_the_job_and_yields_the_context_of_the_run(self, log: list[Any]) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[Any]:
            log.append(("enter", context, asyncio.current_task()))
            yield {**context, "session": 1}
            log.append(("leave", asyncio.current_task()))

        def handler(value: Any, context: Any) -> Any:
            log.append(("run", value, context, asyncio.current_task()))

        async with JobRunner(job_context=session) as runner:
            own = {"user": 7}
            await runner.submit(handler, 1, context=own)
            await runner.run(handler, 2)
        for enter, run, leave in (log[:3], log[3:]):
            assert enter[2] is run[3] is leave[1] is not asyncio.current_task()
            value, context = (1, {"user": 7}) if enter is log[0] else (2, {})
            assert enter[:2] == ("enter", context)
            assert run[:3] == ("run", value, {**context, "session": 1})

    async def test_sees_with_what_the_run_ends(self, log: list[Any]) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[None]:
            try:
                yield
            except BaseException as error:
                log.append(type(error).__name__)
                await asyncio.sleep(1)
                log.append("rolled back")
                raise
            else:
                log.append("committed")

        async with JobRunner(job_context=session, drain=2) as runner:
            assert (await end_of(runner, (await runner.submit(SAME, 1)).id)).status == "successful"
            assert (await end_of(runner, (await runner.submit(FAIL, 1)).id)).status == "failed"
            job = await runner.submit(NAP, 10)
            await asyncio.sleep(1)
            assert (await runner.dismiss(job.id)).status == "dismissed"
            await runner.submit(NAP, 10, timeout=1)
            await asyncio.sleep(5)
            await runner.submit(NAP, 10)
        assert log == [
            "committed",
            "StageExecutionError",
            "rolled back",
            "CancelledError",
            "rolled back",
            "StageExecutionError",
            "rolled back",
            "CancelledError",
            "rolled back",
        ]

    async def test_the_job_has_ended_when_it_was_left(self) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[None]:
            yield
            await asyncio.sleep(3)

        async with JobRunner(job_context=session) as runner:
            job = await end_of(runner, (await runner.submit(SAME, 1)).id)
            assert job.finished == job.created + timedelta(seconds=3)
            job = await runner.submit(SAME, 1)
            await asyncio.sleep(1)
            assert (await runner.get(job.id)).status == "running"
            assert (await runner.dismiss(job.id)).status == "dismissed"
            assert now() == 4

    async def test_may_swallow_an_error(self) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[None]:
            with suppress(Exception):
                yield

        async with JobRunner(job_context=session) as runner:
            job = await end_of(runner, (await runner.submit(FAIL, 1)).id)
            assert (job.status, job.result, job.progress) == ("successful", None, 100)
            assert (await end_of(runner, (await runner.submit(SAME, 1)).id)).result == 1

    @pytest.mark.parametrize("where", ["enter", "leave", "make"])
    async def test_that_fails_fails_the_job(self, where: str) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[None]:
            if where == "enter":
                raise LookupError(where)
            yield
            raise LookupError(where)

        def make(context: Any) -> Any:
            raise LookupError(where)

        gate = Gate()
        gate.open.set()
        async with JobRunner(job_context=make if where == "make" else session) as runner:
            job = await end_of(runner, (await runner.submit(gate.pipeline, 1)).id)
            assert (job.status, job.result) == ("failed", None)
            assert job.error == JobFailure("LookupError", where)
            assert bool(gate.began) == (where == "leave")

    async def test_the_timeout_is_that_of_the_run_alone(self) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[None]:
            await asyncio.sleep(5)
            yield

        async with JobRunner(job_context=session) as runner:
            job = await end_of(runner, (await runner.submit(NAP, 2, timeout=3)).id)
            assert job.status == "successful"

    async def test_a_finish_is_no_error_to_it(self, log: list[Any]) -> None:
        @asynccontextmanager
        async def session(context: Any) -> AsyncIterator[None]:
            yield
            log.append("committed")

        def finish(value: Any) -> Any:
            raise Finish("early")

        async with JobRunner(job_context=session) as runner:
            assert (await end_of(runner, (await runner.submit(finish, 1)).id)).result == "early"
        assert log == ["committed"]


async def progress_of(step: Any, value: Any = 1, seconds: float = 1.0, **options: Any) -> list[int]:
    """The progress of a job, once a second, half a second later each time."""
    async with JobRunner(drain=0, **options) as runner:
        job = await runner.submit(step, value)
        await asyncio.sleep(0.5)
        seen = []
        while (await runner.get(job.id)).finished is None:
            seen.append(await progress_at(runner, job.id))
            await asyncio.sleep(seconds)
        ended = await runner.get(job.id)
        assert ended.status == "successful", ended
        assert ended.progress == 100
        return seen


async def second(value: Any) -> Any:
    await asyncio.sleep(1)
    return value


async def ten(value: Any) -> Any:
    return [value] * 10


def stage(name: str = "s", **options: Any) -> Stage[Any, Any]:
    return Stage(name, second, **options)


@pytest.mark.virtual
class TestProgress:
    async def test_is_how_many_stages_are_done(self) -> None:
        assert await progress_of(Pipeline([stage("a"), stage("b"), stage("c"), stage("d")])) == [
            0,
            25,
            50,
            75,
        ]
        assert await progress_of(Pipeline([stage("a"), stage("b"), stage("c")])) == [0, 33, 66]
        assert await progress_of(stage()) == [0]

    async def test_stages_of_one_name_are_several(self) -> None:
        assert await progress_of(Pipeline([stage(), stage(), stage(), stage()])) == [0, 25, 50, 75]
        assert await progress_of(Pipeline([stage("a"), stage("b"), stage("a"), stage("b")])) == [
            0,
            25,
            50,
            75,
        ]
        twice: Any = Pipeline(
            [Pipeline([stage(), stage()], name="p"), Pipeline([stage(), stage()], name="p")]
        )
        assert await progress_of(twice) == [0, 25, 50, 75]

    async def test_names_with_slashes_are_names(self) -> None:
        inner: Any = Pipeline([stage("b"), stage("b/c")], name="a")
        assert await progress_of(Pipeline([inner, stage("a/b"), stage("a")])) == [0, 25, 50, 75]
        assert await progress_of(Pipeline([stage("a/b"), inner, stage("a/b/c")])) == [0, 25, 50, 75]
        assert await progress_of(Pipeline([each(second, 1, name="e"), stage("e/second")]), [1]) == [0, 50]

    async def test_the_stages_of_pipelines_inside_count_each(self) -> None:
        inner: Any = Pipeline([stage("a"), stage("b"), Pipeline([stage("c")], name="deep")], name="inner")
        assert await progress_of(Pipeline([inner, stage()])) == [0, 25, 50, 75]
        assert await progress_of(Pipeline([stage(), inner])) == [0, 25, 50, 75]
        assert await progress_of(Pipeline([inner])) == [0, 33, 66]

    async def test_a_pipeline_with_a_run_of_its_own_is_one_stage(self) -> None:
        class Own(Pipeline[Any, Any]):
            async def run(self, value: Any, **options: Any) -> Any:  # type: ignore[override]
                return await super().run(value, **options)

        inner: Any = Own([stage("a"), stage("b")], name="inner")
        assert await progress_of(Pipeline([inner, stage()])) == [0, 0, 50]
        assert await progress_of(inner) == [0, 0]

    async def test_of_a_subclass_counts_and_follows_what_it_has_set(self) -> None:
        class Own(Pipeline[Any, Any]):
            __hash__ = None  # type: ignore[assignment]

            def __eq__(self, other: object) -> bool:
                return True

        pipeline: Any = Own([lambda value: pipeline.extra, stage("a"), stage("b")])
        pipeline.extra = 1
        assert await progress_of(pipeline) == [33, 66]
        pipeline.before = lambda name, value: seen.append(value)
        seen: list[Any] = []
        assert await progress_of(pipeline) == [33, 66]

    async def test_what_a_middleware_leaves_out_is_done_as_well(self) -> None:
        async def skip(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            return value if name in ("inner", "skipped") else await next_stage(value)

        inner: Any = Pipeline([stage("a"), stage("b")], name="inner")
        pipeline: Any = Pipeline([inner, stage("skipped"), stage("c")], middlewares=[skip])
        assert await progress_of(pipeline) == [75]
        pipeline = Pipeline([stage("c"), inner, inner, stage("c")], middlewares=[skip])
        assert await progress_of(pipeline) == [0, 83]

    async def test_what_is_tried_again_does_not_count_twice_nor_go_back(self) -> None:
        failures = [ValueError, ValueError]

        async def flaky(value: Any) -> Any:
            await asyncio.sleep(1)
            if failures:
                raise failures.pop()

        async def again(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            for _ in range(5):
                with suppress(Exception):
                    return await next_stage(value)
            return None

        pipeline: Any = Pipeline([stage("a"), Stage("b", flaky, retries=2), stage("c")])
        assert await progress_of(pipeline) == [0, 33, 33, 33, 66]
        failures = [ValueError, ValueError]
        inner: Any = Pipeline([stage("a"), Stage("b", flaky)], name="inner")
        pipeline = Pipeline([inner, stage("c"), stage("d")], middlewares=[again])
        assert await progress_of(pipeline) == [0, 25, 25, 25, 25, 25, 50, 75]

    async def test_what_is_run_again_after_its_end_is_no_progress(self) -> None:
        async def twice(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            await next_stage(value)
            return await next_stage(value)

        inner: Any = Pipeline([stage("a"), stage("b")], name="inner")
        assert await progress_of(Pipeline([inner], middlewares=[twice])) == [0, 50, 100, 100]

    async def test_a_stage_saved_by_on_error_is_done(self) -> None:
        pipeline: Any = Pipeline([Stage("a", fail, on_error=lambda value, error: 1), stage("b")])
        assert await progress_of(pipeline) == [50]

    async def test_steps_made_of_steps_are_one_stage(self) -> None:
        inner: Any = Pipeline([stage("a"), stage("b")], name="inner")
        steps: list[Any] = [
            parallel(a=second, b=inner),
            branch((lambda value: True, inner), otherwise=same),
            fallback(inner, second),
        ]
        for step in steps:
            assert await progress_of(Pipeline([step, stage("c")])) == [0, 0, 50]

    async def test_the_elements_of_each_and_keep_count(self) -> None:
        for step in (each(second, 1), keep(second, 1), each(Pipeline([stage()], name="p"), 1)):
            assert await progress_of(Pipeline([step, stage("b")]), [1, 2, 3, 4]) == [0, 12, 25, 37, 50]
            assert await progress_of(Pipeline([ten, step])) == list(range(50, 100, 5))
            assert await progress_of(step, [1, 2, 3, 4]) == [0, 25, 50, 75]
        assert await progress_of(Pipeline([each(second, 2), stage()]), [1, 2, 3, 4, 5]) == [0, 20, 40, 50]

    async def test_of_elements_without_a_number_nothing_is_known(self) -> None:
        async def stream() -> AsyncIterator[int]:
            for number in range(2):
                yield number

        values: list[Callable[[], Any]] = [lambda: iter([1, 2]), stream]
        for value in values:
            assert await progress_of(Pipeline([each(second, 1), stage()]), value()) == [0, 0, 50]
        assert await progress_of(Pipeline([each(second), stage()]), []) == [50]

    async def test_elements_of_elements_count_as_one(self) -> None:
        pipeline: Any = Pipeline([each(each(second, 1, name="inner"), 1), stage()])
        assert await progress_of(pipeline, [[1, 2], [3, 4]]) == [0, 0, 25, 25, 50]

    async def test_elements_that_are_tried_again_are_counted_anew(self) -> None:
        failures = [ValueError]

        async def flaky(value: Any) -> Any:
            await asyncio.sleep(1)
            if value == 3 and failures:
                raise failures.pop()

        async def again(next_stage: Any, name: str, value: Any, context: Any) -> Any:
            with suppress(Exception):
                return await next_stage(value)
            return await next_stage(value)

        pipeline: Any = Pipeline([each(flaky, 1), stage()], middlewares=[again])
        assert await progress_of(pipeline, [1, 2, 3, 4]) == [0, 12, 25, 25, 25, 25, 37, 50]

    async def test_a_length_that_is_wrong_does_no_harm(self) -> None:
        class Lying:
            def __len__(self) -> int:
                return 2

            def __iter__(self) -> Iterator[int]:
                return iter(range(4))

        assert await progress_of(Pipeline([each(second, 1), stage()]), Lying()) == [0, 25, 50, 50, 50]

    async def test_observers_of_the_pipeline_stay(self) -> None:
        events: list[Event] = []
        pipeline: Any = Pipeline([stage("a"), stage("b")], observers=[events.append])
        assert await progress_of(pipeline) == [0, 50]
        assert [event.kind for event in events][::5] == ["run_start", "run_end"]
        assert pipeline.observers == (events.append,)

    async def test_a_run_of_another_pipeline_inside_is_no_progress(self) -> None:
        other: Any = with_progress(Pipeline([stage("x"), stage("y")]))

        async def nested(value: Any) -> Any:
            await other.run(value)
            await other.map([1, 2])

        assert await progress_of(Pipeline([stage("x"), nested])) == [0, 50, 50, 50, 50]
        assert await progress_of(Pipeline([Stage("x", nested), stage("y")])) == [0, 0, 0, 0, 50]

    async def test_with_progress_is_for_a_step_of_ones_own(self) -> None:
        class Own:
            name = "own"
            pipeline = with_progress(Pipeline([stage("a"), stage("b")]))

            async def run(self, value: Any, *, context: Any = None) -> Any:
                await self.pipeline.run(value)
                return await self.pipeline.run(value)

        assert await progress_of(Own()) == [0, 50, 100, 100]  # it does not go back

    async def test_with_progress_a_run_after_a_failed_one_counts(self) -> None:
        class Own:
            name = "own"
            first = with_progress(Pipeline([stage("a"), fail]))
            second = with_progress(Pipeline([stage("a"), stage("b"), stage("c"), stage("d")]))

            async def run(self, value: Any, *, context: Any = None) -> Any:
                with suppress(StageExecutionError):
                    await self.first.run(value)
                report_progress(0.6)
                return await self.second.run(value)

        assert await progress_of(Own()) == [0, 60, 60, 60, 75]

    async def test_with_progress_twice_counts_once(self) -> None:
        pipeline = with_progress(with_progress(Pipeline([each(second, 1), stage("b"), stage("b")])))
        assert await progress_of(pipeline, [1, 2, 3, 4]) == [0, 8, 16, 25, 33, 66]
        assert len(pipeline.observers) == 1  # type: ignore[attr-defined]
        assert with_progress(Pipeline([stage()])) is not with_progress(Pipeline([stage()]))

    async def test_with_progress_leaves_other_steps_alone(self) -> None:
        class Own(Pipeline[Any, Any]):
            async def run(self, value: Any, **options: Any) -> Any: ...  # type: ignore[override]

        for step in (Own([second]), stage(), parallel(a=second)):
            assert with_progress(step) is step

    async def test_with_progress_outside_a_job_changes_nothing(self) -> None:
        assert await with_progress(Pipeline([stage("a"), each(same)])).run([1]) == [1]


@pytest.mark.virtual
class TestReportProgress:
    async def test_is_a_fraction_of_the_stage(self) -> None:
        async def half(value: Any) -> Any:
            report_progress(0.5)
            await asyncio.sleep(1)
            report_progress(0.75, "soon")
            await asyncio.sleep(1)
            return value

        assert await progress_of(half) == [50, 75]
        assert await progress_of(Pipeline([half, half])) == [25, 37, 75, 87]
        inner: Any = Pipeline([half, stage()], name="inner")
        assert await progress_of(Pipeline([stage(), inner, half])) == [0, 37, 43, 50, 87, 93]
        assert await progress_of(Pipeline([parallel(a=half), stage()])) == [25, 37, 50]

    async def test_never_goes_back(self) -> None:
        async def back(value: Any) -> Any:
            for fraction in (0.5, 0.2, 0.6, 0, 1, 0.1):
                report_progress(fraction)
                await asyncio.sleep(1)

        assert await progress_of(back) == [50, 50, 60, 60, 100, 100]

    async def test_what_a_failed_attempt_has_reported_stays(self) -> None:
        attempts = []

        async def flaky(value: Any) -> Any:
            attempts.append(value)
            report_progress(0.8 if len(attempts) == 1 else 0.2)
            await asyncio.sleep(1)
            if len(attempts) == 1:
                raise ValueError

        assert await progress_of(Pipeline([Stage("a", flaky, retries=1), stage()])) == [40, 40, 50]

    async def test_in_each_the_elements_count_instead(self) -> None:
        async def work(value: Any) -> Any:
            report_progress(0.9, f"element {value}")
            await asyncio.sleep(1)

        assert await progress_of(Pipeline([each(work, 1), stage()]), [1, 2, 3, 4]) == [0, 12, 25, 37, 50]
        assert await progress_of(Pipeline([each(work, 1), stage()]), iter([1, 2])) == [0, 0, 50]
        async with JobRunner() as runner:
            job = await runner.submit(Pipeline([each(work, 1)]), [1, 2])
            seen = [(job.progress, job.message) async for job in runner.watch(job.id)]
        assert (0, "element 1") in seen
        assert (50, "element 2") in seen

    async def test_the_message_stays_until_there_is_another(self) -> None:
        async def work(value: Any) -> Any:
            for fraction, message in ((0, "first"), (0.5, None), (0.5, "second"), (0.1, ""), (0.2, "")):
                await asyncio.sleep(1)
                report_progress(fraction, message)
            await asyncio.sleep(1)

        async with JobRunner() as runner:
            job = await runner.submit(work, 1)
            seen = [(job.progress, job.message) async for job in runner.watch(job.id)]
        expected = [(0, "first"), (50, "first"), (50, "second"), (50, ""), (100, "")]
        assert [entry for entry in seen if entry != (0, None)] == expected

    async def test_reaches_the_job_from_tasks_of_the_handler(self) -> None:
        async def report(fraction: float) -> None:
            report_progress(fraction)

        async def work(value: Any) -> Any:
            async with asyncio.TaskGroup() as group:
                group.create_task(report(0.3))
            await asyncio.sleep(1)

        assert await progress_of(work) == [30]

    async def test_after_the_end_it_is_not_heard(self) -> None:
        left: list[asyncio.Task[None]] = []

        async def late() -> None:
            await asyncio.sleep(5)
            report_progress(0.5, "late")

        async def work(value: Any) -> Any:
            left.append(asyncio.create_task(late()))
            await asyncio.sleep(1)
            raise ValueError

        async with JobRunner() as runner:
            job = await end_of(runner, (await runner.submit(work, 1)).id)
            await left[0]
            assert await runner.get(job.id) == job
            assert (job.progress, job.message) == (0, None)

    async def test_a_pipeline_that_outlives_the_job_is_not_heard(self) -> None:
        left: list[asyncio.Task[Any]] = []

        async def work(value: Any) -> Any:
            left.append(asyncio.create_task(with_progress(Pipeline([stage("a"), stage("b")])).run(1)))
            raise ValueError

        class Own:
            name = "own"

            async def run(self, value: Any, *, context: Any = None) -> Any:
                await work(value)

        async with JobRunner(store=SlowStore(3)) as runner:
            seen = await history(runner, (await runner.submit(Own(), 1)).id)
        await left[0]
        assert {job.progress for job in seen} == {0}

    async def test_while_the_end_is_saved_it_is_not_heard(self) -> None:
        async def late() -> None:
            await asyncio.sleep(0.5)
            report_progress(0.5, "late")

        left: list[asyncio.Task[None]] = []

        def work(value: Any) -> Any:
            left.append(asyncio.create_task(late()))
            raise ValueError

        async with JobRunner(store=SlowStore()) as runner:
            seen = await history(runner, (await runner.submit(work, 1)).id)
        assert {(job.progress, job.message) for job in seen} == {(0, None)}
        await left[0]

    @pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), float("inf"), 50])
    async def test_a_fraction_is_from_0_to_1(self, fraction: float) -> None:
        with pytest.raises(ValueError, match=r"^fraction must be from 0 to 1, not .*; write done / total$"):
            report_progress(fraction)

    async def test_what_is_no_fraction_or_no_text_is_refused(self) -> None:
        with pytest.raises(TypeError):
            report_progress("0.5")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^message must be a str, not 5$"):
            report_progress(0.5, 5)  # type: ignore[arg-type]

    async def test_outside_a_job_it_does_nothing(self) -> None:
        assert report_progress(0.5, "message") is None  # type: ignore[func-returns-value]
        assert await Pipeline([lambda value: report_progress(0.5)]).run(1) is None

    async def test_any_kind_of_number_will_do(self) -> None:
        numbers: list[Any] = [Decimal("0.57"), Fraction(57, 100), 0.57]
        for number in numbers:

            async def work(value: Any, number: Any = number) -> Any:
                report_progress(number)
                await asyncio.sleep(1)

            assert await progress_of(work) == [57]
            assert await progress_of(Pipeline([work, second])) == [28, 50]

        async def thirds(value: Any) -> Any:
            for done in range(1, 100):
                report_progress(done / 100)
                await asyncio.sleep(1)

        assert await progress_of(thirds) == list(range(1, 100))

    async def test_a_job_submitted_by_a_job_has_a_progress_of_its_own(self) -> None:
        async def inner(value: Any) -> Any:
            report_progress(0.7, "inner")

        async def outer(value: Any) -> Any:
            report_progress(0.1, "outer")
            job = await runner.submit(inner, 1)
            await end_of(runner, job.id)
            other = await runner.run(inner, 1)
            return job.id, other

        async with JobRunner() as runner:
            job = await runner.submit(outer, 1)
            seen = await history(runner, job.id)
            assert {job.message for job in seen if job.message} == {"outer"}
            inner_id, other = seen[-1].result
            assert (await runner.get(inner_id)).message == other.message == "inner"


@pytest.mark.threads
class TestThreads:
    async def test_a_handler_in_a_thread_may_report(self) -> None:
        def work(value: Any) -> Any:
            for done in range(1, 10):
                report_progress(done / 10, f"{done} of 10")
            return threading.current_thread() is not threading.main_thread()

        with ThreadPoolExecutor(1) as executor:
            async with JobRunner() as runner:
                job = await runner.submit(Stage("work", work, executor=executor), 1)
                job = await end_of(runner, job.id)
        assert (job.result, job.progress, job.message) == (True, 100, "9 of 10")

    async def test_what_it_reports_is_of_its_stage_however_fast_it_is(self) -> None:
        class Fast(ThreadPoolExecutor):
            """Has always finished before anybody looks."""

            def submit(self, *call: Any, **options: Any) -> Future[Any]:
                future = super().submit(*call, **options)
                future.exception()
                return future

        def work(value: Any) -> Any:
            report_progress(0.5, f"half of {value}")
            return 2

        async def look(value: Any) -> Any:
            await turns()
            job = await runner.get("a")
            return job.progress, job.message

        with Fast() as executor:
            quick = Stage("work", work, executor=executor)
            async with JobRunner() as runner:
                await runner.submit(Pipeline([quick, look]), 1, job_id="a")
                assert (await end_of(runner, "a")).result == (50, "half of 1")
                job = await runner.submit(quick, 1)
                assert (await end_of(runner, job.id)).message == "half of 1"

    async def test_what_a_handler_has_waited_for_is_of_its_stage(self) -> None:
        async def work(value: Any) -> Any:
            with ThreadPoolExecutor(1) as executor:
                executor.submit(copy_context().run, report_progress, 0.5, "half").result()

        async def look(value: Any) -> Any:
            await turns()
            job = await runner.get("a")
            return job.progress, job.message

        async with JobRunner() as runner:
            await runner.submit(Pipeline([work, look]), 1, job_id="a")
            assert (await end_of(runner, "a")).result == (50, "half")
            job = await runner.submit(work, 1)
            assert (await end_of(runner, job.id)).message == "half"

    async def test_what_it_reports_is_told_on_the_loop(self) -> None:
        def work(value: Any) -> Any:
            report_progress(0.5, "half")
            assert heard.wait(10)

        async def watch(job_id: str) -> list[tuple[int, str | None]]:
            seen = []
            async for job in runner.watch(job_id):
                seen.append((job.progress, job.message))
                if job.message:
                    heard.set()
            return seen

        heard = threading.Event()
        with ThreadPoolExecutor(1) as executor:
            async with JobRunner() as runner:
                job = await runner.submit(Stage("work", work, executor=executor), 1)
                assert (50, "half") in await watch(job.id)

    async def test_with_an_event_loop_of_its_own_as_well(self) -> None:
        threads = set()

        class Watched(str):
            def __ne__(self, other: object) -> bool:
                threads.add(threading.current_thread())
                return str.__ne__(self, other)

        def work(value: Any) -> Any:
            async def main() -> None:
                report_progress(0.25, Watched("first"))
                report_progress(0.5, Watched("half"))

            asyncio.run(main())

        with ThreadPoolExecutor(1) as executor:
            async with JobRunner() as runner:
                job = await runner.submit(Pipeline([Stage("work", work, executor=executor), same]), 1)
                job = await end_of(runner, job.id)
        assert (job.progress, job.message) == (100, "half")
        assert threads == {threading.main_thread()}

    async def test_a_thread_that_outlives_its_job_is_not_heard(self) -> None:
        may_go = threading.Event()

        def work(value: Any) -> Any:
            may_go.wait(10)
            report_progress(0.5, "late")

        executor = ThreadPoolExecutor(1)
        async with JobRunner() as runner:
            job = await runner.submit(Stage("work", work, executor=executor), 1)
            await turns()
            job = await runner.dismiss(job.id)
            may_go.set()
            await asyncio.get_running_loop().run_in_executor(executor, str)
            await turns()
            assert await runner.get(job.id) == job
            assert (job.status, job.message) == ("dismissed", None)
        executor.shutdown()

    def test_a_thread_that_outlives_the_loop_does_no_harm(self) -> None:
        may_go, errors = threading.Event(), list[BaseException]()

        def work(value: Any) -> Any:
            may_go.wait(10)
            try:
                report_progress(0.5, "late")
            except BaseException as error:
                errors.append(error)

        executor = ThreadPoolExecutor(1)

        async def main() -> None:
            async with JobRunner(drain=0) as runner:
                await runner.submit(Stage("work", work, executor=executor), 1)
                await turns()

        run_virtually(main())
        may_go.set()
        executor.shutdown()
        assert not errors

    async def test_another_process_does_nothing(self) -> None:
        with ProcessPoolExecutor(1) as executor:
            executor.submit(str).result()  # a forked process has the variables of where it was forked
            async with JobRunner() as runner:
                job = await runner.submit(Stage("work", report_in_another_process, executor=executor), 0.5)
                job = await end_of(runner, job.id)
        assert (job.status, job.result, job.message) == ("successful", 0.5, None)


def report_in_another_process(fraction: float) -> float:
    report_progress(fraction, "from afar")
    return fraction


@pytest.mark.virtual
class TestBrokenStore:
    async def test_that_adds_nothing_accepts_nothing(self) -> None:
        async with JobRunner(1, 0, store=BrokenStore(add=1)) as runner:
            with pytest.raises(OSError, match="disk full"):
                await runner.submit(SAME, 1, job_id="a")
            assert await runner.list() == []
            await runner.submit(SAME, 1, job_id="a")
            assert (await end_of(runner, "a")).result == 1

    async def test_left_while_one_fails(self) -> None:
        class Store(SlowStore):
            async def add(self, job: Job) -> None:
                await asyncio.sleep(5)
                raise OSError("disk full")

        async with JobRunner(store=Store()) as runner:
            submitting = asyncio.create_task(runner.submit(SAME, 1))
            await asyncio.sleep(1)
        assert now() == 6
        with pytest.raises(OSError, match="disk full"):
            await submitting

    async def test_that_does_not_save_the_beginning_lets_the_job_run(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = BrokenStore(save=1)
        async with JobRunner(store=store) as runner:
            job = await runner.submit(NAP, 5)
            await asyncio.sleep(1)
            assert (await runner.get(job.id)).status == "running"
            assert store._jobs[job.id].status == "accepted"
            assert await runner.list(status="accepted") == []
            assert (await end_of(runner, job.id)).status == "successful"
            assert store._jobs[job.id].status == "successful"
        (record,) = caplog.records
        assert record.getMessage() == f"job {job.id} could not be saved; it goes on"
        assert record.exc_info is not None

    async def test_that_does_not_save_the_end_is_tried_again(self, caplog: pytest.LogCaptureFixture) -> None:
        async with JobRunner(store=BrokenStore(save_end=3)) as runner:
            job = await runner.submit(NAP, 5)
            job = await end_of(runner, job.id)
            assert (job.status, job.result, now()) == ("successful", 5, 8)
            assert job.finished == job.created + timedelta(seconds=5)
            assert await runner.get(job.id) == job
        messages = [record.getMessage() for record in caplog.records]
        assert messages == [f"the end of job {job.id} could not be saved"] * 3

    async def test_that_never_does_is_given_up_when_the_runner_is_left(self) -> None:
        async with JobRunner(1, drain=10, store=BrokenStore(save_end=10_000)) as runner:
            jobs = [await runner.submit(NAP, 5) for _ in range(3)]
            ends = [asyncio.create_task(end_of(runner, job.id)) for job in jobs]
            await asyncio.sleep(1)
        assert now() == 11
        assert [job.status for job in await asyncio.gather(*ends)] == ["successful", "failed", "failed"]

    async def test_what_has_no_end_then_is_neither_dismissed_nor_watched(self) -> None:
        async with JobRunner(drain=0, store=BrokenStore(save_end=10_000)) as runner:
            job = await runner.submit(NAP, 5)
            await asyncio.sleep(1)
        assert (await runner.get(job.id)).finished is None
        async with asyncio.timeout(100):
            for call in (runner.dismiss(job.id), end_of(runner, job.id)):
                with pytest.raises(JobRunnerClosed):
                    await call

    async def test_a_dismissal_waits_until_it_is_saved(self) -> None:
        async with JobRunner(store=BrokenStore(save_end=2)) as runner:
            for _ in range(2):
                job = await runner.submit(NAP, 5)
                assert (await runner.dismiss(job.id)).status == "dismissed"
            assert now() == 2

    @pytest.mark.parametrize("kind", [TypeError, ValueError])
    async def test_a_result_that_it_refuses_fails_the_job(
        self, kind: type[Exception], caplog: pytest.LogCaptureFixture
    ) -> None:
        class Store(MemoryJobStore):
            async def save(self, job: Job) -> None:
                if isinstance(job.result, set):
                    raise kind("a set is not JSON")
                await super().save(job)

        async with JobRunner(store=Store()) as runner:
            job = await end_of(runner, (await runner.submit(SAME, {1}, job_id="a")).id)
            assert (job.status, job.result) == ("failed", None)
            assert job.error == JobFailure(kind.__name__, "a set is not JSON")
            assert job.finished is not None
            assert await runner.get("a") == job
            assert now() == 0
        assert [record.getMessage() for record in caplog.records] == ["job a of 'same' failed"]

    async def test_and_an_error_of_the_same_type_about_another_end_is_tried_again(self) -> None:
        store = BrokenStore(save_end=2)
        store.error = ValueError("no reason")
        async with JobRunner(store=store) as runner:
            job = await end_of(runner, (await runner.submit(FAIL, 1)).id)
            assert job.error == JobFailure("ValueError", "no 1", "fail")
            assert now() == 2

    async def test_that_evicts_nothing_is_asked_again(self, caplog: pytest.LogCaptureFixture) -> None:
        store = BrokenStore(evict=1)
        async with JobRunner(keep=1, ttl=10, store=store) as runner:
            for number in range(3):
                job = await runner.submit(SAME, number)
                assert (await end_of(runner, job.id)).status == "successful"
            assert len(store._jobs) == 1
            assert [record.getMessage() for record in caplog.records] == [
                "jobs could not be removed from the store"
            ]
            store.faults["evict"] = 1
            await asyncio.sleep(100)
            assert len(caplog.records) == 2
            assert len(store._jobs) == 1
            assert await runner.list() == []

    @pytest.mark.parametrize("handler", ["leaves a request", "swallows one", "knows of none"])
    async def test_a_cancellation_that_is_left_behind_loses_no_end(self, handler: str) -> None:
        task: Any = None

        async def work(value: Any) -> Any:
            nonlocal task
            task = asyncio.current_task()
            if handler == "leaves a request":
                task.cancel()
            return value

        async with JobRunner(1, store=SlowStore()) as runner:
            job = await runner.submit(work, 1)
            if handler == "swallows one":
                await asyncio.sleep(1.5)  # its end is being saved
                task.cancel()
            end = await end_of(runner, job.id)
            assert end.result == 1
            await asyncio.sleep(0.25)
            task.cancel()  # while what is too old is removed
            job = await runner.submit(NAP, 1)
            assert (await end_of(runner, job.id)).result == 1
            assert await runner.get(end.id) == end

    @pytest.mark.parametrize("moment", [0.25, 0.5, 0.75, 1])
    async def test_a_submission_that_is_cancelled_leaves_nothing(self, moment: float) -> None:
        gate, store = Gate(), SlowStore()
        async with JobRunner(1, 5, store=store) as runner:
            submitting = asyncio.create_task(runner.submit(gate.pipeline, 1, job_id="a"))
            await asyncio.sleep(moment)
            submitting.cancel()
            with suppress(asyncio.CancelledError):
                await submitting
            if submitting.cancelled():
                with pytest.raises(DuplicateJob):  # until it is certain
                    await runner.submit(SAME, 2, job_id="a")
                await asyncio.sleep(5)
                assert not store._jobs
                await runner.submit(SAME, 3, job_id="a")
                assert (await end_of(runner, "a")).result == 3
            gate.open.set()
        assert gate.began == ([] if submitting.cancelled() else [1])

    async def test_a_submission_that_is_cancelled_leaves_others_of_its_id_alone(self) -> None:
        store = SlowStore()
        async with JobRunner(store=store) as runner:
            await runner.submit(SAME, 1, job_id="a")
            await end_of(runner, "a")
            for moment in (0.25, 0.75):
                submitting = asyncio.create_task(runner.submit(SAME, 2, job_id="a"))
                await asyncio.sleep(moment)
                submitting.cancel()
                await asyncio.wait((submitting,))
                await asyncio.sleep(5)
                assert (await runner.get("a")).result == 1

    async def test_left_while_a_submission_is_taken_back(self, caplog: pytest.LogCaptureFixture) -> None:
        class Store(SlowStore):
            async def remove(self, job_id: str) -> None:
                await super().remove(job_id)
                raise OSError("disk full")

        for store in (SlowStore(), Store()):
            async with JobRunner(store=store) as runner:
                submitting = asyncio.create_task(runner.submit(SAME, 1, job_id="a"))
                await asyncio.sleep(0.75)
                submitting.cancel()
            assert not store._jobs
            assert submitting.cancelled()
        assert [record.getMessage() for record in caplog.records] == [
            "job a, whose submission was cancelled, is in the store"
        ]

    async def test_reading_fails_with_its_error(self) -> None:
        class Store(MemoryJobStore):
            async def get(self, job_id: str) -> Job | None:
                raise OSError("disk gone")

        async with JobRunner(store=Store()) as runner:
            job = await runner.submit(NAP, 1)
            assert (await runner.get(job.id)).id == job.id  # a job that runs here is known
            await asyncio.sleep(2)
            for call in (runner.get, runner.dismiss, lambda job_id: history(runner, job_id)):
                with pytest.raises(OSError, match="disk gone"):
                    await call(job.id)


@pytest.mark.virtual
class TestSharedStore:
    @pytest.fixture
    async def runners(self) -> AsyncIterator[tuple[JobRunner, JobRunner]]:
        store = SharedStore()
        async with JobRunner(1, store=store, drain=0) as first, JobRunner(1, store=store, drain=0) as second:
            yield first, second

    async def test_one_answers_for_the_other(self, runners: tuple[JobRunner, JobRunner]) -> None:
        first, second = runners
        await first.submit(NAP, 10, job_id="a")
        await first.submit(FAIL, 10, job_id="b")
        with pytest.raises(DuplicateJob):
            await second.submit(SAME, 1, job_id="a")
        await asyncio.sleep(1)
        assert [(job.id, job.status) for job in await second.list()] == [("b", "accepted"), ("a", "running")]
        await asyncio.sleep(11)
        assert (await second.get("a")).result == 10
        assert (await second.get("b")).error == JobFailure("ValueError", "no 10", "fail")
        await second.dismiss("a")
        with pytest.raises(JobNotFound):
            await first.get("a")

    async def test_progress_is_seen_a_little_later(self, runners: tuple[JobRunner, JobRunner]) -> None:
        async def work(value: Any) -> Any:
            for done in range(4):
                report_progress(done / 4, f"{done} of 4")
                await asyncio.sleep(1)

        first, second = runners
        await first.submit(work, 1, job_id="a")
        seen = await history(second, "a")
        states = [(job.status, job.progress, job.message) for job in seen]
        expected = [("running", 25 * done, f"{done} of 4") for done in range(4)]
        assert [state for state in states if state != ("accepted", 0, None)][-5:] == [
            *expected,
            ("successful", 100, "3 of 4"),
        ]
        assert now() <= 4.5
        assert [job.updated for job in seen] == sorted(job.updated for job in seen)

    async def test_what_has_not_changed_is_not_told_again(self) -> None:
        class Store(SharedStore):
            async def get(self, job_id: str) -> Job | None:
                return copy.copy(await super().get(job_id))

        store = Store()
        async with JobRunner(store=store) as one, JobRunner(store=store) as other:
            job = await one.submit(NAP, 5)
            await asyncio.sleep(1)
            seen = await history(other, job.id)
        assert [job.status for job in seen] == ["running", "successful"]

    async def test_what_has_not_changed_is_not_saved_again(
        self, runners: tuple[JobRunner, JobRunner]
    ) -> None:
        first, _ = runners
        await first.submit(NAP, 100, job_id="a")
        await first.submit(NAP, 100, job_id="b")
        await asyncio.sleep(50)
        store: Any = first._store
        assert store.saves == 1
        await asyncio.sleep(100)
        assert (
            store.saves <= 4
        )  # the end of one, with or without its full progress, and the beginning of the other

    async def test_what_was_to_be_saved_is_not_saved_after_the_end(self) -> None:
        class Store(SlowStore):
            is_shared = True

        async def work(value: Any) -> Any:
            await asyncio.sleep(1.1)
            report_progress(0.5)

        store = Store()
        async with JobRunner(store=store, drain=20) as runner:
            await runner.submit(work, 1, job_id="a")
            job = await end_of(runner, "a")
            await asyncio.sleep(10)
            assert store._jobs["a"] == job
        assert store.calls.count("save") == 4  # two halves when it began, two when it ended

    async def test_a_save_that_failed_is_tried_again(self) -> None:
        class Store(SharedStore, BrokenStore):
            pass

        store = Store()
        store.faults = {"save": 2}
        async with JobRunner(store=store) as runner:
            job = await runner.submit(NAP, 5)
            await asyncio.sleep(1)
            assert store._jobs[job.id].status == "running"

    async def test_dismissing_one_of_the_other(self, runners: tuple[JobRunner, JobRunner]) -> None:
        first, second = runners
        cleaner = Cleaner()
        await first.submit(cleaner.pipeline, 1, job_id="a")
        await first.submit(NAP, 1, job_id="b")
        await asyncio.sleep(1)
        watching = asyncio.create_task(end_of(second, "a"))
        for job_id in ("b", "a"):
            job = await second.dismiss(job_id)
            assert job.status == "dismissed"
            assert await first.get(job_id) == await second.get(job_id) == job
        assert cleaner.is_clean
        assert now() < 7
        assert (await watching).status == "dismissed"
        assert (await second.dismiss("a")).status == "dismissed"
        with pytest.raises(JobNotFound):
            await second.dismiss("a")

    async def test_of_the_other_that_ends_meanwhile_is_returned(
        self, runners: tuple[JobRunner, JobRunner]
    ) -> None:
        first, second = runners
        await first.submit(NAP, 1.1, job_id="a")
        await asyncio.sleep(1.05)  # the other one looks every 0.2 s
        job = await second.dismiss("a")
        assert job.status == "successful"
        assert await first.get("a") == job

    async def test_that_cannot_be_asked_is_asked_again(self, caplog: pytest.LogCaptureFixture) -> None:
        class Store(SharedStore):
            faults = 2

            async def asked_to_dismiss(self) -> list[str]:
                if self.faults:
                    self.faults -= 1
                    raise OSError("disk gone")
                return await super().asked_to_dismiss()

        store = Store()
        async with JobRunner(store=store) as first, JobRunner(store=store) as second:
            await first.submit(NAP, 100, job_id="a")
            assert (await second.dismiss("a")).status == "dismissed"
            assert now() < 1
        messages = [record.getMessage() for record in caplog.records]
        assert messages == ["the store can't tell which jobs to dismiss"] * 2

    async def test_who_leaves_waits_no_longer_for_the_other(self) -> None:
        store = SharedStore()
        async with JobRunner(store=store) as first:
            async with JobRunner(store=store) as second:
                await first.submit(NAP, 100, job_id="a")
                store.asked_to_dismiss = lambda: asyncio.sleep(0, [])  # type: ignore[method-assign]
                waiting = [
                    asyncio.create_task(history(second, "a")),
                    asyncio.create_task(second.dismiss("a")),
                ]
                await asyncio.sleep(1)
            for waiter in waiting:
                with pytest.raises(JobRunnerClosed):
                    await waiter
            assert now() < 1.5
            with pytest.raises(JobRunnerClosed):
                await second.get("a")
            await first.dismiss("a")

    async def test_one_that_is_removed_while_it_is_watched(
        self, runners: tuple[JobRunner, JobRunner]
    ) -> None:
        first, second = runners
        await first.submit(NAP, 100, job_id="a")
        watching = asyncio.create_task(history(second, "a"))
        await asyncio.sleep(1)
        await first._store.remove("a")
        with pytest.raises(JobNotFound):
            await watching

    async def test_an_idle_runner_asks_nothing(self, runners: tuple[JobRunner, JobRunner]) -> None:
        first, _ = runners
        store: Any = first._store
        asked: list[int] = []
        store.asked_to_dismiss = lambda: asyncio.sleep(0, asked.append(1))  # type: ignore[func-returns-value]
        await asyncio.sleep(10)
        assert not asked


class TestMemoryJobStore:
    MOMENT = datetime(2026, 1, 1, tzinfo=UTC)

    def job(self, job_id: str, finished: int | None = None) -> Job:
        end = None if finished is None else self.MOMENT + timedelta(seconds=finished)
        status: JobStatus = "accepted" if finished is None else "successful"
        return Job(
            id=job_id, pipeline="p", status=status, created=self.MOMENT, updated=self.MOMENT, finished=end
        )

    async def test_keeps_jobs(self) -> None:
        store: JobStore = MemoryJobStore()
        assert not store.is_shared
        await store.open()
        await store.add(self.job("a"))
        with pytest.raises(DuplicateJob):
            await store.add(self.job("a", 1))
        assert await store.get("a") == self.job("a")
        assert await store.get("b") is None
        await store.save(self.job("a", 1))
        assert await store.get("a") == self.job("a", 1)
        await store.ask_to_dismiss("a")
        assert await store.asked_to_dismiss() == []
        await store.remove("a")
        await store.remove("a")
        await store.save(self.job("a", 2))  # it stays removed
        assert await store.get("a") is None
        await store.evict(before=self.MOMENT, keep=0)
        await store.aclose()

    async def test_evicts_what_has_finished_before_or_is_too_much(self) -> None:
        async def left(before: int, keep: int) -> str:
            store = MemoryJobStore()
            for number, job_id in enumerate("abcde"):
                await store.add(self.job(job_id))
                if job_id != "c":
                    await store.save(self.job(job_id, number))
            await store.evict(before=self.MOMENT + timedelta(seconds=before), keep=keep)
            everything = {"limit": 9, "offset": 0, "status": None, "pipeline": None}
            return "".join(job.id for job in reversed(await store.list(**everything)))  # type: ignore[arg-type]

        assert await left(before=0, keep=9) == "abcde"
        assert await left(before=1, keep=9) == "bcde"
        assert await left(before=0, keep=3) == "bcde"
        assert await left(before=0, keep=0) == "c"
        assert await left(before=9, keep=9) == "c"


class TestImport:
    def test_is_explicit(self) -> None:
        code = "import sys, async_pipeline; print('async_pipeline.jobs' in sys.modules)"
        assert run_alone(code).stdout == "False\n"


async def test_a_job_context_that_gives_no_context_manager_fails_the_job(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def session(context: Any) -> Any:
        return None

    async with JobRunner(job_context=session) as runner:
        job = await runner.run(str, 1)
    assert job.error is not None
    assert job.error.type == "TypeError"
    assert "must return an async context manager, not None; decorate" in job.error.message


async def test_what_was_called_already_can_not_be_submitted() -> None:
    async def handler(value: int) -> int:
        return value

    async with JobRunner() as runner:
        with pytest.raises(TypeError, match=r"coroutine .*handler\(\.\.\.\); write submit\("):
            await runner.submit(handler(1), 1)  # type: ignore[arg-type]
        assert await runner.list() == []


@pytest.mark.threads
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_another_event_loop_is_told_whose_the_runner_is() -> None:
    """A sync handler of a web framework runs in a thread, where asyncio.run makes a loop."""
    gate = Gate()
    async with JobRunner() as runner:
        await runner.submit(gate.pipeline, 1, job_id="a")
        calls: list[Callable[[], Any]] = [
            lambda: runner.submit(str, 1),
            lambda: runner.run(str, 1),
            lambda: runner.get("a"),
            lambda: runner.dismiss("a"),
            lambda: runner.list(),
            lambda: anext(runner.watch("a")),
        ]
        for call in calls:

            async def ask(call: Callable[[], Any] = call) -> None:
                await call()

            with pytest.raises(RuntimeError, match=r"another event loop; .*run_coroutine_threadsafe"):
                await asyncio.get_running_loop().run_in_executor(None, asyncio.run, ask())
        assert not gate.cancelled
        gate.open.set()


async def test_a_job_that_is_cut_short_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with JobRunner(concurrency=1, drain=0) as runner:
        for job_id in ("running", "waiting"):
            await runner.submit(lambda value: asyncio.sleep(9), 1, job_id=job_id)
        await asyncio.sleep(0)
    messages = sorted(record.getMessage().partition(" of ")[0] for record in caplog.records)
    assert messages == ["job running", "job waiting"]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize(
    "method",
    [kind.list for kind in (JobRunner, JobStore, MemoryJobStore, SqliteJobStore)]
    + [kind.asked_to_dismiss for kind in (JobStore, MemoryJobStore, SqliteJobStore)],
    ids=lambda method: method.__qualname__,
)
def test_signatures_can_be_read(method: Callable[..., Any]) -> None:
    """From Python 3.14 on annotations are looked up late, where ``list`` is a method of the class."""
    inspect.signature(method)
