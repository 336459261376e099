"""Pictures of pipelines; that the real mermaid draws them is in integrations/test_mermaid.py."""

import asyncio
import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from async_pipeline import Pipeline, RetryBudget, Stage, branch, each, fallback, keep, parallel, require
from async_pipeline.draw import to_mermaid, to_tree
from async_pipeline.stage import StageOptions


def fetch(value: Any) -> Any:
    raise AssertionError("a picture runs nothing")


parse = split = pass_on = score = is_big = ask_bank = fetch


def named(name: str, **options: Any) -> Stage[Any, Any]:
    return Stage(name, fetch, **options)


def save_default(value: Any, error: Exception) -> None: ...


def is_transient(error: BaseException) -> bool:
    raise AssertionError("a picture runs nothing")


def log(name: str, value: Any) -> None: ...


def log_end(name: str, value: Any, output: Any, error: BaseException | None) -> None: ...


async def trace(next: Any, name: str, value: Any, context: Any) -> Any: ...


class Foreign:
    """A step that is known by the protocol alone."""

    name = "foreign"

    async def run(self, value: Any, /, *, context: Any = None) -> Any: ...


def tree(*lines: str) -> str:
    return "\n".join(lines)


def flowchart(picture: str) -> list[str]:
    """The statements, without their indentation."""
    first, *rest = picture.split("\n")
    assert first == "flowchart TD"
    return [line.strip() for line in rest]


def label(name: str) -> str:
    """What stands between the quotes of a stage's node."""
    [line] = flowchart(to_mermaid(named(name)))
    found = re.fullmatch(r'n0\["([^"]+)"\]', line)
    assert found, line
    return found[1]


