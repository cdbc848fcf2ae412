"""The operator's calls over real PostgreSQL and RabbitMQ: lists, actions on many tasks, pause,
waiting, statistics, metrics, and who may call."""

import base64
import concurrent.futures
import datetime
import json
import os
import re
import signal
import threading
import time
import uuid
from typing import Any

import psycopg2
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

import bulk
import database
import pool
import task_list
from tests.stack import Stack, run_sql, until

TASK = "d5474d4e-0069-4601-98d4-742e54cc4fe3"
REASONS = ("KeyError: 'price'", "HTTP 502 from the shop", "timed out after 5 s")


def call(stack: Stack, name: str, body: Any = None, **query: Any) -> requests.Response:
    """POST a body, or GET with a query."""
    url = f"{stack.url}/api/v1/{name}"
    if body is None:
        return stack.session.get(url, params=query, timeout=90)
    return stack.session.post(url, json=body, timeout=90)


def pages(stack: Stack, limit: int = 7, **query: Any) -> list[dict]:
    """Return the tasks of all pages of a list."""
    tasks: list[dict] = []
    query["limit"] = limit
    while True:
        answer = call(stack, "list-tasks", **query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["tasks"]) <= limit
        tasks += page["tasks"]
        if page["next"] is None:
            return tasks
        query = {"cursor": page["next"], "limit": limit}


def insert(stack: Stack, count: int, status: str, error: str | None = None) -> None:
    """Put rows into the table, the later ones with the later times; they are nobody's."""
    ended = "now() - interval '1 hour' + number * interval '1 second'"
    stack.sql(
        "INSERT INTO tasks (id, text, status, error, created_at, finished_at, sent_at, lease_until)"
        " SELECT gen_random_uuid(), 'number ' || number, %s, %s, now() - interval '2 hours',"
        f" CASE WHEN %s IN ('success', 'error') THEN {ended} END, now(),"
        " CASE WHEN %s = 'sent' THEN now() + interval '1 hour' END"
        " FROM generate_series(1, %s) AS number",
        *(status, error, status, status, count),
    )


def cursor(status: str, key: Any) -> str:
    """Return what a list could answer as `next`."""
    fields = [status, None, None, None, key, TASK]
    data = json.dumps(["list-tasks", *fields]).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.fixture
def idle(stack: Stack) -> Stack:
    """A project whose dispatch is paused: rows stay as a test has made them."""
    stack.producer()
    assert call(stack, "pause", {}).json()["paused"] is True
    return stack


@pytest.mark.parametrize("status", ["success", "error", "sent", "pending", "delayed"])
def test_a_list_shows_every_task_of_a_status_once_in_its_order(idle: Stack, status: str) -> None:
    for each in ("success", "error", "sent", "pending"):
        insert(idle, 30, each, error="boom" if each == "error" else None)
    idle.create(*("later" for _ in range(30)), runAt="2099-01-01T00:00:00Z")
    tasks = pages(idle, status=status)
    assert len({task["taskId"] for task in tasks}) == len(tasks) == 30
    expected = "pending" if status == "delayed" else status
    assert {task["taskStatus"] for task in tasks} == {expected}
    if status in ("success", "error"):
        times = [task["finishedAt"] for task in tasks]
        assert times == sorted(times, reverse=True)
    if status == "sent":
        assert [task["taskId"] for task in tasks] == sorted(task["taskId"] for task in tasks)
    assert ("history" in tasks[0]) is False


def test_rows_of_the_same_moment_are_listed_once_each(idle: Stack) -> None:
    insert(idle, 40, "error", error="x")
    idle.sql("UPDATE tasks SET finished_at = '2026-01-01T00:00:00Z'")
    assert len({task["taskId"] for task in pages(idle, 3, status="error")}) == 40


def test_a_filter_means_what_it_says_and_its_texts_are_not_patterns(idle: Stack) -> None:
    for error in ("100% wrong", "100x wrong", "a_b", "aXb", None):
        insert(idle, 3, "error", error=error)
    assert len(pages(idle, status="error", error="100% ")) == 3
    assert len(pages(idle, status="error", error="a_")) == 3
    assert len(pages(idle, status="error", error="100")) == 6
    assert len(pages(idle, status="ошибка")) == 15
    middle = pages(idle, status="error")[4]["finishedAt"]
    assert len(pages(idle, status="error", **{"from": middle})) == 5
    assert len(pages(idle, status="error", to=middle)) == 10


