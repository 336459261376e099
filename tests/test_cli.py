"""The command line, mostly as its users meet it: in a process of its own."""

import asyncio
import errno
import fcntl
import importlib
import io
import json
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import async_pipeline
from async_pipeline import _sqlite, cli
from async_pipeline.cli import _failures, _lines, _progress, _show

SOURCE = Path(async_pipeline.__file__).parent.parent
PATIENCE = 60  # seconds for what takes milliseconds on an idle machine


JOBS = """
import asyncio, os, signal, sys
from async_pipeline import Pipeline, Stage

def double(x):
    return x * 2

def odd(x):
    if x % 2 == 0:
        raise ValueError(f"{x} is even")
    return x

async def second_first(x, done={}):
    event = done.setdefault(x // 2, asyncio.Event())
    if x % 2:
        event.set()
    else:
        await event.wait()
    return x

async def hang_at_3(x):
    if x == 3:
        await asyncio.Event().wait()
    return x

def chatty(x):
    print("got", x)
    return x

stage = Stage("double", double)
same = Pipeline([lambda x: x])
doubled = Pipeline([double])
odds = Pipeline([odd])
swapped = Pipeline([second_first])
hanging = Pipeline([hang_at_3])
chat = Pipeline([chatty])
nested = Pipeline([double, Pipeline([odd], name="inner")])

class Box:
    inside = Pipeline([double])
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def values(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Shell = Callable[..., Result]
Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that holds ``jobs.py``."""
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    return tmp_path


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C be heard, here and in child processes, where a shell's ``&`` has switched it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Live:
    """A command that runs; nothing waits for it longer than PATIENCE, and the test's end is its own."""

    def __init__(self, *args: str, stdin: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE) -> None:
        command = [sys.executable, "-m", "async_pipeline", *args]
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def line(self) -> str:
        assert select.select([self.stdout], [], [], PATIENCE)[0], "no line came"
        return self.stdout.readline().decode()

    def waiting(self) -> int:
        """How many bytes of output wait to be read."""
        return int.from_bytes(fcntl.ioctl(self.stdout, termios.FIONREAD, b"\0" * 4), sys.byteorder)

    def stand_still(self) -> None:
        """Return when the output has filled the pipe and nothing moves any more."""

        def is_still() -> bool:
            before = self.waiting()
            time.sleep(0.15)  # longer than a tick
            return self.waiting() == before

        until(lambda: self.waiting() > 32 * 1024)
        until(is_still)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Wait for the end without closing the input; return the exit code and what stderr got."""
        code = self.process.wait(PATIENCE)
        return code, "" if self.process.stderr is None else self.process.stderr.read().decode()

    def finish(self, stdin: str | bytes = b"") -> Result:
        """Send the last of the input and wait for the end."""
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        out, err = self.process.communicate(given if self.process.stdin else None, PATIENCE)
        return Result(self.process.returncode, out.decode(), (err or b"").decode())


def shell(*args: str, stdin: str | bytes = b"") -> Result:
    with Live(*args) as command:
        return command.finish(stdin)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run the command line in this process, on files."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*args: str, stdin: str | bytes = b"", pipe: bool = False) -> Result:
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        with ExitStack() as stack:
            if pipe:
                reader, writer = os.pipe()
                os.write(writer, given)
                os.close(writer)
                source = stack.enter_context(open(reader, encoding="utf-8"))
            else:
                (folder / "stdin").write_bytes(given)
                source = stack.enter_context(open(folder / "stdin", encoding="utf-8"))
            target = stack.enter_context(open(folder / "stdout", "w", encoding="utf-8"))
            shown = io.StringIO()
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdin", source)
                patch.setattr(sys, "stdout", target)
                patch.setattr(sys, "stderr", shown)
                code = exit_code(*args)
        return Result(code, (folder / "stdout").read_text("utf-8"), shown.getvalue())

    yield run
    for name in set(sys.modules) - before:
        del sys.modules[name]


def exit_code(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def numbers(*values: object) -> str:
    return "".join(f"{value}\n" for value in values)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def module(source: str, name: str = "other") -> None:
    Path(f"{name}.py").write_text(textwrap.dedent(source))


# -- results


def test_a_process_writes_one_line_per_result_and_nothing_else() -> None:
    assert shell("run", "jobs:doubled", stdin=numbers(1, '"ab"', [])) == (0, '2\n"abab"\n[]\n', "")


@pytest.mark.parametrize("pipe", [True, False])
def test_results_come_in_input_order(here: Cli, pipe: bool) -> None:
    result = here("run", "jobs:swapped", stdin=numbers(*range(100)), pipe=pipe)
    assert result == (0, numbers(*range(100)), "")


@pytest.mark.parametrize("pipe", [True, False])
def test_unordered_results_come_as_they_finish(here: Cli, pipe: bool) -> None:
    result = here("run", "jobs:swapped", "--unordered", stdin=numbers(0, 1), pipe=pipe)
    assert result == (0, numbers(1, 0), "")


def test_concurrency_bounds_what_is_in_flight(here: Cli) -> None:
    module(
        """
        import asyncio
        from async_pipeline import Pipeline
        running = most = 0

        async def watch(x):
            global running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return most

        pipeline = Pipeline([watch])
        """
    )
    result = here("run", "other:pipeline", "--concurrency", "3", stdin=numbers(*range(30)))
    assert max(result.values) == 3


def test_files_instead_of_pipes(here: Cli, folder: Path) -> None:
    (folder / "in").write_text(numbers(1, 2))
    (folder / "out").write_text("what was there before, and longer than what comes now\n" * 9)
    assert here("run", "jobs:doubled", "--input", "in", "--output", "out") == (0, "", "")
    assert (folder / "out").read_text() == numbers(2, 4)


def test_no_input_at_all(here: Cli) -> None:
    assert here("run", "jobs:same") == (0, "", "")
    assert here("run", "jobs:same", "--input", os.devnull) == (0, "", "")


@pytest.mark.parametrize("pipe", [True, False])
def test_lines_are_items_as_they_are(here: Cli, pipe: bool) -> None:
    text = "\ufeffone\r\n\n  two\x0b\u2028three \r \r\n\ufefffour\n5"
    result = here("run", "jobs:same", "--lines", stdin=text, pipe=pipe)
    assert result.values == ["one", "", "  two\x0b\u2028three \r ", "\ufefffour", "5"]


def test_blank_lines_of_json_are_no_items(here: Cli) -> None:
    result = here("run", "jobs:same", "--errors", "bad", stdin="\ufeff 1\r\n\r\n\n \t\n2 \nno\n")
    assert result == (1, "1\n2\n", "")
    failure = json.loads(Path("bad").read_text())
    assert failure["index"] == 2
    assert failure["message"].startswith("line 6 is not JSON")


@pytest.mark.parametrize("pipe", [True, False])
def test_lines_longer_than_a_chunk_and_chunks_of_many_lines(here: Cli, pipe: bool) -> None:
    sizes = [300_000, 0, 65_536, 65_535, *[1] * 20]
    text = "\n".join("x" * size for size in sizes)
    if pipe:  # more than a pipe holds
        (Path("long")).write_text(text)
        reading = subprocess.Popen(["cat", "long"], stdout=subprocess.PIPE)
        assert reading.stdout is not None
        with Live("run", "jobs:same", "--lines", stdin=reading.stdout) as command:
            out = command.finish().out
        reading.stdout.close()
        assert reading.wait(PATIENCE) == 0
    else:
        out = here("run", "jobs:same", "--lines", stdin=text).out
    assert [len(json.loads(line)) for line in out.splitlines()] == sizes


def test_text_stays_readable_and_always_one_line_of_json(here: Cli) -> None:
    result = here("run", "jobs:same", stdin='"naïve ☃"\n"\\ud800é"\n"a\u2028b\u2029c\x85d"\n')
    assert result == (0, '"naïve ☃"\n"\\ud800\\u00e9"\n"a\\u2028b\\u2029c\\u0085d"\n', "")


def test_what_the_pipeline_prints_does_not_mix_with_the_results(here: Cli) -> None:
    assert here("run", "jobs:chat", stdin=numbers(7)) == (0, "7\n", "got 7\n")
    assert here("run", "jobs:chat", "--output", "out", stdin=numbers(7)) == (0, "got 7\n", "")
    assert Path("out").read_text() == "7\n"


def test_a_dotted_attribute(here: Cli) -> None:
    assert here("run", "jobs:Box.inside", stdin=numbers(4)).values == [8]


def test_the_current_folder_comes_first(here: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "jobs.py").write_text("doubled = None")
    monkeypatch.syspath_prepend("elsewhere")
    assert here("run", "jobs:doubled", stdin=numbers(4)).values == [8]
    assert sys.path[0] == str(folder)
    assert here("run", "jobs:doubled", stdin=numbers(4)).values == [8]
    assert sys.path.count(str(folder)) == 1


# -- failures


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"1 2", "line 2 is not JSON: Extra data at column 3"),
        (b"NaN", "line 2 is not JSON: NaN is no JSON number"),
        (b"[-Infinity]", "line 2 is not JSON: -Infinity is no JSON number"),
        (b'"caf\xe9"', "line 2 is not UTF-8: invalid continuation byte at byte 5"),
        (b"\xff\xfe", "line 2 is not UTF-8: invalid start byte at byte 1"),
        (b"[" * 100_000, "line 2 is not JSON: "),
        (b"9" * 5000, "line 2 is not JSON: "),
    ],
)
def test_a_malformed_line_is_a_failed_item_and_the_rest_goes_on(here: Cli, line: bytes, message: str) -> None:
    result = here("run", "jobs:same", "--errors", "bad", stdin=b"1\n" + line + b"\r\n3\n")
    assert result == (1, "1\n3\n", "")
    failure = json.loads(Path("bad").read_text("utf-8"))
    assert failure.pop("message").startswith(message)
    assert failure == {"item": line.decode(errors="backslashreplace"), "index": 1, "stage": None}


def test_a_plain_line_that_is_not_utf_8_is_a_failed_item(here: Cli) -> None:
    result = here("run", "jobs:same", "--lines", "--errors", "bad", stdin=b"a\n\xff\nc")
    assert result == (1, '"a"\n"c"\n', "")
    failure = json.loads(Path("bad").read_text())
    assert failure["item"] == "\\xff"
    assert failure["message"] == "line 2 is not UTF-8: invalid start byte at byte 1"


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("{1}", "Object of type set is not JSON serializable"),
        ("float('nan')", "Out of range float values are not JSON compliant"),
        ("[float('inf')]", "Out of range float values are not JSON compliant"),
        ("{(1,): 2}", "keys must be str, int, float, bool or None, not tuple"),
        ("b'x'", "Object of type bytes is not JSON serializable"),
        ("circle", "Circular reference detected"),
    ],
)
def test_a_result_that_is_not_json_is_a_failed_item(here: Cli, result: str, reason: str) -> None:
    module(
        f"""
        from async_pipeline import Pipeline
        circle = []
        circle.append(circle)
        pipeline = Pipeline([lambda x: x if x != 2 else {result}])
        """
    )
    assert here("run", "other:pipeline", "--errors", "bad", stdin=numbers(1, 2, 3)) == (1, "1\n3\n", "")
    failure = json.loads(Path("bad").read_text())
    assert failure.pop("message").startswith(f"the result is not JSON: {reason}")
    assert failure == {"item": 2, "index": 1, "stage": None}


def test_the_errors_file_names_item_index_stage_and_message(here: Cli) -> None:
    Path("bad").write_text("what was there before\n" * 99)
    result = here("run", "jobs:nested", "--errors", "bad", stdin=numbers(1, 2))
    assert result == (1, "", "")
    assert [json.loads(line) for line in Path("bad").read_text().splitlines()] == [
        {"item": 1, "index": 0, "stage": "inner/odd", "message": "ValueError: 2 is even"},
        {"item": 2, "index": 1, "stage": "inner/odd", "message": "ValueError: 4 is even"},
    ]


def test_every_kind_of_failure_finds_its_words(here: Cli) -> None:
    module(
        """
        import asyncio
        from async_pipeline import Pipeline

        class Mute(Exception):
            def __str__(self):
                raise KeyError("no text")
            __repr__ = object.__repr__

        async def fail(item):
            kind = item.pop("kind")
            if kind == "empty":
                raise TimeoutError
            if kind == "mute":
                raise Mute
            if kind == "cancelled":
                raise asyncio.CancelledError
            raise ValueError("half a pair: \\ud800")

        async def refuse(next, stage_name, value, context):
            if value["kind"] == "refused":
                raise PermissionError("not you")
            return await next(value)

        pipeline = Pipeline([fail], middlewares=[refuse])
        """
    )
    kinds = ["empty", "mute", "cancelled", "refused", "surrogate"]
    items = [json.dumps({"kind": kind}) for kind in kinds]
    result = here("run", "other:pipeline", "--errors", "bad", stdin=numbers(*items, '{"kind": 1e999}'))
    assert result == (1, "", "")
    failures = [json.loads(line) for line in Path("bad").read_text("utf-8").splitlines()]
    # as they were read, though the handler changed them
    assert [failure["item"] for failure in failures] == [
        *({"kind": kind} for kind in kinds),
        '{"kind": 1e999}',
    ]
    assert [(failure["stage"], failure["message"]) for failure in failures] == [
        ("fail", "TimeoutError"),
        ("fail", "Mute: <its text can't be had: KeyError>"),
        ("fail", "CancelledError"),
        (None, "PermissionError: not you"),
        ("fail", "ValueError: half a pair: \ud800"),
        ("fail", "ValueError: half a pair: \ud800"),
    ]


def test_without_an_errors_file_stderr_sums_the_failures_up() -> None:
    assert shell("run", "jobs:odds", stdin=numbers(1, 2, "x", 4)) == (
        1,
        "1\n",
        "async-pipeline: 3 of 4 items failed\n"
        "  item 1: stage 'odd': ValueError: 2 is even (item: 2)\n"
        "  item 2: line 3 is not JSON: Expecting value at column 1 (item: x)\n"
        "  item 3: stage 'odd': ValueError: 4 is even (item: 4)\n",
    )


def test_the_summary_is_short_and_moves_no_cursor(here: Cli) -> None:
    module(
        r"""
        from async_pipeline import Pipeline
        def fail(text):
            raise ValueError("red: \x1b[31m\n" + "y" * 10_000)
        pipeline = Pipeline([fail])
        """
    )
    lines = [b"\x1b[2J\r" + b"z" * 100_000, b"\xff\x1b", *[b"short"] * 1232]
    result = here("run", "other:pipeline", "--lines", stdin=b"\n".join(lines))
    first, *failures, last = result.err.splitlines()
    assert first == "async-pipeline: 1,234 of 1,234 items failed"
    assert len(failures) == 10
    assert max(map(len, failures)) < 300
    assert failures[0].startswith("  item 0: stage 'fail': ValueError: red: \\x1b[31m\\nyyy")
    assert "(item: \\x1b[2J\\rzzz" in failures[0]
    assert failures[1] == "  item 1: line 2 is not UTF-8: invalid start byte at byte 1 (item: \\xff\\x1b)"
    assert last == "  and 1,224 more; --errors FILE keeps them all"


def test_a_summary_of_one(here: Cli) -> None:
    assert here("run", "jobs:odds", stdin=numbers(2)).err.startswith("async-pipeline: 1 of 1 item failed\n")


def test_an_input_that_breaks_off_keeps_what_was_read(here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [b"1\n2\n"]

    def read(fd: int, size: int) -> bytes:
        if not chunks:
            raise OSError(errno.EIO, "Input/output error")
        return chunks.pop()

    monkeypatch.setattr(os, "read", read)
    result = here("run", "jobs:odds")
    assert (result.code, result.out) == (1, "1\n")
    assert "1 of 2 items failed" in result.err
    assert result.err.endswith("\nasync-pipeline: the input can't be read: Input/output error\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device of Linux")
@pytest.mark.parametrize(("option", "name"), [("--output", "output"), ("--errors", "errors")])
def test_a_full_disk_is_one_line(here: Cli, option: str, name: str) -> None:
    result = here("run", "jobs:odds", option, "/dev/full", stdin=numbers(1, 2))
    assert result.code == 1
    assert result.err.endswith(f"async-pipeline: the {name} can't be written: No space left on device\n")
    assert "Traceback" not in result.err


def test_a_handler_that_ends_the_process_keeps_what_was_finished(here: Cli) -> None:
    module(
        """
        import sys
        from async_pipeline import Pipeline
        pipeline = Pipeline([lambda x: x if x != 3 else sys.exit(7)])
        """
    )
    assert here("run", "other:pipeline", "--concurrency", "1", stdin=numbers(1, 2, 3, 4)) == (7, "1\n2\n", "")


# -- wrong usage


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "the following arguments are required: COMMAND (see async-pipeline --help)"),
        (["run"], "the following arguments are required: MODULE:PIPELINE (see async-pipeline run --help)"),
        (["run", "jobs:same", "--concurrency", "0"], "concurrency must be at least 1"),
        (["run", "jobs:same", "--concurrency", "many"], "concurrency must be a whole number, not 'many'"),
        (["run", "jobs:same", "--inp", "x"], "unrecognized arguments: --inp x"),
        (["run", "jobs"], "'jobs' must be MODULE:PIPELINE, for example shop.jobs:pipeline"),
        (["run", "jobs:"], "'jobs:' must be MODULE:PIPELINE"),
        (["run", ":same"], "':same' must be MODULE:PIPELINE"),
        (["run", ".jobs:same"], "'.jobs:same' must be MODULE:PIPELINE"),
        (["run", "jobs:Box..inside"], "'jobs:Box..inside' must be MODULE:PIPELINE"),
        (["run", "nowhere:same"], "there is no module 'nowhere' here or installed"),
        (["run", "jobs.nowhere:same"], "there is no module 'jobs.nowhere' here or installed"),
        (["run", "jobs.py:same"], "there is no module 'jobs.py' here or installed; write jobs:same"),
        (["run", "shop/jobs.py:same"], "installed; write shop.jobs:same"),
        (["run", "jobs:nothing"], "module 'jobs' has no 'nothing'; its pipelines: same, doubled, odds"),
        (["run", "jobs:Box.outside"], "module 'jobs' has no 'Box.outside'"),
        (["run", "json:same"], "module 'json' has no 'same'"),
        (["run", "jobs:stage"], "'jobs:stage' is a Stage, not a Pipeline: write Pipeline([stage])"),
        (["run", "jobs:double"], "'jobs:double' is a function, not a Pipeline: write Pipeline([double])"),
        (["run", "jobs:Box"], "'jobs:Box' is a type, not a Pipeline"),
        (["run", "jobs:same.stages"], "is a tuple, not a Pipeline: write Pipeline(stages)"),
        (["run", "jobs:__name__"], "'jobs:__name__' is a str, not a Pipeline"),
        (["run", "sys:maxsize"], "'sys:maxsize' is an int, not a Pipeline"),
        (["run", "jobs:same", "--input", "nowhere"], "the input 'nowhere' can't be read: No such file"),
        (["run", "jobs:same", "--input", "."], "the input '.' can't be read: Is a directory"),
        (["run", "jobs:same", "--output", "no/out"], "the output 'no/out' can't be written: No such file"),
        (["run", "jobs:same", "--errors", "no/out"], "the errors 'no/out' can't be written: No such file"),
        (["run", "jobs:same", "--errors", "-"], "--errors takes a file"),
        (
            ["run", "jobs:same", "--input", "jobs.py", "--output", "./jobs.py"],
            "--input and --output are the same",
        ),
        (
            ["run", "jobs:same", "--input", "link", "--errors", "jobs.py"],
            "--input and --errors are the same file",
        ),
        (
            ["run", "jobs:same", "--output", "new", "--errors", "new"],
            "--output and --errors are the same file",
        ),
        (["run", "jobs:same", "--output", "stdin"], "--input and --output are the same file"),
        (["run", "jobs:same", "--run-id", "x"], "--run-id is of a journal: add --journal FILE"),
        (["run", "jobs:same", "--no-retry-failed"], "--retry-failed is of a journal: add --journal FILE"),
        (["run", "jobs:same", "--journal", "-"], "--journal takes a file"),
        (
            ["run", "jobs:same", "--journal", ":memory:"],
            "the journal can't be used: path must be that of a file",
        ),
        (["run", "jobs:same", "--journal", "j", "--run-id", ""], "run_id must be a str that is not empty"),
        (["run", "jobs:same", "--journal", "stdin"], "--input and --journal are the same file"),
        (
            ["run", "jobs:same", "--errors", "new", "--journal", "./new"],
            "--errors and --journal are the same",
        ),
        (["journal"], "the following arguments are required: FILE"),
    ],
)
def test_wrong_usage_is_one_line_and_touches_nothing(here: Cli, args: list[str], line: str) -> None:
    os.symlink("jobs.py", "link")
    code, out, err = here(*args, stdin=numbers(1))
    assert code == 2
    assert line in err
    assert err.startswith("async-pipeline")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert out == ""
    assert Path("jobs.py").read_text() == JOBS
    assert Path("stdin").read_text() == "1\n"


def test_wrong_usage_from_outside() -> None:
    assert shell("run", "jobs:stage", stdin=numbers(1)) == (
        2,
        "",
        "async-pipeline: 'jobs:stage' is a Stage, not a Pipeline: write Pipeline([stage])\n",
    )


@pytest.mark.parametrize("args", [("--errors", "no/errors"), ("--input", "nowhere"), ("--errors", "out")])
def test_wrong_usage_leaves_the_output_as_it_was(here: Cli, args: tuple[str, str]) -> None:
    Path("out").write_text("precious\n")
    assert here("run", "jobs:same", "--output", "out", *args, stdin=numbers(1)).code == 2
    assert here("run", "jobs:nothing", "--output", "out", stdin=numbers(1)).code == 2
    assert Path("out").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("1 / 0", "'other' can't be imported: ZeroDivisionError: division by zero", 'other.py", line 1'),
        ("import nowhere", "'other' can't be imported: ModuleNotFoundError: No module", 'other.py", line 1'),
        ("x = = 1", "'other' can't be imported: SyntaxError: ", 'other.py", line 1'),
        ("import sys; sys.exit(0)", "'other' can't be imported: SystemExit: 0", 'other.py", line 1'),
        (
            "raise OSError('one\\ntwo')",
            "'other' can't be imported: OSError: one\\ntwo\n",
            'other.py", line 1',
        ),
        (
            "raise ModuleNotFoundError",
            "'other' can't be imported: ModuleNotFoundError\n",
            'other.py", line 1',
        ),
        ("def __getattr__(name): raise RuntimeError(name)", "imported: RuntimeError: ", "in __getattr__"),
    ],
)
def test_a_module_that_fails_shows_its_own_traceback(here: Cli, source: str, line: str, words: str) -> None:
    module(source)
    code, out, err = here("run", "other:pipeline", stdin=numbers(1))
    assert (code, out) == (2, "")
    shown, last = err[: err.rindex("async-pipeline: ")], err[err.rindex("async-pipeline: ") :]
    assert line in last
    assert last.count("\n") == 1
    assert words in shown
    assert "importlib" not in shown
    assert str(Path(cli.__file__).parent) not in shown


@pytest.mark.parametrize(
    ("name", "closed", "line"),
    [
        ("stdin", "<&-", "async-pipeline: the input '-' can't be read: it is closed\n"),
        ("stdout", ">&-", "async-pipeline: the output '-' can't be written: it is closed\n"),
    ],
)
def test_a_standard_file_that_is_closed(
    here: Cli, monkeypatch: pytest.MonkeyPatch, name: str, closed: str, line: str
) -> None:
    command = f"{sys.executable} -m async_pipeline run jobs:same {closed}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stderr.decode()) == (2, line)
    shown = io.StringIO()
    with open(os.devnull, encoding="utf-8") as nothing, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, name, None)
        patch.setattr(sys, "stderr", shown)
        assert exit_code("run", "jobs:same") == 2
    assert shown.getvalue() == line


def test_nobody_listens_to_stderr(here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert exit_code("run", "jobs:same") == 2


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["--version"]])
def test_help_and_version(args: list[str]) -> None:
    code, out, err = shell(*args)
    assert (code, err) == (0, "")
    if args == ["--version"]:
        assert out == f"async-pipeline {async_pipeline.__version__}\n"
    elif args == ["--help"]:
        assert "run a pipeline over lines of JSON or text" in out
    else:
        options = ["--input", "--output", "--lines", "--errors", "--concurrency", "--unordered"]
        options += ["--journal", "--run-id", "--retry-failed, --no-retry-failed"]
        assert all(f"  {option}" in out for option in options)
        assert "async-pipeline run crawl:pages" in out


def test_the_package_runs_as_a_module_and_its_main_imports_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["async_pipeline", "run", "nowhere:at_all"])
    monkeypatch.delitem(sys.modules, "async_pipeline.__main__", raising=False)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with open(os.devnull, encoding="utf-8") as nothing, open(os.devnull, "w", encoding="utf-8") as nowhere:
        monkeypatch.setattr(sys, "stdin", nothing)
        monkeypatch.setattr(sys, "stdout", nowhere)
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("async_pipeline", run_name="__main__")
        monkeypatch.undo()
    assert caught.value.code == 2
    assert shown.getvalue() == "async-pipeline: there is no module 'nowhere' here or installed\n"
    assert importlib.import_module("async_pipeline.__main__").main is cli.main


# -- pipes that are slow, pipes that close


def test_a_live_reader_sees_a_result_while_the_input_is_open_and_may_leave() -> None:
    module(
        """
        import asyncio
        from async_pipeline import Pipeline
        async def turns(x):
            for _ in range(100):
                await asyncio.sleep(0)
            return x
        pipeline = Pipeline([turns])
        """
    )
    with Live("run", "other:pipeline") as command:
        for value in ("1\n", "2\n"):
            command.send(value)
            assert command.line() == value
        command.stdout.close()
        command.send("3\n")
        assert command.end() == (0, "")  # and the input is still open


def test_a_reader_that_pauses_misses_nothing(folder: Path) -> None:
    values = range(1_000_000, 1_050_000)
    (folder / "in").write_text(numbers(*values))
    with Live("run", "jobs:same", "--input", "in") as command:
        command.stand_still()
        assert command.finish() == (0, numbers(*values), "")


def test_a_reader_that_pauses_does_not_stop_the_handlers(folder: Path) -> None:
    module(
        """
        import asyncio
        from pathlib import Path
        from async_pipeline import Pipeline

        async def beat():
            while True:
                Path("beat").touch()
                await asyncio.sleep(0.01)

        async def wait(x, tasks=[]):
            if not tasks:
                tasks.append(asyncio.create_task(beat()))
            return x

        pipeline = Pipeline([wait])
        """
    )
    (folder / "in").write_text(numbers(*range(1_000_000, 1_050_000)))
    with Live("run", "other:pipeline", "--input", "in") as command:
        command.stand_still()
        command.stdout.read(5000)  # room for less than what is held back
        command.stand_still()
        (folder / "beat").unlink()
        until((folder / "beat").exists)


def test_head_takes_what_it_wants_of_an_endless_input() -> None:
    run = f"{sys.executable} -m async_pipeline run jobs:doubled"
    command = f"yes 1 | {run} 2> err | head -n 3; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"2\n2\n2\n")
    assert Path("err").read_text() == ""


def test_a_reader_that_left_is_no_error(here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    Path("in").write_text(numbers(*range(100_000)))
    shown = io.StringIO()
    with open(writer, "w", encoding="utf-8") as target, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", target)
        patch.setattr(sys, "stderr", shown)
        assert exit_code("run", "jobs:odds", "--input", "in") == 0
    assert shown.getvalue() == ""


def test_a_reader_that_left_takes_no_failures_along() -> None:
    with Live("run", "jobs:odds", "--errors", "bad") as command:
        command.send("1\n")
        assert command.line() == "1\n"
        command.stdout.close()
        command.send("2\n3\n4\n")
        assert command.end() == (0, "")
    first = json.loads(Path("bad").read_text().splitlines()[0])
    assert (first["item"], first["index"]) == (2, 1)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_a_reader_of_the_errors_that_left_is_one(here: Cli) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = here("run", "jobs:odds", "--errors", f"/dev/fd/{writer}", stdin=numbers(2))
    os.close(writer)
    assert result == (1, "", "async-pipeline: the errors can't be written: Broken pipe\n")


@pytest.mark.parametrize("count", [0, 1])
def test_a_pipe_shared_with_a_faster_process(here: Cli, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def stumbling(function: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        calls = []

        def call(fd: int, what: Any) -> Any:
            calls.append(fd)
            if len(calls) <= count:
                raise BlockingIOError
            return function(fd, what)

        return call

    reader, writer = os.pipe()
    with open(reader, "rb") as results, open(writer, "w", encoding="utf-8") as target:
        source, feeder = os.pipe()
        os.write(feeder, b"1\n2\n3")
        os.close(feeder)
        with open(source, encoding="utf-8") as items, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", items)
            patch.setattr(sys, "stdout", target)
            patch.setattr(os, "read", stumbling(os.read))
            patch.setattr(os, "write", stumbling(os.write))
            assert exit_code("run", "jobs:same") == 0
        target.close()
        assert results.read() == b"1\n2\n3\n"


def test_input_that_arrives_as_the_wait_for_it_is_cancelled() -> None:
    trouble: list[Any] = []

    async def wait(reader: int, writer: int) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: trouble.append(context))
        waiting = asyncio.create_task(_lines.until_ready(reader, loop.add_reader, loop.remove_reader))
        await asyncio.sleep(0)
        os.write(writer, b"x")
        loop.call_soon(waiting.cancel)  # this turn, before the loop looks at the pipe
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not loop.remove_reader(reader)

    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        asyncio.run(wait(reader, writer))
    assert trouble == []


def test_two_flushes_at_once_write_everything_once() -> None:
    text = bytes(range(256)) * 1000  # more than a pipe holds
    received = bytearray()

    async def flush(reader: int, file: io.FileIO) -> None:
        writer = _lines.Writer(file, "output")
        writer.add(text)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            flushes = [group.create_task(writer.flush()) for _ in range(2)]
            await asyncio.sleep(0)
            loop.add_reader(reader, lambda: received.extend(os.read(reader, 65536)))
            await asyncio.wait(flushes)
        loop.remove_reader(reader)

    reader, writer = os.pipe()
    with open(reader, "rb") as rest, open(writer, "wb", buffering=0) as file:
        asyncio.run(flush(reader, file))
        file.close()
        assert bytes(received) + rest.read() == text


def test_errors_alone_leave_in_time(here: Cli) -> None:
    # 64 KiB of failures and no result: they must not pile up until the end
    result = here("run", "jobs:odds", "--errors", "bad", stdin=numbers(*[2] * 3000))
    assert result.code == 1
    assert len(Path("bad").read_text().splitlines()) == 3000


# -- Ctrl-C


def test_ctrl_c_keeps_what_was_written(folder: Path) -> None:
    out = folder / "out"
    with Live("run", "jobs:hanging", "--output", "out") as command:
        command.send("1\n2\n3\n4\n")
        until(lambda: out.exists() and out.read_text() == "1\n2\n")
        command.interrupt()
        assert command.end() == (
            130,
            "async-pipeline: interrupted after 3 items; their results are written\n",
        )
    assert out.read_text() == "1\n2\n4\n"  # also of what waited for its turn


def test_ctrl_c_while_the_input_is_silent() -> None:
    with Live("run", "jobs:odds") as command:
        command.send("2\n1\n")
        assert command.line() == "1\n"
        command.interrupt()
        assert command.end() == (
            130,
            "async-pipeline: 1 of 2 items failed\n"
            "  item 0: stage 'odd': ValueError: 2 is even (item: 2)\n"
            "async-pipeline: interrupted after 2 items; their results are written\n",
        )


def test_ctrl_c_while_the_reader_stands_still(folder: Path) -> None:
    (folder / "in").write_text(numbers(*range(1_000_000, 1_050_000)))
    with Live("run", "jobs:same", "--input", "in") as command:
        command.stand_still()
        command.interrupt()
        code, err = command.end()
    assert code == 130
    assert "results were not taken" in err


def test_ctrl_c_flushes_what_was_held_back(here: Cli) -> None:
    module(
        """
        import asyncio, signal
        from async_pipeline import Pipeline
        async def press(x):
            if x == 3:
                for _ in range(10):  # the first two are taken meanwhile
                    await asyncio.sleep(0)
                signal.raise_signal(signal.SIGINT)
                await asyncio.Event().wait()
            return x
        pipeline = Pipeline([press])
        """
    )
    assert here("run", "other:pipeline", stdin=numbers(1, 2, 3, 4)) == (
        130,
        "1\n2\n4\n",
        "async-pipeline: interrupted after 3 items; their results are written\n",
    )


def test_ctrl_c_during_the_import(here: Cli) -> None:
    module("import signal; signal.raise_signal(signal.SIGINT)")
    assert here("run", "other:pipeline") == (130, "", "async-pipeline: interrupted\n")


# -- a terminal


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # line feeds as they are
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def seen(fd: int) -> str:
    """What the terminal has received so far."""
    received = b""
    while select.select([fd], [], [], 0)[0]:
        received += os.read(fd, 65536)
    return received.decode()


def test_a_terminal_shows_the_progress(folder: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    module(
        """
        import asyncio, os
        from async_pipeline import Pipeline
        async def wait(x):
            if x == 2:
                raise ValueError
            while x > 2 and not os.path.exists("go"):
                await asyncio.sleep(0.01)
            return x
        pipeline = Pipeline([wait])
        """
    )
    (folder / "in").write_text("\n\n" + numbers(1, 2, 3, 4))
    shown = ""

    def draws() -> object:
        nonlocal shown
        shown += seen(ours)
        return re.search(r"\r2 done, [\d.,]+/s, 1 failed, 2 in flight, \d+:\d\d left", shown)

    with Live("run", "other:pipeline", "--input", "in", stderr=theirs) as command:
        until(draws)
        (folder / "go").touch()
        assert command.finish()[:2] == (1, "1\n3\n4\n")
    drawn, _, rest = (shown + seen(ours)).rpartition("\r")
    assert "\n" not in drawn
    last, *summary = rest.splitlines()
    assert re.fullmatch(r"4 done, [\d.,]+/s, 1 failed, 0 in flight, \d+:\d\d left", last)
    assert summary[0] == "async-pipeline: 1 of 4 items failed"


def test_no_time_is_left_at_the_end_of_a_file(folder: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    with open("in", "wb") as file:
        file.truncate(10**9)  # what someone else has read already
        file.seek(0, os.SEEK_END)
        file.write(b'"%s"\n' % (b"x" * 100_000))
    with open("in", "rb") as file:
        file.seek(10**9)
        with Live("run", "jobs:same", stdin=file, stderr=theirs) as command:
            assert command.finish().code == 0
    assert seen(ours).endswith("/s, 0 failed, 0 in flight, 0:00 left\n")


def test_no_time_left_where_the_length_is_unknown(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    with Live("run", "jobs:same", stderr=theirs) as command:
        assert command.finish("1\n").out == "1\n"
    assert re.fullmatch(r"(.*\r)?1 done, [\d.,]+/s, 0 failed, 0 in flight\n", seen(ours))


@pytest.mark.parametrize("columns", [0, 20])
def test_progress_and_results_on_one_terminal(
    here: Cli, monkeypatch: pytest.MonkeyPatch, terminal: tuple[int, int], columns: int
) -> None:
    ours, theirs = terminal
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, columns.to_bytes(4, sys.byteorder)[:2].rjust(4, b"\0") + b"\0" * 4
    )
    module(
        """
        import asyncio
        from async_pipeline import Pipeline
        from async_pipeline.cli._progress import Progress
        drawn = asyncio.Event()
        draw = Progress.draw

        def observed(progress, text):
            draw(progress, text)
            drawn.set()

        Progress.draw = observed

        async def wait(x):
            if x > 1:
                await drawn.wait()
            return x

        pipeline = Pipeline([wait])
        """
    )
    Path("in").write_text(numbers(1, 2))
    monkeypatch.setattr(_progress.Progress, "draw", _progress.Progress.draw)  # so that it is put back
    with open(theirs, "w", encoding="utf-8", closefd=False) as shared, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shared)
        patch.setattr(sys, "stderr", shared)
        assert exit_code("run", "other:pipeline", "--input", "in") == 0
    screen = seen(ours)
    first, drawn, *_ = screen.split("\r")
    assert first == "1\n"
    assert drawn.startswith("1 done, ")
    assert len(drawn) == 19 if columns else len(drawn) > 30
    assert f"\r{' ' * len(drawn)}\r2\n" in screen  # cleared before the next result
    assert screen.splitlines()[-1].startswith("2 done, ")


def test_no_progress_while_someone_types(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    with Live("run", "jobs:same", stdin=theirs, stderr=theirs) as command:
        os.write(ours, b"1\n")
        assert command.line() == "1\n"
        os.write(ours, b"\x04")  # Ctrl-D
        assert command.end()[0] == 0
    assert "done" not in seen(ours)


def test_a_reader_that_left_leaves_the_terminal_clean(
    terminal: tuple[int, int],
) -> None:
    ours, theirs = terminal
    shown = ""

    def draws() -> bool:
        nonlocal shown
        shown += seen(ours)
        return "1 done" in shown

    with Live("run", "jobs:same", stderr=theirs) as command:
        command.send("1\n")
        until(draws)
        command.stdout.close()
        command.send("2\n")
        assert command.end()[0] == 0
    shown += seen(ours)
    assert shown.endswith("\r")
    assert shown.split("\r")[-2].strip() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_the_time_left_is_easy_to_read(seconds: float, text: str) -> None:
    assert _progress.clock(seconds) == text


# -- a picture


SHOWN = """
from async_pipeline import Pipeline, Stage, each, parallel

