"""The journal in one process: what it keeps, what it refuses, and what is left when it is stopped."""

# ruff: noqa: ASYNC240 - the files are small, and on this machine

import asyncio
import errno
import os
import pickle
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    EngineError,
    JournalBusy,
    JournalError,
    JournalMismatch,
    Pipeline,
    RecordedError,
    Stage,
    StageExecutionError,
    _journal_file,
    _sqlite,
    each,
    item_key,
    journal,
)
from async_pipeline.journal import Codec, Journal, read_failures, read_runs
from async_pipeline.types import Step
from tests.helpers import run_alone, run_virtually
from tests.test_engine import FakeEngine, numbers_of

pytestmark = pytest.mark.threads


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batch.db"


def check_nothing_left(path: Path) -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("Journal")]
    assert not _sqlite._locked
    assert not list(path.parent.glob("*-lock"))
    assert not list(path.parent.glob("*-wal"))


@pytest.fixture(autouse=True)
def nothing_left(path: Path) -> Iterator[None]:
    yield
    check_nothing_left(path)


class Name:
    """A path as bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> Any:
        return os.fsencode(self._path)


class Unfit(list[int]):
    """What neither JSON nor pickle can keep, and has a length."""

    def __init__(self) -> None:
        super().__init__([1])
        self.lock = threading.Lock()
        self.append(cast(Any, self))


class Worker:
    """A handler that notes what it runs."""

    def __init__(self, work: Callable[[Any], Any] = lambda value: value * 2) -> None:
        self.ran: list[Any] = []
        self.keys: list[str | None] = []
        self._work = work

    async def __call__(self, value: Any) -> Any:
        self.ran.append(value)
        self.keys.append(item_key())
        await asyncio.sleep(0)
        return self._work(value)

    @property
    def pipeline(self) -> Pipeline[Any, Any]:
        return Pipeline([Stage("work", self)], name="batch")

    async def map(self, items: Any, journal: Journal, concurrency: int = 5, **options: Any) -> list[Any]:
        self.ran, self.keys = [], []
        results: list[Any] = await self.pipeline.map(items, concurrency, journal=journal, **options)
        return results


def rows(path: Path, query: str) -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def refusing(*refused: Any) -> Callable[[Any], Any]:
    def work(value: Any) -> Any:
        if value in refused:
            raise ValueError(f"not {value}")
        return value * 2

    return work


# -- what it is for


class TestRunningAgain:
    async def test_runs_nothing_that_has_finished(self, path: Path) -> None:
        worker = Worker()
        first = await worker.map(range(20), Journal(path))
        assert worker.ran == list(range(20))
        again = await worker.map(range(20), Journal(path))
        assert worker.ran == []
        assert first == again == [number * 2 for number in range(20)]

    async def test_runs_what_is_new(self, path: Path) -> None:
        worker = Worker()
        await worker.map(range(5), Journal(path))
        assert await worker.map(range(8), Journal(path)) == [0, 2, 4, 6, 8, 10, 12, 14]
        assert worker.ran == [5, 6, 7]
        assert await worker.map(range(3), Journal(path)) == [0, 2, 4]  # fewer are no mistake
        assert worker.ran == []

    async def test_runs_what_was_in_the_middle(self, path: Path) -> None:
        worker = Worker()
        stop = asyncio.Event()

        async def odd_ones_wait(value: int) -> int:
            if value % 2:
                await stop.wait()
            return value * 2

        pipeline = Pipeline([Stage("work", odd_ones_wait)], name="batch")
        async with pipeline.stream(range(10), 10, journal=Journal(path), ordered=False) as results:
            got = [await anext(aiter(results)) for _ in range(5)]
        assert sorted(got) == [0, 4, 8, 12, 16]
        assert await worker.map(range(10), Journal(path)) == [number * 2 for number in range(10)]
        assert sorted(worker.ran) == [1, 3, 5, 7, 9]

    async def test_with_a_stream(self, path: Path) -> None:
        worker = Worker()
        for _ in range(2):
            async with worker.pipeline.stream(range(10), journal=Journal(path)) as results:
                assert [value async for value in results] == [number * 2 for number in range(10)]
        assert len(worker.ran) == 10

    async def test_with_the_same_object(self, path: Path) -> None:
        worker, journal = Worker(), Journal(path)
        await worker.map(range(3), journal)
        assert await worker.map(range(4), journal) == [0, 2, 4, 6]
        assert worker.ran == [3]

    async def test_in_a_thread_that_outlives_the_main_one(self, path: Path) -> None:
        """There is no executor any more, and nothing may wait for ever."""
        ended = run_alone(f"""
import asyncio, threading
from async_pipeline import Pipeline
from async_pipeline.journal import Journal

async def slow(value):
    while threading.main_thread().is_alive():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    return value

def run():
    items = range(5)
    for _ in range(2):
        print(asyncio.run(Pipeline([slow]).map(items, 2, journal=Journal({str(path)!r}))))

