"""A uvicorn in a process of its own, and a client that makes a connection for each request."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import async_pipeline

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fastapi_app.py"
T = TypeVar("T")

PATIENCE = 60.0  # seconds after which something has gone wrong, even on a busy machine


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # by their names in small letters
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def worker(self) -> int:
        """The process that has answered; of the tests' own application."""
        return int(self.headers["x-worker"])


class Client:
    """Makes a connection for each request, and keeps all that it was answered."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[Answer] = []

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        with self.connection() as connection:
            return self.ask(connection, method, path, body, **headers)

    @contextmanager
    def connection(self) -> Iterator[HTTPConnection]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            yield connection
        finally:
            connection.close()

    def ask(
        self, connection: HTTPConnection, method: str, path: str, body: Any = None, **headers: str
    ) -> Answer:
        send(connection, method, path, body, **headers)
        response = connection.getresponse()
        answer = Answer(response.status, names(response), response.read())
        self.answers.append(answer)
        return answer

    def submit(self, process: str, **inputs: Any) -> str:
        """Execute a process as a job, and return the path of that."""
        answer = self(
            "POST", f"/api/processes/{process}/execution", {"inputs": inputs}, prefer="respond-async"
        )
        assert answer.status == 201, answer
        return "/api/jobs/" + str(answer.json["jobID"])

    def job(self, path: str, *, until: str) -> Answer:
        """Ask for a job until its status is one of those."""

        def asked() -> Answer | None:
            answer = self("GET", path)
            assert answer.status == 200, answer
            return answer if answer.json["status"] in until.split() else None

        return wait_for(asked)


def send(connection: HTTPConnection, method: str, path: str, body: Any = None, **headers: str) -> None:
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"content-type": "application/json", **headers})


def names(response: HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def wait_for(what: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """Call it until it returns something that is true, and return that."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"{what} was in vain for {seconds} s"
        time.sleep(0.02)
    return found


def events(response: HTTPResponse) -> Iterator[Any]:
    """The data of the server-sent events of a response, until it ends."""
    assert (response.status, names(response)["content-type"]) == (200, "text/event-stream; charset=utf-8")
    while line := response.readline():
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "data":
            yield json.loads(value)


class Server:
    """A program that serves by uvicorn, from when it answers until the end of the block.

    Args:
        program: the file to run.
        log: the file that its output goes to, of which the tests see the end when they fail.
        arguments: of the program.
        environment: variables besides those of this process.
    """

    def __init__(self, program: Path, log: Path, *arguments: str, **environment: str) -> None:
        self._command = [sys.executable, str(program), "--port", "0", *arguments]
        self._log = log
        library = Path(async_pipeline.__file__).parents[1]
        paths = [str(library), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}

    def __enter__(self) -> "Server":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,  # so that its workers can be ended with it
            )
        try:
            self.client = Client(wait_for(self._port))
            wait_for(self._answers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that were left
        print(f"-- the log of {' '.join(self._command)}:\n{self.log[-20_000:]}")

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self, number: int, *, group: bool = False) -> tuple[int, float]:
        """Send a signal, wait for the end, and return the exit code and how many seconds it took.

        Args:
            number: of the signal.
            group: whether its workers get it as well, as by Ctrl+C on a terminal.
        """
        start = time.monotonic()
        (os.killpg if group else os.kill)(self._process.pid, number)
        return self._process.wait(PATIENCE), time.monotonic() - start

    def _port(self) -> int | None:
        assert not self.has_ended(), f"the server has ended:\n{self.log}"
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log)
        return int(found[1]) if found else None

    def _answers(self) -> bool:
        try:
            return self.client("GET", "/api/conformance").status == 200
        except ConnectionError:
            assert not self.has_ended(), f"the server has ended:\n{self.log}"
            return False
