"""The page of the processes and their jobs: what stands in it, and what a real browser makes of it."""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from async_pipeline import Pipeline, Stage, each, parallel
from async_pipeline.draw import to_tree
from async_pipeline.integrations import _jobs_page
from async_pipeline.integrations._jobs_page import PageProcess, page, policy

SCRIPT = Path(__file__).with_name("jobs_page.mjs")
PLAYWRIGHT = os.environ.get("PLAYWRIGHT", "")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PATIENCE = 240  # seconds for what takes some

HOW_TO = (
    "install Node.js 20 or newer and Chromium (apt-get install nodejs npm chromium), then: "
    'npm install --prefix "$HOME/playwright" playwright-core, and name the folder: '
    'export PLAYWRIGHT="$HOME/playwright"; a Chromium elsewhere than /usr/bin: export CHROMIUM=...'
)

Job = Mapping[str, Any]
TIME = "2026-01-02T03:04:05.678901Z"


def job(id: str, status: str, progress: int = 0, **more: Any) -> Job:
    """A statusInfo as the routes answer it."""
    return {
        "jobID": id,
        "processID": "orders",
        "type": "process",
        "status": status,
        "progress": progress,
        "created": TIME,
        "updated": TIME,
        "links": [],
        **more,
    }


def process(id: str, title: str = "", description: str = "", picture: str = "one\n└─ two") -> PageProcess:
    return PageProcess(id, title or id, description, picture, f"/ogc/processes/{id}")


def shown(processes: Sequence[PageProcess] = (), jobs: Sequence[Job] = (), base: str = "/ogc") -> str:
    return page("Title", "About it", processes, jobs, base=base, nonce="n0nce")


# -- without a browser


