"""Prometheus metrics of runs and stages; needs the extra ``async-pipeline[prometheus]``."""

from functools import cache
from threading import Lock
from weakref import WeakKeyDictionary

from ..events import Event
from ._errors import type_of

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ImportError as _missing:
    raise ImportError(
        "Prometheus support requires installing async-pipeline[prometheus]: "
        "pip install 'async-pipeline[prometheus]'"
    ) from _missing

__all__ = ["PrometheusObserver"]


class PrometheusObserver:
    """Count runs and retries, and measure stages, for Prometheus; one of a pipeline's ``observers``.

    >>> pipeline = Pipeline([fetch, parse], name="weather", observers=[PrometheusObserver()])
    >>> prometheus_client.start_http_server(9000)

    ====================================================================== ================================
    ``async_pipeline_stage_duration_seconds{pipeline,stage,outcome}``      histogram, with all attempts
    ``async_pipeline_runs_total{pipeline,outcome}``                        runs that have ended
    ``async_pipeline_stage_retries_total{pipeline,stage,error_type}``      failed attempts that were retried
    ``async_pipeline_in_flight{pipeline}``                                 runs that have not ended yet
    ====================================================================== ================================

    ``stage`` is the path, like ``enrich/price``; ``outcome`` is ``ok``, ``finished``, ``error``, ``timeout``
    or ``cancelled``; ``error_type`` is the class of the handler's error, like ``OSError`` or
    ``httpx.ConnectError``, or of an attempt whose time was up ``async_pipeline.errors.StageTimeoutError``.
    Each item of ``map`` and ``stream`` is one run. The number of time series depends on the names of
    pipelines, stages and error classes only, so give pipelines names that do not vary.

    Observers of one registry share these metrics, so each pipeline may have one of its own. A pipeline inside
    another one that both have one tells its runs and stages under its own name, too.

    Args:
        registry: where the metrics are registered; by default the global one of ``prometheus_client``.

    Raises:
        ValueError: somebody else has registered a metric of one of these names there.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._metrics = _metrics_in(REGISTRY if registry is None else registry)

    def __call__(self, event: Event) -> None:
        metrics, pipeline, stage = self._metrics, event.pipeline, event.stage
        if event.kind == "stage_end":
            metrics.stage_duration(pipeline, stage, event.outcome).observe(event.duration or 0.0)
        elif event.kind == "attempt_failed":
            if event.will_retry:
                metrics.stage_retries(pipeline, stage, type_of(event.error)).inc()
        elif event.kind == "run_start":
            metrics.in_flight(pipeline).inc()
        elif event.kind == "run_end":
            metrics.in_flight(pipeline).dec()
            metrics.runs(pipeline, event.outcome).inc()


class _Metrics:
    """The metrics of one registry, each as a function from the values of its labels to what counts them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # labels() takes 0.9 µs, as long as what is done with its result
        self.stage_duration = cache(
            Histogram(
                "async_pipeline_stage_duration_seconds",
                "How long stages took, with all their attempts and the sleeps between them.",
                ("pipeline", "stage", "outcome"),
                registry=registry,
            ).labels
        )
        self.runs = cache(
            Counter(
                "async_pipeline_runs_total",
                "Runs that have ended.",
                ("pipeline", "outcome"),
                registry=registry,
            ).labels
        )
        self.stage_retries = cache(
            Counter(
                "async_pipeline_stage_retries_total",
                "Failed attempts that were retried.",
                ("pipeline", "stage", "error_type"),
                registry=registry,
            ).labels
        )
        self.in_flight = cache(
            Gauge(
                "async_pipeline_in_flight",
                "Runs that have started and not ended yet.",
                ("pipeline",),
                registry=registry,
                multiprocess_mode="livesum",  # one number for all worker processes, without those that died
            ).labels
        )


_lock = Lock()
_shared: WeakKeyDictionary[CollectorRegistry, _Metrics] = WeakKeyDictionary()


def _metrics_in(registry: CollectorRegistry) -> _Metrics:
    with _lock:  # a registry takes each name once
        metrics = _shared.get(registry)
        if metrics is None:
            metrics = _shared[registry] = _Metrics(registry)
        return metrics
