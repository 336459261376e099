"""The observer against the text that the real client exposes over HTTP."""

import asyncio
import gc
import importlib.util
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Metric, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from async_pipeline import BatchError, Event, Finish, Pipeline, Stage, each, parallel, telemetry
from async_pipeline.events import EndEvent
from async_pipeline.telemetry.prometheus import PrometheusObserver
from tests.helpers import run_alone, run_virtually

pytestmark = pytest.mark.threads  # that of the server

Scrape = Callable[[], dict[tuple[str, ...], float]]

DURATION = "async_pipeline_stage_duration_seconds"
LABELS = {
    DURATION: {"pipeline", "stage", "outcome"},
    "async_pipeline_runs": {"pipeline", "outcome"},
    "async_pipeline_stage_retries": {"pipeline", "stage", "error_type"},
    "async_pipeline_in_flight": {"pipeline"},
}


class OwnError(Exception):
    pass


class Flaky:
    """Fails at first."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures = failures
        self.error = error

    async def __call__(self, value: Any) -> Any:
        if self.failures > 0:
            self.failures -= 1
            raise self.error
        return value


async def ident(value: Any) -> Any:
    return value


async def bad(value: Any) -> Any:
    raise ValueError(f"secret {value}")


async def forever(value: Any) -> Any:
    await asyncio.get_running_loop().create_future()


async def finish(value: Any) -> Any:
    raise Finish(value)


def strict(error: Exception) -> None:
    raise error


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def watched(registry: CollectorRegistry, *stages: Any, name: str = "p") -> Pipeline[Any, Any]:
    return Pipeline(stages, name=name, observers=[PrometheusObserver(registry)], on_hook_error=strict)


class Current(CollectorRegistry):
    """What the server shows: the registry of the test that runs."""

    test: CollectorRegistry

    def collect(self) -> Iterator[Metric]:
        return iter(self.test.collect())


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Current, str]]:
    current = Current()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=current)
    yield current, f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()  # half a second
    server.server_close()
    thread.join()


@pytest.fixture
def expose(server: tuple[Current, str], registry: CollectorRegistry) -> Callable[[], str]:
    """The text that a Prometheus server would read now."""
    server[0].test = registry

    def read() -> str:
        with urllib.request.urlopen(server[1], timeout=20) as answer:
            return str(answer.read().decode())

    return read


@pytest.fixture
def scrape(expose: Callable[[], str]) -> Scrape:
    """The values in it, by the sample's name and its labels, in the order of their names."""

    def read() -> dict[tuple[str, ...], float]:
        return {
            (
                sample.name.removeprefix("async_pipeline_"),
                *(sample.labels[key] for key in sorted(sample.labels)),
            ): sample.value
            for family in text_string_to_metric_families(expose())
            for sample in family.samples
            if not sample.name.endswith(("_created", "_bucket"))
        }

    return read


async def test_what_is_exposed(registry: CollectorRegistry, scrape: Scrape) -> None:
    flaky = Stage("flaky", Flaky(2, ConnectionError()), retries=2)
    await watched(registry, flaky, Pipeline([ident], name="inner"), name="weather").run(1)
    found = scrape()
    assert found.pop(("stage_duration_seconds_sum", "ok", "weather", "flaky")) >= 0
    assert found.pop(("stage_duration_seconds_sum", "ok", "weather", "inner")) >= 0
    assert found.pop(("stage_duration_seconds_sum", "ok", "weather", "inner/ident")) >= 0
    assert found == {
        ("stage_duration_seconds_count", "ok", "weather", "flaky"): 1,
        ("stage_duration_seconds_count", "ok", "weather", "inner"): 1,
        ("stage_duration_seconds_count", "ok", "weather", "inner/ident"): 1,
        ("runs_total", "ok", "weather"): 1,
        ("stage_retries_total", "ConnectionError", "weather", "flaky"): 2,
        ("in_flight", "weather"): 0,
    }


