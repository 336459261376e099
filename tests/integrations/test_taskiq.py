"""``TaskiqEngine`` over brokers in memory: one of taskiq's own, and one whose parts can fail one by one.

The clients and workers of a ``Net`` are brokers of one event loop, with taskiq's own receiver, over one queue
and one store. Time is virtual: leases and timeouts take none.
"""

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest
from taskiq import (
    AckableMessage,
    AsyncBroker,
    AsyncResultBackend,
    BrokerMessage,
    InMemoryBroker,
    TaskiqResult,
)
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.receiver import Receiver
from taskiq_aio_pika import AioPikaBroker
from taskiq_nats import NatsBroker, PullBasedJetStreamBroker, PushBasedJetStreamBroker
from taskiq_redis import ListQueueBroker, PubSubBroker, RedisAsyncResultBackend, RedisStreamBroker

from async_pipeline import BatchError, Pipeline, Stage, StageExecutionError, item_key
from async_pipeline.engine import Chunk
from async_pipeline.errors import EngineError, RecordedError, WorkerLost
from async_pipeline.integrations import _taskiq_worker
from async_pipeline.integrations import taskiq as module
from async_pipeline.integrations.taskiq import TaskiqEngine

FILE = module.__file__
DOWN = "(ConnectionError: refused|TimeoutError: no answer)"
NOWHERE = "redis://127.0.0.1:1"
LEASE = 8.0  # a beat every 2 s
Handler = Callable[[Any], Awaitable[Any]]


class Store(AsyncResultBackend[Any]):
    """What one process sees of the results: all share the dicts, each may lose its connection."""

    def __init__(self, other: "Store | None" = None) -> None:
        self.results: dict[str, TaskiqResult[Any]] = {} if other is None else other.results
        self.progress: dict[str, TaskProgress[Any]] = {} if other is None else other.progress
        self.fault: Exception | None = None
        self.fault_of: dict[str, Exception] = {}
        self.hangs = False
        self.deaf: float | None = None  # seconds for an answer, which no cancellation shortens

    async def _answer(self, method: str) -> None:
        await asyncio.sleep(0)
        if self.deaf is not None:
            give_up = now() + self.deaf
            while now() < give_up:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(give_up - now())
        if self.hangs:
            await asyncio.Event().wait()
        fault = self.fault or self.fault_of.get(method)
        if fault is not None:
            raise fault

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        await self._answer("set_result")
        self.results[task_id] = result

    async def is_result_ready(self, task_id: str) -> bool:
        await self._answer("is_result_ready")
        return task_id in self.results

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
        await self._answer("get_result")
        return self.results[task_id]

    async def set_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        await self._answer("set_progress")
        self.progress[task_id] = progress

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        await self._answer("get_progress")
        return self.progress.get(task_id)


class Wire:
    """A queue that delivers again what was not acknowledged when a connection closes, if it is to."""

    def __init__(self, *, redelivers: bool = True) -> None:
        self.ready: asyncio.Queue[bytes] = asyncio.Queue()
        self.redelivers = redelivers
        self.sent: list[bytes] = []
        self.delivered: list[bytes] = []

    def put(self, message: bytes) -> None:
        self.sent.append(message)
        self.ready.put_nowait(message)


class Node(AsyncBroker):
    """The broker as one process has it."""

    def __init__(self, wire: Wire, store: Store) -> None:
        super().__init__()
        self.result_backend = store
        self.wire = wire
        self.store = store
        self.unacknowledged: list[bytes] = []
        self.cancelling: list[int] = []  # of the tasks that have acknowledged
        self.fault: Exception | None = None
        self.hangs = False
        self.shutdowns = 0

    async def kick(self, message: BrokerMessage) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.fault is not None:
            raise self.fault
        self.wire.put(message.message)

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        while True:
            message = await self.wire.ready.get()
            self.wire.delivered.append(message)
            self.unacknowledged.append(message)

            def ack(message: bytes = message) -> None:
                task = asyncio.current_task()
                assert task is not None
                self.cancelling.append(task.cancelling())
                if message in self.unacknowledged:
                    self.unacknowledged.remove(message)

            yield AckableMessage(data=message, ack=ack)

    async def shutdown(self) -> None:
        self.shutdowns += 1
        await super().shutdown()


class Worker:
    """A process of ``taskiq worker``, as far as that runs in this one."""

    def __init__(self, net: "Net", called: str, handler: Handler, slots: int, names: dict[str, str]) -> None:
        self.node = Node(net.wire, Store(net.store))
        self.node.is_worker_process = True
        self.engine = TaskiqEngine(self.node)
        self.engine.register(net.pipeline(handler, called), **({"name": "pages", "version": "1"} | names))
        self.store = self.node.store
        self.receiver = Receiver(self.node, max_async_tasks=slots)
        self.callbacks: set[asyncio.Task[Any]] = set()
        self.finish = asyncio.Event()
        self.listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        callback = self.receiver.callback

        async def noted(message: Any, raise_err: bool = False) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.callbacks.add(task)
            task.add_done_callback(self.callbacks.discard)
            await callback(message, raise_err)

        self.receiver.callback = noted  # type: ignore[method-assign]
        await self.receiver.listen(self.finish)

    async def stop(self) -> None:
        """SIGTERM, and taskiq's ``--wait-tasks-timeout`` has passed."""
        self.receiver.wait_tasks_timeout = 0.001
        self.finish.set()
        await self.listening
        await self.node.shutdown()

    async def die(self) -> None:
        """Kill -9: nothing is said any more, and the broker sees the connection close."""
        self.store.fault = ConnectionError("dead")
        lost, self.node.unacknowledged = self.node.unacknowledged, []
        self.listening.cancel()
        for task in self.callbacks:
            task.cancel()
        await asyncio.wait([self.listening, *self.callbacks])
        if self.node.wire.redelivers:
            for message in lost:
                self.node.wire.ready.put_nowait(message)


