"""Which jobs a list of them has: the query parameters that OGC API - Processes names for it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from ..jobs import Job, JobStatus

__all__ = ["INTERVAL", "STATUSES", "JobFilter", "parts", "query"]

STATUSES: tuple[str, ...] = get_args(JobStatus)

_MOMENT = (  # \d would be any digit of Unicode
    r"[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-](0[0-9]|1[0-4]):[0-5][0-9])"
)
INTERVAL = rf"^({_MOMENT}|({_MOMENT}|\.\.)/({_MOMENT}|\.\.))$"
"""What ``datetime`` may be: a moment of RFC 3339, or two with a slash between; ``..`` is no bound."""


def parts(values: Sequence[str]) -> list[str]:
    """The entries of a parameter, whether it was given several times or once with commas."""
    return [part for value in values for part in value.split(",")]


class JobFilter:
    """What a list of jobs is narrowed to, besides what the runner does itself.

    Args:
        interval: when they were created.
        least: seconds that they have run at least; one that has not begun has not run.
        most: seconds that they have run at most.
    """

    def __init__(self, interval: str | None, least: Sequence[int], most: Sequence[int]) -> None:
        first, _, last = (interval or "../..").partition("/")
        self._first, self._last = _moment(first), _moment(last or first)
        self._least = min(least, default=None)
        self._most = max(most, default=None)
        self.is_all = interval is None and self._least is None and self._most is None

    def takes(self, job: Job) -> bool:
        """Tell whether a job is one of those."""
        # as it is shown, in milliseconds, so that a client finds a job by the time that it was told
        created = job.created.replace(microsecond=job.created.microsecond // 1000 * 1000)
        if self._first is not None and created < self._first:
            return False
        if self._last is not None and created > self._last:
            return False
        if self._least is None and self._most is None:
            return True
        if job.started is None:
            return False
        seconds = ((job.finished or datetime.now(UTC)) - job.started).total_seconds()
        return (self._least is None or seconds >= self._least) and (
            self._most is None or seconds <= self._most
        )


def _moment(text: str) -> datetime | None:
    if text == "..":
        return None
    # a day that its month does not have, which no pattern can tell, is one of the next month
    return datetime.fromisoformat(f"{text[:8]}01{text[10:]}") + timedelta(days=int(text[8:10]) - 1)


def query(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that were given, for the links to other pages."""
    return {name: value for name, value in values.items() if value not in (None, [])}