async def test_names_kinds_and_labels(registry: CollectorRegistry, expose: Callable[[], str]) -> None:
    flaky = Stage("flaky", Flaky(2, ConnectionError("secret")), retries=1)
    await watched(registry, each(flaky)).map([["secret"]], return_exceptions=True)
    text = expose()
    families = {
        family.name: family
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    assert {name: family.type for name, family in families.items()} == {
        DURATION: "histogram",
        "async_pipeline_runs": "counter",
        "async_pipeline_stage_retries": "counter",
        "async_pipeline_in_flight": "gauge",
    }
    for name, family in families.items():
        assert family.documentation.endswith(".")
        assert {frozenset(set(sample.labels) - {"le"}) for sample in family.samples} == {
            frozenset(LABELS[name])
        }
    assert "secret" not in text


async def test_ends_are_counted_by_outcome(registry: CollectorRegistry, scrape: Scrape) -> None:
    await watched(registry, ident).map([1, 2])
    await watched(registry, finish, ident).run(1)
    await watched(registry, bad).try_run(1)
    running = asyncio.create_task(watched(registry, forever).run(1))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    found = scrape()
    assert {key: value for key, value in found.items() if not key[0].endswith("_sum")} == {
        ("stage_duration_seconds_count", "ok", "p", "ident"): 2,
        ("stage_duration_seconds_count", "finished", "p", "finish"): 1,
        ("stage_duration_seconds_count", "error", "p", "bad"): 1,
        ("stage_duration_seconds_count", "cancelled", "p", "forever"): 1,
        ("runs_total", "ok", "p"): 2,
        ("runs_total", "finished", "p"): 1,
        ("runs_total", "error", "p"): 1,
        ("runs_total", "cancelled", "p"): 1,
        ("in_flight", "p"): 0,
    }


@pytest.mark.virtual
async def test_seconds_of_the_loops_clock(registry: CollectorRegistry, scrape: Scrape) -> None:
    slow = Stage("slow", asyncio.sleep, timeout=3, retries=1, retry_delay=0.5)
    await watched(registry, slow).try_run(9)
    assert scrape() == {
        ("stage_duration_seconds_count", "timeout", "p", "slow"): 1,
        ("stage_duration_seconds_sum", "timeout", "p", "slow"): 6.5,
        ("runs_total", "timeout", "p"): 1,
        ("stage_retries_total", "async_pipeline.errors.StageTimeoutError", "p", "slow"): 1,
        ("in_flight", "p"): 0,
    }


async def test_a_retry_is_counted_by_the_class_of_the_error(
    registry: CollectorRegistry, scrape: Scrape
) -> None:
    await watched(registry, Stage("own", Flaky(9, OwnError()), retries=2)).try_run(1)
    assert scrape()["stage_retries_total", f"{__name__}.OwnError", "p", "own"] == 2


async def test_a_retried_run_inside_a_handler(registry: CollectorRegistry, scrape: Scrape) -> None:
    inner = Pipeline([bad])

    async def call(value: Any) -> Any:
        return await inner.run(value)

    await watched(registry, Stage("call", call, retries=1)).try_run(1)
    assert scrape()["stage_retries_total", "ValueError", "p", "call"] == 1


async def test_in_flight_is_what_has_not_ended(registry: CollectorRegistry) -> None:
    seen = []

    async def look(value: int) -> None:
        await asyncio.sleep(0)
        seen.append(registry.get_sample_value("async_pipeline_in_flight", {"pipeline": "p"}))
        if value == 2:
            raise ValueError

    pipeline = watched(registry, look)
    await pipeline.map(range(3), 3, return_exceptions=True)
    assert seen == [3, 2, 1]
    with suppress(BatchError):
        await pipeline.map([2, 2, 2], 3)
    running = asyncio.create_task(watched(registry, forever).map(range(3), 3))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (registry.get_sample_value("async_pipeline_in_flight", {"pipeline": "p"}) or 0) > 0
    running.cancel()
    await asyncio.wait([running])
    assert registry.get_sample_value("async_pipeline_in_flight", {"pipeline": "p"}) == 0


async def test_branches_and_elements_count_by_path(registry: CollectorRegistry, scrape: Scrape) -> None:
    await watched(registry, each(ident), parallel(a=len, b=each(ident))).run([1, 2, 3])
    found = scrape()
    counts = {key[3]: value for key, value in found.items() if key[0].endswith("_count")}
    assert counts == {
        "each": 1,
        "each/ident": 3,
        "parallel": 1,
        "parallel/a": 1,
        "parallel/b": 1,
        "parallel/b/ident": 3,
    }


async def test_a_pipeline_inside_another_one(registry: CollectorRegistry, scrape: Scrape) -> None:
    inner = watched(registry, ident, name="inner")
    await watched(registry, inner, name="outer").run(1)
    found = scrape()
    assert {key: value for key, value in found.items() if not key[0].endswith("_sum")} == {
        ("stage_duration_seconds_count", "ok", "outer", "inner"): 1,
        ("stage_duration_seconds_count", "ok", "outer", "inner/ident"): 1,
        ("stage_duration_seconds_count", "ok", "inner", "ident"): 1,
        ("runs_total", "ok", "outer"): 1,
        ("runs_total", "ok", "inner"): 1,
        ("in_flight", "outer"): 0,
        ("in_flight", "inner"): 0,
    }


@settings(max_examples=40, deadline=None)
@given(
    plans=st.lists(st.sampled_from(["ok", "slow", "bad", "late", "finish"]), max_size=12),
    concurrency=st.integers(1, 4),
    timeout=st.sampled_from([None, 3.0]),
    cancel_at=st.sampled_from([None, 1.5]),
    keep_going=st.booleans(),
)
def test_the_counts_are_those_of_the_events(
    plans: list[str], concurrency: int, timeout: float | None, cancel_at: float | None, keep_going: bool
) -> None:
    events: list[Event] = []
    registry = CollectorRegistry()

    async def act(plan: str) -> str:
        if plan == "bad":
            raise ValueError
        if plan == "finish":
            raise Finish
        await asyncio.sleep({"slow": 1, "late": 9}.get(plan, 0))
        return plan

    pipeline = watched(registry, ident, Stage("act", act, timeout=5, retries=1))
    pipeline = pipeline.replace(observers=[*pipeline.observers, events.append])

    async def main() -> None:
        with suppress(BatchError, TimeoutError):
            async with asyncio.timeout(cancel_at):
                await pipeline.map(plans, concurrency, return_exceptions=keep_going, timeout=timeout)

    run_virtually(main())
    for outcome in ("ok", "error", "timeout", "cancelled", "finished"):
        runs = [event for event in events if event.kind == "run_end" and event.outcome == outcome]
        labels = {"pipeline": "p", "outcome": outcome}
        assert (registry.get_sample_value("async_pipeline_runs_total", labels) or 0) == len(runs)
        stages = [event for event in events if (event.stage, event.outcome) == ("act", outcome)]
        counted = registry.get_sample_value(f"{DURATION}_count", {**labels, "stage": "act"}) or 0
        assert counted == len(stages)
    retries = sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "async_pipeline_stage_retries_total"
    )
    assert retries == sum(bool(event.will_retry) for event in events)
    assert not registry.get_sample_value("async_pipeline_in_flight", {"pipeline": "p"})


