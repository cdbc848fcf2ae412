"""Real servers for the tests: one private PostgreSQL and RabbitMQ for the session, a fresh database
and fresh queues for each test, and the project's own scripts as processes."""

import contextlib
import os
import pathlib
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pika
import psycopg2
import pytest
import requests

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from native import servers
from tests import containers

TIMEOUT_SECONDS = 60

# What the developer's shell, sudo or run.sh has set must not reach the processes under test.
SETTINGS = {
    name
    for path in servers.HERE.glob("*.py")
    for name in re.findall(r'setting\(\s*"([A-Z_]+)"', path.read_text())
}
for name in SETTINGS | {"PROJECT_ABSOLUTE_PATH", "REGISTRY", "TAG", "SUDO_UID", "SUDO_GID"}:
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = "127.0.0.1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switches of this suite."""
    parser.addoption(
        "--servers",
        choices=("native", "docker"),
        default="native",
        help="the distribution's PostgreSQL and RabbitMQ, or the images of docker-compose.yml",
    )
    parser.addoption("--chaos-seconds", type=float, default=60, help="how long faults go on")
    parser.addoption("--chaos-seed", type=int, default=None, help="repeat one run's faults")


def pytest_report_header() -> str:
    """Say what this machine cannot show."""
    if containers.HAS_DOCKER:
        return "the compose project is tested too"
    return "NO DOCKER ENGINE WITH COMPOSE: the compose project is not tested"


def until(is_done: Callable[[], Any], timeout: float = TIMEOUT_SECONDS, what: str = "") -> Any:
    """Return the first true value of is_done(); fail after the time-out."""
    deadline = time.monotonic() + timeout
    while True:
        value = is_done()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not in {timeout} s: {what or is_done}; last: {value!r}")
        time.sleep(0.02)


class Stack:
    """One test's project: its database, its queues, its processes, and a client of its API."""

    def __init__(self, postgres: Any, rabbit: Any, folder: pathlib.Path) -> None:
        self.postgres = postgres
        self.rabbit = rabbit
        self.folder = folder
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
        with contextlib.closing(psycopg2.connect(postgres.url)) as session:
            session.autocommit = True
            session.cursor().execute(f"CREATE DATABASE {self.database}")

    def start(self, script: str, **env: Any) -> servers.Service:
        """Start one of the scripts with further settings; it is ended with the test."""
        log = self.folder / f"{script}-{len(self.processes)}.log"
        service = servers.Service(
            f"{script}.py", self.env | {name: str(value) for name, value in env.items()}, log
        )
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
        """Run a statement in the test's database, committed; return its rows."""
        with contextlib.closing(psycopg2.connect(self.database_url)) as session:
            session.autocommit = True
            cursor = session.cursor()
            cursor.execute(statement, arguments)
            return cursor.fetchall() if cursor.description else []

    def counts(self) -> dict[str, int]:
        """Return how many tasks have each status."""
        return dict(self.sql("SELECT status, count(*) FROM tasks GROUP BY status"))

    def wait_status(self, ids: list[str], *statuses: str, timeout: float = 60) -> None:
        """Wait until every task has one of the statuses."""

        def left() -> int:
            query = (
                "SELECT count(*) FROM tasks WHERE id = ANY(%s::uuid[]) AND status::text = ANY(%s)"
            )
            return len(ids) - self.sql(query, ids, list(statuses))[0][0]

        until(lambda: left() == 0, timeout, f"{len(ids)} tasks in {statuses}: {self.counts()}")

    def wait_ended(self, timeout: float = 60) -> None:
        """Wait until no task is pending or sent."""
        until(lambda: not self.counts().keys() & {"pending", "sent"}, timeout, str(self.counts()))

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

    def close(self, queues: bool = True) -> None:
        """End the processes, then drop queues (those of a shared broker) and database."""
        for process in self.processes:
            process.signal(18)  # SIGCONT: a frozen one could not end
            process.kill()
        if queues:
            with self.channel() as channel:
                for name in ("tasks", "tasks.dlq"):
                    channel.queue_delete(name)
                for name in ("tasks", "tasks.dlx"):
                    channel.exchange_delete(name)
        with contextlib.closing(psycopg2.connect(self.postgres.url)) as session:
            session.autocommit = True
            session.cursor().execute(f"DROP DATABASE {self.database} WITH (FORCE)")


@pytest.fixture(scope="session")
def server_classes(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The PostgreSQL and RabbitMQ to test against."""
    if request.config.getoption("--servers") == "docker":
        return containers.Postgres, containers.Rabbit
    return servers.Postgres, servers.Rabbit


@pytest.fixture(scope="session")
def postgres(server_classes: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL server for the session."""
    server = server_classes[0](tmp_path_factory.mktemp("postgres"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbit(server_classes: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A RabbitMQ node for the session."""
    server = server_classes[1](tmp_path_factory.mktemp("rabbit"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def stack(postgres: Any, rabbit: Any, tmp_path: pathlib.Path) -> Iterator[Stack]:
    """A fresh project; its logs are shown if the test fails."""
    stack = Stack(postgres, rabbit, tmp_path)
    try:
        yield stack
    finally:
        stack.close()
        for process in stack.processes:
            print(f"--- {process.log.name}")
            print("\n".join(process.log.read_text("utf-8", "replace").splitlines()[-60:]))


@pytest.fixture
def api(stack: Stack) -> Stack:
    """A project whose producer runs and whose tasks nobody takes."""
    stack.producer()
    return stack
