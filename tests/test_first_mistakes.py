"""What a newcomer gets wrong first is answered with what to write instead."""

import asyncio
import copy
import functools
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import async_pipeline
from async_pipeline import (
    BatchError,
    Pipeline,
    Stage,
    StageExecutionError,
    branch,
    each,
    fallback,
    keep,
    parallel,
    require,
    staged,
)
from async_pipeline.advice import FALLBACK, MAP, PIPELINE, STAGE, STEP, STREAM, advised
from async_pipeline.jobs import JobRunner
from async_pipeline.journal import Journal


async def fetch(url: str) -> str:
    return f"{url}!"


def parse(text: str) -> str:
    return text


class Client:
    def load(self, url: str) -> str:
        return f"loaded {url}"

    def load_into(self, url: str, session: dict[str, str]) -> str:
        session["url"] = url
        return url

    def name_of(self) -> str:
        return type(self).__name__

    def put_into(self, context: dict[str, object]) -> None:
        context["client"] = self


class Odd:
    """Has every attribute, and none."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def numbers() -> Iterator[int]:
    yield 1
    yield 2


async def slow_numbers() -> AsyncIterator[int]:
    yield 1
    yield 2


blocking = threading.Semaphore(2)
second = timedelta(seconds=1)
stage = Stage("fetch", fetch)
pipeline = Pipeline([fetch, parse])

# Any, because these are errors for a type checker, too
AnyStage: Any = Stage
AnyPipeline: Any = Pipeline
any_stage: Any = stage
any_pipeline: Any = pipeline
any_staged: Any = staged
any_parallel: Any = parallel
any_each: Any = each
any_keep: Any = keep
any_branch: Any = branch
any_fallback: Any = fallback
AnyJournal: Any = Journal


class Case:
    """A wrong call, and the words of the answer; by the call's own text in a list of tests."""

    def __init__(self, call: str, *words: str, error: type[Exception] = TypeError) -> None:
        self.call = call
        self.words = words
        self.error = error

    def __repr__(self) -> str:
        return self.call


