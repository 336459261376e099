"""The job store in a file: against a dict, among processes, and with everything that breaks."""

# ruff: noqa: ASYNC240 - the files are small, and on this machine

import asyncio
import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import async_pipeline
from async_pipeline import _jobs_file, _sqlite
from async_pipeline.errors import DuplicateJob
from async_pipeline.jobs import Job, JobFailure, JobRunner, JobStore
from async_pipeline.jobs_sqlite import SqliteJobStore
from async_pipeline.testing import VirtualClockLoop

pytestmark = pytest.mark.threads

NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
LOST = JobFailure("WorkerLost", "the process that ran the job is gone")
EVERYTHING: dict[str, Any] = {"limit": 10**6, "offset": 0, "status": None, "pipeline": None}


def a_job(job_id: str, after: float = 0, **fields: Any) -> Job:
    moment = NOW + timedelta(seconds=after)
    values: Any = {"id": job_id, "pipeline": "p", "created": moment, "updated": moment} | fields
    return Job(**values)


def finished(job: Job, after: float = 0, **fields: Any) -> Job:
    moment = NOW + timedelta(seconds=after)
    changes: Any = {"status": "successful", "finished": moment, "updated": moment} | fields
    return replace(job, **changes)


def ids(jobs: list[Job]) -> str:
    return " ".join(job.id for job in jobs)


@asynccontextmanager
async def opened(path: Any) -> AsyncIterator[SqliteJobStore]:
    store = SqliteJobStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


def thread_of(store: SqliteJobStore) -> Any:
    assert store._thread is not None
    return store._thread


async def crash(store: SqliteJobStore) -> None:
    """Leave a store as the death of its process does: the lock is free, and nothing else is cleaned up."""

    def leave() -> None:
        database = thread_of(store).database
        database._stack.pop_all()
        database._db.close()
        _sqlite._locked.discard(database._owner._file)
        os.close(database._owner._file)

    await thread_of(store).put(leave)
    await store.aclose()


@contextmanager
def busy(store: SqliteJobStore) -> Iterator[None]:
    """What is asked for inside is done together afterwards."""
    go_on = threading.Event()
    thread_of(store).put(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


def queued(store: SqliteJobStore) -> int:
    return len(thread_of(store)._waiting)


class Connection:
    """A connection that says something else for once."""

    def __init__(self, store: SqliteJobStore, answer: Callable[[str], None]) -> None:
        self.statements: list[str] = []
        self._answer = answer
        self._store = store
        self._db = thread_of(store).database._db

    def __enter__(self) -> "Connection":
        thread_of(self._store).database._db = self
        return self

    def __exit__(self, *error: object) -> None:
        thread_of(self._store).database._db = self._db

    def execute(self, statement: str, values: Any = ()) -> Any:
        self.statements.append(statement.split(" ")[0])
        self._answer(statement)
        return self._db.execute(statement, values)

    @property
    def in_transaction(self) -> bool:
        return bool(self._db.in_transaction)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """See at once who has died."""
    monkeypatch.setattr(_jobs_file, "_LOOK_EVERY", 0.0)


@pytest.fixture(autouse=True)
def nothing_left(path: Path) -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("SqliteJobStore")]
    assert not _sqlite._locked
    assert _sqlite._files.acquire(blocking=False)
    _sqlite._files.release()


# -- against a dict

# Python's text may hold half a surrogate pair, and NUL
TEXT = st.text(st.characters(exclude_categories=()), max_size=5)
MOMENTS = st.datetimes(timezones=st.just(UTC))
FEW_MOMENTS = st.integers(0, 4).map(lambda second: NOW + timedelta(seconds=second))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAMES = ["a", "b", "c\0d", "c\0e", "ü", "", "'"]
IDS = st.sampled_from(NAMES)
PIPELINES = st.sampled_from(["p", "q", ""])
OPEN_STATUSES, END_STATUSES = ["accepted", "running"], ["successful", "failed", "dismissed"]
FAILURES = st.builds(JobFailure, TEXT, TEXT, st.none() | TEXT, st.integers(1, 2**70))


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """A job's fields, all but the id."""
    end = draw(st.none() | FEW_MOMENTS)
    return Job(
        id="",
        pipeline=draw(PIPELINES),
        status=draw(st.sampled_from(OPEN_STATUSES if end is None else END_STATUSES)),
        progress=draw(st.integers(0, 100)),
        message=draw(st.none() | TEXT),
        created=draw(FEW_MOMENTS),
        updated=draw(MOMENTS),
        started=draw(st.none() | MOMENTS),
        finished=end,
        result=draw(JSON),
        error=draw(st.none() | FAILURES),
    )


class Entry:
    def __init__(self, job: Job, owner: int, number: int) -> None:
        self.job = job
        self.owner = owner
        self.number = number
        self.asked = False


