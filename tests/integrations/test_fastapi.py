"""The routes of OGC API - Processes, in the process of the test; a real server has tests of its own."""

# no postponed annotations here: FastAPI reads the hints of the endpoints

import ast
import asyncio
import importlib
import importlib.util
import json
import logging
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Request,
    Response,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, Field, PlainSerializer
from typing_extensions import TypedDict

from async_pipeline import Finish, Pipeline, Stage
from async_pipeline.integrations import fastapi as module
from async_pipeline.integrations.fastapi import processes_router
from async_pipeline.jobs import Job, JobRunner, MemoryJobStore, report_progress
from async_pipeline.middlewares.cache import MemoryCache
from tests.helpers import run_virtually
from tests.integrations.asgi import HOST, Exchange, client_of

OGC = "http://www.opengis.net/def/exceptions/ogcapi-processes-1/1.0/"
REL = "http://www.opengis.net/def/rel/ogc/1.0/"
ASYNC = {"Prefer": "respond-async"}
SECRET = "hunter2"  # what no client is told

pytestmark = pytest.mark.filterwarnings(
    "ignore:The `root_path` parameter is deprecated"  # of the newest FastAPI, in favour of the server's
)


# -- processes


class Order(TypedDict):
    item: str
    count: NotRequired[int]


class Bill(TypedDict):
    text: str
    total: float
    note: NotRequired[str]


@dataclass
class Box:
    width: int
    height: int = 2
    tags: list[str] = field(default_factory=list)


class Size(BaseModel):
    area: Annotated[int, Field(ge=0, title="Area in mm²")]


def double(n: int) -> int:
    """Twice a number."""
    return 2 * n


async def bill(order: Order) -> Bill:
    count = order.get("count", 1)
    written: Bill = {"text": f"{count} {order['item']}", "total": 1.5 * count}
    if count > 9:
        written["note"] = "many"
    return written


async def measure(box: Box) -> Size:
    return Size(area=box.width * box.height)


async def grow(size: Size) -> Box:
    return Box(size.area, size.area + 1)


async def greet(name: Annotated[str, Field(min_length=1)] = "you", context: Any = None) -> str:
    return f"hello {name} in {(context or {}).get('language', '?')}"


async def rest(seconds: float) -> str:
    report_progress(0.5, "resting")
    await asyncio.sleep(seconds)
    return "rested"


PROCESSES = {
    "double": Pipeline([double]),
    "bill": Pipeline([bill], name="a bill"),
    "measure": Pipeline([measure]),
    "grow": Pipeline([grow]),
    "greet": Pipeline([greet]),
    "rest": Pipeline([rest]),
}


def just(*names: str) -> dict[str, Pipeline[Any, Any]]:
    """Some of the processes: it takes a while to read them all."""
    return {name: PROCESSES[name] for name in names}


TWO = just("double", "rest")


def app_of(
    processes: Mapping[str, Any] = TWO,
    prefix: str = "/api",
    app: FastAPI | None = None,
    **options: Any,
) -> FastAPI:
    app = FastAPI() if app is None else app
    app.include_router(processes_router(processes, **options), prefix=prefix)
    return app


async def execute(
    client: httpx.AsyncClient,
    process: str,
    *inputs: Any,
    headers: Any = None,
    base: str = "/api",
    **body: Any,
) -> httpx.Response:
    if inputs:
        body["inputs"] = inputs[0]
    return await client.post(f"{base}/processes/{process}/execution", json=body, headers=headers)


def problem_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["type"]
    return problem


def pointers_of(response: httpx.Response) -> list[str]:
    return [fault["pointer"] for fault in problem_of(response, 400)["errors"]]


def link_of(content: Mapping[str, Any], rel: str) -> Any:
    return next((link["href"] for link in content["links"] if link["rel"] == rel), None)


async def ended(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """The statusInfo of a job, as soon as it has ended."""
    pause = 0.001
    while "finished" not in (info := (await client.get(url)).json()):
        await asyncio.sleep(pause)
        pause = min(1.0, 2 * pause)
    return cast("dict[str, Any]", info)


# -- the landing page, and what it claims


async def test_the_landing_page_leads_everywhere() -> None:
    app = app_of(title="Ours", description="What we do")
    async with client_of(app) as client:
        response = await client.get("/api/")
        assert response.headers["content-type"] == "application/json"
        assert response.headers["vary"] == "Accept"
        about = response.json()
        assert (about["title"], about["description"]) == ("Ours", "What we do")
        found = {(link["rel"], link["type"]): link["href"] for link in about["links"]}
        assert found == {
            ("self", "application/json"): f"{HOST}/api/",
            ("alternate", "text/html"): f"{HOST}/api/",
            (f"{REL}conformance", "application/json"): f"{HOST}/api/conformance",
            (f"{REL}processes", "application/json"): f"{HOST}/api/processes",
            (f"{REL}job-list", "application/json"): f"{HOST}/api/jobs",
            (
                "service-desc",
                "application/vnd.oai.openapi+json;version=3.1",
            ): f"{HOST}/openapi.json",
        }
        for (_, kind), href in found.items():
            answer = await client.get(href, headers={"Accept": kind})
            assert answer.status_code == 200
            assert answer.headers["content-type"].partition(";")[0] in (
                kind,
                "application/json",
            )


async def test_the_title_may_be_left_out() -> None:
    async with client_of(app_of({})) as client:
        about = (await client.get("/api/")).json()
    assert (about["title"], about["description"]) == ("Pipelines", "")


async def test_there_is_no_link_to_a_document_that_is_switched_off() -> None:
    async with client_of(app_of(app=FastAPI(openapi_url=None))) as client:
        assert link_of((await client.get("/api/")).json(), "service-desc") is None


async def test_only_what_is_tested_is_claimed() -> None:
    async with client_of(app_of()) as client:
        content = (await client.get("/api/conformance")).json()
    classes = ("core", "json", "ogc-process-description", "job-list", "dismiss")
    base = "http://www.opengis.net/spec/ogcapi-processes-1/1.0/conf"
    assert content == {"conformsTo": [f"{base}/{name}" for name in classes]}


CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "is_html"),
    [
        ([], False),
        ([""], False),
        (["*/*"], False),
        (["application/json"], False),
        (["text/*"], False),
        (["text/html"], True),
        (["TEXT/HTML"], True),
        (["text/html; charset=utf-8"], True),
        ([CHROMIUM], True),
        (["text/html, */*"], True),
        (["text/html, application/*"], True),
        (["text/html, application/json"], False),
        (["application/json, text/html"], False),
        (["application/json;q=0.9, text/html"], True),
        (["application/json, text/html;q=0.9"], False),
        (["text/html;q=0.5, */*"], False),
        (["text/html;q=0.5, application/*;q=0.4, */*"], True),
        (["text/html;level=1;q=0.2, application/json;q=0.1"], True),
        (["text/html;q=0"], False),
        (["text/html;q=0, */*;q=0"], False),
        (["text/html;q=nonsense"], False),
        (["text/html;Q=0.5, application/json;q=0.6"], False),
        (["application/xml", "text/html"], True),
    ],
)
async def test_who_prefers_html_gets_the_page(accept: list[str], is_html: bool) -> None:
    async with client_of(app_of({})) as client:
        del client.headers["accept"]
        response = await client.get("/api/", headers=[("Accept", value) for value in accept])
    kind = "text/html; charset=utf-8" if is_html else "application/json"
    assert response.headers["content-type"] == kind
    assert response.headers["vary"] == "Accept"


async def test_the_page_shows_processes_and_jobs_under_a_policy_of_its_own() -> None:
    async with client_of(app_of(PROCESSES, title="<Ours>", description="What & why")) as client:
        job = (await execute(client, "rest", {"seconds": 0}, headers=ASYNC)).json()["jobID"]
        first = await client.get("/api/", headers={"Accept": "text/html"})
        second = await client.get("/api/", headers={"Accept": "text/html"})
    assert "&lt;Ours&gt;" in first.text
    assert "<Ours>" not in first.text
    assert "What &amp; why" in first.text
    assert "Twice a number." in first.text
    assert 'href="/api/processes/bill"' in first.text
    assert f"/api/jobs/{job}" in first.text
    assert escape(str(PROCESSES["bill"])) in first.text  # its picture
    assert first.headers["cache-control"] == "no-store"
    nonces = []
    for page in (first, second):
        directives = dict(
            part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
        )
        assert directives["default-src"] == "'none'"
        assert directives["script-src"] == directives["style-src"]
        nonces.append(directives["script-src"].removeprefix("'nonce-").removesuffix("'"))
        assert page.text.count(f'nonce="{nonces[-1]}"') == 2
    assert nonces[0] != nonces[1]
    assert len(nonces[0]) >= 20


async def test_the_page_has_the_50_latest_jobs() -> None:
    runner = JobRunner()
    async with runner, client_of(app_of(runner=runner)) as client:
        for number in range(51):
            await runner.submit(double, number, job_id=f"job-{number}-")
        page = (await client.get("/api/", headers={"Accept": "text/html"})).text
    assert "job-50-" in page
    assert "job-1-" in page
    assert "job-0-" not in page


# -- processes


async def test_processes_are_listed_with_their_links() -> None:
    async with client_of(app_of(PROCESSES)) as client:
        content = (await client.get("/api/processes")).json()
        assert [process["id"] for process in content["processes"]] == list(PROCESSES)
        for process in content["processes"]:
            assert process["version"] == "1.0.0"
            assert process["jobControlOptions"] == [
                "sync-execute",
                "async-execute",
                "dismiss",
            ]
            assert process["outputTransmission"] == ["value"]
            assert "inputs" not in process
            assert link_of(process, "self") == f"{HOST}/api/processes/{process['id']}"
            assert link_of(process, f"{REL}execute") == f"{HOST}/api/processes/{process['id']}/execution"
            described = await client.get(link_of(process, "self"))
            assert described.status_code == 200
            assert {**described.json(), "inputs": 0, "outputs": 0} == {
                **process,
                "inputs": 0,
                "outputs": 0,
            }
    assert [link["rel"] for link in content["links"]] == ["self"]


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7])
async def test_the_links_walk_all_processes_forth_and_back(limit: int) -> None:
    async with client_of(app_of(PROCESSES)) as client:
        await check_walk(client, f"/api/processes?limit={limit}", "processes", list(PROCESSES), limit)


async def check_walk(client: httpx.AsyncClient, url: str, what: str, all_ids: list[str], limit: int) -> None:
    key = "id" if what == "processes" else "jobID"
    pages, urls = [], [url]
    while True:
        content = (await client.get(urls[-1])).json()
        pages.append([entry[key] for entry in content[what]])
        assert (await client.get(link_of(content, "self"))).json() == content
        following = link_of(content, "next")
        if following is None:
            break
        urls.append(following)
    assert [len(page) for page in pages[:-1]] == [limit] * (len(pages) - 1)
    assert 0 < len(pages[-1]) <= limit
    assert list(chain.from_iterable(pages)) == all_ids
    for page in reversed(pages[:-1]):
        content = (await client.get(link_of(content, "prev"))).json()
        assert [entry[key] for entry in content[what]] == page
    assert link_of(content, "prev") is None


