"""Who is given the context, and how a context is copied, read and written."""

import collections
import copy
import enum
import functools
import json
import math
import operator
import sys
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, MagicMock, Mock, create_autospec

import pytest

from async_pipeline import Stage
from async_pipeline.context import copier, get_entry, set_entry, wants_context

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found]


def one(value: Any) -> Any:
    return "one", value


def two(value: Any, context: Any) -> Any:
    return "two", value


async def async_one(value: Any) -> Any:
    return "one", value


async def async_two(value: Any, context: Any) -> Any:
    return "two", value


def three(value: Any, context: Any, more: Any) -> Any: ...


def passing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def narrowing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose wrapper has a signature of its own."""

    @functools.wraps(function)
    def wrapper(value: Any) -> Any:
        return function(value, {})

    return wrapper


def annotated_with_nothing(value: "Nothing", context: "Nothing") -> "Nothing":
    return "two", value


class Methods:
    def one(self, value: Any) -> Any:
        return "one", value

    def two(self, value: Any, context: Any) -> Any:
        return "two", value

    @classmethod
    def class_two(cls, value: Any, context: Any) -> Any:
        return "two", value

    @staticmethod
    def static_one(value: Any) -> Any:
        return "one", value

    @passing
    def wrapped_one(self, value: Any) -> Any:
        return "one", value

    @passing
    def wrapped_two(self, value: Any, context: Any) -> Any:
        return "two", value

    @functools.lru_cache  # noqa: B019
    def cached_one(self, value: Any) -> Any:
        return "one", value

    def plus(self, more: Any, value: Any) -> Any:
        return "one", value

    partial_one = functools.partialmethod(plus, 1)
    partial_wrapped = functools.partialmethod(passing(plus), 1)


class CallableOne:
    def __call__(self, value: Any) -> Any:
        return "one", value


class CallableTwo:
    def __call__(self, value: Any, context: Any) -> Any:
        return "two", value


class CallableWrapped:
    @passing
    def __call__(self, value: Any) -> Any:
        return "one", value


class CallableStatic:
    __call__ = staticmethod(one)


class Box:
    """A class whose construction would take a second argument."""

    def __init__(self, value: Any, context: Any = None) -> None:
        self.value, self.context = value, context


def label(handler: Any) -> str:
    return str(getattr(handler, "__qualname__", type(handler).__name__))


class Calling(type):
    def __call__(cls, value: Any, context: Any) -> Any:
        return value


class Called(metaclass=Calling):
    pass


class Color(enum.Enum):
    RED = "red"


def wants(handler: Callable[..., Any]) -> bool:
    return wants_context(handler, "handler(value)")


class TestHandlersThatGetTheValueOnly:
    @pytest.mark.parametrize(
        "handler",
        [
            one,
            async_one,
            lambda value: value,
            lambda value, /: value,
            lambda value=1: value,
            lambda value, factor=2: value,
            lambda value, factor=2, context=None: value,
            lambda value, *, context=None: value,
            lambda value, **options: value,
            lambda context: context,
            Methods().one,
            Methods.static_one,
            Methods().static_one,
            CallableOne(),
            CallableStatic(),
        ],
        ids=label,
    )
    def test_python_functions(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is False

    @pytest.mark.parametrize(
        "handler",
        [
            round,
            len,
            abs,
            print,
            sorted,
            math.sqrt,
            str.split,
            str.upper,
            "-".join,
            [].append,
            operator.itemgetter(0),
            operator.methodcaller("upper"),
            dict.fromkeys,
            types.MethodType(print, 1),
        ],
        ids=label,
    )
    def test_what_is_written_in_c(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is False

    @pytest.mark.parametrize(
        "handler", [int, str, uuid.UUID, Box, dict, type, Exception, Color, Called], ids=label
    )
    def test_classes(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is False

    @pytest.mark.parametrize("handler", [int, round, Box, operator.itemgetter(0), len], ids=label)
    def test_partials_of_classes_and_of_c(self, handler: Callable[..., Any]) -> None:
        assert wants(functools.partial(handler)) is False

    def test_partials(self) -> None:
        assert wants(functools.partial(one)) is False
        assert wants(functools.partial(two, 1)) is False
        assert wants(functools.partial(two, context={})) is False
        assert wants(functools.partial(functools.partial(three, 1), 2)) is False

    def test_methods_that_are_partial(self) -> None:
        assert wants(Methods().partial_one) is False

    @pytest.mark.parametrize("handler", [int, Box, round, operator.itemgetter(0)], ids=label)
    def test_wrappers_of_classes_and_of_c(self, handler: Callable[..., Any]) -> None:
        assert wants(passing(handler)) is False

    @pytest.mark.parametrize(
        "handler",
        [
            passing(one),
            passing(passing(one)),
            passing(async_one),
            narrowing(two),
            passing(narrowing(two)),
            functools.lru_cache(one),
            functools.cache(passing(one)),
            passing(functools.cache(one)),
            functools.cache(int),
            functools.singledispatch(one),
            Methods().wrapped_one,
        ],
        ids=label,
    )
    def test_wrappers(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is False


class TestHandlersThatGetTheContext:
    @pytest.mark.parametrize(
        "handler",
        [
            two,
            async_two,
            lambda value, anything: value,
            lambda value, /, anything: value,
            lambda value, context=None: value,
            lambda value, ctx=None: value,
            lambda value, context, more=1: value,
            lambda *args: args,
            lambda value, *rest: value,
            lambda value, *args, **options: value,
            Methods().two,
            Methods.class_two,
            Methods().class_two,
            CallableTwo(),
            functools.partial(two),
            functools.partial(three, 1),
            functools.partial(three, more=1),
            functools.partial(functools.partial(three), 1),
        ],
        ids=label,
    )
    def test_python_functions(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is True

    @pytest.mark.parametrize(
        "handler",
        [
            passing(two),
            passing(passing(two)),
            passing(async_two),
            functools.cache(two),
            functools.lru_cache(passing(two)),
            passing(functools.cache(two)),
            functools.singledispatch(two),
            functools.partial(passing(two)),
            Methods().wrapped_two,
        ],
        ids=label,
    )
    def test_wrappers(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is True

    @pytest.mark.parametrize(
        "handler", [Mock(), MagicMock(), AsyncMock()], ids=["Mock", "MagicMock", "AsyncMock"]
    )
    def test_mocks_take_anything(self, handler: Callable[..., Any]) -> None:
        assert wants(handler) is True

    def test_an_autospec_is_like_its_function(self) -> None:
        assert wants(create_autospec(one)) is False
        assert wants(create_autospec(two)) is True
        assert wants(create_autospec(async_two)) is True


class TestBoundAndPartialWrappers:
    """A wrapper is looked through wherever it stands: in a partial, a method, a ``__call__``."""

    def test_a_partial_of_a_wrapper(self) -> None:
        assert wants(functools.partial(passing(one))) is False
        assert wants(functools.partial(passing(two), 1)) is False

    def test_an_object_whose_call_is_wrapped(self) -> None:
        assert wants(CallableWrapped()) is False
        assert wants(passing(CallableWrapped())) is False

    def test_a_method_with_a_cache(self) -> None:
        assert wants(Methods().cached_one) is False

    def test_a_partial_method_of_a_wrapper(self) -> None:
        assert wants(Methods().partial_wrapped) is False


class TestAnnotationsAreNotEvaluated:
    def test_strings_that_name_nothing(self) -> None:
        assert wants(annotated_with_nothing) is True
        assert wants(functools.partial(annotated_with_nothing, 1)) is False

    def test_nor_a_signature_on_a_bound_method_or_object(self) -> None:
        class Annotated:
            def method(self, value: "Nothing") -> "Nothing":
                return value

            def __call__(self, value: "Nothing", context: "Nothing") -> "Nothing":
                return value

        assert wants(Annotated().method) is False
        assert wants(Annotated()) is True

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="older Pythons evaluate annotations at once")
    def test_nor_lazy_ones(self) -> None:
        names: dict[str, Any] = {"functools": functools}
        exec(
            "def one(value: Nothing[int] | None) -> Nothing: ...\n"
            "def two(value: Nothing, context: 'Nothing' | None) -> 1 / 0: ...\n"
            "class Annotated:\n"
            "    def __call__(self, value: 'Nothing' | None) -> Nothing: ...\n",
            names,
        )
        assert wants(names["one"]) is False
        assert wants(names["two"]) is True
        assert wants(functools.partial(names["two"], 1)) is False
        assert wants(names["Annotated"]()) is False
        assert wants(passing(names["two"])) is True
        assert Stage("lazy", names["one"]).name == "lazy"


class TestNeitherForm:
    @pytest.mark.parametrize(
        "handler",
        [
            lambda: None,
            three,
            lambda value, context, *, must: value,
            lambda value, *, must: value,
            lambda *, value: value,
            lambda **options: options,
            functools.partial(one, 1),
            functools.partial(one, 1, 2),  # type: ignore[call-arg]
            functools.partial(one, nothing=1),  # type: ignore[call-arg]
            passing(three),
        ],
        ids=label,
    )
    def test_is_a_type_error(self, handler: Callable[..., Any]) -> None:
        with pytest.raises(TypeError):
            wants(handler)

    def test_says_both_forms_and_its_own(self) -> None:
        with pytest.raises(TypeError) as caught:
            wants(lambda value, *, must: value)
        message = str(caught.value)
        assert "it must take handler(value) or handler(value, context), not (value, *, must)" in message
        assert "must" in message.rpartition(":")[2]

    def test_the_shape_says_how_many(self) -> None:
        def hook(name: str, value: Any, output: Any, error: Any, context: Any) -> None: ...

        assert wants_context(hook, "after_stage(stage_name, value, output, error)") is True
        with pytest.raises(TypeError, match=r"before_stage\(stage_name, value, context\)"):
            wants_context(hook, "before_stage(stage_name, value)")


class TestCopier:
    def test_none_gives_new_dicts(self) -> None:
        make = copier(None)
        first, second = make(), make()
        assert first == second == {}
        assert first is not second

    @pytest.mark.parametrize(
        "context",
        [
            {"a": [1]},
            {},
            collections.OrderedDict(a=[1]),
            collections.ChainMap({"a": [1]}),
            collections.deque([[1]]),
            [[1]],
            {1},
        ],
        ids=lambda context: type(context).__name__,
    )
    def test_containers_are_copied_shallowly(self, context: Any) -> None:
        twin = copier(context)()
        assert twin == context
        assert twin is not context
        for mine, its in zip(context, twin, strict=True):
            assert mine is its

    def test_a_defaultdict_stays_one(self) -> None:
        context = collections.defaultdict(list, a=[1])
        twin = copier(context)()
        assert type(twin) is collections.defaultdict
        assert twin["new"] == []
        assert "new" not in context

    def test_each_call_makes_another(self) -> None:
        make = copier({"a": 1})
        assert make() is not make()

    def test_an_objects_own_copy_comes_first(self) -> None:
        class Own:
            def copy(self) -> str:
                return "its own"

            def __copy__(self) -> str:
                return "not this one"

        assert copier(Own())() == "its own"

    def test_a_dict_that_has_its_own_copy(self) -> None:
        class Session(dict[str, Any]):
            def copy(self) -> "Session":
                return Session(self, copied=True)

        assert copier(Session(a=1))() == {"a": 1, "copied": True}

    def test_a_copy_that_wants_arguments_is_left_alone(self) -> None:
        class Picture:
            size = 1

            def copy(self, rectangle: Any) -> Any:
                return rectangle

        context = Picture()
        context.size = 2
        twin = copier(context)()
        assert type(twin) is Picture
        assert twin is not context
        assert twin.size == 2

    def test_an_error_of_its_own_copy_is_not_hidden(self) -> None:
        class Broken:
            def copy(self) -> Any:
                raise LookupError("broken")

        with pytest.raises(LookupError):
            copier(Broken())()

    def test_a_copy_that_is_no_method(self) -> None:
        context = types.SimpleNamespace(copy=3)
        twin = copier(context)()
        assert twin == context
        assert twin is not context

    def test_dataclasses_and_plain_objects(self) -> None:
        @dataclass
        class Request:
            number: int
            tags: list[str] = field(default_factory=list)

        context = Request(1)
        twin = copier(context)()
        twin.number = 2
        assert context.number == 1
        assert twin.tags is context.tags

    def test_objects_with_slots(self) -> None:
        class Counter:
            __slots__ = ("count",)
            count: int

        context = Counter()
        context.count = 1
        twin = copier(context)()
        twin.count += 1
        assert (context.count, twin.count) == (1, 2)

    def test_objects_that_are_copied_to_themselves(self) -> None:
        assert copier("text")() == "text"
        assert copier(dict)() is dict

    def test_what_can_not_be_copied_says_so(self) -> None:
        with pytest.raises(TypeError):
            copier(iterator())()
        with pytest.raises(copy.Error):
            copier(Uncopyable())()


class Uncopyable:
    def __copy__(self) -> Any:
        raise copy.Error


def iterator() -> Iterator[int]:
    yield 1


class ReadOnly(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        return {"a": 1}[key]

    def __iter__(self) -> Iterator[str]:
        return iter("a")

    def __len__(self) -> int:
        return 1


class Own(MutableMapping[str, Any]):
    """A mapping that keeps its entries apart from its attributes."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class Frozen:
    a: int = 1


