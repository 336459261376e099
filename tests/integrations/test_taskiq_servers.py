"""``TaskiqEngine`` on real brokers, with workers of taskiq's own command, which are killed.

Workers and clients are processes; each start of an item is a line in a file. ``PROOFS=1`` runs more
items, and each proof on each broker.
"""

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.integrations.servers import nats_url, rabbitmq_url, redis_url

ROOT = Path(__file__).parents[2]
APP = "tests.integrations.taskiq_app"
FULL = os.environ.get("PROOFS") == "1"
if os.environ.get("PROOFS") == "0":
    pytest.skip("PROOFS=0 leaves them out; PROOFS=1 runs them at full length", allow_module_level=True)
LIMIT = 60.0  # seconds for a test
SLOTS = 2  # chunks that a worker process runs at a time
BROKERS = {"rabbitmq": rabbitmq_url, "redis": redis_url, "nats": nats_url}

pytestmark = pytest.mark.threads


class Site:
    """A queue of its own on one broker, and the processes around it."""

    def __init__(self, kind: str, url: str, results: str, folder: Path, **settings: object) -> None:
        self.kind, self.url, self.results = kind, url, results
        self.queue = f"test-{uuid.uuid4().hex}"
        self.log = folder / "starts.log"
        self.output = folder / "output.log"
        self.settings = {"KIND": kind, "URL": url, "RESULTS": results, "QUEUE": self.queue, "LOG": self.log}
        self.settings |= settings
        self.processes: list[subprocess.Popen[bytes]] = []
        self.give_up = time.monotonic() + LIMIT

    def _start(self, *command: object, **streams: Any) -> "subprocess.Popen[bytes]":
        own = {f"TASKIQ_APP_{name}": str(value) for name, value in self.settings.items()}
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **own},
            start_new_session=True,
            **streams,
        )
        self.processes.append(process)
        return process

    def workers(self, count: int = 2, *options: object) -> "subprocess.Popen[bytes]":
        """Start taskiq's manager of so many worker processes."""
        slots = ["--max-async-tasks", SLOTS, "--max-prefetch", 0, "--log-level", "WARNING"]
        with self.output.open("ab") as output:
            command = ["taskiq", "worker", f"{APP}:broker", "--workers", count, *slots, *options]
            return self._start(*command, stdout=output, stderr=output)

    def client(self, items: int, concurrency: int = 10) -> "subprocess.Popen[bytes]":
        with self.output.open("ab") as output:
            return self._start(APP, items, concurrency, stdout=subprocess.PIPE, stderr=output)

    def result(self, client: "subprocess.Popen[bytes]") -> Any:
        """Return what a client says of its batch, when that has ended."""
        text, _ = client.communicate(timeout=max(1.0, self.give_up - time.monotonic()))
        assert text, self.output.read_text()
        return json.loads(text)

    def starts(self) -> list[tuple[int, int]]:
        """The index of each item that was started, and the process that did."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().rpartition("\n")[0].splitlines()
        return [(int(key.rpartition("/")[2]), int(pid)) for key, pid in map(str.split, lines)]

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert time.monotonic() < self.give_up, self.output.read_text()
            time.sleep(0.01)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def clean(self) -> None:
        with Redis.from_url(self.results) as redis:
            for key in [*redis.scan_iter(f"*{self.queue}*", count=1000)]:
                redis.delete(key)
        if self.kind == "nats":
            asyncio.run(self._delete_stream())

    async def _delete_stream(self) -> None:
        import nats

        connection = await nats.connect(self.url)
        await connection.jetstream().delete_stream(self.queue)
        await connection.close()


@contextlib.contextmanager
def site_on(kind: str, folder: Path, **settings: object) -> Iterator[Site]:
    site = Site(kind, BROKERS[kind](), redis_url(), folder, **settings)
    try:
        yield site
    finally:
        site.close()
        site.clean()


def chunks_run_again(site: Site, size: int) -> set[int]:
    counts = Counter(index for index, _ in site.starts())
    return {index // size for index, count in counts.items() if count > 1}


@pytest.mark.parametrize(
    ("kind", "chunk_size"),
    [("rabbitmq", 20), ("redis", 20), ("nats", 20), ("redis", 50)] + FULL * [("rabbitmq", 50), ("nats", 50)],
)
def test_a_worker_is_killed(kind: str, chunk_size: int, tmp_path: Path) -> None:
    """With chunks of 50, all 800 items are in the queue from the start, and nothing is sent afterwards."""
    with site_on(kind, tmp_path, CHUNK=chunk_size, DELAY=0.05) as site:
        site.workers(2)
        client = site.client(800)
        site.until(lambda: len(site.starts()) > 400)
        killed = site.starts()[-1][1]
        os.kill(killed, signal.SIGKILL)
        assert site.result(client) == {"wrong": [], "lost": []}
        starts = site.starts()
    again = chunks_run_again(site, chunk_size)
    of_killed = list(dict.fromkeys(index // chunk_size for index, pid in starts if pid == killed))
    assert len(of_killed) > SLOTS
    assert again <= set(of_killed)
    assert len(again) <= SLOTS
    assert len(starts) - 800 <= SLOTS * chunk_size
    assert max(Counter(index for index, _ in starts).values()) <= 2


@pytest.mark.parametrize("kind", BROKERS)
def test_the_client_is_killed_three_times(kind: str, tmp_path: Path) -> None:
    """A chunk takes a second and more; Redis and NATS deliver it again after 0.7 and 1 s."""
    items = 4000 if FULL else 1600
    with site_on(kind, tmp_path, CHUNK=100, DELAY=0.12, LEASE=2, RUN_ID="run") as site:
        site.workers(2)
        for part in (1, 2, 3):
            client = site.client(items)
            site.until(lambda part=part: len(site.starts()) > items * part // 5)  # type: ignore[misc]
            client.kill()
            client.wait()
        assert site.result(site.client(items)) == {"wrong": [], "lost": []}
        assert sorted(index for index, _ in site.starts()) == list(range(items))  # each of them once


@pytest.mark.parametrize("kind", ["rabbitmq"] + FULL * ["redis", "nats"])
def test_a_poison_item_alone_fails(kind: str, tmp_path: Path) -> None:
    with site_on(kind, tmp_path, CHUNK=20, DELAY=0.01, LEASE=0.6, POISON=222) as site:
        site.give_up += LIMIT
        site.workers(2)
        found = site.result(site.client(400))
        assert found == {"wrong": [222], "lost": ["WorkerLost('2 workers that ran it have died')"]}
        assert Counter(index for index, _ in site.starts())[222] <= 6


@pytest.mark.parametrize("stop", [signal.SIGTERM] + FULL * [signal.SIGINT])
@pytest.mark.parametrize("kind", ["redis"] + FULL * ["rabbitmq", "nats"])
def test_a_worker_is_stopped(kind: str, stop: signal.Signals, tmp_path: Path) -> None:
    """It gives back what it was at, and does not count as dead."""
    with site_on(kind, tmp_path, CHUNK=50, DELAY=0.2, LEASE=4) as site:
        site.give_up += LIMIT
        first = site.workers(1, "--wait-tasks-timeout", "0.1")
        client = site.client(300)
        site.until(lambda: len(site.starts()) > 50)
        site.workers(1)
        first.send_signal(stop)
        first.wait(20)
        assert site.result(client) == {"wrong": [], "lost": []}
        assert len(chunks_run_again(site, 50)) <= SLOTS
        with Redis.from_url(site.results) as redis:
            keys = redis.scan_iter(f"{site.queue}:pages*progress")
            records = [pickle.loads(redis.get(key) or b"") for key in keys]
        assert [record["state"] for record in records] == ["ended"] * 6
        assert [record["meta"][2] for record in records] == [0] * 6


# -- a broker that goes away


class Server:
    """A Redis of this test's own, which forgets nothing when it is killed."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("install redis-server, which this test starts and kills")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}"
        self._command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[tuple[Server, Site]]:
    redis_url()  # where there are no servers, none is started either
    server = Server(tmp_path)
    server.start()
    site = Site("redis", server.url, server.url, tmp_path, CHUNK=20, DELAY=0.05, OUTAGE=15)
    try:
        yield server, site
    finally:
        site.close()
        server.kill()


def test_the_broker_is_restarted(own_site: tuple[Server, Site]) -> None:
    server, site = own_site
    site.workers(2)
    client = site.client(800)
    site.until(lambda: len(site.starts()) > 200)
    server.kill()
    time.sleep(2)
    server.start()
    assert site.result(client) == {"wrong": [], "lost": []}


def test_the_broker_goes_away(own_site: tuple[Server, Site]) -> None:
    server, site = own_site
    site.settings["OUTAGE"] = 2
    site.workers(2)
    client = site.client(800)
    site.until(lambda: len(site.starts()) > 200)
    server.kill()
    error = site.result(client)["error"]
    assert "can't be reached: ConnectionError: " in error


def test_the_broker_was_never_there(own_site: tuple[Server, Site]) -> None:
    server, site = own_site
    server.kill()
    assert "can't be reached: ConnectionError: " in site.result(site.client(1))["error"]
