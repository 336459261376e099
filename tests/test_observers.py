"""What observers see of a run, and that nobody else sees that they look on.

The random tests run the same tree of steps twice, with observers and without, in virtual time: results,
errors, times, calls, hooks and contexts have to be the same. What the observers were told has to make sense
by itself (`check_run`), and has to agree with what the caller got (`check_tree`).
"""

import asyncio
import contextlib
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain, pairwise
from operator import or_
from typing import Any, NamedTuple
from unittest.mock import AsyncMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    DeadlineExceeded,
    Finish,
    Pipeline,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
)
from async_pipeline.events import Event
from tests.helpers import Source, run_virtually
from tests.test_composition import (
    LOOPS,
    SHAPES,
    START,
    End,
    Failure,
    Gardener,
    Large,
    Leaf,
    Node,
    Row,
    ScriptedError,
    World,
    add_one,
    all_parts,
    break_down,
    cancel_a_group,
    cancel_itself,
    digest,
    finish_early,
    is_kept_alive,
    moments,
    observe,
    observed,
    run_on,
    seeds,
    wait_for_ever,
    ways,
    what_is,
)

# -- what makes sense by itself


class Key(NamedTuple):
    """By what an end is that of a start."""

    path: str | None
    element: tuple[int, ...]

    def is_inside(self, outer: "Key") -> bool:
        is_deeper = outer.path is None or f"{self.path}".startswith(f"{outer.path}/")
        return is_deeper and self.element[: len(outer.element)] == outer.element

    def is_child_of(self, outer: "Key") -> bool:
        parent = f"{self.path}".rpartition("/")[0] or None
        return parent == outer.path and self.element in (outer.element, (*outer.element, *self.element[-1:]))


def key_of(event: Event) -> Key:
    return Key(event.stage, event.element)


@dataclass
class Span:
    """A stage from its start to its end."""

    start: Event
    failures: list[Event] = field(default_factory=list)
    end: Any = None

    @property
    def key(self) -> Key:
        return key_of(self.start)


@dataclass
class Run:
    """All that an observer was told of one run."""

    events: list[Event]
    spans: list[Span]  # in the order of their ends; the last one is the run itself

    @property
    def end(self) -> Event:
        return self.events[-1]


COMMON = ("run_id", "pipeline", "item_index")
OF_ENDS = {"outcome", "attempts", "duration"}
OF_FAILURES = {"attempt", "will_retry"}
CARRIED = {"run_end": OF_ENDS, "stage_end": OF_ENDS, "attempt_failed": OF_FAILURES}


def check_run(events: Sequence[Event]) -> Run:
    """Check what was told of one run, and put together what belongs together."""
    assert (events[0].kind, events[-1].kind) == ("run_start", "run_end")
    assert events[0].stage is events[-1].stage is None
    assert len({tuple(getattr(event, name) for name in COMMON) for event in events}) == 1
    assert [event.time for event in events] == sorted(event.time for event in events)
    is_open: list[Span] = []
    spans: list[Span] = []
    for event in events:
        check_fields(event)
        kind = event.kind.rpartition("_")[2]
        if kind == "start":
            assert not is_open or any(key_of(event).is_child_of(span.key) for span in is_open)
            is_open.append(Span(event))
            continue
        span = next(span for span in reversed(is_open) if span.key == key_of(event))
        assert event.kind.startswith("run") == (span.start.kind == "run_start")
        if kind == "failed":
            span.failures.append(event)
        else:
            assert not any(other.key.is_inside(span.key) for other in is_open if other is not span)
            assert event.duration == event.time - span.start.time
            span.end = event
            is_open.remove(span)
            spans.append(span)
    assert not is_open
    return Run([*events], spans)


def check_fields(event: Event) -> None:
    names = OF_ENDS | OF_FAILURES
    assert {name for name in names if getattr(event, name) is not None} == CARRIED.get(event.kind, set())
    assert (event.delay is not None) == (event.will_retry is True)
    if event.outcome is not None:
        assert event.error is None or event.outcome != "finished"
        assert event.outcome in outcomes_of(event.error)
    elif event.kind == "attempt_failed":
        assert isinstance(event.error, Exception)
    else:
        assert event.error is None
    assert (event.stage is None) == event.kind.startswith("run")


def outcomes_of(error: BaseException | None) -> tuple[str, ...]:
    """What an end with this error may be."""
    if error is None:
        return "ok", "finished"
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "cancelled", "timeout"
    if not isinstance(error, Exception):
        return ("error",)
    if not isinstance(error, StageExecutionError):
        return "ok", "error"  # handled by on_error, or raised by what is no handler
    is_timeout = isinstance(error.original_error, (StageTimeoutError, DeadlineExceeded))
    return ("timeout",) if is_timeout else ("error",)


def runs_of(events: Iterable[Event]) -> list[Run]:
    """Check what an observer was told of any number of runs."""
    by_run: dict[str, list[Event]] = {}
    for event in events:
        by_run.setdefault(event.run_id, []).append(event)
    return [check_run(events) for events in by_run.values()]


# -- random trees with everything that the trees of the other tests lack


@dataclass
class Watching(World):
    """A world with or without observers, that keeps what anybody could see."""

    observes: bool = False
    log: list[Any] = field(default_factory=list)
    seen: dict[str, list[Event]] = field(default_factory=dict)

    def observers(self, name: str) -> list[Any]:
        return [self.seen.setdefault(name, []).append] if self.observes else []

    @property
    def has_cancelled(self) -> bool:
        """Whether tasks were cancelled that an observer knows of; in what order, is left to chance."""
        return any(isinstance(event.error, asyncio.CancelledError) for event in chain(*self.seen.values()))

    def note(self, *what: object) -> None:
        self.log.append((asyncio.get_running_loop().time(), *what))

    def before_stage(self, name: str, value: object, context: Any) -> None:
        self.before(name, value)
        self.note("before", name, repr(value))
        context["stages"].append(name)

    async def after_stage(self, name: str, value: object, output: object, error: Any) -> None:
        self.after(name, value, output, error)
        self.note("after", name, repr(output), error and type(error).__name__, getattr(error, "attempts", 0))

    async def passing(self, call_next: Any, name: str, value: object, context: Any) -> Any:
        self.note("middleware", name)
        return await call_next(value)

    def passing_on(self, call_next: Any, name: str, value: object, context: Any) -> Any:
        return call_next(value)

    async def again(self, call_next: Any, name: str, value: object, context: Any) -> Any:
        try:
            return await call_next(value)
        except StageExecutionError:
            self.note("again", name)
        return await call_next(value)


def never(error: Exception) -> None:
    raise AssertionError("no hook and no observer fails here") from error


class SubStage(Stage[Any, Any]):
    """A stage with its own class, but not its own run."""


class OwnStage(Stage[Any, Any]):
    async def run(self, value: Any, *, context: Any = None) -> Any:
        return await super().run(value, context=context)


class SubPipeline(Pipeline[Any, Any]):
    pass


class OwnPipeline(Pipeline[Any, Any]):
    async def run(self, initial_value: Any, *, context: Any = None, timeout: float | None = None) -> Any:
        return await super().run(initial_value, context=context, timeout=timeout)


class Foreign:
    """Something with a name and a run."""

    def __init__(self, step: Any) -> None:
        self.name: str = step.name
        self._step = step

    async def run(self, value: Any, *, context: Any = None) -> Any:
        return await self._step.run(value, context=context)


@dataclass
class AnyLeaf(Leaf):
    """A stage that may have an ``on_error``, or a class of its own."""

    make: Any = Stage
    is_saved: bool = False

    @property
    def is_opaque(self) -> bool:
        return self.make not in (Stage, SubStage)

    def build(self, world: World) -> Any:
        if self.name not in world.stages:
            options = (
                {**self.options, "on_error": partial(self.stand_in, world)} if self.is_saved else self.options
            )
            make = Stage if self.make is Foreign else self.make
            stage = make(self.name, self.handler(world), **options)
            world.stages[self.name] = Foreign(stage) if self.make is Foreign else stage
        return world.stages[self.name]

    async def stand_in(self, world: World, value: object, error: Exception) -> Any:
        rng = random.Random(digest(world.seed, self.name, value))
        await asyncio.sleep(world.seconds(rng, 1))
        if rng.random() < 0.2:
            raise rng.choice([ScriptedError("on_error"), Finish(value)])
        return self.output(world, value)


