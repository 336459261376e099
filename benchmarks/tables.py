"""Which contenders meet in which row, and the Markdown that becomes of it."""

import platform
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from async_pipeline import __version__

from . import by_hand, comparison, page, work
from .comparison import compare
from .measure import TIMES, measure, micros_per_item, ratio
from .memory import peak_bytes
from .work import Contender, one_by_one


class Effort(NamedTuple):
    """How much to measure."""

    runs: int  # of one value, per round
    items: int  # of a batch, per round
    rounds: int
    few_rounds: int  # of what takes long
    counts: Sequence[int]  # of items, for cost and memory
    count_rounds: int
    comparison: comparison.Effort


FULL = Effort(10_000, 5_000, 25, 5, (1_000, 10_000, 100_000, 1_000_000), 3, comparison.FULL)
QUICK = Effort(500, 300, 5, 3, (1_000, 5_000), 1, comparison.QUICK)
NEIGHBOURS = "neighbours"


class Row(NamedTuple):
    """One comparison with hand-written asyncio, and the ratio that must be reached."""

    title: str
    limit_title: str
    ours: Contender
    limit: Contender
    reach: float
    is_batch: bool


ROWS = (
    Row(
        "`run`, 5 plain async stages", "`for handler in handlers: value = await handler(value)`",
        one_by_one(work.run_plain), one_by_one(by_hand.run_plain), 1.5, False,
    ),
    Row(
        "`run`, 5 plain sync stages", "the same loop with calls",
        one_by_one(work.run_sync), one_by_one(by_hand.run_sync), 2.3, False,
    ),
    Row(
        "`run`, sync before and after hooks", "the loop with the two calls",
        one_by_one(work.run_hooked), one_by_one(by_hand.run_hooked), 1.7, False,
    ),
    Row(
        "`run`, 5 stages with timeout", "the loop with `async with asyncio.timeout`",
        one_by_one(work.run_timeout), one_by_one(by_hand.run_timeout), 1.2, False,
    ),
    Row(
        "`map`, 5 stages that suspend", "`TaskGroup` and `Semaphore`, a task per item",
        work.map_items, by_hand.task_per_item, 0.6, True,
    ),
    Row(
        "`map`, 5 stages that suspend", "pool of 50 workers, no isolation",
        work.map_items, by_hand.pool, 1.3, True,
    ),
    Row(
        "`stream`, the same work", "the same pool",
        work.stream_items, by_hand.pool, 1.4, True,
    ),
)  # fmt: skip


_OBSERVED: dict[str, tuple[Callable[[int], object], dict[str, int]]] = {
    "plain async": (work.plain, {}),
    "plain sync": (work.sync, {}),
    "with retries": (work.plain, {"retries": 2}),
}

_GROWING = {
    "`map`": work.map_items,
    "`stream`": work.stream_items,
    "`each`": work.each_items,
    "pool by hand": by_hand.pool,
}


