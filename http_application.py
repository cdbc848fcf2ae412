"""What the HTTP server needs to know of the WSGI application behind it."""

import logging
import traceback
from collections.abc import Callable
from typing import Any

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


class Application:
    """Calls a WSGI application."""

    def __init__(self, app: WsgiApp, errors: ErrorLog) -> None:
        self.app = app
        self.errors = errors

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
