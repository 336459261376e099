"""The endpoints of OGC API - Processes, and what they share."""

# no postponed annotations here: FastAPI reads the hints of the endpoints

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import Field
from starlette.requests import ClientDisconnect

from ..events import logger
from ..jobs import Job, JobRunner
from ..middlewares.cache import Cache
from ..stage import raise_cancellation
from ._disconnect import ClientDisconnected, ClosingStreamingResponse, cancel_on_disconnect
from ._events import event_id, events
from ._executions import Execution, Known, Served, respond
from ._filters import INTERVAL, STATUSES, JobFilter, parts, query
from ._jobs_page import PageProcess, page, policy
from ._links import REL, Links
from ._problems import OGC, RETRY_AFTER, Problem, failed, json_response, no_such_process, not_allowed
from ._requests import ExecutionRequest, preferences, prefers_html

__all__ = ["Api"]

_CONFORMS = [
    f"http://www.opengis.net/spec/ogcapi-processes-1/1.0/conf/{name}"
    for name in ("core", "json", "ogc-process-description", "job-list", "dismiss")
]
_MOST = 1000  # entries of a list in one answer
_FAR = 2**62  # beyond the end of every list
_DISMISSING = 10.0  # seconds that a client waits for a handler that cleans up

Limit = Annotated[int, Query(ge=1, description="at most so many; 1000 are the most")]
Seconds = Annotated[int, Field(ge=0)]
Offset = Annotated[int, Query(ge=0, description="without the first so many")]


def _one_of(*values: str) -> Any:
    """A list parameter of some values, which :func:`_check_each` checks, so that commas may part them."""
    return Query(json_schema_extra={"items": {"type": "string", "enum": list(values)}})


