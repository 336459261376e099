"""FastAPI's background work as jobs: each has a status, can be cancelled, and none is dropped.

    python examples/background_work.py    # then open http://127.0.0.1:8000/docs, and http://127.0.0.1:8000/api/

It needs ``pip install 'async-pipeline[fastapi]' uvicorn httpx``. ``docs/background-work.md`` sets each case
beside the same one with ``BackgroundTasks``. Of the environment, ``DATA`` is the folder of its files,
``MAIL_SERVER`` that which sends the mail, and ``WEATHER_URL`` that which answers ``/weather?city=Oslo``.
"""

import argparse
import csv
import io
import os
import smtplib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Annotated, Any

import httpx
from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi import Path as InPath
from pydantic import BaseModel, Field, ValidationError

from async_pipeline import DuplicateJob, each, staged
from async_pipeline.integrations.fastapi import processes_router
from async_pipeline.jobs import Job, JobRunner
from async_pipeline.jobs_sqlite import SqliteJobStore

DATA = Path(os.environ.get("DATA", "."))
MAIL_SERVER = os.environ.get("MAIL_SERVER", "localhost:25")
WEATHER_URL = os.environ.get("WEATHER_URL", "http://localhost:8080")

# -- what it works with


class Contact(BaseModel):
    address: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=200)]
    name: Annotated[str, Field(min_length=1, max_length=200)]


def welcome(contact: Contact) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "shop@example.org", contact.address, "Welcome"
    message.set_content(f"Hello {contact.name}!")
    return message


@dataclass(frozen=True)
class Services:
    http: httpx.AsyncClient
    database: Path

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.database)) as connection, connection:
            yield connection


SCHEMA = """
CREATE TABLE IF NOT EXISTS contacts (address TEXT PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (method TEXT, path TEXT, outcome TEXT);
"""


# -- the services, the runner, the lifespan in which they live, and routes for the jobs

jobs = JobRunner(concurrency=20, drain=10, store=SqliteJobStore(DATA / "jobs.db"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with httpx.AsyncClient(base_url=WEATHER_URL) as http, jobs:  # the jobs end before the client closes
        app.state.services = Services(http, DATA / "shop.db")
        with app.state.services.transaction() as connection:
            connection.executescript(SCHEMA)
        yield


async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Injected = Annotated[Services, Depends(get_services)]

app = FastAPI(title="Background work", lifespan=lifespan)
app.include_router(processes_router({}, runner=jobs, title="Background work"), prefix="/api")


def status_of(job: Job) -> str:
    """Where a client asks for the job; it may DELETE that, and read changes at ``/events`` below it."""
    return f"/api/jobs/{job.id}"


# -- an e-mail, and a line in a file


def is_temporary(error: Exception) -> bool:
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code < 500 for code, _ in error.recipients.values())
    return isinstance(error, OSError) and getattr(error, "smtp_code", 0) < 500


@staged(executor="thread", retries=4, retry_delay=0.5, backoff="exponential", retry_on=is_temporary)
def send_mail(message: EmailMessage) -> str:
    with smtplib.SMTP(MAIL_SERVER, timeout=10) as server:
        server.send_message(message)
    return f"sent to {message['To']}"


@staged(executor="thread")
def write_line(line: str) -> None:
    with open(DATA / "log.txt", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@app.post("/signup", status_code=202)
async def sign_up(contact: Contact) -> dict[str, str]:
    mail = await jobs.submit(send_mail, welcome(contact))
    line = await jobs.submit(write_line, f"{contact.address} has signed up")  # whatever becomes of the mail
    return {"mail": status_of(mail), "line": status_of(line)}


# -- a CSV file


@staged(executor="thread", retries=2, retry_on=sqlite3.OperationalError)
def add_contacts(content: bytes, services: Services) -> dict[str, Any]:
    accepted, rejected = [], []
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    for row in rows:
        try:
            accepted.append(Contact.model_validate(row).model_dump())
        except ValidationError as error:
            rejected.append({"line": rows.line_num, "row": row, "errors": error.error_count()})
    with services.transaction() as connection:
        connection.executemany("INSERT OR REPLACE INTO contacts VALUES (:address, :name)", accepted)
    return {"added": len(accepted), "rejected": rejected}


@app.post("/contacts", status_code=202)
async def post_contacts(content: Annotated[bytes, Body(media_type="text/csv")], services: Injected) -> str:
    return status_of(await jobs.submit(add_contacts, content, context=services))


# -- a record of each request in a database


@staged(executor="thread", retries=2, retry_on=sqlite3.OperationalError)
def record(entry: tuple[str, str, str], services: Services) -> None:
    with services.transaction() as connection:
        connection.execute("INSERT INTO requests VALUES (?, ?, ?)", entry)


async def recorded(request: Request, services: Injected) -> AsyncIterator[None]:
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        await jobs.submit(record, (request.method, request.url.path, outcome), context=services)


@app.post("/orders/{item}", dependencies=[Depends(recorded)])
async def order(item: str) -> str:
    if item == "unicorn":
        raise HTTPException(409, "sold out")
    return f"{item} is on its way"


# -- a call of another service


def may_pass(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error
    return isinstance(error, (TimeoutError, httpx.TransportError))


@staged(timeout=2, retries=3, retry_delay=0.5, backoff="exponential", retry_on=may_pass)
async def fetch(city: str, services: Services) -> dict[str, Any]:
    response = await services.http.get("/weather", params={"city": city})
    response.raise_for_status()
    weather: dict[str, Any] = response.json()
    return weather


@app.post("/weather/{city}", status_code=202)
async def post_weather(city: str, services: Injected) -> str:
    return status_of(await jobs.submit(fetch, city, context=services))


# -- progress, of a job whose id the client has chosen

forecast = each(fetch, concurrency=2, name="forecast")


@app.put("/forecasts/{job_id}", status_code=202)
async def put_forecast(
    job_id: Annotated[str, InPath(pattern=r"^[A-Za-z0-9_-]{1,64}$")], cities: list[str], services: Injected
) -> str:
    try:
        job = await jobs.submit(forecast, cities, context=services, job_id=job_id)
    except DuplicateJob:  # the client has asked for it before
        job = await jobs.get(job_id)
    return status_of(job)


# -- what has failed, and why; for those who look after the application


@app.get("/failures")
async def get_failures() -> list[Job]:
    return await jobs.list(status="failed")


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    uvicorn.run(app, port=parser.parse_args().port)
