"""Fetching and sending: each answer of a server at its exact time, and the real server, by the command."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import async_pipeline
from async_pipeline import Outcome, Pipeline, Stage, StageExecutionError, StageTimeoutError
from async_pipeline.journal import Journal
from examples.fetch_and_notify import (
    HANG,
    describe,
    make_pipeline,
    misbehaving_server,
    retry_after,
    send_orders,
    worth_another,
)

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "examples" / "fetch_and_notify.py"
NOW = "Wed, 21 Oct 2026 07:28:00 GMT"
IN_A_MINUTE = "Wed, 21 Oct 2026 07:29:00 GMT"

Answer = int | Exception | dict[str, str]  # a status, an error, or the headers of a 429
LOST = httpx.ReadError("reset")


class Service:
    """An API and a webhook in memory; the first calls get these answers, and it notes when they came."""

    def __init__(self, **answers: list[Answer]) -> None:
        self.answers = answers  # by method
        self.calls: list[float] = []
        self.keys: list[str | None] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(asyncio.get_running_loop().time())
        if request.method == "POST":
            self.keys.append(request.headers.get("Idempotency-Key"))
        answers = self.answers.get(request.method)
        answer = answers.pop(0) if answers else 200
        if isinstance(answer, TimeoutError):
            await asyncio.sleep(3600)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, dict):
            return httpx.Response(429, headers=answer)
        return httpx.Response(answer, json={"number": 7})

    @property
    def times(self) -> list[float]:
        """When calls came, from the first one on: before that, the journal's thread takes real time."""
        return [round(call - self.calls[0], 6) for call in self.calls]


async def send(service: Service, folder: Path, numbers: Any = (7,), **options: Any) -> list[Outcome[int]]:
    async with httpx.AsyncClient(base_url="http://shop", transport=httpx.MockTransport(service)) as client:
        return await send_with(client, folder, numbers, **options)


async def send_with(
    client: httpx.AsyncClient, folder: Path, numbers: Any, **options: Any
) -> list[Outcome[int]]:
    """Send orders; without jitter, and without a limit, so that times are round."""
    pipeline = make_pipeline(client)
    options = {"jitter": 0, "limiter": None} | options
    stages = [stage.replace(**options) for stage in pipeline.stages if isinstance(stage, Stage)]
    journal = Journal(folder / "orders.db", run_id="test", key=int)
    return await send_orders(pipeline.replace(stages=stages), numbers, journal)


def failure(outcome: Outcome[int]) -> StageExecutionError:
    assert isinstance(outcome.error, StageExecutionError)
    return outcome.error