@pytest.mark.parametrize("what", ["processes", "jobs"])
@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=x",
        "limit=",
        "limit=1.5",
        "limit=true",
        "limit=" + "9" * 5000,
        "offset=-1",
        "offset=x",
        "offset=",
        "limit=x&offset=x",
    ],
)
async def test_limit_and_offset_are_checked(what: str, query: str) -> None:
    async with client_of(app_of()) as client:
        problem = problem_of(await client.get(f"/api/{what}?{query}"), 400)
    wrong = [part.partition("=")[0] for part in query.split("&")]
    assert [(fault["in"], fault["parameter"]) for fault in problem["errors"]] == [
        ("query", name) for name in wrong
    ]
    assert all(fault["detail"] for fault in problem["errors"])


async def test_limit_and_offset_have_no_end() -> None:
    async with client_of(app_of()) as client:
        for what in ("processes", "jobs"):
            content = (await client.get(f"/api/{what}?limit={10**30}&offset={10**30}")).json()
            assert content[what] == []
            assert link_of(content, "next") is None
            assert f"limit=1000&offset={2**62}" in link_of(content, "self")
            content = (await client.get(f"/api/{what}")).json()
            assert "limit=100&offset=0" in link_of(content, "self")


async def test_no_more_than_1000_are_listed() -> None:
    runner = JobRunner(max_pending=2000, concurrency=1, drain=0, ttl=1e9, keep=2000)
    async with (
        runner,
        client_of(app_of({f"p{n}": PROCESSES["double"] for n in range(3)}, runner=runner)) as client,
    ):
        for number in range(1002):
            await runner.submit(double, number)
        content = (await client.get("/api/jobs?limit=5000")).json()
        assert len(content["jobs"]) == 1000
        assert "limit=1000&offset=1000" in link_of(content, "next")
        assert len((await client.get(link_of(content, "next"))).json()["jobs"]) == 2


def schema_of(description: Any, name: str) -> Any:
    return description["inputs"][name]["schema"]


async def test_a_process_is_described_by_its_hints() -> None:
    async with client_of(app_of(PROCESSES)) as client:
        found = {name: (await client.get(f"/api/processes/{name}")).json() for name in PROCESSES}
    assert found["double"]["description"] == "Twice a number."
    assert found["bill"]["title"] == "a bill"
    assert schema_of(found["double"], "n") == {"type": "integer"}
    assert found["double"]["outputs"]["result"]["schema"] == {"type": "integer"}
    assert schema_of(found["bill"], "item")["type"] == "string"
    assert {name: entry["minOccurs"] for name, entry in found["bill"]["inputs"].items()} == {
        "item": 1,
        "count": 0,
    }
    assert list(found["bill"]["outputs"]) == ["text", "total", "note"]
    assert {name: entry["minOccurs"] for name, entry in found["measure"]["inputs"].items()} == {
        "width": 1,
        "height": 0,
        "tags": 0,
    }
    assert found["measure"]["outputs"]["area"]["title"] == "Area in mm²"
    assert schema_of(found["grow"], "area")["minimum"] == 0
    assert schema_of(found["greet"], "name")["minLength"] == 1
    assert found["greet"]["inputs"]["name"]["minOccurs"] == 0


DESCRIBED = {
    "double": {
        "title": "Doubling",
        "version": "2.1.0",
        "keywords": ["number"],
        "inputs": {"n": {"title": "A number", "schema": {"type": "integer", "maximum": 5}}},
        "outputs": {"result": {"description": "twice as much"}},
    }
}
AS_YAML = """
double:
  title: Doubling
  version: "2.1.0"
  keywords: [number]
  inputs:
    n: {title: A number, schema: {type: integer, maximum: 5}}
  outputs:
    result:
      description: twice as much
"""


@pytest.mark.parametrize("form", ["mapping", "json", "yaml", "yml", "str"])
async def test_descriptions_stand_above_the_hints(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"described.{'json' if form == 'str' else form}"
    path.write_text(AS_YAML if form in ("yaml", "yml") else json.dumps(DESCRIBED))
    given = DESCRIBED if form == "mapping" else str(path) if form == "str" else path
    async with client_of(app_of(just("double", "measure"), descriptions=given)) as client:
        found = (await client.get("/api/processes/double")).json()
        other = (await client.get("/api/processes/measure")).json()
        assert (await execute(client, "double", {"n": 6})).json() == 12  # it describes only
    assert (found["title"], found["version"], found["keywords"]) == (
        "Doubling",
        "2.1.0",
        ["number"],
    )
    assert found["inputs"]["n"]["title"] == "A number"
    assert schema_of(found, "n") == {"type": "integer", "maximum": 5}
    assert found["outputs"]["result"]["description"] == "twice as much"
    assert other["version"] == "1.0.0"


async def test_unknown_processes_are_problems() -> None:
    async with client_of(app_of()) as client:
        for response in (
            await client.get("/api/processes/nothing"),
            await execute(client, "nothing", {}),
            await client.post("/api/processes/nothing/execution", content=b"no JSON"),
        ):
            problem = problem_of(response, 404)
            assert problem["type"] == f"{OGC}no-such-process"
            assert "'nothing'" in problem["detail"]


async def test_unknown_jobs_are_problems() -> None:
    async with client_of(app_of()) as client:
        for response in (
            await client.get("/api/jobs/nobody"),
            await client.get("/api/jobs/nobody/results"),
            await client.get("/api/jobs/nobody/events"),
            await client.delete("/api/jobs/nobody"),
        ):
            problem = problem_of(response, 404)
            assert problem["type"] == f"{OGC}no-such-job"
            assert "'nobody'" in problem["detail"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", ["GET"]),
        ("/conformance", ["GET"]),
        ("/processes", ["GET"]),
        ("/processes/double", ["GET"]),
        ("/processes/double/execution", ["POST"]),
        ("/processes/nothing/execution", ["POST"]),
        ("/jobs", ["GET"]),
        ("/jobs/a", ["DELETE", "GET"]),
        ("/jobs/a/results", ["GET"]),
        ("/jobs/a/events", ["GET"]),
    ],
)
async def test_other_methods_are_problems(path: str, allowed: list[str]) -> None:
    async with client_of(app_of()) as client:
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {*allowed}:
            response = await client.request(method, f"/api{path}")
            assert method in problem_of(response, 405)["detail"]
            assert response.headers["allow"] == ", ".join(allowed)
        for method in allowed:
            assert (await client.request(method, f"/api{path}")).status_code != 405


# -- execution while the client waits


@pytest.mark.parametrize(
    ("process", "inputs", "result"),
    [
        ("double", {"n": 3}, 6),
        ("double", {"n": 3.0}, 6),
        ("bill", {"item": "pie"}, {"text": "1 pie", "total": 1.5}),
        (
            "bill",
            {"item": "pie", "count": 10},
            {"text": "10 pie", "total": 15.0, "note": "many"},
        ),
        ("measure", {"width": 3}, 6),
        ("measure", {"width": 3, "height": 5, "tags": ["a"]}, 15),
        ("grow", {"area": 4}, {"width": 4, "height": 5, "tags": []}),
        ("greet", {"name": "Ada"}, "hello Ada in ?"),
        ("greet", {}, "hello you in ?"),
        ("double", {"n": {"value": 4}}, 8),
    ],
)
async def test_inputs_become_outputs(process: str, inputs: Any, result: Any) -> None:
    async with client_of(app_of(just(process))) as client:
        response = await execute(client, process, inputs)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.json() == result
        assert (await client.get("/api/jobs")).json()["jobs"] == []  # it is nobody else's


async def test_no_inputs_need_no_inputs() -> None:
    async with client_of(app_of(just("greet"))) as client:
        assert (await execute(client, "greet")).json() == "hello you in ?"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("process", "inputs", "body", "content"),
    [
        ("bill", {"item": "pie"}, {}, {"text": "1 pie", "total": 1.5}),
        ("bill", {"item": "pie"}, {"outputs": {"total": {}}}, 1.5),
        (
            "bill",
            {"item": "pie"},
            {
                "outputs": {"total": {"transmissionMode": "value"}},
                "response": "document",
            },
            {"total": 1.5},
        ),
        (
            "bill",
            {"item": "pie"},
            {"outputs": {"total": {}, "text": {}}},
            {"text": "1 pie", "total": 1.5},
        ),
        # two were asked for, so that it is an object, although the handler gives but one of them
        (
            "bill",
            {"item": "pie"},
            {"outputs": {"total": {}, "note": {}}},
            {"total": 1.5},
        ),
        ("bill", {"item": "pie"}, {"outputs": {"note": {}}}, None),
        ("bill", {"item": "pie"}, {"outputs": {}}, None),
        ("bill", {"item": "pie"}, {"outputs": {}, "response": "document"}, None),
        ("double", {"n": 1}, {}, 2),
        ("double", {"n": 1}, {"response": "raw"}, 2),
        ("double", {"n": 1}, {"response": "document"}, {"result": 2}),
        ("double", {"n": 1}, {"outputs": {"result": {}}}, 2),
        ("double", {"n": 1}, {"outputs": {}}, None),
    ],
)
async def test_outputs_are_those_that_were_asked_for(
    process: str, inputs: Any, body: Any, content: Any, is_async: bool
) -> None:
    async with client_of(app_of(just(process))) as client:
        response = await execute(client, process, inputs, headers=ASYNC if is_async else None, **body)
        if is_async:
            assert response.status_code == 201
            job = await ended(client, response.headers["location"])
            response = await client.get(link_of(job, f"{REL}results"))
    if content is None:
        assert (response.status_code, response.content) == (204, b"")
    else:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        assert response.json() == content


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"inputs": {"n": NaN}}', b"[" * 100_000, b"\xef\xbb\xbf{}"],
)
async def test_a_body_that_is_not_json_is_a_problem(body: bytes) -> None:
    async with client_of(app_of()) as client:
        problem = problem_of(await client.post("/api/processes/double/execution", content=body), 400)
    assert problem["detail"] == "the body is not JSON"


@pytest.mark.parametrize("body", ["[]", "5", "null", '"{}"', "true"])
async def test_a_body_that_is_no_object_is_a_problem(body: str) -> None:
    async with client_of(app_of(just("greet"))) as client:
        response = await client.post("/api/processes/greet/execution", content=body)
    assert pointers_of(response) == [""]


