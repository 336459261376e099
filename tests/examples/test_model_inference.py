"""The inference in batches: function by function, with processes of each kind, and as the command."""

import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import async_pipeline
from async_pipeline import StageExecutionError
from async_pipeline.journal import Journal, read_runs
from examples import model_inference
from examples.model_inference import (
    PROCESSES,
    Model,
    Row,
    batched,
    find_files,
    infer,
    label_of,
    load_model,
    main,
    predict,
    processes,
    read_rows,
    train,
)

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "examples" / "model_inference.py"

LEARNT = [
    Row("zoo/cats.py:1", "purr(cat, cat)"),
    Row("zoo/cats.py:6", "cat = sleep()"),
    Row("garden/trees.py:1", "grow(tree)"),
]
ASKED = [
    Row("zoo/lions.py:1", "cat.roar()"),
    Row("garden/roses.py:1", "grow(rose)"),
    Row("zoo/fish.py:1", "tree"),  # which is wrong
]


class Inline(Executor):
    """No processes: it runs a call where it is submitted, and dies of a text."""

    deadly = ""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if self.deadly and self.deadly in repr(args):
            future.set_exception(BrokenProcessPool("died"))
        else:
            future.set_result(function(*args, **kwargs))
        return future


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Inline:
    monkeypatch.setattr(model_inference, "model", train(LEARNT), raising=False)
    return Inline()


def lines_of(output: io.StringIO) -> list[list[str]]:
    return list(csv.reader(io.StringIO(output.getvalue())))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", str(COMMAND), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(async_pipeline.__file__).parents[1])},
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


# ---- function by function


def test_model() -> None:
    model = train(LEARNT)
    assert model.labels == ["zoo", "garden"]
    # in the zoo 3 of 5 words are cats, in the garden none of 2; each of the 5 there are counts once more
    assert list(map(math.exp, model.weights["cat"])) == pytest.approx([4 / 10, 1 / 7])
    assert [model.predict(text) for text in ("a cat", "tree tree cat", "nobody knows")] == [
        "zoo",
        "garden",
        "zoo",
    ]


def test_model_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_inference, "model", None, raising=False)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(vars(train(LEARNT))))
    load_model(str(path))
    assert vars(model_inference.model) == vars(train(LEARNT))
    assert predict(ASKED[:2]) == [("zoo/lions.py:1", "zoo"), ("garden/roses.py:1", "garden")]


