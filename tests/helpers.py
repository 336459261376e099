"""What several test modules need."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

from async_pipeline import Pipeline, Stage
from async_pipeline.testing import VirtualClockLoop

T = TypeVar("T")


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a virtual clock of its own; for tests that make many of them."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)


class Meter:
    """A handler that waits, and knows how many of its calls were in flight at most."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.in_flight = 0
        self.most = 0
        self.started: list[Any] = []
        self.finished: list[Any] = []
        self.cancelled: list[Any] = []

    async def __call__(self, value: Any) -> Any:
        self.started.append(value)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(value)
            raise
        finally:
            self.in_flight -= 1
        self.finished.append(value)
        return value

    @property
    def pipeline(self) -> Pipeline[Any, Any]:
        return Pipeline([Stage("meter", self)])


class Source:
    """An async iterable that counts what is pulled, and says how it was closed."""

    def __init__(self, items: Iterable[Any], seconds: float = 0.0) -> None:
        self.items = items
        self.seconds = seconds
        self.pulled = 0
        self.closed = False
        self.tasks: set[Any] = set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            for item in self.items:
                self.tasks.add(asyncio.current_task())
                if self.seconds:
                    await asyncio.sleep(self.seconds)
                self.pulled += 1
                yield item
        finally:
            self.tasks.add(asyncio.current_task())
            self.closed = True
