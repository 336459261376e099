"""Who may import whom, what an import loads, and which names are public."""

import ast
import graphlib
import importlib
import pkgutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import async_pipeline
from async_pipeline import errors

PACKAGE = Path(async_pipeline.__file__).parent

# a module may import those of its own row, without a circle, and of the rows above
CORE = [
    {"errors", "types", "context", "retry", "events", "outcome", "executor", "waiting", "advice"},
    {"stage"},
    {"fanout", "records"},
    {"engine", "_engine_worker"},
    {"steps"},
    {"pipeline"},
    {
        "text",
        "jobs",
        "jobs_sqlite",
        "journal",
        "cli",
        "_jobs_file",
        "_jobs_progress",
        "_jobs_run",
        "_jobs_thread",
        "_journal_file",
        "_journal_thread",
        "_sqlite",
        "_text_names",
        "_text_values",
    },
]
LEVEL = {name: level for level, row in enumerate(CORE) for name in row}
OUTSIDE = {
    "middlewares",
    "telemetry",
    "integrations",
}  # they use what is public, and the core does not use them
ALLOWED = {
    "draw": {"errors", "types"},
    "testing": {"errors"},
    "__main__": {"cli"},
}
OPTIONAL = {  # each needs its package
    "telemetry.opentelemetry",
    "telemetry.prometheus",
    "integrations.dask",
    "integrations.fastapi",
    "integrations.taskiq",
    "integrations._api",
    "integrations._checks",
    "integrations._descriptions",
    "integrations._disconnect",
    "integrations._executions",
    "integrations._hints",
    "integrations._links",
    "integrations._openapi",
    "integrations._problems",
    "integrations._process",
    "integrations._requests",
    "integrations._schemas",
    "integrations._taskiq_worker",
}
STANDARD = sys.stdlib_module_names | {"annotationlib"}  # the latter is new in Python 3.14
NOT_LOADED_AT_FIRST = {
    *{"engine", "journal", "records", "jobs", "jobs_sqlite", "_sqlite", "cli", "testing"},
    *{"_jobs_file", "_jobs_progress", "_jobs_run", "_jobs_thread", "_journal_file", "_journal_thread"},
    *{"_engine_worker", "text", "_text_names", "_text_values"},
    *OUTSIDE,
}


def module_names() -> list[str]:
    """Every module of the package by its dotted path inside it, ``__init__`` included as the empty path."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix("__init__").removesuffix(".") for path in paths)


MODULES = module_names()


def source_of(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def statements(node: ast.AST, *, in_functions: bool) -> Iterator[ast.AST]:
    """What runs when the module is imported, without what is there for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from statements(other, in_functions=in_functions)
        elif in_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from statements(child, in_functions=in_functions)


def imports_of(module: str, *, in_functions: bool = True) -> Iterator[tuple[str, str]]:
    """The absolute modules that a module imports, each with the name that is taken from it, or with ''."""
    is_package = (PACKAGE.joinpath(*module.split(".")) if module else PACKAGE).is_dir()
    parts = ["async_pipeline", *filter(None, module.split("."))]
    for node in statements(source_of(module), in_functions=in_functions):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from ((source, alias.name) for alias in node.names)


def ours(module: str, *, in_functions: bool = True) -> set[str]:
    """The top-level modules of this package that a module imports."""
    found = set()
    for source, name in imports_of(module, in_functions=in_functions):
        package, *rest = source.split(".")
        if package == "async_pipeline" and name != "__version__":
            found.add(rest[0] if rest else name)
    return found


def top(module: str) -> str:
    """The module, or the package in which it is."""
    return module.split(".")[0]


def needed_by(module: str) -> set[str]:
    """The modules of this package, by their dotted paths, that are imported with a module."""
    found = set()
    for source, name in imports_of(module, in_functions=False):
        package, _, path = source.partition(".")
        if package == "async_pipeline":
            inner = f"{path}.{name}".removeprefix(".")
            found.add(inner if inner in MODULES else path)
    return found


def test_the_table_knows_every_module() -> None:
    known = {"", *LEVEL, *ALLOWED, *OUTSIDE}
    assert {top(module) for module in MODULES} <= known
    assert {"errors", "stage", "fanout", "pipeline", "middlewares.retry"} <= set(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if top(module) in LEVEL])
def test_a_core_module_imports_from_its_row_and_above(module: str) -> None:
    upward = {name for name in ours(module) if LEVEL.get(name, 99) > LEVEL[top(module)]}
    if module == "stage":  # `|` makes a Pipeline of two steps, and imports it when it is called
        upward -= {"pipeline"} - ours(module, in_functions=False)
    if module == "pipeline":  # doors to modules that are imported when they are called
        upward -= {"text", "draw"} - ours(module, in_functions=False)
    if module == "cli._run":  # for --report and --trace
        upward -= {"telemetry"} - ours(module, in_functions=False)
    assert not upward