def test_a_list_cuts_texts_and_reads_a_bounded_number_of_rows(idle: Stack) -> None:
    insert(idle, 45_000, "error", error="common")
    idle.sql("UPDATE tasks SET error = 'rare', text = repeat('x', 5000) WHERE text = 'number 1'")
    answer = call(idle, "list-tasks", status="error", error="rare").json()
    assert (answer["tasks"], answer["next"] is not None) == ([], True)
    [rare] = pages(idle, status="error", error="rare")
    assert rare["text"] == "x" * 200


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "status: expected one of pending, delayed, sent, success, error, got None"),
        ({"status": "done"}, "status: expected one of"),
        ({"status": "error", "limit": "0"}, "limit: expected 1 to 1000, got '0'"),
        ({"status": "error", "limit": "ten"}, "limit: expected"),
        ({"status": "error", "from": "yesterday"}, "from: expected ISO 8601"),
        ({"status": "error", "error": "\0"}, "error: expected no NUL"),
        ({"cursor": "nonsense"}, "cursor: expected the `next` of an earlier answer"),
        ({"cursor": "W10"}, "cursor: expected"),
        ({"cursor": cursor("pending", 10**400)}, "cursor: expected"),
        ({"cursor": cursor("pending", 0.5), "status": "done"}, "status: expected one of"),
        ({"cursor": cursor("pending", 0.5), "from": "yesterday"}, "from: expected ISO 8601"),
    ],
)
def test_a_bad_list_query_says_what_was_expected(idle: Stack, query: dict, expected: str) -> None:
    answer = call(idle, "list-tasks", **query)
    assert answer.status_code == 400 and answer.json()["error"].startswith(expected), answer.text


def test_retrying_a_reason_retries_what_was_seen_and_nothing_else(idle: Stack) -> None:
    for reason in REASONS:
        insert(idle, 1200, "error", error=reason)
    insert(idle, 5, "success")
    before = datetime.datetime.now(datetime.UTC).isoformat()
    body = {"status": "error", "error": REASONS[0], "before": before}
    assert call(idle, "retry-tasks", body | {"dryRun": True}).json() == {
        "matched": 1200, "changed": 0, "next": None,
    }  # fmt: skip
    late = idle.sql(
        "UPDATE tasks SET finished_at = now() + interval '1 hour' WHERE id IN"
        " (SELECT id FROM tasks WHERE error = %s LIMIT 3) RETURNING id",
        REASONS[0],
    )
    answer = call(idle, "retry-tasks", body).json()
    assert answer == {"matched": 1197, "changed": 1197, "next": None}
    assert idle.counts() == {"pending": 1197, "error": 3 + 2400, "success": 5}
    assert {idle.get(task_id)["taskStatus"] for (task_id,) in late} == {"error"}
    task = idle.get(pages(idle, status="pending")[0]["taskId"])
    assert (task["attempt"], task["history"][0]["outcome"]) == (2, "retried")
    assert "retry-tasks of all tasks" in idle.processes[0].log.read_text()


def test_actions_by_id_change_only_what_has_the_right_status(idle: Stack) -> None:
    insert(idle, 2, "error", error="x")
    insert(idle, 2, "success")
    insert(idle, 2, "sent")
    waiting = idle.create("a", "b")
    ids = [task_id for (task_id,) in idle.sql("SELECT id FROM tasks")] + [str(uuid.uuid4())]
    assert call(idle, "retry-tasks", {"taskIds": ids}).json()["changed"] == 2
    assert idle.counts() == {"pending": 4, "success": 2, "sent": 2}
    assert call(idle, "cancel-tasks", {"taskIds": ids, "dryRun": True}).json()["matched"] == 6
    assert call(idle, "cancel-tasks", {"taskIds": ids * 2}).json()["changed"] == 6
    assert idle.counts() == {"error": 6, "success": 2}
    task = idle.get(waiting[0])
    assert (task["error"], task["history"][0]["outcome"]) == ("cancelled", "cancelled")


