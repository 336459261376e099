"""What several test modules need."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import async_pipeline
from async_pipeline import Pipeline, Stage
from async_pipeline.testing import VirtualClockLoop

T = TypeVar("T")


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a virtual clock of its own; for tests that make many of them."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own, which sees the same async_pipeline as this one."""
    paths = [str(Path(async_pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )


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