CASES = [
    # a handler that is none
    Case("AnyStage('fetch', 5)", "handler must be a callable", "not 5", "write Stage('fetch', fetch)"),
    Case("AnyStage('fetch', parse('x'))", "not 'x'", "write Stage('fetch', fetch), with the function itself"),
    Case("AnyStage(fetch, 'fetch')", "name must be a str", "write Stage('fetch', fetch)"),
    Case("AnyStage(fetch)", "missing 1 required positional argument: 'handler'; write Stage('fetch', fetch"),
    Case(
        "AnyStage('fetch', fetch, 2.0)", "takes 3 positional arguments", "Stage('fetch', fetch, timeout=2.0)"
    ),
    Case("AnyStage('again', stage)", "not Stage('fetch'), which is a stage already", "stage.replace(name="),
    Case("AnyStage('again', pipeline)", "which is a step already, and goes where a stage does"),
    Case("AnyStage('fetch', fetch('x'))", "not the coroutine object", "Stage('fetch', fetch), without ()"),
    Case("AnyStage('all', Client.load_into)", "it is a method, but of no instance", "write instance.method"),
    Case("AnyStage('load', Client.load)", "it is a method, but of no instance"),
    Case("AnyPipeline([Client.load_into])", "it is a method, but of no instance"),
    Case("AnyStage('none', lambda: 1)", "it must take handler(value) or handler(value, context), not ()"),
    # the decorator
    Case("any_staged('fetch')", "takes a callable, or its options by name", "write @staged(name='fetch'"),
    Case("any_staged(2.0)", "not 2.0; write @staged(name='fetch', timeout=2.0)"),
    Case("any_staged(fetch, 'fetch')", "positional argument", "write @staged(name='fetch', timeout=2.0)"),
    Case("any_staged(retry=3)(fetch)", "'retry'; did you mean 'retries'?"),
    Case("any_staged(staged(fetch))", "which is a stage already"),
    Case("any_staged(timeout=2.0)(stage)", "which is a stage already"),
    Case(
        "AnyPipeline([staged(name='f', timeout=2.0)])",
        "not the decorator staged(name='f', timeout=2.0); write staged(name='f', timeout=2.0)(fetch)",
    ),
    # options
    Case("AnyStage('fetch', fetch, max_retries=3)", "'max_retries'; did you mean 'retries'?"),
    Case("AnyStage('fetch', fetch, attempts=3)", "write retries=, the number of attempts after the first"),
    Case("AnyStage('fetch', fetch, delay=1)", "'delay'; did you mean 'retry_delay'?"),
    Case("AnyStage('fetch', fetch, timout=1)", "'timout'; did you mean 'timeout'?"),
    Case("AnyStage('fetch', fetch, limit=1)", "'limit'; did you mean 'limiter'?"),
    Case(
        "AnyStage('fetch', fetch, concurrency=9)", "map(items, concurrency=20)", "limiter=asyncio.Semaphore"
    ),
    Case("AnyStage('fetch', fetch, xyz=1)", "'xyz'; it takes name, handler, timeout, retries, retry_delay"),
    Case("stage.replace(retry=3)", "'retry'; did you mean 'retries'?"),
    Case("AnyStage('f', fetch, timeout=second)", "timeout must be", "its .total_seconds()"),
    Case("AnyStage('f', fetch, timeout='2')", "timeout must be a number of seconds, not '2' (str)"),
    Case("AnyStage('f', fetch, retry_on=OSError())", "retry_on must be an exception type", "; write OSError"),
    Case(
        "AnyStage('f', fetch, retry_on=[OSError])",
        "retry_on must be an exception type, a tuple",
        "; write a tuple, (...)",
    ),
    Case("AnyStage('f', fetch, retry_on='OSError')", "or a predicate", "not 'OSError'"),
    Case("AnyStage('f', fetch, retry_on=lambda: 1)", "retry_on <function", "it must take retry_on(error)"),
    Case("AnyStage('f', fetch, limiter=blocking)", "write limiter=asyncio.Semaphore(10)"),
    Case("AnyStage('f', fetch, backoff='linear')", 'must be "fixed" or "exponential"', error=ValueError),
    # a pipeline
    Case("AnyPipeline(stage, stage)", "takes 2 positional arguments", "write Pipeline([fetch, parse], name="),
    Case("AnyPipeline('pages', [stage])", "write Pipeline([fetch, parse], name='pages')"),
    Case("AnyPipeline()", "'stages'; write Pipeline([fetch, parse]"),
    Case("AnyPipeline(stage)", "stages must be a list of stages", "write Pipeline([fetch, parse])"),
    Case("AnyPipeline({'fetch': fetch})", "stages must be a list of stages, not {'fetch'"),
    Case("AnyPipeline({fetch})", "stages must be a list of stages, not {<function"),
    Case("AnyPipeline([('fetch', fetch)])", "stages must hold stages", "; write Stage('fetch', ...)"),
    Case("AnyPipeline([(fetch, parse)])", "stages must hold stages"),
    Case("AnyPipeline([fetch], steps=[fetch])", "did you mean 'stages'?"),
    Case("AnyPipeline([fetch], middleware=[])", "did you mean 'middlewares'?"),
    Case("AnyPipeline([fetch], concurrency=5)", "pipeline.map(items, concurrency=20)"),
    Case("AnyPipeline([fetch], timeout=5)", "pipeline.run(value, timeout=10"),
    Case("AnyPipeline([fetch], retries=5)", "Stage('fetch', fetch, retries=3"),
    Case("AnyPipeline([fetch], hooks=5)", "write before_stage=, after_stage= or observers="),
    Case("AnyPipeline([fetch], middlewares=fetch)", "not <function", "write middlewares=[middleware]"),
    Case("AnyPipeline([fetch], middlewares='fetch')", "not 'fetch'; write middlewares=[middleware]"),
    Case(
        "AnyPipeline([fetch], middlewares=[fetch])", "must take middleware(next, stage_name, value, context)"
    ),
    Case("AnyPipeline([fetch], observers=print)", "write observers=[observer]"),
    Case("AnyPipeline([fetch], before_stage=Client.load_into)", "it is a method, but of no instance"),
    Case("setattr(pipeline, 'name', 'x')", "pipeline.replace(name='x')", error=AttributeError),
    Case("setattr(stage, 'retries', 2)", "stage.replace(retries=2)", error=AttributeError),
    # batches
    Case("any_pipeline.stream()", "'items'; write pipeline.stream(items, concurrency=20)"),
    Case("any_pipeline.stream([], workers=5)", "did you mean 'concurrency'?"),
    Case("any_pipeline.stream([], buffer_size=5)", "did you mean 'buffer'?"),
    Case("any_pipeline.stream([], unordered=True)", "write ordered=False"),
    Case("any_pipeline.stream([], return_exceptions=True)", "iterate results.outcomes() instead"),
    Case("pipeline.stream([], 0)", "concurrency must be at least 1", error=ValueError),
    Case("any_pipeline.stream([], '5')", "concurrency must be an int or an asyncio.Semaphore, not '5'"),
    Case("any_pipeline.stream([], None)", "concurrency must be an int or an asyncio.Semaphore, not None"),
    Case("any_pipeline.stream([], 2.5)", "concurrency must be an int, not 2.5"),
    Case("any_pipeline.stream([], blocking)", "an int or an asyncio.Semaphore, not <threading."),
    Case("any_pipeline.stream(numbers)", "not a function that makes one: write numbers()"),
    Case("any_pipeline.stream(slow_numbers)", "not a function that makes one: write slow_numbers()"),
    Case("any_pipeline.stream(fetch, ['a'])", "items must be an iterable or an async iterable, not function"),
    Case("any_pipeline.stream(5)", "items must be an iterable or an async iterable, not int"),
    Case("any_pipeline.stream(None)", "items must be an iterable or an async iterable, not NoneType"),
    Case("any_pipeline.stream(fetch('a'))", "items must be an iterable", "await it first"),
    # steps
    Case("any_parallel(stage, stage)", "write parallel(price=find_price, stock=count_stock)"),
    Case("any_parallel(stage, stage, name='both')", "write parallel(price=find_price"),
    Case("any_parallel(stage, stage, other=stage)", "write parallel(price=find_price"),
    Case("any_each()", "'step'; write each(fetch, concurrency=20)"),
    Case("any_each(stage, workers=5)", "did you mean 'concurrency'?"),
    Case("any_each(stage, retries=5)", "Stage('fetch', fetch, retries=3"),
    Case("any_keep()", "'predicate'; write keep(is_open, concurrency=20)"),
    Case("any_keep(stage, workers=5)", "did you mean 'concurrency'?"),
    Case("any_branch((parse, stage), default=stage)", "did you mean 'otherwise'?"),
    Case("any_fallback()", "'step'; write fallback(ask_primary, ask_replica)"),
    Case("any_fallback(stage, default=5)", "a default is one more step: fallback(fetch, lambda value: None)"),
    Case("any_fallback(stage, exceptions=OSError)", "did you mean 'on'?"),
    Case("any_branch((parse, stage), workers=3)", "'workers'; it takes "),
    Case("any_each(stage, default=3)", "'default'; it takes step, concurrency"),
    Case("AnyStage('all', each(stage))", "which is a step already, and goes where a stage does"),
    Case("stage | any_each", "but each makes a step: write each(...)"),
    Case("AnyPipeline([fetch, require])", "but require makes a step: write require(...)"),
    # a journal
    Case("AnyJournal(5)", "path must be a str or an os.PathLike, not 5; write Journal('batch.db')"),
    Case("AnyJournal(b'batch.db')", "path must be a str or an os.PathLike, not b'batch.db'"),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_answer(case: Case) -> None:
    with pytest.raises(case.error) as raised:
        eval(case.call)
    for word in case.words:
        assert word in str(raised.value)


class TestMap:
    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: any_pipeline.map(), "'items'; write pipeline.map(items, concurrency=20)"),
            (lambda: any_pipeline.map("a", "b", "c"), "write pipeline.map(items, concurrency=20)"),
            (lambda: any_pipeline.map([], limit=5), "did you mean 'concurrency'?"),
            (lambda: any_pipeline.map([], concurency=5), "did you mean 'concurrency'?"),
            (lambda: any_pipeline.map([], return_exception=True), "did you mean 'return_exceptions'?"),
            (lambda: any_pipeline.map([], raise_exceptions=False), "write return_exceptions=True"),
            (lambda: any_pipeline.map([], ordered=False), "in the order of the items"),
            (lambda: any_pipeline.map([], chunksize=5), "it takes items, concurrency, context, return_exc"),
            (lambda: any_pipeline.map([], timeout=timedelta(seconds=1)), "give its .total_seconds()"),
        ],
    )
    async def test_the_answer(self, call: Callable[[], Any], words: str) -> None:
        with pytest.raises(TypeError) as raised:
            await call()
        assert words in str(raised.value)

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="inspect.markcoroutinefunction is of Python 3.12")
    def test_the_answer_comes_with_the_call(self) -> None:
        with pytest.raises(TypeError, match="did you mean 'concurrency'"):
            any_pipeline.map([], limit=5)

    @pytest.mark.parametrize("items", [functools.partial(numbers), Client().load, Odd()], ids=repr)
    async def test_a_callable_instead_of_items(self, items: Any) -> None:
        with pytest.raises(TypeError, match=r"^items must be an iterable or an async iterable, not \w+$"):
            await pipeline.map(items)

    async def test_a_task_instead_of_items(self) -> None:
        task: Any = asyncio.ensure_future(fetch("a"))  # Python would iterate it
        with pytest.raises(TypeError, match=r"items must be an iterable, not <Task .*: await it first"):
            await pipeline.map(task)
        await task

    async def test_is_still_what_it_is(self) -> None:
        assert inspect.iscoroutinefunction(pipeline.map)
        assert list(inspect.signature(pipeline.map).parameters)[:2] == ["items", "concurrency"]
        with pytest.raises(BatchError) as failed:
            await Pipeline([lambda value: value / 0]).map([1])
        assert failed.value.failures.keys() == {0}


