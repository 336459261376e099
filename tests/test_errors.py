"""The errors: their messages, and what pickle, copy and ``except*`` leave of them."""

import copy
import copyreg
import pickle
import traceback
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any

import pytest

from async_pipeline import errors
from async_pipeline.errors import (
    BatchError,
    CircuitOpenError,
    DeadlineExceeded,
    DeadlockError,
    DuplicateJob,
    EngineError,
    Finish,
    JobNotFound,
    JobQueueFull,
    JobRunnerClosed,
    JournalBusy,
    JournalError,
    JournalMismatch,
    MissingFieldsError,
    PipelineError,
    RecordedError,
    StageExecutionError,
    StageTimeoutError,
    WorkerLost,
    behind,
    cancelled_in,
    finish_of,
    is_finish,
    mark_cancelled,
)


def pickled(error: Any) -> Any:
    return pickle.loads(pickle.dumps(error))


duplicated = pytest.mark.parametrize(
    "duplicate", [pickled, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)


def stage_error(
    name: str = "fetch", original: BaseException | None = None, **options: Any
) -> StageExecutionError:
    """A StageExecutionError as it leaves a stage, with its cause."""
    original = ValueError("no") if original is None else original
    error = StageExecutionError(name, original, **options)
    error.__cause__ = original
    return error


def batch_error(*indexes: int) -> BatchError:
    return BatchError({index: stage_error(f"s{index}").of_item(index, "x") for index in indexes}, {0: "done"})


ERRORS = [name for name in errors.__all__ if name != "Finish"]


class TestFamily:
    def test_every_public_error_is_a_pipeline_error_or_a_timeout(self) -> None:
        assert len(ERRORS) == 18
        for name in ERRORS:
            assert issubclass(getattr(errors, name), (PipelineError, TimeoutError)), name

    def test_all_are_exceptions_and_none_is_a_cancellation(self) -> None:
        for name in ERRORS:
            assert issubclass(getattr(errors, name), Exception), name

    def test_finish_is_no_error(self) -> None:
        assert issubclass(Finish, BaseException)
        assert not issubclass(Finish, (Exception, CancelledError))

    def test_the_two_timeouts_are_told_apart(self) -> None:
        assert issubclass(DeadlineExceeded, TimeoutError)
        assert not issubclass(DeadlineExceeded, (StageTimeoutError, PipelineError))
        assert not issubclass(StageTimeoutError, DeadlineExceeded)

    def test_a_stage_timeout_is_a_timeout_and_no_pipeline_error(self) -> None:
        assert issubclass(StageTimeoutError, TimeoutError)
        assert not issubclass(StageTimeoutError, PipelineError)


class TestStageExecutionError:
    def test_says_the_stage_and_the_error(self) -> None:
        original = ValueError("no")
        error = StageExecutionError("fetch", original)
        assert str(error) == "Stage 'fetch' failed: ValueError('no')"
        assert (error.stage_name, error.original_error, error.attempts) == ("fetch", original, 1)
        assert (error.item_index, error.item) == (None, None)

    def test_attempts_are_given_by_keyword_only(self) -> None:
        assert StageExecutionError("fetch", ValueError(), attempts=4).attempts == 4
        with pytest.raises(TypeError):
            StageExecutionError("fetch", ValueError(), 4)  # type: ignore[call-arg]

    @pytest.mark.parametrize(
        ("attempts", "notes"), [(1, []), (2, ["after 2 attempts"]), (9, ["after 9 attempts"])]
    )
    def test_notes_more_attempts_than_one(self, attempts: int, notes: list[str]) -> None:
        error = StageExecutionError("fetch", ValueError("no"), attempts=attempts)
        assert getattr(error, "__notes__", []) == notes
        lines = "".join(traceback.format_exception(error)).splitlines()
        assert lines[1:] == notes

    def test_a_note_on_a_copy_is_none_on_the_first(self) -> None:
        error = stage_error(attempts=2)
        error.within("pages").add_note("in the nightly tests")
        assert error.__notes__ == ["after 2 attempts"]

    def test_within_names_the_pipeline_around_it_and_leaves_the_first_alone(self) -> None:
        error = stage_error("parse", attempts=3)
        outer = error.within("pages").within("site")
        assert outer.stage_name == "site/pages/parse"
        assert str(outer) == "Stage 'site/pages/parse' failed: ValueError('no')"
        assert outer.attempts == 3
        assert outer.original_error is outer.__cause__ is error.original_error
        assert (error.stage_name, str(error)) == ("parse", "Stage 'parse' failed: ValueError('no')")

    def test_of_item_says_which_item(self) -> None:
        error = stage_error()
        item = object()
        assert error.of_item(0, item) is error
        assert error.item_index == 0
        assert error.item is item

    def test_of_item_copies_an_error_that_is_another_items_already(self) -> None:
        try:
            raise stage_error().of_item(0, "a")
        except StageExecutionError as caught:
            first = caught
        second = first.of_item(1, "b")
        assert second is not first
        assert (first.item_index, first.item) == (0, "a")
        assert (second.item_index, second.item) == (1, "b")
        assert second.__cause__ is second.original_error is first.original_error
        assert second.__traceback__ is first.__traceback__ is not None

    @duplicated
    def test_survives_with_all_it_knows(self, duplicate: Callable[[Any], Any]) -> None:
        error = stage_error(attempts=3).within("pages").of_item(7, ["an item"])
        error.add_note("seen on a Monday")
        twin = duplicate(error)
        assert type(twin) is StageExecutionError
        assert twin is not error
        assert str(twin) == str(error) == "Stage 'pages/fetch' failed: ValueError('no')"
        assert (twin.stage_name, twin.attempts, twin.item_index, twin.item) == (
            "pages/fetch",
            3,
            7,
            ["an item"],
        )
        assert repr(twin.original_error) == "ValueError('no')"
        assert twin.__cause__ is twin.original_error
        assert twin.__notes__ == ["after 3 attempts", "seen on a Monday"]

    @duplicated
    def test_survives_in_a_chain(self, duplicate: Callable[[Any], Any]) -> None:
        error = duplicate(stage_error("outer", stage_error("inner", KeyError("k"))))
        assert isinstance(error.__cause__, StageExecutionError)
        assert error.__cause__.stage_name == "inner"
        assert isinstance(error.__cause__.__cause__, KeyError)

    @duplicated
    def test_survives_around_a_timeout_and_a_cancellation(self, duplicate: Callable[[Any], Any]) -> None:
        timed_out = duplicate(stage_error("slow", StageTimeoutError(2.5)))
        assert isinstance(timed_out.__cause__, StageTimeoutError)
        assert timed_out.__cause__.timeout == 2.5
        assert isinstance(duplicate(stage_error("gone", CancelledError("who"))).__cause__, CancelledError)

    def test_the_first_error_is_untouched_by_changes_to_its_copy(self) -> None:
        error = stage_error()
        twin = copy.copy(error)
        twin.attempts = 9
        assert error.attempts == 1

    @duplicated
    def test_a_subclass_may_be_built_differently(self, duplicate: Callable[[Any], Any]) -> None:
        twin = duplicate(RowError(17))
        assert type(twin) is RowError
        assert (twin.row, twin.stage_name, str(twin)) == (
            17,
            "row 17",
            "Stage 'row 17' failed: LookupError()",
        )
        assert isinstance(twin.__cause__, LookupError)


class RowError(StageExecutionError):
    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}", LookupError())
        self.row = row


