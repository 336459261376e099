"""A pipeline as JSON text: what is written, what is refused, what a text may reach, and that it runs."""

import asyncio
import builtins
import datetime
import enum
import functools
import inspect
import json
import math
import subprocess
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import async_pipeline
from async_pipeline import (
    Pipeline,
    PipelineError,
    RetryBudget,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
    staged,
)
from async_pipeline.stage import StageOptions
from async_pipeline.steps import Each
from async_pipeline.text import _STEPS, describe, dumps, loads
from tests.helpers import run_virtually

settings.register_profile("default", deadline=None)
settings.load_profile("default")

HERE = __name__


def small(value: Any) -> Any:
    """The value, unless a random pipeline has multiplied it too often."""
    return value if len(repr(value)) < 1000 else "much"


def add_one(value: Any) -> Any:
    return value + 1


async def double(value: Any) -> Any:
    await asyncio.sleep(1)
    return small(value * 2)


async def with_context(value: Any, context: Any) -> Any:
    context["seen"] = value
    return value


def repeat(value: Any, reps: int = 2) -> list[Any]:
    return small([value] * min(reps, 4))  # type: ignore[no-any-return]


def anything(*args: Any, **keywords: Any) -> Any:
    return args, keywords


def is_positive(value: Any) -> bool:
    return bool(value > 0)


def fail(value: Any) -> Any:
    raise ValueError(f"no {value}")


def stand_in(value: Any, error: Exception) -> str:
    return f"stood in for {error}"


def worth_it(error: Exception) -> bool:
    return isinstance(error, ValueError)


def before(stage_name: str, value: Any) -> None:
    LOG.append(("before", stage_name, value))


def after(stage_name: str, value: Any, output: Any, error: Any) -> None:
    LOG.append(("after", stage_name, output))


def seen(event: Any) -> None:
    LOG.append(event)


