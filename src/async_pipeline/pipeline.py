"""A pipeline: steps in a row, one context per run."""

import asyncio
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, cast, overload

from .advice import MAP, PIPELINE, STREAM, advised
from .context import check_own_arguments
from .errors import (
    Finish,
    StageExecutionError,
    cancelled_in,
    finish_of,
    is_finish,
    mark_cancelled,
    mark_within,
)
from .events import (
    EndEvent,
    Event,
    Observer,
    OnHookError,
    OutcomeName,
    Watch,
    check_callback,
    check_hook,
    check_observers,
    fire,
    new_run_id,
    report,
)
from .fanout import Batch, Progress, Stream
from .outcome import Outcome
from .retry import check_seconds
from .stage import (
    Call,
    Joinable,
    RunState,
    Stage,
    WatchedStep,
    as_step,
    call_of,
    is_watched,
    outcome_of,
    raise_cancellation,
    watched,
)
from .types import (
    NEVER_AWAITABLE,
    AfterStageHook,
    BeforeStageHook,
    ContextT,
    First,
    Last,
    Middleware,
    Part,
    Step,
    Structure,
    is_awaitable,
)

if TYPE_CHECKING:
    from .engine import Engine
    from .journal import Journal

__all__ = ["Pipeline"]


class _Stop(NamedTuple):
    """What a pipeline knows of one of its steps, apart from how to call it.

    A direct step is a plain handler, called without anything around it, so the pipeline wraps what it
    raises. The errors of every other step leave as they are.
    """

    name: str
    is_direct: bool
    watched: WatchedStep
    is_last: bool = False


# its name, how to call it, with what besides the value, whether to await it unseen, and the rest
_Link = tuple[str, Callable[..., Any], int, bool, _Stop]
_WITH_CONTEXT = 1
_WITH_STATE = 2  # and the context; the state is None by default


