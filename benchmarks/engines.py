"""What a batch costs per item with an engine: taskiq in memory, Dask; with a REDIS_URL, taskiq's workers."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple
from uuid import uuid4

from distributed import Client, LocalCluster
from taskiq import AsyncBroker, InMemoryBroker
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from async_pipeline import Pipeline
from async_pipeline.engine import Engine
from async_pipeline.integrations.dask import DaskEngine
from async_pipeline.integrations.taskiq import TaskiqEngine

CHUNK_SIZES = (1, 10, 100)
REACH = {("taskiq, Redis Streams, two workers", 100): 80, ("Dask, two workers", 100): 80}  # µs per item
_QUEUE = "ASYNC_PIPELINE_BENCHMARK_QUEUE"
_WORKERS = ("--workers", "2", "--max-async-tasks", "2", "--max-prefetch", "0", "--log-level", "ERROR")
_CONCURRENCY = 50


class Case(NamedTuple):
    """A way to the workers, and how many items travel together."""

    title: str
    engine: Callable[[int], AbstractAsyncContextManager[Engine]]
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


@asynccontextmanager
async def over_taskiq(broker: AsyncBroker, chunk_size: int) -> AsyncIterator[Engine]:
    """Yield an engine on this broker's workers."""
    engine = TaskiqEngine(broker, chunk_size=chunk_size, start_timeout=30)
    engine.register(pipeline)
    async with engine:
        yield engine


@asynccontextmanager
async def over_dask(chunk_size: int) -> AsyncIterator[Engine]:
    """Yield an engine on a cluster of two processes."""
    make_cluster: Any = LocalCluster
    connect: Any = Client
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "asynchronous": True}
    async with (
        make_cluster(n_workers=2, threads_per_worker=1, processes=True, **here) as cluster,
        connect(cluster, asynchronous=True) as client,
    ):
        yield DaskEngine(client, chunk_size=chunk_size)


@contextmanager
def cases() -> Iterator[list[Case]]:
    """Yield what can be measured here, with taskiq's workers where there is a Redis."""
    ways: dict[str, Callable[[int], AbstractAsyncContextManager[Engine]]] = {
        "taskiq, in memory": partial(over_taskiq, broker),
        "Dask, two workers": over_dask,
    }
    with ExitStack() as stack:
        url = os.environ.get("REDIS_URL")
        if url is not None:
            queue = f"benchmark-{uuid4().hex}"
            ways["taskiq, Redis Streams, two workers"] = partial(over_taskiq, _made(url, queue))
            stack.enter_context(_workers(queue))
        yield [Case(title, engine, size) for title, engine in ways.items() for size in CHUNK_SIZES]


@contextmanager
def _workers(queue: str) -> Iterator[None]:
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.engines:broker", *_WORKERS]
    env = {**os.environ, _QUEUE: queue, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        yield
    finally:
        workers.send_signal(signal.SIGINT)
        try:
            workers.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(workers.pid, signal.SIGKILL)
            workers.wait()


async def _batches(case: Case, count: int, rounds: int) -> list[float]:
    seconds = []
    async with case.engine(case.chunk_size) as engine:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            results = await pipeline.map(range(count), _CONCURRENCY, engine=engine)
            seconds.append(time.perf_counter() - started)
            assert results == list(range(1, count + 1))
    return seconds[1:]  # the first one may wait for workers that start


def micros(case: Case, count: int, rounds: int) -> float:
    """Return the median of what some batches cost, in µs per item by the time of day."""
    return median(asyncio.run(_batches(case, count, rounds))) / count * 1e6