def test_there_is_no_circle() -> None:
    graph = {module: needed_by(module) - {""} for module in MODULES}  # "" is for __version__
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("errors") < order.index("stage") < order.index("pipeline")
    assert order.index("errors") < order.index("fanout") < order.index("pipeline")
    assert order.index("cli._command") < order.index("cli._run") < order.index("cli")


@pytest.mark.parametrize("module", [module for module in MODULES if module in ALLOWED])
def test_the_others_import_what_they_may(module: str) -> None:
    assert ours(module) <= ALLOWED[module]


def test_retry_is_pure() -> None:
    imported = {source for source, _ in imports_of("retry")}
    assert not imported & {"asyncio", "time"}
    assert not ours("retry")


@pytest.mark.parametrize("module", [module for module in MODULES if top(module) in OUTSIDE])
def test_what_is_outside_uses_public_names_only(module: str) -> None:
    used = 0
    for source, name in imports_of(module):
        if source.split(".")[0] == "async_pipeline" and name != "__version__":
            assert name in importlib.import_module(source).__all__, f"{source}.{name}"
            used += 1
    assert used or module.endswith(
        ("logging", "timeout", "telemetry", "integrations", "_descriptions", "_jobs_page")
    )


@pytest.mark.parametrize("module", MODULES)
def test_only_the_standard_library_is_imported(module: str) -> None:
    if module in OPTIONAL:
        pytest.skip("needs its package")
    sources = {source.split(".")[0] for source, _ in imports_of(module)}
    assert sources <= STANDARD | {"async_pipeline"}


def loaded_by(statement: str) -> dict[str, str]:
    """The modules that a statement leaves, with their files, in a Python that sees no installed package."""
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {statement}; "
        "[print(name, getattr(module, '__file__', None) or '', sep='\\t') "
        "for name, module in sys.modules.copy().items()]"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t") for line in done.stdout.splitlines())


def foreign(loaded: dict[str, str]) -> set[str]:
    """Those that are neither ours nor built in nor in the folders of the standard library."""
    folders = [str(PACKAGE), *(sysconfig.get_path(key) for key in ("stdlib", "platstdlib"))]
    return {
        name
        for name, file in loaded.items()
        if file and ("site-packages" in file or not any(file.startswith(folder) for folder in folders))
    }


def test_importing_it_loads_the_standard_library_and_nothing_else() -> None:
    loaded = loaded_by("import async_pipeline")
    assert not foreign(loaded)
    assert {"async_pipeline", "async_pipeline.pipeline", "asyncio"} <= set(loaded)
    assert not {name for name in NOT_LOADED_AT_FIRST if f"async_pipeline.{name}" in loaded}


@pytest.mark.parametrize("module", [m for m in MODULES if m and m not in OPTIONAL])
def test_every_module_can_be_imported_first_and_alone(module: str) -> None:
    loaded = loaded_by(f"import async_pipeline.{module}")
    assert f"async_pipeline.{module}" in loaded
    assert not foreign(loaded)


class TestPublicNames:
    def test_are_sorted(self) -> None:
        assert async_pipeline.__all__ == sorted(set(async_pipeline.__all__))

    def test_are_complete(self) -> None:
        public = {
            name
            for name, value in vars(async_pipeline).items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)
        }
        assert set(async_pipeline.__all__) == public
        assert set(errors.__all__) <= public
        assert {"Outcome", "Pipeline", "Stage", "staged"} <= public

    def test_none_equals_a_modules(self) -> None:
        modules = {info.name for info in pkgutil.iter_modules([str(PACKAGE)])}
        assert {"stage", "pipeline", "errors", "middlewares"} <= modules
        assert not modules & set(async_pipeline.__all__)
        assert isinstance(async_pipeline.stage, types.ModuleType)

    @pytest.mark.parametrize("module", [m for m in MODULES if top(m) in LEVEL])
    def test_every_core_module_lists_its_own(self, module: str) -> None:
        loaded: Any = importlib.import_module(f"async_pipeline.{module}")
        assert loaded.__doc__
        assert len(set(loaded.__all__)) == len(loaded.__all__)
        for name in loaded.__all__:
            assert hasattr(loaded, name), name

    def test_a_class_says_where_it_is_imported_from(self) -> None:
        for name in async_pipeline.__all__:
            value = getattr(async_pipeline, name)
            if isinstance(value, type):
                module = importlib.import_module(value.__module__)
                assert value.__module__.startswith("async_pipeline.")
                assert getattr(module, name) is value

    def test_the_version_is_a_literal(self) -> None:
        tree = source_of("")
        (value,) = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
        ]
        assert ast.literal_eval(value) == async_pipeline.__version__
        assert int(async_pipeline.__version__.split(".")[0]) >= 2

    def test_types_are_shipped(self) -> None:
        assert (PACKAGE / "py.typed").is_file()
