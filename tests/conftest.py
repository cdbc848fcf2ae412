"""Real servers for the tests: one private PostgreSQL and RabbitMQ for the session, a fresh database
and fresh queues for each test, and the project's own scripts as processes."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from native import servers
from tests import containers
from tests.proxy import Proxy
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
    parser.addoption(
        "--full-times", action="store_true", help="wait as long as a service without settings does"
    )
    parser.addoption("--chaos-seed", type=int, default=None, help="repeat one run's faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, so that they do not run alone in the end."""
    names = ("test_chaos", "test_cluster", "test_compose", "test_run", "test_faults")
    first = [f"tests/{name}" for name in names]
    order = {name: number for number, name in enumerate(first)}
    items.sort(key=lambda item: order.get(item.location[0].removesuffix(".py"), len(order)))


class Schedule(LoadScopeScheduling):
    """Gives the compose tests, which share one project, to one process, those of the cluster too,
    and all others one by one.

    --dist=loadgroup does not group with pytest 9.2: it appends to a name that is no longer read.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in ("tests/test_compose.py", "tests/test_cluster.py") else nodeid


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which -p no:xdist turns off
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule:
    """Share the tests out among the processes."""
    return Schedule(config, log)


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
def own(server_classes: tuple, tmp_path: pathlib.Path, postgres: Any) -> Iterator[Stack]:
    """A project with a broker of its own, which the test may hurt."""
    rabbit = server_classes[1](tmp_path / "rabbit")
    rabbit.start()
    stack = Stack(postgres, rabbit, tmp_path)
    try:
        yield stack
    finally:
        stack.close(queues=False)
        rabbit.stop()
        stack.print_logs()


@pytest.fixture
def api(stack: Stack) -> Stack:
    """A project whose producer runs and whose tasks nobody takes."""
    stack.producer()
    return stack


@pytest.fixture
def proxy() -> Iterator[Any]:
    """Make proxies; they are closed with the test."""
    proxies: list[Proxy] = []

    def make(target: int) -> Proxy:
        proxies.append(Proxy(target))
        return proxies[-1]

    yield make
    for each in proxies:
        each.close()
