"""What a request asks for: in its body, and in its headers."""

import re
from collections.abc import Collection
from typing import Any

from pydantic_core import from_json

from ._problems import Problem
from ._process import BadInputs, Process

__all__ = ["ExecutionRequest", "preferences", "prefers_html"]


class ExecutionRequest:
    """What an execution request asks for."""

    def __init__(self, process: Process, body: bytes) -> None:
        try:
            asked = from_json(body, allow_inf_nan=False)
        except ValueError:
            raise Problem(400, "the body is not JSON") from None
        faults: list[dict[str, str]] = []
        if not isinstance(asked, dict):
            fault = {"pointer": "", "detail": "must be an object with inputs"}
            raise Problem(400, "the body is not an object", faults=[fault])
        self.inputs = asked.get("inputs", {})
        try:
            self.value = process.read(self.inputs)
        except BadInputs as error:
            if "inputs" not in asked:
                faults.append({"pointer": "/inputs", "detail": "is missing: the object that has the inputs"})
            faults += [fault._asdict() for fault in error.faults]
        self.outputs: Collection[str] = tuple(process.outputs)
        if "outputs" in asked:
            self.outputs = self._read_outputs(process, asked["outputs"], faults)
        self.response = asked.get("response", "raw")
        if self.response not in ("raw", "document"):
            faults.append({"pointer": "/response", "detail": 'must be "raw" or "document"'})
        if "subscriber" in asked:
            faults.append({"pointer": "/subscriber", "detail": "callbacks are not supported"})
        if faults:
            raise Problem(400, "the request can't be executed as it is", faults=faults)

    @staticmethod
    def _read_outputs(process: Process, asked: Any, faults: list[dict[str, str]]) -> Collection[str]:
        if not isinstance(asked, dict):
            faults.append({"pointer": "/outputs", "detail": "must be an object"})
            return ()
        for name, how in asked.items():
            pointer = "/outputs/" + name.replace("~", "~0").replace("/", "~1")
            if name not in process.outputs:
                faults.append({"pointer": pointer, "detail": "is no output of this process"})
            elif not isinstance(how, dict):
                faults.append({"pointer": pointer, "detail": "must be an object"})
            elif how.get("transmissionMode", "value") != "value":
                faults.append({"pointer": f"{pointer}/transmissionMode", "detail": 'must be "value"'})
        return tuple(name for name in process.outputs if name in asked)


_QUOTED = r'"(?:[^"\\]|\\.)*"'
_ENTRY = re.compile(rf'(?:[^,"]|{_QUOTED}|")+')
_PREFERENCE = re.compile(rf'\s*([^\s=;,"]+)\s*(?:=\s*({_QUOTED}|[^\s;,"]*))?')


def preferences(headers: Collection[str]) -> dict[str, str]:
    """The preferences of RFC 7240; of one that is given twice, the first."""
    found: dict[str, str] = {}
    for entry in _ENTRY.findall(",".join(headers)):
        preference = _PREFERENCE.match(entry)
        if preference is not None:
            found.setdefault(preference[1].lower(), (preference[2] or "").strip('"'))
    return found


def prefers_html(accept: str) -> bool:
    """Whether a client wants the page rather than JSON; who takes anything gets JSON."""
    weights: dict[str, float] = {}
    for entry in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in entry.split(";"))
        weights[kind] = next((_weight(part[2:]) for part in parameters if part.startswith("q=")), 1.0)
    html = weights.get("text/html", 0.0)
    if "application/json" in weights:
        return html > weights["application/json"]
    return html > 0 and html >= weights.get("application/*", weights.get("*/*", 0.0))


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
