"""Whatever the benchmarks compare does the same work, and their tables, page and picture can be made."""

import asyncio
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from taskiq import InMemoryBroker

from async_pipeline.testing import VirtualClockLoop
from benchmarks import (
    __main__,
    behaviour,
    by_hand,
    comparison,
    engines,
    in_fastapi,
    journal,
    memory,
    neighbours,
    page,
    plot,
    retries,
    tables,
    work,
)
from benchmarks.measure import TIMES, Ratio, measure, ratio
from benchmarks.memory import peak_bytes
from benchmarks.neighbours import BY_HAND, LIBRARIES, Neighbour, Ours, Window, Work, Workers
from benchmarks.work import CONCURRENCY, STAGES, Contender, plain, suspending

ROOT = Path(__file__).parents[1]
ITEMS = range(1000, 1300)  # several times the concurrency
TINIEST = comparison.Effort(2, 80, 60, 60, 120, 300, 1)
TINY = tables.Effort(5, 60, 2, 2, (20, 60), 1, TINIEST)
CONTENDERS: list[type[Neighbour]] = [*BY_HAND, Ours, *LIBRARIES]
# of packages that know the newest Python less well
others = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def results(contender: Callable[[Any], Any], items: Any = ITEMS) -> list[int]:
    async def main() -> list[int]:
        values: list[int] = await contender(items)
        return values

    return asyncio.run(main())


