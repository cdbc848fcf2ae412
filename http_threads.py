"""Threads that are kept for the next job."""

import itertools
import queue
import threading
from collections.abc import Callable

KEPT = 32  # threads without a job; what a burst takes beyond that ends with it


class Threads:
    """Runs each job at once, in a thread that is free or in a new one: no job waits for another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.numbers = itertools.count(1)
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.free = 0  # threads that wait for a job which is not theirs yet

    def run(self, job: Callable[[], None]) -> None:
        """Run a job, which must not raise; raise RuntimeError if there can be no thread for it."""
        with self.lock:
            is_free = self.free > 0
            self.free -= is_free
        if is_free:
            self.jobs.put(job)
            return
        name = f"{self.name}-{next(self.numbers)}"
        threading.Thread(target=self.work, args=(job,), name=name, daemon=True).start()

    def work(self, job: Callable[[], None] | None) -> None:
        """Run a job and then those that come, the body of a thread."""
        while job is not None:
            job()
            job = None  # it holds a connection, and what that has received
            with self.lock:
                if self.free >= KEPT:
                    return
                self.free += 1
            job = self.jobs.get()
