"""Reports: the numbers on the page, what keeps it small, and that nothing in it can get out of its place."""

import asyncio
import base64
import gc
import hashlib
import math
import re
import tracemalloc
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from async_pipeline import (
    Finish,
    Pipeline,
    Stage,
    StageExecutionError,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
)
from async_pipeline.telemetry import _facts
from async_pipeline.telemetry import report as module
from async_pipeline.telemetry._facts import Latencies, Scale, Timeline
from async_pipeline.telemetry._page import _plain, _seconds
from async_pipeline.telemetry.report import ReportRecorder
from tests.test_trace import Story

VOID = {"meta", "wbr"}


class Node:
    """An element of the page."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag = tag
        self.attributes = attributes
        self.children: list[Node | str] = []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str) -> "list[Node]":
        found = [self] if self.tag == tag else []
        for child in self.children:
            found += [] if isinstance(child, str) else child.all(tag)
        return found

    def one(self, id: str) -> "Node":
        [found] = [node for node in self.everything() if node.attributes.get("id") == id]
        return found

    def everything(self) -> "list[Node]":
        inner = [child for child in self.children if isinstance(child, Node)]
        return [self, *(node for child in inner for node in child.everything())]

    def classed(self, name: str) -> "list[Node]":
        return [node for node in self.everything() if name in (node.attributes.get("class") or "").split()]


class Reader(HTMLParser):
    """Builds the tree, and refuses what is not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs)
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def read(page: str) -> Node:
    reader = Reader()
    reader.feed(page)
    reader.close()
    [root] = reader.open
    return root


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def written(recorder: ReportRecorder, path: Path, pipeline: Any = None) -> Node:
    recorder.write(path, pipeline)
    return read(path.read_text(encoding="utf-8"))


def tiles(page: Node) -> dict[str, str]:
    tiles = page.one("totals").all("dd")
    return {span.attributes["id"] or "": dd.text for dd in tiles for span in dd.all("span")}


def rows(page: Node, id: str) -> list[list[str]]:
    found = [tr for body in page.one(id).all("tbody") for tr in body.all("tr")]
    return [[cell.text.strip() for cell in tr.children if isinstance(cell, Node)] for tr in found]


def stages(page: Node) -> dict[str, list[str]]:
    return {name: cells for name, *cells in rows(page, "stages")}


def one_run(recorder: Any, number: int = 0, seconds: float = 1.0, **end: Any) -> None:
    story = Story(recorder, str(number), item=number)
    story.start(0.0)
    story.end(seconds, **end)


def failure(stage: str, error: BaseException, item_index: int | None = None, item: Any = None) -> Any:
    failed = StageExecutionError(stage, error)
    return failed if item_index is None else failed.of_item(item_index, item)


class TestTotals:
    def test_nothing_happened(self, path: Path) -> None:
        page = written(ReportRecorder(), path)
        assert page.all("h1")[0].text == "No runs"
        assert "nothing has run" in page.text
        assert not page.all("section")

    def test_nothing_happened_to_a_pipeline(self, path: Path) -> None:
        page = written(ReportRecorder(), path, Pipeline([str], name="orders"))
        assert page.all("h1")[0].text == "orders"
        assert [section.attributes["id"] for section in page.all("section")] == ["picture"]

    def test_each_outcome(self, path: Path) -> None:
        recorder = ReportRecorder()
        stories = [Story(recorder, str(item), item=item) for item in range(10)]
        for story in stories:
            story.start(10.0)
        outcomes = ["ok"] * 3 + ["finished"] * 2 + ["error", "timeout"] + ["cancelled"] * 2
        for number, (story, outcome) in enumerate(zip(stories, outcomes, strict=False), 1):
            story.end(10.0 + number, outcome=outcome)
        page = written(recorder, path)
        assert tiles(page) == {
            "ended": "9",
            "succeeded": "5 2 early",
            "failed": "2 22.2 %",
            "cancelled": "2",
            "retried": "0",
            "wall": "9 s",
            "rate": "1 per s",
            "p50": "5 s p99 9 s",
        }
        assert "; 1 still running." in page.text
        assert stages(page)["orders"][:2] == [
            "9",
            "3 ok 2 finished 1 error 1 timeout 2 cancelled 1 running",
        ]

    def test_all_at_once(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder, seconds=0.0)
        page = written(recorder, path)
        shown = tiles(page)
        assert (shown["wall"], shown["rate"], shown["p50"]) == ("0 s", "-", "0 s p99 0 s")
        assert "still running" not in page.text.split("Slowest")[0]

    def test_nothing_has_ended(self, path: Path) -> None:
        recorder = ReportRecorder()
        Story(recorder).start(0.0)
        page = written(recorder, path)
        assert tiles(page)["ended"] == "0"
        assert "No run has ended yet." in page.one("throughput").text
        assert stages(page)["orders"][1] == "1 running"

    def test_several_pipelines(self, path: Path) -> None:
        recorder = ReportRecorder()
        for number, name in enumerate(["a", "b", "a", "c", "d", "e"]):
            story = Story(recorder, str(number), name)
            story.start(float(number))
            story.start(float(number), "fetch")
            story.end(number + 0.5, "fetch")
            story.end(number + 0.5)
        page = written(recorder, path, Pipeline([str], name="of the picture alone"))
        assert page.all("h1")[0].text == "a, b, c and 2 more"
        assert tiles(page)["ended"] == "6"
        shown = [(name, ended) for name, ended, *_ in rows(page, "stages")]
        assert shown == [
            ("a", "2"),
            ("fetch", "2"),
            *((name, "1") for one in "bcde" for name in (one, "fetch")),
        ]

    def test_three_pipelines(self, path: Path) -> None:
        recorder = ReportRecorder()
        for name in "abc":
            Story(recorder, name, name).start(0.0)
        assert written(recorder, path).all("h1")[0].text == "a, b, c"

    def test_another_loop_follows(self, path: Path) -> None:
        recorder = ReportRecorder()
        for number, start in enumerate((50.0, 0.0, 20.0, 5.0)):
            story = Story(recorder, str(number))
            story.start(start)
            story.end(start + 10)
        page = written(recorder, path)
        assert tiles(page)["wall"] == "50 s"
        assert [run.text.split(" orders")[0] for run in page.one("slowest").all("summary")] == ["10 s"] * 4