def write_tables(effort: Effort, only: str) -> Iterator[str]:
    """Yield the lines of the report as they are measured; ``only`` picks the rows that contain it."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield f"## async-pipeline {__version__} on {python}"
    yield ""
    yield f"{platform.system()} {platform.machine()}. Medians of {effort.rounds} interleaved rounds; in"
    yield "brackets, the smallest and the largest ratio of a round. Below 1 we are the faster ones."
    yield ""
    yield from _limits(effort, only)
    yield from _events(effort, only)
    yield from _in_fastapi(effort, only)
    yield from _with_journal(effort, only)
    yield from _over_workers(effort, only)
    yield from _neighbours(effort, only)
    yield from _growth(effort, only)


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*cells: str) -> Iterator[str]:
    yield _line(*cells)
    yield _line(*("---" for _ in cells))


def _limits(effort: Effort, only: str) -> Iterator[str]:
    rows = [row for row in ROWS if only in row.title]
    if not rows:
        return
    yield from _head("work", "against", "by hand, µs", "ours, µs", "ratio", "reach")
    for row in rows:
        count = effort.items if row.is_batch else effort.runs
        seconds = measure({"ours": row.ours, "limit": row.limit}, range(count), effort.rounds)
        micros = [f"{micros_per_item(seconds[name], count):.2f}" for name in ("limit", "ours")]
        compared = ratio(seconds["ours"], seconds["limit"])
        yield _line(row.title, row.limit_title, *micros, compared, f"≤ {row.reach}{TIMES}")
    yield ""


def _events(effort: Effort, only: str) -> Iterator[str]:
    if only not in "`observers`":
        return
    yield "What two events of a stage cost, for one observer that does nothing (without those of the run):"
    yield ""
    yield from _head("stage", "two events, µs", "reach")
    runs = range(max(1, effort.runs // 10))
    for title, (handler, options) in _OBSERVED.items():
        contenders = {
            "observed": work.observed(handler, **options),
            "more observed": work.observed(handler, work.MORE_STAGES, **options),
            "unobserved": work.unobserved(handler, **options),
            "more unobserved": work.unobserved(handler, work.MORE_STAGES, **options),
        }
        seconds = measure(contenders, runs, effort.rounds)
        micros = {name: micros_per_item(each, len(runs)) for name, each in seconds.items()}
        observed = micros["more observed"] - micros["observed"]
        cost = (observed - micros["more unobserved"] + micros["unobserved"]) / work.MORE_STAGES
        yield _line(title, f"{cost:.2f}", "≤ 1.5")
    yield ""


def _in_fastapi(effort: Effort, only: str) -> Iterator[str]:
    if only not in "FastAPI":
        return
    from . import in_fastapi

    yield "What a request costs more in FastAPI, in one process and without sockets:"
    yield ""
    yield from _head("request", "against", "µs more", "reach")
    requests = range(max(1, effort.runs // 25))
    contenders = {name: in_fastapi.contender(name) for name in in_fastapi.REQUESTS}
    seconds = measure(contenders, requests, effort.rounds)
    micros = {name: micros_per_item(each, len(requests)) for name, each in seconds.items()}
    for title, (ours, against, reach) in in_fastapi.CLOSE_TO_HAND.items():
        yield _line(title, against, f"{micros[ours] - micros[against]:.0f}", f"≤ {reach}")
    yield ""


def _with_journal(effort: Effort, only: str) -> Iterator[str]:
    if only not in "`map` with a journal":
        return
    from . import journal

    yield f"What a journal costs at a concurrency of {journal.CONCURRENCY}, with a handler that does nothing,"
    yield f"by the time of day ({effort.few_rounds} rounds), and how long the event loop is held up at"
    yield "the worst:"
    yield ""
    yield from _head("work", "µs per item", "reach", "held up, ms", "reach")
    for case in journal.CASES:
        cost = journal.costs(case, effort.items * 4, effort.few_rounds)
        yield _line(
            case.title, f"{cost.micros:.1f}", f"≤ {case.reach}", f"{cost.held:.1f}", f"≤ {journal.MOST_HELD}"
        )
    yield ""


def _over_workers(effort: Effort, only: str) -> Iterator[str]:
    if only not in "`map` with an engine":
        return
    from . import engines

    yield "What `map` costs per item with an engine, by the time of day, with a handler that does nothing"
    yield f"({effort.few_rounds} rounds); with a `REDIS_URL` over taskiq's workers, too:"
    yield ""
    yield from _head("`map` with an engine", "items in a chunk", "µs per item", "reach")
    with engines.cases() as cases:
        for case in cases:
            count = effort.items * (case.chunk_size + 1) // 8
            cost = engines.micros(case, count, effort.few_rounds)
            reach = engines.REACH.get((case.title, case.chunk_size))
            yield _line(case.title, str(case.chunk_size), f"{cost:.1f}", f"≤ {reach}" if reach else "")
    yield ""


def _neighbours(effort: Effort, only: str) -> Iterator[str]:
    if only not in NEIGHBOURS:
        return
    yield "Other libraries, and what is written by hand:"
    yield ""
    yield from page.lines(compare(effort.comparison))


def _growth(effort: Effort, only: str) -> Iterator[str]:
    costs = {title: each for title, each in _GROWING.items() if only in title}
    if not costs:
        return
    counts = [f"{count:,} items" for count in effort.counts]
    yield f"As the number of items grows ({effort.count_rounds} rounds; memory by `tracemalloc`, lazy items):"
    yield ""
    yield from _head("work", *counts, "last / first", "reach")
    for title, contender in costs.items():
        yield _cost_line(effort, title, contender)
    for title in ("map", "stream"):
        if only in f"`{title}`":
            yield _memory_line(effort, title)


def _cost_line(effort: Effort, title: str, contender: Contender) -> str:
    least = (
        effort.counts[-1] // 10
    )  # items per round, so that a thousand are not over before they can be timed
    repeats = {count: max(1, least // count) for count in effort.counts}
    batches = {str(count): _repeated(contender, count, times) for count, times in repeats.items()}
    seconds = measure(batches, (), effort.count_rounds)
    costs = {
        count: [each / (count * times) for each in seconds[str(count)]] for count, times in repeats.items()
    }
    shown = (f"{micros_per_item(each, 1):.2f}" for each in costs.values())
    growth = ratio(costs[effort.counts[-1]], costs[effort.counts[0]])
    return _line(f"{title}, µs per item", *shown, growth, f"≤ 1.15{TIMES}")


def _repeated(contender: Contender, count: int, times: int) -> Contender:
    async def repeated(items: Sequence[int]) -> list[int]:
        for _ in range(times):
            await contender(range(count))
        return []

    return repeated


def _memory_line(effort: Effort, title: str) -> str:
    peaks = [peak_bytes(title, count) / 1024 for count in effort.counts]
    return _line(
        f"`{title}`, KiB above the results", *(f"{peak:,.0f}" for peak in peaks),
        f"{peaks[-1] - peaks[0]:+,.0f} KiB", "flat",
    )  # fmt: skip