async def test_try_run_raises_for_a_wrong_argument() -> None:
    with pytest.raises(TypeError, match=r"^timeout must be a number of seconds, not '5' \(str\)"):
        await any_pipeline.try_run("x", timeout="5")
    assert (await pipeline.try_run("x", timeout=5)).ok


class TestGeneratorTwice:
    """The second time it has nothing left, which would look like an empty source."""

    MESSAGE = "must not be a generator that was in a map, stream or each before.*call its function again"

    @pytest.mark.parametrize("make", [numbers, slow_numbers])
    async def test_in_map_and_stream(self, make: Callable[[], Any]) -> None:
        pipeline = Pipeline([str])
        items = make()
        assert await pipeline.map(items) == ["1", "2"]
        with pytest.raises(ValueError, match=f"^items {self.MESSAGE}"):
            await pipeline.map(items)
        with pytest.raises(ValueError, match=f"^items {self.MESSAGE}"):
            pipeline.stream(items)

    @pytest.mark.parametrize("make", [numbers, slow_numbers])
    async def test_after_a_stream_that_was_left_early(self, make: Callable[[], Any]) -> None:
        pipeline = Pipeline([str])
        items = make()
        async with pipeline.stream(items) as results:
            assert await anext(results) == "1"
        with pytest.raises(ValueError, match=self.MESSAGE):
            await pipeline.map(items)

    async def test_in_two_steps(self) -> None:
        def refuse(number: int) -> int:
            raise ValueError(number)

        with pytest.raises(StageExecutionError) as failed:
            await fallback(each(refuse), each(str, name="text")).run(numbers())
        assert failed.value.stage_name == "fallback/text"
        assert "the value that 'text' gets must not be a generator" in str(failed.value.original_error)

    async def test_whoever_shares_one_while_it_is_iterated_may(self) -> None:
        async def double(number: int) -> int:
            await asyncio.sleep(0)
            return number * 2

        items = iter(number for number in range(10))
        halves = await asyncio.gather(Pipeline([double]).map(items, 1), Pipeline([double]).map(items, 1))
        assert sorted([*halves[0], *halves[1]]) == [*range(0, 20, 2)]
        assert all(halves)

    async def test_one_that_could_not_be_closed_goes_on(self) -> None:
        def stubborn() -> Iterator[str]:
            try:
                yield "a"
            except GeneratorExit:
                yield "ignored"
            yield "b"

        items = stubborn()
        with pytest.raises(BatchError):
            await Pipeline([lambda item: 1 / 0]).map(items)
        assert await Pipeline([str]).map(items) == ["b"]

    async def test_one_that_is_used_up_otherwise_is_empty(self) -> None:
        items = numbers()
        assert [*items] == [1, 2]
        assert await Pipeline([str]).map(items) == []

    async def test_what_makes_one_each_time_may_be_given_again(self) -> None:
        class Table(list[int]):  # a list can't be referred to weakly
            def __iter__(self) -> Iterator[int]:
                yield 1

        class Feed:
            async def __aiter__(self) -> AsyncIterator[int]:
                yield 1

        for items in (Table(), Feed()):
            assert await Pipeline([str]).map(items) == ["1"]
            assert await Pipeline([str]).map(items) == ["1"]


