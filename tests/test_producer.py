"""The HTTP API over real PostgreSQL: what each call answers, and what it says to bad input."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import socket
import time
import uuid

import psycopg2
import pytest
import requests

from tests.stack import Stack, until

CREATE = "/api/v1/create-task"
GET = "/api/v1/get-task-data"
PUT = "/api/v1/update-task-status"


def test_a_created_task_is_answered_whole_and_can_be_read(api: Stack) -> None:
    created = api.session.post(api.url + CREATE, json={"text": "любой текст"})
    assert created.status_code == 201
    assert created.headers["Content-Type"] == "application/json"
    task = created.json()
    assert list(task) == [
        "taskId", "text", "taskStatus", "attempt", "result", "error",
        "timeoutSeconds", "runAt", "createdAt", "sentAt", "startedAt", "finishedAt",
        "seconds", "host",
    ]  # fmt: skip
    assert (task["text"], task["taskStatus"], task["attempt"]) == ("любой текст", "pending", 1)
    assert task["createdAt"].endswith("Z")
    api.wait_status([task["taskId"]], "sent")
    sent = api.get(task["taskId"])
    assert sent["taskStatus"] == "sent" and sent["sentAt"] is not None


def test_an_array_is_created_all_or_nothing(api: Stack) -> None:
    assert len(api.create("a", "b", "c")) == 3
    answer = api.session.post(api.url + CREATE, json=[{"text": "d"}, {"text": ""}])
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("[1] text: expected at least one character")
    assert sum(api.counts().values()) == 3


def test_a_repeated_task_id_is_one_task_and_another_text_a_conflict(api: Stack) -> None:
    task_id = str(uuid.uuid4())
    first = api.session.post(api.url + CREATE, json={"text": "one", "taskId": task_id})
    again = api.session.post(api.url + CREATE, json={"text": "one", "taskId": task_id.upper()})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json()["taskId"] == task_id
    other = api.session.post(api.url + CREATE, json={"text": "two", "taskId": task_id})
    assert other.status_code == 409
    body = [{"text": "new"}, {"text": "two", "taskId": task_id}]
    assert api.session.post(api.url + CREATE, json=body).status_code == 409
    assert api.sql("SELECT text FROM tasks") == [("one",)]


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"{", 400, "expected a JSON body"),
        (b'{"text": "\xff"}', 400, "UTF-8"),
        (b"[" * 100_000, 400, "expected a JSON body"),
        (b"{}", 400, '"text" is missing'),
        (b'"text"', 400, 'expected {"text"'),
        (b"[]", 400, "expected 1 to 10000 tasks"),
        (b'{"text": ""}', 400, "at least one character"),
        (b'{"text": 5}', 400, "expected a string, got 5"),
        (b'{"text": NaN}', 400, "expected a JSON body: JSON has no NaN"),
        (b'{"text": "a", "timeoutSeconds": -Infinity}', 400, "JSON has no -Infinity"),
        (b'{"text": null}', 400, "expected a string, got None"),
        (b'{"text": "a\\u0000b"}', 400, "NUL"),
        (b'{"text": "\\ud800"}', 400, "surrogates"),
        (json.dumps({"text": "x" * (1024 * 1024 + 1)}).encode(), 400, "1048576 bytes"),
        (b'{"text": "a", "runat": "x"}', 400, "expected only text, taskId, runAt, timeoutSeconds"),
        (b'{"text": "a", "taskId": "5"}', 400, "taskId: expected a UUID"),
        (b'{"text": "a", "runAt": "soon"}', 400, "runAt: expected ISO 8601"),
        (b'{"text": "a", "runAt": 5}', 400, "runAt: expected ISO 8601"),
        (b"x" * (17 * 1024 * 1024), 413, "16 MiB"),
    ],
)  # fmt: skip
def test_bad_creates_say_what_was_expected(
    api: Stack, body: bytes, status: int, expected: str
) -> None:
    answer = requests.post(api.url + CREATE, data=body, timeout=30)
    assert answer.status_code == status
    assert expected in answer.json()["error"]
    assert api.counts() == {}


def test_a_text_of_exactly_one_mebibyte_is_taken(api: Stack) -> None:
    [task_id] = api.create("я" * (512 * 1024))
    assert api.get(task_id)["text"] == "я" * (512 * 1024)


def test_reads_of_unknown_or_malformed_ids_are_404_and_400(api: Stack) -> None:
    missing = api.session.get(api.url + GET, params={"taskId": str(uuid.uuid4())})
    assert (missing.status_code, "no task has the id" in missing.text) == (404, True)
    for query in ("", "?taskId=5", "?taskId=%ff"):
        answer = api.session.get(api.url + GET + query)
        assert answer.status_code == 400 and "expected" in answer.json()["error"]


def test_unknown_paths_and_methods_are_json_errors(api: Stack) -> None:
    answer = api.session.get(api.url + "/nowhere")
    assert answer.status_code == 404 and "POST /api/v1/create-task" in answer.json()["error"]
    answer = api.session.get(api.url + CREATE)
    assert answer.status_code == 405 and "expected one of" in answer.json()["error"]
    assert answer.headers["Allow"] == "POST"


@pytest.mark.parametrize("way", ["query", "form", "json", "untyped json"])
def test_an_update_is_taken_from_query_form_or_json(api: Stack, way: str) -> None:
    [task_id] = api.create("a")
    fields = {"taskId": task_id, "taskStatus": "success"}
    url = api.url + PUT
    if way == "query":
        answer = api.session.put(url, params=fields)
    elif way == "form":
        answer = api.session.put(url, data=fields)
    elif way == "json":
        answer = api.session.put(url, json=fields)
    else:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = api.session.put(url, data=json.dumps(fields), headers=kind)
    assert (answer.status_code, answer.json()["taskStatus"]) == (200, "success")
    assert answer.json()["finishedAt"] is not None


@pytest.mark.parametrize(
    ("word", "code"),
    [("УСПЕШНО", "success"), ("Success", "success"), ("ошибка", "error"), (" eRRor ", "error")],
)
def test_a_status_is_taken_in_both_languages_and_any_case(api: Stack, word: str, code: str) -> None:
    [task_id] = api.create("a")
    assert api.put(taskId=task_id, taskStatus=word).json()["taskStatus"] == code


def test_bad_updates_say_what_was_expected(api: Stack) -> None:
    [task_id] = api.create("a")
    for fields, status, expected in (
        ({"taskId": task_id}, 400, "taskStatus: expected"),
        ({"taskId": task_id, "taskStatus": "done"}, 400, "expected one of pending, sent"),
        ({"taskId": "5", "taskStatus": "success"}, 400, "expected a UUID"),
        ({"taskStatus": "success"}, 400, "expected a UUID"),
        ({"taskId": str(uuid.uuid4()), "taskStatus": "success"}, 404, "no task"),
        ({"taskId": task_id, "taskStatus": "sent"}, 409, "only the dispatcher"),
        ({"taskId": task_id, "taskStatus": "success", "attempt": 7}, 409, "stale"),
        ({"taskId": task_id, "taskStatus": "success", "attempt": "x"}, 400, "attempt"),
        ({"taskId": task_id, "taskStatus": "success", "attempt": "0_1"}, 400, "attempt"),
    ):
        answer = api.put(**fields)
        assert (answer.status_code, expected in answer.json()["error"]) == (status, True), (
            answer.text
        )
    assert api.put(taskId=task_id, taskStatus="success").status_code == 200
    answer = api.put(taskId=task_id, taskStatus="error")
    assert answer.status_code == 409 and "success does not become error" in answer.json()["error"]


def test_an_array_of_reports_is_judged_one_by_one(api: Stack) -> None:
    first, second = api.create("a", "b")
    answer = api.put(
        [
            {"taskId": first, "taskStatus": "success", "attempt": 1, "result": "fine"},
            {"taskId": second, "taskStatus": "success", "attempt": 2},
            {"taskId": str(uuid.uuid4()), "taskStatus": "success", "attempt": 1},
            {"taskId": "nonsense", "taskStatus": "success"},
            {"taskId": second, "taskStatus": "success", "attempt": 1, "result": "nul \0"},
            5,
        ]
    )
    assert answer.status_code == 200
    assert answer.json()["updated"] == 1
    reasons = [(each["index"], each["reason"][:14]) for each in answer.json()["rejected"]]
    assert reasons == [
        (1, "stale: attempt"),
        (2, "no task has th"),
        (3, "taskId: expect"),
        (4, "result: expect"),
        (5, "expected an ob"),
    ]
    assert api.get(first)["result"] == "fine"


def test_reports_of_one_task_count_in_their_order(api: Stack) -> None:
    first, second, third = api.create("a", "b", "c")
    report = {"taskStatus": "success", "attempt": 1}
    failed = {"taskStatus": "error", "attempt": 1, "error": "failed"}
    answer = api.put(
        [
            {"taskId": first, "result": "1"} | report,
            {"taskId": first, "result": "2"} | report,
            {"taskId": second} | failed,
            {"taskId": second, "result": "3"} | report,
            {"taskId": third, "result": "4"} | report,
            {"taskId": third} | failed,
        ]
    )
    reasons = [(each["index"], each["reason"][:31]) for each in answer.json()["rejected"]]
    assert reasons == [(5, "success does not become error; ")]
    for task_id, result in ((first, "1"), (second, "3"), (third, "4")):
        task = api.get(task_id)
        assert (task["taskStatus"], task["result"], task["error"]) == ("success", result, None)


def test_an_attempt_that_no_row_can_have_is_stale(api: Stack) -> None:
    [task_id] = api.create("a")
    for attempt in (0, -1, 2**31, 2**63):
        report = {"taskId": task_id, "taskStatus": "success", "attempt": attempt}
        answer = api.put([report])
        assert answer.status_code == 200, answer.text
        assert answer.json()["rejected"][0]["reason"].startswith("stale: attempt")
    assert api.get(task_id)["taskStatus"] in ("pending", "sent")


def test_a_task_twice_in_an_array_is_one_task_as_its_row_says(api: Stack) -> None:
    task_id = str(uuid.uuid4())
    body = [{"text": "x", "taskId": task_id, "timeoutSeconds": seconds} for seconds in (1, 2)]
    answer = api.session.post(api.url + CREATE, json=body)
    assert answer.status_code == 201
    assert answer.json()[0] == answer.json()[1]
    assert answer.json()[0]["timeoutSeconds"] == api.get(task_id)["timeoutSeconds"]
    assert "history" not in answer.json()[0]


def test_an_id_that_json_cannot_carry_is_rejected_like_any_other(api: Stack) -> None:
    url, headers = api.url + PUT, {"Content-Type": "application/json"}
    for body in (b'[{"taskId": "\\ud800"}]', b'[{"taskId": 1e999}]'):
        answer = api.session.put(url, data=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["rejected"][0]["reason"].startswith("taskId: expected a UUID")
    for depth in range(900, 1010):  # somewhere here json.loads() gives up
        nested = b"[" * depth + b"]" * depth
        body = b'[{"taskId": ' + nested + b"}]"
        assert api.session.put(url, data=body, headers=headers).status_code in (200, 400)
        body = b'{"text": ' + nested + b"}"
        assert api.session.post(api.url + CREATE, data=body).status_code == 400


def test_a_body_hides_nothing_bad_in_the_query(api: Stack) -> None:
    [task_id] = api.create("a")
    body = {"taskId": task_id, "taskStatus": "error"}
    for query in (
        {"skipLocked": "yes"}, {"taskId": "5"}, {"taskStatus": "done"}, {"host": "x" * 256},
    ):  # fmt: skip
        for each in (body, [body]):
            answer = api.put(each, **query)
            assert answer.status_code == 400 and answer.json()["error"].startswith(*query)
    assert api.put([body], skipLocked="false", host="here").json()["updated"] == 1


def test_a_whole_number_may_have_a_point(api: Stack) -> None:
    [task_id] = api.create("a")
    body = b'{"taskId": "%s", "taskStatus": "success", "attempt": 1.0}' % task_id.encode()
    answer = api.session.put(api.url + PUT, data=body)
    assert (answer.status_code, answer.json()["taskStatus"]) == (200, "success")


def test_a_token_guards_the_api_and_nothing_else(stack: Stack) -> None:
    stack.producer(API_TOKEN="secret")
    assert stack.session.get(stack.url + "/healthz").status_code == 200
    refused = stack.session.post(stack.url + CREATE, json={"text": "a"})
    assert refused.status_code == 401 and "Authorization: Bearer" in refused.json()["error"]
    assert stack.session.post(f"{stack.url}/{CREATE}", json={"text": "a"}).status_code == 401
    for path in ("/ap%ffi/v1/create-task", "/api%c3/v1/create-task", "/metrics%80"):
        assert stack.session.post(stack.url + path, json={"text": "a"}).status_code == 400
    headers = {"Authorization": "Bearer secret"}
    allowed = stack.session.post(stack.url + CREATE, json={"text": "a"}, headers=headers)
    assert allowed.status_code == 201


def test_two_producers_start_together_on_an_empty_database(stack: Stack) -> None:
    first = stack.producer(ready=False)
    second = stack.start("producer", HTTP_PORT=0)
    stack.wait_ready(first)
    assert second.poll() is None
    stack.consumer()
    stack.wait_status(stack.create(*map(str, range(2000))), "success")


def test_a_conflict_in_an_array_leaves_nothing_locked(api: Stack) -> None:
    """Not even if the error's traceback keeps the connection alive."""
    taken, free = api.create("one")[0], str(uuid.uuid4())
    for _ in range(20):  # more than the pool has connections
        body = [{"text": "a", "taskId": free}, {"text": "two", "taskId": taken}]
        assert api.session.post(api.url + CREATE, json=body).status_code == 409
    began = time.monotonic()
    created = api.session.post(api.url + CREATE, json={"text": "a", "taskId": free})
    assert created.status_code == 201 and time.monotonic() - began < 1
    locks = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    until(lambda: api.sql(locks) == [(0,)])


