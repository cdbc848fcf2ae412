"""The SQL of single tasks: create, read, report, release, delete. Only the producer imports this,
and every function runs inside the transaction of the cursor that it gets."""

import json
from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

import pool
import rules
import task

TASK_COLUMNS = """
    id, text, status, attempt, result, error, timeout_seconds,
    run_at, created_at, sent_at, started_at, finished_at, seconds, host
"""

INSERT_TASKS = pool.Prepared(
    "insert_tasks",
    """
INSERT INTO tasks (id, text, timeout_seconds, run_at, delayed)
SELECT id, text, timeout, run_at, coalesce(run_at > now(), false)
FROM unnest(
    %(ids)s::uuid[], %(texts)s::text[], %(timeouts)s::float8[], %(run_ats)s::timestamptz[]
) AS new (id, text, timeout, run_at)
ORDER BY id
ON CONFLICT (id) DO NOTHING
RETURNING id, created_at
""",
)

# sent_at in microseconds since 1970, which a message carries; date_part() is the fast one.
SENT = "round(date_part('epoch', sent_at) * 1000000)::bigint"

PROBE = "SELECT FROM tasks LIMIT 0"

SELECT_TASKS = f"SELECT {TASK_COLUMNS}, history FROM tasks WHERE id = ANY(%(ids)s::uuid[])"

SELECT_OPEN = """
SELECT id FROM tasks WHERE id = ANY(%(ids)s::uuid[]) AND status IN ('pending', 'sent')
"""

# After a lock time-out: what somebody holds is left out, for the others' sake.
SKIP_LOCKED = " SKIP LOCKED"

SELECT_IDS = "SELECT id FROM tasks WHERE id = ANY(%(ids)s::uuid[])"

# Locked by id alone and in id order. A report can come before the dispatcher's COMMIT: a condition
# on attempt or status would be tested against the old snapshot and miss the row, and locking in
# arrival order would deadlock two groups.
LOCK_TASKS = f"""
SELECT id, status, attempt, failures, starts, start_token, delayed,
    {SENT},
    holder,
    date_part('epoch', lease_until - clock_timestamp()),
    date_part('epoch', coalesce(run_at, created_at)),
    starts_with(error, '{task.TIMED_OUT}')
FROM tasks
WHERE id = ANY(%(ids)s::uuid[])
ORDER BY id
FOR UPDATE
"""

# What became of an attempt that did not succeed. The newest ones are kept.
APPEND_TO_HISTORY = """
    CASE
        WHEN jsonb_array_length(tasks.history) >= 20 THEN tasks.history - 0
        ELSE coalesce(tasks.history, '[]')
    END || jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
        'attempt', tasks.attempt,
        'outcome', {outcome},
        'error', left({error}, 500),
        'consumer', {host},
        'startedAt', {started_at},
        'seconds', {seconds},
        'at', now()
    )))
"""
RETRIED = APPEND_TO_HISTORY.format(
    outcome="new.outcome", error="NULL", host="NULL", started_at="NULL", seconds="NULL"
)
UNSUCCESSFUL = APPEND_TO_HISTORY.format(
    outcome="new.outcome",
    error="coalesce(new.error, tasks.error)",
    host="coalesce(new.host, tasks.host)",
    started_at="coalesce(to_timestamp(new.started_at), tasks.started_at)",
    seconds="coalesce(new.seconds, tasks.seconds)",
)
HISTORY_FIELDS = ("attempt", "outcome", "error", "consumer", "startedAt", "seconds", "at")

UPDATE_TASKS = f"""
UPDATE tasks
SET status = new.status,
    attempt = new.attempt,
    failures = new.failures,
    starts = new.starts,
    start_token = new.start_token,
    delayed = new.delayed,
    result = CASE WHEN new.status = 'success' THEN new.result END,
    error = CASE WHEN new.status <> 'success' THEN coalesce(new.error, tasks.error) END,
    run_at = coalesce(now() + make_interval(secs => new.delay), tasks.run_at),
    sent_at = CASE
        WHEN new.status = 'sent' THEN coalesce(tasks.sent_at, now())
        WHEN new.status <> 'pending' THEN tasks.sent_at
    END,
    holder = new.holder,
    lease_until = CASE WHEN new.status = 'sent' THEN now() + make_interval(secs => new.lease) END,
    finished_at = CASE WHEN new.status IN ('success', 'error') THEN now() END,
    host = CASE WHEN new.status <> 'pending' THEN coalesce(new.host, tasks.host) END,
    started_at = CASE
        WHEN new.status <> 'pending' THEN coalesce(to_timestamp(new.started_at), tasks.started_at)
    END,
    seconds = CASE WHEN new.status <> 'pending' THEN coalesce(new.seconds, tasks.seconds) END,
    history = CASE
        WHEN new.outcome IS NULL THEN tasks.history
        WHEN new.outcome = 'retried' THEN {RETRIED}
        ELSE {UNSUCCESSFUL}
    END
FROM json_to_recordset(%(rows)s) AS new (
    id uuid, status task_status, attempt int, failures int, starts int, start_token text,
    delayed bool, holder uuid, lease float8, result text, error text, delay float8,
    outcome text, started_at float8, seconds float8, host text
)
WHERE tasks.id = new.id
"""

