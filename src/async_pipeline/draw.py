"""A pipeline as a picture: an indented tree for a terminal, or a Mermaid flowchart."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, pairwise
from numbers import Integral
from typing import Any, NamedTuple

from .types import Part, structure_of

__all__ = ["to_mermaid", "to_tree"]


class _View(NamedTuple):
    """What is shown of a step: its title, its options in words, and the steps inside it."""

    kind: str
    title: str
    words: tuple[str, ...]
    parts: Sequence[Part]


def _view(part: Part) -> _View:
    kind, options, parts = structure_of(part.step)
    return _View(kind, _title(part, kind), tuple(_words(options)), parts)


def _whole(pipeline: Any) -> Part:
    return Part("stage", pipeline.name, pipeline)


def _title(part: Part, kind: str) -> str:
    title = _shown(part.name)
    if part.step.name not in (part.name, kind):  # parallel(price=ask_bank)
        title += f" = {_shown(part.step.name)}"
    return title if kind in ("stage", "step", part.name) else f"{title} ({kind})"


_JOINERS = "\u200c\u200d"  # of letters in Persian, and of emoji


def _shown(name: object) -> str:
    """A name with everything that could move the cursor, or the text around it, as an escape."""
    return "".join(ascii(char)[1:-1] if _is_control(char) else char for char in str(name)) or "''"


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS


# -- options in words


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for option, value in options.items():
        if option == "retries":  # without any, the other options of a retry have no effect
            yield from _retry_words(**options)
        elif option in _WORDS:
            yield _WORDS[option](value)


def _retry_words(
    retries: int,
    retry_on: Any = None,
    retry_delay: float = 0,
    jitter: float = 0,
    retry_budget: object = None,
    **options: Any,
) -> Iterator[str]:
    yield _counted(retries, "retry", "retries") + ("" if retry_on is None else f" {_when(retry_on)}")
    if retry_delay:
        yield _delay(retry_delay, **options)
        if jitter:
            yield f"jitter {_number(jitter)}"
    if retry_budget is not None:
        yield "retry budget"


def _when(retry_on: Any) -> str:
    is_predicate = not isinstance(retry_on, (type, tuple))
    return f"if {_name_of(retry_on)}" if is_predicate else f"on {_kinds(retry_on)}"


def _delay(retry_delay: float, backoff: str = "fixed", max_delay: float | None = None, **options: Any) -> str:
    if backoff == "fixed":
        return f"delay {_seconds(retry_delay if max_delay is None else min(retry_delay, max_delay))}"
    most = "" if max_delay is None else f" up to {_seconds(max_delay)}"
    return f"exponential backoff from {_seconds(retry_delay)}{most}"


def _counted(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _at_a_time(concurrency: Any) -> str:
    return f"at most {concurrency} at a time" if isinstance(concurrency, Integral) else "shared semaphore"


def _executor(executor: object) -> str:
    return "in a thread" if executor == "thread" else f"in {_name_of(executor)}"


_WORDS: dict[str, Callable[[Any], str]] = {
    "timeout": lambda timeout: f"timeout {_seconds(timeout)}",
    "executor": _executor,
    "limiter": lambda limiter: f"limiter {_name_of(limiter)}",
    "on_error": lambda handler: f"on_error {_name_of(handler)}",
    "concurrency": _at_a_time,
    "on": lambda kinds: f"on {_kinds(kinds)}",
    "fields": lambda fields: f"needs {', '.join(map(_shown, fields))}",
    "before_stage": lambda hook: f"before_stage {_name_of(hook)}",
    "after_stage": lambda hook: f"after_stage {_name_of(hook)}",
    "middlewares": lambda middlewares: _counted(len(middlewares), "middleware", "middlewares"),
    "observers": lambda observers: _counted(len(observers), "observer", "observers"),
    "on_hook_error": lambda function: f"on_hook_error {_name_of(function)}",
}


def _number(number: Any) -> str:
    return format(float(number), ".15g")


def _seconds(seconds: Any) -> str:
    return f"{_number(seconds)} s"


def _kinds(kinds: Any) -> str:
    return " or ".join(map(_name_of, kinds if isinstance(kinds, tuple) else (kinds,)))


def _name_of(thing: Any) -> str:
    while isinstance(thing, partial):
        thing = thing.func
    return _shown(getattr(thing, "__name__", type(thing).__name__))


# -- the tree


class _Twig(NamedTuple):
    text: str
    kind: str
    parts: Sequence[Part]


def to_tree(pipeline: Any) -> str:
    """Return a pipeline, or any other step, as an indented tree with a line for each step.

    >>> print(to_tree(orders))
    orders (pipeline): 2 middlewares
    ├─ fetch: timeout 2 s, 3 retries, exponential backoff from 0.5 s up to 30 s
    ├─ enrich (parallel)
    │  ├─ price = ask_bank: in a thread
    │  └─ stock
    ├─ each: at most 20 at a time
    │  └─ score
    └─ branch
       ├─ if is_big
       │  └─ split
       └─ otherwise
          └─ pass_on

    Options that have their defaults are left out. Control characters in names are shown as escapes.
    """
    lines = []
    waiting = [("", "", _twig(_whole(pipeline)))]
    while waiting:  # no recursion, so that no nesting is too deep
        first, rest, twig = waiting.pop()
        lines.append(first + twig.text)
        waiting.extend(reversed(_attached(rest, list(_twigs(twig)))))
    return "\n".join(lines)


def _attached(prefix: str, twigs: list[_Twig]) -> list[tuple[str, str, _Twig]]:
    others = [(f"{prefix}├─ ", f"{prefix}│  ", twig) for twig in twigs[:-1]]
    return [*others, *((f"{prefix}└─ ", f"{prefix}   ", twig) for twig in twigs[-1:])]


def _twig(part: Part, prefix: str = "") -> _Twig:
    view = _view(part)
    words = f": {', '.join(view.words)}" if view.words else ""
    return _Twig(f"{prefix}{view.title}{words}", view.kind, view.parts)


def _twigs(twig: _Twig) -> Iterator[_Twig]:
    if twig.kind == "branch":
        yield from _cases(twig.parts)
    else:
        for part in twig.parts:
            yield _twig(part, "if " if part.role == "predicate" else "")


def _cases(parts: Sequence[Part]) -> Iterator[_Twig]:
    conditions = (_twig(part, "if ") for part in parts if part.role == "predicate")
    for part in parts:
        if part.role == "otherwise":
            yield _Twig("otherwise", "", [part])
        elif part.role == "step":
            condition = next(conditions)
            if condition.parts:  # a pipeline that decides has its own steps below it
                yield from (condition, _twig(part, "then "))
            else:
                yield condition._replace(parts=[part])


# -- the flowchart


class _Box(NamedTuple):
    """A step on its way into the flowchart: a node, or a subgraph."""

    id: str
    role: str
    view: _View


def to_mermaid(pipeline: Any) -> str:
    """Return a pipeline, or any other step, as the text of a Mermaid flowchart.

    A step with others inside is a subgraph, and so is a pipeline that has a name of its own, hooks or
    middlewares. Names are escaped, so that each is drawn as it is. The same pipeline always gives the same
    text. Mermaid itself refuses more than 500 arrows, or 50,000 characters, unless it is configured to
    take them.
    """
    ids = map("n{}".format, count(1))
    lines = ["flowchart TD"]
    waiting: list[tuple[int, str | _Box]] = [(1, drawn) for drawn in reversed(_outermost(pipeline, ids))]
    while waiting:  # no recursion, so that no nesting is too deep
        depth, drawn = waiting.pop()
        if isinstance(drawn, _Box):
            drawn, *inside = _drawn(drawn, ids)
            waiting.extend((depth + (part != "end"), part) for part in reversed(inside))
        lines.append(f"{'  ' * depth}{drawn}")
    return "\n".join(lines)


def _outermost(pipeline: Any, ids: Iterator[str]) -> Sequence[str | _Box]:
    whole = _Box("n0", "stage", _view(_whole(pipeline)))
    if whole.view.title == "pipeline" and whole.view.parts and not whole.view.words:
        return _inside(whole, ids)  # a frame would say nothing
    return [whole]


def _drawn(box: _Box, ids: Iterator[str]) -> Sequence[str | _Box]:
    is_fallback = box.view.kind == "fallback"  # whose arrows have its words
    label = _quoted(box.view.title, *(() if is_fallback else box.view.words))
    if box.view.parts:
        return [f"subgraph {box.id}[{label}]", "direction TB", *_inside(box, ids), "end"]
    return [f"{box.id}{{{label}}}" if box.role == "predicate" else f"{box.id}[{label}]"]


def _inside(box: _Box, ids: Iterator[str]) -> Sequence[str | _Box]:
    boxes = [_Box(next(ids), part.role, _view(part)) for part in box.view.parts]
    arrows = _ARROWS.get(box.view.kind)
    return boxes if arrows is None else [*boxes, *arrows(box, boxes)]


def _in_a_row(box: _Box, boxes: Sequence[_Box]) -> Iterator[str]:
    return (f"{one.id} --> {other.id}" for one, other in pairwise(boxes))


def _in_need(box: _Box, boxes: Sequence[_Box]) -> Iterator[str]:
    label = _quoted(*(box.view.words or ("on Exception",)))
    return (f"{one.id} -.->|{label}| {other.id}" for one, other in pairwise(boxes))


def _by_answer(box: _Box, boxes: Sequence[_Box]) -> Iterator[str]:
    asked, *others = boxes
    for other in others:
        if other.role == "step":
            yield f"{asked.id} -->|yes| {other.id}"
        else:
            yield f"{asked.id} -->|no| {other.id}"
            asked = other
    if asked.role == "predicate":
        yield f'{asked.id} -->|no| {box.id}none(["error: no match"])'


_ARROWS = {"pipeline": _in_a_row, "fallback": _in_need, "branch": _by_answer}

_UNSAFE = re.compile(
    r"""(?P<apart>\\(?=n)|\$(?=\$)|:(?=fa-)|ﬂ(?=°)|¶(?=ß))  # has a meaning to mermaid after decoding, too
      | ["\#$%&*+:;<>@[\\\]^`{|}~]       # ends the label, or is markup of mermaid, of HTML or of Markdown
      | [-_](?<![^\W_].)|[-_](?![^\W_])  # __init__ and - item, but not fetch_page
      | \.(?<!\d.)|\.(?!\d)             # 1. item and www.org, but not 0.5
      | \)(?<=\d.)                      # 1) item
      | ^[ ]|[ ]$|[ ](?<=[ ].)          # HTML takes several spaces for one
      | [ ](?<=direction.)              # a statement wherever it stands: direction LR
      | [^\S ]                          # mermaid strips what is white""",
    re.VERBOSE,
)
_PARTED = "#8204;"  # a joiner of no width


def _quoted(*lines: str) -> str:
    return f'"{"<br/>".join(_UNSAFE.sub(_entity, line) for line in lines)}"'


def _entity(match: re.Match[str]) -> str:
    entity = "#160;" if match[0] == " " else f"#{ord(match[0])};"
    return entity + _PARTED if match["apart"] else entity