class Net:
    """Clients and workers over one queue and one store."""

    def __init__(self, *, redelivers: bool = True) -> None:
        self.wire = Wire(redelivers=redelivers)
        self.store = Store()
        self.started: list[tuple[str, str | None, Any]] = []  # worker, key, item
        self.workers: list[Worker] = []

    def pipeline(self, handler: Handler, name: str) -> Pipeline[Any, Any]:
        async def noted(value: Any) -> Any:
            self.started.append((name, item_key(), value))
            return await handler(value)

        return Pipeline([Stage("work", noted)], name="pages")

    def client(self, **options: Any) -> "Client":
        return Client(self, **options)

    def worker(self, handler: Handler, *, slots: int = 2, **names: Any) -> Worker:
        worker = Worker(self, f"w{len(self.workers)}", handler, slots, names)
        self.workers.append(worker)
        return worker

    @property
    def items(self) -> list[Any]:
        return [item for _, _, item in self.started]

    @property
    def states(self) -> list[str]:
        return [str(progress.state) for progress in self.store.progress.values()]


class Client:
    def __init__(self, net: Net, **options: Any) -> None:
        self.node = Node(net.wire, Store(net.store))
        self.store = self.node.store
        options = {"chunk_size": 2, "lease": LEASE, "start_timeout": 100.0, "outage_timeout": 10.0} | options
        self.engine = TaskiqEngine(self.node, **options)
        self.pipeline = self.engine.register(net.pipeline(never, "client"), name="pages", version="1")

    async def map(self, items: Any, concurrency: int = 10, **options: Any) -> list[Any]:
        found: list[Any] = await self.pipeline.map(items, concurrency, engine=self.engine, **options)
        return found

    async def die(self, batch: "asyncio.Task[Any]") -> None:
        """Kill -9: the workers are told nothing."""
        self.store.fault = ConnectionError("dead")
        batch.cancel()
        await asyncio.wait([batch])


@asynccontextmanager
async def network(**options: Any) -> AsyncIterator[Net]:
    net = Net(**options)
    try:
        yield net
    finally:
        for worker in net.workers:
            if not worker.listening.done():
                await worker.stop()


async def never(value: Any) -> NoReturn:
    raise AssertionError("it runs at the workers")


async def double(value: Any) -> Any:
    return value * 2


async def slow(value: Any) -> Any:
    await asyncio.sleep(30)
    return value * 2


async def forever(value: Any) -> Any:
    await asyncio.Event().wait()


def fails_once(*values: Any) -> Handler:
    """A handler that fails the first time for some values."""
    failing = set(values)

    async def handler(value: Any) -> Any:
        if value in failing:
            failing.discard(value)
            raise LookupError(value)
        return value * 2

    return handler


def deaths_of(record: TaskProgress[Any]) -> int:
    assert record.meta is not None
    deaths: int = record.meta[2]
    return deaths


def now() -> float:
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def sent(net: Net, count: int) -> None:
    await until(lambda: len(net.wire.sent) >= count)


async def started(net: Net, count: int) -> None:
    await until(lambda: len(net.started) >= count)


# -- in memory


@pytest.fixture
def memory() -> TaskiqEngine:
    return TaskiqEngine(InMemoryBroker(), chunk_size=3, window=2)


async def test_in_memory(memory: TaskiqEngine) -> None:
    pages = memory.register(Pipeline([double]))
    async with memory:
        assert await pages.map(range(20), engine=memory) == [2 * n for n in range(20)]
        async with pages.stream(range(7), engine=memory) as results:
            assert [item async for item in results] == [2 * n for n in range(7)]


async def test_an_error_has_its_item_and_index(memory: TaskiqEngine) -> None:
    async def fail(value: int) -> int:
        if value == 4:
            raise ValueError("four")
        return value

    pages = memory.register(Pipeline([Stage("fail", fail)]))
    async with memory:
        with pytest.raises(BatchError) as caught:
            await pages.map(range(9), engine=memory)
    [error] = caught.value.exceptions
    assert isinstance(error, StageExecutionError)
    assert (error.stage_name, error.item_index, error.item) == ("fail", 4, 4)
    assert repr(error.original_error) == "ValueError('four')"


async def test_handlers_find_the_key_of_their_item(memory: TaskiqEngine) -> None:
    async def key(value: int) -> str | None:
        return item_key()

    engine = TaskiqEngine(memory.broker, chunk_size=2, run_id="november")
    pages = engine.register(Pipeline([key]))
    async with engine:
        keys = await pages.map(range(5), engine=engine)
    assert keys == [f"november/{n}" for n in range(5)]


async def test_cancelling_ends_what_runs_in_memory(memory: TaskiqEngine) -> None:
    running: set[int] = set()
    left: list[int] = []

    async def wait(value: int) -> None:
        running.add(value)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            left.append(value)

    pages = memory.register(Pipeline([wait]))
    async with memory:
        batch = asyncio.create_task(pages.map(range(100), engine=memory))
        await until(lambda: len(running) == 6)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert sorted(left) == sorted(running) == list(range(6))
        await memory.broker.wait_all()  # type: ignore[attr-defined]


