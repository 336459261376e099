"""The middleware and ``instrument`` against the real SDK, whose exporters keep everything in memory."""

import asyncio
import contextvars
import gc
import importlib.util
import sys
import weakref
from collections import Counter
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import StatusCode

from async_pipeline import (
    BatchError,
    Event,
    Finish,
    Pipeline,
    Stage,
    StageExecutionError,
    each,
    fallback,
    parallel,
    telemetry,
)
from async_pipeline.middlewares import RetryMiddleware
from async_pipeline.telemetry.opentelemetry import OpenTelemetryMiddleware, instrument
from tests.helpers import run_alone, run_virtually

OK, ERROR, UNSET = StatusCode.OK, StatusCode.ERROR, StatusCode.UNSET


class Log(SpanProcessor):
    def __init__(self) -> None:
        self.started: list[int] = []
        self.ended: list[int] = []

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        self.started.append(id_of(span))

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(id_of(span))


def id_of(span: Any) -> int:
    return int(span.get_span_context().span_id)


def trace_of(span: Any) -> int:
    return int(span.get_span_context().trace_id)


def strict(error: Exception) -> None:
    raise error


class Sdk:
    """Providers of spans and metrics, and what they were given."""

    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.log = Log()
        self.tracers = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracers.add_span_processor(self.log)
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.tracers.get_tracer("tests")

    def instrument(self, pipeline: Any) -> Any:
        return instrument(pipeline, tracer_provider=self.tracers, meter_provider=self.meters)

    def pipeline(self, *stages: Any, name: str = "p", **options: Any) -> Any:
        """An instrumented pipeline in which no mistake of an observer goes unseen."""
        return self.instrument(Pipeline(stages, name=name, on_hook_error=strict, **options))

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order in which they were started."""
        return sorted(
            self.exporter.get_finished_spans(), key=lambda span: self.log.started.index(id_of(span))
        )

    def span(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def tree(self) -> list[str]:
        """Each span's name behind those of the spans around it."""
        by_id = {id_of(span): span for span in self.spans}

        def path(span: ReadableSpan) -> str:
            around = by_id.get(span.parent.span_id) if span.parent else None
            return f"{path(around)} > {span.name}" if around else span.name

        return [path(span) for span in self.spans]

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> dict[tuple[Any, ...], Any]:
        """The value or the count, by the values of the attributes in the order of their names."""
        return {
            tuple(value for _, value in sorted(point.attributes.items())): getattr(point, "value", None)
            if hasattr(point, "value")
            else point.count
            for point in self.metrics()[name].data.data_points
        }

    def check(self) -> None:
        """Each span that was started has ended once."""
        assert Counter(self.log.ended) == Counter(self.log.started)
        assert len(set(self.log.started)) == len(self.log.started)


@pytest.fixture
def sdk() -> Iterator[Sdk]:
    sdk = Sdk()
    yield sdk
    sdk.check()
    active = sdk.metrics().get("async_pipeline.active_runs")
    assert active is None or {point.value for point in active.data.data_points} == {0}


@pytest.fixture(autouse=True)
def nothing_complains(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """OpenTelemetry logs when a context is detached elsewhere, or an ended span is touched."""
    yield
    logged = [record for record in caplog.get_records("call") if record.name.startswith("opentelemetry")]
    assert not logged


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Those of ours without the prefix, and the others."""
    return {name.removeprefix("async_pipeline."): value for name, value in (span.attributes or {}).items()}


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


def exceptions(sdk: Sdk) -> dict[str, list[Any]]:
    """The messages of the recorded exceptions, by the name of the span."""
    found: dict[str, list[Any]] = {}
    for span in sdk.spans:
        for event in span.events:
            if event.name == "exception":
                found.setdefault(span.name, []).append((event.attributes or {}).get("exception.message"))
    return found


def status(span: ReadableSpan) -> tuple[StatusCode, str | None]:
    return span.status.status_code, span.status.description


async def ident(value: Any) -> Any:
    return value


async def bad(value: Any) -> Any:
    raise ValueError(f"bad {value}")


async def forever(value: Any) -> Any:
    await asyncio.get_running_loop().create_future()


async def finish(value: Any) -> Any:
    raise Finish("early")


class Flaky:
    """Fails at first."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    async def __call__(self, value: Any) -> Any:
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError(f"{self.failures} left")
        return value


class Abort(BaseException):
    pass


class SecretError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nobody may see this")


async def cancelled(running: Awaitable[Any]) -> None:
    """Cancel what is running, once it waits."""
    task = asyncio.ensure_future(running)
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# -- the middleware


@pytest.fixture
def globally(sdk: Sdk, monkeypatch: pytest.MonkeyPatch) -> Sdk:
    """The SDK as the global tracer provider."""
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: sdk.tracers)
    return sdk