class TestStream:
    async def test_not_entered(self) -> None:
        with pytest.raises(RuntimeError, match=r"not entered; iterate inside its block: async with "):
            async for _ in pipeline.stream("ab"):
                pass

    async def test_left(self) -> None:
        async with pipeline.stream("ab") as results:
            pass
        with pytest.raises(RuntimeError, match="the stream is closed; iterate inside its block: async with"):
            async for _ in results:
                pass

    async def test_entered_twice(self) -> None:
        stream = pipeline.stream("ab")
        async with stream:
            pass
        with pytest.raises(RuntimeError, match=r"entered once; call pipeline.stream\(...\) again"):
            await stream.__aenter__()

    def test_entered_by_with(self) -> None:
        stream: Any = pipeline.stream("ab")
        with pytest.raises(TypeError, match=r"with async with: async with pipeline\.stream\(items\)"), stream:
            pytest.fail("it was entered")

    def test_iterated_by_for(self) -> None:
        stream: Any = pipeline.stream("ab")
        assert not isinstance(stream, Iterable)  # httpx would take it for a sync body
        with pytest.raises(TypeError, match="not iterable"):
            iter(stream)
        assert repr(stream.outcomes()) == f"<outcomes of {stream!r}>"

    async def test_is_an_async_source_all_the_same(self) -> None:
        async with pipeline.stream("ab") as results:
            assert await Pipeline([str.upper]).map(results) == ["A!", "B!"]


