"""The pick of pending tasks: at random over the whole table, whatever the batches are cut by."""

import contextlib
import statistics
import threading

import pika
import pika.exceptions
import psycopg2
import pytest

import database
import dispatcher
from tests.conftest import Stack, until


def fill(stack: Stack, count: int, size: int) -> None:
    """Insert tasks whose picks are spread evenly, so that only the claim is left to chance."""
    stack.sql(
        "INSERT INTO tasks (text, pick) SELECT repeat('x', %s), number / %s::float8"
        " FROM generate_series(0, %s - 1) AS number",
        size, count, count,
    )  # fmt: skip


def assert_random(stack: Stack, picks: list[float]) -> None:
    """Check picks, in the order they were sent: no trend, and the same share of every fifth."""
    everything = [pick for (pick,) in stack.sql("SELECT pick FROM tasks")]
    assert len(picks) < 0.8 * len(everything), "too late to see an order"
    assert abs(statistics.correlation(range(len(picks)), picks)) < 0.2
    sent, there = (
        [sum(int(pick * 5) == fifth for pick in each) for fifth in range(5)]
        for each in (picks, everything)
    )
    shares = [some / all_ for some, all_ in zip(sent, there, strict=True)]
    assert max(shares) <= 1.2 * min(shares), shares


@pytest.mark.parametrize(("count", "size", "limit"), [(6000, 20, 50), (2000, 20_000, 500)])
def test_every_batch_is_a_sample_of_all_that_waits(
    stack: Stack, count: int, size: int, limit: int
) -> None:
    stack.producer(RABBITMQ_URL="amqp://tasks:tasks@127.0.0.1:1/%2F", ready=False)
    until(lambda: stack.sql("SELECT to_regclass('tasks_pending')")[0][0])
    fill(stack, count, size)
    picks: list[float] = []
    with contextlib.closing(psycopg2.connect(stack.database_url)) as session:
        cursor = session.cursor()
        while len(picks) < count // 2:
            claimed = database.claim_tasks(cursor, limit, dispatcher.BATCH_BYTES)
            assert len(claimed) <= limit
            assert sum(len(text) for _, text, *_ in claimed) < dispatcher.BATCH_BYTES + size
            ids = [task_id for task_id, *_ in claimed]
            cursor.execute(
                "SELECT pick FROM tasks WHERE id = ANY(%s::uuid[]) ORDER BY random()", (ids,)
            )
            picks += [pick for (pick,) in cursor.fetchall()]
    assert_random(stack, picks)


@pytest.mark.parametrize(("count", "size"), [(8000, 20), (3000, 20_000)])
def test_behind_a_full_queue_tasks_of_every_age_and_pick_are_sent(
    stack: Stack, count: int, size: int
) -> None:
    """A slow reader keeps the queue full, so that batches go out one by one."""
    stack.producer(RABBITMQ_URL="amqp://tasks:tasks@127.0.0.1:1/%2F", ready=False)
    until(lambda: stack.sql("SELECT to_regclass('tasks_pending')")[0][0])
    stack.processes.pop().kill()
    fill(stack, count, size)
    enough = threading.Event()
    reader = threading.Thread(target=drain, args=(stack.rabbit.url, enough))
    stack.producer(QUEUE_LIMIT=50)
    reader.start()
    try:
        until(
            lambda: stack.sql("SELECT count(*) FROM tasks WHERE status = 'sent'")[0][0] > count / 2
        )
    finally:
        enough.set()
        reader.join()
    stack.processes[-1].kill()
    rows = stack.sql("SELECT pick FROM tasks WHERE status = 'sent' ORDER BY sent_at, random()")
    assert_random(stack, [pick for (pick,) in rows])


def drain(url: str, enough: threading.Event) -> None:
    """Take message after message, as a consumer that never has to work."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=100)
    for method, _, _ in channel.consume("tasks", inactivity_timeout=0.05):
        if enough.is_set():
            break
        if method is not None:
            channel.basic_ack(method.delivery_tag)
    connection.close()