class TestMiddleware:
    async def test_opens_a_span_around_a_stage(self, globally: Sdk) -> None:
        pipeline = Pipeline([Stage("length", len)], middlewares=[OpenTelemetryMiddleware()])
        with globally.tracer.start_as_current_span("request"):
            assert await pipeline.run("abc") == 3
        assert globally.tree() == ["request", "request > pipeline.stage.length"]
        span = globally.span("pipeline.stage.length")
        assert attributes(span) == {"stage.name": "length", "input.type": "str", "output.type": "int"}
        assert status(span) == (OK, None)
        scope: Any = span.instrumentation_scope
        assert scope.name == "async_pipeline"

    async def test_takes_other_names(self, globally: Sdk) -> None:
        middleware = OpenTelemetryMiddleware(tracer_name="shop", span_prefix="shop.step")
        await Pipeline([Stage("x", ident)], middlewares=[middleware]).run(1)
        span = globally.span("shop.step.x")
        scope: Any = span.instrumentation_scope
        assert scope.name == "shop"

    async def test_its_span_is_current_for_the_handler(self, globally: Sdk) -> None:
        async def traced(value: Any) -> Any:
            with globally.tracer.start_as_current_span("query"):
                return value

        await Pipeline([traced], middlewares=[OpenTelemetryMiddleware()]).run(1)
        assert globally.tree() == ["pipeline.stage.traced", "pipeline.stage.traced > query"]

    async def test_records_a_failure_once(self, globally: Sdk) -> None:
        with pytest.raises(StageExecutionError) as raised:
            await Pipeline([bad], middlewares=[OpenTelemetryMiddleware()]).run(1)
        span = globally.span("pipeline.stage.bad")
        assert attributes(span) == {
            "stage.name": "bad",
            "input.type": "int",
            "error": True,
            "error.type": "StageExecutionError",
            "error.message": str(raised.value),
        }
        assert status(span) == (ERROR, str(raised.value))
        assert exceptions(globally) == {"pipeline.stage.bad": [str(raised.value)]}

    async def test_leaves_the_error_as_it_is(self, globally: Sdk) -> None:
        error = ValueError("as it is")
        error.__context__ = KeyError("behind it")

        async def fails(value: Any) -> Any:
            error.__traceback__ = None
            behind = error.__context__
            try:
                raise error
            finally:
                error.__context__ = behind

        middleware = OpenTelemetryMiddleware()
        try:
            raise RuntimeError("handled by who calls it")
        except RuntimeError:
            with pytest.raises(ValueError, match="as it is") as raised:
                await middleware(fails, "fails", 1, {})
        assert raised.value is error
        assert repr(error.__context__) == "KeyError('behind it')"

    async def test_an_error_does_not_hold_itself(self, globally: Sdk) -> None:
        class Value:
            pass

        async def fails(value: Any) -> Any:
            raise ValueError

        middleware = OpenTelemetryMiddleware()
        value = Value()
        gone = weakref.ref(value)
        gc.collect()
        gc.disable()
        try:
            with suppress(ValueError):
                await middleware(fails, "fails", value, {})
            del value
            assert gone() is None
        finally:
            gc.enable()

    async def test_a_cancelled_stage_is_an_error_without_an_exception(self, globally: Sdk) -> None:
        await cancelled(Pipeline([forever], middlewares=[OpenTelemetryMiddleware()]).run(1))
        span = globally.span("pipeline.stage.forever")
        assert status(span) == (ERROR, "cancelled")
        assert attributes(span)["error.type"] == "CancelledError"
        assert attributes(span)["error"] is True
        assert not span.events

    async def test_a_coroutine_that_is_closed_ends_its_span(self, globally: Sdk) -> None:
        running = OpenTelemetryMiddleware()(forever, "forever", 1, {})
        running.send(None)
        running.close()
        assert status(globally.span("pipeline.stage.forever")) == (ERROR, "cancelled")
        assert not exceptions(globally)

    async def test_records_what_is_no_exception(self, globally: Sdk) -> None:
        async def aborts(value: Any) -> Any:
            raise Abort("stop")

        with pytest.raises(Abort):
            await Pipeline([aborts], middlewares=[OpenTelemetryMiddleware()]).run(1)
        assert status(globally.span("pipeline.stage.aborts")) == (ERROR, "stop")
        assert exceptions(globally) == {"pipeline.stage.aborts": ["stop"]}

    async def test_an_error_that_cannot_be_shown(self, globally: Sdk) -> None:
        async def hides(value: Any) -> Any:
            raise SecretError

        middleware = OpenTelemetryMiddleware()
        with pytest.raises(SecretError):
            await middleware(hides, "hides", 1, {})
        span = globally.span("pipeline.stage.hides")
        assert status(span) == (ERROR, "SecretError")
        assert attributes(span)["error.message"] == ""
        assert [dict(event.attributes or {}) for event in span.events] == [
            {"exception.type": f"{__name__}.SecretError"}
        ]

    async def test_a_finish_is_no_failure(self, globally: Sdk) -> None:
        assert await Pipeline([finish], middlewares=[OpenTelemetryMiddleware()]).run(1) == "early"
        span = globally.span("pipeline.stage.finish")
        assert status(span) == (OK, None)
        assert attributes(span)["output.type"] == "str"
        assert not span.events

    @pytest.mark.parametrize("is_mapping", [True, False])
    async def test_merges_simple_attributes_of_the_context(self, globally: Sdk, is_mapping: bool) -> None:
        simple = {"tenant": "t1", "n": 42, "share": 0.5, "paid": True}
        others: dict[Any, Any] = {"skip": {"nested": 1}, "list": [1], "none": None, 5: "no name"}

        class Context:
            trace_attributes = {**simple, **others}  # noqa: RUF012

        context: Any = {"trace_attributes": Context.trace_attributes} if is_mapping else Context()
        await Pipeline([ident], middlewares=[OpenTelemetryMiddleware()]).run(1, context=context)
        found = attributes(globally.span("pipeline.stage.ident"))
        assert found == simple | {"stage.name": "ident", "input.type": "int", "output.type": "int"}

    @pytest.mark.parametrize("given", [None, ["tenant"], "tenant"])
    async def test_ignores_trace_attributes_that_are_no_mapping(self, globally: Sdk, given: Any) -> None:
        pipeline = Pipeline([ident], middlewares=[OpenTelemetryMiddleware()])
        await pipeline.run(1, context={"trace_attributes": given})
        assert len(attributes(globally.span("pipeline.stage.ident"))) == 3


# -- instrument: traces