def test_cancelling_by_filter_takes_each_status_by_its_name(idle: Stack) -> None:
    insert(idle, 3, "sent")
    idle.create("now")
    idle.create("later", runAt="2099-01-01T00:00:00Z")
    assert call(idle, "cancel-tasks", {"status": "delayed"}).json()["changed"] == 1
    assert call(idle, "cancel-tasks", {"status": "pending"}).json()["changed"] == 1
    old = {"before": "2020-01-01T00:00:00Z"}
    assert call(idle, "cancel-tasks", {"status": "sent", **old}).json()["changed"] == 0
    assert call(idle, "cancel-tasks", {"status": "sent"}).json()["changed"] == 3


def test_a_locked_row_holds_up_no_other_of_an_action(idle: Stack) -> None:
    insert(idle, 1500, "error", error="x")
    session = psycopg2.connect(idle.database_url)
    session.cursor().execute("SELECT id FROM tasks LIMIT 1 FOR UPDATE")
    began = time.monotonic()
    answer = call(idle, "retry-tasks", {"status": "error"}).json()
    assert (answer["matched"], answer["changed"]) == (1500, 1499)
    assert time.monotonic() - began < 5
    session.close()


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("retry-tasks", [], "expected {"),
        ("retry-tasks", {}, "expected {"),
        ("retry-tasks", {"taskIds": []}, "taskIds: expected 1 to 10000 ids"),
        ("retry-tasks", {"taskIds": ["x"]}, "taskIds: expected a UUID"),
        ("retry-tasks", {"status": "success"}, "status: expected one of error, got 'success'"),
        ("cancel-tasks", {"status": "error"}, "status: expected one of pending, delayed, sent"),
        ("cancel-tasks", {"status": "sent", "before": "now"}, "before: expected ISO 8601"),
        ("cancel-tasks", {"status": "sent", "dryRun": 1}, "dryRun: expected true or false"),
        ("cancel-tasks", {"status": "sent", "dryrun": True}, "expected only taskIds, status"),
        ("cancel-tasks", {"cursor": "x"}, "cursor: expected"),
        ("cancel-tasks", {"cursor": cursor("pending", 10**400)}, "cursor: expected"),
        ("cancel-tasks", {"cursor": cursor("sent", TASK), "before": "now"}, "before: expected"),
    ],
)
def test_a_bad_action_says_what_was_expected(
    idle: Stack, name: str, body: Any, expected: str
) -> None:
    answer = call(idle, name, body)
    assert answer.status_code == 400 and answer.json()["error"].startswith(expected), answer.text


def test_a_pause_stops_the_dispatch_of_all_producers_and_outlives_them(idle: Stack) -> None:
    idle.consumer()
    other = idle.producer(ready=False, HTTP_PORT=0)
    until(lambda: "connected" in other.log.read_text(), what="a second producer")
    ids = idle.create(*("x" for _ in range(20)))
    time.sleep(2.5)  # two walks of the index
    assert idle.counts() == {"pending": 20}
    assert call(idle, "get-stats").json()["health"]["dispatcher"] == "paused"
    idle.processes[0].kill()
    idle.producer()
    assert call(idle, "get-stats").json()["paused"] is True
    assert idle.counts() == {"pending": 20}
    assert call(idle, "resume", {}).json() == {"paused": False, "pausedAt": None}
    idle.wait_status(ids, "success")


def test_a_client_that_waits_hears_of_the_end_at_once(stack: Stack) -> None:
    stack.producer()
    [task_id] = stack.create("x")
    began = time.monotonic()
    task = call(stack, "get-task-data", taskId=task_id, wait=1).json()
    assert task["taskStatus"] in ("pending", "sent") and 0.9 < time.monotonic() - began < 5
    with concurrent.futures.ThreadPoolExecutor() as clients:
        waits = [
            clients.submit(call, stack, "get-task-data", taskId=task_id, wait=60) for _ in range(20)
        ]
        time.sleep(0.5)
        assert not any(each.done() for each in waits)
        connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        assert run_sql(stack.postgres.url, connections, stack.database)[0][0] < 12
        ended = time.monotonic()
        stack.put(taskId=task_id, taskStatus="success")
        assert {each.result().json()["taskStatus"] for each in waits} == {"success"}
        assert time.monotonic() - ended < 5
    assert call(stack, "get-task-data", taskId=task_id, wait=60).json()["taskStatus"] == "success"
    assert call(stack, "get-task-data", taskId=str(uuid.uuid4()), wait=9).status_code == 404
    for bad in ("-1", "61", "x", "nan", "1_0"):
        assert call(stack, "get-task-data", taskId=task_id, wait=bad).status_code == 400