async def test_cancelling_one_batch_leaves_the_others(memory: TaskiqEngine) -> None:
    go = asyncio.Event()
    begun: list[int] = []

    async def wait(value: int) -> int:
        begun.append(value)
        await go.wait()
        return value

    pages = memory.register(Pipeline([wait]))
    async with memory:
        one, other = [asyncio.create_task(pages.map([n], engine=memory)) for n in (1, 2)]
        await until(lambda: len(begun) == 2)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        go.set()
        assert await other == [2]
    assert sorted(begun) == [1, 2]


async def test_what_is_watched_arrives_at_the_client(memory: TaskiqEngine) -> None:
    events: list[tuple[str, int | None]] = []
    pages = memory.register(Pipeline([Stage("double", double)]))
    watched = pages.replace(observers=[lambda event: events.append((event.kind, event.item_index))])
    async with memory:
        assert await watched.map([1, 2], engine=memory) == [2, 4]
    assert ("stage_end", 0) in events
    assert ("stage_end", 1) in events


async def test_two_pipelines_on_one_broker(memory: TaskiqEngine) -> None:
    pages = memory.register(Pipeline([double]), name="pages")
    more = memory.register(Pipeline([fails_once(), double]), name="more")
    async with memory:
        both = await asyncio.gather(pages.map(range(9), engine=memory), more.map(range(9), engine=memory))
    assert list(both) == [[2 * n for n in range(9)], [4 * n for n in range(9)]]


async def test_two_engines_on_one_broker(memory: TaskiqEngine) -> None:
    other = TaskiqEngine(memory.broker, chunk_size=5)
    pages = memory.register(Pipeline([double], name="pages"))
    async with memory:
        both = await asyncio.gather(pages.map(range(9), engine=memory), pages.map(range(9), engine=other))
    assert both[0] == both[1] == [2 * n for n in range(9)]


async def test_a_result_that_was_never_asked_for_is_forgotten_by_the_broker_only() -> None:
    """One in memory keeps no more than 100 results: those of a window it must."""
    engine = TaskiqEngine(InMemoryBroker(), chunk_size=1)
    pages = engine.register(Pipeline([double]))
    async with engine:
        assert await pages.map(range(500), 20, engine=engine) == [2 * n for n in range(500)]


# -- arguments


@pytest.mark.parametrize(
    "broker", [ListQueueBroker(NOWHERE), PubSubBroker(NOWHERE), NatsBroker("nats://127.0.0.1:1")]
)
def test_a_broker_that_loses_messages_is_refused(broker: AsyncBroker) -> None:
    with pytest.raises(ValueError, match=rf"{type(broker).__name__} .* allow_lossy=True"):
        TaskiqEngine(broker)
    assert repr(TaskiqEngine(broker, allow_lossy=True)) == f"<TaskiqEngine on {type(broker).__name__}>"


@pytest.mark.parametrize(
    "broker",
    [
        RedisStreamBroker(NOWHERE),
        AioPikaBroker("amqp://127.0.0.1:1/"),
        PullBasedJetStreamBroker("nats://127.0.0.1:1"),
        PushBasedJetStreamBroker("nats://127.0.0.1:1"),
        InMemoryBroker(),
    ],
)
def test_a_broker_with_acknowledgements_is_taken(broker: AsyncBroker) -> None:
    assert TaskiqEngine(broker).broker is broker


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": "1"}, TypeError, "chunk_size"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"run_id": 7}, TypeError, "run_id must be a str that is not empty, not 7"),
        ({"run_id": ""}, TypeError, "run_id must be a str that is not empty, not ''"),
        ({"lease": 0}, ValueError, "lease"),
        ({"start_timeout": -1}, ValueError, "start_timeout"),
        ({"outage_timeout": float("nan")}, ValueError, "outage_timeout"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskiqEngine(InMemoryBroker(), **options)


def test_the_defaults() -> None:
    engine = TaskiqEngine(InMemoryBroker())
    assert (engine.chunk_size, engine.window, engine.run_id) == (100, 16, None)


def test_what_is_no_broker_is_refused() -> None:
    with pytest.raises(TypeError, match="broker must be a taskiq broker, not 'redis"):
        TaskiqEngine("redis://localhost")  # type: ignore[arg-type]


def test_a_broker_that_runs_while_sending_is_refused() -> None:
    with pytest.raises(ValueError, match=r"write InMemoryBroker\(\)"):
        TaskiqEngine(InMemoryBroker(await_inplace=True))


def test_the_name_of_the_task_is_taken() -> None:
    broker = InMemoryBroker()
    broker.register_task(double, task_name="async_pipeline.run_chunk")
    with pytest.raises(ValueError, match=r"another task of the name 'async_pipeline.run_chunk'"):
        TaskiqEngine(broker)


def test_register(memory: TaskiqEngine) -> None:
    pages = Pipeline([double], name="pages")
    assert memory.register(pages) is pages
    assert memory.register(pages, version="2") is pages
    memory.register(pages.replace(observers=[print]))
    with pytest.raises(ValueError, match="another pipeline is registered as 'pages'"):
        memory.register(Pipeline([slow], name="pages"))
    with pytest.raises(ValueError, match="another pipeline is registered as 'pages'"):
        memory.register(Pipeline([slow]), name="pages")
    with pytest.raises(TypeError, match="register takes a Pipeline"):
        memory.register(double)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="name and version must be texts"):
        memory.register(pages, version=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name and version must be texts"):
        memory.register(pages, name=b"pages")  # type: ignore[arg-type]


# -- what can't run


async def test_a_pipeline_that_is_not_registered(memory: TaskiqEngine) -> None:
    async with memory:
        with pytest.raises(EngineError, match=r"'stray' is not registered; write engine.register"):
            await Pipeline([double], name="stray").map([1], engine=memory)


async def test_another_pipeline_is_registered_by_its_name(memory: TaskiqEngine) -> None:
    memory.register(Pipeline([double], name="taken"))
    async with memory:
        with pytest.raises(EngineError, match=r"another pipeline is registered as 'taken'; use the one that"):
            await Pipeline([double], name="taken").map([1], engine=memory)


class NoProgress(Store):
    set_progress = AsyncResultBackend.set_progress


class Forgetful(Store):
    keep_results = False


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (None, "no result backend; write broker.with_result_backend"),
        (NoProgress(), "a NoProgress keeps no progress"),
        (Forgetful(), "write keep_results=True"),
        (RedisAsyncResultBackend(NOWHERE, keep_results=False), "write keep_results=True"),
    ],
)
async def test_a_result_backend_that_will_not_do(store: AsyncResultBackend[Any] | None, message: str) -> None:
    node = Node(Wire(), Store())
    broker = node.with_result_backend(store) if store is not None else AioPikaBroker("amqp://127.0.0.1:1/")
    engine = TaskiqEngine(broker)
    pages = engine.register(Pipeline([double]))
    with pytest.raises(EngineError, match=message):
        await pages.map([1], engine=engine)
    assert node.wire.sent == []


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"name": "other"}, r"does not know the pipeline 'pages' \(it knows: 'other'\)"),
        ({"name": "pages", "version": "0"}, "has version '0' of the pipeline 'pages', not '1'"),
    ],
)
async def test_a_worker_that_does_not_know_the_pipeline(names: dict[str, Any], message: str) -> None:
    async with network() as net:
        net.worker(double, **names)
        client = net.client()
        with pytest.raises(EngineError, match=message):
            await client.map([1, 2, 3])
        assert now() < LEASE
        assert net.started == []