@dataclass
class AnyRow(Row):
    """A pipeline with any of its options, or a class of its own."""

    make: Any = Pipeline
    middlewares: Sequence[str] = ()
    is_observed: bool = False
    has_hooks: bool = False

    def __post_init__(self) -> None:
        # such a row stays a step of its own when it is joined with others
        self.is_hooked = (
            self.has_hooks or self.is_observed or bool(self.middlewares) or self.make is not Pipeline
        )

    @property
    def is_opaque(self) -> bool:
        return self.make not in (Pipeline, SubPipeline)

    def build(self, world: World) -> Any:
        assert isinstance(world, Watching)
        if self.is_joined:
            first, *others = (part.build(world) for part in self.parts)
            # two foreign steps do not know how to join
            start = Pipeline([first]) if isinstance(first, Foreign) else first
            return reduce(or_, others, start)
        options: dict[str, Any] = {"name": self.name}
        if self.has_hooks:
            options |= {"before_stage": world.before_stage, "after_stage": world.after_stage}
        if self.is_observed:
            # on_hook_error, too, keeps it from being flattened, with and without observers
            options |= {"observers": world.observers(self.name), "on_hook_error": never}
        make = Pipeline if self.make is Foreign else self.make
        middlewares = [getattr(world, name) for name in self.middlewares]
        pipeline = make([part.build(world) for part in self.parts], middlewares=middlewares, **options)
        return Foreign(pipeline) if self.make is Foreign else pipeline


