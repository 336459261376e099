"""What errors are called, the same in all that is told of a run."""

from ..errors import StageExecutionError

__all__ = ["class_name", "original", "type_of"]


def original(error: BaseException | None) -> BaseException | None:
    """Return the handler's own error, also of a run inside a handler."""
    while isinstance(error, StageExecutionError):
        error = error.original_error
    return error


def class_name(kind: type) -> str:
    """Return the full name of a class, or the short one of a built-in one."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def type_of(error: BaseException | None) -> str:
    """Return the name of the class of the handler's own error; ``""`` for none.

    >>> type_of(StageExecutionError("fetch", TimeoutError()))
    'TimeoutError'
    """
    return "" if error is None else class_name(type(original(error)))
