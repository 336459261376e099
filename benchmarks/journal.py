"""What a journal costs per item, and how long it keeps the event loop from its other work."""

import asyncio
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from async_pipeline import Pipeline
from async_pipeline.journal import Journal

CONCURRENCY = 100
MOST_HELD = 20  # milliseconds


class Case(NamedTuple):
    """A batch with a journal, and the µs per item that it may cost."""

    title: str
    synchronous: Literal["NORMAL", "FULL"]
    is_resumed: bool
    reach: int


CASES = (
    Case("`map` with a journal", "NORMAL", False, 60),
    Case('the same, `synchronous="FULL"`', "FULL", False, 70),
    Case("the same again: all comes out of the file", "NORMAL", True, 30),
)


class Cost(NamedTuple):
    micros: float  # per item
    held: float  # milliseconds that the event loop was held up at most


async def _plus_one(value: int) -> int:
    return value + 1


pipeline: Pipeline[int, int] = Pipeline([_plus_one])


async def cost(case: Case, count: int) -> Cost:
    """Run one batch and see what it takes, by the time of day, since it waits for the disk."""
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder, "batch.db"), synchronous=case.synchronous)
        if case.is_resumed:
            await pipeline.map(range(count), CONCURRENCY, journal=journal)
        worst = [0.0]
        watcher = asyncio.ensure_future(_watch(worst))
        started = time.perf_counter()
        results = await pipeline.map(range(count), CONCURRENCY, journal=journal)
        seconds = time.perf_counter() - started
        watcher.cancel()
        await asyncio.wait((watcher,))
        assert results == list(range(1, count + 1))
    return Cost(seconds / count * 1e6, worst[0] * 1e3)


async def _watch(worst: list[float]) -> None:
    """Ask for a turn each millisecond, and note the longest delay."""
    before = time.perf_counter()
    while True:
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        worst[0] = max(worst[0], now - before - 0.001)
        before = now


def costs(case: Case, count: int, rounds: int) -> Cost:
    """Return the median of the costs of some batches, and how long one held the loop up at the worst."""
    asyncio.run(cost(case, count))  # to warm up
    measured = [asyncio.run(cost(case, count)) for _ in range(rounds)]
    return Cost(median(each.micros for each in measured), max(each.held for each in measured))
