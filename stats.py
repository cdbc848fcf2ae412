"""What an operator wants to know of the whole service, read at most once a second for all who ask,
with bounds that hold at any size of the table."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg2.errors

import metrics
import minutes
import pool
import process
import task
from dispatcher import Dispatcher

log = logging.getLogger("stats")

MAX_AGE_SECONDS = 1.0  # of what is told
BUDGET_SECONDS = 0.24  # for all statements together
WAIT_SECONDS = 3.0  # for a database that does not answer, or a machine that is very busy
MOST = 10_000  # counted exactly
SILENT_SECONDS = 60  # a consumer that is silent for longer is gone
NAMED = 20  # of a consumer's tasks
REASONS = 10
RARE = 50  # less than one in so many
VARIABLE = re.compile(r"(?=[\d'\"])")  # where a text begins to name something
STATUSES = ("pending", "delayed", "sent", "success", "error")

COUNT = "SELECT count(*) FROM (SELECT FROM tasks WHERE {} LIMIT %(most)s) AS found"
COUNTS = {
    "pending": COUNT.format("status = 'pending' AND NOT delayed"),
    "delayed": COUNT.format("delayed"),
    "sent": COUNT.format("status = 'sent'"),
    "success": COUNT.format("status = 'success'"),
    "error": COUNT.format("status = 'error'"),
}

# Since when they may run. The first by their random pick are a random sample.
SELECT_AGES = """
SELECT
    extract(epoch FROM now() - min(due_at))::float8,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM now() - due_at)::float8)
FROM (
    SELECT coalesce(run_at, created_at) AS due_at
    FROM tasks
    WHERE status = 'pending' AND NOT delayed
    ORDER BY pick
    LIMIT 1000
) AS sample
"""

SELECT_PAUSE = "SELECT (SELECT since FROM pause)"

SELECT_CONSUMERS = """
SELECT id, host, version, concurrency, busy, started_at, seen_at,
    extract(epoch FROM now() - seen_at)::float8,
    jsonb_array_length(tasks),
    jsonb_path_query_array(tasks, %(first)s::jsonpath)