class TestRun:
    async def test_is_a_trace_with_a_span_for_each_stage(self, sdk: Sdk) -> None:
        assert await sdk.pipeline(str, len, name="measure").run(123) == 3
        assert sdk.tree() == [
            "pipeline measure",
            "pipeline measure > stage str",
            "pipeline measure > stage len",
        ]
        root, first, _ = sdk.spans
        assert attributes(root) == {"pipeline.name": "measure", "outcome": "ok"}
        assert attributes(first) == {
            "pipeline.name": "measure",
            "stage.name": "str",
            "outcome": "ok",
            "attempts": 1,
        }
        assert {span.status.status_code for span in sdk.spans} == {UNSET}
        assert {span.kind for span in sdk.spans} == {trace.SpanKind.INTERNAL}
        scope: Any = root.instrumentation_scope
        assert scope.name == "async_pipeline"

    async def test_what_is_known_at_the_start_is_there_for_the_sampler(self) -> None:
        seen = {}

        class Seeing(Sampler):
            def should_sample(
                self, parent_context: Any, trace_id: int, name: str, kind: Any = None, *rest: Any, **more: Any
            ) -> Any:
                seen[name] = dict(rest[0] if rest else more["attributes"])
                return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, *rest, **more)

            def get_description(self) -> str:
                return "seeing"

        sdk = Sdk(Seeing())
        await sdk.pipeline(each(ident)).map([[7]])
        assert seen["stage each/ident"] == {
            "async_pipeline.pipeline.name": "p",
            "async_pipeline.stage.name": "each/ident",
            "async_pipeline.item.index": 0,
            "async_pipeline.element": (0,),
        }

    async def test_is_inside_of_the_span_around_the_call(self, sdk: Sdk) -> None:
        with sdk.tracer.start_as_current_span("request"):
            await sdk.pipeline(ident).run(1)
            await sdk.pipeline(ident).try_run(1)
        one = ["request > pipeline p", "request > pipeline p > stage ident"]
        assert sdk.tree() == ["request", *one, *one]

    async def test_two_runs_are_two_traces(self, sdk: Sdk) -> None:
        pipeline = sdk.pipeline(ident)
        await pipeline.run(1)
        await pipeline.run(2)
        assert sdk.tree() == ["pipeline p", "pipeline p > stage ident"] * 2
        assert len({trace_of(span) for span in sdk.spans}) == 2

    async def test_leaves_no_trace_in_the_context(self, sdk: Sdk) -> None:
        before = otel_context.get_current()
        variables = len(contextvars.copy_context())
        await sdk.pipeline(ident).run(1)
        await sdk.pipeline(bad).try_run(1)
        await cancelled(sdk.pipeline(forever).run(1))
        assert otel_context.get_current() is before
        assert len(contextvars.copy_context()) == variables

    async def test_what_a_handler_traces_is_inside_its_stage(self, sdk: Sdk) -> None:
        async def traced(value: Any) -> Any:
            with sdk.tracer.start_as_current_span("query"):
                await asyncio.sleep(0)
            return value

        await sdk.pipeline(ident, traced).run(1)
        assert sdk.tree()[2:] == ["pipeline p > stage traced", "pipeline p > stage traced > query"]

    @pytest.mark.threads
    @pytest.mark.parametrize("is_own", [True, False])
    async def test_the_same_in_a_thread(self, sdk: Sdk, is_own: bool) -> None:
        def traced(value: Any) -> Any:
            with sdk.tracer.start_as_current_span("query"):
                return value

        with ThreadPoolExecutor(1) as pool:
            stage = Stage("traced", traced, executor=pool if is_own else "thread")
            await sdk.pipeline(stage).map([1, 2])
        assert (
            sorted(sdk.tree())[2:]
            == ["pipeline p > stage traced"] * 2 + ["pipeline p > stage traced > query"] * 2
        )

    async def test_a_handler_that_forgets_to_detach_does_not_reach_the_next_stage(self, sdk: Sdk) -> None:
        async def forgetful(value: Any) -> Any:
            otel_context.attach(trace.set_span_in_context(trace.INVALID_SPAN, otel_context.Context()))

        await sdk.pipeline(forgetful, ident).run(1)
        assert sdk.tree()[1:] == ["pipeline p > stage forgetful", "pipeline p > stage ident"]
        assert attributes(sdk.span("stage forgetful"))["outcome"] == "ok"

    async def test_elements_whose_handler_forgets_to_detach(self, sdk: Sdk) -> None:
        async def forgetful(value: int) -> Any:
            otel_context.attach(otel_context.Context())
            for _ in range(3 * value):
                await asyncio.sleep(0)

        await sdk.pipeline(each(forgetful)).run([1, 2, 3])
        elements = {id_of(span): attributes(span).get("element") for span in sdk.spans}
        assert [elements[number] for number in sdk.log.ended] == [(0,), (1,), (2,), None, None]

    async def test_a_run_that_is_not_sampled_is_measured_all_the_same(self) -> None:
        sdk = Sdk(ALWAYS_OFF)
        recorded = []
        shown = []

        class OwnError(Exception):
            def __str__(self) -> str:
                shown.append(self)
                return "own"

        async def traced(value: Any) -> Any:
            recorded.append(sdk.tracer.start_span("query").is_recording())
            raise OwnError

        await sdk.pipeline(Stage("traced", traced, retries=1)).try_run(1)
        assert recorded == [False, False]
        assert not sdk.spans
        kind = f"{__name__}.{OwnError.__qualname__}"
        assert sdk.points("async_pipeline.stage.retries") == {("p", "traced", kind): 1}
        assert sdk.points("async_pipeline.run.duration") == {("error", "p", kind): 1}
        assert not shown, "nothing is made of an error that is not recorded"