class WatchedGardener(Gardener):
    """Draws trees of such leaves and rows; steps with a run of their own are in one tree of four."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__(draw)
        self.has_own = self.number(3) == 3

    def one_of(self, choices: Sequence[Any], own: Sequence[Any]) -> Any:
        choices = [*choices, *(own if self.has_own else ())]
        return choices[self.number(len(choices) - 1)]

    def leaf(self, gives: str = "number", *, may_be_sync: bool = True) -> Leaf:
        leaf = super().leaf(gives, may_be_sync=may_be_sync)
        if isinstance(leaf, AnyLeaf):  # drawn before
            return leaf
        make = self.one_of([Stage, Stage, Stage, SubStage], [OwnStage, Foreign])
        is_saved = self.number(3) == 0
        own = AnyLeaf(leaf.name, leaf.gives, leaf.is_sync, leaf.options, make, is_saved)
        self.leaves = [own if other is leaf else other for other in self.leaves]
        return own

    def row(self, depth: int, parts: list[Node] | None = None) -> Row:
        return self.dressed(super().row(depth, parts))

    def dressed(self, row: Row) -> AnyRow:
        if row.is_joined:
            return AnyRow(row.name, row.parts, is_joined=True)
        middlewares = [(), (), (), ("passing",), ("passing_on", "passing"), ("again",), ("passing", "again")]
        return AnyRow(
            row.name,
            row.parts,
            make=self.one_of([Pipeline, Pipeline, SubPipeline], [OwnPipeline, Foreign]),
            middlewares=middlewares[self.number(6)],
            is_observed=self.number(1) == 0,
            has_hooks=row.is_hooked,
        )


@st.composite
def trees(draw: st.DrawFn) -> AnyRow:
    gardener = WatchedGardener(draw)
    make: Any = [gardener.row, gardener.parallel, gardener.each, gardener.branch, gardener.fallback]
    parts: list[Node] = [draw(st.sampled_from(make))(2) for _ in range(1 + gardener.number(1))]
    return AnyRow(
        "root",
        parts,
        make=gardener.one_of([Pipeline, SubPipeline], []),
        middlewares=gardener.one_of([(), ("passing",), ("again",)], []),
        is_observed=gardener.number(3) < 3,
        has_hooks=gardener.number(1) == 0,
    )


class Place(NamedTuple):
    """A step of a tree, where an observer of the whole is told of it."""

    path: str
    node: Any
    is_repeated: bool  # by a middleware, so that several calls of it may be one stage

    @property
    def is_stage(self) -> bool:
        return isinstance(self.node, AnyLeaf) and not self.node.is_opaque

    @property
    def is_observed(self) -> bool:
        return isinstance(self.node, AnyRow) and self.node.is_observed and not self.node.is_opaque


def walk(node: Node, path: str = "", *, is_repeated: bool = False) -> Iterator[Place]:
    yield Place(path, node, is_repeated)
    if not getattr(node, "is_opaque", False):
        repeats = "again" in getattr(node, "middlewares", ())
        for name, part in node.inner():
            yield from walk(part, f"{path}/{name}" if path else name, is_repeated=repeats)


def has_opaque(node: Node) -> bool:
    return getattr(node, "is_opaque", False) or any(has_opaque(part) for _, part in node.inner())


# -- what was told agrees with what has happened


def check_tree(tree: AnyRow, world: Watching, indexes: Iterable[int | None] = (None,)) -> list[Run]:
    """Check all that was told of the runs of a tree, and return those of the whole."""
    every = {name: runs_of(events) for name, events in world.seen.items()}
    names = [run.end.run_id for run in chain(*every.values())]
    assert len(names) == len(set(names))
    assert all(run.end.pipeline == name for name, runs in every.items() for run in runs)
    runs = every.get("root", [])
    places: dict[str, list[Place]] = {}
    for place in walk(tree):
        places.setdefault(place.path, []).append(place)
    for run in runs:
        check_end_of_run(run)
        for span in run.spans[:-1]:
            check_attempts(span, places[f"{span.key.path}"])
    if tree.is_observed:
        check_calls(tree, world, runs, places)
    for place in walk(tree):
        if place.is_observed and place.node is not tree:
            own = every.get(place.node.name, [])
            assert {run.end.item_index for run in own} <= {*indexes}
            if tree.is_observed:
                check_inner(place, runs, own)
    return runs


def check_end_of_run(run: Run) -> None:
    """A run ends like the last of its stages, unless something else has ended it after that."""
    last = next(span.end for span in reversed(run.spans[:-1]) if "/" not in f"{span.key.path}")
    later = {"ok": ("timeout", "cancelled"), "timeout": ("cancelled",)}.get(f"{last.outcome}", ())
    assert run.end.outcome in (last.outcome, *later)


def check_attempts(span: Span, places: list[Place]) -> None:
    failures, end = span.failures, span.end
    error = end.error
    if not all(place.is_stage for place in places):
        assert not failures
        makes_attempts = all(getattr(place.node, "make", None) in (OwnStage, Foreign) for place in places)
        assert end.attempts == (getattr(error, "attempts", 1) if makes_attempts else 1)
        return None
    if any(place.is_repeated for place in places):
        return check_repeated(failures)
    assert [failure.attempt for failure in failures] == [*range(1, len(failures) + 1)]
    assert all(failure.will_retry for failure in failures[:-1])
    has_failed = bool(failures) and not failures[-1].will_retry
    is_saved = any(place.node.is_saved for place in places)
    made = len(failures) + (not has_failed)
    if isinstance(error, asyncio.CancelledError):
        assert end.attempts in (made, len(failures))  # cancelled between two attempts
    else:
        assert end.attempts == made
    assert isinstance(error, StageExecutionError) or end.outcome != "error"
    if isinstance(error, StageExecutionError):
        assert has_failed
        assert error.attempts == made
        assert is_saved or error.original_error is failures[-1].error
    elif end.outcome == "ok":
        assert has_failed == (error is not None)
        assert not has_failed or error is failures[-1].error
        assert is_saved or not has_failed
    return None


def check_repeated(failures: list[Event]) -> None:
    """Of a stage that a middleware calls again, each call counts its attempts."""
    for before, failure in pairwise(failures):
        assert failure.attempt == (before.attempt + 1 if before.will_retry and before.attempt else 1)
    assert sum(not failure.will_retry for failure in failures) <= 2


def check_calls(tree: AnyRow, world: Watching, runs: list[Run], places: dict[str, list[Place]]) -> None:
    """Each attempt was made when the observers have been told: a delay is the one that was slept."""
    everywhere = Counter(node.name for node in all_nodes(tree))
    plain = Counter(place.node.name for place in walk(tree) if place.is_stage and not place.is_repeated)
    shown = {name for name, count in plain.items() if everywhere[name] == count}
    told: Counter[Any] = Counter()
    for span in chain.from_iterable(run.spans[:-1] for run in runs):
        name = places[f"{span.key.path}"][0].node.name
        retried = [failure.time + (failure.delay or 0.0) for failure in span.failures if failure.will_retry]
        if name in shown:
            told.update((name, time) for time in [span.start.time, *retried][: span.end.attempts])
    made: Counter[Any] = Counter()
    for (name, _, time), count in world.calls.items():
        if name in shown:
            made[name, time] += count
    assert told == made


def all_nodes(node: Node) -> Iterator[Node]:
    yield node
    for _, part in node.inner():
        yield from all_nodes(part)


EVERYTHING = ("kind", "time", "item_index", "element", *OF_ENDS, *OF_FAILURES, "delay", "error")


def check_inner(place: Place, runs: list[Run], own: list[Run]) -> None:
    """The observer of an inner pipeline was told the same as that of the whole, by shorter paths."""

    def shown(events: Iterable[Event], skip: int) -> Counter[Any]:
        return Counter(
            (f"{event.stage}"[skip:], *(getattr(event, name) for name in EVERYTHING)) for event in events
        )

    prefix = f"{place.path}/"
    outer = [event for run in runs for event in run.events if f"{event.stage}".startswith(prefix)]
    inner = [event for run in own for event in run.events if event.stage is not None]
    assert shown(outer, len(prefix)) == shown(inner, 0)
    if not place.is_repeated:
        as_stage = Counter(
            (span.start.time, span.end.time, span.key.element, span.end.outcome, span.end.item_index)
            for span in chain.from_iterable(run.spans for run in runs)
            if span.key.path == place.path
        )
        assert as_stage == Counter(
            (run.events[0].time, run.end.time, run.end.element, run.end.outcome, run.end.item_index)
            for run in own
        )


def check_failure(failure: Failure, run: Run) -> None:
    """Each stage that an error names has had such an end."""
    ends = [span.end for span in run.spans if span.key.path == failure.path]
    if failure.error in ("DeadlineExceeded", "CancelledError"):
        # a stage that has returned in spite of it is named, too
        assert {end.outcome for end in ends} & {"timeout", "cancelled", "ok"}
        return
    parts: Any = failure.error if isinstance(failure.error, frozenset) else ()
    assert any(
        end.element == failure.element
        and end.attempts == failure.attempts
        and isinstance(end.error, StageExecutionError)
        and (parts or what_is(end.error.original_error) == failure.error)
        for end in ends
    )
    for part in (*parts, *failure.earlier):
        if part.path != failure.path:  # what each itself adds to the errors of its elements
            check_failure(part, run)


def check_result(result: End, run: Run) -> None:
    """What the caller got is what the observers were told."""
    assert run.end.outcome in outcomes_of_result(result)


def outcomes_of_result(result: End) -> tuple[str, ...]:
    if result.kind == "value":
        return "ok", "finished"
    if result.kind == "cancelled" or result.what.error == "CancelledError":  # nobody asked for it
        return ("cancelled",)
    return ("timeout",) if result.what.error in ("StageTimeoutError", "DeadlineExceeded") else ("error",)


# -- the same with and without observers

Use = Callable[[Watching, Any], Coroutine[Any, Any, Any]]


def in_both_worlds(loop: Any, tree: AnyRow, use: Use, *worlds: Watching) -> Any:
    """Use the pipeline in a world without observers and in one with them, and return what both give."""
    results = []

    async def main(world: Watching) -> None:
        result = await use(world, tree.build(world))
        results.append((result, asyncio.get_running_loop().time()))
        world.check()

    for world in worlds:
        run_on(loop, main(world))
    plain, watched = worlds
    assert results[0] == results[1]
    assert plain.calls == watched.calls
    assert Counter(plain.log) == Counter(watched.log)
    if tree.is_observed and not has_opaque(tree) and not watched.has_cancelled:
        assert plain.log == watched.log
    assert not plain.seen
    return results[0][0]


def two_worlds(seed: int, *, is_coarse: bool = False) -> tuple[Watching, Watching]:
    return Watching(seed, is_coarse), Watching(seed, is_coarse, observes=True)


def comparable(end: End, tree: AnyRow) -> End:
    """What has to be the same: without a Source, which is of one world."""
    if not isinstance(end.what, Failure):
        return end._replace(what=repr(end.what))
    if end.what.error in ("DeadlineExceeded", "CancelledError") and has_opaque(tree):
        # inside a step with its own run, an observed pipeline knows better where it was cancelled
        return end._replace(what=Failure(end.what.path.partition("/")[0], end.what.error))
    return end


async def try_it(run: Any) -> Any:
    outcome = await run
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


some = settings(max_examples=150, deadline=None)


@pytest.mark.parametrize("loop", LOOPS)
@some
@given(trees(), seeds, moments, ways, st.booleans(), st.integers(0, 12), st.booleans())
def test_a_run_is_told_as_it_was_and_is_what_it_would_be(
    loop: Any, tree: AnyRow, seed: int, moment: float, how: str, is_coarse: bool, turns: int, tries: bool
) -> None:
    moment = moment // 0.5 * 0.5 + 0.5 if is_coarse else moment

    async def use(world: Watching, pipeline: Any) -> Any:
        context: Any = {"stages": []}
        options = {"context": context, "timeout": moment if how == "timeout" else None}
        run = try_it(pipeline.try_run(START, **options)) if tries else pipeline.run(START, **options)
        task = asyncio.create_task(observe(run))
        if how == "cancelled":
            await asyncio.sleep(moment)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        return comparable(await task, tree), Counter(context["stages"])

    worlds = two_worlds(seed, is_coarse=is_coarse)
    result, _ = in_both_worlds(loop, tree, use, *worlds)
    for run in check_tree(tree, worlds[1]):
        check_result(result, run)
        if result.kind == "failure" and not has_opaque(tree):
            check_failure(result.what, run)


batches = st.sampled_from(["all", "first", "stream", "left", "unordered"])


@pytest.mark.parametrize("loop", LOOPS)
@some
@given(trees(), seeds, moments, batches, st.booleans(), st.integers(1, 3), st.integers(0, 3))
def test_a_batch_is_told_as_it_was_and_is_what_it_would_be(
    loop: Any,
    tree: AnyRow,
    seed: int,
    moment: float,
    how: str,
    has_timeout: bool,
    workers: int,
    left_after: int,
) -> None:
    async def use(world: Watching, pipeline: Any) -> Any:
        options: Any = {"context": {"stages": []}, "timeout": moment if has_timeout else None}
        if how in ("all", "first"):
            return await mapped(
                pipeline.map(range(4), workers, return_exceptions=how == "all", **options), tree
            )
        results: dict[int, End] = {}
        async with pipeline.stream(range(4), workers, ordered=how != "unordered", **options) as stream:
            async for outcome in stream.outcomes():
                results[outcome.index] = ended(outcome.value, outcome.error, tree)
                if how == "left" and len(results) > left_after:
                    break
        return results

    worlds = two_worlds(seed)
    results = in_both_worlds(loop, tree, use, *worlds)
    runs = check_tree(tree, worlds[1], range(4))
    indexes = [run.end.item_index for run in runs]
    assert len(indexes) == len({*indexes})
    assert {*indexes} >= {*results} or not tree.is_observed
    for run in runs:
        check_item(run, results, tree)


def check_item(run: Run, results: dict[int, End], tree: AnyRow) -> None:
    index = run.end.item_index
    assert index is not None
    if isinstance(run.end.error, StageExecutionError):
        assert {(part.item_index, part.item) for part in all_parts(run.end.error)} == {(index, index)}
    if index in results:
        check_result(results[index], run)
        if results[index].kind == "failure" and not has_opaque(tree):
            check_failure(results[index].what, run)


def ended(value: Any, error: Any, tree: AnyRow) -> End:
    if error is None:
        return comparable(End(0.0, "value", value), tree)
    assert isinstance(error, StageExecutionError)
    return comparable(End(0.0, "failure", observed(error)), tree)


async def mapped(batch: Any, tree: AnyRow) -> dict[int, End]:
    """What became of the items of a ``map``, by index."""
    try:
        results = await batch
    except BatchError as error:
        values = {index: ended(value, None, tree) for index, value in error.results.items()}
        return values | {index: ended(None, failure, tree) for index, failure in error.failures.items()}
    failures = [result if isinstance(result, StageExecutionError) else None for result in results]
    return {
        index: ended(result, error, tree)
        for index, (result, error) in enumerate(zip(results, failures, strict=True))
    }


# -- what exactly is told, in order


def line(event: Event) -> str:
    """What is told in a few words."""
    index = "".join(f"[{number}]" for number in event.element)
    what = "run" if event.stage is None else f"{event.stage}{index}"
    if event.kind == "attempt_failed":
        return f"{what} failed {event.attempt}" + (f", again in {event.delay}" if event.will_retry else "")
    if event.outcome is None:
        return f"{what} +"
    return f"{what} - {event.outcome}" + (f" {event.attempts}" if event.attempts != 1 else "")


async def told(pipeline: Pipeline[Any, Any], value: Any = 1, **options: Any) -> list[Event]:
    """What an observer of the pipeline is told of one run."""
    seen: list[Event] = []
    watched = pipeline.replace(observers=[*pipeline.observers, seen.append])
    await watched.try_run(value, **options)
    runs_of(seen)
    return seen


def plus(value: int) -> int:
    return value + 1


async def is_odd(value: int) -> bool:
    return value % 2 == 1


async def slow(value: object) -> object:
    await asyncio.sleep(1)
    return value


def saved(value: Any, error: Exception) -> Any:
    return value


async def cached(call_next: Any, name: str, value: Any, context: Any) -> Any:
    return value


async def twice(call_next: Any, name: str, value: Any, context: Any) -> Any:
    with contextlib.suppress(StageExecutionError):
        await call_next(value)
    return await call_next(value)


def fails_once() -> Any:
    calls: list[object] = []

    def flaky(value: object) -> object:
        calls.append(value)
        if len(calls) == 1:
            raise LookupError(value)
        return value

    return flaky


async def break_down_too(value: object, error: Exception) -> None:
    raise TypeError(value)


async def finish_in_group(value: object) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(finish_early(value))


class Told(NamedTuple):
    """A row of steps, and what is told of its stages: "s +" is a start, and "s - ok" an end."""

    steps: Callable[[], list[Any]]
    lines: str
    value: Any = 1


S: Any = partial(Stage, "s")
TOLD: dict[str, Told] = {
    "a stage": Told(lambda: [plus], "plus + | plus - ok"),
    "a failure": Told(
        lambda: [S(plus), break_down, plus],
        "s + | s - ok | break_down + | break_down failed 1 | break_down - error",
    ),
    "a retry": Told(
        lambda: [S(fails_once(), retries=2, retry_delay=0.5)], "s + | s failed 1, again in 0.5 | s - ok 2"
    ),
    "retries in vain": Told(
        lambda: [S(break_down, retries=1)],
        "s + | s failed 1, again in 0.0 | s failed 2 | s - error 2",
    ),
    "no retry": Told(lambda: [S(break_down, retries=1, retry_on=OSError)], "s + | s failed 1 | s - error"),
    "on_error": Told(lambda: [S(break_down, on_error=saved)], "s + | s failed 1 | s - ok"),
    "on_error after a retry": Told(
        lambda: [S(break_down, retries=1, on_error=break_down_too)],
        "s + | s failed 1, again in 0.0 | s failed 2 | s - error 2",
    ),
    "a timeout": Told(lambda: [S(slow, timeout=0.5)], "s + | s failed 1 | s - timeout"),
    "a finish": Told(lambda: [S(finish_early), plus], "s + | s - finished"),
    "a finish of a group": Told(lambda: [S(finish_in_group), plus], "s + | s - finished"),
    "a finish of a group in a fallback": Told(
        lambda: [fallback(S(finish_in_group)), plus],
        "fallback + | fallback/s + | fallback/s - finished | fallback - finished",
    ),
    "a subclass": Told(
        lambda: [SubStage("s", break_down, retries=1)],
        "s + | s failed 1, again in 0.0 | s failed 2 | s - error 2",
    ),
    "its own run": Told(lambda: [OwnStage("s", break_down, retries=1)], "s + | s - error 2"),
    "a foreign step": Told(
        lambda: [Foreign(Pipeline([S(break_down, retries=1)], name="own"))], "own + | own - error 2"
    ),
    "a pipeline with its own run": Told(
        lambda: [OwnPipeline([S(break_down, retries=1)], name="own")], "own + | own - error"
    ),
    "parallel": Told(
        lambda: [parallel({"a": plus, "b": S(break_down)}, name="p")],
        "p + | p/a + | p/a - ok | p/b + | p/b failed 1 | p/b - error | p - error",
    ),
    "each, and keep": Told(
        lambda: [each(S(is_odd), 1, name="e"), keep(bool, 1, name="k")],
        "e + | e/s[0] + | e/s[0] - ok | e/s[1] + | e/s[1] - ok | e - ok | "
        "k + | k/bool[0] + | k/bool[0] - ok | k/bool[1] + | k/bool[1] - ok | k - ok",
        [1, 2],
    ),
    "each of each": Told(
        lambda: [each(each(S(plus), name="i"), 1, name="e")],
        "e + | e/i[0] + | e/i/s[0][0] + | e/i/s[0][0] - ok | e/i[0] - ok | "
        "e/i[1] + | e/i/s[1][0] + | e/i/s[1][0] - ok | e/i[1] - ok | e - ok",
        [[1], [2]],
    ),
    "nothing to iterate over": Told(lambda: [each(plus)], "each + | each - error"),
    "branch": Told(
        lambda: [branch((is_odd, plus), otherwise=S(break_down), name="b")],
        "b + | b/is_odd + | b/is_odd - ok | b/s + | b/s failed 1 | b/s - error | b - error",
        2,
    ),
    "branch, none fits": Told(
        lambda: [branch((is_odd, plus), name="b")], "b + | b/is_odd + | b/is_odd - ok | b - error", 2
    ),
    "fallback": Told(
        lambda: [fallback(S(break_down, retries=1), plus, name="f")],
        "f + | f/s + | f/s failed 1, again in 0.0 | f/s failed 2 | f/s - error 2 | "
        "f/plus + | f/plus - ok | f - ok",
    ),
    "require": Told(lambda: [require("id")], "require + | require - error"),
    "pipelines": Told(
        lambda: [Pipeline([plus, Pipeline([S(plus)], name="b")], name="a")],
        "a + | a/plus + | a/plus - ok | a/b + | a/b/s + | a/b/s - ok | a/b - ok | a - ok",
    ),
    "a pipeline without a name": Told(
        lambda: [Pipeline([S(break_down)], name="")], " + | /s + | /s failed 1 | /s - error |  - error"
    ),
    "a middleware that does not call": Told(
        lambda: [Pipeline([S(break_down)], name="a", middlewares=[cached])], "a + | a/s + | a/s - ok | a - ok"
    ),
    "a middleware that calls twice": Told(
        lambda: [Pipeline([S(break_down, retries=1)], name="a", middlewares=[twice])],
        "a + | a/s + | a/s failed 1, again in 0.0 | a/s failed 2 | "
        "a/s failed 1, again in 0.0 | a/s failed 2 | a/s - error 2 | a - error",
    ),
    "a middleware that repeats a pipeline": Told(
        lambda: [Pipeline([Pipeline([S(fails_once())], name="b")], name="a", middlewares=[twice])],
        "a + | a/b + | a/b/s + | a/b/s failed 1 | a/b/s - error | a/b/s + | a/b/s - ok | a/b - ok | a - ok",
    ),
}


@pytest.mark.virtual
@pytest.mark.parametrize("what", TOLD)
async def test_what_is_told_in_order(what: str) -> None:
    steps, lines, value = TOLD[what]
    first, *within, last = map(line, await told(Pipeline(steps()), value))
    assert within == lines.split(" | ")
    last_outcome = within[-1].split(" - ")[1].split()[0]
    assert (first, last) == ("run +", f"run - {last_outcome}")


async def test_what_an_end_says() -> None:
    handled = Stage("handled", break_down, on_error=saved)
    failing = Stage("failing", break_down, retries=1)
    events = await told(Pipeline([handled, Pipeline([failing], name="inner")]))
    errors = {event.stage: event.error for event in events if event.outcome}
    failures = [event.error for event in events if event.kind == "attempt_failed"]
    assert errors["handled"] is failures[0]
    failed: Any = [errors[path] for path in ("inner/failing", "inner", None)]
    assert [error.original_error for error in failed] == [failures[2]] * 3
    assert [error.attempts for error in failed] == [2] * 3
    assert (failed[-1].stage_name, failed[-1].item_index) == ("inner/failing", None)


async def test_the_error_that_a_second_call_did_not_need_is_not_told() -> None:
    stage = Stage("s", fails_once(), on_error=saved)
    *_, end, _ = await told(Pipeline([stage], middlewares=[twice]))
    assert (line(end), end.error) == ("s - ok", None)


@pytest.mark.virtual
async def test_times_are_those_of_the_loop() -> None:
    start = asyncio.get_running_loop().time()
    events = await told(Pipeline([slow, Stage("s", slow, timeout=0.5, retries=1, retry_delay=2)]))
    assert [event.time - start for event in events] == [0, 0, 1, 1, 1.5, 4, 4, 4]
    assert [event.duration for event in events if event.outcome] == [1, 3, 4]


# -- how a run and its stages may end


class Ends(NamedTuple):
    """A step, and the first letters of the outcomes as they are told, the last one that of the run."""

    step: Any
    outcomes: str
    timeout: float | None = None


async def raise_timeout(value: object) -> None:
    raise TimeoutError


async def interrupt(value: object) -> None:
    await asyncio.sleep(0)
    raise KeyboardInterrupt


def pair(value: object) -> list[object]:
    return [value, value]


async def stay_too_long(value: object) -> object:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
    return value


def late(value: object) -> None:
    raise LookupError(value)


async def cancel_after(seconds: float, run: Coroutine[Any, Any, Any]) -> None:
    task = asyncio.create_task(run)
    asyncio.get_running_loop().call_later(seconds, task.cancel)
    await task


ENDS: dict[str, Ends] = {
    "deadline": Ends(wait_for_ever, "tt", 1),
    "deadline in a retry": Ends(Stage("s", slow, timeout=0.4, retries=9), "tt", 1),
    "no time for a retry": Ends(Stage("s", late, retries=1, retry_delay=9), "ee", 1),
    "deadline in each": Ends(Pipeline([pair, each(wait_for_ever)]), "ottttt", 1),
    "deadline in parallel": Ends(parallel(a=wait_for_ever, b=plus), "ottt", 1),
    "deadline in a pipeline": Ends(Pipeline([Pipeline([wait_for_ever])]), "tttt", 1),
    "deadline unnoticed": Ends(Pipeline([stay_too_long, plus]), "ott", 1),
    "timeout": Ends(Stage("s", wait_for_ever, timeout=1), "tt"),
    "timeout in a pipeline": Ends(Pipeline([Stage("s", wait_for_ever, timeout=1)]), "ttt"),
    "two timeouts": Ends(parallel(a=S(wait_for_ever, timeout=1), b=S(wait_for_ever, timeout=1)), "ttee"),
    "stray cancellation": Ends(cancel_itself, "cc"),
    "finish": Ends(parallel(a=finish_early, b=wait_for_ever), "fcff"),
    "failure": Ends(parallel(a=break_down, b=wait_for_ever), "ecee"),
    "its own TimeoutError": Ends(raise_timeout, "ee"),
    "KeyboardInterrupt": Ends(interrupt, "ee"),
    "KeyboardInterrupt in parallel": Ends(parallel(a=interrupt, b=wait_for_ever), "ecee"),
}


@pytest.mark.virtual
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("is_item", [False, True], ids=["run", "map"])
def test_outcomes(how: str, is_item: bool) -> None:
    step, expected, timeout = ENDS[how]
    seen: list[Event] = []
    pipeline = Pipeline([step], observers=[seen.append])

    async def main() -> None:
        if is_item:
            await pipeline.map([1], timeout=timeout)
        else:
            await pipeline.run(1, timeout=timeout)

    with contextlib.suppress(StageExecutionError, BatchError, KeyboardInterrupt, asyncio.CancelledError):
        run_virtually(main())
    (run,) = runs_of(seen)
    assert "".join(event.outcome[0] for event in seen if event.outcome) == expected
    assert run.end.item_index == (0 if is_item else None)


@pytest.mark.virtual
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_cancelled_run_and_all_in_it_end_cancelled(shape: str) -> None:
    seen: list[Event] = []
    pipeline = Pipeline([SHAPES[shape](wait_for_ever)], observers=[seen.append])
    with pytest.raises(asyncio.CancelledError):
        await cancel_after(1, pipeline.run(1, timeout=60))
    assert len(runs_of(seen)) == 1
    last_start = max(index for index, event in enumerate(seen) if event.kind == "stage_start")
    ends = seen[last_start + 1 :]
    assert {event.outcome for event in ends} == {"cancelled"}
    assert all(isinstance(event.error, asyncio.CancelledError) for event in ends)


@pytest.mark.virtual
async def test_a_stage_cancelled_between_two_attempts() -> None:
    seen: list[Event] = []
    pipeline = Pipeline([Stage("s", late, retries=3, retry_delay=2)], observers=[seen.append])
    with pytest.raises(asyncio.CancelledError):
        await cancel_after(3, pipeline.run(1))
    assert [*map(line, seen)][2:] == [
        "s failed 1, again in 2.0",
        "s failed 2, again in 2.0",
        "s - cancelled 2",
        "run - cancelled",
    ]


@pytest.mark.virtual
async def test_a_run_that_is_cancelled_after_its_deadline_ends_cancelled() -> None:
    async def stubborn(value: object) -> None:
        await stay_too_long(value)
        await asyncio.sleep(3600)

    seen: list[Event] = []
    with pytest.raises(asyncio.CancelledError):
        await cancel_after(2, Pipeline([stubborn], observers=[seen.append]).run(1, timeout=1))
    (run,) = runs_of(seen)
    assert (run.end.outcome, run.end.duration) == ("cancelled", 2)


async def test_a_run_that_is_closed_ends_cancelled() -> None:
    seen: list[Event] = []
    inner = Pipeline([Stage("s", wait_for_ever, timeout=9)], name="inner", observers=[seen.append])
    run = Pipeline([fallback(inner)], observers=[seen.append]).run(1)
    run.send(None)
    run.close()
    assert [run.end.outcome for run in runs_of(seen)] == ["cancelled"] * 2
    assert all(isinstance(event.error, GeneratorExit) for event in seen if event.outcome)


async def test_a_run_that_never_started_is_not_told() -> None:
    seen: list[Event] = []
    task = asyncio.ensure_future(Pipeline([plus], observers=[seen.append]).run(1))
    if not task.done():  # it is, where tasks are eager
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not seen


async def test_a_stage_whose_before_stage_is_cancelled_is_not_told() -> None:
    async def cancelled(name: str, value: object) -> None:
        raise asyncio.CancelledError

    seen: list[Event] = []
    pipeline = Pipeline([plus], observers=[seen.append], before_stage=cancelled)
    with pytest.raises(asyncio.CancelledError):
        await pipeline.run(1)
    assert [*map(line, seen)] == ["run +", "run - cancelled"]


async def test_a_stage_lies_between_its_hooks_and_around_its_middlewares() -> None:
    order: list[str] = []

    async def middleware(call_next: Any, name: str, value: Any, context: Any) -> Any:
        order.append("in")
        try:
            return await call_next(value)
        finally:
            order.append("out")

    pipeline: Any = Pipeline(
        [plus],
        before_stage=lambda name, value: order.append("before"),
        after_stage=lambda name, value, output, error: order.append("after"),
        middlewares=[middleware],
        observers=[lambda event: order.append(event.kind)],
    )
    await pipeline.run(1)
    assert order == ["run_start", "before", "stage_start", "in", "out", "stage_end", "after", "run_end"]


# -- pipelines inside others, batches


async def test_an_inner_pipeline_tells_its_own_observers_its_own_paths() -> None:
    outer, inner = list[Event](), list[Event]()
    part = Pipeline([parallel(a=Stage("s", break_down))], name="inner", observers=[inner.append])
    pipeline = Pipeline(
        [pair, each(Pipeline([part], name="middle"), 1)], name="outer", observers=[outer.append]
    )
    assert [isinstance(result, Exception) for result in await pipeline.map([1, 2], 1, return_exceptions=True)]
    assert len(runs_of(outer)) == len(runs_of(inner)) == 2
    assert {event.pipeline for event in inner} == {"inner"}
    assert {event.item_index for event in inner} == {0, 1}
    assert {event.element for event in inner} == {(0,)}
    assert [event.stage for event in inner[:4]] == [None, "parallel", "parallel/a", "parallel/a"]
    assert "each/middle/inner/parallel/a" in {event.stage for event in outer}
    assert {event.run_id for event in inner}.isdisjoint(event.run_id for event in outer)


async def test_an_inner_pipeline_without_a_name_begins_its_own_paths() -> None:
    seen: list[Event] = []
    inner = Pipeline([plus, Pipeline([plus], name="")], name="", observers=[seen.append])
    await Pipeline([inner], observers=[repr]).run(1, timeout=1)
    assert [event.stage for event in seen if event.kind == "stage_start"] == ["plus", "", "/plus"]


OUTERS: dict[str, Callable[[Any], Any]] = {
    "pipeline": lambda step: Pipeline([step]),
    "each": lambda step: Pipeline([pair, each(step)]),
    "keep": lambda step: Pipeline([pair, keep(step)]),
    "parallel": lambda step: Pipeline([parallel(a=step, b=plus)]),
    "branch": lambda step: Pipeline([branch((plus, step))]),
    "predicate": lambda step: Pipeline([branch((step, plus))]),
    "otherwise": lambda step: Pipeline([branch((is_odd, plus), otherwise=step)]),
    "fallback": lambda step: Pipeline([fallback(break_down, step)]),
    "a middleware": lambda step: Pipeline([step], middlewares=[twice]),
    "a nested pipeline": lambda step: Pipeline([Pipeline([step], name="")], name=""),
    "an own run": lambda step: Pipeline([OwnPipeline([step])]),
    "a foreign step": lambda step: Pipeline([Foreign(step)]),
    "a bare step": lambda step: Foreign(fallback(step)),
}


@pytest.mark.virtual
@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("timeout", [0.5, 9.0], ids=["late", "in time"])
async def test_only_an_inner_pipeline_is_observed(outer: str, timeout: float) -> None:
    seen: list[Event] = []
    pipeline = OUTERS[outer](Pipeline([slow, plus], name="inner", observers=[seen.append]))
    is_outside = outer in ("an own run", "a foreign step", "a bare step")
    with contextlib.suppress(StageExecutionError, TimeoutError):
        if isinstance(pipeline, Pipeline):
            await pipeline.run(2, timeout=timeout)
        else:
            await asyncio.wait_for(pipeline.run(2), timeout)
    runs = runs_of(seen)
    paths = {tuple(event.stage for event in run.events if event.kind == "stage_start") for run in runs}
    late = "cancelled" if is_outside else "timeout"
    assert paths == {("slow", "plus") if timeout == 9 else ("slow",)}
    assert {run.end.outcome for run in runs} == {"ok" if timeout == 9 else late}
    seen.clear()
    await Pipeline([pipeline]).map([2, 2])
    assert {run.end.item_index for run in runs_of(seen)} == ({None} if is_outside else {0, 1})


async def test_elements_of_a_step_that_runs_alone() -> None:
    seen: list[Event] = []
    assert await each(Pipeline([plus], observers=[seen.append])).run([1, 2]) == [2, 3]
    assert {event.element for event in seen} == {(0,), (1,)}


@pytest.mark.virtual
@pytest.mark.parametrize("is_async", [False, True], ids=["list", "async source"])
@pytest.mark.parametrize("concurrency", [1, 3, "semaphore"])
async def test_each_item_of_a_batch_is_a_run(concurrency: Any, is_async: bool) -> None:
    seen: list[Event] = []
    pipeline = Pipeline([slow, Stage("odd", fail_if_odd, retries=1)], observers=[seen.append])
    items: Any = Source(range(6), 0.25) if is_async else range(6)
    limit = asyncio.Semaphore(2) if concurrency == "semaphore" else concurrency
    results: list[Any] = await pipeline.map(items, limit, return_exceptions=True)
    runs = {run.end.item_index: run for run in runs_of(seen)}
    assert {index: run.end.outcome for index, run in runs.items()} == dict(enumerate(["ok", "error"] * 3))
    for index, result in enumerate(results):
        error = runs[index].end.error
        assert error is (result if index % 2 else None)
        assert getattr(error, "item_index", index) == index
        assert len(runs[index].events) == (8 if index % 2 else 6)


def fail_if_odd(value: int) -> int:
    if value % 2:
        raise LookupError(value)
    return value


@pytest.mark.parametrize("how", ["map", "stream"])
async def test_the_error_of_an_item_names_it_when_it_is_told(how: str) -> None:
    named: list[Any] = []

    def look(event: Event) -> None:
        if event.kind == "run_end" and isinstance(event.error, StageExecutionError):
            named.append((event.error.stage_name, event.error.item_index, event.error.item))

    pipeline = Pipeline([fail_if_odd], observers=[look])
    if how == "map":
        await pipeline.map([0, 1, 2, 3], return_exceptions=True)
    else:
        async with pipeline.stream([0, 1, 2, 3]) as results:
            assert [outcome.index async for outcome in results.outcomes()] == [0, 1, 2, 3]
    assert named == [("fail_if_odd", 1, 1), ("fail_if_odd", 3, 3)]


@pytest.mark.virtual
async def test_what_a_batch_and_a_stream_leave_ends_cancelled() -> None:
    seen: list[Event] = []
    pipeline = Pipeline([lambda value: asyncio.sleep(value, value), break_down], observers=[seen.append])
    with pytest.raises(BatchError):
        await pipeline.map([1, 2, 3, 4], 3)
    assert [f"{run.end.item_index} {run.end.outcome}" for run in runs_of(seen)] == [
        "0 error",
        "1 cancelled",
        "2 cancelled",
    ]
    seen.clear()
    async with pipeline.replace(stages=pipeline.stages[:1]).stream([1, 2, 3, 4], 2) as results:
        async for _ in results:
            break
    ends = {run.end.item_index: run.end.outcome for run in runs_of(seen)}
    assert ends == {0: "ok", 1: "cancelled", 2: "cancelled"}


async def test_a_subclass_with_its_own_run_does_not_know_the_item() -> None:
    for make, indexes in ((OwnPipeline, {None}), (SubPipeline, {0, 1})):
        seen: list[Event] = []
        await make([plus], observers=[seen.append]).map([1, 2])
        assert len(runs_of(seen)) == 2
        assert {event.item_index for event in seen} == indexes


async def test_several_observers_are_told_the_same_in_order_and_of_ends_the_other_way_round() -> None:
    seen: list[Any] = []
    observers = [lambda event, name=name: seen.append((name, event)) for name in "abc"]
    await Pipeline([plus], observers=observers).run(1)
    assert [name for name, _ in seen] == [*"abcabccbacba"]
    assert len({event for _, event in seen}) == 4
    seen.clear()
    part = Pipeline([plus], name="part", observers=observers[2:])
    await Pipeline([part], observers=observers[:2]).run(1)
    order = ["".join(name for name, event in seen if event.kind == kind) for kind in KINDS]
    assert order == ["abc", "ababc", "", "cbaba", "cba"]


async def linger(call_next: Any, name: str, value: Any, context: Any) -> Any:
    try:
        return await call_next(value)
    except StageExecutionError:
        await asyncio.sleep(3600)


@pytest.mark.virtual
@pytest.mark.parametrize("observers", [[], [repr]], ids=["plain", "observed"])
async def test_attempts_of_a_stage_whose_middleware_the_deadline_has_interrupted(observers: Any) -> None:
    pipeline: Any = Pipeline([Stage("s", break_down, retries=2)], middlewares=[linger], observers=observers)
    for whole in (pipeline, Pipeline([pipeline], observers=observers)):
        with pytest.raises(StageExecutionError) as failed:
            await whole.run(1, timeout=1)
        assert isinstance(failed.value.original_error, DeadlineExceeded)
        assert failed.value.attempts == 3


async def test_an_event_shows_what_it_carries() -> None:
    _, start, failed, end, _ = await told(Pipeline([Stage("s", break_down)], name="p"))
    common = f"time={start.time!r}, run_id={start.run_id!r}, pipeline='p', stage='s'"
    assert repr(start) == f"Event(kind='stage_start', {common})"
    assert repr(failed).endswith("error=LookupError(1), attempt=1, will_retry=False)")
    assert f"outcome='error', attempts=1, duration={end.duration!r}, error=StageExecutionError(" in repr(end)
    assert len(start.run_id) == 16
    assert int(start.run_id, 16) >= 0


async def test_run_ids_do_not_depend_on_the_seed_of_the_program() -> None:
    ids, state = [], random.getstate()
    for _ in range(2):
        random.seed(1)
        ids.append((await told(Pipeline([plus])))[0].run_id)
    random.setstate(state)
    assert len({*ids}) == 2


# -- observers that fail


class BrokenObserverError(Exception):
    pass


def breaks_at(kind: str) -> Callable[[Event], None]:
    def broken(event: Event) -> None:
        if event.kind == kind:
            raise BrokenObserverError(event)

    return broken


KINDS = ["run_start", "stage_start", "attempt_failed", "stage_end", "run_end"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [plus, break_down, finish_early])
async def test_an_observer_that_fails_is_logged_and_the_run_goes_on(
    kind: str, last: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = list[Event](), list[Event]()
    stages: list[Any] = [Stage("plain", plus), Stage("s", last, retries=1), parallel(a=last)]
    expected = await Pipeline(stages).try_run(1)
    caplog.set_level(logging.INFO)
    pipeline = Pipeline(stages, observers=[before.append, breaks_at(kind), after.append])
    outcome = await pipeline.try_run(1)
    assert (outcome.value, repr(outcome.error)) == (expected.value, repr(expected.error))
    assert before == after
    assert len(runs_of(after)) == 1
    assert len(caplog.records) == sum(event.kind == kind for event in after)
    for record in caplog.records:
        assert (record.name, record.levelno) == ("async_pipeline", logging.ERROR)
        assert record.exc_info
        assert isinstance(record.exc_info[1], BrokenObserverError)
        assert record.exc_info[2] is not None
        assert kind in record.getMessage()


def raise_it(error: Exception) -> None:
    raise error


def raise_another(error: Exception) -> None:
    raise BrokenObserverError("told")  # a frame that raises what it was given would be part of a cycle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["row", "parallel", "each", "keep", "branch", "fallback", "deep"])
@pytest.mark.parametrize("retries", [0, 1])
async def test_what_on_hook_error_raises_leaves_the_run(kind: str, shape: str, retries: int) -> None:
    seen: list[Event] = []
    pipeline = Pipeline(
        [SHAPES[shape](Stage("s", break_down, retries=retries))],
        observers=[breaks_at(kind), seen.append],
        on_hook_error=raise_it,
    )
    with pytest.raises((BrokenObserverError, StageExecutionError)) as failed:
        await pipeline.run(1)
    assert len(runs_of(seen)) == 1
    if shape == "row" or kind.startswith("run"):
        assert isinstance(failed.value, BrokenObserverError)


async def test_on_hook_error_gets_the_errors_of_hooks_and_observers(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = []

    def broken(name: str, value: object) -> None:
        raise LookupError(name)

    pipeline: Any = Pipeline(
        [plus], before_stage=broken, observers=[breaks_at("stage_end")], on_hook_error=errors.append
    )
    assert await pipeline.run(1) == 2
    assert [type(error) for error in errors] == [LookupError, BrokenObserverError]
    assert not caplog.records


@pytest.mark.parametrize("hook", ["before_stage", "after_stage"])
@pytest.mark.parametrize("last", [plus, break_down, finish_early])
async def test_what_on_hook_error_raises_of_a_hook_leaves_the_run(hook: str, last: Any) -> None:
    def broken(*args: object) -> None:
        raise BrokenObserverError(args)

    outer, inner = list[Event](), list[Event]()
    hooks: Any = {hook: broken}
    part = Pipeline([last], name="part", observers=[inner.append], on_hook_error=raise_it, **hooks)
    with pytest.raises(BrokenObserverError):
        await Pipeline([Pipeline([part], name="middle")], observers=[outer.append]).run(1)
    for seen in (outer, inner):
        (run,) = runs_of(seen)
        assert isinstance(run.end.error, BrokenObserverError)
    assert len(inner) == (2 if hook == "before_stage" else 5 if last is break_down else 4)


async def test_an_inner_pipelines_errors_are_for_its_own_on_hook_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner_errors, outer_errors = list[Exception](), list[Exception]()
    broken = breaks_at("stage_start")
    inner = Pipeline([plus], name="inner", observers=[broken], on_hook_error=inner_errors.append)
    await Pipeline([inner], observers=[broken], on_hook_error=outer_errors.append).run(1)
    assert len(inner_errors) == 1  # of its stage
    assert len(outer_errors) == 2  # of that, too, and of the inner pipeline
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_is_no_exception_leaves_the_run_when_all_were_told(
    kind: str, error: type[BaseException]
) -> None:
    def broken(event: Event) -> None:
        if event.kind == kind:
            raise error

    before, after = list[Event](), list[Event]()
    observers: Any = [before.append, broken, after.append]
    inner = Pipeline([Stage("s", break_down, retries=1)], observers=observers)
    with pytest.raises(error):
        run_virtually(Pipeline([Pipeline([inner])]).run(1))
    assert before == after
    assert len(runs_of(after)) == 1


# -- context variables

span: ContextVar[str] = ContextVar("span")


class Tracer:
    """Keeps a context variable as long as a stage, as tracers do."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, Key], Any] = {}

    def __call__(self, event: Event) -> None:
        key = event.run_id, key_of(event)
        if event.kind.endswith("start"):
            self.tokens[key] = span.set(f"{span.get('')}>{line(event).split()[0]}")
        elif event.kind.endswith("end"):
            span.reset(self.tokens.pop(key))