class TestWords:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, ""),
            ({"timeout": 2}, ": timeout 2 s"),
            ({"timeout": 2.0}, ": timeout 2 s"),
            ({"timeout": 0.25}, ": timeout 0.25 s"),
            ({"timeout": 1234567.5}, ": timeout 1234567.5 s"),
            ({"retries": 1}, ": 1 retry"),
            ({"retries": 3}, ": 3 retries"),
            ({"retries": 3, "retry_delay": 0.5}, ": 3 retries, delay 0.5 s"),
            ({"retries": 3, "retry_delay": 2, "max_delay": 1}, ": 3 retries, delay 1 s"),
            ({"retries": 3, "retry_delay": 1, "max_delay": 2}, ": 3 retries, delay 1 s"),
            (
                {"retries": 3, "retry_delay": 1, "backoff": "exponential"},
                ": 3 retries, exponential backoff from 1 s",
            ),
            (
                {"retries": 3, "retry_delay": 0.5, "backoff": "exponential", "max_delay": 30, "jitter": 0.5},
                ": 3 retries, exponential backoff from 0.5 s up to 30 s, jitter 0.5",
            ),
            ({"retries": 3, "retry_delay": 1, "jitter": 1}, ": 3 retries, delay 1 s, jitter 1"),
            ({"retries": 3, "retry_on": OSError}, ": 3 retries on OSError"),
            ({"retries": 1, "retry_on": (OSError, TimeoutError)}, ": 1 retry on OSError or TimeoutError"),
            ({"retries": 3, "retry_on": is_transient}, ": 3 retries if is_transient"),
            ({"retries": 3, "retry_budget": RetryBudget()}, ": 3 retries, retry budget"),
            ({"executor": "thread"}, ": in a thread"),
            ({"limiter": asyncio.Semaphore(3)}, ": limiter Semaphore"),
            ({"on_error": save_default}, ": on_error save_default"),
            ({"on_error": partial(save_default)}, ": on_error save_default"),
            ({"on_error": lambda value, error: value}, ": on_error <lambda>"),
            ({"pass_context": False}, ""),
            (
                {"timeout": 2, "retries": 3, "retry_on": OSError, "executor": "thread"},
                ": timeout 2 s, 3 retries on OSError, in a thread",
            ),
        ],
    )
    def test_of_a_stage(self, options: dict[str, Any], words: str) -> None:
        assert to_tree(named("fetch", **options)) == f"fetch{words}"

    def test_of_an_executor(self) -> None:
        with ThreadPoolExecutor() as executor:
            assert to_tree(named("fetch", executor=executor)) == "fetch: in ThreadPoolExecutor"

    @pytest.mark.parametrize(
        "options",
        [
            {"retry_delay": 1.0, "backoff": "exponential", "max_delay": 2.0, "jitter": 0.5},
            {"retry_on": OSError, "retry_budget": RetryBudget()},
        ],
    )
    def test_without_a_retry_none_of_its_options_matters(self, options: dict[str, Any]) -> None:
        assert to_tree(named("fetch", **options)) == "fetch"

    def test_without_a_delay_nothing_of_it_matters(self) -> None:
        options = {"retries": 2, "backoff": "exponential", "max_delay": 2.0, "jitter": 0.5}
        assert to_tree(named("fetch", **options)) == "fetch: 2 retries"

    def test_every_option_is_known(self) -> None:
        given = inspect.getsource(TestWords)
        assert all(f'"{option}"' in given for option in StageOptions.__annotations__)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"before_stage": log}, ": before_stage log"),
            ({"after_stage": log_end}, ": after_stage log_end"),
            ({"middlewares": [trace]}, ": 1 middleware"),
            ({"observers": [print]}, ": 1 observer"),
            ({"observers": [print, repr], "on_hook_error": print}, ": 2 observers, on_hook_error print"),
            ({"middlewares": [trace, trace], "before_stage": log}, ": before_stage log, 2 middlewares"),
        ],
    )
    def test_of_a_pipeline(self, options: dict[str, Any], words: str) -> None:
        assert to_tree(Pipeline([fetch], **options)).split("\n")[0] == f"pipeline{words}"

    @pytest.mark.parametrize(
        ("step", "line"),
        [
            (each(fetch), "each"),
            (each(fetch, 1), "each: at most 1 at a time"),
            (keep(fetch, 20, name="good"), "good (keep): at most 20 at a time"),
            (each(fetch, asyncio.Semaphore(3)), "each: shared semaphore"),
            (require("id", "a\nb"), r"require: needs id, a\nb"),
            (require("id", name="check"), "check (require): needs id"),
            (fallback(fetch), "fallback"),
            (fallback(fetch, on=(OSError, EOFError), name="safe"), "safe (fallback): on OSError or EOFError"),
            (Foreign(), "foreign"),
        ],
    )
    def test_of_other_steps(self, step: Any, line: str) -> None:
        assert to_tree(step).split("\n")[0] == line


ORDERS = Pipeline(
    [
        named("fetch", timeout=2, retries=3, retry_delay=0.5, backoff="exponential", max_delay=30),
        parallel(price=named("ask_bank", executor="thread"), stock=fetch, name="enrich"),
        each(named("score"), 20),
        branch((named("is_big"), named("split")), otherwise=named("pass_on")),
    ],
    name="orders",
    middlewares=[trace, trace],
)


