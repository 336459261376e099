"""What a report says of runs, counted in little memory: the page draws it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappush, heappushpop, nlargest
from math import ceil, log
from reprlib import Repr
from typing import Any, NamedTuple

from ..errors import StageExecutionError
from ..events import Event
from ._errors import original, type_of

__all__ = [
    "Facts",
    "Group",
    "Groups",
    "Latencies",
    "Run",
    "Sample",
    "Scale",
    "Span",
    "Tally",
    "Timeline",
    "sample_of",
    "seconds_of",
]

_GROUPS = 50  # of errors, and of retries
_SPANS = 40  # of each of these runs
_BARS = 120  # of the throughput
_COLUMNS = 48  # of a histogram
_MESSAGE, _ITEM = 300, 150  # characters


@dataclass(slots=True)
class Facts:
    """What a page is made of."""

    seconds: float  # from the first event to the last
    total: "Tally"
    parts: "list[Tally]"  # in the order in which they began
    others: "Tally"
    scale: "Scale"
    timeline: "Timeline"
    errors: "Groups"
    retries: "Groups"
    slowest: "list[Run]"


class Tally:
    """All runs of a pipeline, or of a stage, summed up."""

    __slots__ = ("handled", "latencies", "outcomes", "pipeline", "retries", "stage", "started")

    def __init__(self, pipeline: str, stage: str | None) -> None:
        self.pipeline: str = pipeline
        self.stage: str | None = stage  # None: the pipeline itself
        self.started: int = 0
        self.outcomes: dict[str, int] = {}
        self.handled: int = 0  # of those that ended well: failed, and an on_error stood in
        self.retries: int = 0
        self.latencies: Latencies = Latencies()

    def counted(self, *outcomes: str) -> int:
        """Return how many have ended in one of these ways."""
        return sum(self.outcomes.get(outcome, 0) for outcome in outcomes)

    @property
    def running(self) -> int:
        return self.started - self.latencies.count

    def end(self, event: Event) -> None:
        outcome = event.outcome or ""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if event.error is not None and outcome == "ok":
            self.handled += 1
        self.latencies.add(event.duration or 0.0)


# -- latencies


_GROWTH = 1.01 / 0.99  # from bucket to bucket, so that its middle is within 1 % of all that is in it
_SCALE = 1 / log(_GROWTH)
_SHORTEST = 1e-9  # seconds; less is nothing
_NOTHING = ceil(log(_SHORTEST) * _SCALE) - 1


class Latencies:
    """How long something took, counted in buckets."""

    __slots__ = ("buckets", "count", "longest", "shortest")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count: int = 0
        self.longest: float = 0.0
        self.shortest: float = float("inf")

    def add(self, seconds: float) -> None:
        bucket = ceil(log(seconds) * _SCALE) if seconds > _SHORTEST else _NOTHING
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        if seconds > self.longest:
            self.longest = seconds
        if seconds < self.shortest:
            self.shortest = seconds

    def percentile(self, percent: int) -> float:
        """Return what ``percent`` of a hundred did not exceed, within 1 %; of nothing, 0."""
        rank = -(-percent * self.count // 100)
        if rank == self.count:
            return self.longest
        buckets = iter(sorted(self.buckets))
        while rank > 0:
            bucket = next(buckets)
            rank -= self.buckets[bucket]
        return min(max(seconds_of(bucket), self.shortest), self.longest)


def seconds_of(bucket: int) -> float:
    """Return the middle of a bucket."""
    return 0.0 if bucket == _NOTHING else _GROWTH**bucket * 2 / (1 + _GROWTH)


class Scale(NamedTuple):
    """Bars on a logarithmic axis that several histograms share; each takes the same number of buckets."""

    first: int
    last: int
    per_bar: int

    @classmethod
    def of(cls, all_latencies: "Iterable[Latencies]") -> "Scale":
        buckets = {bucket for latencies in all_latencies for bucket in latencies.buckets} - {_NOTHING}
        first, last = min(buckets, default=0), max(buckets, default=0)
        per_bar = -(-(last - first + 1) // _COLUMNS)
        return cls(first, first + per_bar * _COLUMNS - 1, per_bar)

    def bars(self, latencies: Latencies) -> list[int]:
        """Return the height of each bar; what took no time at all is in the first one."""
        heights = [0] * _COLUMNS
        for bucket, number in latencies.buckets.items():
            heights[max(0, bucket - self.first) // self.per_bar] += number
        return heights

    @property
    def ends(self) -> tuple[float, float]:
        """Where the axis begins and ends, in seconds."""
        return seconds_of(self.first), seconds_of(self.last)


# -- throughput


class Timeline:
    """How many runs ended when, and how: in bars that become twice as wide whenever there are too many."""

    __slots__ = ("bars", "width")

    def __init__(self) -> None:
        self.width: float = 2.0**-10  # seconds
        self.bars: list[dict[str, int]] = []

    def add(self, seconds: float, outcome: str) -> None:
        while seconds >= self.width * _BARS:
            self.width *= 2
            self.bars = [*map(_sum, self.bars[::2], [*self.bars[1::2], {}])]
        index = int(seconds / self.width)
        while len(self.bars) <= index:
            self.bars.append({})
        self.bars[index][outcome] = self.bars[index].get(outcome, 0) + 1


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {outcome: one.get(outcome, 0) + other.get(outcome, 0) for outcome in one | other}


# -- errors and retries


class Sample(NamedTuple):
    """One of those that are in a group."""

    message: str
    item_index: int | None
    element: tuple[int, ...]
    item: str | None


@dataclass(slots=True)
class Group:
    """What happened in one stage with one type of error."""

    pipeline: str
    stage: str | None  # None: outside of the stages, in a middleware
    error_type: str
    count: int = 0
    waited: float = 0.0  # seconds before the next attempts
    samples: list[Sample] = field(default_factory=list)


class Groups:
    """The first groups, and how many there were that belong to others."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[str, str | None, str], Group] = {}
        self.others: int = 0

    def add(self, pipeline: str, stage: str | None, error_type: str) -> Group | None:
        key = pipeline, stage, error_type
        group = self.by_key.get(key)
        if group is None:
            if len(self.by_key) >= _GROUPS:
                self.others += 1
                return None
            group = self.by_key[key] = Group(*key)
        group.count += 1
        return group


