"""Faults, each made by killing, freezing or cutting the real thing: nothing is lost, run twice for
nothing, or stuck."""

import contextlib
import pathlib
import re
import signal
import socket
import threading
import time
from typing import Any

import psycopg2
import pytest
import requests

from tests.stack import Stack, until


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> pathlib.Path:
    """The file in which the handler notes each run."""
    return tmp_path / "runs"


def handler(runs: pathlib.Path, **env: Any) -> dict[str, Any]:
    """Return the settings of a consumer that notes its runs."""
    return {"HANDLER": "handlers:note", "RUNS": runs, **env}


def create_undispatched(stack: Stack) -> list[str]:
    """Create a task with a producer that has no broker, so that nobody else locks its row."""
    stack.producer().stop()
    stack.producer(RABBITMQ_URL="amqp://tasks:tasks@127.0.0.1:1/%2F", ready=False)

    def is_up() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return stack.session.get(f"{stack.url}/healthz").status_code == 200
        return False

    until(is_up)
    return stack.create("a")


def started(stack: Stack, runs: pathlib.Path, text: str, times: int = 1) -> None:
    """Wait until a task has begun so many times."""
    until(lambda: stack.runs(runs).get(text, 0) >= times, what=f"{text} begun {times} times")


def test_tasks_of_a_killed_consumer_are_run_by_another(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    victim = stack.consumer(**handler(runs, CONCURRENCY=2))
    ids = stack.create("sleep=3 a", "sleep=3 b")
    for text in ("sleep=3 a", "sleep=3 b"):
        started(stack, runs, text)
    ids += stack.create("c", "d")
    victim.kill()
    stack.consumer(**handler(runs, CONCURRENCY=2))
    stack.wait_status(ids, "success")
    assert stack.runs(runs) == {"sleep=3 a": 2, "sleep=3 b": 2, "c": 1, "d": 1}


def test_a_killed_producer_forgets_nothing_it_answered(stack: Stack, runs: pathlib.Path) -> None:
    stack.consumer(**handler(runs, CONCURRENCY=4))
    producer = stack.producer()
    ids: list[str] = []
    for _ in range(4):
        ids += stack.create(*[f"n{len(ids) + index}" for index in range(300)])
        producer.kill()
        producer = stack.producer()
    stack.wait_status(ids, "success")
    assert set(stack.runs(runs)) == {f"n{index}" for index in range(1200)}


def test_a_killed_broker_comes_back_with_what_it_had(own: Stack, runs: pathlib.Path) -> None:
    # A node killed in the first seconds of a queue may come back without it: then they are rescued.
    producer = own.producer(SENT_TIMEOUT_SECONDS=30)
    consumer = own.consumer(**handler(runs, SENT_TIMEOUT_SECONDS=30))
    ids = own.create(*[f"sleep=0.01 {index}" for index in range(1500)])
    until(lambda: own.counts().get("success", 0) > 100)
    own.rabbit.kill()
    more = own.create("created without a broker")
    own.rabbit.start()
    own.wait_status(ids + more, "success", timeout=90)
    assert (producer.poll(), consumer.poll()) == (None, None)
    assert sum(own.runs(runs).values()) <= 1501 + 10
    until(lambda: own.unsettled() == {})


def test_a_purged_or_deleted_queue_costs_no_task(own: Stack, runs: pathlib.Path) -> None:
    own.producer(SENT_TIMEOUT_SECONDS=8)
    ids = own.create(*map(str, range(100)))
    own.wait_status(ids, "sent")
    with own.channel() as channel:
        channel.queue_purge("tasks")
    own.consumer(**handler(runs, SENT_TIMEOUT_SECONDS=8))
    own.wait_status(ids, "success")
    assert own.runs(runs) == {str(index): 1 for index in range(100)}
    with own.channel() as channel:  # a queue deleted under a running consumer
        for queue in ("tasks", "tasks.dlq"):
            channel.queue_delete(queue)
    again = own.create("after")
    own.wait_status(again, "success")


def test_a_broker_whose_data_is_lost_costs_no_task(own: Stack, runs: pathlib.Path) -> None:
    own.producer(SENT_TIMEOUT_SECONDS=8)
    ids = own.create(*map(str, range(100)))
    own.wait_status(ids, "sent")
    own.rabbit.kill()
    own.rabbit.wipe()
    own.rabbit.start()
    own.consumer(**handler(runs, SENT_TIMEOUT_SECONDS=8))
    own.wait_status(ids, "success")
    assert own.runs(runs) == {str(index): 1 for index in range(100)}


def test_what_is_in_flight_through_an_outage_of_the_producer_is_not_rescued(
    stack: Stack, runs: pathlib.Path
) -> None:
    producer = stack.producer(SENT_TIMEOUT_SECONDS=6)
    consumers = [stack.consumer(**handler(runs, SENT_TIMEOUT_SECONDS=6)) for _ in range(2)]
    ids = stack.create("sleep=12 long", "sleep=4 short")
    started(stack, runs, "sleep=12 long")
    started(stack, runs, "sleep=4 short")
    producer.kill()
    sent = "SELECT min(extract(epoch FROM now() - sent_at)) > 7 FROM tasks"
    until(lambda: stack.sql(sent)[0][0])  # both are overdue
    stack.producer(SENT_TIMEOUT_SECONDS=6)
    stack.wait_status(ids, "success")
    assert stack.runs(runs) == {"sleep=12 long": 1, "sleep=4 short": 1}
    # Nobody was still waiting when the producer's grace was over.
    logs = "".join(consumer.log.read_text() for consumer in consumers)
    delays = re.findall(r"reports wait for the producer, next try in ([\d.]+) s", logs)
    assert delays and max(map(float, delays)) <= 6 / 4


def test_a_task_that_was_in_flight_and_lost_is_a_suspect(stack: Stack, runs: pathlib.Path) -> None:
    """Its message was acked when the row held it: only the row knows."""
    settings = {"SENT_TIMEOUT_SECONDS": 4}
    stack.producer(**settings)
    consumer = stack.consumer(**handler(runs, **settings))
    ids = stack.create("sleep=6")
    until(lambda: stack.sql("SELECT holder FROM tasks")[0][0])
    consumer.kill()
    stack.consumer(**handler(runs, **settings))
    stack.wait_status(ids, "success")
    assert stack.sql("SELECT starts FROM tasks") == [(1,)]
    assert stack.runs(runs) == {"sleep=6": 2}


def test_a_failed_task_whose_message_has_expired_is_not_run_again(
    own: Stack, runs: pathlib.Path, proxy: Any
) -> None:
    settings = {"SENT_TIMEOUT_SECONDS": 8}
    link = proxy(own.rabbit.port)
    own.producer(**settings)
    url = f"amqp://tasks:tasks@127.0.0.1:{link.port}/%2F"
    own.consumer(RABBITMQ_URL=url, **handler(runs, **settings))
    own.consumer(**handler(runs, **settings))
    ids = own.create("sleep=9 fail")
    started(own, runs, "sleep=9 fail")
    time.sleep(5)  # over half of the time-out: the broker lets a returned message expire
    link.cut()
    own.wait_status(ids, "error", timeout=30)
    assert "told to fail" in own.get(ids[0])["error"]
    assert own.runs(runs) == {"sleep=9 fail": 1}


def test_a_database_whose_first_host_is_silent_is_found(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = stack.database_url.replace("@", f"@127.0.0.1:{port},")
        stack.producer(DATABASE_URL=url)
        assert stack.create("a")


def test_a_killed_database_is_waited_for(
    server_classes: tuple, rabbit: Any, tmp_path: pathlib.Path, runs: pathlib.Path
) -> None:
    postgres = server_classes[0](tmp_path / "postgres")
    postgres.start()
    stack = Stack(postgres, rabbit, tmp_path)
    try:
        producer = stack.producer()
        consumer = stack.consumer(**handler(runs))
        ids = stack.create(*[f"sleep=0.01 {index}" for index in range(1000)])
        until(lambda: stack.counts().get("success", 0) > 100)
        postgres.kill()
        refused = requests.post(f"{stack.url}/api/v1/create-task", json={"text": "a"}, timeout=60)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        ready = requests.get(f"{stack.url}/readyz", timeout=60)
        assert ready.status_code == 503 and ready.json()["database"] != "ok"
        postgres.start()
        stack.wait_status(ids, "success", timeout=90)
        assert (producer.poll(), consumer.poll()) == (None, None)
        assert sum(stack.runs(runs).values()) == 1000
    finally:
        stack.close()
        postgres.stop()


def test_a_memory_alarm_stops_nothing_but_the_dispatch(own: Stack, runs: pathlib.Path) -> None:
    producer = own.producer()
    own.consumer(**handler(runs))
    own.wait_status(own.create("before"), "success")
    own.rabbit.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
    ids = own.create(*map(str, range(50)))
    until(lambda: "lost a server" in producer.log.read_text())  # longer than a publisher waits
    assert own.counts() == {"success": 1, "pending": 50}
    began = time.monotonic()
    more = own.create("under alarm")
    assert time.monotonic() - began < 5
    assert requests.get(f"{own.url}/healthz", timeout=5).status_code == 200
    own.rabbit.ctl("set_vm_memory_high_watermark", "0.6")
    own.wait_status(ids + more, "success")
    until(lambda: own.unsettled() == {})
    assert set(own.runs(runs)) == {"before", "under alarm", *map(str, range(50))}


def test_a_message_without_a_queue_is_not_marked_sent(own: Stack) -> None:
    own.producer()
    with own.channel() as channel:
        channel.queue_unbind("tasks", "tasks", "tasks")
    ids = own.create("a", "b")
    own.consumer()
    own.wait_status(ids, "success")  # the binding is declared again, and the batch sent again
    log = own.processes[0].log.read_text()
    assert "messages had no queue" in log


def test_what_a_full_queue_refuses_stays_pending(own: Stack) -> None:
    own.producer()
    own.rabbit.ctl("set_policy", "full", "^tasks$", '{"max-length": 5}', "--apply-to", "queues")
    ids = own.create(*map(str, range(100)))
    own.wait_status(ids, "sent")  # the queue stops what comes after it is full
    ids += own.create("one more")
    until(lambda: "the queue refused" in own.processes[0].log.read_text(), what="refused")
    assert own.counts() == {"sent": 100, "pending": 1}
    own.rabbit.ctl("clear_policy", "full")
    own.consumer()
    own.wait_status(ids, "success")


def test_a_queue_that_confirms_nothing_keeps_no_row(own: Stack) -> None:
    own.producer()
    own.consumer()
    own.wait_status(own.create("before"), "success")
    queue = "{'%2F_tasks', node()}"
    own.rabbit.ctl("eval", f"sys:suspend({queue}).")
    ids = own.create("during")
    log = own.processes[0].log
    until(lambda: "no answer in 10 s" in log.read_text(), what="given up")
    assert own.counts() == {"success": 1, "pending": 1}
    own.rabbit.ctl("eval", f"sys:resume({queue}).")
    own.wait_status(ids, "success")


def test_a_frozen_broker_connection_is_given_up(
    stack: Stack, runs: pathlib.Path, proxy: Any
) -> None:
    link = proxy(stack.rabbit.port)
    url = f"amqp://tasks:tasks@127.0.0.1:{link.port}/%2F?heartbeat=2"
    services = stack.producer(RABBITMQ_URL=url), stack.consumer(RABBITMQ_URL=url, **handler(runs))
    stack.wait_status(stack.create("before"), "success")
    link.frozen.set()
    ids = stack.create("during")
    for service in services:
        until(lambda service=service: "lost a server" in service.log.read_text())
    link.cut()
    link.frozen.clear()
    stack.wait_status(ids, "success")


def test_a_connection_that_hears_its_broker_is_kept(stack: Stack) -> None:
    stack.producer()
    url = f"{stack.rabbit.url}?heartbeat=1"  # pika looks each 6 s, at what came since the last time
    consumer = stack.consumer(RABBITMQ_URL=url)
    for _ in range(20):
        stack.wait_status(stack.create("x"), "success")
        time.sleep(1)
    assert "lost a server" not in consumer.log.read_text()


def test_a_consumer_that_stood_still_keeps_its_connections(stack: Stack) -> None:
    stack.producer()
    consumer = stack.consumer()
    stack.wait_status(stack.create("before"), "success")
    consumer.signal(signal.SIGSTOP)
    time.sleep(12)  # shorter than the broker's patience, longer than ours for an answer
    consumer.signal(signal.SIGCONT)
    stack.wait_status(stack.create("after"), "success")
    time.sleep(1)
    assert "lost a server" not in consumer.log.read_text()


def test_subscriptions_are_renewed_and_lose_or_repeat_nothing(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer(SENT_TIMEOUT_SECONDS=20)
    consumer = stack.consumer(**handler(runs, SENT_TIMEOUT_SECONDS=20))
    renewals = lambda role: consumer.log.read_text().count(f" {role}@") - 1  # noqa: E731
    ids, deadline = [], time.monotonic() + 60
    while min(renewals("consumer"), renewals("dlq_watcher")) < 3:  # each after 2 to 4 s
        assert time.monotonic() < deadline
        ids += stack.create(f"fine {len(ids)}", f"fail {len(ids)}")
        time.sleep(0.02)
    stack.wait_ended()
    assert stack.counts() == {"success": len(ids) // 2, "error": len(ids) // 2}
    [(starts, failures)] = stack.sql("SELECT max(starts), max(failures) FROM tasks")
    assert failures == 1
    assert starts <= 1  # RabbitMQ gives back what it has under way when a subscription ends
    assert list(stack.runs(runs).values()) == [1] * len(ids)
    assert "lost a server" not in consumer.log.read_text()


def test_a_subscription_that_gets_nothing_any_more_is_renewed(own: Stack) -> None:
    own.producer(SENT_TIMEOUT_SECONDS=60)
    consumers = [own.consumer(SENT_TIMEOUT_SECONDS=60) for _ in range(2)]
    until(lambda: all("window is" in each.log.read_text() for each in consumers), what="consuming")
    own.wait_status(own.create(*map(str, range(10))), "success")
    queue = 'rabbit_misc:r(<<"/">>, queue, <<"tasks">>)'
    lookup = f"{{ok, Queue}} = rabbit_amqqueue:lookup({queue})"
    channel = "element(1, hd(rabbit_amqqueue:consumers(Queue)))"
    own.rabbit.ctl("eval", f"{lookup}, sys:suspend({channel}).")
    own.wait_status(own.create(*map(str, range(20))), "success")  # half of them were stuck there
    assert sum("no answer in 10 s" in each.log.read_text() for each in consumers) == 1


@pytest.mark.parametrize("server", ["rabbit", "postgres"])
def test_a_frozen_server_holds_nobody_for_ever(server: str, own: Stack, runs: pathlib.Path) -> None:
    own.producer()
    own.consumer(**handler(runs))
    own.wait_status(own.create("before"), "success")
    frozen = getattr(own, server)
    frozen.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = requests.post(f"{own.url}/api/v1/create-task", json={"text": "x"}, timeout=60)
        assert answer.status_code == (201 if server == "rabbit" else 503)
        assert time.monotonic() - began < 40
    finally:
        frozen.signal(signal.SIGCONT)
    own.wait_status(own.create("after"), "success")


class Refusing(threading.Thread):
    """A producer's door that answers the first PUTs with errors or silence, then forwards."""

    def __init__(self, target: str, answers: list[int | None], most_bytes: int = 10**9) -> None:
        super().__init__(daemon=True)
        self.target = target
        self.answers = answers
        self.heartbeat = b""  # what answers one, if anything
        self.seen = 0
        import http.server

        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen += 1
                is_heartbeat = "heartbeat" in self.path
                status = outer.answers.pop(0) if outer.answers and not is_heartbeat else 0
                if status is None:  # done, but the answer is lost
                    requests.put(outer.target + self.path, data=body, timeout=30)
                    self.close_connection = True
                    return
                content = b'{"error": "told to refuse"}'
                if len(body) > most_bytes:
                    status, content = 413, b"<html>413 Request Entity Too Large</html>"
                if is_heartbeat and outer.heartbeat:
                    status, content = 200, outer.heartbeat
                if status == 0:
                    answer = requests.put(outer.target + self.path, data=body, timeout=30)
                    status, content = answer.status_code, answer.content
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def run(self) -> None:
        self.server.serve_forever(0.1)


def test_reports_are_repeated_through_errors_and_lost_answers(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    door = Refusing(stack.url, [500, None, 429, 404, None, 503])
    door.start()
    stack.consumer(PRODUCER_URL=door.url, **handler(runs))
    ids = stack.create("a", "b fail", "c")
    stack.wait_ended()
    assert stack.counts() == {"success": 2, "error": 1}
    assert stack.runs(runs) == {"a": 1, "b fail": 1, "c": 1}
    assert len(ids) == 3 and door.seen > 6
    until(lambda: stack.unsettled() == {})
    door.server.shutdown()


@pytest.mark.parametrize(
    "answer", [b"[]", b"{}", b'{"now": 1, "held": [5], "stop": []}', b"<html>"]
)
def test_an_answer_to_a_heartbeat_that_is_none_holds_up_no_outcome(
    answer: bytes, stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    door = Refusing(stack.url, [])
    door.heartbeat = answer
    door.start()
    stack.consumer(PRODUCER_URL=door.url, **handler(runs))
    ids = stack.create("a", "b")
    stack.wait_status(ids, "success", timeout=20)
    door.server.shutdown()


def test_a_refused_report_does_not_hold_up_its_group(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    door = Refusing(stack.url, [400, 400])  # the group, then its first half
    door.start()
    stack.consumer(PRODUCER_URL=door.url, **handler(runs, PREFETCH=10))
    ids = stack.create(*[f"sleep=0.01 {index}" for index in range(10)])
    until(lambda: stack.unsettled() == {} and stack.counts().get("success", 0) >= 8)
    assert len(ids) == 10
    door.server.shutdown()


def test_a_413_of_a_proxy_splits_the_group_and_cuts_a_text(
    stack: Stack, runs: pathlib.Path
) -> None:
    """In HTML, as nginx answers what is over its client_max_body_size."""
    stack.producer()
    door = Refusing(stack.url, [], most_bytes=60_000)
    door.start()
    stack.consumer(PRODUCER_URL=door.url, **handler(runs, PREFETCH=50))
    texts = [f"bytes=9000 {index}" for index in range(40)]
    ids = stack.create(*texts, "bytes=65536", "scream=65536")
    stack.wait_ended()
    assert stack.counts() == {"success": 41, "error": 1}
    assert len(stack.get(ids[0])["result"]) == 9000
    assert len(stack.get(ids[-2])["result"]) == 32768
    assert set(stack.runs(runs).values()) == {1}
    door.server.shutdown()


def test_a_handler_that_returns_what_has_not_run_is_a_failure(stack: Stack) -> None:
    stack.producer()
    stack.consumer(HANDLER="handlers:lazy")
    ids = stack.create("a")
    stack.wait_status(ids, "error")
    assert "a generator that never ran" in stack.get(ids[0])["error"]


def test_rows_of_a_clock_that_was_ahead_end(stack: Stack, runs: pathlib.Path) -> None:
    """Sent a day in the future, one with its message and one without."""
    settings = {"SENT_TIMEOUT_SECONDS": 4}
    stack.producer(**settings).stop()
    stack.sql(
        "INSERT INTO tasks (text, status, sent_at)"
        " VALUES ('lost', 'sent', now() + interval '1 day')"
    )
    stack.producer(**settings)
    ids = stack.create("expires")
    stack.wait_status(ids, "sent")
    stack.sql("UPDATE tasks SET sent_at = now() + interval '1 day' WHERE text = 'expires'")
    until(lambda: stack.waiting("tasks.dlq") > 0, what="its message expires")
    began = time.monotonic()
    stack.consumer(**handler(runs, **settings))
    stack.wait_ended(timeout=30)
    assert time.monotonic() - began < 20
    assert stack.counts() == {"success": 2}


def test_a_report_before_the_dispatchers_commit_counts(stack: Stack) -> None:
    """The message is out, the row is still locked: the report waits for the COMMIT and is taken."""
    [task_id] = create_undispatched(stack)
    with contextlib.closing(psycopg2.connect(stack.database_url)) as dispatcher:
        cursor = dispatcher.cursor()
        cursor.execute("UPDATE tasks SET status = 'sent', sent_at = now(), attempt = attempt")
        answers: list[requests.Response] = []
        body = [{"taskId": task_id, "taskStatus": "success", "attempt": 1}]
        reporter = threading.Thread(target=lambda: answers.append(stack.put(body)))
        reporter.start()
        locks = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        until(lambda: stack.sql(locks)[0][0], what="the report waits for the row")
        assert not answers
        dispatcher.commit()
        reporter.join(10)
    assert answers[0].json() == {"updated": 1, "rejected": []}
    assert stack.get(task_id)["taskStatus"] == "success"


def test_a_row_locked_for_too_long_is_a_503_and_not_a_hang(stack: Stack) -> None:
    [task_id] = create_undispatched(stack)
    with contextlib.closing(psycopg2.connect(stack.database_url)) as other:
        other.cursor().execute("SELECT FROM tasks FOR UPDATE")
        began = time.monotonic()
        answer = stack.put(taskId=task_id, taskStatus="success")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert time.monotonic() - began < 10


def test_a_locked_row_holds_up_no_other_outcome_start_or_dead_letter(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    stack.consumer(**handler(runs, CONCURRENCY=3))
    ids = stack.create("sleep=2 a", "sleep=2 fail b")
    for text in ("sleep=2 a", "sleep=2 fail b"):
        started(stack, runs, text)
    with contextlib.closing(psycopg2.connect(stack.database_url)) as psql:
        psql.cursor().execute("SELECT FROM tasks WHERE id = ANY(%s::uuid[]) FOR UPDATE", (ids,))
        more = stack.create(*[f"sleep=0.1 {index}" for index in range(40)], "fail c")
        stack.wait_status(more[:-1], "success", timeout=60)
        stack.wait_status(more[-1:], "error", timeout=60)
        assert stack.get(ids[0])["taskStatus"] == "sent"
    stack.wait_ended(timeout=60)
    assert set(stack.runs(runs).values()) == {1}
    until(lambda: stack.unsettled() == {})


def test_a_stale_report_changes_nothing_and_its_message_is_acked(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    stack.consumer(**handler(runs))
    [task_id] = stack.create("sleep=4")
    started(stack, runs, "sleep=4")
    assert stack.put(taskId=task_id, taskStatus="error").json()["attempt"] == 2  # a cancel
    until(lambda: stack.unsettled() == {})
    task = stack.get(task_id)
    assert (task["taskStatus"], task["error"], task["result"]) == ("error", "cancelled", None)


def test_groups_in_opposite_orders_do_not_deadlock(api: Stack) -> None:
    ids = api.create(*map(str, range(200)))
    reports = [{"taskId": task_id, "attempt": 1} for task_id in ids]
    failures: list[str] = []

    def put(group: list[dict]) -> None:
        session = requests.Session()
        for _ in range(25):
            answer = session.put(f"{api.url}/api/v1/update-task-status", json=group, timeout=60)
            if answer.status_code != 200:
                failures.append(answer.text)

    threads = [
        threading.Thread(target=put, args=(group,))
        for group in (reports, reports[::-1], reports, reports[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert "deadlock" not in api.processes[0].log.read_text()


def test_copies_of_one_attempt_in_hand_run_once(stack: Stack, runs: pathlib.Path) -> None:
    producer = stack.producer()
    ids = stack.create("sleep=0.3 a", "sleep=0.3 b")
    stack.wait_status(ids, "sent")
    producer.stop()
    stack.sql("UPDATE tasks SET status = 'pending'")  # as if its COMMIT had been lost
    stack.producer()
    stack.wait_status(ids, "sent")
    until(lambda: stack.waiting() == 4)
    stack.consumer(**handler(runs, PREFETCH=10))
    stack.wait_status(ids, "success")
    until(lambda: stack.unsettled() == {})
    assert stack.runs(runs) == {"sleep=0.3 a": 1, "sleep=0.3 b": 1}


def test_a_failed_attempt_is_retried_after_its_pause(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer(MAX_ATTEMPTS=3, RETRY_SECONDS=1)
    stack.consumer(HANDLER="handlers:fail_twice", RUNS=runs)
    began = time.monotonic()
    [task_id] = stack.create("third time lucky")
    stack.wait_status([task_id], "success")
    assert 3 <= time.monotonic() - began < 30  # 1 s, then 2 s
    task = stack.get(task_id)
    assert (task["attempt"], task["result"], task["error"]) == (3, "run 3", None)


def test_the_last_failure_is_final_until_an_operator_says_otherwise(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer(MAX_ATTEMPTS=2, RETRY_SECONDS=0.2)
    stack.consumer(HANDLER="handlers:fail_twice", RUNS=runs)
    [task_id] = stack.create("a")
    stack.wait_status([task_id], "error")
    assert stack.get(task_id)["error"] == "ValueError: run 2"
    assert stack.put(taskId=task_id, taskStatus="pending").status_code == 200
    stack.wait_status([task_id], "success")


def test_a_recorded_success_whose_ack_was_lost_is_not_run_again(
    own: Stack, runs: pathlib.Path, proxy: Any
) -> None:
    link = proxy(own.rabbit.port)
    url = f"amqp://tasks:tasks@127.0.0.1:{link.port}/%2F"
    own.producer()
    own.consumer(RABBITMQ_URL=url, **handler(runs))
    own.wait_status(own.create("warm up"), "success")
    ids = own.create("sleep=1")
    started(own, runs, "sleep=1")
    link.frozen.set()  # the ack cannot get out
    own.wait_status(ids, "success")
    link.cut()
    link.frozen.clear()
    until(lambda: own.unsettled() == {})
    assert own.runs(runs)["sleep=1"] == 1


def test_neither_a_long_task_nor_a_slow_queue_is_run_twice(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer(SENT_TIMEOUT_SECONDS=4)
    ids = stack.create("sleep=9 long", *[f"sleep=1 {index}" for index in range(12)])
    stack.wait_status(ids, "sent")
    stack.consumer(**handler(runs, SENT_TIMEOUT_SECONDS=4, CONCURRENCY=2))
    stack.wait_status(ids, "success", timeout=90)
    assert set(stack.runs(runs).values()) == {1}
    until(lambda: stack.unsettled() == {})
    assert "rescued" not in stack.processes[0].log.read_text()


def test_a_task_longer_than_the_brokers_consumer_timeout_ends(
    server_classes: tuple, postgres: Any, tmp_path: pathlib.Path, runs: pathlib.Path
) -> None:
    """The broker closes the channel under it; the copy that comes back joins the one that runs."""
    rabbit = server_classes[1](tmp_path / "rabbit")
    rabbit.start()
    for name, value in (("channel_tick_interval", 1000), ("consumer_timeout", 3000)):
        rabbit.ctl("eval", f"application:set_env(rabbit, {name}, {value}).")
    stack = Stack(postgres, rabbit, tmp_path)
    try:
        stack.producer()
        stack.consumer(**handler(runs))
        ids = stack.create("sleep=10", "after")
        stack.wait_status(ids, "success")
        assert stack.runs(runs) == {"sleep=10": 1, "after": 1}
        until(lambda: stack.unsettled() == {})
    finally:
        stack.close(queues=False)
        rabbit.stop()


def test_sigterm_finishes_and_reports_what_runs_and_gives_back_the_rest(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, PREFETCH=10))
    ids = stack.create(*[f"sleep=1 {index}" for index in range(8)])
    until(lambda: stack.runs(runs))
    assert consumer.stop(20) == 0
    done = stack.counts().get("success", 0)
    assert done == sum(stack.runs(runs).values()) in (1, 2)
    until(lambda: stack.waiting() == 8 - done)
    stack.consumer(**handler(runs, CONCURRENCY=4))
    stack.wait_status(ids, "success")
    assert set(stack.runs(runs).values()) == {1}


def test_consumers_that_come_and_go_run_everything_once(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    ids = stack.create(*[f"sleep=0.002 {index}" for index in range(2000)])
    consumers = [stack.consumer(**handler(runs)) for _ in range(2)]
    for round_ in range(6):
        time.sleep(1)
        leaver = consumers[round_ % 2]
        until(lambda leaver=leaver: "connected" in leaver.log.read_text())
        assert leaver.stop() == 0
        consumers[round_ % 2] = stack.consumer(**handler(runs))
    stack.wait_status(ids, "success", timeout=120)
    assert set(stack.runs(runs).values()) == {1}
    assert len(stack.runs(runs)) == 2000


def test_a_producer_stopped_under_load_answers_what_it_took(stack: Stack) -> None:
    producer = stack.producer()
    taken: list[str] = []
    strange: list[str] = []

    def create() -> None:
        session = requests.Session()
        with contextlib.suppress(requests.ConnectionError):
            while True:
                answer = session.post(
                    f"{stack.url}/api/v1/create-task", json={"text": "a"}, timeout=30
                )
                if answer.status_code != 201:
                    strange.append(answer.text)
                    return
                taken.append(answer.json()["taskId"])

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert producer.stop(20) == 0
    for thread in threads:
        thread.join()
    assert strange == []
    found = stack.sql("SELECT count(*) FROM tasks WHERE id = ANY(%s::uuid[])", taken)
    assert found == [(len(taken),)] and len(taken) > 50


def test_run_at_holds_a_task_back(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    stack.consumer(**handler(runs))
    [(now,)] = stack.sql("SELECT now() + interval '6 seconds'")
    later = stack.create("later", runAt=now.isoformat())
    sooner = stack.create("sooner")
    stack.wait_status(sooner, "success")
    assert stack.get(later[0])["taskStatus"] == "pending"
    stack.wait_status(later, "success")
    [(lag,)] = stack.sql(
        "SELECT extract(epoch FROM finished_at - run_at)::float8 FROM tasks WHERE text = 'later'"
    )
    assert 0 <= lag < 10


def test_a_million_delayed_tasks_cost_the_pick_nothing(stack: Stack) -> None:
    stack.producer()
    stack.sql(
        "INSERT INTO tasks (text, delayed, run_at)"
        " SELECT 'held', true, now() + interval '1 day' FROM generate_series(1, 1000000)"
    )
    ids = stack.create("now")
    stack.wait_status(ids, "sent", timeout=30)
    plan = stack.sql(
        "SET enable_seqscan = off; EXPLAIN SELECT id FROM tasks WHERE status ="
        " 'pending' AND NOT delayed AND pick >= 0.5 ORDER BY pick LIMIT 500"
    )
    assert "tasks_pending" in str(plan)
    [(pages,)] = stack.sql("SELECT pg_relation_size('tasks_pending') / 8192")
    assert pages < 10


def test_the_queue_stays_within_its_limit_and_one_batch(stack: Stack) -> None:
    stack.producer(QUEUE_LIMIT=1000)
    stack.consumer(PREFETCH=1, PROCESSING_SECONDS=600)
    for _ in range(10):
        stack.create(*["x"] * 10_000)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        assert stack.waiting() <= 1500
    until(lambda: 999 <= stack.waiting() <= 1500)
    assert stack.counts()["sent"] <= 1501


def test_a_database_that_refuses_writes_is_a_503_until_it_takes_them(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    stack.consumer(**handler(runs))
    ids = stack.create("sleep=1 a", "sleep=1 b")
    started(stack, runs, "sleep=1 a")
    stack.sql(f"ALTER DATABASE {stack.database} SET default_transaction_read_only = on")
    stack.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    answer = requests.post(f"{stack.url}/api/v1/create-task", json={"text": "a"}, timeout=60)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "read-only" in answer.json()["error"]
    stack.administer(f"ALTER DATABASE {stack.database} RESET default_transaction_read_only")
    stack.wait_status(ids, "success")
    assert set(stack.runs(runs).values()) == {1}
    until(lambda: stack.waiting() == 0)


def test_old_ended_tasks_are_deleted_and_others_kept(stack: Stack) -> None:
    stack.producer(RETENTION_DAYS=1)
    old, new, pending = stack.create("old", "new", "pending")
    for task_id in (old, new):
        assert stack.put(taskId=task_id, taskStatus="success").status_code == 200
    stack.sql("UPDATE tasks SET finished_at = now() - interval '2 days' WHERE id = %s", old)
    until(lambda: sum(stack.counts().values()) == 2)
    assert stack.get(new)["taskStatus"] == "success"
    assert stack.get(pending)["taskStatus"] in ("pending", "sent")


def test_a_sweep_that_fails_stops_neither_release_nor_rescue(
    stack: Stack, runs: pathlib.Path
) -> None:
    settings = {"SENT_TIMEOUT_SECONDS": 4, "RETENTION_DAYS": 1}
    stack.producer(**settings).stop()
    stack.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE 'this table is an archive'; END $$;"
        "CREATE TRIGGER keep BEFORE DELETE ON tasks FOR EACH ROW EXECUTE FUNCTION refuse();"
        "INSERT INTO tasks (text, status, delayed, run_at, sent_at, finished_at) VALUES"
        " ('old', 'success', false, NULL, NULL, now() - interval '2 days'),"
        " ('due', 'pending', true, now(), NULL, NULL),"
        " ('lost', 'sent', false, NULL, now() - interval '1 hour', NULL)"
    )
    producer = stack.producer(**settings)
    stack.consumer(**handler(runs, **settings))
    stack.wait_ended(timeout=60)
    assert stack.runs(runs) == {"due": 1, "lost": 1}
    assert "old tasks are not deleted" in producer.log.read_text()
