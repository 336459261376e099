"""Every async test runs under each of the event loops below, on a clock that jumps where there is one."""

import asyncio
import gc
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from async_pipeline.testing import VirtualClockLoop

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]


class EagerLoop(VirtualClockLoop):
    def __init__(self) -> None:
        super().__init__()
        if sys.version_info >= (3, 12):
            self.set_task_factory(asyncio.eager_task_factory)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"virtual": VirtualClockLoop}
    if sys.version_info >= (3, 12):
        factories["eager"] = EagerLoop
    if uvloop is not None and item.get_closest_marker("virtual") is None:
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> None:
    """Fail an async test that leaves a task behind; a coroutine left unawaited is a warning, so an error."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("no_tasks_left")


@pytest_asyncio.fixture
async def no_tasks_left() -> AsyncIterator[None]:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, complaint: complaints.append(complaint))
    yield
    assert not complaints, "a callback failed, or an exception was never retrieved"
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"the test left tasks behind: {left}"


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Let a coroutine that sits unawaited in a reference cycle be found with the module that left it."""
    yield
    gc.collect()
