"""A census of Python's standard library: which packages are the largest, and what is their longest function?

    python examples/stdlib_census.py                     # the library of the Python that runs this
    python examples/stdlib_census.py ~/project --top 5   # or any other folder

The pipeline also runs on the command line, one path per line in, one JSON object per line out:

    find ~/project -name '*.py' | async-pipeline run examples.stdlib_census:pipeline --lines
"""

import argparse
import ast
import asyncio
import heapq
import io
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from async_pipeline import Pipeline, StageExecutionError, staged

FAILURES_SHOWN = 5

# ---- the pipeline: what becomes of one file


class Source(NamedTuple):
    path: str
    lines: list[str]


class Module(NamedTuple):
    path: str
    lines: int
    tree: ast.Module


class Report(TypedDict):
    """What the last stage says of a file; a dict, so that the command line can write it as JSON."""

    path: str
    lines: int
    functions: int  # the async ones included
    async_functions: int
    longest_function: str | None
    longest_function_lines: int


@staged
async def read(path: str) -> Source:
    """Read a file in a thread: while one waits for the disk, others can be read, and one be parsed."""
    try:
        return Source(path, await asyncio.to_thread(read_lines, path))
    except UnicodeDecodeError as error:  # its repr shows all the bytes around, which may be thousands
        raise ValueError(f"not {error.encoding}: {error.reason} ({Path(path).name})") from None


def read_lines(path: str) -> list[str]:
    with tokenize.open(path) as file:  # decodes as Python does, by the encoding that the file declares
        return file.readlines()


@staged
def parse(source: Source) -> Module:
    """Parse the lines.

    This is computing, not waiting, so a plain function will do. It holds up the event loop while it runs,
    which is fine here: the threads of ``read`` go on meanwhile, and nobody else uses this loop.
    """
    with warnings.catch_warnings(action="ignore"):  # they are about the code that is counted
        tree = ast.parse("".join(source.lines), filename=source.path)
    return Module(source.path, len(source.lines), tree)


@staged
def measure(module: Module) -> Report:
    """Count the lines and the functions, methods and nested functions included."""
    functions = [
        node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    longest = max(functions, key=count_lines, default=None)
    return {
        "path": module.path,
        "lines": module.lines,
        "functions": len(functions),
        "async_functions": sum(isinstance(function, ast.AsyncFunctionDef) for function in functions),
        "longest_function": longest.name if longest else None,
        "longest_function_lines": count_lines(longest) if longest else 0,
    }


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


pipeline: Pipeline[str, Report] = Pipeline([read, parse, measure], name="census")


# ---- the census: all files through the pipeline, and the sums by package


@dataclass
class Package:
    """The sum of the reports on a package's files."""

    name: str
    files: int = 0
    lines: int = 0
    functions: int = 0
    async_functions: int = 0
    longest_function: str | None = None
    longest_function_lines: int = 0

    def add(self, report: Report) -> None:
        self.files += 1
        self.lines += report["lines"]
        self.functions += report["functions"]
        self.async_functions += report["async_functions"]
        if report["longest_function_lines"] > self.longest_function_lines:
            self.longest_function = report["longest_function"]
            self.longest_function_lines = report["longest_function_lines"]


async def take_census(folder: Path) -> tuple[list[Package], list[StageExecutionError]]:
    """Send every file through the pipeline; return the packages, and the errors of the files that failed."""
    packages: dict[str, Package] = {}
    failures: list[StageExecutionError] = []
    async with pipeline.stream(find_files(folder), concurrency=16) as results:
        async for outcome in results.outcomes():  # a failed file is an outcome too, and the rest goes on
            try:
                report = outcome.unwrap()
            except StageExecutionError as error:
                failures.append(error)
            else:
                name = package_name(Path(report["path"]).relative_to(folder))
                packages.setdefault(name, Package(name)).add(report)
    return list(packages.values()), failures


def find_files(folder: Path) -> Iterator[str]:
    """Find the Python files, except those that pip installed: they live inside the library's folder."""
    for path in sorted(folder.rglob("*.py")):
        if not {"site-packages", "dist-packages"}.intersection(path.relative_to(folder).parts):
            yield str(path)


def package_name(path: Path) -> str:
    """Name the package of a file: ``json`` for ``json/decoder.py``, ``typing`` for ``typing.py``."""
    return path.parts[0].removesuffix(".py")


# ---- the table


def print_census(
    folder: Path, packages: list[Package], failures: list[StageExecutionError], *, top: int
) -> None:
    print(
        f"{'package':<16}{'files':>8}{'lines':>10}{'functions':>11}{'async':>7}  longest function, its lines"
    )
    for package in heapq.nlargest(top, packages, key=lambda package: package.lines):
        longest = f"{package.longest_function}, {package.longest_function_lines:,}"
        print(
            f"{package.name:<16}{package.files:>8,}{package.lines:>10,}{package.functions:>11,}"
            f"{package.async_functions:>7,}  {longest if package.longest_function else '-'}"
        )
    files, lines = sum(package.files for package in packages), sum(package.lines for package in packages)
    print(f"\n{len(packages):,} packages, {files:,} files, {lines:,} lines; failed files: {len(failures):,}")
    for failure in failures[:FAILURES_SHOWN]:
        path = Path(failure.item).relative_to(folder)
        print(f"  {path}: could not {failure.stage_name}: {failure.original_error}")
    if len(failures) > FAILURES_SHOWN:
        print(f"  and {len(failures) - FAILURES_SHOWN:,} more")


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the lines and functions of the standard library.")
    parser.add_argument("folder", nargs="?", type=Path, default=sysconfig.get_path("stdlib"))
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many packages to show (10)")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"there is no folder {arguments.folder}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in the files may be none that this terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    packages, failures = asyncio.run(take_census(arguments.folder))
    print_census(arguments.folder, packages, failures, top=arguments.top)


if __name__ == "__main__":
    main()
