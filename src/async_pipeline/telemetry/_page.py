"""The page that a report is: one file of HTML with all that it needs, and nothing that runs."""

import unicodedata
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from html import escape
from typing import Any

from ..draw import to_tree
from ..types import Part, Structure, structure_of
from ._facts import Facts, Group, Groups, Run, Sample, Scale, Span, Tally, Timeline

__all__ = ["page_of"]


def page_of(facts: Facts, pipeline: Any = None) -> Iterator[str]:
    """Return the page, in pieces; ``pipeline`` is any step whose picture is to be on it, or ``None``."""
    names = [part.pipeline for part in facts.parts if part.stage is None]
    if pipeline is not None and not names:
        names = [pipeline.name]
    title = _listed(names) or "No runs"
    yield from _head(title)
    yield f"<h1>{title}</h1>\n<p class=muted>{_written(facts)}</p>\n"
    if facts.total.started:
        yield from _section("totals", "Runs", _tiles(facts))
        yield from _section("throughput", "Throughput", _throughput(facts.timeline))
        yield from _section("stages", "Stages", _stages(facts))
        yield from _section("errors", "Errors", _errors(facts.errors))
        yield from _section("retries", "Retries", _retries(facts.retries))
        yield from _section("slowest", "Slowest runs", _slowest(facts.slowest))
    if pipeline is not None:
        yield from _section("picture", "Pipeline", _picture(pipeline))
    yield "</main></body></html>\n"


def _head(title: str) -> Iterator[str]:
    hashed = b64encode(sha256(_STYLE.encode()).digest()).decode()
    # no script, no network and no form, whatever may get through the escaping
    policy = f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield '<meta name="color-scheme" content="light dark">\n'
    yield f"<title>{title} - report</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"


def _section(id: str, heading: str, content: Iterable[str]) -> Iterator[str]:
    yield f'<section id="{id}" aria-labelledby="h-{id}"><h2 id="h-{id}">{heading}</h2>\n'
    yield from content
    yield "</section>\n"


def _written(facts: Facts) -> str:
    running = facts.total.running
    state = "" if facts.total.started else "; nothing has run"
    if running:
        state = f"; {_number(running)} still running"
    return f"Written {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}{state}."


# -- the totals

_SUCCEEDED, _FAILED = ("ok", "finished"), ("error", "timeout")
_KINDS = (*_SUCCEEDED, *_FAILED, "cancelled")


def _tiles(facts: Facts) -> Iterator[str]:
    total = facts.total
    ended, failed = total.latencies.count, total.counted(*_FAILED)
    ended_well, early = total.counted(*_SUCCEEDED), total.counted("finished")
    yield "<dl class=tiles>\n"
    yield _tile("ended", "Ended", _number(ended))
    yield _tile("succeeded", "Succeeded", _number(ended_well), early and f"{_number(early)} early")
    yield _tile("failed", "Failed", _number(failed), failed and f"{_plain(100 * failed / ended)} %")
    yield _tile("cancelled", "Cancelled", _number(total.counted("cancelled")))
    yield _tile("retried", "Retries", _number(total.retries))
    yield _tile("wall", "Wall time", _seconds(facts.seconds))
    yield _tile("rate", "Throughput", f"{_plain(ended / facts.seconds)} per s" if facts.seconds else "-")
    p50, p99 = map(_seconds, map(total.latencies.percentile, (50, 99)))
    yield _tile("p50", "p50 of a run", p50, f"p99 {p99}")
    yield "</dl>\n"


def _tile(id: str, name: str, value: str, remark: str | int = 0) -> str:
    small = f" <small>{remark}</small>" if remark else ""
    return f'<div><dt>{name}</dt><dd><span id="{id}">{value}</span>{small}</dd></div>\n'


# -- the throughput

# the failures stand at the bottom, where a few of them are seen, too
_SERIES = {
    "error": ("failed", _FAILED),
    "cancelled": ("cancelled", ("cancelled",)),
    "ok": ("succeeded", _SUCCEEDED),
}
_FEWEST = 24  # bars for which there is room


