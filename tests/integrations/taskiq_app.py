"""What the clients and workers of ``test_taskiq_servers.py`` import; as a program, it is a client.

Workers: ``taskiq worker tests.integrations.taskiq_app:broker``. The environment, which both share, sets all.
"""

import asyncio
import json
import os
import sys
from typing import Any

from taskiq import AsyncBroker
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from async_pipeline import Pipeline, StageExecutionError, item_key
from async_pipeline.errors import EngineError
from async_pipeline.integrations.taskiq import TaskiqEngine


def setting(name: str, default: str = "") -> str:
    return os.environ.get(f"TASKIQ_APP_{name}", default)


KIND, URL, QUEUE = setting("KIND", "redis"), setting("URL"), setting("QUEUE", "tests")


def redis() -> AsyncBroker:
    return RedisStreamBroker(
        URL,
        queue_name=QUEUE,
        consumer_id="0",
        xread_count=1,
        xread_block=200,
        idle_timeout=700,
        unacknowledged_lock_timeout=5,
    )


def rabbitmq() -> AsyncBroker:
    from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

    forgotten: Any = {"x-expires": 600_000}
    return AioPikaBroker(
        URL,
        qos=2,
        exchange=Exchange(name=QUEUE, auto_delete=True),
        task_queues=[Queue(name=QUEUE, arguments=forgotten)],
        dead_letter_queue=Queue(name=f"{QUEUE}.dead", arguments=forgotten),
    )


def nats() -> AsyncBroker:
    from nats.js.api import ConsumerConfig
    from taskiq_nats import PullBasedJetStreamBroker

    config = ConsumerConfig(durable_name=QUEUE, ack_wait=1)
    return PullBasedJetStreamBroker(
        URL, subject=QUEUE, stream_name=QUEUE, durable=QUEUE, consumer_config=config
    )


results: Any = RedisAsyncResultBackend(
    setting("RESULTS", "redis://127.0.0.1:1"), prefix_str=QUEUE, result_ex_time=600
)
broker = {"redis": redis, "rabbitmq": rabbitmq, "nats": nats}[KIND]().with_result_backend(results)
engine = TaskiqEngine(
    broker,
    chunk_size=int(setting("CHUNK", "100")),
    lease=float(setting("LEASE", "1")),
    run_id=setting("RUN_ID") or None,
    start_timeout=40,
    outage_timeout=float(setting("OUTAGE", "10")),
)


async def work(value: Any) -> Any:
    log = os.open(setting("LOG", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{item_key()} {os.getpid()}\n".encode())
    os.close(log)
    await asyncio.sleep(float(setting("DELAY", "0")))
    if value == int(setting("POISON", "-1")):
        os._exit(1)
    return value * 2


pages = engine.register(Pipeline([work], name="pages"), version="1")


async def main(count: int, concurrency: int) -> dict[str, Any]:
    """Run a batch, and return what went wrong: nothing, the indices of lost items, or the engine's error."""
    try:
        async with engine:
            found: list[Any] = await pages.map(
                range(count), concurrency, engine=engine, return_exceptions=True
            )
    except EngineError as error:
        return {"error": str(error)}
    wrong = [index for index, value in enumerate(found) if value != 2 * index]
    lost = [repr(found[index].original_error) for index in wrong if type(found[index]) is StageExecutionError]
    return {"wrong": wrong, "lost": lost}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))))
