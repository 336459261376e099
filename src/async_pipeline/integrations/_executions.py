"""How a process is run, and what is answered with its result."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastapi import Response
from pydantic_core import to_jsonable_python

from ..jobs import with_progress
from ._problems import Problem, json_response
from ._process import Process

__all__ = ["Execution", "Known", "Served", "respond"]


class Served:
    """A process with the pipeline that tells a job how far it is, and its picture."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pipeline = with_progress(process.pipeline)
        self.picture = str(process.pipeline)


class Execution:
    """One execution of a process, as a step: its result is what :func:`respond` answers with."""

    def __init__(
        self, served: Served, outputs: Collection[str], response: str, keep: Callable[[Any], Any] | None
    ) -> None:
        self.name = served.process.id
        self._served = served
        self._outputs = outputs
        self._response = response
        self._keep = keep

    async def run(self, value: Any, *, context: Any = None) -> dict[str, Any]:
        outputs = self._served.process.write(await self._served.pipeline.run(value, context=context))
        if self._keep is not None:
            await self._keep(outputs)
        return self.select(outputs)

    def select(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {name: outputs[name] for name in self._outputs if name in outputs}
        # several are an object, also when a handler has left all but one out
        return {"outputs": chosen, "response": "document" if len(self._outputs) > 1 else self._response}


class Known:
    """The step of a job whose result is known already."""

    def __init__(self, name: str, result: Any) -> None:
        self.name = name
        self._result = result

    async def run(self, value: Any, *, context: Any = None) -> Any:
        return self._result


def respond(result: Any) -> Response:
    """Answer with the result of a job."""
    if not _is_of_execution(result):  # of a job that the application has submitted itself
        try:
            result = to_jsonable_python(result, inf_nan_mode="null")
        except ValueError:
            raise Problem(500, "the result of this job has no form in JSON") from None
        return json_response(result)
    outputs = result["outputs"]
    if not outputs:
        return Response(status_code=204)
    if len(outputs) == 1 and result["response"] == "raw":
        (outputs,) = outputs.values()
    return json_response(outputs)


def _is_of_execution(result: Any) -> bool:
    return (
        isinstance(result, dict)
        and result.keys() == {"outputs", "response"}
        and isinstance(result["outputs"], dict)
        and result["response"] in ("raw", "document")
    )
