"""The examples run for real: as the commands that their docstrings show, and function by function."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path

import pytest
from redis import Redis

import async_pipeline
from async_pipeline import StageExecutionError
from examples.spread_over_workers import blocks, count_steps, find_longest
from examples.stdlib_census import Package, find_files, package_name, pipeline, take_census
from tests.integrations.servers import redis_url, taskiq_workers

ROOT = Path(__file__).parents[1]
CENSUS = ROOT / "examples" / "stdlib_census.py"
SPREAD = ROOT / "examples" / "spread_over_workers.py"
LIBRARY = Path(async_pipeline.__file__).parents[1]

pytestmark = pytest.mark.threads

CATS = '''"""A module of a package."""


def purr(volume):
    def louder():
        return volume + 1

    return louder()


class Cat:
    async def sleep(self):
        pass
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small library: a package, a module of one file, something that pip installed, two broken files."""
    for path, code in {
        "zoo/__init__.py": "",
        "zoo/cats.py": CATS,
        "zoo/readme.txt": "no Python",
        "alone.py": "x = 1\n",
        "broken/syntax.py": "def (:\n",
        "site-packages/pip/main.py": "y = 1\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code)
    (tmp_path / "broken" / "bytes.py").write_bytes(
        b"# not UTF-8, far from the first two lines\n" * 3 + b"# \xe9\n"
    )
    return tmp_path


def run(*arguments: object, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python without its site-packages, so that the library and the standard one must do."""
    return run_with_packages("-S", *arguments, text=text, **environment)


def run_with_packages(
    *arguments: object, text: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(LIBRARY), "PYTHONIOENCODING": "utf-8"} | environment,
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def test_census_prints_the_largest_packages_and_what_failed(folder: Path) -> None:
    census = run(CENSUS, folder)
    header, *rows = census.stdout.splitlines()
    assert header.split() == [
        "package",
        "files",
        "lines",
        "functions",
        "async",
        "longest",
        "function,",
        "its",
        "lines",
    ]
    assert [row.split() for row in rows[:3]] == [
        ["zoo", "2", "13", "3", "1", "purr,", "5"],
        ["alone", "1", "1", "0", "0", "-"],
        [],
    ]
    assert rows[3] == "2 packages, 3 files, 14 lines; failed files: 2"
    assert rows[4] == "  broken/bytes.py: could not read: not utf-8: invalid continuation byte (bytes.py)"
    assert rows[5].startswith("  broken/syntax.py: could not parse: ")
    assert (len(rows), census.stderr, census.returncode) == (6, "", 0)


def test_census_of_the_top(folder: Path) -> None:
    rows = run(CENSUS, folder, "--top", 1).stdout.splitlines()
    assert rows[1].split()[0] == "zoo"
    assert rows[2:4] == ["", "2 packages, 3 files, 14 lines; failed files: 2"]


def test_census_names_a_few_of_many_failures(folder: Path) -> None:
    for number in range(5):
        (folder / f"bad{number}.py").write_text("?")
    *_, first, _, _, _, last, more = run(CENSUS, folder).stdout.splitlines()
    assert first.startswith("  bad0.py: ")
    assert last.startswith("  bad4.py: ")
    assert more == "  and 2 more"


def test_census_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    census = run(CENSUS, tmp_path / "nowhere")
    assert (census.stdout, census.returncode) == ("", 2)
    assert f"there is no folder {tmp_path / 'nowhere'}" in census.stderr


def test_census_on_a_terminal_without_the_letters(tmp_path: Path) -> None:
    (tmp_path / "katze.py").write_text("def schnüffeln(): pass\n", encoding="utf-8")
    census = run(CENSUS, tmp_path, PYTHONIOENCODING="ascii")
    assert r"schn\xfcffeln, 1" in census.stdout
    assert census.returncode == 0


def test_census_of_the_real_standard_library() -> None:
    census = run(CENSUS, "--top", 3)
    assert (census.stderr, census.returncode) == ("", 0)
    _, *rows, _, total = census.stdout.splitlines()[:6]
    sizes = [int(row.split()[2].replace(",", "")) for row in rows]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)
    found = re.fullmatch(r"([\d,]+) packages, ([\d,]+) files, ([\d,]+) lines; failed files: ([\d,]+)", total)
    assert found is not None
    packages, files, lines, failed = (int(number.replace(",", "")) for number in found.groups())
    library = Path(sysconfig.get_path("stdlib"))
    assert files + failed == len(list(find_files(library)))
    assert packages > 50
    assert lines > sum(sizes)


def test_pipeline_on_the_command_line(folder: Path) -> None:
    paths = "\n".join(find_files(folder))
    command = ["-m", "async_pipeline", "run", "examples.stdlib_census:pipeline", "--lines"]
    counted = run(*command, "--errors", folder / "errors.jsonl", text=paths)
    reports = [json.loads(line) for line in counted.stdout.splitlines()]
    errors = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
    assert [(Path(report["path"]).name, report["lines"]) for report in reports] == [
        ("alone.py", 1),
        ("__init__.py", 0),
        ("cats.py", 13),
    ]
    assert [(Path(error["item"]).name, error["stage"]) for error in errors] == [
        ("bytes.py", "read"),
        ("syntax.py", "parse"),
    ]
    assert (counted.stderr, counted.returncode) == ("", 1)


async def test_report_on_a_file(folder: Path) -> None:
    path = str(folder / "zoo" / "cats.py")
    assert await pipeline.run(path) == {
        "path": path,
        "lines": 13,
        "functions": 3,
        "async_functions": 1,
        "longest_function": "purr",
        "longest_function_lines": 5,
    }


async def test_report_on_a_file_without_functions(folder: Path) -> None:
    report = await pipeline.run(str(folder / "alone.py"))
    assert (report["longest_function"], report["longest_function_lines"]) == (None, 0)


async def test_a_declared_encoding_counts(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\ndef caf\xe9(): pass\n")
    assert (await pipeline.run(str(path)))["longest_function"] == "café"


async def test_warnings_about_the_counted_code_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(r"pattern = '\d'" + "\n")
    assert (await pipeline.run(str(path)))["lines"] == 1  # here, a warning is an error


async def test_take_census(folder: Path) -> None:
    packages, failures = await take_census(folder)
    assert packages == [Package("alone", 1, 1), Package("zoo", 2, 13, 3, 1, "purr", 5)]
    assert [Path(failure.item).name for failure in failures] == ["bytes.py", "syntax.py"]
    assert [type(failure.original_error) for failure in failures] == [ValueError, SyntaxError]
    assert all(isinstance(failure, StageExecutionError) for failure in failures)


def test_find_files_leaves_out_what_pip_installed(folder: Path) -> None:
    names = [str(Path(path).relative_to(folder)) for path in find_files(folder)]
    assert names == ["alone.py", "broken/bytes.py", "broken/syntax.py", "zoo/__init__.py", "zoo/cats.py"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("typing.py", "typing"), ("json/decoder.py", "json"), ("config-3.11/x.py", "config-3.11")],
)
def test_package_name(path: str, name: str) -> None:
    assert package_name(Path(path)) == name


# -- over workers


def test_search_in_this_process() -> None:
    search = run_with_packages(SPREAD, "--below", 10_000, BROKER_URL="")
    found, by = search.stdout.splitlines()
    assert found == "below 10,000, 6,171 takes the most steps: 261"
    assert by.startswith("by 1 worker, in ")
    assert search.stderr.endswith("10 of 10 blocks\n")
    assert search.returncode == 0


def test_search_over_workers_by_a_client_that_comes_back() -> None:
    name = f"async-pipeline-test:{uuid.uuid4()}"
    environment = {"BROKER_URL": redis_url(), "QUEUE": name}
    command = [SPREAD, "--below", 100_000, "--run-id", name]
    with Redis.from_url(redis_url()) as redis:
        try:
            with taskiq_workers("examples.spread_over_workers:broker", **environment):
                first = run_with_packages(*command, **environment)
            again = run_with_packages(*command, **environment)  # no worker is left
        finally:
            redis.delete(name)
    for search in (first, again):
        assert search.stdout.startswith("below 100,000, 77,031 takes the most steps: 350\nby ")
        assert search.returncode == 0


def test_search_without_a_broker() -> None:
    search = run_with_packages(SPREAD, BROKER_URL="redis://127.0.0.1:1")
    assert search.stderr.startswith("the workers can't be used: the broker can't be reached: ")
    assert (search.stdout, search.returncode) == ("", 1)


def test_search_among_no_numbers() -> None:
    search = run_with_packages(SPREAD, "--below", 1, BROKER_URL="")
    assert "--below must be at least 2" in search.stderr
    assert (search.stdout, search.returncode) == ("", 2)


def test_blocks() -> None:
    assert blocks(2) == [(1, 2)]
    assert blocks(5, size=2) == [(1, 3), (3, 5)]
    assert blocks(6, size=2) == [(1, 3), (3, 5), (5, 6)]


def test_longest_of_a_block() -> None:
    assert [count_steps(number) for number in (1, 2, 3, 27)] == [0, 1, 7, 111]
    assert find_longest((1, 10)) == (9, 19)
