"""What the answers say of jobs and processes, with the URLs by which their client reaches them."""

import datetime as dates
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request

from ..jobs import Job
from ._problems import failed
from ._process import Process

__all__ = ["REL", "Links"]

REL = "http://www.opengis.net/def/rel/ogc/1.0/"
_SAFE = "/~!$&'()*+,;=:@"


def _host(request: Request) -> str:
    host = request.headers.get("host")
    if host:
        return quote(host, safe="[]:@~!$&'()*+,;=%")
    name, port = request.scope.get("server") or ("localhost", None)
    name = f"[{name}]" if ":" in name else name
    return name if port is None else f"{name}:{port}"


class Links:
    """The absolute URLs of one API, as its client sees them."""

    def __init__(self, request: Request, depth: int) -> None:
        """``depth``: how many parts the path of the route has."""
        scope = request.scope
        self.mount = quote(scope.get("root_path", "").rstrip("/"), safe=_SAFE)
        base = quote(scope["path"].rsplit("/", depth)[0], safe=_SAFE)
        # a proxy may have cut off what the application stands below
        self.base = base if f"{base}/".startswith(f"{self.mount}/") else self.mount + base
        self.origin = f"{scope.get('scheme', 'http')}://{_host(request)}"
        self.root = self.origin + self.base

    def link(self, path: str, rel: str, title: str = "", kind: str = "application/json") -> dict[str, str]:
        return {"href": self.root + path, "rel": rel, "type": kind, **({"title": title} if title else {})}

    def job(self, job: Job) -> dict[str, Any]:
        """The statusInfo of a job."""
        path = f"/jobs/{quote(job.id, safe='')}"
        links = [
            self.link(path, "self"),
            self.link(f"{path}/events", "monitor", "changes, as they come", "text/event-stream"),
        ]
        if job.status == "successful":
            links.append(self.link(f"{path}/results", f"{REL}results"))
        message = job.message if job.error is None else failed(job.error, is_waiting=False).content["detail"]
        info = {
            "jobID": job.id,
            "processID": job.pipeline,
            "type": "process",
            "status": job.status,
            "message": message,
            "progress": job.progress,
            "created": _time(job.created),
            "started": _time(job.started),
            "finished": _time(job.finished),
            "updated": _time(job.updated),
            "links": links,
        }
        return {name: value for name, value in info.items() if value is not None}

    def process(self, process: Process, *, is_whole: bool = False) -> dict[str, Any]:
        path = f"/processes/{process.id}"
        links = [self.link(path, "self"), self.link(f"{path}/execution", f"{REL}execute")]
        return {**(process.description() if is_whole else process.summary()), "links": links}

    def pages(self, path: str, query: Mapping[str, Any], limit: int, offset: int, more: bool) -> list[Any]:
        """The links to this page of a list, the next and the one before."""

        def link(rel: str, start: int) -> dict[str, str]:
            return self.link(f"{path}?{urlencode({**query, 'limit': limit, 'offset': start}, True)}", rel)

        found = [link("self", offset)]
        if more:
            found.append(link("next", offset + limit))
        if offset:
            found.append(link("prev", max(0, offset - limit)))
        return found


def _time(moment: dates.datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
