"""Runs as a page of HTML, for people: how many, how fast, what failed, what was slow."""

import os
from heapq import heappush, heappushpop, nlargest, nsmallest
from itertools import count
from operator import attrgetter
from typing import Any, TypeAlias

from ..errors import StageExecutionError
from ..events import Event
from ._errors import type_of
from ._facts import Facts, Groups, Run, Scale, Tally, Timeline, sample_of
from ._page import page_of
from .trace import write_whole

__all__ = ["ReportRecorder"]

# what keeps it small, however long it records
_PARTS = 200  # pipelines and stages
_SAMPLES = 3  # of each group
_SLOWEST = 20  # runs


class ReportRecorder:
    """An observer that sums up runs, and writes them as one page of HTML.

    >>> recorder = ReportRecorder()
    >>> pipeline = Pipeline(stages, name="orders", observers=[recorder])
    >>> await pipeline.map(orders, return_exceptions=True)
    >>> recorder.write("orders.html", pipeline)

    The page shows throughput over time, outcomes and latencies of each stage, errors and retries by stage and
    type, with the first items that met them, and the slowest runs as waterfalls. It needs no network and no
    script, and is safe to open whatever stands in names, messages and items; but these are on it, so mind who
    may read it.

    It takes the same small memory for a thousand runs and for a million: latencies are kept in buckets, so
    that a percentile is within 1 % of the exact one, and of what may be many there are samples; the page says
    where. One recorder may observe several pipelines, but not one inside another, whose runs would count
    twice. It holds no lock; event loops in several threads want one each.
    """

    def __init__(self) -> None:
        self._parts: dict[_PartKey, Tally] = {}
        self._others = Tally("", "")  # all that came when there were enough of them
        self._total = Tally("", None)  # all runs
        self._running: dict[str, Run] = {}
        self._slowest: list[tuple[float, int, Run]] = []  # a heap
        self._numbers = count()
        self._timeline = Timeline()
        self._errors = Groups()
        self._retries = Groups()
        self._begin = self._now = self._shift = 0.0

    def __call__(self, event: Event) -> None:
        now = event.time + self._shift
        if now < self._now:  # by another loop's clock: its events follow those of the loop before
            self._shift += self._now - now
            now = self._now
        self._now = now
        kind = event.kind
        if kind == "stage_end":
            self._end_stage(event, now)
        elif kind == "stage_start":
            self._part(event).started += 1
            run = self._running.get(event.run_id)
            if run is not None:
                run.open[event.stage or "", event.element] = now
        elif kind == "run_start":
            self._start_run(event, now)
        elif kind == "run_end":
            self._end_run(event, now)
        elif event.will_retry:
            self._retry(event)

    def write(self, path: str | os.PathLike[str], pipeline: Any = None) -> None:
        """Write the page; at any time, also during a run.

        The file is replaced as a whole, so that nobody reads a half of it.

        Args:
            path: the file's.
            pipeline: the pipeline, or any other step, whose picture is to be on the page; none by default.

        Raises:
            TypeError: ``pipeline`` is no step.
            OSError: it can't be written.
        """
        if pipeline is not None and not isinstance(getattr(pipeline, "name", None), str):
            raise TypeError(f"pipeline must be a pipeline or another step, not {pipeline!r}")
        write_whole(path, page_of(self._facts(), pipeline))

    def _facts(self) -> Facts:
        now = self._now
        running = nsmallest(_SLOWEST, self._running.values(), key=attrgetter("began"))
        runs = [run for _, _, run in self._slowest] + [run.seen_at(now) for run in running]
        return Facts(
            seconds=now - self._begin,
            total=self._total,
            parts=[*self._parts.values()],
            others=self._others,
            scale=Scale.of(part.latencies for part in (*self._parts.values(), self._others)),
            timeline=self._timeline,
            errors=self._errors,
            retries=self._retries,
            slowest=nlargest(_SLOWEST, runs, key=attrgetter("duration")),
        )

    def _part(self, event: Event) -> Tally:
        return self._parts.get((event.pipeline, event.stage)) or self._new_part(event.pipeline, event.stage)

    def _new_part(self, pipeline: str, stage: str | None) -> Tally:
        if not self._parts:
            self._begin = self._now
        if len(self._parts) >= _PARTS:
            return self._others
        part = self._parts[pipeline, stage] = Tally(pipeline, stage)
        return part

    def _start_run(self, event: Event, now: float) -> None:
        self._total.started += 1
        self._part(event).started += 1
        self._running[event.run_id] = Run(event.run_id, event.pipeline, event.item_index, now)

    def _end_stage(self, event: Event, now: float) -> None:
        self._part(event).end(event)
        run = self._running.get(event.run_id)
        if run is not None:
            run.end_stage(event, now)

    def _end_run(self, event: Event, now: float) -> None:
        self._total.end(event)
        self._part(event).end(event)
        self._timeline.add(now - self._begin, event.outcome or "")
        run = self._running.pop(event.run_id, None)
        if run is not None:
            run.end(event, now)
            self._rank(run)
        if event.outcome in ("error", "timeout"):
            self._fail(event)

    def _rank(self, run: Run) -> None:
        ranked = (run.duration, next(self._numbers), run)
        if len(self._slowest) < _SLOWEST:
            heappush(self._slowest, ranked)
        elif run.duration > self._slowest[0][0]:
            heappushpop(self._slowest, ranked)

    def _fail(self, event: Event) -> None:
        error = event.error
        stage = error.stage_name if isinstance(error, StageExecutionError) else None
        group = self._errors.add(event.pipeline, stage, type_of(error))
        if group is not None and len(group.samples) < _SAMPLES:
            group.samples.append(sample_of(error, event))

    def _retry(self, event: Event) -> None:
        self._total.retries += 1
        self._part(event).retries += 1
        group = self._retries.add(event.pipeline, event.stage, type_of(event.error))
        if group is not None:
            group.waited += event.delay or 0.0
            if len(group.samples) < _SAMPLES:
                group.samples.append(sample_of(event.error, event))


_PartKey: TypeAlias = tuple[str, str | None]
