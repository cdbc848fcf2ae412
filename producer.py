"""The producer: serves the HTTP API over the table of tasks and dispatches random pending tasks to
RabbitMQ from background threads.

Run it with `python producer.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import contextlib
import logging
import sys
import threading
import time
import uuid
from typing import Any

import bottle

import access
import api
import database
import http_server
import metrics
import pool
import process
import schema
import task
from dispatcher import THREADS, Arrivals, Dispatcher
from group_commit import GroupCommit
from housekeeper import Housekeeper
from operator_api import OperatorApi
from report_api import ReportApi
from waiters import Full, Waiters

log = logging.getLogger("producer")

HTTP_HOST = process.setting("HTTP_HOST", "127.0.0.1", str)
HTTP_PORT = process.setting("HTTP_PORT", 8080, process.whole(0, 65535))
HTTP_CONNECTIONS = process.setting(
    "HTTP_CONNECTIONS", http_server.MAX_CONNECTIONS, process.whole(1, 10_000)
)

MAX_ELEMENTS = 10_000  # of an array in one call
MAX_WAIT_SECONDS = 60
STOP_REQUESTS_SECONDS = 15
CREATE_PATH = "/api/v1/create-task"
CREATE_FIELDS = ("text", "taskId", "runAt", "timeoutSeconds")

app = api.make_app()
connections = pool.Pool()
stop = threading.Event()
arrivals = Arrivals()
dispatcher = Dispatcher(stop, arrivals)
producer_id = str(uuid.uuid4())
counted = metrics.Metrics()
# The others are for who does not wait.
waiters = Waiters(max(1, HTTP_CONNECTIONS // 2), stop)
reports = ReportApi(connections, arrivals, counted)
reports.add_routes(app)
operators = OperatorApi(dispatcher, arrivals, counted, producer_id, reports.note_changed)
operators.add_routes(app)


def parse_new_task(element: Any) -> database.NewTask:
    """Return the task in a JSON object; raise ValueError saying what was expected."""
    if not isinstance(element, dict):
        raise ValueError(f'expected {{"text": "any text"}}, got {task.shorten(element)}')
    if unknown := element.keys() - set(CREATE_FIELDS):
        known = ", ".join(CREATE_FIELDS)
        raise ValueError(f"expected only {known}, got {task.shorten(min(unknown))}")
    if "text" not in element:
        raise ValueError('expected {"text": "any text"}, "text" is missing')
    text = task.parse_text(element["text"], "text", task.MAX_TEXT_BYTES)
    if not text:
        raise ValueError("text: expected at least one character")
    task_id = element.get("taskId")
    task_id = task.new_id() if task_id is None else task.parse_uuid(task_id)
    timeout = task.parse_timeout(element.get("timeoutSeconds"))
    run_at = task.parse_time(element.get("runAt"), "runAt")
    return database.NewTask(task_id, text, timeout, run_at)


@app.post(CREATE_PATH)
def create_task() -> bytes:
    """Insert a task, or an array of them all or none; 201 means committed."""
    environ = bottle.request.environ
    if error := environ.get("tasks.unavailable"):
        raise error
    if "tasks.new" in environ:
        new, is_array = [environ["tasks.new"]], False
    else:
        new, is_array = read_new_tasks()
    if is_array:
        created = connections.transaction(lambda cursor: insert_all(cursor, new))
    else:
        created = creates.insert(new[0])
        check_same(new, created)
    note_created(created)
    tasks = [created[each.id] for each in new]
    return api.answer(tasks if is_array else tasks[0], 201)


def read_new_tasks() -> tuple[list[database.NewTask], bool]:
    """Return what a request is to create, and whether it is an array; or end it with a 400."""
    body = api.read_json()
    elements = body if isinstance(body, list) else [body]
    if not 1 <= len(elements) <= MAX_ELEMENTS:
        api.refuse(400, f"expected 1 to {MAX_ELEMENTS} tasks in an array, got {len(elements)}")
    new = []
    for index, element in enumerate(elements):
        try:
            new.append(parse_new_task(element))
        except ValueError as error:
            api.refuse(400, f"[{index}] {error}" if body is elements else str(error))
    return new, body is elements


def note_created(tasks: dict[str, dict[str, Any]]) -> None:
    """Count new tasks and let the dispatcher know of them."""
    # A repeat is answered with the task as it is, its history included.
    counted.note_created(sum("history" not in each for each in tasks.values()))
    arrivals.add(list(tasks))


def note_group(tasks: dict[str, dict[str, Any]], began: list[float]) -> None:
    """Note what was created by a group of requests, each of which was whole at a time of
    time.perf_counter()."""
    note_created(tasks)
    now = time.perf_counter()
    for each in began:
        counted.note_request(CREATE_PATH, "201", now - each)


def insert_all(cursor: Any, new: list[database.NewTask]) -> dict[str, dict[str, Any]]:
    """Insert an array; a conflict ends the request, and so the transaction, before its COMMIT."""
    tasks = database.insert_tasks(cursor, new)
    check_same(new, tasks)
    return tasks


creates = GroupCommit(CREATE_PATH, parse_new_task, note_group, connections)


def check_same(new: list[database.NewTask], tasks: dict[str, dict[str, Any]]) -> None:
    """Refuse a repeated taskId whose text is another one: it is not a repeat but a mistake."""
    for each in new:
        if not database.is_same(each, tasks):
            api.refuse(409, f"the task {each.id} exists with another text")


@app.get("/api/v1/get-task-data")
def get_task_data() -> bytes:
    """Answer one task; with `wait`, when it has ended or so many seconds are over."""
    fields = api.read_form(bottle.request.query_string)
    try:
        task_id = task.parse_uuid(fields.get("taskId"))
        seconds = parse_wait(fields.get("wait"))
    except ValueError as error:
        api.refuse(400, str(error))
    found = reports.select_task(task_id)
    if seconds and found["taskStatus"] not in task.ENDED:
        try:
            waiters.wait(task_id, seconds, bottle.request.environ["tasks.is_gone"])
        except Full:
            reason = f"{waiters.most} clients wait already, expected fewer"
            raise bottle.HTTPError(503, reason, headers={"Retry-After": "1"}) from None
        found = reports.select_task(task_id)
    return api.answer(found)


def parse_wait(value: Any) -> float:
    """Return how many seconds a client waits for the end of a task."""
    seconds = -1.0
    if "_" not in (value or ""):  # float() takes 1_0
        with contextlib.suppress(ValueError):
            seconds = float(value or 0)
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        expected = f"expected seconds from 0 to {MAX_WAIT_SECONDS}"
        raise ValueError(f"wait: {expected}, got {task.shorten(value)}")
    return seconds


@app.get("/healthz")
def healthz() -> bytes:
    """Answer that the process is alive."""
    return api.answer({"status": "alive"})


@app.get("/readyz")
def readyz() -> bytes:
    """Answer what works. 503 only without the database: without a broker tasks are still taken."""
    state = {"database": "ok", "broker": dispatcher.broker_state, "dispatcher": dispatcher.state()}
    try:
        connections.statement(lambda cursor: cursor.execute(database.PROBE))
    except pool.Unavailable as error:
        state["database"] = str(error)
    return api.answer(state, 200 if state["database"] == "ok" else 503)


def warn_of_lost_commits() -> None:
    """Log a WARNING if a failover can lose tasks that were answered with 201."""
    try:
        lack = connections.statement(database.what_commits_lack)
        if lack and pool.has_several_hosts():
            log.warning(
                "DATABASE_URL names several hosts and %s: "
                "a failover loses what the standby has not received yet",
                lack,
            )
    except pool.Unavailable as error:
        log.debug("synchronous_standby_names not read: %s", error)


def start_background() -> None:
    """Prepare the table, then start housekeeping, index builds and dispatch; the body of a thread
    that ends with them."""
    schema.wait_until_current(connections, stop)
    warn_of_lost_commits()
    threads = [
        threading.Thread(target=dispatcher.run, args=(number,), name=f"dispatcher-{number + 1}")
        for number in range(THREADS)
    ]
    housekeeper = Housekeeper(connections, stop, arrivals, counted, producer_id)
    threads.append(threading.Thread(target=housekeeper.run, name="housekeeper"))
    threads.append(threading.Thread(target=schema.build_indexes, args=(stop,), name="indexes"))
    threads.append(threading.Thread(target=waiters.run, name="waiters"))
    threads.append(threading.Thread(target=operators.run, args=(stop,), name="statistics"))
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads[:THREADS]:
        thread.join()


def main() -> None:
    """Serve and dispatch until SIGTERM or SIGINT."""
    process.start_logging()
    process.calm_garbage_collector()
    process.stop_on_signals(stop)
    try:
        access.check_tokens()
    except ValueError as error:
        print(f"READ_TOKEN is not valid: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        measured = metrics.Requests(app, counted)
        server = http_server.Server(
            HTTP_HOST, HTTP_PORT, measured, access.authorize, HTTP_CONNECTIONS, creates
        )
    except OSError as error:
        print(f"HTTP_HOST={HTTP_HOST!r}, HTTP_PORT={HTTP_PORT}: {error}", file=sys.stderr)
        sys.exit(2)
    server.serve()
    log.info("serving on http://%s:%d", *server.server_address[:2])
    background = threading.Thread(target=start_background, name="background", daemon=True)
    background.start()
    stop.wait()
    deadline = time.monotonic() + process.STOP_SECONDS
    server.close(min(STOP_REQUESTS_SECONDS, process.STOP_SECONDS))
    background.join(deadline - time.monotonic())
    log.info("stopped")


if __name__ == "__main__":
    main()
