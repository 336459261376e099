"""How values become JSON and values again, and where in a pipeline or a text that is."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

__all__ = [
    "MOST_LEVELS",
    "NEVER",
    "PLAIN",
    "Codec",
    "Reader",
    "UnwritableError",
    "Writer",
    "check_fields",
    "is_json",
    "list_of",
    "place",
    "write_plain",
]

MOST_LEVELS = 50  # of steps inside steps; for many more the stack would have no room


class UnwritableError(Exception):
    """What can't be written, and why, with what to do instead; and how ``describe`` shows it."""

    def __init__(self, what: str, why: str, shown: Any = None) -> None:
        super().__init__(f"({what}) {why}")
        self.shown = {"unsupported": what} if shown is None else shown


@dataclass(frozen=True)
class Writer:
    """Where in a pipeline something is written, and the names that things have there."""

    registry: Mapping[str, Any]
    names: Mapping[Any, str]
    is_strict: bool
    path: tuple[str, ...] = ()
    field: str = "it"

    def write(self, write: "_Write", value: Any) -> Any:
        try:
            return write(self, value)
        except UnwritableError as error:
            if not self.is_strict:
                return error.shown
            step = f"step {'/'.join(self.path)!r}" if self.path else "the pipeline"
            raise ValueError(f"{step} can't be written: {self.field} {error}") from None

    def inside(self, name: str) -> "Writer":
        if len(self.path) == MOST_LEVELS:
            why = f"is more than {MOST_LEVELS} levels deep; register a pipeline further out as one step"
            raise UnwritableError("the steps inside", why)
        return replace(self, path=(*self.path, str(name)), field="it")


@dataclass(frozen=True)
class Reader:
    """Where in a text something is read, and from where its names may be taken."""

    registry: Mapping[str, Any]
    modules: tuple[str, ...]
    where: str = "pipeline"
    level: int = 0

    def at(self, key: str | int) -> "Reader":
        return replace(self, where=place(self.where, key))

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}")

    def expect(self, kind: type, data: Any) -> Any:
        if _is_unsupported(data):
            raise self.error(f"{data['unsupported']!r} was left out of the text, which can't be read back")
        if type(data) is not kind:
            raise self.error(f"must be {_JSON_TYPES[kind]}, not {json.dumps(data)[:80]}")
        return data


def place(where: str, key: str | int) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{where}.{key}".lstrip(".")
    return f"{where}[{json.dumps(key)}]"


_JSON_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def _is_unsupported(data: Any) -> bool:
    return isinstance(data, dict) and [*data] == ["unsupported"] and isinstance(data["unsupported"], str)


def check_fields(where: str, data: Any, what: str, needs: Iterable[str], options: Iterable[str] = ()) -> None:
    known = [*needs, *options]
    for name in data:
        if name not in known:
            raise ValueError(f"{where}: the field {name!r} is not known; {what} has {', '.join(known)}")
    for name in needs:
        if name not in data:
            raise ValueError(f"{where}: the field {name!r} is missing")


_Write = Callable[[Writer, Any], Any]
_Read = Callable[[Reader, Any], Any]


class Codec(NamedTuple):
    """How the value of a field is written, and read."""

    write: _Write
    read: _Read


def list_of(codec: Codec) -> Codec:
    def write(writer: Writer, values: Any) -> Any:
        return [writer.write(codec.write, value) for value in values]

    def read(reader: Reader, data: Any) -> Any:
        return [codec.read(reader.at(index), item) for index, item in enumerate(reader.expect(list, data))]

    return Codec(write, read)


# -- values that are JSON themselves


def is_json(value: object) -> bool:
    """Tell whether JSON gives back the same: not for a tuple, an enum, NaN, or keys that are no str."""
    try:
        return _is_same(value, json.loads(json.dumps(value, allow_nan=False)))
    except RecursionError:
        if isinstance(value, (dict, list)):
            return False
        raise  # the stack was used up by the steps around it
    except (TypeError, ValueError):
        return False


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return _is_same([*one], [*other]) and _is_same([*one.values()], [*other.values()])
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


_LATER = "put the stage into a Pipeline, and give that one a name in the registry"
_WHY = {
    "concurrency": "is shared with what is not in the text; write a number",
    "executor": 'is made by the program; write executor="thread"',
    "limiter": f"is shared with what is not in the text; {_LATER}",
    "retry_budget": f"is shared with what is not in the text; {_LATER}",
}


def write_plain(writer: Writer, value: Any) -> Any:
    if not is_json(value):
        why = _WHY.get(writer.field, "would be changed by JSON; write a plain str, int or float")
        raise UnwritableError(type(value).__name__, why)
    return value


def _read_plain(reader: Reader, data: Any) -> Any:
    # else the constructor says what is wrong with it
    return reader.expect(str, data) if _is_unsupported(data) else data


def _read_never(reader: Reader, data: Any) -> Any:
    raise reader.error(f"can't be given in a text; {_LATER}")


PLAIN = Codec(write_plain, _read_plain)
NEVER = Codec(write_plain, _read_never)
