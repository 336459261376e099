"""Pipelines and jobs behind a real uvicorn: clients that go, signals, several workers, failures.

The servers are processes of their own: the example, by its one command, or ``uvicorn_app.py``, which is the
example with a few endpoints that tell what happens inside.
"""

import asyncio
import json
import os
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from async_pipeline import Pipeline
from async_pipeline.integrations._events import server_is_stopping
from async_pipeline.integrations.fastapi import processes_router
from async_pipeline.jobs import Job, JobFailure, JobRunner
from async_pipeline.jobs_sqlite import SqliteJobStore
from tests.integrations.uvicorn_server import EXAMPLE, Client, Server, events, send, wait_for

APP = Path(__file__).with_name("uvicorn_app.py")
DRAIN = 3.0  # seconds, of the example
BUSY = 20.0  # seconds that may come on top where many tests run side by side; what hangs takes a minute
SECRET = "hunter2-is-my-password"  # in every exception of uvicorn_app.py

pytestmark = [
    pytest.mark.threads,
    pytest.mark.skipif(sys.platform == "win32", reason="has other signals"),
]


def tell(what: str, seconds: list[float]) -> None:
    """Print what was measured; pytest shows it by -s, or of a test that has failed."""
    figures = f"p50 {median(seconds) * 1000:.1f} ms, max {max(seconds) * 1000:.1f} ms"
    print(f"-- {what}: {figures} of {len(seconds)}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that leave it as it was."""
    with Server(APP, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client whose answers must not tell any exception's text."""
    client = Client(server.client.port)
    yield client
    for answer in client.answers:
        assert SECRET.encode() not in answer.body
        assert b"Traceback" not in answer.body
        assert SECRET not in repr(answer.headers)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def tasks(client: Client) -> Any:
    """The tasks of the server, without those of connections that are closing."""
    return client("GET", "/inside").json["tasks"]


def logged(client: Client, message: str) -> list[float]:
    """When the example has logged this."""
    return [moment for said, moment in client("GET", "/inside").json["logged"] if said == message]


def get(connection: HTTPConnection, path: str) -> None:
    send(connection, "GET", path)


# -- clients that go


def leave(connection: HTTPConnection, *, politely: bool) -> float:
    """Close a connection, by a FIN or by an RST, and return when that was."""
    sock = connection.sock
    if not politely:
        sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    moment = time.monotonic()
    connection.close()
    return moment


def settle(client: Client, least: int) -> None:
    """Wait until the server has as many tasks, and a little more: they are at work then, and watched."""
    wait_for(lambda: len(tasks(client)) >= least)
    time.sleep(0.3)
    tasks(client)  # when this is answered, so is all that was due before


def check_disconnects(client: Client) -> None:
    before = tasks(client)
    cancelled = len(logged(client, "render was cancelled"))
    with ExitStack() as stack:
        connections = [stack.enter_context(client.connection()) for _ in range(50)]
        for connection in connections:
            get(connection, "/report/elephants")
        settle(client, len(before) + 50)
        left = []
        for number, connection in enumerate(connections):
            left.append(leave(connection, politely=number % 2 == 0))
            time.sleep(0.01)

    def seen() -> list[float] | None:
        found = logged(client, "render was cancelled")[cancelled:]
        return found if len(found) >= 50 else None

    seconds = [seen - left for left, seen in zip(left, wait_for(seen), strict=True)]
    assert wait_for(lambda: tasks(client) == before)
    tell("from the client's leaving to the stage's CancelledError", seconds)
    assert max(seconds) < 8  # of ten that the stage would have taken


def test_each_client_that_goes_cancels_its_run(client: Client) -> None:
    check_disconnects(client)


def test_the_same_by_the_standard_librarys_loop_and_another_http(log: Path) -> None:
    with Server(APP, log, "--loop", "asyncio", "--http", "h11") as server:
        check_disconnects(server.client)


def test_a_client_that_goes_while_it_waits_for_an_execution(client: Client) -> None:
    before = tasks(client)
    cancelled = len(logged(client, "count_down was cancelled"))
    with client.connection() as connection:
        send(connection, "POST", "/api/processes/count-down/execution", {"inputs": {"seconds": 8}})
        settle(client, len(before) + 1)
        left = leave(connection, politely=True)
    [seen] = wait_for(lambda: logged(client, "count_down was cancelled")[cancelled:])
    tell("an execution whose client goes", [seen - left])
    assert wait_for(lambda: tasks(client) == before)
    assert client("GET", "/api/jobs?processID=count-down&status=running").json["jobs"] == []


@pytest.mark.parametrize("reads", [True, False], ids=["that reads", "that does not read"])
def test_a_client_that_goes_ends_its_stream(client: Client, reads: bool) -> None:
    before = tasks(client)
    with client.connection() as connection:
        get(connection, "/reports" if reads else "/large")
        if reads:
            response = connection.getresponse()
            assert [response.readline() for _ in range(3)] == [
                b"[en] all about %d\n" % number for number in range(3)
            ]
        settle(client, len(before) + 1)
        leave(connection, politely=False)
    assert wait_for(lambda: tasks(client) == before)


def test_a_client_that_goes_ends_its_event_stream_and_not_the_job(client: Client) -> None:
    job = client.submit("count-down", seconds=60)
    before = tasks(client)
    with client.connection() as connection:
        get(connection, f"{job}/events")
        assert next(events(connection.getresponse()))["status"] in ("accepted", "running")
        settle(client, len(before) + 1)
        leave(connection, politely=True)
    assert wait_for(lambda: tasks(client) == before)
    assert client("GET", job).json["status"] == "running"
    assert client("DELETE", job).json["status"] == "dismissed"


# -- many at once


def test_executions_do_not_wait_for_each_other_nor_others_for_them(client: Client) -> None:
    def execute(_: int) -> float:
        start = time.monotonic()
        answer = client("POST", "/api/processes/count-down/execution", {"inputs": {"seconds": 2}})
        assert (answer.status, answer.json) == (200, "done")
        return time.monotonic() - start

    def ask() -> float:
        start = time.monotonic()
        assert client("GET", "/api/processes").status == 200
        return time.monotonic() - start

    with ThreadPoolExecutor(50) as threads:
        start = time.monotonic()
        running = [threads.submit(execute, number) for number in range(50)]
        asked = []
        while not all(execution.done() for execution in running):
            asked.append(ask())
            time.sleep(0.02)
        total = time.monotonic() - start
    assert len([execution.result() for execution in running]) == 50
    tell("50 executions of 2 s each", [execution.result() for execution in running])
    tell("another GET meanwhile", asked)
    print(f"-- all 50 after {total:.2f} s")
    assert len(asked) >= 10  # one after the other, while 50 ran
    assert total < BUSY  # in a row: 100 s


def test_a_running_job_is_dismissed_at_once(client: Client) -> None:
    cancelled = len(logged(client, "count_down was cancelled"))
    seconds = []
    for _ in range(20):
        job = client.submit("count-down", seconds=60)
        client.job(job, until="running")
        start = time.monotonic()
        answer = client("DELETE", job)
        seconds.append(time.monotonic() - start)
        assert (answer.status, answer.json["status"]) == (200, "dismissed")
        assert client("GET", f"{job}/results").status == 410
        assert client("DELETE", job).status == 200  # removed
        assert client("GET", job).status == 404
    # the answer comes when the stage has seen it
    assert len(logged(client, "count_down was cancelled")) == cancelled + 20
    tell("DELETE of a running job", seconds)
    assert max(seconds) < BUSY


def test_every_event_of_a_job(client: Client) -> None:
    job = client.submit("count-down", seconds=1)
    with client.connection() as connection:
        get(connection, f"{job}/events")
        seen = list(events(connection.getresponse()))
    assert seen[-1]["status"] == "successful"
    assert [status["status"] for status in seen[:-1]] in (
        ["running"] * (len(seen) - 1),
        ["accepted", *["running"] * (len(seen) - 2)],
    )
    progress = [status["progress"] for status in seen]
    assert progress == sorted(progress)
    assert len(set(progress)) >= 3
    assert client("GET", f"{job}/results").json == "done"


def test_more_jobs_than_there_is_room_for() -> None:
    """All that clients were promised end, and of the rest they are told; in this process, without sockets."""
    ran, refused, kept = asyncio.run(submit_two_thousand())
    assert ran == Counter(map(str, range(2_000)))  # each once
    assert refused > 0
    assert Counter(job.status for job in kept) == {"successful": 100}


async def submit_two_thousand() -> tuple[Counter[str], int, list[Job]]:
    ran = Counter[str]()
    refused = 0

    async def note(number: int) -> int:
        await asyncio.sleep(0.001)
        ran[str(number)] += 1
        return number

    jobs = JobRunner(concurrency=50, max_pending=30, keep=100)
    app = FastAPI()
    app.include_router(processes_router({"note": Pipeline([note])}, runner=jobs))

    async def client(numbers: range) -> None:
        nonlocal refused
        for number in numbers:
            while (answer := await call(app, {"inputs": {"number": number}})) == 503:
                refused += 1
                await asyncio.sleep(0.02)
            assert answer == 201

    async with jobs:
        await asyncio.gather(*(client(range(first, first + 20)) for first in range(0, 2_000, 20)))
        for job in await jobs.list(status={"accepted", "running"}):
            async for _ in jobs.watch(job.id):
                pass
        return ran, refused, await jobs.list(limit=10_000)


async def call(app: FastAPI, body: Any) -> int:
    """Execute the process as a job, and return the status of the answer."""
    path = "/processes/note/execution"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"prefer", b"respond-async"), (b"host", b"test")],
    }
    status = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope, receive, send)
    return status


