"""What is wrong with inputs: what pydantic finds, and what it takes although the schema forbids it."""

import functools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, get_args

from pydantic_core import core_schema

from ._schemas import NUMBER

__all__ = ["Fault", "Place", "check_of", "encode", "in_words", "located", "repair"]


_WORDS_FOR_PYDANTIC = frozenset(get_args(core_schema.ErrorType)) - {
    # these have the text of an exception in them
    *("value_error", "assertion_error", "get_attribute_error", "iteration_error", "mapping_type"),
}

Place = tuple[Any, ...]
encode = json.JSONEncoder(allow_nan=False, check_circular=False).encode


class Fault(NamedTuple):
    path: Place
    detail: str

    def is_in(self, names: Collection[str]) -> bool:
        return bool(self.path) and self.path[0] in names

    @property
    def pointer(self) -> str:
        return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in ("inputs", *self.path))


# -- what pydantic finds wrong


class _Found(NamedTuple):
    """An error of pydantic's, and where it is in the inputs."""

    path: Place
    value: Any
    kind: str
    detail: str


def located(error: Any, inputs: Any) -> _Found:
    location, kind = error["loc"], error["type"]
    name = location[-1:] if kind.startswith("missing") else ()  # of what is not there
    paths = list(islice(_paths(inputs, location[: len(location) - len(name)]), 64))
    path, value = next((one for one in paths if one[1] == error["input"]), paths[0])
    return _Found((*path, *name), value, kind, error["msg"])


def _paths(value: Any, location: Place) -> Iterator[tuple[Place, Any]]:
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


def in_words(kind: str, detail: str) -> str:
    return detail if kind in _WORDS_FOR_PYDANTIC else "is not valid"


def repair(inputs: dict[str, Any], found: Sequence[_Found]) -> dict[str, Any] | None:
    """The inputs with the numbers that are wrong in their other forms; None if none has one."""
    others = [(one.path, _other_form(one)) for one in found]
    if all(other is None for _, other in others):
        return None
    changed: dict[str, Any] = json.loads(encode(inputs))
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


_Check = Callable[[Place, Any], Iterator[Fault]]
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
_DECIMAL = re.compile(NUMBER.replace("$", r"\Z"))


def check_of(schema: Any) -> _Check | None:
    """What finds such faults in a value; None where there can be none."""
    checks = [check for check in _checks(schema) if check is not None]
    if not checks:
        return None

    def check_all(path: Place, value: Any) -> Iterator[Fault]:
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
    if schema.get("pattern") == NUMBER:
        yield functools.partial(_check_text, _DECIMAL, "is not a number")
    yield _check_fields(schema)
    yield _check_items(schema)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            yield _check_alternatives(schema[key])
    yield from (check_of(one) for one in schema.get("allOf", ()))


def _check_choice(choices: Sequence[Any], path: Place, value: Any) -> Iterator[Fault]:
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices):
        yield Fault(path, "is not one of the values that there are")


def _check_text(pattern: re.Pattern[str], detail: str, path: Place, value: Any) -> Iterator[Fault]:
    if isinstance(value, str) and not pattern.match(value):
        yield Fault(path, detail)


def _check_fields(schema: Mapping[str, Any]) -> _Check | None:
    known = schema.get("properties", {})
    named = {name: check for name, one in known.items() if (check := check_of(one))}
    others = schema.get("additionalProperties")
    any_other = check_of(others) if isinstance(others, dict) else None
    if not named and any_other is None:
        return None

    def check_fields(path: Place, value: Any) -> Iterator[Fault]:
        for key, one in value.items() if isinstance(value, dict) else ():
            found = named.get(key) if key in known else any_other
            if found is not None:
                yield from found((*path, key), one)

    return check_fields


def _check_items(schema: Mapping[str, Any]) -> _Check | None:
    first = [check_of(one) for one in schema.get("prefixItems", ())]
    items = schema.get("items")
    others = check_of(items) if isinstance(items, dict) else None
    if others is None and not any(first):
        return None

    def check(path: Place, value: Any) -> Iterator[Fault]:
        for index, one in enumerate(value) if isinstance(value, list) else ():
            found = first[index] if index < len(first) else others
            if found is not None:
                yield from found((*path, index), one)

    return check


def _check_alternatives(alternatives: Sequence[Any]) -> _Check | None:
    checks = [check_of(one) for one in alternatives]
    if not any(checks):
        return None

    def check(path: Place, value: Any) -> Iterator[Fault]:
        faults: list[Fault] = []
        for one, found in zip(alternatives, checks, strict=True):
            if _is_of_kind(one, value):
                faults = [] if found is None else list(found(path, value))
                if not faults:
                    return
            elif isinstance(value, bool) and found is not None:  # may be taken for the literal 1
                faults.extend(found(path, value))
        yield from faults

    return check


def _is_of_kind(schema: Any, value: Any) -> bool:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = _KINDS.get(kind, (object,)) if isinstance(kind, str) else (object,)
    if isinstance(value, dict) and kind == "object" and not _has_what_tells(schema, value):
        return False
    return isinstance(value, kinds) and not (isinstance(value, bool) and int in kinds)


def _has_what_tells(schema: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Whether an object has the fields by which one alternative is told from another."""
    fields = schema.get("properties", {})
    return all(name in value for name in schema.get("required", ())) and all(
        value[name] == one["const"] for name, one in fields.items() if name in value and "const" in one
    )
