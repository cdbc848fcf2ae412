"""The only door to PostgreSQL: the connection pool and every SQL statement. Only the producer
imports it, and every function that takes a cursor runs inside the caller's transaction."""

import json
import logging
import math
import random
import select
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
import psycopg2.errors
import psycopg2.extensions

import broker
import states

log = logging.getLogger("database")


def dsn(value: str) -> str:
    """Check a libpq URL or key=value string."""
    try:
        psycopg2.extensions.parse_dsn(value)
    except psycopg2.ProgrammingError as error:
        raise ValueError(f"expected postgresql://user:password@host:port/name: {error}") from None
    return value


URL = broker.setting("DATABASE_URL", "postgresql://tasks:tasks@127.0.0.1:5432/tasks", dsn)
CONNECTIONS = 16  # for HTTP and the housekeeper; each lane of the dispatcher has one more
CONNECTION_WAIT_SECONDS = 2  # for a free one, then 503
REPEAT_SECONDS = 5  # a transaction that failed later than this is not tried again
CONNECT_SECONDS = 3  # for each host
REPLY_SECONDS = 15  # longer than statement_timeout: only a frozen server is silent for so long
# The planner must not choose by stale statistics: a queue's table is empty now and full soon.
SERVER_OPTIONS = (
    "-c timezone=UTC -c client_encoding=UTF8 -c lock_timeout=2000 -c statement_timeout=10000"
    " -c idle_in_transaction_session_timeout=60000"
    " -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off"
)
ARCS = 16  # of a claim: enough that one batch is spread evenly, and no slower than one
HOUSEKEEPING_ROWS = 5000
SWEEP_PAGES = 128
SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_LOCK = 0x7461736B  # "task"; two producers that start together would collide in CREATE

TASK_COLUMNS = "id, text, status, attempt, result, error, run_at, created_at, sent_at, finished_at"

INSERT_TASKS = f"""
INSERT INTO tasks (id, text, run_at, held)
SELECT id, text, run_at, coalesce(run_at > now(), false)
FROM unnest(%(ids)s::uuid[], %(texts)s::text[], %(run_ats)s::timestamptz[])
    AS new (id, text, run_at)
ORDER BY id
ON CONFLICT (id) DO NOTHING
RETURNING {TASK_COLUMNS}
"""

PROBE = "SELECT FROM tasks LIMIT 0"

SELECT_TASKS = f"SELECT {TASK_COLUMNS} FROM tasks WHERE id = ANY(%(ids)s::uuid[])"

# Locked by id alone and in id order. A report can come before the dispatcher's COMMIT: a condition
# on attempt or status would be tested against the old snapshot and miss the row, and locking in
# arrival order would deadlock two groups.
LOCK_TASKS = """
SELECT id, status, attempt, failures, starts, start_token, held,
    extract(epoch FROM clock_timestamp() - greatest(sent_at, touched_at))::float8
FROM tasks
WHERE id = ANY(%(ids)s::uuid[])
ORDER BY id
FOR UPDATE
"""

UPDATE_TASKS = """
UPDATE tasks
SET status = new.status,
    attempt = new.attempt,
    failures = new.failures,
    starts = new.starts,
    start_token = new.start_token,
    held = new.held,
    result = CASE WHEN new.status = 'success' THEN new.result END,
    error = CASE WHEN new.status <> 'success' THEN coalesce(new.error, tasks.error) END,
    run_at = coalesce(now() + make_interval(secs => new.delay), tasks.run_at),
    sent_at = CASE WHEN new.status <> 'pending' THEN tasks.sent_at END,
    touched_at = CASE
        WHEN new.attempt <> tasks.attempt THEN NULL
        WHEN new.touched THEN now()
        ELSE tasks.touched_at
    END,
    finished_at = CASE WHEN new.status IN ('success', 'error') THEN now() END
FROM json_to_recordset(%(rows)s) AS new (
    id uuid, status task_status, attempt int, failures int, starts int, start_token text,
    held bool, result text, error text, delay float8, touched bool
)
WHERE tasks.id = new.id
"""