class TestMethods:
    async def test_of_an_instance(self) -> None:
        client = Client()
        context: dict[str, object] = {}
        both = Pipeline([client.load, client.load_into])
        assert await both.run("a", context=context) == "loaded a"
        assert context == {"url": "loaded a"}

    async def test_of_the_value(self) -> None:
        context: dict[str, object] = {}
        client = Client()
        assert await Pipeline([Client.name_of]).run(client) == "Client"
        await Pipeline([Client.put_into]).run(client, context=context)
        assert context == {"client": client}

    def test_by_decorator(self) -> None:
        with pytest.raises(TypeError, match=r"within a class, no @staged, but Stage\('name', self\.method\)"):

            class Worker:
                @staged
                def load(self, url: str) -> str:
                    return url


class TestNeitherStagesNorPipelinesAreCallable:
    """A stage that answered a call with advice would be a callable to whoever asks."""

    @pytest.mark.parametrize("step", [stage, pipeline, each(stage)])
    def test(self, step: Any) -> None:
        assert not callable(step)
        with pytest.raises(TypeError, match="object is not callable"):
            step("x")


class TestAdvised:
    def test_changes_nothing_else(self) -> None:
        @advised("join('a', sep='b')")
        def join(text: str, /, *, sep: str = "") -> str:
            """Join."""
            return sep.join(text)

        assert join("ab", sep="-") == "a-b"
        assert (join.__name__, join.__doc__) == ("join", "Join.")
        assert str(inspect.signature(join)) == "(text: str, /, *, sep: str = '') -> str"
        assert not inspect.iscoroutinefunction(join)

    def test_leaves_the_functions_own_errors(self) -> None:
        @advised("right()")
        def inner(value: object) -> None:
            raise TypeError("its own")

        with pytest.raises(TypeError, match=r"^its own$"):
            inner(1)

    def test_leaves_those_of_a_call_further_in(self) -> None:
        @advised("right()")
        def inner(value: object) -> None:
            parse()  # type: ignore[call-arg]

        with pytest.raises(TypeError, match=r"^parse\(\) missing 1 required positional argument: 'text'$"):
            inner(1)

    def test_python_guesses_only_once(self) -> None:
        with pytest.raises(TypeError) as raised:
            AnyStage("f", fetch, retrys=1)
        assert str(raised.value).lower().count("did you mean") == 1

    @pytest.mark.parametrize(
        ("function", "meant"),
        [
            (Stage.__init__, STAGE),
            (Pipeline.__init__, PIPELINE),
            (Pipeline.map, MAP),
            (Pipeline.stream, STREAM),
            (each, STEP),
            (fallback, FALLBACK),
        ],
    )
    def test_no_advice_is_about_an_option_that_there_is(self, function: Any, meant: dict[str, str]) -> None:
        options = inspect.signature(function).parameters
        others = [other for names in meant for other in names.split()]
        assert len(others) == len(set(others)) or meant is STAGE
        assert not set(others) & set(options)
        assert {answer for answer in meant.values() if answer.isidentifier()} <= {*options, "otherwise"}

    def test_stages_and_pipelines_are_copied_and_pickled_as_before(self) -> None:
        for twin in (copy.copy(stage), pickle.loads(pickle.dumps(stage))):
            assert (twin.name, twin.handler) == ("fetch", fetch)

    async def test_a_subclass_may_still_have_a_constructor_of_its_own(self) -> None:
        class Fetch(Stage[str, str]):
            def __init__(self, **options: Any) -> None:
                super().__init__("fetch", fetch, **options)

        assert await Fetch(retries=1).run("x") == "x!"
        with pytest.raises(TypeError, match="did you mean 'retries'"):
            Fetch(retry=1)


