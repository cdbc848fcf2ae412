"""Reports that one statement writes without a look at the rows: the current attempt has succeeded,
has left the text of its failure, or has failed for good. Only the producer imports this.

A statement may miss a row, which is judged then (rules.py), but never takes one that judge() would
treat otherwise. The ids of a group are in order, and the planner can only walk them (see
pool.SERVER_OPTIONS): two groups do not deadlock. IS TRUE hides a condition from the planner, which
would walk all of tasks_sent for each report: by its statistics that index is empty."""

import operator
from typing import Any, NamedTuple

import pool
import process
import rules
import task
from database import APPEND_TO_HISTORY, SENT

MAX_INTEGER = 2**31 - 1  # of PostgreSQL

UPDATE_SUCCESSES = pool.Prepared(
    "update_successes",
    """
UPDATE tasks
SET status = 'success',
    delayed = false,
    result = new.result,
    error = NULL,
    holder = NULL,
    lease_until = NULL,
    finished_at = now(),
    host = coalesce(new.host, tasks.host),
    started_at = coalesce(to_timestamp(new.started_at), tasks.started_at),
    seconds = coalesce(new.seconds, tasks.seconds)
FROM unnest(
    %(id)s::uuid[], %(attempt)s::int[], %(result)s::text[], %(started_at)s::float8[],
    %(seconds)s::float8[], %(host)s::text[]
) AS new (id, attempt, result, started_at, seconds, host)
WHERE tasks.id = new.id AND tasks.attempt = new.attempt AND tasks.status <> 'success'
RETURNING
    tasks.id,
    new.started_at - date_part('epoch', coalesce(run_at, created_at)),
    new.seconds,
    false
""",
)

# What a failed run leaves before its dead letter comes. A lease that is half over is renewed by
# judge().
UPDATE_ERRORS = pool.Prepared(
    "update_errors",
    f"""
UPDATE tasks
SET error = new.error,
    host = coalesce(new.host, tasks.host),
    started_at = coalesce(to_timestamp(new.started_at), tasks.started_at),
    seconds = coalesce(new.seconds, tasks.seconds)
FROM unnest(
    %(id)s::uuid[], %(attempt)s::int[], %(sent)s::bigint[], %(error)s::text[],
    %(started_at)s::float8[], %(seconds)s::float8[], %(host)s::text[]
) AS new (id, attempt, sent, error, started_at, seconds, host)
WHERE tasks.id = new.id AND tasks.attempt = new.attempt AND {SENT} = new.sent
    AND (tasks.status = 'sent') IS TRUE
    AND tasks.lease_until > clock_timestamp() + make_interval(secs => %(half_lease)s::float8)
RETURNING
    tasks.id,
    new.started_at - date_part('epoch', coalesce(run_at, created_at)),
    new.seconds,
    false
""",
)

TIMED_OUT = f"starts_with(tasks.error, '{task.TIMED_OUT}') IS TRUE"
FAILED = APPEND_TO_HISTORY.format(
    outcome=f"CASE WHEN {TIMED_OUT} THEN 'timed out' ELSE 'failed' END",
    error="tasks.error",
    host="tasks.host",
    started_at="tasks.started_at",
    seconds="tasks.seconds",
)

UPDATE_FAILURES = pool.Prepared(
    "update_failures",
    f"""
UPDATE tasks
SET status = 'error',
    failures = failures + 1,
    result = NULL,
    holder = NULL,
    lease_until = NULL,
    finished_at = now(),
    history = {FAILED}
FROM unnest(%(id)s::uuid[], %(attempt)s::int[], %(sent)s::bigint[]) AS new (id, attempt, sent)
WHERE tasks.id = new.id AND tasks.attempt = new.attempt AND {SENT} = new.sent
    AND (tasks.status = 'sent') IS TRUE AND tasks.failures >= %(last_failure)s::int
RETURNING tasks.id, NULL, NULL, {TIMED_OUT}
""",
)

BOUNDS = {
    "half_lease": process.SENT_TIMEOUT_SECONDS / 2,
    "last_failure": rules.MAX_ATTEMPTS - 1,
}


class Kind(NamedTuple):
    """Reports that one statement writes: the status of their rows then, and what it takes of each
    report."""

    status: str
    statement: pool.Prepared
    fields: tuple[str, ...]


SUCCESS = Kind(
    "success", UPDATE_SUCCESSES, ("id", "attempt", "result", "started_at", "seconds", "host")
)
ERROR = Kind(
    "sent", UPDATE_ERRORS, ("id", "attempt", "sent", "error", "started_at", "seconds", "host")
)
FAILURE = Kind("error", UPDATE_FAILURES, ("id", "attempt", "sent"))


class Written(NamedTuple):
    """A row that was written: for how many seconds its task has waited and run, if the report says
    so, and whether it has failed because that took too long."""

    id: str
    wait: float | None
    seconds: float | None
    timed_out: bool


def kind_of(report: task.Report) -> Kind | None:
    """Return the kind of a report; None if it is to be judged."""
    if not 0 < (report.attempt or 0) <= MAX_INTEGER:
        return None
    if report.status == "success":
        return SUCCESS
    if report.sent is None:
        return None
    if report.status == "error" and report.reason == "rejected" and not report.error:
        return FAILURE
    if report.status or not report.error:
        return None
    return ERROR if report.started is None and report.release is None else None


def by_kind(reports: list[task.Report]) -> dict[Kind, list[task.Report]]:
    """Return the reports that have a kind, in the order of their ids; none if two reports are about
    one task, where the order counts."""
    found: dict[Kind, list[task.Report]] = {}
    if len({report.id for report in reports}) == len(reports):
        for report in sorted(reports, key=operator.attrgetter("id")):
            if kind := kind_of(report):
                found.setdefault(kind, []).append(report)
    return found


def write(cursor: Any, kind: Kind, reports: list[task.Report]) -> list[Written]:
    """Write reports of a kind, in the order of their ids; return what the statement has found."""
    columns = {
        name: pool.array([getattr(report, name) for report in reports]) for name in kind.fields
    }
    kind.statement.execute(cursor, columns | BOUNDS)
    return [Written(*row) for row in cursor]
