"""A pipeline as a process: its inputs and outputs, read from the type hints of its handlers.

The names are those of OGC API - Processes (Part 1). Needs pydantic, and PyYAML for descriptions in YAML.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, cast

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_jsonable_python

from ..types import Step
from ._checks import Fault, Place, check_of, encode, in_words, located, repair
from ._descriptions import checked_description, merged
from ._hints import MISSING, Returned, Value, is_form, taken_by, typed_dict
from ._schemas import adapter_of, entry_of, free_fields, readable, title_of

__all__ = ["BadInputs", "InputFault", "Process"]


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


_ID = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.~-]+")  # what is . or .. leads elsewhere in a URL
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
            self._read_hints(checked_description(id, {} if description is None else description))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"process {id!r}: {error}") from error.__cause__

    def _read_hints(self, described: Mapping[str, Any]) -> None:
        value = taken_by(self.pipeline) or Value()
        self._inputs = _Inputs(value, described.get("inputs", {}))
        returned = Returned(self.pipeline, value)
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
        fit as it is. Integers may be written ``1.0``, as JSON Schema has it. They may be nested 199 deep.

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


# -- the way out


class _Outputs:
    """What a pipeline returns, by name.

    Attributes:
        entries: the OGC descriptions by name, each with its ``schema``.
    """

    def __init__(self, returned: Returned, described: Mapping[str, Any]) -> None:
        hint = free_fields(returned.hint, _RESULT, described)
        self._adapter, schema = adapter_of(hint, "serialization", f"that {returned.handlers} returns")
        self._is_form = is_form(hint) and "properties" in schema
        schemas = schema["properties"] if self._is_form else {_RESULT: schema}
        self.entries = merged(
            "output", {name: entry_of(name, one) for name, one in schemas.items()}, described
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

_QUALIFIERS = frozenset({"value", "mediaType", "encoding", "schema", "format"})
_DEPTH = 199  # pydantic reads as many levels below the inputs


class _Inputs:
    """What a pipeline is run with, by name.

    Attributes:
        entries: the OGC descriptions by name, each with its ``schema``.
        schema: the JSON Schema of the object of them all.
    """

    def __init__(self, value: Value, described: Mapping[str, Any]) -> None:
        hint = free_fields(value.hint, value.name, described)
        what = f"of the parameter {value.name!r} of {value.handler}"
        self._only: str | None = None
        self._default = value.default
        self._adapter, schema = adapter_of(hint, "validation", what)
        if not (is_form(hint) and "properties" in schema):
            self._only = value.name
            field = readable(hint, {})
            field = field if value.default is MISSING else NotRequired[field]
            only = typed_dict("Inputs", {value.name: field})
            self._adapter, schema = adapter_of(only, "validation", what)
            _finish(schema["properties"][value.name], value)
        self._check = check_of(schema)
        self._others: Any = schema.get(
            "additionalProperties", False
        )  # a model may take what it does not name
        self._fields: Mapping[str, Any] = schema["properties"]
        self.entries = self._described(schema.get("required", ()), described)
        self.schema = self._schema()

    def _described(self, required: Sequence[str], described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        entries = {
            name: {**entry_of(name, schema), "minOccurs": int(name in required), "maxOccurs": 1}
            for name, schema in self._fields.items()
        }
        return merged("input", entries, described)

    def _schema(self) -> dict[str, Any]:
        properties = {name: entry["schema"] for name, entry in self.entries.items()}
        required = [name for name, entry in self.entries.items() if entry["minOccurs"]]
        schema = {"type": "object", "properties": properties, "additionalProperties": self._others}
        return {**schema, "required": required} if required else schema

    def read(self, inputs: object) -> Any:
        if not isinstance(inputs, dict):
            raise BadInputs([InputFault("/inputs", "must be an object")])
        if inputs.keys() <= self._fields.keys() or self._others is not False:
            try:
                value = self._adapter.validate_json(encode(inputs), strict=True)
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
        unknown = [name for name in inputs if not self._is_name(name)]
        faults = [Fault((name,), "is not an input of this process") for name in unknown]
        known = {name: one for name, one in inputs.items() if name not in unknown}
        unreadable = list(_unreadable(known))
        left_out = {fault.path[0] for fault in unreadable}
        value, others = self._try_forms({name: one for name, one in known.items() if name not in left_out})
        faults += unreadable
        faults += [fault for fault in others if not fault.is_in(left_out)]
        if faults:
            raise BadInputs([InputFault(fault.pointer, fault.detail) for fault in dict.fromkeys(faults)])
        return value

    def _is_name(self, name: str) -> bool:
        return name in self._fields or (self._others is not False and _is_text(name))

    def _try_forms(self, inputs: dict[str, Any]) -> tuple[Any, list[Fault]]:
        value, faults = self._try(inputs)
        wrong = [name for name in inputs if any(fault.path[:1] == (name,) for fault in faults)]
        inner = {name: inputs[name]["value"] for name in wrong if _is_qualified(inputs[name])}
        if inner:
            value, again = self._try({**inputs, **inner})
            faults = [fault for name in inner for fault in self._better(name, faults, again)]
            faults += [fault for fault in again if not fault.is_in(inner)]
        references = [name for name in wrong if name not in inner and self._is_reference(name, inputs[name])]
        faults = [fault for fault in faults if not fault.is_in(references)]
        return value, faults + [
            Fault((name,), "values by reference are not supported") for name in references
        ]

    def _better(self, name: str, faults: list[Fault], again: list[Fault]) -> list[Fault]:
        """What is wrong with an input of the qualified form: with it as it is, or with the value in it."""
        inside = [fault for fault in again if fault.is_in((name,))]
        if inside and "value" in self._known(name):
            return [fault for fault in faults if fault.is_in((name,))]
        return [Fault((name, "value", *fault.path[1:]), fault.detail) for fault in inside]

    def _is_reference(self, name: str, given: object) -> bool:
        return isinstance(given, dict) and "href" in given and "href" not in self._known(name)

    def _known(self, name: str) -> Mapping[str, Any]:
        """The fields of an input that is an object itself."""
        return cast("Mapping[str, Any]", self._fields.get(name, {}).get("properties", {}))

    def _try(self, inputs: dict[str, Any], repairs: int = 8) -> tuple[Any, list[Fault]]:
        try:
            value = self._adapter.validate_json(encode(inputs), strict=True)
        except ValidationError as error:
            found = [located(one, inputs) for one in error.errors(include_url=False, include_context=False)]
            repaired = repair(inputs, found) if repairs else None
            if repaired is not None:
                return self._try(repaired, repairs - 1)
            wrong = {one.path: Fault(one.path, in_words(one.kind, one.detail)) for one in found}
            others = [fault for fault in self._breaches(inputs) if fault.path not in wrong]
            return None, [*wrong.values(), *others]
        except ValueError as error:
            if str(error) != "year 0 is out of range":  # which old pydantic does not count as invalid
                raise
            return None, [Fault((), "is not valid")]
        return value, self._breaches(inputs)

    def _breaches(self, inputs: dict[str, Any]) -> list[Fault]:
        return [] if self._check is None else list(self._check((), inputs))


def _finish(schema: dict[str, Any], value: Value) -> None:
    """Make the schema of a parameter of the schema of a field."""
    if schema.get("title") == title_of(value.name):
        del schema["title"]
    if value.default is not MISSING:
        try:
            schema.setdefault("default", to_jsonable_python(value.default, inf_nan_mode="null"))
        except PydanticSerializationError:  # an object that stands for "nothing", for example
            return


def _is_qualified(given: object) -> bool:
    return isinstance(given, dict) and "value" in given and given.keys() <= _QUALIFIERS


def _unreadable(inputs: Mapping[str, Any]) -> Iterator[Fault]:
    """What Python's JSON has and nobody else's: NaN, half characters; and what pydantic does not read."""
    waiting: list[tuple[Place, Any]] = [((), inputs)]
    while waiting:  # no recursion, so that no nesting is too deep
        path, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield Fault(path, "is not a finite number")
        elif isinstance(value, str) and not _is_text(value):
            yield Fault(path, "is not valid Unicode")
        elif isinstance(value, (dict, list)) and len(path) > _DEPTH:
            yield Fault(path, "is nested too deeply")
        elif isinstance(value, dict):
            if not all(map(_is_text, value)):
                yield Fault(path, "has a name that is not valid Unicode")
            waiting.extend(((*path, key), one) for key, one in value.items() if _is_text(key))
        elif isinstance(value, list):
            waiting.extend(((*path, index), one) for index, one in enumerate(value))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
