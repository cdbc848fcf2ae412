"""The operator's calls: lists, actions on many tasks, pause, statistics, metrics, the console."""

import base64
import functools
import hashlib
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bottle

import access
import api
import bulk
import database
import metrics
import openapi
import pool
import process
import stats
import task
import task_list
from dispatcher import Arrivals, Dispatcher
from rules import Row

log = logging.getLogger("operator")

CONSOLE = Path(__file__).with_name("console.html").read_bytes()
DEFAULT_LIMIT, MAX_LIMIT = 50, 1000
# Lists and actions have connections of their own: they crowd nobody but each other.
LIST_CONNECTIONS, ACTION_CONNECTIONS = 3, 2
LIST_OPTIONS = "-c statement_timeout=2000"

PAUSE = "INSERT INTO pause DEFAULT VALUES ON CONFLICT DO NOTHING"
RESUME = "DELETE FROM pause"


def hashes(tag: str) -> str:
    """Return the sources of a Content-Security-Policy that allow what the page has of a tag."""
    contents = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), CONSOLE, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


CONSOLE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
        " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class OperatorApi:
    """The calls and what they need of the producer."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        arrivals: Arrivals,
        counted: metrics.Metrics,
        producer: str,
        on_changed: Callable[[list[Row]], None],
    ) -> None:
        self.dispatcher = dispatcher
        self.arrivals = arrivals
        self.metrics = counted
        self.on_changed = on_changed
        self.stats = stats.Stats(dispatcher, counted, producer)
        self.lists = pool.Pool(LIST_CONNECTIONS, LIST_OPTIONS)
        self.actions = pool.Pool(ACTION_CONNECTIONS)

    def add_routes(self, app: bottle.Bottle) -> None:
        """Serve the calls."""
        app.get("/", callback=self.console)
        app.get("/api/v1/list-tasks", callback=self.list_tasks)
        app.get("/api/v1/get-stats", callback=self.get_stats)
        for action in (bulk.RETRY, bulk.CANCEL):
            callback = functools.partial(self.act, action)
            app.post(f"/api/v1/{action.name}", callback=callback)
        app.post("/api/v1/pause", callback=functools.partial(self.set_pause, PAUSE))
        app.post("/api/v1/resume", callback=functools.partial(self.set_pause, RESUME))
        app.get("/metrics", callback=self.render_metrics)
        app.get("/openapi.json", callback=lambda: api.answer(openapi.DOCUMENT))

    def run(self, stop: threading.Event) -> None:
        """Read statistics for who asks, until stop is set: the body of a thread."""
        self.stats.run(stop)

    def console(self) -> bytes:
        """Answer the console."""
        for name, value in CONSOLE_HEADERS.items():
            bottle.response.set_header(name, value)
        return CONSOLE

    def list_tasks(self) -> bytes:
        """Answer a page of tasks."""
        fields = api.read_form(bottle.request.query_string)
        place = None
        try:
            limit = parse_limit(fields.get("limit"))
            if fields.get("cursor"):
                filter_, place = task_list.decode(fields["cursor"])
                task_list.parse_filter({"status": filter_.status} | fields)  # nothing bad beside it
            else:
                filter_ = task_list.parse_filter(fields)
        except ValueError as error:
            api.refuse(400, str(error))
        find = functools.partial(
            task_list.find,
            filter_=filter_,
            place=place,
            limit=limit,
            columns=task_list.COLUMNS,
        )
        rows, end = self.lists.statement(find)
        next_ = None if end is None else task_list.encode(filter_, end)
        return api.answer({"tasks": [database.as_task(row) for row in rows], "next": next_})

    def act(self, action: bulk.Action) -> bytes:
        """Retry or cancel many tasks."""
        body = api.read_json()
        now = self.actions.statement(database.read_now)
        try:
            request = bulk.parse(body, action, now)
        except ValueError as error:
            api.refuse(400, str(error))
        answer = bulk.run(request, action, self.actions, self.on_changed)
        who = bottle.request.environ["REMOTE_ADDR"]
        what = task.shorten({name: value for name, value in body.items() if name != "taskIds"})
        count = len(request.ids) or "all"
        log.info(
            "%s of %s tasks %s by %s: %d matched, %d changed",
            *(action.name, count, what, who, answer.matched, answer.changed),
        )
        return api.answer(answer._asdict())

    def set_pause(self, statement: str) -> bytes:
        """Pause the dispatch of all producers, or let it go on."""
        self.actions.statement(lambda cursor: cursor.execute(statement))
        since = self.actions.statement(lambda cursor: stats.one(cursor, stats.SELECT_PAUSE)[0])
        who = bottle.request.environ["REMOTE_ADDR"]
        log.warning("dispatch %s by %s", "resumed" if since is None else "paused", who)
        self.stats.forget()
        self.arrivals.look()
        return api.answer({"paused": since is not None, "pausedAt": task.as_iso(since)})

    def get_stats(self) -> bytes:
        """Answer how the service is."""
        read_only = access.is_read_only(bottle.request.environ)
        return api.answer(self.stats.read() | {"readOnly": read_only})

    def render_metrics(self) -> bytes:
        """Answer everything in Prometheus' text format; what the database knows only while it is
        there."""
        try:
            known = self.stats.read()
        except pool.Unavailable as error:
            log.debug("few gauges: %s", process.printable(error))
            known = self.stats.without_database()
        lines = metrics.render(self.metrics)
        lines += metrics.render_gauges(known, self.dispatcher.turn_time())
        bottle.response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        return ("\n".join(lines) + "\n").encode()


def parse_limit(value: Any) -> int:
    """Return the number of tasks of a page; raise ValueError saying what was expected."""
    if value is None:
        return DEFAULT_LIMIT
    if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= MAX_LIMIT):
        raise ValueError(f"limit: expected 1 to {MAX_LIMIT}, got {task.shorten(value)}")
    return int(value)