@pytest.mark.parametrize(
    ("process", "body", "pointers"),
    [
        ("double", {}, ["/inputs", "/inputs/n"]),
        ("double", {"inputs": {}}, ["/inputs/n"]),
        ("double", {"inputs": None}, ["/inputs"]),
        ("double", {"inputs": [1]}, ["/inputs"]),
        ("double", {"inputs": {"n": "1"}}, ["/inputs/n"]),
        ("double", {"inputs": {"n": True}}, ["/inputs/n"]),
        ("double", {"inputs": {"n": 1.5}}, ["/inputs/n"]),
        ("double", {"inputs": {"n": None}}, ["/inputs/n"]),
        ("double", {"inputs": {"n": 1, "a/b~": 2}}, ["/inputs/a~1b~0"]),
        ("double", {"inputs": {"n": {"href": "http://a"}}}, ["/inputs/n"]),
        (
            "bill",
            {"inputs": {"count": "x", "other": 1}},
            ["/inputs/count", "/inputs/item", "/inputs/other"],
        ),
        ("measure", {"inputs": {"width": 1, "tags": ["a", 2]}}, ["/inputs/tags/1"]),
        ("grow", {"inputs": {"area": -1}}, ["/inputs/area"]),
        ("greet", {"inputs": {"name": ""}}, ["/inputs/name"]),
        ("double", {"inputs": {"n": 1}, "outputs": []}, ["/outputs"]),
        ("double", {"inputs": {"n": 1}, "outputs": None}, ["/outputs"]),
        ("double", {"inputs": {"n": 1}, "outputs": {"x/~": {}}}, ["/outputs/x~1~0"]),
        ("double", {"inputs": {"n": 1}, "outputs": {"result": 1}}, ["/outputs/result"]),
        (
            "double",
            {
                "inputs": {"n": 1},
                "outputs": {"result": {"transmissionMode": "reference"}},
            },
            ["/outputs/result/transmissionMode"],
        ),
        ("double", {"inputs": {"n": 1}, "response": "else"}, ["/response"]),
        ("double", {"inputs": {"n": 1}, "response": ["raw"]}, ["/response"]),
        ("double", {"inputs": {"n": 1}, "response": None}, ["/response"]),
        (
            "double",
            {"inputs": {"n": 1}, "subscriber": {"successUri": "http://a"}},
            ["/subscriber"],
        ),
        ("double", {"inputs": {"n": 1}, "subscriber": None}, ["/subscriber"]),
        (
            "double",
            {"outputs": {"x": {}}, "response": 1, "subscriber": 1},
            ["/inputs", "/inputs/n", "/outputs/x", "/response", "/subscriber"],
        ),
    ],
)
async def test_each_fault_of_a_request_is_pointed_at(process: str, body: Any, pointers: list[str]) -> None:
    async with client_of(app_of(just(process))) as client:
        for headers in ({}, ASYNC):
            response = await execute(client, process, headers=headers, **body)
            assert sorted(pointers_of(response)) == pointers
            assert all(fault["detail"] for fault in response.json()["errors"])
        assert (await client.get("/api/jobs")).json()["jobs"] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.binary(max_size=50) | (
    JSON | st.fixed_dictionaries({}, optional={"inputs": JSON, "outputs": JSON, "response": JSON})
).map(lambda value: json.dumps(value).encode())


@settings(max_examples=60, deadline=None)
@given(process=st.sampled_from(sorted(PROCESSES)), bodies=st.lists(BODIES, max_size=5))
def test_no_body_brings_more_than_a_400(process: str, bodies: list[bytes]) -> None:
    async def main() -> None:
        async with client_of(app_of(just(process), wait=0.0)) as client:
            for body in bodies:
                response = await client.post(f"/api/processes/{process}/execution", content=body)
                assert response.status_code in (200, 201, 204) or problem_of(response, 400)

    run_virtually(main())


async def test_raw_bytes_of_a_query_are_no_trouble() -> None:
    app = app_of()
    async with client_of(app):
        for url in ("/api/processes", "/api/jobs", "/api/"):
            async with Exchange(app, "GET", url, scope={"query_string": b"a=\xff&%ff=%ff"}) as exchange:
                assert await exchange.began() == 200


@pytest.mark.virtual
async def test_a_client_that_leaves_ends_the_run() -> None:
    seen = []

    async def wait(n: int) -> int:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return n

    app = app_of({"wait": Pipeline([wait])}, wait=50)
    async with client_of(app) as client:
        url = "/api/processes/wait/execution"
        async with Exchange(app, "POST", url, body=b'{"inputs": {"n": 1}}') as exchange:
            await asyncio.sleep(1)
            exchange.leave()
            await exchange.task
        assert seen == ["cancelled"]
        assert (await client.get("/api/jobs")).json()["jobs"] == []


async def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours() -> None:
    app = app_of()
    async with (
        client_of(app),
        Exchange(app, "POST", "/api/processes/double/execution", body=None) as exchange,
    ):
        await exchange.task
    assert exchange.status in (0, 499)


# -- what fails


class Unwritable(BaseModel):
    value: Annotated[int, PlainSerializer(lambda value: fail(value))]


def refuse(n: int) -> int:
    raise ValueError(f"{SECRET} in a validator")


def fail(value: Any) -> Any:
    try:
        raise KeyError(f"{SECRET} in a cause")
    except KeyError as cause:
        error = ValueError(f"{SECRET} in a message")
        error.add_note(f"{SECRET} in a note")
        raise error from cause


async def unwritable(n: int) -> Unwritable:
    return Unwritable(value=n)


FAILING = {
    "fail": Pipeline([double, fail]),
    "inside": Pipeline([Pipeline([fail], name="inner")]),
    "again": Pipeline([Stage("again", fail, retries=2)]),
    "unwritable": Pipeline([unwritable]),
}


@pytest.fixture
def no_log() -> Iterator[None]:
    logging.getLogger("async_pipeline").disabled = True
    yield
    logging.getLogger("async_pipeline").disabled = False


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize(
    ("process", "detail"),
    [
        ("fail", "stage 'fail' failed with ValueError"),
        ("inside", "stage 'inner/fail' failed with ValueError"),
        ("again", "stage 'again' failed with ValueError after 3 attempts"),
        ("unwritable", "the run failed with PydanticSerializationError"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0])
async def test_a_failure_is_told_by_its_class_alone(process: str, detail: str, timeout: float | None) -> None:
    name = "value" if process in ("inside", "again") else "n"
    async with client_of(app_of({process: FAILING[process]}, timeout=timeout)) as client:
        response = await execute(client, process, {name: 1})
        assert problem_of(response, 500)["detail"] == detail
        accepted = await execute(client, process, {name: 1}, headers=ASYNC)
        job = await ended(client, accepted.headers["location"])
        assert (job["status"], job["message"]) == ("failed", detail)
        assert link_of(job, f"{REL}results") is None
        results = await client.get(f"/api/jobs/{job['jobID']}/results")
        assert problem_of(results, 500)["detail"] == detail
        listed = await client.get("/api/jobs")
        events = await client.get(f"/api/jobs/{job['jobID']}/events")
        page = await client.get("/api/", headers={"Accept": "text/html"})
        removed = await client.delete(f"/api/jobs/{job['jobID']}")
        assert removed.status_code == 200
        for each in (response, accepted, results, listed, events, page, removed):
            assert SECRET not in each.text + str(each.headers)


async def test_what_validators_say_is_not_told() -> None:
    async def take(n: Annotated[int, AfterValidator(refuse)]) -> int:
        return n

    async with client_of(app_of({"take": Pipeline([take])})) as client:
        response = await execute(client, "take", {"n": 1})
    assert pointers_of(response) == ["/inputs/n"]
    assert response.json()["errors"][0]["detail"] == "is not valid"
    assert SECRET not in response.text


async def test_a_context_that_fails_is_not_told_of() -> None:
    async def context(kind: str) -> dict[str, Any]:
        if kind == "http":
            raise HTTPException(401, "who are you?", headers={"WWW-Authenticate": "Basic"})
        if kind == "validation":
            raise RequestValidationError(
                [
                    {
                        "loc": ("header", "token"),
                        "type": "value_error",
                        "msg": SECRET,
                        "input": SECRET,
                    }
                ]
            )
        raise ValueError(SECRET)

    app = app_of(context=context)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        client_of(app),
        httpx.AsyncClient(transport=transport, base_url=HOST) as client,
    ):
        url = "/api/processes/double/execution"
        body = {"inputs": {"n": 1}}
        refused = await client.post(f"{url}?kind=http", json=body)
        assert (refused.status_code, refused.json()) == (
            401,
            {"detail": "who are you?"},
        )
        assert refused.headers["www-authenticate"] == "Basic"
        invalid = await client.post(f"{url}?kind=validation", json=body)
        assert problem_of(invalid, 400)["errors"] == [
            {"parameter": "token", "in": "header", "detail": "is not valid"}
        ]
        missing = await client.post(url, json=body)
        assert problem_of(missing, 400)["errors"][0]["parameter"] == "kind"
        failed = await client.post(f"{url}?kind=other", json=body)
        assert failed.status_code == 500
        assert (await client.get("/api/jobs")).json()["jobs"] == []
    for response in (refused, invalid, missing, failed):
        assert SECRET not in response.text


@pytest.mark.virtual
@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize(
    ("stage", "timeout", "detail"),
    [
        (Stage("rest", rest), 2, "stage 'rest' failed with DeadlineExceeded"),
        (
            Stage("rest", rest, timeout=2),
            None,
            "stage 'rest' failed with StageTimeoutError",
        ),
    ],
)
async def test_past_the_time_limit_is_a_504(stage: Any, timeout: float | None, detail: str) -> None:
    async with client_of(app_of({"rest": Pipeline([stage])}, timeout=timeout)) as client:
        assert (await execute(client, "rest", {"seconds": 1})).json() == "rested"
        assert problem_of(await execute(client, "rest", {"seconds": 5}), 504)["detail"] == detail
        accepted = await execute(client, "rest", {"seconds": 5}, headers=ASYNC)
        assert accepted.status_code == 201
        job = await ended(client, accepted.headers["location"])
        assert job["status"] == "failed"
        began, over = (datetime.fromisoformat(job[name]) for name in ("started", "finished"))
        assert over - began == timedelta(seconds=2)
        assert problem_of(await client.get(f"/api/jobs/{job['jobID']}/results"), 500)["detail"] == detail


@pytest.mark.virtual
async def test_a_full_queue_is_a_503() -> None:
    runner = JobRunner(concurrency=1, max_pending=0, drain=0)
    async with runner, client_of(app_of(runner=runner)) as client:
        assert (await execute(client, "rest", {"seconds": 99}, headers=ASYNC)).status_code == 201
        response = await execute(client, "rest", {"seconds": 99}, headers=ASYNC)
        assert "too many" in problem_of(response, 503)["detail"]
        assert response.headers["retry-after"] == "1"
        assert len((await client.get("/api/jobs")).json()["jobs"]) == 1
        assert (await execute(client, "rest", {"seconds": 1})).json() == "rested"  # beside the queue


@pytest.mark.parametrize("headers", [{}, ASYNC])
async def test_a_runner_that_is_closed_is_a_503(headers: Any) -> None:
    runner = JobRunner()
    app = app_of(runner=runner)
    async with client_of(app) as client:
        async with runner:
            assert (await execute(client, "double", {"n": 1}, headers=headers)).is_success
        response = await execute(client, "double", {"n": 1}, headers=headers)
        assert "not accepting" in problem_of(response, 503)["detail"]
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs"),
        ("GET", "/jobs/a"),
        ("GET", "/jobs/a/results"),
        ("DELETE", "/jobs/a"),
        ("GET", "/jobs/a/events"),
    ],
)
async def test_a_runner_that_nobody_has_entered_is_a_503(method: str, path: str) -> None:
    async with client_of(app_of(runner=JobRunner())) as client:
        assert problem_of(await client.request(method, f"/api{path}"), 503)


@pytest.mark.virtual
@pytest.mark.usefixtures("no_log")
async def test_who_waits_when_the_server_ends_may_come_again() -> None:
    runner = JobRunner(drain=1)
    app = app_of(runner=runner, wait=1000)
    async with client_of(app) as client:
        async with runner:
            waiting = asyncio.create_task(execute(client, "rest", {"seconds": 500}))
            await asyncio.sleep(1)
        response = await waiting
    problem_of(response, 503)
    assert response.headers["retry-after"] == "1"


async def test_an_early_end_is_a_result() -> None:
    async def stop(n: int) -> int:
        raise Finish(n + 1)

    async with client_of(app_of({"stop": Pipeline([stop, double])})) as client:
        assert (await execute(client, "stop", {"n": 1})).json() == 2


# -- jobs


