"""The same pipeline here, over HTTP and on workers: function by function, and as the command that it is."""

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

import async_pipeline
from async_pipeline import StageExecutionError
from examples import split_map_merge as example
from tests.integrations.servers import redis_url, taskiq_workers

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "split_map_merge.py"
LIBRARY = Path(async_pipeline.__file__).parents[1]

pytestmark = pytest.mark.threads

CATS = '''# a module
class Cat:
    """Purrs."""

    def purr(self):
        return "#" + "#"  # no comments, and one


async def sleep(): pass
'''
REPORT = {"files": 2, "lines": 9, "comments": 2, "definitions": 3, "documented": 1}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library with a package of two files, one of them in a package inside it."""
    (tmp_path / "zoo" / "small").mkdir(parents=True)
    (tmp_path / "zoo" / "small" / "__init__.py").write_text("")
    (tmp_path / "zoo" / "cats.py").write_text(CATS)
    (tmp_path / "zoo" / "readme.txt").write_text("no Python")
    monkeypatch.setattr(example, "LIBRARY", tmp_path)
    return tmp_path


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(PROGRAM), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(LIBRARY), "BROKER_URL": ""} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def reports(program: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """What was printed of each way, by the way."""
    assert (program.stderr, program.returncode) == ("", 0)
    lines = [line for line in program.stdout.splitlines() if line and not line.startswith(" ")]
    return {line.split(",")[0]: line.split(": ", 1)[1] for line in lines}


# -- the pipeline


def test_split(zoo: Path) -> None:
    assert example.split("zoo") == ["zoo/cats.py", "zoo/small/__init__.py"]


@pytest.mark.parametrize("name", ["cats", "..", "zoo/small", "", "zoo/../zoo"])
def test_split_of_what_is_no_package(zoo: Path, name: str) -> None:
    with pytest.raises(ValueError, match="the standard library has no package"):
        example.split(name)


async def test_scatter_and_merge_of_a_file(zoo: Path) -> None:
    assert await example.scatter.run(CATS) == {
        "lines": 9,
        "comments": 2,
        "definitions": {"definitions": 3, "documented": 1},
    }
    assert await example.part.run("zoo/cats.py") == {
        "lines": 9,
        "comments": 2,
        "definitions": 3,
        "documented": 1,
    }


def test_a_declared_encoding_counts(zoo: Path) -> None:
    (zoo / "zoo" / "cats.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    assert example.read("zoo/cats.py").endswith("# café\n")


def test_warnings_about_the_counted_code_are_not_shown() -> None:
    assert example.count_definitions(r"pattern = '\d'") == {"definitions": 0, "documented": 0}


async def test_a_file_that_is_no_python(zoo: Path) -> None:
    (zoo / "zoo" / "old.py").write_text("print 'old'\n")
    with pytest.raises(StageExecutionError) as caught:
        await example.report.run("zoo")
    assert (caught.value.stage_name, caught.value.element) == ("each/part/count/definitions", (1,))


def test_show() -> None:
    counted: Any = {"files": 1, "lines": 2000, "comments": 0, "definitions": 3, "documented": 2}
    assert example.show(counted) == (
        "1 files, 2,000 lines, 0 comments; 67% of 3 functions and classes have a docstring"
    )
    assert "0% of 0 functions" in example.show(counted | {"definitions": 0, "documented": 0})


# -- the ways


@pytest.mark.parametrize("way", ["here", "http", "workers"])
def test_each_way_gives_the_same(zoo: Path, way: str) -> None:
    assert asyncio.run(example.WAYS[way]("zoo")) == REPORT


async def test_what_http_says_of_a_wrong_input(zoo: Path) -> None:
    transport = httpx.ASGITransport(example.make_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/processes/report/execution", json={"inputs": {"package": "../zoo"}})
        process = (await client.get("/processes/report")).json()
    assert answer.status_code == 400
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/inputs/package"]
    assert (sorted(process["inputs"]), sorted(process["outputs"])) == (["package"], sorted(REPORT))


def test_a_failure_ends_the_server(zoo: Path) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        asyncio.run(example.run_over_http("cats"))


# -- the command


def test_the_command_in_three_ways() -> None:
    program = run("json")
    found = reports(program)
    assert list(found) == ["here", "http", "workers"]
    assert len(set(found.values())) == 1
    files = list((example.LIBRARY / "json").rglob("*.py"))
    assert found["here"].startswith(f"{len(files)} files, ")
    for changed in ("return await report.run(package)", "await client.post(", "partial(part.map,"):
        assert changed in program.stdout


def test_the_command_on_a_dask_cluster() -> None:
    found = reports(run("json", "--way", "here", "--way", "dask"))
    assert list(found) == ["here", "dask"]
    assert found["here"] == found["dask"]


def test_the_command_without_such_a_package() -> None:
    program = run("nowhere")
    assert "the standard library has no package 'nowhere'" in program.stderr
    assert (program.stdout, program.returncode) == ("", 2)


def test_the_command_without_a_broker() -> None:
    program = run("--way", "workers", BROKER_URL="redis://127.0.0.1:1")
    assert program.stderr.startswith("workers: the broker can't be reached: ")
    assert (program.stdout, program.returncode) == ("", 1)


def test_the_command_when_the_ways_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zoo: Path
) -> None:
    async def lie(package: str) -> Any:
        return REPORT | {"files": 3}

    monkeypatch.setitem(example.WAYS, "http", lie)
    monkeypatch.setattr(sys, "argv", ["split_map_merge.py", "zoo", "--way", "here", "--way", "http"])
    assert example.main() == 1
    assert capsys.readouterr().err == "the reports differ\n"


# -- on workers in other processes


def test_the_command_on_workers_with_redis() -> None:
    queue = f"async-pipeline-test:{uuid.uuid4()}"
    environment = {"BROKER_URL": redis_url(), "QUEUE": queue}
    with Redis.from_url(redis_url()) as redis:
        try:
            with taskiq_workers("examples.split_map_merge:broker", **environment):
                program = run("asyncio", "--way", "here", "--way", "workers", **environment)
        finally:
            redis.delete(queue)
    program.stderr = ""  # it says so when the workers take their time to start
    found = reports(program)
    assert found["here"] == found["workers"]


def test_what_the_docstring_shows_is_there() -> None:
    text = example.__doc__ or ""
    assert "examples/split_map_merge.py" in text
    for name in ("run_here", "run_over_http", "run_on_workers", "make_app", "broker"):
        assert name in text
        assert hasattr(example, name)
