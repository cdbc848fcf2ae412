"""A table of millions of tasks for the benchmark: filled past the API, weighed and watched."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import psycopg2

from tests import load
from tests.measured import Measured, Side

SMALL = 10_000  # rows of each kind in the table to compare with
DAYS = 10  # over which the finished tasks were created
CHUNK = 1_000_000  # rows of one INSERT
INDEX_MEMORY = "1GB"
# An index on random values is never full for long: what grew by inserts is as if filled to this.
GROWN_PERCENT = 70

# What the producer's new_id() makes: 48 bits of milliseconds, then random ones.
TIME_ORDERED_ID = """encode(
    set_byte(
        overlay(uuid_send(gen_random_uuid())
            PLACING substring(int8send((extract(epoch FROM made) * 1000)::bigint) FROM 3) FROM 1),
        6,
        112 + (random() * 15)::int
    ), 'hex')::uuid"""
RANDOM_ID = "gen_random_uuid()"
MADE = """
SELECT now() - make_interval(secs => %(oldest)s - number * %(oldest)s::float8 / %(rows)s) AS made
FROM generate_series(%(first)s, %(last)s) AS number
"""
INSERT_FINISHED = f"""
INSERT INTO tasks
    (id, text, status, created_at, sent_at, started_at, finished_at, seconds, host)
SELECT %s, %%(text)s, 'success', made, made, made, made, 0.001, 'a host'
FROM ({MADE.replace("%", "%%")}) AS made
"""
INSERT_WAITING = f"""
INSERT INTO tasks (id, text, created_at)
SELECT %s, %%(text)s, made
FROM ({MADE.replace("%", "%%")}) AS made
"""
SELECT_FILES = """
SELECT pg_relation_filepath(oid)
FROM pg_class
WHERE oid = 'tasks'::regclass
    OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'tasks'::regclass)
"""
SELECT_INDEXES = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid)
FROM pg_index
WHERE indrelid = 'tasks'::regclass AND NOT indisprimary
"""
ADD_KEY = "ALTER TABLE tasks ADD CONSTRAINT tasks_pkey PRIMARY KEY (id) WITH (fillfactor = %s)"


def insert(bench: Measured, statement: str, count: int, oldest: float) -> None:
    """Insert so many rows that were created over the last `oldest` seconds, in two sessions."""
    chunks = list(range(1, count + 1, CHUNK))

    def work() -> None:
        with contextlib.closing(psycopg2.connect(bench.database_url)) as session:
            session.autocommit = True
            while chunks:
                first = chunks.pop(0)
                session.cursor().execute(
                    statement,
                    {
                        "text": load.TEXT,
                        "first": first,
                        "last": min(first + CHUNK - 1, count),
                        "rows": count,
                        "oldest": oldest,
                    },
                )

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fill(bench: Measured, finished: int, waiting: int, time_ordered: bool = True) -> None:
    """Fill the empty table, with the dispatch paused: what has finished was created over DAYS, what
    waits in the last hour. The indexes are built afterwards, as full as a grown one is."""
    bench.sql("INSERT INTO pause DEFAULT VALUES ON CONFLICT DO NOTHING")
    indexes = dict(bench.sql(SELECT_INDEXES))
    bench.sql(f"DROP INDEX {', '.join(indexes)}")
    bench.sql("ALTER TABLE tasks DROP CONSTRAINT tasks_pkey, SET (autovacuum_enabled = false)")
    id_ = TIME_ORDERED_ID if time_ordered else RANDOM_ID
    insert(bench, INSERT_FINISHED % id_, finished, DAYS * 86_400)
    insert(bench, INSERT_WAITING % id_, waiting, 3600)
    with contextlib.closing(psycopg2.connect(bench.database_url)) as session:
        session.autocommit = True
        cursor = session.cursor()
        cursor.execute(f"SET maintenance_work_mem = '{INDEX_MEMORY}'")
        cursor.execute(ADD_KEY, (90 if time_ordered else GROWN_PERCENT,))
        for name, definition in indexes.items():
            grown = f" WITH (fillfactor = {GROWN_PERCENT}) WHERE"
            random = name == "tasks_pending"
            cursor.execute(definition.replace(" WHERE", grown, 1) if random else definition)
        for name in ("tasks_pkey", "tasks_pending"):  # what is split from now on is split as ever
            cursor.execute(f"ALTER INDEX {name} RESET (fillfactor)")
        cursor.execute("VACUUM (FREEZE, ANALYZE) tasks")
        cursor.execute("ALTER TABLE tasks RESET (autovacuum_enabled)")
        cursor.execute("CHECKPOINT")


def files(bench: Measured) -> Iterator[BinaryIO]:
    """Yield each file of the table and of its indexes, open for reading."""
    for (name,) in bench.sql(SELECT_FILES):
        path = bench.postgres.data / name
        for part in path.parent.glob(f"{path.name}*"):
            with part.open("rb") as file:
                yield file


def warm(bench: Measured) -> None:
    """Read the whole table, so that nothing depends on what the kernel has kept of it."""
    for file in files(bench):
        while file.read(2**20):
            pass


def chill(bench: Measured) -> None:
    """Have the kernel forget the table, as if the machine had no memory for it."""
    bench.sql("CHECKPOINT")
    for file in files(bench):
        os.fsync(file.fileno())  # only what is on the disk can be forgotten
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sizes(bench: Measured) -> dict[str, float]:
    """Return the megabytes of the table and of each index."""
    rows: list[Any] = bench.sql(
        "SELECT 'table', pg_table_size('tasks') UNION ALL"
        " SELECT indexrelid::regclass::text, pg_relation_size(indexrelid)"
        " FROM pg_index WHERE indrelid = 'tasks'::regclass"
    )
    return {name: size / 1e6 for name, size in rows}


@contextlib.contextmanager
def pair(side: Side, time_ordered: bool) -> Iterator[tuple[Measured, Measured]]:
    """Yield a project with a small table and one with a big one; they share the queues, so only
    one of them works at a time."""
    with side.bench() as small, side.bench() as big:
        for bench, rows in ((small, SMALL), (big, side.rows)):
            with bench.running("producer"):
                pass  # the table
            began = time.monotonic()
            fill(bench, rows, rows, time_ordered)
            print(f"two times {rows} rows in {time.monotonic() - began:.0f} s", flush=True)
        yield small, big
