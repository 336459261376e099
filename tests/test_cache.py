"""The cache around a stage, what it stores in, and the one computation of calls that come at once."""

import asyncio
import logging
import math
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import Finish, Pipeline, Stage, StageExecutionError
from async_pipeline.middlewares import Cache, CacheMiddleware, MemoryCache
from tests.helpers import Meter, run_virtually

settings.register_profile("default", deadline=None)
settings.load_profile("default")


def now() -> float:
    return asyncio.get_running_loop().time()


def pipeline_of(*handlers: Any, with_: Any) -> Pipeline[Any, Any]:
    return Pipeline(list(handlers), middlewares=[with_])


def flights(middleware: CacheMiddleware) -> int:
    return len(middleware._flights)


async def turns(count: int = 5) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


class Store:
    """A cache in a dict that notes its calls, and can be made slow or broken."""

    def __init__(self, get_seconds: float = 0, set_seconds: float = 0) -> None:
        self.entries: dict[Any, Any] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.seconds = {"get": get_seconds, "set": set_seconds}
        self.errors: dict[str, BaseException] = {}

    async def _do(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if self.seconds[name]:
            await asyncio.sleep(self.seconds[name])
        if name in self.errors:
            raise self.errors[name]

    async def get(self, key: Any) -> Any:
        await self._do("get", key)
        return self.entries.get(key)

    async def set(self, key: Any, value: Any, *, ttl: float | None) -> None:
        await self._do("set", key, value, ttl)
        self.entries[key] = value


class Work:
    """A stage whose n-th computation ends as the n-th of ``endings`` says, and later ones with a number."""

    def __init__(self, *endings: BaseException | object, seconds: float = 10) -> None:
        self.endings = list(endings)
        self.seconds = seconds
        self.started: list[float] = []
        self.most = self.in_flight = 0

    async def __call__(self, value: Any) -> Any:
        number = len(self.started)
        self.started.append(now())
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.in_flight -= 1
        ending = self.endings[number] if number < len(self.endings) else number
        if isinstance(ending, BaseException):
            raise ending
        return ending


class TestHits:
    async def test_a_stage_is_computed_once_for_each_value(self) -> None:
        meter = Meter(0)
        pipeline = pipeline_of(Stage("meter", meter), with_=CacheMiddleware())
        assert [await pipeline.run(value) for value in "aabab"] == list("aabab")
        assert meter.started == ["a", "b"]

    async def test_each_stage_has_its_own(self) -> None:
        double, increase = Meter(0), Meter(0)
        pipeline = pipeline_of(Stage("a", double), Stage("b", increase), with_=CacheMiddleware())
        for _ in range(2):
            assert await pipeline.run(1) == 1
        assert (double.started, increase.started) == ([1], [1])

    async def test_stages_of_one_name_share_theirs_and_equal_numbers_are_equal_keys(self) -> None:
        cache = CacheMiddleware()
        await pipeline_of(Stage("a", lambda value: "first"), with_=cache).run(1)
        other = pipeline_of(Stage("a", lambda value: "second"), with_=cache)
        assert [await other.run(value) for value in (1, 1.0, True, 2)] == ["first"] * 3 + ["second"]

    async def test_the_object_in_memory_is_handed_to_every_run(self) -> None:
        pipeline = pipeline_of(Stage("a", lambda value: [value]), with_=CacheMiddleware())
        assert await pipeline.run(1) is await pipeline.run(1)

    async def test_what_a_stage_does_to_the_context_is_not_repeated(self) -> None:
        def note(value: Any, context: Any) -> Any:
            context["seen"] = True
            return value

        pipeline = pipeline_of(note, with_=CacheMiddleware())
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        await pipeline.run(1, context=first)
        await pipeline.run(1, context=second)
        assert (first, second) == ({"seen": True}, {})

    async def test_all_attempts_are_inside(self) -> None:
        failures = iter([LookupError(), LookupError()])

        async def flaky(value: Any) -> Any:
            for error in failures:
                raise error
            return value

        store = Store()
        pipeline = pipeline_of(Stage("flaky", flaky, retries=2), with_=CacheMiddleware(store))
        assert await pipeline.run(1) == 1
        assert store.calls == [("get", ("flaky", 1)), ("set", ("flaky", 1), 1, None)]

    async def test_an_error_is_not_cached(self) -> None:
        work, middleware = Work(LookupError(), "value", seconds=0), CacheMiddleware()
        pipeline = pipeline_of(Stage("work", work), with_=middleware)
        with pytest.raises(StageExecutionError):
            await pipeline.run(1)
        assert [await pipeline.run(1), await pipeline.run(1)] == ["value", "value"]
        assert flights(middleware) == 0

    async def test_finish_is_not_cached(self) -> None:
        work, middleware = Work(Finish("done"), "value", seconds=0), CacheMiddleware()
        with pytest.raises(Finish) as caught:
            await middleware(work, "work", 1, {})
        assert caught.value.value == "done"
        assert flights(middleware) == 0
        assert await middleware(work, "work", 1, {}) == "value"

    @pytest.mark.parametrize("falsy", [0, "", (), False])
    async def test_a_falsy_output_is_a_hit(self, falsy: Any) -> None:
        work, middleware = Work(falsy, seconds=0), CacheMiddleware()
        assert [await middleware(work, "work", 1, {}) for _ in range(2)] == [falsy, falsy]

    async def test_none_is_stored_as_a_text_and_comes_back_as_none(self) -> None:
        store = Store()
        work, middleware = Work(None, seconds=0), CacheMiddleware(store)
        assert [await middleware(work, "work", 1, {}) for _ in range(3)] == [None] * 3
        assert store.entries == {("work", 1): "async_pipeline: None"}
        assert len(work.started) == 1

    async def test_an_output_that_can_not_be_compared_is_a_hit(self) -> None:
        class Array:
            def __eq__(self, other: object) -> bool:
                raise ValueError("ambiguous")

        array = Array()
        work, middleware = Work(array, seconds=0), CacheMiddleware()
        for _ in range(2):
            assert await middleware(work, "work", 1, {}) is array

    @pytest.mark.virtual
    async def test_for_ever_or_for_the_ttl(self) -> None:
        for ttl, seconds, computations in (
            (None, 1e9, 1),
            (60, 59.5, 1),
            (60, 60, 2),
            (Fraction(1, 2), 0.5, 2),
        ):
            work = Work(seconds=0)
            middleware = CacheMiddleware(ttl=ttl)  # type: ignore[arg-type]
            await middleware(work, "work", 1, {})
            await asyncio.sleep(seconds)
            await middleware(work, "work", 1, {})
            assert len(work.started) == computations, ttl

    async def test_the_cache_is_given_the_ttl_by_name(self) -> None:
        store = Store()
        await CacheMiddleware(store, ttl=2.5)(Work(seconds=0), "work", 1, {})
        assert store.calls == [("get", ("work", 1)), ("set", ("work", 1), 0, 2.5)]

    async def test_a_cache_may_be_shared_and_its_positional_ttl_fits_the_protocol(self) -> None:
        cache: Cache = MemoryCache()
        work = Work(seconds=0)
        for _ in range(2):
            await CacheMiddleware(cache)(work, "work", 1, {})
        assert len(work.started) == 1


class TestStages:
    @pytest.mark.parametrize("names", [["b"], ("b",), {"b"}, {"b": 1}, frozenset({"b"})])
    async def test_only_those_named_are_cached(self, names: Any) -> None:
        first, second = Meter(0), Meter(0)
        pipeline = pipeline_of(Stage("a", first), Stage("b", second), with_=CacheMiddleware(stages=names))
        for _ in range(2):
            assert await pipeline.run(1) == 1
        assert (first.started, second.started) == ([1, 1], [1])

    async def test_none_of_them(self) -> None:
        store = Store()
        await CacheMiddleware(store, stages=[])(Work(seconds=0), "work", [], {})
        assert not store.calls

    def test_a_text_is_no_collection_of_names(self) -> None:
        with pytest.raises(TypeError, match=r'^stages must be .*; write stages=\["fetch"\]$'):
            CacheMiddleware(stages="fetch")

    @pytest.mark.parametrize("value", [5, iter(["fetch"]), [1], [Stage("fetch", str)], b"fetch", [["fetch"]]])
    def test_nor_are_these(self, value: Any) -> None:
        with pytest.raises(
            TypeError, match=r'^stages must be a collection of stage names, like \["fetch"\], not '
        ):
            CacheMiddleware(stages=value)


class TestKeys:
    async def test_are_the_stage_and_the_value(self) -> None:
        store = Store()
        await CacheMiddleware(store)(Work(seconds=0), "work", (1, 2), {})
        assert list(store.entries) == [("work", (1, 2))]

    async def test_of_ones_own(self) -> None:
        store = Store()
        middleware = CacheMiddleware(store, key=lambda stage_name, value: f"{stage_name}:{value['id']}")
        await middleware(Work(seconds=0), "work", {"id": 7}, {})
        assert list(store.entries) == ["work:7"]

    async def test_of_ones_own_with_the_context(self) -> None:
        store = Store()

        def key(stage_name: str, value: Any, context: Any) -> Any:
            return context["user"], stage_name, value

        await CacheMiddleware(store, key=key)(Work(seconds=0), "work", 1, {"user": "me"})
        assert list(store.entries) == [("me", "work", 1)]

    def test_one_that_takes_something_else_is_refused_at_construction(self) -> None:
        with pytest.raises(
            TypeError, match=r"^key=<.*> can't be used: it must take key\(stage_name, value\) or "
        ):
            CacheMiddleware(key=lambda value: value)

    def test_one_that_is_async_is_refused_at_construction(self) -> None:
        async def key(stage_name: str, value: Any) -> Any: ...

        with pytest.raises(TypeError, match=r"^key must return the key itself; write a def without async"):
            CacheMiddleware(key=key)  # type: ignore[arg-type]

    def test_one_that_is_no_callable(self) -> None:
        with pytest.raises(TypeError, match=r"^key must be a callable, not 'id'$"):
            CacheMiddleware(key="id")  # type: ignore[arg-type]

    async def test_an_unhashable_one_names_the_parameter(self) -> None:
        def unhashable(stage_name: str, value: Any) -> Any:
            return {}

        middleware = CacheMiddleware()
        message = (
            r"^the cache needs a hashable key for stage 'fetch' \(.*unhashable type: 'dict'.*\); "
            r"pass a key= that returns one: CacheMiddleware\(key=lambda stage_name, value: \.\.\.\)$"
        )
        with pytest.raises(TypeError, match=message):
            await pipeline_of(Stage("fetch", str), with_=middleware).run({})
        with pytest.raises(TypeError, match=message):
            await CacheMiddleware(key=unhashable)(Work(), "fetch", 1, {})

    async def test_an_error_of_the_function_leaves_as_it_is(self) -> None:
        error = LookupError()

        def key(stage_name: str, value: Any) -> Any:
            raise error

        middleware = CacheMiddleware(key=key)
        with pytest.raises(LookupError) as caught:
            await middleware(Work(), "work", 1, {})
        assert caught.value is error
        assert flights(middleware) == 0


class TestCaches:
    @pytest.mark.parametrize(
        "value", [{}, object(), MemoryCache, "redis://", type("A", (), {"get": 1, "set": 1})()]
    )
    def test_what_is_none_is_refused_at_construction(self, value: Any) -> None:
        with pytest.raises(
            TypeError, match=r"^cache must have the methods async get\(key\) and .* MemoryCache\(\)"
        ):
            CacheMiddleware(value)

    @pytest.mark.parametrize("value", [0, -1, True, math.nan, math.inf])
    def test_a_wrong_ttl(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^ttl must be "):
            CacheMiddleware(ttl=value)
        with pytest.raises(TypeError, match=r"^ttl must be a number of seconds"):
            CacheMiddleware(ttl="60")  # type: ignore[arg-type]

    async def test_an_error_of_get_is_logged_and_a_miss(self, caplog: pytest.LogCaptureFixture) -> None:
        store = Store()
        store.errors["get"] = ConnectionError("down")
        work, middleware = Work("first", "second", seconds=0), CacheMiddleware(store)
        assert [await middleware(work, "work", 1, {}) for _ in range(2)] == ["first", "second"]
        assert caplog.record_tuples == 2 * [
            (
                "async_pipeline",
                logging.ERROR,
                "The cache could not be asked for stage 'work'; the run goes on",
            )
        ]
        assert "ConnectionError: down" in caplog.text
        assert store.entries == {("work", 1): "second"}

    async def test_an_error_of_set_is_logged_and_not_stored(self, caplog: pytest.LogCaptureFixture) -> None:
        store = Store()
        store.errors["set"] = ConnectionError("down")
        work, middleware = Work("first", "second", seconds=0), CacheMiddleware(store)
        assert [await middleware(work, "work", 1, {}) for _ in range(2)] == ["first", "second"]
        assert caplog.messages == 2 * [
            "The cache could not store the output of stage 'work'; the run goes on"
        ]
        assert "ConnectionError: down" in caplog.text
        assert flights(middleware) == 0

    @pytest.mark.parametrize("name", ["get", "set"])
    async def test_a_cancellation_in_it_is_one(self, name: str) -> None:
        store = Store()
        store.errors[name] = asyncio.CancelledError()
        middleware = CacheMiddleware(store)
        with pytest.raises(asyncio.CancelledError):
            await middleware(Work(seconds=0), "work", 1, {})
        assert flights(middleware) == 0

    @pytest.mark.parametrize("name", ["get", "set"])
    async def test_a_cancellation_of_which_it_makes_an_error_is_one(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Converting(Store):
            async def _do(self, called: str, *args: Any) -> None:
                if called == name:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        raise ConnectionError("gone") from None

        work, middleware = Work(seconds=0), CacheMiddleware(Converting())
        task = asyncio.ensure_future(middleware(work, "work", 1, {}))
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(work.started) == (name == "set")
        assert flights(middleware) == 0
        assert not caplog.records


@pytest.mark.virtual
class TestCallsAtOnce:
    @pytest.fixture(autouse=True)
    def _middleware(self) -> Iterator[None]:
        """Each test's own middleware, in the table of which nothing may be left."""
        self.store = Store(get_seconds=1, set_seconds=5)
        self.middleware = CacheMiddleware(self.store)
        yield
        assert flights(self.middleware) == 0

    def call(self, work: Callable[[Any], Any], value: Any = 1) -> asyncio.Task[Any]:
        """Start a call, and return the task that ends with the output and the time of it."""

        async def main() -> tuple[Any, float]:
            return await self.middleware(work, "work", value, {}), now()

        return asyncio.ensure_future(main())

    def names(self) -> list[str]:
        return [call[0] for call in self.store.calls]

    async def test_with_equal_keys_share_get_computation_and_set(self) -> None:
        work = Work("value")
        tasks = [self.call(work) for _ in range(5)]
        await asyncio.sleep(3)
        tasks.append(self.call(work))
        results = await asyncio.gather(*tasks)
        assert [output for output, _ in results] == ["value"] * 6
        assert work.started == [1]
        assert self.names() == ["get", "set"]

    async def test_with_other_keys_do_not_wait_for_each_other(self) -> None:
        work = Work(seconds=10)
        await asyncio.gather(*(self.call(work, value) for value in range(5)))
        assert work.most == 5
        assert now() == 16

    async def test_have_the_value_while_the_first_still_stores_it(self) -> None:
        work = Work("value")
        first, second = self.call(work), self.call(work)
        await asyncio.sleep(13)
        assert second.done()
        third = self.call(work)
        assert await third == ("value", 13)
        assert await second == ("value", 11)
        assert await first == ("value", 16)
        assert self.names() == ["get", "set"]

    async def test_have_a_hit_at_once(self) -> None:
        self.store.entries["work", 1] = "stored"
        work = Work()
        assert await asyncio.gather(*(self.call(work) for _ in range(3))) == [("stored", 1)] * 3
        assert self.names() == ["get"]
        assert not work.started

    async def test_have_none_of_a_hit_and_of_a_computation(self) -> None:
        work = Work(None)
        for _ in range(2):
            results = await asyncio.gather(*(self.call(work) for _ in range(3)))
            assert [output for output, _ in results] == [None] * 3
        assert len(work.started) == 1

    async def test_one_that_fails_keeps_its_error_and_one_of_the_others_takes_over(self) -> None:
        errors = [LookupError("first"), LookupError("second")]
        work = Work(*errors, "value")
        results: list[Any] = await asyncio.gather(
            *(self.call(work) for _ in range(5)), return_exceptions=True
        )
        assert results[:2] == errors
        assert [result[0] for result in results[2:]] == ["value"] * 3
        assert work.started == [1, 12, 23]
        assert work.most == 1
        assert self.store.entries == {("work", 1): "value"}

    async def test_one_that_comes_after_a_failure_waits_with_the_others(self) -> None:
        work = Work(LookupError(), "value")
        first, second = self.call(work), self.call(work)
        await asyncio.sleep(15)
        third = self.call(work)
        with pytest.raises(LookupError):
            await first
        assert await second == ("value", 27)
        assert await third == ("value", 22)
        assert len(work.started) == 2

    async def test_a_cancelled_one_hands_over(self) -> None:
        work = Work("never", "value")
        first, second, third = (self.call(work) for _ in range(3))
        await asyncio.sleep(5)
        first.cancel()
        assert await second == ("value", 21)
        assert await third == ("value", 16)
        assert first.cancelled()
        assert work.started == [1, 6]

    async def test_one_cancelled_in_get_hands_over(self) -> None:
        work = Work("value")
        first, second = self.call(work), self.call(work)
        await asyncio.sleep(0.5)
        first.cancel()
        assert await second == ("value", 16.5)
        assert self.names() == ["get", "get", "set"]

    async def test_one_cancelled_in_set_takes_the_value_from_nobody(self) -> None:
        work = Work("value", "other")
        first, second = self.call(work), self.call(work)
        await asyncio.sleep(13)
        first.cancel()
        assert await second == ("value", 11)
        await turns()
        assert flights(self.middleware) == 0
        assert (await self.call(work))[0] == "other"

    async def test_finish_is_for_the_one_that_raised_it(self) -> None:
        finish = Finish("done")
        work = Work(finish, "value")
        tasks = [self.call(work) for _ in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results == [finish, ("value", 27), ("value", 22)]
        assert self.store.entries == {("work", 1): "value"}

    async def test_a_cancelled_waiter_disturbs_nobody(self) -> None:
        work = Work("value")
        first, second, third = (self.call(work) for _ in range(3))
        await asyncio.sleep(5)
        second.cancel()
        assert await third == ("value", 11)
        assert await first == ("value", 16)
        assert second.cancelled()
        assert len(work.started) == 1

    async def test_a_waiter_with_a_timeout_of_its_own_goes_alone(self) -> None:
        work = Work("value")
        first = self.call(work)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await self.call(work)
        assert await first == ("value", 16)

    async def test_one_cancelled_between_being_chosen_and_running_hands_over(self) -> None:
        work = Work("never", "value")
        first, second, third = (self.call(work) for _ in range(3))
        await asyncio.sleep(5)
        first.cancel()
        await asyncio.sleep(0)
        assert first.cancelled()
        assert self.names() == ["get"]  # the second has not run yet
        second.cancel()
        assert (await third)[0] == "value"
        assert second.cancelled()
        assert work.most == 1

    async def test_one_cancelled_between_having_the_value_and_running_disturbs_nobody(self) -> None:
        async def work(value: Any) -> Any:
            await asyncio.sleep(10)
            asyncio.get_running_loop().call_soon(second.cancel)  # before the second is woken
            return "value"

        first, second, third = (self.call(work) for _ in range(3))
        assert (await third)[0] == "value"
        assert (await first)[0] == "value"
        assert second.cancelled()

    async def test_all_cancelled_together_leave_nothing(self) -> None:
        work = Work("value")
        tasks = [self.call(work) for _ in range(5)]
        await asyncio.sleep(5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert len(work.started) == 1
        assert flights(self.middleware) == 0

    async def test_all_that_fail_do_so_one_by_one(self) -> None:
        work = Work(*(LookupError(number) for number in range(5)))
        results = await asyncio.gather(*(self.call(work) for _ in range(5)), return_exceptions=True)
        assert [str(error) for error in results] == list("01234")
        assert work.started == [1, 12, 23, 34, 45]

    async def test_make_no_task(self) -> None:
        work = Work("value")
        made: list[Any] = []
        loop = asyncio.get_running_loop()
        tasks = [self.call(work) for _ in range(3)]
        loop.set_task_factory(lambda loop, coroutine, **options: made.append(coroutine))  # type: ignore[arg-type]
        try:
            for task in tasks:
                await task
        finally:
            loop.set_task_factory(None)
        assert not made

    async def test_that_are_thrown_away_leave_nothing(self) -> None:
        work = Work("value")
        first = self.middleware(work, "work", 1, {})
        second = self.middleware(work, "work", 1, {})
        first.send(None)
        second.send(None)
        second.close()
        assert flights(self.middleware) == 1
        first.close()

    async def test_in_a_batch_compute_each_value_once(self) -> None:
        meter = Meter(1)
        pipeline = Pipeline([Stage("meter", meter)], middlewares=[self.middleware])
        assert await pipeline.map([1, 2, 1, 2] * 25, 20) == [1, 2, 1, 2] * 25
        assert sorted(meter.started) == [1, 2]


@pytest.mark.threads
def test_event_loops_in_two_threads_have_a_computation_each() -> None:
    store = Store()
    middleware = CacheMiddleware(store)
    both = threading.Barrier(2, timeout=10)
    outputs: dict[str, list[Any]] = {}

    def run(name: str) -> None:
        async def work(value: Any) -> Any:
            await asyncio.sleep(0)  # a thread may be so quick that the next line never suspends
            await asyncio.to_thread(both.wait)  # the other loop's computation must have begun, too
            return name

        async def main() -> list[Any]:
            return await asyncio.gather(*(middleware(work, "work", 1, {}) for _ in range(10)))

        outputs[name] = asyncio.run(main())

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outputs == {"a": ["a"] * 10, "b": ["b"] * 10}
    assert sorted(call[0] for call in store.calls) == ["get", "get", "set", "set"]
    assert flights(middleware) == 0


@dataclass
class Caller:
    """A call of a random schedule, and what its own computation does if it is the one to compute."""

    number: int
    key: int
    arrives: float
    seconds: float
    ending: str  # ok, error, finish or cancel: raise CancelledError without having been asked
    cancelled_at: float | None
    cancelled_after_turns: int
    entered: bool = False
    error: BaseException = field(default_factory=lambda: LookupError())


instants = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 4.0])
callers = st.builds(
    Caller,
    st.just(0),
    st.integers(0, 1),
    instants,
    instants,
    st.sampled_from(["ok", "ok", "error", "finish", "cancel"]),
    st.none() | instants,
    st.integers(0, 6),
)
ERRORS = {"error": LookupError, "finish": Finish, "cancel": asyncio.CancelledError}


@settings(max_examples=400)
@given(st.lists(callers, min_size=1, max_size=10), st.integers(0, 999), st.booleans())
def test_any_schedule_has_one_computation_at_a_time_and_an_end_for_every_call(
    schedule: list[Caller], seed: int, cache_may_fail: bool
) -> None:
    async def main() -> None:
        # not drawn from Hypothesis, whose way to end an example early is an exception that a task would keep
        chance = random.Random(seed)
        store, running, stored = MemoryCache(), set[int](), set[int]()

        class Flaky:
            async def get(self, key: Any) -> Any:
                await self._wait()
                return await store.get(key)

            async def set(self, key: Any, value: Any, ttl: float | None) -> None:
                await self._wait()
                await store.set(key, value, ttl)
                stored.add(key[1])

            async def _wait(self) -> None:
                for _ in range(chance.choice([0, 0, 1, 2])):
                    await asyncio.sleep(chance.choice([0, 1]))
                if cache_may_fail and chance.random() < 0.3:
                    raise ConnectionError

        middleware = CacheMiddleware(Flaky())

        async def call(caller: Caller) -> Any:
            async def compute(value: Any) -> Any:
                assert value not in running, "two computations of one key at once"
                assert cache_may_fail or value not in stored, "computed again, though it was stored"
                running.add(value)
                caller.entered = True
                try:
                    await asyncio.sleep(caller.seconds)
                finally:
                    running.remove(value)
                if caller.ending in ERRORS:
                    caller.error = ERRORS[caller.ending]()
                    raise caller.error
                return value, caller.number

            await asyncio.sleep(caller.arrives)
            return await middleware(compute, "work", caller.key, {})

        async def cancel(caller: Caller, task: asyncio.Task[Any]) -> None:
            assert caller.cancelled_at is not None
            await asyncio.sleep(caller.arrives + caller.cancelled_at)
            await turns(caller.cancelled_after_turns)
            if task.cancel():
                cancelled.add(caller.number)

        cancelled: set[int] = set()
        tasks = [asyncio.ensure_future(call(caller)) for caller in schedule]
        cancellers = [
            cancel(c, t) for c, t in zip(schedule, tasks, strict=True) if c.cancelled_at is not None
        ]
        await asyncio.gather(*cancellers)
        await asyncio.wait(tasks)
        assert flights(middleware) == 0
        for caller, task in zip(schedule, tasks, strict=True):
            if task.cancelled():
                assert caller.number in cancelled or (caller.entered and caller.ending == "cancel")
            elif error := task.exception():
                assert error is caller.error
                assert caller.entered
            else:
                key, number = task.result()
                assert key == caller.key
                assert schedule[number].entered
                assert schedule[number].ending == "ok"

    for number, caller in enumerate(schedule):
        caller.number, caller.entered = number, False
    logging.disable(logging.ERROR)
    try:
        run_virtually(main())
    finally:
        logging.disable(logging.NOTSET)


class TestMemory:
    @pytest.mark.virtual
    async def test_keeps_for_ever_or_for_the_ttl(self) -> None:
        cache = MemoryCache()
        await cache.set("for ever", 1)
        await cache.set("for long", 2, ttl=10)
        await asyncio.sleep(9.5)
        assert [await cache.get(key) for key in ("for ever", "for long", "never")] == [1, 2, None]
        await asyncio.sleep(0.5)
        assert [await cache.get(key) for key in ("for ever", "for long", "never")] == [1, None, None]

    async def test_get_refreshes_and_the_least_recently_used_makes_room(self) -> None:
        cache = MemoryCache(maxsize=2)
        await cache.set("a", 1)
        await cache.set("b", 2)
        await cache.get("a")
        await cache.set("c", 3)
        assert [await cache.get(key) for key in "abc"] == [1, None, 3]

    async def test_set_refreshes_too(self) -> None:
        cache = MemoryCache(maxsize=2)
        for key in "abac":
            await cache.set(key, key)
        assert [await cache.get(key) for key in "abc"] == ["a", None, "c"]

    async def test_holds_1024_by_default(self) -> None:
        cache = MemoryCache()
        for number in range(1025):
            await cache.set(number, number)
        assert await cache.get(0) is None
        assert await cache.get(1) == 1

    @pytest.mark.virtual
    async def test_the_repr_shows_how_full_it_is(self) -> None:
        cache = MemoryCache(maxsize=2)
        assert repr(cache) == "<MemoryCache 0/2>"
        await cache.set("a", 1, ttl=1)
        await cache.set("b", 1)
        assert repr(cache) == "<MemoryCache 2/2>"
        await asyncio.sleep(1)
        await cache.get("a")
        assert repr(cache) == "<MemoryCache 1/2>"

    @pytest.mark.parametrize("value", [0, -1, True, math.inf])
    def test_a_wrong_size(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^maxsize must be at least 1"):
            MemoryCache(value)
        with pytest.raises(TypeError, match=r"^maxsize must be an int"):
            MemoryCache(maxsize="1024")  # type: ignore[arg-type]

    @pytest.mark.threads
    def test_a_get_hides_the_entry_from_no_other_thread(self) -> None:
        cache = MemoryCache()
        found: list[Any] = []
        other = threading.Thread(target=lambda: found.append(asyncio.run(cache.get("a"))))

        class Interrupted(asyncio.SelectorEventLoop):
            def time(self) -> float:
                if armed and other.ident is None:  # in the middle of the get below
                    other.start()
                    other.join(0.05)
                return super().time()

        async def main() -> None:
            await cache.set("a", 1, ttl=3600)
            armed.append(True)
            found.append(await cache.get("a"))
            armed.clear()

        armed: list[bool] = []
        with asyncio.Runner(loop_factory=Interrupted) as runner:
            runner.run(main())
        other.join(10)
        assert found == [1, 1]


operations = st.one_of(
    st.tuples(st.just("get"), st.integers(0, 5)),
    st.tuples(st.just("set"), st.integers(0, 5), st.none() | st.integers(1, 4)),
    st.tuples(st.just("wait"), st.integers(1, 3)),
)


@given(st.lists(operations, max_size=60), st.integers(1, 4))
def test_memory_does_what_a_dict_with_expiry_in_order_of_use_does(sequence: list[Any], maxsize: int) -> None:
    async def main() -> None:
        cache = MemoryCache(maxsize)
        model: OrderedDict[int, tuple[int, float]] = OrderedDict()
        for number, (name, *args) in enumerate(sequence):
            if name == "wait":
                await asyncio.sleep(args[0])
            elif name == "set":
                key, ttl = args
                await cache.set(key, number, ttl)
                model[key] = number, now() + (math.inf if ttl is None else ttl)
                model.move_to_end(key)
                while len(model) > maxsize:
                    del model[next(iter(model))]
            else:
                (key,) = args
                expected = None
                if key in model and model[key][1] <= now():
                    del model[key]
                elif key in model:
                    expected = model[key][0]
                    model.move_to_end(key)
                assert await cache.get(key) == expected
            assert repr(cache) == f"<MemoryCache {len(model)}/{maxsize}>"

    run_virtually(main())
