"""Group commit for create-task: what arrives together is one INSERT and one COMMIT, so that one
flush to disk serves it all. A single client pays nothing for it."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import api
import database
import pool
from http_application import Answer, Environ
from http_groups import WRITERS

# A group does not wait long for the one member whose id is locked elsewhere.
GROUP_OPTIONS = "-c lock_timeout=100"


class GroupCommit:
    """Creates the tasks of single create-task requests that came together; what it cannot do for
    all of them is left to each."""

    def __init__(
        self,
        path: str,
        parse: Callable[[Any], database.NewTask],
        note: Callable[[dict[str, dict[str, Any]], list[float]], None],
        singles: pool.Pool,
    ) -> None:
        self.path = path
        self.parse = parse  # raises ValueError
        self.note = note  # gets the tasks by id, and when each request was whole
        # Connections of their own: reports that wait for locked rows cannot keep creates out.
        self.connections = pool.Pool(WRITERS, GROUP_OPTIONS)
        self.away: pool.Unavailable | None = None  # why the last group could not be written
        self.trial = threading.Lock()  # held by the only group that tries while that is so
        self.singles = singles  # for a create whose id another transaction has locked

    def takes(self, environ: Environ) -> bool:
        """Tell whether a request creates tasks."""
        return bool(environ["PATH_INFO"] == self.path and environ["REQUEST_METHOD"] == "POST")

    def answer(self, environs: list[Environ]) -> list[Answer | None]:
        """Answer the requests for one task each, which is new or the same as before."""
        members: list[tuple[Environ, database.NewTask]] = []
        for environ in environs:
            with contextlib.suppress(ValueError, RecursionError):  # among them arrays
                body = api.DECODER.decode(environ["wsgi.input"].getvalue().decode())
                # Whoever tries it again creates the same task.
                environ["tasks.new"] = new = self.parse(body)
                members.append((environ, new))
        tasks = self.insert_group(members) if members else {}
        same = [(environ, new) for environ, new in members if database.is_same(new, tasks)]
        began = [environ["tasks.began"] for environ, _ in same]
        self.note({new.id: tasks[new.id] for _, new in same}, began)
        created = {id(environ): tasks[new.id] for environ, new in same}
        return [answer_created(created.get(id(environ))) for environ in environs]

    def insert_group(
        self, members: list[tuple[Environ, database.NewTask]]
    ) -> dict[str, dict[str, Any]]:
        """Return by their ids the tasks of a group, none if each is to be tried alone. If the
        database is away, note that with each. Then one group tries at a time: others need not wait
        for the same, nor leave more sessions behind that wait for a standby."""
        away = self.away
        if away is not None and not self.trial.acquire(blocking=False):
            return self.refuse(members, away)
        try:
            group = [new for _, new in members]
            tasks = self.connections.statement(lambda cursor: database.insert_tasks(cursor, group))
            self.away = None
            return tasks
        except pool.Unavailable as error:
            is_about_a_lock = pool.is_about_a_lock(error)
            # Without a cause, only all connections were busy.
            self.away = None if is_about_a_lock or error.__cause__ is None else error
            return {} if is_about_a_lock else self.refuse(members, error)
        finally:
            if away is not None:
                self.trial.release()

    def refuse(
        self, members: list[tuple[Environ, database.NewTask]], error: pool.Unavailable
    ) -> dict[str, dict[str, Any]]:
        """Have the application answer a group that the database is away."""
        for environ, _ in members:
            environ["tasks.unavailable"] = error
        return {}

    def insert(self, new: database.NewTask) -> dict[str, dict[str, Any]]:
        """Return by its id a task that was too large for a group, or met a lock there. It goes over
        the few connections too: each keeps as much memory as its largest text took."""
        insert = lambda cursor: database.insert_tasks(cursor, [new])  # noqa: E731
        try:
            return self.connections.statement(insert)
        except pool.Unavailable as error:
            if not pool.is_about_a_lock(error):
                raise
        return self.singles.statement(insert)


def answer_created(task: dict[str, Any] | None) -> Answer | None:
    """Return the answer that a task has been created."""
    if task is None:
        return None
    content = api.ENCODER.encode(task).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    return "201 Created", headers, content
