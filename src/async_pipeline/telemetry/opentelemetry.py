"""OpenTelemetry spans and metrics of runs and stages; needs the extra ``async-pipeline[otel]``.

Names, and how errors are recorded, follow the semantic conventions: "Naming" and "Recording errors".
"""

from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Mapping
from time import time_ns
from typing import Any, TypeVar, cast

from .. import __version__
from ..context import get_entry
from ..errors import DeadlineExceeded, Finish
from ..events import Event
from ..pipeline import Pipeline
from ._errors import class_name, original, type_of

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import attach, create_key, detach, get_value, set_value
    from opentelemetry.trace import Span, StatusCode
except ImportError as _missing:
    raise ImportError(
        "OpenTelemetry support requires installing async-pipeline[otel]: pip install 'async-pipeline[otel]'"
    ) from _missing

__all__ = ["OpenTelemetryMiddleware", "instrument"]

_SCOPE = "async_pipeline"
_SIMPLE = (str, int, float, bool)
_CANCELLATION = (CancelledError, GeneratorExit)
_OPEN = create_key("async_pipeline.open_span")
# those of http.server.request.duration
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_REMEMBERED = 32  # how many errors that spans inside have recorded

_PipelineT = TypeVar("_PipelineT", bound="Pipeline[Any, Any, Any]")


class OpenTelemetryMiddleware:
    """Open a span around each stage, with all its attempts.

    :func:`instrument` tells more: a span for the run, stages inside of others, attempts, and metrics.

    The span is named ``{span_prefix}.{stage_name}`` and has these attributes:

    - ``async_pipeline.stage.name``, ``async_pipeline.input.type`` and, of a stage that has succeeded,
      ``async_pipeline.output.type``: the name of the value's class.
    - What the context holds in ``trace_attributes``, an entry or an attribute of it: those items whose keys
      are strings and whose values are ``str``, ``int``, ``float`` or ``bool``; all others are left out.
    - Of a failure, ``async_pipeline.error`` (``True``), ``async_pipeline.error.type`` and
      ``async_pipeline.error.message``.

    Its status is OK or ERROR. A failure is recorded as an exception, once; a cancellation is an ERROR without
    one. A stage that raises :class:`~async_pipeline.Finish` has succeeded, with its value as output.

    Args:
        tracer_name: the name of the tracer, which is taken from the global tracer provider.
        span_prefix: what the names of the spans begin with.
    """

    def __init__(self, tracer_name: str = "async_pipeline", span_prefix: str = "pipeline.stage") -> None:
        self._tracer = trace.get_tracer(tracer_name)
        self._span_prefix = span_prefix

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        ended: BaseException | None = None
        output = None
        with self._tracer.start_as_current_span(f"{self._span_prefix}.{stage_name}") as span:
            span.set_attribute("async_pipeline.stage.name", stage_name)
            span.set_attribute("async_pipeline.input.type", type(value).__name__)
            _merge_attributes(span, get_entry(context, "trace_attributes"))
            try:
                output = await next_stage(value)
            except BaseException as error:
                ended = error
            _describe_result(span, output, ended)
        if ended is None:
            return output
        behind = ended.__context__
        try:
            raise ended  # outside the block, which would record it a second time
        finally:
            ended.__context__ = behind  # which is another one if somebody awaits this in an except block
            del ended, behind  # the traceback holds this frame


def _merge_attributes(span: Span, attributes: object) -> None:
    if isinstance(attributes, Mapping):
        for key, value in attributes.items():
            if isinstance(key, str) and isinstance(value, _SIMPLE):
                span.set_attribute(key, value)


def _describe_result(span: Span, output: Any, ended: BaseException | None) -> None:
    if ended is None or isinstance(ended, Finish):
        result = output if ended is None else ended.value
        span.set_attribute("async_pipeline.output.type", type(result).__name__)
        span.set_status(StatusCode.OK)
        return
    span.set_attribute("async_pipeline.error", True)
    span.set_attribute("async_pipeline.error.type", type(ended).__name__)
    span.set_attribute("async_pipeline.error.message", _text(ended))
    span.set_status(StatusCode.ERROR, _description(ended))
    if not isinstance(ended, _CANCELLATION):
        _record(span, ended)


