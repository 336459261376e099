"""The types that handlers, hooks and middlewares have, and the protocol of a step."""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from inspect import CO_ITERABLE_COROUTINE
from types import GeneratorType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

# of a step; without defaults, which mypy would take for an answer where a handler's form does not fit
In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)

if TYPE_CHECKING:  # of a pipeline; checkers know defaults, the oldest supported Python does not
    from typing_extensions import TypeVar as TypeVarWithDefault

    First = TypeVarWithDefault("First", contravariant=True, default=Any)
    Last = TypeVarWithDefault("Last", covariant=True, default=Any)
    ContextT = TypeVarWithDefault("ContextT", bound=object, default=Any)
else:
    First = TypeVar("First", contravariant=True)
    Last = TypeVar("Last", covariant=True)
    ContextT = TypeVar("ContextT", bound=object)

__all__ = [
    "NEVER_AWAITABLE",
    "AfterStageHook",
    "BeforeStageHook",
    "ContextT",
    "DefaultContext",
    "Handler",
    "Middleware",
    "OnError",
    "Part",
    "Step",
    "Structure",
    "is_awaitable",
    "structure_of",
]

DefaultContext: TypeAlias = dict[str, Any]
"""The context of a run to which none was given."""

Handler: TypeAlias = Callable[[Any], Any] | Callable[[Any, Any], Any]
"""``(value)`` or ``(value, context)``, sync or async."""

BeforeStageHook: TypeAlias = Callable[[str, Any], object] | Callable[[str, Any, Any], object]
"""``(stage_name, value)`` or ``(stage_name, value, context)``, sync or async."""

AfterStageHook: TypeAlias = (
    Callable[[str, Any, Any, Exception | None], object]
    | Callable[[str, Any, Any, Exception | None, Any], object]
)
"""``(stage_name, value, output, error)``, and ``context`` as a fifth if wanted, sync or async.

``error`` is ``None``, the :class:`~async_pipeline.StageExecutionError`, or the cancellation (a
``BaseException``; a hook annotated with ``BaseException | None`` fits as well).
"""

OnError: TypeAlias = Callable[[Any, Any], Any] | Callable[[Any, Any, Any], Any]
"""``(value, error)`` or ``(value, error, context)``, sync or async; what it returns is the stage's output."""

Middleware: TypeAlias = Callable[[Callable[[Any], Awaitable[Any]], str, Any, Any], Any]
"""``(next, stage_name, value, context)``, async, or sync returning a value or an awaitable."""


class Step(Protocol[In, Out]):
    """What a pipeline needs of a step: a name, and a way to run it. Stages and pipelines are steps."""

    @property
    def name(self) -> str:
        """What errors, hooks and pictures call the step."""

    def run(self, value: In, /, *, context: Any = None) -> Coroutine[Any, Any, Out]:
        """Run the step on one ``value``, and return the output; ``context`` is the run's one object."""


class Structure(NamedTuple):
    """What a step is made of, for whoever shows it or writes it down.

    The ``kind`` is the name of what builds it (``"stage"``, ``"pipeline"``, ``"parallel"``, ...), the
    ``options`` are those that differ from their defaults, by parameter, and the ``parts`` are the steps
    inside it, in order. A step that is only known by the protocol is of the kind ``"step"``.
    """

    kind: str
    options: Mapping[str, Any]
    parts: "Sequence[Part]"


class Part(NamedTuple):
    """A step inside another one.

    The ``role`` is ``"stage"`` in a pipeline, ``"predicate"`` (in a branch, of the step that follows it),
    ``"otherwise"``, or else ``"step"``; the ``name`` is what the step around it calls it.
    """

    role: str
    name: str
    step: Any


def structure_of(step: Any) -> Structure:
    """Return what any step is made of."""
    structure = getattr(type(step), "_structure", None)  # of the type: a mock has whatever it is asked for
    return Structure("step", {}, ()) if structure is None else cast(Structure, structure(step))


# most results are of these types: a lookup here is faster than asking the type for __await__
NEVER_AWAITABLE = frozenset({bool, bytes, dict, float, int, list, set, str, tuple, type(None)})


def is_awaitable(value: object) -> bool:
    """Tell whether ``value`` can be awaited, as ``inspect.isawaitable`` does, by the type alone."""
    kind = type(value)
    if kind is GeneratorType:
        return bool(value.gi_code.co_flags & CO_ITERABLE_COROUTINE)  # type: ignore[attr-defined]
    return hasattr(kind, "__await__")
