"""The real mermaid reads and renders what :func:`~async_pipeline.draw.to_mermaid` draws.

It runs in Node.js, on a document that lays nothing out; one process reads many pictures, as its start is
slow.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from async_pipeline import Pipeline, Stage, branch, each, fallback, keep, parallel, require
from async_pipeline.draw import _shown, _view, to_mermaid
from async_pipeline.types import Part, structure_of

SCRIPT = Path(__file__).with_name("mermaid_parse.mjs")
MERMAID = os.environ.get("MERMAID", "")
PATIENCE = 240  # seconds for what takes some

pytestmark = pytest.mark.skipif(
    not (MERMAID and shutil.which("node")),
    reason='install Node.js 20 or newer, then: npm install --prefix "$HOME/mermaid" mermaid jsdom '
    'and name the folder: export MERMAID="$HOME/mermaid"',
)


def read_by_mermaid(texts: Sequence[str]) -> list[Any]:
    done = subprocess.run(
        ["node", str(SCRIPT), str(Path(MERMAID).resolve())],
        input=json.dumps(texts),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout)
    assert len(results) == len(texts)
    return results


def handler(value: Any) -> Any: ...


def named(name: str, **options: Any) -> Stage[Any, Any]:
    return Stage(name, handler, **options)


def log(name: str, value: Any) -> None: ...


def is_worth_it(error: Exception) -> None: ...


def parts_within(part: Part) -> Iterator[Part]:
    """The part itself, and all inside it."""
    yield part
    for inner in structure_of(part.step).parts:
        yield from parts_within(inner)


def is_framed(part: Part) -> bool:
    return bool(structure_of(part.step).parts)


def arrows_of(part: Part) -> int:
    kind, _, parts = structure_of(part.step)
    if kind in ("pipeline", "fallback"):
        return len(parts) - 1
    if kind == "branch":  # two from each predicate, and one of those to the error if there is no otherwise
        return 2 * sum(inner.role == "predicate" for inner in parts)
    return 0


def has_error_node(part: Part) -> bool:
    kind, _, parts = structure_of(part.step)
    return kind == "branch" and parts[-1].role != "otherwise"


def lines_of(part: Part) -> str:
    view = _view(part)
    return "\n".join([view.title, *(() if view.kind == "fallback" else view.words)])


def normal(text: str) -> str:
    # a space that HTML would swallow is drawn as one that it keeps, and mermaid's own marks are parted
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{ZERO WIDTH NON-JOINER}", "")


def texts_of(labels: dict[str, str]) -> list[str]:
    return [normal(label) for label in labels.values()]


def check(pipeline: Any, read: Any) -> None:
    """Compare what mermaid has read and rendered with what the pipeline is made of."""
    assert "error" not in read, read["error"]
    whole, *parts = parts_within(Part("stage", pipeline.name, pipeline))
    arrows = sum(map(arrows_of, [whole, *parts]))
    errors = sum(map(has_error_node, [whole, *parts]))
    if lines_of(whole) != "pipeline":
        parts.append(whole)
    frames, leaves = [*filter(is_framed, parts)], [part for part in parts if not is_framed(part)]
    assert len(read["nodes"]) == len(leaves) + errors
    assert len(read["subgraphs"]) == len(frames)
    assert len(read["edges"]) == read["arrows"] == arrows
    drawn = [*map(normal, map(lines_of, leaves)), *["error: no match"] * errors]
    assert Counter(texts_of(read["labels"])) == Counter(drawn)
    assert Counter(texts_of(read["titles"])) == Counter(map(normal, map(lines_of, frames)))
    assert read["foreign"] == 0  # neither HTML nor Markdown was found in a name
    known = {node["id"] for node in (*read["nodes"], *read["subgraphs"])}
    assert {edge[end] for edge in read["edges"] for end in ("start", "end")} <= known


ODD_NAMES = [
    "",
    " ",
    "  two  spaces  ",
    "\N{IDEOGRAPHIC SPACE}",
    "\N{NO-BREAK SPACE}kept\N{NO-BREAK SPACE}",
    'say "x"',
    "it's",
    "[a] (b) {c} <d> |e| /f/ \\g\\ >h]",
    "((a))",
    "#quot; #35; #lt;script#gt; &lt; &#60; &amp;",
    "#",
    "a;b",
    "`code` ``more``",
    "`**markdown string**`",
    "**bold** *italic* __init__ _private ~~gone~~ a_b_c",
    "# title",
    "- item",
    "+ item",
    "* item",
    "1. item",
    "1) item",
    "2024. item",
    "> quote",
    "---",
    "===",
    "***",
    "a | b",
    "[text](https://example.org)",
    "![image](x.png)",
    "https://example.org www.example.org someone@example.org",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<br/>",
    '<b class="x">',
    "style x:#a;",
    "classDef x:#a;",
    "click a call b()",
    "fa:fa-car",
    "$$x^2$$",
    "%% comment",
    "%%{init: {}}%%",
    "--- title",
    "a --> b",
    "x -.-> y ==> z",
    "end",
    "end end",
    "subgraph",
    "graph",
    "flowchart TD",
    "direction LR",
    "in direction  TB of",
    "a direction\tBT",
    "default",
    "o",
    "x",
    ":::red",
    "@{ shape: rect }",
    "one\ntwo\r\n\tthree",
    "\\n",
    "<br>",
    "\x00\x1b[31m\x7f",
    "\u2028\u2029\x85",
    "\u202ertl\ufeff",
    "\ud800",
    "ﬂ°°35¶ß ﬂ°amp¶ß",
    "__proto__",
    "constructor",
    "é 名前 🎉 👩‍👩‍👧 עברית العربية",
    "n0 n1 n2",
    "word " * 50,
    "long" * 500,
]


def combined(name: str) -> list[Any]:
    """A name in every place where one can stand."""
    return [
        Pipeline([named(name), named(name)], name=name),
        Pipeline([parallel({name: named(f"{name}?")}, name=name), each(named(name), name=name)]),
        Pipeline([branch((named(name), named(name)), otherwise=named(name), name=name), keep(named(name))]),
        Pipeline([fallback(named(name), named(name), name=name), require(name, name, name=name)]),
    ]


def test_odd_names_are_drawn_as_they_are() -> None:
    pipelines = [Pipeline([named(name) for name in ODD_NAMES])]
    pipelines += [Pipeline([parallel(dict.fromkeys(ODD_NAMES, handler))])]
    for pipeline, read in zip(pipelines, read_by_mermaid([*map(to_mermaid, pipelines)]), strict=True):
        check(pipeline, read)
        drawn = texts_of(read["labels"])
        assert set(drawn) == {normal(_shown(name)) for name in ODD_NAMES}


def test_odd_names_are_drawn_as_they_are_in_every_place() -> None:
    pipelines = [pipeline for name in ODD_NAMES[::3] for pipeline in combined(name)]
    for pipeline, read in zip(pipelines, read_by_mermaid([*map(to_mermaid, pipelines)]), strict=True):
        check(pipeline, read)


def test_every_kind_of_step() -> None:
    pipeline = Pipeline(
        [
            named("fetch", timeout=0.5, retries=3, retry_delay=0.5, backoff="exponential", jitter=0.5),
            parallel(price=named("ask_bank"), stock=named("stock"), name="enrich"),
            branch(
                (named("is_big"), Pipeline([named("split"), named("mend")], name="mended")),
                (named("is_odd"), named("even_out")),
                otherwise=each(keep(named("is_good")), 20),
            ),
            fallback(named("primary"), named("replica"), on=OSError),
            branch((named("is_done"), named("end"))),
            require("id"),
        ],
        name="orders",
        before_stage=log,
    )
    [read] = read_by_mermaid([to_mermaid(pipeline)])
    check(pipeline, read)
    names = {id: label.split("\n")[0] for id, label in (read["labels"] | read["titles"]).items()}
    edges = {
        (names[edge["start"]], names[edge["end"]], edge["text"], edge["stroke"]) for edge in read["edges"]
    }
    assert edges == {
        ("fetch", "enrich (parallel)", "", "normal"),
        ("enrich (parallel)", "branch", "", "normal"),
        ("is_big", "mended (pipeline)", "yes", "normal"),
        ("is_big", "is_odd", "no", "normal"),
        ("split", "mend", "", "normal"),
        ("is_odd", "even_out", "yes", "normal"),
        ("is_odd", "each", "no", "normal"),
        ("branch", "fallback", "", "normal"),
        ("primary", "replica", "on OSError", "dotted"),
        ("fallback", "branch", "", "normal"),
        ("is_done", "end", "yes", "normal"),
        ("is_done", "error: no match", "no", "normal"),
        ("branch", "require", "", "normal"),
    }
    inside = {names[graph["id"]]: {names[id] for id in graph["nodes"]} for graph in read["subgraphs"]}
    assert inside["enrich (parallel)"] == {"price = ask_bank", "stock"}
    assert inside["orders (pipeline)"] == {
        "fetch",
        "enrich (parallel)",
        "branch",
        "fallback",
        "require",
    }
    assert {names[node["id"]] for node in read["nodes"] if node["type"] == "diamond"} == {
        "is_big",
        "is_odd",
        "is_good",
        "is_done",
    }


pieces = st.sampled_from([*ODD_NAMES[:-2], *"#;\"`[](){}<>|*_-+=~^$%&@!:.,\\/'", "ﬂ°", "¶ß", "1", "a"])
names = st.lists(pieces, max_size=4).map("".join) | st.text(max_size=12) | st.sampled_from(["a", "b"])
stages = st.builds(
    named,
    names,
    timeout=st.sampled_from([None, 2, 0.5]),
    retries=st.integers(0, 3),
    retry_delay=st.sampled_from([0, 1.5]),
    backoff=st.sampled_from(["fixed", "exponential"]),
    retry_on=st.sampled_from([Exception, (OSError, TimeoutError), is_worth_it]),
)


def composites(steps: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(steps, min_size=1, max_size=3)
    cases = st.lists(st.tuples(steps, steps), min_size=1, max_size=3)
    return st.one_of(
        st.builds(Pipeline, several, name=names),
        st.builds(parallel, st.dictionaries(names, steps, min_size=1, max_size=3), name=names),
        st.builds(each, steps, st.integers(1, 20), name=names),
        st.builds(keep, steps, name=names),
        st.builds(
            lambda cases, otherwise, name: branch(*cases, otherwise=otherwise, name=name),
            cases,
            st.none() | steps,
            names,
        ),
        st.builds(lambda steps, name: fallback(*steps, name=name), several, names),
    )


pipelines = st.recursive(stages | st.builds(require, names, name=names), composites, max_leaves=12).map(
    lambda step: step if isinstance(step, Pipeline) else Pipeline([step, named("last")])
)


@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # to shrink would take a process for each attempt
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(pipelines, min_size=12, max_size=20))
def test_whatever_is_drawn(drawn: list[Any]) -> None:
    for pipeline, read in zip(drawn, read_by_mermaid([*map(to_mermaid, drawn)]), strict=True):
        check(pipeline, read)


def test_the_check_can_fail() -> None:
    good, bad = Pipeline([named("a"), named("b")]), Pipeline([named("a"), named("c")])
    [read, broken] = read_by_mermaid([to_mermaid(good), 'flowchart TD\n  a["unclosed]'])
    check(good, read)
    with pytest.raises(AssertionError):
        check(bad, read)
    with pytest.raises(AssertionError, match="Error"):
        check(good, broken)
