"""Reading a process from type hints: its inputs, outputs and schemas, and what goes in and out."""

import datetime as dt
import decimal
import enum
import functools
import ipaddress
import itertools
import json
import math
import pathlib
import re
import sys
import types
import typing
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, NotRequired, Optional, Required, TypeVar, Union, cast

import jsonschema_rs
import pydantic
import pytest
import typing_extensions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError, PydanticSerializationError

from async_pipeline import Pipeline, Stage, branch, each, fallback, keep, parallel, require
from async_pipeline.integrations._descriptions import read_descriptions
from async_pipeline.integrations._process import BadInputs, InputFault, Process

T = TypeVar("T")


class Line(typing.TypedDict):
    sku: str
    price: float
    note: NotRequired[str]


class Order(typing.TypedDict, total=False):
    """An order."""

    lines: Required[list[Line]]
    day: dt.date


class Tree(typing.TypedDict):
    children: list["Tree"]


class Box(typing.TypedDict, Generic[T]):
    content: T
    others: list[T]


@dataclass
class Trip:
    city: str
    days: int = 3
    tags: list[str] = field(default_factory=list)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dog"]
    age: float


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    start: dt.date = Field(alias="from", title="First day", description="when it begins")
    end: dt.date | None = None

    @field_validator("start")
    @classmethod
    def check_start(cls, value: dt.date) -> dt.date:
        if value.year < 2000:
            raise ValueError("secret")
        if value.year < 2001:
            raise AssertionError("secret")
        if value.year < 2002:
            raise PydanticCustomError("mine", "secret")
        return value


class Color(enum.Enum):
    RED = "red"
    TWO = 2


class Share(enum.Enum):
    HALF = 0.5
    WHOLE = 1.0


class Point(typing.NamedTuple):
    x: int
    y: int


def process(step: Any, description: Mapping[str, Any] | None = None) -> Process:
    return Process("p", step if hasattr(step, "run") else Stage("stage", step), description)


def taking(hint: Any) -> Process:
    """A process with one input ``v`` of this type, unless it has fields."""

    async def handler(v: Any) -> Any:
        return v

    handler.__annotations__["v"] = hint
    return process(handler)


def giving(hint: Any) -> Process:
    def handler(v: Any) -> Any:
        return v

    handler.__annotations__["return"] = hint
    return process(handler)


def faults(process: Process, inputs: Any) -> list[tuple[str, str]]:
    with pytest.raises(BadInputs) as caught:
        process.read(inputs)
    assert all(type(fault) is InputFault for fault in caught.value.faults)
    return [(fault.pointer, fault.detail) for fault in caught.value.faults]


def pointers(process: Process, inputs: Any) -> list[str]:
    return [pointer for pointer, _ in faults(process, inputs)]


def schema_of(hint: Any) -> Any:
    return taking(hint).inputs_schema["properties"]["v"]


async def price(order: Order, context: Any) -> Trip:
    """Price an order.

    At length.
    """
    return Trip("Rome")


async def count(n: int) -> int:
    return n


class TestProcess:
    def test_is_described(self) -> None:
        described = Process("price", Pipeline([price], name="prices")).description()
        assert described["id"] == "price"
        assert described["title"] == "prices"
        assert described["version"] == "1.0.0"
        assert described["description"] == "Price an order."
        assert described["jobControlOptions"] == ["sync-execute", "async-execute", "dismiss"]
        assert described["outputTransmission"] == ["value"]
        assert "keywords" not in described
        assert described["inputs"]["day"] == {
            "title": "Day",
            "schema": {"type": "string", "format": "date", "title": "Day"},
            "minOccurs": 0,
            "maxOccurs": 1,
        }
        assert described["inputs"]["lines"]["minOccurs"] == 1
        assert described["outputs"]["city"] == {
            "title": "City",
            "schema": {"type": "string", "title": "City"},
        }
        assert set(described["outputs"]) == {"city", "days", "tags"}

    def test_the_summary_is_the_description_without_inputs_and_outputs(self) -> None:
        one = process(price)
        described = one.description()
        del described["inputs"], described["outputs"]
        assert one.summary() == described
        one.summary()["id"] = one.description()["inputs"]["day"]["title"] = "changed"
        assert one.summary()["id"] == "p"
        assert one.description()["inputs"]["day"]["title"] == "Day"
        one.description()["outputs"]["city"]["title"] = "changed"
        assert one.description()["outputs"]["city"]["title"] == "City"

    def test_the_title_is_the_pipelines_name_or_the_id(self) -> None:
        assert Process("x", Pipeline([price])).title == "x"
        assert Process("x", Pipeline([price], name="y")).title == "y"
        assert Process("x", Stage("z", price)).title == "z"

    def test_all_of_it_is_json(self) -> None:
        one = process(price)
        shown = [one.description(), one.inputs_schema, dict(one.outputs)]
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown

    def test_its_schema_of_inputs(self) -> None:
        one = process(lambda v: v)
        assert one.inputs_schema == {
            "type": "object",
            "properties": {"v": {}},
            "required": ["v"],
            "additionalProperties": False,
        }

    @pytest.mark.parametrize("id", ["a", "A.b_c~d-1", "..."])
    def test_takes_an_id(self, id: str) -> None:
        assert repr(Process(id, Stage("count", count))) == f"Process({id!r}, Stage('count'))"

    @pytest.mark.parametrize("id", ["", "a b", "a/b", "ä", "a\n", "a?b", ".", ".."])
    def test_refuses_an_id(self, id: str) -> None:
        with pytest.raises(ValueError, match="letters, digits"):
            Process(id, Stage("count", count))

    def test_refuses_an_id_that_is_no_text(self) -> None:
        with pytest.raises(TypeError, match="must be a str, not 5"):
            Process(5, Stage("count", count))  # type: ignore[arg-type]

    def test_no_docstring_no_description(self) -> None:
        assert "description" not in process(count).summary()
        assert "description" not in process(len).summary()


