"""What code that was written for versions 0.6 to 1.1 relies on; each of these runs unchanged."""

import asyncio
import copy
import importlib
import inspect
import logging
import subprocess
import sys
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import pytest

import async_pipeline
from async_pipeline import (
    AfterStageHook,
    BackoffMode,
    BeforeStageHook,
    Middleware,
    Pipeline,
    PipelineError,
    Stage,
    StageExecutionError,
)
from async_pipeline.middlewares import LoggingMiddleware, RetryMiddleware, TimeoutMiddleware, TimingMiddleware
from async_pipeline.types import ContextT, DefaultContext

T = TypeVar("T")
U = TypeVar("U")
Next = Callable[[Any], Awaitable[Any]]


async def add_one(value: int) -> int:
    return value + 1


def double(value: int) -> int:
    return value * 2


async def fail(value: Any) -> Any:
    raise RuntimeError(f"bad {value}")


class TestNames:
    @pytest.mark.parametrize("module", ["errors", "types", "stage", "pipeline", "middlewares"])
    def test_the_modules(self, module: str) -> None:
        imported = importlib.import_module(f"async_pipeline.{module}")
        assert imported.__name__ == f"async_pipeline.{module}"
        assert getattr(async_pipeline, module) is imported

    @pytest.mark.parametrize(
        ("module", "names"),
        [
            ("", "AfterStageHook BackoffMode BeforeStageHook Middleware Pipeline PipelineError Stage"),
            ("", "StageExecutionError"),
            ("errors", "PipelineError StageExecutionError"),
            ("types", "AfterStageHook BeforeStageHook ContextT DefaultContext Middleware"),
            ("stage", "BackoffMode Stage asyncio"),
            ("pipeline", "Pipeline"),
            ("middlewares", "LoggingMiddleware RetryMiddleware TimeoutMiddleware TimingMiddleware"),
            ("middlewares.logging", "LoggingMiddleware logging"),
            ("middlewares.retry", "RetryMiddleware asyncio"),
            ("middlewares.timeout", "TimeoutMiddleware asyncio"),
            ("middlewares.timing", "TimingMiddleware time"),
        ],
    )
    def test_where_they_are(self, module: str, names: str) -> None:
        imported = importlib.import_module(f"async_pipeline.{module}".rstrip("."))
        for name in names.split():
            assert hasattr(imported, name), name

    def test_are_the_same_everywhere(self) -> None:
        assert async_pipeline.stage.Stage is Stage
        assert async_pipeline.stage.BackoffMode is BackoffMode
        assert async_pipeline.pipeline.Pipeline is Pipeline
        assert async_pipeline.errors.StageExecutionError is StageExecutionError
        assert async_pipeline.types.Middleware is Middleware

    def test_backoff_modes_can_be_listed(self) -> None:
        assert typing.get_args(BackoffMode) == ("fixed", "exponential")

    def test_a_stars_import(self) -> None:
        names: dict[str, Any] = {}
        exec("from async_pipeline import *", names)
        assert names["Stage"] is Stage
        assert names["StageExecutionError"] is StageExecutionError

    def test_the_version_is_a_string_of_numbers(self) -> None:
        assert all(part.isdigit() for part in async_pipeline.__version__.split("."))


