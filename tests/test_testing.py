"""The virtual clock: it jumps when nothing runs, waits for the world, and never hangs."""

import asyncio
import math
import pickle
import socket
import threading
import time
from typing import Any

import pytest

from async_pipeline import DeadlockError, PipelineError, Stage, StageExecutionError
from async_pipeline.testing import VirtualClockLoop
from tests.helpers import run_virtually


def now() -> float:
    return asyncio.get_running_loop().time()


def test_the_clock_jumps_to_each_timer_in_turn() -> None:
    seen = []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((seconds, now()))

    async def main() -> None:
        assert now() == 0.0
        await asyncio.gather(*map(sleep, [3600, 0.25, 1e6]))

    started = time.monotonic()
    run_virtually(main())
    assert seen == [(0.25, 0.25), (3600, 3600), (1e6, 1e6)]
    assert time.monotonic() - started < 60


def test_it_stands_still_while_code_runs() -> None:
    async def main() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        assert now() == 0.0

    run_virtually(main())


def test_timeouts_follow_it() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(10)
        assert now() == 5

    run_virtually(main())


def test_users_test_their_own_backoff_with_it() -> None:
    calls = []

    async def always_down(value: str) -> None:
        calls.append(now())
        raise ConnectionError

    async def main() -> None:
        stage = Stage("down", always_down, retries=4, retry_delay=60, backoff="exponential")
        with pytest.raises(StageExecutionError):
            await stage.run("x")

    run_virtually(main())
    assert calls == [0, 60, 180, 420, 900]


def test_far_from_zero_small_steps_are_taken_too() -> None:
    async def main() -> None:
        await asyncio.sleep(1e17)
        before = now()
        await asyncio.sleep(1e-3)  # less than the clock can show here
        assert now() == before == 1e17
        await asyncio.sleep(math.ulp(before))
        assert now() == math.nextafter(before, math.inf)

    run_virtually(main())


def test_a_timer_that_is_set_for_now_again_and_again_does_not_stop_the_clock() -> None:
    # a rate limiter waits for what a rounding left: 0.30000000000000004 - 0.3 s, which is no time from now
    async def main() -> float:
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        turns = 0

        def wait_for_the_rest() -> None:
            nonlocal turns
            turns += 1
            rest = 1e6 + 1e-12 - now()
            if rest > 0:
                loop.call_at(now() + rest / 1e6, wait_for_the_rest)
            else:
                done.set_result(None)

        await asyncio.sleep(1e6 - 1e-9)
        wait_for_the_rest()
        await done
        assert turns < 1000
        return now()

    assert run_virtually(main()) == pytest.approx(1e6, abs=1e-6)


def test_it_stands_still_again_after_it_had_to_be_pushed() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        while now() == 0:
            wait = loop.create_future()
            loop.call_at(0, wait.set_result, None)
            await wait
        pushed = now()
        for _ in range(10):
            await asyncio.sleep(0)
        assert now() == pushed

    run_virtually(main())


def test_a_few_timers_for_now_do_not_move_it() -> None:
    async def main() -> None:
        for _ in range(60):
            done = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_at(now(), done.set_result, None)
            await done
        assert now() == 0.0

    run_virtually(main())


def test_a_deadlock_raises_at_once_and_lists_the_tasks() -> None:
    cleaned = []

    async def wait_for_nobody() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned.append(True)

    with pytest.raises(DeadlockError, match="wait_for_nobody") as caught:
        run_virtually(wait_for_nobody())
    assert cleaned == [True]
    assert isinstance(caught.value, PipelineError)
    assert len(caught.value.tasks) == 1
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.tasks, str(copied)) == (caught.value.tasks, str(caught.value))


@pytest.mark.threads
def test_it_waits_for_a_thread_and_does_not_jump() -> None:
    release = threading.Event()

    async def main() -> float:
        loop = asyncio.get_running_loop()
        call = asyncio.create_task(asyncio.to_thread(release.wait, 30))
        loop.call_later(0.05, release.set)
        loop.call_later(3600, lambda: None)
        assert await call
        return loop.time()

    assert 0.05 <= run_virtually(main()) < 60


@pytest.mark.threads
def test_a_timer_fires_in_real_time_while_a_thread_runs() -> None:
    release = threading.Event()

    async def main() -> None:
        call = asyncio.create_task(asyncio.to_thread(release.wait, 30))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.shield(call)
        release.set()
        await call

    run_virtually(main())


@pytest.mark.threads
def test_the_shutdown_of_the_default_executor_is_no_deadlock() -> None:
    release = threading.Event()

    async def main() -> None:
        call = asyncio.get_running_loop().run_in_executor(None, release.wait, 30)
        await asyncio.sleep(0)
        call.cancel()
        threading.Timer(0.05, release.set).start()

    run_virtually(main())
    assert release.is_set()


def test_a_socket_is_waited_for_in_real_time() -> None:
    async def main() -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            loop = asyncio.get_running_loop()
            reading = asyncio.create_task(loop.sock_recv(ours, 10))
            await asyncio.sleep(0)
            timer = threading.Timer(0.05, theirs.send, [b"hello"])
            timer.start()
            result = await reading
            timer.join()
            assert 0 < loop.time() < 60
            return result

    assert run_virtually(main()) == b"hello"


def test_it_jumps_again_when_the_socket_is_gone() -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        server.close()
        await server.wait_closed()
        await asyncio.sleep(3600)
        assert now() >= 3600

    run_virtually(main())


async def test_the_suite_itself_runs_on_it(request: Any) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop) or "uvloop" in type(loop).__module__
