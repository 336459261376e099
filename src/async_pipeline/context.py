"""The context of a run: who wants it, how a batch copies it, how one entry is read and written."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any

__all__ = [
    "check_arguments",
    "check_own_arguments",
    "copier",
    "current_item_key",
    "get_entry",
    "item_key",
    "set_entry",
    "wants_context",
]

current_item_key: ContextVar[str | None] = ContextVar("async_pipeline.item_key", default=None)
"""What :func:`item_key` returns; set around each item of a batch with a journal or an engine."""

_CONTEXT_NAMES = ("context", "ctx")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def item_key() -> str | None:
    """Return the stable key of the item that runs here, for whatever must not happen twice for one item.

    In a batch with a journal or an engine it is the ``run_id`` and the item's own key, ``"2026-11/17"``: the
    same in each attempt, after a crash, and on each worker. (A journal without a ``run_id`` has a name of
    its own instead, which lasts as long as its file; an engine without one a new name for each batch.)
    Both run an item again whose result was not kept before the process died, so give the key to what takes
    an idempotency key, or look whether it is done. It is the item's: where one item does several such things,
    in two stages or for each of its elements, add what tells them apart.

    >>> async def charge(order):
    ...     await payments.charge(order["amount"], idempotency_key=item_key())

    Returns:
        The key, or ``None`` outside such a batch.
    """
    return current_item_key.get()


def copier(context: object | None) -> Callable[[], Any]:
    """Return a function that makes each item's shallow copy of ``context``.

    ``None`` gives new dicts. An object is copied by its own ``copy()``, or else, when it has none or
    that one wants arguments, by :func:`copy.copy`.
    """
    if context is None:
        return dict
    if type(context) is dict:
        return context.copy
    return functools.partial(_copy, context)


def _copy(context: object) -> object:
    own = getattr(context, "copy", None)
    if callable(own):
        try:
            return own()
        except TypeError:
            pass
    return copy.copy(context)


def get_entry(context: object, key: str, default: Any = None) -> Any:
    """Return ``context[key]`` of a mapping or ``context.key`` of any other object, else ``default``."""
    if isinstance(context, Mapping):
        return context.get(key, default)
    return getattr(context, key, default)


def set_entry(context: object, key: str, value: object) -> bool:
    """Set ``context[key]`` or ``context.key``; return False if the object refuses."""
    if isinstance(context, MutableMapping):
        context[key] = value
        return True
    try:
        setattr(context, key, value)
    except Exception:  # a frozen dataclass, a slotted object and a pydantic model each refuse in their way
        return False
    return True


def wants_context(function: Callable[..., Any], shape: str) -> bool:
    """Tell whether ``function`` takes the context after the arguments that ``shape`` names.

    The parameter that follows them receives the context when it has no default or is named ``context``
    or ``ctx``; ``*args`` does too. Only Python functions, methods and objects with a Python ``__call__``
    are asked; classes and callables written in C (``round``, ``str.split``, ``UUID``) never want it.
    A wrapper that takes ``*args`` is looked through by its ``__wrapped__``.

    Args:
        function: a handler or a hook.
        shape: how it is called without the context, for example ``"handler(value)"``.

    Raises:
        TypeError: it can be called neither with these arguments nor with the context added.
    """
    given = shape.count(",") + 1
    signature = _python_signature(function)
    if signature is None:
        return False
    positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL]
    if len(positional) > given:
        candidate = positional[given]
        wanted = candidate.default is candidate.empty or candidate.name in _CONTEXT_NAMES
    else:
        wanted = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    # Person.full_name(self) is called on the value, like str.split; of two arguments, one is not the self
    if wanted and _is_plain(function) and positional[given:] and positional[0].name == "self":  # noqa: SIM102
        if positional[given].name not in _CONTEXT_NAMES:
            raise TypeError(
                "it is a method, but of no instance: write instance.method; within a class, no @staged, "
                "but Stage('name', self.method); or say by pass_context= whether it takes the context"
            )
    try:
        signature.bind(*(None,) * (given + wanted))
    except TypeError as error:
        with_context = shape.replace(")", ", context)")
        raise TypeError(f"it must take {shape} or {with_context}, not {signature}: {error}") from None
    return wanted


def check_arguments(function: Callable[..., Any], shape: str) -> None:
    """Raise if ``function`` can't be called as ``shape`` says, as far as :func:`wants_context` can tell.

    Raises:
        TypeError: it takes fewer arguments, or demands more.
    """
    signature = _python_signature(function)
    if signature is not None:
        try:
            signature.bind(*(None,) * (shape.count(",") + 1))
        except TypeError as error:
            raise TypeError(f"it must take {shape}, not {signature}: {error}") from None


def check_own_arguments(function: Callable[..., Any], shape: str) -> None:
    """Raise as :func:`check_arguments` does, for functions and methods that wrap no other one.

    What a wrapper adds to the arguments that it is given is its own affair.
    """
    if _is_plain(function):
        check_arguments(function, shape)


def _is_plain(function: object) -> bool:
    return type(function) in (FunctionType, MethodType) and not hasattr(function, "__wrapped__")


def _python_signature(function: Any) -> inspect.Signature | None:
    """The signature of Python code, without evaluating its annotations; None for a class or C code."""
    if isinstance(function, type):
        return None
    if isinstance(function, functools.partial):
        return _rest(
            _python_signature(function.func),
            lambda f: functools.partial(f, *function.args, **function.keywords),
        )
    if isinstance(function, MethodType):
        return _rest(_python_signature(function.__func__), lambda f: MethodType(f, function.__self__))
    # of the type itself: a Mock(spec=function) says that it is one
    signature = _own_signature(function) if type(function) is FunctionType else None
    wrapped = getattr(function, "__wrapped__", None)  # functools.cache is C around Python
    if callable(wrapped) and (signature is None or _takes_any(signature)):
        return _python_signature(wrapped)
    call = inspect.getattr_static(type(function), "__call__", None)
    if signature is None and isinstance(call, FunctionType):
        return _python_signature(MethodType(call, function))
    return signature


def _own_signature(function: FunctionType) -> inspect.Signature:
    given = getattr(function, "__signature__", None)
    if given is not None:
        return inspect.signature(function, follow_wrapped=False)
    # of a twin without annotations, because any way of asking for them can run them
    bare = FunctionType(function.__code__, {}, function.__name__, function.__defaults__, function.__closure__)
    bare.__kwdefaults__ = function.__kwdefaults__
    return inspect.signature(bare)


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())


def _rest(signature: inspect.Signature | None, bind: Callable[[Any], Any]) -> inspect.Signature | None:
    """What a partial or a method leaves of the signature of its function."""
    if signature is None:
        return None

    def stand_in() -> None: ...

    stand_in.__signature__ = signature  # type: ignore[attr-defined]
    try:
        return inspect.signature(bind(stand_in))
    except ValueError as error:
        raise TypeError(str(error)) from None
