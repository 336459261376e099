"""Makes Markdown of a comparison, and puts it, with its picture, into the page of the documentation."""

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .behaviour import FAST_ITEMS, Line, Stop
from .comparison import HANDLERS, KINDS, STOPPED, WAITS, Behaviour, Comparison, Cost, Costs
from .measure import TIMES
from .plot import draw
from .retries import HANDLERS as GUARDED
from .work import CONCURRENCY, STAGES

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NEVER = "none until the source goes on"
LEVEL = 1.05  # costs that differ by less are the same
LOOSE_LEVEL = 1.25  # and what is measured by the time of day

REASONS: dict[str, str] = {
    "`map`, waits 1 ms": (
        "taskiq's broker in memory has no bound, so all items wait at the same time, and ours 50 at a time"
    ),
    "first result, ms": "our stream first starts a task that waits for the source, and workers",
    "a slow item, in order, total ms": (
        "results that wait for the slow one fill the buffer, by default twice the concurrency; with "
        "`buffer=400` all others finish beside it"
    ),
    "memory, KiB": (
        "each of our workers has a task and a context of its own, and results of up to twice the concurrency "
        "may wait for their turn; it is the same for few items and for many"
    ),
}
"""Why others are better, by the row; the page must have a reason for each that is lost."""

NO_REASON = "the reason is not known yet"


class Lost(NamedTuple):
    """A row in which a library does better than we."""

    row: str
    who: str
    by: str


def write_page(comparison: Comparison, page: Path) -> None:
    """Replace what the page says of the last run, and the picture beside it.

    Raises:
        ValueError: the page lacks one of the two marks between which it stands.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must have the lines {BEGIN} and {END}")
    measured = "\n".join(lines(comparison))
    page.write_text(f"{before}{begin}\n\n{measured}\n{end}{after}", encoding="utf-8")
    page.with_suffix(".svg").write_text(draw(comparison), encoding="utf-8")


def lines(comparison: Comparison) -> Iterator[str]:
    """Yield the tables, and what they say of us."""
    effort = comparison.effort
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield f"{python} on {platform.system()} {platform.machine()}. Costs are medians of {effort.rounds}"
    yield (
        f"interleaved rounds, the others of {effort.times}, growth of {min(3, effort.rounds)}; memory is "
        "measured once. In brackets stand the smallest and the largest."
    )
    yield "A ratio is to the first line of its table, in the same round."
    if comparison.missing:
        yield f"Not installed, so left out: {', '.join(comparison.missing)}."
    yield ""
    for kind in KINDS:
        yield from _costs(_TITLES[kind], comparison.costs[kind], list(HANDLERS))
    yield from _costs("A guarded call: at most four attempts, no delay", comparison.guards, list(GUARDED))
    yield from _behaviour(comparison)
    yield from _lost_rows(comparison)


_TITLES = {
    "run": f"`run`: one value through {STAGES} stages",
    "map": f"`map`: {STAGES} stages for each item, {CONCURRENCY} items at a time, a list of results",
    "stream": "`stream`: the same, results one by one",
}


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(title: str, heads: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"**{title}**"
    yield ""
    yield _line("", *heads)
    yield _line(*("---" for _ in range(len(heads) + 1)))
    for row in rows:
        yield _line(*row)
    yield ""


# ---- costs


def _costs(title: str, costs: Costs, handlers: Sequence[str]) -> Iterator[str]:
    heads = [f"{handler}, µs" for handler in handlers]
    rows = (
        (_called(name, each), *(_cost(each.get(handler)) for handler in handlers))
        for name, each in costs.items()
    )
    return _table(title, heads, rows)


def _called(name: str, costs: dict[str, Cost]) -> str:
    return name if all(cost.is_ordered for cost in costs.values()) else f"{name}, as they finish"


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return "—"
    ratio = "" if cost.ratio.least == cost.ratio.most == 1 else f", {cost.ratio}"
    return f"{number(cost.micros)}{ratio}"


def number(value: float) -> str:
    """Write a number with as many digits as one can make use of."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ---- behaviour


def _behaviour(comparison: Comparison) -> Iterator[str]:
    known = comparison.behaviour
    yield from _table(
        f"When results come: of a source that yields one item and then waits; and beside one item that takes "
        f"0.2 s, among {FAST_ITEMS} that take 1 ms, ten at a time",
        ("first result", "others finished beside it, total: in order", "as they finish"),
        (
            (name, _first(each), _beside(each.in_order), _beside(each.as_finished))
            for name, each in known.items()
        ),
    )
    yield from _table(
        f"When a call is cancelled whose {CONCURRENCY} items each need 10 ms to clean up",
        [f"`{kind}`" for kind in STOPPED],
        ((name, *(_stopped(each.stopped[kind]) for kind in STOPPED)) for name, each in known.items()),
    )
    yield from _table(
        "When items grow many",
        ("memory of a lazy source", "cost of an item, many to few"),
        ((name, _memory(each), _growth(each)) for name, each in known.items()),
    )