class Refusing:
    def __setattr__(self, attribute: str, value: object) -> None:
        raise RuntimeError("no")


class Slotted:
    __slots__ = ("a",)


class TestEntries:
    @pytest.mark.parametrize(
        "context",
        [{"a": 1}, ReadOnly(), types.MappingProxyType({"a": 1}), types.SimpleNamespace(a=1), Frozen()],
        ids=lambda context: type(context).__name__,
    )
    def test_get_from_a_mapping_or_an_object(self, context: Any) -> None:
        assert get_entry(context, "a") == 1
        assert get_entry(context, "b") is None
        assert get_entry(context, "b", 2) == 2

    def test_a_mappings_attributes_are_no_entries(self) -> None:
        assert get_entry({}, "keys") is None
        assert get_entry(Own(), "entries") is None

    @pytest.mark.parametrize("context", [{}, Own(), collections.ChainMap({})], ids=lambda c: type(c).__name__)
    def test_set_in_a_mapping(self, context: Any) -> None:
        assert set_entry(context, "b", 2) is True
        assert context["b"] == 2
        assert not hasattr(context, "b")

    def test_set_on_an_object(self) -> None:
        context = types.SimpleNamespace()
        assert set_entry(context, "b", 2) is True
        assert context.b == 2

    @pytest.mark.parametrize(
        "context",
        [Frozen(), Refusing(), Slotted(), object(), 1, "text", None, types.MappingProxyType({})],
        ids=lambda context: type(context).__name__,
    )
    def test_an_object_may_refuse(self, context: Any) -> None:
        assert set_entry(context, "b", 2) is False
        assert get_entry(context, "b") is None

    def test_what_was_set_is_read_back(self) -> None:
        contexts: list[Any] = [{}, Own(), types.SimpleNamespace(), Methods()]
        for context in contexts:
            assert set_entry(context, "b", [2]) is True
            assert get_entry(context, "b") == [2]


