"""Split → map → merge, and scatter → merge: the same pipeline here, over HTTP, and on workers.

    $ python examples/split_map_merge.py                   # this process, a server in it, a broker in memory
    $ python examples/split_map_merge.py email --way dask  # two processes of a Dask cluster on this machine

It asks how well a package of the standard library is documented: the package is split into its files, each
of them is read and counted in three ways at once (scatter), the three counts become one (merge), and those
of all files the report (merge). What differs between the ways is in ``run_here``, ``run_over_http`` and
``run_on_workers``, and is printed with the result.

It needs ``pip install 'async-pipeline[fastapi,taskiq]' httpx uvicorn``, and for Dask the extra ``dask``.
With a Redis and ``taskiq-redis``, the files go to worker processes, on as many machines as you like:

    export BROKER_URL=redis://127.0.0.1
    taskiq worker examples.split_map_merge:broker --workers 2 --max-async-tasks 2 --max-prefetch 0 \\
        --wait-tasks-timeout 20 &
    python examples/split_map_merge.py --way workers

To serve it for others, with a page for browsers: ``uvicorn --factory examples.split_map_merge:make_app``.
"""

import argparse
import ast
import asyncio
import inspect
import io
import os
import socket
import sys
import sysconfig
import textwrap
import time
import tokenize
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import FastAPI
from pydantic import AfterValidator
from taskiq import AsyncBroker, InMemoryBroker
from typing_extensions import TypedDict

from async_pipeline import Pipeline, PipelineError, Stage, each, parallel
from async_pipeline.integrations.fastapi import processes_router
from async_pipeline.integrations.taskiq import TaskiqEngine

LIBRARY = Path(sysconfig.get_path("stdlib"))  # each worker reads its own copy
BROKER_URL = os.environ.get("BROKER_URL", "")
QUEUE = os.environ.get("QUEUE", "split-map-merge")
KEPT = 3600  # seconds, for which Redis keeps the results of a batch


# ---- the pipeline; nothing in it knows where it runs


class Definitions(TypedDict):
    definitions: int  # functions and classes
    documented: int  # those with a docstring


class Counts(Definitions):
    lines: int
    comments: int


class Report(Counts):
    files: int


def check_package(name: str) -> str:
    if not (name.isidentifier() and (LIBRARY / name).is_dir()):  # no "../..": anyone may ask over HTTP
        raise ValueError(f"the standard library has no package {name!r}")
    return name


def split(package: Annotated[str, AfterValidator(check_package)]) -> list[str]:  # so that HTTP answers 400
    """How well a package of the standard library is documented."""
    files = (LIBRARY / check_package(package)).rglob("*.py")
    return sorted(path.relative_to(LIBRARY).as_posix() for path in files)


def read(path: str) -> str:
    with tokenize.open(LIBRARY / path) as file:  # decodes as Python does, by the encoding that it declares
        return file.read()


def count_lines(text: str) -> int:
    return text.count("\n")


def count_comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def count_definitions(text: str) -> Definitions:
    with warnings.catch_warnings(action="ignore"):  # they are about the code that is counted
        tree = ast.parse(text)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return {"definitions": len(docstrings), "documented": len(docstrings) - docstrings.count(None)}


def merge_counts(counts: dict[str, Any]) -> Counts:
    definitions: Definitions = counts["definitions"]
    return {"lines": counts["lines"], "comments": counts["comments"], **definitions}


def merge(files: list[Counts]) -> Report:
    return {
        "files": len(files),
        "lines": sum(file["lines"] for file in files),
        "comments": sum(file["comments"] for file in files),
        "definitions": sum(file["definitions"] for file in files),
        "documented": sum(file["documented"] for file in files),
    }


def make_broker() -> AsyncBroker:
    if not BROKER_URL:
        return InMemoryBroker()
    from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

    results: Any = RedisAsyncResultBackend(BROKER_URL, result_ex_time=KEPT)
    streams = RedisStreamBroker(
        BROKER_URL, QUEUE, xread_count=1, consumer_id="0", unacknowledged_lock_timeout=10, maxlen=10_000
    )
    return streams.with_result_backend(results)


broker = make_broker()
engine = TaskiqEngine(broker, chunk_size=4, start_timeout=30)

scatter = parallel(lines=count_lines, comments=count_comments, definitions=count_definitions, name="count")
part: Pipeline[str, Counts] = engine.register(
    Pipeline([Stage("read", read, executor="thread"), scatter, merge_counts], name="part"), version="1"
)
report: Pipeline[str, Report] = Pipeline([split, each(part, 8), merge], name="report")


# ---- the ways to run it


async def run_here(package: str) -> Any:
    return await report.run(package)


async def run_over_http(package: str) -> Any:
    async with serve(make_app()) as client:
        answer = await client.post("/processes/report/execution", json={"inputs": {"package": package}})
        return answer.raise_for_status().json()


async def run_on_workers(package: str) -> Any:
    async with engine:
        spread = Pipeline([split, partial(part.map, concurrency=8, engine=engine), merge], name="report")
        return await spread.run(package)


async def run_on_dask(package: str) -> Any:
    from distributed import Client, LocalCluster

    from async_pipeline.integrations.dask import DaskEngine

    processes: Any = partial(LocalCluster, n_workers=2, threads_per_worker=1, dashboard_address=None)
    connect: Any = partial(Client, asynchronous=True)
    async with processes(asynchronous=True) as cluster, connect(cluster) as client:
        engine = DaskEngine(client, chunk_size=4)
        spread = Pipeline([split, partial(part.map, concurrency=8, engine=engine), merge], name="report")
        return await spread.run(package)


WAYS = {"here": run_here, "http": run_over_http, "workers": run_on_workers, "dask": run_on_dask}


def make_app() -> FastAPI:
    app = FastAPI(title="Documentation of the standard library")
    app.include_router(processes_router({"report": report}, wait=300))  # seconds; then it goes on as a job
    return app


@asynccontextmanager
async def serve(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Serve on a free port of this machine for as long as the block runs, and yield a client."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server.serve([listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


# ---- the command


def show(report: Report) -> str:
    share = report["documented"] / max(report["definitions"], 1)
    return (
        f"{report['files']:,} files, {report['lines']:,} lines, {report['comments']:,} comments; "
        f"{share:.0%} of {report['definitions']:,} functions and classes have a docstring"
    )


def body(function: Callable[..., Any]) -> str:
    """The lines of a function, without its first one."""
    return textwrap.dedent(inspect.getsource(function).split("\n", 1)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="How well is a package of the standard library documented?")
    parser.add_argument("package", nargs="?", default="asyncio", help="such as email, json, xml (asyncio)")
    parser.add_argument("--way", choices=WAYS, action="append", help="here, http and workers by default")
    options = parser.parse_args()
    try:
        check_package(options.package)
    except ValueError as error:
        parser.error(str(error))
    reports: list[Any] = []
    for way in options.way or ["here", "http", "workers"]:
        started = time.perf_counter()
        try:
            reports.append(asyncio.run(WAYS[way](options.package)))
        except (PipelineError, httpx.HTTPError) as error:
            print(f"{way}: {error}", file=sys.stderr)
            return 1
        print(f"{way}, {time.perf_counter() - started:.1f} s: {show(reports[-1])}")
        print(textwrap.indent(body(WAYS[way]), "    "))
    if any(report != reports[0] for report in reports):
        print("the reports differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