EXTRAS = {
    "integrations.fastapi": "fastapi",
    "integrations.dask": "dask",
    "integrations.taskiq": "taskiq",
    "telemetry.opentelemetry": "otel",
    "telemetry.prometheus": "prometheus",
}


PACKAGES = "cloudpickle distributed fastapi opentelemetry prometheus_client pydantic starlette taskiq yaml"


def last_line_without_packages(statement: str) -> str:
    """What Python ends with where none of the extras' packages is installed."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(async_pipeline.__file__).parents[1])!r}); "
        f"sys.modules.update(dict.fromkeys({PACKAGES.split()!r})); {statement}"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra(module: str) -> None:
    last = last_line_without_packages(f"import async_pipeline.{module}")
    assert last.startswith("ImportError: ")
    assert last.endswith(
        f"support requires installing async-pipeline[{EXTRAS[module]}]: "
        f"pip install 'async-pipeline[{EXTRAS[module]}]'"
    )


@pytest.mark.parametrize("name", ["OpenTelemetryMiddleware", "PrometheusObserver"])
def test_a_name_whose_extra_is_missing(name: str) -> None:
    last = last_line_without_packages(f"from async_pipeline.telemetry import {name}")
    assert ": pip install 'async-pipeline[" in last


async def test_a_job_in_place_of_its_id() -> None:
    async with JobRunner() as jobs:
        any_jobs: Any = jobs
        job = await jobs.submit(pipeline, "a")
        for call in (any_jobs.get, any_jobs.dismiss, lambda job: anext(any_jobs.watch(job))):
            with pytest.raises(TypeError, match=r"^job_id must be a str, not Job\(.*\); write job\.id$"):
                await call(job)
        with pytest.raises(TypeError, match=r"^job_id must be a str, not 5$"):
            await any_jobs.get(5)


def injected(function: Any) -> Any:
    """Give it one argument more."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function("injected", *args)

    return call


