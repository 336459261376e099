"""The page of a report in a real browser: that all of it is seen, and that nothing in it runs."""

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from async_pipeline import Finish, Pipeline, Stage, StageExecutionError, each, fallback, parallel
from async_pipeline.events import Event
from async_pipeline.telemetry.report import ReportRecorder
from tests.helpers import run_virtually
from tests.test_trace import Story

SCRIPT = Path(__file__).with_name("report_page.mjs")
PLAYWRIGHT = os.environ.get("PLAYWRIGHT", "")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PATIENCE = 240  # seconds for what takes some

pytestmark = pytest.mark.skipif(
    not (PLAYWRIGHT and shutil.which("node") and os.path.exists(CHROMIUM)),
    reason="install Node.js 20 or newer and Chromium (apt-get install nodejs npm chromium), then: "
    'npm install --prefix "$HOME/playwright" playwright-core, and name the folder: '
    'export PLAYWRIGHT="$HOME/playwright"; a Chromium elsewhere than /usr/bin: export CHROMIUM=...',
)


def seen_in_browser(paths: Sequence[Path]) -> list[list[Any]]:
    """What is seen of each page: in light and dark, each at 400 and at 1280 pixels."""
    done = subprocess.run(
        ["node", str(SCRIPT), str(Path(PLAYWRIGHT).resolve()), CHROMIUM],
        input=json.dumps([*map(str, paths)]),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    results: list[list[Any]] = json.loads(done.stdout)
    assert [len(looks) for looks in results] == [4] * len(paths)
    return results


ALL = ["totals", "throughput", "stages", "errors", "retries", "slowest", "picture"]
KINDS = "html head meta title style body main section h1 h2 p dl div dt dd span small svg g rect path "
KINDS += "table thead tbody tr th td bdi wbr code ul li details summary b i"


def check(look: Any, sections: Sequence[str] = ALL) -> None:
    """What holds for each page."""
    assert look["complaints"] == []
    assert look["others"] == []
    assert look["sideways"] == 0
    assert look["unseen"] == []
    assert look["spilling"] == []
    assert look["faint"] == []
    assert look["texts"] > 0
    assert look["sections"] == [*sections]
    assert set(look["tags"]) <= set(KINDS.split())
    assert look["styled"] == "1200px"
    assert look["background"] == (
        "rgb(255, 255, 255)" if look["colorScheme"] == "light" else "rgb(20, 23, 26)"
    )


EVENTS: list[Event] = []


def batch() -> tuple[ReportRecorder, Any]:
    async def fetch(item: int) -> int:
        await asyncio.sleep(0.1 * (1 + item % 3))
        if item % 10 == 1:
            raise ConnectionError(f"reset {item}")
        if item % 10 == 2:
            raise Finish("known")
        return item

    async def slow(item: int) -> int:
        await asyncio.sleep(item)
        return item

    async def down(item: int) -> int:
        raise OSError("no route")

    recorder = ReportRecorder()
    pipeline: Any = Pipeline(
        [
            Stage("fetch", fetch, timeout=1, retries=2, retry_delay=0.5),
            parallel(price=Stage("ask_bank", slow), stock=Stage("count", lambda item: item), name="enrich"),
            Stage("pair", lambda both: [*both.values()]),
            each(fallback(Stage("primary", down), Stage("replica", lambda item: item)), 3),
        ],
        name="orders",
        observers=[recorder, EVENTS.append],
    )
    EVENTS.clear()

    async def main() -> None:
        await pipeline.map(range(40), 8, return_exceptions=True, timeout=30.5)
        task = asyncio.ensure_future(pipeline.map([5, 6], return_exceptions=True))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(main())
    return recorder, pipeline


def running() -> ReportRecorder:
    recorder = ReportRecorder()
    story = Story(recorder, item=0)
    story.start(0.0)
    story.start(0.0, "fetch")
    story.start(2.0, "fetch/inner")
    return recorder


def single() -> ReportRecorder:
    recorder = ReportRecorder()
    asyncio.run(Pipeline([str], name="one", observers=[recorder]).run(1))
    return recorder


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>&amp;\0\u202e\ud800 two  spaces "
SHOWN = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>&amp;\\x00\\u202e\\ud800 two  spaces"
)


class Item:
    def __repr__(self) -> str:
        return HOSTILE


