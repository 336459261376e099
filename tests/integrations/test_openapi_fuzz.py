"""Schemathesis sends the example all kinds of requests, and compares the answers with its OpenAPI document.

It takes about a minute, so that it runs only where it is asked for; what it has found is tested always.
"""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from async_pipeline import Pipeline
from async_pipeline.integrations.fastapi import processes_router
from tests.integrations.uvicorn_server import EXAMPLE, Client, Server

CONFIG = """
# the stream of 10,000 reports takes minutes, and has no parameters
[[operations]]
include-path = "/reports"
enabled = false

# 500 tells that a job has failed, as some do, and 410 that it was dismissed; their schemas are checked
[[operations]]
include-name = "GET /api/jobs/{job_id}/results"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "500"]
checks.positive_data_acceptance.expected-statuses = ["2xx", "404", "410", "500"]

# 503: the queue is full
[[operations]]
include-path-regex = "/execution$"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]
"""


def dismiss_long_ones(client: Client, is_done: threading.Event) -> None:
    """End jobs after some seconds, for whose events the fuzzer would wait up to a minute."""
    while not is_done.wait(0.5):
        for job in client("GET", "/api/jobs?status=running&minDuration=4").json["jobs"]:
            assert client("DELETE", f"/api/jobs/{job['jobID']}").status in (200, 404)


@pytest.mark.threads
@pytest.mark.skipif(
    not os.environ.get("SCHEMATHESIS") or importlib.util.find_spec("schemathesis") is None,
    reason="install it: pip install schemathesis; and ask for it: export SCHEMATHESIS=1",
)
def test_all_answers_are_as_documented(tmp_path: Path) -> None:
    config, har = tmp_path / "schemathesis.toml", tmp_path / "har.json"
    config.write_text(CONFIG)
    with ExitStack() as stack:
        server = stack.enter_context(Server(EXAMPLE, tmp_path / "log", WAIT="0.2"))
        is_done = threading.Event()
        sweeping = stack.enter_context(ThreadPoolExecutor(1)).submit(
            dismiss_long_ones, server.client, is_done
        )
        stack.callback(is_done.set)
        document = f"http://127.0.0.1:{server.client.port}/openapi.json"
        fuzzed = schemathesis(tmp_path, config, document, "--report", "har", "--report-har-path", str(har))
        print(fuzzed.stdout, fuzzed.stderr)
        assert fuzzed.returncode == 0
        assert not sweeping.done(), sweeping.result()
        assert server.client("GET", "/api/processes").status == 200
        assert "ASGI application" not in server.log  # "Exception in", as uvicorn says
    exchanges = json.loads(har.read_bytes())["log"]["entries"]
    assert len(exchanges) >= 1000
    statuses = Counter(exchange["response"]["status"] for exchange in exchanges)
    print(f"-- {dict(statuses)}")
    assert statuses.keys() >= {200, 201, 204, 400, 404, 405}  # all sorts of answers
    for exchange in exchanges:
        check_text(exchange["response"]["content"].get("text", ""))


def schemathesis(folder: Path, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "--no-color", "run"]
    options = ["--checks", "all", "--max-examples", "100", "--generation-deterministic"]
    options += ["--request-timeout", "30"]
    # a job that is dismissed stays, as such, until it is deleted once more
    options += ["--exclude-checks", "use_after_free"]
    return subprocess.run(
        [*command, *options, *arguments], cwd=folder, capture_output=True, encoding="utf-8", timeout=500
    )


def check_text(text: str) -> None:
    """Check that an answer does not tell what an exception of the example has said."""
    assert "Traceback" not in text
    assert "is no e-mail address" not in text


# -- what it has found


def make() -> FastAPI:
    def double(number: int) -> int:
        return 2 * number

    app = FastAPI()
    app.include_router(processes_router({"double": Pipeline([double])}), prefix="/api")
    return app


@pytest_asyncio.fixture
async def client() -> AsyncIterator[AsyncClient]:
    app = make()
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=ASGITransport(app), base_url="http://test") as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/jobs/x", "DELETE, GET"),  # by two routes
        ("OPTIONS", "/api/jobs/x", "DELETE, GET"),
        ("POST", "/api/jobs", "GET"),
        ("PROPFIND", "/api/", "GET"),
        ("GET", "/api/processes/double/execution", "POST"),
    ],
)
async def test_a_method_that_is_not_allowed(
    client: AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "about:blank",
        "title": "Method Not Allowed",
        "status": 405,
        "detail": f"{method} is not allowed here",
    }


async def test_outputs_that_are_no_object(client: AsyncClient) -> None:
    body = {"inputs": {"number": 1}, "outputs": None}
    answer = await client.post("/api/processes/double/execution", json=body)
    assert answer.status_code == 400
    assert answer.json()["errors"] == [{"pointer": "/outputs", "detail": "must be an object"}]


def test_what_the_document_says_of_events_and_results() -> None:
    paths = make().openapi()["paths"]
    [(kind, events)] = paths["/api/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"].items()
    assert (kind, events.keys()) == ("text/event-stream", {"itemSchema"})
    assert events["itemSchema"]["required"] == ["id", "data"]
    assert events["itemSchema"]["properties"]["data"]["contentSchema"]["title"] == "statusInfo"
    assert "204" in paths["/api/jobs/{job_id}/results"]["get"]["responses"]