async def times_ten(next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
    return small(await next_stage(value) * 10)


@staged(timeout=2.0)
async def decorated(value: Any) -> Any:
    return value


@functools.lru_cache
def cached(value: Any) -> Any:
    return value


class OwnError(Exception):
    pass


class Shop:
    def fetch(self, value: Any) -> Any:
        return value, self

    def around(self, next_stage: Any, stage_name: str, value: Any, context: Any) -> Any:
        return next_stage(value)

    @classmethod
    def make(cls, value: Any) -> Any:
        return cls, value

    @staticmethod
    def fixed(value: Any) -> Any:
        return value

    class Inner:
        def __init__(self, value: Any) -> None:
            self.value = value

    def __call__(self, value: Any) -> Any:
        return value


class Foreign:
    name = "foreign"

    async def run(self, value: Any, *, context: Any = None) -> Any:
        return value


class Callee(Foreign):
    """A step that can be called, too."""

    def __call__(self, value: Any) -> str:
        return "called"


class OwnStage(Stage[Any, Any]):
    pass


class CallableStage(Stage[Any, Any]):
    def __call__(self, value: Any) -> str:
        return "called"


class OwnPipeline(Pipeline[Any, Any]):
    pass


class OwnEach(Each[Any, Any]):
    pass


class Name(str):
    pass


class Number(enum.IntEnum):
    ONE = 1


LOG: list[Any] = []
no_name: Callable[[Any], Any] = lambda value: value  # noqa: E731
renamed = add_one


def one(step: Any, **options: Any) -> "Pipeline[Any, Any]":
    return Pipeline([step], **options)


def text_of(*stages: Any, **options: Any) -> str:
    return json.dumps({"version": 1, "pipeline": pipeline_of(*stages, **options)})


def pipeline_of(*stages: Any, **options: Any) -> dict[str, Any]:
    return {"kind": "pipeline", "name": "p", "stages": [*stages], **options}


def stage_of(handler: Any = "f", **options: Any) -> dict[str, Any]:
    return {"kind": "stage", "name": "s", "handler": handler, **options}


def handler_of(pipeline: Any) -> Any:
    return pipeline.stages[0].handler


def by_import(text: str) -> "Pipeline[Any, Any]":
    return Pipeline.loads(text, allow_import=[HERE])


def again(pipeline: "Pipeline[Any, Any]", **names: Any) -> "Pipeline[Any, Any]":
    """The pipeline after a round trip, which has to keep its text and its repr."""
    text = pipeline.dumps(registry=names)
    loaded = Pipeline.loads(text, registry=names, allow_import=[HERE, "builtins"])
    assert loaded.dumps(registry=names) == text
    assert repr(loaded) == repr(pipeline)
    return loaded


def refusal(pipeline: "Pipeline[Any, Any]", **names: Any) -> str:
    """Why a pipeline is not written. What people are shown of it instead must not load either."""
    with pytest.raises(ValueError, match="can't be written") as refused:
        pipeline.dumps(registry=names)
    shown = describe(pipeline)
    assert "0x" not in shown
    if not names:
        with pytest.raises(ValueError, match=r"^pipeline"):
            by_import(shown)
    return str(refused.value)


def complaint(text: str, **names: Any) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the caller looks at it
        Pipeline.loads(text, registry={"f": add_one, **names}, allow_import=[HERE])
    return str(refused.value)


EXAMPLE = Stage("add_one", add_one) | partial(repeat, reps=4) | each(add_one) | keep(is_positive)


class TestTheReferenceExample:
    async def test_gives_the_same_before_and_after(self) -> None:
        assert await EXAMPLE.run(1) == [3, 3, 3, 3]
        assert await again(EXAMPLE).run(1) == [3, 3, 3, 3]

    def test_is_written_so(self) -> None:
        assert json.loads(EXAMPLE.dumps()) == {
            "version": 1,
            "pipeline": {
                "kind": "pipeline",
                "name": "pipeline",
                "stages": [
                    {"kind": "stage", "name": "add_one", "handler": f"{HERE}:add_one"},
                    {
                        "kind": "stage",
                        "name": "repeat",
                        "handler": {"partial": f"{HERE}:repeat", "keywords": {"reps": 4}},
                    },
                    {
                        "kind": "each",
                        "name": "each",
                        "step": {"kind": "stage", "name": "add_one", "handler": f"{HERE}:add_one"},
                    },
                    {
                        "kind": "keep",
                        "name": "keep",
                        "predicate": {
                            "kind": "stage",
                            "name": "is_positive",
                            "handler": f"{HERE}:is_positive",
                        },
                    },
                ],
            },
        }

    def test_runs_in_another_process(self, tmp_path: Path) -> None:
        (tmp_path / "weather.py").write_text("def add_one(value):\n    return value + 1\n")
        stage = {"kind": "stage", "name": "s", "handler": "weather:add_one"}
        text = text_of(stage, {"kind": "each", "name": "each", "step": stage | {"timeout": 2.5}})
        code = (
            "import asyncio; from async_pipeline import Pipeline\n"
            "pipeline = Pipeline.loads(sys.argv[1], allow_import=['weather'])\n"
            "assert pipeline.dumps() == Pipeline.loads(pipeline.dumps(), allow_import=['weather']).dumps()\n"
            "print(asyncio.run(Pipeline(pipeline.stages[:1]).run(1)), pipeline.stages[1])"
        )
        folders = [str(Path(async_pipeline.__file__).parents[1]), str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{code}", text],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == "2 each(Stage('s', timeout=2.5))\n", done.stderr


class TestWriting:
    def test_is_one_line_of_ascii(self) -> None:
        text = one(Stage("größe 🐍\n", add_one)).dumps()
        assert text.isascii()
        assert "\n" not in text
        assert ": " not in text

    @pytest.mark.parametrize(
        ("options", "written"),
        [
            ({"timeout": 2}, {"timeout": 2}),
            ({"timeout": 2.0, "retries": 3}, {"timeout": 2.0, "retries": 3}),
            ({"retry_delay": 0.5, "backoff": "exponential"}, {"retry_delay": 0.5, "backoff": "exponential"}),
            ({"max_delay": 9, "jitter": 0.25}, {"max_delay": 9, "jitter": 0.25}),
            ({"retry_on": OSError}, {"retry_on": "builtins:OSError"}),
            ({"retry_on": (OSError,)}, {"retry_on": ["builtins:OSError"]}),
            ({"retry_on": ()}, {"retry_on": []}),
            ({"retry_on": OwnError}, {"retry_on": f"{HERE}:OwnError"}),
            ({"retry_on": worth_it}, {"retry_on": f"{HERE}:worth_it"}),
            ({"executor": "thread"}, {"executor": "thread"}),
            ({"on_error": stand_in}, {"on_error": f"{HERE}:stand_in"}),
            ({"pass_context": False}, {"pass_context": False}),
        ],
    )
    def test_options_of_a_stage(self, options: Any, written: Any) -> None:
        pipeline = one(Stage("s", add_one, **options))
        (stage,) = json.loads(pipeline.dumps())["pipeline"]["stages"]
        assert stage == stage_of(f"{HERE}:add_one", **written)
        loaded: Any = again(pipeline).stages[0]
        for option, value in options.items():
            assert getattr(loaded, option) == value
            assert type(getattr(loaded, option)) is type(value)

    def test_the_table_has_every_option(self) -> None:
        assert set(_STEPS["stage"].options) == set(StageOptions.__annotations__)
        for name, kind in _STEPS.items():
            if name not in ("stage", "pipeline"):
                continue
            parameters = inspect.signature(kind.type).parameters.values()
            named = {p.name for p in parameters if p.default is not p.empty}
            assert set(kind.codecs()) >= named

    def test_observers(self) -> None:
        observed = one(add_one, observers=[seen], on_hook_error=seen)
        written = json.loads(observed.dumps())["pipeline"]
        assert (written["observers"], written["on_hook_error"]) == ([f"{HERE}:seen"], f"{HERE}:seen")
        loaded = again(observed)
        assert (loaded.observers, loaded.on_hook_error) == ((seen,), seen)
        recorder: list[Any] = []
        recording = one(add_one, observers=[recorder.append])
        assert refusal(recording).startswith("the pipeline can't be written: observers (")
        registry = {"recorder": recorder.append}
        text = recording.dumps(registry=registry)
        loaded = Pipeline.loads(text, registry={**registry, f"{HERE}:add_one": add_one})
        assert loaded.observers == (recorder.append,)

    def test_hooks_and_middlewares(self) -> None:
        hooked = Pipeline([add_one], before_stage=before, after_stage=after, middlewares=[times_ten])
        written = json.loads(hooked.dumps())["pipeline"]
        assert written["before_stage"] == f"{HERE}:before"
        assert written["after_stage"] == f"{HERE}:after"
        assert written["middlewares"] == [f"{HERE}:times_ten"]
        LOG.clear()
        assert run_virtually(again(hooked).run(1)) == 20
        assert LOG == [("before", "add_one", 1), ("after", "add_one", 20)]

    def test_every_kind_keeps_its_options(self) -> None:
        inner = Stage("in/ner", add_one, retries=2)
        loaded = again(
            Pipeline(
                [
                    parallel({"a b": inner, "": add_one}, name="both"),
                    each(inner, concurrency=7, name="e"),
                    keep(is_positive, concurrency=9, name="k"),
                    branch((is_positive, inner), (fail, add_one), otherwise=double, name="b"),
                    branch((is_positive, inner)),
                    fallback(fail, inner, on=(OSError, OwnError), name="f"),
                    require("id", "email", name="r"),
                    Pipeline([inner], name="nested"),
                ],
                name="all",
            )
        )
        steps: Any = loaded.stages
        assert [step.name for step in steps] == ["both", "e", "k", "b", "branch", "f", "r", "nested"]
        assert list(steps[0].steps) == ["a b", ""]
        assert steps[0].steps["a b"].name == "in/ner"
        assert (steps[1].concurrency, steps[2].concurrency) == (7, 9)
        assert [case[0].name for case in steps[3].cases] == ["is_positive", "fail"]
        assert steps[3].otherwise.name == "double"
        assert steps[4].otherwise is None
        assert steps[5].on == (OSError, OwnError)
        assert steps[6].fields == ("id", "email")
        assert loaded.name == "all"

    def test_a_script_is_not_suggested_for_import(self) -> None:
        said = complaint(text_of(stage_of("__main__:f")))
        assert said.endswith("is neither registered nor allowed; write registry={'__main__:f': ...}")

    def test_a_step_may_have_the_name_of_what_is_not_supported(self) -> None:
        loaded = again(one(parallel(unsupported=add_one)))
        assert run_virtually(loaded.run(1)) == {"unsupported": 2}

    def test_the_context_is_passed_as_before(self) -> None:
        loaded = again(Pipeline([with_context, Stage("s", repeat, pass_context=True)]))
        context: Any = {}
        with pytest.raises(StageExecutionError, match="TypeError"):  # a list times a dict
            run_virtually(loaded.run(1, context=context))
        assert context == {"seen": 1}


class TestNamesOfCallables:
    @pytest.mark.parametrize(
        ("handler", "name"),
        [
            (len, "builtins:len"),
            (str.split, "builtins:str.split"),
            (dict.fromkeys, "builtins:dict.fromkeys"),
            (int, "builtins:int"),
            (math.sqrt, "math:sqrt"),
            (json.loads, "json:loads"),
            (datetime.date.fromisoformat, "datetime:date.fromisoformat"),
            (Shop, f"{HERE}:Shop"),
            (Shop.make, f"{HERE}:Shop.make"),
            (Shop.fixed, f"{HERE}:Shop.fixed"),
            (Shop.Inner, f"{HERE}:Shop.Inner"),
            (cached, f"{HERE}:cached"),
            (renamed, f"{HERE}:add_one"),
            (decorated.handler, f"{HERE}:decorated"),
        ],
    )
    def test_are_those_of_where_they_are_defined(self, handler: Any, name: str) -> None:
        text = one(Stage("s", handler)).dumps()
        assert json.loads(text)["pipeline"]["stages"][0]["handler"] == name
        module = name.partition(":")[0]
        assert handler_of(Pipeline.loads(text, allow_import=[module])) == handler

    def test_a_staged_function_stands_for_its_handler(self) -> None:
        loaded = again(one(decorated.replace(timeout=3.0, name="other")))
        assert handler_of(loaded) is decorated.handler
        text = one(decorated).dumps()
        registered = Pipeline.loads(text, registry={f"{HERE}:decorated": decorated})
        assert handler_of(registered) is decorated.handler

    def test_the_registry_goes_first(self) -> None:
        pipeline = one(Stage("s", add_one))
        text = pipeline.dumps(registry={"plus one": add_one})
        assert '"plus one"' in text
        assert handler_of(Pipeline.loads(text, registry={"plus one": add_one})) is add_one
        name = f"{HERE}:add_one"
        stood_in = Pipeline.loads(pipeline.dumps(), registry={name: double}, allow_import=[HERE])
        assert handler_of(stood_in) is double

    def test_a_stage_in_the_registry_names_its_handler(self) -> None:
        stage = Stage("s", no_name)
        text = one(stage).dumps(registry={"it": stage})
        assert json.loads(text)["pipeline"]["stages"] == [stage_of("it")]
        assert handler_of(Pipeline.loads(text, registry={"it": stage})) is no_name

    def test_a_stage_that_can_be_called_stands_for_itself(self) -> None:
        stage = CallableStage("s", add_one)
        assert handler_of(again(one(Stage("outer", stage)), it=stage)) is stage

    def test_bound_methods_are_found_by_object_and_function(self) -> None:
        shop, items = Shop(), list[Any]()
        names = {"fetch": shop.fetch, "append": items.append}
        loaded = again(Pipeline([shop.fetch, items.append]), **names)
        assert [stage.handler for stage in loaded.stages] == [shop.fetch, items.append]  # type: ignore[attr-defined]
        assert "'fetch' can't be written" in refusal(one(Shop().fetch), **names)
        assert "'append' can't be written" in refusal(one([].append), **names)
        number = 10**20
        again(one(Stage("s", number.__add__, pass_context=False)), plus=number.__add__)

    def test_callable_objects_and_middlewares_by_their_own_name(self) -> None:
        shop = Shop()
        assert handler_of(again(one(Stage("s", shop)), it=shop)) is shop
        timed = one(add_one, middlewares=[shop.around])
        assert "bound method Shop.around" in refusal(timed)

    def test_a_name_of_something_else_in_the_registry_is_not_used(self) -> None:
        message = refusal(one(add_one), **{f"{HERE}:add_one": double})
        assert "has the name of something else in the registry" in message

    @pytest.mark.parametrize(
        ("handler", "what"),
        [
            (no_name, f"{HERE}:<lambda>"),
            (Shop().fetch, "bound method Shop.fetch"),
            ([].append, "bound method list.append"),
            (Shop.__call__, f"({HERE}:Shop.__call__)"),
            (partial(len, ()), "partial of builtins:len"),
            (Shop(), "(Shop)"),
            ((1).__add__, "bound method int.__add__"),
            (int.__add__, "builtins:int.__add__"),
            (functools.cmp_to_key(lambda one, other: 0), "KeyWrapper"),
        ],
    )
    def test_what_has_none_is_refused(self, handler: Any, what: str) -> None:
        message = refusal(one(Stage("price", handler, pass_context=False)))
        assert "step 'price' can't be written: handler (" in message
        assert what in message
        assert "dumps(registry={" in message

    def test_a_local_function_and_one_that_was_replaced_are_refused(self) -> None:
        def local(value: Any) -> Any:
            return value

        other = types.FunctionType(add_one.__code__, globals(), "add_one")
        for handler in (local, other):
            assert f"({HERE}:" in refusal(one(Stage("s", handler)))
        assert f'"{HERE}:TestNamesOfCallables' in describe(one(local))
        assert handler_of(again(one(local), local=local)) is local

    def test_the_hint_names_what_can_be_named(self) -> None:
        assert "name it: dumps(registry={'fetch': ...})" in refusal(one(Shop().fetch))
        assert "name it: dumps(registry={'name': ...})" in refusal(one(no_name))

    def test_an_object_that_has_a_strange_name_is_refused(self) -> None:
        shop: Any = Shop()
        shop.__qualname__ = 5
        assert "(Shop)" in refusal(one(Stage("s", shop, pass_context=False)))

    def test_an_object_that_can_not_be_asked_is_refused(self) -> None:
        class Proxy(Shop):
            def __getattr__(self, name: str) -> Any:
                kind = RuntimeError if name == "__qualname__" else AttributeError
                raise kind("working outside of a request")

        assert "(Proxy)" in refusal(one(Stage("s", Proxy(), pass_context=False)))


class TestPartials:
    def test_keep_their_arguments(self) -> None:
        arguments = [1, 1.0, True, None, "é", [{"a": [2**70]}], -0.0]
        handler = partial(partial(anything, *arguments), reps={"x": 1})
        loaded = handler_of(again(one(Stage("s", handler))))
        assert (loaded.func, repr(loaded.args), loaded.keywords) == (
            anything,
            repr(tuple(arguments)),
            handler.keywords,
        )

    def test_without_arguments(self) -> None:
        assert handler_of(again(one(Stage("s", partial(add_one))))).func is add_one

    @pytest.mark.parametrize(
        "value",
        [
            (1,),
            {1: 2},
            {"1": 1, 1: 1},
            math.nan,
            math.inf,
            Name("a"),
            Number.ONE,
            10**5000,
            b"",
            [(1,)],
            "\ud83d\ude00",
            {"a": (1,)},
            object(),
            {"\ud83d\ude00": 1},
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_refuse_what_json_changes(self, value: Any) -> None:
        for handler in (partial(repeat, reps=value), partial(repeat, value)):
            assert f"partial of {HERE}:repeat" in refusal(one(Stage("s", handler)))

    def test_refuse_what_is_nested_in_itself_or_too_deep(self) -> None:
        loop: list[Any] = []
        loop.append(loop)
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        for value in (loop, deep):
            assert "arguments that JSON would change" in refusal(one(Stage("s", partial(repeat, value))))

    def test_refuse_attributes_and_subclasses(self) -> None:
        wrapped = functools.update_wrapper(partial(repeat, reps=3), repeat)

        class Own(partial[Any]):
            pass

        assert "has attributes" in refusal(one(Stage("s", wrapped)))
        assert "(Own)" in refusal(one(Stage("s", Own(repeat))))
        assert handler_of(again(one(Stage("s", wrapped)), it=wrapped)) is wrapped

    def test_of_what_has_no_name_are_refused(self) -> None:
        assert "lambda" in refusal(one(Stage("s", partial(no_name))))

    def test_an_argument_may_have_any_name(self) -> None:
        handler = partial(anything, unsupported="x", func=1, partial=2)
        assert handler_of(again(one(Stage("s", handler)))).keywords == handler.keywords


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"limiter": asyncio.Semaphore(3)}, "limiter (Semaphore) is shared"),
            ({"retry_budget": RetryBudget()}, "retry_budget (RetryBudget) is shared"),
            ({"timeout": Fraction(1, 2)}, "timeout (Fraction) would be changed"),
            ({"retries": Number.ONE}, "retries (Number) would be changed"),
            ({"retries": 10**5000}, "retries (int) would be changed"),
            ({"backoff": Name("exponential")}, "backoff (Name) would be changed"),
            ({"retry_on": (OSError, type("Local", (Exception,), {}))}, f"retry_on ({HERE}:Local)"),
            ({"retry_on": lambda error: True}, "retry_on ("),
            ({"on_error": lambda value, error: 1}, "on_error ("),
        ],
    )
    def test_options(self, options: Any, what: str) -> None:
        pipeline = one(parallel(price=Stage("s", add_one, **options)))
        assert refusal(pipeline).startswith(f"step 'parallel/price' can't be written: {what}")

    def test_an_executor(self) -> None:
        with ThreadPoolExecutor() as executor:
            message = refusal(one(Stage("s", add_one, executor=executor)))
        assert 'executor (ThreadPoolExecutor) is made by the program; write executor="thread"' in message

    def test_a_semaphore_as_concurrency(self) -> None:
        for make in (each, keep):
            message = refusal(one(make(add_one, asyncio.Semaphore(2))))
            assert "concurrency (Semaphore) is shared" in message

    def test_strings_of_other_kinds(self) -> None:
        assert "step 'a' can't be written: name (Name)" in refusal(one(Stage(Name("a"), add_one)))
        assert "steps (Name)" in refusal(one(parallel({Name("a"): Stage("a", add_one)})))
        assert "fields (Name)" in refusal(one(require(Name("a"))))
        assert "steps (str)" in refusal(one(parallel({"\ud83d\ude00": add_one})))

    def test_hooks_name_the_pipeline(self) -> None:
        message = refusal(one(add_one, before_stage=lambda name, value: None))
        assert message.startswith("the pipeline can't be written: before_stage (")
        inner = one(add_one, middlewares=[lambda n, s, v, c: 1], name="inner")
        assert refusal(one(inner)).startswith("step 'inner' can't be written: middlewares (")

    @pytest.mark.parametrize(
        "step", [OwnStage("s", add_one), OwnPipeline([add_one]), OwnEach(add_one, 5, "each"), Foreign()]
    )
    def test_steps_of_other_classes_need_a_name(self, step: Any) -> None:
        message = refusal(one(step))
        assert f"({type(step).__name__}) is of a class of its own" in message
        loaded = again(one(step), it=step)
        assert loaded.stages[0] is step

    def test_a_pipeline_of_another_class(self) -> None:
        own = OwnPipeline([add_one])
        assert "(OwnPipeline) is of a class of its own" in refusal(own)
        assert Pipeline.loads(own.dumps(registry={"own": own}), registry={"own": own}) is own

    def test_the_step_is_named_by_its_path(self) -> None:
        bad = Stage("bad", no_name)
        for step, path in [
            (each(bad), "each/bad"),
            (keep(bad), "keep/bad"),
            (branch((add_one, bad)), "branch/bad"),
            (branch((bad, add_one)), "branch/bad"),
            (branch((add_one, add_one), otherwise=bad), "branch/bad"),
            (fallback(add_one, bad), "fallback/bad"),
            (parallel(price=bad), "parallel/price"),
            (Pipeline([parallel(x=bad)], name="in"), "in/parallel/x"),
        ]:
            assert refusal(one(step)).startswith(f"step {path!r} can't be written: handler (")

    def test_long_names_of_fields_take_no_memory_for_each_place(self) -> None:
        text = json.dumps({"k" * 20_000: [0] * 20_000})
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="no version"):
                Pipeline.loads(text)
            assert tracemalloc.get_traced_memory()[1] < 50_000_000
        finally:
            tracemalloc.stop()

    def test_steps_nested_too_deep(self) -> None:
        def nested(levels: int) -> "Pipeline[Any, Any]":
            pipeline = one(add_one)
            for _ in range(levels):
                pipeline = one(pipeline)
            return pipeline

        assert run_virtually(again(nested(49)).run(1)) == 2
        assert "more than 50 levels deep" in refusal(nested(50))
        assert "the steps inside" in describe(nested(10_000))


