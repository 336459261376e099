"""The site builds without a warning, the reference has every public name, and no link leads nowhere."""

import functools
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import async_pipeline
from tests.test_readme import FENCED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES]
INSIDE = "reference/inside"  # the page of what the modules use of each other

# ---- the site


class Site(NamedTuple):
    folder: Path
    places: dict[str, list[str]]  # under which names is what is called so
    names: dict[str, str]  # of Python, to their pages
    warnings: str

    def text_of(self, page: str) -> str:
        """What a reader sees of a page, in one line."""
        html = (self.folder / f"{page}.html").read_text(encoding="utf-8")
        return " ".join(re.sub(r"<[^>]*>", "", html).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    pytest.importorskip("sphinx", reason="the site needs the group docs: uv sync --group docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", str(DOCS), str(folder)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    build = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    lines = zlib.decompress((folder / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    entries = [line.split(" ", 4) for line in lines]
    names = {name: uri.partition(".html")[0] for name, role, _, uri, _ in entries if role.startswith("py:")}
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(name.rpartition(".")[2], []).append(name)
    return Site(folder, places, names, build.stderr)


@pytest.mark.threads
def test_it_builds_without_a_warning(site: Site) -> None:
    assert site.warnings == ""


@pytest.mark.threads
def test_signatures_and_types_stand_as_in_the_source(site: Site) -> None:
    core = site.text_of("reference/core")
    assert "class async_pipeline.Stage( name: str, handler: Handler, *, timeout: float | None = None," in core
    assert "retry_on: RetryOn = Exception," in core
    assert (
        "async map( items: Iterable[First] | AsyncIterable[First], concurrency: int | asyncio.Semaphore"
        in core
    )
    assert "type async_pipeline.types.DefaultContext = dict[str, Any]" in core
    outcome = site.text_of("reference/outcome")
    assert "kind: Literal['run_start', 'run_end'" in outcome
    assert "outcome: OutcomeName | None" in outcome
    assert "*, id: str, pipeline: str, status: JobStatus = 'accepted'," in site.text_of("reference/jobs")
    assert "Bases: TimeoutError" in site.text_of("reference/errors")


@pytest.mark.threads
def test_files_outside_of_docs_are_pages(site: Site) -> None:
    assert "What it promises" in site.text_of("readme")
    assert "Keep a Changelog" in site.text_of("changelog")
    programs = site.text_of("recipes")
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in programs
    assert "A census of Python" in programs
    link = r'<a class="reference internal" href="recipes.html#program-fastapi-app">'
    assert re.search(link, (site.folder / "fastapi.html").read_text(encoding="utf-8"))


def public_modules() -> Iterator[Any]:
    yield async_pipeline
    for found in pkgutil.walk_packages(async_pipeline.__path__, "async_pipeline."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


def public_names() -> list[tuple[str, str]]:
    """Each module and name that it exports."""
    return [(module.__name__, name) for module in public_modules() for name in getattr(module, "__all__", ())]


@functools.cache
def value_of(dotted: str) -> Any:
    """What a dotted name means; None if there is nothing of that name."""
    module, _, attributes = dotted.partition(".")
    value: Any = importlib.import_module(module)
    for attribute in filter(None, attributes.split(".")):
        if inspect.ismodule(value) and not hasattr(value, attribute):
            try:
                importlib.import_module(f"{value.__name__}.{attribute}")
            except ImportError:
                return None
        value = getattr(value, attribute, None)
    return value


def documented(site: Site, name: str, value: Any) -> list[str]:
    """Under which names the reference has a value that is called ``name``."""
    return [known for known in site.places.get(name, ()) if value_of(known) is value]


@pytest.mark.threads
def test_every_public_name_is_in_the_reference(site: Site) -> None:
    missing = [
        f"{module}.{name}"
        for module, name in public_names()
        if not documented(site, name, value_of(f"{module}.{name}"))
    ]
    assert missing == []
    assert [name for name in async_pipeline.__all__ if f"async_pipeline.{name}" not in site.names] == []


@pytest.mark.threads
def test_what_a_user_imports_is_not_among_the_names_between_the_modules(site: Site) -> None:
    inside = {name for name, page in site.names.items() if page == INSIDE}
    assert [name for name in async_pipeline.__all__ if f"async_pipeline.{name}" in inside] == []
    assert "async_pipeline.stage.RunState" in inside
    assert site.names["async_pipeline.jobs.JobRunner"] == "reference/jobs"


def public_classes() -> dict[str, Any]:
    values = {f"{module}.{name}": value_of(f"{module}.{name}") for module, name in public_names()}
    return {dotted: value for dotted, value in values.items() if inspect.isclass(value)}


def own_callables(cls: Any) -> dict[str, Any]:
    """The public methods and properties that a class of ours defines itself."""
    members = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
    kinds = (classmethod, staticmethod, property)
    found: dict[str, Any] = {
        name: getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        for name, member in members.items()
        if isinstance(member, kinds) or inspect.isfunction(member)
    }
    return {name: inspect.unwrap(function) for name, function in found.items()}


def promises(cls: Any, name: str) -> str | None:
    """What base classes, and the protocols of ours that a class fulfils, say of a method; None if nothing."""
    protocols = [other for other in public_classes().values() if getattr(other, "_is_protocol", False)]
    fits = [other for other in protocols if all(hasattr(cls, own) for own in own_callables(other))]
    found = [getattr(other, name) for other in {*cls.__mro__[1:], *fits} - {cls} if hasattr(other, name)]
    return "\n".join(method.__doc__ or "" for method in found) if found else None


@pytest.mark.threads
def test_every_public_method_is_in_the_reference(site: Site) -> None:
    missing = []
    for dotted, cls in public_classes().items():
        for name, method in own_callables(cls).items():
            known = documented(site, cls.__name__, cls)
            is_inside = all(site.names[place] == INSIDE for place in known)
            if not any(f"{place}.{name}" in site.names for place in known) and (
                method.__doc__ or not (is_inside or promises(cls, name) is not None)
            ):
                missing.append(f"{dotted}.{name}")
    assert missing == []


def parameters_of(function: Any) -> list[str]:
    """The names of the parameters, without evaluating what they are annotated with."""
    code = inspect.unwrap(function).__code__
    others = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + others]
    return [*names[1:]] if names[:1] in (("self",), ("cls",)) else [*names]


def is_told(name: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


@pytest.mark.threads
def test_docstrings_tell_of_every_parameter_and_attribute(site: Site) -> None:
    """Of what is outside of the page of the names between the modules."""
    untold = []
    for module, name in public_names():
        value = value_of(f"{module}.{name}")
        if all(site.names[place] == INSIDE for place in documented(site, name, value)):
            continue
        if inspect.isroutine(value):
            told = [(f"{module}.{name}", value.__doc__, parameters_of(value))]
        elif inspect.isclass(value):
            told = [(f"{module}.{name}", value.__doc__, fields_of(value))]
            for method, function in own_callables(value).items():
                text = function.__doc__ or (value.__doc__ if is_told(method, value.__doc__ or "") else None)
                promised = promises(value, method)
                if text or promised is None:
                    whole = f"{text}{promised}" if text else None
                    told.append((f"{module}.{name}.{method}", whole, parameters_of(function)))
        else:
            continue
        for where, text, names in told:
            untold += [f"{where}: {each}" for each in names if not is_told(each, text or "")]
            untold += [where] * (text is None)
    assert untold == []


MADE_ELSEWHERE = {"CountedStart", "EndEvent", "FailedAttempt", "Stream"}


def fields_of(cls: Any) -> list[str]:
    """The parameters of a class, and its public attributes that have an annotation."""
    attributes = [name for name in annotations_of(cls) if not name.startswith("_")]
    if cls.__name__ in MADE_ELSEWHERE or typing.is_typeddict(cls) or getattr(cls, "_is_protocol", False):
        return []
    parameters = parameters_of(cls.__init__) if "__init__" in vars(cls) else []
    return sorted({*attributes, *parameters})


def annotations_of(cls: Any) -> Iterable[str]:
    """The names that the body of a class annotates, without evaluating with what."""
    try:
        library: Any = importlib.import_module("annotationlib")  # of Python 3.14
    except ImportError:
        return list(vars(cls).get("__annotations__", ()))
    return list(library.get_annotations(cls, format=library.Format.STRING))


# ---- the command line


def help_of(*command: str) -> str:
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "async_pipeline", *command, "--help"]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.threads
def test_the_page_of_the_command_line_is_what_help_prints() -> None:
    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    listed = re.findall(r"^    (\w+)  +\w", help_of().partition("commands:")[2], flags=re.MULTILINE)
    assert listed, "there are commands"
    sections = re.findall(
        r"^## async-pipeline *(\w*)\n+```text\n(.*?)```", text, flags=re.MULTILINE | re.DOTALL
    )
    assert [command for command, _ in sections] == ["", *listed]
    for command, shown in sections:
        assert shown.strip() == help_of(*command.split()).strip()


# ---- links, as they are followed on GitHub


def without_code(text: str) -> str:
    return FENCED.sub("", text)


def links_of(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8")))


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        numbered = [slug, *(f"{slug}-{number}" for number in range(1, 99))]
        anchors.add(next(anchor for anchor in numbered if anchor not in anchors))
    return anchors


def dead_links(path: Path) -> list[str]:
    dead = []
    for link in links_of(path):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else (path.parent / file).resolve()
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_between_the_files_is_dead(path: Path) -> None:
    assert dead_links(path) == []


def toctree_of(path: Path) -> list[str]:
    blocks = re.findall(
        r"^```\{toctree\}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = [line.strip() for block in blocks for line in block.splitlines() if line and line[0] != ":"]
    return [re.sub(r".*<(.*)>", r"\1", line) + ".md" for line in lines]


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        linked = [link.partition("#")[0] for link in links_of(page) if link.partition("#")[0].endswith(".md")]
        found = {(page.parent / link).resolve() for link in [*linked, *toctree_of(page)]}
        waiting += [path for path in found - reached if path.is_file()]
    assert [str(path.relative_to(ROOT)) for path in PAGES if path not in reached] == []


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "index.md"
    linked = {*links_of(index), *toctree_of(index)}
    assert [page.name for page in DOCS.glob("*.md") if page != index and page.name not in linked] == []
    linked = {*links_of(DOCS / "reference" / "index.md")}
    pages = [page.name for page in (DOCS / "reference").glob("*.md") if page.name != "index.md"]
    assert [name for name in pages if name not in linked] == []


def test_every_example_is_among_the_recipes() -> None:
    linked = links_of(DOCS / "recipes.md")
    examples = [path.name for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in examples if f"../examples/{name}" not in linked] == []


# ---- the functions above, on samples


SAMPLE = """\
# The `run` of a *sample*: a_b

## Twice
## Twice

[here](#twice-1), [there](other.md#a), [![a badge](badge.svg)](https://example.org) (no [link])
[gone](gone.md), [the title](#the-run-of-a-sample-a_b), [not there](other.md#b), [nowhere](#nowhere)

```python
values[0](gone.py)
# no heading
```
"""


def test_dead_links_of_a_sample(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(SAMPLE)
    (tmp_path / "other.md").write_text("# A\n")
    assert anchors_of(page) == {"the-run-of-a-sample-a_b", "twice", "twice-1"}
    assert dead_links(page) == ["badge.svg", "gone.md", "other.md#b", "#nowhere"]