def sample_of(error: BaseException | None, event: Event) -> Sample:
    """What is told of an error: texts alone, as its traceback holds all the frames."""
    if isinstance(error, StageExecutionError):
        item = None if error.item_index is None else _item(error.item)
        return Sample(_message(original(error)), event.item_index, error.element, item)
    return Sample(_message(error), event.item_index, event.element, None)


def _message(error: BaseException | None) -> str:
    try:
        return _shortened(str(error), _MESSAGE)
    except Exception as broken:
        return f"<no message: its __str__ raised {type(broken).__name__}>"


_repr = Repr()  # looks only at the beginning of what is long
_repr.maxstring = _repr.maxother = _repr.maxlong = _ITEM
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxfrozenset = _repr.maxdeque = _repr.maxdict = 8
_repr.maxlevel = 3


def _item(item: Any) -> str:
    try:
        return _shortened(_repr.repr(item), _ITEM)
    except Exception as broken:
        return f"<{type(item).__name__}: its __repr__ raised {type(broken).__name__}>"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# -- one run


class Span(NamedTuple):
    """A stage of a run that is drawn; the first field is by what the longest ones are found."""

    duration: float
    began: float
    stage: str
    element: tuple[int, ...]
    outcome: str
    attempts: int


class Run:
    """A run, with those of its stages that took longest: so what is around one of them is there, too."""

    __slots__ = (
        "began",
        "duration",
        "error_type",
        "item_index",
        "left_out",
        "open",
        "outcome",
        "pipeline",
        "run_id",
        "spans",
    )

    def __init__(self, run_id: str, pipeline: str, item_index: int | None, began: float) -> None:
        self.run_id: str = run_id
        self.pipeline: str = pipeline
        self.item_index: int | None = item_index
        self.began: float = began
        self.duration: float = 0.0
        self.outcome: str = ""  # it is still running
        self.error_type: str | None = None
        self.spans: list[Span] = []
        self.left_out: int = 0
        self.open: dict[tuple[str, tuple[int, ...]], float] = {}

    def end_stage(self, event: Event, now: float) -> None:
        self.open.pop((event.stage or "", event.element), None)
        duration = event.duration or 0.0
        span = Span(
            duration,
            now - duration,
            event.stage or "",
            event.element,
            event.outcome or "",
            event.attempts or 1,
        )
        if len(self.spans) < _SPANS:
            heappush(self.spans, span)
        else:
            heappushpop(self.spans, span)
            self.left_out += 1

    def end(self, event: Event, now: float) -> None:
        self.outcome = event.outcome or ""
        self.error_type = type_of(event.error) or None
        self.duration = now - self.began
        self.open.clear()

    def seen_at(self, now: float) -> "Run":
        """Return a run that has not ended as it is by now, with the stages that have not ended, too."""
        run = Run(self.run_id, self.pipeline, self.item_index, self.began)
        run.duration = now - self.began
        open_spans = (Span(now - began, began, *key, "", 1) for key, began in self.open.items())
        run.spans = nlargest(_SPANS, [*self.spans, *open_spans])
        run.left_out = self.left_out + len(self.spans) + len(self.open) - len(run.spans)
        return run
