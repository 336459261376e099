"""Chain async steps: stages with timeouts and retries, pipelines, and bounded, ordered batches.

>>> pipeline = Pipeline([fetch, parse, save])        # or: fetch | parse | save
>>> await pipeline.run(url)
>>> await pipeline.map(urls, concurrency=20)
"""

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
