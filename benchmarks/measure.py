"""The clock. Whatever is compared is measured here, the same way and in the same rounds."""

import asyncio
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from .work import Contender

TIMES = "\N{MULTIPLICATION SIGN}"

# most of it never waits, so CPU time is the time, and leaves out that of other programs; where it is counted
# in steps that are too coarse, as on Windows, the time of day has to do
_is_fine = time.get_clock_info("process_time").resolution < 1e-5
clock = time.process_time if _is_fine else time.perf_counter


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and the smallest and largest of them."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        digits = 2 if self.middle < 10 else 0
        return f"{self.middle:.{digits}f}{TIMES} ({self.least:.{digits}f} to {self.most:.{digits}f})"


def measure(
    contenders: Mapping[str, Contender],
    items: Sequence[int],
    rounds: int,
    clock: Callable[[], float] = clock,
) -> dict[str, list[float]]:
    """Return each contender's seconds in each round; all run once before the first round, to warm up.

    Args:
        contenders: the calls to compare, by name.
        items: what each of them gets.
        rounds: how often each of them runs.
        clock: whose seconds count; of work that waits, ``time.perf_counter``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.freeze()  # what the imports left is not to be traversed in anybody's time
    try:
        for contender in contenders.values():
            _seconds(contender, items, clock)
        gc.freeze()
        for _ in range(rounds):
            for name in names:
                seconds[name].append(_seconds(contenders[name], items, clock))
            names.append(names.pop(0))  # another one goes first
    finally:
        gc.unfreeze()
    return seconds


def _seconds(contender: Contender, items: Sequence[int], clock: Callable[[], float]) -> float:
    gc.collect()  # nobody pays for what another one left; the collector stays on, as in any program
    with asyncio.Runner() as runner:
        return runner.run(_timed(contender, items, clock))


async def _timed(contender: Contender, items: Sequence[int], clock: Callable[[], float]) -> float:
    started = clock()
    await contender(items)
    return clock() - started


def ratio(seconds: Sequence[float], limit: Sequence[float]) -> Ratio:
    """Compare two contenders round by round."""
    ratios = [ours / theirs for ours, theirs in zip(seconds, limit, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def micros_per_item(seconds: Sequence[float], count: int) -> float:
    return median(seconds) / count * 1e6