def test_waiting_clients_take_no_place_of_others_and_give_theirs_back(stack: Stack) -> None:
    stack.producer(HTTP_CONNECTIONS=8)
    [task_id] = stack.create("x")
    answers: list[int] = []

    def wait() -> None:
        url = f"{stack.url}/api/v1/get-task-data"
        query = {"taskId": task_id, "wait": 60}
        answers.append(requests.get(url, params=query, timeout=90).status_code)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: answers == [503], what="the fifth one is refused")
    assert call(stack, "get-stats").status_code == 200
    assert stack.processes[0].stop(10) == 0  # all are let go at a stop
    for thread in threads:
        thread.join(10)
    assert sorted(answers) == [200, 200, 200, 200, 503]


def test_a_client_that_hangs_up_is_not_waited_for(stack: Stack) -> None:
    stack.producer(HTTP_CONNECTIONS=2)
    [task_id] = stack.create("x")
    for _ in range(5):  # one may wait at a time
        with pytest.raises(requests.Timeout):
            stack.session.get(
                f"{stack.url}/api/v1/get-task-data",
                params={"taskId": task_id, "wait": 60},
                timeout=0.5,
            )
        until(lambda: call(stack, "get-task-data", taskId=task_id, wait=0.01).status_code == 200)


def test_the_history_says_what_became_of_each_attempt(stack: Stack) -> None:
    stack.producer(MAX_ATTEMPTS=2, RETRY_SECONDS=0.2)
    stack.consumer(HANDLER="handlers:note", RUNS=stack.folder / "runs")
    [task_id] = stack.create("fail")
    stack.wait_status([task_id], "error")
    task = stack.get(task_id)
    assert [each["attempt"] for each in task["history"]] == [1, 2]
    for element in task["history"]:
        assert list(element) == [
            "attempt", "outcome", "error", "consumer", "startedAt", "seconds", "at",
        ]  # fmt: skip
        assert element["outcome"] == "failed" and element["error"] == task["error"]
        assert element["consumer"] and element["startedAt"].endswith("Z")
        assert 0 <= element["seconds"] < 10
    stack.put(taskId=task_id, taskStatus="pending")
    stack.wait_status([task_id], "error")
    outcomes = [each["outcome"] for each in stack.get(task_id)["history"]]
    assert outcomes == ["failed", "failed", "retried", "failed", "failed"]
    call(stack, "pause", {})
    for _ in range(10):
        stack.put(taskId=task_id, taskStatus="pending")
        stack.put(taskId=task_id, taskStatus="error", error="e" * 1000)
    history = stack.get(task_id)["history"]
    assert len(history) == 20 and history[-1]["error"] == "e" * 500


def test_a_success_says_when_where_and_how_long_it_ran(stack: Stack) -> None:
    stack.producer()
    stack.consumer(PROCESSING_SECONDS=0.5)
    [task_id] = stack.create("x")
    stack.wait_status([task_id], "success")
    task = stack.get(task_id)
    assert 0.4 < task["seconds"] < 3 and task["host"] and task["history"] is None
    times = [task[name] for name in ("createdAt", "startedAt", "finishedAt")]
    assert times == sorted(times)
    report = {
        "taskId": stack.create("y")[0], "taskStatus": "success", "attempt": 1,
        "startedAt": "2026-01-02T03:04:05+02:00", "seconds": 1.5, "host": "elsewhere",
    }  # fmt: skip
    assert stack.put([report]).json()["updated"] == 1
    task = stack.get(report["taskId"])
    assert (task["startedAt"], task["seconds"], task["host"]) == (
        "2026-01-02T01:04:05Z", 1.5, "elsewhere",
    )  # fmt: skip


