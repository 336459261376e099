"""The example, with what tells its tests what happens inside, and with what goes wrong.

It is started like the example, which it stands for: ``python tests/integrations/uvicorn_app.py --workers 2``.
"""

import argparse
import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import BackgroundTasks, Response
from pydantic import AfterValidator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from async_pipeline import Pipeline
from async_pipeline.integrations.fastapi import ClosingStreamingResponse, processes_router
from examples.fastapi_app import app, jobs

SECRET = "hunter2-is-my-password"


class WorkerHeader:
    """Tells in each answer which process has given it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_it(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-worker", b"%d" % os.getpid())]
            await send(message)

        await self.app(scope, receive, send_it)


class Moments(logging.Handler):
    """Keeps when what was logged, by a clock that all processes share."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.getMessage(), time.monotonic()))


app.add_middleware(WorkerHeader)
moments = Moments()
logging.getLogger("example").addHandler(moments)


@app.get("/inside", include_in_schema=False)
async def inside() -> dict[str, Any]:
    tasks = [str(getattr(task.get_coro(), "__qualname__", "")) for task in asyncio.all_tasks()]
    return {"tasks": sorted(tasks), "logged": moments.found, "jobs": repr(jobs)}


@app.get("/large")
async def large() -> Response:
    """What a client that does not read makes wait."""

    async def parts() -> AsyncIterator[bytes]:
        async with Pipeline([enlarge]).stream(range(1000)) as results:
            async for part in results:
                yield part

    return ClosingStreamingResponse(parts())


async def enlarge(number: int) -> bytes:
    await asyncio.sleep(0)
    return b"x" * 1_000_000


# -- what BackgroundTasks do, and what jobs do instead

notes: list[str] = []


async def note(name: str) -> None:
    notes.append(f"{name} begins")
    await asyncio.sleep(0.3)
    notes.append(f"{name} ends")
    if name == "fails":
        raise ValueError(SECRET)


@app.post("/background")
async def run_in_background(tasks: BackgroundTasks) -> None:
    notes.clear()
    for name in ("first", "second", "fails", "never"):
        tasks.add_task(note, name)


@app.post("/jobs")
async def run_as_jobs() -> list[str]:
    notes.clear()
    return [(await jobs.submit(note, name)).id for name in ("first", "second", "fails", "last")]


@app.get("/noted")
async def what_ran() -> list[str]:
    return notes


# -- what fails, with a text that is nobody's business; on a runner of the router's own


def refuse(value: str) -> str:
    raise ValueError(SECRET)


async def fail(text: str) -> str:
    await asyncio.sleep(0.05)
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise RuntimeError(f"wrong password: {SECRET}") from error


def check(text: Annotated[str, AfterValidator(refuse)]) -> str:
    return text


def give(text: str) -> object:
    return Unshown()


class Unshown:
    def __repr__(self) -> str:
        raise ValueError(SECRET)


async def time_out(text: str) -> str:
    raise TimeoutError(SECRET)


async def exit_(text: str) -> str:
    raise asyncio.CancelledError(SECRET)


failures = {
    "fail": Pipeline([fail]),
    "check": Pipeline([check]),
    "give": Pipeline([give]),
    "time-out": Pipeline([time_out]),
    "cancel": Pipeline([exit_]),
}
app.include_router(processes_router(failures), prefix="/failures")

if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--loop", default="auto")
    parser.add_argument("--http", default="auto")
    parser.add_argument("--limit-max-requests", type=int, default=None)
    arguments = parser.parse_args()
    uvicorn.run("uvicorn_app:app", **vars(arguments))
