"""The changes of a job as server-sent events: what they tell, and when they end."""

import asyncio
import gc
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from async_pipeline import Pipeline
from async_pipeline.errors import JobNotFound, JobRunnerClosed
from async_pipeline.integrations._events import event_id, events, server_is_stopping
from async_pipeline.integrations.fastapi import processes_router
from async_pipeline.jobs import Job, JobRunner, MemoryJobStore, report_progress
from tests.integrations.asgi import Exchange, client_of

NOON = datetime(2030, 6, 15, 12, tzinfo=UTC)
JOB = Job(id="a", pipeline="p", created=NOON, updated=NOON)


class Server:
    """What uvicorn's server is to its signal handler."""

    should_exit = False

    def __init__(self) -> None:
        self.servers: list[Any] = []

    def handle_exit(self, number: int, frame: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(
        signal,
        "getsignal",
        lambda number: server.handle_exit if number == signal.SIGINT else None,
    )
    return server


def show(job: Job) -> dict[str, Any]:
    return {"status": job.status, "progress": job.progress}


# -- whether the server is stopping


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_uvicorn_is_asked_by_its_signal_handlers(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    server = Server()
    handlers = {which: server.handle_exit}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    assert not server_is_stopping()
    server.should_exit = True
    assert server_is_stopping()


@pytest.mark.parametrize(
    ("listening", "is_stopping"),
    [
        ([], False),
        ([True], False),
        ([False, True], False),
        ([False], True),
        ([False, False], True),
        ([None], False),
    ],
)
def test_uvicorn_that_listens_no_more_is_stopping(
    monkeypatch: pytest.MonkeyPatch, listening: list[bool | None], is_stopping: bool
) -> None:
    """As at its --limit-max-requests, of which no flag tells."""
    server = Server()
    server.servers = [
        SimpleNamespace() if each is None else SimpleNamespace(is_serving=lambda each=each: each)
        for each in listening
    ]
    monkeypatch.setattr(signal, "getsignal", lambda number: server.handle_exit)
    assert server_is_stopping() is is_stopping


@pytest.mark.parametrize(
    "handler",
    [
        signal.SIG_DFL,
        None,
        lambda number, frame: None,
        SimpleNamespace(__self__=SimpleNamespace(should_exit=1)),
    ],
)
def test_another_server_is_not_stopping(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    assert not server_is_stopping()


# -- the stream alone


async def from_list(*jobs: Job | Exception, seconds: float = 0.0) -> AsyncGenerator[Job, None]:
    for job in jobs:
        await asyncio.sleep(seconds)
        if isinstance(job, Exception):
            raise job
        yield job


async def test_each_change_is_an_event() -> None:
    later = NOON + timedelta(microseconds=1)
    jobs = [JOB, replace(JOB, status="running", updated=later, progress=7)]
    assert [text async for text in events(from_list(*jobs), show)] == [
        f'id: {event_id(jobs[0])}\ndata: {{"status":"accepted","progress":0}}\n\n',
        f'id: {event_id(jobs[1])}\ndata: {{"status":"running","progress":7}}\n\n',
    ]


def test_no_two_changes_have_one_id() -> None:
    changes = [
        JOB,
        replace(JOB, updated=NOON + timedelta(microseconds=1)),
        replace(JOB, status="running"),  # at once, before the clock has moved
        replace(JOB, status="successful"),
    ]
    ids = [event_id(job) for job in changes]
    assert len(set(ids)) == 4
    assert not any("\n" in each for each in ids)


@pytest.mark.virtual
async def test_a_comment_comes_after_15_seconds_of_silence() -> None:
    clock = asyncio.get_running_loop().time
    start = clock()
    jobs = from_list(JOB, replace(JOB, status="successful"), seconds=40)
    heard = [(round(clock() - start, 1), text) async for text in events(jobs, show)]
    assert [(when, text) for when, text in heard if text.startswith(":")] == [
        (when, ": ping\n\n") for when in (15.0, 30.0, 55.0, 70.0)
    ]
    assert [when for when, text in heard if text.startswith("id:")] == [40.0, 80.0]


@pytest.mark.virtual
@pytest.mark.parametrize("error", [JobNotFound("a"), JobRunnerClosed()])
async def test_it_ends_when_the_job_was_removed_or_the_runner_left(
    error: Exception,
) -> None:
    assert len([text async for text in events(from_list(JOB, error, seconds=1), show)]) == 1


@pytest.mark.virtual
async def test_a_store_that_fails_ends_it_with_its_error() -> None:
    stream = events(from_list(JOB, OSError("disk"), seconds=1), show)
    await anext(stream)
    with pytest.raises(OSError, match="disk"):
        await anext(stream)


def complaints_of_the_loop() -> list[Any]:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, complaint: complaints.append(complaint))
    return complaints


@pytest.mark.virtual
async def test_nothing_is_complained_of_when_it_fails_after_the_client_has_left() -> None:
    complaints = complaints_of_the_loop()
    stream = aiter(events(from_list(JOB, OSError("disk")), show))
    await anext(stream)
    await asyncio.sleep(1)  # the next one has failed by now
    await stream.aclose()  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert not complaints  # "Task exception was never retrieved"


@pytest.mark.virtual
async def test_nothing_is_complained_of_when_it_fails_because_the_client_has_left() -> None:
    complaints = complaints_of_the_loop()

    async def changes() -> AsyncGenerator[Job, None]:
        yield JOB
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("disk")

    stream = aiter(events(changes(), show))
    await anext(stream)
    await asyncio.sleep(1)
    await stream.aclose()  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert not complaints  # "Task exception was never retrieved"


@pytest.mark.virtual
async def test_changes_that_nobody_takes_are_closed() -> None:
    closed = []

    async def changes() -> AsyncGenerator[Job, None]:
        try:
            yield JOB
            yield replace(JOB, status="running")
        finally:
            closed.append(True)

    source = changes()
    stream = aiter(events(source, show))
    await anext(stream)
    await asyncio.sleep(1)  # the next one is there by now
    await stream.aclose()  # type: ignore[attr-defined]
    assert closed == [True]


@pytest.mark.virtual
async def test_it_ends_soon_after_the_server_was_told_to_stop(server: Server) -> None:
    loop = asyncio.get_running_loop()
    loop.call_later(10.2, setattr, server, "should_exit", True)
    start = loop.time()
    closed: list[bool] = []
    assert len([text async for text in events(endless(closed), show)]) == 1
    assert 10.2 <= loop.time() - start <= 10.71
    assert closed == [True]


async def test_it_does_not_begin_while_the_server_is_stopping(server: Server) -> None:
    server.should_exit = True
    assert [text async for text in events(from_list(JOB), show)] == []


async def endless(closed: list[bool]) -> AsyncGenerator[Job, None]:
    try:
        yield JOB
        await asyncio.Event().wait()
    finally:
        closed.append(True)


@pytest.mark.virtual
@pytest.mark.parametrize("seconds", [0.0, 0.25, 3.0])
async def test_whoever_waits_for_it_may_be_cancelled(seconds: float) -> None:
    closed: list[bool] = []
    stream = aiter(events(endless(closed), show))
    await anext(stream)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await anext(stream)
    assert closed == [True]


@pytest.mark.virtual
async def test_cancelled_in_each_turn_of_the_loop_it_waits_for_what_it_has_begun() -> None:
    """As anyio does it, which Starlette uses to end a response."""
    ended: list[bool] = []

    async def changes() -> AsyncGenerator[Job, None]:
        try:
            yield JOB
            await asyncio.Event().wait()
        finally:
            await turns(5)
            ended.append(True)

    async def read() -> None:
        async for _ in events(changes(), show):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(1)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert ended == [True]


async def turns(number: int) -> None:
    for _ in range(number):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


# -- the route


async def work(seconds: int) -> str:
    report_progress(0.5, "half")
    await asyncio.sleep(seconds)
    return "done"


@asynccontextmanager
async def running(seconds: int = 5, **options: Any) -> AsyncIterator[tuple[FastAPI, JobRunner, Job, str]]:
    runner = JobRunner(drain=0, **options)
    app = FastAPI()
    app.include_router(processes_router({"work": Pipeline([work])}, runner=runner), prefix="/api")
    async with runner:
        job = await runner.submit(Pipeline([work], name="work"), seconds)
        yield app, runner, job, f"/api/jobs/{job.id}/events"


@pytest.mark.virtual
async def test_a_client_hears_all_until_the_job_has_ended() -> None:
    async with running() as (app, runner, job, url):
        await asyncio.sleep(1)
        async with Exchange(app, "GET", url) as exchange:
            assert await exchange.began() == 200
            assert exchange.headers["content-type"].startswith("text/event-stream")
            assert exchange.headers["cache-control"] == "no-cache"
            heard = []
            while (event := await exchange.event()) is not None:
                heard.append(event)
        states = [(data["status"], data["progress"]) for _, data in heard]
        assert states == [("running", 50), ("successful", 100)]
        async with client_of(app, lifespan=False) as client:
            assert heard[-1][1] == (await client.get(f"/api/jobs/{job.id}")).json()
        assert heard[-1][0] == event_id(await runner.get(job.id))


@pytest.mark.virtual
async def test_the_order_is_that_of_the_changes() -> None:
    async def count(n: int) -> int:
        for done in range(n):
            await asyncio.sleep(1)
            report_progress((done + 1) / n)
        return n

    runner = JobRunner(concurrency=1)
    app = FastAPI()
    app.include_router(processes_router({}, runner=runner))
    async with runner:
        await runner.submit(work, 3)
        job = await runner.submit(count, 4)
        async with Exchange(app, "GET", f"/jobs/{job.id}/events") as exchange:
            heard = []
            while (event := await exchange.event()) is not None:
                heard.append(event)
    states = [(data["status"], data["progress"]) for _, data in heard]
    assert states[0] == ("accepted", 0)
    assert states[-1] == ("successful", 100)
    assert [progress for _, progress in states] == sorted(progress for _, progress in states)
    assert {progress for _, progress in states} >= {0, 25, 50, 75, 100}
    assert len({each for each, _ in heard}) == len(heard)


@pytest.mark.virtual
async def test_who_has_heard_the_end_is_told_not_to_come_again() -> None:
    async with running() as (app, runner, job, url):
        await asyncio.sleep(10)
        end = event_id(await runner.get(job.id))
        async with client_of(app, lifespan=False) as client:
            again = await client.get(url, headers={"Last-Event-ID": end})
            assert (again.status_code, again.content) == (204, b"")
            for other in (event_id(job), "x", ""):
                response = await client.get(url, headers={"Last-Event-ID": other})
                assert response.status_code == 200
                assert response.text.count("data: ") == 1
                assert f"id: {end}\n" in response.text
            assert (await client.get(url)).text.count("data: ") == 1


@pytest.mark.virtual
async def test_who_comes_again_before_the_end_hears_it() -> None:
    async with running() as (app, runner, job, url):
        await asyncio.sleep(1)
        now = event_id(await runner.get(job.id))
        async with Exchange(app, "GET", url, headers={"Last-Event-ID": now}) as exchange:
            assert await exchange.began() == 200
            heard = []
            while (event := await exchange.event()) is not None:
                heard.append(event[1]["status"])
        assert heard[-1] == "successful"


async def test_there_are_none_of_an_unknown_job() -> None:
    async with running() as (app, _, _, _), client_of(app, lifespan=False) as client:
        response = await client.get("/api/jobs/nobody/events")
    assert response.status_code == 404
    assert response.json()["type"].endswith("/no-such-job")


@pytest.mark.virtual
async def test_a_client_may_leave() -> None:
    async with (
        running(1000) as (app, runner, job, url),
        Exchange(app, "GET", url) as exchange,
    ):
        assert await exchange.event() is not None
        await asyncio.sleep(20)
        exchange.leave()
        await exchange.task
        alone = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert len(alone) == 1  # the job
        assert (await runner.get(job.id)).status == "running"


@pytest.mark.virtual
async def test_it_ends_for_a_client_that_stays_when_the_server_is_stopping(
    server: Server,
) -> None:
    async with running(1000) as (app, _, _, url), Exchange(app, "GET", url) as exchange:
        assert await exchange.event() is not None
        await asyncio.sleep(3)
        server.should_exit = True
        await exchange.task
        assert await exchange.event() is None


@pytest.mark.virtual
async def test_a_job_that_is_dismissed_or_fails_or_is_cut_short_ends_it() -> None:
    def ends(status: str) -> Callable[[Exchange], Awaitable[None]]:
        async def check(exchange: Exchange) -> None:
            heard = []
            while (event := await exchange.event()) is not None:
                heard.append(event[1])
            assert heard[-1]["status"] == status
            assert "SECRET" not in str(heard)

        return check

    async def fail(n: int) -> None:
        await asyncio.sleep(1)
        raise ValueError("SECRET") from KeyError("SECRET")

    async with running(1000) as (app, runner, job, url):
        failing = await runner.submit(fail, 1)
        async with (
            Exchange(app, "GET", url) as first,
            Exchange(app, "GET", f"/api/jobs/{failing.id}/events") as second,
        ):
            await ends("failed")(second)
            await runner.dismiss(job.id)
            await ends("dismissed")(first)
        cut = await runner.submit(work, 1000)
        third = Exchange(app, "GET", f"/api/jobs/{cut.id}/events")
        await third.__aenter__()
        await third.began()
    await ends("failed")(third)
    await third.__aexit__(None, None, None)


@pytest.mark.virtual
async def test_a_job_that_is_removed_meanwhile_ends_it() -> None:
    """One of another process, at which the runner looks now and then."""

    class Shared(MemoryJobStore):
        is_shared = True

    store = Shared()
    async with running(store=store) as (app, _, _, _):
        await store.add(replace(JOB, id="foreign", status="running"))
        async with Exchange(app, "GET", "/api/jobs/foreign/events") as exchange:
            assert await exchange.event() is not None
            await store.remove("foreign")
            assert await exchange.event() is None
