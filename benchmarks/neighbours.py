"""The same work by other libraries, each used as its own documentation shows.

The bound is the same, and so is the order of the results wherever the library keeps one. A library that
runs one function over many items is given the five stages in one coroutine, which suits it best.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from .by_hand import run_suspending
from .work import CONCURRENCY, STAGES, Contender, one_by_one, plain, suspending


class Neighbour(NamedTuple):
    """What a library can do of our work; ``None`` where it offers nothing of the kind."""

    run: Contender | None
    map: Contender | None
    stream: Contender | None
    keeps_order: bool = True  # of a stream


def _aiometer() -> Neighbour:
    aiometer: Any = import_module("aiometer")

    async def map_items(items: Sequence[int]) -> list[int]:
        calls = [partial(run_suspending, item) for item in items]
        results: list[int] = await aiometer.run_all(calls, max_at_once=CONCURRENCY)
        return results

    async def stream_items(items: Sequence[int]) -> list[int]:
        async with aiometer.amap(run_suspending, items, max_at_once=CONCURRENCY) as results:
            return [value async for value in results]

    return Neighbour(None, map_items, stream_items, keeps_order=False)


def _streamable() -> Neighbour:
    stream: Any = import_module("streamable").stream

    async def stream_items(items: Sequence[int]) -> list[int]:
        return [value async for value in stream(items).map(run_suspending, concurrency=CONCURRENCY)]

    return Neighbour(None, stream_items, stream_items)


def _aiostream() -> Neighbour:
    stream: Any = import_module("aiostream.stream")

    def mapped(items: Sequence[int]) -> Any:
        return stream.map(stream.iterate(items), run_suspending, task_limit=CONCURRENCY)

    async def map_items(items: Sequence[int]) -> list[int]:
        results: list[int] = await stream.list(mapped(items))
        return results

    async def stream_items(items: Sequence[int]) -> list[int]:
        async with mapped(items).stream() as results:
            return [value async for value in results]

    return Neighbour(None, map_items, stream_items)


def _langchain_core() -> Neighbour:
    runnables: Any = import_module("langchain_core.runnables")

    def sequence(handler: Callable[[int], Any]) -> Any:
        return runnables.RunnableSequence(*(runnables.RunnableLambda(handler) for _ in range(STAGES)))

    chain = sequence(suspending)
    config = {"max_concurrency": CONCURRENCY}

    async def map_items(items: Sequence[int]) -> list[int]:
        results: list[int] = await chain.abatch(list(items), config=config)
        return results

    async def stream_items(items: Sequence[int]) -> list[int]:
        return [value async for _, value in chain.abatch_as_completed(list(items), config=config)]

    return Neighbour(one_by_one(sequence(plain).ainvoke), map_items, stream_items, keeps_order=False)


FACTORIES: Mapping[str, Callable[[], Neighbour]] = {
    "aiometer": _aiometer,
    "streamable": _streamable,
    "aiostream": _aiostream,
    "langchain-core": _langchain_core,
}


def find_neighbours() -> tuple[dict[str, Neighbour], list[str]]:
    """Return the libraries that are installed, by name and version, and the names of those that are not."""
    found: dict[str, Neighbour] = {}
    missing: list[str] = []
    for name, factory in FACTORIES.items():
        try:
            found[f"{name} {version(name)}"] = factory()
        except (PackageNotFoundError, ImportError):
            missing.append(name)
    return found, missing
