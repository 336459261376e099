"""A batch over the workers of taskiq: which number's Collatz sequence is the longest?

    python examples/spread_over_workers.py                         # in this process, with no server

It needs ``pip install 'async-pipeline[taskiq]'``. To spread it, have a Redis, and ``taskiq-redis``;
with RabbitMQ (``taskiq-aio-pika``) or NATS JetStream (``taskiq-nats``) as the broker, it keeps the results:

    export BROKER_URL=redis://127.0.0.1                            # or amqp://..., nats://... and REDIS_URL
    taskiq worker examples.spread_over_workers:broker --workers 2 --max-async-tasks 2 --max-prefetch 0 \\
        --wait-tasks-timeout 20 &
    python examples/spread_over_workers.py --below 1000000 --run-id today

Kill a worker meanwhile, and the batch ends all the same. Kill the client, and start it again with the same
``--run-id``: what has finished without it is not run again.
"""

import argparse
import asyncio
import os
import sys
import time
from typing import Any

from taskiq import AsyncBroker, InMemoryBroker

from async_pipeline import EngineError, Pipeline, Stage
from async_pipeline.integrations.taskiq import TaskiqEngine

BROKER_URL = os.environ.get("BROKER_URL", "")
REDIS_URL = BROKER_URL if BROKER_URL.startswith("redis") else os.environ.get("REDIS_URL", "redis://127.0.0.1")
QUEUE = os.environ.get("QUEUE", "collatz")
KEPT = 3600  # seconds, for a client that comes back


def make_broker() -> AsyncBroker:
    if not BROKER_URL:
        return InMemoryBroker()
    from taskiq_redis import RedisAsyncResultBackend

    results: Any = RedisAsyncResultBackend(REDIS_URL, result_ex_time=KEPT)
    return make_queue().with_result_backend(results)


def make_queue() -> AsyncBroker:
    if BROKER_URL.startswith("amqp"):
        from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

        exchange, queue = Exchange(name=QUEUE), Queue(name=QUEUE)
        return AioPikaBroker(BROKER_URL, qos=2, exchange=exchange, task_queues=[queue])
    if BROKER_URL.startswith("nats"):
        from taskiq_nats import PullBasedJetStreamBroker

        return PullBasedJetStreamBroker(BROKER_URL, subject=QUEUE, stream_name=QUEUE, durable=QUEUE)
    from taskiq_redis import RedisStreamBroker

    return RedisStreamBroker(
        BROKER_URL, QUEUE, xread_count=1, consumer_id="0", unacknowledged_lock_timeout=10, maxlen=10_000
    )


broker = make_broker()


def count_steps(number: int) -> int:
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps


def find_longest(numbers: tuple[int, int]) -> tuple[int, int]:
    """Which number from the first up to the second one takes the most steps, and how many."""
    longest = max(range(*numbers), key=count_steps)
    return longest, count_steps(longest)


def sign(found: tuple[int, int]) -> dict[str, int]:
    number, steps = found
    return {"number": number, "steps": steps, "worker": os.getpid()}


def blocks(below: int, size: int = 1000) -> list[tuple[int, int]]:
    return [(start, min(start + size, below)) for start in range(1, below, size)]


engine = TaskiqEngine(broker)  # another one may come back to a run_id, with the same workers
collatz: Pipeline[tuple[int, int], dict[str, int]] = engine.register(
    # off the event loop, which has to show that this worker lives
    Pipeline([Stage("find_longest", find_longest, executor="thread"), sign], name="collatz"),
    version="1",
)


def show(done: int, failed: int, total: int | None) -> None:
    print(f"\r{done} of {total} blocks", end="\n" if done == total else "", file=sys.stderr, flush=True)


async def search(below: int, run_id: str | None) -> list[dict[str, int]]:
    """Return what is the longest sequence of each block."""
    engine = TaskiqEngine(broker, chunk_size=10, run_id=run_id, start_timeout=30)
    async with engine:
        return await collatz.map(blocks(below), 2, engine=engine, progress=show)


def main() -> int:
    parser = argparse.ArgumentParser(description="Which number's Collatz sequence is the longest?")
    parser.add_argument("--below", type=int, default=100_000, help="look at the numbers below this one")
    parser.add_argument("--run-id", help="a name, by which a client started again finds what has finished")
    options = parser.parse_args()
    if options.below < 2:
        parser.error("--below must be at least 2")
    started = time.perf_counter()
    try:
        found = asyncio.run(search(options.below, options.run_id))
    except EngineError as error:
        print(f"the workers can't be used: {error}", file=sys.stderr)
        return 1
    longest = max(found, key=lambda block: block["steps"])
    print(f"below {options.below:,}, {longest['number']:,} takes the most steps: {longest['steps']}")
    workers = len({block["worker"] for block in found})
    print(f"by {workers} worker{'s' * (workers > 1)}, in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
