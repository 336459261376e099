"""See every run in the tools that people already have; a name loads its module when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .opentelemetry import OpenTelemetryMiddleware
    from .prometheus import PrometheusObserver
    from .report import ReportRecorder
    from .trace import TraceRecorder

__all__ = ["OpenTelemetryMiddleware", "PrometheusObserver", "ReportRecorder", "TraceRecorder"]

# the module of each name, and what to say where the package that it needs is missing
_SOURCES = {
    "OpenTelemetryMiddleware": (
        "opentelemetry",
        "OpenTelemetry support requires installing async-pipeline[otel]: pip install 'async-pipeline[otel]'",
    ),
    "PrometheusObserver": (
        "prometheus",
        "Prometheus support requires installing async-pipeline[prometheus]: "
        "pip install 'async-pipeline[prometheus]'",
    ),
    "ReportRecorder": ("report", ""),
    "TraceRecorder": ("trace", ""),
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, message = _SOURCES[name]
    try:
        loaded = importlib.import_module(f"{__name__}.{module}")
    except ImportError as error:
        if not message:
            raise
        raise ImportError(message) from error
    return getattr(loaded, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
