"""A task all the way: producer, broker, two consumers, dead letters."""

import contextlib
import pathlib
import re
import signal
import time
from typing import Any

import pika
import psycopg2

import broker
import deliveries
import dlq_watcher
from tests.stack import Stack, until


def test_a_thousand_tasks_end_as_their_handler_says(stack: Stack, tmp_path: pathlib.Path) -> None:
    runs = tmp_path / "runs"
    stack.producer()
    for _ in range(2):
        stack.consumer(HANDLER="handlers:note", RUNS=runs, CONCURRENCY=2)
    texts = [f"task-{index}" + (" fail" if index % 10 == 0 else "") for index in range(1000)]
    ids = stack.create(*texts)
    stack.wait_ended()
    assert stack.counts() == {"success": 900, "error": 100}
    assert stack.get(ids[0])["error"] == "ValueError: told to fail: task-0 fail"
    assert stack.get(ids[1])["error"] is None
    assert stack.runs(runs) == dict.fromkeys(texts, 1)
    until(lambda: stack.unsettled() == {})


def test_the_imitation_fails_at_its_rate(stack: Stack) -> None:
    stack.producer()
    stack.consumer(FAILURE_RATE=0.3)
    stack.create(*map(str, range(500)))
    stack.wait_ended()
    assert 90 < stack.counts()["error"] < 210


def test_tasks_are_picked_at_random(stack: Stack, tmp_path: pathlib.Path) -> None:
    producer = stack.producer()
    producer.stop()
    producer = stack.producer(QUEUE_LIMIT=1)
    ids = stack.create(*map(str, range(3000)))
    until(lambda: stack.counts().get("sent", 0) >= 500)
    producer.kill()
    sent = [int(text) for (text,) in stack.sql("SELECT text FROM tasks WHERE status = 'sent'")]
    assert len(sent) == 500 and len(ids) == 3000
    assert 1300 < sum(sent) / len(sent) < 1700  # the first 500 by age would give 250


def test_an_idle_system_dispatches_at_once(stack: Stack, tmp_path: pathlib.Path) -> None:
    stack.producer()
    stack.consumer()
    [warm] = stack.create("warm up")
    stack.wait_status([warm], "success")
    seconds = []
    for index in range(10):
        began = time.monotonic()
        [task_id] = stack.create(str(index))
        until(lambda task_id=task_id: stack.get(task_id)["taskStatus"] == "success")
        seconds.append(time.monotonic() - began)
    assert (
        sorted(seconds)[5] < 0.5
    )  # far less, but these machines are noisy; never the 1 s of a poll


def test_results_are_stored_and_made_storable(stack: Stack, tmp_path: pathlib.Path) -> None:
    stack.producer()
    stack.consumer(HANDLER="handlers:note", RUNS=tmp_path / "runs")
    small, large, odd, leaver, loud = stack.create(
        "bytes=10", "bytes=70000", "nul", "exit", "scream=70000"
    )
    stack.wait_ended()
    assert stack.get(small)["result"] == "x" * 10
    assert stack.get(large)["result"] == "x" * 65536
    assert stack.get(odd)["result"] == "a\N{REPLACEMENT CHARACTER}b?c"
    assert stack.get(leaver)["error"] == "SystemExit: 3"
    assert stack.get(loud)["error"] == ("ValueError: " + "x" * 65536)[:65536]


def test_messages_that_are_not_ours_are_dropped_and_stop_nobody(stack: Stack) -> None:
    stack.producer()
    consumer = stack.consumer()
    bodies = [b"\xff\xfe", b"[]", b'{"id": 5}', b"{}", b"[" * 5000, b'{"id": "x", "text": 1}']
    bodies += [b'{"id": "x", "text": "y"}', b'{"id": "x", "text": "y", "attempt": []}']
    with stack.channel() as channel:
        for body in bodies:
            channel.basic_publish("tasks", "tasks", body, pika.BasicProperties(delivery_mode=2))
    ids = stack.create("ours")
    stack.wait_status(ids, "success")
    until(lambda: consumer.log.read_text().count("dropped a dead letter without a task") == 8)
    until(lambda: stack.unsettled() == {})


def test_the_watcher_runs_alone_too(stack: Stack) -> None:
    stack.producer()
    consumer = stack.consumer(FAILURE_RATE=1)
    watcher = stack.start("dlq_watcher")
    ids = stack.create(*map(str, range(300)))
    stack.wait_status(ids, "error")
    assert stack.get(ids[0])["error"] == "RuntimeError: imitated failure"
    assert (consumer.stop(), watcher.stop()) == (0, 0)


