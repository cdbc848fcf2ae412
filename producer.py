"""The producer: serves the HTTP API over the table of tasks and dispatches random pending tasks to
RabbitMQ from a background thread.

Run it with `python producer.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import hmac
import itertools
import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

import bottle
import psycopg2

import broker
import database
import http_server
import states
from dispatcher import Dispatcher, keep_house
from group_commit import GroupCommit

log = logging.getLogger("producer")

HTTP_HOST = broker.setting("HTTP_HOST", "127.0.0.1")
HTTP_PORT = broker.setting("HTTP_PORT", 8080, broker.number(0, 65535))
API_TOKEN = broker.setting("API_TOKEN", "")

MAX_TEXT_BYTES = 1024 * 1024
MAX_ELEMENTS = 10_000  # of an array in one call
STALLED_SECONDS = 10
STOP_REQUESTS_SECONDS = 15
CREATE_FIELDS = {"text", "taskId", "runAt"}

app = bottle.Bottle()
app.config["json.enable"] = False  # answers are made by answer()
pool = database.Pool()
creates = GroupCommit(pool)
stop = threading.Event()
wake = threading.Event()  # something may be pending: the dispatcher need not wait


def fail(status: int, reason: str) -> None:
    """End the request with a JSON error."""
    raise bottle.HTTPError(status, reason)


def read_json() -> Any:
    """Return the request's body parsed as JSON, or end the request with a 400."""
    body = bottle.request.environ["wsgi.input"].read()
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError as error:
        fail(400, f"expected a body in UTF-8, byte {error.start} is not")
    except (ValueError, RecursionError) as error:
        fail(400, f"expected a JSON body: {error}")


def parse_new_task(element: Any) -> database.NewTask:
    """Return the task in a JSON object; raise ValueError saying what was expected."""
    if not isinstance(element, dict):
        raise ValueError(f'expected {{"text": "any text"}}, got {states.shorten(element)}')
    if unknown := element.keys() - CREATE_FIELDS:
        raise ValueError(
            f"expected only text, taskId and runAt, got {states.shorten(min(unknown))}"
        )
    if "text" not in element:
        raise ValueError('expected {"text": "any text"}, "text" is missing')
    text = states.parse_text(element["text"], "text", MAX_TEXT_BYTES)
    if not text:
        raise ValueError("text: expected at least one character")
    task_id = element.get("taskId")
    task_id = str(uuid.uuid4()) if task_id is None else states.parse_uuid(task_id)
    return database.NewTask(task_id, text, parse_time(element.get("runAt")))


def parse_time(value: Any) -> datetime | None:
    """Return an ISO 8601 time, taken as UTC if it names no offset; raise ValueError otherwise."""
    if value is None:
        return None
    try:
        time_ = datetime.fromisoformat(value)
        return (time_ if time_.tzinfo else time_.replace(tzinfo=UTC)).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"runAt: expected ISO 8601 such as 2030-01-31T12:00:00Z, got {states.shorten(value)}"
        ) from None


def read_update() -> Any:
    """Return what a PUT says, merged from query, form and JSON object; or its JSON array."""
    request = bottle.request
    fields = read_form(request.query_string)
    if request.content_type.partition(";")[0].strip() == "application/x-www-form-urlencoded":
        body = request.environ["wsgi.input"].read()
        looks_like_json = body[:1] in (b"{", b"[")  # curl --data without a header says it is a form
        if not looks_like_json:
            return fields | read_form(body.decode("latin-1"))
        request.environ["wsgi.input"].seek(0)
    if request.content_length <= 0:
        return fields
    body = read_json()
    if isinstance(body, dict):
        return fields | body
    return body


def read_form(text: str) -> dict[str, Any]:
    """Return the pairs of a query string or form, `attempt` as a number."""
    try:
        fields = {name: values[-1] for name, values in parse_qs(text, errors="strict").items()}
        if "attempt" in fields:
            fields["attempt"] = int(fields["attempt"])
    except UnicodeDecodeError:
        fail(400, "expected a query and form in percent-encoded UTF-8")
    except ValueError:
        fail(400, f"attempt: expected an integer, got {states.shorten(fields['attempt'])}")
    return fields


