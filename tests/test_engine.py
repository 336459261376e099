"""Batches over an engine: which rules hold whatever the engine does, and what an engine may do wrong.

The engine of these tests runs in this process. Its workers are simulated: what is in flight in one of them
dies together.
"""

import asyncio
import json
import logging
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from math import nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    DeadlineExceeded,
    EngineError,
    Event,
    Finish,
    Outcome,
    Pipeline,
    PipelineError,
    RecordedError,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    WorkerLost,
    branch,
    each,
    fallback,
    item_key,
    parallel,
)
from async_pipeline.engine import Chunk, Completion, EngineStep, run_chunk
from async_pipeline.journal import Journal
from tests.helpers import Source, run_virtually

variable: ContextVar[str] = ContextVar("variable", default="unset")


class Batch:
    """What an engine knows of one batch."""

    def __init__(self) -> None:
        self.completions: asyncio.Queue[Any] = asyncio.Queue()
        self.in_flight: dict[str, asyncio.Task[None]] = {}


class FakeEngine:
    """Runs chunks in this process.

    Args:
        delay: seconds from a chunk's end to its completion.
        poison: the items whose worker dies of them.
        workers: how many there are; a chunk whose worker has died twice is a :class:`WorkerLost`.
        noise: whether completions come twice, and others of chunks that nobody knows.
    """

    def __init__(
        self,
        *,
        chunk_size: int = 3,
        window: int = 2,
        run_id: str | None = None,
        delay: Callable[[Chunk], float] | None = None,
        poison: frozenset[Any] = frozenset(),
        workers: int = 2,
        seed: int = 0,
        noise: bool = False,
    ) -> None:
        self.chunk_size = chunk_size
        self.window = window
        self.run_id = run_id
        self.delay = delay
        self.poison = poison
        self.noise = noise
        self.random = random.Random(seed)
        self.workers: list[set[asyncio.Event]] = [set() for _ in range(workers)]
        self.chunks: list[Chunk] = []  # all that were submitted
        self.most = 0  # in flight
        self.batches: dict[str, Batch] = {}
        self.closed: list[str] = []

    def batch(self, name: str) -> Batch:
        return self.batches.setdefault(name, Batch())

    async def submit(self, chunk: Chunk) -> None:
        batch = self.batch(chunk.batch)
        assert chunk.id not in batch.in_flight
        self.chunks.append(chunk)
        batch.in_flight[chunk.id] = asyncio.create_task(self._see_through(chunk, batch))
        self.most = max(self.most, len(batch.in_flight))

    async def _see_through(self, chunk: Chunk, batch: Batch) -> None:
        await asyncio.sleep(0)  # an eager task would end before submit knows it
        completion = await self.run(chunk)
        if self.delay is not None:
            await asyncio.sleep(self.delay(chunk))
        del batch.in_flight[chunk.id]
        for each_one in [completion] * (1 + self.noise):
            batch.completions.put_nowait(each_one)
            if self.noise:
                batch.completions.put_nowait(Completion("of another client", "{}"))

    async def run(self, chunk: Chunk) -> Any:
        items = json.loads(chunk.payload)["items"]
        for _ in range(2):
            reply = asyncio.create_task(run_chunk(chunk.pipeline, chunk.payload))
            died = asyncio.Event()
            dying = asyncio.create_task(died.wait())
            worker = self.random.choice(self.workers)
            worker.add(died)
            try:
                if self.poison.intersection(map(str, items)):
                    await asyncio.sleep(0.01)
                    for other in worker:
                        other.set()
                await asyncio.wait({reply, dying}, return_when="FIRST_COMPLETED")
            finally:
                worker.discard(died)
                reply.cancel()
                dying.cancel()
                await asyncio.wait({reply, dying})
            if not died.is_set():
                return Completion(chunk.id, reply.result())
        return Completion(chunk.id, error=WorkerLost())

    async def completed(self, batch: str) -> AsyncGenerator[Completion, None]:
        completions = self.batch(batch).completions
        while True:
            yield await completions.get()

    async def aclose(self, batch: str) -> None:
        self.closed.append(batch)
        in_flight = list(self.batches.pop(batch, Batch()).in_flight.values())
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)

    def __repr__(self) -> str:
        return "<FakeEngine>"


async def double(value: Any) -> Any:
    await asyncio.sleep(0)
    return value * 2


doubling = Pipeline([double], name="doubling")


def numbers_of(chunk: Chunk) -> list[Any]:
    items: list[Any] = json.loads(chunk.payload)["items"]
    return items


def own_text(error: BaseException | None) -> str:
    assert error is not None
    return str(error)


# -- the results