class Reader(HTMLParser):
    """What stands in a page: its elements, and the texts that are shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html.split("<template>")[0])
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data)

    def links(self) -> list[str | None]:
        return [attrs["href"] for tag, attrs in self.elements if tag == "a"]

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


def test_it_is_one_small_template() -> None:
    lines = _jobs_page._TEMPLATE.splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) <= 110


def test_a_job() -> None:
    at = {"created": TIME, "started": "2026-01-02T03:04:06Z", "finished": "2026-01-02T03:04:07+00:00"}
    read = Reader(shown(jobs=[job("a/b ü", "successful", 100, message="done & dusted", **at)]))
    place = read.texts.index("a/b ü")
    assert [text for text in read.texts[place:] if text.strip()] == [
        "a/b ü",
        "orders",
        "successful",
        "results",
        "100 %",
        "done & dusted",
        "created 2026-01-02 03:04:05 UTC",
        "started 2026-01-02 03:04:06 UTC",
        "finished 2026-01-02 03:04:07 UTC",
    ]
    assert read.links()[-3:] == [
        "/ogc/jobs/a%2Fb%20%C3%BC",
        "/ogc/processes/orders",
        "/ogc/jobs/a%2Fb%20%C3%BC/results",
    ]
    ((_, bar),) = [element for element in read.elements if element[0] == "progress"]
    assert bar == {"max": "100", "value": "100", "aria-label": "Progress"}
    assert ("tr", {"data-status": "successful"}) in read.elements
    assert ("th", {"scope": "row"}) in read.elements


def test_what_a_job_lacks_is_hidden() -> None:
    bare = {"jobID": "x", "status": "accepted", "created": TIME, "processID": None, "message": None}
    read = Reader(shown(jobs=[bare]))
    for name in ("process", "results", "dismiss", "message", "started", "finished"):
        (attrs,) = read.of_class(name)
        assert "hidden" in attrs, name
    for name in ("job", "status", "percent", "created"):
        (attrs,) = read.of_class(name)
        assert "hidden" not in attrs, name
    assert "0 %" in read.texts


@pytest.mark.parametrize(
    ("status", "link"),
    [
        ("accepted", None),
        ("running", None),
        ("dismissed", None),
        ("failed", "error"),
        ("successful", "results"),
    ],
)
def test_what_has_come_of_it_is_linked(status: str, link: str | None) -> None:
    read = Reader(shown(jobs=[job("x", status)]))
    (attrs,) = read.of_class("results")
    assert ("hidden" in attrs) == (link is None)
    assert {"results", "error"} & set(read.texts) == ({link} if link else set())


@pytest.mark.parametrize(
    "time",
    ["2026-01-02T03:04:05.678+02:00", "2026-01-02 03:04:05Z", "soon", f"{TIME} ", "2026-01-02T0٣:04:05Z"],
)
def test_another_time_stays_as_it_is(time: str) -> None:
    assert f"created {time}" in Reader(shown(jobs=[job("x", "running", created=time)])).texts


def test_processes() -> None:
    read = Reader(shown([process("a", "The first", "line\nline", "a\n└─ b"), process("b<")]))
    place = read.texts.index("The first")
    assert read.texts[place : place + 6] == ["The first", "a", "line\nline", "a\n└─ b", "b<", "b<"]
    assert read.links()[:2] == ["/ogc/processes/a", "/ogc/processes/b<"]
    hidden = [tag for tag, attrs in read.elements if "hidden" in attrs]
    assert hidden == ["small", "p", "table"]  # an id that is the title, no description, no jobs


def test_nothing_at_all() -> None:
    read = Reader(page("Empty", "", [], [], base="", nonce="n"))
    assert read.texts.count("None.") == 2
    assert [(tag, attrs.get("id")) for tag, attrs in read.elements if "hidden" in attrs] == [
        ("p", None),
        ("table", None),
    ]
    assert read.links() == ["/jobs?limit=50", "/processes"]


def test_the_policy_lets_in_what_has_the_nonce() -> None:
    html = shown()
    assert re.findall(r"<(?:style|script)[^>]*>", html) == [
        '<style nonce="n0nce">',
        '<script type="module" nonce="n0nce">',
    ]
    assert policy("n0nce").split("; ") == [
        "default-src 'none'",
        "style-src 'nonce-n0nce'",
        "script-src 'nonce-n0nce'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    assert "style=" not in html
    assert not re.search(r"\bon[a-z]+=|https?:|innerHTML|\bsrc=|<link|@import|url\(", html)


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>&amp;$base\0\u202e\ud800 two  spaces"
)
SHOWN = HOSTILE.replace("\0\u202e\ud800", "\\u0000\\u202e\\ud800")


def hostile() -> tuple[list[PageProcess], list[Job]]:
    processes = [
        PageProcess(HOSTILE, HOSTILE, HOSTILE, HOSTILE, '/hostile/processes/"><b>'),
        PageProcess("p" * 200, "w" * 250, "d" * 500, "─" * 300, "/hostile/processes/p"),
    ]
    jobs = [
        job(HOSTILE, "running", 50, processID=HOSTILE, message=HOSTILE, created=HOSTILE),
        job("x" * 300, "failed", 0, processID="y" * 301, message="\U0001f600" * 301, started="2" * 999),
        job(
            "עברית/العربية",
            "accepted",
            processID="a\u200db\u00ad\ufeff\u2028\U000e0001",
            message="\n\t\r x \n",
        ),
        job("!'()*~-_.%", "successful", processID="\ud800", message="\\u0000"),
    ]
    return processes, jobs


def test_hostile_names_are_text() -> None:
    processes, jobs = hostile()
    html = page(HOSTILE, HOSTILE, processes, jobs, base='/"><b>', nonce='"><b>')
    html.encode()
    read = Reader(html)
    assert read.texts.count(SHOWN) == 10
    assert not {"b", "script", "img"} & {tag for tag, _ in read.elements}
    assert '/hostile/processes/"><b>' in read.links()
    assert "/\"><b>/jobs/!'()*~-_.%25/results" in read.links()
    (href,) = {link for link in read.links() if link and "/jobs/%3C" in link and "results" not in link}
    assert unquote(href.rsplit("/", 1)[1]) == HOSTILE.replace("\ud800", "?")
    assert "x" * 300 in read.texts
    assert "y" * 299 + "…" in read.texts
    assert "\U0001f600" * 299 + "…" in read.texts
    assert "a\u200db\\u00ad\\ufeff\\u2028\\ue0001" in read.texts


# -- in a browser


def sample(index: int) -> Any:
    return index


def busy() -> tuple[list[PageProcess], list[Job]]:
    orders = Pipeline(
        [
            Stage(
                "fetch", sample, timeout=2, retries=3, retry_delay=0.5, backoff="exponential", max_delay=30
            ),
            parallel(price=Stage("ask_bank", sample), stock=Stage("stock", sample), name="enrich"),
            each(Stage("score", sample), 20),
        ],
        name="orders",
    )
    processes = [
        process("orders", "Price the orders", "Fetches each order, asks for its price.\n\nTakes a minute."),
        process("thumbnails", picture=to_tree(Pipeline([sample], name="thumbnails"))),
    ]
    processes[0] = processes[0]._replace(picture=to_tree(orders))
    started, finished = "2026-01-02T03:04:06.1Z", "2026-01-02T03:05:07.2Z"
    jobs = [
        job("0f4c1a52-6c1e-4b59-9a51-0c8f6f0b7a11", "accepted"),
        job("9c1de5b7-54a0-4f5c-8f0e-1b2a3c4d5e6f", "running", 40, started=started, message="2 of 5 stages"),
        job("nightly", "successful", 100, started=started, finished=finished, processID="thumbnails"),
        job(
            "77", "failed", 60, started=started, finished=finished, message="ConnectionError in enrich/price"
        ),
        job("78", "dismissed", 60, started=started, finished=finished),
    ]
    return processes, jobs


def many() -> tuple[list[PageProcess], list[Job]]:
    statuses = ["accepted", "running", "successful", "failed", "dismissed"]
    processes = [process(f"process-{index}", description="word " * 50) for index in range(30)]
    jobs = [
        job(f"job-{index}", statuses[index % 5], index, message="m " * 100, started=TIME)
        for index in range(50)
    ]
    return processes, jobs


PAGES = {"busy": busy(), "empty": ([], []), "hostile": hostile(), "many": many()}


class Site(ThreadingHTTPServer):
    """The routes that the page uses: below /busy those of that page, and below /live what is said."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.jobs: dict[str, list[Job]] = {name: jobs for name, (_, jobs) in PAGES.items()}
        self.jobs["live"] = []
        self.mode = ""
        self.changed = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def say(self, jobs: list[Job] | None = None, mode: str | None = None, copy: str = "") -> None:
        if jobs is not None or copy:
            self.jobs["live"] = self.jobs[copy] if copy else jobs or []
        if mode is not None:
            self.mode = mode
            self.changed.set()
            self.changed.clear()


