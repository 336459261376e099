"""The peak of traced memory above the results themselves, each in a process of its own.

``python -m benchmarks.memory map 1000000`` prints one figure, in bytes, for each number. The name of a class
of ``neighbours.py`` in place of ``map`` gives that contender's, for a stream, or else a map with its results.
"""

import asyncio
import gc
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from . import neighbours
from .neighbours import Neighbour, Work
from .work import CONCURRENCY, plain, suspending_pipeline


def peak_bytes(work: str, count: int) -> int:
    """Measure in a fresh interpreter."""
    return peaks(work, count)[0]


def peaks(work: str, *counts: int) -> list[int]:
    """Measure several numbers of items, one after the other, in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.memory", work, *map(str, counts)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return [int(line) for line in printed.split()]


def _lazy(count: int) -> Iterator[int]:
    yield from range(count)


async def _map(count: int) -> int:
    results = await suspending_pipeline.map(_lazy(count), CONCURRENCY)
    peak = tracemalloc.get_traced_memory()[1]
    gc.collect()
    # the list as it was returned: like any list that grew, it has spare room for an eighth more
    kept = tracemalloc.get_traced_memory()[0]
    del results
    return peak - kept


async def _stream(count: int) -> int:
    before = tracemalloc.get_traced_memory()[0]
    async with suspending_pipeline.stream(_lazy(count), CONCURRENCY) as results:
        async for _ in results:
            pass
    return tracemalloc.get_traced_memory()[1] - before


def _of(contender: Neighbour) -> Callable[[int], Awaitable[int]]:
    work = Work(plain, 1, CONCURRENCY)
    open_stream = contender.stream(work, ordered=True) or contender.stream(work, ordered=False)
    call = contender.map(work)

    async def measured(count: int) -> int:
        source: Any = range(count) if contender.takes == "sequence" else _lazy(count)
        before = tracemalloc.get_traced_memory()[0]
        if open_stream is not None:
            async with open_stream(source) as results:
                async for _ in results:
                    pass
        elif call is not None:
            await call(source)
        return tracemalloc.get_traced_memory()[1] - before

    return measured


def _main(work: str, *counts: int) -> None:
    measured: Any = {"map": _map, "stream": _stream}.get(work)
    if measured is None:
        measured = _of(getattr(neighbours, work)())
    asyncio.run(measured(min(1000, min(counts))))  # imports and caches
    gc.collect()
    tracemalloc.start()
    for count in counts:
        gc.collect()
        tracemalloc.reset_peak()
        print(asyncio.run(measured(count)))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
