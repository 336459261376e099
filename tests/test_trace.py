"""Traces: what is on them, that the slices of a lane nest, and that a file is never half written."""

import asyncio
import gc
import json
import os
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_pipeline import Pipeline, Stage, StageExecutionError, each, parallel
from async_pipeline.events import EndEvent, Event, FailedAttempt
from async_pipeline.telemetry.trace import TraceRecorder, write_whole


class Story:
    """Tells a recorder what might happen in a run, on a clock of its own."""

    def __init__(self, recorder: Any, run_id: str = "0", pipeline: str = "orders", item: int | None = None):
        self.recorder = recorder
        self.common = (run_id, pipeline)
        self.item = item
        self.began: dict[tuple[Any, ...], list[float]] = defaultdict(list)

    def start(self, time: float, stage: str | None = None, *element: int) -> None:
        kind: Any = "run_start" if stage is None else "stage_start"
        self.began[stage, element].append(time)
        self.recorder(Event(kind, time, *self.common, stage, self.item, element))

    def end(
        self,
        time: float,
        stage: str | None = None,
        *element: int,
        outcome: Any = "ok",
        attempts: int = 1,
        error: BaseException | None = None,
        which: int = 0,
    ) -> None:
        kind: Any = "run_end" if stage is None else "stage_end"
        duration = time - self.began[stage, element].pop(which)
        where = (kind, time, *self.common, stage, self.item, element)
        self.recorder(EndEvent(*where, outcome, attempts, duration, error))

    def fail(
        self,
        time: float,
        stage: str,
        *element: int,
        attempt: int = 1,
        delay: float | None = None,
        error: Exception | None = None,
    ) -> None:
        where = (time, *self.common, stage, self.item, element)
        failed = OSError("no") if error is None else error
        self.recorder(FailedAttempt(*where, attempt=attempt, error=failed, delay=delay))


def written(recorder: TraceRecorder, path: Path) -> list[dict[str, Any]]:
    recorder.write(path)
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.json"


