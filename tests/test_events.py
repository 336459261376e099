"""Hooks: their arity, that they are awaited, and that their exceptions are logged and no more."""

import asyncio
import contextlib
import functools
import logging
import os
import pickle
import random
import re
import types
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextvars import ContextVar
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from async_pipeline import Pipeline, Stage, StageExecutionError, each, fallback, keep, parallel
from async_pipeline.events import (
    CountedStart,
    EndEvent,
    Event,
    FailedAttempt,
    Watch,
    check_callback,
    check_hook,
    check_observers,
    fire,
    logger,
    new_run_id,
    report,
)
from tests.helpers import run_virtually

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


class TestEvent:
    def test_carries_what_its_kind_does_and_none_for_the_rest(self) -> None:
        start = Event("run_start", 1.5, "00ff", "orders", None, 3, ())
        assert (start.kind, start.time, start.run_id, start.pipeline) == ("run_start", 1.5, "00ff", "orders")
        assert (start.stage, start.item_index, start.element) == (None, 3, ())
        assert (start.outcome, start.attempts, start.duration, start.error) == (None,) * 4
        assert (start.attempt, start.will_retry, start.delay, start.elements) == (None,) * 4

        error = KeyError("x")
        end = EndEvent("stage_end", 2.0, "00ff", "orders", "a/b", None, (1, 2), "error", 4, 0.5, error)
        assert (end.kind, end.time, end.run_id, end.pipeline) == ("stage_end", 2.0, "00ff", "orders")
        assert (end.stage, end.item_index, end.element) == ("a/b", None, (1, 2))
        assert (end.outcome, end.attempts, end.duration, end.error) == ("error", 4, 0.5, error)
        assert (end.attempt, end.will_retry, end.delay, end.elements) == (None,) * 4

        common = (2.0, "00ff", "orders", "a/b", None, (1, 2))
        failed = FailedAttempt(*common, attempt=2, error=error, delay=0.0)
        assert (failed.kind, failed.stage) == ("attempt_failed", "a/b")
        assert (failed.attempt, failed.error, failed.will_retry, failed.delay) == (2, error, True, 0.0)
        assert (failed.outcome, failed.attempts, failed.duration, failed.elements) == (None,) * 4
        last = FailedAttempt(*common, attempt=3, error=error, delay=None)
        assert (last.will_retry, last.delay) == (False, None)

        plain = Event("stage_start", 2.0, "00ff", "orders", "a/b", 5, (1, 2))
        counted = CountedStart(0, "stage_start", 2.0, "00ff", "orders", "a/b", 5, (1, 2))
        assert (counted.elements, counted.outcome, counted.error) == (0, None, None)
        assert repr(counted) == repr(plain)[:-1] + ", elements=0)"

    def test_is_slotted(self) -> None:
        events = [
            Event("run_start", 1.5, "00ff", "orders", None, None, ()),
            EndEvent("run_end", 1.5, "00ff", "orders", None, None, (), "ok", 1, 0.5, None),
            FailedAttempt(1.5, "00ff", "orders", "a", None, (), attempt=1, error=KeyError(), delay=None),
            CountedStart(3, "stage_start", 1.5, "00ff", "orders", "a", None, ()),
        ]
        for event in events:
            assert isinstance(event, Event)
            assert not hasattr(event, "__dict__")

    def test_shows_what_it_carries_in_one_order(self) -> None:
        assert repr(Event("run_start", 1.5, "00ff", "orders", None, 0, ())) == (
            "Event(kind='run_start', time=1.5, run_id='00ff', pipeline='orders', item_index=0)"
        )
        end = EndEvent("stage_end", 2.0, "00ff", "orders", "a", None, (1,), "ok", 1, 0.0, None)
        assert repr(end) == (
            "Event(kind='stage_end', time=2.0, run_id='00ff', pipeline='orders', stage='a', element=(1,), "
            "outcome='ok', attempts=1, duration=0.0)"
        )

    def test_can_be_sent_to_another_process(self) -> None:
        end = EndEvent("stage_end", 2.0, "00ff", "orders", "a", None, (1,), "ok", 1, 0.0, None)
        assert repr(pickle.loads(pickle.dumps(end))) == repr(end)
        counted = CountedStart(3, "stage_start", 2.0, "00ff", "orders", "a", 1, (1,))
        assert repr(pickle.loads(pickle.dumps(counted))) == repr(counted)