# -- what fails


@pytest.mark.parametrize(
    ("process", "status", "detail"),
    [
        ("fail", 500, "stage 'fail' failed with RuntimeError"),
        ("check", 400, "the request can't be executed as it is"),
        ("give", 500, "the run failed with "),
        ("time-out", 500, "stage 'time_out' failed with TimeoutError"),
        ("cancel", 500, "the run failed with CancelledError"),
    ],
)
def test_nobody_is_told_the_text_of_an_exception(
    client: Client, server: Server, process: str, status: int, detail: str
) -> None:
    path = f"/failures/processes/{process}/execution"
    answer = client("POST", path, {"inputs": {"text": "x"}})
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json["detail"].startswith(detail)
    accepted = client("POST", path, {"inputs": {"text": "x"}}, prefer="respond-async")
    if status == 400:
        assert accepted.json == answer.json
        assert answer.json["errors"] == [{"pointer": "/inputs/text", "detail": "is not valid"}]
        return
    job = f"/failures/jobs/{accepted.json['jobID']}"
    with client.connection() as connection:
        get(connection, f"{job}/events")
        *_, last = events(connection.getresponse())
    assert SECRET not in str(last)
    assert last["status"] == "failed"
    assert last["message"].startswith(detail)
    assert client.job(job, until="failed").json["message"].startswith(detail)
    assert client("GET", f"{job}/results").json["detail"].startswith(detail)
    assert SECRET in server.log


