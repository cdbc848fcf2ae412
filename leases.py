"""Who holds which row: leases, their rescue, and the consumers' heartbeats. Only the producer
imports this, and every function runs on the cursor that it gets. The statements of a heartbeat may
each commit themselves: that saves trips, and each is whole by itself."""

import json
import math
from typing import Any, NamedTuple

import database
import process
import task

RESCUED = database.APPEND_TO_HISTORY.format(
    outcome="'rescued'",
    error="NULL",
    host="host",
    started_at="started_at",
    seconds="extract(epoch FROM now() - started_at)::float8",
)

RESCUED_ROWS = 5000  # in one statement

# The same attempt again: neither a failure nor a new run if a copy turns up after all. The holder
# stays, so that the next consumer asks before it starts the task. Only what was over when the last
# turn began: whoever was frozen since then could not renew.
RESCUE_LOST_TASKS = f"""
UPDATE tasks
SET status = 'pending',
    sent_at = NULL,
    lease_until = NULL,
    host = NULL,
    started_at = NULL,
    seconds = NULL,
    history = {RESCUED}
WHERE id = ANY(ARRAY(
    SELECT id FROM tasks
    WHERE status = 'sent' AND lease_until < to_timestamp(%(as_of)s)
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING id
"""

# Leases of a clock that was ahead, of a server that failed over for instance: the rescue would wait
# until they have passed. And rows that a producer of version 1.1 has sent.
CUT_LEASES = """
UPDATE tasks
SET lease_until = now() + make_interval(secs => %(seconds)s)
WHERE id = ANY(ARRAY(
    SELECT id FROM tasks
    WHERE status = 'sent'
        AND (lease_until IS NULL OR lease_until > now() + make_interval(secs => %(seconds)s + 1))
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
"""

# Rows that somebody else has locked are skipped: the others' leases must not lapse for them.
HOLD_TASKS = f"""
WITH mine AS MATERIALIZED (
    SELECT tasks.id, named.run
    FROM tasks
    JOIN unnest(%(ids)s::uuid[], %(attempts)s::int[], %(sents)s::bigint[], %(runs)s::float8[])
        AS named (id, attempt, sent, run)
        ON tasks.id = named.id AND tasks.attempt = named.attempt
    WHERE status IN ('pending', 'sent')
        AND (
            holder = %(consumer)s::uuid
            OR (holder IS NULL OR holder = %(nobody)s::uuid)
                AND (sent IS NULL OR sent = {database.SENT})
        )
    ORDER BY tasks.id
    FOR UPDATE OF tasks SKIP LOCKED
)
UPDATE tasks
SET status = 'sent',
    delayed = false,
    sent_at = coalesce(sent_at, now()),
    holder = %(consumer)s::uuid,
    lease_until = now() + make_interval(secs => %(seconds)s),
    host = %(host)s,
    started_at = now() - make_interval(secs => mine.run)
FROM mine
WHERE tasks.id = mine.id
RETURNING tasks.id, tasks.attempt
"""

SELECT_RUNNING = """
SELECT id, status, attempt, holder, extract(epoch FROM lease_until - now())::float8
FROM tasks
WHERE id = ANY(%(ids)s::uuid[])
"""

UPSERT_CONSUMER = """
INSERT INTO consumers (id, host, concurrency, busy, version, tasks)
VALUES (%(consumer)s::uuid, %(host)s, %(concurrency)s, %(busy)s, %(version)s, %(tasks)s)
ON CONFLICT (id) DO UPDATE
SET host = excluded.host,
    concurrency = excluded.concurrency,
    busy = excluded.busy,
    version = excluded.version,
    tasks = excluded.tasks,
    seen_at = now()
"""

DELETE_SILENT_CONSUMERS = "DELETE FROM consumers WHERE seen_at < now() - interval '1 day'"

# The database's time in seconds since 1970, and how long ago the last heartbeat came.
SELECT_CLOCK = """
SELECT
    extract(epoch FROM clock_timestamp())::float8,
    (SELECT extract(epoch FROM clock_timestamp() - max(seen_at))::float8
    FROM consumers
    WHERE seen_at <= clock_timestamp())
"""


class Named(NamedTuple):
    """A task that a consumer has in flight: for so many seconds it runs, or waits."""

    task_id: str
    attempt: int
    seconds: float
    state: str
    sent: int | None  # of its message

    @property
    def is_running(self) -> bool:
        """Tell whether it has begun."""
        return self.state == "running"


class Heartbeat(NamedTuple):
    """What a consumer says of itself."""

    consumer: str  # a UUID
    host: str
    concurrency: int
    busy: int  # workers with a task; one of version 1.2 says nothing: those with a long one
    version: str
    tasks: list[Named]


