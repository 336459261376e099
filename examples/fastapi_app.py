"""Pipelines in FastAPI: in handlers, as jobs that outlive the request, and as a standard HTTP surface.

    python examples/fastapi_app.py            # then open http://127.0.0.1:8000/api/ and http://127.0.0.1:8000/docs

It needs ``pip install 'async-pipeline[fastapi]' uvicorn``. For several workers that answer for each other's
jobs: ``JOBS_DB=jobs.db python examples/fastapi_app.py --workers 2``.
"""

import argparse
import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import fmean, pstdev
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from async_pipeline import Pipeline, each, staged
from async_pipeline.integrations.fastapi import (
    ClosingStreamingResponse,
    cancel_on_disconnect,
    processes_router,
)
from async_pipeline.jobs import JobRunner, report_progress
from async_pipeline.jobs_sqlite import SqliteJobStore

log = logging.getLogger("example")
JOBS_DB = os.environ.get("JOBS_DB")  # a file: several workers, and jobs that survive a restart
WAIT = float(os.environ.get("WAIT", "10"))  # seconds after which an execution becomes a job

jobs = JobRunner(concurrency=100, drain=3, store=SqliteJobStore(JOBS_DB) if JOBS_DB else None)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with jobs:
        yield


app = FastAPI(title="Pipelines", lifespan=lifespan)


# -- 1: in a handler; when the client goes, so does the run


async def settings() -> dict[str, Any]:
    return {"language": "en"}


@staged(retries=2, retry_delay=0.1)
async def fetch(name: str) -> str:
    await asyncio.sleep(0.02)
    return f"all about {name}"


async def render(text: str, context: dict[str, Any]) -> str:
    try:
        await asyncio.sleep(10 if "elephants" in text else 0.02)  # they are large
    except asyncio.CancelledError:
        log.warning("render was cancelled")
        raise
    return f"[{context['language']}] {text}"


report: Pipeline[str, str] = Pipeline([fetch, render], name="report")


@app.get("/report/{name}")
async def get_report(
    name: str, request: Request, context: Annotated[dict[str, Any], Depends(settings)]
) -> str:
    async with cancel_on_disconnect(request):
        return await report.run(name, context=context)


@app.get("/reports", response_class=ClosingStreamingResponse)
async def get_reports() -> Response:
    async def lines() -> AsyncIterator[str]:
        async with report.stream(map(str, range(10_000)), context=await settings()) as texts:
            async for text in texts:
                yield f"{text}\n"

    return ClosingStreamingResponse(lines(), media_type="text/plain")


# -- 2: jobs, where FastAPI's BackgroundTasks would run in a row, and the first failure would drop the rest


class Signup(BaseModel):
    address: Annotated[str, Field(max_length=200)]


async def send_mail(address: str) -> str:
    await asyncio.sleep(0.05)
    if "@" not in address:
        raise ValueError(f"{address} is no e-mail address")
    return f"sent to {address}"


async def note_visit(address: str) -> str:
    await asyncio.sleep(0.05)
    return "noted"


@app.post("/signup", status_code=202, responses={400: {"description": "The body can't be read"}})
async def signup(form: Signup) -> dict[str, str]:
    mail = await jobs.submit(send_mail, form.address)
    visit = await jobs.submit(note_visit, form.address)  # whatever becomes of the mail
    return {"mail": f"/api/jobs/{mail.id}", "visit": f"/api/jobs/{visit.id}"}


# -- 3: as processes of OGC API - Processes, with descriptions, jobs, progress, and a page for people


class Numbers(TypedDict):
    numbers: Annotated[list[Annotated[float, Field(ge=-1e9, le=1e9)]], Field(min_length=1, max_length=1000)]


class Summary(TypedDict):
    mean: float
    deviation: float


def summarise(value: Numbers) -> Summary:
    """The mean of some numbers, and how far they are from it."""
    return {"mean": fmean(value["numbers"]), "deviation": pstdev(value["numbers"])}


async def count_down(seconds: Annotated[float, Field(ge=0, le=60, title="Seconds to wait")]) -> str:
    """Waits, and tells how far it is."""
    steps = max(1, round(seconds * 10))
    try:
        for step in range(steps):
            report_progress(step / steps, f"{seconds * (1 - step / steps):.1f} s left")
            await asyncio.sleep(seconds / steps)
    except asyncio.CancelledError:
        log.warning("count_down was cancelled")
        raise
    return "done"


def split(text: str) -> list[str]:
    """Which words a text has, and how often."""
    return text.split()


def clean(word: str) -> str:
    return word.strip(".,;:!?").casefold()


def count(words: list[str]) -> dict[str, int]:
    return dict(Counter(words).most_common(100))


processes = {
    "summarise": Pipeline([summarise]),
    "count-down": Pipeline([count_down], name="count down"),
    "count-words": Pipeline([split, each(clean), count], name="count words"),
}
app.include_router(
    processes_router(processes, runner=jobs, title="Example processes", wait=WAIT, timeout=120),
    prefix="/api",
)


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    uvicorn.run("fastapi_app:app", port=arguments.port, workers=arguments.workers)
