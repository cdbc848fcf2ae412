"""Group commit for create-task: what arrives together is one INSERT and one COMMIT, so that one
flush to disk serves it all. A single client pays nothing for it."""

import itertools
import threading
from typing import Any

import psycopg2.errors

import database
import pool

GROUP_BYTES = 4 * 1024 * 1024
# A group does not wait long for the one member whose id is locked elsewhere.
GROUP_OPTIONS = "-c lock_timeout=100"


class Waiter:
    """A create under way; its gate is a lock that is held until somebody opens it."""

    __slots__ = ("gate", "new", "next", "outcome")

    def __init__(self, new: database.NewTask) -> None:
        self.new = new
        self.next: Waiter | None = None
        self.gate = threading.Lock()
        self.gate.acquire()
        self.outcome: dict[str, Any] | Exception | None = None


class GroupCommit:
    """Creates that arrive together become one INSERT and one COMMIT: one flush to disk for all.

    The first caller writes at once; who comes meanwhile waits, and one of them writes for the rest.
    """

    def __init__(self, singles: pool.Pool) -> None:
        # A connection of its own: reports that wait for locked rows cannot keep creates out.
        self.groups = pool.Pool(1, GROUP_OPTIONS)
        self.singles = singles  # for a create whose id another transaction has locked
        self.lock = threading.Lock()
        self.waiting: list[Waiter] = []
        self.writing = False

    def insert(self, new: database.NewTask) -> dict[str, Any]:
        """Return the task, committed; the existing one if its id is taken."""
        waiter = Waiter(new)
        with self.lock:
            self.waiting.append(waiter)
            leads, self.writing = not self.writing, True
        if not leads:
            waiter.gate.acquire()  # opened with an outcome, or without one to take over the lead
            if waiter.next is not None:
                waiter.next.gate.release()
        if waiter.outcome is None:
            self.write()
        if isinstance(waiter.outcome, dict):
            return waiter.outcome
        assert waiter.outcome is not None
        if isinstance(waiter.outcome.__cause__, psycopg2.errors.LockNotAvailable):
            # Another transaction holds an id of the group: each waits for itself, in its thread.
            return self.singles.statement(
                lambda cursor: database.insert_tasks(cursor, [new])[new.id]
            )
        raise waiter.outcome

    def write(self) -> None:
        """Write what waits now, then hand the lead to the first of those that came meanwhile."""
        with self.lock:
            group = self.waiting[: fitting(self.waiting)]
            self.waiting = self.waiting[len(group) :]
        try:
            new = [waiter.new for waiter in group]
            tasks = self.groups.statement(lambda cursor: database.insert_tasks(cursor, new))
            for waiter in group:
                waiter.outcome = tasks[waiter.new.id]
        except Exception as error:  # every waiter raises it in its own thread
            for waiter in group:
                waiter.outcome = error
        with self.lock:
            self.writing = bool(self.waiting)
            leader = self.waiting[:1]
        for waiter, following in itertools.pairwise(group[1:]):
            waiter.next = following
        for waiter in (*leader, *group[1:2]):
            waiter.gate.release()


def fitting(waiting: list[Waiter]) -> int:
    """Return how many of the waiting fit one group by bytes, at least one."""
    size = 0
    for count, waiter in enumerate(waiting):
        size += len(waiter.new.text)
        if size > GROUP_BYTES:
            return max(count, 1)
    return len(waiting)