@injected
async def marked(mark: str, next_stage: Any, name: str, value: str, context: object) -> str:
    return f"{mark} {await next_stage(value)}"


@injected
def is_transient(mark: str, error: Exception) -> bool:
    return bool(mark)


class Dispatching:
    @functools.singledispatchmethod
    def middleware(self, next_stage: Any, name: str, value: str, context: object) -> Any:
        return next_stage(value)

    @functools.singledispatchmethod
    def is_transient(self, error: Exception) -> bool:
        return True

    @functools.singledispatchmethod
    def handler(self, value: str, context: object = None) -> str:
        return value


class TestWhatIsRight:
    """And looks like a mistake."""

    @pytest.mark.parametrize("middleware", [marked, Dispatching().middleware, Mock(spec=marked)], ids=repr)
    def test_middlewares_that_wrap_others(self, middleware: Any) -> None:
        assert Pipeline([fetch], middlewares=[middleware]).middlewares == (middleware,)

    async def test_a_middleware_that_is_given_one_argument_more(self) -> None:
        assert await Pipeline([fetch], middlewares=[marked]).run("a") == "injected a!"

    @pytest.mark.parametrize("retry_on", [is_transient, Dispatching().is_transient], ids=repr)
    def test_predicates_that_wrap_others(self, retry_on: Any) -> None:
        assert Stage("fetch", fetch, retry_on=retry_on).retry_on is retry_on

    async def test_a_handler_that_wraps_others(self) -> None:
        assert await Stage("value", Dispatching().handler).run("a") == "a"

    async def test_a_method_that_is_called_on_the_value_with_the_context(self) -> None:
        step: Any = AnyStage("put", Client.load_into, pass_context=True)
        with pytest.raises(StageExecutionError):  # but it is what was asked for
            await step.run("a", context={})

    async def test_the_run_of_a_step_is_a_handler(self) -> None:
        assert await Stage("all", each(fetch).run, timeout=1).run(["a"]) == ["a!"]

    def test_callable_lists_and_ordered_sets(self) -> None:
        class Registry(list[Any]):
            def __call__(self, middleware: Any) -> Any:
                self.append(middleware)
                return middleware

        registry = Registry()
        registry(marked)
        assert Pipeline([fetch], middlewares=registry).middlewares == (marked,)
        stages: Any = dict.fromkeys([stage]).keys()
        assert Pipeline(stages).stages == (stage,)


class TestNames:
    def test_modules_are_offered_and_loaded_when_they_are_used(self) -> None:
        source = str(Path(async_pipeline.__file__).parents[1])
        code = (
            f"import sys; sys.path.insert(0, {source!r}); import async_pipeline; "
            "names = 'jobs', 'journal', 'testing', 'engine', 'middlewares', 'telemetry', 'integrations'; "
            "print({*names} <= {*dir(async_pipeline)}); "
            "print(any(f'async_pipeline.{n}' in sys.modules for n in names)); "
            "print([getattr(async_pipeline, n).__name__ == 'async_pipeline.' + n for n in names])"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.splitlines() == ["True", "False", str([True] * 7)], done.stderr

    def test_what_is_not_there_is_not_there(self) -> None:
        module: Any = async_pipeline
        assert module.__getattr__("journal").Journal is Journal
        with pytest.raises(AttributeError, match=r"^module 'async_pipeline' has no attribute 'nothing'$"):
            _ = module.nothing

    def test_all_public_names_are_offered(self) -> None:
        assert {*async_pipeline.__all__} <= {*dir(async_pipeline)}

    def test_nothing_private_is_offered_of_an_object(self) -> None:
        offered = {name for name in dir(stage) if not name.startswith("_")}
        assert {"run", "replace", "handler", "name", "retries"} <= offered
        assert {"run", "map", "stream", "try_run"} <= {name for name in dir(pipeline) if name[0] != "_"}

    def test_require_needs_names(self) -> None:
        with pytest.raises(ValueError, match="at least one field"):
            require()