def instrument(
    pipeline: _PipelineT,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> _PipelineT:
    """Return a pipeline like it whose runs are traced and measured.

    >>> pipeline = instrument(pipeline)
    >>> await pipeline.map(urls)                         # a trace for each item

    **Traces.** A run, which in ``map`` and ``stream`` is one item, is a span ``pipeline NAME``. Each stage is
    a span ``stage NAME`` inside, also one of an inner pipeline or step, which is named by its path: ``stage
    enrich/price``. The run's span is a child of the span that is current where ``run``, ``map`` or ``stream``
    is called; where there is none, each run begins a trace of its own. A stage's span is current while the
    stage runs, in threads of ``executor=``, too, so that what its handler traces is inside.

    ======================================= ==========================================================
    ``async_pipeline.pipeline.name``        the pipeline that is instrumented
    ``async_pipeline.stage.name``           of a stage, its path
    ``async_pipeline.item.index``           in ``map`` and ``stream``, the item's index
    ``async_pipeline.element``              inside ``each`` and ``keep``, the element's index, in a list
    ``async_pipeline.outcome``              ``ok``, ``finished``, ``error``, ``timeout`` or ``cancelled``
    ``async_pipeline.attempts``             of a stage, how many attempts were made
    ``error.type``                          of the last three, the class of the handler's own error
    ======================================= ==========================================================

    The status is ERROR for the last three outcomes, with the error's message; for the others it stays UNSET,
    as the conventions want it of a library. An attempt that failed, but not the stage with it, because it was
    retried or handled by ``on_error``, is an event ``async_pipeline.attempt_failed`` with
    ``async_pipeline.attempt``, ``async_pipeline.retry.delay`` (seconds), ``exception.type`` and
    ``exception.message``. The error that a stage ends with is recorded as an exception, with its traceback,
    on the innermost span alone, where it was raised; the spans around have it as status and ``error.type``.
    A cancellation is not recorded. A :class:`~async_pipeline.DeadlineExceeded` is, on the span of the run;
    the stage that was interrupted has it as ``error.type``.

    **Metrics**, with ``async_pipeline.pipeline.name``:

    ================================== ===================================================================
    ``async_pipeline.run.duration``    histogram of seconds, by outcome and ``error.type``
    ``async_pipeline.stage.duration``  the same, by ``async_pipeline.stage.name``, too
    ``async_pipeline.stage.retries``   counter of attempts that were retried, by stage and ``error.type``
    ``async_pipeline.active_runs``     up-down counter of runs that have not ended yet
    ================================== ===================================================================

    **Pipelines in pipelines.** One that is instrumented itself is a span ``pipeline INNER`` inside the
    ``stage INNER`` of the outer one; its stages are spans of the outer one alone, and measured for both.

    Args:
        pipeline: any :class:`~async_pipeline.Pipeline`. One that is instrumented already is not observed
            twice: its instrumentation is replaced by this one.
        tracer_provider: by default the global one, also where that is set only later.
        meter_provider: by default the global one, also where that is set only later.

    Raises:
        TypeError: it is no Pipeline.
    """
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"instrument() takes a Pipeline, not {pipeline!r}")
    others = [observer for observer in pipeline.observers if not isinstance(observer, _Observer)]
    return pipeline.replace(observers=[*others, _Observer(tracer_provider, meter_provider)])


