"""One batch, nested, failing, retrying, partly cancelled, through all of telemetry: they agree on all."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from async_pipeline import (
    Event,
    Finish,
    Pipeline,
    Stage,
    StageExecutionError,
    __version__,
    each,
    fallback,
    parallel,
)
from async_pipeline.telemetry import PrometheusObserver, ReportRecorder, TraceRecorder
from async_pipeline.telemetry._errors import type_of
from async_pipeline.telemetry.opentelemetry import instrument

ITEMS = 400
NAME = "orders"
TIMEOUT = "async_pipeline.errors.StageTimeoutError"

Counts = Counter[tuple[Any, ...]]


# -- the batch


def gone(item: int) -> None:
    raise OSError("gone")


async def fetch(item: int, context: dict[str, int]) -> int:
    context["attempt"] = context.get("attempt", 0) + 1
    await asyncio.sleep(0.01 * (1 + item % 3))
    if item % 4 == 0 and context["attempt"] == 1:
        raise ConnectionError("reset")
    if item % 11 == 5:
        await Pipeline([gone]).run(item)  # a run of its own; its error is the handler's
    if item % 13 == 7:
        await asyncio.sleep(9)  # too long for an attempt
    return item


async def price(item: int) -> int:
    await asyncio.sleep(0.01)
    if item % 10 == 3:
        raise ValueError("no price")
    return item


async def look_up(item: int) -> list[int]:
    await asyncio.sleep(0.02)
    return [item, item + 1, item + 2]


async def count(part: int) -> int:
    await asyncio.sleep(0.005)
    if part % 17 == 0:
        raise LookupError(part)
    return part


async def finish(value: Any) -> Any:
    if value["price"] % 9 == 2:
        raise Finish("early")
    if value["price"] % 9 == 4:
        await asyncio.sleep(8)  # until the run's deadline
    return value


def batch() -> Pipeline[int, Any]:
    """Its elements, branches and nested pipelines run side by side, fail, are cancelled, and are replaced."""
    stock = Pipeline([look_up, each(fallback(count, Stage("unknown", lambda part: 0)), 2)], name="warehouse")
    saved = Stage("rate", price, on_error=lambda item, error: 0)
    return Pipeline(
        [
            Stage("fetch", fetch, timeout=1.0, retries=2, retry_delay=0.05),
            parallel(price=price, stock=stock, rate=saved),
            Pipeline([Stage("finish", finish)], name="last"),
        ],
        name=NAME,
    )


# -- what each of them counted


def own(path: str | None) -> tuple[str, ...]:
    return () if path is None else (path,)


def kind_of(error: BaseException | None) -> str:
    while isinstance(error, StageExecutionError):
        error = error.original_error
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class OfEvents:
    """The events themselves: what the others have to agree with."""

    def __init__(self, events: list[Event]) -> None:
        ends = [event for event in events if event.outcome is not None]
        self.ends: Counts = Counter((*own(event.stage), event.outcome) for event in ends)
        self.attempts = Counter((event.stage, event.attempts) for event in ends if event.stage)
        failed = [event for event in events if event.kind == "attempt_failed"]
        self.retries: Counts = Counter((e.stage, kind_of(e.error)) for e in failed if e.will_retry)
        self.failed_attempts = len(failed)
        errors = [e.error for e in ends if e.stage is None and e.outcome in ("error", "timeout")]
        self.errors: Counts = Counter(
            (error.stage_name, kind_of(error)) for error in errors if isinstance(error, StageExecutionError)
        )


class OfSpans:
    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self.spans = exporter.get_finished_spans()
        self.ends: Counts = Counter()
        self.attempts: Counts = Counter()
        self.retries: Counts = Counter()
        for span in self.spans:
            about: Any = span.attributes
            stage = about.get("async_pipeline.stage.name")
            self.ends[(*own(stage), about["async_pipeline.outcome"])] += 1
            if stage is not None:
                self.attempts[stage, about["async_pipeline.attempts"]] += 1
            for event in span.events:
                told: Any = event.attributes
                if "async_pipeline.retry.delay" in told:
                    self.retries[stage, told["exception.type"]] += 1


class OfOtelMetrics:
    def __init__(self, reader: InMemoryMetricReader) -> None:
        self.ends: Counts = Counter()
        self.retries: Counts = Counter()
        self.active = 0
        data: Any = reader.get_metrics_data()
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.data.data_points:
                stage = point.attributes.get("async_pipeline.stage.name")
                if metric.name == "async_pipeline.active_runs":
                    self.active += point.value
                elif metric.name == "async_pipeline.stage.retries":
                    self.retries[stage, point.attributes["error.type"]] += point.value
                else:
                    self.ends[(*own(stage), point.attributes["async_pipeline.outcome"])] += point.count


class OfPrometheus:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.ends: Counts = Counter()
        self.retries: Counts = Counter()
        self.in_flight = 0.0
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            for sample in family.samples:
                labels = sample.labels
                if sample.name == "async_pipeline_stage_duration_seconds_count":
                    self.ends[labels["stage"], labels["outcome"]] += int(sample.value)
                elif sample.name == "async_pipeline_runs_total":
                    self.ends[(labels["outcome"],)] += int(sample.value)
                elif sample.name == "async_pipeline_stage_retries_total":
                    self.retries[labels["stage"], labels["error_type"]] += int(sample.value)
                elif sample.name == "async_pipeline_in_flight":
                    self.in_flight += sample.value


class OfTrace:
    def __init__(self, path: Path) -> None:
        entries = json.loads(path.read_text())["traceEvents"]
        self.ends: Counts = Counter()
        self.attempts: Counts = Counter()
        for entry in entries:
            if entry["ph"] == "X":
                stage = () if entry["cat"] == "run" else (entry["name"],)
                self.ends[(*stage, entry["args"]["outcome"])] += 1
                if stage:
                    self.attempts[entry["name"], entry["args"]["attempts"]] += 1
        marks = [entry for entry in entries if entry["ph"] == "i"]
        self.failed_attempts = len(marks)
        self.retries = Counter(mark["args"]["error"] for mark in marks if mark["args"]["will_retry"])


class OfReport(HTMLParser):
    """The numbers that stand on the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._section = ""
        self._rows: list[tuple[str, list[str]]] = []
        self._tile = ""
        self.tiles: dict[str, str] = {}
        self.feed(path.read_text())
        self.ends: Counts = Counter()
        for name, outcomes in self._cells("stages", 0, 2):
            stage = () if name == NAME else (name,)
            for number, outcome in re.findall(r"([\d,]+) (ok|finished|error|timeout|cancelled)\b", outcomes):
                self.ends[(*stage, outcome)] += int(number.replace(",", ""))
        self.retries = self._groups("retries")
        self.errors = self._groups("errors")

    def _groups(self, section: str) -> Counts:
        cells = self._cells(section, 0, 1, 2)
        return Counter(
            {(stage.split()[0], kind): int(number.replace(",", "")) for stage, kind, number in cells}
        )

    def _cells(self, section: str, *columns: int) -> Iterator[Iterable[str]]:
        for where, cells in self._rows:
            if where == section and len(cells) > max(columns) and cells[1] not in ("Type", "Ended"):
                yield tuple(cells[column].strip() for column in columns)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "section":
            self._section = given["id"] or ""
        elif tag == "tr":
            self._rows.append((self._section, []))
        elif tag in ("th", "td") and self._rows:
            self._rows[-1][1].append("")
        self._tile = given.get("id") or "" if tag == "span" else ""

    def handle_endtag(self, tag: str) -> None:
        self._tile = ""

    def handle_data(self, data: str) -> None:
        if self._tile:
            self.tiles[self._tile] = data
        elif self._rows and self._rows[-1][1]:
            self._rows[-1][1][-1] += data


