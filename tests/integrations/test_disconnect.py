"""A client that goes: what the block sees, what becomes of the body, and a real uvicorn.

Under the virtual clock the server's sockets make the loop wait in real time: for milliseconds, here.
"""

import asyncio
import contextlib
import copy
import importlib.util
import itertools
import logging
import pickle
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from socket import SO_LINGER, SOL_SOCKET
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response, WebSocket
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import Message, Receive, Scope

from async_pipeline import Pipeline, PipelineError, Stage
from async_pipeline.integrations import _disconnect
from async_pipeline.integrations._disconnect import (
    ClientDisconnected,
    ClosingStreamingResponse,
    cancel_on_disconnect,
)
from tests.helpers import run_virtually

FILE = _disconnect.__file__
GET: Message = {"type": "http.request", "body": b"", "more_body": False}
LEFT: Message = {"type": "http.disconnect"}


class Client:
    """What a server's ``receive`` tells of a client; only one may wait in it at a time.

    Args:
        messages: what it has sent when the handler begins.
        turns: how many turns of the loop a message is on its way, as below a ``BaseHTTPMiddleware``; a
            reader that is cancelled then has lost it.
        once: whether it tells only once that it has gone, and then waits for ever.
    """

    def __init__(self, *messages: Message, turns: int = 0, once: bool = False) -> None:
        self.messages = [*messages]
        self.turns = turns
        self.once = once
        self.calls = 0
        self.is_waiting = False
        self.news = asyncio.Event()

    def send(self, body: bytes, more: bool = True) -> None:
        self.messages.append({"type": "http.request", "body": body, "more_body": more})
        self.news.set()

    def leave(self) -> None:
        self.messages.append(LEFT)
        self.news.set()

    async def receive(self) -> Message:
        assert not self.is_waiting, "two wait in receive() at the same time"
        self.calls += 1
        self.is_waiting = True
        try:
            while not self.messages:
                self.news.clear()
                await self.news.wait()
            message = self.messages[0]
            if message is not LEFT or self.once:
                del self.messages[0]
            await turns(self.turns)
        finally:
            self.is_waiting = False
        return message


def is_waiting(client: Client) -> bool:
    return client.is_waiting  # a checker would take it for what it was a line before


async def read(request: Request) -> Message:
    return await request.receive()


def request_of(client: Client, receive: Receive | None = None) -> Request:
    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    return Request(scope, receive or client.receive)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def now() -> float:
    return asyncio.get_running_loop().time()


def later(seconds: float, call: Callable[..., object], *args: Any) -> None:
    asyncio.get_running_loop().call_later(seconds, call, *args)


def tasks() -> int:
    return len(asyncio.all_tasks())


async def work(seconds: float = 10, log: list[str] | None = None) -> str:
    """Something to cancel."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        if log is not None:
            log.append("cancelled")
        raise
    return "done"


async def nothing_is_pending() -> None:
    """Neither a request to cancel this task nor a task of the block's is left."""
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await turns(5)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "cancel_on_disconnect"]


@pytest.mark.virtual
class TestTheBlock:
    @pytest.mark.parametrize(("leaves", "seen"), [(0.0, 0.05), (0.02, 0.05), (0.3, 0.3)])
    async def test_is_cancelled_when_the_client_goes(self, leaves: float, seen: float) -> None:
        client, log = Client(GET), list[str]()
        request = request_of(client)
        later(leaves, client.leave)
        with pytest.raises(ClientDisconnected) as caught:
            async with cancel_on_disconnect(request):
                await Pipeline([Stage("work", lambda value: work(10, log))]).run(None)
        assert now() == pytest.approx(seen)
        assert log == ["cancelled"]
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert await request.is_disconnected()
        await nothing_is_pending()

    async def test_that_is_quick_does_not_begin_to_watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def create_task(*args: Any, **options: Any) -> None:
            raise AssertionError("neither in the block nor later")

        client = Client()
        request = request_of(client)
        receive = request._receive
        monkeypatch.setattr(asyncio.get_running_loop(), "create_task", create_task)
        async with cancel_on_disconnect(request):
            assert await work(0.04) == "done"
        assert request._receive == receive
        await asyncio.sleep(1)
        assert client.calls == 0

    async def test_leaves_the_request_as_it_was(self) -> None:
        client = Client()
        request = request_of(client)
        receive = request._receive
        async with cancel_on_disconnect(request):
            await work(1)
            assert is_waiting(client)
        assert not is_waiting(client)
        assert request._receive == receive
        assert client.calls == 1
        await nothing_is_pending()

    async def test_ends_by_what_it_returns_although_it_was_cancelled(self) -> None:
        async def stubborn(request: Request) -> str:
            async with cancel_on_disconnect(request):
                with contextlib.suppress(asyncio.CancelledError):
                    await work()
                return "cached"

        client = Client(GET)
        later(1, client.leave)
        assert await stubborn(request_of(client)) == "cached"
        await nothing_is_pending()

    async def test_ends_by_another_error_although_it_was_cancelled(self) -> None:
        client = Client(GET)
        later(1, client.leave)
        with pytest.raises(ZeroDivisionError):
            async with cancel_on_disconnect(request_of(client)):
                try:
                    await work()
                finally:
                    _ = 1 / 0
        await nothing_is_pending()

    async def test_is_cancelled_only_once(self) -> None:
        client, log = Client(GET), list[str]()
        request = request_of(client)
        later(1, client.leave)
        async with cancel_on_disconnect(request):
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await work(1, log)
                assert await request.is_disconnected() == bool(log)
        assert log == ["cancelled"]

    async def test_of_a_task_that_has_swallowed_a_cancellation_before(self) -> None:
        async def handler() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await work()
            async with cancel_on_disconnect(request_of(client)):
                await work()

        client = Client(GET)
        task = asyncio.create_task(handler())
        later(1, task.cancel)
        later(2, client.leave)
        with pytest.raises(ClientDisconnected):
            await task
        assert task.cancelling() == 1

    async def test_whose_client_is_known_to_have_gone_ends_at_its_first_await(self) -> None:
        client = Client(LEFT)
        request = request_of(client)
        assert await request.is_disconnected()
        async with cancel_on_disconnect(request):
            pass
        await nothing_is_pending()
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                await work()
        assert now() == 0
        await nothing_is_pending()

    async def test_is_cancelled_by_a_disconnect_that_somebody_else_has_read(self) -> None:
        client = Client()
        request = request_of(client)
        later(0.01, client.leave)
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                assert await request.receive() == LEFT
                await work()
        assert now() == pytest.approx(0.01)
        assert await request.is_disconnected()
        await nothing_is_pending()

    async def test_that_ends_when_it_has_read_the_disconnect_is_not_cancelled_afterwards(self) -> None:
        client = Client(LEFT, once=True)
        request = request_of(client)
        async with cancel_on_disconnect(request):
            assert await request.receive() == LEFT
        await nothing_is_pending()
        assert await request.is_disconnected()

    async def test_sees_the_context_of_its_handler_in_receive(self) -> None:
        seen: list[object] = []

        async def receive() -> Message:
            seen.append(user.get())
            return await client.receive()

        user = ContextVar("user", default="nobody")
        user.set("somebody")
        client = Client()
        async with cancel_on_disconnect(request_of(client, receive)):
            await work(0.1)
        assert seen == ["somebody"]