class Pipeline(Joinable[First, Last], Generic[First, Last, ContextT]):
    """Steps in a row, each receiving what the one before returned.

    >>> pipeline = Pipeline([fetch, parse, save], name="pages")
    >>> await pipeline.run(url)                          # one value
    >>> await pipeline.map(urls, 20)                     # many, in a list, in order
    >>> async with pipeline.stream(urls, 20) as rows:    # many, as they come
    ...     async for row in rows: ...

    ``fetch | parse | save`` makes one, too, where one of the first two is a step of this library; joining
    is flat, but a pipeline with hooks, middlewares or observers stays a step, and keeps them.

    A pipeline is immutable, holds no state of a run, and may be used from any number of tasks and event
    loops, also from inside its own handlers. It is a step itself, and then appears as one stage to the
    pipeline around it. Its ``stages``, ``name``, ``middlewares``, ``observers`` and ``on_hook_error`` can be
    read as attributes.

    Args:
        stages: at least one of: stages, pipelines, plain callables (which become a :class:`Stage` named
            after them), or any object with a ``name`` and ``async run(value, *, context=None)``.
        name: what the pipeline is called inside another one; ``"pipeline"`` by default.
        before_stage: a sync or async ``(stage_name, value)`` or ``(stage_name, value, context)``, called
            before each stage.
        after_stage: a sync or async ``(stage_name, value, output, error)``, with ``context`` as a fifth
            if wanted, called exactly once for each ``before_stage``: with the output (or the value of a
            :class:`~async_pipeline.Finish`), the :class:`StageExecutionError`, or the cancellation. An
            exception in a hook is logged to the logger ``async_pipeline``, and the run goes on.
        middlewares: callables ``(next, stage_name, value, context)``, async, or sync returning a value or
            an awaitable, around each stage with all its attempts; the first in the list is outermost.
            Their errors leave the pipeline as they are.
        observers: sync callables that get an :class:`~async_pipeline.Event` for each start and end of a run
            or a stage, also of those inside other pipelines and steps, and for each failed attempt. A stage
            starts after its ``before_stage`` and ends before its ``after_stage``; its middlewares are part
            of it. An exception of an observer is logged like that of a hook.
        on_hook_error: a sync ``(error)``, called with an exception of a hook, an observer or a ``progress``
            of this pipeline instead of logging it. What it raises is raised where the hook was called, so
            that a test fails: ``def on_hook_error(error): raise error``. There it is an error like others,
            which a :func:`~async_pipeline.fallback` catches, and which a batch keeps for its item; what is no
            ``Exception``, like that of ``pytest.fail``, passes through all.

    Raises:
        TypeError: an argument of the wrong type, or a callable that does not take what it will be given.
        ValueError: no stage.
    """

    __slots__ = (
        "_after",
        "_before",
        "_is_guarded",
        "_is_hooked",
        "_is_watched",
        "_links",
        "middlewares",
        "name",
        "observers",
        "on_hook_error",
        "stages",
    )

    name: str
    stages: tuple[Step[Any, Any], ...]
    middlewares: tuple[Middleware, ...]
    observers: tuple[Observer, ...]
    on_hook_error: OnHookError | None

    @advised("Pipeline([fetch, parse], name='pages')", PIPELINE)
    def __init__(
        self,
        stages: Sequence[Step[Any, Any] | Callable[..., Any]],
        *,
        name: str = "pipeline",
        before_stage: BeforeStageHook | None = None,
        after_stage: AfterStageHook | None = None,
        middlewares: Sequence[Middleware] | None = None,
        observers: Sequence[Observer] = (),
        on_hook_error: OnHookError | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        self.name = name
        self.stages = _as_steps(stages)
        self._before = check_hook("before_stage(stage_name, value)", before_stage)
        self._after = check_hook("after_stage(stage_name, value, output, error)", after_stage)
        self._is_hooked = before_stage is not None or after_stage is not None
        self.middlewares = _checked_middlewares(middlewares)
        self.observers = check_observers(observers)
        if on_hook_error is not None:
            check_callback("on_hook_error", "on_hook_error(error)", on_hook_error)
        self.on_hook_error = on_hook_error
        self._is_watched = bool(self.observers) or is_watched(*self.stages)
        self._is_guarded = self._is_hooked or self._is_watched
        *links, last = (_link(step, self.middlewares) for step in self.stages)
        self._links = (*links, (*last[:4], last[4]._replace(is_last=True)))

    if not TYPE_CHECKING:

        def __class_getitem__(cls, parameters: Any) -> Any:
            # Pipeline[int, str] leaves the context out; defaults of type variables came with Python 3.13
            if isinstance(parameters, tuple) and len(parameters) == 2 and len(cls.__parameters__) == 3:
                parameters = (*parameters, Any)
            return super().__class_getitem__(parameters)

    def __setattr__(self, attribute: str, value: object) -> None:
        if type(self) is Pipeline and hasattr(self, attribute):  # a subclass may set what it likes, as in 1.x
            raise AttributeError(
                f"a Pipeline is immutable; for another one write pipeline.replace({attribute}={value!r})"
            )
        super().__setattr__(attribute, value)

    async def run(
        self, initial_value: First, *, context: ContextT | None = None, timeout: float | None = None
    ) -> Last:
        """Run one value through all stages and return the last one's output.

        Args:
            initial_value: the input of the first stage.
            context: one mutable object for all stages, hooks and middlewares of this run: a dict, a
                dataclass, anything; a new dict by default.
            timeout: seconds for the whole run, over all stages, attempts, sleeps and hooks; ``None`` (the
                default) for no limit. A sleep before a retry that would not end in time is not begun: the
                last error is raised at once. A last stage that returns late all the same has returned.

        Returns:
            What the last stage returned, or the ``value`` of a :class:`~async_pipeline.Finish`.

        Raises:
            StageExecutionError: a stage failed; it names the stage and carries the handler's error. When
                ``timeout`` is up, that is a :class:`~async_pipeline.DeadlineExceeded`.
        """
        shared: Any = {} if context is None else context
        value: Any = initial_value
        if self._is_guarded or timeout is not None:
            try:
                if self._is_watched or timeout is not None:
                    value = await self._run_with_state(value, shared, RunState(timeout))
                else:
                    value = await self._run_all(value, shared, None)
            except Finish as finish:
                value = finish.value
            guarded: Last = value
            return guarded
        try:
            for _, call, wants, is_async, link in self._links:  # noqa: B007 - used below
                result = call(value, shared) if wants else call(value)
                if is_async or (type(result) not in NEVER_AWAITABLE and is_awaitable(result)):
                    value = await result
                else:
                    value = result
        except Exception as error:
            if link.is_direct:
                raise StageExecutionError(link.name, error) from error
            raise
        except asyncio.CancelledError as error:
            _mark(error, link)
            raise
        except (Finish, BaseExceptionGroup) as ended:
            if not is_finish(ended):
                raise
            value = finish_of(ended).value
        output: Last = value  # not cast(): it is a call, and this is the hottest line
        return output

    def _call(self) -> Call:
        return self._run

    def _run_with_state(self, value: Any, context: Any, state: RunState) -> Coroutine[Any, Any, Any]:
        """Run as the outermost pipeline, with a deadline or with observers, here or further inside."""
        if self.observers:
            return self._run_observed(value, context, state, is_outermost=True)
        return self._run_bound(value, context, state)

    def _run_bound(self, value: Any, context: Any, state: RunState) -> Coroutine[Any, Any, Any]:
        run = self._run_all(value, context, state)
        return run if state.deadline.scope is None else state.bound(run, self.name)

    async def _run_observed(self, value: Any, context: Any, outer: RunState, *, is_outermost: bool) -> Any:
        """Run, alone or as a step, and tell the observers that it starts, and how it ends."""
        skip = 0 if outer.path is None else len(outer.path) + 1
        observers = self.observers, self.observers[::-1]
        watch = Watch(*observers, self.name, new_run_id(), skip, self.on_hook_error)
        state = outer.watched_by(watch)
        run = self._run_bound if is_outermost else self._run_all
        outcome: OutcomeName = "ok"
        cause: BaseException | None = None
        started = state.deadline.clock()
        about = watch.run_id, self.name, None, state.item_index, state.element
        try:
            watch.tell(Event("run_start", started, *about))
            return await run(value, context, state)
        except BaseException as error:
            # of the outermost run, a deadline is an error of its own
            outcome = outcome_of(error, not is_outermost and state.is_over())
            cause = None if outcome == "finished" else error
            if is_outermost and state.item_index is not None and isinstance(error, StageExecutionError):
                cause = error.of_item(state.item_index, value)
            raise
        finally:
            now = state.deadline.clock()
            try:
                watch.tell(EndEvent("run_end", now, *about, outcome, 1, now - started, cause))
            finally:
                del cause  # its traceback holds this frame

    @property
    def _run_item(self) -> Callable[..., Coroutine[Any, Any, Any]] | None:
        """How to run an item of a batch, where those who watch are to know its index."""
        is_own = getattr(self.run, "__func__", None) is Pipeline.run
        return self._run_numbered if self._is_watched and is_own else None

    async def _run_numbered(self, value: Any, context: Any, index: int, timeout: float | None) -> Any:
        try:
            return await self._run_with_state(value, context, RunState(timeout, index))
        except Finish as finish:
            return finish.value

    async def _run(self, value: Any, context: Any, state: RunState | None = None) -> Any:
        """Run as a step of another pipeline."""
        run: Any = self.run
        try:
            if getattr(run, "__func__", None) is not Pipeline.run:
                return await run(value, context=context)  # a subclass's own
            if self.observers:
                outer = RunState() if state is None else state
                return await self._run_observed(value, context, outer, is_outermost=False)
            return await self._run_all(value, context, state)
        except StageExecutionError as error:
            raise error.within(self.name)  # noqa: B904 - it has its cause already
        except asyncio.CancelledError as error:
            mark_within(error, self.name)
            raise

    async def _run_all(self, value: Any, context: Any, state: RunState | None) -> Any:
        """The general loop: with hooks, with the state of a run, and as a step of another pipeline."""
        # the hooks are called here and not by a coroutine of their own: that took 2.5 times as long
        before, before_wants = self._before
        after, after_wants = self._after
        shown = limited = None
        if state is not None:
            shown = state if state.watches else None
            limited = state if state.deadline.scope is not None else None
        try:
            for name, call, wants, is_async, link in self._links:
                if state is not None:
                    state.begin_stage()
                try:
                    # inside the try: an after_stage belongs to a before_stage that was cancelled, too
                    if before is not None:
                        try:
                            fired = before(name, value, context) if before_wants else before(name, value)
                            if fired is not None and is_awaitable(fired):
                                await fired
                        except Exception as error:
                            report(before, f"stage {name!r}", error, self.on_hook_error)
                            raise_cancellation(error)
                        if limited is not None:
                            limited.check()
                    try:
                        if state is None:
                            output = call(value, context) if wants else call(value)
                        elif shown is not None:
                            output = link.watched.run(value, context, shown)
                        elif wants == _WITH_STATE:
                            output = call(value, context, state)
                        else:
                            output = call(value, context) if wants else call(value)
                        if (
                            is_async
                            or shown is not None
                            or (type(output) not in NEVER_AWAITABLE and is_awaitable(output))
                        ):
                            output = await output
                    except Exception as error:
                        if link.is_direct and shown is None:
                            raise StageExecutionError(name, error) from error
                        raise
                    except BaseExceptionGroup as group:
                        if not is_finish(group):
                            raise
                        raise finish_of(group) from None
                except Finish as finish:
                    await fire(
                        self._after,
                        context,
                        name,
                        value,
                        finish.value,
                        None,
                        on_hook_error=self.on_hook_error,
                    )
                    raise
                except BaseException as error:
                    await fire(
                        self._after, context, name, value, None, error, on_hook_error=self.on_hook_error
                    )
                    raise
                if after is not None:
                    try:
                        fired = (
                            after(name, value, output, None, context)
                            if after_wants
                            else after(name, value, output, None)
                        )
                        if fired is not None and is_awaitable(fired):
                            await fired
                    except Exception as error:
                        report(after, f"stage {name!r}", error, self.on_hook_error)
                        raise_cancellation(error)
                value = output
                if limited is not None and not link.is_last:
                    limited.check()
        except asyncio.CancelledError as error:
            _mark(error, link, 1 if state is None else state.attempts)
            raise
        return value

    async def try_run(
        self, initial_value: First, *, context: ContextT | None = None, timeout: float | None = None
    ) -> Outcome[Last]:
        """Run one value like :meth:`run`, and return what became of it instead of raising.

        Args:
            initial_value: as for :meth:`run`.
            context: as for :meth:`run`.
            timeout: as for :meth:`run`.

        Returns:
            An :class:`Outcome` with the value, or with the ``Exception``. Cancellation and other
            exceptions that are no ``Exception`` propagate.
        """
        if timeout is not None:
            check_seconds("timeout", timeout, zero=False)  # a wrong argument is none of the value's errors
        shared: Any = {} if context is None else context
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            run = self.run if timeout is None else partial(self.run, timeout=timeout)
            value = await run(initial_value, context=shared)
        except Exception as error:
            return Outcome(None, initial_value, None, error, shared, clock() - started)
        return Outcome(None, initial_value, value, None, shared, clock() - started)

    @overload
    async def map(
        self,
        items: Iterable[First] | AsyncIterable[First],
        concurrency: int | asyncio.Semaphore = 5,
        *,
        context: ContextT | None = None,
        return_exceptions: Literal[False] = False,
        timeout: float | None = None,
        progress: Progress | None = None,
        journal: "Journal | None" = None,
        engine: "Engine | None" = None,
    ) -> list[Last]: ...
    @overload
    async def map(
        self,
        items: Iterable[First] | AsyncIterable[First],
        concurrency: int | asyncio.Semaphore = 5,
        *,
        context: ContextT | None = None,
        return_exceptions: bool,
        timeout: float | None = None,
        progress: Progress | None = None,
        journal: "Journal | None" = None,
        engine: "Engine | None" = None,
    ) -> list[Last | Exception]: ...
    @advised("pipeline.map(items, concurrency=20)", MAP)
    async def map(
        self,
        items: Iterable[First] | AsyncIterable[First],
        concurrency: int | asyncio.Semaphore = 5,
        *,
        context: ContextT | None = None,
        return_exceptions: bool = False,
        timeout: float | None = None,
        progress: Progress | None = None,
        journal: "Journal | None" = None,
        engine: "Engine | None" = None,
    ) -> list[Last] | list[Last | Exception]:
        """Run every item through the pipeline, side by side, and return the results in input order.

        Items are pulled as they are needed, never further ahead than ``concurrency``. Each sees its own
        copy of the caller's context variables; what it sets reaches no other item. Several items may
        share a task one after the other, so state keyed by ``asyncio.current_task()`` outlives an item.

        Args:
            items: any iterable or async iterable; a str is one of its characters, a dict one of its keys.
                Generators, and async iterators with an ``aclose``, are closed at the end; a file or a cursor
                stays the caller's.
            concurrency: how many items are in flight at most; 5 by default. An :class:`asyncio.Semaphore`
                may be given instead and shared by several calls; it is held only while an item runs.
                A handler that maps over the same semaphore its own item holds can deadlock.
            context: each item gets a shallow copy (its ``copy()``, else :func:`copy.copy`); new dicts by
                default.
            return_exceptions: False (the default): the first failure cancels the rest. True: a failed
                item's error stands in its place in the list.
            timeout: seconds for each item, from its start to its end, as in :meth:`run`.
            progress: a sync ``(done, failed, total)``, called at most ten times a second while items end, and
                once at the end, also of a batch that fails: how many items have ended, how many of them
                failed, and how many there are, or ``None`` if ``items`` has no length. It counts as a hook.
            journal: a :class:`~async_pipeline.journal.Journal`, a file that keeps what has finished, so that
                the same call after a crash runs the rest only.
            engine: an :class:`~async_pipeline.engine.Engine`, workers in other processes, or on other
                machines, that run the items in chunks. ``concurrency`` is then that inside each chunk.

        Returns:
            The outputs, in the order of the items; with ``return_exceptions=True``, errors among them.

        Raises:
            BatchError: an item failed; carries ``results`` and ``failures`` by item index.
            TypeError, ValueError: ``items`` or ``concurrency`` is wrong.
            JournalError, EngineError: the journal or the engine can't be used, which cancels the rest.
            Exception: an error of the source is raised as itself, and cancels the rest.
        """
        step, bound = self._carried_by(journal, engine, concurrency, context, timeout)
        batch = Batch(step, items, bound, context, timeout, progress, return_exceptions=return_exceptions)
        return cast("list[Last]", await batch.run())

    @advised("pipeline.stream(items, concurrency=20)", STREAM)
    def stream(
        self,
        items: Iterable[First] | AsyncIterable[First],
        concurrency: int | asyncio.Semaphore = 5,
        *,
        ordered: bool = True,
        buffer: int | None = None,
        context: ContextT | None = None,
        timeout: float | None = None,
        progress: Progress | None = None,
        journal: "Journal | None" = None,
        engine: "Engine | None" = None,
    ) -> Stream[Last]:
        """Run items through the pipeline like :meth:`map`, and yield the results while others still run.

        >>> async with pipeline.stream(urls, concurrency=20) as results:
        ...     async for value in results: ...          # or: async for outcome in results.outcomes()

        Leaving the ``async with``, by ``break``, error or cancellation, cancels what runs, and ends with
        no task alive and the source closed. A failed item is raised by the iteration, in its turn, and
        ends the stream; ``results.outcomes()`` goes on instead.

        Args:
            items, concurrency, context, timeout, progress, journal, engine: as for :meth:`map`.
            ordered: True (the default) yields in input order, each as soon as it and all before it are
                ready; False as they finish.
            buffer: how many items are in flight or finished but not yet taken, at most; memory is bounded
                by it. By default 2 * ``concurrency``, or 64 with a Semaphore; with an engine, two times what
                may be in flight there.

        Returns:
            A :class:`~async_pipeline.fanout.Stream`, to be entered with ``async with``.

        Raises:
            TypeError, ValueError: an argument is wrong.
            StageExecutionError: by the iteration, for a failed item.
            JournalError, EngineError: by ``async with``, or by the iteration.
        """
        step, bound = self._carried_by(journal, engine, concurrency, context, timeout)
        if engine is not None and buffer is not None and buffer < engine.chunk_size:
            raise ValueError(
                f"buffer must be at least the engine's chunk_size, {engine.chunk_size}, not {buffer}"
            )
        return Stream(step, items, bound, context, timeout, progress, ordered=ordered, buffer=buffer)

    def _carried_by(
        self,
        journal: "Journal | None",
        engine: "Engine | None",
        concurrency: int | asyncio.Semaphore,
        context: object,
        timeout: float | None,
    ) -> "tuple[Step[First, Last], int | asyncio.Semaphore]":
        """What runs the items of a batch, and how many of them at a time."""
        step: Any = self
        if journal is not None and (isinstance(journal, type) or not hasattr(journal, "around")):
            raise TypeError(f"journal must be a Journal, not {journal!r}; write journal=Journal('batch.db')")
        if engine is not None:
            from .engine import EngineStep

            step = EngineStep(self, engine, concurrency, context, timeout)
            concurrency = step.in_flight
        if journal is not None:
            step = journal.around(step, self)
        return step, concurrency

    def replace(self, **options: Any) -> Self:
        """Return a pipeline like this one with other options, ``stages`` or ``name``.

        >>> watched = pipeline.replace(observers=[*pipeline.observers, print])

        A subclass's constructor is not called: what it has set is copied.
        """
        given = {"stages": self.stages, "name": self.name, **self._options(), **options}
        if type(self) is Pipeline:
            return cast(Self, Pipeline(**given))
        pipeline = copy(self)
        Pipeline.__init__(pipeline, **given)
        return pipeline

    def to_mermaid(self) -> str:
        """Return the pipeline as a Mermaid flowchart, which GitHub, GitLab and many editors render.

        Pipelines and steps with others inside are subgraphs; timeouts, retries and the like stand on the
        labels. ``str(pipeline)`` is the same as an indented tree, for a terminal.
        """
        from .draw import to_mermaid

        return to_mermaid(self)

    def __str__(self) -> str:
        from .draw import to_tree

        return to_tree(self)

    def dumps(self, *, registry: Mapping[str, Any] | None = None) -> str:
        """Return the pipeline as JSON text, from which :meth:`loads` builds it again.

        The text holds the structure, all names and options, and each handler by a name: the one that it has
        in ``registry``, else its ``module:qualname``. A :func:`functools.partial` of such a handler is
        written with its arguments, if they are JSON.

        Args:
            registry: names, and the callables, exception types and objects with ``name`` and ``run`` that
                are called so; for what has no name by which it could be imported.

        Raises:
            ValueError: something can't be written: a lambda, a local function, a bound method or an object
                that is not registered, a limiter, an executor other than ``"thread"``, a retry budget, a
                shared semaphore. The message says what it is, and of which step.
        """
        from .text import dumps

        return dumps(self, registry)

    @classmethod
    def loads(
        cls, text: str, *, registry: Mapping[str, Any] | None = None, allow_import: Sequence[str] = ()
    ) -> "Pipeline[Any, Any]":
        """Build a pipeline from the text that :meth:`dumps` has written.

        Text that may import can run anything, so by default it gets no handlers but those of the registry.
        These it may call with arguments of its own choice, through ``partial``. Exceptions of Python's own
        may always be named.

        >>> Pipeline.loads(text, registry={"shop:fetch": fetch, "shop:save": save})
        >>> Pipeline.loads(text, allow_import=["shop"])

        Args:
            text: what ``dumps`` returned.
            registry: the handlers that the text may name, by name: ``module:qualname``, or what ``dumps``
                was told; exception types, too. A :class:`Stage` stands for its handler, so that what
                ``@staged`` made can be given.
            allow_import: the modules, with all below them, from which handlers may be imported by their
                ``module:qualname``: functions and classes that are defined there, not what is imported there.
                To import a module is to run it.

        Raises:
            ValueError: the text is no JSON, of another version, has unknown fields or wrong values, or names
                what is neither registered nor allowed. The message says where in the text.
            ImportError: an allowed module can't be imported, whatever its code has raised.
        """
        from .text import loads

        return loads(text, registry, allow_import)

    @property
    def _is_plain(self) -> bool:
        """Whether its stages can join others without it."""
        return not self._options()

    def _options(self) -> dict[str, Any]:
        """What it was given besides its stages and its name."""
        options = {
            "before_stage": self._before[0],
            "after_stage": self._after[0],
            "middlewares": self.middlewares,
            "observers": self.observers,
            "on_hook_error": self.on_hook_error,
        }
        return {option: value for option, value in options.items() if value not in (None, ())}

    def _structure(self) -> Structure:
        options = self._options()
        return Structure("pipeline", options, [Part("stage", step.name, step) for step in self.stages])

    def __repr__(self) -> str:
        stages = ", ".join(map(repr, self.stages))
        return f"{type(self).__name__}([{stages}], name={self.name!r})"


def _as_steps(stages: Any) -> tuple[Step[Any, Any], ...]:
    # neither a set, whose order is anybody's guess, nor a mapping, of which only the keys would be looked at
    if isinstance(stages, (str, set, frozenset, Mapping, Stage, Pipeline)) or not isinstance(
        stages, Iterable
    ):
        raise TypeError(f"stages must be a list of stages, not {stages!r}; write Pipeline([fetch, parse])")
    message = "stages must hold stages, pipelines, callables, or objects with name and run"
    steps = tuple(as_step(step, message) for step in stages)
    if not steps:
        raise ValueError("Pipeline requires at least one stage")
    return steps


def _checked_middlewares(middlewares: Any) -> tuple[Middleware, ...]:
    if isinstance(middlewares, str) or (callable(middlewares) and not isinstance(middlewares, Iterable)):
        raise TypeError(
            f"middlewares must be a list of callables, not {middlewares!r}; write middlewares=[middleware]"
        )
    checked = tuple(middlewares or ())
    for middleware in checked:
        if not callable(middleware) or isinstance(middleware, type):
            raise TypeError(
                "middlewares must hold callables (next, stage_name, value, context), "
                f"not {middleware!r}; of a class, an instance"
            )
        try:
            check_own_arguments(middleware, "middleware(next, stage_name, value, context)")
        except TypeError as error:
            raise TypeError(f"a middleware {middleware!r} can't be used: {error}") from None
    return checked


def _link(step: Any, middlewares: Sequence[Middleware]) -> _Link:
    if type(step) is Stage and not middlewares and step._is_once:
        return _direct_link(step)
    call = call_of(step)
    for middleware in reversed(middlewares):
        call = _fold(middleware, step.name, call)
    return step.name, call, _WITH_STATE, True, _Stop(step.name, False, watched(step, step.name, call))


def _direct_link(stage: Stage[Any, Any]) -> _Link:
    about = _Stop(stage.name, True, watched(stage, stage.name, call_of(stage)))
    if stage.limiter is not None:
        return stage.name, stage._limited, _WITH_CONTEXT, True, about
    if stage._is_plain:
        return stage.name, stage.handler, stage._wants_context * _WITH_CONTEXT, stage._is_async, about
    return stage.name, stage._attempt, _WITH_CONTEXT, True, about


def _fold(middleware: Middleware, stage_name: str, inner: Call) -> Call:
    async def call(value: Any, context: Any, state: RunState | None = None) -> Any:
        def next_stage(value: Any) -> Any:
            if state is not None:
                state.check()  # not even for a middleware that calls it again and again
            return inner(value, context, state)

        result = middleware(next_stage, stage_name, value, context)
        return await result if is_awaitable(result) else result

    return call


def _mark(error: asyncio.CancelledError, link: _Stop, attempts: int = 1) -> None:
    """Note on a cancellation that it left this step, unless the step has done so itself."""
    path, _ = cancelled_in(error) or ("", 1)
    if link.is_direct or not f"{path}/".startswith(f"{link.name}/"):
        mark_cancelled(error, link.name, attempts)