def made(kind: type[Neighbour]) -> Neighbour:
    """Make a contender, or skip the test if its package is not installed."""
    if kind not in LIBRARIES:
        return kind()
    found, missing = neighbours.find_neighbours([kind])
    if missing:
        pytest.skip(f"{kind.package} is not installed; the dependency group bench has it")
    return found[-1]


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what waits not take its time."""
    monkeypatch.setattr(asyncio.events, "new_event_loop", VirtualClockLoop)


@pytest.mark.parametrize("row", tables.ROWS, ids=lambda row: f"{row.title} against {row.limit_title}")
def test_ours_and_the_limit_give_the_same_results(row: tables.Row) -> None:
    assert results(row.ours) == work.expected(ITEMS)
    assert results(row.limit) == work.expected(ITEMS)


def test_each_does_the_same_work() -> None:
    assert results(work.each_items) == work.expected(ITEMS)


def test_the_five_stages_by_hand_do_the_same_work() -> None:
    assert results(work.one_by_one(by_hand.run_suspending)) == work.expected(ITEMS)


# ---- the neighbours


@others
@pytest.mark.parametrize("handler", [plain, suspending, comparison.waiting])
@pytest.mark.parametrize("kind", CONTENDERS, ids=lambda kind: kind.__name__)
def test_a_neighbour_gives_the_same_results(kind: type[Neighbour], handler: neighbours.Handler) -> None:
    contender, task = made(kind), Work(handler, STAGES, CONCURRENCY)
    run, map_items = contender.run(task), contender.map(task)
    if run is not None:
        assert results(work.one_by_one(run), ITEMS[:3]) == work.expected(ITEMS[:3])
    if map_items is not None:
        mapped = results(map_items)
        assert (mapped if contender.map_keeps_order else sorted(mapped)) == work.expected(ITEMS)
    for ordered in (True, False):
        open_stream = contender.stream(task, ordered=ordered)
        if open_stream is not None:
            streamed = results(partial(neighbours.collect, open_stream))
            assert (streamed if ordered else sorted(streamed)) == work.expected(ITEMS)


@others
@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("kind", CONTENDERS, ids=lambda kind: kind.__name__)
def test_a_neighbour_keeps_the_bound(kind: type[Neighbour]) -> None:
    running = most = 0

    async def handler(value: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1)
        running -= 1
        return value

    contender, task = made(kind), Work(handler, 1, 7)
    has_bound = contender.package != "taskiq-pipelines"  # not in memory, as the page says
    map_items = contender.map(task)
    streams = [contender.stream(task, ordered=ordered) for ordered in (True, False)]
    calls = [
        map_items,
        *(open_stream and partial(neighbours.collect, open_stream) for open_stream in streams),
    ]
    for call in filter(None, calls):
        most = 0
        results(call, range(50))
        assert most == (7 if has_bound else 50)


def test_a_neighbour_that_is_not_installed_is_named() -> None:
    class Missing(Neighbour):
        package = "no-such-neighbour"

    contenders, missing = neighbours.find_neighbours([Missing])
    assert [type(each) for each in contenders] == [*BY_HAND, Ours]
    assert missing == ["no-such-neighbour"]


@others
@pytest.mark.parametrize("title", ["by hand", "async-pipeline", *retries.LIBRARIES])
def test_a_guard_tries_again_and_gives_up(title: str) -> None:
    found, _ = retries.find_guards()
    guards = [guard for name, guard in found.items() if title in name]
    if not guards:
        pytest.skip(f"{title} is not installed; the dependency group bench has it")
    calls = 0

    async def broken(value: int) -> int:
        nonlocal calls
        calls += 1
        raise ConnectionError

    for make_handler in retries.HANDLERS.values():
        assert results(retries.contender(guards[0], make_handler()), range(5)) == [1, 2, 3, 4, 5]
    with pytest.raises(Exception):  # noqa: B017, PT011 - each has its own
        results(retries.contender(guards[0], broken), range(1))
    assert calls == retries.ATTEMPTS


def test_a_guard_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LIBRARIES", {"no-such-guard": retries.by_hand})
    assert retries.find_guards()[1] == ["no-such-guard"]


# ---- how they behave


@pytest.mark.usefixtures("virtual")
def test_our_first_result_does_not_wait_for_the_source() -> None:
    first = behaviour.first_result(Ours())
    assert first is not None
    assert first.seconds is not None


@pytest.mark.usefixtures("virtual")
def test_a_window_of_tasks_has_no_result_until_the_source_goes_on() -> None:
    assert behaviour.first_result(Window()) == behaviour.First(None)


@pytest.mark.usefixtures("virtual")
def test_a_slow_item_holds_up_only_what_is_in_order() -> None:
    in_order = behaviour.behind_a_slow_item(Ours(), ordered=True)
    as_finished = behaviour.behind_a_slow_item(Ours(), ordered=False)
    assert in_order is not None
    assert as_finished is not None
    assert in_order.finished == 2 * behaviour.NARROW - 1  # the buffer
    assert as_finished.finished == behaviour.FAST_ITEMS


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("kind", comparison.STOPPED)
def test_we_stop_cleanly(kind: str) -> None:
    stopped = behaviour.stop(Ours(), kind)
    assert stopped is not None
    assert stopped[1:] == behaviour.Stop(0, 0, 0, False, True)[1:]


@pytest.mark.usefixtures("virtual")
def test_a_stop_that_is_not_clean_is_seen() -> None:
    class Careless(Neighbour):
        def map(self, work: Work) -> neighbours.MapItems:
            async def map_items(items: Any) -> list[int]:
                tasks = [asyncio.ensure_future(work.handler(number)) for number in range(CONCURRENCY)]
                assert await anext(items) == 0
                try:
                    await asyncio.sleep(3600)
                finally:
                    tasks[0].cancel()
                    tasks[1].cancel()
                    await asyncio.sleep(0)
                    tasks[1].cancel()
                return []

            return map_items

    assert behaviour.stop(Careless(), "stream") is None
    stopped = behaviour.stop(Careless(), "map")
    assert stopped is not None
    assert stopped[1:] == (1, CONCURRENCY - 2, True, False)


@others
@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("kind", CONTENDERS, ids=lambda kind: kind.__name__)
def test_the_behaviour_of_each_can_be_seen(kind: type[Neighbour], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "peaks", lambda name, *counts: [1000, 2000])
    contender = made(kind)
    seen = comparison.look_at([contender], TINIEST)[contender.title]
    assert seen.memory[1:] == (1000, 2000)
    assert seen.growth is not None
    cells = [page._first(seen), page._beside(seen.in_order), page._stopped(seen.stopped["map"])]
    assert all(cells)


@pytest.mark.parametrize("name", ["Workers", "TaskPerItem", "Ours"])
def test_the_memory_of_a_contender_is_measured(name: str) -> None:
    tenth, whole = memory.peaks(name, 1000, 10_000)
    assert page.is_flat(tenth, whole) == (name != "TaskPerItem")


# ---- the clock


def test_every_contender_is_measured_in_every_round() -> None:
    calls: list[str] = []

    def noting(name: str) -> Contender:
        async def contender(items: object) -> list[int]:
            calls.append(name)
            return []

        return contender

    seconds = measure({"a": noting("a"), "b": noting("b")}, ITEMS, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # a warm-up, and then another one goes first each time
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_the_clock_can_be_another_one() -> None:
    async def contender(items: object) -> list[int]:
        return []

    ticks = iter(range(100))
    assert measure({"a": contender}, ITEMS, 2, lambda: next(ticks)) == {"a": [1, 1]}


def test_a_ratio_is_taken_round_by_round() -> None:
    compared = ratio([3.0, 2.0, 8.0], [1.0, 2.0, 4.0])
    assert compared == Ratio(middle=2.0, least=1.0, most=3.0)
    assert re.findall(r"[\d.]+", str(compared)) == ["2.00", "1.00", "3.00"]


@pytest.mark.parametrize("title", ["map", "stream"])
def test_memory_above_the_results_is_flat(title: str) -> None:
    few, many = peak_bytes(title, 500), peak_bytes(title, 20_000)
    assert 0 < many < 1.5 * few


# ---- the comparison, its page and its picture


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only us and what is written by hand be compared."""
    monkeypatch.setattr(comparison, "find_neighbours", partial(neighbours.find_neighbours, []))
    monkeypatch.setattr(retries, "LIBRARIES", {})
    monkeypatch.setattr(comparison, "peaks", lambda name, *counts: [1000, 2500 if name == "Ours" else 1000])


