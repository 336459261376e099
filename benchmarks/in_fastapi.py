"""What the integration with FastAPI adds to a request, in one process and without sockets."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from typing_extensions import TypedDict

from async_pipeline import Pipeline
from async_pipeline.integrations.fastapi import cancel_on_disconnect, processes_router
from async_pipeline.jobs import JobRunner

from .work import Contender

CLOSE_TO_HAND = {
    "a run of two stages in an endpoint": ("run", "by hand", 30),
    "`cancel_on_disconnect` around it": ("watched", "run", 25),
    "the execution route": ("execution", "by hand", 150),
    "the execution route, `respond-async`": ("submit", "by hand", 350),
}
"""What is measured, against what, and how many µs it may add."""


class Numbers(TypedDict):
    first: int
    second: int


async def add(value: Numbers) -> int:
    return value["first"] + value["second"]


async def double(value: int) -> int:
    return value * 2


pipeline: Pipeline[Numbers, int] = Pipeline([add, double], name="double")
app = FastAPI()
jobs = JobRunner(max_pending=10**9, keep=100)
app.include_router(processes_router({"double": pipeline}, runner=jobs), prefix="/api")


@app.post("/by-hand")
async def by_hand(value: Numbers) -> int:
    return await double(await add(value))


@app.post("/run")
async def run(value: Numbers) -> int:
    return await pipeline.run(value)


@app.post("/watched")
async def watched(value: Numbers, request: Request) -> int:
    async with cancel_on_disconnect(request):
        return await pipeline.run(value)


_VALUE = {"first": 1, "second": 2}
_EXECUTION = "/api/processes/double/execution"


async def post(path: str, value: Mapping[str, Any], headers: Mapping[str, str] = {}) -> tuple[int, bytes]:
    """Send a request to the application, as a server does it."""
    body = json.dumps(value).encode()
    sent = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    sent += [(name.encode(), text.encode()) for name, text in headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": sent,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    status, content = 0, b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status, content
        status = message.get("status", status)
        content += message.get("body", b"")

    await app(scope, receive, send)
    return status, content


REQUESTS: dict[str, Callable[[], Awaitable[tuple[int, bytes]]]] = {
    "by hand": lambda: post("/by-hand", _VALUE),
    "run": lambda: post("/run", _VALUE),
    "watched": lambda: post("/watched", _VALUE),
    "execution": lambda: post(_EXECUTION, {"inputs": _VALUE}),
    "submit": lambda: post(_EXECUTION, {"inputs": _VALUE}, {"prefer": "respond-async"}),
}


def contender(name: str) -> Contender:
    """Many requests of one kind, one after the other."""

    async def requests(items: Sequence[int]) -> list[int]:
        async with jobs:
            return [(await REQUESTS[name]())[0] for _ in items]

    return requests
