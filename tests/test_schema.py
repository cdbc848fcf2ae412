"""The table beside others who use it: starts, upgrades and missing indexes stop nobody."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest

import schema
from tests.stack import Stack, until

OLD_SCHEMA = pathlib.Path(__file__).with_name("schema_1.0.0.sql")
BLOCKED = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
VALID = "SELECT relname::text FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid" + (
    " WHERE indrelid = 'tasks'::regclass AND indisvalid AND relname <> 'tasks_pkey'"
)


@contextlib.contextmanager
def open_update(stack: Stack) -> Iterator[Any]:
    """Hold an open UPDATE of one row, as somebody in psql does who went to lunch."""
    [task_id] = stack.sql("INSERT INTO tasks (text, run_at) VALUES ('x', now()) RETURNING id")[0]
    with contextlib.closing(psycopg2.connect(stack.database_url)) as session:
        session.cursor().execute("UPDATE tasks SET run_at = now() WHERE id = %s", (task_id,))
        yield session


def slowest_insert(stack: Stack, seconds: float) -> float:
    """Insert rows for a while; return the longest wait."""
    slowest, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        stack.sql("INSERT INTO tasks (text) VALUES ('beside it')")
        slowest = max(slowest, time.monotonic() - began)
    return slowest


def test_a_second_producer_starts_beside_an_open_update(api: Stack) -> None:
    idle = slowest_insert(api, 1)
    with open_update(api):
        second = api.start("producer", HTTP_PORT=0)
        for _ in range(20):
            began = time.monotonic()
            api.create("a")
            assert time.monotonic() - began < 0.5 + idle
            assert api.sql(BLOCKED) == [(0,)]
            time.sleep(0.1)
        until(lambda: "connected" in second.log.read_text())


def test_a_table_of_1_0_0_becomes_current_and_its_tasks_end(stack: Stack) -> None:
    stack.sql(OLD_SCHEMA.read_text("utf-8"))
    stack.sql(
        "INSERT INTO tasks (text, status, held, run_at, sent_at, finished_at) VALUES"
        " ('pending', 'pending', false, NULL, NULL, NULL),"
        " ('due', 'pending', true, now(), NULL, NULL),"
        " ('later', 'pending', true, now() + interval '1 day', NULL, NULL),"
        " ('lost', 'sent', false, NULL, now() - interval '1 day', NULL),"
        " ('error', 'error', false, NULL, now(), now()),"
        " ('success', 'success', false, NULL, now(), now())"
    )
    idle = slowest_insert(stack, 1)
    with open_update(stack):
        stack.start("producer", SENT_TIMEOUT_SECONDS=4)
        assert slowest_insert(stack, 3) < 0.5 + idle
        assert stack.sql("SELECT to_regclass('tasks_delayed')") == [(None,)]
    stack.wait_ready(stack.processes[0])
    stack.consumer(SENT_TIMEOUT_SECONDS=4)
    query = "SELECT text, status::text, delayed FROM tasks WHERE text NOT IN ('x', 'beside it')"
    until(lambda: stack.sql(f"{query} AND status IN ('pending', 'sent')") == [
        ("later", "pending", True)
    ])  # fmt: skip
    assert stack.sql(f"{query} AND status = 'error'") == [("error", "error", False)]
    assert len(stack.sql(query)) == 6
    until(lambda: {name for (name,) in stack.sql(VALID)} == set(schema.INDEXES))


@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_or_broken_index_is_built_beside_the_traffic(stack: Stack, broken: bool) -> None:
    stack.producer().stop()
    stack.sql("DROP INDEX tasks_sent")
    if broken:  # as a build leaves it that was killed
        stack.sql("CREATE INDEX tasks_sent ON tasks (id)")
        stack.sql(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'tasks_sent'::regclass"
        )
    idle = slowest_insert(stack, 1)
    with open_update(stack):
        stack.producer()
        stack.wait_status(stack.create("a"), "sent", timeout=30)
        assert slowest_insert(stack, 2) < 0.5 + idle
    until(lambda: {name for (name,) in stack.sql(VALID)} == set(schema.INDEXES))
    [(definition,)] = stack.sql("SELECT pg_get_indexdef('tasks_sent'::regclass)")
    assert "WHERE (status = 'sent'" in definition


def test_two_upgrades_at_once_are_one(stack: Stack) -> None:
    stack.sql(OLD_SCHEMA.read_text("utf-8"))
    producers = [stack.start("producer"), stack.start("producer", HTTP_PORT=0)]
    stack.wait_ready(producers[0])
    until(lambda: all("connected" in each.log.read_text() for each in producers))
    assert sum("schema changed" in each.log.read_text() for each in producers) == 1


@pytest.mark.pure
def test_the_statements_of_the_indexes_are_found() -> None:
    assert list(schema.INDEXES) == [
        "tasks_pending", "tasks_delayed", "tasks_sent", "tasks_success", "tasks_error",
    ]  # fmt: skip
    assert all(text.startswith("CREATE INDEX") for text in schema.INDEXES.values())
