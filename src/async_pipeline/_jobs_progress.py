"""How far a job is: counted in the stages of its pipeline that are done."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

from ._jobs_run import current
from .events import Event
from .pipeline import Pipeline
from .types import Step, structure_of

__all__ = ["Measure", "observed"]


def observed(step: Step[Any, Any]) -> Step[Any, Any]:
    """Return a step like this one that tells the job in which it runs how far it is, if it can."""
    if structure_of(step).kind in _WITH_ELEMENTS:
        return _observed(Pipeline([step], name=step.name))
    if not _is_transparent(step):
        return step
    # what a subclass has set may change, so it is copied each time
    return _observed_once(step) if type(step) is Pipeline else _observed(step)


_WITH_ELEMENTS = ("each", "keep")


def _is_transparent(step: Any) -> TypeGuard[Pipeline[Any, Any, Any]]:
    """Tell whether who observes a run sees the stages inside."""
    return isinstance(step, Pipeline) and getattr(step.run, "__func__", None) is Pipeline.run


def _observed(pipeline: Pipeline[Any, Any, Any]) -> Pipeline[Any, Any, Any]:
    others = [observer for observer in pipeline.observers if not isinstance(observer, _Progress)]
    return pipeline.replace(observers=[*others, _Progress(pipeline)])


_observed_once = lru_cache(128)(_observed)  # it takes 35 µs for five stages


class _Leaf(NamedTuple):
    """A stage that counts, by its path."""

    path: str
    element_path: str | None  # if it runs once for each element
    ends: Mapping[str, int]  # of the pipelines around it: how many stages are done when they are


def _leaves(pipeline: Pipeline[Any, Any, Any], path: str = "", done: int = 0) -> list[_Leaf]:
    leaves: list[_Leaf] = []
    for step in pipeline.stages:
        kind, _, parts = structure_of(step)
        inner = path + step.name
        if _is_transparent(step):
            within = _leaves(step, f"{inner}/", done + len(leaves))
            end = done + len(leaves) + len(within)
            leaves += [leaf._replace(ends={**leaf.ends, inner: end}) for leaf in within]
        else:
            element_path = f"{inner}/{parts[0].name}" if kind in _WITH_ELEMENTS else None
            leaves.append(_Leaf(inner, element_path, {}))
    return leaves


class _Progress:
    """Observes a pipeline for the jobs that run it."""

    def __init__(self, pipeline: Pipeline[Any, Any, Any]) -> None:
        self.leaves = _leaves(pipeline)

    def __call__(self, event: Event) -> None:
        run = current.get(None)
        if run is None:
            return
        if event.kind == "run_start":
            if run.measure is None:
                run.measure = Measure(event.run_id, self.leaves)
        elif run.measure is not None and run.measure.run_id == event.run_id:
            if event.kind == "stage_start":
                run.measure.begin(event)
            elif event.kind == "stage_end":
                run.hear()
                if run.measure.end(event):
                    run.advance_to(run.measure.fraction)
            elif event.kind == "run_end":
                run.measure = None


class Measure:
    """How far one run of a pipeline is."""

    def __init__(self, run_id: str, leaves: Sequence[_Leaf]) -> None:
        self.run_id = run_id
        self._leaves = leaves
        self._done = 0
        self._ends: dict[str, int] = {}  # of the pipelines inside that run
        self._elements: int | None = None  # of the stage that runs
        self._elements_done = 0
        self._fraction = 0.0  # that it has reported itself

    def begin(self, event: Event) -> None:
        leaf = self._leaf
        if leaf is None or event.stage is None:
            return
        if event.stage == leaf.element_path and event.element == (0,):
            self._elements_done = 0  # a middleware may run all of them again
        elif event.element:
            return
        elif event.stage == leaf.path:
            self._elements, self._elements_done = event.elements, 0
        elif event.stage in leaf.ends:
            self._ends[event.stage] = leaf.ends[event.stage]

    def end(self, event: Event) -> bool:
        """Take a stage's end into account, if it counts."""
        leaf = self._leaf
        if leaf is None or event.stage is None or event.outcome != "ok":
            return False
        if event.stage == leaf.element_path and len(event.element) == 1:
            self._elements_done += 1
            return True
        if event.element:
            return False
        # a middleware may have left out what is inside a pipeline
        done = self._done + 1 if event.stage == leaf.path else self._ends.pop(event.stage, 0)
        return self._advance_to(done)

    def _advance_to(self, done: int) -> bool:
        if done <= self._done:
            return False
        self._done, self._elements, self._fraction = done, None, 0.0
        return True

    def report(self, fraction: float) -> None:
        if self._leaf is not None and self._leaf.element_path is None:
            self._fraction = fraction

    @property
    def fraction(self) -> float:
        part = self._elements_done / self._elements if self._elements else self._fraction
        return (self._done + min(1.0, part)) / len(self._leaves)

    @property
    def _leaf(self) -> _Leaf | None:
        return self._leaves[self._done] if self._done < len(self._leaves) else None