def cost(micros: float, ours: float = 1.0, ordered: bool = True) -> comparison.Cost:
    times, back = Ratio(micros, micros / 2, micros * 2), Ratio(ours, ours / 2, ours * 2)
    return comparison.Cost(micros, times, back, ordered)


SEEN = comparison.Behaviour(
    [behaviour.First(0.001)],
    [behaviour.Line(19, 0.3)],
    None,
    {"map": [behaviour.Stop(0.01, 0, 0, False, True)], "stream": None},
    comparison.Memory(1000, 2048, 2048),
    comparison.Growth(10, 1000, Ratio(1.0, 0.9, 1.1)),
)


def compared(**changes: Any) -> comparison.Comparison:
    """Return a comparison with a library that is like us, but for the changes of its behaviour."""
    costs = {
        "a loop, by hand": {"trivial": cost(1.0)._replace(ratio=Ratio(1, 1, 1))},
        "**us 1.0**": {"trivial": cost(2.0)},
        "theirs 2.0": {"trivial": cost(4.0, 0.5, ordered=False), "waits 1 ms": cost(2.0, 1.2)},
    }
    seen = {"a loop, by hand": SEEN._replace(first=[behaviour.First(1e-9)]), "**us 1.0**": SEEN}
    seen["theirs 2.0"] = SEEN._replace(**changes)
    return comparison.Comparison(
        TINIEST, ["gone"], dict.fromkeys(comparison.KINDS, costs), {"a loop, by hand": {}}, seen
    )


@pytest.mark.usefixtures("few", "virtual")
def test_the_comparison_is_written_into_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"Before.\n\n{page.BEGIN}\nold\n{page.END}\n\nAfter.\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--page", str(path)])
    monkeypatch.setattr(__main__, "FULL", TINY)
    __main__.main()
    text = path.read_text()
    assert text.startswith(f"Before.\n\n{page.BEGIN}\n\n")
    assert text.endswith(f"\n{page.END}\n\nAfter.\n")
    assert "old" not in text
    for kind in comparison.KINDS:
        assert f"**`{kind}`" in text
    for title in (Ours.title, Workers.title, comparison.LOOP):
        assert f"\n| {title} |" in text
    picture = ElementTree.fromstring(path.with_suffix(".svg").read_text())
    assert picture.get("viewBox")


def test_a_page_without_the_marks_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"{page.BEGIN}\n")
    with pytest.raises(ValueError, match="measured: end"):
        page.write_page(compared(), path)
    assert path.read_text() == f"{page.BEGIN}\n"


