"""The query parameters of a list of jobs: what they may be, and which jobs they leave."""

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from async_pipeline.integrations._filters import (
    INTERVAL,
    STATUSES,
    JobFilter,
    parts,
    query,
)
from async_pipeline.integrations._openapi import STATUS
from async_pipeline.jobs import Job

NOON = datetime(2030, 6, 15, 12, tzinfo=UTC)


def job(created: datetime = NOON, ran: float | None = None, started: datetime | None = None) -> Job:
    if ran is not None:
        started = created
    finished = None if ran is None or started is None else started + timedelta(seconds=ran)
    return Job(
        id="a",
        pipeline="p",
        created=created,
        updated=created,
        started=started,
        finished=finished,
    )


def test_the_statuses_are_those_that_the_document_has() -> None:
    assert list(STATUSES) == STATUS["properties"]["status"]["enum"]


@pytest.mark.parametrize(
    ("values", "found"),
    [([], []), (["a"], ["a"]), (["a,b", "c"], ["a", "b", "c"]), ([""], [""])],
)
def test_a_parameter_is_given_several_times_or_once_with_commas(values: list[str], found: list[str]) -> None:
    assert parts(values) == found


def test_what_was_not_asked_for_is_in_no_link() -> None:
    assert query({"a": None, "b": [], "c": [0], "d": "x"}) == {"c": [0], "d": "x"}


# -- datetime

GOOD = [
    "2030-06-15T12:00:00Z",
    "2030-06-15T12:00:00.123456789Z",
    "2030-06-15T12:00:00-12:30",
    "2030-02-31T12:00:00+14:59",
    "../..",
    "../2030-06-15T12:00:00Z",
    "2030-06-15T12:00:00Z/..",
    "2030-06-15T12:00:00Z/2030-06-15T12:00:00.5Z",
    "1000-01-01T00:00:00+14:59",
    "2999-12-31T23:59:59.999999999-14:59",
]
BAD = [
    "",
    "..",
    "/",
    "../",
    "/2030-06-15T12:00:00Z",
    "2030-06-15T12:00:00Z/",
    "2030-06-15",
    "2030-06-15T12:00:00",
    "2030-06-15 12:00:00Z",
    "2030-06-15T12:00:00z",
    "2030-13-15T12:00:00Z",
    "2030-06-32T12:00:00Z",
    "2030-06-00T12:00:00Z",
    "2030-06-15T24:00:00Z",
    "2030-06-15T12:60:00Z",
    "2030-06-15T12:00:60Z",
    "2030-06-15T12:00:00.Z",
    "2030-06-15T12:00:00.1234567890Z",
    "2030-06-15T12:00:00+15:00",
    "0000-06-15T12:00:00Z",
    "9999-12-31T23:59:59Z",
    "2030-06-15T12:00:00Z\n",
    "x2030-06-15T12:00:00Z",
    "20\u0663\u0660-06-15T12:00:00Z",  # digits, for Unicode
]


TEXT: TypeAdapter[str] = TypeAdapter(Annotated[str, Field(pattern=INTERVAL)])


def passes(text: str) -> bool:
    """Whether it fits, as pydantic reads regular expressions, which is not quite as Python does."""
    try:
        TEXT.validate_python(text)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("text", GOOD)
def test_intervals_of_rfc_3339_are_read(text: str) -> None:
    assert passes(text)
    assert JobFilter(text, [], []).is_all is False


@pytest.mark.parametrize("text", BAD)
def test_no_others_pass(text: str) -> None:
    assert not passes(text)


@given(st.from_regex(re.compile(INTERVAL, re.ASCII), fullmatch=True))
def test_whatever_passes_can_be_read(text: str) -> None:
    if passes(text):
        assert JobFilter(text, [], []).takes(job()) in (True, False)