class TestRegistry:
    async def test_is_shared_by_several_observers(self, registry: CollectorRegistry, scrape: Scrape) -> None:
        await watched(registry, ident).run(1)
        await watched(registry, ident).run(1)
        await watched(registry, ident, name="q").run(1)
        found = scrape()
        assert found["runs_total", "ok", "p"] == 2
        assert found["runs_total", "ok", "q"] == 1

    async def test_others_are_apart(self, registry: CollectorRegistry) -> None:
        other = CollectorRegistry()
        await watched(registry, ident).run(1)
        await watched(other, ident).run(1)
        labels = {"pipeline": "p", "outcome": "ok"}
        assert registry.get_sample_value("async_pipeline_runs_total", labels) == 1
        assert other.get_sample_value("async_pipeline_runs_total", labels) == 1

    def test_by_default_the_global_one(self) -> None:
        code = """
import asyncio
from prometheus_client import REGISTRY, generate_latest
from async_pipeline import Pipeline
from async_pipeline.telemetry import PrometheusObserver

for _ in range(2):
    asyncio.run(Pipeline([len], observers=[PrometheusObserver()]).run("ab"))
print(generate_latest(REGISTRY).decode())
"""
        done = run_alone(code)
        assert done.returncode == 0, done.stderr
        assert 'async_pipeline_runs_total{outcome="ok",pipeline="pipeline"} 2.0' in done.stdout.splitlines()

    def test_may_be_shared_by_threads_at_once(self) -> None:
        class Slow(CollectorRegistry):
            def register(self, collector: Any) -> None:
                time.sleep(0.01)
                super().register(collector)

        registry = Slow()
        errors = []
        together = threading.Barrier(8)

        def make() -> None:
            together.wait(20)
            try:
                PrometheusObserver(registry)
            except ValueError as error:
                errors.append(error)

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    def test_is_not_kept_alive(self) -> None:
        registry = CollectorRegistry()
        PrometheusObserver(registry)
        gone = weakref.ref(registry)
        del registry
        gc.collect()
        assert gone() is None

    def test_outlives_an_observer(self, registry: CollectorRegistry) -> None:
        end = EndEvent("run_end", 0.0, "00ff", "p", None, None, (), "ok", 1, 0.0, None)
        for _ in range(2):  # and nothing is registered twice
            PrometheusObserver(registry)(end)
            gc.collect()
        labels = {"pipeline": "p", "outcome": "ok"}
        assert registry.get_sample_value("async_pipeline_runs_total", labels) == 2

    def test_a_metric_of_somebody_elses(self, registry: CollectorRegistry) -> None:
        Counter("async_pipeline_runs_total", "Mine.", registry=registry)
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            PrometheusObserver(registry)

    def test_worker_processes_add_up_to_one_number(self, tmp_path: Any) -> None:
        code = """
import asyncio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from async_pipeline import Pipeline
from async_pipeline.telemetry import PrometheusObserver

async def main():
    def look(value):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry).decode()

    print(await Pipeline([look], observers=[PrometheusObserver()]).run(1))

asyncio.run(main())
"""
        done = run_alone(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert 'async_pipeline_in_flight{pipeline="pipeline"} 1.0' in done.stdout.splitlines()


PROMETHEUS = r"^Prometheus support requires installing async-pipeline\[prometheus\]: pip install "


class TestExtra:
    def test_the_module_says_which_one_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        source: Any = importlib.util.find_spec("async_pipeline.telemetry.prometheus")
        again: Any = importlib.util.spec_from_file_location("async_pipeline.telemetry._again", source.origin)
        with pytest.raises(ImportError, match=PROMETHEUS):
            again.loader.exec_module(importlib.util.module_from_spec(again))

    def test_the_package_says_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "async_pipeline.telemetry.prometheus", None)
        with pytest.raises(ImportError, match=PROMETHEUS):
            telemetry.PrometheusObserver  # noqa: B018


def test_the_buckets_are_the_clients(registry: CollectorRegistry) -> None:
    PrometheusObserver(registry)
    asyncio.run(watched(registry, len).run("ab"))
    bounds = [
        sample.labels["le"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"{DURATION}_bucket"
    ]
    assert [float(bound) for bound in bounds] == [*prometheus_client.Histogram.DEFAULT_BUCKETS]