def test_the_cells_say_what_was_measured() -> None:
    text = "\n".join(page.lines(compared()))
    assert "Not installed, so left out: gone." in text
    assert "| a loop, by hand | 1.00 | — | — |" in text
    assert f"| **us 1.0** | 2.00, 2.00{TIMES} (1.00 to 4.00) | — | — |" in text
    assert f"| theirs 2.0, as they finish | 4.00, 4.00{TIMES} (2.00 to 8.00) | — | 2.00, " in text
    assert "| **us 1.0** | 1.00 ms | 19, 300 ms | — |" in text
    assert "| **us 1.0** | clean; 10.0 ms | — |" in text
    assert f"| **us 1.0** | 2 KiB for 1,000, flat | 1.00{TIMES} (0.90 to 1.10), 1,000 to 10 |" in text


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (behaviour.Stop(0.01, 0, 0, False, None), "clean; 10.0 ms"),
        (behaviour.Stop(0.01, 2, 0, False, True), "2 tasks still clean up; 10.0 ms"),
        (
            behaviour.Stop(0.01, 1, 3, True, False),
            "3 tasks run on, 1 tasks still clean up, clean-up",
        ),
    ],
)
def test_a_stop_is_told(stop: behaviour.Stop, said: str) -> None:
    assert page._stopped([stop, behaviour.Stop(0.01, 0, 0, False, stop.source_closed)]).startswith(said)


def test_memory_that_grows_is_told_per_item() -> None:
    seen = SEEN._replace(memory=comparison.Memory(10_000, 2**18, 2**21))
    assert page._memory(seen) == "2.0 MiB for 10,000, 210 bytes for each"


def test_a_first_result_that_does_not_come_is_told() -> None:
    seen = SEEN._replace(first=[behaviour.First(0.001), behaviour.First(None)])
    assert page._first(seen) == page.NEVER


def test_nothing_is_lost_to_one_who_is_like_us() -> None:
    assert list(page.lost(compared())) == []
    assert "In this run no other library did better in any row." in list(page.lines(compared()))


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"first": [behaviour.First(0.0001)]}, "first result, ms"),
        ({"in_order": [behaviour.Line(400, 0.2)]}, "a slow item, in order, total ms"),
        ({"memory": comparison.Memory(1000, 1024, 1024)}, "memory, KiB"),
    ],
)
def test_what_is_lost_is_told_with_its_reason(changes: dict[str, Any], row: str) -> None:
    run = compared(**changes)
    assert [each.row for each in page.lost(run)] == [row]
    assert page.unexplained(run) == []
    (line,) = (line for line in page.lines(run) if line.startswith(f"- {row}: theirs 2.0 ("))
    assert page._sentence(page.REASONS[row]) in line


def test_what_is_lost_without_a_reason_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = compared(stopped={"map": [behaviour.Stop(0.001, 0, 0, False, True)], "stream": None})
    run.costs["map"] = {**run.costs["map"], "fast 1.0": {"trivial": cost(1.0, 2.0)}}
    assert [each.row for each in page.unexplained(run)] == ["`map`, trivial", "a clean stop of `map`, ms"]
    monkeypatch.setattr(__main__, "compare", lambda *arguments: run)
    path = tmp_path / "page.md"
    path.write_text(page.BEGIN + page.END)
    __main__._write_page(TINY, path)
    assert "lost without a reason in benchmarks/page.py: `map`, trivial, fast 1.0" in capsys.readouterr().err
    assert page._sentence(page.NO_REASON) in path.read_text()


def test_one_who_leaves_tasks_behind_does_not_stop_better() -> None:
    run = compared(stopped={"map": [behaviour.Stop(0.001, 0, 5, False, True)], "stream": None})
    assert list(page.lost(run)) == []


def test_the_picture_has_a_mark_for_each_cost() -> None:
    picture = ElementTree.fromstring(plot.draw(compared()))
    marks = [each for each in picture.iter() if each.tag.endswith("title") and ": " in (each.text or "")]
    assert len(marks) == 4 * len(comparison.KINDS)
    xs = [float(each.attrib["cx"]) for each in picture.iter() if "cx" in each.attrib]
    assert all(plot.NAMES <= x <= plot.WIDTH for x in xs[1:])
    assert xs[1] < xs[2] < xs[3]  # 1, 2 and 4 times
    bands = [float(each.attrib["y"]) for each in picture.iter() if each.get("class") == "band"]
    circle = next(
        each for each in picture.iter() if each.get("class") == "m0" and each.get("cx", "") == f"{xs[1]:.1f}"
    )
    assert bands[0] < float(circle.attrib["cy"]) < bands[0] + plot.ROW / 2  # above the middle of its row


