"""The example of background work, behind a real uvicorn, with a mail server and a service that misbehave.

And its page: what it shows is the example's own code, what it counts is counted here, and what it says that
``BackgroundTasks`` do, they do.
"""

import asyncio
import functools
import inspect
import logging
import re
import select
import signal
import smtplib
import socketserver
import sqlite3
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi import __version__ as fastapi_version
from fastapi.concurrency import run_in_threadpool

from examples import background_work as example
from tests.integrations.uvicorn_server import ROOT, Client, Server, events, send, wait_for

EXAMPLE = ROOT / "examples" / "background_work.py"
PAGE = ROOT / "docs" / "background-work.md"

pytestmark = [
    pytest.mark.threads,
    pytest.mark.skipif(sys.platform == "win32", reason="has other signals"),
]

# -- the servers that it needs


class MailServer(socketserver.ThreadingTCPServer):
    """Talks SMTP and keeps the mail.

    It refuses ``nobody@`` for good, ``busy@`` twice for now, and of ``full@`` what it has sent first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MailConversation)
        self.asked = Counter[str]()
        self.mail: list[tuple[str, Any]] = []


class MailConversation(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self.say("220 ready")
        while line := self.rfile.readline().decode().strip():
            command = line.split()[0].upper()
            if command == "RCPT":
                self.to = re.findall("<(.*)>", line)[0]
                self.server.asked[self.to] += 1
                self.say(self.opinion())
            elif command == "DATA":
                self.take()
            elif command == "QUIT":
                return self.say("221 bye")
            else:
                self.say("250 fine")
        return None

    def opinion(self) -> str:
        name, times = self.to.partition("@")[0], self.server.asked[self.to]
        if name == "nobody":
            return "550 there is none"
        return "451 try again later" if name == "busy" and times <= 2 else "250 fine"

    def take(self) -> None:
        self.say("354 go ahead")
        lines = list(iter(self.rfile.readline, b".\r\n"))
        if self.to.startswith("full@") and self.server.asked[self.to] == 1:
            return self.say("452 no room now")
        self.server.mail.append((self.to, message_from_bytes(b"".join(lines))))
        return self.say("250 taken")

    def say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


class WeatherServer(ThreadingHTTPServer):
    """Answers ``/weather?city=Oslo``.

    A city whose name begins with ``flaky`` fails the first time, ``late`` is answered without an end the
    first time, ``held`` only after :meth:`release`, and ``nowhere`` is not known.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WeatherAnswer)
        self.asked = Counter[str]()
        self.left = Counter[str]()  # how often a client did not wait for the answer
        self._released: defaultdict[str, threading.Event] = defaultdict(threading.Event)

    def release(self, city: str) -> None:
        self._released[city].set()

    def is_released(self, city: str) -> bool:
        return self._released[city].wait(0.02)


class WeatherAnswer(BaseHTTPRequestHandler):
    server: WeatherServer

    def do_GET(self) -> None:
        city = parse_qs(urlsplit(self.path).query)["city"][0]
        self.server.asked[city] += 1
        is_first = self.server.asked[city] == 1
        if city.startswith("held") or (city.startswith("late") and is_first):
            while not self.server.is_released(city):
                if select.select([self.connection], [], [], 0)[0]:
                    self.server.left[city] += 1
                    return
                if city.startswith("late"):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n" if is_first else b"x-wait: a little\r\n")
                    is_first = False
        if city == "nowhere":
            self.send_error(404)
        elif city.startswith("flaky") and is_first:
            self.send_error(503)
        else:
            body = b'{"city": "%s", "degrees": 4}' % city.encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def served(server: Any) -> Iterator[Any]:
    with server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def mail() -> Iterator[MailServer]:
    with served(MailServer()) as server:
        yield server


@pytest.fixture(scope="module")
def weather() -> Iterator[WeatherServer]:
    with served(WeatherServer()) as server:
        yield server