threading.Thread(target=run).start()
""")
        assert (ended.stdout, ended.stderr) == ("[0, 1, 2, 3, 4]\n" * 2, "")
        assert rows(path, "SELECT count(*) FROM items") == [(5,)]

    async def test_without_executors(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in such a thread."""

        def refuse(*arguments: object) -> None:
            raise RuntimeError("cannot schedule new futures after shutdown")

        monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.submit", refuse)
        for _ in range(2):
            assert await Worker().map(range(5), Journal(path)) == [0, 2, 4, 6, 8]

    async def test_another_run_begins_anew(self, path: Path) -> None:
        worker = Worker()
        await worker.map(range(3), Journal(path, run_id="one"))
        assert await worker.map([7, 8], Journal(path, run_id="two")) == [14, 16]
        assert worker.ran == [7, 8]
        assert [(run.run_id, run.pipeline, run.finished) for run in read_runs(str(path))] == [
            ("one", "batch", 3),
            ("two", "batch", 2),
        ]

    async def test_the_default_run_is_that_of_the_pipelines_name(self, path: Path) -> None:
        worker = Worker()
        assert Journal(path).run_id_for(worker.pipeline) == "batch"
        assert Journal(path, run_id="x").run_id_for(worker.pipeline) == "x"
        await worker.map(range(3), Journal(path))
        await worker.map(range(3), Journal(path, run_id="batch"))
        assert worker.ran == []

    async def test_an_async_source(self, path: Path) -> None:
        async def source() -> Any:
            for number in range(5):
                yield number

        worker = Worker()
        for _ in range(2):
            assert await worker.map(source(), Journal(path)) == [0, 2, 4, 6, 8]
        assert worker.ran == []

    async def test_the_result_is_what_the_file_holds(self, path: Path) -> None:
        worker = Worker(lambda value: (value, {1: None}))
        first = await worker.map([1], Journal(path))
        assert first == [[1, {"1": None}]] == await worker.map([1], Journal(path))

    @pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
    async def test_synchronous(self, path: Path, synchronous: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        modes = []

        class Asked(sqlite3.Connection):
            def close(self) -> None:
                modes.append(self.execute("PRAGMA synchronous").fetchone()[0])
                super().close()

        using(monkeypatch, Asked)
        await Worker().map(range(3), Journal(path, synchronous=synchronous))
        assert modes == [{"NORMAL": 1, "FULL": 2}[synchronous]]

    async def test_an_item_that_the_handler_changes(self, path: Path) -> None:
        worker = Worker(lambda value: value.append(1) or len(value))
        for _ in range(2):
            assert await worker.map([[], [5]], Journal(path)) == [1, 2]
        assert worker.ran == []

    async def test_many_at_the_same_time(self, path: Path) -> None:
        worker = Worker()
        for count in (700, 1000):
            expected = [number * 2 for number in range(count)]
            assert await worker.map(range(count), Journal(path), 1000) == expected
        assert worker.ran == list(range(700, 1000))

    async def test_a_file_is_for_its_user_only(self, path: Path) -> None:
        modes: list[int] = []

        def look(value: int) -> int:
            if value == 2:
                modes.extend(stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir())
            return value

        await Worker(look).map([1, 2], Journal(path), 1)
        assert len(modes) == 4  # with -wal, -shm and -lock
        assert set(modes) == {0o600}
        assert os.listdir(path.parent) == ["batch.db"]


class TestItemKey:
    async def test_is_the_run_and_the_key(self, path: Path) -> None:
        worker = Worker()
        await worker.map(range(3), Journal(path, run_id="r"), 1)
        assert worker.keys == ["r/0", "r/1", "r/2"]
        await worker.map(["a", "b"], Journal(path, run_id="s", key=str.upper), 1)
        assert worker.keys == ["s/A", "s/B"]
        assert item_key() is None

    async def test_without_a_run_id_is_that_of_this_file(self, path: Path) -> None:
        """Or what was paid last month, from another file, would count as paid."""
        keys: list[str] = []
        pipeline = Pipeline([lambda item: keys.append(item_key() or "")], name="batch")
        for items, file in ([0], path), ([0, 1], path), ([0], path.with_name("other.db")):
            await pipeline.map(items, journal=Journal(file))
        first, second, other = keys
        assert first.removesuffix("0") == second.removesuffix("1") != other.removesuffix("0")
        assert first.startswith("batch-")

    async def test_is_the_same_in_each_attempt(self, path: Path) -> None:
        keys = []

        async def flaky(value: int) -> int:
            keys.append(item_key())
            if len(keys) < 3:
                raise OSError
            return value

        await Pipeline([Stage("flaky", flaky, retries=2)]).map([1], journal=Journal(path, run_id="r"))
        assert keys == ["r/0"] * 3

    async def test_is_gone_after_the_item(self, path: Path) -> None:
        """Or each worker would be replaced after each item."""
        tasks = set()

        async def noting(value: int) -> int:
            tasks.add(id(asyncio.current_task()))
            return value

        await Pipeline([noting]).map(range(20), 2, journal=Journal(path))
        assert len(tasks) <= 2


async def test_is_shown_while_a_batch_uses_it(path: Path) -> None:
    async with Worker().pipeline.stream(range(9), journal=Journal(path)) as results:
        assert [value async for value in results][-1] == 16
        (run,) = read_runs(str(path))
        assert (run.run_id, run.finished) == ("batch", 9)
        assert list(read_failures(str(path))) == []


class TestFailures:
    async def test_run_again(self, path: Path) -> None:
        worker = Worker(refusing(1, 3))
        first = await worker.map(range(5), Journal(path), return_exceptions=True)
        assert [isinstance(value, StageExecutionError) for value in first] == [
            False,
            True,
            False,
            True,
            False,
        ]
        worker._work = refusing(3)
        again = await worker.map(range(5), Journal(path), return_exceptions=True)
        assert worker.ran == [1, 3]
        assert again[1] == 2
        await worker.map(range(5), Journal(path), return_exceptions=True)
        assert worker.ran == [3]

    async def test_stay_if_they_are_not_to(self, path: Path) -> None:
        worker = Worker(refusing(1))
        await worker.map(range(3), Journal(path), return_exceptions=True)
        worker._work = refusing()
        (_, error, _) = await worker.map(range(3), Journal(path, retry_failed=False), return_exceptions=True)
        assert worker.ran == []
        assert isinstance(error, StageExecutionError)
        assert (error.stage_name, error.item_index, error.item) == ("work", 1, 1)
        assert repr(error.original_error) == "ValueError('not 1')"
        with pytest.raises(BatchError) as caught:
            await worker.map(range(3), Journal(path, retry_failed=False))
        assert list(caught.value.failures) == [1]

    async def test_are_shown(self, path: Path) -> None:
        worker = Worker(refusing(1, {"b": 1, "a": 2}))
        await worker.map([0, 1, {"b": 1, "a": 2}], Journal(path), return_exceptions=True)
        one, two = read_failures(str(path))
        assert (one.run_id, one.position, one.item) == ("batch", 1, 1)
        assert isinstance(one.error, StageExecutionError)
        assert (two.position, two.item) == (2, {"a": 2, "b": 1})
        (run,) = read_runs(str(path))
        assert (run.finished, run.failed) == (1, 2)
        worker._work = lambda value: 7
        await worker.map([0, 1, {"b": 1, "a": 2}], Journal(path))
        assert list(read_failures(str(path))) == []
        (after,) = read_runs(str(path))
        assert (after.finished, after.failed) == (3, 0)
        assert after.changed > run.changed > 1.7e9

    async def test_of_a_class_that_is_not_imported(self, path: Path) -> None:
        class OddError(Exception):
            pass

        def odd(value: int) -> int:
            raise OddError("no")

        pipeline: Pipeline[Any, Any] = Pipeline([odd])
        await pipeline.map([1], journal=Journal(path), return_exceptions=True)
        (error,) = await pipeline.map([1], journal=Journal(path, retry_failed=False), return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, RecordedError)
        assert error.original_error.type.endswith("OddError")

    async def test_of_an_item_that_changes_are_compared_too(self, path: Path) -> None:
        worker = Worker(refusing(1))
        await worker.map([1], Journal(path), return_exceptions=True)
        with pytest.raises(JournalMismatch, match="item 0 is not the one"):
            await worker.map([2], Journal(path))
        assert worker.ran == []

    async def test_a_cancellation_is_none(self, path: Path) -> None:
        async def cancelled(value: int) -> int:
            raise asyncio.CancelledError

        (error,) = await Pipeline([cancelled]).map([1], journal=Journal(path), return_exceptions=True)
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, asyncio.CancelledError)
        (run,) = read_runs(str(path))
        assert (run.finished, run.failed) == (0, 0)
        assert run.changed > 1.7e9

    async def test_do_not_replace_a_result(self, path: Path) -> None:
        """Two of one key run side by side, and the later one fails: the first one may have been reported."""
        begun: list[int] = []
        go_on = asyncio.Event()

        async def second_fails(value: int) -> int:
            begun.append(value)
            if len(begun) == 1:
                return value
            await go_on.wait()
            raise ValueError

        pipeline = Pipeline([second_fails])
        options: Any = {"ordered": False, "journal": Journal(path, key=str)}
        async with pipeline.stream([1, 1], 2, **options) as results:
            outcomes = results.outcomes()
            assert (await anext(outcomes)).unwrap() == 1
            go_on.set()
            assert (await anext(outcomes)).error is not None
        assert rows(path, "SELECT key, ok, value FROM items") == [("1", 1, "1")]