class TestStage:
    def test_the_signature(self) -> None:
        parameters = inspect.signature(Stage).parameters
        assert list(parameters)[:6] == ["name", "handler", "timeout", "retries", "retry_delay", "backoff"]
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        assert (defaults["timeout"], defaults["retries"]) == (None, 0)
        assert (defaults["retry_delay"], defaults["backoff"]) == (0.0, "fixed")

    def test_by_keywords(self) -> None:
        stage = Stage(
            name="add", handler=add_one, timeout=1.5, retries=2, retry_delay=0.25, backoff="exponential"
        )
        assert (stage.name, stage.timeout, stage.retries) == ("add", 1.5, 2)
        assert (stage.retry_delay, stage.backoff) == (0.25, "exponential")

    async def test_run_takes_a_value_and_perhaps_a_context(self) -> None:
        stage: Stage[int, int] = Stage("add", add_one)
        assert await stage.run(1) == 2
        assert await stage.run(1, context=None) == 2
        assert await stage.run(value=1, context={"any": "thing"}) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"timeout": 0}, "timeout must be greater than 0"),
            ({"timeout": -1.0}, "timeout must be greater than 0"),
            ({"retries": -1}, "retries must be greater than or equal to 0"),
            ({"retry_delay": -0.1}, "retry_delay must be greater than or equal to 0"),
            ({"backoff": "linear"}, 'backoff must be "fixed" or "exponential"'),
        ],
    )
    def test_the_messages(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=rf"^{message}$"):
            Stage("add", add_one, **options)

    async def test_the_error(self) -> None:
        with pytest.raises(PipelineError) as caught:
            await Stage("add", fail).run(1)
        error = caught.value
        assert isinstance(error, StageExecutionError)
        assert error.stage_name == "add"
        assert isinstance(error.original_error, RuntimeError)
        assert error.__cause__ is error.original_error
        assert str(error) == "Stage 'add' failed: RuntimeError('bad 1')"

    def test_an_error_can_be_made_by_hand(self) -> None:
        error = StageExecutionError("add", ValueError("x"))
        assert str(error) == "Stage 'add' failed: ValueError('x')"
        assert error.args == ("Stage 'add' failed: ValueError('x')",)

    @pytest.mark.virtual
    async def test_a_timeout_is_a_timeout_error(self) -> None:
        async def slow(value: int) -> int:
            await asyncio.sleep(1)
            return value

        with pytest.raises(StageExecutionError) as caught:
            await Stage("slow", slow, timeout=0.5).run(1)
        assert isinstance(caught.value.original_error, TimeoutError)

    async def test_sleep_can_be_patched_in_the_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []

        async def fake(delay: float) -> None:
            slept.append(delay)

        monkeypatch.setattr("async_pipeline.stage.asyncio.sleep", fake)
        stage = Stage("add", fail, retries=3, retry_delay=1.0, backoff="exponential")
        with pytest.raises(StageExecutionError):
            await stage.run(1)
        with pytest.raises(StageExecutionError):
            await Pipeline([stage]).run(1)
        monkeypatch.undo()
        assert slept == [1.0, 2.0, 4.0] * 2

    async def test_a_subclass_with_a_run_of_its_own(self) -> None:
        class Guarded(Stage[int, int]):
            def __init__(self, limit: int) -> None:
                super().__init__("guarded", double, retries=1)
                self.limit = limit

            async def run(self, value: int, *, context: Any = None) -> int:
                context["seen"] = value
                return min(await super().run(value, context=context), self.limit)

        context: dict[str, Any] = {}
        pipeline: Pipeline[int, int] = Pipeline([Guarded(5), Stage("add", add_one)])
        assert await pipeline.run(4, context=context) == 6
        assert context == {"seen": 4}

    async def test_a_subclass_that_never_calls_the_constructor(self) -> None:
        class Bare(Stage[int, int]):
            def __init__(self) -> None:
                self.name = "bare"

            async def run(self, value: int, *, context: Any = None) -> int:
                return -value

        seen: list[str] = []
        pipeline: Pipeline[int, int] = Pipeline(
            [Bare()], before_stage=lambda name, value: seen.append(name), middlewares=[TimingMiddleware()]
        )
        assert await pipeline.run(4) == -4
        assert seen == ["bare"]

    async def test_any_object_with_name_and_run(self) -> None:
        class Fake:
            name = "fake"

            async def run(self, value: Any, *, context: object = None) -> Any:
                return value, context

        context = {"a": 1}
        pipeline: Pipeline[int, Any] = Pipeline([Fake()])
        assert await pipeline.run(1, context=context) == (1, context)