def test_dead_letters_whose_rows_are_locked_cost_no_connection(stack: Stack) -> None:
    stack.producer()
    ids = stack.create("a", "b", "c")
    stack.wait_status(ids, "sent")
    with contextlib.closing(psycopg2.connect(stack.database_url)) as session:
        session.cursor().execute("SELECT FROM tasks WHERE text = 'c' FOR UPDATE")
        with stack.channel() as channel:
            for _ in ids:
                tag = until(lambda: channel.basic_get(broker.QUEUE)[0]).delivery_tag
                channel.basic_nack(tag, requeue=False)
        watcher = stack.start("dlq_watcher")
        stack.wait_status(ids[:2], "error")
        time.sleep(5)  # in which the third is tried more than once
    stack.wait_status(ids, "error")
    assert watcher.stop() == 0
    assert "lost a server" not in watcher.log.read_text()


def test_why_a_message_has_died_is_seen_without_decoding_its_headers(stack: Stack) -> None:
    stack.producer()  # makes the queues
    letters: dict[bytes, Any] = {}
    take = lambda channel, method, properties, body: letters.update({body: properties})  # noqa: E731
    with stack.channel() as channel:
        deliveries.Decoder(channel.connection, channel)
        channel.basic_publish(broker.EXCHANGE, broker.ROUTING_KEY, b"rejected")
        tag = until(lambda: channel.basic_get(broker.QUEUE)[0]).delivery_tag
        channel.basic_nack(tag, requeue=False)
        soon = pika.BasicProperties(expiration="1")
        channel.basic_publish(broker.EXCHANGE, broker.ROUTING_KEY, b"expired", soon)
        channel.basic_consume(broker.DEAD_LETTER_QUEUE, take, auto_ack=True)
        until(lambda: channel.connection.process_data_events(0.1) or len(letters) == 2)
    for body, properties in letters.items():
        assert dlq_watcher.reason_of(properties) == body.decode()
        assert dlq_watcher.is_rejected(properties) == (body == b"rejected")


def test_dead_letters_that_come_one_by_one_are_reported_together(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(HANDLER="handlers:note", RUNS=tmp_path / "runs", PREFETCH=1)
    stack.wait_status(stack.create("warm up"), "success")
    began = time.monotonic()
    stack.create(*["fail"] * 200)
    stack.wait_ended()
    seconds = time.monotonic() - began
    counts = re.findall(r"reported (\d+) dead letters", consumer.log.read_text())
    assert sum(map(int, counts)) == 200
    assert len(counts) <= seconds / dlq_watcher.GROUP_SECONDS + 2


def test_everything_may_start_before_the_servers_it_needs(stack: Stack) -> None:
    consumer = stack.consumer()
    producer = stack.start("producer", RABBITMQ_URL="amqp://tasks:tasks@127.0.0.1:1/%2F")
    state = lambda: readyz(stack) or (0, {"broker": "", "database": ""})  # noqa: E731
    until(lambda: state()[1]["database"] == "ok")
    until(lambda: "cannot connect to 127.0.0.1:1" in state()[1]["broker"])
    assert state()[0] == 200  # it takes tasks without a broker
    ids = stack.create("a")
    assert producer.stop() == 0
    stack.producer()
    stack.wait_status(ids, "success")
    assert consumer.poll() is None


def test_without_a_database_the_api_says_503_and_when_to_try_again(stack: Stack) -> None:
    stack.start("producer", DATABASE_URL="postgresql://tasks:tasks@127.0.0.1:1/tasks")
    answer = until(lambda: readyz(stack))
    assert answer[0] == 503 and answer[1]["database"] != "ok"
    created = stack.session.post(f"{stack.url}/api/v1/create-task", json={"text": "a"})
    assert (created.status_code, created.headers["Retry-After"]) == (503, "1")
    assert "database" in created.json()["error"]


def readyz(stack: Stack) -> tuple[int, dict] | None:
    """Return what /readyz answers, if the producer answers at all."""
    try:
        answer = stack.session.get(f"{stack.url}/readyz", timeout=10)
    except OSError:
        return None
    return answer.status_code, answer.json()


def test_every_service_stops_with_0_at_sigterm_and_at_once_at_the_second(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    producer, consumer = stack.producer(), stack.consumer(HANDLER="time:sleep")
    watcher = stack.start("dlq_watcher")
    until(lambda: "connected" in watcher.log.read_text())
    for service in (watcher, consumer, producer):
        assert service.stop(20) == 0
    consumer = stack.consumer(HANDLER="handlers:note", RUNS=tmp_path / "runs")
    stack.producer()
    stack.create("sleep=600")
    until(lambda: stack.runs(tmp_path / "runs"), what="it runs")
    consumer.child.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert consumer.poll() is None  # it finishes what runs
    consumer.child.send_signal(signal.SIGTERM)
    assert consumer.child.wait(20) == 1