# -- what tells items and batches apart


class TestMismatch:
    @pytest.mark.parametrize(
        ("items", "message"),
        [([0, 5, 2], "item 1 is not"), ([0.0, 1, 2], "item 0"), ([0, True, 2], "item 1"), (["0"], "item 0")],
    )
    async def test_of_an_item(self, path: Path, items: list[Any], message: str) -> None:
        worker = Worker()
        await worker.map(range(3), Journal(path))
        with pytest.raises(JournalMismatch, match=rf"{message}.*run_id='batch'.*another run_id.* key="):
            await worker.map(items, Journal(path))
        assert await worker.map(range(3), Journal(path)) == [0, 2, 4]

    async def test_not_of_keys_in_another_order(self, path: Path) -> None:
        worker = Worker(lambda value: 1)
        await worker.map([{"a": 1, "b": (2, 3)}], Journal(path))
        await worker.map([{"b": [2, 3], "a": 1}], Journal(path))
        assert worker.ran == []

    @pytest.mark.parametrize(
        ("pipeline", "options", "message"),
        [
            (Pipeline([Stage("other", abs)]), {}, r"had stages: \['work'\]; now it has stages: \['other'\]"),
            (Pipeline([Stage("work", abs), Stage("b", abs)]), {}, r"\['work', 'b'\]"),
            (Pipeline([each(Stage("work", abs))]), {}, r"has stages: \[\['each', 'work'\]\]"),
            (Pipeline([Stage("work", abs)]), {"version": "2"}, "had version: None; now it has version: '2'"),
            (
                Pipeline([Stage("work", abs)]),
                {"key": str},
                "items by: 'position'; now it has items by: 'key'",
            ),
            (Pipeline([Stage("work", abs)]), {"codec": "pickle"}, "codec: 'json'; .* codec: 'pickle'"),
        ],
    )
    async def test_of_the_batch(
        self, path: Path, pipeline: Pipeline[Any, Any], options: dict[str, Any], message: str
    ) -> None:
        await Worker().map(range(3), Journal(path, run_id="r"))
        with pytest.raises(JournalMismatch, match=rf"run_id='r'.*{message}.*another run_id"):
            await pipeline.map([], journal=Journal(path, run_id="r", **options))
        await pipeline.map([], journal=Journal(path, run_id="s", **options))

    async def test_a_stage_inside_counts(self, path: Path) -> None:
        def nested(name: str) -> Pipeline[Any, Any]:
            return Pipeline([Pipeline([Stage(name, abs), Stage("b", abs)], name="inner")])

        await nested("a").map([1], journal=Journal(path, version=1))
        with pytest.raises(JournalMismatch, match=r"\['inner', 'a', 'b'\].*\['inner', 'c', 'b'\]"):
            await nested("c").map([1], journal=Journal(path, version=1))

    async def test_is_an_error_of_the_journal(self) -> None:
        assert issubclass(JournalMismatch, JournalError)
        assert issubclass(JournalBusy, JournalError)


class TestKey:
    async def test_makes_the_order_free(self, path: Path) -> None:
        worker = Worker(lambda value: value["id"])
        items = [{"id": number} for number in range(6)]
        journal = Journal(path, key=lambda item: item["id"])
        await worker.map(items, journal)
        assert await worker.map(reversed(items), journal) == [5, 4, 3, 2, 1, 0]
        assert worker.ran == []

    async def test_an_item_that_changes_under_it(self, path: Path) -> None:
        worker = Worker(lambda value: 1)
        journal = Journal(path, key=lambda item: item["id"])
        await worker.map([{"id": "a"}], journal)
        with pytest.raises(JournalMismatch, match="item 1, with the key 'a', is not"):
            await worker.map([{"id": "b"}, {"id": "a", "more": 1}], journal)

    @pytest.mark.parametrize("concurrency", [1, 2])
    async def test_two_items_of_one_key_that_differ(self, path: Path, concurrency: int) -> None:
        worker = Worker(lambda value: 1)
        journal = Journal(path, key=lambda item: item["id"])
        items = [{"id": "a"}, {"id": "a", "more": 1}]
        with pytest.raises(JournalMismatch, match="item 1, with the key 'a', is not"):
            await worker.map(items, journal, concurrency)

    async def test_the_later_one_of_two_that_are_equal_gets_the_result(self, path: Path) -> None:
        worker = Worker()
        assert await worker.map([1, 2, 1, 1], Journal(path, key=str), 1) == [2, 4, 2, 2]
        assert worker.ran == [1, 2]

    async def test_two_that_are_equal_side_by_side_both_run(self, path: Path) -> None:
        worker = Worker()
        assert await worker.map([1, 1], Journal(path, key=str), 2) == [2, 2]
        assert worker.ran == [1, 1]
        assert rows(path, "SELECT count(*) FROM items") == [(1,)]

    async def test_items_that_are_not_json_need_one(self, path: Path) -> None:
        worker = Worker(lambda value: 1)
        with pytest.raises(JournalError, match=r"item 1 is not JSON: .*set.*key=lambda item: item\.id"):
            await worker.map([1, {2}], Journal(path))
        for _ in range(2):
            assert await worker.map([{1}, {2}], Journal(path, run_id="sets", key=str)) == [1, 1]
        assert worker.ran == []
        # nothing to compare where one of the two was no JSON
        await worker.map([1], Journal(path, run_id="sets", key=lambda item: "{1}"))
        assert worker.ran == []

    async def test_failures_that_are_not_json_are_shown_without_the_item(self, path: Path) -> None:
        worker = Worker(refusing(b"1"))
        await worker.map([b"1"], Journal(path, key=repr), return_exceptions=True)
        (failed,) = read_failures(str(path))
        assert failed.item is None

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            (lambda item: 1.5, "of the type float"),
            (lambda item: None, "of the type NoneType"),
            (lambda item: item["id"], "TypeError: 'int' object is not subscriptable"),
            (lambda item: "\ud800", "UnicodeEncodeError"),
        ],
    )
    async def test_that_is_none(self, path: Path, key: Any, message: str) -> None:
        with pytest.raises(JournalError, match=rf"must return a str or an int.* item 0: .*{message}"):
            await Worker().map([1], Journal(path, key=key))