async def test_who_wants_a_job_gets_one() -> None:
    async with client_of(app_of()) as client:
        response = await execute(client, "double", {"n": 4}, headers=ASYNC)
        assert response.status_code == 201
        assert response.headers["preference-applied"] == "respond-async"
        info = response.json()
        url = f"{HOST}/api/jobs/{info['jobID']}"
        assert response.headers["location"] == link_of(info, "self") == url
        assert (info["processID"], info["type"]) == ("double", "process")
        assert info["status"] in ("accepted", "running", "successful")
        assert link_of(info, "monitor") == f"{url}/events"
        info = await ended(client, url)
        assert (info["status"], info["progress"]) == ("successful", 100)
        for moment in ("created", "started", "finished", "updated"):
            assert info[moment].endswith("Z")
            assert len(info[moment]) == len("2030-06-15T12:00:00.000Z")
        assert info["created"] <= info["started"] <= info["finished"] == info["updated"]
        assert link_of(info, f"{REL}results") == f"{url}/results"
        assert (await client.get(f"{url}/results")).json() == 8
        assert (await client.get("/api/jobs")).json()["jobs"] == [info]


@pytest.mark.virtual
async def test_a_job_tells_how_far_it_is_and_has_no_results_yet() -> None:
    async with client_of(app_of({"long": Pipeline([double, rest])})) as client:
        url = (await execute(client, "long", {"n": 5}, headers=ASYNC)).headers["location"]
        await asyncio.sleep(1)
        info = (await client.get(url)).json()
        assert (info["status"], info["progress"], info["message"]) == (
            "running",
            75,
            "resting",
        )
        assert "finished" not in info
        assert link_of(info, f"{REL}results") is None
        response = await client.get(f"{url}/results")
        problem = problem_of(response, 404)
        assert problem["type"] == f"{OGC}result-not-ready"
        assert "running" in problem["detail"]
        assert response.headers["retry-after"] == "1"
        await ended(client, url)
        assert (await client.get(f"{url}/results")).json() == "rested"


@pytest.mark.virtual
async def test_a_job_that_waits_has_no_results_yet() -> None:
    runner = JobRunner(concurrency=1, drain=0)
    async with runner, client_of(app_of(runner=runner)) as client:
        await execute(client, "rest", {"seconds": 99}, headers=ASYNC)
        response = await execute(client, "rest", {"seconds": 99}, headers=ASYNC)
        assert response.json()["status"] == "accepted"
        assert "started" not in response.json()
        results = await client.get(f"{response.headers['location']}/results")
        assert problem_of(results, 404)["type"] == f"{OGC}result-not-ready"


@pytest.mark.virtual
async def test_what_takes_longer_becomes_a_job() -> None:
    loop = asyncio.get_running_loop()
    async with client_of(app_of()) as client:
        start = loop.time()
        response = await execute(client, "rest", {"seconds": 30})
        assert round(loop.time() - start, 3) == 10
        assert response.status_code == 201
        assert "preference-applied" not in response.headers
        assert response.json()["status"] == "running"
        assert response.headers["location"] == f"{HOST}/api/jobs/{response.json()['jobID']}"
        info = await ended(client, response.headers["location"])
        assert round(loop.time() - start, 1) == 30
        assert info["status"] == "successful"
        assert (await client.get(link_of(info, f"{REL}results"))).json() == "rested"


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ([], 4),
        (["wait=2"], 2),
        (["wait=0"], 0),
        (["WAIT=2"], 2),
        (['wait="2"'], 2),
        (["wait = 2 ; x=y"], 2),
        (["wait=99"], 4),
        (["wait=" + "9" * 400], 4),
        (["wait=x"], 4),
        (["wait=-1"], 4),
        (["wait=1.5"], 4),
        (["wait"], 4),
        (["wait="], 4),
        (["wait=2, wait=3"], 2),
        (["handling=lenient", "wait=2"], 2),
        (["respond-async"], None),
        (["Respond-Async"], None),
        (['respond-async=""'], None),
        (["respond-async; x=1"], None),
        (["handling=lenient, respond-async"], None),
        (["handling=lenient", "respond-async"], None),
        (["respond-async, wait=2"], 2),
        (["wait=2", "respond-async"], 2),
        (["respond-async, wait=99"], 4),
        (["respond-async, wait=x"], None),
        (["respond-asynchronously"], 4),
        (['note="a, respond-async, wait=1"'], 4),
        ([r'note="a\", respond-async"'], 4),
        ([r'note="a\", respond-async, \"b"'], 4),
        (['x" wait=2'], 4),
        (['note=a; why="respond-async"'], 4),
        (['wait="2'], 4),
        ([",,;=", '"', "wait=2"], 2),
    ],
)
async def test_how_long_a_client_waits(prefer: list[str], seconds: float | None) -> None:
    loop = asyncio.get_running_loop()
    headers = [("Prefer", value) for value in prefer]
    async with client_of(app_of(wait=4)) as client:
        start = loop.time()
        response = await execute(client, "rest", {"seconds": 20}, headers=headers)
        assert response.status_code == 201
        assert round(loop.time() - start, 3) == (seconds or 0)
        is_async = "respond-async" in ",".join(prefer).lower() and "note" not in prefer[0]
        is_async = is_async and "asynchronously" not in prefer[0]
        assert response.headers.get("preference-applied") == ("respond-async" if is_async else None)
        await client.delete(response.headers["location"])
        quick = await execute(client, "rest", {"seconds": 0.5}, headers=headers)
        assert quick.status_code == (201 if not seconds else 200)


@pytest.mark.virtual
async def test_wait_may_be_nothing() -> None:
    async with client_of(app_of(wait=0)) as client:
        assert (await execute(client, "rest", {"seconds": 1})).status_code == 201
        assert (
            await execute(client, "rest", {"seconds": 1}, headers={"Prefer": "wait=5"})
        ).status_code == 201


async def test_jobs_of_the_application_are_shown_as_well() -> None:
    class Odd:
        pass

    runner = JobRunner()
    async with runner, client_of(app_of(runner=runner)) as client:
        for job_id, result in (
            ("a", {"when": datetime(2030, 1, 1, tzinfo=UTC), "nan": float("nan")}),
            ("b", None),
            ("c", {"outputs": 5, "response": "raw"}),
            ("d", {"outputs": {}, "response": "x"}),
            ("e", Odd()),
            ("g", {"outputs": {"a": 1}, "response": "raw", "more": 2}),
            ("f ?#%ä", 1),
        ):
            await runner.submit(Pipeline([lambda value: value], name="own"), result, job_id=job_id)
        await asyncio.sleep(0.01)
        jobs = {job["jobID"]: job for job in (await client.get("/api/jobs")).json()["jobs"]}
        assert {job["processID"] for job in jobs.values()} == {"own"}
        results = {job_id: await client.get(link_of(job, f"{REL}results")) for job_id, job in jobs.items()}
        assert results["a"].json() == {"when": "2030-01-01T00:00:00Z", "nan": None}
        assert results["b"].json() is None
        assert results["c"].json() == {"outputs": 5, "response": "raw"}
        assert results["d"].json() == {"outputs": {}, "response": "x"}
        problem_of(results["e"], 500)
        assert results["g"].json() == {"outputs": {"a": 1}, "response": "raw", "more": 2}
        odd = jobs["f ?#%ä"]
        assert results["f ?#%ä"].json() == 1
        assert (await client.get(link_of(odd, "self"))).json() == odd
        assert "data: " in (await client.get(link_of(odd, "monitor"))).text
        assert link_of(
            json.loads((await client.get(link_of(odd, "monitor"))).text[:-2].partition("data: ")[2]),
            "self",
        ) == link_of(odd, "self")
        assert (await client.delete(link_of(odd, "self"))).status_code == 200


# -- the list of jobs


def known(number: int) -> Job:
    """A job, each of another kind."""
    created = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(hours=number)
    status = ("accepted", "running", "successful", "failed", "dismissed")[number % 5]
    is_over = status not in ("accepted", "running")
    return Job(
        id=f"job-{number}",
        pipeline=("double", "bill", "own")[number % 3],
        status=status,  # type: ignore[arg-type]
        created=created,
        updated=created,
        started=created if is_over else None,
        finished=created + timedelta(seconds=number % 4) if is_over else None,
    )


KNOWN = [known(number) for number in reversed(range(30))]  # the newest first


@asynccontextmanager
async def listing(prefix: str = "/api") -> AsyncIterator[httpx.AsyncClient]:
    store = MemoryJobStore()
    for job in reversed(KNOWN):
        await store.add(job)
    runner = JobRunner(store=store)
    async with runner, client_of(app_of({}, runner=runner, prefix=prefix)) as client:
        yield client


async def ids_of(client: httpx.AsyncClient, query: str) -> list[str]:
    response = await client.get(f"/api/jobs?{query}")
    assert response.status_code == 200, response.text
    return [job["jobID"] for job in response.json()["jobs"]]


def ids(wanted: Callable[[Job], bool]) -> list[str]:
    return [job.id for job in KNOWN if wanted(job)]


async def test_jobs_are_listed_the_newest_first() -> None:
    async with listing() as client:
        content = (await client.get("/api/jobs")).json()
        assert [job["jobID"] for job in content["jobs"]] == ids(lambda job: True)
        for info in content["jobs"]:
            assert (await client.get(link_of(info, "self"))).json() == info


def test_there_is_a_job_of_each_kind() -> None:
    assert len({(job.status, job.pipeline) for job in KNOWN}) == 15


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("status=failed", lambda job: job.status == "failed"),
        (
            "status=failed&status=running",
            lambda job: job.status in ("failed", "running"),
        ),
        ("status=failed,running", lambda job: job.status in ("failed", "running")),
        ("processID=own", lambda job: job.pipeline == "own"),
        ("processID=own&processID=bill", lambda job: job.pipeline in ("own", "bill")),
        ("processID=own,bill", lambda job: job.pipeline in ("own", "bill")),
        ("processID=nothing", lambda job: False),
        ("processID=", lambda job: False),
        ("type=process", lambda job: True),
        ("type=process,process&type=process", lambda job: True),
        ("datetime=2030-01-01T03:00:00Z", lambda job: job.id == "job-3"),
        ("datetime=2030-01-01T03:00:00Z/..", lambda job: int(job.id[4:]) >= 3),
        ("datetime=../2030-01-01T03:00:00%2B01:00", lambda job: int(job.id[4:]) <= 2),
        ("minDuration=2", lambda job: job.finished and int(job.id[4:]) % 4 >= 2),
        ("maxDuration=2", lambda job: job.finished and int(job.id[4:]) % 4 <= 2),
        (
            "minDuration=1&maxDuration=2",
            lambda job: job.finished and int(job.id[4:]) % 4 in (1, 2),
        ),
        (
            "minDuration=3&minDuration=1",
            lambda job: job.finished and int(job.id[4:]) % 4 >= 1,
        ),
        (
            "maxDuration=0&maxDuration=1",
            lambda job: job.finished and int(job.id[4:]) % 4 <= 1,
        ),
        (
            "status=failed&processID=own&datetime=2030-01-01T09:00:00Z/..&minDuration=0",
            lambda job: job.status == "failed" and job.pipeline == "own" and int(job.id[4:]) >= 9,
        ),
        ("other=parameter", lambda job: True),
    ],
)
async def test_jobs_are_narrowed(query: str, wanted: Callable[[Job], bool]) -> None:
    async with listing() as client:
        assert await ids_of(client, query) == ids(wanted)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("status=done", "status"),
        ("status=", "status"),
        ("status=failed,done", "status"),
        ("status=FAILED", "status"),
        ("type=service", "type"),
        ("type=", "type"),
        ("datetime=yesterday", "datetime"),
        ("datetime=", "datetime"),
        ("datetime=20%D9%A30-01-01T00:00:00Z", "datetime"),
        ("minDuration=-1", "minDuration"),
        ("minDuration=x", "minDuration"),
        ("maxDuration=0&maxDuration=1.5", "maxDuration"),
    ],
)
async def test_parameters_of_the_list_are_checked(query: str, parameter: str) -> None:
    async with listing() as client:
        problem = problem_of(await client.get(f"/api/jobs?{query}"), 400)
    assert [(fault["in"], fault["parameter"]) for fault in problem["errors"]] == [("query", parameter)]
    assert problem["errors"][0]["detail"]


