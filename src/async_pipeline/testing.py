"""Test code that waits, without waiting: an event loop whose clock jumps.

>>> with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
...     runner.run(main())                     # an hour of backoff, in a millisecond

With pytest-asyncio 1.4 or newer, in ``conftest.py``:

>>> def pytest_asyncio_loop_factories(config, item):
...     return {"virtual": VirtualClockLoop}
"""

import asyncio
import math
import selectors
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from .errors import DeadlockError

__all__ = ["VirtualClockLoop"]

# how many turns of the loop may find nothing but a timer that is due, before the clock moves all the same
_TURNS_AT_ONE_TIME = 64


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop that, when nothing is left to run, moves its clock to the next timer instead of waiting.

    ``loop.time()`` starts at 0.0 and stands still while code runs, so ``await asyncio.sleep(3600)`` takes
    exactly 3600 of its seconds and none of yours. Everything that asks the loop for the time follows:
    ``asyncio.sleep``, ``asyncio.timeout``, ``call_later``. ``time.monotonic`` and ``time.sleep`` do not.

    While a call in an executor, the shutdown of the default executor, or a socket is pending, the loop
    waits in real time, and the clock advances by the time that passed.

    Raises:
        DeadlockError: out of ``run_forever`` and so of ``asyncio.run``, at once, when every task waits and
            nothing could ever wake one. A thread of your own that calls ``call_soon_threadsafe`` is
            not known to the loop; let it run in an executor.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._turns = 0
        self._pending_calls = 0
        super().__init__(_JumpingSelector(self))
        self._own_files = len(self._files())

    def time(self) -> float:
        """Return the time in seconds; 0.0 when the loop was made."""
        return self._now

    def run_in_executor(  # type: ignore[override]  # its stub is generic in a way that differs by version
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        call: asyncio.Future[Any] = super().run_in_executor(executor, func, *args)
        self._pending_calls += 1
        call.add_done_callback(self._call_done)
        return call

    def _call_done(self, call: asyncio.Future[Any]) -> None:
        self._pending_calls -= 1

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        self._pending_calls += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._pending_calls -= 1

    def _files(self) -> Mapping[Any, Any]:
        return self._selector.get_map()  # type: ignore[attr-defined, no-any-return]

    def _waits_for_the_world(self) -> bool:
        return self._pending_calls > 0 or len(self._files()) > self._own_files

    def _jump(self) -> None:
        # not by select's timeout, which the loop cuts to a day
        self._set_time(self._scheduled[0].when())  # type: ignore[attr-defined]

    def _stand_still(self) -> None:
        # a rate limiter that waits for the 1e-17 s that a rounding left sets its timer for now, for ever
        self._turns += not self._ready  # type: ignore[attr-defined]
        if self._turns > _TURNS_AT_ONE_TIME:
            self._set_time(self._now + self._clock_resolution)

    def _set_time(self, now: float) -> None:
        self._now = now
        self._turns = 0
        # the loop runs what is due before now + resolution: far from 0, that has to be more than now
        self._clock_resolution = max(1e-9, math.ulp(now))

    def _deadlock(self) -> DeadlockError:
        return DeadlockError([repr(task) for task in asyncio.all_tasks(self)])


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that asks the loop what to do instead of blocking."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            self._loop._stand_still()
            return ready
        if self._loop._waits_for_the_world():
            return self._wait(timeout)
        if timeout is None:
            raise self._loop._deadlock()
        self._loop._jump()
        return ready

    def _wait(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        started = time.monotonic()
        ready = super().select(timeout)
        self._loop._set_time(self._loop.time() + time.monotonic() - started)
        return ready
