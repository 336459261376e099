"""The settings of the documentation site; ``python -m sphinx -W docs build/docs`` builds it.

Beyond settings: signatures and types stand as they do in the source; the README, the changelog and the
examples become pages of the site, and links to their files lead there. Nothing is fetched, and nothing is
written elsewhere.
"""

import ast
import builtins
import functools
import importlib.util
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections import abc
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from async_pipeline import __version__  # noqa: E402

project = "async_pipeline"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"async_pipeline {release}"
html_copy_source = html_show_sphinx = html_show_copyright = False

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = False
napoleon_attr_annotations = False  # types_of_attributes() below has them as they are written
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# a reference that leads nowhere is a warning, unless it names what is not ours
nitpicky = True
_PACKAGES = (
    "asyncio|builtins|collections|concurrent|contextlib|contextvars|copy|dask|datetime|distributed|fastapi|"
    "functools|inspect|logging|metrics|opentelemetry|os|pathlib|pickle|prometheus_client|sqlite3|starlette|taskiq|time|trace"
    "|typing"
)
_TYPES = (
    "APIRouter|AbstractAsyncContextManager|AsyncBroker|BackgroundTask|Client|CollectorRegistry|ContextVar|"
    "Executor|PathLike|Request|date|datetime|timedelta|T|_Function|_PipelineT|(async_pipeline.types.)?(First|In|Last|Out)"
)
nitpick_ignore_regex = [
    ("py:.*", rf"({_PACKAGES})\..*"),
    ("py:.*", "|".join([_TYPES, *typing.__all__, *abc.__all__])),
]

# ---- files outside of docs/, as pages

