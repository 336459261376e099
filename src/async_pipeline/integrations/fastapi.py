"""Pipelines in FastAPI: runs that end with their client, and a standard HTTP surface for pipelines.

>>> app.include_router(processes_router({"resize": resize, "report": report}), prefix="/api")
"""

# no postponed annotations here: FastAPI reads the hints of the endpoints

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from os import PathLike
from typing import Annotated, Any
from urllib.parse import quote

try:
    from fastapi import APIRouter, Depends, Query, Request, Response
    from fastapi.responses import HTMLResponse, StreamingResponse
    from pydantic import Field
    from pydantic_core import to_jsonable_python
    from starlette.requests import ClientDisconnect
except ImportError as _missing:
    raise ImportError("FastAPI support requires installing async-pipeline[fastapi]") from _missing

from ..events import logger
from ..jobs import Job, JobContext, JobRunner, with_progress
from ..middlewares.cache import Cache, MemoryCache
from ..retry import check_seconds
from ..stage import as_step, raise_cancellation
from ..types import Step
from ._descriptions import read_descriptions
from ._disconnect import ClientDisconnected, ClosingStreamingResponse, cancel_on_disconnect
from ._events import event_id, events
from ._filters import INTERVAL, STATUSES, JobFilter, parts, query
from ._jobs_page import PageProcess, page, policy
from ._links import REL, Links
from ._openapi import (
    CONFORMANCE,
    DESCRIPTION,
    EVENTS,
    JOBS,
    LANDING,
    PROCESSES,
    STATUS,
    answers,
    execution,
    results,
)
from ._problems import (
    OGC,
    RETRY_AFTER,
    Problem,
    ProblemRoute,
    failed,
    json_response,
    no_such_process,
    not_allowed,
)
from ._process import Process
from ._requests import ExecutionRequest, preferences, prefers_html

__all__ = ["ClientDisconnected", "ClosingStreamingResponse", "cancel_on_disconnect", "processes_router"]

_CONFORMS = [
    f"http://www.opengis.net/spec/ogcapi-processes-1/1.0/conf/{name}"
    for name in ("core", "json", "ogc-process-description", "job-list", "dismiss")
]
_MOST = 1000  # entries of a list in one answer
_FAR = 2**62  # beyond the end of every list
_NOT_ON_JOBS = ["HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"]
_DISMISSING = 10.0  # seconds that a client waits for a handler that cleans up

Limit = Annotated[int, Query(ge=1, description="at most so many; 1000 are the most")]
Seconds = Annotated[int, Field(ge=0)]
Offset = Annotated[int, Query(ge=0, description="without the first so many")]


def _one_of(*values: str) -> Any:
    """A list parameter of some values, which :func:`_check_each` checks, so that commas may part them."""
    return Query(json_schema_extra={"items": {"type": "string", "enum": list(values)}})


