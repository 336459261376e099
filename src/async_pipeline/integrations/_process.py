"""A pipeline as a process: its inputs and outputs, read from the type hints of its handlers.

The names are those of OGC API - Processes (Part 1). Needs pydantic, and PyYAML for descriptions in YAML.
"""

import functools
import inspect
import json
import math
import os
import re
import sys
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from itertools import islice
from pathlib import Path
from types import FunctionType, MethodType, UnionType
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import typing_extensions
from pydantic import BaseModel, RootModel, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, core_schema, from_json, to_jsonable_python
from typing_extensions import is_typeddict

from ..stage import Stage
from ..types import Part, Step, structure_of

__all__ = ["BadInputs", "InputFault", "Process", "read_descriptions"]


class InputFault(NamedTuple):
    """What is wrong with one place of a request.

    Attributes:
        pointer: where, as a JSON pointer (RFC 6901) into the body: ``/inputs/items/3/price``.
        detail: what, in words; never the text of an exception that a validator has raised.
    """

    pointer: str
    detail: str


class BadInputs(Exception):  # noqa: N818 - the inputs are bad
    """The inputs of a request are not those of the process.

    Attributes:
        faults: all that is wrong with them.
    """

    def __init__(self, faults: list[InputFault]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "; ".join(f"{pointer}: {detail}" for pointer, detail in self.faults)


_ID = re.compile(r"[A-Za-z0-9_.~-]+")
_MISSING: Any = object()
_RESULT = "result"


class Process:
    """A pipeline with what a client has to know about it, and the way in and out of it.

    The inputs are the fields of the first handler's value type when that is a ``TypedDict``, a dataclass or a
    pydantic model, else one input named after that parameter; the outputs are the fields of what the last
    handler returns, else one named ``result``. A field or a parameter with a default is optional. Inputs are
    checked by pydantic in its strict mode: ``"5"`` is no integer, but a date is given as a string, because
    JSON has no other form of it.

    A ``description`` only describes: whatever schema it shows, the checks stay those of the hints. Write
    rules into these, ``Annotated[int, Field(ge=1)]``. Where the hints say nothing, it may name inputs or
    outputs of its own; the pipeline is then run with a dict of them, and gives one.

    Args:
        id: what the process is called in URLs: letters, digits, and ``_ . ~ -``.
        pipeline: a pipeline, or any other step.
        description: parts of an OGC process description that stand above what the hints say: ``title``,
            ``description``, ``version``, ``keywords``, ``metadata``, and in ``inputs`` and ``outputs`` by
            name ``title``, ``description``, ``schema`` (replaced as a whole), ``minOccurs`` and so on. What
            is the server's to say (``jobControlOptions``, ``outputTransmission``, ``links``) is passed over.

    Attributes:
        id: the id.
        pipeline: the pipeline.
        title: from the description, or else the pipeline's name, or else the id.
        version: from the description, or else ``"1.0.0"``.
        inputs_schema: the JSON Schema of the object of inputs.
        outputs: the JSON Schema of each output, by name.

    Raises:
        TypeError: a hint can't be evaluated, or stands for nothing that JSON has; the message names the
            handler. Or the description is of a wrong shape.
        ValueError: a wrong id, or a description with an input, an output or an entry that does not exist.
    """

    inputs_schema: Mapping[str, Any]
    outputs: Mapping[str, Mapping[str, Any]]

    def __init__(
        self, id: str, pipeline: Step[Any, Any], description: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(id, str):
            raise TypeError(f"the id of a process must be a str, not {id!r}")
        if not _ID.fullmatch(id):
            raise ValueError(f"the id of a process is made of letters, digits, and _ . ~ -, not {id!r}")
        self.id: str = id
        self.pipeline: Step[Any, Any] = pipeline
        try:
            self._read_hints(_checked_description(id, {} if description is None else description))
        except (TypeError, ValueError) as error:
            raise type(error)(f"process {id!r}: {error}") from error.__cause__

    def _read_hints(self, described: Mapping[str, Any]) -> None:
        value = _taken_by(self.pipeline) or _Value()
        self._inputs = _Inputs(value, described.get("inputs", {}))
        returned = _Returned(self.pipeline, value)
        self._outputs = _Outputs(returned, described.get("outputs", {}))
        self.inputs_schema = self._inputs.schema
        self.outputs = {name: entry["schema"] for name, entry in self._outputs.entries.items()}
        named = self.id if self.pipeline.name == "pipeline" else self.pipeline.name
        self.title: str = described.get("title", named)
        self.version: str = described.get("version", "1.0.0")
        self._summary = self._summarized(described, value.doc)

    def _summarized(self, described: Mapping[str, Any], doc: str | None) -> dict[str, Any]:
        summary: dict[str, Any] = {"id": self.id, "version": self.version, "title": self.title}
        if doc:
            summary["description"] = doc
        for entry in ("description", "keywords", "metadata"):
            if entry in described:
                summary[entry] = described[entry]
        summary["jobControlOptions"] = ["sync-execute", "async-execute", "dismiss"]
        summary["outputTransmission"] = ["value"]
        return summary

    def summary(self) -> dict[str, Any]:
        """Return the OGC process summary, without links."""
        return dict(self._summary)

    def description(self) -> dict[str, Any]:
        """Return the OGC process description, without links: the summary, with inputs and outputs."""
        inputs = {name: dict(entry) for name, entry in self._inputs.entries.items()}
        outputs = {name: dict(entry) for name, entry in self._outputs.entries.items()}
        return {**self._summary, "inputs": inputs, "outputs": outputs}

    def read(self, inputs: object) -> Any:
        """Return what the pipeline is run with.

        An input may be given in OGC's qualified form, ``{"value": ..., "mediaType": ...}``, where it does not
        fit as it is. Integers may be written ``1.0``, as JSON Schema has it. At most 200 levels are read.

        Args:
            inputs: what stood in the body of a request, decoded from JSON.

        Raises:
            BadInputs: there is something wrong with them; it tells all.
        """
        return self._inputs.read(inputs)

    def write(self, value: object) -> dict[str, Any]:
        """Return the outputs by name, of what JSON has: what the pipeline gave, as its hint says.

        NaN and infinity become ``None``.

        Raises:
            PydanticSerializationError: there is no JSON for it.
            TypeError: it has not the outputs of this process.
        """
        return self._outputs.write(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, {self.pipeline!r})"


# -- descriptions by hand


_TEXTS = ("title", "description", "version")
_LISTS = ("keywords", "metadata")
_OF_THE_SERVER = ("id", "jobControlOptions", "outputTransmission", "links")
_ENTRIES = (*_TEXTS, *_LISTS, *_OF_THE_SERVER, "inputs", "outputs")
_ENTRIES_OF_ONE = (
    *("title", "description", "schema", "minOccurs", "maxOccurs"),
    *("keywords", "metadata", "additionalParameters"),
)


def _checked_description(id: str, description: object) -> Mapping[str, Any]:
    described = _checked_entries("the description", description, _ENTRIES)
    if described.get("id", id) != id:
        raise ValueError(f"the description is of another one: {described['id']!r}")
    for name in ("inputs", "outputs"):
        for key, one in _checked_mapping(f"the description's {name!r}", described.get(name, {})).items():
            _check_one(f"the description of {key!r}", one)
    return described


def _check_one(what: str, one: object) -> None:
    entries = _checked_entries(what, one, _ENTRIES_OF_ONE)
    _checked_mapping(f"the 'schema' in {what}", entries.get("schema", {}))
    least, most = entries.get("minOccurs", 0), entries.get("maxOccurs", "unbounded")
    if type(least) is not int or least < 0:
        raise ValueError(f"minOccurs in {what} must be a number from 0 on, not {least!r}")
    if most != "unbounded" and (type(most) is not int or most < 1):
        raise ValueError(f"maxOccurs in {what} must be a number from 1 on or 'unbounded', not {most!r}")


def _checked_entries(what: str, value: object, known: Sequence[str]) -> Mapping[str, Any]:
    entries = _checked_mapping(what, value)
    unknown = [key for key in entries if key not in known]
    if unknown:
        raise ValueError(f"{what} has no entry {unknown[0]!r}; there are {', '.join(known)}")
    for key in _TEXTS:
        if not isinstance(entries.get(key, ""), str):
            raise TypeError(f"{key!r} in {what} must be a str, not {entries[key]!r}; put it in quotes")
    for key in _LISTS:
        if not isinstance(entries.get(key, []), (list, tuple)):
            raise TypeError(f"{key!r} in {what} must be a list, not {entries[key]!r}")
    return entries


def _checked_mapping(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a mapping, not {value!r}")
    return value


def _merged(
    kind: str, entries: dict[str, dict[str, Any]], described: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    unknown = [name for name in described if name not in entries]
    if unknown:
        known = ", ".join(map(repr, entries)) or "none"
        raise ValueError(f"the description has an {kind} {unknown[0]!r}; by the hints there are: {known}")
    return {name: {**entry, **described.get(name, {})} for name, entry in entries.items()}


def read_descriptions(source: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return descriptions of processes by their ids, from a mapping or from a file.

    Args:
        source: a mapping; or the path of a file that has one, in YAML (``.yaml`` or ``.yml``) or JSON
            (``.json``); ``None`` for no descriptions.

    Raises:
        OSError: the file can't be read.
        ValueError: it is of another type, or is not what its name says.
        TypeError: what it has, or what was given, is no mapping of strings to mappings.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _checked_descriptions("the descriptions", source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"descriptions must be a mapping or the path of a file, not {source!r}")
    return _checked_descriptions(f"the file {os.fspath(source)!r}", _loaded(Path(source)))


def _checked_descriptions(what: str, value: object) -> dict[str, Any]:
    for id, description in _checked_mapping(f"what {what} has", value).items():
        if not isinstance(id, str):
            raise TypeError(f"the id {id!r} in {what} must be a str; put it in quotes")
        _checked_mapping(f"the description of {id!r} in {what}", description)
    return dict(cast("Mapping[str, Any]", value))


def _loaded(path: Path) -> object:
    load = {".json": _load_json, ".yaml": _load_yaml, ".yml": _load_yaml}.get(path.suffix.lower())
    if load is None:
        raise ValueError(f"descriptions are read from .yaml, .yml and .json, not from {str(path)!r}")
    try:
        return load(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the file {str(path)!r} can't be read: {error}") from error


def _load_json(text: str) -> object:
    return json.loads(text)


def _load_yaml(text: str) -> object:
    import yaml

    try:
        # a date that stands in it without quotes is no longer one in JSON
        return to_jsonable_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


# -- what a step takes


class _Value(NamedTuple):
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
    default: Any = _MISSING
    doc: str | None = None
    handler: str = "the first handler"


def _taken_by(step: Any) -> _Value | None:
    """What a step takes; None if that is whatever the step after it takes."""
    kind, _, parts = structure_of(step)
    if kind == "require":
        return None
    if kind == "pipeline":
        return next(filter(None, (_taken_by(part.step) for part in parts)), None)
    if kind in ("parallel", "branch", "fallback"):
        return _taken_by_one_of([part for part in parts if part.role != "predicate"])
    if kind in ("each", "keep"):
        inside = _taken_by(parts[0].step) or _Value()
        return inside._replace(hint=list[inside.hint], default=_MISSING)  # type: ignore[name-defined]
    return _taken_by_handler(step)


def _taken_by_one_of(parts: Sequence[Part]) -> _Value | None:
    first = None
    for part in parts:
        value = _taken_by(part.step)
        if value is not None and value.hint is not Any:
            return value
        first = first or value
    return first


def _taken_by_handler(step: Any) -> _Value:
    values = [_value_of(handler) for handler in _handlers(step)]
    return next((value for value in values if value.hint is not Any), values[-1])


def _handlers(step: Any) -> list[Any]:
    """What has the hints of a step that has no others inside it, the best first."""
    if not isinstance(step, Stage):
        return [step.run]
    return [step.handler] if type(step).run is Stage.run else [step.run, step.handler]


def _value_of(handler: Any) -> _Value:
    found = _signature(handler)
    if found is None:
        return _Value(handler=_name_of(handler))
    signature, function = found
    doc = (inspect.getdoc(function) or "").partition("\n")[0]
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            hint = _evaluated(parameter.annotation, function, f"of the parameter {parameter.name!r}")
            default = _MISSING if parameter.default is parameter.empty else parameter.default
            return _Value(parameter.name, hint, default, doc, _name_of(function))
    return _Value(doc=doc, handler=_name_of(function))  # *args


def _name_of(handler: Any) -> str:
    return str(getattr(handler, "__qualname__", type(handler).__qualname__))


# -- what a step returns


class _Returned:
    """What is known of what a step returns: its type, and for messages who says so."""

    def __init__(self, step: Any, taken: _Value) -> None:
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
            return _typed_dict(step.name, fields)
        if kind in ("branch", "fallback"):
            return _either([self._of(part.step, given) for part in parts if part.role != "predicate"])
        if kind == "each":
            return list[self._of(parts[0].step, lambda: _element(given()))]  # type: ignore[misc]
        if kind == "keep":
            return list[self._kept(parts[0].step, _element(given()))]  # type: ignore[misc]
        return self._of_handler(step)

    def _kept(self, predicate: Any, element: Any) -> Any:
        return (_taken_by(predicate) or _Value()).hint if element is Any else element

    def _of_handler(self, step: Any) -> Any:
        for handler in _handlers(step):
            hint = _return_of(handler)
            if hint is not Any:
                self._handlers.append(_name_of(handler))
                return hint
        return Any


def _return_of(handler: Any) -> Any:
    if isinstance(handler, type):
        return handler if _is_form(handler) else Any
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


def _is_form(hint: Any) -> bool:
    """Whether its fields are inputs or outputs of their own."""
    hint = _bare(hint)
    kind = get_origin(hint) or hint
    if is_typeddict(kind):
        return True
    if not isinstance(kind, type) or issubclass(kind, RootModel):
        return False
    return hasattr(kind, "__dataclass_fields__") or issubclass(kind, BaseModel)


def _typed_dict(name: str, fields: Mapping[str, Any]) -> Any:
    return cast(Any, typing_extensions.TypedDict)(name, fields)


# -- hints that pydantic does not read as they are


# of the standard library's, it takes TypedDicts from Python 3.12 on
_TAKES_TYPED_DICTS = sys.version_info >= (3, 12)
# of iterables, it would check each element when the handler comes to it, or none
_LAZY = frozenset({Iterable, Collection})


def _readable(hint: Any, twins: dict[Any, Any]) -> Any:
    """The hint with lists for iterables, and with TypedDicts that pydantic takes.

    Args:
        hint: a type.
        twins: those TypedDicts that are there already, by the ones for which they stand.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_typeddict(origin or hint):
        is_taken = _TAKES_TYPED_DICTS or type(origin or hint).__module__ != "typing"
        return hint if is_taken else _twin(hint, twins)
    if origin is Literal:
        return hint
    if origin is Annotated:
        return Annotated[(_readable(arguments[0], twins), *arguments[1:])]
    changed = tuple(_readable(argument, twins) for argument in arguments)
    if (origin or hint) in _LAZY:
        return list[changed] if changed else list  # type: ignore[valid-type]
    if all(one is other for one, other in zip(changed, arguments, strict=True)):
        return hint
    return Union[changed] if origin in (Union, UnionType) else origin[changed]  # noqa: UP007


def _twin(hint: Any, twins: dict[Any, Any]) -> Any:
    if hint in twins:  # of itself, inside it
        return twins[hint]
    kind = get_origin(hint) or hint
    twins[hint] = twin = _typed_dict(kind.__name__, {})
    hints, required = {}, set()
    for name, field in get_type_hints(kind, include_extras=True).items():
        is_required, field = _unqualified(_filled_in(field, hint), name in kind.__required_keys__)
        hints[name] = _readable(field, twins)
        if is_required:
            required.add(name)
    twin.__annotations__, twin.__doc__, twin.__module__ = hints, kind.__doc__, kind.__module__
    twin.__required_keys__ = frozenset(required)
    twin.__optional_keys__ = frozenset(hints) - twin.__required_keys__
    if hasattr(kind, "__pydantic_config__"):
        twin.__pydantic_config__ = kind.__pydantic_config__
    return twin


# the last one is newer than the oldest typing_extensions that pydantic takes
_QUALIFIERS_OF_FIELDS = (Required, NotRequired, getattr(typing_extensions, "ReadOnly", Required))


def _unqualified(hint: Any, is_required: bool) -> tuple[bool, Any]:
    while get_origin(hint) in _QUALIFIERS_OF_FIELDS:
        if get_origin(hint) in (Required, NotRequired):
            is_required = get_origin(hint) is Required
        (hint,) = get_args(hint)
    return is_required, hint


def _filled_in(field: Any, hint: Any) -> Any:
    """The type of a field of a generic class that is used as ``Box[int]``."""
    given = dict(zip(getattr(get_origin(hint), "__parameters__", ()), get_args(hint), strict=False))
    if field in given:
        return given[field]
    parameters = getattr(field, "__parameters__", ())
    return field[tuple(given.get(one, one) for one in parameters)] if given and parameters else field


# -- schemas


_NUMBER = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$"
_INTEGER = r"^-?[0-9]{1,4000}$"


class _Schemas(GenerateJsonSchema):
    """JSON Schemas that say what is accepted, without remarks on what they can't say."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> dict[str, Any]:
        made = super().decimal_schema(schema)
        for choice in made.get("anyOf", [made]):
            if choice.get("type") == "string":
                choice.setdefault("pattern", _NUMBER)
        return made

    def set_schema(self, schema: core_schema.SetSchema) -> dict[str, Any]:
        return _of_any_items(super().set_schema(schema), self.mode)

    def frozenset_schema(self, schema: core_schema.FrozenSetSchema) -> dict[str, Any]:
        return _of_any_items(super().frozenset_schema(schema), self.mode)

    def dict_schema(self, schema: core_schema.DictSchema) -> dict[str, Any]:
        made = super().dict_schema(schema)
        if schema.get("keys_schema", {}).get("type") == "int":
            made["propertyNames"] = {"pattern": _INTEGER}
        return made


def _of_any_items(schema: dict[str, Any], mode: str) -> dict[str, Any]:
    # a set is read from items that come twice, too; how many are left then, is not to be said
    if mode == "validation" and not schema.get("minItems"):
        schema.pop("uniqueItems", None)
    return schema


class _Definitions:
    """Schemas without references: what they refer to is put in their place.

    What a schema refers to inside itself is cut with ``{}``.
    """

    _MAPS = frozenset({"properties", "patternProperties", "dependentSchemas"})
    _LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
    _ONES = frozenset({"items", "additionalProperties", "not", "contains", "propertyNames", "contentSchema"})
    _BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._reach = {name: set(_references(schema)) for name, schema in definitions.items()}
        for through in definitions:
            for reached in self._reach.values():
                if through in reached:
                    reached |= self._reach[through]

    def inline(self, schema: Any, path: tuple[str, ...] = ()) -> Any:
        if not isinstance(schema, dict):
            return schema
        made: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "$ref":
                made = {**self._referred(value.removeprefix("#/$defs/"), path), **made}
            elif key in self._MAPS:
                made[key] = {name: self.inline(one, path) for name, one in value.items()}
            elif key in self._LISTS:
                made[key] = [self.inline(one, path) for one in value]
            elif key in self._ONES:
                made[key] = self.inline(value, path)
            elif key in self._BOUNDS and not isinstance(value, (int, float)):
                continue  # a date, which JSON Schema can't compare
            elif key not in ("$defs", "discriminator"):  # the latter is OpenAPI's, and refers to names
                made[key] = value
        return made

    def _referred(self, name: str, path: tuple[str, ...]) -> Any:
        # of types that all refer to each other, no more than two are opened: their paths are too many
        circle = [opened for opened in path if opened in self._reach[name]]
        if name in path or len(circle) > 1:
            return {}
        return self.inline(self._definitions[name], (*path, name))


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value.removeprefix("#/$defs/")
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for one in schema:
            yield from _references(one)


def _adapter(hint: Any, mode: Literal["validation", "serialization"], what: str) -> tuple[Any, Any]:
    """What reads and writes values of a type, and their schema."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(_readable(hint, {}))
        schema = adapter.json_schema(mode=mode, schema_generator=_Schemas)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"there is no JSON for the hint {hint!r} {what} ({reason}); write a TypedDict, a dataclass, a"
            " pydantic model, or a type that pydantic knows"
        ) from error
    return adapter, _Definitions(schema.get("$defs", {})).inline(to_jsonable_python(schema))


def _title(name: str) -> str:
    return name.replace("_", " ").strip().title() or name


def _entry(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    entry = {"title": schema.get("title") or _title(name)}
    if "description" in schema:
        entry["description"] = schema["description"]
    return {**entry, "schema": schema}


def _free_fields(hint: Any, name: str, described: Mapping[str, Any]) -> Any:
    """The hint, or where there is none the fields that the description has: names, no types."""
    if hint is not Any or not described or name in described:
        return hint
    fields = {
        key: NotRequired[Any] if entry.get("minOccurs") == 0 else Any for key, entry in described.items()
    }
    return _typed_dict(name, fields)


# -- the way out


class _Outputs:
    """What a pipeline returns, by name.

    Attributes:
        entries: the OGC descriptions by name, each with its ``schema``.
    """

    def __init__(self, returned: _Returned, described: Mapping[str, Any]) -> None:
        hint = _free_fields(returned.hint, _RESULT, described)
        self._adapter, schema = _adapter(hint, "serialization", f"that {returned.handlers} returns")
        self._is_form = _is_form(hint) and "properties" in schema
        schemas = schema["properties"] if self._is_form else {_RESULT: schema}
        self.entries = _merged(
            "output", {name: _entry(name, one) for name, one in schemas.items()}, described
        )

    def write(self, value: object) -> dict[str, Any]:
        text = self._adapter.dump_json(value, by_alias=True, warnings=False)
        try:
            written = from_json(text, allow_inf_nan=False)
        except ValueError:  # a model that writes NaN itself, or more levels than pydantic reads
            written = json.loads(text, parse_constant=lambda constant: None)
        if not self._is_form:
            return {_RESULT: written}
        if not isinstance(written, dict):
            names = ", ".join(map(repr, self.entries))
            raise TypeError(f"the pipeline gave a {type(value).__name__}, which has not the outputs {names}")
        return {name: written[name] for name in self.entries if name in written}


# -- the way in

_WORDS_FOR_PYDANTIC = frozenset(get_args(core_schema.ErrorType)) - {
    # these have the text of an exception in them
    *("value_error", "assertion_error", "get_attribute_error", "iteration_error", "mapping_type"),
}
_QUALIFIERS = frozenset({"value", "mediaType", "encoding", "schema", "format"})
_encode = json.JSONEncoder(allow_nan=False, check_circular=False).encode
_DEPTH = 200  # pydantic reads as many levels below the inputs

_Path = tuple[Any, ...]


class _Fault(NamedTuple):
    path: _Path
    detail: str

    def is_in(self, names: Collection[str]) -> bool:
        return bool(self.path) and self.path[0] in names

    @property
    def pointer(self) -> str:
        return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in ("inputs", *self.path))


class _Inputs:
    """What a pipeline is run with, by name.

    Attributes:
        entries: the OGC descriptions by name, each with its ``schema``.
        schema: the JSON Schema of the object of them all.
    """

    def __init__(self, value: _Value, described: Mapping[str, Any]) -> None:
        hint = _free_fields(value.hint, value.name, described)
        what = f"of the parameter {value.name!r} of {value.handler}"
        self._only: str | None = None
        self._default = value.default
        self._adapter, schema = _adapter(hint, "validation", what)
        if not (_is_form(hint) and "properties" in schema):
            self._only = value.name
            field = _readable(hint, {})
            field = field if value.default is _MISSING else NotRequired[field]
            only = _typed_dict("Inputs", {value.name: field})
            self._adapter, schema = _adapter(only, "validation", what)
            _finish(schema["properties"][value.name], value)
        self._check = _check_of(schema)
        self._is_open = bool(schema.get("additionalProperties", False))
        self._fields: Mapping[str, Any] = schema["properties"]
        self.entries = self._described(schema.get("required", ()), described)
        self.schema = self._schema()

    def _described(self, required: Sequence[str], described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        entries = {
            name: {**_entry(name, schema), "minOccurs": int(name in required), "maxOccurs": 1}
            for name, schema in self._fields.items()
        }
        return _merged("input", entries, described)

    def _schema(self) -> dict[str, Any]:
        properties = {name: entry["schema"] for name, entry in self.entries.items()}
        required = [name for name, entry in self.entries.items() if entry["minOccurs"]]
        schema = {"type": "object", "properties": properties, "additionalProperties": self._is_open}
        return {**schema, "required": required} if required else schema

    def read(self, inputs: object) -> Any:
        if not isinstance(inputs, dict):
            raise BadInputs([InputFault("/inputs", "must be an object")])
        if self._is_open or inputs.keys() <= self._fields.keys():
            try:
                value = self._adapter.validate_json(_encode(inputs), strict=True)
                if not self._breaches(inputs):
                    return self._taken(value)
            except (ValueError, RecursionError):
                pass
        return self._taken(self._read_with_care(inputs))

    def _taken(self, value: Any) -> Any:
        return value if self._only is None else value.get(self._only, self._default)

    # -- of inputs that are not right as they are

    def _read_with_care(self, inputs: dict[str, Any]) -> Any:
        """Return the value that the inputs stand for in other forms, or raise all that is wrong."""
        unknown = () if self._is_open else [name for name in inputs if name not in self._fields]
        faults = [_Fault((name,), "is not an input of this process") for name in unknown]
        unreadable = list(_unreadable(inputs))
        left_out = {*unknown, *(fault.path[0] for fault in unreadable)}
        value, others = self._try_forms({name: one for name, one in inputs.items() if name not in left_out})
        faults += unreadable
        faults += [fault for fault in others if not fault.is_in(left_out)]
        if faults:
            raise BadInputs([InputFault(fault.pointer, fault.detail) for fault in dict.fromkeys(faults)])
        return value

    def _try_forms(self, inputs: dict[str, Any]) -> tuple[Any, list[_Fault]]:
        value, faults = self._try(inputs)
        wrong = {fault.path[0] for fault in faults if fault.path and fault.path[0] in inputs}
        inner = {name: inputs[name]["value"] for name in wrong if _is_qualified(inputs[name])}
        if inner:
            value, again = self._try({**inputs, **inner})
            faults = [fault for name in inner for fault in self._better(name, faults, again)]
            faults += [fault for fault in again if not fault.is_in(inner)]
        references = {name for name in wrong - inner.keys() if self._is_reference(name, inputs[name])}
        faults = [fault for fault in faults if not fault.is_in(references)]
        return value, faults + [
            _Fault((name,), "values by reference are not supported") for name in references
        ]

    def _better(self, name: str, faults: list[_Fault], again: list[_Fault]) -> list[_Fault]:
        """What is wrong with an input of the qualified form: with it as it is, or with the value in it."""
        inside = [fault for fault in again if fault.is_in((name,))]
        if inside and "value" in self._known(name):
            return [fault for fault in faults if fault.is_in((name,))]
        return [_Fault((name, "value", *fault.path[1:]), fault.detail) for fault in inside]

    def _is_reference(self, name: str, given: object) -> bool:
        return isinstance(given, dict) and "href" in given and "href" not in self._known(name)

    def _known(self, name: str) -> Mapping[str, Any]:
        """The fields of an input that is an object itself."""
        return cast("Mapping[str, Any]", self._fields[name].get("properties", {}))

    def _try(self, inputs: dict[str, Any], repairs: int = 8) -> tuple[Any, list[_Fault]]:
        try:
            value = self._adapter.validate_json(_encode(inputs), strict=True)
        except ValidationError as error:
            found = [_found(one, inputs) for one in error.errors(include_url=False, include_context=False)]
            repaired = _repaired(inputs, found) if repairs else None
            if repaired is not None:
                return self._try(repaired, repairs - 1)
            return None, [_Fault(one.path, _words(one.kind, one.detail)) for one in found]
        except ValueError:  # of old pydantic, for a date in the year 0
            return None, [_Fault((), "is not valid")]
        return value, self._breaches(inputs)

    def _breaches(self, inputs: dict[str, Any]) -> list[_Fault]:
        return [] if self._check is None else list(self._check((), inputs))


def _finish(schema: dict[str, Any], value: _Value) -> None:
    """Make the schema of a parameter of the schema of a field."""
    if schema.get("title") == _title(value.name):
        del schema["title"]
    if value.default is not _MISSING:
        try:
            schema.setdefault("default", to_jsonable_python(value.default, inf_nan_mode="null"))
        except PydanticSerializationError:  # an object that stands for "nothing", for example
            return


def _is_qualified(given: object) -> bool:
    return isinstance(given, dict) and "value" in given and given.keys() <= _QUALIFIERS


def _unreadable(inputs: Mapping[str, Any]) -> Iterator[_Fault]:
    """What Python's JSON has and nobody else's: NaN, half characters; and what pydantic does not read."""
    waiting: list[tuple[_Path, Any]] = [((), inputs)]
    while waiting:  # no recursion, so that no nesting is too deep
        path, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield _Fault(path, "is not a finite number")
        elif isinstance(value, str) and not _is_text(value):
            yield _Fault(path, "is not valid Unicode")
        elif isinstance(value, (dict, list)) and len(path) > _DEPTH:
            yield _Fault(path, "is nested too deeply")
        elif isinstance(value, dict):
            if not all(map(_is_text, value)):
                yield _Fault(path, "has a name that is not valid Unicode")
            waiting.extend(((*path, key), one) for key, one in value.items() if _is_text(key))
        elif isinstance(value, list):
            waiting.extend(((*path, index), one) for index, one in enumerate(value))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- what pydantic finds wrong


class _Found(NamedTuple):
    """An error of pydantic's, and where it is in the inputs."""

    path: _Path
    value: Any
    kind: str
    detail: str


def _found(error: Any, inputs: Any) -> _Found:
    location, kind = error["loc"], error["type"]
    name = location[-1:] if kind.startswith("missing") else ()  # of what is not there
    paths = list(islice(_paths(inputs, location[: len(location) - len(name)]), 64))
    path, value = next((one for one in paths if one[1] == error["input"]), paths[0])
    return _Found((*path, *name), value, kind, error["msg"])


def _paths(value: Any, location: _Path) -> Iterator[tuple[_Path, Any]]:
    """The ways that a location may mean, and what they lead to.

    Between the keys it has names of union members and of validators, which may be keys, too.
    """
    if not location:
        yield (), value
        return
    key, *rest = location
    if (isinstance(value, dict) and key in value) or (
        isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value)
    ):
        for path, reached in _paths(value[key], tuple(rest)):
            yield (key, *path), reached
    yield from _paths(value, tuple(rest))


def _words(kind: str, detail: str) -> str:
    return detail if kind in _WORDS_FOR_PYDANTIC else "is not valid"


def _repaired(inputs: dict[str, Any], found: Sequence[_Found]) -> dict[str, Any] | None:
    """The inputs with the numbers that are wrong in their other forms; None if none has one."""
    others = [(one.path, _other_form(one)) for one in found]
    if all(other is None for _, other in others):
        return None
    changed: dict[str, Any] = json.loads(_encode(inputs))
    for (*way, last), other in others:
        if other is not None:
            holder: Any = changed
            for key in way:
                holder = holder[key]
            holder[last] = other
    return changed


def _other_form(found: _Found) -> int | float | None:
    """1 for 1.0 where an integer is wanted; to JSON Schema they are the same."""
    value = found.value
    if found.kind in ("int_type", "literal_error", "enum"):
        return int(value) if isinstance(value, float) and value.is_integer() else None
    if found.kind == "float_type" and type(value) is int:  # old pydantic takes none of 64 bits and more
        return float(value) if abs(value) <= sys.float_info.max else None
    return None


# -- what pydantic takes although the schema forbids it: true for the literal 1, "1700000000" for a date


_Check = Callable[[_Path, Any], Iterator[_Fault]]
_KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DECIMAL = re.compile(_NUMBER.replace("$", r"\Z"))


def _check_of(schema: Any) -> _Check | None:
    """What finds such faults in a value; None where there can be none."""
    checks = [check for check in _checks(schema) if check is not None]
    if not checks:
        return None

    def check_all(path: _Path, value: Any) -> Iterator[_Fault]:
        for check in checks:
            yield from check(path, value)

    return check_all


def _checks(schema: Any) -> Iterator[_Check | None]:
    if not isinstance(schema, Mapping):  # true, false
        return
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if any(isinstance(choice, (int, float)) for choice in choices):
        yield functools.partial(_check_choice, choices)
    if schema.get("format") in ("date", "date-time"):
        yield functools.partial(_check_text, _DATE, "is not a date like 2020-12-31")
    if schema.get("pattern") == _NUMBER:
        yield functools.partial(_check_text, _DECIMAL, "is not a number")
    yield _check_fields(schema)
    yield _check_items(schema)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            yield _check_alternatives(schema[key])
    yield from (_check_of(one) for one in schema.get("allOf", ()))


def _check_choice(choices: Sequence[Any], path: _Path, value: Any) -> Iterator[_Fault]:
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices):
        yield _Fault(path, "is not one of the values that there are")


def _check_text(pattern: re.Pattern[str], detail: str, path: _Path, value: Any) -> Iterator[_Fault]:
    if isinstance(value, str) and not pattern.match(value):
        yield _Fault(path, detail)


def _check_fields(schema: Mapping[str, Any]) -> _Check | None:
    known = schema.get("properties", {})
    named = {name: check for name, one in known.items() if (check := _check_of(one))}
    others = schema.get("additionalProperties")
    any_other = _check_of(others) if isinstance(others, dict) else None
    if not named and any_other is None:
        return None

    def check_fields(path: _Path, value: Any) -> Iterator[_Fault]:
        for key, one in value.items() if isinstance(value, dict) else ():
            found = named.get(key) if key in known else any_other
            if found is not None:
                yield from found((*path, key), one)

    return check_fields


def _check_items(schema: Mapping[str, Any]) -> _Check | None:
    first = [_check_of(one) for one in schema.get("prefixItems", ())]
    items = schema.get("items")
    others = _check_of(items) if isinstance(items, dict) else None
    if others is None and not any(first):
        return None

    def check(path: _Path, value: Any) -> Iterator[_Fault]:
        for index, one in enumerate(value) if isinstance(value, list) else ():
            found = first[index] if index < len(first) else others
            if found is not None:
                yield from found((*path, index), one)

    return check


def _check_alternatives(alternatives: Sequence[Any]) -> _Check | None:
    checks = [_check_of(one) for one in alternatives]
    if not any(checks):
        return None

    def check(path: _Path, value: Any) -> Iterator[_Fault]:
        faults: list[_Fault] = []
        for one, found in zip(alternatives, checks, strict=True):
            if _is_of_kind(one, value):
                faults = [] if found is None else list(found(path, value))
                if not faults:
                    return
        yield from faults

    return check


def _is_of_kind(schema: Any, value: Any) -> bool:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = _KINDS.get(kind, (object,)) if isinstance(kind, str) else (object,)
    return isinstance(value, kinds) and not (isinstance(value, bool) and int in kinds)