def _throughput(timeline: Timeline) -> Iterator[str]:
    if not timeline.bars:
        yield "<p>No run has ended yet.</p>\n"
        return
    width, columns = timeline.width, max(len(timeline.bars), _FEWEST)
    peak = max(sum(bar.values()) for bar in timeline.bars)
    about = f"Runs that ended in each {_seconds(width)}, at most {_number(peak)}."
    yield f'<p>{about}</p>\n<svg class=chart viewBox="0 0 {columns} 100" preserveAspectRatio=none'
    yield f' role=img aria-label="{about}">'
    for index, bar in enumerate(timeline.bars):
        yield _bar(index, bar, width, peak)
    yield f"</svg>\n<p class=axis><span>0 s</span><span>{_seconds(columns * width)}</span></p>\n"
    yield f"<p>{' '.join(_dot(kind, name) for kind, (name, _) in reversed(_SERIES.items()))}</p>\n"


def _bar(index: int, bar: Mapping[str, int], width: float, peak: int) -> str:
    told, drawn, top = [], [], 100.0
    for kind, (name, outcomes) in _SERIES.items():
        number = sum(bar.get(outcome, 0) for outcome in outcomes)
        if number:
            height = 100 * number / peak
            top -= height
            told.append(f"{_number(number)} {name}")
            drawn.append(
                f'<rect class={kind} x="{index}.05" y="{top:.4g}" width=".9" height="{height:.4g}"/>'
            )
    title = f"{_seconds(index * width)} to {_seconds((index + 1) * width)}: {', '.join(told)}"
    return f"<g><title>{title}</title>{''.join(drawn)}</g>" if drawn else ""


# -- the stages

_DEEPEST = 4  # how far the name of a stage is indented at most


def _stages(facts: Facts) -> Iterator[str]:
    first, last = map(_seconds, facts.scale.ends)
    axis = f"Latency<span class=axis><span>{first}</span><span>{last}</span></span>"
    yield from _table("stages", "Stage", "Ended", "Outcomes", "Retries", "p50", "p90", "p99", "max", axis)
    for pipeline in dict.fromkeys(part.pipeline for part in facts.parts):
        yield "<tbody>\n"
        for part in _as_tree([part for part in facts.parts if part.pipeline == pipeline]):
            yield _stage(part, facts.scale)
        yield "</tbody>\n"
    if facts.others.started:
        yield f"<tbody>\n{_stage(facts.others, facts.scale, 'all others')}</tbody>\n"
    yield "</table></div>\n<p class=muted>The latency of a stage is that of all its attempts, with the waits "
    yield "between them, however it ended. Percentiles are within 1 %. The histograms share a logarithmic "
    yield "axis.</p>\n"


def _as_tree(parts: Sequence[Tally]) -> list[Tally]:
    """The parts as they began, but each below what it is inside of."""
    places = {part.stage: place for place, part in enumerate(parts)}

    def places_above(part: Tally) -> list[int]:
        names = [] if part.stage is None else part.stage.split("/")
        paths = ("/".join(names[:depth]) for depth in range(1, len(names) + 1))
        return [places[path] for path in paths if path in places]

    return sorted(parts, key=places_above)


def _stage(part: Tally, scale: Scale, title: str = "") -> str:
    told = [_dot(kind, f"{_number(part.outcomes[kind])} {kind}") for kind in _KINDS if kind in part.outcomes]
    if part.handled:
        told.append(f"<small>{_number(part.handled)} of them by on_error</small>")
    if part.running:
        told.append(_dot("running", f"{_number(part.running)} running"))
    latencies = part.latencies
    seconds = (*map(latencies.percentile, (50, 90, 99)), latencies.longest)
    cells = (_number(latencies.count), " ".join(told), _number(part.retries), *map(_seconds, seconds))
    name = title or _name(part.pipeline if part.stage is None else part.stage)
    depth = 0 if part.stage is None else min(1 + part.stage.count("/"), _DEEPEST)
    row = "".join(f"<td>{cell}</td>" for cell in (*cells, _histogram(scale.bars(latencies))))
    return f'<tr><th scope=row class="d{depth}">{name}</th>{row}</tr>\n'


def _histogram(heights: Sequence[int]) -> str:
    highest = max(heights)
    # what is there at all is seen
    drawn = "".join(
        f"M{x} 20v-{max(1, round(20 * height / highest))}h.9V20z"
        for x, height in enumerate(heights)
        if height
    )
    box = f'viewBox="0 0 {len(heights)} 20" preserveAspectRatio=none'
    return f'<svg class=histogram {box}><path d="{drawn}"/></svg>'