class TestCodec:
    async def test_pickle(self, path: Path) -> None:
        worker = Worker(lambda value: {value})
        for _ in range(2):
            assert await worker.map([1, 2], Journal(path, codec="pickle")) == [{1}, {2}]
        assert worker.ran == []

    @pytest.mark.parametrize("encode", [lambda value: str(value), lambda value: str(value).encode()])
    async def test_ones_own(self, path: Path, encode: Any) -> None:
        worker = Worker(lambda value: value)
        journal = Journal(path, codec=Codec("mine", encode, lambda data: (data,)))
        first = await worker.map([1, "ä"], journal)
        assert first == [(encode(1),), (encode("ä"),)] == await worker.map([1, "ä"], journal)
        assert worker.ran == []

    async def test_the_built_in_one_as_an_object(self, path: Path) -> None:
        await Worker().map([1], Journal(path, codec=journal._CODECS["pickle"]))
        await Worker().map([1], Journal(path, codec="pickle"))

    @pytest.mark.parametrize(
        ("codec", "message"),
        [
            ("json", r"can't be kept .* 'json': TypeError: the result is not JSON.* return JSON, or choose"),
            ("pickle", "can't be kept .* 'pickle'"),
            (
                Codec("mine", cast(Any, len), repr),
                "encode of the codec 'mine' must return bytes or a str, not int",
            ),
            (Codec("mine", lambda value: "\ud800", repr), "can't be kept .* 'mine': UnicodeEncodeError"),
            (
                Codec("mine", lambda value: b"1", lambda data: 1 / 0),
                "read again .* 'mine': ZeroDivisionError",
            ),
        ],
    )
    async def test_that_can_not_keep_a_result(self, path: Path, codec: Any, message: str) -> None:
        worker = Worker(lambda value: Unfit())
        (error,) = await worker.map([1], Journal(path, codec=codec), return_exceptions=True)
        assert type(error) is TypeError
        with pytest.raises(TypeError, match=message):
            raise error
        (failed,) = read_failures(str(path))
        assert type(failed.error) is TypeError

    async def test_a_result_that_is_too_large_is_that_items_failure(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(journal, "_LARGEST", 4)
        worker = Worker(lambda value: "x" * value)
        fits, error = await worker.map([2, 3], Journal(path), return_exceptions=True)
        assert fits == "xx"
        assert "can't be kept" in str(error)
        assert "larger than 4 bytes" in str(error)

    async def test_that_can_not_read_a_result(self, path: Path) -> None:
        worker = Worker()
        await worker.map([1], Journal(path, codec=Codec("mine", pickle.dumps, pickle.loads)))
        broken = Codec("mine", pickle.dumps, lambda data: 1 / 0)
        (error,) = await worker.map([1], Journal(path, codec=broken), return_exceptions=True)
        assert type(error) is TypeError
        assert rows(path, "SELECT ok FROM items") == [(1,)]


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"path": ":memory:"}, ValueError, "must be that of a file"),
            ({"path": ""}, ValueError, "must be that of a file"),
            ({"path": 1.5}, TypeError, "path must be a str or an os.PathLike, not 1.5"),
            ({"run_id": ""}, TypeError, "run_id must be a str that is not empty"),
            ({"run_id": 7}, TypeError, "run_id must be a str"),
            ({"key": "id"}, TypeError, "key must be a sync callable"),
            ({"key": asyncio.sleep}, TypeError, "key must be sync"),
            ({"version": 1.5}, TypeError, "version must be a str or an int"),
            ({"codec": "yaml"}, ValueError, "codec must be 'json', 'pickle' or a Codec"),
            ({"codec": ["json"]}, ValueError, "codec must be"),
            ({"codec": Codec("json", str, str)}, ValueError, "'json' is the name of a built-in one"),
            ({"synchronous": "OFF"}, ValueError, "synchronous must be 'NORMAL' or 'FULL'"),
        ],
    )
    def test_that_are_wrong(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Journal(**{"path": "batch.db", **options})

    async def test_of_map(self) -> None:
        with pytest.raises(TypeError, match="journal must be a Journal"):
            await Worker().map([1], "batch.db")  # type: ignore[arg-type]

    def test_it_shows_itself(self, path: Path) -> None:
        assert repr(Journal(path)) == f"Journal({str(path)!r})"
        assert repr(Journal(Name(path), run_id="r")) == f"Journal({str(path)!r}, run_id='r')"


# -- its file


def using(monkeypatch: pytest.MonkeyPatch, factory: type[sqlite3.Connection]) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **options: connect(path, **{"factory": factory, **options})
    )


