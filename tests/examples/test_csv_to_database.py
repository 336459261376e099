"""The parts of the CSV import one by one, on a real SQLite, and the command that its docstring shows."""

import asyncio
import csv
import os
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import async_pipeline
from async_pipeline import MissingFieldsError, StageExecutionError
from examples import csv_to_database as example
from examples.csv_to_database import Peak, Record, convert, load, name_fields, read_records, save, transform

pytestmark = pytest.mark.threads

ROOT = Path(__file__).parents[2]
LIBRARY = Path(async_pipeline.__file__).parents[1]
COLUMNS = ["name", "height_m", "first_ascent"]
K2: Peak = {"name": "K2", "height_m": 8611, "first_ascent": 1954}
LHOTSE: Peak = {"name": "Lhotse", "height_m": 8516, "first_ascent": 1956}


class Files:
    """A CSV file, and what becomes of it."""

    def __init__(self, folder: Path) -> None:
        self.source, self.database, self.rejected = (
            folder / name for name in ("peaks.csv", "peaks.db", "rejected.csv")
        )

    def write(self, *lines: str) -> None:
        self.source.write_text("".join(f"{line}\n" for line in ("name,height_m,first_ascent", *lines)))

    async def load(self, **options: Any) -> tuple[int, int]:
        counts = await load(self.source, self.database, self.rejected, **options)
        assert [*counts] == ["loaded", "rejected"]
        return counts["loaded"], counts["rejected"]

    def stored(self) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.database)) as connection:
            return connection.execute("SELECT * FROM peaks ORDER BY name").fetchall()

    def rejections(self) -> list[tuple[str, ...]]:
        with self.rejected.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["line", "reason", "text"]
        return [*map(tuple, rows)]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# -- extract


def test_records_have_the_number_of_their_first_line_and_their_text() -> None:
    lines = ["a,b\r\n", '"two\n', 'lines",c\n', "\n", "\r\n", "d,e"]
    assert [*read_records(lines)] == [
        Record(1, "a,b", ["a", "b"]),
        Record(2, '"two\nlines",c', ["two\nlines", "c"]),
        Record(6, "d,e", ["d", "e"]),
    ]


def test_what_is_no_csv_is_a_record_too_and_reading_goes_on() -> None:
    first, broken, last, unclosed = read_records(["a\n", '"b"b\n', "c\n", '"d\n', "e\n"])
    assert (first, last) == (Record(1, "a", ["a"]), Record(3, "c", ["c"]))
    assert (broken.line, broken.text, str(broken.fields)) == (2, '"b"b', "',' expected after '\"'")
    assert (unclosed.line, unclosed.text, str(unclosed.fields)) == (4, '"d\ne', "unexpected end of data")


def test_an_unclosed_quote_does_not_take_the_whole_file() -> None:
    line = f"{'x' * 98}\n"
    broken, *others = read_records(['"\n', *[line] * 3000])
    assert "field larger than field limit" in str(broken.fields)
    assert len(broken.text) < 140_000
    assert broken.text.count("\n") + 1 + len(others) == 3001
    assert others[-1].line == 3001


@given(st.lists(st.text(st.sampled_from('ab,"\n\r é'), max_size=8), max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_line_is_lost(lines: list[str]) -> None:
    text = "\n".join(lines)
    records = [*read_records(iter(text.splitlines(keepends=True)))]
    kept = "".join(record.text for record in records)
    assert kept.replace("\n", "").replace("\r", "") == text.replace("\n", "").replace("\r", "")
    assert [record.line for record in records] == sorted({record.line for record in records})


# -- transform


async def reason_of(text: str) -> str:
    outcome = await transform.try_run(*read_records([text]), context={"columns": COLUMNS})
    assert isinstance(outcome.error, StageExecutionError)
    return str(outcome.error.original_error)


async def test_transform() -> None:
    outcome = await transform.try_run(*read_records(["K2,8611,1954"]), context={"columns": COLUMNS})
    assert outcome.unwrap() == K2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("K2,8611", "2 fields instead of 3"),
        ("Cho Oyu,8,188,1954", "4 fields instead of 3"),
        ('"K2" a,8611,1954', "',' expected after '\"'"),
        (" ,8611,1954", "name is empty"),
        ("K2,8611 m,1954", "height_m is no whole number: '8611 m'"),
        ("K2,,1954", "height_m is no whole number: ''"),
        ("K2,8611,?", "first_ascent is no whole number: '?'"),
        ("Mont Blan\udce7,4806,1786", "it is no UTF-8"),
    ],
)
async def test_transform_of_what_can_not_be_used(text: str, reason: str) -> None:
    assert await reason_of(text) == reason


