"""The changes of a job as server-sent events, which end when the server is told to stop."""

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from ..errors import JobNotFound, JobRunnerClosed
from ..jobs import Job
from ..waiting import until_ended

__all__ = ["event_id", "events", "server_is_stopping"]

_PING = 15.0  # seconds without an event, after which a comment keeps the connection open
_LOOK = 0.5  # seconds between two looks at whether the server is stopping


def server_is_stopping() -> bool:
    """Tell whether uvicorn is about to stop.

    It waits for all connections before it runs the end of the lifespan, so that what never ends by itself
    would keep it for ever. Its signal handlers are methods of the server, also in each of several workers.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        server = getattr(signal.getsignal(number), "__self__", None)
        if getattr(server, "should_exit", False) is True or _is_closed(server):
            return True
    return False


def _is_closed(server: Any) -> bool:
    """Tell whether it has stopped listening, as at ``limit_max_requests``, which sets no flag."""
    listening = [getattr(each, "is_serving", None) for each in getattr(server, "servers", ())]
    return bool(listening) and not any(is_serving is None or is_serving() for is_serving in listening)


def event_id(job: Job) -> str:
    """What a client that reconnects sends back, to tell what it has seen last."""
    return f"{job.updated.isoformat()}/{job.status}"  # two changes may come at the same time


async def events(
    changes: AsyncGenerator[Job, None], show: Callable[[Job], dict[str, Any]]
) -> AsyncIterator[str]:
    """Yield an event for each change, and a comment now and then, until the job or the server ends."""
    clock = asyncio.get_running_loop().time
    spoken = clock()
    upcoming = asyncio.ensure_future(_next(changes))
    try:
        while not server_is_stopping():
            await asyncio.wait((upcoming,), timeout=_LOOK)
            if upcoming.done():
                job = upcoming.result()
                if job is None:
                    return
                upcoming = asyncio.ensure_future(_next(changes))
                spoken = clock()
                yield f"id: {event_id(job)}\ndata: {json.dumps(show(job), separators=(',', ':'))}\n\n"
            elif clock() - spoken >= _PING:
                spoken = clock()
                yield ": ping\n\n"
    finally:
        upcoming.cancel()
        try:
            await _end(upcoming)
        finally:
            await changes.aclose()


async def _end(task: "asyncio.Future[Job | None]") -> None:
    try:
        await until_ended(task)
    finally:
        if not task.cancelled():
            task.exception()  # which nobody hears of any more


async def _next(changes: AsyncGenerator[Job, None]) -> Job | None:
    with suppress(JobNotFound, JobRunnerClosed):  # removed meanwhile, or the runner was left
        return await anext(changes, None)
    return None