def test_nobody_is_told_it_in_lists_and_pages(client: Client) -> None:
    jobs = client("GET", "/failures/jobs?status=failed").json["jobs"]
    assert jobs
    page = client("GET", "/failures/", accept="text/html")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert jobs[0]["jobID"].encode() in page.body


def test_background_tasks_run_in_a_row_and_the_first_failure_drops_the_rest(
    client: Client, server: Server
) -> None:
    """Why the example submits jobs from its handlers."""

    def noted(count: int) -> list[str] | None:
        found = client("GET", "/noted").json
        return found if len(found) >= count else None

    assert client("POST", "/background").status == 200
    in_a_row = ["first begins", "first ends", "second begins", "second ends", "fails begins", "fails ends"]
    assert wait_for(lambda: noted(6)) == in_a_row
    wait_for(lambda: "Exception in ASGI application" in server.log)
    assert noted(0) == in_a_row  # "never" did not

    jobs = client("POST", "/jobs").json
    ended = [client.job(f"/api/jobs/{job}", until="successful failed").json["status"] for job in jobs]
    assert ended == ["successful", "successful", "failed", "successful"]
    at_once = client("GET", "/noted").json
    assert at_once[:4] == ["first begins", "second begins", "fails begins", "last begins"]
    assert sorted(at_once[4:]) == ["fails ends", "first ends", "last ends", "second ends"]


def test_the_examples_replacement_of_background_tasks(client: Client) -> None:
    links = client("POST", "/signup", {"address": "nowhere"}).json
    assert client.job(links["visit"], until="successful").json["progress"] == 100
    failed = client.job(links["mail"], until="failed").json
    assert failed["message"] == "stage 'send_mail' failed with ValueError"
    assert client("GET", f"{links['visit']}/results").json == "noted"


# -- signals


class Events(threading.Thread):
    """Reads the events of a job until the server ends them."""

    def __init__(self, client: Client, job: str) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._path = f"{job}/events"
        self._error: BaseException | None = None
        self._ended = 0.0
        self.seen: list[Any] = []
        self.start()
        wait_for(lambda: self.seen)

    def run(self) -> None:
        try:
            with self._client.connection() as connection:
                get(connection, self._path)
                for event in events(connection.getresponse()):
                    self.seen.append(event)
        except BaseException as error:
            self._error = error
        self._ended = time.monotonic()

    def end(self) -> float:
        """Wait until the stream has ended, as it should and not by a broken connection."""
        self.join(60)
        assert not self.is_alive()
        assert self._error is None, self._error
        return self._ended