# -- errors and retries


def _errors(errors: Groups) -> Iterator[str]:
    if not errors.by_key:
        yield "<p>None.</p>\n"
        return
    yield from _table("errors", "Stage", "Type", "Runs")
    for group in _ranked(errors):
        yield _group(group, _number(group.count))
    yield from _end_of_groups(errors, "runs that failed")


def _retries(retries: Groups) -> Iterator[str]:
    if not retries.by_key:
        yield "<p>None.</p>\n"
        return
    yield from _table("retries", "Stage", "Type", "Retries", "Waited")
    for group in _ranked(retries):
        yield _group(group, _number(group.count), _seconds(group.waited))
    yield from _end_of_groups(retries, "retries")


def _ranked(groups: Groups) -> list[Group]:
    return sorted(groups.by_key.values(), key=lambda group: -group.count)


def _group(group: Group, *numbers: str) -> str:
    stage = "<i>none</i>" if group.stage is None else _name(group.stage)
    cells = "".join(f"<td>{cell}</td>" for cell in (_name(group.error_type), *numbers))
    title = f"<th scope=row>{stage} <small>{_name(group.pipeline)}</small></th>"
    samples = f"<td colspan={len(numbers) + 2}><ul>{''.join(map(_sample, group.samples))}</ul></td>"
    return f"<tbody>\n<tr>{title}{cells}</tr>\n<tr>{samples}</tr>\n</tbody>\n"


def _sample(sample: Sample) -> str:
    where = _where(sample.item_index, sample.element)
    item = "" if sample.item is None else f" <code>{_text(sample.item)}</code>"
    return f"<li><small>{where}</small>{item} <bdi dir=ltr>{_text(sample.message)}</bdi></li>"


def _end_of_groups(groups: Groups, what: str) -> Iterator[str]:
    yield "</table></div>\n"
    if groups.others:
        kinds = len(groups.by_key)
        yield f"<p>And {_number(groups.others)} {what} of other kinds than the first {kinds}.</p>\n"
    yield "<p class=muted>Of each kind, the first few are shown, shortened.</p>\n"


# -- the slowest runs


def _slowest(runs: Sequence[Run]) -> Iterator[str]:
    yield "<p class=muted>Those that took longest, with those that are still running among them.</p>\n"
    for rank, run in enumerate(runs):
        yield f"<details{'' if rank else ' open'}><summary>{_run(run)}</summary>\n"
        yield f"<p class=muted>Run {_text(run.run_id)}</p>\n"
        yield from _waterfall(run)
        yield "</details>\n"


def _run(run: Run) -> str:
    outcome = run.outcome or "running"
    error = f" {_name(run.error_type)}" if run.error_type and outcome in _FAILED else ""
    where = _where(run.item_index, ())
    return f"<b>{_seconds(run.duration)}</b> {_name(run.pipeline)} {where} {_dot(outcome, outcome + error)}"


def _waterfall(run: Run) -> Iterator[str]:
    axis = f"<span class=axis><span>0 s</span><span>{_seconds(run.duration)}</span></span>"
    yield f"<table class=waterfall>{_columns('Stage', 'Took', axis)}"
    yield "<tbody>\n"
    for span in sorted(run.spans, key=lambda span: (span.began, span.stage, span.element)):
        yield _span(span, run)
    yield "</tbody></table>\n"
    if run.left_out:
        yield f"<p>And {_number(run.left_out)} shorter stages.</p>\n"


def _span(span: Span, run: Run) -> str:
    outcome = span.outcome or "running"
    scale = 1000 / run.duration if run.duration else 0.0
    x = max(0.0, (span.began - run.began) * scale)
    # what took no time at all is seen, too
    width = max(6.0, span.duration * scale)
    remark = "" if outcome == "ok" else f" {_dot(outcome, outcome)}"
    if span.attempts > 1:
        remark += f" <small>{span.attempts} attempts</small>"
    element = f" <small>{_where(None, span.element)}</small>" if span.element else ""
    bar = f'<rect class={outcome} x="{min(x, 994.0):.4g}" width="{width:.4g}" height="10"/>'
    return (
        f"<tr><th scope=row>{_name(span.stage)}{element}{remark}</th><td>{_seconds(span.duration)}</td>"
        f'<td><svg class=bar viewBox="0 0 1000 10" preserveAspectRatio=none>{bar}</svg></td></tr>\n'
    )


