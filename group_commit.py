"""Group commit for create-task: what arrives together is one INSERT and one COMMIT, so that one
flush to disk serves it all. A single client pays nothing for it."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import api
import database
import pool
from http_application import Answer, Environ
from http_server import GROUP_WRITERS

# A group does not wait long for the one member whose id is locked elsewhere.
GROUP_OPTIONS = "-c lock_timeout=100"


class GroupCommit:
    """Creates the tasks of single create-task requests that came together; what it cannot do for
    all of them is left to each."""

    def __init__(
        self,
        path: str,
        parse: Callable[[Any], database.NewTask],
        note: Callable[[list[dict[str, Any]], float], None],
        singles: pool.Pool,
    ) -> None:
        self.path = path
        self.parse = parse  # raises ValueError
        self.note = note  # gets the tasks that are answered with 201, and how long that took
        # Connections of their own: reports that wait for locked rows cannot keep creates out.
        self.connections = pool.Pool(GROUP_WRITERS, GROUP_OPTIONS)
        self.singles = singles  # for a create whose id another transaction has locked

    def takes(self, environ: Environ) -> bool:
        """Tell whether a request creates tasks."""
        return bool(environ["PATH_INFO"] == self.path and environ["REQUEST_METHOD"] == "POST")

    def answer(self, environs: list[Environ]) -> list[Answer | None]:
        """Answer the requests for one task each, which is new or the same as before."""
        began = time.perf_counter()
        members: list[tuple[Environ, database.NewTask]] = []
        for environ in environs:
            with contextlib.suppress(ValueError, RecursionError):  # among them arrays
                body = api.DECODER.decode(environ["wsgi.input"].getvalue().decode())
                members.append((environ, self.parse(body)))
        if not members:
            return [None] * len(environs)
        group = [new for _, new in members]
        try:
            tasks = self.connections.statement(lambda cursor: database.insert_tasks(cursor, group))
        except pool.Unavailable as error:
            if not pool.is_about_a_lock(error):
                for environ, _ in members:
                    environ["tasks.unavailable"] = error
            return [None] * len(environs)
        created = {
            id(environ): tasks[new.id] for environ, new in members if database.is_same(new, tasks)
        }
        self.note(list(created.values()), time.perf_counter() - began)
        return [answer_created(created.get(id(environ))) for environ in environs]

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
