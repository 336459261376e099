"""What the cost of an item does not tell: when results come, what a slow item holds up, how it all stops.

Each function measures a contender once, by the time of day, in an event loop of its own.
"""

import asyncio
import gc
import logging
import time
import warnings
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar

from .neighbours import MapItems, Neighbour, Open, Work, collect
from .work import CONCURRENCY, plain

T = TypeVar("T")

PATIENCE = 0.25  # seconds for a result that is there already
SLOW, FAST = 0.2, 0.001  # seconds of the one slow item, and of the others
FAST_ITEMS = 400
NARROW = 10  # concurrency, with the slow item
CLEAN_UP = 0.01  # seconds that a cancelled item needs
STUCK = 0.2  # seconds after which a task that should have ended runs on


def _run(main: Coroutine[Any, Any, T]) -> T:
    """Run it, and then end what it has left behind, without its complaints."""

    async def swept() -> T:
        try:
            return await main
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.freeze()  # to collect only what it leaves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of coroutines that were never awaited
            with asyncio.Runner() as runner:
                runner.get_loop().set_exception_handler(lambda loop, context: None)
                result = runner.run(swept())
            gc.collect()
        return result
    finally:
        gc.unfreeze()
        logging.disable(disabled)


# ---- the first result of a live source


class First(NamedTuple):
    """How long the first result took, if it came at all before the source went on."""

    seconds: float | None


def first_result(contender: Neighbour) -> First | None:
    """Let a source yield one item and then wait."""
    work = Work(plain, 1, CONCURRENCY)
    open_stream = contender.stream(work, ordered=True) or contender.stream(work, ordered=False)
    if open_stream is None or contender.takes != "any":
        return None
    return _run(_first(open_stream))


async def _first(open_stream: Open) -> First:
    go_on = asyncio.Event()

    async def live() -> AsyncIterator[int]:
        yield 1
        await go_on.wait()

    started = time.perf_counter()
    async with open_stream(live()) as results:
        came = asyncio.ensure_future(anext(results))
        await asyncio.wait((came,), timeout=PATIENCE)
        seconds = time.perf_counter() - started if came.done() else None
        go_on.set()
        assert await came == 2
        assert [value async for value in results] == []
    return First(seconds)


# ---- one slow item among fast ones


class Line(NamedTuple):
    """What went on beside the slow item."""

    finished: int  # of the others, while it ran
    seconds: float  # of the whole


def behind_a_slow_item(contender: Neighbour, *, ordered: bool) -> Line | None:
    """Let the first item be slow, and see how many of the others finish beside it."""
    finished = 0
    beside = 0

    async def handler(value: int) -> int:
        nonlocal finished, beside
        if value == 0:
            await asyncio.sleep(SLOW)
            beside = finished
        else:
            await asyncio.sleep(FAST)
            finished += 1
        return value + 1

    open_stream = contender.stream(Work(handler, 1, NARROW), ordered=ordered)
    if open_stream is None:
        return None

    async def line(open_stream: Open) -> Line:
        started = time.perf_counter()
        async with open_stream(range(FAST_ITEMS + 1)) as results:
            values = [value async for value in results]
        seconds = time.perf_counter() - started
        assert sorted(values) == list(range(1, FAST_ITEMS + 2))
        return Line(beside, seconds)

    return _run(line(open_stream))


# ---- a stop


class Stop(NamedTuple):
    """What was there when a cancelled call had returned."""

    seconds: float  # until it returned
    cleaning: int  # tasks that were still cleaning up
    left: int  # tasks that ran on
    is_cut_short: bool  # items were not given the time to clean up
    source_closed: bool | None  # None where the source can't be a generator


class _Items:
    """Items that wait until they are cancelled, and then need a moment to clean up."""

    def __init__(self) -> None:
        self.started = 0
        self.cut_short = 0
        self.source_closed = False
        self.are_waiting = asyncio.Event()

    async def handler(self, value: int) -> int:
        self.started += 1
        if self.started == CONCURRENCY:
            self.are_waiting.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.cut_short += 1
            await asyncio.sleep(CLEAN_UP)
            self.cut_short -= 1
        return value + 1

    async def source(self) -> AsyncIterator[int]:
        try:
            for number in range(10 * CONCURRENCY):
                yield number
        finally:
            self.source_closed = True


def stop(contender: Neighbour, kind: str) -> Stop | None:
    """Cancel a ``map``, or who iterates over a ``stream``, while its items wait."""
    return _run(_stop(contender, kind))


async def _stop(contender: Neighbour, kind: str) -> Stop | None:
    items = _Items()
    call = _call(contender, kind, Work(items.handler, 1, CONCURRENCY))
    if call is None:
        return None
    # held here, so that it is not closed by the garbage collector
    takes = (contender.map_takes if kind == "map" else "") or contender.takes
    source: Any = items.source() if takes == "any" else range(10 * CONCURRENCY)
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(call(source))
    await asyncio.wait_for(items.are_waiting.wait(), 10)
    begun = time.perf_counter()
    task.cancel()
    await asyncio.wait((task,))
    seconds = time.perf_counter() - begun
    source_closed = None if isinstance(source, range) else items.source_closed
    alive = asyncio.all_tasks() - before
    pending = (await asyncio.wait(alive, timeout=STUCK))[1] if alive else set()
    return Stop(seconds, len(alive) - len(pending), len(pending), items.cut_short > 0, source_closed)


def _call(contender: Neighbour, kind: str, work: Work) -> MapItems | None:
    if kind == "map":
        return contender.map(work)
    open_stream = contender.stream(work, ordered=True) or contender.stream(work, ordered=False)
    return None if open_stream is None else partial(collect, open_stream)
