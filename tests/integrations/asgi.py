"""A client of an ASGI application in the same event loop: by httpx, or by hand where the sending matters."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI

HOST = "http://test.example"


@asynccontextmanager
async def client_of(
    app: FastAPI, *, lifespan: bool = True, root_path: str = ""
) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application, and give a client of it; an exception that a server would log is raised."""
    transport = httpx.ASGITransport(app, root_path=root_path)
    async with (
        app.router.lifespan_context(app) if lifespan else nullcontext(),
        httpx.AsyncClient(transport=transport, base_url=HOST) as client,
    ):
        yield client


class Exchange:
    """One request, whose response is seen as it comes, and whose client may leave.

    >>> async with Exchange(app, "GET", "/jobs/a/events") as exchange:
    ...     event = await exchange.event()

    Args:
        app: the application.
        method: of the request.
        url: a path, or a whole URL.
        headers: of the request.
        body: of the request; ``None`` for one whose client leaves while it sends.
        scope: what else the server says.
    """

    def __init__(
        self,
        app: FastAPI,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = b"",
        scope: Mapping[str, Any] | None = None,
    ) -> None:
        self._app = app
        parts = urlsplit(url)
        sent = {"host": "test.example", **(headers or {})}
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": parts.path,
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("test.example", 80),
            "state": {},
            **(scope or {}),
        }
        self._body = body
        self._is_sent = False
        self._gone = asyncio.Event()
        self._begun = asyncio.Event()
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()
        await self.task

    async def _receive(self) -> dict[str, Any]:
        if not self._is_sent:
            self._is_sent = True
            return {
                "type": "http.request",
                "body": self._body or b'{"inp',
                "more_body": self._body is None,
            }
        if self._body is not None:
            await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            self._begun.set()
            return
        if message.get("body"):
            self._chunks.put_nowait(message["body"])
        if not message.get("more_body", False):
            self._chunks.put_nowait(None)

    def leave(self) -> None:
        self._gone.set()

    async def began(self) -> int:
        """Wait for the status."""
        await self._begun.wait()
        return self.status

    async def chunk(self) -> str | None:
        """Wait for the next part of the body; None is its end."""
        part = await self._chunks.get()
        return None if part is None else part.decode()

    async def event(self) -> tuple[str, dict[str, Any]] | None:
        """Wait for the next event that is not a comment: its id and its data."""
        while (text := await self.chunk()) is not None:
            if not text.startswith(":"):
                assert text.endswith("\n\n")
                fields = dict(line.split(": ", 1) for line in text[:-2].split("\n"))
                assert fields.keys() == {"id", "data"}
                return fields["id"], json.loads(fields["data"])
        return None
