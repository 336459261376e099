"""Runs as a trace that Perfetto and Chrome open."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeAlias

from ..events import Event
from ..retry import check_count
from ._errors import type_of

__all__ = ["TraceRecorder", "write_whole"]


class TraceRecorder:
    """An observer that writes runs as a trace, to be looked at in https://ui.perfetto.dev.

    >>> recorder = TraceRecorder()
    >>> await Pipeline(stages, name="orders", observers=[recorder]).map(orders)
    >>> recorder.write("orders.json")                # open it there, or in chrome://tracing; nothing is sent

    A pipeline is a process there, and its threads are lanes: each item in flight has one, which another item
    takes over later. On it are a slice for the run, a slice for each stage, and a mark for each failed
    attempt; what runs side by side inside the item has further lanes below it. A slice tells its ``outcome``,
    ``attempts``, ``item_index``, ``element`` and the type of its ``error``, as far as it has them.

    One recorder may observe several pipelines. It holds no lock; event loops in several threads want one
    each.

    Args:
        limit: how many slices and marks it keeps, at some 350 bytes each; a million by default. What begins
            later is only counted, and the file says how much it was.

    Attributes:
        left_out: how many slices and marks were only counted so far.

    Raises:
        TypeError, ValueError: at construction, for a wrong limit.
    """

    def __init__(self, limit: int = 1_000_000) -> None:
        check_count("limit", limit, least=1, message="limit must be at least 1")
        self.left_out: int = 0
        self._limit = limit
        self._kept: list[_Slice | _Mark] = []  # as they began: of two at the same time, the outer one first
        self._open: dict[_Key, list[_Slice]] = {}
        self._ids = count(1)  # viewers look up a thread by its id alone, so no two ids are equal
        self._processes: dict[str, _Process] = {}
        self._now = self._shift = 0  # nanoseconds

    def __call__(self, event: Event) -> None:
        now = round(event.time * 1e9) + self._shift
        if now < self._now:  # by another loop's clock: its events follow those of the loop before
            self._shift += self._now - now
        self._now = max(now, self._now)
        if event.kind in ("run_end", "stage_end"):
            self._end(event)
        elif len(self._kept) >= self._limit:
            self.left_out += 1
        elif event.kind == "attempt_failed":
            self._mark(event)
        else:
            self._start(event)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what was kept so far; at any time, also during a run.

        What is still running is drawn up to the last event, and marked as ``unfinished``. The file is
        replaced as a whole, so that nobody reads a half of it. A million slices take some seconds.

        Args:
            path: the file's.

        Raises:
            OSError: it can't be written.
        """
        write_whole(path, self._text())

    def _start(self, event: Event) -> None:
        around = next((self._open[key][-1] for key in _keys_around(event) if key in self._open), None)
        if around is None:
            lane = self._process(event.pipeline).free_lane()
        elif around.lane.open[-1] is around:
            lane = around.lane
        else:
            lane = around.lane.free_side()
        started = _Slice(event, lane, self._now)
        lane.open.append(started)
        self._open.setdefault(_key(event), []).append(started)
        self._kept.append(started)

    def _mark(self, event: Event) -> None:
        failing = self._open.get(_key(event))
        if failing:
            self._kept.append(_Mark(event, failing[-1], self._now))
        else:
            self.left_out += 1

    def _end(self, event: Event) -> None:
        several = self._open.get(_key(event))
        if several is None:  # its start was left out
            return
        began = self._now - round((event.duration or 0.0) * 1e9)
        ended = min(several, key=lambda one: abs(one.began - began))
        several.remove(ended)
        if not several:
            del self._open[_key(event)]
        ended.end(event, self._now)

    def _process(self, pipeline: str) -> "_Process":
        if pipeline not in self._processes:
            self._processes[pipeline] = _Process(pipeline, next(self._ids), self._ids)
        return self._processes[pipeline]

    def _text(self) -> Iterator[str]:
        # as it is: Perfetto refuses the two escapes that JSON has for an emoji
        encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        before = '{"traceEvents":[\n'
        for entry in self._entries():
            yield before + encode(entry)
            before = ",\n"
        yield f"{before.lstrip(',')}]}}\n"

    def _entries(self) -> Iterator[dict[str, Any]]:
        for process in list(self._processes.values()):
            yield from process.entries()
        begin = self._kept[0].began if self._kept else self._now
        for kept in self._kept:
            yield kept.entry(begin, self._now)
        if self.left_out:
            name = f"{self.left_out} more, beyond the limit of {self._limit}"
            args = {"left_out": self.left_out, "limit": self._limit}
            yield {
                "name": name,
                "ph": "i",
                "s": "g",
                "ts": (self._now - begin) / 1000,
                "pid": 1,
                "args": args,
            }


_Key: TypeAlias = tuple[str, str | None, tuple[int, ...]]


def _key(event: Event) -> _Key:
    return event.run_id, event.stage, event.element


def _keys_around(event: Event) -> Iterator[_Key]:
    """The keys that what an event happened in may have, the innermost first; a name may have slashes, too."""
    stage = event.stage
    while stage is not None:
        stage = stage.rpartition("/")[0] if "/" in stage else None
        for depth in range(len(event.element), -1, -1):
            yield event.run_id, stage, event.element[:depth]


