"""Keep what stages return, and compute what several calls want at once only once."""

import asyncio
import inspect
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable
from functools import partial
from typing import Any, Protocol

from ..events import check_hook, logger
from ..retry import check_count, check_seconds
from ..stage import raise_cancellation

__all__ = ["Cache", "CacheMiddleware", "MemoryCache"]

_NONE = "async_pipeline: None"  # stands for None in a cache; text, because every codec gives it back
_PENDING: Any = object()


class Cache(Protocol):
    """What :class:`CacheMiddleware` needs of a cache; those of aiocache have it as they are."""

    def get(self, key: Any, /) -> Awaitable[Any]:
        """Return what is stored for the ``key``; ``None`` is a miss."""

    def set(self, key: Any, value: Any, /, *, ttl: Any) -> Awaitable[object]:
        """Store a ``value`` for the ``key``, for ``ttl`` seconds, or for ever if that is ``None``."""


class MemoryCache:
    """At most ``maxsize`` entries in memory; the least recently used one makes room for a new one.

    An entry expires by the clock of the running event loop, and is dropped when it is asked for after
    that. Threads may share one.

    Args:
        maxsize: the number of entries; 1024 by default.

    Raises:
        TypeError, ValueError: at construction, for a wrong ``maxsize``.
    """

    def __init__(self, maxsize: int = 1024) -> None:
        check_count("maxsize", maxsize, least=1, message="maxsize must be at least 1")
        self._maxsize = maxsize
        self._entries: OrderedDict[Any, tuple[Any, float | None]] = OrderedDict()
        self._lock = threading.Lock()

    async def get(self, key: Hashable) -> Any:
        with self._lock:
            value, expires = self._entries.pop(key, (None, None))
            if value is None or (expires is not None and asyncio.get_running_loop().time() >= expires):
                return None
            self._entries[key] = value, expires
            return value

    async def set(self, key: Hashable, value: Any, ttl: float | None = None) -> None:
        expires = None if ttl is None else asyncio.get_running_loop().time() + ttl
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = value, expires
            if len(self._entries) > self._maxsize:
                self._entries.popitem(last=False)

    def __repr__(self) -> str:
        return f"<MemoryCache {len(self._entries)}/{self._maxsize}>"