@pytest.mark.parametrize(("kind", "whose"), [(StageTimeoutError, "stage"), (DeadlineExceeded, "run")])
class TestTimeouts:
    def test_says_how_long(self, kind: Any, whose: str) -> None:
        error = kind(2.5)
        assert error.timeout == 2.5
        assert str(error) == f"no result within the {whose}'s timeout of 2.5 s"

    @duplicated
    def test_survives(self, kind: Any, whose: str, duplicate: Callable[[Any], Any]) -> None:
        twin = duplicate(kind(2.5))
        assert type(twin) is kind
        assert twin.timeout == 2.5
        assert str(twin) == f"no result within the {whose}'s timeout of 2.5 s"

    @duplicated
    def test_survives_with_its_cause_and_notes(
        self, kind: Any, whose: str, duplicate: Callable[[Any], Any]
    ) -> None:
        error = kind(2.5)
        error.__cause__ = CancelledError("ours")
        error.add_note("on the third mirror")
        twin = duplicate(error)
        assert isinstance(twin.__cause__, CancelledError)
        assert twin.__notes__ == ["on the third mirror"]


class TestCircuitOpenError:
    def test_says_which_stage_and_how_long(self) -> None:
        error = CircuitOpenError("fetch", 12.3456)
        assert (error.stage_name, error.retry_after) == ("fetch", 12.3456)
        assert str(error) == "the circuit of stage 'fetch' is open for another 12.3 s"
        assert "for another 0.5 s" in str(CircuitOpenError("fetch", 0.5))
        text = "the circuit of stage 'fetch' is open until the call that tries it ends"
        assert str(CircuitOpenError("fetch", 0)) == text

    @duplicated
    def test_survives(self, duplicate: Callable[[Any], Any]) -> None:
        twin = duplicate(CircuitOpenError("fetch", 12.5))
        assert type(twin) is CircuitOpenError
        assert (twin.stage_name, twin.retry_after) == ("fetch", 12.5)