class Api:
    """The endpoints, and what they share."""

    timeout: float | None
    wait: float
    cache_ttl: float | None
    cache: Cache

    def __init__(self, served: Mapping[str, Served], runner: JobRunner, about: tuple[str, str]) -> None:
        self.served = served
        self.runner = runner
        self.title, self.about = about
        self._lifespans = 0

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        if self._lifespans:  # the router is included twice
            yield
            return
        self._lifespans += 1
        try:
            async with self.runner:
                yield
        finally:
            self._lifespans -= 1

    # -- what there is

    async def landing(self, request: Request) -> Response:
        links = Links(request, 1)
        if prefers_html(",".join(request.headers.getlist("accept"))):
            return await self._page(links)
        found = [
            links.link("/", "self"),
            links.link("/", "alternate", "this page for people", "text/html"),
            links.link("/conformance", f"{REL}conformance"),
            links.link("/processes", f"{REL}processes"),
            links.link("/jobs", f"{REL}job-list"),
        ]
        openapi = getattr(request.app, "openapi_url", None)
        if openapi:
            version, _, _ = request.app.openapi_version.rpartition(".")
            found.append(
                {
                    "href": f"{links.origin}{links.mount}{openapi}",
                    "rel": "service-desc",
                    "type": f"application/vnd.oai.openapi+json;version={version}",
                }
            )
        about = {"title": self.title, "description": self.about, "links": found}
        return json_response(about, headers={"Vary": "Accept"})

    async def _page(self, links: Links) -> Response:
        processes = [
            PageProcess(
                process.id,
                process.title,
                process.summary().get("description", ""),
                served.picture,
                f"{links.base}/processes/{process.id}",
            )
            for served in self.served.values()
            for process in (served.process,)
        ]
        jobs = [links.job(job) for job in await self.runner.list(limit=50)]
        nonce = secrets.token_urlsafe(16)
        text = page(self.title, self.about, processes, jobs, base=links.base, nonce=nonce)
        headers = {"Vary": "Accept", "Cache-Control": "no-store", "Content-Security-Policy": policy(nonce)}
        return HTMLResponse(text, headers=headers)

    async def conformance(self) -> Response:
        return json_response({"conformsTo": _CONFORMS})

    async def processes(self, request: Request, limit: Limit = 100, offset: Offset = 0) -> Response:
        links = Links(request, 1)
        limit, offset = min(limit, _MOST), min(offset, _FAR)
        found = [links.process(served.process) for served in self.served.values()]
        pages = links.pages("/processes", {}, limit, offset, len(found) > offset + limit)
        return json_response({"processes": found[offset : offset + limit], "links": pages})

    async def process(self, request: Request, process_id: str) -> Response:
        if process_id not in self.served:
            raise no_such_process(process_id)
        process = self.served[process_id].process
        return json_response(Links(request, 2).process(process, is_whole=True))

    async def nothing(self, process_id: str) -> Response:
        raise no_such_process(process_id)

    # -- execution

    async def execute(self, served: Served, request: Request, context: Any) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientDisconnected from None
        asked = ExecutionRequest(served.process, body)
        prefers = preferences(request.headers.getlist("prefer"))
        is_async = "respond-async" in prefers
        wait = self._wait(prefers.get("wait"), is_async)
        step, known = await self._step_for(served, asked)
        if known is not None and wait is not None:
            return respond(known)
        if wait is None:
            job = await self.runner.submit(step, asked.value, context=context, timeout=self.timeout)
            return self._created(request, job, is_async)
        async with cancel_on_disconnect(request):
            job = await self.runner.run(step, asked.value, context=context, timeout=self.timeout, wait=wait)
        if job.status == "successful":
            return respond(job.result)
        if job.error is not None:
            raise failed(job.error, is_waiting=True)
        return self._created(request, job, is_async)

    def _created(self, request: Request, job: Job, is_async: bool) -> Response:
        links = Links(request, 3)
        headers = {"Location": f"{links.root}/jobs/{quote(job.id, safe='')}"}
        if is_async:
            headers["Preference-Applied"] = "respond-async"
        return json_response(links.job(job), 201, headers)

    def _wait(self, asked: str | None, is_async: bool) -> float | None:
        """How long the client waits for the result; None for not at all."""
        if asked is None or not asked.isdecimal():
            return None if is_async else self.wait
        return min(float(asked), self.wait)

    async def _step_for(self, served: Served, asked: ExecutionRequest) -> tuple[Any, dict[str, Any] | None]:
        """What to run, and its result where that is known already."""
        if self.cache_ttl is None:
            return Execution(served, asked.outputs, asked.response, None), None
        process = served.process
        key = json.dumps([process.id, process.version, asked.inputs], sort_keys=True)

        async def keep(outputs: Any) -> None:
            try:
                await self.cache.set(key, outputs, ttl=self.cache_ttl)
            except Exception as error:
                raise_cancellation(error)
                logger.exception("The cache could not store what %r gave; the run goes on", process.id)

        step = Execution(served, asked.outputs, asked.response, keep)
        try:
            outputs = await self.cache.get(key)
        except Exception as error:
            raise_cancellation(error)
            logger.exception("The cache could not be asked for %r; it runs", process.id)
            return step, None
        if outputs is None:
            return step, None
        known = step.select(outputs)
        return Known(process.id, known), known

    # -- jobs

    async def jobs(
        self,
        request: Request,
        limit: Limit = 100,
        offset: Offset = 0,
        type: Annotated[list[str], _one_of("process")] = [],  # noqa: B006 - FastAPI copies it
        status: Annotated[list[str], _one_of(*STATUSES)] = [],  # noqa: B006
        process_id: Annotated[list[str], Query(alias="processID")] = [],  # noqa: B006
        datetime: Annotated[str | None, Query(pattern=INTERVAL, description="when created")] = None,
        min_duration: Annotated[list[Seconds], Query(alias="minDuration")] = [],  # noqa: B006
        max_duration: Annotated[list[Seconds], Query(alias="maxDuration")] = [],  # noqa: B006
    ) -> Response:
        limit, offset = min(limit, _MOST), min(offset, _FAR)
        kinds, statuses, processes = parts(type), parts(status), parts(process_id)
        _check_each("type", kinds, ("process",))
        _check_each("status", statuses, STATUSES)
        narrow = JobFilter(datetime, min_duration, max_duration)
        found = await self._jobs(narrow, statuses or None, processes or None, limit + 1, offset)
        links = Links(request, 1)
        asked = query(
            {
                "type": kinds,
                "status": statuses,
                "processID": processes,
                "datetime": datetime,
                "minDuration": min_duration,
                "maxDuration": max_duration,
            }
        )
        pages = links.pages("/jobs", asked, limit, offset, len(found) > limit)
        return json_response({"jobs": [links.job(job) for job in found[:limit]], "links": pages})

    async def _jobs(
        self, narrow: JobFilter, statuses: Any, processes: Any, limit: int, offset: int
    ) -> list[Job]:
        if narrow.is_all:
            return await self.runner.list(limit=limit, offset=offset, status=statuses, pipeline=processes)
        found: list[Job] = []
        start = 0
        while len(found) < offset + limit:
            some = await self.runner.list(limit=_MOST, offset=start, status=statuses, pipeline=processes)
            found += filter(narrow.takes, some)
            start += _MOST
            if len(some) < _MOST:
                break
        return found[offset : offset + limit]

    async def job(self, request: Request, job_id: str) -> Response:
        return json_response(Links(request, 2).job(await self.runner.get(job_id)))

    async def not_on_jobs(self, request: Request, job_id: str) -> Response:
        raise not_allowed(request.method, ("DELETE", "GET"))

    async def results(self, job_id: str) -> Response:
        job = await self.runner.get(job_id)
        if job.error is not None:
            raise failed(job.error, is_waiting=False)
        if job.status == "dismissed":
            raise Problem(410, "the job was dismissed, so that it has no results")
        if job.status != "successful":
            headers = {"Retry-After": str(RETRY_AFTER)}
            kind = f"{OGC}result-not-ready"
            raise Problem(
                404, f"the job is {job.status}", kind=kind, title="Result not ready", headers=headers
            )
        return respond(job.result)

    async def events(self, request: Request, job_id: str) -> Response:
        job = await self.runner.get(job_id)
        if job.finished is not None and request.headers.get("last-event-id") == event_id(job):
            return Response(status_code=204)  # which tells a browser not to connect again
        links = Links(request, 3)
        stream = events(self.runner.watch(job_id), links.job)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return ClosingStreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def dismiss(self, request: Request, job_id: str) -> Response:
        links = Links(request, 2)
        before = await self.runner.get(job_id)
        try:
            async with asyncio.timeout(_DISMISSING):
                job = await self.runner.dismiss(job_id)
        except TimeoutError:
            return json_response(links.job(await self.runner.get(job_id)), 202)
        if before.finished is not None:
            removed = "the job and its results were removed"
            job = replace(job, status="dismissed", message=removed, error=None)
        return json_response(links.job(job))


def _check_each(parameter: str, given: Collection[str], allowed: Collection[str]) -> None:
    if not set(given) <= set(allowed):
        fault = {"parameter": parameter, "in": "query", "detail": f"must be one of {', '.join(allowed)}"}
        raise Problem(400, "the request is not valid", faults=[fault])