class CacheMiddleware:
    """Answer a stage from a cache; calls with equal keys that come at once share one computation.

    >>> Pipeline([fetch, parse], middlewares=[CacheMiddleware(ttl=60, stages=["fetch"])])

    It wraps the whole stage with all its attempts and ``on_error``, whose stand-in is cached like any
    other output; raise in it, or raise :class:`~async_pipeline.Finish`, to avoid that. It stands before
    :class:`CircuitBreakerMiddleware` in the list, so that a hit needs no closed circuit.

    Neither an error nor a ``Finish`` is cached. It leaves the one call that computed, and one of those
    that wait takes over, as when that call is cancelled; so calls for a dead service fail one by one.
    An exception of the cache is logged to the logger ``async_pipeline`` and counts as a miss, or as not
    stored; the run goes on. Because ``None`` means a miss, a stage's own ``None`` is stored as a text.

    What a stage does to the context isn't repeated on a hit. A cache in memory hands the same object to
    every run, so don't change it. 1, 1.0 and True are equal keys, and stages of one name share theirs.
    A handler that asks its own pipeline for the same key waits for itself.

    Args:
        cache: what stores the outputs; by default a :class:`MemoryCache` of 1024 entries.
        key: ``(stage_name, value)`` or ``(stage_name, value, context)``, returns what must be equal for
            an output to be used again; by default that is the tuple ``(stage_name, value)``.
        ttl: seconds for which an output is kept; ``None`` (the default) for ever.
        stages: the names of the stages to cache; ``None`` (the default) for all.

    Raises:
        TypeError, ValueError: at construction, for a wrong argument; at a call, for an unhashable key.
    """

    def __init__(
        self,
        cache: Cache | None = None,
        key: Callable[..., Hashable] | None = None,
        ttl: float | None = None,
        stages: Collection[str] | None = None,
    ) -> None:
        self._cache: Cache = MemoryCache() if cache is None else _checked_cache(cache)
        if inspect.iscoroutinefunction(key):
            raise TypeError(f"key must return the key itself; write a def without async, not {key!r}")
        self._key, self._key_wants_context = check_hook("key(stage_name, value)", key)
        if ttl is not None:
            check_seconds("ttl", ttl, zero=False)
        self._ttl = ttl
        self._stages = _checked_names(stages)
        self._flights: dict[tuple[asyncio.AbstractEventLoop, Any], _Flight] = {}

    async def __call__(
        self, next_stage: Callable[[Any], Awaitable[Any]], stage_name: str, value: Any, context: Any
    ) -> Any:
        if self._stages is not None and stage_name not in self._stages:
            return await next_stage(value)
        key = self._key_of(stage_name, value, context)
        loop = asyncio.get_running_loop()
        flight = self._flights.setdefault((loop, key), _Flight())
        turn = flight.join(loop)
        try:
            await turn
            if flight.leader is turn:
                await self._lead(flight, key, stage_name, partial(next_stage, value))
            return flight.output
        finally:
            if flight.leave(turn):
                self._flights.pop((loop, key), None)

    def _key_of(self, stage_name: str, value: Any, context: Any) -> Hashable:
        key: Hashable = (stage_name, value)
        if self._key is not None:
            key = self._key(stage_name, value, *((context,) if self._key_wants_context else ()))
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"the cache needs a hashable key for stage {stage_name!r} ({error}); "
                "pass a key= that returns one: CacheMiddleware(key=lambda stage_name, value: ...)"
            ) from None
        return key

    async def _lead(
        self, flight: "_Flight", key: Hashable, name: str, compute: Callable[[], Awaitable[Any]]
    ) -> None:
        found = None
        try:
            found = await self._cache.get(key)
        except Exception as error:
            raise_cancellation(error)
            logger.exception("The cache could not be asked for stage %r; the run goes on", name)
        if found is not None:
            flight.land(None if isinstance(found, str) and found == _NONE else found)
            return
        output = await compute()
        flight.land(output)
        try:
            await self._cache.set(key, _NONE if output is None else output, ttl=self._ttl)
        except Exception as error:
            raise_cancellation(error)
            logger.exception("The cache could not store the output of stage %r; the run goes on", name)


class _Flight:
    """One computation: its output as soon as there is one, and the turns of all who want it.

    A turn is a future of one call alone, so that a cancellation hits nobody else. It is over when there
    is an output, or when the call has become the leader, who computes it.
    """

    def __init__(self) -> None:
        self.output = _PENDING
        self.leader: asyncio.Future[None] | None = None
        self._turns: dict[asyncio.Future[None], None] = {}  # in the order in which they came

    def join(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        turn: asyncio.Future[None] = loop.create_future()
        self._turns[turn] = None
        if self.leader is None:
            self.leader = turn
        if self.leader is turn or self.output is not _PENDING:
            turn.set_result(None)
        return turn

    def land(self, output: Any) -> None:
        self.output = output
        for turn in self._turns:
            _end(turn)

    def leave(self, turn: asyncio.Future[None]) -> bool:
        """Take a turn out, hand over if it was the leader's, and tell whether the flight ends with it."""
        del self._turns[turn]
        if self.leader is not turn:
            return False
        if self.output is _PENDING:
            # one who was chosen may be cancelled before it runs, and comes here then, too
            self.leader = next((other for other in self._turns if _end(other)), None)
            return self.leader is None
        return True


def _end(turn: asyncio.Future[None]) -> bool:
    if turn.done():  # cancelled, or the leader's own
        return False
    turn.set_result(None)
    return True


def _checked_cache(cache: Any) -> Any:
    if isinstance(cache, type) or not all(callable(getattr(cache, name, None)) for name in ("get", "set")):
        raise TypeError(
            "cache must have the methods async get(key) and async set(key, value, ttl), "
            f"like MemoryCache(), not {cache!r}; of a class, pass an instance"
        )
    return cache


def _checked_names(stages: Any) -> frozenset[str] | None:
    if stages is None:
        return None
    if isinstance(stages, str):
        raise TypeError(f'stages must be a collection of stage names; write stages=["{stages}"]')
    if not isinstance(stages, Collection) or not all(isinstance(name, str) for name in stages):
        raise TypeError(f'stages must be a collection of stage names, like ["fetch"], not {stages!r}')
    return frozenset(stages)