class TestElements:
    def told(self, step: Any, value: Any) -> dict[tuple[str, str | None], int | None]:
        """The number of elements that each kind of event of each stage carries."""
        events: list[Event] = []
        with contextlib.suppress(StageExecutionError):
            run_virtually(Pipeline([step], observers=[events.append]).run(value))
        assert events
        return {(event.kind, event.stage): event.elements for event in events}

    @pytest.mark.parametrize("make", [each, keep])
    @pytest.mark.parametrize("value", [[1, 2, 3], (1, 2, 3), {1: 1, 2: 2, 3: 3}, range(3), "abc"])
    def test_the_start_of_each_and_keep_tells_how_many(self, make: Any, value: Any) -> None:
        told = self.told(make(Stage("s", lambda x: x), name="all"), value)
        assert told.pop(("stage_start", "all")) == 3
        assert told.keys() > {("run_start", None), ("stage_start", "all/s"), ("stage_end", "all")}
        assert not any(told.values())

    def test_none_is_a_number_as_well(self) -> None:
        assert self.told(each(Stage("s", lambda x: x)), [])["stage_start", "each"] == 0

    def test_what_has_no_length_has_none(self) -> None:
        async def stream() -> AsyncIterator[int]:
            yield 1

        class Broken:
            def __len__(self) -> int:
                raise RuntimeError

            def __iter__(self) -> Iterator[int]:
                return iter([1])

        for value in (iter([1]), (x for x in [1]), stream(), Broken(), None):
            assert not any(self.told(each(Stage("s", lambda x: x)), value).values())

    def test_other_steps_do_not_count(self) -> None:
        stage = Stage("s", lambda x: x)
        for step in (stage, parallel(s=stage), Pipeline([stage], name="p"), fallback(stage, stage)):
            assert not any(self.told(step, [1, 2]).values())

    def test_those_inside_have_their_own(self) -> None:
        told = self.told(each(each(Stage("s", lambda x: x), name="inner"), 1), [[1, 2, 3]])
        assert told["stage_start", "each"] == 1
        assert told["stage_start", "each/inner"] == 3

    def test_all_who_watch_are_told(self) -> None:
        outer, inner = list[Event](), list[Event]()
        pipeline = Pipeline([each(Stage("s", lambda x: x))], name="p", observers=[inner.append, inner.append])
        run_virtually(Pipeline([pipeline], observers=[outer.append]).run([1, 2]))
        assert [event.stage for event in outer if event.elements == 2] == ["p/each"]
        assert [event.stage for event in inner if event.elements == 2] == ["each", "each"]
        (start,) = (event for event in outer if event.elements)
        assert start.kind == "stage_start"
        assert start.pipeline == "pipeline"


