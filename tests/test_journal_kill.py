"""The journal's promise, with processes that are killed: by kill -9, at moments that nobody has chosen.

With ``PROOFS=1`` in the environment the file that goes through the command line has a million lines.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import async_pipeline

pytestmark = pytest.mark.threads

SOURCE = Path(async_pipeline.__file__).parents[1]
PATIENCE = 170  # seconds for what takes less than one on an idle machine
ITEMS, CONCURRENCY, KILLS = 20_000, 100, 20
FULL = os.environ.get("PROOFS") == "1"
LINES, PAUSE = (1_000_000, 0) if FULL else (20_000, 0.005)  # seconds, time to kill in

BATCH = f"""
import asyncio, os
from async_pipeline import Pipeline
from async_pipeline.journal import Journal

flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
ran, reported = os.open("ran", flags), os.open("reported", flags)

async def work(item):
    await asyncio.sleep(0.001 * (item % 3))
    if item == {ITEMS - 1} and not os.path.exists("alive"):  # so that none ends before it is killed
        await asyncio.sleep(3600)
    os.write(ran, b"%d\\n" % item)
    return item * 2

async def main():
    pipeline = Pipeline([work])
    async with pipeline.stream(range({ITEMS}), {CONCURRENCY}, journal=Journal("batch.db")) as results:
        async for value in results:
            os.write(reported, b"%d\\n" % value)

asyncio.run(main())
"""


@contextmanager
def process(*arguments: str, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    paths = [str(SOURCE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def kill_when(child: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    until(child, condition)
    time.sleep(random.random() / 100)
    child.send_signal(signal.SIGKILL)
    assert child.wait(PATIENCE) == -signal.SIGKILL


def until(child: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        if child.poll() is not None:
            raise AssertionError(child.stderr.read().decode() if child.stderr else "")
        time.sleep(0.0005)


def finish(child: "subprocess.Popen[bytes]") -> None:
    _, errors = child.communicate(timeout=PATIENCE)
    assert (child.returncode, errors) == (0, b"")


def numbers(path: Path, start: int = 0) -> list[int]:
    """The whole lines of a log from a byte on; a kill may tear none, since each is one write."""
    if not path.exists():
        return []
    return [int(line) for line in path.read_bytes()[start:].splitlines()]


def committed(folder: Path, grave: Path) -> set[int]:
    """What the files hold, seen in a copy of them, lest the next process finds them tidied up."""
    shutil.rmtree(grave, ignore_errors=True)
    grave.mkdir()
    for name in ("batch.db", "batch.db-wal"):
        if (folder / name).exists():
            shutil.copy(folder / name, grave / name)
    with closing(sqlite3.connect(grave / "batch.db")) as db:
        return {key for (key,) in db.execute("SELECT key FROM items WHERE ok = 1")}


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_batch_that_is_killed_again_and_again(tmp_path: Path) -> None:
    folder, grave = tmp_path / "batch", tmp_path / "grave"
    folder.mkdir()
    ran, reported = folder / "ran", folder / "reported"
    before: set[int] = set()
    for number in range(KILLS):
        ran_from, reported_from = size(ran), size(reported)
        left = sum(len(f"{item}\n") for item in range(ITEMS - 1) if item not in before)
        enough = ran_from + random.randrange(left // (KILLS - number))
        with process("-c", BATCH, folder=folder) as child:
            kill_when(child, lambda enough=enough: size(ran) > enough)  # type: ignore[misc]
        here, after = numbers(ran, ran_from), committed(folder, grave)
        assert before <= after
        assert len(here) == len({*here})
        assert not before & {*here}, "what had finished was run again"
        assert len({*here} - after) <= CONCURRENCY, "more was lost than what ran"
        # in order, from the first one on, and nothing that could be lost
        told = numbers(reported, reported_from)
        assert told == [item * 2 for item in range(len(told))]
        assert {value // 2 for value in told} <= after
        before = after
    ran_from, reported_from = size(ran), size(reported)
    alive = folder / "alive"
    alive.touch()
    with process("-c", BATCH, folder=folder) as child:
        finish(child)
    alive.unlink()
    assert numbers(reported, reported_from) == [item * 2 for item in range(ITEMS)]
    assert {*numbers(ran, ran_from)} == {*range(ITEMS)} - before
    assert sorted(file.name for file in folder.iterdir()) == ["batch.db", "ran", "reported"]


def most_memory(pid: int) -> int:
    """The most that a process has had in memory, in kB; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def run_lines(folder: Path, count: int, kills: int) -> int:
    """Run a file through the command line, with some kills; return the most memory of the last process."""
    folder.mkdir()
    (folder / "jobs.py").write_text(
        "import asyncio\nfrom async_pipeline import Pipeline\n\n"
        f"async def double(item):\n    await asyncio.sleep({PAUSE})\n"
        "    return {'id': item['id'], 'twice': item['id'] * 2}\n\n"
        "doubled = Pipeline([double])\n"
    )
    with (folder / "in.jsonl").open("w") as file:
        file.writelines(f'{{"id": {number}}}\n' for number in range(count))
    output, most = folder / "out.jsonl", 0
    whole = count * len('{"id": 10000, "twice": 20000}\n')
    command = ("-m", "async_pipeline", "run", "jobs:doubled", "--concurrency", "100")
    files = ("--input", "in.jsonl", "--output", "out.jsonl", "--journal", "run.db")
    for number in range(kills):
        enough = whole * (number + 1) // (kills + 2)
        with process(*command, *files, folder=folder) as child:
            until(child, lambda enough=enough: size(output) < enough)  # type: ignore[misc]  # it is emptied
            kill_when(child, lambda enough=enough: size(output) > enough)  # type: ignore[misc]
    with process(*command, *files, folder=folder) as child:
        while child.poll() is None:
            most = max(most, most_memory(child.pid))
            time.sleep(0.005)
        finish(child)
    with output.open() as lines:
        for number, line in enumerate(lines):
            assert json.loads(line) == {"id": number, "twice": number * 2}
    assert number == count - 1
    return most


def test_a_long_file_through_the_command_line(tmp_path: Path) -> None:
    few = run_lines(tmp_path / "few", 2_000, kills=0)
    many = run_lines(tmp_path / "many", LINES, kills=2)
    assert many < few + 12_000  # kB: the cache of SQLite and its statements, whatever the number of lines
