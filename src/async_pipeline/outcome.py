"""What became of one item."""

from dataclasses import dataclass, field
from typing import Any, Generic, cast

from .types import Out

__all__ = ["Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Out]):
    """What became of one item: its value or its error, never both.

    From :meth:`Pipeline.try_run <async_pipeline.Pipeline.try_run>` and from a stream's ``outcomes()``.

    Attributes:
        index: the item's index in its batch, counted from 0; ``None`` for a single run.
        item: the input.
        value: the output; ``None`` when the item failed.
        error: the :class:`~async_pipeline.StageExecutionError`, or what a middleware raised; ``None`` when
            the item succeeded.
        context: the context that this item ran with.
        duration: seconds from the item's start to its end, on the event loop's clock.
    """

    index: int | None
    item: Any
    value: Out | None = None
    error: Exception | None = None
    context: Any = field(default=None, repr=False)
    duration: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the item succeeded."""
        return self.error is None

    def unwrap(self) -> Out:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return cast(Out, self.value)
