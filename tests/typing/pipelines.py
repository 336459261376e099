"""What the type checker knows of a pipeline: what goes in, what comes out, and in which form."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, assert_type

from async_pipeline import Outcome, Pipeline, Stage


@dataclass
class Session:
    user: str


async def fetch(url: str) -> bytes:
    return url.encode()


async def parse(page: bytes, session: Session) -> int:
    return len(page) + len(session.user)


class Duck:
    """Any object with a name and a run is a step."""

    name = "duck"

    async def run(self, value: int, *, context: Any = None) -> str:
        return "quack" * value


async def urls() -> AsyncIterator[str]:
    yield "x"


short: Pipeline[str, int] = Pipeline([Stage("fetch", fetch), Stage("parse", parse)])
full: Pipeline[str, int, Session] = Pipeline([Stage("fetch", fetch), Stage("parse", parse)], name="full")


async def test_run() -> None:
    assert_type(await short.run("x"), int)
    assert_type(await short.run("x", context={"any": "thing"}), int)
    assert_type(await short.run("x", context=Session("me")), int)
    assert_type(await full.run("x", context=Session("me")), int)
    assert_type(await full.run(initial_value="x"), int)
    await short.run(1)  # type: ignore[arg-type]
    await full.run("x", context={"user": "me"})  # type: ignore[arg-type]
    await full.run("x", Session("me"))  # type: ignore[call-arg]


async def test_try_run() -> None:
    outcome = await full.try_run("x", context=Session("me"))
    assert_type(outcome, Outcome[int])
    assert_type(outcome.value, int | None)
    assert_type(outcome.error, Exception | None)
    assert_type(outcome.index, int | None)
    assert_type(outcome.ok, bool)
    assert_type(outcome.unwrap(), int)
    assert_type(outcome.duration, float)
    outcome.value = 1  # type: ignore[misc]
    await full.try_run(1)  # type: ignore[arg-type]


async def test_map(flag: bool) -> None:
    assert_type(await full.map(["x"]), list[int])
    assert_type(await full.map(("x", "y"), 20, context=Session("me")), list[int])
    assert_type(await full.map(urls(), concurrency=asyncio.Semaphore(3)), list[int])
    assert_type(await full.map({"x": 1}.keys(), return_exceptions=False), list[int])
    assert_type(await full.map(["x"], return_exceptions=True), list[int | Exception])
    assert_type(await full.map(["x"], return_exceptions=flag), list[int | Exception])
    await full.map([1])  # type: ignore[list-item]
    await full.map(7)  # type: ignore[call-overload]
    await full.map(["x"], 2.5)  # type: ignore[call-overload]
    await full.map(["x"], context={"user": "me"})  # type: ignore[call-overload]
    await full.map(["x"], 5, Session("me"))  # type: ignore[call-overload]


async def test_stream() -> None:
    async with full.stream(urls(), 20, ordered=False, buffer=100, context=Session("me")) as results:
        async for value in results:
            assert_type(value, int)
        async for outcome in results.outcomes():
            assert_type(outcome, Outcome[int])
        assert_type(results.in_flight, int)
    async with short.stream(["x"], concurrency=asyncio.Semaphore(3)) as short_results:
        assert_type([value async for value in short_results], list[int])
    full.stream(["x"], ordered=1)  # type: ignore[arg-type]
    full.stream([b"x"])  # type: ignore[list-item]
    for _ in full.stream(["x"]):  # type: ignore[attr-defined]
        pass
    with full.stream(["x"]):  # type: ignore[attr-defined]
        pass


def test_no_annotation_is_demanded() -> None:
    assert_type(Pipeline([Stage("fetch", fetch)]), Pipeline[Any, Any, Any])
    pipeline = Pipeline([fetch, parse, Duck(), Stage("print", print), lambda value: value, int])
    nested = Pipeline([pipeline, short, full])
    assert_type(nested, Pipeline[Any, Any, Any])


def of_pipelines(pipeline: Pipeline, two: Pipeline[str, int]) -> Pipeline[str, int]:
    """Type arguments may be left out, all or the last one."""
    assert_type(pipeline, Pipeline[Any, Any, Any])
    assert_type(two, Pipeline[str, int, Any])
    assert_type(two.name, str)
    return two


def test_variance() -> None:
    wider: Pipeline[str, object] = full
    of_pipelines(wider, full)
    wrong: Pipeline[int, int] = full  # type: ignore[assignment]
    of_pipelines(wrong, wrong)  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    Pipeline()  # type: ignore[call-arg]
    Pipeline(fetch)  # type: ignore[arg-type]
    Pipeline(["fetch"])  # type: ignore[list-item]
    Pipeline([fetch], "name")  # type: ignore[call-arg]
    Pipeline([fetch], name=1)  # type: ignore[arg-type]
    Pipeline[str, int, Session, str]([fetch])  # type: ignore[misc]