class TestPipeline:
    def test_the_signatures(self) -> None:
        assert next(iter(inspect.signature(Pipeline).parameters)) == "stages"
        run = inspect.signature(Pipeline.run).parameters
        assert list(run)[:3] == ["self", "initial_value", "context"]
        assert run["context"].kind is inspect.Parameter.KEYWORD_ONLY
        batch = inspect.signature(Pipeline.map).parameters
        assert list(batch)[:5] == ["self", "items", "concurrency", "context", "return_exceptions"]
        assert (batch["concurrency"].default, batch["return_exceptions"].default) == (5, False)
        assert batch["context"].kind is inspect.Parameter.KEYWORD_ONLY

    async def test_stages_in_a_row_by_position_and_by_keyword(self) -> None:
        stages = [Stage("add", add_one), Stage("double", double)]
        assert await Pipeline(stages).run(10) == 22
        assert await Pipeline(stages=tuple(stages)).run(initial_value=10, context=None) == 22
        assert await Pipeline(stages, before_stage=None, after_stage=None, middlewares=None).map(
            items=[1, 2], concurrency=2
        ) == [4, 6]

    @pytest.mark.parametrize("stages", [[], ()])
    def test_no_stages(self, stages: Any) -> None:
        with pytest.raises(ValueError, match=r"^Pipeline requires at least one stage$"):
            Pipeline(stages)

    def test_later_changes_of_the_list_do_not_matter(self) -> None:
        stages: list[Any] = [Stage("add", add_one)]
        pipeline: Pipeline[int, int] = Pipeline(stages)
        stages.append(Stage("fail", fail))
        assert asyncio.run(pipeline.run(1)) == 2

    def test_subscripts(self) -> None:
        pipeline: Any = Pipeline
        assert typing.get_args(Pipeline[int, str])[:2] == (int, str)
        assert typing.get_args(Pipeline[int, str, dict[str, Any]]) == (int, str, dict[str, Any])
        assert typing.get_args(Stage[int, str]) == (int, str)
        assert pipeline[T, U, ContextT].__parameters__ == (T, U, ContextT)
        for parameters in [(int,), (int, str, dict, list)]:
            with pytest.raises(TypeError):
                pipeline[parameters]

    async def test_a_subscript_can_be_called_and_inherited(self) -> None:
        assert await Pipeline[int, int]([Stage[int, int]("add", add_one)]).run(1) == 2
        assert await Pipeline[int, int, dict[str, Any]]([Stage("add", add_one)]).run(1) == 2

        class Numbers(Pipeline[int, int]):
            pass

        class Generics(Pipeline[T, U], Generic[T, U]):
            def __init__(self, stages: list[Any], label: str) -> None:
                super().__init__(stages)
                self.label = label

        assert await Numbers([Stage("add", add_one)]).run(1) == 2
        generic = Generics[int, int]([Stage("add", add_one)], "mine")
        assert (await generic.run(1), generic.label) == (2, "mine")

    def test_annotations_are_made_at_run_time(self) -> None:
        def build(hook: BeforeStageHook, other: AfterStageHook, around: Middleware) -> Pipeline[int, int]:
            return Pipeline([Stage("add", add_one)])

        assert typing.get_type_hints(build)["return"] == Pipeline[int, int]
        assert isinstance(ContextT, TypeVar)
        context: DefaultContext = {"a": 1}
        assert context


class TestMap:
    async def test_in_order_with_a_positional_concurrency(self) -> None:
        pipeline: Pipeline[int, int] = Pipeline([Stage("add", add_one)])
        assert await pipeline.map(range(10), 3) == list(range(1, 11))
        assert await pipeline.map([]) == []
        assert await pipeline.map(iter([1])) == [2]

    @pytest.mark.parametrize("items", [[], [1]])
    async def test_a_concurrency_below_one(self, items: list[int]) -> None:
        with pytest.raises(ValueError, match=r"^concurrency must be at least 1$"):
            await Pipeline([Stage("add", add_one)]).map(items, concurrency=0)

    async def test_a_failure_is_an_exception_group(self) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await Pipeline([Stage("fail", fail)]).map([1])
        (error,) = caught.value.exceptions
        assert isinstance(error, StageExecutionError)
        assert isinstance(error.original_error, RuntimeError)

        caught_by_star: list[Any] = []
        try:
            await Pipeline([Stage("fail", fail)]).map([1, 2])
        except* StageExecutionError as group:
            caught_by_star.extend(group.exceptions)
        assert {each.stage_name for each in caught_by_star} == {"fail"}

    async def test_failures_among_the_results(self) -> None:
        async def picky(value: int) -> int:
            return value if value != 2 else await fail(value)

        results = await Pipeline([Stage("picky", picky)]).map([1, 2, 3], return_exceptions=True)
        assert (results[0], results[2]) == (1, 3)
        assert isinstance(results[1], StageExecutionError)