FROM consumers
WHERE seen_at > now() - make_interval(secs => %(seconds)s)
ORDER BY host, started_at
LIMIT 1000
"""

SELECT_ERRORS = """
SELECT reason, count(*), max(finished_at)
FROM (
    SELECT left(split_part(left(error, 400), E'\\n', 1), 100) AS reason, finished_at
    FROM tasks
    WHERE status = 'error'
    ORDER BY finished_at DESC, id DESC
    LIMIT 1000
) AS last
GROUP BY reason
"""


class Bounded:
    """A cursor whose statements end at a deadline: one trip for each, and nothing of the session
    changes."""

    def __init__(self, cursor: Any, deadline: float) -> None:
        self.cursor = cursor
        self.deadline = deadline  # of time.monotonic()
        self.fetchone = cursor.fetchone

    def execute(self, statement: str, arguments: dict[str, Any] | None = None) -> None:
        """Run a statement; raise QueryCanceled at the deadline."""
        left = max(int((self.deadline - time.monotonic()) * 1000), 1)
        self.cursor.execute(f"SET LOCAL statement_timeout = {left}; {statement}", arguments)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.cursor)


class Stats:
    """The last answer. One thread reads the next one while others wait for it, but not for long."""

    def __init__(self, dispatcher: Dispatcher, counted: metrics.Metrics, producer: str) -> None:
        self.dispatcher = dispatcher
        self.metrics = counted
        self.producer = producer  # a UUID
        self.connections = pool.Pool(1)
        self.changed = threading.Condition()
        self.wanted = False
        self.read_at = -math.inf  # of time.monotonic(), when the last try began
        self.changed_at = -math.inf  # the same: what was read before is not true any more
        self.last: dict[str, Any] = {}
        self.failure = ""

    def read(self) -> dict[str, Any]:
        """Return the answer of get-stats but for what depends on the caller. Raise Unavailable
        without a database, or if that does not answer."""
        with self.changed:
            oldest = max(time.monotonic() - MAX_AGE_SECONDS, self.changed_at)
            if self.read_at < oldest:
                self.wanted = True
                self.changed.notify_all()
                if not self.changed.wait_for(lambda: self.read_at >= oldest, WAIT_SECONDS):
                    raise pool.Unavailable(f"no answer in {WAIT_SECONDS:g} seconds")
            if self.failure:
                raise pool.Unavailable(self.failure)
            return self.last

    def without_database(self) -> dict[str, Any]:
        """Return what metrics.render_gauges() can tell without a database."""
        unknown: dict[str, Any] = dict.fromkeys(("pendingAge", "consumers", "paused"))
        return unknown | {
            "counts": {},
            "queues": self.dispatcher.depths(),
            "version": process.VERSION,
        }

    def forget(self) -> None:
        """Tell nothing any more that was read before now."""
        with self.changed:
            self.changed_at = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Read whenever somebody asks, until stop is set: the body of a thread."""
        while not stop.is_set():
            with self.changed:
                self.changed.wait_for(lambda: self.wanted, process.TURN_SECONDS)
                if not self.wanted:
                    continue
                self.wanted = False
            began, failure = time.monotonic(), ""
            try:
                self.last = self.put_together(self.connections.statement(self.read_parts))
            except pool.Unavailable as error:
                failure = str(error)
            except Exception as error:  # the top of a loop: without it nobody would ever know
                log.exception("the statistics were not read")
                failure = str(error)
            with self.changed:
                self.failure, self.read_at = failure, began
                self.changed.notify_all()

    def read_parts(self, cursor: Any) -> dict[str, Any]:
        """Read each part by a statement of its own; one that takes too long is None."""
        cursor = Bounded(cursor, time.monotonic() + BUDGET_SECONDS)
        readers: dict[str, Callable[[], Any]] = {
            "pause": lambda: one(cursor, SELECT_PAUSE),
            "consumers": lambda: read_consumers(cursor),
            "minutes": lambda: minutes.read(cursor, metrics.KEPT_MINUTES, self.producer),
            "ages": lambda: one(cursor, SELECT_AGES),
            "errors": lambda: read_errors(cursor),
        }
        for status, statement in COUNTS.items():
            readers[status] = lambda statement=statement: one(cursor, statement)[0]  # type: ignore[misc]
        parts: dict[str, Any] = {}
        for name, read in readers.items():
            try:
                parts[name] = read()
            except (psycopg2.errors.QueryCanceled, psycopg2.errors.LockNotAvailable):
                parts[name] = None
                log.debug("%s was not read in time", name)
        return parts

    def put_together(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Return what was read in the form of the API."""
        now = time.time()
        paused, paused_at = None, None
        if parts["pause"] is not None:
            [paused_at] = parts["pause"]
            paused = paused_at is not None
        ages = parts["ages"]
        counted = parts["minutes"]
        if counted is not None:
            with self.metrics.lock:
                for number, minute in self.metrics.minutes.items():
                    counted[number].add(minute)
        return {
            "now": task.as_iso(datetime.now(UTC)),
            "version": process.VERSION,
            "paused": paused,
            "pausedAt": task.as_iso(paused_at),
            "counts": {name: capped(parts[name]) for name in STATUSES},
            "pendingAge": None if ages is None else {"oldest": ages[0], "median": ages[1]},
            "windows": {
                str(count): None if counted is None else minutes.window(counted, now, count)
                for count in (5, 60)
            },
            "minutes": (
                None if counted is None else minutes.chart(counted, now, metrics.KEPT_MINUTES)
            ),
            "queues": self.dispatcher.depths(),
            "consumers": parts["consumers"],
            "errors": parts["errors"],
            "health": self.health(bool(paused)),
        }

    def health(self, paused: bool) -> dict[str, str]:
        """Return what works while the database does."""
        return {
            "database": "ok",
            "broker": self.dispatcher.broker_state,
            "dispatcher": self.dispatcher.state(paused),
        }


def one(cursor: Any, statement: str) -> tuple[Any, ...]:
    """Return the only row of a statement."""
    cursor.execute(statement, {"most": MOST + 1})
    row: tuple[Any, ...] = cursor.fetchone()
    return row


def capped(count: int | None) -> int | str | None:
    """Return a count, or that there are more than are counted."""
    return f"{MOST}+" if count is not None and count > MOST else count


def read_consumers(cursor: Any) -> list[dict[str, Any]]:
    """Return the consumers that were heard of a while ago, and what they run."""
    first = f"$[0 to {NAMED - 1}]"
    cursor.execute(SELECT_CONSUMERS, {"seconds": SILENT_SECONDS, "first": first})
    return [
        {
            "consumer": consumer,
            "host": host,
            "version": version,
            "concurrency": concurrency,
            "busy": busy,
            "startedAt": task.as_iso(started_at),
            "seenAt": task.as_iso(seen_at),
            "silentSeconds": round(max(silence, 0.0), 3),
            "inFlight": count,
            "tasks": [
                each | {"seconds": round(each["seconds"] + max(silence, 0.0), 3)} for each in tasks
            ],
        }
        for (
            consumer, host, version, concurrency, busy, started_at, seen_at, silence, count, tasks
        ) in cursor
    ]  # fmt: skip


def read_errors(cursor: Any) -> list[dict[str, Any]]:
    """Return the most frequent reasons of the last errors, each a prefix of their texts."""
    cursor.execute(SELECT_ERRORS)
    reasons = fold([(reason or "", count, latest) for reason, count, latest in cursor])
    return [
        {"error": reason, "count": count, "latest": task.as_iso(latest)}
        for reason, count, latest in reasons[:REASONS]
    ]


def fold(reasons: list[tuple[str, int, Any]]) -> list[tuple[str, int, Any]]:
    """Return reasons by frequency. If they are too many, the rare ones that differ from a number or
    a quote on are one: texts often name what they are about."""
    if len(reasons) > REASONS:
        rare = sum(count for _, count, _ in reasons) / RARE
        merged: dict[str, tuple[int, Any]] = {}
        for reason, count, latest in reasons:
            prefix = reason if count >= rare else VARIABLE.split(reason, maxsplit=1)[0] or reason
            known = merged.get(prefix, (0, latest))
            merged[prefix] = known[0] + count, max(known[1], latest)
        reasons = [(prefix, *values) for prefix, values in merged.items()]
    return sorted(reasons, key=lambda each: -each[1])