# -- the pipeline's picture

_BOXES = 300  # steps that are drawn
_NESTED = 20  # how deep


class _Alone:
    """A step without those inside it, to be shown as a line of a tree."""

    def __init__(self, name: str, kind: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self._about = Structure(kind, options, ())

    def _structure(self) -> Structure:
        return self._about


def _picture(pipeline: Any) -> Iterator[str]:
    yield "<div class=scroll tabindex=0 role=region aria-labelledby=h-picture>"
    boxes = _Boxes()
    yield from boxes.draw(Part("stage", pipeline.name, pipeline), 0)
    yield "</div>\n"
    if boxes.left_out:
        yield f"<p>And {_number(boxes.left_out)} more, and what is inside them.</p>\n"


class _Boxes:
    """A step as a box, with the steps inside it as boxes in it."""

    def __init__(self) -> None:
        self.drawn = self.left_out = 0

    def draw(self, part: Part, depth: int, role: str = "") -> Iterator[str]:
        self.drawn += 1
        kind, options, parts = structure_of(part.step)
        yield f"<div class=box><p>{role}{_label(part, kind, options)}</p>"
        if parts:
            yield f"<div class={'row' if kind in _BETWEEN else 'column'}>"
            yield from self._inside(kind, parts, depth + 1)
            yield "</div>"
        yield "</div>\n"

    def _inside(self, kind: str, parts: Sequence[Part], depth: int) -> Iterator[str]:
        for index, inner in enumerate(parts):
            yield f"<div class=step>{_BETWEEN.get(kind, '') if index else ''}"
            if self.drawn >= _BOXES or depth >= _NESTED:
                self.left_out += len(parts) - index
                yield "<span>…</span></div>"
                return
            yield from self.draw(inner, depth, _ROLES.get((kind, inner.role), ""))
            yield "</div>"


_BETWEEN = {"pipeline": "<span>→</span>", "fallback": "<span>else</span>"}
_ROLES = {
    ("branch", "predicate"): "if ",
    ("branch", "step"): "then ",
    ("branch", "otherwise"): "otherwise ",
    ("keep", "predicate"): "if ",
}


def _label(part: Part, kind: str, options: Mapping[str, Any]) -> str:
    own = part.step.name  # which the step around it may call by another: parallel(price=ask_bank)
    shown, prefix = (part.name, "") if own in (part.name, kind) else (own, f"{part.name} = ")
    return _text(_cut(prefix + to_tree(_Alone(shown, kind, options)), 2 * _LONGEST))


# -- texts

_JOINERS = "\u200c\u200d"  # of letters in Persian, and of emoji


def _text(text: object) -> str:
    """A text for HTML, with everything that could hide or turn around what is near it as an escape."""
    shown = "".join(ascii(char)[1:-1] if _is_hidden(char) else char for char in str(text))
    return escape(shown)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS


_LONGEST = 200  # characters of a name


def _name(text: object) -> str:
    """A text that does not turn around what is near it, and that may break at slashes and dots."""
    shown = _text(_cut(str(text), _LONGEST)) or "&#39;&#39;"
    return f"<bdi dir=ltr>{shown.replace('/', '/<wbr>').replace('.', '.<wbr>')}</bdi>"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(map(_text, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _dot(kind: str, text: str) -> str:
    return f'<span class="dot {kind}">{text}</span>'


def _where(item_index: int | None, element: tuple[int, ...]) -> str:
    item = "" if item_index is None else f"item {item_index}"
    return ", ".join(filter(None, [item, f"element {'/'.join(map(str, element))}" if element else ""]))


def _number(number: int) -> str:
    return f"{number:,}"


def _plain(number: float) -> str:
    """A number with three digits that count."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


_UNITS = ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (60.0, 1.0, "s"))


def _seconds(seconds: float) -> str:
    for limit, factor, unit in _UNITS:
        if seconds < limit * 0.9995:
            return f"{_plain(seconds * factor)} {unit}" if seconds else "0 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _table(id: str, *columns: str) -> Iterator[str]:
    yield f"<div class=scroll tabindex=0 role=region aria-labelledby=h-{id}><table>{_columns(*columns)}"


def _columns(*columns: str) -> str:
    cells = "".join(f"<th scope=col>{column}</th>" for column in columns)
    return f"<thead><tr>{cells}</tr></thead>\n"


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --card: #f5f6f8; --line: #d5dae0; --text: #1c2024; --muted: #57606a; --focus: #1f5fc4;
  --ok: #3b7ddd; --finished: #16857a; --error: #cf2f2a; --timeout: #c26a00; --cancelled: #848d97;
  --running: #8457c9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1e2226; --line: #363c43; --text: #e4e7ea; --muted: #a3acb5; --focus: #86b4ff;
    --ok: #5b9bf5; --finished: #3fb8aa; --error: #ff6b63; --timeout: #f0a03c; --cancelled: #8b949e;
    --running: #b48cf0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1200px; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
p { margin: .4rem 0; }
small, thead th, dt, .muted, .axis, .step > span {
  color: var(--muted); font-size: .85rem; font-weight: 400;
}
h1, bdi, code, .box p { white-space: pre-wrap; }
code { font: .85em ui-monospace, monospace; background: var(--card); padding: .1em .3em; border-radius: 3px; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .6rem; }
.tiles, dd { margin: 0; }
dd small { display: block; }
.tiles div { background: var(--card); border-radius: 6px; padding: .5rem .6rem; }
dd span { font-size: 1.2rem; font-weight: 600; overflow-wrap: normal; }

svg { display: block; width: 100%; fill: var(--ok); }
.chart { height: 9rem; border-bottom: 1px solid var(--line); }
.histogram { height: 1.75rem; border-bottom: 1px solid var(--line); }
.bar { height: .7rem; background: var(--card); }
.axis { display: flex; justify-content: space-between; margin: 0; }
.ok { --own: var(--ok); }
.finished { --own: var(--finished); }
.error { --own: var(--error); }
.timeout { --own: var(--timeout); }
.cancelled { --own: var(--cancelled); }
.running { --own: var(--running); }
rect { fill: var(--own); }
.dot { margin-right: .75em; white-space: nowrap; }
.dot::before {
  content: ""; display: inline-block; width: .65em; height: .65em; margin-right: .35em; border-radius: 50%;
  background: var(--own);
}

/* a shade at the right where there is more, which the page's colour covers when the end is in sight */
.scroll {
  overflow-x: auto;
  background:
    linear-gradient(to left, var(--page) 60%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll;
}
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; }
table, dd { font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; }
tr:last-child, #stages tr { border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: nowrap; }
tbody th { font-weight: 400; min-width: 5.5rem; }
td { white-space: nowrap; }
td:has(bdi) { white-space: normal; min-width: 5.5rem; }
#stages tbody th { min-width: 10rem; }
#stages td:nth-child(3) { white-space: normal; min-width: 9rem; width: 22%; }
#stages td:last-child { min-width: 11rem; width: 24%; }
td ul { margin: 0; padding-left: 1rem; }
td[colspan] { padding-top: 0; }
.d0 { font-weight: 600; }
.d2 { padding-left: 1.6rem; }
.d3 { padding-left: 2.6rem; }
.d4 { padding-left: 3.6rem; }

details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .4rem .75rem; }
summary { cursor: pointer; }
.waterfall { table-layout: fixed; }
.waterfall tr { border: 0; }
.waterfall th, .waterfall td { padding: .2rem .4rem .2rem 0; min-width: 0; vertical-align: middle; }
.waterfall th:first-child { width: 34%; }
.waterfall th:nth-child(2) { width: 5.5rem; }

.box { border: 1px solid var(--line); border-radius: 6px; background: var(--page); padding: .3rem .6rem; }
.box p { margin: 0; }
.box .box { max-width: 32rem; }
.step { display: flex; gap: .4rem; align-items: center; }
.row, .column {
  display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; padding: .4rem; margin: .3rem 0;
  background: var(--card); border-radius: 4px;
}
.column { flex-direction: column; align-items: flex-start; }
"""
