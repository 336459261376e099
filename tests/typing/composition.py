"""What mypy and pyright know of joined steps, and of steps made of steps."""
# pyright: reportUnnecessaryTypeIgnoreComment=true, reportUnusedExpression=false

import asyncio
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, assert_type

from async_pipeline import (
    Pipeline,
    Stage,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
    staged,
)
from async_pipeline.steps import Branch, Each, Fallback, Keep, Parallel, Require


class Row(TypedDict):
    name: str


@dataclass
class Session:
    user: str


@staged(retries=2)
async def fetch(url: str) -> bytes:
    return url.encode()


@staged
def parse(page: bytes) -> Row:
    return {"name": page.decode()}


async def save(row: Row) -> int:
    return len(row["name"])


async def save_as(row: Row, session: Session) -> int:
    return len(session.user)


def halve(number: int) -> float:
    return number / 2


def to_url(number: int) -> str:
    return f"/{number}"


async def to_url_later(number: int) -> str:
    return f"/{number}"


def to_url_with(number: int, context: Any) -> str:
    return f"{context}/{number}"


async def send(number: int) -> None: ...


def load(number: int) -> dict[str, Any]:
    return {"number": number}


async def dump(row: dict[str, Any]) -> str:
    return str(row)


def is_big(number: int) -> bool:
    return number > 9


async def is_big_later(number: int, context: Any) -> bool:
    return number > 9


def numbers(text: str) -> list[int]:
    return [*map(int, text.split())]


async def numbers_later(text: str) -> tuple[int, ...]:
    return (*map(int, text.split()),)


def total(parts: list[float]) -> float:
    return sum(parts)


def repeat(number: int, times: int) -> list[int]:
    return [number] * times


class Duck:
    """Any object with a name and a run is a step."""

    name = "duck"

    async def run(self, value: bytes, *, context: Any = None) -> str:
        return value.decode()


def of_callables(later: Callable[[bytes], Awaitable[int]], now: Callable[[int], str]) -> None:
    assert_type(fetch | later, Pipeline[str, int])
    assert_type(now | fetch, Pipeline[int, bytes])


def test_joins() -> None:
    assert_type(fetch | parse, Pipeline[str, Row])
    assert_type(fetch | parse | save, Pipeline[str, int])
    assert_type(fetch | parse | save_as | halve, Pipeline[str, float])
    assert_type((fetch | parse) | (save | Stage("halve", halve)), Pipeline[str, float])
    assert_type(to_url | fetch, Pipeline[int, bytes])
    assert_type(to_url_later | fetch, Pipeline[int, bytes])
    assert_type(to_url_with | fetch | parse, Pipeline[int, Row])
    assert_type(halve | Stage("str", str), Pipeline[int, str])
    assert_type(fetch | json.loads, Pipeline[str, Any])
    assert_type(fetch | len, Pipeline[str, int])
    assert_type(fetch | str, Pipeline[str, str])
    assert_type(fetch | (lambda page: 1), Pipeline[str, int])
    assert_type(fetch | len | load | dump, Pipeline[str, str])
    assert_type(fetch | Duck(), Pipeline[str, str])
    assert_type(Duck() | fetch, Pipeline[bytes, bytes])
    with_session: Pipeline[str, bytes, Session] = Pipeline([fetch])
    assert_type(with_session | parse, Pipeline[str, Row])


async def test_a_join_is_a_pipeline() -> None:
    joined = fetch | parse
    assert_type(await joined.run("/"), Row)
    assert_type(await joined.map(["/"]), list[Row])
    assert_type(joined.name, str)


def test_joins_that_do_not_fit() -> None:
    fetch | fetch  # type: ignore[operator]
    parse | fetch  # type: ignore[operator]
    fetch | save  # type: ignore[operator]
    halve | fetch  # type: ignore[operator]
    fetch | halve  # type: ignore[operator]
    fetch | parse | halve  # type: ignore[operator]
    (fetch | parse) | (to_url | fetch)  # type: ignore[operator]
    Duck() | parse  # type: ignore[operator]
    fetch | 5  # type: ignore[operator]
    fetch | "parse"  # type: ignore[operator]
    fetch | [parse]  # type: ignore[operator]
    fetch | parse(b"")  # type: ignore[operator]


def test_parallel() -> None:
    assert_type(parallel(page=fetch, size=len), Parallel[str, dict[str, Any]])
    assert_type(parallel({"a b": fetch, "c": to_upper}, name="enrich"), Parallel[Any, dict[str, Any]])
    assert_type(to_url | parallel(page=fetch, other=to_upper), Pipeline[int, dict[str, Any]])
    assert_type(parallel(big=is_big, later=is_big_later) | dump, Pipeline[int, str])
    halve | parallel(page=fetch)  # type: ignore[operator]
    parallel(page=5)  # type: ignore[call-overload]
    parallel([fetch])  # type: ignore[call-overload]
    parallel({"page": 5})  # type: ignore[dict-item]


