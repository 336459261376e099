"""What the handlers of a step take and return, by their type hints."""

import functools
import inspect
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from types import FunctionType, MethodType, UnionType
from typing import Annotated, Any, ForwardRef, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import typing_extensions
from pydantic import BaseModel, RootModel
from typing_extensions import is_typeddict

from ..stage import Stage
from ..types import Part, structure_of

__all__ = ["MISSING", "Returned", "Value", "is_form", "taken_by", "typed_dict"]


MISSING: Any = object()


# -- what a step takes


class Value(NamedTuple):
    """What is known of the value that a step takes.

    Attributes:
        name: what its parameter is called.
        hint: its type; ``Any`` where nothing is said.
        default: what the parameter is when nothing is given.
        doc: the first line of the handler's docstring.
        handler: what the handler is called, for messages.
    """

    name: str = "value"
    hint: Any = Any
    default: Any = MISSING
    doc: str | None = None
    handler: str = "the first handler"


def taken_by(step: Any) -> Value | None:
    """What a step takes; None if that is whatever the step after it takes."""
    kind, _, parts = structure_of(step)
    if kind == "require":
        return None
    if kind == "pipeline":
        return next(filter(None, (taken_by(part.step) for part in parts)), None)
    if kind in ("parallel", "branch", "fallback"):
        return _taken_by_one_of([part for part in parts if part.role != "predicate"])
    if kind in ("each", "keep"):
        inside = taken_by(parts[0].step) or Value()
        return inside._replace(hint=list[inside.hint], default=MISSING)  # type: ignore[name-defined]
    return _taken_by_handler(step)


def _taken_by_one_of(parts: Sequence[Part]) -> Value | None:
    first = None
    for part in parts:
        value = taken_by(part.step)
        if value is not None and value.hint is not Any:
            return value
        first = first or value
    return first


def _taken_by_handler(step: Any) -> Value:
    values = [_value_of(handler) for handler in _handlers(step)]
    return next((value for value in values if value.hint is not Any), values[-1])


def _handlers(step: Any) -> list[Any]:
    """What has the hints of a step that has no others inside it, the best first."""
    if not isinstance(step, Stage):
        return [step.run]
    return [step.handler] if type(step).run is Stage.run else [step.run, step.handler]


def _value_of(handler: Any) -> Value:
    found = _signature(handler)
    if found is None:
        return Value(handler=_name_of(handler))
    signature, function = found
    doc = (inspect.getdoc(function) or "").partition("\n")[0]
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            hint = _evaluated(parameter.annotation, function, f"of the parameter {parameter.name!r}")
            default = MISSING if parameter.default is parameter.empty else parameter.default
            return Value(parameter.name, hint, default, doc, _name_of(function))
    return Value(doc=doc, handler=_name_of(function))  # *args


def _name_of(handler: Any) -> str:
    return str(getattr(handler, "__qualname__", type(handler).__qualname__))


# -- what a step returns


class Returned:
    """What is known of what a step returns: its type, and for messages who says so."""

    def __init__(self, step: Any, taken: Value) -> None:
        self._handlers: list[str] = []
        self.hint = self._of(step, lambda: taken.hint)

    @property
    def handlers(self) -> str:
        return " or ".join(dict.fromkeys(self._handlers)) or "the last handler"

    def _of(self, step: Any, given: Callable[[], Any]) -> Any:
        """The type that a step returns when it is run with a value of the given one.

        That one is asked for only if the step passes it on: no hint is evaluated without need.
        """
        kind, _, parts = structure_of(step)
        if kind == "require":
            return given()
        if kind == "pipeline":
            for part in parts:
                given = functools.partial(self._of, part.step, given)
            return given()
        if kind == "parallel":
            fields = {part.name: self._of(part.step, given) for part in parts}
            return typed_dict(step.name, fields)
        if kind in ("branch", "fallback"):
            return _either([self._of(part.step, given) for part in parts if part.role != "predicate"])
        if kind == "each":
            return list[self._of(parts[0].step, lambda: _element(given()))]  # type: ignore[misc]
        if kind == "keep":
            return list[self._kept(parts[0].step, _element(given()))]  # type: ignore[misc]
        return self._of_handler(step)

    def _kept(self, predicate: Any, element: Any) -> Any:
        return (taken_by(predicate) or Value()).hint if element is Any else element

    def _of_handler(self, step: Any) -> Any:
        for handler in _handlers(step):
            hint = _return_of(handler)
            if hint is not Any:
                self._handlers.append(_name_of(handler))
                return hint
        return Any


def _return_of(handler: Any) -> Any:
    if isinstance(handler, type):
        return handler if is_form(handler) else Any
    found = _signature(handler)
    if found is None:
        return Any
    signature, function = found
    return _awaited(_evaluated(signature.return_annotation, function, "of the return value"))