def look(value: object) -> str:
    return span.get("nothing")


async def look_later(value: object) -> str:
    await asyncio.sleep(0)
    return span.get("nothing")


def in_thread(value: object) -> str:
    return span.get("nothing")


LOOKERS = [
    look,
    look_later,
    pytest.param(Stage("look", in_thread, executor="thread"), marks=pytest.mark.threads),
]


@pytest.mark.parametrize("looker", LOOKERS)
@pytest.mark.parametrize("outer", ["nothing", "request"])
async def test_what_an_observer_sets_is_seen_by_the_handler(looker: Any, outer: str) -> None:
    tracer = Tracer()
    stage = Stage("look", getattr(looker, "handler", looker), executor=getattr(looker, "executor", None))
    inner = Pipeline(
        [parallel(a=stage, b=Pipeline([stage], name="own")), parallel(kept=merge, then=stage)], name="inner"
    )
    pipeline = Pipeline([pair, each(inner)], name="p", observers=[tracer])
    token = span.set(outer) if outer != "nothing" else None
    before = copy_context()
    start = ">run" if token is None else f"{outer}>run"
    path = f"{start}>each>each/inner[{{0}}]>each/inner/parallel[{{0}}]>each/inner/parallel/"
    for results in ([await pipeline.run(1)], await pipeline.map([1, 2], 1)):
        for result in results:
            for index, element in enumerate(result):
                here = path.format(index)
                assert element["then"] == f"{here}then[{index}]"
                assert element["kept"] == {
                    "a": f"{here}a[{index}]",
                    "b": f"{here}b[{index}]>each/inner/parallel/b/look[{index}]",
                }
    assert dict(copy_context().items()) == dict(before.items())
    assert not tracer.tokens
    if token is not None:
        span.reset(token)


