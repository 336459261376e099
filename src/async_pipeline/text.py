"""A pipeline as JSON text, and back.

A text that names handlers decides what runs. So :func:`loads` takes them from a registry, or imports them
from modules that the caller has allowed: any function or class that is defined there, in any place of the
pipeline, and by ``partial`` with arguments of the text's choice; never what a module has only imported from
elsewhere. Importing a module runs it, so allow none that does something when it is imported. The steps of a
``parallel`` are in the order of their fields, which some stores of JSON change.
"""

import builtins
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from importlib import import_module
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple

from . import errors
from .pipeline import Pipeline
from .stage import Stage, callable_name, is_step
from .steps import (
    Branch,
    Each,
    Fallback,
    Keep,
    Parallel,
    Require,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
)
from .types import structure_of

__all__ = ["describe", "dumps", "loads"]

_VERSION = 1
_MOST_LEVELS = 50  # of steps inside steps; for many more the stack would have no room


def dumps(pipeline: Any, registry: Mapping[str, Any] | None = None) -> str:
    """Return a pipeline as a line of ASCII; see :meth:`Pipeline.dumps <async_pipeline.Pipeline.dumps>`.

    Raises:
        TypeError: ``registry`` is no mapping of names to callables, exception types and steps.
        ValueError: something in the pipeline can't be written, or steps are nested more than 50 deep.
    """
    known = _checked_registry(registry)
    writer = _Writer(known, _names_of(known), is_strict=True)
    return json.dumps(_document(writer, pipeline), separators=(",", ":"))


def describe(pipeline: Any) -> str:
    """Return any step as the JSON that :func:`dumps` writes, indented, for people.

    Nothing is refused: what could not be written stands there as ``{"unsupported": "Semaphore"}``, or as a
    name like ``"shop:<lambda>"``, and :func:`loads` refuses either. The same pipeline gives the same text.
    """
    return json.dumps(_document(_Writer({}, {}, is_strict=False), pipeline), indent=2)


def loads(
    text: str, registry: Mapping[str, Any] | None = None, allow_import: Iterable[str] = ()
) -> Pipeline[Any, Any]:
    """Build a pipeline from text; see :meth:`Pipeline.loads <async_pipeline.Pipeline.loads>`.

    Raises:
        TypeError: an argument is of the wrong type; bytes have to be decoded first.
        ValueError: the text is wrong; the message says where.
        ImportError: an allowed module can't be imported, whatever its code has raised.
    """
    reader = _Reader(_checked_registry(registry), _checked_modules(allow_import))
    document = _checked_document(_parsed(text))
    try:
        pipeline = _read_step(reader, document["pipeline"])
    except RecursionError as error:
        raise reader.error("the stack has no room for so many steps inside steps") from error
    if not isinstance(pipeline, Pipeline):
        raise reader.error(f"must be a pipeline, not {type(pipeline).__name__}")
    return pipeline


def _document(writer: "_Writer", pipeline: Any) -> dict[str, Any]:
    # written out even if the registry has a name for it
    write = _write_kind if type(pipeline) is Pipeline else _write_step
    try:
        return {"version": _VERSION, "pipeline": writer.write(write, pipeline)}
    except RecursionError as error:
        raise ValueError("the stack has no room to write so many steps inside steps") from error


# -- where something is written or read


class _UnwritableError(Exception):
    """What can't be written, and why, with what to do instead; and how ``describe`` shows it."""

    def __init__(self, what: str, why: str, shown: Any = None) -> None:
        super().__init__(f"({what}) {why}")
        self.shown = {"unsupported": what} if shown is None else shown


@dataclass(frozen=True)
class _Writer:
    """Where in a pipeline something is written, and the names that things have there."""

    registry: Mapping[str, Any]
    names: Mapping[Any, str]
    is_strict: bool
    path: tuple[str, ...] = ()
    field: str = "it"

    def write(self, write: "_Write", value: Any) -> Any:
        try:
            return write(self, value)
        except _UnwritableError as error:
            if not self.is_strict:
                return error.shown
            step = f"step {'/'.join(self.path)!r}" if self.path else "the pipeline"
            raise ValueError(f"{step} can't be written: {self.field} {error}") from None

    def inside(self, name: str) -> "_Writer":
        if len(self.path) == _MOST_LEVELS:
            why = f"is more than {_MOST_LEVELS} levels deep; register a pipeline further out as one step"
            raise _UnwritableError("the steps inside", why)
        return replace(self, path=(*self.path, str(name)), field="it")


