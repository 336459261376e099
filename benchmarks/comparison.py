"""Measures all contenders in one run; ``page.py`` makes Markdown of it, ``plot.py`` a picture.

Contenders meet in interleaved rounds, and every result is checked before anything is measured. Work that
never waits is measured in CPU time, work that waits by the time of day.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from . import behaviour, retries
from .measure import Ratio, clock, measure, micros_per_item, ratio
from .memory import peaks
from .neighbours import Handler, Neighbour, Window, Work, Workers, collect, find_neighbours
from .work import CONCURRENCY, STAGES, Contender, one_by_one, plain, suspending

SHORT_OF_MOST = 50  # a round has at most this part of the items that a contender is given in all


async def waiting(value: int) -> int:
    await asyncio.sleep(0.001)
    return value + 1


WAITS = "waits 1 ms"
HANDLERS: dict[str, Handler] = {"trivial": plain, "suspends": suspending, WAITS: waiting}
KINDS: dict[str, type[Neighbour]] = {"run": Workers, "map": Workers, "stream": Window}
"""What is measured, and what by hand it is compared with."""

STOPPED = ("map", "stream")
LOOKS: dict[str, Callable[[Neighbour], Any]] = {
    "first": behaviour.first_result,
    "in_order": partial(behaviour.behind_a_slow_item, ordered=True),
    "as_finished": partial(behaviour.behind_a_slow_item, ordered=False),
    **{kind: partial(behaviour.stop, kind=kind) for kind in STOPPED},
}
LOOP = "a loop, by hand"


class Effort(NamedTuple):
    """How much to measure."""

    rounds: int
    runs: int  # of one value, per round
    items: int  # of a batch, per round
    few: int  # items of a small batch
    many: int  # items of a large batch
    lazy: int  # items of a lazy source
    times: int  # of what takes its time


FULL = Effort(11, 2_000, 2_000, 1_000, 100_000, 1_000_000, 5)
QUICK = Effort(2, 80, 60, 60, 120, 2_000, 1)


class Cost(NamedTuple):
    """What one item costs a contender."""

    micros: float
    ratio: Ratio  # to what is written by hand
    ours: Ratio  # our time for the same, to its own
    is_ordered: bool


Costs = dict[str, dict[str, Cost]]
"""By the contender's title and the handler's name."""


class Memory(NamedTuple):
    """The peak, in bytes, of a lazy source."""

    items: int
    of_a_tenth: int
    peak: int


class Growth(NamedTuple):
    """What an item of a large batch costs, compared with one of a small one."""

    few: int
    many: int
    ratio: Ratio


class Behaviour(NamedTuple):
    """The rest of what is known of a contender; ``None`` for what it has no call for."""

    first: list[behaviour.First] | None
    in_order: list[behaviour.Line] | None
    as_finished: list[behaviour.Line] | None
    stopped: dict[str, list[behaviour.Stop] | None]  # by kind
    memory: Memory
    growth: Growth | None


class Comparison(NamedTuple):
    effort: Effort
    missing: list[str]
    costs: dict[str, Costs]  # by kind
    guards: Costs
    behaviour: dict[str, Behaviour]  # by title


def compare(effort: Effort, report: Callable[[str], None] = lambda line: None) -> Comparison:
    """Measure everything.

    Args:
        effort: how much of it.
        report: is told what is measured next.
    """
    found = find_neighbours()
    costs: dict[str, Costs] = {}
    for kind in KINDS:
        report(f"`{kind}`")
        costs[kind] = compare_costs(kind, found.contenders, effort)
    report("retries")
    guards, missing = compare_guards(effort)
    known = look_at(found.contenders, effort, report)
    return Comparison(effort, sorted({*found.missing, *missing}), costs, guards, known)


# ---- costs


class Call(NamedTuple):
    """What one contender does in a round."""

    contender: Contender
    items: int
    is_ordered: bool
    adds: int = STAGES


def compare_costs(kind: str, contenders: Sequence[Neighbour], effort: Effort) -> Costs:
    """Measure all contenders that can do it, with each of the handlers."""
    costs: Costs = {}
    ordered = sorted(
        contenders, key=lambda each: type(each) is not KINDS[kind]
    )  # what all are compared with first
    for name, handler in HANDLERS.items():
        calls: dict[str, Call] = {}
        for contender in ordered:
            count = _count(kind, handler, contender, effort)
            call = _call(kind, contender, Work(handler, STAGES, CONCURRENCY), count)
            if call is not None:
                calls[LOOP if kind == "run" and type(contender) is Workers else contender.title] = call
        measured = _measure(calls, effort.rounds, waits=handler is waiting)
        for title, cost in costs_of(measured, calls).items():
            costs.setdefault(title, {})[name] = cost
    return costs


def _count(kind: str, handler: Handler, contender: Neighbour, effort: Effort) -> int:
    wanted = effort.items if kind != "run" else effort.runs // 40 if handler is waiting else effort.runs
    return max(2, min(wanted, contender.most_items // SHORT_OF_MOST))


def _call(kind: str, contender: Neighbour, work: Work, count: int) -> Call | None:
    if kind == "run":
        run = contender.run(work)
        return None if run is None else Call(one_by_one(run), count, True)
    if kind == "map":
        map_items = contender.map(work)
        return None if map_items is None else Call(map_items, count, contender.map_keeps_order)
    ordered = contender.stream(work, ordered=True)
    open_stream = ordered or contender.stream(work, ordered=False)
    return None if open_stream is None else Call(partial(collect, open_stream), count, ordered is not None)


def _measure(calls: dict[str, Call], rounds: int, *, waits: bool) -> dict[str, list[float]]:
    """Return the seconds per item of each, in each round."""
    for title, call in calls.items():
        check(title, call)
    contenders = {title: _over(call.contender, call.items) for title, call in calls.items()}
    seconds = measure(contenders, (), rounds, time.perf_counter if waits else clock)
    return {title: [each / calls[title].items for each in seconds[title]] for title in calls}


def check(title: str, call: Call) -> None:
    """Raise for a contender that does something else."""

    async def main() -> list[int]:
        return await call.contender(range(call.items))

    results = asyncio.run(main())
    if (results if call.is_ordered else sorted(results)) != list(range(call.adds, call.adds + call.items)):
        raise AssertionError(f"{title} has other results")


def _over(contender: Contender, count: int) -> Contender:
    async def over(items: Sequence[int]) -> list[int]:
        return await contender(range(count))

    return over


def costs_of(seconds: dict[str, list[float]], calls: dict[str, Call]) -> dict[str, Cost]:
    """Compare each with the first, which is written by hand, and with us."""
    by_hand = next(iter(seconds))
    ours = next(title for title in seconds if title.startswith("**"))
    return {
        title: Cost(
            micros_per_item(each, 1),
            ratio(each, seconds[by_hand]),
            ratio(seconds[ours], each),
            calls[title].is_ordered,
        )
        for title, each in seconds.items()
    }


def compare_guards(effort: Effort) -> tuple[Costs, list[str]]:
    """Measure what guards against failures, and return also what is not installed."""
    found, missing = retries.find_guards()
    costs: Costs = {}
    for name, make_handler in retries.HANDLERS.items():
        count = max(2, effort.runs // 4)
        calls = {
            title: Call(retries.contender(guard, make_handler()), count, True, 1)
            for title, guard in found.items()
        }
        measured = _measure(calls, effort.rounds, waits=False)
        for title, cost in costs_of(measured, calls).items():
            costs.setdefault(title, {})[name] = cost
    return costs, missing


# ---- behaviour


def look_at(
    contenders: Sequence[Neighbour], effort: Effort, report: Callable[[str], None] = lambda step: None
) -> dict[str, Behaviour]:
    """See how all contenders behave, several times in turn where time counts; by their titles."""
    seen: dict[str, dict[str, list[Any]]] = {each.title: {look: [] for look in LOOKS} for each in contenders}
    for number in range(effort.times):
        report(f"behaviour, round {number + 1}")
        for contender in contenders:
            for name, look in LOOKS.items():
                seen[contender.title][name].append(look(contender))
    known: dict[str, Behaviour] = {}
    for contender in contenders:
        report(f"memory and growth of {contender.title}")
        looks = {name: None if None in each else each for name, each in seen[contender.title].items()}
        stopped = {kind: looks.pop(kind) for kind in STOPPED}
        known[contender.title] = Behaviour(
            **looks, stopped=stopped, memory=_memory(contender, effort), growth=_growth(contender, effort)
        )
    return known


def _memory(contender: Neighbour, effort: Effort) -> Memory:
    count = min(effort.lazy, contender.most_items)
    of_a_tenth, peak = peaks(type(contender).__name__, count // 10, count)
    return Memory(count, of_a_tenth, peak)


def _growth(contender: Neighbour, effort: Effort) -> Growth | None:
    """Compare the cost of an item among many with that among few, of a map, or else of a stream."""
    work = Work(suspending, STAGES, CONCURRENCY)
    call = _call("map", contender, work, 0) or _call("stream", contender, work, 0)
    if call is None:
        return None
    many = min(effort.many, contender.most_items)
    # a few are over before they can be timed, so there are many few
    batches = {str(count): _repeated(call.contender, count, many // count) for count in (effort.few, many)}
    seconds = measure(batches, (), min(3, effort.rounds))
    return Growth(effort.few, many, ratio(seconds[str(many)], seconds[str(effort.few)]))


def _repeated(contender: Contender, count: int, times: int) -> Contender:
    async def repeated(items: Sequence[int]) -> list[int]:
        for _ in range(times):
            await contender(range(count))
        return []

    return repeated
