"""The servers that some tests need, each by the variable that names it; without it, the test is skipped.

``.ci/run`` starts all of them and does not go on without one, so that nothing is skipped there. Several runs
of the tests share a server: a test gives its queues, streams and keys names of their own, and removes them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import async_pipeline

ROOT = Path(__file__).parents[2]
LIBRARY = Path(async_pipeline.__file__).parents[1]

REDIS = """\
redis-server --port 6399 --save '' & export REDIS_URL=redis://127.0.0.1:6399
or: docker run --rm -d -p 127.0.0.1:6399:6379 redis"""

RABBITMQ = """\
docker run --rm -d -p 127.0.0.1:5699:5672 rabbitmq; export RABBITMQ_URL=amqp://guest:guest@127.0.0.1:5699/
or that of a package, which runs as a service: export RABBITMQ_URL=amqp://guest:guest@127.0.0.1:5672/"""

NATS = """\
nats-server --addr 127.0.0.1 --port 4299 --jetstream --store_dir "$(mktemp -d)" & export NATS_URL=nats://127.0.0.1:4299
or: docker run --rm -d -p 127.0.0.1:4299:4222 nats --jetstream"""


def redis_url() -> str:
    """The URL of a Redis, as ``redis://127.0.0.1:6399``, of ``REDIS_URL``.

    The test, or the module, that asks for it where there is none is skipped.
    """
    return _named("REDIS_URL", REDIS)


def rabbitmq_url() -> str:
    """The URL of a RabbitMQ, as ``amqp://guest:guest@127.0.0.1:5699/``, of ``RABBITMQ_URL``; or a skip."""
    return _named("RABBITMQ_URL", RABBITMQ)


def nats_url() -> str:
    """The URL of a NATS with JetStream, as ``nats://127.0.0.1:4299``, of ``NATS_URL``; or a skip."""
    return _named("NATS_URL", NATS)


def _named(variable: str, how_to: str) -> str:
    url = os.environ.get(variable, "")
    if not url:
        pytest.skip(f"start one and name it in {variable}:\n{how_to}", allow_module_level=True)
    return url


@contextmanager
def taskiq_workers(broker: str, **environment: str) -> Iterator[None]:
    """Two of taskiq's own workers of a ``module:broker``, for as long as the block runs."""
    command = [sys.executable, "-m", "taskiq", "worker", broker]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--max-async-tasks", "2", "--max-prefetch", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{LIBRARY}{os.pathsep}{ROOT}"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C for the tests is none for them
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
