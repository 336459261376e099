"""What goes wrong with a request: problems by RFC 9457, of the routes of this class and of no others."""

import json
from typing import Annotated, Any

import httpx
import pytest
from fastapi import (
    APIRouter,
    Body,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import AfterValidator, PlainValidator
from pydantic_core import PydanticCustomError

from async_pipeline import Pipeline
from async_pipeline.errors import (
    DuplicateJob,
    JobNotFound,
    JobQueueFull,
    JobRunnerClosed,
)
from async_pipeline.integrations._problems import (
    OGC,
    Problem,
    ProblemRoute,
    failed,
    json_response,
    no_such_process,
)
from async_pipeline.integrations.fastapi import processes_router
from async_pipeline.jobs import JobFailure, JobRunner
from tests.integrations.asgi import client_of


def app_with(endpoint: Any, path: str = "/", **options: Any) -> FastAPI:
    router = APIRouter(route_class=ProblemRoute)
    router.add_api_route(path, endpoint, methods=["GET", "POST"], **options)
    app = FastAPI()
    app.include_router(router)
    return app


async def answer_to(error: BaseException) -> httpx.Response:
    async def endpoint() -> None:
        raise error

    async with client_of(app_with(endpoint)) as client:
        return await client.get("/")


def problem_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == response.status_code
    return problem


# -- the exceptions of this package


async def test_a_problem_is_what_it_says() -> None:
    faults = [{"pointer": "/inputs/n", "detail": "is missing"}]
    problem = Problem(
        400,
        "it is bad",
        kind="urn:bad",
        title="Bad",
        faults=faults,
        headers={"Retry-After": "7"},
    )
    response = await answer_to(problem)
    assert problem_of(response) == {
        "type": "urn:bad",
        "title": "Bad",
        "status": 400,
        "detail": "it is bad",
        "errors": faults,
    }
    assert response.headers["retry-after"] == "7"


async def test_a_problem_without_more_to_say_has_the_words_of_http() -> None:
    assert problem_of(await answer_to(Problem(410, "gone for good"))) == {
        "type": "about:blank",
        "title": "Gone",
        "status": 410,
        "detail": "gone for good",
    }


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (JobNotFound("a"), 404, f"{OGC}no-such-job", None),
        (no_such_process("a"), 404, f"{OGC}no-such-process", None),
        (DuplicateJob("a"), 409, "about:blank", None),
        (JobQueueFull(10), 503, "about:blank", "1"),
        (JobRunnerClosed(), 503, "about:blank", "1"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_errors_of_jobs_have_a_status(
    error: Exception, status: int, kind: str, retry_after: str | None
) -> None:
    response = await answer_to(error)
    problem = problem_of(response)
    assert response.status_code == status
    assert problem["type"] == kind
    assert problem["title"]
    assert problem["detail"]
    assert response.headers.get("retry-after") == retry_after


async def test_the_two_503_tell_which_it_is() -> None:
    assert "too many" in problem_of(await answer_to(JobQueueFull(10)))["detail"]
    assert "not accepting" in problem_of(await answer_to(JobRunnerClosed()))["detail"]


async def test_unknown_ids_are_named() -> None:
    assert "'who'" in problem_of(await answer_to(JobNotFound("who")))["detail"]
    assert "'what'" in problem_of(await answer_to(no_such_process("what")))["detail"]


# -- of FastAPI, and of others


async def test_wrong_parameters_are_a_400_with_a_fault_each() -> None:
    async def endpoint(
        page: int, limit: Annotated[int, Query(ge=1)], x_token: Annotated[str, Header()]
    ) -> None: ...

    async with client_of(app_with(endpoint, "/{page}")) as client:
        problem = problem_of(await client.get("/x?limit=0"))
    assert problem["status"] == 400
    places = [(fault["in"], fault["parameter"]) for fault in problem["errors"]]
    assert places == [("path", "page"), ("query", "limit"), ("header", "x-token")]
    assert all(fault["detail"] for fault in problem["errors"])


async def test_a_place_in_a_body_is_a_json_pointer() -> None:
    async def endpoint(body: Annotated[dict[str, dict[str, int]], Body()]) -> None: ...

    async with client_of(app_with(endpoint)) as client:
        problem = problem_of(await client.post("/", json={"a/b~c": {"d": "x"}}))
        whole = problem_of(await client.post("/", json=5))
    (fault,) = problem["errors"]
    assert fault["pointer"] == "/a~1b~0c/d"
    assert fault["detail"].startswith("Input should be a valid integer")
    assert whole["errors"][0]["pointer"] == ""


def own_error(value: str) -> str:
    raise PydanticCustomError("own_error", "the SECRET of {who}", {"who": value})


def value_error(value: str) -> str:
    raise ValueError(f"the SECRET of {value}")


def assertion_error(value: str) -> str:
    raise AssertionError("SECRET")


@pytest.mark.parametrize("validator", [own_error, value_error, assertion_error])
async def test_what_a_validator_raises_is_not_told(validator: Any) -> None:
    async def endpoint(
        a: Annotated[str, AfterValidator(validator)],
        b: Annotated[Any, PlainValidator(validator), Query()],
    ) -> None: ...

    async with client_of(app_with(endpoint)) as client:
        response = await client.get("/?a=1&b=2")
    assert [fault["detail"] for fault in problem_of(response)["errors"]] == ["is not valid"] * 2
    assert "SECRET" not in response.text


async def test_other_errors_are_the_application_s() -> None:
    assert (await answer_to(HTTPException(418, "tea"))).json() == {"detail": "tea"}
    with pytest.raises(ZeroDivisionError):
        await answer_to(ZeroDivisionError("SECRET"))


async def test_the_application_s_handlers_are_for_its_other_routes() -> None:
    """It may have one for a global format of errors; neither replaces the other."""

    async def endpoint(n: int) -> int:
        return n

    app = app_with(endpoint, "/ours")
    app.add_api_route("/theirs", endpoint)
    app.add_api_route("/plain/{n}", endpoint)
    handled = []

    @app.exception_handler(RequestValidationError)
    async def handle(request: Request, error: RequestValidationError) -> Response:
        handled.append(request.url.path)
        return PlainTextResponse("not so", 422)

    before = dict(app.exception_handlers)
    async with client_of(app) as client:
        assert problem_of(await client.get("/ours?n=x"))["status"] == 400
        assert (await client.get("/ours?n=1")).json() == 1
        theirs = await client.get("/theirs?n=x")
        await client.get("/plain/x")
    assert (theirs.status_code, theirs.text) == (422, "not so")
    assert handled == ["/theirs", "/plain/x"]
    assert app.exception_handlers == before


async def test_faults_of_a_dependency_are_problems_as_well() -> None:
    async def token(x_token: Annotated[str, Header()]) -> str:
        return x_token

    async def endpoint(token: Annotated[str, Depends(token)]) -> str:
        return token

    async with client_of(app_with(endpoint)) as client:
        assert problem_of(await client.get("/"))["errors"][0]["parameter"] == "x-token"


# -- failures of a run


@pytest.mark.parametrize(
    ("kind", "waiting", "later"),
    [
        ("ValueError", 500, 500),
        ("TimeoutError", 500, 500),
        ("DeadlineExceeded", 504, 500),
        ("StageTimeoutError", 504, 500),
        ("JobRunnerClosed", 503, 500),
        ("WorkerLost", 500, 500),
    ],
)
def test_a_failure_has_a_status(kind: str, waiting: int, later: int) -> None:
    failure = JobFailure(kind, "SECRET")
    for is_waiting, status in ((True, waiting), (False, later)):
        problem = failed(failure, is_waiting=is_waiting)
        assert problem.status == problem.content["status"] == status
        assert (problem.headers == {"Retry-After": "1"}) is (status == 503)
        assert problem.content["detail"] == f"the run failed with {kind}"
        assert b"SECRET" not in problem.response().body


@pytest.mark.parametrize(
    ("failure", "detail"),
    [
        (JobFailure("KeyError", "SECRET", "a/b"), "stage 'a/b' failed with KeyError"),
        (
            JobFailure("KeyError", "SECRET", "a", 3),
            "stage 'a' failed with KeyError after 3 attempts",
        ),
        (
            JobFailure("KeyError", "SECRET", None, 2),
            "the run failed with KeyError after 2 attempts",
        ),
    ],
)
def test_a_failure_tells_stage_class_and_attempts(failure: JobFailure, detail: str) -> None:
    assert failed(failure, is_waiting=True).content["detail"] == detail


# -- JSON


def test_json_is_short_and_ascii() -> None:
    response = json_response({"ä": ["\ud800", 1]}, 201, {"X-A": "b"})
    assert response.body == b'{"\\u00e4":["\\ud800",1]}'
    assert json.loads(bytes(response.body)) == {"ä": ["\ud800", 1]}
    assert response.status_code == 201
    assert response.headers["x-a"] == "b"
    assert response.headers["content-type"] == "application/json"


async def test_a_runner_that_nobody_has_entered_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    app.include_router(processes_router({"same": Pipeline([str])}, runner=JobRunner()), prefix="/api")
    async with client_of(app) as client:
        answer = await client.get("/api/jobs")
    assert answer.status_code == 503
    (record,) = caplog.records
    assert record.getMessage().startswith("GET /api/jobs: the JobRunner is not running; use it inside")
