"""The type tests in ``typing/``: mypy accepts what must pass there and rejects what must not.

What must not pass is marked ``# type: ignore[code]``, and mypy complains of a mark that is not needed.
(That folder must not get an ``__init__.py``: it would hide the standard library's ``typing``.)
"""

import asyncio
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TYPE_TESTS = Path(__file__).with_name("typing")

WRONG = """
from typing import Any, assert_type
from async_pipeline import Pipeline, Stage

async def fetch(url: str, context: dict[str, Any]) -> bytes: return b""

assert_type(Stage("fetch", fetch), Stage[str, str])  # says assert-type
wrong: Stage[int, bytes] = Stage("fetch", fetch)  # says arg-type
Pipeline([fetch], before_stage=len)  # says arg-type
Pipeline([fetch])  # type: ignore[arg-type]  # says unused-ignore
def untyped(x): return x  # says no-untyped-def
"""


def run_mypy(path: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", path],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def test_type_tests() -> None:
    checked = run_mypy(TYPE_TESTS)
    assert (checked.stdout, checked.stderr, checked.returncode) == ("", "", 0)


def test_wrong_types_do_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    checked = run_mypy(path)
    expected = [
        (number, line.rpartition("# says ")[2])
        for number, line in enumerate(WRONG.splitlines(), start=1)
        if "# says " in line
    ]
    found = re.findall(r":(\d+): error: .*\[([a-z-]+)\]$", checked.stdout, flags=re.MULTILINE)
    assert [(int(number), code) for number, code in found] == expected
    assert checked.returncode == 1


JOINED = """
# pyright: reportUnnecessaryTypeIgnoreComment=true, reportUnusedExpression=false
from typing import assert_type
from async_pipeline import Pipeline, Stage, each

def fetch(url: str) -> bytes: return b""
stage = Stage("fetch", fetch)
stage | stage  # says reportOperatorIssue
stage | each(fetch)  # says reportOperatorIssue
stage | len  # type: ignore[operator]  # says reportUnnecessaryTypeIgnoreComment
assert_type(stage | len, Pipeline[str, str])  # says reportAssertTypeFailure
"""


def run_pyright(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Check a file by itself: pyright takes its configuration from any folder above."""
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("install pyright, and put it into PATH: npm install --global pyright")
    (folder / "checked.py").write_text(text)
    sources = [str(path) for path in [ROOT / "src"] if path.is_dir()]
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": sources}))
    return subprocess.run(
        [pyright, "--pythonpath", sys.executable, "--project", folder],
        capture_output=True,
        encoding="utf-8",
        timeout=110,
        check=False,
    )


def test_type_tests_of_joins_under_pyright(tmp_path: Path) -> None:
    checked = run_pyright(tmp_path, (TYPE_TESTS / "composition.py").read_text())
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_wrong_joins_do_not_pass_under_pyright(tmp_path: Path) -> None:
    checked = run_pyright(tmp_path, JOINED)
    expected = [
        (number, line.rpartition("# says ")[2])
        for number, line in enumerate(JOINED.splitlines(), start=1)
        if "# says " in line
    ]
    found = re.findall(r":(\d+):\d+ - error: .*?\((\w+)\)$", checked.stdout, re.MULTILINE | re.DOTALL)
    assert [(int(number), code) for number, code in found] == expected, checked.stdout


@pytest.mark.parametrize("path", sorted(TYPE_TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_type_tests_can_be_imported(path: Path) -> None:
    assert runpy.run_path(str(path))["__doc__"]


def test_code_for_the_versions_before_runs() -> None:
    asyncio.run(runpy.run_path(str(TYPE_TESTS / "compat.py"))["main"]())
