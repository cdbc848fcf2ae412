"""Brings the table of tasks up to schema.sql: makes it in a new database, and adds to an older one
what is missing. A start that finds everything in place takes no lock on the table."""

import contextlib
import logging
import re
import threading
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors

import pool
import process

log = logging.getLogger("schema")

SCHEMA = Path(__file__).with_name("schema.sql").read_text("utf-8")
INDEXES = {
    match[1]: match[0] for match in re.finditer(r"^CREATE INDEX (\w+) [^;]+;", SCHEMA, re.MULTILINE)
}
TABLES = {
    match[1]: match[0]
    for match in re.finditer(
        r"^CREATE (?:UNLOGGED )?TABLE (?:IF NOT EXISTS )?(\w+) [^;]+;", SCHEMA, re.MULTILINE
    )
}
# Advisory locks. Nobody waits for them: who does not get one looks again later.
TABLE_LOCK = 0x7461736B  # "task"
INDEX_LOCK = TABLE_LOCK + 1
# ALTER TABLE waits for every transaction that has used the table, and all others queue behind it.
ALTER_WAIT_MS = 100
RETRY_SECONDS = 1.0
INDEX_RETRY_SECONDS = 10

SELECT_COLUMNS = """
SELECT relname || '.' || attname
FROM unnest(%(tables)s) AS name
JOIN pg_class ON pg_class.oid = to_regclass(name)
JOIN pg_attribute ON attrelid = pg_class.oid
WHERE attnum > 0 AND NOT attisdropped
"""

SELECT_VALID_INDEXES = """
SELECT relname
FROM pg_index
JOIN pg_class ON pg_class.oid = indexrelid
WHERE indrelid = to_regclass('tasks') AND indisvalid
"""

# Steps from older tables, oldest first. Each renames or adds one column: it is due while the old
# name is there, or the new one is not.
RENAMED_COLUMNS = {
    "tasks.held": """
        ALTER TABLE tasks RENAME COLUMN held TO delayed;
        ALTER TABLE tasks
            RENAME CONSTRAINT tasks_only_pending_is_held TO tasks_only_pending_is_delayed;
        ALTER INDEX IF EXISTS tasks_held RENAME TO tasks_delayed
    """,
}
ADDED_COLUMNS = {
    "tasks.lease_until": """
        ALTER TABLE tasks
            ADD COLUMN holder uuid,
            ADD COLUMN lease_until timestamptz,
            ADD COLUMN timeout_seconds double precision,
            SET (
                autovacuum_vacuum_scale_factor = 0.02,
                autovacuum_vacuum_threshold = 10000,
                autovacuum_vacuum_cost_delay = 0
            )
    """,
    "tasks.history": """
        ALTER TABLE tasks
            ADD COLUMN host text,
            ADD COLUMN started_at timestamptz,
            ADD COLUMN seconds double precision,
            ADD COLUMN history jsonb
    """,
    "consumers.busy": "ALTER TABLE consumers ADD COLUMN busy integer NOT NULL DEFAULT 0",
}


def steps(cursor: Any) -> list[str]:
    """Return the statements that the table still needs, in order."""
    cursor.execute(SELECT_COLUMNS, {"tables": list(TABLES)})
    columns = {name for (name,) in cursor.fetchall()}
    tables = {name.partition(".")[0] for name in columns}
    if "tasks" not in tables:
        return [SCHEMA]
    due = [step for name, step in RENAMED_COLUMNS.items() if name in columns]
    due += [
        step
        for name, step in ADDED_COLUMNS.items()
        if name not in columns and name.partition(".")[0] in tables
    ]
    return due + [table for name, table in TABLES.items() if name not in tables]


def migrate(cursor: Any) -> bool:
    """Make or alter the table if it needs it; return whether it is now as it should be. Raise
    LockNotAvailable, with nothing changed, when other transactions leave no gap for it."""
    if not steps(cursor):
        return True
    cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", (TABLE_LOCK,))
    if cursor.fetchone() == (False,):
        return False  # another producer is at it
    cursor.execute(f"SET LOCAL lock_timeout = {ALTER_WAIT_MS}")
    for step in steps(cursor):  # read again under the lock
        cursor.execute(step)
        log.info("schema changed: %s", " ".join(step.split())[:80])
    return True


def wait_until_current(connections: pool.Pool, stop: threading.Event) -> None:
    """Return when the table is as schema.sql says but for its indexes, or stop is set."""
    backoff = process.Backoff(log, "the table is not ready")
    delay = 0.0
    while not stop.wait(delay):
        try:
            if connections.transaction(migrate):
                backoff.succeeded()
                return
            delay = RETRY_SECONDS
        except (pool.Unavailable, psycopg2.Error) as error:  # no right to CREATE, too
            delay = max(RETRY_SECONDS, backoff.failed(error))


def missing_indexes(cursor: Any) -> list[str]:
    """Return the names of the indexes that are not there, or were left broken."""
    cursor.execute(SELECT_VALID_INDEXES)
    valid = {name for (name,) in cursor.fetchall()}
    return [name for name in INDEXES if name not in valid]


def build_indexes(stop: threading.Event) -> None:
    """Build what indexes are missing, beside the traffic: the body of a thread.

    A build waits for every older transaction, for hours if need be. Our side gives up waiting after
    REPLY_SECONDS and the server goes on, still holding the lock: so nobody starts a second build,
    and a later look finds the index.
    """
    backoff = process.Backoff(log, "an index is not built yet")
    while not stop.is_set():
        try:
            with contextlib.closing(pool.connect()) as connection:
                connection.autocommit = True
                if build_missing(connection.cursor()):
                    backoff.succeeded()
                    return
            delay = float(INDEX_RETRY_SECONDS)
        except psycopg2.Error as error:
            delay = max(INDEX_RETRY_SECONDS, backoff.failed(error))
        stop.wait(delay)


def build_missing(cursor: Any) -> bool:
    """Build the missing indexes without blocking writers; return whether none is missing."""
    if not missing_indexes(cursor):
        return True
    cursor.execute("SELECT pg_try_advisory_lock(%s)", (INDEX_LOCK,))
    if cursor.fetchone() == (False,):
        return False  # a build is under way
    cursor.execute("SET statement_timeout = 0")
    cursor.execute("SET lock_timeout = 0")
    for name in missing_indexes(cursor):
        log.warning("building the index %s", name)
        cursor.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        statement = INDEXES[name].replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
        cursor.execute(statement)
    return True