class _Observer:
    """Makes spans and metrics of the events of any number of runs at a time."""

    def __init__(
        self, tracer_provider: trace.TracerProvider | None, meter_provider: metrics.MeterProvider | None
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, __version__, tracer_provider)
        self._open: dict[tuple[Any, ...], list[_OpenSpan]] = {}
        meter = metrics.get_meter(_SCOPE, __version__, meter_provider)
        self._run_duration = _durations_of("run", meter)
        self._stage_duration = _durations_of("stage", meter)
        self._retries = meter.create_counter(
            "async_pipeline.stage.retries", unit="{retry}", description="Failed attempts that were retried."
        )
        self._active_runs = meter.create_up_down_counter(
            "async_pipeline.active_runs", unit="{run}", description="Runs that have not ended yet."
        )

    def __call__(self, event: Event) -> None:
        if event.kind == "attempt_failed":
            self._fail_attempt(event)
        elif event.kind == "run_start" or event.kind == "stage_start":
            self._start(event)
        else:
            self._end(event)

    def _start(self, event: Event) -> None:
        if event.stage is None:
            self._active_runs.add(1, _named(event))
        elif _is_told(event):
            return
        name = f"pipeline {event.pipeline}" if event.stage is None else f"stage {event.stage}"
        span = self._tracer.start_span(name, attributes=_attributes_of(event))
        self._open.setdefault(_key_of(event), []).append(_OpenSpan(span, event.stage))

    def _fail_attempt(self, event: Event) -> None:
        if event.will_retry:
            self._retries.add(1, {**_named(event), "error.type": type_of(event.error)})
        opened = self._find(event)
        if opened is not None:
            opened.fail_attempt(event)

    def _end(self, event: Event) -> None:
        try:
            self._measure(event)  # while the span is current, which may become its exemplar
        finally:
            opened = self._find(event)
            if opened is not None:
                self._forget(_key_of(event), opened)
                opened.close(event)

    def _measure(self, event: Event) -> None:
        attributes = {**_named(event), **_outcome_of(event)}
        if event.stage is None:
            self._active_runs.add(-1, _named(event))
            self._run_duration.record(event.duration or 0.0, attributes)
        else:
            self._stage_duration.record(event.duration or 0.0, attributes)

    def _find(self, event: Event) -> "_OpenSpan | None":
        """The span of an event; a middleware may run one stage several times at once, each in its task."""
        spans = self._open.get(_key_of(event))
        if not spans:
            return None
        current = _current()
        return current if current in spans else spans[-1]

    def _forget(self, key: tuple[Any, ...], opened: "_OpenSpan") -> None:
        spans = self._open[key]
        spans.remove(opened)
        if not spans:
            del self._open[key]


class _OpenSpan:
    """The span of a run or a stage that has not ended, current in the context of what runs inside."""

    __slots__ = ("_around", "_failed", "_recorded", "_span", "_token", "stage")

    def __init__(self, span: Span, stage: str | None) -> None:
        self.stage = stage
        self._span = span
        self._around = _current()
        self._failed: tuple[Event, int] | None = None  # the last failed attempt, and when
        self._recorded: tuple[BaseException, ...] = ()  # by spans inside
        self._token: Any = attach(set_value(_OPEN, self, trace.set_span_in_context(span)))

    def fail_attempt(self, event: Event) -> None:
        if self._span.is_recording():
            self._tell_failed_attempt()
            self._failed = event, time_ns()

    def close(self, event: Event) -> None:
        try:
            if self._span.is_recording():
                self._describe(event)
        finally:
            # a coroutine that is thrown away may be closed in another context
            if _current() is self or not isinstance(event.error, GeneratorExit):
                detach(self._token)
            self._span.end()
            # a task that outlives it may hold it by its context: neither errors nor the spans around it
            self._around = self._failed = self._token = None
            self._recorded = ()

    def _describe(self, event: Event) -> None:
        for name, value in _outcome_of(event).items():
            self._span.set_attribute(name, value)
        if event.stage is not None:
            self._span.set_attribute("async_pipeline.attempts", event.attempts or 1)
        error = cast(BaseException, original(event.error))
        has_failed = _has_failed(event)
        if not (has_failed and self._failed is not None and original(self._failed[0].error) is error):
            self._tell_failed_attempt()
        if has_failed:
            self._span.set_status(StatusCode.ERROR, _description(error, event.outcome))
            self._record(error)

    def _tell_failed_attempt(self) -> None:
        """Tell of the attempt before this event, now that it is known not to have been the end."""
        if self._failed is not None:
            event, when = self._failed
            self._span.add_event("async_pipeline.attempt_failed", _failure_of(event), when)

    def _record(self, error: BaseException) -> None:
        """Record what was raised here, and leave alone what a span inside has recorded."""
        if not isinstance(error, _CANCELLATION):
            leaves = _leaves(error)
            if any(all(leaf is not known for known in self._recorded) for leaf in leaves):
                _record(self._span, error)
            around = self._around
            if around is not None and around._token is not None:
                around._recorded = (*leaves, *around._recorded)[:_REMEMBERED]