def test_a_create_whose_id_is_locked_holds_up_no_other(api: Stack) -> None:
    locked = str(uuid.uuid4())
    with contextlib.closing(psycopg2.connect(api.database_url)) as session:
        session.cursor().execute("INSERT INTO tasks (id, text) VALUES (%s, 'a')", (locked,))
        with concurrent.futures.ThreadPoolExecutor(80) as clients:
            bodies = [{"text": "a", "taskId": locked}, *[{"text": "b"}] * 9] * 6
            answers = list(clients.map(lambda body: post(api, body), bodies))
        blocked, others = answers[::10], [each for i, each in enumerate(answers) if i % 10]
        assert {status for status, _ in blocked} == {503}
        assert {status for status, _ in others} == {201}
        assert max(seconds for _, seconds in others) < 1.5
        session.rollback()
    assert post(api, {"text": "a", "taskId": locked})[0] == 201


def post(stack: Stack, body: object) -> tuple[int, float]:
    """Create over a connection of its own; return the status and the seconds."""
    began = time.monotonic()
    answer = requests.post(stack.url + CREATE, json=body, timeout=60)
    return answer.status_code, time.monotonic() - began


def test_reports_that_wait_for_locked_rows_keep_no_create_out(api: Stack) -> None:
    ids = api.create(*map(str, range(40)))
    api.wait_status(ids, "sent")
    with contextlib.closing(psycopg2.connect(api.database_url)) as session:
        session.cursor().execute("SELECT FROM tasks FOR UPDATE")
        with concurrent.futures.ThreadPoolExecutor(40) as clients:
            url = api.url + PUT
            for task_id in ids:
                fields = {"taskId": task_id, "taskStatus": "success"}
                clients.submit(requests.put, url, params=fields, timeout=60)
            time.sleep(0.5)  # by now they hold every connection of the pool
            assert post(api, {"text": "a"}) < (201, 1.0)