def parse_heartbeat(body: Any) -> Heartbeat:
    """Return the heartbeat in a JSON object; raise ValueError saying what was expected."""
    if not isinstance(body, dict) or not isinstance(body.get("tasks"), list):
        raise ValueError(
            'expected {"consumer", "host", "concurrency", "version", "tasks": [...]}, '
            f"got {task.shorten(body)}"
        )
    if len(body["tasks"]) > task.MAX_NAMED:
        raise ValueError(f"tasks: expected at most {task.MAX_NAMED}, got {len(body['tasks'])}")
    named = [parse_named(each) for each in body["tasks"]]
    running = sum(each.is_running for each in named)
    return Heartbeat(
        task.parse_consumer(body.get("consumer"), "consumer"),
        task.parse_word(body.get("host"), "host"),
        parse_count(body.get("concurrency"), "concurrency"),
        parse_count(body.get("busy", running), "busy"),
        task.parse_word(body.get("version"), "version"),
        named,
    )


def parse_count(value: Any, name: str) -> int:
    """Return a number of workers; raise ValueError otherwise."""
    if not 0 <= (count := task.parse_integer(value, name)) <= task.MAX_NAMED:
        raise ValueError(f"{name}: expected 0 to {task.MAX_NAMED}, got {task.shorten(value)}")
    return count


def parse_named(element: Any) -> Named:
    """Return one task of a heartbeat; raise ValueError saying what was expected."""
    if not isinstance(element, dict):
        expected = '{"taskId", "attempt", "seconds", "state"}'
        raise ValueError(f"tasks: expected {expected}, got {task.shorten(element)}")
    return Named(
        task.parse_uuid(element.get("taskId")),
        task.parse_integer(element.get("attempt"), "attempt"),
        task.parse_seconds(element.get("seconds"), "seconds"),
        task.parse_word(element.get("state"), "state"),
        None if element.get("sent") is None else task.parse_sent(element["sent"], "sent"),
    )


def answer_heartbeat(cursor: Any, heartbeat: Heartbeat) -> dict[str, Any]:
    """Hold what a consumer has run for long, renew what it holds; return the answer: the
    database's time, what is held, and what it is to stop."""
    consumer, named = heartbeat.consumer, heartbeat.tasks
    rows = {}
    if named:
        cursor.execute(SELECT_RUNNING, {"ids": [each.task_id for each in named]})
        rows = {row[0]: row[1:] for row in cursor}
    held, stop, due = [], [], []
    for each in named:
        status, attempt, holder, lease = rows.get(each.task_id, ("error", 0, None, None))
        ended = status in task.ENDED or attempt != each.attempt
        if ended or (holder not in (None, task.NOBODY, consumer) and (lease or 0) > 0):
            stop.append(each)
        elif holder == consumer and status == "sent" and (lease or 0) >= process.LEASE_SECONDS / 2:
            held.append(each)
        elif holder == consumer or (each.is_running and each.seconds >= task.HOLD_SECONDS):
            due.append(each)
    if due:
        lease = {
            "seconds": process.LEASE_SECONDS,
            "nobody": task.NOBODY,
            "consumer": consumer,
            "host": heartbeat.host,
        }
        columns = {
            "ids": [each.task_id for each in due],
            "attempts": [each.attempt for each in due],
            "sents": [each.sent for each in due],
            "runs": [each.seconds for each in due],
        }
        cursor.execute(HOLD_TASKS, lease | columns)
        renewed = {tuple(row) for row in cursor}
        held += [each for each in due if (each.task_id, each.attempt) in renewed]
    cursor.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
    return {"now": cursor.fetchone()[0], "held": keys(held), "stop": keys(stop)}


def keys(group: list[Named]) -> list[dict[str, Any]]:
    """Return the attempts that an answer names."""
    return [{"taskId": each.task_id, "attempt": each.attempt} for each in group]


def note_consumer(cursor: Any, heartbeat: Heartbeat) -> None:
    """Write a consumer's last heartbeat down."""
    tasks = [
        {
            "taskId": each.task_id,
            "attempt": each.attempt,
            "seconds": each.seconds,
            "state": each.state,
        }
        for each in sorted(heartbeat.tasks, key=lambda each: (not each.is_running, -each.seconds))
    ]
    cursor.execute(UPSERT_CONSUMER, heartbeat._asdict() | {"tasks": json.dumps(tasks)})


def forget_consumers(cursor: Any) -> None:
    """Delete consumers that have been silent for a day."""
    cursor.execute(DELETE_SILENT_CONSUMERS)


def rescue_lost(cursor: Any, as_of: float) -> list[str]:
    """Return to pending what was sent and whose lease was over at a time of the database, in
    seconds since 1970; return the ids."""
    seconds = process.SENT_TIMEOUT_SECONDS
    cursor.execute(CUT_LEASES, {"limit": RESCUED_ROWS, "seconds": seconds})
    cursor.execute(RESCUE_LOST_TASKS, {"limit": RESCUED_ROWS, "as_of": as_of})
    return [task_id for (task_id,) in cursor]


def read_clock(cursor: Any) -> tuple[float, float]:
    """Return the database's time and how long ago the last heartbeat came, both in seconds."""
    cursor.execute(SELECT_CLOCK)
    now, silence = cursor.fetchone()
    return now, math.inf if silence is None else silence
