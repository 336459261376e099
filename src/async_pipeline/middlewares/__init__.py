"""Ready-made middlewares; a middleware is any ``(next, stage_name, value, context)`` callable."""

from .cache import Cache, CacheMiddleware, MemoryCache
from .circuit_breaker import CircuitBreakerMiddleware
from .logging import LoggingMiddleware
from .retry import RetryMiddleware
from .timeout import TimeoutMiddleware
from .timing import TimingMiddleware

__all__ = [
    "Cache",
    "CacheMiddleware",
    "CircuitBreakerMiddleware",
    "LoggingMiddleware",
    "MemoryCache",
    "RetryMiddleware",
    "TimeoutMiddleware",
    "TimingMiddleware",
]