PAGES = {"readme": "README.md", "changelog": "CHANGELOG.md"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def put_files_into_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace what stands in for a file by the file, and let links to files lead to their pages."""
    text = source[0]
    if page in PAGES:
        text = (ROOT / PAGES[page]).read_text(encoding="utf-8")
        app.env.note_dependency(str(ROOT / PAGES[page]))
        text = re.sub(r"\]\(docs/", "](", text)
        text = re.sub(r"\]\((examples/|README.md|CHANGELOG.md)", r"](../\1", text)
    if page == "recipes":
        text += "\n## The programs\n" + "".join(map(_program, EXAMPLES))
    text = re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](#program-\1)", text)
    source[0] = re.sub(r"\]\(\.\./(README|CHANGELOG)\.md", lambda match: f"]({match[1].lower()}.md", text)


def _program(path: Path) -> str:
    return f"""
(program-{path.stem})=
### {path.name}

```{{literalinclude}} ../examples/{path.name}
```
"""


# ---- signatures and types as they stand in the source


def signature_in_source(
    app: Sphinx, what: str, name: str, subject: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Return the signature with the source's names for types; autodoc would spell out each alias."""
    if not signature:
        return None
    is_class, text = isinstance(subject, type), getattr(subject, "__doc__", None) or ""
    if is_class and not re.search(r"^ *(Args|Attributes):", text, re.MULTILINE):
        return "", None  # it takes nothing, or only what makes it knows what it takes
    if getattr(subject, "_is_protocol", False):
        return "", None
    function = subject.__dict__.get("__init__") if is_class else inspect.unwrap(subject)
    if is_class and ("__dataclass_fields__" in subject.__dict__ or "_fields" in subject.__dict__):
        return f"({_with_aliases(_fields(subject), subject)})", None
    if not inspect.isroutine(function):
        return None
    try:
        definition = _definition(getattr(function, "__func__", function))
    except (OSError, TypeError):  # it is not written in Python
        return None
    arguments = definition.args
    first = [*arguments.posonlyargs, *arguments.args][:1]
    if what != "function" and [argument.arg for argument in first] in (["self"], ["cls"]):
        (arguments.posonlyargs or arguments.args).pop(0)
    written = f"({ast.unparse(arguments)})", None if is_class else _written(definition.returns)
    return tuple(part and _with_aliases(part, function) for part in written)  # type: ignore[return-value]


def _fields(subject: type) -> str:
    """What makes an instance of a dataclass or a NamedTuple: its fields, with their defaults."""
    definition = _definition(subject)
    fields = ["*"] * any("kw_only=True" in ast.unparse(decorator) for decorator in definition.decorator_list)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            options = node.value.keywords if isinstance(node.value, ast.Call) else ()
            value = next((option.value for option in options if option.arg == "default"), node.value)
            default = f" = {ast.unparse(value)}" if value is not None else ""
            fields.append(f"{ast.unparse(node.target)}: {ast.unparse(_unquoted(node.annotation))}{default}")
    return ", ".join(fields)


def _definition(subject: Any) -> Any:
    """Parse a function or a class; what is quoted in an annotation counts as if it were not."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(subject)))
    return _Unquoted().visit(tree.body[0])


class _Unquoted(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = _unquoted(node.annotation)
        return node

    def _with_returns(self, node: Any) -> Any:
        node.returns = _unquoted(node.returns)
        return self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = _with_returns  # noqa: N815


def _unquoted(annotation: ast.expr | None) -> ast.expr | None:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation


def _with_aliases(annotation: str, subject: Any) -> str:
    """Replace each alias that is private to the module of the subject by what it stands for."""
    aliases = _aliases_of(subject.__module__)
    return re.sub(r"\b_\w+", lambda match: aliases.get(match[0], match[0]), annotation)


@functools.cache
def _aliases_of(module: str) -> dict[str, str]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp))
    }


def _written(annotation: ast.expr | None) -> str | None:
    return None if annotation is None else ast.unparse(annotation)


def types_of_attributes(
    app: Sphinx, what: str, name: str, subject: Any, options: Any, lines: list[str]
) -> None:
    """Write the type of each attribute that the docstring tells of behind its name."""
    if what not in ("class", "exception"):
        return
    ours = [kind for kind in reversed(subject.__mro__) if kind.__module__.startswith("async_pipeline")]
    types = {name: written for kind in ours for name, written in _attribute_types(kind).items()}
    for number, line in reversed([*enumerate(lines)]):
        match = re.fullmatch(r"\.\. attribute:: (\w+)", line)
        if match and match[1] in types:
            lines.insert(number + 1, f"   :type: {types[match[1]]}")


@functools.cache
def _attribute_types(kind: type) -> dict[str, str]:
    types: dict[str, str] = {}
    for node in _definition(kind).body:
        if isinstance(node, ast.AnnAssign):
            types[ast.unparse(node.target)] = ast.unparse(_unquoted(node.annotation))
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            types |= {arg.arg: ast.unparse(arg.annotation) for arg in _arguments(node) if arg.annotation}
            for child in ast.walk(node):
                if isinstance(child, ast.AnnAssign):
                    types[ast.unparse(child.target).removeprefix("self.")] = ast.unparse(child.annotation)
    return {name: _with_aliases(written, kind) for name, written in types.items()}


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def without_repetition(
    app: Sphinx, what: str, name: str, subject: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of a NamedTuple, which its docstring tells of."""
    return True if (getattr(subject, "__doc__", None) or "").startswith("Alias for field number") else None


def without_private_bases(app: Sphinx, name: str, subject: Any, options: Any, bases: list[Any]) -> None:
    """Show the public ancestors in the place of a private one."""
    shown = [base for kind in bases for base in _public(kind)]
    bases[:] = dict.fromkeys(shown)


def _public(kind: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(kind) or kind
    is_private = origin.__name__.startswith("_") and origin.__module__.startswith("async_pipeline")
    return origin.__bases__ if is_private else (kind,)


_analyze = ModuleAnalyzer.analyze


def _analyze_without_overloads(analyzer: ModuleAnalyzer) -> None:
    """Let autodoc show the one signature with all defaults instead of the overloads for type checkers."""
    _analyze(analyzer)
    analyzer.overloads = {}


ModuleAnalyzer.analyze = _analyze_without_overloads  # type: ignore[method-assign]


class Alias(SphinxDirective):
    """``.. alias:: module.NAME``: a type alias or a constant, as its module writes it, with its docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        value, text = _assignment(*name.rsplit(".", 1))
        is_type = isinstance(value, (ast.Subscript, ast.BinOp, ast.Name))
        lines = [f".. py:{'type' if is_type else 'data'}:: {name}"]
        lines += [f"   :canonical: {ast.unparse(value)}"] * is_type
        return self.parse_text_to_nodes("\n".join([*lines, "", textwrap.indent(text, "   ")]))


def _assignment(module: str, name: str) -> tuple[ast.expr, str]:
    """Find where a module, or the one from which it has the name, assigns to it, and the string below."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    others = [node for block in tree.body if isinstance(block, ast.If) for node in block.orelse]
    statements = [*tree.body, *others, None]
    for node, after in itertools.pairwise(statements):
        if isinstance(node, ast.ImportFrom) and name in [imported.name for imported in node.names]:
            return _assignment(_source_of(node, module), name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in [target.id for target in targets if isinstance(target, ast.Name)]:
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            return node.value, inspect.cleandoc(after.value.value) if is_text else ""
    raise LookupError(f"{module} has no {name}")


def _source_of(node: ast.ImportFrom, module: str) -> str:
    is_package = hasattr(importlib.import_module(module), "__path__")
    package = module if is_package else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


# ---- references to what is documented under another module than it is asked for


def resolve_short_name(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Find a type of ours by its last name alone, as it stands in a signature; only one can have it."""
    name = node.get("reftarget", "").rpartition(".")[2]
    domain = env.domains["py"]
    found = {key for key, entry in domain.objects.items() if key.endswith(f".{name}") and not entry.aliased}
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found.pop(), node, content)


def unlink_builtins(app: Sphinx, doctree: nodes.document) -> None:
    """Keep the ``list`` of an annotation from leading to the ``list`` method of a class here."""
    for node in [*doctree.findall(addnodes.pending_xref)]:
        if node.get("refdomain") == "py" and hasattr(builtins, node["reftarget"]):
            node.replace_self(node.children)


def setup(app: Sphinx) -> None:
    app.add_directive("alias", Alias)
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", put_files_into_the_site)
    app.connect("autodoc-process-signature", signature_in_source)
    app.connect("autodoc-process-docstring", types_of_attributes, priority=600)  # after napoleon
    app.connect("autodoc-process-bases", without_private_bases)
    app.connect("autodoc-skip-member", without_repetition)
    app.connect("doctree-read", unlink_builtins)
    app.connect("missing-reference", resolve_short_name)