@pytest.mark.parametrize(
    "handler",
    [
        one,
        two,
        async_one,
        async_two,
        Methods().one,
        Methods().two,
        Methods.class_two,
        Methods.static_one,
        Methods().wrapped_one,
        Methods().wrapped_two,
        Methods().cached_one,
        Methods().partial_one,
        Methods().partial_wrapped,
        CallableOne(),
        CallableTwo(),
        CallableWrapped(),
        CallableStatic(),
        passing(one),
        passing(two),
        passing(async_one),
        passing(async_two),
        narrowing(two),
        functools.partial(one),
        functools.partial(two),
        functools.partial(two, context=1),
        functools.partial(passing(one)),
        functools.partial(passing(two)),
        functools.cache(one),
        functools.singledispatch(two),
        annotated_with_nothing,
        create_autospec(one, side_effect=one),
        create_autospec(two, side_effect=two),
    ],
    ids=label,
)
async def test_a_stage_can_call_what_it_accepted(handler: Callable[..., Any]) -> None:
    stage: Stage[Any, Any] = Stage("any", handler)
    assert (await stage.run("value"))[1] == "value"


async def test_functions_written_in_c_run_as_stages() -> None:
    cases: list[tuple[Any, Any, Any]] = [
        (round, 2.6, 3),
        (json.loads, "[1]", [1]),
        (str.split, "a b", ["a", "b"]),
        (uuid.UUID, "0" * 32, uuid.UUID(int=0)),
        (int, "7", 7),
        (Color, "red", Color.RED),
        (passing(int), "7", 7),
        (passing(round), 2.6, 3),
        (operator.itemgetter(1), "ab", "b"),
    ]
    for handler, value, expected in cases:
        stage: Stage[Any, Any] = Stage("c", handler)
        assert await stage.run(value, context={"not": "wanted"}) == expected
