"""Draws the costs as an SVG: a panel for each kind of work, a row for each contender, a mark for a handler.

A mark stands at the median of the rounds, and its line goes from the smallest to the largest. The picture
has a background of its own and follows the reader's colour scheme, so it can be read on any page.
"""

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from .comparison import HANDLERS, KINDS, Comparison, Cost, Costs
from .measure import TIMES

WIDTH, NAMES, RIGHT = 860, 250, 24
ROW, HEAD, AXIS, TOP = 24, 34, 40, 78
MARKS = ("circle", "square", "diamond")

_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328 }
.small { font-size: 12px; fill: #59636e } .head { font-size: 14px; font-weight: 600 }
.ours { font-weight: 700 }
.back { fill: #ffffff; stroke: #d1d9e0 } .band { fill: #f0f3f6 } .grid { stroke: #d1d9e0 }
.hand { stroke: #59636e; stroke-dasharray: 4 3 } .m0 { fill: #0969da; stroke: #0969da }
.m1 { fill: #bc4c00; stroke: #bc4c00 } .m2 { fill: #1a7f37; stroke: #1a7f37 }
.spread { stroke-width: 2; opacity: 0.6 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .small { fill: #9198a1 } .back { fill: #0d1117; stroke: #3d444d }
.band { fill: #1c2128 } .grid { stroke: #3d444d } .hand { stroke: #9198a1 }
.m0 { fill: #4493f8; stroke: #4493f8 } .m1 { fill: #f0883e; stroke: #f0883e }
.m2 { fill: #3fb950; stroke: #3fb950 }
}"""

TITLES = {
    "run": "run: one value through five stages",
    "map": "map: a list of results",
    "stream": "stream: results one by one",
}


class Scale:
    """Places ratios on a logarithmic axis."""

    def __init__(self, costs: Sequence[Cost]) -> None:
        least = min((cost.ratio.least for cost in costs), default=1.0)
        most = max((cost.ratio.most for cost in costs), default=1.0)
        self.low = math.floor(math.log10(min(least, 1.0)) * 2) / 2
        self.high = math.ceil(math.log10(max(most, 2.0)) * 2) / 2

    def x(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return NAMES + part * (WIDTH - NAMES - RIGHT)

    def ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = [step * 10.0**decade for decade in decades for step in (1, 3)]
        return [tick for tick in steps if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]


def draw(comparison: Comparison) -> str:
    """Return the picture as text."""
    scale = Scale(
        [cost for kind in KINDS for each in comparison.costs[kind].values() for cost in each.values()]
    )
    height = TOP + sum(_height(len(comparison.costs[kind])) for kind in KINDS) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-labelledby="title">',
        '<title id="title">Time per item of each library, compared with what is written by hand</title>',
        f"<style>\n{_STYLE}\n</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        *_legend(),
    ]
    top = TOP
    for kind in KINDS:
        parts += _panel(TITLES[kind], comparison.costs[kind], scale, top)
        top += _height(len(comparison.costs[kind]))
    return "\n".join([*parts, "</svg>", ""])


def _height(rows: int) -> int:
    return HEAD + rows * ROW + AXIS


def _legend() -> Iterator[str]:
    yield _text(
        16, 28, f"Time per item, compared with hand-written asyncio (1{TIMES}); less is better", "head"
    )
    x = 16.0
    for number, name in enumerate(HANDLERS):
        yield _mark(number, x + 6, 50)
        label = f"each stage {name}" if number else "trivial stages"
        yield _text(x + 18, 54, label, "small")
        x += 40 + 6.6 * len(label)
    yield _text(x, 54, "line: smallest to largest round; logarithmic scale", "small")


def _panel(title: str, costs: Costs, scale: Scale, top: float) -> Iterator[str]:
    yield _text(16, top + 20, title, "head")
    first, last = top + HEAD, top + HEAD + ROW * len(costs)
    for row in range(0, len(costs), 2):
        yield f'<rect class="band" x="8" y="{first + row * ROW}" width="{WIDTH - 16}" height="{ROW}"/>'
    for tick in scale.ticks():
        x = scale.x(tick)
        kind = "hand" if tick == 1 else "grid"
        yield f'<line class="{kind}" x1="{x:.1f}" y1="{first}" x2="{x:.1f}" y2="{last}"/>'
        yield _text(x, last + 16, f"{tick:g}{TIMES}", "small", "middle")
    for row, (name, each) in enumerate(costs.items()):
        yield from _row(name, each, scale, first + row * ROW + ROW / 2)


def _row(name: str, costs: dict[str, Cost], scale: Scale, y: float) -> Iterator[str]:
    plain = name.replace("**", "").replace("`", "")
    yield _text(16, y + 4, plain, "ours" if plain != name and "**" in name else "")
    for number, handler in enumerate(HANDLERS):
        if handler in costs:
            ratio, lane = costs[handler].ratio, y + (number - 1) * 6
            ends = f'x1="{scale.x(ratio.least):.1f}" y1="{lane}" x2="{scale.x(ratio.most):.1f}" y2="{lane}"'
            yield f'<line class="spread m{number}" {ends}/>'
            tip = f"{plain}, {handler}: {ratio}"
            yield _mark(number, scale.x(ratio.middle), lane, tip)


def _mark(number: int, x: float, y: float, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    shape = {
        "circle": f'circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"',
        "square": f'rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"',
        "diamond": f'path d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5-4.5 4.5-4.5-4.5z"',
    }[MARKS[number]]
    return f'<{shape} class="m{number}">{title}</{shape.split()[0]}>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    styled = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{styled} text-anchor="{anchor}">{escape(text)}</text>'
