"""Outcome: a value or an error."""

import copy
import pickle
from typing import Any, get_args

import pytest

from async_pipeline import Outcome, StageExecutionError


def failed(error: Exception) -> Outcome[Any]:
    return Outcome(3, "item", error=error)


def test_a_value() -> None:
    outcome = Outcome(3, "item", "value", None, {"a": 1}, 2.5)
    assert outcome.ok is True
    assert outcome.unwrap() == "value"
    assert (outcome.index, outcome.item, outcome.context, outcome.duration) == (3, "item", {"a": 1}, 2.5)


def test_an_error() -> None:
    error = LookupError()
    outcome = failed(error)
    assert outcome.ok is False
    assert outcome.value is None
    for _ in range(2):
        with pytest.raises(LookupError) as caught:
            outcome.unwrap()
        assert caught.value is error


@pytest.mark.parametrize("value", [None, 0, "", False, ValueError("as a value")])
def test_every_value_is_a_success(value: object) -> None:
    outcome = Outcome(0, "item", value)
    assert outcome.ok is True
    assert outcome.unwrap() is value


def test_an_error_that_counts_as_false_is_an_error() -> None:
    class EmptyError(Exception):
        def __bool__(self) -> bool:
            return False

    outcome = failed(EmptyError())
    assert outcome.ok is False
    with pytest.raises(EmptyError):
        outcome.unwrap()


def test_the_defaults() -> None:
    outcome: Outcome[None] = Outcome(None, "item")
    assert (outcome.value, outcome.error, outcome.context, outcome.duration) == (None, None, None, 0.0)


def test_is_immutable() -> None:
    outcome = Outcome(0, "item", "value")
    with pytest.raises(AttributeError):
        outcome.value = "other"  # type: ignore[misc]
    # a frozen class with slots refuses new attributes by TypeError on some Pythons
    with pytest.raises((AttributeError, TypeError)):
        outcome.other = 1  # type: ignore[attr-defined]
    assert not hasattr(outcome, "__dict__")


def test_compares_by_its_fields() -> None:
    assert Outcome(0, "item", "value") == Outcome(0, "item", "value")
    assert Outcome(0, "item", "value") != Outcome(1, "item", "value")
    assert len({Outcome(0, "item", "value"), Outcome(0, "item", "value")}) == 1


def test_repr_leaves_the_context_out() -> None:
    text = repr(Outcome(0, "item", "value", context={"password": 1}))
    assert "password" not in text
    assert "index=0, item='item', value='value', error=None" in text


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_pickles_and_copies(duplicate: Any) -> None:
    outcome = Outcome(0, "item", "value", None, {"a": 1}, 2.5)
    assert duplicate(outcome) == outcome
    twin = duplicate(failed(StageExecutionError("fetch", LookupError()).of_item(3, "item")))
    assert twin.error.stage_name == "fetch"
    assert twin.error.item_index == twin.index == 3


def test_subscripts_at_run_time() -> None:
    assert get_args(Outcome[int]) == (int,)


def test_can_be_taken_apart_by_match() -> None:
    match failed(LookupError("no")):
        case Outcome(index=index, error=LookupError() as error):
            assert (index, str(error)) == (3, "no")
        case other:
            pytest.fail(f"{other} should have matched")