def test_the_statistics_show_what_runs_where_and_what_fails(stack: Stack) -> None:
    stack.producer()
    insert(stack, 12_000, "success")
    for count, reason in zip((40, 20, 10), REASONS, strict=True):
        insert(stack, count, "error", error=reason)
    stack.consumer(HANDLER="handlers:nap", CONCURRENCY=2)
    stuck, _ = stack.create("60", "0.01")

    def running() -> list[dict]:
        consumers = call(stack, "get-stats").json()["consumers"] or []
        return [task for each in consumers for task in each["tasks"]]

    [task] = until(running, what="the heartbeat names the long task")
    assert (task["taskId"], task["state"]) == (stuck, "running")
    stats = call(stack, "get-stats").json()
    assert stats["counts"]["success"] == "10000+" and stats["counts"]["error"] == 70
    assert [(each["error"], each["count"]) for each in stats["errors"]] == [
        (REASONS[0], 40), (REASONS[1], 20), (REASONS[2], 10),
    ]  # fmt: skip
    [consumer] = stats["consumers"]
    assert (consumer["concurrency"], consumer["busy"], consumer["inFlight"]) == (2, 1, 1)
    assert stats["queues"] == {"tasks": 0, "tasks.dlq": 0}
    assert stats["health"] == {"database": "ok", "broker": "ok", "dispatcher": "ok"}
    assert stats["windows"]["5"]["created"] == 2 and stats["windows"]["60"]["success"] == 1
    assert stats["windows"]["5"]["run"]["p50"] < 1
    assert (
        len(stats["minutes"]) == 60
        and stats["minutes"][-1]["created"] + stats["minutes"][-2]["created"] == 2
    )
    until(lambda: stack.sql("SELECT sum(created) FROM minutes") == [(2,)], what="a minute")


def test_many_different_reasons_are_folded_to_prefixes_that_filter(stack: Stack) -> None:
    stack.producer()
    stack.sql(
        "INSERT INTO tasks (text, status, error, finished_at)"
        " SELECT 'x', 'error', 'no order ' || number, now() FROM generate_series(1, 300) AS number"
    )
    insert(stack, 50, "error", error=REASONS[0])
    reason, common = call(stack, "get-stats").json()["errors"]
    assert (reason["error"], reason["count"]) == ("no order ", 300)
    assert (common["error"], common["count"]) == (REASONS[0], 50)
    assert len(pages(stack, 1000, status="error", error=reason["error"])) == 300


def test_metrics_are_well_formed_and_count_what_happens(stack: Stack) -> None:
    stack.producer(MAX_ATTEMPTS=2, RETRY_SECONDS=0.1)

    def read() -> dict[tuple, float]:
        text = stack.session.get(f"{stack.url}/metrics").text
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = read()
    assert before["tasks_created_total",] == before["tasks_retries_total",] == 0
    for status in ("success", "error"):
        assert before["tasks_ended_total", ("status", status)] == 0
    stack.consumer(FAILURE_RATE=1)
    ids = stack.create("a", "b", "c")
    stack.wait_status(ids, "error")
    time.sleep(1.1)  # the gauges are at most a second old
    after = until(lambda: read().get(("tasks_consumers",)) == 1 and read(), what="a consumer")
    assert after["tasks_created_total",] == 3 and after["tasks_retries_total",] == 3
    assert after["tasks_ended_total", ("status", "error")] == 3
    assert after["tasks_current", ("status", "error")] == 3
    assert after["tasks_current", ("status", "pending")] == 0
    assert after["tasks_workers",] == 1 and after["tasks_oldest_pending_seconds",] == 0
    assert abs(after["tasks_dispatcher_last_turn_timestamp_seconds",] - time.time()) < 15
    assert after["tasks_broker_messages", ("queue", "tasks.dlq")] == 0
    route = ("route", "/api/v1/create-task")
    assert after["http_request_duration_seconds_count", ("code", "201"), route] == 1
    buckets = sorted(
        (float(dict(labels)["le"]), value)
        for (name, *labels), value in after.items()
        if name == "tasks_run_seconds_bucket"
    )
    assert [value for _, value in buckets] == sorted(value for _, value in buckets)
    assert buckets[-1] == (float("inf"), 6)