@pytest.mark.virtual
class TestACancellationFromElsewhere:
    async def test_stays_one(self) -> None:
        async def handler() -> None:
            async with cancel_on_disconnect(request_of(client)):
                await work()

        for seconds in 0.01, 0.5:
            client = Client()
            task = asyncio.create_task(handler())
            later(seconds, task.cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()
            assert not client.is_waiting

    async def test_stays_a_timeout(self) -> None:
        client = Client()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1), cancel_on_disconnect(request_of(client)):
                await work()
        await nothing_is_pending()

    async def test_stays_that_of_a_task_group(self) -> None:
        async def handler() -> None:
            async with cancel_on_disconnect(request_of(client)):
                await work()

        async def fail() -> None:
            await asyncio.sleep(1)
            raise ZeroDivisionError

        client = Client()
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(handler())
                group.create_task(fail())
        assert [*map(type, caught.value.exceptions)] == [ZeroDivisionError]

    async def test_a_timeout_inside_stays_one(self) -> None:
        client = Client()
        async with cancel_on_disconnect(request_of(client)):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await work()
            assert await work(1) == "done"

    async def test_wins_when_the_client_goes_at_the_same_time(self) -> None:
        async def handler(request: Request) -> None:
            async with cancel_on_disconnect(request):
                await work(0.1)
                await asyncio.Event().wait()

        for before, after in itertools.product(range(8), repeat=2):
            client = Client()
            task = asyncio.create_task(handler(request_of(client)))
            await asyncio.sleep(0.1)
            await turns(3)
            order: list[tuple[int, Callable[[], object]]] = [(before, client.leave), (after, task.cancel)]
            for turn in range(8):
                for when, call in order:
                    if when == turn:
                        call()
                await turns(1)
            with pytest.raises((asyncio.CancelledError, ClientDisconnected)) as caught:
                await task
            if isinstance(caught.value, ClientDisconnected):  # it had left the block before it was asked to
                assert after > before
                assert task.cancelling() == 0
            else:
                assert task.cancelled()
            assert not client.is_waiting

    async def test_that_comes_while_the_watcher_ends_does_not_leave_it(self) -> None:
        async def slow_to_end() -> Message:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(1)
                ended.append(now())
            raise AssertionError

        async def handler() -> None:
            async with cancel_on_disconnect(request_of(client, slow_to_end)):
                await work(0.1)
            raise AssertionError("it was cancelled")

        client, ended = Client(), list[float]()
        task = asyncio.create_task(handler())
        for when in 0.5, 0.6:
            later(when, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [now()] == [pytest.approx(1.1)]
        await nothing_is_pending()

    async def test_that_comes_while_a_message_is_on_its_way_does_not_lose_it(self) -> None:
        async def handler() -> None:
            async with cancel_on_disconnect(request):
                await ends.wait()

        client, ends = Client(turns=9), asyncio.Event()
        request = request_of(client)
        task = asyncio.create_task(handler())
        await asyncio.sleep(0.1)
        client.send(b"body", more=False)
        await turns(2)
        ends.set()
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await request.body() == b"body"


@pytest.mark.virtual
class TestTheBody:
    async def test_can_be_read_in_the_block(self) -> None:
        client = Client()
        request = request_of(client)
        for when, part in enumerate([b"a", b"b", b"c"]):
            later(when / 50, client.send, part, when < 2)
        async with cancel_on_disconnect(request):
            await work(0.1)
            assert await request.body() == b"abc"
            await work(0.1)
        await nothing_is_pending()

    async def test_can_be_read_behind_the_block(self) -> None:
        client = Client()
        request = request_of(client)
        for when, part in enumerate([b"a", b"b", b"c"]):
            later(when / 10, client.send, part, when < 2)
        async with cancel_on_disconnect(request):
            await work(0.15)
        assert client.calls == 3
        assert not client.is_waiting
        assert [part async for part in request.stream()] == [b"a", b"b", b"c", b""]

    async def test_can_be_read_while_it_comes(self) -> None:
        client = Client()
        request = request_of(client)
        for when in range(20):
            later(when / 100, client.send, bytes([when]), when < 19)
        async with cancel_on_disconnect(request):
            assert await request.body() == bytes(range(20))
            await work(1)
        await nothing_is_pending()

    async def test_can_be_read_although_the_client_has_gone_meanwhile(self) -> None:
        client = Client(once=True)
        request = request_of(client)
        client.send(b"a")
        client.send(b"b")
        client.leave()
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                await work()
        parts = []
        with pytest.raises(ClientDisconnect):
            async for part in request.stream():
                parts.append(part)
        assert parts == [b"a", b"b"]
        for _ in range(2):  # though this client's server has told it once
            assert await request.receive() == LEFT
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                await work()

    @pytest.mark.parametrize("seconds", [0.01, 0.2])
    async def test_that_ends_early_ends_the_block(self, seconds: float) -> None:
        client = Client()
        request = request_of(client)
        client.send(b"a")
        later(seconds, client.leave)
        with pytest.raises(ClientDisconnected) as caught:
            async with cancel_on_disconnect(request):
                await request.body()
        assert isinstance(caught.value.__cause__, (ClientDisconnect, asyncio.CancelledError))
        assert now() == pytest.approx(seconds)
        await nothing_is_pending()

    async def test_of_another_request_that_ends_early_is_another_error(self) -> None:
        with pytest.raises(ClientDisconnect) as caught:
            async with cancel_on_disconnect(request_of(Client())):
                await request_of(Client(LEFT)).body()
        assert type(caught.value) is ClientDisconnect

    async def test_is_read_ahead_within_bounds(self) -> None:
        client = Client()
        request = request_of(client)
        for number in range(10):
            client.send(bytes([number]) * 30_000, number < 9)
        async with cancel_on_disconnect(request):
            await work(0.1)
            assert client.calls == 3
            assert (await request.receive())["body"][0] == 0
            await work(0.1)
            assert client.calls == 4
        assert not client.is_waiting
        assert {part[0] for part in [part async for part in request.stream()] if part} == {*range(1, 10)}

    async def test_is_read_ahead_within_bounds_when_parts_of_all_sizes_are_taken(self) -> None:
        client = Client()
        request = request_of(client)
        client.messages = [{**GET, "more_body": True} for _ in range(5000)]
        async with cancel_on_disconnect(request):
            await work(0.1)
            assert client.calls == 1024
            for _ in range(100):
                client.messages.insert(0, {**GET, "body": b"x" * 65536, "more_body": True})
            for _ in range(50):
                await request.receive()
                await turns(3)
            assert client.calls == 1025

    async def test_of_which_nothing_is_read_ahead_before_there_is_room(self) -> None:
        client = Client()
        request = request_of(client)
        client.send(b"x" * 70_000)
        async with cancel_on_disconnect(request):
            await work(0.1)
            client.leave()
            await work(0.1)
            assert not await request.is_disconnected()  # and has made room
            with pytest.raises(asyncio.CancelledError):
                await work()
            assert now() == pytest.approx(0.2)

    async def test_is_not_asked_for_by_two(self) -> None:
        """The client fails the test if two wait; the watcher waits for a reader that was first."""
        client = Client()
        request = request_of(client)
        async with cancel_on_disconnect(request):
            reader = asyncio.create_task(read(request))
            await work(0.1)
            assert client.calls == 1
            client.send(b"a")
            assert (await reader)["body"] == b"a"
            await turns(3)
            assert client.calls == 2  # the watcher's
            readers = [asyncio.create_task(read(request)) for _ in range(3)]
            for part in b"b", b"c", b"d":
                await work(0.1)
                client.send(part)
            assert {(await reader)["body"] for reader in readers} == {b"b", b"c", b"d"}
            client.leave()
            with pytest.raises(asyncio.CancelledError):
                await work()
        assert await request.is_disconnected()

    async def test_goes_to_a_reader_that_waits_when_the_block_ends(self) -> None:
        client = Client()
        request = request_of(client)
        async with cancel_on_disconnect(request):
            await work(0.1)
            reader = asyncio.create_task(read(request))
            await turns(3)
        await turns(3)
        assert client.is_waiting
        async with cancel_on_disconnect(request):
            await work(0.1)
            client.send(b"a")
            assert (await reader)["body"] == b"a"

    async def test_is_none_for_readers_once_the_client_has_gone(self) -> None:
        client = Client()
        request = request_of(client)
        readers = []
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                await work(0.1)
                readers = [asyncio.create_task(read(request)) for _ in range(3)]
                later(0.1, client.leave)
                await work()
        assert [await reader for reader in readers] == [LEFT] * 3
        assert client.calls == 1


@pytest.mark.virtual
class TestAMessageOnItsWay:
    """Below a middleware ``receive`` has a message some turns of the loop before it returns it."""

    @pytest.mark.parametrize("way", [0, 1, 3, 9])
    @pytest.mark.parametrize("start", [0.05, 0.1])
    async def test_is_not_lost_when_the_block_ends(self, way: int, start: float) -> None:
        """At 0.05 s it is there when the watcher begins; later the watcher has been waiting for it."""
        for sent, ends in itertools.product(range(3), range(16)):
            client = Client(turns=way)
            request = request_of(client)
            async with cancel_on_disconnect(request):
                await asyncio.sleep(start)
                await turns(sent)
                client.send(b"body", more=False)
                await turns(ends)
            assert not client.is_waiting
            assert await request.body() == b"body"

    async def test_that_never_arrives_does_not_keep_the_block(self) -> None:
        async def restless() -> Message:
            await begun.wait()
            try:
                while True:
                    await asyncio.sleep(0)
                    spun.append(now())
            finally:
                ended.append(now())

        begun, spun, ended = asyncio.Event(), list[float](), list[float]()
        async with cancel_on_disconnect(request_of(Client(), restless)):
            await work(0.1)
            begun.set()
        assert 50 < len(spun) < 200
        assert len(ended) == 1
        await nothing_is_pending()

    async def test_is_not_waited_for_when_none_is(self) -> None:
        """A block ends in the turn in which it could."""
        client, seen = Client(), list[int]()

        async def count() -> None:
            while True:
                await asyncio.sleep(0)
                seen.append(1)

        async with cancel_on_disconnect(request_of(client)):
            await work(0.1)
            counter = asyncio.create_task(count())
        counter.cancel()
        assert len(seen) <= 4


@pytest.mark.virtual
class TestIsDisconnected:
    async def test_is_right_inside_the_block(self) -> None:
        client = Client(GET)
        request = request_of(client)
        log = list[bool]()
        later(0.2, client.leave)
        async with cancel_on_disconnect(request):
            with contextlib.suppress(asyncio.CancelledError):
                for _ in range(100):
                    log.append(await request.is_disconnected())
                    await asyncio.sleep(0.03)
            assert await request.is_disconnected()
        assert log == [False] * 7
        assert await request.is_disconnected()
        await nothing_is_pending()

    async def test_is_right_when_the_block_ends_just_then(self) -> None:
        seen = 0
        for ends in range(8):
            client = Client(GET, once=True)
            request = request_of(client)
            with contextlib.suppress(ClientDisconnected):
                async with cancel_on_disconnect(request):
                    await work(0.1)
                    client.leave()
                    await turns(ends)
            if not client.messages:
                assert await request.is_disconnected()
                seen += 1
        assert seen >= 6

    async def test_is_right_behind_the_block(self) -> None:
        client = Client(GET)
        request = request_of(client)
        async with cancel_on_disconnect(request):
            await work(0.1)
        assert not await request.is_disconnected()
        assert not await request.is_disconnected()
        client.leave()
        assert await request.is_disconnected()


@pytest.mark.virtual
class TestSeveralBlocks:
    async def test_in_a_row(self) -> None:
        client = Client(GET)
        request = request_of(client)
        for _ in range(3):
            async with cancel_on_disconnect(request):
                assert await work(0.1) == "done"
            await nothing_is_pending()
        client.leave()
        for _ in range(3):
            with pytest.raises(ClientDisconnected):
                async with cancel_on_disconnect(request):
                    await work()
            await nothing_is_pending()
        assert await request.body() == b""

    async def test_nested(self) -> None:
        client, log = Client(GET), list[str]()
        request = request_of(client)
        later(1, client.leave)
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                async with cancel_on_disconnect(request):
                    await work(0.3)
                assert await work(0.1) == "done"
                async with cancel_on_disconnect(request):
                    await work(10, log)
        assert now() == pytest.approx(1)
        assert log == ["cancelled"]
        assert client.calls == 2
        await nothing_is_pending()

    async def test_nested_where_the_inner_one_is_quick(self) -> None:
        client = Client()
        request = request_of(client)
        later(1, client.leave)
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(request):
                async with cancel_on_disconnect(request):
                    await work(0.01)
                await work()
        assert now() == pytest.approx(1)
        await nothing_is_pending()

    async def test_side_by_side(self) -> None:
        async def handler(seconds: float) -> str:
            async with cancel_on_disconnect(request):
                return await work(seconds)

        client = Client()
        request = request_of(client)
        receive = request._receive
        assert await asyncio.gather(*map(handler, [0.2, 0.1, 0.01])) == ["done"] * 3
        assert request._receive == receive
        later(0.2, client.leave)
        results = await asyncio.gather(handler(0.1), handler(1), handler(1), return_exceptions=True)
        assert [*map(type, results)] == [str, ClientDisconnected, ClientDisconnected]
        await nothing_is_pending()

    async def test_one_that_begins_while_the_last_one_ends(self) -> None:
        async def slow_to_end() -> Message:
            try:
                return await client.receive()
            except asyncio.CancelledError:
                await asyncio.sleep(0.2)
                raise

        async def handler(begins: float, seconds: float) -> str:
            await asyncio.sleep(begins)
            async with cancel_on_disconnect(request):
                return await work(seconds)

        client = Client()
        request = request_of(client, slow_to_end)
        later(1, client.leave)
        results = await asyncio.gather(handler(0, 0.1), handler(0.15, 10), return_exceptions=True)
        assert [*map(type, results)] == [str, ClientDisconnected]
        assert now() == pytest.approx(1)

    async def test_of_two_requests_over_one_receive(self) -> None:
        """As a route class does that makes a request of its own for the handler."""
        client = Client(GET)
        outer = request_of(client)
        later(1, client.leave)
        with pytest.raises(ClientDisconnected):
            async with cancel_on_disconnect(outer):
                inner = Request(outer.scope, outer.receive)
                async with cancel_on_disconnect(inner):
                    await work(0.1)
                assert await inner.body() == b""
                async with cancel_on_disconnect(inner):
                    await work()
        assert now() == pytest.approx(1)
        assert await inner.is_disconnected()
        assert await outer.is_disconnected()

    async def test_with_a_receive_of_somebody_else_around(self) -> None:
        async def wrapper() -> Message:
            return await receive()

        client = Client(GET)
        request = request_of(client)
        async with cancel_on_disconnect(request):
            receive, request._receive = request._receive, wrapper
            async with cancel_on_disconnect(request):
                await work(0.1)
        assert await request.body() == b""
        async with cancel_on_disconnect(request):
            await work(0.1)
        client.leave()
        assert await request.is_disconnected()


@pytest.mark.virtual
class TestABrokenReceive:
    async def test_is_logged_and_the_run_goes_on(self, caplog: pytest.LogCaptureFixture) -> None:
        async def broken() -> Message:
            raise ZeroDivisionError

        request = request_of(Client(), broken)
        async with cancel_on_disconnect(request):
            assert await work(0.1) == "done"
            async with cancel_on_disconnect(request):
                assert await work(0.1) == "done"
        [record] = caplog.records
        assert record.name == "async_pipeline"
        assert record.levelno == logging.ERROR
        assert "broken" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[0] is ZeroDivisionError
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await request.body()

    async def test_that_refuses_the_body_tells_who_reads_it(self, caplog: pytest.LogCaptureFixture) -> None:
        """As Starlette's limit of a body's size does, also when it is far above what we read ahead."""

        async def limited() -> Message:
            message = await client.receive()
            if len(message["body"]) > 10:
                raise HTTPException(413)
            return message

        client = Client()
        client.send(b"small")
        client.send(b"a large one")
        client.send(b"behind")
        request = request_of(client, limited)
        async with cancel_on_disconnect(request):
            assert await work(0.1) == "done"
        assert (await request.receive())["body"] == b"small"
        with pytest.raises(HTTPException):
            await request.receive()
        assert (await request.receive())["body"] == b"behind"
        assert not caplog.records

    async def test_does_not_keep_readers(self, caplog: pytest.LogCaptureFixture) -> None:
        async def broken() -> Message:
            await asyncio.sleep(0.1)
            raise ZeroDivisionError

        request = request_of(Client(), broken)
        async with cancel_on_disconnect(request):
            await work(0.06)
            with pytest.raises(ZeroDivisionError):
                await request.body()
        assert len(caplog.records) == 1

    async def test_that_swallows_the_cancellation_does_not_keep_the_block(self) -> None:
        async def deaf() -> Message:
            try:
                return await client.receive()
            except asyncio.CancelledError:
                return GET

        client = Client()
        async with cancel_on_disconnect(request_of(client, deaf)):
            assert await work(0.1) == "done"
        await nothing_is_pending()


class TestWrongUse:
    def test_without_fastapi(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fastapi", None)
        again: Any = importlib.util.spec_from_file_location(f"{_disconnect.__package__}._again", FILE)
        with pytest.raises(
            ImportError,
            match=r"^FastAPI support requires installing async-pipeline\[fastapi\]: pip install ",
        ):
            again.loader.exec_module(importlib.util.module_from_spec(again))

    async def test_a_websocket(self) -> None:
        socket = WebSocket({"type": "websocket"}, Client().receive, None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="WebSocketDisconnect"):
            cancel_on_disconnect(socket)  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [HTTPConnection({"type": "http"}), None, {"type": "http"}, Request])
    async def test_no_request(self, value: Any) -> None:
        name = type(value).__name__
        with pytest.raises(TypeError, match=rf"not {name}: async def handler\(request: Request\)"):
            cancel_on_disconnect(value)

    async def test_entering_twice(self) -> None:
        block = cancel_on_disconnect(request_of(Client()))
        async with block:
            with pytest.raises(RuntimeError, match=r"call cancel_on_disconnect\(request\) again"):
                async with block:
                    raise AssertionError
        with pytest.raises(RuntimeError, match="entered once"):
            await block.__aenter__()


class TestTheError:
    def test_is_what_each_would_catch(self) -> None:
        error = ClientDisconnected()
        assert isinstance(error, HTTPException)
        assert isinstance(error, ClientDisconnect)
        assert isinstance(error, PipelineError)
        assert (error.status_code, error.detail) == (499, "Client closed request")

    def test_can_be_copied(self) -> None:
        for twin in (copy.copy(ClientDisconnected()), pickle.loads(pickle.dumps(ClientDisconnected()))):
            assert type(twin) is ClientDisconnected
            assert twin.status_code == 499


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40_000)), max_size=6),
    leaves=st.none() | st.integers(0, 35),
    way=st.integers(0, 4),
    steps=st.lists(
        st.tuples(st.sampled_from(["block", "read", "wait", "nested"]), st.integers(0, 12)), max_size=8
    ),
    eager=st.booleans(),
)
def test_nothing_of_a_body_is_lost(
    parts: list[tuple[int, int]], leaves: int | None, way: int, steps: list[tuple[str, int]], eager: bool
) -> None:
    """Whatever is read where: in order, whole, and by one at a time. The unit is 10 ms."""

    async def main() -> None:
        client = Client(turns=way)
        request = request_of(client)
        sent = b""
        for number, (when, size) in enumerate(sorted(parts)):
            if leaves is None or when < leaves:
                body = bytes([number]) * size
                sent += body
                later(when / 100 + (number + 1) / 10_000, client.send, body, True)  # each at its own time
        if leaves is not None:
            later(leaves / 100, client.leave)
        got, seen = b"", 0

        async def read_one() -> None:
            nonlocal got
            message = await request.receive()
            got += message.get("body", b"")

        async def read_for(seconds: float) -> None:
            if readers and not readers[-1].done():
                return  # two would share the body
            readers.append(asyncio.create_task(read_one()))
            await asyncio.wait(readers[-1:], timeout=seconds)
            if request._receive == client.receive:  # one who reads without us must be done before a block
                readers[-1].cancel()

        async def play(kind: str, length: int) -> None:
            if kind == "wait":
                await asyncio.sleep(length / 100)
            elif kind == "read":
                await read_for(length / 100 + 0.005)
            else:
                async with cancel_on_disconnect(request):
                    if kind == "nested":
                        await play("block", length // 2)
                    await play("read", length // 2)
                    await asyncio.sleep(length / 100)
                    await turns(length)

        readers: list[asyncio.Task[None]] = []
        for kind, length in steps:
            try:
                await play(kind, length)
            except ClientDisconnected:
                assert leaves is not None
                assert LEFT in client.messages
                seen += 1
        await nothing_is_pending()
        await asyncio.sleep(1)
        if leaves is None:
            client.leave()
        await asyncio.gather(*readers, return_exceptions=True)
        while (message := await request.receive()) != LEFT:
            got += message["body"]
        assert got == sent, (parts, leaves, way, steps)
        assert tasks() == 1

    run_virtually(_eagerly(main()) if eager else main())


async def _eagerly(main: Any) -> None:
    factory = getattr(asyncio, "eager_task_factory", None)
    asyncio.get_running_loop().set_task_factory(factory)
    await main


@settings(max_examples=300, deadline=None)
@given(
    leaves=st.tuples(st.sampled_from([0.04, 0.05, 0.1]), st.integers(0, 6)),
    cancelled=st.none() | st.tuples(st.sampled_from([0.04, 0.05, 0.1]), st.integers(0, 6)),
    ends=st.tuples(st.sampled_from([0.04, 0.05, 0.1, 10]), st.integers(0, 6)),
    swallows=st.booleans(),
    way=st.integers(0, 3),
    eager=st.booleans(),
)
def test_a_cancellation_is_whose_it_is(
    leaves: tuple[float, int],
    cancelled: tuple[float, int] | None,
    ends: tuple[float, int],
    swallows: bool,
    way: int,
    eager: bool,
) -> None:
    """To the turn of the loop: nothing is swallowed, nothing is left, and nothing hits the code behind."""

    async def at(when: tuple[float, int], call: Callable[[], object]) -> None:
        await asyncio.sleep(when[0])
        await turns(when[1])
        call()

    async def main() -> None:
        client, log = Client(GET, turns=way), list[str]()

        async def handler() -> str:
            try:
                async with cancel_on_disconnect(request_of(client)):
                    try:
                        await asyncio.sleep(ends[0])
                        await turns(ends[1])
                        log.append("ended")
                    except asyncio.CancelledError:
                        log.append("cancelled")
                        if not swallows:
                            raise
            except ClientDisconnected:
                log.append("left")
            await turns(10)
            log.append("behind")
            return "done"

        task = asyncio.create_task(handler())
        helpers = [asyncio.create_task(at(leaves, client.leave))]
        asked = list[bool]()
        if cancelled is not None:
            helpers.append(asyncio.create_task(at(cancelled, lambda: asked.append(task.cancel()))))
        await asyncio.wait([task])
        await asyncio.gather(*helpers)
        if not any(asked):
            assert task.result() == "done"
            assert task.cancelling() == 0
            assert log[0] in ("ended", "cancelled")
            if log[0] == "cancelled":
                assert log[1:] == (["behind"] if swallows else ["left", "behind"])
            else:
                assert log == ["ended", "behind"]
        elif not swallows:
            assert task.cancelled()
            assert "behind" not in log
        assert not client.is_waiting
        assert tasks() == 1

    run_virtually(_eagerly(main()) if eager else main())


# below middlewares, without a server


async def call(app: FastAPI, path: str, client: Client, send: Any = None) -> list[Message]:
    """Call the app as a server does, and return what it has sent."""
    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"accept-encoding", b"gzip")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, client.receive, send or keep)
    return sent