class TestFailure:
    async def test_is_recorded_where_it_was_raised(self, sdk: Sdk) -> None:
        inner = Pipeline([bad], name="inner")
        await sdk.pipeline(ident, Pipeline([inner], name="mid")).try_run(1)
        assert exceptions(sdk) == {"stage mid/inner/bad": ["bad 1"]}
        failed = [span for span in sdk.spans if span.name != "stage ident"]
        assert len(failed) == 4
        for span in failed:
            assert status(span) == (ERROR, "bad 1")
            assert attributes(span)["error.type"] == "ValueError"
            assert attributes(span)["outcome"] == "error"
        assert "error.type" not in attributes(sdk.span("stage ident"))

    async def test_has_its_traceback(self, sdk: Sdk) -> None:
        await sdk.pipeline(bad).try_run(1)
        (event,) = sdk.span("stage bad").events
        recorded = dict(event.attributes or {})
        assert recorded["exception.type"] == "ValueError"
        assert "in bad\n" in str(recorded["exception.stacktrace"])

    async def test_that_cannot_be_shown_is_recorded_by_its_class(self, sdk: Sdk) -> None:
        async def aborts(value: Any) -> Any:
            raise SecretError

        await sdk.pipeline(aborts).try_run(1)
        assert status(sdk.span("pipeline p")) == (ERROR, "SecretError")
        assert attributes(sdk.span("stage aborts"))["error.type"] == f"{__name__}.SecretError"
        assert events(sdk.span("stage aborts")) == ["exception"]

    async def test_of_several_branches_is_recorded_in_each(self, sdk: Sdk) -> None:
        await sdk.pipeline(parallel(a=bad, b=bad), name="both").try_run(1)
        assert exceptions(sdk) == {"stage parallel/a": ["bad 1"], "stage parallel/b": ["bad 1"]}
        for name in ("stage parallel", "pipeline both"):
            assert attributes(sdk.span(name))["error.type"] == "ExceptionGroup"

    async def test_of_a_middleware_is_recorded_on_the_stage(self, sdk: Sdk) -> None:
        async def gate(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            raise LookupError("closed")

        with pytest.raises(LookupError):
            await sdk.pipeline(ident, middlewares=[gate]).run(1)
        assert exceptions(sdk) == {"stage ident": ["closed"]}
        assert status(sdk.span("pipeline p")) == (ERROR, "closed")

    async def test_of_a_run_inside_a_handler_is_recorded_there(self, sdk: Sdk) -> None:
        inner = sdk.pipeline(bad, name="inner")

        async def call(value: Any) -> Any:
            return await inner.run(value)

        await sdk.pipeline(call).try_run(1)
        assert sdk.tree()[-1] == "pipeline p > stage call > pipeline inner > stage bad"
        assert exceptions(sdk) == {"stage bad": ["bad 1"]}
        assert {attributes(span)["error.type"] for span in sdk.spans} == {"ValueError"}
        assert [events(span) for span in sdk.spans] == [[], [], [], ["exception"]]

    async def test_of_a_run_inside_a_handler_is_retried_by_its_own_name(self, sdk: Sdk) -> None:
        inner = sdk.pipeline(bad, name="inner")

        async def call(value: Any) -> Any:
            return await inner.run(value)

        await sdk.pipeline(Stage("call", call, retries=1)).try_run(1)
        (event,) = sdk.span("stage call").events
        assert (event.attributes or {})["exception.type"] == "ValueError"
        assert sdk.points("async_pipeline.stage.retries") == {("p", "call", "ValueError"): 1}

    async def test_that_replaces_another_is_recorded_as_well(self, sdk: Sdk) -> None:
        async def translate(value: Any) -> Any:
            try:
                await sdk.pipeline(bad, name="inner").run(value)
            except StageExecutionError:
                raise LookupError("not there") from None

        await sdk.pipeline(translate).try_run(1)
        assert exceptions(sdk) == {"stage bad": ["bad 1"], "stage translate": ["not there"]}

    async def test_together_with_another_one_is_recorded_as_a_group(self, sdk: Sdk) -> None:
        async def both(value: Any) -> Any:
            try:
                await sdk.pipeline(bad, name="inner").run(value)
            except StageExecutionError as error:
                raise ExceptionGroup("both", [error, LookupError("not there")]) from None

        await sdk.pipeline(both).try_run(1)
        assert exceptions(sdk) == {"stage bad": ["bad 1"], "stage both": ["both (2 sub-exceptions)"]}

    async def test_the_same_error_is_recorded_in_each_trace(self, sdk: Sdk) -> None:
        error = ValueError("one and the same")

        async def fails(value: Any) -> Any:
            raise error

        await sdk.pipeline(fails).map([1, 2], 1, return_exceptions=True)
        assert exceptions(sdk) == {"stage fails": ["one and the same"] * 2}

    async def test_of_what_is_no_exception(self, sdk: Sdk) -> None:
        async def aborts(value: Any) -> Any:
            raise Abort("stop")

        with pytest.raises(Abort):
            await sdk.pipeline(Pipeline([aborts], name="inner")).run(1)
        assert exceptions(sdk) == {"stage inner/aborts": ["stop"]}
        assert status(sdk.span("pipeline p")) == (ERROR, "stop")

    async def test_saved_by_another_step_fails_that_span_alone(self, sdk: Sdk) -> None:
        assert await sdk.pipeline(fallback(bad, ident)).run(1) == 1
        assert sdk.tree()[1:] == [
            "pipeline p > stage fallback",
            "pipeline p > stage fallback > stage fallback/bad",
            "pipeline p > stage fallback > stage fallback/ident",
        ]
        assert exceptions(sdk) == {"stage fallback/bad": ["bad 1"]}
        failed = [span.name for span in sdk.spans if span.status.status_code is ERROR]
        assert failed == ["stage fallback/bad"]

    async def test_many_failures_inside_one_span_are_not_all_kept(self, sdk: Sdk) -> None:
        errors: list[Any] = []

        async def fails(value: Any) -> Any:
            error = LookupError(value)
            error.value = Value()  # type: ignore[attr-defined]
            errors.append(weakref.ref(error.value))  # type: ignore[attr-defined]
            raise error

        class Value:
            pass

        inner = sdk.pipeline(fails, name="inner")

        async def call(value: Any) -> Any:
            for number in range(100):
                await inner.try_run(number)
            gc.collect()
            kept.append(sum(ref() is not None for ref in errors))
            await inner.run("last")

        kept: list[int] = []
        await sdk.pipeline(call).try_run(1)
        assert 0 < kept[0] < 50
        assert exceptions(sdk)["stage fails"][-1] == "last"
        assert "stage call" not in exceptions(sdk)
        gc.collect()
        assert not any(ref() for ref in errors)


class TestAttempts:
    async def test_each_that_is_retried_is_an_event(self, sdk: Sdk) -> None:
        stage = Stage("flaky", Flaky(2), retries=3, backoff="exponential")
        assert await sdk.pipeline(stage).run(1) == 1
        span = sdk.span("stage flaky")
        assert [dict(event.attributes or {}) for event in span.events] == [
            {
                "async_pipeline.attempt": number,
                "async_pipeline.retry.delay": 0.0,
                "exception.type": "ConnectionError",
                "exception.message": f"{2 - number} left",
            }
            for number in (1, 2)
        ]
        assert events(span) == ["async_pipeline.attempt_failed"] * 2
        assert attributes(span)["attempts"] == 3
        assert status(span) == (UNSET, None)
        assert not events(sdk.span("pipeline p"))

    async def test_the_last_is_the_exception(self, sdk: Sdk) -> None:
        await sdk.pipeline(Stage("flaky", Flaky(9), retries=2)).try_run(1)
        span = sdk.span("stage flaky")
        assert events(span) == ["async_pipeline.attempt_failed"] * 2 + ["exception"]
        assert attributes(span)["attempts"] == 3
        assert status(span) == (ERROR, "6 left")

    async def test_one_that_on_error_has_handled_is_an_event(self, sdk: Sdk) -> None:
        stage = Stage("flaky", Flaky(9), retries=1, on_error=lambda value, error: "saved")
        assert await sdk.pipeline(stage).run(1) == "saved"
        span = sdk.span("stage flaky")
        assert events(span) == ["async_pipeline.attempt_failed"] * 2
        assert [(event.attributes or {})["exception.message"] for event in span.events] == [
            "8 left",
            "7 left",
        ]
        assert "async_pipeline.retry.delay" not in (span.events[1].attributes or {})
        assert status(span) == (UNSET, None)
        assert "error.type" not in attributes(span)

    async def test_one_before_an_on_error_that_fails(self, sdk: Sdk) -> None:
        def on_error(value: Any, error: Exception) -> Any:
            raise LookupError("neither")

        await sdk.pipeline(Stage("flaky", Flaky(9), on_error=on_error)).try_run(1)
        span = sdk.span("stage flaky")
        assert events(span) == ["async_pipeline.attempt_failed", "exception"]
        assert attributes(span)["error.type"] == "LookupError"

    async def test_those_that_a_middleware_retries_are_events(self, sdk: Sdk) -> None:
        pipeline = sdk.pipeline(Stage("flaky", Flaky(2)), middlewares=[RetryMiddleware(retries=3)])
        assert await pipeline.run(1) == 1
        assert [events(span) for span in sdk.spans] == [[], ["async_pipeline.attempt_failed"] * 2]

    async def test_events_stand_at_the_time_of_the_attempt(self, sdk: Sdk) -> None:
        async def traced(value: Any) -> Any:
            with sdk.tracer.start_as_current_span("query"):
                return await flaky(value)

        flaky = Flaky(1)
        await sdk.pipeline(Stage("traced", traced, retries=1)).run(1)
        first, second = (span for span in sdk.spans if span.name == "query")
        (event,) = sdk.span("stage traced").events
        assert first.end_time is not None
        assert second.start_time is not None
        assert first.end_time <= event.timestamp <= second.start_time

    @pytest.mark.virtual
    async def test_one_that_times_out(self, sdk: Sdk) -> None:
        stage = Stage("slow", forever, timeout=1, retries=1, retry_delay=2)
        await sdk.pipeline(stage).try_run(1)
        span = sdk.span("stage slow")
        assert events(span) == ["async_pipeline.attempt_failed", "exception"]
        first = span.events[0].attributes or {}
        assert first["exception.type"] == "async_pipeline.errors.StageTimeoutError"
        assert first["async_pipeline.retry.delay"] == 2.0
        for each_span in (span, sdk.span("pipeline p")):
            assert attributes(each_span)["outcome"] == "timeout"
            assert attributes(each_span)["error.type"] == "async_pipeline.errors.StageTimeoutError"
            assert status(each_span) == (ERROR, "no result within the stage's timeout of 1 s")

    @pytest.mark.virtual
    async def test_one_whose_retry_is_cancelled_is_an_event(self, sdk: Sdk) -> None:
        stage = Stage("flaky", Flaky(9), retries=1, retry_delay=5)
        await cancelled(sdk.pipeline(stage).run(1))
        span = sdk.span("stage flaky")
        assert events(span) == ["async_pipeline.attempt_failed"]
        assert status(span) == (ERROR, "cancelled")


class TestEndsThatAreNoErrors:
    @pytest.mark.virtual
    async def test_the_deadline_of_a_run(self, sdk: Sdk) -> None:
        await sdk.pipeline(ident, Pipeline([forever], name="inner")).try_run(1, timeout=2)
        late = [span for span in sdk.spans if span.name != "stage ident"]
        assert [span.name for span in late] == ["pipeline p", "stage inner", "stage inner/forever"]
        for span in late:
            assert attributes(span)["outcome"] == "timeout"
            assert attributes(span)["error.type"] == "async_pipeline.errors.DeadlineExceeded"
        assert exceptions(sdk) == {"pipeline p": ["no result within the run's timeout of 2 s"]}
        assert status(sdk.span("pipeline p")) == (ERROR, "no result within the run's timeout of 2 s")
        assert sdk.span("stage inner/forever").status.status_code is ERROR
        assert "timeout" in str(sdk.span("stage inner/forever").status.description)

    async def test_a_cancellation_from_outside(self, sdk: Sdk) -> None:
        await cancelled(sdk.pipeline(Pipeline([forever], name="inner")).run(1))
        assert len(sdk.spans) == 3
        for span in sdk.spans:
            assert status(span) == (ERROR, "cancelled")
            assert attributes(span)["outcome"] == "cancelled"
            assert attributes(span)["error.type"] == "asyncio.exceptions.CancelledError"
            assert not span.events

    async def test_a_cancellation_with_a_message(self, sdk: Sdk) -> None:
        async def stops(value: Any) -> Any:
            raise asyncio.CancelledError("closing time")

        with suppress(asyncio.CancelledError):
            await sdk.pipeline(stops).run(1)
        assert status(sdk.span("stage stops")) == (ERROR, "closing time")

    async def test_a_finish(self, sdk: Sdk) -> None:
        assert await sdk.pipeline(Pipeline([finish, ident], name="inner"), ident).run(1) == "early"
        assert [span.name for span in sdk.spans] == ["pipeline p", "stage inner", "stage inner/finish"]
        for span in sdk.spans:
            assert attributes(span)["outcome"] == "finished"
            assert "error.type" not in attributes(span)
            assert status(span) == (UNSET, None)
            assert not span.events

    async def test_a_branch_whose_sibling_has_failed_is_cancelled(self, sdk: Sdk) -> None:
        await sdk.pipeline(parallel(a=forever, b=bad)).try_run(1)
        assert status(sdk.span("stage parallel/a")) == (ERROR, "cancelled")
        assert status(sdk.span("stage parallel/b")) == (ERROR, "bad 1")
        assert exceptions(sdk) == {"stage parallel/b": ["bad 1"]}

    async def test_a_coroutine_that_is_closed(self, sdk: Sdk) -> None:
        running = sdk.pipeline(forever).run(1)
        running.send(None)
        running.close()
        assert {status(span) for span in sdk.spans} == {(ERROR, "cancelled")}
        assert len(sdk.spans) == 2
        assert not otel_context.get_current()

    async def test_a_coroutine_that_is_closed_in_another_context(self, sdk: Sdk) -> None:
        pipeline = sdk.pipeline(forever)
        running = pipeline.run(1)
        contextvars.Context().run(running.send, None)
        other = pipeline.run(1)
        other.send(None)
        contextvars.Context().run(running.close)
        assert [status(span) for span in sdk.spans] == [(ERROR, "cancelled")] * 2
        assert [id_of(span) for span in sdk.spans] == sdk.log.started[:2]
        other.close()


class TestSteps:
    async def test_branches_side_by_side_are_children_of_their_step(self, sdk: Sdk) -> None:
        async def traced(value: Any) -> Any:
            with sdk.tracer.start_as_current_span(f"query {value}"):
                await asyncio.sleep(0)

        await sdk.pipeline(parallel(a=traced, b=Pipeline([ident, ident], name="i"))).run(1)
        assert sorted(sdk.tree()) == [
            "pipeline p",
            "pipeline p > stage parallel",
            "pipeline p > stage parallel > stage parallel/a",
            "pipeline p > stage parallel > stage parallel/a > query 1",
            "pipeline p > stage parallel > stage parallel/b",
            "pipeline p > stage parallel > stage parallel/b > stage parallel/b/ident",
            "pipeline p > stage parallel > stage parallel/b > stage parallel/b/ident",
        ]

    async def test_elements_have_their_index(self, sdk: Sdk) -> None:
        await sdk.pipeline(each(each(ident))).map([[[1], [2, 3]]])
        inner = [attributes(span) for span in sdk.spans if span.name == "stage each/each/ident"]
        assert sorted(found["element"] for found in inner) == [(0, 0), (1, 0), (1, 1)]
        assert {found["item.index"] for found in inner} == {0}
        assert "element" not in attributes(sdk.span("stage each"))

    async def test_one_stage_that_runs_several_times_at_once(self, sdk: Sdk) -> None:
        async def hedge(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
            attempts = [asyncio.ensure_future(next_stage(number)) for number in (1, 2, 3)]
            return await asyncio.gather(*attempts, return_exceptions=True)

        async def traced(value: int) -> Any:
            with sdk.tracer.start_as_current_span(f"query {value}"):
                for _ in range(2 * value):
                    await asyncio.sleep(0)
                if value == 2:
                    raise ConnectionError("second")
            return value

        inner = Pipeline([Stage("traced", traced, retries=0)], name="inner")
        await sdk.pipeline(inner, middlewares=[hedge]).try_run(0)
        spans = [span for span in sdk.spans if span.name == "stage inner/traced"]
        by_id = {id_of(span): span for span in spans}
        for value in (1, 2, 3):
            query = sdk.span(f"query {value}")
            assert query.parent is not None
            own = by_id[query.parent.span_id]
            assert own.end_time is not None
            assert query.end_time is not None
            assert own.end_time >= query.end_time
            assert attributes(own)["outcome"] == ("error" if value == 2 else "ok")
        assert len(by_id) == 3


class TestNestedPipelines:
    async def test_only_the_outer_one_is_instrumented(self, sdk: Sdk) -> None:
        await sdk.pipeline(Pipeline([ident], name="inner"), name="outer").run(1)
        assert sdk.tree() == [
            "pipeline outer",
            "pipeline outer > stage inner",
            "pipeline outer > stage inner > stage inner/ident",
        ]

    async def test_only_the_inner_one_is_instrumented(self, sdk: Sdk) -> None:
        await Pipeline([str, sdk.pipeline(ident, name="inner")], name="outer").run(1)
        assert sdk.tree() == ["pipeline inner", "pipeline inner > stage ident"]

    async def test_both_are_instrumented(self, sdk: Sdk) -> None:
        flaky = Stage("flaky", Flaky(1), retries=1)
        inner = sdk.pipeline(flaky, each(ident), name="inner")
        await sdk.pipeline(inner, list, name="outer").run([1])
        around = "pipeline outer > stage inner > pipeline inner"
        assert sdk.tree() == [
            "pipeline outer",
            "pipeline outer > stage inner",
            around,
            f"{around} > stage inner/flaky",
            f"{around} > stage inner/each",
            f"{around} > stage inner/each > stage inner/each/ident",
            "pipeline outer > stage list",
        ]
        assert events(sdk.span("stage inner/flaky")) == ["async_pipeline.attempt_failed"]
        assert attributes(sdk.span("pipeline inner"))["pipeline.name"] == "inner"
        assert sdk.points("async_pipeline.stage.duration") == {
            ("ok", "inner", "each"): 1,
            ("ok", "inner", "each/ident"): 1,
            ("ok", "inner", "flaky"): 1,
            ("ok", "outer", "inner"): 1,
            ("ok", "outer", "inner/each"): 1,
            ("ok", "outer", "inner/each/ident"): 1,
            ("ok", "outer", "inner/flaky"): 1,
            ("ok", "outer", "list"): 1,
        }

    async def test_three_are_instrumented(self, sdk: Sdk) -> None:
        inmost = sdk.pipeline(bad, name="c")
        await sdk.pipeline(sdk.pipeline(inmost, name="b"), name="a").try_run(1)
        path = "pipeline a > stage b > pipeline b > stage b/c > pipeline c > stage b/c/bad"
        assert sdk.tree()[-1] == path
        assert len(sdk.spans) == 6
        assert exceptions(sdk) == {"stage b/c/bad": ["bad 1"]}

    async def test_the_same_instrumentation_watches_both(self, sdk: Sdk) -> None:
        inner = sdk.pipeline(ident)
        await inner.replace(stages=[inner, ident]).run(1)
        assert sdk.tree() == [
            "pipeline p",
            "pipeline p > stage p",
            "pipeline p > stage p > pipeline p",
            "pipeline p > stage p > pipeline p > stage p/ident",
            "pipeline p > stage ident",
        ]

    async def test_a_run_that_a_handler_calls_is_told_in_full(self, sdk: Sdk) -> None:
        inner = sdk.pipeline(ident, name="inner")

        async def call(value: Any) -> Any:
            return await inner.map([value, value], 1)

        await sdk.pipeline(call, name="outer").run(1)
        one = ["pipeline outer > stage call > pipeline inner"]
        assert sdk.tree()[2:] == [*one, f"{one[0]} > stage ident"] * 2

    async def test_inside_a_step(self, sdk: Sdk) -> None:
        inner = sdk.pipeline(bad, name="inner")
        await sdk.pipeline(parallel(a=inner, b=fallback(inner, ident)), name="outer").try_run(1)
        assert [name for name in sdk.tree() if name.endswith("bad")] == [
            "pipeline outer > stage parallel > stage parallel/a > pipeline inner > stage parallel/a/bad",
            "pipeline outer > stage parallel > stage parallel/b > stage parallel/b/inner > pipeline inner"
            " > stage parallel/b/inner/bad",
        ]


class TestBatches:
    @pytest.mark.parametrize("is_inside", [True, False])
    async def test_each_item_is_a_run(self, sdk: Sdk, is_inside: bool) -> None:
        pipeline = sdk.pipeline(ident, str)
        if is_inside:
            with sdk.tracer.start_as_current_span("request"):
                await pipeline.map(range(20), 4)
        else:
            await pipeline.map(range(20), 4)
        spans = [span for span in sdk.spans if span.name != "request"]
        assert len(spans) == 60
        around = "request > " if is_inside else ""
        assert Counter(sdk.tree()[is_inside:]) == {
            f"{around}pipeline p": 20,
            f"{around}pipeline p > stage ident": 20,
            f"{around}pipeline p > stage str": 20,
        }
        assert len({trace_of(span) for span in spans}) == (1 if is_inside else 20)
        assert Counter(attributes(span)["item.index"] for span in spans) == dict.fromkeys(range(20), 3)

    async def test_a_stream(self, sdk: Sdk) -> None:
        async with sdk.pipeline(ident).stream(range(20), 4) as results:
            assert [value async for value in results] == [*range(20)]
        assert Counter(sdk.tree()) == {"pipeline p": 20, "pipeline p > stage ident": 20}

    @pytest.mark.parametrize("is_inside", [True, False])
    async def test_items_go_on_sharing_a_task(self, sdk: Sdk, is_inside: bool) -> None:
        tasks: set[Any] = set()

        async def mixed(value: int) -> int:
            tasks.add(asyncio.current_task())
            await asyncio.sleep(0)
            if value % 3 == 0:
                raise ValueError
            if value % 3 == 1:
                raise Finish(value)
            return value

        pipeline = sdk.pipeline(Pipeline([Stage("mixed", mixed, retries=1)], name="inner"))
        if is_inside:
            with sdk.tracer.start_as_current_span("request"):
                await pipeline.map(range(30), 1, return_exceptions=True)
        else:
            await pipeline.map(range(30), 1, return_exceptions=True)
        assert len(tasks) == 1

    async def test_the_first_failure_ends_the_spans_of_the_others(self, sdk: Sdk) -> None:
        async def mixed(value: int) -> None:
            for _ in range(5):
                await asyncio.sleep(0)  # until all have started
            await (bad(value) if value == 2 else forever(value))

        with pytest.raises(BatchError):
            await sdk.pipeline(mixed).map(range(4), 4)
        by_item = {
            attributes(span)["item.index"]: status(span) for span in sdk.spans if span.name == "pipeline p"
        }
        assert by_item.pop(2) == (ERROR, "bad 2")
        assert by_item == dict.fromkeys((0, 1, 3), (ERROR, "cancelled"))

    async def test_a_batch_that_is_cancelled(self, sdk: Sdk) -> None:
        await cancelled(sdk.pipeline(forever).map(range(9), 3))
        assert {status(span) for span in sdk.spans} == {(ERROR, "cancelled")}
        assert 0 < len(sdk.spans) <= 6

    @settings(max_examples=40, deadline=None)
    @given(
        plans=st.lists(
            st.sampled_from(["ok", "slow", "bad", "flaky", "late", "finish", "stray"]), max_size=9
        ),
        concurrency=st.integers(1, 4),
        timeout=st.sampled_from([None, 3.0]),
        cancel_at=st.sampled_from([None, 1.5]),
        keep_going=st.booleans(),
    )
    def test_no_item_is_inside_of_another(
        self,
        plans: list[str],
        concurrency: int,
        timeout: float | None,
        cancel_at: float | None,
        keep_going: bool,
    ) -> None:
        sdk = Sdk()

        async def act(plan: str, context: dict[str, Any]) -> str:
            number = context["number"] = context.get("number", 0) + 1
            with sdk.tracer.start_as_current_span("query"):
                if plan == "flaky" and number < 3:
                    raise ConnectionError
                if plan == "bad":
                    raise ValueError(plan)
                if plan == "finish":
                    raise Finish(plan)
                if plan == "stray":
                    raise asyncio.CancelledError
                await asyncio.sleep({"slow": 1, "late": 9}.get(plan, 0))
            return plan

        inner = sdk.pipeline(Stage("act", act, timeout=5, retries=2), name="inner")
        pipeline = sdk.pipeline(ident, inner, parallel(a=ident, b=Stage("b", lambda value: value)))

        async def main() -> None:
            running = pipeline.map(plans, concurrency, return_exceptions=keep_going, timeout=timeout)
            with suppress(BatchError, TimeoutError):
                async with asyncio.timeout(cancel_at):
                    await running
            assert not otel_context.get_current()

        run_virtually(main())
        sdk.check()
        by_id = {id_of(span): span for span in sdk.spans}
        for span in sdk.spans:
            if span.name == "pipeline p":
                assert span.parent is None
                continue
            assert span.parent is not None
            around = by_id[span.parent.span_id]
            assert trace_of(span) == trace_of(around)
            if span.name != "query":
                assert attributes(span)["item.index"] == attributes(around)["item.index"]
                has_failed = attributes(span)["outcome"] not in ("ok", "finished")
                assert span.status.status_code is (ERROR if has_failed else UNSET)
        ends: dict[Any, int] = sdk.points("async_pipeline.run.duration") if plans else {}
        roots = [span for span in sdk.spans if span.name.startswith("pipeline ")]
        assert sum(ends.values()) == len(roots)


# -- instrument: metrics


class TestMetrics:
    async def test_follow_the_conventions(self, sdk: Sdk) -> None:
        await sdk.pipeline(Stage("flaky", Flaky(1), retries=1)).run(1)
        found = {name: (metric.unit, type(metric.data).__name__) for name, metric in sdk.metrics().items()}
        assert found == {
            "async_pipeline.run.duration": ("s", "Histogram"),
            "async_pipeline.stage.duration": ("s", "Histogram"),
            "async_pipeline.stage.retries": ("{retry}", "Sum"),
            "async_pipeline.active_runs": ("{run}", "Sum"),
        }
        monotonic = {
            name: getattr(metric.data, "is_monotonic", None) for name, metric in sdk.metrics().items()
        }
        assert monotonic["async_pipeline.stage.retries"] is True
        assert monotonic["async_pipeline.active_runs"] is False
        for name in ("run", "stage"):
            (point,) = sdk.metrics()[f"async_pipeline.{name}.duration"].data.data_points
            assert [*point.explicit_bounds] == [
                *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
            ]
        assert all(metric.description for metric in sdk.metrics().values())

    async def test_have_few_attributes(self, sdk: Sdk) -> None:
        await sdk.pipeline(each(Stage("flaky", Flaky(1), retries=1))).map([[1], [2]])
        allowed = {"pipeline.name", "stage.name", "outcome", "error.type"}
        for metric in sdk.metrics().values():
            for point in metric.data.data_points:
                assert {name.removeprefix("async_pipeline.") for name in point.attributes} <= allowed

    async def test_count_ends_by_outcome(self, sdk: Sdk) -> None:
        await sdk.pipeline(ident).map([1, 2])
        await sdk.pipeline(finish).run(1)
        await sdk.pipeline(bad).try_run(1)
        await cancelled(sdk.pipeline(forever).run(1))
        cancellation = "asyncio.exceptions.CancelledError"
        assert sdk.points("async_pipeline.run.duration") == {
            ("ok", "p"): 2,
            ("finished", "p"): 1,
            ("error", "p", "ValueError"): 1,
            ("cancelled", "p", cancellation): 1,
        }
        assert sdk.points("async_pipeline.stage.duration") == {
            ("ok", "p", "ident"): 2,
            ("finished", "p", "finish"): 1,
            ("error", "p", "bad", "ValueError"): 1,
            ("cancelled", "p", "forever", cancellation): 1,
        }

    @pytest.mark.virtual
    async def test_measure_seconds_of_the_loops_clock(self, sdk: Sdk) -> None:
        async def nap(value: float) -> None:
            await asyncio.sleep(value)

        await sdk.pipeline(nap, lambda _: 4.0, Stage("again", nap)).run(3.0)
        (run,) = sdk.metrics()["async_pipeline.run.duration"].data.data_points
        assert (run.sum, run.min) == (7.0, 7.0)
        stages = {
            point.attributes["async_pipeline.stage.name"]: point.sum
            for point in sdk.metrics()["async_pipeline.stage.duration"].data.data_points
        }
        assert stages == {"nap": 3.0, "<lambda>": 0.0, "again": 4.0}

    @pytest.mark.virtual
    async def test_of_a_deadline(self, sdk: Sdk) -> None:
        await sdk.pipeline(forever).try_run(1, timeout=2)
        exceeded = "async_pipeline.errors.DeadlineExceeded"
        assert sdk.points("async_pipeline.run.duration") == {("timeout", "p", exceeded): 1}
        assert sdk.points("async_pipeline.stage.duration") == {("timeout", "p", "forever", exceeded): 1}

    async def test_count_retries_and_no_last_attempt(self, sdk: Sdk) -> None:
        await sdk.pipeline(Stage("flaky", Flaky(9), retries=2), bad).try_run(1)
        assert sdk.points("async_pipeline.stage.retries") == {("p", "flaky", "ConnectionError"): 2}

    async def test_count_the_runs_that_are_active(self, sdk: Sdk) -> None:
        seen = []

        async def look(value: Any) -> None:
            await asyncio.sleep(0)
            seen.append(sdk.points("async_pipeline.active_runs"))

        await sdk.pipeline(look).map(range(3), 3)
        assert seen[0] == {("p",): 3}
        assert sdk.points("async_pipeline.active_runs") == {("p",): 0}

    async def test_point_to_a_span_as_an_example(self, sdk: Sdk) -> None:
        await sdk.pipeline(ident).run(1)
        metrics = sdk.metrics()
        for name, span in (("run", "pipeline p"), ("stage", "stage ident")):
            (point,) = metrics[f"async_pipeline.{name}.duration"].data.data_points
            assert [example.span_id for example in point.exemplars] == [id_of(sdk.span(span))]

    async def test_of_two_pipelines_are_the_same_metrics(self, sdk: Sdk) -> None:
        await sdk.pipeline(ident, name="a").run(1)
        await sdk.pipeline(ident, name="b").run(1)
        assert sdk.points("async_pipeline.run.duration") == {("ok", "a"): 1, ("ok", "b"): 1}


class TestInstrument:
    async def test_returns_a_pipeline_like_it(self, sdk: Sdk) -> None:
        class Own(Pipeline[int, int]):
            pass

        seen: list[Event] = []
        plain = Own([ident], name="own", middlewares=[RetryMiddleware()], observers=[seen.append])
        watched = sdk.instrument(plain)
        assert type(watched) is Own
        assert watched.stages == plain.stages
        assert watched.observers[0] == plain.observers[0]
        assert len(watched.observers) == 2
        assert len(plain.observers) == 1
        await watched.run(1)
        assert [event.kind for event in seen] == ["run_start", "stage_start", "stage_end", "run_end"]
        assert len(sdk.spans) == 2

    async def test_a_second_time_replaces_the_first(self, sdk: Sdk) -> None:
        other = Sdk()
        seen: list[Event] = []
        pipeline = other.instrument(sdk.pipeline(ident, observers=[seen.append]))
        await pipeline.run(1)
        assert not sdk.spans
        assert len(other.spans) == 2
        assert len(pipeline.observers) == 2

    @pytest.mark.parametrize("wrong", [Stage("ident", ident), ident, None])
    def test_takes_nothing_else(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match=r"instrument\(\) takes a Pipeline, not "):
            instrument(wrong)

    async def test_keeps_nothing_of_a_run(self, sdk: Sdk) -> None:
        pipeline = sdk.pipeline(Stage("flaky", Flaky(3), retries=1), each(bad))
        for _ in range(3):
            await pipeline.try_run([1, 2])
        assert pipeline.observers[-1]._open == {}

    async def test_an_ended_span_that_a_task_still_holds_lets_go_of_errors(self, sdk: Sdk) -> None:
        class Value:
            pass

        async def fails(value: Any) -> Any:
            error = ValueError(value)
            error.value = Value()  # type: ignore[attr-defined]
            values.append(weakref.ref(error.value))  # type: ignore[attr-defined]
            raise error

        async def spawn(value: Any) -> Any:
            await inner.try_run("first")
            tasks.append(asyncio.create_task(later()))
            await fails("its own")

        async def later() -> None:
            await released.wait()
            await inner.try_run("late")  # inside of a span that has ended
            gc.collect()
            kept.append([ref() for ref in values])

        values: list[Any] = []
        kept: list[Any] = []
        tasks: list[Any] = []
        released = asyncio.Event()
        inner = sdk.pipeline(fails, name="inner")
        await sdk.pipeline(Stage("spawn", spawn, retries=1)).try_run(1)
        gc.collect()
        assert [ref() for ref in values] == [None] * 4
        released.set()
        await asyncio.gather(*tasks)
        assert kept[-1] == [None] * 6
        late = "pipeline p > stage spawn > pipeline inner > stage fails"
        assert sdk.tree().count(late) == 4

    async def test_tasks_that_start_each_other_do_not_hold_all_spans(self, sdk: Sdk) -> None:
        async def start_next(number: int) -> None:
            if number:
                task = asyncio.create_task(again(number - 1))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                gc.collect()
                kept.append(sum(type(held).__name__ == "_OpenSpan" for held in gc.get_objects()))

        async def again(number: int) -> None:
            await asyncio.sleep(0)
            await pipeline.run(number)

        kept: list[int] = []
        tasks: set[asyncio.Task[None]] = set()
        pipeline = sdk.pipeline(start_next)
        await pipeline.run(50)
        while tasks:
            await asyncio.wait(tasks)
        assert 0 < kept[0] < 20

    def test_uses_the_global_providers_also_when_they_are_set_later(self) -> None:
        code = """
import asyncio
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from async_pipeline import Pipeline
from async_pipeline.telemetry.opentelemetry import instrument

pipeline = instrument(Pipeline([len]))
print(asyncio.run(pipeline.run("ab")))
spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(spans))
metrics.set_meter_provider(MeterProvider([reader]))
print(asyncio.run(pipeline.run("abc")))
print([span.name for span in spans.get_finished_spans()])
(resource,) = reader.get_metrics_data().resource_metrics
print(sorted(metric.name for scope in resource.scope_metrics for metric in scope.metrics))
"""
        done = run_alone(code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "2",
            "3",
            "['stage len', 'pipeline pipeline']",
            "['async_pipeline.active_runs', 'async_pipeline.run.duration', 'async_pipeline.stage.duration']",
        ]


class TestRobustness:
    async def test_a_span_that_cannot_be_started_loses_nothing_else(self, sdk: Sdk) -> None:
        class Broken(SpanProcessor):
            def on_start(self, span: Span, parent_context: Any = None) -> None:
                if span.name == "stage ident":
                    raise RuntimeError("broken processor")

        errors: list[Exception] = []
        sdk.tracers.add_span_processor(Broken())
        pipeline = sdk.instrument(
            Pipeline([Stage("ident", Flaky(1), retries=1), str], on_hook_error=errors.append)
        )
        assert await pipeline.run(1) == "1"
        assert [str(error) for error in errors] == ["broken processor"]
        assert [span.name for span in sdk.spans] == ["pipeline pipeline", "stage str"]
        assert sum(sdk.points("async_pipeline.stage.duration").values()) == 2
        sdk.log.started.remove(*set(sdk.log.started) - set(sdk.log.ended))

    async def test_a_span_ends_when_it_cannot_be_measured(self, sdk: Sdk, monkeypatch: Any) -> None:
        errors: list[Exception] = []
        pipeline = sdk.instrument(Pipeline([ident], on_hook_error=errors.append))
        observer: Any = pipeline.observers[0]

        def broken(*args: Any) -> None:
            raise RuntimeError("broken meter")

        monkeypatch.setattr(observer._stage_duration, "record", broken)
        await pipeline.run(1)
        assert [str(error) for error in errors] == ["broken meter"]
        assert len(sdk.spans) == 2


# -- the extra


def load_again(monkeypatch: pytest.MonkeyPatch, module: str, *missing: str) -> None:
    """Run a module of the package once more, where packages are missing."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    source: Any = importlib.util.find_spec(f"async_pipeline.telemetry.{module}")
    again: Any = importlib.util.spec_from_file_location("async_pipeline.telemetry._again", source.origin)
    again.loader.exec_module(importlib.util.module_from_spec(again))


OTEL = r"^OpenTelemetry support requires installing async-pipeline\[otel\]: pip install "


class TestPackage:
    def test_the_module_says_which_extra_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ImportError, match=OTEL):
            load_again(monkeypatch, "opentelemetry", "opentelemetry")

    def test_the_package_says_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "async_pipeline.telemetry.opentelemetry", None)
        with pytest.raises(ImportError, match=OTEL) as raised:
            telemetry.OpenTelemetryMiddleware  # noqa: B018
        assert isinstance(raised.value.__cause__, ModuleNotFoundError)

    @pytest.mark.parametrize("name", telemetry.__all__)
    def test_has_every_name(self, name: str) -> None:
        found = getattr(telemetry, name)
        assert found.__name__ == name
        assert getattr(sys.modules[found.__module__], name) is found
        assert name in dir(telemetry)

    def test_has_no_other_name(self) -> None:
        with pytest.raises(
            AttributeError, match=r"module 'async_pipeline.telemetry' has no attribute 'Other'"
        ):
            telemetry.Other  # noqa: B018

    def test_what_needs_no_extra_fails_with_its_own_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "async_pipeline.telemetry.trace", None)
        with pytest.raises(ModuleNotFoundError, match=r"async_pipeline\.telemetry\.trace"):
            telemetry.TraceRecorder  # noqa: B018

    def test_loads_nothing_before_it_is_used(self) -> None:
        code = """
import sys
import async_pipeline.telemetry
print(sorted(name for name in sys.modules if "opentelemetry" in name or "prometheus" in name))
"""
        done = run_alone(code)
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