@dataclass(frozen=True)
class _Reader:
    """Where in a text something is read, and from where its names may be taken."""

    registry: Mapping[str, Any]
    modules: tuple[str, ...]
    where: str = "pipeline"
    level: int = 0

    def at(self, key: str | int) -> "_Reader":
        return replace(self, where=_place(self.where, key))

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}")

    def expect(self, kind: type, data: Any) -> Any:
        if _is_unsupported(data):
            raise self.error(f"{data['unsupported']!r} was left out of the text, which can't be read back")
        if type(data) is not kind:
            raise self.error(f"must be {_JSON_TYPES[kind]}, not {json.dumps(data)[:80]}")
        return data


def _place(where: str, key: str | int) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{where}.{key}".lstrip(".")
    return f"{where}[{json.dumps(key)}]"


_JSON_TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def _is_unsupported(data: Any) -> bool:
    return isinstance(data, dict) and [*data] == ["unsupported"] and isinstance(data["unsupported"], str)


_Write = Callable[[_Writer, Any], Any]
_Read = Callable[[_Reader, Any], Any]


class _Codec(NamedTuple):
    """How the value of a field is written, and read."""

    write: _Write
    read: _Read


def _list_of(codec: _Codec) -> _Codec:
    def write(writer: _Writer, values: Any) -> Any:
        return [writer.write(codec.write, value) for value in values]

    def read(reader: _Reader, data: Any) -> Any:
        return [codec.read(reader.at(index), item) for index, item in enumerate(reader.expect(list, data))]

    return _Codec(write, read)


# -- values that are JSON themselves


def _is_json(value: object) -> bool:
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


def _write_plain(writer: _Writer, value: Any) -> Any:
    if not _is_json(value):
        why = _WHY.get(writer.field, "would be changed by JSON; write a plain str, int or float")
        raise _UnwritableError(type(value).__name__, why)
    return value


def _read_plain(reader: _Reader, data: Any) -> Any:
    # else the constructor says what is wrong with it
    return reader.expect(str, data) if _is_unsupported(data) else data


def _read_never(reader: _Reader, data: Any) -> Any:
    raise reader.error(f"can't be given in a text; {_LATER}")


_PLAIN = _Codec(_write_plain, _read_plain)
_NEVER = _Codec(_write_plain, _read_never)


# -- callables, by name


def _names_of(registry: Mapping[str, Any]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for meant in (_itself, _as_callable):  # what a name is for goes before what a Stage of that name calls
        for name, thing in registry.items():
            names.setdefault(_identity(meant(thing)), name)
    return names


def _itself(thing: Any) -> Any:
    return thing


def _identity(thing: Any) -> Any:
    # a method is another object each time it is looked up; those in C compare by what they belong to
    if isinstance(thing, MethodType):
        return id(thing.__self__), id(thing.__func__)
    return thing if isinstance(thing, (BuiltinFunctionType, MethodWrapperType)) else id(thing)


def _as_callable(thing: Any) -> Any:
    return thing.handler if _is(thing, Stage) and not callable(thing) else thing


def _is(thing: Any, *kinds: type) -> bool:
    return issubclass(type(thing), kinds)  # isinstance would ask the thing for its __class__


def _write_callable(writer: _Writer, thing: Any) -> Any:
    name = writer.names.get(_identity(thing))
    if name is not None:
        return name
    return _write_partial(writer, thing) if type(thing) is partial else _write_name(writer, thing)


def _write_name(writer: _Writer, thing: Any) -> str:
    module, qualname = _own_name(thing)
    name = f"{module}:{qualname}"
    found = _as_callable(_find(sys.modules.get(module), qualname))
    if _identity(found) != _identity(thing):
        why = f"can't be imported by name; define it at the top of a module, or {_naming(thing)}"
        raise _UnwritableError(_label(thing), why, name if "<" in qualname else None)
    if name in writer.registry:
        raise _UnwritableError(
            name, "has the name of something else in the registry; register both by other names"
        )
    return name


def _naming(thing: Any) -> str:
    name = callable_name(thing)
    return f"name it: dumps(registry={{{name if name.isidentifier() else 'name'!r}: ...}})"


def _label(thing: Any) -> str:
    module, qualname = _own_name(thing)
    if isinstance(thing, _BOUND) and not isinstance(thing.__self__, ModuleType):
        return f"bound method {thing.__qualname__}"
    return f"{module}:{qualname}" if qualname else type(thing).__name__


_BOUND = (MethodType, BuiltinFunctionType, MethodWrapperType)


def _own_name(thing: Any) -> tuple[str, str]:
    """The module and the qualified name by which a thing says it was defined, or empty strings."""
    try:
        module, qualname = getattr(thing, "__module__", None), thing.__qualname__
        if module is None:  # of str.split and dict.fromkeys
            module = (getattr(thing, "__objclass__", None) or thing.__self__).__module__
    except Exception:  # a proxy may raise anything when it is asked
        return "", ""
    return (module, qualname) if type(module) is type(qualname) is str else ("", "")


_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, ClassMethodDescriptorType)


