"""What the HTTP server needs to know of the WSGI application behind it."""

import logging
import traceback
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger("http")

LOGGED_CHARACTERS = 200
LOGGED_LINES = 100

Environ = dict[str, Any]
Answer = tuple[str, list[tuple[str, str]], bytes]
WsgiApp = Callable[..., Any]


class ErrorLog:
    """The stream wsgi.errors. What is written there, such as a stack trace, may quote a client: its
    lines are cut and escaped."""

    def write(self, text: str) -> None:
        """Log each line of a text."""
        for line in text.splitlines()[:LOGGED_LINES]:
            log.error("%s", ascii(line[:LOGGED_CHARACTERS])[1:-1])

    def writelines(self, texts: list[str]) -> None:
        """Log several texts."""
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        """Do nothing: write() has logged it."""


class Group(Protocol):
    """What the application can do for several requests at once."""

    def takes(self, environ: Environ) -> bool:
        """Tell by its head whether a request is of that kind."""

    def answer(self, environs: list[Environ]) -> list[Answer | None]:
        """Do what the requests ask for, and answer them; None for one that gets a thread and the
        application instead."""


class Application:
    """Calls a WSGI application, and what it can do for a group."""

    def __init__(self, app: WsgiApp, errors: ErrorLog, group: Group | None = None) -> None:
        self.app = app
        self.errors = errors
        self.group = group

    def takes(self, environ: Environ | None) -> bool:
        """Tell whether a request may be one of a group."""
        return self.group is not None and environ is not None and self.group.takes(environ)

    def answer(self, environs: list[Environ]) -> list[Answer | None]:
        """Return the answers of a group, None for each request that is to be tried alone."""
        assert self.group is not None
        try:
            return self.group.answer(environs)
        except Exception:
            log.error("a group of %d requests failed, each is tried alone", len(environs))
            self.errors.write(traceback.format_exc())
            return [None] * len(environs)

    def call(self, environ: Environ) -> Answer:
        """Run the application and collect its whole answer; 500 in JSON if it raises."""
        answer: list[Any] = []

        def start_response(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> None:
            answer[:] = status, headers

        try:
            chunks = self.app(environ, start_response)
            body = b"".join(chunks)
            if hasattr(chunks, "close"):
                chunks.close()
            status, headers = answer
        except Exception:
            log.error("%s %.200a failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            self.errors.write(traceback.format_exc())
            status, body = "500 Internal Server Error", b'{"error": "internal error, see the log"}'
            headers = [("Content-Type", "application/json")]
        if not any(name.lower() == "content-length" for name, _ in headers):
            headers = [*headers, ("Content-Length", str(len(body)))]
        return status, headers, body
