"""What the OpenAPI document says of the routes; the names are those of OGC's own schemas."""

from collections.abc import Mapping
from typing import Any

from ._filters import STATUSES
from ._process import Process

__all__ = [
    "CONFORMANCE",
    "DESCRIPTION",
    "EVENTS",
    "JOBS",
    "LANDING",
    "PROCESSES",
    "STATUS",
    "answers",
    "execution",
    "results",
]

_STR = {"type": "string"}
_TIME = {"type": "string", "format": "date-time"}
_LINK = {
    "title": "link",
    "type": "object",
    "required": ["href"],
    "properties": {"href": _STR, "rel": _STR, "type": _STR, "title": _STR},
}
_LINKS = {"type": "array", "items": _LINK}


def _object(schema: str, required: str, /, **properties: Any) -> dict[str, Any]:
    return {"title": schema, "type": "object", "required": required.split(), "properties": properties}


LANDING = _object("landingPage", "links", title=_STR, description=_STR, links=_LINKS)
CONFORMANCE = _object("confClasses", "conformsTo", conformsTo={"type": "array", "items": _STR})
_SUMMARY: dict[str, Any] = {
    "id": _STR,
    "version": _STR,
    "title": _STR,
    "description": _STR,
    "keywords": {"type": "array", "items": _STR},
    "jobControlOptions": {"type": "array", "items": _STR},
    "outputTransmission": {"type": "array", "items": _STR},
    "links": _LINKS,
}
PROCESSES = _object(
    "processList",
    "processes links",
    processes={"type": "array", "items": _object("processSummary", "id version", **_SUMMARY)},
    links=_LINKS,
)
DESCRIPTION = _object(
    "process", "id version", **_SUMMARY, inputs={"type": "object"}, outputs={"type": "object"}
)
STATUS = _object(
    "statusInfo",
    "jobID type status",
    jobID=_STR,
    processID=_STR,
    type={"type": "string", "enum": ["process"]},
    status={"type": "string", "enum": list(STATUSES)},
    message=_STR,
    progress={"type": "integer", "minimum": 0, "maximum": 100},
    created=_TIME,
    started=_TIME,
    finished=_TIME,
    updated=_TIME,
    links=_LINKS,
)
JOBS = _object("jobList", "jobs links", jobs={"type": "array", "items": STATUS}, links=_LINKS)
_DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": STATUS}
EVENTS = {"text/event-stream": {"itemSchema": _object("event", "id data", id=_STR, data=_DATA)}}
"""As FastAPI documents events; ``itemSchema`` is of OpenAPI 3.2, and ignored by what does not know it."""
_PROBLEM = _object(
    "exception",
    "type",
    type=_STR,
    title=_STR,
    status={"type": "integer"},
    detail=_STR,
    errors={"type": "array", "items": {"type": "object", "additionalProperties": _STR}},
)


def answers(
    *problems: int, ok: Any = None, status: int = 200, content: Mapping[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route; also a 4XX, which keeps FastAPI from documenting its 422."""
    found: dict[int | str, dict[str, Any]] = {
        status: _response("as asked", content or {"application/json": {"schema": ok}})
    }
    for problem in problems:
        found[problem] = _response("a problem", {"application/problem+json": {"schema": _PROBLEM}})
    found["4XX"] = _response("a problem", {"application/problem+json": {"schema": _PROBLEM}})
    return found


def _response(description: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": dict(content)}


def execution(process: Process) -> dict[str, Any]:
    """What is special to the execution of one process: its inputs and outputs."""
    body = {"application/json": {"schema": _request_of(process)}}
    return {
        "requestBody": {"required": True, "content": body},
        "parameters": [
            {
                "name": "Prefer",
                "in": "header",
                "required": False,
                "description": "respond-async for a job, wait=N for one after N seconds",
                "schema": {"type": "string", "examples": ["respond-async", "wait=5"]},
            }
        ],
    }


def _request_of(process: Process) -> dict[str, Any]:
    output = {
        "type": "object",
        "properties": {"transmissionMode": {"type": "string", "enum": ["value"]}},
    }
    return {
        "title": "execute",
        "type": "object",
        "properties": {
            "inputs": process.inputs_schema,
            "outputs": {
                "type": "object",
                "properties": dict.fromkeys(process.outputs, output),
                "additionalProperties": False,
            },
            "response": {"type": "string", "enum": ["raw", "document"], "default": "raw"},
        },
        "required": ["inputs"] if process.inputs_schema.get("required") else [],
    }


def results(process: Process) -> dict[str, Any]:
    """The schema of what an execution returns: one output as it is, several in an object."""
    document = {"type": "object", "properties": dict(process.outputs), "additionalProperties": False}
    return {"anyOf": [*process.outputs.values(), document]}
