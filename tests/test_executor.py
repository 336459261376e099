"""Sync handlers off the loop: in threads, processes, interpreters and executors of one's own."""

import asyncio
import concurrent.futures
import functools
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import BrokenThreadPool
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import pytest

from async_pipeline import (
    BatchError,
    DeadlineExceeded,
    Pipeline,
    Stage,
    StageExecutionError,
    StageTimeoutError,
    staged,
)
from async_pipeline.executor import shares_memory
from tests import offloop
from tests.helpers import run_virtually
from tests.offloop import PATIENCE, user

P = ParamSpec("P")
T = TypeVar("T")

AnyStage = Stage[Any, Any]

SOON = 0.05  # seconds of a timeout that is meant to run out

needs_interpreters = pytest.mark.skipif(
    sys.version_info < (3, 14), reason="CPython has interpreter pools since 3.14"
)


class Gate:
    """A handler that blocks its thread until the gate is opened, and knows which calls came and went."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.entered = threading.Event()
        self.open = threading.Event()
        self.begun: list[Any] = []
        self.ended: list[Any] = []

    def __call__(self, value: Any) -> Any:
        self.begun.append(value)
        self.entered.set()
        if not self.open.wait(PATIENCE):
            raise AssertionError("nobody opened the gate: did this block the loop?")
        self.ended.append(value)
        if self.error is not None:
            raise self.error
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.open.set()


class Inline(Executor):
    """An executor of one's own: it runs a call where it is submitted."""

    def __init__(self) -> None:
        self.functions: list[Any] = []

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self.functions.append(args[0])
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def process_pool() -> ProcessPoolExecutor:
    # not forked: by now there are threads
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with process_pool() as pool:
        yield pool
    assert multiprocessing.active_children() == []


@pytest.fixture(scope="module")
def interpreters() -> Iterator[Any]:
    pool_class: Any = getattr(concurrent.futures, "InterpreterPoolExecutor")  # noqa: B009 - new in 3.14
    # an interpreter has the path that Python started with, not the one that pytest has made of it
    with pool_class(1, initializer=exec, initargs=(f"import sys; sys.path[:] = {sys.path}", {})) as pool:
        yield pool


