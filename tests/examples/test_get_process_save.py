"""The worker's phases one by one, its transactions on a real SQLite, and the command in its docstring.

Most of it has an event loop of its own: aiosqlite has a thread, which a virtual clock can't see.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from types import coroutine
from typing import Any, TypeVar

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

import async_pipeline
from async_pipeline import (
    DeadlineExceeded,
    Finish,
    MissingFieldsError,
    Outcome,
    Pipeline,
    Stage,
    StageExecutionError,
    each,
)
from examples import get_process_save as example
from examples.get_process_save import ELEMENTS, Context, Row, UnitOfWork, fetch, open_database, process, save

pytestmark = pytest.mark.threads

ROOT = Path(__file__).parents[2]
LIBRARY = Path(async_pipeline.__file__).parents[1]
T = TypeVar("T")
Sessions = async_sessionmaker[AsyncSession]

HYDROGEN: Row = {"symbol": "H", "name": "Hydrogen", "melting_point": -259.16, "boiling_point": -252.88}
DOCUMENT = {"symbol": "H", "name": "Hydrogen", "melting_point": 13.99, "boiling_point": 20.271}


def borrowed(sessions: Sessions) -> int:
    pool: Any = sessions.kw["bind"].pool
    return pool.checkedout() if hasattr(pool, "checkedout") else 0  # SQLAlchemy 2.0 has no pool for SQLite


def run(work: Callable[[Sessions], Coroutine[Any, Any, T]], database: Path) -> T:
    """Run a test with a database; at its end there is no task, and each connection is back in the pool."""

    async def main() -> T:
        async with open_database(database) as sessions:
            result = await work(sessions)
            assert borrowed(sessions) == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    result = asyncio.run(main())
    gc.collect()  # what was left open is a warning, so an error
    return result


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "elements.db"


async def stored(sessions: Sessions) -> list[str]:
    async with sessions() as session:
        return [*await session.scalars(select(example.Element.symbol).order_by("symbol"))]


# -- each phase alone


async def test_fetch(tmp_path: Path) -> None:
    (tmp_path / "H.json").write_text(json.dumps(DOCUMENT))
    context: Any = {"source": tmp_path}
    assert await fetch.run("H", context=context) == DOCUMENT


async def test_fetch_of_what_is_not_there(tmp_path: Path) -> None:
    context: Any = {"source": tmp_path}
    with pytest.raises(StageExecutionError) as failure:
        await fetch.replace(on_error=None).run("H", context=context)
    assert isinstance(failure.value.original_error, LookupError)
    assert failure.value.attempts == 1


@pytest.mark.virtual
async def test_fetch_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [OSError("busy"), OSError("still busy"), json.dumps(DOCUMENT)]

    def read_text(path: Path, encoding: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return str(answer)

    monkeypatch.setattr(Path, "read_text", read_text)
    context: Any = {"source": ELEMENTS}
    assert await fetch.run("H", context=context) == DOCUMENT


def test_process() -> None:
    assert process.handler(DOCUMENT) == HYDROGEN


@pytest.mark.parametrize("kelvin", [None, "13.99"])
def test_process_of_what_is_no_temperature(kelvin: object) -> None:
    with pytest.raises(ValueError, match="is no temperature"):
        process.handler(DOCUMENT | {"melting_point": kelvin})


def test_save(database: Path) -> None:
    async def work(sessions: Sessions) -> list[str]:
        async with sessions.begin() as session:
            answer = await save.run(HYDROGEN, context={"session": session})
        assert answer == "saved: Hydrogen melts at -259.2 °C, boils at -252.9 °C"
        return await stored(sessions)

    assert run(work, database) == ["H"]


def test_save_of_a_row_that_is_there(database: Path) -> None:
    async def work(sessions: Sessions) -> Any:
        async with sessions.begin() as session:
            await save.run(HYDROGEN, context={"session": session})
            await save.run(HYDROGEN | {"name": "Protium"}, context={"session": session})
        async with sessions() as session:
            element = (await session.scalars(select(example.Element))).one()
            return {column: getattr(element, column) for column in HYDROGEN}

    assert run(work, database) == HYDROGEN | {"name": "Protium"}


def test_save_of_a_row_that_the_database_refuses(database: Path) -> None:
    async def work(sessions: Sessions) -> Exception:
        async with sessions() as session:
            with pytest.raises(StageExecutionError) as failure:
                await save.replace(on_error=None).run(
                    HYDROGEN | {"boiling_point": -260.0}, context={"session": session}
                )
        return failure.value

    error: Any = run(work, database)
    assert isinstance(error.original_error, IntegrityError)


def test_requires_all_that_a_row_needs() -> None:
    assert set(example.phases.stages[1].fields) == set(Row.__annotations__)  # type: ignore[attr-defined]
    assert set(Row.__annotations__) == {column.name for column in example.Element.__table__.columns}


# -- what is kept, and what is not


def phases(last: Callable[..., Any], *, on_error: Any = None) -> Pipeline[str, str]:
    """The example's own, but for the handler that saves."""
    return Pipeline([*example.phases.stages[:-1], save.replace(handler=last, on_error=on_error)])