class TestBusy:
    async def test_in_the_same_process(self, path: Path, tmp_path: Path) -> None:
        worker = Worker()
        link = tmp_path / "link.db"
        link.symlink_to(path)
        for name in (path, link):
            async with worker.pipeline.stream(range(3), journal=Journal(path)) as results:
                with pytest.raises(JournalBusy, match="another batch uses the journal") as caught:
                    await worker.map([7], Journal(name, run_id="other"))
                assert [value async for value in results] == [0, 2, 4]
            assert caught.value.path == str(path)
        await worker.map(range(3), Journal(link))
        assert worker.ran == []

    async def test_in_another_process(self, path: Path) -> None:
        other = f"""
import asyncio
from async_pipeline import Pipeline
from async_pipeline.journal import Journal
asyncio.run(Pipeline([abs]).map([1], journal=Journal({str(path)!r})))
"""
        async with Worker().pipeline.stream([1], journal=Journal(path)):
            ended = run_alone(other)
        assert "JournalBusy: another batch uses the journal" in ended.stderr
        assert run_alone(other).returncode == 0

    async def test_not_by_a_lock_file_that_was_left(self, path: Path) -> None:
        path.with_name("batch.db-lock").touch()
        await Worker().map([1], Journal(path))

    async def test_a_lock_file_that_its_owner_removes_meanwhile(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock, lock_path = _sqlite._lock, path.with_name("batch.db-lock")
        turns = iter(["removed", "made anew"])

        def late(file: int) -> bool:
            turn = next(turns, None)
            if turn is not None:
                lock_path.unlink()
            if turn == "made anew":
                lock_path.touch()
            return lock(file)

        monkeypatch.setattr(_sqlite, "_lock", late)
        files = len(os.listdir("/dev/fd"))
        async with Worker().pipeline.stream([1], journal=Journal(path)):
            assert lock_path.stat().st_ino == os.fstat(*_sqlite._locked).st_ino
            with pytest.raises(JournalBusy):
                await Worker().map([1], Journal(path))
        assert len(os.listdir("/dev/fd")) == files


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def database(*statements: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        db = sqlite3.connect(path)
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()

    return make


class TestOpening:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (write(b"some text that is no database" * 100), "is no journal, or damaged: choose another path"),
            (database("CREATE TABLE t (a)"), "belongs to another application"),
            (database("PRAGMA user_version = 3"), "belongs to another application"),
            (database("PRAGMA application_id = 1785685619"), "belongs to another application"),
            (
                database(f"PRAGMA application_id = {_journal_file._APPLICATION}", "PRAGMA user_version = 2"),
                r"another version of async_pipeline \(its format is 2, not 1\)",
            ),
        ],
    )
    async def test_a_file_that_is_no_journal(
        self, path: Path, make: Callable[[Path], object], message: str
    ) -> None:
        make(path)
        before = path.read_bytes()
        with pytest.raises(JournalError, match=message):
            await Worker().map([1], Journal(path))
        with pytest.raises(JournalError, match=message):
            read_runs(str(path))
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    async def test_an_empty_file_is_a_new_one(self, path: Path) -> None:
        path.touch()
        assert read_runs(str(path)) == []
        assert await Worker().map([1], Journal(path)) == [2]

    async def test_a_file_that_is_damaged(self, path: Path) -> None:
        await Worker().map(range(500), Journal(path), 100)
        content = bytearray(path.read_bytes())
        content[4096:] = b"\xff" * (len(content) - 4096)
        path.write_bytes(content)
        with pytest.raises(JournalError, match="damaged: choose another path, or move it away") as caught:
            await Worker().map(range(500), Journal(path))
        assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)

    async def test_a_folder(self, path: Path) -> None:
        path.mkdir()
        with pytest.raises(JournalError, match="give it a file, not a folder"):
            await Worker().map([1], Journal(path))

    async def test_a_folder_that_does_not_exist(self, path: Path) -> None:
        with pytest.raises(
            JournalError, match=r"No such file or directory; .* in a folder that exists"
        ) as caught:
            await Worker().map([1], Journal(path / "batch.db"))
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        with pytest.raises(
            JournalError, match=r"can't be shown: No such file.*; give it the file of a journal"
        ):
            read_runs(str(path))

    async def test_a_folder_that_may_only_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = os.open

        def refused(name: Any, flags: int, *mode: int) -> int:
            if str(name).startswith(str(path)):
                raise PermissionError(errno.EACCES, "Permission denied", name)
            return opened(name, flags, *mode)

        with (
            monkeypatch.context() as patch,
            pytest.raises(JournalError, match=r"Permission denied; .*may be written"),
        ):
            patch.setattr(os, "open", refused)
            await Worker().map([1], Journal(path))

    async def test_a_file_that_may_only_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        await Worker().map([1], Journal(path))
        connect = sqlite3.connect
        with (
            monkeypatch.context() as patch,
            pytest.raises(JournalError, match="give it a file that may be written"),
        ):
            patch.setattr(
                sqlite3,
                "connect",
                lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options),
            )
            await Worker().map([1], Journal(path))
        for left in path.parent.glob("batch.db-*"):  # by SQLite, which may not remove them
            left.unlink()

    async def test_a_file_that_somebody_has_locked(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_journal_file, "_PATIENCE", 0.0)
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalError, match="end the process that keeps it locked"):
            await Worker().map([1], Journal(path))
        lock.close()

    @pytest.mark.parametrize("failures", [2, 1000])
    async def test_a_file_that_becomes_busy_or_can_not_be_shared(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
    ) -> None:
        left = iter(range(failures))

        class Busy(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                if statement == "PRAGMA journal_mode = WAL" and next(left, None) is not None:
                    error = sqlite3.OperationalError("not now")
                    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                    raise error
                return super().execute(statement, values)

        using(monkeypatch, Busy)
        if failures == 2:
            assert await Worker().map([1], Journal(path)) == [2]
        else:
            monkeypatch.setattr(_journal_file, "_PATIENCE", 0.0)
            with pytest.raises(JournalError, match="not now; end the process"):
                await Worker().map([1], Journal(path))

    async def test_a_file_system_that_can_not_share(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Unable(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                statement = statement.replace("PRAGMA journal_mode = WAL", "SELECT 'delete'")
                return super().execute(statement, values)

        using(monkeypatch, Unable)
        with pytest.raises(JournalError, match=r"can't share a file there; .* on a local disk"):
            await Worker().map([1], Journal(path))

    async def test_a_stream_raises_it_when_it_is_entered(self, path: Path) -> None:
        stream = Worker().pipeline.stream([1], journal=Journal(path / "batch.db"))
        with pytest.raises(JournalError):
            await stream.__aenter__()


class TestFullDisk:
    @pytest.mark.parametrize("concurrency", [10, 400])
    async def test_ends_the_batch_and_keeps_what_was_there(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, concurrency: int
    ) -> None:
        class Full(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                if statement.startswith("PRAGMA synchronous"):
                    super().execute("PRAGMA max_page_count = 12")
                return super().execute(statement, values)

        worker, reported = Worker(), []
        with monkeypatch.context() as patch:
            using(patch, Full)
            with pytest.raises(
                JournalError, match=r"full; make some room.*stays there, and the same call"
            ) as caught:
                async with worker.pipeline.stream(range(5000), concurrency, journal=Journal(path)) as results:
                    async for value in results:
                        reported.append(value)
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        (known,) = rows(path, "SELECT count(*) FROM items")[0]
        assert 0 < len(reported) <= known or concurrency == 400
        first = list(worker.ran)
        assert await worker.map(range(5000), Journal(path), 100) == [number * 2 for number in range(5000)]
        assert len(worker.ran) == 5000 - known
        assert not set(worker.ran) & {value // 2 for value in reported}
        assert len(first) <= known + concurrency

    async def test_what_can_not_be_read_ends_it_too(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                if statement.startswith("SELECT key"):
                    raise ValueError("odd")
                return super().execute(statement, values)

        await Worker().map([1], Journal(path))
        using(monkeypatch, Broken)
        with pytest.raises(JournalError, match="can't be read: odd; look at the disk") as caught:
            await Worker().map([1], Journal(path))
        assert isinstance(caught.value.__cause__, ValueError)


# -- as few calls of SQLite as can be


@contextmanager
def statements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    seen: list[str] = []

    class Noting(sqlite3.Connection):
        def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
            seen.append(statement)
            return super().execute(statement, values)

    with monkeypatch.context() as patch:
        using(patch, Noting)
        yield seen


class TestGroups:
    async def test_a_first_run_looks_nothing_up(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with statements(monkeypatch) as seen:
            await Worker().map(range(50), Journal(path))
        assert not [statement for statement in seen if statement.startswith("SELECT key")]

    async def test_nor_does_one_that_has_met_all_that_it_knew(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await Worker(refusing(1)).map(range(3), Journal(path), return_exceptions=True)
        with statements(monkeypatch) as seen:
            await Worker().map(range(50), Journal(path), 1)
        assert len([statement for statement in seen if statement.startswith("SELECT key")]) == 3

    async def test_what_is_ready_at_the_same_time_is_one_statement(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for ran in (True, False):
            with statements(monkeypatch) as seen:
                await Pipeline([abs]).map(range(5000), 100, journal=Journal(path))
            word = "INSERT INTO items" if ran else "SELECT key"
            groups = [statement for statement in seen if statement.startswith(word)]
            assert 50 <= len(groups) <= 75  # the workers come one by one, at first
            assert "BEGIN IMMEDIATE" not in seen[seen.index(groups[0]) :]

    async def test_more_than_fit_in_one_are_one_transaction(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with statements(monkeypatch) as seen:
            await Worker().map(range(3000), Journal(path), 1000)
        begin = seen.index("BEGIN IMMEDIATE", 5)
        assert seen[begin + 1].startswith("INSERT INTO items")
        assert seen[begin + 2].startswith("INSERT INTO items")
        assert "COMMIT" in seen[begin:]

    def test_a_group_that_fails_in_its_middle_leaves_nothing_half_done(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        turns = iter(["well", "badly"])

        class Failing(sqlite3.Connection):
            def execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
                if statement.startswith("INSERT INTO items") and next(turns, "well") == "badly":
                    raise sqlite3.OperationalError("disk I/O error")  # not one that SQLite rolls back itself
                return super().execute(statement, values)

        using(monkeypatch, Failing)
        file = _journal_file.JournalFile(
            str(path), _journal_file.BatchRow("run", "pipeline", {}, "json"), "NORMAL"
        )
        file.open()
        many: list[Any] = [(number, number, b"", 1, "1", None, 0) for number in range(200)]
        answer = file.run([3], many)
        assert (
            "disk I/O error; look at the disk, and at limits of a file's size; what has finished stays"
            in str(answer.save_error)
        )
        assert (answer.found, answer.find_error) == ({}, None)
        assert file.run([3, 4], many[3:4]) == ({3: (b"", 1, "1")}, None, None)
        file.close()
        assert rows(path, "SELECT key FROM items") == [(3,)]


# -- around another step


class Inner:
    """A step with all that a journal asks for."""

    name = "inner"

    def __init__(self, log: list[Any], error: Exception | None = None) -> None:
        self._log = log
        self._error = error
        self._scope = self

    async def run(self, value: Any, /, *, context: Any = None) -> Any:
        raise AssertionError

    async def _run_item(self, value: Any, context: Any, index: int, timeout: float | None) -> Any:
        if self._error is not None:
            raise self._error
        self._log.append(("run", value, index, timeout, item_key()))
        return value

    def skip(self, index: int) -> None:
        self._log.append(("skip", index))

    async def __aenter__(self) -> None:
        self._log.append("enter")

    async def __aexit__(self, *error: object) -> None:
        self._log.append("exit")


async def map_step(step: Step[Any, Any], items: Any, **options: Any) -> list[Any]:
    from async_pipeline.fanout import Batch

    settings = {"concurrency": 1, "context": None, **options}
    batch = Batch(step, items, *settings.values(), return_exceptions=True)
    return await batch.run()


class TestAround:
    async def test_a_step_that_is_numbered_opened_and_told_what_is_skipped(self, path: Path) -> None:
        log: list[Any] = []
        pipeline = Worker().pipeline
        for items in ([7, 8], [7, 8, 9]):
            step = Journal(path, run_id="r").around(Inner(log), pipeline)
            assert await map_step(step, items, timeout=5) == items
        assert log == [
            *("enter", ("run", 7, 0, 5, "r/0"), ("run", 8, 1, 5, "r/1"), "exit"),
            *("enter", ("skip", 0), ("skip", 1), ("run", 9, 2, 5, "r/2"), "exit"),
        ]

    async def test_one_that_waits_for_the_end_of_the_source(self, path: Path) -> None:
        class Waiting(Inner):
            def _source_ended(self, total: int) -> None:
                self._log.append(("ended", total))

        log: list[Any] = []
        await map_step(Journal(path).around(Waiting(log), Worker().pipeline), iter([7, 8]))
        assert ("ended", 2) in log
        assert not hasattr(Journal(path).around(Inner(log), Worker().pipeline), "_source_ended")

    async def test_no_key_is_kept_in_memory(self, path: Path) -> None:
        step = Journal(path, key=str).around(Inner([]), Worker().pipeline)
        await map_step(step, range(50), concurrency=5)
        assert not step._running

    async def test_a_failure_that_stays_is_skipped_too(self, path: Path) -> None:
        log: list[Any] = []
        pipeline = Worker().pipeline
        await map_step(Journal(path).around(Inner(log, ValueError("no")), pipeline), [7])
        step = Journal(path, retry_failed=False).around(Inner(log), pipeline)
        (error,) = await map_step(step, [7])
        assert repr(error) == "ValueError('no')"
        assert ("skip", 0) in log

    @pytest.mark.parametrize("error", [JournalError("no"), EngineError("no")])
    async def test_what_ends_the_batch_is_no_failure_of_an_item(self, path: Path, error: Exception) -> None:
        log: list[Any] = []
        with pytest.raises(type(error)):
            await map_step(Journal(path).around(Inner(log, error), Worker().pipeline), [7])
        assert log == ["enter", "exit"]
        assert rows(path, "SELECT count(*) FROM items") == [(0,)]

    async def test_one_that_can_not_be_opened(self, path: Path) -> None:
        class Closed(Inner):
            async def __aenter__(self) -> None:
                raise EngineError("closed")

        with pytest.raises(EngineError, match="closed"):
            await map_step(Journal(path).around(Closed([]), Worker().pipeline), [7])
        check_nothing_left(path)

    async def test_one_that_can_not_be_closed(self, path: Path) -> None:
        class Open(Inner):
            async def __aexit__(self, *error: object) -> None:
                raise EngineError("open")

        with pytest.raises(EngineError, match="open"):
            await map_step(Journal(path).around(Open([]), Worker().pipeline), [7])
        check_nothing_left(path)

    async def test_a_step_that_knows_nothing_of_it(self, path: Path) -> None:
        class Plain:
            name = "plain"

            async def run(self, value: Any, /, *, context: Any = None, timeout: float = 1) -> Any:
                return [value, context, timeout]

        step = Journal(path).around(Plain(), Worker().pipeline)
        assert await step.run(3) == [3, None, 1]
        assert await map_step(step, [7], context={"a": 1}) == [[7, {"a": 1}, 1]]
        assert await map_step(step, [7, 8], context={"a": 1}, timeout=9) == [
            [7, {"a": 1}, 1],
            [8, {"a": 1}, 9],
        ]

    @pytest.mark.virtual
    async def test_the_timeout_of_an_item(self, path: Path) -> None:
        pipeline = Pipeline([Stage("slow", asyncio.sleep)])
        first, second = await pipeline.map([1, 9], timeout=5, journal=Journal(path), return_exceptions=True)
        assert first is None
        assert "run's timeout of 5" in str(second)

    async def test_observers_see_the_index_of_what_runs(self, path: Path) -> None:
        seen: list[Any] = []
        pipeline = Pipeline(
            [abs], observers=[lambda event: seen.append((event.kind, event.item_index))], name="watched"
        )
        await pipeline.map([1], journal=Journal(path))
        seen.clear()
        await pipeline.map([1, 2], journal=Journal(path))
        assert ("run_start", 1) in seen
        assert {index for _, index in seen} == {1}

    async def test_the_progress_counts_all_items(self, path: Path) -> None:
        counts: list[Any] = []
        worker = Worker()
        for _ in range(2):
            await worker.map(range(5), Journal(path), progress=lambda *count: counts.append(count))
            assert counts[-1] == (5, 0, 5)

    async def test_errors_of_the_progress_go_where_the_pipeline_says(self, path: Path) -> None:
        errors: list[Any] = []

        def broken(done: int, failed: int, total: int | None) -> None:
            raise ValueError

        pipeline = Pipeline([abs], on_hook_error=lambda *error: errors.append(error))
        await pipeline.map([1], journal=Journal(path), progress=broken)
        assert errors


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 30),
    refused=st.frozensets(st.integers(0, 29)),
    chunk_size=st.integers(1, 7),
    window=st.integers(1, 3),
    retry_failed=st.booleans(),
    by_key=st.booleans(),
)
def test_an_engine_gets_what_the_file_does_not_know(
    count: int, refused: frozenset[int], chunk_size: int, window: int, retry_failed: bool, by_key: bool
) -> None:
    mended: list[bool] = []

    def work(value: int) -> list[Any]:
        if value in refused and not mended:
            raise ValueError(value)
        return [value, item_key()]

    async def run(path: Path) -> tuple[list[Any], list[int]]:
        engine = FakeEngine(chunk_size=chunk_size, window=window)
        results = await Pipeline([work], name="batch").map(
            range(count),
            engine=engine,
            journal=Journal(path, run_id="r", key=str if by_key else None, retry_failed=retry_failed),
            return_exceptions=True,
        )
        return results, sorted(number for chunk in engine.chunks for number in numbers_of(chunk))

    with TemporaryDirectory() as folder:
        first, sent = run_virtually(run(Path(folder, "batch.db")))
        assert sent == list(range(count))
        mended.append(True)
        again, sent = run_virtually(run(Path(folder, "batch.db")))
    failed = [item for item in range(count) if item in refused]
    assert sent == (failed if retry_failed else [])
    for item in range(count):
        good = [item, f"r/{item}"]
        assert first[item] == good if item not in refused else isinstance(first[item], StageExecutionError)
        assert again[item] == good if item not in failed or retry_failed else again[item].item_index == item


# -- stopped anywhere


class TestCancelled:
    @pytest.mark.parametrize("resumed", [False, True])
    async def test_at_each_turn_of_the_loop(self, path: Path, resumed: bool) -> None:
        expected = [number * 2 for number in range(6)]
        turns, is_over = 0, False
        while not is_over:
            shutil.rmtree(path.parent)
            path.parent.mkdir()
            worker = Worker()
            if resumed:
                await worker.map(range(4), Journal(path))
            batch = asyncio.ensure_future(worker.map(range(6), Journal(path), 2))
            for _ in range(turns):
                await asyncio.sleep(0)
            is_over = batch.done()
            batch.cancel()
            try:
                assert await batch == expected
            except asyncio.CancelledError:
                check_nothing_left(path)
            ran = set(worker.ran)
            assert await worker.map(range(6), Journal(path)) == expected
            assert ran | set(worker.ran) | set(range(4 if resumed else 0)) == set(range(6))
            assert len(ran & set(worker.ran)) <= 2
            turns += 1 + turns // 8

    async def test_while_it_closes_waits_until_all_is_written(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()
        close = _journal_file.JournalFile.close

        def slow(file: Any) -> None:
            begun.set()
            go_on.wait()
            close(file)

        monkeypatch.setattr(_journal_file.JournalFile, "close", slow)
        batch = asyncio.ensure_future(Worker().map([1], Journal(path)))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        batch.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not batch.done()
        batch.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await batch
        check_nothing_left(path)
        assert rows(path, "SELECT ok FROM items") == [(1,)]

    async def test_while_it_opens(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on = threading.Event(), threading.Event()
        create = _sqlite.create_file

        def slow(path: str) -> None:
            begun.set()
            go_on.wait()
            create(path)

        monkeypatch.setattr(_journal_file, "create_file", slow)
        batch = asyncio.ensure_future(Worker().map([1], Journal(path)))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        batch.cancel()
        await asyncio.sleep(0)
        assert not batch.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await batch
        check_nothing_left(path)

    async def test_while_it_opens_what_can_not_be_opened(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def broken(path: str) -> None:
            begun.set()
            go_on.wait()
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(_journal_file, "create_file", broken)
        batch = asyncio.ensure_future(Worker().map([1], Journal(path)))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        batch.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await batch

    async def test_what_is_on_its_way_is_written(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on = threading.Event(), threading.Event()
        save = _journal_file.JournalFile._save

        def slow(file: Any, rows: Any) -> None:
            begun.set()
            go_on.wait()
            save(file, rows)

        monkeypatch.setattr(_journal_file.JournalFile, "_save", slow)
        batch = asyncio.ensure_future(Worker().map([1, 2], Journal(path)))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        batch.cancel()
        await asyncio.sleep(0)
        assert not batch.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert rows(path, "SELECT count(*) FROM items") == [(2,)]

    async def test_what_waits_to_be_written_is_written(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on, may_end = threading.Event(), threading.Event(), asyncio.Event()
        save = _journal_file.JournalFile._save

        def slow(file: Any, rows: Any) -> None:
            begun.set()
            go_on.wait()
            save(file, rows)

        async def second_ends_later(value: int) -> int:
            if value == 2:
                await may_end.wait()
            return value

        monkeypatch.setattr(_journal_file.JournalFile, "_save", slow)
        pipeline = Pipeline([second_ends_later])
        batch = asyncio.ensure_future(pipeline.map([1, 2], journal=Journal(path)))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        may_end.set()
        for _ in range(5):
            await asyncio.sleep(0)
        batch.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert rows(path, "SELECT count(*) FROM items") == [(2,)]

    async def test_a_lookup(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on = threading.Event(), threading.Event()
        find = _journal_file.JournalFile._find

        def slow(file: Any, keys: Any) -> Any:
            begun.set()
            go_on.wait()
            return find(file, keys)

        await Worker().map([1, 2], Journal(path))
        monkeypatch.setattr(_journal_file.JournalFile, "_find", slow)
        batch = asyncio.ensure_future(Worker().map([1, 2], Journal(path)))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait)
        batch.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await batch


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 40),
    concurrency=st.integers(1, 10),
    crashes=st.lists(st.integers(0, 30), max_size=4),
    ordered=st.booleans(),
    by_key=st.booleans(),
    failing=st.frozensets(st.integers(0, 39), max_size=5),
    delays=st.lists(st.integers(0, 3), min_size=1, max_size=7),
)
def test_crashes(
    count: int,
    concurrency: int,
    crashes: list[int],
    ordered: bool,
    by_key: bool,
    failing: frozenset[int],
    delays: list[int],
) -> None:
    """What a process leaves that dies at any moment is a copy of its files at that moment."""
    runs: list[list[int]] = []

    async def live(folder: Path, grave: Path, crash_at: int | None) -> set[int]:
        ran: list[int] = []
        reported: set[int] = set()
        runs.append(ran)

        async def handler(item: int) -> int:
            ran.append(item)
            await asyncio.sleep(delays[item % len(delays)])
            if len(ran) == crash_at:
                for file in folder.iterdir():
                    if not file.name.endswith(("-lock", "-shm")):
                        shutil.copy(file, grave / file.name)
                raise KeyboardInterrupt
            if item in failing:
                raise ValueError(item)
            return item * 2

        pipeline = Pipeline([handler])
        kept = Journal(folder / "batch.db", key=str if by_key else None)
        try:
            async with pipeline.stream(range(count), concurrency, ordered=ordered, journal=kept) as results:
                async for outcome in results.outcomes():
                    index = outcome.item
                    assert (outcome.error is not None) == (index in failing)
                    assert outcome.error or outcome.unwrap() == index * 2
                    reported.add(index)
        except KeyboardInterrupt:
            return reported
        assert reported == set(range(count))
        shutil.copytree(folder, grave, dirs_exist_ok=True)
        return reported

    with TemporaryDirectory() as name:
        folder = Path(name, "0")
        folder.mkdir()
        known: set[int] = set()
        for number, crash_at in enumerate([*crashes, None]):
            grave = Path(name, str(number + 1))
            grave.mkdir()
            before = known
            known = known | run_virtually(live(folder, grave, crash_at))
            assert not {item for item in runs[-1] if item not in failing} & before
            folder = grave
        good = [item for ran in runs for item in ran if item not in failing]
        assert len(good) <= count + concurrency * len(crashes)
        if crashes or count:
            assert {run.finished for run in read_runs(str(folder / "batch.db"))} == {
                count - len({*failing} & {*range(count)})
            }


class TestHostile:
    """What a user, another program or the system may do to it."""

    async def test_the_class_in_place_of_a_journal(self) -> None:
        wrong: Any = Journal
        with pytest.raises(TypeError, match=r"write journal=Journal\('batch.db'\)"):
            await Pipeline([str]).map([1], journal=wrong)

    @pytest.mark.parametrize("run_id", ["\udcff", "a\ud800"])
    async def test_a_run_id_that_is_no_text(self, path: Path, run_id: str) -> None:
        with pytest.raises(JournalError, match="its path and its run_id must be text"):
            await Pipeline([str]).map([1], journal=Journal(path, run_id=run_id))
        assert await Pipeline([str]).map([1], journal=Journal(path, run_id="a")) == ["1"]

    async def test_a_path_with_a_zero_byte(self) -> None:
        with pytest.raises(JournalError, match="its path and its run_id must be text"):
            await Pipeline([str]).map([1], journal=Journal("a\0b"))

    def test_codecs_of_what_can_not_be_called(self, path: Path) -> None:
        for functions in ((None, str), (str, None)):
            with pytest.raises(TypeError, match="codec must have functions to encode and decode"):
                Journal(path, codec=Codec("odd", *functions))

    async def test_true_is_no_key(self, path: Path) -> None:
        with pytest.raises(JournalError, match=r"key= must return a str or an int .* type bool"):
            await Pipeline([str]).map([1], journal=Journal(path, key=bool))

    async def test_a_file_that_is_no_lock_is_left_alone(self, path: Path) -> None:
        other = path.with_name(path.name + "-lock")
        other.write_text("precious")
        with pytest.raises(JournalError, match="is there already, and is no lock file"):
            await Pipeline([str]).map([1], journal=Journal(path))
        assert other.read_text() == "precious"
        other.unlink()

    async def test_a_lock_that_was_removed_by_hand_does_not_take_the_next_one_along(self, path: Path) -> None:
        lock = path.with_name(path.name + "-lock")

        async def steal(item: int) -> int:
            lock.unlink()
            lock.touch()  # of somebody who came meanwhile
            return item

        await Pipeline([steal]).map([1], journal=Journal(path))
        lock.unlink()

    @pytest.mark.parametrize("is_replaced", [False, True])
    async def test_a_file_that_is_removed_meanwhile(self, path: Path, is_replaced: bool) -> None:
        async def remove(item: int) -> int:
            if item == 2:
                path.unlink()
                if is_replaced:
                    path.touch()
            return item

        with pytest.raises(JournalError, match="was removed or replaced while it was in use"):
            await Pipeline([remove]).map(range(5), 1, journal=Journal(path))
        for left in path.parent.glob("batch.db*"):
            left.unlink()

    async def test_rows_that_are_damaged(self, path: Path) -> None:
        def fail(item: int) -> int:
            raise ValueError

        await Pipeline([fail]).map([1], journal=Journal(path), return_exceptions=True)
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE items SET value = '{'")
            db.execute("UPDATE runs SET fingerprint = '{'")
            db.commit()
        with pytest.raises(JournalError, match="no journal, or damaged"):
            list(read_failures(str(path)))
        with pytest.raises(JournalError, match="no journal, or damaged"):
            await Pipeline([fail]).map([1], journal=Journal(path))

    async def test_a_name_that_is_no_text(self, path: Path) -> None:
        odd = os.fsdecode(os.fsencode(path) + b"\xff")
        await Pipeline([str], name="p").map([1], journal=Journal(odd))
        assert [(run.run_id, run.finished) for run in read_runs(odd)] == [("p", 1)]

    async def test_an_interrupt_that_breaks_the_chain_of_calls(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was to be written is written, and nobody waits for who will not come."""
        step = Journal(path, run_id="r").around(Pipeline([str]), Pipeline([str]))
        async with step:
            monkeypatch.setattr(step._thread, "_call", lambda: None)
            row = (0, 0, b"", 1, "1", None, 0)
            step._thread.save(row)
        assert [run.finished for run in read_runs(str(path))] == [1]

    async def test_a_result_whose_bytes_are_too_many(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(journal, "_LARGEST", 10)
        text = Codec("text", str, str)
        results: list[Any] = await Pipeline([lambda item: item]).map(
            ["\xe9" * 5, "\xe9" * 6], journal=Journal(path, codec=text), return_exceptions=True
        )
        assert results[0] == "\xe9" * 5
        assert "larger than 10 bytes" in str(results[1])

    def test_one_that_can_not_be_written_is_shown_from_a_copy(self) -> None:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY
        assert "copy it to a folder that may be written" in str(_journal_file.explained(error, "a", "shown"))