@pytest.mark.parametrize(
    ("number", "workers", "group"),
    [
        (signal.SIGTERM, "1", False),
        (signal.SIGINT, "1", False),
        (signal.SIGTERM, "2", False),
        (signal.SIGINT, "2", True),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM of two workers", "Ctrl+C of two workers"],
)
def test_a_signal_ends_streams_and_drains_jobs(
    tmp_path: Path, number: int, workers: str, group: bool
) -> None:
    database = str(tmp_path / "jobs.db")
    with Server(EXAMPLE, tmp_path / "log", "--workers", workers, JOBS_DB=database) as server:
        client = server.client
        wait_for(lambda: server.log.count("Application startup complete") == int(workers))
        long, short = client.submit("count-down", seconds=60), client.submit("count-down", seconds=2)
        streams = [Events(client, job) for job in (long, long, long, short, short)]
        start = time.monotonic()
        code, seconds = server.end(number, group=group)
        ended = [stream.end() - start for stream in streams]
        tell("streams that the server ends", ended)
        print(f"-- the server ended after {seconds:.2f} s with {code}, {DRAIN} of them for the drain")
        assert code in (0, -number)
        assert max(ended) < seconds - DRAIN + 1  # the drain comes after them
        assert DRAIN <= seconds < DRAIN + BUSY
        assert server.log.count("count_down was cancelled") == 1
        assert [stream.seen[-1]["status"] for stream in streams[:3]] == ["running"] * 3

    drained, cut = asyncio.run(read_jobs(database, short, long))
    assert (drained.status, drained.progress) == ("successful", 100)
    assert drained.result == {"outputs": {"result": "done"}, "response": "raw"}
    assert (cut.status, cut.error) == ("failed", JobFailure("JobRunnerClosed", cut.error.message))
    assert 0 < cut.progress < 100
    assert [path.name for path in tmp_path.iterdir() if "jobs" in path.name] == ["jobs.db"]


async def read_jobs(database: str, *paths: str) -> list[Any]:
    store = SqliteJobStore(database)
    await store.open()
    try:
        return [await store.get(path.removeprefix("/api/jobs/")) for path in paths]
    finally:
        await store.aclose()


def test_finished_jobs_survive_a_restart(tmp_path: Path) -> None:
    database = str(tmp_path / "jobs.db")
    with Server(EXAMPLE, tmp_path / "log", JOBS_DB=database) as server:
        client = server.client
        job = client.submit("count-words", text="one two two")
        before = client.job(job, until="successful").json
        dismissed = client.submit("count-down", seconds=60)
        client("DELETE", dismissed)
        failed = client("POST", "/signup", {"address": "nowhere"}).json["mail"]
        client.job(failed, until="failed")
        killed = client.submit("count-down", seconds=60)
        client.job(killed, until="running")
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    with Server(EXAMPLE, tmp_path / "log2", JOBS_DB=database) as server:
        client = server.client
        after = client("GET", job).json
        assert {**after, "links": None} == {**before, "links": None}
        assert client("GET", f"{job}/results").json == {"one": 1, "two": 2}
        assert client("GET", f"{dismissed}/results").status == 410
        assert client("GET", failed).json["message"] == "stage 'send_mail' failed with ValueError"
        assert client("GET", killed).json["message"] == "the run failed with WorkerLost"
        listed = client("GET", "/api/jobs").json["jobs"]
        assert Counter(job["status"] for job in listed) == {"failed": 2, "successful": 2, "dismissed": 1}


def test_streams_end_when_the_server_has_had_its_requests(log: Path) -> None:
    """Which ends it without a signal."""
    with Server(APP, log, "--limit-max-requests", "10") as server:
        client = server.client
        stream = Events(client, client.submit("count-down", seconds=60))
        for _ in range(8):
            try:
                client("GET", "/api/conformance")
            except ConnectionError:
                break
        start = time.monotonic()
        wait_for(server.has_ended, DRAIN + BUSY)
        print(f"-- the server ended after {time.monotonic() - start:.2f} s")
        stream.end()
        assert "Application shutdown complete" in server.log


async def test_a_server_that_no_longer_listens_is_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a server, on every loop."""
    listening = [await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) for _ in range(2)]
    server = SimpleNamespace(should_exit=False, servers=[])
    monkeypatch.setattr(signal, "getsignal", lambda number: SimpleNamespace(__self__=server))
    assert not server_is_stopping()  # it has not begun
    server.servers = [*listening]
    assert not server_is_stopping()
    listening[0].close()
    assert not server_is_stopping()
    listening[1].close()
    assert server_is_stopping()
    server.servers.append(object())  # who knows what that does
    assert not server_is_stopping()


# -- several workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two that share a store."""
    folder = tmp_path_factory.mktemp("workers")
    with Server(APP, folder / "log", "--workers", "2", JOBS_DB=str(folder / "jobs.db")) as server:
        wait_for(lambda: server.log.count("Application startup complete") == 2)
        yield server


@contextmanager
def connection_to(client: Client, worker: int, *, other: bool = False) -> Iterator[HTTPConnection]:
    """A connection to this worker, or to the other one."""

    def try_it() -> HTTPConnection | None:
        connection = stack.enter_context(client.connection())
        is_it = client.ask(connection, "GET", "/api/conformance").worker == worker
        return connection if is_it != other else None

    with ExitStack() as stack:
        yield wait_for(try_it)


def owned_job(client: Client, seconds: float) -> tuple[str, int]:
    """A job, and the worker that runs it."""
    body = {"inputs": {"seconds": seconds}}
    answer = client("POST", "/api/processes/count-down/execution", body, prefer="respond-async")
    return f"/api/jobs/{answer.json['jobID']}", answer.worker


def test_each_worker_answers_for_every_job(workers: Server) -> None:
    client = workers.client
    jobs = [owned_job(client, 3) for _ in range(20)]
    polls = []
    for number in range(100):
        start = time.monotonic()
        answer = client("GET", jobs[number % 20][0])  # by a connection of its own
        polls.append((answer.status, answer.worker, time.monotonic() - start))
        assert answer.json["status"] in ("accepted", "running", "successful")
    tell("a status poll", [seconds for _, _, seconds in polls])
    assert [status for status, _, _ in polls] == [200] * 100
    answered = Counter(worker for _, worker, _ in polls)
    print(f"-- polls by worker: {dict(answered)}; jobs: {dict(Counter(worker for _, worker in jobs))}")
    job, owner = jobs[0]
    with connection_to(client, owner, other=True) as connection:  # the system may give all polls to one
        assert client.ask(connection, "GET", job).status == 200
    for job, owner in jobs:
        assert client.job(job, until="successful").json["progress"] == 100
        for other in (False, True):
            with connection_to(client, owner, other=other) as connection:
                assert client.ask(connection, "GET", f"{job}/results").json == "done"


def test_a_job_of_the_other_worker_is_dismissed(workers: Server) -> None:
    client = workers.client
    job, owner = owned_job(client, 60)
    with connection_to(client, owner) as here, connection_to(client, owner, other=True) as there:
        before = len([said for said, _ in client.ask(here, "GET", "/inside").json["logged"]])
        start = time.monotonic()
        answer = client.ask(there, "DELETE", job)
        tell("DELETE of a job of another worker", [time.monotonic() - start])
        assert (answer.status, answer.json["status"]) == (200, "dismissed")
        logged = [said for said, _ in client.ask(here, "GET", "/inside").json["logged"]][before:]
        assert logged == ["count_down was cancelled"]
        assert client.ask(here, "GET", job).json["status"] == "dismissed"


def test_the_events_of_a_job_of_the_other_worker(workers: Server) -> None:
    client = workers.client
    job, owner = owned_job(client, 2)
    with connection_to(client, owner, other=True) as there:
        get(there, f"{job}/events")
        seen = list(events(there.getresponse()))
    assert seen[-1]["status"] == "successful"
    progress = [status["progress"] for status in seen]
    assert progress == sorted(progress)
    assert len(set(progress)) >= 3


def test_a_killed_workers_job_has_failed(workers: Server) -> None:
    client = workers.client
    job, owner = owned_job(client, 60)
    ended, _ = owned_job(client, 0)
    client.job(ended, until="successful")
    with connection_to(client, owner, other=True) as there:
        answer = client.ask(there, "GET", job)
        assert answer.json["status"] in ("accepted", "running")
        last_worker = answer.worker
        get(there, f"{job}/events")
        stream = events(there.getresponse())
        assert next(stream)["status"] in ("accepted", "running")
        os.kill(owner, signal.SIGKILL)
        start = time.monotonic()
        last = list(stream)[-1]
        tell("from a worker's death to the event", [time.monotonic() - start])
    assert (last["status"], last["message"]) == ("failed", "the run failed with WorkerLost")
    answer = client("GET", f"{job}/results")
    assert (answer.status, answer.json["detail"]) == (500, "the run failed with WorkerLost")
    assert client("GET", f"{ended}/results").json == "done"
    wait_for(lambda: workers.log.count("Application startup complete") == 3)  # uvicorn has started another
    with connection_to(client, last_worker, other=True) as there:
        assert client.ask(there, "GET", f"{ended}/results").json == "done"