class TestRegisteredSteps:
    def test_a_pipeline_is_written_by_its_name(self) -> None:
        inner = Pipeline([Stage("s", no_name)], name="inner")
        text = one(inner).dumps(registry={"in": inner})
        assert json.loads(text)["pipeline"]["stages"] == [{"kind": "step", "step": "in"}]
        assert again(one(inner), **{"in": inner}).stages[0] is inner

    def test_the_whole_is_written_out(self) -> None:
        assert "add_one" in EXAMPLE.dumps(registry={"all": EXAMPLE})

    def test_a_stage_is_written_out(self) -> None:
        stage = Stage("s", add_one, retries=3)
        assert '"retries":3' in one(stage).dumps(registry={"it": stage})
        text = text_of({"kind": "step", "step": "it"})
        assert Pipeline.loads(text, registry={"it": stage}).stages == (stage,)

    def test_a_step_that_is_also_the_handler_of_a_registered_stage(self) -> None:
        callee = Callee()
        stage = Stage("s", callee)
        assert "(Callee) is of a class" in refusal(one(callee), stage=stage)
        loaded = again(Pipeline([callee, stage]), stage=stage, callee=callee)
        assert loaded.stages[0] is callee
        assert loaded.stages[1].handler is callee  # type: ignore[attr-defined]


