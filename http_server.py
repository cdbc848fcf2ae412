"""A WSGI server on the standard library: HTTP/1.1 with keep-alive, a thread per connection.

It is kept instead of http.server, which is lenient where two readers of a message may differ and
takes three times as long to parse a request (83 against 26 microseconds). It reads a whole request
before it answers, so that no answer can put a kept connection out of step (RFC 9112)."""

import contextlib
import errno
import logging
import socket
import socketserver
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import http_limits
from http_connection import Answer, Closed, Connection, Environ
from http_message import Refused

log = logging.getLogger("http")

MAX_CONNECTIONS = 512
CLOSING_AT_ONCE = 64  # over the cap: told to close, and about to end
LOGGED_CHARACTERS = 200
LOGGED_LINES = 100


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


class Server(socketserver.TCPServer):
    """Listens at once; serve() answers from threads of its own until close().

    authorize gets the environ of a head and returns how the request is refused, before its body is
    read, or None. At max_connections the connection that is idle for the longest is
    closed for a new one: its client has not sent a whole head, or has had its last answer.
    """

    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self,
        host: str,
        port: int,
        app: Callable[..., Any],
        authorize: Callable[[Environ], Refused | None] | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.app = app
        self.authorize = authorize
        self.max_connections = max_connections
        self.stopping = threading.Event()
        self.transit = http_limits.Transit()
        self.work = http_limits.Work()
        self.errors = ErrorLog()
        self.lock = threading.Lock()  # guards the two below
        self.open_connections = 0
        self.idle: dict[Connection, None] = {}  # the one that is idle for the longest first
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), socketserver.BaseRequestHandler)
        self.base: Environ = {
            "SERVER_NAME": self.server_address[0],
            "SERVER_PORT": str(self.server_address[1]),
            "SCRIPT_NAME": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": self.errors,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def serve(self) -> None:
        """Start to accept connections; returns at once."""
        http_limits.share_arena()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; without a file descriptor for it, close an idle one."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                log.warning("a new connection waits for a file descriptor: %s", error)
                with self.lock:
                    longest = self.pop_longest_idle()
                if longest is not None:
                    longest.end_soon()
                self.stopping.wait(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or a 503 when too many are open."""
        connection = Connection(self, request, client_address)
        if not self.admit(connection):
            self.refuse(request)
            return
        thread = threading.Thread(
            target=self.run, args=(connection,), name=f"http-{client_address[1]}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("a new connection was refused: %s", error)  # no more threads
            self.forget(connection)
            self.refuse(request)

    def admit(self, connection: Connection) -> bool:
        """Count a new connection as idle, in place of another one at the cap; tell whether it may
        stay."""
        longest = None
        with self.lock:
            if self.open_connections >= self.max_connections + CLOSING_AT_ONCE:
                return False
            if self.open_connections >= self.max_connections:
                longest = self.pop_longest_idle()
                if longest is None:
                    return False
            self.open_connections += 1
            self.idle[connection] = None
        if longest is not None:
            longest.end_soon()
        return True

    def pop_longest_idle(self) -> Connection | None:
        """Return the connection that is idle for the longest, and call it idle no more; the caller
        holds the lock."""
        longest = next(iter(self.idle), None)
        if longest is not None:
            del self.idle[longest]
        return longest

    def refuse(self, request: socket.socket) -> None:
        """Answer a new connection with a 503, as far as that takes no time, and close it."""
        body = b'{"error": "too many open connections, expected at most %d"}' % self.max_connections
        with request, contextlib.suppress(OSError):
            request.setblocking(False)
            request.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            request.shutdown(socket.SHUT_WR)
            request.recv(64 * 1024)  # closing over unread bytes would reset the connection

    def run(self, connection: Connection) -> None:
        """Serve one connection to its end, in its thread."""
        try:
            connection.answer_requests()
        except (Closed, OSError) as error:
            log.debug("connection from %s ended: %.200a", connection.address, str(error))
        except Exception:
            log.error("connection from %s failed", connection.address)
            self.errors.write(traceback.format_exc())
        finally:
            self.shutdown_request(connection.socket)
            self.forget(connection)

    def mark_busy(self, connection: Connection) -> None:
        """Note that a connection has a request under way."""
        with self.lock:
            self.idle.pop(connection, None)

    def mark_idle(self, connection: Connection) -> bool:
        """Note that a connection waits for its client; tell whether the server goes on."""
        with self.lock:
            self.idle[connection] = None
        return not self.stopping.is_set()

    def forget(self, connection: Connection) -> None:
        """Give back the place of a connection that has ended."""
        with self.lock:
            self.idle.pop(connection, None)
            self.open_connections -= 1

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

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log why a new connection got no thread; the other connections go on."""
        log.error("connection from %s failed", client_address)
        self.errors.write(traceback.format_exc())

    def close(self, seconds: float) -> None:
        """Stop accepting, let what clients have sent be answered, at most so many seconds."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        with self.lock:
            idle = list(self.idle)
        for connection in idle:
            connection.end_soon()
        deadline = time.monotonic() + seconds
        while self.open_connections and time.monotonic() < deadline:
            time.sleep(0.01)
