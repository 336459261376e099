"""Measure how long each stage takes."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

from ..context import get_entry, set_entry

__all__ = ["TimingMiddleware"]


class TimingMiddleware:
    """Append each stage's duration to ``context["timings"][stage_name]``, a list of seconds.

    On a context that is no mapping, the attribute of that name is used; one that refuses the attribute
    is left alone. Failed and cancelled stages are measured too. Seconds of :func:`time.perf_counter`.

    Args:
        context_key: the entry or attribute of the context; ``"timings"`` by default.
    """

    def __init__(self, context_key: str = "timings") -> None:
        self._key = context_key

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        durations = self._durations(context, stage_name)
        started = time.perf_counter()
        try:
            return await next_stage(value)
        finally:
            durations.append(time.perf_counter() - started)

    def _durations(self, context: object, stage_name: str) -> list[float]:
        timings = get_entry(context, self._key)
        if not isinstance(timings, MutableMapping):
            timings = {}
            set_entry(context, self._key, timings)
        durations: Any = timings.get(stage_name)
        if not isinstance(durations, list):
            durations = timings[stage_name] = []
        return cast("list[float]", durations)
