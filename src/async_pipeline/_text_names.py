"""How functions, classes and exception types become names, and which names a text may use."""

import builtins
import sys
from collections.abc import Mapping
from functools import partial
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
from typing import Any

from . import errors
from ._text_values import Codec, Reader, UnwritableError, Writer, check_fields, is_json, list_of
from .stage import Stage, callable_name

__all__ = ["CALLABLE", "KINDS", "is_module_name", "names_of"]


def names_of(registry: Mapping[str, Any]) -> dict[Any, str]:
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


def _write_callable(writer: Writer, thing: Any) -> Any:
    name = writer.names.get(_identity(thing))
    if name is not None:
        return name
    return _write_partial(writer, thing) if type(thing) is partial else _write_name(writer, thing)


def _write_name(writer: Writer, thing: Any) -> str:
    module, qualname = _own_name(thing)
    name = f"{module}:{qualname}"
    found = _as_callable(_find(sys.modules.get(module), qualname))
    if _identity(found) != _identity(thing):
        why = f"can't be imported by name; define it at the top of a module, or {_naming(thing)}"
        raise UnwritableError(_label(thing), why, name if "<" in qualname else None)
    if name in writer.registry:
        raise UnwritableError(
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


def _read_callable(reader: Reader, data: Any) -> Any:
    if isinstance(data, dict) and "partial" in data:
        return _read_partial(reader, data)
    name = reader.expect(str, data)
    if name not in reader.registry:
        return _read_import(reader, name)
    thing = _as_callable(reader.registry[name])
    if not callable(thing):
        raise reader.error(f"{name!r} is a step in the registry, but must be a callable here")
    return thing


def _read_import(reader: Reader, name: str) -> Any:
    module, _, qualname = name.partition(":")
    if any(map(_is_hidden, qualname.split("."))) or not is_module_name(module):
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


def is_module_name(module: str) -> bool:
    return all(map(str.isidentifier, module.split(".")))


def _is_allowed(module: str, modules: tuple[str, ...]) -> bool:
    # importing a __main__ runs a program, so it has to be allowed by its own name
    is_inside = module.startswith(tuple(f"{allowed}." for allowed in modules))
    return module in modules or (is_inside and not any(map(_is_hidden, module.split("."))))


CALLABLE = Codec(_write_callable, _read_callable)


def _write_partial(writer: Writer, thing: Any) -> Any:
    args, keywords = [*thing.args], thing.keywords
    if thing.__dict__ or not (is_json(args) and is_json(keywords)):
        why = f"has attributes, or arguments that JSON would change; give it JSON values, or {_naming(thing)}"
        raise UnwritableError(f"partial of {_label(thing.func)}", why)
    given = {"args": args, "keywords": keywords}
    written = {"partial": writer.write(_write_callable, thing.func)}
    return written | {option: values for option, values in given.items() if values}


def _read_partial(reader: Reader, data: Any) -> Any:
    check_fields(reader.where, data, "a partial", ["partial"], ["args", "keywords"])
    args, keywords = data.get("args", []), data.get("keywords", {})
    if not (type(args) is list and type(keywords) is dict):
        raise reader.error("the args of a partial must be a list, and its keywords an object")
    return partial(_read_callable(reader.at("partial"), data["partial"]), *args, **keywords)


# -- exception types


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


_KNOWN_ERRORS = {
    f"{kind.__module__}:{kind.__qualname__}": kind
    for kind in (*vars(builtins).values(), *(getattr(errors, name) for name in errors.__all__))
    if _is_error(kind)
}


def _write_kinds(writer: Writer, kinds: Any) -> Any:
    return _TUPLE.write(writer, kinds) if isinstance(kinds, tuple) else _write_callable(writer, kinds)


def _read_kinds(reader: Reader, data: Any) -> Any:
    return tuple(_TUPLE.read(reader, data)) if isinstance(data, list) else _read_kind(reader, data)


def _read_kind(reader: Reader, data: Any) -> Any:
    is_known = isinstance(data, str) and data in _KNOWN_ERRORS and data not in reader.registry
    return _KNOWN_ERRORS[data] if is_known else _read_callable(reader, data)


_TUPLE = list_of(Codec(_write_callable, _read_kind))
KINDS = Codec(_write_kinds, _read_kinds)  # a predicate, too
