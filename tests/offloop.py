"""Handlers for test_executor.py that another process or interpreter can import."""

import os
import signal
import threading
import time
from contextvars import ContextVar
from pathlib import Path

from async_pipeline import Finish, staged

PATIENCE = 10  # seconds until a test that waits for a thread or a process has failed

user = ContextVar("user", default="nobody")


def double(value: int) -> int:
    return 2 * value


@staged
def triple(value: int) -> int:
    return 3 * value


class Times:
    @staged
    def four(value: int) -> int:  # noqa: N805 - no method: the class is a namespace here
        return 4 * value


def process_id(value: object) -> int:
    return os.getpid()


def who(value: object) -> str:
    return user.get()


def with_context(value: int, context: object = None) -> tuple[int, object]:
    return value, context


def fail(value: int) -> int:
    raise ValueError(value)


def fail_once(marker: Path) -> str:
    if marker.exists():
        return "done"
    marker.touch()
    raise ValueError("the first time")


def finish(value: int) -> int:
    raise Finish(value)


def stop(value: object) -> object:
    return next(iter(()))


async def double_later(value: int) -> int:
    return 2 * value


def lock(value: object) -> object:
    return threading.Lock()


def kill_own_process(value: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_file(folder: Path) -> None:
    """Wait for ``folder/go``, and leave ``folder/gone``."""
    end = time.monotonic() + PATIENCE
    while not (folder / "go").exists() and time.monotonic() < end:
        time.sleep(0.001)
    (folder / "gone").touch()