def _find(module: Any, qualname: str) -> Any:
    """What a module, or a class in it, defines by this name, or None; nothing in there is run to find it."""
    first, *parts = qualname.split(".")
    found: Any = getattr(module, "__dict__", {}).get(first)
    for part in parts:
        found = _member(found, part) if _is(found, type) else None
    return None if any(map(_is_hidden, [first, *parts])) else found


def _is_hidden(part: str) -> bool:
    return not part.isidentifier() or (part.startswith("__") and part.endswith("__"))


def _member(owner: type, name: str) -> Any:
    member: Any = vars(owner).get(name)
    function = member.__func__ if _is(member, staticmethod, classmethod) else member
    if _is(function, *_FUNCTIONS):
        return member.__get__(None, owner)
    return member if _is(member, type, Stage) else None


def _read_callable(reader: _Reader, data: Any) -> Any:
    if isinstance(data, dict) and "partial" in data:
        return _read_partial(reader, data)
    name = reader.expect(str, data)
    if name not in reader.registry:
        return _read_import(reader, name)
    thing = _as_callable(reader.registry[name])
    if not callable(thing):
        raise reader.error(f"{name!r} is a step in the registry, but must be a callable here")
    return thing


def _read_import(reader: _Reader, name: str) -> Any:
    module, _, qualname = name.partition(":")
    if any(map(_is_hidden, qualname.split("."))) or not _is_module_name(module):
        raise reader.error(f"{name!r} is not in the registry, and no module:qualname that can be imported")
    if not _is_allowed(module, reader.modules):
        raise reader.error(
            f"{name!r} is neither registered nor allowed; write registry={{{name!r}: ...}}"
            + _or_allow(module)
        )
    try:
        found = _as_callable(_find(import_module(module), qualname))
    except (Exception, SystemExit) as error:  # the text has chosen the module: it may be a script
        why = f"{type(error).__name__}: {error}"
        raise ImportError(f"{reader.where}: {module!r} can't be imported: {why}", name=module) from error
    if found is None or _own_name(found) != (module, qualname) or not callable(found):
        raise reader.error(
            f"{name!r} is not defined there as a function or a class; register it by this name"
        )
    return found


def _or_allow(module: str) -> str:
    if module == "__main__":  # of the program that wrote the text, and hardly of this one
        return ""
    return f", or allow_import=[{module!r}] if you trust the text"


def _is_module_name(module: str) -> bool:
    return all(map(str.isidentifier, module.split(".")))


def _is_allowed(module: str, modules: tuple[str, ...]) -> bool:
    # importing a __main__ runs a program, so it has to be allowed by its own name
    is_inside = module.startswith(tuple(f"{allowed}." for allowed in modules))
    return module in modules or (is_inside and not any(map(_is_hidden, module.split("."))))


_CALLABLE = _Codec(_write_callable, _read_callable)


def _write_partial(writer: _Writer, thing: Any) -> Any:
    args, keywords = [*thing.args], thing.keywords
    if thing.__dict__ or not (_is_json(args) and _is_json(keywords)):
        why = f"has attributes, or arguments that JSON would change; give it JSON values, or {_naming(thing)}"
        raise _UnwritableError(f"partial of {_label(thing.func)}", why)
    given = {"args": args, "keywords": keywords}
    written = {"partial": writer.write(_write_callable, thing.func)}
    return written | {option: values for option, values in given.items() if values}


def _read_partial(reader: _Reader, data: Any) -> Any:
    _check_fields(reader.where, data, "a partial", ["partial"], ["args", "keywords"])
    args, keywords = data.get("args", []), data.get("keywords", {})
    if not (type(args) is list and type(keywords) is dict):
        raise reader.error("the args of a partial must be a list, and its keywords an object")
    return partial(_read_callable(reader.at("partial"), data["partial"]), *args, **keywords)


# -- exception types, by name


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


_KNOWN_ERRORS = {
    f"{kind.__module__}:{kind.__qualname__}": kind
    for kind in (*vars(builtins).values(), *(getattr(errors, name) for name in errors.__all__))
    if _is_error(kind)
}


def _write_kinds(writer: _Writer, kinds: Any) -> Any:
    return _TUPLE.write(writer, kinds) if isinstance(kinds, tuple) else _write_callable(writer, kinds)


