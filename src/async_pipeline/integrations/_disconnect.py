"""Cancel the work of a handler whose client has gone."""

import asyncio
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, cast

from ..errors import PipelineError
from ..events import logger

try:
    from fastapi import HTTPException, Request, WebSocket
    from starlette.background import BackgroundTask
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import StreamingResponse
    from starlette.types import Message, Receive, Send
except ImportError as _missing:
    raise ImportError(
        "FastAPI support requires installing async-pipeline[fastapi]: pip install 'async-pipeline[fastapi]'"
    ) from _missing

__all__ = ["ClientDisconnected", "ClosingStreamingResponse", "cancel_on_disconnect"]

_WATCH_AFTER = 0.05  # seconds; most handlers are done by then
_MOST_ASIDE = 65536  # bytes of a body that nobody reads; a server stops reading at that as well
_COST_OF_MESSAGE = 64  # bytes that a message without a body counts as
_QUIET_TURNS = 10  # of the event loop; a middleware takes three to hand a message on
_MOST_TURNS = 100


class ClientDisconnected(HTTPException, ClientDisconnect, PipelineError):  # noqa: N818 - like Starlette's
    """The client has gone, and so :func:`cancel_on_disconnect` has cancelled its block.

    Let it through: it is an ``HTTPException`` of status 499, as nginx calls a request that its client has
    closed, so that FastAPI answers (nobody) and logs no traceback. It is also the ``ClientDisconnect`` that
    Starlette raises when a body cannot be read to its end.
    """

    def __init__(self) -> None:
        super().__init__(status_code=499, detail="Client closed request")


def cancel_on_disconnect(request: Request) -> AbstractAsyncContextManager[None]:
    """Cancel the block when the client of ``request`` goes, as ``asyncio.timeout`` does when its time is up.

    >>> @app.get("/report/{name}")
    ... async def report(name: str, request: Request) -> Report:
    ...     async with cancel_on_disconnect(request):
    ...         return await pipeline.run(name)

    The block leaves by :class:`ClientDisconnected`. A cancellation from elsewhere stays what it is, and so
    does what the block returns or raises although it was cancelled.

    It begins to watch after 50 ms. A body that was not read yet can be read as usual, in the block and
    behind it, but only 64 KiB are read ahead: behind more, nobody sees the client go. No other task may be
    reading the request when the block is entered. Blocks of one request may be nested or side by side.

    Put it around the work, not around the sending of the response (as in the generator of a
    ``StreamingResponse``, or in a dependency that ends after it): a response that was sent to its end
    looks like a client that has gone. Put it into handlers and their dependencies: what an
    ``@app.middleware("http")`` calls is not cancelled with it.

    Args:
        request: the handler's.

    Raises:
        ClientDisconnected: out of the block, when the client has gone.
        TypeError: ``request`` is no ``Request``.
        RuntimeError: it is entered a second time.
    """
    if isinstance(request, WebSocket):
        raise TypeError(
            "cancel_on_disconnect(request) is for HTTP; the client of a WebSocket has gone "
            "when websocket.receive_text() raises WebSocketDisconnect"
        )
    if not isinstance(request, Request):
        raise TypeError(
            f"cancel_on_disconnect(request) takes the handler's Request, not {type(request).__name__}: "
            "async def handler(request: Request): async with cancel_on_disconnect(request): ..."
        )
    return _Block(request)