@pytest.mark.virtual
async def test_a_worker_that_knows_nothing() -> None:
    async with network() as net:
        worker = net.worker(double)
        worker.engine._worker.registered.clear()
        with pytest.raises(EngineError, match="it knows: none"):
            await net.client().map([1])


@pytest.mark.virtual
async def test_a_refusal_of_an_earlier_client_is_forgotten() -> None:
    async with network() as net:
        old = net.worker(double, name="other")
        with pytest.raises(EngineError, match="does not know"):
            await net.client(run_id="r").map([1, 2])
        await old.stop()
        net.worker(double)
        assert await net.client(run_id="r").map([1, 2]) == [2, 4]


@pytest.mark.virtual
async def test_a_payload_that_the_worker_can_not_read() -> None:
    async with network() as net:
        net.worker(double)
        client = net.client()
        chunk = Chunk("batch", "id", client.pipeline, "{}", 1)
        with pytest.raises(EngineError, match=r"a worker could not run a chunk: ValueError\(.the payload"):
            await client.engine.submit(chunk)
            async for _ in client.engine.completed("batch"):
                raise AssertionError("it can't be completed")
        await client.engine.aclose("batch")


@pytest.mark.virtual
async def test_a_chunk_that_ends_its_worker() -> None:
    """taskiq saves what a handler raises that is no Exception, as SystemExit is none."""
    async with network() as net:
        worker = net.worker(double)

        async def exit(task_id: str, result: TaskiqResult[Any]) -> None:
            error = TaskiqResult[Any](is_err=True, return_value=None, execution_time=0.0, error=SystemExit(3))
            worker.store.results[task_id] = error

        worker.store.set_result = exit  # type: ignore[method-assign]
        with pytest.raises(EngineError, match=r"a worker could not run a chunk: SystemExit\(3\)"):
            await net.client(run_id="r").map([1])
        del worker.store.set_result
        assert await net.client(run_id="r").map([1]) == [2]  # it was an earlier one


@pytest.mark.virtual
async def test_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        with pytest.raises(EngineError, match="no worker has given a sign of life for 100 s; start one by"):
            await net.client().map([1])
        assert 100 <= now() < 100 + LEASE
        assert len(net.wire.sent) == 1 + 3  # after 20, 40 and 80 s
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warning.startswith(f"no worker has given a sign of life for {LEASE:g} s; is 'taskiq worker")


@pytest.mark.virtual
async def test_a_worker_that_comes_late_runs_each_chunk_once() -> None:
    async with network() as net:
        client = net.client(window=4)
        batch = asyncio.create_task(client.map(range(8)))
        await sent(net, 3 * 4)
        for _ in range(5):
            net.worker(slow, slots=4)
        assert await batch == [2 * n for n in range(8)]
        assert sorted(net.items) == list(range(8))


@pytest.mark.virtual
async def test_copies_of_one_chunk_that_are_taken_at_the_same_moment() -> None:
    async with network() as net:
        batch = asyncio.create_task(net.client().map([1]))
        await sent(net, 3)
        for _ in range(3):
            net.worker(slow)
        assert await batch == [2]
        assert net.items == [1]


@pytest.mark.virtual
async def test_a_message_that_got_lost_is_sent_again() -> None:
    async with network() as net:
        batch = asyncio.create_task(net.client().map([1]))
        await sent(net, 1)
        net.wire.ready.get_nowait()
        net.worker(double)
        assert await batch == [2]
        assert 2.5 * LEASE < now() < 4 * LEASE


