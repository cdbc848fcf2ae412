"""One project under test or measurement: its database, queues and processes on real servers."""

import contextlib
import os
import pathlib
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pika
import psycopg2
import requests

from native import servers

TIMEOUT_SECONDS = 120  # for what takes a moment, on a machine that is busy with something else

SETTINGS = {
    name
    for path in servers.HERE.glob("*.py")
    for name in re.findall(r'setting\(\s*"([A-Z_]+)"', path.read_text())
}


def clean_environment() -> None:
    """Forget what the developer's shell, sudo or run.sh has set: no process started from here on
    gets it."""
    for name in SETTINGS | {"PROJECT_ABSOLUTE_PATH", "REGISTRY", "TAG", "SUDO_UID", "SUDO_GID"}:
        os.environ.pop(name, None)
    os.environ["NO_PROXY"] = "127.0.0.1"


def until(
    is_done: Callable[[], Any],
    timeout: float = TIMEOUT_SECONDS,
    what: str | Callable[[], str] = "",
    pause: float = 0.02,
) -> Any:
    """Return the first true value of is_done(); raise AssertionError after the time-out."""
    deadline = time.monotonic() + timeout
    while True:
        value = is_done()
        if value:
            return value
        if time.monotonic() > deadline:
            what = what() if callable(what) else what or str(is_done)
            raise AssertionError(f"not in {timeout} s: {what}; last: {value!r}")
        time.sleep(pause)