class TestDescribe:
    def test_is_what_dumps_writes_for_people(self) -> None:
        shown = describe(EXAMPLE)
        assert json.loads(shown) == json.loads(EXAMPLE.dumps())
        assert shown.startswith('{\n  "version": 1,\n  "pipeline": {\n    "kind"')

    def test_shows_what_dumps_refuses(self) -> None:
        timeout: Any = Fraction(1, 2)
        middlewares: list[Any] = [times_ten, Shop().around]
        pipeline = Pipeline(
            [
                Stage("a", no_name, limiter=asyncio.Semaphore(3), timeout=timeout),
                Stage("b", partial(repeat, (1,)), retry_on=(OSError, type("Local", (Exception,), {}))),
                Foreign(),
            ],
            middlewares=middlewares,
        )
        shown = json.loads(describe(pipeline))["pipeline"]
        assert shown["stages"] == [
            {
                "kind": "stage",
                "name": "a",
                "handler": f"{HERE}:<lambda>",
                "timeout": {"unsupported": "Fraction"},
                "limiter": {"unsupported": "Semaphore"},
            },
            {
                "kind": "stage",
                "name": "b",
                "handler": {"unsupported": f"partial of {HERE}:repeat"},
                "retry_on": ["builtins:OSError", {"unsupported": f"{HERE}:Local"}],
            },
            {"kind": "step", "step": {"unsupported": "Foreign"}},
        ]
        assert shown["middlewares"] == [f"{HERE}:times_ten", {"unsupported": "bound method Shop.around"}]

    def test_takes_any_step(self) -> None:
        shown = describe(Stage("s", add_one))
        assert json.loads(shown)["pipeline"] == stage_of(f"{HERE}:add_one")
        with pytest.raises(ValueError, match="pipeline: must be a pipeline, not Stage"):
            by_import(shown)
        assert json.loads(describe(Foreign()))["pipeline"]["step"] == {"unsupported": "Foreign"}


