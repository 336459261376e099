"""Stop calling a stage that keeps failing, until it has had time to recover."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CircuitOpenError, Finish
from ..events import logger
from ..retry import check_count, check_seconds
from ..stage import cancel_requests, was_cancelled

__all__ = ["CircuitBreakerMiddleware"]


class CircuitBreakerMiddleware:
    """Refuse a stage at once with :class:`~async_pipeline.CircuitOpenError` after failures in a row.

    After ``failures`` of them the stage's circuit is open for ``reset_after`` seconds of the event loop's
    clock. Then it is half-open: one call goes through as a trial, and all others are still refused. The
    trial's success closes the circuit, its failure opens it anew for the whole time, and after its
    cancellation the next call is the trial. A call that was let through before a change of state doesn't
    count any more.

    >>> breaker = CircuitBreakerMiddleware(failures=5, reset_after=30)
    >>> Pipeline(stages, middlewares=[LoggingMiddleware(), CacheMiddleware(), breaker, RetryMiddleware()])

    It wraps the whole retry loop: one failure is a stage that failed after all its attempts and after
    ``on_error``, whose stand-in is a success, as :class:`~async_pipeline.Finish` is. So it stands after
    :class:`CacheMiddleware`, because a hit needs no closed circuit, and before :class:`RetryMiddleware`,
    which would otherwise retry the refusals. A cancellation counts as neither, and the run's deadline
    looks like one: give the stage a ``timeout`` for slowness to count, and for a trial to end.

    Each stage name has one circuit, shared by all pipelines that share this object. It holds no lock;
    event loops in several threads want one each.

    Args:
        failures: how many failures in a row open a circuit; 5 by default.
        reset_after: seconds for which it is open; 30 by default.

    Raises:
        TypeError, ValueError: at construction, for a wrong argument.
    """

    def __init__(self, failures: int = 5, reset_after: float = 30.0) -> None:
        check_count("failures", failures, least=1, message="failures must be at least 1")
        check_seconds("reset_after", reset_after, zero=False)
        self._failures = failures
        self._reset_after = reset_after
        self._circuits: defaultdict[str, _Circuit] = defaultdict(_Circuit)

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        circuit = self._circuits[stage_name]
        openings, requests = circuit.let_through(stage_name), cancel_requests()
        try:
            output = await next_stage(value)
        except Finish:
            self._count_success(circuit, openings, stage_name)
            raise
        except BaseException as error:
            # another breaker's refusal, of this stage or of one inside it, tells nothing either
            is_failure = isinstance(error, Exception) and not isinstance(error, CircuitOpenError)
            if is_failure and not was_cancelled(error, requests):
                self._count_failure(circuit, openings, stage_name)
            elif openings == circuit.openings:
                circuit.is_trying = False
            raise
        self._count_success(circuit, openings, stage_name)
        return output

    def state(self, stage_name: str) -> Literal["closed", "open", "half-open"]:
        """Return the state of the circuit of ``stage_name``; ``"closed"`` if that was never called."""
        circuit = self._circuits.get(stage_name)
        return "closed" if circuit is None else circuit.state

    def _count_failure(self, circuit: "_Circuit", openings: int, stage_name: str) -> None:
        if openings != circuit.openings:
            return
        circuit.failures += 1  # a trial's is one more than enough
        if circuit.failures >= self._failures:
            circuit.open(self._reset_after)
            logger.warning("The circuit of stage %r is open for %g s", stage_name, self._reset_after)

    def _count_success(self, circuit: "_Circuit", openings: int, stage_name: str) -> None:
        if openings != circuit.openings:
            return
        circuit.failures = 0
        if circuit.is_trying:
            circuit.is_trying, circuit.until = False, None
            logger.info("The circuit of stage %r is closed again", stage_name)

    def __repr__(self) -> str:
        states = [f" {name!r}: {circuit.state}" for name, circuit in list(self._circuits.items())]
        return f"<CircuitBreakerMiddleware{','.join(states)}>"


@dataclass(slots=True)
class _Circuit:
    """What became of one stage's calls; one counts unless the circuit has opened since it was let through."""

    failures: int = 0
    until: float | None = None  # when the time of an open one is over; None: closed
    is_trying: bool = False
    openings: int = 0
    clock: Callable[[], float] = time.monotonic  # of the event loop that opened it

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if self.until is None:
            return "closed"
        return "open" if self._remaining(self.until) > 0 else "half-open"

    def let_through(self, stage_name: str) -> int:
        if self.until is not None:
            remaining = self._remaining(self.until)
            if remaining > 0 or self.is_trying:
                raise CircuitOpenError(stage_name, remaining)
            self.is_trying = True
        return self.openings

    def open(self, seconds: float) -> None:
        self.clock = asyncio.get_running_loop().time
        self.until = self.clock() + seconds
        self.is_trying = False
        self.openings += 1

    def _remaining(self, until: float) -> float:
        try:
            now = asyncio.get_running_loop().time()
        except RuntimeError:  # state() is asked from a thread, or repr() after the run
            now = self.clock()
        # whole microseconds, or a caller that slept retry_after might be a rounding error too early
        return max(0.0, round(until - now, 6))
