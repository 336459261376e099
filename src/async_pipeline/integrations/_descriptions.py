"""What is said of a process besides its type hints, in OGC's form."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic_core import to_jsonable_python

__all__ = ["checked_description", "merged", "read_descriptions"]


# -- descriptions by hand


_TEXTS = ("title", "description", "version")
_LISTS = ("keywords", "metadata")
_OF_THE_SERVER = ("id", "jobControlOptions", "outputTransmission", "links")
_ENTRIES = (*_TEXTS, *_LISTS, *_OF_THE_SERVER, "inputs", "outputs")
_ENTRIES_OF_ONE = (
    *("title", "description", "schema", "minOccurs", "maxOccurs"),
    *("keywords", "metadata", "additionalParameters"),
)


def checked_description(id: str, description: object) -> Mapping[str, Any]:
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


def merged(
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
    try:
        import yaml
    except ImportError as error:
        raise ImportError("descriptions in YAML require installing async-pipeline[fastapi]") from error
    try:
        # a date that stands in it without quotes is no longer one in JSON
        return to_jsonable_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