class TestTree:
    def test_the_example_of_the_docstring(self) -> None:
        shown = inspect.getdoc(to_tree) or ""
        assert f">>> print(to_tree(orders))\n{to_tree(ORDERS)}\n" in shown

    def test_is_what_str_gives(self) -> None:
        assert str(ORDERS) == to_tree(ORDERS)

    def test_lines_go_on_where_there_is_more(self) -> None:
        pipeline = Pipeline([each(each(named("a"))), each(named("b"))])
        assert to_tree(pipeline) == tree(
            "pipeline",
            "├─ each",
            "│  └─ each",
            "│     └─ a",
            "└─ each",
            "   └─ b",
        )

    def test_a_kind_is_named_unless_the_name_says_it(self) -> None:
        pipeline = Pipeline([Pipeline([fetch], name="inner"), parallel(a=fetch), parallel(a=fetch, name="b")])
        assert to_tree(pipeline).split("\n") == [
            "pipeline",
            "├─ inner (pipeline)",
            "│  └─ fetch",
            "├─ parallel",
            "│  └─ a",
            "└─ b (parallel)",
            "   └─ a",
        ]

    def test_a_step_of_parallel_is_called_by_its_key(self) -> None:
        step = parallel(
            a=fetch,
            b=named("ask_bank"),
            c=branch((fetch, fetch)),
            d=Pipeline([fetch], name="quotes"),
            e=Pipeline([fetch], name="e"),
            f=Foreign(),
        )
        assert [line for line in to_tree(step).split("\n") if line[0] in "├└"] == [
            "├─ a",
            "├─ b = ask_bank",
            "├─ c (branch)",
            "├─ d = quotes (pipeline)",
            "├─ e (pipeline)",
            "└─ f = foreign",
        ]

    def test_a_branch(self) -> None:
        step = branch((named("is_big", timeout=1), named("split")), (named("is_odd"), each(named("mend"))))
        assert to_tree(step) == tree(
            "branch",
            "├─ if is_big: timeout 1 s",
            "│  └─ split",
            "└─ if is_odd",
            "   └─ each",
            "      └─ mend",
        )

    def test_a_branch_on_the_answer_of_a_pipeline(self) -> None:
        decide = Pipeline([named("measure"), named("compare")], name="is_big")
        step = branch((decide, named("split")), otherwise=each(named("mend")))
        assert to_tree(step) == tree(
            "branch",
            "├─ if is_big (pipeline)",
            "│  ├─ measure",
            "│  └─ compare",
            "├─ then split",
            "└─ otherwise",
            "   └─ each",
            "      └─ mend",
        )

    def test_a_branch_on_the_answer_of_a_branch(self) -> None:
        inner = branch((named("is_odd"), named("is_one")), otherwise=named("is_two"))
        assert to_tree(branch((inner, named("split")))) == tree(
            "branch",
            "├─ if branch",
            "│  ├─ if is_odd",
            "│  │  └─ is_one",
            "│  └─ otherwise",
            "│     └─ is_two",
            "└─ then split",
        )

    def test_keep(self) -> None:
        assert to_tree(keep(named("is_big"))) == tree("keep", "└─ if is_big")

    def test_a_fallback_has_its_alternatives_in_order(self) -> None:
        step = fallback(named("primary"), named("replica"), named("default"), on=OSError)
        assert to_tree(step) == tree("fallback: on OSError", "├─ primary", "├─ replica", "└─ default")

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("two words", "two words"),
            ("é 名前 👩‍👩‍👧 ├─", "é 名前 👩‍👩‍👧 ├─"),
            ('"quoted" <b> `c` #1; \\n', '"quoted" <b> `c` #1; \\n'),
            ("no\N{NO-BREAK SPACE}break", "no\N{NO-BREAK SPACE}break"),
            ("one\ntwo\r\tthree", r"one\ntwo\r\tthree"),
            ("\x1b[31mred\0\x7f\x9b", r"\x1b[31mred\x00\x7f\x9b"),
            ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
            ("\u202eright to left\u2066\ufeff", r"\u202eright to left\u2066\ufeff"),
            ("half \ud800", r"half \ud800"),
            ("", "''"),
        ],
    )
    def test_a_name_can_not_break_it(self, name: str, shown: str) -> None:
        assert to_tree(parallel({name: fetch})) == f"parallel\n└─ {shown}"
        assert to_tree(named(name)) == shown

    def test_any_nesting_is_drawn(self) -> None:
        step: Any = named("innermost")
        for _ in range(1500):
            step = each(step)
        lines = to_tree(step).split("\n")
        assert len(lines) == 1501
        assert lines[-1] == f"{' ' * 3 * 1499}└─ innermost"


