"""The JSON Schemas of type hints, which pydantic makes, mended where they do not say what it takes."""

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import typing_extensions
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema, to_jsonable_python
from typing_extensions import is_typeddict

from ._hints import typed_dict

__all__ = ["NUMBER", "adapter_of", "entry_of", "free_fields", "readable", "title_of"]


# -- hints that pydantic does not read as they are


# of the standard library's, it takes TypedDicts from Python 3.12 on
_TAKES_TYPED_DICTS = sys.version_info >= (3, 12)
# of iterables, it would check each element when the handler comes to it, or none
_LAZY = frozenset({Iterable, Collection})


def readable(hint: Any, twins: dict[Any, Any]) -> Any:
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
        return Annotated[(readable(arguments[0], twins), *arguments[1:])]
    changed = tuple(readable(argument, twins) for argument in arguments)
    if (origin or hint) in _LAZY:
        return list[changed] if changed else list  # type: ignore[valid-type]
    if all(one is other for one, other in zip(changed, arguments, strict=True)):
        return hint
    return Union[changed] if origin in (Union, UnionType) else origin[changed]  # noqa: UP007


def _twin(hint: Any, twins: dict[Any, Any]) -> Any:
    if hint in twins:  # of itself, inside it
        return twins[hint]
    kind = get_origin(hint) or hint
    twins[hint] = twin = typed_dict(kind.__name__, {})
    hints, required = {}, set()
    for name, field in get_type_hints(kind, include_extras=True).items():
        is_required, field = _unqualified(_filled_in(field, hint), name in kind.__required_keys__)
        hints[name] = readable(field, twins)
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


NUMBER = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$"
_INTEGER = r"^(0|-?[1-9][0-9]{0,3999})$"


class _Schemas(GenerateJsonSchema):
    """JSON Schemas that say what is accepted, without remarks on what they can't say."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> dict[str, Any]:
        made = super().decimal_schema(schema)
        for choice in made.get("anyOf", [made]):
            if choice.get("type") == "string":
                choice.setdefault("pattern", NUMBER)
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


def adapter_of(hint: Any, mode: Literal["validation", "serialization"], what: str) -> tuple[Any, Any]:
    """What reads and writes values of a type, and their schema."""
    try:
        with warnings.catch_warnings():  # that nothing stops a handler from changing its dict
            warnings.filterwarnings("ignore", message=".*using the `ReadOnly` qualifier")
            adapter: TypeAdapter[Any] = TypeAdapter(readable(hint, {}))
        schema = adapter.json_schema(mode=mode, schema_generator=_Schemas)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"there is no JSON for the hint {hint!r} {what} ({reason}); write a TypedDict, a dataclass, a"
            " pydantic model, or a type that pydantic knows"
        ) from error
    return adapter, _Definitions(schema.get("$defs", {})).inline(to_jsonable_python(schema))


def title_of(name: str) -> str:
    return name.replace("_", " ").strip().title() or name


def entry_of(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    entry = {"title": schema.get("title") or title_of(name)}
    if "description" in schema:
        entry["description"] = schema["description"]
    return {**entry, "schema": schema}


def free_fields(hint: Any, name: str, described: Mapping[str, Any]) -> Any:
    """The hint, or where there is none the fields that the description has: names, no types."""
    if hint is not Any or not described or name in described:
        return hint
    fields = {
        key: NotRequired[Any] if entry.get("minOccurs") == 0 else Any for key, entry in described.items()
    }
    return typed_dict(name, fields)