def hostile() -> tuple[ReportRecorder, Any]:
    recorder = ReportRecorder()
    kind = type("Kind", (Exception,), {"__qualname__": HOSTILE, "__module__": "builtins"})
    for number, stage in enumerate([HOSTILE, "n" * 300, "עברית/العربية"]):
        story = Story(recorder, HOSTILE, HOSTILE, number)
        story.start(0.0)
        story.start(0.0, stage)
        story.fail(0.0, stage, delay=0.5, error=kind(HOSTILE))
        story.end(1.0, stage, outcome="error", attempts=2)
        error = StageExecutionError(stage, kind(HOSTILE * 9)).of_item(number, Item())
        story.end(1.0, outcome="error", error=error)
    steps = parallel({HOSTILE: Stage("w" * 250, str), "b": each(Stage(HOSTILE, str))}, name=HOSTILE)
    return recorder, Pipeline([steps, HOSTILE.join], name=HOSTILE)


def many() -> tuple[ReportRecorder, Any]:
    """All that is bounded is full."""
    recorder = ReportRecorder()
    for run in range(250):
        stage = f"outer/stage-{run}/inner"
        story = Story(recorder, f"{run:016x}", "a pipeline with a long name", run)
        story.start(float(run))
        for element in range(60):
            story.start(float(run), stage, element)
            story.fail(float(run), stage, element, delay=1.5, error=OSError("m" * 999))
        for element in range(60):
            story.end(run + element / 60, stage, element, attempts=2)
        error = StageExecutionError(f"stage-{run}", ValueError("m" * 999)).of_item(run, "y" * 999)
        story.end(run + 1.0, outcome="error", error=error)
    return recorder, Pipeline([Stage(f"stage-{number}", str) for number in range(500)], name="wide")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reports")
    recorders: dict[str, Any] = {
        "batch": batch(),
        "empty": (ReportRecorder(), None),
        "picture": (ReportRecorder(), Pipeline([str, int], name="idle")),
        "running": (running(), None),
        "single": (single(), None),
        "hostile": hostile(),
        "many": many(),
    }
    for name, (recorder, pipeline) in recorders.items():
        recorder.write(folder / f"{name}.html", pipeline)
    assert (folder / "many.html").stat().st_size < 600_000
    looks = seen_in_browser([folder / f"{name}.html" for name in recorders])
    return dict(zip(recorders, looks, strict=True))


@pytest.mark.parametrize("name", ["batch", "hostile", "many"])
def test_a_full_page(pages: dict[str, Any], name: str) -> None:
    for look in pages[name]:
        check(look)


@pytest.mark.parametrize(
    ("name", "sections"),
    [("empty", []), ("picture", ["picture"]), ("running", ALL[:-1]), ("single", ALL[:-1])],
)
def test_a_small_page(pages: dict[str, Any], name: str, sections: list[str]) -> None:
    for look in pages[name]:
        check(look, sections)


def number(text: str) -> float:
    """What a number on the page is, in seconds if it has a unit."""
    if " min " in text:
        minutes, seconds = text.removesuffix(" s").split(" min ")
        return 60 * float(minutes) + float(seconds)
    figure, _, unit = text.partition(" ")
    return float(figure.replace(",", "")) * {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3}.get(unit, 1)


def is_near(text: str, exact: float) -> bool:
    return abs(number(text) - exact) <= 0.016 * exact + 0.5 * (exact >= 60)  # within 1 %, and rounded


def percentile(durations: list[float], percent: int) -> float:
    return sorted(durations)[math.ceil(percent * len(durations) / 100) - 1]