class TestStages:
    def test_a_stage(self, path: Path) -> None:
        recorder = ReportRecorder()
        for number in range(1, 101):
            story = Story(recorder, str(number), item=number)
            story.start(0.0)
            story.start(0.0, "fetch")
            if number > 90:
                story.fail(0.0, "fetch", delay=0.25)
            story.fail(0.0, "fetch")  # nothing follows it: no retry
            story.end(number / 1000, "fetch", error=OSError() if number < 5 else None)
            if number < 3:
                story.start(0.0, "save")
        page = written(recorder, path)
        fetch = stages(page)["fetch"]
        assert fetch[:3] == ["100", "100 ok 4 of them by on_error", "10"]
        assert [within(shown, exact) for shown, exact in zip(fetch[3:6], (0.05, 0.09, 0.099), strict=True)]
        assert fetch[6] == "100 ms"
        assert stages(page)["save"][:2] == ["0", "2 running"]

    def test_inner_stages_stand_below_what_they_are_inside_of(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(0.0)
        for name in ("a", "b", "a/x", "b/y", "b/y/z/u", "a/x/deep/er/still", "c"):
            story.start(0.0, name)
        page = written(recorder, path)
        names = ["orders", "a", "a/x", "a/x/deep/er/still", "b", "b/y", "b/y/z/u", "c"]
        assert [name for name, *_ in rows(page, "stages")] == names
        headings = [node for node in page.one("stages").all("th") if node.attributes["scope"] == "row"]
        depths = [int((node.attributes["class"] or "")[1:]) for node in headings]
        assert depths == [0, 1, 2, 4, 1, 2, 4, 1]

    def test_a_histogram(self, path: Path) -> None:
        recorder = ReportRecorder()
        stories = [Story(recorder, str(number)) for number in range(102)]
        for story in stories:
            story.start(0.0)
        for story in stories[:100]:
            story.end(1.0)
        stories[100].end(2.0)
        stories[101].end(2.0)
        [histogram] = written(recorder, path).one("stages").all("path")
        # two are less than a bar's height, and yet there
        assert histogram.attributes["d"] == "M0 20v-20h.9V20zM35 20v-1h.9V20z"

    def test_there_may_be_too_many(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_PARTS", 4)
        recorder = ReportRecorder()
        for run, name in enumerate(["one", "two"]):
            story = Story(recorder, str(run), name)
            story.start(float(run))
            for number in range(5):
                story.start(float(run), f"s{number}")
                story.end(run + 0.1 * number, f"s{number}")
            story.end(run + 0.5 + 100.0 * run)
        page = written(recorder, path)
        assert tiles(page)["ended"] == "2"
        assert {name: cells[0] for name, cells in stages(page).items()} == {
            "one": "1",
            "s0": "1",
            "s1": "1",
            "s2": "1",
            "all others": str(2 + 1 + 5),
        }

    def test_no_others(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder)
        assert "all others" not in stages(written(recorder, path))


def within(shown: str, exact: float) -> bool:
    number, unit = shown.split()
    factor = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1}[unit]
    return math.isclose(float(number) * factor, exact, rel_tol=0.016)  # 1 %, and the rounding


durations = st.lists(
    st.floats(0, 1e7) | st.floats(1e-9, 1e-3) | st.sampled_from([0.0, 1e-9, 1.0]), min_size=1
)


def latencies_of(seconds: Sequence[float]) -> Latencies:
    latencies = Latencies()
    for one in seconds:
        latencies.add(one)
    return latencies


@given(durations, st.integers(1, 100))
def test_a_percentile_is_within_one_percent(seconds: list[float], percent: int) -> None:
    exact = sorted(seconds)[math.ceil(percent * len(seconds) / 100) - 1]
    found = latencies_of(seconds).percentile(percent)
    assert math.isclose(found, exact, rel_tol=0.0100001, abs_tol=1e-9)
    assert min(seconds) <= found <= max(seconds)


def test_latencies_of_nothing() -> None:
    assert Latencies().percentile(50) == 0.0
    scale = Scale.of([Latencies()])
    assert sum(scale.bars(Latencies())) == 0


@given(st.lists(durations, min_size=1, max_size=3))
def test_the_bars_of_histograms(many: list[list[float]]) -> None:
    all_latencies = [latencies_of(seconds) for seconds in many]
    scale = Scale.of(all_latencies)
    first, last = scale.ends
    longer = [one for seconds in many for one in seconds if one > 1e-9]
    if longer:
        assert min(longer) / 1.011 <= first <= min(longer) * 1.011
        assert last >= max(longer) / 1.011
    for latencies, seconds in zip(all_latencies, many, strict=True):
        bars = scale.bars(latencies)
        assert sum(bars) == len(seconds)
        assert bars[0] >= sum(one <= 1e-9 for one in seconds)
        assert len(bars) == 48


def test_equal_latencies_have_a_narrow_bar() -> None:
    latencies = latencies_of([0.5] * 7)
    assert sorted(Scale.of([latencies]).bars(latencies))[-2:] == [0, 7]


@given(st.lists(st.floats(0, 1) | st.floats(0, 1e6), min_size=1), st.sampled_from(["ok", "error"]))
@example([120 * 2.0**-10], "ok")
def test_the_bars_of_the_throughput(ends: list[float], outcome: str) -> None:
    timeline = Timeline()
    for end in sorted(ends):
        timeline.add(end, outcome)
        timeline.add(end, "cancelled")
    assert len(timeline.bars) <= 120
    assert math.log2(timeline.width).is_integer()
    assert timeline.width * 60 <= max(ends) or timeline.width == 2**-10
    expected = Counter(int(end / timeline.width) for end in ends)
    for index, bar in enumerate(timeline.bars):
        shown = {outcome: expected[index], "cancelled": expected[index]} if expected[index] else {}
        assert bar == shown


class TestThroughput:
    def test_bars(self, path: Path) -> None:
        recorder = ReportRecorder()
        stories = [Story(recorder, str(number)) for number in range(41)]
        for story in stories:
            story.start(0.0)
        for number, story in enumerate(stories[:40]):
            story.end(0.01 if number < 30 else 5.0, outcome="ok" if number % 4 else "error")
        stories[40].end(5.0, outcome="cancelled")
        section = written(recorder, path).one("throughput")
        assert "each 62.5 ms, at most 30." in section.text
        first, last = section.all("g")
        assert first.all("title")[0].text == "0 s to 62.5 ms: 8 failed, 22 succeeded"
        assert last.all("title")[0].text == "5 s to 5.06 s: 2 failed, 1 cancelled, 8 succeeded"
        boxes = [rect.attributes for rect in first.all("rect")]
        assert [(box["class"], box["y"], box["height"]) for box in boxes] == [
            ("error", "73.33", "26.67"),
            ("ok", "0", "73.33"),
        ]
        [chart] = section.all("svg")
        assert chart.attributes["viewbox"] == "0 0 81 100"
        assert section.classed("axis")[0].text == "0 s5.06 s"
        assert [dot.text for dot in section.classed("dot")] == ["succeeded", "cancelled", "failed"]

    def test_a_short_one_has_room(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder, seconds=0.001)
        section = written(recorder, path).one("throughput")
        assert section.all("svg")[0].attributes["viewbox"] == "0 0 24 100"
        assert section.classed("axis")[0].text == "0 s23.4 ms"


class TestErrors:
    def test_groups(self, path: Path) -> None:
        recorder = ReportRecorder()
        for number in range(5):
            error = failure("a/fetch", OSError(f"no. {number}"), number, {"id": number})
            one_run(recorder, number, outcome="error", error=error)
        for number in range(7):
            one_run(recorder, number, outcome="timeout", error=failure("save", TimeoutError(), number, "x"))
        one_run(recorder, outcome="error", error=RuntimeError("from a middleware"))
        one_run(recorder, outcome="cancelled", error=asyncio.CancelledError())
        one_run(recorder, outcome="ok", error=failure("save", KeyError("handled")))
        page = written(recorder, path)
        assert rows(page, "errors") == [
            ["save orders", "TimeoutError", "7"],
            ["item 0 'x' item 1 'x' item 2 'x'"],
            ["a/fetch orders", "OSError", "5"],
            ["item 0 {'id': 0} no. 0item 1 {'id': 1} no. 1item 2 {'id': 2} no. 2"],
            ["none orders", "RuntimeError", "1"],
            ["item 0 from a middleware"],
        ]
        assert "None." in page.one("retries").text
        assert "other kinds" not in page.text

    def test_without_a_batch(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(0.0)
        story.end(1.0, outcome="error", error=failure("save", KeyError("id")))
        [_, [sample]] = rows(written(recorder, path), "errors")
        assert sample == "'id'"

    def test_an_element(self, path: Path) -> None:
        recorder = ReportRecorder()
        error = failure("save", KeyError("id"), 3, None).within("each", element=(4, 5))
        one_run(recorder, 3, outcome="error", error=error)
        [[stage, *_], [sample]] = rows(written(recorder, path), "errors")
        assert (stage, sample) == ("each/save orders", "item 3, element 4/5 None 'id'")

    def test_there_may_be_too_many(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_facts, "_GROUPS", 2)
        recorder = ReportRecorder()
        for number in range(6):
            one_run(recorder, number, outcome="error", error=failure(f"s{number % 3}", OSError()))
        page = written(recorder, path)
        assert [row[0] for row in rows(page, "errors")[::2]] == ["s0 orders", "s1 orders"]
        assert "And 2 runs that failed of other kinds than the first 2." in page.one("errors").text

    def test_what_can_not_be_shown(self, path: Path) -> None:
        class Hostile:
            def __repr__(self) -> str:
                raise KeyError

        class HostileList(list[int]):
            def __len__(self) -> int:
                raise RecursionError

            __repr__ = __len__  # type: ignore[assignment]

        HostileList.__name__ = "list"

        class HostileError(Exception):
            def __str__(self) -> str:
                raise ZeroDivisionError

        class WordyError(Exception):
            def __str__(self) -> str:
                return "m" * 10_000

        recorder = ReportRecorder()
        cases: list[tuple[BaseException, Any]] = [
            (HostileError(), Hostile()),
            (HostileError(), HostileList()),
            (HostileError(), 10**10_000),
            (WordyError(), ["y" * 10**7] * 10**6),
        ]
        for number, (error, item) in enumerate(cases):
            one_run(recorder, number, outcome="error", error=failure("save", error, number, item))
        [_, [first], _, [second]] = rows(written(recorder, path), "errors")
        assert first.count("<no message: its __str__ raised ZeroDivisionError>") == 3
        assert "<Hostile instance at 0x" in first
        assert "<list" in first  # newer Pythons look at such a class with other eyes
        assert "int" in first
        assert second.endswith(" " + "m" * 299 + "…")
        assert second.startswith("item 3 ['yyyyy")
        assert len(second) < 500

    def test_of_a_long_item_only_the_beginning_is_looked_at(self) -> None:
        shown = 0

        class Part:
            def __repr__(self) -> str:
                nonlocal shown
                shown += 1
                return "part"

        items: list[Any] = [[Part()] * 1000, {n: Part() for n in range(1000)}, (Part(),) * 1000]
        items += [{Part() for _ in range(1000)}, deque([Part()] * 1000), [[[[Part()]]]]]
        recorder = ReportRecorder()
        for item in items:
            one_run(recorder, outcome="error", error=failure(str(id(item)), OSError(), 0, item))
        assert shown == 5 * 8

    def test_it_holds_neither_errors_nor_items(self) -> None:
        class Item:
            pass

        class ItemError(Exception):
            pass

        async def fail(item: Item) -> None:
            raise held_error(item)

        held: list[weakref.ref[Any]] = []

        def held_error(item: Item) -> Exception:
            error = ItemError()
            held.extend([weakref.ref(item), weakref.ref(error)])
            return error

        recorder = ReportRecorder()
        pipeline = Pipeline([Stage("fail", fail, retries=1)], observers=[recorder])
        asyncio.run(pipeline.map((Item() for _ in range(2)), return_exceptions=True))
        gc.collect()
        assert len(held) == 8
        assert not any(reference() for reference in held)


class TestRetries:
    def test_groups(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder, item=4)
        story.start(0.0)
        for number in range(5):
            story.fail(float(number), "each/fetch", number, attempt=number, delay=1.5)
        story.fail(6.0, "each/save", 1, delay=0.0)
        story.fail(6.0, "each/save", 1)
        page = written(recorder, path)
        assert rows(page, "retries") == [
            ["each/fetch orders", "OSError", "5", "7.5 s"],
            ["item 4, element 0 noitem 4, element 1 noitem 4, element 2 no"],
            ["each/save orders", "OSError", "1", "0 s"],
            ["item 4, element 1 no"],
        ]
        assert tiles(page)["retried"] == "6"
        assert "None." in page.one("errors").text

    def test_there_may_be_too_many(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_facts, "_GROUPS", 1)
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(0.0)
        for number in range(3):
            story.fail(0.0, f"s{number}", delay=0.0)
        page = written(recorder, path)
        assert "And 2 retries of other kinds than the first 1." in page.one("retries").text
        assert tiles(page)["retried"] == "3"


class TestSlowest:
    def test_a_waterfall(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder, "abc", item=7)
        story.start(10.0)
        story.start(10.0, "both")
        story.start(10.0, "both/b", 0, 1)
        story.start(10.0, "both/a")
        story.end(11.0, "both/a", attempts=3)
        story.end(12.0, "both/b", 0, 1, outcome="timeout")
        story.end(12.0, "both")
        story.start(14.0, "after")
        story.end(14.0, "after")
        error = failure("both/b", TimeoutError())
        story.end(14.0, outcome="timeout", error=error)
        page = written(recorder, path).one("slowest")
        [details] = page.all("details")
        assert "shorter stages" not in page.text
        assert details.all("summary")[0].text == "4 s orders item 7 timeout TimeoutError"
        assert details.classed("muted")[0].text == "Run abc"
        assert rows(written(recorder, path), "slowest") == [
            ["both", "2 s", ""],
            ["both/a 3 attempts", "1 s", ""],
            ["both/b element 0/1 timeout", "2 s", ""],
            ["after", "0 s", ""],
        ]
        bars = [rect.attributes for rect in details.all("rect")]
        assert [(bar["class"], bar["x"], bar["width"]) for bar in bars] == [
            ("ok", "0", "500"),
            ("ok", "0", "250"),
            ("timeout", "0", "500"),
            ("ok", "994", "6"),
        ]
        assert details.classed("axis")[0].text == "0 s4 s"

    def test_what_is_still_running(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder, 1, 2.0)
        story = Story(recorder, "2", item=2)
        story.start(2.0)
        story.start(2.0, "fetch")
        story.end(3.0, "fetch")
        story.start(3.0, "save")
        story.fail(7.0, "save", delay=0.0)
        page = written(recorder, path)
        summaries = [node.text for node in page.one("slowest").all("summary")]
        assert summaries == ["5 s orders item 2 running", "2 s orders item 1 ok"]
        assert ["open" in details.attributes for details in page.all("details")] == [True, False]
        assert rows(page, "slowest") == [["fetch", "1 s", ""], ["save running", "4 s", ""]]
        story.end(8.0, "save")
        story.end(8.0)
        page = written(recorder, path)
        assert page.one("slowest").all("summary")[0].text == "6 s orders item 2 ok"
        assert rows(page, "slowest") == [["fetch", "1 s", ""], ["save", "5 s", ""]]

    def test_a_cancellation_has_no_type(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder, outcome="cancelled", error=asyncio.CancelledError())
        page = written(recorder, path)
        assert page.one("slowest").all("summary")[0].text == "1 s orders item 0 cancelled"

    def test_a_run_of_no_time(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(1.0)
        story.start(1.0, "fetch")
        story.end(1.0, "fetch")
        story.end(1.0)
        [bar] = written(recorder, path).one("slowest").all("rect")
        assert (bar.attributes["x"], bar.attributes["width"]) == ("0", "6")

    @given(
        st.lists(
            st.tuples(st.integers(0, 30), st.one_of(st.integers(0, 30), st.integers(0, 30), st.none())),
            min_size=40,
            max_size=60,
        )
    )
    def test_the_longest_are_kept(self, runs: list[tuple[int, int | None]]) -> None:
        recorder = ReportRecorder()
        stories = [Story(recorder, str(number)) for number, _ in enumerate(runs)]
        starts = [(start, 0, number) for number, (start, _) in enumerate(runs)]
        ends = [(start + seconds, 1, n) for n, (start, seconds) in enumerate(runs) if seconds is not None]
        for time, is_end, number in sorted(starts + ends):
            if is_end:
                stories[number].end(float(time))
            else:
                stories[number].start(float(time))
        now = max(time for time, _, _ in starts + ends)
        durations = [now - start if seconds is None else seconds for start, seconds in runs]
        slowest = recorder._facts().slowest
        assert [run.duration for run in slowest] == sorted(durations, reverse=True)[:20]
        assert len(recorder._slowest) <= 20

    @given(st.lists(st.integers(0, 9), min_size=20, max_size=60), st.integers(0, 60))
    def test_the_longest_stages_of_a_run_are_kept(self, seconds: list[int], running: int) -> None:
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(0.0)
        time = 0.0
        for number, lasting in enumerate(seconds):
            story.start(time, "fetch", number)
            time += lasting
            story.end(time, "fetch", number)
        for number in range(running):
            story.start(time, "save", number)
        [run] = recorder._facts().slowest
        durations = sorted([*seconds, *[0] * running], reverse=True)
        assert sorted((span.duration for span in run.spans), reverse=True) == durations[:40]
        assert len(run.spans) + run.left_out == len(durations)
        assert len(recorder._running["0"].spans) <= 40

    def test_what_was_left_out(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(0.0)
        for number in range(45):
            story.start(0.0, "fetch", number)
            story.end(1.0, "fetch", number)
        story.end(1.0)
        assert "And 5 shorter stages." in written(recorder, path).one("slowest").text

    def test_the_same_stage_twice_at_a_time(self, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder)
        story.start(0.0)
        story.start(0.0, "fetch")
        story.start(1.0, "fetch")
        story.end(3.0, "fetch", which=1)
        story.end(4.0, "fetch")
        story.end(4.0)
        assert [row[:2] for row in rows(written(recorder, path), "slowest")] == [
            ["fetch", "4 s"],
            ["fetch", "2 s"],
        ]

    def test_a_stage_of_an_unknown_run_is_counted(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder)
        story = Story(recorder, "unknown")
        story.start(2.0, "fetch")
        story.end(3.0, "fetch")
        story.began[None, ()].append(2.0)
        story.end(4.0)
        page = written(recorder, path)
        assert stages(page)["fetch"][:2] == ["1", "1 ok"]
        assert len(page.one("slowest").all("details")) == 1


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</title><h1>x</h1>",
    "'\"><svg/onload=alert(1)>",
    "--> <!-- ]]> {title} %s \\",
    "&amp;&lt; &#0; &#x41;",
    " two  spaces ",
    "one\ntwo\r\n\tthree",
    "\0\x1b[31m\x7f\x85",
    "\u202ertl\u2066\u2028\ufeff",
    "\ud800",
    "עברית / العربية",
    "a/b/../c.d",
    "\N{MAN}\u200d\N{PERSONAL COMPUTER}",
    "",
    "/",
    "n" * 500,
]


def literal(text: str) -> str:
    """What is read on the page."""
    escaped = re.sub(
        "[\0\x1b\x7f\x85\u202e\u2066\u2028\ufeff\ud800\n\r\t]", lambda m: ascii(m[0])[1:-1], text
    )
    return (escaped if len(text) <= 200 else text[:199] + "…") or "''"


class TestPage:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_names_are_shown_as_they_are(self, name: str, path: Path) -> None:
        recorder = ReportRecorder()
        story = Story(recorder, name, pipeline=name, item=1)
        story.start(0.0)
        story.start(0.0, name)
        story.recorder = recorder
        story.fail(0.0, name, delay=0.0)
        story.end(1.0, name)
        kind = type("Kind", (Exception,), {"__qualname__": name, "__module__": "builtins"})
        story.end(1.0, outcome="error", error=failure(name, kind(name), 1, Repr(name)))
        step = parallel({name: Stage(f"{name}!", str, retries=1)}, name=name)
        page = written(recorder, path, Pipeline([step], name=name))
        shown, whole = literal(name), page.text
        assert [row[0] for row in rows(page, "stages")] == [shown.strip()] * 2
        assert rows(page, "errors")[0][:2] == [f"{shown} {shown}".strip(), shown.strip()]
        assert rows(page, "retries")[0][0] == f"{shown} {shown}".strip()
        summary = page.one("slowest").all("summary")[0].text
        assert summary == f"1 s {shown} item 1 error{f' {shown}' if name else ''}"
        if name and len(name) < 100:
            assert f"item 1 {shown} {shown}" in whole
            assert page.all("h1")[0].text == shown
            assert page.all("title")[0].text == f"{shown} - report"
            assert f"Run {shown}" in whole
            assert f"{shown} = {shown}!: 1 retry" in page.one("picture").text
        assert not {node.tag for node in page.everything()} & {"script", "img", "iframe", "link", "a", "b i"}
        assert not [a for node in page.everything() for a in node.attributes if a.startswith("on")]
        assert len(page.all("h1")) == 1
        assert {bdi.attributes["dir"] for bdi in page.all("bdi")} == {"ltr"}

    def test_only_its_own_style_is_allowed(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder)
        page = written(recorder, path)
        [policy] = [
            node.attributes["content"] for node in page.all("meta") if "http-equiv" in node.attributes
        ]
        [style] = page.all("style")
        digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
        expected = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        assert policy == expected
        assert not [node for node in page.everything() if {"style", "href", "src"} & set(node.attributes)]
        assert "http" not in style.text
        assert "url(" not in style.text

    def test_it_is_utf8_and_begins_as_it_should(self, path: Path) -> None:
        recorder = ReportRecorder()
        recorder.write(str(path))
        page = path.read_bytes().decode("utf-8")
        assert page.startswith('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n')
        assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}; nothing has run\.", page)

    def test_ids_are_unique_and_sections_have_names(self, path: Path) -> None:
        recorder = ReportRecorder()
        one_run(recorder, outcome="error", error=failure("a", OSError()))
        page = written(recorder, path, Pipeline([str]))
        ids = [node.attributes["id"] for node in page.everything() if "id" in node.attributes]
        assert len(ids) == len(set(ids))
        named = [
            node.attributes["aria-labelledby"]
            for node in page.everything()
            if "aria-labelledby" in node.attributes
        ]
        assert set(named) <= set(ids)
        assert [section.attributes["id"] for section in page.all("section")] == [
            "totals",
            "throughput",
            "stages",
            "errors",
            "retries",
            "slowest",
            "picture",
        ]


class Repr:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def boxes(node: Node) -> Any:
    """The boxes as (label, [what stands between them, what is inside])."""
    [label] = [child.text for child in node.children if isinstance(child, Node) and child.tag == "p"]
    inside = [
        (
            "".join(span.text for span in step.children if isinstance(span, Node) and span.tag == "span"),
            boxes(box),
        )
        for row in node.children
        if isinstance(row, Node) and row.tag == "div"
        for step in row.children
        if isinstance(step, Node)
        for box in step.children
        if isinstance(box, Node) and box.tag == "div"
    ]
    return (label, inside) if inside else label


def picture(pipeline: Any, path: Path) -> Any:
    [outermost, *_] = written(ReportRecorder(), path, pipeline).one("picture").classed("box")
    return boxes(outermost)


class TestPicture:
    @pytest.mark.parametrize("wrong", [len, [], "orders", Pipeline])
    def test_of_what_is_no_step_there_is_none(self, path: Path, wrong: Any) -> None:
        with pytest.raises(TypeError, match=r"^pipeline must be a pipeline or another step, not "):
            ReportRecorder().write(path, wrong)
        assert not path.exists()

    def test_every_kind_of_step(self, path: Path) -> None:
        def is_big(value: int) -> bool:
            raise NotImplementedError

        pipeline = Pipeline(
            [
                Stage("fetch", str, timeout=0.5, retries=3, retry_delay=0.5, backoff="exponential"),
                parallel(price=Stage("ask_bank", str), stock=str, both=each(str), name="enrich"),
                branch((is_big, Pipeline([str, int], name="mended")), otherwise=each(keep(is_big), 20)),
                fallback(Stage("primary", str), Stage("replica", str), on=OSError),
                require("id"),
            ],
            name="orders",
        )
        assert picture(pipeline, path) == (
            "orders (pipeline)",
            [
                ("", "fetch: timeout 0.5 s, 3 retries, exponential backoff from 0.5 s"),
                (
                    "→",
                    (
                        "enrich (parallel)",
                        [("", "price = ask_bank"), ("", "stock"), ("", ("both (each)", [("", "str")]))],
                    ),
                ),
                (
                    "→",
                    (
                        "branch",
                        [
                            ("", "if is_big"),
                            ("", ("then mended (pipeline)", [("", "str"), ("→", "int")])),
                            (
                                "",
                                (
                                    "otherwise each: at most 20 at a time",
                                    [("", ("keep", [("", "if is_big")]))],
                                ),
                            ),
                        ],
                    ),
                ),
                ("→", ("fallback: on OSError", [("", "primary"), ("else", "replica")])),
                ("→", "require: needs id"),
            ],
        )

    def test_a_step_that_is_no_pipeline(self, path: Path) -> None:
        assert picture(Stage("fetch", str, timeout=2), path) == "fetch: timeout 2 s"

    def test_there_may_be_too_many(self, path: Path) -> None:
        page = written(ReportRecorder(), path, Pipeline([Stage(f"s{n}", str) for n in range(400)]))
        section = page.one("picture")
        assert len(section.classed("box")) == 300
        assert "And 101 more, and what is inside them." in section.text
        assert section.text.count("…") == 1

    def test_they_may_be_too_deep(self, path: Path) -> None:
        step: Any = Stage("innermost", str)
        for number in range(1000):
            step = Pipeline([step, Stage("after", str)], name=f"p{number}")
        section = written(ReportRecorder(), path, step).one("picture")
        assert len(section.classed("box")) == 20 + 19
        assert "And 2 more, and what is inside them." in section.text

    def test_all_of_them(self, path: Path) -> None:
        page = written(ReportRecorder(), path, Pipeline([Stage(f"s{n}", str) for n in range(299)]))
        assert "more" not in page.one("picture").text

    def test_a_long_label_is_cut(self, path: Path) -> None:
        assert len(picture(Pipeline([str], name="n" * 1000), path)[0]) == 400


class TestTexts:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0.0, "0 s"),
            (1e-12, "0.001 ns"),
            (5e-9, "5 ns"),
            (0.9994e-6, "999 ns"),
            (0.9996e-6, "1 µs"),
            (0.0123456, "12.3 ms"),
            (0.9994, "999 ms"),
            (0.9996, "1 s"),
            (59.94, "59.9 s"),
            (59.99, "1 min 0 s"),
            (125.4, "2 min 5 s"),
            (3599.6, "1 h 0 min"),
            (90_000.0, "25 h 0 min"),
        ],
    )
    def test_seconds(self, seconds: float, text: str) -> None:
        assert _seconds(seconds) == text

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (0.0, "0"),
            (0.01234, "0.0123"),
            (99.95, "100"),
            (999.4, "999"),
            (999.6, "1,000"),
            (12345.6, "12,346"),
        ],
    )
    def test_plain(self, number: float, text: str) -> None:
        assert _plain(number) == text