def merge(value: object) -> object:
    return value


@pytest.mark.virtual
@pytest.mark.parametrize(
    "end", [plus, break_down, finish_early, wait_for_ever, Stage("s", wait_for_ever, timeout=1)]
)
@pytest.mark.parametrize("how", ["timeout", "cancelled", "map"])
async def test_what_an_observer_sets_can_be_taken_back_at_every_end(end: Any, how: str) -> None:
    errors: list[Exception] = []
    tracers = [Tracer(), Tracer(), Tracer()]
    part = Pipeline([fallback(end)], observers=tracers[2:], on_hook_error=errors.append)
    inner = each(parallel(a=end, b=wait_for_ever, c=part))
    pipeline: Any = Pipeline([pair, inner], observers=tracers[:2], on_hook_error=errors.append)
    with contextlib.suppress(StageExecutionError, asyncio.CancelledError):
        if how == "map":
            await pipeline.map([1, 2, 3], 2, timeout=9, return_exceptions=True)
        elif how == "timeout":
            await pipeline.run(1, timeout=9)
        else:
            await cancel_after(0.5, pipeline.run(1))
    assert not any(tracer.tokens for tracer in tracers)
    assert not errors
    assert span.get("nothing") == "nothing"


@pytest.mark.parametrize("variable", ["nothing", "request"])
async def test_a_worker_of_a_batch_stays_when_an_observer_has_cleaned_up(variable: str) -> None:
    tasks: set[Any] = set()
    token = span.set(variable) if variable != "nothing" else None
    pipeline = Pipeline(
        [lambda value: tasks.add(asyncio.current_task()), look_later], observers=[Tracer(), Tracer()]
    )
    await pipeline.map(range(20), 2)
    assert len(tasks) == 2
    if token is not None:
        span.reset(token)


