"""Which functions fit as hooks and middlewares."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from async_pipeline import AfterStageHook, BeforeStageHook, Middleware, Pipeline
from async_pipeline.middlewares import (
    LoggingMiddleware,
    RetryMiddleware,
    TimeoutMiddleware,
    TimingMiddleware,
)
from async_pipeline.types import ContextT, DefaultContext

T = TypeVar("T")


@dataclass
class Session:
    user: str


def step(value: int) -> int:
    return value


# ---- before


def before(stage_name: str, value: Any) -> None: ...
async def before_async(stage_name: str, value: object) -> None: ...
def before_with_dict(stage_name: str, value: int, context: dict[str, Any]) -> None: ...
async def before_with_session(stage_name: str, value: Any, session: Session) -> None: ...
def before_with_default(stage_name: str, value: Any, context: DefaultContext | None = None) -> str:
    return stage_name


def before_one(stage_name: str) -> None: ...
def before_int(stage_name: int, value: Any) -> None: ...


def test_before() -> None:
    Pipeline([step], before_stage=before)
    Pipeline([step], before_stage=before_async)
    Pipeline([step], before_stage=before_with_dict)
    Pipeline([step], before_stage=before_with_session)
    Pipeline([step], before_stage=before_with_default)
    Pipeline([step], before_stage=lambda name, value: print(name, value))
    Pipeline([step], before_stage=None)
    Pipeline([step], before_stage=before_one)  # type: ignore[arg-type]
    Pipeline([step], before_stage=before_int)  # type: ignore[arg-type]
    Pipeline([step], before_stage="before")  # type: ignore[arg-type]


# ---- after


def after(stage_name: str, value: Any, output: Any, error: Exception | None) -> None: ...
def after_base(stage_name: str, value: object, output: object, error: BaseException | None) -> None: ...
async def after_async(name: str, value: Any, output: Any | None, error: Exception | None) -> None: ...
async def after_async_base(name: str, value: Any, output: Any, error: BaseException | None) -> None: ...
def after_with_dict(
    name: str, value: Any, output: Any, error: Exception | None, context: dict[str, Any]
) -> None: ...
def after_base_with_object(
    name: str, value: Any, output: Any, error: BaseException | None, context: object
) -> None: ...
async def after_with_session(
    name: str, value: Any, output: Any, error: BaseException | None, session: Session
) -> None: ...


def after_three(name: str, value: Any, output: Any) -> None: ...
def after_never_none(name: str, value: Any, output: Any, error: Exception) -> None: ...


def test_after() -> None:
    Pipeline([step], after_stage=after)
    Pipeline([step], after_stage=after_base)
    Pipeline([step], after_stage=after_async)
    Pipeline([step], after_stage=after_async_base)
    Pipeline([step], after_stage=after_with_dict)
    Pipeline([step], after_stage=after_base_with_object)
    Pipeline([step], after_stage=after_with_session)
    Pipeline([step], after_stage=lambda name, value, output, error: None)
    Pipeline([step], after_stage=after_three)  # type: ignore[arg-type]
    Pipeline([step], after_stage=after_never_none)  # type: ignore[arg-type]


# ---- middlewares


async def plain(next_stage: Callable[[Any], Awaitable[Any]], name: str, value: Any, context: Any) -> Any:
    return await next_stage(value)


async def with_dict(
    next_fn: Callable[[Any], Awaitable[Any]], name: str, value: Any, context: dict[str, Any]
) -> Any:
    return await next_fn(value)


async def with_object(next_fn: Any, name: str, value: object, context: object) -> object:
    return await next_fn(value)


async def with_session(
    next_fn: Callable[[Any], Awaitable[Any]], name: str, value: Any, context: Session
) -> int:
    return int(await next_fn(value))


def answer(next_fn: Callable[[Any], Awaitable[Any]], name: str, value: Any, context: Any) -> int:
    return 42


def handed_on(next_fn: Callable[[Any], Awaitable[T]], name: str, value: Any, context: Any) -> Awaitable[T]:
    return next_fn(value)


class Upper:
    async def __call__(
        self, next_fn: Callable[[Any], Awaitable[Any]], name: str, value: Any, context: object
    ) -> Any:
        return await next_fn(name.upper())


def too_short(next_fn: Any, name: str, value: Any) -> Any: ...


def test_middlewares() -> None:
    Pipeline([step], middlewares=[plain, with_dict, with_object, with_session, answer, handed_on, Upper()])
    Pipeline([step], middlewares=(plain,))
    Pipeline(
        [step],
        middlewares=[LoggingMiddleware(), TimingMiddleware(), RetryMiddleware(3), TimeoutMiddleware(5.0)],
    )
    Pipeline([step], middlewares=plain)  # type: ignore[arg-type]
    Pipeline([step], middlewares=[too_short])  # type: ignore[list-item]
    Pipeline([step], middlewares=[Upper])  # type: ignore[list-item]


# ---- the aliases, as users spell them


def build(
    before: BeforeStageHook | None, after: AfterStageHook | None, middlewares: list[Middleware]
) -> Pipeline[int, int]:
    return Pipeline([step], before_stage=before, after_stage=after, middlewares=middlewares)


def with_context(pipeline: Pipeline[int, int, ContextT], context: ContextT) -> ContextT:
    return context


def test_aliases() -> None:
    build(before, after, [plain, Upper()])
    build(before_with_dict, after_with_dict, [])
    build(None, None, [TimingMiddleware("times")])
    typed: Pipeline[int, int, Session] = Pipeline([step])
    with_context(typed, Session("me")).user.upper()