class _Process:
    """A pipeline, with its lanes."""

    def __init__(self, name: str, id: int, ids: Iterator[int]) -> None:
        self.name = name
        self.id = id
        self.free: list[tuple[int, _Lane]] = []
        self._ids = ids
        self._lanes: list[_Lane] = []

    def free_lane(self) -> "_Lane":
        if self.free:
            return heappop(self.free)[1]
        lane = _Lane(self, self.new_id())
        self._lanes.append(lane)
        return lane

    def new_id(self) -> int:
        return next(self._ids)

    def entries(self) -> Iterator[dict[str, Any]]:
        yield {"name": "process_name", "ph": "M", "pid": self.id, "args": {"name": self.name}}
        names = (
            (f"lane {number}.{side}" if side else f"lane {number}", lane.id)
            for number, home in enumerate(self._lanes, 1)
            for side, lane in enumerate((home, *home.sides))
        )
        for index, (name, id) in enumerate(names, 1):
            common = {"ph": "M", "pid": self.id, "tid": id}
            yield {"name": "thread_name", **common, "args": {"name": name}}
            yield {"name": "thread_sort_index", **common, "args": {"sort_index": index}}


class _Lane:
    """Where an item is drawn; or, if it has a ``home``, what runs beside it in the same item."""

    __slots__ = ("_free", "_home", "id", "open", "process", "sides")

    def __init__(self, process: _Process, id: int, home: "_Lane | None" = None) -> None:
        self.process = process
        self.id = id
        self.open: list[_Slice] = []  # the inner ones after those around them
        self.sides: list[_Lane] = []
        self._home = home
        self._free: list[tuple[int, _Lane]] = []

    def free_side(self) -> "_Lane":
        home = self._home or self
        return heappop(home._free)[1] if home._free else home._new_side()

    def _new_side(self) -> "_Lane":
        lane = _Lane(self.process, self.process.new_id(), self)
        self.sides.append(lane)
        return lane

    def leave(self, ended: "_Slice") -> None:
        place = self.open.index(ended)
        longer = self.open[place + 1 :]
        del self.open[place:]
        if longer:  # here they would overlap, and of the other lanes only a new one was free all the time
            lane = (self._home or self)._new_side()
            lane.open = longer
            for one in longer:
                one.lane = lane
        if not self.open:
            heappush(self.process.free if self._home is None else self._home._free, (self.id, self))


@dataclass(slots=True, eq=False)
class _Slice:
    """A run or a stage."""

    start: Event
    lane: _Lane
    began: int
    ended: int | None = None
    outcome: str | None = None
    attempts: int | None = None
    error: str | None = None

    def end(self, event: Event, now: int) -> None:
        self.ended, self.outcome, self.attempts = now, event.outcome, event.attempts
        self.error = type_of(event.error) or None
        self.lane.leave(self)

    def entry(self, begin: int, now: int) -> dict[str, Any]:
        start = self.start
        args = {
            "outcome": self.outcome,
            "attempts": self.attempts,
            "error": self.error,
            "unfinished": self.ended is None or None,
            "item_index": start.item_index,
            "element": start.element or None,
            "run_id": start.run_id if start.stage is None else None,
        }
        return {
            "name": start.pipeline if start.stage is None else start.stage,
            "cat": "run" if start.stage is None else "stage",
            "ph": "X",
            "ts": (self.began - begin) / 1000,
            "dur": ((now if self.ended is None else self.ended) - self.began) / 1000,
            "pid": self.lane.process.id,
            "tid": self.lane.id,
            "args": {name: value for name, value in args.items() if value is not None},
        }


class _Mark:
    """A failed attempt."""

    __slots__ = ("args", "attempt", "began", "within")

    def __init__(self, event: Event, within: _Slice, now: int) -> None:
        # not the event: it has the error, and that its traceback with all frames
        self.attempt = event.attempt
        self.args = {"error": type_of(event.error), "will_retry": event.will_retry, "delay": event.delay}
        self.began = now
        self.within = within

    def entry(self, begin: int, now: int) -> dict[str, Any]:
        return {
            "name": f"attempt {self.attempt} failed",
            "cat": "attempt",
            "ph": "i",
            "s": "t",
            "ts": (self.began - begin) / 1000,
            "pid": self.within.lane.process.id,
            "tid": self.within.lane.id,
            "args": self.args,
        }


def write_whole(path: str | os.PathLike[str], parts: Iterable[str]) -> None:
    """Write a text file in UTF-8, so that whoever reads it finds the old one or all of the new one.

    What is there and is no file, like a pipe, is written to directly. Half a surrogate pair, which UTF-8
    has not, becomes a question mark.

    Args:
        path: the file's; of a link, what it points to is replaced.
        parts: the text.

    Raises:
        OSError: it can't be written; nothing is left behind then.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        _write(target, "w", parts)
        return
    beside = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        _write(beside, "x", parts)
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _write(path: str, mode: str, parts: Iterable[str]) -> None:
    with open(path, mode, encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(parts)