# -- memory


def keeps_nothing(event: Event) -> None:
    repr(event)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "end",
    [add_one, break_down, finish_early, wait_for_ever, Stage("s", break_down, retries=1, on_error=saved)],
    ids=["value", "failure", "finish", "deadline", "on_error"],
)
@pytest.mark.parametrize("how", ["run", "timeout", "map", "run_start", "stage_start", "stage_end", "run_end"])
def test_an_observed_end_keeps_nothing_alive(shape: str, end: Any, how: str) -> None:
    """No reference cycle runs through an event, an error, its traceback and our frames."""
    if (end is wait_for_ever or shape in ("parallel", "deep")) and is_kept_alive(cancel_a_group):
        pytest.skip("a TaskGroup that is cancelled makes a cycle of its own before Python 3.13.1")

    async def call(item: Large) -> None:
        inner = Pipeline([SHAPES[shape](end)], observers=[keeps_nothing])
        observers = [keeps_nothing, breaks_at(how)]  # nothing breaks at a "run" and the like
        pipeline: Any = Pipeline([inner], observers=observers, on_hook_error=raise_another)
        if how == "map":
            await pipeline.map([item], timeout=60, return_exceptions=True)
            return
        with contextlib.suppress(BrokenObserverError):
            await pipeline.run(item, timeout=60 if how == "timeout" or end is wait_for_ever else None)

    assert not is_kept_alive(call)