class Routes(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        _, name, *rest = self.path.split("/")
        live = name == "live"
        if rest == [""]:
            self.answer_page(name)
        elif live and self.server.mode == "down":
            self.close_connection = True
        elif live and self.server.mode == "503":
            self.answer(b"{}", status=503)
        elif live and self.server.mode == "garbage":
            self.answer(b"<html>")
        elif rest == ["jobs?limit=50"]:
            self.wait_if("hanging")
            self.answer_json({"jobs": self.server.jobs[name], "links": []})
        else:
            self.answer_json(self.job(rest[1]))

    def do_DELETE(self) -> None:
        self.wait_if("slow")
        found = self.job(self.path.split("/")[-1])
        if found is not None:
            found = {**found, "status": "dismissed"}
            jobs = self.server.jobs["live"]
            self.server.say([found if one["jobID"] == found["jobID"] else one for one in jobs])
        self.answer_json(found)

    def do_POST(self) -> None:
        self.server.say(**json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer_json({})

    def wait_if(self, mode: str) -> None:
        if self.server.mode == mode:
            self.server.changed.wait(PATIENCE)

    def job(self, segment: str) -> Job | None:
        jobs = self.server.jobs["live"]
        return next((one for one in jobs if one["jobID"] == unquote(segment)), None)

    def answer_page(self, name: str) -> None:
        processes, _ = PAGES.get(name, ([], []))
        heading = HOSTILE if name == "hostile" else "Pipelines"
        about = "" if name == "empty" else heading * 3
        html = page(heading, about, processes, self.server.jobs[name], base=f"/{name}", nonce="r4nd0m")
        self.answer(html.encode(), "text/html; charset=utf-8", csp=policy("r4nd0m"))

    def answer_json(self, content: Any) -> None:
        self.answer(json.dumps(content).encode(), status=404 if content is None else 200)

    def answer(self, body: bytes, type: str = "application/json", status: int = 200, csp: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(body)))
        if csp:
            self.send_header("Content-Security-Policy", csp)
        with suppress(ConnectionError):  # a page that is being closed asks once more
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def seen_in_browser(*names: str) -> dict[str, Any]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            done = subprocess.run(
                ["node", str(SCRIPT), str(Path(PLAYWRIGHT).resolve()), CHROMIUM, site.url, ",".join(names)],
                capture_output=True,
                encoding="utf-8",
                timeout=PATIENCE,
            )
        finally:
            site.shutdown()
            thread.join()
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def browser() -> dict[str, Any]:
    """What a browser has seen, of which each test below looks at a part."""
    if not (PLAYWRIGHT and shutil.which("node") and os.path.exists(CHROMIUM)):
        pytest.skip(HOW_TO)
    return seen_in_browser(*PAGES)


TAGS = (
    "html head meta title style body header main section h1 h2 h3 p a article small pre table thead tbody tr "
)
TAGS += "th td span button progress time template noscript script"


@pytest.mark.threads
@pytest.mark.parametrize("name", PAGES)
def test_how_it_looks(browser: dict[str, Any], name: str) -> None:
    looks = browser["looks"][name]
    assert len({(look["colorScheme"], look["width"], look["javaScriptEnabled"]) for look in looks}) == 8
    for look in looks:
        assert look["complaints"] == []
        asked = [f"/{name}/jobs?limit=50"] if look["javaScriptEnabled"] else []
        assert look["requests"] == [f"/{name}/", *asked]
        assert look["sideways"] == 0
        for fault in ("outside", "unseen", "spilling", "broken", "faint"):
            assert look[fault] == [], fault
        assert look["texts"] >= 10
        assert set(look["tags"]) <= set(TAGS.split())
        light = look["colorScheme"] == "light"
        assert look["background"] == ("rgb(255, 255, 255)" if light else "rgb(20, 23, 26)")
        assert look["noscript"] == (not look["javaScriptEnabled"])
        assert look["none"] == (name == "empty")
        assert len(look["rows"]) == len(look["bars"]) == len(PAGES[name][1])


@pytest.mark.threads
def test_it_is_complete_without_javascript(browser: dict[str, Any]) -> None:
    for look in browser["looks"]["busy"]:
        live = look["javaScriptEnabled"]
        assert look["heading"] == look["title"] == "Pipelines"
        assert [texts[0].strip() for texts in look["processes"]] == ["Price the orders orders", "thumbnails"]
        assert [texts[-1] for texts in look["processes"]] == [one.picture for one in PAGES["busy"][0]]
        assert look["bars"] == [0, 40, 100, 60, 60]
        first, second, *_ = look["rows"]
        created, started = "created 2026-01-02 03:04:05 UTC", "started 2026-01-02 03:04:06 UTC"
        dismiss = ["Dismiss"] if live else []
        assert first == [PAGES["busy"][1][0]["jobID"], "orders", "accepted", *dismiss, "0 %", created]
        assert second[2:] == ["running", *dismiss, "40 %", "2 of 5 stages", created, started]
        assert "/busy/jobs/nightly/results" in look["links"]


@pytest.mark.threads
def test_what_a_screen_reader_is_told(browser: dict[str, Any]) -> None:
    for look in browser["looks"]["busy"]:
        told = [line.strip() for line in look["aria"].splitlines()]
        for line in (
            "- banner:",
            "- main:",
            '- region "Processes":',
            '- region "Jobs":',
            '- heading "Pipelines" [level=1]',
            '- heading "Jobs" [level=2]',
            '- table "Jobs":',
            '- rowheader "nightly thumbnails":',
            '- cell "failed error":',
        ):
            assert line in told, line
        headers = [line for line in told if "columnheader" in line]
        assert headers == [f'- columnheader "{name}"' for name in ("Job", "Status", "Progress", "Times")]
        assert told.count("- status") == 1
        assert any(line.startswith('- group "Price the orders as a picture"') for line in told)
        assert sum(line.startswith("- row ") for line in told) == 6


@pytest.mark.threads
def test_hostile_names_are_text_in_a_browser(browser: dict[str, Any]) -> None:
    for look in browser["looks"]["hostile"]:
        assert look["heading"] == SHOWN
        assert look["title"] == " ".join(SHOWN.split())
        title, *texts = look["processes"][0]
        assert title.strip() == SHOWN
        assert texts == [SHOWN, SHOWN]
        id, process, status, *_ = look["rows"][0]
        assert (id, process, status) == (SHOWN, SHOWN, "running")
        assert SHOWN in look["rows"][0][3:]


@pytest.mark.threads
@pytest.mark.parametrize("name", ["busy", "hostile", "many"])
def test_the_script_makes_the_same_rows(browser: dict[str, Any], name: str) -> None:
    copy = browser["copies"][name]
    assert len(copy) == len(PAGES[name][1])
    for look in browser["looks"][name]:
        assert look["html"] == copy


@pytest.mark.threads
def test_where_the_keyboard_leads(browser: dict[str, Any]) -> None:
    stops = browser["tabbed"]
    assert {outline for *_, outline in stops} == {"solid 2px"}
    (first, *_) = PAGES["busy"][1]
    assert [(kind, name) for kind, name, _ in stops[:9]] == [
        ("a", "/ogc/processes/orders"),
        ("pre", "Price the orders as a picture"),
        ("a", "/ogc/processes/thumbnails"),
        ("pre", "thumbnails as a picture"),
        ("a", "/busy/jobs?limit=50"),
        ("a", "/busy/processes"),
        ("a", f"/busy/jobs/{first['jobID']}"),
        ("a", "/busy/processes/orders"),
        ("button", f"Dismiss {first['jobID']}"),
    ]
    assert [kind for kind, *_ in stops].count("button") == 2
    assert len(stops) == 20


@pytest.fixture
def seen(browser: dict[str, Any]) -> dict[str, Any]:
    """What the page showed, and asked since the time before, by what had happened."""
    found: dict[str, Any] = browser["live"]["seen"]
    return found


REFRESH = "GET /live/jobs?limit=50 application/json"


@pytest.mark.threads
class TestLive:
    """One page, while what the server says changes."""

    def test_it_asks_at_once_and_then_each_second(self, seen: dict[str, Any]) -> None:
        assert seen["first"]["asked"] == [REFRESH]
        for name in ("changed", "unchanged", "ended"):
            assert seen[f"just before {name}"]["asked"] == []
            assert seen[name]["asked"] == [REFRESH]

    def test_it_shows_the_new_state(self, seen: dict[str, Any]) -> None:
        assert seen["first"]["rows"] == ["b running Dismiss 10 % a tenth", "a accepted Dismiss 0 %"]
        assert seen["changed"]["rows"] == [
            "c accepted Dismiss 0 %",
            "b running Dismiss 55 % half",
            "a running Dismiss 1 %",
        ]
        assert seen["changed"]["bars"] == [0, 55, 1]

    def test_a_row_stays_and_with_it_focus_and_selection(self, seen: dict[str, Any]) -> None:
        for name in ("just before changed", "changed", "unchanged"):
            assert seen[name]["same"] == [True, True]
            assert seen[name]["focus"] == "/live/jobs/b"
            assert seen[name]["selection"] == "orders"

    def test_what_is_unchanged_is_not_touched(self, seen: dict[str, Any]) -> None:
        assert seen["unchanged"]["changes"] == 0
        assert seen["ended"]["changes"] > 0

    def test_columns_stay_where_they_are(self, seen: dict[str, Any]) -> None:
        assert len({tuple(one["columns"]) for one in seen.values() if one["table"]}) == 1
        assert len(set(seen["first"]["columns"])) == 4

    def test_an_end_is_told_and_focus_is_not_lost_with_a_button(self, seen: dict[str, Any]) -> None:
        assert seen["unchanged"]["news"] == ""
        assert seen["ended"]["news"] == "b: successful"
        assert seen["ended"]["rows"][1] == "b successful results 100 %"
        assert seen["just before ended"]["focus"] == ""
        assert seen["ended"]["focus"] == "/live/jobs/b"

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("down", "Failed to fetch"), ("refused", "the server answers 503"), ("no JSON", "not valid JSON")],
    )
    def test_it_goes_on_after_an_error(self, seen: dict[str, Any], name: str, reason: str) -> None:
        assert seen[name]["asked"] == [REFRESH]
        assert seen[name]["news"].startswith("Cannot refresh (")
        assert seen[name]["news"].endswith("), trying again")
        assert reason in seen[name]["news"]
        assert seen[name]["rows"] == seen["ended"]["rows"]

    def test_it_recovers(self, seen: dict[str, Any]) -> None:
        for name in ("refused", "no JSON", "back"):
            assert seen[f"just before {name}"]["asked"] == []
        assert seen["back"]["news"] == ""
        assert seen["back"]["rows"][2] == "a running Dismiss 2 %"

    def test_it_does_not_wait_for_ever(self, seen: dict[str, Any]) -> None:
        assert seen["just before too late"]["asked"] == [REFRESH]
        assert seen["just before too late"]["news"] == ""
        assert seen["too late"]["asked"] == []
        assert seen["too late"]["news"] == "Cannot refresh (signal timed out), trying again"
        assert seen["in time"]["asked"] == [REFRESH]
        assert seen["in time"]["news"] == ""

    def test_it_pauses_while_nobody_sees_it(self, seen: dict[str, Any]) -> None:
        assert seen["hidden"]["asked"] == []
        assert seen["seen again"]["asked"] == [REFRESH]
        assert seen["seen once more"]["asked"] == [REFRESH]

    def test_what_is_evicted_goes(self, seen: dict[str, Any]) -> None:
        assert seen["just before evicted"]["focus"] == "/live/jobs/a"
        assert seen["evicted"]["rows"] == [f"{id} running Dismiss 50 %" for id in "gfed"]
        assert seen["evicted"]["focus"] == "jobs"
        assert seen["evicted"]["news"] == ""

    def test_many_ends_are_told_as_one(self, seen: dict[str, Any]) -> None:
        assert seen["four ended"]["news"] == "4 jobs have ended"
        assert seen["four ended"]["rows"] == [f"{id} failed error 50 %" for id in "gfed"]

    def test_it_asks_less_while_nothing_runs(self, seen: dict[str, Any]) -> None:
        assert seen["just before idle"]["asked"] == []
        assert seen["idle"]["asked"] == [REFRESH]
        assert seen["idle"]["rows"] == ["h running Dismiss 7 %"]

    def test_dismiss(self, seen: dict[str, Any]) -> None:
        waiting, done = seen["being dismissed"], seen["dismissed"]
        ask = "/live/jobs/h application/json"
        assert waiting["asked"] == [f"GET {ask}", f"DELETE {ask}", REFRESH]  # though pressed twice
        assert waiting["rows"] == ["h running Dismissing… 7 %"]
        assert done["asked"] == [REFRESH]
        assert done["rows"] == ["h dismissed 7 %"]
        assert done["news"] == "h: dismissed"
        assert done["focus"] == "/live/jobs/h"

    def test_what_has_ended_is_not_removed(self, seen: dict[str, Any]) -> None:
        assert seen["ended before"]["asked"] == ["GET /live/jobs/j application/json", REFRESH]
        assert seen["ended before"]["rows"] == ["j successful results 100 %", "i running Dismiss 7 %"]

    def test_what_cannot_be_dismissed_is_told(self, seen: dict[str, Any]) -> None:
        gone = seen["gone before"]
        assert gone["asked"] == ["GET /live/jobs/i application/json", REFRESH]
        assert gone["news"] == "Cannot dismiss (the server answers 404)"
        assert (gone["rows"], gone["table"], gone["none"]) == ([], False, True)
        assert (seen["anew"]["table"], seen["anew"]["none"]) == (True, False)

    def test_dismiss_again(self, seen: dict[str, Any]) -> None:
        ask = "/live/jobs/k application/json"
        assert seen["refused to dismiss"]["asked"] == [f"GET {ask}", REFRESH]
        assert seen["dismissed at last"]["asked"] == [f"GET {ask}", f"DELETE {ask}", REFRESH]
        assert seen["dismissed at last"]["rows"] == [f"k dismissed 0 % {'long ' * 50}"]

    def test_it_asks_nobody_else_and_complains_of_nothing_else(self, browser: dict[str, Any]) -> None:
        live = browser["live"]
        ours = {
            "/live/",
            "/live/jobs?limit=50",
            "/live/jobs/h",
            "/live/jobs/i",
            "/live/jobs/j",
            "/live/jobs/k",
        }
        assert set(live["requests"]) == ours
        assert len(live["complaints"]) == 5
        assert all(complaint.startswith("Failed to load resource") for complaint in live["complaints"])
