"""The work that every contender does: five trivial stages, each adding one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from async_pipeline import Pipeline, Stage, each

STAGES = 5
CONCURRENCY = 50

Run = Callable[[int], Awaitable[int]]
Contender = Callable[[Sequence[int]], Awaitable[list[int]]]


async def plain(value: int) -> int:
    return value + 1


def sync(value: int) -> int:
    return value + 1


async def suspending(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


def before(name: str, value: Any) -> None:
    """A hook that does nothing."""


def after(name: str, value: Any, output: Any, error: Exception | None) -> None:
    """A hook that does nothing."""


def expected(items: Sequence[int]) -> list[int]:
    return [item + STAGES for item in items]


def one_by_one(run: Run) -> Contender:
    async def contender(items: Sequence[int]) -> list[int]:
        return [await run(item) for item in items]

    return contender


def _pipeline(handler: Callable[[int], Any], **options: Any) -> Pipeline[int, int]:
    return Pipeline([Stage(f"stage{number}", handler, **options) for number in range(STAGES)])


run_plain: Run = _pipeline(plain).run
run_sync: Run = _pipeline(sync).run
run_timeout: Run = _pipeline(plain, timeout=60).run
run_hooked: Run = Pipeline(_pipeline(plain).stages, before_stage=before, after_stage=after).run

MORE_STAGES = 20


def observer(event: object) -> None:
    """An observer that does nothing."""


def observed(handler: Callable[[int], Any], more: int = 0, **options: Any) -> Contender:
    stages = [Stage("stage", handler, **options)] * (STAGES + more)
    return one_by_one(Pipeline(stages, observers=[observer]).run)


def unobserved(handler: Callable[[int], Any], more: int = 0, **options: Any) -> Contender:
    return one_by_one(Pipeline([Stage("stage", handler, **options)] * (STAGES + more)).run)


suspending_pipeline = _pipeline(suspending)


async def map_items(items: Sequence[int]) -> list[int]:
    return await suspending_pipeline.map(items, CONCURRENCY)


each_element = Pipeline([each(suspending_pipeline, CONCURRENCY)])


async def each_items(items: Sequence[int]) -> list[int]:
    results: list[int] = await each_element.run(items)
    return results


async def stream_items(items: Sequence[int]) -> list[int]:
    async with suspending_pipeline.stream(items, CONCURRENCY) as results:
        return [value async for value in results]
