"""The workers' half of an engine: a pipeline that notes what the client is to know of each item."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from .context import current_item_key
from .events import Event
from .records import dump_error, read_json, write_json

__all__ = ["WorkerStep"]

_position: ContextVar[int] = ContextVar("position")  # in its chunk, of the item that runs; keys may be equal


class WorkerStep:
    """A pipeline in a worker, from an item to the text of its result; it notes what the client is to know."""

    def __init__(self, pipeline: Any, shared: Mapping[str, Any], keys: list[str]) -> None:
        self.name: str = pipeline.name
        self._keys = keys
        self._context = write_json(shared["context"] or {}, "the context")
        self._seen: dict[str, list[Any]] = {}
        self._contexts: dict[str, str] = {}
        options: dict[str, Any] = {"before_stage": None, "after_stage": None, "observers": ()}
        if shared["hooks"]:
            options |= {"before_stage": self._before, "after_stage": self._after}
        if shared["observers"]:
            options["observers"] = [self._observe]
        self._pipeline = pipeline.replace(**options)
        self.run = self._pipeline.run  # of an item that belongs to no batch

    async def _run_item(self, value: Any, context: Any, index: int, timeout: float | None) -> str:
        token, place = current_item_key.set(self._keys[index]), _position.set(index)
        try:
            numbered = self._pipeline._run_item
            if numbered is not None:
                value = await numbered(value, context, index, timeout)
            elif timeout is None:
                value = await self._pipeline.run(value, context=context)
            else:
                value = await self._pipeline.run(value, context=context, timeout=timeout)
            return write_json(value, "the result, which is to travel to the client,")
        finally:
            _position.reset(place)
            current_item_key.reset(token)
            self._keep(context, index)

    def _keep(self, context: dict[str, Any], index: int) -> None:
        if context or self._context != "{}":
            text = _json_or_none(context) or _json_entries(context)
            if text != self._context:
                self._contexts[str(index)] = text

    def reply(self, results: list[Any]) -> str:
        errors = {
            str(position): dump_error(result)
            for position, result in enumerate(results)
            if not isinstance(result, str)
        }
        values = ",".join([result if isinstance(result, str) else "null" for result in results])
        parts = [f'"values":[{values}]', f'"time":{asyncio.get_running_loop().time()!r}']
        if errors:
            parts.append(f'"errors":{write_json(errors, "an error")}')
        if self._seen:
            parts.append(f'"seen":{write_json(self._seen, "an event")}')
        if self._contexts:
            contexts = ",".join(f'"{place}":{text}' for place, text in self._contexts.items())
            parts.append(f'"contexts":{{{contexts}}}')
        return f"{{{','.join(parts)}}}"

    def _note(self, *about: Any) -> None:
        self._seen.setdefault(str(_position.get()), []).append(about)

    def _before(self, name: str, value: Any, context: Any) -> None:
        self._note("before", name, _data(value))

    def _after(self, name: str, value: Any, output: Any, error: BaseException | None, context: Any) -> None:
        failure = None if error is None else dump_error(error)
        self._note("after", name, _data(value), _data(output), failure)

    def _observe(self, event: Event) -> None:
        fields = {name: getattr(event, name) for name in _FIELDS}
        if event.error is not None:
            fields["error"] = dump_error(event.error)
        self._note("event", {name: value for name, value in fields.items() if value is not None})


def _json_or_none(value: object) -> str | None:
    with suppress(TypeError):
        return write_json(value, "")
    return None


def _json_entries(context: Mapping[str, Any]) -> str:
    """Return as much of a context as is JSON."""
    texts = {key: _json_or_none(value) for key, value in context.items() if isinstance(key, str)}
    parts = [f"{write_json(key, '')}:{text}" for key, text in texts.items() if text is not None]
    return f"{{{','.join(parts)}}}"


def _data(value: Any) -> Any:
    """Return a value as it can travel: as JSON, or else as its ``repr``."""
    text = _json_or_none(value)
    return repr(value) if text is None else read_json(text)


_FIELDS = (
    *("kind", "time", "run_id", "stage", "element", "outcome", "attempts", "duration", "error"),
    *("attempt", "will_retry", "delay", "elements"),
)