def _read_kinds(reader: _Reader, data: Any) -> Any:
    return tuple(_TUPLE.read(reader, data)) if isinstance(data, list) else _read_kind(reader, data)


def _read_kind(reader: _Reader, data: Any) -> Any:
    is_known = isinstance(data, str) and data in _KNOWN_ERRORS and data not in reader.registry
    return _KNOWN_ERRORS[data] if is_known else _read_callable(reader, data)


_TUPLE = _list_of(_Codec(_write_callable, _read_kind))
_KINDS = _Codec(_write_kinds, _read_kinds)  # a predicate, too


# -- steps


class _Kind(NamedTuple):
    """A kind of step: its class, what builds it, the fields that it needs besides a name, and its options."""

    type: type
    build: Callable[..., Any]
    needs: Mapping[str, _Codec]
    options: Mapping[str, _Codec] = {}

    def codecs(self) -> dict[str, _Codec]:
        return {"name": _PLAIN, **self.needs, **self.options}


def _write_step(writer: _Writer, step: Any) -> Any:
    name = writer.names.get(id(step))
    is_named = name is not None and writer.registry[name] is step and type(step) is not Stage
    return {"kind": "step", "step": name} if is_named else _write_kind(writer, step)


def _write_kind(writer: _Writer, step: Any) -> Any:
    name, kind = next(
        ((name, kind) for name, kind in _STEPS.items() if type(step) is kind.type), (None, None)
    )
    if kind is None:
        what = type(step).__name__
        why = f"is of a class of its own; name the object: dumps(registry={{{step.name!r}: ...}})"
        raise _UnwritableError(what, why, {"kind": "step", "step": {"unsupported": what}})
    written, options = {"kind": name}, structure_of(step).options
    for option, codec in kind.codecs().items():
        is_attribute = codec is _STEP or option == "name" or option in kind.needs
        value = getattr(step, option) if is_attribute else options.get(option)
        if value is not None:
            written[option] = replace(writer, field=option).write(codec.write, value)
    return written


def _read_step(reader: _Reader, data: Any) -> Any:
    name = reader.expect(dict, data).get("kind")
    if name == "step":
        return _read_registered(reader, data)
    if not (isinstance(name, str) and name in _STEPS):
        known = ", ".join([*_STEPS, "step"])
        raise reader.error(f"the kind must be one of {known}, not {json.dumps(name)[:80]}")
    kind = _STEPS[name]
    _check_fields(reader.where, data, f"a {name}", ["kind", "name", *kind.needs], kind.options)
    codecs = {option: codec for option, codec in kind.codecs().items() if option in data}
    arguments = {option: codec.read(reader.at(option), data[option]) for option, codec in codecs.items()}
    try:
        return kind.build(**arguments)
    except (TypeError, ValueError) as error:
        raise reader.error(str(error)) from error


def _read_registered(reader: _Reader, data: Any) -> Any:
    _check_fields(reader.where, data, "a step", ["kind", "step"])
    name = reader.at("step").expect(str, data["step"])
    step = reader.registry.get(name)
    if not is_step(step):
        what = f"registry={{{name!r}: ...}} must be there and be a step, with name and run"
        raise reader.at("step").error(what)
    return step


def _write_inner(writer: _Writer, step: Any) -> Any:
    return writer.inside(step.name).write(_write_step, step)


def _read_inner(reader: _Reader, data: Any) -> Any:
    if reader.level == _MOST_LEVELS:
        raise reader.error(f"this is more than {_MOST_LEVELS} levels deep")
    return _read_step(replace(reader, level=reader.level + 1), data)


_STEP = _Codec(_write_inner, _read_inner)
_LIST = _list_of(_STEP)


def _write_named(writer: _Writer, steps: Any) -> Any:
    written = {}
    for name, step in steps.items():
        checked = writer.write(_write_plain, name)
        written[name] = writer.inside(name).write(_write_step, step) if checked is name else checked
    return written


def _read_named(reader: _Reader, data: Any) -> Any:
    return {name: _read_inner(reader.at(name), step) for name, step in reader.expect(dict, data).items()}


def _fallback(steps: Any, **options: Any) -> Any:
    if not steps:
        raise ValueError("fallback requires at least one step")
    return fallback(*steps, **options)


