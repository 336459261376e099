"""The peak of traced memory above the results themselves, each in a process of its own.

``python -m benchmarks.memory map 1000000`` prints one figure, in bytes.
"""

import asyncio
import gc
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

from .work import CONCURRENCY, suspending_pipeline


def peak_bytes(work: str, count: int) -> int:
    """Measure in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.memory", work, str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


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


def _main(work: str, count: int) -> None:
    measured = {"map": _map, "stream": _stream}[work]
    asyncio.run(measured(1000))  # imports and caches
    gc.collect()
    tracemalloc.start()
    print(asyncio.run(measured(count)))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