class TestFlowchart:
    def test_a_row(self) -> None:
        pipeline = Pipeline([named("fetch", timeout=2, retries=3), named("parse"), named("save")])
        assert to_mermaid(pipeline) == tree(
            "flowchart TD",
            '  n1["fetch<br/>timeout 2 s<br/>3 retries"]',
            '  n2["parse"]',
            '  n3["save"]',
            "  n1 --> n2",
            "  n2 --> n3",
        )

    def test_is_what_the_method_gives(self) -> None:
        assert ORDERS.to_mermaid() == to_mermaid(ORDERS)

    @pytest.mark.parametrize(
        ("options", "title"),
        [({"name": "pages"}, "pages (pipeline)"), ({"middlewares": [trace]}, "pipeline<br/>1 middleware")],
    )
    def test_a_pipeline_with_something_to_tell_has_a_frame(self, options: dict[str, Any], title: str) -> None:
        assert to_mermaid(Pipeline([named("a"), named("b")], **options)) == tree(
            "flowchart TD",
            f'  subgraph n0["{title}"]',
            "    direction TB",
            '    n1["a"]',
            '    n2["b"]',
            "    n1 --> n2",
            "  end",
        )

    def test_one_stage(self) -> None:
        assert flowchart(to_mermaid(named("pipeline"))) == ['n0["pipeline"]']

    def test_a_nested_pipeline_is_linked_as_a_whole(self) -> None:
        inner = Pipeline([named("b"), named("c")], name="inner")
        assert to_mermaid(Pipeline([named("a"), inner, named("d")])) == tree(
            "flowchart TD",
            '  n1["a"]',
            '  subgraph n2["inner (pipeline)"]',
            "    direction TB",
            '    n4["b"]',
            '    n5["c"]',
            "    n4 --> n5",
            "  end",
            '  n3["d"]',
            "  n1 --> n2",
            "  n2 --> n3",
        )

    def test_steps_side_by_side_have_no_arrows(self) -> None:
        step = parallel(a=named("a"), b=named("bank"), name="enrich")
        assert flowchart(to_mermaid(step)) == [
            'subgraph n0["enrich (parallel)"]',
            "direction TB",
            'n1["a"]',
            'n2["b = bank"]',
            "end",
        ]

    def test_each(self) -> None:
        assert flowchart(to_mermaid(each(named("a"), 2))) == [
            'subgraph n0["each<br/>at most 2 at a time"]',
            "direction TB",
            'n1["a"]',
            "end",
        ]

    def test_keep_has_a_diamond(self) -> None:
        assert 'n1{"is_big<br/>timeout 1 s"}' in flowchart(to_mermaid(keep(named("is_big", timeout=1))))

    def test_a_branch_asks_its_predicates_in_order(self) -> None:
        step = branch(
            (named("is_a"), named("a")), (named("is_b"), each(named("b"))), otherwise=named("otherwise")
        )
        assert flowchart(to_mermaid(step)) == [
            'subgraph n0["branch"]',
            "direction TB",
            'n1{"is_a"}',
            'n2["a"]',
            'n3{"is_b"}',
            'subgraph n4["each"]',
            "direction TB",
            'n6["b"]',
            "end",
            'n5["otherwise"]',
            "n1 -->|yes| n2",
            "n1 -->|no| n3",
            "n3 -->|yes| n4",
            "n3 -->|no| n5",
            "end",
        ]

    def test_without_otherwise_the_last_no_is_an_error(self) -> None:
        lines = flowchart(to_mermaid(Pipeline([branch((named("is_a"), named("a"))), named("b")])))
        assert lines[-5:] == [
            "n3 -->|yes| n4",
            'n3 -->|no| n1none(["error: no match"])',
            "end",
            'n2["b"]',
            "n1 --> n2",
        ]

    def test_a_predicate_with_steps_inside_is_a_subgraph(self) -> None:
        decide = Pipeline([named("measure")], name="decide")
        assert flowchart(to_mermaid(branch((decide, named("a")), otherwise=named("b"))))[2:] == [
            'subgraph n1["decide (pipeline)"]',
            "direction TB",
            'n4["measure"]',
            "end",
            'n2["a"]',
            'n3["b"]',
            "n1 -->|yes| n2",
            "n1 -->|no| n3",
            "end",
        ]

    @pytest.mark.parametrize(
        ("options", "arrow"),
        [
            ({}, "on Exception"),
            ({"on": OSError}, "on OSError"),
            ({"on": (OSError, EOFError)}, "on OSError or EOFError"),
        ],
    )
    def test_a_fallback_says_on_its_arrows_what_leads_on(self, options: dict[str, Any], arrow: str) -> None:
        step = fallback(named("a"), named("b"), named("c"), **options)
        assert flowchart(to_mermaid(step)) == [
            'subgraph n0["fallback"]',
            "direction TB",
            'n1["a"]',
            'n2["b"]',
            'n3["c"]',
            f'n1 -.->|"{arrow}"| n2',
            f'n2 -.->|"{arrow}"| n3',
            "end",
        ]

    def test_a_step_that_stands_twice_is_drawn_twice(self) -> None:
        again = named("again")
        assert flowchart(to_mermaid(Pipeline([again, again]))) == [
            'n1["again"]',
            'n2["again"]',
            "n1 --> n2",
        ]

    def test_the_same_pipeline_gives_the_same_text(self) -> None:
        assert to_mermaid(ORDERS) == to_mermaid(ORDERS)

    def test_any_nesting_is_drawn(self) -> None:
        step: Any = named("innermost")
        for _ in range(1500):
            step = Pipeline([step])
        lines = flowchart(to_mermaid(step))
        assert lines.count("end") == 1499
        assert 'n1500["innermost"]' in lines

    @pytest.mark.parametrize(
        ("name", "drawn"),
        [
            ("fetch_page", "fetch_page"),
            ("re-fetch a/b, c (d) = e?", "re-fetch a/b, c (d) = e?"),
            ("0.5 é 名前 👩‍👩‍👧", "0.5 é 名前 👩‍👩‍👧"),
            ('say "x"', "say #34;x#34;"),
            ("#quot; #35;", "#35;quot#59; #35;35#59;"),
            ("<script>&amp;</script>", "#60;script#62;#38;amp#59;#60;/script#62;"),
            ("a[b]{c}|d|", "a#91;b#93;#123;c#125;#124;d#124;"),
            ("`code` *b* ~s~", "#96;code#96; #42;b#42; #126;s#126;"),
            ("__init__", "#95;#95;init#95;#95;"),
            ("_a b_", "#95;a b#95;"),
            ("a _b_", "a #95;b#95;"),
            ("- item", "#45; item"),
            ("1. item", "1#46; item"),
            ("1) item", "1#41; item"),
            ("www.example.org", "www#46;example#46;org"),
            ("www.5.org", "www#46;5#46;org"),
            ("style x:y", "style x#58;y"),
            ("%%{init}%%", "#37;#37;#123;init#125;#37;#37;"),
            ("$$x^2$$", "#36;#8204;#36;x#94;2#36;#8204;#36;"),
            ("a@b + c!", "a#64;b #43; c!"),
            ("ﬂ°°35¶ß", "#64258;#8204;°°35#182;#8204;ß"),
            ("ﬂ ¶", "ﬂ ¶"),
            ("direction LR", "direction#160;LR"),
            (" a  b ", "#160;a #160;b#160;"),
            ("   ", "#160;#160;#160;"),
            ("\N{IDEOGRAPHIC SPACE}a\N{NO-BREAK SPACE}", "#12288;a#160;"),
            ("one\ntwo\tthree", "one#92;#8204;ntwo#92;tthree"),
            ("fa:fa-car fa:car", "fa#58;#8204;fa-car fa#58;car"),
            ("end", "end"),
            ("", "''"),
        ],
    )
    def test_names_are_escaped(self, name: str, drawn: str) -> None:
        assert label(name) == drawn

    def test_words_are_escaped_too(self) -> None:
        async def on_error(value: Any, error: Exception) -> None: ...

        on_error.__name__ = '<"'
        assert flowchart(to_mermaid(named("a", on_error=on_error))) == ['n0["a<br/>on_error #60;#34;"]']
        odd = type("a|b", (Exception,), {})
        assert 'n1 -.->|"on a#124;b"| n2' in flowchart(to_mermaid(fallback(fetch, fetch, on=odd)))
