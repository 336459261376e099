"""What is awaitable, what is a step, and that the aliases exist at run time."""

import asyncio
import functools
import inspect
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any, TypeVar
from unittest.mock import MagicMock, Mock

import pytest

from async_pipeline import Pipeline, Stage
from async_pipeline import types as our_types
from async_pipeline.types import (
    AfterStageHook,
    BeforeStageHook,
    ContextT,
    DefaultContext,
    Handler,
    Middleware,
    Step,
    is_awaitable,
    structure_of,
)


class Custom:
    def __await__(self) -> Iterator[Any]:
        return iter(())


class Child(Custom):
    pass


@types.coroutine
def old_style() -> Generator[None, None, int]:
    yield
    return 1


def generator() -> Generator[int, None, None]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("make", [Custom, Child, old_style], ids=["custom", "inherited", "types.coroutine"])
def test_what_has_an_await_is_awaitable(make: Callable[[], Any]) -> None:
    value = make()
    assert is_awaitable(value) is True
    assert inspect.isawaitable(value) is True


async def test_coroutines_tasks_and_futures_are_awaitable() -> None:
    async def coroutine() -> int:
        return 1

    future = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(coroutine())
    running = coroutine()
    gathered = asyncio.gather(task, running)
    for value in (future, task, gathered):
        assert is_awaitable(value) is True
    assert list(await gathered) == [1, 1]
    future.cancel()

    pending = coroutine()
    assert is_awaitable(pending) is True
    assert await pending == 1


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        "text",
        b"",
        [],
        {},
        object(),
        Custom,  # the class has __await__ for its instances, and can't be awaited itself
        Awaitable,
        generator(),
        async_generator(),
        iter(()),
        functools.partial(old_style),
        Mock(),
        MagicMock(),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_can_not_be_awaited(value: object) -> None:
    assert is_awaitable(value) is False
    assert inspect.isawaitable(value) is False


def test_an_await_on_the_instance_alone_does_not_count() -> None:
    value = types.SimpleNamespace(__await__=lambda: iter(()))
    assert is_awaitable(value) is False


def test_a_class_of_awaitable_classes() -> None:
    class Meta(type):
        def __await__(cls) -> Iterator[Any]:
            return iter(())

    class AwaitableClass(metaclass=Meta):
        pass

    assert is_awaitable(AwaitableClass) is True


def test_all_names_exist() -> None:
    for name in our_types.__all__:
        assert hasattr(our_types, name), name
    assert our_types.__all__ == sorted(
        our_types.__all__, key=lambda name: (not name.isupper(), name.islower(), name)
    )


def test_the_aliases_can_be_used_at_run_time() -> None:
    def annotated(
        handler: Handler, before: BeforeStageHook, after: AfterStageHook, middleware: Middleware
    ) -> DefaultContext:
        return {}

    assert inspect.get_annotations(annotated, eval_str=True)["return"] == dict[str, Any]
    assert isinstance(ContextT, TypeVar)
    assert ContextT.__bound__ is object
    assert Step[int, str] is not None


def test_the_structure_of_steps() -> None:
    inner: Stage[int, int] = Stage("abs", abs, retries=2)
    assert structure_of(inner) == ("stage", {"retries": 2}, ())
    assert structure_of(Pipeline([inner])) == ("pipeline", {}, [("stage", "abs", inner)])
    assert structure_of(Mock()) == structure_of(object()) == ("step", {}, ())


def test_stages_pipelines_and_objects_with_name_and_run_are_steps() -> None:
    class Double:
        name = "double"

        async def run(self, value: int, /, *, context: Any = None) -> int:
            return value * 2

    def name_of(step: Step[int, int]) -> str:
        return step.name

    stage: Stage[int, int] = Stage("abs", abs)
    pipeline: Pipeline[int, int] = Pipeline([stage], name="row")
    assert [name_of(Double()), name_of(stage), name_of(pipeline)] == ["double", "abs", "row"]