class TestResults:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7, 20])
    async def test_stand_in_input_order(self, count: int) -> None:
        engine = FakeEngine()
        assert await doubling.map(range(count), engine=engine) == [2 * item for item in range(count)]
        assert [
            numbers_of(chunk) for chunk in sorted(engine.chunks, key=lambda chunk: numbers_of(chunk))
        ] == [list(range(start, min(start + 3, count))) for start in range(0, count, 3)]
        assert [chunk.size for chunk in engine.chunks] == [len(numbers_of(chunk)) for chunk in engine.chunks]
        assert len(engine.closed) == 1
        assert engine.batches == {}

    @given(
        count=st.integers(0, 25),
        chunk_size=st.integers(1, 6),
        window=st.integers(1, 4),
        concurrency=st.integers(1, 4),
        workers=st.integers(1, 3),
        poison=st.frozensets(st.integers(0, 24), max_size=3),
        failing=st.frozensets(st.integers(0, 24), max_size=3),
        unfit=st.frozensets(st.integers(0, 24), max_size=2),
        noise=st.booleans(),
        seed=st.integers(0, 1000),
        how=st.sampled_from(["map", "ordered", "unordered", "least buffer"]),
    )
    @settings(max_examples=150, deadline=None)
    def test_each_item_ends_once_as_what_it_is(
        self,
        count: int,
        chunk_size: int,
        window: int,
        concurrency: int,
        workers: int,
        poison: frozenset[int],
        failing: frozenset[int],
        unfit: frozenset[int],
        noise: bool,
        seed: int,
        how: str,
    ) -> None:
        """Whatever the sizes and the order, and although all that shares a worker with a poison item dies."""
        noises = random.Random(seed)
        engine = FakeEngine(
            chunk_size=chunk_size,
            window=window,
            poison=frozenset(map(str, poison)),
            workers=workers,
            seed=seed,
            noise=noise,
            delay=lambda chunk: noises.random(),
        )

        async def handler(value: int) -> str:
            await asyncio.sleep(noises.random() / 100)
            if value in failing:
                raise KeyError(value)
            return f"<{value}>"

        pipeline = Pipeline([handler])
        items = [{value} if value in unfit else value for value in range(count)]

        async def main() -> list[Outcome[Any]]:
            if how == "map":
                options: Any = {"engine": engine, "return_exceptions": True}
                results: list[Any] = await pipeline.map(items, concurrency, **options)
                return [
                    Outcome(index, items[index], None, result)
                    if isinstance(result, Exception)
                    else Outcome(index, items[index], result)
                    for index, result in enumerate(results)
                ]
            stream = pipeline.stream(
                items,
                concurrency,
                engine=engine,
                ordered=how != "unordered",
                buffer=chunk_size if how == "least buffer" else None,
            )
            async with stream as opened:
                return [outcome async for outcome in opened.outcomes()]

        outcomes = run_virtually(main())
        if how == "unordered":
            outcomes = sorted(outcomes, key=lambda outcome: outcome.index or 0)
        assert [outcome.index for outcome in outcomes] == list(range(count))
        for value, outcome in enumerate(outcomes):
            error: Any = outcome.error
            if value in unfit:
                assert type(error) is TypeError
            elif value in poison:
                assert type(error) is StageExecutionError
                assert type(error.original_error) is WorkerLost
                assert (error.stage_name, error.item_index, error.item) == ("pipeline", value, value)
            elif value in failing:
                assert repr(error.original_error) == f"KeyError({value})"
                assert (error.stage_name, error.item_index, error.item) == ("handler", value, value)
            else:
                assert (error, outcome.value) == (None, f"<{value}>")
        assert engine.most <= window
        assert engine.batches == {}

    async def test_two_batches_share_an_engine(self) -> None:
        engine = FakeEngine(run_id="one", delay=lambda chunk: 0.01)
        lists = await asyncio.gather(*(doubling.map(range(count), engine=engine) for count in (10, 8, 10)))
        assert lists == [[2 * item for item in range(count)] for count in (10, 8, 10)]
        assert len(set(engine.closed)) == 3

    async def test_a_chunk_waits_for_no_more_items_than_there_are(self) -> None:
        """An async source whose end is known late."""
        engine = FakeEngine(chunk_size=4)
        assert await doubling.map(Source(range(6), 0.001), engine=engine) == [0, 2, 4, 6, 8, 10]
        assert sorted(chunk.size for chunk in engine.chunks) == [2, 4]

    async def test_concurrency_is_that_inside_a_chunk(self) -> None:
        running = most = 0

        async def handler(value: int) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return value

        pipeline = Pipeline([handler])
        assert await pipeline.map(range(30), 4, engine=FakeEngine(chunk_size=10, window=1)) == [*range(30)]
        assert most == 4
        most = 0
        assert await pipeline.map(range(30), 4, engine=FakeEngine(chunk_size=10, window=2)) == [*range(30)]
        assert most == 8

    async def test_progress_counts_the_items(self) -> None:
        told: list[Any] = []
        await doubling.map(range(7), engine=FakeEngine(), progress=lambda *counts: told.append(counts))
        assert told[-1] == (7, 0, 7)


class TestMap:
    async def test_the_first_failure_cancels_the_rest(self) -> None:
        engine = FakeEngine(chunk_size=2, delay=lambda chunk: 0.0 if 0 in numbers_of(chunk) else 60.0)

        def handler(value: int) -> int:
            return 6 // value

        with pytest.raises(BatchError) as raised:
            await Pipeline([handler]).map(range(40), engine=engine)
        assert list(raised.value.failures) == [0]
        assert raised.value.results in ({}, {1: 6})
        assert engine.batches == {}
        assert len(engine.chunks) <= 4

    async def test_failures_stand_in_their_places(self) -> None:
        def handler(value: int) -> int:
            return 6 // value

        results: list[Any] = await Pipeline([handler]).map(
            range(4), engine=FakeEngine(), return_exceptions=True
        )
        assert results[1:] == [6, 3, 2]
        assert repr(results[0].original_error).startswith("ZeroDivisionError(")
        assert results[0].__cause__ is results[0].original_error
        assert (results[0].item_index, results[0].item) == (0, 0)
        assert "in handler" in results[0].__cause__.__notes__[0]


class TestStream:
    async def test_yields_while_others_run(self) -> None:
        engine = FakeEngine(chunk_size=2, window=2)
        seen: list[Any] = []
        pulled: list[int] = []

        def source() -> Iterator[int]:
            for item in range(1_000_000):
                pulled.append(item)
                yield item

        async with doubling.stream(source(), engine=engine) as results:
            async for value in results:
                seen.append(value)
                if value == 20:
                    break
        assert seen == list(range(0, 21, 2))
        assert len(pulled) <= 11 + 2 * 4
        assert engine.batches == {}

    async def test_ordered_and_as_they_finish(self) -> None:
        def slow_first(chunk: Chunk) -> float:
            return 0.02 if 0 in numbers_of(chunk) else 0.0

        async with doubling.stream(range(6), engine=FakeEngine(delay=slow_first)) as results:
            assert [value async for value in results] == [0, 2, 4, 6, 8, 10]
        async with doubling.stream(range(6), engine=FakeEngine(delay=slow_first), ordered=False) as results:
            assert [value async for value in results] == [6, 8, 10, 0, 2, 4]

    async def test_a_failed_item_is_raised_in_its_turn(self) -> None:
        engine = FakeEngine(chunk_size=1)
        seen: list[Any] = []

        def handler(value: int) -> float:
            return 6 / (value - 3)

        with pytest.raises(StageExecutionError) as raised:
            async with Pipeline([handler]).stream(range(9), engine=engine) as results:
                async for value in results:
                    seen.append(value)
        assert (len(seen), raised.value.item_index) == (3, 3)
        assert engine.batches == {}

    async def test_an_outcome_has_the_context_of_the_worker(self) -> None:
        def handler(value: int, context: dict[str, Any]) -> int:
            context["seen"] = value
            if value == 1:
                del context["given"]
            if value == 2:
                context["unfit"] = {1}
                context[3] = "no text"  # type: ignore[index]
            if value == 3:
                raise ValueError
            return value

        given_context = {"given": [1]}
        async with Pipeline([handler]).stream(
            range(4), context=given_context, engine=FakeEngine()
        ) as results:
            contexts = [outcome.context async for outcome in results.outcomes()]
        assert contexts[:2] == [{"given": [1], "seen": 0}, {"seen": 1}]
        assert contexts[2]["seen"] == 2
        assert "unfit" not in contexts[2]
        assert contexts[3] == {"given": [1], "seen": 3}
        assert given_context == {"given": [1]}

    async def test_an_unchanged_context_is_what_it_was(self) -> None:
        async with doubling.stream(range(2), context={"given": (1,)}, engine=FakeEngine()) as results:
            assert [outcome.context async for outcome in results.outcomes()] == [{"given": (1,)}] * 2

    async def test_a_buffer_holds_a_chunk_at_least(self) -> None:
        with pytest.raises(ValueError, match=r"buffer must be at least the engine's chunk_size, 3, not 2"):
            doubling.stream(range(9), engine=FakeEngine(), buffer=2)
        for ordered in (True, False):
            stream = doubling.stream(range(9), engine=FakeEngine(), buffer=3, ordered=ordered)
            async with stream as results:
                assert [value async for value in results] == list(range(0, 18, 2))

    async def test_one_that_is_never_entered_leaves_nothing(self) -> None:
        engine = FakeEngine()
        doubling.stream(range(9), engine=engine)
        assert (engine.closed, engine.batches) == ([], {})