# A sample of all that waits, in one trip: of each arc of the ring of picks the first rows upward.
# The arcs take turns, so that a cut by rows or bytes favours none. Rows locked elsewhere are
# skipped, so that several dispatchers share the work and none waits.
CLAIM_TASKS = """
WITH candidate AS MATERIALIZED (
    SELECT found.*
    FROM unnest(%(lows)s::float8[], %(highs)s::float8[]) AS arc (low, high),
        LATERAL (
            SELECT id, octet_length(text) AS bytes, pick + (pick < %(first)s)::int AS place
            FROM tasks
            WHERE status = 'pending' AND NOT held AND pick >= arc.low AND pick < arc.high
            ORDER BY pick
            LIMIT %(share)s
            FOR UPDATE SKIP LOCKED
        ) AS found
), ordered AS (
    SELECT id, bytes, row_number() OVER (
        PARTITION BY floor((place - %(first)s) * %(arcs)s) ORDER BY place
    ) AS turn
    FROM candidate
), measured AS (
    SELECT
        id,
        row_number() OVER in_turn AS position,
        sum(bytes) OVER in_turn - bytes AS bytes_before
    FROM ordered
    WINDOW in_turn AS (ORDER BY turn, id)
)
UPDATE tasks
SET status = 'sent', sent_at = now()
FROM measured
WHERE tasks.id = measured.id AND position <= %(limit)s AND bytes_before < %(bytes)s
RETURNING tasks.id, tasks.text, tasks.attempt, tasks.touched_at IS NOT NULL
"""

RELEASE_DUE_TASKS = """
UPDATE tasks
SET held = false
WHERE id = ANY(ARRAY(
    SELECT id FROM tasks
    WHERE held AND run_at <= now()
    ORDER BY run_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
"""

# The same attempt again: neither a failure nor a new run if a copy turns up after all.
RESCUE_LOST_TASKS = """
UPDATE tasks
SET status = 'pending', sent_at = NULL
WHERE id = ANY(ARRAY(
    SELECT id FROM tasks
    WHERE status = 'sent'
        AND greatest(sent_at, touched_at) < now() - make_interval(secs => %(seconds)s)
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
"""

COUNT_PAGES = "SELECT pg_relation_size('tasks') / current_setting('block_size')::int"

# By page, as no index on finished_at is worth its upkeep for a sweep that is never in a hurry.
DELETE_FINISHED_TASKS = """
DELETE FROM tasks
WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM tasks
    WHERE ctid >= %(first)s::tid AND ctid < %(end)s::tid
        AND status IN ('success', 'error')
        AND finished_at < now() - make_interval(days => %(days)s)
    FOR UPDATE SKIP LOCKED
))
"""

# Away, full, read-only, over a time limit, or so new that its table is not there yet.
UNAVAILABLE = (
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    psycopg2.InternalError,
    psycopg2.errors.UndefinedTable,
)


class NewTask(NamedTuple):
    """A task to insert; run_at in the future holds it back."""

    id: str
    text: str
    run_at: datetime | None


class Unavailable(Exception):
    """The database cannot do it now; nothing was changed, or nobody can know yet."""


def wait_for_reply(connection: psycopg2.extensions.connection) -> None:
    """Wait until the server has answered: TCP time-outs do not fire for a frozen server whose
    kernel still acknowledges. psycopg2 closes the connection if this raises."""
    poller = select.poll()
    connecting = connection.status == psycopg2.extensions.STATUS_SETUP
    seconds = CONNECT_SECONDS if connecting else REPLY_SECONDS
    deadline = time.monotonic() + seconds
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        reading = state == psycopg2.extensions.POLL_READ
        poller.register(connection.fileno(), select.POLLIN if reading else select.POLLOUT)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise psycopg2.OperationalError(f"no reply in {seconds} seconds")