def answer(value: Any, status: int = 200) -> bytes:
    """Return a JSON answer and set its status."""
    bottle.response.status = status
    bottle.response.content_type = "application/json"
    return json.dumps(value, ensure_ascii=False).encode()


@app.hook("before_request")
def check_token() -> None:
    """Refuse calls of the API without the token, where one is set."""
    if not API_TOKEN or not bottle.request.path.startswith("/api/"):
        return
    given = bottle.request.environ.get("HTTP_AUTHORIZATION", "")
    if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {API_TOKEN}".encode()):
        fail(401, "expected the header Authorization: Bearer <API_TOKEN>")


@app.post("/api/v1/create-task")
def create_task() -> bytes:
    """Insert a task, or an array of them all or none; 201 means committed."""
    body = read_json()
    elements = body if isinstance(body, list) else [body]
    if not 1 <= len(elements) <= MAX_ELEMENTS:
        fail(400, f"expected 1 to {MAX_ELEMENTS} tasks in an array, got {len(elements)}")
    new = []
    for index, element in enumerate(elements):
        try:
            new.append(parse_new_task(element))
        except ValueError as error:
            fail(400, f"[{index}] {error}" if body is elements else str(error))
    if body is elements:
        tasks = pool.transaction(lambda cursor: insert_all(cursor, new))
    else:
        tasks = {new[0].id: creates.insert(new[0])}
        check_same(new, tasks)
    wake.set()
    tasks = [tasks[task.id] for task in new]
    return answer(tasks if body is elements else tasks[0], 201)


def insert_all(cursor: Any, new: list[database.NewTask]) -> dict[str, dict]:
    """Insert an array; a conflict ends the request, and so the transaction, before its COMMIT."""
    tasks = database.insert_tasks(cursor, new)
    check_same(new, tasks)
    return tasks


def check_same(new: list[database.NewTask], tasks: dict[str, dict]) -> None:
    """Refuse a repeated taskId whose text is another one: it is not a repeat but a mistake."""
    for task in new:
        if tasks[task.id]["text"] != task.text:
            fail(409, f"the task {task.id} exists with another text")


@app.get("/api/v1/get-task-data")
def get_task_data() -> bytes:
    """Answer one task."""
    try:
        task_id = states.parse_uuid(read_form(bottle.request.query_string).get("taskId"))
    except ValueError as error:
        fail(400, str(error))
    tasks = pool.statement(lambda cursor: database.select_tasks(cursor, [task_id]))
    if task_id not in tasks:
        fail(404, f"no task has the id {task_id}")
    return answer(tasks[task_id])


@app.put("/api/v1/update-task-status")
def update_task_status() -> bytes:
    """Apply a report and answer the task, or an array of reports and answer which were refused."""
    body = read_update()
    if isinstance(body, list):
        return update_many(body)
    try:
        report = states.parse_report(body)
    except ValueError as error:
        fail(400, str(error))
    [refusal] = apply([report])
    if refusal is not None:
        fail(refusal.code, refusal.reason)
    tasks = pool.statement(lambda cursor: database.select_tasks(cursor, [report.id]))
    return answer(tasks[report.id])


def update_many(elements: list) -> bytes:
    """Apply each report for itself: one that is wrong is rejected, the others count."""
    if len(elements) > MAX_ELEMENTS:
        fail(413, f"expected at most {MAX_ELEMENTS} reports, got {len(elements)}")
    reports: dict[int, states.Report] = {}
    reasons: dict[int, str] = {}
    for index, element in enumerate(elements):
        try:
            reports[index] = states.parse_report(element)
        except ValueError as error:
            reasons[index] = str(error)
    for index, refusal in zip(reports, apply(list(reports.values())), strict=True):
        if refusal is not None:
            reasons[index] = refusal.reason
    rejected = [
        {"index": index, "taskId": id_of(elements[index]), "reason": reasons[index]}
        for index in sorted(reasons)
    ]
    return answer({"updated": len(elements) - len(rejected), "rejected": rejected})


