"""What goes wrong with a request, as the JSON of RFC 9457."""

import json
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import Any, get_args

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import core_schema
from starlette.types import Receive, Scope, Send

from ..errors import DuplicateJob, JobNotFound, JobQueueFull, JobRunnerClosed
from ..events import logger
from ..jobs import JobFailure

__all__ = [
    "OGC",
    "RETRY_AFTER",
    "Problem",
    "ProblemRoute",
    "failed",
    "json_response",
    "no_such_process",
    "not_allowed",
]

OGC = "http://www.opengis.net/def/exceptions/ogcapi-processes-1/1.0/"
RETRY_AFTER = 1
"""Seconds after which a client may ask again."""

_WORDS_FOR_PYDANTIC = frozenset(get_args(core_schema.ErrorType)) - {
    # these have the text of an exception in them
    *("value_error", "assertion_error", "get_attribute_error", "iteration_error", "mapping_type"),
}
_TIMEOUTS = ("DeadlineExceeded", "StageTimeoutError")


def json_response(
    content: Any,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    """Return a response; in ASCII, because a text may have halves of surrogate pairs."""
    text = json.dumps(content, separators=(",", ":"))
    return Response(text, status, dict(headers or {}), media_type)


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it so
    """What to answer a request with; ``faults`` are the places in it, each with what is wrong there."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str = "about:blank",
        title: str | None = None,
        faults: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.content = {
            "type": kind,
            "title": HTTPStatus(status).phrase if title is None else title,
            "status": status,
            "detail": detail,
            **({"errors": list(faults)} if faults else {}),
        }
        self.status = status
        self.headers = headers

    def response(self) -> Response:
        return json_response(self.content, self.status, self.headers, "application/problem+json")


class ProblemRoute(APIRoute):
    """A route whose errors are problems, whatever the application does with those of its other routes."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Problem as problem:
                return problem.response()
            except (
                RequestValidationError,
                JobNotFound,
                DuplicateJob,
                JobQueueFull,
                JobRunnerClosed,
            ) as error:
                if isinstance(error, JobRunnerClosed):  # most likely somebody has forgotten to enter it
                    logger.error("%s %s: %s", request.method, request.scope["path"], error)
                return _problem_of(error).response()

        return answer

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods: Collection[str] = self.methods or ()
        if scope["method"] in methods:
            await super().handle(scope, receive, send)
        else:
            await not_allowed(scope["method"], methods).response()(scope, receive, send)


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, RequestValidationError):
        return Problem(400, "the request is not valid", faults=[_fault(each) for each in error.errors()])
    if isinstance(error, JobNotFound):
        return Problem(404, str(error), kind=f"{OGC}no-such-job", title="No such job")
    if isinstance(error, DuplicateJob):
        return Problem(409, str(error))
    headers = {"Retry-After": str(RETRY_AFTER)}
    if isinstance(error, JobQueueFull):
        return Problem(503, "too many jobs are waiting; try again later", headers=headers)
    return Problem(503, "the service is not accepting jobs; try again later", headers=headers)


def _fault(error: Mapping[str, Any]) -> dict[str, str]:
    """What FastAPI says of a parameter."""
    place, *path = (str(part) for part in error["loc"])
    detail = str(error["msg"]) if error["type"] in _WORDS_FOR_PYDANTIC else "is not valid"
    if path == ["datetime"]:
        detail = "must be like 2026-11-21T12:00:00Z, or two such times with a slash between; .. is no bound"
    if place == "body":
        return {"pointer": "".join(f"/{_escaped(part)}" for part in path), "detail": detail}
    return {"parameter": path[0], "in": place, "detail": detail}  # also of one in a list


def _escaped(part: str) -> str:
    """A step of a JSON pointer, by RFC 6901."""
    return part.replace("~", "~0").replace("/", "~1")


def no_such_process(process_id: str) -> Problem:
    return Problem(
        404, f"there is no process {process_id!r}", kind=f"{OGC}no-such-process", title="No such process"
    )


def not_allowed(method: str, allowed: Collection[str]) -> Problem:
    headers = {"Allow": ", ".join(sorted(allowed))}
    return Problem(405, f"{method} is not allowed here", headers=headers)


def failed(failure: JobFailure, *, is_waiting: bool) -> Problem:
    """The problem that a run's failure is; of the exception, its class alone.

    For who waits for the run, a time limit is a 504 and the end of the server a 503; who asks for the results
    of a job that has failed gets a 500.
    """
    where = "the run" if failure.stage is None else f"stage {failure.stage!r}"
    attempts = f" after {failure.attempts} attempts" if failure.attempts > 1 else ""
    detail = f"{where} failed with {failure.type}{attempts}"
    if is_waiting and failure.type == "JobRunnerClosed":
        return Problem(503, detail, headers={"Retry-After": str(RETRY_AFTER)})
    return Problem(504 if is_waiting and failure.type in _TIMEOUTS else 500, detail)