@pytest.fixture(params=["thread", "own threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What ``executor=`` takes for threads."""
    if request.param == "thread":
        yield "thread"
    else:
        with ThreadPoolExecutor(4) as pool:
            yield pool


async def failure_of(step: Any, value: Any = 1) -> StageExecutionError:
    with pytest.raises(StageExecutionError) as caught:
        async with asyncio.timeout(PATIENCE):
            await step.run(value)
    return caught.value


async def begin(run: Any, gate: Gate) -> "asyncio.Task[Any]":
    """Start the run, and go on when its handler blocks a thread; no timeout runs out until then."""
    task = asyncio.create_task(run)
    await asyncio.sleep(0)
    assert gate.entered.wait(PATIENCE)
    return task


async def settle() -> None:
    """Let the loop do what threads have asked it to."""
    for _ in range(5):
        await asyncio.sleep(0)


def run_python(*arguments: str) -> str:
    """Run another Python, in which warnings are errors, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        timeout=6 * PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def same(value: Any) -> Any:
    return value


def with_context(value: Any, context: Any) -> Any:
    return context


def with_anything(*args: Any) -> Any:
    return args


class Method:
    def with_context(self, value: Any, context: Any) -> Any:
        return context


class TestArguments:
    @pytest.mark.parametrize("executor", ["process", "threads", "", "Thread"])
    def test_another_string_than_thread(self, executor: Any) -> None:
        with pytest.raises(
            ValueError,
            match=rf'^executor must be "thread" or a concurrent\.futures\.Executor, not {executor!r}$',
        ):
            Stage("same", same, executor=executor)

    @pytest.mark.parametrize("executor", [5, True, b"thread", object(), same, int, ["thread"]])
    def test_what_is_no_executor(self, executor: Any) -> None:
        with pytest.raises(TypeError, match=r'^executor must be "thread" or a .*Executor, not [^:]*$'):
            Stage("same", same, executor=executor)

    @pytest.mark.parametrize("executor", [ProcessPoolExecutor, ThreadPoolExecutor, Inline])
    def test_a_class_instead_of_its_instance_is_answered_with_the_right_call(self, executor: Any) -> None:
        with pytest.raises(TypeError, match=rf"^executor must be .*: write {executor.__name__}\(\)$"):
            Stage("same", same, executor=executor)

    @pytest.mark.parametrize("executor", [None, "thread", Inline(), ThreadPoolExecutor(1)])
    def test_what_can_be_an_executor(self, executor: Any) -> None:
        stage = Stage("same", same, executor=executor)
        assert stage.executor is executor
        assert stage.replace(timeout=1).executor is executor
        assert staged(executor=executor)(same).executor is executor

    def test_replace_and_staged_check_it_too(self) -> None:
        with pytest.raises(ValueError, match=r"^executor must be"):
            Stage("same", same).replace(executor="process")
        with pytest.raises(ValueError, match=r"^executor must be"):
            staged(executor="process")(same)  # type: ignore[call-overload]

    @pytest.mark.parametrize("executor", ["thread", Inline(), ThreadPoolExecutor(1)])
    def test_an_async_handler_is_refused(self, executor: Any) -> None:
        with pytest.raises(TypeError, match=r"^executor= is for sync handlers, but <function .* is async"):
            Stage("double", offloop.double_later, executor=executor)

    @pytest.mark.parametrize("handler", [with_context, with_anything, Method().with_context])
    def test_a_process_pool_is_refused_to_a_handler_that_wants_the_context(
        self, handler: Any, processes: ProcessPoolExecutor
    ) -> None:
        with pytest.raises(
            TypeError, match=r'^handler .* wants the context.* take \(value\), or write executor="thread"$'
        ):
            Stage("wants", handler, executor=processes)

    def test_a_process_pool_is_refused_to_pass_context_too(self, processes: ProcessPoolExecutor) -> None:
        with pytest.raises(TypeError, match=r"wants the context"):
            Stage("wants", same, executor=processes, pass_context=True)

    def test_a_process_pool_is_allowed_where_the_context_is_not_passed(
        self, processes: ProcessPoolExecutor
    ) -> None:
        stage: AnyStage = Stage("value", offloop.with_context, executor=processes, pass_context=False)
        assert run_virtually(stage.run(1)) == (1, None)

    @needs_interpreters
    def test_an_interpreter_pool_is_refused_to_a_handler_that_wants_the_context(
        self, interpreters: Any
    ) -> None:
        for handler, pass_context in ((with_context, None), (same, True)):
            with pytest.raises(TypeError, match=r'wants the context.* write executor="thread"$'):
                Stage("wants", handler, executor=interpreters, pass_context=pass_context)

    def test_threads_and_executors_of_ones_own_are_for_handlers_that_want_the_context(self) -> None:
        executors: list[Any] = ["thread", ThreadPoolExecutor(1), Inline()]
        for executor in executors:
            assert Stage("wants", with_context, executor=executor).executor is executor
            assert Stage("wants", same, executor=executor, pass_context=True).executor is executor

    @pytest.mark.threads
    def test_nothing_imports_the_slow_modules_to_find_out(self) -> None:
        printed = run_python(
            "-c",
            textwrap.dedent(
                """
                import asyncio, sys
                from concurrent.futures import ThreadPoolExecutor
                from async_pipeline import Stage

                def handler(value, context):
                    return value

                with ThreadPoolExecutor(1) as pool:
                    for executor in ("thread", pool):
                        asyncio.run(Stage("handler", handler, executor=executor).run(1))
                slow = {f"concurrent.futures.{name}" for name in ("process", "interpreter")}
                print(slow & set(sys.modules), "multiprocessing" in sys.modules)
                """
            ),
        )
        assert printed == "set() False\n"

    def test_who_shares_memory(self, processes: ProcessPoolExecutor) -> None:
        assert not shares_memory(processes)
        assert all(map(shares_memory, ("thread", ThreadPoolExecutor(1), Inline())))


@pytest.mark.threads
class TestThreads:
    async def test_the_handler_runs_in_another_thread(self, threads: Any) -> None:
        stage: AnyStage = Stage("where", lambda value: (value, threading.get_ident()), executor=threads)
        value, ident = await stage.run(1)
        assert value == 1
        assert ident != threading.get_ident()

    async def test_thread_is_the_default_executor_of_the_loop(self) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="default"))
        stage: AnyStage = Stage("where", lambda value: threading.current_thread().name, executor="thread")
        assert (await stage.run(1)).startswith("default")

    async def test_a_pool_of_ones_own_is_the_one_that_runs_it(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="own") as pool:
            stage: AnyStage = Stage("where", lambda value: threading.current_thread().name, executor=pool)
            assert (await stage.run(1)).startswith("own")

    async def test_the_loop_goes_on_while_the_handler_blocks(self, threads: Any) -> None:
        with Gate() as gate:
            run = await begin(Stage("slow", gate, executor=threads).run(1), gate)
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert (gate.ended, run.done()) == ([], False)
            gate.open.set()
            assert await run == 1

    async def test_the_context_is_the_object_of_the_run(self, threads: Any) -> None:
        def mark(value: Any, context: Any) -> Any:
            context["marked"] = threading.get_ident()
            return context

        context: dict[str, Any] = {}
        pipeline: Pipeline[Any, Any] = Pipeline([Stage("mark", mark, executor=threads)])
        assert await pipeline.run(1, context=context) is context
        assert context["marked"] != threading.get_ident()

    async def test_contextvars_go_in_and_do_not_come_back(self, threads: Any) -> None:
        def rename(value: str) -> str:
            before = user.get()
            user.set(value)
            return before

        user.set("caller")
        assert await Stage("rename", rename, executor=threads).run("handler") == "caller"
        assert user.get() == "caller"

    async def test_map_keeps_order_and_gives_each_item_contextvars_of_its_own(self) -> None:
        last_is_done = threading.Event()

        def rename(value: int) -> tuple[int, str]:
            before = user.get()
            user.set(f"item {value}")
            if value == 0:
                assert last_is_done.wait(PATIENCE)
            elif value == 9:
                last_is_done.set()
            return value, before

        user.set("caller")
        with ThreadPoolExecutor(3) as pool:
            pipeline: Pipeline[Any, Any] = Pipeline([Stage("rename", rename, executor=pool), same])
            results = await pipeline.map(range(10), concurrency=3)
        assert results == [(value, "caller") for value in range(10)]
        assert user.get() == "caller"

    async def test_items_of_a_map_run_side_by_side(self, threads: Any) -> None:
        barrier = threading.Barrier(3, timeout=PATIENCE)
        pipeline: Pipeline[Any, Any] = Pipeline(
            [Stage("meet", lambda value: barrier.wait() * 0 + value, executor=threads)]
        )
        assert await pipeline.map(range(6), concurrency=3) == list(range(6))

    async def test_what_is_returned_is_awaited_on_the_loop(self, threads: Any) -> None:
        class Later:
            def __await__(self) -> Generator[Any, Any, int]:
                yield from asyncio.sleep(0).__await__()
                return threading.get_ident()

        stage: AnyStage = Stage("later", lambda value: Later(), executor=threads)
        assert await stage.run(1) == threading.get_ident()

    async def test_a_coroutine_is_refused(self, threads: Any) -> None:
        class Double:
            async def __call__(self, value: int) -> int:
                return 2 * value

        for handler in (Double(), lambda value: asyncio.sleep(3600)):
            error = await failure_of(Stage("double", handler, executor=threads))
            assert type(error.original_error) is TypeError
            assert str(error.original_error).startswith("executor= is for sync handlers, but ")

    async def test_a_coroutine_of_an_abandoned_call_is_not_left_unawaited(self) -> None:
        go = threading.Event()

        async def double(value: int) -> int:
            return 2 * value

        def slow(value: int) -> Any:
            go.wait(PATIENCE)
            return double(value)

        with ThreadPoolExecutor(1) as pool:
            await failure_of(Stage("slow", slow, executor=pool, timeout=SOON))
            go.set()
            await asyncio.get_running_loop().run_in_executor(pool, int)
        gc.collect()

    async def test_a_cancelled_error_of_concurrent_futures_is_no_cancellation(self, threads: Any) -> None:
        def wait_for_another(value: Any) -> Any:
            other: Future[None] = Future()
            other.cancel()
            return other.result()

        error = await failure_of(Stage("wait", wait_for_another, executor=threads, retries=1))
        assert error.attempts == 2
        assert type(error.original_error) is RuntimeError
        assert "CancelledError" in str(error.original_error)

    async def test_an_error_is_the_one_that_was_raised_with_its_traceback(self, threads: Any) -> None:
        error = await failure_of(Stage("fail", offloop.fail, executor=threads), 7)
        assert error.original_error.args == (7,)
        assert error.__cause__ is error.original_error
        assert traceback.extract_tb(error.original_error.__traceback__)[-1].name == "fail"

    async def test_an_error_is_retried(self, threads: Any) -> None:
        outcomes: Iterator[Any] = iter([ValueError(1), KeyError(2), None])

        def flaky(value: Any) -> Any:
            error = next(outcomes)
            if error is not None:
                raise error
            return value

        assert await Stage("flaky", flaky, executor=threads, retries=2).run(1) == 1

    async def test_on_error_is_called_on_the_event_loop(self, threads: Any) -> None:
        stage: AnyStage = Stage(
            "fail", offloop.fail, executor=threads, on_error=lambda value, error: threading.get_ident()
        )
        assert await stage.run(1) == threading.get_ident()

    @pytest.mark.parametrize("kind", [StopIteration, type("OwnStop", (StopIteration,), {})])
    async def test_stop_iteration_does_not_hang(self, kind: Any, threads: Any) -> None:
        def stop(value: Any) -> Any:
            raise kind(value)

        original = (await failure_of(Stage("stop", stop, executor=threads))).original_error
        assert type(original) is RuntimeError
        assert "stop" in str(original)
        assert str(original).endswith(f" raised {kind.__name__}")
        assert type(original.__cause__) is kind

    async def test_a_timeout_error_of_the_handlers_own_stays_one(self, threads: Any) -> None:
        def impatient(value: Any) -> Any:
            raise TimeoutError("mine")

        stage: AnyStage = Stage("impatient", impatient, executor=threads, timeout=PATIENCE)
        original = (await failure_of(stage)).original_error
        assert (type(original), original.args) == (TimeoutError, ("mine",))

    async def test_finish_ends_the_run(self, threads: Any) -> None:
        stage: AnyStage = Stage("finish", offloop.finish, executor=threads, retries=2)
        pipeline: Pipeline[Any, Any] = Pipeline([stage, offloop.fail])
        assert await stage.run(1) == 1
        assert await pipeline.run(2) == 2
        assert await pipeline.map([3, 4]) == [3, 4]

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
    def test_what_ends_the_program_ends_it(self, kind: Any, threads: Any) -> None:
        calls: list[Any] = []

        def leave(value: Any) -> None:
            calls.append(value)
            raise kind(value)

        with pytest.raises(kind):
            run_virtually(Stage("leave", leave, executor=threads, retries=2, retry_on=Exception).run(1))
        assert calls == [1]

    async def test_a_failed_item_does_not_wait_for_the_threads_of_the_others(self, threads: Any) -> None:
        with Gate() as gate:

            def fail_beside_it(value: int) -> Any:
                if value == 0:
                    return gate(value)
                assert gate.entered.wait(PATIENCE)
                raise ValueError(value)

            pipeline: Pipeline[Any, Any] = Pipeline([Stage("beside", fail_beside_it, executor=threads)])
            with pytest.raises(BatchError) as caught:
                await pipeline.map([0, 1])
            assert (gate.begun, gate.ended) == ([0], [])
            assert set(caught.value.failures) == {1}

    async def test_it_works_inside_a_stream(self, threads: Any) -> None:
        pipeline: Pipeline[Any, Any] = Pipeline([Stage("double", offloop.double, executor=threads)])
        async with pipeline.stream(range(20), concurrency=3) as results:
            assert [value async for value in results] == list(range(0, 40, 2))


@pytest.mark.threads
class TestTimeout:
    async def test_a_call_whose_time_is_up_is_abandoned_not_killed(self) -> None:
        with ThreadPoolExecutor(1) as pool, Gate() as gate:
            run = await begin(Stage("slow", gate, executor=pool, timeout=SOON).run(1), gate)
            with pytest.raises(StageExecutionError) as caught:
                await run
            assert type(caught.value.original_error) is StageTimeoutError
            assert (gate.begun, gate.ended) == ([1], [])
        assert gate.ended == [1]

    @pytest.mark.parametrize("error", [None, ValueError("late")], ids=["result", "error"])
    async def test_what_comes_late_is_dropped_silently(
        self, error: Exception | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: complaints.append(what))
        with ThreadPoolExecutor(1) as pool, Gate(error) as gate:
            run = await begin(Stage("slow", gate, executor=pool, timeout=SOON).run(1), gate)
            with pytest.raises(StageExecutionError):
                await run
        await settle()
        assert gate.ended == [1]
        assert (complaints, caplog.records) == ([], [])

    async def test_waiting_for_a_free_worker_counts(self) -> None:
        with ThreadPoolExecutor(1) as pool, Gate() as gate:
            pool.submit(gate, "another call")
            error = await failure_of(Stage("queued", gate, executor=pool, timeout=SOON), "ours")
            assert type(error.original_error) is StageTimeoutError
        assert gate.ended == ["another call"]  # ours was taken out of the queue

    async def test_each_attempt_is_a_call_of_its_own(self) -> None:
        with ThreadPoolExecutor(2) as pool, Gate() as gate:
            run = await begin(Stage("slow", gate, executor=pool, timeout=SOON, retries=1).run(1), gate)
            with pytest.raises(StageExecutionError) as caught:
                await run
            assert caught.value.attempts == 2
            assert gate.ended == []

    async def test_an_abandoned_call_has_released_its_limiter(self) -> None:
        limiter = asyncio.Semaphore(1)
        with ThreadPoolExecutor(1) as pool, Gate() as gate:
            stage: AnyStage = Stage("slow", gate, executor=pool, timeout=SOON, limiter=limiter)
            run = await begin(stage.run(1), gate)
            assert limiter.locked()
            with pytest.raises(StageExecutionError):
                await run
            assert not limiter.locked()
            assert gate.ended == []

    async def test_the_deadline_of_a_run_does_not_wait_for_the_thread(self, threads: Any) -> None:
        with Gate() as gate:
            stage: AnyStage = Stage("slow", gate, executor=threads, retries=3)
            run = await begin(Pipeline([same, stage]).run(1, timeout=SOON), gate)
            with pytest.raises(StageExecutionError) as caught:
                await run
            assert type(caught.value.original_error) is DeadlineExceeded
            assert (caught.value.stage_name, caught.value.attempts) == ("slow", 1)
            assert (gate.begun, gate.ended) == ([1], [])

    async def test_a_cancelled_run_does_not_wait_for_the_thread(self, threads: Any) -> None:
        with Gate() as gate:
            run = await begin(Stage("slow", gate, executor=threads, retries=3).run(1), gate)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert (gate.begun, gate.ended) == ([1], [])

    def test_asyncio_run_waits_for_the_thread_of_an_abandoned_call(self) -> None:
        printed = run_python(
            "-c",
            textwrap.dedent(
                f"""
                import asyncio, threading, time
                from async_pipeline import Stage, StageExecutionError

                entered, go = threading.Event(), threading.Event()

                def slow(value):
                    entered.set()
                    go.wait({PATIENCE})
                    time.sleep(0.1)  # asyncio.run would be over by now
                    print("the thread ends")

                async def main():
                    run = asyncio.create_task(Stage("slow", slow, executor="thread", timeout=0.05).run(1))
                    await asyncio.sleep(0)
                    entered.wait({PATIENCE})
                    try:
                        await run
                    except StageExecutionError as error:
                        print(type(error.original_error).__name__)
                    go.set()

                asyncio.run(main())
                print("asyncio.run ends")
                """
            ),
        )
        assert printed.splitlines() == ["StageTimeoutError", "the thread ends", "asyncio.run ends"]


@pytest.mark.threads
class TestBrokenPool:
    def test_a_killed_worker_is_a_clear_error_and_not_retried(self) -> None:
        asked: list[Exception] = []

        def ask(error: Exception) -> bool:
            asked.append(error)
            return True

        with process_pool() as pool:
            stage = Stage("dies", offloop.kill_own_process, executor=pool, retries=3, retry_on=ask)
            for _ in ("while the worker runs", "when the pool is known to be broken"):
                error = run_virtually(failure_of(stage))
                assert type(error.original_error) is BrokenProcessPool
                assert (error.stage_name, error.attempts) == ("dies", 1)
        assert asked == []

    async def test_threads_that_do_not_start_are_a_clear_error(self) -> None:
        with ThreadPoolExecutor(1, initializer=offloop.fail, initargs=(1,)) as pool:
            error = await failure_of(Stage("double", offloop.double, executor=pool, retries=3))
        assert type(error.original_error) is BrokenThreadPool
        assert error.attempts == 1

    async def test_on_error_can_stand_in(self) -> None:
        with ThreadPoolExecutor(1, initializer=offloop.fail, initargs=(1,)) as pool:
            stage: AnyStage = Stage(
                "double", offloop.double, executor=pool, retries=3, on_error=lambda value, error: type(error)
            )
            assert await stage.run(1) is BrokenThreadPool

    async def test_what_a_handler_on_the_loop_says_of_its_own_pool_is_retried(self) -> None:
        def broken(value: Any) -> Any:
            raise BrokenExecutor("a pool of the handler's own")

        assert (await failure_of(Stage("broken", broken, retries=2))).attempts == 3

    async def test_a_pool_that_is_shut_down(self) -> None:
        pool = ThreadPoolExecutor(1)
        pool.shutdown()
        error = await failure_of(Stage("double", offloop.double, executor=pool))
        assert type(error.original_error) is RuntimeError
        assert "after shutdown" in str(error.original_error)

    async def test_a_queued_call_that_the_shutdown_cancels_is_its_items_failure(self) -> None:
        with ThreadPoolExecutor(1) as pool, Gate() as gate:
            pipeline: Pipeline[Any, Any] = Pipeline([Stage("gate", gate, executor=pool)])
            batch = asyncio.create_task(pipeline.map([0, 1], return_exceptions=True))
            await settle()
            assert gate.entered.wait(PATIENCE)
            pool.shutdown(wait=False, cancel_futures=True)
            gate.open.set()
            result, error = await batch
        assert (result, gate.ended) == (0, [0])
        assert type(error) is StageExecutionError
        assert type(error.original_error) is asyncio.CancelledError


@pytest.mark.threads
class TestProcesses:
    async def test_the_handler_runs_in_another_process(self, processes: ProcessPoolExecutor) -> None:
        assert await Stage("where", offloop.process_id, executor=processes).run(1) != os.getpid()

    async def test_map_keeps_order(self, processes: ProcessPoolExecutor) -> None:
        pipeline: Pipeline[Any, Any] = Pipeline([Stage("double", offloop.double, executor=processes), same])
        assert await pipeline.map(range(10)) == list(range(0, 20, 2))

    async def test_contextvars_stay_here(self, processes: ProcessPoolExecutor) -> None:
        user.set("caller")
        assert await Stage("who", offloop.who, executor=processes).run(1) == "nobody"

    @pytest.mark.parametrize(("stage", "output"), [(offloop.triple, 21), (offloop.Times.four, 28)])
    async def test_a_handler_whose_name_staged_took_is_found(
        self, stage: AnyStage, output: int, processes: ProcessPoolExecutor
    ) -> None:
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(stage.handler)
        assert await stage.replace(executor=processes).run(7) == output

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_staged_with_a_pool_of_its_module(self, method: str, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent(
                f"""
                import asyncio, multiprocessing
                from concurrent.futures import ProcessPoolExecutor
                from async_pipeline import staged

                pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context({method!r}))

                @staged(executor=pool)
                def double(value):
                    return multiprocessing.parent_process() is not None, 2 * value

                if __name__ == "__main__":
                    with pool:
                        print(asyncio.run(double.run(21)))
                """
            )
        )
        assert run_python(str(program)) == "(True, 42)\n"

    async def test_an_error_has_the_traceback_of_its_process(self, processes: ProcessPoolExecutor) -> None:
        error = await failure_of(Stage("fail", offloop.fail, executor=processes, retries=1), 7)
        assert (type(error.original_error), error.original_error.args) == (ValueError, (7,))
        assert error.attempts == 2
        assert "in fail\n    raise ValueError(value)" in str(error.original_error.__cause__)

    async def test_an_error_is_retried(self, processes: ProcessPoolExecutor, tmp_path: Path) -> None:
        stage: AnyStage = Stage("flaky", offloop.fail_once, executor=processes, retries=1)
        assert await stage.run(tmp_path / "marker") == "done"

    async def test_finish_ends_the_run(self, processes: ProcessPoolExecutor) -> None:
        stage: AnyStage = Stage("finish", offloop.finish, executor=processes, retries=2)
        pipeline: Pipeline[Any, Any] = Pipeline([stage, offloop.fail])
        assert await pipeline.run(2) == 2
        assert await pipeline.map([3, 4]) == [3, 4]

    async def test_stop_iteration_is_an_error(self, processes: ProcessPoolExecutor) -> None:
        original = (await failure_of(Stage("stop", offloop.stop, executor=processes))).original_error
        assert type(original) is RuntimeError
        assert str(original).endswith("raised StopIteration")

    async def test_a_handler_that_does_not_pickle(self, processes: ProcessPoolExecutor) -> None:
        error = await failure_of(Stage("nameless", lambda value: value, executor=processes))
        assert "pickle" in str(error.original_error)
        assert "<lambda>" in str(error.original_error)

    async def test_a_result_that_does_not_pickle(self, processes: ProcessPoolExecutor) -> None:
        error = await failure_of(Stage("lock", offloop.lock, executor=processes))
        assert "pickle" in str(error.original_error)
        assert "lock" in str(error.original_error)

    def test_an_abandoned_call_goes_on_in_its_process(
        self, processes: ProcessPoolExecutor, tmp_path: Path
    ) -> None:
        slow: AnyStage = Stage("slow", offloop.wait_for_file, executor=processes, timeout=0.5)
        double: AnyStage = Stage("double", offloop.double, executor=processes)
        run_virtually(double.run(1))  # from now on the worker is there
        error = run_virtually(failure_of(slow, tmp_path))
        assert type(error.original_error) is StageTimeoutError
        (tmp_path / "go").touch()
        assert run_virtually(double.run(21)) == 42  # of the same, only worker
        assert (tmp_path / "gone").exists()


@pytest.mark.threads
@needs_interpreters
class TestInterpreters:
    async def test_the_handler_runs_in_this_process(self, interpreters: Any) -> None:
        assert await Stage("where", offloop.process_id, executor=interpreters).run(1) == os.getpid()

    async def test_contextvars_stay_here(self, interpreters: Any) -> None:
        user.set("caller")
        assert await Stage("who", offloop.who, executor=interpreters).run(1) == "nobody"

    async def test_a_handler_whose_name_staged_took_is_found(self, interpreters: Any) -> None:
        assert await offloop.triple.replace(executor=interpreters).run(7) == 21

    async def test_an_error_is_the_handlers_own_and_retried(self, interpreters: Any, tmp_path: Path) -> None:
        error = await failure_of(Stage("fail", offloop.fail, executor=interpreters), 7)
        assert (type(error.original_error), error.original_error.args) == (ValueError, (7,))
        stage: AnyStage = Stage("flaky", offloop.fail_once, executor=interpreters, retries=1)
        assert await stage.run(tmp_path / "marker") == "done"

    async def test_finish_ends_the_run(self, interpreters: Any) -> None:
        pipeline: Pipeline[Any, Any] = Pipeline(
            [Stage("finish", offloop.finish, executor=interpreters), offloop.fail]
        )
        assert await pipeline.run(2) == 2

    async def test_stop_iteration_is_an_error(self, interpreters: Any) -> None:
        original = (await failure_of(Stage("stop", offloop.stop, executor=interpreters))).original_error
        assert type(original) is RuntimeError
        assert str(original).endswith("raised StopIteration")


class TestAnExecutorOfOnesOwn:
    async def test_it_gets_the_call(self) -> None:
        executor = Inline()
        assert await Stage("double", offloop.double, executor=executor).run(21) == 42
        assert executor.functions == [offloop.double]

    async def test_the_context_is_the_object_of_the_run(self) -> None:
        context = object()
        stage: AnyStage = Stage("wants", with_context, executor=Inline())
        assert await stage.run(1, context=context) is context

    async def test_a_handler_whose_name_staged_took_goes_there_in_a_form_that_pickles(self) -> None:
        executor = Inline()
        assert await offloop.triple.replace(executor=executor).run(7) == 21
        (function,) = executor.functions
        assert pickle.loads(pickle.dumps(function))(7) == 21

    @pytest.mark.parametrize("handler", [functools.partial(offloop.double), str, lambda value: value])
    async def test_another_handler_goes_there_as_it_is(self, handler: Any) -> None:
        executor = Inline()
        await Stage("any", handler, executor=executor).run(1)
        assert executor.functions == [handler]

    async def test_a_name_that_is_another_stages_now_is_not_taken_for_the_handlers(self) -> None:
        def triple(value: int) -> int:
            return -value

        triple.__module__, triple.__qualname__ = offloop.__name__, "triple"
        assert await Stage("triple", triple, executor=Inline()).run(7) == -7

    async def test_stop_iteration_does_not_hang(self) -> None:
        original = (await failure_of(Stage("stop", offloop.stop, executor=Inline()))).original_error
        assert type(original) is RuntimeError
        assert type(original.__cause__) is StopIteration

    async def test_an_error_of_submit_is_the_stages(self) -> None:
        class Full(Inline):
            def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
                raise OverflowError("no more calls")

        error = await failure_of(Stage("double", offloop.double, executor=Full(), retries=1))
        assert (type(error.original_error), error.attempts) == (OverflowError, 2)

    async def test_finish_ends_the_run(self) -> None:
        assert await Stage("finish", offloop.finish, executor=Inline()).run(3) == 3
