"""Chain async steps: stages with timeouts and retries, pipelines, and bounded, ordered batches.

>>> pipeline = Pipeline([fetch, parse, save])        # or: fetch | parse | save
>>> await pipeline.run(url)
>>> await pipeline.map(urls, concurrency=20)
"""

from .errors import (
    BatchError,
    CircuitOpenError,
    DeadlineExceeded,
    DeadlockError,
    DuplicateJob,
    Finish,
    JobNotFound,
    JobQueueFull,
    JobRunnerClosed,
    MissingFieldsError,
    PipelineError,
    StageExecutionError,
    StageTimeoutError,
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
    "Event",
    "Finish",
    "JobNotFound",
    "JobQueueFull",
    "JobRunnerClosed",
    "Middleware",
    "MissingFieldsError",
    "Observer",
    "Outcome",
    "Pipeline",
    "PipelineError",
    "RetryBudget",
    "Stage",
    "StageExecutionError",
    "StageTimeoutError",
    "branch",
    "each",
    "fallback",
    "keep",
    "parallel",
    "require",
    "staged",
]

__version__ = "2.0.0"