# -- the names of errors


class BrokenError(Exception): ...


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (None, ""),
        (KeyError("a"), "KeyError"),
        (BrokenError(), f"{__name__}.BrokenError"),
        (asyncio.CancelledError(), "asyncio.exceptions.CancelledError"),
        (StageExecutionError("fetch", BrokenError()), f"{__name__}.BrokenError"),
        (StageExecutionError("fetch", StageExecutionError("inner", KeyError())), "KeyError"),
    ],
)
def test_an_error_is_called_by_what_the_handler_raised(error: BaseException | None, name: str) -> None:
    assert type_of(error) == name


# -- the proof


@pytest.mark.virtual
async def test_all_agree_on_every_count(tmp_path: Path) -> None:
    events: list[Event] = []
    exporter, reader, registry = InMemorySpanExporter(), InMemoryMetricReader(), CollectorRegistry()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace, report = TraceRecorder(), ReportRecorder()
    observers = [events.append, PrometheusObserver(registry), trace, report]
    observed = instrument(
        batch().replace(observers=observers),
        tracer_provider=tracers,
        meter_provider=MeterProvider([reader]),
    )
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(12):
            await observed.map(range(ITEMS), 4, return_exceptions=True, timeout=5)
    trace.write(tmp_path / "trace.json")
    report.write(tmp_path / "report.html", observed)

    base, spans = OfEvents(events), OfSpans(exporter)
    otel, prometheus = OfOtelMetrics(reader), OfPrometheus(registry)
    drawn, page = OfTrace(tmp_path / "trace.json"), OfReport(tmp_path / "report.html")

    # it was what it is meant to be
    assert {outcome for *stage, outcome in base.ends if not stage} == {
        "ok",
        "finished",
        "error",
        "timeout",
        "cancelled",
    }
    assert {stage for stage, *_ in base.retries} == {"fetch"}
    assert {kind for _, kind in base.retries} == {"ConnectionError", "OSError", TIMEOUT}
    assert len(base.errors) >= 4
    assert ("parallel/stock/each/fallback/unknown", "ok") in base.ends
    assert ("parallel/stock", "cancelled") in base.ends
    assert ("last/finish", "timeout") in base.ends
    assert sum(number for (*stage, _), number in base.ends.items() if not stage) < ITEMS

    # and all have seen the same
    starts = Counter(event.kind for event in events)
    assert starts["run_start"] == starts["run_end"]
    assert starts["stage_start"] == starts["stage_end"]
    for other in (spans, otel, prometheus, drawn, page):
        assert other.ends == base.ends, type(other).__name__
    for counted in (spans, otel, prometheus, page):
        assert counted.retries == base.retries, type(counted).__name__
    retried: Counter[str] = Counter()
    for (_, kind), number in base.retries.items():
        retried[kind] += number
    assert drawn.retries == retried
    assert spans.attempts == drawn.attempts == base.attempts
    assert drawn.failed_attempts == base.failed_attempts
    assert page.errors == base.errors
    assert int(page.tiles["retried"].replace(",", "")) == sum(base.retries.values())
    assert int(page.tiles["ended"].replace(",", "")) == starts["run_end"]
    assert (otel.active, prometheus.in_flight) == (0, 0)

    # a trace for each run, and nothing left UNSET that did not end well
    traces = {span.context.trace_id for span in spans.spans if span.context is not None}
    assert len(traces) == starts["run_start"]
    for span in spans.spans:
        about: Any = span.attributes
        assert span.instrumentation_scope is not None
        assert span.instrumentation_scope.version == __version__
        assert span.status.is_unset == (about["async_pipeline.outcome"] in ("ok", "finished"))