class Typed(TypedDict):
    request: str
    count: int


@dataclass
class Request:
    request: str
    count: int = 0
    seen: list[int] = field(default_factory=list)


class Slotted:
    __slots__ = ()


class Copying:
    def __init__(self, copies: int = 0) -> None:
        self.copies = copies

    def copy(self) -> "Copying":
        return Copying(self.copies + 1)


class TestContext:
    async def test_one_object_for_all_of_a_run(self) -> None:
        seen: list[Any] = []

        async def handler(value: int, context: Any) -> int:
            seen.append(context)
            return value

        def before(name: str, value: Any, context: Any) -> None:
            seen.append(context)

        async def after(name: str, value: Any, output: Any, error: Exception | None, context: Any) -> None:
            seen.append(context)

        async def around(next_fn: Next, stage: str, value: Any, context: Any) -> Any:
            seen.append(context)
            return await next_fn(value)

        pipeline: Pipeline[int, int, Any] = Pipeline(
            [Stage("a", handler), Stage("b", handler)],
            before_stage=before,
            after_stage=after,
            middlewares=[around],
        )
        typed: Typed = {"request": "r", "count": 0}
        contexts: list[Any] = [{}, typed, Request("r"), Slotted()]
        for context in contexts:
            seen.clear()
            await pipeline.run(1, context=context)
            assert len(seen) == 8
            assert all(each is context for each in seen)

    async def test_a_new_dict_by_default(self) -> None:
        async def count(value: int, context: dict[str, Any]) -> int:
            context["count"] = context.get("count", 0) + 1
            return int(context["count"])

        pipeline: Pipeline[int, int] = Pipeline([Stage("a", count), Stage("b", count)])
        assert [await pipeline.run(0), await pipeline.run(0, context=None)] == [2, 2]

    async def test_an_optional_context_is_passed_by_its_name(self) -> None:
        def handler(value: int, context: dict[str, Any] | None = None) -> Any:
            return context

        context = {"a": 1}
        assert await Pipeline([Stage("a", handler)]).run(1, context=context) is context

    @pytest.mark.parametrize(
        "template",
        [{"request": "r", "count": 0}, Request("r")],
        ids=["dict", "dataclass"],
    )
    async def test_a_shallow_copy_for_each_item(self, template: Any) -> None:
        copies: list[Any] = []

        async def handler(value: int, context: Any) -> int:
            copies.append(context)
            return value

        before = copy.deepcopy(template)
        await Pipeline([Stage("a", handler)]).map([1, 2, 3], context=template)
        assert len({id(each) for each in [template, *copies]}) == 4
        assert all(each == template for each in copies)
        assert template == before
        if isinstance(template, Request):
            assert all(each.seen is template.seen for each in copies)

    async def test_its_own_copy_method_comes_first(self) -> None:
        results = await Pipeline([Stage("a", lambda value, context: context.copies)]).map(
            [1, 2], context=Copying()
        )
        assert results == [1, 1]


class TestHooks:
    async def test_both_arities_sync_and_async(self) -> None:
        calls: list[Any] = []

        def before(name: str, value: object) -> None:
            calls.append((name, value))

        async def after(name: str, value: object, output: object | None, error: Exception | None) -> None:
            await asyncio.sleep(0)
            calls.append((name, value, output, error))

        # a variable of the alias' type: a type checker accepts a hook annotated with Exception | None
        annotated: AfterStageHook = after
        pipeline: Pipeline[int, int] = Pipeline(
            [Stage("add", add_one)], before_stage=before, after_stage=annotated
        )
        assert await pipeline.run(1) == 2
        assert calls == [("add", 1), ("add", 1, 2, None)]

    async def test_after_stage_sees_the_stages_error(self) -> None:
        seen: list[Any] = []

        def after(name: str, value: Any, output: Any, error: Exception | None) -> None:
            seen.append((name, value, output, error))

        with pytest.raises(StageExecutionError) as caught:
            await Pipeline([Stage("fail", fail)], after_stage=after).run(1)
        assert seen == [("fail", 1, None, caught.value)]

    async def test_their_errors_break_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        def broken(*args: Any) -> None:
            raise LookupError("hook")

        async def async_broken(*args: Any) -> None:
            raise LookupError("hook")

        for hook in (broken, async_broken):
            hooks: Any = {"before_stage": hook, "after_stage": hook}
            assert await Pipeline([Stage("add", add_one)], **hooks).run(1) == 2
            with pytest.raises(StageExecutionError):
                await Pipeline([Stage("fail", fail)], **hooks).run(1)
        assert len(caplog.records) == 8


