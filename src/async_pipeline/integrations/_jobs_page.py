"""The page of the processes and their jobs for a browser: complete as it is, and live with its script."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple
from urllib.parse import quote

__all__ = ["PageProcess", "page", "policy"]


class PageProcess(NamedTuple):
    """A process as the page shows it: ``picture`` is its tree, ``href`` the address of its description."""

    id: str
    title: str
    description: str
    picture: str
    href: str


def policy(nonce: str) -> str:
    """Return the ``Content-Security-Policy`` to send with the page that has the same ``nonce``."""
    return (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page(
    title: str,
    description: str,
    processes: Sequence[PageProcess],
    jobs: Sequence[Mapping[str, Any]],
    *,
    base: str,
    nonce: str,
) -> str:
    """Return the page, as HTML.

    Args:
        title: the heading.
        description: what stands below it; may be empty.
        processes: those that are offered.
        jobs: a statusInfo of OGC API - Processes for each, the newest first. The page's script asks for
            ``{base}/jobs?limit=50`` and shows what is there then, so no more than 50 are of use.
        base: the path at which the routes are, without a slash at the end: ``""`` or ``"/ogc"``.
        nonce: a token that is new for each response, for ``policy``.
    """
    return _PAGE.substitute(
        title=_text(title),
        description=_text(description),
        description_hidden=_hidden(description),
        processes="".join(map(_process, processes)) or "<p>None.</p>",
        jobs="".join(_row(job, base) for job in jobs),
        jobs_hidden=_hidden(jobs),
        none_hidden=_hidden(not jobs),
        blank=_row(_BLANK, base),
        base=escape(base),
        nonce=escape(nonce),
    )


def _process(process: PageProcess) -> str:
    return _PROCESS.substitute(
        id=_text(process.id),
        id_hidden=_hidden(process.id != process.title),
        title=_text(process.title),
        description=_text(process.description),
        description_hidden=_hidden(process.description),
        picture=_text(process.picture),
        href=escape(process.href),
    )


_RESULTS = {"successful": "results", "failed": "error"}
_BLANK = {"jobID": "", "status": ""}  # what the script fills in


def _row(job: Mapping[str, Any], base: str) -> str:
    href = f"{base}/jobs/{_segment(job['jobID'])}"
    process = job.get("processID") or ""
    texts = {
        "id": job["jobID"],
        "process": process,
        "status": job["status"],
        "results": _RESULTS.get(job["status"], ""),
        "percent": f"{job.get('progress', 0)} %",
        "message": job.get("message") or "",
        **{name: _when(name, job.get(name)) for name in ("created", "started", "finished")},
    }
    return _ROW.substitute(
        {name: _text(_cut(text)) for name, text in texts.items()},
        **{f"{name}_hidden": _hidden(text) for name, text in texts.items()},
        href=escape(href),
        process_href=escape(f"{base}/processes/{_segment(process)}"),
        progress=_text(job.get("progress", 0)),
    )


# -- what the script does in the same way


def _segment(id: str) -> str:
    return quote(id, safe="!'()*", errors="replace")


def _when(name: str, time: str | None) -> str:
    return f"{name} " + _TIME.sub(r"\1 \2 UTC", time) if time else ""


_TIME = re.compile(r"^(\S{10})T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)\Z", re.ASCII)
_LONGEST = 300  # characters of what a job brings


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _text(text: object) -> str:
    """A text for HTML, with everything that could hide or turn around what is near it as an escape."""
    return escape("".join(f"\\u{ord(char):04x}" if _is_control(char) else char for char in str(text)))


_KEPT = "\n\t\u200c\u200d"  # the latter are joiners of letters in Persian, and of emoji


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _KEPT


def _hidden(content: object) -> str:
    return "" if content else " hidden"


# the page, a process on it, and the row of a job, which the script copies
_TEMPLATE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style nonce="$nonce">
:root { color-scheme: light dark; --page: light-dark(#fff, #14171a); --text: light-dark(#1c2024, #e4e7ea);
  --card: light-dark(#f5f6f8, #1e2226); --line: light-dark(#d5dae0, #363c43);
  --muted: light-dark(#57606a, #a3acb5); --link: light-dark(#1f5fc4, #86b4ff); }
[hidden] { display: none !important; }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 1.25rem 0; }
header, main { margin: 0 auto; max-width: 1200px; overflow-wrap: anywhere; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 1.25rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; } p { margin: .4rem 0; }
h1, h3, .text, tbody a, tbody span { white-space: pre-wrap; }
a { color: var(--link); } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
small, time, thead, .process, .muted { color: var(--muted); font-size: .85rem; font-weight: 400; }
article { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; padding: .6rem .75rem; }
pre { background: var(--card); font: .85em/1.4 ui-monospace, monospace; margin: .4rem 0 0; padding: .6rem;
  overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; table-layout: fixed; width: 100%; }
th, td { padding: .45rem 1rem .45rem 0; text-align: left; vertical-align: top; }
th:nth-child(2) { width: 8rem; } th:nth-child(4) { width: 17rem; }
tbody tr { --own: var(--muted); border-bottom: 1px solid var(--line); }
[data-status=running] { --own: light-dark(#8457c9, #b48cf0); }
[data-status=successful] { --own: light-dark(#3b7ddd, #5b9bf5); }
[data-status=failed] { --own: light-dark(#cf2f2a, #ff6b63); }
.status::before { color: var(--own); content: "\25CF\A0" / ""; }
.process, .results, .dismiss, time { display: block; }
.dismiss { border: 1px solid var(--muted); border-radius: 4px; font: inherit; font-size: .85rem; }
progress { accent-color: var(--link); max-width: 60%; vertical-align: middle; width: 12rem; }
@media (max-width: 40rem) {
  thead { clip-path: inset(50%); position: absolute; }
  tbody tr { display: grid; grid-template-columns: 1fr auto; padding: .3rem 0; }
  tbody th, tbody td { padding: .15rem 0; }
  td + td { grid-column: 1 / -1; }
}
</style></head>
<body data-base="$base">
<header><h1>$title</h1><p class="text"$description_hidden>$description</p></header>
<main><section aria-labelledby="processes"><h2 id="processes">Processes</h2>
$processes
</section><section aria-labelledby="jobs"><h2 id="jobs" tabindex="-1">Jobs</h2>
<p class="muted">The newest 50 at most. As JSON: <a href="$base/jobs?limit=50">these jobs</a>,
<a href="$base/processes">all processes</a>.<noscript> Reload the page to see how they go on.</noscript></p>
<p id="news" role="status"></p><p id="none"$none_hidden>None.</p>
<table aria-labelledby="jobs"$jobs_hidden><thead><tr><th scope="col">Job</th><th scope="col">Status</th>
<th scope="col">Progress</th><th scope="col">Times</th></tr></thead><tbody>$jobs</tbody></table>
</section></main>
<template>$blank</template>
<script type="module" nonce="$nonce">
const base = document.body.dataset.base, [news, none] = document.querySelectorAll("#news, #none");
const table = document.querySelector("table"), rows = table.tBodies[0], leaving = new Set();
const blank = document.querySelector("template").content.firstElementChild;
let wake = () => {}, lost = "";
const ended = (status) => ["successful", "failed", "dismissed"].includes(status);
const hrefOf = (row) => row.querySelector(".job").getAttribute("href");
const urlOf = (kind, id) => base + kind + encodeURIComponent(id.replace(/\p{Cs}/gu, "?"));
const escaped = (char) => "\\u" + char.codePointAt().toString(16).padStart(4, "0");
const shown = (text) => text.replace(/^(.{299}).{2,}$$/su, "$$1…")
  .replace(/(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, escaped);
const short = (time) => time.replace(/^(\S{10})T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)$$/, "$$1 $$2 UTC");
const set = (node, name, value) => node.getAttribute(name) === value || node.setAttribute(name, value);
const write = (node, text) => node.textContent === text || (node.textContent = text);
function show(row, job) {
  const href = urlOf("/jobs/", job.jobID), { status, processID, progress = 0 } = job;
  const put = (name, text, attribute, value) => {
    const node = row.querySelector("." + name);
    if (!text && node === document.activeElement) row.querySelector(".job").focus();
    write(node, shown(text ?? ""));
    node.toggleAttribute("hidden", !text);
    if (attribute) set(node, attribute, value);
  };
  const label = ended(status) ? "" : leaving.has(href) ? "Dismissing…" : "Dismiss";
  set(row, "data-status", status);
  put("job", job.jobID, "href", href);
  put("process", processID, "href", urlOf("/processes/", processID ?? ""));
  put("status", status);
  put("results", { successful: "results", failed: "error" }[status], "href", href + "/results");
  put("dismiss", label, "aria-label", "Dismiss " + shown(job.jobID));
  put("percent", progress + " %");
  put("message", job.message);
  for (const key of ["created", "started", "finished"]) put(key, job[key] && key + " " + short(job[key]));
  set(row.querySelector("progress"), "value", String(progress));
}
async function ask(url, method = "GET") {
  const how = { method, headers: { Accept: "application/json" }, signal: AbortSignal.timeout(10000) };
  const answer = await fetch(url, { ...how, cache: "no-store" });
  if (!answer.ok) throw new Error("the server answers " + answer.status);
  return answer.json();
}
async function refresh() {
  const found = (await ask(base + "/jobs?limit=50")).jobs, ends = [];
  const old = new Map([...rows.rows].map((row) => [hrefOf(row), row]));
  let next = null;
  for (const job of found.reverse()) {
    const href = urlOf("/jobs/", job.jobID), row = old.get(href) ?? blank.cloneNode(true);
    const { status: was } = row.dataset;
    show(row, job);
    if (!old.delete(href)) rows.insertBefore(row, next);
    else if (was !== job.status && ended(job.status)) ends.push(shown(job.jobID) + ": " + job.status);
    next = row;
  }
  for (const row of old.values()) {
    if (row.contains(document.activeElement)) document.getElementById("jobs").focus();
    row.remove();
  }
  none.toggleAttribute("hidden", found.length > 0);
  table.toggleAttribute("hidden", !found.length);
  if (lost || ends.length) write(news, ends.length > 3 ? ends.length + " jobs have ended" : ends.join(", "));
  lost = "";
  return found.some((job) => !ended(job.status));
}
rows.addEventListener("click", async ({ target }) => {
  const href = hrefOf(target.closest("tr"));
  if (!target.matches(".dismiss") || leaving.has(href)) return;
  leaving.add(href);
  write(target, "Dismissing…");
  try { // of what has ended meanwhile, the results would be removed
    if (!ended((await ask(href)).status)) await ask(href, "DELETE");
  } catch (error) {
    write(news, "Cannot dismiss (" + error.message + ")");
  }
  leaving.delete(href);
  wake();
});
document.addEventListener("visibilitychange", () => wake());
for (;;) {
  const busy = !document.hidden && (await refresh().catch((error) => {
    write(news, lost = "Cannot refresh (" + error.message + "), trying again");
  }));
  await new Promise((done) => {
    wake = done;
    setTimeout(done, busy ? 1000 : 5000);
  });
}
</script></body></html>
---
<article><h3><a href="$href">$title</a> <small$id_hidden>$id</small></h3>
<p class="text"$description_hidden>$description</p>
<pre tabindex="0" role="group" aria-label="$title as a picture">$picture</pre></article>
---
<tr data-status="$status"><th scope="row"><a class="job" href="$href">$id</a>
<a class="process" href="$process_href"$process_hidden>$process</a></th>
<td><span class="status">$status</span> <a class="results" href="$href/results"$results_hidden>$results</a>
<button class="dismiss" type="button" aria-label="Dismiss $id" hidden></button></td>
<td><progress max="100" value="$progress" aria-label="Progress"></progress>
<span class="percent">$percent</span><p class="message text"$message_hidden>$message</p></td>
<td><time class="created">$created</time><time class="started"$started_hidden>$started</time>
<time class="finished"$finished_hidden>$finished</time></td></tr>
"""
_PAGE, _PROCESS, _ROW = map(Template, _TEMPLATE.split("\n---\n"))
