"""Fetch orders from an API, and send each to a webhook, while both of them misbehave.

    $ pip install async-pipeline aiolimiter httpx
    $ python examples/fetch_and_notify.py
    order 7: fetch, attempt 1: Client error '404 Not Found' for url 'http://127.0.0.1:33845/orders/7'
    order 8: fetch, attempt 5: Server error '503 Service Unavailable' for url 'http://127.0.0.1:33845/orders/8'
    10 of 12 orders sent in 1.8 s
    the webhook was called 12 times, and has 10 orders

The server is in this file, too. It limits, fails, hangs, and hangs up. With ``--journal orders.db``, the same
command sends what the journal does not know as sent, also after a ``kill -9``; an order that was in flight
then is sent again, with the same key.
"""

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from aiolimiter import AsyncLimiter

from async_pipeline import (
    Outcome,
    Pipeline,
    RetryBudget,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    item_key,
)
from async_pipeline.journal import Journal

Order = dict[str, Any]

# ---- the pipeline: what becomes of one order


def make_pipeline(client: httpx.AsyncClient) -> Pipeline[int, int]:
    """Fetch an order by its number, and send it; what comes out is the number."""

    async def fetch(number: int) -> Order:
        response = await client.get(f"/orders/{number}")
        order: Order = response.raise_for_status().json()
        return order

    async def send(order: Order) -> int:
        # the same key in each attempt, and after a crash: by it the receiver knows what it has already
        if (key := item_key()) is None:
            raise LookupError("no item_key(): give the run a journal")
        response = await client.post("/webhook", json=order, headers={"Idempotency-Key": key})
        response.raise_for_status()
        return int(order["number"])

    return Pipeline([patient("fetch", fetch), patient("send", send)], name="orders")


def patient(name: str, handler: Any) -> Stage[Any, Any]:
    """Return a stage that calls a service, with a budget and a limiter for this service."""
    return Stage(
        name,
        handler,
        timeout=1,  # for each attempt; in real life more than for this server
        retries=4,
        retry_delay=0.1,
        backoff="exponential",
        jitter=0.5,
        retry_on=worth_another,
        retry_budget=RetryBudget(max_tokens=50),  # no retries of a service that is down
        limiter=AsyncLimiter(1, 1 / 50),  # 50 attempts a second, evenly
    )


def worth_another(error: Exception) -> bool | float:
    """Tell whether another attempt may help, or in how many seconds."""
    if not isinstance(error, httpx.HTTPStatusError):
        return isinstance(error, (StageTimeoutError, httpx.TransportError))
    if error.response.status_code not in (429, 502, 503, 504):
        return False
    wait = retry_after(error.response)
    return True if wait is None else wait


def retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that the server asks us to wait: so many, or until a date by its own clock."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(response.headers["Date"])
    except (KeyError, TypeError, ValueError):  # nothing, or nothing that can be read
        return None
    return max(0.0, wait.total_seconds())


async def send_orders(
    pipeline: Pipeline[int, int], numbers: Iterable[int], journal: Journal
) -> list[Outcome[int]]:
    """Send the orders, ten at a time, in a minute each at the most; return what became of them, in order."""
    async with pipeline.stream(numbers, concurrency=10, timeout=60, journal=journal) as results:
        return [outcome async for outcome in results.outcomes()]


async def send_all(base_url: str, journal: Journal) -> list[Outcome[int]]:
    async with httpx.AsyncClient(base_url=base_url) as client:
        return await send_orders(make_pipeline(client), range(1, 13), journal)


# ---- the server: an API and a webhook that misbehave, and then do what they should

Answer = tuple[int, str]  # a status, and Retry-After
OK, HANG, HANG_UP = (200, ""), (0, "hang"), (0, "hang up")
TROUBLE: dict[str, list[Answer]] = {  # what the first calls get
    "GET 2": [(429, "1")],
    "GET 3": [(429, "a date")],
    "GET 4": [(503, ""), (503, "")],
    "GET 5": [HANG],
    "GET 6": [HANG_UP],
    "GET 7": [(404, "")] * 10,
    "GET 8": [(503, "")] * 10,
    "POST 9": [HANG_UP],  # the order has arrived all the same
    "POST 10": [(429, "1")],
}


class Server(ThreadingHTTPServer):
    daemon_threads = False  # it waits for them when it is closed

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.closing = threading.Event()
        self.trouble = {call: [*answers] for call, answers in TROUBLE.items()}
        self.calls: list[str] = []
        self.orders: dict[str, Order] = {}  # by idempotency key

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class RequestHandler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        number = int(self.path.removeprefix("/orders/"))
        self.answer(number, {"number": number, "item": "chair"})

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(order["number"], {}, order)

    def answer(self, number: int, body: Order, received: Order | None = None) -> None:
        call = f"{self.command} {number}"
        self.server.calls.append(call)
        trouble = self.server.trouble.get(call)
        answer = trouble.pop(0) if trouble else OK
        if received and answer in (OK, HANG_UP):
            self.server.orders.setdefault(self.headers["Idempotency-Key"], received)
        if answer == HANG:
            self.server.closing.wait()
        elif answer != HANG_UP:
            self.respond(*answer, json.dumps(body).encode())

    def respond(self, status: int, retry_after: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if retry_after:
            date = formatdate(time.time() + 1, usegmt=True)
            self.send_header("Retry-After", date if retry_after == "a date" else retry_after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@contextmanager
def misbehaving_server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Send orders of an API to a webhook; both misbehave.")
    parser.add_argument("--journal", metavar="FILE", help="keeps what has been sent, for a second start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, misbehaving_server() as server:
        journal = Journal(options.journal or Path(folder, "orders.db"), run_id="orders", key=int)
        started = time.perf_counter()
        outcomes = asyncio.run(send_all(server.url, journal))
        seconds = time.perf_counter() - started
    for outcome in outcomes:
        if isinstance(outcome.error, StageExecutionError):
            print(f"order {outcome.item}: {describe(outcome.error)}")
    print(f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)} orders sent in {seconds:.1f} s")
    posts = sum(call.startswith("POST") for call in server.calls)
    print(f"the webhook was called {posts} times, and has {len(server.orders)} orders")


def describe(error: StageExecutionError) -> str:
    reason, *_ = str(error.original_error).splitlines()
    return f"{error.stage_name}, attempt {error.attempts}: {reason}"


if __name__ == "__main__":
    main()