def test_sixty_megabytes_at_once_fit_into_memory(stack: Stack) -> None:
    producer = stack.producer(RABBITMQ_URL="amqp://tasks:tasks@127.0.0.1:1/%2F", ready=False)
    until(lambda: post_until_up(stack))
    for _ in range(3):  # what one round leaves behind counts too
        assert post_at_once(stack, "x" * 1_000_000, 60) == {201}
    status = pathlib.Path(f"/proc/{producer.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 200 * 1024


def post_at_once(stack: Stack, text: str, count: int) -> set[int]:
    """Create tasks whose bodies all end at the same moment; return their statuses."""
    body = json.dumps({"text": text}).encode()
    head = f"POST {CREATE} HTTP/1.1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", stack.port), 60) for _ in range(count)]
    for client in clients:
        client.sendall(head.encode() + body[:-1])
    for client in clients:
        client.sendall(body[-1:])
    return {int(client.makefile("rb").read().split()[1]) for client in clients}


def post_until_up(stack: Stack) -> bool:
    """Create a task; tell whether that worked."""
    with contextlib.suppress(requests.ConnectionError):
        return post(stack, {"text": "up"})[0] == 201
    return False


def test_several_hosts_without_a_synchronous_standby_are_a_warning(stack: Stack) -> None:
    url = stack.database_url.replace("@", "@127.0.0.1:1,")
    producer = stack.producer(DATABASE_URL=url)
    until(lambda: "synchronous_standby_names is empty" in producer.log.read_text())
    single = stack.start("producer", HTTP_PORT=0)
    until(lambda: "connected" in single.log.read_text())
    assert "synchronous_standby_names" not in single.log.read_text()


