"""Real servers for the tests: one private PostgreSQL and RabbitMQ for the session, a fresh database
and fresh queues for each test, and the project's own scripts as processes."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from native import servers
from tests import containers
from tests.stack import Stack, clean_environment

clean_environment()


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, so that they do not run alone in the end."""
    first = ("test_chaos", "test_compose", "test_faults")
    items.sort(key=lambda item: not item.location[0].startswith(tuple(f"tests/{n}" for n in first)))


def pytest_report_header() -> str:
    """Say what this machine cannot show."""
    if containers.HAS_DOCKER:
        return "the compose project is tested too"
    return "NO DOCKER ENGINE WITH COMPOSE: the compose project is not tested"


@pytest.fixture(scope="session")
def server_classes(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The PostgreSQL and RabbitMQ to test against."""
    if request.config.getoption("--servers") == "docker":
        return containers.Postgres, containers.Rabbit
    return servers.Postgres, servers.Rabbit


@contextlib.contextmanager
def running(server: Any) -> Iterator[Any]:
    """Start a server, and stop it in the end."""
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres(server_classes: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL server for the session."""
    with running(server_classes[0](tmp_path_factory.mktemp("postgres"))) as server:
        yield server


@pytest.fixture(scope="session")
def rabbit(server_classes: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A RabbitMQ node for the session."""
    with running(server_classes[1](tmp_path_factory.mktemp("rabbit"))) as server:
        yield server


@pytest.fixture
def stack(postgres: Any, rabbit: Any, tmp_path: pathlib.Path) -> Iterator[Stack]:
    """A fresh project; its logs are shown if the test fails."""
    stack = Stack(postgres, rabbit, tmp_path)
    try:
        yield stack
    finally:
        stack.close()
        stack.print_logs()


@pytest.fixture
def api(stack: Stack) -> Stack:
    """A project whose producer runs and whose tasks nobody takes."""
    stack.producer()
    return stack