@pytest.mark.virtual
async def test_a_queue_is_no_silence() -> None:
    """What waits its turn is not sent again while the workers are seen at work."""
    async with network() as net:
        net.worker(slow, slots=1)
        assert await net.client(chunk_size=1, window=10).map(range(6)) == [2 * n for n in range(6)]
        assert now() > 6 * 30 > 100
        assert len(net.wire.sent) == 6


# -- outages


class Failing(Node):
    async def startup(self) -> None:
        await self.kick(BrokerMessage(task_id="", task_name="", message=b"", labels={}))


@pytest.mark.virtual
@pytest.mark.parametrize("hangs", [True, False])
async def test_the_broker_can_not_be_reached_at_first(hangs: bool) -> None:
    node = Failing(Wire(), Store())
    node.fault, node.hangs = ConnectionError("refused"), hangs
    engine = TaskiqEngine(node, outage_timeout=5)
    with pytest.raises(EngineError, match=r"the broker can't be reached: .*; is it running"):
        async with engine:
            raise AssertionError("it is not open")
    assert now() == (5 if hangs else 0)
    assert node.shutdowns == 1


async def test_entered_twice_it_is_left_once() -> None:
    node = Node(Wire(), Store())
    engine = TaskiqEngine(node)
    async with engine:
        async with engine:
            pass
        assert node.shutdowns == 0
    assert node.shutdowns == 1
    async with engine:
        pass
    assert node.shutdowns == 2


class Stuck(Node):
    async def shutdown(self) -> None:
        await self.kick(BrokerMessage(task_id="", task_name="", message=b"", labels={}))


