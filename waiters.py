"""Clients that wait for the end of a task: one thread asks the database for all of them, and none
of them holds a connection to it."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import database
import pool
import process

log = logging.getLogger("waiters")

POLL_SECONDS = 0.05
IDLE_SECONDS = 1.0


class Full(Exception):
    """So many wait already that one more would take the place of other calls."""


class Waiter:
    """One client that waits; its gate is a lock that is held until its time has come."""

    def __init__(self, task_id: str, is_gone: Callable[[], bool]) -> None:
        self.task_id = task_id
        self.is_gone = is_gone
        self.gate = threading.Lock()
        self.gate.acquire()


class Waiters:
    """All clients that wait, at most so many."""

    def __init__(self, most: int, stop: threading.Event) -> None:
        self.most = most
        self.stop = stop
        self.connections = pool.Pool(1)
        self.changed = threading.Condition()
        self.waiting: set[Waiter] = set()

    def wait(self, task_id: str, seconds: float, is_gone: Callable[[], bool]) -> None:
        """Return when the task has ended or is deleted, the client is gone, the time is up or the
        service stops. Raise Full."""
        waiter = Waiter(task_id, is_gone)
        with self.changed:
            if len(self.waiting) >= self.most:
                raise Full
            self.waiting.add(waiter)
            self.changed.notify()
        try:
            if not self.stop.is_set():
                waiter.gate.acquire(timeout=seconds)
        finally:
            with self.changed:
                self.waiting.discard(waiter)

    def run(self) -> None:
        """Let clients go whose wait is over, until stop is set: the body of a thread."""
        backoff = process.Backoff(log, "nobody hears how tasks end", most=1)
        while not self.stop.is_set():
            with self.changed:
                if not self.waiting:
                    self.changed.wait(IDLE_SECONDS)
                waiting = list(self.waiting)
            if not waiting:
                continue
            delay = POLL_SECONDS
            try:
                self.open_gates(waiting)
                backoff.succeeded()
            except pool.Unavailable as error:
                delay = backoff.failed(error)
            except Exception as error:  # the top of a loop: nobody else would let them go
                log.exception("the wait for tasks failed")
                delay = backoff.failed(error)
            self.stop.wait(delay)
        with self.changed:
            for waiter in self.waiting:
                release(waiter)

    def open_gates(self, waiting: list[Waiter]) -> None:
        """Let those go whose task is not under way any more, and those whose client has gone."""
        ids = list({waiter.task_id for waiter in waiting})
        work: Callable[[Any], set[str]] = lambda cursor: database.select_open(cursor, ids)  # noqa: E731
        still_open = self.connections.statement(work)
        for waiter in waiting:
            if waiter.task_id not in still_open or waiter.is_gone():
                release(waiter)


def release(waiter: Waiter) -> None:
    """Open a gate; it may be open already."""
    if waiter.gate.locked():
        waiter.gate.release()