def test_batches_are_made_as_they_are_needed() -> None:
    batches = batched(itertools.count(), 3)
    assert [next(batches), next(batches)] == [[0, 1, 2], [3, 4, 5]]
    assert list(batched("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(batched("", 2)) == []


def test_rows_of_files(tmp_path: Path) -> None:
    for path, text in {"json/b.py": "1\n2\n3\n4\n5\n6\n", "json/a/x.py": "\xe9\n", "zoo/c.py": "7"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(text.encode("latin-1"))
    files = find_files(tmp_path)
    assert files == [tmp_path / "json/a/x.py", tmp_path / "json/b.py"]
    assert list(read_rows(files, tmp_path)) == [
        Row("json/a/x.py:1", "\ufffd"),
        Row("json/b.py:1", "1\n2\n3\n4\n5"),
        Row("json/b.py:6", "6"),
    ]
    assert label_of("json/a/x.py:1") == "json"


@pytest.mark.parametrize("batch_size", [1, 2, 5])
async def test_predictions_in_the_order_of_the_rows(inline: Inline, batch_size: int) -> None:
    output = io.StringIO()
    assert await infer(ASKED, inline, output, batch_size=batch_size) == (3, 2)
    assert lines_of(output) == [
        ["zoo/lions.py:1", "zoo"],
        ["garden/roses.py:1", "garden"],
        ["zoo/fish.py:1", "garden"],
    ]


async def test_no_more_rows_are_read_than_needed(inline: Inline) -> None:
    read, written = 0, 0
    most = 0

    def rows() -> Iterator[Row]:
        nonlocal read, most
        for read in range(1, 1001):
            most = max(most, read - written)
            yield LEARNT[0]

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            nonlocal written
            written += 1
            return super().write(text)

    assert await infer(rows(), inline, Output(), batch_size=2) == (1000, 1000)
    assert (read, written) == (1000, 1000)
    assert PROCESSES < most <= (2 * (PROCESSES + 1) + 1) * 2  # the buffer, and a batch in the making


async def test_a_process_dies_and_the_next_run_goes_on(inline: Inline, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "inference.db")
    inline.deadly = "rose"
    output = io.StringIO()
    with pytest.raises(StageExecutionError) as caught:
        await infer(ASKED, inline, output, batch_size=1, journal=journal)
    error = caught.value
    assert (error.stage_name, error.item_index, error.attempts) == ("predict", 1, 1)
    assert isinstance(error.original_error, BrokenProcessPool)
    assert lines_of(output) == [["zoo/lions.py:1", "zoo"]]
    inline.deadly = "lions"  # which is done
    again = io.StringIO()
    assert await infer(ASKED, inline, again, batch_size=1, journal=journal) == (3, 2)
    assert len(lines_of(again)) == 3


# ---- with processes


@pytest.mark.threads
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
async def test_processes(start_method: str) -> None:
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start_method} on this system")
    rows = [Row(f"zoo/{number}.py:1", "cat") for number in range(50)]
    output = io.StringIO()
    with processes(train(LEARNT), start_method) as pool:
        assert await infer(rows, pool, output, batch_size=4) == (50, 50)
    assert lines_of(output) == [[row.place, "zoo"] for row in rows]


# seen on 3.11.2: after a failure the pool's shutdown waits for ever for its thread, which sleeps
ends = pytest.mark.skipif(sys.version_info < (3, 12), reason="a process pool may not end before Python 3.12")


class Deadly(Model):
    """A model of which a process dies, as one does that the system has no more memory for."""

    def predict(self, text: str) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it lives")


def load_deadly(path: str) -> None:
    model_inference.model = Deadly([], {})


@ends
@pytest.mark.threads
def test_a_killed_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(model_inference, "load_model", load_deadly)
    # larger batches fill the pipe to the processes, and then Python 3.11.2 waits for ever
    monkeypatch.setattr(sys, "argv", ["model_inference.py", "--batch-size", "1"])
    assert main() == 1
    assert capsys.readouterr() == ("", "a process died at batch 0 or soon after\n")


class Broken(Model):
    def predict(self, text: str) -> str:
        raise ZeroDivisionError


def load_broken(path: str) -> None:
    model_inference.model = Broken([], {})


@ends
@pytest.mark.threads
def test_a_model_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_inference, "load_model", load_broken)
    monkeypatch.setattr(sys, "argv", ["model_inference.py"])
    with pytest.raises(StageExecutionError, match="'predict' failed: ZeroDivisionError"):
        main()


# ---- the command


@pytest.mark.threads
def test_command(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.csv"
    command = ["--output", predictions, "--journal", tmp_path / "inference.db"]
    first = run(*command, "--batch-size", 100)
    assert (first.stderr, first.returncode) == ("", 0)
    found = re.fullmatch(
        rf"([\d,]+) rows, (\d+)% right, in ([\d,]+) batches by {PROCESSES} processes: \d+\.\d s\n",
        first.stdout,
    )
    assert found is not None
    rows, right, batches = (int(number.replace(",", "")) for number in found.groups())
    with predictions.open(newline="") as file:
        lines = list(csv.reader(file))
    library = Path(sysconfig.get_path("stdlib"))
    assert [place for place, _ in lines] == [
        row.place for row in read_rows(find_files(library)[1::2], library)
    ]
    assert (len(lines), batches) == (rows, -(-rows // 100))
    assert round(100 * sum(label_of(place) == label for place, label in lines) / rows) == right
    assert right > 50  # of nine packages

    before = predictions.read_bytes()
    again = run(*command, "--batch-size", 100)
    assert again.stdout.split(":")[0] == first.stdout.split(":")[0]
    assert predictions.read_bytes() == before

    assert run(*command, "--batch-size", 1000).returncode == 0  # other batches, in the same file
    assert [(kept.run_id, kept.finished) for kept in read_runs(str(tmp_path / "inference.db"))] == [
        ("batches of 100", batches),
        ("batches of 1000", -(-rows // 1000)),
    ]