def shown(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.mark.parametrize(
    ("interval", "is_in"),
    [
        ("2030-06-15T12:00:00Z", True),
        ("2030-06-15T14:00:00+02:00", True),
        ("2030-06-15T12:00:00+02:00", False),
        ("2030-06-15T12:00:00.001Z", False),
        ("2030-06-15T12:00:00Z/..", True),
        ("2030-06-15T12:00:00.001Z/..", False),
        ("../2030-06-15T12:00:00Z", True),
        ("../2030-06-15T11:59:59.999Z", False),
        ("2030-06-15T11:00:00Z/2030-06-15T13:00:00Z", True),
        ("2030-06-15T13:00:00Z/2030-06-15T11:00:00Z", False),
        ("../..", True),
        ("2030-05-31T12:00:00Z/2030-06-15T12:00:00Z", True),
        ("2030-06-14T12:00:00Z/2030-06-14T13:00:00Z", False),
    ],
)
def test_a_job_was_created_in_the_interval_with_its_ends(interval: str, is_in: bool) -> None:
    assert JobFilter(interval, [], []).takes(job()) is is_in


def test_a_day_that_a_month_has_not_is_one_of_the_next() -> None:
    narrow = JobFilter("2030-02-30T00:00:00Z/..", [], [])
    assert narrow.takes(job(datetime(2030, 3, 2, tzinfo=UTC)))
    assert not narrow.takes(job(datetime(2030, 3, 1, 23, 59, tzinfo=UTC)))


@given(st.datetimes(datetime(1000, 1, 2), datetime(2999, 12, 30)))
def test_a_job_is_found_by_the_time_that_is_shown_of_it(created: datetime) -> None:
    one = job(created.replace(tzinfo=UTC))
    for interval in ("{0}", "{0}/..", "../{0}", "{0}/{0}"):
        assert JobFilter(interval.format(shown(one.created)), [], []).takes(one)


# -- durations


@pytest.mark.parametrize(
    ("least", "most", "is_in"),
    [
        ([], [], True),
        ([5], [], True),
        ([6], [], False),
        ([6, 5], [], True),
        ([], [5], True),
        ([], [4], False),
        ([], [4, 5], True),
        ([5], [5], True),
        ([4], [6], True),
        ([6], [4], False),
        ([0], [], True),
    ],
)
def test_a_job_has_run_so_long(least: list[int], most: list[int], is_in: bool) -> None:
    assert JobFilter(None, least, most).takes(job(ran=5)) is is_in


@pytest.mark.parametrize(("least", "most"), [([0], []), ([], [0]), ([0], [10])])
def test_what_has_not_begun_has_not_run(least: list[int], most: list[int]) -> None:
    assert not JobFilter(None, least, most).takes(job())


def test_what_runs_has_run_until_now() -> None:
    running = job(started=datetime.now(UTC) - timedelta(seconds=1000))
    assert JobFilter(None, [900], []).takes(running)
    assert not JobFilter(None, [100_000], []).takes(running)
    assert not JobFilter(None, [], [900]).takes(running)


# -- all of it


def test_nothing_asked_for_is_all() -> None:
    narrow = JobFilter(None, [], [])
    assert narrow.is_all
    assert narrow.takes(job())


@pytest.mark.parametrize(("interval", "least", "most"), [("../..", [], []), (None, [0], []), (None, [], [0])])
def test_what_leaves_something_out_is_not_all(
    interval: str | None, least: list[int], most: list[int]
) -> None:
    assert not JobFilter(interval, least, most).is_all


moments = st.datetimes(
    datetime(2020, 1, 1),
    datetime(2020, 1, 1, 0, 0, 5),
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=-3))]),
)


@given(
    created=moments,
    ran=st.none() | st.integers(0, 4),
    first=st.none() | moments,
    last=st.none() | moments,
    least=st.lists(st.integers(0, 4), max_size=2),
    most=st.lists(st.integers(0, 4), max_size=2),
)
def test_each_condition_counts(
    created: datetime,
    ran: int | None,
    first: datetime | None,
    last: datetime | None,
    least: list[int],
    most: list[int],
) -> None:
    created = created.astimezone(UTC).replace(microsecond=0)
    interval = f"{first.isoformat() if first else '..'}/{last.isoformat() if last else '..'}"
    expected = (
        (first is None or created >= first)
        and (last is None or created <= last)
        and (not least or (ran is not None and ran >= min(least)))
        and (not most or (ran is not None and ran <= max(most)))
    )
    assert JobFilter(interval, least, most).takes(job(created, ran)) is expected
