"""Kills everything in turn, two at once too, while tasks flow; then compares rows with runs."""

import pathlib
import random
import threading
import time
import uuid
from typing import Any

import pytest
import requests

from tests.stack import Stack, until

SENT_TIMEOUT_SECONDS = 30
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
        words = self.random.choice(("", "", "", "fail", "sleep=0.05", "sleep=0.2", "bytes=5000"))
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
    runs = tmp_path / "runs"
    settings = {"SENT_TIMEOUT_SECONDS": SENT_TIMEOUT_SECONDS, "LOG_LEVEL": "INFO"}
    creator = Creator(stack.url, seed)
    try:
        producer = stack.producer(**settings)
        work = settings | {"HANDLER": "handlers:note", "RUNS": runs}
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
        kills = torment(victims, dice, request.config.getoption("--chaos-seconds"))
        creator.stop.set()
        creator.join(60)
        stack.wait_ended(timeout=300)
        until(lambda: stack.unsettled() == {}, what="queues empty")
        assert creator.answered and all(kills.values()), f"nothing was tried: {kills}"
        verify(stack, creator.answered, stack.runs(runs))
        print(
            f"seed {seed}: {len(creator.answered)} tasks, {creator.repeats} repeated creates, "
            f"{sum(stack.runs(runs).values())} runs, kills {kills}, ends {stack.counts()}"
        )
    finally:
        creator.stop.set()
        stack.close(queues=False)
        rabbit.stop()
        postgres.stop()
        stack.print_logs()


def torment(victims: dict[str, Any], dice: random.Random, seconds: float) -> dict[str, int]:
    """Kill one or two victims again and again and start them anew; return the kills of each."""
    kills = dict.fromkeys(victims, 0)
    turn = dice.sample(list(victims), len(victims))  # first each in turn, then at random
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(dice.uniform(0.1, 3))
        names = dice.sample(list(victims), dice.choice((1, 1, 2)))
        if turn:
            names = list({turn.pop(), names[-1]})
        for name in names:
            victims[name].kill()
            kills[name] += 1
        time.sleep(dice.choice((0, 0.5, 3)))
        for name in names:
            victims[name].start()
    return kills


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
