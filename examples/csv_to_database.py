"""A CSV file into a database; rows that can't be used go to a file of their own, with line and reason.

    python examples/csv_to_database.py                  # examples/data/peaks.csv into peaks.db
    python examples/csv_to_database.py upload.csv --database peaks.db --rejected rejected.csv

It prints ``19 rows: 14 loaded, 5 rejected, see peaks.rejected.csv``, and that file is then:

    line,reason,text
    7,"height_m is no whole number: '8,188'","Cho Oyu,""8,188"",1954"
    13,4 fields instead of 3,"Broad Peak,8,051,1957"
    18,name is empty,",7546,1956"
    19,"',' expected after '""'","Mauna Kea,""4207""m,"
    4,CHECK constraint failed: height_m BETWEEN 1 AND 8849,"Kangchenjunga,28169,1955"

What only the database refuses comes after its batch. Run again, it changes nothing: a row that is there is
updated, and of several with one name the last counts. A file of any length takes the memory of some
thousand rows. After an error or a Ctrl-C, the batches that were saved are there; run it again for the rest.
"""

import argparse
import asyncio
import csv
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from async_pipeline import Pipeline, StageExecutionError, require, staged

PEAKS = Path(__file__).parent / "data" / "peaks.csv"
BATCH = 1000  # rows in one transaction

COLUMNS = ("name", "height_m", "first_ascent")
TABLE = """
CREATE TABLE IF NOT EXISTS peaks (
    name TEXT PRIMARY KEY,
    height_m INTEGER NOT NULL CHECK (height_m BETWEEN 1 AND 8849),
    first_ascent INTEGER
)"""
UPSERT = """
INSERT INTO peaks VALUES (:name, :height_m, :first_ascent)
ON CONFLICT (name) DO UPDATE SET height_m = excluded.height_m, first_ascent = excluded.first_ascent"""
AS_IT_IS: Any = {"errors": "surrogateescape", "newline": ""}  # so a rejected row is written as it was read
REFUSALS = (sqlite3.IntegrityError, OverflowError)  # of one row


class Record(NamedTuple):
    line: int  # its first one, counted from 1
    text: str
    fields: list[str] | csv.Error


class Peak(TypedDict):
    name: str
    height_m: int
    first_ascent: int | None


# -- extract


def read_records(lines: Iterable[str]) -> Iterator[Record]:
    """Yield record by record, those that are no CSV included; blank lines are left out."""
    text: list[str] = []

    def note() -> Iterator[str]:
        for line in lines:
            text.append(line)
            yield line

    reader = csv.reader(note(), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = error
        if fields:
            yield Record(line, "".join(text).rstrip("\r\n"), fields)
        text.clear()


# -- transform


def name_fields(record: Record, context: dict[str, Any]) -> dict[str, str]:
    if isinstance(record.fields, csv.Error):
        raise record.fields
    try:
        record.text.encode()  # bytes that are no UTF-8 were escaped when they were read
    except UnicodeEncodeError:
        raise ValueError("it is no UTF-8") from None
    columns = context["columns"]
    if len(record.fields) != len(columns):
        raise ValueError(f"{len(record.fields)} fields instead of {len(columns)}")
    return dict(zip(columns, record.fields, strict=True))


def convert(row: dict[str, str]) -> Peak:
    if not row["name"].strip():
        raise ValueError("name is empty")
    return {
        "name": row["name"].strip(),
        "height_m": to_int("height_m", row["height_m"]),
        "first_ascent": to_int("first_ascent", row["first_ascent"]) if row["first_ascent"] else None,
    }


def to_int(column: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{column} is no whole number: {text!r}") from None


transform: Pipeline[Record, Peak] = Pipeline([name_fields, convert], name="transform")


# -- load


@staged(executor="thread", retries=3, retry_delay=1, retry_on=sqlite3.OperationalError)  # it may be locked
def save(rows: list[tuple[Record, Peak]], context: dict[str, Any]) -> list[tuple[Record, Exception]]:
    """Save rows in one transaction, all but those that the database refuses, and return these."""
    refused: list[tuple[Record, Exception]] = []
    with closing(sqlite3.connect(context["database"])) as connection, connection:
        connection.execute(TABLE)
        for record, peak in rows:
            try:
                connection.execute(UPSERT, peak)
            except REFUSALS as error:
                refused.append((record, error))
    return refused


# -- all of it


async def load(source: Path, database: Path, rejected: Path, *, size: int = BATCH) -> Counter[str]:
    """Load a file, at most ``size`` rows in one transaction; count what was loaded and what was rejected.

    Raises:
        StageExecutionError: the file lacks columns, or the database can't be used.
    """
    with source.open(encoding="utf-8-sig", **AS_IT_IS) as lines:
        records = read_records(lines)
        header = next(records, Record(1, "", [])).fields
        columns = [] if isinstance(header, csv.Error) else header
        await require(*COLUMNS).run(dict.fromkeys(columns))
        with rejected.open("w", encoding="utf-8", **AS_IT_IS) as file:
            return await load_records(records, columns, database, csv.writer(file), size)


async def load_records(
    records: Iterator[Record], columns: list[str], database: Path, rejected: Any, size: int
) -> Counter[str]:
    counts = Counter(loaded=0, rejected=0)
    context = {"columns": columns, "database": database}
    rows: list[tuple[Record, Peak]] = []

    def reject(record: Record, error: Exception) -> None:
        reason = error.original_error if isinstance(error, StageExecutionError) else error
        rejected.writerow([record.line, reason, record.text])
        counts["rejected"] += 1

    async def flush() -> None:
        refused = await save.run(rows, context=context)
        for record, error in refused:
            reject(record, error)
        counts["loaded"] += len(rows) - len(refused)
        rows.clear()

    rejected.writerow(["line", "reason", "text"])
    async with transform.stream(records, context=context) as results:
        async for outcome in results.outcomes():
            if outcome.error is not None:
                reject(outcome.item, outcome.error)
            else:
                rows.append((outcome.item, outcome.unwrap()))
            if len(rows) == size:
                await flush()
    await flush()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a CSV file of mountains into a database.")
    parser.add_argument("source", nargs="?", type=Path, default=PEAKS)
    parser.add_argument("--database", type=Path, default=Path("peaks.db"))
    parser.add_argument("--rejected", type=Path, help="by default NAME.rejected.csv, in this folder")
    options = parser.parse_args()
    rejected = options.rejected or Path(f"{options.source.stem}.rejected.csv")
    if rejected.resolve() == options.source.resolve():
        parser.error("--rejected would overwrite the source")
    try:
        counts = asyncio.run(load(options.source, options.database, rejected))
    except (OSError, StageExecutionError) as error:
        print(f"not loaded: {error}", file=sys.stderr)
        return 1
    print(f"{counts.total()} rows: {counts['loaded']} loaded, {counts['rejected']} rejected, see {rejected}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
