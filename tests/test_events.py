"""Hooks: their arity, that they are awaited, and that their exceptions are logged and no more."""

import asyncio
import functools
import logging
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from async_pipeline.events import check_hook, fire, logger, report

BEFORE = "before_stage(stage_name, value)"
AFTER = "after_stage(stage_name, value, output, error)"
CONTEXT = object()


async def fired(shape: str, function: Callable[..., Any]) -> None:
    args = (1,) if shape is BEFORE else (1, 2, None)
    await fire(check_hook(shape, function), CONTEXT, "fetch", *args)


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    return []


class TestArity:
    async def test_a_hook_without_the_context(self, calls: list[tuple[Any, ...]]) -> None:
        await fired(BEFORE, lambda name, value: calls.append((name, value)))
        await fired(AFTER, lambda name, value, output, error: calls.append((name, value, output, error)))
        assert calls == [("fetch", 1), ("fetch", 1, 2, None)]

    async def test_a_hook_with_the_context(self, calls: list[tuple[Any, ...]]) -> None:
        await fired(BEFORE, lambda name, value, context: calls.append((name, value, context)))
        await fired(AFTER, lambda n, v, output, error, context: calls.append((n, v, output, error, context)))
        assert calls == [("fetch", 1, CONTEXT), ("fetch", 1, 2, None, CONTEXT)]

    async def test_any_number_of_arguments_includes_the_context(self, calls: list[tuple[Any, ...]]) -> None:
        await fired(BEFORE, lambda *args: calls.append(args))
        await fired(AFTER, lambda name, *args: calls.append((name, *args)))
        assert calls == [("fetch", 1, CONTEXT), ("fetch", 1, 2, None, CONTEXT)]

    async def test_a_named_context_with_a_default_is_given(self, calls: list[tuple[Any, ...]]) -> None:
        await fired(BEFORE, lambda name, value, ctx=None: calls.append((ctx,)))
        await fired(AFTER, lambda n, v, output, error, context=None: calls.append((context,)))
        assert calls == [(CONTEXT,), (CONTEXT,)]

    async def test_another_default_is_left_alone(self, calls: list[tuple[Any, ...]]) -> None:
        await fired(BEFORE, lambda name, value, level="info": calls.append((level,)))
        await fired(AFTER, lambda name, value, output, error, level="info": calls.append((level,)))
        assert calls == [("info",), ("info",)]

    async def test_methods_partials_mocks_and_builtins(self, calls: list[tuple[Any, ...]]) -> None:
        class Recorder:
            def before(self, name: str, value: Any) -> None:
                calls.append((name, value))

        def tagged(tag: str, name: str, value: Any, context: Any) -> None:
            calls.append((tag, name, value, context))

        mock = Mock()
        await fired(BEFORE, Recorder().before)
        await fired(BEFORE, functools.partial(tagged, "tag"))
        await fired(BEFORE, mock)
        await fired(BEFORE, {}.setdefault)
        assert calls == [("fetch", 1), ("tag", "fetch", 1, CONTEXT)]
        mock.assert_called_once_with("fetch", 1, CONTEXT)

    @pytest.mark.parametrize(
        ("shape", "function"),
        [
            (BEFORE, lambda: None),
            (BEFORE, lambda name: None),
            (BEFORE, lambda name, value, context, more: None),
            (BEFORE, lambda name, value, *, must: None),
            (AFTER, lambda name, value: None),
            (AFTER, lambda name, value, output: None),
            (AFTER, lambda name, value, output, error, context, more: None),
        ],
    )
    def test_a_wrong_arity_is_refused_at_construction(self, shape: str, function: Callable[..., Any]) -> None:
        parameter = shape.partition("(")[0]
        with pytest.raises(
            TypeError, match=rf"^{parameter}=<function .* can't be used: it must take {parameter}"
        ):
            check_hook(shape, function)

    async def test_none_is_no_hook(self) -> None:
        assert check_hook(AFTER, None) == (None, False)
        await fire((None, False), CONTEXT, "fetch")

    @pytest.mark.parametrize("function", [1, "print", [print]])
    def test_what_is_no_callable_is_refused(self, function: Any) -> None:
        with pytest.raises(TypeError, match=r"^after_stage must be a callable, not "):
            check_hook(AFTER, function)


class TestAwaiting:
    async def test_an_async_hook_is_awaited_in_the_same_task(self, calls: list[tuple[Any, ...]]) -> None:
        async def hook(name: str, value: Any) -> None:
            await asyncio.sleep(0)
            calls.append((asyncio.current_task(),))

        await fired(BEFORE, hook)
        assert calls == [(asyncio.current_task(),)]

    async def test_whatever_can_be_awaited_is(self, calls: list[tuple[Any, ...]]) -> None:
        class Custom:
            def __await__(self) -> Iterator[None]:
                calls.append(("custom",))
                return iter(())

        @types.coroutine
        def old_style(name: str, value: Any) -> Generator[None, None, None]:
            calls.append(("old style",))
            yield

        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: calls.append(("future",)))
        asyncio.get_running_loop().call_soon(future.set_result, None)
        await fired(BEFORE, lambda name, value: future)
        await asyncio.sleep(0)
        await fired(BEFORE, lambda name, value: Custom())
        await fired(BEFORE, old_style)
        mock = AsyncMock()
        await fired(BEFORE, mock)
        assert calls == [("future",), ("custom",), ("old style",)]
        mock.assert_awaited_once_with("fetch", 1, CONTEXT)

    async def test_what_a_sync_hook_returns_does_not_matter(self, caplog: pytest.LogCaptureFixture) -> None:
        for value in (None, 0, "text", iter(()), object()):
            await fired(BEFORE, lambda name, _, value=value: value)
        assert not caplog.records


class TestExceptions:
    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    async def test_are_logged_with_their_traceback(
        self, is_async: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        error = LookupError("broken")

        def broken(name: str, value: Any) -> None:
            raise error

        async def async_broken(name: str, value: Any) -> None:
            await asyncio.sleep(0)
            raise error

        await fired(BEFORE, async_broken if is_async else broken)
        (record,) = caplog.records
        assert record.name == logger.name == "async_pipeline"
        assert record.levelno == logging.ERROR
        assert "broken" in record.getMessage()
        assert "'fetch'" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[1] is error
        assert record.exc_info[2] is error.__traceback__ is not None

    async def test_of_calling_it_wrongly_too(self, caplog: pytest.LogCaptureFixture) -> None:
        await fired(BEFORE, [].append)  # C code is not asked what it takes
        (record,) = caplog.records
        assert record.exc_info is not None
        assert record.exc_info[0] is TypeError

    @pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit])
    async def test_others_than_exceptions_pass(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        def hook(name: str, value: Any) -> None:
            raise kind

        with pytest.raises(kind):
            await fired(BEFORE, hook)
        assert not caplog.records

    def test_report_is_for_those_who_call_the_hook_themselves(self, caplog: pytest.LogCaptureFixture) -> None:
        error = LookupError("broken")
        report(print, "fetch", error)
        assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [error]