# -- reading


def nested_lists(levels: int) -> str:
    return "[" * levels + "]" * levels


class TestWrongTexts:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no JSON: Expecting value in line 1, column 1"),
            ('{"version": 1,\n nope}', "in line 2, column 2"),
            ("[]", r"the text must be an object, not \[\]"),
            ("NaN", "NaN is no finite number"),
            ("1e999", "1e999 is no finite number"),
            ("1" * 5000, "a number that can't be read: Exceeds the limit"),
            ("{}", "no version; this async_pipeline reads version 1"),
            ('{"version": 2, "else": 1}', "version 2 is not known; this async_pipeline reads version 1"),
            ('{"version": true}', "version true is not known"),
            ('{"version": 1.0}', "version 1.0 is not known"),
            ('{"version": 1}', "the text: the field 'pipeline' is missing"),
            ('{"version": 1, "pipeline": {}, "x": 1}', "the text: the field 'x' is not known"),
            ('{"version": 1, "version": 1}', "the text: the field 'version' is there more than once"),
            (
                '{"version": 1, "pipeline": {"a b": [{"x": 1, "y": 1, "y": 1}]}}',
                r'pipeline\["a b"\]\[0\]: .*\'y\'',
            ),
            ('{"version": 1, "pipeline": 5}', "^pipeline: must be an object, not 5"),
        ],
    )
    def test_as_a_whole(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Pipeline.loads(text)

    def test_nested_too_deep(self) -> None:
        with pytest.raises(ValueError, match="the text is nested too deep"):
            Pipeline.loads(nested_lists(1_000_000))

    def test_many_repeated_fields_are_found_in_no_time(self) -> None:
        fields = ", ".join(f'"{number}": 1' for number in range(200_000))
        with pytest.raises(ValueError, match="'0' is there more than once"):
            Pipeline.loads(f'{{{fields}, "0": 2}}')

    def test_steps_nested_too_deep(self) -> None:
        def nested(levels: int) -> str:
            step = stage_of()
            for _ in range(levels - 1):
                step = {"kind": "each", "name": "e", "step": step}
            return text_of(step)

        assert Pipeline.loads(nested(50), registry={"f": add_one})
        assert "this is more than 50 levels deep" in complaint(nested(51))

    def test_a_stack_that_is_nearly_used_up(self) -> None:
        step: Any = each(add_one)
        for _ in range(45):
            step = each(step)
        pipeline = one(step)
        text = pipeline.dumps()
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack(0)) + 80)
        try:
            with pytest.raises(ValueError, match=r"^pipeline: the stack has no room"):
                by_import(text)
            with pytest.raises(ValueError, match=r"^the stack has no room"):
                pipeline.dumps()
        finally:
            sys.setrecursionlimit(limit)

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ([], ".stages[0]: must be an object, not []"),
            ({}, ".stages[0]: the kind must be one of stage, pipeline, parallel, each,"),
            ({"kind": "loop"}, 'branch, fallback, require, step, not "loop"'),
            ({"kind": []}, ".stages[0]: the kind must be one of"),
            ({"kind": "stage", "handler": "f"}, ".stages[0]: the field 'name' is missing"),
            ({"kind": "stage", "name": "s"}, ".stages[0]: the field 'handler' is missing"),
            (
                stage_of(tiemout=1),
                ".stages[0]: the field 'tiemout' is not known; a stage has kind, name, handler,",
            ),
            (stage_of(timeout=-1), ".stages[0]: timeout must be greater than 0"),
            (stage_of(timeout="2"), ".stages[0]: timeout must be a number of seconds, not '2'"),
            (stage_of(retries=1.0), ".stages[0]: retries must be an int"),
            (stage_of(timeout=10**400), ".stages[0]: timeout must be greater than 0 and finite"),
            (stage_of(executor="process"), ".stages[0]: executor must be"),
            (stage_of(pass_context=1), ".stages[0]: pass_context must be"),
            (stage_of(limiter=3), ".stages[0].limiter: can't be given in a text"),
            (stage_of(retry_budget={}), ".stages[0].retry_budget: can't be given in a text"),
            (stage_of(name=3), ".stages[0]: name must be a str"),
            (stage_of(retry_on="f"), ""),
            (stage_of(retry_on=["f"]), ".stages[0]: retry_on must hold exception types"),
            (stage_of(retry_on=[["f"]]), '.stages[0].retry_on[0]: must be a string, not ["f"]'),
            (stage_of(on_error=None), ".stages[0].on_error: must be a string, not null"),
            (stage_of(5), ".stages[0].handler: must be a string, not 5"),
            (stage_of({"partial": 5}), ".stages[0].handler.partial: must be a string, not 5"),
            (
                stage_of({"partial": "f", "args": {}}),
                ".stages[0].handler: the args of a partial must be a list",
            ),
            (stage_of({"partial": "f", "keywords": []}), "and its keywords an object"),
            (
                stage_of({"partial": "f", "kw": {}}),
                ".stages[0].handler: the field 'kw' is not known; a partial has",
            ),
            (stage_of({"unsupported": "Meter"}), ".stages[0].handler: 'Meter' was left out"),
            (stage_of(timeout={"unsupported": "Fraction"}), ".stages[0].timeout: 'Fraction' was left out"),
            (pipeline_of(), ".stages[0]: Pipeline requires at least one stage"),
            (
                {"kind": "parallel", "name": "p", "steps": {}},
                ".stages[0]: parallel requires at least one step",
            ),
            (
                {"kind": "parallel", "name": "p", "steps": {"a": 1}},
                ".stages[0].steps.a: must be an object, not 1",
            ),
            ({"kind": "parallel", "name": "p", "steps": {"a/b": 1}}, '.stages[0].steps["a/b"]: must be'),
            ({"kind": "parallel", "name": "p", "steps": [1]}, ".stages[0].steps: must be an object, not [1]"),
            (
                {"kind": "fallback", "name": "f", "steps": []},
                ".stages[0]: fallback requires at least one step",
            ),
            ({"kind": "require", "name": "r", "fields": "id"}, '.stages[0].fields: must be a list, not "id"'),
            ({"kind": "require", "name": "r", "fields": [1]}, ".stages[0]: a field must be a str"),
            ({"kind": "branch", "name": "b", "cases": [[]]}, ".stages[0]: a case of branch must be a pair"),
            ({"kind": "branch", "name": "b", "cases": [[stage_of(), 1]]}, ".stages[0].cases[0][1]: must be"),
            (
                {"kind": "each", "name": "e", "step": stage_of(), "concurrency": 0},
                "concurrency must be at least 1",
            ),
            (
                {"kind": "step", "step": "g"},
                ".stages[0].step: registry={'g': ...} must be there and be a step",
            ),
            (
                {"kind": "step", "step": "f"},
                ".stages[0].step: registry={'f': ...} must be there and be a step",
            ),
            (
                {"kind": "step", "step": "F"},
                ".stages[0].step: registry={'F': ...} must be there and be a step",
            ),
            ({"kind": "step"}, ".stages[0]: the field 'step' is missing"),
            ({"kind": "step", "step": 1}, ".stages[0].step: must be a string, not 1"),
            (stage_of("P"), ".stages[0].handler: 'P' is a step in the registry, but must be a callable here"),
        ],
    )
    def test_in_a_step(self, stage: Any, message: str) -> None:
        if not message:  # f is a predicate of errors as good as any
            assert Pipeline.loads(text_of(stage), registry={"f": add_one})
            return
        found = complaint(text_of(stage), P=EXAMPLE, F=Foreign)
        assert found.startswith("pipeline.stages[0]")
        assert message in found

    def test_the_error_of_the_constructor_is_the_cause(self) -> None:
        with pytest.raises(ValueError, match="timeout") as refused:
            Pipeline.loads(text_of(stage_of(timeout="2")), registry={"f": add_one})
        assert isinstance(refused.value.__cause__, TypeError)

    def test_the_whole_must_be_a_pipeline(self) -> None:
        text = json.dumps({"version": 1, "pipeline": stage_of()})
        assert complaint(text) == "pipeline: must be a pipeline, not Stage"

    def test_long_values_are_cut(self) -> None:
        assert len(complaint(json.dumps({"version": "x" * 9999}))) < 200
        assert len(complaint(text_of(stage_of(["x" * 9999])))) < 200