def slices(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X"]


def lanes(events: list[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in slices(events):
        found[event["pid"], event["tid"]].append(event)
    return found


def lane_names(events: list[dict[str, Any]]) -> dict[tuple[str, Any], str]:
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return {(event["name"], event["args"].get("item_index")): names[event["tid"]] for event in slices(events)}


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    """The interval as Perfetto computes it."""
    begin = round(event["ts"] * 1000)
    return begin, begin + round(event["dur"] * 1000)


def check_nesting(events: list[dict[str, Any]]) -> None:
    for on_lane in lanes(events).values():
        around: list[int] = []
        for begin, end in map(nanoseconds, on_lane):
            while around and around[-1] <= begin and not (around[-1] == begin == end):
                around.pop()
            assert not around or end <= around[-1], on_lane
            around.append(end)


class TestFile:
    def test_a_run_with_two_stages(self, path: Path) -> None:
        recorder = TraceRecorder()
        story = Story(recorder, "aa", item=7)
        story.start(100.0)
        story.start(100.0000015, "fetch")
        story.fail(100.25, "fetch", delay=0.5)
        story.end(101.0, "fetch", attempts=2)
        story.start(101.0, "save")
        error = StageExecutionError("save", LookupError(1))
        story.end(101.5, "save", outcome="error", error=error)
        story.end(101.5, outcome="error", error=error)
        common = {"pid": 1, "tid": 2}
        assert written(recorder, path) == [
            {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "orders"}},
            {"name": "thread_name", "ph": "M", **common, "args": {"name": "lane 1"}},
            {"name": "thread_sort_index", "ph": "M", **common, "args": {"sort_index": 1}},
            {
                "name": "orders",
                "cat": "run",
                "ph": "X",
                "ts": 0.0,
                "dur": 1500000.0,
                **common,
                "args": {
                    "outcome": "error",
                    "attempts": 1,
                    "error": "LookupError",
                    "item_index": 7,
                    "run_id": "aa",
                },
            },
            {
                "name": "fetch",
                "cat": "stage",
                "ph": "X",
                "ts": 1.5,
                "dur": 999998.5,
                **common,
                "args": {"outcome": "ok", "attempts": 2, "item_index": 7},
            },
            {
                "name": "attempt 1 failed",
                "cat": "attempt",
                "ph": "i",
                "s": "t",
                "ts": 250000.0,
                **common,
                "args": {"error": "OSError", "will_retry": True, "delay": 0.5},
            },
            {
                "name": "save",
                "cat": "stage",
                "ph": "X",
                "ts": 1000000.0,
                "dur": 500000.0,
                **common,
                "args": {"outcome": "error", "attempts": 1, "error": "LookupError", "item_index": 7},
            },
        ]

    def test_nothing_happened(self, path: Path) -> None:
        assert written(TraceRecorder(), path) == []

    def test_what_is_still_running(self, path: Path) -> None:
        recorder = TraceRecorder()
        story = Story(recorder)
        story.start(0.0)
        story.start(1.0, "fetch")
        story.fail(3.0, "fetch", attempt=1)
        run, fetch, _ = written(recorder, path)[3:]
        assert (run["dur"], fetch["dur"]) == (3e6, 2e6)
        assert run["args"] == {"unfinished": True, "run_id": "0"}
        assert fetch["args"] == {"unfinished": True}
        story.end(4.0, "fetch")
        story.end(5.0)
        run, fetch, _ = written(recorder, path)[3:]
        assert (run["dur"], fetch["dur"]) == (5e6, 3e6)
        assert "unfinished" not in run["args"] | fetch["args"]

    def test_names_are_written_as_they_are(self, path: Path) -> None:
        recorder = TraceRecorder()
        name = '</script>"\\\n\0\x7f\u2028 \N{PILE OF POO} é'
        story = Story(recorder, pipeline=name)
        story.start(0.0)
        story.start(0.0, name + "\ud800")
        events = written(recorder, path)
        assert events[0]["args"] == {"name": name}
        assert [event["name"] for event in slices(events)] == [name, name + "?"]
        assert "\N{PILE OF POO}" in path.read_text(encoding="utf-8")  # Perfetto takes no escape for it

    def test_beyond_the_limit(self, path: Path) -> None:
        recorder = TraceRecorder(limit=3)
        story = Story(recorder)
        story.start(0.0)
        story.start(0.0, "fetch")
        story.fail(0.5, "fetch", delay=0.0)
        assert recorder.left_out == 0
        story.fail(0.7, "fetch")
        story.end(1.0, "fetch")
        story.start(1.0, "save")
        story.end(2.0, "save")
        story.end(3.0)
        assert recorder.left_out == 2
        *events, told = written(recorder, path)
        assert [event["name"] for event in events[3:]] == ["orders", "fetch", "attempt 1 failed"]
        assert [event["dur"] for event in slices(events)] == [3e6, 1e6]
        assert told == {
            "name": "2 more, beyond the limit of 3",
            "ph": "i",
            "s": "g",
            "ts": 3e6,
            "pid": 1,
            "args": {"left_out": 2, "limit": 3},
        }

    def test_what_was_never_started_is_counted_or_passed_over(self, path: Path) -> None:
        recorder = TraceRecorder()
        story = Story(recorder)
        story.fail(0.0, "fetch")
        story.began["fetch", ()].append(0.0)
        story.end(1.0, "fetch")
        assert recorder.left_out == 1
        assert not slices(written(recorder, path))

    @pytest.mark.parametrize(
        ("limit", "kind"), [(0, ValueError), (-1, ValueError), (True, ValueError), ("9", TypeError)]
    )
    def test_a_wrong_limit(self, limit: Any, kind: type[Exception]) -> None:
        with pytest.raises(kind, match="limit must be"):
            TraceRecorder(limit=limit)

    def test_another_loop_follows(self, path: Path) -> None:
        recorder = TraceRecorder()
        for start in (50.0, 0.0, 20.0, 5.0):
            story = Story(recorder, str(start))
            story.start(start)
            story.end(start + 10)
        assert [nanoseconds(event) for event in slices(written(recorder, path))] == [
            (0, 10 * 10**9),
            (10 * 10**9, 20 * 10**9),
            (30 * 10**9, 40 * 10**9),
            (40 * 10**9, 50 * 10**9),
        ]

    def test_a_loop_whose_clock_begins_at_zero(self, path: Path) -> None:
        recorder = TraceRecorder()
        for seconds in (0.0, 5.0):
            story = Story(recorder, str(seconds))
            story.start(0.0)
            story.end(seconds)
        assert [event["dur"] for event in slices(written(recorder, path))] == [0, 5e6]


class TestLanes:
    def test_an_item_takes_over_a_free_lane(self, path: Path) -> None:
        recorder = TraceRecorder()
        first, second, third = (Story(recorder, str(item), item=item) for item in range(3))
        first.start(0.0)
        second.start(1.0)
        first.end(2.0)
        third.start(2.0)
        third.start(2.0, "fetch")
        assert lane_names(written(recorder, path)) == {
            ("orders", 0): "lane 1",
            ("orders", 1): "lane 2",
            ("orders", 2): "lane 1",
            ("fetch", 2): "lane 1",
        }

    def test_the_lowest_free_lane_is_taken(self, path: Path) -> None:
        recorder = TraceRecorder()
        stories = [Story(recorder, str(item), item=item) for item in range(4)]
        for story in stories[:3]:
            story.start(0.0)
        stories[2].end(1.0)
        stories[0].end(2.0)
        stories[3].start(3.0)
        assert lane_names(written(recorder, path))["orders", 3] == "lane 1"

    def test_branches_have_lanes_of_their_own(self, path: Path) -> None:
        recorder = TraceRecorder()
        story = Story(recorder)
        story.start(0.0)
        story.start(0.0, "both")
        story.start(0.0, "both/a")
        story.start(0.0, "both/b")
        story.start(1.0, "both/a/x")
        story.start(1.0, "both/b/x")
        story.end(2.0, "both/b/x")
        story.end(2.0, "both/b")
        story.start(2.0, "both/c")
        assert {name: lane for (name, _), lane in lane_names(written(recorder, path)).items()} == {
            "orders": "lane 1",
            "both": "lane 1",
            "both/a": "lane 1",
            "both/a/x": "lane 1",
            "both/b": "lane 1.1",
            "both/b/x": "lane 1.1",
            "both/c": "lane 1.1",
        }

    def test_branches_stay_with_their_item(self, path: Path) -> None:
        recorder = TraceRecorder()
        stories = [Story(recorder, str(item), item=item) for item in range(3)]
        for story in stories[:2]:
            story.start(0.0)
            story.start(0.0, "both")
        for stage in ("both/a", "both/b", "both/c"):
            for story in stories[:2]:
                story.start(0.0, stage)
        for story in stories[:2]:
            story.end(1.0, "both/b")
            story.start(1.0, "both/d")
        for stage in ("both/a", "both/c", "both/d", "both"):
            stories[0].end(2.0, stage)
        stories[0].end(2.0)
        stories[2].start(3.0)
        stories[2].start(3.0, "both")
        stories[2].start(3.0, "both/a")
        stories[2].start(3.0, "both/b")
        assert lane_names(written(recorder, path)) == {
            **{("orders", item): f"lane {item + 1}" for item in (0, 1)},
            **{("both", item): f"lane {item + 1}" for item in (0, 1)},
            **{("both/a", item): f"lane {item + 1}" for item in (0, 1)},
            **{("both/b", item): f"lane {item + 1}.1" for item in (0, 1)},
            **{("both/c", item): f"lane {item + 1}.2" for item in (0, 1)},
            **{("both/d", item): f"lane {item + 1}.1" for item in (0, 1)},
            **{(name, 2): "lane 1" for name in ("orders", "both", "both/a")},
            ("both/b", 2): "lane 1.1",
        }

    def test_elements_find_the_step_around_them(self, path: Path) -> None:
        recorder = TraceRecorder()
        story = Story(recorder)
        story.start(0.0)
        story.start(0.0, "each")
        story.start(0.0, "each/each", 0)
        story.start(0.0, "each/each", 1)
        story.start(1.0, "each/each/http/get", 1, 0)  # whose name is http/get
        story.start(1.0, "each/each/http/get", 1, 1)
        story.start(1.0, "each/each/http/get", 0, 0)
        events = slices(written(recorder, path))
        tid = {(event["name"], *event["args"].get("element", ())): event["tid"] for event in events}
        assert tid["each/each", 0] == tid["each",]
        assert tid["each/each/http/get", 0, 0] == tid["each/each", 0]
        assert tid["each/each/http/get", 1, 0] == tid["each/each", 1]
        assert len(set(tid.values())) == 3

    def test_a_stage_whose_run_is_unknown_has_a_lane(self, path: Path) -> None:
        recorder = TraceRecorder()
        Story(recorder, "1").start(0.0, "")
        Story(recorder, "1").start(0.0, "/x")
        Story(recorder, "2").start(0.0, "/fetch")
        Story(recorder, "2").start(0.0, "/fetch/x")
        names = {name: lane for (name, _), lane in lane_names(written(recorder, path)).items()}
        assert names == {"": "lane 1", "/x": "lane 1", "/fetch": "lane 2", "/fetch/x": "lane 2"}

    def test_the_same_element_is_nearer(self, path: Path) -> None:
        recorder = TraceRecorder()
        story = Story(recorder)
        story.start(0.0, "a", 1)
        story.start(0.0, "a")
        story.start(0.0, "a/b", 1)
        outer, other, inner = slices(written(recorder, path))
        assert outer["tid"] == inner["tid"] != other["tid"]

    def test_pipelines_are_processes_and_no_two_ids_are_equal(self, path: Path) -> None:
        recorder = TraceRecorder()
        for run_id, name in enumerate(["orders", "prices", "orders"]):
            Story(recorder, str(run_id), name).start(0.0)
        events = written(recorder, path)
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        assert [names[event["pid"]] for event in slices(events)] == ["orders", "prices", "orders"]
        assert len({*names, *(event["tid"] for event in slices(events))}) == 2 + 3
        numbers = [event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"]
        assert numbers == [1, 2, 1]

    def test_one_stage_twice_at_a_time(self, path: Path) -> None:
        # a middleware that hedges: return await first_of(next_stage(value), later(next_stage(value)))
        recorder = TraceRecorder()
        story = Story(recorder)
        story.start(0.0)
        story.start(0.0, "fetch")
        story.start(1.0, "fetch")
        story.start(1.0, "fetch/x")
        story.end(2.0, "fetch/x")
        story.fail(2.0, "fetch")
        story.end(3.0, "fetch", which=1, attempts=2)
        story.end(4.0, "fetch", attempts=3)
        story.end(4.0)
        events = written(recorder, path)
        _, first, second, inner = slices(events)
        [mark] = (event for event in events if event["ph"] == "i")
        assert inner["tid"] == mark["tid"] == second["tid"]
        assert (first["dur"], first["args"]["attempts"]) == (4e6, 3)
        assert (second["dur"], second["args"]["attempts"]) == (2e6, 2)
        assert first["tid"] != second["tid"]
        check_nesting(events)

    def test_what_outlives_the_step_around_it_moves_to_a_new_lane(self, path: Path) -> None:
        recorder = TraceRecorder()
        story, other, later = (Story(recorder, str(run)) for run in range(3))
        story.start(0.0)
        story.start(0.0, "outer")
        story.start(1.0, "outer/inner")
        story.fail(1.5, "outer/inner")
        story.start(2.0, "outer/inner/x")
        other.start(2.0)
        other.end(3.0)
        story.end(4.0, "outer")
        story.end(5.0, "outer/inner/x")
        story.start(5.0, "last")
        story.end(6.0, "outer/inner")
        later.start(6.0)
        events = written(recorder, path)
        names = lane_names(events)
        assert names["outer/inner", None] == names["outer/inner/x", None] == "lane 1.1"
        assert names["outer", None] == names["last", None] == "lane 1"
        [mark] = (event for event in events if event["ph"] == "i")
        assert mark["tid"] == next(e["tid"] for e in events if e["name"] == "outer/inner")
        assert slices(events)[-1]["tid"] == slices(events)[4]["tid"]  # lane 2
        check_nesting(events)


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[int, Any]]:
    """Starts and ends of runs with concurrent, nested stages, as far as possible in a wild order."""
    told: list[tuple[int, Any]] = []
    time = 0
    running: list[Any] = []
    for _ in range(draw(st.integers(1, 40))):
        time += draw(st.sampled_from([0, 0, 1, 7, 1001]))
        if draw(st.booleans()) and running:
            told.append((time, running.pop(draw(st.integers(0, len(running) - 1)))))
            continue
        around = draw(st.sampled_from([None, *running]))
        if around is None:
            one: Any = (draw(st.integers(0, 3)), None, ())
        else:
            run, path, element = around
            name = draw(st.sampled_from(["a", "b", "b/c", ""]))
            if draw(st.booleans()):
                element = (*element, draw(st.integers(0, 2)))
            one = (run, name if path is None else f"{path}/{name}", element)
        running.append(one)
        told.append((time, one))
    return told


@given(stories(), st.sampled_from([1, 5, 1000]), st.sampled_from([0.0, 123456.789]))
def test_slices_on_a_lane_nest(told: list[tuple[int, Any]], limit: int, begin: float) -> None:
    recorder = TraceRecorder(limit)
    running: Counter[Any] = Counter()
    runs = {run: Story(recorder, str(run)) for run in range(4)}
    starts = 0
    ended = {id(one) for index, (_, one) in enumerate(told) if any(one is o for _, o in told[:index])}
    seen: set[int] = set()
    for microseconds, one in told:
        run, stage, element = one
        time = begin + microseconds / 1e6
        if id(one) in seen:
            runs[run].end(time, stage, *element)
            running[one] -= 1
        else:
            seen.add(id(one))
            runs[run].start(time, stage, *element)
            running[one] += 1
            starts += 1
    entries = list(recorder._entries())
    check_nesting(entries)
    drawn = slices(entries)
    assert len(drawn) + recorder.left_out == starts
    assert len(drawn) == min(starts, limit)
    if recorder.left_out == 0:
        assert sum("unfinished" in entry["args"] for entry in drawn) == running.total() == starts - len(ended)


def test_the_check_of_nesting_can_fail() -> None:
    common = {"ph": "X", "pid": 1, "tid": 2}
    check_nesting([{**common, "ts": 0, "dur": 2}, {**common, "ts": 2, "dur": 2}])
    check_nesting([{**common, "ts": 0, "dur": 2}, {**common, "ts": 1, "dur": 1}])
    with pytest.raises(AssertionError):
        check_nesting([{**common, "ts": 0, "dur": 2}, {**common, "ts": 1, "dur": 1.001}])


class BrokenError(Exception):
    pass


async def fetch(item: int) -> int:
    await asyncio.sleep(1)
    if item == 1:
        raise BrokenError
    return item


async def wait(item: Any) -> Any:
    await asyncio.sleep(2)
    return item


class TestPipelines:
    @pytest.mark.virtual
    async def test_a_batch(self, path: Path) -> None:
        recorder = TraceRecorder()
        stages: list[Any] = [
            Stage("fetch", fetch, retries=1, retry_delay=0.5),
            parallel(a=wait, b=wait),
            Stage("pair", lambda both: [*both.values()]),
            each(Stage("score", wait), name="scores"),
        ]
        pipeline = Pipeline(stages, name="orders", observers=[recorder])
        await pipeline.map(range(3), 2, return_exceptions=True)
        events = written(recorder, path)
        check_nesting(events)
        assert Counter(event["name"] for event in slices(events)) == {
            "orders": 3,
            "fetch": 3,
            "parallel": 2,
            "parallel/a": 2,
            "parallel/b": 2,
            "pair": 2,
            "scores": 2,
            "scores/score": 4,
        }
        failed = [event for event in slices(events) if event["args"].get("error")]
        assert [event["name"] for event in failed] == ["orders", "fetch"]
        assert {event["args"]["error"] for event in failed} == {f"{__name__}.BrokenError"}
        assert [event["args"]["will_retry"] for event in events if event["ph"] == "i"] == [True, False]
        assert [event["dur"] for event in slices(events) if event["name"] == "orders"] == [5e6, 2.5e6, 5e6]

    @pytest.mark.virtual
    async def test_cancelled_runs_end(self, path: Path) -> None:
        recorder = TraceRecorder()
        pipeline = Pipeline([wait], name="orders", observers=[recorder])
        with pytest.raises(StageExecutionError):
            await pipeline.run(1, timeout=1)
        task = asyncio.ensure_future(pipeline.run(1))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        outcomes = [event["args"]["outcome"] for event in slices(written(recorder, path))]
        assert outcomes == ["timeout", "timeout", "cancelled", "cancelled"]

    async def test_it_holds_no_error(self) -> None:
        recorder = TraceRecorder()
        held: list[weakref.ref[Any]] = []

        def fail(item: Any) -> None:
            error = BrokenError()
            held.append(weakref.ref(error))
            raise error

        await Pipeline([Stage("fail", fail, retries=1)], observers=[recorder]).try_run(1)
        gc.collect()
        assert [reference() for reference in held] == [None, None]


class TestWriteWhole:
    def test_a_file_is_replaced(self, path: Path) -> None:
        write_whole(path, ["one\n", "two é\ud800"])
        assert path.read_bytes() == "one\ntwo é?".encode()
        write_whole(str(path), ["three"])
        assert path.read_bytes() == b"three"
        assert os.listdir(path.parent) == [path.name]

    def test_a_reader_never_sees_a_half(self, path: Path) -> None:
        path.write_text("old")

        def parts() -> Iterator[str]:
            yield "new" * 10_000
            assert path.read_text() == "old"
            yield "end"

        write_whole(path, parts())
        assert path.read_text() == "new" * 10_000 + "end"

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
    def test_a_failure_leaves_what_was_there(self, path: Path, kind: type[BaseException]) -> None:
        path.write_text("old")

        def parts() -> Iterator[str]:
            yield "new"
            raise kind

        with pytest.raises(kind):
            write_whole(path, parts())
        assert path.read_text() == "old"
        assert os.listdir(path.parent) == [path.name]

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write_whole(tmp_path / "none" / "file", ["new"])

    def test_a_folder_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match="folder"):
            write_whole(tmp_path / "folder", ["new"])
        assert os.listdir(tmp_path) == ["folder"]

    def test_a_link_stays_one(self, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to("file")
        for text in ("one", "two"):
            write_whole(link, [text])
            assert link.is_symlink()
            assert (tmp_path / "file").read_text() == text

    @pytest.mark.threads
    def test_a_pipe_is_written_to(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=write_whole, args=(pipe, ["one", "two"]))
        writer.start()
        assert pipe.read_text() == "onetwo"
        writer.join()
        assert pipe.is_fifo()
