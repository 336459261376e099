"""Pipelines in FastAPI: runs that end with their client, and a standard HTTP surface for pipelines.

>>> app.include_router(processes_router({"resize": resize, "report": report}), prefix="/api")
"""

# no postponed annotations here: FastAPI reads the hints of the endpoints

import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

try:
    from fastapi import APIRouter, Depends, Request, Response
    from fastapi.responses import StreamingResponse
except ImportError as _missing:
    raise ImportError(
        "FastAPI support requires installing async-pipeline[fastapi]: pip install 'async-pipeline[fastapi]'"
    ) from _missing

from ..jobs import JobContext, JobRunner
from ..middlewares.cache import Cache, MemoryCache
from ..retry import check_seconds
from ..stage import as_step
from ..types import Step
from ._api import Api
from ._descriptions import read_descriptions
from ._disconnect import ClientDisconnected, ClosingStreamingResponse, cancel_on_disconnect
from ._executions import Served
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
from ._problems import ProblemRoute
from ._process import Process

__all__ = ["ClientDisconnected", "ClosingStreamingResponse", "cancel_on_disconnect", "processes_router"]

_NOT_ON_JOBS = ["HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"]


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
    _check_arguments(processes, runner, context, job_context, cache, title=title, description=description)
    said = read_descriptions(descriptions)
    for unknown in said.keys() - processes.keys():
        raise ValueError(f"descriptions has {unknown!r}, which is none of the processes")
    if timeout is not None:
        check_seconds("timeout", timeout, zero=False)
    check_seconds("wait", wait, zero=True)
    if cache_ttl is not None:
        check_seconds("cache_ttl", cache_ttl, zero=False)
    api = Api(
        {id: Served(Process(id, _checked_step(id, one), said.get(id))) for id, one in processes.items()},
        JobRunner(job_context=job_context) if runner is None else runner,
        (title, description),
    )
    api.timeout, api.wait = timeout, wait
    api.cache_ttl, api.cache = cache_ttl, MemoryCache() if cache is None else cache
    router = APIRouter(route_class=ProblemRoute, lifespan=None if runner is not None else api.lifespan)
    _add_routes(router, api, context)
    return router


def _check_arguments(
    processes: object, runner: object, context: object, job_context: object, cache: object, **texts: object
) -> None:
    if not (runner is None or isinstance(runner, JobRunner)):
        raise TypeError(f"runner must be a JobRunner, not {runner!r}; write runner=JobRunner(...)")
    for name, text in texts.items():
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


def _checked_step(id: str, pipeline: Any) -> Step[Any, Any]:
    return as_step(pipeline, f"process {id!r} must be a pipeline, or any other step")


def _add_routes(router: APIRouter, api: Api, context: Callable[..., Any] | None) -> None:
    _add_get(router, "/", api.landing, "landing_page", answers(ok=LANDING))
    _add_get(router, "/conformance", api.conformance, "conformance", answers(ok=CONFORMANCE))
    _add_get(router, "/processes", api.processes, "processes", answers(400, ok=PROCESSES))
    _add_get(router, "/processes/{process_id}", api.process, "process", answers(404, ok=DESCRIPTION))
    names: set[str] = set()
    for served in api.served.values():
        name = "execute_" + re.sub(r"\W", "_", served.process.id)
        while name in names:  # a-b and a.b
            name += "_"
        names.add(name)
        _add_execution(router, api, served, context, name)
    router.add_api_route(
        "/processes/{process_id}/execution", api.nothing, methods=["POST"], include_in_schema=False
    )
    _add_get(router, "/jobs", api.jobs, "jobs", answers(400, ok=JOBS))
    _add_job(router, api)


def _add_get(
    router: APIRouter, path: str, endpoint: Callable[..., Any], name: str, documented: dict[int | str, Any]
) -> None:
    router.add_api_route(path, endpoint, name=name, responses=documented, response_model=None)


def _add_job(router: APIRouter, api: Api) -> None:
    _add_get(router, "/jobs/{job_id}", api.job, "job", answers(404, ok=STATUS))
    of_results = {**answers(404, 410, 500, ok={}), 204: {"description": "no outputs were asked for"}}
    _add_get(router, "/jobs/{job_id}/results", api.results, "results", of_results)
    router.add_api_route(
        "/jobs/{job_id}/events",
        api.events,
        name="events",
        responses={**answers(404, content=EVENTS), 204: {"description": "nothing is left to tell"}},
        response_class=StreamingResponse,
        response_model=None,
    )
    router.add_api_route(
        "/jobs/{job_id}",
        api.dismiss,
        name="dismiss",
        methods=["DELETE"],
        responses={**answers(404, ok=STATUS), **answers(ok=STATUS, status=202)},
        response_model=None,
    )
    # of a path with two routes, Starlette tells the methods of the first one only
    router.add_api_route("/jobs/{job_id}", api.not_on_jobs, methods=_NOT_ON_JOBS, include_in_schema=False)


def _add_execution(
    router: APIRouter, api: Api, served: Served, context: Callable[..., Any] | None, name: str
) -> None:
    async def execute(request: Request) -> Response:
        return await api.execute(served, request, None)

    async def execute_in(request: Request, context: Any = Depends(context)) -> Response:  # noqa: B008
        return await api.execute(served, request, context)

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