class _Block:
    """One ``async with cancel_on_disconnect(request)``; what it counts is what ``asyncio.timeout`` counts."""

    __slots__ = ("_inbox", "_is_cancelled", "_request", "_requests", "_task", "_timer")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    async def __aenter__(self) -> None:
        if self._task is not None:
            raise RuntimeError("a block is entered once; call cancel_on_disconnect(request) again")
        self._task = task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._requests = task.cancelling()
        receive = self._request._receive
        if not isinstance(receive, _Inbox):
            self._request._receive = receive = _Inbox(receive)
        self._inbox: _Inbox = receive
        self._timer = receive.enter(self, is_gone=self._request._is_disconnected)

    def cancel(self) -> None:
        """Cancel the block; never called while its task runs, so none is still pending when it ends."""
        if not self._is_cancelled:
            self._is_cancelled = True
            cast("asyncio.Task[Any]", self._task).cancel()

    def note_disconnect(self) -> None:
        self._request._is_disconnected = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        is_ours = self._is_ours(error)
        try:
            await self._inbox.leave(self)
        finally:
            if self._inbox.is_gone:
                self.note_disconnect()
            elif self._request._receive is self._inbox and self._inbox.is_spent():
                self._request._receive = self._inbox.receive
        if is_ours:
            raise ClientDisconnected from error

    def _is_ours(self, error: BaseException | None) -> bool:
        """Tell whether the block ends by the client's leaving, and take our request to cancel it back."""
        if self._is_cancelled and cast("asyncio.Task[Any]", self._task).uncancel() > self._requests:
            return False  # somebody else has asked for it as well
        if isinstance(error, asyncio.CancelledError):
            return self._is_cancelled
        # await request.body() in the block, before it is watched
        return self._inbox.is_gone and type(error) is ClientDisconnect


class _Inbox:
    """Takes the place of a request's ``receive``, and keeps what its watcher has read for who reads it later.

    Only one at a time, the watcher or a reader, waits in the server's own ``receive``: a server sets one
    event, and a middleware keeps the state of one reader.
    """

    __slots__ = ("_aside", "_blocks", "_reading", "_room", "_size", "_turn", "_watcher", "is_gone", "receive")

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.is_gone = False
        self._blocks: list[_Block] = []
        self._aside: deque[Message | Exception] = deque()
        self._size = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._reading: _Reading | None = None

    async def __call__(self) -> Message:
        if self._aside or self.is_gone:
            return self._take()
        async with self._turn:
            if self._aside or self.is_gone:
                return self._take()
            message = await self.receive()
            if _is_disconnect(message):
                self._note_disconnect()
            return message

    def enter(self, block: _Block, is_gone: bool) -> asyncio.Handle:
        """Count a block, and return the timer that will have it watched."""
        self._blocks.append(block)
        self.is_gone = self.is_gone or is_gone
        loop = asyncio.get_running_loop()
        return loop.call_soon(self._cancel) if self.is_gone else loop.call_later(_WATCH_AFTER, self._start)

    async def leave(self, block: _Block) -> None:
        """Forget a block; with the last one the watcher ends."""
        self._blocks.remove(block)
        if self._blocks or self._watcher is None:
            return
        watcher, self._watcher = self._watcher, None
        await self._end(watcher)

    def is_spent(self) -> bool:
        """Tell whether the request does as well without it."""
        return not (self._blocks or self._aside or self._turn.locked())

    def _take(self) -> Message:
        if not self._aside:
            return {"type": "http.disconnect"}  # as often as it is asked, whatever the server does
        message = self._aside.popleft()
        if isinstance(message, Exception):
            raise message
        self._size -= _size_of(message)
        self._room.set()
        return message

    def _note_disconnect(self) -> None:
        self.is_gone = True
        # later, because a block's own task may be the one that has read it
        asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        for block in self._blocks:
            block.note_disconnect()
            block.cancel()

    def _start(self) -> None:
        if self._watcher is None:
            loop = asyncio.get_running_loop()
            self._watcher = loop.create_task(self._watch(), name="cancel_on_disconnect")

    async def _watch(self) -> None:
        try:
            while self._blocks and not self.is_gone:
                await self._read()
        except Exception as error:
            self._aside.append(error)  # it is for who reads the body, if anybody does
            if not isinstance(error, StarletteHTTPException):  # as it is when the body is too large
                logger.error("%r failed; the run goes on, unwatched", self.receive, exc_info=error)

    async def _read(self) -> None:
        while self._size >= _MOST_ASIDE:
            self._room.clear()
            await self._room.wait()
        async with self._turn:
            self._reading = _Reading(self.receive)
            try:
                self._keep(await self._reading)
            finally:
                self._reading = None

    def _keep(self, message: Message) -> None:
        if _is_disconnect(message):
            self._note_disconnect()
        else:
            self._aside.append(message)
            self._size += _size_of(message)

    async def _end(self, watcher: "asyncio.Task[None]") -> None:
        """End the watcher without losing a message that it is about to get, also when this is cancelled."""
        cancellation: asyncio.CancelledError | None = None
        turns, is_asked = 0, False
        while not watcher.done():
            if not is_asked and (turns == _MOST_TURNS or self._reading is None or self._reading.is_idle()):
                is_asked = watcher.cancel()
            turns += 1
            try:
                await (asyncio.wait([watcher]) if is_asked else asyncio.sleep(0))
            except asyncio.CancelledError as error:
                cancellation = error
        try:
            if cancellation is not None:
                raise cancellation
        finally:
            del cancellation  # its traceback holds this frame