class TestErrorsOfJobs:
    def test_say_what_is_the_matter(self) -> None:
        assert str(DuplicateJob("a")) == "there is a job 'a' already"
        assert str(JobNotFound("a")) == "there is no job 'a', or no longer"
        assert str(JobQueueFull(3)) == "3 jobs wait already, which is max_pending; submit again later"
        closed = str(JobRunnerClosed())
        assert closed.startswith(
            "the JobRunner is not running; use it inside 'async with runner:', or in the"
        )
        assert closed.endswith(" lifespan of the application (that of a mounted one is not run)")

    @duplicated
    def test_survive(self, duplicate: Callable[[Any], Any]) -> None:
        for error in (DuplicateJob("a"), JobNotFound("a"), JobQueueFull(3), JobRunnerClosed()):
            error.__cause__ = ValueError("no")
            error.add_note("seen on a Monday")
            error.extra = 1  # type: ignore[union-attr]
            twin = duplicate(error)
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            assert vars(twin) == vars(error)
            assert repr(twin.__cause__) == "ValueError('no')"
        assert duplicate(DuplicateJob("a")).job_id == duplicate(JobNotFound("a")).job_id == "a"
        assert duplicate(JobQueueFull(3)).max_pending == 3


class TestMissingFieldsError:
    def test_lists_all(self) -> None:
        error = MissingFieldsError(["id", "e-mail"])
        assert error.fields == ("id", "e-mail")
        assert str(error) == "missing 'id', 'e-mail'"

    @duplicated
    def test_survives(self, duplicate: Callable[[Any], Any]) -> None:
        twin = duplicate(MissingFieldsError(["id", "e-mail"]))
        assert type(twin) is MissingFieldsError
        assert (twin.fields, str(twin)) == (("id", "e-mail"), "missing 'id', 'e-mail'")


class TestFinish:
    def test_has_a_value(self) -> None:
        assert Finish(3).value == 3
        assert Finish().value is None
        assert repr(Finish([1])) == "Finish([1])"

    @duplicated
    def test_survives(self, duplicate: Callable[[Any], Any]) -> None:
        twin = duplicate(Finish([1]))
        assert type(twin) is Finish
        assert twin.value == [1]