def below(app: FastAPI, middlewares: int) -> FastAPI:
    """The same app below that many middlewares of each kind."""

    async def look_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    for _ in range(middlewares):
        app.middleware("http")(look_on)
        app.add_middleware(GZipMiddleware, minimum_size=1)
    return app


@pytest.mark.virtual
@pytest.mark.parametrize("middlewares", [0, 1, 3])
class TestBelowMiddlewares:
    async def test_the_client_goes(self, middlewares: int) -> None:
        app, log, client = FastAPI(), list[str](), Client(GET)

        @app.post("/")
        async def handler(request: Request) -> None:
            async with cancel_on_disconnect(request):
                await work(10, log)

        later(1, client.leave)
        start, *_ = await call(below(app, middlewares), "/", client)
        assert log == ["cancelled"]
        assert now() == pytest.approx(1)
        assert start["status"] == 499
        await nothing_is_pending()

    async def test_the_client_stays(self, middlewares: int) -> None:
        app, client = FastAPI(), Client(GET)

        @app.post("/")
        async def handler(request: Request) -> str:
            async with cancel_on_disconnect(request):
                return await work(1)

        start, *_ = await call(below(app, middlewares), "/", client)
        assert start["status"] == 200

    async def test_a_body_that_comes_when_the_block_ends_is_not_lost(self, middlewares: int) -> None:
        app, bodies, block_ends = FastAPI(), list[bytes](), asyncio.Event()

        @app.post("/")
        async def handler(request: Request) -> None:
            async with cancel_on_disconnect(request):
                await block_ends.wait()
            bodies.append(await request.body())

        below(app, middlewares)
        for start, sent in itertools.product([0.05, 0.1], range(3 + 5 * middlewares)):
            client = Client()
            task = asyncio.create_task(call(app, "/", client))
            await asyncio.sleep(start)
            client.send(b"part, ")
            await turns(sent)
            block_ends.set()
            await turns(10)
            block_ends.clear()
            client.send(b"part", more=False)
            await task
        assert {*bodies} == {b"part, part"}
        assert len(bodies) == 2 * (3 + 5 * middlewares)

    async def test_in_a_dependency_that_ends_before_the_response(self, middlewares: int) -> None:
        log, client = list[str](), Client(GET)

        async def watched(request: Request) -> AsyncIterator[None]:
            async with cancel_on_disconnect(request):
                yield

        async def depends_on_it(watched: Annotated[None, Depends(watched)], request: Request) -> str:
            async with cancel_on_disconnect(request):
                return await work(0.1)

        app, inner = FastAPI(), FastAPI()
        app.mount("/inner", below(inner, middlewares))

        @inner.post("/deep")
        async def handler(done: Annotated[str, Depends(depends_on_it)]) -> None:
            await work(10, log)

        later(1, client.leave)
        start, *_ = await call(below(app, middlewares), "/inner/deep", client)
        assert start["status"] == 499
        assert log == ["cancelled"]
        await nothing_is_pending()

    async def test_in_a_middleware_whose_client_stays(self, middlewares: int) -> None:
        app, client, bodies = FastAPI(), Client(), list[bytes]()

        @app.post("/")
        async def handler(request: Request) -> None:
            bodies.append(await request.body())
            await work(1)

        below(app, middlewares)

        @app.middleware("http")
        async def watch(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            async with cancel_on_disconnect(request):
                return await call_next(request)

        later(0.2, client.send, b"body", True)
        later(0.3, client.send, b"body", False)
        start, *_ = await call(app, "/", client)
        assert start["status"] == 200
        assert bodies == [b"bodybody"]


# a response that streams


class Rows:
    """A source that knows whether it is open; the items after the first few never come if it is slow."""

    def __init__(self, is_slow: bool = True) -> None:
        self.is_slow = is_slow
        self.is_open = False

    async def __aiter__(self) -> AsyncIterator[int]:
        self.is_open = True
        try:
            for number in itertools.count():
                await asyncio.sleep(3600 if self.is_slow and number > 2 else 0)
                yield number
        finally:
            self.is_open = False


def lines(rows: Rows, size: int, tasks: list[Any]) -> AsyncIterator[bytes]:
    """The user's generator; it notes the tasks that began and ended it."""

    async def handler(value: int) -> bytes:
        await asyncio.sleep(0)
        return b"%07d\n" % value + b" " * size

    async def generator() -> AsyncIterator[bytes]:
        tasks.append(asyncio.current_task())
        try:
            async with Pipeline([Stage("line", handler)]).stream(rows) as results:
                async for line in results:
                    yield line
        finally:
            tasks.append(asyncio.current_task())

    return generator()


def streaming(rows: Rows, size: int, log: list[Any]) -> FastAPI:
    app = FastAPI()

    @app.api_route("/", methods=["GET", "POST"])
    async def get_rows() -> Response:
        return ClosingStreamingResponse(lines(rows, size, log), media_type="text/plain")

    return app


@pytest.mark.virtual
class TestAStreamingResponse:
    @pytest.mark.parametrize("middlewares", [0, 1, 3])
    async def test_is_closed_while_it_waits_for_a_row(self, middlewares: int) -> None:
        rows, log, client = Rows(), list[Any](), Client(GET)
        later(1, client.leave)
        sent = await call(below(streaming(rows, 10, log), middlewares), "/", client)
        assert sent[0]["status"] == 200
        assert not rows.is_open
        assert len(log) == 2
        assert len({*log}) == 1
        assert tasks() == 1

    @pytest.mark.parametrize("middlewares", [0, 1, 3])
    async def test_is_closed_while_the_client_does_not_read(self, middlewares: int) -> None:
        gone = asyncio.Event()

        async def send(message: Message) -> None:
            if message.get("body"):
                await gone.wait()

        rows, log, client = Rows(is_slow=False), list[Any](), Client(GET)
        later(1, client.leave)
        later(2, gone.set)
        task = asyncio.create_task(call(below(streaming(rows, 10, log), middlewares), "/", client, send))
        await asyncio.sleep(1.5)
        assert not rows.is_open
        assert len(log) == 2
        assert len({*log}) == 1
        await task
        assert tasks() == 1

    async def test_is_closed_when_sending_fails(self) -> None:
        async def broken(message: Message) -> None:
            if message.get("body"):
                raise ZeroDivisionError

        rows, log = Rows(), list[Any]()
        with pytest.raises((ZeroDivisionError, ExceptionGroup)):  # as its Starlette has it
            await call(streaming(rows, 10, log), "/", Client(GET), broken)
        assert not rows.is_open
        assert tasks() == 1

    async def test_is_complete(self) -> None:
        async def three() -> AsyncIterator[str]:
            for number in range(3):
                yield str(number)

        class Three:
            """Asynchronous, iterable, and nothing to close."""

            def __init__(self) -> None:
                self.left: list[str] = [*"012"]

            def __aiter__(self) -> "Three":
                return self

            async def __anext__(self) -> str:
                if not self.left:
                    raise StopAsyncIteration
                return self.left.pop(0)

        for content in three(), Three():
            sent: list[bytes] = []

            async def send(message: Message, sent: list[bytes] = sent) -> None:
                sent.append(message.get("body", b""))

            await ClosingStreamingResponse(content)({"type": "http"}, Client().receive, send)
            assert b"".join(sent) == b"012"


# a real server


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """Serve the app on a port of this machine, which it yields."""
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", http="h11", ws="none")
    server = Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def requesting(port: int, path: str, body: bytes = b"", more: int = 0) -> AsyncIterator[Any]:
    """Send a request, of whose body so many bytes do not come; behind the block the client is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body) + more}\r\n\r\n"
        writer.write(head.encode() + body)
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it is polled, whatever it is
            await asyncio.sleep(0.001)


def handler_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks()} & {"cancel_on_disconnect"}


class TestOnAServer:
    @pytest.mark.parametrize("middlewares", [0, 2])
    async def test_every_one_of_50_disconnects_is_seen(
        self, middlewares: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = FastAPI()
        started, cancelled, left = list[int](), list[int](), list[int]()

        async def stage(number: int) -> None:
            started.append(number)
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                cancelled.append(number)
                raise

        pipeline = Pipeline([Stage("stage", stage, timeout=300, retries=3)])

        @app.post("/{number}")
        async def handler(number: int, request: Request) -> None:
            try:
                async with cancel_on_disconnect(request):
                    await pipeline.run(number)
            except ClientDisconnected:
                left.append(number)
                raise

        async def leave(port: int, number: int) -> None:
            async with requesting(port, f"/{number}", b"[]"):
                await until(lambda: number in started)
                await asyncio.sleep(0.005 * number)

        async with serving(below(app, middlewares)) as port:
            await asyncio.gather(*(leave(port, number) for number in range(50)))
            await until(lambda: len(left) == 50)
            assert sorted(cancelled) == sorted(left) == [*range(50)]
            assert not handler_tasks()
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize("middlewares", [0, 2])
    async def test_a_client_that_stays_gets_its_answer(self, middlewares: int) -> None:
        app = FastAPI()

        @app.post("/")
        async def handler(request: Request) -> int:
            async with cancel_on_disconnect(request):
                await asyncio.sleep(0.1)
            body = await request.body()
            async with cancel_on_disconnect(request):
                await asyncio.sleep(0.06)
            return len(body)

        async with serving(below(app, middlewares)) as port, requesting(port, "/", b"x" * 200_000) as reader:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await reader.read(6) == b"200000"

    async def test_one_that_resets_the_connection_with_half_a_body(self) -> None:
        app, log = FastAPI(), list[str]()

        @app.post("/")
        async def handler(request: Request) -> None:
            async with cancel_on_disconnect(request):
                log.append("started")
                await work(600, log)

        async with serving(app) as port:
            async with requesting(port, "/", b"half", more=4) as reader:
                connection = reader._transport.get_extra_info("socket")
                connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                await until(lambda: log)
                await asyncio.sleep(0.1)
            await until(lambda: len(log) > 1)
        assert log == ["started", "cancelled"]

    @pytest.mark.parametrize("middlewares", [0, 1, 3])
    @pytest.mark.parametrize("is_slow", [True, False])
    async def test_a_streaming_response_ends(
        self, is_slow: bool, middlewares: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The client goes while it waits for a row, or while it has not read the many there are."""
        rows, log = Rows(is_slow), list[Any]()
        app = below(streaming(rows, 1 if is_slow else 100_000, log), middlewares)
        async with serving(app) as port:
            before = tasks()
            async with requesting(port, "/") as reader:
                if is_slow:
                    await reader.readuntil(b"0000002\n")
                else:
                    await reader.readuntil(b"\r\n\r\n")
                    reader._transport.pause_reading()
                await asyncio.sleep(0.2)
                assert rows.is_open
            await until(lambda: len(log) == 2 and not rows.is_open)
            assert log[0] is log[1]
            await until(lambda: tasks() == before)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_stream_itself_is_no_content() -> None:
    with pytest.raises(TypeError, match=r"must be an async generator, not Stream; write one with "):
        ClosingStreamingResponse(Pipeline([str]).stream([1]))


async def test_a_route_may_name_the_response_as_its_class() -> None:
    app = FastAPI()

    @app.get("/rows", response_class=ClosingStreamingResponse)
    async def rows() -> None: ...

    assert "200" in app.openapi()["paths"]["/rows"]["get"]["responses"]


async def test_a_response_takes_what_starlettes_own_takes() -> None:
    async def rows() -> AsyncIterator[str]:
        yield "row"

    response = ClosingStreamingResponse(rows(), 201, {"x-rows": "1"}, "text/plain")
    assert (response.status_code, response.headers["x-rows"], response.media_type) == (201, "1", "text/plain")