@pytest.mark.virtual
@pytest.mark.parametrize("hangs", [True, False])
async def test_a_broker_that_can_not_be_left(hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    node = Stuck(Wire(), Store())
    with pytest.raises(ZeroDivisionError):
        async with TaskiqEngine(node):
            node.fault, node.hangs = ConnectionError("gone"), hangs
            raise ZeroDivisionError
    assert "<TaskiqEngine on Stuck> could not leave its broker" in caplog.text
    assert now() == (5 if hangs else 0)


@pytest.mark.virtual
@pytest.mark.parametrize("hangs", [True, False])
async def test_the_broker_is_down(hangs: bool) -> None:
    async with network() as net:
        net.worker(double)
        client = net.client()
        client.node.fault, client.node.hangs = ConnectionError("refused"), hangs
        with pytest.raises(
            EngineError,
            match=rf"^the broker can't be reached: {DOWN}[^;]*$",
        ):
            await client.map([1])
        assert 9 < now() <= 10


@pytest.mark.virtual
async def test_the_broker_is_down_for_a_while() -> None:
    async with network() as net:
        net.worker(double)
        client = net.client(window=1)
        client.node.fault = ConnectionError("refused")
        asyncio.get_running_loop().call_later(9, setattr, client.node, "fault", None)
        assert await client.map(range(6)) == [0, 2, 4, 6, 8, 10]
        assert 9 <= now() < 10


@pytest.mark.virtual
async def test_a_broker_that_was_not_started_is_said_at_once() -> None:
    store = Store()
    engine = TaskiqEngine(AioPikaBroker("amqp://127.0.0.1:1/").with_result_backend(store))
    pages = engine.register(Pipeline([double]))
    with pytest.raises(EngineError, match=r"NoStartupError.*; write 'async with engine:' around it"):
        await pages.map([1], engine=engine)
    broker = PullBasedJetStreamBroker("nats://127.0.0.1:1").with_result_backend(store)
    engine = TaskiqEngine(broker)
    engine.register(pages)
    with pytest.raises(EngineError, match=r"AttributeError.*; write 'async with engine:' around it"):
        await pages.map([1], engine=engine)
    assert now() == 0


@pytest.mark.virtual
@pytest.mark.parametrize("hangs", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 15.0])
async def test_the_results_can_not_be_reached(
    seconds: float, hangs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with network() as net:
        net.worker(slow)
        client = net.client()
        batch = asyncio.create_task(client.map([1]))
        if seconds:
            await asyncio.sleep(seconds)
        client.store.fault, client.store.hangs = ConnectionError("refused"), hangs
        with pytest.raises(
            EngineError,
            match=f"the result backend can't be reached: {DOWN}",
        ):
            await batch
        assert seconds + 9 < now() <= seconds + 10 + 1 + 5  # 5 to leave a mark
        assert "could not forget a batch" in caplog.text


@pytest.mark.virtual
@pytest.mark.parametrize("method", ["is_result_ready", "get_result", "get_progress"])
async def test_the_results_can_not_be_reached_for_a_while(method: str) -> None:
    async with network() as net:
        net.worker(slow)
        client = net.client()
        batch = asyncio.create_task(client.map([1, 2, 3]))
        await asyncio.sleep(25)
        client.store.fault_of[method] = ConnectionError("refused")
        await asyncio.sleep(9)
        client.store.fault_of.clear()
        assert await batch == [2, 4, 6]
        assert len(net.started) == 3


@pytest.mark.virtual
async def test_a_worker_that_can_not_reach_the_results(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        worker = net.worker(double)
        worker.store.fault = ConnectionError("refused")
        with pytest.raises(EngineError, match="no worker has given a sign of life"):
            await net.client().map([1])
        assert "a worker could not run pages@1:" in caplog.text
        assert net.started == []


@pytest.mark.virtual
async def test_a_worker_that_gets_no_answer_of_the_results(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        worker = net.worker(double)
        worker.store.hangs = True
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(12)
        assert "TimeoutError" in caplog.text
        worker.store.hangs = False
        assert await batch == [2]


@pytest.mark.virtual
async def test_a_worker_that_can_not_say_that_it_refuses(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        worker = net.worker(double, name="other")
        worker.store.fault_of["set_progress"] = ConnectionError("refused")
        with pytest.raises(EngineError, match="no worker has given a sign of life"):
            await net.client().map([1])
        assert "a worker could not run pages@1:" in caplog.text


@pytest.mark.virtual
@pytest.mark.parametrize("seconds", [9, 15])
async def test_a_result_that_can_not_be_saved_at_once(seconds: int, caplog: pytest.LogCaptureFixture) -> None:
    """It is saved within ``outage_timeout``; else the chunk runs again, and no worker counts as dead."""
    async with network() as net:
        worker = net.worker(slow)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(29)
        worker.store.fault = ConnectionError("refused")
        await asyncio.sleep(seconds + 1)
        worker.store.fault = None
        assert await batch == [2]
        assert net.items == [1] * (1 if seconds < 10 else 2)
        assert ("a worker could not run" in caplog.text) is (seconds > 10)


@pytest.mark.virtual
async def test_a_result_that_taskiq_could_not_save(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        worker = net.worker(double)
        worker.store.fault_of["set_result"] = ConnectionError("refused")
        batch = asyncio.create_task(net.client().map([1]))
        await started(net, 1)
        await asyncio.sleep(1)
        assert net.states == ["ended"]
        worker.store.fault_of.clear()
        assert await batch == [2]
        assert net.items == [1, 1]
        [record] = net.store.progress.values()
        assert deaths_of(record) == 0


@pytest.mark.virtual
async def test_a_beat_that_could_not_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        worker = net.worker(slow)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(5)
        worker.store.fault = ConnectionError("refused")
        await asyncio.sleep(5)
        worker.store.fault = None
        assert await batch == [2]
        assert caplog.text.count("a worker could not renew its lease of pages@1:") == 2
        assert net.items == [1]


@pytest.mark.virtual
async def test_a_result_that_expires_under_the_eyes_of_the_client() -> None:
    async with network() as net:
        net.worker(double)
        client = net.client()
        get_result = client.store.get_result

        async def expire(task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
            net.store.results.clear()
            client.store.get_result = get_result  # type: ignore[method-assign]
            return await get_result(task_id)

        client.store.get_result = expire  # type: ignore[method-assign]
        assert await client.map([1]) == [2]
        assert net.items == [1, 1]


# -- a client that is started again


@pytest.mark.virtual
async def test_what_has_finished_is_not_run_again() -> None:
    async with network() as net:
        net.worker(fails_once(3))
        first = await net.client(run_id="r").map(range(6), return_exceptions=True)
        assert isinstance(first[3], StageExecutionError)
        count = len(net.started)
        second = await net.client(run_id="r").map(range(6))
        assert second == [0, 2, 4, 6, 8, 10]
        assert net.items[count:] == [3]  # the failed one only
        assert net.started[-1][1] == "r/3"
        assert await net.client(run_id="r2").map(range(6)) == second
        assert len(net.started) == count + 1 + 6


@pytest.mark.virtual
async def test_what_runs_is_waited_for() -> None:
    async with network() as net:
        net.worker(slow)
        client = net.client(run_id="r")
        batch = asyncio.create_task(client.map(range(4)))
        await asyncio.sleep(10)
        await client.die(batch)
        await asyncio.sleep(5)
        assert await net.client(run_id="r").map(range(4)) == [0, 2, 4, 6]
        assert len(net.started) == 4
        assert len(net.wire.sent) == 2
        assert now() < 31


@pytest.mark.virtual
async def test_what_ran_when_its_worker_died_as_well_is_sent_again() -> None:
    async with network(redelivers=False) as net:
        worker = net.worker(slow)
        client = net.client(run_id="r")
        batch = asyncio.create_task(client.map([1, 2]))
        await asyncio.sleep(10)
        await client.die(batch)
        await worker.die()
        net.worker(double)
        assert await net.client(run_id="r").map([1, 2]) == [2, 4]


@pytest.mark.virtual
async def test_what_was_released_is_sent_at_once() -> None:
    async with network(redelivers=False) as net:
        worker = net.worker(slow)
        client = net.client(run_id="r")
        batch = asyncio.create_task(client.map([1, 2]))
        await asyncio.sleep(10)
        await client.die(batch)
        await worker.stop()
        assert net.states == ["released"]
        net.worker(double)
        assert await net.client(run_id="r").map([1, 2]) == [2, 4]
        assert now() < 11


# -- leases


@pytest.mark.virtual
async def test_a_healthy_chunk_that_is_delivered_again_is_dropped() -> None:
    async with network() as net:
        net.worker(slow, slots=1)
        batch = asyncio.create_task(net.client().map([1, 2]))
        await asyncio.sleep(5)
        other = net.worker(double)
        net.wire.ready.put_nowait(net.wire.sent[0])
        await asyncio.sleep(LEASE)
        assert other.node.unacknowledged == []
        assert await batch == [2, 4]
        assert net.items == [1, 2]


@pytest.mark.virtual
async def test_a_delivery_just_before_the_end_is_dropped() -> None:
    async with network() as net:
        net.worker(slow, slots=1)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(29.9)
        net.worker(double)
        net.wire.ready.put_nowait(net.wire.sent[0])
        assert await batch == [2]
        await asyncio.sleep(3 * LEASE)
        net.store.progress.clear()
        net.wire.ready.put_nowait(net.wire.sent[0])  # and one after it
        await asyncio.sleep(3 * LEASE)
        assert net.items == [1]


@pytest.mark.virtual
async def test_a_delivery_while_the_result_is_being_saved_is_dropped() -> None:
    async with network() as net:
        worker = net.worker(double, slots=1)
        save = worker.store.set_result

        async def slowly(task_id: str, result: TaskiqResult[Any]) -> None:
            await asyncio.sleep(3)
            await save(task_id, result)

        worker.store.set_result = slowly  # type: ignore[method-assign]
        batch = asyncio.create_task(net.client(run_id="r").map([1]))
        await until(lambda: net.states == ["ended"])
        other = net.worker(double)
        net.wire.ready.put_nowait(net.wire.sent[0])
        assert await net.client(run_id="r").map([1]) == await batch == [2]
        await until(lambda: len(net.wire.delivered) == 2 and not other.node.unacknowledged)
        assert net.items == [1]
        assert len(net.wire.sent) == 1


@pytest.mark.virtual
async def test_a_delivery_in_the_same_process_is_dropped() -> None:
    async with network() as net:
        net.worker(slow, slots=2)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(5)
        net.wire.ready.put_nowait(net.wire.sent[0])
        assert await batch == [2]
        assert net.items == [1]


@pytest.mark.virtual
@pytest.mark.parametrize("redelivers", [True, False])
async def test_a_silent_chunk_is_taken_over(redelivers: bool) -> None:
    async with network(redelivers=redelivers) as net:
        worker = net.worker(slow)
        net.worker(double, slots=1)
        batch = asyncio.create_task(net.client(chunk_size=1).map([1, 2, 3]))
        await started(net, 3)
        await asyncio.sleep(5)
        await worker.die()
        assert await batch == [2, 4, 6]
        died = [item for name, _, item in net.started if name == "w0"]
        assert sorted(net.items) == sorted([1, 2, 3, *died])
        assert now() < 5 + (4 if redelivers else 6) * LEASE


@pytest.mark.virtual
async def test_a_silent_chunk_is_missed_while_others_live() -> None:
    async def handler(value: float) -> float:
        await asyncio.sleep(value)
        return value

    async with network(redelivers=False) as net:
        net.worker(handler, slots=1)
        batch = asyncio.create_task(net.client(chunk_size=1).map([50, 500]))
        await started(net, 1)
        net.worker(handler, slots=1)
        await started(net, 2)
        [dying] = [worker for worker, _, value in net.started if value == 50]
        await net.workers[int(dying[1:])].die()
        net.worker(handler)
        await started(net, 3)
        assert now() < 10 * LEASE
        assert await batch == [50, 500]


@pytest.mark.virtual
async def test_two_deliveries_of_a_silent_chunk_run_it_once() -> None:
    async with network(redelivers=False) as net:
        worker = net.worker(slow)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(5)
        await worker.die()
        for _ in range(3):
            net.wire.ready.put_nowait(net.wire.sent[0])
            net.worker(slow)
        assert await batch == [2]
        assert net.items == [1, 1]


@pytest.mark.virtual
async def test_who_dies_before_a_chunk_begins_is_not_counted() -> None:
    async with network(redelivers=False) as net:
        first = net.worker(slow)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(5)
        await first.die()
        for _ in range(4):
            net.wire.ready.put_nowait(net.wire.sent[0])
            worker = net.worker(double)
            await until(lambda: net.states == ["claimed"])
            await worker.die()
        net.worker(double)
        assert await batch == [2]
        assert net.items == [1, 1]


@pytest.mark.virtual
@pytest.mark.parametrize("redelivers", [True, False])
async def test_a_poison_item_alone_fails(redelivers: bool) -> None:
    async with network(redelivers=redelivers) as net:
        deaths: list[asyncio.Task[None]] = []

        async def replace(worker: Worker) -> None:
            await worker.die()
            net.worker(handler)

        async def handler(value: Any) -> Any:
            await asyncio.sleep(0.1)
            if value == "poison":
                [worker] = [worker for worker in net.workers if not worker.listening.done()]
                deaths.append(asyncio.create_task(replace(worker)))
                await asyncio.Event().wait()
            return value

        net.worker(handler, slots=2)
        items = ["a", "b", "poison", "c", "d", "e"]
        results = await net.client(chunk_size=3).map(items, return_exceptions=True)
        await asyncio.gather(*deaths)
        error = results.pop(2)
        assert results == ["a", "b", "c", "d", "e"]
        assert isinstance(error, StageExecutionError)
        assert (error.item_index, error.item, error.stage_name) == (2, "poison", "pages")
        assert isinstance(error.original_error, WorkerLost)
        assert str(error.original_error) == "2 workers that ran it have died"
        assert len(deaths) == 6  # with others, by itself, and alone


@pytest.mark.virtual
async def test_a_worker_that_is_stopped_releases_its_chunks() -> None:
    async with network(redelivers=False) as net:
        worker = net.worker(slow, slots=2)
        batch = asyncio.create_task(net.client().map(range(4)))
        await asyncio.sleep(5)
        await worker.stop()
        assert net.states == ["released", "released"]
        assert worker.node.unacknowledged == []
        assert worker.node.cancelling == [0, 0]
        net.worker(double)
        assert await batch == [0, 2, 4, 6]
        assert now() < 5 + LEASE / 2
        assert [deaths_of(record) for record in net.store.progress.values()] == [0, 0]  # no death


@pytest.mark.virtual
async def test_a_worker_that_is_stopped_before_it_begins() -> None:
    async with network(redelivers=False) as net:
        net.worker(slow)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(5)
        net.wire.ready.put_nowait(net.wire.sent[0])
        other = net.worker(double)
        net.workers[0].receiver.sem_prefetch = asyncio.Semaphore(0)
        await asyncio.sleep(1)
        await other.stop()
        assert net.store.results == {}
        assert await batch == [2]
        assert net.items == [1]


# -- cancelling


@pytest.mark.virtual
async def test_a_beat_that_is_deaf_to_its_cancellation() -> None:
    """Calls of redis-py let a cancellation get lost, now and then."""
    async with network() as net:
        worker = net.worker(slow)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(29.7)
        worker.store.deaf = 0.5
        assert await batch == [2]
        assert net.states == ["ended"]
        await asyncio.sleep(LEASE)


@pytest.mark.virtual
async def test_a_late_beat_does_not_hide_that_a_chunk_was_released() -> None:
    async with network() as net:
        worker = net.worker(forever)
        batch = asyncio.create_task(net.client().map([1]))
        await asyncio.sleep(9.9)
        worker.store.deaf = 0.8  # for the beat at 10
        await asyncio.sleep(0.2)
        worker.store.deaf = None
        await worker.stop()
        assert net.states == ["released"]
        net.worker(double)
        assert await batch == [2]


@pytest.mark.virtual
@pytest.mark.parametrize("seconds", [0.5, 30])
async def test_results_that_are_deaf_to_a_cancellation(seconds: float) -> None:
    async with network() as net:
        client = net.client()
        client.store.deaf = seconds
        batch = asyncio.create_task(client.map([1, 2, 3]))
        await asyncio.sleep(0.25)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert now() < 0.25 + 5 + 2
        client.store.fault = ConnectionError("nobody asks for it")
        await asyncio.sleep(60)  # until all are answered
        assert net.wire.sent == []


@pytest.mark.virtual
async def test_a_call_that_is_deaf_is_given_a_moment() -> None:
    store = Store()
    store.deaf = 0.5
    with pytest.raises(TimeoutError, match=r"no answer for 0\.1 s"):
        await _taskiq_worker.apart(store.is_result_ready("any"), 0.1)
    assert now() == 0.5


@pytest.mark.virtual
async def test_results_that_are_deaf_to_a_timeout() -> None:
    async with network() as net:
        client = net.client()
        client.store.deaf = 30
        with pytest.raises(EngineError, match=r"can't be reached: TimeoutError: no answer for 10 s$"):
            await client.map([1])
        await asyncio.sleep(60)


@pytest.mark.virtual
async def test_cancelling_stops_the_workers() -> None:
    async with network() as net:
        net.worker(forever, slots=2)
        batch = asyncio.create_task(net.client(window=3).map(range(10)))
        await asyncio.sleep(5)
        assert len(net.started) == 4
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert now() < 5.1
        await asyncio.sleep(LEASE)
        assert net.states == ["released", "released"]
        assert net.wire.ready.empty()
        assert net.workers[0].node.unacknowledged == []
        assert len(net.started) == 4  # the third chunk is dropped


@pytest.mark.virtual
async def test_cancelling_while_a_chunk_is_being_sent() -> None:
    async with network() as net:
        client = net.client()
        batch = asyncio.create_task(client.map(range(4)))
        await asyncio.sleep(0)
        client.node.hangs = True
        await asyncio.sleep(1)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert [name for name in net.store.results if name.startswith("async_pipeline.cancelled:")]


@pytest.mark.virtual
async def test_a_batch_that_has_ended_leaves_no_mark() -> None:
    async with network() as net:
        net.worker(double)
        client = net.client()
        assert await client.map([1, 2, 3]) == [2, 4, 6]
        assert sorted(name.split(":")[0] for name in net.store.results) == ["pages@1", "pages@1"]
        await client.engine.aclose("unknown")


@pytest.mark.virtual
async def test_cancelling_while_the_results_can_not_be_reached(caplog: pytest.LogCaptureFixture) -> None:
    async with network() as net:
        client = net.client()
        batch = asyncio.create_task(client.map([1]))
        await asyncio.sleep(5)
        client.store.hangs = True
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert now() == 10
        assert "could not forget a batch" in caplog.text


@pytest.mark.virtual
async def test_results_that_come_out_of_order_are_found() -> None:
    async def handler(value: int) -> int:
        await asyncio.sleep(50 if value < 12 else 1)
        return value

    async with network() as net:
        net.worker(handler, slots=30)
        found: list[int] = []
        client = net.client(chunk_size=1, window=16)
        stream = client.pipeline.stream(range(16), 16, engine=client.engine, ordered=False)
        async with stream as results:
            async for value in results:
                found.append(value)
                assert len(found) > 4 or now() < 2
        assert sorted(found[:4]) == [12, 13, 14, 15]
        assert sorted(found) == list(range(16))


@pytest.mark.virtual
async def test_an_error_of_the_workers_own_class_arrives_as_text() -> None:
    class OwnError(Exception):
        pass

    async def handler(value: Any) -> NoReturn:
        raise OwnError("own")

    async with network() as net:
        net.worker(handler)
        [error] = await net.client().map([1], return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, RecordedError)


def test_without_taskiq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "taskiq", None)
    again: Any = importlib.util.spec_from_file_location("async_pipeline.integrations._again", FILE)
    with pytest.raises(
        ImportError,
        match=r"^taskiq support requires installing async-pipeline\[taskiq\]: pip install ",
    ):
        again.loader.exec_module(importlib.util.module_from_spec(again))