_HOOKS = {
    "before_stage": _CALLABLE,
    "after_stage": _CALLABLE,
    "middlewares": _list_of(_CALLABLE),
    "observers": _list_of(_CALLABLE),
    "on_hook_error": _CALLABLE,
}
_CONCURRENCY = {"concurrency": _PLAIN}
_OPTIONS = {
    **dict.fromkeys(["timeout", "retries", "retry_delay", "backoff", "max_delay", "jitter"], _PLAIN),
    "retry_on": _KINDS,
    "executor": _PLAIN,
    "limiter": _NEVER,
    "on_error": _CALLABLE,
    "pass_context": _PLAIN,
    "retry_budget": _NEVER,
}
_STEPS = {
    "stage": _Kind(Stage, Stage, {"handler": _CALLABLE}, _OPTIONS),
    "pipeline": _Kind(Pipeline, Pipeline, {"stages": _LIST}, _HOOKS),
    "parallel": _Kind(
        Parallel,
        lambda steps, name: parallel(steps, name=name),
        {"steps": _Codec(_write_named, _read_named)},
    ),
    "each": _Kind(Each, each, {"step": _STEP}, _CONCURRENCY),
    "keep": _Kind(Keep, keep, {"predicate": _STEP}, _CONCURRENCY),
    "branch": _Kind(
        Branch,
        lambda cases, **options: branch(*cases, **options),
        {"cases": _list_of(_LIST)},
        {"otherwise": _STEP},
    ),
    "fallback": _Kind(Fallback, _fallback, {"steps": _LIST}, {"on": _KINDS}),
    "require": _Kind(Require, lambda fields, name: require(*fields, name=name), {"fields": _list_of(_PLAIN)}),
}


# -- the text as a whole, and the arguments


class _Repeated(dict[str, Any]):
    """An object of the text in which a field stands twice."""


def _fields_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else _Repeated(Counter(name for name, _ in pairs))


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:80]} is no finite number")
    return value


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    try:
        return json.loads(text, object_pairs_hook=_fields_of, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"the text is no JSON: {error.msg} in {where}") from error
    except ValueError as error:
        raise ValueError(f"the text has a number that can't be read: {error}") from error
    except RecursionError as error:
        raise ValueError("the text is nested too deep") from error


def _checked_document(document: Any) -> Any:
    _check_repeated(document)
    if not isinstance(document, dict):
        raise ValueError(f"the text must be an object, not {json.dumps(document)[:80]}")
    version = document.get("version")
    if type(version) is not int or version != _VERSION:
        problem = (
            f"version {json.dumps(version)[:80]} is not known" if "version" in document else "no version"
        )
        raise ValueError(f"{problem}; this async_pipeline reads version {_VERSION}")
    _check_fields("the text", document, "it", ["version", "pipeline"])
    return document


def _check_repeated(document: Any) -> None:
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), document)]
    while waiting:
        trail, data = waiting.pop()  # a chain: to write out each place would take memory without bound
        if isinstance(data, _Repeated):
            name = max(data, key=lambda name: data[name])
            raise ValueError(f"{_trail(trail) or 'the text'}: the field {name!r} is there more than once")
        if isinstance(data, (dict, list)):
            inner = data.items() if isinstance(data, dict) else enumerate(data)
            waiting += [((trail, key), value) for key, value in inner]


def _trail(trail: tuple[Any, ...]) -> str:
    keys = []
    while trail:
        trail, key = trail
        keys.append(key)
    return reduce(_place, reversed(keys), "")


def _check_fields(
    where: str, data: Any, what: str, needs: Iterable[str], options: Iterable[str] = ()
) -> None:
    known = [*needs, *options]
    for name in data:
        if name not in known:
            raise ValueError(f"{where}: the field {name!r} is not known; {what} has {', '.join(known)}")
    for name in needs:
        if name not in data:
            raise ValueError(f"{where}: the field {name!r} is missing")


def _checked_registry(registry: Any) -> dict[str, Any]:
    if not (registry is None or isinstance(registry, Mapping)):
        given = type(registry).__name__
        raise TypeError(f"registry must be a mapping, not {given}; write registry={{'shop:fetch': fetch}}")
    checked = dict(registry or {})
    for name, thing in checked.items():
        if not isinstance(name, str):
            raise TypeError(f"the names in registry must be str, not {name!r}")
        if not (callable(thing) or is_step(thing)):
            raise TypeError(f"registry[{name!r}] must be a callable or a step, not {thing!r}")
    return checked


def _checked_modules(modules: Any) -> tuple[str, ...]:
    if isinstance(modules, str) or not isinstance(modules, Iterable):
        raise TypeError(
            f"allow_import must be a list of modules, not {modules!r}; write allow_import=['shop']"
        )
    checked = tuple(modules)
    for module in checked:
        if not isinstance(module, str):
            raise TypeError(f"allow_import must hold names of modules, not {module!r}")
        if not _is_module_name(module):
            raise ValueError(f"allow_import must hold names of modules like 'shop.jobs', not {module!r}")
    return checked
