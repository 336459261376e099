"""Batches over a real Dask cluster: two worker processes, some of which are killed.

The client lives in the event loop of each test, the cluster in another thread, for all tests.
"""

import asyncio
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import dask
import pytest
from distributed import Client, LocalCluster

from async_pipeline import (
    EngineError,
    Pipeline,
    RecordedError,
    Stage,
    StageExecutionError,
    WorkerLost,
    item_key,
)
from async_pipeline.integrations import dask as module
from async_pipeline.integrations.dask import DaskEngine

T = TypeVar("T")
PATIENCE = 60.0  # seconds; what hangs takes longer

pytestmark = [
    pytest.mark.threads,
    pytest.mark.skipif(sys.platform == "win32", reason="kills workers"),
]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Without what distributed says of workers that die."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if "distributed" in name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def address(quiet: None) -> Iterator[str]:
    """Of a cluster whose workers come back when they die."""
    settings = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.comm.timeouts.connect": "5s",
        "distributed.deploy.lost-worker-timeout": "1h",  # on a loaded machine one needs long to come back
        "logging.distributed": "critical",  # of the workers, who get it by their environment
    }
    with (
        dask.config.set(settings),
        LocalCluster(  # type: ignore[no-untyped-call]
            processes=True,
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        ) as cluster,
    ):
        yield cluster.scheduler_address


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A file into which handlers write what they begin."""
    return tmp_path / "started"


def with_client(address: str, body: Callable[[Client], Awaitable[T]]) -> T:
    """Run ``body`` in an event loop of its own, with a client there."""

    async def main() -> T:
        async with asyncio.timeout(PATIENCE):
            client = await Client(address, asynchronous=True)  # type: ignore[no-untyped-call]
            try:
                await client.wait_for_workers(2)
                return await body(client)
            finally:
                await client.close()

    return asyncio.run(main())


async def tasks_left(client: Client) -> int:
    """How many tasks the scheduler knows, as soon as they are none."""
    for _ in range(200):
        left: int = await client.run_on_scheduler(  # type: ignore[no-untyped-call]
            lambda dask_scheduler: len(dask_scheduler.tasks)
        )
        if not left:
            break
        await asyncio.sleep(0.02)
    return left


def noting(started: Path, seconds: float = 0.0) -> Pipeline[Any, Any]:
    """A pipeline whose handler writes down what it begins, and where."""
    file = str(started)

    async def note(value: Any) -> Any:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{value} {os.getpid()}\n".encode())
        os.close(descriptor)
        await asyncio.sleep(seconds)
        return value * 2

    return Pipeline([note], name="noting")


def notes(started: Path) -> list[tuple[int, int]]:
    """What was begun, in order, and in which process."""
    lines = started.read_text().splitlines() if started.exists() else []
    return [(int(value), int(process)) for value, process in map(str.split, lines)]


async def begun(started: Path, count: int = 1) -> None:
    """Wait until so many items have begun."""
    for _ in range(1000):
        if len(notes(started)) >= count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("nothing begins")


def test_a_batch_runs_on_the_workers(address: str) -> None:
    def where(value: int, context: dict[str, Any]) -> Any:
        context["key"] = item_key()
        return [value, os.getpid(), threading.current_thread() is threading.main_thread()]

    async def body(client: Client) -> None:
        engine = DaskEngine(client, chunk_size=7, window=4, run_id="nightly")
        results = await Pipeline([where]).map(range(100), engine=engine)
        assert [result[0] for result in results] == [*range(100)]
        assert {result[2] for result in results} == {True}  # the worker's event loop
        processes = {result[1] for result in results}
        assert len(processes) == 2
        assert os.getpid() not in processes
        async with Pipeline([where]).stream(range(20), engine=engine, ordered=False) as stream:
            outcomes = [outcome async for outcome in stream.outcomes()]
        assert {outcome.index: outcome.context for outcome in outcomes} == {
            index: {"key": f"nightly/{index}"} for index in range(20)
        }
        assert await tasks_left(client) == 0
        assert client.futures == {}

    with_client(address, body)


def test_results_are_released_as_they_complete(address: str) -> None:
    async def body(client: Client) -> None:
        engine = DaskEngine(client, chunk_size=2, window=3)
        most = 0
        async with Pipeline([abs]).stream(range(200), engine=engine) as results:
            async for value in results:
                if value % 20 == 19:
                    known = await client.run_on_scheduler(  # type: ignore[no-untyped-call]
                        lambda dask_scheduler: len(dask_scheduler.tasks)
                    )
                    most = max(most, known, len(client.futures))
        assert 0 < most <= 3 + 3  # in flight, and on the way out

    with_client(address, body)


def test_errors_come_back(address: str) -> None:
    class NotFoundError(Exception):
        pass

    def handler(value: int) -> Any:
        if value == 1:
            raise ValueError("one", 1)
        if value == 2:
            raise NotFoundError("two")
        if value == 3:
            return {value}
        return value

    async def body(client: Client) -> None:
        seen: list[Any] = []
        pipeline = Pipeline(
            [Stage("handler", handler, retries=1)],
            observers=[lambda event: seen.append((event.kind, event.item_index))],
            after_stage=lambda name, value, output, error: seen.append((name, value)),
        )
        engine = DaskEngine(client, chunk_size=10)
        results: list[Any] = await pipeline.map(range(5), engine=engine, return_exceptions=True)
        assert (results[0], results[4]) == (0, 4)
        assert repr(results[1].original_error) == "ValueError('one', 1)"
        assert (results[1].stage_name, results[1].attempts, results[1].item_index) == ("handler", 2, 1)
        assert type(results[2].original_error) is RecordedError
        assert isinstance(results[3], (TypeError, StageExecutionError))
        assert seen.count(("attempt_failed", 1)) == 2
        assert ("handler", 2) in seen

    with_client(address, body)


def test_a_pipeline_is_pickled_once_and_loaded_once(address: str) -> None:
    class Counted:
        pickled = 0

        def __call__(self, value: int) -> int:
            return value

        def __reduce__(self) -> Any:
            Counted.pickled += 1
            return make, ()

    def make() -> Callable[[int], Any]:
        identity = object()
        return lambda value: id(identity)

    lock = threading.Lock()  # which can't be pickled, but an observer need not be

    async def body(client: Client) -> None:
        for _ in range(2):
            engine = DaskEngine(client, chunk_size=5)
            pipeline = Pipeline([Counted()], observers=[lambda event: lock.locked()])
            results = await pipeline.map(range(100), engine=engine)
            results += await pipeline.map(range(100), engine=engine)
            assert len(set(results)) == 2  # one in each worker
        assert Counted.pickled == 2

    with_client(address, body)


def test_a_worker_that_is_killed(address: str, started: Path) -> None:
    """Its chunks run again on the other one, and no chunk that had come back does."""
    pipeline = noting(started, 0.01)

    async def body(client: Client) -> tuple[int, set[int], int]:
        engine = DaskEngine(client, chunk_size=10, window=6)
        victim, back = 0, set()
        results: dict[int, Any] = {}
        async with pipeline.stream(range(800), 2, engine=engine, ordered=False) as stream:
            async for outcome in stream.outcomes():
                assert outcome.error is None
                results[outcome.index or 0] = outcome.value
                if not victim and len(results) >= 200:
                    victim = notes(started)[-1][1]
                    back = set(results)
                    begun = len(notes(started))
                    os.kill(victim, signal.SIGKILL)
        assert results == {index: index * 2 for index in range(800)}
        assert await tasks_left(client) == 0
        return victim, back, begun

    victim, back, begun = with_client(address, body)
    seen = notes(started)
    counts = Counter(value for value, _ in seen)
    assert set(counts) == set(range(800))
    extra = {value for value, count in counts.items() if count > 1}
    assert max(counts.values()) <= 2
    assert len(extra) <= 6 * 10  # what was in flight
    assert not extra & back
    assert not {value for value, _ in seen[begun + 20 :]} & back
    first = dict(reversed(seen))
    assert {first[value] for value in extra} <= {victim}
    print(f"-- extra starts after a kill: {len(extra)}")


def test_a_poison_item_fails_alone(address: str) -> None:
    def handler(value: int) -> int:
        if value == 177:
            os._exit(1)
        return value

    async def body(client: Client) -> None:
        engine = DaskEngine(client, chunk_size=25, window=8)
        results: list[Any] = await Pipeline([handler], name="poisoned").map(
            range(400), engine=engine, return_exceptions=True
        )
        error = results.pop(177)
        assert results == [value for value in range(400) if value != 177]
        assert type(error) is StageExecutionError
        assert (error.stage_name, error.item_index, error.item) == ("poisoned", 177, 177)
        assert type(error.original_error) is WorkerLost
        assert str(error.original_error) == "each of the 2 workers that ran it has died"
        assert await tasks_left(client) == 0

    with_client(address, body)


def test_a_cancelled_batch_leaves_nothing(address: str, started: Path) -> None:
    """Neither what waits at the scheduler nor what has begun goes on."""
    pipeline = noting(started, 1.0)

    async def body(client: Client) -> None:
        engine = DaskEngine(client, chunk_size=50, window=8)
        batch = asyncio.ensure_future(pipeline.map(range(1000), 1, engine=engine))
        await begun(started, 2)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert await tasks_left(client) == 0
        left = len(notes(started))
        ours = [task for task in asyncio.all_tasks() if "async_pipeline" in repr(task.get_coro())]
        assert [task for task in ours if not task.done()] == []
        assert engine._batches == {}
        running = await client.run(lambda: len(module._running))
        assert set(running.values()) == {0}
        await asyncio.sleep(1.5)
        assert len(notes(started)) == left
        # and the workers have their hands free
        assert await Pipeline([abs]).map(range(10), engine=engine) == [*range(10)]

    with_client(address, body)


def test_two_batches_share_an_engine(address: str) -> None:
    async def body(client: Client) -> None:
        engine = DaskEngine(client, chunk_size=3, window=2, run_id="same")
        lists = await asyncio.gather(*(Pipeline([abs]).map(range(20), engine=engine) for _ in range(3)))
        assert lists == [[*range(20)]] * 3

    with_client(address, body)


# -- what goes wrong


def test_a_pipeline_that_can_not_be_pickled(address: str) -> None:
    lock = threading.Lock()

    def handler(value: int) -> int:
        with lock:
            return value

    async def body(client: Client) -> None:
        with pytest.raises(EngineError, match=r"^the pipeline 'locked' can't be pickled, so it .*lock"):
            await Pipeline([handler], name="locked").map([1], engine=DaskEngine(client))

    with_client(address, body)


def test_a_pipeline_that_can_not_be_loaded(address: str) -> None:
    class Unloadable:
        def __call__(self, value: int) -> int:
            return value

        def __reduce__(self) -> Any:
            return __import__, ("no_such_module",)

    async def body(client: Client) -> None:
        with pytest.raises(EngineError, match=r"^Dask: a worker could not run a chunk: .*no_such_module"):
            await Pipeline([Unloadable()], name="p").map([1], engine=DaskEngine(client))
        assert await tasks_left(client) == 0

    with_client(address, body)


def test_a_chunk_that_somebody_else_cancels(address: str, started: Path) -> None:
    pipeline = noting(started, 30.0)

    async def body(client: Client) -> None:
        engine = DaskEngine(client)
        batch = asyncio.ensure_future(pipeline.map(range(10), engine=engine))
        await begun(started)
        (of_batch,) = engine._batches.values()
        await client.cancel(list(of_batch._followers.values()), force=True)  # type: ignore[no-untyped-call]
        with pytest.raises(EngineError, match=r"^Dask: a chunk was cancelled, or the scheduler is gone: "):
            await batch
        running = await client.run(lambda: len(module._running))
        assert set(running.values()) == {0}

    with_client(address, body)


def test_a_chunk_that_is_cancelled_at_its_worker(address: str, started: Path) -> None:
    pipeline = noting(started, 30.0)

    async def body(client: Client) -> None:
        engine = DaskEngine(client)
        batch = asyncio.ensure_future(pipeline.map(range(10), engine=engine))
        await begun(started)
        (name,) = engine._batches
        await client.run(module._cancel_running, name)
        with pytest.raises(EngineError, match="gave an answer that can't be read"):
            await batch

    with_client(address, body)


def test_a_client_that_is_closed(address: str, started: Path) -> None:
    pipeline = noting(started, 1.0)

    async def body(client: Client) -> None:
        engine = DaskEngine(client)
        batch = asyncio.ensure_future(pipeline.map(range(10), engine=engine))
        await begun(started)
        await client.close()  # type: ignore[no-untyped-call]
        with pytest.raises(EngineError, match="a chunk was cancelled, or the scheduler is gone"):
            await batch
        with pytest.raises(EngineError, match="the Dask client is closed; open another one and"):
            await pipeline.map([1], engine=engine)
        with pytest.raises(ValueError, match="client must be connected, but it is closed; write client = "):
            DaskEngine(client)

    with_client(address, body)


def test_a_scheduler_that_is_gone(started: Path) -> None:
    pipeline = noting(started, 30.0)

    async def main() -> None:
        async with (
            asyncio.timeout(PATIENCE),
            LocalCluster(  # type: ignore[no-untyped-call]
                processes=False,
                protocol="tcp",
                n_workers=1,
                dashboard_address="127.0.0.1:0",
                host="127.0.0.1",
                asynchronous=True,
            ) as cluster,
        ):
            address = cluster.scheduler_address
            client = await Client(address, asynchronous=True, timeout=1)  # type: ignore[no-untyped-call]
            batch = asyncio.ensure_future(pipeline.map(range(10), engine=DaskEngine(client)))
            await begun(started)
            await cluster.close()
            with pytest.raises(EngineError, match="a chunk was cancelled, or the scheduler is gone"):
                await batch
            await client.close()

    asyncio.run(main())


def test_another_event_loop(address: str) -> None:
    engines: list[DaskEngine] = []

    async def keep(client: Client) -> None:
        engine = DaskEngine(client)
        await asyncio.to_thread(asyncio.run, use_elsewhere(engine))

    async def use_elsewhere(engine: DaskEngine) -> None:
        with pytest.raises(EngineError, match="the Dask client belongs to another event loop"):
            await Pipeline([abs]).map([1], engine=engine)
        with pytest.raises(TypeError, match="client must be an asynchronous one of this event loop"):
            DaskEngine(engine.client)
        engines.append(engine)

    with_client(address, keep)
    assert engines


def fake(**attributes: Any) -> Any:
    """An engine whose client is none, for what a real one does too rarely."""
    engine: Any = object.__new__(DaskEngine)
    engine.__dict__.update(_pickled=lambda pipeline: b"", _batches={}, chunk_size=1, window=1, run_id=None)
    engine.client = SimpleNamespace(status="running", asynchronous=True, **attributes)
    return engine


async def test_a_scheduler_that_takes_nothing() -> None:
    def submit(*args: Any, **options: Any) -> None:
        raise RuntimeError("closing")

    with pytest.raises(EngineError, match="Dask's scheduler can't be given a chunk: closing"):
        await Pipeline([abs]).map([1], engine=fake(submit=submit))


class NeverDone:
    """A future."""

    released = False

    def __await__(self) -> Any:
        return asyncio.Event().wait().__await__()

    def cancelled(self) -> bool:
        return False

    def release(self) -> None:
        self.released = True


@pytest.mark.virtual
@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_workers_that_do_not_hear_of_the_end(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def cancel(futures: Any) -> None:
        if how == "fails":
            raise OSError("gone")
        await asyncio.Event().wait()

    engine = fake(submit=lambda *args, **options: NeverDone(), cancel=cancel)
    batch = asyncio.ensure_future(Pipeline([abs]).map([1], engine=engine))
    await asyncio.sleep(1)
    batch.cancel()
    with caplog.at_level(logging.WARNING, "async_pipeline"), pytest.raises(asyncio.CancelledError):
        await batch
    (record,) = caplog.records
    assert record.getMessage().startswith("Dask's workers may go on with a batch that has ended: ")


class TestArguments:
    @pytest.mark.parametrize("client", [None, "tcp://127.0.0.1:8786", Client, object()], ids=repr)
    def test_a_client_is_one_of_distributed(self, client: Any) -> None:
        with pytest.raises(
            TypeError, match=r"client must be a distributed\.Client, not .* asynchronous=True\)"
        ):
            DaskEngine(client)

    def test_a_client_is_asynchronous(self, address: str) -> None:
        with (
            Client(address) as client,  # type: ignore[no-untyped-call]
            pytest.raises(
                TypeError, match="client must be an asynchronous one of this event loop; write client"
            ),
        ):
            DaskEngine(client)

    def test_a_client_was_awaited(self, address: str) -> None:
        async def main() -> None:
            client = Client(address, asynchronous=True)  # type: ignore[no-untyped-call]
            client.status, status = "newly-created", client.status
            with pytest.raises(ValueError, match="client must be connected, but it is newly-created; write"):
                DaskEngine(client)
            client.status = status
            await client
            await client.close()  # type: ignore[no-untyped-call]

        asyncio.run(main())

    def test_the_others_are_checked(self, address: str) -> None:
        async def body(client: Client) -> None:
            for option in ("chunk_size", "window"):
                wrong: dict[str, Any] = {option: 0}
                with pytest.raises(ValueError, match=f"{option} must be at least 1"):
                    DaskEngine(client, **wrong)
                wrong = {option: 1.5}
                with pytest.raises(TypeError, match=option):
                    DaskEngine(client, **wrong)
            for run_id in ("", 5):
                wrong = {"run_id": run_id}
                with pytest.raises(TypeError, match="run_id must be a str that is not empty"):
                    DaskEngine(client, **wrong)
            engine = DaskEngine(client)
            assert (engine.chunk_size, engine.window, engine.run_id) == (100, 16, None)
            assert repr(engine) == f"<DaskEngine on {client!r}>"
            await engine.aclose("unknown")

        with_client(address, body)


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(
        ImportError,
        match=r"^Dask support requires installing async-pipeline\[dask\]: pip install ",
    ):
        importlib.import_module(module.__name__)


# -- the worker's half, here


async def test_what_runs_in_a_worker_is_known_by_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def handler(value: int) -> int:
        try:
            await asyncio.sleep(60 if value else 0)
        finally:
            ended.append("ended")
        return value

    pipeline = Pipeline([handler])

    def payload(value: int) -> str:
        shared = {"context": None, "hooks": False, "observers": False, "timeout": None, "concurrency": 1}
        return json.dumps({"shared": shared, "keys": ["k"], "items": [value]})

    monkeypatch.setattr(module, "_ended", deque(maxlen=5))
    pickled = module._pickled(pipeline)
    assert module._loaded(pickled) is module._loaded(pickled)
    monkeypatch.setattr(module, "_loaded", lambda pickled: pipeline)  # the handler writes into this list
    assert '"values":[0]' in await module._run_pickled("one", pickled, payload(0))
    runs = [asyncio.create_task(module._run_pickled("one", pickled, payload(1))) for _ in range(2)]
    other = asyncio.create_task(module._run_pickled("two", pickled, payload(1)))
    await asyncio.sleep(0.01)
    assert {batch: len(tasks) for batch, tasks in module._running.items()} == {"one": 2, "two": 1}
    await module._cancel_running("three")
    await module._cancel_running("one")
    assert list(module._running) == ["two"]
    assert len(ended) == 3
    assert [await run for run in runs] == ["", ""]
    assert await module._run_pickled("one", pickled, payload(1)) == ""  # that had been queued there
    assert list(module._running) == ["two"]
    other.cancel()  # as a worker does that closes
    await asyncio.wait({other})
    assert module._running == {}
    assert len(ended) == 4