async def save_two(row: Row, context: Context) -> str:
    for symbol in (row["symbol"], f"{row['symbol']}+"):
        await save.handler(row | {"symbol": symbol}, context)
    return "saved two"


def worker(step: Pipeline[str, str], sessions: Sessions) -> Pipeline[str, str]:
    return Pipeline([UnitOfWork(step, sessions)], name="worker")


IN: Any = {"source": ELEMENTS}


def test_commits_what_succeeds(database: Path) -> None:
    async def work(sessions: Sessions) -> list[str]:
        assert await worker(phases(save_two), sessions).run("H", context=IN) == "saved two"
        return await stored(sessions)

    assert run(work, database) == ["H", "H+"]


def test_rolls_back_what_fails(database: Path) -> None:
    async def save_and_fail(row: Row, context: Context) -> None:
        await save_two(row, context)
        raise ConnectionError

    async def work(sessions: Sessions) -> Outcome[str]:
        outcome = await worker(phases(save_and_fail), sessions).try_run("H", context=IN)
        assert await stored(sessions) == []
        return outcome

    outcome = run(work, database)
    assert isinstance(outcome.error, StageExecutionError)
    assert outcome.error.stage_name == "save"
    assert isinstance(outcome.error.original_error, ConnectionError)


def test_rolls_back_what_is_answered(database: Path) -> None:
    async def save_and_fail(row: Row, context: Context) -> None:
        await save_two(row, context)
        raise LookupError("gone\nfor ever")

    async def work(sessions: Sessions) -> Outcome[str]:
        step = phases(save_and_fail, on_error=example.answer("too late", LookupError))
        outcome = await worker(step, sessions).try_run("H", context=IN)
        assert await stored(sessions) == []
        return outcome

    assert run(work, database).unwrap() == "too late: gone"


def test_an_error_that_has_no_answer_is_a_failure(database: Path) -> None:
    async def work(sessions: Sessions) -> Outcome[str]:
        async def fail(row: Row, context: Context) -> None:
            raise ConnectionError

        step = phases(fail, on_error=example.answer("too late", LookupError))
        return await worker(step, sessions).try_run("H", context=IN)

    error: Any = run(work, database).error
    assert isinstance(error.original_error, ConnectionError)


def test_commits_before_a_finish(database: Path) -> None:
    async def save_and_finish(row: Row, context: Context) -> None:
        await save_two(row, context)
        raise Finish("enough")

    async def work(sessions: Sessions) -> str:
        answer = await worker(phases(save_and_finish), sessions).run("H", context=IN)
        assert await stored(sessions) == ["H", "H+"]
        return answer

    assert run(work, database) == "enough"


