"""Waiting for what must not be left alive."""

import asyncio

import pytest

from async_pipeline.waiting import until_ended


async def test_it_waits_for_all_whatever_becomes_of_them() -> None:
    async def fail() -> None:
        raise ValueError

    ended = [asyncio.ensure_future(fail()), asyncio.ensure_future(asyncio.sleep(0)), asyncio.Future[None]()]
    ended[2].cancel()
    await until_ended(*ended)
    assert [future.done() for future in ended] == [True] * 3
    assert isinstance(ended[0].exception(), ValueError)


async def test_of_none_it_returns_at_once() -> None:
    await until_ended()


async def test_a_cancellation_waits_too_and_is_raised_then() -> None:
    late = asyncio.Future[None]()
    waiting = asyncio.create_task(until_ended(late))
    for _ in range(5):
        await asyncio.sleep(0)
        waiting.cancel("the last one counts")
    await asyncio.sleep(0)
    assert not waiting.done()
    late.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await waiting