def _spread(values: Sequence[float], unit: str) -> str:
    if len(values) == 1:
        return f"{number(values[0])} {unit}"
    return f"{number(median(values))} {unit} ({number(min(values))} to {number(max(values))})"


def _first(each: Behaviour) -> str:
    if each.first is None:
        return "—"
    seconds = [first.seconds for first in each.first if first.seconds is not None]
    return _spread([1e3 * one for one in seconds], "ms") if len(seconds) == len(each.first) else NEVER


def _beside(seen: list[Line] | None) -> str:
    if seen is None:
        return "—"
    finished = median(line.finished for line in seen)
    return f"{finished:.0f}, {_spread([1e3 * line.seconds for line in seen], 'ms')}"


def _stopped(seen: list[Stop] | None) -> str:
    if seen is None:
        return "—"
    worst = max(seen, key=lambda stop: (stop.left, stop.cleaning, stop.is_cut_short))
    faults = [
        f"{worst.left} tasks run on" if worst.left else "",
        f"{worst.cleaning} tasks still clean up" if worst.cleaning else "",
        "clean-up is cut short" if worst.is_cut_short else "",
        "source left open" if worst.source_closed is False else "",
    ]
    said = ", ".join(filter(None, faults)) or "clean"
    return f"{said}; {_spread([1e3 * stop.seconds for stop in seen], 'ms')}"


def _memory(each: Behaviour) -> str:
    count, tenth, peak = each.memory
    if is_flat(tenth, peak):
        return f"{peak / 1024:,.0f} KiB for {count:,}, flat"
    return f"{peak / 2**20:,.1f} MiB for {count:,}, {peak / count:,.0f} bytes for each"


def is_flat(of_a_tenth: int, peak: int) -> bool:
    """Tell whether ten times the items need the same memory."""
    return peak < 2 * of_a_tenth


def _growth(each: Behaviour) -> str:
    if each.growth is None:
        return "—"
    few, many, ratio = each.growth
    return f"{ratio}, {many:,} to {few:,}"


# ---- what we lose


def _lost_rows(comparison: Comparison) -> Iterator[str]:
    rows = list(lost(comparison))
    if not rows:
        yield "In this run no other library did better in any row."
        yield ""
        return
    yield "Where other libraries did better in this run (by more than 5 %, by the time of day 25 %):"
    yield ""
    for row in dict.fromkeys(each.row for each in rows):
        names = ", ".join(f"{each.who} {each.by}" for each in rows if each.row == row)
        yield f"- {row}: {names}. {_sentence(REASONS.get(row, NO_REASON))}"
    yield ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def unexplained(comparison: Comparison) -> list[Lost]:
    """Return the rows that we lose without a reason on the page."""
    return [each for each in lost(comparison) if each.row not in REASONS]


def lost(comparison: Comparison) -> Iterator[Lost]:
    """Yield the rows in which a library did better than we; what is written by hand is the limit."""
    for kind in KINDS:
        yield from _lost_costs(f"`{kind}`", comparison.costs[kind])
    yield from _lost_costs("a guarded call", comparison.guards)
    libraries = {name: each for name, each in comparison.behaviour.items() if _is_library(name)}
    ours = comparison.behaviour[_ours(comparison.behaviour)]
    for row, figure in _FIGURES.items():
        mine = figure(ours)
        for name, each in libraries.items():
            theirs = figure(each)
            if mine is not None and theirs is not None and mine > theirs * LOOSE_LEVEL:
                yield Lost(row, name, f"({number(theirs)} to our {number(mine)})")


def _lost_costs(title: str, costs: Costs) -> Iterator[Lost]:
    for name, each in costs.items():
        for handler, cost in each.items():
            level = LOOSE_LEVEL if handler == WAITS else LEVEL
            if _is_library(name) and cost.ours.middle > level:
                yield Lost(f"{title}, {handler}", name, f"({cost.ours.middle:.2f}{TIMES} as fast)")


def _ours(names: dict[str, Behaviour]) -> str:
    return next(name for name in names if name.startswith("**"))


def _is_library(name: str) -> bool:
    return not name.startswith("**") and not name.endswith("by hand")


def _middle(values: Sequence[float | None]) -> float | None:
    known = [1e3 * value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) else None


def _clean(seen: list[Stop] | None) -> float | None:
    """The milliseconds of a stop; none where something is left."""
    is_clean = seen is not None and "clean;" in _stopped(seen)
    return _middle([stop.seconds for stop in seen or ()]) if is_clean else None


_FIGURES: dict[str, Callable[[Behaviour], float | None]] = {
    "first result, ms": lambda each: _middle([first.seconds for first in each.first or ()]),
    "a slow item, in order, total ms": lambda each: _middle([line.seconds for line in each.in_order or ()]),
    "a slow item, as they finish, total ms": lambda each: _middle(
        [line.seconds for line in each.as_finished or ()]
    ),
    "a clean stop of `map`, ms": lambda each: _clean(each.stopped["map"]),
    "a clean stop of `stream`, ms": lambda each: _clean(each.stopped["stream"]),
    "memory, KiB": lambda each: each.memory.peak / 1024 if is_flat(*each.memory[1:]) else None,
}
