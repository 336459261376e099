"""Items, results and errors as JSON text: what a journal keeps, and what travels to a worker and back."""

import asyncio
import builtins
import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from . import errors
from .errors import RecordedError, StageExecutionError
from .types import structure_of

__all__ = [
    "digest_of",
    "dump_error",
    "load_error",
    "read_json",
    "stage_names",
    "text_of",
    "write_canonical",
    "write_json",
]

_COMPACT = (",", ":")
_WRITER = json.JSONEncoder(allow_nan=False, separators=_COMPACT)
_CANONICAL = json.JSONEncoder(allow_nan=False, separators=_COMPACT, sort_keys=True)
_TRACEBACK = 4_000  # characters of it at most, from its end
_DEEPEST = 50  # errors inside others; those further inside are text

read_json: Callable[[str | bytes], Any] = json.loads


def write_json(value: object, what: str) -> str:
    """Return a value as JSON text; ``what`` begins the message when it is none.

    Raises:
        TypeError: it holds something that JSON has no place for: ``NaN``, an infinity, itself.
    """
    return _written(_WRITER, value, what)


def write_canonical(value: object, what: str) -> str:
    """Return a value as JSON text that does not depend on the order of its keys.

    Raises:
        TypeError: it is not JSON.
    """
    return _written(_CANONICAL, value, what)


def _written(writer: json.JSONEncoder, value: object, what: str) -> str:
    try:
        return writer.encode(value)
    except Exception as error:  # of another type in it; NaN, too deep, in a circle, changed meanwhile
        raise TypeError(f"{what} is not JSON: {error}") from error


def digest_of(text: str) -> bytes:
    """Return what tells one text from another, in 16 bytes (BLAKE2b, RFC 7693)."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def stage_names(pipeline: object) -> list[Any]:
    """Return the names of a pipeline's stages, those of a step with others inside with a list of theirs."""
    parts = structure_of(pipeline).parts
    return [[part.name, *nested] if (nested := stage_names(part.step)) else part.name for part in parts]


# -- errors


def dump_error(error: BaseException) -> dict[str, Any]:
    """Return an error as values of JSON: its type, its arguments or its text, and where it came from.

    Of a :class:`StageExecutionError` that is all it says, but for the item; of a group each of its errors.
    """
    return _dump(error, 0)


def _dump(error: BaseException, depth: int) -> dict[str, Any]:
    try:
        data = _parts_of(error, depth + 1)
        notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    except Exception:  # of its attributes
        return {"type": _type_name(type(error)), "message": text_of(error)}
    return data | {"notes": notes} if notes else data


def _parts_of(error: BaseException, depth: int) -> dict[str, Any]:
    if type(error) is StageExecutionError and depth <= _DEEPEST:
        data = {
            "stage": error.stage_name,
            "error": _dump(error.original_error, depth),
            "attempts": error.attempts,
            "element": list(error.element),
            "earlier": [_dump(part, depth) for part in error.earlier],
            "is_joint": error._is_joint,
        }
        return {key: value for key, value in data.items() if value not in ([], False)}
    if type(error) is ExceptionGroup and depth <= _DEEPEST:
        return {"group": error.message, "errors": [_dump(part, depth) for part in error.exceptions]}
    data = {"type": _type_name(type(error)), "traceback": _traceback_of(error)}
    args = _arguments_of(error)
    return data | ({"message": text_of(error)} if args is None else {"args": args})


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}:{kind.__qualname__}"


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__))[-_TRACEBACK:]


def text_of(error: object) -> str:
    """Return the text of an error, or else say that it has raised when it was asked."""
    try:
        return str(error)
    except Exception as broken:
        return f"<its text can't be had: {type(broken).__name__}>"


def _arguments_of(error: BaseException) -> list[Any] | None:
    """With what it can be made again; ``None`` where only its text is to be had."""
    if _type_name(type(error)) not in _KNOWN:
        return None
    try:
        args = list(error.__reduce__()[1])  # as pickle does
        return args if read_json(_WRITER.encode(args)) == _listed(args) else None
    except Exception:
        return None


def _listed(value: Any) -> Any:
    """What JSON makes of tuples."""
    return [_listed(part) for part in value] if isinstance(value, (list, tuple)) else value


def _known() -> dict[str, type[BaseException]]:
    ours = [getattr(errors, name) for name in errors.__all__]
    kinds = [kind for kind in (*vars(builtins).values(), *ours, asyncio.CancelledError) if _is_single(kind)]
    return {_type_name(kind): kind for kind in kinds}


def _is_single(kind: object) -> bool:
    if not isinstance(kind, type) or issubclass(kind, (BaseExceptionGroup, StageExecutionError)):
        return False
    return issubclass(kind, (Exception, asyncio.CancelledError))


_KNOWN = _known()


def load_error(data: Mapping[str, Any]) -> BaseException:
    """Return the error that :func:`dump_error` has written.

    One of Python's own or of this library's is of its class again, if it can be made of its arguments; any
    other is a :class:`RecordedError`. Its traceback is a note.
    """
    error = _load(data)
    for note in data.get("notes", ()):
        if note not in getattr(error, "__notes__", ()):  # that of the attempts is written anew
            error.add_note(note)
    return error


def _load(data: Mapping[str, Any]) -> BaseException:
    if "stage" in data:
        return _load_stage_error(data)
    if "group" in data:
        return ExceptionGroup(data["group"], cast("Sequence[Exception]", _load_all(data["errors"])))
    error = _made(_KNOWN.get(data["type"]), data.get("args"))
    if error is None:
        message = data["message"] if "message" in data else ", ".join(map(repr, data["args"]))
        error = RecordedError(data["type"], message)
    if data.get("traceback"):
        error.add_note("where it was raised:\n" + data["traceback"].rstrip())
    return error


def _load_all(parts: Sequence[Mapping[str, Any]]) -> list[BaseException]:
    return [load_error(part) for part in parts]


def _load_stage_error(data: Mapping[str, Any]) -> StageExecutionError:
    error = StageExecutionError(data["stage"], load_error(data["error"]), attempts=data["attempts"])
    error.__cause__ = error.original_error
    error.element = tuple(data.get("element", ()))
    error.earlier = cast("tuple[StageExecutionError, ...]", tuple(_load_all(data.get("earlier", ()))))
    error._is_joint = data.get("is_joint", False)
    return error


def _made(kind: Callable[..., BaseException] | None, args: Sequence[Any] | None) -> BaseException | None:
    if kind is None or args is None:
        return None
    try:
        return kind(*args)
    except Exception:  # another version of Python, or of this library
        return None
