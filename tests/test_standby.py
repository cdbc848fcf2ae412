"""The failover of PostgreSQL: what was answered with 201 is there if a COMMIT waits for the
standby, and the work goes on by itself."""

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.clients import Client
from tests.stack import Stack, run_sql, until
from tests.standby import Pair

GO_ON_SECONDS = 20  # after the promotion
OUTAGE_SECONDS = 10  # until somebody promotes the standby
SOME = 100  # tasks


@pytest.fixture
def pair(tmp_path: pathlib.Path) -> Iterator[Pair]:
    """A primary and its standby, which the test may hurt."""
    pair = Pair(tmp_path / "pair")
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


@pytest.fixture
def project(pair: Pair, rabbit: Any, tmp_path: pathlib.Path) -> Iterator[Stack]:
    """A project on both."""
    stack = Stack(pair, rabbit, tmp_path)
    stack.database_url = stack.env["DATABASE_URL"] = pair.url_of(stack.database)
    stack.env |= {"HANDLER": "handlers:note", "RUNS": str(tmp_path / "runs")}
    try:
        yield stack
    finally:
        stack.close()
        stack.print_logs()


def wait_answered(clients: list[Client], count: int) -> None:
    """Wait until each client has so many more tasks answered with 201."""
    before = [len(client.answered) for client in clients]
    until(lambda: all(len(c.answered) >= n + count for c, n in zip(clients, before, strict=True)))


def end_of_new_work(stack: Stack, clients: list[Client], since: float) -> tuple[float, float]:
    """Return how many seconds after `since` the first create was answered, and one had ended."""
    answered = lambda: [t for c in clients for t in c.answered_at if t > since]  # noqa: E731
    until(answered, GO_ON_SECONDS, "a create is answered")
    [(created_at,)] = stack.sql("SELECT max(created_at) FROM tasks")
    query = "SELECT count(*) FROM tasks WHERE created_at >= %s AND status IN ('success', 'error')"
    until(lambda: stack.sql(query, created_at) > [(0,)], GO_ON_SECONDS, "a new task has ended")
    return min(answered()) - since, time.monotonic() - since


def fail_over(stack: Stack, pair: Pair, clients: list[Client], outage: float) -> None:
    """Kill the primary under load and promote the standby after some seconds; print how soon work
    goes on."""
    wait_answered(clients, SOME)
    pair.primary.kill()
    time.sleep(outage)
    pair.promote()
    answered, ended = end_of_new_work(stack, clients, time.monotonic())
    print(f"{outage} s, then promoted: first 201 {answered:.2f} s, new work ended {ended:.2f} s")
    assert ended < GO_ON_SECONDS
    wait_answered(clients, SOME)


def check_ends(stack: Stack, tasks: dict[str, str], runs: dict[str, int]) -> None:
    """Check that each task is there with its text, has run, and ended as its run did."""
    query = "SELECT id::text, text, status::text, error FROM tasks WHERE id = ANY(%s::uuid[])"
    rows = {row[0]: row[1:] for row in stack.sql(query, list(tasks))}
    assert rows.keys() == tasks.keys()
    for task_id, (text, status, error) in rows.items():
        failed = ("error", f"ValueError: told to fail: {text}")
        expected = failed if "fail" in text else ("success", None)
        assert (text, status, error) == (tasks[task_id], *expected)
    assert set(runs) >= set(tasks.values())


