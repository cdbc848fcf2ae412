"""The pick of pending tasks: at random over the whole table, whatever the batches are cut by."""

import contextlib
import statistics
import threading
import time

import pika
import pika.exceptions
import psycopg2
import pytest

import broker
import claims
import dispatcher
from tests.stack import Stack, until


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
            claimed = claims.claim_random_tasks(cursor, limit, dispatcher.BATCH_BYTES)
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


def test_without_consumers_a_batch_waits_in_the_broker_and_the_rest_in_the_table(
    stack: Stack,
) -> None:
    stack.producer(SENT_TIMEOUT_SECONDS=3)
    stack.create(*["x"] * 5000)
    until(lambda: stack.waiting("tasks.dlq") >= 400, what="messages expire")
    time.sleep(5)  # more than the time-out: rescued, but not sent in numbers again
    assert stack.waiting("tasks.dlq") + stack.waiting() < 1000
    stack.consumer(SENT_TIMEOUT_SECONDS=3)
    stack.wait_ended()
    assert stack.counts() == {"success": 5000}


def test_dead_entries_under_an_old_snapshot_do_not_slow_a_single_task(stack: Stack) -> None:
    stack.producer()
    stack.consumer(HANDLER="handlers:count", COUNTS=stack.folder)
    before = median_seconds(stack)
    with contextlib.closing(psycopg2.connect(stack.database_url)) as old:
        old.set_session("REPEATABLE READ")
        old.cursor().execute("SELECT count(*) FROM tasks")
        for _ in range(6):  # each row leaves a dead entry in the index
            stack.sql("INSERT INTO tasks (text) SELECT 'dead' FROM generate_series(1, 20000)")
        until(lambda: "pending" not in stack.counts())
        stack.wait_ended()
        # Far less if nothing else runs here; a walk for each would take 100 ms and more.
        assert median_seconds(stack) < 2 * before + 0.05


def median_seconds(stack: Stack) -> float:
    """Return how long a single task takes from create to success, by the database's clock."""
    ids = []
    for index in range(30):
        ids += stack.create(str(index))
        time.sleep(0.05)
    stack.wait_status(ids, "success")
    [(seconds,)] = stack.sql(
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at -"
        " created_at)::float8) FROM tasks WHERE id = ANY(%s::uuid[])",
        ids,
    )
    return seconds


@pytest.mark.pure
def test_arrivals_are_claimed_by_id_until_they_are_a_backlog() -> None:
    arrivals = dispatcher.Arrivals()
    assert arrivals.take() is None  # what is there at the start is unknown
    arrivals.add(["a"])
    arrivals.walked(full=False, seconds=0.01)
    assert arrivals.take() == ["a"]
    arrivals.add(["a2"])
    assert not arrivals.may_send()  # until that batch is out
    arrivals.sent(full=False)
    assert arrivals.take() == ["a2"]
    arrivals.sent(full=False)
    arrivals.add(["b"] * (dispatcher.BATCH + 1))
    assert arrivals.take() is None
    arrivals.walked(full=True, seconds=0.01)
    arrivals.add(["c"])
    assert arrivals.take() is None  # with a backlog, nothing goes before its turn
    arrivals.walked(full=False, seconds=0.01)
    assert arrivals.take() == ["c"]
    arrivals.sent(full=True)
    assert arrivals.take() is None  # what failed is left to a walk


@pytest.mark.pure
def test_a_walk_does_not_end_a_backlog_that_came_after_it_began() -> None:
    arrivals = dispatcher.Arrivals()
    assert arrivals.take() is None
    arrivals.add(["a"] * (dispatcher.BATCH + 1))  # the walk's snapshot is older
    arrivals.walked(full=False, seconds=0.01)
    assert arrivals.backlog and arrivals.take() is None
    arrivals.walked(full=False, seconds=0.01)
    assert not arrivals.backlog


@pytest.mark.pure
def test_slow_walks_cover_less_and_fast_ones_more_again() -> None:
    arrivals = dispatcher.Arrivals()
    for _ in range(3):
        arrivals.walked(full=False, seconds=1.0)
    assert arrivals.span == 1 / 8
    for _ in range(3):
        arrivals.walked(full=False, seconds=0.01)
        assert arrivals.walk_at <= time.monotonic()
    assert arrivals.span == 1.0


def test_a_thread_that_is_stuck_reserves_no_room_in_the_queue(stack: Stack) -> None:
    equal = dispatcher.Dispatcher(threading.Event(), dispatcher.Arrivals())
    with stack.channel() as channel:
        broker.declare(channel)
        equal.room[1] = dispatcher.BATCH
        for age, room in ((0, 0), (dispatcher.STUCK_SECONDS, dispatcher.BATCH)):
            equal.turns[1] = time.monotonic() - age
            equal.measure_room(channel, 0)
            assert equal.room[0] == room  # nobody takes tasks: one batch for all