class TestMiddlewares:
    async def test_the_first_is_the_outermost(self) -> None:
        calls: list[str] = []

        def noting(name: str) -> Middleware:
            async def middleware(next_fn: Next, stage: str, value: Any, context: object) -> Any:
                calls.append(f"{name} in {stage}")
                output = await next_fn(value)
                calls.append(f"{name} out {stage}")
                return output

            return middleware

        await Pipeline([Stage("add", add_one)], middlewares=(noting("a"), noting("b"))).run(1)
        assert calls == ["a in add", "b in add", "b out add", "a out add"]

    async def test_sync_ones_return_a_value_or_an_awaitable(self) -> None:
        def passing(next_fn: Next, stage: str, value: Any, context: object) -> Any:
            return next_fn(value)

        def answering(next_fn: Next, stage: str, value: Any, context: object) -> Any:
            return -value

        assert await Pipeline([Stage("add", add_one)], middlewares=[passing]).run(1) == 2
        assert await Pipeline([Stage("add", add_one)], middlewares=[passing, answering]).run(1) == -1

    async def test_an_object_with_an_async_call(self) -> None:
        class Twice:
            async def __call__(self, next_fn: Next, stage: str, value: Any, context: object) -> Any:
                return await next_fn(await next_fn(value))

        assert await Pipeline([Stage("add", add_one)], middlewares=[Twice()]).run(1) == 3

    async def test_their_errors_leave_as_they_are(self) -> None:
        def broken(next_fn: Next, stage: str, value: Any, context: object) -> Any:
            raise LookupError("mine")

        with pytest.raises(LookupError, match=r"mine"):
            await Pipeline([Stage("add", add_one)], middlewares=[broken]).run(1)

    async def test_the_ready_made_ones(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="async_pipeline")
        context: dict[str, Any] = {}
        pipeline: Pipeline[int, int] = Pipeline(
            [Stage("add", add_one)],
            middlewares=[
                LoggingMiddleware(logger=None, level=logging.INFO, include_value=True),
                TimingMiddleware(context_key="seconds"),
                RetryMiddleware(retries=3, delay=0.0, backoff="fixed"),
                TimeoutMiddleware(timeout=5.0),
            ],
        )
        assert await pipeline.run(1, context=context) == 2
        assert caplog.messages == ["Starting stage: add input=1", "Finished stage: add output=2"]
        assert list(context["seconds"]) == ["add"]
        assert context["seconds"]["add"][0] >= 0

    def test_their_signatures(self) -> None:
        signatures = {
            LoggingMiddleware: "(logger=None, level=20, *, include_value=False)",
            TimingMiddleware: "(context_key='timings')",
            RetryMiddleware: "(retries=3, delay=0.0, backoff='fixed')",
            TimeoutMiddleware: "(timeout)",
        }
        for middleware, expected in signatures.items():
            signature = inspect.signature(middleware)
            bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
            assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == expected

    async def test_sleep_can_be_patched_in_asyncio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []

        async def fake(delay: float) -> None:
            slept.append(delay)

        monkeypatch.setattr(asyncio, "sleep", fake)
        with pytest.raises(StageExecutionError):
            await Pipeline([Stage("fail", fail)], middlewares=[RetryMiddleware(3, 1.0, "exponential")]).run(1)
        monkeypatch.undo()
        assert slept == [1.0, 2.0, 4.0]


def test_runs_from_a_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import asyncio\n"
        "from async_pipeline import Pipeline, Stage\n"
        "print(asyncio.run(Pipeline([Stage('double', lambda value: value * 2)]).run(21)))\n"
    )
    source = Path(async_pipeline.__file__).parent.parent
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(source)}, check=False
    )
    assert (done.stdout, done.stderr) == ("42\n", "")