def test_the_numbers_are_what_it_was_fed(pages: dict[str, Any]) -> None:
    ends = [event for event in EVENTS if event.kind == "run_end"]
    retries = [event for event in EVENTS if event.will_retry]
    outcomes = Counter(event.outcome for event in ends)
    by_stage = defaultdict(list)
    for event in EVENTS:
        if event.outcome is not None:
            by_stage[event.stage or event.pipeline].append(event)
    failed = Counter(
        (error.stage_name, type(error.original_error).__qualname__)
        for event in ends
        if isinstance(error := event.error, StageExecutionError)
    )
    assert outcomes.keys() == {"ok", "finished", "error", "timeout", "cancelled"}
    assert len(by_stage) > 8
    assert len(failed) == 2
    for look in pages["batch"]:
        assert look["title"] == "orders - report"
        tiles = look["tiles"]
        assert number(tiles["ended"]) == len(ends) == 42
        assert number(tiles["succeeded"]) == outcomes["ok"] + outcomes["finished"]
        assert number(tiles["failed"]) == outcomes["error"] + outcomes["timeout"]
        assert number(tiles["cancelled"]) == outcomes["cancelled"] == 2
        assert number(tiles["retried"]) == len(retries) == 8
        wall = EVENTS[-1].time - EVENTS[0].time
        assert is_near(tiles["wall"], wall)
        assert is_near(tiles["rate"], len(ends) / wall)
        assert is_near(tiles["p50"], percentile([event.duration or 0.0 for event in ends], 50))

        assert {name for name, *_ in look["stages"]} == set(by_stage)
        for name, ended, told, retried, *latencies in look["stages"]:
            events = by_stage[name]
            durations = [event.duration or 0.0 for event in events]
            assert number(ended) == len(events)
            counts = [word for word in told.split() if word != "\n"]
            shown = dict(zip(counts[1::2], map(int, counts[::2]), strict=True))
            assert shown == Counter(event.outcome for event in events)
            assert number(retried) == sum(event.stage == name for event in retries)
            for percent, latency in zip((50, 90, 99, 100), latencies, strict=False):
                assert is_near(latency, percentile(durations, percent)), (name, percent)

        assert {
            (row[0].split()[0], row[1].split(".")[-1]): int(row[2]) for row in look["errors"][::2]
        } == failed
        assert [(row[0].split()[0], row[1], int(row[2])) for row in look["retries"][::2]] == [
            ("fetch", "ConnectionError", 8)
        ]
        assert is_near(look["retries"][0][3], sum(event.delay or 0.0 for event in retries))
        longest = sorted((event.duration or 0.0 for event in ends), reverse=True)[:20]
        assert len(look["slowest"]) == 20
        assert all(
            is_near(run.split(" orders")[0], one) for run, one in zip(look["slowest"], longest, strict=True)
        )
        assert look["bars"] > 20


def test_the_picture(pages: dict[str, Any]) -> None:
    for look in pages["batch"]:
        assert look["boxes"] == [
            "orders (pipeline): 2 observers",
            "fetch: timeout 1 s, 2 retries, delay 0.5 s",
            "enrich (parallel)",
            "price = ask_bank",
            "stock = count",
            "pair",
            "each: at most 3 at a time",
            "fallback",
            "primary",
            "replica",
        ]


def test_hostile_names_are_text(pages: dict[str, Any]) -> None:
    for look in pages["hostile"]:
        assert look["heading"] == SHOWN
        assert look["title"] == f"{' '.join(SHOWN.split())} - report"
        assert [row[0] for row in look["stages"]] == [SHOWN, SHOWN, "n" * 199 + "…", "עברית/العربية"]
        assert look["errors"][0][0].startswith(f"{SHOWN} ")
        assert SHOWN in look["errors"][1][0]
        assert look["slowest"][0] == f"1 s {SHOWN}  item 0 error {SHOWN}"
        assert f"{SHOWN}  = {'w' * 250}" in look["boxes"]


def test_the_check_can_fail(tmp_path: Path) -> None:
    recorder, pipeline = batch()
    recorder.write(tmp_path / "good.html", pipeline)
    page = (tmp_path / "good.html").read_text(encoding="utf-8")
    spoiled = {
        "complaints": page.replace("<h1>", "<script>alert(1)</script><h1>"),
        "faint": page.replace("<h1>", "<h1><tt>x</tt>").replace("h1 {", "tt { color: #777 } h1 {"),
        "sideways": page.replace("<h1>", "<h1><nobr>" + "long " * 99 + "</nobr>"),
        "unseen": page.replace("<section", "<section hidden", 1),
        "styled": page.replace("sha256-", "sha256-x"),
        "others": page.replace("default-src 'none'", "default-src *").replace("<h1>", "<h1><img src=x.png>"),
    }
    for name, text in spoiled.items():
        if name == "faint":  # with a style that its policy does not know, nothing is styled
            text = re.sub("<meta http-equiv[^>]*>", "", text)
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    for name, looks in zip(
        spoiled, seen_in_browser([tmp_path / f"{name}.html" for name in spoiled]), strict=True
    ):
        for look in looks:
            with pytest.raises(AssertionError):
                check(look)
            assert look[name] not in ([], 0, "1200px"), name
