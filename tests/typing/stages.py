"""What the type checker knows of a stage: its input and output come from the handler."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict, assert_type

from aiolimiter import AsyncLimiter

from async_pipeline import Pipeline, RetryBudget, Stage, staged


@dataclass
class Session:
    user: str


class Row(TypedDict):
    name: str


async def fetch(url: str) -> bytes:
    return url.encode()


def parse(page: bytes) -> Row:
    return {"name": page.decode()}


async def fetch_as(url: str, session: Session) -> bytes:
    return f"{url}?{session.user}".encode()


def parse_with(page: bytes, context: dict[str, Any]) -> Row:
    return {"name": context["name"]}


async def count(row: Row, context: Row) -> int | None:
    return len(context["name"])


async def save(row: Row) -> None: ...


def round_to(value: float, digits: int = 2) -> str:
    return str(round(value, digits))


def later(url: str) -> Awaitable[bytes]:
    return fetch(url)


class Client:
    async def get(self, url: str) -> bytes:
        return url.encode()

    async def __call__(self, url: str, context: object) -> Row:
        return {"name": url}


def test_stage() -> None:
    assert_type(Stage("fetch", fetch), Stage[str, bytes])
    assert_type(Stage("parse", parse), Stage[bytes, Row])
    assert_type(Stage("fetch", fetch_as), Stage[str, bytes])
    assert_type(Stage("parse", parse_with), Stage[bytes, Row])
    assert_type(Stage("count", count), Stage[Row, int | None])
    assert_type(Stage("save", save), Stage[Row, None])
    assert_type(Stage("round_to", round_to), Stage[float, str])
    assert_type(Stage("later", later), Stage[str, bytes])
    assert_type(Stage("get", Client().get), Stage[str, bytes])
    assert_type(Stage("client", Client()), Stage[str, Row])
    assert_type(Stage("split", str.split), Stage[str, list[str]])
    assert_type(
        Stage(
            "fetch", fetch, timeout=1, retries=2, retry_delay=0.5, backoff="exponential", pass_context=False
        ),
        Stage[str, bytes],
    )


async def load(key: int) -> dict[str, Any]:
    return {"key": key}


async def load_as(key: int, context: dict[str, Any]) -> dict[str, Any]:
    return context | {"key": key}


def dump(row: dict[str, Any]) -> bytes:
    return str(row).encode()


async def send(body: bytes, context: dict[str, Any]) -> int:
    return len(body)


async def echo(value: Any) -> int:
    return int(value)


def test_any_in_a_signature_spoils_nothing_else() -> None:
    assert_type(Stage("load", load), Stage[int, dict[str, Any]])
    assert_type(Stage("load", load_as), Stage[int, dict[str, Any]])
    assert_type(Stage("dump", dump), Stage[dict[str, Any], bytes])
    assert_type(Stage("send", send), Stage[bytes, int])
    assert_type(Stage("echo", echo), Stage[Any, int])
    assert_type(staged(load_as), Stage[int, dict[str, Any]])
    assert_type(staged(retries=1)(load_as), Stage[int, dict[str, Any]])


async def test_lambda() -> None:
    same: Stage[int, int] = Stage("same", lambda value: value)
    first: Stage[int, int] = Stage("first", lambda value, context: value)
    Stage("whatever", lambda value: value)
    assert_type(await same.run(1), int)
    assert_type(await first.run(1), int)


@staged
async def bare(url: str) -> bytes:
    return url.encode()


@staged
def bare_sync(page: bytes, context: Session) -> Row:
    return {"name": context.user}


@staged(timeout=2.0, retries=3, backoff="exponential")
async def with_options(url: str) -> bytes:
    return url.encode()


@staged(name="other", pass_context=True)
def with_context(page: bytes, context: object) -> Row:
    return {"name": ""}


def test_staged() -> None:
    assert_type(bare, Stage[str, bytes])
    assert_type(bare_sync, Stage[bytes, Row])
    assert_type(with_options, Stage[str, bytes])
    assert_type(with_context, Stage[bytes, Row])
    assert_type(with_options.replace(retry_delay=0), Stage[str, bytes])


async def test_run() -> None:
    stage = Stage("fetch", fetch_as)
    assert_type(await stage.run("x"), bytes)
    assert_type(await stage.run("x", context=Session("me")), bytes)
    assert_type((stage.name, stage.timeout, stage.retries), tuple[str, float | None, int])
    await stage.run(1)  # type: ignore[arg-type]
    await stage.run("x", Session("me"))  # type: ignore[call-arg]


def test_variance() -> None:
    to_number: Stage[str, int] = Stage("len", len)
    wider: Stage[str, object] = to_number
    narrower: Stage[int, str] = Stage("repr", repr)
    Pipeline([wider, narrower])
    wrong_input: Stage[int, int] = Stage("fetch", fetch)  # type: ignore[arg-type]
    wrong_output: Stage[str, int] = Stage("fetch", fetch)  # type: ignore[arg-type]
    backwards: Stage[object, bytes] = bare  # type: ignore[assignment]
    Pipeline([wrong_input, wrong_output, backwards])


def test_wrong_arguments() -> None:
    Stage("fetch")  # type: ignore[call-overload]
    Stage("fetch", fetch, 1.0)  # type: ignore[call-overload]
    Stage("fetch", fetch, timeout="1")  # type: ignore[call-overload]
    Stage("fetch", fetch, retry=1)  # type: ignore[call-overload]
    Stage("fetch", fetch("x"))  # type: ignore[call-overload]
    staged(retries="3")  # type: ignore[call-overload]


class Doubling(Stage[int, int]):
    """A subclass with a ``run`` of its own."""

    async def run(self, value: int, *, context: object | None = None) -> int:
        return 2 * await super().run(value, context=context)


class Named(Stage[str, bytes]):
    """A subclass with arguments of its own."""

    def __init__(self, prefix: str) -> None:
        super().__init__(f"{prefix}-fetch", fetch)


async def test_subclasses() -> None:
    doubling = Doubling("add", lambda value: value + 1, retries=1)
    assert_type(await doubling.run(1), int)
    assert_type(doubling.replace(retries=2), Doubling)
    assert_type(await Named("slow").run("x"), bytes)
    Doubling("fetch", fetch)  # type: ignore[arg-type]


class Busy(Exception):  # noqa: N818
    retry_after = 60.0


def worth_it(error: Exception) -> bool | float:
    return error.retry_after if isinstance(error, Busy) else isinstance(error, OSError)


def only_busy(error: Busy) -> float | None:
    return error.retry_after


def empty(url: str, error: Exception) -> bytes:
    return b""


async def empty_later(url: str, error: Exception, session: Session) -> bytes:
    return session.user.encode()


class Slots:
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *error: object) -> None: ...


def test_resilience() -> None:
    limiter = asyncio.Semaphore(10)
    budget = RetryBudget(max_tokens=10, token_ratio=0.1)
    assert_type(
        Stage("fetch", fetch, limiter=limiter, max_delay=30, jitter=0.5, retry_budget=budget),
        Stage[str, bytes],
    )
    assert_type(Stage("fetch", fetch, retry_on=OSError, on_error=empty), Stage[str, bytes])
    assert_type(Stage("fetch", fetch, retry_on=(OSError, ValueError), limiter=Slots()), Stage[str, bytes])
    assert_type(Stage("fetch", fetch, retry_on=worth_it, on_error=empty_later), Stage[str, bytes])
    assert_type(Stage("fetch", fetch, retry_on=lambda error: 1.0), Stage[str, bytes])
    assert_type(Stage("fetch", fetch, retry_on=only_busy, on_error=lambda url, error: b""), Stage[str, bytes])
    assert_type(Stage("fetch", fetch, limiter=AsyncLimiter(50)), Stage[str, bytes])
    assert_type(Stage("parse", parse, executor="thread"), Stage[bytes, Row])
    assert_type(Stage("parse", parse, executor=ProcessPoolExecutor()), Stage[bytes, Row])
    assert_type(staged(executor=ThreadPoolExecutor())(parse), Stage[bytes, Row])
    Stage("fetch", fetch, retry_on="OSError")  # type: ignore[call-overload]
    Stage("fetch", fetch, retry_on=[OSError])  # type: ignore[call-overload]
    Stage("fetch", fetch, limiter=10)  # type: ignore[call-overload]
    Stage("fetch", fetch, on_error=b"")  # type: ignore[call-overload]
    Stage("fetch", fetch, retry_budget=10)  # type: ignore[call-overload]
    Stage("parse", parse, executor="process")  # type: ignore[call-overload]


async def test_timeout_of_a_run() -> None:
    pipeline: Pipeline[str, bytes] = Pipeline([fetch])
    assert_type(await pipeline.run("x", timeout=5), bytes)
    assert_type(await pipeline.map(["x"], timeout=0.5), list[bytes])
    assert_type((await pipeline.try_run("x", timeout=5)).unwrap(), bytes)
    async with pipeline.stream(["x"], timeout=5) as results:
        async for value in results:
            assert_type(value, bytes)
    await pipeline.run("x", timeout="5")  # type: ignore[arg-type]