def test_rolls_back_at_the_end_of_the_time(database: Path) -> None:
    async def save_and_hang(row: Row, context: Context) -> None:
        await save_two(row, context)
        await asyncio.Event().wait()

    async def work(sessions: Sessions) -> Outcome[str]:
        outcome = await worker(phases(save_and_hang), sessions).try_run("H", context=IN, timeout=0.5)
        assert await stored(sessions) == []
        return outcome

    error: Any = run(work, database).error
    assert isinstance(error.original_error, DeadlineExceeded)


def test_a_commit_that_fails_is_a_failure(database: Path) -> None:
    async def work(sessions: Sessions) -> Outcome[str]:
        @event.listens_for(sessions.kw["bind"].sync_engine, "commit")
        def fail(connection: object) -> None:
            raise OperationalError("COMMIT", None, Exception("disk full"))

        outcome = await worker(phases(save_two), sessions).try_run("H", context=IN)
        event.remove(sessions.kw["bind"].sync_engine, "commit", fail)
        assert await stored(sessions) == []
        return outcome

    outcome = run(work, database)
    assert isinstance(outcome.error, OperationalError)
    assert example.describe(outcome).startswith("H   FAILED to commit: (builtins.Exception) disk full")


@coroutine
def cancelled_at(turn: int, work: Coroutine[Any, Any, T]) -> Any:
    """Await ``work`` in a task that is cancelled when it suspends for the ``turn``-th time."""
    step: Callable[[Any], Any] = work.send
    value: Any = None
    for suspension in count():
        try:
            waits_for = step(value)
        except StopIteration as end:
            return end.value
        if suspension == turn:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        try:
            step, value = work.send, (yield waits_for)
        except BaseException as error:
            step, value = work.throw, error