def test_what_on_error_has_handled_is_let_go_where_nobody_looks_on() -> None:
    async def call(item: Large) -> None:
        await Pipeline([Stage("s", break_down, on_error=saved)]).run(item, timeout=60)

    assert not is_kept_alive(call)


# -- building


async def async_observer(event: Event) -> None: ...


async def async_generator(event: Event) -> Any:
    yield


class AsyncObserver:
    async def __call__(self, event: Event) -> None: ...


class Recorder(list[Event]):
    """An observer that can be iterated over, and would be taken for no observer at all."""

    def __call__(self, event: Event) -> None:
        self.append(event)


NO_OBSERVERS: dict[str, tuple[Any, str]] = {
    "no list": (
        print,
        "observers must be a list of callables, not <built-in function print>; write observers=",
    ),
    "an observer that can be iterated over": (Recorder(), "write observers=[observer]"),
    "a str": ("print", "observers must be a list of callables, not 'print'"),
    "None": (None, "observers must be a list of callables, not None"),
    "strings": (["print"], "an observer must be a sync callable observer(event), not 'print'"),
    "a list in a list": ([[print]], "an observer must be a sync callable observer(event), not [<built-in"),
    "a class": ([Tracer], "of a class, an instance"),
    "a stage": ([Stage("s", plus)], "an observer must be a sync callable observer(event), not Stage('s')"),
    "async": ([async_observer], "is async, and nobody would await it"),
    "async, partial": ([partial(async_observer)], "is async, and nobody would await it"),
    "async object": ([AsyncObserver()], "is async, and nobody would await it"),
    "async method": ([AsyncObserver().__call__], "is async, and nobody would await it"),
    "async generator": ([async_generator], "is async, and nobody would await it"),
    "AsyncMock": ([AsyncMock()], "is async, and nobody would await it"),
    "too few parameters": ([lambda: None], "it must take observer(event), not ()"),
    "too many parameters": ([lambda event, other: None], "it must take observer(event), not (event, other)"),
    "keyword": ([lambda event, *, other: None], "it must take observer(event), not (event, *, other)"),
    "the second": ([print, 1], "not 1"),
}


