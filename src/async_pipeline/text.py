"""A pipeline as JSON text, and back.

A text that names handlers decides what runs. So :func:`loads` takes them from a registry, or imports them
from modules that the caller has allowed: any function or class that is defined there, in any place of the
pipeline, and by ``partial`` with arguments of the text's choice; never what a module has only imported from
elsewhere. Importing a module runs it, so allow none that does something when it is imported. The steps of a
``parallel`` are in the order of their fields, which some stores of JSON change.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

from ._text_names import CALLABLE, KINDS, is_module_name, names_of
from ._text_values import (
    MOST_LEVELS,
    NEVER,
    PLAIN,
    Codec,
    Reader,
    UnwritableError,
    Writer,
    check_fields,
    list_of,
    place,
    write_plain,
)
from .pipeline import Pipeline
from .stage import Stage, is_step
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


def dumps(pipeline: Any, registry: Mapping[str, Any] | None = None) -> str:
    """Return a pipeline as a line of ASCII; see :meth:`Pipeline.dumps <async_pipeline.Pipeline.dumps>`.

    Args:
        pipeline: the pipeline.
        registry: names, and what is called so; ``None``, the default, for none.

    Raises:
        TypeError: ``registry`` is no mapping of names to callables, exception types and steps.
        ValueError: something in the pipeline can't be written, or steps are nested more than 50 deep.
    """
    known = _checked_registry(registry)
    writer = Writer(known, names_of(known), is_strict=True)
    return json.dumps(_document(writer, pipeline), separators=(",", ":"))


def describe(pipeline: Any) -> str:
    """Return a pipeline, or any other step, as the JSON that ``dumps`` writes, indented, for people.

    Nothing is refused: what could not be written stands there as ``{"unsupported": "Semaphore"}``, or as a
    name like ``"shop:<lambda>"``, and :func:`loads` refuses either. The same pipeline gives the same text.
    """
    return json.dumps(_document(Writer({}, {}, is_strict=False), pipeline), indent=2)


def loads(
    text: str, registry: Mapping[str, Any] | None = None, allow_import: Iterable[str] = ()
) -> Pipeline[Any, Any]:
    """Build a pipeline from text; see :meth:`Pipeline.loads <async_pipeline.Pipeline.loads>`.

    Args:
        text: what :func:`~async_pipeline.text.dumps` has written.
        registry: the handlers that the text may name, by name; ``None``, the default, for none.
        allow_import: the modules from which others may be imported; none by default.

    Raises:
        TypeError: an argument is of the wrong type; bytes have to be decoded first.
        ValueError: the text is wrong; the message says where.
        ImportError: an allowed module can't be imported, whatever its code has raised.
    """
    reader = Reader(_checked_registry(registry), _checked_modules(allow_import))
    document = _checked_document(_parsed(text))
    try:
        pipeline = _read_step(reader, document["pipeline"])
    except RecursionError as error:
        raise reader.error("the stack has no room for so many steps inside steps") from error
    if not isinstance(pipeline, Pipeline):
        raise reader.error(f"must be a pipeline, not {type(pipeline).__name__}")
    return pipeline


def _document(writer: Writer, pipeline: Any) -> dict[str, Any]:
    # written out even if the registry has a name for it
    write = _write_kind if type(pipeline) is Pipeline else _write_step
    try:
        return {"version": _VERSION, "pipeline": writer.write(write, pipeline)}
    except RecursionError as error:
        raise ValueError("the stack has no room to write so many steps inside steps") from error


# -- steps


class _Kind(NamedTuple):
    """A kind of step: its class, what builds it, the fields that it needs besides a name, and its options."""

    type: type
    build: Callable[..., Any]
    needs: Mapping[str, Codec]
    options: Mapping[str, Codec] = {}

    def codecs(self) -> dict[str, Codec]:
        return {"name": PLAIN, **self.needs, **self.options}


def _write_step(writer: Writer, step: Any) -> Any:
    name = writer.names.get(id(step))
    is_named = name is not None and writer.registry[name] is step and type(step) is not Stage
    return {"kind": "step", "step": name} if is_named else _write_kind(writer, step)


def _write_kind(writer: Writer, step: Any) -> Any:
    name, kind = next(
        ((name, kind) for name, kind in _STEPS.items() if type(step) is kind.type), (None, None)
    )
    if kind is None:
        what = type(step).__name__
        why = f"is of a class of its own; name the object: dumps(registry={{{step.name!r}: ...}})"
        raise UnwritableError(what, why, {"kind": "step", "step": {"unsupported": what}})
    written, options = {"kind": name}, structure_of(step).options
    for option, codec in kind.codecs().items():
        is_attribute = codec is _STEP or option == "name" or option in kind.needs
        value = getattr(step, option) if is_attribute else options.get(option)
        if value is not None:
            written[option] = replace(writer, field=option).write(codec.write, value)
    return written


def _read_step(reader: Reader, data: Any) -> Any:
    name = reader.expect(dict, data).get("kind")
    if name == "step":
        return _read_registered(reader, data)
    if not (isinstance(name, str) and name in _STEPS):
        known = ", ".join([*_STEPS, "step"])
        raise reader.error(f"the kind must be one of {known}, not {json.dumps(name)[:80]}")
    kind = _STEPS[name]
    check_fields(reader.where, data, f"a {name}", ["kind", "name", *kind.needs], kind.options)
    codecs = {option: codec for option, codec in kind.codecs().items() if option in data}
    arguments = {option: codec.read(reader.at(option), data[option]) for option, codec in codecs.items()}
    try:
        return kind.build(**arguments)
    except (TypeError, ValueError) as error:
        raise reader.error(str(error)) from error


def _read_registered(reader: Reader, data: Any) -> Any:
    check_fields(reader.where, data, "a step", ["kind", "step"])
    name = reader.at("step").expect(str, data["step"])
    step = reader.registry.get(name)
    if not is_step(step):
        what = f"registry={{{name!r}: ...}} must be there and be a step, with name and run"
        raise reader.at("step").error(what)
    return step


def _write_inner(writer: Writer, step: Any) -> Any:
    return writer.inside(step.name).write(_write_step, step)


def _read_inner(reader: Reader, data: Any) -> Any:
    if reader.level == MOST_LEVELS:
        raise reader.error(f"this is more than {MOST_LEVELS} levels deep")
    return _read_step(replace(reader, level=reader.level + 1), data)


_STEP = Codec(_write_inner, _read_inner)
_LIST = list_of(_STEP)


def _write_named(writer: Writer, steps: Any) -> Any:
    written = {}
    for name, step in steps.items():
        checked = writer.write(write_plain, name)
        written[name] = writer.inside(name).write(_write_step, step) if checked is name else checked
    return written


def _read_named(reader: Reader, data: Any) -> Any:
    return {name: _read_inner(reader.at(name), step) for name, step in reader.expect(dict, data).items()}


def _fallback(steps: Any, **options: Any) -> Any:
    if not steps:
        raise ValueError("fallback requires at least one step")
    return fallback(*steps, **options)


_HOOKS = {
    "before_stage": CALLABLE,
    "after_stage": CALLABLE,
    "middlewares": list_of(CALLABLE),
    "observers": list_of(CALLABLE),
    "on_hook_error": CALLABLE,
}
_CONCURRENCY = {"concurrency": PLAIN}
_OPTIONS = {
    **dict.fromkeys(["timeout", "retries", "retry_delay", "backoff", "max_delay", "jitter"], PLAIN),
    "retry_on": KINDS,
    "executor": PLAIN,
    "limiter": NEVER,
    "on_error": CALLABLE,
    "pass_context": PLAIN,
    "retry_budget": NEVER,
}
_STEPS = {
    "stage": _Kind(Stage, Stage, {"handler": CALLABLE}, _OPTIONS),
    "pipeline": _Kind(Pipeline, Pipeline, {"stages": _LIST}, _HOOKS),
    "parallel": _Kind(
        Parallel,
        lambda steps, name: parallel(steps, name=name),
        {"steps": Codec(_write_named, _read_named)},
    ),
    "each": _Kind(Each, each, {"step": _STEP}, _CONCURRENCY),
    "keep": _Kind(Keep, keep, {"predicate": _STEP}, _CONCURRENCY),
    "branch": _Kind(
        Branch,
        lambda cases, **options: branch(*cases, **options),
        {"cases": list_of(_LIST)},
        {"otherwise": _STEP},
    ),
    "fallback": _Kind(Fallback, _fallback, {"steps": _LIST}, {"on": KINDS}),
    "require": _Kind(Require, lambda fields, name: require(*fields, name=name), {"fields": list_of(PLAIN)}),
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
    check_fields("the text", document, "it", ["version", "pipeline"])
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
    return reduce(place, reversed(keys), "")


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
        if not is_module_name(module):
            raise ValueError(f"allow_import must hold names of modules like 'shop.jobs', not {module!r}")
    return checked