def fetch(x): ...

def broken(x):
    raise OSError

print("imported")
small = Pipeline([Stage("fetch", fetch, timeout=2.0), parallel(price=fetch)], name="small")
rows = each(fetch)
odd = Pipeline([Stage("né \\N{PARTY POPPER}", fetch)], name="odd")
surrogate = Pipeline([Stage("\\ud800", fetch)])
large = Pipeline([Stage(f"stage {n}", fetch) for n in range(20_000)], name="large")
fails = Pipeline([broken])
"""


@pytest.fixture
def shown(folder: Path) -> None:
    module(SHOWN, name="shown")


class TestPictures:
    """``--report`` and ``--trace``."""

    BOTH = ("--report", "run.html", "--trace", "run.json")

    @staticmethod
    def slices() -> list[dict[str, Any]]:
        entries = json.loads(Path("run.json").read_text())["traceEvents"]
        return [entry for entry in entries if entry["ph"] == "X"]

    def test_both_tell_of_each_item(self, here: Cli) -> None:
        result = here("run", "jobs:nested", *self.BOTH, "--errors", "bad", stdin=numbers(1, 2, "no", 3))
        # twice a number is never odd, and the third line is no item
        assert (result.code, result.out) == (1, "")
        runs = [entry for entry in self.slices() if entry["name"] == "pipeline"]
        assert [entry["args"]["item_index"] for entry in runs] == [0, 1, 3]
        assert [entry["args"]["outcome"] for entry in runs] == ["error"] * 3
        assert [entry["name"] for entry in self.slices()].count("inner/odd") == 3
        page = Path("run.html").read_text()
        assert "inner" in page
        assert "ValueError" in page
        assert "6 is even" in page

    def test_the_results_are_the_same(self, here: Cli) -> None:
        assert here("run", "jobs:swapped", *self.BOTH, stdin=numbers(0, 1)) == (0, numbers(0, 1), "")
        assert len(self.slices()) == 4

    @pytest.mark.parametrize("option", ["--report", "--trace"])
    def test_one_alone(self, here: Cli, option: str) -> None:
        assert here("run", "jobs:doubled", option, "file", stdin=numbers(1)) == (0, "2\n", "")
        text = Path("file").read_text()
        assert text.lower().startswith("<!doctype html>" if option == "--report" else '{"traceevents"')
        assert not Path("run.html").exists()

    def test_the_pipelines_own_observers_go_on(self, here: Cli) -> None:
        module(
            """
            from async_pipeline import Pipeline
            pipeline = Pipeline([str], observers=[lambda event: print(event.kind, event.item_index)])
            """
        )
        result = here("run", "other:pipeline", *self.BOTH, stdin=numbers(1))
        assert result.err.splitlines() == [
            "run_start 0",
            "stage_start 0",
            "stage_end 0",
            "run_end 0",
        ]

    def test_a_pipeline_with_a_run_of_its_own_works(self, here: Cli) -> None:
        module(
            """
            from async_pipeline import Pipeline
            class Own(Pipeline):
                async def run(self, value, *, context=None):
                    return await super().run(value, context=context)
            pipeline = Own([str])
            """
        )
        assert here("run", "other:pipeline", *self.BOTH, stdin=numbers(1)).values == ["1"]
        assert [entry["name"] for entry in self.slices()] == ["pipeline", "str"]

    def test_they_are_written_after_ctrl_c(self) -> None:
        with Live("run", "jobs:hanging", *self.BOTH) as command:
            command.send(numbers(1, 2, 3))
            assert [command.line(), command.line()] == ["1\n", "2\n"]
            command.interrupt()
            assert command.end()[0] == 130
        runs = [entry["args"] for entry in self.slices() if entry["name"] == "pipeline"]
        assert [run["outcome"] for run in runs] == ["ok", "ok", "cancelled"]
        assert "hang_at_3" in Path("run.html").read_text()

    def test_a_dash_is_no_file(self, here: Cli) -> None:
        result = here("run", "jobs:same", "--trace", "-", stdin=numbers(1))
        assert result == (2, "", "async-pipeline: --trace takes a file\n")

    def test_they_are_written_when_the_reader_has_gone(self) -> None:
        with Live("run", "jobs:same", *self.BOTH) as command:
            command.send(numbers(1))
            assert command.line() == "1\n"
            command.stdout.close()
            command.send(numbers(*range(100_000)))
            assert command.end() == (0, "")
        assert len(self.slices()) >= 2
        assert Path("run.html").exists()

    @pytest.mark.parametrize("option", ["--report", "--trace"])
    @pytest.mark.parametrize(("path", "reason"), [("nowhere/file", "no folder"), (".", "it is a folder")])
    def test_where_nothing_can_be_written(self, here: Cli, option: str, path: str, reason: str) -> None:
        result = here("run", "jobs:same", option, path, stdin=numbers(1))
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(f"async-pipeline: the {option[2:]} {path!r} can't be written: ")
        assert reason in result.err

    def test_what_can_no_longer_be_written_does_not_lose_the_other(self, here: Cli) -> None:
        module(
            """
            import shutil
            from async_pipeline import Pipeline
            pipeline = Pipeline([lambda x: shutil.rmtree("gone")])
            """
        )
        Path("gone").mkdir()
        arguments = ("run", "other:pipeline", "--report", "gone/run.html", "--trace", "run.json")
        result = here(*arguments, stdin=numbers(1))
        assert (result.code, result.out) == (1, "null\n")
        assert result.err == (
            "async-pipeline: the report 'gone/run.html' can't be written: No such file or directory\n"
        )
        assert len(self.slices()) == 2

    def test_a_failure_of_items_and_of_a_picture_is_one_exit_status(self, here: Cli) -> None:
        module(
            """
            import shutil
            from async_pipeline import Pipeline
            def fail(x):
                shutil.rmtree("gone")
                raise KeyboardInterrupt
            pipeline = Pipeline([fail])
            """
        )
        Path("gone").mkdir()
        result = here("run", "other:pipeline", "--trace", "gone/run.json", stdin=numbers(1))
        assert result.code == 130
        assert "the trace 'gone/run.json' can't be written" in result.err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--report", "file", "--trace", "./file"], "--report and --trace are the same file"),
            (["--output", "file", "--trace", "file"], "--output and --trace are the same file"),
            (["--errors", "file", "--report", "file"], "--errors and --report are the same file"),
            (["--input", "stdin", "--report", "stdin"], "--input and --report are the same file"),
        ],
    )
    def test_two_into_one_file(self, here: Cli, options: list[str], message: str) -> None:
        result = here("run", "jobs:same", *options, stdin=numbers(1))
        assert (result.code, result.err) == (2, f"async-pipeline: {message}\n")
        assert Path("stdin").read_text() == numbers(1)

    def test_both_may_go_to_what_is_no_file(self, here: Cli) -> None:
        result = here("run", "jobs:same", "--report", os.devnull, "--trace", os.devnull, stdin=numbers(1))
        assert result == (0, "1\n", "")
        assert Path(os.devnull).is_char_device()


@pytest.mark.usefixtures("shown")
class TestShow:
    def test_a_tree_by_default(self, here: Cli) -> None:
        tree = "small (pipeline)\n├─ fetch: timeout 2 s\n└─ parallel\n   └─ price\n"
        assert here("show", "shown:small") == (0, tree, "imported\n")
        assert here("show", "shown:small", "--format", "tree").out == tree

    def test_a_flowchart(self, here: Cli) -> None:
        code, out, err = here("show", "shown:small", "--format", "mermaid")
        assert (code, err) == (0, "imported\n")
        assert out == importlib.import_module("shown").small.to_mermaid() + "\n"
        assert out.startswith("flowchart TD\n")

    def test_json(self, here: Cli) -> None:
        code, out, err = here("show", "shown:small", "--format", "json")
        assert (code, err) == (0, "imported\n")
        text: Any = importlib.import_module("async_pipeline.text")
        assert out == text.describe(importlib.import_module("shown").small) + "\n"
        assert json.loads(out)["pipeline"]["name"] == "small"

    def test_nothing_is_run(self, here: Cli) -> None:
        assert here("show", "shown:fails").out == "pipeline\n└─ broken\n"

    @pytest.mark.parametrize(
        ("args", "line"),
        [
            ([], "show: the following arguments are required: MODULE:PIPELINE (see async-pipeline show"),
            (["shown:small", "--format", "svg"], "show: argument --format: invalid choice: 'svg' (choose"),
            (["shown:small", "--form", "json"], "unrecognized arguments: --form json"),
            (["shown"], "async-pipeline: 'shown' must be MODULE:PIPELINE, for example shop.jobs:pipeline"),
            (["shown:fetch"], "'shown:fetch' is a function, not a Pipeline: write Pipeline([fetch])"),
            (["shown:rows"], "'shown:rows' is an Each, not a Pipeline: write Pipeline([rows])"),
            (["nowhere:at_all"], "async-pipeline: there is no module 'nowhere' here or installed"),
        ],
    )
    def test_wrong_usage(self, here: Cli, args: list[str], line: str) -> None:
        code, out, err = here("show", *args)
        assert (code, out) == (2, "")
        assert line in err.splitlines()[-1]

    def test_help(self) -> None:
        code, out, err = shell("show", "--help")
        assert (code, err) == (0, "")
        assert "--format {tree,mermaid,json}" in out
        assert "async-pipeline show crawl:pages --format mermaid" in out
        assert out.isascii()  # or it could not be read in every terminal

    @pytest.mark.parametrize(
        ("encoding", "tree", "flowchart", "text"),
        [
            ("utf-8", "odd (pipeline)\n└─ né 🎉\n", '["né 🎉"]', None),
            (
                "cp1252",
                "odd (pipeline)\n`- né \\U0001f389\n",
                '["n#233; #127881;"]',
                "n\\u00e9 \\ud83c\\udf89",
            ),
            (
                "ascii",
                "odd (pipeline)\n`- n\\xe9 \\U0001f389\n",
                '["n#233; #127881;"]',
                "n\\u00e9 \\ud83c\\udf89",
            ),
        ],
    )
    def test_an_output_that_does_not_know_every_character(
        self, monkeypatch: pytest.MonkeyPatch, encoding: str, tree: str, flowchart: str, text: str | None
    ) -> None:
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        assert self.written("tree") == (0, tree.encode(encoding))
        code, out = self.written("mermaid")
        assert code == 0
        assert flowchart in out.decode(encoding)
        code, out = self.written("json")
        assert code == 0
        assert json.loads(out)["pipeline"]["stages"][0]["name"] == "né 🎉"
        assert text is None or (out.isascii() and text.encode() in out)

    def written(self, style: str) -> tuple[int, bytes]:
        command = [sys.executable, "-m", "async_pipeline", "show", "shown:odd", "--format", style]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
        assert done.stderr == b"imported" + os.linesep.encode()
        return done.returncode, done.stdout

    @pytest.mark.parametrize("style", ["tree", "mermaid", "json"])
    def test_half_of_a_surrogate_pair(self, here: Cli, style: str) -> None:
        code, out, _ = here("show", "shown:surrogate", "--format", style)
        assert code == 0
        assert {"tree": "\\ud800", "mermaid": "#92;ud800", "json": '"\\ud800"'}[style] in out

    def test_every_format_can_be_written_whatever_its_text_is(self) -> None:
        for style, (_, encode) in _show._FORMATS.items():
            assert encode("\ud800", "utf-8").isascii(), style

    def test_a_reader_that_leaves(self) -> None:
        with Live("show", "shown:large") as command:
            assert command.line() == "large (pipeline)\n"
            command.stdout.close()
            assert command.end() == (0, "imported\n")

    def test_a_slow_reader_gets_everything(self) -> None:
        with Live("show", "shown:large") as command:
            command.stand_still()
            code, out, _ = command.finish()
        assert code == 0
        assert out.count("\n") == 20_001
        assert out.endswith("└─ stage 19999\n")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device of Linux")
    def test_a_disk_that_is_full(self) -> None:
        with open("/dev/full", "wb") as full:
            command = [sys.executable, "-m", "async_pipeline", "show", "shown:small"]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE)
        assert done.returncode == 1
        assert (
            done.stderr.decode().splitlines()[1].startswith("async-pipeline: the output can't be written: ")
        )

    def test_an_output_that_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", None)
            patch.setattr(sys, "stderr", shown)
            assert exit_code("show", "shown:small") == 2
        assert shown.getvalue() == "async-pipeline: the output '-' can't be written: it is closed\n"

    def test_ctrl_c(self) -> None:
        with Live("show", "shown:large") as command:
            command.stand_still()
            command.interrupt()
            assert command.end() == (130, "imported\nasync-pipeline: interrupted\n")


# -- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of its memory from /proc")
def test_memory_is_flat_however_long_the_input_is() -> None:
    module(
        """
        import sys
        from pathlib import Path
        from async_pipeline import cli
        try:
            cli.main()
        finally:
            # not ru_maxrss, which begins at what the process had before its exec
            [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
            print(peak.split()[1], file=sys.stderr)
        """,
        name="measured",
    )
    peaks = []
    for count in (2_000, 60_000):
        line = json.dumps("x" * 500) + "\n"
        Path("in").write_text(line * count)
        command = [sys.executable, "measured.py", "run", "jobs:same", "--input", "in", "--output", "out"]
        done = subprocess.run(command, stderr=subprocess.PIPE, check=True, timeout=PATIENCE)
        assert Path("out").stat().st_size == len(line) * count
        peaks.append(int(done.stderr))
    assert peaks[1] - peaks[0] < 4 * 1024, f"KiB at the two sizes: {peaks}"


# -- a journal


JOURNALED = """
from pathlib import Path
from async_pipeline import Pipeline

class Odd(Exception):
    pass

def note(x):
    with open("ran", "a") as file:
        file.write(f"{x} ")
    if x == 3 and not Path("mended").exists():
        raise Odd("three")
    return [x]

noted = Pipeline([note], name="noted")
"""


def ran() -> str:
    """What has run since the last call."""
    path = Path("ran")
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return text.strip()


def test_with_a_journal_only_the_rest_runs_and_the_output_is_complete(here: Cli) -> None:
    module(JOURNALED)
    run = ("run", "other:noted", "--journal", "run.db", "--output", "out")
    code, _, err = here(*run, stdin=numbers(1, 2, 3))
    assert (code, ran()) == (1, "1 2 3")
    assert "item 2: stage 'note': Odd: three" in err
    assert here(*run, stdin=numbers(1, 2, 3, 4)).code == 1
    assert ran() == "3 4"
    Path("mended").touch()
    assert here(*run, stdin=numbers(1, 2, 3, 4)) == (0, "", "")
    assert ran() == "3"
    assert Path("out").read_text() == "[1]\n[2]\n[3]\n[4]\n"
    assert here(*run, "--run-id", "again", stdin=numbers(1)).code == 0
    assert ran() == "1"


def test_failures_of_a_journal_may_stay_what_they_were(here: Cli) -> None:
    module(JOURNALED)
    run = ("run", "other:noted", "--journal", "run.db", "--errors", "errors")
    assert here(*run, stdin=numbers(1, 3)).code == 1
    before, _ = Path("errors").read_text(), ran()
    Path("mended").touch()
    assert here(*run, "--no-retry-failed", stdin=numbers(1, 3)).code == 1
    assert ran() == ""
    assert Path("errors").read_text() == before
    assert json.loads(before) == {"item": 3, "index": 1, "stage": "note", "message": "Odd: three"}
    assert here(*run, "--retry-failed", stdin=numbers(1, 3)).code == 0
    assert ran() == "3"


def test_the_words_of_a_recorded_error() -> None:
    described = [
        _failures.describe_error(async_pipeline.RecordedError(kind, text))
        for kind, text in (("shop.api:Shop.NotFound", "no"), ("shop:Gone", ""), ("OSError", "x"))
    ]
    assert described == ["NotFound: no", "Gone", "OSError: x"]


def test_lines_that_are_no_items_are_not_in_the_journal(here: Cli) -> None:
    module(JOURNALED)
    run = ("run", "other:noted", "--journal", "run.db")
    assert here(*run, stdin="1\n{2\n").code == 1
    assert here(*run, stdin="1\n2\n").values == [[1], [2]]
    assert ran() == "1 2"


def test_a_line_that_can_not_be_kept_is_a_failed_item(here: Cli) -> None:
    code, out, err = here("run", "jobs:same", "--journal", "j", stdin="1\n1e999\n2\n")
    assert (code, out) == (1, "1\n2\n")
    assert "item 1: line 2 can't be kept in a journal: Out of range float values" in err
    assert "(item: 1e999)" in err


def test_lines_of_text_with_a_journal(here: Cli) -> None:
    run = ("run", "jobs:same", "--lines", "--journal", "j")
    for _ in range(2):
        assert here(*run, stdin="a\n\nb").values == ["a", "", "b"]


def test_a_report_with_a_journal(here: Cli) -> None:
    run = ("run", "jobs:same", "--journal", "j", "--report", "report.html")
    for _ in range(2):
        assert here(*run, stdin=numbers(1, 2)).values == [1, 2]
        assert Path("report.html").exists()


def test_items_that_are_not_those_of_the_journal(here: Cli) -> None:
    run = ("run", "jobs:same", "--journal", "j")
    assert here(*run, stdin=numbers(1, 2)).code == 0
    code, out, err = here(*run, stdin=numbers(5, 2))
    assert (code, out) == (1, "")
    assert err.startswith("async-pipeline: item 0 is not the one that the journal ")
    assert err.endswith(" (--run-id)\n")
    assert err.count("\n") == 1


def test_a_journal_that_is_in_use_leaves_the_output_to_who_writes_it(here: Cli) -> None:
    Path("out").write_text("precious\n")
    Path("errors").write_text("precious\n")
    lock = _sqlite.lock_file("j-lock")
    assert lock is not None
    files = ("--output", "out", "--errors", "errors")
    code, out, err = here("run", "jobs:same", "--journal", "j", *files, stdin=numbers(1))
    _sqlite.remove_locked("j-lock", lock)
    assert (code, out) == (1, "")
    assert err.startswith("async-pipeline: another batch uses the journal ")
    assert err.count("\n") == 1
    assert Path("out").read_text() == Path("errors").read_text() == "precious\n"


def test_ctrl_c_keeps_the_journal() -> None:
    with Live("run", "jobs:hanging", "--journal", "j") as command:
        assert command.process.stdin is not None
        command.process.stdin.write(numbers(0, 1, 2, 3).encode())
        assert [command.stdout.readline() for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]
        command.process.send_signal(signal.SIGINT)
        assert command.finish().code == 130
    (line,) = shell("journal", "j").out.splitlines()[1:]
    assert line.split()[:4] == ["pipeline", "pipeline", "3", "0"]
    assert not Path("j-lock").exists()


def test_what_a_journal_knows(here: Cli) -> None:
    module(JOURNALED)
    here("run", "other:noted", "--journal", "run.db", stdin=numbers(*range(1200)))
    here("run", "jobs:same", "--journal", "run.db", "--run-id", "a\x1b[1m longer", stdin=numbers(1))
    here("run", "jobs:same", "--journal", "run.db", "--run-id", "empty")
    code, out, err = here("journal", "run.db")
    assert (code, err) == (0, "")
    assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "<time>", out).splitlines() == [
        "run_id           pipeline  finished  failed  last change",
        "noted            noted        1,199       1  <time>",
        "a\\x1b[1m longer  pipeline         1       0  <time>",
        "empty            pipeline         0       0  <time>",
    ]
    assert here("journal", "run.db", "--errors").values == [
        {"run_id": "noted", "item": 3, "index": 3, "stage": "note", "message": "Odd: three"}
    ]


def test_many_failures_of_a_journal_and_a_reader_that_leaves(here: Cli) -> None:
    here("run", "jobs:odds", "--journal", "j", stdin=numbers(*range(4000)))
    assert [failure["index"] for failure in here("journal", "j", "--errors").values] == [*range(0, 4000, 2)]
    with Live("journal", "j", "--errors") as command:
        command.stdout.readline()
        command.stdout.close()
        assert command.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("options", [(), ("--errors",)])
def test_a_file_that_is_no_journal(here: Cli, options: tuple[str, ...]) -> None:
    for name, words in (("nowhere", "No such file or directory"), ("jobs.py", "file is not a database")):
        code, out, err = here("journal", name, *options)
        assert (code, out) == (1, "")
        assert words in err
        assert err.startswith(f"async-pipeline: the journal {name!r} can't be shown: ")
        assert err.count("\n") == 1
    assert not Path("nowhere").exists()
