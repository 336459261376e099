"""Ready-made middlewares; a middleware is any ``(next, stage_name, value, context)`` callable."""

from .logging import LoggingMiddleware
from .retry import RetryMiddleware
from .timeout import TimeoutMiddleware
from .timing import TimingMiddleware

__all__ = ["LoggingMiddleware", "RetryMiddleware", "TimeoutMiddleware", "TimingMiddleware"]