def _current() -> _OpenSpan | None:
    """The innermost run or stage around, as the context of OpenTelemetry has it."""
    opened: Any = get_value(_OPEN)
    return cast("_OpenSpan | None", opened)


def _is_told(event: Event) -> bool:
    """Tell whether the pipeline around, which is told first, has just opened a span for the same stage."""
    around = _current()
    return around is not None and (around.stage or "").endswith(f"/{event.stage}")


def _key_of(event: Event) -> tuple[Any, ...]:
    return event.run_id, event.stage, event.element


def _named(event: Event) -> dict[str, Any]:
    """What is the same in all runs: the attributes of a metric, and some of those of a span."""
    attributes = {"async_pipeline.pipeline.name": event.pipeline}
    if event.stage is not None:
        attributes["async_pipeline.stage.name"] = event.stage
    return attributes


def _attributes_of(event: Event) -> dict[str, Any]:
    attributes = _named(event)
    if event.item_index is not None:
        attributes["async_pipeline.item.index"] = event.item_index
    if event.element:
        attributes["async_pipeline.element"] = event.element
    return attributes


def _has_failed(event: Event) -> bool:
    return event.outcome not in ("ok", "finished")


def _outcome_of(event: Event) -> dict[str, str]:
    attributes = {"async_pipeline.outcome": str(event.outcome)}
    if _has_failed(event):
        error = original(event.error)
        # inside a run whose time is up, it looks like a cancellation
        is_deadline = event.outcome == "timeout" and isinstance(error, _CANCELLATION)
        attributes["error.type"] = class_name(DeadlineExceeded if is_deadline else type(error))
    return attributes


def _failure_of(event: Event) -> dict[str, Any]:
    error = original(event.error)
    attributes: dict[str, Any] = {"async_pipeline.attempt": event.attempt}
    if event.delay is not None:
        attributes["async_pipeline.retry.delay"] = event.delay
    return {**attributes, "exception.type": class_name(type(error)), "exception.message": _text(error)}


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, which may have come from stages side by side; else the error itself."""
    own = cast(BaseException, original(error))
    if isinstance(own, BaseExceptionGroup):
        return [leaf for part in own.exceptions for leaf in _leaves(part)]
    return [own]


def _text(error: object) -> str:
    try:
        return str(error)
    except Exception:  # an error that can't be shown must not hide that it happened
        return ""


def _description(error: BaseException, outcome: str | None = None) -> str:
    text = _text(error)
    if text or not isinstance(error, _CANCELLATION):
        return text or type(error).__qualname__
    return "the run's timeout is up" if outcome == "timeout" else "cancelled"


def _record(span: Span, error: BaseException) -> None:
    try:
        span.record_exception(error)
    except Exception:  # it can't be shown
        span.add_event("exception", {"exception.type": class_name(type(error))})


def _durations_of(what: str, meter: metrics.Meter) -> metrics.Histogram:
    return meter.create_histogram(
        f"async_pipeline.{what}.duration",
        unit="s",
        description=f"Duration of {what}s.",
        explicit_bucket_boundaries_advisory=_BUCKETS,
    )