class Model(RuleBasedStateMachine):
    """Two stores of one file do what a dict does."""

    which = st.integers(0, 1)

    @initialize(first=st.lists(st.tuples(which, jobs()), min_size=3, max_size=len(NAMES)))
    def begin(self, first: Any) -> None:
        self.runner = asyncio.Runner(loop_factory=VirtualClockLoop)
        self.folder = TemporaryDirectory()
        self.stores = [SqliteJobStore(Path(self.folder.name, "jobs.db")) for _ in range(2)]
        for store in self.stores:
            self.do(store.open())
        self.entries: dict[str, Entry] = {}
        self.owners = [0, 1]
        self.count = 2
        for job_id, (which, job) in zip(NAMES, first, strict=False):
            self.add(which, job_id, job)

    def do(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.list(0, 9, 0, None, None)
        for store in self.stores:
            self.do(store.aclose())
        assert [file for file in os.listdir(self.folder.name) if file != "jobs.db"] == []
        self.runner.close()
        self.folder.cleanup()

    def lose(self, owner: int) -> None:
        for entry in self.entries.values():
            if entry.owner == owner and entry.job.finished is None:
                found = self.do(self.stores[0].get(entry.job.id))
                entry.job = replace(entry.job, status="failed", error=LOST)
                assert found.finished is not None
                assert found.finished == found.updated >= entry.job.updated
                assert found == replace(entry.job, finished=found.finished, updated=found.updated)
                entry.job = found

    @rule(which=which, job_id=IDS, job=jobs())
    def add(self, which: int, job_id: str, job: Job) -> None:
        job = replace(job, id=job_id)
        try:
            self.do(self.stores[which].add(job))
        except DuplicateJob as error:
            assert error.job_id == job_id
            assert job_id in self.entries
        else:
            assert job_id not in self.entries
            self.count += 1
            self.entries[job_id] = Entry(job, self.owners[which], self.count)

    @rule(which=which, job_id=IDS, job=jobs())
    def save(self, which: int, job_id: str, job: Job) -> None:
        job = replace(job, id=job_id)
        self.do(self.stores[which].save(job))
        entry = self.entries.get(job_id)
        if entry is not None and entry.owner == self.owners[which]:
            entry.job = job

    @rule(which=which, job_id=IDS)
    def get(self, which: int, job_id: str) -> None:
        entry = self.entries.get(job_id)
        assert self.do(self.stores[which].get(job_id)) == (entry and entry.job)

    @rule(which=which, job_id=IDS)
    def remove(self, which: int, job_id: str) -> None:
        self.do(self.stores[which].remove(job_id))
        self.entries.pop(job_id, None)

    @rule(which=which, before=FEW_MOMENTS, keep=st.integers(0, 7))
    def evict(self, which: int, before: datetime, keep: int) -> None:
        self.do(self.stores[which].evict(before=before, keep=keep))
        done = [entry for entry in self.entries.values() if entry.job.finished is not None]
        done.sort(key=lambda entry: (entry.job.finished, entry.number), reverse=True)
        for place, entry in enumerate(done):
            assert entry.job.finished is not None
            if place >= keep or entry.job.finished < before:
                del self.entries[entry.job.id]

    @rule(which=which, job_id=IDS)
    def ask_to_dismiss(self, which: int, job_id: str) -> None:
        self.do(self.stores[which].ask_to_dismiss(job_id))
        entry = self.entries.get(job_id)
        if entry is not None and entry.job.finished is None:
            entry.asked = True

    @rule(which=which)
    def asked_to_dismiss(self, which: int) -> None:
        asked = {
            job_id
            for job_id, entry in self.entries.items()
            if entry.asked and entry.owner == self.owners[which] and entry.job.finished is None
        }
        told = self.do(self.stores[which].asked_to_dismiss())
        assert set(told) == asked
        assert len(told) == len(asked)

    @rule(
        which=which,
        limit=st.integers(0, 9),
        offset=st.integers(0, 3),
        status=st.none() | st.sets(st.sampled_from(OPEN_STATUSES + END_STATUSES)),
        pipeline=st.none() | st.lists(PIPELINES, max_size=3),
    )
    def list(self, which: int, limit: int, offset: int, status: Any, pipeline: Any) -> None:
        newest = sorted(self.entries.values(), key=lambda entry: (entry.job.created, entry.number))[::-1]
        wanted = [
            entry.job
            for entry in newest
            if (status is None or entry.job.status in status)
            and (pipeline is None or entry.job.pipeline in pipeline)
        ]
        found = self.do(self.stores[which].list(limit=limit, offset=offset, status=status, pipeline=pipeline))
        assert found == wanted[offset:][:limit]

    @rule(which=which, dies=st.booleans())
    def reopen(self, which: int, dies: bool) -> None:
        lost, self.owners[which] = self.owners[which], self.count
        self.count += 1
        self.do(crash(self.stores[which]) if dies else self.stores[which].aclose())
        self.do(self.stores[which].open())
        self.lose(lost)


def test_it_does_what_a_dict_does(looks_always: None) -> None:
    run_state_machine_as_test(
        Model, settings=settings(max_examples=30, stateful_step_count=20, deadline=None)
    )


class TestFields:
    async def test_come_back_as_they_were(self, path: Path) -> None:
        store: JobStore
        async with opened(path) as store:
            job = a_job(
                "a",
                status="failed",
                progress=50,
                message="half \ud800 a pair, \0, ü",
                started=datetime.min.replace(tzinfo=UTC),
                finished=datetime.max.replace(tzinfo=UTC),
                result={"a": [1, -0.5, None, True, "\udfff\0", 10**4000]},
                error=JobFailure("E", "\udc80", "a/b", 3),
            )
            await store.add(job)
            assert await store.get("a") == job
            assert await store.list(**EVERYTHING) == [job]
            assert store.is_shared

    async def test_times_of_another_zone_become_utc(self, path: Path) -> None:
        async with opened(path) as store:
            moment = datetime.fromisoformat("2024-05-06T07:08:09.000001+05:30")
            await store.add(a_job("a", created=moment))
            found = await store.get("a")
            assert found is not None
            assert found.created == moment
            assert found.created.tzinfo is UTC

    async def test_a_result_is_what_json_makes_of_it(self, path: Path) -> None:
        async with opened(path) as store:
            await store.add(a_job("a", result=({1: (2, 3)}, "x")))
            found = await store.get("a")
            assert found is not None
            assert found.result == [{"1": [2, 3]}, "x"]

    @pytest.mark.parametrize(
        ("result", "kind"),
        [
            (object(), TypeError),
            ({1, 2}, TypeError),
            ({(1, 2): 3}, TypeError),
            (b"x", TypeError),
            ([float("nan")], ValueError),
            (float("inf"), ValueError),
            (10**5000, ValueError),
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_a_result_that_is_not_json_changes_nothing(
        self, path: Path, result: Any, kind: type[Exception]
    ) -> None:
        async with opened(path) as store:
            job = a_job("a", message="before")
            await store.add(job)
            with pytest.raises(kind, match="the result of job 'a' is not JSON: ") as caught:
                await store.save(finished(job, result=result))
            assert str(caught.value.__cause__) in str(caught.value)
            with pytest.raises(kind, match="the result of job 'b' is not JSON"):
                await store.add(a_job("b", result=result))
            assert await store.list(**EVERYTHING) == [job]

    async def test_neither_does_one_in_a_circle(self, path: Path) -> None:
        circle: list[Any] = []
        circle.append(circle)
        async with opened(path) as store:
            with pytest.raises(ValueError, match="the result of job 'a' is not JSON: Circular"):
                await store.add(a_job("a", result=circle))

    async def test_what_was_encoded_can_be_decoded_however_deep(self, path: Path) -> None:
        def nested(depth: int) -> Any:
            value: Any = 1
            for _ in range(depth):
                value = [value]
            return value

        async with opened(path) as store:
            depth, too_deep = 1, 2**17
            while too_deep - depth > 1:
                middle = (depth + too_deep) // 2
                try:
                    await store.add(a_job("a", result=nested(middle)))
                except ValueError:
                    too_deep = middle
                else:
                    depth = middle
                    assert await store.get("a") is not None
                    await store.remove("a")
            assert depth > 500

    async def test_what_can_not_be_stored_is_an_error_of_that_call(self, path: Path) -> None:
        async with opened(path) as store:
            with busy(store):
                calls = [
                    asyncio.ensure_future(store.add(job))
                    for job in (
                        a_job("a"),
                        a_job("\ud800"),
                        a_job("b", progress=2**63),
                        a_job("c", pipeline=object()),
                        a_job("d", message=3),
                        a_job("e", created=datetime(2024, 1, 1)),
                        a_job("f"),
                    )
                ]
                await asyncio.sleep(0)
            errors = [type(error) for error in await asyncio.gather(*calls, return_exceptions=True)]
            assert errors[:3] == [type(None), UnicodeEncodeError, OverflowError]
            assert issubclass(errors[3], sqlite3.Error)
            assert errors[4:] == [AttributeError, TypeError, type(None)]
            assert ids(await store.list(**EVERYTHING)) == "f a"
            with pytest.raises(UnicodeEncodeError):
                await store.get("\ud800")


class TestSeveralStores:
    async def test_of_one_file_answer_for_each_other(self, path: Path) -> None:
        async with opened(path) as one, opened(os.fspath(path)) as other:
            job = a_job("a")
            await one.add(job)
            assert await other.get("a") == job
            with pytest.raises(DuplicateJob):
                await other.add(a_job("a"))
            await other.save(replace(job, status="running"))  # not its own
            assert await one.get("a") == job
            await other.ask_to_dismiss("a")
            assert await other.asked_to_dismiss() == []
            assert await one.asked_to_dismiss() == ["a"]
            assert await one.asked_to_dismiss() == ["a"]
            done = finished(job, status="dismissed")
            await one.save(done)
            assert await one.asked_to_dismiss() == []
            assert await other.list(**EVERYTHING) == [done]
            await other.remove("a")
            await one.save(done)
            assert await one.get("a") is None

    async def test_may_ask_for_what_has_finished(self, path: Path) -> None:
        async with opened(path) as store:
            await store.add(job := a_job("a"))
            await store.save(finished(job))
            await store.ask_to_dismiss("a")
            await store.save(job)
            assert await store.asked_to_dismiss() == []

    async def test_by_a_link_see_each_other_live(self, path: Path, looks_always: None) -> None:
        (path.parent / "folder").mkdir()
        link = path.parent / "folder" / "link.db"
        link.symlink_to(path)
        async with opened(link) as one:
            await one.add(job := a_job("a"))
            async with opened(path) as other:
                assert await other.get("a") == job
                assert await other.list(**EVERYTHING) == [job]

    async def test_keep_what_has_finished(self, path: Path) -> None:
        async with opened(path) as store:
            await store.add(job := finished(a_job("a"), result=[1]))
        async with opened(path) as store:
            assert await store.get("a") == job

    async def test_runners_dismiss_each_others_jobs(self, path: Path) -> None:
        async def wait(_: object) -> None:
            await asyncio.sleep(1e6)

        async with (
            JobRunner(store=SqliteJobStore(path)) as one,
            JobRunner(store=SqliteJobStore(path)) as other,
        ):
            job = await one.submit(wait, None)
            assert (await other.dismiss(job.id)).status == "dismissed"
            assert (await one.get(job.id)).status == "dismissed"

    async def test_a_result_that_is_not_json_fails_the_job(self, path: Path) -> None:
        async with JobRunner(store=SqliteJobStore(path)) as runner:
            job = await runner.submit(lambda _: object(), None)
            *_, job = [state async for state in runner.watch(job.id)]
            assert job.error is not None
            assert (job.status, job.error.type) == ("failed", "TypeError")


class TestList:
    @pytest.mark.parametrize("most", [2**63 - 1, 2**63, 2**70])
    async def test_takes_any_number(self, path: Path, most: int) -> None:
        async with opened(path) as store:
            for name in "abc":
                await store.add(a_job(name))
            assert ids(await store.list(limit=most, offset=1, status=None, pipeline=None)) == "b a"
            assert ids(await store.list(limit=1, offset=most, status=None, pipeline=None)) == ""

    async def test_is_by_creation_then_by_addition(self, path: Path) -> None:
        async with opened(path) as store:
            for name, after in [("a", 2), ("b", 0), ("c", 2), ("d", 1)]:
                await store.add(a_job(name, after, pipeline=name))
            assert ids(await store.list(**EVERYTHING)) == "c a d b"
            assert ids(await store.list(**EVERYTHING | {"limit": 2, "offset": 1})) == "a d"
            some = {"pipeline": {"a", "c", "d", "x"}, "status": ["accepted", "failed"], "offset": 1}
            assert ids(await store.list(**EVERYTHING | some)) == "a d"
            assert await store.list(**EVERYTHING | {"status": []}) == []


class TestEviction:
    async def test_waits_for_nobody_when_there_is_nothing_to_do(self, path: Path) -> None:
        async with opened(path) as store:
            await store.add(a_job("a"))
            await store.add(finished(a_job("b"), 5))
            with Connection(store, lambda statement: None) as db:
                await store.evict(before=NOW + timedelta(seconds=5), keep=1)
            assert db.statements == ["SELECT", "SELECT"]
            assert ids(await store.list(**EVERYTHING)) == "b a"

    async def test_takes_those_that_finished_first(self, path: Path) -> None:
        async with opened(path) as store:
            for number, (job_id, after) in enumerate([("a", 3), ("b", 1), ("c", 3), ("d", 2), ("e", 1)]):
                await store.add(finished(a_job(job_id, number), after))
            await store.evict(before=NOW, keep=4)
            assert ids(await store.list(**EVERYTHING)) == "e d c a"
            await store.evict(before=NOW + timedelta(seconds=1, microseconds=1), keep=2**63)
            assert ids(await store.list(**EVERYTHING)) == "d c a"
            await store.evict(before=NOW + timedelta(seconds=2, microseconds=1), keep=2)
            assert ids(await store.list(**EVERYTHING)) == "c a"
            await store.evict(before=NOW, keep=1)
            assert ids(await store.list(**EVERYTHING)) == "c"
            await store.evict(before=datetime.min.replace(tzinfo=UTC), keep=0)
            assert await store.list(**EVERYTHING) == []
            for after in range(3):  # the time asks for more than the number
                await store.add(finished(a_job(str(after), after), after))
            await store.evict(before=NOW + timedelta(seconds=2), keep=2)
            assert ids(await store.list(**EVERYTHING)) == "2"


class TestLostJobs:
    async def test_are_failed_when_the_file_is_opened(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.open()
        await store.add(job := a_job("a", progress=40, message="m", status="running", started=NOW))
        await store.add(done := finished(a_job("b")))
        await crash(store)
        assert len(list(path.parent.glob("*.lock"))) == 1
        before = datetime.now(UTC)
        async with opened(path) as other:
            assert len(list(path.parent.glob("*.lock"))) == 1
            lost = await other.get("a")
            assert lost is not None
            assert lost.finished is not None
            assert before <= lost.finished <= datetime.now(UTC)
            expected = replace(job, status="failed", error=LOST, finished=lost.finished)
            assert lost == replace(expected, updated=lost.finished)
            assert await other.get("b") == done
        assert not list(path.parent.glob("*.lock"))

    async def test_are_failed_in_file_too(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.open()
        await store.add(a_job("a"))
        await crash(store)
        async with opened(path):
            pass
        with sqlite3.connect(path) as db:
            assert db.execute("SELECT status FROM jobs").fetchall() == [("failed",)]
        db.close()

    async def test_did_not_finish_before_they_changed(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.open()
        late = datetime.now(UTC) + timedelta(days=1)
        await store.add(a_job("a", updated=late))
        await crash(store)
        async with opened(path) as other:
            lost = await other.get("a")
            assert lost is not None
            assert lost.finished == lost.updated == late

    @pytest.mark.parametrize("way", ["get", "list"])
    async def test_are_seen_by_who_looks(self, path: Path, looks_always: None, way: str) -> None:
        async with opened(path) as other:
            store = SqliteJobStore(path)
            await store.open()
            await store.add(a_job("a"))
            await store.add(a_job("b"))
            files = len(os.listdir("/dev/fd"))
            assert len(await other.list(**EVERYTHING | {"status": ["accepted"]})) == 2
            assert len(os.listdir("/dev/fd")) == files
            await crash(store)
            if way == "get":
                job = await other.get("a")
                assert job is not None
                assert job.error == LOST
            else:
                assert await other.list(**EVERYTHING | {"status": ["accepted"]}) == []
            assert [job.error for job in await other.list(**EVERYTHING)] == [LOST, LOST]
            assert len(list(path.parent.glob("*.lock"))) == 1

    async def test_are_looked_for_now_and_then(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = 100.0
        monkeypatch.setattr(_jobs_file, "time", SimpleNamespace(monotonic=lambda: seconds))
        probes: list[str] = []
        is_lost = _jobs_file._is_lost

        def counted(path: str) -> bool:
            probes.append(path)
            return is_lost(path)

        async with opened(path) as other:
            store = SqliteJobStore(path)
            await store.open()
            for number in range(20):
                await store.add(a_job(str(number)))
            monkeypatch.setattr(_jobs_file, "_is_lost", counted)
            seconds += 0.25
            for _ in range(3):
                assert len(await other.list(**EVERYTHING | {"status": ["accepted"]})) == 20
                assert await other.get("3") == a_job("3")
                assert await store.get("3") == a_job("3")
            assert len(probes) == 1
            await crash(store)
            seconds += 0.15
            assert await other.get("3") == a_job("3")
            seconds += 0.1
            job = await other.get("3")
            assert job is not None
            assert job.error == LOST
            assert len(probes) == 2

    async def test_of_an_owner_whose_lock_file_is_gone(self, path: Path, looks_always: None) -> None:
        async with opened(path) as store, opened(path) as other:
            await store.add(a_job("a"))
            os.unlink(thread_of(store).database._owner._path)
            job = await other.get("a")
            assert job is not None
            assert job.error == LOST

    async def test_nobody_is_lost_whose_lock_can_not_be_looked_at(
        self, path: Path, looks_always: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(file: int) -> bool:
            raise OSError(errno.ENOLCK, "No locks available")

        async with opened(path) as store, opened(path) as other:
            await store.add(a_job("a"))
            monkeypatch.setattr(_sqlite, "_lock", broken)
            files = len(os.listdir("/dev/fd"))
            assert await other.get("a") == a_job("a")
            assert len(os.listdir("/dev/fd")) == files

    async def test_of_a_store_that_is_closed(self, path: Path, looks_always: None) -> None:
        async with opened(path) as other:
            async with opened(path) as store:
                await store.add(a_job("a"))
            with Connection(other, lambda statement: None) as db:
                job = await other.get("a")
            assert "UPDATE" not in db.statements  # the store has done it itself
            assert job is not None
            assert job.error == LOST

    async def test_of_a_store_that_could_not_do_it_itself(
        self, path: Path, looks_always: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_jobs_file, "_PATIENCE", 0.0)
        async with opened(path) as other:
            async with opened(path) as store:
                await store.add(a_job("a"))
                lock = sqlite3.connect(path, isolation_level=None)
                lock.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                await other.get("a")
            lock.close()
            job = await other.get("a")
            assert job is not None
            assert job.error == LOST

    async def test_two_who_look_at_once_agree(self, path: Path, looks_always: None) -> None:
        async with opened(path) as one, opened(path) as other:
            for number in range(50):
                store = SqliteJobStore(path)
                await store.open()
                await store.add(a_job(f"{number}"))
                await crash(store)
                await asyncio.gather(*(s.get(f"{number}") for s in (one, other, one, other)))
                found = [await s.get(f"{number}") for s in (one, other)]
                assert found[0] == found[1]
                assert found[0] is not None
                assert found[0].error == LOST
            assert len(list(path.parent.glob("*.lock"))) == 2


class TestLockFiles:
    async def test_that_were_left_are_removed(self, path: Path) -> None:
        left = path.with_name("jobs.db-0123456789abcdef.lock")
        others = [
            path.with_name(name)
            for name in (
                "jobs.db-0123456789abcde.lock",
                "jobs.db-0123456789abcdef.lock.old",
                "jobsxdb-0123456789abcdef.lock",
                "my.lock",
            )
        ]
        for file in (left, *others):
            file.touch()
        async with opened(path) as one:
            await one.add(a_job("a"))
            async with opened(path) as other:
                assert not left.exists()
                assert all(file.exists() for file in others)
                assert await other.get("a") == a_job("a")

    async def test_of_a_new_owner_may_be_taken_by_who_removes_them(
        self, path: Path, looks_always: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = _sqlite._lock
        turns = iter(["held by who looks", "removed by who looked"])

        def late(file: int) -> bool:
            turn = next(turns, None)
            if turn == "held by who looks":
                return False
            if turn is not None:
                for left in path.parent.glob("*.lock"):
                    left.unlink()
            return lock(file)

        monkeypatch.setattr(_sqlite, "_lock", late)
        async with opened(path) as store:
            assert os.path.exists(thread_of(store).database._owner._path)
            await store.add(a_job("a"))
            async with opened(path) as other:
                assert await other.get("a") == a_job("a")

    def test_are_not_freed_by_a_child_that_closes_them(self, path: Path) -> None:
        # a child has what dup() gives: the same lock by another number
        file = _sqlite.open_locked(str(path), os.O_CREAT)
        assert file is not None
        parents = os.dup(file)
        _sqlite._files.acquire()
        _sqlite._close_in_child()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
        assert _sqlite.open_locked(str(path), 0) is None
        os.close(parents)
        assert _jobs_file._is_lost(str(path))
        assert not path.exists()

    async def test_all_files_are_their_users_only(self, path: Path) -> None:
        old = os.umask(0)
        try:
            async with opened(path) as store:
                await store.add(a_job("a"))
                files = sorted(os.listdir(path.parent))
                assert [file[:8] for file in files] == ["jobs.db", "jobs.db-", "jobs.db-", "jobs.db-"]
                for file in files:
                    assert stat.S_IMODE((path.parent / file).stat().st_mode) == 0o600, file
        finally:
            os.umask(old)

    async def test_of_an_existing_file_the_mode_stays(self, path: Path) -> None:
        path.touch()
        path.chmod(0o640)
        async with opened(path) as store:
            await store.add(a_job("a"))
            assert stat.S_IMODE(path.stat().st_mode) == 0o640


def header(**pragmas: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE jobs (a)")
            for name, value in pragmas.items():
                db.execute(f"PRAGMA {name} = {value}")
        db.close()

    return write


def damaged(path: Path) -> None:
    header(application_id=_jobs_file._APPLICATION, user_version=_jobs_file._VERSION)(path)
    content = bytearray(path.read_bytes())
    content[100:2000] = os.urandom(1900)
    path.write_bytes(content)


class TestOpening:
    @pytest.mark.parametrize("path_of", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
    async def test_a_path_of_any_kind(self, path: Path, path_of: Callable[[Path], Any]) -> None:
        async with opened(path_of(path)):
            assert path.exists()

    @pytest.mark.parametrize("name", ["", ":memory:"])
    def test_no_path_of_a_file(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"JobRunner\(\) without a store"):
            SqliteJobStore(name)

    def test_no_path(self) -> None:
        with pytest.raises(TypeError):
            SqliteJobStore(3)  # type: ignore[arg-type]

    async def test_stays_where_it_was_when_the_process_moves(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(path.parent)
        store = SqliteJobStore("file:jobs.db")  # no URI
        monkeypatch.chdir("/")
        await store.open()
        await store.aclose()
        assert os.listdir(path.parent) == ["file:jobs.db"]

    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (lambda path: path.write_text("dear diary, " * 1000), "is no job store, or damaged"),
            (lambda path: path.write_bytes(b"\xff" * 100), "is no job store, or damaged"),
            (damaged, "is no job store, or damaged"),
            (header(), "belongs to another application"),
            (header(application_id=77), "belongs to another application"),
            (header(user_version=1), "belongs to another application"),
            (header(application_id=_jobs_file._APPLICATION, user_version=2), "another version"),
        ],
    )
    async def test_another_file_is_left_as_it_is(
        self, path: Path, write: Callable[[Path], None], message: str
    ) -> None:
        write(path)
        content = path.read_bytes()
        with pytest.raises(ValueError, match=message) as caught:
            await SqliteJobStore(path).open()
        assert str(path) in str(caught.value)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["jobs.db"]

    @pytest.mark.parametrize(
        ("place", "kind"), [("no/jobs.db", FileNotFoundError), ("file/jobs.db", NotADirectoryError)]
    )
    async def test_no_folder(self, tmp_path: Path, place: str, kind: type[OSError]) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(kind, match="in a folder that exists") as caught:
            await SqliteJobStore(tmp_path / place).open()
        assert caught.value.filename == str(tmp_path / place)
        assert caught.value.errno

    async def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(PermissionError, match="a file, not a folder"):
            await SqliteJobStore(tmp_path).open()

    async def test_a_file_that_may_only_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async with opened(path):
            pass
        connect = sqlite3.connect
        monkeypatch.setattr(
            sqlite3, "connect", lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options)
        )
        with pytest.raises(PermissionError, match="that may be written"):
            await SqliteJobStore(path).open()
        assert not list(path.parent.glob("*.lock"))

    async def test_a_file_system_without_locks(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(file: int) -> bool:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(_sqlite, "_lock", broken)
        with pytest.raises(OSError, match=r"No locks available; .* on a local disk"):
            await SqliteJobStore(path).open()

    async def test_a_file_system_that_can_not_share(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Unable(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                if statement == "PRAGMA journal_mode = WAL":
                    statement = "SELECT 'delete'"
                return super().execute(statement, values)

        connect = sqlite3.connect
        monkeypatch.setattr(
            sqlite3, "connect", lambda path, **options: connect(path, factory=Unable, **options)
        )
        with pytest.raises(OSError, match=r"can't share a file there; .* on a local disk"):
            await SqliteJobStore(path).open()

    async def test_a_file_that_somebody_has_locked(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_jobs_file, "_PATIENCE", 0.0)
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match="end the process that keeps it locked") as caught:
            await SqliteJobStore(path).open()
        assert caught.value.errno == errno.EBUSY
        lock.close()

    @pytest.mark.parametrize(
        ("code", "times", "patience", "message"),
        [
            (sqlite3.SQLITE_BUSY, 3, 10.0, None),
            (sqlite3.SQLITE_BUSY_RECOVERY, 3, 10.0, None),
            (sqlite3.SQLITE_BUSY, 1, 0.0, "end the process that keeps it locked"),
            (sqlite3.SQLITE_IOERR, 1, 10.0, "look at the disk"),
        ],
    )
    async def test_a_file_that_others_open_at_the_same_time(
        self,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        code: int,
        times: int,
        patience: float,
        message: str | None,
    ) -> None:
        failures = iter(range(times))

        class Busy(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                if statement == "PRAGMA journal_mode = WAL" and next(failures, None) is not None:
                    error = sqlite3.OperationalError("not now")  # at once, whatever the timeout
                    error.sqlite_errorcode = code
                    raise error
                return super().execute(statement, values)

        connect = sqlite3.connect
        monkeypatch.setattr(_jobs_file, "_PATIENCE", patience)
        monkeypatch.setattr(
            sqlite3, "connect", lambda path, **options: connect(path, factory=Busy, **options)
        )
        store = SqliteJobStore(path)
        if message is not None:
            with pytest.raises(OSError, match=message):
                await store.open()
        await store.open()
        await store.add(a_job("a"))
        await store.aclose()

    async def test_anything_else(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: Any, **options: Any) -> Any:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error

        monkeypatch.setattr(sqlite3, "connect", broken)
        with pytest.raises(OSError, match="disk I/O error; look at the disk") as caught:
            await SqliteJobStore(path).open()
        assert caught.value.errno == errno.EIO

    async def test_is_durable_enough_and_shared(self, path: Path) -> None:
        async with opened(path) as store:
            pragmas = [
                await thread_of(store).put(
                    lambda name=name: thread_of(store).database._single(f"PRAGMA {name}")
                )
                for name in ("journal_mode", "synchronous", "busy_timeout")
            ]
            assert pragmas == ["wal", 1, 10_000]

    async def test_twice(self, path: Path) -> None:
        async with opened(path) as store:
            with pytest.raises(RuntimeError, match="give each JobRunner its own"):
                await store.open()
            await store.add(a_job("a"))
        await store.open()
        assert ids(await store.list(**EVERYTHING)) == "a"
        await store.aclose()
        await store.aclose()

    async def test_is_needed(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.aclose()
        assert repr(store) == f"<SqliteJobStore {str(path)!r} closed>"
        for _ in range(2):
            for call in (
                store.add(a_job("a")),
                store.save(a_job("a")),
                store.get("a"),
                store.remove("a"),
                store.evict(before=NOW, keep=0),
                store.ask_to_dismiss("a"),
                store.asked_to_dismiss(),
                store.list(**EVERYTHING),
            ):
                with pytest.raises(RuntimeError, match="is not open; write 'async with JobRunner"):
                    await call
            async with opened(path):
                await store.open()
                assert repr(store) == f"<SqliteJobStore {str(path)!r} open>"
                await store.aclose()

    async def test_in_another_event_loop(self, path: Path) -> None:
        async with opened(path) as store:

            def elsewhere() -> None:
                with asyncio.Runner() as runner, pytest.raises(RuntimeError, match="open one in each"):
                    runner.run(store.get("a"))

            await asyncio.get_running_loop().run_in_executor(None, elsewhere)

    async def test_is_cancelled(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on = threading.Event(), threading.Event()
        create = _sqlite.create_file

        def slow(path: str) -> None:
            begun.set()
            go_on.wait()
            create(path)

        monkeypatch.setattr(_jobs_file, "create_file", slow)
        store = SqliteJobStore(path)
        opening = asyncio.ensure_future(store.open())
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        with pytest.raises(RuntimeError, match="not open"):
            await store.get("a")
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        go_on.set()
        await store.open()
        await store.add(a_job("a"))
        assert len(list(path.parent.glob("*.lock"))) == 1
        await store.aclose()
        assert os.listdir(path.parent) == ["jobs.db"]


class TestClosing:
    async def test_waits_for_what_was_asked_for(self, path: Path) -> None:
        async with opened(path) as store:
            with busy(store):
                calls = [asyncio.ensure_future(store.add(finished(a_job(str(n))))) for n in range(10)]
                calls.append(asyncio.ensure_future(store.evict(before=NOW, keep=5)))
                await asyncio.sleep(0)
                closing = [asyncio.ensure_future(store.aclose()) for _ in range(2)]
                await asyncio.sleep(0)
                assert repr(store).endswith("closed>")
                with pytest.raises(RuntimeError, match="not open"):
                    await store.get("a")
            await asyncio.gather(*closing)
            await asyncio.gather(*calls)
        async with opened(path) as store:
            assert len(await store.list(**EVERYTHING)) == 5

    async def test_goes_on_when_it_is_cancelled(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.open()
        with busy(store):
            adding = asyncio.ensure_future(store.add(a_job("a")))
            closing = asyncio.ensure_future(store.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert not adding.done()
        await store.open()
        await adding
        job = await store.get("a")
        assert job is not None
        assert job.error == LOST
        await store.aclose()

    async def test_while_it_is_opened_again(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.open()
        with busy(store):
            closing = asyncio.ensure_future(store.aclose())
            await asyncio.sleep(0)
            opening = asyncio.ensure_future(store.open())
            await asyncio.sleep(0)
        await asyncio.gather(opening, closing)
        await store.add(a_job("a"))
        await store.aclose()

    async def test_by_another_as_well_while_it_is_opened_again(self, path: Path) -> None:
        store = SqliteJobStore(path)
        await store.open()
        calls = []
        with busy(store):
            for call in (store.aclose(), store.open(), store.aclose()):
                calls.append(asyncio.ensure_future(call))
                await asyncio.sleep(0)
        await asyncio.gather(*calls)
        await store.add(a_job("a"))  # both have closed what was open when they came
        await store.aclose()

    async def test_does_not_hold_up_the_event_loop(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on, went_on = threading.Event(), threading.Event(), []
        store = SqliteJobStore(path)
        await store.open()
        database = thread_of(store).database
        close = database.close

        def slow() -> None:
            begun.set()
            went_on.append(go_on.wait(10))
            close()

        monkeypatch.setattr(database, "close", slow)
        with busy(store):
            closing = asyncio.ensure_future(store.aclose())
            await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        go_on.set()
        await closing
        assert went_on == [True]


class TestManyCallers:
    async def test_share_a_transaction(self, path: Path) -> None:
        async with opened(path) as store:
            with Connection(store, lambda statement: None) as db:
                with busy(store):
                    calls: list[Any] = [store.add(a_job(str(number))) for number in range(10)]
                    calls += [store.get("3"), store.add(a_job("3")), store.remove("4"), store.get("4")]
                    calls += [store.save(finished(a_job("3"), result={1, 2})), store.asked_to_dismiss()]
                    tasks = [asyncio.ensure_future(call) for call in calls]
                    await asyncio.sleep(0)
                    assert queued(store) == 16
                found = await asyncio.gather(*tasks, return_exceptions=True)
            assert db.statements.count("BEGIN") == db.statements.count("COMMIT") == 1
            assert found[:11] == [None] * 10 + [a_job("3")]
            assert [type(error) for error in found[11:]] == [
                DuplicateJob,
                type(None),
                type(None),
                TypeError,
                list,
            ]
            assert ids(await store.list(**EVERYTHING)) == "9 8 7 6 5 3 2 1 0"

    async def test_who_only_read_begin_none(self, path: Path) -> None:
        async with opened(path) as store:
            with Connection(store, lambda statement: None) as db:
                assert await store.get("a") is None
                with pytest.raises(TypeError):
                    await store.add(a_job("a", result={1}))
            assert db.statements == ["SELECT"]

    async def test_one_who_is_cancelled_disturbs_no_other(self, path: Path) -> None:
        async with opened(path) as store:
            with busy(store):
                tasks = [asyncio.ensure_future(store.add(a_job(str(number)))) for number in range(5)]
                tasks.append(asyncio.ensure_future(store.add(a_job("0"))))
                await asyncio.sleep(0)
                tasks[2].cancel()
                tasks[5].cancel()
                await asyncio.sleep(0)
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in done] == [
                asyncio.CancelledError if number in (2, 5) else type(None) for number in range(6)
            ]
            assert ids(await store.list(**EVERYTHING)) == "4 3 2 1 0"

    async def test_who_come_one_after_the_other_are_not_held_up(self, path: Path) -> None:
        async def work(number: int) -> None:
            for step in range(20):
                job = a_job(f"{number}/{step}")
                await store.add(job)
                await store.save(finished(job, result=step))
                found = await store.get(job.id)
                assert found is not None
                assert found.result == step

        async with opened(path) as store:
            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(work(number))
            assert len(await store.list(**EVERYTHING)) == 400


class TestFailures:
    async def test_a_full_disk_is_the_error_of_who_meets_it(self, path: Path) -> None:
        def limit(pages: int) -> Callable[[], Any]:
            return lambda: database._single(f"PRAGMA max_page_count = {pages}")

        async with opened(path) as store:
            database = thread_of(store).database
            await store.add(large := a_job("large"))
            await thread_of(store).put(limit(20))
            with busy(store):
                calls = [
                    store.add(a_job("a")),
                    store.save(finished(large, result="x" * 200_000)),
                    store.add(a_job("a")),
                    store.add(a_job("b")),
                    store.get("b"),
                ]
                tasks: list[Any] = [asyncio.ensure_future(call) for call in calls]
                await asyncio.sleep(0)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in found] == [
                type(None),
                sqlite3.OperationalError,
                DuplicateJob,
                type(None),
                Job,
            ]
            assert "full" in str(found[1])
            assert await store.get("large") == large
            with pytest.raises(sqlite3.OperationalError, match="full"):
                await store.save(finished(large, result="x" * 200_000))
            await thread_of(store).put(limit(1000))
            await store.save(done := finished(large, result="x" * 200_000))
            assert await store.get("large") == done

    async def test_who_writes_while_another_process_does_not_stop(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_jobs_file, "_PATIENCE", 0.0)
        async with opened(path) as store:
            await store.add(a_job("a"))
            lock = sqlite3.connect(path, isolation_level=None)
            lock.execute("BEGIN IMMEDIATE")
            with busy(store):
                calls = [store.add(a_job("b")), store.get("a"), store.remove("a")]
                tasks: list[Any] = [asyncio.ensure_future(call) for call in calls]
                await asyncio.sleep(0)
            first, job, second = await asyncio.gather(*tasks, return_exceptions=True)
            assert job == a_job("a")
            for error in (first, second):
                assert isinstance(error, sqlite3.OperationalError)
                assert error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            assert first is not second
            lock.close()
            await store.add(a_job("b"))
            assert ids(await store.list(**EVERYTHING)) == "b a"

    async def test_a_commit_that_fails_is_tried_for_each_alone(self, path: Path) -> None:
        failures = iter(["COMMIT"])

        def fail(statement: str) -> None:
            if statement == "COMMIT" and next(failures, None):
                raise sqlite3.OperationalError("disk I/O error")

        async with opened(path) as store:
            with Connection(store, fail) as db:
                with busy(store):
                    calls = [store.add(a_job("a")), store.add(a_job("b"))]
                    tasks = [asyncio.ensure_future(call) for call in calls]
                    await asyncio.sleep(0)
                await asyncio.gather(*tasks)
            assert db.statements == [
                *("BEGIN", "INSERT", "INSERT", "COMMIT", "ROLLBACK"),
                *("BEGIN", "INSERT", "COMMIT"),
                *("BEGIN", "INSERT", "COMMIT"),
            ]
            assert ids(await store.list(**EVERYTHING)) == "b a"

    async def test_an_earlier_failure_is_forgotten_when_it_succeeds_alone(self, path: Path) -> None:
        inserts = 0

        def fail(statement: str) -> None:
            nonlocal inserts
            inserts += statement.startswith("INSERT")
            if inserts in (3, 4) and statement.startswith("INSERT"):
                raise sqlite3.OperationalError("disk I/O error")

        async with opened(path) as store:
            with Connection(store, fail):
                with busy(store):
                    # the second is a duplicate of the first at first; then the first fails alone
                    calls = [store.add(a_job("a")), store.add(a_job("a", 1)), store.add(a_job("b"))]
                    tasks: list[Any] = [asyncio.ensure_future(call) for call in calls]
                    await asyncio.sleep(0)
                found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in found] == [sqlite3.OperationalError, type(None), type(None)]
            assert await store.get("a") == a_job("a", 1)

    async def test_what_nobody_expects_reaches_all(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(calls: Any) -> None:
            raise SystemError("broken")

        async with opened(path) as store:
            with monkeypatch.context() as patch:
                patch.setattr(thread_of(store).database, "run", broken)
                for call in (store.add(a_job("a")), store.get("a")):
                    with pytest.raises(SystemError, match="broken"):
                        await call
            assert await store.get("a") is None

    async def test_a_damaged_page_is_the_error_of_who_reads_it(self, path: Path) -> None:
        async with opened(path) as store:
            await store.add(a_job("a"))
            with pytest.raises(sqlite3.DatabaseError):
                await thread_of(store).put(
                    lambda: thread_of(store).database._db.execute("SELECT * FROM nothing")
                )
            assert await store.get("a") == a_job("a")


# -- real processes

BEGIN = """
import asyncio, os, sys
from dataclasses import replace
from datetime import UTC, datetime
from async_pipeline.jobs import Job
from async_pipeline.jobs_sqlite import SqliteJobStore

def a_job(job_id):
    now = datetime.now(UTC)
    return Job(id=job_id, pipeline="p", created=now, updated=now)

def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())

store = SqliteJobStore(sys.argv[1])
"""


@contextmanager
def process(code: str, path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", BEGIN + code, str(path), *arguments]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment_of_children())
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        try:
            yield child
        finally:
            with suppress(BrokenPipeError):
                child.stdin.close()
            child.kill()
            child.stdout.read()


def environment_of_children() -> dict[str, str]:
    """One in which they see the same async_pipeline as this process."""
    paths = [str(Path(async_pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


WORK = """
async def work(number):
    for step in range(10**6):
        job = a_job(f"{os.getpid()}/{number}/{step}")
        await store.add(job)
        await store.save(replace(job, status="running", progress=50))
        now = datetime.now(UTC)
        await store.save(replace(job, status="successful", progress=100, finished=now, result="x" * 5000))
        say(job.id)

async def main():
    await store.open()
    for number in range(3):
        await store.add(a_job(f"{os.getpid()}/waiting/{number}"))
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(work(number))

asyncio.run(main())
"""


class TestProcesses:
    @pytest.mark.parametrize("round_number", range(5))
    async def test_that_are_killed(self, path: Path, looks_always: None, round_number: int) -> None:
        """Four at once, five times: in the middle of whatever they do."""
        async with opened(path) as one, opened(path) as other:
            for _ in range(2):
                with process(WORK, path) as first, process(WORK, path) as second:
                    done = [line_of(child) for child in (first, second) for _ in range(1 + 3 * round_number)]
                    pids = [str(child.pid) for child in (first, second)]
                    alive = await one.list(**EVERYTHING | {"status": ["accepted"]})
                    assert {job.id.split("/")[0] for job in alive} >= set(pids)
                    for child in (first, second):
                        child.kill()
                        child.wait()
                    for child in (first, second):
                        assert child.stdout is not None
                        done += child.stdout.read().split()
                await asyncio.gather(*(store.list(**EVERYTHING) for store in (one, other)))
                found = {job.id: job for job in await other.list(**EVERYTHING)}
                assert await one.list(**EVERYTHING) == list(found.values())
                assert all(found[job_id].status == "successful" for job_id in done)
                lost = [job for job in found.values() if job.status != "successful"]
                assert {job.status for job in lost} == {"failed"}
                assert all(job.error == LOST and job.finished == job.updated for job in lost)
                for pid in pids:
                    assert all(found[f"{pid}/waiting/{number}"] in lost for number in range(3))
            assert len(list(path.parent.glob("*.lock"))) == 2
            check = await thread_of(one).put(lambda: thread_of(one).database._single("PRAGMA quick_check"))
            assert check == "ok"

    async def test_that_notice_it_at_once(self, path: Path) -> None:
        watch = """
async def main():
    await store.open()
    say("ready")
    sys.stdin.readline()
    while await store.list(limit=9, offset=0, status=["accepted"], pipeline=None):
        await asyncio.sleep(0.01)
    say(repr(await store.get("a")))
    await store.aclose()

asyncio.run(main())
"""
        store = SqliteJobStore(path)
        await store.open()
        with process(watch, path) as first, process(watch, path) as second:
            await store.add(a_job("a"))
            assert [line_of(child) for child in (first, second)] == ["ready", "ready"]
            await crash(store)
            for child in (first, second):
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
            told = [line_of(child) for child in (first, second)]
            assert told[0] == told[1]
            assert repr(LOST) in told[0]
            assert [child.wait() for child in (first, second)] == [0, 0]
        assert os.listdir(path.parent) == ["jobs.db"]

    async def test_that_create_the_file_at_the_same_time(self, path: Path) -> None:
        create = """
async def main():
    say("ready")
    sys.stdin.readline()
    await store.open()
    await store.add(a_job(str(os.getpid())))
    say("added")
    sys.stdin.readline()
    await store.aclose()

asyncio.run(main())
"""
        with (
            process(create, path) as first,
            process(create, path) as second,
            process(create, path) as third,
        ):
            children = (first, second, third)
            for word in ("ready", "added"):
                assert [line_of(child) for child in children] == [word] * 3
                for child in children:
                    assert child.stdin is not None
                    child.stdin.write("\n")
                    child.stdin.flush()
            assert [child.wait() for child in children] == [0, 0, 0]
        async with opened(path) as store:
            assert {job.id for job in await store.list(**EVERYTHING)} == {
                str(child.pid) for child in children
            }
        assert os.listdir(path.parent) == ["jobs.db"]

    async def test_whose_children_live_on(self, path: Path, looks_always: None) -> None:
        fork = """
runner = asyncio.Runner()
runner.run(store.open())
runner.run(store.add(a_job("parent")))

async def child():
    store = SqliteJobStore(sys.argv[1])
    await store.open()
    await store.add(a_job("child"))
    say("child")
    sys.stdin.readline()
    await store.aclose()
    say("closed")

if os.fork() == 0:
    asyncio.run(child())
    os._exit(0)
runner.run(store.add(a_job("parent still")))
say("parent")
os.wait()
"""
        async with opened(path) as store:
            with process(fork, path) as parent:
                assert {line_of(parent), line_of(parent)} == {"parent", "child"}
                assert {job.status for job in await store.list(**EVERYTHING)} == {"accepted"}
                parent.kill()
                parent.wait()
                found = {job.id: job.status for job in await store.list(**EVERYTHING)}
                assert found == {"parent": "failed", "parent still": "failed", "child": "accepted"}
                assert parent.stdin is not None
                parent.stdin.close()
                assert line_of(parent) == "closed"
            assert {job.status for job in await store.list(**EVERYTHING)} == {"failed"}

    async def test_that_fork_while_a_thread_opens_one(self, path: Path) -> None:
        """The child would keep the lock for ever."""
        fork = """
import threading
import time
from async_pipeline import _sqlite

lock, inside, forking = _sqlite._lock, threading.Event(), threading.Event()
os.register_at_fork(before=forking.set)

def slow(file):
    inside.set()
    forking.wait()
    time.sleep(0.2)
    return lock(file)

def open_and_close():
    os.close(_sqlite.open_locked(sys.argv[1], os.O_CREAT))

_sqlite._lock = slow
thread = threading.Thread(target=open_and_close)
thread.start()
inside.wait()
if os.fork() == 0:
    sys.stdin.readline()
    os._exit(0)
thread.join()
say("held" if _sqlite.open_locked(sys.argv[1], 0) is None else "free")
"""
        with process(fork, path) as parent:
            assert line_of(parent) == "free"

    async def test_that_end_without_closing_end(self, path: Path) -> None:
        forget = """
async def main():
    await store.open()
    await store.add(a_job("a"))

asyncio.run(main())
"""
        with process(forget, path) as child:
            assert child.wait(60) == 0
        async with opened(path) as store:
            job = await store.get("a")
            assert job is not None
            assert job.error == LOST
        assert os.listdir(path.parent) == ["jobs.db"]