def processes_router(
    processes: Mapping[str, Step[Any, Any] | Callable[..., Any]],
    *,
    runner: JobRunner | None = None,
    title: str = "Pipelines",
    description: str = "",
    descriptions: Mapping[str, Mapping[str, Any]] | str | PathLike[str] | None = None,
    context: Callable[..., Any] | None = None,
    job_context: JobContext | None = None,
    timeout: float | None = None,
    wait: float = 10.0,
    cache_ttl: float | None = None,
    cache: Cache | None = None,
) -> APIRouter:
    """Return the routes of `OGC API - Processes <https://docs.ogc.org/is/18-062r2/18-062r2.html>`_ (1.0).

    >>> app.include_router(processes_router({"resize": resize}), prefix="/api")

    Each pipeline is a process: ``POST /processes/resize/execution`` runs it, and answers with its result or,
    for ``Prefer: respond-async`` and for what takes longer than ``wait``, with a job. Its inputs are the
    fields of the first handler's value type when that is a TypedDict, a dataclass or a pydantic model, else
    one input named after that parameter; its outputs are those of the last handler's return type, or else
    one named ``result``. Inputs are checked by these type hints. All errors are problems by RFC 9457, which
    name the class of an exception, never its text; the traceback is logged.

    Args:
        processes: the pipelines, or any other steps, by the id that they have in URLs: of letters, digits,
            ``_.~-``.
        runner: where the jobs run; it has to be entered by the application's lifespan. All its jobs are
            shown, those that the application itself has submitted as well. By default the router makes one,
            and runs it in its own lifespan, which ``include_router`` joins to that of the application (a
            mounted application has none: there, share a runner).
        title: of the landing page.
        description: of the landing page.
        descriptions: by process id, what to say of it other than what its type hints say, in OGC's form
            (``title``, ``description``, ``version``, ``keywords``, ``inputs``, ``outputs``); or the path of a
            YAML or JSON file that has it. It changes what is shown, not what is accepted.
        context: a dependency of FastAPI whose value is the context of the run. What it ``yield``\\ s is
            closed before a job runs; see ``job_context``.
        job_context: like that of :class:`~async_pipeline.jobs.JobRunner`, for the router's own one.
        timeout: seconds for a whole run, also of a job; ``None``, the default, for no limit. Who waits for
            it then gets a 504.
        wait: seconds after which an execution becomes a job whose status the client may ask for (201);
            10 by default. ``Prefer: wait=N`` makes it less. It then runs beside the runner's queue.
        cache_ttl: seconds for which a result is given again to who asks with the same inputs; ``None``, the
            default, for never. The context is no part of the key, so that the result must not depend on it.
        cache: where results are kept, if ``cache_ttl`` is given: by default the last 1024 in memory.

    Raises:
        TypeError: a type hint can't be read, or an argument is of the wrong type.
        ValueError: an id or a number that can't be used, or a description of what is not there.
    """
    if not (runner is None or isinstance(runner, JobRunner)):
        raise TypeError(f"runner must be a JobRunner, not {runner!r}; write runner=JobRunner(...)")
    for name, text in (("title", title), ("description", description)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, not {text!r}")
    if not (context is None or callable(context)):
        raise TypeError(f"context must be a function, as Depends takes it, not {context!r}")
    if not all(callable(getattr(cache, name, cache is None)) or cache is None for name in ("get", "set")):
        raise TypeError(f"cache must have get and set, like MemoryCache(), not {cache!r}")
    if runner is not None and job_context is not None:
        raise ValueError("job_context is for the router's own runner; give it to the JobRunner instead")
    if not isinstance(processes, Mapping):
        raise TypeError(f'processes must map ids to pipelines, not {processes!r}; write {{"name": pipeline}}')
    said = read_descriptions(descriptions)
    for unknown in said.keys() - processes.keys():
        raise ValueError(f"descriptions has {unknown!r}, which is none of the processes")
    if timeout is not None:
        check_seconds("timeout", timeout, zero=False)
    check_seconds("wait", wait, zero=True)
    if cache_ttl is not None:
        check_seconds("cache_ttl", cache_ttl, zero=False)
    api = _Api(
        {id: _Served(Process(id, _step(id, one), said.get(id))) for id, one in processes.items()},
        JobRunner(job_context=job_context) if runner is None else runner,
        (title, description),
    )
    api.timeout, api.wait = timeout, wait
    api.cache_ttl, api.cache = cache_ttl, MemoryCache() if cache is None else cache
    router = APIRouter(route_class=ProblemRoute, lifespan=None if runner is not None else api.lifespan)
    api.add_routes(router, context)
    return router


def _step(id: str, pipeline: Any) -> Step[Any, Any]:
    return as_step(pipeline, f"process {id!r} must be a pipeline, or any other step")


class _Served:
    """A process with the pipeline that tells a job how far it is, and its picture."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pipeline = with_progress(process.pipeline)
        self.picture = str(process.pipeline)


class _Execution:
    """One execution of a process, as a step: its result is what :meth:`_Api.results` answers with."""

    def __init__(
        self, served: _Served, outputs: Collection[str], response: str, keep: Callable[[Any], Any] | None
    ) -> None:
        self.name = served.process.id
        self._served = served
        self._outputs = outputs
        self._response = response
        self._keep = keep

    async def run(self, value: Any, *, context: Any = None) -> dict[str, Any]:
        outputs = self._served.process.write(await self._served.pipeline.run(value, context=context))
        if self._keep is not None:
            await self._keep(outputs)
        return self.select(outputs)

    def select(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {name: outputs[name] for name in self._outputs if name in outputs}
        # several are an object, also when a handler has left all but one out
        return {"outputs": chosen, "response": "document" if len(self._outputs) > 1 else self._response}


class _Known:
    """The step of a job whose result is known already."""

    def __init__(self, name: str, result: Any) -> None:
        self.name = name
        self._result = result

    async def run(self, value: Any, *, context: Any = None) -> Any:
        return self._result


class _Api:
    """The endpoints, and what they share."""

    timeout: float | None
    wait: float
    cache_ttl: float | None
    cache: Cache

    def __init__(self, served: Mapping[str, _Served], runner: JobRunner, about: tuple[str, str]) -> None:
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

    def add_routes(self, router: APIRouter, context: Callable[..., Any] | None) -> None:
        def get(path: str, endpoint: Callable[..., Any], name: str, ok: Any, *problems: int) -> None:
            documented = answers(*problems, ok=ok)
            router.add_api_route(path, endpoint, name=name, responses=documented, response_model=None)

        get("/", self.landing, "landing_page", LANDING)
        get("/conformance", self.conformance, "conformance", CONFORMANCE)
        get("/processes", self.processes, "processes", PROCESSES, 400)
        get("/processes/{process_id}", self.process, "process", DESCRIPTION, 404)
        names: set[str] = set()
        for served in self.served.values():
            name = "execute_" + re.sub(r"\W", "_", served.process.id)
            while name in names:  # a-b and a.b
                name += "_"
            names.add(name)
            self._add_execution(router, served, context, name)
        router.add_api_route(
            "/processes/{process_id}/execution", self.nothing, methods=["POST"], include_in_schema=False
        )
        get("/jobs", self.jobs, "jobs", JOBS, 400)
        get("/jobs/{job_id}", self.job, "job", STATUS, 404)
        router.add_api_route(
            "/jobs/{job_id}/results",
            self.results,
            name="results",
            responses={
                **answers(404, 410, 500, ok={}),
                204: {"description": "no outputs were asked for"},
            },
            response_model=None,
        )
        router.add_api_route(
            "/jobs/{job_id}/events",
            self.events,
            name="events",
            responses={**answers(404, content=EVENTS), 204: {"description": "nothing is left to tell"}},
            response_class=StreamingResponse,
            response_model=None,
        )
        router.add_api_route(
            "/jobs/{job_id}",
            self.dismiss,
            name="dismiss",
            methods=["DELETE"],
            responses={**answers(404, ok=STATUS), **answers(ok=STATUS, status=202)},
            response_model=None,
        )
        # of a path with two routes, Starlette tells the methods of the first one only
        router.add_api_route(
            "/jobs/{job_id}", self.not_on_jobs, methods=_NOT_ON_JOBS, include_in_schema=False
        )

    def _add_execution(
        self, router: APIRouter, served: _Served, context: Callable[..., Any] | None, name: str
    ) -> None:
        async def execute(request: Request) -> Response:
            return await self.execute(served, request, None)

        async def execute_in(request: Request, context: Any = Depends(context)) -> Response:  # noqa: B008
            return await self.execute(served, request, context)

        process = served.process
        router.add_api_route(
            f"/processes/{process.id}/execution",
            execute if context is None else execute_in,
            methods=["POST"],
            name=name,
            summary=f"Execute {process.title}",
            responses={
                **answers(400, 500, 503, 504, ok=results(process)),
                **answers(ok=STATUS, status=201),
                204: {"description": "no outputs were asked for"},
            },
            openapi_extra=execution(process),
            response_model=None,
        )

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

    async def execute(self, served: _Served, request: Request, context: Any) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientDisconnected from None
        asked = ExecutionRequest(served.process, body)
        prefers = preferences(request.headers.getlist("prefer"))
        is_async = "respond-async" in prefers
        wait = self._wait(prefers.get("wait"), is_async)
        step, known = await self._step(served, asked)
        if known is not None and wait is not None:
            return _respond(known)
        if wait is None:
            job = await self.runner.submit(step, asked.value, context=context, timeout=self.timeout)
            return self._created(request, job, is_async)
        async with cancel_on_disconnect(request):
            job = await self.runner.run(step, asked.value, context=context, timeout=self.timeout, wait=wait)
        if job.status == "successful":
            return _respond(job.result)
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

    async def _step(self, served: _Served, asked: ExecutionRequest) -> tuple[Any, dict[str, Any] | None]:
        """What to run, and its result where that is known already."""
        if self.cache_ttl is None:
            return _Execution(served, asked.outputs, asked.response, None), None
        process = served.process
        key = json.dumps([process.id, process.version, asked.inputs], sort_keys=True)

        async def keep(outputs: Any) -> None:
            try:
                await self.cache.set(key, outputs, ttl=self.cache_ttl)
            except Exception as error:
                raise_cancellation(error)
                logger.exception("The cache could not store what %r gave; the run goes on", process.id)

        step = _Execution(served, asked.outputs, asked.response, keep)
        try:
            outputs = await self.cache.get(key)
        except Exception as error:
            raise_cancellation(error)
            logger.exception("The cache could not be asked for %r; it runs", process.id)
            return step, None
        if outputs is None:
            return step, None
        known = step.select(outputs)
        return _Known(process.id, known), known

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
        return _respond(job.result)

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


def _respond(result: Any) -> Response:
    """Answer with the result of a job."""
    if not _is_of_execution(result):  # of a job that the application has submitted itself
        try:
            result = to_jsonable_python(result, inf_nan_mode="null")
        except ValueError:
            raise Problem(500, "the result of this job has no form in JSON") from None
        return json_response(result)
    outputs = result["outputs"]
    if not outputs:
        return Response(status_code=204)
    if len(outputs) == 1 and result["response"] == "raw":
        (outputs,) = outputs.values()
    return json_response(outputs)


def _is_of_execution(result: Any) -> bool:
    return (
        isinstance(result, dict)
        and result.keys() == {"outputs", "response"}
        and isinstance(result["outputs"], dict)
        and result["response"] in ("raw", "document")
    )