def test_rolls_back_when_cancelled_at_any_await(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = []

    async def work(sessions: Sessions) -> None:
        async def alone() -> str:
            return await worker(phases(save_two), sessions).run("H", context=IN)

        for turn in count():
            task = asyncio.ensure_future(cancelled_at(turn, alone()))
            await asyncio.wait({task})
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert borrowed(sessions) == 0
            symbols = await stored(sessions)
            if not task.cancelled():
                assert (task.result(), symbols) == ("saved two", ["H", "H+"])
                return
            assert symbols in ([], ["H", "H+"])
            kept.append(bool(symbols))
            async with sessions.begin() as session:
                await session.execute(example.Element.__table__.delete())  # type: ignore[attr-defined]

    run(work, database)
    assert not caplog.records
    assert len(kept) > 5
    assert kept == sorted(kept)  # nothing; and all as soon as the commit has begun
    assert sum(kept) == 1


def test_rolls_back_the_items_of_a_batch_that_is_cancelled(database: Path) -> None:
    batch: asyncio.Future[Any] = None  # type: ignore[assignment]

    async def save_and_hang(row: Row, context: Context) -> None:
        await save_two(row, context)
        if row["symbol"] == "Fe":
            asyncio.get_running_loop().call_soon(batch.cancel)
            await asyncio.Event().wait()

    async def work(sessions: Sessions) -> list[str]:
        nonlocal batch
        batch = asyncio.ensure_future(
            worker(phases(save_and_hang), sessions).map(["H", "O", "Fe"], 1, context=IN)
        )
        await asyncio.wait({batch})
        assert batch.cancelled()
        return await stored(sessions)

    assert run(work, database) == ["H", "H+", "O", "O+"]


def test_each_item_of_a_batch_has_its_own_session(database: Path) -> None:
    seen = []

    async def note(row: Row, context: Context) -> str:
        seen.append(context["session"])
        return await save_two(row, context)

    async def work(sessions: Sessions) -> list[str]:
        symbols = ["H", "Og", "O", "Fe"]
        given = dict(IN)
        results = await worker(phases(note), sessions).map(symbols, return_exceptions=True, context=given)
        assert [isinstance(result, Exception) for result in results] == [False, True, False, False]
        assert given == IN
        return await stored(sessions)

    assert run(work, database) == ["Fe", "Fe+", "H", "H+", "O", "O+"]
    assert len({id(session) for session in seen}) == len(seen) == 3


def test_each_element_has_its_own_session_though_they_share_a_context(database: Path) -> None:
    async def save_slowly(row: Row, context: Context) -> str:
        session = context["session"]
        await save_two(row, context)
        assert context["session"] is session
        return "saved two"

    async def work(sessions: Sessions) -> list[str]:
        given = dict(IN)
        saving: Any = each(UnitOfWork(phases(save_slowly), sessions))
        assert await saving.run(["H", "O", "Fe"], context=given) == ["saved two"] * 3
        assert given == IN
        return await stored(sessions)

    assert run(work, database) == ["Fe", "Fe+", "H", "H+", "O", "O+"]


def test_a_unit_of_work_runs_alone(database: Path) -> None:
    async def save_hydrogen(_: str, context: Context) -> str:
        return str(await save.handler(HYDROGEN, context))

    async def work(sessions: Sessions) -> list[str]:
        await UnitOfWork(Stage("save", save_hydrogen), sessions).run("H")
        return await stored(sessions)

    assert run(work, database) == ["H"]


# -- the worker


def test_work(database: Path) -> None:
    async def work(sessions: Sessions) -> list[Outcome[str]]:
        return await example.work(["H", "He", "As", "Og", "Xx"], sessions)

    hydrogen, helium, arsenic, oganesson, unknown = run(work, database)
    assert (hydrogen.index, hydrogen.item, hydrogen.ok) == (0, "H", True)
    assert helium.unwrap() == "rejected: None is no temperature"
    assert "CHECK constraint failed" in arsenic.unwrap()
    assert unknown.unwrap() == "unknown: no document Xx"
    error: Any = oganesson.error
    assert (error.stage_name, error.item, error.attempts) == ("require", "Og", 1)
    assert isinstance(error.original_error, MissingFieldsError)
    assert error.original_error.fields == ("melting_point", "boiling_point")


def test_work_with_another_source(database: Path, tmp_path: Path) -> None:
    (tmp_path / "D.json").write_text(json.dumps(DOCUMENT | {"symbol": "D", "name": "Deuterium"}))

    async def work(sessions: Sessions) -> list[Outcome[str]]:
        return await example.work(["D", "H"], sessions, tmp_path)

    deuterium, hydrogen = run(work, database)
    assert deuterium.unwrap().startswith("saved: Deuterium ")
    assert hydrogen.unwrap() == "unknown: no document H"


def test_many_at_once_on_one_row(database: Path) -> None:
    async def work(sessions: Sessions) -> list[str]:
        outcomes = await example.work(["H", "O"] * 20, sessions)
        assert {outcome.ok for outcome in outcomes} == {True}
        return await stored(sessions)

    assert run(work, database) == ["H", "O"]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, (ROOT / "examples" / "get_process_save.py", *arguments))],
        env=os.environ | {"PYTHONPATH": str(LIBRARY), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def test_command_prints_what_its_docstring_shows_and_may_run_again(database: Path) -> None:
    first, again = (command("--database", database) for _ in range(2))
    shown = (example.__doc__ or "").partition("each id:\n\n")[2].partition("\n\n")[0]
    expected = "\n".join(line.removeprefix("    ") for line in shown.splitlines())
    assert first.stdout.replace(str(database), "elements.db").rstrip() == expected
    assert (first.stderr, first.returncode) == ("", 1)  # one has failed
    assert (again.stdout, again.stderr, again.returncode) == (first.stdout, "", 1)
    assert run(stored, database) == ["Fe", "H", "Hg", "O"]


def test_command_of_what_succeeds(database: Path) -> None:
    done = command("H", "Xx", "--database", database)
    assert done.stdout.splitlines()[1:] == ["Xx  unknown: no document Xx", f"1 elements in {database}"]
    assert (done.stderr, done.returncode) == ("", 0)