def _awaited(hint: Any) -> Any:
    """What is there after an ``await``: of a hint ``Awaitable[X]`` that is X."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return _either([_awaited(argument) for argument in arguments])
    if isinstance(origin, type) and issubclass(origin, Awaitable):
        return arguments[-1] if arguments else Any
    return hint


def _either(hints: Sequence[Any]) -> Any:
    return Any if any(hint is Any for hint in hints) else Union[tuple(hints)]  # noqa: UP007


def _element(hint: Any) -> Any:
    """The type of the elements of a value of this type, as far as it is told."""
    hint = _bare(hint)
    origin = get_origin(hint)
    if not (isinstance(origin, type) and issubclass(origin, (Iterable, AsyncIterable))):
        return Any
    arguments = get_args(hint)
    if issubclass(origin, tuple):
        return _either([argument for argument in arguments if argument is not ...])
    return arguments[0]


# -- hints


def _signature(handler: Any) -> tuple[inspect.Signature, FunctionType] | None:
    """The signature of Python code, hints not evaluated, and the function that has them; else None."""
    if isinstance(handler, type):
        return None
    if isinstance(handler, functools.partial):
        return _rest(
            _signature(handler.func),
            lambda function: functools.partial(function, *handler.args, **handler.keywords),
        )
    if isinstance(handler, MethodType):
        return _rest(_signature(handler.__func__), lambda function: MethodType(function, handler.__self__))
    signature = _own_signature(handler) if isinstance(handler, FunctionType) else None
    wrapped = getattr(handler, "__wrapped__", None)  # functools.cache is C around Python
    if callable(wrapped) and (signature is None or _takes_any(signature)):
        return _signature(wrapped)
    call = inspect.getattr_static(type(handler), "__call__", None)
    if signature is None and isinstance(call, FunctionType):
        return _signature(MethodType(call, handler))
    return None if signature is None else (signature, handler)


def _own_signature(function: FunctionType) -> inspect.Signature:
    if sys.version_info >= (3, 14):  # hints are evaluated when asked for; what can't be is left as it is
        from annotationlib import Format

        return inspect.signature(function, follow_wrapped=False, annotation_format=Format.FORWARDREF)
    return inspect.signature(function, follow_wrapped=False)


def _takes_any(signature: inspect.Signature) -> bool:
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values())


def _rest(
    found: tuple[inspect.Signature, FunctionType] | None, bind: Callable[[Any], Any]
) -> tuple[inspect.Signature, FunctionType] | None:
    """What a partial or a method leaves of the signature of its function."""
    if found is None:
        return None

    def stand_in() -> None: ...

    signature, function = found
    stand_in.__signature__ = signature  # type: ignore[attr-defined]
    return inspect.signature(bind(stand_in)), function


def _evaluated(hint: Any, function: FunctionType, what: str) -> Any:
    if hint is inspect.Signature.empty:
        return Any

    def stand_in() -> None: ...

    stand_in.__annotations__ = {"hint": hint}
    origin = _origin(function)
    names = {**_closure(origin), **_closure(function)}
    names.update((one.__name__, one) for one in getattr(origin, "__type_params__", ()))
    try:
        return get_type_hints(stand_in, origin.__globals__, names, include_extras=True)["hint"]
    except Exception as error:
        text = hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint
        raise TypeError(
            f"the hint {text!r} {what} of {function.__qualname__} can't be evaluated"
            f" ({type(error).__name__}: {error}); define or import what it names at the top level of"
            f" {function.__module__}, not in a function and not under TYPE_CHECKING"
        ) from error


def _origin(function: FunctionType) -> FunctionType:
    """The function whose hints a wrapper has taken over."""
    wrapped = getattr(function, "__wrapped__", None)
    while isinstance(wrapped, FunctionType):
        function, wrapped = wrapped, getattr(wrapped, "__wrapped__", None)
    return function


def _closure(function: FunctionType) -> dict[str, Any]:
    names = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return names


def _bare(hint: Any) -> Any:
    """A type without what is only said about it, and without the names that it was given."""
    while True:
        if get_origin(hint) is Annotated:
            hint = hint.__origin__
        elif hasattr(hint, "__value__"):  # type Orders = list[Order]
            hint = hint.__value__
        else:
            return hint


def is_form(hint: Any) -> bool:
    """Whether its fields are inputs or outputs of their own."""
    hint = _bare(hint)
    kind = get_origin(hint) or hint
    if is_typeddict(kind):
        return True
    if not isinstance(kind, type) or issubclass(kind, RootModel):
        return False
    return hasattr(kind, "__dataclass_fields__") or issubclass(kind, BaseModel)


def typed_dict(name: str, fields: Mapping[str, Any]) -> Any:
    return cast(Any, typing_extensions.TypedDict)(name, fields)