SELECT_SYNCHRONOUS = """
SELECT current_setting('synchronous_standby_names') = '', current_setting('synchronous_commit')
"""


class NewTask(NamedTuple):
    """A task to insert; a run may take `timeout` seconds; run_at in the future delays it."""

    id: str
    text: str
    timeout: float | None
    run_at: datetime | None


def as_task(row: tuple[Any, ...]) -> dict[str, Any]:
    """Return a row of TASK_COLUMNS as the JSON object of the API."""
    task_id, text, status, attempt, result, error, timeout, *times, seconds, host = row[:14]
    run_at, created_at, sent_at, started_at, finished_at = map(task.as_iso, times)
    return {
        "taskId": task_id,
        "text": text,
        "taskStatus": status,
        "attempt": attempt,
        "result": result,
        "error": error,
        "timeoutSeconds": timeout,
        "runAt": run_at,
        "createdAt": created_at,
        "sentAt": sent_at,
        "startedAt": started_at,
        "finishedAt": finished_at,
        "seconds": seconds,
        "host": host,
    }


def as_new(new: NewTask, created_at: datetime) -> dict[str, Any]:
    """Return a task that has just been inserted as the JSON object of the API."""
    times = new.run_at, created_at, None, None, None
    return as_task((new.id, new.text, "pending", 1, None, None, new.timeout, *times, None, None))


def as_history(elements: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return a history as the API shows it: with every field, and times as everywhere."""
    if elements is None:
        return None
    for element in elements:
        for name in ("startedAt", "at"):
            if name in element:
                element[name] = element[name].replace("+00:00", "Z")
    return [{name: element.get(name) for name in HISTORY_FIELDS} for element in elements]


def select_tasks(cursor: Any, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Return the tasks of these ids that exist, by id, each with its history."""
    cursor.execute(SELECT_TASKS, {"ids": ids})
    return {row[0]: as_task(row) | {"history": as_history(row[-1])} for row in cursor}


def insert_tasks(cursor: Any, new: Collection[NewTask]) -> dict[str, dict[str, Any]]:
    """Insert what is not there yet; return all of them by id, the older ones as they are."""
    columns = {
        "ids": pool.array([each.id for each in new]),
        "texts": pool.array([each.text for each in new]),
        "timeouts": pool.array([each.timeout for each in new]),
        "run_ats": pool.array([each.run_at.isoformat() if each.run_at else None for each in new]),
    }
    INSERT_TASKS.execute(cursor, columns)
    created = dict(cursor)
    if len(created) == len(new):
        return {each.id: as_new(each, created[each.id]) for each in new}
    # A statement of its own: the first one's snapshot may be older than a rival's row.
    tasks = select_tasks(cursor, [each.id for each in new])
    for task_id in created:
        del tasks[task_id]["history"]  # which tells that a task is older
    return tasks


def is_same(new: NewTask, tasks: dict[str, dict[str, Any]]) -> bool:
    """Tell whether what insert_tasks() has returned for a task is that one, or a repeat of it."""
    found = tasks.get(new.id)  # it may have been deleted just now
    return found is not None and bool(found["text"] == new.text)


def apply_reports(
    cursor: Any, reports: list[task.Report], skip_locked: bool = False
) -> tuple[list[rules.Verdict], list[rules.Row]]:
    """Lock the rows, judge every report in order, write what changed; return the verdicts, and the
    rows that changed. With skip_locked, wait for no row."""
    ids = {"ids": pool.array({report.id for report in reports})}
    cursor.execute(LOCK_TASKS + SKIP_LOCKED * skip_locked, ids)
    rows = {row[0]: rules.Row(*row) for row in cursor}
    locked: set[str] = set()
    if skip_locked:
        cursor.execute(SELECT_IDS, ids)
        locked = {task_id for (task_id,) in cursor} - rows.keys()
    verdicts = [
        rules.judge(rows[report.id], report)
        if report.id in rows
        else rules.LOCKED
        if report.id in locked
        else rules.Verdict(404, f"no task has the id {report.id}")
        for report in reports
    ]
    changed = [row for row in rows.values() if row.changed]
    if changed:
        cursor.execute(UPDATE_TASKS, {"rows": json.dumps([row.as_dict() for row in changed])})
    return verdicts, changed


def select_open(cursor: Any, ids: list[str]) -> set[str]:
    """Return those of these tasks that are there and have not ended."""
    cursor.execute(SELECT_OPEN, {"ids": pool.array(ids)})
    return {task_id for (task_id,) in cursor}


def read_now(cursor: Any) -> datetime:
    """Return the database's time."""
    cursor.execute("SELECT clock_timestamp()")
    now: datetime = cursor.fetchone()[0]
    return now


def what_commits_lack(cursor: Any) -> str:
    """Return why a COMMIT does not wait for a standby, "" if it does."""
    cursor.execute(SELECT_SYNCHRONOUS)
    nobody, level = cursor.fetchone()
    if nobody:
        return "synchronous_standby_names is empty"
    return f"synchronous_commit is {level}" if level in ("local", "off") else ""
