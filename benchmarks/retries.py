"""What a guard against failures costs: a call that succeeds, and one that fails once and is tried again.

At most four attempts, no delay between them, and nobody is told of a retry.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from async_pipeline import Pipeline, Stage, __version__

from .work import Contender, plain

Handler = Callable[[int], Awaitable[int]]
Guard = Callable[[Handler], Handler]

ATTEMPTS = 4


class Flaky:
    """Fails at each first call for a value."""

    def __init__(self) -> None:
        self._failed = False

    async def __call__(self, value: int) -> int:
        self._failed = not self._failed
        if self._failed:
            raise ConnectionError(value)
        return value + 1


HANDLERS: dict[str, Callable[[], Handler]] = {"succeeds": lambda: plain, "fails once": Flaky}
"""What is guarded, by what it does."""


def by_hand(handler: Handler) -> Handler:
    async def guarded(value: int) -> int:
        for _ in range(ATTEMPTS - 1):
            try:
                return await handler(value)
            except Exception:
                pass
        return await handler(value)

    return guarded


def ours(handler: Handler) -> Handler:
    return Pipeline([Stage("guarded", handler, retries=ATTEMPTS - 1)]).run


def _tenacity(handler: Handler) -> Handler:
    tenacity: Any = import_module("tenacity")

    async def call(value: int) -> int:
        return await handler(value)

    guarded: Handler = tenacity.retry(stop=tenacity.stop_after_attempt(ATTEMPTS), reraise=True)(call)
    return guarded


def _stamina(handler: Handler) -> Handler:
    stamina: Any = import_module("stamina")

    async def call(value: int) -> int:
        return await handler(value)

    no_delay = {"wait_initial": 0, "wait_max": 0, "wait_jitter": 0}
    guarded: Handler = stamina.retry(on=Exception, attempts=ATTEMPTS, timeout=None, **no_delay)(call)
    return guarded


def _langchain_core(handler: Handler) -> Handler:
    runnables: Any = import_module("langchain_core.runnables")

    async def call(value: int) -> int:
        return await handler(value)

    guarded = runnables.RunnableLambda(call).with_retry(
        stop_after_attempt=ATTEMPTS, wait_exponential_jitter=False
    )
    result: Handler = guarded.ainvoke
    return result


LIBRARIES: dict[str, Guard] = {
    "tenacity": _tenacity,
    "stamina": _stamina,
    "langchain-core": _langchain_core,
}


def find_guards() -> tuple[dict[str, Guard], list[str]]:
    """Return how to guard a handler, by who does it, and the packages that are not installed."""
    found: dict[str, Guard] = {
        "a loop with `try`, by hand": by_hand,
        f"**async-pipeline {__version__}**": ours,
    }
    missing: list[str] = []
    for package, guard in LIBRARIES.items():
        try:
            guard(plain)
            found[f"{package} {version(package)}"] = guard
        except (PackageNotFoundError, ImportError):
            missing.append(package)
    return found, missing


def contender(guard: Guard, handler: Handler) -> Contender:
    """Many guarded calls, one after the other."""
    guarded = guard(handler)

    async def calls(items: Sequence[int]) -> list[int]:
        with _no_hooks():
            return [await guarded(item) for item in items]

    return calls


@contextmanager
def _no_hooks() -> Iterator[None]:
    """Let stamina tell nobody: by default it logs, and counts for Prometheus if that is installed."""
    try:
        instrumentation: Any = import_module("stamina.instrumentation")
    except ImportError:
        yield
        return
    before = instrumentation.get_on_retry_hooks()
    instrumentation.set_on_retry_hooks(())
    try:
        yield
    finally:
        instrumentation.set_on_retry_hooks(before)
