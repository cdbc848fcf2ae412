"""Clients that never give up, and count what they had to put up with."""

import collections
import threading
import time
import uuid

import requests

TRY_SECONDS = 20  # longer than the producer may take
PAUSE_SECONDS = 0.2  # between two tries, as Retry-After says in tests' measure


class Client(threading.Thread):
    """Creates task after task, each under the same id until its 201; with `wait`, reads each until
    it has ended."""

    def __init__(self, url: str, wait: int = 0, pause: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.url = f"{url}/api/v1"
        self.wait_seconds = wait
        self.pause = pause
        self.stop = threading.Event()
        self.session = requests.Session()
        self.answered: dict[str, str] = {}  # id -> text
        self.answered_at: list[float] = []  # of time.monotonic()
        self.ended: dict[str, str] = {}  # id -> status, as it was answered
        self.failures: collections.Counter[str] = collections.Counter()  # by status, or "broken"
        self.slowest = 0.0  # seconds from the first try to the 201

    def run(self) -> None:
        while not self.stop.wait(self.pause):
            task_id, text = str(uuid.uuid4()), uuid.uuid4().hex
            text += " fail" * (len(self.answered) % 10 == 9)
            began = time.monotonic()
            self.persist("POST", "create-task", json={"taskId": task_id, "text": text})
            self.answered[task_id] = text
            self.answered_at.append(time.monotonic())
            self.slowest = max(self.slowest, time.monotonic() - began)
            if self.wait_seconds:
                self.await_end(task_id)

    def await_end(self, task_id: str) -> None:
        """Read the task until it has ended, each time for as long as the client waits."""
        query = {"taskId": task_id, "wait": str(self.wait_seconds)}
        while task_id not in self.ended:
            status = self.persist("GET", "get-task-data", params=query)["taskStatus"]
            if status in ("success", "error"):
                self.ended[task_id] = status

    def persist(self, method: str, call: str, **arguments: object) -> dict:
        """Repeat a call until it is answered with 200 or 201; return the answer."""
        while True:
            seconds = TRY_SECONDS + self.wait_seconds
            try:
                answer = self.session.request(
                    method, f"{self.url}/{call}", timeout=seconds, **arguments
                )
            except requests.RequestException:
                self.failures["broken"] += 1
            else:
                if answer.status_code in (200, 201):
                    return answer.json()
                self.failures[str(answer.status_code)] += 1
            time.sleep(PAUSE_SECONDS)

    def finish(self) -> None:
        """Let the task under way end, and stop."""
        self.stop.set()
        self.join(60)
        assert not self.is_alive(), "a client still waits"
