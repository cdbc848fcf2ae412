"""Suspects and leases: what is held by its row, what is asked about, and what counts as a death.

With --full-times the waits are those of a service without settings; else they are shortened."""

import contextlib
import pathlib
import re
import signal
import time
from typing import Any, NamedTuple

import psycopg2
import pytest

from native import servers
from tests.proxy import Proxy
from tests.stack import Stack, until


class Times(NamedTuple):
    """Settings, and the seconds that follow from them."""

    settings: dict[str, Any]
    hold: float  # a task that has run for so long is held by its row
    lease: float
    stop: float


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Times:
    """The service's own times, or short ones."""
    if request.config.getoption("--full-times"):
        return Times({}, 30, 120, 50)
    settings = {"SENT_TIMEOUT_SECONDS": 12, "LEASE_SECONDS": 8, "STOP_SECONDS": 5}
    return Times(settings, 3, 8, 5)


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> pathlib.Path:
    """The file in which the handler notes each run."""
    return tmp_path / "runs"


def noting(times: Times, runs: pathlib.Path, **env: Any) -> dict[str, Any]:
    """Return the settings of a consumer that notes its runs."""
    return times.settings | {"HANDLER": "handlers:note", "RUNS": runs, **env}


def wait_runs(stack: Stack, runs: pathlib.Path, text: str, times: int = 1) -> None:
    """Wait until a task has begun so many times."""
    until(lambda: stack.runs(runs).get(text, 0) >= times, 600, f"{text} begun {times} times")


def wait_held(stack: Stack, count: int = 1) -> None:
    """Wait until so many rows are held by consumers."""
    held = "SELECT count(*) FROM tasks WHERE holder::text !~ '^[0-]*$' AND status = 'sent'"
    until(lambda: stack.sql(held) == [(count,)], what=f"{count} rows held")


def revive(stack: Stack, consumer: servers.Service, seconds: float, **env: Any) -> None:
    """Start a consumer again whenever it has died, until all tasks have ended."""
    deadline = time.monotonic() + seconds
    while stack.counts().keys() & {"pending", "sent"}:
        assert time.monotonic() < deadline, stack.sql("SELECT text, status, starts FROM tasks")
        if consumer.poll() is not None:
            consumer = stack.consumer(**env)
        time.sleep(0.2)