class TestWatch:
    EVENT = Event("stage_start", 0.0, "00ff", "orders", "fetch", None, ())

    def test_tells_all_even_if_one_is_broken(self, caplog: pytest.LogCaptureFixture) -> None:
        error, got = LookupError("broken"), list[Event]()

        def broken(event: Event) -> None:
            raise error

        Watch((broken, got.append), (), "orders", "00ff", 0, None).tell(self.EVENT)
        assert got == [self.EVENT]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert "broken" in record.getMessage()
        assert record.getMessage().startswith("Observer <function ")
        assert "stage_start of 'fetch'" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[1] is error

    def test_of_a_run_the_pipeline_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        event = EndEvent("run_end", 0.0, "00ff", "orders", None, None, (), "ok", 1, 0.0, None)
        Watch((), (lambda event: 1 / 0,), "orders", "00ff", 0, None).tell(event)
        assert "run_end of 'orders'" in caplog.text

    @pytest.mark.parametrize("kind", [ValueError, SystemExit])
    def test_what_on_hook_error_raises_comes_after_the_others(
        self, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        error, got, handled = LookupError("broken"), list[Event](), list[Exception]()

        def broken(event: Event) -> None:
            raise error

        def on_hook_error(error: Exception) -> None:
            handled.append(error)
            raise kind("mine")

        with pytest.raises(kind, match="mine"):
            Watch((broken, got.append), (), "orders", "00ff", 0, on_hook_error).tell(self.EVENT)
        assert got == [self.EVENT]
        assert handled == [error]
        assert not caplog.records

    def test_of_an_end_they_are_told_the_other_way_round(self) -> None:
        variable: ContextVar[list[str]] = ContextVar("variable")

        def nested(name: str) -> Callable[[Event], None]:
            tokens = []

            def observer(event: Event) -> None:
                if event.kind.endswith("_start"):
                    tokens.append(variable.set([*variable.get([]), name]))
                else:
                    variable.reset(tokens.pop())

            return observer

        seen: list[list[str]] = []
        inner = Pipeline([lambda x: seen.append(variable.get())], observers=[nested("c"), nested("d")])

        async def main() -> bool:
            await Pipeline([inner], observers=[nested("a"), nested("b")]).run(1)
            return variable.get(None) is None

        assert run_virtually(main())
        # the run, its stage, the inner run, and for both pipelines its stage
        assert seen == [["a", "b", "a", "b", "c", "d", "a", "b", "c", "d"]]

    def test_run_ids_are_apart_and_do_not_repeat_with_a_seed(self) -> None:
        random.seed(1)
        first = {new_run_id() for _ in range(100)}
        random.seed(1)
        second = {new_run_id() for _ in range(100)}
        assert len(first | second) == 200
        assert all(re.fullmatch("[0-9a-f]{16}", run_id) for run_id in first)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_run_ids_of_a_forked_process_are_others(self) -> None:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:  # pragma: no cover
            os.write(writing, new_run_id().encode())
            os._exit(0)
        own = new_run_id()
        os.waitpid(child, 0)
        assert os.read(reading, 16).decode() != own
        os.close(reading)
        os.close(writing)


class TestCallbacks:
    def test_a_sync_callable_that_fits_is_taken(self) -> None:
        class Recorder:
            def __call__(self, event: Event) -> None: ...

            def note(self, event: Event, extra: int = 1) -> None: ...

        observers = [Recorder(), Recorder().note, print, [].append, functools.partial(print, "x"), Mock()]
        assert check_observers(observers) == tuple(observers)
        assert check_observers(iter(observers)) == tuple(observers)
        assert check_observers(()) == ()

    @pytest.mark.parametrize("observers", [print, "print", None, 1])
    def test_observers_are_a_list(self, observers: Any) -> None:
        with pytest.raises(TypeError, match=r"^observers must be a list .*; write observers=\[observer\]$"):
            check_observers(observers)

    @pytest.mark.parametrize("observer", ["print", 1, Mock])
    def test_of_callables_that_are_no_classes(self, observer: Any) -> None:
        with pytest.raises(TypeError, match=r"^an observer must be a sync callable observer\(event\), not "):
            check_observers([observer])

    def test_that_are_sync(self) -> None:
        async def observer(event: Event) -> None: ...

        class Async:
            async def __call__(self, event: Event) -> None: ...

        async def stream(event: Event) -> AsyncIterator[None]:
            yield

        for wrong in (observer, Async(), functools.partial(observer), AsyncMock(), stream):
            with pytest.raises(TypeError, match=r"^an observer must be sync, but .* is async"):
                check_observers([wrong])

    def test_that_take_an_event(self) -> None:
        def other(event: Event, value: int) -> None: ...

        with pytest.raises(TypeError, match=r"^an observer .* can't be used: it must take observer\(event\)"):
            check_observers([other])
        with pytest.raises(TypeError, match=r"^on_hook_error .* can't be used: it must take on_hook"):
            check_callback("on_hook_error", "on_hook_error(error)", lambda: None)


def test_nobody_listens_to_the_logger_unless_the_user_says_so() -> None:
    assert not logger.handlers
    assert logger.level == logging.NOTSET
    assert logger.propagate