class TestPipelines:
    @pytest.mark.virtual
    async def test_a_batch(self, path: Path) -> None:
        async def fetch(item: int) -> int:
            await asyncio.sleep(1)
            if item % 5 == 1:
                raise ConnectionError(f"reset {item}")
            if item % 5 == 2:
                raise Finish("known")
            return item

        async def score(item: int) -> int:
            await asyncio.sleep(item)
            return item

        recorder = ReportRecorder()
        pipeline = Pipeline(
            [
                Stage("fetch", fetch, retries=2, retry_delay=1),
                lambda item: [item, 1],
                each(Stage("score", score)),
            ],
            name="orders",
            observers=[recorder],
        )
        await pipeline.map(range(10), 3, return_exceptions=True, timeout=6.5)
        page = written(recorder, path, pipeline)
        shown = tiles(page)
        assert {name: shown[name] for name in ("ended", "succeeded", "failed", "cancelled", "retried")} == {
            "ended": "10",
            "succeeded": "6 2 early",
            "failed": "4 40 %",
            "cancelled": "0",
            "retried": "4",
        }
        counts = {name: cells[1] for name, cells in stages(page).items()}
        assert counts == {
            "orders": "4 ok 2 finished 2 error 2 timeout",
            "fetch": "6 ok 2 finished 2 error",
            "<lambda>": "6 ok",
            "each": "4 ok 2 timeout",
            "each/score": "10 ok 2 timeout",
        }
        assert rows(page, "errors")[::2] == [
            ["fetch orders", "ConnectionError", "2"],
            ["each/score orders", "async_pipeline.errors.DeadlineExceeded", "2"],
        ]
        assert rows(page, "errors")[1] == ["item 1 1 reset 1item 6 6 reset 6"]
        assert rows(page, "retries")[0] == ["fetch orders", "ConnectionError", "4", "4 s"]


def test_a_million_runs_take_no_more_memory_than_a_thousand() -> None:
    recorder = ReportRecorder()

    def record(runs: range) -> int:
        for number in runs:
            story = Story(recorder, str(number), item=number)
            story.start(float(number))
            for stage in ("fetch", "save"):
                story.start(float(number), stage)
                story.fail(float(number), stage, delay=0.0)
                story.end(number + 0.001 * (1 + number % 97), stage)
            error = failure("save", ValueError(number), number, number)
            story.end(number + 0.1 + number % 10, outcome="error", error=error)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = record(range(1000))
        grown = record(range(1000, 3000)) - first
    finally:
        tracemalloc.stop()
    assert grown < 20_000  # bytes: 10 for each run
    assert not recorder._running
