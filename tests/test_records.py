"""What travels as JSON text, and what of an error is left on the other side."""

import asyncio
import json
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_pipeline import (
    BatchError,
    CircuitOpenError,
    DeadlineExceeded,
    EngineError,
    Finish,
    JournalBusy,
    MissingFieldsError,
    Pipeline,
    RecordedError,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    WorkerLost,
    each,
    parallel,
)
from async_pipeline.records import (
    digest_of,
    dump_error,
    load_error,
    read_json,
    stage_names,
    write_canonical,
    write_json,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class TestText:
    @given(json_values)
    def test_values_come_back(self, value: Any) -> None:
        for write in (write_json, write_canonical):
            text = write(value, "it")
            assert text.isascii()
            assert read_json(text) == value
            assert "\n" not in text

    def test_it_is_compact(self) -> None:
        assert write_json({"b": [1, 2], "a": None}, "it") == '{"b":[1,2],"a":null}'

    @given(st.dictionaries(st.text(), json_values, max_size=5))
    def test_canonical_text_does_not_depend_on_the_order(self, value: dict[str, Any]) -> None:
        turned = dict(reversed(value.items()))
        assert write_canonical({"in": turned}, "it") == write_canonical({"in": value}, "it")

    def test_the_order_stays_otherwise(self) -> None:
        assert write_json({"b": 1, "a": 2}, "it") == '{"b":1,"a":2}'
        assert write_canonical({"b": 1, "a": 2}, "it") == '{"a":2,"b":1}'

    @pytest.mark.parametrize("value", [{1}, b"1", nan, inf, -inf, object(), {(1, 2): 3}, 1j, [nan]], ids=repr)
    def test_what_is_none_is_a_type_error(self, value: Any) -> None:
        for write in (write_json, write_canonical):
            with pytest.raises(TypeError, match=r"^the item is not JSON: ") as raised:
                write(value, "the item")
            assert raised.value.__cause__ is not None

    def test_so_is_what_holds_itself_or_is_too_deep(self) -> None:
        circle: list[Any] = []
        circle.append(circle)
        deep: list[Any] = []
        for _ in range(200_000):
            deep = [deep]
        for value in (circle, deep):
            with pytest.raises(TypeError, match="it is not JSON"):
                write_json(value, "it")
        while deep:  # not by recursion
            deep = deep[0]

    def test_a_digest_tells_texts_apart(self) -> None:
        assert digest_of("a") == digest_of("a")
        assert len({digest_of(text) for text in ("", "a", "b", "é")}) == 4
        assert len(digest_of("a")) == 16


def plain(value: Any) -> Any:
    return value


def test_the_names_of_stages_show_what_is_inside() -> None:
    inner = Pipeline([Stage("a", plain), Stage("b", plain)], name="inner")
    pipeline = Pipeline([plain, inner, parallel(left=plain, right=inner), each(plain)], name="outer")
    assert stage_names(pipeline) == [
        "plain",
        ["inner", "a", "b"],
        ["parallel", "left", ["right", "a", "b"]],
        ["each", "plain"],
    ]
    assert stage_names(Stage("alone", plain)) == []


# -- errors


def round_trip(error: BaseException) -> Any:
    """Return the error as it arrives, by way of JSON."""
    return load_error(json.loads(write_json(dump_error(error), "an error")))


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


class OwnError(Exception):
    """Not known on the other side."""


class OwnValueError(ValueError):
    """Nor this one: it may have another constructor."""


class Unprintable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            ValueError("wrong", 5, None, ["a"]),
            ValueError(),
            KeyError("key"),
            OSError(2, "no such file", "/path"),
            ConnectionResetError(104, "reset"),
            FileNotFoundError("text only"),
            TimeoutError(),
            asyncio.CancelledError("stray"),
            NotImplementedError(),
            StopAsyncIteration(),
            WorkerLost(),
            WorkerLost("twice"),
            EngineError("down"),
            StageTimeoutError(1.5),
            DeadlineExceeded(2),
            CircuitOpenError("fetch", 3.0),
            MissingFieldsError(["a", "b"]),
            JournalBusy("/file"),
            RecordedError("shop:NotFound", "there is none"),
        ],
        ids=repr,
    )
    def test_known_ones_are_of_their_class(self, error: BaseException) -> None:
        loaded = round_trip(error)
        assert type(loaded) is type(error)
        assert (str(loaded), repr(loaded)) == (str(error), repr(error))
        state = vars(loaded).copy()
        assert state.pop("__notes__", []) == []
        assert state == vars(error)

    def test_a_tuple_in_one_becomes_a_list(self) -> None:
        assert round_trip(ValueError((1, (2,)), 3)).args == ([1, [2]], 3)

    @pytest.mark.parametrize(
        ("error", "name", "message"),
        [
            (OwnError("own", 5), f"{__name__}:OwnError", "('own', 5)"),
            (OwnValueError("own"), f"{__name__}:OwnValueError", "own"),
            (ValueError({1}), "ValueError", "{1}"),
            (ValueError({1: 2}), "ValueError", "{1: 2}"),
            (ValueError(nan), "ValueError", "nan"),
            (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), "UnicodeDecodeError", None),
            (SystemExit(3), "SystemExit", "3"),
            (KeyboardInterrupt(), "KeyboardInterrupt", ""),
            (Finish(1), "async_pipeline.errors:Finish", None),
            (BatchError({0: ValueError()}, {}), "async_pipeline.errors:BatchError", None),
            (Unprintable(), f"{__name__}:Unprintable", "<its text can't be had: RuntimeError>"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
    )
    def test_all_others_are_text(self, error: BaseException, name: str, message: str | None) -> None:
        loaded = round_trip(error)
        assert type(loaded) is RecordedError
        assert loaded.type == name
        assert loaded.message == (str(error) if message is None else message)

    def test_one_that_can_not_be_made_again_is_text(self) -> None:
        """Written by another version of Python, or of this library."""
        assert repr(load_error({"type": "StageTimeoutError", "args": []})) == (
            "RecordedError('StageTimeoutError')"
        )
        loaded: Any = load_error({"type": "async_pipeline.errors:CircuitOpenError", "args": ["a", "b", "c"]})
        assert (type(loaded), loaded.type) == (RecordedError, "async_pipeline.errors:CircuitOpenError")
        assert loaded.message == "'a', 'b', 'c'"

    def test_nothing_is_imported_because_a_text_says_so(self) -> None:
        for name in ("os:system", "subprocess:Popen", "system", "eval", "int", "object", "BaseException"):
            loaded: Any = load_error({"type": name, "args": ["true"]})
            assert type(loaded) is RecordedError

    def test_the_traceback_is_a_note(self) -> None:
        loaded = round_trip(raised(ValueError("wrong")))
        (note,) = loaded.__notes__
        assert note.startswith("where it was raised:\n  File ")
        assert "in raised" in note
        assert not note.endswith("\n")

    def test_the_traceback_is_short(self) -> None:
        def deeper(depth: int) -> None:
            if depth:
                deeper(depth - 1)
                return
            name = "x" * 100
            raise ValueError(name)

        def also_deeper(depth: int) -> None:
            if depth % 2:
                deeper(1)
            also_deeper(depth + 1)

        try:
            also_deeper(-40)
        except ValueError as error:
            data = dump_error(error)
        assert len(data["traceback"]) <= 4000
        assert data["traceback"].rstrip().endswith("raise ValueError(name)")

    def test_notes_come_along(self) -> None:
        error = ValueError("wrong")
        error.add_note("one")
        error.__notes__.append(5)  # type: ignore[arg-type]
        assert round_trip(error).__notes__ == ["one"]
        assert round_trip(raised(error)).__notes__[1:] == ["one"]

    def test_a_stage_error_says_all(self) -> None:
        cause = raised(ValueError("wrong"))
        error = StageExecutionError("outer/inner", cause, attempts=3).of_item(5, "item")
        error.element = (1, 2)
        earlier = StageExecutionError("first", KeyError("k"))
        error.earlier = (earlier,)
        loaded = round_trip(error)
        assert type(loaded) is StageExecutionError
        assert (loaded.stage_name, loaded.attempts, loaded.element) == ("outer/inner", 3, (1, 2))
        assert str(loaded) == str(error)
        assert loaded.__cause__ is loaded.original_error
        assert repr(loaded.original_error) == "ValueError('wrong')"
        assert (loaded.item_index, loaded.item) == (None, None)  # who reads it knows the item
        assert loaded.__notes__ == ["after 3 attempts"]
        (first,) = loaded.earlier
        assert (first.stage_name, repr(first.original_error)) == ("first", "KeyError('k')")
        assert not loaded._is_joint

    def test_a_plain_stage_error_is_short(self) -> None:
        data = dump_error(StageExecutionError("stage", ValueError()))
        assert data == {
            "stage": "stage",
            "attempts": 1,
            "error": {"type": "ValueError", "traceback": "", "args": []},
        }

    def test_a_stage_error_of_ones_own_class_is_text(self) -> None:
        class AnotherError(StageExecutionError):
            pass

        assert type(round_trip(AnotherError("stage", ValueError()))) is RecordedError

    def test_a_joint_error_has_its_parts(self) -> None:
        parts = [StageExecutionError("a", ValueError(1)), StageExecutionError("b", OwnError("two"))]
        loaded = round_trip(StageExecutionError.joint("parallel", parts))
        assert loaded._is_joint
        assert loaded.original_error.message == "2 failed"
        loaded = loaded.of_item(4, "item")
        assert [
            (part.stage_name, repr(part.original_error), part.item_index, part.item)
            for part in loaded.original_error.exceptions
        ] == [
            ("a", "ValueError(1)", 4, "item"),
            ("b", f"RecordedError('{__name__}:OwnError: two')", 4, "item"),
        ]

    def test_a_group_has_its_errors(self) -> None:
        group = ExceptionGroup("several", [ValueError(1), ExceptionGroup("inner", [KeyError(2)])])
        loaded = round_trip(group)
        assert type(loaded) is ExceptionGroup
        assert loaded.message == "several"
        assert repr(loaded.exceptions[0]) == "ValueError(1)"
        assert repr(loaded.exceptions[1].exceptions) == "(KeyError(2),)"


class TestErrorsThatResist:
    def test_notes_that_are_none(self) -> None:
        class OddError(Exception):
            __notes__ = 5  # type: ignore[assignment]

        assert dump_error(OddError("odd")) == {"type": type_of(OddError), "message": "odd"}

    def test_an_attribute_that_raises(self) -> None:
        class BrokenError(Exception):
            @property
            def __notes__(self) -> list[str]:  # type: ignore[override]
                raise RuntimeError

        assert str(load_error(dump_error(BrokenError("broken")))) == f"{type_of(BrokenError)}: broken"

    def test_one_inside_many_groups_arrives_as_text(self) -> None:
        error: Exception = ValueError("inside")
        for _ in range(900):
            error = ExceptionGroup("group", [error])
        loaded, depth = load_error(json.loads(json.dumps(dump_error(error)))), 0
        while isinstance(loaded, ExceptionGroup):
            loaded, depth = loaded.exceptions[0], depth + 1
        assert depth == 50
        assert isinstance(loaded, RecordedError)


def type_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