def start(folder: Path, log: str, mail: MailServer, weather: WeatherServer) -> Server:
    mail_host, mail_port = mail.server_address[:2]
    host, port = weather.server_address[:2]
    return Server(
        EXAMPLE,
        folder / log,
        DATA=str(folder),
        MAIL_SERVER=f"{mail_host!s}:{mail_port}",
        WEATHER_URL=f"http://{host!s}:{port}",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(data: Path, mail: MailServer, weather: WeatherServer) -> Iterator[Server]:
    """One for all tests that leave it running."""
    with start(data, "log", mail, weather) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Client:
    return server.client


def ended(client: Client, path: str, status: str = "successful") -> Any:
    return client.job(path, until=status).json


def result(client: Client, path: str) -> Any:
    ended(client, path)
    return client("GET", f"{path}/results").json


def failure(client: Client, path: str) -> Any:
    """What ``/failures`` says of a job, when it has failed."""
    ended(client, path, "failed")
    found = client("GET", "/failures").json
    assert {job["status"] for job in found} == {"failed"}
    return next(job["error"] for job in found if path.endswith(job["id"]))


def rows(folder: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(folder / "shop.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


# -- an e-mail, and a line in a file


@pytest.mark.parametrize(("name", "times"), [("ada", 1), ("busy", 3), ("full", 2)])
def test_a_mail_is_sent_again_when_the_server_says_so(
    client: Client, mail: MailServer, name: str, times: int
) -> None:
    address = f"{name}@example.org"
    answer = client("POST", "/signup", {"address": address, "name": "Ada"})
    assert answer.status == 202
    assert result(client, answer.json["mail"]) == f"sent to {address}"
    assert mail.asked[address] == times
    [message] = [message for to, message in mail.mail if to == address]
    assert (message["To"], message["Subject"]) == (address, "Welcome")
    assert message.get_payload().strip() == "Hello Ada!"


def test_a_mail_that_is_refused_is_not_sent_again_and_drops_nothing_else(
    client: Client, mail: MailServer, data: Path
) -> None:
    for name in ("eve", "nobody"):
        links = client("POST", "/signup", {"address": f"{name}@example.org", "name": "Bob"}).json
        ended(client, links["line"])
    lines = (data / "log.txt").read_text().splitlines()
    assert lines[-2:] == ["eve@example.org has signed up", "nobody@example.org has signed up"]
    error = failure(client, links["mail"])
    assert (error["type"], error["stage"], error["attempts"]) == ("SMTPRecipientsRefused", "send_mail", 1)
    assert "there is none" in error["message"]
    assert mail.asked["nobody@example.org"] == 1


@pytest.mark.parametrize("address", ["nowhere", "a@b\nBcc: c@d", "a b@c"])
def test_no_mail_to_what_is_no_address(client: Client, address: str) -> None:
    assert client("POST", "/signup", {"address": address, "name": "Bob"}).status == 422


def test_which_errors_of_a_mail_server_are_temporary() -> None:
    refused = {"a@b": (451, b""), "c@d": (550, b"")}
    assert example.is_temporary(smtplib.SMTPServerDisconnected())
    assert example.is_temporary(ConnectionRefusedError())
    assert example.is_temporary(smtplib.SMTPConnectError(421, "busy"))
    assert not example.is_temporary(smtplib.SMTPDataError(554, "no"))
    assert not example.is_temporary(smtplib.SMTPRecipientsRefused(refused))
    assert not example.is_temporary(ValueError())


# -- a CSV file


def post_csv(client: Client, content: bytes) -> str:
    with client.connection() as connection:
        connection.request("POST", "/contacts", content, {"content-type": "text/csv"})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 202, body
    return body.decode().strip('"')


def test_a_csv_file_with_rows_that_are_rejected(client: Client, data: Path) -> None:
    content = '\ufeffname,address\n"Ada\nLovelace",ada@b\nBob,nowhere\n,c@d\nEve,e@f,more\nDan\n'
    assert result(client, post_csv(client, content.encode())) == {
        "added": 2,
        "rejected": [
            {"line": 4, "row": {"name": "Bob", "address": "nowhere"}, "errors": 1},
            {"line": 5, "row": {"name": "", "address": "c@d"}, "errors": 1},
            {"line": 7, "row": {"name": "Dan", "address": None}, "errors": 1},
        ],
    }
    query = "SELECT * FROM contacts ORDER BY address"
    assert rows(data, query) == [("ada@b", "Ada\nLovelace"), ("e@f", "Eve")]
    again = result(client, post_csv(client, b"address,name\re@f,Eva\r"))
    assert again == {"added": 1, "rejected": []}
    assert rows(data, query) == [("ada@b", "Ada\nLovelace"), ("e@f", "Eva")]


def test_a_file_that_is_none(client: Client) -> None:
    error = failure(client, post_csv(client, b"name,address\n\xff,a@b\n"))
    assert (error["type"], error["attempts"]) == ("UnicodeDecodeError", 1)


# -- a record of each request


def test_a_request_that_fails_is_recorded_too(client: Client, data: Path) -> None:
    assert client("POST", "/orders/cup").json == "cup is on its way"
    assert client("POST", "/orders/unicorn").status == 409
    found = [("POST", "/orders/cup", "done"), ("POST", "/orders/unicorn", "failed")]
    assert wait_for(lambda: sorted(rows(data, "SELECT * FROM requests")) == found)


# -- another service


@pytest.mark.parametrize(("city", "times"), [("Rome", 1), ("flaky Lima", 2), ("late Accra", 2)])
def test_another_service_is_asked_again(
    client: Client, weather: WeatherServer, city: str, times: int
) -> None:
    job = client("POST", f"/weather/{city.replace(' ', '%20')}").json
    assert result(client, job) == {"city": city, "degrees": 4}
    assert weather.asked[city] == times


def test_what_it_does_not_know_is_not_asked_again(client: Client, weather: WeatherServer) -> None:
    job = client("POST", "/weather/nowhere").json
    assert ended(client, job, "failed")["message"] == "stage 'fetch' failed with HTTPStatusError"
    error = failure(client, job)
    assert (error["type"], error["attempts"], weather.asked["nowhere"]) == ("HTTPStatusError", 1, 1)
    assert "404" in error["message"]  # which clients are not told


# -- progress


def put(client: Client, job_id: str, *cities: str) -> str:
    answer = client("PUT", f"/forecasts/{job_id}", list(cities))
    assert (answer.status, answer.json) == (202, f"/api/jobs/{job_id}")
    return f"/api/jobs/{job_id}"


def test_progress_of_a_job_that_is_put_twice(client: Client, weather: WeatherServer) -> None:
    cities = ["held A", "held B", "held C", "held D"]
    job = put(client, "trip-1", *cities)
    created = client("GET", job).json["created"]
    assert put(client, "trip-1", *cities) == job
    with client.connection() as connection:
        send(connection, "GET", f"{job}/events")
        stream = events(connection.getresponse())
        for done, city in enumerate(cities, 1):
            weather.release(city)
            wait_for(lambda done=done: client("GET", job).json["progress"] == 25 * done)  # type: ignore[misc]
            if city == "held A":
                assert weather.asked["held D"] == 0  # two at a time
        told = [event["progress"] for event in stream]
    assert told == sorted(told)
    assert told[-1] == 100
    assert {25, 50, 75} & set(told)
    expected = [{"city": city, "degrees": 4} for city in cities]
    asked = weather.asked.copy()
    assert result(client, put(client, "trip-1", *cities)) == expected
    assert weather.asked == asked  # the work was done once
    assert client("GET", job).json["created"] == created


def test_an_id_that_would_not_do_in_a_url(client: Client) -> None:
    assert client("PUT", "/forecasts/a%20b", ["Oslo"]).status == 422


def test_the_page_for_people(client: Client) -> None:
    job = put(client, "trip-2", "Oslo")
    ended(client, job)
    page = client("GET", "/api/", accept="text/html")
    assert page.status == 200
    assert b"trip-2" in page.body


# -- cancellation, and the end of the server


def test_a_job_that_is_dismissed_ends_what_it_waits_for(client: Client, weather: WeatherServer) -> None:
    job = put(client, "trip-3", "held E")
    wait_for(lambda: weather.asked["held E"])
    assert client("DELETE", job).json["status"] == "dismissed"
    wait_for(lambda: weather.left["held E"] == weather.asked["held E"])
    assert client("GET", f"{job}/results").status == 410


def test_a_server_that_is_stopped_finishes_its_jobs(
    tmp_path: Path, mail: MailServer, weather: WeatherServer
) -> None:
    with start(tmp_path, "log", mail, weather) as server:
        job = put(server.client, "trip-4", "held F", "flaky G")
        wait_for(lambda: weather.asked["held F"])
        ending = threading.Thread(target=server.end, args=(signal.SIGTERM,))
        ending.start()
        wait_for(lambda: "Waiting for application shutdown" in server.log)
        weather.release("held F")
        ending.join()
        assert "Application shutdown complete" in server.log
    with start(tmp_path, "log2", mail, weather) as server:
        cities = [answer["city"] for answer in result(server.client, job)]
        assert cities == ["held F", "flaky G"]


def test_what_a_killed_server_has_left_is_found_and_done_again(
    tmp_path: Path, mail: MailServer, weather: WeatherServer
) -> None:
    with start(tmp_path, "log", mail, weather) as server:
        done = put(server.client, "trip-5", "Oslo")
        ended(server.client, done)
        lost = put(server.client, "trip-6", "held H")
        wait_for(lambda: weather.asked["held H"])
        server.end(signal.SIGKILL)
    weather.release("held H")
    with start(tmp_path, "log2", mail, weather) as server:
        client = server.client
        assert result(client, done) == [{"city": "Oslo", "degrees": 4}]
        assert failure(client, lost)["type"] == "WorkerLost"
        assert put(client, "trip-6", "held H") == lost
        assert client("GET", lost).json["status"] == "failed"  # one of that name is known
        client("DELETE", lost)
        assert put(client, "trip-6", "held H") == lost
        assert result(client, lost) == [{"city": "held H", "degrees": 4}]


# -- the page


class Section(NamedTuple):
    """A section that sets both ways side by side."""

    theirs: str
    ours: str


def sections() -> dict[str, Section]:
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        theirs = re.findall(r"^```py\n(.*?)^```", part, flags=re.DOTALL | re.MULTILINE)
        if theirs:
            found[part.partition("\n")[0]] = Section(*theirs, *blocks(part))
    return found


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def count(code: str) -> int:
    lines = [line.strip() for line in code.splitlines()]
    return sum(1 for line in lines if line and not line.startswith("#"))


def test_the_page_shows_the_example() -> None:
    code = EXAMPLE.read_text(encoding="utf-8")
    *shown, _ = blocks(PAGE.read_text(encoding="utf-8"))  # the last one is a client
    assert len(shown) == 9
    assert [block for block in shown if block not in code] == []
    lines = count(code.partition("import csv")[2].partition("if __name__")[0]) + 1
    assert sum(map(count, shown)) == lines  # all of it


def test_the_page_counts_right() -> None:
    text = PAGE.read_text(encoding="utf-8")
    counted = re.findall(r"^\| \[(.*)\]\(.*\) \| (\d+) \| (\d+) \|", text, flags=re.MULTILINE)
    lines = {name: (count(theirs), count(ours)) for name, (theirs, ours) in sections().items()}
    assert {name: (int(theirs), int(ours)) for name, theirs, ours in counted} == lines
    together = [sum(column) for column in zip(*lines.values(), strict=True)]
    assert f"| together | {together[0]} | {together[1]} |" in text


class Theirs:
    """The application of the guides' blocks, with a stand-in for the other service."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[int] = []
        self.names: dict[str, Any] = {
            **{name: value for name, value in vars(example).items() if not name.startswith("_")},
            "BackgroundTasks": BackgroundTasks,
            "Callable": Callable,
            "asyncio": asyncio,
            "functools": functools,
            "inspect": inspect,
            "logging": logging,
            "run_in_threadpool": run_in_threadpool,
            "DATA": folder,
            "MAIL_SERVER": "127.0.0.1:1",
        }
        for section in sections().values():
            exec(section.theirs, self.names)
        self.app: FastAPI = self.names["app"]
        transport = httpx.MockTransport(self.answer)
        self.services = example.Services(
            httpx.AsyncClient(transport=transport, base_url="http://weather"), folder / "shop.db"
        )
        self.app.dependency_overrides[self.names["get_services"]] = self.get_services

    async def get_services(self) -> example.Services:
        return self.services

    def answer(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(self.answers.pop(0) if self.answers else 200, json=request.url.params["city"])

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask, and return the answer when its tasks have ended."""
        return asyncio.run(self.ask(method, path, **options))

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with (
            self.app.router.lifespan_context(self.app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return await client.request(method, path, **options)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Theirs:
    return Theirs(tmp_path, monkeypatch)


def test_their_failed_mail_drops_the_line(theirs: Theirs, tmp_path: Path) -> None:
    theirs("POST", "/signup", json={"address": "ada@example.org", "name": "Ada"})
    assert not (tmp_path / "log.txt").exists()


def test_their_csv_file(theirs: Theirs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = b"name,address\nAda,a@b\nBob,nowhere\n"
    answer = theirs("POST", "/contacts", content=content, headers={"content-type": "text/csv"})
    assert (answer.status_code, answer.json()) == (202, None)
    assert rows(tmp_path, "SELECT * FROM contacts") == [("a@b", "Ada")]
    assert "1 rows added, rejected: [{'line': 3" in caplog.text


def test_their_record_lacks_the_request_that_fails(theirs: Theirs, tmp_path: Path) -> None:
    assert theirs("POST", "/orders/cup").status_code == 200
    assert theirs("POST", "/orders/unicorn").status_code == 409
    assert rows(tmp_path, "SELECT * FROM requests") == [("POST", "/orders/cup", "asked")]


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("answers", "left", "is_known"),
    [
        ([503, 503, 503, 200], [], True),
        ([503, 503, 503, 503, 200], [200], False),
        ([404, 200], [200], False),
    ],
)
async def test_their_call_of_another_service(
    theirs: Theirs, answers: list[int], left: list[int], is_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    theirs.answers = [*answers]
    await theirs.ask("POST", "/weather/Oslo")
    assert theirs.answers == left
    assert ("the weather: Oslo" in caplog.text) == is_known


def test_their_progress(theirs: Theirs) -> None:
    for _ in range(2):
        assert theirs("PUT", "/forecasts/1", json=["Oslo", "Lima"]).json() == "/forecasts/1"
    state = theirs("GET", "/forecasts/1").json()
    assert state == {"status": "successful", "progress": 100, "result": ["Oslo", "Lima"]}
    assert theirs("GET", "/forecasts/2").status_code == 404


def test_their_error_wrapper(theirs: Theirs) -> None:
    async def fail(text: str) -> None:
        raise ValueError(text)

    for task in (theirs.names["send_mail"], fail):
        asyncio.run(theirs.names["noted"](task)(example.welcome(example.Contact(address="a@b", name="Ada"))))
    first, second = theirs("GET", "/failures").json()
    assert (first["task"], first["type"]) == ("send_mail", "ConnectionRefusedError")
    assert (second["task"], second["type"]) == ("fail", "ValueError")


OLD = tuple(map(int, fastapi_version.split(".")[:2])) < (0, 118)


@pytest.mark.skipif(OLD, reason="closes dependencies before it runs tasks")
async def test_a_dependency_of_theirs_is_open_until_the_last_task_and_adds_none_afterwards() -> None:
    seen = []

    async def note(what: str) -> None:
        seen.append(what)

    async def depend(tasks: BackgroundTasks) -> AsyncIterator[None]:
        yield
        seen.append("closed")
        tasks.add_task(note, "added after the yield")

    app = FastAPI(dependencies=[Depends(depend)])

    @app.post("/")
    async def ask(tasks: BackgroundTasks) -> None:
        tasks.add_task(note, "task")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.post("/")
    assert seen == ["task", "closed"]