def hosts(parameters: dict[str, str]) -> list[dict[str, str]]:
    """Return what tells each host of a URL from the others: with a wait callback libpq would wait
    for a silent first one for ever, and never reach the second."""
    lists = {
        name: parameters[name].split(",")
        for name in ("host", "hostaddr", "port")
        if name in parameters
    }
    count = max((len(values) for values in lists.values()), default=1)
    return [
        {name: values[index if len(values) > 1 else 0] for name, values in lists.items()}
        for index in range(count)
    ]


def connect() -> psycopg2.extensions.connection:
    """Connect to the first host that will have us; the URL's own options are honoured."""
    psycopg2.extensions.set_wait_callback(wait_for_reply)
    parameters = psycopg2.extensions.parse_dsn(URL) | {
        "application_name": "tasks-producer",
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    parameters["options"] = f"{SERVER_OPTIONS} {parameters.get('options', '')}"
    reasons = []
    for host in hosts(parameters):
        try:
            return psycopg2.connect(**(parameters | host))
        except psycopg2.OperationalError as error:
            reasons.append(str(error).strip())
    raise psycopg2.OperationalError("; ".join(reasons))


class Pool:
    """Connections kept between requests; a caller waits for a free one, but not for ever."""

    def __init__(self, size: int = CONNECTIONS) -> None:
        self.places = threading.BoundedSemaphore(size)
        self.idle: list[psycopg2.extensions.connection] = []

    def statement(self, work: Callable[[Any], Any]) -> Any:
        """Return work(cursor), whose statements each commit themselves: one trip to the server
        instead of three. The work must be repeatable."""
        return self.transaction(work, autocommit=True)

    def transaction(
        self, work: Callable[[Any], Any], repeatable: bool = True, autocommit: bool = False
    ) -> Any:
        """Return work(cursor), committed. Raise Unavailable if the database cannot do it now.

        A kept connection may have died unnoticed and a deadlock's victim has done nothing wrong, so
        it is tried again; after a COMMIT of unknown outcome only if the work is repeatable.
        """
        if not self.places.acquire(timeout=CONNECTION_WAIT_SECONDS):
            raise Unavailable("all database connections are busy")
        try:
            deadline = time.monotonic() + REPEAT_SECONDS
            while True:
                connection, committing = None, False
                try:
                    connection = self.idle.pop() if self.idle else connect()
                    connection.autocommit = autocommit
                    with connection.cursor() as cursor:
                        result = work(cursor)
                    committing = True
                    connection.commit()
                    self.idle.append(connection)
                    return result
                except UNAVAILABLE as error:
                    lost = connection is not None and connection.closed
                    again = isinstance(error, psycopg2.errors.DeadlockDetected) or (
                        lost and (repeatable or not committing)
                    )
                    self.discard(connection, error)
                    if time.monotonic() > deadline or not again:
                        raise Unavailable(str(error).strip()) from error
        finally:
            self.places.release()

    def discard(self, connection: psycopg2.extensions.connection | None, error: Exception) -> None:
        """Close a connection after an error, and the idle ones if they may be as dead as it is."""
        if connection is None:
            return
        log.debug("connection discarded: %s", error)
        if connection.closed or isinstance(error, psycopg2.errors.ReadOnlySqlTransaction):
            while self.idle:
                self.idle.pop().close()
        connection.close()


def apply_schema(cursor: Any) -> None:
    """Make what of the schema is not there yet."""
    cursor.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
    cursor.execute(SCHEMA.read_text("utf-8"))


def as_task(row: tuple) -> dict[str, Any]:
    """Return a row of TASK_COLUMNS as the JSON object of the API."""
    task_id, text, status, attempt, result, error, *times = row
    run_at, created_at, sent_at, finished_at = map(as_iso, times)
    return {
        "taskId": task_id,
        "text": text,
        "taskStatus": status,
        "attempt": attempt,
        "result": result,
        "error": error,
        "runAt": run_at,
        "createdAt": created_at,
        "sentAt": sent_at,
        "finishedAt": finished_at,
    }


def as_iso(time_: datetime | None) -> str | None:
    """Return a time as ISO 8601 in UTC."""
    return time_ and time_.astimezone(UTC).isoformat().replace("+00:00", "Z")


def select_tasks(cursor: Any, ids: list[str]) -> dict[str, dict]:
    """Return the tasks of these ids that exist, by id."""
    cursor.execute(SELECT_TASKS, {"ids": ids})
    return {row[0]: as_task(row) for row in cursor}


def insert_tasks(cursor: Any, new: Iterable[NewTask]) -> dict[str, dict]:
    """Insert what is not there yet; return all of them by id, the older ones as they are."""
    columns = dict(zip(("ids", "texts", "run_ats"), map(list, zip(*new, strict=True)), strict=True))
    cursor.execute(INSERT_TASKS, columns)
    tasks = {row[0]: as_task(row) for row in cursor}
    missing = [id for id in columns["ids"] if id not in tasks]
    if missing:  # a statement of its own: the first one's snapshot may be older than the rival row
        tasks |= select_tasks(cursor, missing)
    return tasks


def apply_reports(cursor: Any, reports: list[states.Report]) -> list[states.Refusal | None]:
    """Lock the rows, judge every report in order, write what changed; return the verdicts."""
    cursor.execute(LOCK_TASKS, {"ids": list({report.id for report in reports})})
    rows = {row[0]: states.Row(*row) for row in cursor}
    verdicts = []
    for report in reports:
        row = rows.get(report.id)
        if row is None:
            verdicts.append(states.Refusal(404, f"no task has the id {report.id}"))
        else:
            verdicts.append(states.judge(row, report))
    changed = [row.as_dict() for row in rows.values() if row.changed]
    if changed:
        cursor.execute(UPDATE_TASKS, {"rows": json.dumps(changed)})
    return verdicts


def claim_tasks(cursor: Any, limit: int, size: int) -> list[tuple[str, str, int, bool]]:
    """Mark random pending tasks as sent, at most limit and size bytes (the last may reach over);
    return id, text, attempt, and whether a consumer has held this attempt before, of each."""
    arcs, first = min(ARCS, limit), random.random()
    lows = [(first + index / arcs) % 1 for index in range(arcs)]
    highs = [min(low + 1 / arcs, 1.0) for low in lows]
    crossing = max(lows) + 1 / arcs - 1  # the arc that crosses 1 goes on at 0
    cursor.execute(
        CLAIM_TASKS,
        {
            "first": first,
            "arcs": arcs,
            "lows": [*lows, 0.0],
            "highs": [*highs, crossing],
            "share": math.ceil(limit / arcs),
            "limit": limit,
            "bytes": size,
        },
    )
    return cursor.fetchall()


def release_due(cursor: Any) -> int:
    """Let held tasks whose time has come be picked; return how many."""
    cursor.execute(RELEASE_DUE_TASKS, {"limit": HOUSEKEEPING_ROWS})
    return cursor.rowcount


def rescue_lost(cursor: Any) -> int:
    """Return to pending what was sent and not touched for the whole time-out; return how many."""
    seconds = broker.SENT_TIMEOUT_SECONDS
    cursor.execute(RESCUE_LOST_TASKS, {"limit": HOUSEKEEPING_ROWS, "seconds": seconds})
    return cursor.rowcount


def sweep(cursor: Any, page: int, days: int) -> int:
    """Delete finished tasks older than days in the pages from page on; return the next page."""
    bounds = {"first": f"({page},0)", "end": f"({page + SWEEP_PAGES},0)", "days": days}
    cursor.execute(DELETE_FINISHED_TASKS, bounds)
    cursor.execute(COUNT_PAGES)
    return page + SWEEP_PAGES if page + SWEEP_PAGES < cursor.fetchone()[0] else 0