def test_chunked_bodies_are_taken(api: Stack) -> None:
    created = api.session.post(api.url + CREATE, data=iter([b'{"te', b'xt": "a"}']))
    assert (created.status_code, created.json()["text"]) == (201, "a")
    fields = json.dumps({"taskId": created.json()["taskId"], "taskStatus": "success"}).encode()
    updated = api.session.put(api.url + PUT, data=iter([fields[:9], fields[9:]]))
    assert (updated.status_code, updated.json()["taskStatus"]) == (200, "success")


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("producer", "HTTP_PORT", "eighty"),
        ("producer", "QUEUE_LIMIT", "0"),
        ("producer", "RABBITMQ_URL", "http://x"),
        ("producer", "MAX_ATTEMPTS", "-1"),
        ("producer", "LOG_LEVEL", "LOUD"),
        ("producer", "DATABASE_URL", "mysql://127.0.0.1/tasks"),
        ("consumer", "FAILURE_RATE", "2"),
        ("consumer", "CONCURRENCY", "many"),
        ("consumer", "PREFETCH", "some"),
        ("producer", "HTTP_CONNECTIONS", "0"),
        ("consumer", "HANDLER", "nowhere:function"),
        ("consumer", "WORKER", "no-such-program --fast"),
        ("consumer", "TASK_TIMEOUT_SECONDS", "-1"),
        ("consumer", "STOP_SECONDS", "0"),
        ("consumer", "HANDLER", "handlers:generator"),
        ("consumer", "PRODUCER_URL", "ftp://x"),
        ("consumer", "PRODUCER_URL", "http://:8080"),
        ("consumer", "PRODUCER_URL", "http://x:port"),
        ("dlq_watcher", "SENT_TIMEOUT_SECONDS", "soon"),
    ],
)
def test_a_setting_that_does_not_parse_ends_with_2_and_its_name(
    stack: Stack, script: str, name: str, value: str
) -> None:
    service = stack.start(script, **{name: value})
    assert service.child.wait(20) == 2
    assert name in service.log.read_text() and "expected" in service.log.read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgres//tasks:hunter2@127.0.0.1/tasks"),
        ("DATABASE_URL", "postgresql://tasks:hun@hunter2@127.0.0.1/tasks"),
        ("RABBITMQ_URL", "amqp://tasks:hunter2@127.0.0.1:port/%2F"),
        ("RABBITMQ_URL", "ampq://tasks:hunter2@127.0.0.1"),
    ],
)
def test_a_mistyped_url_does_not_print_its_password(stack: Stack, name: str, value: str) -> None:
    service = stack.start("producer", **{name: value})
    assert service.child.wait(20) == 2
    log = service.log.read_text()
    assert name in log and "expected" in log and "hunter2" not in log


def test_a_taken_port_ends_with_2(api: Stack) -> None:
    second = api.start("producer")
    assert second.child.wait(20) == 2
    assert "HTTP_PORT" in second.log.read_text()