def test_a_token_for_reading_reads_and_does_nothing_else(stack: Stack) -> None:
    stack.producer(API_TOKEN="all", READ_TOKEN="some")
    urls = ["/api/v1/get-stats", "/api/v1/list-tasks?status=error", "/metrics", "/openapi.json"]
    for url in urls:
        assert requests.get(stack.url + url).status_code == 401
        for token in ("some", "all"):
            headers = {"Authorization": f"Bearer {token}"}
            assert requests.get(stack.url + url, headers=headers).status_code == 200
    for token, expected in (("none", 401), ("", 401), ("some", 403), ("all", 200)):
        headers = {"Authorization": f"Bearer {token}"}
        answer = requests.post(f"{stack.url}/api/v1/pause", headers=headers)
        assert answer.status_code == expected, answer.text
    stats = f"{stack.url}/api/v1/get-stats"
    for token, expected in (("some", True), ("all", False)):
        answer = requests.get(stats, headers={"Authorization": f"Bearer {token}"})
        assert answer.json()["readOnly"] is expected
    assert requests.get(stack.url + "/").status_code == 200
    assert requests.get(stack.url + "/healthz").status_code == 200


@pytest.mark.parametrize("tokens", [{}, {"API_TOKEN": "some"}])
def test_a_token_for_reading_alone_is_refused_at_start(stack: Stack, tokens: dict) -> None:
    producer = stack.start("producer", READ_TOKEN="some", **tokens)
    until(lambda: producer.poll() is not None, what="the producer ends")
    assert producer.poll() == 2
    assert "READ_TOKEN is not valid: expected" in producer.log.read_text()


def test_pages_of_other_sites_are_refused(stack: Stack) -> None:
    stack.producer(ALLOWED_HOSTS="tasks.example, producer")
    host = f"127.0.0.1:{stack.port}"
    url = f"{stack.url}/api/v1/create-task"

    def post(**headers: str) -> int:
        return requests.post(url, json={"text": "x"}, headers=headers).status_code

    assert post(Origin=f"http://{host}") == 201
    assert post(Origin="http://tasks.example", Host="tasks.example") == 201
    assert post(Origin="https://tasks.example", Host="tasks.example:443") == 201
    for origin in ("null", "", "http://evil.example", f"http://127.0.0.1:{stack.port + 1}"):
        assert post(Origin=origin) == 403, origin
    for known in ("localhost", f"LOCALHOST:{stack.port}", "[::1]:80", "10.0.0.1", "producer:8080"):
        assert post(Host=known) == 201, known
    for unknown in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "consumer"):
        assert post(Host=unknown) == 403, unknown
        assert requests.get(stack.url, headers={"Host": unknown}).status_code == 403
        assert requests.get(f"{stack.url}/healthz", headers={"Host": unknown}).status_code == 200


def test_the_console_comes_with_a_policy_that_allows_it_alone(api: Stack) -> None:
    answer = api.session.get(api.url)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert len(answer.content) < 60_000
    assert not re.search(rb"(src|href)=\"?https?:|innerHTML|@import|url\(http", answer.content)


def test_the_contract_names_every_call_and_no_other(api: Stack) -> None:
    paths = api.session.get(f"{api.url}/openapi.json").json()["paths"]
    named = {(method.upper(), path) for path, calls in paths.items() for method in calls}
    answer = api.session.get(f"{api.url}/api/v1/nothing")
    listed = answer.json()["error"].partition("expected one of ")[2].split(", ")
    assert named == {tuple(each.split(" ")) for each in listed}


def test_old_tasks_are_deleted_along_their_indexes(stack: Stack) -> None:
    stack.producer(RETENTION_DAYS=1)
    insert(stack, 12_000, "success")
    insert(stack, 100, "error")
    insert(stack, 3, "pending")
    stack.sql("UPDATE tasks SET finished_at = finished_at - interval '2 days' WHERE random() < 0.9")
    old = "SELECT count(*) FROM tasks WHERE finished_at < now() - interval '1 day'"
    until(lambda: stack.sql(old) == [(0,)], timeout=90, what="old tasks are gone")
    young = "SELECT count(*) FROM tasks WHERE finished_at > now() - interval '1 day'"
    assert 0 < stack.sql(young)[0][0] < 3000


