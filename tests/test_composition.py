"""Trees of steps, compared with a model of them: plain recursion over virtual time, without any asyncio.

What each handler does depends on the seed, its name, its input and the moment it is called, so the model can
ask for it, too. Moments are multiples of a tiny power of two, so that sums are exact, and no two things
happen at the same time by chance. On the coarse clock they do; then only what always holds is checked.
"""

import asyncio
import contextlib
import gc
import heapq
import math
import random
import sys
import weakref
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    Finish,
    Pipeline,
    Stage,
    StageExecutionError,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
)
from async_pipeline.testing import VirtualClockLoop
from tests.conftest import EagerLoop
from tests.helpers import run_virtually

TICK = 2.0**-20
SECOND = 2**20
LOOPS = [VirtualClockLoop, EagerLoop] if sys.version_info >= (3, 12) else [VirtualClockLoop]
FOR_EVER = math.inf
START = 7  # the value that every run gets


class ScriptedError(Exception):
    """What a handler raises; its arguments say which call of which handler it was."""


class ReactionError(Exception):
    """What a handler makes of its cancellation."""


class SourceError(Exception):
    """A source's own."""


def digest(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


class Script(NamedTuple):
    """What one call of a handler does."""

    seconds: float
    ending: str
    reaction: str  # to its cancellation
    cleanup: float


@dataclass
class World:
    """What the handlers of one run go by, and what they leave behind."""

    seed: int
    is_coarse: bool = False
    calls: Counter[Any] = field(default_factory=Counter)
    hooks: Counter[str] = field(default_factory=Counter)
    stages: dict[str, Any] = field(default_factory=dict)
    timeouts: dict[float, Any] = field(default_factory=dict)
    is_ambiguous: bool = False  # two calls end at the same time
    opened: int = 0
    closed: int = 0
    running: int = 0

    def seconds(self, rng: random.Random, most: float) -> float:
        return rng.randint(0, 2) / 2 if self.is_coarse else rng.randint(1, int(most * SECOND)) * TICK

    def script(self, name: str, value: object, time: float) -> Script:
        rng = random.Random(digest(self.seed, name, value, time))
        seconds = self.seconds(rng, 4)
        ending = rng.choices(["value", "error", "finish", "stray"], [40, 4, 1, 1])[0]
        reaction = rng.choices(["none", "error", "finish", "value"], [8, 2, 1, 2 * self.is_coarse])[0]
        cleans_up = rng.random() < 0.4 or reaction == "finish"
        return Script(seconds, ending, reaction, self.seconds(rng, 1) if cleans_up else 0.0)

    def before(self, name: str, value: object) -> None:
        self.hooks[name] += 1

    def after(self, name: str, value: object, output: object, error: object) -> None:
        self.hooks[name] -= 1

    def check(self) -> None:
        """What holds however a run has ended."""
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert self.running == 0
        assert self.opened == self.closed
        assert not any(self.hooks.values())


@dataclass
class Source:
    """Elements that come one by one, each after a while, and perhaps an error after the last."""

    items: Sequence[int]
    seconds: float
    fails: bool
    world: World = field(repr=False)

    def __aiter__(self) -> AsyncIterator[int]:
        return self.generate()

    async def generate(self) -> AsyncIterator[int]:
        self.world.opened += 1
        try:
            for item in self.items:
                await asyncio.sleep(self.seconds)
                yield item
            if self.fails:
                await asyncio.sleep(self.seconds)
                raise SourceError
        finally:
            self.world.closed += 1


# -- the model


class Failure(NamedTuple):
    """What a StageExecutionError says; the error of a joint one is the set of its parts."""

    path: str
    error: Any
    attempts: int = 1
    element: tuple[int, ...] = ()
    earlier: "tuple[Failure, ...]" = ()

    def at(self, index: int) -> "Failure":
        error = self.error
        if isinstance(error, frozenset):
            error = frozenset(part.at(index) for part in error)
        earlier = tuple(failure.at(index) for failure in self.earlier)
        return self._replace(error=error, element=(index, *self.element), earlier=earlier)

    def is_a(self, kind: str) -> bool:
        if isinstance(self.error, frozenset):
            return all(part.is_a(kind) for part in self.error)
        return bool(self.error.startswith(kind))


class End(NamedTuple):
    """How a step ends: ``what`` is its value, its Failure, a Finish's value, or where it was cancelled."""

    time: float
    kind: str  # "value", "failure", "finish", "cancelled"
    what: Any


Cancels = tuple[float, ...]  # when a step is cancelled from outside; only the first two can matter


def moment(end: End) -> float:
    return end.time


def first(times: Cancels) -> float:
    return times[0] if times else FOR_EVER


@dataclass
class Model:
    """What should happen in a run."""

    world: World
    deadline: float = FOR_EVER
    calls: list[Any] = field(default_factory=list)
    spans: list[tuple[str, float, float, float]] = field(default_factory=list)

    def run(self, node: "Node", value: Any, start: float, cancels: Cancels, path: str) -> End:
        end = node.expect(self, value, start, cancels, path)
        self.spans.append((path, start, end.time, first(cancels)))
        return end

    def expect(self, tree: "Row", value: Any, start: float, cancels: Cancels) -> End:
        end = tree.expect(self, value, start, cancels, "")
        self.world.is_ambiguous |= max(Counter(self.calls).values()) > 1
        return end

    def at_deadline(self) -> set[str]:
        """The steps that run when the time is up, and those that share in the cleaning up after a failure."""
        running = [span for span in self.spans if span[1] <= self.deadline <= span[2]]
        cleaning = min((span[3] for span in running), default=FOR_EVER)
        return {
            path
            for path, start, end, _ in self.spans
            if start <= self.deadline and end >= min(cleaning, self.deadline)
        }


def side_by_side(
    path: str, run: Callable[[Model, Cancels], list[End]], model: Model, start: float, cancels: Cancels
) -> End:
    """How a step ends whose parts ``run`` side by side: the first that fails, or the like, stops the rest."""

    def rehearse(cancels: Cancels) -> tuple[list[End], float]:
        ends = run(Model(model.world, model.deadline), cancels)
        return ends, max([start, *map(moment, ends)])

    rehearsed, over = rehearse(())
    origin = min((end for end in rehearsed if end.kind != "value"), key=moment, default=None)
    stops: Cancels = ()
    if origin is not None and origin.time <= first(cancels):
        stops = (origin.time,)
        over = max(origin.time, rehearse(stops)[1])
    ends = run(model, (*stops, *cancels[:1]))
    if first(cancels) < over:
        where = None if stops else shared([end.what for end in ends if end.kind == "cancelled"], path)
        return End(max([first(cancels), *map(moment, ends)]), "cancelled", where)
    if origin is None:
        return End(over, "value", [end.what for end in ends])
    if origin not in ends:
        ends.append(origin)  # of the source
    return unsuccessful(path, ends, origin, over)


def shared(paths: list[str | None], outer: str) -> str | None:
    """Where steps were cancelled together: None if that is open, because some were cleaning up already."""
    known = [path.split("/") for path in paths if path is not None]
    if len(known) < len(paths):
        return None
    same = takewhile(lambda names: len(set(names)) == 1, zip(*known, strict=False))
    return "/".join(names[0] for names in same) or outer


def unsuccessful(path: str, ends: list[End], origin: End, over: float) -> End:
    failures = [end.what for end in ends if end.kind == "failure"]
    finishes = [end for end in ends if end.kind == "finish"]
    if failures:
        joint = Failure(path, frozenset(failures))
        return End(over, "failure", failures[0] if len(failures) == 1 else joint)
    if finishes:
        return End(over, "finish", min(finishes, key=moment).what)
    return origin._replace(time=over)


# -- the steps of a tree


class Node:
    """A step: how to build it, and what the model expects of it."""

    name: str

    @abstractmethod
    def build(self, world: World) -> Any: ...

    @abstractmethod
    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End: ...

    def inner(self) -> list[tuple[str, "Node"]]:
        """The steps inside, by the names that they have there."""
        return []

    def paths(self, path: str) -> set[str]:
        """All that an error may be named by."""
        parts = [part.paths(f"{path}/{name}" if path else name) for name, part in self.inner()]
        return {path}.union(*parts)


@dataclass
class Leaf(Node):
    """A stage; ``gives`` says what it makes of its input."""

    name: str
    gives: str = "number"
    is_sync: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, world: World) -> Any:
        if self.name not in world.stages:  # a leaf that stands in several places is the same Stage there
            world.stages[self.name] = Stage(self.name, self.handler(world), **self.options)
        return world.stages[self.name]

    def handler(self, world: World) -> Any:
        def call(value: Any) -> Any:
            world.calls[self.name, repr(value), asyncio.get_running_loop().time()] += 1
            return self.output(world, value)

        async def work(value: Any) -> Any:
            loop = asyncio.get_running_loop()
            key = self.name, repr(value), loop.time()
            output = call(value)
            script = world.script(*key)
            world.running += 1
            try:
                await asyncio.sleep(script.seconds)
            except asyncio.CancelledError as error:
                return await self.react(error, script, key, output)
            finally:
                world.running -= 1
            return await self.end(script, key, output)

        return call if self.is_sync else work

    async def react(self, error: BaseException, script: Script, key: Any, output: Any) -> Any:
        if "timeout" in self.options:
            raise error
        if script.cleanup:
            await asyncio.sleep(script.cleanup)
        if script.reaction == "error":
            raise ReactionError(*key)
        if script.reaction == "finish":
            raise Finish(output)
        if script.reaction == "none":
            raise error
        return output

    async def end(self, script: Script, key: Any, output: Any) -> Any:
        if script.ending == "error":
            raise ScriptedError(*key)
        if script.ending == "finish":
            raise Finish(output)
        if script.ending == "stray":
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        return output

    def output(self, world: World, value: Any) -> Any:
        number = digest(self.name, value)
        if self.gives == "number":
            return number
        if self.gives == "bool":
            return number % 4 > 0
        if number % 16 == 0:
            return number  # nothing to iterate over
        items = [digest(number, index) for index in range(number % 6)]
        if self.gives == "list":
            return items
        return Source(items, (number % SECOND + 1) * TICK * (not world.is_coarse), number % 5 == 0, world)

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        if self.is_sync:
            model.calls.append((self.name, repr(value), start))
            return End(start, "value", self.output(model.world, value))
        delay = self.options.get("retry_delay", 0.0)
        for attempt in range(1, self.options.get("retries", 0) + 2):
            end = self.attempt(model, value, start, cancels, path)
            if end.kind != "failure":
                return end
            is_over = end.time >= first(cancels) or end.time + delay >= model.deadline
            if is_over or attempt > self.options.get("retries", 0):
                break
            if end.time + delay > first(cancels):
                return End(first(cancels), "cancelled", path)
            start = end.time + delay
        return end._replace(what=Failure(path, end.what, attempt))

    def attempt(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        key = self.name, repr(value), start
        model.calls.append(key)
        script, output = model.world.script(*key), self.output(model.world, value)
        limit = start + self.options.get("timeout", FOR_EVER)
        if min(start + script.seconds, limit) > first(cancels):
            return self.cancelled(script, key, output, cancels, path)
        if limit < start + script.seconds:
            model.world.is_ambiguous |= model.world.timeouts.setdefault(limit, key) != key
            return End(limit, "failure", "StageTimeoutError")
        kind = {"error": "failure", "stray": "cancelled"}.get(script.ending, script.ending)
        what = {"failure": repr(ScriptedError(*key)), "cancelled": path}.get(kind, output)
        return End(start + script.seconds, kind, what)

    def cancelled(self, script: Script, key: Any, output: Any, cancels: Cancels, path: str) -> End:
        if "timeout" in self.options:
            return End(cancels[0], "cancelled", path)
        over = cancels[0] + script.cleanup
        if cancels[1:] and cancels[1] < over:
            return End(cancels[1], "cancelled", path)
        kind = {"error": "failure", "none": "cancelled"}.get(script.reaction, script.reaction)
        what = {"failure": repr(ReactionError(*key)), "cancelled": path}.get(kind, output)
        return End(over, kind, what)


@dataclass
class Row(Node):
    """Steps in a row: a Pipeline, or the same joined by ``|``."""

    name: str
    parts: list[Node]
    is_joined: bool = False
    is_hooked: bool = False

    def build(self, world: World) -> Any:
        steps = [part.build(world) for part in self.parts]
        if not self.is_joined:
            hooks: dict[str, Any] = {"before_stage": world.before, "after_stage": world.after}
            return Pipeline(steps, name=self.name, **(hooks if self.is_hooked else {}))
        joined = steps[0] | steps[1]
        for step in steps[2:]:
            joined = joined | step
        return joined

    def inner(self) -> list[tuple[str, Node]]:
        return [(part.name, part) for part in self.flat()]

    def flat(self) -> Iterator[Node]:
        for part in self.parts:
            if self.is_joined and isinstance(part, Row) and not part.is_hooked:
                yield from part.flat()
            else:
                yield part

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        end = End(start, "value", value)
        for part in self.flat():
            inner = f"{path}/{part.name}" if path else part.name
            end = model.run(part, end.what, end.time, cancels, inner)
            if end.kind != "value":
                break
        return end


@dataclass
class Parallel(Node):
    name: str
    parts: dict[str, Node]

    def build(self, world: World) -> Any:
        return parallel({key: part.build(world) for key, part in self.parts.items()}, name=self.name)

    def inner(self) -> list[tuple[str, Node]]:
        return [*self.parts.items()]

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        def run(model: Model, cancels: Cancels) -> list[End]:
            parts = self.parts.items()
            return [model.run(part, value, start, cancels, f"{path}/{key}") for key, part in parts]

        end = side_by_side(path, run, model, start, cancels)
        is_value = end.kind == "value"
        return end._replace(what=dict(zip(self.parts, end.what, strict=True))) if is_value else end


@dataclass
class Each(Node):
    """``each``, and ``keep`` if ``keeps``."""

    name: str
    part: Node
    concurrency: int
    keeps: bool = False

    def build(self, world: World) -> Any:
        make: Any = keep if self.keeps else each
        return make(self.part.build(world), self.concurrency, name=self.name)

    def inner(self) -> list[tuple[str, Node]]:
        return [(self.part.name, self.part)]

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        if isinstance(value, (int, bool)):
            return End(start, "failure", Failure(path, "TypeError"))
        source = value if isinstance(value, Source) else Source(list(value), 0.0, False, model.world)

        def run(model: Model, cancels: Cancels) -> list[End]:
            return self.elements(model, source, start, cancels, path)

        end = side_by_side(path, run, model, start, cancels)
        if end.kind == "value" and self.keeps:
            return end._replace(
                what=[item for item, kept in zip(source.items, end.what, strict=True) if kept]
            )
        return end

    def elements(self, model: Model, source: Source, start: float, cancels: Cancels, path: str) -> list[End]:
        """How the elements end that are begun, and the source, if it fails before it is cancelled."""
        free, pulled, stop = [start] * self.concurrency, start, first(cancels)
        ends: list[End] = []
        for index, item in enumerate(source.items):
            pulled = max(pulled, free[0]) + source.seconds
            if pulled > stop:
                return ends
            end = model.run(self.part, item, pulled, cancels, f"{path}/{self.part.name}")
            if end.kind == "failure":
                end = end._replace(what=end.what.at(index))
            if end.kind != "value":
                stop = min(stop, end.time)
            ends.append(end)
            heapq.heapreplace(free, end.time if end.kind == "value" else FOR_EVER)
        failed = max(pulled, free[0]) + source.seconds
        if source.fails and failed < stop:
            ends.append(End(failed, "failure", Failure(path, "SourceError")))
        return ends


@dataclass
class Branch(Node):
    name: str
    cases: list[tuple[Node, Node]]
    otherwise: Node | None

    def build(self, world: World) -> Any:
        cases = [(predicate.build(world), step.build(world)) for predicate, step in self.cases]
        otherwise: Any = self.otherwise and self.otherwise.build(world)
        return branch(*cases, otherwise=otherwise, name=self.name)

    def inner(self) -> list[tuple[str, Node]]:
        return [(part.name, part) for part in (*chain(*self.cases), self.otherwise) if part]

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        for predicate, step in self.cases:
            end = model.run(predicate, value, start, cancels, f"{path}/{predicate.name}")
            if end.kind != "value":
                return end
            start = end.time
            if end.what:
                return model.run(step, value, start, cancels, f"{path}/{step.name}")
        if self.otherwise is None:
            return End(start, "failure", Failure(path, "ValueError"))
        return model.run(self.otherwise, value, start, cancels, f"{path}/{self.otherwise.name}")


@dataclass
class Fallback(Node):
    name: str
    parts: list[Node]
    on: type[Exception]

    def build(self, world: World) -> Any:
        return fallback(*(part.build(world) for part in self.parts), on=self.on, name=self.name)

    def inner(self) -> list[tuple[str, Node]]:
        return [(part.name, part) for part in self.parts]

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        earlier: tuple[Failure, ...] = ()
        for left, part in zip(range(len(self.parts))[::-1], self.parts, strict=True):
            end = model.run(part, value, start, cancels, f"{path}/{part.name}")
            if end.kind != "failure":
                return end
            is_caught = self.on is Exception or end.what.is_a(self.on.__name__)
            if left == 0 or end.time >= first(cancels) or not is_caught:
                break
            earlier, start = (*earlier, end.what), end.time
        return end._replace(what=end.what._replace(earlier=(*earlier, *end.what.earlier)))


@dataclass
class Require(Node):
    name: str
    fields: tuple[str, ...]

    def build(self, world: World) -> Any:
        return require(*self.fields, name=self.name)

    def expect(self, model: Model, value: Any, start: float, cancels: Cancels, path: str) -> End:
        missing = [name for name in self.fields if not self.has(value, name)]
        return (
            End(start, "failure", Failure(path, "MissingFieldsError"))
            if missing
            else End(start, "value", value)
        )

    def has(self, value: Any, name: str) -> bool:
        return name in value if isinstance(value, dict) else hasattr(value, name)


# -- random trees


class Gardener:
    """Draws a tree."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.leaves: list[Leaf] = []
        self.names = 0

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def number(self, most: int) -> int:
        return self.draw(st.integers(0, most))

    def leaf(self, gives: str = "number", *, may_be_sync: bool = True) -> Leaf:
        if gives == "number" and self.leaves and self.number(5) == 5:
            return self.leaves[self.number(len(self.leaves) - 1)]
        is_sync = may_be_sync and self.number(5) == 5
        leaf = Leaf(self.name("stage"), gives, is_sync, {} if is_sync else self.options())
        if gives == "number" and not is_sync:
            self.leaves.append(leaf)
        return leaf

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.number(2) == 2:
            options = {"retries": 2, "retry_delay": self.number(1) * 0.75}
        if self.number(4) == 4:
            options["timeout"] = 2.5 + self.names * TICK
        return options

    def node(self, depth: int) -> Node:
        kinds = [
            self.leaf,
            self.row,
            self.parallel,
            self.each,
            self.keep,
            self.branch,
            self.fallback,
            self.require,
        ]
        make: Any = kinds[self.number(len(kinds) - 1)]
        return make(depth - 1) if depth and make != self.leaf else self.leaf()

    def nodes(self, depth: int) -> list[Node]:
        return [self.node(depth) for _ in range(2 + self.number(1))]

    def row(self, depth: int, parts: list[Node] | None = None) -> Row:
        is_joined = self.number(1) == 1
        name = "pipeline" if is_joined else self.name("row")
        return Row(name, parts or self.nodes(depth), is_joined, not is_joined and self.number(1) == 1)

    def parallel(self, depth: int) -> Parallel:
        return Parallel(self.name("parallel"), {f"key{n}": node for n, node in enumerate(self.nodes(depth))})

    def elements(self) -> Leaf:
        return self.leaf(["list", "source"][self.number(1)], may_be_sync=False)

    def each(self, depth: int) -> Row:
        inner = self.node(depth)
        return self.row(0, [self.elements(), Each(self.name("each"), inner, 1 + self.number(2))])

    def keep(self, depth: int) -> Row:
        keep = Each(self.name("keep"), self.leaf("bool"), 1 + self.number(2), keeps=True)
        return self.row(0, [self.elements(), keep])

    def branch(self, depth: int) -> Branch:
        cases: list[tuple[Node, Node]] = [
            (self.leaf("bool", may_be_sync=False), node) for node in self.nodes(depth)
        ]
        return Branch(self.name("branch"), cases, self.node(depth) if self.number(1) else None)

    def fallback(self, depth: int) -> Fallback:
        on = [Exception, ScriptedError][self.number(1)]
        return Fallback(self.name("fallback"), self.nodes(depth), on)

    def require(self, depth: int) -> Row:
        fields = ("real",) if self.number(3) else ("key0", "real")
        first: Node = (
            self.leaf(may_be_sync=False)
            if self.number(1)
            else Row(self.name("row"), [self.leaf(may_be_sync=False), self.parallel(depth)])
        )
        return self.row(0, [first, Require(self.name("require"), fields)])


@st.composite
def trees(draw: st.DrawFn) -> Row:
    gardener = Gardener(draw)
    make: Any = [gardener.row, gardener.parallel, gardener.each, gardener.branch, gardener.fallback]
    return Row("root", [draw(st.sampled_from(make))(2) for _ in range(1 + gardener.number(1))])


# -- comparing


def what_is(error: BaseException) -> str:
    return repr(error) if isinstance(error, (ScriptedError, ReactionError)) else type(error).__name__


def joined(error: StageExecutionError) -> Sequence[Any]:
    """The failures that are one together; no handler here raises a group."""
    group = error.original_error
    return group.exceptions if isinstance(group, ExceptionGroup) else ()


def observed(error: StageExecutionError) -> Failure:
    assert error.__cause__ is error.original_error
    parts = joined(error)
    what: Any = frozenset(map(observed, parts)) if parts else what_is(error.original_error)
    assert len(what) == len(parts) or not parts
    return Failure(error.stage_name, what, error.attempts, error.element, tuple(map(observed, error.earlier)))


async def observe(run: Any) -> End:
    clock = asyncio.get_running_loop().time
    try:
        value = await run
    except StageExecutionError as error:
        return End(clock(), "failure", observed(error))
    except asyncio.CancelledError:
        return End(clock(), "cancelled", None)
    return End(clock(), "value", value)


def compare(actual: End, expected: End, model: Model) -> None:
    if expected.kind == "cancelled" and expected.time >= model.deadline:
        check_deadline(actual, expected, model)
    elif expected.kind == "cancelled":
        assert actual == expected._replace(what=None)
    elif expected.kind == "finish":
        assert actual == expected._replace(kind="value")
    else:
        assert actual == expected


def check_deadline(actual: End, expected: End, model: Model) -> None:
    assert (actual.time, actual.kind, actual.what.error) == (expected.time, "failure", "DeadlineExceeded")
    assert actual.what.path in model.at_deadline()
    assert expected.what in (None, actual.what.path)


moments = st.integers(0, 2**32).map(lambda number: (digest(number) % (10 * SECOND) + 1) * TICK)
seeds = st.integers(0, 2**32)
ways = st.sampled_from(["undisturbed", "timeout", "cancelled"])
many = settings(max_examples=150, deadline=None)


def run_on(loop: Any, main: Any) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main)


def without(calls: Counter[Any], ends: Sequence[End]) -> Counter[Any]:
    """The calls but those at the very moment of an end, which the model takes for cancelled by it."""
    moments = {end.time for end in ends}
    return Counter({call: count for call, count in calls.items() if call[2] not in moments})


@pytest.mark.parametrize("loop", LOOPS)
@many
@given(trees(), seeds, moments, ways)
def test_a_run_does_what_its_steps_say(loop: Any, tree: Row, seed: int, moment: float, how: str) -> None:
    world = World(seed)
    model = Model(world, moment if how == "timeout" else FOR_EVER)
    expected = model.expect(tree, START, 0.0, () if how == "undisturbed" else (moment,))
    assume(not world.is_ambiguous)

    async def main() -> None:
        pipeline = tree.build(world)
        run = pipeline.run(START, timeout=moment) if how == "timeout" else pipeline.run(START)
        task = asyncio.create_task(observe(run))
        if how == "cancelled":
            asyncio.get_running_loop().call_at(moment, task.cancel)
        compare(await task, expected, model)
        assert without(world.calls, [expected]) == without(Counter(model.calls), [expected])
        world.check()

    run_on(loop, main())


def expect_batch(
    tree: Row, items: range, workers: int, timeout: float, world: World
) -> list[tuple[End, Model]]:
    free, ends = [0.0] * workers, []
    for item in items:
        model = Model(world, free[0] + timeout)
        end = model.expect(tree, item, free[0], (model.deadline,))
        heapq.heapreplace(free, end.time)
        ends.append((end, model))
    return ends


@pytest.mark.parametrize("loop", LOOPS)
@many
@given(trees(), seeds, moments, st.integers(1, 3))
def test_each_item_of_a_batch_does(loop: Any, tree: Row, seed: int, timeout: float, workers: int) -> None:
    world = World(seed)
    expected = expect_batch(tree, range(4), workers, timeout, world)
    assume(not world.is_ambiguous)

    async def main() -> None:
        pipeline = tree.build(world)
        results = await pipeline.map(range(4), workers, timeout=timeout, return_exceptions=True)
        for index, (result, (end, model)) in enumerate(zip(results, expected, strict=True)):
            compare_item(result, index, end, model)
        ends = [end for end, _ in expected]
        modelled = sum((Counter(model.calls) for _, model in expected), Counter())
        assert without(world.calls, ends) == without(modelled, ends)
        world.check()

    run_on(loop, main())


def compare_item(result: Any, index: int, expected: End, model: Model) -> None:
    if not isinstance(result, StageExecutionError):
        return compare(End(expected.time, "value", result), expected, model)
    assert {(part.item_index, part.item) for part in all_parts(result)} == {(index, index)}
    actual = End(expected.time, "failure", observed(result))
    if expected.kind == "cancelled" and expected.time < model.deadline:  # a stray one
        assert actual.what._replace(attempts=1, element=()) == Failure(expected.what, "CancelledError")
        return None
    return compare(actual, expected, model)


def all_parts(error: StageExecutionError) -> Iterator[StageExecutionError]:
    yield error
    for part in (*joined(error), *error.earlier):
        yield from all_parts(part)


@pytest.mark.parametrize("loop", LOOPS)
@many
@given(trees(), seeds, st.integers(1, 12), st.integers(0, 12), ways)
def test_nothing_is_left_when_much_happens_at_once(
    loop: Any, tree: Row, seed: int, halves: int, turns: int, how: str
) -> None:
    world = World(seed, is_coarse=True)
    moment = halves / 2

    async def cancel(task: Any) -> None:
        await asyncio.sleep(moment)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()

    async def main() -> None:
        pipeline = tree.build(world)
        run = pipeline.run(START, timeout=moment) if how == "timeout" else pipeline.run(START)
        task = asyncio.create_task(observe_requests(run))
        if how == "cancelled":
            await cancel(task)
        end, requests = await task
        assert requests == 0 or how == "cancelled"
        check_end(end, tree, moment if how == "timeout" else FOR_EVER)
        assert all(time < moment for _, _, time in world.calls) or how != "timeout"
        world.check()

    run_on(loop, main())


async def observe_requests(run: Any) -> tuple[End, int]:
    return await observe(run), asyncio.current_task().cancelling()  # type: ignore[union-attr]


def check_end(end: End, tree: Row, deadline: float) -> None:
    if end.kind != "failure":
        return
    assert names(end.what) <= tree.paths("")
    assert (end.what.error == "DeadlineExceeded") <= (end.time >= deadline)


def names(failure: Failure) -> set[str]:
    parts = failure.error if isinstance(failure.error, frozenset) else ()
    return {failure.path}.union(*map(names, (*parts, *failure.earlier)))


# -- what the issue names


async def add_one(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


async def break_down(value: object) -> None:
    await asyncio.sleep(0)
    raise LookupError(value)


async def finish_early(value: object) -> None:
    await asyncio.sleep(0)
    raise Finish("early")


async def wait_for_ever(value: object) -> None:
    await asyncio.sleep(3600)


async def break_down_when_cancelled(value: object) -> None:
    try:
        await asyncio.sleep(3600)
    finally:
        raise LookupError(value)


def four_deep(**broken: Any) -> Pipeline[Any, Any]:
    """A pipeline with an each with a parallel with a fallback in it; any stage of it can be replaced."""
    stages: dict[str, Any] = {
        name: Stage(name, broken.get(name, add_one)) for name in ("one", "two", "three", "four", "spare")
    }
    innermost = fallback(stages["four"], stages["spare"])
    third = parallel(plain=stages["three"], safe=Pipeline([innermost], name="inner"))
    second = each(Pipeline([stages["two"], third], name="work"))
    return Pipeline([lambda count: range(count), second, len, stages["one"]])


LEVELS = [
    (["one"], "one", ()),
    (["two"], "each/work/two", (0,)),
    (["three"], "each/work/parallel/plain", (0,)),
    (["four", "spare"], "each/work/parallel/safe/fallback/spare", (0,)),
]


@pytest.mark.parametrize(("broken", "path", "element"), LEVELS)
async def test_four_deep_each_level_names_its_failures(broken: Any, path: str, element: Any) -> None:
    pipeline = four_deep(**dict.fromkeys(broken, break_down))
    for outer, prefix in ((pipeline, ""), (Pipeline([pipeline], name="outer"), "pipeline/")):
        with pytest.raises(StageExecutionError) as failed:
            await outer.run(1)
        assert (failed.value.stage_name, failed.value.element) == (prefix + path, element)
        assert isinstance(failed.value.original_error, LookupError)


async def test_four_deep_failures_at_several_levels_arrive_together() -> None:
    pipeline = Pipeline([four_deep(three=break_down, four=break_down_when_cancelled)])
    with pytest.raises(BatchError) as failed:
        await pipeline.map([1])
    [error] = failed.value.exceptions
    assert isinstance(error, StageExecutionError)
    whole, *parts = all_parts(error)
    inside = "pipeline/each/work/parallel"
    assert whole.stage_name == inside
    assert {part.stage_name for part in parts} == {f"{inside}/plain", f"{inside}/safe/fallback/four"}
    assert {(part.item_index, part.item, *part.element) for part in parts} == {(0, 1, 0)}


@pytest.mark.parametrize("level", ["one", "two", "three", "four"])
async def test_four_deep_each_level_may_finish_the_run(level: str) -> None:
    assert await four_deep(**{level: finish_early}).run(2) == "early"


async def test_four_deep_a_failure_below_a_fallback_is_none() -> None:
    assert await four_deep(four=break_down).run(3) == 4


async def test_flat_joined_and_nested_pipelines_agree() -> None:
    for last in (add_one, break_down, finish_early):
        one, two, end = Stage("one", add_one), Stage("two", add_one), Stage("end", last)
        flat = [
            Pipeline([one, two, end]),
            one | two | end,
            one | (two | end),
            Pipeline([one]) | Pipeline([two, end]),
        ]
        nested = Pipeline([one, Pipeline([two, end], name="inner")])
        outcomes = [await pipeline.try_run(1) for pipeline in (*flat, nested)]
        assert len({outcome.value for outcome in outcomes}) == 1
        named = [getattr(outcome.error, "stage_name", None) for outcome in outcomes]
        assert named == (["end"] * 4 + ["inner/end"] if last is break_down else [None] * 5)


async def test_a_step_object_may_stand_anywhere_and_run_at_the_same_time() -> None:
    work = each(add_one)
    pipeline = (
        work | work | parallel(a=work, b=fallback(work, work)) | (lambda results: results["a"] + results["b"])
    )
    results: Any = await asyncio.gather(pipeline.run([1, 2]), pipeline.run([3]), work.run([5]))
    assert results == [[4, 5, 4, 5], [6, 6], [6]]


@pytest.mark.parametrize("timeout", [None, 3600.0])
async def test_ten_thousand_elements(timeout: float | None) -> None:
    broken: Any = each(each(add_one))
    pipeline = keep(lambda number: number % 2) | each(add_one, 100) | broken
    double = Pipeline([lambda count: range(count), keep(lambda number: number % 2), each(add_one, 100), sum])
    assert await double.run(10_000, timeout=timeout) == 25_005_000
    with pytest.raises(StageExecutionError, match="'each' gets must be an iterable") as failed:
        await pipeline.run(range(10_000), timeout=timeout)
    assert (failed.value.stage_name, failed.value.element) == ("each/each", (0,))


async def finish_when_cancelled(value: object) -> None:
    try:
        await asyncio.sleep(3600)
    finally:
        raise Finish("late")


async def cancel_itself(value: object) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize(
    ("steps", "result"),
    [
        ([finish_early, finish_when_cancelled], "early"),
        ([cancel_itself, finish_when_cancelled], "late"),
        ([Stage("slow", add_one) | cancel_itself, Pipeline([finish_early])], "early"),
    ],
)
async def test_the_first_finish_counts_and_more_than_a_stray_cancellation(steps: Any, result: str) -> None:
    assert await Pipeline([parallel(dict(zip("ab", steps, strict=True)))]).run(1) == result


class Large:
    """Something that nobody wants to keep."""


def pair(value: Large) -> list[Large]:
    return [value, value]


SHAPES: dict[str, Any] = {
    "row": lambda end: Pipeline([Pipeline([end])]),
    "parallel": lambda end: parallel(a=end, b=end, c=wait_for_ever),
    "each": lambda end: Pipeline([pair, each(end)]),
    "keep": lambda end: Pipeline([pair, keep(end)]),
    "branch": lambda end: branch((lambda value: True, end)),
    "predicate": lambda end: branch((end, end)),
    "fallback": lambda end: fallback(end, fallback(end, end)),
    "deep": lambda end: Pipeline([pair, each(parallel(a=fallback(end, Pipeline([end])), b=wait_for_ever))]),
}


async def cancel_a_group(item: Large) -> None:
    async def wait(item: Large) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait())

    task = asyncio.create_task(wait(item))
    await asyncio.sleep(1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def is_kept_alive(use: Callable[[Large], Coroutine[Any, Any, None]]) -> bool:
    """Whether something is still there, without garbage collection, after it has been used."""

    async def main() -> bool:
        item = Large()
        reference = weakref.ref(item)
        with contextlib.suppress(StageExecutionError):
            await use(item)
        del item
        await asyncio.sleep(0)  # until then the loop holds the future that woke this task
        return reference() is not None

    gc.disable()
    try:
        return run_virtually(main())
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", [add_one, break_down, finish_early, wait_for_ever])
@pytest.mark.parametrize("how", ["run", "timeout", "map"])
def test_an_end_keeps_nothing_alive(shape: str, end: Any, how: str) -> None:
    """No reference cycle runs through an error, its traceback and our frames."""
    if (end is wait_for_ever or shape in ("parallel", "deep")) and is_kept_alive(cancel_a_group):
        pytest.skip("a TaskGroup that is cancelled makes a cycle of its own before Python 3.13.1")

    async def call(item: Large) -> None:
        pipeline = Pipeline([SHAPES[shape](end)])
        if how == "map":
            await pipeline.map([item], timeout=60, return_exceptions=True)
        else:
            await pipeline.run(
                item, timeout=60 if how == "timeout" or end in (add_one, wait_for_ever) else None
            )

    assert not is_kept_alive(call)