@pytest.mark.parametrize("what", NO_OBSERVERS)
def test_what_is_no_observer(what: str) -> None:
    observers, message = NO_OBSERVERS[what]
    with pytest.raises(TypeError, match=re.escape(message)):
        Pipeline([plus], observers=observers)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("print", "must be a sync callable on_hook_error(error), not 'print'"),
        (
            ValueError,
            "must be a sync callable on_hook_error(error), not <class 'ValueError'>; of a class, an",
        ),
        (async_observer, "must be sync, but <function async_observer"),
        (AsyncObserver(), "must be sync, but <test"),
        (async_generator, "must be sync, but <function async_generator"),
        (lambda: None, "can't be used: it must take on_hook_error(error), not ()"),
        (lambda error, event: None, "can't be used: it must take on_hook_error(error), not (error, event)"),
    ],
)
def test_what_is_no_on_hook_error(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^on_hook_error .*{re.escape(message)}"):
        Pipeline([plus], on_hook_error=function)


async def test_observers_may_be_any_iterable_of_callables() -> None:
    seen: list[Event] = []
    defaults: Any = lambda event, context=None: seen.append(context)  # noqa: E731
    several: list[Any] = [(seen.append,), iter([seen.append]), {seen.append: 1}, [defaults]]
    for observers in several:
        seen.clear()
        pipeline: Any = Pipeline([plus], observers=observers)
        assert isinstance(pipeline.observers, tuple)
        assert [await pipeline.run(1) for _ in range(2)] == [2, 2]
        assert len(seen) == 8
    assert Pipeline([plus]).observers == ()
    assert Pipeline([plus]).on_hook_error is None


async def test_a_pipeline_with_observers_stays_a_step_when_it_is_joined() -> None:
    seen: list[Event] = []
    inner = Pipeline([plus], name="inner", observers=[seen.append])
    for joined in (inner | plus, plus | inner):
        assert len(joined.stages) == 2
        assert inner in joined.stages
        assert await joined.run(1) == 3
    assert len(runs_of(seen)) == 2
    assert len((Pipeline([plus], on_hook_error=raise_it) | plus).stages) == 2
    assert all(event.stage in (None, "plus") for event in seen)


async def test_replace_keeps_the_rest() -> None:
    class Own(Pipeline[Any, Any]):
        def __init__(self, extra: str) -> None:
            super().__init__([plus], name="own", observers=[seen.append], on_hook_error=raise_it)
            self.extra = extra

    seen: list[Event] = []
    pipeline = Own("extra")
    twin = pipeline.replace(observers=[*pipeline.observers, seen.append])
    assert (type(twin), twin.extra, twin.name, twin.stages) == (Own, "extra", "own", pipeline.stages)
    assert (twin.on_hook_error, len(twin.observers), len(pipeline.observers)) == (raise_it, 2, 1)
    await twin.run(1)
    assert len(seen) == 2 * 4
    plain = Pipeline([twin]).replace(name="other", middlewares=[cached])
    assert await plain.run(1) == 1
    with pytest.raises(TypeError, match="observer"):
        pipeline.replace(observer=[print])
    with pytest.raises(TypeError, match="observers must be a list"):
        pipeline.replace(observers=print)


def test_observers_are_shown_and_written() -> None:
    pipeline = Pipeline([len], observers=[keeps_nothing, lambda event: None], on_hook_error=raise_it)
    assert str(pipeline).splitlines()[0] == "pipeline: 2 observers, on_hook_error raise_it"
    assert "2 observers" in pipeline.to_mermaid()
    with pytest.raises(ValueError, match="observers"):
        pipeline.dumps()
    registry: Any = {
        "first": pipeline.observers[0],
        "second": pipeline.observers[1],
        "raise": raise_it,
        "len": len,
    }
    loaded = Pipeline.loads(pipeline.dumps(registry=registry), registry=registry)
    assert loaded.observers == pipeline.observers
    assert loaded.on_hook_error is raise_it


@pytest.mark.parametrize("fails", [False, True], ids=["ok", "error"])
async def test_what_has_others_inside_is_attempted_once(fails: bool) -> None:
    calls: list[int] = []

    def flaky(value: int) -> int:
        calls.append(value)
        if fails or len(calls) < 3:
            raise ValueError
        return value

    ends: list[Event] = []
    inner = Pipeline([Stage("flaky", flaky, retries=2)], name="inner")
    pipeline = Pipeline([parallel(a=fallback(inner))], observers=[ends.append])
    with pytest.raises(StageExecutionError) if fails else contextlib.nullcontext():
        await pipeline.run(1)
    attempts = {event.stage: event.attempts for event in ends if event.outcome is not None}
    assert attempts == {
        None: 1,
        "parallel": 1,
        "parallel/a": 1,
        "parallel/a/inner": 1,
        "parallel/a/inner/flaky": 3,
    }


class NoTruth:
    """Like an array, of which nobody can say whether it holds."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


def undecided(value: Any) -> NoTruth:
    return NoTruth()


@pytest.mark.parametrize("step", [branch((undecided, str)), keep(undecided)], ids=["branch", "keep"])
async def test_a_predicate_whose_value_has_no_truth_has_failed(step: Any) -> None:
    seen: list[Event] = []
    with pytest.raises(StageExecutionError) as failed:
        await Pipeline([step], observers=[seen.append]).run([1])
    assert failed.value.stage_name == f"{step.name}/undecided"
    outcomes = [(event.stage, event.outcome) for event in seen if event.kind == "stage_end"]
    assert outcomes == [(f"{step.name}/undecided", "error"), (step.name, "error")]