def test_a_run_that_took_too_long_is_told_from_one_that_failed(stack: Stack) -> None:
    stack.producer()
    stack.consumer(HANDLER="handlers:nap")
    [task_id] = stack.create("30", timeoutSeconds=0.5)
    stack.wait_status([task_id], "error")
    [element] = stack.get(task_id)["history"]
    assert (element["outcome"], element["error"]) == ("timed out", "timed out after 0.5 s")
    assert 0.4 < element["seconds"] < 10
    assert "tasks_timed_out_total 1" in stack.session.get(f"{stack.url}/metrics").text


def test_a_repeated_create_is_counted_once(api: Stack) -> None:
    task = {"text": "x", "taskId": str(uuid.uuid4())}
    for body in (task, task, [task, {"text": "y"}]):
        assert call(api, "create-task", body).status_code == 201
    assert "tasks_created_total 2" in api.session.get(f"{api.url}/metrics").text


def test_a_frozen_database_holds_up_neither_statistics_nor_metrics(stack: Stack) -> None:
    stack.producer()
    assert call(stack, "get-stats").status_code == 200
    backend = (
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND query LIKE '%%statement_timeout%%'"
    )
    pids = [pid for (pid,) in run_sql(stack.postgres.url, backend, stack.database)]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(1.1)  # what was read is old by then
        began = time.monotonic()
        assert call(stack, "get-stats").status_code == 503
        text = stack.session.get(f"{stack.url}/metrics").text
        assert "tasks_created_total 0" in text and "tasks_broker_messages{" in text
        assert "tasks_current{" not in text
        assert time.monotonic() - began < 9
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    until(lambda: call(stack, "get-stats").status_code == 200, what="it answers again")


def test_a_fresh_service_has_statistics(api: Stack) -> None:
    stats = call(api, "get-stats").json()
    assert set(stats["windows"]["5"]) == set(stats["windows"]["60"])
    assert stats["windows"]["5"]["run"] == {"p50": None, "p95": None}
    assert len(stats["minutes"]) == 60 and stats["errors"] == stats["consumers"] == []


def test_an_action_goes_on_with_its_own_cursor_only(idle: Stack) -> None:
    insert(idle, 20, "error", error="x")
    cursor = call(idle, "list-tasks", status="error", limit=5).json()["next"]
    answer = call(idle, "retry-tasks", {"status": "error", "cursor": cursor})
    assert answer.status_code == 400 and answer.json()["error"].startswith("cursor: expected")
    assert call(idle, "retry-tasks", {"error": ""}).status_code == 400
    assert idle.counts() == {"error": 20}


def test_an_action_that_takes_long_goes_on_where_it_stopped(idle: Stack, monkeypatch: Any) -> None:
    insert(idle, 3500, "error", error="x")
    insert(idle, 100, "error", error="other")
    monkeypatch.setattr(bulk, "MAX_SECONDS", 0)
    monkeypatch.setattr(pool, "URL", idle.database_url)
    connections, body, total = pool.Pool(1), {"status": "error", "error": "x"}, 0
    now = connections.statement(database.read_now)
    cursor: str | None = ""
    while cursor is not None:
        request = bulk.parse(body | ({"cursor": cursor} if cursor else {}), bulk.RETRY, now)
        answer = bulk.run(request, bulk.RETRY, connections, lambda rows: None)
        assert answer.matched == answer.changed <= bulk.CHUNK
        total, cursor = total + answer.changed, answer.next
    assert total == 3500 and idle.counts() == {"pending": 3500, "error": 100}
    place = task_list.Place(now, str(uuid.uuid4()))
    other = task_list.encode(task_list.Filter("error", "other"), place, "retry-tasks")
    with pytest.raises(ValueError, match="as in the call that it is from"):
        bulk.parse(body | {"cursor": other}, bulk.RETRY, now)
    for connection in connections.idle:
        connection.close()
