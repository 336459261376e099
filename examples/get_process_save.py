"""A worker: get a document by its id, process it, save the result; each run of it is one transaction.

    python examples/get_process_save.py                  # the documents in examples/data/elements
    python examples/get_process_save.py H O --database elements.db --source examples/data/elements

It needs ``pip install "sqlalchemy[asyncio]>=2.0.55" aiosqlite``, and prints what became of each id:

    H   saved: Hydrogen melts at -259.2 °C, boils at -252.9 °C
    He  rejected: None is no temperature
    O   saved: Oxygen melts at -218.8 °C, boils at -183.0 °C
    Fe  saved: Iron melts at 1537.8 °C, boils at 2860.8 °C
    As  refused: (sqlite3.IntegrityError) CHECK constraint failed: melts_before_it_boils
    Hg  saved: Mercury melts at -38.8 °C, boils at 356.7 °C
    Og  FAILED in require, attempt 1: missing 'melting_point', 'boiling_point'
    Xx  unknown: no document Xx
    4 elements in elements.db

Run again, it prints the same, and the database is the same. (Helium freezes under pressure only, arsenic
turns into gas before it melts, and of oganesson there were never more than a few atoms.)

``tests/examples/test_get_process_save.py`` has each stage alone, by ``process.handler(document)`` or
``fetch.run("H", context=...)``, and what becomes of a run that fails, by ``save.replace(handler=...)``.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from sqlalchemy import URL, CheckConstraint, func, select
from sqlalchemy.dialects.sqlite import insert  # PostgreSQL's has the same methods
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from async_pipeline import Finish, Outcome, Pipeline, StageExecutionError, require, staged
from async_pipeline.types import OnError, Step

ELEMENTS = Path(__file__).parent / "data" / "elements"


class Base(DeclarativeBase):
    pass


class Element(Base):
    """A chemical element, and where it melts and boils at the pressure of the air, in °C."""

    __tablename__ = "elements"
    __table_args__ = (CheckConstraint("melting_point < boiling_point", name="melts_before_it_boils"),)

    symbol: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    melting_point: Mapped[float]
    boiling_point: Mapped[float]


class Row(TypedDict):
    symbol: str
    name: str
    melting_point: float
    boiling_point: float


class Context(TypedDict):
    source: Path
    session: AsyncSession


# -- the three stages, and what each answers when it fails


def answer(status: str, *errors: type[Exception]) -> OnError:
    """Make an ``on_error`` that ends the run with an answer after these errors; others stay failures.

    An answer is final. A failure is for somebody to look at, or for the queue to deliver again.
    """

    async def end_run(value: Any, error: Exception, context: Context) -> NoReturn:
        if not isinstance(error, errors):
            raise error
        await context["session"].rollback()  # Finish is a success, and would commit what is there so far
        reason, *_ = str(error).split("\n")
        raise Finish(f"{status}: {reason}")

    return end_run


@staged(
    executor="thread",
    timeout=10,
    retries=2,
    retry_delay=0.1,
    retry_on=OSError,  # a LookupError would not go away
    on_error=answer("unknown", LookupError),
)
def fetch(symbol: str, context: Context) -> dict[str, Any]:
    """Get a document; put the call of your HTTP client here."""
    try:
        text = (context["source"] / f"{symbol}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LookupError(f"no document {symbol}") from None
    document: dict[str, Any] = json.loads(text)
    return document


@staged(on_error=answer("rejected", ValueError))
def process(document: dict[str, Any]) -> Row:
    """Turn a document into a row; pure, so a test needs nothing but a dict."""
    return {
        "symbol": document["symbol"],
        "name": document["name"],
        "melting_point": to_celsius(document["melting_point"]),
        "boiling_point": to_celsius(document["boiling_point"]),
    }


def to_celsius(kelvin: object) -> float:
    if not isinstance(kelvin, int | float):
        raise ValueError(f"{kelvin!r} is no temperature")
    return round(kelvin - 273.15, 2)


@staged(on_error=answer("refused", IntegrityError))
async def save(row: Row, context: Context) -> str:
    """Insert the row, or update the one that is there, so that it does no harm to save it again."""
    upsert = insert(Element).values(**row).on_conflict_do_update(index_elements=["symbol"], set_=dict(row))
    await context["session"].execute(upsert)
    return (
        f"saved: {row['name']} melts at {row['melting_point']:.1f} °C, boils at {row['boiling_point']:.1f} °C"
    )


phases = fetch | require("symbol", "name", "melting_point", "boiling_point") | process | save


# -- around them, for each run: a session, and a transaction


@dataclass(frozen=True)
class UnitOfWork:
    """A step that runs another one with a session in its context, and commits if it succeeds.

    After a failure or a cancellation it rolls back; one that comes while it commits waits for the commit.
    The session takes a connection when it is first used, so a slow ``fetch`` holds none.
    """

    step: Step[str, str]
    sessions: async_sessionmaker[AsyncSession]
    name: str = "unit_of_work"

    async def run(self, value: str, *, context: Any = None) -> str:
        async with self.sessions.begin() as session:
            return await self.step.run(value, context={**(context or {}), "session": session})


@asynccontextmanager
async def open_database(path: Path) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    engine = create_async_engine(URL.create("sqlite+aiosqlite", database=str(path)))
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield async_sessionmaker(engine)
    finally:
        await engine.dispose()


# -- the worker


async def work(
    symbols: Iterable[str], sessions: async_sessionmaker[AsyncSession], source: Path = ELEMENTS
) -> list[Outcome[str]]:
    """Return what became of each, in order; five run at a time, each in a transaction of its own."""
    worker: Pipeline[str, str] = Pipeline([UnitOfWork(phases, sessions)], name="worker")
    async with worker.stream(symbols, concurrency=5, timeout=60, context={"source": source}) as results:
        return [outcome async for outcome in results.outcomes()]


def describe(outcome: Outcome[str]) -> str:
    error = outcome.error
    if error is None:
        return f"{outcome.item:<3} {outcome.value}"
    if isinstance(error, StageExecutionError):
        where = f"{error.stage_name}, attempt {error.attempts}"
        return f"{outcome.item:<3} FAILED in {where}: {error.original_error}"
    return f"{outcome.item:<3} FAILED to commit: {error}"


async def run_worker(symbols: list[str], source: Path, database: Path) -> bool:
    """Print what became of each, and return whether none has failed."""
    async with open_database(database) as sessions:
        outcomes = await work(symbols, sessions, source)
        async with sessions() as session:
            count = await session.scalar(select(func.count()).select_from(Element))
    print(*map(describe, outcomes), f"{count} elements in {database}", sep="\n")
    return all(outcome.ok for outcome in outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description="Where do chemical elements melt and boil?")
    parser.add_argument("symbols", nargs="*", default=["H", "He", "O", "Fe", "As", "Hg", "Og", "Xx"])
    parser.add_argument("--source", type=Path, default=ELEMENTS, help="the folder with a document of each")
    parser.add_argument("--database", type=Path, default=Path("elements.db"))
    options = parser.parse_args()
    return 0 if asyncio.run(run_worker(options.symbols, options.source, options.database)) else 1


if __name__ == "__main__":
    sys.exit(main())
