"""The Python blocks of README and docs run and print what stands below them; the README's commands are there.

The blocks of a page share one namespace, in their order, so that a later one can use what an earlier one
defined. ``await`` may stand at the top level. All waiting is virtual. A ```text or ```mermaid block that
follows a Python block, with nothing between the two, is what that one prints.
"""

import ast
import asyncio
import inspect
import re
import shlex
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest

from async_pipeline import StageExecutionError
from async_pipeline.testing import VirtualClockLoop

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))

OUTPUTS = ("text", "mermaid")
SHELLS = ("sh", "bash", "shell", "console")

FENCED = re.compile(
    r"^(?P<indent>[ ]*)(?P<fence>`{3,})[ ]*(?P<language>\w*)[^`\n]*\n"
    r"(?P<code>.*?)"
    r"^[ ]*(?P=fence)`*[ ]*$",
    flags=re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the first line of the code
    output: str | None = None


def find_blocks(text: str) -> list[Block]:
    """Find the fenced blocks; the output of a Python block becomes a part of it as well."""
    blocks: list[Block] = []
    end = 0
    for match in FENCED.finditer(text):
        language, code = match["language"], textwrap.dedent(match["code"])
        follows = bool(blocks) and not text[end : match.start()].strip()
        if language in OUTPUTS and follows and blocks[-1].language == "python":
            blocks[-1] = blocks[-1]._replace(output=code)
        blocks.append(Block(language, code, text.count("\n", 0, match.start("code")) + 1))
        end = match.end()
    return blocks


def run_block(block: Block, namespace: dict[str, object], runner: asyncio.Runner, path: Path) -> None:
    code = "\n" * (block.line - 1) + block.code  # a traceback then shows the line of the file
    compiled = compile(code, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if compiled.co_flags & inspect.CO_COROUTINE:
        runner.run(types.FunctionType(compiled, namespace)())
    else:
        exec(compiled, namespace)


def check_blocks(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        for block in find_blocks(path.read_text(encoding="utf-8")):
            if block.language == "python":
                capsys.readouterr()
                run_block(block, namespace, runner, path)
                printed = capsys.readouterr().out
                if block.output is not None:
                    where = f"what the block at line {block.line} prints is not what stands below it"
                    assert printed.rstrip() == block.output.rstrip(), where


def shell_line(text: str, name: str) -> str:
    """Return the first line of a shell block that names ``name``."""
    shells = [block.code for block in find_blocks(text) if block.language in SHELLS]
    lines = [line for code in shells for line in code.splitlines() if name in line]
    assert lines, f"no line of a shell block names {name}"
    return lines[0]


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let an ``asyncio.run`` inside a block get a virtual clock, and what it writes a folder of its own."""
    monkeypatch.setattr(asyncio.events, "new_event_loop", VirtualClockLoop)
    monkeypatch.chdir(tmp_path)


# ---- the README


def test_python_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [
        block for block in find_blocks(README.read_text(encoding="utf-8")) if block.language == "python"
    ]
    assert any(block.output for block in blocks), "the README has an example with its output"
    check_blocks(README, capsys)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_python_blocks_of_the_docs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_blocks(path, capsys)


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_every_fence_is_found(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(find_blocks(text))


@pytest.mark.parametrize("name", ["stdlib_census", "pytest"])
def test_commands(name: str) -> None:
    line = shell_line(README.read_text(encoding="utf-8"), name)
    assert not line.startswith(("$", "#", ">")), "a prompt or a comment can't be pasted into a shell"
    assert not line.endswith("\\"), "the command has to fit on one line"
    scripts = [word for word in shlex.split(line) if word.endswith(".py")]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


# ---- the functions above, on samples


SAMPLE = """\
# A sample

```python
import asyncio
from async_pipeline import Pipeline

async def slow(number):
    await asyncio.sleep(3600)
    return number + 1

pipeline = Pipeline([slow])
```

It is used like this:

```python
print(await pipeline.run(1))
async with pipeline.stream([1, 2]) as results:
    print([value async for value in results])
```

```text
2
[2, 3]
```

1. In a list:

   ```python title="program.py"
   print(asyncio.run(pipeline.map([5])))
   ```

   ```text
   [6]
   ```

Some prose between, so this is not checked:

```text
anything
```

```sh
cd somewhere
python -m pytest -q && echo done
python -m pytest -x
```

```text
5 passed
```
"""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.md"
    path.write_text(SAMPLE)
    return path


def test_sample_blocks(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = find_blocks(SAMPLE)
    assert [(block.language, block.output) for block in blocks] == [
        ("python", None),
        ("python", "2\n[2, 3]\n"),
        ("text", None),
        ("python", "[6]\n"),
        ("text", None),
        ("text", None),
        ("sh", None),
        ("text", None),
    ]
    assert SAMPLE.splitlines()[blocks[1].line - 1] == "print(await pipeline.run(1))"
    check_blocks(sample, capsys)


def test_sample_command() -> None:
    assert shell_line(SAMPLE, "pytest") == "python -m pytest -q && echo done"
    with pytest.raises(AssertionError, match="names stdlib_census"):
        shell_line(SAMPLE, "stdlib_census")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("print(await pipeline.run(1))", "print(await pipeline.run(2))", AssertionError),
        ("print(await pipeline.run(1))", "await pipeline.run(1)", AssertionError),
        ("pipeline.map([5])", "pipeline.map([6])", AssertionError),
        ("pipeline.run(1)", "pipeline.run('x')", StageExecutionError),
        ("import asyncio", "import asyncio, nowhere", ImportError),
        ("print(asyncio", "print asyncio", SyntaxError),
    ],
)
def test_a_block_that_is_wrong_fails(
    sample: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, error: type[BaseException]
) -> None:
    assert old in SAMPLE
    sample.write_text(SAMPLE.replace(old, new))
    with pytest.raises(error):
        check_blocks(sample, capsys)


def test_a_traceback_shows_the_line_of_the_file(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.write_text(SAMPLE.replace("print(await pipeline.run(1))", "raise KeyError('here')"))
    with pytest.raises(KeyError) as caught:
        check_blocks(sample, capsys)
    where = caught.traceback[-1]
    assert where.lineno + 1 == find_blocks(SAMPLE)[1].line
    assert Path(where.path) == sample