class TestBatchError:
    def test_is_a_group_and_a_pipeline_error(self) -> None:
        error = batch_error(3, 1)
        assert isinstance(error, ExceptionGroup)
        assert isinstance(error, PipelineError)
        assert list(error.failures) == [3, 1]
        assert error.exceptions == tuple(error.failures.values())
        assert error.results == {0: "done"}

    @pytest.mark.parametrize(
        ("indexes", "message"),
        [
            ((4,), "item 4 failed"),
            ((4, 2), "2 items failed: 2, 4"),
            ((5, 4, 3, 2, 1), "5 items failed: 1, 2, 3, 4, 5"),
            ((6, 5, 4, 3, 2, 1), "6 items failed: 1, 2, 3, 4, 5, …"),
        ],
    )
    def test_says_which_items(self, indexes: tuple[int, ...], message: str) -> None:
        error = batch_error(*indexes)
        assert error.message == message
        assert str(error).startswith(message)

    def test_keeps_its_own_dicts(self) -> None:
        failures: dict[int, Exception] = {1: stage_error()}
        results: dict[int, Any] = {}
        error = BatchError(failures, results)
        failures.clear()
        results[0] = "late"
        assert list(error.failures) == [1]
        assert error.results == {}

    def test_except_star_takes_the_stage_errors(self) -> None:
        caught: Any = None
        batch = batch_error(1, 2)
        try:
            raise batch
        except* StageExecutionError as group:
            caught = group
        assert type(caught) is BatchError
        assert caught.exceptions == tuple(batch.failures.values())

    def test_except_star_leaves_what_it_does_not_name(self) -> None:
        other = KeyError("from a middleware")
        batch = BatchError({0: other, 1: stage_error()}, {2: "two"})
        taken: Any = None
        with pytest.raises(BatchError) as rest:
            try:
                raise batch
            except* KeyError as group:
                taken = group
        assert taken.exceptions == (other,)
        assert rest.value.exceptions == (batch.failures[1],)
        for part in (taken, rest.value):
            assert part.results == {2: "two"}
            assert list(part.failures) == [0, 1]

    def test_except_star_by_the_base_class_takes_the_whole(self) -> None:
        caught: Any = None
        batch = batch_error(1)
        try:
            raise batch
        except* PipelineError as group:
            caught = group
        assert caught is batch

    def test_a_plain_except_by_the_base_class_catches_it(self) -> None:
        with pytest.raises(PipelineError):
            raise batch_error(1)

    def test_split_and_subgroup_keep_cause_and_notes(self) -> None:
        batch = BatchError({0: KeyError(), 1: stage_error()}, {2: "two"})
        batch.__cause__ = cause = OSError()
        batch.add_note("the nightly batch")
        matching, rest = batch.split(KeyError)
        for part in (matching, rest, batch.subgroup(StageExecutionError)):
            assert isinstance(part, BatchError)
            assert len(part.exceptions) == 1
            assert part.results == {2: "two"}
            assert part.__cause__ is cause
            assert part.__notes__ == ["the nightly batch"]

    def test_derive_holds_what_it_is_given(self) -> None:
        batch = batch_error(1, 2)
        other = OSError()
        part = batch.derive([other])
        assert type(part) is BatchError
        assert part.exceptions == (other,)
        assert part.failures == batch.failures
        assert part.message == batch.message

    @duplicated
    def test_survives(self, duplicate: Callable[[Any], Any]) -> None:
        twin: BatchError = duplicate(batch_error(3, 8))
        assert type(twin) is BatchError
        assert list(twin.failures) == [3, 8]
        assert twin.results == {0: "done"}
        assert twin.exceptions == tuple(twin.failures.values())
        assert [getattr(error, "item_index", None) for error in twin.exceptions] == [3, 8]
        assert all(isinstance(error.__cause__, ValueError) for error in twin.exceptions)
        assert str(twin) == str(batch_error(3, 8))

    @duplicated
    def test_a_part_survives_as_a_part(self, duplicate: Callable[[Any], Any]) -> None:
        part = BatchError({0: KeyError(), 1: stage_error()}, {2: "two"}).subgroup(KeyError)
        twin = duplicate(part)
        assert [type(error) for error in twin.exceptions] == [KeyError]
        assert list(twin.failures) == [0, 1]

    @duplicated
    def test_survives_with_its_cause_and_notes(self, duplicate: Callable[[Any], Any]) -> None:
        error = batch_error(1)
        error.__cause__ = OSError("disk")
        error.add_note("the nightly batch")
        twin = duplicate(error)
        assert isinstance(twin.__cause__, OSError)
        assert twin.__notes__ == ["the nightly batch"]

    def test_prints_each_failure_with_its_cause(self) -> None:
        text = "".join(traceback.format_exception(batch_error(1, 2)))
        assert "2 items failed: 1, 2" in text
        assert "Stage 's1' failed: ValueError('no')" in text
        assert "direct cause" in text


class TestDeadlockError:
    def test_lists_the_tasks(self) -> None:
        error = DeadlockError(["first", "second"])
        assert isinstance(error, PipelineError)
        assert error.tasks == ("first", "second")
        assert str(error).splitlines()[1:] == ["first", "second"]

    @duplicated
    def test_survives(self, duplicate: Callable[[Any], Any]) -> None:
        error = DeadlockError(["first"])
        error.__cause__ = OSError()
        error.add_note("in the nightly tests")
        twin = duplicate(error)
        assert type(twin) is DeadlockError
        assert twin.tasks == ("first",)
        assert str(twin) == str(error)
        assert isinstance(twin.__cause__, OSError)
        assert twin.__notes__ == ["in the nightly tests"]


