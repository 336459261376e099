"""The same work by hand, by us, and by other libraries, each used as its own documentation shows.

A contender may offer a chain of steps for one value (``run``), a list of results (``map``), an iteration
over results (``stream``), or some of them. The bound on concurrency is the same for all. A library that
runs one function over many items is given the steps in one coroutine, which suits it best.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, NamedTuple

from async_pipeline import Pipeline, Stage, __version__

Handler = Callable[[int], Awaitable[int]]
Source = Iterable[int] | AsyncIterable[int]
MapItems = Callable[[Any], Awaitable[list[int]]]
Open = Callable[[Any], AbstractAsyncContextManager[AsyncIterator[int]]]

_END: Any = object()


class Work(NamedTuple):
    """What is to be done with each item."""

    handler: Handler
    stages: int
    concurrency: int

    def in_one(self) -> Handler:
        """Return the steps as one coroutine function."""
        handlers = (self.handler,) * self.stages

        async def item(value: int) -> int:
            for handler in handlers:
                value = await handler(value)
            return value

        return item if self.stages > 1 else self.handler


class Neighbour:
    """A contender; a method returns ``None`` for what there is no call for."""

    package: ClassVar[str] = ""
    takes: ClassVar[str] = "any"  # source: any, sync, sequence
    map_takes: ClassVar[str] = ""  # where that is another
    map_keeps_order: ClassVar[bool] = True
    most_items: ClassVar[int] = 1_000_000  # that it is given; fewer where they would take too long

    def __init__(self) -> None:
        self.module: Any = import_module(self.package.replace("-", "_")) if self.package else None

    @property
    def title(self) -> str:
        return f"{self.package} {version(self.package)}"

    def run(self, work: Work) -> Handler | None:
        """Return a call that takes one value through the steps."""
        return None

    def map(self, work: Work) -> MapItems | None:
        """Return a call that makes a list of results."""
        return None

    def stream(self, work: Work, *, ordered: bool) -> Open | None:
        """Return a call that opens an iteration over results, in order or as they finish."""
        return None


async def collect(open_stream: Open, items: Any) -> list[int]:
    """Return what a stream gives."""
    async with open_stream(items) as results:
        return [value async for value in results]


def _opened(iterate: Callable[[Any], AsyncIterator[int]]) -> Open:
    """Open what is iterated without further ado: ``async for value in iterate(items)``."""

    @asynccontextmanager
    async def opened(items: Any) -> AsyncIterator[AsyncIterator[int]]:
        yield iterate(items)

    return opened


# ---- by hand


class Workers(Neighbour):
    """As many workers as may run at once, over one iterator; what is hard to beat."""

    title = "workers, by hand"
    map_takes = "sequence"

    def run(self, work: Work) -> Handler:
        return work.in_one()

    def map(self, work: Work) -> MapItems:
        handlers = (work.handler,) * work.stages

        async def map_items(items: Sequence[int]) -> list[int]:
            results = [0] * len(items)
            jobs = enumerate(items)

            async def worker() -> None:
                # the steps stand in the worker itself: a coroutine more would be paid for at each suspension
                for index, value in jobs:
                    for handler in handlers:
                        value = await handler(value)
                    results[index] = value

            async with asyncio.TaskGroup() as group:
                for _ in range(work.concurrency):
                    group.create_task(worker())
            return results

        return map_items

    def stream(self, work: Work, *, ordered: bool) -> Open | None:
        return None if ordered else _opened(partial(_over_queues, work))


async def _over_queues(work: Work, items: Source) -> AsyncIterator[int]:
    handlers = (work.handler,) * work.stages
    jobs: asyncio.Queue[int] = asyncio.Queue(work.concurrency)
    results: asyncio.Queue[int] = asyncio.Queue(work.concurrency)

    async def fill() -> None:
        if isinstance(items, AsyncIterable):
            async for item in items:
                await jobs.put(item)
        else:
            for item in items:
                await jobs.put(item)
        for _ in range(work.concurrency):
            await jobs.put(_END)

    async def worker() -> None:
        while (value := await jobs.get()) is not _END:
            for handler in handlers:
                value = await handler(value)
            await results.put(value)
        await results.put(_END)

    async with asyncio.TaskGroup() as group:
        group.create_task(fill())
        for _ in range(work.concurrency):
            group.create_task(worker())
        left = work.concurrency
        while left:
            if (value := await results.get()) is _END:
                left -= 1
            else:
                yield value


class TaskPerItem(Neighbour):
    """What is written most: a ``TaskGroup``, a ``Semaphore`` and a task for each item."""

    title = "`TaskGroup` and `Semaphore`, by hand"
    takes = "sync"
    most_items = 100_000

    def map(self, work: Work) -> MapItems:
        run = work.in_one()

        async def map_items(items: Iterable[int]) -> list[int]:
            semaphore = asyncio.Semaphore(work.concurrency)

            async def bounded(item: int) -> int:
                async with semaphore:
                    return await run(item)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(bounded(item)) for item in items]
            return [task.result() for task in tasks]

        return map_items


class Window(Neighbour):
    """A window of tasks that slides over the items."""

    title = "a window of tasks, by hand"

    def stream(self, work: Work, *, ordered: bool) -> Open | None:
        return _opened(partial(_over_window, work)) if ordered else None


async def _over_window(work: Work, items: Source) -> AsyncIterator[int]:
    run = work.in_one()
    window: deque[asyncio.Task[int]] = deque()
    try:
        if isinstance(items, AsyncIterable):
            async for item in items:
                window.append(asyncio.ensure_future(run(item)))
                if len(window) == work.concurrency:
                    yield await window.popleft()
        else:
            for item in items:
                window.append(asyncio.ensure_future(run(item)))
                if len(window) == work.concurrency:
                    yield await window.popleft()
        while window:
            yield await window.popleft()
    finally:
        for task in window:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)


# ---- us


class Ours(Neighbour):
    title = f"**async-pipeline {__version__}**"

    def _pipeline(self, work: Work) -> Pipeline[int, int]:
        return Pipeline([Stage(f"stage{number}", work.handler) for number in range(work.stages)])

    def run(self, work: Work) -> Handler:
        return self._pipeline(work).run

    def map(self, work: Work) -> MapItems:
        return partial(self._pipeline(work).map, concurrency=work.concurrency)

    def stream(self, work: Work, *, ordered: bool) -> Open:
        open_stream: Any = self._pipeline(work).stream
        return partial(open_stream, concurrency=work.concurrency, ordered=ordered)


# ---- the others


class Aiometer(Neighbour):
    package = "aiometer"
    takes = "sequence"
    most_items = 100_000

    def map(self, work: Work) -> MapItems:
        run = work.in_one()

        async def map_items(items: Sequence[int]) -> list[int]:
            calls = [partial(run, item) for item in items]
            results: list[int] = await self.module.run_all(calls, max_at_once=work.concurrency)
            return results

        return map_items

    def stream(self, work: Work, *, ordered: bool) -> Open | None:
        return None if ordered else partial(self.module.amap, work.in_one(), max_at_once=work.concurrency)


class Streamable(Neighbour):
    package = "streamable"

    def map(self, work: Work) -> MapItems:
        return partial(collect, self.stream(work, ordered=True))

    def stream(self, work: Work, *, ordered: bool) -> Open:
        run = work.in_one()

        def iterate(items: Source) -> AsyncIterator[int]:
            mapped = self.module.stream(items).map(
                run, concurrency=work.concurrency, as_completed=not ordered
            )
            iterator: AsyncIterator[int] = aiter(mapped)
            return iterator

        return _opened(iterate)


class Aiostream(Neighbour):
    package = "aiostream"
    most_items = 100_000

    def map(self, work: Work) -> MapItems:
        return partial(collect, self.stream(work, ordered=True))

    def stream(self, work: Work, *, ordered: bool) -> Open:
        stream, run = self.module.stream, work.in_one()

        def open_stream(items: Source) -> Any:
            mapped = stream.map(stream.iterate(items), run, ordered=ordered, task_limit=work.concurrency)
            return mapped.stream()

        return open_stream


class LangChain(Neighbour):
    package = "langchain-core"
    takes = "sequence"
    most_items = 10_000

    def __init__(self) -> None:
        self.module = import_module("langchain_core.runnables")

    def _chain(self, work: Work) -> Any:
        steps = [self.module.RunnableLambda(work.handler) for _ in range(work.stages)]
        return self.module.RunnableSequence(*steps) if len(steps) > 1 else steps[0]

    def run(self, work: Work) -> Handler:
        run: Handler = self._chain(work).ainvoke
        return run

    def map(self, work: Work) -> MapItems:
        chain, config = self._chain(work), {"max_concurrency": work.concurrency}

        async def map_items(items: Sequence[int]) -> list[int]:
            results: list[int] = await chain.abatch(list(items), config=config)
            return results

        return map_items

    def stream(self, work: Work, *, ordered: bool) -> Open | None:
        chain, config = self._chain(work), {"max_concurrency": work.concurrency}

        async def iterate(items: Sequence[int]) -> AsyncIterator[int]:
            async with aclosing(chain.abatch_as_completed(list(items), config=config)) as results:
                async for _, value in results:
                    yield value

        return None if ordered else _opened(iterate)


class Pipestage(Neighbour):
    package = "pipestage"

    def map(self, work: Work) -> MapItems:
        run = work.in_one()

        async def map_items(items: Source) -> list[int]:
            results: list[int] = (
                await self.module.stream(items).map(run, concurrency=work.concurrency).collect()
            )
            return results

        return map_items

    def stream(self, work: Work, *, ordered: bool) -> Open:
        run = work.in_one()

        @asynccontextmanager
        async def opened(items: Source) -> AsyncIterator[AsyncIterator[int]]:
            mapped = self.module.stream(items).map(run, concurrency=work.concurrency, ordered=ordered)
            async with aclosing(mapped):  # as its documentation advises
                yield aiter(mapped)

        return opened


class Flowlet(Neighbour):
    package = "flowlet"
    map_keeps_order = False

    def map(self, work: Work) -> MapItems:
        run = work.in_one()

        async def map_items(items: Source) -> list[int]:
            results: list[int] = (
                await self.module.pipe(items).map(run, concurrency=work.concurrency).collect()
            )
            return results

        return map_items

    def stream(self, work: Work, *, ordered: bool) -> Open | None:
        run = work.in_one()

        def iterate(items: Source) -> AsyncIterator[int]:
            iterator: AsyncIterator[int] = aiter(
                self.module.pipe(items).map(run, concurrency=work.concurrency)
            )
            return iterator

        return None if ordered else _opened(iterate)


class TaskiqPipelines(Neighbour):
    """In memory: for one value, each task runs where it is sent from; for many, all of them at once."""

    package = "taskiq-pipelines"
    takes = "sequence"
    most_items = 10_000
    _POLL = 0.001  # seconds between two looks for results

    def __init__(self) -> None:
        super().__init__()
        self._taskiq: Any = import_module("taskiq")

    def _broker(self, **options: Any) -> Any:
        # by default it keeps a hundred results, and a map needs all
        broker = self._taskiq.InMemoryBroker(max_stored_results=-1, **options)
        broker.add_middlewares(self.module.PipelineMiddleware())
        return broker

    def run(self, work: Work) -> Handler:
        broker = self._broker(await_inplace=True)
        task = broker.register_task(_own(work.handler), task_name="step")
        pipeline = self.module.Pipeline(broker, task)
        for _ in range(work.stages - 1):
            pipeline.call_next(task)

        async def run(value: int) -> int:
            sent = await pipeline.kiq(value)
            result: int = (await sent.wait_result(check_interval=self._POLL)).return_value
            return result

        return run

    def map(self, work: Work) -> MapItems:
        async def map_items(items: Sequence[int]) -> list[int]:
            broker = self._broker()
            start = broker.register_task(_own(_as_it_is), task_name="start")
            task = broker.register_task(_own(work.in_one()), task_name="item")
            pipeline = self.module.Pipeline(broker, start).map(task, check_interval=self._POLL)
            try:
                sent = await pipeline.kiq(list(items))
                results: list[int] = (await sent.wait_result(check_interval=self._POLL)).return_value
            finally:
                await broker.shutdown()
            return results

        return map_items


def _own(handler: Any) -> Any:
    """Return a function of its own, as taskiq renames what it makes a task of."""

    async def task(value: Any) -> Any:
        return await handler(value)

    return task


async def _as_it_is(items: list[int]) -> list[int]:
    return items


BY_HAND: tuple[type[Neighbour], ...] = (Workers, TaskPerItem, Window)
LIBRARIES: tuple[type[Neighbour], ...] = (
    Streamable,
    Pipestage,
    Flowlet,
    Aiometer,
    Aiostream,
    LangChain,
    TaskiqPipelines,
)


class Found(NamedTuple):
    """Who can be measured here."""

    contenders: list[Neighbour]  # those by hand first, then we
    missing: list[str]  # the packages that are not installed


def find_neighbours(libraries: Iterable[type[Neighbour]] = LIBRARIES) -> Found:
    """Return all contenders, and the names of the packages that can't be imported."""
    contenders: list[Neighbour] = [each() for each in (*BY_HAND, Ours)]
    missing: list[str] = []
    for library in libraries:
        try:
            version(library.package)
            contenders.append(library())
        except (PackageNotFoundError, ImportError):
            missing.append(library.package)
    return Found(contenders, missing)
