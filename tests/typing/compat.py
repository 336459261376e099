"""Code in the style of async-pipeline 0.6 to 1.1, which has to pass unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

from async_pipeline import (
    AfterStageHook,
    BackoffMode,
    BeforeStageHook,
    Middleware,
    Pipeline,
    PipelineError,
    Stage,
    StageExecutionError,
)
from async_pipeline.errors import StageExecutionError as SameError
from async_pipeline.middlewares import RetryMiddleware, TimingMiddleware
from async_pipeline.stage import BackoffMode as SameMode


class Request(TypedDict):
    request_id: str
    count: int


@dataclass
class Tracker:
    request_id: str
    count: int = 0
    timings: dict[str, list[float]] | None = None
    seen: list[str] = field(default_factory=list)


async def increment(value: int, context: dict[str, Any]) -> int:
    context["count"] = int(context.get("count", 0)) + 1
    return value + 1


async def track(value: int, context: Tracker) -> int:
    context.count += 1
    return value + 1


async def request(value: int, context: Request) -> int:
    return value + context["count"]


async def any_context(value: int, context: object) -> int:
    return value


def double(value: int) -> int:
    return value * 2


async def use_contexts() -> list[int]:
    dicts: Pipeline[int, int] = Pipeline([Stage("increment", increment)])
    with_dict: Pipeline[int, int, dict[str, Any]] = Pipeline([Stage("increment", increment)])
    typed: Pipeline[int, int, Request] = Pipeline([Stage("request", request)])
    tracked: Pipeline[int, int, Tracker] = Pipeline([Stage("track", track), Stage("any", any_context)])
    shared: dict[str, Any] = {"count": 0}
    given: Request = {"request_id": "a", "count": 1}
    return [
        await dicts.run(1, context=shared),
        await dicts.run(1),
        *await with_dict.map([1, 2, 3], context=shared, concurrency=3),
        await typed.run(1, context=given),
        await tracked.run(1, context=Tracker("a")),
        *await tracked.map(range(3), 2, context=Tracker("a")),
    ]


async def use_errors(pipeline: Pipeline[int, int]) -> None:
    try:
        await pipeline.run(1)
    except StageExecutionError as error:
        name: str = error.stage_name
        original: BaseException = error.original_error
        assert name
        assert isinstance(original, RuntimeError)
    except PipelineError:
        pass
    try:
        await pipeline.map([1, 2])
    except* SameError as group:
        print(group.exceptions)
    results: list[int | Exception] = await pipeline.map([1, 2], return_exceptions=True)
    numbers = [result for result in results if not isinstance(result, Exception)]
    assert sum(numbers) >= 0


def use_options(mode: BackoffMode, same: SameMode, from_config: str) -> list[Stage[Any, Any]]:
    stages: list[Stage[Any, Any]] = [
        Stage("increment", increment, timeout=5, retries=3, retry_delay=0.1, backoff=mode),
        Stage(name="double", handler=double, backoff="exponential"),
        Stage("track", track, backoff=same),
    ]
    stages.append(Stage("any", any_context, backoff=from_config))
    Pipeline(stages)
    Pipeline(tuple(stages))
    Pipeline(stages=[Stage("double", double)])
    return stages


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, object, object | None, Exception | None]] = []

    def before(self, stage_name: str, _value: object, context: Tracker) -> None:
        context.seen.append(stage_name)

    async def after(self, name: str, value: object, output: object | None, error: Exception | None) -> None:
        self.calls.append((name, value, output, error))


async def doubled_result(
    next_fn: Callable[[Any], Awaitable[Any]], _name: str, value: Any, _context: dict[str, Any]
) -> Any:
    return int(await next_fn(value)) * 2


async def cached(next_fn: Callable[[Any], Awaitable[Any]], _name: str, value: Any, context: object) -> Any:
    return await next_fn(value)


def use_hooks_and_middlewares(recorder: Recorder) -> Pipeline[int, int, Tracker]:
    before: BeforeStageHook = recorder.before
    after: AfterStageHook = recorder.after
    middlewares: list[Middleware] = [doubled_result, cached, TimingMiddleware(), RetryMiddleware(retries=2)]
    return Pipeline([Stage("track", track)], before_stage=before, after_stage=after, middlewares=middlewares)


class Cached(Stage[int, int]):
    def __init__(self, handler: Callable[[int], Awaitable[int]]) -> None:
        super().__init__("cached", handler, retries=1)
        self.cache: dict[int, int] = {}

    async def run(self, value: int, *, context: object | None = None) -> int:
        if value not in self.cache:
            self.cache[value] = await super().run(value, context=context)
        return self.cache[value]


async def main() -> None:
    assert await use_contexts() == [2, 2, 2, 3, 4, 2, 2, 1, 2, 3]
    use_options("fixed", "exponential", "fixed")
    recorder = Recorder()
    assert await use_hooks_and_middlewares(recorder).run(1, context=Tracker("a")) == 4
    assert recorder.calls == [("track", 1, 4, None)]

    async def squared(value: int) -> int:
        return value * value

    pipeline: Pipeline[int, int] = Pipeline([Cached(squared), Stage("double", double)])
    assert await pipeline.run(3) == 18
    await use_errors(pipeline)


if __name__ == "__main__":
    asyncio.run(main())