def to_upper(text: str) -> str:
    return text.upper()


def test_each() -> None:
    assert_type(each(fetch), Each[Iterable[str] | AsyncIterable[str], list[bytes]])
    assert_type(each(halve, 20), Each[Iterable[int] | AsyncIterable[int], list[float]])
    assert_type(each(save_as, name="rows"), Each[Iterable[Row] | AsyncIterable[Row], list[int]])
    assert_type(each(fetch | parse), Each[Iterable[str] | AsyncIterable[str], list[Row]])
    assert_type(numbers | each(halve, concurrency=asyncio.Semaphore(3)), Pipeline[str, list[float]])
    assert_type(numbers | each(halve) | total, Pipeline[str, float])
    assert_type(numbers_later | each(to_url_later) | each(fetch), Pipeline[str, list[bytes]])
    numbers | each(fetch)  # type: ignore[operator]
    numbers | each(to_url) | total  # type: ignore[operator]
    each(5)  # type: ignore[call-overload]
    each(halve, concurrency="many")  # type: ignore[call-overload]


def test_keep() -> None:
    assert_type(keep(is_big), Keep[Iterable[int] | AsyncIterable[int], list[int]])
    assert_type(keep(is_big_later, 20), Keep[Iterable[int] | AsyncIterable[int], list[int]])
    assert_type(numbers | keep(is_big) | each(halve) | total, Pipeline[str, float])
    assert_type(numbers | keep(Stage("is_big", is_big)), Pipeline[str, list[int]])
    urls = keep(to_upper)
    numbers | urls  # type: ignore[operator]
    keep(5)  # type: ignore[call-overload]


def test_branch() -> None:
    assert_type(branch((is_big, to_url), otherwise=to_url_later), Branch[int, str])
    assert_type(branch((is_big, to_url), (is_big_later, to_url | Stage("up", to_upper))), Branch[int, str])
    assert_type(numbers | each(branch((is_big, to_url))) | each(fetch), Pipeline[str, list[bytes]])
    chosen = branch((is_big, to_url))
    fetch | chosen  # type: ignore[operator]
    assert_type(branch((is_big, to_url_later)), Branch[int, str])
    assert_type(branch((is_big, to_url_later), (is_big_later, to_url)), Branch[int, str])
    assert_type(branch((Stage("is_big", is_big), send), otherwise=send), Branch[int, None])
    assert_type(branch((lambda number: number > 9, to_url_later), otherwise=str), Branch[int, str])
    branch(is_big, to_url)  # type: ignore[call-overload]
    branch((is_big, 5))  # type: ignore[arg-type]


def test_fallback() -> None:
    assert_type(fallback(to_url, to_url_later, Stage("url", to_url_with)), Fallback[int, str])
    assert_type(fallback(to_url, on=OSError) | fetch, Pipeline[int, bytes])
    assert_type(fallback(to_url, to_url, on=(OSError, ValueError), name="url"), Fallback[int, str])
    url = fallback(to_url)
    fetch | url  # type: ignore[operator]
    assert_type(fallback(to_url_later, to_url_later), Fallback[int, str])
    assert_type(fallback(send), Fallback[int, None])
    assert_type(fallback(to_url_later, lambda number: "/"), Fallback[int, str])
    fallback(to_url, on="OSError")  # type: ignore[call-overload]


def test_require() -> None:
    assert_type(require("id", "email"), Require)
    assert_type(fetch | parse | require("name"), Pipeline[str, Row])
    assert_type(require("name") | save | halve, Pipeline[Any, float])
    fetch | parse | require("name") | halve  # type: ignore[operator]
    require(1)  # type: ignore[arg-type]


def longest(lines: list[str]) -> str:
    return max(lines, key=len)


def test_the_example_of_the_readme() -> None:
    unknown = Stage("unknown", lambda city: f"{city}: no idea")
    lines = Stage("split", str.split) | each(fallback(look_up, unknown), concurrency=20)
    assert_type(lines | parallel(longest=longest, total=len), Pipeline[str, dict[str, Any]])


async def look_up(city: str) -> str:
    return city


def test_more_arguments() -> None:
    assert_type(halve | Stage("round", partial(round, ndigits=2)) | int, Pipeline[int, int])
    assert_type(
        is_big | Stage("int", int) | partial(repeat, times=4) | each(halve), Pipeline[int, list[float]]
    )


async def test_run_alone() -> None:
    assert_type(await each(halve).run([1, 2]), list[float])
    assert_type(await parallel(big=is_big).run(1, context=Session("me")), dict[str, Any])
    assert_type(await branch((is_big, to_url)).run(1), str)
    await each(halve).run(["1"])  # type: ignore[list-item]