async def test_an_order(tmp_path: Path) -> None:
    service = Service()
    [outcome] = await send(service, tmp_path)
    assert (outcome.value, len(service.calls), service.keys) == (7, 2, ["test/7"])


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("answers", "times"),
    [
        ([503, 502, 504], [0, 0.1, 0.3, 0.7]),
        ([LOST], [0, 0.1]),
        ([httpx.ConnectTimeout("")], [0, 0.1]),
        ([TimeoutError()], [0, 1.1]),  # the stage's timeout, and the delay
        ([{"Retry-After": "7"}], [0, 7]),
        ([{"Retry-After": IN_A_MINUTE, "Date": NOW}, 503], [0]),  # in vain: a minute is what there is
        ([{"Retry-After": "0"}, {"Retry-After": NOW, "Date": NOW}], [0, 0, 0]),
        ([{}, {"Retry-After": "soon"}], [0, 0.1, 0.3]),
        ([503] * 9, [0, 0.1, 0.3, 0.7, 1.5]),
        ([404], [0]),
        ([500], [0]),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_when_attempts_are_made(
    method: str, answers: list[Answer], times: list[float], tmp_path: Path
) -> None:
    service = Service(**{method: list(answers)})
    [outcome] = await send(service, tmp_path)
    if len(times) > len(answers):  # the last attempt has succeeded
        assert (outcome.ok, len(set(service.keys))) == (True, 1)
    else:
        stage_name = "fetch" if method == "GET" else "send"
        assert (failure(outcome).stage_name, failure(outcome).attempts) == (stage_name, len(times))
    at_once = [0] if method == "POST" else times[-1:] * outcome.ok
    assert service.times == (at_once + times if method == "POST" else times + at_once)


@pytest.mark.virtual
async def test_jitter_takes_up_to_a_half(tmp_path: Path) -> None:
    service = Service(GET=[503])
    async with httpx.AsyncClient(base_url="http://shop", transport=httpx.MockTransport(service)) as client:
        await send_orders(make_pipeline(client), [7], Journal(tmp_path / "orders.db"))
    assert 0.05 <= service.times[1] <= 0.1


@pytest.mark.virtual
async def test_fifty_attempts_a_second() -> None:
    service = Service()
    async with httpx.AsyncClient(base_url="http://shop", transport=httpx.MockTransport(service)) as client:
        fetch, send = make_pipeline(client).stages
        await Pipeline([fetch]).map(range(101), 100)
        assert service.times == [round(number / 50, 6) for number in range(101)]
    assert isinstance(send, Stage)
    assert isinstance(fetch, Stage)
    assert send.limiter not in (None, fetch.limiter)
    assert send.retry_budget not in (None, fetch.retry_budget)


@pytest.mark.virtual
async def test_no_retries_of_a_service_that_is_down(tmp_path: Path) -> None:
    service = Service(GET=[503] * 1000)
    outcomes = await send(service, tmp_path, range(100))
    assert not any(outcome.ok for outcome in outcomes)
    assert len(service.calls) <= 100 + 25
    assert failure(outcomes[-1]).attempts == 1


async def test_again_only_what_has_failed(tmp_path: Path) -> None:
    first, _ = await send(Service(POST=[404]), tmp_path, [7, 8], retries=0)
    assert describe(failure(first)).startswith("send, attempt 1: Client error '404 Not Found' for url ")
    assert "\n" not in describe(failure(first))
    service = Service()
    outcomes = await send(service, tmp_path, [7, 8])
    assert [outcome.ok for outcome in outcomes] == [True, True]
    assert service.keys == ["test/7"]


async def test_no_order_is_sent_without_a_key() -> None:
    service = Service()
    async with httpx.AsyncClient(base_url="http://shop", transport=httpx.MockTransport(service)) as client:
        outcome = await make_pipeline(client).try_run(7)
    assert isinstance(failure(outcome).original_error, LookupError)
    assert service.keys == []


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "1.5"}, None),
        ({"Retry-After": "²"}, None),
        ({"Retry-After": IN_A_MINUTE, "Date": NOW}, 60),
        ({"Retry-After": NOW, "Date": IN_A_MINUTE}, 0),
        ({"Retry-After": IN_A_MINUTE}, None),
        ({"Retry-After": IN_A_MINUTE, "Date": "today"}, None),
        ({"Retry-After": IN_A_MINUTE, "Date": NOW.replace("GMT", "-0000")}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    encoded = httpx.Headers([(name.encode(), value.encode()) for name, value in headers.items()])
    assert retry_after(httpx.Response(429, headers=encoded)) == seconds


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (StageTimeoutError(1), True),
        (httpx.RemoteProtocolError("hung up"), True),
        (httpx.ReadTimeout("slow"), True),
        (ValueError("no JSON"), False),
        (httpx.TooManyRedirects("round and round"), False),
    ],
)
def test_errors_that_are_no_answers(error: Exception, answer: bool) -> None:
    assert worth_another(error) is answer


# ---- the real server


@pytest.mark.threads
async def test_with_the_real_server(tmp_path: Path) -> None:
    with misbehaving_server() as server:
        server.trouble["GET 5"] = []
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as client:
            # a slow machine must not time out
            outcomes = await send_with(client, tmp_path, range(1, 13), timeout=None)
    assert [outcome.item for outcome in outcomes if not outcome.ok] == [7, 8]
    assert {call: server.calls.count(call) for call in server.calls} == {
        **{f"GET {number}": 1 for number in range(1, 13)},
        **{f"POST {number}": 1 for number in range(1, 13) if number not in (7, 8)},
        **dict.fromkeys(["GET 2", "GET 3", "GET 6", "POST 9", "POST 10"], 2),
        "GET 4": 3,
        "GET 8": 5,
    }
    assert server.orders == {
        f"test/{number}": {"number": number, "item": "chair"}
        for number in range(1, 13)
        if number not in (7, 8)
    }


@pytest.mark.threads
def test_a_server_that_is_closed_lets_hanging_calls_go() -> None:
    with misbehaving_server() as server:
        server.trouble["GET 1"] = [HANG]
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{server.url}/orders/1", timeout=0.1)


@pytest.mark.threads
def test_command(tmp_path: Path) -> None:
    runs = [
        subprocess.run(
            [sys.executable, str(COMMAND), *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(Path(async_pipeline.__file__).parents[1])},
            capture_output=True,
            encoding="utf-8",
            timeout=110,
            check=False,
        )
        for arguments in ([], ["--journal", tmp_path / "o.db"], ["--journal", tmp_path / "o.db"])
    ]
    for run, received in zip(runs, (10, 10, 0), strict=True):
        assert (run.stderr, run.returncode) == ("", 0)
        seven, eight, sent, webhook = run.stdout.splitlines()
        assert seven.startswith("order 7: fetch, attempt ")
        assert ": Client error '404 Not Found' for url " in seven
        assert eight.startswith("order 8: fetch, attempt 5: ")
        assert re.fullmatch(r"10 of 12 orders sent in \d+\.\d s", sent)
        found = re.fullmatch(r"the webhook was called (\d+) times, and has (\d+) orders", webhook)
        assert found is not None
        # a slow machine may call more often, to no effect
        assert int(found[1]) >= (12 if received else 0)
        assert int(found[2]) == received
