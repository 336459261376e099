"""``CacheMiddleware`` over a real Redis, by the class that the docs show.

Only the server that ``REDIS_URL`` names is used, under a prefix of each test's own that is removed again.
Under the virtual clock an open connection makes the loop wait in real time: for milliseconds, here.
"""

import asyncio
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from async_pipeline import Pipeline, Stage
from async_pipeline.middlewares.cache import CacheMiddleware
from tests.integrations.servers import redis_url
from tests.test_readme import find_blocks

DOCS = Path(__file__).parents[2] / "docs" / "resilience.md"
REDIS_URL = redis_url()


@pytest.fixture(scope="module")
def redis_cache() -> Any:
    """The class that the docs show."""
    blocks = find_blocks(DOCS.read_text(encoding="utf-8"))
    [block] = [block for block in blocks if block.language == "python" and "class RedisCache" in block.code]
    namespace: dict[str, Any] = {"__name__": "resilience"}
    exec(compile("\n" * (block.line - 1) + block.code, str(DOCS), "exec", dont_inherit=True), namespace)
    return namespace["RedisCache"]


@pytest.fixture
def prefix() -> str:
    return f"async-pipeline-test:{uuid.uuid4()}:"


@pytest_asyncio.fixture
async def client(prefix: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(REDIS_URL)
    yield client
    for key in await keys(client, prefix):
        await client.delete(key)
    await client.aclose()


@pytest_asyncio.fixture
async def other_client() -> AsyncIterator[Redis]:
    """A second process has connections of its own."""
    client = Redis.from_url(REDIS_URL)
    yield client
    await client.aclose()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses every connection, and is kept from being given to somebody else."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


async def keys(client: Redis, prefix: str) -> list[bytes]:
    return [key async for key in client.scan_iter(match=prefix + "*", count=1000)]


class Fetch:
    """A handler that counts its calls; its outputs are pages, or all the one that it was given."""

    def __init__(self, *page: Any) -> None:
        self.page = page
        self.calls: list[Any] = []

    async def __call__(self, value: Any) -> Any:
        self.calls.append(value)
        await asyncio.sleep(0.001)
        return self.page[0] if self.page else {"page": value}


def cached(fetch: Any, cache: Any, **options: Any) -> Pipeline[Any, Any]:
    return Pipeline([Stage("fetch", fetch)], middlewares=[CacheMiddleware(cache, **options)])


async def test_what_one_process_computed_is_a_hit_in_another(
    redis_cache: Any, client: Redis, other_client: Redis, prefix: str
) -> None:
    first, second = Fetch(), Fetch()
    one = cached(first, redis_cache(client, prefix))
    other = cached(second, redis_cache(other_client, prefix))
    assert await one.run("/a") == {"page": "/a"}
    assert await other.run("/a") == {"page": "/a"}
    assert await other.run("/b") == {"page": "/b"}
    assert await one.run("/b") == {"page": "/b"}
    assert (first.calls, second.calls) == (["/a"], ["/b"])


async def test_stages_do_not_share_their_entries(redis_cache: Any, client: Redis, prefix: str) -> None:
    cache = CacheMiddleware(redis_cache(client, prefix))
    twice = Pipeline([Stage("one", Fetch("same")), Stage("two", Fetch("same"))], middlewares=[cache])
    assert await twice.run("same") == "same"
    assert len(await keys(client, prefix)) == 2


async def test_the_ttl_is_that_of_the_key(redis_cache: Any, client: Redis, prefix: str) -> None:
    await cached(Fetch(), redis_cache(client, prefix), ttl=90.5).run("/a")
    [key] = await keys(client, prefix)
    assert 60_000 < await client.pttl(key) <= 90_500


async def test_without_a_ttl_a_key_stays(redis_cache: Any, client: Redis, prefix: str) -> None:
    await cached(Fetch(), redis_cache(client, prefix)).run("/a")
    [key] = await keys(client, prefix)
    assert await client.pttl(key) == -1


async def test_what_has_expired_is_computed_again(redis_cache: Any, client: Redis, prefix: str) -> None:
    fetch = Fetch()
    pipeline = cached(fetch, redis_cache(client, prefix), ttl=0.05)
    await pipeline.run("/a")
    async with asyncio.timeout(10):
        while await keys(client, prefix):  # noqa: ASYNC110  # Redis tells nobody
            await asyncio.sleep(0.005)
    assert await pipeline.run("/a") == {"page": "/a"}
    assert fetch.calls == ["/a", "/a"]


@pytest.mark.parametrize("page", [None, False, 0, "", [], "null", {"a": [1.5, None, "ü"]}])
async def test_every_output_that_json_can_tell_is_cached(
    redis_cache: Any, client: Redis, other_client: Redis, prefix: str, page: Any
) -> None:
    fetch = Fetch(page)
    for each in (client, other_client):
        assert await cached(fetch, redis_cache(each, prefix)).run("/a") == page
    assert fetch.calls == ["/a"]


async def test_equal_keys_that_come_at_once_are_computed_once(
    redis_cache: Any, client: Redis, prefix: str
) -> None:
    fetch = Fetch()
    results = await cached(fetch, redis_cache(client, prefix)).map(["/a"] * 100, concurrency=100)
    assert results == [{"page": "/a"}] * 100
    assert fetch.calls == ["/a"]


async def test_many_keys_at_once(
    redis_cache: Any, client: Redis, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Fetch()
    pipeline = cached(fetch, redis_cache(client, prefix))
    once, again = [await pipeline.map(range(300), concurrency=50) for _ in range(2)]
    assert once == again == [{"page": number} for number in range(300)]
    assert sorted(fetch.calls) == list(range(300))
    assert not caplog.records, "no call failed for want of a connection"


async def test_without_a_server_each_run_computes_and_the_log_says_why(
    redis_cache: Any, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Fetch()
    nobody = Redis.from_url(f"redis://127.0.0.1:{closed_port}")
    pipeline = cached(fetch, redis_cache(nobody), ttl=60)
    with caplog.at_level(logging.ERROR, "async_pipeline"):
        assert await pipeline.map(["/a", "/b"]) == [{"page": "/a"}, {"page": "/b"}]
    await nobody.aclose()
    assert sorted(fetch.calls) == ["/a", "/b"]
    assert len(caplog.records) == 4, "two pages could not be asked for, and two not be stored"
    assert {record.exc_info[0] for record in caplog.records if record.exc_info} == {RedisConnectionError}


async def test_a_server_that_stops_in_the_middle_does_not_stop_the_run(
    redis_cache: Any, client: Redis, other_client: Redis, prefix: str, closed_port: int
) -> None:
    fetch = Fetch()

    async def fetch_and_lose_the_server(value: str) -> Any:
        if value == "/last":  # a client sees its connections closed then, and new ones refused
            await other_client.connection_pool.disconnect()
            other_client.connection_pool = ConnectionPool(port=closed_port)
        return await fetch(value)

    pipeline = cached(fetch_and_lose_the_server, redis_cache(other_client, prefix))
    pages = ["/a", "/a", "/last", "/a"]
    assert await pipeline.map(pages, concurrency=1) == [{"page": page} for page in pages]
    assert fetch.calls == ["/a", "/last", "/a"]
    assert len(await keys(client, prefix)) == 1