def test_the_scale_is_logarithmic() -> None:
    scale = plot.Scale([cost(1.0), cost(100.0)])
    assert scale.x(10) - scale.x(1) == pytest.approx(scale.x(100) - scale.x(10))
    assert set(scale.ticks()) >= {1, 3, 10, 30, 100}


def test_a_contender_with_other_results_is_refused() -> None:
    async def wrong(items: Any) -> list[int]:
        return [0 for _ in items]

    with pytest.raises(AssertionError, match="theirs has other results"):
        comparison.check("theirs", comparison.Call(wrong, 3, True))


def test_an_order_that_is_kept_is_checked() -> None:
    async def backwards(items: Any) -> list[int]:
        return [item + STAGES for item in reversed(items)]

    comparison.check("theirs", comparison.Call(backwards, 3, False))
    with pytest.raises(AssertionError, match="other results"):
        comparison.check("theirs", comparison.Call(backwards, 3, True))


def test_the_page_of_the_documentation_holds_a_run() -> None:
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    measured = text.split(page.BEGIN)[1].split(page.END)[0]
    for kind in CONTENDERS:
        assert (kind.package or Workers.title) in measured
    for package in retries.LIBRARIES:
        assert f"\n| {package} " in measured
    assert page.NO_REASON not in measured.lower()
    picture = (ROOT / "docs" / "comparison.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    for cell in re.findall(rf"[\d.]+{TIMES} \(.*?\)", measured.split("A guarded call")[0]):
        assert cell in picture, "the picture is of another run"


# ---- the tables


def test_the_tables_hold_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "compare", lambda effort: compared())
    monkeypatch.setattr(engines, "CHUNK_SIZES", (10,))
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setattr(tables, "peak_bytes", lambda title, count: 1024 * count)
    report = list(tables.write_tables(TINY, ""))
    for row in tables.ROWS:
        assert any(row.title in line and row.limit_title in line for line in report)
    assert any(line.startswith("| `stream`, KiB above the results | 20 | 60 | +40 KiB |") for line in report)
    assert any(line.startswith("| theirs 2.0") for line in report)


def test_only_the_rows_that_are_asked_for_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tables.md"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--only", "hooks", "--write", str(path)])
    monkeypatch.setattr(__main__, "QUICK", TINY)
    __main__.main()
    report = path.read_text()
    assert "hooks" in report
    assert "`stream`, the same work" not in report
    assert "Other libraries" not in report


async def test_each_request_to_fastapi_does_the_same_work() -> None:
    async with in_fastapi.jobs as jobs:
        answers = {name: await send() for name, send in in_fastapi.REQUESTS.items()}
        (job,) = await jobs.list(limit=1)
        async for changed in jobs.watch(job.id):
            job = changed
    accepted = answers.pop("submit")
    assert set(answers.values()) == {(200, b"6")}
    assert accepted[0] == 201
    assert job.result["outputs"] == {"result": 6}


async def test_a_contender_in_fastapi_answers_each_request() -> None:
    assert await in_fastapi.contender("execution")(range(3)) == [200] * 3
    assert await in_fastapi.contender("submit")(range(3)) == [201] * 3


@pytest.mark.parametrize("case", journal.CASES, ids=lambda case: case.title)
def test_the_cost_of_a_journal_is_measured(case: journal.Case) -> None:
    cost = journal.costs(case, 200, 1)
    assert cost.micros > 0
    assert cost.held > 0


@pytest.mark.parametrize("chunk_size", [1, 10])
def test_the_cost_of_an_engine_is_measured(chunk_size: int) -> None:
    engine = partial(engines.over_taskiq, InMemoryBroker())
    assert engines.micros(engines.Case("in memory", engine, chunk_size), 20, 1) > 0