def test_two_failovers_to_a_synchronous_standby_lose_no_task_and_no_end(
    project: Stack, pair: Pair
) -> None:
    pair.wait_for_standby()
    producer, consumer = project.producer(), project.consumer()
    clients = [Client(project.url) for _ in range(2)]
    for client in clients:
        client.start()
    fail_over(project, pair, clients, outage=0)
    pair.follow()  # the old primary comes back as a standby, and is promoted in its turn
    pair.wait_for_standby()
    fail_over(project, pair, clients, outage=OUTAGE_SECONDS)
    for client in clients:
        client.finish()
    project.wait_ended()
    tasks = clients[0].answered | clients[1].answered
    runs = project.runs(pathlib.Path(project.env["RUNS"]))
    check_ends(project, tasks, runs)
    again = sum(runs.values()) - len(runs)
    failures = clients[0].failures + clients[1].failures
    slowest = max(client.slowest for client in clients)
    print(f"{len(tasks)} answered with 201, all there and ended; {again} ran twice")
    print(f"answers on the way: {dict(failures)}; the slowest create took {slowest:.2f} s")
    assert (producer.poll(), consumer.poll()) == (None, None)
    assert "synchronous_standby_names is empty" not in producer.log.read_text()


def test_a_failover_to_an_asynchronous_standby_loses_what_it_had_not_received(
    project: Stack, pair: Pair
) -> None:
    producer = project.producer()
    project.consumer()
    until(lambda: "synchronous_standby_names is empty" in producer.log.read_text())
    kept = project.create(*[f"kept {index}" for index in range(SOME)])
    project.wait_status(kept, "success")
    standby = f"{pair.standby.url.rpartition('/')[0]}/{project.database}"
    ended = "SELECT count(*) FROM tasks WHERE status = 'success'"
    until(lambda: run_sql(standby, ended) == [(SOME,)], what="the standby has them")
    pair.cut_off()
    lost = project.create(*[f"lost {index}" for index in range(SOME)])
    project.wait_status(lost, "success")
    pair.primary.kill()
    pair.promote()
    until(lambda: requests.get(f"{project.url}/readyz", timeout=30).status_code == 200)
    assert all(project.get(task_id) for task_id in kept)
    [(left,)] = project.sql("SELECT count(*) FROM tasks WHERE id = ANY(%s::uuid[])", lost)
    gone = len(lost) - left
    print(f"{gone} of {len(kept + lost)} tasks that were answered with 201 are lost")
    assert gone == len(lost)
    after = project.create("after")
    project.wait_status(after, "success")
    until(lambda: project.waiting() == 0)


def test_while_the_synchronous_standby_is_dead_creates_are_503_and_nothing_is_half_done(
    project: Stack, pair: Pair
) -> None:
    pair.wait_for_standby()
    project.producer()
    project.consumer()
    clients = [Client(project.url) for _ in range(2)]
    for client in clients:
        client.start()
    wait_answered(clients, SOME)
    pair.standby.kill()
    until(lambda: any(client.failures["503"] for client in clients), what="a create is a 503")
    answered = sum(len(client.answered) for client in clients)
    assert project.sql("SELECT count(*) FROM tasks") == [(answered,)]
    pair.standby.start()
    began = time.monotonic()
    wait_answered(clients, 1)
    print(f"the standby is back: creates are answered after {time.monotonic() - began:.2f} s")
    for client in clients:
        client.finish()
    project.wait_ended()
    tasks = clients[0].answered | clients[1].answered
    check_ends(project, tasks, project.runs(pathlib.Path(project.env["RUNS"])))


def test_of_several_hosts_one_that_takes_writes_is_found_without_being_asked_for(
    project: Stack, pair: Pair
) -> None:
    hosts = f"127.0.0.1:{pair.standby.port},127.0.0.1:{pair.primary.port}"
    project.producer(DATABASE_URL=f"postgresql://tasks:tasks@{hosts}/{project.database}")
    project.consumer()
    project.wait_status(project.create("a"), "success")


@pytest.mark.parametrize("level", ["local", "off"])
def test_a_commit_that_waits_for_no_standby_is_a_warning(
    project: Stack, pair: Pair, level: str
) -> None:
    pair.wait_for_standby()
    project.administer(f"ALTER DATABASE {project.database} SET synchronous_commit = {level}")
    producer = project.producer()
    until(lambda: f"synchronous_commit is {level}" in producer.log.read_text())
