"""JobRunner: every way in which a job can come, run, be looked at, and end."""

import asyncio
import copy
import dataclasses
import gc
import logging
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
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
        self, *, limit: int, offset: int, status: Collection[JobStatus] | None, pipeline: Collection[str] | None
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

        with pytest.raises(TypeError, match=r"^job_context <function .*lacks its decorator: @contextlib\."):
            JobRunner(job_context=session)  # type: ignore[arg-type]
        JobRunner(job_context=asynccontextmanager(session))

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

        steps = [Own(), Stage("s", lambda x: x + 1), lambda x: x + 1, parallel(a=same), Pipeline([Own()])]
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
            async def run(self, value: Any, **options: Any) -> Any:
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
                assert (await end_of(runner, (await runner.submit(step, 4, timeout=5)).id)).status == "successful"

    async def test_a_finish_ends_the_job_early(self) -> None:
        class Own:
            name = "own"

            async def run(self, value: Any, *, context: Any = None) -> Any:
                raise Finish(value)

        def finish(value: Any) -> Any:
            raise Finish(value)

        async with JobRunner() as runner:
            for step in (Own(), Pipeline([finish, fail]), Stage("s", finish), Pipeline([Pipeline([finish]), fail])):
                job = await end_of(runner, (await runner.submit(step, 7)).id)
                assert (job.status, job.result, job.progress) == ("successful", 7, 100)


class TestFailure:
    async def test_says_what_where_and_after_how_many_attempts(self, caplog: pytest.LogCaptureFixture) -> None:
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
        self, kind: type[BaseException], is_late: bool, way: str, factory: str
    ) -> None:
        if factory == "eager" and not hasattr(asyncio, "eager_task_factory"):
            pytest.skip("there are no eager tasks yet")
        complaints: list[Any] = []

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
