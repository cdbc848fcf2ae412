"""Kills and freezes everything, and cuts the connections between all parts, two things at once too,
while tasks flow; then compares rows with runs."""

import contextlib
import os
import pathlib
import random
import signal
import threading
import time
import uuid
from typing import Any

import pytest
import requests

from tests.proxy import Proxy
from tests.stack import Stack, until

SENT_TIMEOUT_SECONDS = 30
LEASE_SECONDS = 20
FREEZES = (1, 3, 10, 40)  # seconds
# A node of RabbitMQ 3.10 that dies while a quorum queue is new can come back with one that answers
# nobody, as the README says; no client can mend that.
QUEUE_SETTLES_SECONDS = 5


class Creator(threading.Thread):
    """A client that never gives up: it repeats each create, under the same id, until its 201."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.url = f"{url}/api/v1/create-task"
        self.random = random.Random(seed)
        self.stop = threading.Event()
        self.answered: dict[str, str] = {}  # id -> text
        self.repeats = 0

    def run(self) -> None:
        while not self.stop.is_set():
            texts = [self.text() for _ in range(self.random.choice((1, 1, 10)))]
            tasks = [{"text": text, "taskId": str(uuid.uuid4())} for text in texts]
            while not self.create(tasks):
                self.repeats += 1
                time.sleep(0.2)
            self.answered |= {task["taskId"]: task["text"] for task in tasks}
            time.sleep(0.1)

    def text(self) -> str:
        """Return a text nobody else has, that says what its run is to do."""
        kinds = ("", "", "", "fail", "sleep=0.05", "sleep=0.2", "bytes=5000")
        words = "sleep=9" if self.random.random() < 0.02 else self.random.choice(kinds)
        return f"{uuid.uuid4().hex} {words}".strip()

    def create(self, tasks: list[dict]) -> bool:
        """POST once; tell whether it was answered with 201."""
        body = tasks[0] if len(tasks) == 1 else tasks
        try:
            return requests.post(self.url, json=body, timeout=20).status_code == 201
        except requests.RequestException:
            return False


def test_no_death_of_anything_loses_a_task(
    server_classes: tuple, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    seed = request.config.getoption("--chaos-seed")
    seed = random.randrange(10**6) if seed is None else seed
    print(f"--chaos-seed={seed}")
    dice = random.Random(seed)
    postgres = server_classes[0](tmp_path / "postgres")
    rabbit = server_classes[1](tmp_path / "rabbit")
    postgres.start()
    rabbit.start()
    stack = Stack(postgres, rabbit, tmp_path)
    links = {name: Proxy(port) for name, port in (
        ("producer-postgres", postgres.port), ("producer-rabbit", rabbit.port),
        ("consumer-rabbit", rabbit.port), ("consumer-producer", stack.port),
    )}  # fmt: skip

    def through(url: str, name: str) -> str:
        host, _, path = url.rpartition("@")[2].partition("/")
        return url.replace(f"{host}/{path}", f"127.0.0.1:{links[name].port}/{path}")

    runs = tmp_path / "runs"
    settings = {"SENT_TIMEOUT_SECONDS": SENT_TIMEOUT_SECONDS, "LEASE_SECONDS": LEASE_SECONDS}
    settings["LOG_LEVEL"] = "INFO"
    creator = Creator(stack.url, seed)
    try:
        producer = stack.producer(
            **settings,
            DATABASE_URL=through(stack.database_url, "producer-postgres"),
            RABBITMQ_URL=through(rabbit.url, "producer-rabbit"),
        )
        work = settings | {
            "HANDLER": "handlers:note",
            "RUNS": runs,
            "RABBITMQ_URL": through(rabbit.url, "consumer-rabbit"),
            "PRODUCER_URL": f"http://127.0.0.1:{links['consumer-producer'].port}",
        }
        consumers = [stack.consumer(**work), stack.consumer(**work, CONCURRENCY=3)]
        creator.start()
        victims = {
            "producer": producer,
            "consumer 1": consumers[0],
            "consumer 2": consumers[1],
            "postgres": postgres,
            "rabbit": rabbit,
        }
        until(lambda: stack.counts().get("success", 0) > 20, what="tasks flow")
        time.sleep(QUEUE_SETTLES_SECONDS)
        torment = Torment(victims, consumers, links, dice)
        torment.run(request.config.getoption("--chaos-seconds"))
        creator.stop.set()
        creator.join(60)
        stack.wait_ended(timeout=300)
        until(lambda: stack.unsettled() == {}, what="queues empty")
        done = torment.done
        assert creator.answered and all(done.values()), f"nothing was tried: {done}"
        verify(stack, creator.answered, stack.runs(runs))
        again = sum(count - 1 for count in stack.runs(runs).values())
        killers = "SELECT count(*) FROM tasks WHERE error LIKE 'killed its worker%%'"
        print(
            f"seed {seed}: {len(creator.answered)} tasks, {creator.repeats} repeated creates, "
            f"{again} second runs, {stack.sql(killers)[0][0]} innocents failed, {done}, "
            f"ends {stack.counts()}"
        )
    finally:
        creator.stop.set()
        stack.close(queues=False)
        rabbit.stop()
        postgres.stop()
        for link in links.values():
            link.close()
        stack.print_logs()


def family(pid: int) -> list[int]:
    """Return a process and all that it has started, itself first."""
    pids = [pid]
    with contextlib.suppress(OSError):
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                pids += family(int(child))
    return pids


def send(pids: list[int], number: int) -> None:
    """Send a signal to processes that may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Torment:
    """Does harm to the parts of a project, one or two at a time, and makes it good again."""

    def __init__(
        self,
        victims: dict[str, Any],
        consumers: list[Any],
        links: dict[str, Proxy],
        dice: random.Random,
    ) -> None:
        self.victims = victims
        self.consumers = consumers
        self.links = links
        self.dice = dice
        self.thaws: list[tuple[float, Any]] = []  # when a frozen thing goes on
        kinds = [f"kill {name}" for name in victims] + ["kill worker", "freeze worker"]
        kinds += [f"freeze {name}" for name in victims]
        kinds += [f"{verb} {name}" for verb in ("cut", "hold") for name in links]
        self.done = dict.fromkeys(kinds, 0)

    def run(self, seconds: float) -> None:
        """First each kind in turn, then at random, for so many seconds and at least once."""
        turn = self.dice.sample(list(self.done), len(self.done))
        deadline = time.monotonic() + seconds
        while turn or time.monotonic() < deadline:
            pause = seconds / 2 / len(self.done) if turn else 3
            self.rest(self.dice.uniform(0.1, min(pause, 3)))
            kinds = self.dice.sample(list(self.done), self.dice.choice((1, 1, 2)))
            if turn:
                kinds = list({turn.pop(), kinds[-1]})
            killed = [kind for kind in kinds if self.harm(*kind.split(" ", 1), time.monotonic())]
            self.rest(self.dice.choice((0, 0.5, 3)))
            for kind in killed:
                self.victims[kind.split(" ", 1)[1]].start()
        self.rest(0)
        for _, thaw in self.thaws:
            thaw()

    def rest(self, seconds: float) -> None:
        """Wait, and let go on what has been frozen for long enough."""
        deadline = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            for thaw in [each for each in self.thaws if each[0] <= now]:
                self.thaws.remove(thaw)
                thaw[1]()
            if now >= deadline:
                return
            time.sleep(0.05)

    def harm(self, verb: str, name: str, now: float) -> bool:
        """Do one harm; return whether the victim must be started again."""
        if name == "worker":
            workers = [pid for each in self.consumers for pid in family(each.pid)[1:]]
            pids = workers and [self.dice.choice(workers)]
        elif name in self.victims:
            pids = family(self.victims[name].pid)
            if name.startswith("consumer"):
                pids = pids[:1]  # its workers run on
        self.done[f"{verb} {name}"] += 1
        if verb == "cut":
            self.links[name].cut()
        elif verb == "hold":
            self.links[name].frozen.set()
            self.thaws.append((now + self.dice.choice(FREEZES), self.links[name].frozen.clear))
        elif verb == "freeze":
            send(pids, signal.SIGSTOP)
            thaw = lambda: send(pids, signal.SIGCONT)  # noqa: E731
            self.thaws.append((now + self.dice.choice(FREEZES), thaw))
        elif name == "worker":
            send(pids, signal.SIGKILL)
        else:
            self.victims[name].kill()
            return True
        return False


def verify(stack: Stack, answered: dict[str, str], runs: dict[str, int]) -> None:
    """Compare every row with what was answered and what was run."""
    rows = {
        task_id: row
        for task_id, *row in stack.sql(
            "SELECT id::text, text, status::text, error, starts FROM tasks"
        )
    }
    assert answered.keys() <= rows.keys(), "a task that was answered with 201 is gone"
    for text, status, error, starts in rows.values():
        count = runs.get(text, 0)
        if status == "success":
            assert count >= 1, f"{text} succeeded without a run"
            assert "fail" not in text, f"{text} cannot have succeeded"
        elif str(error).startswith("killed its worker 3 times"):
            # a start is counted before it: who is killed between has not noted a run
            assert starts == 3 and count >= 1, f"{text} was started {starts} times, ran {count}"
        else:
            assert "fail" in text and count >= 1, f"{text} ended in {status}: {error}"