@pytest.mark.parametrize("limit", [1, 4, 29, 30, 31])
async def test_the_links_walk_all_jobs_forth_and_back(limit: int) -> None:
    async with listing() as client:
        await check_walk(client, f"/api/jobs?limit={limit}", "jobs", ids(lambda job: True), limit)


async def test_the_links_keep_what_was_asked_for() -> None:
    query = (
        "type=process&status=failed&status=running,dismissed&processID=own&processID=bill"
        "&datetime=2030-01-01T01:00:00%2B00:00/..&minDuration=0&maxDuration=3"
    )
    wanted = ids(
        lambda job: job.status in ("failed", "dismissed") and job.pipeline != "double" and job.id != "job-0"
    )
    assert len(wanted) > 4
    async with listing() as client:
        assert await ids_of(client, query) == wanted
        await check_walk(client, f"/api/jobs?{query}&limit=2", "jobs", wanted, 2)


some = st.lists(
    st.sampled_from(["accepted", "running", "successful", "failed", "dismissed"]),
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(
    statuses=some,
    pipelines=st.lists(st.sampled_from(["own", "bill", "double", "nothing"]), max_size=2),
    first=st.none() | st.integers(-1, 31),
    last=st.none() | st.integers(-1, 31),
    least=st.none() | st.integers(0, 4),
    most=st.none() | st.integers(0, 4),
    limit=st.none() | st.integers(1, 40),
    offset=st.none() | st.integers(0, 40),
    has_type=st.booleans(),
)
def test_the_list_is_what_a_plain_filter_gives(
    statuses: list[str],
    pipelines: list[str],
    first: int | None,
    last: int | None,
    least: int | None,
    most: int | None,
    limit: int | None,
    offset: int | None,
    has_type: bool,
) -> None:
    def hour(number: int | None) -> str:
        start = datetime(2030, 1, 1, tzinfo=UTC)
        return ".." if number is None else (start + timedelta(hours=number)).isoformat()

    given: dict[str, Any] = {
        "status": statuses,
        "processID": pipelines,
        "datetime": None if first is None and last is None else f"{hour(first)}/{hour(last)}",
        "minDuration": least,
        "maxDuration": most,
        "limit": limit,
        "offset": offset,
        "type": "process" if has_type else None,
    }

    def is_wanted(job: Job) -> bool:
        number = int(job.id[4:])
        ran = None if job.finished is None else number % 4
        return (
            (not statuses or job.status in statuses)
            and (not pipelines or job.pipeline in pipelines)
            and (first is None or number >= first)
            and (last is None or number <= last)
            and (least is None or (ran is not None and ran >= least))
            and (most is None or (ran is not None and ran <= most))
        )

    start = offset or 0
    end = start + (limit or 100)
    wanted = ids(is_wanted)

    async def main() -> None:
        async with listing() as client:
            query = {name: value for name, value in given.items() if value not in (None, [])}
            content = (await client.get("/api/jobs", params=query)).json()
            assert [job["jobID"] for job in content["jobs"]] == wanted[start:end]
            assert (link_of(content, "next") is not None) == (len(wanted) > end)
            assert (link_of(content, "prev") is not None) == (start > 0)

    run_virtually(main())


async def test_a_narrow_list_looks_at_all_jobs() -> None:
    """Of more than the runner is asked for at once."""
    store = MemoryJobStore()
    start = datetime(2030, 1, 1, tzinfo=UTC)
    for number in range(2500):
        created = start + timedelta(seconds=number)
        await store.add(Job(id=str(number), pipeline="p", created=created, updated=created))
    runner = JobRunner(store=store)
    interval = "datetime=../2030-01-01T00:00:09Z"
    async with runner, client_of(app_of(runner=runner)) as client:
        assert await ids_of(client, interval) == [str(number) for number in range(9, -1, -1)]
        assert await ids_of(client, f"{interval}&offset=8&limit=1") == ["1"]
        assert await ids_of(client, "datetime=../..&limit=2") == ["2499", "2498"]
        assert await ids_of(client, "datetime=../..&limit=2&offset=1500") == ["999", "998"]


# -- dismissing


@pytest.mark.virtual
async def test_a_job_that_runs_is_dismissed_when_its_handler_has_seen_it() -> None:
    seen = []

    async def wait(n: int) -> int:
        try:
            await asyncio.sleep(n)
        except asyncio.CancelledError:
            await asyncio.sleep(5)
            seen.append("cleaned up")
            raise
        return n

    async with client_of(app_of({"wait": Pipeline([wait])})) as client:
        url = (await execute(client, "wait", {"n": 99}, headers=ASYNC)).headers["location"]
        await asyncio.sleep(1)
        response = await client.delete(url)
        assert seen == ["cleaned up"]
        assert response.status_code == 200
        info = response.json()
        assert (info["status"], info["processID"]) == ("dismissed", "wait")
        assert "finished" in info
        assert link_of(info, f"{REL}results") is None
        assert (await client.get(url)).json() == info
        assert "dismissed" in problem_of(await client.get(f"{url}/results"), 410)["detail"]


@pytest.mark.virtual
async def test_a_job_that_waits_is_dismissed() -> None:
    runner = JobRunner(concurrency=1, drain=0)
    async with runner, client_of(app_of(runner=runner)) as client:
        first = (await execute(client, "rest", {"seconds": 99}, headers=ASYNC)).headers["location"]
        second = (await execute(client, "rest", {"seconds": 99}, headers=ASYNC)).headers["location"]
        response = await client.delete(second)
        assert (response.status_code, response.json()["status"]) == (200, "dismissed")
        assert "started" not in response.json()
        assert (await client.get(first)).json()["status"] == "running"


@pytest.mark.virtual
@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("process", ["double", "fail"])
async def test_one_that_has_ended_is_removed(process: str) -> None:
    async with client_of(app_of({**TWO, "fail": Pipeline([double, fail])})) as client:
        url = (await execute(client, process, {"n": 1}, headers=ASYNC)).headers["location"]
        await ended(client, url)
        response = await client.delete(url)
        assert response.status_code == 200
        assert response.json()["status"] == "dismissed"
        assert response.json()["message"] == "the job and its results were removed"
        assert link_of(response.json(), f"{REL}results") is None
        for gone in (
            await client.get(url),
            await client.get(f"{url}/results"),
            await client.delete(url),
        ):
            assert problem_of(gone, 404)["type"] == f"{OGC}no-such-job"


@pytest.mark.virtual
async def test_a_dismissed_one_is_removed_by_the_second_time() -> None:
    async with client_of(app_of()) as client:
        url = (await execute(client, "rest", {"seconds": 99}, headers=ASYNC)).headers["location"]
        assert (await client.delete(url)).status_code == 200
        assert (await client.get(url)).status_code == 200
        assert (await client.delete(url)).status_code == 200
        assert (await client.get(url)).status_code == 404


@pytest.mark.virtual
async def test_nobody_waits_longer_than_10_seconds_for_who_cleans_up() -> None:
    async def stubborn(n: int) -> int:
        try:
            await asyncio.sleep(n)
        except asyncio.CancelledError:
            await asyncio.sleep(30)
            raise
        return n

    loop = asyncio.get_running_loop()
    async with client_of(app_of({"stubborn": Pipeline([stubborn])})) as client:
        url = (await execute(client, "stubborn", {"n": 99}, headers=ASYNC)).headers["location"]
        await asyncio.sleep(1)
        start = loop.time()
        response = await client.delete(url)
        assert round(loop.time() - start, 3) == 10
        assert (response.status_code, response.json()["status"]) == (202, "running")
        info = await ended(client, url)
        assert info["status"] == "dismissed"
        assert round(loop.time() - start, 1) == 30


# -- the cache


class Counter:
    """A handler that knows what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def __call__(self, order: Order) -> Bill:
        self.calls.append(order)
        if order["item"] == "bad":
            raise ValueError(SECRET)
        return {"text": order["item"], "total": len(self.calls)}


@pytest.mark.virtual
async def test_a_result_is_given_again_until_it_expires() -> None:
    counter = Counter()
    async with client_of(
        app_of({"a": Pipeline([counter]), "b": Pipeline([counter])}, cache_ttl=60)
    ) as client:
        first = (await execute(client, "a", {"item": "x"})).json()
        assert (await execute(client, "a", {"item": "x"})).json() == first == {"text": "x", "total": 1}
        assert (await execute(client, "a", {"item": "y"})).json()["total"] == 2
        assert (await execute(client, "b", {"item": "x"})).json()["total"] == 3
        assert (await execute(client, "a", {"item": "x", "count": 1})).json()["total"] == 4
        assert (await execute(client, "a", {"count": 1, "item": "x"})).json()["total"] == 4
        await asyncio.sleep(59)
        # what is known is there even for who does not wait
        assert (await execute(client, "a", {"item": "x"}, headers={"Prefer": "wait=0"})).json() == first
        await asyncio.sleep(2)
        assert (await execute(client, "a", {"item": "x"})).json()["total"] == 5


async def test_without_a_ttl_nothing_is_kept() -> None:
    counter = Counter()
    cache = MemoryCache()
    async with client_of(app_of({"a": Pipeline([counter])}, cache=cache)) as client:
        for number in (1, 2):
            assert (await execute(client, "a", {"item": "x"})).json()["total"] == number


async def test_what_is_known_is_given_in_the_form_that_was_asked_for() -> None:
    counter = Counter()
    async with client_of(app_of({"a": Pipeline([counter])}, cache_ttl=60)) as client:
        assert (await execute(client, "a", {"item": "x"}, outputs={})).status_code == 204
        assert (await execute(client, "a", {"item": "x"}, outputs={"text": {}})).json() == "x"
        document = await execute(client, "a", {"item": "x"}, outputs={"total": {}}, response="document")
        assert document.json() == {"total": 1}
        assert (await execute(client, "a", {"item": "x"})).json() == {
            "text": "x",
            "total": 1,
        }
        assert (await execute(client, "a", {"item": "x"}, outputs={})).status_code == 204
        problem_of(await execute(client, "a", {"item": "x"}, outputs={"z": {}}), 400)
    assert len(counter.calls) == 1


async def test_a_job_whose_result_is_known_does_not_run() -> None:
    counter = Counter()
    async with client_of(app_of({"a": Pipeline([counter])}, cache_ttl=60)) as client:
        for outputs, content in (({"text": {}}, "x"), ({"total": {}}, 1)):
            response = await execute(client, "a", {"item": "x"}, headers=ASYNC, outputs=outputs)
            assert response.status_code == 201
            job = await ended(client, response.headers["location"])
            assert (job["processID"], job["status"], job["progress"]) == (
                "a",
                "successful",
                100,
            )
            assert (await client.get(link_of(job, f"{REL}results"))).json() == content
        assert (await execute(client, "a", {"item": "x"})).json()["total"] == 1
    assert len(counter.calls) == 1


async def test_another_version_is_another_result() -> None:
    counter, cache = Counter(), MemoryCache()
    for version, number in (("1", 1), ("2", 2), ("1", 1)):
        described = {"a": {"version": version}}
        app = app_of(
            {"a": Pipeline([counter])},
            cache=cache,
            cache_ttl=60,
            descriptions=described,
        )
        async with client_of(app) as client:
            assert (await execute(client, "a", {"item": "x"})).json()["total"] == number


@pytest.mark.usefixtures("no_log")
async def test_a_failure_is_not_kept() -> None:
    counter = Counter()
    async with client_of(app_of({"a": Pipeline([counter])}, cache_ttl=60)) as client:
        for _ in range(2):
            problem_of(await execute(client, "a", {"item": "bad"}), 500)
    assert len(counter.calls) == 2


class Broken:
    """A cache that is out of order."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def get(self, key: str) -> Any:
        raise self.error

    async def set(self, key: str, value: Any, *, ttl: float) -> None:
        raise self.error


async def test_a_cache_that_fails_costs_a_run_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counter = Counter()
    cache = Broken(ConnectionError(SECRET))
    async with client_of(app_of({"a": Pipeline([counter])}, cache_ttl=60, cache=cache)) as client:
        for number in (1, 2):
            response = await execute(client, "a", {"item": "x"})
            assert response.json()["total"] == number
    assert [record.getMessage() for record in caplog.records] == [
        "The cache could not be asked for 'a'; it runs",
        "The cache could not store what 'a' gave; the run goes on",
    ] * 2
    assert all(record.exc_info and record.exc_info[1] is cache.error for record in caplog.records)


# -- contexts


@pytest.mark.parametrize("headers", [{}, ASYNC])
async def test_the_context_is_what_a_dependency_gives(headers: dict[str, str]) -> None:
    async def language(accept_language: Annotated[str, Header()]) -> str:
        return accept_language

    async def context(language: Annotated[str, Depends(language)]) -> dict[str, Any]:
        return {"language": language}

    async with client_of(app_of(just("greet"), context=context)) as client:
        headers = {**headers, "Accept-Language": "fr"}
        response = await execute(client, "greet", {"name": "Zoé"}, headers=headers)
        if response.status_code == 201:
            await ended(client, response.headers["location"])
            response = await client.get(f"{response.headers['location']}/results")
        assert response.json() == "hello Zoé in fr"


class Session:
    """Something that is to be closed."""

    def __init__(self) -> None:
        self.is_open = True

    @property
    def state(self) -> str:
        return "open" if self.is_open else "closed"


async def look(n: int, context: Any) -> str:
    await asyncio.sleep(n)
    return str(context["session"].state)


@pytest.mark.virtual
async def test_what_a_dependency_yields_is_closed_before_a_job_runs() -> None:
    """The trap."""

    async def context() -> AsyncIterator[dict[str, Any]]:
        session = Session()
        yield {"session": session}
        session.is_open = False

    async with client_of(app_of({"look": Pipeline([look])}, context=context, wait=5)) as client:
        assert (await execute(client, "look", {"n": 1})).json() == "open"  # it is for who waits
        for response in (
            await execute(client, "look", {"n": 1}, headers=ASYNC),
            await execute(client, "look", {"n": 9}),
        ):
            await ended(client, response.headers["location"])
            results = await client.get(f"{response.headers['location']}/results")
            assert results.json() == "closed"


@pytest.mark.virtual
@pytest.mark.parametrize("is_shared", [False, True])
async def test_what_belongs_to_a_job_is_open_as_long_as_it_runs(
    is_shared: bool,
) -> None:
    """What to do instead: the dependency says what to open, and the job opens it."""
    sessions: list[Session] = []

    async def context(name: str = "default") -> dict[str, Any]:
        return {"name": name}

    @asynccontextmanager
    async def job_context(context: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        session = Session()
        sessions.append(session)
        yield {**context, "session": session}
        session.is_open = False

    runner = JobRunner(job_context=job_context) if is_shared else None
    mine = None if is_shared else job_context
    app = app_of(
        {"look": Pipeline([look])},
        context=context,
        job_context=mine,
        runner=runner,
        wait=5,
    )
    async with runner or asyncio.Lock(), client_of(app) as client:
        assert (await execute(client, "look", {"n": 1})).json() == "open"
        for response in (
            await execute(client, "look", {"n": 1}, headers=ASYNC),
            await execute(client, "look", {"n": 9}),
        ):
            await ended(client, response.headers["location"])
            results = await client.get(f"{response.headers['location']}/results")
            assert results.json() == "open"
    assert [session.state for session in sessions] == ["closed"] * 3


async def test_dependencies_of_the_application_guard_all_routes() -> None:
    async def guard(authorization: Annotated[str, Header()] = "") -> None:
        if authorization != "Bearer good":
            raise HTTPException(401, "who are you?", headers={"WWW-Authenticate": "Bearer"})

    app = FastAPI()
    app.include_router(processes_router(TWO), prefix="/api", dependencies=[Depends(guard)])
    routes = [
        ("GET", ""),
        ("GET", "conformance"),
        ("GET", "processes"),
        ("GET", "processes/double"),
        ("GET", "processes/nothing"),
        ("POST", "processes/double/execution"),
        ("POST", "processes/nothing/execution"),
        ("GET", "jobs"),
        ("GET", "jobs/a"),
        ("GET", "jobs/a/results"),
        ("GET", "jobs/a/events"),
        ("DELETE", "jobs/a"),
    ]
    async with client_of(app) as client:
        for method, path in routes:
            response = await client.request(method, f"/api/{path}")
            assert (response.status_code, response.json()) == (
                401,
                {"detail": "who are you?"},
            )
            assert response.headers["www-authenticate"] == "Bearer"
        client.headers["Authorization"] = "Bearer good"
        for method, path in routes:
            assert (await client.request(method, f"/api/{path}")).status_code != 401
        assert (await execute(client, "double", {"n": 1})).json() == 2


async def test_handlers_of_the_application_are_for_its_own_routes() -> None:
    app = app_of()
    handled = []

    @app.get("/own/{n}")
    async def own(n: int) -> int:
        return n

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(HTTPException)
    async def handle(request: Request, error: Exception) -> Response:
        handled.append(request.url.path)
        return PlainTextResponse("handled", 422)

    async with client_of(app) as client:
        problem_of(await client.get("/api/jobs?limit=x"), 400)
        problem_of(await client.get("/api/jobs/nobody"), 404)
        problem_of(await execute(client, "double", {}), 400)
        assert (await client.get("/own/x")).text == "handled"
        assert (await client.get("/own/1")).json() == 1
    assert handled == ["/own/x"]


# -- where the routes are


def check_links(content: Any, base: str) -> None:
    """All links lead to below the base."""
    if isinstance(content, dict):
        if "href" in content and content["rel"] != "service-desc":
            assert content["href"].startswith(f"{base}/"), content
        for value in content.values():
            check_links(value, base)
    elif isinstance(content, list):
        for value in content:
            check_links(value, base)


async def check_api(client: httpx.AsyncClient, base: str, seen: str | None = None) -> None:
    """Everything works below the base, and all links are to what a client sees, and right.

    ``seen`` is what it is for a client, where a proxy cuts a part of it off.
    """
    seen = base if seen is None else seen

    async def get(url: str) -> Any:
        assert url.startswith(seen)
        response = await client.get(base + url.removeprefix(seen))
        assert response.status_code == 200, response.text
        if response.headers["content-type"] != "application/json":
            return response.text
        check_links(response.json(), seen)
        return response.json()

    landing = await get(f"{seen}/")
    page = (await client.get(f"{base}/", headers={"Accept": "text/html"})).text
    assert f'href="{urlsplit(seen).path}/processes/double"' in page
    await get(link_of(landing, f"{REL}conformance"))
    processes = await get(link_of(landing, f"{REL}processes"))
    for process in processes["processes"]:
        await get(link_of(process, "self"))
    run = link_of(processes["processes"][0], f"{REL}execute").removeprefix(seen)
    assert (await client.post(base + run, json={"inputs": {"n": 21}})).json() == 42
    accepted = await client.post(base + run, json={"inputs": {"n": 1}}, headers=ASYNC)
    check_links(accepted.json(), seen)
    await ended(client, base + accepted.headers["location"].removeprefix(seen))
    job = await get(accepted.headers["location"])
    assert link_of(job, "self") == accepted.headers["location"]
    assert await get(link_of(job, f"{REL}results")) == 2
    events = await get(link_of(job, "monitor"))
    check_links(json.loads(events.strip().rpartition("data: ")[2]), seen)
    assert [each["jobID"] for each in (await get(link_of(landing, f"{REL}job-list")))["jobs"]] == [
        job["jobID"]
    ]
    await get(link_of(await get(f"{seen}/processes?limit=1"), "next"))
    removed = await client.delete(base + link_of(job, "self").removeprefix(seen))
    check_links(removed.json(), seen)


@pytest.mark.parametrize("prefix", ["", "/api", "/a/b/c", "/ä b"])
async def test_a_router_of_its_own(prefix: str) -> None:
    async with client_of(app_of(prefix=prefix)) as client:
        await check_api(client, str(httpx.URL(HOST + prefix)))


async def test_a_prefix_may_have_parameters() -> None:
    async with client_of(app_of(prefix="/of/{tenant}/api")) as client:
        await check_api(client, f"{HOST}/of/me/api")


async def test_a_shared_runner() -> None:
    runner = JobRunner()
    async with runner, client_of(app_of(runner=runner)) as client:
        await check_api(client, f"{HOST}/api")
        mine = await runner.submit(double, 1)
        assert (await client.get(f"/api/jobs/{mine.id}")).status_code == 200


async def test_one_router_included_twice() -> None:
    router = processes_router(TWO)
    app = FastAPI()
    app.include_router(router, prefix="/one")
    app.include_router(router, prefix="/two")
    for _ in range(2):
        async with client_of(app) as client:
            await check_api(client, f"{HOST}/one")
            await check_api(client, f"{HOST}/two")
            response = await execute(client, "double", {"n": 1}, headers=ASYNC, base="/one")
            job = response.json()["jobID"]
            assert (await client.get(f"/two/jobs/{job}")).status_code == 200  # they share the jobs
            await ended(client, response.headers["location"])
            await client.delete(f"/one/jobs/{job}")
    check_document(app.openapi())


async def test_two_routers_have_jobs_of_their_own() -> None:
    app = app_of(prefix="/two", app=app_of(prefix="/one"))
    async with client_of(app) as client:
        await check_api(client, f"{HOST}/one")
        await check_api(client, f"{HOST}/two")
        response = await execute(client, "double", {"n": 1}, headers=ASYNC, base="/one")
        assert (await client.get(f"/two/jobs/{response.json()['jobID']}")).status_code == 404
    check_document(app.openapi())


async def test_a_router_in_a_router_in_a_router() -> None:
    """The newest FastAPI makes the routes of included routers when they are asked for."""
    inner, middle, outer = processes_router(TWO), APIRouter(), APIRouter(prefix="/v1")
    middle.include_router(inner, prefix="/api")
    outer.include_router(middle, prefix="/more")
    app = FastAPI()
    app.include_router(outer, prefix="/all")
    async with client_of(app) as client:
        await check_api(client, f"{HOST}/all/v1/more/api")
        problem_of(await client.get("/all/v1/more/api/jobs?limit=x"), 400)
        document = (await client.get("/openapi.json")).json()
    check_document(document)
    assert "/all/v1/more/api/processes/double/execution" in document["paths"]


async def test_a_router_that_is_included_before_it_is_in_the_application() -> None:
    app, middle = FastAPI(), APIRouter()
    middle.include_router(processes_router(TWO))
    app.include_router(middle, prefix="/api")
    app.include_router(APIRouter(), prefix="/other")
    async with client_of(app) as client:
        await check_api(client, f"{HOST}/api")


async def test_a_mounted_application_shares_a_runner() -> None:
    """It has no lifespan of its own."""
    runner = JobRunner()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with runner:
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/sub", app_of(runner=runner))
    async with client_of(app) as client:
        await check_api(client, f"{HOST}/sub/api")
        landing = (await client.get("/sub/api/")).json()
        assert link_of(landing, "service-desc") == f"{HOST}/sub/openapi.json"
        assert (await client.get(link_of(landing, "service-desc"))).status_code == 200


async def test_a_mounted_application_with_a_runner_of_its_own_says_so() -> None:
    app = FastAPI()
    app.mount("/sub", app_of())
    async with client_of(app) as client:
        assert (await client.get("/sub/api/processes")).status_code == 200
        problem_of(await execute(client, "double", {"n": 1}, base="/sub/api"), 503)


async def test_a_proxy_that_cuts_a_part_of_the_path_off() -> None:
    async with client_of(app_of(app=FastAPI(root_path="/proxy"))) as client:
        await check_api(client, f"{HOST}/api", f"{HOST}/proxy/api")
        landing = (await client.get("/api/")).json()
        assert link_of(landing, "service-desc") == f"{HOST}/proxy/openapi.json"


@pytest.mark.parametrize("prefix", ["/api", ""])
async def test_a_proxy_that_leaves_the_path_as_it_is(prefix: str) -> None:
    async with client_of(app_of(prefix=prefix), root_path="/proxy") as client:
        await check_api(client, f"{HOST}/proxy{prefix}")


async def test_a_part_that_only_begins_alike_is_another() -> None:
    async with client_of(app_of(prefix="/proxying", app=FastAPI(root_path="/proxy"))) as client:
        await check_api(client, f"{HOST}/proxying", f"{HOST}/proxy/proxying")


@pytest.mark.parametrize(
    ("host", "server", "origin"),
    [
        (b"other.example:8080", ("a", 1), "http://other.example:8080"),
        (b"[::1]:8080", ("a", 1), "http://[::1]:8080"),
        (None, ("10.0.0.1", 8000), "http://10.0.0.1:8000"),
        (None, ("::1", 8000), "http://[::1]:8000"),
        (None, ("localhost", None), "http://localhost"),
        (None, None, "http://localhost"),
        (b"", None, "http://localhost"),
        (b"[", ("a", 1), "http://["),
        (b'a"b<c>/d', ("a", 1), "http://a%22b%3Cc%3E%2Fd"),
        ("ä".encode("latin-1"), ("a", 1), "http://%C3%A4"),
    ],
)
async def test_links_are_absolute_whatever_the_host_is(host: bytes | None, server: Any, origin: str) -> None:
    app = app_of({})
    scope = {"headers": [] if host is None else [(b"host", host)], "server": server}
    async with client_of(app), Exchange(app, "GET", "/api/processes", scope=scope) as exchange:
        assert await exchange.began() == 200
        content = json.loads(await exchange.chunk() or "")
    assert link_of(content, "self") == f"{origin}/api/processes?limit=100&offset=0"


async def test_the_scheme_is_the_client_s() -> None:
    app = app_of()
    async with client_of(app), Exchange(app, "GET", "/api/processes", scope={"scheme": "https"}) as exchange:
        content = json.loads(await exchange.chunk() or "")
    check_links(content, "https://test.example/api")


async def test_what_links_say() -> None:
    async with client_of(app_of()) as client:
        content = (await client.get("/api/processes?limit=5&offset=2")).json()
        assert link_of(content, "prev") == f"{HOST}/api/processes?limit=5&offset=0"
        assert all(link["type"] == "application/json" and "title" not in link for link in content["links"])
        job = (await execute(client, "double", {"n": 4}, headers=ASYNC)).json()
        (monitor,) = (link for link in job["links"] if link["rel"] == "monitor")
        assert (monitor["type"], monitor["title"]) == ("text/event-stream", "changes, as they come")


@pytest.mark.parametrize(("root", "seen"), [("/proxy/", "/proxy"), ("/a,(b)", "/a,(b)")])
async def test_the_links_begin_with_the_root_path_as_it_is(root: str, seen: str) -> None:
    app, scope = app_of(), {"root_path": root}
    async with client_of(app), Exchange(app, "GET", "/api/processes", scope=scope) as exchange:
        content = json.loads(await exchange.chunk() or "")
    check_links(content, f"{HOST}{seen}/api")


@pytest.mark.threads
@pytest.mark.filterwarnings("ignore")  # of what TestClient itself imports
def test_an_application_may_be_started_twice() -> None:
    from fastapi.testclient import TestClient

    app = app_of()
    for number in (1, 2):
        with TestClient(app) as client:
            inputs = {"inputs": {"n": number}}
            response = client.post("/api/processes/double/execution", json=inputs, headers=ASYNC)
            assert response.status_code == 201
            assert client.post("/api/processes/double/execution", json=inputs).json() == 2 * number
    with TestClient(app_of(runner=JobRunner())) as client:
        assert client.post("/api/processes/double/execution", json=inputs).status_code == 503


@pytest.mark.virtual
async def test_the_runner_ends_with_the_application() -> None:
    seen = []

    async def wait(n: int) -> None:
        try:
            await asyncio.sleep(n)
        except asyncio.CancelledError:
            seen.append(n)
            raise

    app = app_of({"wait": Pipeline([wait])})
    with pytest.raises(KeyError):
        async with client_of(app) as client:
            await execute(client, "wait", {"n": 99}, headers=ASYNC)
            await asyncio.sleep(1)
            raise KeyError
    assert seen == [99]
    async with client_of(app) as client:  # it can be started again after that
        assert (await execute(client, "wait", {"n": 0})).json() is None


@pytest.mark.virtual
async def test_the_runner_ends_before_what_the_application_has_opened() -> None:
    """So that a job may use it to the last."""
    session = Session()
    session.is_open = False
    seen = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        session.is_open = True
        yield
        session.is_open = False

    async def use(n: int) -> None:
        await asyncio.sleep(n)
        seen.append(session.state)

    app = app_of({"use": Pipeline([use])}, app=FastAPI(lifespan=lifespan))
    async with client_of(app) as client:
        assert (await execute(client, "use", {"n": 5}, headers=ASYNC)).status_code == 201
    assert seen == ["open"]


# -- the OpenAPI document


def check_document(document: Any) -> None:
    """What openapi-spec-validator would look at first."""
    assert document["openapi"].startswith("3.1")
    text = json.dumps(document)
    assert "$defs" not in text
    operations = []
    for path, item in document["paths"].items():
        assert path.startswith("/")
        for method, operation in item.items():
            assert method in ("get", "post", "delete")
            operations.append(operation["operationId"])
            check_operation(path, operation)
    assert len(set(operations)) == len(operations)
    for reference in references_of(document):
        assert resolved(document, reference) is not None


def check_operation(path: str, operation: Any) -> None:
    assert "422" not in operation["responses"], path
    assert operation["responses"]
    for status, response in operation["responses"].items():
        assert status == "4XX" or 200 <= int(status) < 600
        assert response["description"]
        for media in response.get("content", {}).values():
            check_schema(media.get("schema", {}))
    names = [(parameter["in"], parameter["name"]) for parameter in operation.get("parameters", [])]
    assert len(set(names)) == len(names)
    in_path = {part[1:-1] for part in path.split("/") if part.startswith("{")}
    assert {name for place, name in names if place == "path"} == in_path
    for parameter in operation.get("parameters", []):
        assert parameter["in"] in ("path", "query", "header")
        assert parameter["in"] != "path" or parameter["required"]
        check_schema(parameter["schema"])
    for media in operation.get("requestBody", {"content": {}})["content"].values():
        check_schema(media["schema"])


def check_schema(schema: Any) -> None:
    if isinstance(schema, bool):
        return
    assert isinstance(schema, dict)
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        assert kind in (
            "null",
            "boolean",
            "object",
            "array",
            "number",
            "string",
            "integer",
        )
    assert isinstance(schema.get("required", []), list)
    assert len(set(schema.get("required", []))) == len(schema.get("required", []))
    for one in schema.get("properties", {}).values():
        check_schema(one)
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        assert schema.get(key) != []
        for one in schema.get(key, []):
            check_schema(one)
    for key in ("items", "additionalProperties", "not"):
        if key in schema:
            check_schema(schema[key])


def references_of(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        if isinstance(document.get("$ref"), str):
            yield document["$ref"]
        document = list(document.values())
    if isinstance(document, list):
        for one in document:
            yield from references_of(one)


def resolved(document: Any, reference: str) -> Any:
    for part in reference.removeprefix("#/").split("/"):
        document = document[part]
    return document


async def test_the_document_is_right() -> None:
    app = app_of(PROCESSES)
    async with client_of(app) as client:
        document = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 200
    check_document(document)
    execution = "/api/processes/{}/execution"
    assert {(path, method) for path, item in document["paths"].items() for method in item} == {
        ("/api/", "get"),
        ("/api/conformance", "get"),
        ("/api/processes", "get"),
        ("/api/processes/{process_id}", "get"),
        *((execution.format(name), "post") for name in PROCESSES),
        ("/api/jobs", "get"),
        ("/api/jobs/{job_id}", "get"),
        ("/api/jobs/{job_id}", "delete"),
        ("/api/jobs/{job_id}/results", "get"),
        ("/api/jobs/{job_id}/events", "get"),
    }
    assert "HTTPValidationError" not in json.dumps(document)


def test_each_process_has_an_operation_with_its_types() -> None:
    document = app_of(PROCESSES).openapi()
    double, bill = (
        document["paths"][f"/api/processes/{name}/execution"]["post"] for name in ("double", "bill")
    )
    body = double["requestBody"]
    assert body["required"] is True
    schema = body["content"]["application/json"]["schema"]
    assert schema["properties"]["inputs"] == {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    assert schema["required"] == ["inputs"]
    assert list(schema["properties"]["outputs"]["properties"]) == ["result"]
    assert schema["properties"]["response"]["enum"] == ["raw", "document"]
    assert double["summary"] == "Execute double"
    assert bill["summary"] == "Execute a bill"
    answers = double["responses"]
    assert set(answers) == {"200", "201", "204", "400", "4XX", "500", "503", "504"}
    one, whole = answers["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert one == whole["properties"]["result"] == {"type": "integer"}
    for status in ("400", "4XX", "500", "503", "504"):
        assert list(answers[status]["content"]) == ["application/problem+json"]
    assert answers["201"]["content"]["application/json"]["schema"]["title"] == "statusInfo"
    assert [(each["in"], each["name"]) for each in double["parameters"]] == [("header", "Prefer")]
    greet = document["paths"]["/api/processes/greet/execution"]["post"]
    assert greet["requestBody"]["content"]["application/json"]["schema"]["required"] == []


def test_parameters_are_described() -> None:
    document = app_of().openapi()
    jobs = document["paths"]["/api/jobs"]["get"]
    found = {each["name"]: each["schema"] for each in jobs["parameters"]}
    assert list(found) == [
        "limit",
        "offset",
        "type",
        "status",
        "processID",
        "datetime",
        "minDuration",
        "maxDuration",
    ]
    assert found["status"]["items"]["enum"] == [
        "accepted",
        "running",
        "successful",
        "failed",
        "dismissed",
    ]
    assert found["type"]["items"]["enum"] == ["process"]
    assert found["limit"]["minimum"] == 1
    assert found["offset"]["minimum"] == 0
    assert found["minDuration"]["items"]["minimum"] == 0
    assert not any(each.get("required") for each in jobs["parameters"])
    assert set(jobs["responses"]) == {"200", "400", "4XX"}
    single = document["paths"]["/api/jobs/{job_id}"]
    assert set(single["get"]["responses"]) == {"200", "404", "4XX"}
    assert set(single["delete"]["responses"]) == {"200", "202", "404", "4XX"}
    results = document["paths"]["/api/jobs/{job_id}/results"]["get"]["responses"]
    assert set(results) == {"200", "204", "404", "410", "500", "4XX"}
    events = document["paths"]["/api/jobs/{job_id}/events"]["get"]["responses"]
    assert set(events) == {"200", "204", "404", "4XX"}
    assert list(events["200"]["content"]) == ["text/event-stream"]


def test_parameters_of_the_context_are_in_the_document() -> None:
    async def context(x_tenant: Annotated[str, Header()], debug: bool = False) -> dict[str, Any]:
        return {"tenant": x_tenant, "debug": debug}

    document = app_of(context=context).openapi()
    check_document(document)
    operation = document["paths"]["/api/processes/double/execution"]["post"]
    assert {(each["in"], each["name"]) for each in operation["parameters"]} == {
        ("header", "x-tenant"),
        ("query", "debug"),
        ("header", "Prefer"),
    }
    assert "n" in json.dumps(operation["requestBody"])


def test_ids_that_are_alike_have_operations_of_their_own() -> None:
    names = ["a-b", "a.b", "a~b", "a_b", "a_b_"]
    app = app_of(dict.fromkeys(names, PROCESSES["double"]))
    check_document(app.openapi())


async def test_ids_that_are_alike_are_processes_of_their_own() -> None:
    def add(number: int) -> Pipeline[int, int]:
        def handler(n: int) -> int:
            return n + number

        return Pipeline([handler])

    names = ["a-b", "a.b", "a~b", "a_b", "execution"]
    async with client_of(app_of({name: add(number) for number, name in enumerate(names)})) as client:
        for number, name in enumerate(names):
            assert (await execute(client, name, {"n": 10})).json() == 10 + number


# -- users' modules, and this one

USERS = """
{future}
from dataclasses import dataclass
from typing import Annotated, TYPE_CHECKING
from fastapi import Depends, FastAPI, Header
from pydantic import Field
from async_pipeline import Pipeline
from async_pipeline.integrations.fastapi import processes_router

@dataclass
class Box:
    width: Annotated[int, Field(ge=1)]
    height: int = 2

async def language(x_language: Annotated[str, Header()]) -> str:
    return x_language

async def settings(language: Annotated[str, Depends(language)]) -> dict:
    return {{"language": language}}

def make(unit: str) -> FastAPI:
    Edge = Annotated[int, Field(le=9)]

    @dataclass
    class Area:
        value: int
        unit: str

    async def measure(box: Box, context: dict) -> int:
        return box.width * box.height

    async def name(value: Edge, context: dict) -> Area:
        return Area(value, unit + context["language"])

    app = FastAPI()
    app.include_router(processes_router({{"measure": Pipeline([measure, name])}}, context=settings))
    return app
"""


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
async def test_users_may_postpone_their_annotations(future: str, monkeypatch: pytest.MonkeyPatch) -> None:
    users = module_of(USERS.format(future=future), monkeypatch)
    app = users.make("mm2")
    check_document(app.openapi())
    schema = app.openapi()["paths"]["/processes/measure/execution"]["post"]["requestBody"]
    inputs = schema["content"]["application/json"]["schema"]["properties"]["inputs"]
    assert inputs["properties"]["width"]["minimum"] == 1
    assert inputs["required"] == ["width"]
    async with client_of(app) as client:
        response = await execute(client, "measure", {"width": 3}, base="", headers={"X-Language": "en"})
        assert response.json() == {"value": 6, "unit": "mm2en"}


def module_of(source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = types.ModuleType("users_module")
    monkeypatch.setitem(sys.modules, "users_module", made)
    exec(compile(source, "users_module.py", "exec", dont_inherit=True), made.__dict__)
    return made


TRAP = """
{future}
from typing import Annotated
from fastapi import Depends, FastAPI, Request

def make(provide) -> FastAPI:
    app = FastAPI()
    Token = Annotated[str, Depends(provide)]

    @app.get("/")
    async def endpoint(token: Token) -> str:
        return token
    return app
"""


async def test_postponed_annotations_are_a_trap_for_endpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FastAPI then looks for the hints in the module, and makes a query parameter of what it can't find."""

    async def provide() -> str:
        return "good"

    for future, status in (("", 200), ("from __future__ import annotations", 422)):
        app = module_of(TRAP.format(future=future), monkeypatch).make(provide)
        async with client_of(app) as client:
            assert (await client.get("/")).status_code == status


def test_so_the_modules_with_endpoints_have_none() -> None:
    for name in ("fastapi", "_problems", "_disconnect"):
        source = importlib.import_module(f"async_pipeline.integrations.{name}").__file__
        assert source is not None
        tree = ast.parse(Path(source).read_text(encoding="utf-8"))
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "__future__" not in imports, name


# -- arguments


def test_without_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    again = importlib.util.spec_from_file_location(f"{module.__package__}._again", module.__file__)
    assert again is not None
    assert again.loader is not None
    message = r"^FastAPI support requires installing async-pipeline\[fastapi\]: pip install "
    with pytest.raises(ImportError, match=message):
        again.loader.exec_module(importlib.util.module_from_spec(again))


def test_the_public_names() -> None:
    assert module.__all__ == [
        "ClientDisconnected",
        "ClosingStreamingResponse",
        "cancel_on_disconnect",
        "processes_router",
    ]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "write {", {"processes": [PROCESSES["double"]]}),
        (ValueError, "letters", {"processes": {"a/b": PROCESSES["double"]}}),
        (
            ValueError,
            "job_context",
            {"runner": JobRunner(), "job_context": lambda context: None},
        ),
        (TypeError, "async context manager", {"job_context": 5}),
        (ValueError, "'other'", {"descriptions": {"other": {}}}),
        (ValueError, "'double'", {"descriptions": {"double": {"inputs": {"x": {}}}}}),
        (TypeError, "descriptions", {"descriptions": 5}),
        (ValueError, "timeout must be greater than 0", {"timeout": 0}),
        (TypeError, "timeout", {"timeout": "x"}),
        (ValueError, "wait must be", {"wait": -1}),
        (TypeError, "wait", {"wait": None}),
        (ValueError, "cache_ttl must be greater than 0", {"cache_ttl": 0}),
        (TypeError, "cache_ttl", {"cache_ttl": "x"}),
        (TypeError, "context must be a function", {"context": {"language": "en"}}),
    ],
)
def test_arguments_are_checked(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        processes_router(**{"processes": PROCESSES, **options})


async def test_there_may_be_no_processes() -> None:
    app = app_of({})
    check_document(app.openapi())
    async with client_of(app) as client:
        assert (await client.get("/api/processes")).json()["processes"] == []
        page = await client.get("/api/", headers={"Accept": "text/html"})
        assert page.status_code == 200


# -- the trap of background tasks


async def test_background_tasks_end_with_the_first_failure_and_jobs_do_not() -> None:
    from fastapi import BackgroundTasks

    sent: list[str] = []

    async def send(address: str) -> None:
        if "@" not in address:
            raise ValueError(SECRET)
        sent.append(address)

    jobs = JobRunner()
    app = FastAPI()

    @app.post("/background")
    async def background(addresses: list[str], tasks: BackgroundTasks) -> None:
        for address in addresses:
            tasks.add_task(send, address)

    @app.post("/jobs")
    async def submit(addresses: list[str]) -> list[str]:
        return [(await jobs.submit(send, address)).id for address in addresses]

    addresses = ["a@b", "nobody", "c@d"]
    logging.getLogger("async_pipeline").disabled = True
    try:
        async with client_of(app) as client, jobs:
            with pytest.raises(ValueError, match=SECRET):
                await client.post("/background", json=addresses)
            assert sent == ["a@b"]
            sent.clear()
            ids = (await client.post("/jobs", json=addresses)).json()
            assert len(ids) == 3
        assert sent == ["a@b", "c@d"]
        assert [(await jobs.get(each)).status for each in ids] == [
            "successful",
            "failed",
            "successful",
        ]
    finally:
        logging.getLogger("async_pipeline").disabled = False


async def test_a_process_may_be_any_step_and_no_coroutine() -> None:
    def double(number: int) -> int:
        return 2 * number

    async def triple(number: int) -> int:
        return 3 * number

    app = FastAPI()
    app.include_router(processes_router({"double": double, "triple": Stage("triple", triple)}))
    async with client_of(app) as client:
        for name, result in (("double", 4), ("triple", 6)):
            answer = await client.post(f"/processes/{name}/execution", json={"inputs": {"number": 2}})
            assert answer.json() == result
    with pytest.raises(TypeError, match=r"coroutine object .*, without \(\)$"):
        processes_router({"triple": triple(2)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"^process 'x' must be a pipeline, or any other step, not 5$"):
        processes_router({"x": 5})  # type: ignore[dict-item]


async def test_a_wrong_time_is_answered_with_a_right_one() -> None:
    async with listing() as client:
        (fault,) = problem_of(await client.get("/api/jobs?datetime=2026-11-21"), 400)["errors"]
    assert fault["detail"].startswith("must be like 2026-11-21T12:00:00Z, or two such times")


async def test_the_openapi_document_is_linked_with_its_version() -> None:
    app = FastAPI()
    app.include_router(processes_router({"text": Pipeline([str])}), prefix="/api")
    app.openapi_version = "3.0.2"
    async with client_of(app) as client:
        links = {link["rel"]: link for link in (await client.get("/api/")).json()["links"]}
    assert links["service-desc"]["type"] == "application/vnd.oai.openapi+json;version=3.0"


@pytest.mark.parametrize(
    ("option", "wrong", "message"),
    [
        ("runner", JobRunner, r"^runner must be a JobRunner, not .*; write runner=JobRunner\("),
        ("title", None, "^title must be a str, not None$"),
        ("description", 1, "^description must be a str, not 1$"),
        ("context", {"a": 1}, "^context must be a function, as Depends takes it, not {'a': 1}$"),
        ("cache", {}, r"^cache must have get and set, like MemoryCache\(\), not {}$"),
    ],
)
def test_what_is_wrong_is_said_by_its_name(option: str, wrong: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        processes_router({"text": Pipeline([str])}, **{option: wrong})


async def test_inputs_that_stand_beside_their_object() -> None:
    def double(number: int) -> int:
        return 2 * number

    app = FastAPI()
    app.include_router(processes_router({"double": double}))
    async with client_of(app) as client:
        problem = problem_of(await client.post("/processes/double/execution", json={"number": 2}), 400)
    assert [fault["pointer"] for fault in problem["errors"]] == ["/inputs", "/inputs/number"]


async def test_links_below_a_part_of_the_path_that_has_a_percent_sign() -> None:
    app = FastAPI()
    app.include_router(processes_router({"text": Pipeline([str])}), prefix="/of/{tenant}")
    async with client_of(app) as client:
        links = (await client.get("/of/%2541/processes")).json()["processes"][0]["links"]
        assert links[0]["href"].endswith("/of/%2541/processes/text")
        assert (await client.get(links[0]["href"])).json()["links"] == links