class TestFinishOf:
    def test_itself_or_the_first_of_a_group_of_them(self) -> None:
        first, second = Finish(1), Finish(2)
        group = BaseExceptionGroup("", [BaseExceptionGroup("", [first]), second])
        assert is_finish(first)
        assert is_finish(group)
        assert finish_of(first) is first
        assert finish_of(group).value == 1

    @pytest.mark.parametrize(
        "other",
        [
            SystemExit(),
            ValueError(),
            BaseExceptionGroup("", [GeneratorExit()]),
            BaseExceptionGroup("", [BaseExceptionGroup("", [Finish(1)]), GeneratorExit()]),
            BaseExceptionGroup("", [Finish(1), ValueError()]),
        ],
        ids=repr,
    )
    def test_anything_else_is_none(self, other: BaseException) -> None:
        assert not is_finish(other)


class TestBehind:
    def test_itself_its_cause_or_its_context(self) -> None:
        key, value, error = KeyError(), ValueError(), OSError()
        error.__cause__, error.__context__ = key, value
        assert behind(error, OSError) is error
        assert behind(error, KeyError) is key
        assert behind(error, ValueError) is value
        assert behind(error, TypeError) is None

    def test_the_whole_chain_and_also_in_a_circle(self) -> None:
        first, second, third = OSError(), KeyError(), ValueError()
        first.__context__, second.__context__, third.__context__ = second, third, second
        assert behind(first, ValueError) is third
        assert behind(first, TypeError) is None


class TestCancelledIn:
    def test_nothing_noted(self) -> None:
        assert cancelled_in(CancelledError()) is None

    def test_the_stage_that_a_cancellation_left_and_its_attempts(self) -> None:
        error = CancelledError()
        mark_cancelled(error, "fetch")
        assert cancelled_in(error) == ("fetch", 1)
        mark_cancelled(error, "pages/fetch", 3)
        assert cancelled_in(error) == ("pages/fetch", 3)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "error",
    [
        stage_error(),
        StageTimeoutError(1),
        DeadlineExceeded(1),
        CircuitOpenError("a", 1),
        DuplicateJob("a"),
        JobNotFound("a"),
        JobQueueFull(1),
        JobRunnerClosed(),
        EngineError("down"),
        JournalBusy("batch.db"),
        JournalError("full"),
        JournalMismatch("other items"),
        RecordedError("shop:NotFound", "no such"),
        RecordedError("shop:NotFound", ""),
        WorkerLost(),
        batch_error(1),
        DeadlockError([]),
    ],
    ids=lambda e: type(e).__name__,
)
def test_pickles_by_every_protocol(error: Exception, protocol: int) -> None:
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.__dict__.keys() == error.__dict__.keys()


def test_a_recorded_error_says_what_it_stands_for() -> None:
    error = RecordedError("shop:NotFound", "no such")
    assert (error.type, error.message, str(error)) == ("shop:NotFound", "no such", "shop:NotFound: no such")
    assert str(RecordedError("shop:NotFound", "")) == "shop:NotFound"


def test_a_journal_that_is_busy_is_named() -> None:
    assert copy.copy(JournalBusy("batch.db")).path == "batch.db"
    assert str(JournalBusy("batch.db")).startswith("another batch uses the journal 'batch.db' at this moment")


def test_copies_do_not_depend_on_what_others_teach_copy() -> None:
    """tblib, which Dask loads, makes copies of exceptions that share their notes."""
    error = stage_error(attempts=2)

    def refuse(error: Exception) -> Any:
        raise AssertionError

    copyreg.pickle(StageExecutionError, refuse)
    try:
        assert error.within("pages").stage_name == "pages/fetch"
    finally:
        del copyreg.dispatch_table[StageExecutionError]


def test_an_error_that_cannot_be_shown_is_still_reported() -> None:
    class UnshowableError(Exception):
        def __repr__(self) -> str:
            raise AttributeError("half built")

    original = UnshowableError()
    error = StageExecutionError("fetch", original)
    assert str(error) == "Stage 'fetch' failed: UnshowableError"
    assert error.original_error is original


def test_is_of_item_asks_for_the_index_and_the_very_item() -> None:
    item: list[int] = []
    error = StageExecutionError("a", ValueError()).of_item(1, item)
    assert error.is_of_item(1, item)
    assert not error.is_of_item(0, item)
    assert not error.is_of_item(1, [])
