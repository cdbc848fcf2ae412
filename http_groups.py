"""Requests that the application can answer together: those that came while others were being
answered are the next group."""

import contextlib
import logging
import queue
import threading
import time
import traceback
from typing import TYPE_CHECKING, Protocol

from http_application import Answer, Environ
from http_connection import Connection

if TYPE_CHECKING:
    from http_server import Server

log = logging.getLogger("http")

WRITERS = 2  # one answers while the other waits for the application's database
GROUP = 64  # requests, and at most so many more that came with the last of these


class Group(Protocol):
    """What the application can do for several requests at once."""

    def takes(self, environ: Environ) -> bool:
        """Tell by its head whether a request is of that kind."""

    def answer(self, environs: list[Environ]) -> list[Answer | None]:
        """Do what the requests ask for, and answer them; None for one that gets a thread and the
        application instead."""


class Groups:
    """The requests that wait for a writer, and the writers, none of which waits for a client."""

    def __init__(self, server: "Server", group: Group | None) -> None:
        self.server = server
        self.group = group
        self.gathered: queue.SimpleQueue[list[Connection]] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the writers."""
        for number in range(WRITERS if self.group else 0):
            name = f"http-group-{number + 1}"
            threading.Thread(target=self.run, name=name, daemon=True).start()

    def takes(self, connection: Connection) -> bool:
        """Tell whether a connection's request may be one of a group, which waits from now on."""
        environ = connection.environ
        if self.group is None or environ is None or not connection.is_whole():
            return False
        environ["tasks.began"] = time.perf_counter()
        return self.group.takes(environ)

    def run(self) -> None:
        """Answer what has come together, the body of a thread."""
        while True:
            connections = self.gathered.get()
            with contextlib.suppress(queue.Empty):
                while len(connections) < GROUP:
                    connections += self.gathered.get_nowait()
            self.answer(connections)

    def answer(self, connections: list[Connection]) -> None:
        """Answer the requests of a group."""
        answers = self.answers(connections)
        for connection in connections:
            try:
                answer = answers.pop(0) if answers else None
                if answer is None:
                    self.server.start(connection)
                else:
                    connection.reply(*answer)
                    self.server.run(connection, may_wait=False)
            except Exception:  # without this thread, those that come would wait for ever
                self.server.fail(connection)

    def answers(self, connections: list[Connection]) -> list[Answer | None]:
        """Return what the application answers; nothing if each is to be tried alone."""
        assert self.group is not None
        try:
            return self.group.answer([connection.take_whole() for connection in connections])
        except Exception:
            log.error("a group of %d requests failed, each is tried alone", len(connections))
            self.server.errors.write(traceback.format_exc())
            return []