class _Reading(Generator[Any, Any, Message]):
    """A call of ``receive`` that knows whether it waits for the client, or is on its way back.

    The ``receive`` below a ``BaseHTTPMiddleware`` has the message, and then waits for a task of its own to
    end. If it were cancelled there, that part of the body would be lost.
    """

    __slots__ = ("_coroutine", "_quiet", "_waits_for")

    def __init__(self, receive: Receive) -> None:
        self._coroutine = _call(receive)
        self._quiet = _QUIET_TURNS

    def __await__(self) -> "_Reading":
        return self

    def send(self, value: Any) -> Any:
        if self._quiet >= _QUIET_TURNS:
            asyncio.get_running_loop().call_soon(self._count_turn)
        self._quiet = 0
        self._waits_for = self._coroutine.send(value)
        return self._waits_for

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def _count_turn(self) -> None:
        self._quiet += 1
        if self._quiet < _QUIET_TURNS:
            asyncio.get_running_loop().call_soon(self._count_turn)

    def is_idle(self) -> bool:
        """Tell whether nothing has happened for some turns of the event loop, nor is about to."""
        return self._quiet >= _QUIET_TURNS and not self._waits_for.done()


async def _call(receive: Receive) -> Message:
    return await receive()


def _is_disconnect(message: Message) -> bool:
    return bool(message["type"] == "http.disconnect")


def _size_of(message: Message) -> int:
    return _COST_OF_MESSAGE + len(message.get("body", b""))


class ClosingStreamingResponse(StreamingResponse):
    """A ``StreamingResponse`` that closes its generator when the client goes.

    >>> async def rows() -> AsyncIterator[str]:
    ...     async with pipeline.stream(source) as results:
    ...         async for row in results:
    ...             yield f"{row}\\n"
    ...
    ... @app.get("/rows")
    ... async def get_rows() -> Response:
    ...     return ClosingStreamingResponse(rows(), media_type="text/plain")

    Starlette cancels what waits: the generator, if it waits for a row, and the stream ends. But if the
    server waits for a client that does not read, the generator stands at its ``yield``, hears of nothing, and
    its tasks run until the garbage collector finds it. This response closes it in its own task.

    Args:
        content: an async generator, or any iterable that a ``StreamingResponse`` takes, of str or bytes.
        status_code: 200 by default.
        headers: more headers; none by default.
        media_type: what the content is, like ``"text/plain"``; not said by default.
        background: what Starlette runs after the response; nothing by default.

    Raises:
        TypeError: a stream itself was given, instead of a generator with its ``async with`` inside.
    """

    def __init__(
        self,
        content: Any,
        status_code: int = 200,  # where FastAPI looks for it
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        if hasattr(type(content), "__aenter__"):
            raise TypeError(
                f"content must be an async generator, not {type(content).__name__}; write one with "
                "'async with pipeline.stream(...) as results: async for result in results: yield ...'"
            )
        super().__init__(content, status_code, headers, media_type, background)

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            aclose = getattr(self.body_iterator, "aclose", None)
            if aclose is not None:
                await aclose()