def test_fields_are_named_by_the_header() -> None:
    record = Record(2, "1954,K2", ["1954", "K2"])
    named = name_fields(record, {"columns": ["first_ascent", "name"]})
    assert named == {"first_ascent": "1954", "name": "K2"}


def test_convert() -> None:
    row = {"name": " Gangkhar Puensum ", "height_m": "7570", "first_ascent": "", "more": "is left out"}
    assert convert(row) == {"name": "Gangkhar Puensum", "height_m": 7570, "first_ascent": None}


# -- load


def rows(*peaks: Peak) -> list[tuple[Record, Peak]]:
    return [(Record(line, peak["name"], []), peak) for line, peak in enumerate(peaks, start=2)]


async def test_save_updates_what_is_there(files: Files) -> None:
    context = {"database": files.database}
    assert await save.run(rows(K2, LHOTSE), context=context) == []
    assert await save.run(rows({**K2, "height_m": 8612}), context=context) == []
    assert files.stored() == [("K2", 8612, 1954), ("Lhotse", 8516, 1956)]


async def test_save_returns_what_the_database_refuses(files: Files) -> None:
    feet: Peak = {**K2, "height_m": 28251}
    huge: Peak = {"name": "huge", "height_m": 10**30, "first_ascent": None}
    refused = await save.run(rows(feet, LHOTSE, huge), context={"database": files.database})
    assert [(record.text, type(error)) for record, error in refused] == [
        ("K2", sqlite3.IntegrityError),
        ("huge", OverflowError),
    ]
    assert files.stored() == [("Lhotse", 8516, 1956)]


async def test_save_saves_all_or_nothing_and_tries_again(files: Files) -> None:
    class Interrupted(list[Any]):
        interruptions = 3

        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            if self.interruptions:
                self.interruptions -= 1
                with closing(sqlite3.connect(files.database)) as connection:
                    seen.append(connection.execute("SELECT count(*) FROM peaks").fetchone())
                raise sqlite3.OperationalError("database is locked")

    seen: list[Any] = []
    assert (
        await save.replace(retry_delay=0).run(Interrupted(rows(K2)), context={"database": files.database})
        == []
    )
    assert seen == [(0,)] * 3
    assert files.stored() == [("K2", 8611, 1954)]


async def test_save_gives_up(files: Files) -> None:
    context = {"database": files.database / "no" / "folder"}
    with pytest.raises(StageExecutionError) as failure:
        await save.replace(retry_delay=0).run([], context=context)
    assert failure.value.attempts == 4


# -- all of it


async def test_load_with_rejected_rows(files: Files) -> None:
    files.write("K2,8611,1954", "Broad Peak,8,051,1957", "Kangchenjunga,28169,1955", "Lhotse,8516,1956")
    assert await files.load() == (2, 2)
    assert files.stored() == [("K2", 8611, 1954), ("Lhotse", 8516, 1956)]
    assert files.rejections() == [
        ("3", "4 fields instead of 3", "Broad Peak,8,051,1957"),
        ("4", "CHECK constraint failed: height_m BETWEEN 1 AND 8849", "Kangchenjunga,28169,1955"),
    ]


async def test_load_again_changes_nothing(files: Files) -> None:
    files.write("K2,8611,1954", "Broad Peak,8,051,1957")
    first = await files.load(), files.stored(), files.rejections()
    assert (await files.load(), files.stored(), files.rejections()) == first


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
async def test_each_row_is_loaded_or_rejected(files: Files, size: int) -> None:
    files.write(*(f"peak {n},{n if n % 3 else 0},1900" if n % 4 else f"peak {n}" for n in range(1, 25)))
    assert await files.load(size=size) == (12, 12)
    assert {name for name, *_ in files.stored()} == {f"peak {n}" for n in range(1, 25) if n % 3 and n % 4}
    assert sorted(int(line) - 1 for line, *_ in files.rejections()) == [
        n for n in range(1, 25) if not (n % 3 and n % 4)
    ]