class Callable_:  # noqa: N801
    def __call__(self, place: str, context: Any) -> int:
        """Called."""
        return len(place)

    def method(self, place: str) -> int:
        return len(place)

    @classmethod
    def of_class(cls, place: str) -> int:
        return len(place)

    @staticmethod
    def static(place: str) -> int:
        return len(place)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def passing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def injected(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(place: Any) -> Any:
        return function(3, place)

    return wrapper


def of_another_module(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(order: Any) -> Any:
        return function(order, None)

    return wrapper


def plain(place: str) -> int:
    return len(place)


def with_session(session: int, place: str) -> int:
    return session


class OwnStep:
    name = "own"

    async def run(self, place: str, *, context: Any = None) -> int:
        return 1


class OwnStage(Stage[Any, Any]):
    async def run(self, place: str, *, context: Any = None) -> int:
        return 1


class SilentStage(Stage[Any, Any]):
    async def run(self, value, *, context=None):  # type: ignore[no-untyped-def]
        return await super().run(value, context=context)


class TestHandlers:
    """Where a handler's hints are found."""

    @pytest.mark.parametrize(
        "step",
        [
            plain,
            Callable_(),
            Callable_().method,
            Callable_.of_class,
            Callable_.static,
            functools.partial(with_session, 3),
            functools.partial(Callable_().method),
            wrapped(plain),
            wrapped(wrapped(plain)),
            functools.cache(plain),
            functools.singledispatch(plain),
            injected(with_session),
            passing(plain),
            wrapped(Callable_().method),
            OwnStep(),
            OwnStage("own", count),
            SilentStage("silent", plain),
            Pipeline([Pipeline([plain])]),
        ],
        ids=repr,
    )
    def test_are_found(self, step: Any) -> None:
        one = process(step)
        assert one.inputs_schema["properties"] == {"place": {"type": "string"}}
        assert one.outputs == {"result": {"type": "integer"}}

    def test_the_docstring_is_the_handlers(self) -> None:
        assert process(Callable_()).summary()["description"] == "Called."
        assert process(functools.partial(price)).summary()["description"] == "Price an order."

    @pytest.mark.parametrize(
        ("handler", "name"),
        [
            (lambda x: x, "x"),
            (lambda *args: args, "value"),
            (len, "value"),
            (str.upper, "value"),
            (int, "value"),
            (functools.partial(len), "value"),
            (types.MethodType(len, []), "value"),
        ],
    )
    def test_without_hints_anything_goes(self, handler: Any, name: str) -> None:
        one = process(Stage("stage", handler, pass_context=False))
        assert one.inputs_schema["properties"] == {name: {}}
        assert one.outputs == {"result": {}}
        assert one.read({name: [1.0, None]}) == [1.0, None]

    def test_a_class_returns_itself(self) -> None:
        one = process(Trip)
        assert list(one.inputs_schema["properties"]) == ["value"]
        assert list(one.outputs) == ["city", "days", "tags"]

    def test_none_is_a_hint(self) -> None:
        def handler(v: None) -> None: ...

        one = process(handler)
        assert one.inputs_schema["properties"] == {"v": {"type": "null"}}
        assert one.outputs == {"result": {"type": "null"}}
        assert one.write(None) == {"result": None}

    def test_a_default_makes_it_optional(self) -> None:
        day = dt.date(2020, 1, 2)

        def handler(first_day: dt.date = day) -> None: ...

        one = process(handler)
        assert one.description()["inputs"]["first_day"] == {
            "title": "First Day",
            "schema": {"type": "string", "format": "date", "default": "2020-01-02"},
            "minOccurs": 0,
            "maxOccurs": 1,
        }
        assert "required" not in one.inputs_schema
        assert one.read({}) is day
        assert one.read({"first_day": "2021-01-01"}) == dt.date(2021, 1, 1)

    def test_a_default_that_is_no_json_is_not_shown(self) -> None:
        nothing = object()

        def handler(v: int = nothing) -> None: ...  # type: ignore[assignment]

        one = process(handler)
        assert one.inputs_schema["properties"]["v"] == {"type": "integer"}
        assert one.read({}) is nothing

    def test_the_default_of_the_hint_stands_above_the_parameters(self) -> None:
        def handler(v: Annotated[int, Field(default=5)] = 6) -> None: ...

        one = process(handler)
        assert one.read({}) == one.inputs_schema["properties"]["v"]["default"] == 5

    def test_a_default_that_json_has_no_number_for_is_null(self) -> None:
        def handler(v: float = math.inf) -> None: ...

        assert process(handler).inputs_schema["properties"]["v"] == {"type": "number", "default": None}

    def test_rules_stand_in_the_hint(self) -> None:
        one = taking(Annotated[int, Field(ge=1, title="How many", description="of them")])
        assert one.description()["inputs"]["v"]["title"] == "How many"
        assert one.description()["inputs"]["v"]["description"] == "of them"
        assert one.inputs_schema["properties"]["v"]["minimum"] == 1
        assert pointers(one, {"v": 0}) == ["/inputs/v"]
        assert taking(Annotated[int, Field(default=5)]).read({}) == 5

    @pytest.mark.parametrize(("name", "title"), [("_", "_"), ("_a", "A")])
    def test_a_name_may_begin_with_an_underscore(self, name: str, title: str) -> None:
        scope: dict[str, Any] = {}
        exec(f"def handler({name}: int): ...", scope)
        one = process(scope["handler"])
        assert one.read({name: 1}) == 1
        assert one.description()["inputs"][name]["title"] == title

    def test_where_a_stage_of_its_own_says_nothing_its_handler_names_the_input(self) -> None:
        assert list(process(SilentStage("silent", lambda place: place)).inputs_schema["properties"]) == [
            "place"
        ]

    def test_a_handler_of_any_arguments_has_a_docstring_too(self) -> None:
        def handler(*args: Any) -> None:
            """Take anything."""

        assert process(handler).summary()["description"] == "Take anything."


class TestSteps:
    """What steps made of steps take and give."""

    @pytest.mark.parametrize(
        ("step", "schema"),
        [
            (Pipeline([require("a"), Pipeline([require("b")]), count]), {"n": {"type": "integer"}}),
            (require("a"), {"value": {}}),
            (each(count), {"n": {"type": "array", "items": {"type": "integer"}}}),
            (keep(count), {"n": {"type": "array", "items": {"type": "integer"}}}),
            (each(require("a")), {"value": {"type": "array", "items": {}}}),
            (parallel(a=require("x"), b=lambda v: v, c=count), {"n": {"type": "integer"}}),
            (parallel(a=lambda v: v, b=lambda w: w), {"v": {}}),
            (parallel(a=require("x")), {"value": {}}),
            (branch((plain, lambda v: v), otherwise=count), {"n": {"type": "integer"}}),
            (fallback(lambda v: v, count), {"n": {"type": "integer"}}),
        ],
        ids=repr,
    )
    def test_take(self, step: Any, schema: Any) -> None:
        one = process(step)
        found = {name: dict(entry) for name, entry in one.inputs_schema["properties"].items()}
        assert found == schema
        for _ in one.description()["inputs"].values():
            assert one.description()["inputs"].keys() == schema.keys()

    def test_each_does_not_take_the_default_of_one(self) -> None:
        def handler(n: int = 5) -> None: ...

        assert pointers(process(each(handler)), {}) == ["/inputs/n"]

    @pytest.mark.parametrize(
        ("step", "schema"),
        [
            (Pipeline([plain, require("a"), Pipeline([require("b")])]), {"type": "integer"}),
            (Pipeline([require("a")]), {}),
            (Pipeline([require("a"), lambda v: v]), {}),
            (each(plain), {"type": "array", "items": {"type": "integer"}}),
            (keep(plain), {"type": "array", "items": {"type": "string"}}),
            (keep(require("a")), {"type": "array", "items": {}}),
            (branch((count, plain), otherwise=count), {"type": "integer"}),
            (fallback(plain, lambda v: v), {}),
            (each(parallel(a=plain)), None),
        ],
        ids=repr,
    )
    def test_give(self, step: Any, schema: Any) -> None:
        found = process(step).outputs
        assert list(found) == ["result"]
        if schema is not None:
            assert found["result"] == schema
        else:
            assert found["result"]["items"]["properties"]["a"]["type"] == "integer"

    @pytest.mark.parametrize(
        ("hint", "items"),
        [
            (list[int], {"type": "integer"}),
            (Annotated[Sequence[int], "of them"], {"type": "integer"}),
            (dict[int, str], {"type": "integer"}),
            (AsyncIterator[int], {"type": "integer"}),
            (tuple[int, ...], {"type": "integer"}),
            (tuple[int, str], {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
            (Any, {"type": "string"}),
            (str, {"type": "string"}),
            (Literal[1], {"type": "string"}),
        ],
    )
    def test_keep_gives_elements_of_what_it_takes(self, hint: Any, items: Any) -> None:
        def handler(v: Any) -> Any: ...

        handler.__annotations__["return"] = hint
        assert process(Pipeline([handler, keep(plain)])).outputs == {
            "result": {"type": "array", "items": items}
        }

    def test_each_gives_lists_of_what_a_check_lets_through(self) -> None:
        def handler(v: Any) -> list[int]:
            return [v]

        assert process(Pipeline([handler, each(require("a"))])).outputs["result"]["items"] == {
            "type": "integer"
        }

    def test_parallel_gives_its_names(self) -> None:
        one = process(Pipeline([plain, parallel(price=price, any=lambda v: v, same=require("a"))]))
        assert list(one.outputs) == ["price", "any", "same"]
        assert set(one.outputs["price"]["properties"]) == {"city", "days", "tags"}
        assert one.outputs["same"]["type"] == "integer"
        given = {"price": Trip("Rome"), "any": {1}, "same": 1}
        assert one.write(given)["price"] == {"city": "Rome", "days": 3, "tags": []}

    def test_branches_give_one_of_several(self) -> None:
        one = process(branch((plain, plain), otherwise=price))
        assert [choice["type"] for choice in one.outputs["result"]["anyOf"]] == ["integer", "object"]
        assert one.write(Trip("Rome")) == {"result": {"city": "Rome", "days": 3, "tags": []}}
        assert list(process(branch((plain, price), otherwise=price)).outputs) == ["city", "days", "tags"]

    @pytest.mark.parametrize(
        "hint",
        [
            Awaitable[int],
            Coroutine[Any, Any, int],
            Awaitable[int] | int,
            Union[int, Awaitable[int]],  # noqa: UP007
        ],
    )
    def test_what_is_awaited_is_what_comes_of_it(self, hint: Any) -> None:
        assert giving(hint).outputs == {"result": {"type": "integer"}}

    def test_an_awaitable_of_no_type_gives_anything(self) -> None:
        assert giving(Awaitable).outputs == {"result": {}}

    def test_only_hints_that_are_needed_are_evaluated(self) -> None:
        def first(v: int, context: "Unknown") -> "Unknown": ...  # type: ignore[name-defined]  # noqa: F821
        def middle(v: "Unknown") -> "Unknown": ...  # type: ignore[name-defined]  # noqa: F821
        def last(v: "Unknown", context: "Unknown") -> str:  # type: ignore[name-defined]  # noqa: F821
            return ""

        one = process(Pipeline([first, middle, each(middle), last]))
        assert one.inputs_schema["properties"] == {"v": {"type": "integer"}}
        assert one.outputs == {"result": {"type": "string"}}


MODULE = """
from __future__ import annotations
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, Annotated, TypedDict
from pydantic import Field
if TYPE_CHECKING:
    from nowhere import Settings

class Base(TypedDict):
    city: str
    days: NotRequired[int]

class Order(Base, total=False):
    day: int

@dataclass
class Out:
    n: Annotated[int, Field(ge=1)]

async def handler(order: Order, context: Settings) -> Out:
    return Out(1)

async def unknown(order: Settings) -> Out:
    return Out(1)

async def unknown_return(order: Order) -> list[Settings]:
    return []

def make():
    class Local(TypedDict):
        city: str
    def needs_nothing(order: Local): ...
    def needs_it(order: list[Local]) -> Local:
        return Local(city="")
    return needs_nothing, needs_it

def empty():
    def inner(order: int) -> Later:
        return later
    return inner
    later = 1

def decorated(function):
    @functools.wraps(function)
    def wrapper(order): return function(order)
    return wrapper

def decorated_anew(function):
    class Town(TypedDict):
        town: str
    @functools.wraps(function, assigned=())
    def wrapper(order: list[Town]): return [Town(**one) for one in order]
    return wrapper
"""


@pytest.fixture(params=["from __future__ import annotations", ""], ids=["strings", "as they are"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not request.param and sys.version_info < (3, 14):
        pytest.skip("hints are evaluated at once")
    made = types.ModuleType("users_module")
    monkeypatch.setitem(sys.modules, "users_module", made)
    source = MODULE.replace("from __future__ import annotations", request.param)
    exec(compile(source, "users_module.py", "exec", dont_inherit=True), made.__dict__)
    return made


class TestHintsThatAreNotThereYet:
    def test_are_evaluated_where_they_stand(self, module: Any) -> None:
        wrappers = module.decorated(module.handler), of_another_module(module.handler)
        twice = of_another_module(of_another_module(module.handler))
        for handler in (module.handler, functools.partial(module.handler), *wrappers, twice):
            one = process(handler)
            assert one.inputs_schema["required"] == ["city"]
            assert list(one.inputs_schema["properties"]) == ["city", "days", "day"]
            assert one.read({"city": "Rome"}) == {"city": "Rome"}
            assert one.outputs == {"n": {"type": "integer", "minimum": 1, "title": "N"}}

    def test_are_evaluated_in_closures(self, module: Any) -> None:
        _, needs_it = module.make()
        assert process(needs_it).read({"order": [{"city": "Rome"}]}) == [{"city": "Rome"}]
        assert list(process(needs_it).outputs) == ["city"]

    def test_are_evaluated_in_closures_of_what_is_decorated(self, module: Any) -> None:
        _, needs_it = module.make()
        one = process(module.decorated(needs_it))
        assert one.read({"order": [{"city": "Rome"}]}) == [{"city": "Rome"}]
        anew = process(module.decorated_anew(needs_it))
        assert anew.read({"order": [{"town": "Rome"}]}) == [{"town": "Rome"}]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("unknown", "the hint 'Settings' of the parameter 'order' of unknown can't be evaluated"),
            ("unknown_return", "of the return value of unknown_return can't be evaluated"),
        ],
    )
    def test_that_are_nowhere_are_told(self, module: Any, name: str, words: str) -> None:
        with pytest.raises(TypeError, match=re.escape(words)) as caught:
            process(getattr(module, name))
        assert str(caught.value).startswith("process 'p': ")
        assert "at the top level of users_module, not in a function and not under TYPE_CHECKING" in str(
            caught.value
        )
        assert isinstance(caught.value.__cause__, NameError)

    def test_that_are_local_and_not_in_the_closure(self, module: Any) -> None:
        needs_nothing, _ = module.make()
        if "order" in needs_nothing.__annotations__ and isinstance(
            needs_nothing.__annotations__["order"], str
        ):
            with pytest.raises(TypeError, match="the hint 'Local' of the parameter 'order'"):
                process(needs_nothing)
        else:
            assert process(needs_nothing).read({"city": "Rome"}) == {"city": "Rome"}

    def test_of_a_closure_that_is_not_filled_yet(self, module: Any) -> None:
        with pytest.raises(TypeError, match=r"of the return value of empty\.<locals>\.inner"):
            process(module.empty())

    def test_texts_inside_of_types(self) -> None:
        def handler(v: list["Trip"]) -> "Trip":
            return v[0]

        assert process(handler).read({"v": [{"city": "Rome"}]}) == [Trip("Rome")]

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="a syntax of Python 3.12")
    def test_type_parameters_and_aliases(self) -> None:
        scope: dict[str, Any] = {"Trip": Trip}
        source = (
            "type Trips = list[Trip]\ntype Journey = Trip\n"
            "def first[T](v: 'T') -> Trips: ...\ndef second(v: Journey): ..."
        )
        exec(compile(source, "aliases", "exec", dont_inherit=True), scope)
        one = process(Pipeline([scope["first"], keep(plain)]))
        assert one.inputs_schema["properties"] == {"v": {}}
        assert list(one.outputs["result"]["items"]["properties"]) == ["city", "days", "tags"]
        assert list(process(scope["second"]).inputs_schema["properties"]) == ["city", "days", "tags"]

    @pytest.mark.parametrize("hint", [OwnStep, list[OwnStep], 5, Callable[[int], int], Iterator[int]])
    def test_there_is_no_json_for_it(self, hint: Any) -> None:
        with pytest.raises(TypeError, match="process 'p': there is no JSON for the hint") as caught:
            taking(hint)
        assert "of the parameter 'v' of taking.<locals>.handler" in str(caught.value)
        assert re.search(r" \(.+\); write a TypedDict, a dataclass, a pydantic model", str(caught.value))
        assert "\n" not in str(caught.value)

    def test_there_is_no_json_for_what_is_returned(self) -> None:
        def other(v: int) -> OwnStep:
            return OwnStep()

        with pytest.raises(TypeError, match=r"OwnStep'> that giving.*handler returns"):
            giving(OwnStep)
        with pytest.raises(TypeError, match=r"that .*<locals>\.other or plain returns"):
            process(fallback(other, plain))
        with pytest.raises(TypeError, match=r"that [^ ]*<locals>\.other returns"):
            process(fallback(other, other))

        def no_json(v: OwnStep) -> bool:
            return True

        with pytest.raises(TypeError, match="that the last handler returns"):
            process(Pipeline([lambda v: v, keep(no_json)]))

    def test_names_of_types(self) -> None:
        trips = typing_extensions.TypeAliasType("trips", list[Trip])
        journey = typing_extensions.TypeAliasType("journey", Trip)
        one = process(Pipeline([giving(trips).pipeline, keep(plain)]))
        assert list(one.outputs["result"]["items"]["properties"]) == ["city", "days", "tags"]
        assert list(taking(journey).inputs_schema["properties"]) == ["city", "days", "tags"]


class TestForms:
    """Value types whose fields are the inputs."""

    def test_a_typed_dict_gives_a_dict_of_what_was_given(self) -> None:
        one = process(price)
        read = one.read({"lines": [{"sku": "a", "price": 1}]})
        assert read == {"lines": [{"sku": "a", "price": 1.0}]}
        assert type(read) is dict
        assert one.inputs_schema["required"] == ["lines"]
        assert one.read({"lines": [], "day": "2020-01-02"})["day"] == dt.date(2020, 1, 2)

    def test_a_dataclass(self) -> None:
        one = taking(Trip)
        assert one.read({"city": "Rome", "tags": ["a"]}) == Trip("Rome", 3, ["a"])
        assert one.inputs_schema["required"] == ["city"]
        assert one.inputs_schema["properties"]["days"]["default"] == 3

    def test_a_model_keeps_its_aliases_and_validators(self) -> None:
        one = taking(Aliased)
        assert list(one.inputs_schema["properties"]) == ["from", "end"]
        assert one.read({"from": "2020-01-02"}).start == dt.date(2020, 1, 2)
        assert one.description()["inputs"]["from"]["title"] == "First day"
        assert one.description()["inputs"]["from"]["description"] == "when it begins"
        assert faults(one, {"start": "2020-01-02"}) == [
            ("/inputs/start", "is not an input of this process"),
            ("/inputs/from", "Field required"),
        ]

    def test_a_model_without_fields(self) -> None:
        class Nothing(BaseModel):
            pass

        one = taking(Nothing)
        assert one.read({}) == Nothing()
        assert one.description()["inputs"] == {}
        assert pointers(one, {"a": 1}) == ["/inputs/a"]

    def test_a_model_that_takes_more_than_it_names(self) -> None:
        class Open(BaseModel):
            model_config = ConfigDict(extra="allow")
            __pydantic_extra__: dict[str, int]
            n: int

        one = taking(Open)
        assert one.read({"n": 1, "m": 2}) == Open.model_validate({"n": 1, "m": 2})
        assert one.inputs_schema["additionalProperties"] == {"type": "integer"}
        assert pointers(one, {"n": 1, "m": {"href": 2}, "o": {"value": 3}}) == ["/inputs/m"]
        assert faults(one, {"n": 1, "\ud800": 2}) == [("/inputs/\ud800", "is not an input of this process")]

    def test_a_generic_model(self) -> None:
        class Page(BaseModel, Generic[T]):
            items: list[T]

        assert taking(Page[int]).read({"items": [1]}).items == [1]

    @pytest.mark.parametrize(
        "hint", [Annotated[Trip, "a trip"], Annotated[Trip, "a", pydantic.AfterValidator(lambda v: v)]]
    )
    def test_with_something_said_about_it(self, hint: Any) -> None:
        assert taking(hint).read({"city": "Rome"}) == Trip("Rome")

    @pytest.mark.parametrize("hint", [Optional[Trip], Union[Trip, Cat], RootModel[Trip], list[Trip]])  # noqa: UP007, UP045
    def test_of_others_there_is_one_input(self, hint: Any) -> None:
        assert list(taking(hint).inputs_schema["properties"]) == ["v"]

    def test_a_type_with_a_schema_of_its_own_is_one_input_or_output(self) -> None:
        class Own(BaseModel):
            n: int

            @model_validator(mode="before")
            @classmethod
            def from_text(cls, value: Any) -> Any:
                return {"n": int(value)} if isinstance(value, str) else value

            @pydantic.model_serializer
            def as_text(self) -> str:
                return str(self.n)

            @classmethod
            def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> Any:
                return {"type": "string"}

        assert taking(Own).read({"v": "5"}) == Own(n=5)
        assert giving(Own).write(Own(n=5)) == {"result": "5"}

    def test_generic_typed_dicts(self) -> None:
        one = taking(Box[int])
        assert one.read({"content": 1, "others": [2]}) == {"content": 1, "others": [2]}
        assert pointers(one, {"content": "a", "others": ["b"]}) == ["/inputs/content", "/inputs/others/0"]

    @pytest.mark.parametrize(
        ("hint", "value"),
        [
            (list[Line], [{"sku": "a", "price": 1.5}]),
            (dict[str, Line], {"x": {"sku": "a", "price": 1.5}}),
            (tuple[Line, ...], ({"sku": "a", "price": 1.5},)),
            (Optional[Line], {"sku": "a", "price": 1.5}),  # noqa: UP045
            (Line | int, {"sku": "a", "price": 1.5}),
            (typing.List[Line], [{"sku": "a", "price": 1.5}]),  # noqa: UP006
            (Annotated[list[Annotated[Line, "x"]], Field(min_length=1)], [{"sku": "a", "price": 1.5}]),
            (list[Box[Line]], [{"content": {"sku": "a", "price": 1.5}, "others": []}]),
            (list[Tree], [{"children": [{"children": []}]}]),
            (list[Literal["a"]], ["a"]),
        ],
    )
    def test_typed_dicts_inside_of_types(self, hint: Any, value: Any) -> None:
        one = taking(hint)
        assert one.read({"v": value}) == value
        assert one.read({"v": json.loads(json.dumps(value))}) == value

    def test_a_typed_dict_with_all_that_there_is(self) -> None:
        read_only: Any = getattr(typing_extensions, "ReadOnly", Required)
        fields = {
            "a": Required[int],
            "b": read_only[NotRequired[int]],
            "c": Annotated[int, Field(ge=1)],
            "d": NotRequired[Annotated[int, Field(ge=1)]],
        }
        for module, total in itertools.product((typing, typing_extensions), (True, False)):
            all_of_it: Any = module.TypedDict("AllOfIt", fields, total=total)
            one = taking(all_of_it)
            assert list(one.inputs_schema["properties"]) == list(fields)
            assert one.inputs_schema["required"] == (["a", "c"] if total else ["a"])
            assert one.read({"a": 1, "c": 1}) == {"a": 1, "c": 1}
            assert pointers(one, {"a": 1, "c": 0, "d": 0}) == ["/inputs/c", "/inputs/d"]

    def test_a_typed_dict_keeps_its_configuration_and_its_docstring(self) -> None:
        class Strictly(typing.TypedDict):
            """Strictly this."""

            n: int

        Strictly.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
        one = taking(list[Strictly])
        assert pointers(one, {"v": [{"n": 1, "m": 1}]}) == ["/inputs/v/0/m"]
        assert one.inputs_schema["properties"]["v"]["items"]["description"] == "Strictly this."
        assert one.inputs_schema["properties"]["v"]["items"]["additionalProperties"] is False

    def test_a_field_of_a_typed_dict_that_is_only_read_is_required(self) -> None:
        read_only: Any = getattr(typing_extensions, "ReadOnly", Required)
        one = taking(cast(Any, typing.TypedDict)("Fixed", {"n": read_only[int]}))
        assert one.inputs_schema["required"] == ["n"]


class TestRead:
    @pytest.mark.parametrize(
        ("hint", "given", "read"),
        [
            (int, 5, 5),
            (int, 2.0, 2),
            (int, -0.0, 0),
            (int, 2**70, 2**70),
            (int, 1e300, int(1e300)),
            (float, 5, 5.0),
            (float, 2**70, float(2**70)),
            (list[int], [1, 2.0, 3], [1, 2, 3]),
            (
                dict[str, int | None],
                {"a": {"x": 1}.get("x"), "b": 1.0, "c": None},
                {"a": 1, "b": 1, "c": None},
            ),
            (int | str, 3.0, 3),
            (float | Literal["a", 1], 5, 5.0),
            (Literal[1, 2], 2.0, 2),
            (Color, 2.0, Color.TWO),
            (Color, "red", Color.RED),
            (dt.date, "2020-01-02", dt.date(2020, 1, 2)),
            (dt.datetime, "2020-01-02T03:04:05Z", dt.datetime(2020, 1, 2, 3, 4, 5, tzinfo=dt.UTC)),
            (dt.timedelta, "PT1M", dt.timedelta(minutes=1)),
            (
                uuid.UUID,
                "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
                uuid.UUID(int=0x6BA7B8109DAD11D180B400C04FD430C8),
            ),
            (decimal.Decimal, "1.10", decimal.Decimal("1.10")),
            (decimal.Decimal, "-1.5e3", decimal.Decimal("-1.5e3")),
            (decimal.Decimal, 3, decimal.Decimal(3)),
            (bytes, "ä", "ä".encode()),
            (set[int], [1, 1.0], {1}),
            (tuple[int, str], [1, "a"], (1, "a")),
            (dict[int, str], {"1": "a"}, {1: "a"}),
            (Iterable[int], [1, 2.0], [1, 2]),
            (Collection[dt.date], ["2020-01-02"], [dt.date(2020, 1, 2)]),
            (Iterable, [1, "a"], [1, "a"]),
            (list[Iterable[int]], [[1]], [[1]]),
            (Any, {"value": 1.0}, {"value": 1.0}),
            (object, [1.0, None, "a"], [1.0, None, "a"]),
            (pydantic.JsonValue, {"a": [1.5, True]}, {"a": [1.5, True]}),
            (str, "\U0001f600", "\U0001f600"),
        ],
    )
    def test_takes(self, hint: Any, given: Any, read: Any) -> None:
        value = taking(hint).read({"v": given})
        assert value == read
        assert type(value) is type(read)

    def test_leaves_floats_where_anything_goes(self) -> None:
        assert type(taking(dict[str, Any]).read({"v": {"a": 1.0}})["a"]) is float

    def test_does_not_change_what_it_was_given(self) -> None:
        given = {"v": [1.0, {"value": 2}]}
        with pytest.raises(BadInputs):
            taking(list[int]).read(given)
        assert given == {"v": [1.0, {"value": 2}]}
        given = {"v": [1.0]}
        assert taking(list[int]).read(given) == [1]
        assert type(given["v"][0]) is float

    @pytest.mark.parametrize(
        ("hint", "given"),
        [
            (int, "5"),
            (int, True),
            (int, 1.5),
            (int, None),
            (int, {"a": 1}),
            (float, "1"),
            (float, True),
            (float, 2**2000 if pydantic.VERSION.startswith("2.7.") else "x"),
            (str, 1),
            (bool, 1),
            (bool, "true"),
            (Literal[1, 2], True),
            (Literal[True], 1),
            (Literal[1, 2], 3.0),
            (Literal[1], "1"),
            (Color, "blue"),
            (Color, True),
            (Share, True),
            (int | Literal[1, "a"], True),
            (Literal[1] | dt.date, True),
            (dt.date, "1577836800"),
            (dt.date, 5),
            (dt.datetime, "1700000000"),
            (dt.datetime, "0000-01-01T00:00:00Z"),
            (Optional[dt.datetime], "0"),  # noqa: UP045
            (dt.datetime | int, "0"),
            (dt.date | dt.datetime, "0"),
            (decimal.Decimal, "1_0"),
            (decimal.Decimal, "1\n"),
            (decimal.Decimal, True),
            (decimal.Decimal, "NaN"),
            (uuid.UUID, "x"),
            (None, 0),
        ],
    )
    def test_refuses(self, hint: Any, given: Any) -> None:
        assert set(pointers(taking(hint), {"v": given})) <= {"/inputs/v", "/inputs"}

    @pytest.mark.parametrize(
        ("hint", "given", "where"),
        [
            (list[dt.date], ["2020-01-02", "5"], "/1"),
            (tuple[int, dt.date], [1, "5"], "/1"),
            (tuple[int, dt.date], [1, "1577836800"], "/1"),
            (Point, {"x": 1}, "/y"),
            (tuple[Literal[1], ...], [1, True], "/1"),
            (dict[str, Literal[1]], {"a": 1, "b": True}, "/b"),
            (dict[str, list[Literal[1, 2] | None]], {"a": [1, None, True]}, "/a/2"),
            (Trip, {"city": 1}, "/city"),
            (list[Trip], [{"city": "a"}, {}], "/1/city"),
            (list[Cat | Dog], [{"kind": "cat", "lives": "x"}], "/0/lives"),
            (dict[str, int] | int, {"int": "x"}, "/int"),
            (dict[int, int], {"a": 1}, "/a"),
            (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "dog", "age": "x"}, "/age"),
            (Annotated[list[int], Field(min_length=2)], [1], ""),
            (dict[str, int], {"a/b~c": "x"}, "/a~1b~0c"),
            (dict[str, dict[str, int]], {"": {"": "x"}}, "//"),
            (NotRequired[int], "x", ""),
        ],
    )
    def test_tells_where(self, hint: Any, given: Any, where: str) -> None:
        if typing.get_origin(hint) is NotRequired:
            hint = int
        one = taking(Annotated[hint, "one"]) if hint is not Trip else taking(Optional[Trip])  # noqa: UP045
        assert f"/inputs/v{where}" in pointers(one, {"v": given})

    def test_checks_fields_that_have_no_name(self) -> None:
        class Open(BaseModel):
            model_config = ConfigDict(extra="allow")
            __pydantic_extra__: dict[str, Literal[1]]
            day: dt.date

        one = taking(Open)
        assert set(pointers(one, {"day": "5", "more": True})) == {"/inputs/day", "/inputs/more"}

        class Flagged(Open):
            flag: bool

        flagged = {"day": "2020-01-02", "flag": True, "more": 1}
        assert taking(Flagged).read(flagged) == Flagged.model_validate(
            {**flagged, "day": dt.date(2020, 1, 2)}
        )

    @pytest.mark.parametrize("inputs", [None, [], "a", 5])
    def test_refuses_what_is_no_object(self, inputs: Any) -> None:
        assert faults(taking(int), inputs) == [("/inputs", "must be an object")]

    def test_tells_all_at_once(self) -> None:
        inputs = {
            "more": 1,
            "lines": [{"sku": 1, "price": "2"}, 3, {}],
            "day": float("nan"),
        }
        assert faults(process(price), inputs) == [
            ("/inputs/more", "is not an input of this process"),
            ("/inputs/day", "is not a finite number"),
            ("/inputs/lines/0/sku", "Input should be a valid string"),
            ("/inputs/lines/0/price", "Input should be a valid number"),
            ("/inputs/lines/1", "Input should be an object"),
            ("/inputs/lines/2/sku", "Field required"),
            ("/inputs/lines/2/price", "Field required"),
        ]

    def test_tells_a_fault_once(self) -> None:
        found = faults(taking(Line | Tree), {"v": 5})
        assert len(found) == len(set(found)) == 1
        assert len(faults(taking(Literal[1] | Literal[2]), {"v": True})) == 1
        assert len(faults(taking(dt.date), {"v": "5"})) == 1

    def test_an_input_that_is_missing_and_one_that_is_too_much(self) -> None:
        assert faults(taking(int), {"w": 1}) == [
            ("/inputs/w", "is not an input of this process"),
            ("/inputs/v", "Field required"),
        ]

    @pytest.mark.parametrize("day", ["1999-01-01", "2000-01-01", "2001-01-01"])
    def test_keeps_the_words_of_validators_to_itself(self, day: str) -> None:
        assert faults(taking(Aliased), {"from": day}) == [("/inputs/from", "is not valid")]

    def test_the_error_shows_itself(self) -> None:
        with pytest.raises(BadInputs, match=r"^/inputs/v: Input should be a valid integer$"):
            taking(int).read({"v": "5"})

    @pytest.mark.parametrize(
        ("value", "where", "words"),
        [
            (math.nan, "", "is not a finite number"),
            ([1, -math.inf], "/1", "is not a finite number"),
            ("\ud800", "", "is not valid Unicode"),
            ({"a": ["\udfff"]}, "/a/0", "is not valid Unicode"),
            ({"a": {"\ud800": 1}}, "/a", "has a name that is not valid Unicode"),
            ({"a": {"\ud800": math.nan}}, "/a", "has a name that is not valid Unicode"),
        ],
    )
    def test_refuses_what_only_python_takes_for_json(self, value: Any, where: str, words: str) -> None:
        assert faults(taking(Any), {"v": value}) == [(f"/inputs/v{where}", words)]

    def test_a_name_that_is_not_text(self) -> None:
        assert faults(taking(Any), {"\ud800": 1, "v": 1}) == [
            ("/inputs/\ud800", "is not an input of this process"),
        ]

    @pytest.mark.parametrize("kind", [list, dict])
    def test_how_deep_it_reads(self, kind: type) -> None:
        def nested(levels: int) -> Any:
            value: Any = 1
            for _ in range(levels):
                value = [value] if kind is list else {"a": value}
            return value

        assert taking(Any).read({"v": nested(199)}) == nested(199)
        for levels in (200, 900, 50_000):
            (fault,) = faults(taking(Any), {"v": nested(levels)})
            assert fault[0].count("/") == 201
            assert fault[1] == "is nested too deeply"

    def test_gives_up_on_inputs_that_are_wrong_again_and_again(self) -> None:
        first_only = Annotated[list[int], pydantic.BeforeValidator(_first_float_only)]
        assert taking(first_only).read({"v": [1.0, 2.0]}) == [1, 2]
        assert pointers(taking(first_only), {"v": [1.0] * 20}) == ["/inputs/v/8"]

    def test_an_error_that_is_none_of_a_validator_is_its_own(self) -> None:
        def make() -> int:
            raise ValueError("a default that can't be made")

        class Broken(BaseModel):
            n: int = Field(default_factory=make)

        with pytest.raises(ValueError, match="a default that can't be made"):
            taking(Broken).read({})

    def test_the_year_0_which_old_pydantic_lets_through(self) -> None:
        def make() -> int:
            raise ValueError("year 0 is out of range")

        class Like(BaseModel):
            n: int = Field(default_factory=make)

        assert faults(taking(Like), {}) == [("/inputs", "is not valid")]

    def test_big_integers_are_floats_where_pydantic_refuses_them(self) -> None:
        def refuse(value: Any) -> Any:
            if type(value) is int:
                raise PydanticKnownError("float_type")
            return value

        one = taking(Annotated[float, pydantic.BeforeValidator(refuse)])
        assert one.read({"v": 2**70}) == float(2**70)
        for number in (10**400, -(10**400)):
            assert faults(one, {"v": number}) == [("/inputs/v", "Input should be a valid number")]
        assert pointers(one, {"v": True}) == ["/inputs/v"]

    def test_an_error_of_a_validator_that_is_no_value_error_is_its_own(self) -> None:
        def validate(value: int) -> int:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            taking(Annotated[int, pydantic.AfterValidator(validate)]).read({"v": 1})

    @pytest.mark.parametrize("kind", ["get_attribute_error", "iteration_error", "mapping_type"])
    def test_keeps_the_words_of_exceptions_to_itself(self, kind: Any) -> None:
        def refuse(value: int) -> int:
            raise PydanticKnownError(kind, {"error": "secret"})

        one = taking(Annotated[int, pydantic.AfterValidator(refuse)])
        assert faults(one, {"v": 1}) == [("/inputs/v", "is not valid")]

    @pytest.mark.parametrize("kind", ["int_type", "literal_error", "enum"])
    def test_floats_are_integers_where_pydantic_refuses_them(self, kind: Any) -> None:
        def refuse(value: Any) -> Any:
            if isinstance(value, float):
                raise PydanticKnownError(kind, None if kind == "int_type" else {"expected": "1"})
            return value

        assert taking(Annotated[int, pydantic.BeforeValidator(refuse)]).read({"v": 1.0}) == 1

    def test_tells_where_when_a_key_is_called_like_a_type(self) -> None:
        assert pointers(taking(dict[str, int] | int), {"v": {"int": "x"}}) == ["/inputs/v/int", "/inputs/v"]

    def test_tells_where_when_a_validator_has_added_what_is_wrong(self) -> None:
        longer = Annotated[list[int], pydantic.BeforeValidator(lambda value: [*value, "x"])]
        assert pointers(taking(longer), {"v": [1]}) == ["/inputs/v"]

    def test_checks_each_of_several_models(self) -> None:
        class Born(BaseModel):
            kind: Literal["born"]
            day: dt.date

        class Died(BaseModel):
            kind: Literal["died"]
            day: dt.date

        one = taking(list[Annotated[Born | Died, Field(discriminator="kind")]])
        assert "/inputs/v/0/day" in pointers(one, {"v": [{"kind": "born", "day": "1577836800"}]})

    def test_checks_all_of_several_schemas(self) -> None:
        by_hand = {"allOf": [{"type": "string"}, {"format": "date"}]}
        one = taking(Annotated[dt.date, pydantic.WithJsonSchema(by_hand)])
        assert faults(one, {"v": "1577836800"}) == [("/inputs/v", "is not a date like 2020-12-31")]


def _first_float_only(value: Any) -> Any:
    """Like FailFast, which is newer than the oldest pydantic: the first wrong element only."""
    for index, one in enumerate(value):
        if isinstance(one, float):
            return [*range(index), one]
    return value


class TestOtherForms:
    """The forms that OGC has for a value."""

    @pytest.mark.parametrize(
        "more", [{}, {"mediaType": "text/plain"}, {"encoding": "x", "schema": {}, "format": {}}]
    )
    def test_a_qualified_value(self, more: Any) -> None:
        assert taking(int).read({"v": {"value": 5, **more}}) == 5
        assert taking(list[int]).read({"v": {"value": [5.0], **more}}) == [5]

    def test_a_value_with_something_else_is_not_qualified(self) -> None:
        assert pointers(taking(int), {"v": {"value": 5, "other": 1}}) == ["/inputs/v"]
        assert pointers(taking(int), {"v": {"mediaType": "a"}}) == ["/inputs/v"]

    def test_a_value_that_fits_as_it_is_stays(self) -> None:
        assert taking(dict[str, int]).read({"v": {"value": 5}}) == {"value": 5}
        assert taking(Any).read({"v": {"value": 5}}) == {"value": 5}

        @dataclass
        class Amount:
            value: int
            format: str = "EUR"

        one = taking(Optional[Amount])  # noqa: UP045
        assert one.read({"v": {"value": 5}}) == Amount(5)
        assert one.read({"v": {"value": {"value": 5}}}) == Amount(5)

        class Both(typing_extensions.TypedDict):
            any: Any
            n: int

        both = {"any": {"value": 5}, "n": {"value": 6}}
        assert taking(Both).read(both) == {"any": {"value": 5}, "n": 6}

    def test_what_is_wrong_with_one(self) -> None:
        assert faults(taking(int), {"v": {"value": "x"}}) == [
            ("/inputs/v/value", "Input should be a valid integer")
        ]
        assert pointers(
            process(price), {"lines": {"value": [{"sku": "a"}]}, "day": {"value": "2020-01-02"}}
        ) == ["/inputs/lines/value/0/price"]

    def test_what_is_wrong_with_one_that_has_a_field_of_that_name(self) -> None:
        class Amount(typing_extensions.TypedDict):
            value: int

        class Order(typing_extensions.TypedDict):
            amount: Amount
            n: int

        assert pointers(taking(Order), {"amount": {"value": "x"}, "n": {"value": "x"}}) == [
            "/inputs/amount/value",
            "/inputs/n/value",
        ]
        assert faults(taking(Order), {"amount": {"value": "x"}, "n": 1}) == [
            ("/inputs/amount/value", "Input should be a valid integer")
        ]
        assert taking(Order).read({"amount": {"value": {"value": 5}}, "n": 1}) == {
            "amount": {"value": 5},
            "n": 1,
        }

    def test_several_at_once(self) -> None:
        one = taking(Trip)
        assert one.read({"city": {"value": "Rome"}, "days": {"value": 2.0}, "tags": ["a"]}) == Trip(
            "Rome", 2, ["a"]
        )
        assert pointers(one, {"city": {"value": "Rome"}, "days": "x", "tags": {"value": 5}}) == [
            "/inputs/tags/value",
            "/inputs/days",
        ]

    def test_by_reference(self) -> None:
        given = {"city": {"href": "https://example.org", "type": "text/plain"}, "days": "x"}
        assert faults(taking(Trip), given) == [
            ("/inputs/days", "Input should be a valid integer"),
            ("/inputs/city", "values by reference are not supported"),
        ]

    def test_by_reference_where_it_fits(self) -> None:
        class Link(typing_extensions.TypedDict):
            href: str
            size: int

        class Order(typing_extensions.TypedDict):
            link: Link

        assert taking(dict[str, str]).read({"v": {"href": "a"}}) == {"href": "a"}
        assert pointers(taking(Order), {"link": {"href": "a"}}) == ["/inputs/link/size"]


class Leaf(BaseModel):
    leaf: int


class Left(BaseModel):
    left: "Node"
    right: "Node | None" = None


class Right(BaseModel):
    node: "Node"


Node = Left | Right | Leaf
Left.model_rebuild()
Right.model_rebuild()


def keys_of(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            yield from keys_of(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from keys_of(value)


class TestSchemas:
    def test_are_of_2020_12(self) -> None:
        one = process(price)
        for schema in (one.inputs_schema, *one.outputs.values()):
            assert jsonschema_rs.meta.is_valid(dict(schema))

    def test_have_no_references(self) -> None:
        chosen = Annotated[Cat | Dog, Field(discriminator="kind")]
        by_pattern = dict[Annotated[str, Field(pattern="^a")], Cat]
        for hint in (list[Cat | Dog], chosen, dict[str, Line], tuple[Cat, Dog], dict[Color, int], by_pattern):
            assert not {"$ref", "$defs", "discriminator"} & set(keys_of(schema_of(hint)))

    def test_keep_what_is_said_beside_a_reference(self) -> None:
        class Outer(BaseModel):
            cat: Cat = Field(description="a cat", default=Cat(kind="cat"))

        schema = taking(Outer).inputs_schema["properties"]["cat"]
        assert schema["description"] == "a cat"
        assert "lives" in json.dumps(schema)
        assert schema["default"] == {"kind": "cat", "lives": 9}

    def test_of_types_that_have_themselves_inside(self) -> None:
        assert schema_of(list[Tree])["items"]["properties"]["children"]["items"] == {}
        nodes = schema_of(Node)["anyOf"]
        assert [list(node["properties"]) for node in nodes] == [["left", "right"], ["node"], ["leaf"]]
        assert list(nodes[0]["properties"]["left"]["anyOf"][1]["properties"]) == ["node"]
        assert taking(Node).read({"v": {"node": {"left": {"leaf": 1.0}}}}).node.left.leaf == 1

    def test_of_types_one_inside_the_other(self) -> None:
        hint: Any = Cat
        for name in "abcd":
            hint = cast(Any, pydantic.create_model)(name, inner=(hint, ...))
        assert "lives" in json.dumps(schema_of(list[hint]))

    def test_of_many_types_that_all_refer_to_each_other(self) -> None:
        names = [f"M{index}" for index in range(12)]
        every: Any = Union[tuple(typing.ForwardRef(name) for name in names)]  # noqa: UP007
        models: dict[str, Any] = {
            name: cast(Any, pydantic.create_model)(name, kind=(Literal[name], ...), inner=(every, ...))
            for name in names
        }
        for model in models.values():
            model.model_rebuild(_types_namespace=models)
        text = json.dumps(schema_of(Union[tuple(models.values())]))  # noqa: UP007
        assert len(text) < 100_000

    def test_names_that_look_like_keywords_are_names(self) -> None:
        fields = {"$ref": int, "$defs": int, "minimum": dt.date, "discriminator": int, "properties": Cat}
        made = cast(Any, typing_extensions.TypedDict)("made", fields)
        one = taking(made)
        assert list(one.inputs_schema["properties"]) == list(fields)
        assert one.inputs_schema["properties"]["$ref"]["type"] == "integer"
        assert list(one.inputs_schema["properties"]["properties"]["properties"]) == ["kind", "lives"]

    def test_values_that_look_like_references_are_values(self) -> None:
        default = {"$ref": "#/$defs/Nothing"}

        def handler(v: dict[str, str] = default) -> None: ...

        assert process(handler).inputs_schema["properties"]["v"]["default"] == default

    def test_have_no_bounds_that_are_no_numbers(self) -> None:
        hint = Annotated[dt.date, Field(ge=dt.date(2020, 1, 1))]
        assert schema_of(hint) == {"type": "string", "format": "date"}
        assert pointers(taking(hint), {"v": "2019-01-01"}) == ["/inputs/v"]
        inside = {key: {"minimum": "2020-01-01", "maximum": 5} for key in ("not", "contains")}
        by_hand: dict[str, Any] = {
            "minimum": "2020-01-01",
            "maximum": 5,
            **inside,
            "allOf": [{"minimum": "1"}],
        }
        schema = schema_of(Annotated[dt.date, Field(json_schema_extra=by_hand)])
        assert "minimum" not in schema
        assert schema["maximum"] == 5
        assert schema["not"] == schema["contains"] == {"maximum": 5}
        assert schema["allOf"] == [{}]

    def test_that_are_true_or_false(self) -> None:
        by_hand = {
            "type": "object",
            "properties": {"a": True, "b": {"const": 1}},
            "additionalProperties": False,
        }
        one = taking(Annotated[dict[str, Any], pydantic.WithJsonSchema(by_hand)])
        assert one.read({"v": {"a": "x", "b": 1}}) == {"a": "x", "b": 1}
        assert pointers(one, {"v": {"a": "x", "b": 2}}) == ["/inputs/v/b"]
        any_of: dict[str, Any] = {"anyOf": [True, {"type": ["integer", "null"], "const": 1}]}
        assert taking(Annotated[Any, pydantic.WithJsonSchema(any_of)]).read({"v": 2}) == 2

    def test_without_remarks_on_defaults_that_are_no_json(self) -> None:
        class Odd(BaseModel):
            odd: int | Callable[[int], int] = len  # type: ignore[assignment]
            model_config = ConfigDict(arbitrary_types_allowed=True)

        schema = taking(Odd).inputs_schema["properties"]["odd"]
        assert "integer" in json.dumps(schema)
        assert "default" not in schema

    def test_say_what_a_decimal_is(self) -> None:
        (pattern,) = [
            choice["pattern"] for choice in schema_of(decimal.Decimal)["anyOf"] if choice["type"] == "string"
        ]
        for text in ("1", "-1.5", "+.5", "5.", "1e10", "1.5E-3", "1e1000"):
            assert re.search(pattern, text)
            assert isinstance(taking(decimal.Decimal).read({"v": text}), decimal.Decimal)
        for text in ("", "x", ".", "1e", "1_0", " 1", "NaN", "1,5"):
            assert not re.search(pattern, text)
        assert giving(decimal.Decimal).outputs["result"]["type"] == "string"

    def test_say_what_a_set_is(self) -> None:
        assert "uniqueItems" not in schema_of(set[int])
        assert "uniqueItems" not in schema_of(frozenset[int])
        assert schema_of(Annotated[set[int], Field(min_length=2)])["uniqueItems"] is True
        assert giving(set[int]).outputs["result"]["uniqueItems"] is True

    def test_say_what_keys_there_are(self) -> None:
        assert re.search(schema_of(dict[int, int])["propertyNames"]["pattern"], "-12")
        long, too_long = "1" * 4000, "1" * 4301  # Python reads 4300 digits
        assert taking(dict[int, int]).read({"v": {long: 1}}) == {int(long): 1}
        assert re.search(schema_of(dict[int, int])["propertyNames"]["pattern"], long)
        assert not re.search(schema_of(dict[int, int])["propertyNames"]["pattern"], too_long)
        assert "propertyNames" not in schema_of(dict[str, int])
        assert "propertyNames" not in schema_of(dict)

    def test_of_outputs_are_of_what_is_written(self) -> None:
        class Out(BaseModel):
            day: dt.date = Field(serialization_alias="on", default=dt.date(2020, 1, 2))

            @computed_field
            def year(self) -> int:
                return self.day.year

        one = giving(Out)
        assert list(one.outputs) == ["on", "year"]
        assert one.write(Out()) == {"on": "2020-01-02", "year": 2020}


class TestWrite:
    @pytest.mark.parametrize(
        ("hint", "value", "written"),
        [
            (int, 5, 5),
            (dt.date, dt.date(2020, 1, 2), "2020-01-02"),
            (decimal.Decimal, decimal.Decimal("1.10"), "1.10"),
            (float, math.nan, None),
            (list[float], [1.5, math.inf, -math.inf], [1.5, None, None]),
            (Any, {"a": (math.nan, {1}, b"x", Color.RED)}, {"a": [None, [1], "x", "red"]}),
            (list[Trip], [Trip("Rome")], [{"city": "Rome", "days": 3, "tags": []}]),
            (Iterable[int], iter([1, 2]), [1, 2]),
            (dict[int, str], {1: "a"}, {"1": "a"}),
            (int, "not what it said", "not what it said"),
            (dt.date, {"a": 1}, {"a": 1}),
            (Any, 10**400, 10**400),
        ],
    )
    def test_one_output(self, hint: Any, value: Any, written: Any) -> None:
        assert giving(hint).write(value) == {"result": written}

    @pytest.mark.parametrize(
        ("hint", "value", "written"),
        [
            (Trip, Trip("Rome", 1), {"city": "Rome", "days": 1, "tags": []}),
            (Trip, {"city": "Rome", "more": 1}, {"city": "Rome"}),
            (Line, {"sku": "a", "price": math.nan}, {"sku": "a", "price": None}),
            (
                Aliased,
                Aliased.model_validate({"from": dt.date(2020, 1, 2)}),
                {"from": "2020-01-02", "end": None},
            ),
        ],
    )
    def test_several_outputs(self, hint: Any, value: Any, written: Any) -> None:
        assert giving(hint).write(value) == written

    @pytest.mark.parametrize("value", [object(), b"\xff", "\ud800", {"a": [object()]}])
    def test_there_is_no_json_for_it(self, value: Any) -> None:
        with pytest.raises(PydanticSerializationError):
            giving(Any).write(value)

    @pytest.mark.parametrize("value", [5, None, [1]])
    def test_it_has_not_these_outputs(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"gave a \w+, which has not the outputs 'city', 'days', 'tags'"):
            giving(Trip).write(value)

    def test_what_pydantic_writes_and_does_not_read(self) -> None:
        class Raw(BaseModel):
            model_config = ConfigDict(ser_json_inf_nan="constants")
            n: float

        assert giving(list[Raw]).write([Raw(n=math.nan), Raw(n=1)]) == {"result": [{"n": None}, {"n": 1.0}]}
        deep: Any = 1
        for _ in range(230):
            deep = [deep]
        assert giving(Any).write(deep) == {"result": deep}


class TestDescription:
    def test_stands_above_the_hints(self) -> None:
        one = process(
            price,
            {
                "title": "Prices",
                "description": "What it costs.",
                "version": "2.1",
                "keywords": ["money"],
                "metadata": [{"title": "m"}],
                "id": "p",
                "jobControlOptions": ["sync-execute"],
                "outputTransmission": ["reference"],
                "links": [],
                "inputs": {
                    "day": {"title": "The day", "schema": {"type": "string"}, "maxOccurs": "unbounded"}
                },
                "outputs": {"city": {"description": "where"}},
            },
        )
        described = one.description()
        assert (one.title, one.version) == ("Prices", "2.1")
        assert one.summary() == {
            "id": "p",
            "version": "2.1",
            "title": "Prices",
            "description": "What it costs.",
            "keywords": ["money"],
            "metadata": [{"title": "m"}],
            "jobControlOptions": ["sync-execute", "async-execute", "dismiss"],
            "outputTransmission": ["value"],
        }
        assert described["inputs"]["day"] == {
            "title": "The day",
            "schema": {"type": "string"},
            "minOccurs": 0,
            "maxOccurs": "unbounded",
        }
        assert described["outputs"]["city"]["description"] == "where"
        assert described["outputs"]["city"]["schema"]["type"] == "string"
        assert one.inputs_schema["properties"]["day"] == {"type": "string"}

    def test_may_say_all_that_ogc_has_of_one(self) -> None:
        said = {
            "keywords": ("a",),
            "metadata": [],
            "additionalParameters": {"parameters": []},
            "maxOccurs": 1,
        }
        described = process(count, {"inputs": {"n": said}}).description()["inputs"]["n"]
        assert described == {**described, **said}

    def test_of_inputs_where_there_are_none(self) -> None:
        hint = cast(Any, pydantic.create_model)("Nothing")
        with pytest.raises(ValueError, match="by the hints there are: none"):
            process(taking(hint).pipeline, {"inputs": {"n": {}}})

    def test_only_describes(self) -> None:
        one = process(count, {"inputs": {"n": {"schema": {"type": "string"}, "minOccurs": 0}}})
        assert one.inputs_schema["properties"] == {"n": {"type": "string"}}
        assert "required" not in one.inputs_schema
        assert one.read({"n": 5}) == 5
        assert pointers(one, {"n": "5"}) == pointers(one, {}) == ["/inputs/n"]

    def test_names_inputs_where_the_hints_say_nothing(self) -> None:
        described = {
            "inputs": {"city": {"schema": {"type": "string"}}, "days": {"minOccurs": 0}},
            "outputs": {"cost": {"schema": {"type": "number"}}},
        }
        one = process(lambda v: v, described)
        assert one.inputs_schema["required"] == ["city"]
        assert one.inputs_schema["properties"]["city"] == {"type": "string"}
        assert one.read({"city": "Rome"}) == {"city": "Rome"}
        assert pointers(one, {"days": 1, "more": 2}) == ["/inputs/more", "/inputs/city"]
        assert one.write({"cost": math.nan, "more": 1}) == {"cost": None}
        assert one.outputs == {"cost": {"type": "number"}}

    def test_describes_the_one_input_and_output_where_the_hints_say_nothing(self) -> None:
        one = process(lambda v: v, {"inputs": {"v": {"title": "V"}}, "outputs": {"result": {"title": "R"}}})
        assert one.read({"v": 1}) == 1
        assert one.write(1) == {"result": 1}
        assert one.description()["inputs"]["v"]["title"] == "V"
        assert process(lambda v: v, {"inputs": {}}).read({"v": 1}) == 1

    @pytest.mark.parametrize(
        ("description", "words"),
        [
            ({"inputs": {"m": {}}}, "has an input 'm'; by the hints there are: 'n'"),
            ({"outputs": {"m": {}}}, "has an output 'm'; by the hints there are: 'result'"),
            ({"input": {}}, "the description has no entry 'input'; there are title, description"),
            ({"inputs": {"n": {"type": "x"}}}, "the description of 'n' has no entry 'type'"),
            ({"id": "q"}, "is of another one: 'q'"),
            (
                {"inputs": {"n": {"minOccurs": -1}}},
                "minOccurs in the description of 'n' must be a number from 0",
            ),
            ({"inputs": {"n": {"minOccurs": True}}}, "minOccurs"),
            (
                {"inputs": {"n": {"maxOccurs": 0}}},
                "maxOccurs in the description of 'n' must be a number from 1",
            ),
            ({"inputs": {"n": {"maxOccurs": "many"}}}, "maxOccurs"),
            ({"inputs": {"n": {"maxOccurs": True}}}, "maxOccurs"),
        ],
    )
    def test_of_something_that_is_not_there(self, description: Any, words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            process(count, description)
        assert str(caught.value).startswith("process 'p': ")

    @pytest.mark.parametrize(
        ("description", "words"),
        [
            ([], "the description must be a mapping, not []"),
            ({"inputs": []}, "the description's 'inputs' must be a mapping"),
            ({"outputs": {"result": 5}}, "the description of 'result' must be a mapping, not 5"),
            ({"version": 1.0}, "'version' in the description must be a str, not 1.0; put it in quotes"),
            ({"keywords": "a"}, "'keywords' in the description must be a list, not 'a'"),
            ({"inputs": {"n": {"title": 5}}}, "'title' in the description of 'n' must be a str"),
            ({"inputs": {"n": {"schema": []}}}, "the 'schema' in the description of 'n' must be a mapping"),
        ],
    )
    def test_of_a_wrong_shape(self, description: Any, words: str) -> None:
        with pytest.raises(TypeError, match=re.escape(words)):
            process(count, description)


class TestReadDescriptions:
    WRITTEN: typing.ClassVar = {"count": {"title": "Counting", "inputs": {"n": {"minOccurs": 1}}}}

    def test_of_a_mapping(self) -> None:
        assert read_descriptions(None) == {}
        assert read_descriptions(self.WRITTEN) == self.WRITTEN

    def test_of_json(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps(self.WRITTEN))
        assert read_descriptions(tmp_path / "a.json") == self.WRITTEN
        assert read_descriptions(str(tmp_path / "a.json")) == self.WRITTEN

    @pytest.mark.parametrize("name", ["a.yaml", "a.YML"])
    def test_of_yaml(self, tmp_path: pathlib.Path, name: str) -> None:
        text = "count:\n  title: Zählen\n  inputs:\n    n: {schema: {default: 2020-01-02}}\n"
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_descriptions(tmp_path / name) == {
            "count": {"title": "Zählen", "inputs": {"n": {"schema": {"default": "2020-01-02"}}}}
        }

    def test_of_yaml_without_pyyaml(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.yaml").write_text("{}")
        monkeypatch.setitem(sys.modules, "yaml", None)
        with pytest.raises(ImportError, match=r"installing async-pipeline\[fastapi\]"):
            read_descriptions(tmp_path / "a.yaml")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.json", b"{"),
            ("a.yaml", b"a: [1"),
            ("a.yaml", b"a: !!python/name:os.system"),
            ("a.yaml", b"a: !!python/object/apply:builtins.dict []"),
            ("a.json", b"\xff"),
        ],
    )
    def test_of_what_is_not_what_its_name_says(self, tmp_path: pathlib.Path, name: str, text: bytes) -> None:
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=rf"the file '.*{name}' can't be read: "):
            read_descriptions(tmp_path / name)

    def test_of_another_type(self) -> None:
        with pytest.raises(ValueError, match=r"from \.yaml, \.yml and \.json, not from 'a\.toml'"):
            read_descriptions("a.toml")
        with pytest.raises(TypeError, match="must be a mapping or the path of a file, not 5"):
            read_descriptions(5)  # type: ignore[arg-type]

    def test_of_a_file_that_is_not_there(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
            read_descriptions(tmp_path / "nothing.json")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "must be a mapping, not None"),
            ("[]", r"what the file '.*' has must be a mapping, not \[\]"),
            ("a: 1", "the description of 'a' in the file '.*' must be a mapping, not 1"),
        ],
    )
    def test_of_a_wrong_shape(self, tmp_path: pathlib.Path, text: str, words: str) -> None:
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(TypeError, match=words):
            read_descriptions(tmp_path / "a.yaml")

    def test_of_a_wrong_mapping(self) -> None:
        with pytest.raises(TypeError, match="the id 5 in the descriptions must be a str"):
            read_descriptions({5: {}})  # type: ignore[dict-item]


# -- what the schema allows is read, and what it forbids is refused


NUMBERS = st.integers(-3, 12) | st.integers() | st.floats(-1e15, 1e15)
WORDS = st.sampled_from(
    ["2020-01-01", "0", "1.5", "true", "a", "x", "2020-01-01T00:00:00Z", "P1D", "1.2.3.4"]
)
SINGLE = st.none() | st.booleans() | NUMBERS | st.text(st.characters(codec="utf-8"), max_size=4) | WORDS


def nested(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["a", "b", "kind", "1", "n"])
    return SINGLE | st.lists(inside, max_size=3) | st.dictionaries(keys, inside, max_size=3)


ANYTHING = nested(nested(SINGLE))
FORMATS: dict[str, st.SearchStrategy[Any]] = {
    "date": st.dates().map(str),
    "date-time": st.datetimes(timezones=st.just(dt.UTC)).map(dt.datetime.isoformat),
    "time": st.times().map(lambda time: f"{time.isoformat()}Z"),
    "duration": st.sampled_from(["P1D", "PT1S", "P1Y2M", "P3W", "PT1H2M3S"]),
    "uuid": st.uuids().map(str),
    "ipv4": st.ip_addresses(v=4).map(str),
    "ipv6": st.ip_addresses(v=6).map(str),
}


def values_of(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema allows, as far as it goes: those of a few keywords are left to the validator."""
    if "anyOf" in schema:
        return st.one_of([values_of(one) for one in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    making: dict[str, Callable[[Any], st.SearchStrategy[Any]]] = {
        "null": lambda schema: st.none(),
        "boolean": lambda schema: st.booleans(),
        "integer": _integers,
        "number": lambda schema: _integers(schema) | st.floats(0.1, 0.9),
        "string": _texts,
        "array": _arrays,
        "object": _objects,
    }
    kind = schema.get("type")
    return making[kind](schema) if kind in making else ANYTHING


def _integers(schema: Any) -> st.SearchStrategy[Any]:
    numbers = st.integers(schema.get("minimum"), schema.get("maximum"))
    numbers = numbers.map(lambda number: number * schema.get("multipleOf", 1))
    return numbers.flatmap(lambda n: st.sampled_from([n, float(n)] if abs(n) < 2**53 else [n]))


def _texts(schema: Any) -> st.SearchStrategy[Any]:
    if schema.get("format") in FORMATS:
        return FORMATS[schema["format"]]
    if "pattern" in schema:
        return st.from_regex(schema["pattern"].replace("$", r"\Z"), alphabet=st.characters(codec="ascii"))
    least = schema.get("minLength", 0)
    return st.text(st.characters(codec="utf-8"), min_size=least, max_size=schema.get("maxLength", least + 5))


def _arrays(schema: Any) -> st.SearchStrategy[Any]:
    if "prefixItems" in schema:
        return st.tuples(*map(values_of, schema["prefixItems"])).map(list)
    least = schema.get("minItems", 0)
    most = schema.get("maxItems", least + 3)
    return st.lists(values_of(schema.get("items", {})), min_size=least, max_size=most)


def _objects(schema: Any) -> st.SearchStrategy[Any]:
    known = {name: values_of(one) for name, one in schema.get("properties", {}).items()}
    required = set(schema.get("required", ()))
    named = st.fixed_dictionaries(
        {name: one for name, one in known.items() if name in required},
        optional={name: one for name, one in known.items() if name not in required},
    )
    others = schema.get("additionalProperties", True)
    if others is False:
        return named
    keys = _texts(schema.get("propertyNames", {"maxLength": 3}))
    more = st.dictionaries(keys, ANYTHING if others is True else values_of(others), max_size=2)
    return st.builds(lambda more, named: {**more, **named}, more, named)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


@st.composite
def nearly(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Any:
    """Such a value with something else at one place in it, or nothing."""
    value = json.loads(json.dumps(draw(values)))
    *way, last = draw(st.sampled_from([*places(value)][1:] or [("v",)]))
    holder = value
    for key in way:
        holder = holder[key]
    if isinstance(holder, dict) and last in holder and draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = draw(ANYTHING)
    return value


HINTS: list[Any] = [
    *(int, float, bool, str, bytes, None, Any, object, list, dict, tuple),
    *(Literal[1, 2], Literal["a", 1], Literal[True, "x"], Literal["a"], Color),
    *(decimal.Decimal, dt.datetime, dt.date, dt.time, dt.timedelta, uuid.UUID),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address, pathlib.Path),
    *(set[int], frozenset[str], tuple[int, str], tuple[int, ...], dict[int, int], dict[str, int]),
    *(Optional[int], int | str, int | float, int | bool, Literal[1] | bool, dt.datetime | int | None),  # noqa: UP045
    Annotated[int, Field(ge=1, le=10)],
    Annotated[int, Field(multiple_of=5)],
    Annotated[float, Field(gt=0, lt=1)],
    Annotated[str, Field(min_length=2, max_length=3)],
    Annotated[str, Field(pattern="^[a-c]+$")],
    Annotated[list[int], Field(min_length=1, max_length=2)],
    *(Sequence[int], Mapping[str, float], Iterable[dt.date]),
    *(Order, Line, Trip, Cat, Dog, Cat | Dog, Annotated[Cat | Dog, Field(discriminator="kind")]),
    *(list[Cat | int], dict[str, list[Line]], Optional[Line], list[dt.date | None], Box[int]),  # noqa: UP045
]


@pytest.mark.parametrize("hint", HINTS, ids=repr)
def test_what_the_schema_allows_is_read_and_what_it_forbids_is_refused(hint: Any) -> None:
    one = taking(hint)
    validator = jsonschema_rs.Draft202012Validator(dict(one.inputs_schema), validate_formats=True)
    values = values_of(one.inputs_schema)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(values | nearly(values))
    def check(inputs: Any) -> None:
        try:
            one.read(inputs)
        except BadInputs as error:
            assert not validator.is_valid(inputs), error
            for pointer, detail in error.faults:
                assert pointer.startswith("/inputs")
                assert detail
        else:
            assert validator.is_valid(inputs)

    check()


@settings(max_examples=200, deadline=None)
@given(ANYTHING)
def test_whatever_is_sent_is_read_or_refused(inputs: Any) -> None:
    for one in (process(price), taking(Cat | Dog | int), taking(Tree), taking(Aliased)):
        try:
            one.read(inputs)
        except BadInputs as error:
            assert error.faults


@settings(max_examples=200, deadline=None)
@given(ANYTHING)
def test_json_comes_through_as_it_is(value: Any) -> None:
    one = taking(Any)
    assert one.read({"v": value}) == value
    assert one.write(value) == {"result": value}


class Kitten(BaseModel):
    kind: Literal["kitten"]
    born: dt.date


class Puppy(BaseModel):
    kind: Literal["puppy"]


class Bird(BaseModel):
    wings: int


@pytest.mark.parametrize("hint", [Kitten | Puppy, Puppy | Kitten, Kitten | Bird, Bird | Kitten])
def test_an_alternative_that_does_not_fit_at_all_excuses_nothing(hint: Any) -> None:
    def tell(pet: Any) -> str:
        return str(pet)

    tell.__annotations__["pet"] = hint
    process = Process("tell", Stage("tell", tell))
    assert process.read({"pet": {"kind": "kitten", "born": "2020-01-01"}}).born == dt.date(2020, 1, 1)
    with pytest.raises(BadInputs) as caught:
        process.read({"pet": {"kind": "kitten", "born": "1577836800"}})
    assert [fault.pointer for fault in caught.value.faults] == ["/inputs/pet/born"]