class TestArguments:
    def test_of_the_wrong_type(self) -> None:
        text: Any = text_of(stage_of())
        with pytest.raises(TypeError, match="text must be a str, not bytes"):
            Pipeline.loads(text.encode())
        for registry, message in [
            ([add_one], "registry must be a mapping, not list; write registry="),
            ({1: add_one}, "the names in registry must be str, not 1"),
            ({"f": 1}, r"registry\['f'\] must be a callable or a step, not 1"),
            ({"f": types.SimpleNamespace(name="f", run=5)}, "must be a callable or a step"),
            ({"f": types.SimpleNamespace(run=add_one)}, "must be a callable or a step"),
        ]:
            wrong: Any = registry
            with pytest.raises(TypeError, match=message):
                Pipeline.loads(text, registry=wrong)
            with pytest.raises(TypeError, match=message):
                EXAMPLE.dumps(registry=wrong)

    @pytest.mark.parametrize(
        ("modules", "error", "message"),
        [
            ("shop", TypeError, r"must be a list of modules, not 'shop'; write allow_import=\['shop'\]"),
            (5, TypeError, "must be a list of modules, not 5"),
            ([5], TypeError, "must hold names of modules, not 5"),
            ([""], ValueError, "must hold names of modules like 'shop.jobs', not ''"),
            (["shop."], ValueError, "not 'shop.'"),
            (["shop:run"], ValueError, "not 'shop:run'"),
        ],
    )
    def test_allow_import(self, modules: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Pipeline.loads(text_of(stage_of()), registry={"f": add_one}, allow_import=modules)

    def test_the_functions_do_what_the_methods_do(self) -> None:
        text = dumps(EXAMPLE)
        assert text == EXAMPLE.dumps()
        assert repr(loads(text, None, {HERE})) == repr(EXAMPLE)


# -- what a text can reach


SHOP = """
import os, subprocess
from subprocess import run
from functools import lru_cache, partial, wraps
from async_pipeline import Stage

LOADED.append(__name__)

def fetch(value): return value
class Job:
    system = staticmethod(subprocess.call)
    own = fetch
    def work(self): return self
    @staticmethod
    def fixed(value): return value
    @classmethod
    @property
    def chained(cls): LOADED.append("property ran")
    staged = Stage("staged", fetch)
    class Inner: pass
    class Proxy:
        __class__ = property(lambda self: LOADED.append("__class__"))
    fake = Proxy()
    @lru_cache
    def cached(self): pass
    lazy = property(lambda self: LOADED.append("property ran"))
class Child(Job): pass
class Meta(type):
    def __getattr__(cls, name): LOADED.append(name); return fetch
class Dynamic(metaclass=Meta): pass
class Odd(Exception): pass
class Liar:
    __module__, __qualname__ = __name__, "Liar"
class Fake:
    __class__ = property(lambda self: LOADED.append("__class__"))
    def __getattr__(self, name): LOADED.append(name); return "fake"
fake = Fake()
liar = Liar()
alias = fetch
def __private(value): return value
def trailing__(value): return value
own_call = partial(subprocess.call, shell=True)
stage = Stage("x", subprocess.call)
number = 5
def __getattr__(name): LOADED.append(name); return fetch
"""


BROKEN = {
    "broken": "import does_not_exist",
    "script": "raise SystemExit(3)",
    "wrong": "def",
    "failing": "1 / 0",
}


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Modules of a shop that can be imported, and the list of what has been run in them."""
    names: list[str] = []
    monkeypatch.setattr(builtins, "LOADED", names, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    (tmp_path / "shop").mkdir()
    for path in ("shop/__init__", "shop/jobs", "shop/__main__", "shopping", "evil"):
        (tmp_path / f"{path}.py").write_text(SHOP)
    for name, source in BROKEN.items():
        (tmp_path / "shop" / f"{name}.py").write_text(source)
    yield names
    for name in set(sys.modules) - before:
        if name.startswith(("shop", "evil")):
            del sys.modules[name]


def load_handler(name: Any, *modules: str) -> Any:
    return handler_of(Pipeline.loads(text_of(stage_of(name)), allow_import=modules))


class TestWhatATextCanReach:
    def test_nothing_unless_it_is_told(self, loaded: list[str]) -> None:
        with pytest.raises(ValueError, match="neither registered nor allowed") as refused:
            load_handler("shop:fetch")
        message = str(refused.value)
        assert message.startswith("pipeline.stages[0].handler: 'shop:fetch' is neither")
        assert "registry={'shop:fetch': ...}" in message
        assert "allow_import=['shop']" in message
        assert not loaded

    @pytest.mark.parametrize(
        "name",
        [
            "shop:fetch",
            "shop.jobs:fetch",
            "shop:Job",
            "shop:Job.work",
            "shop:Job.fixed",
            "shop:__private",
            "shop:trailing__",
        ],
    )
    def test_what_is_defined_in_an_allowed_module(self, loaded: list[str], name: str) -> None:
        module, _, qualname = name.partition(":")
        found = load_handler(name, "shop")
        assert (found.__module__, found.__qualname__) == (module, qualname)
        assert load_handler({"partial": name}, "shop").func is found

    @pytest.mark.parametrize(
        "name",
        [
            "shopping:fetch",
            "evil:fetch",
            "os:system",
            "builtins:eval",
            "sho:fetch",
            "shop.__main__:fetch",
            "builtins:OSError",
            "shop.__init__:fetch",
        ],
    )
    def test_no_other_module_is_even_imported(self, loaded: list[str], name: str) -> None:
        with pytest.raises(ValueError, match="neither registered nor allowed"):
            load_handler(name, "shop")
        assert not loaded

    def test_a_module_alone_does_not_allow_the_one_around_it(self, loaded: list[str]) -> None:
        assert load_handler("shop.jobs:fetch", "shop.jobs")
        with pytest.raises(ValueError, match="neither registered nor allowed"):
            load_handler("shop:fetch", "shop.jobs")

    def test_a_main_module_by_its_own_name(self, loaded: list[str]) -> None:
        assert load_handler("shop.__main__:fetch", "shop.__main__").__module__ == "shop.__main__"

    @pytest.mark.parametrize(
        "name",
        [
            "shop:os",
            "shop:os.system",
            "shop:run",
            "shop:subprocess.call",
            "shop:alias",
            "shop:own_call",
            "shop:stage",
            "shop:Job.system",
            "shop:Job.own",
            "shop:Job.chained",
            "shop:Job.lazy",
            "shop:Job.nothing",
            "shop:Job.staged",
            "shop:Child.work",
            "shop:Dynamic.anything",
            "shop:nothing",
            "shop:number",
            "shop:fake",
            "shop:fake.anything",
            "shop:Job.fake",
            "shop:Job.cached",
            "shop:fetch.real",
            "shop:Stage",
            "shop:wraps",
            "shop:partial",
            "shop:LOADED",
            "shop:liar",
        ],
    )
    def test_only_what_is_defined_there(self, loaded: list[str], name: str) -> None:
        with pytest.raises(ValueError, match="is not defined there as a function or a class"):
            load_handler(name, "shop")
        assert set(loaded) <= {"shop", "__module__", "__qualname__"}  # and fake was asked what it is

    @pytest.mark.parametrize(
        "name",
        [
            "shop:__getattr__",
            "shop:Job.__init__",
            "shop:fetch.__globals__",
            "shop:Job.__class__",
            "shop:__builtins__",
            "shop:f.<locals>.g",
            "shop:<lambda>",
            "shop:",
            ":fetch",
            "fetch",
            "",
            "shop:Job.",
            "shop:Job..work",
            ".shop:fetch",
            "shop.:fetch",
            "shop./tmp/x:fetch",
            "shop:fetch:x",
            "shop:fe tch",
            "shop\x00:fetch",
        ],
    )
    def test_only_plain_names(self, loaded: list[str], name: str) -> None:
        with pytest.raises(ValueError, match="no module:qualname that can be imported"):
            load_handler(name, "shop")
        assert not loaded

    def test_what_stands_in_sys_modules_may_be_no_module(
        self, loaded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "shop.odd", 5)
        load_handler("shop:fetch", "shop")
        with pytest.raises(ValueError, match="is not defined there"):
            load_handler("shop.odd:fetch", "shop")

    def test_an_allowed_module_that_can_not_be_imported(self, loaded: list[str]) -> None:
        for module in ("shop.missing", *(f"shop.{name}" for name in BROKEN)):
            with pytest.raises(
                ImportError, match=r"pipeline\.stages\[0\]\.handler: 'shop\..*' can't be imp"
            ) as failed:
                load_handler(f"{module}:fetch", "shop")
            assert failed.value.name == module
            kinds = (ImportError, SystemExit, SyntaxError, ZeroDivisionError)
            assert isinstance(failed.value.__cause__, kinds)
            assert type(failed.value.__cause__).__name__ in str(failed.value)

    def test_exceptions_of_python_and_of_the_library_by_name(self) -> None:
        names = [
            "builtins:OSError",
            "async_pipeline.errors:StageTimeoutError",
            "async_pipeline.errors:PipelineError",
        ]
        text = text_of(stage_of("f", retry_on=names))
        loaded: Any = Pipeline.loads(text, registry={"f": add_one}).stages[0]
        assert loaded.retry_on == (OSError, StageTimeoutError, PipelineError)

    @pytest.mark.parametrize(
        "name", ["builtins:exit", "builtins:len", "builtins:int", "builtins:IOError", "shop:Odd"]
    )
    def test_nothing_else_as_an_exception(self, loaded: list[str], name: str) -> None:
        for retry_on in (name, [name]):
            with pytest.raises(ValueError, match=r"retry_on.*neither registered nor allowed"):
                Pipeline.loads(text_of(stage_of(retry_on=retry_on)), registry={"f": add_one})
        assert not loaded

    def test_exceptions_from_the_registry_and_from_allowed_modules(self, loaded: list[str]) -> None:
        registry = {"f": add_one, "builtins:OSError": KeyError, "own": OwnError}
        text = text_of(stage_of(retry_on=["builtins:OSError", "own", "shop:Odd"]))
        stage: Any = Pipeline.loads(text, registry=registry, allow_import=["shop"]).stages[0]
        assert stage.retry_on == (KeyError, OwnError, sys.modules["shop"].Odd)
        with pytest.raises(ValueError, match="retry_on must hold exception types"):
            Pipeline.loads(text_of(stage_of(retry_on="shop:Job")), registry=registry, allow_import=["shop"])

    def test_a_huge_number_of_retries_is_only_a_number(self) -> None:
        text = text_of(stage_of(retries=10**4000))
        assert Pipeline.loads(text, registry={"f": add_one}).stages[0].retries == 10**4000  # type: ignore[attr-defined]


# -- round trips


REGISTRY = {"lambda": no_name, "foreign": Foreign(), "shop": Shop()}
names = st.one_of(st.sampled_from(["a", "b/c", "", "name", "each", "…", 'q"\\']), st.text(max_size=5))
handlers = st.sampled_from(
    [
        add_one,
        double,
        with_context,
        repeat,
        is_positive,
        fail,
        len,
        bool,
        no_name,
        cached,
        decorated.handler,
        REGISTRY["shop"],
        Shop.make,
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
partials = st.one_of(
    st.builds(lambda reps: partial(repeat, reps=reps), st.integers(0, 3)),
    st.builds(
        lambda args, keywords: partial(repeat, *args, **keywords),
        st.lists(values, max_size=2),
        st.dictionaries(st.text(min_size=1), values, max_size=2),
    ),
)
kinds = st.one_of(
    st.sampled_from([ValueError, OSError, OwnError, StageExecutionError]),
    st.lists(st.sampled_from([ValueError, TypeError, OwnError]), max_size=2).map(tuple),
)
seconds = st.sampled_from([1, 0.5, 2, 1e-3, 1e300, 10**20])
options = st.fixed_dictionaries(
    {},
    optional={
        "timeout": seconds,
        "retries": st.integers(0, 3),
        "retry_delay": st.sampled_from([1, 0.5]),
        "backoff": st.sampled_from(["fixed", "exponential"]),
        "max_delay": st.sampled_from([1, 0.25]),
        "jitter": st.sampled_from([0.5, 1]),
        "retry_on": st.one_of(kinds, st.just(worth_it)),
        "on_error": st.just(stand_in),
    },
)


def stages_of(name: str, handler: Any, options: dict[str, Any], executor: bool) -> Stage[Any, Any]:
    if executor and handler is add_one:
        options = {**options, "timeout": None, "executor": "thread"}  # threads take their own time
    return Stage(name, handler, pass_context=False if isinstance(handler, partial) else None, **options)


plain = st.builds(stages_of, names, handlers | partials, options, st.booleans())
hooks = st.fixed_dictionaries(
    {},
    optional={
        "before_stage": st.just(before),
        "after_stage": st.just(after),
        "middlewares": st.lists(st.just(times_ten), max_size=2),
    },
)


def made_of(step: Any) -> Any:
    several = st.lists(step, min_size=1, max_size=3)
    pair = st.tuples(step, step)
    concurrency = st.integers(1, 9)
    return st.one_of(
        st.builds(lambda stages, name, o: Pipeline(stages, name=name, **o), several, names, hooks),
        st.builds(
            lambda s, name: parallel(s, name=name),
            st.dictionaries(names, step, min_size=1, max_size=3),
            names,
        ),
        st.builds(lambda s, n, name: each(s, n, name=name), step, concurrency, names),
        st.builds(lambda s, n, name: keep(s, n, name=name), step, concurrency, names),
        st.builds(
            lambda cases, other, name: branch(*cases, otherwise=other, name=name),
            st.lists(pair, min_size=1, max_size=2),
            st.none() | step,
            names,
        ),
        st.builds(lambda s, on, name: fallback(*s, on=on, name=name), several, kinds, names),
        st.builds(lambda f, name: require(*f, name=name), st.lists(names, min_size=1, max_size=3), names),
    )


steps = st.recursive(plain | st.just(REGISTRY["foreign"]), made_of, max_leaves=8)
pipelines = st.builds(
    lambda stages, name, o: Pipeline(stages, name=name, **o),
    st.lists(steps, min_size=1, max_size=3),
    names,
    hooks,
)


async def outcome(pipeline: "Pipeline[Any, Any]", value: Any) -> Any:
    context: Any = {}
    result = await pipeline.try_run(value, context=context)
    error: Any = result.error
    path = (
        getattr(error, "stage_name", None),
        getattr(error, "element", None),
        getattr(error, "attempts", None),
    )
    return repr(result.value), repr(error), path, repr(context)


class TestRoundTrips:
    @given(pipelines)
    def test_keep_text_and_repr(self, pipeline: "Pipeline[Any, Any]") -> None:
        text = pipeline.dumps(registry=REGISTRY)
        loaded = Pipeline.loads(text, registry=REGISTRY, allow_import=[HERE, "builtins"])
        assert loaded.dumps(registry=REGISTRY) == text
        assert repr(loaded) == repr(pipeline)
        assert json.loads(text)["pipeline"]["kind"] == "pipeline"
        describe(pipeline)

    @pytest.mark.threads
    @settings(max_examples=60)
    @given(pipelines, st.sampled_from([1, -1, "text", [1, -2, 3], [], None, {"a": 1}]))
    def test_run_alike(self, pipeline: "Pipeline[Any, Any]", value: Any) -> None:
        text = pipeline.dumps(registry=REGISTRY)
        loaded = Pipeline.loads(text, registry=REGISTRY, allow_import=[HERE, "builtins"])
        assert run_virtually(outcome(loaded, value)) == run_virtually(outcome(pipeline, value))

    @given(pipelines, st.data())
    def test_a_changed_text_gives_a_pipeline_or_a_value_error(
        self, pipeline: "Pipeline[Any, Any]", data: st.DataObject
    ) -> None:
        document = json.loads(pipeline.dumps(registry=REGISTRY))
        for _ in range(data.draw(st.integers(1, 3))):
            change(document, data)
        try:
            loaded = Pipeline.loads(json.dumps(document), registry=REGISTRY, allow_import=[HERE, "builtins"])
        except ValueError as error:
            assert str(error)
        else:
            assert type(loaded) is Pipeline

    @given(st.text() | values.map(json.dumps))
    def test_any_other_text_is_a_value_error(self, text: str) -> None:
        with pytest.raises(ValueError, match=r".{9}"):
            Pipeline.loads(text)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON document with each of its keys."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)


other_values = values | st.sampled_from(
    ["builtins:len", "builtins:OSError", "lambda", "foreign", f"{HERE}:fail", {"partial": "lambda"}, "thread"]
)
other_keys = st.text(max_size=3) | st.sampled_from(
    ["kind", "name", "steps", "limiter", "retry_on", "step", "partial"]
)


def change(document: Any, data: st.DataObject) -> None:
    found = list(places(document))
    if not found:
        return
    container, key = data.draw(st.sampled_from(found))
    how = data.draw(st.sampled_from(["delete", "rename", "replace", "wrap"]))
    if how == "replace":
        container[key] = data.draw(other_values)
    elif how == "wrap":
        container[key] = data.draw(st.sampled_from([[container[key]], {"a": container[key]}]))
    else:
        value = container.pop(key)
        if how == "rename" and isinstance(container, dict):
            container[data.draw(other_keys)] = value