async def test_a_transaction_has_so_many_rows(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def count(rows: list[Any], context: Any) -> list[Any]:
        sizes.append(len(rows))
        return []

    monkeypatch.setattr(example, "save", save.replace(handler=count))
    files.write(*["K2,8611,1954"] * 7)
    assert await files.load(size=3) == (7, 0)
    assert sizes == [3, 3, 1]


async def test_bytes_go_through(files: Files) -> None:
    text = "\ufeffname,height_m,first_ascent\r\nČerná hora,1,\r\n".encode() + b"Mont Blan\xe7,4806,1786\r\n"
    files.source.write_bytes(text + b'"two\r\nlines",\r\n')
    assert await files.load() == (1, 2)
    assert files.stored() == [("Černá hora", 1, None)]
    assert files.rejected.read_bytes().partition(b"\r\n")[2] == (
        b'3,it is no UTF-8,"Mont Blan\xe7,4806,1786"\r\n4,2 fields instead of 3,"""two\r\nlines"","\r\n'
    )


@pytest.mark.parametrize("content", ["", "name;height_m;first_ascent\n", '"name"x\n', "\udcff\udcfe\n"])
async def test_columns_that_are_missing(files: Files, content: str) -> None:
    files.source.write_text(content, errors="surrogateescape")
    with pytest.raises(StageExecutionError) as failure:
        await files.load()
    assert isinstance(failure.value.original_error, MissingFieldsError)
    assert failure.value.original_error.fields == tuple(COLUMNS)
    assert not files.rejected.exists()


async def test_a_file_without_rows(files: Files) -> None:
    files.write()
    assert await files.load() == (0, 0)
    assert (files.stored(), files.rejections()) == ([], [])


async def test_what_was_rejected_is_there_after_a_failure(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rows: list[Any], context: Any) -> list[Any]:
        raise sqlite3.OperationalError("disk full")

    files.write("Broad Peak,8,051,1957", "K2,8611,1954")
    monkeypatch.setattr(example, "save", save.replace(handler=fail, retries=0))
    with pytest.raises(StageExecutionError, match="disk full"):
        await files.load()
    assert files.rejections() == [("2", "4 fields instead of 3", "Broad Peak,8,051,1957")]
    monkeypatch.undo()
    assert await files.load() == (1, 1)


async def test_cancelled_and_run_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(rows: list[Any], context: Any) -> Any:
        refused = save.handler(rows, context)
        if not begun.is_set():
            begun.set()
            loop.call_soon_threadsafe(task.cancel)
            go_on.wait(30)
        return refused

    monkeypatch.setattr(example, "save", save.replace(handler=wait))
    files.write("a,1,", "broken", "b,2,", "c,3,", "d,4,")
    task = asyncio.ensure_future(files.load(size=2))
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert files.stored() == [("a", 1, None), ("b", 2, None)]
    assert await files.load(size=2) == (4, 1)
    assert [name for name, *_ in files.stored()] == ["a", "b", "c", "d"]
    assert files.rejections() == [("3", "1 fields instead of 3", "broken")]


def test_memory_does_not_grow_with_the_file(files: Files) -> None:
    def peak_of(length: int) -> int:
        files.write(*(f"peak {n},{n % 8849 if n % 10 else ''},1900" for n in range(length)))
        tracemalloc.start()
        try:
            asyncio.run(files.load(size=50))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_of(100)  # what is imported and cached when it runs for the first time
    assert peak_of(8_000) < 1.5 * peak_of(1_000)


# -- the command


def command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it without site-packages: it needs nothing but Python."""
    return subprocess.run(
        [sys.executable, "-S", "-W", "error", ROOT / "examples" / "csv_to_database.py", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(LIBRARY), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def test_command_prints_what_its_docstring_shows(tmp_path: Path) -> None:
    done = command(tmp_path)
    text = example.__doc__ or ""
    printed, _, shown = text.partition("It prints ``")[2].partition("``, and that file is then:\n\n")
    assert (done.stdout, done.stderr, done.returncode) == (f"{printed}\n", "", 0)
    rejected = (tmp_path / "peaks.rejected.csv").read_text(encoding="utf-8").splitlines()
    assert rejected == [line.strip() for line in shown.partition("\n\n")[0].splitlines()]
    files = Files(tmp_path)
    names = [name for name, *_ in files.stored()]
    assert len(names) == 13  # K2 is there twice
    assert ("Gangkhar Puensum", 7570, None) in files.stored()  # nobody has climbed it


def test_command_with_files_of_ones_own(files: Files) -> None:
    files.write("K2,8611,1954")
    options = ["--database", files.database, "--rejected", files.rejected]
    done = command(files.source.parent, files.source, *options)
    assert done.stdout == f"1 rows: 1 loaded, 0 rejected, see {files.rejected}\n"
    assert files.stored() == [("K2", 8611, 1954)]


@pytest.mark.parametrize(
    ("content", "reason"), [("a,b\n", "missing 'name', 'height_m', 'first_ascent'"), (None, "No such file")]
)
def test_main_says_why_nothing_was_loaded(
    files: Files,
    content: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        files.source.write_text(content)
    monkeypatch.chdir(files.source.parent)
    monkeypatch.setattr(sys, "argv", ["csv_to_database.py", "peaks.csv"])
    assert example.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("not loaded: ")
    assert reason in printed.err


def test_main_does_not_overwrite_the_source(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write("K2,8611,1954")
    monkeypatch.chdir(files.source.parent)
    monkeypatch.setattr(sys, "argv", ["csv_to_database.py", str(files.source), "--rejected", "peaks.csv"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--rejected would overwrite the source" in capsys.readouterr().err
    assert "K2" in files.source.read_text()
