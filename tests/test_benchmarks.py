"""Whatever the benchmarks compare does the same work, and their tables can be made."""

import asyncio
import re
from functools import partial

import pytest
from taskiq import InMemoryBroker

from benchmarks import by_hand, engines, in_fastapi, journal, neighbours, tables, work
from benchmarks.measure import Ratio, measure, ratio
from benchmarks.memory import peak_bytes
from benchmarks.work import Contender

ITEMS = range(1000, 1300)  # several times the concurrency
TINY = tables.Effort(5, 60, 2, 60, 2, (20, 60), 1)


def results(contender: Contender) -> list[int]:
    async def main() -> list[int]:
        return await contender(ITEMS)

    return asyncio.run(main())


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: f"{row.title} against {row.limit_title}")
def test_ours_and_the_limit_give_the_same_results(row: tables.Row) -> None:
    assert results(row.ours) == work.expected(ITEMS)
    assert results(row.limit) == work.expected(ITEMS)


def test_each_does_the_same_work() -> None:
    assert results(work.each_items) == work.expected(ITEMS)


def test_the_five_stages_of_the_neighbours_do_the_same_work() -> None:
    assert results(work.one_by_one(by_hand.run_suspending)) == work.expected(ITEMS)


@pytest.mark.parametrize("name", neighbours.FACTORIES)
def test_a_neighbour_gives_the_same_results(name: str) -> None:
    found, missing = neighbours.find_neighbours()
    if name in missing:
        pytest.skip(f"{name} is not installed; the dependency group bench has it")
    neighbour = next(each for title, each in found.items() if title.startswith(f"{name} "))
    assert neighbour.map is not None
    assert neighbour.stream is not None
    assert results(neighbour.map) == work.expected(ITEMS)
    streamed = results(neighbour.stream)
    assert (streamed if neighbour.keeps_order else sorted(streamed)) == work.expected(ITEMS)
    if neighbour.run is not None:
        assert results(neighbour.run) == work.expected(ITEMS)


def test_a_neighbour_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "FACTORIES", {"no-such-neighbour": neighbours.FACTORIES["aiometer"]})
    assert neighbours.find_neighbours() == ({}, ["no-such-neighbour"])
    report = "\n".join(tables.write_tables(TINY, "`run`"))
    assert "Not installed, so left out: no-such-neighbour." in report


def test_every_contender_is_measured_in_every_round() -> None:
    calls: list[str] = []

    def noting(name: str) -> Contender:
        async def contender(items: object) -> list[int]:
            calls.append(name)
            return []

        return contender

    seconds = measure({"a": noting("a"), "b": noting("b")}, ITEMS, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # a warm-up, and then another one goes first each time
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_round_by_round() -> None:
    compared = ratio([3.0, 2.0, 8.0], [1.0, 2.0, 4.0])
    assert compared == Ratio(middle=2.0, least=1.0, most=3.0)
    assert re.findall(r"[\d.]+", str(compared)) == ["2.00", "1.00", "3.00"]


@pytest.mark.parametrize("title", ["map", "stream"])
def test_memory_above_the_results_is_flat(title: str) -> None:
    few, many = peak_bytes(title, 500), peak_bytes(title, 20_000)
    assert 0 < many < 1.5 * few


def test_the_tables_hold_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "FACTORIES", {})
    monkeypatch.setattr(engines, "CHUNK_SIZES", (10,))
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr(tables, "peak_bytes", lambda title, count: 1024 * count)
    report = list(tables.write_tables(TINY, ""))
    for row in tables.ROWS:
        assert any(row.title in line and row.limit_title in line for line in report)
    assert any(line.startswith("| `stream`, KiB above the results | 20 | 60 | +40 KiB |") for line in report)


def test_only_the_rows_that_are_asked_for_are_measured() -> None:
    report = "\n".join(tables.write_tables(TINY, "hooks"))
    assert "hooks" in report
    assert "`stream`, the same work" not in report


async def test_each_request_to_fastapi_does_the_same_work() -> None:
    async with in_fastapi.jobs as jobs:
        answers = {name: await send() for name, send in in_fastapi.REQUESTS.items()}
        (job,) = await jobs.list(limit=1)
        async for changed in jobs.watch(job.id):
            job = changed
    accepted = answers.pop("submit")
    assert set(answers.values()) == {(200, b"6")}
    assert accepted[0] == 201
    assert job.result["outputs"] == {"result": 6}


async def test_a_contender_in_fastapi_answers_each_request() -> None:
    assert await in_fastapi.contender("execution")(range(3)) == [200] * 3
    assert await in_fastapi.contender("submit")(range(3)) == [201] * 3


@pytest.mark.parametrize("case", journal.CASES, ids=lambda case: case.title)
def test_the_cost_of_a_journal_is_measured(case: journal.Case) -> None:
    cost = journal.costs(case, 200, 1)
    assert cost.micros > 0
    assert cost.held > 0


@pytest.mark.parametrize("chunk_size", [1, 10])
def test_the_cost_of_an_engine_is_measured(chunk_size: int) -> None:
    engine = partial(engines.over_taskiq, InMemoryBroker())
    assert engines.micros(engines.Case("in memory", engine, chunk_size), 20, 1) > 0