class TestSources:
    async def test_a_failing_one_is_raised_as_itself(self) -> None:
        engine = FakeEngine()

        def source() -> Iterator[int]:
            yield from range(5)
            raise OSError("the disk")

        with pytest.raises(OSError, match="the disk"):
            await doubling.map(source(), engine=engine)
        assert engine.batches == {}
        seen = []
        with pytest.raises(OSError, match="the disk"):
            async with doubling.stream(source(), engine=engine) as results:
                async for value in results:
                    seen.append(value)
        assert seen == [0, 2, 4, 6, 8]
        assert engine.batches == {}

    async def test_an_endless_async_one_is_closed(self) -> None:
        def endless() -> Iterator[int]:
            while True:
                yield 1

        source, engine = Source(endless()), FakeEngine()
        async with doubling.stream(source, engine=engine) as results:
            async for _ in results:
                break
        assert source.closed
        assert len(source.tasks) == 1
        assert source.pulled < 30
        assert engine.batches == {}

    async def test_a_generator_is_closed(self) -> None:
        closed = []

        def source() -> Iterator[int]:
            try:
                while True:
                    yield 0
            finally:
                closed.append(True)

        with pytest.raises(BatchError):
            await Pipeline([lambda value: 1 // value], name="p").map(source(), engine=FakeEngine())
        assert closed == [True]


# -- the end before the end


class TestCancellation:
    @pytest.mark.virtual
    @pytest.mark.parametrize("how", ["map", "stream"])
    @pytest.mark.parametrize("poison", [frozenset(), frozenset({"4"})], ids=["", "poison"])
    async def test_at_every_await_leaves_nothing(self, how: str, poison: frozenset[Any]) -> None:
        async def by_stream(engine: FakeEngine) -> None:
            async with doubling.stream(Source(range(9)), engine=engine) as results:
                async for _ in results.outcomes():
                    pass

        turns = 0
        ended = False
        while not ended:
            engine = FakeEngine(poison=poison)
            if how == "map":
                work: Any = doubling.map(Source(range(9)), engine=engine, return_exceptions=True)
            else:
                work = by_stream(engine)
            task = asyncio.ensure_future(work)
            for _ in range(turns):
                await asyncio.sleep(0.0 if turns < 60 else 0.0005)
            ended = task.done()
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() != ended
            assert engine.batches == {}
            assert asyncio.all_tasks() == {asyncio.current_task()}
            turns += 1
        assert turns > 5

    async def test_of_a_submit_that_hangs(self) -> None:
        cancelled = []

        class Hanging(FakeEngine):
            async def submit(self, chunk: Chunk) -> None:
                self.batch(chunk.batch)
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.append(chunk.size)

        engine = Hanging()
        task = asyncio.ensure_future(doubling.map(range(9), engine=engine))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled == [3, 3]  # as many as fit into the window
        assert engine.batches == {}

    async def test_waits_for_aclose(self) -> None:
        class Slow(FakeEngine):
            async def aclose(self, batch: str) -> None:
                await asyncio.sleep(0.02)
                await super().aclose(batch)

        engine = Slow(delay=lambda chunk: 60.0)
        task = asyncio.ensure_future(doubling.map(range(9), engine=engine))
        for _ in range(3):  # the third one comes while it waits
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.batches == {}
        assert len(engine.closed) == 1

    async def test_an_item_that_is_cancelled_by_itself(self) -> None:
        """A stray cancellation in a worker is that item's error, as in a local batch."""

        async def handler(value: int) -> int:
            if value == 1:
                raise asyncio.CancelledError("stray")
            return value

        results: list[Any] = await Pipeline([handler]).map(
            range(3), engine=FakeEngine(), return_exceptions=True
        )
        assert (results[0], results[2]) == (0, 2)
        assert repr(results[1].original_error) == "CancelledError('stray')"
        assert results[1].stage_name == "handler"

    async def test_a_cancelled_hook_is_that_items_error(self) -> None:
        def hook(name: str, value: int) -> None:
            if value == 1:
                raise asyncio.CancelledError

        results: list[Any] = await doubling.replace(before_stage=hook).map(
            range(3), engine=FakeEngine(), return_exceptions=True
        )
        assert (results[0], results[2]) == (0, 4)
        assert isinstance(results[1].original_error, asyncio.CancelledError)


# -- what is not JSON


class TestData:
    @pytest.mark.parametrize("unfit", [{1}, nan, object(), b"1", [float("inf")]], ids=repr)
    async def test_an_item_that_is_not_json_fails_alone(self, unfit: Any) -> None:
        engine = FakeEngine()
        results: list[Any] = await doubling.map([0, unfit, 2, 3], engine=engine, return_exceptions=True)
        assert [results[place] for place in (0, 2, 3)] == [0, 4, 6]
        assert type(results[1]) is TypeError
        assert own_text(results[1]).startswith("item 1, which is to travel to a worker, is not JSON: ")
        assert sorted(chunk.size for chunk in engine.chunks) == [1, 2]

    async def test_a_chunk_of_nothing_is_not_sent(self) -> None:
        engine = FakeEngine(chunk_size=1)
        results: list[Any] = await doubling.map([{1}, 1], engine=engine, return_exceptions=True)
        assert results[1] == 2
        assert len(engine.chunks) == 1

    @pytest.mark.parametrize("unfit", [{1}, nan, object(), b"1"], ids=repr)
    async def test_a_result_that_is_not_json_fails_alone(self, unfit: Any) -> None:
        pipeline = Pipeline([lambda value: unfit if value == 1 else value], name="p")
        results: list[Any] = await pipeline.map(range(4), engine=FakeEngine(), return_exceptions=True)
        assert [results[place] for place in (0, 2, 3)] == [0, 2, 3]
        assert type(results[1]) is TypeError
        assert "the result, which" in own_text(results[1])
        assert "is to travel to the client, is not JSON" in own_text(results[1])

    @pytest.mark.parametrize("context", [[], 1, {"a": {1}}, {"a": nan}, {(1,): 2}, type("D", (dict,), {})()])
    async def test_a_context_that_is_not_json_fails_the_call(self, context: Any) -> None:
        engine = FakeEngine()
        with pytest.raises(TypeError, match=r"context"):
            await doubling.map(range(4), context=context, engine=engine)
        with pytest.raises(TypeError, match=r"context"):
            doubling.stream(range(4), context=context, engine=engine)
        assert engine.chunks == []

    async def test_text_of_every_kind_travels(self) -> None:
        items = ["", "é", "\ud800", '"', "\u2028", "\x00", "𝄞", {"ключ": None}]
        assert await Pipeline([lambda value: [value]], name="p").map(items, engine=FakeEngine()) == [
            [item] for item in items
        ]


# -- the names of chunks


class TestChunks:
    async def ids_of(self, pipeline: Pipeline[Any, Any], items: Any, run_id: str, **options: Any) -> set[str]:
        engine = FakeEngine(run_id=run_id)
        await pipeline.map(items, engine=engine, **options)
        assert {chunk.pipeline for chunk in engine.chunks} == {pipeline}
        assert len({chunk.batch for chunk in engine.chunks}) == 1
        return {chunk.id for chunk in engine.chunks}

    async def test_are_called_the_same_when_all_is_the_same(self) -> None:
        ids = await self.ids_of(doubling, range(9), "nightly")
        assert len(ids) == 3
        assert all(re.fullmatch(r"nightly\.[036]\.[0-9a-f]{32}", name) for name in ids)
        assert await self.ids_of(doubling, [*range(9)], "nightly") == ids
        assert await self.ids_of(doubling, range(9), "nightly", concurrency=2) == ids
        assert await self.ids_of(doubling, range(9), "nightly", context=None) == ids
        with_context = await self.ids_of(doubling, range(9), "nightly", context={"a": 1, "b": 2})
        assert await self.ids_of(doubling, range(9), "nightly", context={"b": 2, "a": 1}) == with_context

    async def test_are_called_otherwise_when_anything_differs(self) -> None:
        ids = await self.ids_of(doubling, range(9), "nightly")
        other = doubling.replace(stages=[Stage("other", double)])
        for found in (
            await self.ids_of(doubling, range(9), "weekly"),
            await self.ids_of(other, range(9), "nightly"),
            await self.ids_of(doubling, range(9), "nightly", context={"a": 1}),
            await self.ids_of(doubling, [str(item) for item in range(9)], "nightly"),
            await self.ids_of(doubling, range(1, 10), "nightly"),
        ):
            assert not ids & found
        assert len(ids & await self.ids_of(doubling, range(8), "nightly")) == 2  # the last one is shorter

    async def test_a_run_id_becomes_ascii(self) -> None:
        assert all(name.startswith("a_b_-__.") for name in await self.ids_of(doubling, range(3), "a b/-é_"))

    async def test_each_call_has_a_run_id_of_its_own(self) -> None:
        engine = FakeEngine()
        for _ in range(2):
            await doubling.map(range(3), engine=engine)
        assert len({chunk.id for chunk in engine.chunks}) == 2
        assert len({chunk.batch for chunk in engine.chunks}) == 2

    async def test_handlers_have_a_stable_key(self) -> None:
        def handler(value: int, context: dict[str, Any]) -> str | None:
            return item_key()

        for _ in range(2):
            keys = await Pipeline([handler]).map(range(4), engine=FakeEngine(run_id="nightly/é"))
            assert keys == [f"nightly/é/{index}" for index in range(4)]
        assert item_key() is None
        one, two = [await Pipeline([handler]).map(range(2), engine=FakeEngine()) for _ in range(2)]
        assert not set(one) & set(two)

    async def test_a_batch_inside_an_item_has_keys_of_its_own(self) -> None:
        told: list[Any] = []
        inner = Pipeline(
            [lambda value: item_key()],
            name="inner",
            before_stage=lambda name, value: told.append(value),
        )

        async def handler(value: int) -> list[Any]:
            return await inner.map(range(2), engine=FakeEngine(run_id="inner"))

        results = await Pipeline([handler]).map(range(1), engine=FakeEngine(run_id="outer"))
        assert results == [["inner/0", "inner/1"]]
        assert told == [0, 1]


# -- workers that die


class TestWorkersThatDie:
    @pytest.mark.virtual
    async def test_a_poison_item_fails_alone(self) -> None:
        engine = FakeEngine(chunk_size=10, window=4, workers=1, poison=frozenset({"17"}))
        results: list[Any] = await doubling.map(range(60), engine=engine, return_exceptions=True)
        error = results.pop(17)
        assert results == [2 * item for item in range(60) if item != 17]
        assert (error.stage_name, error.item_index, error.item) == ("doubling", 17, 17)
        assert type(error.original_error) is WorkerLost
        assert error.__cause__ is error.original_error
        alone = [chunk for chunk in engine.chunks if chunk.id.endswith(".alone")]
        assert [17] in [numbers_of(chunk) for chunk in alone]
        assert {chunk.size for chunk in alone} == {1}

    @pytest.mark.virtual
    async def test_the_last_try_of_an_item_is_made_alone(self) -> None:
        """Or an innocent one that has shared a worker with two poison items would fail, too."""
        in_flight: list[int] = []

        class Watched(FakeEngine):
            async def submit(self, chunk: Chunk) -> None:
                await super().submit(chunk)
                if chunk.id.endswith(".alone"):
                    in_flight.append(len(self.batches[chunk.batch].in_flight))

        engine = Watched(chunk_size=2, window=5, workers=1, poison=frozenset({"3", "9"}))
        results: list[Any] = await doubling.map(range(20), engine=engine, return_exceptions=True)
        assert [place for place, result in enumerate(results) if isinstance(result, Exception)] == [3, 9]
        assert len(in_flight) >= 2
        assert set(in_flight) == {1}
        assert engine.most == 5

    @pytest.mark.virtual
    async def test_an_item_that_fails_alone_has_its_own_error(self) -> None:
        class Shy(FakeEngine):
            async def run(self, chunk: Chunk) -> Any:
                if chunk.id.endswith(".alone"):
                    return await super().run(chunk)
                return Completion(chunk.id, error=WorkerLost("died"))

        results: list[Any] = await Pipeline([lambda value: 1 // value], name="p").map(
            range(2), engine=Shy(), return_exceptions=True
        )
        assert isinstance(results[0].original_error, ZeroDivisionError)
        assert results[1] == 1


# -- answers from before


class Earlier(FakeEngine):
    """Has seen the first tries of all chunks already."""

    def __init__(self, earlier: list[Callable[[Chunk, str], Completion]], **options: Any) -> None:
        super().__init__(**options)
        self.earlier = earlier
        self.tries: Counter[Any] = Counter()

    async def run(self, chunk: Chunk) -> Any:
        numbers = str(numbers_of(chunk))
        self.tries[numbers] += 1
        completion = await super().run(chunk)
        if self.tries[numbers] <= len(self.earlier):
            return self.earlier[self.tries[numbers] - 1](chunk, completion.reply)
        return completion


class TestAnswersFromBefore:
    async def test_what_succeeded_is_taken_and_what_failed_runs_again(self) -> None:
        failures = [1, 1]
        runs: Counter[int] = Counter()

        def handler(value: int) -> int:
            runs[value] += 1
            if value == 1 and failures:
                failures.pop()
                raise ValueError("at first")
            return value * 10

        engine = Earlier(
            [lambda chunk, reply: Completion(chunk.id, reply, is_earlier=True)], run_id="r", chunk_size=3
        )
        results: list[Any] = await Pipeline([handler]).map(range(3), engine=engine, return_exceptions=True)
        assert (results[0], results[2]) == (0, 20)
        # the one that failed runs again by itself: what the first answer of that says is earlier, too
        assert runs == {0: 1, 1: 3, 2: 1}
        assert results[1] == 10
        first, second, third = (chunk.id for chunk in engine.chunks)
        assert first.count(".") == 2
        assert second.endswith(".1")
        assert third.endswith(".2")

    async def test_an_earlier_error_of_the_engine_is_tried_again(self) -> None:
        engine = Earlier(
            [lambda chunk, reply: Completion(chunk.id, error=EngineError("old"), is_earlier=True)] * 2
        )
        assert await doubling.map(range(5), engine=engine) == [0, 2, 4, 6, 8]
        assert {chunk.id.count(".") for chunk in engine.chunks} == {2, 3}

    async def test_an_earlier_loss_is_tried_again_alone(self) -> None:
        def lost(chunk: Chunk, reply: str) -> Completion:
            return Completion(chunk.id, error=WorkerLost("old"), is_earlier=True)

        engine = Earlier([lost] * 3, chunk_size=2)
        assert await doubling.map(range(4), engine=engine) == [0, 2, 4, 6]
        ends = {chunk.id.split(".", 3)[3] for chunk in engine.chunks if chunk.id.count(".") > 2}
        assert ends == {"alone", "alone.1", "alone.2"}

    async def test_an_earlier_failure_alone_runs_again(self) -> None:
        def lost(chunk: Chunk, reply: str) -> Completion:
            return Completion(chunk.id, error=WorkerLost("new"))

        def failed(chunk: Chunk, reply: str) -> Completion:
            return Completion(chunk.id, reply, is_earlier=True)

        attempts = []

        def handler(value: int) -> int:
            attempts.append(value)
            if len(attempts) <= 2:
                raise ValueError
            return value

        engine = Earlier([lost, failed], chunk_size=1)
        assert await Pipeline([handler]).map([7], engine=engine) == [7]
        assert len(attempts) == 3


# -- engines that fail


class TestEnginesThatFail:
    async def fails(self, engine: Any, match: str, pipeline: Pipeline[Any, Any] = doubling) -> EngineError:
        """Check that a batch fails as a whole, by ``map`` and by ``stream``."""
        for return_exceptions in (False, True):
            with pytest.raises(EngineError, match=match) as raised:
                await pipeline.map(range(20), engine=engine, return_exceptions=return_exceptions)
            assert engine.batches == {}
        with pytest.raises(EngineError, match=match):
            async with pipeline.stream(range(20), engine=engine) as results:
                async for _ in results.outcomes():
                    pass
        assert engine.batches == {}
        assert isinstance(raised.value, PipelineError)
        return raised.value

    @pytest.mark.parametrize(
        ("error", "match"),
        [
            (EngineError("the broker is down"), "^the broker is down$"),
            (OSError("no route"), r"^the engine has failed: OSError\('no route'\)$"),
            (asyncio.CancelledError("theirs"), r"^the engine has failed: CancelledError\('theirs'\)$"),
        ],
        ids=["EngineError", "OSError", "CancelledError"],
    )
    @pytest.mark.parametrize("where", ["submit", "second submit", "completed", "completion", "later"])
    async def test_a_batch_fails_with_them(self, error: BaseException, match: str, where: str) -> None:
        class Failing(FakeEngine):
            async def submit(self, chunk: Chunk) -> None:
                self.batch(chunk.batch)
                if where == "submit" or (where == "second submit" and 0 not in numbers_of(chunk)):
                    raise error
                await super().submit(chunk)

            async def run(self, chunk: Chunk) -> Any:
                if where == "completion":
                    wrong: Any = error
                    return Completion(chunk.id, error=wrong)
                return await super().run(chunk)

            async def completed(self, batch: str) -> AsyncGenerator[Completion, None]:
                if where == "completed":
                    raise error
                async for completion in super().completed(batch):
                    if where == "later":
                        raise error
                    yield completion

        raised = await self.fails(Failing(), match)
        assert raised is error or raised.__cause__ is error

    async def test_one_that_yields_nothing_more(self) -> None:
        class Ending(FakeEngine):
            async def completed(self, batch: str) -> AsyncGenerator[Completion, None]:
                self.batch(batch)
                nothing: list[Completion] = []
                for completion in nothing:
                    yield completion

        await self.fails(Ending(), "^<FakeEngine> yields nothing more, but the batch has not ended$")

    async def test_one_whose_completed_is_no_iterator(self) -> None:
        class Wrong(FakeEngine):
            def completed(self, batch: str) -> Any:
                self.batch(batch)
                return 5

        await self.fails(Wrong(), "the engine has failed")

    @pytest.mark.parametrize(
        "reply",
        [
            None,
            "",
            "nonsense",
            "[]",
            "5",
            "{}",
            '{"values":[]}',
            '{"values":[1],"time":0}',
            '{"values":[1,2,3,4],"time":0}',
            '{"values":[1,2,3]}',
            '{"values":[1,2,3],"time":"now"}',
            '{"values":5,"time":0}',
            '{"values":[1,2,3],"time":0,"errors":[]}',
            '{"values":[1,2,3],"time":0,"errors":{"0":{}}}',
            '{"values":[1,2,3],"time":0,"errors":{"0":"text"}}',
            '{"values":[1,2,3],"time":0,"errors":{"0":{"type":5}}}',
            '{"values":[1,2,3],"time":0,"contexts":5}',
        ],
    )
    async def test_one_whose_answers_are_nonsense(self, reply: str | None) -> None:
        class Garbled(FakeEngine):
            async def run(self, chunk: Chunk) -> Any:
                return Completion(chunk.id, reply)

        await self.fails(Garbled(), "^<FakeEngine> gave an answer that can't be read: ")

    async def test_one_whose_completions_are_nonsense(self) -> None:
        class Garbled(FakeEngine):
            async def run(self, chunk: Chunk) -> Any:
                return "done"

        await self.fails(Garbled(), "the engine has failed: AttributeError")

    async def test_one_that_fails_while_a_chunk_is_being_filled(self) -> None:
        class Failing(FakeEngine):
            async def completed(self, batch: str) -> AsyncGenerator[Completion, None]:
                async for completion in super().completed(batch):
                    yield completion
                    raise EngineError("down")

        source = Source(range(100), 0.001)
        with pytest.raises(EngineError, match="down"):
            await doubling.map(source, engine=Failing(chunk_size=2))
        assert source.closed
        assert source.pulled < 100

    async def test_items_that_still_come_fail_as_well(self) -> None:
        """The source goes on although the engine has failed, as it hides its cancellation."""
        engine: Any = FakeEngine()
        step = EngineStep(doubling, engine, 5, None, None)
        async with step._opened():
            waiting = asyncio.ensure_future(step._run_item(0, {}, 0, None))
            await asyncio.sleep(0)
            step._fail(EngineError("down"))
            for item in (waiting, step._run_item(1, {}, 1, None)):
                with pytest.raises(EngineError, match="down"):
                    await item
            step._source_ended(1)
            await asyncio.sleep(0)
            assert all(carrier.done() for carrier in step._carriers)
        assert engine.chunks == []

    @pytest.mark.parametrize("how", ["aclose", "cancelled"])
    async def test_one_that_can_not_forget_is_logged(
        self, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Unforgetting(FakeEngine):
            async def aclose(self, batch: str) -> None:
                await super().aclose(batch)
                raise asyncio.CancelledError if how == "cancelled" else OSError("gone")

        with caplog.at_level(logging.ERROR, "async_pipeline"):
            assert await doubling.map(range(4), engine=Unforgetting()) == [0, 2, 4, 6]
        if how == "aclose":
            (record,) = caplog.records
            assert record.getMessage() == "<FakeEngine> could not forget a batch"
            assert record.exc_info is not None
            assert repr(record.exc_info[1]) == "OSError('gone')"

    async def test_the_error_of_a_handler_is_no_failure_of_the_engine(self) -> None:
        def handler(value: int) -> int:
            raise EngineError("of another one")

        results: list[Any] = await Pipeline([handler]).map(
            range(2), engine=FakeEngine(), return_exceptions=True
        )
        assert [type(result.original_error) for result in results] == [EngineError] * 2


# -- wrong arguments


def engine_with(option: str, value: Any) -> FakeEngine:
    engine = FakeEngine()
    setattr(engine, option, value)
    return engine


class Incomplete:
    chunk_size, window, run_id = 1, 1, None

    async def submit(self, chunk: Chunk) -> None: ...

    async def aclose(self, batch: str) -> None: ...


class TestArguments:
    @pytest.mark.parametrize("engine", [object(), FakeEngine, Incomplete(), "redis", 5], ids=repr)
    async def test_an_engine_has_three_methods(self, engine: Any) -> None:
        match = "engine must be an Engine with submit, completed and aclose, not "
        with pytest.raises(TypeError, match=match):
            await doubling.map([1], engine=engine)
        with pytest.raises(TypeError, match=match):
            doubling.stream([1], engine=engine)

    async def test_a_semaphore_stays_in_its_process(self) -> None:
        with pytest.raises(TypeError, match="concurrency must be a number with an engine"):
            await doubling.map([1], asyncio.Semaphore(2), engine=FakeEngine())

    @pytest.mark.parametrize("concurrency", [0, -1, 1.5, "2", True])
    async def test_concurrency_is_checked(self, concurrency: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="concurrency"):
            await doubling.map([1], concurrency, engine=FakeEngine())

    @pytest.mark.parametrize("option", ["chunk_size", "window"])
    async def test_sizes_are_checked(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be at least 1"):
            await doubling.map([1], engine=engine_with(option, 0))
        with pytest.raises(TypeError, match=option):
            await doubling.map([1], engine=engine_with(option, "3"))

    async def test_a_timeout_is_checked(self) -> None:
        with pytest.raises(ValueError, match="timeout must be greater than 0"):
            await doubling.map([1], timeout=0, engine=FakeEngine())

    async def test_the_step_runs_items_only(self) -> None:
        engine: Any = FakeEngine()
        step = EngineStep(doubling, engine, 5, None, None)
        assert repr(step) == "<EngineStep 'doubling' on <FakeEngine>>"
        assert (step.name, step.in_flight) == ("doubling", 6)
        with pytest.raises(PipelineError, match=r"write pipeline\.map\(items, engine=engine\)"):
            await step.run(1)


# -- as if it were local


def shape(value: Any) -> Any:
    """Return what can be compared of an error, with those inside it, or of anything else."""
    if isinstance(value, StageExecutionError):
        about = value.stage_name, value.attempts, value.item_index, value.item, value.element
        parts = shape(value.original_error), [shape(part) for part in value.earlier], shape(value.__cause__)
        return (*about, *parts, str(value), notes(value), value._is_joint)
    if isinstance(value, BaseExceptionGroup):
        return type(value), value.message, [shape(part) for part in value.exceptions]
    if isinstance(value, BaseException):
        return type(value), str(value), value.args, notes(value)
    return value


def notes(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", ()) if not note.startswith("where it was raised:")]


class Notebook:
    """Hooks and an observer that write down what they are told, each time with the context if they get it."""

    def __init__(self, *, times: bool = True) -> None:
        self.told: list[Any] = []
        self.runs: dict[str, int] = {}
        self.times = times

    def before(self, name: str, value: Any, context: Any) -> None:
        self.told.append(("before", name, value))

    def after(self, name: str, value: Any, output: Any, error: Any) -> None:
        error = None if error is None else (error.stage_name, repr(error.original_error), error.attempts)
        self.told.append(("after", name, value, output, error))

    def observe(self, event: Event) -> None:
        run = self.runs.setdefault(event.run_id, len(self.runs))
        about = event.kind, run, event.pipeline, event.stage, event.item_index, event.element, event.outcome
        rest = event.attempts, event.attempt, event.will_retry, event.delay, event.elements
        times = (round(event.time, 6), event.duration and round(event.duration, 6)) if self.times else ()
        self.told.append((*about, *rest, type(event).__name__, *times, self.error_of(event)))

    def error_of(self, event: Event) -> Any:
        """Return the event's error; that of a stage does not know its item yet when all is local."""
        if event.kind == "run_end" or not isinstance(event.error, StageExecutionError):
            return shape(event.error)
        assert event.error.item_index in (None, event.item_index)
        return event.error.stage_name, event.error.attempts, repr(event.error.original_error)


async def flaky(value: Any, context: dict[str, Any]) -> Any:
    context["attempts"] = context.get("attempts", 0) + 1
    await asyncio.sleep(0.01)
    if value == 2 and context["attempts"] < 3:
        raise ConnectionError("try again", 503)
    if value == 3:
        raise LookupError(f"no {value}")
    return value


async def slow(value: Any) -> Any:
    await asyncio.sleep(5.0 if value == 4 else 0.01)
    return value


def finishing(value: Any) -> Any:
    if value == 5:
        raise Finish(["early", value])
    if value == 6:
        raise asyncio.CancelledError
    return value


def refuse(value: Any) -> Any:
    if value in (7, 8):
        raise ValueError(value)
    return value


def refuse_too(value: Any) -> Any:
    if value in (7, 8):
        raise OSError(2, "no such file", f"/{value}")
    return value


PIPELINES = {
    "one stage": Pipeline([flaky], name="one"),
    "retries": Pipeline([Stage("flaky", flaky, retries=3, retry_delay=0.5)], name="retries"),
    "timeout": Pipeline([Stage("slow", slow, timeout=1.0, retries=1)], name="timeouts"),
    "finish": Pipeline([finishing, slow], name="finish"),
    "nested": Pipeline([Pipeline([flaky, refuse], name="inner"), slow], name="outer"),
    "parallel": Pipeline([parallel(left=refuse, right=refuse_too), Stage("values", list)]),
    "fallback": Pipeline([fallback(refuse, refuse_too)], name="fallbacks"),
    "each": Pipeline([lambda value: [value, 7, value], each(refuse)], name="eaches"),
    "branch": Pipeline([branch((lambda value: value == 7, refuse), otherwise=slow)], name="branches"),
    "on_error": Pipeline([Stage("refuse", refuse, on_error=lambda value, error: repr(error))], name="mended"),
}


@pytest.mark.virtual
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("chunk_size", [1, 4])
async def test_all_is_told_as_if_it_were_local(name: str, chunk_size: int) -> None:
    """Results, errors, contexts, hooks and events of a batch over an engine and of a local one."""

    async def run(**options: Any) -> Any:
        notebook = Notebook(times=name != "finish")  # one that is cancelled tells when it came here
        start = asyncio.get_running_loop().time()
        pipeline = PIPELINES[name].replace(
            before_stage=notebook.before, after_stage=notebook.after, observers=[notebook.observe]
        )
        async with pipeline.stream(range(10), 1, context={"given": 1}, **options) as results:
            outcomes = [outcome async for outcome in results.outcomes()]
        ended = [
            (outcome.index, outcome.value, shape(outcome.error), outcome.context) for outcome in outcomes
        ]
        return ended, notebook.told, start

    local_ended, local_told, began = await run()
    ended, told, start = await run(engine=FakeEngine(chunk_size=chunk_size, window=1))
    assert ended == local_ended

    def relative(entries: list[Any], start: float) -> list[Any]:
        return [
            (*entry[:-3], round(entry[-3] - start, 3), *entry[-2:])
            if entry[0] not in ("before", "after") and name != "finish"
            else entry
            for entry in entries
        ]

    assert relative(told, start) == relative(local_told, began)


class TestHooksAndObservers:
    @pytest.mark.virtual
    async def test_times_are_those_of_this_loop(self) -> None:
        """A worker's clock begins elsewhere."""

        class Elsewhere(FakeEngine):
            async def run(self, chunk: Chunk) -> Any:
                completion = await super().run(chunk)
                reply = json.loads(completion.reply)
                reply["time"] += 1000.0
                for seen in reply["seen"].values():
                    for entry in seen:
                        entry[1]["time"] += 1000.0
                return Completion(chunk.id, json.dumps(reply))

        events: list[Event] = []
        start = asyncio.get_running_loop().time()
        await Pipeline([slow], observers=[events.append]).map([1], engine=Elsewhere())
        assert [round(event.time - start, 6) for event in events] == [0.0, 0.0, 0.01, 0.01]

    async def test_without_any_nothing_is_written_down(self) -> None:
        engine = FakeEngine()
        replies: list[str] = []

        class Watched(FakeEngine):
            async def run(self, chunk: Chunk) -> Any:
                completion = await super().run(chunk)
                replies.append(completion.reply)
                return completion

        engine = Watched()
        await doubling.map(range(2), engine=engine)
        assert list(json.loads(replies.pop())) == ["values", "time"]
        await doubling.replace(observers=[lambda event: None]).map(range(1), engine=engine)
        assert [entry[0] for entry in json.loads(replies.pop())["seen"]["0"]] == ["event"] * 4
        await doubling.replace(before_stage=lambda name, value: None).map(range(1), engine=engine)
        assert [entry[0] for entry in json.loads(replies.pop())["seen"]["0"]] == ["before", "after"]

    async def test_async_hooks_are_awaited_here(self) -> None:
        seen: list[Any] = []

        async def before(name: str, value: Any, context: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            seen.append((name, value, variable.get(), context["given"]))

        variable.set("here")
        await doubling.replace(before_stage=before).map([1], context={"given": 5}, engine=FakeEngine())
        variable.set("unset")
        assert seen == [("double", 1, "here", 5)]

    async def test_values_that_are_not_json_are_told_as_text(self) -> None:
        seen: list[Any] = []
        pipeline = Pipeline([lambda value: {value}, len], name="p", after_stage=lambda *a: seen.append(a))
        assert await pipeline.map([1], engine=FakeEngine()) == [1]
        assert [entry[1:3] for entry in seen] == [(1, "{1}"), ("{1}", 1)]

    async def test_broken_ones_are_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        errors: list[Exception] = []

        def broken(*args: Any) -> None:
            raise RuntimeError("broken")

        def observe(event: Event) -> None:
            raise RuntimeError("broken, too")

        pipeline = doubling.replace(after_stage=lambda *args: broken(), observers=[observe])
        with caplog.at_level(logging.ERROR, "async_pipeline"):
            assert await pipeline.map([1], engine=FakeEngine()) == [2]
        assert len(caplog.records) == 5
        assert await pipeline.replace(on_hook_error=errors.append).map([1], engine=FakeEngine()) == [2]
        assert sorted(map(str, errors)) == ["broken"] + ["broken, too"] * 4
        assert len(caplog.records) == 5

    async def test_what_on_hook_error_raises_is_the_items_error(self) -> None:
        def strict(error: Exception) -> None:
            raise error

        def broken(name: str, value: Any) -> None:
            raise RuntimeError("broken")

        pipeline = doubling.replace(before_stage=broken, on_hook_error=strict)
        (result,) = await pipeline.map([1], engine=FakeEngine(), return_exceptions=True)
        assert repr(result) == "RuntimeError('broken')"

    async def test_those_of_pipelines_inside_run_at_the_worker(self) -> None:
        seen: list[Any] = []
        inner = Pipeline([double], name="inner", observers=[seen.append])
        assert await Pipeline([inner], name="outer").map([1], engine=FakeEngine()) == [2]
        assert [(event.kind, event.pipeline, event.item_index) for event in seen] == [
            (kind, "inner", 0) for kind in ("run_start", "stage_start", "stage_end", "run_end")
        ]

    async def test_middlewares_run_at_the_worker(self) -> None:
        keys = []

        async def middleware(next: Any, name: str, value: Any, context: Any) -> Any:
            keys.append(item_key())
            return await next(value)

        pipeline = doubling.replace(middlewares=[middleware])
        assert await pipeline.map([1], engine=FakeEngine(run_id="r")) == [2]
        assert keys == ["r/0"]


class TestTimeouts:
    @pytest.mark.virtual
    @pytest.mark.parametrize("is_observed", [False, True])
    async def test_of_each_item(self, is_observed: bool) -> None:
        pipeline = Pipeline([slow], observers=[lambda event: None] if is_observed else [])
        results: list[Any] = await pipeline.map(
            [1, 4, 2], timeout=1.0, engine=FakeEngine(), return_exceptions=True
        )
        assert (results[0], results[2]) == (1, 2)
        assert isinstance(results[1].original_error, DeadlineExceeded)
        assert (results[1].original_error.timeout, results[1].stage_name) == (1.0, "slow")

    @pytest.mark.virtual
    async def test_of_a_stage(self) -> None:
        pipeline = Pipeline([Stage("slow", slow, timeout=0.5)])
        results: list[Any] = await pipeline.map([4], engine=FakeEngine(), return_exceptions=True)
        assert isinstance(results[0].original_error, StageTimeoutError)
        assert results[0].original_error.timeout == 0.5


async def test_an_error_of_ones_own_class_comes_as_text() -> None:
    class NotFound(Exception):  # noqa: N818
        def __init__(self, name: str) -> None:
            super().__init__(f"there is no {name}")

    def handler(value: str) -> str:
        raise NotFound(value)

    results: list[Any] = await Pipeline([handler]).map(["key"], engine=FakeEngine(), return_exceptions=True)
    error = results[0].original_error
    assert type(error) is RecordedError
    assert error.type.endswith(":test_an_error_of_ones_own_class_comes_as_text.<locals>.NotFound")
    assert error.message == "there is no key"


# -- the worker's half


class TestRunChunk:
    @pytest.mark.parametrize("payload", ["", "nonsense", "[]", "{}", '{"shared":{},"keys":[]}', "5"])
    async def test_refuses_what_is_no_payload(self, payload: str) -> None:
        with pytest.raises(ValueError, match="the payload is not that of a chunk"):
            await run_chunk(doubling, payload)

    async def test_a_step_with_a_run_of_its_own(self) -> None:
        """A subclass is run by its own ``run``."""

        class Own(Pipeline[Any, Any]):
            async def run(self, initial_value: Any, *, context: Any = None, timeout: Any = None) -> Any:
                return [initial_value, timeout, context]

        pipeline = Own([double], observers=[lambda event: None])
        assert await pipeline.map([1], engine=FakeEngine()) == [[1, None, {}]]
        assert await pipeline.map([1], timeout=5, context={"a": 1}, engine=FakeEngine()) == [[1, 5, {"a": 1}]]


def test_an_iterator_is_enough(recwarn: pytest.WarningsRecorder) -> None:
    """The protocol asks ``completed`` for an iterator, which need not have ``aclose``."""

    class Plain(FakeEngine):
        def completed(self, batch: str) -> Any:
            return PlainIterator(self.batch(batch))

    class PlainIterator:
        def __init__(self, batch: Batch) -> None:
            self.batch = batch

        def __aiter__(self) -> AsyncIterator[Completion]:
            return self

        async def __anext__(self) -> Completion:
            completion: Completion = await self.batch.completions.get()
            return completion

    assert run_virtually(doubling.map(range(5), engine=Plain())) == [0, 2, 4, 6, 8]


class TestKeysOfAJournal:
    async def test_two_items_of_one_key_are_told_apart_by_observers(self, tmp_path: Path) -> None:
        seen: list[Any] = []
        pipeline = doubling.replace(observers=[seen.append])
        journal = Journal(tmp_path / "batch.db", key=str)
        await pipeline.map([7, 8, 7], engine=FakeEngine(chunk_size=3), journal=journal)
        assert [event.item_index for event in seen if event.kind == "run_start"] == [0, 1, 2]


async def test_pipelines_of_other_names_have_other_chunks() -> None:
    names = set()
    for name in ("a", "b"):
        engine = FakeEngine(run_id="r")
        await Pipeline([double], name=name).map([1], engine=engine)
        names.add(engine.chunks[0].id)
    assert len(names) == 2


async def test_a_context_has_texts_as_keys() -> None:
    with pytest.raises(TypeError, match="context must be a dict of JSON values"):
        await doubling.map([1], context={1: "a"}, engine=FakeEngine())