def apply(reports: list[states.Report]) -> list[states.Refusal | None]:
    """Apply reports in one transaction; return a verdict for each."""
    # without an attempt, a second try after a COMMIT of unknown outcome could undo a newer change
    fenced = all(report.attempt is not None for report in reports)
    verdicts = pool.transaction(lambda cursor: database.apply_reports(cursor, reports), fenced)
    if any(report.status in ("pending", "error") for report in reports):
        wake.set()  # it may be pending again
    return verdicts


def id_of(element: Any) -> Any:
    """Return what a rejected element called its id, as far as it had one."""
    return element.get("taskId") if isinstance(element, dict) else None


@app.get("/healthz")
def healthz() -> bytes:
    """Answer that the process is alive."""
    return answer({"status": "alive"})


@app.get("/readyz")
def readyz() -> bytes:
    """Answer whether tasks are taken and dispatched, and what is away if not."""
    state = {"database": "ok", "broker": dispatcher.broker_state, "dispatcher": "ok"}
    try:
        pool.statement(lambda cursor: cursor.execute(database.PROBE))
    except database.Unavailable as error:
        state["database"] = str(error)
    if time.monotonic() - dispatcher.turned_at > STALLED_SECONDS:
        state["dispatcher"] = f"no turn for {STALLED_SECONDS} seconds"
    ready = all(value == "ok" for value in state.values())
    return answer(state, 200 if ready else 503)


def answer_error(error: bottle.HTTPError) -> bytes:
    """Answer every error in JSON, with what was expected; never HTML or a stack trace."""
    status, reason = error.status_code, error.body
    if "bottle.route" not in bottle.request.environ and status in (404, 405):
        calls = ", ".join(f"{route.method} {route.rule}" for route in app.routes)
        reason = f"{bottle.request.method} {bottle.request.path}: expected one of {calls}"
    elif error.exception is not None:  # Bottle has written its stack trace to stderr
        reason = "internal error, see the log"
    return answer({"error": reason}, status)


def answer_unavailable(route: Callable[..., bytes]) -> Callable[..., bytes]:
    """Wrap a route so that a database that is away is a 503 that says when to try again."""

    def wrapped(**arguments: str) -> bytes:
        try:
            return route(**arguments)
        except database.Unavailable as error:
            log.warning("%s refused: %s", bottle.request.path, error)
            reason = f"the database is away, expected soon: {error}"
            raise bottle.HTTPError(503, reason, headers={"Retry-After": "1"}) from None

    return wrapped


app.default_error_handler = answer_error
app.install(answer_unavailable)


def wait_for_schema() -> None:
    """Apply the schema as soon as the database lets us; say once that it does not."""
    for attempt in itertools.count():
        try:
            pool.transaction(database.apply_schema)
            return
        except (database.Unavailable, psycopg2.Error) as error:  # no right to CREATE, too
            delay = broker.back_off(attempt)
            level = logging.DEBUG if attempt else logging.WARNING
            log.log(level, "database is away, next try in %.1f s: %s", delay, error)
            if stop.wait(delay):
                return


dispatcher = Dispatcher(stop, wake)


def start_background() -> None:
    """Prepare the table, start to keep house, then dispatch."""
    wait_for_schema()
    threading.Thread(
        target=keep_house, args=(pool, stop, wake), name="housekeeper", daemon=True
    ).start()
    second = threading.Thread(target=dispatcher.assist, name="dispatcher-2", daemon=True)
    second.start()
    dispatcher.run()
    second.join()


def main() -> None:
    """Serve and dispatch until SIGTERM or SIGINT."""
    broker.start_logging()
    broker.stop_on_signals(stop)
    try:
        server = http_server.Server(HTTP_HOST, HTTP_PORT, app)
    except OSError as error:
        print(f"HTTP_HOST={HTTP_HOST!r}, HTTP_PORT={HTTP_PORT}: {error}", file=sys.stderr)
        sys.exit(2)
    server.serve()
    log.info("serving on http://%s:%d", *server.server_address[:2])
    background = threading.Thread(target=start_background, name="dispatcher", daemon=True)
    background.start()
    stop.wait()
    deadline = time.monotonic() + broker.STOP_SECONDS
    wake.set()
    server.close(STOP_REQUESTS_SECONDS)
    background.join(deadline - time.monotonic())
    log.info("stopped")


if __name__ == "__main__":
    main()