class Stack:
    """A project in a new database, its processes, and a client of its API."""

    def __init__(
        self,
        postgres: Any,
        rabbit: Any,
        folder: pathlib.Path,
        root: pathlib.Path = servers.HERE,
        python: str = sys.executable,
    ) -> None:
        """The scripts are those of the checkout in root."""
        self.postgres = postgres
        self.rabbit = rabbit
        self.folder = folder
        self.checkout = (root, python)
        self.processes: list[servers.Service] = []
        self.session = requests.Session()
        self.database = f"t{uuid.uuid4().hex}"
        self.database_url = f"{postgres.url.rpartition('/')[0]}/{self.database}"
        self.port = servers.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {
            "DATABASE_URL": self.database_url,
            "RABBITMQ_URL": rabbit.url,
            "PRODUCER_URL": self.url,
            "HTTP_PORT": str(self.port),
            "PROCESSING_SECONDS": "0",
            "FAILURE_RATE": "0",
            "LOG_LEVEL": "DEBUG",
            "PYTHONPATH": str(pathlib.Path(__file__).parent),
        }
        self.administer(f"CREATE DATABASE {self.database}")

    def administer(self, statement: str) -> None:
        """Run a statement in the server's first database."""
        run_sql(self.postgres.url, statement)

    def start(self, script: str, **env: Any) -> servers.Service:
        """Start one of the scripts with further settings; close() ends it."""
        log = self.folder / f"{script}-{len(self.processes)}.log"
        settings = self.env | {name: str(value) for name, value in env.items()}
        service = servers.Service(f"{script}.py", settings, log, *self.checkout)
        service.start()
        self.processes.append(service)
        return service

    def producer(self, ready: bool = True, **env: Any) -> servers.Service:
        """Start a producer and wait until it is ready."""
        service = self.start("producer", **env)
        if ready:
            self.wait_ready(service)
        return service

    def wait_ready(self, service: servers.Service, timeout: float = TIMEOUT_SECONDS) -> None:
        """Wait until the producer says it is ready; fail with its log if it ends."""

        def is_ready() -> bool:
            assert service.poll() is None, service.log.read_text()
            return servers.is_ready("127.0.0.1", self.port)

        until(is_ready, timeout, "producer ready")

    def consumer(self, **env: Any) -> servers.Service:
        """Start a consumer."""
        return self.start("consumer", **env)

    def create(self, *texts: str, **fields: Any) -> list[str]:
        """Create tasks by one array call; return their ids."""
        answer = self.session.post(
            f"{self.url}/api/v1/create-task",
            json=[{"text": text, **fields} for text in texts],
            timeout=60,
        )
        assert answer.status_code == 201, answer.text
        return [task["taskId"] for task in answer.json()]

    def get(self, task_id: str) -> dict:
        """Return a task."""
        answer = self.session.get(
            f"{self.url}/api/v1/get-task-data", params={"taskId": task_id}, timeout=30
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def put(self, body: Any = None, **query: Any) -> requests.Response:
        """PUT one report by query, or a JSON body."""
        url = f"{self.url}/api/v1/update-task-status"
        return self.session.put(url, params=query, json=body, timeout=30)

    def sql(self, statement: str, *arguments: Any) -> list[tuple]:
        """Run a statement in the project's database, committed; return its rows."""
        return run_sql(self.database_url, statement, *arguments)

    def counts(self) -> dict[str, int]:
        """Return how many tasks have each status."""
        return dict(self.sql("SELECT status::text, count(*) FROM tasks GROUP BY status"))

    def wait_status(self, ids: list[str], *statuses: str, timeout: float = TIMEOUT_SECONDS) -> None:
        """Wait until every task has one of the statuses."""
        query = "SELECT count(*) FROM tasks WHERE id = ANY(%s::uuid[]) AND status::text = ANY(%s)"
        until(
            lambda: self.sql(query, ids, list(statuses)) == [(len(ids),)],
            timeout,
            lambda: f"{len(ids)} tasks in {statuses}: {self.counts()}",
        )

    def wait_ended(self, timeout: float = TIMEOUT_SECONDS) -> None:
        """Wait until no task is pending or sent."""
        ended = lambda: not self.counts().keys() & {"pending", "sent"}  # noqa: E731
        until(ended, timeout, lambda: f"all tasks ended: {self.counts()}")

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """Yield a channel of an own broker connection."""
        connection = pika.BlockingConnection(pika.URLParameters(self.rabbit.url))
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def waiting(self, queue: str = "tasks") -> int:
        """Return how many messages wait in a queue."""
        with self.channel() as channel:
            return channel.queue_declare(queue, passive=True).method.message_count

    def unsettled(self) -> dict[str, int]:
        """Return the queues that hold messages, those at consumers included; takes seconds."""
        lines = self.rabbit.ctl("list_queues", "name", "messages", "--no-table-headers")
        counts = dict(line.split() for line in lines.strip().splitlines())
        return {name: int(count) for name, count in counts.items() if count != "0"}

    def runs(self, path: pathlib.Path) -> dict[str, int]:
        """Return how often tests.handlers noted each text in its file."""
        texts = path.read_text().splitlines() if path.exists() else []
        return {text: texts.count(text) for text in texts}

    def delete_queues(self) -> None:
        """Delete what the project has declared in its broker."""
        with self.channel() as channel:
            for name in ("tasks", "tasks.dlq"):
                channel.queue_delete(name)
            for name in ("tasks", "tasks.dlx"):
                channel.exchange_delete(name)

    def close(self, queues: bool = True) -> None:
        """End the processes, then drop queues (those of a shared broker) and database."""
        for process in self.processes:
            process.signal(signal.SIGCONT)  # a frozen one could not end
            process.kill()
        if queues:
            self.delete_queues()
        self.administer(f"DROP DATABASE {self.database} WITH (FORCE)")

    def print_logs(self, lines: int = 60) -> None:
        """Print the end of each log; pytest shows it if the test fails."""
        for process in self.processes:
            print(f"--- {process.log.name}")
            print("\n".join(process.log.read_text("utf-8", "replace").splitlines()[-lines:]))


def run_sql(url: str, statement: str, *arguments: Any) -> list[tuple]:
    """Run a statement in a session of its own, committed; return its rows."""
    with contextlib.closing(psycopg2.connect(url)) as session:
        session.autocommit = True
        cursor = session.cursor()
        cursor.execute(statement, arguments or None)
        return cursor.fetchall() if cursor.description else []
