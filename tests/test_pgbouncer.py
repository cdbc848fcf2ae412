"""PgBouncer between the producer and PostgreSQL: refused in every mode by a sentence that says what
to do, instead of a service that works by halves."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
import requests

from native.processes import Process, free_port
from tests.stack import Stack, run_sql, until

# What pool.py asks for and PgBouncer does not pass on, set where it would pass unnoticed.
SETTINGS = "lock_timeout = 2000; statement_timeout = 10000; enable_seqscan = off; jit = off"


class PgBouncer(Process):
    """A PgBouncer in front of a server, on a loopback port."""

    def __init__(self, folder: pathlib.Path, postgres: Any, mode: str, ignored: str) -> None:
        super().__init__(folder / "pgbouncer.log")
        self.postgres = postgres
        self.port = free_port()
        self.config = folder / "pgbouncer.ini"
        users = folder / "users.txt"
        users.write_text('"tasks" "tasks"\n')
        self.config.write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={postgres.port}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {users}\n"
            f"pool_mode = {mode}\nignore_startup_parameters = {ignored}\n"
        )

    def start(self) -> None:
        """Start it, and wait until it passes statements on."""
        self.spawn(
            [*self.postgres.user(), *self.tied(["/usr/sbin/pgbouncer", str(self.config)])], env={}
        )
        self.wait_until(self.answers)

    def answers(self) -> bool:
        """Tell whether a client without `options` is served."""
        url = f"postgresql://tasks:tasks@127.0.0.1:{self.port}/tasks"
        try:
            return run_sql(url, "SELECT 1") == [(1,)]
        except psycopg2.OperationalError:  # it does not listen yet
            return False


@pytest.fixture
def bouncer(stack: Stack, tmp_path: pathlib.Path) -> Iterator[Callable[[str, str], PgBouncer]]:
    """Start PgBouncers before the stack's server; they end with the test."""
    started: list[PgBouncer] = []

    def start(mode: str, ignored: str) -> PgBouncer:
        started.append(PgBouncer(tmp_path, stack.postgres, mode, ignored))
        started[-1].start()
        stack.env["DATABASE_URL"] = stack.database_url.replace(
            f":{stack.postgres.port}/", f":{started[-1].port}/"
        )
        return started[-1]

    yield start
    for each in started:
        each.stop()


def state(stack: Stack) -> tuple[int, str]:
    """Return what /readyz says of the database; 0 while nothing answers."""
    try:
        answer = requests.get(f"{stack.url}/readyz", timeout=20)
    except requests.ConnectionError:
        return 0, ""
    return answer.status_code, answer.json()["database"]


@pytest.mark.parametrize("ignored", ["", "extra_float_digits, options"])
@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_pgbouncer_is_refused_by_a_sentence_and_nothing_is_done_through_it(
    stack: Stack, bouncer: Callable, mode: str, ignored: str
) -> None:
    bouncer(mode, ignored)
    producer = stack.producer(ready=False)
    until(lambda: state(stack)[0] == 503)
    answer = requests.post(f"{stack.url}/api/v1/create-task", json={"text": "a"}, timeout=20)
    assert answer.status_code == 503
    for said in (state(stack)[1], answer.json()["error"], producer.log.read_text()):
        assert "DATABASE_URL leads to a connection pooler" in said
        assert "expected PostgreSQL itself" in said
    assert "WARNING schema" in producer.log.read_text()
    assert stack.sql("SELECT to_regclass('tasks')") == [(None,)]
    assert producer.stop() == 0


def test_settings_of_the_database_do_not_hide_pgbouncer(stack: Stack, bouncer: Callable) -> None:
    for setting in SETTINGS.split("; "):
        stack.administer(f"ALTER DATABASE {stack.database} SET {setting}")
    bouncer("transaction", "extra_float_digits, options")
    stack.producer(ready=False)
    until(lambda: "leads to a connection pooler" in state(stack)[1])


def test_a_url_with_options_of_its_own_leads_to_postgresql_itself(stack: Stack) -> None:
    stack.producer(DATABASE_URL=f"{stack.database_url}?options=-c%20lock_timeout%3D3s")
    assert state(stack) == (200, "ok")
    assert stack.create("a")
