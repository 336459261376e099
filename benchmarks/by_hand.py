"""The same work in bare asyncio, as short as it gets: no errors, no context, no isolation, no closing."""

import asyncio
from collections.abc import Sequence

from .work import CONCURRENCY, STAGES, after, before, plain, suspending, sync

_plain = (plain,) * STAGES
_sync = (sync,) * STAGES
_suspending = (suspending,) * STAGES
_named = tuple((f"stage{number}", plain) for number in range(STAGES))


async def run_plain(value: int) -> int:
    for handler in _plain:
        value = await handler(value)
    return value


async def run_sync(value: int) -> int:
    for handler in _sync:
        value = handler(value)
    return value


async def run_hooked(value: int) -> int:
    for name, handler in _named:
        before(name, value)
        output = await handler(value)
        after(name, value, output, None)
        value = output
    return value


async def run_timeout(value: int) -> int:
    for handler in _plain:
        async with asyncio.timeout(60):
            value = await handler(value)
    return value


async def run_suspending(value: int) -> int:
    for handler in _suspending:
        value = await handler(value)
    return value


async def task_per_item(items: Sequence[int]) -> list[int]:
    semaphore = asyncio.Semaphore(CONCURRENCY)

    async def work(value: int) -> int:
        async with semaphore:
            for handler in _suspending:
                value = await handler(value)
            return value

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(item)) for item in items]
    return [task.result() for task in tasks]


async def pool(items: Sequence[int]) -> list[int]:
    results = [0] * len(items)
    jobs = enumerate(items)

    async def work() -> None:
        # the stages stand in the worker itself: a coroutine around them would be resumed with every handler
        for index, value in jobs:
            for handler in _suspending:
                value = await handler(value)
            results[index] = value

    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(work())
    return results