def test_a_long_task_that_kills_its_consumer_ends_in_error_after_three_deaths(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    stack.producer(**times.settings)
    text = f"sleep={times.hold * 1.2 + 1} kill"
    ids = stack.create(text)
    settings = noting(times, runs)
    revive(stack, stack.consumer(**settings), 5 * (times.lease + times.hold) + 400, **settings)
    assert stack.get(ids[0])["error"] == "killed its worker 3 times"
    assert stack.runs(runs) == {text: 3}
    until(lambda: stack.unsettled() == {})


def test_connections_that_break_with_a_full_window_fail_nobody(
    stack: Stack, times: Times, runs: pathlib.Path, proxy: Any
) -> None:
    link: Proxy = proxy(stack.rabbit.port)
    stack.producer(**times.settings)
    texts = [f"sleep=0.3 {index}" for index in range(120)]
    ids = stack.create(*texts)
    stack.wait_status(ids, "sent")
    url = f"amqp://tasks:tasks@127.0.0.1:{link.port}/%2F"
    consumer = stack.consumer(**noting(times, runs, PREFETCH=60, CONCURRENCY=4, RABBITMQ_URL=url))
    for _ in range(10):
        connected = consumer.log.read_text().count("connected")
        until(lambda n=connected: consumer.log.read_text().count("connected") >= n)
        time.sleep(0.4)
        link.cut()
    stack.wait_status(ids, "success")
    [(most,)] = stack.sql("SELECT max(starts) FROM tasks")
    assert most <= 1
    assert set(stack.runs(runs)) == set(texts)
    assert sum(stack.runs(runs).values()) <= len(texts) + 10 * 4


def test_of_eight_tasks_only_the_one_that_takes_the_consumer_down_ends_in_error(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    stack.producer(**times.settings)
    innocent = [f"sleep=2 {index}" for index in range(7)]
    ids = stack.create(*innocent, "sleep=1 kill")
    stack.wait_status(ids, "sent")
    settings = noting(times, runs, CONCURRENCY=8)
    revive(stack, stack.consumer(**settings), 6 * times.lease + 300, **settings)
    stack.wait_status(ids[:7], "success")
    assert stack.get(ids[7])["error"] == "killed its worker 3 times"
    assert stack.runs(runs)["sleep=1 kill"] == 3


def test_a_consumer_whose_workers_are_all_on_held_tasks_takes_nothing(
    stack: Stack, times: Times, runs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stack.producer(**times.settings)
    busy = stack.consumer(**noting(times, runs, CONCURRENCY=2))
    longer = times.hold * 8 + 20
    long = [f"sleep={longer} {index}" for index in range(2)]
    ids = stack.create(*long)
    for text in long:
        wait_runs(stack, runs, text)
    wait_held(stack, 2)
    until(lambda: stack.unsettled() == {}, what="their messages are acked")
    with stack.channel() as channel:
        declared = lambda: channel.queue_declare("tasks", passive=True).method  # noqa: E731
        until(lambda: declared().consumer_count == 0)
        others = tmp_path / "others"
        stack.consumer(**noting(times, others, CONCURRENCY=1))
        quick = stack.create(*map(str, range(50)))
        stack.wait_status(quick, "success")
        assert stack.runs(others) == {str(index): 1 for index in range(50)}
    windows = lambda: re.findall(r"window is now (\d+)", busy.log.read_text())  # noqa: E731
    assert windows()[-1] == "0"
    stack.wait_status(ids, "success", timeout=longer + 60)
    until(lambda: windows()[-1] != "0", what="it takes tasks again")
    assert stack.runs(runs) == dict.fromkeys(long, 1)


def test_no_held_task_runs_twice_when_the_producer_was_frozen(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    producer = stack.producer(**times.settings)
    for _ in range(2):
        stack.consumer(**noting(times, runs, CONCURRENCY=2))
    frozen = times.lease * 1.6 + 8
    texts = [f"sleep={times.hold + frozen + times.lease + 10} {index}" for index in range(3)]
    ids = stack.create(*texts)
    wait_held(stack, 3)
    producer.signal(signal.SIGSTOP)
    time.sleep(frozen)
    producer.signal(signal.SIGCONT)
    stack.wait_status(ids, "success", timeout=600)
    assert stack.runs(runs) == dict.fromkeys(texts, 1)
    assert "rescued" not in producer.log.read_text()


def test_a_lock_on_one_held_row_lets_no_other_lease_lapse(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    producer = stack.producer(**times.settings)
    for _ in range(2):
        stack.consumer(**noting(times, runs, CONCURRENCY=2))
    texts = [f"sleep={times.hold + 2.5 * times.lease} {index}" for index in range(4)]
    ids = stack.create(*texts)
    wait_held(stack, 4)
    with contextlib.closing(psycopg2.connect(stack.database_url)) as psql:
        psql.cursor().execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", ids[:1])
        time.sleep(times.lease * 1.5)
        left = "SELECT min(lease_until - now()) > interval '0' FROM tasks WHERE id <> %s"
        assert stack.sql(left, ids[0]) == [(True,)]
    stack.wait_status(ids, "success", timeout=600)
    assert {stack.runs(runs)[text] for text in texts[1:]} == {1}
    assert stack.runs(runs)[texts[0]] <= 2
    assert "rescued 2" not in producer.log.read_text()


def test_the_lease_of_a_dead_consumer_ends_whoever_has_its_name_and_pid(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    """Another consumer lives beside it, on the same host; only the UUID tells them apart."""
    stack.producer(**times.settings)
    victim = stack.consumer(**noting(times, runs))
    [task_id] = stack.create(f"sleep={times.hold * 2 + 4} a")
    wait_held(stack)
    [(holder, lease)] = stack.sql("SELECT holder, lease_until - now() < '10 min' FROM tasks")
    assert holder and lease
    victim.kill()
    stack.consumer(**noting(times, runs))
    wait_runs(stack, runs, f"sleep={times.hold * 2 + 4} a", times=2)
    assert stack.sql("SELECT starts FROM tasks") == [(1,)]
    [(another,)] = stack.sql("SELECT holder FROM tasks")
    assert another not in (None, holder)
    stack.wait_status([task_id], "success")


def test_a_failure_at_the_moment_of_the_hold_counts_once(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    """Forty tasks fail around the time at which their rows take over."""
    stack.producer(**times.settings, MAX_ATTEMPTS=5, RETRY_SECONDS=3600)
    stack.consumer(**noting(times, runs, CONCURRENCY=40))
    texts = [f"sleep={times.hold + index * 0.05:.2f} fail {index}" for index in range(-10, 30)]
    stack.create(*texts)
    failed = "SELECT count(*) FROM tasks WHERE failures = 1 AND attempt = 2 AND delayed"
    until(lambda: stack.sql(failed) == [(40,)], times.hold + 60)
    until(lambda: stack.unsettled() == {})
    assert stack.sql("SELECT count(*), min(failures), max(failures) FROM tasks") == [(40, 1, 1)]
    assert stack.runs(runs) == dict.fromkeys(texts, 1)


def test_a_death_between_release_and_ack_makes_no_second_run_at_once(
    stack: Stack, times: Times, runs: pathlib.Path, proxy: Any
) -> None:
    """The ack cannot get out: the message comes again, and is an old copy."""
    link: Proxy = proxy(stack.rabbit.port)
    stack.producer(**times.settings)
    url = f"amqp://tasks:tasks@127.0.0.1:{link.port}/%2F"
    settings = noting(times, runs) | {"SENT_TIMEOUT_SECONDS": 3600, "STOP_SECONDS": 2}
    leaver = stack.consumer(**settings, RABBITMQ_URL=url)
    [task_id] = stack.create("sleep=6 a")
    wait_runs(stack, runs, "sleep=6 a")
    link.frozen.set()
    leaver.child.terminate()
    released = "SELECT count(*) FROM tasks WHERE starts = 0 AND sent_at > %s"
    [(sent,)] = stack.sql("SELECT sent_at FROM tasks")
    until(lambda: stack.sql(released, sent) == [(1,)], what="released, and sent again")
    leaver.kill()
    stack.consumer(**settings)
    wait_runs(stack, runs, "sleep=6 a", times=2)
    link.cut()
    stack.wait_status([task_id], "success")
    until(lambda: stack.unsettled() == {})
    assert stack.runs(runs) == {"sleep=6 a": 2}
    assert stack.sql("SELECT starts FROM tasks") == [(0,)]


def test_graceful_restarts_during_a_long_task_count_no_death(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    stack.producer(**times.settings)
    text = f"sleep={times.hold * 3 + times.stop + 2} long"
    [task_id] = stack.create(text)
    for round_ in range(4):
        consumer = stack.consumer(**noting(times, runs))
        wait_runs(stack, runs, text, times=round_ + 1)
        if round_ == 3:
            break
        if round_ % 2:
            wait_held(stack)
        began = time.monotonic()
        assert consumer.stop(times.stop + 10) == 0
        assert time.monotonic() - began < times.stop + 2
        assert stack.sql("SELECT starts, attempt FROM tasks") == [(0, 1)]
    stack.wait_status([task_id], "success", timeout=600)
    assert stack.runs(runs) == {text: 4}
    until(lambda: stack.unsettled() == {})


def test_a_consumer_restarted_every_few_seconds_lets_a_long_task_succeed(
    stack: Stack, times: Times, runs: pathlib.Path
) -> None:
    """Two consumers take turns; each lets what runs end."""
    settings = noting(times, runs) | {"STOP_SECONDS": 50}
    stack.producer(**times.settings)
    text = f"sleep={min(times.hold * 4, 35)} long"
    [task_id] = stack.create(text)
    consumer = stack.consumer(**settings)
    wait_runs(stack, runs, text)
    while stack.get(task_id)["taskStatus"] == "sent":
        consumer.child.terminate()
        consumer = stack.consumer(**settings)
        time.sleep(2)
    assert stack.get(task_id)["taskStatus"] == "success"
    assert stack.runs(runs) == {text: 1}


def test_neither_an_ask_nor_a_heartbeat_takes_nonsense(stack: Stack) -> None:
    stack.producer()
    url = f"{stack.url}/api/v1/consumer-heartbeat"
    good = {
        "consumer": "11111111-0000-0000-0000-000000000000",
        "host": "a", "concurrency": 1, "version": "1", "tasks": [],
    }  # fmt: skip
    answer = stack.session.put(url, json=good).json()
    assert abs(answer["now"] - time.time()) < 5
    assert (answer["held"], answer["stop"]) == ([], [])
    [row] = stack.sql("SELECT host, concurrency, tasks FROM consumers")
    assert row == ("a", 1, [])
    unknown = {"taskId": good["consumer"], "attempt": 1, "seconds": 40, "state": "running"}
    answer = stack.session.put(url, json=good | {"tasks": [unknown]}).json()
    assert answer["stop"] == [{"taskId": good["consumer"], "attempt": 1}]
    for wrong in (
        [], 5, {}, good | {"consumer": "me"}, good | {"host": 5}, good | {"host": "x" * 256},
        good | {"concurrency": -1}, good | {"tasks": [5]}, good | {"tasks": [unknown] * 10_001},
        good | {"tasks": [unknown | {"seconds": -1}]}, good | {"tasks": [unknown | {"state": 1}]},
    ):  # fmt: skip
        refused = stack.session.put(url, json=wrong)
        assert refused.status_code == 400 and "expected" in refused.json()["error"], wrong
