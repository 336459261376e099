"""What a batch costs per item over taskiq: in memory, and, with a REDIS_URL, over two workers."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from uuid import uuid4

from taskiq import AsyncBroker, InMemoryBroker
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from async_pipeline import Pipeline
from async_pipeline.integrations.taskiq import TaskiqEngine

CHUNK_SIZES = (1, 10, 100)
REACH = {("Redis Streams, two workers", 100): 80}  # µs per item
_QUEUE = "ASYNC_PIPELINE_BENCHMARK_QUEUE"
_WORKERS = ("--workers", "2", "--max-async-tasks", "2", "--max-prefetch", "0", "--log-level", "ERROR")
_CONCURRENCY = 50


class Case(NamedTuple):
    """A way to the workers, and how many items travel together."""

    title: str
    broker: AsyncBroker
    chunk_size: int


async def plus_one(value: int) -> int:
    return value + 1


pipeline: Pipeline[int, int] = Pipeline([plus_one], name="plus_one")


def _made(url: str | None, queue: str) -> AsyncBroker:
    if url is None:
        return InMemoryBroker()
    results: Any = RedisAsyncResultBackend(url, result_ex_time=60)
    # from the first message on, so that none is missed while the workers start
    streams = RedisStreamBroker(url, queue_name=queue, consumer_id="0", xread_count=1, xread_block=200)
    return streams.with_result_backend(results)


broker = _made(os.environ.get("REDIS_URL") if _QUEUE in os.environ else None, os.environ.get(_QUEUE, ""))
TaskiqEngine(broker).register(pipeline)  # what the workers import


@contextmanager
def cases() -> Iterator[list[Case]]:
    """Yield what can be measured here, with workers where there is a Redis."""
    found = [Case("in memory", broker, size) for size in CHUNK_SIZES]
    url = os.environ.get("REDIS_URL")
    if url is None:
        yield found
        return
    queue = f"benchmark-{uuid4().hex}"
    over_redis = _made(url, queue)
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.engines:broker", *_WORKERS]
    workers = subprocess.Popen(command, env={**os.environ, _QUEUE: queue}, start_new_session=True)
    try:
        yield found + [Case("Redis Streams, two workers", over_redis, size) for size in CHUNK_SIZES]
    finally:
        workers.send_signal(signal.SIGINT)
        try:
            workers.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(workers.pid, signal.SIGKILL)
            workers.wait()


async def _batches(case: Case, count: int, rounds: int) -> list[float]:
    engine = TaskiqEngine(case.broker, chunk_size=case.chunk_size)
    engine.register(pipeline)
    seconds = []
    async with engine:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            results = await pipeline.map(range(count), _CONCURRENCY, engine=engine)
            seconds.append(time.perf_counter() - started)
            assert results == list(range(1, count + 1))
    return seconds[1:]  # the first one may wait for workers that start


def micros(case: Case, count: int, rounds: int) -> float:
    """Return the median of what some batches cost, in µs per item by the time of day."""
    return median(asyncio.run(_batches(case, count, rounds))) / count * 1e6
