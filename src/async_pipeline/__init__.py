"""Chain async steps: stages with timeouts and retries, pipelines, and bounded, ordered batches.

>>> pipeline = Pipeline([fetch, parse, save])        # or: fetch | parse | save
>>> await pipeline.run(url)
>>> await pipeline.map(urls, concurrency=20)

A bare ``await`` stands in an ``async def``, or in the shell that ``python -m asyncio`` opens.

Besides the names below there are modules: ``jobs`` (runs that outlive the call that asks for them),
``journal`` (batches that survive a crash), ``engine`` and ``integrations`` (other machines, FastAPI),
``middlewares``, ``telemetry`` and ``testing``: ``from async_pipeline.jobs import JobRunner``.
"""

import importlib as _importlib
import typing as _typing

from .context import item_key
from .errors import (
    BatchError,
    CircuitOpenError,
    DeadlineExceeded,
    DeadlockError,
    DuplicateJob,
    EngineError,
    Finish,
    JobNotFound,
    JobQueueFull,
    JobRunnerClosed,
    JournalBusy,
    JournalError,
    JournalMismatch,
    MissingFieldsError,
    PipelineError,
    RecordedError,
    StageExecutionError,
    StageTimeoutError,
    WorkerLost,
)
from .events import Event, Observer
from .outcome import Outcome
from .pipeline import Pipeline
from .retry import RetryBudget
from .stage import BackoffMode, Stage, staged
from .steps import branch, each, fallback, keep, parallel, require
from .types import AfterStageHook, BeforeStageHook, Middleware

__all__ = [
    "AfterStageHook",
    "BackoffMode",
    "BatchError",
    "BeforeStageHook",
    "CircuitOpenError",
    "DeadlineExceeded",
    "DeadlockError",
    "DuplicateJob",
    "EngineError",
    "Event",
    "Finish",
    "JobNotFound",
    "JobQueueFull",
    "JobRunnerClosed",
    "JournalBusy",
    "JournalError",
    "JournalMismatch",
    "Middleware",
    "MissingFieldsError",
    "Observer",
    "Outcome",
    "Pipeline",
    "PipelineError",
    "RecordedError",
    "RetryBudget",
    "Stage",
    "StageExecutionError",
    "StageTimeoutError",
    "WorkerLost",
    "branch",
    "each",
    "fallback",
    "item_key",
    "keep",
    "parallel",
    "require",
    "staged",
]

__version__ = "2.0.0"

_MODULES = ("engine", "integrations", "jobs", "journal", "middlewares", "telemetry", "testing")

if not _typing.TYPE_CHECKING:  # or a checker would believe in every name

    def __getattr__(name: str) -> object:
        # import async_pipeline; async_pipeline.jobs.JobRunner() - nothing of it is loaded before
        if name in _MODULES:
            return _importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
